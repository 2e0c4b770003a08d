"""What is measured for --plan is a problem like any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from obc.solver.distributed import ALONE, World
from obc.solver.inverse import damped_inverse
from obc.toolkit.machine import Images, Machine, image_seconds, measure, problem, writing_seconds
from obc.toolkit.planning import Work, compressible, estimate, make_plan, singular_layers
from obc.toolkit.task import Task

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


def test_what_rows_share_is_counted_once_for_each_group():
    machine = Machine(Images(), 0, {72: 1.0}, {72: 0.5}, shared={72: 10.0})
    layers = {"grouped": nn.Conv2d(32, 64, 3, groups=4)}
    plan = make_plan(layers, Task(levels=3, size=9, shared=True), 1.0, ALONE)
    found = estimate(plan, layers, set(), machine, ALONE, Work(1.0, 8, 4, 10, 3))
    assert found.layers_s == pytest.approx(4 * (1 + 10) + 64 * 0.5)


@pytest.mark.parametrize(("size", "wanted_s"), [(1, 3.0), (2, 1.5), (4, 1.5)])
def test_no_more_batches_go_at_a_time_than_a_process_has(size: int, wanted_s: float) -> None:
    """Four batches of two images: 1 s each, and 0.25 s an image; two at a time, if there are."""
    machine = Machine(Images(batch_s=1, image_s=0.25), 0, {9: 1.0}, {9: 1.0}, batches_at_a_time=2)
    layers, world = {"one": nn.Conv2d(1, 8, 3)}, World(size=size)
    plan = make_plan(layers, Task(), 1.0, ALONE)
    found = estimate(plan, {}, set(), machine, world, Work(0.0, 8, 2, 0, 0))
    assert found.calibration_s == wanted_s


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


def test_layers_that_stay_dense_are_not_counted():
    net = Net()
    net.never = nn.Linear(4, 4)
    layers = dict(net.named_children())
    images = image_seconds(net, torch.randn(3, 1, 4, 4))
    called = {"one", "two", "three"}
    for task in (Task(), Task(quantise=True), Task(levels=3, size=8, shared=True)):
        assert compressible(layers, images, task).keys() == called
    for task in (Task(nm=(2, 4), innermost=True), Task(levels=3, size=4, innermost=True)):
        assert compressible(layers, images, task).keys() == {"two", "three"}
    task = Task(nm=(2, 1 << 20), innermost=True)
    assert not compressible(layers, images, task)
    assert not measure(net, images, 1e-3, task, 0, False, None).row  # nor is one that large made


def test_a_layer_that_is_called_twice_sees_twice_as_many_patches():
    net = nn.Sequential(conv := nn.Conv2d(2, 2, 3, padding=1), nn.ReLU(), conv)
    assert image_seconds(net, torch.randn(3, 2, 4, 4)).positions == {"0": 32}


@pytest.mark.parametrize(
    "task",
    [
        Task(),
        Task(nm=(2, 4), innermost=True),
        Task(levels=3),
        Task(quantise=True),
        Task(levels=3, size=4, innermost=True),
        Task(levels=3, size=9, shared=True),
    ],
)
def test_every_mode_is_measured_and_adds_up(task: Task, tmp_path: Path) -> None:
    net = Net()
    layers = dict(net.named_children())
    images = image_seconds(net, torch.randn(3, 1, 4, 4))
    machine = measure(net, images, 1e-3, task, 72, True, tmp_path / "missing")
    assert machine.row.keys() == {288} and machine.writing_s > 0
    assert bool(machine.refining) == (not task.quantise)
    assert bool(machine.shared) == task.shared
    plan, work = make_plan(layers, task, 1.0, ALONE), Work(1.0, 8, 4, 10, 3)
    found = estimate(plan, layers, {"two"}, machine, ALONE, work)
    assert found.writing_s == 2 * 3 * machine.writing_s
    assert found.calibration_s >= 8e-3 and found.test_s >= 10e-3 and found.layers_s > 0
    sane = estimate(plan, layers, set(), machine, ALONE, work)
    assert found.layers_s > sane.layers_s
    assert not list(tmp_path.iterdir())
    assert writing_seconds(net, tmp_path) > 0 and not list(tmp_path.iterdir())
