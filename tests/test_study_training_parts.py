"""The parts of fine-tuning, each against an oracle of its own."""

from __future__ import annotations

import argparse
import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import quant
from modelutils import evaluating, find_layers, first_and_last, get_model
from obc.inputs import files
from obc.inputs.vision import torchvision
from obc.solver import errors
from obc.toolkit.resume import open_state
from obc.toolkit.training import TrainingTask, load_training, save_training
from pruning_vs_quantization import compressed_model as compressed
from pruning_vs_quantization import oscillations
from pruning_vs_quantization.compressed_model import fold, folded, layers_before_norms
from pruning_vs_quantization.learned_steps import (
    SMALLEST_STEP,
    LearnedStep,
    input_grids,
    starting_grid,
    weight_grid,
)
from pruning_vs_quantization.magnitude_pruning import (
    MASK,
    CubicSchedule,
    GradualPruning,
    magnitude_mask,
    masked_layers,
    tile_mask,
)
from pruning_vs_quantization.main import dense_network
from pruning_vs_quantization.oscillations import annealed
from pruning_vs_quantization.training_images import TrainingData, shift_and_flip, training_images
from pruning_vs_quantization.training_options import TrainingOptions, learning_rate_schedule


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def learned(step: Tensor, bits: int, zero: int | None = None) -> LearnedStep:
    """A quantiser with given steps; symmetric unless there is a zero point."""
    zero = 2 ** (bits - 1) if zero is None else zero
    return LearnedStep(quant.Grid(step, torch.full_like(step, zero), 2**bits - 1))


# -- learned steps ---------------------------------------------------------------------------------


def surrogate(x: np.ndarray, step: np.ndarray, low: int, high: int, error: np.ndarray):
    """Δ · (clamp(x/Δ) + r) with a given rounding error r."""
    return step * (np.clip(x / step, low, high) + error)


@pytest.mark.parametrize(
    ("rows", "bits", "zero"), [(5, 3, None), (1, 2, None), (1, 4, 0), (1, 3, 2), (5, 8, None)]
)
def test_gradients_are_those_of_the_surrogate(rows, bits, zero):
    """Central differences in float64, with the rounding errors of the point held fixed."""
    x = draw(5, 7, dtype=torch.float64).requires_grad_()
    steps = (0.2 + 0.1 * draw(rows, 1, seed=1, dtype=torch.float64).abs()).requires_grad_()
    quantiser = learned(steps, bits, zero)
    direction = draw(5, 7, seed=2, dtype=torch.float64)
    count = 13.0
    (quantiser(x, count) * direction).sum().backward()

    low, high = int(quantiser.low), int(quantiser.high)
    point, at = x.detach().numpy(), steps.detach().numpy()
    inside = np.clip(point / at, low, high)
    error = np.round(inside) - inside
    h = 1e-6

    def value(x: np.ndarray, step: np.ndarray) -> np.ndarray:
        return surrogate(x, step, low, high, error) * direction.numpy()

    by_step = (value(point, at + h) - value(point, at - h)) / (2 * h)
    by_step = by_step.sum(1, keepdims=True) if rows > 1 else by_step.sum().reshape(1, 1)
    by_x = (value(point + h, at) - value(point - h, at)) / (2 * h)
    assert (inside != point / at).any() == (bits < 8)  # both kinds are there
    np.testing.assert_allclose(x.grad.numpy(), by_x, atol=1e-7)
    np.testing.assert_allclose(
        quantiser.step.grad.numpy(), by_step / np.sqrt(count * high), atol=1e-7
    )


def test_values_are_the_toolkits_grid():
    weight = draw(6, 4, 3, 3)
    for rows in (1, 6):
        quantiser = learned(0.1 + 0.3 * draw(rows, 1, seed=1).abs(), 3)
        rounded = quantiser.quantise_weight(weight).detach()
        grid = quantiser.grid(len(weight))
        assert torch.equal(rounded.flatten(1), grid(weight.flatten(1)))
        assert torch.equal(grid(rounded.flatten(1)), rounded.flatten(1))
        quant.check_grid("weight_quant", len(weight), grid.scale, grid.zero, grid.maxq)
        codes = quantiser.codes(weight)
        assert codes.min() >= -4 and codes.max() <= 3 and torch.equal(codes, codes.round())
    images = draw(2, 3, 5, 5)
    quantiser = learned(torch.tensor(0.2), 4, zero=5)
    assert torch.equal(quantiser.quantise_input(images).detach(), quantiser.grid()(images))


def test_a_share_of_the_gradient_by_size():
    """1/√(N u): N weights share a step; of inputs, N values of an image."""
    weight = draw(6, 4, 3, 3)
    for rows, count in ((1, 216), (6, 36)):
        quantiser = learned(torch.full((rows, 1), 1e-6), 3)  # all beyond the range
        quantiser.quantise_weight(weight).sum().backward()
        limits = torch.where(weight > 0, 3.0, -4.0)
        wanted = limits.sum().view(1, 1) if rows == 1 else limits.flatten(1).sum(1, keepdim=True)
        torch.testing.assert_close(quantiser.step.grad, wanted / (count * 3) ** 0.5)
    quantiser = learned(torch.tensor(1e-3), 4, zero=0)
    quantiser.quantise_input(draw(8, 3, 2, 2).abs() + 1).sum().backward()
    torch.testing.assert_close(quantiser.step.grad, torch.tensor(96 * 15 / (12 * 15) ** 0.5))


def test_steps_stay_positive():
    quantiser = learned(torch.tensor([[0.1], [0.2]]), 4)
    with torch.no_grad():
        quantiser.step.sub_(0.15)
    quantiser.keep_positive()
    assert quantiser.step.flatten().tolist() == pytest.approx([SMALLEST_STEP, 0.05])


# -- starting ranges -------------------------------------------------------------------------------


def least_error(x: np.ndarray, low: int, high: int) -> float:
    """The least squared error of all steps: on each piece between two borders, a parabola."""
    borders = [np.abs(x[x != 0]) / (code + 0.5) for code in range(max(high, -low))]
    borders = np.unique(np.concatenate(borders))
    ends = np.concatenate([[0.0], borders, [4 * borders[-1]]])
    best = np.inf
    for start in range(0, len(ends) - 1, 4096):
        left, right = ends[start : start + 4097][:-1], ends[start : start + 4097][1:]
        codes = np.clip(np.round(x / ((left + right) / 2)[:, None]), low, high)
        square, product = (codes * codes).sum(1), (codes * x).sum(1)
        step = np.clip(product / np.maximum(square, 1), left, right)
        best = min(best, (x @ x - 2 * step * product + step**2 * square).min())
    return best


def error_of(grid: quant.Grid, x: Tensor) -> np.ndarray:
    scale, zero = grid.scale.double().numpy(), grid.zero.double().numpy()
    x = x.double().numpy()
    codes = np.clip(np.round(x / scale), -zero, int(grid.maxq) - zero)
    return ((x - scale * codes) ** 2).sum(1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mse_range_against_all_pieces(bits):
    length = 300 if bits < 8 else 60
    normal = draw(8, length)
    rows = torch.cat(
        [
            normal[:3],
            normal[3:5] ** 3,
            normal[5:6].abs(),
            normal[6:7].sign() * 0.3,
            torch.rand(1, length, generator=torch.Generator().manual_seed(1)) - 0.5,
        ]
    )
    rows[1, 5] = 40.0  # far out
    for symmetric in (True, False):
        grid = starting_grid(rows, bits, symmetric, "MSE")
        errors = error_of(grid, rows)
        for row, zero, error in zip(
            rows.double().numpy(), grid.zero.flatten(), errors, strict=True
        ):
            low, high = -int(zero), int(grid.maxq) - int(zero)
            least = least_error(row, low, high)
            assert least - 1e-9 <= error + 1e-9 <= least * (1.1 if bits == 8 else 1.001) + 1e-6
        others = error_of(quant.fit_grid(rows, bits, symmetric), rows)
        assert (errors <= others * (1.1 if bits == 8 else 1.0001)).all()


def test_minmax_range_and_a_layer_of_zeros():
    weight = draw(4, 3, 3, 3)
    weight[2] = 0
    for method in ("MSE", "minmax"):
        grid = weight_grid(weight, 4, True, method)
        assert grid.scale[2] == 1 and (grid.scale > 0).all() and torch.isfinite(grid.scale).all()
    widest = weight.flatten(1).abs().amax(1, keepdim=True)
    torch.testing.assert_close(grid.scale[[0, 1, 3]], 2 * widest[[0, 1, 3]] / 15)
    one = weight_grid(weight, 4, False, "minmax")
    torch.testing.assert_close(one.scale, 2 * weight.abs().max().view(1, 1) / 15)


@pytest.mark.parametrize("method", ["MSE", "minmax"])
def test_ranges_of_inputs_are_those_of_all_batches(method):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    unused = nn.Conv2d(1, 1, 1)
    batches = [(draw(2, 3, 4, 4, seed=seed), torch.zeros(2)) for seed in (1, 2)]
    layers = {"0": model[0], "2": model[2], "unused": unused}
    grids = input_grids(
        model, layers, dict.fromkeys(layers, 4), method, batches, torch.device("cpu")
    )
    assert grids.keys() == {"0", "2"} and grids["2"].zero == 0
    images = torch.cat([images for images, _ in batches])
    if method == "minmax":
        span = images.max() - images.min()
        torch.testing.assert_close(grids["0"].scale, span / 15)
    else:
        values = images.flatten().double().numpy()
        zero = int(grids["0"].zero)
        error = ((images - grids["0"](images)) ** 2).sum().item()
        assert error <= least_error(values, -zero, 15 - zero) * 1.01


# -- learning rates --------------------------------------------------------------------------------


def cosine_to(floor: float):
    return lambda t: floor + (1 - floor) * (1 + math.cos(math.pi * t / 8)) / 2


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("cosine:1e-3", cosine_to(2e-3)),
        ("cosine", cosine_to(1e-2)),
        ("multistep:2,5", lambda t: 0.1 ** ((t >= 2) + (t >= 5))),
        ("multistep:3:0.5", lambda t: 0.5 ** (t >= 3)),
        ("exponential:0.8", lambda t: 0.8 ** math.floor(t)),
        ("constant", lambda t: 1.0),
    ],
)
@pytest.mark.parametrize("rate", [0.5, 1e-5])
def test_learning_rates_against_closed_formulas(text, share, rate):
    """8 epochs of 30 steps; of the optimiser that the schedule is for, and of the steps' own."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=rate)
    scheduler = learning_rate_schedule(text).scheduler(optimizer, 0.5, 30, 8)
    for step in range(8 * 30):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate * share(step / 30), rel=1e-9)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "linear",
        "cosine:",
        "cosine:0",
        "cosine:-1",
        "cosine:nan",
        "cosine:1:2",
        "multistep",
        "multistep:",
        "multistep:5,2",
        "multistep:2,2",
        "multistep:0,2",
        "multistep:2:0.1:3",
        "exponential",
        "exponential:x",
        "constant:1",
    ],
)
def test_what_is_no_schedule(text):
    with pytest.raises(argparse.ArgumentTypeError, match="must be cosine, "):
        learning_rate_schedule(text)


# -- pruning ---------------------------------------------------------------------------------------


def test_cubic_schedule():
    """Zhu and Gupta, equation 1, in exact fractions."""
    schedule = CubicSchedule(0.25, 0.875, 100, 500)
    for step in range(0, 700, 20):
        wanted = Fraction(0)
        if step >= 100:
            left = 1 - min(Fraction(1), Fraction(step - 100, 400))
            wanted = Fraction(7, 8) + (Fraction(1, 4) - Fraction(7, 8)) * left**3
        assert schedule.sparsity(step) == pytest.approx(float(wanted), abs=1e-12)
    assert schedule.sparsity(500) == 0.875  # to the last bit: counts are rounded from it


def test_masks_have_exact_counts():
    weight = draw(6, 8, 3, 3)
    for sparsity in (0.0, 0.1, 0.5, 0.8125, 0.99):
        mask = magnitude_mask(weight, sparsity)
        assert int((~mask).sum()) == round(sparsity * 432)
        if 0 < sparsity:
            assert weight[~mask].abs().max() <= weight[mask].abs().min()
    assert magnitude_mask(torch.ones(4, 5), 0.5).flatten().tolist() == [False] * 10 + [True] * 10


def test_tiles_run_along_input_channels():
    weight = draw(5, 8, 3, 2)
    mask = tile_mask(weight, 4, 3)
    for row in range(5):
        for kernel_row in range(3):
            for column in range(2):
                for start in (0, 4):
                    place = (row, slice(start, start + 4), kernel_row, column)
                    (kept,) = mask[place].nonzero(as_tuple=True)
                    assert kept.tolist() == [int(weight[place].abs().argmax())]
    linear = tile_mask(draw(3, 6), 2, 1)
    assert (linear.view(3, 3, 2).sum(2) == 1).all()


@pytest.mark.parametrize(("tile", "final"), [(None, 0.75), (4, 0.5)])
def test_masks_stay_through_the_optimiser(tile, final, caplog):
    """Momentum and weight decay cannot bring a weight back; counts are exact at the end."""
    caplog.set_level("INFO", logger="trueobs")
    model = get_model("rn8", "digits")
    ends = first_and_last(model, draw(2, 3, 16, 16))
    plan = GradualPruning(CubicSchedule(0.25, final, 2, 9), 3, 0.5, ends, tile)
    plan.start(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1.0)
    images, gone = draw(4, 3, 16, 16), {}
    assert (next(iter(masked_layers(model).values())).weight != 0).all()
    for step in range(12):
        optimiser.zero_grad()
        torch.func.functional_call(
            model, compressed.effective_weights(model), (images,)
        ).square().mean().backward()
        optimiser.step()
        plan.update(model, step + 1)
        for name, layer in masked_layers(model).items():
            zeros = ~getattr(layer, MASK)
            assert (layer.weight[zeros] == 0).all()
            assert zeros[gone.get(name, torch.zeros_like(zeros))].all()  # none came back
            gone[name] = zeros.clone()
    dense = {name for name in find_layers(model) if name not in gone}
    assert dense == ({"conv1"} if tile else set())
    assert ("conv1 left dense: 3 input channels" in caplog.text) == (tile is not None)
    for name, zeros in gone.items():
        share = min(final, 0.5) if name in ends else final
        assert int(zeros.sum()) == round(share * zeros.numel())
    assert [step for step in range(13) if plan.is_due(step)] == [2, 5, 8, 9]


# -- oscillations ----------------------------------------------------------------------------------


def test_frequencies_and_freezing_against_a_loop():
    """One weight after the other, in plain Python."""
    generator = torch.Generator().manual_seed(0)
    history = torch.randint(-2, 3, (60, 12), generator=generator)
    history[:, 0] = torch.arange(60) % 2  # to and fro
    history[:, 1] = torch.arange(60) // 2  # on and on
    history[:, 2] = 1
    momentum, threshold = 0.1, 0.45
    tracker = oscillations.OscillationTracker(history[0].float())
    for codes in history[1:]:
        tracker.update(codes.float(), momentum, threshold)
    for weight, codes in enumerate(history.T.tolist()):
        frequency, mean, last, frozen = 0.0, float(codes[0]), 0, None
        for before, now in zip(codes, codes[1:], strict=False):
            change = (now > before) - (now < before)
            frequency += momentum * ((change * last == -1) - frequency)
            mean += momentum * (now - mean)
            last = change or last
            if frozen is None and frequency > threshold:
                frozen = round(mean)
        assert tracker.frequency[weight].item() == pytest.approx(frequency, abs=1e-5)
        assert tracker.frozen[weight].item() == (frozen is not None)
        assert frozen is None or tracker.frozen_codes[weight].item() == frozen
    assert tracker.frozen[0] and not tracker.frozen[1] and not tracker.frozen[2]


def test_frozen_weights_follow_their_step():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    compressed.quantise_weights(model, {"0": 3}, False, "MSE")
    oscillations.start_tracking(model)
    model[0].oscillation.frozen[0], model[0].oscillation.frozen_codes[0] = True, 2
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight_step.step.mul_(1.5)
        model[0].weight.add_(10)
    oscillations.freeze(model, 0.1, 0.9)
    step = model[0].weight_step.step
    torch.testing.assert_close(model[0].weight[0], (2 * step).expand(3, 9).view(3, 3, 3))
    torch.testing.assert_close(model[0].weight[1:], before[1:] + 10)
    assert oscillations.frozen_share(model) == pytest.approx(0.25)


def test_dampening_pulls_latent_weights_alone_to_the_grid():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    compressed.quantise_weights(model, {"0": 2}, True, "MSE")
    weight, quantiser = model[0].weight, model[0].weight_step
    loss = oscillations.dampening(model)
    loss.backward()
    step = quantiser.step.detach().view(4, 1, 1, 1)
    inside = (weight >= -2 * step) & (weight <= step)
    distance = torch.where(inside, weight - quantiser.quantise_weight(weight), 0).detach()
    torch.testing.assert_close(loss.detach(), distance.square().sum())
    torch.testing.assert_close(weight.grad, 2 * distance)
    assert quantiser.step.grad is None and not inside.all()
    assert annealed(3.0, 1.0, 0.25) == pytest.approx(1 + 2 * (2 + 2**0.5) / 4)


# -- what was learned as a plain network -----------------------------------------------------------


def awkward_norms(model: nn.Module) -> None:
    """Statistics and factors of every size and sign; one factor is 0."""
    for index, norm in enumerate(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        with torch.no_grad():
            norm.running_mean.copy_(draw(norm.num_features, seed=index))
            norm.running_var.copy_(draw(norm.num_features, seed=index + 50).square() + 0.1)
            norm.weight.copy_(draw(norm.num_features, seed=index + 100))
            norm.bias.copy_(draw(norm.num_features, seed=index + 150))
            norm.weight[1] = 0


@pytest.mark.parametrize("per_channel", [False, True])
def test_folded_network_is_the_trained_one(per_channel):
    model = get_model("rn8", "digits")
    awkward_norms(model)
    dense, images = model, draw(8, 3, 16, 16)
    trained = get_model("rn8", "digits")
    awkward_norms(trained)
    ends = "conv1", "linear"
    bits = compressed.layer_bits(trained, 3, ends)
    compressed.quantise_weights(trained, bits, per_channel, "MSE")
    GradualPruning(CubicSchedule(0.5, 0.5, 0, 1), 1, 0.5, ends).start(trained)
    grids = input_grids(
        dense,
        find_layers(dense),
        dict.fromkeys(bits, 6),
        "MSE",
        [(images, None)],
        torch.device("cpu"),
    )
    compressed.quantise_inputs(trained, grids)
    plain = compressed.deployed(trained, dense)
    with evaluating(trained), evaluating(plain):
        torch.testing.assert_close(plain(images), compressed.run_compressed(trained, images))
    plain = compressed.deployed(trained, dense)
    for layer in find_layers(plain).values():  # rounding to another code would hide all else
        del layer._modules[quant.ACTIVATION_GRID]
    without = folded(plain)
    with evaluating(plain), evaluating(without):
        wanted = plain(images)
        assert (without(images) - wanted).abs().max() < 1e-4 * wanted.abs().max()
    for name, layer in find_layers(without).items():
        assert layer.weight_quant.bits == bits[name] == (8 if name in ("conv1", "linear") else 3)
        codes = layer.weight.flatten(1) / layer.weight_quant.scale + layer.weight_quant.zero
        assert (codes - codes.round()).abs().max() < 1e-4
        assert codes.round().min() >= 0 and codes.round().max() <= layer.weight_quant.maxq
    for norm in (module for module in without.modules() if isinstance(module, nn.BatchNorm2d)):
        factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        assert torch.allclose(factor, torch.ones(())) and not norm.running_mean.any()


def test_folding_into_linear_layers_and_biases():
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).eval()
    with torch.no_grad():
        model[1].running_var.copy_(torch.tensor([0.5, 2.0, 1.0, 3.0]))
        model[1].weight.copy_(torch.tensor([1.0, -2.0, 0.0, 0.3]))
        model[1].running_mean.copy_(draw(4))
    x = draw(6, 5, seed=3)
    wanted = model(x)
    fold(model[0], model[1])
    torch.testing.assert_close(model(x), wanted)
    assert not model[0].bias.any()


class Shared(nn.Module):
    """A convolution that is called twice, one that two read, and a norm without factors."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.read_twice, self.plain = (nn.Conv2d(2, 2, 1) for _ in range(3))
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(2, affine=n < 2) for n in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.twice(self.twice(x)))
        y = self.read_twice(x)
        return self.bn3(self.plain(self.bn2(y) + y))


def test_norms_that_cannot_be_folded_stay(caplog):
    caplog.set_level("INFO", logger="trueobs")
    model = Shared().eval()
    assert layers_before_norms(model) == {}
    x = draw(1, 2, 3, 3)
    torch.testing.assert_close(folded(model)(x), model(x))
    assert [line.split()[0] for line in caplog.messages] == ["bn1", "bn2", "bn3"]


def test_what_is_read_again_is_not_folded():
    """A weight that is used by itself, and an output that is overwritten and read."""

    class Aliases(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
            self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(3))

        def forward(self, x):
            x = self.norms[0](self.convs[0](x))
            x = torch.conv2d(x, self.convs[0].weight)
            y = same = self.convs[1](x)
            y[:, 0] = 0.5
            same += 1
            x = self.norms[1](y)
            return self.norms[2](self.convs[2](x)).mean((2, 3))

    model, images = Aliases().eval(), draw(4, 3, 9, 9)
    awkward_norms(model)
    assert layers_before_norms(model) == {"convs.2": "norms.2"}
    with evaluating(model):
        torch.testing.assert_close(folded(model)(images), model(images), rtol=1e-4, atol=1e-4)


def test_a_network_that_cannot_be_traced(caplog):
    class Data(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    assert folded(nn.Sequential(Data(), nn.Conv2d(3, 3, 1))) is None
    assert "cannot be traced" in caplog.text


def test_efficientnet_of_timm(tmp_path):
    torchvision.ops  # noqa: B018  before timm, which imports it
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("efficientnet_lite0", num_classes=4).eval()
    files.save_checkpoint(model.state_dict(), tmp_path / "lite.pth")
    same = dense_network("efficientnet_lite_quantized", "folder", str(tmp_path / "lite.pth"), 4)
    images = draw(2, 3, 64, 64)
    assert torch.equal(same(images), model(images))
    assert len(layers_before_norms(same)) == 49
    awkward_norms(same)
    with evaluating(same):
        wanted, found = same(images), folded(same)(images)
    assert (found - wanted).abs().max() < 1e-3 * wanted.abs().max()
    with pytest.raises(errors.UserError, match="4 classes, but folder has 7"):
        dense_network("efficientnet_lite_quantized", "folder", str(tmp_path / "lite.pth"), 7)


def test_bits_per_weight():
    model = get_model("rn8", "digits")
    total = sum(layer.weight.numel() for layer in find_layers(model).values())
    names = first_and_last(model, draw(2, 3, 16, 16))
    ends = sum(find_layers(model)[name].weight.numel() for name in names)
    assert compressed.bits_per_weight(model) == 16
    compressed.quantise_weights(model, compressed.layer_bits(model, 3, names), False, "minmax")
    assert compressed.bits_per_weight(model) == pytest.approx(3 + 5 * ends / total)
    pruned = get_model("rn8", "digits")
    GradualPruning(CubicSchedule(0.75, 0.75, 0, 1), 1, 0.5, names).start(pruned)
    assert compressed.bits_per_weight(pruned) == pytest.approx(4 + 4 * ends / total, rel=1e-4)
    assert compressed.network_sparsity(pruned) == pytest.approx(
        0.75 - 0.25 * ends / total, rel=1e-4
    )


# -- images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("flips", [True, False])
def test_shift_and_flip_one_image_at_a_time(flips):
    """Every result is some shift of its image into black, mirrored or not; all of them occur."""
    numbers = np.random.default_rng(0)
    images = numbers.integers(1, 256, (400, 8, 8, 3), dtype=np.uint8)
    results = shift_and_flip(images, flips, torch.Generator().manual_seed(0))
    seen = set()
    for image, result in zip(images, results, strict=True):
        padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
        crops = {
            (dy, dx, mirror): padded[dy : dy + 8, dx : dx + 8][:, :: -1 if mirror else 1]
            for dy in range(3)
            for dx in range(3)
            for mirror in (False, True)
        }
        seen.add(next(key for key, crop in crops.items() if np.array_equal(crop, result)))
    assert seen == {key for key in crops if flips or not key[2]}


def digits(seed: int = 0, augment: bool = True) -> TrainingData:
    options = {"dataset": "digits", "train_samples": 100, "batch_size": 32, "augment": augment}
    schedule = learning_rate_schedule("cosine")
    options = TrainingOptions("rn8_quantized", learning_rate_schedule=schedule, **options)
    return TrainingData.decode(options, seed, training_images(options, seed))


def test_epochs_depend_on_the_seed_and_their_number():
    def batches(images: TrainingData, number: int) -> Tensor:
        return torch.cat([batch for batch, _ in images.epoch(number)])

    images = digits()
    assert len(images) == 3 and len(batches(images, 0)) == 96
    assert torch.equal(batches(images, 1), batches(digits(), 1))
    assert not torch.equal(batches(images, 0), batches(images, 1))
    assert not torch.equal(batches(images, 0), batches(digits(seed=1), 0))
    plain = torch.cat([batch for batch, _ in images.plain(10)])
    assert len(plain) == 100 and len(torch.cat([x for x, _ in images.plain(2)])) == 64
    known = {image.numpy().tobytes() for image in plain}
    shown = [image.numpy().tobytes() for image in batches(digits(augment=False), 0)]
    assert set(shown) <= known and len(set(shown)) > 90  # each once, some digits are alike


def test_large_sets_are_streamed_alike(monkeypatch):
    """Without decoding ahead, the same images and labels in the same order."""
    ahead = digits(augment=False)
    monkeypatch.setattr("pruning_vs_quantization.training_images.IN_MEMORY", 0)
    streamed = digits(augment=False)
    assert streamed.train is None and ahead.train is not None
    for left, right in (
        (ahead.epoch(3), streamed.epoch(3)),
        (ahead.plain(2), streamed.plain(2)),
        (ahead.test_batches(), streamed.test_batches()),
    ):
        for (images, labels), (others, other_labels) in zip(left, right, strict=True):
            assert torch.equal(images, others) and torch.equal(labels, other_labels)


# -- the state of training -------------------------------------------------------------------------


def test_an_epoch_that_was_saved_comes_back(tmp_path):
    """Weights, optimiser, figures, and what random generators draw next."""

    def parts(lr: float):
        model = nn.Linear(2, 2)
        optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        return model.state_dict(), optimizer

    before = random.getstate()
    try:
        with open_state(tmp_path / "state", {"n_bits": "4"}) as state:
            task = TrainingTask("training", [], torch.device("cpu"), 4, "--lr", state)
            tensors, optimizer = parts(1e-3)
            history = [{"epoch": 1, "top1": 9.0}]
            save_training(task, tensors, [optimizer], history)
            drawn = torch.rand(3), random.random()
            others, other = parts(1e-2)
            assert load_training(task, others, [other]) == history
            assert torch.equal(torch.rand(3), drawn[0]) and random.random() == drawn[1]
    finally:
        random.setstate(before)
    assert all(torch.equal(others[key], tensors[key]) for key in tensors)
    groups = [x.state_dict()["param_groups"][0] for x in (optimizer, other)]
    assert groups[0] | {"betas": [0.9, 0.999]} == groups[1] | {"betas": [0.9, 0.999]}
    states = [x.state_dict()["state"] for x in (optimizer, other)]
    for index, entries in states[0].items():
        assert all(torch.equal(entries[key], states[1][index][key]) for key in entries)
