"""Expected SQNR of pruning and of quantising, for densities (the command of part 1).

    python -m pruning_vs_quantization.expected_sqnr [--balanced] [--samples 10000000]

Prints a table of densities, in dB, and the excess kurtosis from which pruning wins on truncated
Student-t densities; writes expected_sqnr.json and two pictures. The mathematics is in
`expected_error.py`, the truncation in `distributions.py`. With --samples, numbers are drawn from
each density, pruned and quantised, and the largest disagreement is printed.
"""

from __future__ import annotations

import argparse
import math
import sys
from typing import Any

import numpy as np
from tqdm import tqdm

from obc.solver import errors
from obc.toolkit import cli
from pruning_vs_quantization import expected_error, plots, study_files
from pruning_vs_quantization.distributions import (
    TAIL,
    Density,
    Gaussian,
    Laplace,
    StudentT,
    Uniform,
)

CURVE_DEGREES = np.geomspace(30, 1.2, 25).tolist()  # of freedom: light tails to heavy ones


def densities(tail: float) -> dict[str, Density]:
    """The rows of the table."""
    student = {
        f"Student-t, ν = {degrees:g}": StudentT.with_tail(degrees, tail) for degrees in (3.0, 1.5)
    }
    return {"uniform": Uniform(), "Gaussian": Gaussian(), "Laplace": Laplace()} | student


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
    figures: dict[str, Any] = {}
    for width in tqdm(bits, desc="kurtosis", leave=False, disable=None):
        gains = [expected_error.advantage_db(density, width, balanced) for density in curve]
        figures[str(width)] = {
            "kurtosis": [density.kurtosis for density in curve],
            "advantage_db": gains,
            "crossing": None,
        }
        lost = next((i for i, gain in enumerate(gains) if gain <= 0), 0)
        if lost > 0:
            bracket = CURVE_DEGREES[lost - 1], CURVE_DEGREES[lost]
            even = expected_error.crossing(width, *bracket, tail, balanced)
            figures[str(width)] |= {"crossing": even.kurtosis, "crossing_degrees": even.degrees}
    return figures


def sampled_sqnr_db(
    density: Density,
    bits: int,
    step: float,  # in standard deviations
    balanced: bool,
    values: np.ndarray,  # (n,) drawn from the density
) -> tuple[float, float]:
    """SQNR of quantising and of pruning numbers rather than a density."""
    codes = expected_error.integer_codes(bits, balanced)
    step = step * math.sqrt(density.moment(2))
    quantised = step * np.clip(np.rint(values / step), codes[0], codes[-1])
    pruned = round(len(values) * expected_error.sparsity_of(bits))
    smallest = np.partition(abs(values), pruned)[:pruned]
    power = float(np.square(values).sum())
    return (
        expected_error.sqnr_db(power, float(np.square(values - quantised).sum())),
        expected_error.sqnr_db(power, float(np.square(smallest).sum())),
    )


def largest_disagreement_db(args: argparse.Namespace, figures: dict[str, Any]) -> float:
    """Between closed forms and samples, over all densities and bit widths, of either method."""
    generator, largest = np.random.default_rng(args.seed), 0.0
    for name, density in tqdm(
        densities(args.tail).items(), desc="samples", leave=False, disable=None
    ):
        values = density.sample(args.samples, generator)
        for width, expected in figures["densities"][name]["bits"].items():
            sampled = sampled_sqnr_db(density, int(width), expected["step"], args.balanced, values)
            for found, wanted in zip(sampled, ("quant_sqnr", "pruning_sqnr"), strict=True):
                largest = max(largest, abs(found - expected[wanted]))
    return largest


def rounded(value: float, digits: int) -> float:
    """Never −0."""
    return round(value, digits) + 0.0


def table(figures: dict[str, Any], bits: list[int]) -> str:
    """The figures as Markdown, SQNR in dB."""
    lines = [
        "| density | excess kurtosis | SQNR (dB) of | "
        + " | ".join(f"{width} bits" for width in bits)
        + " |",
        "|---|---|---|" + "---|" * len(bits),
    ]
    for name, of in figures["densities"].items():
        for label, key in (("quantising", "quant_sqnr"), ("pruning", "pruning_sqnr")):
            values = " | ".join(f"{of['bits'][str(width)][key]:.2f}" for width in bits)
            kurtosis = f"{rounded(of['kurtosis'], 2):.2f}".replace("-", "−")
            lines.append(f"| {name} | {kurtosis} | {label} | {values} |")
    return "\n".join(lines)


def draw_sqnr(figures: dict[str, Any], bits: list[int]) -> Any:
    """SQNR against bits, a panel per density."""
    found = figures["densities"]
    figure, axes = plots.new_figure(
        1, len(found), width=2.1 * len(found), height=3.0, sharey=True, squeeze=False
    )
    for each, (name, of) in zip(axes[0], found.items(), strict=True):
        for label, key, colour, marker in (
            ("quantisation", "quant_sqnr", plots.QUANTISATION_COLOUR, "o"),
            ("pruning", "pruning_sqnr", plots.PRUNING_COLOUR, "s"),
        ):
            values = [of["bits"][str(width)][key] for width in bits]
            each.plot(bits, values, color=colour, marker=marker, markersize=4, label=label)
        kurtosis = f"{rounded(of['kurtosis'], 1):.1f}".replace("-", "−")
        each.set_title(f"{name}\nexcess kurtosis {kurtosis}", fontsize=10)
        each.set_xticks(sorted(bits))
        each.set_xlabel("bits a weight")
    axes[0][0].set_ylabel("expected SQNR (dB)")
    plots.draw_legend(axes[0][0])
    return figure


def draw_kurtosis(figures: dict[str, Any], bits: list[int]) -> Any:
    """By how much quantisation wins against kurtosis, a line per bit width."""
    figure, axes = plots.new_figure(width=6.4)
    axes.axhline(0, color=plots.NEUTRAL_COLOUR, linewidth=0.8)
    for width in sorted(bits):
        of = figures["kurtosis"][str(width)]
        axes.plot(
            of["kurtosis"], of["advantage_db"], color=plots.bit_colour(width), label=f"{width} bits"
        )
        if of["crossing"] is not None:
            axes.plot(of["crossing"], 0, plots.bit_marker(width), color=plots.bit_colour(width))
            axes.annotate(
                f"{of['crossing']:.1f}",
                (of["crossing"], 0),
                (3, 6),
                textcoords="offset points",
                fontsize=9,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )
    axes.set_xscale("log")
    axes.set_xlim(0.3)
    axes.set_xticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
    axes.set_xticks([], minor=True)
    axes.set(
        xlabel="excess kurtosis of a truncated Student-t density",
        ylabel="quantisation − pruning, SQNR (dB)",
    )
    plots.draw_legend(axes)
    return figure


def run(args: argparse.Namespace) -> None:
    bits = sorted(set(args.bits), reverse=True)
    if args.tail <= 0:
        raise errors.UserError("--tail must be above 0: an uncut Student-t has no kurtosis")
    settings = {
        "bits": bits,
        "balanced": args.balanced,
        "tail": args.tail,
        "samples": args.samples,
        "seed": args.seed,
    }
    path = args.out / "expected_sqnr.json"
    figures = study_files.finished(path, settings, args.restart)
    if figures is None:
        figures = {
            "densities": {
                name: density_figures(density, bits, args.balanced)
                for name, density in densities(args.tail).items()
            },
            "kurtosis": kurtosis_figures(bits, args.balanced, args.tail),
        }
        if args.samples:
            figures["largest_disagreement_db"] = largest_disagreement_db(args, figures)
        study_files.write_result(path, settings, figures)
    cli.print_result(table(figures, bits))
    report(figures, bits, args.samples)
    plots.save_figure(draw_sqnr(figures, bits), args.out / "expected_sqnr")
    plots.save_figure(draw_kurtosis(figures, bits), args.out / "kurtosis_crossing")


def report(figures: dict[str, Any], bits: list[int], samples: int) -> None:
    """What the table does not say, a line each."""
    for width in sorted(bits):
        of = figures["kurtosis"][str(width)]
        if of["crossing"] is not None:
            cli.print_result(
                f"{width} bits: pruning wins from an excess kurtosis of "
                f"{of['crossing']:.2f} (ν = {of['crossing_degrees']:.2f})"
            )
    if "largest_disagreement_db" in figures:
        cli.print_result(
            f"largest disagreement with {samples} samples: "
            f"{figures['largest_disagreement_db']:.4f} dB"
        )


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="expected_sqnr", description=__doc__.splitlines()[0])
    study_files.add_grid_options(parser)
    parser.add_argument(
        "--tail",
        metavar="F",
        type=cli.fraction,
        default=TAIL,
        help="share of a Student-t density that is cut off",
    )
    parser.add_argument(
        "--samples",
        metavar="N",
        type=cli.nonnegative_int,
        default=0,
        help="check against so many numbers drawn from each density",
    )
    study_files.add_study_options(parser, "expected_sqnr", device=False)
    return parser


def main(argv: list[str] | None = None) -> int:
    return cli.command(build_parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
