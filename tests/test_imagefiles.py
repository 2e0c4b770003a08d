"""Damaged image files: found before hours are spent, named, skipped if the user asks for it."""

from __future__ import annotations

import io
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import main_trueobs
from datautils import calibration_batches, load_data
from datautils import test_batches as batches_of_tests
from obc.inputs.images import BadImage, inspect_files, read_image
from obc.solver.errors import UserError

KINDS = ("jpg", "png", "webp", "bmp", "tiff", "ppm")
OWN_MODEL = """
from torch import nn
def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, 2))
"""


def encoded(kind: str, seed: int = 0, side: int = 40) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, {"jpg": "jpeg"}.get(kind, kind))
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG whose header claims 40,000 × 40,000 pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """16 training and 8 test JPEGs of two classes, and a model of the user's own."""
    for part, count in (("train", 8), ("val", 4)):
        for name in ("cat", "dog"):
            for index in range(count):
                path = tmp_path / part / name / f"{index}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(encoded("jpg", index))
    (tmp_path / "own.py").write_text(OWN_MODEL)
    return tmp_path


def quick_flaw(path: Path) -> str | None:
    return inspect_files([str(path)], workers=0).flaws.get(str(path))


# -- one file --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_good_files_pass(kind, tmp_path):
    path = tmp_path / f"x.{kind}"
    path.write_bytes(encoded(kind))
    assert quick_flaw(path) is None
    assert read_image(str(path)).size == (40, 40)


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, 0.97])
def test_a_truncated_file_is_seen_by_its_end(kind, share, tmp_path):
    path = tmp_path / f"x.{kind}"
    content = encoded(kind)
    path.write_bytes(content[: int(share * len(content))])
    assert quick_flaw(path)
    with pytest.raises(BadImage):
        read_image(str(path))


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_bytes_after_the_end_do_no_harm(kind, tmp_path):
    """Cameras and editors leave such things."""
    path = tmp_path / f"x.{kind}"
    path.write_bytes(encoded(kind) + b"comment" * 50)
    assert quick_flaw(path) is None


@pytest.mark.parametrize(
    "content", [b"", b"not an image", bytes(3000), bomb()], ids=["empty", "text", "zeros", "bomb"]
)
def test_what_is_no_image(content, tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(BadImage):
        read_image(str(path))
    assert str(path) not in quick_flaw(path)  # the message begins with it already
    if len(content) > 3000 or b"IHDR" in content:
        assert "pixels" in quick_flaw(path)


def test_many_files_are_looked_at_by_several_processes(tmp_path):
    content, files = encoded("jpg", side=32), []
    for index in range(4500):
        files.append(str(tmp_path / f"{index}.jpg"))
        (tmp_path / f"{index}.jpg").write_bytes(content[:-9] if index == 4321 else content)
    started = time.process_time()
    assert list(inspect_files(files, workers=2).flaws) == [files[4321]]
    one = inspect_files(files[:1000] + files[4321:4322], workers=0).flaws
    assert list(one) == [files[4321]]
    assert time.process_time() - started < 5  # the thousand here at well below a millisecond each


# -- by the commands -------------------------------------------------------------------------------


def command(folder: Path, *words: str) -> int:
    return main_trueobs.main(
        [
            f"{folder}/own.py:net",
            "folder",
            "nmprune",
            "--prunem",
            "3",
            "--prunen",
            "1",
            "--noaug",
            "--datapath",
            str(folder),
            "--image-size",
            "24",
            "--workers",
            "0",
            "--device",
            "cpu",
            "--batchsize",
            "5",
            *words,
        ]
    )


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_damaged_file_stops_the_command_at_once(part, folder, capsys):
    path = folder / part / "dog" / "1.jpg"
    path.write_bytes(path.read_bytes()[:-100])
    assert command(folder, "--save", str(folder / "x.pth")) == 2
    out, err = capsys.readouterr()
    assert out == "" and "squared error" not in err
    assert err.splitlines()[-1].startswith(f"error: {path}: not a readable image (")
    assert err.splitlines()[-1].endswith("pass --skip-bad-images")
    assert not (folder / "x.pth").exists()


def test_skipped_files_are_counted(folder, capsys):
    bad = [
        folder / "train" / "dog" / "1.jpg",
        folder / "train" / "cat" / "5.jpg",
        folder / "val" / "cat" / "0.jpg",
    ]
    bad[0].write_bytes(b"")
    bad[1].write_bytes(bomb())
    bad[2].write_bytes(bad[2].read_bytes()[:-100])
    assert command(folder, "--skip-bad-images") == 0
    out, err = capsys.readouterr()
    warnings = [line for line in err.splitlines() if "cannot be read and are skipped" in line]
    assert len(warnings) == 2 and "\ntop-1 " in out
    assert warnings[0].startswith("warning: 2 of 16 training images cannot be read")
    assert warnings[1].startswith(
        f"warning: 1 of 8 test images cannot be read and are skipped; the first: {bad[2]} ("
    )


def test_nothing_left_is_an_error(folder, capsys):
    for path in (folder / "val").rglob("*.jpg"):
        path.write_bytes(b"")
    assert command(folder, "--skip-bad-images") == 2
    assert "not a readable image" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_that_only_decoding_sees(folder, workers, caplog):
    """A PNG with its header and its end whole: named when it is decoded, or skipped."""
    path = folder / "val" / "dog" / "3.jpg"
    content = bytearray(encoded("png"))
    content[200:1200] = bytes(1000)
    path.write_bytes(content)
    assert quick_flaw(path) is None
    data = load_data("folder", datapath=folder, image_size=24)
    with pytest.raises(UserError) as caught:
        list(batches_of_tests(data, batchsize=3, workers=workers))
    assert str(caught.value).startswith(f"{path}: not a readable image (")
    data = load_data("folder", datapath=folder, image_size=24, skip_bad_images=True)
    labels = [labels.tolist() for _, labels in batches_of_tests(data, batchsize=3, workers=workers)]
    assert labels == [[0, 0, 0], [0, 1, 1], [1]]
    assert f"1 more images cannot be read and are skipped; the first: {path} (" in caplog.text
    assert len(list(calibration_batches(data, batchsize=4))) == 4


# -- more than 8 bits ------------------------------------------------------------------------------

GREY = np.random.default_rng(7).integers(0, 256, (24, 24), dtype=np.uint8)
GREY[0, :2] = 0, 255
DEEP = {  # file name: values that hold GREY
    "a.png": GREY.astype(np.uint16) * 257,
    "b.tif": GREY.astype(np.uint16) * 257 - np.uint16(100) * (GREY > 0),  # rounding, not truncation
    "c.tif": GREY.astype(np.int32) * 257,
    "d.tif": GREY.astype(np.int32),
    "e.tif": GREY.astype(np.float32) / 255,
    "f.tif": GREY.astype(np.float32),
    "g.pgm": GREY.astype(np.uint16) * 257,
    "h.pfm": GREY.astype(np.float32) / 255,
}
UNKNOWN = {  # file name: values without a known black and white, words of the refusal
    "a.tif": (GREY.astype(np.float32) * 3.7, "floating-point values from 0 to 943.5"),
    "b.tif": (GREY.astype(np.float32) / 127.5 - 1, "floating-point values from -1 to 1"),
    "c.tif": (np.where(GREY > 9, np.nan, GREY).astype(np.float32), "not all finite"),
    "d.tif": (GREY.astype(np.int32) * 70_000, "32-bit values from 0 to 17850000"),
    "e.tif": (GREY.astype(np.int32) - 99, "32-bit values from -99 to 156"),
    "f.tif": (GREY.astype(np.float32) + 0.5, "floating-point values from 0.5 to 255.5"),
}


@pytest.mark.parametrize("name", DEEP)
def test_more_than_8_bits_are_scaled_and_counted(name, folder, caplog):
    path = folder / "train" / "cat" / name
    Image.fromarray(DEEP[name]).save(path)
    assert np.array_equal(np.array(read_image(str(path))), np.repeat(GREY[..., None], 3, axis=2))
    other = folder / "val" / "dog" / name
    Image.fromarray(DEEP[name]).save(other)
    with caplog.at_level("WARNING", "trueobs"):
        load_data("folder", datapath=folder)
    (line,) = [record.getMessage() for record in caplog.records if "values" in record.getMessage()]
    assert line.startswith("2 images have") and line.endswith(f"the first is {path}")


@pytest.mark.parametrize("name", UNKNOWN)
def test_values_without_a_known_white_are_refused(name, folder):
    values, words = UNKNOWN[name]
    path = folder / "train" / "cat" / name
    Image.fromarray(values).save(path)
    with pytest.raises(BadImage, match=words):
        read_image(str(path))
    with pytest.raises(UserError, match=f"{path}: not a readable image .*{words}"):
        load_data("folder", datapath=folder)
    assert len(load_data("folder", datapath=folder, skip_bad_images=True).calibration) == 16


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_images_of_8_bits_are_converted_by_pillow_without_a_word(mode, folder, caplog):
    path = folder / "train" / "cat" / "x.tif"
    made = Image.fromarray(np.stack([GREY, GREY.T, 255 - GREY], axis=2)).convert(mode)
    made.save(path)
    assert read_image(str(path)).tobytes() == made.convert("RGB").tobytes()
    with caplog.at_level("WARNING", "trueobs"):
        load_data("folder", datapath=folder, nsamples=17)
    assert not caplog.records


# -- which files are images ------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jfif", ".JPE", ".gif", ".jp2", ".tga", ".Pcx"])
def test_suffixes_of_pillow(suffix, folder):
    pixels = Image.fromarray(np.repeat(GREY[..., None], 3, axis=2))
    for part in ("train", "val"):
        for path in (folder / part / "cat").iterdir():
            path.unlink()
        pixels.save(folder / part / "cat" / f"x{suffix}")
    data = load_data("folder", datapath=folder, nsamples=9)
    assert len(data.calibration) == 9 and sorted(data.test.source.labels) == [0, 1, 1, 1, 1]


@pytest.mark.parametrize("content", [None, "notes.txt"])
@pytest.mark.parametrize("part", ["train", "val"])
def test_a_class_without_images_keeps_its_number_and_is_named(part, content, folder, caplog):
    for path in (folder / part / "cat").iterdir():
        path.unlink()
    if content:
        (folder / part / "cat" / content).touch()
    with caplog.at_level("WARNING", "trueobs"):
        data = load_data("folder", datapath=folder, nsamples=8)
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"{folder / part}: no images of cat ({'1 other file' if content else 'empty'}" in line
    assert data.classes == ["cat", "dog"]
    images = data.calibration if part == "train" else data.test
    assert set(images.source.labels) == {1}


def test_hidden_files_and_folders_are_no_images(folder, caplog):
    def counts() -> tuple[int, int, list[str]]:
        data = load_data("folder", datapath=folder, nsamples=16)
        return len(data.calibration.source), len(data.test), data.classes

    before = counts()
    for part in ("train", "val"):
        copies = folder / part / "cat" / ".ipynb_checkpoints" / "deeper"
        copies.mkdir(parents=True)
        for path in (copies / "0.jpg", folder / part / "dog" / ".x.jpg"):
            path.write_bytes(encoded("jpg"))
        (folder / part / "dog" / "._0.jpg").write_bytes(b"\0\5\26\7 of macOS")
        (folder / part / ".cache").mkdir()
        (folder / part / ".cache" / "0.jpg").write_bytes(encoded("jpg"))
    with caplog.at_level("INFO", "trueobs"):
        assert counts() == before == (16, 8, ["cat", "dog"])
    assert not caplog.records
