"""Training images, an epoch at a time: shuffled, augmented, and fast where they are small.

Whole small images (cifar10, digits) are decoded once and kept as bytes: 154 MB for 50,000 of
32×32 pixels. A batch is shifted and flipped in one indexing operation,

    out[i, y, x] = padded[i, y + dy_i, x + dx_i]  or, mirrored,  padded[i, y + dy_i, s−1−x + dx_i]

with dy, dx uniform in 0 … 2p for images padded by p = s/8 black pixels (before normalisation): the
augmentation of datautils.py, drawn per batch. Photographs (imagenet, folder), whose random crops
need the whole file, are decoded anew each time by datautils' own loader and its processes.

Order and augmentation of epoch e hang on (seed, e) alone: a run that goes on where it stopped sees
the images that it would have seen. A last batch that is not full is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from datautils import ImageData, ImageSet, calibration_batches, load_data, normalise, test_batches

IN_MEMORY = 4 << 30  # bytes of decoded images that are kept

Batch = tuple[Tensor, Tensor]  # images (n, 3, s, s) float32, labels (n,) int64


@dataclass(frozen=True)
class Pixels:
    """Decoded images in their plain view; iterable as normalised batches, always in this order."""

    images: np.ndarray  # (n, s, s, 3) uint8
    labels: Tensor  # (n,) int64
    batchsize: int

    @classmethod
    def of(cls, images: ImageSet, batchsize: int) -> Pixels:
        """Decode all images; raises UserError for one that cannot be."""
        size = images.view.size
        pixels = np.empty((len(images), size, size, 3), dtype=np.uint8)
        labels = torch.empty(len(images), dtype=torch.int64)
        for index in tqdm(range(len(images)), desc="decoding", leave=False, disable=None):
            pixels[index], labels[index] = images.pixels(index)
        return cls(pixels, labels, batchsize)

    def __len__(self) -> int:
        return math.ceil(len(self.images) / self.batchsize)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.images), self.batchsize):
            chosen = slice(start, start + self.batchsize)
            yield normalise(self.images[chosen]), self.labels[chosen]


def fits_in_memory(images: ImageSet) -> bool:
    """Whether the images are whole small ones, of which `Pixels` may be made."""
    return not images.view.crops and len(images) * images.view.size**2 * 3 <= IN_MEMORY


def shift_and_flip(
    images: np.ndarray,  # (n, s, s, 3) uint8
    flips: bool,  # whether images may be mirrored
    generator: torch.Generator,
) -> np.ndarray:  # (n, s, s, 3) uint8
    """Randomly shifted by up to s/8 pixels into black, and mirrored half of the time."""
    n, size = images.shape[:2]
    padding = size // 8
    padded = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    offsets = torch.randint(2 * padding + 1, (2, n, 1), generator=generator).numpy()
    mirrored = torch.rand((n, 1), generator=generator).numpy() < (0.5 if flips else 0)
    line = np.arange(size)
    rows = offsets[0] + line
    columns = offsets[1] + np.where(mirrored, line[::-1], line)
    return padded[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


@dataclass(frozen=True)
class TrainingData:
    """What training and evaluation look at."""

    data: ImageData  # .calibration: all images that are trained on, in an order of the seed's
    batchsize: int
    augment: bool
    seed: int
    workers: int | None
    train: Pixels | None  # decoded, where they fit in memory
    test: Pixels | None

    @classmethod
    def load(
        cls,
        name: str,  # of the dataset
        folder: str | None,
        image_size: int | None,  # pixels
        count: int | None,  # of training images; None: all
        batchsize: int,
        augment: bool,
        seed: int,
        workers: int | None,
    ) -> TrainingData:
        """Raises UserError for what datautils cannot load."""
        data = load_data(name, datapath=folder, image_size=image_size, nsamples=1, seed=seed)
        total = len(data.calibration.source)
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
        data = replace(data, calibration=replace(data.calibration, chosen=order[:count]))
        sets = [
            Pixels.of(images, batchsize) if fits_in_memory(images) else None
            for images in (data.calibration, data.test)
        ]
        return cls(data, batchsize, augment, seed, workers, *sets)

    @property
    def steps(self) -> int:
        """ImageBatches of an epoch."""
        return max(1, len(self.data.calibration) // self.batchsize)

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batches of an epoch, counted from 0."""
        seed = int(np.random.SeedSequence((self.seed, number)).generate_state(1, np.uint64)[0])
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.data.calibration), generator=generator)
        order = order[: self.steps * self.batchsize]
        if self.train is None:
            return self._streamed(order, seed % 2**63)
        return self._in_memory(self.train, order, generator)

    def _in_memory(
        self, train: Pixels, order: Tensor, generator: torch.Generator
    ) -> Iterator[Batch]:
        for chosen in order.split(self.batchsize):
            images = train.images[chosen.numpy()]
            if self.augment:
                images = shift_and_flip(images, self.data.calibration.view.flips, generator)
            yield normalise(images), train.labels[chosen]

    def _streamed(self, order: Tensor, seed: int) -> Iterator[Batch]:
        chosen = self.data.calibration.chosen
        images = replace(self.data.calibration, chosen=[chosen[index] for index in order])
        shuffled = replace(self.data, calibration=images)
        return iter(
            calibration_batches(
                shuffled,
                batchsize=self.batchsize,
                augment=self.augment,
                seed=seed,
                workers=self.workers,
            )
        )

    def plain(self, batches: int) -> Iterable[Batch]:
        """Some training batches, not augmented, always the same; fewer if there are not as many."""
        count = batches * self.batchsize
        if self.train is not None:
            return Pixels(self.train.images[:count], self.train.labels[:count], self.batchsize)
        calibration = self.data.calibration
        some = replace(calibration, chosen=calibration.chosen[:count])
        return calibration_batches(
            replace(self.data, calibration=some), batchsize=self.batchsize, workers=self.workers
        )

    def test_batches(self) -> Iterable[Batch]:
        """All test images."""
        if self.test is not None:
            return self.test
        return test_batches(self.data, batchsize=self.batchsize, workers=self.workers)
