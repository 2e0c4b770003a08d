"""Calibration: the inputs of the dense model's layers on the calibration images.

OBC (arXiv 2208.11580), sections 3 and 6: Hessians of some or all layers in one pass over all
calibration images, or over this process's share of them; and, for activation quantisation, a grid
for each layer's input, fitted on the first batch.

On a CPU each batch goes through the model and into the products x xᵀ on one thread, several batches
at a time; each layer adds up the products in the order of the batches. So sums do not depend on the
number of threads, only on --batchsize, and threads never wait for each other within a layer.
"""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

import quant
from modelutils import evaluating, find_layers
from obc.inputs.batches import ImageBatches
from obc.inputs.tracing import twin
from obc.solver.distributed import ALONE, World
from obc.solver.errors import UserError
from obc.solver.hessian import CHUNK_BYTES
from obc.solver.layers import forward_hooks
from obc.solver.memory import default_memory
from obc.solver.progress import progress
from obc.solver.threads import Turns, one_at_a_thread, one_thread, pool_of
from trueobs import TrueOBS

MAPS_IN_MEMORY = 6  # of the size of the widest layer's input, while a model runs


@contextmanager
def watching(layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside, `see(name, input)` is called with the input of every call of a layer."""

    with forward_hooks(layers, lambda name, layer, args, kwargs, output: see(name, args[0])):
        yield


def calibrate(
    dense: nn.Module,
    solvers: Mapping[str, TrueOBS],  # by the names of layers
    batches: ImageBatches | list[tuple[Tensor, Tensor]],  # a list, if there is one shard only
    device: torch.device,
    world: World = ALONE,
    shards: int = 1,  # that a single process goes through
) -> None:
    """Run the dense model on the calibration images; each solver sees its layer's inputs.

    Each of several processes takes a shard of them; sums are then added up over all.
    """
    count = max(world.size, shards)
    with evaluating(dense):
        for number in range(shards) if world.size == 1 else [world.rank]:
            show(dense, solvers, batches.shard(number, count) if count > 1 else batches, device)
            for solver in solvers.values() if count > 1 else ():
                solver.end_shard()
    for solver in solvers.values() if count > 1 else ():
        solver.combine(world)


def show(
    dense: nn.Module,
    solvers: Mapping[str, TrueOBS],
    batches: ImageBatches | list[tuple[Tensor, Tensor]],
    device: torch.device,
) -> None:
    """Run the dense model on batches: on a CPU several at a time, one per thread.

    Every layer adds them up in order, so that its sums do not depend on the threads.
    """
    layout = torch.channels_last if device.type == "cpu" else torch.contiguous_format
    images = (
        images.to(device, memory_format=layout, copy=True)  # a model may work on them in place
        for images, _ in progress("calibrating", batches)
    )
    first = next(images, None)
    if first is None:
        return
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    calls: Counter[str] = Counter()
    if threads > 1:
        calls, image_bytes = probe(dense, first[:1].clone())
        batch_bytes = len(first) * image_bytes + 3 * CHUNK_BYTES
        threads = max(1, min(threads, default_memory(device) // 2 // batch_bytes))
    turns, mine = Turns(), threading.local()  # a thread's batch, its model, layers it is done with

    def see(name: str, x: Tensor) -> None:
        if name in mine.done and threads > 1:  # the next batch may be adding by now
            raise UserError(
                f"{name} is called more often for some images than for the first one; "
                "set OMP_NUM_THREADS=1"
            )
        solvers[name].add_batch(x, wait=lambda: turns.wait(name, mine.number))
        if calls[name] == 1:  # so it is the next batch's turn
            mine.done.add(name)
            turns.leave(name, mine.number)

    def work(number: int, batch: Tensor) -> None:
        mine.number, mine.done = number, set()
        if not hasattr(mine, "model"):
            mine.model = twin(dense)
        layers = {name: mine.model.get_submodule(name) for name in solvers}
        with torch.inference_mode(), watching(layers, see):
            mine.model(batch)
        for name in solvers.keys() - mine.done:
            turns.leave(name, number)

    one_at_a_thread(work, chain([first], images), threads, turns)


def probe(model: nn.Module, image: Tensor) -> tuple[Counter[str], int]:
    """How often each layer is called for one image, and about how many bytes the image takes."""
    calls, widest = Counter(), 0

    def see(name: str, x: Tensor) -> None:
        nonlocal widest
        calls[name], widest = calls[name] + 1, max(widest, x.nbytes)

    with watching(find_layers(model), see):
        model(image)  # (1, 3, s, s)
    return calls, MAPS_IN_MEMORY * widest


def calls_of_layers(model: nn.Module, image_shape: tuple[int, int, int]) -> Counter[str]:
    """How often each layer is called for one image."""
    image = torch.zeros(1, *image_shape, device=next(model.parameters()).device)
    with evaluating(model):
        return probe(model, image)[0]


def activation_grids(
    dense: nn.Module,
    images: Tensor,  # (n, 3, s, s) one batch, on the model's device
    bits: int,
    symmetric: bool,
    search: bool,
) -> dict[str, quant.Grid]:
    """A grid for the input of every layer that sees the images."""
    fits: dict[str, Future[quant.Grid]] = {}
    threads = torch.get_num_threads() if images.device.type == "cpu" else 1
    waiting = threading.Semaphore(2 * threads)  # bounds the inputs in memory
    with evaluating(dense), pool_of(threads) as submit, one_thread():

        def fit(name: str, x: Tensor) -> None:
            waiting.acquire()
            x = x.to(torch.float32, copy=True)  # the model may go on to work in place
            fits[name] = submit(quant.fit_activation_grid, x, bits, symmetric, search)
            fits[name].add_done_callback(lambda _: waiting.release())

        with watching(find_layers(dense), fit):
            dense(images.clone())
        return {name: grid.result() for name, grid in fits.items()}


def attach_activation_grids(model: nn.Module, grids: Mapping[str, quant.Grid]) -> None:
    """Make the layers of a model round their inputs; each gets a copy of its grid."""
    for name, grid in grids.items():
        quant.set_activation_grid(model.get_submodule(name), copy.deepcopy(grid))
