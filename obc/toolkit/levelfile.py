"""A layer's weights at all levels, written a few rows at a time and read a level at a time.

    file    levels × rows × d numbers, and nothing else: level after level, row after row

All levels of a layer together can be many times the layer: they are on disk as soon as they are
made, and never in memory at once. Several processes may write their rows into one file.
"""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class LevelFile:
    """The file of one layer."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.path, self.shape, self.dtype = path, tuple(shape), dtype
        self.row = math.prod(self.shape[1:]) * torch.finfo(dtype).bits // 8  # bytes

    def write(
        self,
        rows: Tensor,  # (R,) ascending
        weights: Tensor,  # (levels, R, *shape[1:])
    ) -> None:
        """Put these rows of every level where they belong; the file is made if it is missing."""
        rows = rows.cpu()
        runs = torch.tensor_split(rows, torch.nonzero(rows.diff() != 1)[:, 0] + 1)
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            for level, parts in enumerate(weights):
                content = parts.cpu().to(self.dtype).flatten(1)
                for run, part in zip(runs, content.split([len(run) for run in runs]), strict=True):
                    place = (level * self.shape[0] + int(run[0])) * self.row
                    _write_all(file, part.contiguous().numpy().data.cast("B"), place)
        except OSError as error:
            error.filename = str(self.path)
            raise
        finally:
            os.close(file)

    def read(self, level: int) -> Tensor:  # (*shape)
        """All rows at a level."""
        count = math.prod(self.shape)
        numbers = torch.empty(0, dtype=self.dtype).numpy().dtype
        place = level * self.shape[0] * self.row
        return torch.from_numpy(np.fromfile(self.path, numbers, count, offset=place)).view(
            self.shape
        )

    def hash(self) -> str:
        """A hash of the contents, which are forced to disk; nothing where there is no file."""
        try:
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())
                return hashlib.file_digest(file, "blake2b").hexdigest()
        except FileNotFoundError:
            return ""


def _write_all(file: int, content: memoryview, place: int) -> None:
    while content:
        written = os.pwrite(file, content, place)
        content, place = content[written:], place + written
