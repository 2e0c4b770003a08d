"""Corrections of norms of every kind: what is promised for each, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from obc.solver.errors import UserError
from obc.toolkit.corrections import batchnorm_tune, statistics_correction

CPU = torch.device("cpu")
IMAGES = torch.randn(32, 3, 12, 12, generator=torch.Generator().manual_seed(0))
Norms = Callable[[], list[nn.Module]]  # a norm for 8 channels and what follows it


class NormAct(nn.BatchNorm2d):
    """A batch norm that activates its output, as timm's BatchNormAct2d does."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__(8)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(super().forward(x))


class GroupNormAct(nn.GroupNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


class GatedNorm(nn.BatchNorm2d):
    """The output at one position depends on all others: no affine correction is right."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * torch.sigmoid(y.mean((2, 3), keepdim=True))


def network(norms: Norms) -> nn.Module:
    """The same weights whatever the spelling of its norms."""
    torch.manual_seed(1)
    first, last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
    model = nn.Sequential(first, *norms(), last, *norms()).eval()
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if getattr(module, "weight", None) is not None and module.weight.ndim == 1:
            module.weight.data.uniform_(0.5, 2, generator=generator)
            module.bias.data.normal_(generator=generator)
    return model


def pruned(model: nn.Module) -> nn.Module:
    """Without half of the convolutions' weights."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data *= torch.rand(module.weight.shape, generator=generator) > 0.5
    return model


def norm_outputs(model: nn.Module) -> list[Tensor]:
    outputs = []
    norms = [x for x in model if isinstance(x, nn.GroupNorm | nn.InstanceNorm2d | nn.BatchNorm2d)]
    handles = [norm.register_forward_hook(lambda m, x, y: outputs.append(y)) for norm in norms]
    with torch.no_grad():
        model(IMAGES)
    for handle in handles:
        handle.remove()
    return outputs


@pytest.mark.parametrize(
    "norms",
    [
        lambda: [nn.BatchNorm2d(8), nn.ReLU()],
        lambda: [nn.GroupNorm(4, 8), nn.ReLU()],
        lambda: [nn.GroupNorm(1, 8)],
        lambda: [nn.InstanceNorm2d(8, affine=True, track_running_stats=True), nn.ReLU()],
    ],
)
def test_moments_of_a_plain_norm_are_the_dense_ones(norms: Norms):
    dense = network(norms)
    model = pruned(dense)
    wanted, before = norm_outputs(dense), norm_outputs(model)
    statistics_correction(model, dense, IMAGES, CPU)
    assert len(wanted) == 2
    for target, current, corrected in zip(wanted, before, norm_outputs(model), strict=True):
        for moment in (torch.mean, torch.std):
            of_target, of_current = (moment(x, (0, 2, 3)) for x in (target, current))
            assert (of_target - of_current).abs().max() > 1e-3  # there was something to correct
            torch.testing.assert_close(
                moment(corrected, (0, 2, 3)), of_target, rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize(
    ("fused", "plain"),
    [
        (lambda: [NormAct(nn.ReLU())], lambda: [nn.BatchNorm2d(8), nn.ReLU()]),
        (lambda: [NormAct(nn.ReLU(inplace=True))], lambda: [nn.BatchNorm2d(8), nn.ReLU()]),
        (lambda: [NormAct(nn.SiLU())], lambda: [nn.BatchNorm2d(8), nn.SiLU()]),
        (lambda: [GroupNormAct(4, 8)], lambda: [nn.GroupNorm(4, 8), nn.SiLU()]),
    ],
)
def test_a_norm_that_activates_is_corrected_as_norm_and_activation(fused: Norms, plain: Norms):
    outputs = []
    for norms in (fused, plain):
        dense = network(norms)
        model = pruned(dense)
        statistics_correction(model, dense, IMAGES, CPU)
        with torch.no_grad():
            assert (model(IMAGES) - pruned(dense)(IMAGES)).abs().max() > 1e-2
            outputs.append(model(IMAGES))
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


def test_a_norm_that_mixes_positions_is_left_alone():
    dense = network(lambda: [GatedNorm(8)])
    model = pruned(dense)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match="statcorr"):
        statistics_correction(model, dense, IMAGES, CPU)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("count", [1, 5, 20, 100])
def test_any_number_of_batches_tunes_a_norm(count: int):
    """On one batch, over and over, the averages are that batch's statistics."""
    norm = nn.BatchNorm2d(3)
    norm.running_mean.fill_(5)
    norm.running_var.fill_(7)
    batch_norm_model = nn.Sequential(norm).eval()
    batchnorm_tune(batch_norm_model, [(IMAGES, torch.zeros(32))], CPU, count)
    torch.testing.assert_close(norm.running_mean, IMAGES.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, IMAGES.var((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_a_norm_that_no_image_reaches_keeps_its_statistics():
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            self.unused.running_mean.fill_(5)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Unused().eval()
    batchnorm_tune(model, [(IMAGES, torch.zeros(32))], CPU, 3)
    assert model.unused.running_mean.eq(5).all() and model.unused.running_var.eq(1).all()
