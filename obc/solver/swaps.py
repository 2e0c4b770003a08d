"""N:M swaps: after the elimination a kept weight and a pruned one of its group change places.

ExactOBS (arXiv 2208.11580, section 4) chooses zeros greedily and never takes one back. Here a row
exchanges one kept weight q for one pruned weight p of its group, the best pair first, while that
lowers E = (w − ŵ) H (w − ŵ)ᵀ / 2 with ŵ optimal for its kept weights S:

    ΔE(p, q) = −g_p²/(2 h_p) + (ŵ_q − v g_p/h_p)² / (2 (B_qq + v²/h_p))

    B = (H_SS)⁻¹    G = B H_SP    h = diag(H_PP − H_PS G)    v = G_qp    g = (w − ŵ) H

All of it is in one symmetric matrix T and a vector r, and a swap is two pivots of them (the sweep
operator of regression: p into S, then q out of it), each a rank-one update:

    T_SS = −B   T_SP = G   T_PP = H_PP − H_PS G        r_S = ŵ_S   r_P = g_P
    pivot j:    T_ik −= T_ij T_kj / T_jj,   r_i −= T_ij r_j / T_jj      for i, k ≠ j
                T_ij /= |T_jj|,   r_j /= |T_jj|,   T_jj = −1/T_jj

The search is in the precision of the elimination. The weights of what it keeps are then solved in
float64, and `refinement.never_worse` takes them only where E is lower. On a CPU, one thread works
on one row (`local_search_cpu.py`), with the columns of S in front; on other devices the rows that
share an H go together, and the CPU waits for them once in SWAPS_AT_ONCE swaps.

    symbol  variable  shape         meaning
    w       W         (rows, d)     weights before pruning, groups of M columns side by side
    ŵ       pruned    (rows, d)     weights after it; where w is zero, they stay zero
    S       kept      (rows, d)     ŵ ≠ 0
    T       T         (rows, d, d)
"""

from __future__ import annotations

import torch
from torch import Tensor

from obc.solver.elimination import compiled_engine
from obc.solver.threads import in_pieces

MOST_COLUMNS = 1152  # of a row: d³ operations are too many for what more columns gain
MATRICES_OF_A_SWAP = 5  # of d×d, while a row is in work
LEAST_SWAP_GAIN = 1e-4  # × E: less is not worth a swap
SWAPS_PER_COLUMN = 0.25  # at most
SWAPS_AT_ONCE = 32  # of each row, before it is seen whether there are more
RESOLVED_GRADIENT = 100  # × ε H_pp: less of h_p is rounding


def swapped(
    pruned: Tensor,  # (rows, d)
    W: Tensor,  # (rows, d)
    H: Tensor,  # (G, d, d) float64, not damped
    system: Tensor,  # (rows,) which of the H is each row's, in ascending order
    damping: Tensor,  # (G,) × mean(diag H), with which H is positive definite
    size: int,  # M
    memory: int,  # bytes for rows in work
) -> Tensor:  # (rows, d) float64
    """Weights after swaps, optimal for the kept ones; rows without a swap stay as they are."""
    result, added = pruned.double(), damping * H.diagonal(dim1=1, dim2=2).mean(1)
    damped = H.to(W.dtype, copy=True)
    damped.diagonal(dim1=1, dim2=2).add_(added[:, None])
    together = max(1, memory // (MATRICES_OF_A_SWAP * W.shape[1] ** 2 * W.element_size()))  # rows
    compiled = W.device.type == "cpu" and compiled_engine() is not None
    sizes, first = torch.bincount(system, minlength=len(H)).tolist(), 0
    for own_H, own_damped, own_added, count in zip(H, damped, added, sizes, strict=True):
        rows, first = slice(first, first + count), first + count
        matrices = own_H, own_damped, own_added
        if compiled:
            swap_by_row(result[rows], pruned[rows], W[rows], *matrices, size, together)
        else:
            for part in torch.arange(rows.start, rows.stop, device=W.device).split(together):
                result[part] = swapped_together(pruned[part], W[part], *matrices, size)
    return result


def limits(
    damped: Tensor,  # (d, d)
) -> tuple[Tensor, int]:
    """(d,) what h_p has to exceed, and the most swaps of a row."""
    floor = RESOLVED_GRADIENT * torch.finfo(damped.dtype).eps * damped.diagonal()
    return floor, max(1, int(SWAPS_PER_COLUMN * len(damped)))


# -- row by row ------------------------------------------------------------------------------------


def swap_by_row(
    result: Tensor,  # (rows, d) float64, changed in place
    pruned: Tensor,  # (rows, d)
    W: Tensor,  # (rows, d)
    H: Tensor,  # (d, d) float64
    damped: Tensor,  # (d, d)
    added: Tensor,  # () to the diagonal
    size: int,
    together: int,  # rows that fit in memory
) -> None:
    """`swapped` for rows that share H, in compiled code."""
    from obc.solver.local_search_cpu import swap_row

    kept, barred, (floor, limit) = pruned != 0, W == 0, limits(damped)

    def work(piece: slice) -> None:
        for row in range(piece.start, piece.stop):
            order, T = swept(damped, kept[row])
            delta = W[row].double() - result[row]
            g = delta @ H
            r = torch.where(kept[row], pruned[row], g.to(W.dtype))[order]
            least_gain = float(LEAST_SWAP_GAIN * (delta @ g).to(W.dtype) / 2)
            now_kept = kept[row].clone()
            arrays = (x.numpy() for x in (T, r, now_kept, barred[row], floor, order.argsort()))
            if swap_row(*arrays, size, least_gain, limit):
                finish(row, now_kept)

    def finish(row: int, now_kept: Tensor) -> None:
        S, P, w = now_kept.nonzero()[:, 0], (~now_kept).nonzero()[:, 0], W[row].double()
        H_SS = H[S[:, None], S]
        H_SS.diagonal().add_(added)
        factor, failed = torch.linalg.cholesky_ex(H_SS)
        if not failed:
            change = torch.cholesky_solve(H[S[:, None], P] @ w[P, None], factor)[:, 0]
            result[row] = torch.zeros_like(w).index_copy_(0, S, w[S] + change)

    in_pieces(work, len(W), 1 if together >= torch.get_num_threads() else len(W))


def swept(
    H: Tensor,  # (d, d)
    kept: Tensor,  # (d,) bool
) -> tuple[Tensor, Tensor]:  # (d,), (d, d)
    """The columns of S, then those of P; and T in this order.

    T is NaN, which no swap improves, where H_SS has no Cholesky factor.
    """
    S, P, T = kept.nonzero()[:, 0], (~kept).nonzero()[:, 0], torch.empty_like(H)
    order, k, H_S = torch.cat([S, P]), len(S), H.index_select(0, S)
    factor, failed = torch.linalg.cholesky_ex(H_S.index_select(1, S))
    if failed:
        return order, T.fill_(torch.nan)
    B, H_SP = torch.cholesky_inverse(factor), H_S.index_select(1, P)
    G = B @ H_SP
    T[:k, :k], T[:k, k:], T[k:, :k] = B.neg_(), G, G.T
    H_PP = H.index_select(0, P).index_select(1, P)
    torch.addmm(H_PP, H_SP.T, G, alpha=-1, out=T[k:, k:])
    return order, T


# -- rows together ---------------------------------------------------------------------------------


def swapped_together(
    pruned: Tensor,  # (R, d)
    W: Tensor,  # (R, d)
    H: Tensor,  # (d, d) float64
    damped: Tensor,  # (d, d)
    added: Tensor,  # () to the diagonal
    size: int,
) -> Tensor:  # (R, d) float64
    """`swapped` for rows that share H, in operations on all of them."""
    kept, w, (floor, limit) = pruned != 0, W.double(), limits(damped)
    delta = w - pruned
    g = delta @ H
    r = torch.where(kept, pruned, g.to(W.dtype))
    least_gain = (LEAST_SWAP_GAIN * (delta * g).sum(1) / 2).to(W.dtype)
    T = swept_in_place(damped, kept)
    S = swap_in_torch(T, r, kept, W == 0, floor, size, least_gain, limit)
    del T
    H_SS = torch.where(S[:, :, None] & S[:, None], H, 0.0)  # of the other columns: the identity
    H_SS.diagonal(dim1=1, dim2=2).add_(torch.where(S, added, 1.0))
    factor, failed = torch.linalg.cholesky_ex(H_SS)
    del H_SS
    change = torch.cholesky_solve(((w * ~S) @ H * S)[:, :, None], factor)[:, :, 0]
    better = (S != kept).any(1) & (failed == 0)
    return torch.where(better[:, None], torch.where(S, w + change, 0.0), pruned.double())


def swept_in_place(
    H: Tensor,  # (d, d)
    kept: Tensor,  # (R, d) bool
) -> Tensor:  # (R, d, d)
    """T of every row, its columns where they were; NaN as in `swept`."""
    both = kept[:, :, None] & kept[:, None]
    H_SS = torch.where(both, H, 0.0)
    H_SS.diagonal(dim1=1, dim2=2).masked_fill_(~kept, 1)
    factor, failed = torch.linalg.cholesky_ex(H_SS)
    del H_SS
    factor.diagonal(dim1=1, dim2=2).masked_fill_((failed > 0)[:, None], 1)  # to be inverted
    B = torch.cholesky_inverse(factor).mul_(both)
    del factor, both
    G = (B @ H).mul_(~kept[:, None])  # (S, P), zero elsewhere
    T = (H @ G).neg_().add_(H).mul_(~kept[:, None]).mul_(~kept[:, :, None])
    T.sub_(B).add_(G).add_(G.mT)
    return T.masked_fill_((failed > 0)[:, None, None], torch.nan)


def swap_in_torch(
    T: Tensor,  # (R, d, d)
    r: Tensor,  # (R, d)
    kept: Tensor,  # (R, d) bool
    barred: Tensor,  # (R, d) bool, columns that may not be swapped in
    floor: Tensor,  # (d,)
    size: int,
    least_gain: Tensor,  # (R,)
    limit: int,
) -> Tensor:  # (R, d) bool, what is kept in the end
    """`local_search_cpu.swap_row` for R rows together; changes T and r."""
    (R, d), row, kept = r.shape, torch.arange(len(r), device=r.device), kept.clone()
    grouped = (R, d // size, size)
    for count in range(limit):
        blocks = T.view(R, d // size, size, d // size, size).diagonal(dim1=1, dim2=3)
        v = blocks.permute(0, 3, 2, 1)  # (R, groups, p, q)
        h = T.diagonal(dim1=1, dim2=2)
        p_may, step = ~kept & ~barred & (h > floor), r / h
        left = r.view(grouped)[:, :, None] - v * step.view(grouped)[..., None]
        room = v * v / h.view(grouped)[..., None] - h.view(grouped)[:, :, None]
        gain = ((r * step).view(grouped)[..., None] - left * left / room) / 2
        may = p_may.view(grouped)[..., None] & kept.view(grouped)[:, :, None]
        best, pair = torch.where(may, gain, -torch.inf).flatten(1).max(1)
        active = best > least_gain
        if count % SWAPS_AT_ONCE == 0 and not bool(active.any()):
            break
        group, p, q = pair // size**2, pair // size % size, pair % size
        for j in (group * size + p, group * size + q):
            pivot_in_torch(T, r, row, j, active)
            kept[row, j] ^= active
    return kept


def pivot_in_torch(
    T: Tensor,  # (R, d, d)
    r: Tensor,  # (R, d)
    row: Tensor,  # (R,) 0 … R − 1
    j: Tensor,  # (R,) at which column
    active: Tensor,  # (R,) bool, rows that pivot
) -> None:
    """`local_search_cpu.pivot` in the active rows."""
    column, head, active = T[row, j], r[row, j], active[:, None]
    at_j = torch.where(active, column.gather(1, j[:, None]), 1.0)  # (R, 1)
    factor = torch.where(active, column / at_j, 0.0)
    T.baddbmm_(factor[:, :, None], column[:, None], alpha=-1)
    r -= factor * head[:, None]
    line = torch.where(active, column / at_j.abs(), column)
    line.scatter_(1, j[:, None], torch.where(active, -1 / at_j, line.gather(1, j[:, None])))
    T[row, :, j] = T[row, j] = line
    r[row, j] = torch.where(active[:, 0], head / at_j[:, 0].abs(), head)
