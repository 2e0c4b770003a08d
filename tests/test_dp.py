"""dp.py against exhaustive search and against an integer programme."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_diag

from obc.solver import dp

TOLERANCE = 1e-9  # for sums of errors in a different order


# ------------------------------------------------------------------------------- oracles


def brute_force(costs, errors, budget):
    """(least error, its least cost) over all profiles within the budget; None if there is none."""
    best = None
    for picks in itertools.product(*(range(len(c)) for c in costs)):
        cost = math.fsum(c[p] for c, p in zip(costs, picks, strict=True))
        error = math.fsum(e[p] for e, p in zip(errors, picks, strict=True))
        if cost <= budget and math.isfinite(error):
            best = min(best or (math.inf, 0.0), (error, cost))
    return best


def integer_programme(costs, errors, budget):
    """A lower bound on the least error, and an error that a profile reaches."""
    one_level = LinearConstraint(block_diag([np.ones((1, len(c))) for c in costs]), 1, 1)
    within = LinearConstraint(np.concatenate(costs)[None], -np.inf, budget)
    found = milp(
        np.concatenate(errors),
        integrality=1,
        bounds=Bounds(0, 1),
        constraints=[one_level, within],
        options={"mip_rel_gap": 1e-8, "time_limit": 30},
    )
    return found.mip_dual_bound, found.fun


def check(choice, costs, errors, budget):
    """Properties of every choice, for any number of buckets."""
    assert len(choice.levels) == len(costs)
    assert choice.cost == math.fsum(c[p] for c, p in zip(costs, choice.levels, strict=True))
    assert choice.error == math.fsum(e[p] for e, p in zip(errors, choice.levels, strict=True))
    assert choice.cost <= budget  # no tolerance
    assert choice.slack == budget - choice.cost
    assert 0 <= choice.gap < math.inf


# ------------------------------------------------------------------------------- random instances


whole = st.integers(0, 20).map(float)
costs_of_a_layer = whole | st.floats(0, 100) | st.floats(0, 1e-6)
errors_of_a_layer = st.integers(-3, 3).map(float) | st.floats(-10, 10) | st.just(math.inf)
layer = st.lists(st.tuples(costs_of_a_layer, errors_of_a_layer), min_size=1, max_size=5)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(layer, min_size=1, max_size=4),
    st.floats(0, 1.2),
    st.integers(1, 40) | st.just(dp.BUCKETS),
)
def test_within_the_printed_error_of_exhaustive_search(layers, share, buckets):
    costs = [[c for c, _ in levels] for levels in layers]
    errors = [[e for _, e in levels] for levels in layers]
    budget = share * math.fsum(max(c) for c in costs)
    if not all(any(map(math.isfinite, e)) for e in errors):
        with pytest.raises(dp.NoFiniteError):
            dp.solve(costs, errors, budget, buckets)
        return
    best = brute_force(costs, errors, budget)
    if best is None:
        with pytest.raises(dp.OverBudget) as caught:
            dp.solve(costs, errors, budget, buckets)
        least = math.fsum(min(c for c, e in levels if math.isfinite(e)) for levels in layers)
        assert caught.value.least == least > budget
        assert dp.solve(costs, errors, least, buckets).cost == least
        return
    choice = dp.solve(costs, errors, budget, buckets)
    check(choice, costs, errors, budget)
    assert best[0] - TOLERANCE <= choice.error <= best[0] + choice.gap + TOLERANCE


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 30), st.integers(-5, 5)), min_size=2, max_size=4),
        min_size=1,
        max_size=4,
    ),
    st.integers(1, 60),
)
def test_exact_and_cheapest_where_every_cost_is_whole_buckets(layers, spare):
    costs = [np.array([c for c, _ in levels], float) for levels in layers]
    errors = [np.array([e for _, e in levels], float) for levels in layers]
    least = sum(c.min() for c in costs)
    # A first layer with nothing to choose but whether to spend all there is: δ is 1 exactly.
    costs.append(np.array([0.0, spare]))
    errors.append(np.array([0.0, -100.0]))
    choice = dp.solve(costs, errors, least + spare, buckets=spare)
    check(choice, costs, errors, least + spare)
    assert choice.gap == 0
    assert (choice.error, choice.cost) == brute_force(costs, errors, least + spare)


def geometric(rng):
    """Costs like those of a sparse database; errors grow with sparsity, not quite convexly."""
    density = 0.9 ** np.arange(40)
    costs = [size * density for size in rng.lognormal(0, 1.5, 50)]
    errors = [
        scale * (1 - density) ** rng.uniform(1, 4) + rng.normal(0, 1e-4, 40)
        for scale in rng.lognormal(-3, 1, 50)
    ]
    return costs, errors


def unordered(rng):
    """Unrelated costs and errors, errors of any sign."""
    return list(rng.random((50, 40))), list(rng.normal(size=(50, 40)))


def convex(rng):
    """Every level is optimal at some price: the hardest case for rounding."""
    x = np.sort(rng.random((50, 40)))
    return list(x * rng.lognormal(0, 1, (50, 1))), list((1 - x) ** 2)


@pytest.mark.parametrize("buckets", [100, 1000, dp.BUCKETS])
@pytest.mark.parametrize("make", [geometric, unordered, convex])
def test_50_layers_of_40_levels_against_an_integer_programme(make, buckets):
    rng = np.random.default_rng(buckets)
    costs, errors = make(rng)
    least, most = (math.fsum(f(c) for c in costs) for f in (min, max))
    budget = least + rng.uniform(0.1, 0.5) * (most - least)
    bound, reached = integer_programme(costs, errors, budget)
    choice = dp.solve(costs, errors, budget, buckets)
    check(choice, costs, errors, budget)
    assert bound - 1e-6 <= choice.error <= reached + choice.gap + 1e-6
    if buckets == dp.BUCKETS:
        spread = math.fsum(e.max() - e.min() for e in errors)
        assert choice.error - reached < 1e-4 * spread and choice.gap < 1e-3 * spread


# ------------------------------------------------------------------------------- particular ones


def test_a_budget_below_a_profile_by_the_last_bit():
    budget = math.nextafter(1.0, 0)
    choice = dp.solve([[0.0, 0.1]] * 10, [[1.0, 0.0]] * 10, budget)  # ten times 0.1 add up to 1.0
    assert choice.error == 1 and choice.cost < budget


def test_the_budget_that_rounding_leaves_is_spent():
    # With one bucket of 10, costs of up to 5 round to 0: nothing in the table fits.
    choice = dp.solve([[0.0, 4.0]] * 5, [[1.0, 0.0]] * 5, 10.0, buckets=1)
    assert choice.cost == 8 and choice.error == 3 and choice.gap >= 0


@pytest.mark.parametrize("budget", [0.0, 5.0, math.inf])
def test_levels_that_cost_nothing_or_the_same(budget):
    choice = dp.solve([[0.0, 0.0, 0.0], [0.0]], [[3.0, 1.0, 2.0], [7.0]], budget)
    assert choice.levels == [1, 0] and choice.error == 8 and choice.gap == 0 and choice.cost == 0


def test_a_budget_that_is_spent_to_the_last_bit():
    costs = [[0.1, 0.3], [0.2, 0.9], [0.3, 0.3]]
    budget = math.fsum([0.3, 0.2, 0.3])
    choice = dp.solve(costs, [[1.0, 0.0], [1.0, 0.5], [1.0, 0.0]], budget)
    assert choice.levels == [1, 0, 1] and choice.cost == budget and choice.slack == 0
    below = math.nextafter(math.fsum([0.1, 0.2, 0.3]), 0)
    with pytest.raises(dp.OverBudget):
        dp.solve(costs, [[1.0, 0.0]] * 3, below)


def test_of_equal_errors_the_cheaper_level_is_chosen():
    choice = dp.solve([[4.0, 1.0, 2.0]] * 2, [[-1.0, -1.0, -1.0]] * 2, 8.0)
    assert choice.levels == [1, 1] and choice.cost == 2 and choice.error == -2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_level_without_a_finite_error_is_never_chosen(bad):
    choice = dp.solve([[1.0, 5.0]], [[bad, 0.0]], 10.0)
    assert choice.levels == [1]
    with pytest.raises(dp.OverBudget) as caught:
        dp.solve([[1.0, 5.0]], [[bad, 0.0]], 2.0)
    assert caught.value.least == 5
    with pytest.raises(dp.NoFiniteError, match="layer 1"):
        dp.solve([[1.0], [1.0, 1.0]], [[0.0], [bad, bad]], 10.0)


@pytest.mark.parametrize(
    ("costs", "errors", "budget"),
    [
        ([[1.0]], [[1.0], [1.0]], 1.0),
        ([[1.0, 2.0]], [[1.0]], 1.0),
        ([[-1.0]], [[1.0]], 1.0),
        ([[math.inf]], [[1.0]], 1.0),
        ([[1.0]], [[1.0]], math.nan),
    ],
)
def test_invalid_inputs_are_refused(costs, errors, budget):
    with pytest.raises(ValueError):
        dp.solve(costs, errors, budget)


def test_inputs_are_not_changed():
    costs, errors = [np.array([3.0, 1.0])], [np.array([0.0, math.nan])]
    dp.solve(costs, errors, 5.0)
    assert costs[0].tolist() == [3.0, 1.0] and errors[0][0] == 0 and math.isnan(errors[0][1])
