"""Refinement of codes: after OBQ, integers on the grid move while that lowers a row's error.

OBQ (arXiv 2208.11580, section 5) never takes back how it has rounded a weight. Here every code may
move by ±1, alone or together with one of the columns most correlated with it, while

    E(q) = (w − ŵ) H (w − ŵ)ᵀ / 2,   ŵ = Δ q

falls. With g = (w − ŵ) H, moving code i by a = ±1 gains

    Δ a g_i − Δ² H_ii / 2

and moving code j by ±1 after it gains as much again with g_j − Δ a H_ij in place of g_j. Columns
are visited in their order, first up, then down; the best move that gains anything is made and g
brought up to date. Sweeps go on until nothing moves. About 97 % of the codes never do.

g starts from a product in float64; the search is in the precision of the elimination. The result
is taken, by `refinement.never_worse`, only where E in float64 is lower. On a CPU, rows are searched
one by one (`local_search_cpu.py`); on other devices, column by column in all rows together, which
makes the same moves.

    symbol  variable     shape      meaning
    q       codes        (rows, d)  integers, zero where ŵ is zero; low ≤ q ≤ high
    Δ       scale        (rows, 1)
            near         (G, d, k)  the columns j of largest H_ij² / (H_ii H_jj)
            frozen       (rows, d)  codes that stay: of weights that were zero before
"""

from __future__ import annotations

import torch
from torch import Tensor

from obc.solver.elimination import compiled_engine
from obc.solver.threads import in_pieces

NEIGHBOURS = 16
SWEEPS = 50  # at most
LEAST_MOVE_GAIN = 1e-5  # × E
ROWS_MOVED = 8  # at a time, by a thread of a CPU
BYTES_OF_A_CODE = 80  # for each code of a row in work on a GPU
COLUMNS_TOGETHER = 128  # whose neighbours are looked for


def refined_codes(
    quantised: Tensor,  # (rows, d) on the grid
    W: Tensor,  # (rows, d)
    system: Tensor,  # (rows,) which of the H is each row's, in ascending order
    scale: Tensor,  # (rows, 1)
    low: Tensor,  # (rows, 1) lowest code
    high: Tensor,  # (rows, 1) highest code
    H: Tensor,  # (G, d, d) float64
    memory: int,  # bytes, for a copy of H and for rows in work on a GPU
) -> Tensor:  # (rows, d) q
    """The codes after all moves that pay."""
    all_codes, frozen = torch.round(quantised / scale), W == 0
    sizes, d = torch.bincount(system, minlength=len(H)).tolist(), W.shape[1]
    together = max(1, (memory - W.element_size() * d * d) // (BYTES_OF_A_CODE * d))  # rows
    compiled = W.device.type == "cpu" and compiled_engine() is not None
    if compiled:
        from obc.solver.local_search_cpu import refine_rows

    for group, size in enumerate(sizes):
        first, own_H = sum(sizes[:group]), H[group]
        matrix, near = own_H.to(W.dtype), neighbours(own_H)
        H_near = matrix.gather(1, near)

        def work(piece: slice) -> None:
            rows = slice(first + piece.start, first + piece.stop)  # noqa: B023  # used at once
            delta, codes = (W[rows] - quantised[rows]).double(), all_codes[rows]
            gradient = delta @ own_H  # noqa: B023
            least_gain = (LEAST_MOVE_GAIN * (delta * gradient).sum(1) / 2).to(W.dtype)
            g, limits = gradient.to(W.dtype), (x[rows, 0] for x in (scale, low, high))
            state = codes, g, matrix, near, H_near, frozen[rows], *limits, least_gain  # noqa: B023
            if compiled:
                refine_rows(*(x.numpy() for x in state), SWEEPS)
            else:
                refine_in_torch(*state)

        if compiled:
            in_pieces(work, size, ROWS_MOVED)
        else:
            for start in range(0, size, together):
                work(slice(start, min(start + together, size)))
    return all_codes


def neighbours(H: Tensor) -> Tensor:  # (d, d) -> (d, k)
    """The columns most correlated with each, the most correlated first."""
    diagonal, count = H.diagonal(), min(NEIGHBOURS, len(H) - 1)
    weight, near = torch.where(diagonal > 0, diagonal.rsqrt(), 0.0), []
    for first in range(0, len(H), COLUMNS_TOGETHER):  # no second matrix of this size
        correlation = (H[first : first + COLUMNS_TOGETHER] * weight).abs_()
        correlation.diagonal(offset=first).fill_(-1)
        near.append(correlation.topk(count, dim=1).indices)
    return torch.cat(near)


def refine_in_torch(
    codes: Tensor,  # (R, d), changed in place
    g: Tensor,  # (R, d), changed in place
    H: Tensor,  # (d, d)
    near: Tensor,  # (d, k)
    H_near: Tensor,  # (d, k)
    frozen: Tensor,  # (R, d) bool
    scale: Tensor,  # (R,)
    low: Tensor,  # (R,)
    high: Tensor,  # (R,)
    least_gain: Tensor,  # (R,)
) -> None:
    """`local_search_cpu.refine_rows`, a column of all rows at a time."""
    low, high, width, diagonal = low[:, None], high[:, None], scale[:, None], H.diagonal()
    alone = torch.arange(len(H), device=H.device)[:, None]
    candidates = torch.cat([alone, near], dim=1)  # first the move of a column alone
    for _ in range(SWEEPS):
        before = codes.clone()
        for i in range(codes.shape[1]):
            j = candidates[i]
            for sign in (1, -1):
                step = sign * scale
                single = step * g[:, i] - step * step * diagonal[i] / 2
                after = g[:, j] - step[:, None] * H[i, j]
                move = torch.where(after > 0, 1.0, -1.0).to(g.dtype)
                gain = width * after.abs() - width * width * diagonal[j] / 2
                target = codes[:, j] + move
                may = ~frozen[:, j] & (low <= target) & (target <= high)
                gain[:, 0], may[:, 0], move[:, 0] = 0, True, 0
                gain = torch.where(may, single[:, None] + gain, -torch.inf)
                best, chosen = gain.max(1)
                own = codes[:, i] + sign
                moves = ~frozen[:, i] & (low[:, 0] <= own) & (own <= high[:, 0])
                moves &= best > least_gain
                other, sign_other = j[chosen], move.gather(1, chosen[:, None])[:, 0] * moves
                codes[:, i] += sign * moves
                codes.scatter_add_(1, other[:, None], sign_other[:, None])
                g -= (step * moves)[:, None] * H[i]
                g -= (scale * sign_other)[:, None] * H[other]
        if torch.equal(codes, before):
            return
