"""What a long run has finished, kept on disk so that the same command goes on from there.

    State  ── a hidden folder .NAME.partial/ beside the output that the run is for
      fingerprint.json        what the run depends on, by name; written first
      <key>.safetensors       one thing that is finished: tensors and figures, e.g. a layer

What is kept is used by a run of the same fingerprint only (`fingerprints.py`); another one is told
the first difference. Every entry is one file, written whole
(`files.atomic_write`), with a hash of its contents inside: one that was damaged afterwards is done
again. Killed at any moment, a run loses what it had in hand, no more. Since every finished thing is
the same function of the same contents, a resumed result equals an uninterrupted one to the bit.

`Notes` are for many small results, such as losses: gathered, and written at most once a second.

Of several processes (`distributed.py`) the first keeps the state for all (`Together`).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from obc.inputs.files import atomic_write, sync_folder
from obc.solver.distributed import ALONE, World
from obc.solver.errors import UserError, log
from obc.toolkit.fingerprints import content_hash, difference, text_hash

try:
    import fcntl
except ImportError:  # not a POSIX system: nobody watches over two runs at once
    fcntl = None

SECONDS_BETWEEN_NOTES = 1.0
FINGERPRINT, LOCK = "fingerprint.json", "lock"


@dataclass(frozen=True)
class Entry:
    """Something finished."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)


class Unkept:
    """Stands in for a `State` where nothing is to be kept."""

    world = ALONE

    def holds(self, key: str) -> bool:
        """Whether something is saved under `key`, damaged or not."""
        return False

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
        return file_of(self.folder, key)

    def holds(self, key: str) -> bool:
        return self.path(key).exists()

    def save(self, key: str, tensors: Mapping[str, Tensor], figures: Mapping[str, Any]) -> None:
        if not (self.folder / FINGERPRINT).exists():
            raise UserError(f"{self.folder}: was removed while the run was at work; start it again")
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        text = json.dumps(dict(figures))
        marks = {"figures": text, "hash": content_hash(plain, text)}
        with atomic_write(self.path(key)) as file:
            file.write(safetensors_bytes(plain, marks))

    def load(self, key: str) -> Entry | None:
        if not self.holds(key):
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


class Together(Unkept):
    """A state of several processes, which all call it alike: the first one's, that all read."""

    def __init__(self, state: Unkept, world: World) -> None:
        self.state, self.world = state, world

    def holds(self, key: str) -> bool:
        return self.world.share(self.state.holds(key))

    def load(self, key: str) -> Entry | None:
        return self.world.share(self.state.load(key))

    def save(self, key: str, tensors: Mapping[str, Tensor], figures: Mapping[str, Any]) -> None:
        self.state.save(key, tensors, figures)

    def finish(self) -> None:
        self.world.meet()  # others may still read what is there
        self.state.finish()

    def __exit__(self, *error: object) -> None:
        self.state.__exit__(*error)


def open_state(
    folder: Path, fingerprint: Mapping[str, str], restart: bool, world: World = ALONE
) -> State | Together:
    """The state in a folder, of however many processes."""
    if world.size == 1:
        return State(folder, fingerprint, restart)
    state = Together(State(folder, fingerprint, restart) if world.first else Unkept(), world)
    world.meet()
    return state


def file_of(folder: Path, key: str, suffix: str = ".safetensors") -> Path:
    """Where something is kept."""
    return folder / f"{quote(key, safe=' ')}{suffix}"


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
    """Small results by name: figures as JSON has them, kept in a state.

    Several processes start with the same notes; `collect` brings what others add to the first.
    """

    def __init__(self, state: Unkept) -> None:
        self.state, self.known, self.fresh = state, {}, {}
        self.pages, self.written = 0, time.monotonic()
        while state.holds(self._page()):
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
        if self.fresh and self.state.world.first:
            self.state.save(self._page(), {}, self.fresh)
            self.pages, self.fresh = self.pages + 1, {}
        self.written = time.monotonic()

    def collect(self, more: bool) -> bool:
        """Note what others have noted; whether any of them still has `more` to do."""
        world = self.state.world
        if world.size == 1:
            return more
        shares = world.gather((None if world.first else self.fresh, more))
        for theirs, _ in shares[1:]:
            if world.first:
                self.known |= theirs
                self.fresh |= theirs
        if not world.first:
            self.fresh = {}
        elif time.monotonic() - self.written >= SECONDS_BETWEEN_NOTES:
            self.write()
        return any(more for _, more in shares)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Inside, an interrupt loses nothing that was noted."""
        try:
            yield
        finally:
            self.write()
