"""What one compressed layer does to the network: losses and output errors per layer and level.

The dynamic programme adds up the errors of layers, so each layer is measured alone, with all other
layers dense:

    loss      L(layer at the level) − L(dense)       L: mean loss on calibration images
    squared   ‖y − ŷ‖² / ‖y‖²                        y: the layer's dense output, ŷ: at the level

A change in a layer does not affect what comes before it. For each batch the dense model runs once;
when it reaches a layer, only the rest of the network is run for each of the layer's levels, from
the intermediate values still needed (`tracing.py`). On average that is half of a network, and only
the values of one batch are in memory. Equal levels of a layer are run once, those equal to the
dense layer not at all.

Losses of few images are noisy: a change of the mean over B batches has the standard error s/√B,
with s the standard deviation of the batches' own changes. Squared errors have no such noise.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from statistics import median, stdev
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from modelutils import evaluating, placed
from obc.inputs.batches import Batches
from obc.inputs.tasks import Batch, Inputs, Task, call, on_device
from obc.inputs.tracing import (
    IMAGES_COMPARED,
    TracedModel,
    UntracedModel,
    equal_but_for_rounding,
    resumable,
    whole,
)
from obc.solver.errors import log
from obc.solver.layers import forward_hooks
from obc.solver.progress import progress
from obc.solver.threads import in_pieces
from obc.toolkit.evaluation import CLASSIFICATION
from obc.toolkit.fingerprints import content_hash
from obc.toolkit.leveldb import Database
from obc.toolkit.resume import Notes, RunState
from quant import put_layer

Scores = dict[str, dict[str, float]]  # layer → level → value
ADVICE = "more images (--nsamples) or squared errors tell more"


def distinct_levels(db: Database, layer: str, dense: nn.Module) -> dict[str, list[str]]:
    """The first of each set of equal levels → the set; "" stands for the dense layer."""
    sets: dict[str, list[str]] = {content_hash(dense.state_dict()): [""]}
    hashes = {}

    def hash_levels(piece: slice) -> None:
        for level in db.levels[piece]:
            hashes[level] = content_hash(db.layer(layer, level))

    in_pieces(hash_levels, len(db.levels), 1)
    for level in db.levels:
        sets.setdefault(hashes[level], []).append(level)
    return {names[0]: names for names in sets.values()}


def swap_layer(model: nn.Module, db: Database, layer: str) -> Callable[[str | None], None]:
    """A function that puts a layer at a level, or makes it dense again (None)."""
    module = model.get_submodule(layer)
    dense = {key: tensor.clone() for key, tensor in module.state_dict().items()}

    def put(level: str | None) -> None:
        put_layer(module, dense if level is None else db.layer(layer, level))

    return put


class Measurement:
    """A measurement of all distinct levels of a database, batch by batch, noted as it goes on."""

    def __init__(self, model: nn.Module, db: Database, notes: Notes | None) -> None:
        self.db, self.notes = db, notes or Notes(RunState())
        self.world = self.notes.state.world
        self.sets = {x: distinct_levels(db, x, model.get_submodule(x)) for x in db.layers}
        self.levels = {x: [level for level in sets if level] for x, sets in self.sets.items()}

    def begin(self, total: int, unit: str) -> None:
        """Log what an interrupted run has measured, of what this process has to do."""
        total = sum(self.world.gather(total))
        if self.notes.known:
            log.info("resuming: %d of %d %s are done", len(self.notes.known), total, unit)

    def end(self, values: list) -> list:
        """What all processes have measured, in the order of the batches."""
        while self.notes.collect(False):
            pass  # others have more batches
        return self.world.interleave(values)

    def scores(self, values: Mapping[str, Mapping[str, float]]) -> Scores:
        """Values of the distinct levels, given to all levels that are equal to them."""
        scores = {}
        for layer, sets in self.sets.items():
            equal_to = {level: first for first, names in sets.items() for level in names}
            scores[layer] = {x: values[layer].get(equal_to[x], 0.0) for x in self.db.levels}
        return scores


def losses(
    model: nn.Module,
    db: Database,
    batches: Batches,  # of several processes, each its own: every N-th
    device: torch.device,
    notes: Notes | None = None,  # what an interrupted run has measured
    task: Task = CLASSIFICATION,
) -> Scores:
    """Change of the mean loss with exactly one layer compressed, per layer and level.

    The model is dense, and dense again afterwards. Batches are added in their order, whichever
    process has them.
    """
    measurement, measured = Measurement(model, db, notes), []
    levels, notes, world = measurement.levels, measurement.notes, measurement.world
    steps = len(levels) * batch_count(batches)
    measurement.begin(steps, "layers × batches")
    with evaluating(model), progress("loss", total=steps) as bar:
        run = None
        for number, (images, labels) in enumerate(batches):
            images = placed(images, device)
            run = run or proven(model, db, levels, images)
            key = world.size * number + world.rank
            by_layer = {x: notes.get(f"{key} {x}") for x in levels}
            missing = {x: names for x, names in levels.items() if by_layer[x] is None}
            bar.update(len(levels) - len(missing))
            changes = batch_changes(run, model, db, missing, images, labels, task)
            for layer, by_level in changes if missing else ():
                by_layer[layer] = by_level
                notes.add(f"{key} {layer}", by_level)
                bar.update()
            measured.append((by_layer, len(images)))
            notes.collect(True)
    measured = measurement.end(measured)
    counts = [count for _, count in measured]

    def changes(layer: str, level: str) -> list[float]:  # of the summed loss, by batch
        return [(by_layer[layer] or {}).get(level, 0.0) for by_layer, _ in measured]

    by_batch = {x: {lv: changes(x, lv) for lv in levels[x]} for x in levels}
    log_noise([x for by_level in by_batch.values() for x in by_level.values()], counts)
    return measurement.scores(
        {x: {lv: sum(by_batch[x][lv]) / sum(counts) for lv in levels[x]} for x in levels}
    )


def log_noise(sums: Sequence[Sequence[float]], counts: Sequence[int]) -> None:
    """Say how well changes of the mean loss are known: `sums` of each by batch, and its images."""
    whole_batches = [number for number, count in enumerate(counts) if count == counts[0]]
    if len(whole_batches) < 2 or not sums:
        return
    errors = [
        stdev(by_batch[x] / counts[x] for x in whole_batches) / len(whole_batches) ** 0.5
        for by_batch in sums
    ]
    known = [abs(sum(x)) / sum(counts) >= 2 * error for x, error in zip(sums, errors, strict=True)]
    log.info(
        "standard error of a change of the loss over %d images: %.2g nat (median); %d of %d "
        "changes are less than twice theirs%s",
        sum(counts),
        median(errors),
        known.count(False),
        len(known),
        ""
        if 2 * sum(known) > len(known)
        else ": more images (--nsamples), or squared errors, tell more",
    )


def loss_plan(
    model: nn.Module,
    db: Database,
    batches: Batches,
    device: torch.device,
    task: Task = CLASSIFICATION,
) -> str:
    """What `losses` has to do and how long it takes here, by each layer's last level on a batch."""
    levels, images_and_labels = Measurement(model, db, None).levels, next(iter(batches))
    images, labels = placed(images_and_labels[0], device), images_and_labels[1]
    last, seconds = {x: names[-1:] for x, names in levels.items()}, 0.0
    with evaluating(model):
        run = proven(model, db, last, images)
        started = time.perf_counter()
        for layer, _ in batch_changes(run, model, db, last, images, labels, task):
            seconds += (time.perf_counter() - started) * len(levels[layer])
            started = time.perf_counter()
    count, distinct = batch_count(batches), sum(map(len, levels.values()))
    return (
        f"plan: {distinct} distinct levels of {len(levels)} layers on {count} batches, "
        f"{distinct * count} passes through what follows the layer: about "
        f"{tqdm.format_interval(seconds * count)} on this machine"
    )


def proven(
    model: nn.Module,
    db: Database,
    levels: Mapping[str, Sequence[str]],  # by layer
    images: Inputs,
) -> TracedModel | UntracedModel:
    """The model to resume from its layers, if the outputs of each at its last level are right."""
    run, images = resumable(model, images), images[:IMAGES_COMPARED]
    if isinstance(run, UntracedModel):
        return run
    run.begin(images)
    for calls, layer in layers_in_order(run, levels):
        run.advance(calls[0], calls[-1])
        put = swap_layer(model, db, layer)
        put(levels[layer][-1])
        resumed, plain = run.finish(), call(model, images.clone())
        put(None)
        if not equal_but_for_rounding(resumed, plain):
            return whole(model, f"resumed from {layer}, the model gives other outputs")
    return run


def layers_in_order(
    run: TracedModel | UntracedModel, levels: Mapping[str, Sequence[str]]
) -> list[tuple[list[int], str]]:
    """Calls and names of the layers that have levels and are called, in order of execution."""
    calls = ((run.calls(layer), layer) for layer, names in levels.items() if names)
    return sorted((numbers, layer) for numbers, layer in calls if numbers)


def batch_changes(
    run: TracedModel | UntracedModel,
    model: nn.Module,
    db: Database,
    levels: Mapping[str, Sequence[str]],  # by layer
    images: Inputs,
    batch: Batch,
    task: Task,
) -> Iterator[tuple[str, dict[str, float]]]:  # layer, changes of the summed loss by level
    """Run one batch at every level of every layer, each from where the layer is called.

    A GPU is waited for once a layer, not at each of its levels.
    """
    batch = on_device(batch, images.device)

    run.begin(images)
    dense_loss = summed_loss(task, run.finish(), batch, len(images))
    for calls, layer in layers_in_order(run, levels):
        run.advance(calls[0], calls[-1])
        put, level_losses = swap_layer(model, db, layer), []
        for level in levels[layer]:
            put(level)
            level_losses.append(summed_loss(task, run.finish(), batch, len(images)))
        put(None)
        changes = (torch.stack(level_losses) - dense_loss).tolist()
        yield layer, dict(zip(levels[layer], changes, strict=True))


def summed_loss(task: Task, outputs: Any, batch: Batch, count: int) -> Tensor:  # () float64
    """The loss, summed over the images of a batch; that of scores is computed in float64."""
    return task.summed_loss(outputs.double() if task.logits else outputs, batch, count)


def batch_count(batches: Batches) -> int:
    return len(batches) if hasattr(batches, "__len__") else 1


def squared_errors(
    model: nn.Module,
    db: Database,
    batches: Batches,  # of several processes, each its own: every N-th
    device: torch.device,
    notes: Notes | None = None,  # what an interrupted run has measured
) -> Scores:
    """‖y − ŷ‖² / ‖y‖² of every layer's output at every level, its inputs the dense model's."""
    measurement, measured = Measurement(model, db, notes), []
    levels, notes, world = measurement.levels, measurement.notes, measurement.world
    measurement.begin(batch_count(batches), "batches")
    for number, (images, _) in enumerate(progress("squared", batches)):
        key = str(world.size * number + world.rank)
        if (squares := notes.get(key)) is None:
            squares = batch_squares(model, db, levels, placed(images, device))
            notes.add(key, squares)
        measured.append(squares)
        notes.collect(True)
    measured, relative = measurement.end(measured), {}
    for layer, names in levels.items():
        sums = {lv: sum(squares[layer][lv] for squares in measured) for lv in ["", *names]}
        relative[layer] = {level: sums[level] / (sums[""] or 1.0) for level in names}
    return measurement.scores(relative)


def batch_squares(
    model: nn.Module, db: Database, levels: Mapping[str, Iterable[str]], images: Inputs
) -> dict[str, dict[str, float]]:
    """‖y − ŷ‖² by layer and level, and ‖y‖² by layer and "", over one batch."""
    zero = torch.zeros((), dtype=torch.float64, device=images.device)
    sums = {layer: dict.fromkeys(["", *names], zero) for layer, names in levels.items()}
    swaps = {layer: swap_layer(model, db, layer) for layer in db.layers}
    inputs: dict[str, tuple[tuple, dict]] = {}  # of the layers that are running
    measuring: set[str] = set()

    def keep(layer: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if layer not in measuring:
            inputs[layer] = copy.deepcopy((args, kwargs))  # a layer may work on them in place

    def compare(layer: str, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        if layer in measuring:  # one of the calls below
            return
        measuring.add(layer)
        sums[layer][""] = sums[layer][""] + output.double().square().sum()
        for level in levels[layer]:
            swaps[layer](level)
            args, kwargs = copy.deepcopy(inputs[layer])
            difference = module(*args, **kwargs) - output
            sums[layer][level] = sums[layer][level] + difference.double().square().sum()
        swaps[layer](None)
        measuring.remove(layer)
        del inputs[layer]

    modules = {layer: model.get_submodule(layer) for layer in db.layers}
    with evaluating(model), forward_hooks(modules, compare), ExitStack() as stack:
        for layer, module in modules.items():
            handle = module.register_forward_pre_hook(partial(keep, layer), with_kwargs=True)
            stack.callback(handle.remove)
        call(model, images)
    return {
        layer: dict(zip(by_level, torch.stack([*by_level.values()]).tolist(), strict=True))
        for layer, by_level in sums.items()
    }


def quadratic_prior(db: Database) -> Scores:
    """SPDY's prior (Frantar and Alistarh 2022, arXiv 2201.13096, section 3): (k / (K−1))² at the
    k-th of K levels, for every layer alike; the search then finds each layer's coefficient."""
    last = max(1, len(db.levels) - 1)
    return {
        layer: {level: (k / last) ** 2 for k, level in enumerate(db.levels)} for layer in db.layers
    }
