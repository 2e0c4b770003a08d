"""Uniform quantisers whose step is trained along with the weights.

Esser et al., "Learned step size quantization" (ICLR 2020, arXiv 1902.08153), section 2. With the
codes from l to u,

    Q(x) = Δ · round(clamp(x/Δ, l, u))                ∂Q/∂x        ∂Q/∂Δ
    x/Δ below l                                       0            l
    x/Δ inside [l, u]                                 1            round(x/Δ) − x/Δ
    x/Δ above u                                       0            u

These are the exact derivatives of Δ · (clamp(x/Δ, l, u) + r), the rounding error r held constant:
rounding is passed "straight through". The derivative by Δ, a sum over the N values that share Δ, is
divided by √(N u), so that steps and weights move at similar relative speeds (section 2.2). Adam,
which looks at signs more than at sizes, does not feel this factor; SGD does.

Weights: l = −2^(b−1), u = 2^(b−1) − 1. Inputs of layers: l = −z, u = 2^b − 1 − z with the zero
point z of the range that was found at the start, which stays; after a ReLU that is 0 … 2^b − 1. So
0 has a code always, and both are the toolkit's grids (quant.py) with zero point −l.

    symbol  variable  shape                       meaning
    Δ       step      (rows, 1), (1, 1) or ()     step: per output channel, per layer, of inputs
    l, u    low, high ()                          lowest and highest code
    N       count                                 values that share a step; of inputs, per image

Deviation: a step that a stride of the optimiser would take below 10⁻⁸ stops there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from obc.solver.layers import along_rows
from quant import Grid

SMALLEST_STEP = 1e-8


class _Round(torch.autograd.Function):
    """Q(x) with the derivatives of the module docstring."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        step: Tensor,
        low: Tensor,
        high: Tensor,
        share: Tensor,  # () that ∂Q/∂Δ is multiplied by
    ) -> Tensor:
        codes = torch.round(x / step).clamp_(low, high)
        ctx.save_for_backward(x, step, low, high, share)
        return codes.mul_(step)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, step, low, high, share = ctx.saved_tensors
        ratio = x / step
        clamped = ratio.clamp(low, high)
        inside = clamped == ratio
        by_step = clamped.round()
        by_step -= clamped * inside
        by_step = (by_step * gradient).sum_to_size(step.shape) * share
        return gradient * inside, by_step, None, None, None


class LearnedStep(nn.Module):
    """A quantiser: its step, a parameter, and its codes."""

    def __init__(self, grid: Grid) -> None:
        """Starts from a grid whose rows all have the same zero point."""
        super().__init__()
        zero = grid.zero.flatten()[0]
        self.step = nn.Parameter(grid.scale.detach().clone())
        self.register_buffer("low", -zero.clone())
        self.register_buffer("high", grid.maxq.to(zero.dtype) - zero)

    def forward(
        self,
        x: Tensor,  # (rows, …), or any shape if there is one step
        count: float,  # values that share a step
    ) -> Tensor:  # like x, on the grid
        step = along_rows(self.step, x) if self.step.ndim else self.step
        share = (count * self.high.clamp(min=1)).rsqrt()
        return _Round.apply(x, step, self.low, self.high, share)

    def of_weight(self, weight: Tensor) -> Tensor:  # both (rows, …)
        """A layer's weight on the grid."""
        return self(weight, weight.numel() / self.step.numel())

    def of_input(self, x: Tensor) -> Tensor:  # both (images, …)
        """A layer's input on the grid."""
        return self(x, x[0].numel())

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Tensor:  # both (rows, …)
        """Whole numbers from `low` to `high`."""
        step = along_rows(self.step, weight)
        return torch.round(weight / step).clamp_(self.low, self.high)

    @torch.no_grad()
    def grid(self, rows: int | None = None) -> Grid:
        """The toolkit's grid: with a row for each output channel, or of one step."""
        step = self.step.detach().clone()
        if rows is not None:
            step = step.expand(rows, 1).clone()
        maxq = (self.high - self.low).round().long()
        return Grid(step, torch.full_like(step, -float(self.low)), maxq)

    @torch.no_grad()
    def keep_positive(self) -> None:
        """To be called after each stride of an optimiser."""
        self.step.clamp_(min=SMALLEST_STEP)


def learned_steps(model: nn.Module) -> list[LearnedStep]:
    """All quantisers of a model."""
    return [module for module in model.modules() if isinstance(module, LearnedStep)]
