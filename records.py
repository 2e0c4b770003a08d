"""The record of a run: JSON beside its output, with all it takes to compare or repeat it.

Arguments, seed, versions, machine, git revision, and the run's own figures. JSON is strict: NaN and
infinity, which it lacks, become null.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cli import atomic_write


def _strict_json(value: Any) -> Any:
    """`value` in JSON's own terms; NaN and infinities, which JSON lacks, become null."""
    if isinstance(value, Mapping):
        return {str(key): _strict_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict_json(item) for item in value]
    if isinstance(value, (np.generic, np.ndarray, Tensor)):
        return _strict_json(value.tolist())
    if isinstance(value, argparse.Namespace):
        return _strict_json(vars(value))
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


def _git(*words: str) -> str | None:
    here = Path(__file__).resolve().parent
    try:
        answer = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True,
                                timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _git_revision() -> dict[str, Any] | None:
    """The commit of this checkout and whether files differ from it; None if not a checkout."""
    top, revision = _git("rev-parse", "--show-toplevel"), _git("rev-parse", "HEAD")
    if not top or not revision or Path(top).resolve() != Path(__file__).resolve().parent:
        return None
    return {"commit": revision, "dirty": bool(_git("status", "--porcelain"))}


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """Versions and machine, the part of a run's record that makes its numbers comparable."""
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return {
        "argv": list(sys.argv),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": metadata.version("torchvision"),
        "numpy": np.__version__,
        "numba": _version("numba"),
        "safetensors": _version("safetensors"),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in gpus],
        "git": _git_revision(),
    }


def write_run(
    path: str | os.PathLike[str],
    command: str,  # the script, as in "spdy.py"
    args: argparse.Namespace,
    **figures: Any,
) -> None:
    """Write the record of a run: command, arguments, environment and its own figures."""
    common = {"command": command, "arguments": vars(args), "environment": environment()}
    write_record(path, common | figures)
