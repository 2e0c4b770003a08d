"""Batches of images: in a fixed order, pass after pass, and in shards for many processes.

    Passes(images, nrounds, seed) ─▶ Batches(passes, batchsize, workers) ─▶ (images, labels)

Batches run on across the seam between two passes: only the very last may be smaller. Shard r of N
has batches r, r + N, r + 2N, …, so that shards differ by one batch at most, and no process decodes
an image that another one looks at.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cli import UserError

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class Pixels(Protocol):
    """A set of images, before normalisation: `datautils.ImageSet`."""

    def __len__(self) -> int: ...

    def pixels(self, index: int, seed: tuple[int, ...] | None = None) -> tuple[np.ndarray, int]: ...


def normalise(
    pixels: np.ndarray,  # (n, s, s, 3) uint8
) -> Tensor:  # (n, 3, s, s) float32
    """Scale to [0, 1], then shift and scale by MEAN and STD."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    images = images.to(torch.float32, memory_format=torch.contiguous_format)
    return images.div_(255).sub_(mean).div_(std)


class Passes(Dataset):
    """`nrounds` passes over an image set, one after the other, as one long dataset.

    A UserError comes back as an item: a DataLoader would re-raise it with a worker's whole
    traceback for a message. `Batches` raises it as it was.
    """

    def __init__(self, images: Pixels, nrounds: int, seed: int | None) -> None:
        self.images, self.nrounds, self.seed = images, nrounds, seed

    def __len__(self) -> int:
        return self.nrounds * len(self.images)

    def __getitem__(self, position: int) -> tuple[np.ndarray, int] | UserError:
        round_index, index = divmod(position, len(self.images))
        seed = None if self.seed is None else (self.seed, round_index, index)
        try:
            return self.images.pixels(index, seed)
        except UserError as error:
            return error


def _collate(items: list[tuple[np.ndarray, int] | UserError]) -> tuple[Tensor, Tensor] | UserError:
    for item in items:
        if isinstance(item, UserError):
            return item
    pixels, labels = zip(*items, strict=True)
    return normalise(np.stack(pixels)), torch.tensor(labels)


def _leave_interrupts_to_the_parent(_worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@dataclass(frozen=True)
class Batches:
    """Sized, and iterable any number of times: pairs (images, labels), always in the same order."""

    passes: Passes
    batchsize: int
    workers: int
    first: int = 0  # of the batches, then every step-th
    step: int = 1

    def shard(self, number: int, count: int) -> Batches:
        """Every `count`-th batch, from the one of that number on."""
        return replace(self, first=self.first + number * self.step, step=self.step * count)

    def _positions(self) -> list[range]:
        """Positions in `passes` of each batch."""
        total = len(self.passes)
        starts = range(self.first * self.batchsize, total, self.step * self.batchsize)
        return [range(start, min(start + self.batchsize, total)) for start in starts]

    def __len__(self) -> int:
        return len(self._positions())

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            self.passes, batch_sampler=self._positions(), num_workers=self.workers,
            collate_fn=_collate, worker_init_fn=_leave_interrupts_to_the_parent,
            generator=torch.Generator(),  # else every loop would advance the global one
        )
        try:
            for batch in loader:
                if isinstance(batch, UserError):
                    raise batch
                yield batch
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise UserError("a process that decodes images died, perhaps for lack of (shared) "
                            "memory; pass --workers 0 or a smaller --batchsize") from error
