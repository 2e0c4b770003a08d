"""What a layer costs at each level: parameters, bits, FLOPs, BOPs or measured seconds.

Targets are relative to the dense network at 32 bits, over the layers that can be compressed. With n
weights, s the share of them that is not pruned, F the layer's dense FLOPs and b the bits of its
weights or of its activations, whichever are more (32 if it is not quantised):

    params    n s             bits      n s · (bits of the weights)
    flops     F s             bops      F s · b      (dense 32; 8w8a 8; 4w4a 4; half of it with 2:4)
    timingsq  seconds, measured by the user, from a file (format below)

In databases of cut channels s is the share of the layer that is left when channels are cut out, of
this layer and of those next to it (`cut_costs.py`).

A layer that was left dense has s = 1 at every level. Zeros that come from rounding do not count. In
a `mixed` database s is 1/2 for a quantised layer that is 2:4 sparse along its input
channels, else 1; in `4block_8w8a` it is the share of blocks of 4 that are not all zero. FLOPs count
two for a multiply-add: for a layer with O outputs an image, F = 2 · O · (weights of one output
channel), for any stride, dilation and number of groups (`LayerView.flops`).

Timings are a text file in the format of the scores: a layer's name on a line, then a line
`<seconds> <level>` for each level of the database, and one with the level `dense`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from modelutils import Example, evaluating, example, find_layers
from obc.inputs.tasks import call
from obc.solver.errors import UserError
from obc.solver.layers import forward_hooks, view
from obc.solver.search import Costs
from obc.toolkit.cut_costs import CutShares, cost_tables, seconds_table, uniform
from obc.toolkit.kinds import FULL_BITS, KINDS, grid_bits
from obc.toolkit.leveldb import Database
from obc.toolkit.profiles import read_scores
from quant import ACTIVATION_GRID, WEIGHT_GRID

CONSTRAINTS = ("params", "bits", "flops", "bops", "timingsq")
DENSE = "dense"


def layer_flops(model: nn.Module, image_shape: Example) -> dict[str, int]:
    """FLOPs of every convolution and linear layer for one image, two for a multiply-add."""
    flops: dict[str, int] = {}

    def count(name: str, layer: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        flops[name] = flops.get(name, 0) + view(layer).flops(output)

    with evaluating(model), forward_hooks(find_layers(model), count):
        call(model, inputs := example(model, image_shape))
    return {name: count // len(inputs) for name, count in flops.items()}


def layer_costs(
    db: Database,
    model: nn.Module,
    image_shape: Example,
    constr: str,  # one of CONSTRAINTS
    timings: str | Path | None = None,  # file of measured seconds, for timingsq
) -> Costs:
    """Costs of all layers of a database at all levels.

    Raises UserError if timings are needed, but missing or incomplete.
    """
    shares = CutShares(db, model, image_shape) if KINDS[db.kind].cuts else None
    if constr == "timingsq":
        return timed_costs(db, timings, shares)
    work, dense = work_and_costs(db, model, image_shape, constr)
    if shares is not None:
        widths = {
            name: [bits_counted(db.layer(name, level), constr) for level in db.levels]
            for name in db.layers
        }
        return joint_costs(db, dense, cost_tables(shares, work, widths))
    levels = {
        name: {level: work[name] * db.unit_cost(name, level, constr) for level in db.levels}
        for name in db.layers
    }
    return Costs(dense, levels)


def joint_costs(
    db: Database, dense: dict[str, float], tables: dict[str, tuple[tuple[str, ...], np.ndarray]]
) -> Costs:
    """Costs of which those of one level are taken from tables."""
    levels = {
        name: dict(zip(db.levels, uniform(table).tolist(), strict=True))
        for name, (_, table) in tables.items()
    }
    return Costs(dense, levels, tables)


def bits_counted(tensors: Mapping[str, Tensor], constr: str) -> int:
    """The bits that a constraint multiplies weights or FLOPs by."""
    weight_bits = grid_bits(tensors, WEIGHT_GRID)
    if constr == "bits":
        return weight_bits
    return max(weight_bits, grid_bits(tensors, ACTIVATION_GRID)) if constr == "bops" else 1


def work_and_costs(
    db: Database, model: nn.Module, image_shape: Example, constr: str
) -> tuple[dict[str, int], dict[str, float]]:
    """Weights or FLOPs of each layer, and what it costs when dense; constr is not timingsq."""
    work = {name: db.states[db.levels[0]][f"{name}.weight"].numel() for name in db.layers}
    if constr in ("flops", "bops"):
        flops = layer_flops(model, image_shape)
        work = {name: flops.get(name, 0) for name in db.layers}
    bits = FULL_BITS if constr in ("bits", "bops") else 1
    return work, {name: float(work[name] * bits) for name in db.layers}


def profile_cost(
    db: Database,
    profile: Mapping[str, str],  # layer → level; the other layers are dense
    model: nn.Module,
    image_shape: Example,
    constr: str,  # one of CONSTRAINTS, but not timingsq
) -> tuple[float, float]:  # of the dense layers, of the profile's
    """What a profile costs, as `layer_costs` counts; reads no other levels."""
    work, dense = work_and_costs(db, model, image_shape, constr)
    if KINDS[db.kind].cuts:
        shares = CutShares(db, model, image_shape)
        widths = dict.fromkeys(db.layers, FULL_BITS if constr in ("bits", "bops") else 1) | {
            layer: bits_counted(db.layer(layer, level), constr) for layer, level in profile.items()
        }
        left = (work[x] * widths[x] * shares.left(x, profile) for x in db.layers)
        return math.fsum(dense.values()), math.fsum(left)
    costs = dense | {
        layer: work[layer] * db.unit_cost(layer, level, constr) for layer, level in profile.items()
    }
    return math.fsum(dense.values()), math.fsum(costs.values())


def timed_costs(db: Database, path: str | Path | None, shares: CutShares | None = None) -> Costs:
    """Seconds per layer and level, as measured by the user; by shares where channels are cut."""
    if path is None or not Path(path).exists():
        raise UserError(f"--constr timingsq needs measured seconds in {path} (format: README)")
    seconds = read_scores(path, positive=True)
    for name in db.layers:
        missing = {DENSE, *db.levels} - seconds.get(name, {}).keys()
        if missing:
            raise UserError(f"{path}: no seconds of {name} at level {sorted(missing)[0]}")
    dense = {name: seconds[name][DENSE] for name in db.layers}
    if shares is not None:
        tables = {}
        for name in db.layers:
            measured = [seconds[name][level] for level in db.levels]
            tables[name] = shares.scope(name), seconds_table(shares.table(name), measured)
        return joint_costs(db, dense, tables)
    return Costs(dense, {n: {lv: seconds[n][lv] for lv in db.levels} for n in db.layers})
