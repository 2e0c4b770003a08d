"""The study's figures of weight tensors: against every step there is, and through the commands."""

from __future__ import annotations

import json
import math
import time
from urllib.error import HTTPError, URLError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import modelutils
from obc.solver.errors import UserError
from pruning_vs_quantization import plot_weights_sqnr
from pruning_vs_quantization import quant_pruning_weights_sqnr as weights_command
from pruning_vs_quantization.expected_error import Histogram, best_step, integer_codes
from pruning_vs_quantization.plot_weights_sqnr import TensorResult
from pruning_vs_quantization.quant_pruning_weights_sqnr import tensor_figures

stats = pytest.importorskip("scipy.stats")

FIELDS = [
    "sample_kurtosis",
    "quant_sqnr",
    "quant_mse",
    "quant_sparsity",
    "pruning_sqnr",
    "pruning_mse",
    "pruning_sqnr_corrected",
    "pruning_mse_corrected",
]


def random_weights(kind: str, count: int) -> torch.Tensor:
    generator = np.random.default_rng(len(kind) * 1000 + count)
    values = {
        "gaussian": lambda: generator.standard_normal(count) * 0.03,
        "heavy": lambda: generator.standard_t(1.5, count),
        "one-sided": lambda: generator.exponential(0.2, count),
        "two values": lambda: np.where(generator.random(count) < 0.3, -0.7, 0.2),
        "an outlier": lambda: np.append(generator.standard_normal(count - 1) * 1e-3, 50.0),
        "sparse": lambda: generator.standard_normal(count) * (generator.random(count) < 0.2),
        "integers": lambda: generator.integers(-5, 6, count).astype(float),
    }
    return torch.from_numpy(values[kind]())


KINDS = ("gaussian", "heavy", "one-sided", "two values", "an outlier", "sparse", "integers")


# -- the step of least error -----------------------------------------------------------------------


def least_error_of_any_step(w: np.ndarray, codes: np.ndarray) -> float:
    """The least Σ(w − Δc)² over all Δ > 0, by a sweep over every Δ at which some code changes.

    Between two such Δ the codes are fixed and the error is a parabola in Δ, whose least value is
    Σw² − (Σcw)²/Σc²; no Δ can do better than the best of these parabolas.
    """
    boundaries = codes[1:] - 0.5
    with np.errstate(divide="ignore", invalid="ignore"):
        breaks = (w[:, None] / boundaries[None, :]).ravel()
    breaks = np.unique(breaks[np.isfinite(breaks) & (breaks > 0)])
    if not len(breaks):
        return float(w @ w)
    ends = np.concatenate([[breaks[0] / 2], breaks, [breaks[-1] * 2]])
    least = float(w @ w)
    for step in (ends[:-1] + ends[1:]) / 2:
        c = np.clip(np.rint(w / step), codes[0], codes[-1])
        if c @ c > 0 and c @ w > 0:
            least = min(least, float(w @ w - (c @ w) ** 2 / (c @ c)))
    return max(least, 0.0)


def error_of(w: np.ndarray, step: float, codes: np.ndarray) -> float:
    return float(np.square(w - step * np.clip(np.rint(w / step), codes[0], codes[-1])).sum())


def as_fp16(weight: torch.Tensor) -> np.ndarray:
    return weight.to(torch.float16).double().numpy().ravel()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 5])
@pytest.mark.parametrize("balanced", [False, True])
def test_no_step_at_all_is_better(kind, bits, balanced):
    weight, codes = random_weights(kind, 60), integer_codes(bits, balanced)
    w = as_fp16(weight)
    result = error_of(w, best_step(Histogram.of(weight), codes), codes)
    expected = least_error_of_any_step(w, codes)
    assert result == pytest.approx(expected, rel=2e-7, abs=1e-12 * float(w @ w))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-40, 40), min_size=1, max_size=8), st.integers(2, 4), st.booleans())
def test_no_step_at_all_is_better_for_few_weights(numbers, bits, balanced):
    weight, codes = torch.tensor(numbers, dtype=torch.float64) / 8, integer_codes(bits, balanced)
    w = as_fp16(weight)
    if not w.any():
        with pytest.raises(ValueError, match="all values are zero"):
            best_step(Histogram.of(weight), codes)
        return
    result = error_of(w, best_step(Histogram.of(weight), codes), codes)
    assert result == pytest.approx(least_error_of_any_step(w, codes), rel=1e-6, abs=1e-10)


def test_eight_bits_and_many_weights_against_many_steps():
    weight, codes = random_weights("heavy", 20000), integer_codes(8)
    w, step = as_fp16(weight), best_step(Histogram.of(weight), codes)
    result = error_of(w, step, codes)
    others = np.concatenate([np.geomspace(0.1, 10, 300), np.linspace(0.98, 1.02, 300)]) * step
    assert result <= min(error_of(w, other, codes) for other in others) * (1 + 2e-7)


def test_ten_million_weights_take_seconds():
    weight = torch.randn(10_000_000, generator=torch.Generator().manual_seed(0)) * 0.02
    start = time.process_time()
    figures = tensor_figures(Histogram.of(weight), 8)
    assert time.process_time() - start < 5
    assert figures["quant_sqnr"] == pytest.approx(40.57, abs=0.02)
    assert figures["pruning_sqnr"] == pytest.approx(11.47, abs=0.02)


# -- the figures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_histogram_is_the_tensor(kind):
    weight = random_weights(kind, 500).reshape(5, 10, 10).transpose(0, 2)
    w, histogram = as_fp16(weight), Histogram.of(weight)
    assert np.array_equal(np.repeat(histogram.values, histogram.counts), np.sort(w))
    assert histogram.kurtosis == pytest.approx(stats.kurtosis(w), rel=1e-9)
    assert histogram.reach == abs(w).max()
    for order in (1, 2):
        assert histogram.moment(order) == pytest.approx(np.mean(abs(w) ** order))


def test_zeros_of_both_signs_are_one_value():
    histogram = Histogram.of(torch.tensor([0.0, -0.0, 1e-9, -1e-9, 2.0]))
    assert histogram.values.tolist() == [0.0, 2.0] and histogram.counts.tolist() == [4, 1]


@pytest.mark.parametrize("bad", [[], [1.0, 70000.0], [math.nan], [-math.inf, 1.0]])
def test_tensors_without_figures(bad):
    with pytest.raises(ValueError, match="no weights" if not bad else "not finite in FP16"):
        Histogram.of(torch.tensor(bad))


@pytest.mark.gpu
def test_a_gpu_counts_alike():
    weight = random_weights("heavy", 100_000).float()
    there, here = Histogram.of(weight.cuda()), Histogram.of(weight)
    assert np.array_equal(there.values, here.values)
    assert np.array_equal(there.counts, here.counts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_figures_are_what_the_definitions_say(kind, bits):
    weight = random_weights(kind, 333)
    original = weight.clone()
    w, result = as_fp16(weight), tensor_figures(Histogram.of(weight), bits)
    codes = integer_codes(bits)
    step = best_step(Histogram.of(weight), codes)
    quantised = step * np.clip(np.rint(w / step), codes[0], codes[-1])

    def pruned(kept):
        left = np.zeros_like(w)
        largest = np.argsort(-abs(w))[:kept]
        left[largest] = w[largest]
        return left

    zeros = int((quantised == 0).sum())
    assert result["quant_sparsity"] == zeros / 333
    results = {
        "quant": quantised,
        "pruning": pruned(333 * bits // 16),
        "pruning__corrected": pruned(int((333 - zeros) * bits / 16)),
    }
    for name, left in results.items():
        mse = np.mean((w - left) ** 2)
        power = np.mean(w**2)
        sqnr_db = 10 * np.log10(power / mse) if mse > 1e-28 * power else math.inf
        method, _, suffix = name.partition("_")
        assert result[f"{method}_mse{suffix}"] == pytest.approx(mse, rel=1e-9, abs=1e-20)
        sqnr = result[f"{method}_sqnr{suffix}"]
        assert (math.inf if sqnr is None else sqnr) == pytest.approx(sqnr_db, rel=1e-9)
    assert result["pruning_mse_corrected"] >= result["pruning_mse"]
    assert torch.equal(weight, original)


def test_what_json_cannot_hold_is_null_with_a_reason():
    zeros = tensor_figures(Histogram.of(torch.zeros(8)), 4)
    assert zeros["quant_sqnr"] is zeros["sample_kurtosis"] is zeros["pruning_sqnr"] is None
    assert zeros["quant_mse"] == 0 and zeros["quant_sparsity"] == 1
    assert "sample_kurtosis: undefined" in zeros["reason"]
    grid = tensor_figures(Histogram.of(torch.tensor([-1.0, 0.0, 0.5, 1.0] * 4)), 4)
    assert grid["quant_sqnr"] is None and grid["quant_mse"] == 0
    assert grid["reason"] == "quant_sqnr: infinite, no error"
    thirds = tensor_figures(Histogram.of(torch.tensor([0.1, -0.3, 0.2] * 9)), 4)
    assert thirds["quant_mse"] > 0  # FP16 has no thirds
    exact = tensor_figures(Histogram.of(torch.tensor([0.5] * 99 + [1.5] * 3)), 6)
    assert exact["quant_sqnr"] is None  # not the 319 dB that rounding in float64 leaves
    assert list(tensor_figures(Histogram.of(torch.randn(50)), 4)) == FIELDS


# -- the command -----------------------------------------------------------------------------------


def run(*words: object) -> int:
    return weights_command.main([str(word) for word in words])


def test_the_command_on_the_shipped_network(tmp_path, capsys, monkeypatch):
    assert run("--models", "rn8", "--bits", 4, 2, "--out", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "| rn8 | 4 | 8 | 19.19 | 5.64 | 4.93 | 0 |" in printed
    model = modelutils.get_model("rn8", "digits")
    for bits in (4, 2):
        layers = json.loads((tmp_path / f"rn8_{bits}_bits_mse.json").read_text())
        assert list(layers) == list(modelutils.find_layers(model))
        assert all(list(figures) == FIELDS for figures in layers.values())
        histogram = Histogram.of(model.layer1[0].conv1.weight)
        assert layers["layer1.0.conv1"] == tensor_figures(histogram, bits)

    monkeypatch.setattr(weights_command, "zoo_model", None)  # would fail if it loaded again
    assert run("--models", "rn8", "--bits", 2, 4, "--out", tmp_path) == 0
    assert capsys.readouterr().out == printed

    assert run("--models", "rn8", "--balanced", "--out", tmp_path) == 2
    assert "rn8: balanced was false, is now true" in capsys.readouterr().err


def test_more_bits_are_added_and_restart_replaces(tmp_path, capsys):
    assert run("--models", "rn8", "--bits", 3, "--out", tmp_path) == 0
    first = (tmp_path / "rn8_3_bits_mse.json").stat().st_mtime_ns
    assert run("--models", "rn8", "--bits", 3, 2, "--out", tmp_path) == 0
    assert (tmp_path / "rn8_3_bits_mse.json").stat().st_mtime_ns == first
    assert run("--models", "rn8", "--bits", 2, "--balanced", "--restart", "--out", tmp_path) == 0
    assert [path.name for path in sorted(tmp_path.glob("rn8*"))] == ["rn8_2_bits_mse.json"]
    assert "| rn8 | 2 | 8 | 7." in capsys.readouterr().out  # three levels, not four


def test_a_broken_result_is_named(tmp_path, capsys):
    assert run("--models", "rn8", "--bits", 2, "--out", tmp_path) == 0
    (tmp_path / "rn8_2_bits_mse.json").write_text('{"conv1": {')
    assert run("--models", "rn8", "--bits", 2, "--out", tmp_path) == 2
    assert "rn8_2_bits_mse.json: not a complete JSON file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models", "rn88"], "unknown model rn88"),
        (["--weights", "x.pth"], "--weights FILE is for one model"),
        (["--models", "rn8", "rn20", "--weights", "x.pth"], "--weights FILE is for one model"),
        (["--models", "rn20", "--weights", "no.pth"], "no.pth: no such file"),
        (["--models", "rn8", "--device", "tpu"], "--device must be auto, cpu, cuda"),
        (["--models", "no.py:model"], "there is no file no.py"),
        (["--models", "a.py:net", "b.py:net"], "another model's files would be called net too"),
        (["--models", "rn20"], "error: rn20: rn20 on imagenet has no weights to download"),
    ],
)
def test_wrong_options(words, message, tmp_path, capsys):
    assert run(*words, "--out", tmp_path) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.json"))


def unreachable(asked: list[str], error: Exception):
    def urlopen(request, timeout):
        assert 0 < timeout <= 30
        asked.append(request.full_url)
        raise error

    return urlopen


def test_a_server_that_does_not_answer_is_asked_once(tmp_path, capsys, monkeypatch):
    asked: list[str] = []
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(weights_command, "urlopen", unreachable(asked, URLError("no route")))
    models = ["vgg11", "fasterrcnn_resnet50_fpn", "fcn_resnet50", "r3d_18"]
    assert run("--models", *models, "rn8", "--bits", 2, "--out", tmp_path) == 0
    captured = capsys.readouterr()
    assert len(asked) == 1 and "vgg11" in asked[0]
    line = f"warning: skipped {', '.join(models)}: download.pytorch.org does not answer (no route)"
    assert captured.err.splitlines().count(line) == 1 == captured.err.count("skipped")
    assert "| rn8 | 2 |" in captured.out
    assert run("--models", *models, "--bits", 2, "--out", tmp_path) == 2
    assert "no model's weights are available" in capsys.readouterr().err


def test_many_skipped_models_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(weights_command, "urlopen", unreachable([], URLError("no route")))
    assert run("--bits", 2, "--out", tmp_path) == 2
    zoo, error = weights_command.chosen_models([], None), capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if "skipped" in line]
    assert line.startswith(f"warning: skipped {', '.join(zoo[:5])} and {len(zoo) - 5} more: ")


def test_a_page_that_is_missing_says_nothing_about_others(tmp_path, capsys, monkeypatch):
    asked: list[str] = []
    missing = HTTPError("https://x/y", 404, "Not Found", None, None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(weights_command, "urlopen", unreachable(asked, missing))
    assert run("--models", "vgg11", "r3d_18", "--out", tmp_path) == 2
    assert len(asked) == 2 and "404 Not Found" in capsys.readouterr().err


def test_weights_that_were_downloaded_need_no_server(tmp_path, monkeypatch):
    url = weights_command.pretrained_weights("vgg11").url
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(weights_command, "urlopen", unreachable([], URLError("no route")))
    with pytest.raises(UserError, match="does not answer"):
        weights_command.check_download(url, {})
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / url.rpartition("/")[2]).touch()
    weights_command.check_download(url, {})


def test_without_arguments_it_is_the_whole_zoo():
    args = weights_command.build_parser().parse_args([])
    models = weights_command.chosen_models([], None)
    assert {"resnet18", "fasterrcnn_resnet50_fpn", "fcn_resnet50", "r3d_18"} <= set(models)
    assert len(models) == len(set(models)) > 80
    assert not any(name.startswith(("quantized", "raft")) for name in models)
    assert args.bits == [8, 7, 6, 5, 4, 3, 2]
    assert str(args.out) == "plots_data/weights_sqnr"
    assert all(weights_command.pretrained_weights(name).url for name in models)


@pytest.mark.parametrize("name", ["ssdlite320_mobilenet_v3_large", "lraspp_mobilenet_v3_large"])
def test_detection_and_segmentation_weights_from_a_file(name, tmp_path, capsys):
    from obc.inputs.vision import torchvision

    model = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    words = ["--models", name, "--bits", 2, "--out", tmp_path]
    assert run(*words, "--weights", tmp_path / "weights.pth") == 0
    layers = json.loads((tmp_path / f"{name}_2_bits_mse.json").read_text())
    assert list(layers) == list(modelutils.find_layers(model))
    capsys.readouterr()
    assert run("--models", "rn20", "--weights", tmp_path / "weights.pth", "--out", tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: rn20: ") and "weights.pth" in error and error.count("\n") == 1


def write_model(folder, name: str, fill: str) -> str:
    path = folder / f"{name}.py"
    path.write_text(f"""
import torch
def {name}():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 4))
    torch.manual_seed(0)
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(4, 3, 3, 3))
        model[1].weight.{fill}
    return model
""")
    return f"{path}:{name}"


def test_a_model_of_the_users_own_and_the_plot_of_it(tmp_path, capsys):
    constant = write_model(tmp_path, "constant", "fill_(1.0)")
    too_large = write_model(tmp_path, "large", "fill_(1e6)")
    out = tmp_path / "out"
    assert run("--models", constant, too_large, "--bits", 4, 2, "--out", out) == 0
    error = capsys.readouterr().err
    assert "large.py:large: 1 has weights that are not finite in FP16" in error
    layers = json.loads(next(out.glob("constant_4_bits_mse.json")).read_text())
    assert layers["1"]["quant_sqnr"] is None and "infinite" in layers["1"]["reason"]
    assert layers["0"]["quant_sqnr"] > layers["0"]["pruning_sqnr"]

    assert plot_weights_sqnr.main([str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.out == (
        "4 bits: pruning better in 0 of 1 tensors\n2 bits: pruning better in 0 of 1 tensors\n"
    )
    assert "2 tensors without a finite SQNR" in captured.err
    assert (out / "weights_sqnr.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "weights_sqnr.pdf").read_bytes().startswith(b"%PDF")


# -- the plot --------------------------------------------------------------------------------------


def test_the_plot_reads_any_such_folder(tmp_path, capsys):
    """As another program would have written it: only what is drawn has to be there."""
    layer = {"quant_sqnr": 3.0, "pruning_sqnr": 5.0, "pruning_sqnr_corrected": 2.0}
    (tmp_path / "a_model_3_bits_mse.json").write_text(json.dumps({"a": layer, "b": layer}))
    (tmp_path / "notes.json").write_text("not read")
    assert plot_weights_sqnr.main([str(tmp_path), "--out", str(tmp_path / "pictures")]) == 0
    assert capsys.readouterr().out == "3 bits: pruning better in 2 of 2 tensors\n"
    assert plot_weights_sqnr.main([str(tmp_path), "--corrected"]) == 0
    assert capsys.readouterr().out == "3 bits: pruning better in 0 of 2 tensors\n"
    assert (tmp_path / "pictures" / "weights_sqnr.pdf").exists()
    assert (tmp_path / "weights_sqnr_corrected.png").exists()
    assert not list(tmp_path.glob("weights_kurtosis*"))  # which that program has not written


TENSORS = [
    TensorResult("rn8", 4, "a", 0.0, quantised=20.0, pruned=2.0),
    TensorResult("rn8", 4, "b", 5.0, quantised=18.0, pruned=3.0),
    TensorResult("rn8", 2, "a", 0.0, quantised=1.0, pruned=4.0),
    TensorResult("rn8", 2, "b", None, quantised=2.0, pruned=4.0),
]


def test_dots_are_where_the_figures_are():
    """Quantisation on x and pruning on y, as in the paper."""
    (axes,) = plot_weights_sqnr.draw_tensors(TENSORS, "rn8").axes
    four, two, diagonal = axes.lines
    assert (list(four.get_xdata()), list(four.get_ydata())) == ([20.0, 18.0], [2.0, 3.0])
    assert (list(two.get_xdata()), list(two.get_ydata())) == ([1.0, 2.0], [4.0, 4.0])
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata())
    assert four.get_color() != two.get_color() and axes.get_title() == "rn8"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "INT4 against 75 %: 0 of 2",
        "INT2 against 87.5 %: 2 of 2",
    ]


def test_sqnr_against_kurtosis():
    """Excess kurtosis 0 is a Gaussian's 3; a tensor without one is not drawn."""
    figure = plot_weights_sqnr.draw_tensor_kurtosis(TENSORS, "rn8")
    four, two = figure.axes
    assert [axes.get_title() for axes in figure.axes] == [
        "INT4 against 75 %",
        "INT2 against 87.5 %",
    ]
    quantised, pruned = four.lines
    assert list(quantised.get_xdata()) == list(pruned.get_xdata()) == [3.0, 8.0]
    assert (list(quantised.get_ydata()), list(pruned.get_ydata())) == ([20.0, 18.0], [2.0, 3.0])
    assert [list(line.get_ydata()) for line in two.lines] == [[1.0], [4.0]]
    figure.canvas.draw()
    labels = [label.get_text() for label in four.get_xticklabels()]
    assert len(labels) > 1 and all(1 < float(label) < 10 for label in labels)  # plain numbers


def test_pictures_have_the_name_of_one_network_or_the_number_of_several():
    assert plot_weights_sqnr.networks_text(TENSORS) == "rn8"
    other = TensorResult("vgg11", 4, "a", 0.0, 1.0, 1.0)
    assert plot_weights_sqnr.networks_text([*TENSORS, other]) == "2 models"


def test_the_plot_reads_nan_and_infinity(tmp_path, capsys):
    """As Python's json writes them by default."""
    infinity, nan = float("inf"), float("nan")
    pairs = [(20.0, 5), (infinity, 4.0), (3.0, nan), (-1.0, -3.0), (2.0, -infinity)]
    layers = {
        f"layer{i}": {"quant_sqnr": quantised, "pruning_sqnr": pruned}
        for i, (quantised, pruned) in enumerate(pairs)
    }
    (tmp_path / "resnet18_4_bits_mse.json").write_text(json.dumps(layers))
    assert "Infinity" in (tmp_path / "resnet18_4_bits_mse.json").read_text()
    assert plot_weights_sqnr.main([str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert captured.out == "4 bits: pruning better in 0 of 2 tensors\n"
    assert "3 tensors without a finite SQNR are not drawn" in captured.err
    assert (tmp_path / "weights_sqnr.png").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, None, "no <model>_<b>_bits_mse.json"),
        ("x_4_bits_mse.json", "{", "not a complete JSON file"),
        ("x_4_bits_mse.json", '{"a": {"quant_sqnr": 1}}', "a has no pruning_sqnr"),
        ("x_4_bits_mse.json", '{"a": 3}', "a has no pruning_sqnr"),
        ("x_4_bits_mse.json", '{"a": {"quant_sqnr": "x", "pruning_sqnr": 1}}', "is not a number"),
        (
            "x_4_bits_mse.json",
            '{"a": {"quant_sqnr": Infinity, "pruning_sqnr": 1}}',
            "none of its 1",
        ),
        ("x_4_bits_mse.json", "[" * 99999, "not a complete JSON file"),
        ("x_4_bits_mse.json", "{}", "no <model>_<b>_bits_mse.json"),
    ],
)
def test_folders_without_figures(name, content, message, tmp_path, capsys):
    if name:
        (tmp_path / name).write_text(content)
    assert plot_weights_sqnr.main([str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.p*"))


def test_a_folder_that_is_not_there(tmp_path, capsys):
    assert plot_weights_sqnr.main([str(tmp_path / "none")]) == 2
    assert "no such folder; run quant_pruning_weights_sqnr first" in capsys.readouterr().err


# -- real weights ----------------------------------------------------------------------------------


def test_quantisation_wins_on_a_trained_network(shared_data, tmp_path, capsys):
    weights = shared_data / "rn20_cifar10.pth"
    assert run("--models", "rn20", "--weights", weights, "--bits", 4, "--out", tmp_path) == 0
    assert "| rn20 | 4 | 20 | 17.18 | 6.50 | 5.34 | 0 |" in capsys.readouterr().out
