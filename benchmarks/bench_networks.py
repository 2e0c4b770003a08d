"""A whole network's layers: minutes and memory of the solver.

    python -m benchmarks.bench_networks rn18 unstr --out networks_rn18.json
    python -m benchmarks.bench_networks rn50 quant --rows-fraction 0.1     # extrapolated

The layers have the shapes of MODEL, with 1000 classes, normal weights and an artificial Hessian:
second moment of rectified normal channels ⊗ 0.8^distance between the pixels of a kernel + identity.
Layer after layer is processed as by main_trueobs.py:

    unstr   TrueOBS.prepare_unstr, level_parts at the 45 levels of the default grid, each written
            to a LevelFile; after the last layer write_levels: a database on disk
    quant   a 4-bit grid for each row, TrueOBS.quantize

Timed separately, per layer: the solver with the inverse of H, and writing; the median of
`--repeats` (1: many layers of a network are alike) after a warm-up on a small layer. Excluded: the
calibration (bench_calibration.py), H itself, and, from the memory, the Gram matrices of the other
layers, which a run holds as well. Peak memory is measured per layer; the summary has the highest.

With `--rows-fraction F` below 1 only F of each layer's rows are compressed. Rows are independent,
so everything but the inverse of H (timed by itself) is divided by the share timed, and marked as
extrapolated. Peak memory is then that of the rows timed, less than the whole network's.

Checked in the same run, per layer. unstr: exactly ceil(rows·d·s) zeros at every level, and at a
level in the middle the first row's remaining weights are optimal: the gradient H(ŵ − w) vanishes on
them, relative to its size elsewhere. quant: every weight is on its grid, and the squared error
Σ δHδᵀ/2 is below that of rounding to nearest.

Prediction. 2d³/3 flops per row (both halves of the trailing products) for the elimination, and for
unstr a factorisation of d³/3 for the levels: rn18 has 1.1e14 + 0.6e14 of them (nine tenths in three
layers of 512 rows with d = 4608), so 28 minutes at 100 Gflop/s, 9 of them for the mirrored half.
On a GPU the fraction of its fp32 peak counts 2d³/3 per row, whatever else was computed, over the
solver's time. With --textbook, `bench_trueobs.py` runs at d = 2304 for comparison.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from benchmarks import bench_trueobs, timing
from benchmarks.networks import random_model
from benchmarks.timing import PeakMemory, against, seconds_of
from modelutils import find_layers
from obc.solver import errors
from obc.solver.inverse import damped_inverse
from obc.solver.layers import view
from obc.solver.memory import default_memory
from obc.toolkit import cli
from obc.toolkit.leveldb import LevelFile, level_file, write_levels
from obc.toolkit.modes import UnstrMode
from quant import fit_weight_grid
from trueobs import TrueOBS

WEIGHT_BITS = 4
CPU_GOALS = {("rn18", "unstr"): (20.0, 6.0), ("rn50", "unstr"): (30.0, None)}  # minutes, GB
GPU_GOALS = {("rn50", "unstr"): (1.0, None), ("rn50", "quant"): (1.0, None)}
STATIONARY = 1e-3  # gradient on kept weights, relative to the gradient elsewhere


@dataclass(frozen=True)
class LayerFigures:
    """Figures for one layer; seconds as measured on the rows timed, one entry per repeat."""

    name: str
    rows: int
    columns: int
    rows_timed: int
    solver_s: list[float]
    inverse_s: float  # of H, part of solver_s; 0 (not needed) where all rows are timed
    write_s: float
    peak_bytes: int
    check: float  # unstr: gradient on remaining weights; quant: error relative to rounding's
    faults: list[str]

    @property
    def seconds(self) -> float:
        """Seconds for all rows."""
        whole = median(self.solver_s)
        return self.inverse_s + (whole - self.inverse_s) * self.rows / self.rows_timed

    @property
    def flops(self) -> float:
        return 2 / 3 * self.rows * self.columns**3


@dataclass(frozen=True)
class NetworkFigures:
    """Figures for the whole network, from its layers."""

    model: str
    mode: str
    extrapolated: bool
    minutes: float
    writing_minutes: float
    peak_bytes: int
    tflop_a_second: float  # 2d³/3 flops a row
    peak_fraction: float | None  # of the GPU's fp32


# -- layers and Hessians ---------------------------------------------------------------------------


def real_layer(like: nn.Module, share: float, device: torch.device, seed: int) -> nn.Module:
    """The layer with a share of its rows and normal weights (variance 2/d)."""
    shape = view(like)
    layer = shape.resized(ceil(shape.rows * share), shape.channels, shape.groups)
    layer = layer.to_empty(device=device)
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(layer.weight.shape, generator=generator) * (2 / shape.columns) ** 0.5
    layer.weight.data.copy_(normal)
    return layer


@dataclass
class MadeUp:
    """Takes the place of a solver's Gram matrix."""

    total: Tensor | None  # (groups, d, d) float64

    def take(self) -> Tensor:
        total, self.total = self.total, None
        return total.clone()


def hessian_for(layer: nn.Module, device: torch.device, seed: int) -> Tensor:
    """(groups, d, d) float64, columns in the order (channel, kh, kw); see the module docstring."""
    C, groups = view(layer).channels, view(layer).groups
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * C, C, generator=generator).to(device).relu().double()
    sides = (torch.arange(size, device=device) for size in view(layer).kernel)
    pixels = torch.cartesian_prod(*sides).double()
    near = 0.8 ** torch.cdist(pixels, pixels)  # (kh·kw, kh·kw)
    H = torch.kron(x.T @ x / len(x), near)
    H.diagonal().add_(1)
    return H.expand(groups, -1, -1)


def solver_for(layer: nn.Module, H: Tensor, memory: int) -> TrueOBS:
    solver = TrueOBS(layer, memory=memory)
    solver.gram, solver.nsamples = MadeUp(H), 2  # so that its (2/N) Σ x xᵀ is H
    return solver


# -- one layer -------------------------------------------------------------------------------------


def run_solver(solver: TrueOBS, mode: str, levels: list[float], file: LevelFile | None) -> float:
    """Run one mode as main_trueobs.py does, all levels into a file; returns seconds of writing."""
    if mode == "unstr":
        solver.prepare_unstr()
        device = solver.layer.weight.device
        return sum(
            seconds_of(lambda part=part: file.write(*part), device)
            for part in solver.level_parts(levels)
        )
    solver.quantizer = fit_weight_grid(solver.layer.weight.detach().flatten(1), WEIGHT_BITS)
    solver.quantize()
    return 0.0


def check_pruned(
    answers: list[Tensor], levels: list[float], dense: Tensor, H: Tensor
) -> tuple[float, list[str]]:
    """Gradient on the first row's remaining weights, and faults."""
    faults = []
    for level, weight in zip(levels, answers, strict=True):
        zeros, expected = int((weight == 0).sum()), ceil(weight.numel() * level * (1 - 1e-12))
        if zeros != expected:
            faults.append(f"{zeros} zeros at sparsity {level:.4f}, not {expected}")
    middle = answers[len(answers) // 2].flatten(1)[0].double()
    gradient = H[0] @ (middle - dense.flatten(1)[0].double())
    elsewhere = max(float(gradient[middle == 0].norm()), 1e-30)
    relative = float(gradient[middle != 0].norm()) / elsewhere
    if not relative <= STATIONARY:
        faults.append(f"remaining weights are not optimal (gradient {relative:.2g})")
    return relative, faults


def check_quantised(answer: Tensor, solver: TrueOBS, dense: Tensor) -> tuple[float, list[str]]:
    """Squared error, relative to that of rounding to nearest, and faults."""
    grid, rows = solver.quantizer, dense.flatten(1)
    faults = []
    if not torch.equal(grid(answer.flatten(1)), answer.flatten(1)):
        faults.append("weights are not on their grid")
    nearest = grid(rows).view_as(dense)
    relative = solver.squared_error(answer, dense) / solver.squared_error(nearest, dense)
    if not relative < 1:
        faults.append(f"{relative:.3g} times the error of rounding to nearest")
    return relative, faults


class NetworkBench:
    """All layers of one network, one after another, through the solver."""

    def __init__(self, args: argparse.Namespace, device: torch.device, folder: Path):
        self.args, self.device = args, device
        self.memory = int(args.memory * 1e9) if args.memory else default_memory(device)
        self.sparsities = UnstrMode().sparsities if args.mode == "unstr" else []
        self.folder = folder / "partial"
        self.folder.mkdir()
        self.files: dict[str, LevelFile] = {}
        self.peak = PeakMemory(device)

    def warm_up(self) -> None:
        small = nn.Linear(64, 64).to(self.device)
        solver = solver_for(small, hessian_for(small, self.device, 0), 1 << 28)
        file = level_file(self.folder, "warm-up", small.weight)
        run_solver(solver, self.args.mode, self.sparsities, file)

    def layer(self, name: str, like: nn.Module) -> LayerFigures:
        layer = real_layer(like, self.args.rows_fraction, self.device, self.args.seed)
        dense, H = layer.weight.detach().clone(), hessian_for(layer, self.device, self.args.seed)
        levels, file = self.sparsities, level_file(self.folder, name, dense)
        self.files[name] = file
        self.peak.reset()
        times, writing = [], []
        for _ in range(self.args.repeats):
            layer.weight.data.copy_(dense)
            solver = solver_for(layer, H, self.memory)
            work = lambda s=solver: writing.append(run_solver(s, self.args.mode, levels, file))  # noqa: E731
            times.append(seconds_of(work, self.device) - writing[-1])
        write_s = median(writing)
        peak_bytes, inverse_s = self.peak.bytes(), 0.0
        if len(layer.weight) < len(like.weight):
            inverse_s = seconds_of(lambda: damped_inverse(H), self.device)
        if self.args.mode == "unstr":
            answers = [file.read(level).to(self.device) for level in range(len(levels))]
            check, faults = check_pruned(answers, levels, dense, H)
        else:
            check, faults = check_quantised(layer.weight.detach(), solver, dense)
        solver.free()
        return LayerFigures(
            name,
            len(like.weight),
            solver.columns,
            len(layer.weight),
            times,
            inverse_s,
            write_s,
            peak_bytes,
            check,
            [f"{name}: {fault}" for fault in faults],
        )


# -- the whole -------------------------------------------------------------------------------------


def fp32_peak(device: torch.device, given: float | None) -> float | None:
    """Flops a second: --peak-tflops, or 128 multiply-adds per multiprocessor and clock."""
    if given is not None:
        return 1e12 * given
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    clock = getattr(properties, "clock_rate", None)  # kHz
    return clock and 2 * 128 * properties.multi_processor_count * clock * 1e3


def network_figures(
    args: argparse.Namespace, device: torch.device, layers: list[LayerFigures], finish_s: float
) -> NetworkFigures:
    total = sum(layer.seconds for layer in layers)
    timed = sum(layer.rows_timed * layer.columns for layer in layers)
    share = timed / sum(layer.rows * layer.columns for layer in layers)
    written = sum(layer.write_s * layer.rows / layer.rows_timed for layer in layers)
    rate, peak = sum(layer.flops for layer in layers) / total, fp32_peak(device, args.peak_tflops)
    return NetworkFigures(
        model=args.model,
        mode=args.mode,
        extrapolated=share < 1,
        minutes=total / 60,
        writing_minutes=(written + finish_s / share) / 60,
        peak_bytes=max(layer.peak_bytes for layer in layers),
        tflop_a_second=rate / 1e12,
        peak_fraction=peak and rate / peak,
    )


def measure_network(
    args: argparse.Namespace, device: torch.device, folder: Path
) -> list[LayerFigures | NetworkFigures]:
    """All layers, each printed as a row of the table; the last entry is the whole network."""
    shapes = find_layers(random_model(args.model, 0, torch.device("meta")))
    if args.rows_fraction < 1 and any(view(x).groups > 1 for x in shapes.values()):
        raise errors.UserError(f"{args.model} has grouped convolutions: --rows-fraction 1 only")
    bench = NetworkBench(args, device, folder)
    bench.warm_up()
    cli.print_result(LAYERS_HEADER)
    layers = []
    for name, like in shapes.items():
        layers.append(bench.layer(name, like))
        cli.print_result(table_row(layers[-1]))
    finish_s, grid = 0.0, bench.sparsities
    if grid:
        finish_s = seconds_of(
            lambda: write_levels(folder, "network", grid, {}, bench.files), device
        )
    return [*layers, network_figures(args, device, layers, finish_s)]


# -- report ----------------------------------------------------------------------------------------

LAYERS_HEADER = """\
| layer | rows × d | rows timed | solver, s (all rows) | writing, s (timed) | peak, GB | check |
|---|---|---|---|---|---|---|"""
SUMMARY_HEADER = """
| network | mode | | solver, min | writing, min | peak, GB | Tflop/s (2d³/3) | of fp32 peak |
|---|---|---|---|---|---|---|---|"""


def table_row(layer: LayerFigures) -> str:
    return (
        f"| {layer.name} | {layer.rows} × {layer.columns} | {layer.rows_timed} "
        f"| {layer.seconds:.3g} | {layer.write_s:.3g} | {layer.peak_bytes / 1e9:.2f} "
        f"| {layer.check:.2g} |"
    )


def summary_row(whole: NetworkFigures, goals: tuple[float | None, float | None]) -> str:
    note = "extrapolated" if whole.extrapolated else "measured"
    fraction = "" if whole.peak_fraction is None else f"{100 * whole.peak_fraction:.1f} %"
    minutes = against(whole.minutes, goals[0], digits=".3g")
    return (
        f"| {whole.model} | {whole.mode} | {note} | {minutes} "
        f"| {whole.writing_minutes:.3g} | {against(whole.peak_bytes / 1e9, goals[1])} "
        f"| {whole.tflop_a_second:.3g} | {fraction} |"
    )


def beside_textbook(args: argparse.Namespace) -> Callable[[], None]:
    """A run of bench_trueobs.py at d = 2304, on the same device."""
    words = ["--columns", "2304", "--device", args.device, "--seed", str(args.seed)]
    return lambda: bench_trueobs.run(bench_trueobs.build_parser().parse_args(words))


def build_parser() -> argparse.ArgumentParser:
    parser = timing.build_parser("bench_networks.py", __doc__.splitlines()[0], repeats=1)
    add = parser.add_argument
    add("model", metavar="MODEL", help="rn18, rn50, another of torchvision's, or rn8 … rn110")
    add("mode", metavar="MODE", choices=["unstr", "quant"], help="unstr or quant")
    text = "share of each layer's rows that is timed; the rest is extrapolated"
    add("--rows-fraction", metavar="F", type=cli.positive_float, default=1.0, help=text)
    text = "as for main_trueobs.py (default: from what is free)"
    add("--memory", metavar="GB", type=cli.positive_float, help=text)
    add("--scratch", metavar="DIR", help="where the temporary database goes (default: /tmp)")
    text = "fp32 peak of the GPU (default: from its clock)"
    add("--peak-tflops", metavar="F", type=cli.positive_float, help=text)
    add("--textbook", action="store_true", help="run bench_trueobs.py at d = 2304 as well")
    return parser


def run(args: argparse.Namespace) -> None:
    if args.rows_fraction > 1:
        raise errors.UserError(f"--rows-fraction must be at most 1; got {args.rows_fraction:g}")
    if args.scratch and not Path(args.scratch).is_dir():
        raise errors.UserError(f"--scratch {args.scratch}: no such folder")
    device = timing.start(args)
    with tempfile.TemporaryDirectory(prefix="bench_networks", dir=args.scratch) as folder:
        results = measure_network(args, device, Path(folder))
    goals = CPU_GOALS if device.type == "cpu" else GPU_GOALS
    cli.print_result(SUMMARY_HEADER)
    cli.print_result(summary_row(results[-1], goals.get((args.model, args.mode), (None, None))))
    if args.textbook:
        cli.print_result("")
        beside_textbook(args)()
    faults = [fault for layer in results[:-1] for fault in layer.faults]
    timing.finish(args, "bench_networks.py", results, faults)


def main(argv: list[str] | None = None) -> int:
    return cli.command(build_parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
