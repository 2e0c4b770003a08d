"""N:M pruning of `elimination.py`, compiled for CPUs: no matrix is ever brought up to date.

Of M weights of a group N go and M − N stay, and of the inverse only pivot columns are ever looked
at. Flushing the whole matrix after a panel brings many columns up to date that never become pivots.
So here a column is made when it is needed, from the shared inverse and all u's so far (a
left-looking factorisation). For 2:4 this takes less than half of the multiply-adds, and d·k numbers
a row in place of d².

While the u's of a row stay in a core's cache (`prune_in_cache`), it is made in the very step that
chooses it, and no work is in vain. Where they do not, memory would be waited for; there
(`prune_ahead`) columns are made before they are chosen, many in one product:

    A[:, S]  =  H⁻¹[:, S] − UᵀU[:, S]        S: the columns of least score that are not yet active

Active columns are brought up to date after every panel; those whose score has become too large, and
those whose group is full, are let go. A panel ends early where a column is wanted that is not
active.

The weights follow at the end. With P the columns gone in their order, A_PP = LLᵀ and L z = w_P are
what the elimination has computed (L the u's at P, z its moves), so that

    w − A[:, P] A_PP⁻¹ w_P  =  w − A[:, P] y,        Lᵀ y = z

    symbol  variable  shape            meaning
    U       U         (rows, k, d)     u's of all steps, by position
    A[:,S]  active    (rows, cap, d)   active columns, one in a row
    L       L         (rows, k, k)     the u's at P, in the order of P, on and below the diagonal
    z       z         (rows, k)        the moves e_p/√A_pp
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
from torch import Tensor

from obc.solver.panel_cpu import (
    Found,
    Rows,
    compiled,
    first_least,
    move,
    move_columns,
    move_row,
    score_units,
    subtract_panel,
    vacancies,
)
from obc.solver.threads import Spare

AHEAD = 1.25  # × panel: so many columns are active at least
IDLE = 2.5  # × panel: so many at most
IN_CACHE = 3 << 20  # bytes of all u's of a row; of small groups a third is alive at a time


class Left(NamedTuple):
    """What the left-looking steps of a few rows keep beside `Rows`."""

    U: np.ndarray  # (rows, k, d)
    L: np.ndarray  # (rows, k, k)
    z: np.ndarray  # (rows, k)
    place: np.ndarray  # (rows, d) int32, position of each column
    zeros: np.ndarray  # (rows, d/M) int32, zeros in each group
    n: int
    group: int


class Ahead(NamedTuple):
    """Columns that are made before they are chosen."""

    active: np.ndarray  # (rows, cap, d)
    old: np.ndarray  # (rows, panel, cap) the last panel's u's at active columns
    new: np.ndarray  # (rows, k, cap) all u's at the columns that become active
    holder: np.ndarray  # (rows, cap) int32, position of each active column
    slot: np.ndarray  # (rows, d) int32, which active column a position is; −1: none
    kept: np.ndarray  # (rows,) active columns that were before
    count: np.ndarray  # (rows,) active columns
    first: np.ndarray  # (rows,) step that the last panel began with
    done: np.ndarray  # (rows,) steps


def prune_nm(
    W: Tensor,  # (rows, d)
    rows: Rows,
    Hinv: Tensor,  # (G, d, d)
    system: Tensor,  # (rows,)
    nm: tuple[int, int],
    panel: int,
    spare: Spare,
    found: Found,
) -> None:
    """Run a few rows from the first step to the last."""
    (R, steps), d = found.order.shape, W.shape[1]
    with ExitStack() as stack:
        U, L, z = (
            stack.enter_context(spare.lent(name, R, steps, *rest))
            for name, rest in (("U", (d,)), ("L", (steps,)), ("z", ()))
        )
        left = Left(
            U.numpy(),
            L.numpy(),
            z.numpy(),
            place=np.tile(np.arange(d, dtype=np.int32), (R, 1)),
            zeros=np.zeros((R, d // nm[1]), dtype=np.int32),
            n=nm[0],
            group=nm[1],
        )
        if steps * d * W.element_size() <= IN_CACHE:
            prune_in_cache(Hinv.numpy(), system.numpy(), rows, left, panel, found)
        else:
            cap = max(1, min(d, int(IDLE * panel)))
            active = stack.enter_context(spare.lent("active", R, cap, d))
            new = stack.enter_context(spare.lent("new", R, steps, cap))
            prune_ahead(Hinv, system.numpy(), rows, left, U, (active, new), panel, found)
        write_without(W.numpy(), Hinv.numpy(), system.numpy(), left, found)


def prune_ahead(
    Hinv: Tensor,
    system: np.ndarray,
    rows: Rows,
    left: Left,
    U: Tensor,  # that of `left`
    room: tuple[Tensor, Tensor],  # for `active` and `new`
    panel: int,
    found: Found,
) -> None:
    """All steps of a few rows, whose columns are made ahead."""
    (R, steps, d), (active, new) = U.shape, room
    cap = active.shape[1]
    old = U.new_empty(R, panel, cap)
    kept, count, first, done = np.zeros((4, R), dtype=np.int64)
    holder, slot = np.empty((R, cap), dtype=np.int32), np.full((R, d), -1, dtype=np.int32)
    ahead = Ahead(active.numpy(), old.numpy(), new.numpy(), holder, slot, kept, count, first, done)
    while (done < steps).any():
        activate(Hinv.numpy(), system, rows, left, ahead, max(1, min(cap, int(AHEAD * panel))))
        for r in np.flatnonzero((done > 0) & (done < steps)).tolist():
            m, k, old_ones = int(rows.live[r]), int(done[r]), int(kept[r])
            last, before, new_ones = U[r, first[r] : k, :m], U[r, :k, :m], int(count[r]) - old_ones
            active[r, :old_ones, :m].addmm_(old[r, : len(last), :old_ones].T, last, alpha=-1)
            active[r, old_ones : count[r], :m].addmm_(new[r, :k, :new_ones].T, before, alpha=-1)
        run_panels(rows, left, ahead, panel, found)


# -- compiled --------------------------------------------------------------------------------------


@compiled
def prune_in_cache(Hinv, system, rows, left, panel, found):
    """All steps, row after row; what is gone is moved out of the way once in a panel."""
    steps = found.order.shape[1]
    for r in range(len(rows.w)):
        for step in range(steps):
            if step and step % panel == 0:
                close_up(rows, left, r, step)
            m, u = rows.live[r], left.U[r, step]
            score_units(rows, r, m)
            p = first_least(rows.keys, m)
            columns = rows.columns[r]
            column = Hinv[system[r], columns[p]]
            for i in range(m):
                u[i] = column[columns[i]]
            fix(rows, left, r, p, step, 0, found)


@compiled
def run_panels(rows, left, ahead, panel, found):
    """In every row, fix columns until the panel is full or one is wanted that is not active."""
    steps = found.order.shape[1]
    for r in range(len(rows.w)):
        first, step, m = ahead.done[r], ahead.done[r], rows.live[r]
        while step < min(first + panel, steps):
            score_units(rows, r, m)
            p = first_least(rows.keys, m)
            if ahead.slot[r, p] < 0:
                break
            left.U[r, step, :m] = ahead.active[r, ahead.slot[r, p], :m]
            fix(rows, left, r, p, step, first, found)
            step += 1
        ahead.first[r], ahead.done[r] = first, step


@compiled
def fix(rows, left, r, p, step, first, found):
    """Fix a column, whose u lacks what the steps from `first` on take from it."""
    w, U, L, m = rows.w[r], left.U[r], left.L[r, step], rows.live[r]
    rows.barred[r, p] = np.inf
    bar_full_group(rows, left, r, rows.columns[r, p])
    subtract_panel(U[first:], step - first, p, m)
    pivot = max(U[step, p], rows.floor[r, 0, p])
    error = w[p]
    scale = w.dtype.type(1) / np.sqrt(pivot)
    for i in range(step):
        L[i] = U[i, p]
    L[step], left.z[r, step] = pivot * scale, error * scale
    move(w, rows.D[r], rows.floor[r], U[step], m, scale, error * scale)
    found.order[r, step] = rows.columns[r, p]
    found.losses[r, step] = error * error / (2 * pivot)


@compiled
def bar_full_group(rows, left, r, column):
    """Count a zero; once its group has N of them, bar what is left of the group."""
    g = column // left.group
    left.zeros[r, g] += 1
    if left.zeros[r, g] >= left.n:
        for j in range(g * left.group, (g + 1) * left.group):
            p = left.place[r, j]
            if rows.columns[r, p] == j:  # else it is gone, and another column is there
                rows.barred[r, p] = np.inf


@compiled
def close_up(rows, left, r, step):
    """Move what is alive among the last positions into the holes before it."""
    source, hole, m = vacancies(rows.barred[r], rows.live[r], 1)
    rows.live[r] = m
    move_row(rows, r, source, hole)
    for x in range(len(source)):
        left.place[r, rows.columns[r, hole[x]]] = hole[x]
    move_columns(left.U[r, :step], source, hole)
    return source, hole


@compiled
def activate(Hinv, system, rows, left, ahead, wanted):
    """Let go of what is gone; choose who is active, of every row that is not done."""
    scores, cap, steps = rows.scores, ahead.active.shape[1], left.U.shape[1]
    for r in range(len(rows.w)):
        if ahead.done[r] == steps:
            continue
        let_go(ahead, r, rows.barred[r], 0, cap)  # what is gone
        source, hole = close_up(rows, left, r, ahead.done[r])
        for x in range(len(source)):
            ahead.slot[r, hole[x]] = ahead.slot[r, source[x]]
        m, columns = rows.live[r], rows.columns[r, : rows.live[r]]
        score_units(rows, r, m)
        best, soon = first_least(rows.keys, m), ranked(scores[:m], wanted)
        for p in range(m):
            if ahead.slot[r, p] >= 0:
                ahead.holder[r, ahead.slot[r, p]] = p  # it may have moved
        if ahead.count[r] + wanted > cap and cap < m:  # make room, for the best at least
            let_go(ahead, r, scores, ranked(scores[:m], max(1, cap - wanted)), cap - 1)
        move_columns(ahead.active[r, : ahead.count[r]], source, hole)
        ahead.kept[r] = ahead.count[r]
        moved = np.flatnonzero(columns != np.arange(m))
        add(Hinv[system[r]], columns, moved, ahead, r, best)
        for p in range(m):
            if scores[p] <= soon and ahead.slot[r, p] < 0:
                add(Hinv[system[r]], columns, moved, ahead, r, p)
        gather(left.U[r], ahead, r)


@compiled
def let_go(ahead, r, scores, limit, most):
    """Of active columns, those whose score is beyond a limit, and those beyond so many."""
    count = 0
    for x in range(ahead.count[r]):
        p = ahead.holder[r, x]
        if scores[p] > limit or count == most:
            ahead.slot[r, p] = -1
            continue
        ahead.holder[r, count], ahead.slot[r, p] = p, count
        if x != count:
            ahead.active[r, count] = ahead.active[r, x]
        count += 1
    ahead.count[r] = count


@compiled
def ranked(scores, count):
    """The `count`-th least score."""
    last = min(len(scores), count) - 1
    return np.partition(scores, last)[last]


@compiled
def add(Hinv, columns, moved, ahead, r, p):
    """Make a position active, if it is not and there is room; for now with its column of H⁻¹."""
    x, m = ahead.count[r], len(columns)
    if ahead.slot[r, p] >= 0 or x == len(ahead.holder[r]):
        return
    column, active = Hinv[columns[p]], ahead.active[r, x]
    for i in range(m):
        active[i] = column[i]
    for i in moved:
        active[i] = column[columns[i]]
    ahead.holder[r, x], ahead.slot[r, p], ahead.count[r] = p, x, x + 1


@compiled
def gather(U, ahead, r):
    """The u's that active columns lack: old ones the last panel's, new ones all."""
    holder, kept, count = ahead.holder[r], ahead.kept[r], ahead.count[r]
    for i in range(ahead.done[r]):
        u, new = U[i], ahead.new[r, i]
        for x in range(kept, count):
            new[x - kept] = u[holder[x]]
        if i >= ahead.first[r]:
            old = ahead.old[r, i - ahead.first[r]]
            for x in range(kept):
                old[x] = u[holder[x]]


@compiled
def write_without(W, Hinv, system, left, found):
    """Every row's weights once the columns of its order are zero; see the module docstring."""
    for r in range(len(W)):
        y, w, order = left.z[r], found.weights[r], found.order[r]
        for i in range(len(y) - 1, -1, -1):  # Lᵀ y = z, in place of z
            L = left.L[r, i]
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
