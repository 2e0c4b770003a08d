"""main_trueobs.py as a command: what it prints, what it writes, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import main_trueobs
from datautils import calibration_batches, load_data
from modelutils import SHIPPED_WEIGHTS, CifarResNet
from obc.inputs.files import save_checkpoint
from obc.toolkit.modes import MODES

ROOT = Path(__file__).resolve().parents[1]
QUICK = ("--nsamples", "128", "--noaug")
LAYERS = [
    "conv1",
    "layer1.0.conv1",
    "layer1.0.conv2",
    "layer2.0.conv1",
    "layer2.0.conv2",
    "layer3.0.conv1",
    "layer3.0.conv2",
    "linear",
]
GRID = ("--max-sparsity", "0.8", "--delta-sparse", "0.4")
LEVELS = [0.0, 0.4, 0.64, 0.784, 0.8]  # of GRID
FILES = ["rn8_0000.pth", "rn8_4000.pth", "rn8_6400.pth", "rn8_7840.pth", "rn8_8000.pth"]

State = dict[str, Tensor]


class Done(NamedTuple):
    """What a run of the command leaves on the terminal."""

    status: int
    out: str
    err: str


Command = Callable[..., Done]


def start(*words: object, **options) -> subprocess.Popen[str]:
    line = [sys.executable, str(ROOT / "main_trueobs.py"), *map(str, words)]
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)  # inherited: `… &` ignores it
    try:
        return subprocess.Popen(
            line, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
        )
    finally:
        signal.signal(signal.SIGINT, heard)


def in_a_process(*words: object) -> Done:
    process = start(*words)
    out, err = process.communicate(timeout=300)
    return Done(process.returncode, out, err)


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    """The command without the price of a process: 4 s of imports."""

    def run(*words: object) -> Done:
        capfd.readouterr()
        try:
            status = main_trueobs.main([str(word) for word in words])
        except SystemExit as stop:
            status = stop.code
        return Done(status, *capfd.readouterr())

    return run


def read(path: Path) -> State:
    state = torch.load(path, weights_only=True)
    assert isinstance(state, dict)
    assert all(isinstance(tensor, Tensor) for tensor in state.values())
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    return state


def record_of(path: Path) -> dict:
    return json.loads(path.with_suffix(".json").read_text())


def accuracy(done: Done) -> float:
    assert done.status == 0, done.err
    found = re.fullmatch(r"top-1 (\d+\.\d\d)", done.out.splitlines()[-1])
    assert found, done.out
    return float(found[1])


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def dense() -> State:
    return read(SHIPPED_WEIGHTS["rn8", "digits"])


@pytest.fixture(scope="module")
def quant_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, Path]:
    """rn8 at 4 bits, made by a process of its own."""
    path = tmp_path_factory.mktemp("quant") / "deep" / "rn8_4w.pth"
    return in_a_process("rn8", "digits", "quant", "--wbits", 4, "--save", path, *QUICK), path


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """rn8 pruned to 2:4."""
    path = tmp_path_factory.mktemp("nm") / "rn8_24.pth"
    words = ["rn8", "digits", "nmprune", "--save", str(path), *QUICK]
    assert main_trueobs.main(words) == 0
    return path


# -- quant -----------------------------------------------------------------------------------------


def check_on_grid(state: State, layer: str, bits: int) -> None:
    """Weights are scale · (code − zero) to the last bit, with codes of `bits` bits."""
    grid = f"{layer}.weight_quant"
    scale, zero, maxq = (state[f"{grid}.{part}"] for part in ("scale", "zero", "maxq"))
    weight = state[f"{layer}.weight"].flatten(1)
    code = torch.round(weight / scale) + zero
    assert int(maxq) == 2**bits - 1
    assert code.min() >= 0 and code.max() <= maxq
    assert torch.equal(scale * (code - zero), weight)


def test_a_run_shows_and_leaves_what_it_should(quant_run, dense):
    done, path = quant_run
    assert accuracy(done) > 97
    assert done.out.count("\n") == 2
    assert tree(path.parent) == ["rn8_4w.json", "rn8_4w.pth"]
    top1, advice, *lines = done.err.splitlines()
    assert top1.startswith("dense: top-1 100.00 on 128 calibration images, 16×16 pixels, ")
    assert "1.6 times): try --wasym" in advice
    assert [line.split()[0] for line in lines] == LAYERS
    for line in lines:
        assert re.fullmatch(r"\S+ [\d×]+ \d+\.\d\d s  squared error \S+ \(\S+ %\)  4 bits.*", line)
    state = read(path)
    for layer in LAYERS:
        check_on_grid(state, layer, 4)
        assert not torch.equal(state[f"{layer}.weight"], dense[f"{layer}.weight"])
    others = dense.keys() - {f"{layer}.weight" for layer in LAYERS}
    assert others and all(torch.equal(state[key], dense[key]) for key in others)


def test_the_record_tells_arguments_machine_and_layers(quant_run):
    done, path = quant_run
    record = record_of(path)
    assert record["arguments"]["wbits"] == 4 and record["arguments"]["seed"] == 0
    assert record["environment"]["torch"] == torch.__version__
    assert record["top1"] == pytest.approx(accuracy(done), abs=0.005)
    kl, agreement = float(done.out.split()[-5]), float(done.out.split()[-3])
    assert record["kl"] == pytest.approx(kl, rel=0.01) and 0 < kl < 0.1
    assert record["agreement"] == pytest.approx(agreement, abs=0.005) and agreement > 97
    assert record["seconds"] > 0
    assert [layer["name"] for layer in record["layers"]] == LAYERS
    for layer, line in zip(record["layers"], done.err.splitlines()[2:], strict=True):
        assert layer["result"] == "4 bits" and not layer["dense"]
        assert layer["shape"] and layer["seconds"] > 0
        assert 0 < layer["relative_error"] < 0.01
        assert f"squared error {layer['squared_error']:.4g} " in line
        assert (layer["damping"] > 0) == ("damping" in line)


def test_two_runs_are_equal_to_the_last_bit(quant_run, tmp_path):
    words = ["rn8", "digits", "quant", "--wbits", 4, "--save", tmp_path / "again.pth", *QUICK]
    assert in_a_process(*words).status == 0
    assert (tmp_path / "again.pth").read_bytes() == quant_run[1].read_bytes()


def test_the_seed_chooses_the_images(quant_run, command, tmp_path):
    path = tmp_path / "seed1.pth"
    done = command("rn8", "digits", "quant", "--wbits", 4, "--save", path, *QUICK, "--seed", 1)
    assert accuracy(done) > 97
    assert not same(read(path), read(quant_run[1]))


def quantise(command: Command, path: Path, *words: object) -> State:
    assert accuracy(command("rn8", "digits", "quant", *words, "--save", path, *QUICK)) > 90
    return read(path)


def test_weight_grid_for_a_whole_layer(command, tmp_path):
    state = quantise(command, tmp_path / "q.pth", "--wbits", 4, "--wperweight")
    for layer in LAYERS:
        check_on_grid(state, layer, 4)
        assert len(state[f"{layer}.weight_quant.scale"].unique()) == 1


def test_asymmetric_weight_grid(command, tmp_path):
    state = quantise(command, tmp_path / "q.pth", "--wbits", 4, "--wasym")
    for layer in LAYERS:
        check_on_grid(state, layer, 4)
        assert (state[f"{layer}.weight_quant.zero"] != 8).any()


def test_min_max_weight_range(command, tmp_path, dense):
    state = quantise(command, tmp_path / "q.pth", "--wbits", 4, "--wminmax")
    for layer in LAYERS:
        check_on_grid(state, layer, 4)
        widest = dense[f"{layer}.weight"].flatten(1).abs().amax(1, keepdim=True)
        torch.testing.assert_close(state[f"{layer}.weight_quant.scale"], 2 * widest / 15)


def activation_grids(state: State, bits: int) -> State:  # zero point by layer
    for layer in LAYERS:
        assert int(state[f"{layer}.act_quant.maxq"]) == 2**bits - 1
        assert state[f"{layer}.act_quant.scale"].shape == ()
    return {layer: state[f"{layer}.act_quant.zero"] for layer in LAYERS}


def test_activations_are_asymmetric_by_search(command, tmp_path):
    state = quantise(command, tmp_path / "q.pth", "--wbits", 4, "--abits", 4)
    zeros = activation_grids(state, 4)
    assert all(zeros[layer] == 0 for layer in LAYERS if layer != "conv1")  # after a ReLU
    assert 0 < zeros["conv1"] < 15
    check_on_grid(state, "linear", 4)


def test_symmetric_activations_of_min_max_range(command, tmp_path):
    state = quantise(command, tmp_path / "q.pth", "--abits", 8, "--asym", "--aminmax")
    assert all(zero == 128 for zero in activation_grids(state, 8).values())
    data = load_data("digits", nsamples=128)
    images, _ = next(iter(calibration_batches(data, batchsize=128)))
    torch.testing.assert_close(state["conv1.act_quant.scale"], 2 * images.abs().max() / 255)


def test_min_max_range_of_activations(command, tmp_path, dense):
    state = quantise(command, tmp_path / "q.pth", "--abits", 8, "--aminmax")
    activation_grids(state, 8)
    data = load_data("digits", nsamples=128)
    images, _ = next(iter(calibration_batches(data, batchsize=128)))
    step = (images.max() - images.min()) / 255
    torch.testing.assert_close(state["conv1.act_quant.scale"], step)
    assert all(torch.equal(state[key], dense[key]) for key in dense)  # 32 bits


# -- N:M -------------------------------------------------------------------------------------------


def groups(weight: Tensor, size: int) -> Tensor:  # (groups, size) along the input channels
    return weight.movedim(1, -1).reshape(-1, size)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4)])
def test_nm_counts_along_input_channels(n, m, command, tmp_path, dense):
    path = tmp_path / "nm.pth"
    words = ["--prunen", n, "--prunem", m, "--save", path]
    done = command("rn8", "digits", "nmprune", *words, *QUICK)
    assert accuracy(done) > 95
    state = read(path)
    for layer in LAYERS[1:]:
        assert ((groups(state[f"{layer}.weight"], m) == 0).sum(1) == n).all(), layer
    assert torch.equal(state["conv1.weight"], dense["conv1.weight"])
    assert f"conv1 16×3×3×3 left dense: 3 input channels are not a multiple of M = {m}" in done.err
    first, *others = record_of(path)["layers"]
    assert first["dense"] and "3 input channels" in first["result"]
    assert not any(layer["dense"] for layer in others)


def test_a_pruned_checkpoint_keeps_its_zeros_when_quantised(pruned, command, tmp_path):
    path = tmp_path / "rn8_24_4w8a.pth"
    words = ["--wbits", 4, "--abits", 8, "--aminmax", "--load", pruned, "--save", path]
    assert accuracy(command("rn8", "digits", "quant", *words, *QUICK)) > 90
    before, after = read(pruned), read(path)
    for layer in LAYERS:
        check_on_grid(after, layer, 4)
        zeros = before[f"{layer}.weight"] == 0
        assert (after[f"{layer}.weight"][zeros] == 0).all()
        if layer != "conv1":  # left dense
            assert (zeros.movedim(1, -1).reshape(-1, 4).sum(1) == 2).all()


def test_quantised_weights_are_neither_quantised_again_nor_pruned(quant_run, command, tmp_path):
    again = tmp_path / "again.pth"
    words = ["rn8", "digits", "--load", quant_run[1], "--save", again, *QUICK]
    for mode in (["quant", "--wbits", 3], ["quant", "--wbits", 4, "--abits", 8], ["nmprune"]):
        done = command(*words[:2], *mode, *words[2:])
        assert done.status == 2 and "prune first, then quantise" in done.err
        assert done.err.count("\n") == 1 and not again.exists()
    done = command("rn8", "digits", "unstr", "--load", quant_run[1], "--sparse-dir", tmp_path)
    assert done.status == 2 and "quantised already" in done.err
    # Other grids for the activations leave the weights as they are.
    activations = ["quant", "--abits", 6, "--aminmax"]
    assert accuracy(command(*words[:2], *activations, *words[2:])) > 90
    before, after = read(quant_run[1]), read(again)
    for layer in LAYERS:
        assert torch.equal(before[f"{layer}.weight"], after[f"{layer}.weight"])
        assert int(after[f"{layer}.act_quant.maxq"]) == 63


@pytest.mark.parametrize("alias", ["same", "relative", "symbolic link", "hard link"])
@pytest.mark.parametrize("option", ["--weights", "--load"])
def test_what_a_run_starts_from_is_not_overwritten(option, alias, command, tmp_path, dense):
    source, save = tmp_path / "dense.pth", tmp_path / "other.pth"
    save_checkpoint(dense, source)
    content = source.read_bytes()
    if alias == "same":
        save = source
    elif alias == "relative":
        (tmp_path / "folder").mkdir()
        save = tmp_path / "folder" / ".." / "dense.pth"
    elif alias == "symbolic link":
        save.symlink_to(source)
    else:
        save.hardlink_to(source)
    done = command("rn8", "digits", "quant", "--wbits", 4, option, source, "--save", save, *QUICK)
    assert done.status == 2 and f"would overwrite {option} {source}" in done.err
    assert done.err.count("\n") == 1 and source.read_bytes() == content


def test_levels_and_shipped_weights_are_not_overwritten(command, tmp_path, dense, monkeypatch):
    level = tmp_path / "models_unstr" / "rn8_0000.pth"
    save_checkpoint(dense, level)
    folder = ["--sparse-dir", level.parent, "--delta-sparse", 0.9]
    done = command("rn8", "digits", "unstr", "--weights", level, *folder, *QUICK)
    assert done.status == 2 and f"would overwrite --weights {level}" in done.err
    shipped = tmp_path / "shipped.pth"  # a copy, should the test fail
    save_checkpoint(dense, shipped)
    monkeypatch.setitem(SHIPPED_WEIGHTS, ("rn8", "digits"), shipped)
    before = shipped.read_bytes()
    done = command("rn8", "digits", "quant", "--wbits", 4, "--save", shipped, *QUICK)
    assert done.status == 2 and "would overwrite the shipped weights" in done.err
    assert shipped.read_bytes() == before
    # With other weights, nothing that this run starts from is there.
    saved = tmp_path / "saved.pth"
    for _ in range(2):  # the second run replaces the first one's output
        words = ["quant", "--wbits", 8, "--weights", level, "--save", saved]
        assert accuracy(command("rn8", "digits", *words, *QUICK)) > 97


# -- the baselines: --order ------------------------------------------------------------------------


def test_nearest_is_rounding_on_the_same_grid(command, tmp_path, dense):
    path = tmp_path / "q.pth"
    state = quantise(command, path, "--wbits", 3, "--wasym", "--order", "nearest")
    record = record_of(path)
    assert record["arguments"]["order"] == record["fingerprint"]["--order"] == "nearest"
    obs = quantise(command, tmp_path / "obs.pth", "--wbits", 3, "--wasym")
    for layer in LAYERS:
        scale, zero, maxq = (state[f"{layer}.weight_quant.{x}"] for x in ("scale", "zero", "maxq"))
        rows = dense[f"{layer}.weight"].flatten(1)
        codes = (torch.round(rows / scale) + zero).clamp(0, maxq)
        assert torch.equal(state[f"{layer}.weight"].flatten(1), scale * (codes - zero))
        assert torch.equal(scale, obs[f"{layer}.weight_quant.scale"])
        assert not torch.equal(state[f"{layer}.weight"], obs[f"{layer}.weight"])


def test_magnitude_removes_the_smallest_weights_of_a_layer(command, tmp_path, dense):
    states = make_database(command, tmp_path / "db", "unstr", "--order", "magnitude")
    for state, sparsity in zip(states, LEVELS, strict=True):
        for layer in LAYERS:
            wanted = dense[f"{layer}.weight"].flatten().clone()
            wanted[wanted.abs().argsort()[: math.ceil(len(wanted) * sparsity - 1e-6)]] = 0
            assert torch.equal(state[f"{layer}.weight"].flatten(), wanted), (layer, sparsity)


def test_magnitude_removes_the_smallest_weights_of_every_group(command, tmp_path, dense):
    path = tmp_path / "nm.pth"
    done = command("rn8", "digits", "nmprune", "--order", "magnitude", "--save", path, *QUICK)
    assert accuracy(done) > 50
    assert "sparsity 0.5000 (2:4), magnitude" in done.err
    state = read(path)
    for layer in LAYERS[1:]:
        before, after = (groups(x[f"{layer}.weight"], 4) for x in (dense, state))
        assert torch.equal(after, before.scatter(1, before.abs().argsort(1)[:, :2], 0.0)), layer


# -- databases -------------------------------------------------------------------------------------


def make_database(command: Command, folder: Path, mode: str, *words: object) -> list[State]:
    done = command("rn8", "digits", mode, "--sparse-dir", folder, *GRID, *words, *QUICK)
    assert done.status == 0, done.err
    assert tree(folder) == ["rn8.json", *FILES]
    assert [layer["name"] for layer in record_of(folder / "rn8.pth")["layers"]] == LAYERS
    return [read(folder / name) for name in FILES]


def check_levels(states: list[State], layer: str, zero_units: Callable[[Tensor], Tensor]) -> None:
    """Exactly ceil(units · sparsity) units are zero, and those of a level stay so in the next."""
    before = None
    for state, sparsity in zip(states, LEVELS, strict=True):
        zero = zero_units(state[f"{layer}.weight"])
        assert int(zero.sum()) == math.ceil(zero.numel() * sparsity - 1e-6), (layer, sparsity)
        assert before is None or not (before & ~zero).any()
        before = zero


def check_rest_is_dense(states: list[State], dense: State, layers: list[str]) -> None:
    weights = {f"{layer}.weight" for layer in layers}
    for state in states:
        assert state.keys() == dense.keys()
        assert all(torch.equal(state[key], dense[key]) for key in dense if key not in weights)
    assert same(states[0], dense)


def test_unstructured_levels(command, tmp_path, dense):
    states = make_database(command, tmp_path / "models_unstr", "unstr")
    for layer in LAYERS:
        check_levels(states, layer, lambda weight: weight == 0)
    check_rest_is_dense(states, dense, LAYERS)


def test_blocked_levels(command, tmp_path, dense):
    states = make_database(command, tmp_path / "models_4block", "blocked")
    for layer in LAYERS[1:]:
        check_levels(states, layer, lambda weight: (groups(weight, 4) == 0).all(1))
        check_levels(states, layer, lambda weight: (groups(weight, 4) == 0).any(1))  # whole blocks
    check_rest_is_dense(states, dense, LAYERS[1:])


def test_block_size(command, tmp_path):
    states = make_database(command, tmp_path / "db", "blocked", "--blocked_size", 8)
    check_levels(states, "linear", lambda weight: (groups(weight, 8) == 0).all(1))


def test_structured_levels_drop_whole_input_channels(command, tmp_path, dense):
    states = make_database(command, tmp_path / "models_struct", "struct")
    for layer in LAYERS:
        check_levels(states, layer, lambda weight: (weight == 0).transpose(0, 1).flatten(1).all(1))
    check_rest_is_dense(states, dense, LAYERS)


def test_default_grids():
    grids = {name: mode().sparsities for name, mode in MODES.items() if mode.yields_levels}
    assert {mode: (grid[0], grid[-1], len(grid)) for mode, grid in grids.items()} == {
        "unstr": (0.0, 0.99, 45),
        "blocked": (0.0, 0.95, 30),
        "struct": (0.0, 0.9, 46),
    }
    for mode, grid in grids.items():
        factor = 0.95 if mode == "struct" else 0.9
        inner = [1 - s for s in grid[:-1]]
        assert all(b / a == pytest.approx(factor) for a, b in zip(inner, inner[1:], strict=False))


def test_a_pruned_checkpoint_can_be_pruned_further(pruned, command, tmp_path):
    words = [
        "--load",
        pruned,
        "--sparse-dir",
        tmp_path / "db",
        "--min-sparsity",
        0.7,
        "--max-sparsity",
        0.7,
    ]
    assert command("rn8", "digits", "unstr", *words, *QUICK).status == 0
    before, after = read(pruned), read(tmp_path / "db" / "rn8_7000.pth")
    for layer in LAYERS[1:]:
        weight = after[f"{layer}.weight"]
        assert (weight[before[f"{layer}.weight"] == 0] == 0).all()
        assert int((weight == 0).sum()) == math.ceil(0.7 * weight.numel() - 1e-6)


# -- weights, models and devices of the user's own -------------------------------------------------


def test_foreign_checkpoints_and_safetensors(pruned, command, tmp_path, dense):
    wrapped = {"epoch": 7, "state_dict": {f"module.{key}": t for key, t in dense.items()}}
    torch.save(wrapped, tmp_path / "foreign.th")
    save_file(dense, tmp_path / "dense.safetensors")
    outputs = [tmp_path / "a.safetensors", tmp_path / "b.pth"]
    for weights, output in zip(("foreign.th", "dense.safetensors"), outputs, strict=True):
        words = ["--weights", tmp_path / weights, "--save", output]
        assert accuracy(command("rn8", "digits", "nmprune", *words, *QUICK)) > 97
    assert same(load_file(outputs[0]), read(pruned))
    assert same(read(outputs[1]), read(pruned))


def test_safetensors_with_grids_come_back(command, tmp_path):
    path = tmp_path / "q.safetensors"
    words = ["rn8", "digits", "quant", "--wbits", 4, "--abits", 8, "--aminmax", *QUICK]
    first = command(*words, "--save", path)
    assert accuracy(first) > 97
    words = ["rn8", "digits", "quant", "--abits", 8, "--aminmax", *QUICK]
    assert accuracy(command(*words, "--load", path)) == accuracy(first)


USER_MODEL = '''
import torch
from torch import nn

class Tokens(nn.Module):
    """(n, 16, s, s) -> (n, s * s, 16)"""
    def forward(self, x):
        return x.flatten(2).transpose(1, 2)

class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)

def build(classes=10):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding="same", groups=8), nn.ReLU(),
        nn.Conv2d(8, 16, 3, dilation=2, padding=2, groups=2, padding_mode="reflect"), nn.ReLU(),
        Tokens(), nn.Linear(16, 12), nn.GELU(), Mean(), nn.Linear(12, classes))

def five():
    return build(5)

def large_kernel():
    return nn.Sequential(nn.Conv2d(3, 10, 33), nn.Flatten())

def without_layers():
    return nn.Sequential(nn.Flatten(), nn.Softmax(1))

def with_nan():
    model = build()
    model[-1].weight.data[0, 0] = float("nan")
    return model
'''


@pytest.fixture
def user_model(tmp_path: Path) -> str:
    folder = tmp_path / "user"
    folder.mkdir()
    (folder / "my_model.py").write_text(USER_MODEL)
    return f"{folder / 'my_model.py'}:"


def test_a_users_model_with_depthwise_grouped_and_token_layers(user_model, command, tmp_path):
    model = f"{user_model}build"
    layers = ["0", "2", "4", "7", "10"]
    path = tmp_path / "q.pth"
    accuracy(command(model, "digits", "quant", "--wbits", 4, "--abits", 8, "--save", path, *QUICK))
    state = read(path)
    for layer in layers:
        check_on_grid(state, layer, 4)
    path = tmp_path / "nm.pth"
    done = command(model, "digits", "nmprune", "--save", path, *QUICK)
    accuracy(done)
    left = {layer["name"]: layer["dense"] for layer in record_of(path)["layers"]}
    assert left == {"0": True, "2": True, "4": False, "7": False, "10": False}  # 27 and 9 columns
    state = read(path)
    assert all(((groups(state[f"{layer}.weight"], 4) == 0).sum(1) == 2).all() for layer in "47")
    for mode in ("unstr", "struct"):
        folder = tmp_path / mode
        words = ["--sparse-dir", folder, "--max-sparsity", 0.5, "--delta-sparse", 0.5]
        assert command(model, "digits", mode, *words, *QUICK).status == 0
        assert tree(folder) == ["build.json", "build_0000.pth", "build_5000.pth"]
        weight = read(folder / "build_5000.pth")["2.weight"]
        assert int((weight == 0).sum()) == weight.numel() // 2


def test_what_is_in_no_layer_is_told(caplog):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose1d(8, 8, 3), nn.Embedding(4, 8))
    with caplog.at_level("INFO", "trueobs"):
        main_trueobs.report_other_weights(model)
        main_trueobs.report_other_weights(model[0])
    assert caplog.messages == [
        "left dense, in no layer to compress: 1.weight (ConvTranspose1d), 2.weight (Embedding) "
        "(49 % of all parameters)"
    ]


def test_a_users_model_takes_weights(user_model, command, tmp_path):
    words = [f"{user_model}build", "digits", "nmprune", *QUICK]
    accuracy(command(*words, "--save", tmp_path / "a.pth"))
    doubled = {key: 2 * tensor for key, tensor in read(tmp_path / "a.pth").items()}
    torch.save(doubled, tmp_path / "w.pth")
    accuracy(command(*words, "--weights", tmp_path / "w.pth", "--save", tmp_path / "b.pth"))
    first = "0.weight"  # left dense
    assert torch.equal(read(tmp_path / "b.pth")[first], doubled[first])


def test_little_memory_and_the_same_result(pruned, command, tmp_path):
    path = tmp_path / "rn8_24.pth"
    words = ["--memory", "0.0198", "--save", path]
    done = command("rn8", "digits", "nmprune", *words, *QUICK)
    assert accuracy(done) > 97
    assert same(read(path), read(pruned))


def test_augmented_rounds(command, tmp_path):
    path = tmp_path / "q.pth"
    words = ["--wbits", 4, "--nsamples", 64, "--nrounds", 2, "--save", path]
    assert accuracy(command("rn8", "digits", "quant", *words)) > 97
    assert record_of(path)["arguments"]["nrounds"] == 2


def run_on(device: str, words: str, path: Path) -> tuple[float, dict[str, float]]:
    """Top-1 and the squared error of every layer."""
    argv = ["rn8", "digits", *words.split(), "--device", device, "--save", str(path), *QUICK]
    assert main_trueobs.main(argv) == 0
    record = record_of(path)
    return record["top1"], {layer["name"]: layer["squared_error"] for layer in record["layers"]}


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", id="what a GPU runs, on the CPU"),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("words", ["quant --wbits 4", "quant --wbits 3 --abits 4", "nmprune"])
def test_a_gpu_gives_what_a_cpu_gives(
    words: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Top-1 within 0.1, every layer's squared error within 0.1 %."""
    wanted_top1, wanted = run_on("cpu", words, tmp_path / "compiled.pth")
    for module in ("elimination", "levels"):
        monkeypatch.setattr(f"obc.solver.{module}.compiled_engine", lambda: None)
    top1, errors = run_on(device, words, tmp_path / "in_torch.pth")
    assert top1 == pytest.approx(wanted_top1, abs=0.1)
    assert errors == pytest.approx(wanted, rel=1e-3)
    assert all(x.device.type == "cpu" for x in read(tmp_path / "in_torch.pth").values())


# -- bad input -------------------------------------------------------------------------------------


class Harmful:
    """Unpickling this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def bad(tmp_path: Path, user_model: str, pruned: Path, dense: State) -> Path:
    """A folder with everything that the command must refuse."""
    contents = SHIPPED_WEIGHTS["rn8", "digits"].read_bytes()
    (tmp_path / "corrupt.pth").write_bytes(b"no checkpoint at all" * 100)
    (tmp_path / "truncated.pth").write_bytes(contents[: len(contents) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save(CifarResNet(3).state_dict(), tmp_path / "rn20.pth")
    torch.save({"weights": Harmful(tmp_path / "code_ran")}, tmp_path / "harmful.pth")
    nan = {key: tensor.clone() for key, tensor in dense.items()}
    nan["linear.weight"][0, 0] = math.nan
    torch.save(nan, tmp_path / "nan.pth")
    for part in ("train", "val"):
        (tmp_path / "images" / part / "zero").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "file").write_text("a regular file")
    return tmp_path


QUANT = "quant --wbits 4 --save out/q.pth"
UNSTR = "unstr --sparse-dir out"
REFUSED = {  # arguments, with files in the folder `bad` -> a part of the error
    "unknown model": (f"rn9 digits {QUANT}", "unknown model rn9; did you mean rn8"),
    "unknown dataset": (f"rn8 mnist {QUANT}", "unknown dataset mnist"),
    "unknown mode": ("rn8 digits distil", "MODE: invalid choice: 'distil'"),
    "no mode": ("rn8 digits", "MODE"),
    "unknown option": (f"rn8 digits {QUANT} --wbit 4", "--wbit"),
    "no such weights": (f"rn8 digits {QUANT} --weights none.pth", "no such file"),
    "no such checkpoint": (f"rn8 digits {QUANT} --load none.pth", "no such file"),
    "corrupt": (f"rn8 digits {QUANT} --load corrupt.pth", "cannot be read"),
    "truncated": (f"rn8 digits {QUANT} --load truncated.pth", "cannot be read"),
    "empty": (f"rn8 digits {QUANT} --weights empty.pth", "cannot be read"),
    "another model's": (f"rn8 digits {QUANT} --load rn20.pth", "does not fit the model"),
    "another's weights": (f"rn8 digits {QUANT} --weights rn20.pth", "does not fit the model"),
    "code, loaded": (f"rn8 digits {QUANT} --load harmful.pth", "refuse to load"),
    "code, as weights": (f"rn8 digits {QUANT} --weights harmful.pth", "refuse to load"),
    "NaN": (f"rn8 digits {QUANT} --weights nan.pth", "linear.weight has NaN"),
    "NaN, loaded": (f"rn8 digits {QUANT} --load nan.pth", "linear.weight has NaN"),
    "empty folder": (f"rn8 folder {QUANT} --datapath images --image-size 16", "no images"),
    "baseline of quant": (
        "rn8 digits nmprune --order nearest --save out/q.pth",
        "--order nearest is not for nmprune: choose obs or magnitude",
    ),
    "baseline of pruning": (
        f"rn8 digits {QUANT} --order magnitude",
        "--order magnitude is not for quant: choose obs or nearest",
    ),
    "another mode's": (
        "rn8 digits quant --wbits 4 --min-sparsity 0.1 --save out/q.pth",
        "--min-sparsity belongs to unstr, blocked and struct, not to quant",
    ),
    "N > M": ("rn8 digits nmprune --prunen 5 --prunem 4 --save out/q.pth", "--prunen 5 is more"),
    "0 bits": ("rn8 digits quant --wbits 0 --save out/q.pth", "--wbits must be 1 to 16"),
    "33 bits": ("rn8 digits quant --abits 33 --save out/q.pth", "--abits must be 1 to 16"),
    "nothing to quantise": ("rn8 digits quant --save out/q.pth", "--wbits or --abits"),
    "95 %": (f"rn8 digits {UNSTR} --max-sparsity 95", "Did you mean 0.95?"),
    "empty grid": (f"rn8 digits {UNSTR} --min-sparsity 0.9 --max-sparsity 0.5", "is above"),
    "below a file": ("rn8 digits nmprune --save file/q.pth", "cannot be written"),
    "folder below a file": ("rn8 digits unstr --sparse-dir file/db", "cannot be written"),
    "onto a folder": ("rn8 digits nmprune --save folder.pth", "is a directory"),
    "--save of many": ("rn8 digits unstr --save out/q.pth", "--sparse-dir"),
    "no --sparse-dir": ("rn8 digits blocked", "--sparse-dir"),
    "--sparse-dir of one": ("rn8 digits nmprune --sparse-dir out", "--save"),
    "no layer": (f"user/my_model.py:without_layers digits {QUANT}", "no convolution or linear"),
    "no function": (f"user/my_model.py:other digits {QUANT}", "no function other"),
    "no file": (f"user/none.py:build digits {QUANT}", "there is no file"),
    "no images": ("rn8 digits nmprune --nsamples 0", "--nsamples must be"),
    "unknown device": ("rn8 digits nmprune --device gpu", "--device must be"),
}


def check_refused(done: Done, part: str, before: list[str], folder: Path) -> None:
    """One line, status 2, and nothing else anywhere."""
    assert done.status == 2
    assert done.out == ""
    assert done.err.startswith("error: ") and done.err.count("\n") == 1, done.err
    assert part in done.err
    assert tree(folder) == before


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_line(case, bad, command, monkeypatch):
    words, part = REFUSED[case]
    monkeypatch.chdir(bad)
    before = tree(bad)
    check_refused(command(*words.split()), part, before, bad)


@pytest.mark.parametrize("case", ["unknown model", "code, loaded", "truncated", "95 %"])
def test_bad_input_is_one_line_in_a_process_too(case, bad):
    words, part = REFUSED[case]
    files = {word for word in words.split() if word.endswith(".pth") or word == "out"}
    line = [bad / word if word in files else word for word in words.split()]
    check_refused(in_a_process(*line), part, tree(bad), bad)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_no_gpu(device, command, tmp_path):
    done = command("rn8", "digits", "nmprune", "--device", device, "--save", tmp_path / "q.pth")
    check_refused(done, "sees no GPU", [], tmp_path)


def test_no_layer_fits(bad, command):
    words = ["--blocked_size", 1000, "--sparse-dir", bad / "out", *QUICK]
    before = tree(bad)
    done = command("rn8", "digits", "blocked", *words)
    _, *layers, error = done.err.splitlines()
    assert done.status == 2 and done.out == ""
    assert len(layers) == len(LAYERS) and all("left dense" in line for line in layers)
    assert error.startswith("error: no layer can be compressed")
    assert tree(bad) == before


def last_line_is_an_error(done: Done) -> bool:
    return done.status == 2 and done.out == "" and done.err.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize(
    "mode", [QUANT, "nmprune --save out/q.pth", UNSTR, "struct --sparse-dir out"]
)
def test_a_users_weights_are_nan(mode, bad, command, monkeypatch):
    monkeypatch.chdir(bad)
    before = tree(bad)
    words = ["user/my_model.py:with_nan", "digits", *mode.split(), *QUICK]
    assert last_line_is_an_error(command(*words))
    assert tree(bad) == before


@pytest.mark.parametrize(
    "words",
    [
        f"rn9 digits {QUANT}",
        f"rn9 digits {UNSTR}",
        "rn8 digits nmprune --load rn20.pth --save out/q.pth",
    ],
)
def test_no_empty_folder_is_left_of_what_is_refused(words, bad, command, monkeypatch):
    monkeypatch.chdir(bad)
    (bad / "out").rmdir()
    before = tree(bad)
    assert last_line_is_an_error(command(*words.split()))
    assert tree(bad) == before


def test_a_model_of_too_few_classes_leaves_nothing(bad, command, monkeypatch):
    monkeypatch.chdir(bad)
    before = tree(bad)
    assert last_line_is_an_error(command("user/my_model.py:five", "digits", *QUANT.split(), *QUICK))
    assert tree(bad) == before


def test_images_too_small_for_the_model(bad, command, monkeypatch):
    monkeypatch.chdir(bad)
    words = ["user/my_model.py:large_kernel", "digits", *QUANT.split(), *QUICK]
    check_refused(command(*words), "", tree(bad), bad)


@pytest.mark.parametrize("save", ["out/q.json", "out/taken.pth"])
def test_the_record_needs_a_place_too(save, bad, command, monkeypatch):
    monkeypatch.chdir(bad)
    (bad / "out" / "taken.json").mkdir()
    words = ["rn8", "digits", "nmprune", "--save", save, *QUICK]
    check_refused(command(*words), "", tree(bad), bad)


def test_levels_too_close_for_their_names(bad, command, monkeypatch):
    monkeypatch.chdir(bad)
    words = [*UNSTR.split(), "--max-sparsity", "0.0001", "--delta-sparse", "0.00005", *QUICK]
    check_refused(command("rn8", "digits", *words), "--delta-sparse", tree(bad), bad)


def test_grids_that_do_not_fit(quant_run, command, tmp_path):
    state = read(quant_run[1])
    for part in ("scale", "zero", "maxq"):
        state[f"linear.act_quant.{part}"] = torch.ones(3)
    path = tmp_path / "odd.pth"
    torch.save(state, path)
    done = command("rn8", "digits", "quant", "--wbits", 4, "--load", path, *QUICK)
    check_refused(done, "linear.act_quant", ["odd.pth"], tmp_path)


# -- interrupted -----------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["nmprune --save {}/q.pth", "unstr --sparse-dir {}"])
def test_a_killed_run_leaves_nothing_under_a_final_name(words, tmp_path):
    process = start("rn8", "digits", *words.format(tmp_path).split(), *QUICK)
    assert process.stderr.readline().startswith("dense: ")
    assert process.stderr.readline().startswith("conv1 ")  # now it is at work
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]


def test_what_is_left_of_something_else_is_not_taken(command, tmp_path):
    partial = tmp_path / "db" / ".rn8.partial"
    partial.mkdir(parents=True)
    (partial / "conv1.safetensors").write_bytes(b"half a file, no fingerprint")
    make_database(command, tmp_path / "db", "unstr")
    assert not partial.exists()


@pytest.mark.parametrize("words", ["nmprune --save {}/q.pth", "unstr --sparse-dir {}"])
def test_an_interrupted_run_leaves_what_is_done_hidden(words, tmp_path):
    process = start("rn8", "digits", *words.format(tmp_path).split(), *QUICK)
    _, first = (process.stderr.readline() for _ in range(2))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert first.startswith("conv1 ")
    assert process.returncode == 130
    assert out == "" and err.splitlines()[-1] == "error: interrupted"
    assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
    assert not [name for name in tree(tmp_path) if name.endswith(".tmp")]


# -- claims that cannot be believed ----------------------------------------------------------------

POSITIONS = {"conv1": 256, "layer1": 256, "layer2": 64, "layer3": 16, "linear": 1}  # of 16² pixels
WIDE = """
import torch
from torch import nn

class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.grouped = nn.Conv2d(3, 6, 3, stride=8, padding=1, groups=3)
        self.head = nn.Linear(6 * 4, 2000)
        self.last = nn.Linear(2000, 10)

    def forward(self, x):
        return self.last(self.head(self.grouped(x).flatten(1)).relu())

def wide():
    return Wide().eval()
"""


def believed(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("warning: do not believe")]


@pytest.mark.parametrize("more", [[], ["--shards", 3], ["--nrounds", 4], ["--cache", "cache"]])
def test_layers_that_saw_fewer_patches_than_columns_are_named(more, command, tmp_path):
    more = [tmp_path / word if word == "cache" else word for word in more]
    words = ["--wbits", 4, "--noaug", "--save", tmp_path / "q.pth", *more]
    for _ in range(2 if "--cache" in more else 1):
        done = command("rn8", "digits", "quant", "--nsamples", 32, *words)
    (line,) = believed(done.err)
    assert "--nsamples 64 would do: layer3.0.conv2 (512 for 576), linear (32 for 64)" in line
    assert done.err.splitlines().index(line) >= len(done.err.splitlines()) - 2
    for report in record_of(tmp_path / "q.pth")["layers"]:
        assert report["patches"] == 32 * POSITIONS[report["name"].partition(".")[0]]
    assert believed(command("rn8", "digits", "quant", "--nsamples", 64, *words).err) == []


def test_augmented_passes_are_patches_of_their_own(command, tmp_path):
    words = ["--nrounds", 2, "--save", tmp_path / "nm.pth"]
    done = command("rn8", "digits", "nmprune", "--nsamples", 31, *words)
    (line,) = believed(done.err)
    assert "--nsamples 32 would do: linear (62 for 64)" in line
    assert believed(command("rn8", "digits", "nmprune", "--nsamples", 32, *words).err) == []


def test_more_images_than_the_dataset_has_are_not_advised(command, tmp_path):
    (tmp_path / "net.py").write_text(WIDE)
    model, save = f"{tmp_path}/net.py:wide", ["--save", tmp_path / "q.pth"]
    words = [model, "digits", "quant", "--wbits", 4, "--nsamples", 100, *save]
    (line,) = believed(command(*words, "--noaug").err)
    assert "2000 images would do, the dataset has 1437: leave out --noaug: last (100 for" in line
    (line,) = believed(command(*words, "--nrounds", 1).err)
    assert "raise --nrounds: last (100 for 2000)" in line
    done = command(*words, "--noaug", "--order", "nearest", "--restart")
    assert done.status == 0 and believed(done.err) == []  # rounding does not fit the images


def test_check_names_the_layers_that_fresh_images_refute(command, tmp_path):
    words = ["--wbits", 4, "--noaug", "--check", "--save", tmp_path / "q.pth"]
    done = command("rn8", "digits", "quant", "--nsamples", 32, *words)
    reports = record_of(tmp_path / "q.pth")["layers"]
    refuted = [x["name"] for x in reports if x["fresh_error"] > 2 * x["squared_error"]]
    (line,) = [x for x in done.err.splitlines() if "more than 2 times" in x]
    assert refuted == ["layer3.0.conv2"]
    assert [name for name in LAYERS if f" {name} (" in line] == refuted
