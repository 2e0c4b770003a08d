"""Image files that may be damaged: read, or named.

    list_images       the images below a folder, sorted
    FileImages        files with labels; decoded when asked for, a UserError if that fails
    damaged(files)    {file: what is wrong}, quickly: before hours are spent

`damaged` reads the header of every file (size and format, hence also decompression bombs: more
pixels than PIL allows) and its end: a JPEG ends in FF D9, a PNG in IEND, a WEBP has the length that
it says. A file whose end is suspicious is decoded to be sure, so that no good image is refused.
What it cannot see is damage in between; of other formats it reads the header only. Such files are
found when they are decoded.
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
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from obc.solver.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
FILES_OF_A_WORKER = 2000  # fewer are not worth a process
TAIL = 64  # bytes at the end of a JPEG that may hold its end: cameras and editors add a few


# -- reading ---------------------------------------------------------------------------------------


class BadImage(UserError):
    """A file that is no image, and how many others there are like it."""

    def __init__(self, path: str, flaw: str, others: int = 0) -> None:
        super().__init__(path, flaw, others)  # so that it can be sent from process to process
        self.path, self.flaw, self.others = path, flaw, others

    def __str__(self) -> str:
        more = f", and {self.others} more" if self.others else ""
        return (
            f"{self.path}: not a readable image ({self.flaw}){more}; "
            "replace it, or pass --skip-bad-images"
        )


@dataclass(frozen=True)
class FileImages:
    """Image files with labels; decoded when asked for."""

    files: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image = decoded(self.files[index])
        if isinstance(image, str):
            raise BadImage(self.files[index], image)
        return image, self.labels[index]


def decoded(path: str) -> Image.Image | str:
    """The image in a file, as RGB; or what is wrong with it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PIL cannot take is an error
            with Image.open(path) as image:
                return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # on arbitrary bytes PIL's decoders raise anything
        return flaw_of(error)


def flaw_of(error: Exception) -> str:
    """An error in words, without the file's name."""
    if isinstance(error, UnidentifiedImageError):
        return "of no known image format"
    text = getattr(error, "strerror", None) or str(error).splitlines()[:1]
    return text if isinstance(text, str) else (text or [type(error).__name__])[0]


# -- looking at many -------------------------------------------------------------------------------


def quick_flaw(path: str) -> str | None:
    """What is wrong with a file, as far as its header and end tell; see the module docstring."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with open(path, "rb") as file, Image.open(file) as image:
                if ends_well(file, image.format):
                    return None
    except MemoryError:
        raise
    except Exception as error:
        return flaw_of(error)
    image = decoded(path)
    return image if isinstance(image, str) else None


def ends_well(file: BinaryIO, kind: str | None) -> bool:
    """Whether the end of a file is that of a whole image of this format; True if nobody knows."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - TAIL))
    tail = file.read(TAIL)
    if kind in ("JPEG", "MPO"):
        return b"\xff\xd9" in tail
    if kind == "PNG":
        return tail[-8:-4] == b"IEND"
    if kind == "WEBP":
        file.seek(4)
        return int.from_bytes(file.read(4), "little") + 8 <= size
    return True


class _Flaws(Dataset):
    """`quick_flaw` of every file."""

    def __init__(self, files: Sequence[str]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[str, str | None]:
        return self.files[index], quick_flaw(self.files[index])


def leave_interrupts(_worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a DataLoader ends its workers by it


def _found(items: list[tuple[str, str | None]]) -> list[tuple[str, str]]:
    return [(path, flaw) for path, flaw in items if flaw is not None]


def damaged(files: Sequence[str], workers: int) -> dict[str, str]:
    """Files that are no images, and why; quickly, see the module docstring."""
    loader = DataLoader(
        _Flaws(files),
        batch_size=256,
        collate_fn=_found,
        num_workers=min(workers, len(files) // FILES_OF_A_WORKER),
        worker_init_fn=leave_interrupts,
    )
    slow = tqdm(loader, desc="checking images", leave=False, disable=None, delay=2)
    return {path: flaw for batch in slow for path, flaw in batch}


# -- listing ---------------------------------------------------------------------------------------


def subfolders(folder: Path) -> set[str]:
    with os.scandir(folder) as entries:
        return {
            entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")
        }


def list_images(folder: Path, present: set[str], classes: list[str]) -> FileImages:
    """All images below `folder`, class by class and sorted by name, labelled by `classes`."""
    files, labels = [], []
    for label, name in enumerate(classes):
        if name in present:
            found = _images_below(os.path.join(folder, name))
            files += found
            labels += [label] * len(found)
    if not files:
        raise UserError(
            f"{folder}: no images in it; expected <class>/<image>, "
            f"with a name ending in {' '.join(IMAGE_SUFFIXES)}"
        )
    return FileImages(files, labels)


def _images_below(folder: str) -> list[str]:
    """Image files in a folder and the folders in it, in torchvision's order (`make_dataset`)."""
    return [
        os.path.join(below, name)
        for below, _, names in sorted(os.walk(folder, followlinks=True))
        for name in sorted(names)
        if name.lower().endswith(IMAGE_SUFFIXES)
    ]
