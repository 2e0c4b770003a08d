"""Image files that may be damaged: read, or named in an error.

    list_images           the images below a folder, sorted; class folders without any are named
    FileImages            files with labels; decoded when an item is asked for
    inspect_files(files)  what is wrong with which file, and which are converted to 8 bits; a quick
                          check, before hours are spent

`inspect_files` reads the header of every file (format and size, so it also finds decompression
bombs: more pixels than PIL allows) and its end: a JPEG ends in FF D9, a PNG in IEND, a WEBP has the
length that its header says. A file with a suspicious end is decoded to be sure, so no good image is
refused. Damage in the middle, and at the end of other formats, is found when a file is decoded.

An image becomes RGB of 8 bits as Pillow converts it, except for the modes whose values Pillow would
clip at 255. Their files are counted in the log (`log_deep_images`), with their conversion:

| mode                  | values           | become                                              |
|-----------------------|------------------|-----------------------------------------------------|
| I;16, I;16B, …        | any              | value / 257, rounded                                |
| I (32-bit integers)   | up to 65535      | value / 257, rounded, if one is above 255 or the    |
|                       |                  | format has 16 bits (PNG, PGM); else left as it is   |
| F (floating point)    | in [0, 1]        | 255 · value, rounded                                |
|                       | whole, up to 255 | left as they are                                    |
| I, F                  | anything else    | a BadImage: nobody knows which value is white       |
"""

from __future__ import annotations

import os
import signal
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader

from obc.solver.errors import UserError, log
from obc.solver.progress import progress

FORMATS_OF_16_BITS = ("PNG", "PPM")  # if Pillow's mode is I; PPM includes PGM
NOT_DECODED = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")  # by Pillow alone, on any machine
FILES_PER_WORKER = 2000  # for fewer, starting a process does not pay
CLASSES_NAMED = 5  # in a log line
TAIL = 64  # bytes at the end of a JPEG that may contain its end marker: cameras add a few


# -- reading ---------------------------------------------------------------------------------------


class BadImage(UserError):
    """A file that is not an image, and how many others like it there are."""

    def __init__(self, path: str, flaw: str, others: int = 0) -> None:
        super().__init__(path, flaw, others)  # so that it can be pickled
        self.path, self.flaw, self.others = path, flaw, others

    def __str__(self) -> str:
        more = f", and {self.others} more" if self.others else ""
        advice = "replace it, or pass --skip-bad-images"
        return f"{self.path}: not a readable image ({self.flaw}){more}; {advice}"


@dataclass(frozen=True)
class FileImages:
    """Image files with labels; decoded when an item is asked for."""

    files: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return read_image(self.files[index]), self.labels[index]


@contextmanager
def opened(path: str) -> Iterator[tuple[BinaryIO, Image.Image]]:
    """A file and its image, not decoded yet. Raises BadImage, also for what fails in the body."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PIL cannot read is an error
            with open(path, "rb") as file, Image.open(file) as image:
                yield file, image
        return
    except MemoryError:
        raise
    except UnidentifiedImageError:
        flaw = "of no known image format"
    except Exception as error:  # on arbitrary bytes PIL's decoders can raise anything
        flaw = getattr(error, "strerror", None)
        if not isinstance(flaw, str):
            flaw = (str(error).splitlines() or [type(error).__name__])[0]
    raise BadImage(path, flaw)


def read_image(path: str) -> Image.Image:
    """The image in a file, as RGB. Raises BadImage."""
    with opened(path) as (_, image):
        return as_rgb(image)[0]


def as_rgb(image: Image.Image) -> tuple[Image.Image, str | None]:
    """RGB of 8 bits and, for an image of more bits, how it was converted (see the docstring above).

    Raises ValueError if nobody knows which values are black and white.
    """
    if not more_than_8_bits(image):
        return image.convert("RGB"), None
    values = np.asarray(image)
    low, high = (values.min(), values.max()) if values.size else (0, 0)
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("its values are not all finite")
    kind = {"F": "floating-point", "I": "32-bit"}.get(image.mode, "16-bit")
    if kind == "floating-point" and 0 <= low and high <= 1:
        values, conversion = values * 255.0, f"{kind} values in [0, 1], multiplied by 255"
    elif (
        kind == "floating-point" and 0 <= low and high <= 255 and (values == np.rint(values)).all()
    ):
        conversion = f"whole {kind} values up to 255, left as they are"
    elif kind == "32-bit" and 0 <= low and high <= 255 and image.format not in FORMATS_OF_16_BITS:
        conversion = f"{kind} values up to 255, left as they are"
    elif kind != "floating-point" and 0 <= low and high <= 65535:
        values = np.divide(values, 257, dtype=np.float32)
        conversion = f"{kind} values up to 65535, divided by 257"
    else:
        raise ValueError(
            f"{kind} values from {low:.10g} to {high:.10g}, so black and white are not known: "
            "save it with 8 or 16 bits"
        )
    return Image.fromarray(np.rint(values).astype(np.uint8)).convert("RGB"), conversion


def more_than_8_bits(image: Image.Image) -> bool:
    """Whether Pillow would clip the image's values, not scale them, to 8 bits."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def ends_well(file: BinaryIO, image_format: str | None) -> bool:
    """Whether a file ends like a complete image of its format; True for formats not known here."""
    position = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - TAIL))
    tail = file.read(TAIL)
    file.seek(4)
    length = int.from_bytes(file.read(4), "little") + 8  # of a WEBP
    file.seek(position)
    if image_format in ("JPEG", "MPO"):
        return b"\xff\xd9" in tail
    if image_format == "PNG":
        return tail[-8:-4] == b"IEND"
    return length <= size if image_format == "WEBP" else True


# -- checking --------------------------------------------------------------------------------------


def leave_interrupts(_worker: int) -> None:
    """Signals in a worker: the main process handles interrupts, and ends its workers by SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@dataclass(frozen=True)
class Inspection:
    """What there is to say about files."""

    flaws: dict[str, str]  # file → what is wrong with it
    conversions: dict[str, str]  # file of more than 8 bits → how it is converted to 8


def _inspect(paths: list[str]) -> Inspection:
    flaws, conversions = {}, {}
    for path in paths:
        try:
            with opened(path) as (file, image):
                if more_than_8_bits(image):
                    conversions[path] = as_rgb(image)[1]
                elif not ends_well(file, image.format):
                    image.load()
        except BadImage as error:
            flaws[path] = error.flaw
    return Inspection(flaws, conversions)


def inspect_files(files: Sequence[str], workers: int) -> Inspection:
    """Files that are not images, and those of more than 8 bits: a quick check, see above."""
    loader = DataLoader(
        files,
        batch_size=256,
        collate_fn=_inspect,
        num_workers=min(workers, len(files) // FILES_PER_WORKER),
        worker_init_fn=leave_interrupts,
    )
    whole = Inspection({}, {})
    for piece in progress("checking images", loader):
        whole.flaws.update(piece.flaws)
        whole.conversions.update(piece.conversions)
    return whole


def log_deep_images(conversions: dict[str, str]) -> None:
    """One line for each way in which images of more than 8 bits are converted."""
    for conversion, count in Counter(conversions.values()).items():
        first = next(path for path, other in conversions.items() if other == conversion)
        images = "1 image has" if count == 1 else f"{count} images have"
        log.warning("%s %s; the first is %s", images, conversion, first)


# -- listing ---------------------------------------------------------------------------------------


@cache
def image_suffixes() -> tuple[str, ...]:
    """The suffixes, in lower case, of the formats that Pillow decodes."""
    suffixes = Image.registered_extensions().items()  # loads all of Pillow's formats
    return tuple(x for x, kind in suffixes if kind in Image.OPEN and kind not in NOT_DECODED)


def hidden(name: str) -> bool:
    """Whether a file or folder is hidden: no image, whatever it contains."""
    return name.startswith(".")


def subfolders(folder: Path) -> set[str]:
    """Names of the folders in a folder, without hidden ones."""
    return {x.name for x in os.scandir(folder) if x.is_dir() and not hidden(x.name)}


def list_images(folder: Path, present: set[str], classes: list[str]) -> FileImages:
    """All images below `folder`, class by class and sorted by name, labelled by `classes`.

    A class folder without images keeps its label, and is named in the log.
    """
    files, labels, lacking, others = [], [], {}, Counter()
    for label, name in enumerate(classes):
        if name not in present:
            continue
        below = _files_below(os.path.join(folder, name))
        images = [file for file in below if file.lower().endswith(image_suffixes())]
        files += images
        labels += [label] * len(images)
        if not images:
            lacking[name] = f"{len(below)} other files, such as {below[0]}" if below else "empty"
        elif len(images) < len(below):
            others.update(Path(x).suffix for x in set(below) - set(images))
    if not files:
        what = "".join(f"; {name}/: {content}" for name, content in list(lacking.items())[:1])
        raise UserError(
            f"{folder}: no images in it; expected <class>/<image>, with a suffix that Pillow "
            f"reads, such as .jpg or .png{what}; images without class folders need --labels FILE"
        )
    if lacking:
        named = [f"{name} ({content})" for name, content in lacking.items()][:CLASSES_NAMED]
        more = f" and {len(lacking) - len(named)} more" if len(lacking) > len(named) else ""
        log.warning(
            "%s: no images of %s%s; the others keep their class numbers",
            *(folder, ", ".join(named), more),
        )
    if others:
        kinds = ", ".join(f"{count} {suffix or 'without one'}" for suffix, count in others.items())
        log.info("%s: files are left out that are not images by their suffix: %s", folder, kinds)
    return FileImages(files, labels)


def _files_below(folder: str) -> list[str]:
    """Files in a folder and below that are not hidden, in torchvision's order (`make_dataset`)."""
    found = []
    for below, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not hidden(name)]
        found.append((below, sorted(name for name in names if not hidden(name))))
    return [os.path.join(below, name) for below, names in sorted(found) for name in names]
