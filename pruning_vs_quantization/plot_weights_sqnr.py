"""The SQNR of pruning against that of quantising, a dot per weight tensor (section 3's pictures).

    python -m pruning_vs_quantization.plot_weights_sqnr [FOLDER] [--corrected]

Reads every <model>_<b>_bits_mse.json in FOLDER (`quant_pruning_weights_sqnr.py`, or any other with
the same fields) and draws

    weights_sqnr       pruning on y against quantisation on x, a colour per bit width
    weights_kurtosis   both against the kurtosis of the tensor, a panel per bit width

Tensors without a finite SQNR are counted, not drawn.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file in this folder, as the published README does
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import pruning_vs_quantization  # noqa: F401

import argparse
import math
import re
from dataclasses import dataclass
from typing import Any

from obc.solver.errors import UserError, log
from obc.toolkit import cli
from pruning_vs_quantization import plots, study_files
from pruning_vs_quantization.expected_error import size_text

FILE_NAME = re.compile(r"(?P<model>.+)_(?P<bits>\d+)_bits_mse\.json")
GAUSSIAN_KURTOSIS = 3
MOST_PANELS = 4  # side by side
MANY_DOTS = 1000  # are drawn smaller and fainter
DOT_LOOK = {"linestyle": "none", "markersize": 7, "markeredgecolor": "white", "alpha": 0.8}
MANY_DOTS_LOOK = {"linestyle": "none", "markersize": 4, "markeredgewidth": 0, "alpha": 0.4}
SIDES = {"quantised": plots.QUANTISATION, "pruned": plots.PRUNING}


@dataclass(frozen=True)
class TensorResult:
    """A weight tensor at one bit width, with finite figures in dB."""

    model: str
    bits: int
    layer: str
    kurtosis: float | None  # excess
    quantised: float
    pruned: float

    @property
    def gap(self) -> float:
        return self.quantised - self.pruned


def read_tensors(folder: Path, corrected: bool = False) -> tuple[list[TensorResult], int]:
    """All tensors with finite SQNRs in a folder, from many bits to few; how many others there are.

    Raises UserError for a file that is not a result.
    """
    pruning = "pruning_sqnr" + "_corrected" * corrected
    tensors, infinite = [], 0
    for path in sorted(folder.iterdir()):
        if (match := FILE_NAME.fullmatch(path.name)) is None:
            continue
        for layer, figures in study_files.read_json(path).items():
            pruned, quantised, kurtosis = (
                study_files.finite_figure(path, layer, figures, name, name != "sample_kurtosis")
                for name in (pruning, "quant_sqnr", "sample_kurtosis")
            )
            if quantised is None or pruned is None:
                infinite += 1
            else:
                place = match["model"], int(match["bits"]), layer
                tensors.append(TensorResult(*place, kurtosis, quantised, pruned))
    return sorted(tensors, key=lambda tensor: -tensor.bits), infinite


def tensors_by_bits(tensors: list[TensorResult]) -> dict[int, list[TensorResult]]:
    """The tensors of each bit width, in their order."""
    widths = dict.fromkeys(tensor.bits for tensor in tensors)
    return {bits: [tensor for tensor in tensors if tensor.bits == bits] for bits in widths}


def networks_text(tensors: list[TensorResult]) -> str:
    """The network, or how many there are."""
    models = {tensor.model for tensor in tensors}
    return next(iter(models)) if len(models) == 1 else f"{len(models)} models"


def draw_tensors(tensors: list[TensorResult], title: str, corrected: bool = False) -> Any:
    """Pruning against quantisation; both axes have the same scale."""
    figure, axes = plots.new_figure(width=6.0, height=6.2)
    look = MANY_DOTS_LOOK if len(tensors) >= MANY_DOTS else DOT_LOOK
    for bits, of_bits in tensors_by_bits(tensors).items():
        quantised, pruned = ([getattr(x, side) for x in of_bits] for side in SIDES)
        label = f"{size_text(bits)}: {sum(x.gap < 0 for x in of_bits)} of {len(of_bits)}"
        axes.plot(quantised, pruned, label=label, **plots.bit_look(bits), **look)
    values = [getattr(tensor, side) for tensor in tensors for side in SIDES]
    limits = min(0.0, 1.04 * min(values)), 1.04 * max(0.0, max(values)) or 1.0
    axes.plot(limits, limits, color=plots.NEUTRAL_COLOUR, linewidth=0.8)
    axes.set(xlim=limits, ylim=limits, aspect="equal", title=title)
    axes.set_xlabel("SQNR of quantisation (dB)")
    axes.set_ylabel("SQNR of pruning" + ", zeros matched" * corrected + " (dB)")
    title = "tensors on which\npruning is better"
    plots.draw_legend(axes, title, loc="upper left", alignment="left")
    return figure


def draw_tensor_kurtosis(tensors: list[TensorResult], title: str) -> Any:
    """Both SQNRs of each tensor whose kurtosis is known against it, a panel per bit width."""
    by_bits = tensors_by_bits([tensor for tensor in tensors if tensor.kurtosis is not None])
    columns = min(MOST_PANELS, len(by_bits))
    rows = math.ceil(len(by_bits) / columns)
    size = {"width": max(4.5, 2.9 * columns), "height": 0.6 + 2.7 * rows}
    figure, panels = plots.new_figure(rows, columns, **size, sharex=True, squeeze=False)
    look = MANY_DOTS_LOOK if len(tensors) >= MANY_DOTS else DOT_LOOK
    for axes, (bits, of_bits) in zip(panels.flat, by_bits.items(), strict=False):
        kurtoses = [tensor.kurtosis + GAUSSIAN_KURTOSIS for tensor in of_bits]
        for side, of_side in SIDES.items():
            axes.plot(kurtoses, [getattr(tensor, side) for tensor in of_bits], **of_side, **look)
        axes.set_xscale("log")
        plots.plain_log_ticks(axes.xaxis)
        axes.set_title(size_text(bits), fontsize=10)
    for axes in panels.flat[len(by_bits) :]:
        axes.set_visible(False)
    figure.supxlabel("kurtosis of the weights (3 for a Gaussian)", fontsize=10)
    figure.supylabel("SQNR (dB)", fontsize=10)
    figure.suptitle(title)
    plots.draw_legend(panels[0, 0])
    return figure


def run(args: argparse.Namespace) -> None:
    if not args.folder.is_dir():
        raise UserError(f"{args.folder}: no such folder; run quant_pruning_weights_sqnr first")
    tensors, infinite = read_tensors(args.folder, args.corrected)
    if not tensors:
        if infinite:
            raise UserError(f"{args.folder}: none of its {infinite} tensors has a finite SQNR")
        raise UserError(f"{args.folder}: no <model>_<b>_bits_mse.json with figures in it")
    if infinite:
        log.info("%d tensors without a finite SQNR are not drawn", infinite)
    out, title = args.out or args.folder, networks_text(tensors)
    end = "_corrected" * args.corrected
    plots.save_figure(draw_tensors(tensors, title, args.corrected), out / f"weights_sqnr{end}")
    if any(tensor.kurtosis is not None for tensor in tensors):
        plots.save_figure(draw_tensor_kurtosis(tensors, title), out / f"weights_kurtosis{end}")
    for bits, of_bits in tensors_by_bits(tensors).items():
        wins = f"{sum(tensor.gap < 0 for tensor in of_bits)} of {len(of_bits)}"
        cli.print_result(f"{bits} bits: pruning better in {wins} tensors")


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="plot_weights_sqnr",
        description=__doc__.splitlines()[0],
        example="python -m pruning_vs_quantization.plot_weights_sqnr plots_data/weights_sqnr",
    )
    add, default = parser.add_argument, study_files.PLOTS_DATA / "weights_sqnr"
    text = "where the JSON files are"
    add("folder", metavar="FOLDER", nargs="?", type=Path, default=default, help=text)
    text = "plot pruning with the zeros of the quantised tensor matched as well"
    add("--corrected", action="store_true", help=text)
    text = "folder of the pictures, .png and .pdf (default: FOLDER)"
    add("--out", metavar="DIR", type=Path, help=text)
    return parser


def main(argv: list[str] | None = None) -> int:
    return cli.command(build_parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
