"""The SQNR of quantising against that of pruning, a dot per weight tensor (section 3's picture).

    python -m pruning_vs_quantization.plot_weights_sqnr [FOLDER] [--corrected]

Reads every <model>_<b>_bits_mse.json in FOLDER (`quant_pruning_weights_sqnr.py`, or any other with
the same fields) and draws a colour per bit width, with the diagonal on which both lose the same:
above it quantisation wins. Dots without a finite value are counted, not drawn.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file in this folder, as the published README does
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import pruning_vs_quantization  # noqa: F401

import argparse
import re
from typing import Any

from obc.solver.errors import UserError, log
from obc.toolkit import cli
from pruning_vs_quantization import plots, study_files

FILE_NAME = re.compile(r"(?P<model>.+)_(?P<bits>\d+)_bits_mse\.json")
Points = dict[int, list[tuple[float, float]]]  # bits → (pruning, quantisation) in dB


def read_points(folder: Path, corrected: bool = False) -> tuple[Points, int]:
    """The dots of all models in a folder, from many bits to few, and how many are not finite.

    Raises UserError for a folder without results, and for a file that is not one.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; run quant_pruning_weights_sqnr first")
    pruning = "pruning_sqnr_corrected" if corrected else "pruning_sqnr"
    points: Points = {}
    infinite = 0
    for path in sorted(folder.iterdir()):
        if (match := FILE_NAME.fullmatch(path.name)) is None:
            continue
        dots = points.setdefault(int(match["bits"]), [])
        for layer, figures in study_files.read_json(path).items():
            x, y = (
                study_files.finite_figure(path, layer, figures, name)
                for name in (pruning, "quant_sqnr")
            )
            if x is None or y is None:
                infinite += 1
            else:
                dots.append((x, y))
    if infinite and not any(points.values()):
        raise UserError(f"{folder}: none of its {infinite} tensors has a finite SQNR to draw")
    if not any(points.values()):
        raise UserError(f"{folder}: no <model>_<b>_bits_mse.json with figures in it")
    return dict(sorted(points.items(), reverse=True)), infinite


def pruning_wins(dots: list[tuple[float, float]]) -> str:
    """On how many tensors pruning loses less."""
    return f"{sum(pruning > quantisation for pruning, quantisation in dots)} of {len(dots)}"


def draw_points(points: Points, corrected: bool = False) -> Any:
    """The picture; both axes have the same scale."""
    figure, axes = plots.new_figure(width=6.0, height=6.0)
    few = sum(map(len, points.values())) < 2000
    for bits, dots in points.items():
        axes.plot(
            *zip(*dots, strict=True) if dots else ((), ()),
            plots.bit_marker(bits),
            color=plots.bit_colour(bits),
            alpha=0.6 if few else 0.3,
            markersize=5 if few else 3,
            markeredgewidth=0,
            label=f"{bits} bits: {pruning_wins(dots)}",
        )
    values = [value for dots in points.values() for dot in dots for value in dot]
    limits = min(0.0, 1.04 * min(values)), 1.04 * max(0.0, max(values)) or 1.0
    axes.plot(limits, limits, color=plots.NEUTRAL_COLOUR, linewidth=0.8)
    axes.set(xlim=limits, ylim=limits, aspect="equal")
    axes.set_xlabel("SQNR of pruning" + (", zeros matched" if corrected else "") + " (dB)")
    axes.set_ylabel("SQNR of quantisation (dB)")
    title = "tensors on which\npruning is better"
    plots.draw_legend(axes, title, loc="lower right", markerscale=1.2)
    return figure


def run(args: argparse.Namespace) -> None:
    points, infinite = read_points(args.folder, args.corrected)
    if infinite:
        log.info("%d tensors without a finite SQNR are not drawn", infinite)
    name = "weights_sqnr_corrected" if args.corrected else "weights_sqnr"
    plots.save_figure(draw_points(points, args.corrected), (args.out or args.folder) / name)
    for bits, dots in points.items():
        cli.print_result(f"{bits} bits: pruning better in {pruning_wins(dots)} tensors")


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="plot_weights_sqnr", description=__doc__.splitlines()[0])
    add, default = parser.add_argument, study_files.PLOTS_DATA / "weights_sqnr"
    text = "where the JSON files are"
    add("folder", metavar="FOLDER", nargs="?", type=Path, default=default, help=text)
    text = "plot pruning with the zeros of the quantised tensor matched as well"
    add("--corrected", action="store_true", help=text)
    text = "folder of weights_sqnr.png and .pdf (default: FOLDER)"
    add("--out", metavar="DIR", type=Path, help=text)
    return parser


def main(argv: list[str] | None = None) -> int:
    return cli.command(build_parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
