"""The engine's modes against each other, and against one Cholesky factorisation a row.

    python -m benchmarks.bench_modes --out bench_modes.json

Timed in one process, on the same threads, from the same H⁻¹ (float32, computed before):
`elimination.eliminate` on all rows with the rules

    unstructured   all d steps                        the reference
    quantise       all d steps, to 4 bits             goal: ≤ 1.3 × unstructured
    2:4            d/2 steps, 2 zeros in every 4      goal: ≤ 0.6 ×
    4-blocks       all d steps, 4 columns at a time   goal: ≤ 2 ×

in turn, round after round; then, at `--limit-columns`, unstructured against `torch.linalg.cholesky`
of one d×d matrix per row, `--limit-rows` of them in one call (goal: ≤ 1.8 ×). Excluded: H, its
inverse, the fit of the grid (`quant.fit_weight_grid`), and batches of rows, which `TrueOBS` makes.

Checked in the same run, in float64, on `--check-rows` rows: a textbook loop (OBC, arXiv 2208.11580,
sections 4 and 5; one outer product per step, written here) follows the engine's order for
`--check-steps` steps and scores each of the engine's choices by its own rule. A choice has to be
the best to 1 % (float32 may swap near ties). In every row: each column goes once (2:4: exactly two
of every four), removed weights are zero, and quantised weights are on their grid.

Prediction. A step's panel work does not depend on the rule's target, so quantise only adds the
rounding: about 1.1. 2:4 computes a column only when it goes, or shortly before: with |C| = d − 2k
candidates after k steps, Σ k|C| = d³/24 multiply-adds instead of the d³/6 of unstructured, a
quarter, and half of the steps at the same cost: 0.4 to 0.6. 4-blocks have a 4×4 solve per unit and
step, a quarter of the steps, and the same products: about 1.1. Unstructured has the flops of a
Cholesky factorisation, less than half of them in one long product: about 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor

from benchmarks import timing
from benchmarks.timing import RandomProblem, against, alternating, random_problem
from obc.solver import errors
from obc.solver.elimination import NM, Blocks, PivotRule, Quantise, Trace, Unstructured, eliminate
from obc.toolkit import cli
from quant import Grid, fit_weight_grid

WEIGHT_BITS, ZEROS, GROUP, BLOCK_SIZE = 4, 2, 4, 4
GOALS = {"unstructured": None, "quantise": 1.3, "2:4": 0.6, "4-blocks": 2.0}  # × unstructured
LIMIT_GOAL = 1.8  # × Cholesky
NEAR_TIE = 1e-2  # relative; a choice this much worse than the best may be rounding
NEGLIGIBLE_SCORE = 1e-8  # × the median score of the first step: below that, scores are rounding


@dataclass(frozen=True)
class ModeFigures:
    """Figures for one d; seconds per row, one entry per repeat."""

    columns: int
    rows: int
    seconds_a_row: dict[str, list[float]]  # by mode
    steps_checked: int
    excess: dict[str, float]  # the worst choice: how much worse than the best, relative
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class LimitFigures:
    """The engine and a Cholesky factorisation; seconds per row, one entry per repeat."""

    columns: int
    rows: int
    engine_s: list[float]
    cholesky_s: list[float]
    steps_checked: int
    excess: float
    faults: list[str]


# -- the modes -------------------------------------------------------------------------------------


def rule_of(mode: str, problem: RandomProblem, grid: Grid) -> tuple[PivotRule, int]:
    """A fresh rule, and how many steps it takes."""
    R, _, d = problem.W.shape
    if mode == "quantise":
        return Quantise(grid.scale, -grid.zero, grid.maxq - grid.zero), d
    if mode == "2:4":
        return NM(ZEROS, GROUP, R, d, problem.W.device), d // GROUP * ZEROS
    return (Blocks(BLOCK_SIZE) if mode == "4-blocks" else Unstructured()), d


def engine(mode: str, problem: RandomProblem, grid: Grid) -> Trace:
    rule, steps = rule_of(mode, problem, grid)
    return eliminate(problem.W, problem.inverse, problem.system, rule, steps)


# -- the textbook, in float64 ----------------------------------------------------------------------

Score = Callable[[Tensor, Tensor, Tensor], Tensor]  # A (R,d,d), w (R,d), gone (R,d) -> (R,units)


def score_of(mode: str, grid: Grid) -> Score:
    """The paper's score, whose least goes next; infinite where nothing may go."""

    def single(A: Tensor, w: Tensor, gone: Tensor) -> Tensor:
        return (w.square() / A.diagonal(dim1=1, dim2=2)).masked_fill(gone, float("inf"))

    def limited(A: Tensor, w: Tensor, gone: Tensor) -> Tensor:
        full = gone.view(len(w), -1, GROUP).sum(2) >= ZEROS
        return single(A, w, gone | full.repeat_interleave(GROUP, 1))

    def rounded(A: Tensor, w: Tensor, gone: Tensor) -> Tensor:
        error = w - to_grid(w, grid)
        outlier = (error.abs() > grid.scale * (0.5 + 1e-6)) & ~gone
        return torch.where(outlier, -error.abs(), single(A, error, gone))

    def blocks(A: Tensor, w: Tensor, gone: Tensor) -> Tensor:
        R, d = w.shape
        units = A.view(R, d // BLOCK_SIZE, BLOCK_SIZE, d // BLOCK_SIZE, BLOCK_SIZE).diagonal(
            dim1=1, dim2=3
        )
        units = units.permute(0, 3, 1, 2) + torch.diag_embed(gone.view(R, -1, BLOCK_SIZE).to(A))
        v = w.view(R, -1, BLOCK_SIZE, 1)
        scores = (v * torch.linalg.solve(units, v)).sum((2, 3))
        return scores.masked_fill(gone[:, ::BLOCK_SIZE], float("inf"))

    return {"quantise": rounded, "2:4": limited, "4-blocks": blocks}.get(mode, single)


def to_grid(w: Tensor, grid: Grid) -> Tensor:  # (R, d), grid of R rows
    code = torch.round(w / grid.scale) + grid.zero
    return grid.scale * (code.clamp(min=0).minimum(grid.maxq.to(w)) - grid.zero)


def follow(mode: str, problem: RandomProblem, grid: Grid, order: Tensor) -> float:
    """How much worse than the textbook's best the worst of the engine's choices is, relative."""
    rows, steps = order.shape
    grid = Grid(grid.scale[:rows].double(), grid.zero[:rows].double(), grid.maxq)
    A = problem.inverse.matrix.double().repeat(rows, 1, 1)
    w = problem.W[:rows, 0].double()
    gone, row = torch.zeros_like(w, dtype=torch.bool), torch.arange(rows, device=w.device)
    unit, score, worst, tiny = (
        BLOCK_SIZE if mode == "4-blocks" else 1,
        score_of(mode, grid),
        0.0,
        0.0,
    )
    for k in range(steps - steps % unit):
        p = order[:, k]
        if k % unit == 0:
            scores = score(A, w, gone)
            tiny = tiny or NEGLIGIBLE_SCORE / NEAR_TIE * float(scores.abs().median())
            least = scores.amin(1)
            excess = (scores[row, p // unit] - least) / (least.abs() + tiny)
            worst = max(worst, float(excess.max()))
        c, pivot = A[row, p], A[row, p, p, None]
        target = to_grid(w, grid)[row, p] if mode == "quantise" else torch.zeros_like(w[:, 0])
        w -= c * ((w[row, p] - target)[:, None] / pivot)
        A.baddbmm_(c[:, :, None], (c / pivot)[:, None], alpha=-1)
        gone[row, p] = True
        w[row, p] = target
    return worst


def faults_of(mode: str, trace: Trace, grid: Grid, excess: float) -> list[str]:
    """Faults of a mode's answer, in all rows."""
    weights, d = trace.weights[:, 0], trace.weights.shape[2]
    went = torch.zeros_like(weights, dtype=torch.int64)
    went.scatter_add_(1, trace.order, torch.ones_like(trace.order))
    faults = []
    if not excess <= NEAR_TIE:
        faults.append(f"a choice is {excess:.3g} worse than the textbook's")
    if mode == "2:4":
        zeros = (weights == 0).view(len(weights), -1, GROUP).sum(2)
        if not bool((zeros == ZEROS).all()):
            faults.append(f"{int((zeros != ZEROS).sum())} groups have other than {ZEROS} zeros")
        went = went[weights == 0]
    if not bool((went == 1).all()):
        faults.append("not every column goes once")
    off = (weights - to_grid(weights, grid)).abs() if mode == "quantise" else weights.abs()
    if mode != "2:4" and bool((off > 1e-4 * grid.scale).any()):
        faults.append("weights are not at their targets")
    return [f"{mode} at d = {d}: {text}" for text in faults]


def checked(
    mode: str, trace: Trace, problem: RandomProblem, grid: Grid, args: argparse.Namespace
) -> tuple[float, list[str]]:
    """The worst choice of the first steps, and all faults."""
    excess = follow(mode, problem, grid, trace.order[: args.check_rows, : args.check_steps])
    return excess, faults_of(mode, trace, grid, excess)


# -- timing ----------------------------------------------------------------------------------------


def measure_modes(d: int, device: torch.device, args: argparse.Namespace) -> ModeFigures:
    problem = random_problem(d, args.rows, device, args.seed)
    grid = fit_weight_grid(problem.W[:, 0], WEIGHT_BITS)
    traces: dict[str, Trace] = {}

    def work(mode: str) -> Callable[[], None]:
        return lambda: traces.update({mode: engine(mode, problem, grid)})

    times = alternating({mode: work(mode) for mode in GOALS}, device, args.repeats)
    answers = {mode: checked(mode, traces[mode], problem, grid, args) for mode in GOALS}
    return ModeFigures(
        columns=d,
        rows=args.rows,
        seconds_a_row={
            mode: [total / args.rows for total in totals] for mode, totals in times.items()
        },
        steps_checked=args.check_steps,
        excess={mode: excess for mode, (excess, _) in answers.items()},
        faults=[fault for _, faults in answers.values() for fault in faults],
    )


def measure_limit(d: int, device: torch.device, args: argparse.Namespace) -> LimitFigures:
    rows = args.limit_rows
    problem = random_problem(d, rows, device, args.seed)
    matrices = problem.inverse.matrix.repeat(rows, 1, 1)
    grid, traces = fit_weight_grid(problem.W[:, 0], WEIGHT_BITS), {}
    works = {
        "engine": lambda: traces.update(last=engine("unstructured", problem, grid)),
        "cholesky": lambda: torch.linalg.cholesky(matrices),
    }
    times = alternating(works, device, args.repeats)
    excess, faults = checked("unstructured", traces["last"], problem, grid, args)
    engine_s, cholesky_s = ([total / rows for total in totals] for totals in times.values())
    return LimitFigures(d, rows, engine_s, cholesky_s, args.check_steps, excess, faults)


# -- report ----------------------------------------------------------------------------------------

MODES_HEADER = """\
| d | unstructured, s/row | quantise (4 bit), × | 2:4, × | 4-blocks, × | worst choice, % off |
|---|---|---|---|---|---|"""
LIMIT_HEADER = """
| d | rows | unstructured, s/row | cholesky, s/row | × | worst choice, % off |
|---|---|---|---|---|---|"""


def modes_row(result: ModeFigures) -> str:
    times = {mode: median(repeats) for mode, repeats in result.seconds_a_row.items()}
    whole = times.pop("unstructured")
    ratios = " | ".join(against(time / whole, GOALS[mode]) for mode, time in times.items())
    worst = max(result.excess.values())
    return f"| {result.columns} | {whole:.4f} | {ratios} | {100 * worst:.2g} |"


def limit_row(result: LimitFigures) -> str:
    engine_s, cholesky_s = median(result.engine_s), median(result.cholesky_s)
    return (
        f"| {result.columns} | {result.rows} | {engine_s:.4f} | {cholesky_s:.4f} "
        f"| {against(engine_s / cholesky_s, LIMIT_GOAL)} | {100 * result.excess:.2g} |"
    )


def build_parser() -> argparse.ArgumentParser:
    parser = timing.build_parser("bench_modes.py", __doc__.splitlines()[0])
    add, positive = parser.add_argument, cli.positive_int
    text = "columns of the layers; none: skip the modes"
    add("--columns", metavar="D", type=positive, nargs="*", default=[576, 1152, 2304], help=text)
    add("--rows", metavar="R", type=positive, default=16, help="rows in a batch")
    text = "columns of the comparison with a Cholesky factorisation; none: skip it"
    add("--limit-columns", metavar="D", type=positive, nargs="*", default=[4608], help=text)
    add("--limit-rows", metavar="R", type=positive, default=16, help="rows in a batch there")
    add("--check-steps", metavar="N", type=positive, default=64, help="steps the textbook follows")
    add("--check-rows", metavar="N", type=positive, default=2, help="rows it checks")
    return parser


def run(args: argparse.Namespace) -> None:
    for d in args.columns:
        if d % max(GROUP, BLOCK_SIZE):
            raise errors.UserError(f"--columns {d} must be a multiple of {max(GROUP, BLOCK_SIZE)}")
    device = timing.start(args)
    results: list[ModeFigures | LimitFigures] = []
    for header, columns, measure, row in (
        (MODES_HEADER, args.columns, measure_modes, modes_row),
        (LIMIT_HEADER, args.limit_columns, measure_limit, limit_row),
    ):
        for number, d in enumerate(columns):
            results.append(measure(d, device, args))
            if number == 0:
                cli.print_result(header)
            cli.print_result(row(results[-1]))
    timing.finish(args, "bench_modes.py", results, [x for result in results for x in result.faults])


def main(argv: list[str] | None = None) -> int:
    return cli.command(build_parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
