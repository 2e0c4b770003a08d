"""Pruning one row of weights on one chunk of inputs: the best subset of given size.

    minimise  (w − ŵ) G (w − ŵ)ᵀ      over ŵ with at most k weights that are not zero,  G = E[x xᵀ]

The kept weights are real numbers: the study stores them in 16 bits, whose rounding is far below
what pruning loses. For a set P of pruned and K of kept weights the best values, and what they lose,
are those of least squares:

    ŵ_K = w_K + G_KK⁻¹ G_KP w_P        loss(P) = w_P (G_PP − G_PK G_KK⁻¹ G_KP) w_Pᵀ
                                               = w_P (A_PP)⁻¹ w_Pᵀ          A = G⁻¹ if there is one

Baselines, in the paper's words: `magnitude` keeps the largest weights as they are,
`magnitude_least_squares` gives them their best values. `exact_obs` is the toolkit's own answer: the
elimination of `elimination.py` with the rule `Unstructured` in float32, then least squares.

Inputs that are always zero lose nothing with their weights: those go first.

Inputs that are copies of each other, such as the colours of a grey image, make G singular; which
weights can stand in for which then hangs on its last digits. `PruningProblem.of` therefore raises
the diagonal, in the scale in which it is 1, until the condition number is CONDITION at most: the
problem with inputs that carry independent noise of 70 dB below the largest principal component.
Everything, errors and bounds, is that problem's; `ridge` says what was added.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from obc.solver.elimination import Unstructured, eliminate
from obc.solver.inverse import alive_inputs, damped_inverse
from pruning_vs_quantization.proof import Flags, Reals

RANK = 1e-12  # relative; below, a direction of G_KK counts as missing
CONDITION = 1e7


@dataclass(frozen=True)
class PruningProblem:
    """min (w − ŵ) G (w − ŵ)ᵀ over ŵ with `keep` nonzeros."""

    G: Reals  # (n, n) symmetric positive semidefinite
    w: Reals  # (n,)
    keep: int  # 0 … n
    ridge: float = 0.0  # that is in G already, × its diagonal

    @classmethod
    def of(cls, G: Reals, w: Reals, sparsity: float) -> PruningProblem:
        """As many weights as fit: the number kept is rounded down. G with a ridge if need be."""
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

    def refitted(self, kept: Flags) -> Reals:  # (n,)
        """The best weights with zeros outside of `kept`."""
        weights = np.where(kept, self.w, 0.0)
        pruned = ~kept & self.live()
        if kept.any() and pruned.any():
            pull = self.G[np.ix_(kept, pruned)] @ self.w[pruned]
            weights[kept] += _solved(self.G[np.ix_(kept, kept)], pull)
        return weights

    def largest(self, scores: Reals) -> Flags:  # (n,)
        """The `keep` unknowns of largest score; those of dead inputs last."""
        order = np.argsort(np.where(self.live(), -scores, np.inf), kind="stable")
        kept = np.zeros(len(scores), dtype=bool)
        kept[order[: self.keep]] = True
        return kept


def unit_diagonal(G: Reals) -> tuple[Reals, Reals]:  # (n, n), (n,)
    """G in the scale in which its diagonal is 1 (or 0), and the square roots of what it was."""
    scale = np.sqrt(np.diagonal(G))
    scale = np.where(scale > 0, scale, 1.0)
    return G / np.outer(scale, scale), scale


def _solved(system: Reals, right: Reals) -> Reals:
    """The least-squares solution of a system, shortest in the scale of a unit diagonal."""
    correlation, scale = unit_diagonal(system)
    return np.linalg.lstsq(correlation, right / scale, rcond=RANK)[0] / scale


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
    kept = np.ones(len(problem.w), dtype=bool)
    kept[trace.order[0].numpy()] = False
    return problem.refitted(kept)
