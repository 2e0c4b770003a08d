"""What a layer asks of quantising and pruning: chunks of its inputs and their second moments.

Row r of a layer's weights (d numbers, columns in the order (channel, kh, kw)) is cut into chunks of
at most `opt_dim` consecutive columns. A chunk of weights w sees the inputs x at its columns, of all
positions of all images, and an error w − ŵ in it changes the layer's output by (w − ŵ) x, so

    mean squared change of the output  =  (w − ŵ) G (w − ŵ)ᵀ        G = E[x xᵀ]
    mean squared output of the chunk   =  w G wᵀ                     the signal of its SQNR

G is that of hessian.py's `Gram` for a layer that has the chunk's channels only: strides, padding,
dilation and groups are the layer's own. E is the mean over images of the sum over positions, a
factor that no SQNR knows of. Inputs are float64 before anything is multiplied.

    symbol  variable  shape
    w       w         (n,)    weights of the chunk, n ≤ opt_dim
    G       G         (n, n)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from modelutils import evaluating
from obc.solver.hessian import Gram
from obc.solver.layers import view
from obc.toolkit.calibrate import watching
from pruning_vs_quantization.expected_error import best_step, integer_codes
from pruning_vs_quantization.proof import Reals
from pruning_vs_quantization.tensor_sqnr import Histogram

RANGES = ("MSE", "minmax")


@dataclass(frozen=True, order=True)
class Chunk:
    """Consecutive columns of one group of a layer."""

    group: int
    start: int
    stop: int


@dataclass(frozen=True)
class Subproblem:
    """One row's weights on one chunk."""

    row: int  # output channel
    chunk: Chunk
    w: Reals  # (n,)
    G: Reals  # (n, n)

    @property
    def signal(self) -> float:
        """The mean squared output of the chunk."""
        return float(self.w @ self.G @ self.w)


def spread(count: int, total: int) -> list[int]:
    """`count` of the numbers 0 … total − 1, evenly spread; all if there are no more.

    >>> spread(3, 9), spread(9, 3)
    ([0, 4, 8], [0, 1, 2])
    """
    return sorted({round(i) for i in np.linspace(0, total - 1, min(count, total))})


def rows_and_chunks(
    layer: nn.Module,
    opt_dim: int,
    channels: int,  # output channels wanted
    chunks: int,  # chunks wanted of each
) -> list[tuple[int, Chunk]]:
    """Which rows and which of their chunks are looked at: evenly spread ones."""
    rows, d = view(layer).rows, view(layer).columns
    per_group = rows // view(layer).groups
    starts = list(range(0, d, opt_dim))
    chosen = [starts[i] for i in spread(chunks, len(starts))]
    return [
        (row, Chunk(row // per_group, start, min(start + opt_dim, d)))
        for row in spread(channels, rows)
        for start in chosen
    ]


def subproblems(
    layer: nn.Module, wanted: Iterable[tuple[int, Chunk]], moments: Mapping[Chunk, Reals]
) -> list[Subproblem]:
    """The subproblems of a layer, its weights with their inputs' second moments."""
    W = view(layer).matrix.double().cpu().numpy()
    return [Subproblem(row, c, W[row, c.start : c.stop], moments[c]) for row, c in wanted]


def grid_steps(
    weight: Tensor,  # (rows, …)
    bits: int,
    balanced: bool = False,  # without the lowest code
    per_channel: bool = False,  # else one step for the layer
    method: str = "MSE",  # of RANGES
) -> Reals:  # (rows,)
    """The step of a layer's symmetric grid: of least squared error, or from the largest weight.

    The first is proven, on the weights rounded to FP16 (`expected_error.best_step`); the second is
    quant.py's, 2·max|w| over the number of steps.
    """
    W = weight.detach().flatten(1)
    tensors = list(W) if per_channel else [W]
    codes = integer_codes(bits, balanced)
    steps = []
    for tensor in tensors:
        if not bool(tensor.to(torch.float16).any()):
            steps.append(1.0)  # nothing to quantise
        elif method == "MSE":
            steps.append(best_step(Histogram.of(tensor), codes))
        else:
            steps.append(2 * float(tensor.abs().max()) / (codes[-1] - codes[0]))
    return np.array(steps) if per_channel else np.repeat(steps, len(W))


# -- second moments --------------------------------------------------------------------------------


class ChunkMoments:
    """E[x xᵀ] of one chunk's inputs, batch after batch."""

    def __init__(self, layer: nn.Module, chunk: Chunk) -> None:
        self.chunk, self.images = chunk, 0
        self.layer = view(layer)
        taps = self.layer.taps
        first, last = chunk.start // taps, -(-chunk.stop // taps)  # channels of the group
        self.first_input, self.inputs = chunk.group * self.layer.channels + first, last - first
        self.columns = slice(chunk.start - first * taps, chunk.stop - first * taps)
        self.gram = Gram(self.layer.resized(rows=1, channels=self.inputs))

    def add(self, inputs: Tensor) -> None:
        """Add one batch of the layer's inputs."""
        chunk = inputs.narrow(self.layer.channel_axis, self.first_input, self.inputs)
        self.gram.add(chunk.double())
        self.images += len(inputs)

    def matrix(self) -> Reals:  # (n, n); zero if the layer has seen nothing
        G = self.gram.matrix()[0, self.columns, self.columns].cpu().numpy()
        return (G + G.T) / (2 * max(1, self.images))


def second_moments(
    model: nn.Module,
    wanted: Mapping[str, Iterable[Chunk]],  # by name of the layer
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
) -> dict[str, dict[Chunk, Reals]]:
    """G of every chunk wanted, over all calibration images."""
    layers = {name: model.get_submodule(name) for name in wanted}
    moments = {
        name: [ChunkMoments(layers[name], chunk) for chunk in sorted(set(chunks))]
        for name, chunks in wanted.items()
    }

    def see(name: str, inputs: Tensor) -> None:
        for each in moments[name]:
            each.add(inputs)

    with evaluating(model), watching(layers, see):
        for images, _ in tqdm(batches, desc="inputs of the layers", leave=False, disable=None):
            model(images.to(device))
    return {name: {m.chunk: m.matrix() for m in each} for name, each in moments.items()}
