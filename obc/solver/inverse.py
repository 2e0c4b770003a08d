"""H⁻¹, where H is positive definite as far as can be told, and what is done where it is not.

    A = (H + δ·mean(diag H)·1)⁻¹        δ: the least of 0, 10⁻⁸, 10⁻⁷ … 1 with
                                         max_p (A⁻¹)_pp A_pp < 0.01 / ε

ExactOBS divides by pivots of A all the way (OBC, arXiv 2208.11580, section 4). A pivot begins at
A_pp and ends no lower than 1/(A⁻¹)_pp; ε, the precision of the elimination, has to resolve that.
Layers see fewer patches than they have columns, or channels that copy each other: H is singular
then. Inputs that are always zero are set apart before. The rank deficit is counted, for the log.
Deviation: OBC adds an unscaled identity.

    symbol  variable  shape      meaning
    H                 (G, d, d)  of G groups of a layer, float64
    A       matrix    (G, d, d)  its inverse, in the precision of the elimination
    δ       damping   (G,)
            floor     (G, d)     1/(A⁻¹)_pp
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from obc.solver.allocator import give_back_freed_memory
from obc.solver.errors import SingularHessian
from obc.solver.threads import in_pieces, rows_of_a_piece

DEAD = 1e-20  # × mean(diag H): inputs with less than this are always zero, or as good as
TOGETHER = 1 << 22  # numbers in the matrices that are inverted together
LADDER = tuple(10.0**exponent for exponent in range(-8, 1))  # damping tried, × mean(diag H)


@dataclass(frozen=True)
class Inverse:
    """H⁻¹ of G systems, ready for an elimination."""

    matrix: Tensor | None  # (G, d, d); None: the identity
    floor: Tensor  # (G, d), 1/H_pp: in exact arithmetic no pivot falls below it
    damping: Tensor  # (G,) what was added to the diagonal, × its mean
    deficit: Tensor  # (G,) d − rank(H), counted only where H had to be damped


def identity(H: Tensor, dtype: torch.dtype) -> Inverse:
    """What takes the place of H⁻¹ where H is to count as 1, so that weights do not interact."""
    G, d, _ = H.shape
    return Inverse(None, H.new_ones(G, d, dtype=dtype), H.new_zeros(G), H.new_zeros(G))


def damped_inverse(
    H: Tensor,  # (G, d, d) float64
    rel_damp: float = 0.0,  # × mean(diag H), added in any case
    dtype: torch.dtype = torch.float32,  # of the elimination that is to follow
) -> Inverse:
    """Invert H, damped where it must be (float64; DESIGN: "Numerics").

    Inputs that are always zero (H_pp = 0) are decoupled from the others. H counts as positive
    definite if it has a Cholesky factor and no H_pp (H⁻¹)_pp, the factor by which a pivot shrinks
    during an elimination, exceeds what `dtype` resolves. Otherwise the smallest step of `LADDER`
    that makes it so is added to the diagonal, per group. A few groups go at a time, one a thread:
    beside H few matrices are in memory, and bits do not depend on the number of threads.

    Raises:
        SingularHessian: if no step does (H holds NaN or infinity).
    """
    together, parts = max(1, TOGETHER // H[0].numel()), {}

    def work(groups: slice) -> None:
        parts[groups.start] = _damped_inverse(H[groups], rel_damp, dtype)

    if H.device.type == "cpu":
        in_pieces(work, len(H), min(together, rows_of_a_piece(len(H), H[0].nbytes)))
    else:
        for first in range(0, len(H), together):
            work(slice(first, first + together))
    give_back_freed_memory()
    some = [parts[first] for first in sorted(parts)]
    if len(some) == 1:
        return some[0]
    return Inverse(*(torch.cat([getattr(part, f.name) for part in some]) for f in fields(Inverse)))


def _damped_inverse(H: Tensor, rel_damp: float, dtype: torch.dtype) -> Inverse:
    """`damped_inverse` of all groups at once."""
    matrix = torch.empty_like(H, dtype=dtype) if len(H) > 1 else None
    damping, mean = H.new_full((len(H),), rel_damp), H.diagonal(dim1=1, dim2=2).mean(1)
    left, least = torch.ones_like(damping, dtype=torch.bool), torch.zeros_like(damping)
    for step in (0.0, *LADDER):
        wanted = torch.nonzero(left & (least <= step)).flatten()  # smaller ones are in vain
        if not len(wanted):
            continue
        damping[wanted] = rel_damp + step
        inverse, good, vain = checked_inverse(decoupled(H[wanted], damping[wanted]), dtype)
        if len(H) > 1:
            matrix[wanted[good]] = inverse[good].to(dtype)
        elif bool(good):
            matrix = inverse.to(dtype)
        del inverse
        left[wanted[good]] = False
        least[wanted] = step + 0.99 * vain / mean[wanted]
        if not bool(left.any()):
            break
    else:
        raise SingularHessian("the Hessian holds NaN or infinity: check the calibration images")
    deficit = torch.zeros(len(H), dtype=torch.int64, device=H.device)
    for g in torch.nonzero(damping > rel_damp).flatten().tolist():
        deficit[g] = rank_deficit(decoupled(H[g : g + 1].clone(), damping.new_zeros(1))[0])
    return Inverse(matrix, (1 / decoupled_diagonal(H, damping)).to(dtype), damping, deficit)


def rank_deficit(H: Tensor) -> int:  # (d, d) float64, positive semidefinite; overwritten
    """How many eigenvalues of H are below 1e-7 × the Frobenius norm.

    As many as H less so much of the identity has negative ones: by Sylvester's law of inertia those
    of D in a factorisation LDLᵀ, a third of the work of finding them. A 2×2 block of D has one.
    """
    H.diagonal().sub_(1e-7 * torch.linalg.matrix_norm(H))
    factor, pivots, _ = torch.linalg.ldl_factor_ex(H)
    return int(((factor.diagonal() < 0) & (pivots > 0)).sum()) + int((pivots < 0).sum()) // 2


def decoupled(
    H: Tensor,  # (G, d, d), changed in place
    damping: Tensor,  # (G,) × mean(diag H)
) -> Tensor:  # H
    """Without its dead inputs, zero but for the mean on the diagonal, and damped."""
    diagonal, alive = decoupled_diagonal(H, damping), alive_inputs(H)
    if not bool(alive.all()):
        H.masked_fill_(~alive[:, :, None], 0).masked_fill_(~alive[:, None, :], 0)
    H.diagonal(dim1=1, dim2=2).copy_(diagonal)
    return H


def decoupled_diagonal(H: Tensor, damping: Tensor) -> Tensor:  # (G, d)
    """The diagonal of H, dead inputs' the mean (or 1), with damping × mean added."""
    diagonal = H.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    return torch.where(alive_inputs(H), diagonal, mean) + damping[:, None] * mean


def alive_inputs(H: Tensor) -> Tensor:  # (G, d, d) -> (G, d) bool
    """Which inputs are not always zero (NaN counts as alive: it has to be noticed)."""
    diagonal = H.diagonal(dim1=1, dim2=2)
    return ~(diagonal <= DEAD * diagonal.mean(1, keepdim=True))


def badly_scaled(H: Tensor) -> bool:  # (G, d, d)
    """Whether inputs differ so much in size that float32 does not resolve what they share."""
    diagonal = H.diagonal(dim1=1, dim2=2)
    least = torch.where(diagonal > 0, diagonal, torch.inf).amin(1)
    return bool((diagonal.amax(1) * torch.finfo(torch.float32).eps > least).any())


def checked_inverse(
    H: Tensor,  # (G, d, d) float64, symmetric; overwritten with the inverses
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(G, d, d) A = H⁻¹ by Cholesky; (G,) if good for `dtype`; (G,) how much damping is in vain.

    Good: every pivot shrinks by less, s = H_pp A_pp, than is resolved. More damping δ leaves A_pp
    at Σ v_i²/(λ_i + δ) ≥ A_pp/(1 + δr) with r = ‖A_:p‖²/A_pp (Jensen): up to (s/resolved − 1)/r it
    is in vain. H need not be semidefinite: float32 sums of few inputs are not quite.
    """
    diagonal = H.diagonal(dim1=1, dim2=2).clone()
    factor = H.mT  # LAPACK's own layout, in which it works in place
    info = torch.empty(len(H), dtype=torch.int32, device=H.device)
    torch.linalg.cholesky_ex(factor, out=(factor, info))
    good = info == 0
    factor.masked_fill_(~good[:, None, None], 0)
    factor.diagonal(dim1=1, dim2=2).masked_fill_(~good[:, None], 1)
    torch.cholesky_inverse(factor, out=factor)
    shrink, p = (diagonal * H.diagonal(dim1=1, dim2=2)).max(1)
    excess = shrink * (torch.finfo(dtype).eps / 1e-2)
    column = H[torch.arange(len(H), device=H.device), p]
    pivot = column.gather(1, p[:, None])
    vain = (excess - 1) / ((column / pivot).square().sum(1) * pivot[:, 0])
    return H, good & (excess < 1), torch.where(good, vain, 0)


def without(
    H: Tensor,  # (R, d, d) float64, one for each row
    zero: Tensor,  # (R, d) bool, weights that are gone
) -> Tensor:  # (R, d, d)
    """H for rows that lack some weights: those columns are decoupled, their diagonal kept."""
    kept = ~zero
    diagonal = H.diagonal(dim1=1, dim2=2).clone()
    H = torch.where(kept[:, :, None] & kept[:, None, :], H, 0.0)
    H.diagonal(dim1=1, dim2=2).copy_(diagonal)
    return H
