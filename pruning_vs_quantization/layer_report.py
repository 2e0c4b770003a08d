"""The table of layer outputs, and their picture: what quantising reaches against what pruning does.

The picture is Fig. 4 of Kuzmin et al. (arXiv 2307.02973) with both sides proven: for each layer an
interval from the SQNR of the best solutions found to the limit that no solution can pass, for
quantising and for pruning at the same size, a panel per bit width. Where everything is proven
optimal the two ends are one. The toolkit's own answers are the small circles. It shows whatever has
been run, of both studies, in a folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from obc.solver.errors import UserError, log
from pruning_vs_quantization.expected_error import sparsity_percent
from pruning_vs_quantization.plots import (
    PRUNING_COLOUR,
    QUANTISATION_COLOUR,
    new_figure,
    save_figure,
)
from pruning_vs_quantization.study_files import read_result

HEURISTICS = {  # by kind: name in the files → heading
    "quantisation": {
        "nearest": "nearest",
        "gptq": "GPTQ",
        "gptq_act_order": "GPTQ, act order",
        "obq": "OBQ",
    },
    "pruning": {
        "magnitude": "magnitude",
        "magnitude_least_squares": "magnitude + LS",
        "exact_obs": "ExactOBS",
    },
}
COLOURS = {"quantisation": QUANTISATION_COLOUR, "pruning": PRUNING_COLOUR}
INCHES_A_LAYER, INCHES_A_PANEL = 0.28, 2.3


# -- the table -------------------------------------------------------------------------------------


def header(kind: str) -> str:
    """The head of the Markdown table; SQNRs and gaps in dB."""
    *others, own = HEURISTICS[kind].values()
    names = [
        "layer",
        "bits",
        "proven optimal",
        *others,
        own,
        "best found",
        "limit",
        f"{own} below optimum: mean",
        "worst",
    ]
    return "| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|"


def table_row(figures: Mapping[str, Any]) -> str:
    """A layer at a bit width."""
    summary, kind = figures["summary"], figures["kind"]
    start = f"| {figures['layer']} | {figures['bits']} |"
    if summary is None:
        return f"{start} no output" + " |" * (len(HEURISTICS[kind]) + 5)
    unproven = "≥ " if summary["proven"] < summary["subproblems"] else ""
    values = [
        *(summary["sqnr"][name] for name in HEURISTICS[kind]),
        summary["sqnr_best"],
        summary["sqnr_limit"],
    ]
    gaps = [summary["own_gap_mean"], summary["own_gap_worst"]]
    texts = [*map(_decibels, values), *(unproven + _decibels(gap) for gap in gaps)]
    return f"{start} {summary['proven']} of {summary['subproblems']} | {' | '.join(texts)} |"


def _decibels(value: float | None) -> str:  # JSON has no infinity: null
    return "∞" if value is None or value == float("inf") else f"{value:.2f}"


# -- the picture -----------------------------------------------------------------------------------


def draw(
    folder: Path,
    stem: str,  # of the result files and of the picture
    model: str,
    layers: list[str],  # of the model, in their order
) -> None:
    """Draw <stem>_layer_outputs.png and .pdf of all results in a folder."""
    results = _results(folder, stem, model)
    widths = sorted({bits for bits, _, _ in results}, reverse=True)
    if not results:
        return
    shown = [name for name in layers if any(name == layer for _, layer, _ in results)]
    width = max(6.0, 1.5 + INCHES_A_LAYER * len(shown))
    height = 1.5 + INCHES_A_PANEL * len(widths)
    try:
        figure, panels = new_figure(len(widths), 1, width, height, sharex=True, squeeze=False)
    except UserError as error:  # matplotlib is missing; the results are there
        log.warning("no picture: %s", error)
        return
    for axes, bits in zip(panels[:, 0], widths, strict=True):
        for kind in HEURISTICS:
            _draw_intervals(
                axes,
                kind,
                {
                    shown.index(layer): summary
                    for (b, layer, k), summary in results.items()
                    if (b, k) == (bits, kind) and layer in shown
                },
            )
        axes.set_ylabel("SQNR (dB)", fontsize=9)
        axes.set_title(f"{bits} bits, {sparsity_percent(bits)} sparsity", fontsize=10)
    panels[-1, 0].set_xticks(range(len(shown)), shown, rotation=90, fontsize=8)
    panels[-1, 0].set_xlim(-0.7, len(shown) - 0.3)  # one layer alone stays in the middle
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=9, frameon=False)
    save_figure(figure, folder / f"{stem}_layer_outputs")


def _results(folder: Path, stem: str, model: str) -> dict[tuple[int, str, str], dict[str, Any]]:
    """Summaries by bits, layer and kind."""
    results = {}
    for path in sorted(folder.glob(f"{stem}_*_bits_*.json")):
        settings, figures = read_result(path)
        if settings.get("model") == model and figures.get("summary"):
            results[figures["bits"], figures["layer"], figures["kind"]] = figures["summary"]
    return results


def _draw_intervals(axes: Any, kind: str, summaries: Mapping[int, Mapping[str, Any]]) -> None:
    """Intervals of one study, a little to the left or right of each layer's place."""
    shift = -0.12 if kind == "quantisation" else 0.12
    colour, marker = COLOURS[kind], "s" if kind == "quantisation" else "D"
    for number, (place, summary) in enumerate(sorted(summaries.items())):
        best, limit = summary["sqnr_best"], summary["sqnr_limit"]
        own = summary["sqnr"][summary["own"]]
        if best is None:  # no error at all
            continue
        label = number == 0
        axes.plot(
            place + shift,
            best,
            marker,
            color=colour,
            markersize=4.5,
            label=f"{kind}: best to proven limit" if label else None,
        )
        if limit is not None:
            axes.vlines(place + shift, best, limit, color=colour, linewidth=2)
        if own is not None:
            axes.plot(
                place + shift,
                own,
                "o",
                color=colour,
                markersize=4,
                fillstyle="none",
                label=HEURISTICS[kind][summary["own"]] if label else None,
            )
