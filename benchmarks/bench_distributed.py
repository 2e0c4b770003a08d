"""Two processes on one machine: is the work of ResNet-18's layers split evenly?

    torchrun --nproc-per-node 2 -m benchmarks.bench_distributed --out bench_distributed.json

Timed per process: CPU seconds of its own threads for its share of an unstructured elimination, from
given Hessians, without waiting for other processes. The layers are those of ResNet-18 on ImageNet,
with every `--part`-th row of each and 1/`--shrink` of the columns, since the whole takes minutes;
Hessians are those of random rectified inputs. Work is divided as main_trueobs.py divides it
(`planning.py`). Median of `--repeats` after a warm-up. Checked in the same run: order and losses of
every divided layer equal those of one process.

The figure: (longest − shortest) / mean of the processes' seconds, at most 0.10.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import nn

if not __package__:  # run by its path, not with -m
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from obc.solver import errors
from obc.solver.distributed import ALONE, World, join
from obc.toolkit import cli, records
from obc.toolkit.modes import UnstrMode
from obc.toolkit.planning import Plan, make_plan
from trueobs import TrueOBS

RESNET18 = {  # rows, columns: how many such layers
    (64, 147): 1,
    (64, 576): 4,
    (128, 576): 1,
    (128, 1152): 3,
    (128, 64): 1,
    (256, 1152): 1,
    (256, 2304): 3,
    (256, 128): 1,
    (512, 2304): 1,
    (512, 4608): 3,
    (512, 256): 1,
    (1000, 512): 1,
}


def make_layers(part: int, shrink: int) -> dict[str, nn.Linear]:
    """ResNet-18's layers with fewer rows and columns."""
    layers = {}
    for (rows, d), count in RESNET18.items():
        for number in range(count):
            layers[f"{rows}x{d}.{number}"] = nn.Linear(d // shrink, -(-rows // part))
    return layers


def solver_of(layer: nn.Linear, world: World) -> TrueOBS:
    """The solver of a layer with its Hessian, the same in all processes."""
    d = layer.in_features
    x = torch.randn(2 * d, d, generator=torch.Generator().manual_seed(d)).relu()
    obs = TrueOBS(layer, world=world)
    obs.add_batch(x)
    obs.H  # noqa: B018  computed here, before the clock starts
    return obs


def busy_seconds(plan: Plan, layers: dict[str, nn.Linear], world: World) -> float:
    """This process's CPU seconds for its share of all layers."""
    busy_s = 0.0
    waits: list[float] = []
    for name in sorted(layers, key=lambda name: plan.owners[name] is not None):
        if plan.owners[name] in (None, world.rank):
            sharing = idle(world, waits) if plan.owners[name] is None else ALONE
            obs = solver_of(layers[name], sharing)
            started = time.process_time()
            obs.prepare_unstr()
            busy_s += time.process_time() - started
    return busy_s - sum(waits)


def idle(world: World, waits: list[float]) -> World:
    """The same world; the seconds that its operations take are appended to `waits`."""

    class Timed(World):
        def fill_rows(self, x: torch.Tensor) -> None:
            timed(lambda: World.fill_rows(self, x))

    def timed(work: Callable[[], None]) -> None:
        started = time.process_time()
        work()
        waits.append(time.process_time() - started)

    return Timed(world.rank, world.size)


def compare_with_one_process(plan: Plan, layers: dict[str, nn.Linear], world: World) -> int:
    """How many divided layers were compared; raises UserError if one is different."""
    divided = [name for name in layers if plan.owners[name] is None]
    for name in divided:
        together, alone = solver_of(layers[name], world), solver_of(layers[name], ALONE)
        together.prepare_unstr()
        if world.first:
            alone.prepare_unstr()
            same = torch.equal(together.trace.order, alone.trace.order)
            if not (same and torch.equal(together.Losses, alone.Losses)):
                raise errors.UserError(f"{name}: differs from the result of one process")
    return len(divided)


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="bench_distributed.py", description=__doc__.splitlines()[0])
    add, positive = parser.add_argument, cli.positive_int
    add("--part", metavar="N", type=positive, default=16, help="every N-th row of each layer")
    add("--shrink", metavar="N", type=positive, default=4, help="columns divided by N")
    add("--repeats", metavar="N", type=positive, default=5, help="after a warm-up")
    add("--out", metavar="FILE", help="record of all times, machine and versions, as JSON")
    return parser


def run(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    world, layers = join(torch.device("cpu")), make_layers(args.part, args.shrink)
    plan = make_plan(layers, UnstrMode(max_sparsity=0.0), None, world)
    times = []
    for repeat in range(-1, args.repeats):
        each = world.gather(busy_seconds(plan, layers, world))
        if repeat >= 0:
            times.append(each)
    spreads = [(max(each) - min(each)) * world.size / sum(each) for each in times]
    divided = compare_with_one_process(plan, layers, world)
    cli.print_result("| processes | layers | divided | seconds each | spread |")
    cli.print_result("|---|---|---|---|---|")
    seconds = ", ".join(f"{median(repeats):.2f}" for repeats in zip(*times, strict=True))
    cli.print_result(
        f"| {world.size} | {len(layers)} | {divided} | {seconds} | {100 * median(spreads):.1f} % |"
    )
    if args.out:
        figures = {"seconds": times, "spread": spreads, "owners": plan.owners}
        records.write_run(args.out, "benchmarks/bench_distributed.py", vars(args), **figures)
    world.leave()


def main(argv: list[str] | None = None) -> int:
    return cli.command(build_parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
