"""Layers of trained networks on real CIFAR-10 images: the engine against the textbook in float64.

In float64 (d ≤ 150) order, losses and weights agree to 1e-9, or to what the oracle's own explicit
inverse leaves of float64 at the condition number of H, if that is less. In float32 the total error
of a few rows at d = 576 and 1152 agrees to 1e-4.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import (
    Array,
    OracleTrace,
    block_oracle,
    conv_columns_oracle,
    decouple_dead,
    global_selection_oracle,
    nm_oracle,
    quantise_oracle,
    squared_error,
    structured_oracle,
    unstructured_oracle,
)
from torch import Tensor, nn

from datautils import calibration_batches, load_data
from modelutils import find_layers, get_model
from quant import fit_weight_grid
from trueobs import TrueOBS

PER_CLASS = 16
EPSILON = np.finfo(np.float64).eps


@pytest.fixture(scope="module")
def images(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first training images of every class; nothing else of the archive is unpacked."""
    folder = tmp_path_factory.mktemp("few")
    left: dict[str, int] = {}
    with tarfile.open(shared_data / "cifar10.tar.gz", "r|gz") as archive:
        for member in archive:
            parent = str(Path(member.name).parent)
            if member.isfile() and left.setdefault(parent, PER_CLASS):
                left[parent] -= 1
                archive.extract(member, folder, filter="data")
    return folder / "cifar10"


@dataclass
class RealLayer:
    """A few rows of a trained layer, and its inputs."""

    layer: nn.Module  # with these rows only
    inputs: Tensor

    @cached_property
    def H(self) -> Array:  # (d, d)
        x, layer = self.inputs.double().numpy(), self.layer
        if isinstance(layer, nn.Linear):
            columns = x.T
        else:
            shape = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
            columns = conv_columns_oracle(x, *shape)[0]
        return 2 / len(x) * (columns @ columns.T)

    @cached_property
    def rows(self) -> list[Array]:
        W = self.layer.weight.detach().double().flatten(1).numpy()
        return list(decouple_dead(W, self.H)[0])

    @cached_property
    def tolerance(self) -> float:
        return max(1e-9, float(np.linalg.cond(decouple_dead(self.rows[0], self.H)[1])) * EPSILON)

    @property
    def innermost(self) -> np.ndarray:  # columns in the order (kh, kw, channel)
        spatial = self.layer.weight[0, 0].numel()
        return np.arange(len(self.H)).reshape(-1, spatial).T.ravel()

    def problems(self, innermost: bool = False) -> list[tuple[Array, Array]]:  # (w, H) of each row
        order = self.innermost if innermost else np.arange(len(self.H))
        H = decouple_dead(self.rows[0], self.H)[1][order][:, order]
        return [(w[order], H) for w in self.rows]

    def obs(self, dtype: torch.dtype) -> TrueOBS:
        """A fresh `TrueOBS` that has seen the inputs, on a fresh copy of the rows."""
        few = few_rows(self.layer, len(self.rows)).to(dtype)
        obs = TrueOBS(few)
        for part in self.inputs.to(dtype).split(50):
            obs.add_batch(part, None)
        return obs


def few_rows(layer: nn.Module, rows: int) -> nn.Module:
    """The layer with its first rows only."""
    if isinstance(layer, nn.Linear):
        few = nn.Linear(layer.in_features, rows, bias=False)
    else:
        few = nn.Conv2d(
            layer.in_channels, rows, layer.kernel_size, layer.stride, layer.padding, bias=False
        )
    few.weight.data.copy_(layer.weight.detach()[:rows])
    return few


def real_layer(model: nn.Module, name: str, folder: Path, size: int, count: int, rows: int):
    """A few rows of the layer `name`, and its inputs for the first `count` images."""
    dataset = load_data("cifar10", datapath=folder, image_size=size, nsamples=count)
    layer = find_layers(model)[name]
    seen: list[Tensor] = []
    hook = layer.register_forward_hook(lambda module, args, out: seen.append(args[0].clone()))
    with torch.no_grad():
        for batch, _ in calibration_batches(dataset, batchsize=50):
            model(batch)
    hook.remove()
    return RealLayer(few_rows(layer, rows), torch.cat(seen))


@pytest.fixture(scope="module", params=["conv1", "layer1.0.conv1", "layer1.2.conv2", "linear"])
def small(request: pytest.FixtureRequest, shared_data: Path, images: Path) -> RealLayer:
    """A layer of rn20 with d ≤ 150."""
    model = get_model("rn20", "cifar10", shared_data / "rn20_cifar10.pth")
    count = 160 if request.param == "linear" else 12
    return real_layer(model, request.param, images, 32, count, rows=4)


LARGE = {  # d: model, weights, layer, image size, rows
    576: ("rn20", "rn20_cifar10.pth", "layer3.1.conv1", 32, 3),
    1152: ("rn18", "rn18_cifar10_64px.pth", "layer2.1.conv1", 64, 1),
}


@pytest.fixture(scope="module", params=LARGE)
def large(request: pytest.FixtureRequest, shared_data: Path, images: Path) -> RealLayer:
    name, weights, layer, size, rows = LARGE[request.param]
    model = get_model(name, "cifar10", shared_data / weights)
    it = real_layer(model, layer, images, size, 100, rows)
    assert it.H.shape == (request.param, request.param)
    return it


# ------------------------------------------------------------------------------ float64, d ≤ 150


def assert_close(ours: Tensor | Array, oracle: Array, tolerance: float) -> None:
    """Relative to the largest value: small losses are differences of large numbers."""
    np.testing.assert_allclose(ours, oracle, rtol=tolerance, atol=tolerance * np.abs(oracle).max())


def check_order(obs: TrueOBS, traces: list[OracleTrace], tolerance: float, unit: int = 1) -> None:
    for r, trace in enumerate(traces):
        dead = obs.columns // unit - len(trace.order)
        assert (obs.trace.order[r, ::unit] // unit).tolist()[dead:] == trace.order
        assert_close(obs.Losses[r].view(-1, unit).sum(1)[dead:], trace.losses, tolerance)


def test_hessian(small: RealLayer) -> None:
    assert_close(small.obs(torch.float64).H, small.H, 1e-12)
    assert_close(small.obs(torch.float32).H, small.H, 1e-5)


def test_unstructured(small: RealLayer) -> None:
    obs = small.obs(torch.float64)
    obs.prepare_unstr()
    traces = [unstructured_oracle(w, H, w != 0) for w, H in small.problems()]
    check_order(obs, traces, small.tolerance)
    dead = obs.columns - len(traces[0].order)
    losses = np.stack([np.pad(trace.losses, (dead, 0)) for trace in traces])
    sparsities = [0.25, 0.5, 0.75, 0.9]
    for sparsity, weight in zip(sparsities, obs.prune_unstr(sparsities), strict=True):
        counts = global_selection_oracle(losses, sparsity)
        wanted = [t.weights_after(max(0, k - dead)) for t, k in zip(traces, counts, strict=True)]
        assert_close(weight.flatten(1), np.stack(wanted), small.tolerance)


def test_blocked(small: RealLayer) -> None:
    obs = small.obs(torch.float64)
    if obs.columns % 4:
        with pytest.raises(ValueError, match="multiple of 4"):
            obs.prepare_blocked(4)
        return
    obs.prepare_blocked(4)
    check_order(obs, [block_oracle(w, H, 4) for w, H in small.problems(True)], small.tolerance, 4)


def test_nm(small: RealLayer) -> None:
    m = 4 if len(small.H) % 4 == 0 else 3
    obs = small.obs(torch.float64)
    obs.nmprune(2, m)
    pruned = obs.layer.weight.detach().flatten(1).numpy()[:, small.innermost]
    for r, (w, H) in enumerate(small.problems(True)):
        trace = nm_oracle(w, H, 2, m, w != 0)
        assert_close(pruned[r], trace.weights, small.tolerance)
        assert_close(
            obs.Losses[r, obs.Losses.shape[1] - len(trace.losses) :], trace.losses, small.tolerance
        )
        assert ((pruned[r] == 0).reshape(-1, m).sum(1) == 2).all()


@pytest.mark.parametrize("bits", [2, 4])
def test_quantise(small: RealLayer, bits: int) -> None:
    obs = small.obs(torch.float64)
    quantise(obs, bits)
    quantised = obs.layer.weight.detach().flatten(1)
    for r, trace in enumerate(quantise_traces(small, obs)):
        assert_close(quantised[r], trace.weights, small.tolerance)
        losses = obs.Losses[r, obs.columns - len(trace.losses) :]
        assert_close(losses, trace.losses, small.tolerance)


def test_structured(small: RealLayer) -> None:
    obs = small.obs(torch.float64)
    size = obs.layer.weight[0, 0].numel()
    levels = obs.prune_struct([0.25, 0.5], size)
    trace = structured_oracle(np.stack(small.rows), small.problems()[0][1], size)
    assert_close(obs.Losses[0].view(-1, size).sum(1), trace.losses, small.tolerance)
    for sparsity, weight in zip([0.25, 0.5], levels, strict=True):
        gone = int(np.ceil(sparsity * obs.columns / size))
        assert_close(weight.flatten(1), trace.weights_after(gone), small.tolerance)


# ------------------------------------------------------------------------- float32, d = 576, 1152


def quantise(obs: TrueOBS, bits: int) -> None:
    obs.quantizer = fit_weight_grid(obs.layer.weight.detach().flatten(1), bits)
    obs.quantize()


def quantise_traces(it: RealLayer, obs: TrueOBS) -> list[OracleTrace]:
    grid = obs.quantizer
    low, high = -int(grid.maxq + 1) // 2, int(grid.maxq) // 2
    traces = []
    for (w, H), step in zip(it.problems(), grid.scale[:, 0].double().tolist(), strict=True):

        def rounded(w: Array, step: float = step) -> Array:
            return step * np.clip(np.round(w / step), low, high)

        traces.append(quantise_oracle(w, H, rounded, step, mask=w != 0))
    return traces


def check_total(it: RealLayer, obs: TrueOBS, weight: Tensor, oracle: list[Array]) -> None:
    """The true error and the sum of the losses are both as small as the oracle's."""
    W = weight.detach().double().flatten(1).numpy()
    error, wanted = (
        sum(squared_error(w, w_hat, it.H) for w, w_hat in zip(it.rows, rows, strict=True))
        for rows in (W, oracle)
    )
    assert error == pytest.approx(wanted, rel=1e-4)
    assert obs.damping == 0


def float32_unstructured(it: RealLayer) -> None:
    obs = it.obs(torch.float32)
    obs.prepare_unstr()
    traces = [unstructured_oracle(w, H) for w, H in it.problems()]
    counts = global_selection_oracle(np.stack([t.losses for t in traces]), 0.5)
    wanted = [t.weights_after(int(k)) for t, k in zip(traces, counts, strict=True)]
    check_total(it, obs, obs.prune_unstr([0.5])[0], wanted)
    total = sum(float(t.losses.sum()) for t in traces)
    assert float(obs.Losses.double().sum()) == pytest.approx(total, rel=1e-4)


def float32_quantise(it: RealLayer) -> None:
    obs = it.obs(torch.float32)
    quantise(obs, 4)
    traces = quantise_traces(it, obs)
    check_total(it, obs, obs.layer.weight, [t.weights for t in traces])
    total = sum(float(t.losses.sum()) for t in traces)
    assert float(obs.Losses.double().sum()) == pytest.approx(total, rel=1e-4)


def float32_nm(it: RealLayer) -> None:
    obs = it.obs(torch.float32)
    obs.nmprune(2, 4)
    back = it.innermost.argsort()
    traces = [nm_oracle(w, H, 2, 4) for w, H in it.problems(True)]
    check_total(it, obs, obs.layer.weight, [t.weights[back] for t in traces])
    total = sum(float(t.losses.sum()) for t in traces)
    assert float(obs.Losses.double().sum()) == pytest.approx(total, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("check", [float32_unstructured, float32_quantise, float32_nm])
def test_float32_total_error(large: RealLayer, check: Callable[[RealLayer], None]) -> None:
    check(large)
