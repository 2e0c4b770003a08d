"""What a run will take, before it starts: passes, who does which layer, memory, minutes.

Memory follows from shapes (`memory.py`). Minutes are those of this machine (`machine.py`), as

    start       what has passed since this process began: imports, looking for images; and
                measuring, if the run measures, too
    images      (b·t₀ + n·t₁) / p    the network and all sums, for b batches, p of them at a time
    reading     n·t₃                 images from their files, in calibration and test
    inverting   c·G·d³               per layer
    rows        (a·d³ + b·d²)·rows   per layer, through a and b at the two nearest sizes measured;
                                     where rows share one elimination, that for each of the G
    writing     2·n·t₄               checkpoints, and before each what it is made of
    test        n·t₂

With N processes images and rows are divided by N. A layer that sees fewer patches than it has
columns has a singular H: it is inverted several times until it is damped enough, and weights are
refined. Where H is singular for other reasons, that is known only once H is. Not counted: that, and
fitting grids of activations.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from datautils import calibration_batches
from modelutils import find_layers
from obc.solver.distributed import ALONE, World, deal
from obc.solver.errors import log
from obc.solver.layers import view
from obc.solver.memory import Needs, default_memory, in_passes, layer_needs, most_at_a_time
from obc.toolkit import cli, starting
from obc.toolkit.machine import Images, Machine, image_seconds, images_to_time, measure
from obc.toolkit.session import Session
from obc.toolkit.task import Task

LONG_WORK = 3e11  # floating-point operations from which on a run is long: it shows its plan


@dataclass(frozen=True)
class Plan:
    """Who does what."""

    memory: int  # bytes, of each process
    needs: dict[str, Needs]
    passes: list[list[str]]
    owners: dict[str, int | None]  # rank; None: all, a share of the rows each

    def sharing(self, name: str, world: World) -> World:
        """Those who divide a layer's rows."""
        return world if self.owners[name] is None else ALONE


def make_plan(
    layers: Mapping[str, nn.Module],
    task: Task,
    memory_gb: float | None,  # None: half of what is free
    world: World,
) -> Plan:
    """Divide the work. Raises UserError where the memory is too little for some layer."""
    device = next(iter(layers.values())).weight.device
    memory = min(world.gather(int(memory_gb * 1e9) if memory_gb else default_memory(device)))
    needs = {
        name: layer_needs(layer, levels=task.levels, innermost=task.innermost)
        for name, layer in layers.items()
    }
    passes, owners = in_passes(needs, memory), {}
    for names in passes:
        costs = {name: operations(layers[name]) for name in names}
        owners |= deal(costs, world.size, divisible=not task.shared)
    return Plan(memory, needs, passes, owners)


def operations(layer: nn.Module) -> float:
    """Of an elimination, about: a factorisation of d×d, and its panels, for every row."""
    rows, d = view(layer).rows, view(layer).columns
    return rows * d * d * (d + 500)


# -- minutes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """Seconds of a run's parts, of N processes."""

    start_s: float
    calibration_s: float
    layers_s: float
    writing_s: float
    test_s: float

    @property
    def total_s(self) -> float:
        return self.start_s + self.calibration_s + self.layers_s + self.writing_s + self.test_s


@dataclass(frozen=True)
class Work:
    """What a run has begun with, and what it shows, tests and writes."""

    start_s: float
    shown: int  # images, in calibration
    batch: int  # of them
    test: int  # images
    files: int  # checkpoints


def compressible(
    layers: Mapping[str, nn.Module], images: Images, task: Task
) -> dict[str, nn.Module]:
    """Layers that are not left dense."""
    return {
        name: layer
        for name, layer in layers.items()
        if name in images.positions and task.whole(view(layer).columns)
    }


def singular_layers(
    layers: Mapping[str, nn.Module], images: Images, shown: int, damped: bool
) -> set[str]:
    """Layers that see fewer patches than they have columns; none where all are damped anyway."""
    return {
        name
        for name, layer in layers.items()
        if not damped and shown * images.positions[name] < view(layer).columns
    }


def estimate(
    plan: Plan,
    layers: Mapping[str, nn.Module],  # those that are not left dense
    singular: set[str],
    machine: Machine,
    world: World,
    work: Work,
) -> Estimate:
    """Seconds of the run that `plan` describes."""
    batches = -(-work.shown // work.batch)
    at_a_time = min(-(-batches // world.size), machine.batches_at_a_time)
    images, reading_s = machine.images, machine.reading_s
    computing_s = (batches * images.batch_s + work.shown * images.image_s) / at_a_time
    calibration_s = len(plan.passes) * (computing_s + work.shown * reading_s)
    alone, together = [0.0] * world.size, 0.0
    for name, layer in layers.items():
        rows, d, groups = view(layer).rows, view(layer).columns, view(layer).groups
        own_s = machine.system_s(d, name in singular) * groups
        rows_s = rows * machine.row_s(d, name in singular)
        if plan.owners[name] is None:
            together += own_s + rows_s / world.size
        else:
            alone[plan.owners[name]] += own_s + rows_s
    return Estimate(
        work.start_s,
        calibration_s / world.size,
        together + max(alone),
        2 * work.files * machine.writing_s,
        work.test * (images.test_s + reading_s) / world.size,
    )


def lines(
    plan: Plan, layers: Mapping[str, nn.Module], estimate: Estimate, world: World
) -> list[str]:
    """The plan, in words."""
    most = max(most_at_a_time(plan.needs[name] for name in names) for names in plan.passes)
    dearest = max(layers, key=lambda name: operations(layers[name]))
    rows, d = view(layers[dearest]).rows, view(layers[dearest]).columns
    at_once = min(rows, plan.needs[dearest].rows(plan.memory))
    shared = sum(owner is None for owner in plan.owners.values())
    parts = [
        (part, getattr(estimate, f"{part}_s"))
        for part in ("start", "calibration", "layers", "writing", "test")
    ]
    text = [
        f"plan: {len(layers)} layers in {len(plan.passes)} passes over the images; "
        f"memory {plan.memory / 1e9:.3g} GB (at least {most / 1e9:.3g})",
        f"plan: the dearest layer is {dearest}, {rows} rows of {d} columns, "
        f"{at_once} rows at a time",
        f"plan: {minutes(estimate.total_s)}: "
        + ", ".join(f"{part} {minutes(seconds)}" for part, seconds in parts if seconds),
    ]
    if world.size > 1:
        text.insert(
            2,
            f"plan: {world.size} processes divide the rows of {shared} layers; "
            f"{len(layers) - shared} layers go to one process each",
        )
    return text


def minutes(seconds: float) -> str:
    """Seconds, in what suits them.

    >>> minutes(12.3), minutes(200)
    ('12 s', '3.3 min')
    """
    return f"{seconds:.2g} s" if seconds < 100 else f"{seconds / 60:.2g} min"


def show_plan(
    session: Session,
    compressed: nn.Module,
    task: Task,
    folder: Path | None,  # where results go
) -> bool:
    """Log the plan of a run that will be long, or that is asked for by --plan; whether it did."""
    args, world, layers = session.args, session.world, find_layers(compressed)
    plan = make_plan(layers, task, args.memory, world)
    shown = len(session.calibration(nrounds=args.nrounds).passes)
    long = sum(map(operations, layers.values())) + 1e8 * shown >= LONG_WORK
    if not (long or args.plan):
        return False
    start_s = starting.seconds()
    started, count = time.perf_counter(), images_to_time(session.data.image_size)
    some, _ = next(iter(calibration_batches(session.data, batchsize=count, workers=0)))
    reading_s = (time.perf_counter() - started) / len(some)
    reading_s /= max(1, session.data.workers if args.workers is None else args.workers)
    images = image_seconds(session.model, some.to(session.device))
    able = compressible(layers, images, task)
    singular = singular_layers(able, images, shown, damped=args.rel_damp > 0)
    widest = max((view(layer).columns for layer in able.values()), default=0)
    machine = measure(session.model, images, reading_s, task, widest, bool(singular), folder)
    files = (task.levels or 1) if folder else 0
    test = 0 if task.levels else len(session.data.test)
    work = Work(starting.seconds() if long else start_s, shown, args.batchsize, test, files)
    found = estimate(plan, able, singular, machine, world, work)
    for line in lines(plan, layers, found, world):
        cli.print_result(line) if args.plan else log.info(line)
    return True
