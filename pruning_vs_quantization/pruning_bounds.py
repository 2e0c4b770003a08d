"""Pruning one row of weights on one chunk of inputs: the best subset, with bounds and a proof.

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

**The search.** Furnival and Wilson, "Regressions by leaps and bounds" (1974), applied to the
downdates of ExactOBS. A node has removed some weights, may still remove its candidates, and keeps
all others for good. With A the inverse of G on what is not removed and w the weights refitted,
removing j costs what ExactOBS says:

    loss += w_j²/A_jj        w −= A[:, j] w_j/A_jj        A −= A[:, j] A[j, :]/A_jj

Kept weights need no rows of A: A and w over the candidates suffice. A node that has to remove r
more of its candidates 1 … m, sorted by falling single cost, has the children

    child a:  removes candidate a, keeps 1 … a−1, may still remove a+1 … m         a ≤ m − r + 1

so that each set is met once, and those without an expensive weight, which are many and cheap, come
last and in small subtrees.

Bounds. Removing more never loses less: loss(P ∪ Q) ≥ loss(P), as loss(P) is a minimum over fewer
constraints. So (i) a child's loss bounds everything below it, and (ii) whatever r candidates go,
one of them costs at least the r-th smallest single cost c_(r), and loss + c_(r) bounds the node.
The search starts from ExactOBS's own answer, the incumbent.

Rounding. All computations use the scale in which G has a unit diagonal (the problem does not
change). A is the inverse of a G changed by a few nε‖G‖, and elimination changes A by a few nε‖A‖:
with G's condition number κ either changes losses by a few nεκ, relative, and `lower` is reduced by
8nεκ. If κ > SINGULAR_PIVOT, the search runs on G with a ridge, which finds good subsets and proves
nothing: `lower` is 0.

    symbol  variable  shape          meaning
    d, u    d, u      (n,)
    s       share     (n,)
    A       A         (r, n, n)      inverse over the candidates of each level's node
    w       w         (r, n)         refitted weights of the candidates
    c       cost      (r, n)         single costs, falling
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

from obc.solver.elimination import Unstructured, eliminate
from obc.solver.inverse import alive_inputs, damped_inverse
from pruning_vs_quantization.plots import study_package
from pruning_vs_quantization.proof import (
    EPS,
    TIE,
    Flags,
    Integers,
    ProvenSolution,
    Reals,
    SearchLimits,
    compiled,
    run_in_slices,
    solve_semidefinite,
)

RANK = 1e-12  # relative; below, a direction of G_KK counts as missing
CONDITION = 1e7
SINGULAR_PIVOT = 1e10  # condition number; beyond, the search proves nothing
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
    """The relaxation for n unknowns: program, parameters, Z = [V ŵ; ŵᵀ 1], s, and Z ⪰ 0."""
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


# -- the search ------------------------------------------------------------------------------------


class SubsetPath(NamedTuple):
    """The nodes from the root to where the search is; changed in place."""

    A: Reals  # (r, n, n)
    w: Reals  # (r, n)
    cost: Reals  # (r, n)
    column: Integers  # (r, n) which weight a candidate is
    candidates: Integers  # (r,) how many there are
    next: Integers  # (r,) the child to visit next
    loss: Reals  # (r,) of what is removed so far
    removed: Integers  # (r,) by each level
    best: Integers  # (r,) removed by the best leaf; −1: there is none
    threshold: Reals  # (1,) nodes of this loss or more are cut off
    level: Integers  # (1,)


def best_subset(problem: PruningProblem, start: Reals, limits: SearchLimits) -> ProvenSolution:
    """The weights of least error with `keep` nonzeros, or the best until a limit was reached.

    `start` are any weights with so many nonzeros; the better they are, the shorter the search.
    """
    live = np.flatnonzero(problem.live())
    n, remove = len(live), len(live) - problem.keep
    if remove <= 0:
        return ProvenSolution(problem.refitted(problem.live()), 0.0, 0.0)
    error, solution = problem.error(start), start
    G, scale = unit_diagonal(problem.G[np.ix_(live, live)])
    eigenvalues = np.linalg.eigvalsh(G)
    smallest = eigenvalues[-1] / SINGULAR_PIVOT
    condition = float(eigenvalues[-1] / max(eigenvalues[0], smallest / 2))
    A = np.linalg.inv(G + max(0.0, smallest - float(eigenvalues[0])) * np.eye(n))
    w = problem.w[live] * scale
    cost = w**2 / np.diagonal(A)
    order = np.argsort(-cost)
    floats = {"A": (remove, n, n), "w": (remove, n), "cost": (remove, n), "loss": remove}
    integers = {"column": (remove, n), "candidates": remove, "next": remove, "removed": remove}
    path = SubsetPath(
        **{name: np.zeros(shape) for name, shape in floats.items()},
        **{name: np.zeros(shape, dtype=np.int64) for name, shape in integers.items()},
        best=np.full(remove, -1),
        threshold=np.array([error * (1 - TIE)]),
        level=np.zeros(1, dtype=np.int64),
    )
    path.A[0], path.w[0] = A[np.ix_(order, order)], w[order]
    path.cost[0], path.column[0], path.candidates[0] = cost[order], order, n
    finished, nodes, seconds = run_in_slices(lambda count: search_subsets(path, count), limits)
    if path.best[0] >= 0:
        keep = problem.live()
        keep[live[path.best]] = False
        weights = problem.refitted(keep)
        if problem.error(weights) < error:
            error, solution = problem.error(weights), weights
    least = float(path.threshold[0])
    if not finished:
        least = min(least, least_open_loss(path))
    certain = 1 - 8 * n * EPS * condition if condition <= SINGULAR_PIVOT else 0.0
    return ProvenSolution(solution, error, min(least * certain, error), finished, nodes, seconds)


@compiled
def search_subsets(path: SubsetPath, budget: int) -> tuple[bool, int]:
    """Visit up to `budget` nodes; whether the search is finished, and the nodes visited."""
    remove, level = len(path.loss), path.level[0]
    for visited in range(budget):
        rest, m = remove - level, path.candidates[level]
        threshold = path.threshold[0] - path.loss[level]
        if rest == 1:  # the cheapest of the candidates completes the set
            if path.cost[level, m - 1] < threshold:
                path.removed[level] = path.column[level, m - 1]
                path.best[:] = path.removed
                path.threshold[0] = (path.loss[level] + path.cost[level, m - 1]) * (1 - TIE)
            level -= 1
        elif path.next[level] > m - rest or path.cost[level, m - rest] >= threshold:
            level -= 1
        else:
            child = path.next[level]
            path.next[level] += 1
            if path.cost[level, child] < threshold:
                remove_candidate(path, level, child)
                level += 1
        if level < 0:
            return True, visited + 1
    path.level[0] = level
    return False, budget


@compiled
def remove_candidate(path: SubsetPath, level: int, child: int) -> None:
    """Make the node below `level` that removes candidate `child` and keeps those before it."""
    A, w, first = path.A[level], path.w[level], child + 1
    m = path.candidates[level] - first
    refitted, cost, order = np.empty(m), np.empty(m), np.empty(m, dtype=np.int64)
    for i in range(m):
        share = A[first + i, child] / A[child, child]
        refitted[i] = w[first + i] - share * w[child]
        cost[i] = refitted[i] ** 2 / (A[first + i, first + i] - share * A[first + i, child])
        place = i  # falling cost, by insertion: there are few
        while place > 0 and cost[order[place - 1]] < cost[i]:
            order[place] = order[place - 1]
            place -= 1
        order[place] = i
    below = level + 1
    for i in range(m):
        row = first + order[i]
        share = A[row, child] / A[child, child]
        for j in range(i + 1):
            column = first + order[j]
            value = A[row, column] - share * A[column, child]
            path.A[below, i, j] = value
            path.A[below, j, i] = value
        path.w[below, i], path.cost[below, i] = refitted[order[i]], cost[order[i]]
        path.column[below, i] = path.column[level, row]
    path.removed[level] = path.column[level, child]
    path.candidates[below], path.next[below] = m, 0
    path.loss[below] = path.loss[level] + path.cost[level, child]


@compiled
def least_open_loss(path: SubsetPath) -> float:
    """The least bound of the nodes that have not been visited."""
    least, remove = np.inf, len(path.loss)
    for level in range(path.level[0] + 1):
        last = path.candidates[level] - (remove - level)
        if path.next[level] <= last:
            least = min(least, path.loss[level] + path.cost[level, last])
    return least
