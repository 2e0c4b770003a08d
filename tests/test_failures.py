"""failures.py: whatever a model's own code raises is one line that says where and on what."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import database
import main_trueobs
import post_proc
import spdy
from modelutils import eval_mode, evaluating
from obc.inputs.failures import FailedForward, accepted_input, foreign_code
from obc.inputs.tracing import resumable
from obc.solver.errors import UserError
from obc.toolkit.calibrate import calls_of_layers, watching
from obc.toolkit.evaluation import evaluate
from obc.toolkit.starting import Terminated

CPU = torch.device("cpu")
QUICK = ["--nsamples", "32", "--noaug", "--device", "cpu"]


class Odd(Exception):
    """An exception that no list would have."""


class Raises(nn.Module):
    """Raises an exception if an image is not zero."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        if x.any():
            raise self.error
        return x


def net(error: BaseException) -> nn.Sequential:
    layer = nn.Conv2d(3, 4, 3, bias=False)  # zero images stay zero
    return nn.Sequential(layer, nn.Sequential(nn.Identity(), Raises(error)), nn.Flatten())


@pytest.mark.parametrize(
    "error",
    [Odd("no such thing"), KeyError("x"), StopIteration(), OSError(2, "gone"), SystemExit(3)],
    ids=lambda error: type(error).__name__,
)
def test_any_exception_of_a_forward(error):
    with pytest.raises(FailedForward) as caught, evaluating(model := net(error)):
        model(torch.ones(2, 3, 8, 8))
    text = str(caught.value)
    assert text.startswith(f"1.1 (Raises) fails on an input (2, 4, 6, 6): {type(error).__name__}")
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        Terminated(),
        UserError("of ours"),
        MemoryError(),
        torch.OutOfMemoryError("of a GPU"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_interrupts_memory_and_user_errors_pass(error):
    with pytest.raises(type(error)) as caught, evaluating(model := net(error)):
        model(torch.ones(2, 3, 8, 8))
    assert caught.value is error


def test_what_our_own_code_raises_stays_a_traceback():
    model = net(Odd())
    with pytest.raises(ZeroDivisionError), evaluating(model):
        model(torch.zeros(2, 3, 8, 8))
        _ = 1 / 0

    def see(*args: object) -> None:
        raise LookupError("a mistake in a hook of ours")

    with pytest.raises(LookupError), foreign_code():
        raise LookupError
    with pytest.raises(LookupError, match="a mistake in a hook of ours"), evaluating(model):
        with watching({"0": model[0]}, see):
            model(torch.zeros(2, 3, 8, 8))


def test_every_way_of_calling_names_the_place():
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleDict({"layer": nn.Linear(4, 2)})

        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return self.inner["layer"](input=x.flatten(1)) * scale

    for call in (
        lambda model, images: model(images),
        lambda model, images: model(x=images),
        lambda model, images: model.half()(images),
    ):
        with pytest.raises(FailedForward, match=r"^inner.layer \(Linear\) .*\(2, 48\): RuntimeE"):
            with eval_mode(model := Keyword()):
                call(model, torch.ones(2, 3, 4, 4))
    with pytest.raises(FailedForward, match=r"the model \(Keyword\) .*\(1, 3, 4, 4\): TypeError"):
        with evaluating(model := Keyword()):
            model(torch.ones(1, 3, 4, 4), 1.0, None)


def test_decorated_functional_and_traced_models():
    class Decorated(nn.Module):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return self.rest(x)

        def rest(self, x: Tensor) -> Tensor:
            return x.view(7, -1)

    with pytest.raises(FailedForward, match=r"the model \(Decorated\) fails on an input \(2, 3, 4"):
        with evaluating(model := Decorated()):
            model(torch.ones(2, 3, 4, 4))
    traced = resumable(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)))
    with pytest.raises(FailedForward, match=r"\(2, 144\)"), foreign_code():
        traced.begin(torch.ones(2, 3, 8, 8))
        traced.finish()


def test_calibration_evaluation_and_costs():
    model, images = net(Odd("here")), torch.ones(4, 3, 8, 8)
    with pytest.raises(FailedForward, match=r"1.1 \(Raises\) .*: Odd: here$"):
        evaluate(model, [(images, torch.zeros(4, dtype=torch.long))], CPU)
    empty = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(99, 2))
    with pytest.raises(FailedForward, match=r"2 \(Linear\) fails on an input \(1, 144\)"):
        calls_of_layers(empty, (3, 8, 8))


MODELS = """
import torch
from torch import nn
def body(channels=3, features=4):
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, 10))
def one(): return body(1)
def twelve(): return body(12)
def lenet():
    return nn.Sequential(nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5),
                         nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(400, 10))
def mnist():
    return nn.Sequential(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 24 * 24, 10))
def deep(): return nn.Sequential(*[nn.Sequential(nn.Conv2d(c, 4, 3), nn.MaxPool2d(2))
                                   for c in (3, 4, 4)], nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                 nn.Linear(4, 10))
class Sized(nn.Module):
    def __init__(self):
        super().__init__()
        self.img_size, self.body = (44, 44), body()
    def forward(self, x):
        assert x.shape[2:] == self.img_size
        return self.body(x)
def sized(): return Sized()
class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = body()
    def forward(self, x, mask, *, scale):
        return self.body(x)
def two(): return Two()
class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.calls = body(), 0
    def forward(self, x):
        if x.float().std() > 0.5 and len(x) > 2:
            raise LookupError("first line\\nsecond line")
        return self.body(x)
def broken(): return Broken()
def inner(): return body(features=5)
"""


@pytest.mark.parametrize(
    ("function", "words", "size"),
    [
        ("one", r"0 \(Conv2d\) .*it takes 1 channel, images have 3: pass --mean", None),
        ("twelve", r"it takes 12 channels, images have 3: let its", None),
        ("lenet", r"pass --image-size 32$", 32),
        ("sized", r"the model \(Sized\) .*AssertionError; .*pass --image-size 44$", 44),
        ("mnist", r"it takes 1 channel, .*; it takes 28×28 pixels: pass --image-size 28$", None),
        ("deep", r"2.0 \(Conv2d\) fails .*: pass --image-size 32$", 32),
        ("two", r"missing 1 required positional argument: 'mask'$", None),
        ("inner", r"5 \(Linear\) fails on an input \(2, 4\): RuntimeError", None),
    ],
)
def test_advice_about_images_only_where_they_matter(function, words, size, tmp_path, capsys):
    path = tmp_path / "models.py"
    path.write_text(MODELS)
    line = [f"{path}:{function}", "digits", "quant", "--wbits", "8", *QUICK]
    assert main_trueobs.main(line) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith(f"error: {path}:{function}: ")
    assert re.search(words, err.strip()), err
    assert ("--image-size" in err) == (size is not None or function == "mnist")
    if size is not None:  # the advice is right
        assert main_trueobs.main([*line, "--image-size", str(size)]) == 0


def test_models_that_fail_on_real_images_only(tmp_path, monkeypatch, capsys):
    """Calibration, evaluation, losses, the search and corrections: one line each."""
    monkeypatch.chdir(tmp_path)
    Path("models.py").write_text(MODELS.replace("std() > 0.5", "std() > 1e9"))
    model = ["models.py:broken", "digits"]
    levels = ["unstr", "--max-sparsity", "0.5", "--delta-sparse", "0.5"]
    assert main_trueobs.main([*model, *levels, "--sparse-dir", "models_unstr", *QUICK]) == 0
    assert main_trueobs.main([*model, "quant", "--wbits", "8", "--save", "q.pth", *QUICK]) == 0
    assert database.main([*model, "unstr", "loss", *QUICK]) == 0
    Path("models.py").write_text(MODELS)
    capsys.readouterr()
    for main, words in (
        (main_trueobs.main, ["quant", "--wbits", "8"]),
        (main_trueobs.main, ["quant", "--wbits", "32", "--abits", "8"]),
        (database.main, ["unstr", "loss", "--score_path", "other"]),
        (database.main, ["unstr", "squared"]),
        (database.main, ["unstr", "eval"]),
        (spdy.main, ["1.2", "unstr"]),
        (post_proc.main, ["q.pth", "--bnt", "--bnt-batches", "2"]),
        (post_proc.main, ["q.pth", "--statcorr"]),
        (post_proc.main, ["q.pth", "--gap", "--gap-epochs", "1"]),
        (post_proc.main, ["q.pth", "--lintune", "--lintune-epochs", "1"]),
        (post_proc.main, ["q.pth", "--finetune", "--finetune-epochs", "1"]),
        (post_proc.main, ["q.pth"]),
    ):
        assert main([*model, *words, *QUICK]) == 2, words
        last = capsys.readouterr().err.splitlines()[-1]
        assert re.match(r"error: the model \(Broken\) fails on an input \(\d+, 3, 16, 16\)", last)
        assert last.endswith("LookupError: first line second line"), (words, last)


def test_accepted_images_are_found_by_trial():
    with evaluating(model := nn.Sequential(nn.Flatten(), nn.Linear(3 * 52 * 52, 2))):
        assert accepted_input(model, 16, "") == (3, 52)
    with evaluating(model := nn.Sequential(nn.Flatten(), nn.Linear(3, 2))):
        assert accepted_input(model, 16, "") is None
