"""export.py: the exported network computes what the checkpoint says, in another runtime."""

from __future__ import annotations

import copy
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import export
import quant
from modelutils import find_layers, get_model
from obc.inputs.files import save_checkpoint
from obc.solver.errors import UserError
from obc.toolkit import export_check, export_measure, export_onnx
from obc.toolkit.export_codes import OffGrid, pack, packed_state, weight_codes
from obc.toolkit.export_cut import cut_channels

ROOT = Path(__file__).resolve().parents[1]
SHAPE = (3, 12, 12)


class EveryKind(nn.Module):
    """Each kind of layer; `shared` is called twice, on an input with three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.grouped, self.norm2 = nn.Conv2d(8, 8, 3, groups=2), nn.BatchNorm2d(8)
        self.one_d, self.shared, self.last = nn.Conv1d(8, 8, 3), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        x = self.norm2(self.grouped(self.depthwise(x))).relu()
        x = self.one_d(x.flatten(2)).transpose(1, 2)
        return self.last(self.shared(self.shared(x)).mean(1))


class Chain(nn.Module):
    """conv, norm, pool, depthwise, conv; then flattened pixels into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.b, self.norm_b = nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)
        self.c, self.d = nn.Conv2d(8, 6, 3), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm_a(self.a(x)).relu()
        x = self.norm_b(self.b(nn.functional.max_pool2d(x, 2))).relu()
        return self.d(self.c(x).flatten(1))


def random_norms(model: nn.Module) -> nn.Module:
    """Norms as after training, with negative factors among them."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_var.uniform_(0.5, 2)
            for tensor in (norm.running_mean, norm.weight.data, norm.bias.data):
                tensor.normal_()
    return model.eval()


def quantised(model: nn.Module, weight_bits: int, input_bits: int, symmetric: bool) -> nn.Module:
    for layer in find_layers(model).values():
        W = layer.weight.detach().flatten(1)
        grid = quant.fit_weight_grid(W, weight_bits, symmetric)
        layer.weight.data = grid(W).view_as(layer.weight)
        quant.set_weight_grid(layer, grid)
        if input_bits < 32:
            values = torch.randn(4096)
            quant.set_activation_grid(layer, quant.fit_activation_grid(values, input_bits))
    return model


def in_onnx_runtime(model: nn.Module, x: Tensor) -> Tensor:
    """The outputs of the graph as written: no layer is replaced by the runtime's own."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs requirements-export.txt")
    pytest.importorskip("onnx_ir", reason="needs requirements-export.txt")
    pytest.importorskip("onnxscript", reason="needs requirements-export.txt")
    graph, _ = export_onnx.quantised_graph(model, tuple(x.shape[1:]))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    contents = export_onnx.contents(graph)
    session = onnxruntime.InferenceSession(contents, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


@pytest.mark.parametrize(
    ("weight_bits", "input_bits", "symmetric"),
    [(8, 8, True), (8, 8, False), (4, 4, True), (3, 32, False), (2, 32, True), (2, 8, True)],
)
def test_every_kind_of_layer_computes_the_same(
    weight_bits: int, input_bits: int, symmetric: bool
) -> None:
    torch.manual_seed(0)
    model = quantised(random_norms(EveryKind()), weight_bits, input_bits, symmetric)
    x = torch.randn(5, *SHAPE)  # not the number of images that is traced
    with torch.no_grad():
        expected = model(x)
    assert torch.allclose(in_onnx_runtime(model, x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("input_bits", [32, 8, 4])
def test_a_wrong_graph_is_named_where_it_first_differs(input_bits: int) -> None:
    for name in ("onnxruntime", "onnxscript"):
        pytest.importorskip(name, reason="needs requirements-export.txt")
    torch.manual_seed(7)
    model, x = quantised(random_norms(EveryKind()), 8, input_bits, True), torch.randn(8, *SHAPE)
    graph, _ = export_onnx.quantised_graph(model, SHAPE)
    found = export_check.differences(model, graph, x)
    assert list(found) == [*find_layers(model), "the outputs"] and found["conv"] < 1e-6
    assert export_check.wrong_place(model, graph, x) == ""
    assert len(graph.graph.outputs) == 1  # the graph is as it was
    scale = graph.graph.initializers["grouped.weight.scale"]
    scale.const_value = export_onnx.package("onnx_ir").Tensor(-scale.const_value.numpy())
    wrong = export_check.wrong_place(model, graph, x)
    assert wrong.startswith("the input of one_d differs by ") and wrong.endswith("after grouped")


def test_strict_refuses_a_wrong_graph(checkpoint, command, tmp_path, monkeypatch) -> None:
    for name in ("onnxruntime", "onnxscript"):
        pytest.importorskip(name, reason="needs requirements-export.txt")
    fold_bias = export_onnx._fold_bias
    monkeypatch.setattr(export_onnx, "_fold_bias", lambda *words: -fold_bias(*words))
    status, _, err = command(checkpoint, "--to", tmp_path / "x.onnx", "--strict")
    assert status == 2 and not (tmp_path / "x.onnx").exists()
    assert "wrong: the input of layer1.0.conv1 differs by" in err and "after conv1" in err
    status, _, err = command(checkpoint, "--to", tmp_path / "x.onnx")
    assert status == 0 and "warning: the exported graph is wrong" in err


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_factors_change_signs_and_scales_only(bits: int, symmetric: bool) -> None:
    torch.manual_seed(1)
    layer = quantised(nn.Sequential(nn.Linear(16, 6)), bits, 32, symmetric)[0]
    codes = weight_codes(layer)
    layer.weight.data[0, 0] = codes.scale[0] * (0 - codes.zero[0])  # the lowest code of its grid
    codes = weight_codes(layer)
    factor = torch.tensor([-1.5, -2.0, 0.0, 1e-38, 3.0, -0.1], dtype=torch.float64)
    stored, _ = export_onnx._stored(codes, factor.numpy(), max(codes.width, 2))
    scale, zero = (torch.from_numpy(x)[:, None].double() for x in (stored.scale, stored.zero))
    decoded = scale * (torch.from_numpy(stored.codes).double() - zero)
    expected = factor[:, None] * layer.weight.detach().double()
    assert torch.allclose(decoded, expected, rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("width", [2, 4, 8])
def test_packing_puts_the_first_code_lowest(width: int) -> None:
    codes = torch.randint(2**width, (3, 7), generator=torch.Generator().manual_seed(2))
    packed, per_byte = pack(codes, width).tolist(), 8 // width
    unpacked = [
        byte >> (width * place) & (2**width - 1) for byte in packed for place in range(per_byte)
    ]
    assert unpacked[:21] == codes.flatten().tolist() and len(packed) == -(-21 // per_byte)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_documented_reader_restores_every_bit(bits: int, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(), re.S)
    names: dict = {}
    exec(next(block for block in blocks if "def read_packed" in block), names)
    torch.manual_seed(3)
    model = quantised(random_norms(EveryKind()), bits, 8, symmetric=False)
    state, left = packed_state(model)
    save_file(state, tmp_path / "packed.safetensors")
    read = names["read_packed"](tmp_path / "packed.safetensors")
    assert left == {} and read.keys() == model.state_dict().keys()
    assert all(torch.equal(read[key], tensor) for key, tensor in model.state_dict().items())


def test_weights_off_their_grid_are_named() -> None:
    model = quantised(nn.Sequential(nn.Linear(4, 4)), 4, 32, True)
    model[0].weight.data[1, 1] += 1e-3
    with pytest.raises(OffGrid, match="not on its grid"):
        weight_codes(model[0])
    assert list(packed_state(model)[1]) == ["0"]


def test_channels_that_nobody_reads_are_cut_through_pool_and_depthwise() -> None:
    torch.manual_seed(4)
    model, x = random_norms(Chain()), torch.randn(3, *SHAPE)
    model.c.weight.data[:, [1, 4, 5]] = 0
    model.d.weight.data[:, [0, 2]] = 0
    with torch.no_grad():
        smaller, cut = cut_channels(model, x)
        assert torch.allclose(smaller(x), model(x), rtol=1e-6, atol=1e-6)
    assert cut.channels == {"a": (8, 5), "b": (8, 5), "c": (6, 4)}
    assert smaller.b.weight.shape == (5, 1, 3, 3) and smaller.norm_a.num_features == 5


def test_a_channel_that_one_of_two_readers_uses_stays() -> None:
    class Two(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.norm_a(self.a(x)).mean((2, 3))[:, :5]

    torch.manual_seed(5)
    model, x = random_norms(Two()), torch.randn(2, *SHAPE)
    model.c.weight.data[:, 1] = 0
    assert cut_channels(model, x)[1].channels == {}


@pytest.mark.parametrize("abits", [32, 8])
def test_a_network_that_relies_on_its_size_is_not_cut(abits: int, caplog) -> None:
    """Also if it rounds its inputs, so that its outputs may differ by a grid point anyway."""

    class Scaled(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / self.c.in_channels

    torch.manual_seed(6)
    model, x = random_norms(Scaled()), torch.randn(3, *SHAPE)
    model.c.weight.data[:, [1, 4, 5]] = 0
    same, cut = cut_channels(quantised(model, 8, abits, True), x)
    assert cut.channels == {} and same.c.in_channels == 8
    assert "no channels cut" in caplog.text and "outputs change by" in caplog.text


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "rn8.pth"
    save_checkpoint(quantised(get_model("rn8", "digits"), 8, 8, True).state_dict(), path)
    return path


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*words: object) -> tuple[int, str, str]:
        try:
            status = export.main(["rn8", "digits", *map(str, words)])
        except SystemExit as stop:
            status = stop.code
        return status, *capfd.readouterr()

    return run


def test_the_command_writes_a_graph_and_a_record(checkpoint, command, tmp_path) -> None:
    pytest.importorskip("onnxscript", reason="needs requirements-export.txt")
    status, _, err = command(checkpoint, "--to", tmp_path / "rn8.onnx", "--strict")
    assert status == 0, err
    layers = json.loads((tmp_path / "rn8.onnx.json").read_text())["layers"]
    assert not (tmp_path / "rn8.json").exists()  # the record of a checkpoint rn8.pth
    assert {layer["stored"] for layer in layers} == {"INT8"} and layers[0]["name"] == "conv1"


def test_a_program_loads_without_us(checkpoint, command, tmp_path) -> None:
    status, _, err = command(checkpoint, "--to", tmp_path / "rn8.pt2")
    assert status == 0, err
    program = torch.export.load(tmp_path / "rn8.pt2").module()
    assert program(torch.zeros(7, 3, 16, 16)).shape == (7, 10)


def test_measuring_tells_size_speed_and_outputs(checkpoint, command, tmp_path, monkeypatch) -> None:
    for name in ("onnxruntime", "onnxscript"):
        pytest.importorskip(name, reason="needs requirements-export.txt")
    monkeypatch.setattr(export_measure, "SECONDS", 0.0)
    monkeypatch.setattr(export_measure, "LEAST_ROUNDS", 2)
    monkeypatch.delitem(export_measure.RUNTIMES, export_measure.OPENVINO)
    status, out, err = command(checkpoint, "--to", tmp_path / "rn8.onnx", "--measure")
    assert status == 0, err
    record = json.loads((tmp_path / "rn8.onnx.json").read_text())
    assert record["bytes"] == (tmp_path / "rn8.onnx").stat().st_size < record["float32_bytes"] / 2
    assert {(x["network"], x["batch"], x["threads"]) for x in record["latencies"]} == {
        (name, batch, threads)
        for name in ("exported", "float32")
        for batch in (1, 16)
        for threads in (1, 0)
    }
    assert all(x["seconds"] > 0 and x["rounds"] == 2 for x in record["latencies"])
    assert "dense: top-1 100.00 on 1024 calibration images" in err
    assert record["dense_top1_calibration"] == 100
    found = record["outputs"][export_measure.ONNX_RUNTIME]
    assert found["top1"] > 98 and found["agreement"] > 99 and 0 <= found["kl"] < 1e-3
    assert record["outputs"]["PyTorch"]["agreement"] == 100
    assert f"{found['top1']:.2f} %" in out and f"{record['bytes'] / 1e6:.2f} MB" in out


def test_a_profile_is_exported_as_the_checkpoint_of_the_stitched_model(command, tmp_path) -> None:
    dense = get_model("rn8", "digits")
    (tmp_path / "models_quant").mkdir()
    for level, bits in (("8w8a", 8), ("4w4a", 4)):
        path = tmp_path / "models_quant" / f"rn8_{level}.pth"
        save_checkpoint(quantised(copy.deepcopy(dense), bits, bits, True).state_dict(), path)
    (tmp_path / "models_nm_quant").mkdir()
    for level in ("24_8w8a", "24_4w4a"):
        source = tmp_path / "models_quant" / f"rn8_{level[3:]}.pth"
        shutil.copy(source, tmp_path / "models_nm_quant" / f"rn8_{level}.pth")
    profile = tmp_path / "profile.txt"
    names = list(find_layers(dense))
    profile.write_text("".join(f"{('8w8a', '4w4a')[n % 2]} {x}\n" for n, x in enumerate(names)))
    words = ("--database", "mixed", "--prefix", tmp_path, "--to", tmp_path / "p.safetensors")
    status, _, err = command(profile, *words)
    assert status == 0, err
    state = load_file(tmp_path / "p.safetensors")
    for n, name in enumerate(names):
        bits = (8, 4)[n % 2]
        assert int(state[f"{name}.weight_quant.maxq"]) == 2**bits - 1
        numbers = dense.get_submodule(name).weight.numel()
        assert len(state[f"{name}.weight_codes"]) == -(-numbers * bits // 8)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--to", "x.tflite"), "name a .onnx"),
        (("--to", "x.pt2", "--measure"), "--measure needs --to FILE.onnx"),
        (("--to", "x.onnx", "--runtime", "ort"), "--runtime has no effect without --measure"),
        (("--to", "x.onnx", "--prefix", "."), "no effect without --database"),
    ],
)
def test_bad_options_are_one_line(words, message, checkpoint, command) -> None:
    status, _, err = command(checkpoint, *words)
    assert status == 2 and message in err and err.count("\n") == 1


def test_another_models_checkpoint_is_refused(command, tmp_path) -> None:
    torch.save({"conv1.weight": torch.zeros(3, 3)}, tmp_path / "other.pth")
    status, _, err = command(tmp_path / "other.pth", "--to", tmp_path / "x.pt2")
    assert status == 2 and "other.pth" in err and not (tmp_path / "x.pt2").exists()


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    with pytest.raises(UserError, match="pip install -r requirements-export.txt"):
        export_onnx.package("onnx_ir")
