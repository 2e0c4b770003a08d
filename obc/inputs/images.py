"""Image files that may be damaged: read, or named in an error.

    list_images       the images below a folder, sorted
    FileImages        files with labels; decoded when an item is asked for
    damaged(files)    {file: what is wrong with it}, a quick check before hours are spent

`damaged` reads the header of every file (format and size, so it also finds decompression bombs:
more pixels than PIL allows) and its end: a JPEG ends in FF D9, a PNG in IEND, a WEBP has the length
that its header says. A file with a suspicious end is decoded to be sure, so no good image is
refused. Damage in the middle, and at the end of other formats, is found when a file is decoded.
"""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader

from obc.solver.errors import UserError
from obc.solver.progress import progress

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
FILES_PER_WORKER = 2000  # for fewer, starting a process does not pay
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


def read_image(path: str, quick: bool = False) -> Image.Image | None:
    """The image in a file, as RGB. Raises BadImage.

    With quick=True, None if header and end are good; see the module docstring.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PIL cannot read is an error
            with open(path, "rb") as file, Image.open(file) as image:
                return None if quick and ends_well(file, image.format) else image.convert("RGB")
    except MemoryError:
        raise
    except UnidentifiedImageError:
        flaw = "of no known image format"
    except Exception as error:  # on arbitrary bytes PIL's decoders can raise anything
        flaw = getattr(error, "strerror", None)
        if not isinstance(flaw, str):
            flaw = (str(error).splitlines() or [type(error).__name__])[0]
    raise BadImage(path, flaw)


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


def _flaws(paths: list[str]) -> list[tuple[str, str]]:
    """The damaged ones among these files, and what is wrong with them."""
    flaws = []
    for path in paths:
        try:
            read_image(path, quick=True)
        except BadImage as error:
            flaws.append((path, error.flaw))
    return flaws


def damaged(files: Sequence[str], workers: int) -> dict[str, str]:
    """Files that are not images, and what is wrong with them: a quick check, see above."""
    loader = DataLoader(
        files,
        batch_size=256,
        collate_fn=_flaws,
        num_workers=min(workers, len(files) // FILES_PER_WORKER),
        worker_init_fn=leave_interrupts,
    )
    batches = progress("checking images", loader)
    return {path: flaw for flaws in batches for path, flaw in flaws}


# -- listing ---------------------------------------------------------------------------------------


def subfolders(folder: Path) -> set[str]:
    """Names of the folders in a folder, without hidden ones."""
    return {x.name for x in os.scandir(folder) if x.is_dir() and not x.name.startswith(".")}


def list_images(folder: Path, present: set[str], classes: list[str]) -> FileImages:
    """All images below `folder`, class by class and sorted by name, labelled by `classes`."""
    labelled = [
        (file, label)
        for label, name in enumerate(classes)
        if name in present
        for file in _images_below(os.path.join(folder, name))
    ]
    if not labelled:
        raise UserError(
            f"{folder}: no images in it; expected <class>/<image>, "
            f"with a name ending in {' '.join(IMAGE_SUFFIXES)}"
        )
    files, labels = zip(*labelled, strict=True)
    return FileImages(list(files), list(labels))


def _images_below(folder: str) -> list[str]:
    """Image files in a folder and below, in torchvision's order (`make_dataset`)."""
    return [
        os.path.join(below, name)
        for below, _, names in sorted(os.walk(folder, followlinks=True))
        for name in sorted(names)
        if name.lower().endswith(IMAGE_SUFFIXES)
    ]
