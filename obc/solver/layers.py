"""Layers seen as matrices: the one place that knows a convolution from a linear layer.

Every layer that can be compressed multiplies the rows of a weight matrix with columns x of its
input: a convolution with patches, a linear layer with the input itself. All kinds are described as
convolutions of an image, so that whatever needs a layer's geometry is written once:

    Linear     an image of one pixel for every vector of the input
    Conv1d     an image of one row
    Conv2d     the image itself

    symbol   variable        shape                meaning
    W        matrix          (rows, columns)      one row an output channel
    d        columns         channels · kh · kw   in the weight's own order, (channel, kh, kw)
    C        channels                             input channels of a group
    G        groups                               each has rows/G rows and inputs of its own
    kh·kw    kernel, taps                         kernel positions; (1, 1), 1 for a linear layer

A new kind of layer is a subclass of `LayerView` and an entry in `VIEWS`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init


class LayerView(ABC):
    """A layer as a matrix of weights that is multiplied with patches of an image.

    Stride, dilation and kernel are pairs, of the image's rows and of the pixels in a row.
    """

    groups = 1
    kernel = stride = dilation = (1, 1)
    channel_axis = 1  # of the layer's input

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.rows, self.channels = layer.weight.shape[:2]
        self.columns = layer.weight[0].numel()
        self.taps = self.columns // self.channels

    # -- what a kind of layer has to say -----------------------------------------------------------

    @abstractmethod
    def image(self, x: Tensor) -> Tensor:  # (n, G·C, height, width)
        """An input as an image, with the layer's own padding around it."""

    @abstractmethod
    def call(self, x: Tensor, weight: Tensor) -> Tensor:
        """What the layer would compute with another weight and no bias; its hooks do not run."""

    @abstractmethod
    def resized(self, rows: int, channels: int, groups: int = 1) -> nn.Module:
        """A layer of the same geometry and device, of other sizes; no bias, no values yet."""

    # -- weights -----------------------------------------------------------------------------------

    @property
    def matrix(self) -> Tensor:  # (rows, columns)
        """The layer's weights; shares their memory."""
        return self.layer.weight.detach().flatten(1)

    def shaped(self, W: Tensor) -> Tensor:  # (…, R, columns) -> (…, R, *weight.shape[1:])
        """Rows of a weight matrix in the shape of the layer's weight."""
        return W.reshape(*W.shape[:-1], *self.layer.weight.shape[1:])

    @property
    def innermost(self) -> Tensor:  # (columns,) int64
        """The columns in the order (kh, kw, channel), for N:M and blocks along the channels."""
        return innermost_order(self.layer.weight.shape)

    def divides_by(self, size: int) -> bool:
        """Whether the columns are whole groups of N:M, or blocks, of `size`."""
        return self.columns % size == 0

    # -- inputs ------------------------------------------------------------------------------------

    def output_size(self, image: Tensor) -> tuple[int, int]:
        """Height and width of the layer's output for what `image` returns."""
        sizes = zip(image.shape[2:], self.kernel, self.dilation, self.stride, strict=True)
        height, width = ((size - d * (k - 1) - 1) // s + 1 for size, k, d, s in sizes)
        return height, width

    def positions(self, x: Tensor) -> int:
        """How many patches an input has: so many columns are each row's to multiply with."""
        image = self.image(x)
        return len(image) * math.prod(self.output_size(image))

    def flops(self, x: Tensor) -> int:
        """Floating-point operations of a call, two for a multiply-add."""
        return 2 * self.rows * self.columns * self.positions(x)

    def unfolded(self, x: Tensor, most_bytes: int) -> Iterator[Tensor]:  # (G, T, n·Wo, kw·C) each
        """The image's T rows unfolded along the width only, channel innermost.

        Wo is the width of the output. A few images at a time: no more than `most_bytes`, or one.
        """
        image = self.image(x)
        _, width = self.output_size(image)
        (_, kw), (_, stride), (_, dilation) = self.kernel, self.stride, self.dilation
        last = stride * (width - 1) + 1
        image_bytes = image.shape[1] * image.shape[2] * width * kw * image.element_size()
        for piece in image.split(max(1, most_bytes // image_bytes)):
            pixels = piece.unflatten(1, (self.groups, -1)).permute(1, 3, 0, 4, 2)  # (G, T, n, ·, C)
            taps = [pixels[:, :, :, j * dilation : j * dilation + last : stride] for j in range(kw)]
            patches = torch.cat(taps, dim=-1) if kw > 1 else taps[0]
            yield patches.reshape(*pixels.shape[:2], -1, kw * self.channels)

    def patches(self, x: Tensor) -> Tensor:  # (G, positions, columns)
        """All columns that the rows of a group are multiplied with; many times the input's size."""
        columns = F.unfold(self.image(x), self.kernel, self.dilation, 0, self.stride)
        return columns.unflatten(1, (self.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


@final
class LinearView(LayerView):
    """nn.Linear: inputs (…, d)."""

    channel_axis = -1

    def image(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.columns, 1, 1)

    def call(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def resized(self, rows: int, channels: int, groups: int = 1) -> nn.Module:
        device = self.layer.weight.device
        return skip_init(nn.Linear, channels * groups, rows, bias=False, device=device)


@final
class ConvView(LayerView):
    """nn.Conv1d and nn.Conv2d: inputs (n, G·C, length) and (n, G·C, height, width)."""

    def __init__(self, layer: nn.Conv1d | nn.Conv2d) -> None:
        super().__init__(layer)
        self.groups, self.one_row = layer.groups, len(layer.kernel_size) == 1
        first = (1,) if self.one_row else ()
        self.kernel, self.stride = first + layer.kernel_size, first + layer.stride
        self.dilation = first + layer.dilation

    def image(self, x: Tensor) -> Tensor:
        layer = self.layer
        sides = []  # before and after, of the last dimension first
        for axis in reversed(range(len(layer.kernel_size))):
            if layer.padding == "same":  # as torch does: the odd one goes behind
                both = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
                sides += [both // 2, both - both // 2]
            else:
                sides += [0, 0] if layer.padding == "valid" else [layer.padding[axis]] * 2
        if any(sides):
            mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            x = F.pad(x, sides, mode=mode)
        return x.unsqueeze(2) if self.one_row else x

    def call(self, x: Tensor, weight: Tensor) -> Tensor:
        kernels = weight.reshape(self.rows, self.channels, *self.kernel)
        y = F.conv2d(self.image(x), kernels, None, self.stride, 0, self.dilation, self.groups)
        return y.squeeze(2) if self.one_row else y

    def resized(self, rows: int, channels: int, groups: int = 1) -> nn.Module:
        kind = nn.Conv1d if self.one_row else nn.Conv2d
        names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        options = {name: getattr(self.layer, name) for name in names}
        options |= {"groups": groups, "bias": False, "device": self.layer.weight.device}
        return skip_init(kind, channels * groups, rows, **options)


VIEWS: dict[type[nn.Module], type[LayerView]] = {
    nn.Linear: LinearView,
    nn.Conv1d: ConvView,
    nn.Conv2d: ConvView,
}


def compressible(module: nn.Module) -> bool:
    """Whether a module is a layer that can be compressed."""
    return isinstance(module, tuple(VIEWS))


def view(layer: nn.Module) -> LayerView:
    """The view of a layer; raises TypeError for a module that cannot be compressed."""
    for kind, view_class in VIEWS.items():
        if isinstance(layer, kind):
            return view_class(layer)
    raise TypeError(f"a {type(layer).__name__} is not a layer that can be compressed")


# -- weights without their layer -------------------------------------------------------------------


def innermost_order(shape: Sequence[int]) -> Tensor:  # (columns,) int64
    """Columns of a weight of this shape in the order (kernel position, channel)."""
    return torch.arange(math.prod(shape[1:])).view(shape[1], -1).T.flatten()


def along_rows(values: Tensor, weight: Tensor) -> Tensor:  # (rows,) or (rows, 1) -> (rows, 1, …)
    """One value a row, as it multiplies a weight (rows, …)."""
    return values.view(-1, *[1] * (weight.ndim - 1))


# -- calls -----------------------------------------------------------------------------------------

Call = Callable[[str, nn.Module, tuple, dict[str, Any], Any], Any]


@contextmanager
def forward_hooks(modules: Mapping[str, nn.Module], see: Call) -> Iterator[None]:
    """Inside, `see(name, module, args, kwargs, output)` follows every call of these modules.

    What `see` returns, unless it is None, takes the place of the output.
    """
    with ExitStack() as stack:
        for name, module in modules.items():
            handle = module.register_forward_hook(partial(see, name), with_kwargs=True)
            stack.callback(handle.remove)
        yield
