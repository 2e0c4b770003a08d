"""The layer-wise Hessian H = (2/N) Σ x xᵀ of a convolution or a linear layer.

OBC (arXiv 2208.11580), section 3: for the squared output error of one row of weights, the Hessian
is the second moment of the inputs x that the row is multiplied with; it is the same for all rows
(of a group, if the convolution is grouped). N counts images, however many positions each has.

For a convolution x is a patch. Patches overlap, so unfolding and multiplying them all would do most
of the work several times. Write a patch as kh rows of kw·C numbers each. The block of H for patch
rows i and i' is the sum, over output rows y, of

    F[s·y + δi]ᵀ F[s·y + δi']        F: the padded image, unfolded along its width only

(stride s, dilation δ). It depends on the lag δ(i' − i), the phase δi mod s and the place at which
the window of rows starts. All i of equal lag and phase share the rows in the middle of their
windows; only the few rows at the borders differ. This is exact for every padding and stride, needs
kw copies of the image instead of kh·kw, and, for 3×3, 3 products of (3C)² instead of 9. Linear
layers and 1-D convolutions are images of one row (`layers.py`), where there is nothing to share.

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

from obc.solver.layers import view
from obc.solver.threads import Wait, at_once

CHUNK_BYTES = 64 << 20  # of a piece of a batch, unfolded, unless one image takes more
MIRRORED = 512  # columns that are mirrored at a time
WAITING_BYTES = 16 << 20  # of products that wait to be added
NARROW = 128  # features up to which a product for every image row is faster than one long product


class Gram:
    """Σ x xᵀ over a layer's inputs, batch after batch, for each of its groups."""

    def __init__(self, layer: nn.Module) -> None:
        self.view = view(layer)
        self.total: Tensor | None = None  # (G, d, d); of the blocks (i, i') those with i ≤ i'
        self.shards: Tensor | None = None  # the same, over the shards of the images that have ended
        self.patches = 0  # x's in the sums so far, of each group
        self.patches_before = 0  # in the shards that have ended

    def sums(self) -> Tensor:  # (G, d, d) float64
        """The sums so far, to add to."""
        if self.total is None:
            (G, d), device = (self.view.groups, self.view.columns), self.view.layer.weight.device
            with torch.inference_mode(False):  # else only inference mode could add to them
                self.total = torch.zeros(G, d, d, dtype=torch.float64, device=device)
            self.patches = 0
        return self.total

    def restart_shard(self) -> None:
        """Forget what has been added since the last shard ended."""
        self.total = None

    def end_shard(self) -> None:
        """End a shard of the images: add its sums to those of the shards before it."""
        self.patches_before, self.patches = self.patches_before + self.patches, 0
        if self.shards is None:
            self.shards, self.total = self.sums(), None
        else:
            self.shards += self.sums()
            self.total.zero_()

    def all_shards(self) -> None:
        """Continue with the sums over all shards that have ended."""
        if self.shards is not None:
            self.total, self.shards = self.shards, None
            self.patches, self.patches_before = self.patches_before, 0

    def add(
        self,
        inputs: Tensor,  # (n, G·C, …) for a convolution, (…, d) for a linear layer
        wait: Wait = at_once,  # until it is this batch's turn to be added
    ) -> None:
        """Add one batch. Its products are computed before waiting, unless they are too large."""
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
        self.patches += self.view.positions(torch.empty(inputs.shape, device="meta"))

    def _put(self, products: list[tuple[tuple, Tensor]]) -> None:
        (kh, _), (G, d, _) = self.view.kernel, self.sums().shape
        blocks = self.sums().view(G, kh, d // kh, kh, d // kh)
        for place, product in products:
            blocks[place] += product

    def _products(self, inputs: Tensor) -> Iterator[tuple[tuple, Tensor]]:
        """The blocks to which one batch adds, and what it adds."""
        (kh, _), (stride, _), (dilation, _) = self.view.kernel, self.view.stride, self.view.dilation
        for F in self.view.unfolded(inputs, CHUNK_BYTES):
            height = (F.shape[1] - dilation * (kh - 1) - 1) // stride + 1
            for lag in range(kh):
                phases: dict[int, list[int]] = {}  # of the stride -> kernel rows that start at it
                for i in range(kh - lag):
                    phases.setdefault(i * dilation % stride, []).append(i)
                for kernel_rows in phases.values():
                    starts = [i * dilation for i in kernel_rows]
                    sums = window_products(F, starts, lag * dilation, stride, height)
                    for i, product in zip(kernel_rows, sums, strict=True):
                        yield (slice(None), i, slice(None), i + lag), product

    def matrix(self) -> Tensor:  # (G, d, d) float64
        """Σ x xᵀ so far; columns in the order of the layer's weights, (channel, kh, kw)."""
        return self._ordered(self.sums().clone())

    def take(self) -> Tensor:  # (G, d, d) float64
        """`matrix` without a copy; the sums start anew."""
        total, self.total = self.sums(), None
        return self._ordered(total)

    def _ordered(self, total: Tensor) -> Tensor:  # overwrites its argument
        (kh, kw), (G, d, _) = self.view.kernel, total.shape
        blocks = mirrored(total).view(G, kh, kw, -1, kh, kw, d // (kh * kw))
        return blocks.permute(0, 3, 1, 2, 6, 4, 5).reshape(G, d, d)


def mirrored(
    H: Tensor,  # (G, d, d), changed in place
) -> Tensor:  # H
    """Copy the upper triangle to the lower: products need not be symmetric to the last bit."""
    for first in range(0, H.shape[1], MIRRORED):
        columns = slice(first, first + MIRRORED)
        corner = H[:, columns, columns]
        corner.triu_()
        corner += corner.triu(1).mT
        H[:, columns, :first] = H[:, :first, columns].mT
    return H


def window_products(
    F: Tensor,  # (G, T, n·Wo, f)
    starts: list[int],  # first image row of each window; all equal modulo stride
    shift: int,  # lag between the two factors, in image rows
    stride: int,
    height: int,  # rows of each window
) -> list[Tensor]:  # for each start: (G, f, f)
    """Σ_y F[start + stride·y]ᵀ F[start + shift + stride·y] over y < height, for every start.

    The rows that all windows share are multiplied once for all, the others once each.
    """

    def product(first: int, count: int) -> Tensor:
        stop = first + stride * (count - 1) + 1
        left, right = F[:, first:stop:stride], F[:, first + shift : stop + shift : stride]
        if F.shape[3] <= NARROW:
            return (left.transpose(2, 3) @ right).sum(1)
        return left.flatten(1, 2).transpose(1, 2) @ right.flatten(1, 2)

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
        total = common.to(torch.float64, copy=True)
        for piece in before[t:] + after[:t]:
            total += piece
        sums.append(total)
    return sums
