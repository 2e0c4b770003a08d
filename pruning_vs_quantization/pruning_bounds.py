"""Pruning one row of weights on one chunk of inputs: the best subset of given size, bounded.

    minimise  (w − ŵ) G (w − ŵ)ᵀ      over ŵ with at most k nonzero weights,      G = E[x xᵀ]

The kept weights are real numbers: the study stores them in 16 bits, whose rounding is far below
what pruning loses. For a set P of pruned and K of kept weights the best values, and their loss, are
those of least squares:

    ŵ_K = w_K + G_KK⁻¹ G_KP w_P        loss(P) = w_P (G_PP − G_PK G_KK⁻¹ G_KP) w_Pᵀ
                                               = w_P (A_PP)⁻¹ w_Pᵀ          A = G⁻¹ if it exists

Baselines, in the paper's words: `magnitude` keeps the largest weights as they are,
`magnitude_least_squares` gives them their best values. `exact_obs` is the toolkit's own answer: the
elimination of `elimination.py` with the rule `Unstructured` in float32, then least squares. Weights
of inputs that are always zero cost nothing: they are pruned first.

Inputs that are copies of each other, such as the colours of a grey image, make G singular; which
weights can stand in for which then depends on its last digits. `PruningProblem.of` therefore raises
the diagonal, in the scale in which it is 1, until the condition number is at most CONDITION: the
problem with independent noise on the inputs, 70 dB below the largest principal component. All
errors and bounds refer to that problem; `ridge` says what was added.

**The perspective relaxation.** Which weights to keep is relaxed to shares 0 ≤ s_i ≤ 1, Σ s_i ≤ k;
that ŵ_i = 0 where s_i = 0 becomes ŵ_i² ≤ V_ii s_i (Dong, Chen and Linderoth, arXiv 1510.06083).
With V for ŵ ŵᵀ:

    minimise    tr(G V) − 2 wᵀGŵ + wᵀGw
    subject to  [V ŵ; ŵᵀ 1] ⪰ 0 (dual Y),     ŵ_i² ≤ V_ii s_i,     0 ≤ s ≤ 1,     Σ s ≤ k

**Certificate.** Let D = diag(d) ≥ 0 with M = G − D ⪰ 0, u any vector, p = Mu, e = w − ŵ. As
eᵀMe ≥ 2uᵀMe − uᵀMu for every e,

    eᵀGe  ≥  −uᵀMu + Σ_i (2 p_i e_i + d_i e_i²)

A pruned weight has e_i = w_i; a kept one adds at least min over e_i = −p_i²/d_i. So a pruned one
adds (d_i w_i + p_i)²/d_i more than a kept one, at least n − k are pruned, and therefore

    error  ≥  −uᵀMu − Σ p_i²/d_i + Σ over the n − k smallest of (d_i w_i + p_i)²/d_i

for all ŵ with k nonzeros, whatever the solver did. Its optimum gives d_i = (G − Y)_ii and
u = w − ŵ. `pruning_certificate` shrinks d until M ⪰ 0 is certain: LAPACK's least eigenvalue of M at
least 4nε‖G‖, all in the scale in which G has a unit diagonal. Where G is singular there is nothing
to shrink to, and the bound is 0. 8n²ε times the magnitudes of all terms is subtracted.

    symbol  variable  shape
    d, u    d, u      (n,)
    s       share     (n,)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from obc.solver.elimination import Unstructured, eliminate
from obc.solver.inverse import alive_inputs, damped_inverse
from pruning_vs_quantization.plots import study_package
from pruning_vs_quantization.proof import EPS, Flags, Reals, solve_semidefinite

RANK = 1e-12  # relative; below, a direction of G_KK counts as missing
CONDITION = 1e7
SHRINKS = tuple(10.0**exponent for exponent in range(-7, 0))  # of d, tried in turn


@dataclass(frozen=True)
class PruningProblem:
    """min (w − ŵ) G (w − ŵ)ᵀ over ŵ with `keep` nonzeros."""

    G: Reals  # (n, n) symmetric positive semidefinite
    w: Reals  # (n,)
    keep: int  # 0 … n
    ridge: float = 0.0  # already added to G, × its diagonal

    @classmethod
    def of(cls, G: Reals, w: Reals, sparsity: float) -> PruningProblem:
        """With `keep` rounded down, and a ridge on G if it needs one."""
        G, ridge = (G + G.T) / 2, 0.0
        live = np.diagonal(G) > 0
        if live.any():
            correlation, _ = unit_diagonal(G[np.ix_(live, live)])
            eigenvalues = np.linalg.eigvalsh(correlation)
            ridge = max(0.0, float(eigenvalues[-1] / CONDITION - eigenvalues[0]))
            G = G + ridge * np.diag(np.diagonal(G))
        return cls(G, w, int((1 - sparsity) * len(w) + 1e-9), ridge)

    def error(self, weights: Reals) -> float:
        """The squared error of the output."""
        e = weights - self.w
        return float(e @ self.G @ e)

    def live(self) -> Flags:  # (n,)
        """Which inputs are not always zero."""
        return np.diagonal(self.G) > 0

    def refitted(self, keep: Flags) -> Reals:  # (n,)
        """The best weights with zeros outside of `keep`."""
        weights = np.where(keep, self.w, 0.0)
        pruned = ~keep & self.live()
        if keep.any() and pruned.any():
            pull = self.G[np.ix_(keep, pruned)] @ self.w[pruned]
            correlation, scale = unit_diagonal(self.G[np.ix_(keep, keep)])
            weights[keep] += np.linalg.lstsq(correlation, pull / scale, rcond=RANK)[0] / scale
        return weights

    def largest(self, scores: Reals) -> Flags:  # (n,)
        """The `keep` unknowns of largest score; those of dead inputs last."""
        order = np.argsort(np.where(self.live(), -scores, np.inf), kind="stable")
        keep = np.zeros(len(scores), dtype=bool)
        keep[order[: self.keep]] = True
        return keep


def unit_diagonal(G: Reals) -> tuple[Reals, Reals]:  # (n, n), (n,)
    """G in the scale in which its diagonal is 1 (or 0), and the square roots of what it was."""
    scale = np.sqrt(np.diagonal(G))
    scale = np.where(scale > 0, scale, 1.0)
    return G / np.outer(scale, scale), scale


# -- pruners without a proof -----------------------------------------------------------------------


def magnitude(problem: PruningProblem) -> Reals:  # (n,)
    """The largest weights as they are."""
    return np.where(problem.largest(np.abs(problem.w)), problem.w, 0.0)


def magnitude_least_squares(problem: PruningProblem) -> Reals:  # (n,)
    """The largest weights at their best values."""
    return problem.refitted(problem.largest(np.abs(problem.w)))


def exact_obs(problem: PruningProblem) -> Reals:  # (n,)
    """The weights that the toolkit's greedy elimination keeps, at their best values."""
    H = torch.from_numpy(problem.G)[None]
    w = torch.from_numpy(problem.w).float()[None] * alive_inputs(H)
    system = torch.zeros(1, dtype=torch.int64)
    steps = len(problem.w) - problem.keep
    trace = eliminate(w[:, None], damped_inverse(H), system, Unstructured(), steps)
    keep = np.ones(len(problem.w), dtype=bool)
    keep[trace.order[0].numpy()] = False
    return problem.refitted(keep)


# -- the relaxation --------------------------------------------------------------------------------


@dataclass(frozen=True)
class SubsetRelaxation:
    """The optimum of the relaxation as the solver returned it, and what it proves."""

    lower: float  # certified: nothing with `keep` nonzeros has a smaller error
    value: float  # the solver's own optimal value
    share: Reals  # (n,) s*


@lru_cache(maxsize=8)
def subset_program(n: int) -> tuple[Any, dict[str, Any], Any, Any, Any]:
    """The relaxation for n unknowns, compiled once: program, parameters, Z, s and [V ŵ; ŵᵀ 1] ⪰ 0.

    Z is [V ŵ; ŵᵀ 1].
    """
    cp = study_package("cvxpy")
    G, Gw = cp.Parameter((n, n), symmetric=True), cp.Parameter(n)
    keep = cp.Parameter(nonneg=True)
    Z, share = cp.Variable((n + 1, n + 1), symmetric=True), cp.Variable(n)
    weights, schur = Z[:n, n], Z >> 0
    perspective = [cp.quad_over_lin(weights[i], share[i]) <= Z[i, i] for i in range(n)]
    constraints = [schur, Z[n, n] == 1, *perspective, share >= 0, share <= 1, cp.sum(share) <= keep]
    objective = cp.trace(G @ Z[:n, :n]) - 2 * Gw @ weights
    program = cp.Problem(cp.Minimize(objective), constraints)
    return program, {"G": G, "Gw": Gw, "keep": keep}, Z, share, schur


def relax_subset(problem: PruningProblem) -> SubsetRelaxation:
    """Solve the relaxation and certify its bound. Raises UserError if cvxpy is missing."""
    live = np.flatnonzero(problem.live())
    share = np.zeros(len(problem.w))
    if len(live) <= problem.keep:
        share[live] = 1
        return SubsetRelaxation(0.0, 0.0, share)
    if problem.keep == 0:
        error = problem.error(np.zeros_like(problem.w))
        return SubsetRelaxation(error, error, share)
    G, scale = unit_diagonal(problem.G[np.ix_(live, live)])
    w, n = problem.w[live] * scale, len(live)
    unit = float(np.abs(w).max()) or 1.0
    v = w / unit
    program, parameters, Z, shares, schur = subset_program(n)
    parameters["G"].value, parameters["Gw"].value = G, G @ v
    parameters["keep"].value = problem.keep
    if solve_semidefinite(program, Z):
        value, weights, share[live] = float(program.value + v @ G @ v), Z.value[:n, n], shares.value
        d = np.diagonal(G - schur.dual_value[:n, :n])
    else:  # a bound of nothing
        value, weights, share[live], d = 0.0, v, np.abs(v), np.zeros(n)
    lower = pruning_certificate(G, w, problem.keep, d, w - unit * weights)
    return SubsetRelaxation(lower, unit * unit * value, share)


def pruning_certificate(
    G: Reals,  # (n, n) unit diagonal
    w: Reals,  # (n,)
    keep: int,
    d: Reals,  # (n,) any values in place of d
    u: Reals,  # (n,) any values
) -> float:
    """A lower bound on the error of all weights with `keep` nonzeros, valid for any d and u."""
    n, norm = len(w), float(np.abs(G).sum(1).max())
    least = float(np.linalg.eigvalsh(G)[0])
    margin = 4 * n * EPS * norm
    if least <= 4 * margin:
        return 0.0
    for shrink in SHRINKS:  # a fraction of d makes room for a floor under all of it: d_i > 0
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
