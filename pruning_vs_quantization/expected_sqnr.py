"""Expected SQNR of pruning and of quantising, for densities (the command of part 1).

    python -m pruning_vs_quantization.expected_sqnr [--balanced] [--samples 10000000]

Prints a table of densities, in dB, and the excess kurtosis from which pruning wins on truncated
Student-t densities; writes expected_sqnr.json and two pictures. The mathematics is in
`expected_error.py`. With --samples, numbers are drawn from each density, pruned and quantised, and
the largest disagreement with the closed forms is printed.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file in this folder, as the published README does
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import pruning_vs_quantization  # noqa: F401

import argparse
import math
from typing import Any

import numpy as np

from obc.solver.errors import UserError
from obc.solver.progress import progress
from obc.toolkit import cli
from pruning_vs_quantization import expected_error, plots, study_files
from pruning_vs_quantization.expected_error import TAIL_SHARE, Density, StudentT

CURVE_DEGREES = np.geomspace(30, 1.2, 25).tolist()  # of freedom: light tails to heavy ones


def compared_densities(tail: float) -> dict[str, Density]:
    """The rows of the table."""
    return {
        "uniform": expected_error.Uniform(),
        "Gaussian": expected_error.Gaussian(),
        "Laplace": expected_error.Laplace(),
        "Student-t, ν = 3": StudentT.with_tail(3.0, tail),
        "Student-t, ν = 1.5": StudentT.with_tail(1.5, tail),
    }


def density_figures(density: Density, bits: list[int], balanced: bool) -> dict[str, Any]:
    """Kurtosis and, by bit width, SQNR of both methods with the best grid's step and clipping."""
    figures: dict[str, Any] = {"kurtosis": density.kurtosis, "bits": {}}
    power = density.moment(2)
    for width in bits:
        codes = expected_error.integer_codes(width, balanced)
        grid = expected_error.best_quantisation(density, codes)
        figures["bits"][str(width)] = {
            "quant_sqnr": expected_error.sqnr_db(power, grid.error),
            "pruning_sqnr": expected_error.pruning_sqnr_db(density, width),
            "step": grid.step / math.sqrt(power),
            "clipping_share": grid.clipping / grid.error,
        }
    return figures


def kurtosis_figures(bits: list[int], balanced: bool, tail: float) -> dict[str, Any]:
    """By bit width, where pruning starts to win, and by how much each wins along the way."""
    curve = [StudentT.with_tail(degrees, tail) for degrees in CURVE_DEGREES]
    kurtoses = [density.kurtosis for density in curve]
    figures: dict[str, Any] = {}
    for width in progress("kurtosis", bits):
        gains = [expected_error.advantage_db(density, width, balanced) for density in curve]
        figures[str(width)] = {"kurtosis": kurtoses, "advantage_db": gains, "crossing": None}
        lost = next((i for i, gain in enumerate(gains) if gain <= 0), 0)
        if lost > 0:
            around = CURVE_DEGREES[lost - 1 : lost + 1]
            even = expected_error.break_even(width, *around, tail, balanced)
            figures[str(width)] |= {"crossing": even.kurtosis, "crossing_degrees": even.degrees}
    return figures


def largest_disagreement_db(
    figures: dict[str, Any], balanced: bool, tail: float, samples: int, seed: int
) -> float:
    """Between closed forms and samples, over all densities and bit widths, of either method."""
    generator, largest = np.random.default_rng(seed), 0.0
    every = compared_densities(tail).items()
    for name, density in progress("samples", every):
        values = density.sample(samples, generator)
        power = float(np.square(values).sum())
        for width, expected in figures["densities"][name]["bits"].items():
            step = expected["step"] * math.sqrt(density.moment(2))
            codes = expected_error.integer_codes(int(width), balanced)
            quantised = expected_error.round_to_grid(values, step, codes)
            pruned = round(len(values) * expected_error.sparsity_of(int(width)))
            smallest = np.partition(abs(values), pruned)[:pruned]
            for errors, method in ((values - quantised, "quant_sqnr"), (smallest, "pruning_sqnr")):
                sampled = expected_error.sqnr_db(power, float(np.square(errors).sum()))
                largest = max(largest, abs(sampled - expected[method]))
    return largest


def kurtosis_text(density: dict[str, Any], digits: int) -> str:
    return study_files.signed(density["kurtosis"], digits=digits).removeprefix("+")


def sqnr_table(figures: dict[str, Any], bits: list[int]) -> study_files.TextTable:
    """The figures, SQNR in dB."""
    rows = []
    for name, density in figures["densities"].items():
        for label, key in (("quantising", "quant_sqnr"), ("pruning", "pruning_sqnr")):
            values = [f"{density['bits'][str(width)][key]:.2f}" for width in bits]
            rows.append([name, kurtosis_text(density, 2), label, *values])
    head = ["density", "excess kurtosis", "SQNR (dB) of", *(f"{width} bits" for width in bits)]
    return study_files.TextTable(head, rows)


def draw_sqnr(figures: dict[str, Any], bits: list[int]) -> Any:
    """SQNR against bits, a panel per density."""
    panels = figures["densities"]
    size = {"width": 2.1 * len(panels), "height": 3.0}
    figure, axes = plots.new_figure(1, len(panels), **size, sharey=True, squeeze=False)
    for each, (name, density) in zip(axes[0], panels.items(), strict=True):
        for key, look in (("quant_sqnr", plots.QUANTISATION), ("pruning_sqnr", plots.PRUNING)):
            each.plot(
                bits, [density["bits"][str(width)][key] for width in bits], markersize=4, **look
            )
        each.set_title(f"{name}\nexcess kurtosis {kurtosis_text(density, 1)}", fontsize=10)
        each.set_xticks(sorted(bits))
        each.set_xlabel("bits a weight")
    axes[0][0].set_ylabel("expected SQNR (dB)")
    plots.draw_legend(axes[0][0])
    return figure


def draw_kurtosis(figures: dict[str, Any], bits: list[int]) -> Any:
    """By how much quantisation wins against kurtosis, a line per bit width."""
    figure, axes = plots.new_figure(width=6.4)
    axes.axhline(0, color=plots.NEUTRAL_COLOUR, linewidth=0.8)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    for width in sorted(bits):
        line, look = figures["kurtosis"][str(width)], plots.bit_look(width)
        label = f"{width} bits"
        axes.plot(line["kurtosis"], line["advantage_db"], color=look["color"], label=label)
        if (crossing := line["crossing"]) is not None:
            axes.plot(crossing, 0, **look)
            place = {"xytext": (3, 6), "textcoords": "offset points"}
            axes.annotate(f"{crossing:.1f}", (crossing, 0), **place, fontsize=9, bbox=box)
    axes.set_xscale("log")
    axes.set_xlim(0.3)
    axes.set_xticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("excess kurtosis of a truncated Student-t density")
    axes.set_ylabel("quantisation − pruning, SQNR (dB)")
    plots.draw_legend(axes)
    return figure


def run(args: argparse.Namespace) -> None:
    bits, balanced, tail = sorted(set(args.bits), reverse=True), args.balanced, args.tail
    if tail <= 0:
        raise UserError("--tail must be above 0: an uncut Student-t has no kurtosis")
    settings = {"bits": bits, "balanced": balanced, "tail": tail}
    settings |= {"samples": args.samples, "seed": args.seed}
    path = args.out / "expected_sqnr.json"
    figures = study_files.finished(path, settings, args.restart)
    if figures is None:
        densities = {
            name: density_figures(x, bits, balanced) for name, x in compared_densities(tail).items()
        }
        figures = {"densities": densities, "kurtosis": kurtosis_figures(bits, balanced, tail)}
        if args.samples:
            largest = largest_disagreement_db(figures, balanced, tail, args.samples, args.seed)
            figures["largest_disagreement_db"] = largest
        study_files.write_result(path, settings, figures)
    cli.print_result(sqnr_table(figures, bits).markdown())
    for width in sorted(bits):
        line = figures["kurtosis"][str(width)]
        if line["crossing"] is not None:
            text = f"{width} bits: pruning wins from an excess kurtosis of {line['crossing']:.2f}"
            cli.print_result(f"{text} (ν = {line['crossing_degrees']:.2f})")
    if "largest_disagreement_db" in figures:
        largest = figures["largest_disagreement_db"]
        cli.print_result(f"largest disagreement with {args.samples} samples: {largest:.4f} dB")
    plots.save_figure(draw_sqnr(figures, bits), args.out / "expected_sqnr")
    plots.save_figure(draw_kurtosis(figures, bits), args.out / "kurtosis_crossing")


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="expected_sqnr",
        description=__doc__.splitlines()[0],
        example="python -m pruning_vs_quantization.expected_sqnr --bits 8 4 2",
    )
    study_files.add_grid_options(parser)
    text = "fraction of a Student-t density that is cut off"
    parser.add_argument("--tail", metavar="F", type=cli.fraction, default=TAIL_SHARE, help=text)
    text, natural = "check against this many numbers drawn from each density", cli.nonnegative_int
    parser.add_argument("--samples", metavar="N", type=natural, default=0, help=text)
    study_files.add_study_options(parser, "expected_sqnr", device=False)
    return parser


def main(argv: list[str] | None = None) -> int:
    return cli.command(build_parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
