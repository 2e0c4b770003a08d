"""Uniform quantisers whose steps are trained along with the weights, and where they start.

Esser et al., "Learned step size quantization" (ICLR 2020, arXiv 1902.08153), section 2. With codes
from l to u,

    Q(x) = Δ · round(clamp(x/Δ, l, u))

is differentiated straight through the rounding (obc/toolkit/training.py). The derivative by Δ, a
sum over the N values that share Δ, is divided by √(N u), so that steps and weights move at similar
relative speeds (section 2.2). Adam, which depends on signs more than on sizes, is insensitive to
this factor; SGD is not.

Weights: l = −2^(b−1), u = 2^(b−1) − 1. Inputs of layers: l = −z, u = 2^b − 1 − z with the zero
point z of the initial range, which is not trained; after a ReLU that is 0 … 2^b − 1. So 0 always
has a code, and both are the toolkit's grids (quant.py) with zero point −l.

**Initial steps** come from the min–max range, as in quant.py (for weights 2·max|w| over 2^b − 1
steps, for inputs from the least to the greatest value, 0 included), or minimise the squared error

    Δ* = argmin over Δ of E(Δ) = Σ (x − Δ·q)²        q = round(clamp(x/Δ, l, u))

with the zero point of the min–max range. E is piecewise quadratic with very many pieces; for given
codes q the best step is Σxq/Σq², with error Σx² − (Σxq)²/Σq². So a ladder of steps is tried, in
ratios of 0.97 from twice the step that covers all values down to a hundredth of it, each improved
to the best step for its codes; then a finer one, 0.05 % apart, around the best; and the best of all
is alternated: new codes for the step, a new step for the codes, which never makes E larger.
Compared with a search over all pieces (tests), E is within 0.1 % of the minimum at 2, 3 and 4 bits,
and within 10 % at 8 bits in short rows, which have many minima.

    symbol  variable  shape                       meaning
    x       x         (rows, d)                   values, a step for each row
    Δ       step      (rows, 1), (1, 1) or ()     step: per output channel, per layer, of inputs
    l, u    low, high ()                          lowest and highest code
    N       count                                 values that share a step; of inputs, per image

Deviation: a step that an optimiser would take below 10⁻⁸ stops there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

import quant
from modelutils import evaluating, placed
from obc.solver.layers import along_rows
from obc.toolkit.calibrate import watching
from obc.toolkit.training import StraightThrough

SMALLEST_STEP = 1e-8
RANGE_METHODS = ("MSE", "minmax")
LADDER = tuple(0.97**i for i in range(175))  # from 1 to 1/200
FINE_LADDER = tuple(1 + i / 2000 for i in range(-80, 81))
LADDER_SAMPLE = 1 << 15  # least number of values of a row that the ladders use
MAX_ALTERNATIONS = 50


class LearnedStep(nn.Module):
    """A quantiser: its step, a parameter, and its codes."""

    def __init__(self, grid: quant.Grid) -> None:
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
        return StraightThrough.apply(x, step, self.low, self.high, 0.0, share)

    def quantise_weight(self, weight: Tensor) -> Tensor:  # both (rows, …)
        """A layer's weight on the grid."""
        return self(weight, weight.numel() / self.step.numel())

    def quantise_input(self, x: Tensor) -> Tensor:  # both (images, …)
        """A layer's input on the grid."""
        return self(x, x[0].numel())

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Tensor:  # both (rows, …)
        """Whole numbers from `low` to `high`."""
        return torch.round(weight / along_rows(self.step, weight)).clamp_(self.low, self.high)

    @torch.no_grad()
    def grid(self, rows: int | None = None) -> quant.Grid:
        """The toolkit's grid: with a row for each output channel, or of one step."""
        step = self.step.detach().clone()
        if rows is not None:
            step = step.expand(rows, 1).clone()
        maxq = (self.high - self.low).round().long()
        return quant.Grid(step, torch.full_like(step, -float(self.low)), maxq)

    @torch.no_grad()
    def keep_positive(self) -> None:
        """To be called after each step of an optimiser."""
        self.step.clamp_(min=SMALLEST_STEP)


def learned_steps(model: nn.Module) -> list[LearnedStep]:
    """All quantisers of a model."""
    return [module for module in model.modules() if isinstance(module, LearnedStep)]


# -- initial ranges --------------------------------------------------------------------------------


def starting_grid(
    x: Tensor,  # (rows, d): a step for each row
    bits: int,
    symmetric: bool,  # weights; inputs are not
    method: str,  # one of RANGE_METHODS
) -> quant.Grid:
    """The grid that training starts from."""
    grid = quant.fit_grid(x, bits, symmetric, search=False)
    if method == "MSE":
        grid.scale = least_squares_step(x, -grid.zero, grid.maxq - grid.zero)
    return grid


def least_squares_step(
    x: Tensor,  # (rows, d)
    low: Tensor,  # (rows, 1)
    high: Tensor,  # (rows, 1)
) -> Tensor:  # (rows, 1)
    """The step of least squared error, per row, as in the module docstring; 1 for zeros."""
    longest = 2 * torch.maximum(
        x.amax(1, keepdim=True) / high.clamp(min=1), x.amin(1, keepdim=True) / low.clamp(max=-1)
    )
    longest = torch.where(longest > 0, longest, torch.ones_like(longest))
    sample = x[:, :: max(1, x.shape[1] // LADDER_SAMPLE)]
    best, least = longest, torch.full_like(longest, torch.inf, dtype=torch.float64)
    for ladder in (LADDER, FINE_LADDER):
        start = best
        for factor in ladder:
            step, error = improved_step(sample, start * factor, low, high)
            best, least = torch.where(error < least, step, best), torch.minimum(error, least)
    least = torch.full_like(least, torch.inf)
    for _ in range(MAX_ALTERNATIONS):
        step, error = improved_step(x, best, low, high)
        better = error < least
        if not better.any():
            break
        best, least = torch.where(better, step, best), torch.where(better, error, least)
    return best


def improved_step(
    x: Tensor, step: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:  # both (rows, 1)
    """The best step for the codes of a given step, and the squared error with those codes."""
    codes = torch.round(x / step).clamp_(low, high)
    x_codes, codes_codes, x_x = (
        (a * b).sum(1, keepdim=True, dtype=torch.float64)
        for a, b in ((x, codes), (codes, codes), (x, x))
    )
    better = x_codes / codes_codes.clamp(min=1)  # codes_codes is a whole number
    valid = (better > 0) & torch.isfinite(better)
    error = torch.where(valid, x_x - x_codes * better, torch.inf)
    return torch.where(valid, better.to(step.dtype), step), error


def weight_grid(weight: Tensor, bits: int, per_channel: bool, method: str) -> quant.Grid:
    """The initial grid of a layer's weight: of one row, or of one for each output channel."""
    rows = weight.detach().flatten(1) if per_channel else weight.detach().reshape(1, -1)
    return starting_grid(rows, bits, True, method)


def input_grids(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    bits: Mapping[str, int],  # by name of the layer
    method: str,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
) -> dict[str, quant.Grid]:
    """A grid, scale (), for the input of every layer that the images reach.

    The range covers all batches; the search uses `quant.SEARCH_SAMPLE` values, drawn with a fixed
    seed, equally many from each batch and always including the least and the greatest.
    """
    batches = list(batches)
    generator = torch.Generator().manual_seed(0)
    samples: dict[str, list[Tensor]] = {}

    def see(name: str, x: Tensor) -> None:
        x = x.detach().float().reshape(-1)
        sample, count = x, quant.SEARCH_SAMPLE // len(batches)
        if len(x) > count:
            drawn = torch.randint(len(x), (count,), generator=generator)
            sample = torch.cat([x[drawn.to(x.device)], x.amin()[None], x.amax()[None]])
        samples.setdefault(name, []).append(sample.clone())  # the model may work on x in place

    with evaluating(model), watching(layers, see):
        for images, _ in batches:
            model(placed(images, device))
    grids = {}
    for name, of_layer in samples.items():
        grid = starting_grid(torch.cat(of_layer)[None], bits[name], False, method)
        grids[name] = quant.Grid(grid.scale.reshape(()), grid.zero.reshape(()), grid.maxq)
    return grids
