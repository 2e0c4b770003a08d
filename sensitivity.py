"""What one compressed layer does to the network: losses and output errors per layer and level.

The dynamic programme adds up the layers' errors, so each layer is compared alone, all others dense:

    loss      L(layer at the level) − L(dense)       L: mean cross-entropy on calibration images
    squared   ‖y − ŷ‖² / ‖y‖²                        y: the layer's dense output, ŷ: at the level

A change in a layer leaves everything before it as it was. The model is traced (torch.fx) into a
list of operations; for each batch the dense model runs once, and where it comes to a layer, only
what follows is run for each of the layer's levels, from the values then alive. On average that is
half of a network; nothing but one batch's live values is kept. Levels of a layer that are equal in
all their tensors are run once, those equal to the dense layer not at all. Batch norms behind the
layer are folded into their convolutions, which changes a loss by rounding only. Where operations
work in place, the values alive are put back after each level.
"""

from __future__ import annotations

import hashlib
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

from cli import log
from modelutils import evaluating
from quant import put_layer

if TYPE_CHECKING:
    from database import Database

Batches = Iterable[tuple[Tensor, Tensor]]  # images, labels
Scores = dict[str, dict[str, float]]  # layer → level → value

IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.setitem}


class Resumable(fx.Interpreter):
    """Runs a traced model, from its start or from any of its operations with the values alive."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(fx.symbolic_trace(model))
        self.nodes = list(self.graph.nodes)
        last_use = {user: node for node in self.nodes for user in node.all_input_nodes}
        self.dies_at: dict[fx.Node, list[fx.Node]] = {}
        for value, node in last_use.items():
            self.dies_at.setdefault(node, []).append(value)
        self.in_place = any(self._in_place(node) for node in self.nodes)
        self.folded = self._folded()

    def _in_place(self, node: fx.Node) -> bool:
        """Whether an operation may change a value instead of making a new one."""
        if node.op == "call_module":
            modules = self.module.get_submodule(node.target).modules()
            return any(getattr(module, "inplace", False) for module in modules)
        name = node.target if isinstance(node.target, str) else node.target.__name__
        named = node.op in ("call_method", "call_function") and name.rstrip("_") + "_" == name
        return named or node.target in IN_PLACE or bool(node.kwargs.get("inplace"))

    def _folded(self) -> dict[fx.Node, tuple[nn.Module, fx.Node]]:
        """Convolution → the same with the batch norm behind it folded in, and that batch norm."""
        calls = [node for node in self.nodes if node.op == "call_module"]
        once = Counter(node.target for node in calls)
        folded = {}
        for norm in calls:
            conv = norm.args[0] if norm.args else None
            if conv not in calls or len(conv.users) > 1 or once[conv.target] > 1:
                continue
            modules = [self.module.get_submodule(node.target) for node in (conv, norm)]
            if type(modules[0]) is nn.Conv2d and type(modules[1]) is nn.BatchNorm2d:
                if not modules[1].training and modules[1].running_mean is not None:
                    folded[conv] = (fuse_conv_bn_eval(*modules), norm)
        return folded

    def first_call(self, layer: str) -> int | None:
        """Number of the first operation that calls a layer or a module that it is part of."""
        for number, node in enumerate(self.nodes):
            if node.op in ("call_module", "get_attr"):
                if f"{layer}.".startswith(f"{node.target}.") or node.target.startswith(f"{layer}."):
                    return number
        return None

    def advance(self, values: dict[fx.Node, object], start: int, stop: int) -> None:
        """Run operations start … stop−1 on `values`, in place, as the model does."""
        self.env = values
        for node in self.nodes[start:stop]:
            values[node] = self.run_node(node)
            self._forget(values, node)

    def finish(self, values: dict[fx.Node, object], start: int) -> object:
        """Run operation `start`, as it is, and all that follow, folded; the model's output."""
        self.env, done = values, set()
        for number, node in enumerate(self.nodes[start:]):
            if number and node in self.folded:
                module, norm = self.folded[node]
                values[node] = module(*self.map_nodes_to_values(node.args, node))
                done.add(norm)
            elif node in done:
                values[node] = values[node.args[0]]
            else:
                values[node] = self.run_node(node)
            self._forget(values, node)
        return values[node]

    def _forget(self, values: dict[fx.Node, object], node: fx.Node) -> None:
        for dead in self.dies_at.get(node, ()):
            values.pop(dead, None)

    def kept(self, values: dict[fx.Node, object]) -> Callable[[], None]:
        """A function that puts all values back as they are now."""
        tensors = [value for value in values.values() if isinstance(value, Tensor)]
        if not self.in_place:
            return lambda: None
        copies = [tensor.clone() for tensor in tensors]

        def put_back() -> None:
            for tensor, copy in zip(tensors, copies, strict=True):
                tensor.copy_(copy)

        return put_back

    def images(self, images: Tensor) -> dict[fx.Node, object]:
        """The values before the first operation."""
        self.args_iter: Iterator[object] = iter([images])
        return {}


class Whole:
    """Stands in for `Resumable` where a model cannot be traced: every level runs all of it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def first_call(self, layer: str) -> int | None:
        return 0

    def images(self, images: Tensor) -> dict[str, Tensor]:
        return {"images": images}

    def kept(self, values: dict[str, Tensor]) -> Callable[[], None]:
        return lambda: None

    def advance(self, values: dict[str, Tensor], start: int, stop: int) -> None:
        """Nothing: `finish` does it all."""

    def finish(self, values: dict[str, Tensor], start: int) -> object:
        return self.model(values["images"])


def runner(model: nn.Module) -> Resumable | Whole:
    """The fastest way there is to run a model again and again with one layer changed."""
    try:
        return Resumable(model)
    except Exception as error:  # tracing runs the model's own Python: anything can happen
        log.warning("the model cannot be traced (%s): every level runs all of it", error)
        return Whole(model)


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


def losses(model: nn.Module, db: Database, batches: Batches, device: torch.device) -> Scores:
    """Change of the mean loss with exactly one layer compressed, per layer and level.

    The model is dense, and dense again afterwards.
    """
    with evaluating(model):
        run = runner(model)
        sets = {x: distinct_levels(db, x, model.get_submodule(x)) for x in db.layers}
        sums = {layer: dict.fromkeys((lv for lv in sets[layer] if lv), 0.0) for layer in db.layers}
        images_seen = 0
        total = sum(len(levels) for levels in sums.values()) * _count(batches)
        with tqdm(total=total, desc="loss", leave=False, disable=None) as bar:
            for images, labels in batches:
                changes = batch_changes(run, model, db, sums, _layout(images, device), labels)
                for layer, level, change in changes:
                    sums[layer][level] += change
                    bar.update()
                images_seen += len(images)
    means = {x: {lv: total / images_seen for lv, total in of.items()} for x, of in sums.items()}
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
    model: nn.Module, db: Database, batches: Batches, device: torch.device
) -> Scores:
    """‖y − ŷ‖² / ‖y‖² of every layer's output at every level, its inputs the dense model's."""
    sets = {x: distinct_levels(db, x, model.get_submodule(x)) for x in db.layers}
    errors = {layer: dict.fromkeys((lv for lv in sets[layer] if lv), 0.0) for layer in db.layers}
    energy = dict.fromkeys(db.layers, 0.0)

    def hook(layer: str) -> Callable:
        put = swap_layer(model, db, layer)

        def compare(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            handles[layer].remove()  # the calls below are ours
            energy[layer] += float(output.double().square().sum())
            for level in errors[layer]:
                put(level)
                difference = module(*inputs) - output
                errors[layer][level] += float(difference.double().square().sum())
            put(None)
            handles[layer] = module.register_forward_hook(compare)

        return compare

    handles = {}
    try:
        for layer in db.layers:
            handles[layer] = model.get_submodule(layer).register_forward_hook(hook(layer))
        with evaluating(model):
            for images, _ in tqdm(batches, desc="squared", leave=False, disable=None):
                model(_layout(images, device))
    finally:
        for handle in handles.values():
            handle.remove()
    relative = {
        layer: {level: value / (energy[layer] or 1.0) for level, value in of.items()}
        for layer, of in errors.items()
    }
    return {layer: all_levels(relative[layer], sets[layer], db) for layer in db.layers}


def quadratic_prior(db: Database) -> Scores:
    """SPDY's prior (Frantar and Alistarh 2022, arXiv 2201.13096, section 3): (k / (K−1))² at the
    k-th of K levels, for every layer alike; the search then finds each layer's coefficient."""
    last = max(1, len(db.levels) - 1)
    return {
        layer: {level: (k / last) ** 2 for k, level in enumerate(db.levels)} for layer in db.layers
    }
