"""Layers whose class does not tell what they compute: views that prove themselves on a call.

Right answers come from the same function in another spelling, with the padding as a module of its
own, and from plain least squares on what `torch.nn.functional` unfolds.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import main_trueobs
from modelutils import find_layers
from obc.solver.errors import UserError
from obc.solver.layers import forward_hooks, prove, view
from obc.toolkit.calibrate import activation_grids, calibrate, prove_layers
from obc.toolkit.compress import measured_errors
from trueobs import TrueOBS

CPU = torch.device("cpu")


class Same(nn.Conv2d):
    """TensorFlow's padding, for any stride and dilation."""

    def forward(self, x: Tensor) -> Tensor:
        pads = []
        for n, k, s, d in zip(
            x.shape[-2:], self.kernel_size, self.stride, self.dilation, strict=True
        ):
            both = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
            pads = [both // 2, both - both // 2, *pads]
        return F.conv2d(
            F.pad(x, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups
        )


class Padded(nn.Conv2d):
    """Any padding before the convolution."""

    def pad(self, x: Tensor) -> Tensor:
        return F.pad(x, (2, 0, 0, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.pad(x))


class Panorama(Padded):
    """Periodic along the width only."""

    def pad(self, x: Tensor) -> Tensor:
        return F.pad(F.pad(x, (1, 1, 0, 0), mode="circular"), (0, 0, 1, 1))


class Mirror(Padded):
    def pad(self, x: Tensor) -> Tensor:
        return F.pad(x, (2, 1, 1, 2), mode="reflect")


class Causal(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (self.dilation[0] * (self.kernel_size[0] - 1), 0)))


class Chomp(nn.Conv1d):
    """Padded on both sides, then cropped."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., : -self.padding[0]]


LEARNED = {  # a layer, the size of its input, and its padding before and after each axis
    "same": (Same(4, 6, 3, 2), (8, 8), [(0, 1), (0, 1)]),
    "same, odd": (Same(4, 6, 3, 2, bias=False), (7, 9), [(1, 1), (1, 1)]),
    "same, dilated": (Same(4, 6, 3, dilation=3), (6, 7), [(3, 3), (3, 3)]),
    "same, oblong": (Same(4, 6, (2, 5), (1, 3)), (8, 8), [(0, 1), (1, 2)]),
    "same, depthwise": (Same(4, 8, 3, 2, groups=4), (6, 6), [(0, 1), (0, 1)]),
    "same, larger than the map": (Same(4, 6, 5, 2), (4, 4), [(1, 2), (1, 2)]),
    "asymmetric": (Padded(4, 6, 3, groups=2), (5, 6), [(0, 1), (2, 0)]),
    "on top of its own": (Padded(4, 6, 3, padding=1), (5, 6), [(1, 2), (3, 1)]),
    "periodic in one axis": (Panorama(4, 6, 3), (5, 6), [(1, 1), (1, 1)]),
    "mirrored": (Mirror(4, 6, 3), (7, 6), [(1, 2), (2, 1)]),
    "causal": (Causal(4, 6, 3, dilation=2), (9,), [(4, 0)]),
    "cropped": (Chomp(4, 6, 3, padding=4, dilation=2), (9,), [(4, 0)]),
}


def proven(layer: nn.Module, x: Tensor, *names: str) -> nn.Module:
    """The layer after a call has been compared with its view."""
    with torch.no_grad(), forward_hooks({"": layer}, lambda _, *call: prove(*call)):
        layer(**dict(zip(names, [x], strict=True))) if names else layer(x)
    return layer


@pytest.mark.parametrize("name", LEARNED)
def test_a_padding_is_learned(name: str) -> None:
    layer, size, pads = LEARNED[name]
    torch.manual_seed(0)
    layer = copy.deepcopy(layer).requires_grad_(False)
    x = torch.randn(5, 4, *size)
    proven(layer, x)
    seen = view(copy.deepcopy(layer))  # copies know it, too
    assert not seen.proof.flaw
    steps, kernel = seen.stride[-len(size) :], seen.kernel[-len(size) :]
    spans = [d * (k - 1) for d, k in zip(seen.dilation[-len(size) :], kernel, strict=True)]
    for (before, after, _), wanted, n, s, span in zip(
        seen.proof.paddings[size], pads, size, steps, spans, strict=True
    ):
        unused = (n + sum(wanted) - span - 1) % s  # pixels that no window reaches
        assert (before, after) == (wanted[0], wanted[1] - unused)
    y = layer(x) if layer.bias is None else layer(x) - layer(x * 0)
    torch.testing.assert_close(seen.call(x, layer.weight), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LEARNED)
def test_the_squared_error_is_that_of_the_layers_own_forward(name: str) -> None:
    layer, size, _ = LEARNED[name]
    torch.manual_seed(0)
    layer = copy.deepcopy(layer).requires_grad_(False)
    x = torch.randn(40, 4, *size)
    solver = TrueOBS(proven(layer, x))
    solver.add_batch(x)
    before, dense = layer(x), layer.weight.clone()
    solver.prepare_unstr()
    layer.weight.copy_(solver.prune_unstr([0.5])[0])
    measured = float((layer(x) - before).double().square().sum() / len(x))
    assert solver.squared_error(layer.weight, dense) == pytest.approx(measured, rel=1e-4)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.flatten(1)
        w = (w - w.mean(1, keepdim=True)) / w.std(1, correction=0, keepdim=True)
        return F.conv2d(x, w.view_as(self.weight), self.bias, self.stride, self.padding)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Pair(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), self.bias


class Low(nn.Linear):
    """A low-rank addition of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean(-1, keepdim=True)


def on_its_grid() -> nn.Module:
    """Standardised already: only another weight shows what the layer does."""
    layer = Standardised(2, 3, 3)
    w = layer.weight.data.flatten(1)
    w = (w - w.mean(1, keepdim=True)) / w.std(1, correction=0, keepdim=True)
    layer.weight.data = w.view_as(layer.weight)
    return layer


FLAWED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "standardised": (lambda: Standardised(2, 3, 3, padding=1), (4, 2, 5, 5)),
    "standardised before": (on_its_grid, (4, 2, 5, 5)),
    "scaled": (lambda: Scaled(6, 3), (4, 6)),
    "pair": (lambda: Pair(6, 3), (4, 6)),
    "low rank": (lambda: Low(6, 3), (4, 6)),
}


@pytest.mark.parametrize("name", FLAWED)
def test_a_layer_that_does_more_has_a_flaw(name: str) -> None:
    torch.manual_seed(0)
    make, shape = FLAWED[name]
    flaw = view(proven(make(), torch.randn(shape))).proof.flaw
    assert "does not just" in flaw and "\n" not in flaw


def test_forwards_of_instances_and_hooks_count() -> None:
    torch.manual_seed(0)
    x, layer = torch.randn(4, 6), nn.Linear(6, 3)
    layer.forward = lambda x: F.linear(x, layer.weight.abs(), layer.bias)
    assert view(proven(layer, x)).proof.flaw
    layer = nn.Linear(6, 3)
    layer.register_forward_hook(lambda layer, args, y: y.relu())
    assert view(proven(layer, x)).proof.flaw


class Quiet(nn.Linear):
    """A subclass that changes nothing; called by keyword."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens)


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 4, 6)])
def test_plain_layers_and_plain_subclasses_pass(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    for layer in (proven(nn.Linear(6, 3), x), proven(Quiet(6, 3), x, "tokens")):
        assert not view(layer).proof.flaw and not any(view(layer).proof.paddings.values())
    conv = proven(nn.Conv2d(2, 3, 3), torch.randn(2, 5, 5))  # no axis of images
    assert not view(conv).proof.flaw and not view(conv).proof.paddings


def test_a_padding_for_each_size() -> None:
    """One layer on the levels of a pyramid; a size that has not been seen is refused."""
    layer = Same(2, 3, 3, 2).requires_grad_(False)
    sizes = [(8, 8), (7, 7), (1, 1), (5, 8)]
    for size in sizes:
        proven(layer, torch.randn(3, 2, *size))
    for size in sizes:
        x = torch.randn(3, 2, *size)
        ours = view(layer).call(x, layer.weight) + layer.bias.view(-1, 1, 1)
        torch.testing.assert_close(ours, layer(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="6×6 pixels, unlike on the first images"):
        view(layer).image(torch.randn(3, 2, 6, 6))


# ---------------------------------------------------------------- calls, images, groups


class Calls(nn.Module):
    """Windows, single images, tokens first, keywords, a loop, and an expert without images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.single = nn.Conv2d(8, 8, 3, padding=1)
        self.loop = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.windows, self.cell = nn.Linear(8, 8), nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(3))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(input=x).relu()
        x = torch.stack([self.single(image) for image in x])
        positive = x.mean((1, 2, 3)) > float(x.mean())
        y = torch.zeros_like(x)
        for mask, expert in zip((positive, ~positive, positive & ~positive), self.experts):  # noqa: B905
            y[mask] = expert(x[mask])
        tokens = y.flatten(2).permute(2, 0, 1)  # (positions, images, channels)
        state = torch.zeros_like(tokens[0])
        for token in tokens[:4]:
            state = torch.tanh(self.cell(input=token + state))
        tokens = self.windows(tokens.permute(1, 0, 2).reshape(-1, 4, 8)).reshape(len(x), -1, 8)
        for layer in [*self.loop, *self.loop]:
            tokens = tokens + layer(tokens).relu()
        return self.head(input=tokens.mean(1) + state)


def images(count: int = 21) -> list[tuple[Tensor, Tensor]]:
    x = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return [(part, torch.zeros(len(part))) for part in x.split(6)]


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return Calls().eval().requires_grad_(False)


@pytest.mark.parametrize("threads", [1, 2])
def test_claims_are_what_is_measured_however_layers_are_called(
    threads: int, network: nn.Module
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        prove_layers(network, network, images(), CPU)
        solvers = {name: TrueOBS(layer) for name, layer in find_layers(network).items()}
        calibrate(network, solvers, images(), CPU)
    finally:
        torch.set_num_threads(before)
    assert solvers.pop("experts.2").nsamples == 0
    assert {solver.nsamples for solver in solvers.values()} == {21}
    changes = {name: torch.randn_like(solver.layer.weight) for name, solver in solvers.items()}
    measured = measured_errors(network, changes, images(), CPU)
    for name, solver in solvers.items():
        claimed = solver.squared_error(changes[name], torch.zeros_like(changes[name]))
        assert claimed == pytest.approx(measured[name], rel=1e-4), name


def test_one_grid_over_all_calls(network: nn.Module) -> None:
    """The min-max grid of a layer spans the inputs of all of its calls."""
    x, inputs = images()[0][0], {}
    for name, layer in find_layers(network).items():
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, n=name: inputs.setdefault(n, []).append(
                (args[0] if args else kwargs["input"]).flatten()
            ),
            with_kwargs=True,
        )
    network(x)
    values = {name: torch.cat(calls) for name, calls in inputs.items()}
    seen = {name: (float(v.min()), float(v.max())) for name, v in values.items() if len(v)}
    grids = activation_grids(network, x, 8, symmetric=False, search=False)
    assert grids.keys() == seen.keys() == find_layers(network).keys() - {"experts.2"}
    for name, (low, high) in seen.items():
        step = float(grids[name].scale)
        assert step * 255 == pytest.approx(max(high, 0) - min(low, 0), rel=1e-5), name


def test_a_layer_that_the_first_images_do_not_reach_is_proven_by_others() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.late, self.odd = Same(3, 4, 3, 2), Same(4, 4, 3), Scaled(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            if len(x) == 3:  # the last batch
                y = self.late(y)
            return self.odd(y.mean((2, 3)))

    model = Late().eval().requires_grad_(False)
    twin = copy.deepcopy(model)
    prove_layers(model, twin, images(), CPU)
    for seen in (view(model.late), view(twin.late)):
        assert [p[:2] for p in seen.proof.paddings[2, 2]] == [(1, 1)] * 2
    assert view(twin.odd).proof.flaw


NET = """
import torch
import torch.nn.functional as F
from torch import nn

class Std(nn.Conv2d):
    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w, self.bias, self.stride, self.padding)

class Left(nn.Conv2d):
    def forward(self, x):
        return super().forward(F.pad(x, (2, 0, 2, 0)))

def net(left=Left):
    torch.manual_seed(0)
    left = left or (lambda *sizes: nn.Sequential(nn.ZeroPad2d((2, 0, 2, 0)), nn.Conv2d(*sizes)))
    return nn.Sequential(
        nn.Conv2d(3, 8, 4), nn.ReLU(), left(8, 8, 3), nn.ReLU(), Std(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))

def spelled():
    return net(None)
"""
MODES = {
    "quant": "quant --wbits 4 --abits 4",
    "nmprune": "nmprune",
    "blocked": "blocked --max-sparsity 0.5 --delta-sparse 0.4",
    "unstr": "unstr --max-sparsity 0.5 --delta-sparse 0.4",
    "struct": "struct --max-sparsity 0.5 --delta-sparse 0.4",
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_agrees_with_the_other_spelling(mode: str, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(NET)
    reports = {}
    for name in ("net", "spelled"):
        where = (
            ["--save", f"{tmp_path}/{name}.pth"]
            if mode in ("quant", "nmprune")
            else ["--sparse-dir", f"{tmp_path}/{name}"]
        )
        words = [f"{tmp_path}/net.py:{name}", "digits", *MODES[mode].split(), *where, "--check"]
        assert main_trueobs.main([*words, "--noaug", "--nsamples", "128", "--device", "cpu"]) == 0
        record = tmp_path / (f"{name}.json" if "--save" in where else f"{name}/{name}.json")
        reports[name] = json.loads(record.read_text())["layers"]
    for ours, theirs in zip(reports["net"], reports["spelled"], strict=True):
        assert ours["squared_error"] == pytest.approx(theirs["squared_error"], rel=1e-4)
        assert (ours["dense"], ours["result"]) == (theirs["dense"], theirs["result"])
        if not ours["dense"]:
            claimed, rounding = ours["squared_error"], 1e-6 * ours["squared_error"]
            rounding /= ours["relative_error"]  # of the sums that H is made of
            assert ours["checked_error"] == pytest.approx(claimed, rel=1e-3, abs=rounding)
    results = {report["name"]: report["result"] for report in reports["net"]}
    assert results["4"] == "Std does not just convolve its input with its weight"
    straddles = "3 input channels are not a multiple of " in results["0"]
    assert straddles == (mode in ("nmprune", "blocked"))  # 48 columns, but 3 channels
    if mode == "quant":
        state = torch.load(tmp_path / "net.pth", weights_only=True)
        assert not any(key.startswith("4.") and "quant" in key for key in state)
        assert "2.act_quant.scale" in state
