"""Weights at many levels of sparsity from one elimination.

OBC (arXiv 2208.11580), section 4, "global" selection: pruning a row to the end yields an order and
a loss for every step, and nothing else is kept. At sparsity s the layer loses the
K = ceil(rows·d·s) weights of least loss, so row r loses its first k_r. The row's weights then
follow from a plain Cholesky factorisation A = LLᵀ of H⁻¹ in the known order:

    w after k steps  =  w − L[:, :k] z[:k]        L z = w

which gives all levels of a row at the cost of one factorisation and one triangular solve. Where H
was damped, `refinement.py` improves on them. On a CPU a row's weights are the same bits whichever
rows are done with it.

    symbol  variable  shape         meaning
    L       L         (R, d, d)     Cholesky factor of H⁻¹, columns in order of removal
    z       z         (R, d, q)     L z = w, the weights in order of removal
    k       counts    (levels, R)   columns that are gone at each level
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.hessian import Inverse
from engine.refinement import refined
from engine.threads import in_pieces, rows_of_a_piece

TOGETHER = 64  # levels in one product, which reads L once
BLOCK = 256  # rows of a factor that are made at a time


@dataclass(frozen=True)
class Undamped:
    """The Hessians that a batch of systems is about, where their inverses were damped."""

    H: Tensor  # (G, d, d) float64
    system: Tensor  # (R,) which H is each system's
    damped: Tensor  # (R,) bool


def sparsity_grid(low: float, high: float, delta: float) -> list[float]:
    """Sparsities whose density shrinks by the factor 1 − delta, from `low`; then `high` itself.

    >>> [round(s, 3) for s in sparsity_grid(0.0, 0.3, 0.1)]
    [0.0, 0.1, 0.19, 0.271, 0.3]
    """
    levels, density = [], 1 - low
    while density > 1 - high + 1e-9:
        levels.append(1 - density)
        density *= 1 - delta
    return [*levels, high]


def first_counts(
    losses: Tensor,  # (systems, steps) in each system's own order
    sparsities: Sequence[float],
    size: int = 1,  # steps that go together
) -> Tensor:  # (levels, systems) int64, how many columns each system loses from its start
    """Global selection (section 4): the units of least loss go, over all systems."""
    units = losses.view(len(losses), -1, size).sum(2)
    cheapest = units.flatten().argsort(stable=True) // units.shape[1]
    counts = []
    for sparsity in sparsities:
        if not 0 <= sparsity <= 1:
            raise ValueError(f"a sparsity must be in [0, 1]; got {sparsity}")
        K = ceil(units.numel() * sparsity * (1 - 1e-12))  # 0.3·10 is 3, not 3.0000000000000004
        counts.append(torch.bincount(cheapest[:K], minlength=len(losses)) * size)
    return torch.stack(counts)


def weights_at(
    W: Tensor,  # (R, q, d)
    inverse: Inverse,
    system: Tensor,  # (R,)
    order: Tensor,  # (R, d) int64, columns in order of removal
    counts: Tensor,  # (levels, R) how many of them are gone
    undamped: Undamped | None = None,  # H, to refine the weights by
) -> Tensor:  # (levels, R, q, d)
    """Weights of every row at every level, in closed form; see the module docstring."""
    levels = W.new_empty(len(counts), *W.shape)

    def work(rows: slice) -> None:
        own = undamped and Undamped(undamped.H, undamped.system[rows], undamped.damped[rows])
        levels[:, rows] = weights_of(
            W[rows], inverse, system[rows], order[rows], counts[:, rows], own
        )

    if W.device.type == "cpu":
        in_pieces(work, len(W), rows_of_a_piece(len(W), W.shape[2] ** 2 * W.element_size()))
    else:
        work(slice(None))
    return levels


def weights_of(
    W: Tensor,
    inverse: Inverse,
    system: Tensor,
    order: Tensor,
    counts: Tensor,
    undamped: Undamped | None,
) -> Tensor:
    """`weights_at`, of all systems at once, but row by row of each: a row's bits are its own."""
    L, precise = cholesky_in_order(inverse, system, order)
    if bool(precise.any()) and not bool(precise.all()):
        levels = W.new_empty(len(counts), *W.shape)
        for rows in (precise, ~precise):
            own = undamped and Undamped(undamped.H, undamped.system[rows], undamped.damped[rows])
            levels[:, rows] = weights_of(
                W[rows], inverse, system[rows], order[rows], counts[:, rows], own
            )
        return levels
    rows = [levels_of(row, L, order, counts, undamped) for row in W.split(1, dim=1)]
    return torch.cat(rows, dim=2)


def levels_of(
    W: Tensor,  # (R, 1, d)
    L: Tensor,  # (R, d, d)
    order: Tensor,
    counts: Tensor,
    undamped: Undamped | None,
) -> Tensor:  # (levels, R, 1, d)
    """The weights of one row of each system."""
    columns = order[:, None]
    w = W.gather(2, columns).to(L.dtype)  # (R, 1, d) in order of removal
    z = torch.linalg.solve_triangular(L, w.transpose(1, 2), upper=False)  # (R, d, 1)
    place = torch.arange(W.shape[2], device=W.device)
    levels = W.new_zeros(len(counts), *W.shape)
    for first in range(0, len(counts), TOGETHER):
        gone = place < counts[first : first + TOGETHER, :, None]  # (levels, R, d)
        now = w - moved(L, z, gone)
        now.masked_fill_(gone[:, :, None], 0)
        part, index = levels[first : first + TOGETHER], columns.expand(len(gone), *columns.shape)
        part.scatter_(3, index, now.to(W.dtype))
        if undamped is not None:
            left = torch.zeros_like(part, dtype=torch.bool)
            left.scatter_(3, index, ~gone[:, :, None].expand_as(now))
            free = left & (W != 0) & undamped.damped[:, None, None]
            solve = inverse_of_kept(L, index, gone)
            part.copy_(refined(part, W, undamped.H, undamped.system, free, solve))
    return levels


def inverse_of_kept(
    L: Tensor,  # (R, d, d)
    index: Tensor,  # (levels, R, q, d) columns in order of removal
    gone: Tensor,  # (levels, R, d) bool, in that order
) -> Callable[[Tensor, Tensor], Tensor]:
    """v ↦ v (H_MM)⁻¹ = v L_MM L_MMᵀ for v (some, R, q, d) of some levels, M the columns kept."""
    _, R, q, d = index.shape

    def solve(v: Tensor, level: Tensor) -> Tensor:
        some, columns = len(level), index[level]
        hidden = gone[level].transpose(0, 1).repeat_interleave(q, 1)  # (R, some·q, d)
        x = v.gather(3, columns).to(L.dtype).transpose(0, 1).reshape(R, some * q, d)
        x = product(L.transpose(1, 2), x.masked_fill_(hidden, 0).transpose(1, 2)).transpose(1, 2)
        x = product(L, x.masked_fill(hidden, 0).transpose(1, 2)).transpose(1, 2)
        x = x.view(R, some, q, d).transpose(0, 1).to(v.dtype)
        return torch.zeros_like(v).scatter_(3, columns, x)

    return solve


def moved(
    L: Tensor,  # (R, d, d)
    z: Tensor,  # (R, d, q)
    gone: Tensor,  # (levels, R, d) bool
) -> Tensor:  # (levels, R, q, d)
    """L[:, gone] z[gone] of every level, in one product."""
    levels, (R, d, q) = len(gone), z.shape
    masked = z[:, :, None] * gone.permute(1, 2, 0)[:, :, :, None]  # (R, d, levels, q)
    return product(L, masked.reshape(R, d, levels * q)).view(R, d, levels, q).permute(2, 0, 3, 1)


def product(
    L: Tensor,  # (R, d, d)
    x: Tensor,  # (R, d, k)
) -> Tensor:  # (R, d, k)
    """L x, to the same bits for any number of rows: PyTorch has two ways for single vectors."""
    if x.shape[2] > 1:
        return L @ x
    return (L @ F.pad(x, (0, 1)))[:, :, :1]


def cholesky_in_order(
    inverse: Inverse,
    system: Tensor,  # (R,)
    order: Tensor,  # (R, d)
) -> tuple[Tensor, Tensor]:  # (R, d, d), (R,) bool
    """Cholesky factor of each system's H⁻¹ with its columns in a given order.

    In float64 if the inverse's own precision does not carry somewhere; and where it does not.
    """
    matrices = [inverse.matrix[g] for g in system.tolist()]
    blocked = order.device.type == "cpu" and order.shape[1] > 2 * BLOCK
    factors = blockwise if blocked else at_once
    L, precise = factors(matrices, order, inverse.matrix.dtype)
    if not bool(precise.any()):
        return L, precise
    L, failed = factors(matrices, order, torch.float64)
    if bool(failed.any()):
        raise ArithmeticError("the inverse Hessian is not positive definite; try --rel-damp 1e-2")
    return L, precise


def at_once(matrices: list[Tensor], order: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Factors (R, d, d), and (R,) bool, where there is none."""
    pairs = zip(matrices, order, strict=True)
    A = torch.stack([M.index_select(0, o).index_select(1, o) for M, o in pairs])
    L, info = torch.linalg.cholesky_ex(A.to(dtype))
    return L, info != 0


def blockwise(matrices: list[Tensor], order: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`at_once`, twice as fast: half of the matrix is never read, and almost all is products.

    Of the factor U = Lᵀ, BLOCK rows at a time follow from those above (a left-looking Cholesky):

        UᵀU = A:   U_IIᵀ [U_II  U_I>]  =  [A_II  A_I>] − U_<Iᵀ [U_<I  U_<>]
    """
    R, d = order.shape
    U, failed = torch.zeros(R, d, d, dtype=dtype), torch.zeros(R, dtype=torch.bool)
    for r, (M, o, u) in enumerate(zip(matrices, order, U, strict=True)):
        for first in range(0, d, BLOCK):
            last = min(first + BLOCK, d)
            rows = M.index_select(0, o[first:last]).index_select(1, o[first:]).to(dtype)
            rows.addmm_(u[:first, first:last].T, u[:first, first:], alpha=-1)
            corner, info = torch.linalg.cholesky_ex(rows[:, : last - first], upper=True)
            if info:
                failed[r] = True
                break
            u[first:last, first:last] = corner
            right = rows[:, last - first :]
            u[first:last, last:] = torch.linalg.solve_triangular(corner.T, right, upper=False)
    return U.transpose(1, 2), failed


def completed(order: Tensor, columns: int) -> Tensor:  # (rows, steps) -> (rows, columns)
    """An order of removal, and after it the columns that stay."""
    stays = torch.ones(len(order), columns, dtype=torch.bool, device=order.device)
    stays.scatter_(1, order.long(), False)
    return torch.cat([order.long(), torch.nonzero(stays)[:, 1].view(len(order), -1)], 1)
