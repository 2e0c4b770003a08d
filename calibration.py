"""Calibration: what the layers of the dense model see when it is shown images.

OBC (arXiv 2208.11580), sections 3 and 6: every layer's Hessian over all calibration images, in one
pass if the Hessians of all layers fit in memory, else in several passes for a group of layers each;
and, for activation quantisation, a grid for each layer's input, found on the first batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm import tqdm

import quant
from modelutils import evaluating, find_layers
from trueobs import TrueOBS


@contextmanager
def watching(layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside, `see(name, input)` is called with the input of every call of a layer."""

    def hook(name: str) -> Callable:
        return lambda layer, inputs, output: see(name, inputs[0])

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def calibrate(
    dense: nn.Module,
    solvers: Mapping[str, TrueOBS],  # by the names of layers
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
) -> None:
    """Show the calibration images to the dense model; each solver sees its layer's inputs."""
    layers = {name: dense.get_submodule(name) for name in solvers}
    layout = torch.channels_last if device.type == "cpu" else torch.contiguous_format
    with evaluating(dense), watching(layers, lambda name, x: solvers[name].add_batch(x)):
        for images, _ in tqdm(batches, desc="calibrating", leave=False, disable=None):
            dense(images.to(device, memory_format=layout))


def in_passes(layers: Mapping[str, nn.Module], memory: int) -> list[list[str]]:
    """Layers in groups whose Hessians fit in half of `memory` (bytes) together, in their order."""
    passes: list[list[str]] = []
    room = 0
    for name, layer in layers.items():
        d = layer.weight[0].numel()
        size = 8 * d * d * getattr(layer, "groups", 1)
        if not passes or size > room:
            passes.append([])
            room = memory // 2
        passes[-1].append(name)
        room -= size
    return passes


def activation_grids(
    dense: nn.Module,
    images: Tensor,  # (n, 3, s, s) one batch, on the model's device
    bits: int,
    symmetric: bool,
    search: bool,
) -> dict[str, quant.Grid]:
    """A grid for the input of every layer that sees the images."""
    grids: dict[str, quant.Grid] = {}

    def fit(name: str, x: Tensor) -> None:
        grids[name] = quant.fit_activation_grid(x.float(), bits, symmetric, search)

    with evaluating(dense), watching(find_layers(dense), fit):
        dense(images)
    return grids


def attach_activation_grids(model: nn.Module, grids: Mapping[str, quant.Grid]) -> None:
    """Make the layers of a model round their inputs; each gets a grid of its own."""
    for name, grid in grids.items():
        quant.set_activation_grid(model.get_submodule(name), copy.deepcopy(grid))
