"""One level per layer, of least total error within a budget: a multiple-choice knapsack.

SPDY (Frantar & Alistarh, arXiv 2201.13096), as used by OBC (arXiv 2208.11580).

    minimise  Σ_i e_i(l_i)   over levels l_1 … l_L   such that  Σ_i c_i(l_i) ≤ B

    symbol  variable  shape              meaning
    c_i     costs     L × (levels of i)  cost of layer i at each level, any unit, at least 0
    e_i     errors    L × (levels of i)  its error there, any sign; not finite: never chosen
    B       budget    ()                 in the unit of the costs
    K       buckets   ()                 steps of the discrete budget
    δ       bucket    ()                 what one step costs
    f       error     (K + R + 1,)       f(j) = least error of the layers so far at rounded cost j

Dynamic programming needs integer costs. The costs of all layers at their cheapest levels are spent
in any case, so only the rest of the budget, S = B − Σ_i min c_i, is divided into steps: δ = S/K,
which is finer than B/K, and the cheapest profile costs exactly 0 steps. Excess costs are rounded to
the *nearest* step, k_i(l) = round((c_i(l) − min c_i)/δ), and

    f_i(j) = min over l of  f_{i−1}(j − k_i(l)) + e_i(l)

is exact for these, for all j at once. The true cost of each profile is stored with f(j). The
profile that is returned is the best of all entries, including those above K, whose *true* cost is
within B; then single levels are raised as long as the remaining budget allows it.

Rounding to the nearest errs in both directions equally often, but a minimum prefers costs that were
rounded down: the lowest entries overspend and are passed over. Rounding up would never overspend,
but waste budget. With true costs, either ends within 10⁻⁴ of the errors' range above the optimum
(50 layers × 40 levels, K = 10,000). There, rounding to the nearest is about twice as close; below
K of about 500, rounding up is.

How far from the optimum can the result be? With R = Σ_i max over l of
(k_i(l) − (c_i(l) − min c_i)/δ), at most half a step per layer, every profile that truly fits costs
at most K + R steps, so none has an error below min f(j) over j ≤ K + R. `Choice.gap` is the
distance to that bound: it is not an estimate, and it is 0 where the choice is proved optimal.

Deviations from SPDY: only the excess over the cheapest profile is divided into buckets; profiles
are held to their true costs; the bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BUCKETS = 10_000
COST_ROUNDING = 1e-9  # relative; float64 sums of costs in another order differ by less


class OverBudget(Exception):
    """Even the cheapest profile costs more than the budget; `least` is its cost."""

    def __init__(self, least: float, budget: float) -> None:
        super().__init__(f"the cheapest choice costs {least:g}, more than the budget {budget:g}")
        self.least, self.budget = least, budget


class NoFiniteError(ValueError):
    """Layer number `layer` has no level with a finite error."""

    def __init__(self, layer: int) -> None:
        super().__init__(f"layer {layer} has no level with a finite error")
        self.layer = layer


@dataclass(frozen=True)
class Choice:
    """A level for every layer; costs in the unit of the budget."""

    levels: list[int]
    cost: float  # at most the budget
    error: float  # the objective
    gap: float  # due to discretisation: no choice within the budget has an error < error − gap
    slack: float  # budget − cost
    bucket: float  # δ


@dataclass(frozen=True)
class Frontier:
    """The levels of a layer worth choosing: error falls as cost rises."""

    levels: Ints  # (n,)
    costs: Floats  # (n,) rising
    errors: Floats  # (n,) falling

    @property
    def excess(self) -> Floats:  # (n,) above the cheapest
        return self.costs - self.costs[0]

    def first(self, count: int) -> Frontier:
        return Frontier(self.levels[:count], self.costs[:count], self.errors[:count])


def solve(
    costs: Sequence[ArrayLike],  # L × (levels,)
    errors: Sequence[ArrayLike],  # L × (levels,)
    budget: float,
    buckets: int = BUCKETS,
) -> Choice:
    """The choice of least error within `budget`, up to `Choice.gap`; of equals, the cheaper one.

    Raises OverBudget if nothing fits, NoFiniteError for a layer without a level to choose, and
    ValueError for costs that are negative or not finite, shapes that differ, or a NaN budget.
    """
    if len(costs) != len(errors):
        raise ValueError(f"costs of {len(costs)} layers, errors of {len(errors)}")
    if np.isnan(budget) or buckets < 1:
        raise ValueError(f"budget {budget} in {buckets} buckets")
    layers = [frontier(i, c, e) for i, (c, e) in enumerate(zip(costs, errors, strict=True))]
    least = fsum(layer.costs[0] for layer in layers)
    if least > budget:
        raise OverBudget(least, budget)
    spare = budget - least
    affordable = [
        layer.first(np.searchsorted(layer.excess, spare * (1 + COST_ROUNDING), "right"))
        for layer in layers
    ]
    bucket = min(spare, fsum(layer.excess[-1] for layer in affordable)) / buckets
    picks, lower, error = best_in_table(affordable, budget, bucket, buckets)
    picks, gained = spend_rest(affordable, picks, budget)
    cost = total_cost(affordable, picks)
    return Choice(
        levels=[int(layer.levels[p]) for layer, p in zip(affordable, picks, strict=True)],
        cost=cost,
        error=fsum(layer.errors[p] for layer, p in zip(affordable, picks, strict=True)),
        gap=max(0.0, error - gained - lower),
        slack=budget - cost,
        bucket=bucket,
    )


def frontier(number: int, costs: ArrayLike, errors: ArrayLike) -> Frontier:
    """A layer's levels without those that another level matches or beats in cost and error."""
    costs, errors = (np.asarray(values, dtype=np.float64) for values in (costs, errors))
    if costs.ndim != 1 or costs.shape != errors.shape:
        raise ValueError(f"layer {number}: costs {costs.shape}, errors {errors.shape}")
    if not (np.isfinite(costs) & (costs >= 0)).all():
        raise ValueError(f"layer {number}: a cost is negative or not finite")
    usable = np.flatnonzero(np.isfinite(errors))
    if not len(usable):
        raise NoFiniteError(number)
    order = usable[np.lexsort((errors[usable], costs[usable]))]
    before = np.minimum.accumulate(np.concatenate(([np.inf], errors[order][:-1])))
    levels = order[errors[order] < before]
    return Frontier(levels, costs[levels], errors[levels])


def total_cost(layers: Sequence[Frontier], picks: Sequence[int]) -> float:
    """The true cost, with a single rounding."""
    return fsum(layer.costs[p] for layer, p in zip(layers, picks, strict=True))


def best_in_table(
    layers: Sequence[Frontier], budget: float, bucket: float, buckets: int
) -> tuple[list[int], float, float]:
    """The best truly affordable profile in the table, the lower bound, and the profile's error."""
    if bucket == 0:  # nothing to spend: every layer at its cheapest
        error = fsum(layer.errors[0] for layer in layers)
        return [0] * len(layers), error, error
    steps = [np.rint(layer.excess / bucket) for layer in layers]
    rounded_up = fsum(
        (k - layer.excess / bucket).max() for k, layer in zip(steps, layers, strict=True)
    )
    width = int(buckets + rounded_up + 1e-6) + 1
    shifts = [k.astype(np.int64) for k in steps]
    error, excess, came_from = fill_table(layers, shifts, width)
    lower = float(error.min())
    spare = budget - fsum(layer.costs[0] for layer in layers)
    fits = np.flatnonzero(np.isfinite(error) & (excess <= spare + COST_ROUNDING * budget))
    for j in fits[np.lexsort((excess[fits], error[fits]))]:
        picks = backtrack(came_from, shifts, int(j))
        if total_cost(layers, picks) <= budget:
            return picks, lower, float(error[j])
    # There are so few buckets that every entry overspends. The cheapest profile fits.
    return [0] * len(layers), lower, fsum(layer.errors[0] for layer in layers)


def fill_table(
    layers: Sequence[Frontier],
    shifts: Sequence[Ints],  # k_i
    width: int,
) -> tuple[Floats, Floats, NDArray[np.int32]]:  # (width,), (width,), (L, width)
    """f, the true excess costs of its profiles, and the level that led to each entry."""
    error = np.full(width, np.inf)
    error[0] = 0.0
    excess = np.zeros(width)
    came_from = np.zeros((len(layers), width), dtype=np.int32)
    columns = np.arange(width)
    for layer, shift, pick in zip(layers, shifts, came_from, strict=True):
        following = np.full(width, np.inf)
        for level, (k, e) in enumerate(zip(shift.tolist(), layer.errors.tolist(), strict=True)):
            candidate = error[: width - k] + e
            better = candidate < following[k:]  # strictly: of equals, the cheaper level
            np.copyto(following[k:], candidate, where=better)
            np.copyto(pick[k:], level, where=better)
        # Unreachable entries keep level 0, whose shift is 0: no index is below 0.
        excess = excess[columns - shift[pick]] + layer.excess[pick]
        error = following
    return error, excess, came_from


def backtrack(came_from: NDArray[np.int32], shifts: Sequence[Ints], j: int) -> list[int]:
    """The picks that led to entry j of the last layer's table."""
    picks = []
    for pick, shift in zip(came_from[::-1], reversed(shifts), strict=True):
        picks.append(int(pick[j]))
        j -= int(shift[picks[-1]])
    return picks[::-1]


def spend_rest(
    layers: Sequence[Frontier], picks: Sequence[int], budget: float
) -> tuple[list[int], float]:
    """Raise one layer at a time, the largest gain first, while it fits; and the total gain."""
    picks, gained = list(picks), 0.0
    while True:
        slack = budget - total_cost(layers, picks)
        best = (0.0, 0, 0)
        for i, (layer, p) in enumerate(zip(layers, picks, strict=True)):
            top = int(np.searchsorted(layer.costs, layer.costs[p] + slack, "right")) - 1
            best = max(best, (float(layer.errors[p] - layer.errors[top]), i, top))
        gain, i, top = best
        raised = [*picks[:i], top, *picks[i + 1 :]]
        if gain <= 0 or total_cost(layers, raised) > budget:
            return picks, gained
        picks, gained = raised, gained + gain
