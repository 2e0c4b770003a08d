"""Range and zero point of a row's grid by the error of the layer's outputs (--hscale).

`quant.py` fits a grid to the weights alone. Here grids around that one are compared by what
E = (w − ŵ) H (w − ŵ)ᵀ / 2 they lead to. Rounding to nearest would be a bad proxy for OBQ: it makes
up for nothing. So each grid is tried with columns rounded one after the other, those of large H_ii
first, each error made up for by the columns to come (GPTQ, arXiv 2210.17323):

    A = H⁻¹ = UᵀU, U upper triangular        e_i = (w_i − Q(w_i)) / U_ii
    w_j −= e_i U_ij  for j > i               E = Σ e_i² / 2

For all rows and grids together this costs about as many operations as a few products W H.

    symbol  variable  shape      meaning
    Δ, z    scale, zero  (rows, 1)  step and zero point; codes are 0 … highest
    U       U         (d, d)     columns in order of falling H_ii
"""

from __future__ import annotations

import torch
from torch import Tensor

from obc.solver.threads import in_pieces

SCALES = tuple(0.6 + 0.05 * i for i in range(17))  # × the step; 1 is among them
SHIFTS = (0, -1, 1)  # of the zero point of an asymmetric grid
BLOCK = 32  # columns between two products
ROWS_FITTED = 16  # at a time, by a thread of a CPU
VECTORS_OF_A_GRID = 3  # of length d, for every grid of a row in work


def best_ranges(
    W: Tensor,  # (rows, d)
    system: Tensor,  # (rows,) which of the inverses is each row's, in ascending order
    inverse: Tensor,  # (G, d, d)
    diagonal: Tensor,  # (G, d) of H
    scale: Tensor,  # (rows, 1)
    zero: Tensor,  # (rows, 1)
    highest: int,
    symmetric: bool,
    memory: int,  # bytes, for U and for rows in work on a GPU
) -> tuple[Tensor, Tensor]:  # (rows, 1) each
    """Step and zero point of the grid of least E, of each row."""
    factors = scale.new_tensor([1.0, *(x for x in SCALES if x != 1)])  # ties: the grid as it is
    shifts = scale.new_tensor((0,) if symmetric else SHIFTS)
    scales = (scale[:, :, None] * factors).expand(-1, len(shifts), -1).flatten(1)
    zeros = (zero + shifts).clamp_(0, highest).repeat_interleave(len(factors), dim=1)
    best, (d, k) = torch.zeros_like(system), (W.shape[1], scales.shape[1])
    together = max(
        1, (memory - 8 * d * d) // (VECTORS_OF_A_GRID * d * k * W.element_size())
    )  # rows
    sizes = torch.bincount(system, minlength=len(inverse)).tolist()
    for group, size in enumerate(sizes):
        if not size:
            continue
        first, order = sum(sizes[:group]), diagonal[group].argsort(descending=True)
        if (U := factor_of(inverse[group], order)) is None:
            continue
        part, own = W[first : first + size, order], slice(first, first + size)
        grids, chosen = (scales[own].to(W.dtype), zeros[own].to(W.dtype)), best[own]

        def work(piece: slice) -> None:
            errors = errors_in_order(part[piece], U, *(x[piece] for x in grids), highest)  # noqa: B023
            chosen[piece] = errors.argmin(1)  # noqa: B023

        if W.device.type == "cpu":
            in_pieces(work, size, ROWS_FITTED)
        else:
            for start in range(0, size, together):
                work(slice(start, start + together))
    return scales.gather(1, best[:, None]), zeros.gather(1, best[:, None])


def factor_of(
    A: Tensor,  # (d, d)
    order: Tensor,  # (d,)
) -> Tensor | None:  # (d, d) float64
    """U of A in this order, if A has one. One matrix of this size is in memory, not three."""
    U, info = A.new_empty(A.shape, dtype=torch.float64), A.new_empty((), dtype=torch.int32)
    for first in range(0, len(order), BLOCK):
        rows = order[first : first + BLOCK]
        U[first : first + BLOCK] = A.index_select(0, rows).index_select(1, order)
    torch.linalg.cholesky_ex(U.mT, out=(U.mT, info))
    return None if info else U


def errors_in_order(
    W: Tensor,  # (R, d)
    U: Tensor,  # (d, d) float64
    scales: Tensor,  # (R, k) k grids for each row
    zeros: Tensor,  # (R, k)
    highest: int,
) -> Tensor:  # (R, k)
    """E after the columns were rounded in their order, for every grid."""
    (R, d), k = W.shape, scales.shape[1]
    w = W.repeat_interleave(k, dim=0).T.contiguous()  # (d, R·k): a column is contiguous
    scale, zero, errors = scales.flatten(), zeros.flatten(), scales.new_zeros(R * k)
    for start in range(0, d, BLOCK):
        end = min(start + BLOCK, d)
        made, block = w.new_empty(end - start, R * k), U[start:end].to(w.dtype)
        for i in range(start, end):
            row = block[i - start]
            code = torch.round(w[i] / scale).add_(zero).clamp_(0, highest).sub_(zero)
            error = torch.sub(w[i], code.mul_(scale), out=made[i - start]).div_(row[i])
            w[i + 1 : end].addr_(row[i + 1 : end], error, alpha=-1)
            errors.addcmul_(error, error, value=0.5)
        w[end:].addmm_(block[:, end:].T, made, alpha=-1)
    return errors.view(R, k)
