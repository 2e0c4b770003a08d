"""Layer outputs: the subproblems of a layer, and both scripts as commands on a small network."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import conv_columns_oracle
from PIL import Image
from torch import Tensor, nn

from obc.inputs.vision import torchvision
from obc.solver.hessian import Gram
from pruning_vs_quantization import (
    layer_study,
    post_training_pruning_acts_sqnr,
    post_training_quant_acts_sqnr,
    study_files,
)
from pruning_vs_quantization.expected_error import integer_codes
from pruning_vs_quantization.layer_problem import (
    Chunk,
    ChunkMoments,
    evenly_spread,
    grid_steps,
    rows_and_chunks,
    second_moments,
    subproblems,
)

QUANT, PRUNE = post_training_quant_acts_sqnr.main, post_training_pruning_acts_sqnr.main
SMALL = (
    "--model-name",
    "rn8",
    "--dataset",
    "digits",
    "--nsamples",
    "32",
    "--bits",
    "4",
    "2",
    "--layer-name",
    "layer2.0.conv1",
    "--layer-name",
    "linear",
    "--num-output-channels",
    "2",
    "--num-chunks",
    "2",
    "--opt-dim",
    "12",
)
LAYERS = ("layer2.0.conv1", "linear")


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# -- subproblems -----------------------------------------------------------------------------------

GEOMETRIES = [  # kernel, stride, padding, dilation, groups, padding mode
    ((1, 1), (1, 1), (0, 0), (1, 1), 1, "zeros"),
    ((3, 3), (2, 2), (1, 1), (1, 1), 1, "zeros"),
    ((3, 2), (1, 2), (2, 1), (2, 1), 2, "reflect"),
    ((3, 3), (1, 1), (1, 1), (1, 1), 6, "circular"),  # depthwise
    ((2, 3), (1, 1), "same", (1, 2), 3, "replicate"),
]


@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation", "groups", "mode"), GEOMETRIES)
def test_a_chunk_sees_the_inputs_of_its_columns(kernel, stride, padding, dilation, groups, mode):
    layer = nn.Conv2d(6, 12, kernel, stride, padding, dilation, groups, padding_mode=mode)
    x = images(3, 6, 9, 8)
    columns = conv_columns_oracle(
        x.double().numpy(), kernel, stride, padding, dilation, groups, mode
    )
    d = layer.weight[0].numel()
    for group, start in ((0, 0), (groups - 1, d // 2)):
        chunk = Chunk(group, start, min(start + 5, d))
        moments = ChunkMoments(layer, chunk)
        for batch in (x[:2], x[2:]):
            moments.add(batch)
        part = columns[group][chunk.start : chunk.stop]
        np.testing.assert_allclose(moments.matrix(3), part @ part.T / 3, rtol=1e-9, atol=1e-9)


def test_a_linear_layer_sees_every_token():
    layer, x = nn.Linear(10, 4), images(5, 7, 10)
    moments = ChunkMoments(layer, Chunk(0, 3, 8))
    moments.add(x)
    part = x.double().numpy().reshape(-1, 10)[:, 3:8]
    np.testing.assert_allclose(moments.matrix(5), part.T @ part / 5, rtol=1e-12)


def test_the_signal_is_what_the_chunk_adds_to_the_output():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.ReLU())
    x = images(6, 3, 5, 5)
    parts = rows_and_chunks(model[0], 27, 4, 1)
    moments = second_moments(
        model, {"0": [chunk for _, chunk in parts]}, [(x, x)], torch.device("cpu")
    )
    signals = [sub.signal for sub in subproblems(model[0], parts, moments["0"])]
    output = model[0](x).detach().double()
    np.testing.assert_allclose(signals, output.square().sum((0, 2, 3)) / 6, rtol=1e-5)


def test_chunks_cover_a_row_and_rows_know_their_group():
    layer = nn.Conv2d(8, 6, 3, groups=2)
    parts = rows_and_chunks(layer, 16, channels=6, chunks=99)
    assert {row: chunk.group for row, chunk in parts} == {0: 0, 1: 0, 2: 0, 3: 1, 4: 1, 5: 1}
    assert [(c.start, c.stop) for row, c in parts if row == 4] == [(0, 16), (16, 32), (32, 36)]
    assert len(rows_and_chunks(layer, 16, channels=2, chunks=1)) == 2
    assert evenly_spread(4, 4) == [0, 1, 2, 3] and evenly_spread(1, 7) == [0]


# -- grids -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "balanced"), [(2, False), (3, True), (4, False)])
def test_the_grid_has_the_least_squared_error(bits, balanced):
    weight = images(4, 30)
    codes = integer_codes(bits, balanced)
    for per_channel in (False, True):
        steps = grid_steps(weight, bits, balanced, per_channel)
        assert steps.shape == (4,) and (per_channel or len(set(steps)) == 1)
        row = weight.half().double().numpy()[2 if per_channel else slice(None)]

        def error(step: float, row=row) -> float:
            rounded = step * np.clip(np.rint(row / step), codes[0], codes[-1])
            return float(np.square(row - rounded).sum())

        tried = np.linspace(0.02, 3, 4_000)
        assert error(steps[2]) <= min(map(error, tried)) * (1 + 1e-6)


def test_the_min_max_grid_reaches_the_largest_weight():
    weight = images(3, 2, 2)
    steps = grid_steps(weight, 3, per_channel=True, method="minmax")
    np.testing.assert_allclose(steps, 2 * weight.abs().flatten(1).amax(1) / 7)
    assert grid_steps(torch.zeros(2, 3), 4).tolist() == [1, 1]


# -- the commands ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of both commands."""
    out = tmp_path_factory.mktemp("layers")
    assert QUANT([*SMALL, "--out", str(out)]) == 0
    assert PRUNE(["prune-bounds-data-opt", *SMALL, "--out", str(out), "--method", "exact"]) == 0
    return out


def read(folder: Path, layer: str, bits: int, kind: str) -> dict:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    path = folder / f"rn8_{layer}_{bits}_bits_{kind}.json"
    return json.loads(path.read_text(), parse_constant=refuse)["figures"]


@pytest.mark.parametrize("kind", ["quantisation", "pruning"])
def test_results_are_intervals_around_the_optimum(folder, kind):
    for layer in LAYERS:
        for bits in (4, 2):
            figures = read(folder, layer, bits, kind)
            assert figures["summary"]["proven"] == len(figures["subproblems"]) == 4
            for record in figures["subproblems"]:
                assert record["lower"] <= record["error"] * (1 + 1e-12)
                assert record["error"] <= min(record["errors"].values()) * (1 + 1e-9)
                if kind == "quantisation":
                    assert record["relaxation"] <= record["error"]
                    codes = np.array(record["solution"])
                    assert codes.min() >= -(2 ** (bits - 1)) and codes.max() < 2 ** (bits - 1)
                else:
                    kept = np.count_nonzero(record["solution"])
                    assert kept <= record["unknowns"] * bits / 16


def test_the_summary_adds_up(folder):
    figures = read(folder, "linear", 2, "quantisation")
    signal, obq, best = (
        sum(f(record) for record in figures["subproblems"])
        for f in (lambda r: r["signal"], lambda r: r["errors"]["obq"], lambda r: r["error"])
    )
    summary = figures["summary"]
    assert summary["sqnr"]["obq"] == pytest.approx(10 * np.log10(signal / obq))
    assert summary["sqnr_best"] == pytest.approx(10 * np.log10(signal / best))
    assert summary["sqnr_limit"] == pytest.approx(summary["sqnr_best"], abs=1e-4)
    assert summary["own_gap_worst"] >= summary["own_gap_mean"] >= 0


def test_errors_are_those_of_the_layers_outputs(folder):
    """A solution's error, measured by running the layer with it."""
    from datautils import calibration_batches, load_data
    from modelutils import evaluating, find_layers, get_model

    model = get_model("rn8", "digits")
    data = load_data("digits", nsamples=32)
    layer, seen = find_layers(model)["layer2.0.conv1"], []
    handle = layer.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0]))
    with evaluating(model):
        for batch, _ in calibration_batches(data, batchsize=32):
            model(batch)
    handle.remove()
    figures = read(folder, "layer2.0.conv1", 4, "pruning")
    for record in figures["subproblems"]:
        change = torch.zeros_like(layer.weight[record["row"]]).flatten()
        part = slice(record["start"], record["stop"])
        original = layer.weight[record["row"]].flatten()[part].detach()
        change[part] = original - torch.tensor(record["solution"])
        kernel = change.view(1, *layer.weight.shape[1:]).double()
        output = nn.functional.conv2d(
            torch.cat(seen).double(), kernel, stride=layer.stride, padding=layer.padding
        )
        assert float(output.square().sum() / 32) == pytest.approx(record["error"], rel=1e-4)


def test_the_picture_shows_both(folder):
    assert (folder / "rn8_layer_outputs.pdf").read_bytes().startswith(b"%PDF")
    with Image.open(folder / "rn8_layer_outputs.png") as picture:
        assert picture.width > 600 and len(picture.convert("RGB").getcolors(1 << 24)) > 50


def test_what_is_done_is_not_done_again(folder, capsys, monkeypatch):
    path = folder / "rn8_linear_4_bits_quantisation.json"
    before = path.read_bytes()

    def fail(*args):
        raise AssertionError("done again")

    monkeypatch.setattr(layer_study, "layer_figures", fail)
    assert QUANT([*SMALL, "--out", str(folder)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1:3] for line in table[2:]] == [
        [f" {layer} ", f" {bits} "] for layer in LAYERS for bits in (4, 2)
    ]
    assert path.read_bytes() == before


def test_other_settings_are_refused_unless_told_to_restart(folder, capsys):
    changed = [*SMALL, "--out", str(folder), "--opt-dim", "10"]
    assert QUANT(changed) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "opt_dim was 12, is now 10" in error and "--restart" in error
    assert PRUNE([*SMALL, "--out", str(folder), "--method", "exact", "--per-channel"]) == 0


def test_a_killed_run_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    command = [*SMALL, "--out", str(tmp_path), "--method", "exact"]
    write, written = study_files.write_result, []

    def killed_later(path: Path, *content: object) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write(path, *content)

    with monkeypatch.context() as patch:
        patch.setattr(study_files, "write_result", killed_later)
        assert QUANT(command) == 130
    assert [path.name for path in tmp_path.glob("*.json")] == [written[0].name]
    stamp = written[0].stat().st_mtime_ns
    assert QUANT(command) == 0
    assert len(list(tmp_path.glob("*.json"))) == 4 and written[0].stat().st_mtime_ns == stamp
    assert "done already" in capsys.readouterr().err


BAD = [
    (("--layer-name", "layer2.0.conv"), "did you mean layer2.0.conv"),
    (("--layer-name", "features.8"), "no such layer in rn8; it has conv1,"),
    (("--n-bits", "12"), "--n-bits must be from 2 to 8; got 12"),
    (("--bits", "1"), "must be from 2 to 8; got 1"),
    (("--opt-dim", "1000"), "--opt-dim must be from 1 to 256; got 1000"),
    (("--image-net-dir", "pictures"), "give one or the other"),
    (("--range-search-method", "percentile"), "must be MSE or minmax; got percentile"),
    (("--time-limit", "0"), "must be a number above 0; got 0"),
    (("--method", "guess"), "--method"),
]


@pytest.mark.parametrize("main", [QUANT, PRUNE], ids=["quantisation", "pruning"])
@pytest.mark.parametrize(("words", "expected"), BAD, ids=[words[0][2:] for words, _ in BAD])
def test_mistakes_are_answered_in_one_line(main, words, expected, tmp_path, capsys):
    try:
        status = main([*SMALL, "--out", str(tmp_path / "out"), *words])
    except SystemExit as stop:  # argparse's own
        status = stop.code
    lines = capsys.readouterr().err.splitlines()
    assert status == 2 and len(lines) == 1 and expected in lines[0]
    assert not (tmp_path / "out").exists()


# -- the published command -------------------------------------------------------------------------

PUBLISHED = """quant-bounds-data-opt --model-name mobilenet_v2 --range-search-method MSE
--num-output-channels 8 --layer-name features.8.conv.0.0 --n-bits 4 --opt-dim 32 --verbose-solvers
--image-net-dir"""


@pytest.fixture
def small_imagenet(tmp_path: Path) -> Path:
    """Two classes of noise in ImageNet's folders, and a MobileNet-V2 for them."""
    generator = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("n01440764", "n01443537"):
            target = tmp_path / part / name
            target.mkdir(parents=True)
            for i in range(4):
                pixels = generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(target / f"{i}.jpeg")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torchvision.models.get_model("mobilenet_v2", weights=None, num_classes=2)
    torch.save(model.state_dict(), tmp_path / "mobilenet_v2.pth")
    return tmp_path


def test_the_published_command_runs(small_imagenet, capsys):
    more = (
        "--weights",
        small_imagenet / "mobilenet_v2.pth",
        "--image-size",
        64,
        "--workers",
        0,
        "--method",
        "exact",
        "--out",
        small_imagenet / "out",
    )
    assert QUANT([*PUBLISHED.split(), *map(str, (small_imagenet, *more))]) == 0
    done = capsys.readouterr()
    assert done.out.splitlines()[-1].startswith("| features.8.conv.0.0 | 4 | ")
    lines = [line for line in done.err.splitlines() if line.startswith("features.8.conv.0.0, 4")]
    assert len(lines) == 16  # 8 output channels of 64 inputs


def test_the_published_command_says_what_is_missing(tmp_path, capsys):
    assert QUANT([*PUBLISHED.split(), str(tmp_path / "nowhere")]) == 2
    assert "nowhere: does not exist" in capsys.readouterr().err


# -- real layers -----------------------------------------------------------------------------------


def test_real_subproblems_of_32_unknowns_are_solved(
    shared_data, some_cifar10_images, tmp_path, capsys
):
    common = [
        "--model-name",
        "rn20",
        "--dataset",
        "cifar10",
        "--datapath",
        str(some_cifar10_images),
        "--weights",
        str(shared_data / "rn20_cifar10.pth"),
        "--layer-name",
        "layer2.1.conv1",
        "--num-output-channels",
        "2",
        "--num-chunks",
        "2",
        "--nsamples",
        "32",
        "--method",
        "exact",
        "--out",
        str(tmp_path),
    ]
    assert QUANT(common) == 0 and PRUNE(common) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "layer2" in line]
    assert len(rows) == 8 and all("| 4 of 4 |" in row for row in rows)


def test_the_chunks_of_a_layer_are_parts_of_its_own_second_moment():
    layer, x = nn.Conv2d(4, 4, 3, padding=1), images(2, 4, 6, 6)
    whole = Gram(layer)
    whole.add(x.double())
    moments = ChunkMoments(layer, Chunk(0, 10, 25))
    moments.add(x)
    np.testing.assert_allclose(moments.matrix(2), whole.matrix()[0, 10:25, 10:25] / 2, rtol=1e-12)


def test_images_are_counted_once_however_often_a_layer_is_called():
    """With tokens, views or several calls a layer sees other numbers of inputs than of images."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(x.flatten(0, 1)))

    model, x = Twice(), images(5, 7, 6)
    with torch.no_grad():
        seen = torch.cat([x.flatten(0, 1), model.layer(x.flatten(0, 1))]).double().numpy()
    batches = [(x[:2], x[:2]), (x[2:], x[2:])]
    found = second_moments(model, {"layer": [Chunk(0, 0, 6)]}, batches, torch.device("cpu"))
    np.testing.assert_allclose(found["layer"][Chunk(0, 0, 6)], seen.T @ seen / 5, rtol=1e-5)


OWN_FORWARD = """
import torch
from torch import nn
from torch.nn import functional as F

class Same(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.pad(x, (0, 1, 0, 1)))

class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)

def net(same=Same, padding=0):
    torch.manual_seed(0)
    first = same(3, 4, 3, 2, padding)
    return nn.Sequential(first, Doubled(4, 4, 1), nn.Flatten(), nn.Linear(64, 10))

def padded():
    return net(lambda *sizes: nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(*sizes)))
"""


def test_layers_with_a_forward_of_their_own(tmp_path, capsys):
    """One that pads by itself gives the figures of the same network with its padding apart; what
    is no convolution with its weight is left out."""
    (tmp_path / "net.py").write_text(OWN_FORWARD)
    options = "--dataset digits --image-size 8 --nsamples 16 --bits 3 --method exact"
    options += " --num-output-channels 1 --num-chunks 1 --opt-dim 12 --workers 0"
    rows = {}
    for net, first in (("net", "0"), ("padded", "0.1")):
        words = f"--model-name {tmp_path}/net.py:{net} {options} --out {tmp_path}/{net}"
        assert PRUNE([*words.split()]) == 0
        done = capsys.readouterr()
        assert "1 left out: Doubled does not just convolve" in done.err
        lines = [x.split("|")[1:] for x in done.out.splitlines() if x.startswith("|")]
        rows[net] = {x[0].strip(): x[1:] for x in lines}
        assert rows[net].keys() >= {first, "3"} and "1" not in rows[net]
    assert rows["net"]["0"] == rows["padded"]["0.1"] and rows["net"]["3"] == rows["padded"]["3"]
