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

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from distributed import ALONE, World
from modelutils import evaluating
from quant import put_layer
from tracing import Resumable, Whole, runner

if TYPE_CHECKING:
    from database import Database

Batches = Iterable[tuple[Tensor, Tensor]]  # images, labels
Scores = dict[str, dict[str, float]]  # layer → level → value

def distinct_levels(db: Database, layer: str, dense: nn.Module) -> dict[str, list[str]]:
    """One level of each set of equal ones → all levels of the set; those equal to dense: ""."""
    sets: dict[bytes, list[str]] = {digest(dense.state_dict()): [""]}
    for level in db.levels:
        sets.setdefault(digest(db.layer(layer, level)), []).append(level)
    return {names[0]: names for names in sets.values()}


def digest(tensors: Mapping[str, Tensor]) -> bytes:
    """A short name for the contents of some tensors."""
    content = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        content.update(key.encode())
        content.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return content.digest()


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
    world: World = ALONE,
) -> Scores:
    """Change of the mean loss with exactly one layer compressed, per layer and level.

    The model is dense, and dense again afterwards. Batches are added in their order, whichever
    process they are with.
    """
    found = []
    with evaluating(model):
        run = runner(model)
        sets = {x: distinct_levels(db, x, model.get_submodule(x)) for x in db.layers}
        wanted = {layer: [level for level in sets[layer] if level] for layer in db.layers}
        total = sum(map(len, wanted.values())) * _count(batches)
        with tqdm(total=total, desc="loss", leave=False, disable=None) as bar:
            for images, labels in batches:
                changes = {}
                each = batch_changes(run, model, db, wanted, _layout(images, device), labels)
                for layer, level, change in each:
                    changes[layer, level] = change
                    bar.update()
                found.append((changes, len(images)))
    found = world.interleave(found)
    images_seen = sum(count for _, count in found)
    means = {
        layer: {lv: sum(of.get((layer, lv), 0.0) for of, _ in found) / images_seen for lv in levels}
        for layer, levels in wanted.items()
    }
    return {layer: all_levels(means[layer], sets[layer], db) for layer in db.layers}


def batch_changes(
    run: Resumable | Whole,
    model: nn.Module,
    db: Database,
    wanted: Mapping[str, Iterable[str]],  # layer → levels
    images: Tensor,
    labels: Tensor,
) -> Iterator[tuple[str, str, float]]:  # layer, level, change of the summed loss
    """Run one batch at every level of every layer, each from where the layer is called."""
    labels = labels.to(images.device)
    calls = {layer: run.first_call(layer) for layer in wanted}
    dense_loss = _loss(run.finish(run.images(images.clone()), 0), labels)
    values, at = run.images(images), 0
    for number, layer in sorted((n, layer) for layer, n in calls.items() if n is not None):
        run.advance(values, at, number)
        at = number
        put, put_back = swap_layer(model, db, layer), run.kept(values)
        for level in wanted[layer]:
            put(level)
            change = _loss(run.finish(dict(values), number), labels) - dense_loss
            put_back()
            yield layer, level, change
        put(None)


def _layout(images: Tensor, device: torch.device) -> Tensor:
    on_cpu = torch.device(device).type == "cpu"
    layout = torch.channels_last if on_cpu else torch.contiguous_format
    return images.to(device, memory_format=layout)


def _count(batches: Batches) -> int:
    return len(batches) if hasattr(batches, "__len__") else 1


def _loss(outputs: object, labels: Tensor) -> float:
    return float(F.cross_entropy(outputs.double(), labels, reduction="sum"))


def squared_errors(
    model: nn.Module,
    db: Database,
    batches: Batches,  # of several processes, each its own: every N-th
    device: torch.device,
    world: World = ALONE,
) -> Scores:
    """‖y − ŷ‖² / ‖y‖² of every layer's output at every level, its inputs the dense model's."""
    sets = {x: distinct_levels(db, x, model.get_submodule(x)) for x in db.layers}
    sums: dict[tuple[str, str], float] = {}  # layer and level ("": ‖y‖²), of one batch

    def hook(layer: str) -> Callable:
        put = swap_layer(model, db, layer)

        def compare(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            handles[layer].remove()  # the calls below are ours
            add(layer, "", output)
            for level in filter(None, sets[layer]):
                put(level)
                add(layer, level, module(*inputs) - output)
            put(None)
            handles[layer] = module.register_forward_hook(compare)

        return compare

    def add(layer: str, level: str, x: Tensor) -> None:
        sums[layer, level] = sums.get((layer, level), 0.0) + float(x.double().square().sum())

    handles, found = {}, []
    try:
        for layer in db.layers:
            handles[layer] = model.get_submodule(layer).register_forward_hook(hook(layer))
        with evaluating(model):
            for images, _ in tqdm(batches, desc="squared", leave=False, disable=None):
                model(_layout(images, device))
                found.append(dict(sums))
                sums.clear()
    finally:
        for handle in handles.values():
            handle.remove()
    return _relative(world.interleave(found), sets, db)


def _relative(
    found: list[dict[tuple[str, str], float]], sets: dict[str, dict[str, list[str]]], db: Database
) -> Scores:
    """Errors over all batches, relative to the layers' outputs."""
    scores = {}
    for layer in db.layers:
        total = {lv: sum(of.get((layer, lv), 0.0) for of in found) for lv in {"", *sets[layer]}}
        energy = total.pop("") or 1.0
        relative = {level: value / energy for level, value in total.items()}
        scores[layer] = all_levels(relative, sets[layer], db)
    return scores


def quadratic_prior(db: Database) -> Scores:
    """SPDY's prior (Frantar and Alistarh 2022, arXiv 2201.13096, section 3): (k / (K−1))² at the
    k-th of K levels, for every layer alike; the search then finds each layer's coefficient."""
    last = max(1, len(db.levels) - 1)
    return {
        layer: {level: (k / last) ** 2 for k, level in enumerate(db.levels)} for layer in db.layers
    }
