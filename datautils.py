"""Datasets by name: a calibration subset, augmented or not, and a test set.

    load_data("digits") ─▶ ImageData ─┬─ calibration_batches ─▶ (images, labels), nrounds passes
                                      └─ test_batches ────────▶ (images, labels)

images: (n, c, s, s) float32, in [0, 1] minus mean over std, per channel;  labels: (n,) int64.

| kind     | images come from             | plain view                | augmented view            |
|----------|------------------------------|---------------------------|---------------------------|
| imagenet | train/<class>/, val/<class>/ | shorter side to s·256/224,| random resized crop, flip |
| folder   | (another default path)       | centre crop               |                           |
| cifar10  | torchvision's files, or      | side to s                 | random shift, flip        |
|          | train/ and val/ or test/     |                           |                           |
| digits   | assets/digits.npz, 8×8       | side to s                 | random shift              |

This holds for networks that do not say otherwise: the plain view is the network's `Preprocessing`.
Resizing has antialiasing; an image that has the right size already is not changed. A shift is zero
padding before normalisation and a random crop back to s×s. The padding is s/8 pixels: the usual 4
for CIFAR's 32, and in proportion for other sizes.

Everything random depends on the seed alone. The calibration subset is a seeded choice from the
sorted list of files, in random order, so that every batch mixes classes. The augmentation of image
i in pass r is drawn from a generator seeded with (seed, r, i), so it depends neither on the number
of workers nor on the order in which they run.

Labels are numbers of classes: the places of the class folders, sorted as text, or those of their
names in a file with a line for each of the network's outputs.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from obc.inputs.batches import ImageBatches, Passes, log_skipped
from obc.inputs.images import (
    BadImage,
    FileImages,
    inspect_files,
    list_images,
    log_deep_images,
    subfolders,
)
from obc.inputs.labels import read_labels
from obc.inputs.preprocessing import PILLOW_MODES, Preprocessing
from obc.inputs.vision import torchvision
from obc.solver.errors import UserError, log

DATASETS = ("imagenet", "cifar10", "digits", "folder")
DEFAULT_SIZES = {"imagenet": 224, "folder": 224, "cifar10": 32, "digits": 16}  # pixels
PHOTOGRAPHS = ("imagenet", "folder")  # of any shape; the others' images are small and square
DEFAULT_CLASSES = {"cifar10": 10, "digits": 10}  # of the others, as many as folders
DEFAULT_PATHS = {"imagenet": "../imagenet", "cifar10": "../cifar10"}
DIGITS_FILE = Path(__file__).resolve().parent / "assets" / "digits.npz"
CIFAR_BATCHES = "cifar-10-batches-py"  # torchvision's name
CIFAR_ARCHIVE = "cifar-10-python.tar.gz"  # … of the file that it comes in
CLASSES_SHOWN = 12  # in a log line
MAX_WORKERS = 8


# ------------------------------------------------------------------------- images and labels


@dataclass(frozen=True)
class ArrayImages:
    """Images in memory."""

    pixels: np.ndarray  # (n, height, width, 3) uint8
    labels: list[int]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]), self.labels[index]


Images = FileImages | ArrayImages


# ------------------------------------------------------------------------------------- views


@dataclass(frozen=True)
class View:
    """How an image becomes a network's input of s×s pixels."""

    preprocessing: Preprocessing
    photographs: bool  # augmented by random crops, not by shifts
    flips: bool  # whether a mirrored image still belongs to its class

    @property
    def size(self) -> int:  # s
        return self.preprocessing.size

    def plain(self, image: Image.Image) -> Image.Image:
        """The view for testing, and for calibration without augmentation."""
        made = self.preprocessing
        if made.crop == "center":
            functional = torchvision.transforms.functional
            mode = torchvision.transforms.InterpolationMode(made.interpolation)
            image = functional.resize(image, made.resize, mode)
            return functional.center_crop(image, made.size)
        if image.size != (made.size, made.size):
            resampling = Image.Resampling[made.interpolation.upper()]
            image = image.resize((made.size, made.size), resampling)
        return image

    def augmented(self, image: Image.Image) -> Image.Image:
        """A random view; draws from PyTorch's global generator, as torchvision's transforms do."""
        if self.photographs:
            transforms, square = torchvision.transforms, [self.size, self.size]
            box = transforms.RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))
            mode = transforms.InterpolationMode(self.preprocessing.interpolation)
            image = transforms.functional.resized_crop(image, *box, square, mode)
        else:
            padding = self.size // 8
            left, upper = torch.randint(-padding, padding + 1, (2,)).tolist()
            box = (left, upper, left + self.size, upper + self.size)
            image = self.plain(image).crop(box)  # PIL fills what lies outside with zeros
        if self.flips and torch.rand(()) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image


@dataclass(frozen=True)
class ImageSet(Dataset):
    """The chosen images of a source: pairs (image (c, s, s) float32 in the plain view, label)."""

    source: Images
    view: View
    chosen: Sequence[int]

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def preprocessing(self) -> Preprocessing:
        return self.view.preprocessing

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels, label = self.pixels(index)
        return self.preprocessing.normalise(pixels[None])[0], label

    def pixels(
        self,
        index: int,
        seed: tuple[int, ...] | None = None,  # None: the plain view
    ) -> tuple[np.ndarray, int]:  # (s, s, c) uint8, label
        """An image before normalisation: plain, or augmented in a way that `seed` alone decides."""
        image, label = self.source[self.chosen[index]]
        image = image.convert(PILLOW_MODES[self.preprocessing.channels])
        if seed is None:
            image = self.view.plain(image)
        else:
            state = np.random.SeedSequence(seed).generate_state(1, np.uint64)
            with torch.random.fork_rng(devices=[]):  # leaves the global generator as it was
                torch.default_generator.manual_seed(int(state[0]))
                image = self.view.augmented(image)
        return np.array(image).reshape(self.view.size, self.view.size, -1), label


@dataclass(frozen=True)
class ImageData:
    """A dataset as the commands use it."""

    name: str
    classes: list[str]  # in the order of their numbers
    calibration: ImageSet
    test: ImageSet
    workers: int  # decoding processes that pay off
    skip_bad_images: bool = False

    @property
    def preprocessing(self) -> Preprocessing:
        return self.test.preprocessing

    @property
    def image_size(self) -> int:
        return self.preprocessing.size

    def seen_through(self, preprocessing: Preprocessing) -> ImageData:
        """The same images, made another way."""
        calibration, test = (
            replace(images, view=replace(images.view, preprocessing=preprocessing))
            for images in (self.calibration, self.test)
        )
        return replace(self, calibration=calibration, test=test)


# ---------------------------------------------------------------------------------- by name


def default_preprocessing(dataset: str, size: int | None = None) -> Preprocessing:
    """Of a network that does not say how its images are made; None: the dataset's size."""
    size = DEFAULT_SIZES[dataset] if size is None else size
    if dataset in PHOTOGRAPHS:
        return Preprocessing(size, resize=round(size * 256 / 224))
    return Preprocessing(size, resize=size, crop="squash")


def load_data(
    name: str,
    *,
    datapath: str | os.PathLike[str] | None = None,
    image_size: int | None = None,  # pixels; default by kind of dataset
    nsamples: int = 1024,
    seed: int = 0,
    skip_bad_images: bool = False,  # else they are a UserError
    class_file: str | os.PathLike[str] | None = None,  # names in the network's order of outputs
    label_file: str | os.PathLike[str] | None = None,  # of test images that are in one folder
) -> ImageData:
    """The dataset `name`. Raises UserError for an unknown name, for missing or empty folders, for
    classes that are not in `class_file`, and for damaged image files (as far as
    `images.inspect_files` can tell).
    """
    if name not in DATASETS:
        raise UserError(f"unknown dataset {name}; choose from {', '.join(DATASETS)}")
    if label_file is not None and name not in PHOTOGRAPHS:
        raise UserError(f"--labels is for the datasets imagenet and folder, not for {name}")
    if name == "digits":
        if datapath is not None:
            log.warning("--datapath %s is not used: digits is embedded", datapath)
        train, test, classes = _digits()
    else:
        root = _root(name, datapath)
        if name == "cifar10" and (batches := _cifar_batches(root)) is not None:
            train, test, classes = _cifar_arrays(batches)
        else:
            train, test, classes = _folders(name, root, label_file is not None)
    if class_file is not None:
        names = read_classes(class_file, classes)
        numbers = [names.index(name) for name in classes]
        train, test = (
            replace(source, labels=[numbers[label] for label in source.labels])
            for source in (train, test)
        )
        classes = names
    elif out_of_order(classes):
        shown = ", ".join(classes[:CLASSES_SHOWN]) + (", …" if len(classes) > CLASSES_SHOWN else "")
        log.warning(
            "classes are sorted as text: %s; if the network's outputs are in another order, "
            "pass --classes FILE",
            shown,
        )
    if label_file is not None:
        test = replace(test, labels=read_labels(label_file, test.files, classes))
    photographs = name in PHOTOGRAPHS
    view = View(default_preprocessing(name, image_size), photographs, flips=name != "digits")
    workers = min(MAX_WORKERS, os.cpu_count() or 1) if photographs else 0
    if nsamples > len(train):
        counts = (name, len(train), nsamples)
        log.warning("%s has %d training images: calibrating on all of them, not on %d", *counts)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    chosen = {"training": (train, order[:nsamples].tolist()), "test": (test, range(len(test)))}
    readable = _readable(chosen, workers, skip_bad_images)
    calibration, tested = (
        ImageSet(source, view, readable[which]) for which, (source, _) in chosen.items()
    )
    return ImageData(name, classes, calibration, tested, workers, skip_bad_images)


def _readable(
    chosen: dict[str, tuple[Images, Sequence[int]]],  # by what they are for
    workers: int,
    skip: bool,
) -> dict[str, Sequence[int]]:
    """The chosen images that can be read. Raises UserError for others unless `skip`."""
    indices = {which: list_of for which, (_, list_of) in chosen.items()}
    files = {
        which: [source.files[index] for index in list_of]
        for which, (source, list_of) in chosen.items()
        if isinstance(source, FileImages)
    }
    inspection = inspect_files([file for every in files.values() for file in every], workers)
    for which, every in files.items():
        flaws = {file: inspection.flaws[file] for file in every if file in inspection.flaws}
        if flaws and (not skip or len(flaws) == len(every)):
            raise BadImage(*next(iter(flaws.items())), others=len(flaws) - 1)
        if flaws:
            log_skipped(flaws, f"of {len(every)} {which} images")
            pairs = zip(indices[which], every, strict=True)
            indices[which] = [index for index, file in pairs if file not in flaws]
    log_deep_images(inspection.conversions)
    return indices


def read_classes(
    path: str | os.PathLike[str],
    needed: Sequence[str],  # names that have to be in it
) -> list[str]:
    """The class names in a file, one a line. UserError unless each needed one is in it once."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").rstrip().split("\n")
    except OSError as error:
        raise UserError(f"--classes {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"--classes {path}: not a text file in UTF-8") from None
    names = [line.strip() for line in lines]
    if "" in names:
        raise UserError(f"--classes {path}: line {names.index('') + 1} is empty")
    counts = Counter(names)
    if wrong := [name for name in needed if counts[name] != 1]:
        times = "not in it" if not counts[wrong[0]] else f"on {counts[wrong[0]]} lines"
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(
            f"--classes {path}: class {wrong[0]} is {times}{more}; the file needs a line for "
            "each of the network's outputs, and every class folder has to be named in it"
        )
    return names


def out_of_order(classes: Sequence[str]) -> bool:
    """Whether names that differ by numbers are not in the order of these numbers.

    >>> out_of_order(["1", "10", "2"]), out_of_order(["01", "02", "10"]), out_of_order(["b2", "c1"])
    (True, False, False)
    """
    last: dict[str, list[int]] = {}
    for name in classes:
        pattern, numbers = re.sub(r"\d+", "#", name), [int(x) for x in re.findall(r"\d+", name)]
        if numbers < last.get(pattern, []):
            return True
        last[pattern] = numbers
    return False


def _digits() -> tuple[ArrayImages, ArrayImages, list[str]]:
    with np.load(DIGITS_FILE, allow_pickle=False) as stored:
        images, labels, test = stored["images"], stored["labels"], stored["test"]
    grey = np.rint(images * (255 / 16)).astype(np.uint8)  # published as counts 0 … 16
    pixels = np.repeat(grey[..., None], 3, axis=3)
    parts = (ArrayImages(pixels[part], labels[part].tolist()) for part in (~test, test))
    return *parts, [str(digit) for digit in range(10)]


def _root(name: str, datapath: str | os.PathLike[str] | None) -> Path:
    if datapath is None and name not in DEFAULT_PATHS:
        raise UserError(f"dataset {name} needs --datapath DIR, with train/ and val/ in it")
    root = Path(DEFAULT_PATHS[name] if datapath is None else datapath)
    if not root.is_dir():
        what = "is not a directory" if root.exists() else "does not exist"
        raise UserError(f"{root}: {what}; pass --datapath DIR, where the {name} images are")
    return root


def _cifar_batches(root: Path) -> Path | None:
    """The folder that contains torchvision's `cifar-10-batches-py`, if there is one."""
    if (root / CIFAR_BATCHES).is_dir():
        return root
    return root.parent if root.resolve().name == CIFAR_BATCHES else None


def _cifar_arrays(root: Path) -> tuple[ArrayImages, ArrayImages, list[str]]:
    try:
        sets = [torchvision.datasets.CIFAR10(str(root), train=part) for part in (True, False)]
    except (RuntimeError, OSError, EOFError) as error:
        what = _cifar_flaw(root) or f"{root / CIFAR_BATCHES}: {error}"
        raise UserError(f"{what}; unpack {CIFAR_ARCHIVE} again") from None
    return *(ArrayImages(images.data, images.targets) for images in sets), list(sets[0].classes)


def _cifar_flaw(root: Path) -> str | None:
    """The first of torchvision's files that is missing or damaged, and how many others are."""
    kind, intact = torchvision.datasets.CIFAR10, torchvision.datasets.cifar.check_integrity
    files = {**dict([*kind.train_list, *kind.test_list]), kind.meta["filename"]: kind.meta["md5"]}
    paths = {root / kind.base_folder / name: md5 for name, md5 in files.items()}
    wrong = {path: path.is_file() for path, md5 in paths.items() if not intact(str(path), md5)}
    if not wrong:
        return None
    path, exists = next(iter(wrong.items()))
    more = f" ({len(wrong) - 1} more files are missing or damaged)" if len(wrong) > 1 else ""
    return f"{path}: {'is damaged: its MD5 is another' if exists else 'is missing'}{more}"


def _folders(
    name: str,
    root: Path,
    flat: bool,  # val/ has no class folders: its labels, all 0 here, are in a file
) -> tuple[FileImages, FileImages, list[str]]:
    """train/<class>/ and val/<class>/ (for cifar10 also test/<class>/) below `root`."""
    test_names = ("val", "test") if name == "cifar10" else ("val",)
    test_folder = next((root / x for x in test_names if (root / x).is_dir()), None)
    if not (root / "train").is_dir() or test_folder is None:
        packed = name == "cifar10" and (root / CIFAR_ARCHIVE).is_file()
        raise UserError(
            f"{root}: needs train/<class>/ and {'/<class>/ or '.join(test_names)}/<class>/ "
            f"with images; {f'unpack {CIFAR_ARCHIVE}, or ' if packed else ''}pass --datapath DIR"
        )
    if flat:
        present = subfolders(root / "train")
        train = list_images(root / "train", present, classes := sorted(present))
        return train, list_images(root, {test_folder.name}, [test_folder.name]), classes
    listed = {folder: subfolders(folder) for folder in (root / "train", test_folder)}
    train_classes, test_classes = listed.values()
    classes = sorted(train_classes | test_classes)
    if train_classes != test_classes:
        if set(classes) not in (train_classes, test_classes):
            odd = sorted(train_classes ^ test_classes)[0]
            raise UserError(
                f"{root}: train/ and {test_folder.name}/ have different classes "
                f"({odd} is in one of them only)"
            )
        counts = (root, len(train_classes), test_folder.name, len(test_classes))
        lacking = sorted(train_classes ^ test_classes)
        more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        log.warning(
            "%s: train/ has %d classes, %s/ has %d; only one of them has %s%s",
            *(*counts, lacking[0], more),
        )
    train, test = (list_images(folder, names, classes) for folder, names in listed.items())
    return train, test, classes


# ---------------------------------------------------------------------------------- batches


def calibration_batches(
    data: ImageData,
    *,
    batchsize: int = 128,
    nrounds: int = 1,
    augment: bool = False,
    seed: int = 0,
    workers: int | None = None,  # None: what suits the dataset
) -> ImageBatches:
    """`nrounds` passes over the calibration images; each augmented pass has new views of them.

    A batch may contain the end of one pass and the start of the next: only the very last can be
    smaller.
    """
    workers = data.workers if workers is None else workers
    passes = Passes(data.calibration, nrounds, seed if augment else None)
    return ImageBatches(passes, batchsize, workers, data.skip_bad_images)


def test_batches(
    data: ImageData,
    *,
    batchsize: int = 128,
    workers: int | None = None,  # None: what suits the dataset
) -> ImageBatches:
    """One pass over the test images."""
    workers = data.workers if workers is None else workers
    return ImageBatches(Passes(data.test, 1, None), batchsize, workers, data.skip_bad_images)


test_batches.__test__ = False  # pytest would take it for a test by its name
