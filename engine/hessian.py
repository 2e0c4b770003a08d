"""The layer-wise Hessian H = (2/N) Σ x xᵀ of a convolution or linear layer, and its inverse.

OBC (arXiv 2208.11580), section 3: for the squared output error of one row of weights, the Hessian
is the second moment of the inputs x that the row is multiplied with; it is the same for all rows
(of a group, if the convolution is grouped). N counts images, whatever the number of positions in
each.

For a convolution x is a patch. Patches overlap, so unfolding them all and multiplying does most of
the work several times. Write a patch as kh rows of kw·C numbers each. The block of H for patch rows
i and i' sums, over output rows y,

    F[s·y + δi]ᵀ F[s·y + δi']        F: the padded image, unfolded along its width only

(stride s, dilation δ) and so depends on i only through the window of y it starts at, beside the lag
δ(i' − i) and the phase δi mod s. All i of equal lag and phase share the rows in the middle of their
windows; only the few rows at the borders differ. This is exact for every padding and stride, needs
kw copies of the image instead of kh·kw, and, for 3×3, 3 products of (3C)² instead of 9.

    symbol  shape            meaning
    C                        input channels of a group
    f = kw·C                 features of a patch row, channel innermost
    d = kh·f                 columns of the layer
    F       (G, T, n·Wo, f)  T image rows, n images, Wo outputs a row

Products are taken in the inputs' precision (at least float32) over a few images at a time and
accumulated in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.threads import Wait, at_once, in_pieces, rows_of_a_piece

CHUNK_BYTES = 64 << 20  # an unfolded piece of a batch is no larger than this
MIRRORED = 512  # columns at a time
WAITING_BYTES = 16 << 20  # of products that wait for their turn
NARROW = 128  # features; up to here a product a row is faster than one long product
DEAD = 1e-20  # × mean(diag H): inputs with less than this are always zero, or as good as
TOGETHER = 1 << 22  # numbers in the matrices that are inverted together
LADDER = tuple(10.0**exponent for exponent in range(-8, 1))  # damping tried, × mean(diag H)


class Gram:
    """Σ x xᵀ of one layer's inputs, batch after batch, for each of its groups."""

    def __init__(self, layer: nn.Conv2d | nn.Linear) -> None:
        self.layer = layer
        self.groups = getattr(layer, "groups", 1)
        self.total: Tensor | None = None  # (G, d, d), of convolutions the upper blocks only
        self.shards: Tensor | None = None  # the same, of shards of the images that have ended

    def sums(self) -> Tensor:  # (G, d, d) float64
        """The sums so far, to add to."""
        if self.total is None:
            d, device = self.layer.weight[0].numel(), self.layer.weight.device
            with torch.inference_mode(False):  # or nobody outside could add to them
                self.total = torch.zeros(self.groups, d, d, dtype=torch.float64, device=device)
        return self.total

    def end_shard(self) -> None:
        """Put the sums of a shard of the images to those of the shards before it."""
        if self.shards is None:
            self.shards, self.total = self.sums(), None
        else:
            self.shards += self.sums()
            self.total.zero_()

    def all_shards(self) -> None:
        """Go on with the sums over all shards that have ended."""
        if self.shards is not None:
            self.total, self.shards = self.shards, None

    def add(
        self,
        inputs: Tensor,  # (n, C, height, width) for a convolution, (…, d) for a linear layer
        wait: Wait = at_once,  # until it is this batch's turn to be added
    ) -> None:
        """Add one batch. Its products are made before it waits, unless they are many."""
        if inputs.dtype in (torch.float16, torch.bfloat16):
            inputs = inputs.float()
        products, size = [], 0
        for place, product in self._products(inputs):
            products.append((place, product))
            size += product.nbytes
            if size > WAITING_BYTES:
                wait()
                self._put(products)
                products, size = [], 0
        wait()
        self._put(products)

    def _put(self, products: list[tuple[tuple, Tensor]]) -> None:
        total = self.sums()
        if not isinstance(self.layer, nn.Linear):
            kh = self.layer.kernel_size[0]
            total = total.view(self.groups, kh, total.shape[1] // kh, kh, -1)
        for place, product in products:
            total[place] += product

    def _products(self, inputs: Tensor) -> Iterator[tuple[tuple, Tensor]]:
        """What to add to the sums of one batch, and where: at (0,), or a block of convolutions'."""
        if isinstance(self.layer, nn.Linear):
            x = inputs.reshape(-1, inputs.shape[-1])
            for part in x.split(max(1, CHUNK_BYTES // (x.shape[1] * x.element_size()))):
                yield (0,), part.T @ part
            return
        image = padded(self.layer, inputs)
        height, width = output_size(self.layer, image)
        kw = self.layer.kernel_size[1]
        row_bytes = image.shape[2] * width * kw * image.shape[1] * image.element_size()
        for part in image.split(max(1, CHUNK_BYTES // row_bytes)):
            yield from self._row_products(width_unfolded(self.layer, part, width), height)

    def _row_products(
        self,
        F: Tensor,  # (G, T, n·Wo, f)
        height: int,
    ) -> Iterator[tuple[tuple, Tensor]]:
        kh = self.layer.kernel_size[0]
        for lag in range(kh):
            for pairs in self._same_phase(kh - lag):
                starts = [i * self.layer.dilation[0] for i in pairs]
                shift = lag * self.layer.dilation[0]
                sums = window_products(F, starts, shift, self.layer.stride[0], height)
                for i, product in zip(pairs, sums, strict=True):
                    yield (slice(None), i, slice(None), i + lag), product

    def _same_phase(self, count: int) -> list[list[int]]:
        """Kernel rows 0 … count−1, sorted by the phase of stride they start at."""
        stride, dilation = self.layer.stride[0], self.layer.dilation[0]
        phases: dict[int, list[int]] = {}
        for i in range(count):
            phases.setdefault(i * dilation % stride, []).append(i)
        return list(phases.values())

    def matrix(self) -> Tensor:  # (G, d, d) float64
        """Σ x xᵀ so far; columns in the order of the layer's weights, (channel, kh, kw)."""
        return self._ordered(self.sums().clone())

    def take(self) -> Tensor:  # (G, d, d) float64
        """The same, and start anew: for want of memory."""
        total, self.total = self.sums(), None
        return self._ordered(total)

    def _ordered(self, total: Tensor) -> Tensor:  # changes its argument
        if isinstance(self.layer, nn.Linear):
            return mirrored(total, MIRRORED)
        kh, kw = self.layer.kernel_size
        G, d, _ = total.shape
        C = d // (kh * kw)
        blocks = mirrored(total, d // kh).view(G, kh, kw, C, kh, kw, C)
        return blocks.permute(0, 3, 1, 2, 6, 4, 5).reshape(G, d, d)


def mirrored(
    H: Tensor,  # (G, d, d), changed in place
    size: int,  # columns at a time
) -> Tensor:  # H
    """What is above the diagonal also below it: products need not be symmetric to the last bit."""
    for first in range(0, H.shape[1], size):
        some = slice(first, first + size)
        corner = H[:, some, some]
        corner.copy_(corner.triu() + corner.triu(1).mT)
        H[:, some, :first] = H[:, :first, some].mT
    return H


def padded(layer: nn.Conv2d, inputs: Tensor) -> Tensor:
    """The input (n, C, height, width) with the layer's own padding around it."""
    if layer.padding == "valid":
        sides = [0, 0, 0, 0]
    elif layer.padding == "same":  # as torch does: the odd one goes to the right and the bottom
        both = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        sides = [both[1] // 2, both[1] - both[1] // 2, both[0] // 2, both[0] - both[0] // 2]
    else:
        sides = [layer.padding[1]] * 2 + [layer.padding[0]] * 2
    if not any(sides):
        return inputs
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return functional.pad(inputs, sides, mode=mode)


def output_size(layer: nn.Conv2d, image: Tensor) -> tuple[int, int]:
    """Height and width of the layer's output for an already padded input."""
    sizes = zip(image.shape[2:], layer.kernel_size, layer.dilation, layer.stride, strict=True)
    height, width = ((size - d * (k - 1) - 1) // s + 1 for size, k, d, s in sizes)
    return height, width


def width_unfolded(
    layer: nn.Conv2d,
    image: Tensor,  # (n, groups·C, T, width) padded
    width: int,  # outputs a row
) -> Tensor:  # (G, T, n·Wo, kw·C)
    """Patches of kw pixels along every image row, channel innermost."""
    n, channels, T, _ = image.shape
    G, C = layer.groups, channels // layer.groups
    kw, dilation, stride = layer.kernel_size[1], layer.dilation[1], layer.stride[1]
    rows = image.unflatten(1, (G, C)).permute(1, 3, 0, 4, 2)  # (G, T, n, width, C)
    last = stride * (width - 1) + 1
    pieces = [rows[:, :, :, j * dilation : j * dilation + last : stride] for j in range(kw)]
    return torch.cat(pieces, dim=-1).reshape(G, T, n * width, kw * C)


def window_products(
    F: Tensor,  # (G, T, n·Wo, f)
    starts: list[int],  # first image row of each window; all equal modulo stride
    shift: int,  # lag between the two factors, in image rows
    stride: int,
    height: int,  # rows of each window
) -> list[Tensor]:  # for each start: (G, f, f) float64
    """Σ_y F[start + stride·y]ᵀ F[start + shift + stride·y] over y < height, for every start.

    The rows that all windows have in common are multiplied once, the others once each.
    """

    def product(first: int, count: int) -> Tensor:
        stop = first + stride * (count - 1) + 1
        left, right = F[:, first:stop:stride], F[:, first + shift : stop + shift : stride]
        if F.shape[3] <= NARROW:
            return (left.transpose(2, 3) @ right).sum(1).double()
        return (left.flatten(1, 2).transpose(1, 2) @ right.flatten(1, 2)).double()

    lowest, highest = starts[0], starts[-1]
    edge = (highest - lowest) // stride  # rows that a window does not share, at either end
    if len(starts) == 1 or height <= 2 * edge:
        return [product(start, height) for start in starts]
    common = product(highest, height - edge)
    before = [product(lowest + stride * t, 1) for t in range(edge)]
    after = [product(lowest + stride * (height + t), 1) for t in range(edge)]
    sums = []
    for start in starts:
        t = (start - lowest) // stride
        total = common.clone()
        for piece in before[t:] + after[:t]:
            total += piece
        sums.append(total)
    return sums


@dataclass(frozen=True)
class Inverse:
    """H⁻¹ of G systems, ready for an elimination."""

    matrix: Tensor  # (G, d, d)
    floor: Tensor  # (G, d), 1/H_pp: in exact arithmetic no pivot falls below it
    damping: Tensor  # (G,) what was added to the diagonal, × its mean
    deficit: Tensor  # (G,) d − rank(H), counted only where H had to be damped


class SingularHessian(ValueError):
    """H is not positive definite even with its whole mean added to the diagonal."""


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
