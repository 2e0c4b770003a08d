"""The best codes, with a proof: branch and bound for integer least squares in a box.

Schnorr and Euchner's enumeration (1994; Agrell et al. 2002) with the box and its multipliers. Let
z* be the optimum over the box of real numbers (box.py) and g = 2G(z* − t) its gradient; g_i ≥ 0
where z*_i = low, g_i ≤ 0 where z*_i = high ("held"), and 0 elsewhere. Then for all z in the box

    f(z) = f(z*) + ‖Lᵀ(z − z*)‖² + gᵀ(z − z*)        every g_i (z_i − z*_i) ≥ 0        G = LLᵀ

In the coordinates of lattice.py, z = z₀ + U y, with R upper triangular,

    f = f(z*) + Σ_k cost_k,     cost_k = R_kk² (y_k − c_k)² + slope_k (y_k − y*_k)  ≥ 0
    c_k = y*_k − Σ_{j>k} R_kj (y_j − y*_j) / R_kk

so that deciding y_n, y_{n−1}, … only ever adds to f: what has been added is a node's bound. At each
level values are tried in order of rising cost, from the vertex of the parabola outwards, so that
the first one too dear ends the level. The search starts from the best codes that are known and
prunes by their error from the first node on.

Which values there are to try. The box bounds every y: y = U⁻¹(z − z₀), entry by entry between the
least and the largest that z can give. And each row i of U bounds y_k given the decisions above k,

    low_i − z₀_i  ≤  Σ_{j>k} U_ij y_j + U_ik y_k + Σ_{j<k} U_ij y_j  ≤  high_i − z₀_i

with the last sum anywhere between its own bounds. Where G is singular, costs alone would let whole
directions go on for ever.

What the bound allows for. With D² the largest squared distance that z may have from t or z*,

* G is singular or nearly so (least eigenvalue below SINGULAR × the largest): the search uses
  G + ρI, ρ = SINGULAR × the largest, and f is smaller than what it sees by at most ρD²;
* rounding in R and in the costs: 4nε·tr(G)·D²;
* the gradient of coordinates that are not held is not exactly zero: what it could gain in the box.

D² is that of the whole box, or, where G is not singular, (error of the start) / (least eigenvalue).

    symbol  variable  shape   meaning
    z₀      origin    (n,)    codes of y = 0
    y*      centre    (n,)    continuous optimum
            slope     (n,)    gradient of the levels held, else 0
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pruning_vs_quantization.box import box_minimum
from pruning_vs_quantization.lattice import coordinates
from pruning_vs_quantization.proof import TIE, Flags, Found, Limits, Reals, compiled, in_slices
from pruning_vs_quantization.quantisation_problem import QuantisationProblem

SINGULAR = 1e-12
INTEGERS = 2.0**53  # below, floating point is exact on them
FAR = 2.0**60  # a bound that bounds nothing
EPS = float(np.finfo(np.float64).eps)
Integers = npt.NDArray[np.int64]


class Tree(NamedTuple):
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


class Path(NamedTuple):
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


def closest(problem: QuantisationProblem, start: Reals, limits: Limits) -> Found:
    """The codes in the box of least error, or the best until a limit was reached.

    `start` are any codes in the box; the better they are, the shorter the search.
    """
    live = problem.live()
    if not live.any():
        return Found(start, problem.error(start), 0.0, True, 0, 0.0)
    small, codes = problem.part(live), start[live]
    tree, origin = make_tree(small, codes)
    path = start_of(tree, small.error(codes) - tree.base)
    finished, nodes, seconds = in_slices(lambda budget: advance(tree, path, budget), limits)
    if np.isfinite(path.best[0]):
        found = np.rint(origin + tree.U @ path.best)
        if small.error(found) < small.error(codes):
            codes = found
    least = path.threshold[0] if finished else min(path.threshold[0], open_cost(tree, path))
    solution = problem.nearest()
    solution[live] = codes
    error = problem.error(solution)
    lower = min(max(0.0, tree.base + float(least)), error)
    return Found(solution, error, lower, finished, nodes, seconds)


def make_tree(
    problem: QuantisationProblem,  # without dead inputs
    start: Reals,  # (n,) codes in the box
) -> tuple[Tree, Reals]:  # and the origin (n,)
    """Coordinates, centre and slopes of the search."""
    n = len(start)
    eigenvalues = np.linalg.eigvalsh(problem.G)
    singular = eigenvalues[0] < SINGULAR * eigenvalues[-1]
    ridge = SINGULAR * float(eigenvalues[-1]) if singular else 0.0
    ridged = QuantisationProblem(
        problem.G + ridge * np.eye(n), problem.t, problem.low, problem.high
    )
    optimum = box_minimum(ridged)
    gradient = 2 * ridged.G @ (optimum - problem.t)
    held = _held(problem, optimum, gradient)
    reach = np.maximum(optimum - problem.low, problem.high - optimum)
    loose = float(np.abs(np.where(held, 0, gradient)) @ reach)
    t_reach = np.maximum(np.abs(problem.low - problem.t), np.abs(problem.high - problem.t))
    distance = float(np.square(np.maximum(reach, t_reach)).sum())
    if not singular:
        distance = min(distance, 4 * problem.error(start) / float(eigenvalues[0]))
    allowed = loose + (ridge + 4 * n * EPS * float(np.trace(problem.G))) * distance
    excess = max(0.0, problem.error(start) - ridged.error(optimum))
    U, R = coordinates(ridged.G, held, excess / (problem.high - problem.low) ** 2)
    origin = np.rint(optimum)
    tree = Tree(
        R=R,
        centre=np.linalg.solve(U, optimum - origin),
        slope=U.T @ np.where(held, gradient, 0),
        U=U,
        **_ranges(U, problem.low - origin, problem.high - origin),
        base=ridged.error(optimum) - allowed,
    )
    return tree, origin


def _held(problem: QuantisationProblem, optimum: Reals, gradient: Reals) -> Flags:  # (n,)
    """Coordinates at a side of the box that would be outside without it."""
    at_low = (optimum <= problem.low) & (gradient > 0)
    return at_low | ((optimum >= problem.high) & (gradient < 0))


def _ranges(
    U: Reals,  # (n, n)
    low: Reals,  # (n,) codes, counted from the origin
    high: Reals,  # (n,)
) -> dict[str, Reals | Integers]:
    """What the box says of decisions: the tree's first, last, low, high, rows and count."""
    first, last = np.full(len(U), -FAR), np.full(len(U), FAR)
    inverse = np.rint(np.linalg.inv(U))  # unimodular: integers
    exact = (np.abs(U) @ np.abs(inverse)).max() < INTEGERS
    if exact and (U @ inverse == np.eye(len(U))).all():
        first, last = (sums[:, -1] for sums in _sums(inverse, low, high))
    least, largest = _sums(U, first, last)
    used = U != 0
    return {
        "first": first,
        "last": last,
        "low": low[:, None] - largest[:, :-1],
        "high": high[:, None] - least[:, :-1],
        "rows": np.argsort(~used.T, axis=1, kind="stable"),
        "count": used.sum(0),
    }


def _sums(
    M: Reals,  # (m, n)
    low: Reals,  # (n,)
    high: Reals,  # (n,)
) -> tuple[Reals, Reals]:  # (m, n + 1) each
    """The least and the largest that the first k columns of M add up to, on a box."""
    ends = np.stack([M * low, M * high])
    zero = np.zeros((len(M), 1))
    least, largest = (np.cumsum(part, 1) for part in (ends.min(0), ends.max(0)))
    return np.hstack([zero, least]), np.hstack([zero, largest])


def start_of(tree: Tree, allowance: float) -> Path:
    """The path at the root; `allowance` is what the best known codes cost above the base."""
    n = len(tree.centre)
    path = Path(
        *(np.zeros(n if name != "cost" else n + 1) for name in Path._fields[:8]),
        best=np.full(n, np.nan),
        threshold=np.array([allowance - TIE * (tree.base + allowance)]),
        level=np.array([n - 1]),
    )
    enter(tree, path, n - 1)
    return path


# -- the compiled search ---------------------------------------------------------------------------


@compiled
def enter(tree: Tree, path: Path, k: int) -> None:
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
def cheapest(tree: Tree, path: Path, k: int) -> tuple[float, float]:
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
def advance(tree: Tree, path: Path, budget: int) -> tuple[bool, int]:
    """Visit up to `budget` nodes; whether the search is finished, and the nodes visited."""
    n, k = len(tree.centre), path.level[0]
    for visited in range(budget):
        y, cost = cheapest(tree, path, k)
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
            enter(tree, path, k)
    path.level[0] = k
    return False, budget


@compiled
def open_cost(tree: Tree, path: Path) -> float:
    """The least cost of the nodes that have not been visited."""
    least = np.inf
    for k in range(path.level[0], len(tree.centre)):
        least = min(least, cheapest(tree, path, k)[1])
    return least
