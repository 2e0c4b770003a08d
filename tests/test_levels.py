"""Weights at many levels from factors of halves; the same bits on any number of threads."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from obc.solver import levels
from obc.solver.elimination import Unstructured, eliminate
from obc.solver.inverse import Inverse, damped_inverse
from obc.solver.levels import (
    FACTOR_COLUMNS,
    LeadingBlocks,
    factorise,
    first_counts,
    gathered,
    weights_at,
)
from obc.solver.threads import in_pieces, rows_of_a_piece

SIZES = [1, 2, FACTOR_COLUMNS - 1, 2 * FACTOR_COLUMNS, 3 * FACTOR_COLUMNS + 1]


@pytest.fixture(params=["compiled", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways to take a matrix apart."""
    if request.param == "torch":
        monkeypatch.setattr(levels, "compiled_engine", lambda: None)


def hessian(d: int, seed: int = 0) -> Tensor:  # (1, d, d)
    X = torch.randn(2 * d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (X.T @ X / d)[None]


def orders(rows: int, d: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.stack([torch.randperm(d, generator=generator) for _ in range(rows)])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("d", SIZES)
def test_weights_are_the_optimum_on_what_is_kept(d):
    """ŵ_M = H_MM⁻¹ (H w)_M, for every level that keeps something, of two systems and two rows."""
    H = torch.cat([hessian(d), hessian(d, 1)])
    inverse = damped_inverse(H, dtype=torch.float64)
    W = torch.randn(3, 2, d, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    system, order = torch.tensor([1, 0, 1]), orders(3, d)
    counts = torch.tensor([[0, 0, 0], [0, 1, d // 2], [d // 2, d // 2 + 1, d - 1], [d, d, d]])
    at = weights_at(W, inverse, H, system, order, counts.clamp(0, d))
    for level, gone in enumerate(counts.clamp(0, d).tolist()):
        for r, k in enumerate(gone):
            M, G = order[r, k:].sort().values, H[system[r]]
            wanted = torch.zeros(2, d, dtype=torch.float64)
            wanted[:, M] = torch.linalg.solve(G[M][:, M], (W[r] @ G)[:, M].T).T
            torch.testing.assert_close(at[level, r], wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rel_damp", [0.0, 0.1])
def test_inputs_that_are_dead_and_weights_that_are_zero_stay(rel_damp):
    d = 40
    H = hessian(d)
    H[:, 5], H[:, :, 5] = 0, 0
    inverse = damped_inverse(H, rel_damp, torch.float64)
    W = torch.randn(1, 1, d, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    W[..., [5, 7]] = 0
    order = torch.tensor([5, 7, *(i for i in range(d) if i not in (5, 7))])
    counts = torch.tensor([[0], [1], [10], [25], [39]])
    at = weights_at(W, inverse, H, torch.tensor([0]), order[None], counts)
    assert torch.equal(at[0, 0], W[0]) and (at[..., [5, 7]] == 0).all()
    damped = H[0] + rel_damp * H[0].diagonal().mean() * torch.eye(d, dtype=torch.float64)
    for k, now in zip(counts[2:, 0].tolist(), at[2:, 0, 0], strict=True):
        M = order[k:]
        wanted = torch.linalg.solve(damped[M][:, M], (damped @ W[0, 0])[M])
        torch.testing.assert_close(now[M], wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("d", SIZES)
def test_a_factor_is_the_factor(d):
    A = hessian(d)[0]
    L = A.clone()
    L[torch.triu(torch.ones(d, d, dtype=torch.bool), 1)] = torch.nan  # never looked at
    assert factorise(L)
    torch.testing.assert_close(L.tril(), torch.linalg.cholesky(A), rtol=0, atol=1e-12)
    assert not factorise(A - 2 * A.diagonal().max() * torch.eye(d))


@pytest.mark.usefixtures("kernels")
def test_parts_of_a_matrix_in_another_order():
    H, order = torch.cat([hessian(30), hessian(30, 1)]), orders(3, 30)[:, :11]
    system = [1, 0, 1]
    for dtype in (torch.float32, torch.float64):
        part = gathered(H, torch.tensor(system), order, dtype).tril()
        wanted = [H[g][o][:, o].to(dtype).tril() for g, o in zip(system, order, strict=True)]
        assert part.dtype == dtype and torch.equal(part, torch.stack(wanted))


def has_factor(A: Tensor) -> bool:
    return factorise(A) if len(A) > 2 * FACTOR_COLUMNS else not torch.linalg.cholesky_ex(A).info


def barely_positive(order: Tensor) -> Tensor:  # (d,) -> (d, d) float32
    """A matrix that is positive definite, but that float32 cannot factor, nor in this order."""
    d = len(order)
    V = torch.linalg.qr(hessian(d)[0])[0]
    for exponent in torch.linspace(-5, -9, 81).tolist():
        A = (V * torch.logspace(0, exponent, d, dtype=torch.float64)) @ V.T
        A = ((A + A.mT) / 2).float()
        single = has_factor(A.clone()) or has_factor(A[order][:, order])
        if has_factor(A.double()) and not single:
            return A
    raise AssertionError("no such matrix")


@pytest.mark.parametrize("d", [2 * FACTOR_COLUMNS, 562])
def test_float64_where_float32_does_not_carry(d):
    order, counts = orders(1, d), torch.tensor([[d]])
    bad = barely_positive(order[0])
    part = LeadingBlocks(bad[None], None, torch.tensor([0]), order, counts, torch.float32)
    o = order[0]
    assert part.L.dtype == torch.float64
    torch.testing.assert_close(
        part.L[0].tril() @ part.L[0].tril().T, bad.double()[o][:, o], rtol=0, atol=1e-12
    )
    good = LeadingBlocks(hessian(d).float(), None, torch.tensor([0]), order, counts, torch.float32)
    assert good.L.dtype == torch.float32
    with pytest.raises(ArithmeticError, match="not positive definite; try --rel-damp"):
        LeadingBlocks(-hessian(d), None, torch.tensor([0]), order, counts, torch.float32)


def test_halves_are_only_made_where_a_level_asks_for_them():
    H = hessian(20)
    inverse, order = damped_inverse(H), orders(1, 20)
    sizes = []
    for gone in (0, 4, 10, 11, 20):
        solver = levels.LevelSolver(
            inverse, H, torch.tensor([0]), order, torch.tensor([[0], [gone]])
        )
        sizes.append((solver.removed.size, solver.remaining.size))
    assert sizes == [(0, 0), (4, 0), (10, 0), (0, 9), (0, 0)]


def row_by_row(W: Tensor, inverse: Inverse, H: Tensor, order: Tensor, counts: Tensor) -> Tensor:
    one = torch.tensor([0])
    parts = [
        weights_at(W[r : r + 1], inverse, H, one, order[r : r + 1], counts[:, r : r + 1])
        for r in range(len(W))
    ]
    return torch.cat(parts, 1)


@pytest.mark.parametrize(("d", "together"), [(200, 1), (562, 1), (200, 3)])
def test_neither_threads_nor_other_rows_change_a_bit(d, together):
    rows, H = 5, hessian(d)
    inverse = damped_inverse(H)
    W = torch.randn(rows, together, d, generator=torch.Generator().manual_seed(2))
    system = torch.zeros(rows, dtype=torch.int64)
    trace = eliminate(W, inverse, system, Unstructured(), d)
    counts = first_counts(trace.losses, [0.1, 0.5, 0.9])
    results, before, order = [], torch.get_num_threads(), trace.order.long()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(weights_at(W, inverse, H, system, order, counts))
            results.append(row_by_row(W, inverse, H, order, counts))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_a_piece_has_one_thread_of_pytorch_whenever_its_own_began():
    seen = []

    def work(piece: slice) -> None:
        time.sleep(0.01)  # so that all threads get some
        in_pieces(lambda _: seen.append(torch.get_num_threads()), 2, 1)

    for pieces in (1, 2, 9):  # some threads begin after others have ended
        in_pieces(work, pieces, 1)
    assert set(seen) == {1} and len(seen) == 2 * (1 + 2 + 9)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rows", [0, 1, 2, 7])
def test_pieces_are_all_rows_once(rows):
    seen = torch.zeros(rows)

    def work(piece: slice) -> None:
        seen[piece] += 1

    in_pieces(work, rows, rows_of_a_piece(rows, 1 << 22))
    assert (seen == 1).all()


@pytest.mark.usefixtures("threads")
def test_an_error_in_a_piece_is_raised():
    def work(piece: slice) -> None:
        if piece.start == 3:
            raise ArithmeticError("row 3")

    with pytest.raises(ArithmeticError, match="row 3"):
        in_pieces(work, 5, 1)
