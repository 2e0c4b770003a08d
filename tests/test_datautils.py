"""datautils.py: contents of the batches, reproducibility, and user errors."""

from __future__ import annotations

import logging
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import datautils
from datautils import calibration_batches, load_data
from datautils import test_batches as batches_of_tests
from obc.inputs.preprocessing import MEAN, STD, Preprocessing
from obc.solver.errors import UserError


def write_image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """12 training and 4 test images of two classes, 40×32 pixels; one of them is grey."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 2)):
        for name in ("cat", "dog"):
            for index in range(count):
                shape = (32, 40) if (name, index) == ("dog", 1) else (32, 40, 3)
                pixels = rng.integers(0, 256, shape, dtype=np.uint8)
                write_image(tmp_path / part / name / f"{index}.png", pixels)
    return tmp_path


def gather(batches) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def small(size: int) -> Preprocessing:
    return datautils.default_preprocessing("cifar10", size)


def pixels_of(images: torch.Tensor) -> torch.Tensor:
    """Undo the normalisation: values 0 … 255."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (images * std + mean) * 255


# ------------------------------------------------------------------------------- digits


def test_digits():
    digits = load_data("digits")
    assert (len(digits.calibration), len(digits.test), digits.image_size) == (1024, 360, 16)
    assert digits.classes == list("0123456789")
    images, labels = gather(batches_of_tests(digits, batchsize=100))
    assert images.shape == (360, 3, 16, 16) and images.dtype == torch.float32
    assert labels.dtype == torch.int64 and labels.bincount().min() >= 35
    grey = pixels_of(images)
    assert torch.allclose(grey[:, 0], grey[:, 1], atol=1e-3)
    assert grey.min() > -1e-3 and grey.max() == pytest.approx(255, abs=1e-3)


def test_digits_at_their_own_size_are_the_published_pixels():
    digits = load_data("digits", image_size=8)
    images, _ = gather(batches_of_tests(digits))
    with np.load(datautils.DIGITS_FILE) as stored:
        published = stored["images"][stored["test"]]
    assert torch.equal(
        (pixels_of(images)[:, 0] * 16 / 255).round().to(torch.uint8), torch.from_numpy(published)
    )


def test_digits_need_no_datapath(caplog):
    with caplog.at_level(logging.WARNING, "trueobs"):
        load_data("digits", datapath="/nowhere")
    assert "--datapath /nowhere is not used" in caplog.text


# ----------------------------------------------------------------- the calibration subset


def test_the_subset_depends_on_the_seed_alone_and_mixes_classes():
    first, again, other = (load_data("digits", nsamples=100, seed=seed) for seed in (1, 1, 2))
    images, labels = gather(calibration_batches(first))
    assert torch.equal(images, gather(calibration_batches(again))[0])
    assert not torch.equal(images, gather(calibration_batches(other))[0])
    assert len(labels[:32].unique()) >= 8
    assert len(set(first.calibration.chosen)) == 100


def test_a_subset_does_not_depend_on_the_order_of_the_file_system(folder, tmp_path_factory):
    mirrored = tmp_path_factory.mktemp("mirrored")
    for path in sorted(folder.rglob("*.png"), reverse=True):
        target = mirrored / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    both = [
        gather(calibration_batches(load_data("folder", datapath=root, nsamples=5)))
        for root in (folder, mirrored)
    ]
    assert torch.equal(both[0][0], both[1][0]) and torch.equal(both[0][1], both[1][1])


def test_fewer_images_than_requested_give_a_warning(folder, caplog):
    with caplog.at_level(logging.WARNING, "trueobs"):
        data = load_data("folder", datapath=folder)
    assert len(data.calibration) == 12
    assert "calibrating on all of them, not on 1024" in caplog.text


# --------------------------------------------------------------------------------- batches


def test_passes_repeat_without_augmentation_and_are_sized():
    digits = load_data("digits", nsamples=30)
    batches = calibration_batches(digits, batchsize=16, nrounds=3)
    assert len(batches) == 6 and [len(labels) for _, labels in batches] == [16] * 5 + [10]
    images, labels = gather(batches)
    assert torch.equal(images[:30], images[60:]) and torch.equal(labels[:30], labels[30:60])
    image, label = digits.calibration[7]
    assert torch.equal(image, images[7]) and label == labels[7]


def test_more_workers_than_cores_give_no_warning(recwarn):
    data = load_data("digits", nsamples=4)
    images, _ = gather(
        calibration_batches(data, nrounds=1, batchsize=2, workers=os.cpu_count() + 1)
    )
    assert len(images) == 4 and not recwarn.list


@pytest.mark.parametrize(("name", "size"), [("digits", 16), ("folder", 24)])
def test_augmentation_depends_on_seed_pass_and_index_alone(name, size, folder):
    data = load_data(
        name, datapath=folder if name == "folder" else None, image_size=size, nsamples=12
    )

    def views(**changes):
        options = {"batchsize": 5, "nrounds": 2, "augment": True, "seed": 3, "workers": 0}
        return gather(calibration_batches(data, **(options | changes)))[0]

    state = torch.random.get_rng_state()
    images = views()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert images.shape == (24, 3, size, size)
    torch.rand(5)
    assert torch.equal(images, views(workers=2, batchsize=7))
    assert not torch.equal(images, views(seed=4))
    assert not torch.equal(images[:12], images[12:])


def test_small_images_are_shifted_on_black_and_mirrored_unless_digits():
    """Every augmented view is one of the 9 × 9 shifts of the original or of its mirror image."""
    pixels = np.random.default_rng(0).integers(1, 256, (32, 32, 3), dtype=np.uint8)
    mirrored = 0
    for flips in (True, False):
        source = datautils.ArrayImages(pixels[None], [0])
        images = datautils.ImageSet(source, datautils.View(small(32), False, flips), [0])
        for seed in range(40):
            view, _ = images.pixels(0, (seed,))
            shifts = {}
            for turned, original in ((False, pixels), (True, pixels[:, ::-1])):
                padded = np.pad(original, ((4, 4), (4, 4), (0, 0)))
                shifts |= {
                    padded[y : y + 32, x : x + 32].tobytes(): turned
                    for y in range(9)
                    for x in range(9)
                }
            assert view.tobytes() in shifts
            turned = shifts[view.tobytes()]
            assert flips or not turned
            mirrored += turned
    assert 8 <= mirrored <= 32


def test_photographs_have_the_test_view_of_torchvision(folder):
    from obc.inputs.vision import torchvision

    data = load_data("folder", datapath=folder, image_size=28)
    transforms = torchvision.transforms
    reference = transforms.Compose(
        [
            transforms.Resize(32),
            transforms.CenterCrop(28),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    with Image.open(folder / "val" / "cat" / "0.png") as image:
        assert torch.allclose(data.test[0][0], reference(image.convert("RGB")), atol=1e-6)


def test_other_sizes_are_resized_with_antialiasing():
    from obc.inputs.vision import torchvision

    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    source = datautils.ArrayImages(pixels[None], [0])
    for size in (20, 64):
        image, _ = datautils.ImageSet(source, datautils.View(small(size), False, True), [0])[0]
        exact = torchvision.transforms.functional.resize(
            torch.from_numpy(pixels).permute(2, 0, 1).float(), [size, size], antialias=True
        )
        assert (pixels_of(image) - exact).abs().max() < 1.01  # PIL rounds after each direction


# --------------------------------------------------------------------------------- folders


def test_labels_follow_the_sorted_class_names(folder):
    data = load_data("folder", datapath=folder)
    assert data.classes == ["cat", "dog"] and data.image_size == 224 and len(data.test) == 4
    assert [label for _, label in data.test] == [0, 0, 1, 1]
    assert load_data("imagenet", datapath=folder, image_size=24).test[3][0].shape == (3, 24, 24)


def test_cifar_folders_may_be_called_val_or_test(folder):
    assert len(load_data("cifar10", datapath=folder).test) == 4
    (folder / "val").rename(folder / "test")
    data = load_data("cifar10", datapath=folder)
    assert data.image_size == 32 and len(data.test) == 4
    with pytest.raises(UserError, match="needs train/<class>/ and val/<class>/ with images"):
        load_data("folder", datapath=folder)


def test_classes_of_train_and_val(folder, caplog):
    shutil.rmtree(folder / "val" / "cat")
    with caplog.at_level(logging.WARNING, "trueobs"):
        data = load_data("folder", datapath=folder)
    assert [label for _, label in data.test] == [1, 1]
    assert "train/ has 2 classes, val/ has 1" in caplog.text
    write_image(folder / "val" / "emu" / "0.png", np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="have different classes .cat is in one of them only"):
        load_data("folder", datapath=folder)


@pytest.fixture
def cifar_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torchvision's files with 10 + 2 images, without the check of the real files' checksums."""
    from obc.inputs.vision import torchvision

    monkeypatch.setattr(
        torchvision.datasets.cifar, "check_integrity", lambda path, _md5=None: Path(path).is_file()
    )
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{part}" for part in range(1, 6)), "test_batch"):
        stored = {"data": rng.integers(0, 256, (2, 3072), dtype=np.uint8), "labels": [3, 9]}
        (base / name).write_bytes(pickle.dumps(stored))
    names = [f"class{label}" for label in range(10)]
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    return tmp_path


def test_cifar_in_the_files_of_torchvision(cifar_files):
    data = load_data("cifar10", datapath=cifar_files, nsamples=10)
    assert len(data.calibration) == 10 and len(data.test) == 2 and len(data.classes) == 10
    image, label = data.test[1]
    stored = pickle.loads((cifar_files / "cifar-10-batches-py/test_batch").read_bytes())
    expected = torch.from_numpy(stored["data"][1].reshape(3, 32, 32)).float()
    assert label == 9 and torch.allclose(pixels_of(image), expected, atol=1e-3)
    assert len(load_data("cifar10", datapath=cifar_files / "cifar-10-batches-py").test) == 2


# ---------------------------------------------------------------------------------- errors


def test_unknown_names_and_missing_paths(tmp_path):
    with pytest.raises(UserError, match="unknown dataset mnist; choose from imagenet, cifar10"):
        load_data("mnist")
    with pytest.raises(UserError, match="dataset folder needs --datapath DIR"):
        load_data("folder")
    with pytest.raises(UserError, match="nowhere: does not exist; pass --datapath DIR"):
        load_data("imagenet", datapath=tmp_path / "nowhere")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="file: is not a directory; pass --datapath"):
        load_data("cifar10", datapath=tmp_path / "file")


def test_missing_and_empty_folders(folder):
    (folder / "train").rename(folder / "elsewhere")
    with pytest.raises(UserError, match="needs train/<class>/ and val/<class>/ with images"):
        load_data("folder", datapath=folder)
    with pytest.raises(UserError, match="val/<class>/ or test/<class>/ with images"):
        load_data("cifar10", datapath=folder)
    (folder / "train" / "cat").mkdir(parents=True)
    (folder / "train" / "dog").mkdir()
    with pytest.raises(UserError, match="train: no images in it; expected <class>/<image>"):
        load_data("folder", datapath=folder)


def test_damaged_cifar_files(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(UserError, match=r"data_batch_1: is missing \(6 more files"):
        load_data("cifar10", datapath=tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("content", [b"not an image", "truncated", None])
def test_an_unreadable_image_is_named(folder, workers, content):
    data = load_data("folder", datapath=folder, image_size=16)
    path = folder / "val" / "dog" / "1.png"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-900] if content == "truncated" else content)
    with pytest.raises(UserError) as caught:
        list(batches_of_tests(data, batchsize=2, workers=workers))
    assert str(caught.value).startswith(f"{path}: not a readable image (")
    assert "Traceback" not in str(caught.value)
