"""The blocked elimination of `elimination.py`, compiled for CPUs: a few rows at a time, in cache.

On a CPU the inner loop is bound by caches and by the number of small operations, not by arithmetic.
So here a row goes through a whole panel in compiled code (`panel_cpu.py`, numba), its panel U in
the L2 cache, and only the flush A −= UᵀU is matrix products of torch's. A few rows make a task;
tasks run on as many threads as torch uses, and need (threads × rows of a task) matrices of d×d,
however large the layer. N:M has a way of its own (`nm_cpu.py`).

The algorithm, its pivot rules and its symbols are those of `elimination.py`, step by step; a test
holds both to the same traces. Rows are independent, so the result does not depend on the threads.

A is symmetric, and only half of it is kept up to date: row i as far as the end of the tile that
position i is in,

    A_ij  is stored in row i where  j // tile ≤ i // tile,  else as A_ji in row j

which halves the flops and the memory traffic of the flush, a product for each row of tiles. A pivot
column is gathered from its row up to the end of the tile, and from the column below.

    symbol  variable  shape         meaning
    A       A         (rows, d, d)  own inverse Hessian of each row; the leading m×m is live
    U       U         (rows, b, d)  the panel's u's
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from obc.solver.nm_cpu import prune_nm
from obc.solver.panel_cpu import (
    Found,
    Rows,
    compiled,
    first_least,
    move,
    move_columns,
    move_row,
    rows_of,
    score_units,
    subtract_panel,
    target,
    vacancies,
)
from obc.solver.threads import CACHE_BYTES, Spare, in_pieces, rows_of_a_piece


def eliminate_rows(
    W: Tensor,  # (R, d)
    Hinv: Tensor,  # (G, d, d)
    floor: Tensor,  # (G, d)
    system: Tensor,  # (R,)
    unit: int,
    nm: tuple[int, int],
    grid: Tensor,  # (R, 4), or (R, 0) to prune
    steps: int,
    panel: int,
) -> tuple[Tensor, Tensor, Tensor]:  # order (R, steps) int64, losses (R, steps), weights (R, d)
    """The trace of every row; for unit, nm and grid see `elimination.PivotRule`."""
    R, d = W.shape
    order = torch.empty(R, steps, dtype=torch.int64)
    losses, weights = W.new_empty(R, steps), torch.empty_like(W)
    Hinv, grid, spare = Hinv.contiguous(), grid.contiguous(), Spare(W)

    def work(part: slice) -> None:
        rows = rows_of(W[part], Hinv, floor, system[part], unit, grid[part])
        found = Found(order[part].numpy(), losses[part].numpy(), weights[part].numpy())
        if nm[1]:
            prune_nm(W[part], rows, Hinv, system[part], nm, panel, spare, found)
        else:
            with spare.lent("A", len(rows.w), d, d) as A:
                Task(rows, Hinv, system[part], panel, A).run(found)

    in_pieces(work, R, rows_of_a_piece(R, d * d * W.element_size()))
    return order, losses, weights


def bytes_per_task(d: int, item: int) -> tuple[int, int]:
    """Memory for a row in work, and how many are at a time, if there are as many."""
    rows = max(1, CACHE_BYTES // (d * d * item))
    return d * (d + 192) * item, torch.get_num_threads() * rows


def tile_of(d: int) -> int:
    """Positions in a tile: small ones waste less, large ones make longer products."""
    return 128 if d < 2000 else 192


class Task:
    """A few rows on their way through all panels."""

    def __init__(self, rows: Rows, Hinv: Tensor, system: Tensor, panel: int, room: Tensor) -> None:
        R, d = rows.w.shape
        self.rows, self.Hinv, self.system, self.panel = rows, Hinv, system, panel
        self.U = Hinv.new_empty(R, panel, d)
        self.tile = tile_of(d)
        self.room = room  # (rows, d, d)
        self.A: Tensor | None = None  # made at the first flush: until then all share the inverse

    def run(self, found: Found) -> None:
        """From the first step to the last."""
        steps, (R, d) = found.order.shape[1], self.rows.w.shape
        for start in range(0, steps, self.panel):
            if start:
                self.flush()
            if self.A is None:
                A, source, tile = self.Hinv, self.system.numpy(), d
            else:
                A, source, tile = self.A, np.arange(R), self.tile
            count = min(self.panel, steps - start)
            run_panel(A.numpy(), source, tile, self.rows, self.U.numpy(), start, count, found)
        write_free(self.rows, found.weights)

    def flush(self) -> None:
        """After a whole panel: move live columns into the holes, then A −= UᵀU on what is left."""
        if self.A is None:
            self.A = self.own_copy()
        compact(self.A.numpy(), self.U.numpy(), self.rows, self.tile)
        for A, U, m in zip(self.A, self.U, self.rows.live.tolist(), strict=True):
            for first in range(0, m, self.tile):
                last = min(first + self.tile, m)
                A[first:last, :last].addmm_(U[:, first:last].T, U[:, :last], alpha=-1)

    def own_copy(self) -> Tensor:  # (rows, d, d)
        """An inverse for each row, as far as it is stored."""
        d = self.rows.w.shape[1]
        for A, g in zip(self.room, self.system.tolist(), strict=True):
            for first in range(0, d, self.tile):
                last = min(first + self.tile, d)
                A[first:last, :last] = self.Hinv[g, first:last, :last]
        return self.room


# -- compiled --------------------------------------------------------------------------------------


@compiled
def run_panel(A, source, tile, rows, U, start, count, found):
    """Fix `count` columns of every row; note which, at what loss and value."""
    for r in range(len(rows.w)):
        w, columns, m = rows.w[r], rows.columns[r], rows.live[r]
        for k in range(0, count, rows.unit):
            score_units(rows, r, m)
            chosen = first_least(rows.keys, m // rows.unit)
            rows.barred[r, chosen] = np.inf
            for j in range(rows.unit):
                p, step = chosen * rows.unit + j, start + k + j
                take_column(A[source[r]], tile, U[r, k + j], m, p)
                subtract_panel(U[r], k + j, p, m)
                pivot = max(U[r, k + j, p], rows.floor[r, j, chosen])
                value = target(w[p], rows.grid[r])
                error = w[p] - value
                scale = w.dtype.type(1) / np.sqrt(pivot)
                move(w, rows.D[r], rows.floor[r], U[r, k + j], m, scale, error * scale)
                found.order[r, step] = columns[p]
                found.losses[r, step] = error * error / (2 * pivot)
                found.weights[r, columns[p]] = value


@compiled
def take_column(A, tile, u, m, p):
    """u = A[:, p], from where it is stored."""
    end = min((p // tile + 1) * tile, m)
    for i in range(end):
        u[i] = A[p, i]
    for i in range(end, m):
        u[i] = A[i, p]


@compiled
def compact(A, U, rows, tile):
    """Move what is alive among the last positions into the holes before it, in every row."""
    for r in range(len(rows.w)):
        source, hole, left = vacancies(rows.barred[r], rows.live[r], rows.unit)
        rows.live[r] = left
        move_matrix(A[r], source, hole, left, tile)
        move_row(rows, r, source, hole)
        move_columns(U[r], source, hole)


@compiled
def move_matrix(A, source, hole, left, tile):
    """Rows and columns `source` of a symmetric matrix to `hole`, where it is stored."""
    moves, within = len(source), 0
    for i in range(left):
        end = min((i // tile + 1) * tile, left)
        while within < moves and hole[within] < end:
            within += 1
        for x in range(within):
            A[i, hole[x]] = A[source[x], i]
    for x in range(moves):
        h, s = hole[x], source[x]
        end = min((h // tile + 1) * tile, left)
        A[h, :end] = A[s, :end]
        for y in range(moves):
            if hole[y] < end:
                t = source[y]
                A[h, hole[y]] = A[s, t] if t // tile <= s // tile else A[t, s]


@compiled
def write_free(rows, weights):
    """Write the weights that were never fixed to where they belong."""
    for r in range(len(rows.w)):
        for i in range(rows.live[r]):
            if rows.barred[r, i // rows.unit] < np.inf:
                weights[r, rows.columns[r, i]] = rows.w[r, i]
