"""Labels of test images that are in no class folders: obc/inputs/labels.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import main_trueobs
from datautils import load_data
from obc.inputs.labels import read_labels
from obc.solver.errors import UserError

CLASSES = ["n01", "n02", "n03", "toy car"]
FILES = [f"/data/val/ILSVRC2012_val_0000000{i}.JPEG" for i in (1, 2, 3)]


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("2\n0\n3\n", [2, 0, 3]),
        ("\ufeffn02\nn01\r\ntoy car\n\n", [1, 0, 3]),
        ("".join(f"ILSVRC2012_val_0000000{i}.JPEG {i - 1}\n" for i in (3, 1, 2)), [0, 1, 2]),
        ("".join(f"val/x/ILSVRC2012_val_0000000{i}.JPEG toy car\n" for i in (1, 2, 3)), [3, 3, 3]),
        (
            "ImageId,PredictionString\n"
            "ILSVRC2012_val_00000003,n01 85 131 499 476 n01 1 2 3 4\n"
            "ILSVRC2012_val_00000001,n03 0 1 2 3\n"
            "ILSVRC2012_val_00000009,n09 0 1 2 3\n"
            "ILSVRC2012_val_00000002,n02 0 1 2 3\n",
            [2, 1, 0],
        ),
    ],
)
def test_lists_as_they_are_published(text, labels, tmp_path):
    path = tmp_path / "list.txt"
    path.write_text(text, encoding="utf-8")
    assert read_labels(path, FILES, CLASSES) == labels


def test_numbers_of_the_development_kit_are_those_of_its_table(tmp_path):
    savemat = pytest.importorskip("scipy.io").savemat
    kind = [("ILSVRC2012_ID", "i4"), ("WNID", "U9")]
    table = np.array([(1, "n03"), (2, "n01"), (3, "n02"), (4, "toy car"), (5, "animal")], kind)
    path = tmp_path / "ILSVRC2012_validation_ground_truth.txt"
    path.write_text("4\n1\n2\n")
    with pytest.raises(
        UserError, match="4 is no class, nor a number from 0 to 3; .* meta.mat lies"
    ):
        read_labels(path, FILES, CLASSES)
    savemat(tmp_path / "meta.mat", {"synsets": table})
    assert read_labels(path, FILES, CLASSES) == [3, 2, 0]
    (tmp_path / "meta.mat").write_bytes(b"not a table")
    with pytest.raises(UserError, match="meta.mat: not ImageNet's table of classes"):
        read_labels(path, FILES, CLASSES)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1\n2\n", "2 labels for 3 images"),
        ("", "no line for ILSVRC2012_val_00000001.JPEG, and 2 more"),
        (
            "ILSVRC2012_val_00000001 1\nILSVRC2012_val_00000002 1",
            "no line for ILSVRC2012_val_00000003",
        ),
        ("1\n2\nn04\n", "n04 is no class, nor a number from 0 to 3"),
        ("1\n2\n-1\n", "-1 is no class"),
    ],
)
def test_lists_that_do_not_fit(text, words, tmp_path):
    path = tmp_path / "list.txt"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_labels(path, FILES, CLASSES)
    assert words in str(error.value)


def test_files_that_are_no_text(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\xfa")
    for name, words in (("list.txt", "not a text file"), ("no.txt", "cannot be read")):
        with pytest.raises(UserError, match=words):
            read_labels(tmp_path / name, FILES, CLASSES)


def test_a_flat_folder_has_the_accuracy_of_class_folders(tmp_path, capsys):
    """The same images of digits twice: in class folders, and in one folder with a list."""
    digits, rng = load_data("digits"), np.random.default_rng(0)
    tidy, flat, lines = tmp_path / "tidy", tmp_path / "flat", []
    for number, index in enumerate(rng.permutation(len(digits.test))[:40]):
        pixels, label = digits.test.pixels(int(index))
        for path in (
            tidy / "val" / str(label) / f"{number}.png",
            flat / "val" / f"{number}.png",
            tidy / "train" / str(number % 10) / f"{number}.png",
            flat / "train" / str(number % 10) / f"{number}.png",
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
        lines.append(f"{number}.png {label}")
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(lines))
    weights = str(Path(main_trueobs.__file__).with_name("assets") / "rn8_digits.pth")
    common = ["--weights", weights, "--image-size", "16", "--crop", "squash", "--noaug"]
    printed = []
    for folder, more in ((tidy, []), (flat, ["--labels", str(labels)])):
        words = ["rn8", "folder", "dense", "--datapath", str(folder), "--workers", "0"]
        assert main_trueobs.main([*words, *common, *more]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and float(printed[0].split()[1]) > 80
    assert main_trueobs.main([*words, *common]) == 2
    assert "images without class folders need --labels FILE" in capsys.readouterr().err
    assert main_trueobs.main(["rn8", "digits", "dense", "--labels", str(labels)]) == 2
    assert "--labels is for the datasets imagenet and folder" in capsys.readouterr().err
