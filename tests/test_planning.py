"""What is measured for --plan is a problem like any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from engine.distributed import ALONE
from engine.hessian import damped_inverse
from engine.machine import Images, Machine, image_seconds, measure, problem, writing_seconds
from engine.planning import Work, estimate, make_plan, singular_layers
from engine.task import Task

CPU = torch.device("cpu")


@pytest.mark.parametrize("d", [1, 2, 50])
def test_the_inverse_that_is_not_computed(d):
    H, inverse = problem(d, CPU)
    wanted = damped_inverse(H)
    torch.testing.assert_close(inverse.matrix, wanted.matrix, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(inverse.floor, wanted.floor)


def test_rows_between_and_beyond_the_sizes_measured():
    row = {size: 3e-12 * size**3 + 5e-9 * size**2 for size in (288, 576, 1152)}
    machine = Machine(Images(), 0, {576: 1.0}, row)
    for d in (288, 400, 1152, 4608):
        assert machine.row_s(d) == pytest.approx(3e-12 * d**3 + 5e-9 * d**2)
    assert machine.inverting_s(1152) == 8


def test_a_singular_hessian_costs_several_inverses_and_the_refinement():
    machine = Machine(Images(), 0, {576: 1.0}, {576: 0.5}, {576: 0.25})
    assert machine.inverting_s(576, singular=True) == 4
    assert machine.row_s(576) == 0.5 and machine.row_s(576, singular=True) == 0.75


class Net(nn.Module):
    """9 columns and 16 positions, 72 and 4, 32 and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(1, 8, 3, padding=1)
        self.two = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.three = nn.Linear(32, 10)

    def forward(self, x):
        return self.three(self.two(self.one(x)).flatten(1))


def test_layers_that_see_too_few_patches_are_singular():
    net = Net()
    layers = dict(net.named_children())
    images = image_seconds(net, torch.randn(3, 1, 4, 4))
    assert images.positions == {"one": 16, "two": 4, "three": 1}
    for shown, wanted in ((100, set()), (18, {"three"}), (17, {"two", "three"}), (0, set(layers))):
        assert singular_layers(layers, images, shown, damped=False) == wanted
        assert not singular_layers(layers, images, shown, damped=True)


@pytest.mark.parametrize("task", [
    Task(), Task(nm=(2, 4), innermost=True), Task(levels=3), Task(quantise=True),
    Task(levels=3, size=4, innermost=True), Task(levels=3, size=9, shared=True),
])  # fmt: skip
def test_every_mode_is_measured_and_adds_up(task: Task, tmp_path: Path) -> None:
    net = Net()
    layers = dict(net.named_children())
    images = image_seconds(net, torch.randn(3, 1, 4, 4))
    machine = measure(net, images, 1e-3, task, 72, True, tmp_path / "missing")
    assert machine.row.keys() == {288} and machine.writing_s > 0
    assert bool(machine.refining) == (not task.quantise)
    plan, work = make_plan(layers, task, 1.0, ALONE), Work(8, 4, 10, 3)
    found = estimate(plan, layers, {"two"}, machine, ALONE, work)
    assert found.writing_s == 2 * 3 * machine.writing_s
    assert found.calibration_s >= 8e-3 and found.test_s >= 10e-3 and found.layers_s > 0
    sane = estimate(plan, layers, set(), machine, ALONE, work)
    assert found.layers_s > sane.layers_s
    assert not list(tmp_path.iterdir())
    assert writing_seconds(net, tmp_path) > 0 and not list(tmp_path.iterdir())
