"""What this machine takes for each part of a run, measured for two to ten seconds.

The problems that are timed look like those of the run: the rule, the number of levels, a few rows
at several numbers of columns; where layers of the network cannot but have a singular H, the same
with the refinement that follows (`refinement.py`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from modelutils import evaluating, find_layers
from obc.inputs import files
from obc.solver.elimination import Trace, eliminate
from obc.solver.hessian import Gram
from obc.solver.inverse import Inverse, damped_inverse
from obc.solver.layers import view
from obc.solver.levels import Undamped, completed, weights_at
from obc.solver.threads import one_thread
from obc.toolkit.calibrate import watching
from obc.toolkit.task import Task

SIZES = (288, 576, 1152, 2304, 4608)  # columns that may be measured: in cache, and beyond it
INVERTED = 2304  # columns up to which inverting is measured, too; it only grows with d³
PATIENCE_S = 4.0  # a measurement that would take longer is not made
DAMPED = 4  # inverses of a singular H, about, until the damping is found


@dataclass(frozen=True)
class Images:
    """Seconds for the network and what it is shown."""

    batch_s: float = 0.0  # the network and all sums, for every batch, on one thread
    image_s: float = 0.0  # … and for every image in it
    test_s: float = 0.0  # the network alone, an image, on all threads
    positions: dict[str, int] = field(default_factory=dict)  # layer → patches of an image


@dataclass(frozen=True)
class Machine:
    """Seconds, as measured here."""

    images: Images
    reading_s: float  # an image from its file
    inverting: dict[int, float]  # columns → a matrix
    row: dict[int, float]  # columns → a row
    refining: dict[int, float] = field(default_factory=dict)  # … and more where H is singular
    shared: dict[int, float] = field(default_factory=dict)  # columns → what rows share, if any
    batches_at_a_time: int = 1
    writing_s: float = 0.0  # a checkpoint

    def row_s(self, d: int, singular: bool = False) -> float:
        """For a row of d columns."""
        return between(self.row, d) + (between(self.refining, d) if singular else 0.0)

    def system_s(self, d: int, singular: bool = False) -> float:
        """For an H of d×d, whatever the number of rows."""
        return self.inverting_s(d, singular) + between(self.shared, d)

    def inverting_s(self, d: int, singular: bool = False) -> float:
        nearest = min(self.inverting, key=lambda size: abs(size - d))
        return (DAMPED if singular else 1) * self.inverting[nearest] * (d / nearest) ** 3


def between(measured: dict[int, float], d: int) -> float:
    """a·d³ + b·d² through the two nearest sizes; 0 where nothing was measured."""
    if not measured:
        return 0.0
    sizes = sorted(sorted(measured, key=lambda size: abs(size - d))[:2])
    if len(sizes) == 1:
        return measured[sizes[0]] * (d / sizes[0]) ** 3
    small, large = (measured[size] / size**2 for size in sizes)  # a·d + b
    a = max(0.0, (large - small) / (sizes[1] - sizes[0]))
    return max(large + a * (d - sizes[1]), 0.3 * small) * d * d


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
    dense: nn.Module,
    images: Images,
    reading_s: float,
    task: Task,
    widest: int,  # columns; 0: no layer can be compressed
    singular: bool,  # whether some layer's H is
    folder: Path | None,  # where results go
) -> Machine:
    """Time a few rows at sizes up to the widest layer's, on the model's device."""
    device = next(dense.parameters()).device
    row: dict[int, float] = {}
    refining: dict[int, float] = {}
    shared: dict[int, float] = {}
    inverting: dict[int, float] = {}
    rows = 64 if task.shared else 2 * torch.get_num_threads()
    spent_s = 0.0
    for size in SIZES if widest else ():
        if row and (size > 2 * widest or 6 * spent_s > PATIENCE_S):
            break
        eliminating_s, levels_s = rows_seconds(rows, size, task, device)
        spent_s = eliminating_s + levels_s
        row[size] = (levels_s if task.shared else spent_s) / rows
        if task.shared:
            shared[size] = eliminating_s
        if task.refines and singular:
            _, refined_s = rows_seconds(rows, size, task, device, singular=True)
            refining[size] = max(0.0, refined_s - levels_s) / rows
        if size <= INVERTED:
            H, _ = problem(size, device)
            inverting[size] = clock(lambda H=H: damped_inverse(H), device)
    at_a_time = torch.get_num_threads() if device.type == "cpu" else 1
    writing_s = writing_seconds(dense, folder) if folder else 0.0
    return Machine(images, reading_s, inverting, row, refining, shared, at_a_time, writing_s)


# -- rows ------------------------------------------------------------------------------------------


def problem(d: int, device: torch.device) -> tuple[Tensor, Inverse]:
    """H = 1 + a·11ᵀ, of which the inverse, 1 − a/(1 + a·d)·11ᵀ, need not be computed."""
    H, a = torch.empty(1, d, d, dtype=torch.float64, device=device), 0.3
    H.fill_(-a / (1 + a * d)).diagonal(dim1=1, dim2=2).add_(1)
    matrix, none = H.float(), torch.zeros(1, device=device)
    H.fill_(a).diagonal(dim1=1, dim2=2).add_(1)
    return H, Inverse(matrix, 1 / H.diagonal(dim1=1, dim2=2).float(), none, none)


def rows_seconds(
    rows: int, d: int, task: Task, device: torch.device, singular: bool = False
) -> tuple[float, float]:
    """So many rows: their elimination, and their weights at the levels."""
    d += -d % (task.nm[1] or task.size)  # groups and blocks are whole
    generator = torch.Generator().manual_seed(0)
    H, inverse = problem(d, device)
    shape = (1, rows, d) if task.shared else (rows, 1, d)
    W = torch.randn(shape, generator=generator).to(device)
    system = torch.zeros(len(W), dtype=torch.int64, device=device)
    traces: list[Trace] = []

    def work() -> None:
        rule = task.rule(rows, d, device)
        with one_thread() if task.shared else nullcontext():  # as `prepare_struct` does
            traces.append(eliminate(W, inverse, system, rule, task.steps(d)))

    eliminating_s, levels_s = clock(work, device), 0.0
    if task.levels or singular:
        levels_s = clock(
            lambda: some_levels(W, inverse, H, system, traces[0], task.levels, singular), device
        )
    return eliminating_s, levels_s


def some_levels(
    W: Tensor,
    inverse: Inverse,
    H: Tensor,
    system: Tensor,
    trace: Trace,
    levels: int,  # 0: where the trace ends
    singular: bool,
) -> None:
    """Weights at so many levels; refined as if half of the diagonal of H were damping."""
    steps, d = trace.order.shape[1], W.shape[2]
    order, undamped = trace.order.long(), None
    if levels:
        counts = torch.linspace(0, d - 1, levels, device=W.device).long()
    else:
        counts, order = torch.tensor([steps], device=W.device), completed(order, d)
    if singular:
        without = H.clone()
        without.diagonal(dim1=1, dim2=2).sub_(0.5)
        undamped = Undamped(without, system, torch.ones_like(system, dtype=torch.bool))
    weights_at(W, inverse, H, system, order, counts[:, None].expand(-1, len(W)), undamped)


# -- images, and files -----------------------------------------------------------------------------


def image_seconds(dense: nn.Module, images: Tensor) -> Images:
    """Show a few images, on their device, to the network."""
    device, sums, positions = images.device, Counter(), Counter()

    def see(name: str, x: Tensor) -> None:
        layer, gram = layers[name], Gram(layers[name])
        sums[name] += clock(lambda: gram.add(x), device)
        positions[name] += view(layer).positions(x) // len(x)

    layers, totals = find_layers(dense), {}
    with evaluating(dense):
        test_s = clock(lambda: dense(images), device) / len(images)
        with one_thread():
            for count in (1, len(images)):
                network_s = clock(lambda n=count: dense(images[:n]), device)
                sums.clear()
                positions.clear()
                with watching(layers, see):
                    dense(images[:count])
                totals[count] = network_s + sum(sums.values())
    step = max(1, len(images) - 1)
    image_s = max(0.0, totals[len(images)] - totals[1]) / step
    return Images(max(0.0, totals[1] - image_s), image_s, test_s, positions)


def images_to_time(size: int) -> int:
    """How many images to time: a few large ones, more of small ones.

    >>> images_to_time(224), images_to_time(64), images_to_time(32)
    (8, 64, 64)
    """
    return min(64, max(8, 8 * (224 // size) ** 2))


def writing_seconds(model: nn.Module, folder: Path) -> float:
    """A checkpoint of the model, into a folder: into the nearest that is there."""
    while not folder.is_dir():
        folder = folder.parent
    with TemporaryDirectory(prefix=".plan-", dir=folder) as name:
        started = time.perf_counter()
        files.save_checkpoint(model.state_dict(), Path(name) / "model.pth")
        return time.perf_counter() - started
