"""The options of both layer studies, which are the same."""

from __future__ import annotations

import argparse

from obc.solver.errors import UserError
from obc.toolkit import cli
from pruning_vs_quantization.layer_methods import METHODS
from pruning_vs_quantization.layer_problem import RANGES
from pruning_vs_quantization.study_files import (
    HIGHEST_BITS,
    LOWEST_BITS,
    add_grid_options,
    add_study_options,
)

MOST_UNKNOWNS = 256


def build_parser(prog: str, text: str, commands: tuple[str, ...]) -> argparse.ArgumentParser:
    """The options of both scripts."""
    parser = cli.Parser(prog=prog, description=text)
    parser.add_argument(
        "command",
        nargs="?",
        choices=commands,
        default=commands[0],
        help="the question; there is one",
    )
    _add_data(parser)
    _add_problem(parser)
    _add_solvers(parser)
    add_study_options(parser, "layer_outputs")
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("network and images").add_argument
    add(
        "--model-name",
        metavar="MODEL",
        dest="model",
        required=True,
        help="rn18, rn20, mobilenet_v2, any torchvision classification model, "
        "or path/to/file.py:function",
    )
    add("--weights", metavar="FILE", help="dense weights (default: torchvision's, or the shipped)")
    add(
        "--dataset",
        metavar="DATASET",
        help="imagenet, cifar10, digits or folder (default: imagenet)",
    )
    add("--datapath", metavar="DIR", help="where the images are")
    add("--image-net-dir", metavar="DIR", help="--dataset imagenet --datapath DIR")
    add(
        "--image-size",
        metavar="N",
        type=cli.positive_int,
        help="side of the network's input in pixels (default: of the dataset)",
    )
    add("--nsamples", metavar="N", type=cli.positive_int, default=256, help="calibration images")
    add("--batchsize", metavar="N", type=cli.positive_int, default=32, help="images per batch")
    add(
        "--skip-bad-images",
        action="store_true",
        help="go on without images that cannot be read, instead of refusing to start",
    )
    add(
        "--workers",
        metavar="N",
        type=cli.nonnegative_int,
        help="processes that decode images (default: what suits the dataset)",
    )


def _add_problem(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is looked at")
    add = group.add_argument
    add(
        "--layer-name",
        metavar="NAME",
        action="append",
        help="a layer; may be given several times (default: all)",
    )
    add_grid_options(group)
    group.set_defaults(bits=[8, 4, 3, 2])
    add("--n-bits", metavar="B", type=cli.positive_int, help="the same as --bits B")
    add(
        "--range-search-method",
        type=_range,
        metavar="MSE|minmax",
        default="MSE",
        help="range of the grid: of least squared error, or up to the largest weight",
    )
    add(
        "--per-channel",
        action="store_true",
        help="a grid for each output channel (default: one for the layer)",
    )
    add(
        "--num-output-channels",
        metavar="N",
        type=cli.positive_int,
        default=8,
        help="output channels of each layer, evenly spread",
    )
    add(
        "--opt-dim",
        metavar="N",
        type=cli.positive_int,
        default=32,
        help="unknowns of a subproblem: a row is cut into chunks of at most so many inputs",
    )
    add(
        "--num-chunks",
        metavar="N",
        type=cli.nonnegative_int,
        default=8,
        help="chunks of each output channel, evenly spread; 0: all",
    )


def _add_solvers(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("solvers").add_argument
    add(
        "--method",
        choices=METHODS,
        default="both",
        help="certified semidefinite bound, exact search, or both",
    )
    add(
        "--time-limit",
        metavar="S",
        type=cli.positive_float,
        default=10.0,
        help="seconds for the search of a subproblem; then it says [proven bound, best]",
    )
    add("--node-limit", metavar="N", type=cli.positive_int, help="the same in nodes")
    add("--verbose-solvers", action="store_true", help="log a line for each subproblem")


def _range(text: str) -> str:
    for known in RANGES:
        if text.replace("_", "").replace("-", "").lower() == known.lower():
            return known
    raise argparse.ArgumentTypeError(f"must be {' or '.join(RANGES)}; got {text}")


def settle(args: argparse.Namespace) -> None:
    """Make one option of those that say the same; raise UserError where they do not fit."""
    if args.image_net_dir is not None:
        if args.dataset not in (None, "imagenet") or args.datapath is not None:
            raise UserError(
                "--image-net-dir DIR is --dataset imagenet --datapath DIR; give one or the other"
            )
        args.datapath = args.image_net_dir
    args.dataset = args.dataset or "imagenet"
    if args.n_bits is not None:
        if not LOWEST_BITS <= args.n_bits <= HIGHEST_BITS:
            raise UserError(
                f"--n-bits must be from {LOWEST_BITS} to {HIGHEST_BITS}; got {args.n_bits}"
            )
        args.bits = [args.n_bits]
    args.bits = list(dict.fromkeys(args.bits))
    if args.opt_dim > MOST_UNKNOWNS:
        raise UserError(
            f"--opt-dim must be at most {MOST_UNKNOWNS}; got {args.opt_dim}. "
            "Larger subproblems cannot be solved to a proof"
        )
