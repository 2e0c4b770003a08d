"""Seconds per layer and level: measured in runtimes, attributed to layers, read by spdy.py."""

from __future__ import annotations

import copy
import ctypes
import gc
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import database
import quant
import spdy
from modelutils import find_layers, get_model
from obc.inputs.files import save_checkpoint
from obc.toolkit import timings
from obc.toolkit.export_measure import openvino
from obc.toolkit.leveldb import Database
from obc.toolkit.profiles import read_scores, write_scores
from obc.toolkit.timings import OpenVinoProfile, combined, number_in, owners


def need(*packages: str) -> None:
    for name in packages:
        pytest.importorskip(name, reason="needs requirements-export.txt")


class Uneven(nn.Module):
    """Two layers of which the first has 64 times the other's work, a sum, and one called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64)
        self.large = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        self.pointwise, self.twice = nn.Conv2d(64, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        x = nn.functional.max_pool2d(x + self.large(x), 2)
        return self.twice(self.twice(self.pointwise(x)).relu()).mean((2, 3))


@pytest.mark.parametrize("runtime", ["ort", "openvino"])
@pytest.mark.parametrize("bits", [32, 8])
def test_every_microsecond_belongs_to_the_layer_that_does_the_work(runtime: str, bits: int) -> None:
    need("onnxscript", "onnxruntime" if runtime == "ort" else "openvino")
    torch.manual_seed(0)
    model = Uneven().eval()
    for layer in find_layers(model).values() if bits == 8 else ():
        W = layer.weight.detach().flatten(1)
        quant.set_weight_grid(layer, grid := quant.fit_weight_grid(W, 8))
        layer.weight.data = grid(W).view_as(layer.weight)
        quant.set_activation_grid(layer, quant.fit_activation_grid(torch.rand(4096), 8))
    contents = timings.exported(model, (3, 48, 48), None)
    profile = timings.PROFILES[runtime](contents, 1)
    for _ in range(timings.WARM_UP + 9):
        profile.run(np.ones((1, 3, 48, 48), np.float32))
    seconds = timings.layer_medians(profile, list(find_layers(model)))
    assert list(seconds) == ["first", "large", "pointwise", "twice"]
    assert max(seconds, key=seconds.__getitem__) == "large"
    assert seconds["large"] > 0.5 * sum(seconds.values()) and min(seconds.values()) >= 0


def test_steps_without_a_layer_belong_to_the_one_before_or_else_the_next() -> None:
    steps = [
        (None, ["images"], ["rounded"]),
        (0, ["rounded"], ["a"]),
        (None, ["a"], ["pooled"]),
        (None, ["codes"], ["weight"]),
        (1, ["pooled", "weight"], ["b"]),
        (None, ["b", "a"], ["sum"]),
    ]
    assert owners(steps) == [0, 0, 0, 1, 1, 1]
    assert owners([(None, ["x"], ["y"])]) == [None]
    assert number_in("layer3_1/WithoutBiases") == 3 and number_in("layer.0.conv1") is None


def test_a_slower_moment_meets_both_networks_and_cancels(caplog: pytest.LogCaptureFixture) -> None:
    calm = {"dense": {"a": 4.0, "b": 2.0}, "level": {"a": 2.0, "b": 1.0}}
    calm |= {"dense whole": 6.6, "level whole": 3.3}
    busy = {"dense": {"a": 8.0, "b": 4.0}, "level": {"a": 2.0, "b": 2.0}}
    busy |= {"dense whole": 13.2, "level whole": 4.4}
    seconds, wholes = combined({"x": calm, "y": busy, "z": calm}, ["a", "b"])
    assert seconds["a"] == pytest.approx({"dense": 4.4, "x": 2.2, "y": 1.1, "z": 2.2})
    assert seconds["b"] == pytest.approx({"dense": 2.2, "x": 1.1, "y": 1.1, "z": 1.1})
    assert wholes["y"] == pytest.approx({"profiled": 2.0, "whole": 2.2}) and not caplog.text
    combined({"x": calm, "y": calm | {"level whole": 4.0}}, ["a", "b"])
    assert "at 1 of 2 levels" in caplog.text and "y: 0.75 times" in caplog.text


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database of two levels, rounded to nearest."""
    folder, dense = tmp_path_factory.mktemp("timings"), get_model("rn8", "digits")
    (folder / "models_quant").mkdir()
    for bits in (8, 4):
        model = copy.deepcopy(dense)
        for layer in find_layers(model).values():
            W = layer.weight.detach().flatten(1)
            quant.set_weight_grid(layer, grid := quant.fit_weight_grid(W, bits))
            layer.weight.data = grid(W).view_as(layer.weight)
            quant.set_activation_grid(layer, quant.fit_activation_grid(torch.rand(4096), bits))
        save_checkpoint(model.state_dict(), folder / "models_quant" / f"rn8_{bits}w{bits}a.pth")
    return folder


def timed(prefix: Path, *words: str) -> int:
    where = ["--prefix", str(prefix), "--score_path", str(prefix / "scores")]
    return database.main(["rn8", "digits", "mixed", "timings", *where, "--nsamples", "64", *words])


def test_spdy_reads_what_was_measured(prefix, monkeypatch, capfd) -> None:
    need("onnxscript", "onnxruntime")
    monkeypatch.setattr(timings, "SECONDS_A_LEVEL", 0.0)
    assert timed(prefix, "--int8-sums", "--batch", "2") == 0, capfd.readouterr().err
    path = prefix / "scores" / "rn8_mixed_timings.txt"
    seconds = read_scores(path, positive=True)
    assert list(seconds) == list(find_layers(get_model("rn8", "digits")))
    assert all(times.keys() == {"dense", "8w8a", "4w4a"} for times in seconds.values())
    assert all(0 < times["dense"] < 1 for times in seconds.values())
    record = json.loads(path.with_suffix(".json").read_text())
    assert record["runtime"].startswith("ONNX Runtime 1.") and record["environment"]["processor"]
    total = sum(times["8w8a"] for times in seconds.values())
    assert record["levels"]["8w8a"]["whole"] == pytest.approx(total)
    squared = {name: {"8w8a": 0.0, "4w4a": 1.0} for name in seconds}
    write_scores(prefix / "scores" / "rn8_mixed_squared.txt", squared)
    words = ["--dp", "--errors", "squared", "--timings", str(path), "--prefix", str(prefix)]
    scores = ["--score_path", str(prefix / "scores"), "--nsamples", "64"]
    assert spdy.main(["rn8", "digits", "0.01", "mixed", *words, *scores]) == 0
    assert "reached" in capfd.readouterr().out


def test_an_interrupted_measurement_goes_on_where_it_was(prefix, monkeypatch, capfd) -> None:
    need("onnxscript", "onnxruntime")
    names, calls = list(find_layers(get_model("rn8", "digits"))), []

    def times_beside(*words) -> dict:
        calls.append(words)
        if len(calls) == 2:
            raise KeyboardInterrupt
        times = {"dense": dict.fromkeys(names, 2.0), "level": dict.fromkeys(names, 1.0)}
        return times | {"dense whole": 16.0, "level whole": 8.0}

    monkeypatch.setattr(timings, "times_beside", times_beside)
    monkeypatch.setattr(timings, "exported", lambda *words: b"")
    assert timed(prefix, "--threads", "2") == 130
    assert timed(prefix, "--threads", "2") == 0 and len(calls) == 3
    assert "2 levels" in capfd.readouterr().out


def test_timings_of_another_kind_of_database_are_refused(prefix, capfd) -> None:
    path = prefix / "unstr.txt"
    layers = Database.open("mixed", "rn8", prefix).layers
    write_scores(
        path, {x: {"dense": 1.0, "8w8a": 0.5, "4w4a": 0.5} for x in layers}, {"database": "unstr"}
    )
    write_scores(
        prefix / "scores" / "rn8_mixed_squared.txt", {x: {"8w8a": 0.0, "4w4a": 1.0} for x in layers}
    )
    words = ["--dp", "--errors", "squared", "--timings", str(path), "--prefix", str(prefix)]
    assert (
        spdy.main(["rn8", "digits", "1.5", "mixed", *words, "--score_path", str(prefix / "scores")])
        == 2
    )
    assert "unstr.txt: made for a database of kind unstr, not mixed" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["loss", "--runtime", "openvino"], "--runtime belongs to timings"),
        (["eval", "--int8-sums"], "--int8-sums belongs to timings"),
        (["timings", "--batch", "0"], "--batch must be a whole number from 1"),
    ],
)
def test_bad_options_are_one_line(prefix, words, message, capfd) -> None:
    try:
        status = database.main(["rn8", "digits", "mixed", *words, "--prefix", str(prefix)])
    except SystemExit as stop:
        status = stop.code
    err = capfd.readouterr().err
    assert status == 2 and message in err and err.count("\n") == 1


class SignalStack(ctypes.Structure):
    """`stack_t` of signal.h."""

    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_stack_of_signals_outlives_networks_in_openvino() -> None:
    need("onnxscript", "openvino")
    network = timings.exported(get_model("rn8", "digits").eval(), (3, 8, 8), None)
    for made in [OpenVinoProfile(network, 1), openvino(network, 1)], [openvino(network, 1)] * 2:
        while made:  # the first one goes first
            del made[0]
            gc.collect()
    stack = SignalStack()
    ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack))
    ranges = [line.split()[0].split("-") for line in Path("/proc/self/maps").open()]
    assert any(int(a, 16) <= (stack.start or 0) < int(b, 16) for a, b in ranges)
