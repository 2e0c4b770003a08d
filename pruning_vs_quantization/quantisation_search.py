"""The best codes, with a proof: branch and bound for integer least squares in a box.

Schnorr and Euchner's enumeration (1994; Agrell et al. 2002) with the box and its multipliers. Let
z* be the optimum over the box of real numbers (`box_minimum`) and g = 2G(z* − t) its gradient;
g_i ≥ 0 where z*_i = low, g_i ≤ 0 where z*_i = high ("held"), and 0 elsewhere. Then for all z in the
box

    f(z) = f(z*) + ‖Lᵀ(z − z*)‖² + gᵀ(z − z*)        every g_i (z_i − z*_i) ≥ 0        G = LLᵀ

**Coordinates.** Any unimodular U (integer, with an integer inverse) gives the same search over y,
z = z₀ + U y, with R upper triangular and positive on the diagonal, RᵀR = UᵀGU:

    f = f(z*) + Σ_k cost_k,     cost_k = R_kk² (y_k − c_k)² + slope_k (y_k − y*_k)  ≥ 0
    c_k = y*_k − Σ_{j>k} R_kj (y_j − y*_j) / R_kk

so that deciding y_n, y_{n−1}, … only ever adds to f: the sum so far is a node's bound. Values of a
level are tried in order of rising cost, from the vertex of the parabola outwards, so that the first
one that costs too much ends the level. The search starts from the best codes that are known and
prunes by their error from the first node on.

The search is short if wrong first decisions are expensive, so if R_nn, R_{n−1,n−1}, … are large.
For correlated inputs they are tiny in the original coordinates, whatever their order; lattice
reduction (Lenstra, Lenstra and Lovász 1982, with the deep insertions of Schnorr and Euchner 1994)
finds a U for which R's diagonal is nearly level. Within a box the gain is limited. What is left to
search, {f(z) ≤ f(z*) + excess} in a box of width b, is narrow in the metric G + ρI, ρ = excess/b²:
directions that G weights less than that end at the box. So U reduces G + ρI. Reducing a G that is
nearly singular would instead mix codes by large integers, useless within the box, and the box would
bound its decisions badly. Coordinates held at a side of the box are treated apart: there f grows
linearly, and no other coordinate can compensate. They are not mixed with others, and decided first:

    U = [ reduced basis of the free ones   0 ]        columns of the second kind in the order of
        [ 0                                P ]        rising 1/A_ii, A = G⁻¹: the last one largest

**Which values to try.** The box bounds every y: y = U⁻¹(z − z₀), entry by entry between the least
and the largest that z can give. And each row i of U bounds y_k given the decisions above k,

    low_i − z₀_i  ≤  Σ_{j>k} U_ij y_j + U_ik y_k + Σ_{j<k} U_ij y_j  ≤  high_i − z₀_i

with the last sum anywhere between its own bounds. Where G is singular, costs alone would let whole
directions go on forever.

**What the bound allows for.** With D² the largest squared distance that z may have from t or z*,

* G is singular or nearly so (least eigenvalue below SINGULAR × the largest): the search uses
  G + ρI, ρ = SINGULAR × the largest, and f is smaller than what it sees by at most ρD²;
* rounding in R and in the costs: 4nε·tr(G)·D²;
* the gradient of coordinates that are not held is not exactly zero: what it could gain in the box.

D² is that of the whole box, or, if G is not singular, (error of the start) / (least eigenvalue).

    symbol  variable  shape   meaning
    z₀      origin    (n,)    codes of y = 0
    y*      centre    (n,)    continuous optimum
            slope     (n,)    gradient of the levels held, else 0
    U       U         (n, n)  integers, as float64
    R       R         (n, n)  upper triangular
            B         (m, m)  rows: basis of the lattice
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

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
)
from pruning_vs_quantization.quantisation_bounds import QuantisationProblem

SINGULAR = 1e-12
INTEGERS = 2.0**53  # below, floating point is exact on them
FAR = 2.0**60  # a bound that bounds nothing
DELTA = 0.99  # of Lovász's condition
PASSES = 200  # × the dimension; more only where rounding keeps a reduction from ending


class CodeTree(NamedTuple):
    """What the search walks through: the same for all nodes."""

    R: Reals  # (n, n)
    centre: Reals  # (n,)
    slope: Reals  # (n,)
    U: Reals  # (n, n)
    first: Reals  # (n,) least decisions that the box has
    last: Reals  # (n,)
    low: Reals  # (n, n) what row i of U must reach with the columns from k on, at least
    high: Reals  # (n, n) and at most
    rows: Integers  # (n, n) rows of U with a nonzero in column k: rows[k, :count[k]]
    count: Integers  # (n,)
    base: float  # f(z*), less what the bound allows for


class CodePath(NamedTuple):
    """Where the search is; changed in place."""

    y: Reals  # (n,) decisions
    cost: Reals  # (n + 1,) of the decisions from a level upwards
    vertex: Reals  # (n,) of the level's parabola
    middle: Reals  # (n,) c_k
    down: Reals  # (n,) next value to try below the vertex
    up: Reals  # (n,) and above
    lowest: Reals  # (n,) values that keep the codes in the box
    highest: Reals  # (n,)
    best: Reals  # (n,) decisions of the best leaf
    threshold: Reals  # (1,) nodes of this cost or more are cut off
    level: Integers  # (1,)


def closest(problem: QuantisationProblem, start: Reals, limits: SearchLimits) -> ProvenSolution:
    """The codes in the box of least error, or the best until a limit was reached.

    `start` are any codes in the box; the better they are, the shorter the search.
    """
    live = problem.live()
    if not live.any():
        return ProvenSolution(start, problem.error(start), 0.0)
    G, t = np.ascontiguousarray(problem.G[np.ix_(live, live)]), problem.t[live]
    small, codes = QuantisationProblem(G, t, problem.low, problem.high), start[live]
    tree, origin = code_tree(small, codes)
    n, allowance = len(codes), small.error(codes) - tree.base  # cost of the start above the base
    path = CodePath(
        *(np.zeros(n if name != "cost" else n + 1) for name in CodePath._fields[:8]),
        best=np.full(n, np.nan),
        threshold=np.array([allowance - TIE * (tree.base + allowance)]),
        level=np.array([n - 1]),
    )
    enter_level(tree, path, n - 1)
    finished, nodes, seconds = run_in_slices(lambda count: search_codes(tree, path, count), limits)
    if np.isfinite(path.best[0]):
        leaf = np.rint(origin + tree.U @ path.best)
        if small.error(leaf) < small.error(codes):
            codes = leaf
    least = path.threshold[0] if finished else min(path.threshold[0], least_open_cost(tree, path))
    solution = problem.nearest()
    solution[live] = codes
    error = problem.error(solution)
    lower = min(max(0.0, tree.base + float(least)), error)
    return ProvenSolution(solution, error, lower, finished, nodes, seconds)


def code_tree(
    problem: QuantisationProblem,  # without dead inputs
    start: Reals,  # (n,) codes in the box
) -> tuple[CodeTree, Reals]:  # and the origin (n,)
    """Coordinates, centre and slopes of the search."""
    n, low, high, t = len(start), problem.low, problem.high, problem.t
    eigenvalues = np.linalg.eigvalsh(problem.G)
    singular = eigenvalues[0] < SINGULAR * eigenvalues[-1]
    ridge = SINGULAR * float(eigenvalues[-1]) if singular else 0.0
    ridged = QuantisationProblem(problem.G + ridge * np.eye(n), t, low, high)
    optimum = ridged.box_minimum()
    gradient = 2 * ridged.G @ (optimum - t)
    held = ((optimum <= low) & (gradient > 0)) | ((optimum >= high) & (gradient < 0))
    reach = np.maximum(optimum - low, high - optimum)
    loose = float(np.abs(np.where(held, 0, gradient)) @ reach)
    t_reach = np.maximum(np.abs(low - t), np.abs(high - t))
    distance = float(np.square(np.maximum(reach, t_reach)).sum())
    if not singular:
        distance = min(distance, 4 * problem.error(start) / float(eigenvalues[0]))
    allowed = loose + (ridge + 4 * n * EPS * float(np.trace(problem.G))) * distance
    excess = max(0.0, problem.error(start) - ridged.error(optimum))
    U, R = search_coordinates(ridged.G, held, excess / (high - low) ** 2)
    origin = np.rint(optimum)
    first, last = np.full(n, -FAR), np.full(n, FAR)
    inverse = np.rint(np.linalg.inv(U))  # unimodular: integers
    exact = (np.abs(U) @ np.abs(inverse)).max() < INTEGERS
    if exact and (U @ inverse == np.eye(n)).all():
        first, last = (sums[:, -1] for sums in partial_sums(inverse, low - origin, high - origin))
    least, largest = partial_sums(U, first, last)
    used = U != 0
    tree = CodeTree(
        R=R,
        centre=np.linalg.solve(U, optimum - origin),
        slope=U.T @ np.where(held, gradient, 0),
        U=U,
        first=first,
        last=last,
        low=(low - origin)[:, None] - largest[:, :-1],
        high=(high - origin)[:, None] - least[:, :-1],
        rows=np.argsort(~used.T, axis=1, kind="stable"),
        count=used.sum(0),
        base=ridged.error(optimum) - allowed,
    )
    return tree, origin


def partial_sums(
    M: Reals,  # (m, n)
    low: Reals,  # (n,)
    high: Reals,  # (n,)
) -> tuple[Reals, Reals]:  # (m, n + 1) each
    """The least and the largest sum of the first k columns of M, each times a value in a box."""
    ends, zero = np.stack([M * low, M * high]), np.zeros((len(M), 1))
    least, largest = (np.cumsum(terms, 1) for terms in (ends.min(0), ends.max(0)))
    return np.hstack([zero, least]), np.hstack([zero, largest])


# -- coordinates -----------------------------------------------------------------------------------


def search_coordinates(
    G: Reals,  # (n, n) positive definite
    held: Flags,  # (n,) coordinates at a side of the box
    ridge: float = 0.0,  # ρ
) -> tuple[Reals, Reals]:  # U, R (n, n)
    """The change of coordinates for a search, and its triangular matrix."""
    free = np.flatnonzero(~held)
    U = np.zeros_like(G)
    L = np.linalg.cholesky(G[np.ix_(free, free)] + ridge * np.eye(len(free)))
    U[np.ix_(free, np.arange(len(free)))] = reduced_basis(L).T
    last = np.diagonal(np.linalg.inv(G))
    order = np.argsort(-last[held], kind="stable")
    U[np.flatnonzero(held)[order], np.arange(len(free), len(G))] = 1
    R = np.linalg.qr(np.linalg.cholesky(G).T @ U, mode="r")
    return U, np.ascontiguousarray(R * np.sign(np.diagonal(R))[:, None])


@compiled
def reduced_basis(
    B: Reals,  # (m, m) rows: a basis
) -> Reals:  # (m, m) unimodular: its product with B is a reduced basis
    """Lattice reduction with deep insertions, in floating point.

    The result is unimodular whatever rounding does: it is made of integer row operations.
    """
    m = len(B)
    B, U = B.copy(), np.eye(m)
    orthogonal, length, mu = np.zeros((m, m)), np.zeros(m), np.zeros((m, m))
    k = 0
    for _ in range(PASSES * m):
        if k >= m:
            break
        for _ in range(2):  # the second time corrects the rounding of the first
            for j in range(k):
                mu[k, j] = np.sum(B[k] * orthogonal[j]) / length[j]
            for j in range(k - 1, -1, -1):  # subtract whole multiples of row j, so that |μ| ≤ ½
                q = np.rint(mu[k, j])
                if q != 0:
                    B[k] -= q * B[j]
                    U[k] -= q * U[j]
                    mu[k, :j] -= q * mu[j, :j]
        orthogonal[k] = B[k]
        for j in range(k):
            mu[k, j] = np.sum(B[k] * orthogonal[j]) / length[j]
            orthogonal[k] -= mu[k, j] * orthogonal[j]
        length[k] = np.sum(orthogonal[k] * orthogonal[k])
        rest, i = np.sum(B[k] * B[k]), 0
        while i < k and rest >= DELTA * length[i]:
            rest -= mu[k, i] ** 2 * length[i]
            i += 1
        if i < k:  # move row k up to where it is shorter than the row there, and go on from there
            raise_row(B, k, i)
            raise_row(U, k, i)
        k = i if i < k else k + 1
    return U


@compiled
def raise_row(rows: Reals, k: int, i: int) -> None:
    """Move row k up to place i."""
    moved = rows[k].copy()
    rows[i + 1 : k + 1] = rows[i:k].copy()
    rows[i] = moved


# -- the compiled search ---------------------------------------------------------------------------


@compiled
def enter_level(tree: CodeTree, path: CodePath, k: int) -> None:
    """Prepare level k, the levels above it being decided."""
    n = len(tree.centre)
    shift = 0.0
    for j in range(k + 1, n):
        shift += tree.R[k, j] * (path.y[j] - tree.centre[j])
    path.middle[k] = tree.centre[k] - shift / tree.R[k, k]
    path.vertex[k] = path.middle[k] - tree.slope[k] / (2 * tree.R[k, k] ** 2)
    lowest, highest = tree.first[k], tree.last[k]
    for row in tree.rows[k, : tree.count[k]]:
        code = 0.0
        for j in range(k + 1, n):
            code += tree.U[row, j] * path.y[j]
        a = (tree.low[row, k] - code) / tree.U[row, k]
        b = (tree.high[row, k] - code) / tree.U[row, k]
        lowest = max(lowest, np.ceil(min(a, b)))
        highest = min(highest, np.floor(max(a, b)))
    path.lowest[k], path.highest[k] = lowest, highest
    down = min(np.floor(path.vertex[k]), highest)
    up = max(down + 1, lowest)
    path.down[k], path.up[k] = min(down, up - 1), up


@compiled
def cheapest_value(tree: CodeTree, path: CodePath, k: int) -> tuple[float, float]:
    """The next value to try at level k and the cost with it; infinite if there is none."""
    down, up = path.down[k], path.up[k]
    if down < path.lowest[k] and up > path.highest[k]:
        return 0.0, np.inf
    if down < path.lowest[k]:
        y = up
    elif up > path.highest[k]:
        y = down
    else:
        y = down if path.vertex[k] - down <= up - path.vertex[k] else up
    quadratic = (tree.R[k, k] * (y - path.middle[k])) ** 2
    return y, path.cost[k + 1] + quadratic + tree.slope[k] * (y - tree.centre[k])


@compiled
def search_codes(tree: CodeTree, path: CodePath, budget: int) -> tuple[bool, int]:
    """Visit up to `budget` nodes; whether the search is finished, and the nodes visited."""
    n, k = len(tree.centre), path.level[0]
    for visited in range(budget):
        y, cost = cheapest_value(tree, path, k)
        if not cost < path.threshold[0]:
            k += 1
            if k == n:
                return True, visited
            continue
        if y == path.up[k]:
            path.up[k] += 1
        else:
            path.down[k] -= 1
        path.y[k], path.cost[k] = y, cost
        if k == 0:
            path.best[:] = path.y
            path.threshold[0] = cost - TIE * (tree.base + cost)
        else:
            k -= 1
            enter_level(tree, path, k)
    path.level[0] = k
    return False, budget


@compiled
def least_open_cost(tree: CodeTree, path: CodePath) -> float:
    """The least cost of the nodes that have not been visited."""
    least = np.inf
    for k in range(path.level[0], len(tree.centre)):
        least = min(least, cheapest_value(tree, path, k)[1])
    return least
