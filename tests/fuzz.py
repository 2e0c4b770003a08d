"""Mutated files for everything that reads untrusted files, random images and random networks.

    python tests/fuzz.py --cases 100000 --seed 0            all targets, so many cases for each
    python tests/fuzz.py --target scores --cases 1000
    python tests/fuzz.py --target modes --cases 1000        images of all modes (random_images.py)
    python tests/fuzz.py --target graphs --graphs 2000      networks alone (random_graphs.py)

A case is a valid file, mutated. Half of the mutations know nothing about the format (bits and bytes
change, pieces are lost, doubled, spliced); half do (numbers become nan, 1e999 or digits of another
script, keys vanish, JSON nests without end; archives and headers are reassembled, so that checksums
do not hide what is behind them). A case passes if it ends within `SECONDS` in a value, or in a
`UserError` of one line that begins with the file's name. Any other is saved under
tests/corpus/<target>/, for tests/test_fuzz.py to replay.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import logging
import re
import resource
import signal
import struct
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save as safetensors_bytes

ROOT = Path(__file__).resolve().parents[1]
CORPUS = ROOT / "tests" / "corpus"
sys.path[:0] = [x for x in (str(ROOT), str(ROOT / "tests")) if x not in sys.path]

from random_graphs import wrong_answers  # noqa: E402
from random_images import write_random_image, wrong_pixels  # noqa: E402

from obc.inputs.checkpoints import load_checkpoint, load_state  # noqa: E402
from obc.inputs.images import read_image  # noqa: E402
from obc.solver.errors import UserError  # noqa: E402
from obc.toolkit.fingerprints import content_hash, text_hash  # noqa: E402
from obc.toolkit.profiles import read_profile, read_scores  # noqa: E402
from obc.toolkit.records import read_record  # noqa: E402
from obc.toolkit.resume import FINGERPRINT, RunState, open_state  # noqa: E402

GRAPHS, MODES = "graphs", "modes"
IN_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # not on a disk
SECONDS = 10  # of CPU time, for a case
GIGABYTES = 6  # address space that the cases may add
Random = np.random.Generator


# -- good files ------------------------------------------------------------------------------------


class Small(torch.nn.Module):
    """What the checkpoints are loaded into."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 3, 2)
        self.bn = torch.nn.BatchNorm2d(3)


def good_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return Small().state_dict()


def good_pth(wrap: bool = False, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    content = {"state_dict": good_state(), "epoch": 3} if wrap else good_state()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


SCORES = b"""conv1
0.0 0000
-1.25e-3 1900
nan 3439
layer1.0.conv1
0.0 0000
0.5 1900
12.75 3439
"""
PROFILE = b"0000 conv1\n1900 layer1.0.conv1\n24_4w4a layer1.0.conv2\n"
TIMINGS = b"conv1\n0.5 dense\n0.25 0000\n0 1900\nfc\n3 dense\n2e-3 0000\n1.5 1900\n"
RECORD = json.dumps(
    {
        "command": "main_trueobs.py",
        "seconds": 1.5,
        "top1": 98.61,
        "arguments": {
            "model": "rn8",
            "dataset": "digits",
            "seed": 0,
            "nsamples": 1024,
            "noaug": True,
        },
        "environment": {"python": "3.11", "cores": 2, "git": None},
        "fingerprint": {"--seed": "0", "weights": "00" * 16},
        "layers": [{"name": "conv1", "shape": [16, 3, 3, 3], "squared_error": 0.5, "dense": False}],
    },
    indent=2,
).encode()
MARKS = {"MODEL": "rn8", "--seed": "0", "dense weights": "0123456789abcdef" * 2}
TENSORS = {"weight": torch.arange(6.0).view(2, 3), "grid.scale": torch.ones(2, 1)}
FIGURES = json.dumps({"loss": 0.25, "line": "conv1", "levels": [1, 2]})


def good_entry() -> bytes:
    marks = {"figures": FIGURES, "hash": content_hash(TENSORS, FIGURES)}
    return safetensors_bytes(TENSORS, marks)


def good_images() -> tuple[bytes, ...]:
    """Images of many modes and formats."""
    with tempfile.TemporaryDirectory(prefix="fuzz", dir=IN_MEMORY) as folder:
        path, made = Path(folder) / "x", []
        for number in range(40):
            if write_random_image(path, np.random.default_rng(number))[1] is not None:
                made.append(path.read_bytes())
    return tuple(made)


# -- mutations that know nothing -------------------------------------------------------------------


def flip(data: bytearray, rng: Random) -> bytearray:
    for place in rng.integers(len(data), size=rng.integers(1, 5)):
        data[place] ^= 1 << rng.integers(8)
    return data


def overwrite(data: bytearray, rng: Random) -> bytearray:
    start = int(rng.integers(len(data)))
    piece = rng.choice(
        np.array([0, 1, 9, 10, 32, 34, 48, 127, 128, 255], np.uint8), size=rng.integers(1, 9)
    )
    data[start : start + len(piece)] = piece.tobytes()
    return data


def large_number(data: bytearray, rng: Random) -> bytearray:
    start = int(rng.integers(len(data)))
    value = int(rng.choice([0, 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62]))
    data[start : start + 8] = struct.pack("<Q", value)
    return data


def cut(data: bytearray, rng: Random) -> bytearray:
    return data[: rng.integers(len(data) + 1)]


def lose(data: bytearray, rng: Random) -> bytearray:
    start, stop = sorted(rng.integers(len(data) + 1, size=2))
    del data[start : min(stop, start + 64)]
    return data


def double(data: bytearray, rng: Random) -> bytearray:
    start, stop = sorted(rng.integers(len(data) + 1, size=2))
    return data[:stop] + data[start:stop] * int(rng.integers(1, 4)) + data[stop:]


def splice(data: bytearray, rng: Random) -> bytearray:
    here, there = (int(place) for place in rng.integers(len(data) + 1, size=2))
    return data[:here] + data[there:]


BLIND = (flip, flip, overwrite, large_number, cut, lose, double, splice)


def blind(data: bytes, rng: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        if changed:
            changed = BLIND[rng.integers(len(BLIND))](changed, rng)
    return bytes(changed)


# -- mutations that know the format ----------------------------------------------------------------

NUMBERS = [
    "nan",
    "-nan",
    "inf",
    "-Infinity",
    "NaN",
    "1e999",
    "-1e999",
    "1e-999",
    "0x10",
    "1_000",
    "١٢",
    "³",
    "０",
    "-0",
    "+1",
    "1.",
    ".5",
    "1e",
    "--1",
    "9" * 30,
    "9" * 5000,
    "null",
    "true",
    "0" * 400 + "1",
    "1,5",
    "",
]
WORDS = [
    "",
    "\x00",
    "\ud800",
    "\u202e",
    "\x1b[2J",
    "..",
    "../../etc/passwd",
    "a" * 10_000,
    "\u2028",
    "__class__",
    "%s%n",
    "{0}",
    "conv1",
    "weight",
    "\\u0000",
    "\r",
    "\ufeff",
]
JUNK = [
    lambda: None,
    lambda: [],
    lambda: {},
    lambda: True,
    lambda: -1,
    lambda: 2**70,
    lambda: 1e300,
    lambda: "x",
    lambda: [[]] * 3,
    lambda: {"a": {"b": []}},
    lambda: float("inf"),
    lambda: "\ud800",
]


def pick(rng: Random, choices: list) -> object:
    return choices[rng.integers(len(choices))]


def text_tokens(data: bytes, rng: Random) -> bytes:
    """Numbers and words of a text become others; lines are swapped, doubled, lost."""
    lines = data.decode("utf-8", "replace").split("\n")
    for _ in range(rng.integers(1, 4)):
        if not lines:
            break
        place = int(rng.integers(len(lines)))
        words = lines[place].split(" ")
        words[rng.integers(len(words))] = pick(rng, NUMBERS if rng.random() < 0.6 else WORDS)
        choice = rng.integers(5)
        if choice == 0:
            lines.insert(place, lines[rng.integers(len(lines))])
        elif choice == 1:
            lines.pop(place)
        else:
            lines[place] = pick(rng, [" ", "\t", "  ", "\u00a0"]).join(words)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def change_json(value: object, rng: Random) -> object:
    """A value somewhere in a JSON document becomes another."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.8:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = keys[rng.integers(len(keys))]
        if rng.random() < 0.15:
            value.pop(key)
        elif isinstance(value, dict) and rng.random() < 0.15:
            value[pick(rng, WORDS)] = value.pop(key)
        else:
            value[key] = change_json(value[key], rng)
        return value
    return pick(rng, JUNK)()


def json_values(data: bytes, rng: Random) -> bytes:
    text = json.dumps(change_json(json.loads(data), rng))
    if rng.random() < 0.3:
        text = re.sub(r"\d+(\.\d+)?", lambda number: str(pick(rng, NUMBERS)), text, count=1)
    if rng.random() < 0.05:
        text = text.replace("null", "[" * 100_000 + "]" * 100_000).replace("true", "[" * 100_000)
    return text.encode("utf-8", "surrogatepass")


def header_values(data: bytes, rng: Random) -> bytes:
    """The header of a safetensors file, put together again with its right length."""
    length = int.from_bytes(data[:8], "little")
    header = json_values(data[8 : 8 + length], rng)
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def archive_parts(data: bytes, rng: Random) -> bytes:
    """A part of a zip archive mutated, the check sums right again."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made, "w") as new:
        names = old.namelist()
        victim = next(n for n in names if n.endswith("data.pkl"))
        victim = names[rng.integers(len(names))] if rng.random() < 0.15 else victim
        for name in names:
            content = old.read(name)
            if name == victim:
                if rng.random() < 0.05:
                    continue
                content = blind(content, rng)
            kind = zipfile.ZIP_DEFLATED if rng.random() < 0.01 else zipfile.ZIP_STORED
            new.writestr(name, content, kind)
    return made.getvalue()


def signed_marks(data: bytes, rng: Random) -> bytes:
    """A fingerprint that was changed, its own hash made right again."""
    marks = change_json(json.loads(data)[0], rng)
    try:
        return json.dumps([marks, text_hash(marks)]).encode("utf-8", "surrogatepass")
    except (TypeError, AttributeError, ValueError):
        return json.dumps([marks, ""]).encode("utf-8", "surrogatepass")


def signed_figures(_data: bytes, rng: Random) -> bytes:
    """An entry of other figures, its own hash made right again."""
    figures = json_values(FIGURES.encode(), rng).decode("utf-8", "replace")
    return safetensors_bytes(TENSORS, {"figures": figures, "hash": content_hash(TENSORS, figures)})


# -- the readers -----------------------------------------------------------------------------------


def read_weights(path: Path) -> object:
    state = load_checkpoint(path, finite=False)
    load_state(Small(), state, path)
    return state


def read_fingerprint(path: Path) -> object:
    (path.parent / "finished.safetensors").touch()  # else there is nothing to lose, and no refusal
    with open_state(path.parent, MARKS) as state:
        return state


def read_entry(path: Path) -> object:
    return RunState(path.parent).load("entry")


@dataclass(frozen=True)
class Target:
    """A reader, the name its file has to have, good files, and mutations that know the format."""

    read: Callable[[Path], object]
    name: str
    good: tuple[bytes, ...]
    knowing: tuple[Callable[[bytes, Random], bytes], ...]


TARGETS = {
    "pth": Target(read_weights, "x.pth", (good_pth(), good_pth(wrap=True)), (archive_parts,)),
    "legacy": Target(read_weights, "x.th", (good_pth(zipped=False),), (blind,)),
    "safetensors": Target(
        read_weights, "x.safetensors", (safetensors_bytes(good_state()),), (header_values,)
    ),
    "scores": Target(read_scores, "scores.txt", (SCORES,), (text_tokens,)),
    "profile": Target(read_profile, "profile.txt", (PROFILE,), (text_tokens,)),
    "timings": Target(
        lambda path: read_scores(path, positive=True), "timings.txt", (TIMINGS,), (text_tokens,)
    ),
    "record": Target(read_record, "record.json", (RECORD,), (json_values,)),
    "fingerprint": Target(
        read_fingerprint,
        FINGERPRINT,
        (json.dumps([MARKS, text_hash(MARKS)]).encode(),),
        (json_values, signed_marks),
    ),
    "image": Target(lambda path: read_image(str(path)), "x", good_images(), (blind,)),
    "entry": Target(
        read_entry, "entry.safetensors", (good_entry(),), (header_values, signed_figures)
    ),
}


# -- running ---------------------------------------------------------------------------------------


class TooSlow(BaseException):
    """A case took more than SECONDS."""


def _too_slow(_number: int, _frame: object) -> None:
    raise TooSlow


def make_case(target: Target, rng: Random) -> bytes:
    good = target.good[rng.integers(len(target.good))]
    if rng.random() < 0.5:
        return blind(good, rng)
    return target.knowing[rng.integers(len(target.knowing))](good, rng)


def one_line(error: UserError, path: Path) -> bool:
    """Whether a refusal is one line that begins with the file, or its folder, and says more."""
    name, _, reason = str(error).partition(": ")
    named = name.split(", line ")[0] in (str(path), str(path.parent))
    return named and len(str(error).splitlines()) == 1 and bool(reason.strip())


def outcome(target: Target, data: bytes, folder: Path) -> str:
    """ "read" or "refused" if all is well, else what went wrong."""
    path = folder / target.name
    path.write_bytes(data)
    signal.signal(signal.SIGPROF, _too_slow)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    ending: BaseException | None = None
    try:
        target.read(path)
    except BaseException as error:  # a PanicException of Rust's is one
        ending = error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if isinstance(ending, TooSlow):
        return f"slower than {SECONDS} s"
    if isinstance(ending, UserError):
        return "refused" if one_line(ending, path) else f"refused in other words: {ending}"
    return f"{type(ending).__name__}: {ending}" if ending else "read"


def keep(name: str, data: bytes) -> Path:
    path = CORPUS / name / hashlib.sha256(data).hexdigest()[:16]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def fuzz(name: str, cases: int, seed: int) -> tuple[dict[str, int], dict[str, bytes]]:
    """How many cases ended how; the first case of every kind of failure."""
    target, rng = TARGETS[name], np.random.default_rng([seed, *name.encode()])
    ends: dict[str, int] = {}
    failures: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory(prefix="fuzz", dir=IN_MEMORY) as folder:
        for _ in range(cases):
            data = make_case(target, rng)
            end = outcome(target, data, Path(folder))
            if end not in ("read", "refused"):
                failures.setdefault(re.sub(r"[0-9]+|'.*?'", "…", end)[:80], data)
                end = "failed"
            ends[end] = ends.get(end, 0) + 1
    return ends, failures


def fuzz_graphs(cases: int, seed: int) -> tuple[dict[str, int], list[str]]:
    """How many random networks were traced, run as a whole, or failed; what was wrong."""
    ends, failures = {"traced": 0, "whole": 0, "failed": 0}, []
    for number in range(cases):
        wrong, traced = wrong_answers(np.random.default_rng([seed, number]))
        failures += [f"network {number}: {answer}" for answer in wrong]
        ends["failed" if wrong else "traced" if traced else "whole"] += 1
    return ends, failures


def fuzz_modes(cases: int, seed: int) -> tuple[dict[str, int], list[str]]:
    """How many random images were read right, refused for good reason, or failed, and how."""
    ends, failures, rng = {"read": 0, "refused": 0, "failed": 0}, [], np.random.default_rng(seed)
    with tempfile.TemporaryDirectory(prefix="fuzz", dir=IN_MEMORY) as folder:
        for number in range(cases):
            wrong, refused = wrong_pixels(Path(folder) / "x", rng)
            failures += [f"image {number}: {wrong}"] if wrong else []
            ends["failed" if wrong else "refused" if refused else "read"] += 1
    return ends, failures


def limit_memory() -> None:
    """Claims of huge tensors shall fail rather than fill the machine."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + (GIGABYTES << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=100_000, help="of each kind of file")
    parser.add_argument("--graphs", type=int, default=2_000, help="random networks")
    parser.add_argument("--seed", type=int, default=0)
    names = [*TARGETS, MODES, GRAPHS]
    parser.add_argument("--target", choices=names, action="append", help="default: all")
    args = parser.parse_args()
    logging.getLogger("trueobs").setLevel(logging.CRITICAL)
    limit_memory()
    failed = False
    for name in args.target or names:
        started = time.process_time()
        if name in (GRAPHS, MODES):
            counted = args.graphs if name == GRAPHS else args.cases
            ends, wrong = (fuzz_graphs if name == GRAPHS else fuzz_modes)(counted, args.seed)
            sys.stdout.write(f"{name}: {ends}, {time.process_time() - started:.0f} s of CPU\n")
            sys.stdout.writelines(f"  {line}\n" for line in wrong)
            failed |= bool(wrong)
            continue
        ends, failures = fuzz(name, args.cases, args.seed)
        seconds = time.process_time() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        sys.stdout.write(f"{name}: {ends}, {seconds:.0f} s of CPU, peak {peak} MB\n")
        for what, data in failures.items():
            sys.stdout.write(f"  {what}: {keep(name, data)}\n")
        sys.stdout.flush()
        failed |= bool(failures)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
