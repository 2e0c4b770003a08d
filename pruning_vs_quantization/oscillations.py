"""Weights that jump to and fro between two codes: dampened, or frozen.

Nagel et al., "Overcoming oscillations in quantization-aware training" (ICML 2022, arXiv
2203.11086). A latent weight near the border of two codes is driven over it again and again by the
straight-through gradient, which never lets it rest.

*Dampening* (section 4.1): λ Σ (ŵ − clamp(w, Δ l, Δ u))² over all quantised weights is added to the
loss. ŵ = Q(w) and Δ are held constant in it, so latent weights are pulled to their grid values.

*Freezing* (section 4.2). Of each weight's code c at step t,

    o = [c changed, in the direction opposite to its last change]
    f ← m o + (1 − m) f             frequency of oscillation, an exponential moving average
    c̄ ← m c + (1 − m) c̄             mean code

and where f exceeds the threshold, the weight is frozen for good at round(c̄): its latent is put to
Δ round(c̄) after every step from then on, Δ still being trained.

λ and the threshold go from their first to their final value along half a cosine (schedules.py).

    symbol      variable                   shape              dtype
    c           codes                      the weight's       int32
                direction of last change   the weight's       int8: −1, 0 (none yet), 1
    f, c̄        frequency, mean_code       the weight's       float32
                frozen, frozen_codes       the weight's       bool, int32
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modelutils import find_layers
from obc.solver.layers import along_rows
from pruning_vs_quantization.compressed_model import WEIGHT_STEP

TRACKER = "oscillation"


def dampening(model: nn.Module) -> Tensor:  # ()
    """Σ (ŵ − clamp(w, Δ l, Δ u))², with gradients for latent weights alone."""
    terms = []
    for layer in find_layers(model).values():
        quantiser = getattr(layer, WEIGHT_STEP)
        with torch.no_grad():
            rounded = quantiser.of_weight(layer.weight)
            step = along_rows(quantiser.step, layer.weight)
            low, high = step * quantiser.low, step * quantiser.high
        clamped = torch.minimum(torch.maximum(layer.weight, low), high)
        terms.append((rounded - clamped).square().sum())
    return torch.stack(terms).sum()


class Tracker(nn.Module):
    """What is known of the oscillations of one layer's codes."""

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes.to(torch.int32))
        self.register_buffer("direction", torch.zeros_like(codes, dtype=torch.int8))
        self.register_buffer("frequency", torch.zeros_like(codes, dtype=torch.float32))
        self.register_buffer("mean_code", codes.to(torch.float32))
        self.register_buffer("frozen", torch.zeros_like(codes, dtype=torch.bool))
        self.register_buffer("frozen_codes", torch.zeros_like(codes, dtype=torch.int32))

    @torch.no_grad()
    def note(self, codes: Tensor, momentum: float, threshold: float) -> None:
        """Take in the codes after a step, and freeze what oscillates too often."""
        change = torch.sign(codes.to(torch.int32) - self.codes).to(torch.int8)
        oscillates = (change * self.direction == -1).to(torch.float32)
        self.frequency.lerp_(oscillates, momentum)
        self.mean_code.lerp_(codes.to(torch.float32), momentum)
        self.direction.copy_(torch.where(change != 0, change, self.direction))
        self.codes.copy_(codes)
        newly = (self.frequency > threshold) & ~self.frozen
        self.frozen_codes[newly] = torch.round(self.mean_code[newly]).to(torch.int32)
        self.frozen |= newly


def start_tracking(model: nn.Module) -> None:
    """Give each layer a tracker."""
    for layer in find_layers(model).values():
        layer.add_module(TRACKER, Tracker(getattr(layer, WEIGHT_STEP).codes(layer.weight)))


@torch.no_grad()
def freeze(model: nn.Module, momentum: float, threshold: float) -> None:
    """After a step of the optimiser: track all codes, put frozen weights where they belong."""
    for layer in find_layers(model).values():
        quantiser, tracker = getattr(layer, WEIGHT_STEP), getattr(layer, TRACKER)
        tracker.note(quantiser.codes(layer.weight), momentum, threshold)
        step = along_rows(quantiser.step, layer.weight)
        held = step * tracker.frozen_codes
        layer.weight.copy_(torch.where(tracker.frozen, held, layer.weight))


def frozen_share(model: nn.Module) -> float:
    """Share of the weights of all layers that are frozen."""
    frozen = [getattr(layer, TRACKER).frozen for layer in find_layers(model).values()]
    return sum(int(part.sum()) for part in frozen) / sum(map(Tensor.numel, frozen))
