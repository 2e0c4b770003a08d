"""The record of a run: a JSON file next to its output, with what it takes to compare or repeat it.

JSON is strict: NaN and infinity, which it lacks, become null. Every record is an object of

    key          value
    command      the script, as in "spdy.py"
    arguments    object: every word and option of the command, with defaults filled in
    fingerprint  object of strings, or null: what the result depends on (fingerprints.py): options;
                 hashes of weights, images and code; versions, device, threads, environment
    environment  object: argv, python, platform, processor, cores, torch_threads, gpus, git and
                 versions of packages
    layers       list of objects (main_trueobs.py, spdy.py; post_proc.py: those solved anew): one
                 for each layer, with its name
    corrections  list of objects (post_proc.py): name, seconds, losses per epoch
    seconds      number: how long the run took; if it was resumed, since then
    top1         number in percent, or null (main_trueobs.py, post_proc.py)
    kl           number: mean KL(dense ‖ compressed) over the test images, in nats
    agreement    number: percent of the test images that both models give the same class
    figures      object of numbers: what a task of the user's own measures, in the place of top1
    dense_loss_calibration  number: the dense model's loss, on the calibration data of such a task
    preprocessing  object: how images became the network's input (obc/inputs/preprocessing.py)
    dense_top1_calibration  number in percent: the dense model's, on the calibration images

and further figures of the command. A layer of main_trueobs.py and of post_proc.py: name, shape,
result, dense, shifted, seconds, squared_error, relative_error, damping, rank_deficit, nearest_rows,
patches; with --check also checked_error, fresh_error.
A layer of spdy.py: name, level, cost, error.

`COMMAND --repeat RECORD` takes the arguments from a record; options after it replace those, such as
--save for another place, --device or --workers. The fingerprint must be the record's: different
weights, images or options are refused; different code, versions, devices, threads or environment
variables, which may change the last digits, cause a warning.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import subprocess  # nosec B404  # only git is called, see git_revision
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from obc.inputs.files import atomic_write
from obc.solver.errors import UserError, log
from obc.toolkit import cli
from obc.toolkit.fingerprints import SURROUNDINGS, difference, installed_versions

SCHEMA = {  # key: types of its value, whether every record has it
    "command": (str, True),
    "arguments": (dict, True),
    "environment": (dict, True),
    "fingerprint": ((dict, type(None)), False),
    "layers": (list, False),
    "corrections": (list, False),
    "seconds": ((int, float), False),
    "top1": ((int, float, type(None)), False),
    "kl": ((int, float, type(None)), False),
    "agreement": ((int, float), False),
    "dense_top1_calibration": ((int, float, type(None)), False),
    "dense_loss_calibration": ((int, float, type(None)), False),
    "figures": (dict, False),
}
PACKAGES = ("torch", "torchvision", "numpy", "numba", "safetensors")
NOT_REPEATED = ("help", "repeat", "restart")


def _strict_json(value: Any) -> Any:
    """`value` in JSON's own types; NaN and infinities, which JSON lacks, become null."""
    if isinstance(value, Mapping):
        return {str(key): _strict_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict_json(item) for item in value]
    if isinstance(value, (np.generic, np.ndarray, Tensor)):
        return _strict_json(value.tolist())
    if isinstance(value, (Path, torch.device, torch.dtype)):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_record(path: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """Write the record of a run (arguments, environment, figures per layer) as strict JSON."""
    text = json.dumps(_strict_json(record), indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_write(path) as file:
        file.write(text.encode() + b"\n")


def git_revision() -> dict[str, Any] | None:
    """The commit of this checkout and whether files differ from it; None if not a checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(  # nosec B603 B607  # no shell; our own words; the user's git
            command, capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def processor() -> str:
    """The name of the CPU."""
    try:
        name = re.search(
            r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        )
    except OSError:
        name = None
    return name[1] if name else platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """Versions and machine: what makes the numbers of a record comparable."""
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return {
        "argv": list(sys.argv),
        "python": platform.python_version(),
        **dict.fromkeys(PACKAGES),
        **installed_versions(PACKAGES),
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in gpus],
        "git": git_revision(),
    }


def write_run(
    path: str | os.PathLike[str],
    command: str,  # the script, as in "spdy.py"
    arguments: Mapping[str, Any],
    **figures: Any,
) -> None:
    """Write the record of a run: command, arguments, environment and its own figures."""
    common = {"command": command, "arguments": arguments, "environment": environment()}
    write_record(path, common | figures)


# -- reading, repeating ----------------------------------------------------------------------------


def flaw(record: Any) -> str | None:
    """Why a value is not a record, in words; None if it is one."""
    if not isinstance(record, dict):
        return "not an object"
    for key, (types, required) in SCHEMA.items():
        if key not in record:
            if required:
                return f"no {key}"
        elif not isinstance(record[key], types) or isinstance(record[key], bool):
            return f"{key} is not of the right type"
    marks = (record.get("fingerprint") or {}).values()
    if not all(isinstance(value, str) for value in marks):
        return "fingerprint holds more than strings"
    for key in ("layers", "corrections"):
        if not all(
            isinstance(x, dict) and isinstance(x.get("name"), str) for x in record.get(key, ())
        ):
            return f"{key} holds something without a name"
    return None


def export_record(path: str | Path) -> Path:
    """FILE.onnx.json: FILE.json is the record of the checkpoint FILE.pth."""
    return Path(f"{path}.json")


def read_record(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The record in a file; raises UserError for anything else."""
    try:
        record = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: not the record of a run (not JSON)") from None
    if wrong := flaw(record):
        raise UserError(f"{path}: not the record of a run ({wrong})")
    return record


def repeated(
    build_parser: Callable[[], argparse.ArgumentParser],
    argv: Sequence[str] | None,  # None: the process's own
) -> list[str]:
    """The words of a command; with --repeat, those of the record come first."""
    words = list(sys.argv[1:] if argv is None else argv)
    finder = cli.Parser(add_help=False)
    finder.add_argument("--repeat")
    path = finder.parse_known_args(words)[0].repeat
    if path is None:
        return words
    parser = build_parser()
    try:
        return [*recorded_words(path, parser), *words]
    except UserError as error:
        parser.error(str(error))


def recorded_words(path: str, parser: argparse.ArgumentParser) -> list[str]:
    """A record's arguments as words of the command; raises UserError if it does not take them."""
    record = read_record(path)
    if record["command"] != parser.prog:
        raise UserError(f"{path}: a record of {record['command']}; repeat it with that command")
    arguments, options, words = dict(record["arguments"]), [], []
    for action in parser._actions:
        value = arguments.pop(action.dest, None)
        if action.dest in NOT_REPEATED or value is None:
            continue
        if value is False:  # the default, unless there is an option for it
            off = isinstance(action, argparse.BooleanOptionalAction)
            options += action.option_strings[1:] if off else []
            continue
        repeatable = isinstance(action, argparse._AppendAction) and isinstance(value, list)
        values = value if repeatable else [value]
        if not all(isinstance(item, bool | int | float | str) for item in values):
            raise UserError(f"{path}: not the record of a run ({action.dest} is {value})")
        if not action.option_strings:
            words.append(str(value))
        else:
            flag = action.option_strings[0]
            options += [flag if item is True else f"{flag}={item}" for item in values]
    if arguments:
        raise UserError(f"{path}: {parser.prog} has no option {next(iter(arguments))}")
    return [*options, *words]


def check_repeat(
    path: str | None,
    fingerprint: Mapping[str, str],
    defaults: Mapping[str, str],  # of options, which records from before an option lack
) -> None:
    """Raise a UserError if the record at `path` has another fingerprint, but for rounding."""
    old = read_record(path).get("fingerprint") if path else None
    if old is None:
        if path:
            log.warning("%s: has no fingerprint; weights and images may differ", path)
        return
    old = {**defaults, **old}
    decisive = (
        {k: v for k, v in entries.items() if k not in SURROUNDINGS}
        for entries in (old, fingerprint)
    )
    if change := difference(*decisive):
        raise UserError(f"{path}: this would not repeat the run ({change})")
    if change := difference(old, fingerprint):
        log.warning("%s: the last digits may differ from the run's (%s)", path, change)
