"""Training images, one epoch at a time: shuffled, augmented, and fast if they are small.

Small whole images (cifar10, digits) are decoded once and kept as bytes: 154 MB for 50,000 of 32×32
pixels. A batch is shifted and flipped in one indexing operation,

    out[i, y, x] = padded[i, y + dy_i, x + dx_i]  or, mirrored,  padded[i, y + dy_i, s−1−x + dx_i]

with dy, dx uniform in 0 … 2p for images padded by p = s/8 black pixels (before normalisation): the
augmentation of datautils.py, drawn per batch. Photographs (imagenet, folder), whose random crops
need the whole file, are decoded each time by datautils' own loader and its processes.

Order and augmentation of epoch e depend on (seed, e) only, so a resumed run sees the same images as
an uninterrupted one. The last batch is left out if it is incomplete.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from datautils import ImageData, ImageSet, calibration_batches, load_data, test_batches
from obc.inputs.preprocessing import Preprocessing
from obc.solver.progress import progress
from pruning_vs_quantization.training_options import TrainingOptions

IN_MEMORY = 4 << 30  # bytes of decoded images that are kept

LabelledImages = tuple[Tensor, Tensor]  # images (n, c, s, s) float32, labels (n,) int64


@dataclass(frozen=True)
class DecodedImages:
    """Images in their plain view; iterable as normalised batches, always in the same order."""

    preprocessing: Preprocessing
    pixels: np.ndarray  # (n, s, s, c) uint8
    labels: Tensor  # (n,) int64
    batchsize: int

    @classmethod
    def decode(cls, images: ImageSet, batchsize: int) -> DecodedImages | None:
        """Decode all images, or none if they are photographs or too many.

        Raises UserError for an image that cannot be decoded.
        """
        made, count = images.preprocessing, len(images)
        if images.view.photographs or count * made.channels * made.size**2 > IN_MEMORY:
            return None
        pixels = np.empty((count, made.size, made.size, made.channels), dtype=np.uint8)
        labels = torch.empty(count, dtype=torch.int64)
        for index in progress("decoding", range(count)):
            pixels[index], labels[index] = images.pixels(index)
        return cls(made, pixels, labels, batchsize)

    def __len__(self) -> int:
        return math.ceil(len(self.pixels) / self.batchsize)

    def __iter__(self) -> Iterator[LabelledImages]:
        for start in range(0, len(self.pixels), self.batchsize):
            batch = slice(start, start + self.batchsize)
            yield self.preprocessing.normalise(self.pixels[batch]), self.labels[batch]


def shift_and_flip(
    pixels: np.ndarray,  # (n, s, s, c) uint8
    flips: bool,  # whether images may be mirrored
    generator: torch.Generator,
) -> np.ndarray:  # (n, s, s, c) uint8
    """Shift randomly by up to s/8 pixels into black, and mirror half of the images."""
    n, size = pixels.shape[:2]
    padding = size // 8
    padded = np.pad(pixels, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    offsets = torch.randint(2 * padding + 1, (2, n, 1), generator=generator).numpy()
    mirrored = torch.rand((n, 1), generator=generator).numpy() < (0.5 if flips else 0)
    line = np.arange(size)
    rows = offsets[0] + line
    columns = offsets[1] + np.where(mirrored, line[::-1], line)
    return padded[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


def training_images(options: TrainingOptions, seed: int) -> ImageData:
    """The images of the dataset, as they are made for a network that does not say how.

    Raises UserError if datautils cannot load them.
    """
    where = {"datapath": options.images_dir, "class_file": options.classes}
    size = {"image_size": options.image_size, "nsamples": 1}
    data = load_data(options.dataset, **where, **size, seed=seed)
    total = len(data.calibration.source)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    return replace(
        data, calibration=replace(data.calibration, chosen=order[: options.train_samples])
    )


@dataclass(frozen=True)
class TrainingData:
    """Images for training and evaluation."""

    options: TrainingOptions
    seed: int
    data: ImageData  # .calibration: all training images, in an order drawn from the seed
    train: DecodedImages | None  # where they fit in memory
    test: DecodedImages | None

    @classmethod
    def decode(cls, options: TrainingOptions, seed: int, data: ImageData) -> TrainingData:
        """From the images of `training_images`."""
        both = data.calibration, data.test
        return cls(
            options, seed, data, *(DecodedImages.decode(x, options.batch_size) for x in both)
        )

    def __len__(self) -> int:
        """Batches of an epoch."""
        return max(1, len(self.data.calibration) // self.options.batch_size)

    def epoch(self, number: int) -> Iterator[LabelledImages]:
        """The batches of an epoch, counted from 0."""
        seed = int(np.random.SeedSequence((self.seed, number)).generate_state(1, np.uint64)[0])
        generator = torch.Generator().manual_seed(seed)
        images, size = self.data.calibration, self.options.batch_size
        order = torch.randperm(len(images), generator=generator)[: len(self) * size]
        if self.train is None:
            images = replace(images, chosen=[images.chosen[index] for index in order])
            yield from self._streamed(images, self.options.augment, seed % 2**63)
            return
        for batch in order.split(size):
            pixels = self.train.pixels[batch.numpy()]
            if self.options.augment:
                pixels = shift_and_flip(pixels, images.view.flips, generator)
            yield self.train.preprocessing.normalise(pixels), self.train.labels[batch]

    def plain(self, batches: int) -> Iterable[LabelledImages]:
        """The first training batches, not augmented; fewer if there are not that many."""
        count = batches * self.options.batch_size
        if self.train is not None:
            pixels, labels = self.train.pixels[:count], self.train.labels[:count]
            return replace(self.train, pixels=pixels, labels=labels)
        images = self.data.calibration
        return self._streamed(replace(images, chosen=images.chosen[:count]))

    def _streamed(
        self, images: ImageSet, augment: bool = False, seed: int = 0
    ) -> Iterable[LabelledImages]:
        loading = {"batchsize": self.options.batch_size, "workers": self.options.num_workers}
        data = replace(self.data, calibration=images)
        return calibration_batches(data, augment=augment, seed=seed, **loading)

    def test_batches(self) -> Iterable[LabelledImages]:
        """All test images."""
        if self.test is not None:
            return self.test
        loading = {"batchsize": self.options.batch_size, "workers": self.options.num_workers}
        return test_batches(self.data, **loading)
