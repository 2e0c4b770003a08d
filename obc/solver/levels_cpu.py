"""Parts of a matrix in another order, for `levels.py`: compiled, for CPUs.

    S_ij = M[o_i, o_j]        v_i = Σ_j H[o_i, j] w_j

In compiled code the half above S's diagonal is never read, and neither needs a copy of whole rows.
"""

from __future__ import annotations

from numba import njit

compiled = njit(nogil=True, cache=True, error_model="numpy")
compiled_sum = njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc"})


@compiled
def gather_lower(
    M,  # (d, d)
    order,  # (k,)
    out,  # (k, k), filled on and below the diagonal
):
    for i in range(len(order)):
        row = M[order[i]]
        for j in range(i + 1):
            out[i, j] = row[order[j]]


@compiled_sum
def multiply_rows(
    H,  # (d, d)
    order,  # (k,)
    w,  # (d,)
    out,  # (k,)
):
    for i in range(len(order)):
        row = H[order[i]]
        total = H.dtype.type(0)
        for j in range(len(w)):
            total += row[j] * w[j]
        out[i] = total
