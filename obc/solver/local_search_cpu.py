"""The searches of `swaps.py` and `codes.py`, compiled for CPUs: one row after the other, in place.

Symbols and rules are those of these two files, move by move; a test holds both forms to the same
moves.
"""

from __future__ import annotations

from obc.solver.elimination_cpu import compiler

compiled = compiler()


# -- N:M swaps -------------------------------------------------------------------------------------


@compiled
def swap_row(T, r, kept, barred, floor, place, size, least_gain, limit):
    """Swap while it pays; returns the number of swaps.

    T (d, d) and r (d,) are in an order in which column p has position place[p].
    """
    for count in range(limit):
        p, q = best_swap(T, r, kept, barred, floor, place, size, least_gain)
        if p < 0:
            return count
        pivot(T, r, place[p])
        pivot(T, r, place[q])
        kept[p], kept[q] = True, False
    return limit


@compiled
def best_swap(T, r, kept, barred, floor, place, size, least_gain):
    """The swap of largest gain, of one more than `least_gain`; or −1, −1."""
    best, best_p, best_q = least_gain, -1, -1
    for first in range(0, len(r), size):
        for p in range(first, first + size):
            i = place[p]
            h = T[i, i]
            if kept[p] or barred[p] or not h > floor[p]:
                continue
            step = r[i] / h
            for q in range(first, first + size):
                if kept[q]:
                    j = place[q]
                    left = r[j] - T[i, j] * step
                    gain = (r[i] * step - left * left / (T[i, j] * T[i, j] / h - T[j, j])) / 2
                    if gain > best:
                        best, best_p, best_q = gain, p, q
    return best_p, best_q


@compiled
def pivot(T, r, j):
    """Column j goes into S if it was not in it, and out of S if it was."""
    column, head, size = T[:, j].copy(), r[j], abs(T[j, j])
    for i in range(len(r)):
        factor = column[i] / column[j]
        for k in range(len(r)):
            T[i, k] -= factor * column[k]
        r[i] -= factor * head
    for i in range(len(r)):
        T[i, j] = T[j, i] = column[i] / size
    T[j, j] = -1 / column[j]
    r[j] = head / size


# -- refinement of codes ---------------------------------------------------------------------------


@compiled
def refine_rows(codes, g, H, near, H_near, frozen, scale, low, high, least_gain, sweeps):
    """Move codes (rows, d) and g (rows, d) of rows that share H (d, d), until nothing pays."""
    for row in range(len(codes)):
        for _ in range(sweeps):
            moves = 0
            for i in range(codes.shape[1]):
                if not frozen[row, i]:
                    moves += move_column(
                        codes[row],
                        g[row],
                        H,
                        near[i],
                        H_near[i],
                        frozen[row],
                        scale[row],
                        low[row],
                        high[row],
                        least_gain[row],
                        i,
                    )
            if moves == 0:
                break


@compiled
def move_column(codes, g, H, near, H_near, frozen, scale, low, high, least_gain, i):
    """The best move of code i up, then down, alone or with a neighbour, if it pays."""
    moves = 0
    for sign in (1, -1):
        if not low <= codes[i] + sign <= high:
            continue
        step = sign * scale
        alone = step * g[i] - step * step * H[i, i] / 2
        best, other, other_sign = max(alone, least_gain), i, 0
        for k in range(len(near)):
            j = near[k]
            g_j = g[j] - step * H_near[k]
            sign_j = 1 if g_j > 0 else -1
            gain = alone + scale * abs(g_j) - scale * scale * H[j, j] / 2
            if gain > best and not frozen[j] and low <= codes[j] + sign_j <= high:
                best, other, other_sign = gain, j, sign_j
        if best > least_gain:
            moves += 1
            move_code(codes, g, H, scale, i, sign)
            if other != i:
                move_code(codes, g, H, scale, other, other_sign)
    return moves


@compiled
def move_code(codes, g, H, scale, i, sign):
    """Move code i by `sign`."""
    codes[i] += sign
    step = sign * scale
    for k in range(len(g)):
        g[k] -= step * H[i, k]
