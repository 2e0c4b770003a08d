"""README.md: its commands parse, the files it names exist, its Python runs."""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import shlex

import pytest
import torch
from scripts import ROOT, check_parses

import quant
from modelutils import find_layers
from obc.inputs import files
from obc.inputs.vision import make_importable, torchvision
from obc.toolkit.calibrate import activation_grids, attach_activation_grids
from obc.toolkit.session import load_compressed


def readme() -> str:
    return (ROOT / "README.md").read_text()


def readme_commands() -> list[list[str]]:
    """The words of every command in README.md's blocks of shell."""
    commands = []
    for kind, block in re.findall(r"^```(sh|console)\n(.*?)^```", readme(), re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if kind == "console" and not line.startswith("$ "):
                continue  # output
            lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
            words = list(lexer)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                del words[0]
            end = next((n for n, word in enumerate(words) if set(word) <= set("|&;<>")), None)
            commands.append(words[:end])
    return [words for words in commands if words]


def test_readme_has_commands():
    assert {words[0] for words in readme_commands()} >= {"make", "python"}


@pytest.mark.parametrize("words", readme_commands(), ids=" ".join)
def test_readme_command_is_one_of_ours(words, capsys):
    first, *words = words
    if first == "torchrun":
        assert words[0] == "--nproc-per-node" and words[1].isdecimal()
        first, words = "python", words[2:]
    if first == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
        assert {word for word in words if "=" not in word} <= targets
    elif first in ("python", ".venv/bin/python") and words[0] == "-m":
        assert importlib.util.find_spec(words[1])
    elif first in ("python", ".venv/bin/python"):
        check_parses(words[0], words[1:], capsys)
    elif first == "pip":
        assert words[:2] == ["install", "-r"] and (ROOT / words[2]).is_file()
    elif first not in ("cd", "git", "source"):
        assert os.access(ROOT / first, os.X_OK) and first.endswith(".sh"), first


def test_files_named_in_readme_exist():
    text = readme()
    names = set(re.findall(r"`((?:[a-z_]+/)*\w+\.(?:py|sh))[ `]", text))
    assert "recipes/unstructured.sh" in names
    missing = {name for name in names if not (ROOT / name).is_file()}
    within = set(re.findall(r"^\| `([a-z_/]+)/` \| .*$", text, re.M))
    for folder in within:
        missing -= {name for name in missing if (ROOT / folder / name).is_file()}
    assert within and not missing


def test_readmes_python_gives_the_model_that_we_evaluate(tmp_path, monkeypatch):
    """A ResNet-18 with weights and activations rounded to grids, in plain PyTorch."""
    torch.manual_seed(0)
    make_importable()
    model = torchvision.models.resnet18(weights=None).eval()
    dense = copy.deepcopy(model)
    images = torch.randn(2, 3, 64, 64)
    for layer in find_layers(model).values():
        grid = quant.fit_weight_grid(layer.weight.detach().flatten(1), 4, symmetric=False)
        layer.weight.data.copy_(grid(layer.weight.detach().flatten(1)).view_as(layer.weight))
        quant.set_weight_grid(layer, grid)
    attach_activation_grids(model, activation_grids(model, images, 4, False, False))
    files.save_checkpoint(model.state_dict(), tmp_path / "rn18_4w4a.pth")
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"^```python\n(.*?)^```", readme(), re.M | re.S)
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    load_compressed(dense, "rn18_4w4a.pth")
    with torch.inference_mode():
        wanted, outputs = dense(images), names["model"](images)
    assert torch.equal(outputs, wanted) and torch.isfinite(outputs).all()
    assert names["codes"].keys() == find_layers(dense).keys()
    for name, layer in find_layers(dense).items():
        grid, codes = layer.weight_quant, names["codes"][name]
        assert int(codes.max()) <= 15
        assert torch.equal(grid.scale * (codes - grid.zero), layer.weight.flatten(1))
