"""Our scripts as modules, wherever they are; shared by tests."""

from __future__ import annotations

import importlib
import importlib.util
import shlex
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


def load_script(script: str) -> ModuleType:
    """The module of a script, wherever it is."""
    if "/" not in script:
        return importlib.import_module(Path(script).stem)
    spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_parses(script: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Fail unless the script accepts these words."""
    module = load_script("post_proc.py" if script == "postproc.py" else script)
    try:
        module.build_parser().parse_args(words)
    except SystemExit:
        pytest.fail(f"{script} {shlex.join(words)}\n{capsys.readouterr().err}")
