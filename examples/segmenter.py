"""A small U-Net that finds circles, squares and triangles: judged by its mean IoU.

    python -m examples.segmenter segmenter.pth        trains it, half a minute on 2 cores

As MODEL it is `examples/segmenter.py:segmenter`, as DATASET `examples/segmenter.py:shapes`. Images
are drawn from seeds: four shapes of random colours on a noisy background, the later ones in front.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from obc.inputs.files import save_checkpoint
from obc.inputs.tasks import Task

CLASSES = ("background", "circle", "square", "triangle")
SIZE = 32  # pixels
SHAPES = 4  # in an image
BATCH = 32


# -- the network -----------------------------------------------------------------------------------


def block(inputs: int, outputs: int) -> nn.Module:
    layers = []
    for channels in (inputs, outputs):
        convolution = nn.Conv2d(channels, outputs, 3, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Two steps down, two steps up by transposed convolutions, and a score for every class."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.fine, self.middle = block(3, width), block(width, 2 * width)
        self.coarse = block(2 * width, 4 * width)
        self.up_middle = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.out_middle = block(4 * width, 2 * width)
        self.up_fine = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.out_fine = block(2 * width, width)
        self.scores = nn.Conv2d(width, len(CLASSES), 1)

    def forward(self, images: Tensor) -> Tensor:  # (n, 3, s, s) -> (n, classes, s, s)
        fine = self.fine(images)
        middle = self.middle(F.max_pool2d(fine, 2))
        coarse = self.coarse(F.max_pool2d(middle, 2))
        middle = self.out_middle(torch.cat([middle, self.up_middle(coarse)], 1))
        fine = self.out_fine(torch.cat([fine, self.up_fine(middle)], 1))
        return self.scores(fine)


def segmenter() -> nn.Module:
    torch.manual_seed(0)
    return UNet()


# -- the images ------------------------------------------------------------------------------------


def drawn(
    count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:  # (count, 3, s, s), (count, s, s)
    """Images, and the class of each of their pixels."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    places = torch.arange(SIZE) + 0.5
    images = 0.3 * torch.randn(count, 3, SIZE, SIZE, generator=generator) + uniform(-1, 1, 3, 1, 1)
    labels = torch.zeros(count, SIZE, SIZE, dtype=torch.long)
    for _ in range(SHAPES):
        kind = torch.randint(1, len(CLASSES), (count, 1, 1), generator=generator)
        radius, colour = uniform(3, 7, 1, 1), uniform(-2, 2, 3, 1, 1)
        x = places - uniform(0, SIZE, 1, 1)
        y = places[:, None] - uniform(0, SIZE, 1, 1)
        circle = x**2 + y**2 < radius**2
        square = torch.maximum(x.abs(), y.abs()) < radius
        triangle = (y < radius) & (2 * x.abs() < y + radius)
        inside = torch.where(kind == 1, circle, torch.where(kind == 2, square, triangle))
        labels = torch.where(inside, kind, labels)
        images = torch.where(inside[:, None], images * 0.5 + colour, images)
    return images, labels


def batches(seed: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield drawn(BATCH, generator)


# -- the task --------------------------------------------------------------------------------------


class Shapes(Task):
    """Which kind of shape a pixel is in."""

    logits = True

    def calibration(self) -> Iterator[tuple[Tensor, Tensor]]:
        return batches(seed=1, count=32)

    def inputs(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return batch[0]

    def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(outputs, batch[1])

    def evaluate(self, model: nn.Module) -> dict[str, Any]:
        device = next(model.parameters()).device
        confusion = torch.zeros(len(CLASSES), len(CLASSES))  # theirs, ours
        for images, labels in batches(seed=2, count=16):
            found = model(images.to(device)).argmax(1).cpu()
            pairs = (labels * len(CLASSES) + found).flatten()
            confusion += pairs.bincount(minlength=confusion.numel()).view_as(confusion)
        right = confusion.diagonal()
        iou = right / (confusion.sum(0) + confusion.sum(1) - right)
        pixels = float(right.sum() / confusion.sum())
        return {"mIoU": 100 * float(iou.mean()), "right pixels": 100 * pixels}


def shapes() -> Task:
    return Shapes()


# -- training --------------------------------------------------------------------------------------


def train(steps: int) -> nn.Module:
    """The segmenter, trained from a fixed seed."""
    model, task = segmenter().train(), Shapes()
    adam = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, 1e-2, steps)
    for step, batch in enumerate(batches(seed=0, count=steps), 1):
        loss = task.loss(model(task.inputs(batch)), batch)
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step} of {steps}: loss {loss:.3f}", file=sys.stderr)  # noqa: T201
    return model.eval()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="segmenter.py", description=__doc__.splitlines()[0])
    parser.add_argument("file", metavar="FILE", help="where to save the weights")
    parser.add_argument("--steps", type=int, default=600, help="batches of 32 (default: 600)")
    args = parser.parse_args(argv)
    model = train(args.steps)
    with torch.inference_mode():
        print(f"mIoU {Shapes().evaluate(model)['mIoU']:.2f}")  # noqa: T201
    save_checkpoint(model.state_dict(), args.file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
