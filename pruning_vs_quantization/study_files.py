"""Result files of the study, so that a run that was killed goes on where it stopped.

A finished piece of work (a layer, a model, a training run) is one JSON file, whole or not there:

    {"settings": what was asked for, "figures": what came out, "environment": on what machine}

    figures = finished(path, settings, args.restart)       None: not done yet
    if figures is None:
        figures = …
        write_result(path, settings, figures)

Settings are everything that the figures depend on and nothing else (no output folder, no number of
threads): a file with other settings is never used and never overwritten in silence. NaN and
infinity, which JSON lacks, are null.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from obc.solver.errors import UserError, log
from obc.toolkit import cli, records

PLOTS_DATA = Path("plots_data")  # below it a folder for each part
LOWEST_BITS, HIGHEST_BITS = 2, 8  # that are compared with pruning: half to an eighth of 16 bits


def add_study_options(
    parser: argparse.ArgumentParser,
    part: str,
    device: bool = True,  # whether it computes with tensors
) -> None:
    """Add the options of every part: --out (plots_data/<part>), --seed, --device, --restart."""
    group = parser.add_argument_group("options of every part of the study")
    add = group.add_argument
    add(
        "--out",
        metavar="DIR",
        type=Path,
        default=PLOTS_DATA / part,
        help="folder for results and pictures, made if it is missing",
    )
    add("--seed", metavar="N", type=cli.seed, default=0, help="seed of every random choice")
    if device:
        add("--device", metavar="auto|cpu|cuda[:N]", default="auto", help="where to compute")
    add("--restart", action="store_true", help="do again, and replace, what has been done before")


def add_grid_options(parser: argparse.ArgumentParser) -> None:
    """Add what says which grids are compared: --bits, --balanced."""
    parser.add_argument(
        "--bits",
        metavar="B",
        type=_bit_width,
        nargs="+",
        default=list(range(HIGHEST_BITS, LOWEST_BITS - 1, -1)),
        help="bit widths; pruning leaves a share of bits/16",
    )
    parser.add_argument(
        "--balanced",
        action="store_true",
        help="grids of 2^b - 1 levels, as many below 0 as above (default: all 2^b, one more below)",
    )


def _bit_width(text: str) -> int:
    value = cli.positive_int(text)
    if not LOWEST_BITS <= value <= HIGHEST_BITS:
        raise argparse.ArgumentTypeError(
            f"must be from {LOWEST_BITS} to {HIGHEST_BITS}; got {text}"
        )
    return value


def finished(
    path: Path,
    settings: Mapping[str, Any],
    restart: bool = False,  # then nothing counts as finished
) -> dict[str, Any] | None:
    """The figures of an earlier run with the same settings, or None where there was none.

    Raises UserError for a file that is not whole, and for one with other settings, naming the
    first that differs.
    """
    if restart or not path.exists():
        return None
    earlier, figures = read_result(path)
    check_same_settings(path, earlier, settings)
    log.info("%s: done already", path)
    return figures


def write_result(path: Path, settings: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
    """Write a finished result. Anything in `figures` may be a tensor or an array."""
    content = {"settings": _as_json(settings), "figures": figures}
    records.write_record(path, content | {"environment": records.environment()})


def read_result(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and figures in a result file. Raises UserError unless it is one."""
    content = read_json(path)
    parts = [content.get(part) for part in ("settings", "figures")]
    if not all(isinstance(part, dict) for part in parts):
        raise UserError(f"{path}: not a result of this study; move it away, or pass --restart")
    return parts[0], parts[1]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError that names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:  # not JSON, or not even text
        raise UserError(f"{path}: not a whole JSON file; delete it, or pass --restart") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; delete it, or pass --restart")
    return content


def check_same_settings(
    path: Path | str,  # the earlier run, for the error message
    earlier: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> None:
    """Raise a UserError that names the first setting in which two runs differ."""
    settings = _as_json(settings)
    for name in [*settings, *earlier]:
        before, now = earlier.get(name), settings.get(name)
        if before != now:
            raise UserError(
                f"{path}: made with {name} = {json.dumps(before)}, now {json.dumps(now)}; "
                "pass --restart to replace it, or another --out"
            )


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` as they come back from a file: tuples as lists, paths and devices as text."""
    return json.loads(json.dumps(settings, default=str))
