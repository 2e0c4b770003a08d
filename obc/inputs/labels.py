"""Labels of images in one folder, from a file: --labels FILE.

Its lines are `name label`, of any images in any order, or a label for each of the images in the
order of their names. A label is the name of a class, or its number, counted from 0 in the order of
the network's outputs. So these files of ImageNet's are read as they come:

    val.txt (Caffe's)                        ILSVRC2012_val_00000001.JPEG 65
    LOC_val_solution.csv (Kaggle's)          ILSVRC2012_val_00048981,n03995372 85 131 499 476
    ILSVRC2012_validation_ground_truth.txt   490

The last one, from the development kit, counts from 1 in an order of its own, which the kit's
meta.mat has: it must lie next to it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from obc.solver.errors import UserError

IMAGENET_NUMBERS = "meta.mat"  # in the folder data/ of ImageNet's development kit


def read_labels(
    path: str | os.PathLike[str],
    files: Sequence[str],  # the images, in the order of their names
    classes: Sequence[str],  # in the order of the network's outputs
) -> list[int]:
    """The class number of each image. Raises UserError unless every image has one."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"--labels {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"--labels {path}: not a text file in UTF-8") from None
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    numbers = {name: number for number, name in enumerate(classes)}
    if lines and (lines[0].isdecimal() or lines[0] in numbers):
        if len(lines) != len(files):
            raise UserError(
                f"--labels {path}: {len(lines)} labels for {len(files)} images; each image needs "
                "one, in the order of the file names, or lines `name label`"
            )
        if all(line.isdecimal() for line in lines):
            names = imagenet_numbers(Path(path).with_name(IMAGENET_NUMBERS))
            lines = [names.get(int(line), line) for line in lines]
        return [class_number(label, numbers, path) for label in lines]
    pairs = (line.replace(",", " ", 1).split(maxsplit=1) for line in lines)
    named = {Path(pair[0]).stem: pair[1] for pair in pairs if len(pair) == 2}
    if lacking := [file for file in files if Path(file).stem not in named]:
        more = f", and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise UserError(f"--labels {path}: no line for {Path(lacking[0]).name}{more}")
    return [class_number(named[Path(file).stem], numbers, path) for file in files]


def class_number(
    label: str,  # a class or a number, which other words may follow
    numbers: Mapping[str, int],  # by class
    path: str | os.PathLike[str],
) -> int:
    for text in (label, label.split()[0]):
        if text in numbers:
            return numbers[text]
        if text.isdecimal() and int(text) < len(numbers):
            return int(text)
    raise UserError(
        f"--labels {path}: {label} is no class, nor a number from 0 to {len(numbers) - 1}; numbers "
        f"of ImageNet's development kit are read if its {IMAGENET_NUMBERS} lies next to the file"
    )


def imagenet_numbers(path: Path) -> dict[int, str]:
    """The classes in ImageNet's meta.mat by their numbers there; {} if there is no such file."""
    if not path.exists():
        return {}
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(f"{path}: reading it needs scipy: pip install scipy") from None
    try:
        table = loadmat(path, squeeze_me=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in table}
    except Exception as error:  # of a foreign reader on a foreign file
        raise UserError(f"{path}: not ImageNet's table of classes ({error})") from None
