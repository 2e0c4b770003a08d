"""What a layer costs at each level: parameters, bits, FLOPs, BOPs or measured seconds.

Targets are relative to the dense network at 32 bits, over the layers that can be compressed. With n
weights, s the share of them that is not zero, F the layer's dense FLOPs and b the wider of its
weights' and its activations' bits (32 where it is not quantised):

    params    n s             bits      n s · (bits of the weights)
    flops     F s             bops      F s · b      (dense 32; 8w8a 8; 4w4a 4; half of it with 2:4)
    timingsq  seconds, measured by the user, from a file (format below)

A layer that was left dense has s = 1 at every level and so costs what it costs. FLOPs count two for
a multiply-add: for a layer with O outputs an image, F = 2 · O · (weights of one output channel),
which is right for any stride, dilation and number of groups.

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

from cli import UserError
from modelutils import evaluating, find_layers
from profiles import read_scores
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
            outputs = output[0].numel()
            flops[name] = flops.get(name, 0) + 2 * outputs * layer.weight[0].numel()

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
        levels[name] = {level: work * unit_cost(tensors[level], constr) for level in db.levels}
    return Costs(dense, levels)


def unit_cost(tensors: Mapping[str, Tensor], constr: str) -> float:
    """What a level makes of each of a layer's weights (params, bits) or FLOPs (flops, bops)."""
    weight = tensors["weight"]
    density = int(torch.count_nonzero(weight)) / weight.numel()
    weight_bits = grid_bits(tensors, WEIGHT_GRID)
    if constr == "bits":
        return density * weight_bits
    if constr == "bops":
        return density * max(weight_bits, grid_bits(tensors, ACTIVATION_GRID))
    return density


def grid_bits(tensors: Mapping[str, Tensor], grid: str) -> int:
    """Bits of a layer's weights or activations: 32 without a grid."""
    maxq = tensors.get(f"{grid}.maxq")
    return FULL_BITS if maxq is None else int(maxq).bit_length()


def timed_costs(db: Database, path: str | Path | None) -> Costs:
    """Seconds per layer and level, as measured by the user."""
    if path is None or not Path(path).exists():
        raise UserError(f"--constr timingsq needs measured seconds in {path} (format: README)")
    seconds = read_scores(path)
    for name in db.layers:
        missing = {DENSE, *db.levels} - seconds.get(name, {}).keys()
        if missing:
            raise UserError(f"{path}: no seconds of {name} at level {sorted(missing)[0]}")
    dense = {name: seconds[name][DENSE] for name in db.layers}
    return Costs(dense, {n: {lv: seconds[n][lv] for lv in db.levels} for n in db.layers})
