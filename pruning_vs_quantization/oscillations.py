"""Weights that oscillate between two codes: dampening them, or freezing them.

Nagel et al., "Overcoming oscillations in quantization-aware training" (ICML 2022, arXiv
2203.11086). The straight-through gradient pushes a latent weight near the border between two codes
across it again and again, so that it never settles.

*Dampening* (section 4.1): λ Σ (ŵ − clamp(w, Δ l, Δ u))² over all quantised weights is added to the
loss. ŵ = Q(w) and Δ are held constant in it, so latent weights are pulled to their grid values.

*Freezing* (section 4.2). For each weight's code c at step t,

    o = [c changed, in the direction opposite to its last change]
    f ← m o + (1 − m) f             frequency of oscillation, an exponential moving average
    c̄ ← m c + (1 − m) c̄             mean code

and once f exceeds the threshold, the weight is frozen permanently at round(c̄): from then on its
latent is set to Δ round(c̄) after every step, while Δ is still trained.

λ and the threshold go from their initial to their final value along half a cosine (`annealed`).

    symbol      variable                   shape              dtype
    c           codes                      the weight's       int32
                direction of last change   the weight's       int8: −1, 0 (none yet), 1
    f, c̄        frequency, mean_code       the weight's       float32
                frozen, frozen_codes       the weight's       bool, int32
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from modelutils import find_layers
from obc.solver.layers import along_rows
from pruning_vs_quantization.compressed_model import WEIGHT_STEP

TRACKER = "oscillation"


def annealed(start: float, end: float, done: float) -> float:
    """From `start` to `end` along half a cosine; `done` in [0, 1].

    >>> [round(annealed(4.0, 0.0, done), 3) for done in (0, 0.5, 1)]
    [4.0, 2.0, 0.0]
    """
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


def dampening(model: nn.Module) -> Tensor:  # ()
    """Σ (ŵ − clamp(w, Δ l, Δ u))², with gradients for latent weights only."""
    terms = []
    for layer in find_layers(model).values():
        quantiser = getattr(layer, WEIGHT_STEP)
        with torch.no_grad():
            rounded = quantiser.quantise_weight(layer.weight)
            step = along_rows(quantiser.step, layer.weight)
            low, high = step * quantiser.low, step * quantiser.high
        clamped = torch.minimum(torch.maximum(layer.weight, low), high)
        terms.append((rounded - clamped).square().sum())
    return torch.stack(terms).sum()


class OscillationTracker(nn.Module):
    """The history of one layer's codes."""

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes.to(torch.int32))
        self.register_buffer("direction", torch.zeros_like(codes, dtype=torch.int8))
        self.register_buffer("frequency", torch.zeros_like(codes, dtype=torch.float32))
        self.register_buffer("mean_code", codes.to(torch.float32))
        self.register_buffer("frozen", torch.zeros_like(codes, dtype=torch.bool))
        self.register_buffer("frozen_codes", torch.zeros_like(codes, dtype=torch.int32))

    @torch.no_grad()
    def update(self, codes: Tensor, momentum: float, threshold: float) -> None:
        """Enter the codes after a step, and freeze weights that oscillate too often."""
        change = torch.sign(codes.to(torch.int32) - self.codes).to(torch.int8)
        oscillates = (change * self.direction == -1).to(torch.float32)
        self.frequency.lerp_(oscillates, momentum)
        self.mean_code.lerp_(codes.to(torch.float32), momentum)
        self.direction.copy_(torch.where(change != 0, change, self.direction))
        self.codes.copy_(codes)
        now_frozen = (self.frequency > threshold) & ~self.frozen
        self.frozen_codes[now_frozen] = torch.round(self.mean_code[now_frozen]).to(torch.int32)
        self.frozen |= now_frozen


def start_tracking(model: nn.Module) -> None:
    """Give each layer a tracker."""
    for layer in find_layers(model).values():
        codes = getattr(layer, WEIGHT_STEP).codes(layer.weight)
        layer.add_module(TRACKER, OscillationTracker(codes))


@torch.no_grad()
def freeze(model: nn.Module, momentum: float, threshold: float) -> None:
    """After a step of the optimiser: track all codes and reset frozen weights."""
    for layer in find_layers(model).values():
        quantiser, tracker = getattr(layer, WEIGHT_STEP), getattr(layer, TRACKER)
        tracker.update(quantiser.codes(layer.weight), momentum, threshold)
        frozen_weights = along_rows(quantiser.step, layer.weight) * tracker.frozen_codes
        layer.weight.copy_(torch.where(tracker.frozen, frozen_weights, layer.weight))


def frozen_share(model: nn.Module) -> float:
    """Share of the weights of all layers that are frozen."""
    frozen = [getattr(layer, TRACKER).frozen for layer in find_layers(model).values()]
    return sum(int(of_layer.sum()) for of_layer in frozen) / sum(map(Tensor.numel, frozen))
