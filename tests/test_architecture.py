"""The shape of the code: folders import downwards only, no cycles, no effects on import."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {  # folder -> its rank; a file imports from its own folder and from lower ranks only
    "obc/solver": 0,
    "obc/inputs": 1,
    "libraries": 2,  # the flat libraries
    "obc/toolkit": 3,
    "commands": 4,  # the flat commands
    "obc": 5,  # `python -m obc`
    "assets": 5,
    "examples": 5,
    "pruning_vs_quantization": 5,
    "recipes": 6,  # make tables of the study, too
    "benchmarks": 6,  # may time the study
    "benchmarks/peers": 7,
}
LIBRARIES = {"quant", "trueobs", "modelutils", "datautils"}
COMMANDS = {"main_trueobs", "database", "spdy", "post_proc", "export"}
ALIASES = {"postproc"}
PYTHON_FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for pattern in ("*.py", *(f"{name}/*.py" for name in FOLDERS if (ROOT / name).is_dir()))
    for path in sorted(ROOT.glob(pattern))
    if path.stem != "__init__"
}
PRODUCT = [x for x in PYTHON_FILES if not x.startswith(("assets", "benchmarks"))]
TREES = {name: ast.parse(path.read_text()) for name, path in PYTHON_FILES.items()}


def folder_of(module: str) -> str:
    """The folder that a module belongs to, a key of FOLDERS."""
    if module in LIBRARIES:
        return "libraries"
    return "/".join(module.split(".")[:-1]) or "commands"


def imports(tree: ast.Module) -> set[str]:
    """Our own modules that a module imports anywhere, also under TYPE_CHECKING or by a string."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide what is imported"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names |= {node.value} if is_module_string(node.value) else set()
    return names & PYTHON_FILES.keys()


def is_module_string(text: str) -> bool:
    return bool(re.fullmatch(r"(obc|pruning_vs_quantization|benchmarks|recipes)\.[\w.]+", text))


GRAPH = {name: imports(tree) - {name} for name, tree in TREES.items()}


def test_imports_and_folders_are_seen():
    assert "obc.solver.inverse" in GRAPH["obc.solver.elimination"]
    assert "obc.toolkit.session" in GRAPH["main_trueobs"]
    assert {folder_of(name) for name in PYTHON_FILES} == FOLDERS.keys()


def test_hidden_imports_are_seen():
    code = (
        "if TYPE_CHECKING:\n    from obc.toolkit.leveldb import Database\n"
        "def f():\n    import spdy\n    importlib.import_module('obc.solver.dp')\n"
    )
    assert imports(ast.parse(code)) == {"obc.toolkit.leveldb", "spdy", "obc.solver.dp"}


def test_the_top_level_mirrors_the_paper():
    assert {name for name in PYTHON_FILES if "." not in name} == LIBRARIES | COMMANDS | ALIASES


def test_every_python_file_is_in_a_known_folder():
    made = re.findall(r"^/?(\w+)/$", (ROOT / ".gitignore").read_text(), re.MULTILINE)
    ours = [path for path in ROOT.iterdir() if path.is_dir() and path.name not in made]
    files = [file for folder in ours if folder.name[0] != "." for file in folder.rglob("*.py")]
    folders = {file.relative_to(ROOT).parent.as_posix() for file in files}
    assert folders <= FOLDERS.keys() | {"obc", "docs", "tests"}


def test_formatting_is_left_to_the_tool():
    marks = ("# fmt: " + "skip", "# fmt: " + "off")
    text = "".join(path.read_text() for path in [*PYTHON_FILES.values(), *ROOT.glob("tests/*.py")])
    assert sum(text.count(mark) for mark in marks) <= 10


def test_imports_make_no_cycle():
    order = list(TopologicalSorter(GRAPH).static_order())  # raises CycleError
    assert sorted(order) == sorted(GRAPH)


@pytest.mark.parametrize("name", PYTHON_FILES)
def test_imports_point_to_lower_folders(name):
    rank = FOLDERS[folder_of(name)]
    upwards = {other for other in GRAPH[name] if FOLDERS[folder_of(other)] > rank}
    sideways = {
        other
        for other in GRAPH[name]
        if FOLDERS[folder_of(other)] == rank and folder_of(other) != folder_of(name)
    }
    assert not upwards | sideways


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_commands_do_not_import_each_other(name):
    assert not GRAPH[name] & COMMANDS


@pytest.mark.parametrize("name", PYTHON_FILES)
def test_no_star_imports_and_torchvision_through_one_module(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names)
        names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        names |= {node.module or ""} if isinstance(node, ast.ImportFrom) else set()
        if name != "obc.inputs.vision":
            assert not any(name.partition(".")[0] == "torchvision" for name in names)


@pytest.mark.parametrize("name", PYTHON_FILES)
def test_every_module_has_a_docstring(name):
    text = ast.get_docstring(TREES[name])
    assert text and text.splitlines()[0].endswith((".", ":", "…", ")", "?"))


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_command_has_a_parser_a_main_and_a_guard(name):
    functions = {node.name for node in TREES[name].body if isinstance(node, ast.FunctionDef)}
    assert {"build_parser", "main"} <= functions
    last = TREES[name].body[-1]
    assert isinstance(last, ast.If) and "__main__" in ast.unparse(last.test)


IMPORT_EVERYTHING = """
import random, warnings
import numpy as np, torch
from obc.inputs import vision
warnings.simplefilter("error")

def state():
    return (random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist(),
            torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(),
            torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark,
            torch.backends.cuda.matmul.allow_tf32, torch.are_deterministic_algorithms_enabled())

before = state()
for name in NAMES:
    __import__(name)
assert state() == before, "importing changed a random state or a setting of torch"
"""


def test_importing_has_no_effects(tmp_path):
    names = [name for name in PRODUCT if not name.startswith(("pruning", "recipes"))]
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_EVERYTHING.replace("NAMES", repr(names))],
        text=True,
        capture_output=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [name for name in PRODUCT if not name.startswith("recipes")])
def test_examples_in_docstrings_run(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0
