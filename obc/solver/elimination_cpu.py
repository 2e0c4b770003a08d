"""The eliminations of `elimination.py`, compiled for CPUs: a few rows at a time, in cache.

On a CPU the inner loop is bound by caches and by the number of small operations, not by arithmetic.
So a row goes through a whole panel of steps in compiled code (numba), with the panel U in the L2
cache. A few rows form a piece of work; pieces run on as many threads as torch uses and need
(threads × rows of a piece) matrices of d×d, however large the layer. The algorithm, its pivot rules
and its symbols are those of `elimination.py`, step by step; a test holds both to the same traces.
Rows are independent, so the result does not depend on the number of threads.

`eliminate_by_flushes` brings A up to date after every panel by matrix products, A −= UᵀU. A is
symmetric, and only half of it is stored: row i as far as the end of the tile that position i is in,

    A_ij  is stored in row i where  j // tile ≤ i // tile,  else as A_ji in row j

which halves the flops and the memory traffic of the flush, a product for each row of tiles. A pivot
column is gathered from its row up to the end of the tile, and from the column below.

`prune_nm` never brings a matrix up to date. N:M looks at few pivot columns (half of them for 2:4,
and a full group's are barred), so a flush would update many columns that never become pivots.
Instead, a pivot column is made when it is chosen, from the shared inverse and the u's of all steps
so far (a left-looking factorisation): less than half of the multiply-adds for 2:4, and d·k numbers
a row in place of d². The weights follow at the end. With P the columns gone in their order,
A_PP = LLᵀ and L z = w_P are what the elimination has computed, so that

    w − A[:, P] A_PP⁻¹ w_P  =  w − A[:, P] y,        Lᵀ y = z

Where the u's of a row outgrow the cache (d ≥ 2304) this waits for memory. A third loop that made
columns ahead, many in one product, was 1.12–1.17× faster there, but a whole 2:4 run of ResNet-18
gained less than 2 % from it (414 s and 408 s on 2 cores), so there is none.

    symbol  variable  shape             meaning
    w       w         (rows, d)         weights, by position
    A       A         (rows, d, d)      own inverse Hessian of each row; the leading m×m is live
    D       D         (rows, c, c, d/c) diagonal blocks of A, one for each unit of c columns
    U       U         (rows, b, d)      u's: of the panel's b steps; N:M: of all k steps
    L       L         (rows, k, k)      N:M: the u's at P, in the order of P, up to the diagonal
    z       z         (rows, k)         N:M: the moves e_p/√A_pp

The last two kernels serve `levels.py`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from numba.core.caching import FunctionCache, IndexDataCacheFile
from torch import Tensor

from obc.solver.threads import CACHE_BYTES, SpareBuffers, in_pieces, rows_of_a_piece

CHUNK = 32  # scores that are searched at a time
EXACT = {"contract", "nsz"}  # sums in their own order
REORDERED = {"contract", "reassoc"}


class KernelCache(FunctionCache):
    """Machine code of one kernel, in a folder that is named by the hash of its sources.

    A kernel contains what it calls, and the constants that it reads. numba looks for changes in the
    kernel's own file only; here all files in `sources` count, and versions never share a folder.
    """

    def __init__(self, function: Callable, sources: tuple[str, ...]) -> None:
        super().__init__(function)
        self.sources = sorted({__file__, function.__code__.co_filename, *sources})
        content = b"".join(Path(source).read_bytes() for source in self.sources)
        name = f"kernels-{hashlib.blake2b(content, digest_size=8).hexdigest()}"
        locator, base = self._impl.locator, self._impl.filename_base
        locator._cache_path = self._cache_path = os.path.join(self._cache_path, name)
        self._cache_file = IndexDataCacheFile(self._cache_path, base, locator.get_source_stamp())


def compiler(*sources: str, fastmath: set[str] = EXACT) -> Callable[[Callable], Callable]:
    """A decorator for kernels, whose machine code also depends on the files `sources`."""

    def compiled(function: Callable) -> Callable:
        kernel = njit(nogil=True, error_model="numpy", fastmath=fastmath)(function)
        kernel._cache = KernelCache(function, sources)
        return kernel

    return compiled


compiled = compiler()


# -- rows ------------------------------------------------------------------------------------------


class RowArrays(NamedTuple):
    """The state of a few rows, by position, without A and U; positions from `live` on are void."""

    w: np.ndarray  # (rows, d) weights
    D: np.ndarray  # (rows, c, c, d/c)
    floor: np.ndarray  # (rows, c, d/c) what no pivot falls below
    columns: np.ndarray  # (rows, d) int32, column at each position
    barred: np.ndarray  # (rows, d/c) infinite where a unit may not go
    grid: np.ndarray  # (rows, 4) see `elimination.PivotRule`; (rows, 0) to prune
    live: np.ndarray  # (rows,) m of each row
    scores: np.ndarray  # (d/c,) of the row that is being worked on
    keys: np.ndarray  # (d/c,) the same bytes as integers
    unit: int


class GroupArrays(NamedTuple):
    """What N:M adds to `RowArrays`; empty for other rules."""

    place: np.ndarray  # (rows, d) int32, position of each column
    zeros: np.ndarray  # (rows, d/M) int32, zeros in each group
    L: np.ndarray  # (rows, k, k)
    z: np.ndarray  # (rows, k)
    n: int
    size: int  # M; 0: no groups


class TraceArrays(NamedTuple):
    """The trace of a few rows, see `elimination.Trace`; changed in place."""

    order: np.ndarray  # (rows, steps) int64, column fixed at each step
    losses: np.ndarray  # (rows, steps)
    weights: np.ndarray  # (rows, d) at the end


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
    Hinv, grid, spare = Hinv.contiguous(), grid.contiguous(), SpareBuffers(W)

    def work(piece: slice) -> None:
        rows = initial_rows(W[piece], Hinv, floor, system[piece], unit, grid[piece])
        trace = TraceArrays(order[piece].numpy(), losses[piece].numpy(), weights[piece].numpy())
        if nm[1]:
            prune_nm(W[piece], rows, Hinv, system[piece].numpy(), nm, panel, spare, trace)
        else:
            eliminate_by_flushes(rows, Hinv, system[piece], panel, spare, trace)

    in_pieces(work, R, rows_of_a_piece(R, d * d * W.element_size()))
    return order, losses, weights


def bytes_per_row_in_work(d: int, item: int) -> tuple[int, int]:
    """Memory for a row in work, and the most rows that are in work at a time."""
    rows = max(1, CACHE_BYTES // (d * d * item))
    return d * (d + 192) * item, torch.get_num_threads() * rows


def initial_rows(
    W: Tensor,  # (rows, d)
    Hinv: Tensor,  # (G, d, d)
    floor: Tensor,  # (G, d)
    system: Tensor,  # (rows,)
    unit: int,
    grid: Tensor,  # (rows, 4) or (rows, 0)
) -> RowArrays:
    """Rows before their first step; units that are zero already go before all others."""
    (R, d), scores = W.shape, np.empty(W.shape[1] // unit, dtype=W.numpy().dtype)
    tiles = Hinv.view(-1, d // unit, unit, d // unit, unit).diagonal(dim1=1, dim2=3)
    zero = (W == 0).view(R, d // unit, unit).all(2).numpy()
    return RowArrays(
        w=W.clone().numpy(),
        D=tiles.index_select(0, system).contiguous().numpy(),
        floor=floor.view(-1, d // unit, unit).mT.index_select(0, system).contiguous().numpy(),
        columns=np.tile(np.arange(d, dtype=np.int32), (R, 1)),
        barred=np.where(zero, -np.inf, 0.0).astype(W.numpy().dtype),
        grid=grid.numpy(),
        live=np.full(R, d),
        scores=scores,
        keys=scores.view(f"i{scores.itemsize}"),
        unit=unit,
    )


def tile_of(d: int) -> int:
    """Positions in a tile: small ones waste less, large ones make longer products."""
    return 128 if d < 2000 else 192


def eliminate_by_flushes(
    rows: RowArrays,
    Hinv: Tensor,  # (G, d, d)
    system: Tensor,  # (rows,)
    panel: int,
    spare: SpareBuffers,
    trace: TraceArrays,
) -> None:
    """Run a few rows from the first step to the last, with A up to date after each panel."""
    steps, (R, d), tile = trace.order.shape[1], rows.w.shape, tile_of(rows.w.shape[1])
    U, no_groups = Hinv.new_empty(R, panel, d), np.empty((R, 0), np.int32)
    L, z = np.empty((R, 0, 0), rows.w.dtype), np.empty((R, 0), rows.w.dtype)
    groups = GroupArrays(no_groups, no_groups, L, z, n=0, size=0)
    with spare.lent("A", R, d, d) as A:
        matrices, source, width = Hinv, system.numpy(), d  # until the first flush all share it
        for start in range(0, steps, panel):
            if start == panel:
                matrices, source, width = A, np.arange(R), tile
                copy_stored(Hinv, system, A, tile)
            if start:
                close_panel(A.numpy(), tile, rows, groups, U.numpy(), panel)
                for own, u, m in zip(A, U, rows.live.tolist(), strict=True):
                    for first in range(0, m, tile):
                        last = min(first + tile, m)
                        own[first:last, :last].addmm_(u[:, first:last].T, u[:, :last], alpha=-1)
            count = min(panel, steps - start)
            run_panel(matrices.numpy(), source, width, rows, groups, U.numpy(), start, count, trace)
    write_free(rows, trace.weights)


def copy_stored(Hinv: Tensor, system: Tensor, A: Tensor, tile: int) -> None:
    """Give each row its own inverse, as far as it is stored."""
    d = A.shape[2]
    for own, g in zip(A, system.tolist(), strict=True):
        for first in range(0, d, tile):
            last = min(first + tile, d)
            own[first:last, :last] = Hinv[g, first:last, :last]


def prune_nm(
    W: Tensor,  # (rows, d)
    rows: RowArrays,
    Hinv: Tensor,  # (G, d, d)
    system: np.ndarray,  # (rows,)
    nm: tuple[int, int],
    panel: int,
    spare: SpareBuffers,
    trace: TraceArrays,
) -> None:
    """Run a few rows from the first step to the last, each column made when it is chosen."""
    (R, steps), d = trace.order.shape, W.shape[1]
    with (
        spare.lent("U", R, steps, d) as U,
        spare.lent("L", R, steps, steps) as L,
        spare.lent("z", R, steps) as z,
    ):
        groups = GroupArrays(
            place=np.tile(np.arange(d, dtype=np.int32), (R, 1)),
            zeros=np.zeros((R, d // nm[1]), dtype=np.int32),
            L=L.numpy(),
            z=z.numpy(),
            n=nm[0],
            size=nm[1],
        )
        A, U = Hinv.numpy(), U.numpy()
        for start in range(0, steps, panel):
            if start:
                close_panel(A, d, rows, groups, U, start)
            count = min(panel, steps - start)
            run_panel(A, system, d, rows, groups, U, start, count, trace)
        write_pruned(W.numpy(), A, system, groups, trace)


# -- a panel, compiled -----------------------------------------------------------------------------


@compiled
def run_panel(A, source, tile, rows, groups, U, start, count, trace):
    """Fix `count` columns of every row from step `start` on; record which, at what loss and value.

    Row r's matrix is A[source[r]], by position; for N:M by column.
    """
    for r in range(len(rows.w)):
        w, columns, m = rows.w[r], rows.columns[r], rows.live[r]
        first = start if groups.size else 0  # row of U that the panel begins at
        for k in range(0, count, rows.unit):
            score_units(rows, r, m)
            chosen = first_least(rows.keys, m // rows.unit)
            rows.barred[r, chosen] = np.inf
            if groups.size:
                bar_full_group(rows, groups, r, columns[chosen])
            for j in range(rows.unit):
                p, i, step = chosen * rows.unit + j, first + k + j, start + k + j
                if groups.size:
                    gather_column(A[source[r]], columns, U[r, i], m, p)
                else:
                    take_column(A[source[r]], tile, U[r, i], m, p)
                subtract_panel(U[r], i, p, m)
                pivot = max(U[r, i, p], rows.floor[r, j, chosen])
                value = target(w[p], rows.grid[r])
                error = w[p] - value
                scale = w.dtype.type(1) / np.sqrt(pivot)
                if groups.size:
                    for h in range(step):
                        groups.L[r, step, h] = U[r, h, p]
                    groups.L[r, step, step] = pivot * scale
                    groups.z[r, step] = error * scale
                move(w, rows.D[r], rows.floor[r], U[r, i], m, scale, error * scale)
                trace.order[r, step] = columns[p]
                trace.losses[r, step] = error * error / (2 * pivot)
                trace.weights[r, columns[p]] = value


@compiled
def close_panel(A, tile, rows, groups, U, steps):
    """Move live columns among the last positions into the holes before them, in every row.

    With them move the rows and columns of A (except for N:M) and `steps` rows of U.
    """
    for r in range(len(rows.w)):
        source, hole, live = vacancies_of_row(rows.barred[r], rows.live[r], rows.unit)
        rows.live[r] = live
        move_row(rows, r, source, hole)
        if groups.size:
            for x in range(len(source)):
                groups.place[r, rows.columns[r, hole[x]]] = hole[x]
        else:
            move_matrix(A[r], source, hole, live, tile)
        for i in range(steps):
            for x in range(len(source)):
                U[r, i, hole[x]] = U[r, i, source[x]]


# -- which unit goes next --------------------------------------------------------------------------


@compiled
def score_units(rows, r, m):
    """The score of every unit, as `PivotRule.rank` gives it; infinite where barred."""
    w, D, floor, barred = rows.w[r], rows.D[r], rows.floor[r], rows.barred[r]
    scores = rows.scores
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
    """Quantising: weights far outside the grid go first, beginning with the farthest."""
    step, low, high, half = grid[0], grid[1], grid[2], grid[3]
    for i in range(m):
        e = w[i] - min(max(np.rint(w[i] / step), low), high) * step
        score = e * e / diagonal[i] + barred[i]
        outlier = (abs(e) > half) & (score < np.inf)
        scores[i] = -abs(e) if outlier else score


@compiled
def score_blocks(w, D, floor, barred, units, scores):
    """w_B (A_BB)⁻¹ w_Bᵀ of every block, by elimination of its columns; all blocks at a time."""
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
                block[j, i, b] = factor  # the upper half is unused
            for h in range(j + 1, i + 1):
                for b in range(units):
                    block[i, h, b] -= block[j, i, b] * block[h, j, b]


@compiled
def first_least(keys, count):
    """Index of the first of the least of `count` scores, which are given by their bits.

    LLVM vectorises the minimum of integers, but not of floating-point numbers. Those are sign and
    magnitude; with the magnitude of negative ones flipped, they are ordered like integers.
    """
    keys = keys[:count]
    shift = keys.dtype.type(8 * keys.itemsize - 1)
    magnitude = keys.dtype.type((np.int64(1) << np.int64(shift)) - 1)
    least = magnitude
    for i in range(count):
        key = keys[i] ^ ((keys[i] >> shift) & magnitude)
        least = key if key < least else least
    least ^= (least >> shift) & magnitude
    for first in range(0, count, CHUNK):
        chunk, hits = keys[first : first + CHUNK], 0
        for i in range(len(chunk)):
            hits += chunk[i] == least
        if hits:
            for i in range(len(chunk)):
                if chunk[i] == least:
                    return first + i
    return 0


@compiled
def bar_full_group(rows, groups, r, column):
    """Count a zero; once its group has N of them, bar the rest of the group."""
    g = column // groups.size
    groups.zeros[r, g] += 1
    if groups.zeros[r, g] >= groups.n:
        for j in range(g * groups.size, (g + 1) * groups.size):
            p = groups.place[r, j]
            if rows.columns[r, p] == j:  # else j is gone, and another column is in its place
                rows.barred[r, p] = np.inf


# -- what a step does ------------------------------------------------------------------------------


@compiled
def take_column(A, tile, u, m, p):
    """u = A[:, p], from where it is stored."""
    end = min((p // tile + 1) * tile, m)
    for i in range(end):
        u[i] = A[p, i]
    for i in range(end, m):
        u[i] = A[i, p]


@compiled
def gather_column(Hinv, columns, u, m, p):
    """u = the pivot's column of the inverse, by position."""
    column = Hinv[columns[p]]
    for i in range(m):
        u[i] = column[columns[i]]


@compiled
def target(weight, grid):
    """The value that a weight is fixed at."""
    if len(grid):
        return min(max(np.rint(weight / grid[0]), grid[1]), grid[2]) * grid[0]
    return grid.dtype.type(0)


@compiled
def subtract_panel(U, k, p, m):
    """U[k] −= U[:k]ᵀ U[:k, p], eight rows of U at a time."""
    u, j = U[k], 0
    while j + 8 <= k:
        a0, a1, a2, a3 = U[j, p], U[j + 1, p], U[j + 2, p], U[j + 3, p]
        a4, a5, a6, a7 = U[j + 4, p], U[j + 5, p], U[j + 6, p], U[j + 7, p]
        u0, u1, u2, u3 = U[j], U[j + 1], U[j + 2], U[j + 3]
        u4, u5, u6, u7 = U[j + 4], U[j + 5], U[j + 6], U[j + 7]
        for i in range(m):
            u[i] -= (
                a0 * u0[i]
                + a1 * u1[i]
                + a2 * u2[i]
                + a3 * u3[i]
                + a4 * u4[i]
                + a5 * u5[i]
                + a6 * u6[i]
                + a7 * u7[i]
            )
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


# -- between panels --------------------------------------------------------------------------------


@compiled
def vacancies_of_row(barred, m, unit):
    """Live positions that have to move, the holes that they move into, and how many are alive.

    Of m positions, all are alive but those of barred units. Sources and holes ascend, and whole
    units stay together.
    """
    live = m
    for b in range(m // unit):
        if barred[b] == np.inf:
            live -= unit
    source = np.empty(m - live, dtype=np.int64)
    hole = np.empty(m - live, dtype=np.int64)
    moves = holes = 0
    for i in range(m):
        gone = barred[i // unit] == np.inf
        if gone and i < live:
            hole[holes] = i
            holes += 1
        elif not gone and i >= live:
            source[moves] = i
            moves += 1
    return source[:moves], hole[:moves], live


@compiled
def move_row(rows, r, source, hole):
    """Move a row's state from each source to its hole."""
    unit = rows.unit
    for x in range(len(source)):
        s, h = source[x], hole[x]
        rows.w[r, h], rows.columns[r, h] = rows.w[r, s], rows.columns[r, s]
    for x in range(0, len(source), unit):
        s, h = source[x] // unit, hole[x] // unit
        rows.barred[r, h] = rows.barred[r, s]
        for i in range(unit):
            rows.floor[r, i, h] = rows.floor[r, i, s]
            for j in range(unit):
                rows.D[r, i, j, h] = rows.D[r, i, j, s]


@compiled
def move_matrix(A, source, hole, live, tile):
    """Rows and columns `source` of a symmetric matrix to `hole`, where it is stored."""
    moves, within = len(source), 0
    for i in range(live):
        end = min((i // tile + 1) * tile, live)
        while within < moves and hole[within] < end:
            within += 1
        for x in range(within):
            A[i, hole[x]] = A[source[x], i]
    for x in range(moves):
        h, s = hole[x], source[x]
        end = min((h // tile + 1) * tile, live)
        A[h, :end] = A[s, :end]
        for y in range(moves):
            if hole[y] < end:
                t = source[y]
                A[h, hole[y]] = A[s, t] if t // tile <= s // tile else A[t, s]


# -- weights at the end ----------------------------------------------------------------------------


@compiled
def write_free(rows, weights):
    """Write the weights that were never fixed to where they belong."""
    for r in range(len(rows.w)):
        for i in range(rows.live[r]):
            if rows.barred[r, i // rows.unit] < np.inf:
                weights[r, rows.columns[r, i]] = rows.w[r, i]


@compiled
def write_pruned(W, Hinv, system, groups, trace):
    """N:M: every row's weights once the columns of its order are zero; see the module docstring."""
    for r in range(len(W)):
        y, w, order = groups.z[r], trace.weights[r], trace.order[r]
        for i in range(len(y) - 1, -1, -1):  # Lᵀ y = z, in place of z
            L = groups.L[r, i]
            y[i] /= L[i]
            for j in range(i):
                y[j] -= y[i] * L[j]
        w[:] = W[r]
        for i in range(len(y)):
            column = Hinv[system[r], order[i]]
            for j in range(len(w)):
                w[j] -= y[i] * column[j]
        for p in order:
            w[p] = 0


# -- for `levels.py` -------------------------------------------------------------------------------


@compiled
def gather_lower(
    M,  # (d, d)
    order,  # (k,)
    out,  # (k, k), filled on and below the diagonal
):
    """out_ij = M[order_i, order_j]; the half above the diagonal is never read."""
    for i in range(len(order)):
        row = M[order[i]]
        for j in range(i + 1):
            out[i, j] = row[order[j]]


@compiler(fastmath=REORDERED)
def multiply_rows(
    H,  # (d, d)
    order,  # (k,)
    w,  # (d,)
    out,  # (k,)
):
    """out_i = Σ_j H[order_i, j] w_j, without a copy of the rows."""
    for i in range(len(order)):
        row = H[order[i]]
        total = H.dtype.type(0)
        for j in range(len(w)):
            total += row[j] * w[j]
        out[i] = total
