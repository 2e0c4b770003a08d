"""Every mode on hard Hessians: finite results, no worse than without a Hessian."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from hard_hessians import (
    INPUTS,
    LAYERS,
    grouped,
    hard_case,
    magnitude_blocks,
    magnitude_channels,
    magnitude_nm,
    resolution,
    true_error,
    units,
)
from torch import Tensor, nn
from torch.nn import functional

from quant import fit_weight_grid
from trueobs import TrueOBS

SPARSITIES = (0.0, 0.3, 0.5, 0.7, 0.9, 0.97, 1.0)
SINGULAR = ("rank 1", "rank d/2", "duplicated columns", "constant images", "a single image")


def solver(layer: nn.Module, x: Tensor) -> TrueOBS:
    obs = TrueOBS(copy.deepcopy(layer))
    for part in x.split(10):
        obs.add_batch(part)
    return obs


def quantised(layer: nn.Module, x: Tensor) -> Iterator[tuple[str, TrueOBS, Tensor, Tensor]]:
    W = layer.weight.detach()
    for bits in (4, 2):
        for symmetric in (True, False):
            obs = solver(layer, x)
            obs.quantizer = fit_weight_grid(W.flatten(1), bits, symmetric)
            obs.quantize()
            nearest = obs.quantizer(W.flatten(1)).view_as(W)
            yield f"{bits} bits", obs, obs.layer.weight.detach(), nearest


def pruned(layer: nn.Module, x: Tensor) -> Iterator[tuple[str, TrueOBS, Tensor, Tensor]]:
    W = layer.weight.detach()
    obs = solver(layer, x)
    obs.prepare_unstr()
    for level in obs.prune_unstr(SPARSITIES):
        yield "unstructured", obs, level, magnitude_blocks(W, int((level == 0).sum()), 1)
    for level in obs.prune_struct(SPARSITIES, W[0, 0].numel()):
        gone = (grouped(level, obs.groups) == 0).all(3).all(1).sum(1).tolist()
        yield "structured", obs, level, magnitude_channels(W, obs.groups, gone)
    if W.shape[1] % 4 == 0:
        obs.prepare_blocked(4)
        for level in obs.prune_blocked(SPARSITIES):
            gone = int((units(level, 4) == 0).all(1).sum())
            yield "blocks", obs, level, magnitude_blocks(W, gone, 4)
        obs.nmprune(2, 4)
        yield "2:4", obs, obs.layer.weight.detach(), magnitude_nm(W, 2, 4)


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", LAYERS)
def test_no_worse_than_without_a_hessian(name: str, inputs: str) -> None:
    layer, x = hard_case(name, inputs)
    W, floor = layer.weight.detach(), resolution(layer, x, layer.weight.detach())
    for method in (quantised, pruned):
        for mode, obs, weight, rival in method(layer, x):
            assert torch.isfinite(weight).all(), mode
            error = true_error(layer, x, weight, W)
            assert error <= true_error(layer, x, rival, W) * (1 + 1e-6) + floor, mode
            assert 0 <= obs.damping <= 1 and 0 <= obs.rank_deficit <= W[0].numel()


@pytest.mark.parametrize("inputs", SINGULAR)
def test_damping_and_rank_are_reported(inputs: str) -> None:
    layer, x = hard_case("valid", inputs)
    obs = solver(layer, x)
    obs.prepare_unstr()
    columns = functional.unfold(x.double(), 3).transpose(1, 2).flatten(0, 1)
    deficit = 72 - int(torch.linalg.matrix_rank(columns, rtol=1e-4))
    assert deficit > 0 and obs.damping > 0
    assert obs.rank_deficit == pytest.approx(deficit, abs=3)


def test_damped_levels_are_optimal_on_their_masks() -> None:
    """Condition 1e8 in float32: within 1 % of least squares on the mask (once 36 %)."""
    layer, x = hard_case("conv", "condition number 1e8")
    obs, W = solver(layer, x), layer.weight.detach().flatten(1).double()
    columns = functional.unfold(x.double(), 3, padding=1).transpose(1, 2).flatten(0, 1)
    obs.prepare_unstr()
    assert obs.damping > 0
    obs.nmprune(2, 4)
    for weight in (*obs.prune_unstr((0.3, 0.5, 0.7)), obs.layer.weight.detach()):
        error = best = 0.0
        for w, w_hat in zip(W, weight.flatten(1).double(), strict=True):
            kept = w_hat != 0
            target = columns @ w
            fit = torch.linalg.lstsq(columns[:, kept], target, driver="gelsd").solution
            best += float((target - columns[:, kept] @ fit).square().sum())
            error += float((target - columns @ w_hat).square().sum())
        assert error <= 1.01 * best


def test_requested_damping_is_left_alone() -> None:
    """With --rel-damp the user asks for the weights of the damped H."""
    layer, x = hard_case("linear", "well conditioned")
    W = layer.weight.detach().double()
    obs = TrueOBS(copy.deepcopy(layer), rel_damp=0.1)
    obs.add_batch(x)
    obs.prepare_unstr()
    weight = obs.prune_unstr((0.5,))[0].double()
    H = 2 * x.double().T @ x.double() / len(x)
    H += 0.1 * H.diagonal().mean() * torch.eye(len(H))
    for w, w_hat in zip(W, weight, strict=True):
        gradient = (H @ (w_hat - w))[w_hat != 0]
        assert gradient.abs().max() < 1e-4 * (H @ w).abs().max()


def test_a_row_where_nearest_is_better_is_rounded_to_nearest() -> None:
    layer, x = hard_case("linear", "a channel of 1e6")
    obs, W = solver(layer, x), layer.weight.detach()
    obs.quantizer = fit_weight_grid(W, 2)
    obs.quantize()
    nearest = obs.quantizer(W)
    for row in range(len(W)):
        errors = [
            float((x.double() @ (weight[row] - W[row]).double()).square().sum())
            for weight in (obs.layer.weight.detach(), nearest)
        ]
        assert errors[0] <= errors[1] * (1 + 1e-9)
