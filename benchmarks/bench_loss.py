"""Losses of every layer at every level: `database.py loss` against the plain way.

    python -m benchmarks.bench_loss --out bench_loss.json
    python -m benchmarks.bench_loss --model rn18 --dataset cifar10 --datapath D --weights F \\
        --image-size 64 --prefix DIR                          # a real network and database

Timed in one process, on the same threads, images and database:

* ours: `sensitivity.losses`, as database.py calls it, all layers at all levels;
* plain: for each layer and level, load the level into the layer, run the whole model on all
  images, take the mean cross-entropy in float64, put the dense layer back (written here). Each of
  these runs costs the same wherever the layer is, so a seeded `--plain-share` of all pairs is timed
  and divided by the share: extrapolated, unless the share is 1.

They take turns, round after round, after a warm-up of each (ours at the first and the last level
only); medians of `--repeats`. Both use batches of `--batchsize`, channels last on a CPU.
Without --dataset: random images and labels, and a network with random weights whose batch norms
hold the statistics of those images; without --prefix: a database of `--levels` levels in memory,
magnitude-pruned at sparsities of main_trueobs.py's default grid, the first of which is dense.
Excluded: opening the database, reading images, writing scores.

Checked in the same run, on the pairs of the sample: |ours − plain| ≤ 1e-4 of max(1, |loss|), loss
being the change against the dense model's, in nats.

Prediction. Ours runs only what follows a layer, on average about half of the network (or a little
more: late layers have more weights, but not more flops), with batch norms folded into convolutions,
and equal levels only once: a factor of 2 from the first, up to 1.5 from the second. Goal: ≥ 2.5.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import timing
from benchmarks.networks import BatchList, layout_of, random_images, random_model
from benchmarks.timing import against, alternating
from modelutils import evaluating, find_layers
from obc.solver import errors
from obc.toolkit import cli, sensitivity
from obc.toolkit.leveldb import Database, level_names, model_tag
from obc.toolkit.modes import UnstrMode
from obc.toolkit.session import Session, common_options

GOAL, SAME = 2.5, 1e-4

Pairs = list[tuple[str, str]]  # layer, level


@dataclass(frozen=True)
class LossFigures:
    """Seconds, one entry per repeat."""

    model: str
    images: int
    image_size: int
    layers: int
    levels: int
    ours_s: list[float]  # all pairs
    plain_s: list[float]  # the sample
    pairs: int
    pairs_timed: int  # of the plain way
    difference: float  # |ours − plain| / max(1, |plain|), the worst of the sample
    largest: float  # |loss| in the sample

    @property
    def plain_all_s(self) -> float:
        return median(self.plain_s) * self.pairs / self.pairs_timed


# -- a network and a database without any data -----------------------------------------------------


def set_norms(model: nn.Module, images: Tensor) -> None:
    """Give the batch norms of a random network the statistics of some images."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()
    with torch.no_grad():
        model(images.to(next(model.parameters()).device))
    model.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def magnitude_database(model: nn.Module, name: str, levels: int) -> Database:
    """All layers at `levels` sparsities, the smallest weights of each layer gone."""
    grid = UnstrMode().sparsities
    if levels > len(grid):
        raise errors.UserError(f"--levels {levels} is more than the grid's {len(grid)}")
    last = max(1, levels - 1)
    sparsities = [grid[round(k * (len(grid) - 1) / last)] for k in range(levels)]
    dense = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    orders = {x: dense[f"{x}.weight"].abs().flatten().argsort() for x in find_layers(model)}
    states = {}
    for level, sparsity in zip(level_names(sparsities), sparsities, strict=True):
        states[level] = dict(dense)
        for layer, order in orders.items():
            weight = dense[f"{layer}.weight"].clone()
            weight.view(-1)[order[: int(sparsity * len(order))]] = 0
            states[level][f"{layer}.weight"] = weight
    return Database("unstr", name, states)


# -- the plain way ---------------------------------------------------------------------------------


def plain_mean_loss(model: nn.Module, batches: BatchList, device: torch.device) -> float:
    total, images_seen = 0.0, 0
    for images, labels in batches:
        outputs = model(images.to(device, memory_format=layout_of(device)))
        loss = F.cross_entropy(outputs.double(), labels.to(device), reduction="sum")
        total, images_seen = total + float(loss), images_seen + len(labels)
    return total / images_seen


def plain_losses(
    model: nn.Module, db: Database, batches: BatchList, device: torch.device, pairs: Pairs
) -> dict[tuple[str, str], float]:
    """Mean loss with one layer at one level, for each pair."""
    losses = {}
    with evaluating(model):
        for name, level in pairs:
            weight = model.get_submodule(name).weight
            dense = weight.clone()
            weight.copy_(db.layer(name, level)["weight"])
            losses[name, level] = plain_mean_loss(model, batches, device)
            weight.copy_(dense)
    return losses


# -- measuring -------------------------------------------------------------------------------------


def as_a_command(args: argparse.Namespace) -> argparse.Namespace:
    """The common options of a command on the same model and images."""
    parser = cli.Parser()
    cli.add_common_options(parser)
    words = [
        args.model,
        args.dataset,
        "--nsamples",
        str(args.images),
        "--workers",
        "0",
        "--batchsize",
        str(args.batchsize),
        "--device",
        args.device,
        "--seed",
        str(args.seed),
        "--noaug",
    ]
    for option in ("weights", "datapath", "image_size"):
        if (value := getattr(args, option)) is not None:
            words += ["--" + option.replace("_", "-"), str(value)]
    return parser.parse_args(words)


def subject(
    args: argparse.Namespace, device: torch.device
) -> tuple[nn.Module, BatchList, Database]:
    """The model, its images and the database, as the options have them."""
    if args.dataset:
        session = Session.of(common_options(as_a_command(args)))
        model, batches = session.model, list(session.calibration())
    else:
        model = random_model(args.model, args.seed, device)
        size = args.image_size or 64
        batches = random_images(args.images, size, args.batchsize, args.seed)
        set_norms(model, batches[0][0])
    if args.prefix is None:
        return model, batches, magnitude_database(model, args.model, args.levels)
    db = Database.open("unstr", model_tag(args.model), args.prefix)
    db.check(model)
    return model, batches, db


def sample(db: Database, share: float, seed: int) -> Pairs:
    """A share of all pairs of layer and level, at least one."""
    pairs = [(layer, level) for layer in db.layers for level in db.levels]
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
    return [pairs[index] for index in order[: max(1, round(share * len(pairs)))]]


def measure_losses(args: argparse.Namespace, device: torch.device) -> LossFigures:
    model, batches, db = subject(args, device)
    pairs, answers = sample(db, args.plain_share, args.seed), {}
    ends = {level: db.states[level] for level in (db.levels[0], db.levels[-1])}
    warm = Database("unstr", args.model, ends)
    warm.layers = db.layers
    sensitivity.losses(model, warm, batches, device)
    plain_losses(model, db, batches, device, pairs[:1])

    def keep(way: str, losses: Callable[[], dict]) -> Callable[[], None]:
        return lambda: answers.update({way: losses()})

    works = {
        "ours": keep("ours", lambda: sensitivity.losses(model, db, batches, device)),
        "plain": keep("plain", lambda: plain_losses(model, db, batches, device, pairs)),
    }
    times = alternating(works, device, args.repeats, warm_up=False)
    with evaluating(model):
        dense = plain_mean_loss(model, batches, device)
    changes = {pair: loss - dense for pair, loss in answers["plain"].items()}
    apart = [
        abs(answers["ours"][layer][level] - loss) / max(1.0, abs(loss))
        for (layer, level), loss in changes.items()
    ]
    return LossFigures(
        model=args.model,
        images=sum(len(labels) for _, labels in batches),
        image_size=batches[0][0].shape[-1],
        layers=len(db.layers),
        levels=len(db.levels),
        ours_s=times["ours"],
        plain_s=times["plain"],
        pairs=len(db.layers) * len(db.levels),
        pairs_timed=len(pairs),
        difference=max(apart),
        largest=max(map(abs, changes.values())),
    )


# -- report ----------------------------------------------------------------------------------------

HEADER = """\
| network | pixels | images | layers × levels | ours, s | plain, s | | ratio \
| worst difference | largest loss |
|---|---|---|---|---|---|---|---|---|---|"""


def loss_row(result: LossFigures) -> str:
    ours, plain = median(result.ours_s), result.plain_all_s
    whole = result.pairs_timed == result.pairs
    note = "measured" if whole else f"extrapolated from {result.pairs_timed} pairs"
    return (
        f"| {result.model} | {result.image_size} | {result.images} "
        f"| {result.layers} × {result.levels} | {ours:.3g} | {plain:.3g} | {note} "
        f"| {against(plain / ours, GOAL, most=False)} | {result.difference:.1e} "
        f"| {result.largest:.2g} |"
    )


def build_parser() -> argparse.ArgumentParser:
    parser = timing.build_parser("bench_loss.py", __doc__.splitlines()[0])
    add, positive = parser.add_argument, cli.positive_int
    add("--model", metavar="MODEL", default="rn18", help="as for the commands")
    add("--dataset", metavar="DATASET", help="as for the commands (default: random images)")
    add("--weights", metavar="FILE", help="dense weights (with --dataset)")
    add("--datapath", metavar="DIR", help="where the images are (with --dataset)")
    add("--prefix", metavar="DIR", help="where models_unstr/ is (default: magnitude pruning)")
    add(
        "--levels", metavar="N", type=positive, default=45, help="levels of the artificial database"
    )
    add("--images", metavar="N", type=positive, default=128, help="number of images")
    add("--batchsize", metavar="N", type=positive, default=128, help="images per batch")
    text = "pixels (default: the dataset's; 64 without one)"
    add("--image-size", metavar="N", type=positive, help=text)
    text = "share of all pairs of layer and level that the plain way is timed on"
    add("--plain-share", metavar="F", type=cli.positive_float, default=0.05, help=text)
    return parser


def run(args: argparse.Namespace) -> None:
    if args.plain_share > 1:
        raise errors.UserError(f"--plain-share must be at most 1; got {args.plain_share:g}")
    if not args.dataset and (args.weights or args.datapath):
        raise errors.UserError("--weights and --datapath go with --dataset")
    device = timing.start(args)
    result = measure_losses(args, device)
    cli.print_result(HEADER)
    cli.print_result(loss_row(result))
    wrong = f"losses differ by {result.difference:.2g}"
    faults = [] if result.difference <= SAME else [wrong]
    timing.finish(args, "bench_loss.py", [result], faults)


def main(argv: list[str] | None = None) -> int:
    return cli.command(build_parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
