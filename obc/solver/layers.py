"""Layers seen as matrices: the one place that knows a convolution from a linear layer.

Every layer that can be compressed multiplies the rows of a weight matrix with columns x of its
input: a convolution with patches, a linear layer with the input itself. All kinds are described as
convolutions of an image, so that whatever needs a layer's geometry is written once:

    Linear           an image of one pixel for every vector of the input
    Conv1d           an image of one row
    Conv2d           the image itself
    Conv3d           an image for every depth of the output, whose channels are the channels' planes
    ConvTranspose2d  the image with stride − 1 zeros between its pixels; the kernel is mirrored

    symbol   variable        shape                meaning
    W        matrix          (rows, columns)      one row an output channel
    d        columns         channels · kh · kw   in the weight's own order, (channel, kh, kw)
    C        channels                             input channels of a group
    G        groups                               each has rows/G rows and inputs of its own
    kh·kw    kernel, taps                         kernel positions; (1, 1), 1 for a linear layer

A new kind of layer is a subclass of `LayerView` and an entry in `VIEWS`.

The class of a layer does not tell what it computes: a subclass may pad its input in its own forward
(TensorFlow's "same"), or standardise its weight. `prove` compares a view with a call of the layer.
If another padding explains the output, views of the layer pad like that from then on. If nothing
does, they have a `flaw`, and the layer must be left dense. To find the padding, the input is padded
on all sides and convolved with stride 1: what the layer computes are the outputs from (p, q) on, at
multiples of its stride, p and q being the padding before the first row and column.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from obc.solver.errors import UserError

PROOF = "obc_proof"  # a layer's attribute, which its copies have, too
LEFT_DENSE = "obc_left_dense"  # the same, if somebody decided so: the reason
PADDING_MODES = ("constant", "reflect", "replicate", "circular")
PROOF_TOLERANCE = 1e-4  # relative difference between two ways to compute a layer's output
PROOF_INPUTS = 4  # that the search for a padding uses

Pads = tuple[tuple[int, int, str], ...]  # before, after and mode, for every axis of the input


@dataclass
class Proof:
    """What calls of a layer have shown. Paddings are by the size of the input."""

    paddings: dict[tuple[int, ...], Pads | None] = field(default_factory=dict)  # None: as it says
    flaw: str = ""  # why the layer cannot be compressed


class LayerView(ABC):
    """A layer as a matrix of weights that is multiplied with patches of an image.

    Stride, dilation and kernel are pairs, of the image's rows and of the pixels in a row.
    """

    groups = 1
    kernel = stride = dilation = (1, 1)
    channel_axis = -1  # of the layer's input
    rows_are_first = True  # whether the weight's first axis is that of the output channels
    deed = ""  # what the layer does, in words

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.proof: Proof = vars(layer).get(PROOF) or Proof()
        self.rows, self.channels = self.shape[:2]
        self.columns = math.prod(self.shape[1:])
        self.taps = self.columns // self.channels

    @property
    def shape(self) -> torch.Size:
        """Of the weight with its output channels first: (rows, channels, …)."""
        return self.layer.weight.shape

    @property
    def left_dense(self) -> str:
        """Why no mode may compress the layer; empty if modes may."""
        return self.proof.flaw or vars(self.layer).get(LEFT_DENSE, "")

    # -- what a kind of layer has to say -----------------------------------------------------------

    @abstractmethod
    def image(self, x: Tensor) -> Tensor:  # (n, G·C, height, width)
        """An input as an image, with the layer's own padding around it."""

    @abstractmethod
    def call(self, x: Tensor, weight: Tensor) -> Tensor:
        """What the layer would compute with another weight and no bias; its hooks do not run."""

    def find_padding(self, x: Tensor, y: Tensor) -> Pads | None:
        """The padding with which the layer's output for x, without the bias, is y, if any."""
        return None

    def agrees(self, x: Tensor, y: Tensor) -> bool:
        """Whether y is the layer's output for x, without the bias, up to rounding."""
        try:
            ours = self.call(x, self.layer.weight.detach())
        except (RuntimeError, UserError):  # other channels; smaller than the kernel; a new size
            return False
        return close(ours.view(y.shape) if y.ndim < ours.ndim and len(ours) == 1 else ours, y)

    @abstractmethod
    def resized(self, rows: int, channels: int, groups: int = 1) -> nn.Module:
        """A layer of the same geometry and device, of other sizes; no bias, no values yet."""

    # -- weights -----------------------------------------------------------------------------------

    def rows_first(self, weight: Tensor) -> Tensor:  # (rows, channels, …)
        """A weight in the layer's own form, its output channels along the first axis."""
        return weight

    def own_form(self, weight: Tensor) -> Tensor:  # (rows, channels, …)
        """The reverse of `rows_first`."""
        return weight

    @property
    def matrix(self) -> Tensor:  # (rows, columns)
        """The layer's weights, to read: they may be a copy."""
        return self.rows_first(self.layer.weight.detach()).flatten(1)

    def shaped(self, W: Tensor) -> Tensor:  # (…, R, columns) -> (…, R, *shape[1:])
        """Rows of a weight matrix in the shape of the layer's weight, rows first."""
        return W.reshape(*W.shape[:-1], *self.shape[1:])

    def write(self, W: Tensor) -> None:  # (rows, columns) or (rows, channels, …)
        """Put weights into the layer, in place."""
        self.layer.weight.data.copy_(self.own_form(W.reshape(self.shape)))

    @property
    def innermost(self) -> Tensor:  # (columns,) int64
        """The columns in the order (kh, kw, channel), for N:M and blocks along the channels."""
        return innermost_order(self.shape)

    def divides_by(self, size: int) -> bool:
        """Whether the channels of every kernel position are whole groups of N:M, or blocks."""
        return self.channels % size == 0

    # -- inputs ------------------------------------------------------------------------------------

    def output_size(self, image: Tensor) -> tuple[int, int]:
        """Height and width of the layer's output for what `image` returns."""
        sizes = zip(image.shape[2:], self.kernel, self.dilation, self.stride, strict=True)
        height, width = ((size - d * (k - 1) - 1) // s + 1 for size, k, d, s in sizes)
        return height, width

    def output_images(
        self,
        y: Tensor,  # as the layer returns it, without its bias
        height: int,
        width: int,
    ) -> Tensor:  # (n, rows, height, width), in the order of what `image` returns for the input
        """An output as images."""
        return y.reshape(-1, self.rows, height, width)

    def positions(self, x: Tensor) -> int:
        """How many patches an input has: so many columns are each row's to multiply with."""
        image = self.image(x)
        return len(image) * math.prod(self.output_size(image))

    def flops(self, output: Tensor) -> int:
        """Floating-point operations of a call, two for a multiply-add."""
        return 2 * self.columns * output.numel()

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
            yield patches.reshape(*pixels.shape[:2], -1, kw * pixels.shape[-1])

    def patches(self, x: Tensor) -> Tensor:  # (G, positions, columns)
        """All columns that the rows of a group are multiplied with; many times the input's size."""
        columns = F.unfold(self.image(x), self.kernel, self.dilation, 0, self.stride)
        return columns.unflatten(1, (self.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


@final
class LinearView(LayerView):
    """nn.Linear: inputs (…, d)."""

    deed = "multiply its input with its weight"

    def image(self, x: Tensor) -> Tensor:
        return x.reshape(-1, self.columns, 1, 1)

    def call(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def resized(self, rows: int, channels: int, groups: int = 1) -> nn.Module:
        device = self.layer.weight.device
        return skip_init(nn.Linear, channels * groups, rows, bias=False, device=device)


@final
class ConvView(LayerView):
    """nn.Conv1d, nn.Conv2d, nn.Conv3d: inputs (n, G·C, …) with 1 to 3 more axes, or without n."""

    deed = "convolve its input with its weight"

    def __init__(self, layer: nn.Conv1d | nn.Conv2d) -> None:
        super().__init__(layer)
        self.groups, self.one_row = layer.groups, len(layer.kernel_size) == 1
        self.axes = len(layer.kernel_size)
        first = (1,) if self.one_row else ()
        geometry = (layer.kernel_size, layer.stride, layer.dilation)
        self.kernel, self.stride, self.dilation = ((first + x)[-2:] for x in geometry)
        self.channel_axis = -1 - self.axes

    def batch(self, x: Tensor) -> Tensor:  # (n, channels, …)
        """An input or output of the layer; one without the axis of images as a batch of one."""
        return x if x.ndim == self.axes + 2 else x.unsqueeze(0)

    def image(self, x: Tensor) -> Tensor:
        x = self.padded(self.batch(x))
        if self.axes < 3:
            return x.unsqueeze(2) if self.one_row else x
        (kd, *_), (stride, *_), (dilation, *_) = (
            getattr(self.layer, name) for name in ("kernel_size", "stride", "dilation")
        )
        depth = (x.shape[2] - dilation * (kd - 1) - 1) // stride + 1  # of the output
        last = stride * (depth - 1) + 1
        planes = [x[:, :, i * dilation : i * dilation + last : stride] for i in range(kd)]
        return torch.stack(planes, 2).permute(0, 3, 1, 2, 4, 5).flatten(2, 3).flatten(0, 1)

    def output_images(self, y: Tensor, height: int, width: int) -> Tensor:
        if self.axes == 3:
            y = self.batch(y).movedim(2, 1)
        return super().output_images(y, height, width)

    def padded(self, x: Tensor) -> Tensor:
        layer = self.layer
        paddings, size = self.proof.paddings, tuple(x.shape[2:])
        if any(paddings.values()) and size not in paddings:
            raise UserError(
                f"a {type(layer).__name__} that pads its input by itself is called with "
                f"{'×'.join(map(str, size))} pixels, unlike on the first images"
            )
        if (pads := paddings.get(size)) is not None:
            return padded_axes(x, pads)
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
        return x

    def call(self, x: Tensor, weight: Tensor) -> Tensor:
        kernels = weight.reshape(self.rows, -1, *self.kernel)
        y = F.conv2d(self.image(x), kernels, None, self.stride, 0, self.dilation, self.groups)
        if self.axes == 3:
            return y.unflatten(0, (len(self.batch(x)), -1)).movedim(1, 2)
        return y.squeeze(2) if self.one_row else y

    def find_padding(self, x: Tensor, y: Tensor) -> Pads | None:
        if self.axes == 3:  # too many to try
            return None
        x, y = self.batch(x)[:PROOF_INPUTS], self.batch(y)[:PROOF_INPUTS]
        weight = self.layer.weight.detach()
        largest = weight.flatten(1).norm(dim=1).view(self.groups, -1).argmax(1)
        rows = largest + torch.arange(self.groups, device=largest.device) * (
            self.rows // self.groups
        )
        weight, y = weight[rows], y[:, rows]  # one row of each group is enough
        geometry = (self.kernel, self.stride, self.dilation)
        kernel, stride, dilation = (pair[-self.axes :] for pair in geometry)
        spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
        sizes = list(zip(x.shape[2:], y.shape[2:], spans, stride, strict=True))
        convolve = F.conv1d if self.one_row else F.conv2d
        for modes in product(PADDING_MODES, repeat=self.axes):
            most = [  # on either side
                min(span + s, {"reflect": n - 1, "circular": n}.get(mode, span + s))
                for (n, _, span, s), mode in zip(sizes, modes, strict=True)
            ]
            wide = padded_axes(x, [(p, p, mode) for p, mode in zip(most, modes, strict=True)])
            if any(n < span for n, span in zip(wide.shape[2:], spans, strict=True)):
                continue
            everywhere = convolve(wide, weight, None, 1, 0, dilation, self.groups)
            for before in product(*(range(p + 1) for p in most)):
                starts = zip(most, before, sizes, strict=True)
                steps = [slice(p - b, p - b + s * (m - 1) + 1, s) for p, b, (_, m, _, s) in starts]
                if not close(everywhere[(..., *steps)], y):
                    continue
                ends = zip(before, sizes, modes, strict=True)
                return tuple((b, s * (m - 1) + span - n - b, x) for b, (n, m, span, s), x in ends)
        return None

    def resized(self, rows: int, channels: int, groups: int = 1) -> nn.Module:
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[self.axes - 1]
        names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        options = {name: getattr(self.layer, name) for name in names}
        options |= {"groups": groups, "bias": False, "device": self.layer.weight.device}
        layer = skip_init(kind, channels * groups, rows, **options)
        setattr(layer, PROOF, self.proof)
        return layer


@final
class ConvTransposeView(LayerView):
    """nn.ConvTranspose2d: inputs (n, G·C, height, width), or without n.

    With a stride s, p pixels of padding and o of output padding, s − 1 zeros are put between the
    pixels, d(k − 1) − p around them, and o more behind. Then it is a convolution with stride 1 and
    the mirrored kernel.
    """

    deed = "convolve its input, transposed, with its weight"
    channel_axis = -3
    rows_are_first = False

    def __init__(self, layer: nn.ConvTranspose2d) -> None:
        self.groups, self.kernel, self.dilation = layer.groups, layer.kernel_size, layer.dilation
        super().__init__(layer)

    @property
    def shape(self) -> torch.Size:
        inputs, rows, *kernel = self.layer.weight.shape
        return torch.Size((self.groups * rows, inputs // self.groups, *kernel))

    def rows_first(self, weight: Tensor) -> Tensor:
        weight = weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)
        return weight.flip(-2, -1)

    def own_form(self, weight: Tensor) -> Tensor:
        weight = weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)
        return weight.flip(-2, -1)

    def image(self, x: Tensor) -> Tensor:
        layer = self.layer
        n, channels, *sizes = x.shape if x.ndim == 4 else (1, *x.shape)
        spread = x.new_zeros(
            n, channels, *(s * (m - 1) + 1 for s, m in zip(layer.stride, sizes, strict=True))
        )
        spread[:, :, :: layer.stride[0], :: layer.stride[1]] = x
        sides = []  # before and after, of the last axis first
        for axis in (1, 0):
            before = self.dilation[axis] * (self.kernel[axis] - 1) - layer.padding[axis]
            sides += [before, before + layer.output_padding[axis]]
        return F.pad(spread, sides)

    def call(self, x: Tensor, weight: Tensor) -> Tensor:
        names = ("stride", "padding", "output_padding", "groups", "dilation")
        geometry = [getattr(self.layer, name) for name in names]
        return F.conv_transpose2d(x, weight, None, *geometry)

    def flops(self, output: Tensor) -> int:
        """Every pixel of the input is multiplied with every weight of its group."""
        layer, pixels = self.layer, math.prod(output.shape[:-3])
        for axis, size in enumerate(output.shape[-2:]):
            span = self.dilation[axis] * (self.kernel[axis] - 1) + 1 + layer.output_padding[axis]
            pixels *= (size + 2 * layer.padding[axis] - span) // layer.stride[axis] + 1
        return 2 * pixels * layer.weight.numel()

    def resized(self, rows: int, channels: int, groups: int = 1) -> nn.Module:
        names = ("kernel_size", "stride", "padding", "output_padding", "dilation")
        options = {name: getattr(self.layer, name) for name in names}
        options |= {"groups": groups, "bias": False, "device": self.layer.weight.device}
        return skip_init(nn.ConvTranspose2d, channels * groups, rows, **options)


VIEWS: dict[type[nn.Module], type[LayerView]] = {
    nn.Linear: LinearView,
    nn.Conv1d: ConvView,
    nn.Conv2d: ConvView,
    nn.Conv3d: ConvView,
    nn.ConvTranspose2d: ConvTransposeView,
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


def leave_dense(layer: nn.Module, reason: str) -> None:
    """Let views of a layer, and of its copies, say that no mode may compress it."""
    setattr(layer, LEFT_DENSE, reason)


# -- whether a view is right -----------------------------------------------------------------------


def prove(layer: nn.Module, args: tuple, kwargs: Mapping[str, Any], output: object) -> None:
    """Compare the layer's view with a call of the layer, whose views have a padding or a flaw then.

    A layer with a forward of its own is called again with half of its weights zero, to see whether
    it uses them as they are.
    """
    seen, x = view(layer), first_input(args, kwargs)
    if seen.proof.flaw:
        return
    explained = _explains(layer, x, output)
    if explained and not has_own_code(layer):
        return
    if explained:
        other = copy.deepcopy(layer).requires_grad_(False)
        with torch.no_grad():
            other.weight.flatten()[::2] = 0
            explained = _explains(other, x, other.forward(*args, **kwargs), learn=False)
    if not explained:
        name = type(layer).__name__
        setattr(layer, PROOF, Proof(flaw=f"{name} does not just {seen.deed}"))


def _explains(layer: nn.Module, x: Tensor, output: object, learn: bool = True) -> bool:
    """Whether the view computes the layer's output; if not, tries to learn the padding."""
    seen, bias = view(layer), getattr(layer, "bias", None)
    if not isinstance(output, Tensor) or output.ndim != x.ndim:
        return False
    y = output
    if bias is not None:
        y = y - bias.detach().view(-1, *[1] * (-1 - seen.channel_axis))
    agrees, pads = seen.agrees(x, y), None
    if not agrees and learn:
        pads = seen.find_padding(x, y)
    if learn and has_own_code(layer) and (agrees or pads):
        size = tuple(x.shape[seen.channel_axis + 1 :]) if seen.channel_axis < -1 else ()
        setattr(layer, PROOF, Proof({size: pads} | seen.proof.paddings))
    return agrees or (pads is not None and view(layer).agrees(x, y))


def has_own_code(layer: nn.Module) -> bool:
    """Whether a layer may do something else than its kind of layer does."""
    return type(layer) not in VIEWS or "forward" in vars(layer)


def close(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two results are equal up to rounding."""
    if ours.shape != theirs.shape:
        return False
    return bool((ours - theirs).abs().max() <= PROOF_TOLERANCE * theirs.abs().max())


def padded_axes(x: Tensor, pads: Sequence[tuple[int, int, str]]) -> Tensor:
    """A batch (n, channels, …) with each axis padded in its own way; less than 0 crops."""
    for axis, (before, after, mode) in enumerate(pads, 2):
        x = x.narrow(axis, 0, x.shape[axis] + min(after, 0))
        sides = [0, 0] * len(pads)  # of the last axis first
        place = 2 * (x.ndim - 1 - axis)
        sides[place : place + 2] = before, max(after, 0)
        x = F.pad(x, sides, mode=mode) if any(sides) else x
    return x


# -- weights without their layer -------------------------------------------------------------------


def innermost_order(shape: Sequence[int]) -> Tensor:  # (columns,) int64
    """Columns of a weight of this shape in the order (kernel position, channel)."""
    return torch.arange(math.prod(shape[1:])).view(shape[1], -1).T.flatten()


def along_rows(values: Tensor, weight: Tensor) -> Tensor:  # (rows,) or (rows, 1) -> (rows, 1, …)
    """One value a row, as it multiplies a weight (rows, …)."""
    return values.view(-1, *[1] * (weight.ndim - 1))


# -- calls -----------------------------------------------------------------------------------------


def first_input(args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    """The first argument of a call, by position or by keyword."""
    return args[0] if args else next(iter(kwargs.values()))


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
