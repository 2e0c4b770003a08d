"""What a search for the best solution of a subproblem leaves behind: a solution and a proof.

Both searches of the study (quantisation_search.py, pruning_search.py) walk a tree depth first. A
node stands for all solutions that agree with the decisions made so far and has a bound: none of
them has a smaller error. Nodes whose bound is not below the best error found are cut off. When no
node is left, the best solution is optimal; when time runs out before, the least bound of the nodes
not yet visited is still a proven lower bound on the optimum:

    lower  ≤  min over all feasible solutions of the error  ≤  error

Rounding. Nodes are cut off from (1 − TIE)·error on, so that ties do not make the tree explode, and
each search takes its own rounding errors off `lower` (it says how). A subproblem counts as proven
if `lower` is within PROVEN of `error`, 4·10⁻⁵ dB.

A compiled search works in slices of nodes: between two of them the clock is read.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from obc.solver.elimination_cpu import compiler

Reals = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

TIE = 1e-9  # relative; a solution better by less than this is not looked for
PROVEN = 1e-5  # relative; lower and error closer than this are called equal
SLICE = 1 << 18  # nodes between two looks at the clock

compiled = compiler(__file__)  # the machine code of a search contains TIE


@dataclass(frozen=True)
class Limits:
    """When to stop a search."""

    seconds: float = math.inf
    nodes: float = math.inf


@dataclass(frozen=True)
class Found:
    """The best solution that a search has found, and what it has proved of all others."""

    solution: Reals  # (n,) integer codes, or weights with zeros
    error: float  # of the solution
    lower: float  # proven: no feasible solution has a smaller error
    finished: bool  # no node is left
    nodes: int
    seconds: float

    @property
    def proven(self) -> bool:
        """Whether the solution is proven to be optimal."""
        return self.lower >= self.error * (1 - PROVEN)


def in_slices(
    advance: Callable[[int], tuple[bool, int]],  # up to so many nodes → finished, nodes visited
    limits: Limits,
) -> tuple[bool, int, float]:  # finished, nodes, seconds
    """Run a compiled search until it is finished or a limit is reached."""
    advance(0)  # the first call of all may have to compile it
    started, nodes, finished = time.thread_time(), 0, False
    while not finished and nodes < limits.nodes:
        if time.thread_time() - started > limits.seconds:
            break
        finished, visited = advance(int(min(SLICE, limits.nodes - nodes)))
        nodes += visited
    return finished, nodes, time.thread_time() - started
