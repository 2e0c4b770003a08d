"""The blocked elimination of `elimination.py`, compiled for CPUs: a few rows at a time, in cache.

On a CPU the inner loop is bound by caches and by the number of small operations, not by arithmetic.
So here a row goes through a whole panel in compiled code (numba), its panel U in the L2 cache, and
only the flush A −= UᵀU is matrix products of torch's. A few rows make a task; tasks run on as many
threads as torch uses, and need (threads × rows of a task) matrices of d×d, however large the layer.

The algorithm, its pivot rules and its symbols are those of `elimination.py`, step by step; a test
holds both to the same traces. Rows are independent, so the result does not depend on the threads.

A is symmetric, and only half of it is kept up to date: of row i what is left of the end of the
tile (of `tile` positions) that i is in,

    A_ij  is stored in row i where  j // tile ≤ i // tile,  else as A_ji in row j

which halves the flops and the memory traffic of the flush, a product for each row of tiles. A pivot
column is gathered from its row up to the end of the tile, and from the column below.

N:M lets go not only of the columns that went, but also of those that never will, since their group
is full: half of the work. Their weights follow at the end. With P the columns gone in their order,
A_PP = LLᵀ and L z = w_P are what the elimination has computed (L the u's at P, z its moves), so
that

    w − A[:, P] A_PP⁻¹ w_P  =  w − A[:, P] y,        Lᵀ y = z

    symbol  variable  shape            meaning
    A       A         (rows, d, d)     own inverse Hessian of each row; the leading m×m is live
    U       U         (rows, b, d)     the panel's u's
    D       D         (rows, c, c, d/c) diagonal blocks of A, one for each unit of c columns
    L       L         (rows, k, d)     N:M: the u's of all steps, by their position in their panel
    z       z         (rows, k)        N:M: the moves e_p/√A_pp of all steps
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from engine.threads import CACHE_BYTES, in_pieces, rows_of_a_piece

INFINITY = np.inf
EXACT = {"contract", "nsz"}  # sums in their own order
compiled = njit(nogil=True, cache=True, error_model="numpy", fastmath=EXACT)
compiled_sum = njit(nogil=True, cache=True, error_model="numpy", fastmath=EXACT | {"reassoc"})
compiled_least = njit(nogil=True, cache=True, error_model="numpy", fastmath={"nnan", "nsz"})
CHUNK = 64  # scores whose least is found together


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
    Hinv, grid = Hinv.contiguous(), grid.contiguous()

    def work(rows: slice) -> None:
        task = _Task(W[rows], Hinv, floor, system[rows], unit, nm, grid[rows], panel)
        task.all_panels(order[rows], losses[rows], weights[rows])

    in_pieces(work, R, rows_of_a_piece(R, d * d * W.element_size()))
    return order, losses, weights


def bytes_per_task(d: int, item: int) -> tuple[int, int]:
    """Memory for a row in work, and how many are at a time, if there are as many."""
    rows = max(1, CACHE_BYTES // (d * d * item))
    return d * (d + d // 2 + 192) * item, torch.get_num_threads() * rows


def tile_of(d: int) -> int:
    """Positions in a tile: small ones waste less, large ones make longer products."""
    return 128 if d < 2000 else 192


class Rows(NamedTuple):
    """The state of a few rows beside A and U, by position; positions from `live` on are void."""

    w: np.ndarray  # (rows, d) weights
    D: np.ndarray  # (rows, c, c, d/c)
    floor: np.ndarray  # (rows, c, d/c) what no pivot falls below
    columns: np.ndarray  # (rows, d) int32, column at each position
    place: np.ndarray  # (rows, d) int32, position of each column
    barred: np.ndarray  # (rows, d/c) infinite where a unit may not go
    zeros: np.ndarray  # (rows, d/group) int32, N:M: zeros in each group
    grid: np.ndarray  # (rows, 4), or (rows, 0) to prune
    live: np.ndarray  # (rows,) m of each row
    unit: int
    n: int
    group: int  # N and M; 0: no such limit


class Found(NamedTuple):
    """What is found, step by step."""

    order: np.ndarray  # (rows, steps)
    losses: np.ndarray  # (rows, steps)
    weights: np.ndarray  # (rows, d)
    z: np.ndarray  # (rows, steps), N:M
    L: np.ndarray  # (rows, steps, d), N:M
    position: np.ndarray  # (rows, steps) int32, N:M: of each step's column in its panel
    places: np.ndarray  # (rows, panels, d) int32, N:M: column at each position in each panel
    width: np.ndarray  # (rows, panels) N:M: positions of each panel


class _Task:
    """A few rows on their way through all panels."""

    def __init__(
        self,
        W: Tensor,  # (rows, d)
        Hinv: Tensor,
        floor: Tensor,
        system: Tensor,
        unit: int,
        nm: tuple[int, int],
        grid: Tensor,  # (rows, 4) or (rows, 0)
        panel: int,
    ) -> None:
        R, d = W.shape
        self.panel, self.W, self.Hinv, self.system = panel, W, Hinv, system
        tiles = Hinv.view(-1, d // unit, unit, d // unit, unit).diagonal(dim1=1, dim2=3)
        floors = floor.view(-1, d // unit, unit).mT.index_select(0, system)
        zero = (W == 0).view(R, d // unit, unit).all(2).numpy()  # already gone: before all others
        every = np.tile(np.arange(d, dtype=np.int32), (R, 1))
        self.rows = Rows(
            w=W.clone().numpy(),
            D=tiles.index_select(0, system).contiguous().numpy(),
            floor=floors.contiguous().numpy(),
            columns=every,
            place=every.copy(),
            barred=np.where(zero, -INFINITY, 0.0).astype(W.numpy().dtype),
            zeros=np.zeros((R, d // nm[1] if nm[1] else 1), dtype=np.int32),
            grid=grid.numpy(),
            live=np.full(R, d),
            unit=unit,
            n=nm[0],
            group=nm[1],
        )
        self.U = W.new_empty(R, panel, d)
        self.tile = tile_of(d)
        self.A: Tensor | None = None  # made at the first flush: until then all share the inverse

    def all_panels(self, order: Tensor, losses: Tensor, weights: Tensor) -> None:
        """Run to the end; fill (rows, steps), (rows, steps) and (rows, d)."""
        (R, steps), d, rows = order.shape, self.W.shape[1], self.rows
        kept = steps if rows.group else 0
        panels = -(-kept // self.panel)
        found = Found(
            order.numpy(), losses.numpy(), weights.numpy(),
            z=np.empty((R, kept), dtype=rows.w.dtype),
            L=np.empty((R, kept, d), dtype=rows.w.dtype),
            position=np.empty((R, kept), dtype=np.int32),
            places=np.empty((R, panels, d), dtype=np.int32),
            width=np.empty((R, panels), dtype=np.int64),
        )  # fmt: skip
        own, shared = np.arange(R), self.system.numpy()
        for start in range(0, steps, self.panel):
            if start:
                self.flush()
            count = min(self.panel, steps - start)
            if self.A is None:
                run_panel(self.Hinv.numpy(), shared, d, rows, self.U.numpy(), start, count, found)
            else:
                run_panel(self.A.numpy(), own, self.tile, rows, self.U.numpy(), start, count, found)
            if rows.group:
                keep_panel(rows, self.U.numpy(), start, count, start // self.panel, found)
        if rows.group:
            write_without(self.W.numpy(), self.Hinv.numpy(), shared, self.panel, found)
        else:
            write_free(rows, found.weights)

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
        d = self.W.shape[1]
        own = self.W.new_empty(len(self.W), d, d)
        for A, g in zip(own, self.system.tolist(), strict=True):
            for first in range(0, d, self.tile):
                last = min(first + self.tile, d)
                A[first:last, :last] = self.Hinv[g, first:last, :last]
        return own


# -- a panel, compiled -----------------------------------------------------------------------------


@compiled
def run_panel(A, source, tile, rows, U, start, count, found):
    """Fix `count` columns of every row; note which, at what loss and value."""
    scores = np.empty(rows.barred.shape[1], dtype=rows.w.dtype)
    for r in range(len(rows.w)):
        w, columns, m = rows.w[r], rows.columns[r], rows.live[r]
        for k in range(0, count, rows.unit):
            score_units(rows, r, m, scores)
            chosen = first_least(scores, m // rows.unit)
            rows.barred[r, chosen] = np.inf
            if rows.group:
                bar_full_group(rows, r, columns[chosen])
            for j in range(rows.unit):
                p, step = chosen * rows.unit + j, start + k + j
                current_column(A[source[r]], tile, U[r], m, p, k + j)
                pivot = max(U[r, k + j, p], rows.floor[r, j, chosen])
                value = target(w[p], rows.grid[r])
                error = w[p] - value
                scale = w.dtype.type(1) / np.sqrt(pivot)
                move(w, rows.D[r], rows.floor[r], U[r, k + j], m, scale, error * scale)
                U[r, k + j, p] = pivot * scale
                found.order[r, step] = columns[p]
                found.losses[r, step] = error * error / (2 * pivot)
                found.weights[r, columns[p]] = value
                if rows.group:
                    found.z[r, step], found.position[r, step] = error * scale, p


@compiled
def score_units(rows, r, m, scores):
    """OBS's score of every unit, or what stands for it; infinite where barred."""
    w, D, floor, barred = rows.w[r], rows.D[r], rows.floor[r], rows.barred[r]
    if rows.unit > 1:
        score_blocks(w, D, floor, barred, m // rows.unit, scores)
    elif len(rows.grid[r]):
        score_roundings(w, D[0, 0], barred, rows.grid[r], m, scores)
    else:
        diagonal = D[0, 0]
        for i in range(m):
            scores[i] = w[i] * w[i] / diagonal[i] + barred[i]


@compiled
def score_roundings(w, diagonal, barred, grid, m, scores):
    """Quantising: weights far outside of the grid go first, the farthest before all."""
    step, low, high, half = grid[0], grid[1], grid[2], grid[3]
    for i in range(m):
        e = w[i] - min(max(np.rint(w[i] / step), low), high) * step
        score = e * e / diagonal[i] + barred[i]
        outlier = (abs(e) > half) & (score < np.inf)
        scores[i] = -abs(e) if outlier else score


@compiled
def score_blocks(w, D, floor, barred, units, scores):
    """w_B (A_BB)⁻¹ w_Bᵀ of every block, by elimination of its own columns; all blocks at a time."""
    c = len(D)
    block, z = D[:, :, :units].copy(), np.empty((c, units), dtype=w.dtype)
    for j in range(c):
        for b in range(units):
            z[j, b] = w[b * c + j]
    scores[:units] = barred[:units]
    for j in range(c):
        for b in range(units):
            pivot = max(block[j, j, b], floor[j, b])
            scores[b] += z[j, b] * z[j, b] / pivot
            block[j, j, b] = 1 / pivot
        for i in range(j + 1, c):
            for b in range(units):
                factor = block[i, j, b] * block[j, j, b]
                z[i, b] -= factor * z[j, b]
                block[j, i, b] = factor  # the upper half is free
            for h in range(j + 1, i + 1):
                for b in range(units):
                    block[i, h, b] -= block[j, i, b] * block[h, j, b]


@compiled
def first_least(scores, count):
    """Index of the first of the least of `count` scores."""
    chunk, least = 0, np.inf
    for first in range(0, count, CHUNK):
        here = least_of(scores, first, min(first + CHUNK, count))
        if here < least:
            chunk, least = first, here
    for i in range(chunk, count):
        if scores[i] == least:
            return i
    return 0


@compiled_least
def least_of(scores, first, last):
    least = scores[first]
    for i in range(first, last):
        least = min(least, scores[i])
    return least


@compiled
def bar_full_group(rows, r, column):
    """N:M: count a zero; once its group has N of them, bar what is left of the group."""
    g = column // rows.group
    rows.zeros[r, g] += 1
    if rows.zeros[r, g] >= rows.n:
        for j in range(g * rows.group, (g + 1) * rows.group):
            p = rows.place[r, j]
            if rows.columns[r, p] == j:  # else it is gone, and another column is there
                rows.barred[r, p] = np.inf


@compiled
def target(weight, grid):
    """The value that a weight is fixed at."""
    if len(grid):
        return min(max(np.rint(weight / grid[0]), grid[1]), grid[2]) * grid[0]
    return grid.dtype.type(0)


@compiled
def current_column(A, tile, U, m, p, k):
    """U[k] = A[:, p] − U[:k]ᵀ U[:k, p]: column p as of step k of the panel."""
    u, end = U[k], min((p // tile + 1) * tile, m)
    for i in range(end):
        u[i] = A[p, i]
    for i in range(end, m):
        u[i] = A[i, p]
    j = 0
    while j + 8 <= k:
        a0, a1, a2, a3 = U[j, p], U[j + 1, p], U[j + 2, p], U[j + 3, p]
        a4, a5, a6, a7 = U[j + 4, p], U[j + 5, p], U[j + 6, p], U[j + 7, p]
        u0, u1, u2, u3 = U[j], U[j + 1], U[j + 2], U[j + 3]
        u4, u5, u6, u7 = U[j + 4], U[j + 5], U[j + 6], U[j + 7]
        for i in range(m):
            u[i] -= (a0 * u0[i] + a1 * u1[i] + a2 * u2[i] + a3 * u3[i]
                     + a4 * u4[i] + a5 * u5[i] + a6 * u6[i] + a7 * u7[i])  # fmt: skip
        j += 8
    while j < k:
        a0, u0 = U[j, p], U[j]
        for i in range(m):
            u[i] -= a0 * u0[i]
        j += 1


@compiled
def move(w, D, floor, u, m, scale, moved):
    """u /= √A_pp; w −= u e_p/√A_pp; and the diagonal blocks lose uuᵀ."""
    c = len(D)
    if c == 1:
        diagonal, least = D[0, 0], floor[0]
        for i in range(m):
            x = u[i] * scale
            u[i] = x
            w[i] -= x * moved
            diagonal[i] = max(diagonal[i] - x * x, least[i])
        return
    for i in range(m):
        u[i] *= scale
        w[i] -= u[i] * moved
    for i in range(c):
        for j in range(c):
            block = D[i, j]
            for b in range(m // c):
                block[b] -= u[b * c + i] * u[b * c + j]


@compiled
def keep_panel(rows, U, start, count, panel, found):
    """N:M: the panel's u's, and which column is where in it."""
    for r in range(len(rows.w)):
        m = rows.live[r]
        found.places[r, panel, :m], found.width[r, panel] = rows.columns[r, :m], m
        for k in range(count):
            found.L[r, start + k, :m] = U[r, k, :m]


# -- between panels, compiled ----------------------------------------------------------------------


@compiled
def compact(A, U, rows, tile):
    """Move what is alive among the last positions into the holes before it, in every row."""
    unit = rows.unit
    for r in range(len(rows.w)):
        source, hole, left = vacancies(rows.barred[r], rows.live[r], unit)
        rows.live[r] = left
        move_matrix(A[r], source, hole, left, tile)
        for x in range(len(source)):
            s, h = source[x], hole[x]
            rows.w[r, h], rows.columns[r, h] = rows.w[r, s], rows.columns[r, s]
            rows.place[r, rows.columns[r, h]] = h
        for x in range(0, len(source), unit):
            s, h = source[x] // unit, hole[x] // unit
            rows.barred[r, h] = rows.barred[r, s]
            for i in range(unit):
                rows.floor[r, i, h] = rows.floor[r, i, s]
                for j in range(unit):
                    rows.D[r, i, j, h] = rows.D[r, i, j, s]
        for j in range(U.shape[1]):
            for x in range(len(source)):
                U[r, j, hole[x]] = U[r, j, source[x]]


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
def vacancies(barred, m, unit):
    """Positions alive that have to move, the holes that they move into, and how many are alive.

    Of m positions those of barred units are gone. Sources and holes ascend, and whole units stay
    together.
    """
    left = m
    for b in range(m // unit):
        if barred[b] == np.inf:
            left -= unit
    source = np.empty(m - left, dtype=np.int64)
    hole = np.empty(m - left, dtype=np.int64)
    moves = holes = 0
    for i in range(m):
        gone = barred[i // unit] == np.inf
        if gone and i < left:
            hole[holes] = i
            holes += 1
        elif not gone and i >= left:
            source[moves] = i
            moves += 1
    return source[:moves], hole[:moves], left


# -- at the end, compiled --------------------------------------------------------------------------


@compiled
def write_free(rows, weights):
    """Write the weights that were never fixed to where they belong."""
    for r in range(len(rows.w)):
        for i in range(rows.live[r]):
            if rows.barred[r, i // rows.unit] < np.inf:
                weights[r, rows.columns[r, i]] = rows.w[r, i]


@compiled
def write_without(W, Hinv, system, panel, found):
    """N:M: every row's weights once the columns of its order are zero; see the module docstring."""
    for r in range(len(W)):
        y = np.zeros(W.shape[1], dtype=W.dtype)
        for number in range(found.places.shape[1] - 1, -1, -1):
            solve_panel(found, r, number, panel, y)
        w, order = found.weights[r], found.order[r]
        w[:] = W[r]
        for p in order:
            subtract(w, y[p], Hinv[system[r], p])
        for p in order:
            w[p] = 0


@compiled
def solve_panel(found, r, number, panel, y):
    """Lᵀ y = z for the columns of one panel, those of later panels known."""
    m = found.width[r, number]
    places, here = found.places[r, number, :m], np.empty(m, dtype=y.dtype)
    for i in range(m):
        here[i] = y[places[i]]
    last = min((number + 1) * panel, found.order.shape[1])
    for step in range(last - 1, number * panel - 1, -1):
        u, p = found.L[r, step, :m], found.position[r, step]
        here[p] = (found.z[r, step] - dot(u, here)) / u[p]
        y[places[p]] = here[p]


@compiled_sum
def dot(a, b):
    total = a.dtype.type(0)
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


@compiled
def subtract(w, factor, row):
    for i in range(len(w)):
        w[i] -= factor * row[i]
