"""What a layer costs at each level: parameters, bits, FLOPs, BOPs or measured seconds.

Targets are relative to the dense network at 32 bits, over the layers that can be compressed. With n
weights, s the share of them that is not pruned, F the layer's dense FLOPs and b the bits of its
weights or of its activations, whichever are more (32 if it is not quantised):

    params    n s             bits      n s · (bits of the weights)
    flops     F s             bops      F s · b      (dense 32; 8w8a 8; 4w4a 4; half of it with 2:4)
    timingsq  seconds, measured by the user, from a file (format below)

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

from torch import Tensor, nn

from modelutils import Example, evaluating, example, find_layers
from obc.inputs.tasks import call
from obc.solver.errors import UserError
from obc.solver.layers import forward_hooks, view
from obc.solver.search import Costs
from obc.toolkit.leveldb import FULL_BITS, Database
from obc.toolkit.profiles import read_scores

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
    if constr == "timingsq":
        return timed_costs(db, timings)
    work, dense = work_and_costs(db, model, image_shape, constr)
    levels = {
        name: {level: work[name] * db.unit_cost(name, level, constr) for level in db.levels}
        for name in db.layers
    }
    return Costs(dense, levels)


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
    costs = dense | {
        layer: work[layer] * db.unit_cost(layer, level, constr) for layer, level in profile.items()
    }
    return math.fsum(dense.values()), math.fsum(costs.values())


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
