"""tracing.py: a traced model gives the model's own answers, from wherever it is resumed."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelutils import evaluating, placed
from obc.inputs import tracing
from obc.inputs.tracing import TracedModel, UntracedModel, equal_but_for_rounding, resumable


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


# -- the comparison with the plain model -----------------------------------------------------------


class Small(nn.Module):
    """A convolution and a norm, and an operation of a test's choice between them and the end."""

    def __init__(self, between: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.between(self, self.bn(self.conv(x))).mean((2, 3)))


def hooked() -> nn.Module:
    model = Small(lambda net, x: x)
    model.register_forward_hook(lambda model, args, output: output.flip(1))
    return model


UNFAITHFUL = {  # what a trace does not see, and what the log says
    "a hook of the model": (hooked, "gives other outputs"),
    "noise": (lambda: Small(lambda net, x: x + torch.randn(4, 1, 1)), "gives other outputs"),
    "a way that a default decides": (lambda: WithMask(), "the traced model fails"),
    "data decide": (lambda: Small(lambda net, x: x if x.sum() > 0 else -x), "cannot be traced"),
}


class WithMask(Small):
    def __init__(self) -> None:
        super().__init__(lambda net, x: x)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x * mask if mask is not None else x)


@pytest.mark.parametrize("case", UNFAITHFUL)
def test_what_a_trace_does_not_see_runs_as_a_whole_and_is_logged_once(
    case: str, caplog: pytest.LogCaptureFixture
) -> None:
    tracing.logged.clear()
    make, line = UNFAITHFUL[case]
    model, images = randomise(make()), torch.randn(20, 3, 6, 6)
    with evaluating(model):
        for _ in range(3):
            run = resumable(model, images)
            assert isinstance(run, UntracedModel)
            run.begin(images)
            torch.manual_seed(5)
            answer = run.finish()
            torch.manual_seed(5)
            assert torch.equal(answer, model(images))
    assert len(caplog.records) == 1 and line in caplog.text and "runs as a whole" in caplog.text


def test_faithful_traces_are_kept_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    for make in MODELS.values():
        model = randomise(make())
        with evaluating(model):
            assert isinstance(resumable(model, torch.randn(20, 3, 5, 5)), TracedModel)
    assert not caplog.records


@pytest.mark.parametrize("images", [1, 16, 40])
def test_rounding_is_measured_by_the_spread_of_the_outputs(images: int) -> None:
    plain = 100 + torch.randn(images, 10)
    assert equal_but_for_rounding(plain * (1 + 1e-7), plain)
    assert equal_but_for_rounding(plain + 1e-4, plain)
    other = plain.clone()
    other[-1, 3] += 0.01  # of 100, but the spread is 1
    assert not equal_but_for_rounding(other, plain)
    assert not equal_but_for_rounding(plain[:, :9], plain)
    assert not equal_but_for_rounding({"logits": plain}, plain)
    broken = plain.clone()
    broken[0, 0] = torch.nan
    assert equal_but_for_rounding(broken, broken.clone())
    assert not equal_but_for_rounding(broken, plain) and not equal_but_for_rounding(plain, broken)


def test_tracing_leaves_nothing_in_the_model() -> None:
    def remember(net: nn.Module, x: Tensor) -> Tensor:
        net.calls += 1  # a buffer
        net.features = x
        net.history.append(x)
        return x

    model = Small(remember).eval()
    model.history = []
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    run = TracedModel(model)
    assert not hasattr(model, "features") and not model.history and model.calls == 0
    assert model.state_dict().keys() == before.keys()
    images = torch.randn(2, 3, 6, 6)
    with evaluating(model):
        run.begin(images)
        torch.testing.assert_close(run.finish(), model(images))


def test_images_stay_as_they_were() -> None:
    model = randomise(Overwriting())
    images = torch.randn(2, 3, 5, 5)
    before = images.clone()
    with evaluating(model):
        run = resumable(model, images)
        run.begin(images)
        run.finish()
        run.advance(len(run.nodes) - 1)
        model(placed(images, torch.device("cpu")))
    assert torch.equal(images, before)


def test_a_tensor_that_two_modules_share_is_used_where_either_is_called() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Bilinear(1, 4, 4)
            self.c = nn.Linear(4, 4)
            self.c.bias = self.b.bias

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(self.b(x[:, :1].contiguous(), x)))

    run = TracedModel(Tied().eval())
    operations = [node.target for node in run.nodes]
    assert run.calls("c") == [operations.index("b"), operations.index("c")]
    assert run.calls("a") == [operations.index("a")]


def test_nothing_is_folded_between_two_calls_of_the_changed_layer() -> None:
    """The second call has exactly the plain model's input, too."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared, self.conv = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(self.bn(self.conv(self.shared(x))))

    model, inputs = randomise(Twice()), []
    images = torch.randn(2, 3, 5, 5)
    model.shared.register_forward_pre_hook(lambda layer, args: inputs.append(args[0].clone()))
    with evaluating(model):
        model(images)
        run = TracedModel(model)
        assert run.folded
        run.begin(images)
        calls = run.calls("shared")
        run.advance(calls[0], calls[-1])
        run.finish()
    assert len(inputs) == 4
    assert torch.equal(inputs[0], inputs[2]) and torch.equal(inputs[1], inputs[3])
