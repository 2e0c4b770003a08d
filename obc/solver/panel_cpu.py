"""What a step of an elimination does to a row, compiled for CPUs.

The score of every unit, the least of them, the panel's part of a pivot column, and what the step
does to weights and diagonal; and who moves where once a panel's columns are gone. Symbols are those
of `elimination.py`; who keeps A, and how, is the business of `elimination_cpu.py` and `nm_cpu.py`.

    symbol  variable  shape             meaning
    w       w         (rows, d)         weights, by position
    D       D         (rows, c, c, d/c) diagonal blocks of A, one for each unit of c columns
    U       U         (b, d)            u's of a row, one for each step
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from torch import Tensor

INFINITY = np.inf
CHUNK = 32  # scores that are searched together
EXACT = {"contract", "nsz"}  # sums in their own order
compiled = njit(nogil=True, cache=True, error_model="numpy", fastmath=EXACT)


class Rows(NamedTuple):
    """The state of a few rows beside A and U, by position; positions from `live` on are void."""

    w: np.ndarray  # (rows, d) weights
    D: np.ndarray  # (rows, c, c, d/c)
    floor: np.ndarray  # (rows, c, d/c) what no pivot falls below
    columns: np.ndarray  # (rows, d) int32, column at each position
    barred: np.ndarray  # (rows, d/c) infinite where a unit may not go
    grid: np.ndarray  # (rows, 4) see `elimination.PivotRule`; (rows, 0) to prune
    live: np.ndarray  # (rows,) m of each row
    scores: np.ndarray  # (d/c,) of the row that is in work
    keys: np.ndarray  # (d/c,) the same bytes as integers
    unit: int


class Found(NamedTuple):
    """What is found, step by step."""

    order: np.ndarray  # (rows, steps) int64, column fixed at each step
    losses: np.ndarray  # (rows, steps)
    weights: np.ndarray  # (rows, d) at the end


def rows_of(
    W: Tensor,  # (rows, d)
    Hinv: Tensor,  # (G, d, d)
    floor: Tensor,  # (G, d)
    system: Tensor,  # (rows,)
    unit: int,
    grid: Tensor,  # (rows, 4) or (rows, 0)
) -> Rows:
    """Rows before their first step; units that are zero already go before all others."""
    (R, d), scores = W.shape, np.empty(W.shape[1] // unit, dtype=W.numpy().dtype)
    tiles = Hinv.view(-1, d // unit, unit, d // unit, unit).diagonal(dim1=1, dim2=3)
    zero = (W == 0).view(R, d // unit, unit).all(2).numpy()
    return Rows(
        w=W.clone().numpy(),
        D=tiles.index_select(0, system).contiguous().numpy(),
        floor=floor.view(-1, d // unit, unit).mT.index_select(0, system).contiguous().numpy(),
        columns=np.tile(np.arange(d, dtype=np.int32), (R, 1)),
        barred=np.where(zero, -INFINITY, 0.0).astype(W.numpy().dtype),
        grid=grid.numpy(),
        live=np.full(R, d),
        scores=scores,
        keys=scores.view(f"i{scores.itemsize}"),
        unit=unit,
    )


# -- which goes next -------------------------------------------------------------------------------


@compiled
def score_units(rows, r, m):
    """OBS's score of every unit, or what stands for it; infinite where barred."""
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
def first_least(keys, count):
    """Index of the first of the least of `count` scores, which are given by their bits.

    LLVM finds the least of many integers at a time, but not of floating-point numbers. Those are
    sign and magnitude; with the magnitude of negative ones flipped their order is that of integers.
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


# -- what a step does ------------------------------------------------------------------------------


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


@compiled
def move_row(rows, r, source, hole):
    """Move what a row has at each source to the hole."""
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
def move_columns(matrix, source, hole):
    """Move columns."""
    for i in range(len(matrix)):
        for x in range(len(source)):
            matrix[i, hole[x]] = matrix[i, source[x]]
