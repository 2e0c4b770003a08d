"""Uniform quantisation: grids, the search for their range, and layers that quantise their input.

A grid of b bits has 2^b values; x is rounded to the nearest:

    Q(x) = Δ · (clamp(round(x/Δ) + z, 0, 2^b − 1) − z)

    symbol  variable  shape       meaning
    Δ       scale     (rows, 1)   step; one row for a whole tensor
    z       zero      (rows, 1)   zero point, an integer, so that 0 is a grid value
    2^b−1   maxq      ()          highest code

Ranges follow OBC (arXiv 2208.11580, section 6 and its published settings): of the shrink factors
p = 1.00, 0.99, … 0.21 of the min–max range, the one of least Σ |x − Q(x)|^2.4 is chosen. Symmetric
grids have z = 2^(b−1) and Δ = 2·max|x|·p/(2^b − 1).

Grids are stored in the model as buffers next to the weights that they belong to
(`conv1.weight_quant.scale`, `conv1.act_quant.scale`), so that a state dict describes a quantised
model completely.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from obc.solver.layers import view
from obc.solver.threads import in_pieces

SHRINK_FACTORS = tuple((100 - i) / 100 for i in range(80))  # 1.00, 0.99, … 0.21
ERROR_POWER = 2.4
SEARCH_SAMPLE = 1 << 18  # activations that the search for their range uses
ROWS_COMPARED = 16  # of a layer, at most, on both kinds of grid
ROWS_OF_A_PIECE = 64  # whose ranges are searched at a time on one thread
WEIGHT_GRID, ACTIVATION_GRID = "weight_quant", "act_quant"


class Grid(nn.Module):
    """A uniform grid; calling it rounds a tensor to it."""

    def __init__(self, scale: Tensor, zero: Tensor, maxq: int | Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.register_buffer(
            "maxq", maxq if isinstance(maxq, Tensor) else torch.full((), maxq, device=scale.device)
        )

    @property
    def bits(self) -> int:
        return int(self.maxq).bit_length()

    def forward(self, x: Tensor) -> Tensor:
        """Nearest grid values of x: (rows, d), or any shape if the grid has one row."""
        return _rounded(x, self.scale, self.zero, self.maxq.to(x.dtype))


def _rounded(x: Tensor, scale: Tensor, zero: Tensor, maxq: Tensor) -> Tensor:
    code = torch.clamp(torch.round(x / scale) + zero, min=0).minimum(maxq)
    return scale * (code - zero)


def _scale_and_zero(
    low: Tensor,  # (rows, 1), at most 0
    high: Tensor,  # (rows, 1), at least 0
    bits: int,
    symmetric: bool,
) -> tuple[Tensor, Tensor]:  # (rows, 1) each
    """Step and zero point of the grid that spans a range. An empty range gets a step of 1."""
    maxq = 2**bits - 1
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale = (high - low) / maxq
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = torch.full_like(scale, 2 ** (bits - 1)) if symmetric else torch.round(-low / scale)
    return scale, zero


def fit_grid(
    x: Tensor,  # (rows, d): a grid for each row
    bits: int,
    symmetric: bool = True,
    search: bool = True,  # for the range of least error; else min–max
    sample: Tensor | None = None,  # (rows, n) values of x that the search uses; all if None
) -> Grid:
    """The grid for x, per row, with the range described in the module docstring."""
    scale, zero = (x.new_empty(len(x), 1) for _ in range(2))

    def work(rows: slice) -> None:
        values = (x if sample is None else sample)[rows]
        scale[rows], zero[rows] = _fitted(x[rows], bits, symmetric, search, values)

    if x.device.type == "cpu":
        in_pieces(work, len(x), ROWS_OF_A_PIECE)
    else:
        work(slice(None))
    return Grid(scale, zero, 2**bits - 1)


def _fitted(
    x: Tensor, bits: int, symmetric: bool, search: bool, sample: Tensor
) -> tuple[Tensor, Tensor]:  # (rows, 1) each
    """Step and zero point of `fit_grid`."""
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    best_scale, best_zero = _scale_and_zero(low, high, bits, symmetric)
    if not search:
        return best_scale, best_zero
    least, maxq = torch.full_like(low, float("inf")), x.new_full((), 2**bits - 1)
    for factor in SHRINK_FACTORS:
        scale, zero = _scale_and_zero(low * factor, high * factor, bits, symmetric)
        rounded = _rounded(sample, scale, zero, maxq)
        error = (rounded - sample).abs_().pow_(ERROR_POWER).sum(1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def fit_weight_grid(
    weight: Tensor,  # (rows, d)
    bits: int,
    symmetric: bool = True,
    search: bool = True,
    per_channel: bool = True,  # else one scale for the whole layer
) -> Grid:
    """A grid for each output channel, (rows, 1), or the same one for all."""
    if per_channel:
        return fit_grid(weight, bits, symmetric, search)
    grid = fit_grid(weight.reshape(1, -1), bits, symmetric, search)
    rows = (len(weight), 1)
    return Grid(grid.scale.expand(rows).clone(), grid.zero.expand(rows).clone(), grid.maxq)


def symmetric_loss(
    weight: Tensor,  # (rows, d)
    bits: int,
) -> Tensor:  # ()
    """The squared error of rounding to symmetric grids / to asymmetric ones, on a few rows."""
    rows = weight[:: -(-len(weight) // ROWS_COMPARED)]
    symmetric, asymmetric = (
        (fit_weight_grid(rows, bits, kind)(rows) - rows).square().sum() for kind in (True, False)
    )
    return torch.where(asymmetric > 0, symmetric / asymmetric, 1.0)


def fit_activation_grid(x: Tensor, bits: int, symmetric: bool = False, search: bool = True) -> Grid:
    """One grid for a tensor of any shape; its scale has shape ().

    For a large tensor the search uses `SEARCH_SAMPLE` values, drawn with a fixed seed.
    """
    x, sample = x.reshape(1, -1), None
    if x.shape[1] > SEARCH_SAMPLE:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(x.shape[1], (SEARCH_SAMPLE,), generator=generator)
        sample = x[:, drawn.to(x.device)]
    grid = fit_grid(x, bits, symmetric, search, sample)
    return Grid(grid.scale.reshape(()), grid.zero.reshape(()), grid.maxq)


def set_weight_grid(layer: nn.Module, grid: Grid) -> None:
    """Record the grid that a layer's weights lie on."""
    layer.add_module(WEIGHT_GRID, grid)


def set_activation_grid(layer: nn.Module, grid: Grid) -> None:
    """Make a layer round its input to a grid from now on."""
    if _round_input not in layer._forward_pre_hooks.values():
        layer.register_forward_pre_hook(_round_input, with_kwargs=True)
    layer.add_module(ACTIVATION_GRID, grid)


def _round_input(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    """Round the first argument of a call, by position or by keyword."""
    grid = layer._modules.get(ACTIVATION_GRID)
    if grid is None:
        return args, kwargs
    if args:
        return (grid(args[0]), *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, kwargs | {name: grid(kwargs[name])}


def clear_grids(layer: nn.Module) -> None:
    """Remove a layer's grids; its weights stay as they are."""
    for name in (WEIGHT_GRID, ACTIVATION_GRID):
        layer._modules.pop(name, None)


def restore_grids(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a model (or one layer) the grids in a state dict, so that this can be loaded.

    Raises:
        AttributeError: if the model lacks a layer that the state dict names.
        KeyError: if a grid in the state dict is incomplete.
        ValueError: if a grid does not fit its layer.
    """
    setters = {WEIGHT_GRID: set_weight_grid, ACTIVATION_GRID: set_activation_grid}
    for key in state:
        name, _, attribute = key.rpartition(".")
        layer_name, _, kind = name.rpartition(".")
        if kind in setters and attribute == "scale":
            layer = model.get_submodule(layer_name)
            buffers = [state[f"{name}.{buffer}"] for buffer in ("scale", "zero", "maxq")]
            check_grid(name, view(layer).rows if kind == WEIGHT_GRID else None, *buffers)
            to, to_gpu = layer.weight.device, layer.weight.device.type != "cpu"
            buffers = [x.to(to, non_blocking=to_gpu, copy=True) for x in buffers]
            setters[kind](layer, Grid(*buffers))


def check_grid(name: str, rows: int | None, scale: Tensor, zero: Tensor, maxq: Tensor) -> None:
    """Raise a ValueError unless these are a grid of shape (rows, 1), or () if rows is None."""
    shape = () if rows is None else (rows, 1)
    if scale.shape != shape or zero.shape != shape or maxq.shape != ():
        raise ValueError(f"{name} has the wrong shape")
    highest = float(maxq)
    codes = 1 <= highest < 2**16 and torch.equal(zero, zero.round().clamp(0, highest))
    if not (codes and bool(torch.isfinite(scale).all() & (scale > 0).all())):
        raise ValueError(f"{name} is not a quantisation grid")


def put_layer(layer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a layer the weight, the bias and the grids in `tensors`, and no other grids."""
    clear_grids(layer)
    to_gpu = layer.weight.device.type != "cpu"  # which nobody has to wait for
    with torch.no_grad():
        layer.weight.copy_(tensors["weight"], non_blocking=to_gpu)
        if layer.bias is not None and "bias" in tensors:
            layer.bias.copy_(tensors["bias"], non_blocking=to_gpu)
    restore_grids(layer, tensors)
