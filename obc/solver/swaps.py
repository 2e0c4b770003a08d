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
on one row (`local_search_cpu.py`); on other devices rows go together.

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
MATRICES = 5  # of d×d, while a row is in work
LEAST_SWAP_GAIN = 1e-4  # × E: less is not worth a swap
SWAPS_PER_COLUMN = 0.25  # at most
RESOLVED_GRADIENT = 100  # × ε H_pp: less of h_p is rounding


def swapped(
    pruned: Tensor,  # (rows, d)
    W: Tensor,  # (rows, d)
    H: Tensor,  # (G, d, d) float64, not damped
    system: Tensor,  # (rows,) which of the H is each row's
    damping: Tensor,  # (G,) × mean(diag H), with which H is positive definite
    size: int,  # M
    memory: int,  # bytes for rows in work
) -> Tensor:  # (rows, d) float64
    """Weights after swaps, optimal for the kept ones; rows without a swap stay as they are."""
    result, kept, barred = pruned.double(), pruned != 0, W == 0
    added = damping * H.diagonal(dim1=1, dim2=2).mean(1)
    damped, systems = H.to(W.dtype, copy=True), system.tolist()
    damped.diagonal(dim1=1, dim2=2).add_(added[:, None])
    floor = RESOLVED_GRADIENT * torch.finfo(W.dtype).eps * damped.diagonal(dim1=1, dim2=2)
    limit = max(1, int(SWAPS_PER_COLUMN * W.shape[1]))
    together = max(1, memory // (MATRICES * W.shape[1] ** 2 * W.element_size()))  # rows

    def started(row: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The order of columns, T and r of a row in this order, and the least gain."""
        order, T = swept(damped[systems[row]], kept[row])
        delta = W[row].double() - result[row]
        g = delta @ H[systems[row]]
        r = torch.where(kept[row], pruned[row], g.to(W.dtype))
        return order, T, r[order], LEAST_SWAP_GAIN * (delta @ g).to(W.dtype) / 2

    def finish(row: int, now_kept: Tensor) -> None:
        S, P, w = now_kept.nonzero()[:, 0], (~now_kept).nonzero()[:, 0], W[row].double()
        own = H[systems[row]]
        H_SS = own[S[:, None], S]
        H_SS.diagonal().add_(added[systems[row]])
        factor, failed = torch.linalg.cholesky_ex(H_SS)
        if not failed:
            change = torch.cholesky_solve(own[S[:, None], P] @ w[P, None], factor)[:, 0]
            result[row] = torch.zeros_like(w).index_copy_(0, S, w[S] + change)

    if W.device.type == "cpu" and compiled_engine() is not None:
        from obc.solver.local_search_cpu import swap_row

        def work(piece: slice) -> None:
            for row in range(piece.start, piece.stop):
                order, T, r, least_gain = started(row)
                now_kept, place = kept[row].clone(), torch.argsort(order)
                own = now_kept, barred[row], floor[systems[row]], place
                arrays = (x.numpy() for x in (T, r, *own))
                if swap_row(*arrays, size, float(least_gain), limit):
                    finish(row, now_kept)

        in_pieces(work, len(W), 1 if together >= torch.get_num_threads() else len(W))
        return result
    for rows in torch.arange(len(W), device=W.device).split(together):
        started_rows = zip(*map(started, rows.tolist()), strict=True)
        order, T, r, least_gain = (torch.stack(tensors) for tensors in started_rows)
        place, floors = order.argsort(), floor[system[rows]]
        own = kept[rows], barred[rows], floors, place
        masks = swap_in_torch(T, r, *own, size, least_gain, limit)
        for row in rows[(masks != kept[rows]).any(1)].tolist():
            finish(row, masks[row - int(rows[0])])
    return result


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


def swap_in_torch(
    T: Tensor,  # (R, d, d) in an order of its own for each row
    r: Tensor,  # (R, d) in this order
    kept: Tensor,  # (R, d) bool
    barred: Tensor,  # (R, d) bool, columns that may not be swapped in
    floor: Tensor,  # (R, d)
    place: Tensor,  # (R, d) position of each column in the order
    size: int,
    least_gain: Tensor,  # (R,)
    limit: int,
) -> Tensor:  # (R, d) bool, what is kept in the end
    """`local_search_cpu.swap_row` for R rows together."""
    (R, d), row, kept = r.shape, torch.arange(len(r), device=r.device), kept.clone()
    T = T.gather(1, place[:, :, None].expand(-1, -1, d)).gather(2, place[:, None].expand(-1, d, -1))
    r = r.gather(1, place)
    for _ in range(limit):
        blocks = T.view(R, d // size, size, d // size, size).diagonal(dim1=1, dim2=3)
        v, of = blocks.permute(0, 3, 2, 1), (R, d // size, size)  # v: (R, groups, p, q)
        h = T.diagonal(dim1=1, dim2=2)
        p_may, step = ~kept & ~barred & (h > floor), r / h
        left = r.view(of)[:, :, None] - v * step.view(of)[..., None]
        room = v * v / h.view(of)[..., None] - h.view(of)[:, :, None]
        gain = ((r * step).view(of)[..., None] - left * left / room) / 2
        may = p_may.view(of)[..., None] & kept.view(of)[:, :, None]
        best, pair = torch.where(may, gain, -torch.inf).flatten(1).max(1)
        active = best > least_gain
        if not bool(active.any()):
            break
        group, p, q = pair // size**2, pair // size % size, pair % size
        for j in (group * size + p, group * size + q):
            pivot_in_torch(T, r, row[active], j[active])
            kept[row[active], j[active]] ^= True
    return kept


def pivot_in_torch(
    T: Tensor,  # (R, d, d)
    r: Tensor,  # (R, d)
    row: Tensor,  # (n,) those that pivot
    j: Tensor,  # (n,) at which column
) -> None:
    """`local_search_cpu.pivot` in some rows."""
    column, head = T[row, j], r[row, j]  # (n, d), (n,)
    at_j = column.gather(1, j[:, None])  # (n, 1)
    factor = column / at_j
    T[row] -= factor[:, :, None] * column[:, None]
    r[row] -= factor * head[:, None]
    T[row, :, j] = T[row, j] = column / at_j.abs()
    T[row, j, j] = -1 / at_j[:, 0]
    r[row, j] = head / at_j[:, 0].abs()
