"""What every command starts from: device, data and dense model, as the common options say.

    Session.of(args) ─┬─ .model           the dense model, on the device
                      ├─ .calibration()   calibration images, augmented or not
                      ├─ .fingerprint(…)  what the run depends on
                      ├─ .accuracy(m)     top-1 on the test images
                      └─ .world           the processes that share the work (torchrun)

`load_compressed` reads what the commands save: a state dict with the grids of a quantised model.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import quant
from datautils import ArrayImages, ImageData, ImageSet, calibration_batches, load_data, test_batches
from modelutils import (
    check_layers,
    evaluate,
    evaluating,
    find_layers,
    get_model,
    load_checkpoint,
    load_state,
)
from obc.inputs.batches import Batches
from obc.solver.devices import resolve_device
from obc.solver.distributed import ALONE, World, join
from obc.solver.errors import UserError
from obc.solver.memory import default_memory
from obc.toolkit.fingerprints import (
    bytes_hash,
    chosen_options,
    content_hash,
    hessian_code,
    result_code,
    surroundings,
)


@dataclass(frozen=True)
class Session:
    """Device, data and dense model of one run."""

    args: argparse.Namespace
    device: torch.device
    data: ImageData
    model: nn.Module
    world: World = ALONE

    @classmethod
    def of(cls, args: argparse.Namespace) -> Session:
        """From the common options; raises UserError for what is wrong with them."""
        device = resolve_device(args.device)
        world = join(device)
        torch.backends.cudnn.allow_tf32 = False  # layers see inputs in full float32
        data = load_data(
            args.dataset,
            datapath=args.datapath,
            image_size=args.image_size,
            nsamples=args.nsamples,
            seed=args.seed,
            skip_bad_images=args.skip_bad_images,
        )
        torch.manual_seed(args.seed)  # for a model of the user's own that starts at random
        model = get_model(args.model, args.dataset, args.weights, len(data.classes)).to(device)
        check_model(model, args.model, data)
        return cls(args, device, data, model, world)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (3, self.data.image_size, self.data.image_size)

    def calibration(self, augment: bool = False, nrounds: int = 1) -> Batches:
        """Passes over the calibration images; not augmented unless asked for."""
        args = self.args
        return calibration_batches(
            self.data,
            batchsize=args.batchsize,
            nrounds=nrounds,
            augment=augment,
            seed=args.seed,
            workers=args.workers,
        )

    def fingerprint(
        self,
        parser: argparse.ArgumentParser | None,  # of the command; None: only of its calibration
        contents: Mapping[str, str],  # what else the result depends on, by name
        threads: bool = True,  # whether it does on their number
    ) -> dict[str, str]:
        """Everything that the result is a function of, by name (resuming.py)."""
        marks = {} if parser is None else chosen_options(parser, vars(self.args))
        code = hessian_code() if parser is None else result_code(Path(parser.prog).stem)
        marks["--image-size"] = str(self.data.image_size)
        if ".py:" in self.args.model:
            file = Path(self.args.model.rpartition(":")[0])
            marks["code of the model"] = bytes_hash([file.read_bytes()])
        marks["dense weights"] = content_hash(self.model.state_dict())
        marks["calibration images"] = images_hash(self.data.calibration)
        if parser is not None and self.device.type != "cpu":  # how many rows go in one product
            memory = self.args.memory or default_memory(self.device) / 1e9
            marks["--memory"] = f"{memory:g}"
        return marks | contents | surroundings(self.device, code, threads)

    def accuracy(self, model: nn.Module) -> float:
        """Top-1 in percent on the test images; each of several processes looks at its share."""
        batches = test_batches(self.data, batchsize=self.args.batchsize, workers=self.args.workers)
        shard = batches.shard(self.world.rank, self.world.size)
        return evaluate(model, shard, self.device, self.world)


def images_hash(images: ImageSet) -> str:
    """A hash of the chosen images as they are stored, their order, labels and view."""

    def parts() -> Iterator[bytes]:
        yield f"{images.view} {[images.source.labels[index] for index in images.chosen]}".encode()
        for index in images.chosen:
            if isinstance(images.source, ArrayImages):
                yield images.source.pixels[index].tobytes()
            else:
                yield Path(images.source.files[index]).read_bytes()

    return bytes_hash(parts())


def check_model(model: nn.Module, name: str, data: ImageData) -> None:
    """Raise a UserError, before hours are spent, unless the model can be compressed and run."""
    if not find_layers(model):
        raise UserError(f"{name} has no convolution or linear layer to compress")
    check_layers(model, name)
    for key, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{name}: {key} has NaN or infinite values")
    size, classes = data.image_size, len(data.classes)
    images = torch.zeros(2, 3, size, size, device=next(model.parameters()).device)
    try:
        with evaluating(model):
            outputs = model(images)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise UserError(
            f"{name} cannot take images of {size}×{size} pixels (--image-size): {error}"
        ) from None
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != len(images):
        raise UserError(f"{name} does not return class scores of shape (images, classes)")
    if outputs.shape[1] < classes:
        raise UserError(
            f"{name} tells {outputs.shape[1]} classes apart, but {data.name} has {classes}"
        )


def load_compressed(model: nn.Module, path: str | os.PathLike[str]) -> Mapping[str, Tensor]:
    """Load a checkpoint that a command of ours saved, with its grids, into a dense model.

    Returns the state dict. Raises UserError where it does not fit.
    """
    state = load_checkpoint(path, finite=False)
    try:
        quant.restore_grids(model, state)
    except (AttributeError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{path}: does not fit the model: {error}") from None
    load_state(model, state, path)
    return state
