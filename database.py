"""Per-layer databases: every layer at every level, as one full state dict a level.

OBC (arXiv 2208.11580), section 4, "non-uniform compression". A database is a folder with a file
`<model>_<level>.pth` a level; a level is named by its sparsity × 10⁴, `0000` … `9900`. While a
database is made, each finished layer is kept in a hidden folder beside, so that memory holds the
levels of one layer only; the level files appear, whole, at the end.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cli import save_checkpoint


def level_name(sparsity: float) -> str:
    """A sparsity in [0, 1) as a level's name.

    >>> level_name(0.19)
    '1900'
    """
    return f"{round(sparsity * 10_000):04d}"


class LevelWriter:
    """Writes a database of sparsities layer by layer; `finish` makes the level files."""

    def __init__(self, folder: Path, model: str, sparsities: Sequence[float]) -> None:
        self.folder, self.model, self.sparsities = folder, model, list(sparsities)
        self.parts = folder / f".{model}.partial"
        shutil.rmtree(self.parts, ignore_errors=True)
        self.parts.mkdir(parents=True)
        self.layers: list[str] = []

    def add(self, layer: str, weights: Sequence[Tensor]) -> None:
        """Keep a layer's weights at all levels, in the order of the sparsities."""
        save_checkpoint({"levels": torch.stack(list(weights))}, self._part(layer))
        self.layers.append(layer)

    def _part(self, layer: str) -> Path:
        return self.parts / f"{layer}.pth"

    def finish(self, dense: Mapping[str, Tensor]) -> list[Path]:
        """Write the level files: `dense`, with the weights of the layers that were added."""
        levels = {
            layer: torch.load(self._part(layer), mmap=True, weights_only=True)["levels"]
            for layer in self.layers
        }
        files = []
        for index, sparsity in enumerate(self.sparsities):
            state = dict(dense)
            state.update({f"{layer}.weight": parts[index] for layer, parts in levels.items()})
            files.append(self.folder / f"{self.model}_{level_name(sparsity)}.pth")
            save_checkpoint(state, files[-1])
        self.discard()
        return files

    def discard(self) -> None:
        """Remove what was kept beside; call it when the run fails."""
        shutil.rmtree(self.parts, ignore_errors=True)
