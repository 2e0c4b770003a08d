"""All layers of a model compressed, each by its own Hessian and apart from the others.

OBC (arXiv 2208.11580), section 3. A layer is a task of its own: dense weights and the calibration
images in, compressed weights (or all levels of a grid) and a report out. What is finished is kept
in a state (`resuming.py`), so that a run that was interrupted does only the layers still to do.
Hessians may be kept too, in a cache that later runs of the same calibration share, whatever their
mode: a layer's Σxxᵀ depends on the dense model, its images and its activation grids alone, not on
which other layers are calibrated with it.

    images ─▶ Σxxᵀ ─[cache]─▶ TrueOBS ─▶ weights or levels ─[state]─▶ model, database
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

import quant
from calibration import calibrate, in_passes
from cli import UserError, log
from hessian import SingularHessian
from modelutils import find_layers
from resuming import Entry, Unkept
from trueobs import TrueOBS, default_memory

LEVELS = "levels"  # (levels, *weight.shape), of a layer in a state


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
        return "it saw no calibration image (the model does not call it)"
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


def sparse_levels(solver: TrueOBS, args: argparse.Namespace, levels: list[float]) -> list[Tensor]:
    """The layer's weights at all levels."""
    if args.mode == "unstr":
        solver.prepare_unstr()
        return solver.prune_unstr(levels)
    if args.mode == "blocked":
        solver.prepare_blocked(args.blocked_size)
        return solver.prune_blocked(levels)
    return solver.prune_struct(levels, size=solver.layer.weight[0, 0].numel())


def sparsity(weight: Tensor) -> float:
    return float((weight == 0).float().mean())


def compress_layer(
    name: str,
    solver: TrueOBS,
    args: argparse.Namespace,
    sparsities: list[float] | None,  # of a database's levels; None: one result, put in the layer
) -> Entry:
    """Compress one layer: its tensors, or all its levels, and its report."""
    report = LayerReport(name, tuple(solver.layer.weight.shape), why_dense(solver, args))
    report.dense, tensors = bool(report.result), {}
    if not report.dense:
        before = solver.layer.weight.detach().clone()
        started = time.perf_counter()
        if sparsities is None:
            method = quantise_layer if args.mode == "quant" else nmprune_layer
            report.result = method(solver, args)
            after, tensors = solver.layer.weight.detach(), solver.layer.state_dict()
        else:
            levels = sparse_levels(solver, args, sparsities)
            after, tensors = levels[-1], {LEVELS: torch.stack(levels)}
            report.result = f"{len(levels)} levels to sparsity {sparsity(after):.4f}"
        report.seconds = time.perf_counter() - started
        report.squared_error = solver.squared_error(after, before)
        energy = solver.squared_error(torch.zeros_like(before), before)
        report.relative_error = report.squared_error / energy if energy else 0.0
        report.damping, report.rank_deficit = solver.damping, solver.rank_deficit
    solver.free()
    return Entry(tensors, asdict(report))


# -- all layers ------------------------------------------------------------------------------------


class Compression:
    """The layers of a model on their way from dense to compressed."""

    def __init__(
        self,
        dense: nn.Module,  # shown the images
        compressed: nn.Module,  # its layers are compressed, in place; maybe pruned already
        args: argparse.Namespace,
        state: Unkept,  # of finished layers
        cache: Unkept,  # of Σxxᵀ
        sparsities: list[float] | None = None,
    ) -> None:
        self.dense, self.compressed, self.args = dense, compressed, args
        self.state, self.cache, self.sparsities = state, cache, sparsities
        self.layers = find_layers(compressed)
        self.device = next(dense.parameters()).device
        self.memory = int(args.memory * 1e9) if args.memory else default_memory(self.device)
        self.reports: dict[str, LayerReport] = {}
        self.results: dict[str, Tensor] = {}  # the weights that squared errors are of, on the CPU

    def run(self, batches: Iterable[tuple[Tensor, Tensor]]) -> list[LayerReport]:
        """Calibrate and compress, in as many passes over the images as memory asks for."""
        self._resume()
        to_do = {name: x for name, x in self.layers.items() if name not in self.reports}
        passes = in_passes(to_do, self.memory)
        for number, names in enumerate(passes, 1):
            if len(passes) > 1:
                log.info("pass %d of %d over the images: %d layers",
                         number, len(passes), len(names))  # fmt: skip
            solvers = self._calibrated(names, batches)
            for name in names:
                try:
                    entry = compress_layer(name, solvers.pop(name), self.args, self.sparsities)
                except (SingularHessian, ArithmeticError) as error:
                    raise UserError(f"{name}: {error}") from error
                self.state.save(name, entry.tensors, entry.figures)
                self._enter(entry)
                log.info(self.reports[name].line())  # what is said to be done is kept
        reports = [self.reports[name] for name in self.layers]
        if all(report.dense for report in reports):
            self.state.finish()
            raise UserError(f"{self.args.model}: no layer can be compressed; {reports[0].line()}")
        return reports

    def _resume(self) -> None:
        """Take over what an interrupted run has finished."""
        for name, layer in self.layers.items():
            if entry := self.state.load(name):
                if "weight" in entry.tensors:
                    quant.put_layer(layer, entry.tensors)
                self._enter(entry)
        if self.reports:
            log.info("resuming: %d of %d layers are done", len(self.reports), len(self.layers))

    def _enter(self, entry: Entry) -> None:
        report = LayerReport(**entry.figures)
        self.reports[report.name] = report
        if not report.dense and self.args.check:
            last = entry.tensors[LEVELS][-1] if self.sparsities else entry.tensors["weight"]
            self.results[report.name] = last.to("cpu", copy=True)

    def _calibrated(
        self, names: list[str], batches: Iterable[tuple[Tensor, Tensor]]
    ) -> dict[str, TrueOBS]:
        """Solvers with the Hessians of some layers, from the cache or else from the images."""
        half = self.memory // 2
        solvers = {name: TrueOBS(self.layers[name], self.args.rel_damp, half) for name in names}
        missing = {}
        for name, solver in solvers.items():
            if entry := self.cache.load(name):
                solver.gram.total.copy_(entry.tensors["total"])
                solver.nsamples = entry.figures["nsamples"]
            else:
                missing[name] = solver
        if len(missing) < len(names):
            log.info("calibrated before (--cache): %d of %d layers",
                     len(names) - len(missing), len(names))  # fmt: skip
        if missing:
            calibrate(self.dense, missing, batches, self.device)
        for name, solver in missing.items():
            self.cache.save(name, {"total": solver.gram.total}, {"nsamples": solver.nsamples})
        return solvers
