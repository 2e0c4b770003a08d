"""Choices of layers whose costs depend on each other's levels, as one choice of a knapsack.

Where a level cuts channels, it makes two layers cheaper: the one that reads them, and the one that
computes them. A layer's cost is then a table over its own level and those of some others, its
scope. Layers that are linked by scopes form a unit; its options are all combinations of its layers'
levels, of which only those matter that no other beats in both cost and error. `dp.py` chooses an
option for each unit.

    symbol  variable  shape
    c_i     costs[i]  levels of the layers in scopes[i], an axis each; the first is i itself
    e_i     errors[i] levels of i

Options grow layer by layer, in order, and are weeded as they do: of those that agree in the levels
that tables yet to come depend on, only the undominated ones stay, at most MOST for each such
combination (the best in as many classes of cost), so that long chains stay tractable. Without that
limit, which units of two layers do not reach in practice, nothing is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from obc.solver import dp

MOST = 300  # options for each combination of levels that matter later

Scopes = Sequence[tuple[int, ...]]


@dataclass(frozen=True)
class Options:
    """The combinations of a unit's levels that are worth choosing."""

    picks: np.ndarray  # (n, layers of the unit)
    costs: np.ndarray  # (n,)
    errors: np.ndarray  # (n,)

    def __getitem__(self, chosen: np.ndarray) -> Options:
        return Options(self.picks[chosen], self.costs[chosen], self.errors[chosen])


def units(scopes: Scopes) -> list[list[int]]:
    """Layers by number, those that are linked by scopes together; each ascending."""
    unit_of = list(range(len(scopes)))
    for scope in scopes:
        linked = {unit_of[layer] for layer in scope}
        unit_of = [min(linked) if unit in linked else unit for unit in unit_of]
    return [[i for i, u in enumerate(unit_of) if u == unit] for unit in sorted(set(unit_of))]


def unit_options(
    unit: Sequence[int],
    scopes: Scopes,
    costs: Sequence[np.ndarray],
    errors: Sequence[np.ndarray],  # not finite: never chosen
) -> Options:
    """The options of a unit. Raises dp.NoFiniteError for a layer without a level to choose."""
    place = {layer: index for index, layer in enumerate(unit)}
    options = Options(np.zeros((1, 0), int), np.zeros(1), np.zeros(1))
    for known, layer in enumerate(unit, 1):
        usable = np.flatnonzero(np.isfinite(errors[layer]))
        if not len(usable):
            raise dp.NoFiniteError(layer)
        many, few = len(options.costs), len(usable)
        new = np.tile(usable, many)[:, None]
        picks = np.hstack([np.repeat(options.picks, few, axis=0), new])
        cost = np.repeat(options.costs, few)
        for other in unit:
            places = [place[x] for x in scopes[other]]
            if max(places) == known - 1:  # the last level that this table depends on
                cost = cost + costs[other][tuple(picks[:, x] for x in places)]
        error = np.repeat(options.errors, few) + errors[layer][new[:, 0]]
        waiting = {
            place[x] for i in unit if max(place[y] for y in scopes[i]) >= known for x in scopes[i]
        }
        matter = sorted(x for x in waiting if x < known)
        options = weeded(Options(picks, cost, error), matter)
    return options


def weeded(options: Options, matter: Sequence[int]) -> Options:
    """The undominated ones, among those with the same levels of the layers that matter."""
    keys = options.picks[:, matter]
    _, group = np.unique(keys, axis=0, return_inverse=True) if matter else (None, None)
    group = np.zeros(len(keys), int) if group is None else group.ravel()
    order = np.lexsort((options.errors, options.costs, group))
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    kept = []
    for rows in np.split(order, starts[1:]):
        errors = options.errors[rows]
        before = np.minimum.accumulate(np.concatenate(([np.inf], errors[:-1])))
        rows = rows[errors < before]
        if len(rows) > MOST:  # of each class of cost, the last, which has the least error
            costs = options.costs[rows]
            classes = np.ceil((costs - costs[0]) / (costs[-1] - costs[0]) * (MOST - 1))
            rows = rows[np.diff(classes, append=np.inf) > 0]  # the cheapest is alone in its own
        kept.append(rows)
    return options[np.concatenate(kept)]


def solve_jointly(
    scopes: Scopes,
    costs: Sequence[np.ndarray],
    errors: Sequence[np.ndarray],
    budget: float,
    buckets: int = dp.BUCKETS,
) -> dp.Choice:
    """As `dp.solve`, for costs over scopes; the levels are those of layers."""
    groups = units(scopes)
    options = [unit_options(unit, scopes, costs, errors) for unit in groups]
    choice = dp.solve([x.costs for x in options], [x.errors for x in options], budget, buckets)
    levels = [0] * len(scopes)
    for unit, one, pick in zip(groups, options, choice.levels, strict=True):
        for layer, level in zip(unit, one.picks[pick], strict=True):
            levels[layer] = int(level)
    return replace(choice, levels=levels)
