"""Convolutions that yield small maps, as matrix products, on a CPU.

Where an output map has few pixels the direct kernels of oneDNN run at a quarter to a half of the
speed of a matrix product (512 channels, 3×3, at 2×2 pixels: 60 instead of 200 Gflop/s on 2 cores),
while the columns that a product needs are few. The same sums in another order.

    y (N·pixels, O)  =  columns (N·pixels, C·kh·kw) · Wᵀ  +  b
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.hessian import output_size, padded

PIXELS = 16  # of the input map per pixel of a stride, at most: about those of the output map
COLUMNS = 512  # C·kh·kw, at least: narrower convolutions lose more by copying than they gain


def is_small(module: nn.Module, x: object) -> bool:
    """Whether a call of this module is better done as a product."""
    if type(module) is not nn.Conv2d or not isinstance(x, Tensor) or x.dim() != 4:
        return False
    if has_hooks(module):
        return False
    weight, (sy, sx) = module.weight, module.stride
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and module.groups == 1
        and weight[0, 0].numel() > 1
        and weight[0].numel() >= COLUMNS
        and 0 < x.shape[2] * x.shape[3] <= PIXELS * sy * sx
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether a call does more than the convolution: grids round a layer's inputs by a hook."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


def windows(conv: nn.Conv2d, x: Tensor) -> Tensor:  # (N, oh, ow, kh, kw, C), a view
    """What each output pixel sees."""
    x = padded(conv, x)
    height, width = output_size(conv, x)
    x = x.permute(0, 2, 3, 1)
    image, row, pixel, channel = x.stride()
    (dy, dx), (sy, sx) = conv.dilation, conv.stride
    size = (len(x), height, width, *conv.kernel_size, x.shape[3])
    return x.as_strided(size, (image, row * sy, pixel * sx, row * dy, pixel * dx, channel))


def product(seen: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:  # (N, O, oh, ow)
    """seen (N, oh, ow, …) · matrix (…, O) + b as a map, channels last."""
    columns = seen.reshape(-1, len(matrix))
    y = columns @ matrix if bias is None else torch.addmm(bias, columns, matrix)
    return y.view(*seen.shape[:3], -1).permute(0, 3, 1, 2)


class SmallMaps(nn.Module):
    """A convolution whose weights do not change any more, as a product where its maps are small."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.matrix: Tensor | None = None  # (kh·kw·C, O)
        self.whole: dict[tuple[int, ...], tuple[Tensor, tuple[int, int]]] = {}

    def forward(self, x: Tensor) -> Tensor:  # (N, C, h, w) -> (N, O, oh, ow)
        if not is_small(self.conv, x):
            return self.conv(x)
        if x.shape[2] * x.shape[3] < self.conv.weight[0, 0].numel():
            return self.of_whole_maps(x)
        if self.matrix is None:
            self.matrix = self.conv.weight.detach().permute(2, 3, 1, 0).flatten(0, 2).contiguous()
        return product(windows(self.conv, x), self.matrix, self.conv.bias)

    def of_whole_maps(self, x: Tensor) -> Tensor:
        """Where a kernel sees more padding than map: one matrix from the whole map to the next.

        Its rows are what the convolution makes of a map that is 1 at one pixel of one channel.
        """
        C, h, w = x.shape[1:]
        if (h, w) not in self.whole:
            ones = torch.eye(C * h * w).view(-1, h, w, C).permute(0, 3, 1, 2)
            y = F.conv2d(padded(self.conv, ones), self.conv.weight.detach(), None,
                         self.conv.stride, 0, self.conv.dilation)  # fmt: skip
            self.whole[h, w] = (y.permute(0, 2, 3, 1).flatten(1).contiguous(), y.shape[2:])
        matrix, size = self.whole[h, w]
        y = x.permute(0, 2, 3, 1).flatten(1) @ matrix
        y = y.view(len(x), *size, -1).permute(0, 3, 1, 2)
        return y if self.conv.bias is None else y.add_(self.conv.bias[:, None, None])


def on_same_input(conv: nn.Conv2d, x: Tensor) -> Callable[[], Tensor]:
    """A function that calls a convolution on x, as often as one likes while its weights change."""
    seen = windows(conv, x).permute(0, 1, 2, 5, 3, 4).flatten(3)  # channels first, as weights are
    return lambda: (
        conv(x) if has_hooks(conv) else product(seen, conv.weight.flatten(1).T, conv.bias)
    )
