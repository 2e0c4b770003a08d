"""How a network sees an image: its size, crop and interpolation, its mean and standard deviation.

These belong to the network, since it was trained on images made that way. They come from, in order
of increasing priority,

1. the dataset: ImageNet's mean and standard deviation, bilinear interpolation, and the size in
   `datautils.DATASETS`;
2. the network (`modelutils.own_preprocessing`): the transforms of torchvision's weights, timm's
   `pretrained_cfg`, or the attribute `preprocessing` of the user's own model, a dict with any of
   the fields below;
3. the options --image-size, --resize, --crop, --interpolation, --mean and --std.

If one of them gives another size and no `resize`, that one changes in proportion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from obc.solver.errors import UserError

MEAN = (0.485, 0.456, 0.406)  # of ImageNet
STD = (0.229, 0.224, 0.225)
CROPS = ("center", "squash")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")  # Pillow's
PILLOW_MODES = {1: "L", 3: "RGB"}  # of images in Pillow, by number of channels


@dataclass(frozen=True)
class Preprocessing:
    """How an image file becomes an input of s×s pixels; resizing always has antialiasing."""

    size: int  # s
    resize: int  # the shorter side, before the centre is cut out
    crop: str = "center"  # squash: the whole image becomes s×s, whatever its shape
    interpolation: str = "bilinear"
    mean: tuple[float, ...] = MEAN  # of values in [0, 1], one for each channel
    std: tuple[float, ...] = STD

    def __str__(self) -> str:
        cut = f"the centre after the shorter side is resized to {self.resize}"
        mean, std = (" ".join(f"{x:.6g}" for x in values) for values in (self.mean, self.std))
        return (
            f"{self.size}×{self.size} pixels, {'squashed' if self.crop == 'squash' else cut}, "
            f"{self.interpolation}; mean {mean}, std {std}"
        )

    @property
    def channels(self) -> int:
        return len(self.mean)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (self.channels, self.size, self.size)

    def record(self) -> dict[str, Any]:
        return asdict(self)

    def changed(self, source: str, told: Mapping[str, Any]) -> Preprocessing:
        """With what `source` tells: values by field, where None is nothing. UserError if unfit."""
        told = {key: value for key, value in told.items() if value is not None}
        for key, value in told.items():
            told[key] = checked_field(key, value, source)
        if "resize" not in told:
            told["resize"] = round(told.get("size", self.size) * self.resize / self.size)
        result = replace(self, **told)
        if len(result.mean) != len(result.std):
            raise UserError(
                f"{source}: mean has {len(result.mean)} value(s), std has {len(result.std)}; "
                "give both, with a value for each channel"
            )
        if result.crop == "center" and result.resize < result.size:
            raise UserError(
                f"{source}: resize {result.resize} is less than the image size {result.size}, "
                "which is cut from it"
            )
        return result

    def normalise(
        self,
        pixels: np.ndarray,  # (n, s, s, c) uint8
    ) -> Tensor:  # (n, c, s, s) float32
        """Scale to [0, 1], then shift by the mean and divide by the standard deviation."""
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        images = images.to(torch.float32, memory_format=torch.contiguous_format)
        return images.div_(255).sub_(mean).div_(std)


def checked_field(key: str, value: Any, source: str) -> Any:
    """The value of a field of `Preprocessing` that `source` tells. UserError if it cannot be."""
    choices = {"crop": CROPS, "interpolation": INTERPOLATIONS}
    if key in ("mean", "std"):
        return channel_values(value, f"{source}: {key}")
    if key in ("size", "resize"):
        if type(value) is not int or value < 1:
            raise UserError(f"{source}: {key} must be pixels, from 1; got {value!r}")
    elif key not in choices:
        known = ", ".join(item.name for item in fields(Preprocessing))
        raise UserError(f"{source}: preprocessing has {known}, not {key}")
    elif value not in choices[key]:
        raise UserError(f"{source}: {key} must be one of {', '.join(choices[key])}; got {value!r}")
    return value


def channel_values(given: Any, subject: str) -> tuple[float, ...]:
    """A number for each channel, from a sequence or from text, which may have fractions.

    >>> channel_values("127/255,0.5,1e-2", "std")
    (0.4980392156862745, 0.5, 0.01)
    """
    parts = given.split(",") if isinstance(given, str) else given
    try:
        values = tuple(float(Fraction(x) if isinstance(x, str) else x) for x in parts)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        values = ()
    positive = subject.endswith("std")
    valid = all(math.isfinite(x) and (x > 0 or not positive) for x in values)
    if len(values) not in PILLOW_MODES or not valid:
        raise UserError(
            f"{subject} must be a number{' above 0' if positive else ''} for each of 3 channels "
            f"(as in 0.5,0.5,127/255), or one for grey images; got {given}"
        )
    return values
