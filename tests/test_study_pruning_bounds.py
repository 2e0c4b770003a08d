"""The best subset of weights: bounds, search, heuristics; against all subsets, and against SCS."""

from __future__ import annotations

import itertools

import cvxpy as cp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import unstructured_oracle

from pruning_vs_quantization import pruning_bounds as bounds
from pruning_vs_quantization.layer_problem import PRUNERS, pruned
from pruning_vs_quantization.proof import Reals, SearchLimits
from pruning_vs_quantization.pruning_bounds import (
    CONDITION,
    PruningProblem,
    best_subset,
    exact_obs,
    magnitude,
    magnitude_least_squares,
)

SIZES = [(8, 4), (12, 6), (12, 3), (14, 2), (7, 0), (6, 6)]  # unknowns, of which kept
KINDS = ("plain", "correlated", "ill-conditioned", "dead input")
SINGULAR = ("low rank", "copies")


def problem_of(kind: str, n: int, keep: int, seed: int) -> PruningProblem:
    """Inputs as in real layers, and degenerate ones; no ridge."""
    rng = np.random.default_rng([seed, n, keep])
    X = rng.standard_normal((200, n))
    if kind == "correlated":  # a large common part, rectified
        X = np.maximum(X + 2 * rng.standard_normal((200, 1)) + 1, 0)
    elif kind == "ill-conditioned":
        X = X[:, :1] + 3e-3 * X
    elif kind == "low rank":
        X = X[:, : n // 2] @ rng.standard_normal((n // 2, n))
    elif kind == "copies":
        X[:, -1] = X[:, 0]
    elif kind == "dead input":
        X[:, n // 2] = 0
    return PruningProblem(X.T @ X / len(X), rng.standard_normal(n), keep)


def least_error(problem: PruningProblem) -> float:
    """Least squares on every subset, by QR of a square root of G."""
    values, vectors = np.linalg.eigh(problem.G)
    root = np.sqrt(np.maximum(values, 0))[:, None] * vectors.T
    target, least = root @ problem.w, np.inf
    for kept in itertools.combinations(range(len(problem.w)), problem.keep):
        columns = root[:, kept]
        fitted = columns @ np.linalg.lstsq(columns, target, rcond=1e-13)[0] if kept else 0.0
        least = min(least, float(np.square(target - fitted).sum()))
    return least


def fits(problem: PruningProblem, weights: Reals) -> bool:
    return int(np.count_nonzero(weights)) <= problem.keep


# -- the search ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "keep"), SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_search_finds_what_enumeration_finds(kind, n, keep):
    for seed in range(2):
        problem = problem_of(kind, n, keep, seed)
        least, signal = least_error(problem), problem.error(np.zeros(n))
        result = best_subset(problem, magnitude(problem), SearchLimits())
        assert result.finished and result.proven or least < 1e-12 * signal
        assert fits(problem, result.solution)
        assert result.error == pytest.approx(problem.error(result.solution), abs=1e-14 * signal)
        assert result.error == pytest.approx(least, rel=1e-8, abs=1e-12 * signal)
        assert result.lower <= least * (1 + 1e-9) + 1e-12 * signal


@pytest.mark.parametrize("keep", [2, 4, 8])  # of 2, 4 and 8 bits' worth
@pytest.mark.parametrize("kind", ["plain", "correlated"])
def test_sixteen_unknowns_against_all_their_subsets(kind, keep):
    problem = problem_of(kind, 16, keep, seed=5)
    gone = np.array(list(itertools.combinations(range(16), 16 - keep)))
    A, w = np.linalg.inv(problem.G), problem.w[gone]
    blocks = A[gone[:, :, None], gone[:, None, :]]  # loss of P: w_P (A_PP)⁻¹ w_Pᵀ
    losses = (w * np.linalg.solve(blocks, w[:, :, None])[:, :, 0]).sum(1)
    result = best_subset(problem, magnitude(problem), SearchLimits())
    assert result.proven and result.error == pytest.approx(losses.min(), rel=1e-9)
    assert np.flatnonzero(result.solution == 0).tolist() == gone[losses.argmin()].tolist()


@pytest.mark.parametrize("kind", SINGULAR)
def test_without_a_ridge_singular_inputs_prove_nothing_wrong(kind):
    problem = problem_of(kind, 10, 4, seed=0)
    result = best_subset(problem, magnitude(problem), SearchLimits())
    least, signal = least_error(problem), problem.error(np.zeros(10))
    assert result.lower <= least + 1e-12 * signal and least <= result.error + 1e-12 * signal
    assert bounds.relax_subset(problem).lower <= least + 1e-12 * signal


@pytest.mark.parametrize("kind", SINGULAR)
def test_with_a_ridge_singular_inputs_are_a_problem_like_others(kind):
    raw = problem_of(kind, 10, 4, seed=0)
    problem = PruningProblem.of(raw.G, raw.w, 0.6)
    assert problem.keep == 4 and 0 < problem.ridge <= 10 / CONDITION
    result = best_subset(problem, exact_obs(problem), SearchLimits())
    assert result.proven
    assert result.error == pytest.approx(least_error(problem), rel=1e-6)
    assert problem_of("plain", 10, 4, 0).ridge == 0


@pytest.mark.parametrize("nodes", [1, 5, 30])
def test_a_search_that_stops_early_says_what_it_has_proved(nodes):
    stopped = 0
    for seed in range(4):
        problem = problem_of("correlated", 10, 5, seed)
        start = magnitude(problem)
        result = best_subset(problem, start, SearchLimits(nodes=nodes))
        least = least_error(problem)
        assert result.nodes <= nodes and fits(problem, result.solution)
        assert result.lower <= least * (1 + 1e-9)
        assert least * (1 - 1e-9) <= result.error <= problem.error(start)
        stopped += not result.finished
    assert stopped


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(KINDS + SINGULAR), st.integers(2, 8))
def test_bounds_and_solutions_stand_in_order_at_any_size(seed, kind, bits):
    n = (2, 5, 9)[seed % 3]
    raw = problem_of(kind, n, 0, seed)
    record = pruned(raw.G, raw.w, bits, "both", SearchLimits(nodes=500))
    slack = 1e-9 * record.error + 1e-11 * record.signal
    assert 0 <= record.relaxation <= record.error + slack
    assert record.lower <= record.error
    assert all(record.error <= error + slack for error in record.errors.values())
    assert set(PRUNERS) < set(record.errors)
    assert sum(weight != 0 for weight in record.solution) <= n * bits // 16 + (kind == "dead input")


# -- the relaxation and its certificate ------------------------------------------------------------


def value_by_scs(problem: PruningProblem) -> float:
    """The relaxation as it is written down, by another solver."""
    n, G, w = len(problem.w), problem.G, problem.w
    Z, share = cp.Variable((n + 1, n + 1), PSD=True), cp.Variable(n)
    constraints = [Z[n, n] == 1, share >= 0, share <= 1, cp.sum(share) <= problem.keep]
    for i in range(n):
        block = cp.bmat([[Z[i, i], Z[i, n]], [Z[i, n], share[i]]])
        constraints.append(block >> 0)
    objective = cp.sum(cp.multiply(G, Z[:n, :n])) - 2 * (G @ w) @ Z[:n, n] + w @ G @ w
    return cp.Problem(cp.Minimize(objective), constraints).solve(
        solver=cp.SCS, eps_abs=1e-7, eps_rel=1e-7, max_iters=50_000
    )


@pytest.mark.parametrize(("n", "keep"), [(6, 3), (8, 2)])
def test_the_relaxation_is_that_of_another_solver(n, keep):
    problem = problem_of("correlated", n, keep, seed=1)
    relaxation = bounds.relax_subset(problem)
    assert relaxation.value == pytest.approx(value_by_scs(problem), rel=1e-4)
    assert relaxation.value * (1 - 1e-3) <= relaxation.lower <= relaxation.value * (1 + 1e-6)
    assert fits(problem, problem.refitted(problem.largest(relaxation.share)))


@pytest.mark.parametrize(("n", "keep"), [(8, 4), (12, 3), (7, 0), (6, 6)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_certified_bound_is_below_everything(kind, n, keep):
    problem = problem_of(kind, n, keep, seed=3)
    least, lower = least_error(problem), bounds.relax_subset(problem).lower
    assert 0 <= lower <= least * (1 + 1e-9) + 1e-12 * problem.error(np.zeros(n))
    if kind == "plain" and keep < n:
        assert lower >= 0.2 * least  # or it would say nothing


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(KINDS + SINGULAR))
def test_no_multipliers_make_the_bound_wrong(seed, kind):
    rng = np.random.default_rng(seed)
    problem = problem_of(kind, 6, int(rng.integers(0, 6)), seed % 100)
    size = 10.0 ** rng.uniform(-4, 1)
    d, u = size * rng.standard_normal(6), rng.standard_normal(6) * rng.choice([0, 0.1, 1])
    lower = bounds.pruning_certificate(problem.G, problem.w, problem.keep, d, u)
    assert 0 <= lower <= least_error(problem) * (1 + 1e-9) + 1e-12 * problem.error(np.zeros(6))


# -- heuristics ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_refitted_weights_are_the_best_on_their_places(kind):
    problem = problem_of(kind, 9, 4, seed=2)
    kept = np.arange(9) % 2 == 0
    weights = problem.refitted(kept)
    assert not weights[~kept].any()
    gradient = problem.G @ (weights - problem.w)
    assert np.abs(gradient[kept]).max() < 1e-9 * np.abs(problem.G).max()


def test_exact_obs_keeps_what_the_textbook_keeps():
    for seed in range(5):
        problem = problem_of("correlated", 10, 4, seed)
        trace = unstructured_oracle(problem.w, problem.G)
        kept = np.ones(10, dtype=bool)
        kept[trace.order[:6]] = False
        np.testing.assert_allclose(exact_obs(problem), problem.refitted(kept), atol=1e-9)


def test_magnitude_keeps_the_largest_weights():
    problem = PruningProblem(np.diag([1.0, 1, 1, 0, 1]), np.array([3.0, -4, 1, 9, 2]), 2)
    assert magnitude(problem).tolist() == [3, -4, 0, 0, 0]  # 9 has no input: it is not needed
    assert magnitude_least_squares(problem).tolist() == [3, -4, 0, 0, 0]
