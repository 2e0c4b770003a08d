"""Convolutions that yield small maps, as matrix products, on a CPU.

Where an output map has few pixels the direct kernels of oneDNN run at a quarter to a half of the
speed of a matrix product (512 channels, 3×3, at 2×2 pixels: 60 instead of 200 Gflop/s on 2 cores of
an Intel Xeon), while the columns that a product needs are few. The same sums in another order.

    y (N·pixels, O)  =  columns (N·pixels, C·kh·kw) · Wᵀ  +  b

The products are oneDNN's, too: twice as fast as MKL's on an AMD EPYC (220 against 110 Gflop/s a
core). Weights that stay are packed for it once; those that change are a 1×1 convolution's, with the
columns as its pixels, where their number has a divisor that makes images of a good size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from obc.solver.layers import view

PIXELS = 16  # of the input map per pixel of a stride, at most: about those of the output map
COLUMNS = 512  # C·kh·kw, at least: narrower convolutions lose more by copying than they gain
OF_AN_IMAGE = range(32, 3, -1)  # columns, best first; a single one takes twice MKL's time
IMAGES = 16  # at least; PyTorch on one thread leaves fewer to MKL


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
        and view(module).taps > 1
        and view(module).columns >= COLUMNS
        and 0 < x.shape[2] * x.shape[3] <= PIXELS * sy * sx
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether a call does more than the convolution: grids round a layer's inputs by a hook."""
    return bool(module._forward_pre_hooks or module._forward_hooks)


def windows(conv: nn.Conv2d, x: Tensor) -> Tensor:  # (N, oh, ow, kh, kw, C), a view
    """What each output pixel sees."""
    geometry = view(conv)
    x = geometry.image(x)
    height, width = geometry.output_size(x)
    x = x.permute(0, 2, 3, 1)
    image, row, pixel, channel = x.stride()
    (dy, dx), (sy, sx) = conv.dilation, conv.stride
    size = (len(x), height, width, *conv.kernel_size, x.shape[3])
    return x.as_strided(size, (image, row * sy, pixel * sx, row * dy, pixel * dx, channel))


def product(
    seen: Tensor,  # (N, oh, ow, …)
    kernel: Tensor,  # (O, …)
    bias: Tensor | None,
) -> Tensor:  # (N, O, oh, ow), channels last
    """seen · kernelᵀ + b as a map."""
    kernel = kernel.flatten(1)
    columns = seen.reshape(-1, kernel.shape[1])
    count = len(columns)
    pixels = next((n for n in OF_AN_IMAGE if count % n == 0 and count >= IMAGES * n), None)
    if pixels:
        image = columns.view(-1, pixels, 1, kernel.shape[1]).permute(0, 3, 1, 2)
        y = F.conv2d(image, kernel[:, :, None, None], bias).permute(0, 2, 3, 1)
    else:
        y = F.linear(columns, kernel, bias)
    return y.reshape(*seen.shape[:3], -1).permute(0, 3, 1, 2)


class Packed:
    """x (P, K) -> x · kernelᵀ + b (P, O), for many calls: the kernel in oneDNN's own layout."""

    def __init__(self, kernel: Tensor, bias: Tensor | None) -> None:  # (O, K), (O,)
        has_onednn = torch.backends.mkldnn.is_available()
        self.into = torch.Tensor.to_mkldnn if has_onednn else nn.Identity()
        self.kernel = self.into(kernel.detach())
        self.bias = self.into(kernel.new_zeros(len(kernel)) if bias is None else bias.detach())

    def __call__(self, x: Tensor) -> Tensor:
        y = F.linear(self.into(x), self.kernel, self.bias)
        return y.to_dense() if y.is_mkldnn else y


class SmallMaps(nn.Module):
    """A convolution whose weights do not change any more, as a product where its maps are small."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.columns: Packed | None = None  # (P, kh·kw·C) -> (P, O)
        self.whole: dict[tuple[int, ...], tuple[Packed, tuple[int, int]]] = {}

    def forward(self, x: Tensor) -> Tensor:  # (N, C, h, w) -> (N, O, oh, ow)
        if not is_small(self.conv, x):
            return self.conv(x)
        if x.shape[2] * x.shape[3] < view(self.conv).taps:
            return self.of_whole_maps(x)
        if self.columns is None:
            kernel = self.conv.weight.detach().permute(0, 2, 3, 1).flatten(1)
            self.columns = Packed(kernel.contiguous(), self.conv.bias)
        seen = windows(self.conv, x)
        y = self.columns(seen.reshape(-1, view(self.conv).columns))
        return y.view(*seen.shape[:3], -1).permute(0, 3, 1, 2)

    def of_whole_maps(self, x: Tensor) -> Tensor:
        """Where a kernel sees more padding than map: one matrix from the whole map to the next."""
        h, w = x.shape[2:]
        if (h, w) not in self.whole:  # where each output pixel sees a map that is 1 at one pixel
            taps = windows(self.conv, torch.eye(h * w).view(-1, 1, h, w))[..., 0]
            matrix = torch.einsum("ipqkl,ockl->pqoic", taps, self.conv.weight.detach())
            kernel = matrix.flatten(3).flatten(0, 2)  # (oh·ow·O, h·w·C)
            self.whole[h, w] = (Packed(kernel, None), taps.shape[1:3])
        multiply, size = self.whole[h, w]
        y = multiply(x.permute(0, 2, 3, 1).flatten(1))
        y = y.view(len(x), *size, -1).permute(0, 3, 1, 2)
        return y if self.conv.bias is None else y.add_(self.conv.bias[:, None, None])


def on_same_input(conv: nn.Conv2d, x: Tensor) -> Callable[[], Tensor]:
    """A function that calls a convolution on x, as often as one likes while its weights change."""
    seen = windows(conv, x).permute(0, 1, 2, 5, 3, 4).flatten(3)  # channels first, as weights are
    return lambda: conv(x) if has_hooks(conv) else product(seen, conv.weight, conv.bias)
