"""A certified lower bound on pruning: the perspective relaxation, and subsets read off it.

Which weights to keep is relaxed to shares 0 ≤ s_i ≤ 1, Σ s_i ≤ k; that ŵ_i = 0 where s_i = 0
becomes ŵ_i² ≤ V_ii s_i (Dong, Chen and Linderoth, arXiv 1510.06083). With V for ŵ ŵᵀ:

    minimise    tr(G V) − 2 wᵀGŵ + wᵀGw
    subject to  [V ŵ; ŵᵀ 1] ⪰ 0 (dual Y),     ŵ_i² ≤ V_ii s_i,     0 ≤ s ≤ 1,     Σ s ≤ k

Certificate. Let D = diag(d) ≥ 0 with M = G − D ⪰ 0, u any vector, p = Mu, e = w − ŵ. As
eᵀMe ≥ 2uᵀMe − uᵀMu for every e,

    eᵀGe  ≥  −uᵀMu + Σ_i (2 p_i e_i + d_i e_i²)

A pruned weight has e_i = w_i; a kept one adds at least min over e_i = −p_i²/d_i. A pruned one so
adds (d_i w_i + p_i)²/d_i more than a kept one, n − k or more are pruned, and therefore

    error  ≥  −uᵀMu − Σ p_i²/d_i + Σ over the n − k smallest of (d_i w_i + p_i)²/d_i

for all ŵ with k nonzeros, whatever the solver did. Its optimum gives d_i = (G − Y)_ii and
u = w − ŵ. `certified_bound` shrinks d until M ⪰ 0 is certain: LAPACK's least eigenvalue of M at
least 4nε‖G‖; all is done in the scale in which G has a unit diagonal. Where G is singular there is
nothing to shrink to, and the bound is 0. 8n²ε times the magnitudes of all terms is subtracted.

    symbol  variable  shape
    d       d         (n,)
    u       u         (n,)
    s       share     (n,)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from pruning_vs_quantization import semidefinite
from pruning_vs_quantization.plots import study_package
from pruning_vs_quantization.proof import Reals
from pruning_vs_quantization.pruning_problem import PruningProblem, unit_diagonal

EPS = float(np.finfo(np.float64).eps)
SHRINKS = tuple(10.0**exponent for exponent in range(-7, 0))  # of d, tried in turn


@dataclass(frozen=True)
class Relaxation:
    """The optimum of the relaxation as the solver found it, and what is proved by it."""

    lower: float  # certified: nothing with `keep` nonzeros has a smaller error
    value: float  # the solver's own optimal value
    share: Reals  # (n,) s*


def relax(problem: PruningProblem) -> Relaxation:
    """Solve the relaxation and certify its bound. Raises UserError where cvxpy is missing."""
    live = np.flatnonzero(problem.live())
    share = np.zeros(len(problem.w))
    if len(live) <= problem.keep:
        share[live] = 1
        return Relaxation(0.0, 0.0, share)
    if problem.keep == 0:
        error = problem.error(np.zeros_like(problem.w))
        return Relaxation(error, error, share)
    G, scale = unit_diagonal(problem.G[np.ix_(live, live)])
    w = problem.w[live] * scale
    unit = float(np.abs(w).max()) or 1.0
    value, weights, share[live], d = _program(len(w)).solve(G, w / unit, problem.keep)
    lower = certified_bound(G, w, problem.keep, d, w - unit * weights)
    return Relaxation(lower, unit * unit * value, share)


def rounded(problem: PruningProblem, relaxation: Relaxation) -> Reals:  # (n,)
    """The weights of largest share, refitted."""
    return problem.refitted(problem.largest(relaxation.share))


# -- the certificate -------------------------------------------------------------------------------


def certified_bound(
    G: Reals,  # (n, n) unit diagonal
    w: Reals,  # (n,)
    keep: int,
    d: Reals,  # (n,) anything that is meant to be d
    u: Reals,  # (n,) anything
) -> float:
    """A lower bound on the error of all weights with `keep` nonzeros, valid for any d and u."""
    n, norm = len(w), float(np.abs(G).sum(1).max())
    least = float(np.linalg.eigvalsh(G)[0])
    margin = 4 * n * EPS * norm
    if least <= 4 * margin:
        return 0.0
    for shrink in SHRINKS:  # a share of d makes room for a floor under all of it: d_i > 0
        floored = (1 - shrink) * np.maximum(d, 0) + shrink * least / 2
        M = G - np.diag(floored)
        if float(np.linalg.eigvalsh(M)[0]) >= margin:
            break
    else:
        return 0.0
    p = M @ u
    gain = (floored * w + p) ** 2 / floored
    terms = np.concatenate([-u * p, -(p**2) / floored, np.sort(gain)[: n - keep]])
    magnitudes = float(np.abs(u) @ np.abs(M) @ np.abs(u) + np.abs(terms).sum())
    return max(0.0, float(terms.sum()) - 8 * n * n * EPS * magnitudes)


# -- the semidefinite program ----------------------------------------------------------------------


@dataclass
class _Program:
    """The relaxation for one number of unknowns, compiled by cvxpy once."""

    problem: Any
    parameters: dict[str, Any]
    Z: Any  # (n + 1, n + 1) [V ŵ; ŵᵀ 1]
    share: Any
    schur: Any  # constraint

    def solve(self, G: Reals, w: Reals, keep: int) -> tuple[float, Reals, Reals, Reals]:
        """The optimum, ŵ, s and d; a bound of nothing if the solver fails."""
        n = len(w)
        self.parameters["G"].value, self.parameters["Gw"].value = G, G @ w
        self.parameters["keep"].value = keep
        if not semidefinite.solve(self.problem, self.Z):
            return 0.0, w, np.abs(w), np.zeros(n)
        Y = self.schur.dual_value
        value = float(self.problem.value + w @ G @ w)
        return value, self.Z.value[:n, n], self.share.value, np.diagonal(G - Y[:n, :n])


@lru_cache(maxsize=8)
def _program(n: int) -> _Program:
    cp = study_package("cvxpy")
    parameters = {
        "G": cp.Parameter((n, n), symmetric=True),
        "Gw": cp.Parameter(n),
        "keep": cp.Parameter(nonneg=True),
    }
    Z, share = cp.Variable((n + 1, n + 1), symmetric=True), cp.Variable(n)
    weights, schur = Z[:n, n], Z >> 0
    shared = [cp.quad_over_lin(weights[i], share[i]) <= Z[i, i] for i in range(n)]
    limits = [share >= 0, share <= 1, cp.sum(share) <= parameters["keep"]]
    objective = cp.trace(parameters["G"] @ Z[:n, :n]) - 2 * parameters["Gw"] @ weights
    problem = cp.Problem(cp.Minimize(objective), [schur, Z[n, n] == 1, *shared, *limits])
    return _Program(problem, parameters, Z, share, schur)
