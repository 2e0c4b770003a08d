"""Semidefinite programs of cvxpy, solved by Clarabel (an interior-point method, arXiv 2405.12762).

What comes back may be inaccurate, or nothing at all. That is good enough for both relaxations of
the study: they take multipliers from it, and certify a bound of their own from those.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from obc.solver.errors import log
from pruning_vs_quantization.plots import study_package


def solve(
    problem: Any,  # cvxpy.Problem, its parameters set
    Z: Any,  # the matrix variable of it
) -> bool:
    """Solve in place; whether Z and the multipliers have values."""
    cp = study_package("cvxpy")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an inaccurate optimum is good enough
            problem.solve(solver=cp.CLARABEL)
    except cp.SolverError as error:
        log.warning("the semidefinite program was not solved: %s", error)
        return False
    return Z.value is not None and bool(np.isfinite(Z.value).all())
