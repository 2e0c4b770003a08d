"""The continuous optimum of a convex quadratic in a box, by an active set.

    minimise  (x − t) G (x − t)ᵀ      over real low ≤ x ≤ high

Some coordinates are held at a side of the box, the others (`free`) solve their linear system.
Towards that solution the step ends where a coordinate meets a side, and is held there from then on;
where the step is whole, the held coordinate whose gradient points most into the box is let go. Each
whole step ends in the optimum of its active set, and the error falls from one to the next, so that
no active set comes back and the method ends (Nocedal and Wright, Numerical Optimization, 16.5).
What comes out may be off by rounding: those who need a proof check the gradient themselves.
"""

from __future__ import annotations

import numpy as np

from pruning_vs_quantization.proof import Flags, Reals
from pruning_vs_quantization.quantisation_problem import QuantisationProblem

STEPS = 50  # × the number of unknowns; only rounding could make it take more


def box_minimum(problem: QuantisationProblem) -> Reals:  # (n,)
    """The minimiser of f over the box, integer or not."""
    G, t = problem.G, problem.t
    low, high = float(problem.low), float(problem.high)
    ridge = 1e-13 * np.trace(G) / len(t)  # only steers the way; G may be singular
    x = np.clip(t, low, high)
    free = (t >= low) & (t <= high)
    scale = np.abs(G).sum(1) * (high - low)
    for _ in range(STEPS * len(t)):
        target = _free_optimum(G, t, x, free, ridge)
        x, met = _towards(x, target, low, high, free)
        if met >= 0:
            free[met] = False
            continue
        gradient = G @ (x - t)
        inward = np.where(x <= low, -gradient, gradient)
        inward[free] = -np.inf
        best = int(np.argmax(inward))
        if inward[best] <= 1e-13 * scale[best]:
            break
        free[best] = True
    return x


def _free_optimum(G: Reals, t: Reals, x: Reals, free: Flags, ridge: float) -> Reals:  # (n,)
    """x with its free coordinates at their best, the others as they are."""
    target, held = x.copy(), ~free
    pull = G[np.ix_(free, held)] @ (x[held] - t[held])
    system = G[np.ix_(free, free)] + ridge * np.eye(int(free.sum()))
    target[free] = t[free] - np.linalg.solve(system, pull)
    return target


def _towards(
    x: Reals,  # (n,)
    target: Reals,  # (n,)
    low: float,
    high: float,
    free: Flags,
) -> tuple[Reals, int]:
    """The furthest point from x to target in the box; the coordinate that stops it or −1."""
    move = target - x
    room = np.where(move > 0, high - x, low - x)
    share = np.full(len(x), np.inf)
    moving = free & (move != 0)
    share[moving] = room[moving] / move[moving]
    met = int(np.argmin(share)) if len(x) else -1
    if share[met] >= 1:
        return target, -1
    x = x + share[met] * move
    x[met] = high if move[met] > 0 else low
    return np.clip(x, low, high), met
