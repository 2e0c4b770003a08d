"""The options of `train-compressed`, their defaults, and what cannot be asked for together."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from datautils import DATASETS
from obc.solver.distributed import resolve_device
from obc.solver.errors import UserError
from obc.toolkit import cli
from obc.toolkit.leveldb import model_tag
from pruning_vs_quantization.architectures import network_name
from pruning_vs_quantization.schedules import FORMS, learning_rate_schedule
from pruning_vs_quantization.starting_ranges import METHODS
from pruning_vs_quantization.study_files import add_study_options

OPTIMISERS = ("SGD", "Adam", "AdamW")
NOT_SETTINGS = {  # what the figures do not hang on
    "command",
    "run",
    "out",
    "restart",
    "device",
    "cuda",
    "num_workers",
    "tb_logging_dir",
}


def bits(text: str) -> int:
    """argparse type: 2 … 16."""
    value = int(text) if text.isdecimal() else 0
    if not 2 <= value <= 16:
        raise argparse.ArgumentTypeError(f"must be 2 to 16; got {text}")
    return value


def momentum(text: str) -> float:
    """argparse type: a number in (0, 1]."""
    value = cli.positive_float(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1]; got {text}")
    return value


def switch(group: Any, name: str, default: bool | None, text: str) -> None:
    """Add --name and --no-name."""
    off = " (default: off)" if default is False else ""
    option = group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=text + off)
    option.default = default  # given above, Python before 3.13 would tell of it a second time


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """All options of train-compressed."""
    _add_network(parser.add_argument_group("network and images"))
    _add_training(parser.add_argument_group("training"))
    _add_quantisation(parser.add_argument_group("quantisation"))
    _add_pruning(parser.add_argument_group("pruning"))
    _add_oscillations(parser.add_argument_group("oscillating weights"))
    group = parser.add_argument_group("machine")
    switch(group, "cuda", None, "as --device cuda; --no-cuda: as --device cpu")
    switch(group, "deterministic", False, "only algorithms that give the same bits every time")
    group.add_argument(
        "--tb-logging-dir", metavar="DIR", help="where to log for TensorBoard (default: nowhere)"
    )
    add_study_options(parser, "fine_tuning")


def _add_network(group: Any) -> None:
    add = group.add_argument
    add(
        "--architecture",
        metavar="NAME_quantized",
        required=True,
        help="resnet18_quantized resnet50_quantized mobilenet_v2_quantized "
        "efficientnet_lite_quantized, or any MODEL of main_trueobs.py and _quantized",
    )
    add("--dataset", choices=DATASETS, default="imagenet", help="what to train on")
    add(
        "--images-dir",
        metavar="DIR",
        help="folder with train/ and val/ (default: ../imagenet, ../cifar10; digits needs none)",
    )
    add(
        "--weights",
        metavar="FILE",
        help="dense weights to start from (default: those to download, or the shipped)",
    )
    add(
        "--image-size",
        metavar="N",
        type=cli.positive_int,
        help="side of the network's input in pixels "
        "(default: imagenet and folder 224, cifar10 32, digits 16)",
    )
    add(
        "--train-samples",
        metavar="N",
        type=cli.positive_int,
        help="training images, chosen by --seed (default: all)",
    )
    switch(group, "augment", True, "random crops or shifts, and flips, of training images")
    add("--noaug", dest="augment", action="store_false", help="the same as --no-augment")
    add(
        "--num-workers",
        metavar="N",
        type=cli.nonnegative_int,
        help="processes that decode images (default: 0 for cifar10 and digits, which are decoded "
        "once, otherwise one per core, 8 at most)",
    )


def _add_training(group: Any) -> None:
    add = group.add_argument
    add("--max-epochs", metavar="N", type=cli.positive_int, default=20, help="passes over images")
    add("--batch-size", metavar="N", type=cli.positive_int, default=128, help="images per batch")
    add("--optimizer", choices=OPTIMISERS, default="SGD", help="of weights, biases and norms")
    add("--learning-rate", metavar="F", type=cli.positive_float, default=1e-2, help="at the start")
    add(
        "--learning-rate-schedule",
        metavar="SCHEDULE",
        type=learning_rate_schedule,
        default="cosine",
        help=f"{FORMS}. The number of a cosine is the learning rate at the end "
        "(0.01 × --learning-rate without it), of the others the factor",
    )
    add("--momentum", metavar="F", type=cli.fraction, default=0.9, help="of SGD")
    add(
        "--weight-decay",
        metavar="F",
        type=cli.nonnegative_float,
        default=1e-4,
        help="of the optimiser",
    )
    switch(
        group,
        "reestimate-bn-stats",
        False,
        "collect the running statistics of batch norms anew before each evaluation",
    )
    add(
        "--reestimate-bn-batches",
        metavar="N",
        type=cli.positive_int,
        default=50,
        help="training batches, not augmented, that they are averages of",
    )


def _add_quantisation(group: Any) -> None:
    add = group.add_argument
    switch(group, "weight-quant", True, "quantise weights; first and last layer: 8 bits")
    switch(group, "act-quant", True, "quantise the inputs of layers; first and last: 8 bits")
    add("--n-bits", metavar="B", type=bits, default=4, help="bits of weights, 2 to 16")
    add("--n-bits-act", metavar="B", type=bits, help="bits of inputs (default: as --n-bits)")
    switch(group, "per-channel", False, "a step for each output channel, not for each layer")
    add(
        "--weight-quant-method",
        choices=METHODS,
        default="MSE",
        help="range of weights at the start: of least squared error, or from least to greatest",
    )
    add("--act-quant-method", choices=METHODS, default="MSE", help="the same of inputs")
    add(
        "--num-est-batches",
        metavar="N",
        type=cli.positive_int,
        default=1,
        help="batches that ranges of inputs are found on",
    )
    switch(group, "sep-quant-optimizer", True, "an optimiser of their own for the steps")
    add("--quant-optimizer", choices=OPTIMISERS, default="Adam", help="which")
    add(
        "--quant-learning-rate",
        metavar="F",
        type=cli.positive_float,
        default=1e-5,
        help="its learning rate at the start; follows the same schedule",
    )
    add(
        "--quant-weight-decay",
        metavar="F",
        type=cli.nonnegative_float,
        default=0.0,
        help="weight decay of the steps, whichever optimiser they have",
    )


def _add_pruning(group: Any) -> None:
    add = group.add_argument
    add(
        "--prune-method",
        choices=("none", "zhu_gupta"),
        default="none",
        help="zhu_gupta: gradual magnitude pruning, sparsity along a cubic",
    )
    add("--s-i", metavar="S", type=cli.fraction, default=0.0, help="sparsity at the start")
    add(
        "--s-f",
        metavar="S",
        type=cli.fraction,
        help="sparsity at the end (default: 0.75, or of the pattern)",
    )
    add(
        "--prune-epoch-start",
        metavar="E",
        type=cli.nonnegative_int,
        default=0,
        help="epochs done when pruning begins",
    )
    add(
        "--prune-last-epoch",
        metavar="E",
        type=cli.positive_int,
        help="epochs done when the last weights go (default: three quarters of --max-epochs)",
    )
    add(
        "--delta-t",
        metavar="N",
        type=cli.positive_int,
        help="steps between masks (default: 100, or a twentieth of the pruning if that is less)",
    )
    add(
        "--tile-size",
        metavar="T",
        type=cli.positive_int,
        help="prune in tiles of T weights along input channels (default: no pattern)",
    )
    add("--zeros-per-tile", metavar="Z", type=cli.positive_int, help="zeros in each of them")
    add(
        "--first-last-sparsity",
        metavar="S",
        type=cli.fraction,
        default=0.5,
        help="most that the first and the last layer are pruned; 0.5 is the size of 8 bits",
    )


def _add_oscillations(group: Any) -> None:
    add = group.add_argument
    add(
        "--oscillations-dampen-weight",
        metavar="F",
        type=cli.nonnegative_float,
        default=0.0,
        help="weight in the loss of latent weights' squared distance to the grid; 0: none",
    )
    add(
        "--oscillations-dampen-weight-final",
        metavar="F",
        type=cli.nonnegative_float,
        help="the same at the end, reached along a cosine (default: the same)",
    )
    add(
        "--oscillations-freeze-threshold",
        metavar="F",
        type=cli.nonnegative_float,
        default=0.0,
        help="oscillations per step above which a weight is frozen; 0: never",
    )
    add(
        "--oscillations-freeze-threshold-final",
        metavar="F",
        type=cli.positive_float,
        help="the same at the end, reached along a cosine (default: the same)",
    )
    add(
        "--oscillations-freeze-ema-momentum",
        metavar="F",
        type=momentum,
        default=0.01,
        help="of the moving averages of frequency and code",
    )


# -- what argparse cannot see by itself ----------------------------------------------------------


def check_training_options(args: argparse.Namespace) -> None:
    """Fill defaults that hang on other options; raise UserError for what is no plan."""
    network_name(args.architecture)
    schedule, rate = args.learning_rate_schedule, args.learning_rate
    if schedule.kind == "cosine" and schedule.value is not None and schedule.value > rate:
        raise UserError(
            f"--learning-rate-schedule: the cosine ends at {schedule.value:g}, above "
            f"--learning-rate {rate:g}"
        )
    if args.prune_method != "none":
        _check_pruning(args)
    elif args.tile_size or args.zeros_per_tile or args.s_f is not None:
        raise UserError("--s-f, --tile-size and --zeros-per-tile need --prune-method zhu_gupta")
    for name in ("dampen_weight", "freeze_threshold"):
        first, last = (f"oscillations_{name}{end}" for end in ("", "_final"))
        flag = f"--{first.replace('_', '-')}"
        if getattr(args, last) is None:
            setattr(args, last, getattr(args, first))
        elif name == "freeze_threshold" and not getattr(args, first):
            raise UserError(f"{flag}-final has no effect without {flag}")
        if getattr(args, last) and not args.weight_quant:
            raise UserError(f"{flag} has no effect with --no-weight-quant")
    args.n_bits_act = args.n_bits_act or args.n_bits
    if args.cuda is not None and args.device != "auto":
        raise UserError("--cuda and --no-cuda stand for --device: pass one of them")


def _check_pruning(args: argparse.Namespace) -> None:
    tile, zeros = args.tile_size, args.zeros_per_tile
    if (tile is None) != (zeros is None):
        raise UserError("--tile-size and --zeros-per-tile belong together")
    if tile is not None and zeros >= tile:
        raise UserError(f"--zeros-per-tile {zeros} must be below --tile-size {tile}")
    of_pattern = 0.75 if tile is None else zeros / tile
    if args.s_f is None:
        args.s_f = of_pattern
    elif tile is not None and args.s_f != of_pattern:
        raise UserError(f"--s-f {args.s_f:g}: {zeros} zeros in tiles of {tile} are {of_pattern:g}")
    if args.s_i > args.s_f:
        raise UserError(f"--s-i {args.s_i:g} is above --s-f {args.s_f:g}")
    if args.prune_last_epoch is None:
        args.prune_last_epoch = max(args.prune_epoch_start + 1, 3 * args.max_epochs // 4)
    if not args.prune_epoch_start < args.prune_last_epoch <= args.max_epochs:
        raise UserError(
            f"--prune-last-epoch {args.prune_last_epoch} must be above "
            f"--prune-epoch-start {args.prune_epoch_start} and at most --max-epochs "
            f"{args.max_epochs}"
        )


def training_device(args: argparse.Namespace) -> torch.device:
    """Where to compute. Raises UserError where that is not there."""
    if args.cuda and not torch.cuda.is_available():
        raise UserError("--cuda: this PyTorch sees no GPU; pass --no-cuda to train on the CPU")
    return resolve_device({None: args.device, True: "cuda", False: "cpu"}[args.cuda])


def training_settings(args: argparse.Namespace) -> dict[str, Any]:
    """All that the figures hang on."""
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    return settings | {"learning_rate_schedule": str(args.learning_rate_schedule)}


def run_name(args: argparse.Namespace) -> str:
    """Of the files of a run: network, dataset, what is done to it, seed."""
    words = [model_tag(network_name(args.architecture)), args.dataset]
    if args.weight_quant:
        words.append(f"w{args.n_bits}")
    if args.act_quant:
        words.append(f"a{args.n_bits_act}")
    if args.prune_method != "none":
        pattern = f"{args.zeros_per_tile}of{args.tile_size}" if args.tile_size else ""
        words.append(f"zeros{pattern or f'{100 * args.s_f:.10g}'}")
    if len(words) == 2:
        words.append("dense")
    return "_".join([*words, f"seed{args.seed}"])
