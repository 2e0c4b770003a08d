"""Integer codes of quantised layers, and checkpoints that store them packed (.safetensors).

A quantised weight is W = Δ·(q − z), exactly: scale Δ and zero point z of a row are in the
checkpoint (quant.py), the codes q = 0 … 2^b − 1 follow from them. In a packed checkpoint,
NAME.weight of every such layer is replaced by

    NAME.weight_codes  (bytes,) uint8   the codes in the weight's own order, first code lowest
    NAME.weight_shape  (ndim,)  int64   the weight's shape

with 8/b' codes a byte, b' = 2, 4 or 8 being the smallest that holds b bits. All else is as in the
checkpoint. docs/export.md has the reader.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modelutils import find_layers
from obc.inputs.attention import layer_names
from obc.solver.layers import view
from quant import WEIGHT_GRID, Grid

WIDTHS = (2, 4, 8, 16)  # bits that a code may take in a file
MAX_PACKED_BITS = 8


@dataclass(frozen=True)
class Codes:
    """A quantised weight, W = scale · (codes − zero), row by row."""

    codes: Tensor  # (rows, …) int32, in 0 … 2^bits − 1, of the weight's shape
    scale: Tensor  # (rows,) float32
    zero: Tensor  # (rows,) int32
    bits: int

    @property
    def symmetric(self) -> bool:
        return bool((self.zero == 2 ** (self.bits - 1)).all())

    @property
    def width(self) -> int:
        """Bits that a code takes in a file."""
        return next(width for width in WIDTHS if self.bits <= width)


class OffGrid(ValueError):
    """A layer has a grid, but its weights are not on it, or cannot be written as codes."""


def weight_codes(layer: nn.Module) -> Codes | None:
    """The codes of a layer, exactly; None if it has no grid. Raises OffGrid."""
    grid = layer._modules.get(WEIGHT_GRID)
    if not isinstance(grid, Grid):
        return None
    if not view(layer).rows_are_first:
        raise OffGrid(f"codes of a {type(layer).__name__} have no place in the file yet")
    W = layer.weight.detach().flatten(1)
    codes = torch.round(W / grid.scale) + grid.zero
    inside = bool(((codes >= 0) & (codes <= grid.maxq)).all())
    if not inside or not torch.equal(grid.scale * (codes - grid.zero), W):
        raise OffGrid("its weights are not on its grid (trained after they were quantised?)")
    whole = codes.to(torch.int32).view(layer.weight.shape)
    return Codes(whole, grid.scale[:, 0], grid.zero[:, 0].to(torch.int32), grid.bits)


def pack(
    codes: Tensor,  # any shape, in 0 … 2^width − 1
    width: int,  # 2, 4 or 8 bits
) -> Tensor:  # (bytes,) uint8
    """Codes in bytes, the first in the lowest bits; the last byte is filled up with zeros."""
    per_byte = 8 // width
    flat = codes.flatten().to(torch.uint8)
    whole = torch.zeros(-(-len(flat) // per_byte) * per_byte, dtype=torch.uint8)
    whole[: len(flat)] = flat
    packed = torch.zeros(len(whole) // per_byte, dtype=torch.uint8)
    for place in range(per_byte):
        packed |= whole[place::per_byte] << (place * width)
    return packed


def packed_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The model's tensors by layer, packed; and why which quantised layers are not packed."""
    state, left = layer_names(model.state_dict(), model), dict[str, str]()
    for name, layer in find_layers(model).items():
        try:
            codes = weight_codes(layer)
        except OffGrid as error:
            left[name] = str(error)
            continue
        if codes is None:
            continue
        if codes.bits > MAX_PACKED_BITS:
            left[name] = f"{codes.bits} bits do not fit in a byte"
            continue
        del state[f"{name}.weight"]
        state[f"{name}.weight_codes"] = pack(codes.codes, codes.width)
        state[f"{name}.weight_shape"] = torch.tensor(codes.codes.shape)
    return state, left
