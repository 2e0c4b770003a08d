"""The inverse Hessian: H⁻¹ where H is numerically positive definite, else H damped until it is.

    A = (H + δ·mean(diag H)·1)⁻¹        δ: the least of 0, 10⁻⁸, 10⁻⁷ … 1 with
                                         max_p (A⁻¹)_pp A_pp < 0.01 / ε

ExactOBS divides by pivots of A all the way (OBC, arXiv 2208.11580, section 4). A pivot begins at
A_pp and ends no lower than 1/(A⁻¹)_pp; ε, the precision of the elimination, has to resolve that.
H is singular where a layer sees fewer patches than it has columns, or channels that are copies of
each other. Inputs that are always zero are decoupled first. The rank deficit is counted for the
log. Deviation: OBC adds an unscaled identity.

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

from obc.solver.errors import SingularHessian
from obc.solver.threads import give_back_freed_memory, in_pieces, rows_of_a_piece

DEAD = 1e-20  # × mean(diag H): inputs with less are always zero, or might as well be
TOGETHER = 1 << 22  # numbers in all matrices that are inverted at a time
DAMPING_LADDER = tuple(10.0**exponent for exponent in range(-8, 1))  # damping, × mean(diag H)


@dataclass(frozen=True)
class Inverse:
    """H⁻¹ of G systems, ready for an elimination."""

    matrix: Tensor | None  # (G, d, d); None: the identity
    floor: Tensor  # (G, d), 1/H_pp: in exact arithmetic no pivot falls below it
    damping: Tensor  # (G,) what was added to the diagonal, × its mean
    deficit: Tensor  # (G,) d − rank(H), counted only where H had to be damped


def identity(H: Tensor, dtype: torch.dtype) -> Inverse:
    """What replaces H⁻¹ where H is to be ignored: H = 1, so that weights do not interact."""
    G, d, _ = H.shape
    return Inverse(None, H.new_ones(G, d, dtype=dtype), H.new_zeros(G), H.new_zeros(G))


def damped_inverse(
    H: Tensor,  # (G, d, d) float64
    rel_damp: float = 0.0,  # × mean(diag H), added in any case
    dtype: torch.dtype = torch.float32,  # of the elimination that is to follow
) -> Inverse:
    """Invert H in float64, damped where it has to be.

    Inputs that are always zero (H_pp = 0) are decoupled from the others. H counts as positive
    definite if it has a Cholesky factor and no H_pp (H⁻¹)_pp, the factor by which a pivot shrinks
    during an elimination, exceeds what `dtype` resolves. Otherwise the smallest step of
    `DAMPING_LADDER` that makes it so is added to the diagonal, per group. A few groups are inverted
    at a time, one per thread: few matrices other than H are in memory, and bits do not depend on
    the number of threads.

    Raises:
        SingularHessian: if no step does (H holds NaN or infinity).
    """
    together, inverses = max(1, TOGETHER // H[0].numel()), {}

    def work(groups: slice) -> None:
        inverses[groups.start] = inverse_of_groups(H[groups], rel_damp, dtype)

    if H.device.type == "cpu":
        in_pieces(work, len(H), min(together, rows_of_a_piece(len(H), H[0].nbytes)))
    else:
        for first in range(0, len(H), together):
            work(slice(first, first + together))
    give_back_freed_memory()
    if len(inverses) == 1:
        return inverses[0]
    pieces = [inverses[first] for first in sorted(inverses)]
    return Inverse(*(torch.cat([getattr(x, f.name) for x in pieces]) for f in fields(Inverse)))


def inverse_of_groups(H: Tensor, rel_damp: float, dtype: torch.dtype) -> Inverse:
    """`damped_inverse` of all groups at once."""
    matrix = torch.empty_like(H, dtype=dtype) if len(H) > 1 else None
    damping, mean = H.new_full((len(H),), rel_damp), H.diagonal(dim1=1, dim2=2).mean(1)
    pending, least = torch.ones_like(damping, dtype=torch.bool), torch.zeros_like(damping)
    for step in (0.0, *DAMPING_LADDER):
        tried = torch.nonzero(pending & (least <= step)).flatten()  # less cannot be enough
        if not len(tried):
            continue
        damping[tried] = rel_damp + step
        inverse, good, too_little = checked_inverse(decoupled(H[tried], damping[tried]), dtype)
        if len(H) > 1:
            inverse = inverse.to(dtype)  # first: half the memory of an indexed float64
            matrix[tried[good]] = inverse[good]
        elif bool(good):
            matrix = inverse.to(dtype)
        del inverse
        pending[tried[good]] = False
        least[tried] = step + 0.99 * too_little / mean[tried]
        if not bool(pending.any()):
            break
    else:
        raise SingularHessian("the Hessian holds NaN or infinity: check the calibration images")
    deficit = torch.zeros(len(H), dtype=torch.int64, device=H.device)
    for g in torch.nonzero(damping > rel_damp).flatten().tolist():
        deficit[g] = rank_deficit(decoupled(H[g : g + 1].clone(), damping.new_zeros(1))[0])
    return Inverse(matrix, (1 / decoupled_diagonal(H, damping)).to(dtype), damping, deficit)


def rank_deficit(
    H: Tensor,  # (d, d) float64, positive semidefinite; overwritten
) -> Tensor:  # () int64
    """How many eigenvalues of H are below τ = 1e-7 × the Frobenius norm.

    As many as H − τ1 has negative ones, which by Sylvester's law of inertia are those of D in a
    factorisation LDLᵀ: a third of the work of an eigenvalue solver. A 2×2 block of D has one.
    """
    H.diagonal().sub_(1e-7 * torch.linalg.matrix_norm(H))
    factor, pivots, _ = torch.linalg.ldl_factor_ex(H)
    return ((factor.diagonal() < 0) & (pivots > 0)).sum() + (pivots < 0).sum() // 2


def decoupled(
    H: Tensor,  # (G, d, d), changed in place
    damping: Tensor,  # (G,) × mean(diag H)
) -> Tensor:  # H
    """H damped, and zero in rows and columns of dead inputs except for the mean as diagonal."""
    diagonal, alive = decoupled_diagonal(H, damping), alive_inputs(H)
    if H.device.type != "cpu" or not bool(alive.all()):  # a look would wait for a GPU
        H.masked_fill_(~alive[:, :, None], 0).masked_fill_(~alive[:, None, :], 0)
    H.diagonal(dim1=1, dim2=2).copy_(diagonal)
    return H


def decoupled_diagonal(H: Tensor, damping: Tensor) -> Tensor:  # (G, d)
    """The diagonal of H (of dead inputs: the mean, or 1) plus damping × mean."""
    diagonal = H.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    return torch.where(alive_inputs(H), diagonal, mean) + damping[:, None] * mean


def alive_inputs(H: Tensor) -> Tensor:  # (G, d, d) -> (G, d) bool
    """Which inputs are not always zero (NaN counts as alive, so that it is noticed)."""
    diagonal = H.diagonal(dim1=1, dim2=2)
    return ~(diagonal <= DEAD * diagonal.mean(1, keepdim=True))


def checked_inverse(
    H: Tensor,  # (G, d, d) float64, symmetric; overwritten with the inverses
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(G, d, d) A = H⁻¹ by Cholesky; (G,) if good for `dtype`; (G,) a damping that is too little.

    Good: every pivot shrinks by less, s = H_pp A_pp, than is resolved. More damping δ leaves A_pp
    at Σ v_i²/(λ_i + δ) ≥ A_pp/(1 + δr) with r = ‖A_:p‖²/A_pp (Jensen): up to (s/resolved − 1)/r it
    is too little. H need not be semidefinite: float32 sums of few inputs are not quite.
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
    too_little = (excess - 1) / ((column / pivot).square().sum(1) * pivot[:, 0])
    return H, good & (excess < 1), torch.where(good, too_little, 0)


def without(
    H: Tensor,  # (R, d, d) float64, one for each row
    zero: Tensor,  # (R, d) bool, weights that are absent
) -> Tensor:  # (R, d, d)
    """H for rows with absent weights: their columns are decoupled, the diagonal stays."""
    present = ~zero
    diagonal = H.diagonal(dim1=1, dim2=2).clone()
    H = torch.where(present[:, :, None] & present[:, None, :], H, 0.0)
    H.diagonal(dim1=1, dim2=2).copy_(diagonal)
    return H
