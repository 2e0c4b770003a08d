"""Calibration: the inputs of the dense model's layers on the calibration images.

OBC (arXiv 2208.11580), sections 3 and 6: Hessians of some or all layers in one pass over all
calibration images, or over this process's share of them; and, for activation quantisation, a grid
for each layer's input, fitted on the first batch.

On a CPU each batch goes through the model and into the products x xᵀ on one thread, several batches
at a time; each layer adds up the products in the order of the batches. So sums do not depend on the
number of threads, only on --batchsize, and threads never wait for each other within a layer.

A layer may be called once for a batch or several times, with images along the first axis of its
input or with tokens, windows or single images. So N in H = (2/N) Σ x xᵀ counts the images that are
shown to the model; Σ, and the grid of a layer's input, are over all calls. Calls without any image
are left out.

Before all this, `prove_layers` compares every layer with its view (`layers.prove`) on a few images.
"""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

import quant
from modelutils import Example, evaluating, example, find_layers, placed
from obc.inputs.batches import Batches, ShardedBatches
from obc.inputs.tasks import Inputs, call
from obc.inputs.tracing import twin
from obc.solver.distributed import ALONE, World
from obc.solver.errors import log
from obc.solver.hessian import CHUNK_BYTES
from obc.solver.layers import PROOF, first_input, forward_hooks, has_own_code, prove, view
from obc.solver.memory import default_memory
from obc.solver.progress import progress
from obc.solver.threads import Turns, one_at_a_thread, one_thread, pool_of
from trueobs import TrueOBS

IMAGES_OF_PROOF = 8
MAPS_IN_MEMORY = 6  # of the size of the widest layer's input, while a model runs


@contextmanager
def watching(layers: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside, `see(name, input)` is called with the input of every call of a layer.

    Calls with empty inputs are left out.
    """

    def see_call(name: str, layer: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        if (x := first_input(args, kwargs)).numel():
            see(name, x)

    with forward_hooks(layers, see_call):
        yield


def prove_layers(
    dense: nn.Module,
    compressed: nn.Module,  # its layers get the proofs of the dense model's
    batches: Batches,
    device: torch.device,
) -> None:
    """Find out which layers do not do what their class says (`layers.prove`), from a few images.

    If a layer with a forward of its own is called by none of them, more batches are shown.
    """
    layers = find_layers(dense)
    unproven = {name for name, layer in layers.items() if has_own_code(layer)}

    def see(name: str, layer: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        if first_input(args, kwargs).numel():
            prove(layer, args, kwargs, output)
            unproven.discard(name)

    images = (images for images, _ in batches)
    with evaluating(dense), forward_hooks(layers, see):
        first = next(images, None)
        if first is not None:
            call(dense, first[:IMAGES_OF_PROOF].to(device, copy=True))
            for more in chain([first], images) if unproven else ():
                call(dense, more.to(device, copy=True))
                if not unproven:
                    break
    for name, layer in find_layers(compressed).items():
        proof = view(layers[name]).proof
        setattr(layer, PROOF, proof)
        if any(proof.paddings.values()):
            log.info("%s: %s pads its input by itself; learned", name, type(layer).__name__)


def calibrate(
    dense: nn.Module,
    solvers: Mapping[str, TrueOBS],  # by the names of layers
    batches: ShardedBatches | list[tuple[Inputs, Any]],  # a list, if there is one shard only
    device: torch.device,
    world: World = ALONE,
    shards: int = 1,  # that a single process goes through
) -> None:
    """Run the dense model on the calibration images; each solver sees its layer's inputs.

    Each of several processes takes a shard of them; sums are then added up over all.
    """
    solvers = {name: solver for name, solver in solvers.items() if not solver.view.left_dense}
    count, called = max(world.size, shards), set()
    with evaluating(dense):
        for number in range(shards) if world.size == 1 else [world.rank]:
            shard = batches.shard(number, count) if count > 1 else batches
            called |= show(dense, solvers, shard, device)
            for solver in solvers.values() if count > 1 else ():
                solver.end_shard()
    for solver in solvers.values() if count > 1 else ():
        solver.combine(world)
    for name in solvers.keys() - set().union(*world.gather(called)):
        solvers[name].nsamples = 0


def show(
    dense: nn.Module,
    solvers: Mapping[str, TrueOBS],
    batches: ShardedBatches | list[tuple[Inputs, Any]],
    device: torch.device,
) -> set[str]:  # layers that were called
    """Run the dense model on batches: on a CPU several at a time, one per thread.

    Every layer adds them up in order, so that its sums do not depend on the threads. The order is
    lost if a batch calls a layer more often than the first images do: one thread starts again then.
    """
    try:
        return show_in_parallel(dense, solvers, batches, device, torch.get_num_threads())
    except CalledAgain:
        for solver in solvers.values():
            solver.gram.restart_shard()
        return show_in_parallel(dense, solvers, batches, device, 1)


class CalledAgain(Exception):
    """A batch calls a layer more often than the first images do."""


def show_in_parallel(
    dense: nn.Module,
    solvers: Mapping[str, TrueOBS],
    batches: ShardedBatches | list[tuple[Inputs, Any]],
    device: torch.device,
    threads: int,  # at most
) -> set[str]:  # layers that were called
    """`show`; raises CalledAgain if several threads cannot keep the order."""
    images = (placed(images, device) for images, _ in progress("calibrating", batches))
    first = next(images, None)
    if first is None:
        return set()
    threads, calls = batches_at_a_time(dense, first, threads)
    turns, mine = Turns(), threading.local()  # a thread's batch, its model, layers it is done with
    called: set[str] = set()
    sizes: list[int] = []  # of batches, in images

    def see(name: str, x: Tensor) -> None:
        if name in mine.done and threads > 1:  # the next batch may be adding by now
            raise CalledAgain
        solvers[name].gram.add(x, lambda: turns.wait(name, mine.number))
        called.add(name)
        if calls[name] == 1:  # so it is the next batch's turn
            mine.done.add(name)
            turns.leave(name, mine.number)

    def work(number: int, batch: Inputs) -> None:
        mine.number, mine.done = number, set()
        if not hasattr(mine, "model"):
            mine.model = twin(dense)
        layers = {name: mine.model.get_submodule(name) for name in solvers}
        with torch.inference_mode(), watching(layers, see):
            call(mine.model, batch)
        for name in solvers.keys() - mine.done:
            turns.leave(name, number)
        sizes.append(len(batch))

    one_at_a_thread(work, chain([first], images), threads, turns)
    for solver in solvers.values():
        solver.nsamples += sum(sizes)
    return called


def batches_at_a_time(
    dense: nn.Module,
    batch: Inputs,  # on the model's device
    most: int,
) -> tuple[int, Counter[str]]:
    """How many batches the memory allows, and how often they call each layer; empty if it is 1."""
    if most == 1 or batch.device.type != "cpu":
        return 1, Counter()
    calls, image_bytes = probe(dense, batch[:2].clone())
    batch_bytes = len(batch) * image_bytes + 3 * CHUNK_BYTES
    return max(1, min(most, default_memory(batch.device) // 2 // batch_bytes)), calls


def probe(model: nn.Module, images: Inputs) -> tuple[Counter[str], int]:
    """How often each layer is called for images, and about how many bytes an image takes."""
    calls, widest = Counter(), 0

    def see(name: str, x: Tensor) -> None:
        nonlocal widest
        calls[name], widest = calls[name] + 1, max(widest, x.nbytes)

    with watching(find_layers(model), see):
        call(model, images)
    return calls, MAPS_IN_MEMORY * widest // len(images)


def calls_of_layers(model: nn.Module, image_shape: Example) -> Counter[str]:
    """How often each layer is called for one image."""
    with evaluating(model):
        return probe(model, example(model, image_shape))[0]


def activation_grids(
    dense: nn.Module,
    images: Inputs,  # one batch, on the model's device
    bits: int,
    symmetric: bool,
    search: bool,
    layer_bits: Mapping[str, int] | None = None,  # of layers that have others
) -> dict[str, quant.Grid]:
    """A grid for the input of every layer that sees the images, over all of its calls."""
    layers = {name: x for name, x in find_layers(dense).items() if not view(x).left_dense}
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}
    fits: dict[str, Future[quant.Grid]] = {}
    threads = torch.get_num_threads() if images.device.type == "cpu" else 1
    waiting = threading.Semaphore(2 * threads)  # bounds the inputs in memory
    with evaluating(dense), pool_of(threads) as submit, one_thread():
        calls, _ = probe(dense, images.clone())

        def fit(name: str, x: Tensor) -> None:
            x = x.clone()  # the model may go on to work in place
            inputs[name].append(x)
            if len(inputs[name]) == calls[name]:
                x = x if calls[name] == 1 else torch.cat([x.flatten() for x in inputs[name]])
                inputs[name].clear()
                waiting.acquire()
                own_bits = (layer_bits or {}).get(name, bits)
                fit_grid = quant.fit_activation_grid
                fits[name] = submit(fit_grid, x.float(), own_bits, symmetric, search)
                fits[name].add_done_callback(lambda _: waiting.release())

        with watching(layers, fit):
            call(dense, images.clone())
        return {name: grid.result() for name, grid in fits.items()}


def attach_activation_grids(model: nn.Module, grids: Mapping[str, quant.Grid]) -> None:
    """Make the layers of a model round their inputs; each gets a copy of its grid."""
    for name, grid in grids.items():
        quant.set_activation_grid(model.get_submodule(name), copy.deepcopy(grid))
