"""Where a learned step starts: min–max ranges, or ranges of least squared error.

For values x with codes l … u (learned_steps.py), the step of least squared error is

    Δ* = argmin over Δ of E(Δ) = Σ (x − Δ·q)²        q = round(clamp(x/Δ, l, u))

E is piecewise quadratic with very many pieces. For given codes q the best step is Σxq/Σq², with the
error Σx² − (Σxq)²/Σq². So a ladder of steps is tried, in ratios of 0.97 from twice the step that
reaches all values down to a hundredth of it, each improved to the best step for its codes; then a
finer one, 0.05 % apart, around the best; and the best of all in turns: new codes for the step, a
new step for the codes. No turn can make E larger. Of long rows the ladders look at 2^15 to 2^16
values, evenly spaced; the turns look at all. Against a search over all pieces (tests) E is the
least to 0.1 % at 2, 3 and 4 bits, and to 10 % at 8 bits in short rows, where minima are many.

The min–max range is quant.py's: for weights 2·max|w| over 2^b − 1 steps, for inputs from the least
to the greatest value, 0 included; its zero point is kept by the search.

    symbol  variable  shape
    x       x         (rows, d)     a step for each row
    Δ       step      (rows, 1)
    l, u    low, high (rows, 1)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

import quant
from modelutils import evaluating
from obc.toolkit.calibrate import watching
from obc.toolkit.corrections import placed

METHODS = ("MSE", "minmax")
LADDER = tuple(0.97**i for i in range(175))  # from 1 to 1/200
FINE_LADDER = tuple(1 + i / 2000 for i in range(-80, 81))
LADDER_SAMPLE = 1 << 15  # values of a row that the ladders look at, at least
MAX_TURNS = 50


def starting_grid(
    x: Tensor,  # (rows, d): a step for each row
    bits: int,
    symmetric: bool,  # weights; inputs are not
    method: str,  # of METHODS
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
            step, error = improved(sample, start * factor, low, high)
            best, least = torch.where(error < least, step, best), torch.minimum(error, least)
    least = torch.full_like(least, torch.inf)
    for _ in range(MAX_TURNS):
        step, error = improved(x, best, low, high)
        better = error < least
        if not better.any():
            break
        best, least = torch.where(better, step, best), torch.where(better, error, least)
    return best


def improved(
    x: Tensor, step: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:  # both (rows, 1)
    """The best step for the codes that a step gives, and the squared error with those codes."""
    codes = torch.round(x / step).clamp_(low, high)
    x_codes, codes_codes, x_x = (
        (a * b).sum(1, keepdim=True, dtype=torch.float64)
        for a, b in ((x, codes), (codes, codes), (x, x))
    )
    better = x_codes / codes_codes.clamp(min=1)  # codes_codes is a whole number
    found = (better > 0) & torch.isfinite(better)
    error = torch.where(found, x_x - x_codes * better, torch.inf)
    return torch.where(found, better.to(step.dtype), step), error


def weight_grid(weight: Tensor, bits: int, per_channel: bool, method: str) -> quant.Grid:
    """The starting grid of a layer's weight: of a row, or of one for each output channel."""
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
    """A grid, scale (), for the input of every layer that sees the images.

    The range is that of all batches; the search looks at `quant.SEARCH_SAMPLE` values, drawn with a
    fixed seed, as many from each batch and always with the least and the greatest.
    """
    batches = list(batches)
    generator = torch.Generator().manual_seed(0)
    seen: dict[str, list[Tensor]] = {}

    def note(name: str, x: Tensor) -> None:
        x = x.detach().float().reshape(-1)
        sample, wanted = x, quant.SEARCH_SAMPLE // len(batches)
        if len(x) > wanted:
            drawn = torch.randint(len(x), (wanted,), generator=generator)
            sample = torch.cat([x[drawn.to(x.device)], x.amin()[None], x.amax()[None]])
        seen.setdefault(name, []).append(sample)

    with evaluating(model), watching(layers, note):
        for images, _ in batches:
            model(placed(images, device))
    grids = {}
    for name, samples in seen.items():
        grid = starting_grid(torch.cat(samples)[None], bits[name], False, method)
        grids[name] = quant.Grid(grid.scale.reshape(()), grid.zero.reshape(()), grid.maxq)
    return grids
