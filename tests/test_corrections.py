"""corrections.py and training.py against plain procedures; what corrections must preserve."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datautils import calibration_batches, load_data
from modelutils import CifarResNet, find_layers, get_model
from obc.inputs.vision import torchvision
from obc.solver.errors import UserError
from obc.toolkit.corrections import batchnorm_tune, norm_moments, placed, statistics_correction
from obc.toolkit.evaluation import CLASSIFICATION
from obc.toolkit.training import TrainingTask, finetune, global_adaprune, train_vectors
from quant import fit_activation_grid, fit_weight_grid, set_activation_grid, set_weight_grid

CPU = torch.device("cpu")
LayerNorm2d = torchvision.models.convnext.LayerNorm2d


@pytest.fixture(scope="module")
def batches() -> list[tuple[Tensor, Tensor]]:
    data = load_data("digits", nsamples=96)
    return list(calibration_batches(data, batchsize=32))


@pytest.fixture(scope="module")
def images(batches) -> Tensor:
    return torch.cat([images for images, _ in batches])


@pytest.fixture
def dense() -> nn.Module:
    return get_model("rn8", "digits")


def crushed(dense: nn.Module, images: Tensor) -> nn.Module:
    """2:4 and then 4w4a by magnitude and rounding: compressed without care, corrected with much."""
    model = copy.deepcopy(dense)
    inputs: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, n=name: inputs.update({n: args[0]}))
        for name, layer in find_layers(model).items()
    ]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    for name, layer in list(find_layers(model).items())[1:]:
        W = layer.weight.detach().reshape(-1, 4).clone()
        W.scatter_(1, W.abs().argsort(1)[:, :2], 0)
        W = W.view(len(layer.weight), -1)
        grid = fit_weight_grid(W, 4)
        layer.weight.data = grid(W).view_as(layer.weight)
        set_weight_grid(layer, grid)
        set_activation_grid(layer, fit_activation_grid(inputs[name], 4))
    return model


@pytest.fixture(scope="module")
def crushed_once(images) -> nn.Module:
    return crushed(get_model("rn8", "digits"), images)


@pytest.fixture
def compressed(crushed_once) -> nn.Module:
    return copy.deepcopy(crushed_once)


def outputs(model: nn.Module, names: list[str], images: Tensor) -> dict[str, Tensor]:
    """Outputs of some modules on their first call, in one forward pass."""
    found: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, y, n=name: found.setdefault(n, y.clone()) is None or None
        )
        for name in names
    ]
    with torch.no_grad():
        model(placed(images, CPU))
    for handle in handles:
        handle.remove()
    return found


def names_of(model: nn.Module, kind: type | tuple[type, ...]) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kind)]


# -------------------------------------------------------------------------- batch-norm tuning


def test_batch_norm_tuning_is_an_exponential_average(compressed, batches):
    nbatches, plain = 7, copy.deepcopy(compressed)
    batchnorm_tune(compressed, batches, CPU, nbatches)
    norms = names_of(plain, nn.BatchNorm2d)
    expected = {n: (0.0, 0.0) for n in norms}
    inputs: dict[str, Tensor] = {}
    for name in norms:
        norm = plain.get_submodule(name)
        norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
        norm.register_forward_pre_hook(lambda _, args, n=name: inputs.update({n: args[0]}))
    for index in range(nbatches):  # without running statistics a batch norm uses the batch's own
        with torch.no_grad():
            plain(placed(batches[index % len(batches)][0], CPU))
        for name in norms:
            x = inputs[name].transpose(0, 1).flatten(1).double()
            mean, var = expected[name]
            expected[name] = (0.9 * mean + 0.1 * x.mean(1), 0.9 * var + 0.1 * x.var(1))
    for name, sums in expected.items():
        mean, var = (x / (1 - 0.9**nbatches) for x in sums)  # the start taken out
        norm = compressed.get_submodule(name)
        assert torch.allclose(norm.running_mean.double(), mean, rtol=1e-4, atol=1e-5)
        assert torch.allclose(norm.running_var.double(), var, rtol=1e-4, atol=1e-5)


class Noisy(nn.Module):
    """A batch norm of odd momentum after dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm2d(3, momentum=0.7)
        self.fixed = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fixed(self.norm(self.drop(x))).mean((2, 3))


def test_batch_norm_tuning_restores_modes_and_momentum_and_leaves_dropout_off(batches):
    model = Noisy().eval()
    model.drop.train()
    batchnorm_tune(model, batches[:1], CPU, 50)
    assert model.norm.momentum == 0.7
    modes = [model.training, model.drop.training, model.norm.training, model.fixed.training]
    assert modes == [False, True, False, False]
    assert torch.allclose(model.norm.running_mean, batches[0][0].mean((0, 2, 3)), atol=1e-4)


def test_batch_norm_tuning_leaves_single_images_out(batches):
    images, labels = batches[0]
    models = Noisy(), Noisy()
    batchnorm_tune(models[0], [(images, labels), (images[:1], labels[:1])], CPU, 5)
    batchnorm_tune(models[1], [(images, labels)], CPU, 5)
    assert torch.equal(models[0].norm.running_mean, models[1].norm.running_mean)
    with pytest.raises(UserError, match="two images"):
        batchnorm_tune(Noisy(), [(images[:1], labels[:1])], CPU, 5)


def test_without_norms_corrections_of_statistics_say_so(batches, images):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))
    with pytest.raises(UserError, match="--bnt.*no batch norm"):
        batchnorm_tune(model, batches, CPU)
    with pytest.raises(UserError, match="--statcorr.*no norm .* post_proc.py --gap"):
        statistics_correction(model, copy.deepcopy(model), images, CPU)


# ----------------------------------------------------------------------- statistics correction


class LayerNorms(nn.Module):
    """All sorts of layer norms, with as many pixels a side as channels, to be mistaken for them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.planes = LayerNorm2d(8)
        self.block = nn.LayerNorm((8, 8))
        self.linear = nn.Linear(8, 6)
        self.last = nn.LayerNorm(6)
        self.bare = nn.LayerNorm(6, elementwise_affine=False)
        self.biasless = nn.LayerNorm(6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(F.relu(self.planes(self.conv(x))))
        x = self.last(self.linear(F.gelu(x.mean(2))))
        return self.biasless(self.bare(x.mean(1)))


def perturbed(dense: nn.Module) -> nn.Module:
    model = copy.deepcopy(dense)
    generator = torch.Generator().manual_seed(1)
    for layer in find_layers(model).values():
        noise = torch.randn(layer.weight.shape, generator=generator)
        layer.weight.data += 0.5 * layer.weight.data.std() * noise
    return model


CHANNEL_AXES = {"planes": (1,), "block": (2, 3), "last": (2,)}  # of LayerNorms, known


def moments_along(y: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    others = tuple(i for i in range(y.ndim) if i not in axes)
    y = y.double()
    return y.mean(others), y.std(others, correction=0)


@pytest.mark.parametrize("kind", ["batch", "layer"])
def test_corrected_statistics_are_the_dense_ones_everywhere(kind, dense, compressed, images):
    if kind == "batch":
        model = compressed
        axes = dict.fromkeys(names_of(model, nn.BatchNorm2d), (1,))
    else:
        torch.manual_seed(0)
        dense = LayerNorms()
        for norm in (dense.planes, dense.block, dense.last):
            norm.weight.data.uniform_(0.5, 2)
            norm.bias.data.normal_()
        model, axes = perturbed(dense), CHANNEL_AXES
        dense.eval(), model.eval()
    names = list(axes)
    before, wanted = outputs(model, names, images), outputs(dense, names, images)
    statistics_correction(model, dense, images, CPU)
    after = outputs(model, names, images)
    for name in names:
        mean, std = moments_along(wanted[name], axes[name])
        new_mean, new_std = moments_along(after[name], axes[name])
        assert torch.allclose(new_mean, mean, rtol=0, atol=1e-4), name
        assert torch.allclose(new_std, std, rtol=1e-4, atol=1e-4), name
        if name != "bn1":  # which follows the layer that was left dense
            assert not torch.allclose(moments_along(before[name], axes[name])[0], mean, atol=1e-3)


def test_one_pass_equals_a_pass_for_each_norm(compressed, dense, images):
    plain = copy.deepcopy(compressed)
    statistics_correction(compressed, dense, images, CPU)
    names = names_of(plain, nn.BatchNorm2d)  # registered in order of execution
    wanted = outputs(dense, names, images)
    for name in names:
        now = outputs(plain, [name], images)[name]
        mean, std = moments_along(now, (1,))
        dense_mean, dense_std = moments_along(wanted[name], (1,))
        norm = plain.get_submodule(name)
        r = dense_std / std
        norm.weight.data *= r
        norm.bias.data = (r * norm.bias.data + dense_mean - r * mean).float()
    for name in names:
        ours, theirs = compressed.get_submodule(name), plain.get_submodule(name)
        assert torch.allclose(ours.weight, theirs.weight, rtol=1e-3, atol=1e-4)
        assert torch.allclose(ours.bias, theirs.bias, rtol=1e-3, atol=1e-4)


def test_constant_channels_get_the_mean_only(images):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    dense[1].bias.data.normal_()
    model = copy.deepcopy(dense)
    model[0].weight.data[1], dense[0].weight.data[2] = 0, 0
    statistics_correction(model, dense, images, CPU)
    assert torch.equal(model[1].weight[1:3], torch.ones(2))
    wanted, found = (outputs(m, ["1"], images)["1"].mean((0, 2, 3)) for m in (dense, model))
    assert torch.allclose(wanted, found, atol=1e-5)
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(F.relu(self.norm(self.conv(x))))).mean((2, 3))


def test_a_norm_that_is_called_twice_is_corrected_by_its_first_call(images):
    torch.manual_seed(0)
    dense = Twice().eval()
    model = perturbed(dense)
    statistics_correction(model, dense, images, CPU)
    wanted, found = norm_moments(dense, images, CPU), norm_moments(model, images, CPU)
    assert torch.allclose(wanted["norm"].mean, found["norm"].mean, atol=1e-5)
    assert torch.allclose(wanted["norm"].std, found["norm"].std, rtol=1e-4)


def test_statistics_correction_leaves_no_hooks_and_restores_modes(compressed, dense, images):
    compressed.layer1.train()
    modes = [module.training for module in compressed.modules()]
    statistics_correction(compressed, dense, images, CPU)
    assert [module.training for module in compressed.modules()] == modes
    assert not any(module._forward_hooks for module in compressed.modules())


# ---------------------------------------------------------------------------------- training


class SameBatches(list):
    """The same batches in every epoch."""

    def epoch(self, number: int) -> list[tuple[Tensor, Tensor]]:
        return list(self)


def task(batches, epochs: int = 3, name: str = "finetune") -> TrainingTask:
    return TrainingTask(name, SameBatches(batches), CPU, epochs, f"--{name}-lr")


TRAININGS: dict[str, Callable] = {
    "gap": global_adaprune,
    "lintune": train_vectors,
    "lintune-loss": partial(train_vectors, labelled=CLASSIFICATION),
    "finetune": finetune,
    "finetune-mse": partial(finetune, labelled=None),
}


def train(name: str, model: nn.Module, dense: nn.Module, batches, lr: float = 1e-3) -> list[float]:
    """Three epochs; at the default rate some weights move from grid value to grid value."""
    return TRAININGS[name](model, dense, task(batches), lr=lr)


ALL = {name: partial(train, name) for name in TRAININGS} | {
    "bnt": lambda model, dense, batches: batchnorm_tune(model, batches, CPU, 5),
    "statcorr": lambda model, dense, batches: statistics_correction(
        model, dense, batches[0][0], CPU
    ),
}


@pytest.mark.parametrize("name", ALL)
def test_zeros_grids_names_and_modes_stay(name, compressed, dense, batches):
    before, dense_before = copy.deepcopy(compressed), copy.deepcopy(dense)
    compressed.layer2.train()
    dense.layer1.train()
    ALL[name](compressed, dense, batches)
    assert compressed.layer2[0].bn1.training and not compressed.layer1[0].bn1.training
    assert dense.layer1[0].bn1.training and not dense.layer2[0].bn1.training
    assert compressed.state_dict().keys() == before.state_dict().keys()
    assert not any(module._forward_hooks for module in compressed.modules())
    moved = 0
    for layer_name, layer in find_layers(compressed).items():
        old = before.get_submodule(layer_name)
        assert not layer.weight[old.weight == 0].any(), layer_name
        if hasattr(layer, "weight_quant"):
            assert torch.equal(layer.weight_quant.scale, old.weight_quant.scale)
            W = layer.weight.detach().flatten(1)
            code = W / layer.weight_quant.scale
            assert torch.allclose(code, code.round(), atol=1e-4), layer_name
            assert torch.equal(layer.weight_quant(W), W), layer_name
        moved += int((layer.weight != old.weight).sum())
    assert (moved > 0) == (name in ("gap", "finetune", "finetune-mse"))
    assert all(map(torch.equal, dense.state_dict().values(), dense_before.state_dict().values()))
    assert all(p.grad is None and p.requires_grad for p in compressed.parameters())


def relative_errors(model: nn.Module, dense: nn.Module, images: Tensor) -> float:
    names = list(find_layers(model))
    ours, theirs = (outputs(m, names, images) for m in (model, dense))
    errors = [(ours[n] - theirs[n]).square().sum() / theirs[n].square().sum() for n in names]
    return float(torch.stack(errors).mean())


def logit_distance(model: nn.Module, dense: nn.Module, images: Tensor) -> float:
    with torch.no_grad():
        return float((model(images) - dense(images)).square().mean())


@pytest.mark.parametrize("name", TRAININGS)
def test_each_training_lowers_its_own_loss(name, compressed, dense, batches, images):
    labels = torch.cat([labels for _, labels in batches])

    def loss() -> float:
        if name == "gap":
            return relative_errors(compressed, dense, images)
        if name in ("lintune", "finetune-mse"):
            return logit_distance(compressed, dense, images)
        with torch.no_grad():
            return float(F.cross_entropy(compressed(images), labels))

    before = loss()
    losses = train(name, compressed, dense, batches, lr=3e-4)
    assert len(losses) == 3
    assert losses[2] < losses[0]
    assert loss() < 0.97 * before


def test_global_adaprune_reports_the_mean_relative_error_of_all_layers(compressed, dense, batches):
    expected = relative_errors(compressed, dense, batches[0][0])
    losses = global_adaprune(compressed, dense, task(batches[:1], 1), lr=1e-5)
    assert losses[0] == pytest.approx(expected, rel=1e-4)


def test_lintune_moves_vectors_only(compressed, dense, batches):
    before = copy.deepcopy(compressed.state_dict())
    train("lintune", compressed, dense, batches)
    changed = {
        key
        for key, tensor in compressed.state_dict().items()
        if not torch.equal(tensor, before[key])
    }
    vectors = {name for name, parameter in compressed.named_parameters() if parameter.ndim == 1}
    assert changed == vectors
    with pytest.raises(UserError, match="no biases"):
        train_vectors(nn.Linear(3, 2, bias=False), dense, task(batches))


def test_gradients_pass_through_activation_grids(dense, batches, images):
    """The first layer learns although its only way to the loss is through a grid."""
    torch.manual_seed(0)
    wide = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8 * 14 * 14, 10)
    ).eval()
    model = perturbed(wide)
    with torch.no_grad():
        set_activation_grid(model[3], fit_activation_grid(model[1](model[0](images)), 3))
    before = model[0].weight.clone(), model(images).detach()
    assert global_adaprune(model, wide, task(batches, 1), 1e-12)
    assert torch.allclose(model(images), before[1], atol=1e-5)  # results of rounding are the same
    finetune(model, wide, task(batches, 1), 1e-3, labelled=None)
    assert not torch.allclose(model[0].weight, before[0], atol=1e-4)


def test_a_loss_that_runs_away_leaves_the_model_as_it_was(dense, batches):
    model = perturbed(dense)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        UserError, match="finetune: the loss is not finite in epoch 1; pass a smaller --finetune-lr"
    ):
        finetune(model, dense, task(batches, 2), 1e30)
    assert all(map(torch.equal, model.state_dict().values(), before.values()))


@pytest.mark.parametrize("name", TRAININGS)
def test_training_is_deterministic(name, compressed, dense, batches):
    other = copy.deepcopy(compressed)
    torch.manual_seed(1)
    train(name, compressed, dense, batches)
    torch.manual_seed(2)  # the global generator plays no part
    train(name, other, dense, batches)
    assert all(map(torch.equal, compressed.state_dict().values(), other.state_dict().values()))


def test_tied_and_unused_layers_are_no_trouble(batches):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.unused = CifarResNet(1), nn.Linear(4, 4)
            self.net.layer1[0].conv2.weight = self.net.layer1[0].conv1.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    torch.manual_seed(0)
    dense = Odd().eval()
    model = perturbed(dense)
    assert global_adaprune(model, dense, task(batches, 1), 1e-4)
    assert model.net.layer1[0].conv2.weight is model.net.layer1[0].conv1.weight
