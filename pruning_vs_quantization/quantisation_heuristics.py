"""Quantisers without a proof: what the bounds and the optimum are compared with.

* `babai` rounds one weight after the other, each at the value that is best given those before it
  and the later ones free: Babai's nearest plane, clipped to the box. Columns from left to right are
  GPTQ's order (arXiv 2210.17323), columns of falling G_pp its "act-order".
* `obq` is the toolkit's own answer: the greedy elimination of `elimination.py` with the rule
  `Quantise` (OBC, arXiv 2208.11580, section 5) in float32, damped only where the toolkit would.
* `descend` improves any codes by single steps, z_i ± 1 inside the box, always the one that gains
  most, until none gains (Park and Boyd's 1-opt, arXiv 1504.07672, section 4).

With g = 2G(z − t), a step of d = ±1 at i changes f by G_ii + d·g_i, and g by 2d·G[:, i].
"""

from __future__ import annotations

import numpy as np
import torch

from obc.solver.elimination import Quantise, eliminate
from obc.solver.inverse import alive_inputs, damped_inverse
from pruning_vs_quantization.proof import Reals, compiled
from pruning_vs_quantization.quantisation_problem import QuantisationProblem

GAIN = 1e-12  # × the largest G_ii: a step that gains less is rounding


def babai(
    problem: QuantisationProblem,
    falling: bool = False,  # columns of falling G_pp, else from left to right
) -> Reals:  # (n,)
    """Codes by Babai's nearest plane, clipped to the box."""
    diagonal = np.diagonal(problem.G)
    order = np.argsort(-diagonal, kind="stable") if falling else np.arange(len(problem.t))
    G = torch.from_numpy(problem.G[np.ix_(order, order)])
    A = damped_inverse(G[None], dtype=torch.float64).matrix[0]
    # U upper with A = UᵀU: its row p holds what is left of column p once those before it are fixed
    U = torch.linalg.cholesky(A, upper=True).numpy()
    t, codes = problem.t[order], np.empty(len(order))
    for p in range(len(order)):
        codes[p] = min(max(np.rint(t[p]), problem.low), problem.high)
        t[p:] -= U[p, p:] * ((t[p] - codes[p]) / U[p, p])
    z = np.empty(len(order))
    z[order] = codes
    return z


def obq(problem: QuantisationProblem) -> Reals:  # (n,)
    """Codes by the toolkit's OBQ."""
    H = torch.from_numpy(problem.G)[None]
    t = torch.from_numpy(problem.t).float()[None] * alive_inputs(H)
    low, high = (torch.full((1, 1), float(code)) for code in (problem.low, problem.high))
    rule = Quantise(torch.ones(1, 1), low, high)
    system = torch.zeros(1, dtype=torch.int64)
    trace = eliminate(t[:, None], damped_inverse(H), system, rule, t.shape[1])
    return np.clip(np.rint(trace.weights[0, 0].double().numpy()), problem.low, problem.high)


def descend(
    problem: QuantisationProblem,
    starts: Reals,  # (m, n) codes inside the box
) -> Reals:  # (n,)
    """The best codes that single steps lead to from any of the starts."""
    ends = descents(problem.G, problem.t, starts, float(problem.low), float(problem.high))
    return min(ends, key=problem.error)


@compiled
def descents(
    G: Reals,  # (n, n)
    t: Reals,  # (n,)
    starts: Reals,  # (m, n)
    low: float,
    high: float,
) -> Reals:  # (m, n)
    """Where steepest descent by single steps ends, from each start."""
    ends = starts.copy()
    n, gradient, least = len(t), np.empty(len(t)), 0.0
    for i in range(n):
        least = max(least, GAIN * G[i, i])
    for row in range(len(ends)):
        for i in range(n):
            gradient[i] = 0.0
            for j in range(n):
                gradient[i] += 2 * G[i, j] * (ends[row, j] - t[j])
        while True:
            best, where, step = -least, -1, 0.0
            for i in range(n):
                d = -1.0 if gradient[i] > 0 else 1.0
                change = G[i, i] - abs(gradient[i])
                if change < best and low <= ends[row, i] + d <= high:
                    best, where, step = change, i, d
            if where < 0:
                break
            ends[row, where] += step
            for i in range(n):
                gradient[i] += 2 * step * G[i, where]
    return ends
