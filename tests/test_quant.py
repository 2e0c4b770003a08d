"""Grids against a plain search in numpy; layers that round their input."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import asymmetric_grid_oracle, symmetric_grid_oracle
from torch import Tensor, nn

from quant import (
    Grid,
    fit_activation_grid,
    fit_grid,
    fit_weight_grid,
    restore_grids,
    set_activation_grid,
    set_weight_grid,
)

TOLERANCE = 1e-9
BITS = (2, 3, 4, 5, 6, 7, 8)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def heavy_tailed(*shape: int, seed: int = 0) -> Tensor:
    return gaussian(*shape, seed=seed) ** 3  # so that the search has something to cut off


# ----------------------------------------------------------------------------------------- grids


@pytest.mark.parametrize("bits", BITS)
def test_symmetric_grid_is_the_oracle(bits: int) -> None:
    W = torch.cat([gaussian(4, 90), heavy_tailed(4, 90)])
    W[5] -= 4  # all negative
    grid = fit_weight_grid(W, bits)
    rounded = grid(W)
    for r in range(len(W)):
        step, row = symmetric_grid_oracle(W[r].numpy(), bits)
        assert float(grid.scale[r]) == pytest.approx(step, rel=TOLERANCE)
        np.testing.assert_allclose(rounded[r], row, rtol=TOLERANCE, atol=TOLERANCE)
    assert grid.scale.shape == grid.zero.shape == (8, 1)
    assert (grid.zero == 2 ** (bits - 1)).all() and grid.bits == bits


@pytest.mark.parametrize("bits", BITS)
def test_asymmetric_grid_is_the_oracle(bits: int) -> None:
    one_sided = heavy_tailed(6, 50).relu(), gaussian(300) + 4, -gaussian(3, 4).abs()
    for x in (gaussian(6, 50), *one_sided):
        step, zero, wanted = asymmetric_grid_oracle(x.numpy(), bits)
        grid = fit_activation_grid(x, bits)
        assert float(grid.scale) == pytest.approx(step, rel=TOLERANCE)
        assert float(grid.zero) == zero and grid.scale.shape == ()
        np.testing.assert_allclose(grid(x), wanted, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("bits", BITS)
def test_asymmetric_weight_grids_are_the_oracle_row_by_row(bits: int) -> None:
    W = heavy_tailed(5, 70) + torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
    grid = fit_weight_grid(W, bits, symmetric=False)
    for r in range(len(W)):
        step, zero, row = asymmetric_grid_oracle(W[r].numpy(), bits)
        assert float(grid.scale[r]) == pytest.approx(step, rel=TOLERANCE)
        assert float(grid.zero[r]) == zero
        np.testing.assert_allclose(grid(W)[r], row, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_grid_for_a_whole_layer(symmetric: bool) -> None:
    W = heavy_tailed(5, 30)
    grid = fit_weight_grid(W, 4, symmetric, per_channel=False)
    oracle = symmetric_grid_oracle if symmetric else asymmetric_grid_oracle
    step = oracle(W.flatten().numpy(), 4)[0]
    assert grid.scale.shape == grid.zero.shape == (5, 1)
    np.testing.assert_allclose(grid.scale, step, rtol=TOLERANCE)
    assert len(torch.unique(grid(W))) <= 16


@pytest.mark.parametrize("bits", BITS)
def test_without_search_the_range_is_min_to_max(bits: int) -> None:
    W = heavy_tailed(5, 30)
    levels = 2**bits - 1
    symmetric = fit_weight_grid(W, bits, search=False)
    np.testing.assert_allclose(symmetric.scale[:, 0], 2 * W.abs().amax(1) / levels, rtol=1e-12)
    low, high = W.amin(1).clamp(max=0), W.amax(1).clamp(min=0)
    grid = fit_weight_grid(W, bits, symmetric=False, search=False)
    np.testing.assert_allclose(grid.scale[:, 0], (high - low) / levels, rtol=1e-12)
    assert torch.equal(grid.zero[:, 0], (-low / grid.scale[:, 0]).round())
    assert float((grid(W) - W).abs().max()) <= float(grid.scale.max()) * (1 + 1e-12)  # all inside
    searched = fit_weight_grid(W, bits)
    assert (searched.scale <= symmetric.scale).all()
    assert (searched.scale < symmetric.scale).any() or bits > 6


@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_rows_stay_zero(symmetric: bool, search: bool) -> None:
    W = gaussian(3, 20)
    W[1] = 0
    grid = fit_weight_grid(W, 4, symmetric, search)
    assert float(grid.scale[1]) == 1
    assert not grid(W)[1].any() and torch.isfinite(grid(W)).all()


def test_fitting_does_not_change_what_it_fits() -> None:
    W = gaussian(3, 20)
    before = W.clone()
    fit_weight_grid(W, 4)(W)
    fit_activation_grid(W, 4)(W)
    assert torch.equal(W, before)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=24),
    st.integers(1, 8),
    st.booleans(),
    st.booleans(),
)
def test_property_grids(values: list[float], bits: int, symmetric: bool, search: bool) -> None:
    """Zero is on the grid, rounding twice is rounding once, codes fit; float32, bit for bit."""
    x = torch.tensor([values])
    grid = fit_grid(x, bits, symmetric, search)
    once = grid(x)
    assert torch.isfinite(once).all() and torch.equal(grid(once), once)
    assert not grid(torch.zeros(1, 1)).any()
    assert len(torch.unique(once)) <= 2**bits
    assert 0 <= float(grid.zero) <= 2**bits - 1 and float(grid.zero) % 1 == 0
    assert float(grid.scale) > 0


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_every_grid_value_is_its_own_nearest(bits: int, symmetric: bool) -> None:
    W = gaussian(64, 300, dtype=torch.float32) * torch.logspace(-6, 6, 64)[:, None]
    grid = fit_weight_grid(W, bits, symmetric)
    codes = torch.arange(2**bits)
    values = grid.scale * (codes - grid.zero)  # (64, 2^b)
    assert torch.equal(grid(values), values)
    assert torch.equal(grid(grid(W)), grid(W))
    nearest = values[:, None, :].sub(W[:, :20, None]).abs().amin(2)  # by search over the grid
    np.testing.assert_allclose((grid(W) - W).abs()[:, :20], nearest, rtol=1e-4, atol=1e-12)


# --------------------------------------------------------------------------------- inside a model


def small_model(seed: int = 0) -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(generator=generator)
    return model.eval()


def quantised_model() -> tuple[nn.Sequential, Tensor]:
    model = small_model()
    images = gaussian(6, 3, 4, 4, dtype=torch.float32)
    with torch.no_grad():
        for layer in (model[0], model[2][1]):
            W = layer.weight.flatten(1)
            grid = fit_weight_grid(W, 4)
            layer.weight.copy_(grid(W).view_as(layer.weight))
            set_weight_grid(layer, grid)
        set_activation_grid(model[0], fit_activation_grid(images, 4))
        set_activation_grid(model[2][1], fit_activation_grid(model[:2](images).flatten(1), 3))
    return model, images


def test_layer_rounds_its_input() -> None:
    layer = nn.Linear(6, 4)
    x = gaussian(10, 6, dtype=torch.float32)
    before = x.clone()
    grid = fit_activation_grid(x, 2)
    wanted = layer(grid(x))
    assert not torch.equal(layer(x), wanted)
    set_activation_grid(layer, grid)
    assert torch.equal(layer(x), wanted) and torch.equal(x, before)
    assert torch.equal(copy.deepcopy(layer)(x), wanted)


def test_a_second_grid_replaces_the_first() -> None:
    layer = nn.Linear(6, 4)
    x = gaussian(10, 6, dtype=torch.float32)
    coarse, fine = fit_activation_grid(x, 2), fit_activation_grid(x, 6)
    wanted = layer(fine(x))
    set_activation_grid(layer, coarse)
    set_activation_grid(layer, fine)
    assert torch.equal(layer(x), wanted)
    assert len(layer._forward_pre_hooks) == 1


def test_the_state_dict_has_every_grid() -> None:
    model, _ = quantised_model()
    keys = set(model.state_dict()) - set(small_model().state_dict())
    wanted = {
        f"{layer}.{kind}_quant.{part}"
        for layer in ("0", "2.1")
        for kind in ("weight", "act")
        for part in ("scale", "zero", "maxq")
    }
    assert keys == wanted


def test_restored_model_computes_the_same() -> None:
    model, images = quantised_model()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    fresh = small_model(seed=7)
    restore_grids(fresh, state)
    fresh.load_state_dict(state)
    assert torch.equal(fresh(images), model(images))
    assert fresh[2][1].act_quant.bits == 3 and fresh[0].weight_quant.bits == 4
    assert fresh.state_dict().keys() == state.keys()
    restore_grids(fresh, state)  # again: inputs are still rounded once
    assert len(fresh[0]._forward_pre_hooks) == 1


def test_restored_grids_are_copies() -> None:
    state = quantised_model()[0].state_dict()
    before = {key: tensor.clone() for key, tensor in state.items()}
    fresh = small_model()
    restore_grids(fresh, state)
    with torch.no_grad():
        for buffer in fresh.buffers():
            buffer.zero_()
    assert all(torch.equal(state[key], before[key]) for key in state)


def test_restoring_a_dense_model_does_nothing() -> None:
    model = small_model()
    restore_grids(model, model.state_dict())
    assert list(model.state_dict()) == list(small_model().state_dict())


def test_restoring_a_model_that_is_a_single_layer() -> None:
    layer, x = nn.Linear(6, 4), gaussian(10, 6, dtype=torch.float32)
    set_activation_grid(layer, fit_activation_grid(x, 3))
    fresh = nn.Linear(6, 4)
    restore_grids(fresh, layer.state_dict())
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))


def test_restoring_into_another_model_is_an_error() -> None:
    model, _ = quantised_model()
    with pytest.raises(ValueError, match="weight_quant has the wrong shape"):
        restore_grids(nn.Sequential(nn.Linear(2, 2)), model.state_dict())
    with pytest.raises(AttributeError):
        restore_grids(nn.Sequential(), model.state_dict())


def test_bits_of_a_grid() -> None:
    assert [Grid(torch.ones(1), torch.zeros(1), 2**b - 1).bits for b in BITS] == list(BITS)
