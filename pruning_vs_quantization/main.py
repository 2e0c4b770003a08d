"""Fine-tuning at equal size: `python -m pruning_vs_quantization.main train-compressed …`.

Kuzmin et al. (arXiv 2307.02973), the fourth part of the study: networks are trained in quantised
form, or pruned as they are trained, from the same dense weights; which is better at equal size,
b-bit weights against FP16 weights of sparsity 1 − b/16? Training is training.py's.

A run leaves, under a name that says what was done (such as rn20_cifar10_w4_seed0), in --out:

    <name>.json         settings, and figures: top-1 and seconds of each epoch, sparsity, bits
    <name>.pth          the compressed network, for every command of the toolkit: weights on their
                        grids, grids beside them, batch norms in place
    <name>_folded.pth   the same with batch norms folded (batchnorm_folding.py)

and while it lasts <name>.state, from which it goes on if it was killed. `table` puts the runs of a
folder beside each other; `first-last` makes untrained networks comparable (first_and_last.py).
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from datautils import DATASETS
from obc.inputs import files
from obc.solver import errors
from obc.toolkit import cli
from obc.toolkit.leveldb import model_tag
from obc.toolkit.records import write_record
from obc.toolkit.session import check_model
from pruning_vs_quantization.architectures import dense_network, network_name
from pruning_vs_quantization.batchnorm_folding import folded
from pruning_vs_quantization.fine_tuning_table import (
    as_records,
    conditions,
    draw,
    markdown,
    trained_results,
    untrained_results,
)
from pruning_vs_quantization.first_and_last import replace_first_and_last
from pruning_vs_quantization.study_files import PLOTS_DATA, finished, write_result
from pruning_vs_quantization.training import Training, determinism
from pruning_vs_quantization.training_images import TrainingData
from pruning_vs_quantization.training_options import (
    add_training_options,
    check_training_options,
    run_name,
    training_device,
    training_settings,
)


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="pruning_vs_quantization.main", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    train = commands.add_parser(
        "train-compressed",
        help="fine-tune a quantised or pruned network",
        description="Fine-tune a network, quantised or pruned.",
    )
    add_training_options(train)
    train.set_defaults(run=train_compressed)
    table = commands.add_parser("table", help="the runs of a folder beside each other")
    add_network(table)
    table.add_argument(
        "--untrained",
        metavar="FILE",
        type=Path,
        help="lines method, bits, reached, top-1 of networks without training",
    )
    table.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=PLOTS_DATA / "fine_tuning",
        help="folder with the runs, and for the table",
    )
    table.set_defaults(run=make_table)
    ends = commands.add_parser("first-last", help="first and last layer from another network")
    add_network(ends)
    ends.add_argument("strong", metavar="FILE", type=Path, help="checkpoint to change")
    ends.add_argument("mild", metavar="FILE", type=Path, help="checkpoint to take them from")
    ends.add_argument("--weights", metavar="FILE", help="dense weights of the network")
    ends.add_argument("--save", metavar="FILE", type=Path, required=True, help="where to save")
    ends.set_defaults(run=exchange_first_and_last)
    return parser


def add_network(parser: argparse.ArgumentParser) -> None:
    """--architecture and --dataset, as train-compressed has them."""
    add = parser.add_argument
    add("--architecture", metavar="NAME_quantized", required=True, help="of the networks")
    add("--dataset", choices=DATASETS, default="imagenet", help="what they are for")


def train_compressed(args: argparse.Namespace) -> None:
    """One run, unless it has been done before; its accuracy."""
    check_training_options(args)
    device, settings = training_device(args), training_settings(args)
    stem = args.out / run_name(args)
    result = stem.with_name(f"{stem.name}.json")
    files.check_writable(result)
    figures = finished(result, settings, args.restart)
    state = stem.with_name(f"{stem.name}.state")
    if figures is None:
        if args.restart:
            state.unlink(missing_ok=True)
        training = started(args, device)
        with seeded(args.seed, device), determinism(args.deterministic):
            plain = training.run(state, settings)
        figures = training.figures()
        save_networks(stem, plain)
        write_result(result, settings, figures)
    state.unlink(missing_ok=True)
    cli.print_result(f"top-1 {figures['top1']:.2f}")


def started(args: argparse.Namespace, device: torch.device) -> Training:
    """Images, dense network and all else that a run begins with."""
    images = TrainingData.load(
        args.dataset,
        args.images_dir,
        args.image_size,
        args.train_samples,
        args.batch_size,
        args.augment,
        args.seed,
        args.num_workers,
    )
    classes = len(images.data.classes)
    with seeded(args.seed, torch.device("cpu")):  # a model of the user's own may start at random
        dense = dense_network(args.architecture, args.dataset, args.weights, classes)
    check_model(dense, args.architecture, images.data)
    if device.type == "cpu":
        dense = dense.to(memory_format=torch.channels_last)
    return Training(args, dense.to(device), images, device)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, PyTorch's and Python's global generators begin at a seed."""
    kept = random.getstate()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(kept)


def save_networks(stem: Path, plain: nn.Module) -> None:
    """Write <stem>.pth, and <stem>_folded.pth if the network can be folded."""
    files.save_checkpoint(plain.state_dict(), stem.with_name(f"{stem.name}.pth"))
    without_norms = folded(plain)
    if without_norms is not None:
        path = stem.with_name(f"{stem.name}_folded.pth")
        files.save_checkpoint(without_norms.state_dict(), path)


def make_table(args: argparse.Namespace) -> None:
    """The table on standard output; the same and the picture in --out."""
    results = trained_results(args.out, args.architecture, args.dataset)
    if args.untrained is not None:
        results += untrained_results(args.untrained)
    name = model_tag(network_name(args.architecture))
    stem, text = args.out / f"table_{name}_{args.dataset}", markdown(results)
    record = {
        "architecture": args.architecture,
        "dataset": args.dataset,
        "conditions": conditions(results),
        "results": as_records(results),
    }
    write_record(stem.with_name(f"{stem.name}.json"), record)
    draw(results, f"{name} on {args.dataset}, {record['conditions']}", stem)
    cli.print_result(f"{text}\n\n{record['conditions']}")


def exchange_first_and_last(args: argparse.Namespace) -> None:
    """A network with the first and the last layer of a milder one."""
    files.check_writable(args.save)
    dense = dense_network(args.architecture, args.dataset, args.weights)
    replace_first_and_last(dense, args.strong, args.mild, args.save)
    errors.log.info("%s: first and last layer from %s", args.save, args.mild)


def run(args: argparse.Namespace) -> None:
    args.run(args)


def main(argv: list[str] | None = None) -> int:
    return cli.command(build_parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
