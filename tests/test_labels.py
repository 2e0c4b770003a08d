"""Labels: --classes, and the dense model's top-1 in every command that sees them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

import database
import main_trueobs
import post_proc
import spdy
from datautils import calibration_batches, load_data
from modelutils import get_model
from obc.toolkit.session import Session, chance_level, common_options

DIGITS = [str(digit) for digit in range(10)]
ORDER = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]  # output i of the permuted model is the class ORDER[i]
OWN_MODELS = f"""
import random
import numpy
import torch
from torch import nn
from modelutils import get_model

class Reordered(nn.Module):
    def __init__(self, order):
        super().__init__()
        self.net, self.order = get_model("rn8", "digits"), order
    def forward(self, x):
        scores = self.net(x)
        unused = scores.amin(1, keepdim=True) - 1
        return torch.cat([scores[:, i : i + 1] if i < 10 else unused for i in self.order], 1)

def permuted():
    return Reordered({ORDER})

def wider():
    return Reordered([10, *range(9), 11, 9])

class Noisy(Reordered):
    def forward(self, x):
        noise = random.random() + numpy.random.rand() + torch.rand(()).item()
        return super().forward(x) + 1e-9 * noise

def noisy():
    return Noisy(list(range(10)))
"""
WIDER = ["none of them", *DIGITS[:9], "nor this", "9"]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A file of models whose outputs are not in the order of the digits."""
    path = tmp_path / "own.py"
    path.write_text(OWN_MODELS)
    return path


def names_file(folder: Path, names: list[str]) -> str:
    path = folder / "classes.txt"
    path.write_text("\n".join(names) + "\n", encoding="utf-8")
    return str(path)


def compress(*words: str, nsamples: int = 64) -> int:
    common = ("--noaug", "--nsamples", str(nsamples), "--device", "cpu", "--workers", "0")
    return main_trueobs.main([*words[:1], "digits", "nmprune", *words[1:], *common])


def session(*words: str, nsamples: int = 64) -> Session:
    parser = main_trueobs.build_parser()
    args = [*words[:1], "digits", "nmprune", *words[1:], "--nsamples", str(nsamples)]
    return Session.of(common_options(parser.parse_args([*args, "--device", "cpu"])))


def top1_of(model: torch.nn.Module, nsamples: int) -> float:
    """In plain PyTorch, on the calibration images."""
    batches = list(calibration_batches(load_data("digits", nsamples=nsamples)))
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.no_grad():
        return 100 * (model(images).argmax(1) == labels).double().mean().item()


# -- --classes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "names"), [("permuted", [DIGITS[i] for i in ORDER]), ("wider", WIDER)]
)
def test_the_file_says_which_output_is_which_class(model, names, own, capsys):
    assert compress("rn8") == 0
    plain = capsys.readouterr()
    assert compress(f"{own}:{model}", "--classes", names_file(own.parent, names)) == 0
    named = capsys.readouterr()
    assert named.out == plain.out and float(plain.out.split()[-1]) > 60
    lines = [
        [line for line in text.err.splitlines() if line.startswith("dense:")]
        for text in (plain, named)
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 1
    assert "near chance" not in named.err


def test_without_the_file_a_permuted_network_is_near_chance(own, capsys):
    assert compress(f"{own}:permuted") == 0
    err = capsys.readouterr().err
    assert "warning: the dense model is near chance" in err and "--classes" in err


def test_more_outputs_than_classes_are_refused_without_the_file(own, capsys):
    assert compress(f"{own}:wider") == 2
    out, err = capsys.readouterr()
    (error,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert out == "" and error.startswith(f"error: {own}:wider has 12 classes, but digits has 10;")
    assert "pass --classes FILE" in error


def test_built_in_networks_and_own_ones_are_refused_in_the_same_words(own, capsys, tmp_path):
    for name in ("a", "b", "c"):
        for part in ("train", "val"):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            Image.new("RGB", (16, 16)).save(folder / "0.png")
    (tmp_path / "ten.py").write_text(OWN_MODELS)
    weights = tmp_path / "rn8.pth"
    torch.save(get_model("rn8", "digits").state_dict(), weights)
    options = ["--datapath", str(tmp_path / "images"), "--image-size", "16", "--workers", "0"]
    models = [("rn8", "--weights", str(weights)), (f"{tmp_path}/ten.py:permuted",)]
    advice = []
    for model, *more in models:
        assert main_trueobs.main([model, "folder", "nmprune", *more, *options]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert "10 classes, but folder has 3" in error
        advice.append(error.partition("; ")[2])
    assert advice[0] == advice[1] and "--classes FILE" in advice[0]
    classes = names_file(tmp_path, [*DIGITS[:7], "c", "a", "b"])
    for model, *more in models:
        words = [model, "folder", "nmprune", *more, *options, "--classes", classes]
        assert main_trueobs.main(words) == 0


def test_a_run_is_not_repeated_with_another_file(own, tmp_path, capsys):
    path, names = tmp_path / "sparse.pth", [DIGITS[i] for i in ORDER]
    words = (f"{own}:permuted", "--classes", names_file(tmp_path, names), "--save", str(path))
    assert compress(*words) == 0
    record = str(path.with_suffix(".json"))
    assert json.loads(Path(record).read_text())["dense_top1_calibration"] > 90
    assert main_trueobs.main(["--repeat", record, "--save", str(tmp_path / "again.pth")]) == 0
    names_file(tmp_path, DIGITS)
    assert main_trueobs.main(["--repeat", record, "--save", str(tmp_path / "third.pth")]) == 2
    assert "would not repeat the run" in capsys.readouterr().err.splitlines()[-1]


# -- the dense line --------------------------------------------------------------------------------


@pytest.mark.parametrize("nsamples", [48, 300])
def test_the_line_is_the_top1_in_plain_pytorch(nsamples, caplog):
    expected = top1_of(get_model("rn8", "digits"), nsamples)
    with caplog.at_level("INFO", "trueobs"):
        assert session("rn8", nsamples=nsamples).dense_top1() == pytest.approx(expected)
    assert f"dense: top-1 {expected:.2f} on {nsamples} calibration images" in caplog.text


def test_the_line_is_of_1024_images_at_most(caplog):
    with caplog.at_level("INFO", "trueobs"):
        session("rn8", nsamples=1300).dense_top1()
    assert " on 1024 of 1300 calibration images" in caplog.text


def test_no_generator_is_advanced(own):
    opened = session(f"{own}:noisy")

    def states() -> list:
        numpy_state = np.random.get_state()  # noqa: NPY002
        return [random.getstate(), torch.get_rng_state().tolist(), *map(list, numpy_state[1:2])]

    before = states()
    opened.dense_top1()
    assert states() == before
    opened.model(torch.zeros(1, 3, 16, 16))
    assert states()[0] != before[0] and states()[1:] != before[1:]  # so the model does draw


def test_results_do_not_depend_on_the_line(own, tmp_path, monkeypatch):
    words = (f"{own}:noisy", "--save")
    assert compress(*words, str(tmp_path / "with.pth")) == 0
    monkeypatch.setattr(Session, "dense_top1", lambda self, batches=None: 0.0)
    assert compress(*words, str(tmp_path / "without.pth")) == 0
    states = [torch.load(tmp_path / f"{name}.pth") for name in ("with", "without")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_every_command_that_sees_labels_logs_and_records(tmp_path, monkeypatch, capsys):
    """And those that see none do not load images for it."""
    monkeypatch.chdir(tmp_path)

    def run(command: ModuleType, *words: str) -> list[str]:
        common = ["--nsamples", "32", "--device", "cpu", "--noaug"]
        assert command.main(["rn8", "digits", *words, *common]) == 0
        lines = capsys.readouterr().err.splitlines()
        return [line.partition(",")[0] for line in lines if line.startswith("dense: top-1 ")]

    dense = top1_of(get_model("rn8", "digits"), 32)
    line = [f"dense: top-1 {dense:.2f} on 32 calibration images"]
    levels = ("--max-sparsity", "0.6", "--delta-sparse", "0.3")
    assert run(main_trueobs, "unstr", "--sparse-dir", "models_unstr", *levels) == line
    assert run(main_trueobs, "nmprune", "--save", "nm.pth") == line
    assert run(main_trueobs, "nmprune", "--plan") == []
    for action in ("loss", "squared", "eval"):
        assert run(database, "unstr", action) == line
    assert run(database, "unstr", "spdy") == []
    assert run(spdy, "1.5", "unstr", "--dp") == []
    profile = "rn8_unstr_150x_dp.txt"
    assert run(spdy, "1.5", "unstr", "--score", profile) == line
    assert run(spdy, "1.5", "unstr") == line
    assert run(database, "unstr", "stitch", "--profile", profile) == line
    assert run(post_proc, "nm.pth", "--bnt", "--bnt-batches", "2", "--save", "bnt.pth") == line
    records = ["models_unstr/rn8", "nm", "bnt", "rn8_unstr_150x_spdy", "scores/rn8_unstr_loss"]
    for name in (*records, "scores/rn8_unstr_squared"):
        record = json.loads(Path(f"{name}.json").read_text())
        assert record["dense_top1_calibration"] == pytest.approx(dense), name
    for name in ("rn8_unstr_150x_dp", "scores/rn8_unstr_spdy"):
        assert "dense_top1_calibration" not in json.loads(Path(f"{name}.json").read_text()), name


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.8, 0.1, 0.1), (0.1,) * 10])
@pytest.mark.parametrize("count", [64, 1024])
def test_guesses_are_rarely_above_chance_and_trained_models_are(shares, count):
    """Constant answers and random ones, for labels drawn at random."""
    rng, exceeded, runs = np.random.default_rng(0), np.zeros(2), 400
    for _ in range(runs):
        labels = rng.choice(len(shares), count, p=shares)
        numbers, counts = np.unique(labels, return_counts=True)
        level = chance_level(dict(zip(numbers.tolist(), counts.tolist(), strict=True)))
        guesses = np.zeros(count), rng.choice(len(shares), count, p=shares)
        exceeded += [100 * (guess == labels).mean() > level for guess in guesses]
        assert level < 100
    assert (exceeded <= 0.05 * runs).all()


def test_one_class_alone_has_no_chance_level():
    assert chance_level({4: 100}) < 0
