"""The engine against a vectorised textbook loop: seconds per row, whole unstructured trace.

    python -m benchmarks.bench_trueobs --out bench_trueobs.json

Timed in one process, on the same threads, from the same H⁻¹ (float32, computed before):

* engine: `elimination.eliminate` with the rule `Unstructured`, all d steps of all rows;
* textbook: OBC (arXiv 2208.11580), algorithm 1, batched over the rows and written here in plain
  torch: every step scores all columns, takes the least, moves w and then updates the whole matrix,

        A −= outer(c, c) / A_pp        c = A[:, p]

  in two forms: "as written", which forms the outer product and subtracts it, and "in place",
  which fuses the two (addcmul_), the fastest form that we know in plain torch. A textbook step
  costs the same anywhere in the trace, and all d of them would take minutes, so `--burst` steps
  are timed from each of `--points` places spread evenly over the trace (the state there is computed
  from the engine's order, untimed), and the seconds per step are multiplied by d: extrapolated;
* one `torch.linalg.cholesky` of a d×d matrix, a lower limit for any method, per row.

Rows are processed in batches of `--rows`, as in a layer. With so few rows that the textbook's
matrices stay in a cache (8 rows of 576 columns take 11 MB), the textbook loop is several times
faster, but no layer is that small.

Median of `--repeats` after a warm-up (the record has every time). Checked in the same run: from
each place the textbook loop picks what the engine picked, in every row; and the engine's order in
row 0 is that of a textbook loop in float64, for the whole row up to d = 576, for the first
`--check-steps` steps above.

Prediction. A textbook row is 2d³ flops on 8d³ bytes (A is read and written), so 8d³/B seconds at a
bandwidth of B. The engine does d³/3 flops in matrix products (half of A, on a CPU), at a rate of
F. Their ratio is 24 F/B: 240 at 100 Gflop/s and 10 GB/s, in place, for matrices that do not fit in
a cache; up to three times that as written. A Cholesky factorisation has d³/3 flops, too, so the
engine should take about as long as one, plus its panels.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

if not __package__:  # run by its path, not with -m
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import timing
from benchmarks.timing import RandomProblem, alternating, random_problem, seconds_of
from obc.solver import errors
from obc.solver.elimination import Trace, Unstructured, eliminate
from obc.toolkit import cli

WHOLE_ROW = 576  # columns up to which float64 checks every step

Update = Callable[[Tensor, Tensor, Tensor], object]  # A (R, d, d), c (R, d), pivot (R, 1)


@dataclass(frozen=True)
class EngineFigures:
    """Figures for one d; seconds per row, one entry per repeat."""

    columns: int
    rows: int
    engine_s: list[float]
    textbook_as_written_s: list[float]
    textbook_in_place_s: list[float]
    cholesky_s: list[float]  # of one matrix
    steps_timed: int  # of the textbook loop, per repeat
    picks_compared: int  # in those steps, over all rows
    picks_equal: int
    float64_steps: int  # compared in row 0
    float64_equal: int  # steps before the first difference


# -- the textbook loop -----------------------------------------------------------------------------


def update_as_written(A: Tensor, c: Tensor, pivot: Tensor) -> None:
    A -= torch.bmm(c[:, :, None], (c / pivot)[:, None, :])


def update_in_place(A: Tensor, c: Tensor, pivot: Tensor) -> None:
    A.addcmul_(c[:, :, None], (c / pivot)[:, None, :], value=-1)


def textbook_steps(
    A: Tensor,  # (R, d, d) changed in place
    w: Tensor,  # (R, d) changed in place
    gone: Tensor,  # (R, d) bool, changed in place
    steps: int,
    update: Update,
) -> Tensor:  # (R, steps) columns removed
    """OBC's algorithm 1, one weight at a time, for all rows at once."""
    row = torch.arange(len(w), device=w.device)
    picks = []
    for _ in range(steps):
        scores = w.square() / A.diagonal(dim1=1, dim2=2)
        p = scores.masked_fill_(gone, float("inf")).argmin(1)
        c = A[row, p]
        pivot = c[row, p, None]
        w -= c * (w[row, p, None] / pivot)
        update(A, c, pivot)
        gone[row, p] = True
        picks.append(p)
    return torch.stack(picks, 1)


def state_after(problem: RandomProblem, order: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """A (R, d, d), w (R, d) and gone (R, d) after the first k steps of `order`, in closed form."""
    R, _, d = problem.W.shape
    A0 = problem.inverse.matrix[0].double()
    A, w = A0.new_empty(R, d, d, dtype=torch.float32), problem.W[:, 0].clone()
    gone = torch.zeros(R, d, dtype=torch.bool, device=A.device)
    for r in range(R):
        P = order[r, :k]
        L = torch.linalg.cholesky(A0[P][:, P])
        V = torch.linalg.solve_triangular(L, A0[P], upper=False)  # (k, d)
        z = torch.linalg.solve_triangular(L, w[r, P, None].double(), upper=False)
        gone[r, P] = True
        A[r] = A0 - V.T @ V
        A[r].masked_fill_(gone[r] | gone[r, :, None], 0)
        w[r] -= (V.T @ z)[:, 0].float()
        w[r].masked_fill_(gone[r], 0)
    return A, w, gone


# -- timing ----------------------------------------------------------------------------------------


def time_engine(
    problem: RandomProblem, args: argparse.Namespace
) -> tuple[Trace, dict[str, list[float]]]:
    """The trace; seconds of the engine, per row, and of one Cholesky factorisation."""
    R, _, d = problem.W.shape
    matrix, traces = problem.inverse.matrix[0], []
    works = {
        "engine": lambda: traces.append(
            eliminate(problem.W, problem.inverse, problem.system, Unstructured(), d)
        ),
        "cholesky": lambda: torch.linalg.cholesky(matrix),
    }
    times = alternating(works, problem.W.device, args.repeats)
    return traces[0], times | {"engine": [total / R for total in times["engine"]]}


def time_textbook(
    problem: RandomProblem, order: Tensor, update: Update, args: argparse.Namespace
) -> tuple[list[float], int]:
    """Seconds per row for the whole trace, extrapolated; number of picks that are the engine's."""
    R, _, d = problem.W.shape
    totals, equal = [0.0] * args.repeats, 0
    for point in range(args.points):
        k = point * (d - args.burst) // max(1, args.points - 1)
        A, w, gone = state_after(problem, order, k)
        for repeat in range(-1, args.repeats):  # -1: warm-up, and check
            state = [x.clone() for x in (A, w, gone)]
            picks: list[Tensor] = []
            work = lambda s=state, p=picks: p.append(  # noqa: E731
                textbook_steps(*s, args.burst, update)
            )
            elapsed = seconds_of(work, A.device)
            if repeat < 0:
                equal += int((picks[0] == order[:, k : k + args.burst]).sum())
            else:
                totals[repeat] += elapsed
    scale = d / (args.points * args.burst) / R
    return [total * scale for total in totals], equal


def steps_like_float64(problem: RandomProblem, order: Tensor, check_steps: int) -> tuple[int, int]:
    """Number of steps compared in row 0, and of steps before the first difference."""
    d = problem.W.shape[2]
    steps = d if d <= WHOLE_ROW else min(check_steps, d)
    A, w = problem.inverse.matrix.double().clone(), problem.W[:1, 0].double()
    gone = torch.zeros_like(w, dtype=torch.bool)
    exact = textbook_steps(A, w, gone, steps, update_in_place)[0]
    different = torch.nonzero(exact != order[0, :steps])
    return steps, int(different[0]) if len(different) else steps


def measure_engine(d: int, device: torch.device, args: argparse.Namespace) -> EngineFigures:
    problem = random_problem(d, args.rows, device, args.seed)
    trace, times = time_engine(problem, args)
    as_written_s, equal = time_textbook(problem, trace.order, update_as_written, args)
    in_place_s, equal_too = time_textbook(problem, trace.order, update_in_place, args)
    float64_steps, float64_equal = steps_like_float64(problem, trace.order, args.check_steps)
    return EngineFigures(
        columns=d,
        rows=args.rows,
        engine_s=times["engine"],
        textbook_as_written_s=as_written_s,
        textbook_in_place_s=in_place_s,
        cholesky_s=times["cholesky"],
        steps_timed=args.points * args.burst,
        picks_compared=2 * args.points * args.burst * args.rows,
        picks_equal=equal + equal_too,
        float64_steps=float64_steps,
        float64_equal=float64_equal,
    )


# -- report ----------------------------------------------------------------------------------------

HEADER = """\
| d | engine, s/row | textbook as written, s/row | ratio | in place, s/row | ratio \
| cholesky, s | engine / cholesky | same picks | same order as float64 |
|---|---|---|---|---|---|---|---|---|---|"""


def engine_row(result: EngineFigures) -> str:
    engine, written, in_place, cholesky = (
        median(times)
        for times in (
            result.engine_s,
            result.textbook_as_written_s,
            result.textbook_in_place_s,
            result.cholesky_s,
        )
    )
    return (
        f"| {result.columns} | {engine:.4f} | {written:.3g} | {written / engine:.0f} "
        f"| {in_place:.3g} | {in_place / engine:.0f} | {cholesky:.4f} | {engine / cholesky:.1f} "
        f"| {result.picks_equal} of {result.picks_compared} "
        f"| {result.float64_equal} of {result.float64_steps} |"
    )


def build_parser() -> argparse.ArgumentParser:
    parser = timing.build_parser("bench_trueobs.py", __doc__.splitlines()[0])
    add, positive = parser.add_argument, cli.positive_int
    text = "columns of the layers"
    add("--columns", metavar="D", type=positive, nargs="+", default=[576, 1152, 2304], help=text)
    add("--rows", metavar="R", type=positive, default=32, help="rows in a batch, for both")
    text = "places in the trace where the textbook loop is timed"
    add("--points", metavar="N", type=positive, default=4, help=text)
    add("--burst", metavar="N", type=positive, default=8, help="steps timed at each place")
    text = f"steps compared with float64, above {WHOLE_ROW} columns"
    add("--check-steps", metavar="N", type=positive, default=256, help=text)
    return parser


def run(args: argparse.Namespace) -> None:
    if min(args.columns) < args.burst:
        raise errors.UserError(f"--burst {args.burst} is more than --columns {min(args.columns)}")
    device = timing.start(args)
    results = []
    for d in args.columns:
        results.append(measure_engine(d, device, args))
        if len(results) == 1:
            cli.print_result(HEADER)
        cli.print_result(engine_row(results[-1]))
    timing.finish(args, "bench_trueobs.py", results)


def main(argv: list[str] | None = None) -> int:
    return cli.command(build_parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
