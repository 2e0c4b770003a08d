"""Factors in a known order, block by block and at once; the same bits on any number of threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.elimination import Unstructured, eliminate
from engine.hessian import Inverse, damped_inverse
from engine.levels import BLOCK, at_once, blockwise, cholesky_in_order, first_counts, weights_at
from engine.threads import in_pieces, rows_of_a_piece


def hessian(d: int, seed: int = 0) -> Tensor:  # (1, d, d)
    X = torch.randn(2 * d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (X.T @ X / d)[None]


def orders(rows: int, d: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.stack([torch.randperm(d, generator=generator) for _ in range(rows)])


@pytest.mark.parametrize("d", [1, BLOCK - 1, BLOCK, 2 * BLOCK + 1, 3 * BLOCK])
def test_block_by_block_is_the_factor(d):
    order, matrices = orders(2, d), [hessian(d)[0], hessian(d, 1)[0]]
    L, failed = blockwise(matrices, order, torch.float64)
    assert not failed.any() and not L.triu(1).any()
    for M, o, factor in zip(matrices, order, L, strict=True):
        torch.testing.assert_close(factor @ factor.T, M[o][:, o], rtol=0, atol=1e-12)
    torch.testing.assert_close(L, at_once(matrices, order, torch.float64)[0], rtol=0, atol=1e-12)


def barely_positive(d: int, order: Tensor) -> Tensor:  # (d, d) float32
    """A matrix that is positive definite, but that float32 cannot factor."""
    V, factors = torch.linalg.qr(hessian(d)[0])[0], blockwise if d > 2 * BLOCK else at_once
    for exponent in torch.linspace(-5, -9, 41).tolist():
        A = (V * torch.logspace(0, exponent, d, dtype=torch.float64)) @ V.T
        A = ((A + A.mT) / 2).float()
        single, double = (factors([A], order, t)[1] for t in (torch.float32, torch.float64))
        if single.all() and not double.any():
            return A
    raise AssertionError("no such matrix")


@pytest.mark.parametrize("d", [BLOCK, 2 * BLOCK + 50])  # at once, and block by block
def test_float64_where_float32_does_not_carry(d):
    order = orders(1, d)
    bad, good = barely_positive(d, order), hessian(d)[0].float()
    nothing, matrices = torch.zeros(2), torch.stack([good, bad])
    inverse = Inverse(matrices, matrices.diagonal(dim1=1, dim2=2), nothing, nothing)
    L, precise = cholesky_in_order(inverse, torch.tensor([0, 1, 0]), order.expand(3, -1))
    assert precise.tolist() == [False, True, False] and L.dtype == torch.float64
    for M, factor in zip((good, bad, good), L, strict=True):
        wanted = M.double()[order[0]][:, order[0]]
        torch.testing.assert_close(factor @ factor.T, wanted, rtol=0, atol=1e-12)
    L, precise = cholesky_in_order(inverse, torch.tensor([0]), order)
    assert not precise.any() and L.dtype == torch.float32
    with pytest.raises(ArithmeticError, match="not positive definite; try --rel-damp"):
        negative = Inverse(-matrices, inverse.floor, nothing, nothing)
        cholesky_in_order(negative, torch.tensor([0]), order)


@pytest.mark.parametrize("d", [200, 2 * BLOCK + 50])
def test_neither_threads_nor_other_rows_change_a_bit(d):
    rows, inverse = 5, damped_inverse(hessian(d))
    W = torch.randn(rows, 1, d, generator=torch.Generator().manual_seed(2))
    system = torch.zeros(rows, dtype=torch.int64)
    trace = eliminate(W, inverse, system, Unstructured(), d)
    counts = first_counts(trace.losses, [0.1, 0.5, 0.9])
    results, before, order = [], torch.get_num_threads(), trace.order.long()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(weights_at(W, inverse, system, order, counts))
            alone = [weights_at(W[r : r + 1], inverse, system[:1], order[r : r + 1],
                                counts[:, r : r + 1]) for r in range(rows)]  # fmt: skip
            results.append(torch.cat(alone, 1))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("rows", [0, 1, 2, 7])
def test_pieces_are_all_rows_once(rows):
    seen = torch.zeros(rows)

    def work(piece: slice) -> None:
        seen[piece] += 1

    in_pieces(work, rows, rows_of_a_piece(rows, 1 << 22))
    assert (seen == 1).all()


def test_an_error_in_a_piece_is_raised():
    def work(piece: slice) -> None:
        if piece.start == 3:
            raise ArithmeticError("row 3")

    with pytest.raises(ArithmeticError, match="row 3"):
        in_pieces(work, 5, 1)
