"""The text files between the commands: profiles and scores (docs/design.md, "Files").

    profile   <model>_<database>_<100·target>x_dp.txt     a line `<level> <layer>` per layer
    scores    scores/<model>_<database>_<mode>.txt        a layer's name on a line, then a line
                                                          `<value> <level>` per level

Lines that start with # are comments. Those that start with #: are marks, `#: <name> <value>`, by
which the commands note what a file was made for (`origins.py`); files without them are welcome. All
other lines are read strictly: errors name the line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from obc.inputs.files import atomic_write
from obc.solver.errors import UserError

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
MARK = re.compile(r"#:\s*(\S.*?)\s+(\S+)\s*")


class Table(dict[str, Any]):
    """What a text file says about layers, with the file's name, its marks and the layers' lines."""

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path, self.marks = path, dict[str, str]()
        self.lines: dict[str, int] = {}  # layer → number, from 1

    def place(self, layer: str) -> str:
        """The file and the line of a layer, for error messages."""
        return f"{self.path}, line {self.lines[layer]}"


def score_file(folder: str | Path, model: str, kind: str, mode: str) -> Path:
    """The file of a database's scores: scores/<model>_<database>_<mode>.txt."""
    return Path(folder) / f"{model}_{kind}_{mode}.txt"


def read_lines(table: Table) -> list[tuple[int, list[str]]]:
    """The lines of a table's file that are not empty, with their numbers, split into words.

    Comments are left out; marks among them go to the table.
    """
    path, lines = table.path, []
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"{path}: cannot be read ({reason})") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.isprintable() and not line.replace("\t", "").isprintable():
            raise UserError(f"{path}, line {number}: contains a control character")
        if line.lstrip().startswith("#"):
            if mark := MARK.fullmatch(line.strip()):
                table.marks[mark[1]] = mark[2]
        elif line.strip():
            lines.append((number, line.split()))
    return lines


def as_number(text: str) -> float | None:
    """A number as we write it; None for other forms that Python accepts, such as 1_0 or ١.

    >>> as_number("-2.5e-3"), as_number("nan"), as_number("1_0"), as_number("1e999")
    (-0.0025, nan, None, None)
    """
    if text in ("nan", "inf", "-inf"):
        return float(text)
    value = float(text) if NUMBER.fullmatch(text) else math.inf
    return value if math.isfinite(value) else None


def read_profile(path: str | Path) -> Table:
    """Layer → level, from lines `<level> <layer>`. Raises UserError that names the line."""
    profile = Table(path)
    for number, words in read_lines(profile):
        if len(words) != 2:
            raise UserError(f"{path}, line {number}: expected `<level> <layer>`")
        level, layer = words
        if layer in profile:
            raise UserError(f"{path}, line {number}: {layer} appears twice")
        profile[layer], profile.lines[layer] = level, number
    if not profile:
        raise UserError(f"{path}: contains no layers")
    return profile


def write_profile(
    path: str | Path, profile: Mapping[str, str], marks: Mapping[str, str] | None = None
) -> None:
    """The inverse of `read_profile`."""
    write_lines(path, [f"{level} {layer}" for layer, level in profile.items()], marks)


def read_scores(path: str | Path, positive: bool = False) -> Table:
    """Layer → level → value, from a layer's name on a line and `<value> <level>` lines below it.

    Scores may be infinite or NaN; with `positive`, for seconds, they must be finite and not
    negative.
    """
    scores, layer = Table(path), None
    for number, words in read_lines(scores):
        if len(words) == 1:
            layer = words[0]
            if layer in scores:
                raise UserError(f"{path}, line {number}: {layer} appears twice")
            scores[layer], scores.lines[layer] = {}, number
            continue
        value = as_number(words[0])
        if len(words) != 2 or value is None or layer is None:
            raise UserError(f"{path}, line {number}: expected a layer, or `<value> <level>`")
        if positive and not 0 <= value < math.inf:
            raise UserError(f"{path}, line {number}: must be 0 or more, and finite; got {words[0]}")
        if words[1] in scores[layer]:
            raise UserError(f"{path}, line {number}: level {words[1]} appears twice")
        scores[layer][words[1]] = value
    if not scores:
        raise UserError(f"{path}: contains no scores")
    return scores


def write_scores(
    path: str | Path,
    scores: Mapping[str, Mapping[str, float]],
    marks: Mapping[str, str] | None = None,
) -> None:
    """The inverse of `read_scores`; values keep all their digits."""
    lines = []
    for layer, values in scores.items():
        lines += [layer, *(f"{value!r} {level}" for level, value in values.items())]
    write_lines(path, lines, marks)


def write_lines(path: str | Path, lines: list[str], marks: Mapping[str, str] | None) -> None:
    """A text file of marks, if any, and lines."""
    marked = [f"#: {name} {value}" for name, value in (marks or {}).items()]
    with atomic_write(path) as file:
        file.write("".join(f"{line}\n" for line in [*marked, *lines]).encode())
