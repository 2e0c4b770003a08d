"""The plan of a run: its lines, and what it leaves dense."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from torch import nn

from obc.solver.distributed import ALONE, World
from obc.toolkit.calibrate import calls_of_layers
from obc.toolkit.modes import BlockedMode, Mode, NMPruneMode, QuantMode, StructMode, UnstrMode
from obc.toolkit.planning import make_plan, needs_of, operations, plan_lines, why_dense
from obc.toolkit.resolving import ResolveMode


class Net(nn.Module):
    """9, 72 and 32 columns; one layer is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 8, 3, padding=1)
        self.two = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.three = nn.Linear(32, 10)
        self.never = nn.Linear(4, 4)

    def forward(self, x):
        return self.three(self.two(self.one(x)).flatten(1))


LAYERS = dict(Net().named_children())


def test_calls_are_counted_for_one_image():
    assert calls_of_layers(Net(), (3, 4, 4)) == Counter(one=1, two=1, three=1)
    twice = nn.Sequential(conv := nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), conv)
    assert calls_of_layers(twice, (3, 4, 4)) == Counter({"0": 2})


@pytest.mark.parametrize(
    ("mode", "dense"),
    [
        (QuantMode(wbits=4), {"never"}),
        (StructMode(), {"never"}),
        (UnstrMode(), {"never"}),
        (NMPruneMode(), {"never", "one"}),
        (BlockedMode(blocked_size=8), {"never", "one"}),
        (NMPruneMode(prunem=1 << 20), set(LAYERS)),
    ],
)
def test_layers_that_are_left_dense(mode: Mode, dense: set[str]) -> None:
    calls = calls_of_layers(Net(), (3, 4, 4))
    assert {x for x, layer in LAYERS.items() if why_dense(layer, mode, calls[x])} == dense
    plan = make_plan(LAYERS, mode, 1.0, ALONE)
    lines = plan_lines(plan, LAYERS, mode, calls, ALONE)
    assert {line.split()[1] for line in lines if "left dense" in line} == dense
    expensive = [line for line in lines if "the most expensive layer is two, 8 rows" in line]
    assert len(expensive) == ("two" not in dense)


def test_the_plan_of_several_processes_says_who_does_what():
    layers = {"large": nn.Linear(256, 64), "small": nn.Linear(8, 4), "tiny": nn.Linear(4, 4)}
    world = World(size=2)
    plan = make_plan(layers, UnstrMode(), 1.0, ALONE)
    plan = replace(plan, owners={"large": None, "small": 0, "tiny": 1})
    lines = plan_lines(plan, layers, UnstrMode(), Counter(layers), world)
    assert lines[2] == (
        "plan: 2 processes divide the rows of 1 layers; 2 layers go to one process each"
    )


def test_swaps_after_a_new_mask_are_in_the_plan():
    layer, pruning = nn.Linear(1152, 64), NMPruneMode(sequential=True)
    again = ResolveMode(sequential=True, pruning=pruning, remask=True)
    assert needs_of(layer, again) == needs_of(layer, pruning)
    assert (
        needs_of(layer, replace(again, remask=False)).inverting < needs_of(layer, again).inverting
    )


def test_rows_that_share_their_columns_are_not_divided(monkeypatch):
    divisible = []

    def deal(costs, size, divisible: bool, seen=divisible):
        seen.append(divisible)
        return dict.fromkeys(costs, 0)

    monkeypatch.setattr("obc.toolkit.planning.deal", deal)
    for mode in (UnstrMode(), StructMode()):
        make_plan(LAYERS, mode, 1.0, ALONE)
    assert divisible == [True, False]


def test_operations_are_about_d_cubed_for_every_row():
    assert operations(nn.Linear(2000, 10)) == 10 * 2000**2 * 2500
    small, large = nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 16, 3, groups=2)
    assert 2 * operations(small) == operations(large) == 16 * 36**2 * 536
