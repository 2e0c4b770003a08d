"""The layers of a model compressed, each by its own Hessian and independently of the others.

OBC (arXiv 2208.11580), section 3. Dense weights and calibration images in, compressed weights (or
all levels of a database) and a report out. Finished layers are saved in a state (`resume.py`), so
that a run that was interrupted only does the rest. Hessians can be saved, too, in a cache that
later runs with the same calibration share, whatever their mode: a layer's Σxxᵀ depends on the dense
model, its images and its activation grids, not on which other layers are calibrated with it.

    images ─▶ Σxxᵀ ─[cache]─▶ TrueOBS ─▶ weights or levels ─[state]─▶ model, database

Levels go to one file per layer next to the state (`leveldb.LevelFile`) as soon as they are made.

--check measures the squared errors again, without a Hessian. The solver claims, per image,
Σ_rows (w−ŵ) H (w−ŵ)ᵀ / 2 with H = (2/N) Σ x xᵀ. Since a layer is linear in its weights, that is
the mean over the N images of

    ‖layer(x; W) − layer(x; Ŵ)‖² = ‖layer(x; W − Ŵ)‖²        summed over channels and positions

(without the bias), x being the layer's input in the dense model. On the calibration images the two
must agree up to rounding: if they differ by more than `CHECK_TOLERANCE`, the Hessian or the solver
is wrong. On *fresh* images, which H has not seen, the error shows how well the weights generalise.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import quant
from modelutils import evaluating, find_layers, placed
from obc.inputs.batches import Batches
from obc.inputs.tasks import Task, call
from obc.solver.distributed import ALONE, World
from obc.solver.errors import SingularHessian, UserError, log
from obc.solver.layers import view
from obc.solver.progress import ProgressBar, progress
from obc.solver.threads import give_back_freed_memory
from obc.toolkit.calibrate import calibrate, watching
from obc.toolkit.leveldb import LevelFile, level_file
from obc.toolkit.modes import Mode
from obc.toolkit.planning import Plan, make_plan, operations, why_dense
from obc.toolkit.resume import Entry, RunState
from trueobs import TrueOBS

CHECK_TOLERANCE = 0.05  # relative
FRESH_FACTOR = 2  # × the claimed error: from here on, fresh images refute it


@dataclass
class LayerReport:
    """The outcome for one layer: a line in the log and an entry in the record."""

    name: str
    shape: tuple[int, ...]
    result: str = ""  # e.g. "4 bits", "sparsity 0.5000"; if left dense, why
    dense: bool = False
    shifted: bool = False  # left dense, with other weights (--shift-dense)
    seconds: float = 0.0
    squared_error: float = 0.0  # Σ (w−ŵ)H(w−ŵ)ᵀ/2
    relative_error: float = 0.0  # the same, relative to Σ wHwᵀ/2
    damping: float = 0.0  # × mean(diag H)
    rank_deficit: int = 0
    nearest_rows: int = 0  # that are better off rounded to nearest
    patches: int = 0  # columns of inputs that its Hessian has seen, repeated ones counted once

    def line(self) -> str:
        shape = "×".join(map(str, self.shape))
        if self.dense:
            shifted = ", weights shifted" if self.shifted else ""
            return f"{self.name} {shape} left dense{shifted}: {self.result}"
        text = (
            f"{self.name} {shape} {self.seconds:.2f} s  squared error {self.squared_error:.4g} "
            f"({100 * self.relative_error:.3g} %)  {self.result}"
        )
        if self.damping:
            text += f"  damping {self.damping:g}"
        if self.rank_deficit:
            text += f"  rank deficit {self.rank_deficit}"
        if self.nearest_rows:
            text += f"  rounded to nearest: {self.nearest_rows} row{'s' * (self.nearest_rows > 1)}"
        return text


def compress_layer(
    name: str,
    solver: TrueOBS,
    mode: Mode,
    levels: LevelFile | None,  # where the levels go, of a mode that yields them
    repeats: int = 1,  # how often the same images were shown
) -> Entry:
    """Compress one layer: its tensors, or the hash of the file of its levels, and its report."""
    layer = solver.layer
    report = LayerReport(name, tuple(layer.weight.shape), why_dense(layer, mode, solver.nsamples))
    report.dense, tensors, levels_hash = bool(report.result), {}, ""
    report.patches = solver.gram.patches // repeats
    if not report.dense:
        before = layer.weight.detach().clone()
        started = time.perf_counter()
        mode.solve(solver)
        if levels is None:
            after, tensors = layer.weight.detach(), layer.state_dict()
        else:
            for rows, weights in solver.level_parts(mode.sparsities):
                levels.write(rows, weights)
            solver.world.meet()
            after = levels.read(len(mode.sparsities) - 1).to(before.device)
            levels_hash = levels.hash() if solver.world.first else ""
        report.result = mode.label(after) + ("" if mode.order == "obs" else f", {mode.order}")
        report.seconds = time.perf_counter() - started
        report.squared_error = solver.squared_error(after, before)
        energy = solver.squared_error(torch.zeros_like(before), before)
        report.relative_error = report.squared_error / energy if energy else 0.0
        report.damping, report.rank_deficit = solver.damping, solver.rank_deficit
        report.nearest_rows = solver.nearest_rows
    solver.free()
    on_cpu = {key: tensor.detach().cpu() for key, tensor in tensors.items()}
    return Entry(on_cpu, {"report": asdict(report), "levels": levels_hash})


@contextmanager
def naming_layer(name: str) -> Iterator[None]:
    """Inside, errors of the solver are the user's, and say which layer it is."""
    try:
        yield
    except (SingularHessian, ArithmeticError) as error:
        raise UserError(f"{name}: {error}") from error


@dataclass
class Compression:
    """The layers of a model on their way from dense to compressed."""

    in_order: ClassVar[bool] = False  # whether a layer depends on those before it

    dense: nn.Module  # sees the images
    compressed: nn.Module  # its layers are compressed in place; they may be pruned already
    mode: Mode
    state: RunState  # finished layers
    cache: RunState  # Σxxᵀ
    levels_folder: Path | None = None  # for modes that yield levels; all processes share it
    rel_damp: float = 0.0  # × mean(diag H), added to the diagonal
    memory_gb: float | None = None  # None: half of what is free
    shards: int = 1  # of the calibration images
    repeats: int = 1  # how often the batches show the same images
    keep_results: bool = False  # for --check
    world: World = ALONE
    modes: Mapping[str, Mode] = field(default_factory=dict)  # of layers that have their own
    reports: dict[str, LayerReport] = field(default_factory=dict)
    results: dict[str, Tensor] = field(default_factory=dict)  # weights, of the last level; CPU

    def __post_init__(self) -> None:
        self.layers = find_layers(self.compressed)
        self.weights_before = {
            name: layer.weight.detach().clone()
            for name, layer in self.layers.items()
            if self.keep_results
        }

    def run(self, batches: Batches) -> list[LayerReport]:
        """Calibrate and compress, in as many passes over the images as the memory requires.

        Of several processes, each does its share; all of them have the result.
        """
        self._resume()
        if to_do := {name: x for name, x in self.layers.items() if name not in self.reports}:
            plan = make_plan(to_do, self.mode, self.memory_gb, self.world, self.modes)
            self._run(plan, batches)
        reports = [self.reports[name] for name in self.layers]
        if all(report.dense and not report.shifted for report in reports):
            self.state.finish()
            raise UserError(f"no layer can be compressed; {reports[0].line()}")
        return reports

    def _run(self, plan: Plan, batches: Batches) -> None:
        """Compress the layers that are not done yet."""
        for number, names in enumerate(plan.passes, 1):
            if (count := len(plan.passes)) > 1:
                log.info("pass %d of %d over the images: %d layers", number, count, len(names))
            self._compress(plan, self._calibrated(plan, names, batches))

    def measured_errors(self, batches: Batches) -> dict[str, float]:
        """Squared errors of all results, measured again for --check."""
        device = next(self.dense.parameters()).device
        changes = {
            name: self.weights_before[name] - weight.to(device)
            for name, weight in self.results.items()
        }
        return measured_errors(self.dense, changes, batches, device)

    def mode_of(self, name: str) -> Mode:
        """The mode that a layer is compressed with."""
        return self.modes.get(name) or self.mode.for_layer(name)

    def level_file(self, name: str) -> LevelFile | None:
        """The file of a layer's levels, of a mode that yields them."""
        if self.levels_folder is None:
            return None
        return level_file(self.levels_folder, name, self.layers[name])

    def _resume(self) -> None:
        """Take over what an interrupted run has finished."""
        for name, layer in self.layers.items():
            if (entry := self.state.load(name)) is None or not self._levels_are_intact(name, entry):
                if self.in_order:
                    break
                continue
            if entry.tensors:
                quant.put_layer(layer, entry.tensors)
            self._enter(entry)
        if self.reports:
            log.info("resuming: %d of %d layers are done", len(self.reports), len(self.layers))

    def _levels_are_intact(self, name: str, entry: Entry) -> bool:
        if not entry.figures["levels"]:
            return True
        file = self.level_file(name)
        same = self.world.share(self.world.first and file.hash() == entry.figures["levels"])
        if not same:
            log.warning("%s: damaged; it is computed again", file.path)
        return same

    def _enter(self, entry: Entry) -> None:
        report = LayerReport(**entry.figures["report"])
        self.reports[report.name] = report
        if self.keep_results and not report.dense:
            weight = entry.tensors.get("weight")
            if (file := self.level_file(report.name)) is not None:
                weight = file.read(len(self.mode.sparsities) - 1)
            self.results[report.name] = weight.to("cpu", copy=True)

    def _calibrated(self, plan: Plan, names: list[str], batches: Batches) -> dict[str, TrueOBS]:
        """Solvers with the Hessians of these layers, from the cache or else from the images."""
        solvers = {
            name: TrueOBS(
                self.layers[name],
                self.rel_damp,
                plan.memory,
                plan.sharing(name, self.world),
                self.mode_of(name).order,
            )
            for name in names
        }
        cached = {name: entry for name in names if (entry := self.cache.load(name))}
        for names_there in self.world.gather(set(cached)):  # processes may read one folder
            cached = {name: entry for name, entry in cached.items() if name in names_there}
        for name, entry in cached.items():
            solvers[name].gram.sums().copy_(entry.tensors["total"])
            solvers[name].nsamples = entry.figures["nsamples"]
            solvers[name].gram.patches = entry.figures["patches"]
        if cached:
            log.info("calibrated before (--cache): %d of %d layers", len(cached), len(names))
        if missing := {name: solver for name, solver in solvers.items() if name not in cached}:
            device = next(self.dense.parameters()).device
            calibrate(self.dense, missing, batches, device, self.world, self.shards)
            give_back_freed_memory()
        for name, solver in missing.items() if self.world.first else ():
            figures = {"nsamples": solver.nsamples, "patches": solver.gram.patches}
            self.cache.save(name, {"total": solver.gram.sums()}, figures)
        return solvers

    def _compress(self, plan: Plan, solvers: dict[str, TrueOBS]) -> None:
        """Compress the layers of `solvers`, which it empties: this process only its own.

        Layers that all processes share come first: while one waits, the others have work.
        """
        entries = {}
        with self._progress() as bar:
            for name in sorted(solvers, key=lambda name: plan.owners[name] is not None):
                solver, owner = solvers.pop(name), plan.owners[name]
                solver.memory = plan.memory - sum(plan.needs[other].sums for other in solvers)
                if owner not in (None, self.world.rank):
                    continue
                with naming_layer(name):
                    file = self.level_file(name)
                    entry = compress_layer(name, solver, self.mode_of(name), file, self.repeats)
                self._finish(name, entry, bar)
                if owner is not None:
                    entries[name] = entry
            for rank, entries_there in enumerate(self.world.gather(entries)):
                for name, entry in entries_there.items() if rank != self.world.rank else ():
                    if entry.tensors:
                        quant.put_layer(self.layers[name], entry.tensors)
                    self._finish(name, entry, bar)

    def _progress(self) -> ProgressBar:
        """A bar over the operations of all layers, as far as they are done."""
        work = {
            name: operations(layer)
            for name, layer in self.layers.items()
            if not self.mode_of(name).misfit(view(layer))
        }
        done = sum(work.get(name, 0) for name in self.reports)
        return progress("compressing", total=sum(work.values()), done=done, counted=False)

    def _finish(self, name: str, entry: Entry, bar: ProgressBar) -> None:
        """Save a layer that is done, and log it."""
        self.state.save(name, entry.tensors, entry.figures)
        self._enter(entry)
        log.info(self.reports[name].line())
        bar.set_postfix_str(f"{len(self.reports)} of {len(self.layers)} layers")
        bar.update(0 if self.reports[name].dense else operations(self.layers[name]))


# -- --check ---------------------------------------------------------------------------------------


def measured_errors(
    dense: nn.Module,
    changes: Mapping[str, Tensor],  # layer → W − Ŵ, in the shape of its weight
    batches: Batches,
    device: torch.device,
) -> dict[str, float]:
    """Mean over images of ‖layer(x; W − Ŵ)‖² for every layer, in one pass over the images."""
    sums = {name: torch.zeros((), dtype=torch.float64, device=device) for name in changes}
    layers = {name: dense.get_submodule(name) for name in changes}
    changes = {name: change.to(device) for name, change in changes.items()}
    count = 0

    def see(name: str, x: Tensor) -> None:
        output = view(layers[name]).call(x.to(changes[name].dtype), changes[name])
        sums[name] += output.double().square().sum()

    with evaluating(dense), watching(layers, see):
        for images, _ in progress("checking", batches):
            call(dense, placed(images, device))
            count += len(images)
    return {name: float(total) / count for name, total in sums.items()}


def compare(name: str, claimed: float, measured: float, fresh: float | None) -> None:
    """A line in the log; a warning if claim and measurement differ."""
    line = f"{name} checked {measured:.4g} (claimed {claimed:.4g})"
    line += "" if fresh is None else f", fresh images {fresh:.4g}"
    if abs(measured - claimed) > CHECK_TOLERANCE * max(abs(measured), abs(claimed)):
        log.warning("%s: they differ by more than %g %%", line, 100 * CHECK_TOLERANCE)
    else:
        log.info(line)


# -- claims that cannot be believed ----------------------------------------------------------------


def warn_of_doubtful_claims(
    compression: Compression,
    reports: Sequence[Mapping[str, Any]],  # as in the record
    task: Task,
    augmented: bool,
) -> None:
    """Name the layers that saw too little for their claimed errors, and what helps.

    With fewer patches than columns, Σxxᵀ says nothing of the other directions of weight space: a
    change along them is free on the calibration images, and on no others. Baselines, which do not
    fit their weights to Σxxᵀ, do not profit from that.
    """
    images, available = task.count, task.available
    short, worse = {}, {}
    for report in reports:
        name, patches, claimed = report["name"], report["patches"], report["squared_error"]
        columns = view(compression.layers[name]).columns
        if report["dense"]:
            continue
        if patches < columns and compression.mode.order == "obs":
            short[name] = f"{name} ({patches} for {columns})", -(-columns * images // patches)
        if (fresh := report.get("fresh_error", 0.0)) > FRESH_FACTOR * claimed:
            worse[name] = f"{name} ({fresh:.4g} for {claimed:.4g})"
    lines = []
    if short:
        texts, counts = zip(*short.values(), strict=True)
        remedy = f"--nsamples {max(counts)} would do"
        if max(counts) > available:
            remedy = f"{max(counts)} images would do, the dataset has {available}: "
            augmentation = "raise --nrounds" if augmented else "leave out --noaug"
            remedy += augmentation if task.augments else "let it have more"
        lines.append(
            "do not believe the errors claimed for layers that saw fewer patches than they have "
            f"columns; {remedy}: {', '.join(texts)}"
        )
    if worse:
        help_text = "" if short.keys() >= worse.keys() else f"; more than {images} images help"
        lines.append(
            f"fresh images give more than {FRESH_FACTOR} times the error claimed for these layers"
            f"{help_text}: {', '.join(worse.values())}"
        )
    for line in lines:
        log.warning(line)
