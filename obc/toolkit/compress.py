"""All layers of a model compressed, each by its own Hessian and apart from the others.

OBC (arXiv 2208.11580), section 3. A layer is a task of its own: dense weights and the calibration
images in, compressed weights (or all levels of a grid) and a report out. What is finished is kept
in a state (`resuming.py`), so that a run that was interrupted does only the layers still to do.
Hessians may be kept too, in a cache that later runs of the same calibration share, whatever their
mode: a layer's Σxxᵀ depends on the dense model, its images and its activation grids alone, not on
which other layers are calibrated with it.

    images ─▶ Σxxᵀ ─[cache]─▶ TrueOBS ─▶ weights or levels ─[state]─▶ model, database

Levels go into files of their own beside the state (`levelfile.py`), as soon as they are made. Who
does what, in how much memory, and in how many passes, is planned before (`planning.py`).
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import quant
from modelutils import find_layers
from obc.inputs.batches import Batches
from obc.solver.allocator import give_back_freed_memory
from obc.solver.distributed import ALONE, World
from obc.solver.errors import SingularHessian, UserError, log
from obc.toolkit.calibrate import calibrate
from obc.toolkit.levelfile import LevelFile
from obc.toolkit.planning import Plan, make_plan
from obc.toolkit.resume import Entry, RunState, entry_file
from obc.toolkit.task import Task
from trueobs import TrueOBS


@dataclass
class LayerReport:
    """What became of a layer; a line in the log and an entry in the record."""

    name: str
    shape: tuple[int, ...]
    result: str = ""  # e.g. "4 bits", "sparsity 0.5000"; why, if left dense
    dense: bool = False
    seconds: float = 0.0
    squared_error: float = 0.0  # Σ (w−ŵ)H(w−ŵ)ᵀ/2
    relative_error: float = 0.0  # the same, relative to Σ wHwᵀ/2
    damping: float = 0.0  # × mean(diag H)
    rank_deficit: int = 0

    def line(self) -> str:
        shape = "×".join(map(str, self.shape))
        if self.dense:
            return f"{self.name} {shape} left dense: {self.result}"
        text = (
            f"{self.name} {shape} {self.seconds:.2f} s  squared error {self.squared_error:.4g} "
            f"({100 * self.relative_error:.3g} %)  {self.result}"
        )
        if self.damping:
            text += f"  damping {self.damping:g}"
        if self.rank_deficit:
            text += f"  rank deficit {self.rank_deficit}"
        return text


# -- one layer -------------------------------------------------------------------------------------


def why_dense(solver: TrueOBS, args: argparse.Namespace) -> str:
    """The reason to leave a layer as it is, or nothing."""
    size = {"nmprune": args.prunem, "blocked": args.blocked_size}.get(args.mode, 1)
    if solver.columns % size:
        letter = "M" if args.mode == "nmprune" else "block size"
        return f"{solver.columns} columns are not a multiple of {letter} = {size}"
    if solver.nsamples == 0:
        return "the model never calls it (attention may use its weights without a call)"
    return ""


def quantise_layer(solver: TrueOBS, args: argparse.Namespace) -> str:
    weight = solver.layer.weight.detach().flatten(1)
    solver.quantizer = quant.fit_weight_grid(
        weight, args.wbits, not args.wasym, not args.wminmax, not args.wperweight
    )
    solver.quantize()
    quant.set_weight_grid(solver.layer, solver.quantizer)
    return f"{args.wbits} bits"


def nmprune_layer(solver: TrueOBS, args: argparse.Namespace) -> str:
    solver.nmprune(args.prunen, args.prunem)
    return f"sparsity {sparsity(solver.layer.weight):.4f} ({args.prunen}:{args.prunem})"


def write_levels(
    solver: TrueOBS, args: argparse.Namespace, sparsities: list[float], file: LevelFile
) -> Tensor:
    """Write the layer's weights at all levels, a few rows at a time; those at the last level."""
    if args.mode == "unstr":
        solver.prepare_unstr()
    elif args.mode == "blocked":
        solver.prepare_blocked(args.blocked_size)
    else:
        solver.prepare_struct(size=solver.layer.weight[0, 0].numel())
    for rows, weights in solver.level_parts(sparsities):
        file.write(rows, weights)
    solver.world.meet()
    return file.read(len(sparsities) - 1).to(solver.layer.weight.device)


def sparsity(weight: Tensor) -> float:
    return float((weight == 0).float().mean())


def compress_layer(
    name: str,
    solver: TrueOBS,
    args: argparse.Namespace,
    database: Database | None,  # None: one result, put in the layer
) -> Entry:
    """Compress one layer: its tensors, or a file of all its levels, and its report."""
    report = LayerReport(name, tuple(solver.layer.weight.shape), why_dense(solver, args))
    report.dense, tensors, levels = bool(report.result), {}, ""
    if not report.dense:
        before = solver.layer.weight.detach().clone()
        started = time.perf_counter()
        if database is None:
            method = quantise_layer if args.mode == "quant" else nmprune_layer
            report.result = method(solver, args)
            after, tensors = solver.layer.weight.detach(), solver.layer.state_dict()
        else:
            file = database.file(name, before)
            after = write_levels(solver, args, database.sparsities, file)
            levels = file.hash() if solver.world.first else ""
            count = len(database.sparsities)
            report.result = f"{count} levels to sparsity {sparsity(after):.4f}"
        report.seconds = time.perf_counter() - started
        report.squared_error = solver.squared_error(after, before)
        energy = solver.squared_error(torch.zeros_like(before), before)
        report.relative_error = report.squared_error / energy if energy else 0.0
        report.damping, report.rank_deficit = solver.damping, solver.rank_deficit
    solver.free()
    on_cpu = {key: tensor.detach().cpu() for key, tensor in tensors.items()}
    return Entry(on_cpu, {"report": asdict(report), "levels": levels})


# -- all layers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Database:
    """Where the levels of all layers go."""

    sparsities: list[float]
    folder: Path  # one that all processes share

    def file(self, name: str, weight: Tensor) -> LevelFile:
        """Of a layer, whose weight tells shape and precision."""
        return LevelFile(entry_file(self.folder, name, ".levels"), weight.shape, weight.dtype)


class Compression:
    """The layers of a model on their way from dense to compressed."""

    def __init__(
        self,
        dense: nn.Module,  # shown the images
        compressed: nn.Module,  # its layers are compressed, in place; maybe pruned already
        args: argparse.Namespace,
        state: RunState,  # of finished layers
        cache: RunState,  # of Σxxᵀ
        database: Database | None = None,
        world: World = ALONE,
    ) -> None:
        self.dense, self.compressed, self.args = dense, compressed, args
        self.state, self.cache, self.database, self.world = state, cache, database, world
        self.layers = find_layers(compressed)
        self.reports: dict[str, LayerReport] = {}
        self.results: dict[str, Tensor] = {}  # the weights that squared errors are of, on the CPU

    def run(self, batches: Batches) -> list[LayerReport]:
        """Calibrate and compress, in as many passes over the images as memory asks for.

        Of several processes, each does its share; all of them have the result.
        """
        self._resume()
        if to_do := {name: x for name, x in self.layers.items() if name not in self.reports}:
            task = Task.of(self.args, len(self.database.sparsities) if self.database else 0)
            plan = make_plan(to_do, task, self.args.memory, self.world)
            for number, names in enumerate(plan.passes, 1):
                if (count := len(plan.passes)) > 1:
                    log.info("pass %d of %d over the images: %d layers", number, count, len(names))
                self._compress(plan, self._calibrated(plan, names, batches))
        reports = [self.reports[name] for name in self.layers]
        if all(report.dense for report in reports):
            self.state.finish()
            raise UserError(f"{self.args.model}: no layer can be compressed; {reports[0].line()}")
        return reports

    def _resume(self) -> None:
        """Take over what an interrupted run has finished."""
        for name, layer in self.layers.items():
            entry = self.state.load(name)
            if entry and self._whole(name, entry):
                if entry.tensors:
                    quant.put_layer(layer, entry.tensors)
                self._enter(entry)
        if self.reports:
            log.info("resuming: %d of %d layers are done", len(self.reports), len(self.layers))

    def _whole(self, name: str, entry: Entry) -> bool:
        """Whether the file of a layer's levels is as it was."""
        if not entry.figures["levels"]:
            return True
        file = self.database.file(name, self.layers[name].weight)
        same = self.world.share(self.world.first and file.hash() == entry.figures["levels"])
        if not same:
            log.warning("%s: damaged; it is computed again", file.path)
        return same

    def _enter(self, entry: Entry) -> None:
        report = LayerReport(**entry.figures["report"])
        self.reports[report.name] = report
        if not report.dense and self.args.check:
            weight = entry.tensors.get("weight")
            if self.database:
                file = self.database.file(report.name, self.layers[report.name].weight)
                weight = file.read(len(self.database.sparsities) - 1)
            self.results[report.name] = weight.to("cpu", copy=True)

    def _calibrated(self, plan: Plan, names: list[str], batches: Batches) -> dict[str, TrueOBS]:
        """Solvers with the Hessians of some layers, from the cache or else from the images."""
        damp = self.args.rel_damp
        solvers = {
            name: TrueOBS(self.layers[name], damp, plan.memory, plan.sharing(name, self.world))
            for name in names
        }
        known = {name: entry for name in names if (entry := self.cache.load(name))}
        for theirs in self.world.gather(set(known)):  # several processes may read one folder
            known = {name: entry for name, entry in known.items() if name in theirs}
        for name, entry in known.items():
            solvers[name].gram.sums().copy_(entry.tensors["total"])
            solvers[name].nsamples = entry.figures["nsamples"]
        if known:
            log.info("calibrated before (--cache): %d of %d layers", len(known), len(names))
        if missing := {name: solver for name, solver in solvers.items() if name not in known}:
            device = next(self.dense.parameters()).device
            calibrate(self.dense, missing, batches, device, self.world, self.args.shards)
            give_back_freed_memory()
        for name, solver in missing.items() if self.world.first else ():
            self.cache.save(name, {"total": solver.gram.sums()}, {"nsamples": solver.nsamples})
        return solvers

    def _compress(self, plan: Plan, solvers: dict[str, TrueOBS]) -> None:
        """Compress the layers of `solvers`, which it empties: this process those that are its own.

        Layers that all processes share come first: while one waits, the others have work.
        """
        own = {}
        for name in sorted(solvers, key=lambda name: plan.owners[name] is not None):
            solver, owner = solvers.pop(name), plan.owners[name]
            solver.memory = plan.memory - sum(plan.needs[other].sums for other in solvers)
            if owner not in (None, self.world.rank):
                continue
            try:
                entry = compress_layer(name, solver, self.args, self.database)
            except (SingularHessian, ArithmeticError) as error:
                raise UserError(f"{name}: {error}") from error
            self._finish(name, entry)
            if owner is not None:
                own[name] = entry
        for rank, theirs in enumerate(self.world.gather(own)):
            for name, entry in theirs.items() if rank != self.world.rank else ():
                if entry.tensors:
                    quant.put_layer(self.layers[name], entry.tensors)
                self._finish(name, entry)

    def _finish(self, name: str, entry: Entry) -> None:
        """Keep a layer that is done, and say so."""
        self.state.save(name, entry.tensors, entry.figures)
        self._enter(entry)
        log.info(self.reports[name].line())
