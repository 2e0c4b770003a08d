"""Databases of levels: every layer of a model at every level, and models stitched from them.

OBC (arXiv 2208.11580), section 4, "non-uniform compression": a database holds each layer of a model
at many levels of compression; a profile names a level for each layer; stitching puts the model
together.

    kind         files, a full state dict each                     level
    unstr        models_unstr/<model>_<level>.pth                  sparsity × 10⁴, 0000 … 9900
    4block       models_4block/<model>_<level>.pth                 the same
    4block_8w8a  models_4block_8w8a/<model>_<level>.pth            the same
    struct       models_struct/<model>_<level>.pth                 the same
    struct_8w8a  models_struct_8w8a/<model>_<level>.pth            the same
    mixed        models_quant/<model>_<level>.pth and              8w8a, 4w4a, …
                 models_nm_quant/<model>_<level>.pth               24_8w8a, 24_4w4a, …

A level is the part of a file name between the model's name and the suffix: to add a level, add a
file. Files are mapped into memory (.safetensors are read), so that opening a database reads only
names and shapes, and stitching only the layers that it stitches. Bits and zeros of a level are read
from its tensors.

A layer's levels are only right in the network that they were made of. Each file carries a hash of
the dense weights; a file without one is compared with the model by the tensors that compression
never changes (`Database.check`).

While main_trueobs.py makes a database, each layer has a file of its own (`LevelFile`), written a
few rows at a time and read a level at a time:

    levels × rows × d numbers, and nothing else: level after level, row after row

All levels of a layer together can be many times the layer: they are on disk as soon as they are
made, and never in memory at once. Several processes may write their rows into one file.
"""

from __future__ import annotations

import glob
import hashlib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import quant
from obc.inputs.attention import SplitAttention, layer_names
from obc.inputs.checkpoints import check_finite, checkpoint_marks, load_checkpoint
from obc.inputs.files import save_checkpoint, sync_folder
from obc.inputs.names import named_like
from obc.solver.errors import UserError, log
from obc.solver.layers import LayerView, compressible, view
from obc.toolkit.fingerprints import bytes_hash, content_hash, weights_hash
from obc.toolkit.kinds import KINDS, SPARSITY, unit_cost
from obc.toolkit.modes import modes_serving
from obc.toolkit.resume import entry_file
from quant import ACTIVATION_GRID, WEIGHT_GRID, put_layer

GRIDS = (WEIGHT_GRID, ACTIVATION_GRID)
SUFFIXES = (".pth", ".safetensors")
HASHED_BYTES = 1 << 20  # at a time
DENSE_WEIGHTS = "dense weights"  # the mark in a file: a hash of what it was made of


# -- levels and their names ------------------------------------------------------------------------


def model_tag(model: str) -> str:
    """MODEL as a part of file names: for path/to/file.py:function, the function.

    >>> model_tag("nets/mine.py:small_net"), model_tag("rn18")
    ('small_net', 'rn18')
    """
    return model.rpartition(":")[2]


def level_name(sparsity: float) -> str:
    """A sparsity in [0, 1) as a level's name.

    >>> level_name(0.19)
    '1900'
    """
    return f"{round(sparsity * 10_000):04d}"


def level_names(sparsities: Sequence[float]) -> list[str]:
    """The names of a grid of sparsities; raises UserError if two would get the same one."""
    names = [level_name(sparsity) for sparsity in sparsities]
    if "10000" in names:
        raise UserError("a sparsity above 0.9999 has no name; choose a smaller --max-sparsity")
    if len(set(names)) < len(names):
        raise UserError(
            "levels less than 0.0001 apart have the same name; choose a larger --delta-sparse"
        )
    return names


def stray_levels(folder: Path, model: str, names: Sequence[str]) -> list[Path]:
    """Level files of the model that are not of this grid: they would be mixed in."""
    if not folder.is_dir():
        return []
    paths = [path for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES]
    levels = {path: path.stem.removeprefix(f"{model}_") for path in paths}
    return [p for p, lv in levels.items() if re.fullmatch(SPARSITY, lv) and lv not in names]


# -- making a database -----------------------------------------------------------------------------


class LevelFile:
    """A layer's weights at all levels, in a file; see the module docstring."""

    def __init__(
        self,
        path: Path,
        shape: tuple[int, ...],  # of a weight, rows first
        dtype: torch.dtype,
        own_form: Callable[[Tensor], Tensor] = lambda weight: weight,  # of such a weight
    ) -> None:
        self.path, self.shape, self.dtype, self.own_form = path, tuple(shape), dtype, own_form
        self.row_bytes = math.prod(self.shape[1:]) * torch.finfo(dtype).bits // 8

    def write(
        self,
        rows: Tensor,  # (R,) ascending
        weights: Tensor,  # (levels, R, *shape[1:])
    ) -> None:
        """Write these rows of every level to their place; the file is made if it is missing."""
        rows, weights = rows.cpu(), weights.cpu().to(self.dtype)
        runs = torch.tensor_split(rows, torch.nonzero(rows.diff() != 1)[:, 0] + 1)
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            for level, weight in enumerate(weights):
                pieces = weight.flatten(1).split([len(run) for run in runs])
                for run, piece in zip(runs, pieces, strict=True):
                    place = (level * self.shape[0] + int(run[0])) * self.row_bytes
                    content = piece.contiguous().numpy().data.cast("B")
                    while content:
                        written = os.pwrite(file, content, place)
                        content, place = content[written:], place + written
        except OSError as error:
            error.filename = str(self.path)
            raise
        finally:
            os.close(file)

    def read(self, level: int) -> Tensor:
        """The weight at a level, in the layer's own form."""
        numbers = torch.empty(0, dtype=self.dtype).numpy().dtype
        place = level * self.shape[0] * self.row_bytes
        content = np.fromfile(self.path, numbers, math.prod(self.shape), offset=place)
        return self.own_form(torch.from_numpy(content).view(self.shape))

    def hash(self) -> str:
        """A hash of the contents, which are forced to disk; empty if there is no file."""
        try:
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())
                content = hashlib.blake2b()  # hashlib.file_digest needs Python 3.11
                while piece := file.read(HASHED_BYTES):
                    content.update(piece)
                return content.hexdigest()
        except FileNotFoundError:
            return ""


def level_file(folder: Path, name: str, layer: nn.Module) -> LevelFile:
    """The file of a layer's levels; shape and precision are those of its weight."""
    seen, path = view(layer), entry_file(folder, name, ".levels")
    return LevelFile(path, seen.shape, layer.weight.dtype, seen.own_form)


def write_levels(
    folder: Path,
    model: str,
    sparsities: Sequence[float],
    tensors: Mapping[str, Tensor],  # everything that is not in `layers`
    layers: Mapping[str, LevelFile],
    marks: Mapping[str, str] | None = None,
    named: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,  # as they are in files
) -> list[Path]:
    """Write the checkpoints of all levels, one at a time; they appear when all are complete."""
    names = [f"{model}_{level}.pth" for level in level_names(sparsities)]
    hidden = next(iter(layers.values())).path.parent / "levels"
    for index, name in enumerate(names):
        weights = {f"{layer}.weight": file.read(index) for layer, file in layers.items()}
        save_checkpoint(named({**tensors, **weights}), hidden / name, marks)
    for name in names:  # all at once, as far as a file system can
        os.replace(hidden / name, folder / name)
    sync_folder(folder)
    return [folder / name for name in names]


# -- using a database ------------------------------------------------------------------------------


class Database:
    """The levels of a model's layers, mapped from their files."""

    def __init__(
        self,
        kind: str,
        model: str,
        states: Mapping[str, Mapping[str, Tensor]],
        files: Mapping[str, Path] | None = None,
    ) -> None:
        self.kind, self.model, self.states, self.files = kind, model, states, files or {}
        self.finite: set[tuple[str, str]] = set()  # layers and levels that were checked
        self.hashes: dict[tuple[str, str], str] = {}  # of layers and levels
        self.dense_hash = ""  # of the dense weights, once they are checked
        self.views: dict[str, LayerView] = {}  # of the model's layers, once it is known
        self.layers = _layers(states)
        if not self.layers:
            raise UserError(f"no layers in the {kind} database of {model}")
        by_name = all(level.isdecimal() for level in states)  # sparsities
        self.levels = sorted(states) if by_name else self._by_size(list(states))

    @classmethod
    def open(cls, kind: str, model: str, prefix: str | Path = "") -> Database:
        """Map all level files of `model` in the folders of `kind` below `prefix`.

        Raises UserError if there are none, if they are not all of the same model, and if two files
        are of the same level.
        """
        files: dict[str, Path] = {}
        for folder in KINDS[kind].folders:
            for path in sorted((Path(prefix) / folder).glob(f"{glob.escape(model)}_*")):
                level = path.stem.removeprefix(f"{model}_")
                if path.suffix in SUFFIXES and re.fullmatch(KINDS[kind].level_pattern, level):
                    if level in files:
                        raise UserError(
                            f"{files[level]} and {path}: two files of level {level}; "
                            "move one of them away"
                        )
                    files[level] = path
        if not files:
            where = " and ".join(str(Path(prefix) / folder) for folder in KINDS[kind].folders)
            modes = " or ".join(modes_serving(kind))
            raise UserError(
                f"no {kind} database of {model} in {where}: make one with main_trueobs.py, "
                f"mode {modes} (README)"
            )
        states = {level: load_checkpoint(path, finite=False) for level, path in files.items()}
        names = list(files)
        for level in names[1:]:
            check_same_model(files[names[0]], states[names[0]], files[level], states[level])
        return cls(kind, model, states, files)

    def _by_size(self, levels: list[str]) -> list[str]:
        """Levels by what is left of the BOPs of the largest layer that is not dense in all."""
        first = self.states[levels[0]]
        by_weights = sorted(self.layers, key=lambda name: -first[f"{name}.weight"].numel())
        for name in by_weights if len(levels) > 1 else ():
            left = {x: self.unit_cost(name, x, "bops") for x in levels}
            if len(set(left.values())) > 1:
                return sorted(levels, key=left.__getitem__, reverse=True)
        return levels

    def layer(self, layer: str, level: str) -> dict[str, Tensor]:
        """A layer's tensors at a level, by their names in the layer (`weight`, `bias`, grids)."""
        if level not in self.states:
            raise UserError(f"no level {level} in the {self.kind} database of {self.model}")
        state, start = self.states[level], f"{layer}."
        if f"{layer}.weight" not in state:
            raise UserError(f"no layer {layer} in the {self.kind} database of {self.model}")
        tensors = {key: state[key] for key in state if key.startswith(start)}
        if (layer, level) not in self.finite:
            check_finite(tensors, f"{self.kind} database of {self.model}, level {level}")
            self.finite.add((layer, level))
        return {key.removeprefix(start): tensor for key, tensor in tensors.items()}

    def unit_cost(self, layer: str, level: str, constr: str) -> float:
        """What a level leaves of each of a layer's weights (params, bits) or FLOPs (flops, bops).

        Patterns along the channels of kinds of layers whose weights are not rows first are seen
        only after `check`.
        """
        tensors = self.layer(layer, level)
        if (seen := self.views.get(layer)) is not None:
            tensors["weight"] = seen.rows_first(tensors["weight"])
        return unit_cost(tensors, self.kind, constr)

    @cached_property
    def hash(self) -> str:
        """A hash of all layers at all levels; reads them all."""
        return self.choice_hash((layer, level) for layer in self.layers for level in self.levels)

    def choice_hash(self, choice: Iterable[tuple[str, str]]) -> str:
        """A hash of layers, each at a level; reads no others."""

        def layer_hash(layer: str, level: str) -> str:
            if (layer, level) not in self.hashes:
                self.hashes[layer, level] = content_hash(self.layer(layer, level))
            return self.hashes[layer, level]

        return bytes_hash(
            f"{name} {level} {layer_hash(name, level)}".encode() for name, level in choice
        )

    def stitch(self, model: nn.Module, profile: Mapping[str, str]) -> None:
        """Put each layer of `profile` (layer → level) into the model at its level, in place."""
        layers = dict(model.named_modules())
        dense = [name for name in self.layers if name not in profile]
        if dense and len(profile) > 1:
            log.warning(
                "%d layers are not in the profile and stay dense: %s …", len(dense), dense[0]
            )
        for name, level in profile.items():
            tensors = self.layer(name, level)
            check_layer(name, layers.get(name), tensors["weight"], self.kind)
            put_layer(layers[name], tensors)

    def name_like(self, model: nn.Module) -> None:
        """Take the names of the model where files have prefixes (`module.`) or lack them."""
        names = list(model.state_dict())
        states = {level: named_like(state, names, GRIDS) for level, state in self.states.items()}
        if any(isinstance(module, SplitAttention) for module in model.modules()):
            states = {level: layer_names(state, model) for level, state in states.items()}
        if any(states[level] is not self.states[level] for level in states):
            self.states, self.layers = states, _layers(states)

    def check(self, model: nn.Module, weights: str = "the model's") -> None:
        """Raise a UserError unless the levels were made of the dense model's layers and weights.

        weights: what the user calls them, as in --weights FILE. Other matrices in the files, such
        as embeddings, no longer count as layers afterwards.
        """
        self.name_like(model)
        layers = dict(model.named_modules())
        self.layers = [
            name for name in self.layers if name not in layers or compressible(layers[name])
        ]
        for name in self.layers:
            weight = self.states[self.levels[0]][f"{name}.weight"]
            check_layer(name, layers.get(name), weight, self.kind)
            self.views[name] = view(layers[name])
        dense = layer_names(model.state_dict(), model)
        self.dense_hash = weights_hash(model.state_dict())
        for level in self.levels:
            path = self.files.get(level, f"level {level}")
            mark = checkpoint_marks(path).get(DENSE_WEIGHTS) if level in self.files else None
            changed = None
            if mark is None:
                changed = next(
                    (k for k in self.untouched(level) if self.changed(level, k, dense)), None
                )
            check_origin(path, self.dense_hash, weights, mark, changed)

    def untouched(self, level: str) -> Iterator[str]:
        """Names of the tensors in a level's file that compression leaves as they are."""
        state, layers = self.states[level], set(self.layers)
        for key in state:
            layer, _, name = key.rpartition(".")
            owner, _, group = layer.rpartition(".")
            if (owner in layers and group in GRIDS) or name == "num_batches_tracked":
                continue
            if layer not in layers or name != "weight" or self.left_dense(layer, level):
                yield key

    def left_dense(self, layer: str, level: str) -> bool:
        """Whether a layer has neither zeros nor grids at level 0000, or at all levels, alike."""
        if level not in (level_name(0), self.levels[0]):
            return False  # the first level answers for all
        weight, *others = (self.states[x][f"{layer}.weight"] for x in (level, *self.levels))
        gridless = not any(f"{layer}.{grid}.scale" in self.states[level] for grid in GRIDS)
        if not gridless or not weight.all():
            return False
        alike = len(others) > 1 and all(torch.equal(weight, other) for other in others)
        return level == level_name(0) or alike

    def changed(self, level: str, key: str, dense: Mapping[str, Tensor]) -> bool:
        """Whether a tensor of a level differs from the dense model's, by more than its rounding."""
        tensor = self.states[level][key]
        if key not in dense:
            return False
        if dense[key].shape != tensor.shape:
            return True
        return not torch.equal(dense[key].to("cpu", tensor.dtype), tensor)


def check_origin(
    path: str | Path,
    dense_hash: str,  # of the dense weights in use
    weights: str,  # their name
    mark: str | None,  # hash of the weights that the file was made of; None if it has none
    changed: str | None = None,  # a tensor that shows that there were others
) -> None:
    """Raise a UserError if a compressed file was made of other weights than those in use."""
    if changed or mark not in (None, dense_hash):
        reason = f" ({changed} differs)" if changed else ""
        raise UserError(
            f"{path}: made of other weights than {weights}{reason}; make it again with "
            "main_trueobs.py, or pass the --weights that it was made of"
        )


def _layers(states: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """The layers in the first of some state dicts."""
    return [
        key.removesuffix(".weight")
        for key, tensor in next(iter(states.values())).items()
        if key.endswith(".weight") and tensor.ndim > 1
    ]


def check_layer(name: str, layer: nn.Module | None, weight: Tensor, kind: str) -> None:
    """Raise a UserError unless the model's `layer` can take this weight."""
    there = "not in the model" if layer is None else f"{tuple(layer.weight.shape)} in the model"
    if layer is None or layer.weight.shape != weight.shape:
        raise UserError(
            f"layer {name} is {tuple(weight.shape)} in the {kind} database but {there}: "
            "a database of another model?"
        )


def origin_marks(dense: nn.Module) -> dict[str, str]:
    """The marks of checkpoints that are made of a dense model."""
    return {DENSE_WEIGHTS: weights_hash(dense.state_dict())}


def check_checkpoint(path: str | Path, dense: nn.Module, weights: str) -> None:
    """Raise a UserError if a checkpoint has the mark of other weights than the dense model's."""
    mark = checkpoint_marks(path).get(DENSE_WEIGHTS)
    check_origin(path, weights_hash(dense.state_dict()), weights, mark)


def check_same_model(
    path: Path, state: Mapping[str, Tensor], other: Path, others: Mapping[str, Tensor]
) -> None:
    """Raise a UserError unless the layers of two level files have the same names and shapes."""
    shapes, other_shapes = (
        {key: tuple(tensor.shape) for key, tensor in tensors.items() if tensor.ndim > 1}
        for tensors in (state, others)
    )
    grids = f".{quant.WEIGHT_GRID}."  # whether a layer is quantised may differ from level to level
    for key in sorted(shapes.keys() | other_shapes.keys()):
        if grids not in key and shapes.get(key) != other_shapes.get(key):
            raise UserError(
                f"{other}: {key} is {other_shapes.get(key, 'missing')}, but {path} has "
                f"{shapes.get(key, 'none')}: not levels of one model"
            )
