"""The shape of the code: what imports what, how long things are, that importing does nothing."""

from __future__ import annotations

import ast
import doctest
import importlib
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("engine", "budget", "tuning", "networks", "images", "command")
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path
         for folder in (ROOT, *(ROOT / package for package in PACKAGES))
         for path in sorted(folder.glob("*.py")) if path.stem != "__init__"}  # fmt: skip
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
MAX_FUNCTION, MAX_FILE = 50, 400  # lines

# Modules in layers; each may import from layers above its own, and within it without a cycle.
# What a later part of the toolkit adds as support stands on the layer of what it supports.
LAYERS = (
    {"command.cli", "command.fingerprints", "command.process", "command.starting",
     "networks.vision", "quant", "budget.dp", "engine.hessian", "engine.inverse",
     "engine.refinement", "engine.threads", "engine.compiled", "networks.cifar_resnets"},
    {"engine.devices", "engine.distributed", "engine.levelfile", "networks.checkpoints",
     "images.imagefiles", "images.batches", "datautils", "engine.elimination",
     "engine.elimination_cpu", "engine.panel_cpu", "engine.nm_cpu", "engine.levels",
     "engine.levels_cpu", "engine.memory", "engine.task",
     "networks.smallmaps", "networks.tracing", "budget.profiles", "command.resuming"},
    {"modelutils", "trueobs", "command.records"},
    {"engine.calibration", "budget.costs", "budget.sensitivity", "command.session",
     "tuning.corrections", "tuning.retraining", "budget.search", "engine.machine",
     "engine.planning"},
    {"database", "engine.checking", "engine.compression"},
    {"spdy", "post_proc", "main_trueobs"},
    {"postproc"},
)
TOP_LEVEL = {"trueobs", "main_trueobs", "post_proc", "postproc", "database", "spdy", "modelutils",
             "datautils", "quant"}
COMMANDS = {"main_trueobs", "database", "spdy", "post_proc"} & FILES.keys()


def imports(tree: ast.Module) -> set[str]:
    """Our own modules that a module imports, anywhere in it, when it runs."""
    names = set()
    never_run = {id(node) for branch in ast.walk(tree)
                 if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
                 for node in branch.body}
    for node in ast.walk(tree):
        if id(node) in never_run:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            names |= {word.value for word in node.args if isinstance(word, ast.Constant)}
    return names & FILES.keys()


GRAPH = {name: imports(tree) for name, tree in TREES.items()}


def reachable(name: str) -> set[str]:
    """Everything that importing a module brings along."""
    found, wanted = set(), {name}
    while wanted:
        found |= wanted
        wanted = set().union(*(GRAPH[module] for module in wanted)) - found
    return found - {name}


def test_there_is_something_to_check():
    assert "engine.inverse" in GRAPH["engine.elimination"]
    assert {"command.cli", "quant", "trueobs", "engine.hessian"} <= reachable("main_trueobs")


def test_the_top_level_mirrors_the_paper():
    assert {name for name in FILES if "." not in name} == TOP_LEVEL


def test_every_module_has_its_layer():
    assert set().union(*LAYERS) == FILES.keys()


def test_imports_make_no_cycle():
    order = list(TopologicalSorter(GRAPH).static_order())  # CycleError, if there is one
    assert sorted(order) == sorted(GRAPH)


@pytest.mark.parametrize("name", sorted(set().union(*LAYERS) & FILES.keys()))
def test_imports_go_one_way(name):
    own = next(number for number, layer in enumerate(LAYERS) if name in layer)
    forbidden = set().union(*LAYERS[own + 1 :])
    assert not reachable(name) & forbidden


@pytest.mark.parametrize("name", sorted(COMMANDS - {"database"}))
def test_commands_do_not_import_each_other(name):
    assert not reachable(name) & (COMMANDS - {name, "database"})


@pytest.mark.parametrize("name", FILES)
def test_no_star_imports_and_torchvision_from_one_place(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names)
        names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        names |= {node.module or ""} if isinstance(node, ast.ImportFrom) else set()
        if name != "networks.vision":
            assert not any(name.partition(".")[0] == "torchvision" for name in names)


@pytest.mark.parametrize("name", FILES)
def test_every_module_says_what_it_is(name):
    text = ast.get_docstring(TREES[name])
    assert text and text.splitlines()[0].endswith((".", ":", "…", ")"))


@pytest.mark.parametrize("name", FILES)
def test_functions_and_files_are_short(name):
    assert len(FILES[name].read_text().splitlines()) <= MAX_FILE
    functions = [node for node in ast.walk(TREES[name])
                 if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    too_long = {node.name: node.end_lineno - node.lineno + 1 for node in functions
                if node.end_lineno - node.lineno + 1 > MAX_FUNCTION}
    assert not too_long


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_command_has_a_parser_a_main_and_a_guard(name):
    functions = {node.name for node in TREES[name].body if isinstance(node, ast.FunctionDef)}
    assert {"build_parser", "main"} <= functions
    last = TREES[name].body[-1]
    assert isinstance(last, ast.If) and "__main__" in ast.unparse(last.test)


IMPORT_EVERYTHING = """
import random, warnings
import numpy as np, torch
from networks import vision
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


def test_importing_does_nothing_visible(tmp_path):
    code = IMPORT_EVERYTHING.replace("NAMES", repr(list(FILES)))
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True,
                          cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", FILES)
def test_examples_in_docstrings_run(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0
