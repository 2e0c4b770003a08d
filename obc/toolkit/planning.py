"""The plan of a run: how many passes over the images, which process does which layer, memory.

Everything follows from shapes: the memory of a layer from `memory.py`, its work from

    operations = rows · d² · (d + 500)        an elimination of every row, d³, and its panels

The layers of a pass share the memory for their Hessians. Of several processes, all divide the rows
of the layers that take most of the work; the other layers go to one process each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from obc.solver.distributed import ALONE, World, deal
from obc.solver.layers import view
from obc.solver.memory import Needs, default_memory, in_passes, layer_needs, most_at_a_time
from obc.toolkit.modes import Mode

NOTHING = Needs(sums=0, layer=0, inverting=0, row=1)  # for a layer that is left dense
LONG_RUN = 3e11  # floating-point operations from which on a run shows its plan unasked


@dataclass(frozen=True)
class Plan:
    """Passes over the images, and who compresses what."""

    memory: int  # bytes, of each process
    needs: dict[str, Needs]
    passes: list[list[str]]
    owners: dict[str, int | None]  # rank; None: all, a share of the rows each

    def sharing(self, name: str, world: World) -> World:
        """The processes that divide a layer's rows."""
        return world if self.owners[name] is None else ALONE


def make_plan(
    layers: Mapping[str, nn.Module],
    mode: Mode,
    memory_gb: float | None,  # None: half of what is free
    world: World,
    modes: Mapping[str, Mode] | None = None,  # of layers that have their own
) -> Plan:
    """Divide the work. Raises UserError where the memory is too small for some layer."""
    modes = dict.fromkeys(layers, mode) | (modes or {})
    device = next(iter(layers.values())).weight.device
    memory = min(world.gather(int(memory_gb * 1e9) if memory_gb else default_memory(device)))
    needs = {
        name: NOTHING if view(layer).left_dense else needs_of(layer, modes[name])
        for name, layer in layers.items()
    }
    passes, owners = in_passes(needs, memory), {}
    for names in passes:
        costs = {name: operations(layers[name]) for name in names}
        owners |= deal(costs, world.size, divisible=mode.rows_divisible)
    if mode.sequential:  # one layer at a time
        owners = {name: None if modes[name].rows_divisible else 0 for name in layers}
    return Plan(memory, needs, passes, owners)


def needs_of(layer: nn.Module, mode: Mode) -> Needs:
    """The memory that a layer takes in a mode."""
    return layer_needs(
        layer,
        levels=len(mode.sparsities),
        innermost=mode.channels_innermost,
        swaps=mode.swaps_weights,
    )


def operations(layer: nn.Module) -> float:
    """Multiply-adds of compressing a layer, roughly."""
    rows, d = view(layer).rows, view(layer).columns
    return rows * d * d * (d + 500)


def is_long(layers: Mapping[str, nn.Module], images: int) -> bool:
    """Whether a run over so many calibration images is worth a plan."""
    return sum(map(operations, layers.values())) + 1e8 * images >= LONG_RUN


def why_dense(layer: nn.Module, mode: Mode, calls: int) -> str:
    """Why a layer is left dense; empty if it is not."""
    if reason := view(layer).left_dense:
        return reason
    if not calls:
        return "the model never calls it (attention may use its weights without a call)"
    return mode.misfit(view(layer))


def plan_lines(
    plan: Plan,
    layers: Mapping[str, nn.Module],
    mode: Mode,
    calls: Counter[str],  # of each layer, for one image
    world: World,
) -> list[str]:
    """The plan in words."""
    dense = {name: why_dense(layer, mode, calls[name]) for name, layer in layers.items()}
    work = {name: operations(layer) for name, layer in layers.items() if not dense[name]}
    least = max(most_at_a_time(plan.needs[name] for name in names) for names in plan.passes)
    count = len(plan.passes)
    passes = f"in {count} pass{'es' * (count > 1)} over the images"
    if mode.sequential:
        passes = "one after the other, in order of execution"
    text = [
        f"{len(layers)} layers {passes}; "
        f"memory: up to {plan.memory / 1e9:.3g} GB are used, {least / 1e9:.3g} needed"
    ]
    if work:
        expensive = max(work, key=work.get)
        rows, d = view(layers[expensive]).rows, view(layers[expensive]).columns
        text.append(
            f"the most expensive layer is {expensive}, {rows} rows of {d} columns, "
            f"{min(rows, plan.needs[expensive].rows(plan.memory))} rows at a time; "
            f"{100 * work[expensive] / sum(work.values()):.2g} % of all operations"
        )
    if world.size > 1:
        divided = sum(owner is None for owner in plan.owners.values())
        text.append(
            f"{world.size} processes divide the rows of {divided} layers; "
            f"{len(layers) - divided} layers go to one process each"
        )
    own: dict[str, list[str]] = {}  # what options for layers by name do
    for name in work:
        if (for_layer := mode.for_layer(name)) != mode:
            own.setdefault(for_layer.aim, []).append(name)
    text += [f"{aim}: {', '.join(names)}" for aim, names in own.items()]
    text += [f"{name} is left dense: {reason}" for name, reason in dense.items() if reason]
    return [f"plan: {line}" for line in text]
