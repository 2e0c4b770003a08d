"""The last word on weights whose Hessian is hard: H as it is, not as it was damped.

Where H is not positive definite, or nearly so, `inverse.py` damps it: the elimination works with
H + λI, and the weights it leaves are best for that, not for H. Which weights stay is settled then;
their values are improved here. With M the weights kept at a level and ŵ their values,

    minimise  E(ŵ) = (ŵ − w) H (ŵ − w)ᵀ / 2  over ŵ_M        (OBC, arXiv 2208.11580, section 3)

by conjugate gradients with (H + λI)_MM⁻¹ as preconditioner, which the factors of `levels.py` hold
for every level. E falls with every step. No step is taken along a direction in which H is below
what float32 sums of inputs resolve. Nothing is done where H was not damped, nor where the user
asked for damping (--rel-damp).

Greedy choices on a Hessian of low rank can still end above what no Hessian at all would have
given. `never_worse` compares the two and keeps, row by row, the better one.

    symbol  variable   shape            meaning
    H       H          (G, d, d)        undamped, float64
    ŵ       now        (levels, R, d)
    −∂E     residual   (levels, R, d)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from obc.solver.threads import in_pieces

TOGETHER = 64  # rows in a piece
STEPS = 12  # of conjugate gradients
CONVERGED = 1e-4  # × E: what a further step can be expected to gain is no longer worth it
NOTHING = 1e-10  # × w H wᵀ: an E this small needs no step
RESOLVED = 4 * torch.finfo(torch.float32).eps  # × Σ p_i² H_ii: less curvature than this is noise


def refined(
    start: Tensor,  # (levels, R, d) weights
    W: Tensor,  # (R, d) weights to be as good as
    H: Tensor,  # (G, d, d) float64
    system: Tensor,  # (R,) which H is each row's
    free: Tensor,  # (levels, R, d) bool, weights that may change
    precondition: Callable[[Tensor, Tensor], Tensor],  # v, its levels -> ≈ v H⁻¹ on `free`
) -> Tensor:  # (levels, R, d) float64
    """Weights of lower E, none of them higher; see the module docstring."""
    result, W = start.to(torch.float64, copy=True), W.double()
    diagonal = H.diagonal(dim1=1, dim2=2)[system]  # (R, d)
    nothing = NOTHING * dot(W, times(W[None], H, system)[0])
    level = torch.arange(len(start), device=start.device)  # those not yet done
    residual = times(W - result, H, system)
    error = dot(W - result, residual)  # 2 E
    residual *= free
    now, direction = result.clone(), precondition(residual, level) * free
    energy = dot(residual, direction)
    for _ in range(STEPS):
        wanted = (energy > CONVERGED * error) & (error > nothing)
        left = wanted.flatten(1).any(1)
        result[level] = now
        if not bool(left.any()):
            break
        level, free, wanted, error = level[left], free[left], wanted[left], error[left]
        now, residual, direction, energy = (x[left] for x in (now, residual, direction, energy))
        moved = times(direction, H, system) * free
        curvature = dot(direction, moved)
        sound = curvature > RESOLVED * dot(direction * diagonal, direction)
        step = torch.where(sound & wanted, energy / curvature, 0.0)
        now, residual = now + step * direction, residual - step * moved
        error = error - step * energy
        z = precondition(residual, level) * free
        energy, before = dot(residual, z), energy
        direction = z + direction * torch.where(before > 0, energy / before, 0.0)
        energy = torch.where(step > 0, energy, 0.0)  # what takes no step now never will
    result[level] = now
    return result


def dot(a: Tensor, b: Tensor) -> Tensor:  # (…, d), (…, d) -> (…, 1)
    return (a * b).sum(-1, keepdim=True)


def times(
    x: Tensor,  # (levels, R, d)
    matrices: Tensor,  # (G, d, d)
    system: Tensor,  # (R,)
) -> Tensor:  # (levels, R, d)
    """x H, of every system's own H."""
    if len(matrices) == 1 or len(system) == 1:
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
    units = errors.T if len(H) == 1 else errors  # what goes in pieces: rows, or else groups

    def work(some: slice) -> None:
        part, own = (delta[:, some], H) if len(H) == 1 else (delta[some], H[some])
        units[some] = (part @ own * part).sum(2).view(units[some].shape)

    if H.device.type == "cpu":
        in_pieces(work, len(units), TOGETHER)
    else:
        work(slice(None))
    return errors.flatten() / 2


def never_worse(
    weights: Tensor,  # (rows, d)
    rival: Tensor,  # (rows, d) what would have been done without a Hessian
    W: Tensor,  # (rows, d)
    H: Tensor,  # (G, d, d) float64
) -> tuple[Tensor, int]:  # (rows, d), and the number of rows that are the rival's
    """Of each row the weights of lower E."""
    better = row_errors(rival, W, H) < row_errors(weights, W, H)
    return torch.where(better[:, None], rival, weights), int(better.sum())
