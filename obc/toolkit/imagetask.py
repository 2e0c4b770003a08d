"""The built-in tasks: `digits`, `cifar10`, `imagenet` and `folder`, images that belong to a class.

`ImageTask` answers what `tasks.Task` asks: batches are pairs of images and labels, the loss is
cross-entropy, the figure is top-1. Beyond that, it decodes images when they are needed, augments
them, and shares them and their evaluation among processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from datautils import (
    ArrayImages,
    ImageData,
    ImageSet,
    calibration_batches,
    default_preprocessing,
    test_batches,
)
from modelutils import Example
from obc.inputs.batches import ImageBatches
from obc.toolkit.evaluation import Classification, evaluate
from obc.toolkit.fingerprints import bytes_hash


class ImageTask(Classification):
    """Images and their classes."""

    augments = True

    def __init__(
        self,
        data: ImageData,
        batchsize: int,
        workers: int | None,  # None: what suits the dataset
        seed: int,
        classes_named: bool = False,  # by the user
    ) -> None:
        self.name, self.data, self.batchsize = data.name, data, batchsize
        self.workers, self.seed, self.classes_named = workers, seed, classes_named

    def calibration(self) -> ImageBatches:
        return self.batches()

    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        device = next(model.parameters()).device
        return {"top1": evaluate(model, self.tests(), device).top1}

    # -- what the toolkit asks besides -------------------------------------------------------------

    @property
    def example(self) -> Example:
        return self.data.preprocessing.image_shape

    @property
    def count(self) -> int:
        return len(self.data.calibration)

    @property
    def available(self) -> int:
        return len(self.data.calibration.source)

    def batches(self, augment: bool = False, rounds: int = 1) -> ImageBatches:
        return calibration_batches(
            self.data,
            batchsize=self.batchsize,
            nrounds=rounds,
            augment=augment,
            seed=self.seed,
            workers=self.workers,
        )

    def epochs(self, augment: bool, seed: int) -> CalibrationEpochs:
        return CalibrationEpochs(self.data, self.batchsize, self.workers, augment, seed)

    def one_batch(self, count: int | None) -> Tensor:
        """The first calibration images, not augmented: (count, 3, s, s), or all."""
        batches = calibration_batches(
            self.data, batchsize=count or self.count, workers=self.workers
        )
        return next(iter(batches))[0]

    def tests(self) -> ImageBatches:
        return test_batches(self.data, batchsize=self.batchsize, workers=self.workers)

    def marks(self) -> dict[str, str]:
        made = self.data.preprocessing
        marks = {
            "--image-size": str(made.size),
            "calibration images": images_hash(self.data.calibration),
        }
        if made != default_preprocessing(self.data.name, made.size):  # as all were, once
            marks["preprocessing"] = str(made)
        if self.classes_named:
            marks["--classes"] = bytes_hash(name.encode() for name in self.data.classes)
        return marks

    def record(self) -> dict[str, object]:
        return {"preprocessing": self.data.preprocessing.record()}

    def test_marks(self) -> dict[str, str]:
        return {"test images": images_hash(self.data.test)}

    def fresh(self, seed: int) -> tuple[ImageTask, str]:
        """The same with other images to calibrate on, at most as many; and which ones they are.

        Training images that were not chosen; if all were, test images.
        """
        chosen, count = set(self.data.calibration.chosen), len(self.data.calibration.chosen)
        source: ImageSet = self.data.calibration
        unused = [index for index in range(len(source.source)) if index not in chosen]
        origin = "training"
        if not unused:
            source, unused, origin = self.data.test, list(self.data.test.chosen), "test"
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(unused), generator=generator)[:count].tolist()
        images = replace(source, chosen=[unused[i] for i in order])
        data = replace(self.data, calibration=images)
        task = ImageTask(data, self.batchsize, self.workers, self.seed)
        return task, f"{len(order)} other {origin} images"


@dataclass(frozen=True)
class CalibrationEpochs:
    """Epochs of calibration images, each in its own order and, if so, its own augmentation."""

    data: ImageData
    batchsize: int
    workers: int | None
    augment: bool
    seed: int  # all that epochs depend on

    def __len__(self) -> int:
        """Batches of an epoch."""
        return -(-len(self.data.calibration) // self.batchsize)

    def epoch(self, number: int) -> Iterable[tuple[Tensor, Tensor]]:
        """The batches of an epoch, counted from 0."""
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(number + 1):
            seed = int(torch.randint(2**62, (), generator=generator))
        generator.manual_seed(seed)
        images = self.data.calibration
        order = torch.randperm(len(images), generator=generator).tolist()
        images = replace(images, chosen=[images.chosen[index] for index in order])
        return calibration_batches(
            replace(self.data, calibration=images),
            batchsize=self.batchsize,
            workers=self.workers,
            augment=self.augment,
            seed=seed,
        )


def images_hash(images: ImageSet) -> str:
    """A hash of the chosen images as they are stored, with their order, labels and size."""

    def pieces() -> Iterator[bytes]:
        made = images.preprocessing  # the first line names what a view once was: hashes stay
        view = f"View(size={made.size}, crops={images.view.photographs}, flips={images.view.flips})"
        yield f"{view} {[images.source.labels[index] for index in images.chosen]}".encode()
        for index in images.chosen:
            if isinstance(images.source, ArrayImages):
                yield images.source.pixels[index].tobytes()
            else:
                yield Path(images.source.files[index]).read_bytes()

    return bytes_hash(pieces())
