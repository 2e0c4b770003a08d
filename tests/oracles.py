"""Independent float64 oracles for Optimal Brain Compression: the definition, one weight at a time.

Source: Frantar, Singh, Alistarh, *Optimal Brain Compression*, NeurIPS 2022, arXiv 2208.11580,
section 4 (ExactOBS), section 5 (quantisation).  Written for clarity: an explicit inverse, plain
loops, every intermediate row stored.  Imports numpy only, nothing of the code under test.

Problem.  One output row w of a layer, calibration inputs x_1 .. x_L as columns:

    minimise  (w - w_hat) H (w - w_hat)^T / 2,     H = 2/N  sum_i x_i x_i^T

Elimination.  With A = H^-1 restricted to the weights that are still free, one step removes p:

    p    = argmin over the allowed free p of  e_p^2 / A_pp           e_p = w_p - target_p
    loss = e_p^2 / (2 A_pp)
    w   -= A[:, p] e_p / A_pp             then w_p = target_p exactly
    A   -= A[:, p] A[p, :] / A_pp         then row and column p are 0: p has left

and for a set B of columns that goes at once, target 0 (group formula; loss = score / 2):

    score = w_B^T (A_BB)^-1 w_B
    w    -= A[:, B] (A_BB)^-1 w_B
    A    -= A[:, B] (A_BB)^-1 A[B, :]

Closed form.  With P removed and M kept the row after pruning is the least-squares optimum,
H_MM w_hat_M = (H w)_M, so its gradient H (w_hat - w) vanishes on M, and the losses add up to
the squared error.

    symbol      here            shape       meaning
    w, W        w, W            d; rows, d  one row; all rows of a layer
    H           H               d, d        second derivative, symmetric positive definite
    A           A               d, d        inverse of H on the free weights, 0 elsewhere
    Delta       step_size       scalar      distance of two neighbouring grid points
    mask        mask            d           True where the weight is present at the start

Conventions.  Everything is float64.  Ties go to the lowest index.  Inputs are never changed.
Weights outside of ``mask`` are gone before the first step: they are zero in every stored row,
stand in no order and have no loss.  Rounding is half to even.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]

OUTLIER_TOLERANCE = 1e-9  # relative, on Delta / 2
SHRINK_STEPS = 80  # shrink factors 1.00, 0.99 .. 0.21
SEARCH_NORM = 2.4
NUMPY_PAD_MODE = {
    "zeros": "constant",
    "reflect": "reflect",
    "replicate": "edge",
    "circular": "wrap",
}


@dataclass(frozen=True)
class OracleTrace:
    """What an elimination did, step by step.

    order:   column ids in order of removal (block ids for the block and structured oracles)
    losses:  (steps,), increase of (w - w_hat) H (w - w_hat)^T / 2 by each step
    history: steps + 1 arrays shaped like the weights, ``history[k]`` after k steps
    """

    order: list[int]
    losses: Array
    history: list[Array]

    @property
    def weights(self) -> Array:
        """The weights after all steps."""
        return self.history[-1]

    def weights_after(self, k: int) -> Array:
        """The weights after the first k steps, k = 0 .. steps."""
        if not 0 <= k < len(self.history):
            raise ValueError(f"k must be in [0, {len(self.history) - 1}]; got {k}")
        return self.history[k]


# ---------------------------------------------------------------------------------- inputs and H


def hessian_oracle(
    x_cols: Array,  # (d, L)
    nsamples: int,
) -> Array:  # (d, d)
    """H = 2/N sum x x^T, one outer product per column."""
    d, length = x_cols.shape
    H = np.zeros((d, d))
    for column in range(length):
        x = x_cols[:, column].astype(np.float64)
        H += np.outer(x, x)
    return 2.0 / nsamples * H


def _pad_before_after(
    kernel: tuple[int, int], padding: tuple[int, int] | str, dilation: tuple[int, int]
) -> list[tuple[int, int]]:
    """Padding (before, after) of height and width; an odd 'same' total puts the rest after."""
    if padding == "valid":
        return [(0, 0), (0, 0)]
    if padding == "same":
        totals = [dilation[axis] * (kernel[axis] - 1) for axis in (0, 1)]
        return [(total // 2, total - total // 2) for total in totals]
    if isinstance(padding, str):
        raise ValueError(f"padding must be a pair, 'same' or 'valid'; got {padding!r}")
    return [(padding[0], padding[0]), (padding[1], padding[1])]


def _group_columns(
    x: Array,  # (samples, channels of the group, height, width), padded
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
) -> Array:  # (channels * kh * kw, L), L in the order (sample, out row, out column)
    samples, channels, height, width = x.shape
    kh, kw = kernel
    out_height = (height - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    out_width = (width - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    columns = []
    for sample in range(samples):
        for top in range(0, out_height * stride[0], stride[0]):
            for left in range(0, out_width * stride[1], stride[1]):
                column = [
                    x[sample, channel, top + i * dilation[0], left + j * dilation[1]]
                    for channel in range(channels)
                    for i in range(kh)
                    for j in range(kw)
                ]
                columns.append(column)
    return np.array(columns, dtype=np.float64).T


def conv_columns_oracle(
    x: Array,  # (samples, channels, height, width)
    kernel: tuple[int, int],
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] | str = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    padding_mode: str = "zeros",
) -> list[Array]:  # groups times (d, L), d in the order (channel, kh, kw)
    """What each weight of a 2d convolution is multiplied with, one (d, L) matrix per group."""
    around = _pad_before_after(kernel, padding, dilation)
    padded = np.pad(x, [(0, 0), (0, 0), *around], mode=NUMPY_PAD_MODE[padding_mode])
    size = x.shape[1] // groups
    return [
        _group_columns(padded[:, g * size : (g + 1) * size], kernel, stride, dilation)
        for g in range(groups)
    ]


def conv1d_columns_oracle(
    x: Array,  # (samples, channels, length)
    kernel: int,
    stride: int = 1,
    padding: int | str = 0,
    dilation: int = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> list[Array]:  # groups times (channels/groups * kernel, L), rows in the order (channel, tap)
    """What each weight of a 1d convolution is multiplied with, every value looked up by itself."""
    samples, channels, length = x.shape
    reach = dilation * (kernel - 1)
    before, after = {"valid": (0, 0), "same": (reach // 2, reach - reach // 2)}.get(
        padding, (padding, padding)
    )

    def value(sample: int, channel: int, place: int) -> float:
        if padding_mode == "zeros" and not 0 <= place < length:
            return 0.0
        if padding_mode == "reflect":
            place = abs(place)
            place = min(place, 2 * (length - 1) - place)
        elif padding_mode == "replicate":
            place = max(0, min(place, length - 1))
        elif padding_mode == "circular":
            place %= length
        return float(x[sample, channel, place])

    outputs = (before + length + after - reach - 1) // stride + 1
    size = channels // groups
    return [
        np.array(
            [
                [
                    value(sample, channel, output * stride - before + tap * dilation)
                    for channel in range(group * size, (group + 1) * size)
                    for tap in range(kernel)
                ]
                for sample in range(samples)
                for output in range(outputs)
            ]
        ).T
        for group in range(groups)
    ]


def decouple_dead(
    w: Array,  # (d,) or (rows, d)
    H: Array,  # (d, d)
) -> tuple[Array, Array]:
    """Inputs that are always zero: weight 0, H_pp = 1, zero off the diagonal.  Returns (w, H)."""
    w, H = w.astype(np.float64), H.astype(np.float64)  # copies
    for p in np.flatnonzero(np.diag(H) == 0):
        w[..., p] = 0.0
        H[p, :] = 0.0
        H[:, p] = 0.0
        H[p, p] = 1.0
    return w, H


# -------------------------------------------------------------------------- one elimination step


def _starting_point(
    w: Array,  # (d,)
    H: Array,  # (d, d)
    mask: Mask | None,  # (d,)
) -> tuple[Array, Array, Mask]:
    """The row without its absent weights, the inverse of H on the present ones, and the mask."""
    free = np.ones(len(w), dtype=bool) if mask is None else np.array(mask, dtype=bool)
    w = np.where(free, w, 0.0).astype(np.float64)
    present = np.flatnonzero(free)
    A = np.zeros(H.shape)
    A[np.ix_(present, present)] = np.linalg.inv(H[np.ix_(present, present)].astype(np.float64))
    return w, A, free


def _remove_one(
    w: Array,  # (d,)
    A: Array,  # (d, d)
    p: int,
    target: float,
) -> tuple[Array, Array, float]:
    """Set w_p to its target, let the free weights make up for it.  Returns (w, A, loss)."""
    error = w[p] - target
    loss = error**2 / (2 * A[p, p])
    w = w - A[:, p] * error / A[p, p]
    A = A - np.outer(A[:, p], A[p, :]) / A[p, p]
    w[p] = target
    A[p, :] = 0.0
    A[:, p] = 0.0
    return w, A, float(loss)


def _block_score(
    W: Array,  # (rows, d)
    A: Array,  # (d, d)
    B: npt.NDArray[np.intp],  # (c,)
) -> float:
    """Sum over rows of w_B^T (A_BB)^-1 w_B."""
    A_BB_inv = np.linalg.inv(A[np.ix_(B, B)])
    return float(sum(w[B] @ A_BB_inv @ w[B] for w in W))


def _remove_block(
    W: Array,  # (rows, d)
    A: Array,  # (d, d)
    B: npt.NDArray[np.intp],  # (c,)
) -> tuple[Array, Array]:
    """Remove the columns B of all rows at once by the group formula.  Returns (W, A)."""
    gain = A[:, B] @ np.linalg.inv(A[np.ix_(B, B)])
    W = W - W[:, B] @ gain.T
    A = A - gain @ A[B, :]
    W[:, B] = 0.0
    A[B, :] = 0.0
    A[:, B] = 0.0
    return W, A


# ---------------------------------------------------------------------------------- pivot rules


def unstructured_oracle(
    w: Array,  # (d,)
    H: Array,  # (d, d)
    mask: Mask | None = None,  # (d,), True where the weight is present
) -> OracleTrace:
    """Prune one row weight by weight until nothing is left."""
    w, A, free = _starting_point(w, H, mask)
    order: list[int] = []
    losses: list[float] = []
    history = [w]
    while free.any():
        candidates = np.flatnonzero(free)
        p = int(min(candidates, key=lambda q: w[q] ** 2 / A[q, q]))
        w, A, loss = _remove_one(w, A, p, target=0.0)
        free[p] = False
        order.append(p)
        losses.append(loss)
        history.append(w)
    return OracleTrace(order, np.array(losses), history)


def nm_oracle(
    w: Array,  # (d,), groups of m consecutive columns
    H: Array,  # (d, d)
    n: int,
    m: int,
    mask: Mask | None = None,  # (d,); absent weights count as zeros of their group
) -> OracleTrace:
    """Prune one row until every group of m consecutive columns has (at least) n zeros."""
    _check_divisible(len(w), m)
    w, A, free = _starting_point(w, H, mask)
    order: list[int] = []
    losses: list[float] = []
    history = [w]
    while True:
        zeros = [int((~free[first : first + m]).sum()) for first in range(0, len(w), m)]
        candidates = [q for q in range(len(w)) if free[q] and zeros[q // m] < n]
        if not candidates:
            return OracleTrace(order, np.array(losses), history)
        p = min(candidates, key=lambda q: w[q] ** 2 / A[q, q])
        w, A, loss = _remove_one(w, A, p, target=0.0)
        free[p] = False
        order.append(p)
        losses.append(loss)
        history.append(w)


def structured_oracle(
    W: Array,  # (rows, d)
    H: Array,  # (d, d)
    c: int,
) -> OracleTrace:
    """Remove blocks of c consecutive columns from all rows until nothing is left.

    ``order`` holds block ids, block b being the columns b c .. b c + c - 1; ``losses`` are summed
    over rows; ``history`` holds (rows, d) matrices.
    """
    d = W.shape[1]
    _check_divisible(d, c)
    W = W.astype(np.float64)
    A = np.linalg.inv(H.astype(np.float64))
    columns = {b: np.arange(b * c, (b + 1) * c) for b in range(d // c)}
    order: list[int] = []
    losses: list[float] = []
    history = [W]
    while columns:
        scores = {b: _block_score(W, A, B) for b, B in columns.items()}
        best = min(scores, key=lambda b: scores[b])
        W, A = _remove_block(W, A, columns.pop(best))
        order.append(best)
        losses.append(scores[best] / 2)
        history.append(W)
    return OracleTrace(order, np.array(losses), history)


def block_oracle(
    w: Array,  # (d,)
    H: Array,  # (d, d)
    c: int,
) -> OracleTrace:
    """Prune one row in whole blocks of c consecutive columns; ``order`` holds block ids.

    This is structured pruning of a layer that has one row.
    """
    trace = structured_oracle(w[None, :], H, c)
    return OracleTrace(trace.order, trace.losses, [W[0] for W in trace.history])


def quantise_oracle(
    w: Array,  # (d,)
    H: Array,  # (d, d)
    quantise: Callable[[Array], Array],  # (d,) -> (d,), to the nearest point of the grid
    step_size: float,
    mask: Mask | None = None,  # (d,), True where the weight is present
) -> OracleTrace:
    """Quantise one row weight by weight; a weight pushed off the grid (|w - q| > Delta/2) first."""
    w, A, free = _starting_point(w, H, mask)
    threshold = step_size / 2 * (1 + OUTLIER_TOLERANCE)
    order: list[int] = []
    losses: list[float] = []
    history = [w]
    while free.any():
        candidates = np.flatnonzero(free)
        rounded = np.asarray(quantise(w), dtype=np.float64)
        distance = np.abs(w - rounded)
        outliers = [int(q) for q in candidates if distance[q] > threshold]
        if outliers:
            p = max(outliers, key=lambda q: distance[q])
        else:
            p = int(min(candidates, key=lambda q: distance[q] ** 2 / A[q, q]))
        w, A, loss = _remove_one(w, A, p, target=float(rounded[p]))
        free[p] = False
        order.append(p)
        losses.append(loss)
        history.append(w)
    return OracleTrace(order, np.array(losses), history)


def _check_divisible(d: int, size: int) -> None:
    if d % size:
        raise ValueError(f"the number of columns must be a multiple of {size}; got {d}")


# ------------------------------------------------------------------------ selection and optimum


def global_selection_oracle(
    losses_per_row: Array,  # (rows, steps), each row in its own order of removal
    sparsity: float,  # in [0, 1]
) -> Counts:  # (rows,), how many steps each row takes
    """The ceil(rows * steps * sparsity) smallest losses of all rows, counted per row."""
    rows, steps = losses_per_row.shape
    total = math.ceil(rows * steps * sparsity)
    flat = losses_per_row.reshape(-1).tolist()
    ranking = sorted(range(rows * steps), key=lambda index: (flat[index], index))
    counts = np.zeros(rows, dtype=np.int64)
    for index in ranking[:total]:
        counts[index // steps] += 1
    return counts


def magnitude_oracle(
    W: Array,  # (systems, rows, d)
    sparsity: float,
    size: int = 1,  # neighbouring columns that go together, in all rows of a system
) -> Array:  # (systems, rows, d)
    """The units of least sum of squares are zero, whatever system they are in; no others change."""
    pruned = W.copy()
    units = [(s, first) for s in range(len(W)) for first in range(0, W.shape[2], size)]
    units.sort(key=lambda unit: float((W[unit[0], :, unit[1] : unit[1] + size] ** 2).sum()))
    for s, first in units[: math.ceil(round(len(units) * sparsity, 9))]:
        pruned[s, :, first : first + size] = 0
    return pruned


def magnitude_nm_oracle(
    W: Array,  # (rows, d)
    n: int,
    m: int,
) -> Array:  # (rows, d)
    """The n weights of least magnitude in every m are zero; no others change."""
    pruned = W.copy()
    for row in pruned:
        for first in range(0, len(row), m):
            group = range(first, first + m)
            for column in sorted(group, key=lambda i: abs(row[i]))[:n]:
                row[column] = 0
    return pruned


def masked_least_squares(
    w: Array,  # (d,)
    H: Array,  # (d, d)
    keep: Mask,  # (d,), True where w_hat may differ from zero
) -> Array:  # (d,)
    """The w_hat that is zero outside of keep and minimises (w - w_hat) H (w - w_hat)^T / 2."""
    kept = np.flatnonzero(keep)
    w_hat = np.zeros(len(w))
    if len(kept):
        w_hat[kept] = np.linalg.solve(H[np.ix_(kept, kept)], H[kept, :] @ w)
    return w_hat


def swaps_oracle(
    w: Array,  # (d,)
    H: Array,  # (d, d)
    kept: Mask,  # (d,) after N:M pruning
    size: int,  # M
    least_gain: float,  # × the error before the first swap
) -> tuple[Array, int]:  # (d,) weights after swaps, and how many there were
    """The best swap of a kept and a pruned weight of a group, until none is worth it.

    Each swap is tried by solving for the weights that it keeps. What is zero in w stays zero.
    """
    kept, count = kept.copy(), 0
    weights = masked_least_squares(w, H, kept)
    error = squared_error(w, weights, H)
    least_gain *= error
    while True:
        tried = {}
        for p in np.flatnonzero(~kept & (w != 0)):
            for q in np.flatnonzero(kept):
                if p // size == q // size:
                    other = kept.copy()
                    other[[p, q]] = True, False
                    tried[p, q] = squared_error(w, masked_least_squares(w, H, other), H)
        if not tried or error - min(tried.values()) <= least_gain:
            return masked_least_squares(w, H, kept), count
        p, q = min(tried, key=tried.get)
        kept[[p, q]], error, count = (True, False), tried[p, q], count + 1


def codes_oracle(
    codes: Array,  # (d,) integers
    step: float,
    low: int,
    high: int,
    w: Array,  # (d,)
    H: Array,  # (d, d)
    neighbours: int,
    least_gain: float,  # × the error before the first move
) -> Array:  # (d,) integers
    """Column by column, up and then down: the best move by 1, alone or with a neighbour's by 1.

    The neighbours are the columns of largest H_ij² / (H_ii H_jj). Every move is tried by computing
    the error. Codes of weights that are zero in w stay.
    """
    codes, root = codes.copy(), np.sqrt(np.diag(H))
    error = squared_error(w, step * codes, H)
    least_gain *= error
    while True:
        before = codes.copy()
        for i in np.flatnonzero(w != 0):
            correlation = np.abs(H[i]) / (root[i] * root)
            correlation[i] = -1
            near = np.argsort(-correlation)[:neighbours]
            for sign in (1, -1):
                tried = []
                for j, other in [(i, 0)] + [(j, a) for j in near if w[j] for a in (1, -1)]:
                    moved = codes.copy()
                    moved[i] += sign
                    moved[j] += other
                    if low <= moved.min() and moved.max() <= high:
                        tried.append((squared_error(w, step * moved, H), moved))
                if tried and error - (best := min(tried, key=lambda pair: pair[0]))[0] > least_gain:
                    error, codes = best
        if np.array_equal(codes, before):
            return codes


def ordered_rounding_oracle(
    w: Array,  # (d,)
    H: Array,  # (d, d)
    nearest: Callable[[Array], Array],
) -> float:
    """The error of rounding column by column, large H_ii first, the rest optimal after each."""
    w_hat, left = w.copy(), list(np.argsort(-np.diag(H), kind="stable"))
    while left:
        i = left.pop(0)
        change = np.zeros(len(w))
        change[i] = nearest(w_hat[i : i + 1])[0] - w_hat[i]
        if left:
            change[left] = np.linalg.solve(H[np.ix_(left, left)], -H[left, i] * change[i])
        w_hat += change
    return squared_error(w, w_hat, H)


def shift_oracle(
    W: Array,  # (rows, d)
    X: Array,  # (d, L) inputs
    Y: Array,  # (rows, L) outputs that they should give
    images: int,
    ridge: float,
) -> Array:  # (rows, d)
    """argmin over W' of  sum ||y - W' x||^2 / images + ridge mean(diag H) ||W' - W||^2 / 2.

    Zeros of W stay. Each row is a least-squares problem by itself, with an equation for each input
    and one for each weight.
    """
    shifted = W.copy()
    damping = ridge * np.mean(2 / images * np.sum(X**2, axis=1))
    if damping == 0:  # any W' would do
        return shifted
    for row, w in enumerate(W):
        S = np.flatnonzero(w)
        weights = np.sqrt(damping * images / 2)
        A = np.concatenate([X[S].T, weights * np.eye(len(S))])
        b = np.concatenate([Y[row], weights * w[S]])
        shifted[row, S] = np.linalg.lstsq(A, b, rcond=None)[0]
    return shifted


def squared_error(
    w: Array,  # (d,) or (rows, d)
    w_hat: Array,  # like w
    H: Array,  # (d, d)
) -> float:
    """(w - w_hat) H (w - w_hat)^T / 2, summed over rows if there are several."""
    difference = np.atleast_2d(w - w_hat)
    return float(sum(row @ H @ row for row in difference) / 2)


# ----------------------------------------------------------------------------------------- grids


def _to_grid(
    x: Array,  # any shape
    step: float,
    zero: float,
    bits: int,
) -> Array:  # like x
    level = np.clip(np.round(x / step) + zero, 0, 2**bits - 1)
    return step * (level - zero)


def _search_error(
    x: Array,  # any shape
    x_hat: Array,  # like x
) -> float:
    return float((np.abs(x - x_hat) ** SEARCH_NORM).sum())


def symmetric_grid_oracle(
    w_row: Array,  # (d,)
    bits: int,
) -> tuple[float, Array]:
    """Weight grid by range search: (step, row rounded to the grid).  A zero row has step 1.

    Levels 0 .. 2^b - 1, zero point 2^(b-1), step 2 max|w| p / (2^b - 1); the p of 1.00, 0.99 ..
    0.21 with the least sum of |w - q|^2.4, the largest such p on a tie.
    """
    largest = float(np.abs(w_row).max())
    if largest == 0:
        return 1.0, np.zeros(w_row.shape)
    best_error, best_step, best_row = math.inf, 1.0, w_row
    for i in range(SHRINK_STEPS):
        step = 2 * largest * (1 - i / 100) / (2**bits - 1)
        row = _to_grid(w_row, step, 2 ** (bits - 1), bits)
        error = _search_error(w_row, row)
        if error < best_error:
            best_error, best_step, best_row = error, step, row
    return best_step, best_row


def asymmetric_grid_oracle(
    x: Array,  # any shape
    bits: int,
) -> tuple[float, float, Array]:
    """Activation grid by the same search: (step, zero point, x rounded to the grid).

    Range [min(x, 0), max(x, 0)] p, step (max - min) p / (2^b - 1), zero point round(-min p / step).
    If x is zero throughout: step 1, zero point 0.
    """
    lowest, highest = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    if lowest == highest:
        return 1.0, 0.0, np.zeros(x.shape)
    best_error, best_step, best_zero, best_x = math.inf, 1.0, 0.0, x
    for i in range(SHRINK_STEPS):
        p = 1 - i / 100
        step = (highest - lowest) * p / (2**bits - 1)
        zero = float(np.round(-lowest * p / step))
        x_hat = _to_grid(x, step, zero, bits)
        error = _search_error(x, x_hat)
        if error < best_error:
            best_error, best_step, best_zero, best_x = error, step, zero, x_hat
    return best_step, best_zero, best_x
