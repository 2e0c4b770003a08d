"""The weights to aim at when a layer's inputs are no longer those of the dense network.

Layers are compressed in order of execution. A layer then sees x̂, the input that the network gives
it whose earlier layers are compressed, and should still return y, the dense network's output. The
squared error over N images,

    (1/N) Σ ‖y − Ŵ x̂‖² = C/2 − Σ Ŵ∘B + Σ (Ŵ H)∘Ŵ / 2

    H = (2/N) Σ x̂ x̂ᵀ        B = (2/N) Σ y x̂ᵀ        C = (2/N) Σ ‖y‖²

is a constant and (W' − Ŵ) H (W' − Ŵ)ᵀ / 2 for the least-squares solution W' = B H⁻¹. So any solver
that compresses W' by H minimises it. W' is kept near the weights W by a ridge λ:

    W' = W + (B − W H) (H + λ mean(diag H) I)⁻¹        λ = 3 d / n

The fewer patches n there are for the d columns, the more of the shift would be these patches'
noise: λ is from 3·10⁻⁴ in the first layers of ResNet-20 to 8 in a classifier that sees 500 images.
The factor is empirical, one of 1, 3 and 10 (docs/results.md).

Zeros of W stay zero: the shift of a row is solved on its support S only, with H_SS.

    symbol  shape              meaning
    W       (rows, d)          the layer's weights, without the bias
    H       (G, d, d)          of each group of a convolution, float64
    B       (G, rows/G, d)     of the rows of a group with that group's inputs, float64
    λ       ridge

For a convolution B is its weight gradient at x̂ for the output gradient y. Write a patch as kh rows
of kw·C numbers, as `hessian.py` does: kernel row i of B is Σ_v Y[v]ᵀ F[s·v + δi] over output rows
v, with F the image unfolded along its width only. Products are taken in the precision of the inputs
(at least float32) over a few images at a time and accumulated in float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from obc.solver.errors import SingularHessian
from obc.solver.hessian import CHUNK_BYTES
from obc.solver.layers import view
from obc.solver.threads import Wait, at_once

RIDGE = 3  # × columns / patches


class Cross:
    """Σ y x̂ᵀ and Σ ‖y‖² over a layer's inputs x̂ and the outputs y that it should return."""

    def __init__(self, layer: nn.Module) -> None:
        self.view = view(layer)
        G, d, device = self.view.groups, self.view.columns, layer.weight.device
        kh = self.view.kernel[0]
        shape = (G, self.view.rows // G, kh, d // kh)  # columns in the order (kh, kw, channel)
        self.total = torch.zeros(shape, dtype=torch.float64, device=device)
        self.energy = torch.zeros((), dtype=torch.float64, device=device)

    def add(
        self,
        inputs: Tensor,  # as the layer takes them
        outputs: Tensor,  # as it returns them, without its bias
        wait: Wait = at_once,  # until it is this batch's turn to be added
    ) -> None:
        """Add one batch."""
        if inputs.dtype in (torch.float16, torch.bfloat16):
            inputs, outputs = inputs.float(), outputs.float()
        sums = torch.zeros_like(self.total)
        energy = torch.linalg.vector_norm(outputs, dtype=torch.float64).square()
        for kernel_row, product in self._products(inputs, outputs):
            sums[:, :, kernel_row] += product
        wait()
        self.total += sums
        self.energy += energy

    def _products(self, inputs: Tensor, outputs: Tensor) -> Iterator[tuple[int, Tensor]]:
        (kh, _), (stride, _), (dilation, _) = self.view.kernel, self.view.stride, self.view.dilation
        height, width = self.view.output_size(self.view.image(inputs))
        images = self.view.output_images(outputs, height, width)
        first = 0
        for F in self.view.unfolded(inputs, CHUNK_BYTES):  # (G, T, n·Wo, kw·C)
            count = F.shape[2] // width
            piece = images[first : first + count].unflatten(1, (self.view.groups, -1))
            Y = piece.permute(1, 3, 0, 4, 2).flatten(1, 3)  # (G, Ho·n·Wo, rows/G)
            first += count
            for i in range(kh):
                start = i * dilation
                rows = F[:, start : start + stride * (height - 1) + 1 : stride]
                yield i, Y.mT @ rows.flatten(1, 2)

    def take(self) -> Tensor:  # (G, rows/G, d) float64
        """Σ y x̂ᵀ, with columns in the order (channel, kh, kw) of the layer's weights."""
        kw = self.view.kernel[1]
        ordered = self.total.unflatten(3, (kw, -1)).permute(0, 1, 4, 2, 3)
        return ordered.reshape(*self.total.shape[:2], -1)


def ridge_of(columns: int, patches: int) -> float:
    """λ of the module docstring."""
    return RIDGE * columns / patches


def shifted_weights(
    W: Tensor,  # (rows, d)
    H: Tensor,  # (G, d, d) float64
    B: Tensor,  # (G, rows/G, d) float64
    ridge: float,  # × mean(diag H)
) -> Tensor:  # (rows, d) float64
    """W' of the module docstring. Raises SingularHessian where H is not finite."""
    shifted = W.double().unflatten(0, (len(H), -1)).clone()  # (G, rows/G, d)
    for w, h, b in zip(shifted, H, B, strict=True):
        gradient = b - w @ h
        damping = ridge * float(h.diagonal().mean()) or 1.0  # all inputs zero: so is the gradient
        supports, support_of = torch.unique(w != 0, dim=0, return_inverse=True)
        for number, support in enumerate(supports):
            rows, columns = (support_of == number).nonzero()[:, 0], support.nonzero()[:, 0]
            system = h[columns[:, None], columns]
            system.diagonal().add_(damping)
            failed = torch.zeros((), dtype=torch.int32, device=system.device)
            torch.linalg.cholesky_ex(system.mT, out=(system.mT, failed))  # in place, symmetric
            if failed:
                raise SingularHessian("its inputs are too large or not finite")
            change = torch.cholesky_solve(gradient[rows[:, None], columns].mT, system.mT).mT
            w[rows[:, None], columns] += change
    return shifted.flatten(0, 1)


def output_error(
    W: Tensor,  # (rows, d)
    H: Tensor,  # (G, d, d) float64
    B: Tensor,  # (G, rows/G, d) float64
    C: float,
) -> float:
    """Mean over images of ‖y − W x̂‖²."""
    w = W.double().unflatten(0, (len(H), -1))
    return max(0.0, C / 2 - float((w * B).sum()) + float(((w @ H) * w).sum()) / 2)
