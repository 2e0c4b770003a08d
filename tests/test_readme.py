"""README.md and docs/: their commands parse, the files they name exist, their Python runs."""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import shlex

import pytest
import torch
from scripts import ROOT, check_parses

import main_trueobs
import quant
from modelutils import find_layers, own_preprocessing
from obc.inputs import files
from obc.inputs.vision import make_importable, torchvision
from obc.toolkit.calibrate import activation_grids, attach_activation_grids
from obc.toolkit.session import load_compressed

PAGES = {
    path.name: path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if path.name != "commands.md"  # see test_commands.py
}


def commands_of(text: str) -> list[list[str]]:
    """The words of every command in a page's blocks of shell."""
    commands = []
    for kind, block in re.findall(r"^```(sh|console)\n(.*?)^```", text, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if kind == "console" and not line.startswith("$ "):
                continue  # output
            lexer = shlex.shlex(line.removeprefix("$ "), posix=True, punctuation_chars=True)
            lexer.wordchars += ":"  # file.py:function
            words = list(lexer)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                del words[0]
            end = next((n for n, word in enumerate(words) if set(word) <= set("|&;<>")), None)
            commands.append(words[:end])
    return [words for words in commands if words]


COMMANDS = {tuple(words) for text in PAGES.values() for words in commands_of(text)}


def test_pages_have_commands():
    assert {words[0] for words in COMMANDS} >= {"make", "python", "pip", "torchrun"}


@pytest.mark.parametrize("words", sorted(COMMANDS), ids=" ".join)
def test_command_is_one_of_ours(words, capsys):
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
        assert words[0] == "install" and words[1::2] == ["-r"] * (len(words) // 2)
        assert all((ROOT / name).is_file() for name in words[2::2])
    elif first not in ("cd", "git", "source"):
        assert os.access(ROOT / first, os.X_OK) and first.endswith(".sh"), first


def test_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 150


def test_files_named_in_pages_exist():
    text = "\n".join(PAGES.values())
    names = set(re.findall(r"`((?:[a-z_]+/)*\w+\.(?:py|sh))[ `]", text))
    assert "recipes/unstructured.sh" in names
    missing = {name for name in names if not (ROOT / name).is_file()}
    within = set(re.findall(r"^\| `([a-z_/]+)/` \| .*$", text, re.M))
    for folder in within:
        missing -= {name for name in missing if (ROOT / folder / name).is_file()}
    assert within and not missing


def python_of(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGES[page], re.M | re.S)


TAGGER = """
import torch

class Tagger(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.tags = torch.nn.Embedding(50, 8), torch.nn.Linear(8, 5)

    def forward(self, words):
        return self.tags(self.words(words)).transpose(1, 2)

def tagger():
    return Tagger()
"""


def test_python_of_using_runs(tmp_path, monkeypatch, capsys):
    network, preprocessed, task, _, one_layer = python_of("using.md")
    (tmp_path / "net.py").write_text(TAGGER)
    (tmp_path / "task.py").write_text(task)
    words = ["quant", "--wbits", "4", "--only", "tags", "--nsamples", "32"]
    names = f"{tmp_path}/net.py:tagger", f"{tmp_path}/task.py:tagging"
    assert main_trueobs.main([*names, *words]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1].startswith("accuracy 0.")
    assert "on 32 calibration examples" in printed.err
    (tmp_path / "net.py").write_text(network)
    names: dict = {}
    exec(compile(network, "net.py", "exec"), names)
    assert names["network"]()(torch.randn(1, 3, 8, 8)).shape == (1, 2)
    names["EfficientNetLite0"] = names["network"]
    exec(compile(preprocessed, "net.py", "exec"), names)
    told = own_preprocessing("net.py:lite0", True, names["lite0"]())
    assert (told["size"], told["interpolation"], told["mean"][2]) == (224, "bicubic", 127 / 255)
    exec(compile(one_layer, "using.md", "exec"), {})
    assert "0.5000" in capsys.readouterr().out


def test_a_checkpoint_in_plain_pytorch_is_the_model_that_we_evaluate(tmp_path, monkeypatch):
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
    block = python_of("using.md")[3]
    names: dict = {}
    exec(compile(block, "using.md", "exec"), names)
    load_compressed(dense, "rn18_4w4a.pth")
    with torch.inference_mode():
        wanted, outputs = dense(images), names["model"](images)
    assert torch.equal(outputs, wanted) and torch.isfinite(outputs).all()
    assert names["codes"].keys() == find_layers(dense).keys()
    for name, layer in find_layers(dense).items():
        grid, codes = layer.weight_quant, names["codes"][name]
        assert int(codes.max()) <= 15
        assert torch.equal(grid.scale * (codes - grid.zero), layer.weight.flatten(1))
