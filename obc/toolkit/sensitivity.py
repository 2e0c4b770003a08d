"""What one compressed layer does to the network: losses and output errors per layer and level.

The dynamic programme adds up the layers' errors, so each layer is compared alone, all others dense:

    loss      L(layer at the level) − L(dense)       L: mean cross-entropy on calibration images
    squared   ‖y − ŷ‖² / ‖y‖²                        y: the layer's dense output, ŷ: at the level

A change in a layer leaves everything before it as it was. For each batch the dense model runs once,
and where it comes to a layer, only what follows is run for each of the layer's levels, from the
values then alive (`tracing.py`). On average that is half of a network; nothing but one batch's live
values is kept. Levels of a layer that are equal in all their tensors are run once, those equal to
the dense layer not at all. Where operations work in place, the values alive are put back after each
level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from modelutils import evaluating, placed
from obc.inputs.tracing import Resumable, Whole, runner
from obc.solver.errors import log
from obc.solver.threads import in_pieces
from obc.toolkit.fingerprints import content_hash
from obc.toolkit.leveldb import Database
from obc.toolkit.resume import Notes, RunState
from quant import put_layer

Batches = Iterable[tuple[Tensor, Tensor]]  # images, labels
Scores = dict[str, dict[str, float]]  # layer → level → value


def distinct_levels(db: Database, layer: str, dense: nn.Module) -> dict[str, list[str]]:
    """One level of each set of equal ones → all levels of the set; those equal to dense: ""."""
    sets: dict[str, list[str]] = {content_hash(dense.state_dict()): [""]}
    hashes = {}

    def work(part: slice) -> None:
        for level in db.levels[part]:
            hashes[level] = content_hash(db.layer(layer, level))

    in_pieces(work, len(db.levels), 1)
    for level in db.levels:
        sets.setdefault(hashes[level], []).append(level)
    return {names[0]: names for names in sets.values()}


def all_levels(
    values: Mapping[str, float], sets: Mapping[str, list[str]], db: Database
) -> dict[str, float]:
    """Values of distinct levels, given to all levels of each set, in the database's order."""
    of = {name: values.get(one, 0.0) for one, names in sets.items() for name in names}
    return {level: of[level] for level in db.levels}


def swap_layer(model: nn.Module, db: Database, layer: str) -> Callable[[str | None], None]:
    """A function that puts a layer at a level, or makes it dense again (None)."""
    module = model.get_submodule(layer)
    dense = {key: tensor.clone() for key, tensor in module.state_dict().items()}

    def put(level: str | None) -> None:
        put_layer(module, dense if level is None else db.layer(layer, level))

    return put


def losses(
    model: nn.Module,
    db: Database,
    batches: Batches,  # of several processes, each its own: every N-th
    device: torch.device,
    notes: Notes | None = None,  # of what an interrupted run has measured
) -> Scores:
    """Change of the mean loss with exactly one layer compressed, per layer and level.

    The model is dense, and dense again afterwards. Batches are added in their order, whichever
    process they are with.
    """
    notes = notes or Notes(RunState())
    world, found = notes.state.world, []
    with evaluating(model):
        run = runner(model)
        sets = {x: distinct_levels(db, x, model.get_submodule(x)) for x in db.layers}
        levels = {layer: [level for level in of if level] for layer, of in sets.items()}
        _say_what_is_known(notes, len(db.layers) * _count(batches), "layers × batches")
        with tqdm(
            total=len(levels) * _count(batches), desc="loss", leave=False, disable=None
        ) as bar:
            for number, (images, labels) in enumerate(batches):
                key = world.size * number + world.rank
                known = {x: notes.get(f"{key} {x}") for x in levels}
                wanted = {x: of for x, of in levels.items() if known[x] is None}
                bar.update(len(levels) - len(wanted))
                changes = batch_changes(run, model, db, wanted, placed(images, device), labels)
                for layer, of_levels in changes if wanted else ():
                    known[layer] = of_levels
                    notes.add(f"{key} {layer}", of_levels)
                    bar.update()
                found.append((known, len(images)))
                notes.collect(True)
        while notes.collect(False):
            pass  # others have more batches
    found = world.interleave(found)
    images_seen = sum(count for _, count in found)
    means = {
        layer: {
            lv: sum((of[layer] or {}).get(lv, 0.0) for of, _ in found) / images_seen
            for lv in of_layer
        }
        for layer, of_layer in levels.items()
    }
    return {layer: all_levels(means[layer], sets[layer], db) for layer in db.layers}


def _say_what_is_known(notes: Notes, total: int, what: str) -> None:
    total = sum(notes.state.world.gather(total))
    if notes.known:
        log.info("resuming: %d of %d %s are done", len(notes.known), total, what)


def batch_changes(
    run: Resumable | Whole,
    model: nn.Module,
    db: Database,
    wanted: Mapping[str, Iterable[str]],  # layer → levels
    images: Tensor,
    labels: Tensor,
) -> Iterator[tuple[str, dict[str, float]]]:  # layer, changes of the summed loss by level
    """Run one batch at every level of every layer, each from where the layer is called."""
    labels = labels.to(images.device)
    calls = {layer: run.first_call(layer) for layer in wanted}
    dense_loss = _loss(run.finish(run.images(images.clone()), 0), labels)
    values, at = run.images(images), 0
    for number, layer in sorted((n, layer) for layer, n in calls.items() if n is not None):
        run.advance(values, at, number)
        at = number
        put, put_back, changes = swap_layer(model, db, layer), run.kept(values), {}
        first = run.calling(values, number)
        for level in wanted[layer]:
            put(level)
            changes[level] = _loss(run.finish(dict(values), number, first), labels) - dense_loss
            put_back()
        put(None)
        yield layer, changes


def _count(batches: Batches) -> int:
    return len(batches) if hasattr(batches, "__len__") else 1


def _loss(outputs: object, labels: Tensor) -> float:
    return float(F.cross_entropy(outputs.double(), labels, reduction="sum"))


def squared_errors(
    model: nn.Module,
    db: Database,
    batches: Batches,  # of several processes, each its own: every N-th
    device: torch.device,
    notes: Notes | None = None,  # of what an interrupted run has measured
) -> Scores:
    """‖y − ŷ‖² / ‖y‖² of every layer's output at every level, its inputs the dense model's."""
    notes = notes or Notes(RunState())
    sets = {x: distinct_levels(db, x, model.get_submodule(x)) for x in db.layers}
    levels = {layer: [level for level in of if level] for layer, of in sets.items()}
    _say_what_is_known(notes, _count(batches), "batches")
    world, found = notes.state.world, []
    for number, (images, _) in enumerate(tqdm(batches, desc="squared", leave=False, disable=None)):
        key = str(world.size * number + world.rank)
        if (of_batch := notes.get(key)) is None:
            of_batch = batch_squares(model, db, levels, placed(images, device))
            notes.add(key, of_batch)
        found.append(of_batch)
        notes.collect(True)
    while notes.collect(False):
        pass  # others have more batches
    found, scores = world.interleave(found), {}
    for layer, of_layer in levels.items():
        sums = {lv: sum(of[layer][lv] for of in found) for lv in ["", *of_layer]}
        relative = {level: sums[level] / (sums[""] or 1.0) for level in of_layer}
        scores[layer] = all_levels(relative, sets[layer], db)
    return scores


def batch_squares(
    model: nn.Module, db: Database, levels: Mapping[str, Iterable[str]], images: Tensor
) -> dict[str, dict[str, float]]:
    """‖y − ŷ‖² by layer and level, and ‖y‖² by layer and "", over one batch."""
    sums = {layer: dict.fromkeys(["", *of], 0.0) for layer, of in levels.items()}
    handles = {}

    def hook(layer: str) -> Callable:
        put = swap_layer(model, db, layer)

        def compare(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            handles[layer].remove()  # the calls below are ours
            sums[layer][""] += float(output.double().square().sum())
            for level in levels[layer]:
                put(level)
                difference = module(*inputs) - output
                sums[layer][level] += float(difference.double().square().sum())
            put(None)
            handles[layer] = module.register_forward_hook(compare)

        return compare

    try:
        for layer in db.layers:
            handles[layer] = model.get_submodule(layer).register_forward_hook(hook(layer))
        with evaluating(model):
            model(images)
    finally:
        for handle in handles.values():
            handle.remove()
    return sums


def quadratic_prior(db: Database) -> Scores:
    """SPDY's prior (Frantar and Alistarh 2022, arXiv 2201.13096, section 3): (k / (K−1))² at the
    k-th of K levels, for every layer alike; the search then finds each layer's coefficient."""
    last = max(1, len(db.levels) - 1)
    return {
        layer: {level: (k / last) ** 2 for k, level in enumerate(db.levels)} for layer in db.layers
    }
