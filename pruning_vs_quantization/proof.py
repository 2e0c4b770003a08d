"""What a search over the solutions of a subproblem returns: its best solution and a proof.

Both searches of the study (`quantisation_search.py`, `pruning_bounds.py`) walk a tree depth first.
A node stands for all solutions that agree with the decisions made so far, and has a bound: none of
them has a smaller error. Nodes whose bound is not below the best known error are cut off. Once no
node is left, the best solution is optimal; if time runs out first, the least bound of the nodes not
yet visited is still a proven lower bound on the optimum:

    lower  ≤  min over all feasible solutions of the error  ≤  error

Rounding. Nodes are cut off from (1 − TIE)·error on, so that ties do not make the tree explode, and
each search subtracts its own rounding errors from `lower` (as described there). A subproblem counts
as proven if `lower` is within PROVEN of `error`, which is 4·10⁻⁵ dB.

The relaxations need less: multipliers from a semidefinite program that may be solved inaccurately,
or not at all, since each certifies a bound of its own from whatever multipliers it gets. The solver
is Clarabel, an interior-point method (arXiv 2405.12762), through cvxpy.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from obc.solver.elimination_cpu import compiler
from obc.solver.errors import log
from pruning_vs_quantization.plots import study_package

Reals = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

EPS = float(np.finfo(np.float64).eps)
TIE = 1e-9  # relative; solutions that are better by less than this are not searched for
PROVEN = 1e-5  # relative; lower and error count as equal if they are closer than this
SLICE = 1 << 18  # nodes between two looks at the clock

compiled = compiler(__file__)  # the machine code of a search contains TIE


@dataclass(frozen=True)
class SearchLimits:
    """When to stop a search."""

    seconds: float = math.inf
    nodes: float = math.inf


@dataclass(frozen=True)
class ProvenSolution:
    """The best solution that a search met, and what it has proved about all others."""

    solution: Reals  # (n,) integer codes, or weights with zeros
    error: float  # of the solution
    lower: float  # proven: no feasible solution has a smaller error
    finished: bool = True  # no node is left
    nodes: int = 0
    seconds: float = 0.0

    @property
    def proven(self) -> bool:
        """Whether the solution is proven to be optimal."""
        return self.lower >= self.error * (1 - PROVEN)


def run_in_slices(
    advance: Callable[[int], tuple[bool, int]],  # up to so many nodes → finished, nodes visited
    limits: SearchLimits,
) -> tuple[bool, int, float]:  # finished, nodes, seconds
    """Run a compiled search until it is finished or a limit is reached."""
    advance(0)  # the very first call may have to compile it
    started, nodes, finished = time.thread_time(), 0, False
    while not finished and nodes < limits.nodes:
        if time.thread_time() - started > limits.seconds:
            break
        finished, visited = advance(int(min(SLICE, limits.nodes - nodes)))
        nodes += visited
    return finished, nodes, time.thread_time() - started


def solve_semidefinite(
    program: Any,  # cvxpy.Problem with its parameters set
    Z: Any,  # its matrix variable
) -> bool:
    """Solve in place; whether Z and the multipliers have values."""
    cp = study_package("cvxpy")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an inaccurate optimum is good enough
            program.solve(solver=cp.CLARABEL)
    except cp.SolverError as error:
        log.warning("the semidefinite program was not solved: %s", error)
        return False
    return Z.value is not None and bool(np.isfinite(Z.value).all())
