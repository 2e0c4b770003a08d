"""Batches of images: in a fixed order, pass after pass, and in shards for several processes.

    Passes(images, nrounds, seed) ─▶ ImageBatches(passes, batchsize, workers) ─▶ (images, labels)

A batch may contain the end of one pass and the start of the next: only the very last can be
smaller. Shard r of N has batches r, r + N, r + 2N, …, so shards differ by at most one batch, and
no process decodes an image that another one uses.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from obc.inputs.images import BadImage, leave_interrupts
from obc.inputs.preprocessing import Preprocessing
from obc.inputs.tasks import Inputs
from obc.solver.errors import UserError, log


class Batches(Protocol):
    """Pairs of a network's inputs and the batch that they are of, for the loss (`tasks.py`).

    Of images: (n, c, s, s) float32, normalised, and labels (n,) int64.
    """

    def __iter__(self) -> Iterator[tuple[Inputs, Any]]: ...
    def __len__(self) -> int: ...


class ShardedBatches(Batches, Protocol):
    """`Batches` that several processes can share: `ImageBatches`, `TaskBatches`."""

    def shard(self, number: int, count: int) -> ShardedBatches: ...


class Pixels(Protocol):
    """Images before normalisation: `datautils.ImageSet`."""

    @property
    def preprocessing(self) -> Preprocessing: ...

    def __len__(self) -> int: ...

    def pixels(self, index: int, seed: tuple[int, ...] | None = None) -> tuple[np.ndarray, int]: ...


class Passes(Dataset):
    """`nrounds` passes over the images, one after another, as one long dataset.

    A BadImage is returned as an item, for `ImageBatches` to raise or skip: if it were raised here,
    a DataLoader would raise another one with the worker's whole traceback as its message.
    """

    def __init__(self, images: Pixels, nrounds: int, seed: int | None) -> None:
        self.images, self.nrounds, self.seed = images, nrounds, seed

    def __len__(self) -> int:
        return self.nrounds * len(self.images)

    def __getitem__(self, position: int) -> tuple[np.ndarray, int] | BadImage:
        round_index, index = divmod(position, len(self.images))
        seed = None if self.seed is None else (self.seed, round_index, index)
        try:
            return self.images.pixels(index, seed)
        except BadImage as error:
            return error


def _collate(
    preprocessing: Preprocessing, items: list[tuple[np.ndarray, int] | BadImage]
) -> tuple[Tensor | None, Tensor, list[BadImage]]:
    bad = [item for item in items if isinstance(item, BadImage)]
    good = [item for item in items if not isinstance(item, BadImage)]
    images = preprocessing.normalise(np.stack([x for x, _ in good])) if good else None
    return images, torch.tensor([label for _, label in good]), bad


def log_skipped(flaws: Mapping[str, str], which: str) -> None:
    """One line for all images that --skip-bad-images leaves out: file -> what is wrong with it."""
    first, flaw = next(iter(flaws.items()))
    log.warning(
        "%d %s cannot be read and are skipped; the first: %s (%s)", len(flaws), which, first, flaw
    )


@dataclass(frozen=True)
class ImageBatches:
    """`Batches` in an order that is always the same."""

    passes: Passes
    batchsize: int
    workers: int
    skip_bad_images: bool = False
    first: int = 0  # the first batch, then every step-th
    step: int = 1

    def shard(self, number: int, count: int) -> ImageBatches:
        """Every `count`-th batch, starting with batch `number`."""
        return replace(self, first=self.first + number * self.step, step=self.step * count)

    def _positions(self) -> list[range]:
        """Positions in `passes` of each batch."""
        total = len(self.passes)
        starts = range(self.first * self.batchsize, total, self.step * self.batchsize)
        return [range(start, min(start + self.batchsize, total)) for start in starts]

    def __len__(self) -> int:
        return len(self._positions())

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        flaws: dict[str, str] = {}
        try:
            with warnings.catch_warnings():  # about more workers than cores, in every loop
                warnings.filterwarnings("ignore", "This DataLoader will create")
                loader = DataLoader(
                    self.passes,
                    batch_sampler=self._positions(),
                    num_workers=self.workers,
                    collate_fn=partial(_collate, self.passes.images.preprocessing),
                    worker_init_fn=leave_interrupts,
                    generator=torch.Generator(),  # else every loop would advance the global one
                )
                decoded = iter(loader)
            for images, labels, bad in decoded:
                if bad and not self.skip_bad_images:
                    raise bad[0]
                flaws |= {error.path: error.flaw for error in bad}
                if images is not None:
                    yield images, labels
            if flaws:
                log_skipped(flaws, "more images")
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise UserError(
                "a process that decodes images died, perhaps for lack of (shared) memory; "
                "pass --workers 0 or a smaller --batchsize"
            ) from error
