"""What is measured for --plan is a problem like any other."""

from __future__ import annotations

import pytest
import torch

from engine.hessian import damped_inverse
from engine.planning import Machine, problem

CPU = torch.device("cpu")


@pytest.mark.parametrize("d", [1, 2, 50])
def test_the_inverse_that_is_not_computed(d):
    H, inverse = problem(d, CPU)
    wanted = damped_inverse(H)
    torch.testing.assert_close(inverse.matrix, wanted.matrix, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(inverse.floor, wanted.floor)


def test_rows_between_and_beyond_the_sizes_measured():
    row = {size: 3e-12 * size**3 + 5e-9 * size**2 for size in (288, 576, 1152)}
    machine = Machine(0, 0, 0, 0, {576: 1.0}, row)
    for d in (288, 400, 1152, 4608):
        assert machine.row_s(d) == pytest.approx(3e-12 * d**3 + 5e-9 * d**2)
    assert machine.inverting_s(1152) == 8
