"""What a layer costs at each level: parameters, bits, FLOPs, BOPs or measured seconds.

Targets are relative to the dense network at 32 bits, over the layers that can be compressed. With n
weights, s the share of them that is left, F the layer's dense FLOPs and b the wider of its weights'
and its activations' bits (32 where it is not quantised):

    params    n s             bits      n s · (bits of the weights)
    flops     F s             bops      F s · b      (dense 32; 8w8a 8; 4w4a 4; half of it with 2:4)
    timingsq  seconds, measured by the user, from a file (format below)

A layer that was left dense has s = 1 at every level. Zeros that rounding to a grid has made do not
count. In a `mixed` database s is 1/2 for a quantised layer that is 2:4 sparse along its input
channels, else 1; in `4block_8w8a` it is the share of blocks of 4 that are not all zero. FLOPs count
two for a multiply-add: for a layer with O outputs an image, F = 2 · O · (weights of one output
channel), which is right for any stride, dilation and number of groups.

Timings are a text file in the format of the scores: a layer's name on a line, then a line
`<seconds> <level>` for each level of the database, and one with the level `dense`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from budget.profiles import read_scores
from command.cli import UserError
from modelutils import evaluating, find_layers
from quant import ACTIVATION_GRID, WEIGHT_GRID

if TYPE_CHECKING:
    from database import Database

CONSTRAINTS = ("params", "bits", "flops", "bops", "timingsq")
FULL_BITS = 32
DENSE = "dense"


@dataclass(frozen=True)
class Costs:
    """Costs in one unit, of each layer when dense and at each level."""

    dense: dict[str, float]
    levels: dict[str, dict[str, float]]


def layer_flops(
    model: nn.Module,
    image_shape: tuple[int, ...],  # (3, s, s)
) -> dict[str, int]:
    """FLOPs of every convolution and linear layer for one image, two for a multiply-add."""
    flops: dict[str, int] = {}

    def hook(name: str):
        def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            flops[name] = flops.get(name, 0) + 2 * output.numel() * layer.weight[0].numel()

        return count

    handles = [m.register_forward_hook(hook(n)) for n, m in find_layers(model).items()]
    try:
        with evaluating(model):
            model(torch.zeros(1, *image_shape, device=next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return flops


def layer_costs(
    db: Database,
    model: nn.Module,
    image_shape: tuple[int, ...],  # (3, s, s)
    constr: str,  # one of CONSTRAINTS
    timings: str | Path | None = None,  # file of seconds, for timingsq
) -> Costs:
    """Costs of all layers of a database at all levels.

    Raises UserError if timings are asked for and missing or incomplete.
    """
    if constr == "timingsq":
        return timed_costs(db, timings)
    flops = layer_flops(model, image_shape) if constr in ("flops", "bops") else {}
    dense, levels = {}, {}
    for name in db.layers:
        tensors = {level: db.layer(name, level) for level in db.levels}
        size = tensors[db.levels[0]]["weight"].numel()
        work = flops.get(name, 0) if constr in ("flops", "bops") else size
        dense[name] = float(work * (FULL_BITS if constr in ("bits", "bops") else 1))
        levels[name] = {lv: work * unit_cost(of, db.kind, constr) for lv, of in tensors.items()}
    return Costs(dense, levels)


def unit_cost(tensors: Mapping[str, Tensor], kind: str, constr: str) -> float:
    """What a level makes of each of a layer's weights (params, bits) or FLOPs (flops, bops)."""
    weight_bits = grid_bits(tensors, WEIGHT_GRID)
    share = share_left(tensors["weight"], kind if weight_bits < FULL_BITS else "")
    if constr == "bits":
        return share * weight_bits
    if constr == "bops":
        return share * max(weight_bits, grid_bits(tensors, ACTIVATION_GRID))
    return share


def share_left(
    weight: Tensor,
    kind: str,  # of the database, if the weight is quantised; else ""
) -> float:
    """The share of weights that was not pruned; see the module docstring."""
    columns = weight.unsqueeze(-1).flatten(2).transpose(1, 2).flatten(1)  # channels innermost
    if kind in ("mixed", "4block_8w8a") and columns.shape[1] % 4:
        return 1.0
    if kind == "mixed":
        return 0.5 if bool(((columns == 0).view(-1, 4).sum(1) >= 2).all()) else 1.0
    if kind == "4block_8w8a":
        columns = columns.reshape(-1, 4).any(1)
    return int(torch.count_nonzero(columns)) / columns.numel()


def grid_bits(tensors: Mapping[str, Tensor], grid: str) -> int:
    """Bits of a layer's weights or activations: 32 without a grid."""
    maxq = tensors.get(f"{grid}.maxq")
    return FULL_BITS if maxq is None else int(maxq).bit_length()


def timed_costs(db: Database, path: str | Path | None) -> Costs:
    """Seconds per layer and level, as measured by the user."""
    if path is None or not Path(path).exists():
        raise UserError(f"--constr timingsq needs measured seconds in {path} (format: README)")
    seconds = read_scores(path, positive=True)
    for name in db.layers:
        missing = {DENSE, *db.levels} - seconds.get(name, {}).keys()
        if missing:
            raise UserError(f"{path}: no seconds of {name} at level {sorted(missing)[0]}")
    dense = {name: seconds[name][DENSE] for name in db.layers}
    return Costs(dense, {n: {lv: seconds[n][lv] for lv in db.levels} for n in db.layers})
