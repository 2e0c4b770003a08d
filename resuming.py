"""What a long run has finished, kept on disk so that the same command goes on from there.

    State  ── a hidden folder .NAME.partial/ beside the output that the run is for
      fingerprint.json        what the run depends on, by name; written first
      <key>.safetensors       one thing that is finished: tensors and figures, e.g. a layer

A *fingerprint* names everything that the result is a function of: hashes of contents (weights,
images, a database, the code), options, versions. What is kept is used by a run of the same
fingerprint only; another one is told the first difference. Every entry is one file, written whole
(`cli.atomic_write`), with a hash of its contents inside: one that was damaged afterwards is done
again. Killed at any moment, a run loses what it had in hand, no more. Since every finished thing is
the same function of the same contents, a resumed result equals an uninterrupted one to the bit.

`Notes` are for many small results, such as losses: gathered, and written at most once a second.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from cli import UserError, atomic_write, log, sync_folder

try:
    import fcntl
except ImportError:  # not a POSIX system: nobody watches over two runs at once
    fcntl = None

SECONDS_BETWEEN_NOTES = 1.0
HASH_BYTES = 16
FINGERPRINT, LOCK = "fingerprint.json", "lock"
VERSIONS = ("torch", "torchvision", "numpy", "numba", "pillow")
SURROUNDINGS = ("code", *VERSIONS, "threads", "device")  # they change results by rounding only
NO_PART_OF_A_RESULT = {  # options: where and how to work, or files whose contents count
    "help", "skip_bad_images", "device", "workers", "memory", "restart", "repeat", "check", "cache",
    "weights", "datapath", "load", "save", "sparse_dir", "prefix", "score_path", "profile", "file",
    "timings", "image_size",
}  # fmt: skip


# -- fingerprints ----------------------------------------------------------------------------------


def content_hash(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """A hash of tensors, whatever their order: names, types, shapes and bytes; and of a text."""
    content = hashlib.blake2b(text.encode(), digest_size=HASH_BYTES)
    for name, tensor in sorted(tensors.items()):
        content.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        content.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
    return content.hexdigest()


def bytes_hash(parts: Iterable[bytes]) -> str:
    """A hash of byte strings, in order."""
    content = hashlib.blake2b(digest_size=HASH_BYTES)
    for part in parts:
        content.update(b"%d " % len(part))
        content.update(part)
    return content.hexdigest()


def text_hash(marks: Mapping[str, str]) -> str:
    """A hash of a fingerprint."""
    return content_hash({}, json.dumps(sorted(marks.items())))


def code_hash(*modules: str) -> str:
    """A hash of our own modules of these names and of all that they import."""
    here, found, wanted = Path(__file__).resolve().parent, {}, set(modules)
    while wanted:
        path = here / f"{wanted.pop()}.py"
        if path not in found and path.is_file():
            found[path] = path.read_text()
            wanted |= set(re.findall(r"^\s*(?:from|import)\s+(\w+)", found[path], re.MULTILINE))
    return bytes_hash(found[path].encode() for path in sorted(found))


def surroundings(device: torch.device, *modules: str) -> dict[str, str]:
    """The part of a fingerprint that tells on what, and by which code, a run is done."""
    versions = {}
    for package in VERSIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {"code": code_hash(*modules), **versions, "device": device.type,
            "threads": str(torch.get_num_threads())}


def chosen_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, str]:
    """Words and options of a command by the names its user knows, those that change results."""
    return {
        action.option_strings[-1] if action.option_strings else str(action.metavar or action.dest):
        str(getattr(args, action.dest))
        for action in parser._actions if action.dest not in NO_PART_OF_A_RESULT
    }  # fmt: skip


def difference(old: Mapping[str, str], new: Mapping[str, str]) -> tuple[str, str] | None:
    """The first thing that differs, in words: as it was, as it is; None if nothing does."""
    for name in (*new, *(name for name in old if name not in new)):
        was, now = old.get(name), new.get(name)
        if was == now:
            continue
        if {was, now} <= {"True", "False"}:
            return tuple(f"with{'' if value == 'True' else 'out'} {name}" for value in (was, now))
        if re.fullmatch(rf"[0-9a-f]{{{2 * HASH_BYTES}}}", was or now or ""):
            return f"with other {name}", "with what is found now"
        return tuple(f"with {name} {value}" for value in (was, now))
    return None


# -- what is finished ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """Something finished."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)


class Unkept:
    """Stands in for a `State` where nothing is to be kept."""

    def load(self, key: str) -> Entry | None:
        """What was saved under `key` and is undamaged."""
        return None

    def save(self, key: str, tensors: Mapping[str, Tensor], figures: Mapping[str, Any]) -> None:
        """Keep something finished, in place of what was kept under `key` before."""

    def finish(self) -> None:
        """Remove all; for when the output is on disk."""

    def __enter__(self) -> Unkept:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class State(Unkept):
    """A folder of finished things, of one fingerprint; a context while it is used.

    Raises UserError for a folder of another fingerprint, and while another run is at work on it.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, str], restart: bool = False) -> None:
        self.folder, self._lock, self._held = folder, None, False
        marks = folder / FINGERPRINT
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)
        self._take()
        try:
            if marks.exists() and self.holds_something() and not restart:
                check_fingerprint(marks, fingerprint)
                return
            for path in folder.iterdir():  # of a run that is given up, or had finished nothing
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != LOCK:
                    path.unlink()
            content = json.dumps([dict(fingerprint), text_hash(fingerprint)], indent=1)
            with atomic_write(marks) as file:
                file.write(content.encode())
        except BaseException:
            self.__exit__()
            raise

    def _take(self) -> None:
        """Lock the folder; the system takes the lock back however the process ends."""
        self._held = fcntl is None
        if self._held:
            return
        self._lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:  # not flock: processes that decode images would inherit it, and outlive a kill
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self.__exit__()
            raise UserError(f"{self.folder}: another run is at work on this; wait for it") from None
        except OSError:
            pass  # a file system without locks
        self._held = True

    def __enter__(self) -> State:
        return self

    def __exit__(self, *_: object) -> None:
        if self._held and not self.holds_something():
            self.finish()
        if self._lock is not None:
            os.close(self._lock)
        self._lock, self._held = None, False

    def holds_something(self) -> bool:
        """Whether anything is finished."""
        return any(self.folder.glob("*.safetensors"))

    def path(self, key: str) -> Path:
        """The file of an entry."""
        return self.folder / f"{quote(key, safe=' ')}.safetensors"

    def save(self, key: str, tensors: Mapping[str, Tensor], figures: Mapping[str, Any]) -> None:
        if not (self.folder / FINGERPRINT).exists():
            raise UserError(f"{self.folder}: was removed while the run was at work; start it again")
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        text = json.dumps(dict(figures))
        marks = {"figures": text, "hash": content_hash(plain, text)}
        with atomic_write(self.path(key)) as file:
            file.write(safetensors_bytes(plain, marks))

    def load(self, key: str) -> Entry | None:
        if not self.path(key).exists():
            return None
        try:
            with safe_open(self.path(key), "pt") as file:
                marks = file.metadata()
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
            figures = json.loads(marks["figures"])
            if marks["hash"] == content_hash(tensors, marks["figures"]) and type(figures) is dict:
                return Entry(tensors, figures)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError):
            pass  # RecursionError is a RuntimeError
        log.warning("%s: damaged; it is done again", self.path(key))
        return None

    def part(self, key: str, name: str, index: int) -> Tensor:
        """tensors[name][index] of an entry; the rest of it is not read."""
        with safe_open(self.path(key), "pt") as file:
            return file.get_slice(name)[index].clone()

    def finish(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class Cache(State):
    """Finished things that any run of this fingerprint may take and add, several at once."""

    def __init__(self, folder: str | os.PathLike[str], fingerprint: Mapping[str, str]) -> None:
        self.folder = Path(folder) / text_hash(fingerprint)
        self._lock, self._held = None, False
        if not (self.folder / FINGERPRINT).exists():
            with atomic_write(self.folder / FINGERPRINT) as file:  # to be read by people only
                file.write(json.dumps(dict(fingerprint), indent=1).encode())

    def finish(self) -> None:
        """Nothing: other runs may want it."""


def state_folder(output: str | os.PathLike[str]) -> Path:
    """Where the state of a run is kept: hidden, beside its output."""
    return Path(output).with_name(f".{Path(output).name}.partial")


def check_fingerprint(path: Path, fingerprint: Mapping[str, str]) -> None:
    """Raise a UserError unless the file holds this fingerprint."""
    try:
        old, mark = json.loads(path.read_bytes())
        if mark != text_hash(old) or not all(isinstance(x, str) for x in old.values()):
            raise ValueError
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: damaged; pass --restart to start over") from None
    if parted := difference(old, fingerprint):
        raise UserError(
            f"{path.parent}: an interrupted run, begun {parted[0]}, this one {parted[1]}: "
            "repeat that command, or pass --restart to start over"
        )


class Notes:
    """Small results by name: figures as JSON has them, kept in a state."""

    def __init__(self, state: Unkept) -> None:
        self.state, self.known, self.fresh = state, {}, {}
        self.pages, self.written = 0, time.monotonic()
        while isinstance(state, State) and state.path(self._page()).exists():
            if entry := state.load(self._page()):
                self.known |= entry.figures
            self.pages += 1

    def _page(self) -> str:
        return f"notes {self.pages}"

    def get(self, key: str) -> Any:
        """What was noted under `key`, or None."""
        return self.known.get(key)

    def add(self, key: str, figures: Any) -> None:
        """Note something; it is on disk a second later, at the latest with the next note."""
        self.known[key] = self.fresh[key] = figures
        if time.monotonic() - self.written >= SECONDS_BETWEEN_NOTES:
            self.write()

    def write(self) -> None:
        """Write what is not yet on disk."""
        if self.fresh:
            self.state.save(self._page(), {}, self.fresh)
            self.pages, self.fresh = self.pages + 1, {}
        self.written = time.monotonic()

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Inside, an interrupt loses nothing that was noted."""
        try:
            yield
        finally:
            self.write()
