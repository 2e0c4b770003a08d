"""Fine-tuning at equal size: `python -m pruning_vs_quantization.main train-compressed …`.

Kuzmin et al. (arXiv 2307.02973), the fourth part of the study: starting from the same dense
weights, networks are trained in quantised form or pruned during training (training.py).

A run leaves, under a name that says what was done (such as rn20_cifar10_w4_seed0), in --out:

    <name>.json         settings and figures: top-1 and seconds of each epoch, sparsity, bits
    <name>.pth          the compressed network, for every command of the toolkit: weights on their
                        grids, with the grids, and batch norms in place
    <name>_folded.pth   the same with batch norms folded (compressed_model.py)

and, while it is running, a hidden folder that an interrupted run resumes from. `table` compares the
runs in a folder; `first-last` makes untrained networks comparable.

--architecture is `<network>_quantized`: any MODEL of the toolkit (resnet18, mobilenet_v2, rn20,
path/to/file.py:function) or efficientnet_lite, timm's efficientnet_lite0. The suffix is that of the
published commands; the network so named is the dense one, which training then compresses.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file in this folder, as the published README does
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import pruning_vs_quantization  # noqa: F401

import argparse
import copy
import logging
import os
import random
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from datautils import DATASETS
from modelutils import check_classes, first_and_last, get_model, load_state
from obc.inputs import files
from obc.inputs.checkpoints import fitting_weights
from obc.inputs.preprocessing import Preprocessing
from obc.inputs.vision import torchvision
from obc.solver.errors import UserError, log
from obc.toolkit import cli
from obc.toolkit.checks import check_model, first_outputs
from obc.toolkit.fingerprints import content_hash, result_code, surroundings
from obc.toolkit.resume import open_state, state_folder
from obc.toolkit.session import dense_top1, load_compressed, preprocessing
from pruning_vs_quantization.compressed_model import folded
from pruning_vs_quantization.fine_tuning_table import make_table
from pruning_vs_quantization.plots import study_package
from pruning_vs_quantization.study_files import PLOTS_DATA, finished, write_result
from pruning_vs_quantization.training import FineTuning
from pruning_vs_quantization.training_images import TrainingData, training_images
from pruning_vs_quantization.training_options import (
    add_training_options,
    network_name,
    training_device,
    training_options,
)
from quant import put_layer

TIMM_NAMES = {"efficientnet_lite": "efficientnet_lite0"}


def build_parser() -> argparse.ArgumentParser:
    name, network = "pruning_vs_quantization.main", "--architecture rn8_quantized --dataset digits"
    options = "--no-act-quant --n-bits 4 --max-epochs 2"
    example = f"python -m {name} train-compressed {network} {options}"
    parser = cli.Parser(prog=name, description=__doc__.splitlines()[0], example=example)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add_command(
        command: str, work: Any, text: str, options: str, parents: Iterable[Any] = ()
    ) -> argparse.ArgumentParser:
        words = {"help": text, "description": f"{text[0].upper()}{text[1:]}.", "parents": parents}
        words["example"] = f"python -m {name} {command} {network} {options}"
        added = commands.add_parser(command, **words)
        added.set_defaults(run=work)
        return added

    text = "fine-tune a network, quantised or pruned"
    add_training_options(add_command("train-compressed", train_compressed, text, options))
    trained = argparse.ArgumentParser(add_help=False)
    add = trained.add_argument
    add("--architecture", metavar="NAME_quantized", required=True, help="of the networks")
    add("--dataset", choices=DATASETS, default="imagenet", help="what they were trained on")
    text, options = "compare the runs in a folder", "--out plots_data/fine_tuning"
    add = add_command("table", make_table, text, options, [trained]).add_argument
    text = "lines with method, bits, reached, top-1 of networks without training"
    add("--untrained", metavar="FILE", type=Path, help=text)
    text, default = "folder with the runs, and for the table", PLOTS_DATA / "fine_tuning"
    add("--out", metavar="DIR", type=Path, default=default, help=text)
    text, options = "take first and last layer from another network", "rn8_w4.pth rn8_w8.pth"
    options += " --save rn8_ends.pth"
    ends = add_command("first-last", exchange_first_and_last, text, options, [trained])
    add = ends.add_argument
    add("strong", metavar="FILE", type=Path, help="checkpoint to change")
    add("mild", metavar="FILE", type=Path, help="checkpoint to take them from")
    add("--weights", metavar="FILE", help="dense weights of the network")
    text = "pixels of the images that the network takes (default: as in train-compressed)"
    add("--image-size", metavar="N", type=cli.positive_int, help=text)
    add("--save", metavar="FILE", type=Path, required=True, help="where to save")
    return parser


def train_compressed(args: argparse.Namespace) -> None:
    """One run, unless it was done before; prints its accuracy."""
    options = training_options(args)
    device = training_device(args.device, args.cuda)
    settings = options.settings() | {"seed": args.seed}
    stem = args.out / options.run_name(args.seed)
    result = stem.with_name(f"{stem.name}.json")
    files.check_writable(result)
    figures = finished(result, settings, args.restart)
    folder = state_folder(result)
    if figures and "preprocessing" not in figures:  # by an earlier version, from the dataset alone
        log.warning("%s: does not say how images were prepared; --restart trains anew", result)
    if figures is None:
        data = training_images(options, args.seed)
        with seeded(args.seed, torch.device("cpu")):  # a user's own model may start at random
            inputs = options.architecture, options.dataset, options.weights
            dense = dense_network(*inputs, len(data.classes))
        seen = study_preprocessing(*inputs[:2], dense, options.image_size)
        data = data.seen_through(seen)
        check_model(dense, options.architecture, data)
        if device.type == "cpu":
            dense = dense.to(memory_format=torch.channels_last)
        dense = dense.to(device)
        marks = {f"--{name.replace('_', '-')}": str(x) for name, x in settings.items()}
        marks["dense weights"] = content_hash(dense.state_dict())
        marks["preprocessing"] = str(seen)
        marks |= surroundings(device, result_code("pruning_vs_quantization.training"))
        loading = options.batch_size, options.num_workers
        dense_figure = dense_top1(dense, data, device, *loading)
        with open_state(folder, marks, args.restart) as state:
            images = TrainingData.decode(options, args.seed, data)
            run = FineTuning(options, dense, images, device)
            with seeded(args.seed, device, options.deterministic):
                plain = run.run(state)
            figures = run.figures() | {"dense_top1_calibration": dense_figure}
            figures["preprocessing"] = seen.record()
            files.save_checkpoint(plain.state_dict(), stem.with_name(f"{stem.name}.pth"))
            if (norms_folded := folded(plain)) is not None:
                path = stem.with_name(f"{stem.name}_folded.pth")
                files.save_checkpoint(norms_folded.state_dict(), path)
            write_result(result, settings, figures)
    shutil.rmtree(folder, ignore_errors=True)
    cli.print_result(f"top-1 {figures['top1']:.2f}")


@contextmanager
def seeded(seed: int, device: torch.device, deterministic: bool = False) -> Iterator[None]:
    """Inside, PyTorch's and Python's global generators start from a seed.

    If asked for, only algorithms are used that give the same bits every time.
    """
    state, cudnn = random.getstate(), torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.benchmark
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        random.seed(seed)
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS
            torch.use_deterministic_algorithms(True, warn_only=True)
            cudnn.benchmark = False
        try:
            yield
        finally:
            random.setstate(state)
            torch.use_deterministic_algorithms(before[0])
            cudnn.benchmark = before[1]


def exchange_first_and_last(args: argparse.Namespace) -> None:
    """Save a network with the first and the last layer of a milder one.

    Kuzmin et al. keep these layers at 8 bits. A network compressed without training has all layers
    at the same level; since layers were compressed independently, taking two of them from a milder
    network is as good as having compressed them that way.
    """
    files.check_writable(args.save)
    inputs = {"the input": args.strong, "the milder one": args.mild, "--weights": args.weights}
    files.check_keeps("--save", args.save, inputs)
    model = dense_network(args.architecture, args.dataset, args.weights)
    milder = copy.deepcopy(model)
    load_compressed(model, args.strong)
    load_compressed(milder, args.mild)
    seen = study_preprocessing(args.architecture, args.dataset, model, args.image_size)
    images = torch.zeros(2, *seen.image_shape)
    first_outputs(model, args.architecture, images)
    ends = first_and_last(model, images)
    for name in ends:
        put_layer(model.get_submodule(name), milder.get_submodule(name).state_dict())
    files.save_checkpoint(model.state_dict(), args.save)
    log.info("%s: %s from %s", args.save, " and ".join(ends), args.mild)


# -- dense networks --------------------------------------------------------------------------------


def dense_network(
    architecture: str,
    dataset: str,
    weights: str | None,  # a file; None: the weights to download, or the shipped
    classes: int | None = None,  # of the dataset; None: whatever the weights have
) -> nn.Module:
    """The trained dense network, in eval mode, on the CPU. Raises UserError if there is none."""
    name = network_name(architecture)
    if name not in TIMM_NAMES:
        return get_model(name, dataset, weights, classes)
    torchvision.ops  # noqa: B018  timm imports torchvision, which vision.py has to load first
    timm = study_package("timm")
    if weights is not None:
        state = fitting_weights(weights, timm.create_model(TIMM_NAMES[name]))
        weights_classes = len(state["classifier.weight"])
        check_classes(f"{weights}: these weights have", weights_classes, dataset, classes)
        model = timm.create_model(TIMM_NAMES[name], num_classes=weights_classes)
        load_state(model, state, weights)
        return model.float().eval()
    hub = logging.getLogger("huggingface_hub")  # logs every attempt; we report the last error
    level = hub.level
    hub.setLevel(logging.CRITICAL)
    try:
        return timm.create_model(TIMM_NAMES[name], pretrained=True).float().eval()
    except (OSError, RuntimeError) as error:  # no network, no such page
        reason = str(error).partition("\n")[0]
        text = f"{name}: its weights cannot be downloaded ({reason}); pass --weights FILE"
        raise UserError(text) from None
    finally:
        hub.setLevel(level)


def study_preprocessing(
    architecture: str, dataset: str, model: nn.Module, size: int | None
) -> Preprocessing:
    """How images are made for a dense network, as the toolkit's commands make them."""
    name = network_name(architecture)
    name = f"timm:{TIMM_NAMES[name]}" if name in TIMM_NAMES else name
    return preprocessing(name, dataset, model, {"size": size})


def run(args: argparse.Namespace) -> None:
    args.run(args)


def main(argv: list[str] | None = None) -> int:
    return cli.command(build_parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
