"""tracing.py: a traced model gives the model's own answers, from wherever it is resumed."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelutils import evaluating
from obc.inputs.tracing import TracedModel


class Tangled(nn.Module):
    """Values with several readers, views, sums of several shapes, and work in place."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.conv3 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.conv4, self.bn4 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace)

    def forward(self, x: Tensor) -> Tensor:
        first = self.bn1(self.conv1(x))
        corner = first[:, :, :1, :1]  # a view
        once = self.relu(first)
        twice = self.conv2(once)
        total = twice + once
        broadcast = self.conv3(corner) + total  # of another shape than its first argument
        last = F.relu(self.conv3(broadcast)) + x.mean()
        pair = (last, self.bn4(self.conv4(last)))
        return operator.add(pair[0], torch.add(self.conv2(pair[1]), twice)) + corner


class Rectified(nn.Module):
    """An in-place ReLU rectifies the identity of a residual sum, too (cases/a/3)."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.d, self.k = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        identity = self.bn(self.c(x))
        out = self.relu(identity)
        out = out + self.d(x)
        return torch.relu(self.k(out) + identity)


class Overwriting(nn.Module):
    """Works in place in every other way there is, on the images and on values that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        y = self.a(x)
        pieces = y.chunk(2, dim=1)  # views
        half = pieces[0]
        z = self.bn(self.b(y))
        half += z[:, :2]
        F.hardtanh(pieces[1], -0.5, 0.5, True)
        torch.clamp(z, max=0.7, out=z)
        y[:, 0] = z[:, 1]
        return F.relu(y, True) * z + x[:, :1]


def randomise(model: nn.Module) -> nn.Module:
    """Statistics and factors that folding has to get right."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval()


MODELS = {
    "tangled": lambda: Tangled(False),
    "tangled, in place": lambda: Tangled(True),
    "rectified identity": Rectified,
    "overwriting": Overwriting,
}


@pytest.mark.parametrize("make", MODELS.values(), ids=list(MODELS))
def test_the_same_answer_from_any_operation(make: Callable[[], nn.Module]) -> None:
    model = randomise(make())
    images = torch.randn(2, 3, 5, 5)
    with evaluating(model):
        expected = model(images.clone())
        run = TracedModel(model)
        assert run.folded
        run.begin(images.clone())
        torch.testing.assert_close(run.finish(), expected, rtol=1e-5, atol=1e-5)
        for number in range(1, len(run.nodes)):  # 0 is the images
            run.advance(number)
            for _ in range(2):  # the values at `number` serve every level
                torch.testing.assert_close(run.finish(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", MODELS.values(), ids=list(MODELS))
def test_the_same_answer_with_any_layer_changed(make: Callable[[], nn.Module]) -> None:
    model = randomise(make())
    images = torch.randn(2, 3, 5, 5)
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    with evaluating(model):
        run = TracedModel(model)
        run.begin(images.clone())
        for number, name in sorted((run.calls(name)[0], name) for name in layers):
            run.advance(number)
            changed = copy.deepcopy(model)
            changed.get_submodule(name).weight.mul_(-0.5)
            model.get_submodule(name).weight.mul_(-0.5)
            answer = run.finish()
            model.get_submodule(name).weight.mul_(-2)
            expected = changed(images.clone())
            torch.testing.assert_close(answer, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", MODELS.values(), ids=list(MODELS))
def test_the_changed_layer_has_exactly_the_plain_models_input(
    make: Callable[[], nn.Module],
) -> None:
    model, inputs = randomise(make()), {}
    images = torch.randn(2, 3, 5, 5)
    layers = {name: x for name, x in model.named_modules() if isinstance(x, nn.Conv2d)}

    def see(layer: nn.Module, args: tuple[Tensor]) -> None:
        inputs.setdefault(layer, args[0].clone())

    for layer in layers.values():
        layer.register_forward_pre_hook(see)
    with evaluating(model):
        model(images.clone())
        plain = dict(inputs)
        run = TracedModel(model)
        run.begin(images.clone())
        for number, name in sorted((run.calls(name)[0], name) for name in layers):
            run.advance(number)
            inputs.clear()
            run.finish()
            assert torch.equal(inputs[layers[name]], plain[layers[name]])


def test_which_norms_are_folded() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(7))
            self.bn = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(7))
            self.bn[1] = nn.BatchNorm2d(3, track_running_stats=False)
            self.conv[5].register_forward_hook(lambda module, inputs, output: 2 * output)

        def forward(self, x: Tensor) -> Tensor:
            x = self.bn[0](self.conv[0](x))  # folded
            x = self.bn[1](self.conv[1](x))  # has no statistics
            y = self.conv[2](x)
            x = self.bn[2](y) + y  # not alone
            x = self.bn[3](self.conv[3](self.conv[3](x)))  # a convolution called twice
            x = self.bn[4](x + F.conv2d(x, self.conv[4].weight))  # after a sum
            x = self.bn[5](self.conv[5](x))  # a hook sees the output
            return self.bn[6](x) + F.relu(self.bn[6](self.conv[6](x)))  # folded, in one place

    model = randomise(Net())
    run = TracedModel(model)
    assert [node.target for node in run.folded] == ["conv.0", "conv.6"]
    x = torch.randn(2, 3, 4, 4)
    with evaluating(model):
        run.begin(x)
        torch.testing.assert_close(run.finish(), model(x), rtol=1e-5, atol=1e-5)
