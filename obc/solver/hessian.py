"""The layer-wise Hessian H = (2/N) Σ x xᵀ of a convolution or linear layer.

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

import torch
from torch import Tensor, nn
from torch.nn import functional

from obc.solver.threads import Wait, at_once

CHUNK_BYTES = 64 << 20  # an unfolded piece of a batch is no larger than this
MIRRORED = 512  # columns at a time
WAITING_BYTES = 16 << 20  # of products that wait for their turn
NARROW = 128  # features; up to here a product a row is faster than one long product


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
