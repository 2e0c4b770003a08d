"""Errors per layer and level against the plain way: replace one layer, run the whole model."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from obc.inputs import tracing
from obc.inputs.vision import torchvision
from obc.toolkit import sensitivity
from obc.toolkit.fingerprints import content_hash
from obc.toolkit.leveldb import Database
from quant import fit_activation_grid, set_activation_grid

CPU = torch.device("cpu")


class Residual(nn.Module):
    """In-place operations of every kind, a shared layer, a side branch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.side = nn.Conv2d(8, 8, 1)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        out = self.norm(self.shared(x))
        out += self.side(x)
        out = F.relu(out, inplace=True)
        out.mul_(0.5)
        out = self.shared(out)
        return self.linear(out.mean((2, 3)))


class Untraceable(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.sum()) < 1e9 else x


def levels_of(model: nn.Module) -> Database:
    """Dense, two pruned levels, one of which equals the other in a layer, and 4-bit inputs."""
    states = {}
    for level, share in (("0000", 0.0), ("3000", 0.3), ("6000", 0.6), ("9000", 0.6)):
        net = copy.deepcopy(model)
        for name, layer in net.named_modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                weight = layer.weight.data.view(-1)
                order = weight.abs().argsort()
                keep = level == "9000" and name == "side"
                weight[order[: int((0.0 if keep else share) * len(order))]] = 0
                if level == "9000":
                    set_activation_grid(layer, fit_activation_grid(torch.randn(99), 4))
        states[level] = net.state_dict()
    return Database("unstr", "net", states)


def images(batches: int = 3, size: int = 12) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(5 + i, 3, size, size, generator=generator),
            torch.randint(4, (5 + i,), generator=generator),
        )
        for i in range(batches)
    ]


def plain_losses(model: nn.Module, db: Database, batches: list) -> dict[str, dict[str, float]]:
    def loss(net: nn.Module) -> float:
        with torch.no_grad():
            sums = [F.cross_entropy(net(x), y, reduction="sum") for x, y in batches]
        return float(sum(sums)) / sum(len(y) for _, y in batches)

    dense = loss(model)
    scores: dict[str, dict[str, float]] = {}
    for layer in db.layers:
        for level in db.levels:
            net = copy.deepcopy(model)
            db.stitch(net, {layer: level})
            scores.setdefault(layer, {})[level] = loss(net) - dense
    return scores


def model_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "resnet18":
        return torchvision.models.resnet18(num_classes=4).eval()
    return {"residual": Residual, "untraceable": Untraceable}[kind]().eval()


@pytest.mark.parametrize("kind", ["residual", "untraceable", "resnet18"])
def test_losses_are_those_of_the_plain_way(kind: str) -> None:
    model = model_of(kind)
    db = levels_of(model)
    batches = images(1, 32) if kind == "resnet18" else images()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    scores = sensitivity.losses(model, db, batches, CPU)
    wanted = plain_losses(model, db, batches)
    assert list(scores) == db.layers and all(list(of) == db.levels for of in scores.values())
    for layer in db.layers:
        for level in db.levels:
            assert scores[layer][level] == pytest.approx(wanted[layer][level], abs=2e-6)
    assert any(abs(value) > 1e-4 for of in scores.values() for value in of.values())
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_the_noise_of_losses_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = model_of("residual")
    db = levels_of(model)
    generator = torch.Generator().manual_seed(7)
    inputs = torch.randn(29, 3, 8, 8, generator=generator).split(8)
    labels = torch.randint(4, (29,), generator=generator).split(8)
    batches = list(zip(inputs, labels, strict=True))  # the last one, of 5 images, tells less
    with caplog.at_level("INFO", "trueobs"):
        sensitivity.losses(model, db, batches, CPU)
    each = [plain_losses(model, db, [batch]) for batch in batches]
    errors, unknown = [], 0
    for layer, sets in sensitivity.Measurement(model, db, None).levels.items():
        for level in sets:
            values = np.array([scores[layer][level] for scores in each])
            errors.append(np.std(values[:3], ddof=1) / np.sqrt(3))
            unknown += abs(np.average(values, weights=[8, 8, 8, 5])) < 2 * errors[-1]
    message = caplog.messages[-1]
    assert "over 29 images" in message
    assert f"{unknown} of {len(errors)} changes" in message
    assert f"{np.median(errors):.2g} nat" in message
    assert ("--nsamples" in message) == (2 * unknown >= len(errors))


def test_the_plain_way_is_traced_only_where_it_can_be() -> None:
    assert isinstance(tracing.resumable(model_of("residual")), tracing.TracedModel)
    assert isinstance(tracing.resumable(model_of("untraceable")), tracing.UntracedModel)


@pytest.mark.parametrize("kind", ["residual", "untraceable"])
def test_squared_errors_are_the_definition(kind: str) -> None:
    model = model_of(kind)
    db, batches = levels_of(model), images()
    scores = sensitivity.squared_errors(model, db, batches, CPU)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in db.layers}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda m, x, y, name=name: seen[name].append((x[0].clone(), y.clone()))
        )
        for name in db.layers
    ]
    with torch.no_grad():
        for x, _ in batches:
            model(x)
    for handle in handles:
        handle.remove()
    for name, calls in seen.items():
        for level in db.levels:
            net = copy.deepcopy(model)
            db.stitch(net, {name: level})
            layer = net.get_submodule(name)
            with torch.no_grad():
                error = sum(float((layer(x) - y).double().square().sum()) for x, y in calls)
            energy = sum(float(y.double().square().sum()) for _, y in calls)
            assert scores[name][level] == pytest.approx(error / energy, rel=1e-4, abs=1e-9)


class Hidden(nn.Module):
    """A layer's weight is used where a trace records a tensor, not where it comes from."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).mean((2, 3))
        scale = next(self.linear.parameters()).abs().sum() / 4
        return self.linear(x * scale)


def test_a_use_of_a_layer_that_the_trace_does_not_see(caplog: pytest.LogCaptureFixture) -> None:
    tracing.logged.clear()
    torch.manual_seed(0)
    model = Hidden().eval()
    db, batches = levels_of(model), images()
    scores, right = sensitivity.losses(model, db, batches, CPU), plain_losses(model, db, batches)
    assert "resumed from linear, the model gives other outputs" in caplog.text
    assert len(caplog.records) == 1
    for layer in db.layers:
        assert scores[layer] == pytest.approx(right[layer], abs=2e-6)


class InPlaceLinear(nn.Linear):
    """A layer that overwrites its own input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.leaky_relu_(x, 0.5).mul_(2))


def test_squared_errors_of_a_layer_that_overwrites_its_input() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), InPlaceLinear(12, 4)).eval()
    db, batches = levels_of(model), images(size=2)
    scores = sensitivity.squared_errors(model, db, batches, CPU)["1"]
    dense, energy = model[1].requires_grad_(False), 0.0
    errors = dict.fromkeys(db.levels, 0.0)
    for x, _ in images(size=2):
        x = 2 * torch.where(x > 0, x, x / 2).flatten(1)
        energy += float((x @ dense.weight.T + dense.bias).double().square().sum())
        for level in ("3000", "6000"):
            change = db.states[level]["1.weight"] - dense.weight
            errors[level] += float((x @ change.T).double().square().sum())
    for level in ("0000", "3000", "6000"):
        assert scores[level] == pytest.approx(errors[level] / energy, rel=1e-4)


def test_equal_levels_run_once() -> None:
    db = levels_of(model_of("residual"))
    db.states = {"0000": db.states["0000"], "1000": db.states["0000"], "3000": db.states["3000"]}
    db.levels = list(db.states)
    stem = model_of("residual").stem
    sets = sensitivity.distinct_levels(db, "stem", stem)
    assert sets == {"": ["", "0000", "1000"], "3000": ["3000"]}
    stem.weight.data += 1
    sets = sensitivity.distinct_levels(db, "stem", stem)
    assert sets == {"": [""], "0000": ["0000", "1000"], "3000": ["3000"]}


@pytest.mark.parametrize("threads", [1, 3])
def test_levels_are_hashed_on_one_thread_each(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or n threads would have n of PyTorch's own each."""
    db, seen, before = levels_of(model_of("residual")), [], torch.get_num_threads()

    def hashed(tensors: dict[str, Tensor]) -> str:
        seen.append(torch.get_num_threads())
        return content_hash(tensors)

    monkeypatch.setattr(sensitivity, "content_hash", hashed)
    torch.set_num_threads(threads)
    try:
        sets = sensitivity.distinct_levels(db, "stem", model_of("residual").stem)
        assert seen == [threads] + [1] * len(db.levels)  # the dense layer is hashed first
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert sorted(level for of in sets.values() for level in of if level) == db.levels


def test_prior_is_quadratic_and_alike_for_all_layers() -> None:
    db = levels_of(model_of("residual"))
    prior = sensitivity.quadratic_prior(db)
    assert prior["stem"] == {"0000": 0.0, "3000": 1 / 9, "6000": 4 / 9, "9000": 1.0}
    assert all(of == prior["stem"] for of in prior.values())
