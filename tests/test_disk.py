"""Full, read-only or vanishing folders: one line, no partial files, and the run can be resumed."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import database
import main_trueobs
import spdy
from modelutils import load_checkpoint
from obc.inputs import files
from obc.toolkit import resume
from obc.toolkit.profiles import read_profile, read_scores
from obc.toolkit.records import read_record

QUICK = ["--nsamples", "32", "--batchsize", "32", "--noaug", "--device", "cpu"]
UNSTR = ["unstr", "--sparse-dir", "models_unstr", "--min-sparsity", "0.5", "--delta-sparse", "0.6"]
COMMANDS: dict[str, tuple[Callable, list[str]]] = {
    "nmprune": (main_trueobs.main, ["nmprune", "--save", "rn8_24.pth"]),
    "unstr": (main_trueobs.main, UNSTR),
    "losses": (database.main, ["unstr", "loss"]),
    "profile": (spdy.main, ["2", "unstr", "--dp"]),
}
READERS = {".pth": load_checkpoint, ".json": read_record}


def run(name: str) -> int:
    main, words = COMMANDS[name]
    return main(["rn8", "digits", *words, *QUICK])


def visible(folder: Path) -> dict[str, bytes]:
    """Files that are neither hidden nor records (which hold times); all of them can be read."""
    contents = {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(part.startswith(".") for part in parts):
            read_text = read_scores if parts[0] == "scores" else read_profile
            READERS.get(path.suffix, read_text)(path)
            if path.suffix != ".json":
                contents["/".join(parts)] = path.read_bytes()
    return contents


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file system of 8 MB, which is the working folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True
        ).returncode
    ):
        pytest.skip("mounting a file system takes a superuser")
    monkeypatch.chdir(folder)
    yield folder
    monkeypatch.undo()
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, free: int) -> Path:
    """Leave only `free` bytes."""
    filler = folder / ".filler"
    filler.write_bytes(bytes(shutil.disk_usage(folder).free - free))
    return filler


def check_refused(status: int, capsys: pytest.CaptureFixture, reason: str) -> None:
    err = capsys.readouterr().err
    assert status == 2 and err.count("error: ") == 1 and "Traceback" not in err
    assert reason in err.splitlines()[-1]


@pytest.mark.slow
def test_a_full_disk_at_every_step(small_disk, tmp_path, capsys, monkeypatch):
    """Room for nothing, for some of the state, for some of the output; then for all."""
    expected = tmp_path / "expected"
    expected.mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(expected)
        assert all(run(name) == 0 for name in COMMANDS)
    for name in COMMANDS:
        before, refusals = visible(small_disk), 0
        for free in (0, 40_000, 400_000):
            capsys.readouterr()
            filler = fill(small_disk, free)
            status = run(name)
            filler.unlink()
            if status:
                refusals += 1
                check_refused(status, capsys, "No space left on device")
                assert visible(small_disk) == before
        assert refusals
        assert run(name) == 0
    assert visible(small_disk) == visible(expected)
    assert not list(small_disk.rglob(".*.tmp"))


def test_a_read_only_disk(small_disk, capsys):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for name in ("nmprune", "unstr"):
        check_refused(run(name), capsys, "Read-only file system")
    assert not list(small_disk.iterdir())


@pytest.mark.parametrize("name", ["nmprune", "unstr"])
def test_a_folder_that_vanishes(name, tmp_path, capsys, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    save, saved = resume.RunState.save, []

    def then_gone(state, key, *rest):
        saved.extend([key] if state.folder else [])
        if len(saved) == 3:
            shutil.rmtree(state.folder.absolute())
        return save(state, key, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(resume.RunState, "save", then_gone)
        check_refused(run(name), capsys, "start it again")
    assert not visible(work)
    assert run(name) == 0 and visible(work)


def test_a_file_that_cannot_be_renamed_leaves_nothing(tmp_path, monkeypatch):
    """The folder is removed between the last byte and the rename."""
    path = tmp_path / "deep" / "x.bin"
    with pytest.raises(OSError) as caught, files.atomic_write(path) as file:
        file.write(b"new")
        shutil.rmtree(path.parent)
    assert str(caught.value.filename) == str(path)
    assert not path.parent.exists()
