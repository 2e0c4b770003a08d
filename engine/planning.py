"""What a run will take, before it starts: passes, who does which layer, memory, minutes.

Memory follows from shapes (`memory.py`). Minutes are those of this machine, measured for two to ten
seconds (`measure`), as

    images      (t₀ + n·t₁) / p      the network and the sums of all layers, p batches at a time
    reading     n·t₃                 images from their files, in calibration and test
    inverting   c·G·d³               per layer
    rows        (a·d³ + b·d²)·rows   per layer, through a and b at the two nearest sizes measured
    test        n·t₂

With N processes images and rows are divided by N. Not counted: Python's imports, looking for image
files, fitting grids of activations, writing files, and what H asks for that has to be damped
(several inverses, refinement): that is known once H is.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from command import cli
from command.cli import log
from command.session import Session
from datautils import calibration_batches
from engine.calibration import watching
from engine.distributed import ALONE, World, deal
from engine.elimination import NM, Blocks, PivotRule, Quantise, Trace, Unstructured, eliminate
from engine.hessian import Gram, Inverse, damped_inverse
from engine.levels import weights_at
from engine.memory import Needs, default_memory, in_passes, layer_needs, most_at_a_time
from engine.threads import one_thread
from modelutils import evaluating, find_layers

SIZES = (288, 576, 1152, 2304, 4608)  # columns that may be measured: in cache, and beyond it
INVERTED = 2304  # columns up to which inverting is measured, too; it only grows with d³
PATIENCE_S = 4.0  # a measurement that would take longer is not made
LONG_WORK = 3e11  # floating-point operations from which on a run is long: it shows its plan


@dataclass(frozen=True)
class Task:
    """What is to be done with every layer."""

    levels: int = 0  # weights at so many levels; 0: one result
    innermost: bool = False  # whether columns are put in another order
    shared: bool = False  # whether all rows of a group go through one elimination
    size: int = 1  # columns that go together
    nm: tuple[int, int] = (0, 0)  # zeros in every so many weights; (0, 0): no such limit
    quantise: bool = False

    @classmethod
    def of(cls, args: argparse.Namespace, levels: int) -> Task:
        """From the options of main_trueobs.py."""
        mode = args.mode
        return cls(
            levels=levels,
            innermost=mode in ("nmprune", "blocked"),
            shared=mode == "struct",
            size={"blocked": args.blocked_size, "struct": 8}.get(mode, 1),
            nm=(args.prunen, args.prunem) if mode == "nmprune" else (0, 0),
            quantise=mode == "quant",
        )

    def rule(self, rows: int, d: int, device: torch.device) -> PivotRule:
        """The rule by which columns go."""
        if self.quantise:
            one = torch.ones(rows, 1, device=device)
            return Quantise(one * 0.3, one * -8, one * 7)
        if self.nm[1]:
            return NM(*self.nm, rows, d, device)
        return Blocks(self.size) if self.size > 1 else Unstructured()

    def steps(self, d: int) -> int:
        """Columns that go, of d."""
        return d * self.nm[0] // self.nm[1] if self.nm[1] else d


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
    rows, d = layer.weight.flatten(1).shape
    return rows * d * d * (d + 500)


# -- minutes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """Seconds, as measured here."""

    batch_s: float  # the network and all sums, for every batch, on one thread
    image_s: float  # … and for every image in it
    test_s: float  # the network alone, an image, on all threads
    reading_s: float  # an image from its file
    inverting: dict[int, float]  # columns → a matrix
    row: dict[int, float]  # columns → a row
    batches_at_a_time: int = 1

    def row_s(self, d: int) -> float:
        """For a row of d columns: a·d³ + b·d² through the two nearest sizes."""
        sizes = sorted(sorted(self.row, key=lambda size: abs(size - d))[:2])
        if len(sizes) == 1:
            return self.row[sizes[0]] * (d / sizes[0]) ** 3
        small, large = (self.row[size] / size**2 for size in sizes)  # a·d + b
        a = max(0.0, (large - small) / (sizes[1] - sizes[0]))
        return max(large + a * (d - sizes[1]), 0.3 * small) * d * d

    def inverting_s(self, d: int) -> float:
        nearest = min(self.inverting, key=lambda size: abs(size - d))
        return self.inverting[nearest] * (d / nearest) ** 3


def clock(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the faster of two runs: the first may compile, either may be disturbed."""
    times = []
    for _ in range(2):
        started = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)


def measure(
    dense: nn.Module, task: Task, images: Tensor, reading_s: float, widest: int
) -> Machine:
    """Time a few images, and a few rows at sizes up to `widest` columns, on the images' device."""
    row_s: dict[int, float] = {}
    inverting_s: dict[int, float] = {}
    spent_s = 0.0
    for size in SIZES:
        if row_s and (size > 2 * widest or 6 * spent_s > PATIENCE_S):
            break
        row_s[size], spent_s = row_seconds(size, task, images.device)
        if size <= INVERTED:
            H, _ = problem(size, images.device)
            inverting_s[size] = clock(lambda H=H: damped_inverse(H), images.device)
    at_a_time = torch.get_num_threads() if images.device.type == "cpu" else 1
    return Machine(*image_seconds(dense, images), reading_s, inverting_s, row_s, at_a_time)


def problem(d: int, device: torch.device) -> tuple[Tensor, Inverse]:
    """H = 1 + a·11ᵀ, of which the inverse, 1 − a/(1 + a·d)·11ᵀ, need not be computed."""
    H, a = torch.empty(1, d, d, dtype=torch.float64, device=device), 0.3
    H.fill_(-a / (1 + a * d)).diagonal(dim1=1, dim2=2).add_(1)
    matrix, none = H.float(), torch.zeros(1, device=device)
    H.fill_(a).diagonal(dim1=1, dim2=2).add_(1)
    return H, Inverse(matrix, 1 / H.diagonal(dim1=1, dim2=2).float(), none, none)


def row_seconds(d: int, task: Task, device: torch.device) -> tuple[float, float]:
    """A row, and all rows of this measurement together."""
    rows = 64 if task.shared else 2 * torch.get_num_threads()
    d += -d % (task.nm[1] or task.size)  # groups and blocks are whole
    generator = torch.Generator().manual_seed(0)
    H, inverse = problem(d, device)
    W = torch.randn(rows, 1, d, generator=generator).to(device)

    def work() -> None:
        shared = task.shared
        system = torch.zeros(1 if shared else rows, dtype=torch.int64, device=device)
        weights = W.view(1, rows, d) if shared else W
        rule = task.rule(rows, d, device)
        trace = eliminate(weights, inverse, system, rule, task.steps(d))
        if task.levels:
            some_levels(weights, inverse, H, system, trace, task.levels)

    total_s = clock(work, device)
    return total_s / rows, total_s


def some_levels(
    W: Tensor, inverse: Inverse, H: Tensor, system: Tensor, trace: Trace, levels: int
) -> None:
    counts = torch.linspace(0, W.shape[2] - 1, levels, device=W.device).long()
    weights_at(W, inverse, H, system, trace.order.long(), counts[:, None].expand(-1, len(W)))


def image_seconds(dense: nn.Module, images: Tensor) -> tuple[float, float, float]:
    """t₀ and t₁ (on one thread), and t₂ (on all) of the module docstring."""
    device, sums = images.device, {}

    def see(name: str, x: Tensor) -> None:
        gram = Gram(layers[name])
        sums[name] = clock(lambda: gram.add(x), device)

    layers, totals = find_layers(dense), {}
    with evaluating(dense):
        test_s = clock(lambda: dense(images), device) / len(images)
        with one_thread():
            for count in (1, len(images)):
                network_s = clock(lambda n=count: dense(images[:n]), device)
                with watching(layers, see):
                    dense(images[:count])
                totals[count] = network_s + sum(sums.values())
    step = max(1, len(images) - 1)
    image_s = max(0.0, totals[len(images)] - totals[1]) / step
    return max(0.0, totals[1] - image_s), image_s, test_s


@dataclass(frozen=True)
class Estimate:
    """Seconds of a run's parts, of N processes."""

    calibration_s: float
    layers_s: float
    test_s: float

    @property
    def total_s(self) -> float:
        return self.calibration_s + self.layers_s + self.test_s


def estimate(
    plan: Plan,
    layers: Mapping[str, nn.Module],
    machine: Machine,
    world: World,
    images: tuple[int, int, int],  # shown in calibration, in batches of, test images
) -> Estimate:
    """Seconds of the run that `plan` describes."""
    shown, batch, test = images
    batches = -(-shown // batch)
    at_a_time = min(batches, machine.batches_at_a_time)
    computing_s = (batches * machine.batch_s + shown * machine.image_s) / at_a_time
    calibration_s = len(plan.passes) * (computing_s + shown * machine.reading_s)
    alone, together = [0.0] * world.size, 0.0
    for name, layer in layers.items():
        rows, d = layer.weight.flatten(1).shape
        own_s = machine.inverting_s(d) * getattr(layer, "groups", 1)
        if plan.owners[name] is None:
            together += own_s + rows * machine.row_s(d) / world.size
        else:
            alone[plan.owners[name]] += own_s + rows * machine.row_s(d)
    return Estimate(
        calibration_s / world.size,
        together + max(alone),
        test * (machine.test_s + machine.reading_s) / world.size,
    )


def lines(
    plan: Plan, layers: Mapping[str, nn.Module], estimate: Estimate, world: World
) -> list[str]:
    """The plan, in words."""
    most = max(most_at_a_time(plan.needs[name] for name in names) for names in plan.passes)
    dearest = max(layers, key=lambda name: operations(layers[name]))
    rows, d = layers[dearest].weight.flatten(1).shape
    at_once = min(rows, plan.needs[dearest].rows(plan.memory))
    shared = sum(owner is None for owner in plan.owners.values())
    text = [
        f"plan: {len(layers)} layers in {len(plan.passes)} passes over the images; "
        f"memory {plan.memory / 1e9:.3g} GB (at least {most / 1e9:.3g})",
        f"plan: the dearest layer is {dearest}, {rows} rows of {d} columns, "
        f"{at_once} rows at a time",
        f"plan: {minutes(estimate.total_s)}: calibration {minutes(estimate.calibration_s)}, "
        f"layers {minutes(estimate.layers_s)}, test {minutes(estimate.test_s)}",
    ]
    if world.size > 1:
        text.insert(2, f"plan: {world.size} processes divide the rows of {shared} layers; "
                       f"{len(layers) - shared} layers go to one process each")  # fmt: skip
    return text


def minutes(seconds: float) -> str:
    """Seconds, in what suits them.

    >>> minutes(12.3), minutes(200)
    ('12 s', '3.3 min')
    """
    return f"{seconds:.2g} s" if seconds < 100 else f"{seconds / 60:.2g} min"


def images_to_time(size: int) -> int:
    """How many images to time: a few large ones, more of small ones.

    >>> images_to_time(224), images_to_time(64), images_to_time(32)
    (8, 64, 64)
    """
    return min(64, max(8, 8 * (224 // size) ** 2))


def show_plan(session: Session, compressed: nn.Module, task: Task) -> bool:
    """Log the plan of a run that will be long, or that is asked for by --plan; whether it did."""
    args, world, layers = session.args, session.world, find_layers(compressed)
    plan = make_plan(layers, task, args.memory, world)
    calibration = session.calibration(nrounds=args.nrounds)
    work = sum(map(operations, layers.values())) + 1e8 * len(calibration.passes)
    if not args.plan and work < LONG_WORK:
        return False
    started, count = time.perf_counter(), images_to_time(session.data.image_size)
    images, _ = next(iter(calibration_batches(session.data, batchsize=count, workers=0)))
    reading_s = (time.perf_counter() - started) / len(images)
    reading_s /= max(1, session.data.workers if args.workers is None else args.workers)
    widest = max(layer.weight[0].numel() for layer in layers.values())
    machine = measure(session.model, task, images.to(session.device), reading_s, widest)
    counts = (len(calibration.passes), args.batchsize, len(session.data.test) * (not task.levels))
    found = estimate(plan, layers, machine, world, counts)
    for line in lines(plan, layers, found, world):
        cli.print_result(line) if args.plan else log.info(line)
    return True
