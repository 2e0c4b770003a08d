"""Quantising in a box: bounds, search and heuristics, against all possible codes and against SCS.

The oracle is exhaustive enumeration; the relaxation's is cvxpy with another solver, in other
coordinates. Compiling the searches takes most of the time here.
"""

from __future__ import annotations

import itertools

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import lsq_linear
from torch import nn

from pruning_vs_quantization import quantisation_bounds as bounds
from pruning_vs_quantization.layer_problem import QUANTISERS, quantised
from pruning_vs_quantization.proof import Reals, SearchLimits
from pruning_vs_quantization.quantisation_bounds import QuantisationProblem, babai, descend, obq
from pruning_vs_quantization.quantisation_search import closest, search_coordinates
from quant import Grid
from trueobs import TrueOBS

SIZES = [(2, 8), (3, 5), (4, 4), (8, 2)]  # bits, unknowns: up to 65,536 codes
KINDS = ("plain", "correlated", "ill-conditioned", "singular", "copies", "dead input")


def second_moment(kind: str, n: int, rng: np.random.Generator) -> Reals:  # (n, n)
    """Inputs as in real layers, and degenerate ones."""
    X = rng.standard_normal((200, n))
    if kind == "correlated":  # a large common part, rectified
        X = np.maximum(X + 2 * rng.standard_normal((200, 1)) + 1, 0)
    elif kind == "ill-conditioned":
        X = X[:, :1] + 10.0 ** np.linspace(0, -5, n) * X
    elif kind == "singular":
        X = X[:, : max(1, n // 2)] @ rng.standard_normal((max(1, n // 2), n))
    elif kind == "copies":
        X[:, -1] = X[:, 0]
    elif kind == "dead input":
        X[:, n // 2] = 0
    return X.T @ X / len(X)


def problem_of(kind: str, bits: int, n: int, seed: int, spread: float = 0.6) -> QuantisationProblem:
    """Weights of `spread` × the largest code, so that some lie outside of the box."""
    rng = np.random.default_rng([seed, bits, n])
    w = spread * 2 ** (bits - 1) * rng.standard_normal(n)
    G = second_moment(kind, n, rng)
    return QuantisationProblem.of(G, w, 1.0, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def all_errors(problem: QuantisationProblem) -> Reals:
    """f of every code in the box."""
    n, values = len(problem.t), problem.high - problem.low + 1
    z = np.indices((values,) * n).reshape(n, -1).T + problem.low - problem.t
    return (z @ problem.G * z).sum(1)


def in_box(problem: QuantisationProblem, z: Reals) -> bool:
    return bool((z == np.rint(z)).all() and (z >= problem.low).all() and (z <= problem.high).all())


# -- the search ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "n"), SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_search_finds_what_enumeration_finds(kind, bits, n):
    for seed in range(3):
        problem = problem_of(kind, bits, n, seed)
        least, size = all_errors(problem).min(), np.trace(problem.G)
        result = closest(problem, problem.nearest(), SearchLimits())
        assert result.finished and in_box(problem, result.solution)
        assert result.error == pytest.approx(problem.error(result.solution), abs=1e-12 * size)
        assert result.error == pytest.approx(least, rel=1e-6, abs=1e-9 * size)
        assert result.lower <= least * (1 + 1e-12) + 1e-14 * size
        if kind not in ("singular", "copies", "ill-conditioned"):
            assert result.proven


@pytest.mark.parametrize("spread", [0.05, 3.0])  # all near zero; most far outside of the box
def test_the_search_is_right_wherever_the_box_is(spread):
    for seed in range(4):
        problem = problem_of("correlated", 2, 8, seed, spread)
        start = np.full(8, float(problem.low))
        result = closest(problem, start, SearchLimits())
        assert result.proven
        assert result.error == pytest.approx(all_errors(problem).min(), rel=1e-9)


@pytest.mark.parametrize("nodes", [1, 7, 60, 500])
@pytest.mark.parametrize("kind", ["correlated", "singular"])
def test_a_search_that_stops_early_says_what_it_has_proved(kind, nodes):
    stopped = 0
    for seed in range(4):
        problem = problem_of(kind, 2, 8, seed)
        result = closest(problem, problem.nearest(), SearchLimits(nodes=nodes))
        least = all_errors(problem).min()
        assert result.nodes <= nodes and in_box(problem, result.solution)
        assert result.lower <= least * (1 + 1e-12) <= result.error * (1 + 1e-9)
        assert result.error <= problem.error(problem.nearest())
        stopped += not result.finished
    assert stopped or nodes == 500


def test_time_runs_out_as_well():
    problem = problem_of("singular", 8, 40, 0)  # 20 directions that cost nothing: hopeless
    result = closest(problem, problem.nearest(), SearchLimits(seconds=0.05))
    assert not result.finished and result.seconds < 5
    assert 0 <= result.lower <= result.error


def test_directions_that_cost_nothing_end_at_the_box():
    for seed in range(3):  # 8 of 16 directions; costs alone end after 10^8 nodes or never
        problem = problem_of("singular", 2, 16, seed)
        result = closest(problem, problem.nearest(), SearchLimits(nodes=3_000_000))
        assert result.finished and in_box(problem, result.solution)


@pytest.mark.parametrize("n", [1, 3])
def test_a_layer_without_live_inputs_needs_no_search(n):
    problem = QuantisationProblem.of(np.zeros((n, n)), np.ones(n), 0.3, -2, 1)
    result = closest(problem, problem.nearest(), SearchLimits())
    assert result.proven and result.error == 0
    relaxation = bounds.relax_codes(problem)
    assert relaxation.lower == 0
    drawn = bounds.randomised_rounding(problem, relaxation, 2, np.random.default_rng(0))
    assert in_box(problem, drawn)


@pytest.mark.parametrize("t", [0.3, -0.75, 5.5, -9.0])
def test_one_unknown_is_rounded_and_its_relaxation_is_tight(t):
    problem = QuantisationProblem(np.array([[2.0]]), np.array([t]), -2, 1)
    least = 2 * min((z - t) ** 2 for z in (-2, -1, 0, 1))
    assert closest(problem, np.array([-2.0]), SearchLimits()).error == pytest.approx(
        least, rel=1e-9
    )
    assert bounds.relax_codes(problem).lower == pytest.approx(least, rel=1e-4, abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(KINDS), st.sampled_from([2, 3, 4, 8]))
def test_bounds_and_solutions_stand_in_order_at_any_size(seed, kind, bits):
    rng = np.random.default_rng(seed)
    n = (1, 4, 11)[seed % 3]
    G, w = second_moment(kind, n, rng), rng.standard_normal(n) + 1e-3
    step = float(np.abs(w).max()) / 2 ** (bits - 1) * rng.uniform(0.3, 1.5)
    record = quantised(G, w, step, bits, bool(seed % 2), "both", SearchLimits(nodes=2000), rng)
    slack = 1e-9 * record.error + 1e-12 * np.trace(G) * float(w @ w)
    assert 0 <= record.relaxation <= record.error + slack
    assert record.lower <= record.error
    assert all(record.error <= error + slack for error in record.errors.values())
    assert set(QUANTISERS) < set(record.errors)


# -- the relaxation and its certificate ------------------------------------------------------------


def value_by_scs(problem: QuantisationProblem) -> float:
    """The relaxation by another solver, in coordinates of its own: the box is [−1, 1]ⁿ.

    SCS, a first-order method, is sensitive to scaling. Unscaled and with its acceleration it ends
    after a thousand steps or never, depending on the processor's last bits; so it runs without
    acceleration and on numbers of about 1, where it takes 550 to 2,500 steps.
    """
    n, middle = len(problem.t), (problem.low + problem.high) / 2
    half = (problem.high - problem.low) / 2
    root = np.linalg.cholesky(problem.G).T
    optimum = lsq_linear(root, root @ problem.t, (problem.low, problem.high), tol=1e-14).x
    origin = np.clip(np.floor(optimum + 1e-9), problem.low, problem.high - 1)
    scale = half**2 * np.trace(problem.G) / n
    G, t = half**2 * problem.G / scale, (problem.t - middle) / half
    Z = cp.Variable((n + 1, n + 1), PSD=True)
    squares, z = cp.diag(Z[:n, :n]), Z[:n, n]
    constraints = [Z[n, n] == 1, squares <= 1]
    for code in (origin - 1, origin, origin + 1):
        below, above = (code - middle) / half, (code + 1 - middle) / half
        constraints.append(squares >= cp.multiply(below + above, z) - below * above)
    objective = cp.sum(cp.multiply(G, Z[:n, :n])) - 2 * (G @ t) @ z + t @ G @ t
    program = cp.Problem(cp.Minimize(objective), constraints)
    value = program.solve(
        solver=cp.SCS, eps_abs=1e-8, eps_rel=1e-8, max_iters=50_000, acceleration_lookback=0
    )
    assert program.status == cp.OPTIMAL
    return scale * value


@pytest.mark.parametrize(("bits", "n"), [(2, 8), (3, 6)])
@pytest.mark.parametrize("kind", ["plain", "correlated"])
@pytest.mark.parametrize("seed", [0, 3])
def test_the_relaxation_is_that_of_another_solver(kind, bits, n, seed):
    problem = problem_of(kind, bits, n, seed)
    relaxation = bounds.relax_codes(problem)
    assert relaxation.value == pytest.approx(value_by_scs(problem), rel=1e-4)
    assert relaxation.value * (1 - 1e-4) <= relaxation.lower <= relaxation.value * (1 + 1e-6)


@pytest.mark.parametrize(("bits", "n"), SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_certified_bound_is_below_everything(kind, bits, n):
    problem = problem_of(kind, bits, n, seed=3)
    relaxation = bounds.relax_codes(problem)
    least, size = all_errors(problem).min(), np.trace(problem.G)
    assert 0 <= relaxation.lower <= least * (1 + 1e-12) + 1e-14 * size
    if kind in ("plain", "correlated"):
        assert relaxation.lower > 0.05 * least  # or it would say nothing


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(KINDS))
def test_no_multipliers_make_the_bound_wrong(seed, kind):
    rng = np.random.default_rng(seed)
    bits, n = (2, 5) if seed % 2 else (3, 3)
    problem = problem_of(kind, bits, n, seed % 1000)
    origin = np.clip(np.floor(problem.t), problem.low, problem.high - 1)
    size = np.trace(problem.G) * 10.0 ** rng.uniform(-4, 1)
    cuts, box = size * rng.standard_normal((n, 3)), size * rng.standard_normal(n)
    lower = bounds.quantisation_certificate(
        problem.G, problem.t - origin, problem.low - origin, problem.high - origin, cuts, box
    )
    assert 0 <= lower <= all_errors(problem).min() * (1 + 1e-12) + 1e-14 * np.trace(problem.G)


def test_a_solver_that_fails_leaves_a_bound_that_holds(monkeypatch):
    problem = problem_of("correlated", 2, 6, seed=0)

    def fail(*args, **options):
        raise cp.SolverError("gave up")

    bounds.relax_codes(problem)
    monkeypatch.setattr(bounds.code_program(6)[0], "solve", fail)
    relaxation = bounds.relax_codes(problem)
    assert 0 <= relaxation.lower <= all_errors(problem).min()
    drawn = bounds.randomised_rounding(problem, relaxation, 5, np.random.default_rng(0))
    assert in_box(problem, drawn)


# -- heuristics ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_descent_ends_where_no_single_step_gains(kind):
    problem = problem_of(kind, 3, 7, seed=5)
    z = descend(problem, np.stack([problem.nearest(), babai(problem)]))
    assert in_box(problem, z)
    for i, d in itertools.product(range(7), (-1, 1)):
        moved = z.copy()
        moved[i] += d
        assert not in_box(problem, moved) or problem.error(moved) > problem.error(z) - 1e-9


def test_babai_decides_one_weight_after_the_other_given_those_before():
    problem = problem_of("correlated", 3, 6, seed=2)
    G, t, fixed = problem.G, problem.t, np.empty(0)
    for p in range(6):  # the definition: the best real values of all that is still open
        open_ = slice(p, 6)
        pull = G[open_, :p] @ (fixed - t[:p])
        best = t[open_] - np.linalg.solve(G[open_, open_], pull)
        fixed = np.append(fixed, np.clip(np.rint(best[0]), problem.low, problem.high))
    assert babai(problem).tolist() == fixed.tolist()
    independent = QuantisationProblem(np.diag(np.arange(1.0, 7)), t, problem.low, problem.high)
    assert babai(independent, falling=True).tolist() == independent.nearest().tolist()


def test_obq_is_the_answer_of_the_toolkit():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 12, generator=generator) + torch.randn(300, 1, generator=generator)
    layer = nn.Linear(12, 1, bias=False)
    nn.init.normal_(layer.weight, generator=generator)
    w = layer.weight.detach()[0].double().numpy()
    solver = TrueOBS(layer)
    solver.add_batch(x)
    step = 0.25
    solver.quantizer = Grid(torch.full((1, 1), step), torch.full((1, 1), 4.0), 7)
    G = solver.H.numpy()
    solver.quantize()
    codes = (layer.weight.detach()[0].double() / step).round().tolist()
    assert obq(QuantisationProblem.of(G, w, step, -4, 3)).tolist() == codes


# -- parts of the search ---------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
def test_the_continuous_optimum_is_scipys(spread):
    for seed in range(10):
        problem = problem_of("correlated", 3, 9, seed, spread)
        root = np.linalg.cholesky(problem.G).T
        limits = (problem.low, problem.high)
        expected = lsq_linear(root, root @ problem.t, limits, tol=1e-14, method="bvls").x
        assert problem.error(problem.box_minimum()) == pytest.approx(
            problem.error(expected), rel=1e-7, abs=1e-9
        )


@pytest.mark.parametrize("held", [0, 3, 9])
def test_the_coordinates_of_the_search_are_integer_reduced_and_triangular(held):
    rng = np.random.default_rng(held)
    G = second_moment("ill-conditioned", 9, rng) + 1e-9 * np.eye(9)
    flags = np.arange(9) < held
    U, R = search_coordinates(G, flags)
    assert (U == np.rint(U)).all() and abs(np.linalg.det(U)) == pytest.approx(1)
    assert np.allclose(R, np.triu(R)) and (np.diagonal(R) > 0).all()
    np.testing.assert_allclose(R.T @ R, U.T @ G @ U, rtol=1e-7, atol=1e-9 * np.abs(G).max())
    assert np.abs(U[flags]).sum() == held  # not mixed with others
    free = R[: 9 - held, : 9 - held]
    mu = free / np.diagonal(free)[:, None] if held < 9 else free
    assert np.abs(np.triu(mu, 1)).max(initial=0) < 0.5 + 1e-6
    lengths = np.diagonal(free) ** 2
    for k in range(1, len(free)):  # Lovász
        assert lengths[k] + free[k - 1, k] ** 2 > 0.98 * lengths[k - 1]
