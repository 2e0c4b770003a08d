"""What every command starts from: device, task and dense model, given by the common options.

    Session.of(common_options(args)) ─┬─ .model           the dense model, on the device
                                      ├─ .calibration()   calibration images, augmented or not
                                      ├─ .fingerprint(…)  what the run depends on
                                      ├─ .dense_figures() of .model, on the calibration images
                                      ├─ .evaluation(m)   figures and KL on test data
                                      ├─ .task            what the model is for (`tasks.py`)
                                      └─ .world           the processes that share the work

`Invocation` is a command as it was called, for its fingerprint and its record. `load_compressed`
reads what the commands save: a state dict with the grids of a quantised model.
"""

from __future__ import annotations

import argparse
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import quant
from datautils import (
    DATASETS,
    DEFAULT_CLASSES,
    PHOTOGRAPHS,
    ImageData,
    calibration_batches,
    default_preprocessing,
    load_data,
)
from modelutils import (
    RANDOM,
    SHIPPED_WEIGHTS,
    Example,
    get_model,
    load_state,
    made_by,
    own_preprocessing,
)
from obc.inputs.attention import split_attention
from obc.inputs.batches import Batches, ShardedBatches
from obc.inputs.checkpoints import fitting_weights
from obc.inputs.preprocessing import Preprocessing
from obc.inputs.tasks import Task
from obc.inputs.timm_models import TIMM
from obc.inputs.usercode import files_imported
from obc.solver.distributed import ALONE, World, join, resolve_device
from obc.solver.errors import UserError, log
from obc.solver.memory import default_memory
from obc.toolkit.checks import (
    check_model,
    check_network,
    check_task,
    first_outputs,
    first_outputs_of,
    undisturbed,
)
from obc.toolkit.evaluation import DenseScores, Evaluation, evaluate, evaluate_task, mean_loss
from obc.toolkit.fingerprints import (
    bytes_hash,
    chosen_options,
    content_hash,
    hessian_code,
    installed_versions,
    result_code,
    surroundings,
)
from obc.toolkit.imagetask import ImageTask
from obc.toolkit.records import check_repeat

IMAGE_OPTIONS = ("resize", "crop", "interpolation", "mean", "std")
DATA_OPTIONS = ("datapath", "classes", "labels", "image_size", "skip_bad_images", "workers")
DENSE_IMAGES = 1024  # the most that the dense model's top-1 is measured on


@dataclass(frozen=True)
class CommonOptions:
    """The options that every command takes (`cli.add_common_options`)."""

    model: str
    dataset: str
    weights: str | None
    datapath: str | None
    classes: str | None  # file of class names
    image_size: int | None  # pixels
    seed: int
    nsamples: int
    batchsize: int
    workers: int | None
    nrounds: int | None  # passes over the calibration images
    skip_bad_images: bool
    noaug: bool
    device: str
    memory: float | None  # GB
    weights_key: str | None = None  # a place in the file of weights
    labels: str | None = None  # file of the test images' labels
    resize: int | None = None  # pixels; this and the next: None if the network decides
    crop: str | None = None
    interpolation: str | None = None
    mean: str | None = None  # as cli.channels takes it
    std: str | None = None

    def preprocessing(self, model: nn.Module) -> Preprocessing:
        """How images are made for the model of these options."""
        given = {name: getattr(self, name) for name in IMAGE_OPTIONS} | {"size": self.image_size}
        return preprocessing(self.model, self.dataset, model, given)


def common_options(args: argparse.Namespace) -> CommonOptions:
    """The common options of a command line."""
    return CommonOptions(**{item.name: getattr(args, item.name) for item in fields(CommonOptions)})


@dataclass(frozen=True)
class Invocation:
    """A command as it was called."""

    command: str  # the script, as in "spdy.py"
    arguments: dict[str, Any]  # every word and option, for the record
    options: dict[str, str]  # those that change the result, by the names that users know
    defaults: dict[str, str]  # of the same options
    restart: bool
    repeat: str | None  # the file of a record

    @classmethod
    def of(cls, parser: argparse.ArgumentParser, args: argparse.Namespace) -> Invocation:
        """From options that are checked, their defaults filled in."""
        arguments = dict(vars(args))
        options = chosen_options(parser, arguments)
        defaults = {action.dest: action.default for action in parser._actions}
        defaults = chosen_options(parser, defaults)
        return cls(parser.prog, arguments, options, defaults, args.restart, args.repeat)


@dataclass(frozen=True)
class Session:
    """Device, task and dense model of one run."""

    options: CommonOptions
    device: torch.device
    task: Task
    model: nn.Module
    world: World = ALONE

    @classmethod
    def of(cls, options: CommonOptions) -> Session:
        """Raises UserError for options that do not fit together."""
        device = resolve_device(options.device)
        world = join(device)
        torch.backends.cudnn.allow_tf32 = False  # layers see inputs in full float32
        task = load_task(options)
        torch.manual_seed(options.seed)  # for a model of the user's own that starts at random
        classes = len(task.data.classes) if isinstance(task, ImageTask) else None
        model = get_model(
            options.model, options.dataset, options.weights, classes, options.weights_key
        ).to(device)
        if isinstance(task, ImageTask):
            task.data = task.data.seen_through(options.preprocessing(model))
            check_model(model, options.model, task.data)
        else:
            check_task(model, options.model, task)
        split_attention(model, partial(first_outputs_of, model, task.example))
        return cls(options, device, task, model, world)

    @property
    def weights_name(self) -> str:
        """The dense weights, as the user knows them."""
        return self.options.weights or f"the weights of {self.options.model}"

    def shard_count(self, asked: int | None) -> int:
        """How many shards of the images are summed apart: --shards, or one for each process.

        Sums depend on it, by rounding. Raises UserError where several processes are not as many.
        """
        if asked and self.world.size not in (1, asked):
            raise UserError(f"--shards {asked}: there are {self.world.size} processes")
        return asked or self.world.size

    def calibration(self, augment: bool = False, nrounds: int = 1) -> ShardedBatches:
        """Passes over the calibration images, not augmented by default."""
        return self.task.batches(augment, nrounds)

    def fingerprint(
        self,
        invocation: Invocation | None,  # None: of the calibration only
        contents: Mapping[str, str],  # what else the result depends on, by name
        threads: bool = True,  # whether it depends on their number
    ) -> dict[str, str]:
        """Everything that the result is a function of, by name (`fingerprints.py`).

        Raises UserError if --repeat names the record of a run with another one.
        """
        marks = dict(invocation.options) if invocation else {}
        code = result_code(Path(invocation.command).stem) if invocation else hessian_code()
        for what, name in (("model", self.options.model), ("task", self.options.dataset)):
            if is_code(name):
                file = Path(name.rpartition(":")[0])
                code_files = [file, *files_imported(file)]
                marks[f"code of the {what}"] = bytes_hash(path.read_bytes() for path in code_files)
        if self.options.model.startswith(TIMM):
            marks |= installed_versions(["timm"])
        marks["dense weights"] = content_hash(self.model.state_dict())
        marks |= self.task.marks()
        if invocation is None:  # Hessians do not depend on labels
            marks.pop("--classes", None)
        if invocation and self.device.type != "cpu":  # how many rows go in one product
            memory = self.options.memory or default_memory(self.device) / 1e9
            marks["--memory"] = f"{memory:g}"
        marks |= contents | surroundings(self.device, code, threads)
        if invocation:
            check_repeat(invocation.repeat, marks, invocation.defaults)
        return marks

    @cached_property
    def dense_scores(self) -> DenseScores:
        """Of this process's test images."""
        return DenseScores(self.model)

    def evaluation(self, model: nn.Module) -> Evaluation:
        """How good a model is on test data, and how close to the dense one."""
        scores = None if model is self.model else self.dense_scores
        if (tests := self.task.tests()) is None:
            return evaluate_task(model, self.task, self.device, scores, self.world)
        shard = tests.shard(self.world.rank, self.world.size)
        return evaluate(model, shard, self.device, scores, self.world)

    @property
    def image_data(self) -> ImageData:
        """The images; raises UserError for a task that has none."""
        if isinstance(self.task, ImageTask):
            return self.task.data
        raise UserError(f"{self.options.dataset}: this needs a dataset of images and their classes")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.image_data.preprocessing.image_shape

    def dense_top1(self, batches: Batches | None = None) -> float:
        """The dense model's top-1 on the calibration images, logged (`dense_top1`).

        `batches`: this process's share of all of them, if they are in memory already.
        """
        loading = self.options.batchsize, self.options.workers
        return dense_top1(self.model, self.image_data, self.device, *loading, self.world, batches)

    def dense_figures(self, batches: Batches | None = None) -> dict[str, float]:
        """How well the dense model does on the calibration data, logged; as it is in records.

        `batches`: this process's share of all of it, if it is in memory already.
        """
        if isinstance(self.task, ImageTask):
            return {"dense_top1_calibration": self.dense_top1(batches)}
        if not self.task.logits:
            log.info("KL and agreement are not measured: outputs are no scores of classes")
        if not self.task.has_loss:
            return {}
        with undisturbed(self.device):
            share = batches or self.calibration().shard(self.world.rank, self.world.size)
            loss = mean_loss(self.model, share, self.device, self.world, self.task)
        log.info("dense: loss %.4g on %d calibration examples", loss, self.task.count)
        return {"dense_loss_calibration": loss}


def is_code(name: str) -> bool:
    """Whether MODEL or DATASET is the user's own, path/to/file.py:function."""
    return ".py:" in name


def default_rounds(args: argparse.Namespace) -> int:
    """Passes over the calibration images."""
    return args.nrounds or (1 if args.noaug or is_code(args.dataset) else 10)


def load_task(options: CommonOptions) -> Task:
    """The images of a dataset, or the task that the user's function returns."""
    if not is_code(options.dataset):
        data = load_data(
            options.dataset,
            datapath=options.datapath,
            image_size=options.image_size,
            nsamples=options.nsamples,
            seed=options.seed,
            skip_bad_images=options.skip_bad_images,
            class_file=options.classes,
            label_file=options.labels,
        )
        named = options.classes is not None
        return ImageTask(data, options.batchsize, options.workers, options.seed, named)
    for name in (*DATA_OPTIONS, *IMAGE_OPTIONS):
        if getattr(options, name):
            raise UserError(
                f"--{name.replace('_', '-')} is for images: {options.dataset} makes its own batches"
            )
    if (options.nrounds or 1) > 1:
        raise UserError(f"--nrounds counts augmented passes: {options.dataset} has no images")
    torch.manual_seed(options.seed)
    task = made_by(options.dataset, Task)
    task.name, task.nsamples = options.dataset.rpartition(":")[2], options.nsamples
    return task


def dense_top1(
    model: nn.Module,
    data: ImageData,
    device: torch.device,
    batchsize: int,
    workers: int | None,
    world: World = ALONE,
    batches: Batches | None = None,  # this process's share of all images; None: load some
) -> float:  # percent
    """Top-1 of the dense model on the calibration images, not augmented: DENSE_IMAGES at most, or
    `batches`.

    Logs it, since it shows whether labels and pixels are what the model was trained on, and warns
    if guessing would do about as well. No global generator is advanced.
    """
    images = data.calibration
    if batches is None:
        images = replace(images, chosen=images.chosen[:DENSE_IMAGES])
        some = replace(data, calibration=images)
        loaded = calibration_batches(some, batchsize=batchsize, workers=workers)
        batches = loaded.shard(world.rank, world.size)
    with undisturbed(device):
        top1 = evaluate(model, batches, device, world=world).top1
    total, count = len(data.calibration), len(images)
    which = str(count) if count == total else f"{count} of {total}"
    seen = data.preprocessing
    log.info("dense: top-1 %.2f on %s calibration images, %s", top1, which, seen)
    labels = Counter(images.source.labels[index] for index in images.chosen)
    if top1 <= (level := chance_level(labels)):
        log.warning(
            "the dense model is near chance: guessing gets up to %.2f on these images. Is it "
            "trained, are the class folders in the order of its outputs (--classes), and are "
            "pixels normalised as in its training?",
            level,
        )
    return top1


def chance_level(labels: Mapping[int, int]) -> float:  # images by class
    """The top-1 in percent up to which a model may be guessing; below 0 for a single class.

    The best guess without looking at an image, the most frequent class, is right in a share p of
    the n images. Two standard errors, √(p (1 − p) / n), are added: guessing exceeds that in about
    one of 40 runs.

    >>> round(chance_level({0: 50, 1: 50}), 6), chance_level({3: 7})
    (60.0, -1.0)
    """
    if len(labels) < 2:
        return -1.0
    count = sum(labels.values())
    share = max(labels.values()) / count
    return 100 * (share + 2 * math.sqrt(share * (1 - share) / count))


def dense_files(model: str, dataset: str, weights: str | None) -> dict[str, str | Path | None]:
    """The files that the dense model is made from, by what names them."""
    code, task = (x.rpartition(":")[0] if is_code(x) else None for x in (model, dataset))
    shipped = None if weights else SHIPPED_WEIGHTS.get((model, dataset))
    files = {"--weights": weights, "the model's code": code, "the shipped weights": shipped}
    return files | {"the task's code": task}


def preprocessing(
    name: str, dataset: str, model: nn.Module, given: Mapping[str, Any]
) -> Preprocessing:
    """How images are made for a model: as it says, but for the options given."""
    told = own_preprocessing(name, dataset in PHOTOGRAPHS, model)
    return default_preprocessing(dataset).changed(name, told).changed("options", given)


def model_without_images(options: CommonOptions) -> tuple[nn.Module, Example]:
    """The model as a run would see it, and the shape of an image, without reading any image.

    Without --weights it is untrained, since nothing but its shapes is of interest. For a task, the
    model as it is, and the task's inputs.
    """
    if is_code(options.dataset):
        session = Session.of(options)
        return session.model, session.task.example
    if options.dataset not in DATASETS:
        raise UserError(f"unknown dataset {options.dataset}; choose from {', '.join(DATASETS)}")
    torch.manual_seed(options.seed)
    model = get_model(
        options.model,
        options.dataset,
        options.weights or RANDOM,
        DEFAULT_CLASSES.get(options.dataset) if options.weights in (None, RANDOM) else None,
        options.weights_key,
    ).to(resolve_device(options.device))
    image_shape = options.preprocessing(model).image_shape
    check_network(model, options.model)
    images = torch.zeros(2, *image_shape, device=next(model.parameters()).device)
    first_outputs(model, options.model, images)
    split_attention(model, partial(first_outputs_of, model, image_shape))
    return model, image_shape


def load_compressed(model: nn.Module, path: str | os.PathLike[str]) -> Mapping[str, Tensor]:
    """Load a checkpoint that one of the commands saved, with its grids, into a dense model.

    Returns the state dict. Raises UserError if it does not fit.
    """
    state = fitting_weights(path, model, additions=(quant.WEIGHT_GRID, quant.ACTIVATION_GRID))
    try:
        quant.restore_grids(model, state)
    except (AttributeError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{path}: does not fit the model: {error}") from None
    load_state(model, state, path)
    return state
