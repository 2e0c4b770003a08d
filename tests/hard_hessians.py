"""Layers and calibration inputs whose Hessian is hard to invert, and what a method has to satisfy.

The squared output error is measured without any Hessian: in float64, from the inputs themselves,

    E(ŵ) = Σ_images ‖layer(x; w − ŵ)‖² / N

so that neither float32 sums nor damping can hide in it. The rivals are what anybody would do
without a Hessian: round to nearest on the same grid; prune the smallest weights (groups, blocks,
columns) as many as the method did, and leave the others as they are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(8, 6, 3, padding=1),
    "valid": lambda: nn.Conv2d(8, 6, 3),  # no padding: constant images have rank 1
    "grouped": lambda: nn.Conv2d(16, 8, 3, stride=2, padding=1, groups=2),
    "depthwise": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8),
    "linear": lambda: nn.Linear(48, 6),
}
SIZE = 6  # pixels


def smooth(n: int, channels: int, side: int) -> Tensor:  # (n, channels, side, side) float64
    """Images like those inside networks: correlated neighbours and channels, half of them 0."""
    noise = torch.randn(n, channels, side + 2, side + 2, dtype=torch.float64)
    x = functional.avg_pool2d(noise, 3, 1) * 3 + noise[:, :, 1:-1, 1:-1] / 2
    return (x + x.mean(1, keepdim=True)).relu()


def spectrum(x: Tensor, values: Tensor) -> Tensor:
    """Mix the channels so that the eigenvalues of their second moment are `values` squared."""
    channels = x.shape[1]
    flat = torch.linalg.qr(x.transpose(0, 1).reshape(channels, -1).T)[0]  # (positions, channels)
    turn = torch.linalg.qr(torch.randn(channels, channels, dtype=x.dtype))[0]
    mixed = (flat * values) @ turn * len(flat) ** 0.5
    return mixed.T.reshape(channels, len(x), *x.shape[2:]).transpose(0, 1).contiguous()


def one_direction(x: Tensor) -> Tensor:
    """Every patch is a multiple of one patch (of a few, where there is padding)."""
    pattern = torch.randn(x.shape[1], dtype=x.dtype)
    return torch.randn(len(x), 1, 1, 1, dtype=x.dtype) * pattern[:, None, None].expand(x.shape[1:])


def half_the_rank(x: Tensor) -> Tensor:
    half = x.shape[1] // 2
    mix = torch.randn(x.shape[1], half, dtype=x.dtype)
    return torch.einsum("ck,nkhw->nchw", mix, x[:, :half])


def changed(channel: int, value: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, channel] = value(x)
        return x

    return change


def dead_and_duplicated(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 1], x[:, 3], x[:, 4] = x[:, 0], -2 * x[:, 0], 0
    return x


INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "well conditioned": lambda x: x,
    "rank 1": one_direction,
    "rank d/2": half_the_rank,
    "duplicated columns": changed(1, lambda x: x[:, 0]),
    "nearly duplicated columns": changed(1, lambda x: x[:, 0] * (1 + 1e-5 * torch.randn(()))),
    "dead columns": changed(2, lambda x: 0 * x[:, 0]),
    "dead and duplicated columns": dead_and_duplicated,
    "condition number 1e8": lambda x: spectrum(x, torch.logspace(0, -4, x.shape[1]).double()),
    "condition number 1e12": lambda x: spectrum(x, torch.logspace(0, -6, x.shape[1]).double()),
    "a channel of 1e4": changed(0, lambda x: 1e4 * x[:, 0]),
    "a channel of 1e6": changed(0, lambda x: 1e6 * x[:, 0]),
    "a channel of 1e-8": changed(0, lambda x: 1e-8 * x[:, 0]),
    "two images": lambda x: x[:2],
    "a single image": lambda x: x[:1],
    "constant images": lambda x: torch.full_like(x, 0.7),
    "float16": lambda x: x.half(),
    "all zero": torch.zeros_like,
}


def hard_case(layer_name: str, inputs_name: str) -> tuple[nn.Module, Tensor]:
    """A float32 layer and its inputs, float32 (float16 where the name says so)."""
    torch.manual_seed(sum(map(ord, layer_name + inputs_name)))
    layer = LAYERS[layer_name]()
    linear = isinstance(layer, nn.Linear)
    channels = layer.in_features if linear else layer.in_channels
    x = INPUTS[inputs_name](smooth(64 if linear else 24, channels, 1 if linear else SIZE))
    x = x if x.dtype == torch.float16 else x.float()
    return layer, x.flatten(1) if linear else x


def true_error(layer: nn.Module, x: Tensor, weight: Tensor, reference: Tensor) -> float:
    """E in float64, from the inputs; see the module docstring."""
    delta, x = (weight - reference.to(weight.dtype)).double(), x.double()
    if isinstance(layer, nn.Linear):
        out = functional.linear(x, delta)
    else:
        out = functional.conv2d(
            x, delta, None, layer.stride, layer.padding, layer.dilation, layer.groups
        )
    return float(out.square().sum()) / len(x)


def resolution(layer: nn.Module, x: Tensor, reference: Tensor) -> float:
    """The error that rounding the weights to float32 can cause; comparisons end there."""
    eps = torch.finfo(torch.float32).eps
    worst = true_error(layer, x.abs(), reference.abs(), torch.zeros_like(reference))
    return 64 * eps**2 * worst


# -- the rivals ------------------------------------------------------------------------------------


def units(weight: Tensor, size: int) -> Tensor:  # (rows·d/size, size)
    """Groups of `size` weights along the input channels, in an order that is always the same."""
    innermost = weight.movedim(1, -1) if weight.ndim == 4 else weight
    return innermost.reshape(-1, size)


def from_units(parts: Tensor, weight: Tensor) -> Tensor:
    if weight.ndim == 2:
        return parts.reshape(weight.shape)
    rows, channels, kh, kw = weight.shape
    return parts.reshape(rows, kh, kw, channels).movedim(-1, 1)


def magnitude_nm(weight: Tensor, n: int, m: int) -> Tensor:
    """Without the n smallest of every m weights along the input channels."""
    parts = units(weight, m).clone()
    parts.scatter_(1, parts.abs().argsort(dim=1, stable=True)[:, :n], 0)
    return from_units(parts, weight)


def magnitude_blocks(weight: Tensor, count: int, size: int) -> Tensor:
    """Without the `count` blocks of least norm; with size 1, weights."""
    parts = units(weight, size).clone()
    parts[parts.norm(dim=1).argsort(dim=0, stable=True)[:count]] = 0
    return from_units(parts, weight)


def grouped(weight: Tensor, groups: int) -> Tensor:  # (G, rows, channels, kh·kw)
    return weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)


def magnitude_channels(weight: Tensor, groups: int, counts: list[int]) -> Tensor:
    """Without the `counts` input channels of least norm of each group."""
    parts = grouped(weight, groups).clone()
    norms = parts.square().sum((1, 3))
    for part, norm, count in zip(parts, norms, counts, strict=True):
        part[:, norm.argsort(dim=0, stable=True)[:count]] = 0
    return parts.reshape(weight.shape)
