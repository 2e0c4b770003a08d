"""pyproject.toml has all modules, and `trueobs` reaches all commands."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
from scripts import ROOT

from obc import __main__ as entry

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="Python 3.10 has no reader of TOML")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_all_modules_and_packages_are_in_the_wheel():
    setuptools = PROJECT["tool"]["setuptools"]
    assert set(setuptools["py-modules"]) == {path.stem for path in ROOT.glob("*.py")}
    folders = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for pattern in ("*/*.py", "obc/*/*.py")
        for path in ROOT.glob(pattern)
    }
    assert set(setuptools["packages"]) == folders - {"benchmarks", "docs", "tests", "examples"}
    for package, patterns in setuptools["package-data"].items():
        assert all(list((ROOT / package).glob(pattern)) for pattern in patterns)


def test_every_requirements_file_is_the_dependencies_or_an_extra():
    dynamic = PROJECT["tool"]["setuptools"]["dynamic"]
    extras = dynamic["optional-dependencies"].values()
    files = [name for entry in (dynamic["dependencies"], *extras) for name in entry["file"]]
    assert sorted(files) == sorted(path.name for path in ROOT.glob("requirements*.txt"))
    for name in files:  # what setuptools cannot read: -r, -c, -e
        lines = (ROOT / name).read_text().splitlines()
        assert not any(line.startswith("-") for line in lines)


@pytest.mark.parametrize("word", [*entry.COMMANDS, *(f"study {part}" for part in entry.PARTS)])
def test_every_command_is_reached(word, capsys):
    if word == "study":  # its parts are tried
        return
    with pytest.raises(SystemExit) as end:
        entry.main([*word.split(), "--help"])
    assert end.value.code == 0 and "usage:" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["compres"], ["study"], ["study", "main_trueobs"]])
def test_other_words_are_told_in_one_line(words, capsys):
    assert entry.main(words) == 2
    output = capsys.readouterr()
    assert not output.out and output.err.startswith("error: ") and output.err.count("\n") == 1
    names = entry.PARTS if words[:1] == ["study"] else entry.COMMANDS
    assert all(name in output.err for name in names)
    assert not words or words == ["study"] or f"{words[-1]}: no such command" in output.err


def test_the_parts_of_the_study_have_a_main():
    for part in entry.PARTS:
        assert callable(importlib.import_module(f"pruning_vs_quantization.{part}").main)


def test_python_m_obc():
    command = [sys.executable, "-m", "obc", "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "compress" in result.stdout
