"""Refinement of weights whose Hessian had to be damped: H as it is, not as it was damped.

Where H is not positive definite, or barely so, `inverse.py` damps it: the elimination works with
H + λI, and the remaining weights are optimal for that, not for H. Which weights remain is decided
by then; here their values are improved. With M the weights that remain at a level, ŵ their values,

    minimise  E(ŵ) = (ŵ − w) H (ŵ − w)ᵀ / 2  over ŵ_M        (OBC, arXiv 2208.11580, section 3)

by conjugate gradients with (H + λI)_MM⁻¹ as preconditioner, which `levels.py` has factors of for
every level. E falls with every step. No step is taken in a direction in which H is below the
resolution of float32 sums of inputs. Nothing is done where H was not damped, or where the user
asked for the damping (--rel-damp).

Greedy choices on a Hessian of low rank can still be worse than choices without any Hessian.
`never_worse` compares the two and takes the better one, row by row.

    symbol  variable   shape            meaning
    H       H          (G, d, d)        undamped, float64
    ŵ       current    (levels, R, d)
    −∂E     residual   (levels, R, d)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from obc.solver.threads import in_pieces

ROWS_TOGETHER = 64
CG_STEPS = 12  # of conjugate gradients
CONVERGED = 1e-4  # × E: a further step that can be expected to gain less is not worth it
NEGLIGIBLE_ERROR = 1e-10  # × w H wᵀ: an E this small needs no step
RESOLVED_CURVATURE = 4 * torch.finfo(torch.float32).eps  # × Σ p_i² H_ii: less curvature is noise


def refined(
    start: Tensor,  # (levels, R, d) weights
    W: Tensor,  # (1 or levels, R, d) dense weights
    H: Tensor,  # (G, d, d) float64
    system: Tensor,  # (R,) which of the H is each row's
    free: Tensor,  # (levels, R, d) bool, weights that may change
    precondition: Callable[[Tensor, Tensor], Tensor],  # v, its levels -> ≈ v H⁻¹ on `free`
) -> Tensor:  # (levels, R, d) float64
    """Weights of lower E, never of higher E; see the module docstring."""
    result, W = start.to(torch.float64, copy=True), W.double()
    diagonal = H.diagonal(dim1=1, dim2=2)[system]  # (R, d)
    negligible = (NEGLIGIBLE_ERROR * dot(W, times(W, H, system))).expand(len(start), -1, 1)
    level = torch.arange(len(start), device=start.device)  # those still in work
    residual = times(W - result, H, system)
    error = dot(W - result, residual)  # 2 E
    residual *= free
    current, direction = result.clone(), precondition(residual, level) * free
    energy = dot(residual, direction)
    for _ in range(CG_STEPS):
        active = (energy > CONVERGED * error) & (error > negligible)
        go_on = torch.nonzero(active.flatten(1).any(1)).flatten()
        result[level] = current
        if not len(go_on):
            break
        level, free, active, negligible = (x[go_on] for x in (level, free, active, negligible))
        current, residual, direction, energy, error = (
            x[go_on] for x in (current, residual, direction, energy, error)
        )
        image = times(direction, H, system) * free
        curvature = dot(direction, image)
        resolved = curvature > RESOLVED_CURVATURE * dot(direction * diagonal, direction)
        step = torch.where(resolved & active, energy / curvature, 0.0)
        current, residual = current + step * direction, residual - step * image
        error = error - step * energy
        z = precondition(residual, level) * free
        energy, before = dot(residual, z), energy
        direction = z + direction * torch.where(before > 0, energy / before, 0.0)
        energy = torch.where(step > 0, energy, 0.0)  # a row that takes no step now never will
    result[level] = current
    return result


def dot(a: Tensor, b: Tensor) -> Tensor:  # (…, d), (…, d) -> (…, 1)
    return (a * b).sum(-1, keepdim=True)


def times(
    x: Tensor,  # (levels, R, d)
    matrices: Tensor,  # (G, d, d)
    system: Tensor,  # (R,)
) -> Tensor:  # (levels, R, d)
    """x H, with each system's own H."""
    if len(matrices) == 1:
        return x @ matrices[0]
    if len(system) == 1 and x.device.type == "cpu":  # to know which one, a GPU would be waited for
        return x @ matrices[int(system[0])]
    return torch.bmm(x.transpose(0, 1), matrices[system]).transpose(0, 1)


def row_errors(
    weights: Tensor,  # (rows, d)
    W: Tensor,  # (rows, d)
    H: Tensor,  # (G, d, d), of rows/G rows each
) -> Tensor:  # (rows,) float64
    """E of every row."""
    delta = (W - weights).double().view(len(H), -1, H.shape[1])
    errors = delta.new_empty(delta.shape[:2])
    units = errors.T if len(H) == 1 else errors  # work is divided by rows, or else by groups

    def work(piece: slice) -> None:
        x, H_of_piece = (delta[:, piece], H) if len(H) == 1 else (delta[piece], H[piece])
        units[piece] = (x @ H_of_piece * x).sum(2).view(units[piece].shape)

    if H.device.type == "cpu":
        in_pieces(work, len(units), ROWS_TOGETHER)
    else:
        work(slice(None))
    return errors.flatten() / 2


def never_worse(
    weights: Tensor,  # (rows, d)
    rival: Tensor,  # (rows, d) made without a Hessian
    W: Tensor,  # (rows, d)
    H: Tensor,  # (G, d, d) float64
) -> tuple[Tensor, int]:  # (rows, d), and how many of its rows are the rival's
    """The weights of lower E of each row."""
    better = row_errors(rival, W, H) < row_errors(weights, W, H)
    return torch.where(better[:, None], rival, weights), int(better.sum())
