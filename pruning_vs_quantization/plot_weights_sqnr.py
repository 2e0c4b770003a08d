"""The SQNR of quantising against that of pruning, a dot per weight tensor (section 3's picture).

    python -m pruning_vs_quantization.plot_weights_sqnr [FOLDER] [--corrected]

Reads every <model>_<b>_bits_mse.json in FOLDER (`quant_pruning_weights_sqnr.py`, or any other with
the same fields) and draws a colour per bit width with the diagonal on which both lose the same:
above it quantisation wins. Dots without a finite value are counted, not drawn.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from obc.solver.errors import UserError, log
from obc.toolkit import cli
from pruning_vs_quantization import plots, study_files

FILE_NAME = re.compile(r"(?P<model>.+)_(?P<bits>\d+)_bits_mse\.json")
Points = dict[int, list[tuple[float, float]]]  # bits → (pruning, quantisation) in dB


def read_points(folder: Path, corrected: bool = False) -> tuple[Points, int]:
    """The dots of all models in a folder, by falling bit width, and how many have no finite value.

    Raises UserError for a folder without results, and for a file that is none.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; run quant_pruning_weights_sqnr first")
    pruning = "pruning_sqnr_corrected" if corrected else "pruning_sqnr"
    points: Points = {}
    infinite = 0
    for path in sorted(folder.iterdir()):
        named = FILE_NAME.fullmatch(path.name)
        if named is None:
            continue
        of_width = points.setdefault(int(named["bits"]), [])
        for layer, figures in study_files.read_json(path).items():
            try:
                x, y = figures[pruning], figures["quant_sqnr"]
            except (KeyError, TypeError):
                raise UserError(f"{path}: {layer} has no {pruning} and quant_sqnr") from None
            if isinstance(x, int | float) and isinstance(y, int | float):
                of_width.append((float(x), float(y)))
            else:
                infinite += 1
    if not any(points.values()):
        raise UserError(f"{folder}: no <model>_<b>_bits_mse.json with figures in it")
    return dict(sorted(points.items(), reverse=True)), infinite


def pruning_wins(of_width: list[tuple[float, float]]) -> int:
    """How many tensors pruning loses less on."""
    return sum(pruning > quantisation for pruning, quantisation in of_width)


def draw(points: Points, corrected: bool = False) -> Any:
    """The picture; both axes have the same scale."""
    figure, axes = plots.new_figure(width=6.0, height=6.0)
    count = sum(map(len, points.values()))
    for bits, of_width in points.items():
        label = f"{bits} bits: {pruning_wins(of_width)} of {len(of_width)}"
        axes.plot(
            [x for x, _ in of_width],
            [y for _, y in of_width],
            plots.bit_marker(bits),
            color=plots.bit_colour(bits),
            alpha=0.6 if count < 2000 else 0.3,
            markersize=5 if count < 2000 else 3,
            markeredgewidth=0,
            label=label,
        )
    highest = 1.04 * max(max(point) for of_width in points.values() for point in of_width)
    axes.plot([0, highest], [0, highest], color=plots.NEUTRAL_COLOUR, linewidth=0.8)
    axes.set(
        xlim=(0, highest),
        ylim=(0, highest),
        aspect="equal",
        xlabel="SQNR of pruning" + (", zeros matched" if corrected else "") + " (dB)",
        ylabel="SQNR of quantisation (dB)",
    )
    plots.draw_legend(
        axes, "tensors on which\npruning is better", loc="lower right", markerscale=1.2
    )
    return figure


def run(args: argparse.Namespace) -> None:
    points, infinite = read_points(args.folder, args.corrected)
    if infinite:
        log.info("%d tensors without a finite SQNR are not drawn", infinite)
    name = "weights_sqnr_corrected" if args.corrected else "weights_sqnr"
    plots.save_figure(draw(points, args.corrected), (args.out or args.folder) / name)
    for bits, of_width in points.items():
        cli.print_result(
            f"{bits} bits: pruning better in {pruning_wins(of_width)} of {len(of_width)} tensors"
        )


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="plot_weights_sqnr", description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        nargs="?",
        type=Path,
        default=study_files.PLOTS_DATA / "weights_sqnr",
        help="where the JSON files are",
    )
    parser.add_argument(
        "--corrected",
        action="store_true",
        help="pruning with the zeros of the quantised tensor matched too",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="folder of weights_sqnr.png and .pdf (default: FOLDER)",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    return cli.command(build_parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
