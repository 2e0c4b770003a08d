"""Calibration: what the layers of the dense model see when it is shown images.

OBC (arXiv 2208.11580), sections 3 and 6: Hessians of some or all layers in one pass over all
calibration images, or over this process's share of them; and, for activation quantisation, a grid
for each layer's input, found on the first batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from tqdm import tqdm

import quant
from engine.distributed import ALONE, World
from images.batches import Batches
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
    batches: Batches | list[tuple[Tensor, Tensor]],  # a list, if there is one shard only
    device: torch.device,
    world: World = ALONE,
    shards: int = 1,  # that this process goes through, if it is alone
) -> None:
    """Show the calibration images to the dense model; each solver sees its layer's inputs.

    Each of several processes shows a shard of them; sums are then added up over all.
    """
    layers = {name: dense.get_submodule(name) for name in solvers}
    layout = torch.channels_last if device.type == "cpu" else torch.contiguous_format
    count = max(world.size, shards)
    with evaluating(dense), watching(layers, lambda name, x: solvers[name].add_batch(x)):
        for number in range(shards) if world.size == 1 else [world.rank]:
            shard = batches.shard(number, count) if count > 1 else batches
            for images, _ in tqdm(shard, desc="calibrating", leave=False, disable=None):
                dense(images.to(device, memory_format=layout))
            for solver in solvers.values() if count > 1 else ():
                solver.end_shard()
    for solver in solvers.values() if count > 1 else ():
        solver.combine(world)


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
