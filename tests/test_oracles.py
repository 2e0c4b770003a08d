"""The oracles against each other and against brute force that uses neither A nor its updates.

Every pruning step of OBS is the best single step: with P gone the row is the least-squares optimum,
and e_p^2 / (2 A_pp) is by how much that optimum grows when p goes as well.  So a greedy search over
``masked_least_squares`` must find the same orders and losses without any inverse.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from oracles import (
    Array,
    OracleTrace,
    asymmetric_grid_oracle,
    block_oracle,
    conv_columns_oracle,
    decouple_dead,
    global_selection_oracle,
    hessian_oracle,
    masked_least_squares,
    nm_oracle,
    quantise_oracle,
    squared_error,
    structured_oracle,
    symmetric_grid_oracle,
    unstructured_oracle,
)

TOLERANCE = 1e-9


def random_problem(d: int, seed: int, rows: int = 1) -> tuple[Array, Array]:
    """Random rows (rows, d) and a well-conditioned H (d, d) of 3 d correlated inputs."""
    rng = np.random.default_rng(seed)
    mixing = np.eye(d) + 0.5 * rng.normal(size=(d, d)) / np.sqrt(d)
    x = mixing @ rng.normal(size=(d, 3 * d))
    return rng.normal(size=(rows, d)), hessian_oracle(x, 3 * d)


def grid(step: float, bits: int) -> Callable[[Array], Array]:
    half = 2 ** (bits - 1)
    return lambda w: step * np.clip(np.round(w / step), -half, half - 1)


def greedy_search(
    W: Array,  # (rows, d)
    H: Array,  # (d, d)
    candidates: Callable[[set[int]], list[list[int]]],  # columns gone -> sets that may go next
    gone: set[int],
) -> tuple[list[int], list[float]]:
    """First columns of the sets in order of removal, and the increase of the optimum at each."""

    def optimum(without: set[int]) -> float:
        keep = np.array([column not in without for column in range(W.shape[1])])
        return sum(squared_error(w, masked_least_squares(w, H, keep), H) for w in W)

    order, losses = [], []
    before = optimum(gone)
    while allowed := candidates(gone):
        best = min(allowed, key=lambda columns: optimum(gone | set(columns)))
        gone = gone | set(best)
        order.append(best[0])
        losses.append(optimum(gone) - before)
        before = optimum(gone)
    return order, losses


def assert_prefixes_are_optimal(trace: OracleTrace, w: Array, H: Array, c: int = 1) -> None:
    """After every step: least-squares optimum, gradient zero on the kept, losses add up."""
    start = trace.weights_after(0)
    keep = np.array(start != 0)
    for k in range(len(trace.order) + 1):
        for b in trace.order[:k]:
            keep[b * c : (b + 1) * c] = False
        row = trace.weights_after(k)
        np.testing.assert_allclose(row, masked_least_squares(start, H, keep), atol=TOLERANCE)
        np.testing.assert_allclose((H @ (row - start))[keep], 0, atol=TOLERANCE)
        error = squared_error(start, row, H)
        np.testing.assert_allclose(trace.losses[:k].sum(), error, rtol=TOLERANCE, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("masked", [False, True])
def test_unstructured_is_greedy_least_squares(seed: int, masked: bool) -> None:
    W, H = random_problem(9, seed)
    mask = np.array([not masked or column % 3 != 1 for column in range(9)])
    w = W[0] * mask
    trace = unstructured_oracle(W[0], H, mask)
    order, losses = greedy_search(
        w[None],
        H,
        lambda gone: [[p] for p in range(9) if p not in gone],
        set(np.flatnonzero(~mask).tolist()),
    )
    assert trace.order == order
    np.testing.assert_allclose(trace.losses, losses, rtol=1e-8)
    assert_prefixes_are_optimal(trace, w, H)
    assert not trace.weights.any()


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 2), (3, 3), (0, 4)])
def test_nm_is_greedy_least_squares_with_exact_counts(n: int, m: int) -> None:
    W, H = random_problem(3 * m, seed=n + m)
    trace = nm_oracle(W[0], H, n, m)

    def allowed(gone: set[int]) -> list[list[int]]:
        zeros = [sum(q // m == group for q in gone) for group in range(3)]
        return [[p] for p in range(3 * m) if p not in gone and zeros[p // m] < n]

    order, losses = greedy_search(W, H, allowed, set())
    assert trace.order == order
    np.testing.assert_allclose(trace.losses, losses, rtol=1e-8)
    assert ((trace.weights.reshape(3, m) == 0).sum(axis=1) == n).all()
    assert_prefixes_are_optimal(trace, W[0], H)


def test_nm_counts_absent_weights_as_zeros_of_their_group() -> None:
    W, H = random_problem(12, seed=3)
    mask = np.array([1, 1, 1, 1, 0, 1, 1, 1, 0, 0, 0, 1], dtype=bool)
    trace = nm_oracle(W[0], H, 2, 4, mask)
    assert (trace.weights.reshape(3, 4) == 0).sum(axis=1).tolist() == [2, 2, 3]
    assert not trace.weights[~mask].any()
    assert_prefixes_are_optimal(trace, W[0], H)


@pytest.mark.parametrize("c", [1, 2, 4])
@pytest.mark.parametrize("rows", [1, 3])
def test_structured_and_block_are_greedy_least_squares(c: int, rows: int) -> None:
    W, H = random_problem(12, seed=c, rows=rows)
    trace = structured_oracle(W, H, c)
    blocks = [list(range(first, first + c)) for first in range(0, 12, c)]
    order, losses = greedy_search(W, H, lambda gone: [B for B in blocks if B[0] not in gone], set())
    assert [b * c for b in trace.order] == order
    np.testing.assert_allclose(trace.losses, losses, rtol=1e-8)
    for k, after in enumerate(trace.history):
        error = squared_error(W, after, H)
        np.testing.assert_allclose(trace.losses[:k].sum(), error, rtol=TOLERANCE, atol=1e-12)
    if rows == 1:
        assert_prefixes_are_optimal(block_oracle(W[0], H, c), W[0], H, c)


def test_blocks_of_one_are_unstructured() -> None:
    W, H = random_problem(20, seed=5)
    blocked, single = block_oracle(W[0], H, 1), unstructured_oracle(W[0], H)
    assert blocked.order == single.order
    np.testing.assert_allclose(blocked.losses, single.losses, rtol=TOLERANCE)
    np.testing.assert_allclose(blocked.history, single.history, atol=TOLERANCE)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_quantise_holds_its_targets_and_lets_the_rest_follow(bits: int, masked: bool) -> None:
    W, H = random_problem(16, seed=bits)
    mask = np.array([not masked or column % 4 != 2 for column in range(16)])
    w = W[0] * mask
    step, _ = symmetric_grid_oracle(w, bits)
    trace = quantise_oracle(W[0], H, grid(step, bits), step, mask)
    assert sorted(trace.order) == np.flatnonzero(mask).tolist()
    for k in range(len(trace.order) + 1):
        row = trace.weights_after(k)
        free = np.array([mask[p] and p not in trace.order[:k] for p in range(16)])
        np.testing.assert_array_equal(row[~free], trace.weights[~free])
        np.testing.assert_allclose((H @ (row - w))[free], 0, atol=TOLERANCE)
        error = squared_error(w, row, H)
        np.testing.assert_allclose(trace.losses[:k].sum(), error, rtol=TOLERANCE, atol=1e-12)
    np.testing.assert_allclose(trace.weights, grid(step, bits)(trace.weights), atol=1e-12)


def test_quantise_takes_the_step_that_costs_least_unless_there_are_outliers() -> None:
    outlier_steps = 0
    for seed in range(6):
        W, H = random_problem(8, seed)
        step = 0.4
        rounding = grid(step, 3)  # points -1.6 .. 1.2: large weights are outliers
        trace = quantise_oracle(W[0], H, rounding, step)
        for k, p in enumerate(trace.order):
            row = trace.weights_after(k)
            free = [q for q in range(8) if q not in trace.order[:k]]
            distance = np.abs(row - rounding(row))
            if max(distance[q] for q in free) > step / 2 * (1 + 1e-9):
                outlier_steps += 1
                assert p == max(free, key=lambda q: distance[q])
                continue
            costs = [fixed_cost(row, H, free, q, float(rounding(row)[q])) for q in free]
            assert p == free[int(np.argmin(costs))]
            np.testing.assert_allclose(trace.losses[k], min(costs), rtol=1e-8)
    assert outlier_steps > 0


def fixed_cost(row: Array, H: Array, free: list[int], p: int, target: float) -> float:
    """Least error when weight p moves to its target and the other free ones may follow."""
    others = [q for q in free if q != p]
    change = np.zeros(len(row))
    change[p] = target - row[p]
    if others:
        change[others] = np.linalg.solve(H[np.ix_(others, others)], -H[others, p] * change[p])
    return squared_error(change, np.zeros(len(row)), H)


@pytest.mark.parametrize("seed", range(4))
def test_greedy_is_never_better_than_exhaustive_search(seed: int) -> None:
    W, H = random_problem(6, seed)
    w = W[0]
    pruned = unstructured_oracle(w, H)
    for k in range(7):
        best = min(
            squared_error(w, masked_least_squares(w, H, np.isin(range(6), kept)), H)
            for kept in itertools.combinations(range(6), 6 - k)
        )
        assert pruned.losses[:k].sum() >= best - 1e-12
        if k in (0, 1, 6):
            np.testing.assert_allclose(pruned.losses[:k].sum(), best, atol=TOLERANCE)
    step, _ = symmetric_grid_oracle(w, 2)
    quantised = quantise_oracle(w, H, grid(step, 2), step)
    points = [step * level for level in (-2, -1, 0, 1)]
    best = min(squared_error(w, np.array(q), H) for q in itertools.product(points, repeat=6))
    assert quantised.losses.sum() >= best - 1e-12
    assert quantised.losses.sum() <= 20 * best


def test_identity_gives_magnitude_pruning_and_round_to_nearest() -> None:
    W, _ = random_problem(24, seed=7, rows=3)
    w, H = W[0], np.eye(24)
    by_magnitude = np.argsort(np.abs(w), kind="stable").tolist()
    trace = unstructured_oracle(w, H)
    assert trace.order == by_magnitude
    np.testing.assert_array_equal(trace.losses, w[by_magnitude] ** 2 / 2)
    two_of_four = nm_oracle(w, H, 2, 4).weights.reshape(6, 4)
    for group, pruned in zip(w.reshape(6, 4), two_of_four, strict=True):
        rank = np.abs(group).argsort().argsort()
        np.testing.assert_array_equal(pruned, np.where(rank < 2, 0, group))
    norms = (W.reshape(3, 6, 4) ** 2).sum(axis=(0, 2))
    assert structured_oracle(W, H, 4).order == np.argsort(norms).tolist()
    rounding = grid(0.3, 4)
    np.testing.assert_array_equal(quantise_oracle(w, H, rounding, 0.3).weights, rounding(w))


def test_global_selection_counts() -> None:
    losses = np.array([[1.0, 2.0, 9.0, 9.0], [1.0, 1.0, 3.0, 9.0], [5.0, 6.0, 7.0, 8.0]])
    assert global_selection_oracle(losses, 0.0).tolist() == [0, 0, 0]
    assert global_selection_oracle(losses, 0.01).tolist() == [1, 0, 0]  # ceil, lowest index
    assert global_selection_oracle(losses, 0.25).tolist() == [1, 2, 0]
    assert global_selection_oracle(losses, 0.5).tolist() == [2, 3, 1]
    assert global_selection_oracle(losses, 1.0).tolist() == [4, 4, 4]


def test_dead_inputs_are_decoupled_and_cost_nothing() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 40))
    x[[1, 4]] = 0
    w = rng.normal(size=6)
    H = hessian_oracle(x, 40)
    np.testing.assert_allclose(H, 2 * x @ x.T / 40, rtol=1e-12)
    w_live, H_live = decouple_dead(w, H)
    assert H[1, 1] == 0 and w[1] != 0  # inputs untouched
    trace = unstructured_oracle(w_live, H_live)
    assert trace.order[:2] == [1, 4] and not trace.losses[:2].any()
    live = np.array([0, 2, 3, 5])
    alone = unstructured_oracle(w[live], H[np.ix_(live, live)])
    assert trace.order[2:] == live[alone.order].tolist()
    np.testing.assert_allclose(trace.losses[2:], alone.losses, rtol=TOLERANCE)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "groups"),
    [
        ((3, 3), (1, 1), (1, 1), (1, 1), 1),
        ((3, 2), (2, 1), (1, 0), (1, 2), 2),
        ((2, 4), (1, 1), "same", (1, 1), 1),
        ((3, 4), (1, 1), "same", (2, 1), 4),
        ((3, 3), (2, 3), "valid", (1, 1), 1),
        ((1, 1), (2, 2), (0, 0), (1, 1), 2),
    ],
)
def test_columns_times_weights_are_the_convolution(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int] | str,
    dilation: tuple[int, int],
    groups: int,
    padding_mode: str,
) -> None:
    conv = torch.nn.Conv2d(
        4, 8, kernel, stride, padding, dilation, groups, False, padding_mode, dtype=torch.float64
    )
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(2, 4, 7, 8)))
    columns = conv_columns_oracle(
        x.numpy(), kernel, stride, padding, dilation, groups, padding_mode
    )
    weights = conv.weight.detach().numpy().reshape(groups, 8 // groups, -1)
    products = np.concatenate([W @ X for W, X in zip(weights, columns, strict=True)])
    expected = conv(x).detach().transpose(0, 1).reshape(8, -1).numpy()
    np.testing.assert_allclose(products, expected, atol=1e-12)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grids_contain_their_points_and_beat_every_other_factor(bits: int) -> None:
    x = np.random.default_rng(bits).normal(size=64)
    step, row = symmetric_grid_oracle(x, bits)
    levels = np.unique(np.round(row / step + 2 ** (bits - 1)).astype(int))
    assert levels.min() >= 0 and levels.max() <= 2**bits - 1
    np.testing.assert_allclose(row / step, np.round(row / step), atol=1e-9)
    full_step = 2 * np.abs(x).max() / (2**bits - 1)
    factors = full_step * np.arange(1.0, 0.205, -0.01)
    assert len(factors) == 80 and np.isclose(factors, step).any()
    points = np.arange(2**bits) - 2 ** (bits - 1)
    errors = [
        (np.abs(x[:, None] - points * candidate).min(axis=1) ** 2.4).sum() for candidate in factors
    ]
    np.testing.assert_allclose((np.abs(x - row) ** 2.4).sum(), min(errors), rtol=1e-9)
    np.testing.assert_allclose(factors[int(np.argmin(errors))], step, rtol=1e-9)


def test_asymmetric_grid() -> None:
    x = np.linspace(0.0, 3.0, 16)
    step, zero, x_hat = asymmetric_grid_oracle(x, 4)  # already on the grid: no shrinking
    assert (step, zero) == (pytest.approx(0.2), 0.0)
    np.testing.assert_allclose(x_hat, x, atol=1e-12)
    step, zero, x_hat = asymmetric_grid_oracle(x - 1.0, 4)
    assert (step, zero) == (pytest.approx(0.2), 5.0)
    np.testing.assert_allclose(x_hat, x - 1.0, atol=1e-12)
    _, zero, x_hat = asymmetric_grid_oracle(x + 5.0, 8)  # the range always holds 0
    assert zero == 0.0 and np.abs(x_hat - x - 5.0).max() < 8.0 / 255
    assert asymmetric_grid_oracle(np.zeros(3), 8)[:2] == (1.0, 0.0)
    assert symmetric_grid_oracle(np.zeros(3), 8)[0] == 1.0
