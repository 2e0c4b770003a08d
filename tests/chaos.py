"""Commands under kills, full disks and damaged bytes: the results are those of an undisturbed run.

    python tests/chaos.py --runs 100 --seed 0

A run is the demo's pipeline on rn8 and digits in its own folder: an unstructured database, its
losses, a profile by --dp and one by a search, the corrected model, one quantised sequentially, and
a network trained by the second study. One kind of trouble strikes at random moments, up to
`TROUBLES` times, and the command that it hit is started again, as a user would:

    SIGKILL, SIGTERM, SIGINT   while a command is at work
    full                       a file system with too little room, which is then enlarged
    limited                    a limit on the size of files (as by a quota), which is then lifted
    damaged                    after a kill, one byte of what the command has saved is changed

A run is good if every command that ended by itself either succeeded or said why not in one line,
with status 2 and no traceback; if every file that is not hidden can be read at every moment; and if
in the end all files are, bit by bit, those of a run without trouble. A refusal that asks for
--restart is answered with it.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from warm import Warm, warm_server  # noqa: E402

from modelutils import load_checkpoint  # noqa: E402
from obc.toolkit.profiles import read_profile, read_scores  # noqa: E402
from obc.toolkit.records import read_record  # noqa: E402
from pruning_vs_quantization.study_files import read_result  # noqa: E402

QUICK = ["--nsamples", "32", "--batchsize", "32", "--noaug", "--device", "cpu"]
PIPELINE = {  # command: script, words behind MODEL DATASET
    "database": (
        "main_trueobs.py",
        "unstr",
        "--sparse-dir",
        "models_unstr",
        "--min-sparsity",
        "0.3",
        "--max-sparsity",
        "0.9",
        "--delta-sparse",
        "0.6",
    ),
    "losses": ("database.py", "unstr", "loss"),
    "dp": ("spdy.py", "2", "unstr", "--dp"),
    "search": ("spdy.py", "3", "unstr", "--nobatchnorm", "--dpbuckets", "100"),
    "corrected": (
        "post_proc.py",
        "rn8_unstr_200x_dp.txt",
        "--database",
        "unstr",
        "--resolve",
        "--bnt",
        "--bnt-batches",
        "5",
        "--save",
        "rn8_corrected.pth",
    ),
    "sequential": (
        "main_trueobs.py",
        "quant",
        "--wbits",
        "3",
        "--abits",
        "4",
        "--sequential",
        "--memory",
        "0.03",
        "--save",
        "rn8_sequential.pth",
    ),
    "trained": (
        "-m",
        "pruning_vs_quantization.main",
        "train-compressed",
        "--architecture",
        "rn8_quantized",
        "--dataset",
        "digits",
        "--no-act-quant",
        "--n-bits",
        "4",
        "--max-epochs",
        "3",
        "--train-samples",
        "256",
        "--batch-size",
        "64",
        "--no-cuda",
        "--out",
        "trained",
    ),
}
TROUBLES = 4  # at most in a run
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
STATUSES = {
    "SIGKILL": (-signal.SIGKILL,),
    "SIGTERM": (143, -signal.SIGTERM),
    "SIGINT": (130, -signal.SIGINT),
}
KINDS = ("SIGKILL", "full", "damaged", "limited", "SIGTERM", "SIGINT")  # the suite has three
PATIENCE = 12  # attempts at a command


class Broken(AssertionError):
    """A run was not good."""


@dataclass
class Course:
    """One run: its folder, and what happens to it."""

    warm: Warm
    folder: Path
    stderr: Path
    rng: random.Random
    kind: str
    seconds: dict[str, float]  # of CPU time for each command, undisturbed
    troubles_left: int = 0
    hits: int = 0

    def start(self, name: str, *more: str):
        script, *words = PIPELINE[name]
        words = [*words, *more] if script == "-m" else ["rn8", "digits", *words, *QUICK, *more]
        return self.warm.start(script, *words, folder=self.folder, stderr=self.stderr)

    def command(self, name: str) -> None:
        """Start a command until it succeeds."""
        more: list[str] = []
        for _ in range(PATIENCE):
            status = self.once(name, more)
            check_files(self.folder)
            if status == 0:
                return
            said = self.stderr.read_text(errors="replace")
            check_said(said, status)
            if "--restart" in said and status == 2:
                more = ["--restart"]
        raise Broken(f"{name}: no success after {PATIENCE} attempts: {said.splitlines()[-1:]}")

    def once(self, name: str, more: list[str]) -> int:
        if self.troubles_left <= 0 or self.rng.random() < 0.4:
            return self.start(name, *more).wait()
        self.troubles_left -= 1
        self.hits += 1
        if self.kind in ("full", "limited"):
            return self.with_little_room(name, more)
        return self.killed(name, more)

    def killed(self, name: str, more: list[str]) -> int:
        word = self.kind if self.kind in SIGNALS else "SIGKILL"
        command = self.start(name, *more)
        command.wait_for_work()
        command.wait_for_use(self.rng.uniform(0, self.seconds[name]))
        command.signal(SIGNALS[word])
        status = command.wait()
        if status not in (0, 2, *STATUSES[word]):
            raise Broken(f"{name}: status {status} after {word}")
        if self.kind == "damaged":
            self.damage()
        return status

    def damage(self) -> None:
        """Change a bit somewhere in what is saved for resuming."""
        saved = [
            path
            for path in sorted(self.folder.rglob("*"))
            if is_hidden(path, self.folder) and path.is_file() and path.stat().st_size
        ]
        if saved:
            path = self.rng.choice(saved)
            content = bytearray(path.read_bytes())
            content[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)
            path.write_bytes(content)

    def with_little_room(self, name: str, more: list[str]) -> int:
        room = self.rng.choice((0, 2_000, 50_000, 350_000, 1_000_000))
        if self.kind == "limited":
            room = max(room, 20_000)  # standard error, which is a file here, has the same limit
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            command = self.start(name, *more)
            resource.prlimit(command.pid, resource.RLIMIT_FSIZE, (room, limits[1]))
            return command.wait()
        filler = self.folder / ".filler"
        filler.write_bytes(bytes(max(0, shutil.disk_usage(self.folder).free - room)))
        try:
            return self.start(name, *more).wait()
        finally:
            filler.unlink()


# -- what is checked -------------------------------------------------------------------------------


def is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def visible(folder: Path) -> list[Path]:
    return [
        path for path in sorted(folder.rglob("*")) if path.is_file() and not is_hidden(path, folder)
    ]


def check_files(folder: Path) -> None:
    """Every file that is not hidden is complete."""
    for path in visible(folder):
        try:
            if path.suffix == ".pth":
                load_checkpoint(path)
            elif path.suffix == ".json" and path.parent.name == "trained":
                read_result(path)
            elif path.suffix == ".json":
                read_record(path)
            elif path.parent.name == "scores":
                scores = read_scores(path)
                if len({len(levels) for levels in scores.values()}) != 1 or len(scores) != 8:
                    raise Broken(f"{path}: half a file")
            elif len(read_profile(path)) != 8:
                raise Broken(f"{path}: half a file")
        except Exception as error:
            raise Broken(f"{path}: {error}") from error


def check_said(text: str, status: int) -> None:
    """An error is one line; a killed process says nothing."""
    if "Traceback" in text:
        raise Broken(text)
    if status > 0 and text.count("error: ") != 1:
        raise Broken(f"status {status}: {text}")


def results(folder: Path) -> dict[str, bytes | object]:
    """The files of a run: bytes; of records, all figures but times."""
    contents: dict[str, bytes | object] = {}
    for path in visible(folder):
        name = str(path.relative_to(folder))
        contents[name] = (
            figures(json.loads(path.read_bytes())) if path.suffix == ".json" else path.read_bytes()
        )
    return contents


def figures(value: object) -> object:
    """A record without times, machine and how it was started."""
    if isinstance(value, dict):
        ignored = ("seconds", "training_s", "environment", "restart", "resumed")
        return {key: figures(item) for key, item in value.items() if key not in ignored}
    return [figures(item) for item in value] if isinstance(value, list) else value


# -- runs ------------------------------------------------------------------------------------------


def undisturbed(warm: Warm, folder: Path) -> tuple[dict[str, bytes | object], dict[str, float]]:
    """The results of a run without trouble, and the CPU time of each command."""
    seconds: dict[str, float] = {}
    folder.mkdir()
    course = Course(warm, folder, folder.parent / "stderr", random.Random(0), "", seconds)
    for name in PIPELINE:
        command = course.start(name)
        if command.wait():
            raise Broken(course.stderr.read_text())
        seconds[name] = command.used_s
    return results(folder), seconds


def mounted(folder: Path) -> bool:
    """Make `folder` a small file system, if we may."""
    words = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    return (
        shutil.which("mount") is not None
        and not subprocess.run(words, capture_output=True).returncode
    )


def one_run(course: Course, expected: dict[str, bytes | object]) -> None:
    """Raise Broken unless the run is good."""
    course.folder.mkdir()
    on_disk = course.kind == "full" and mounted(course.folder)
    if course.kind == "full" and not on_disk:
        course.kind = "limited"
    try:
        for name in PIPELINE:
            course.command(name)
        ours = results(course.folder)
        names = sorted(expected.keys() | ours.keys())
        if changed := [name for name in names if expected.get(name) != ours.get(name)]:
            raise Broken(f"other results: {', '.join(changed)}")
    finally:
        if on_disk:
            subprocess.run(["umount", "-l", str(course.folder)], check=True)
        shutil.rmtree(course.folder)


def chaos(runs: int, seed: int, say=lambda line: None) -> tuple[Counter, list[str]]:
    """Counts of good runs by kind and of troubles; descriptions of runs that were not good."""
    good: Counter = Counter()
    broken: list[str] = []
    with tempfile.TemporaryDirectory(prefix="chaos") as top, warm_server(Path(top)) as warm:
        expected, seconds = undisturbed(warm, Path(top, "undisturbed").absolute())
        for number in range(runs):
            rng = random.Random(f"{seed} {number}")
            kind = KINDS[number % len(KINDS)]
            course = Course(
                warm,
                Path(top, f"run{number}"),
                Path(top, "stderr"),
                rng,
                kind,
                seconds,
                troubles_left=rng.randint(1, TROUBLES),
            )
            try:
                one_run(course, expected)
                good[kind] += 1
            except Broken as error:
                broken.append(f"run {number} ({kind}): {error}")
                say(broken[-1])
            good["troubles"] += course.hits
            say(f"run {number} {kind}: {course.hits} troubles, {len(broken)} broken so far")
    return good, broken


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    started = time.monotonic()
    good, broken = chaos(args.runs, args.seed, lambda line: sys.stderr.write(line + "\n"))
    troubles = good.pop("troubles", 0)
    sys.stdout.write(
        f"{good.total()} of {args.runs} runs undisturbed in their results, "
        f"{troubles} troubles ({dict(good)}), {time.monotonic() - started:.0f} s\n"
    )
    sys.stdout.writelines(f"{line}\n" for line in broken)
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
