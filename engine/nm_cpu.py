"""N:M pruning of `elimination.py`, compiled for CPUs: no matrix is ever brought up to date.

Of M weights of a group N go and M − N stay, and of the inverse only pivot columns are ever looked
at. Flushing the whole matrix after a panel brings many columns up to date that never become pivots.
So here a column is made when it is about to be needed, from the shared inverse and all u's so far
(a left-looking factorisation):

    A[:, S]  =  H⁻¹[:, S] − UᵀU[:, S]        S: the columns of least score that are not yet active

in one product for all of S. Active columns are brought up to date after every panel; those whose
score has become too large, and those whose group is full, are let go. A panel ends early where a
column is wanted that is not active. For 2:4 this takes less than half of the products, and d·k
numbers a row in place of d².

The weights follow at the end. With P the columns gone in their order, A_PP = LLᵀ and L z = w_P are
what the elimination has computed (L the u's at P, z its moves), so that

    w − A[:, P] A_PP⁻¹ w_P  =  w − A[:, P] y,        Lᵀ y = z

    symbol  variable  shape            meaning
    U       U         (rows, k, d)     u's of all steps, by position
    A[:,S]  active    (rows, cap, d)   active columns, one in a row
    Lᵀ      LT        (rows, k, k)     the u's at P, in the order of P, on and above the diagonal
    z       z         (rows, k)        the moves e_p/√A_pp
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from engine.panel_cpu import (
    Found,
    Rows,
    compiled,
    dot,
    first_least,
    move,
    move_columns,
    move_row,
    score_units,
    subtract_panel,
    vacancies,
)

AHEAD = 1.25  # × panel: so many columns are active at least
IDLE = 2.5  # × panel: so many at most


class State(NamedTuple):
    """What a few rows have beside `Rows`."""

    U: np.ndarray  # (rows, k, d)
    LT: np.ndarray  # (rows, k, k)
    z: np.ndarray  # (rows, k)
    active: np.ndarray  # (rows, cap, d)
    old: np.ndarray  # (rows, panel, cap) the last panel's u's at active columns
    new: np.ndarray  # (rows, k, cap) all u's at the columns that become active
    holder: np.ndarray  # (rows, cap) int32, position of each active column
    slot: np.ndarray  # (rows, d) int32, which active column a position is; −1: none
    place: np.ndarray  # (rows, d) int32, position of each column
    zeros: np.ndarray  # (rows, d/M) int32, zeros in each group
    kept: np.ndarray  # (rows,) active columns that were before
    count: np.ndarray  # (rows,) active columns
    first: np.ndarray  # (rows,) step that the last panel began with
    done: np.ndarray  # (rows,) steps
    n: int
    group: int


def prune_nm(
    W: Tensor,  # (rows, d)
    rows: Rows,
    Hinv: Tensor,  # (G, d, d)
    system: Tensor,  # (rows,)
    nm: tuple[int, int],
    panel: int,
    found: Found,
) -> None:
    """Run a few rows from the first step to the last."""
    (R, steps), d = found.order.shape, W.shape[1]
    cap = max(1, min(d, int(IDLE * panel)))
    U, active = W.new_empty(R, steps, d), W.new_empty(R, cap, d)
    old, new = W.new_empty(R, panel, cap), W.new_empty(R, steps, cap)
    LT, z = W.new_empty(R, steps, steps), W.new_empty(R, steps)
    every = np.tile(np.arange(d, dtype=np.int32), (R, 1))
    state = State(
        U.numpy(), LT.numpy(), z.numpy(), active.numpy(), old.numpy(), new.numpy(),
        holder=np.empty((R, cap), dtype=np.int32), slot=np.full((R, d), -1, dtype=np.int32),
        place=every, zeros=np.zeros((R, d // nm[1]), dtype=np.int32),
        kept=np.zeros(R, dtype=np.int64), count=np.zeros(R, dtype=np.int64),
        first=np.zeros(R, dtype=np.int64), done=np.zeros(R, dtype=np.int64), n=nm[0], group=nm[1],
    )  # fmt: skip
    shared = system.numpy()
    while (state.done < steps).any():
        activate(Hinv.numpy(), shared, rows, state, steps, max(1, min(cap, int(AHEAD * panel))))
        for r in np.flatnonzero((state.done > 0) & (state.done < steps)).tolist():
            m, first, done = int(rows.live[r]), int(state.first[r]), int(state.done[r])
            kept, count = int(state.kept[r]), int(state.count[r])
            last, before = U[r, first:done, :m], U[r, :done, :m]
            active[r, :kept, :m].addmm_(old[r, : done - first, :kept].T, last, alpha=-1)
            active[r, kept:count, :m].addmm_(new[r, :done, : count - kept].T, before, alpha=-1)
        run_panels(rows, state, panel, found)
    write_without(W.numpy(), Hinv.numpy(), shared, state, found)


# -- compiled --------------------------------------------------------------------------------------


@compiled
def run_panels(rows, state, panel, found):
    """In every row, fix columns until the panel is full or one is wanted that is not active."""
    steps = found.order.shape[1]
    chosen = np.empty(panel, np.int64)
    for r in range(len(rows.w)):
        first, step = state.done[r], state.done[r]
        w, U, m = rows.w[r], state.U[r], rows.live[r]
        while step < min(first + panel, steps):
            score_units(rows, r, m)
            p = first_least(rows.keys, m)
            if state.slot[r, p] < 0:
                break
            rows.barred[r, p] = np.inf
            bar_full_group(rows, state, r, rows.columns[r, p])
            chosen[step - first] = p
            U[step, :m] = state.active[r, state.slot[r, p], :m]
            subtract_panel(U[first:], step - first, p, m)
            pivot = max(U[step, p], rows.floor[r, 0, p])
            error = w[p]
            scale = w.dtype.type(1) / np.sqrt(pivot)
            move(w, rows.D[r], rows.floor[r], U[step], m, scale, error * scale)
            U[step, p], state.z[r, step] = pivot * scale, error * scale
            found.order[r, step] = rows.columns[r, p]
            found.losses[r, step] = error * error / (2 * pivot)
            step += 1
        for i in range(step):
            for x in range(step - first):
                state.LT[r, i, first + x] = U[i, chosen[x]]
        state.first[r], state.done[r] = first, step


@compiled
def bar_full_group(rows, state, r, column):
    """Count a zero; once its group has N of them, bar what is left of the group."""
    g = column // state.group
    state.zeros[r, g] += 1
    if state.zeros[r, g] >= state.n:
        for j in range(g * state.group, (g + 1) * state.group):
            p = state.place[r, j]
            if rows.columns[r, p] == j:  # else it is gone, and another column is there
                rows.barred[r, p] = np.inf


@compiled
def activate(Hinv, system, rows, state, steps, ahead):
    """Let go of what is gone; choose who is active, of every row that is not done."""
    scores, cap = rows.scores, state.active.shape[1]
    for r in range(len(rows.w)):
        if state.done[r] == steps:
            continue
        source, hole, m = vacancies(rows.barred[r], rows.live[r], 1)
        rows.live[r] = m
        let_go(state, r, rows.barred[r], 0, cap)  # what is gone
        move_row(rows, r, source, hole)
        for x in range(len(source)):
            state.place[r, rows.columns[r, hole[x]]] = hole[x]
            state.slot[r, hole[x]] = state.slot[r, source[x]]
        move_columns(state.U[r, : state.done[r]], source, hole)
        score_units(rows, r, m)
        best, soon = first_least(rows.keys, m), ranked(scores[:m], ahead)
        for p in range(m):
            if state.slot[r, p] >= 0:
                state.holder[r, state.slot[r, p]] = p  # it may have moved
        if state.count[r] + ahead > cap and cap < m:  # make room, for the best at least
            let_go(state, r, scores, ranked(scores[:m], max(1, cap - ahead)), cap - 1)
        move_columns(state.active[r, : state.count[r]], source, hole)
        state.kept[r] = state.count[r]
        moved = np.flatnonzero(rows.columns[r, :m] != np.arange(m))
        add(Hinv[system[r]], rows.columns[r, :m], moved, state, r, best)
        for p in range(m):
            if scores[p] <= soon and state.slot[r, p] < 0:
                add(Hinv[system[r]], rows.columns[r, :m], moved, state, r, p)
        gather(state, r)


@compiled
def let_go(state, r, scores, limit, most):
    """Of active columns, those whose score is beyond a limit, and those beyond so many."""
    count = 0
    for x in range(state.count[r]):
        p = state.holder[r, x]
        if scores[p] > limit or count == most:
            state.slot[r, p] = -1
            continue
        state.holder[r, count], state.slot[r, p] = p, count
        if x != count:
            state.active[r, count] = state.active[r, x]
        count += 1
    state.count[r] = count


@compiled
def ranked(scores, count):
    """The `count`-th least score."""
    last = min(len(scores), count) - 1
    return np.partition(scores, last)[last]


@compiled
def add(Hinv, columns, moved, state, r, p):
    """Make a position active, if it is not and there is room; for now with its column of H⁻¹."""
    x, m = state.count[r], len(columns)
    if state.slot[r, p] >= 0 or x == len(state.holder[r]):
        return
    column, active = Hinv[columns[p]], state.active[r, x]
    for i in range(m):
        active[i] = column[i]
    for i in moved:
        active[i] = column[columns[i]]
    state.holder[r, x], state.slot[r, p], state.count[r] = p, x, x + 1


@compiled
def gather(state, r):
    """The u's that active columns lack: old ones the last panel's, new ones all."""
    holder, kept, count = state.holder[r], state.kept[r], state.count[r]
    for i in range(state.done[r]):
        u, new = state.U[r, i], state.new[r, i]
        for x in range(kept, count):
            new[x - kept] = u[holder[x]]
        if i >= state.first[r]:
            old = state.old[r, i - state.first[r]]
            for x in range(kept):
                old[x] = u[holder[x]]


@compiled
def write_without(W, Hinv, system, state, found):
    """Every row's weights once the columns of its order are zero; see the module docstring."""
    for r in range(len(W)):
        z, w, order = state.z[r], found.weights[r], found.order[r]
        for i in range(len(z) - 1, -1, -1):  # Lᵀ y = z, in place of z
            u = state.LT[r, i]
            z[i] = (z[i] - dot(u[i + 1 :], z[i + 1 :])) / u[i]
        w[:] = W[r]
        for i in range(len(z)):
            column = Hinv[system[r], order[i]]
            for j in range(len(w)):
                w[j] -= z[i] * column[j]
        for p in order:
            w[p] = 0
