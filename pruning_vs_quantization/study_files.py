"""Options and result files that all parts of the study share.

A finished piece of work (a layer, a model, a training run) is one JSON file, complete or absent, so
that a run that was killed goes on where it stopped:

    {"settings": what was asked for, "figures": the results, "environment": on what machine}

Settings are the result's fingerprint (`obc/toolkit/fingerprints.py`): everything that the figures
depend on and nothing else (no output folder, no number of threads). A file with other settings is
never used, and never overwritten unless asked for. NaN and infinity, which JSON lacks, are null;
files by other programs may have them as NaN, Infinity and -Infinity (`finite_figure`).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from obc.solver.errors import UserError, log
from obc.toolkit import cli, records
from obc.toolkit.fingerprints import difference

PLOTS_DATA = Path("plots_data")  # contains a folder for each part
LOWEST_BITS, HIGHEST_BITS = 2, 8  # that are compared with pruning: 1/8 to 1/2 of 16 bits
bit_width = cli.number(int, lambda b: LOWEST_BITS <= b <= HIGHEST_BITS, "from 2 to 8")


def add_study_options(
    parser: argparse.ArgumentParser,
    part: str,
    device: bool = True,  # whether it computes with tensors
) -> None:
    """Add the options of every part: --out (plots_data/<part>), --seed, --device, --restart."""
    add = parser.add_argument_group("options of every part of the study").add_argument
    text = "folder for results and pictures, created if missing "
    text += f"(default: a folder of the part in {PLOTS_DATA})"
    add("--out", metavar="DIR", type=Path, default=PLOTS_DATA / part, help=text)
    add("--seed", metavar="N", type=cli.seed, default=0, help="seed of every random choice")
    if device:
        add("--device", metavar="auto|cpu|cuda[:N]", default="auto", help="where to compute")
    text = "repeat what has been done before, and replace its results"
    add("--restart", action="store_true", help=text)


def add_grid_options(parser: argparse._ActionsContainer) -> None:
    """Add the options that say which grids are compared: --bits, --balanced."""
    every = list(range(HIGHEST_BITS, LOWEST_BITS - 1, -1))
    text = "bit widths; pruning keeps a fraction of bits/16"
    add = parser.add_argument
    add("--bits", metavar="B", type=bit_width, nargs="+", default=every, help=text)
    text = "grids of 2^b - 1 levels, as many below 0 as above (default: all 2^b, one more below)"
    add("--balanced", action="store_true", help=text)


def finished(
    path: Path,
    settings: Mapping[str, Any],
    restart: bool = False,  # then nothing counts as finished
) -> dict[str, Any] | None:
    """The figures of an earlier run with the same settings, or None if there was none.

    Raises UserError for an incomplete file, and for one with other settings, naming the first
    difference.
    """
    if restart or not path.exists():
        return None
    earlier, figures = read_result(path)
    check_same_settings(path, earlier, settings)
    log.info("%s: done already", path)
    return figures


def write_result(path: Path, settings: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
    """Write a finished result. Anything in `figures` may be a tensor or an array."""
    content = {"settings": settings, "figures": figures, "environment": records.environment()}
    records.write_record(path, content)


def read_result(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and figures in a result file. Raises UserError for any other file."""
    content = read_json(path)
    settings, figures = content.get("settings"), content.get("figures")
    if not (isinstance(settings, dict) and isinstance(figures, dict)):
        raise UserError(f"{path}: not a result of this study; move it away, or pass --restart")
    return settings, figures


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError that names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):  # not JSON, or not even text
        raise UserError(f"{path}: not a complete JSON file; delete it, or pass --restart") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; delete it, or pass --restart")
    return content


def finite_figure(
    path: Path, layer: str, figures: Any, name: str, required: bool = True
) -> float | None:
    """A figure of a layer; None if it is null, NaN or infinite. Raises UserError for anything else.

    A figure that is not required may be absent.
    """
    if not isinstance(figures, dict) or (required and name not in figures):
        raise UserError(f"{path}: {layer} has no {name}")
    value = figures.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise UserError(f"{path}: {name} of {layer} is not a number")
    try:
        return float(value) if value is not None and math.isfinite(value) else None
    except OverflowError:  # a whole number that no float holds
        return None


def check_same_settings(
    path: Path | str,  # the earlier run, for the error message
    earlier: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> None:
    """Raise a UserError that names the first setting in which two runs differ."""
    sides = ({k: json.dumps(x, default=str) for k, x in s.items()} for s in (earlier, settings))
    if differing := difference(*sides):
        raise UserError(f"{path}: {differing}; pass --restart to replace it, or another --out")


# -- tables ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextTable:
    """A table of formatted cells."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: str = ""  # a heading under which the study's page hides it until it is opened

    def markdown(self) -> str:
        return "\n".join([markdown_head(self.head), *map(markdown_row, self.rows)])


def markdown_head(head: Sequence[str]) -> str:
    """The first two lines of a Markdown table."""
    return f"{markdown_row(head)}\n{'|---' * len(head)}|"


def markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def signed(value: float | None, unit: str = "", digits: int = 2) -> str:
    """`+4.13 dB` with a true minus sign, and never −0; a dash for None."""
    if value is None:
        return "–"
    text = f"{round(value, digits) + 0.0:+.{digits}f} {unit}".strip()
    return text.replace("-", "−").replace("inf", "∞")
