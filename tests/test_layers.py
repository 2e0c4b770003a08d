"""layers.py: every kind of layer as a matrix; a network of 1-D convolutions through all commands.

`conv1d_columns_oracle` and `hessian_oracle` are loops in float64 (tests/oracles.py).
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Array, conv1d_columns_oracle, hessian_oracle
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import database
import main_trueobs
import post_proc
import spdy
from modelutils import find_layers
from obc.solver.layers import along_rows, compressible, forward_hooks, innermost_order, view
from obc.solver.shift import Cross
from obc.toolkit.kinds import share_left
from quant import fit_weight_grid
from trueobs import TrueOBS

MODES = ("zeros", "reflect", "replicate", "circular")


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


LAYERS = {  # a layer, and the shape of its input
    "linear": (nn.Linear(6, 4), (5, 6)),
    "linear on tokens": (nn.Linear(6, 4), (2, 7, 6)),
    "1-D": (nn.Conv1d(6, 4, 3, 2, 1), (2, 6, 9)),
    "1-D, groups": (nn.Conv1d(6, 4, 4, 1, "same", 2, 2, padding_mode="reflect"), (2, 6, 9)),
    "1-D, depthwise": (nn.Conv1d(6, 12, 3, 3, 4, 1, 6, padding_mode="circular"), (3, 6, 8)),
    "2-D": (nn.Conv2d(6, 4, (3, 2), (2, 1), (1, 2), (1, 2)), (2, 6, 7, 8)),
    "2-D, groups": (nn.Conv2d(6, 4, 3, 1, "same", 1, 2, padding_mode="circular"), (2, 6, 5, 6)),
    "2-D, valid": (nn.Conv2d(3, 4, 3, (1, 2), "valid"), (2, 3, 5, 6)),
    "3-D": (nn.Conv3d(3, 4, (2, 3, 1), (1, 2, 1), (0, 1, 2), (2, 1, 1)), (2, 3, 6, 5, 4)),
    "3-D, groups": (nn.Conv3d(4, 6, 3, (2, 1, 1), 1, 1, 2), (2, 4, 5, 4, 3)),
    "3-D, same": (
        nn.Conv3d(4, 4, (3, 2, 2), 1, "same", groups=4, padding_mode="circular"),
        (2, 4, 4, 3, 5),
    ),
    "transposed": (nn.ConvTranspose2d(6, 4, (3, 2), (2, 1), (1, 0)), (2, 6, 4, 5)),
    "transposed, groups": (
        nn.ConvTranspose2d(6, 4, (4, 3), (3, 2), (2, 0), (1, 1), groups=2, dilation=(1, 2)),
        (3, 6, 3, 4),
    ),
    "transposed, cropped": (nn.ConvTranspose2d(4, 8, 2, 3, 2, 2, groups=4), (2, 4, 5, 4)),
}
Case = tuple[nn.Module, Tensor]


@pytest.fixture(params=LAYERS)
def case(request: pytest.FixtureRequest) -> Case:
    """A layer without bias, in float64, and an input."""
    layer, shape = LAYERS[request.param]
    layer = copy.deepcopy(layer).double().requires_grad_(False)
    layer.bias = None
    return layer, inputs(*shape)


# ----------------------------------------------------------------------------- a layer as a matrix


def test_patches_times_the_matrix_are_the_outputs(case: Case) -> None:
    layer, x = case
    seen = view(layer)
    outputs = layer(x).movedim(seen.channel_axis, -1).flatten(0, -2)  # (positions, rows)
    W = seen.matrix.view(seen.groups, -1, seen.columns)
    products = torch.einsum("gpd,grd->pgr", seen.patches(x), W).flatten(1)
    torch.testing.assert_close(products, outputs)


def test_pieces_of_unfolded_rows_hold_what_patches_do(case: Case) -> None:
    """Σ‖·‖² of the first row of taps, whatever the size of the pieces."""
    layer, x = case
    seen = view(layer)
    whole = torch.cat(list(seen.unfolded(x, 1 << 30)), 2)
    pieces = list(seen.unfolded(x, 1))
    assert torch.equal(torch.cat(pieces, 2), whole)
    assert len(pieces) == len(seen.image(x)) > 1
    assert whole.shape[3] == seen.columns // seen.kernel[0]


def test_a_call_with_another_weight(case: Case) -> None:
    layer, x = case
    weight = inputs(*layer.weight.shape, seed=1)
    ours = view(layer).call(x, weight)
    layer.register_forward_pre_hook(lambda module, args: args[0] * 0)  # not ours to run
    torch.testing.assert_close(view(layer).call(x, weight), ours)
    layer._forward_pre_hooks.clear()
    layer.weight.copy_(weight)
    torch.testing.assert_close(ours, layer(x))


def test_flops_are_those_of_the_flop_counter(case: Case) -> None:
    layer, x = case
    with FlopCounterMode(display=False) as counter:
        output = layer(x)
    assert view(layer).flops(output) == counter.get_total_flops() > 0


def test_the_same_layer_of_another_size(case: Case) -> None:
    layer, x = case
    seen = view(layer)
    other = seen.resized(rows=seen.rows, channels=seen.channels, groups=seen.groups).double()
    assert type(other) is type(layer) and other.bias is None
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    small = view(seen.resized(rows=2, channels=1))
    assert (small.rows, small.channels, small.groups) == (2, 1, 1)
    assert (small.columns, small.kernel) == (seen.taps, seen.kernel)


def test_innermost_columns_are_the_weight_with_its_channels_last(case: Case) -> None:
    layer, _ = case
    seen = view(layer)
    weight = seen.rows_first(layer.weight)
    wanted = weight.movedim(1, -1).flatten(1)
    assert torch.equal(seen.matrix[:, seen.innermost], wanted)
    assert torch.equal(weight.flatten(1)[:, innermost_order(weight.shape)], wanted)
    assert torch.equal(seen.own_form(seen.shaped(seen.matrix)), layer.weight)
    assert seen.divides_by(seen.channels) and not seen.divides_by(seen.channels + 1)


def test_a_number_a_row(case: Case) -> None:
    layer, _ = case
    factors, weight = inputs(view(layer).rows), view(layer).rows_first(layer.weight)
    scaled = along_rows(factors, weight) * weight
    assert torch.equal(scaled.flatten(1), factors[:, None] * view(layer).matrix)
    assert torch.equal(along_rows(factors[:, None], weight) * weight, scaled)
    view(layer).write(scaled.flatten(1))
    assert torch.equal(view(layer).matrix, scaled.flatten(1))


def test_what_is_compressible() -> None:
    class Scaled(nn.Conv1d):
        pass

    others = [
        nn.Embedding(3, 4),
        nn.ConvTranspose1d(3, 4, 2),
        nn.ConvTranspose3d(3, 4, 2),
        nn.ReLU(),
    ]
    model = nn.Sequential(nn.Linear(2, 2), Scaled(3, 4, 2), *others, nn.Conv2d(3, 3, 1))
    assert list(find_layers(model)) == ["0", "1", "6"]
    assert not any(compressible(module) for module in others)
    with pytest.raises(TypeError, match="a Embedding is not a layer that can be compressed"):
        view(others[0])


def test_hooks_see_calls_and_end_with_their_block() -> None:
    model, calls = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), []
    x = torch.randn(4, 3)

    def see(name: str, layer: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        calls.append((name, layer is model[int(name)], len(args), sorted(kwargs)))
        return output + 1 if name == "1" else None

    before = model(x)
    with (
        pytest.raises(RuntimeError, match="stop"),
        forward_hooks({"0": model[0], "1": model[1]}, see),
    ):
        torch.testing.assert_close(model(x), before + 1)
        model[1](input=torch.zeros(1, 3))
        raise RuntimeError("stop")
    assert calls == [("0", True, 1, []), ("1", True, 1, []), ("1", True, 0, ["input"])]
    assert torch.equal(model(x), before) and len(calls) == 3


# ---------------------------------------------------------------- the definitions, for every kind


def columns_oracle(layer: nn.Module, x: Tensor) -> Tensor:  # (groups, positions, d)
    """What the weights of a group's first row are multiplied with: its outputs' derivative."""
    groups, W = getattr(layer, "groups", 1), layer.weight
    transposed = isinstance(layer, nn.ConvTranspose2d)
    rows = W.shape[1] if transposed else W.shape[0] // groups  # of a group

    def outputs(weight: Tensor) -> Tensor:  # (groups, positions)
        y = torch.func.functional_call(layer, {"weight": weight}, (x,))
        return y.movedim(view(layer).channel_axis, 0)[::rows].flatten(1)

    jacobian = torch.func.jacrev(outputs)(W)  # (groups, positions, *weight.shape)
    if transposed:  # (inputs, rows of a group, kh, kw), and the kernel is mirrored
        jacobian = jacobian.unflatten(2, (groups, -1))[:, :, :, :, 0].flip(-2, -1)
    else:
        jacobian = jacobian[:, :, ::rows]
    first = jacobian.diagonal(dim1=0, dim2=2)  # (positions, …, groups)
    return first.movedim(-1, 0).flatten(2)


def test_hessian_and_cross_products_are_the_definitions(case: Case) -> None:
    layer, x = case
    columns = columns_oracle(layer, x)
    H = 2 / len(x) * columns.mT @ columns
    obs, cross = TrueOBS(layer), Cross(layer)
    y = inputs(*layer(x).shape, seed=2)  # any outputs to aim at
    for batch, aims in zip(x.split(1), y.split(1), strict=True):
        obs.add_batch(batch)
        cross.add(batch, aims)
    torch.testing.assert_close(obs.H.view(H.shape), H)
    assert obs.gram.patches == columns.shape[1] == view(layer).positions(x)
    Y = y.movedim(view(layer).channel_axis, 0).flatten(1).unflatten(0, (len(H), -1))
    torch.testing.assert_close(cross.take(), Y @ columns)


@pytest.mark.parametrize("kind", ["3-D", "transposed"])
@pytest.mark.parametrize("mode", ["quant", "nmprune", "unstr", "blocked", "struct"])
def test_every_mode_of_a_kind_is_that_of_a_linear_layer(mode: str, kind: str) -> None:
    """With the Hessian by definition and, for N:M and blocks, the channels put innermost."""
    if kind == "3-D":
        layer, x = nn.Conv3d(4, 6, (2, 3, 1), (1, 2, 1), (1, 1, 0)), inputs(6, 4, 4, 5, 3)
    else:
        layer, x = nn.ConvTranspose2d(4, 6, (2, 3), (1, 2), 1, (0, 1)), inputs(9, 4, 5, 6)
    layer = layer.double().requires_grad_(False)
    layer.weight.data.copy_(inputs(*layer.weight.shape, seed=1))
    dense = view(layer).matrix.clone()
    columns = columns_oracle(layer, x)[0]
    order = torch.arange(24)
    if mode in ("nmprune", "blocked"):  # (depth, height, width, channel)
        order = order.view(4, 6).T.flatten()
    layer, flat = layer.float(), nn.Linear(24, 6, bias=False)  # H is in float64 all the same
    flat.weight.data.copy_(dense[:, order])
    theirs, ours = TrueOBS(flat), TrueOBS(layer)
    theirs.set_hessian((2 / len(x) * columns.T @ columns)[None, order[:, None], order], len(x))
    ours.add_batch(x)
    if mode == "struct":
        results = ours.prune_struct([0.3, 0.7], size=6), theirs.prune_struct([0.3, 0.7], size=6)
    else:
        results = weights_of(ours, mode), weights_of(theirs, mode)
    for weight, other in zip(*results, strict=True):
        torch.testing.assert_close(ours.view.rows_first(weight).flatten(1)[:, order], other)
    assert not torch.equal(ours.view.rows_first(results[0][-1]).flatten(1).double(), dense)


# --------------------------------------------------------------------------------- the 1-D Hessian


def assert_is_the_oracle(layer: nn.Conv1d, x: Tensor) -> None:
    columns = conv1d_columns_oracle(
        x.numpy(),
        layer.kernel_size[0],
        layer.stride[0],
        layer.padding if isinstance(layer.padding, str) else layer.padding[0],
        layer.dilation[0],
        layer.groups,
        layer.padding_mode,
    )
    oracle: Array = np.stack([hessian_oracle(each, len(x)) for each in columns])
    obs = TrueOBS(layer)
    for batch in x.split(2):
        obs.add_batch(batch)
    H = obs.H if layer.groups > 1 else obs.H[None]
    np.testing.assert_allclose(H, oracle, rtol=0, atol=1e-9 * np.abs(oracle).max())


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [(1, 1, 0, 1), (3, 1, 1, 1), (3, 2, 1, 1), (4, 1, "same", 2), (5, 3, 4, 2), (2, 1, "valid", 3)],
)
def test_hessian_of_a_1d_convolution_is_the_oracle(
    kernel: int, stride: int, padding: int | str, dilation: int, mode: str, groups: int
) -> None:
    layer = nn.Conv1d(4, 4, kernel, stride, padding, dilation, groups, padding_mode=mode)
    assert_is_the_oracle(layer, inputs(3, 4, 9))


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Conv1d, tuple[int, ...]]:
    kernel, dilation, stride = (draw(st.integers(1, high)) for high in (5, 3, 4))
    padding = draw(st.sampled_from(["same", "valid", 0, 1, 3]))
    mode, groups = draw(st.sampled_from(MODES)), draw(st.integers(1, 3))
    stride = 1 if padding == "same" else stride
    length = max(7, dilation * (kernel - 1) + 1) + draw(st.integers(0, 4))
    channels = groups * draw(st.integers(1, 2))
    shape = (channels, groups, kernel, stride, padding, dilation, groups)
    layer = nn.Conv1d(*shape, padding_mode=mode)
    return layer, (draw(st.integers(1, 3)), channels, length)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(convolutions())
def test_property_any_1d_convolution_is_the_oracle(
    drawn: tuple[nn.Conv1d, tuple[int, ...]],
) -> None:
    layer, shape = drawn
    assert_is_the_oracle(layer, inputs(*shape))


# ------------------------------------------------------------------------------------ all its modes


def solvers(groups: int) -> tuple[TrueOBS, TrueOBS]:
    """Of a 1-D convolution, and of the 2-D one that does the same to an image of one row."""
    torch.manual_seed(0)
    options = {"stride": 2, "dilation": 2, "groups": groups, "bias": False}
    flat = nn.Conv1d(8, 8, 3, padding=2, **options)
    options |= {"stride": (1, 2), "dilation": (1, 2)}
    image = nn.Conv2d(8, 8, (1, 3), padding=(0, 2), **options)
    image.weight.data.copy_(flat.weight.data[:, :, None])
    x, pair = torch.randn(40, 8, 11), (TrueOBS(flat), TrueOBS(image))
    pair[0].add_batch(x)
    pair[1].add_batch(x[:, :, None])
    return pair


def weights_of(obs: TrueOBS, mode: str) -> list[Tensor]:
    grid = [0.0, 0.3, 0.7]
    if mode == "quant":
        obs.quantizer = fit_weight_grid(obs.view.matrix, 3)
        obs.quantize()
    elif mode == "nmprune":
        obs.nmprune(2, 4)
    elif mode == "unstr":
        obs.prepare_unstr()
        return obs.prune_unstr(grid)
    elif mode == "blocked":
        obs.prepare_blocked(4)
        return obs.prune_blocked(grid)
    else:
        return obs.prune_struct(grid, size=obs.view.taps)
    return [obs.layer.weight.detach()]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("mode", ["quant", "nmprune", "unstr", "blocked", "struct"])
def test_every_mode_does_what_it_does_to_an_image_of_one_row(mode: str, groups: int) -> None:
    flat, image = solvers(groups)
    dense = flat.layer.weight.detach().clone()
    ours, theirs = weights_of(flat, mode), weights_of(image, mode)
    assert len(ours) == len(theirs) and ours[0].shape == dense.shape
    assert all(torch.equal(a, b.squeeze(2)) for a, b in zip(ours, theirs, strict=True))
    assert not torch.equal(ours[-1], dense)
    assert flat.squared_error(ours[-1], dense) == image.squared_error(theirs[-1], dense) > 0


def test_share_of_weights_left_of_a_1d_convolution() -> None:
    weight = torch.ones(2, 8, 3)
    weight[:, ::2] = 0  # 2 of every 4 input channels, at every tap
    assert share_left(weight, "mixed") == 0.5
    weight[0, 0, 1] = 1  # one group with one zero: not 2:4
    assert share_left(weight, "mixed") == 1.0
    weight[1, 4:, 2] = 0  # one block of 4 input channels, of 12
    assert share_left(weight, "4block_8w8a") == 11 / 12
    assert share_left(torch.zeros(2, 6, 3), "mixed") == 1.0  # 18 columns: left dense


# ------------------------------------------------------------------------------------- the commands

NET = '''
import torch
from torch import nn

class Signals(nn.Module):
    """The rows of an image, one after the other, as one signal."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(3, 8, 5, stride=2, padding=2)
        self.norm = nn.BatchNorm1d(8)
        self.second = nn.Conv1d(8, 16, 3, padding=2, dilation=2, groups=2, padding_mode="circular")
        self.third = nn.Conv1d(16, 16, 3, padding="same", padding_mode="reflect", bias=False)
        self.up = nn.ConvTranspose2d(16, 8, (1, 4), (1, 2), (0, 1), groups=2, bias=False)
        self.last = nn.Linear(8, 10)

    def forward(self, images):
        x = torch.relu(self.norm(self.first(images.flatten(2))))
        x = torch.relu(self.third(torch.relu(self.second(x))))
        return self.last(torch.relu(self.up(x[:, :, None])).mean((2, 3)))

def signals():
    torch.manual_seed(0)
    return Signals()
'''


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("network") / "net.py"
    path.write_text(NET)
    return f"{path}:signals"


@pytest.fixture(scope="module")
def compressed(network: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with databases of all kinds, and a record for each."""
    folder = tmp_path_factory.mktemp("compressed")
    grid = "--max-sparsity 0.5 --delta-sparse 0.3"
    for words in (
        f"quant --wbits 8 --abits 8 --save {folder}/models_quant/signals_8w8a.pth",
        f"quant --wbits 4 --abits 4 --save {folder}/models_quant/signals_4w4a.pth",
        f"nmprune --save {folder}/models_nm/signals_24.pth",
        f"unstr {grid} --sparse-dir {folder}/models_unstr",
        f"blocked {grid} --sparse-dir {folder}/models_4block",
        f"struct {grid} --sparse-dir {folder}/models_struct",
    ):
        line = [network, "digits", *words.split(), "--check", "--noaug", "--nsamples", "128"]
        assert main_trueobs.main(line) == 0, words
    return folder


LAYER_SHAPES = {
    "first": [8, 3, 5],
    "second": [16, 4, 3],
    "third": [16, 16, 3],
    "up": [16, 4, 1, 4],
    "last": [10, 8],
}


def test_errors_of_all_modes_hold_when_measured(compressed: Path) -> None:
    """--check: what the solver claims is what the layer's own operation loses."""
    paths = sorted(compressed.rglob("*.json"))
    assert len(paths) == 6
    for path in paths:
        layers = json.loads(path.read_text())["layers"]
        assert {layer["name"]: layer["shape"] for layer in layers} == LAYER_SHAPES
        left_dense = {layer["name"] for layer in layers if layer["dense"]}
        whole = path.stem == "signals_24" or path.parent.name == "models_4block"
        assert left_dense == ({"first"} if whole else set())  # 15 columns
        for layer in layers:
            if not layer["dense"]:
                claimed, relative = layer["squared_error"], layer["relative_error"]
                rounding = 1e-6 * claimed / relative  # of the sums that H is made of
                assert layer["checked_error"] == pytest.approx(claimed, rel=1e-3, abs=rounding)


def test_groups_run_along_the_channels(compressed: Path) -> None:
    state = torch.load(compressed / "models_nm/signals_24.pth", weights_only=True)
    up = state["up.weight"].unflatten(0, (2, 8)).transpose(1, 2)  # (group, row, channel, 1, 4)
    weights = [state[f"{layer}.weight"] for layer in ("second", "third", "last")]
    for weight in (*weights, up.flatten(0, 1)):
        groups = weight.movedim(1, -1).reshape(-1, 4)
        assert ((groups == 0).sum(1) == 2).all()
    state = torch.load(compressed / "models_struct/signals_5000.pth", weights_only=True)
    gone = (state["third.weight"] == 0).transpose(0, 1).flatten(1).all(1)
    assert int(gone.sum()) == 8  # whole input channels


@pytest.mark.parametrize("kind", ["unstr", "4block", "mixed"])
def test_scores_a_profile_and_a_stitched_model(kind: str, network: str, compressed: Path) -> None:
    scores = f"--prefix {compressed} --score_path {compressed / 'scores'}".split()
    for errors in ("squared", "loss"):
        assert database.main([network, "digits", kind, errors, *scores]) == 0
    target = "1.5" if kind != "mixed" else "6"
    words = [network, "digits", target, kind, "--dp", *scores]
    assert spdy.main(words) == 0
    (profile,) = compressed.glob(f"signals_{kind}_*_dp.txt")
    path = compressed / f"{kind}.pth"
    words = [network, "digits", str(profile), "--database", kind, "--prefix", str(compressed)]
    for corrections in ("--bnt", "--statcorr", "--gap --gap-epochs 1"):
        assert post_proc.main([*words, *corrections.split(), "--save", str(path)]) == 0
        state = torch.load(path, weights_only=True)
        assert {name: list(state[f"{name}.weight"].shape) for name in LAYER_SHAPES} == LAYER_SHAPES
        assert all(torch.isfinite(tensor).all() for tensor in state.values())
