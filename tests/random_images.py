"""Random images in every mode that Pillow reads, and what must become of each.

An image is drawn as a brightness of 0 … 255 for each pixel and written losslessly in a random mode,
type, range and format. The right answers do not come from Pillow: grey pixels of that brightness in
RGB, if the mode and the range say which value is white; else a refusal in one line.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from obc.inputs.images import BadImage, read_image

MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I;16B", "I", "F")
FORMATS = {  # without loss
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "TIFF": MODES,
    "PPM": ("1", "L", "RGB", "I;16", "I", "F"),
    "TGA": ("1", "L", "LA", "P", "RGB", "RGBA"),
    "BMP": ("1", "L", "P", "RGB"),
    "GIF": ("1", "L", "P"),
    "JPEG2000": ("L", "LA", "RGB", "RGBA", "I;16"),
    "WEBP": ("RGB",),
}
OPTIONS = {"JPEG2000": {"irreversible": False}, "WEBP": {"lossless": True}}
RANGES = {  # mode: scale, offset, whether black and white are known
    "I": ((1, 0, True), (257, 0, True), (300, 0, False), (1, -300, False)),
    "F": (
        (1 / 255, 0, True),
        (1, 0, True),
        (1, 0.5, False),
        (2 / 255, -1, False),
        (257, 0, False),
        (np.inf, 1, False),
    ),
}
Random = np.random.Generator


def random_image(rng: Random) -> tuple[Image.Image, str, np.ndarray | None]:
    """An image, its format, and the brightness (height, width) of its pixels; None: not known."""
    bright = rng.integers(0, 256, rng.integers(2, 40, size=2), dtype=np.uint8)
    if rng.random() < 0.5:  # as photographs and scans that are dark, or have few colours
        bright = np.clip(bright // rng.integers(1, 9) + rng.integers(0, 99), 0, 255).astype(
            np.uint8
        )
    mode = MODES[rng.integers(len(MODES))]
    kind = rng.choice([name for name, modes in FORMATS.items() if mode in modes])
    alpha = rng.integers(0, 256, bright.shape, dtype=np.uint8)
    if mode == "1":
        bright = np.where(bright > 127, 255, 0).astype(np.uint8)
        return Image.fromarray(bright > 127), kind, bright
    if mode == "P":
        order = rng.permutation(256)
        image = Image.fromarray(np.argsort(order).astype(np.uint8)[bright]).convert("L")
        image.putpalette(np.repeat(order, 3).astype(np.uint8).tobytes())
        return image, kind, bright
    if mode in ("I", "F"):
        scale, offset, known = RANGES[mode][rng.integers(len(RANGES[mode]))]
        bright.flat[:2] = 0, 255  # so that the range can be seen
        if kind == "PPM" and mode == "I":  # holds 16 bits whatever the values are
            scale, offset, known = 257, 0, True
        with np.errstate(invalid="ignore"):
            values = bright.astype(np.float64) * scale + offset
        made = values.astype(np.int32 if mode == "I" else np.float32)
        return Image.fromarray(made), kind, bright if known else None
    if mode.startswith("I;16"):
        values = np.clip(
            bright.astype(np.int64) * 257 + rng.integers(-128, 129, bright.shape), 0, 65535
        )
        return Image.fromarray(values.astype(">u2" if mode == "I;16B" else "<u2")), kind, bright
    bands = {"LA": [bright, alpha], "RGBA": [bright] * 3 + [alpha], "RGB": [bright] * 3}
    ink = [255 - bright] * 3 + [0 * bright]
    pieces = [Image.fromarray(band) for band in bands.get(mode, [bright] if mode == "L" else ink)]
    return pieces[0] if mode == "L" else Image.merge(mode, pieces), kind, bright


def write_random_image(path: Path, rng: Random) -> tuple[str, np.ndarray | None]:
    """Write an image; its mode and format, and what it must be read as."""
    image, kind, bright = random_image(rng)
    image.save(path, kind, **OPTIONS.get(kind, {}))
    return f"{image.mode} in {kind}", bright


def wrong_pixels(path: Path, rng: Random) -> tuple[str | None, bool]:
    """What is wrong about how a random image is read, if anything; whether it was refused."""
    what, bright = write_random_image(path, rng)
    try:
        pixels = np.asarray(read_image(str(path)))
    except BadImage as error:
        refused = f"{what}: refused: {error}"
        return (None if bright is None and len(str(error).splitlines()) == 1 else refused), True
    if bright is None:
        return f"{what}: read though nobody knows what is white", False
    same = np.array_equal(pixels, np.repeat(bright[..., None], 3, axis=2))
    return (None if same else f"{what}: other pixels"), False
