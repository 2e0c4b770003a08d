"""Calibration: what the layers of the dense model see when it is shown images.

OBC (arXiv 2208.11580), sections 3 and 6: Hessians of some or all layers in one pass over all
calibration images, or over this process's share of them; and, for activation quantisation, a grid
for each layer's input, found on the first batch.

On a CPU a batch goes through the model, and into the products x xᵀ, on one thread, several batches
at a time; each layer adds up their products in the order of the batches. So no sum depends on the
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
from tqdm import tqdm

import quant
from modelutils import evaluating, find_layers
from obc.inputs.batches import ImageBatches
from obc.solver.distributed import ALONE, World
from obc.solver.errors import UserError
from obc.solver.hessian import CHUNK_BYTES
from obc.solver.memory import default_memory
from obc.solver.threads import Turns, one_at_a_thread, one_thread, pool_of
from trueobs import TrueOBS

MAPS_AT_A_TIME = 6  # of the size of the widest layer's input, while a model runs


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
    batches: ImageBatches | list[tuple[Tensor, Tensor]],  # a list, if there is one shard only
    device: torch.device,
    world: World = ALONE,
    shards: int = 1,  # that this process goes through, if it is alone
) -> None:
    """Show the calibration images to the dense model; each solver sees its layer's inputs.

    Each of several processes shows a shard of them; sums are then added up over all.
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
    """Show some images to the dense model: on a CPU several batches at a time, one a thread.

    Every layer adds them up in their order, so that its sums do not depend on the threads.
    """
    layout = torch.channels_last if device.type == "cpu" else torch.contiguous_format
    images = (
        images.to(device, memory_format=layout)
        for images, _ in tqdm(batches, desc="calibrating", leave=False, disable=None)
    )
    first = next(images, None)
    if first is None:
        return
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    calls: Counter[str] = Counter()
    if threads > 1:
        calls, image_bytes = probe(dense, first[:1])
        batch_bytes = len(first) * image_bytes + 3 * CHUNK_BYTES
        threads = max(1, min(threads, default_memory(device) // 2 // batch_bytes))
    turns, own = Turns(), threading.local()

    def see(name: str, x: Tensor) -> None:
        if name in own.left and threads > 1:  # the next batch may be at its sums by now
            raise UserError(
                f"{name} is called more often for some images than for the first one; "
                "set OMP_NUM_THREADS=1"
            )
        solvers[name].add_batch(x, wait=lambda: turns.wait(name, own.number))
        if calls[name] == 1:  # so it is the next batch's turn
            own.left.add(name)
            turns.leave(name, own.number)

    def work(number: int, batch: Tensor) -> None:
        own.number, own.left = number, set()
        if not hasattr(own, "model"):
            own.model = twin(dense)
        layers = {name: own.model.get_submodule(name) for name in solvers}
        with torch.inference_mode(), watching(layers, see):
            own.model(batch)
        for name in solvers.keys() - own.left:
            turns.leave(name, number)

    one_at_a_thread(work, chain([first], images), threads, turns)


def twin(model: nn.Module) -> nn.Module:
    """The same tensors in modules of its own, which another thread may call, and keep things in."""
    kept = [x for module in model.modules() for x in vars(module).values() if torch.is_tensor(x)]
    tensors = [*model.parameters(), *model.buffers(), *kept]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def probe(model: nn.Module, image: Tensor) -> tuple[Counter[str], int]:
    """How often each layer is called, and about how many bytes one image takes at a time."""
    calls, widest = Counter(), 0

    def see(name: str, x: Tensor) -> None:
        nonlocal widest
        calls[name], widest = calls[name] + 1, max(widest, x.nbytes)

    with watching(find_layers(model), see):
        model(image)  # (1, 3, s, s)
    return calls, MAPS_AT_A_TIME * widest


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
    waiting = threading.Semaphore(2 * threads)  # so that few layers' inputs are kept
    with evaluating(dense), pool_of(threads) as pool, one_thread():

        def fit(name: str, x: Tensor) -> None:
            waiting.acquire()
            fits[name] = pool.submit(quant.fit_activation_grid, x.float(), bits, symmetric, search)
            fits[name].add_done_callback(lambda _: waiting.release())

        with watching(find_layers(dense), fit):
            dense(images)
        return {name: grid.result() for name, grid in fits.items()}


def attach_activation_grids(model: nn.Module, grids: Mapping[str, quant.Grid]) -> None:
    """Make the layers of a model round their inputs; each gets a grid of its own."""
    for name, grid in grids.items():
        quant.set_activation_grid(model.get_submodule(name), copy.deepcopy(grid))
