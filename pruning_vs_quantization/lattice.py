"""Coordinates in which integer least squares is easy to search.

f(z) = ‖Lᵀ(z − z*)‖² + …, G = LLᵀ, is to be searched over integers z. Any unimodular U (integer,
with an integer inverse) gives the same search over y, z = z₀ + U y, with an upper triangular R:

    f = ‖R (y − y*)‖² + …        RᵀR = UᵀGU        decided from the last y to the first

The search is short if the first decisions are expensive to get wrong, so if R_nn, R_{n−1,n−1}, …
are large. For correlated inputs they are tiny in the original coordinates, whatever their order;
lattice reduction (Lenstra, Lenstra and Lovász 1982, with the deep insertions of Schnorr and Euchner
1994) finds a U in which R's diagonal is nearly level.

Within a box only so much is to be gained. What is left to search, {f(z) ≤ f(z*) + excess} in a box
of width b, is narrow in the metric G + ρI with ρ = excess/b²: directions that G sees less than that
end at the box. So U reduces G + ρI. Reducing a G that is nearly singular would rather mix codes by
large integers, to no use within the box, and the box would bound its decisions badly.

Coordinates held at a side of the box are another matter: there f grows linearly, and no other
coordinate can make up for it. They are not mixed with others, and decided first. So

    U = [ reduced basis of the free ones   0 ]        columns of the second kind in the order of
        [ 0                                P ]        rising 1/A_ii, A = G⁻¹: the last one largest

    symbol  variable  shape
    U       U         (n, n)  integers, as float64
    R       R         (n, n)  upper triangular, positive diagonal
    B                 (m, m)  rows: basis of the lattice
"""

from __future__ import annotations

import numpy as np

from pruning_vs_quantization.proof import Flags, Reals, compiled

DELTA = 0.99  # of Lovász's condition
PASSES = 200  # × the dimension; more only where rounding keeps a reduction from ending


def coordinates(
    G: Reals,  # (n, n) positive definite
    held: Flags,  # (n,) coordinates at a side of the box
    ridge: float = 0.0,  # ρ
) -> tuple[Reals, Reals]:  # U, R (n, n)
    """The change of coordinates for a search, and its triangular matrix."""
    free = np.flatnonzero(~held)
    U = np.zeros_like(G)
    L = np.linalg.cholesky(G[np.ix_(free, free)] + ridge * np.eye(len(free)))
    U[np.ix_(free, np.arange(len(free)))] = reduced(L).T
    last = np.diagonal(np.linalg.inv(G))
    order = np.argsort(-last[held], kind="stable")
    U[np.flatnonzero(held)[order], np.arange(len(free), len(G))] = 1
    R = np.linalg.qr(np.linalg.cholesky(G).T @ U, mode="r")
    return U, np.ascontiguousarray(R * np.sign(np.diagonal(R))[:, None])


@compiled
def reduced(
    B: Reals,  # (m, m) rows: a basis
) -> Reals:  # (m, m) unimodular: its product with B is a reduced basis
    """Lattice reduction with deep insertions, in floating point.

    The result is unimodular whatever rounding does: it is made of integer row operations.
    """
    m = len(B)
    B, U = B.copy(), np.eye(m)
    orthogonal, length, mu = np.zeros((m, m)), np.zeros(m), np.zeros((m, m))
    k = 0
    for _ in range(PASSES * m):
        if k >= m:
            break
        for _ in range(2):  # the second time mends the rounding of the first
            _project(B, orthogonal, length, mu, k)
            _shorten(B, U, mu, k)
        _project(B, orthogonal, length, mu, k)
        for i in range(m):
            rest = B[k, i]
            for j in range(k):
                rest -= mu[k, j] * orthogonal[j, i]
            orthogonal[k, i] = rest
        length[k] = _dot(orthogonal, k, orthogonal, k)
        k = _insert(B, U, length, mu, k)
    return U


@compiled
def _dot(left: Reals, i: int, right: Reals, j: int) -> float:
    total = 0.0
    for column in range(left.shape[1]):
        total += left[i, column] * right[j, column]
    return total


@compiled
def _project(B: Reals, orthogonal: Reals, length: Reals, mu: Reals, k: int) -> None:
    """Row k of μ: B's row k on the orthogonal rows before it."""
    for j in range(k):
        mu[k, j] = _dot(B, k, orthogonal, j) / length[j]


@compiled
def _shorten(B: Reals, U: Reals, mu: Reals, k: int) -> None:
    """Take whole multiples of the rows before it off row k, so that |μ| ≤ ½."""
    for j in range(k - 1, -1, -1):
        q = np.rint(mu[k, j])
        if q != 0:
            for i in range(len(B)):
                B[k, i] -= q * B[j, i]
                U[k, i] -= q * U[j, i]
            for i in range(j):
                mu[k, i] -= q * mu[j, i]


@compiled
def _insert(B: Reals, U: Reals, length: Reals, mu: Reals, k: int) -> int:
    """Move row k up to where it is shorter than what stands there; the row to go on with."""
    rest = _dot(B, k, B, k)
    for i in range(k):
        if rest < DELTA * length[i]:
            for j in range(k, i, -1):
                _swap(B, j)
                _swap(U, j)
            return i
        rest -= mu[k, i] ** 2 * length[i]
    return k + 1


@compiled
def _swap(rows: Reals, j: int) -> None:
    """Swap row j with the one before it."""
    for column in range(rows.shape[1]):
        rows[j, column], rows[j - 1, column] = rows[j - 1, column], rows[j, column]
