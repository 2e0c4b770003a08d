"""A command that is interrupted or killed leaves no partial file, and can be run again."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

import database
import main_trueobs
from modelutils import load_checkpoint
from obc.toolkit.profiles import read_profile, read_scores

QUICK = ["--nsamples", "64", "--batchsize", "32", "--noaug", "--device", "cpu"]
UNSTR = ["unstr", "--sparse-dir", "models_unstr", "--delta-sparse", "0.4"]
MOMENTS = 3  # for each signal

COMMANDS = {  # script and words behind MODEL DATASET
    "nmprune": ("main_trueobs.py", "nmprune", "--save", "rn8_24.pth"),
    "unstr": ("main_trueobs.py", *UNSTR),
    "quant": ("main_trueobs.py", "quant", "--wbits", "4", "--abits", "4", "--save", "rn8_4w4a.pth"),
    "struct": ("main_trueobs.py", "struct", "--sparse-dir", "models_struct"),
    "blocked": ("main_trueobs.py", "blocked", "--sparse-dir", "models_4block"),
    "losses": ("database.py", "unstr", "loss"),
    "squared": ("database.py", "unstr", "squared"),
    "eval": ("database.py", "unstr", "eval"),
    "search": ("spdy.py", "2", "unstr"),
    "corrections": ("post_proc.py", "rn8_start.pth", "--bnt", "--save", "rn8_bnt.pth"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The commands' inputs: a database, losses and a checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("made"))
        start = ["rn8", "digits"]
        save = ["nmprune", "--save", "rn8_start.pth"]
        assert main_trueobs.main([*start, *UNSTR, *QUICK]) == 0
        assert database.main([*start, "unstr", "loss", *QUICK]) == 0
        assert main_trueobs.main([*start, *save, *QUICK]) == 0
        return Path.cwd()


def files(folder: Path) -> dict[Path, bool]:
    """All files, and whether they or one of their folders are hidden."""
    return {
        path: any(part.startswith(".") for part in path.relative_to(folder).parts)
        for path in folder.rglob("*")
        if path.is_file()
    }


def check_whole(folder: Path) -> None:
    """Every file that is not hidden can be read."""
    for path in (path for path, hidden in files(folder).items() if not hidden):
        if path.suffix == ".pth":
            assert len(load_checkpoint(path)) >= 30
        elif path.suffix == ".json":
            assert {"command", "environment"} <= json.loads(path.read_text()).keys()
        elif path.parent.name == "scores":
            scores = read_scores(path)
            assert len(scores) == 8 and {len(levels) for levels in scores.values()} == {11}
        else:
            assert path.name.endswith("_spdy.txt") and len(read_profile(path)) == 8


def check_said(text: str) -> None:
    """The last line, and only that, says that the command was interrupted."""
    assert text.splitlines()[-1] == "error: interrupted"
    assert text.count("error:") == 1 and "Traceback" not in text


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_interrupted_or_killed(name, made, warm, tmp_path):
    folder, stderr = tmp_path / "work", tmp_path / "stderr"
    shutil.copytree(made, folder)
    script, *words = COMMANDS[name]

    def start():
        command = warm.start(script, "rn8", "digits", *words, *QUICK, folder=folder, stderr=stderr)
        command.wait_for_work()
        return command

    command, begin = start(), time.monotonic()
    assert command.wait() == 0
    duration, outputs = time.monotonic() - begin, files(folder)
    assert not any(outputs.values())
    moments, ends, leftovers = random.Random(name), [], set()
    for number in (signal.SIGINT, signal.SIGKILL) * MOMENTS:
        command = start()
        time.sleep(moments.uniform(0, duration))
        command.signal(number)
        ends.append(command.wait())
        assert ends[-1] in (0, 130 if number == signal.SIGINT else -signal.SIGKILL)
        check_whole(folder)
        assert outputs.keys() <= files(folder).keys()  # nothing is lost
        if ends[-1] == 130:
            check_said(stderr.read_text())
        if number == signal.SIGINT:
            for path in (path for path, hidden in files(folder).items() if hidden):
                resumable = any(parent.name.endswith(".partial") for parent in path.parents)
                assert path in leftovers or resumable and path.suffix != ".tmp"
        leftovers = {path for path in files(folder) if path.suffix == ".tmp"}
    assert {130, -signal.SIGKILL} <= set(ends)  # not all came too late
    assert start().wait() == 0
    check_whole(folder)
    assert not any(files(folder).values())
