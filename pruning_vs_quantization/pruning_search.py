"""The best subset of weights, with a proof: leaps and bounds over the downdates of ExactOBS.

Furnival and Wilson, "Regressions by leaps and bounds" (1974), on the loss of pruning. A node has
removed some weights, may still remove its candidates, and keeps all others for good. With A the
inverse of G on what is not removed and w the weights refitted, removing j costs what ExactOBS says:

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
8nεκ. If κ > SINGULAR, the search runs on G with a ridge, which finds good subsets and proves
nothing: `lower` is 0.

    symbol  variable  shape          meaning
    A       A         (r, n, n)      inverse over the candidates of each level's node
    w       w         (r, n)         refitted weights of the candidates
    c       cost      (r, n)         single costs, falling
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pruning_vs_quantization.proof import (
    EPS,
    TIE,
    Integers,
    ProvenSolution,
    Reals,
    SearchLimits,
    compiled,
    run_in_slices,
)
from pruning_vs_quantization.pruning_bounds import PruningProblem, unit_diagonal

SINGULAR = 1e10


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
    if len(live) <= problem.keep:
        return ProvenSolution(problem.refitted(problem.live()), 0.0, 0.0)
    error, solution = problem.error(start), start
    path, condition = subset_root(problem, live, error)
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
    certain = 1 - 8 * len(live) * EPS * condition if condition <= SINGULAR else 0.0
    lower = min(least * certain, error)
    return ProvenSolution(solution, error, lower, finished, nodes, seconds)


def subset_root(
    problem: PruningProblem,
    live: Integers,  # (n,) columns that are not dead
    error: float,  # of the best known weights
) -> tuple[SubsetPath, float]:  # and the condition number of G, scaled
    """The path at the root."""
    n, remove = len(live), len(live) - problem.keep
    G, scale = unit_diagonal(problem.G[np.ix_(live, live)])
    w = problem.w[live] * scale
    eigenvalues = np.linalg.eigvalsh(G)
    smallest = eigenvalues[-1] / SINGULAR
    condition = float(eigenvalues[-1] / max(eigenvalues[0], smallest / 2))
    ridge = max(0.0, smallest - float(eigenvalues[0]))
    A = np.linalg.inv(G + ridge * np.eye(n))
    levels = np.zeros(remove, dtype=np.int64)
    path = SubsetPath(
        A=np.empty((remove, n, n)),
        w=np.empty((remove, n)),
        cost=np.empty((remove, n)),
        column=np.empty((remove, n), dtype=np.int64),
        candidates=levels.copy(),
        next=levels.copy(),
        loss=np.zeros(remove),
        removed=levels.copy(),
        best=levels - 1,
        threshold=np.array([error * (1 - TIE)]),
        level=levels[:1].copy(),
    )
    cost = w**2 / np.diagonal(A)
    order = np.argsort(-cost)
    path.A[0], path.w[0] = A[np.ix_(order, order)], w[order]
    path.cost[0], path.column[0], path.candidates[0] = cost[order], order, n
    return path, condition


# -- the compiled search ---------------------------------------------------------------------------


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
