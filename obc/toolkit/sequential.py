"""Layers compressed in order of execution, each to make up for those before it (--sequential).

`Compression` treats each layer as if all others were dense. Here a layer sees x̂, what the
*compressed* network gives it, and should return y, what the *dense* network's layer does. The
solver gets H = (2/N) Σ x̂ x̂ᵀ, and the weights W' that map x̂ to y best (`shift.py`) in place of W.

Both networks are walked once, as lists of operations (`tracing.py`). Between two layers there is a
boundary: for each batch, the values of either network that later operations need.

    dense       ──────────── y ┐                        ┌───────────
                               ├─▶ H, B ─▶ W' ─▶ Ŵ      │ first call of the next layer
    compressed  ──────────── x̂ ┘           └─▶ from the boundary on with Ŵ ──

A layer that is called several times has one boundary, at its first call. From there the compressed
network runs ahead to the last call, with the weights that its layers have now; H and B are summed
over the calls. Then it goes back to the boundary.

Boundaries are in memory as far as --memory allows, the others in files that are removed. A model
that cannot be traced is one operation: its boundaries are the images, and each layer takes a pass
of both networks over them. On a CPU each batch is on one thread, several batches at a time, and is
added to the sums in order, so that these do not depend on the number of threads.

Of several processes (`distributed.py`) each walks its shard of the images; the sums are added up,
and all of them solve a share of the layer's rows.

An interrupted run continues after the last layer it has finished; boundaries are computed again.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

import quant
from modelutils import eval_mode, evaluating, placed
from obc.inputs.batches import Batches
from obc.inputs.tasks import Inputs
from obc.inputs.tracing import IMAGES_COMPARED, twin
from obc.solver.distributed import ALONE, World
from obc.solver.errors import UserError, log
from obc.solver.hessian import Gram
from obc.solver.layers import view
from obc.solver.memory import default_memory
from obc.solver.progress import progress
from obc.solver.shift import Cross, output_error, ridge_of, shifted_weights
from obc.solver.threads import Turns, give_back_freed_memory, one_at_a_thread, one_thread
from obc.toolkit.calibrate import batches_at_a_time, probe
from obc.toolkit.compress import Compression, LayerReport, compress_layer, naming_layer
from obc.toolkit.planning import Plan, needs_of, why_dense
from obc.toolkit.resume import Entry
from obc.toolkit.walks import (
    LastCall,
    Walk,
    WholeWalk,
    inputs_of,
    outputs_of,
    outputs_of_layers,
    walk_of,
)
from trueobs import TrueOBS

ACTIVATIONS = "activations-"  # begins the names of folders of boundaries
IMAGES_CHECKED = 8  # at a time: the outputs of all layers of both networks are in memory

# -- boundaries ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """The value of a batch, taken apart."""

    leaves: list[Any]
    structure: TreeSpec
    tensors: list[int]  # places of the leaves that are tensors
    size: int  # bytes of these
    file: Path | None  # where they are; None: in memory


class Boundary:
    """A value for each batch: tensors in memory up to a budget, the others in files."""

    def __init__(self, budget: int, folder: Path) -> None:
        self.budget, self.folder = budget, folder
        self.size = 0  # bytes in memory
        self._kept: dict[int, Kept] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, number: int, value: Any) -> None:
        """Keep the value of a batch."""
        leaves, structure = tree_flatten(value)
        places = [place for place, leaf in enumerate(leaves) if torch.is_tensor(leaf)]
        storages = [leaves[place].untyped_storage() for place in places]
        size = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
        with self._lock:
            file = None if self.size + size <= self.budget else self.folder / f"{number}.pt"
            self.size += 0 if file else size
        if file:
            torch.save([leaves[place] for place in places], file)
            for place in places:
                leaves[place] = None
        self._kept[number] = Kept(leaves, structure, places, size, file)

    def take(self, number: int) -> Any:
        """The value of a batch, which is not kept any longer."""
        kept = self._kept.pop(number)
        if kept.file is None:
            with self._lock:
                self.size -= kept.size
        else:
            tensors = torch.load(kept.file, weights_only=True)
            for place, tensor in zip(kept.tensors, tensors, strict=True):
                kept.leaves[place] = tensor
        return tree_unflatten(kept.leaves, kept.structure)


# -- both networks ---------------------------------------------------------------------------------


@dataclass
class Sums:
    """What is summed over all calls of a layer for a number of images."""

    gram: Tensor  # Σ x̂ x̂ᵀ (G, d, d)
    cross: Tensor  # Σ y x̂ᵀ (G, rows/G, d)
    energy: Tensor  # Σ ‖y‖² ()
    images: int
    patches: int

    def add(self, other: Sums) -> None:
        """Add the sums over other images."""
        self.gram += other.gram
        self.cross += other.cross
        self.energy += other.energy
        self.images += other.images
        self.patches += other.patches

    def combine(self, world: World) -> None:
        """Add up the sums of all processes."""
        for tensor in (self.gram, self.cross, self.energy):
            world.sum_in_order(tensor)
        self.images = sum(world.gather(self.images))
        self.patches = sum(world.gather(self.patches))

    def statistics(self) -> tuple[Tensor, Tensor, float]:
        """H, B and C of `shift.py`; the sums are given up."""
        scale = 2 / self.images
        return self.gram.mul_(scale), self.cross.mul_(scale), scale * float(self.energy)


class DoubleWalk:
    """The dense and the compressed network, both in eval mode, side by side on all batches."""

    def __init__(
        self,
        dense: nn.Module,
        compressed: nn.Module,
        batches: Batches,
        boundary: Boundary,
        world: World = ALONE,
        shards: int = 1,  # of the images; of several processes each has one
    ) -> None:
        self.networks, self.batches, self.boundary = (dense, compressed), batches, boundary
        self.device, self.world = next(dense.parameters()).device, world
        self.shard_count = count = max(world.size, shards)
        mine = range(count) if world.size == 1 else [world.rank]
        self.shards = {x: batches.shard(x, count) if count > 1 else batches for x in mine}
        self.batch_sizes: dict[int, list[int]] = {}  # of shards that have been seen, in images
        first = placed(next(iter(batches))[0], self.device)
        with torch.inference_mode():
            started = time.perf_counter()
            self.calls, _ = probe(dense, first.clone())  # in order of execution
            self.repeated = {name for name, count in self.calls.items() if count > 1}
            seconds = time.perf_counter() - started
            self.pass_s = 2 * seconds * sum(map(len, self.shards.values()))
            self.walk = walk_of(dense, first[:IMAGES_COMPARED])
            self.threads, _ = batches_at_a_time(dense, first, torch.get_num_threads())
            if isinstance(self.walk, WholeWalk):  # other images may call other layers
                calls = Counter()
                for images, _ in chain.from_iterable(self.shards.values()):
                    calls += probe(dense, placed(images, self.device))[0]
                self.calls = sum(world.gather(calls), self.calls)
        self.places = {name: self.walk.calls(name) for name in self.calls}

    def layers(self) -> list[str]:
        """The layers that are called, in order of execution."""
        return sorted(self.calls, key=lambda name: self.places[name][0])

    def sums(
        self,
        name: str,
        layer: nn.Module,  # compressed
        next_layer: str | None,  # the dense network may go on as far as its first call
    ) -> Sums:
        """Move the boundary to a layer's first call, and sum over all of its calls."""
        parts = (self._sums_of(shard, name, layer, next_layer) for shard in self.shards)
        sums = next(parts)
        for part in parts:
            sums.add(part)
        sums.combine(self.world)
        return sums

    def _sums_of(self, shard: int, name: str, layer: nn.Module, next_layer: str | None) -> Sums:
        """`sums` over one shard of the images."""
        gram, cross, turns, mine = Gram(layer), Cross(layer), Turns(), threading.local()
        first, last = self._span(name)
        stop = min(last + 1, self._span(next_layer)[0] if next_layer else last + 1)

        def work(number: int, images: Inputs | None) -> None:
            if not hasattr(mine, "walks"):
                mine.walks = self._walks()
            dense, compressed = mine.walks
            outputs: list[Tensor] = []

            def wait() -> None:
                turns.wait(name, number)

            def add(x: Tensor) -> None:
                gram.add(x, wait)
                cross.add(x, outputs.pop(0), wait)

            with torch.inference_mode():
                batch = number * self.shard_count + shard  # its number among all
                self._go_on(mine.walks, batch, images, first)
                with outputs_of(dense.module.get_submodule(name), outputs):
                    dense.run_to(stop)
                    if stop <= last:
                        dense.run_ahead(last + 1)
                self._see_inputs(compressed, name, add, len(outputs))
                self.boundary.put(batch, [walk.leave() for walk in mine.walks])
            turns.leave(name, number)

        one_at_a_thread(work, self._batches(shard), self.threads, turns)
        images = sum(self.batch_sizes[shard])
        return Sums(gram.take(), cross.take(), cross.energy, images, gram.patches)

    def first_inputs(self, name: str) -> list[Tensor]:  # (values,) each
        """What the compressed network gives a layer for the first batch, a tensor for each call."""
        inputs: list[Tensor] = []

        def see(x: Tensor) -> None:
            inputs.append(x.flatten().to(torch.float32, copy=True))  # it may be overwritten

        count = None if isinstance(self.walk, WholeWalk) else self.calls[name]
        kept = len(self.boundary) > 0
        images = None if kept else placed(next(iter(self.batches))[0], self.device)
        with torch.inference_mode(), one_thread():
            walks = self._walks()
            self._go_on(walks, 0, images, self._span(name)[0])
            self._see_inputs(walks[1], name, see, count)
            if kept:
                self.boundary.put(0, [walk.leave() for walk in walks])
        return inputs

    def _walks(self) -> list[Walk | WholeWalk]:
        """Both networks, for one thread."""
        return [type(self.walk)(twin(model), self.walk) for model in self.networks]

    def _span(self, name: str) -> tuple[int, int]:
        """A layer's first and its last operation."""
        return self.places[name][0], self.places[name][-1]

    def _batches(self, shard: int) -> Iterator[Inputs | None]:
        """Images to begin with; later, nothing but their number is needed."""
        if shard in self.batch_sizes:
            yield from [None] * len(self.batch_sizes[shard])
            return
        sizes = []
        for images, _ in self.shards[shard]:
            sizes.append(len(images))
            yield placed(images, self.device)
        self.batch_sizes[shard] = sizes

    def _go_on(
        self, walks: list[Walk | WholeWalk], number: int, images: Inputs | None, place: int
    ) -> None:
        """Both networks to an operation, from the boundary or from images."""
        if images is None:
            for walk, left in zip(walks, self.boundary.take(number), strict=True):
                walk.resume(*left)
        else:
            for walk in walks:
                walk.begin(images)
        for walk in walks:
            walk.run_to(place)

    def _see_inputs(
        self,
        walk: Walk | WholeWalk,
        name: str,
        see: Callable[[Tensor], None],
        count: int | None,  # None: however many there are
    ) -> None:
        """Show the inputs of `count` calls of a layer; the network stays at the first."""
        if count == 0:
            return
        (first, last), seen = self._span(name), 0

        def see_and_count(x: Tensor) -> None:
            nonlocal seen
            see(x)
            seen += 1
            if seen == count:
                raise LastCall

        with suppress(LastCall), inputs_of(walk.module.get_submodule(name), see_and_count):
            if walk.only_runs(name, first, last):
                walk.run_to(last + 1)  # which ends before the layer has done anything
            else:
                walk.run_ahead(last + 1)
        if count and seen < count:
            raise UserError(
                f"{name} is called {seen} times by the compressed network, {count} times by the "
                "dense one: leave out --sequential or --resolve"
            )


# -- the layers ------------------------------------------------------------------------------------


@dataclass
class SequentialCompression(Compression):
    """The layers of a model on their way from dense to compressed, in order of execution."""

    in_order: ClassVar[bool] = True

    def run(self, batches: Batches) -> list[LayerReport]:
        """Compress one layer after the other."""
        with self._walking(batches) as self.walk:
            called = self.walk.layers()
            names = [*(name for name in self.layers if name not in called), *called]
            self.layers = {name: self.layers[name] for name in names}
            return super().run(batches)

    def fit_grids(self, batches: Batches) -> None:
        """Give layers grids for their inputs, and leave their weights as they are."""
        with self._walking(batches) as walk:
            for name in walk.layers():
                if not view(self.layers[name]).left_dense:
                    self._fit_grid(walk, name)

    def measured_errors(self, batches: Batches) -> dict[str, float]:
        """Mean over images of ‖y − ŷ‖² for every layer, in one pass over the images.

        y and ŷ are its outputs in the dense and in the compressed network, without the bias. A
        layer that is called several times changes its own later inputs, so it has no one error.
        """
        count, sums = 0, {name: 0.0 for name in self.results if name not in self.walk.repeated}
        for name in self.results.keys() - sums.keys():
            log.info("%s is called several times: not checked", name)
        device = next(self.dense.parameters()).device
        with evaluating(self.dense), evaluating(self.compressed):
            for images, _ in progress("checking", batches):
                for piece in placed(images, device).split(IMAGES_CHECKED):
                    theirs, ours = (
                        outputs_of_layers(model, sums, piece)
                        for model in (self.dense, self.compressed)
                    )
                    for name in sums:
                        for y, made in zip(theirs[name], ours[name], strict=True):
                            sums[name] += float((y - made).double().square().sum())
                count += len(images)
        return {name: total / count for name, total in sums.items()}

    @contextmanager
    def _walking(self, batches: Batches) -> Iterator[DoubleWalk]:
        """Both networks at their beginning. Files of boundaries are gone afterwards."""
        device, folder = next(self.dense.parameters()).device, self.state.folder
        memory = int(self.memory_gb * 1e9) if self.memory_gb else default_memory(device)
        needs = (needs_of(x, self.mode_of(name)) for name, x in self.layers.items())
        solving = max(x.least for x in needs)
        if folder and self.world.first:
            for leftover in folder.glob(f"{ACTIVATIONS}*"):  # of a killed run
                shutil.rmtree(leftover, ignore_errors=True)
        self.world.meet()
        with (
            eval_mode(self.dense),
            eval_mode(self.compressed),
            TemporaryDirectory(dir=folder, prefix=ACTIVATIONS) as files,
        ):
            boundary = Boundary(max(0, min(memory // 2, memory - solving)), Path(files))
            networks = self.dense, self.compressed
            yield DoubleWalk(*networks, batches, boundary, self.world, self.shards)

    def _fit_grid(self, walk: DoubleWalk, name: str) -> None:
        layer, mode = self.layers[name], self.mode_of(name)
        if not mode.rounds_inputs:
            return
        layer._modules.pop(quant.ACTIVATION_GRID, None)  # that of --load
        grid = None
        if self.world.first and (inputs := walk.first_inputs(name)):
            grid = mode.activation_grid(torch.cat(inputs))
        if grid := self.world.share(grid):
            quant.set_activation_grid(layer, grid.to(layer.weight.device))

    def _run(self, plan: Plan, batches: Batches) -> None:
        solved, calls = [], self.walk.calls
        with self._progress() as bar:
            for name in [name for name in self.layers if name not in self.reports]:
                layer, mode = self.layers[name], self.mode_of(name)
                shifts = mode.shift_dense and calls[name] and not view(layer).left_dense
                if shifts or not why_dense(layer, mode, calls[name]):
                    solved.append(name)
                else:
                    self._finish(name, self._left_dense(name, calls[name]), bar)
            if isinstance(self.walk.walk, WholeWalk):
                log.warning(
                    "each of %d layers takes a pass of both networks over all images, up to %.2g s",
                    len(solved),
                    self.walk.pass_s,
                )
            for name, next_name in zip(solved, [*solved[1:], None], strict=True):
                self._fit_grid(self.walk, name)
                sums = self.walk.sums(name, self.layers[name], next_name)
                with naming_layer(name):
                    self._finish(name, self._solved(plan, name, sums), bar)
                give_back_freed_memory()

    def _left_dense(self, name: str, calls: int) -> Entry:
        solver = TrueOBS(self.layers[name])
        solver.nsamples = calls
        return compress_layer(name, solver, self.mode_of(name), None)

    def _solved(self, plan: Plan, name: str, sums: Sums) -> Entry:
        """A layer compressed, with the error of its outputs."""
        layer, mode = self.layers[name], self.mode_of(name)
        if not sums.patches:
            return self._left_dense(name, 0)
        H, B, C = sums.statistics()
        start = mode.start(layer, self.dense.get_submodule(name))
        shifted = shifted_weights(start, H, B, ridge_of(H.shape[1], sums.patches))
        view(layer).write(shifted)
        memory = plan.memory - self.walk.boundary.size - B.nbytes
        world, owner = plan.sharing(name, self.world), plan.owners[name]
        solver = TrueOBS(layer, self.rel_damp, memory, world, mode.order)
        solver.set_hessian(H, sums.images)
        solver.gram.patches = sums.patches
        entry = None
        if owner in (None, self.world.rank):
            entry = compress_layer(name, solver, mode, None, self.repeats)
        if owner is not None and (entry := self.world.share(entry)).tensors:
            quant.put_layer(layer, entry.tensors)
        error, report = output_error(view(layer).matrix, H, B, C), entry.figures["report"]
        report["squared_error"], report["relative_error"] = error, 2 * error / C if C else 0.0
        if report["dense"]:
            report["shifted"] = True
            entry.tensors.update({key: x.detach().cpu() for key, x in layer.state_dict().items()})
        return entry
