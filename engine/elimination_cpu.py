"""The blocked elimination of `elimination.py`, compiled for CPUs: a few rows at a time, in cache.

On a CPU the inner loop is bound by caches and by the number of small operations, not by arithmetic.
So here a row goes through a whole panel in compiled code (numba), its panel U in the L2 cache, and
only the flush A −= UᵀU is a matrix product of torch's. A few rows make a task; tasks run on as many
threads as torch uses, and need (threads × rows of a task) matrices of d×d, however large the layer.

The algorithm, its pivot rules and its symbols are those of `elimination.py`, step by step; a test
holds both to the same traces. Rows are independent, so the result does not depend on the threads.

One thing more: N:M lets go not only of the columns that went, but also of those that never will,
since their group is full: half of the work. Their weights follow at the end. With P the columns
gone in their order, A_PP = LLᵀ and L z = w_P are what the elimination has computed (L the u's at P,
z its moves), so that

    w − A[:, P] A_PP⁻¹ w_P  =  w − A[:, P] y,        Lᵀ y = z

    symbol  variable  shape          meaning
    A       A         (rows, d, d)   own inverse Hessian of each row; the leading m×m is live
    U       U         (rows, b, d)   the panel's u's
    D       D         (rows, d, c)   diagonal blocks of A: row i of the block that position i is in
    L       L         (rows, k, d)   N:M: the u's of all steps, by column
    z       z         (rows, k)      N:M: the moves e_p/√A_pp of all steps
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from engine.threads import CACHE_BYTES, in_pieces, rows_of_a_piece

INFINITY = np.inf
EXACT = {"contract", "nsz"}  # sums in their own order
compiled = njit(nogil=True, cache=True, error_model="numpy", fastmath=EXACT)
compiled_sum = njit(nogil=True, cache=True, error_model="numpy", fastmath=EXACT | {"reassoc"})


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
    return d * (d + 192) * item, torch.get_num_threads() * rows


class _Task:
    """The state of a few rows on their way through all panels."""

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
        self.unit, self.panel, self.W, self.Hinv, self.system = unit, panel, W, Hinv, system
        self.n, self.group = nm
        self.w, self.grid = W.clone().numpy(), grid.numpy()
        self.floor = floor.index_select(0, system).numpy()
        tiles = Hinv.view(-1, d // unit, unit, d // unit, unit).diagonal(dim1=1, dim2=3)
        blocks = tiles.permute(0, 3, 1, 2).reshape(-1, d, unit)  # from (G, unit, unit, d/unit)
        self.D = blocks.index_select(0, system).numpy()
        self.columns = np.tile(np.arange(d, dtype=np.int32), (R, 1))
        zero = (W == 0).view(R, d // unit, unit).all(2).numpy()  # already gone: before all others
        self.barred = np.where(zero, -INFINITY, 0.0).astype(self.w.dtype)
        self.zeros = np.zeros((R, d // self.group if self.group else 1), dtype=np.int32)
        self.live = np.full(R, d)  # m of each row
        kept = d // self.group * self.n if self.group else 0
        self.L = np.zeros((R, kept, d if kept else 0), dtype=self.w.dtype)
        self.z = np.zeros((R, kept), dtype=self.w.dtype)
        self.U = W.new_empty(R, panel, d)
        self.A: Tensor | None = None

    def all_panels(self, order: Tensor, losses: Tensor, weights: Tensor) -> None:
        """Run to the end; fill (rows, steps), (rows, steps) and (rows, d)."""
        steps = order.shape[1]
        own, shared = np.arange(len(self.w)), self.system.numpy()
        for start in range(0, steps, self.panel):
            if start:
                self.flush()
            count = min(self.panel, steps - start)
            A, source = (self.Hinv, shared) if self.A is None else (self.A, own)
            run_panel(
                A.numpy(), source, self.w, self.D, self.floor, self.columns, self.barred,
                self.zeros, self.grid, self.U.numpy(), self.live, self.unit, self.n, self.group,
                start, count, order.numpy(), losses.numpy(), weights.numpy(), self.L, self.z,
            )  # fmt: skip
        if self.group:
            write_weights_without(
                self.W.numpy(), self.Hinv.numpy(), shared, order.numpy(), self.L, self.z,
                weights.numpy(),
            )  # fmt: skip
        else:
            write_free(self.w, self.columns, self.barred, self.live, self.unit, weights.numpy())

    def flush(self) -> None:
        """After a whole panel: move live columns into the holes, then A −= UᵀU on what is left."""
        if self.A is None:
            self.A = self.Hinv.index_select(0, self.system)
        compact(
            self.A.numpy(), self.U.numpy(), self.w, self.D, self.floor, self.columns, self.barred,
            self.live, self.unit,
        )  # fmt: skip
        for A, U, m in zip(self.A, self.U, self.live.tolist(), strict=True):
            A[:m, :m].addmm_(U[:, :m].T, U[:, :m], alpha=-1)


# -- compiled ---------------------------------------------------------------------------------


@compiled
def run_panel(
    A, source, w, D, floor, columns, barred, zeros, grid, U, live, unit, n, group,
    start, count, order, losses, weights, L, z,
):  # fmt: skip
    """Fix `count` columns of every row; record which, at what loss and value."""
    scores = np.empty(w.shape[1], dtype=w.dtype)
    for r in range(len(w)):
        inverse, m = A[source[r]], live[r]
        for k in range(0, count, unit):
            chosen = choose(w[r], D[r], floor[r], barred[r], grid[r], m, unit, scores)
            barred[r, chosen] = np.inf
            if group:
                bar_full_group(columns[r], barred[r], zeros[r], chosen, m, n, group)
            for j in range(unit):
                p = chosen * unit + j
                step = start + k + j
                value, error, pivot = fix(inverse, w[r], floor[r], grid[r], U[r], m, p, k + j)
                order[r, step] = columns[r, p]
                losses[r, step] = error * error / (2 * pivot)
                weights[r, columns[r, p]] = value
                if group:
                    z[r, step] = error / np.sqrt(pivot)
                    for i in range(m):
                        L[r, step, columns[r, i]] = U[r, k + j, i]
                    L[r, step, columns[r, p]] = np.sqrt(pivot)
            update_blocks(D[r], floor[r], U[r], m, unit, k)


@compiled
def choose(w, D, floor, barred, grid, m, unit, scores):
    """The unit that goes next."""
    units = m // unit
    if unit > 1:
        for b in range(units):
            scores[b] = unit_score(w, D, floor, b, unit) + barred[b]
    elif len(grid):
        step, low, high, half = grid[0], grid[1], grid[2], grid[3]
        for i in range(m):
            e = w[i] - min(max(np.rint(w[i] / step), low), high) * step
            score = e * e / D[i, 0] + barred[i]
            outlier = (abs(e) > half) & (score < np.inf)
            scores[i] = -abs(e) if outlier else score
    else:
        for i in range(m):
            scores[i] = w[i] * w[i] / D[i, 0] + barred[i]
    best = 0
    least = scores[0]
    for i in range(1, units):
        if scores[i] < least:
            least = scores[i]
            best = i
    return best


@compiled
def unit_score(w, D, floor, b, unit):
    """w_B (A_BB)⁻¹ w_Bᵀ by elimination of the block's own columns."""
    block = D[b * unit : (b + 1) * unit].copy()
    z = w[b * unit : (b + 1) * unit].copy()
    score = w.dtype.type(0)
    for j in range(unit):
        pivot = max(block[j, j], floor[b * unit + j])
        score += z[j] * z[j] / pivot
        for i in range(j + 1, unit):
            factor = block[i, j] / pivot
            z[i] -= factor * z[j]
            for h in range(j + 1, i + 1):
                block[i, h] -= factor * block[h, j]
    return score


@compiled
def bar_full_group(columns, barred, zeros, chosen, m, n, group):
    """N:M: count a zero; once its group has N of them, bar what is left of the group."""
    g = columns[chosen] // group
    zeros[g] += 1
    if zeros[g] >= n:
        first = g * group
        for i in range(m):
            inside = (columns[i] >= first) & (columns[i] < first + group)
            barred[i] = np.inf if inside else barred[i]


@compiled
def fix(A, w, floor, grid, U, m, p, k):
    """Step k of the panel: fix position p. The value it is fixed at, its error, its pivot."""
    u = U[k]
    for i in range(m):
        u[i] = A[p, i]
    subtract_panel(u, U, m, p, k)
    pivot = max(u[p], floor[p])
    value = w.dtype.type(0)
    if len(grid):
        value = min(max(np.rint(w[p] / grid[0]), grid[1]), grid[2]) * grid[0]
    error = w[p] - value
    scale = w.dtype.type(1) / np.sqrt(pivot)
    move = error * scale
    for i in range(m):
        u[i] *= scale
        w[i] -= u[i] * move
    return value, error, pivot


@compiled
def subtract_panel(c, U, m, p, k):
    """c −= U[:k]ᵀ U[:k, p], four rows of U at a time."""
    j = 0
    while j + 4 <= k:
        a0, a1, a2, a3 = U[j, p], U[j + 1, p], U[j + 2, p], U[j + 3, p]
        u0, u1, u2, u3 = U[j], U[j + 1], U[j + 2], U[j + 3]
        for i in range(m):
            c[i] -= a0 * u0[i] + a1 * u1[i] + a2 * u2[i] + a3 * u3[i]
        j += 4
    while j < k:
        a0 = U[j, p]
        u0 = U[j]
        for i in range(m):
            c[i] -= a0 * u0[i]
        j += 1


@compiled
def update_blocks(D, floor, U, m, unit, k):
    """Bring the diagonal blocks up to date after the unit fixed by panel steps k, k+1, …"""
    for j in range(k, k + unit):
        u = U[j]
        if unit == 1:
            for i in range(m):
                D[i, 0] = max(D[i, 0] - u[i] * u[i], floor[i])
        else:
            for i in range(m):
                first = i - i % unit
                for j2 in range(unit):
                    D[i, j2] -= u[i] * u[first + j2]


@compiled
def compact(A, U, w, D, floor, columns, barred, live, unit):
    """Move what is alive among the last positions into the holes before it, in every row."""
    for r in range(len(w)):
        m = live[r]
        source, hole, left = vacancies(barred[r], m, unit)
        live[r], moves = left, len(source)
        for x in range(moves):
            s, h = source[x], hole[x]
            A[r, h, :m] = A[r, s, :m]
            w[r, h], floor[r, h], columns[r, h] = w[r, s], floor[r, s], columns[r, s]
            D[r, h] = D[r, s]
            barred[r, h // unit] = barred[r, s // unit]
        for i in range(left):
            for x in range(moves):
                A[r, i, hole[x]] = A[r, i, source[x]]
        for j in range(U.shape[1]):
            for x in range(moves):
                U[r, j, hole[x]] = U[r, j, source[x]]


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
def write_free(w, columns, barred, live, unit, weights):
    """Write the weights that were never fixed to where they belong."""
    for r in range(len(w)):
        for i in range(live[r]):
            if barred[r, i // unit] < np.inf:
                weights[r, columns[r, i]] = w[r, i]


@compiled
def write_weights_without(W, Hinv, system, order, L, z, weights):
    """N:M: every row's weights once the columns of `order` are zero; see the module docstring."""
    for r in range(len(W)):
        y = np.zeros(W.shape[1], dtype=W.dtype)
        for i in range(order.shape[1] - 1, -1, -1):
            p = order[r, i]
            y[p] = (z[r, i] - dot(L[r, i], y)) / L[r, i, p]
        w = weights[r]
        w[:] = W[r]
        for p in order[r]:
            subtract(w, y[p], Hinv[system[r], p])
        for p in order[r]:
            w[p] = 0


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
