"""Pictures of the study in one restrained style, saved as PNG and PDF, whole or not at all.

Bit widths are an ordered quantity, so their colours are steps of an ordered map (viridis), which
colour-blind readers and grey printers can tell apart; markers distinguish them as well. Figures are
made without pyplot: no window, no global state.
"""

from __future__ import annotations

import importlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obc.inputs import files
from obc.solver.errors import UserError, log
from pruning_vs_quantization.study_files import HIGHEST_BITS, LOWEST_BITS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

QUANTISATION_COLOUR, PRUNING_COLOUR = "#0072b2", "#d55e00"  # blue, vermilion: Okabe and Ito (2008)
QUANTISATION = {"color": QUANTISATION_COLOUR, "marker": "o", "label": "quantisation"}
PRUNING = {"color": PRUNING_COLOUR, "marker": "s", "label": "pruning"}
NEUTRAL_COLOUR = "#5a5a5a"  # diagonals, baselines
MARKERS = "ov^sDPX*"
DPI = 150


def study_package(name: str) -> Any:
    """A package that only the study needs, or a module of it; a UserError if it is missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        package = name.partition(".")[0]
        raise UserError(f"this needs {package}: pip install -r requirements-study.txt") from None


def new_figure(
    rows: int = 1,
    columns: int = 1,
    width: float = 6.0,  # inches
    height: float = 4.2,  # inches
    **options: Any,  # of Figure.subplots
) -> tuple[Figure, Any]:  # the figure; its Axes, or an array of them
    """A figure in the study's style."""
    figure = study_package("matplotlib.figure").Figure((width, height), layout="constrained")
    axes = figure.subplots(rows, columns, **options)
    for each in figure.axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.25, linewidth=0.6)
        each.set_axisbelow(True)
        each.tick_params(labelsize=9)
    return figure, axes


def bit_look(bits: int) -> dict[str, Any]:
    """Colour and marker of a bit width: dark for few bits, light for many."""
    share = (bits - LOWEST_BITS) / (HIGHEST_BITS - LOWEST_BITS)
    colours = study_package("matplotlib").colormaps["viridis"]
    marker = MARKERS[(bits - LOWEST_BITS) % len(MARKERS)]
    return {"color": colours(0.8 * min(max(share, 0.0), 1.0)), "marker": marker}


def plain_log_ticks(axis: Axis) -> None:
    """Ticks of a logarithmic axis as plain numbers, evenly spaced ones if it is short."""
    low, high = axis.get_view_interval()
    ticker = study_package("matplotlib.ticker")
    subs = (1, 2, 5) if high < 50 * low else (1,)
    long = high > 10 * low
    axis.set_major_locator(ticker.LogLocator(subs=subs) if long else ticker.MaxNLocator(5))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(ticker.NullLocator())


def draw_legend(axes: Axes, title: str | None = None, **options: Any) -> None:
    """A legend without a frame, in the study's sizes."""
    axes.legend(title=title, fontsize=9, title_fontsize=9, frameon=False, **options)


def save_figure(figure: Figure, stem: Path) -> None:
    """Write <stem>.png and <stem>.pdf."""
    for kind, metadata in (("png", None), ("pdf", {"CreationDate": None})):
        with files.atomic_write(stem.with_name(f"{stem.name}.{kind}")) as file:
            figure.savefig(file, format=kind, dpi=DPI, metadata=metadata)
    log.info("picture: %s.png and .pdf", stem)


def png_bytes(figure: Figure) -> bytes:
    """The picture as a PNG, for a page that embeds it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
