"""Gradual magnitude pruning.

Zhu and Gupta, "To prune, or not to prune" (arXiv 1710.01878), equation 1. Sparsity grows from s_i
at step t_0 to s_f at step t_0 + n along a cubic, steep at first, while many weights are redundant:

    s(t) = s_f + (s_i − s_f) (1 − (t − t_0)/n)³          t_0 ≤ t ≤ t_0 + n

It is 0 before and s_f after. Every Δt steps, and at t_0 + n, the weights of smallest magnitude in
each layer are masked so that round(s(t) · weights) of them are zero. With patterns, tiles of T
weights along the input channels (for each row and kernel position) have round(s(t) T) zeros each
and, with s_f = Z/T, Z zeros in the end.

The first and the last layer are pruned no further than `limit` (at ½ they are as large in FP16 as
the 8 bits that a quantised network has there).

Deviations. A masked weight is set to zero after every step of the optimiser, so it never returns,
whatever momentum and weight decay would do; in Zhu and Gupta it keeps its value, which only weight
decay changes. Layers whose number of input channels is not a multiple of T are left dense and
logged.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modelutils import find_layers
from obc.solver.errors import log

MASK = "pruning_mask"  # a buffer of each pruned layer, bool, the weight's shape; False: zero


@dataclass(frozen=True)
class CubicSchedule:
    """Sparsity as a function of the number of steps, as in the module docstring."""

    initial: float  # s_i
    final: float  # s_f
    first_step: int  # t_0
    last_step: int  # t_0 + n

    def sparsity(self, step: int) -> float:
        """
        >>> schedule = CubicSchedule(0.0, 0.8, 10, 20)
        >>> [round(schedule.sparsity(step), 4) for step in (0, 10, 15, 20, 99)]
        [0.0, 0.0, 0.7, 0.8, 0.8]
        """
        if step < self.first_step:
            return 0.0
        remaining = 1 - min(1.0, (step - self.first_step) / (self.last_step - self.first_step))
        return self.final + (self.initial - self.final) * remaining**3


def magnitude_mask(
    weight: Tensor,  # (rows, channels, …)
    sparsity: float,
) -> Tensor:  # bool, like weight
    """Exactly round(sparsity · weights) are False: the smallest, and the first of equal ones."""
    order = weight.abs().flatten().argsort(stable=True)
    mask = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
    mask[order[: round(sparsity * weight.numel())]] = False
    return mask.view(weight.shape)


def tile_mask(
    weight: Tensor,  # (rows, channels, …), channels a multiple of `tile`
    tile: int,
    zeros: int,
) -> Tensor:  # bool, like weight
    """In each tile of weights along the input channels, exactly `zeros` are False, the smallest."""
    inner = weight.abs().movedim(1, -1)  # (rows, …, channels)
    order = inner.reshape(-1, tile).argsort(dim=1, stable=True)
    mask = torch.ones_like(order, dtype=torch.bool).scatter_(1, order[:, :zeros], False)
    return mask.view(inner.shape).movedim(-1, 1)


@dataclass(frozen=True)
class GradualPruning:
    """How to prune a whole model."""

    schedule: CubicSchedule
    every: int  # Δt, steps
    limit: float  # on the sparsity of the first and the last layer
    ends: Collection[str]  # the first and the last layer
    tile: int | None = None  # T; None: no pattern

    def start(self, model: nn.Module) -> None:
        """Give each layer that is to be pruned a mask, and log the others."""
        for name, layer in find_layers(model).items():
            channels = layer.weight.shape[1]
            if self.tile and channels % self.tile:
                text = "%s left dense: %d input channels are not a multiple of --tile-size %d"
                log.info(text, name, channels, self.tile)
            else:
                layer.register_buffer(MASK, torch.ones_like(layer.weight, dtype=torch.bool))
        self.update(model, 0)

    def is_due(self, step: int) -> bool:
        """Whether masks change when `step` steps have been done."""
        first, last = self.schedule.first_step, self.schedule.last_step
        return step == last or (first <= step < last and (step - first) % self.every == 0)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """After `step` steps: reset masked weights to zero, and make new masks if they are due."""
        due = self.is_due(step)
        for name, layer in masked_layers(model).items():
            mask, weight = getattr(layer, MASK), layer.weight
            weight.masked_fill_(~mask, 0)  # moved by momentum; before looking for the smallest
            if not due:
                continue
            sparsity = self.schedule.sparsity(step)
            sparsity = min(sparsity, self.limit) if name in self.ends else sparsity
            if self.tile:
                mask.copy_(tile_mask(weight, self.tile, round(sparsity * self.tile)))
            else:
                mask.copy_(magnitude_mask(weight, sparsity))
            weight.masked_fill_(~mask, 0)


def masked_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that have a mask, by name."""
    return {name: layer for name, layer in find_layers(model).items() if hasattr(layer, MASK)}
