"""What a long run has finished, saved on disk so that the same command continues from there.

    RunState  ── a hidden folder .NAME.partial/ next to the run's output
      fingerprint.json        what the result depends on, by name; written first
      <key>.safetensors       one finished result: tensors and figures, e.g. a layer

Only a run with the same fingerprint (`fingerprints.py`) may continue; any other is told the first
difference. Every entry is one file, written whole (`files.atomic_write`), with a hash of its
contents inside: an entry that was damaged afterwards is computed again. A run that is killed loses
only what it was working on. Every finished result is a function of the fingerprint, so a resumed
run equals an uninterrupted one to the bit.

`Notes` are many small results, such as losses: collected, and written at most once a second.

When several processes share a run (`distributed.py`), the first one writes and all of them read.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Mapping
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

SECONDS_BETWEEN_NOTES = 1.0
FINGERPRINT, LOCK = "fingerprint.json", "lock"


@dataclass(frozen=True)
class Entry:
    """One finished result."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)


class RunState:
    """The finished results of a run in a folder, made by `open_state`; a context while in use.

    Without a folder nothing is saved. All processes of `world` call every method alike.
    """

    def __init__(self, folder: Path | None = None, world: World = ALONE) -> None:
        self.folder, self.world, self.prefix = folder, world, ""
        self._lock: int | None = None  # a descriptor, while this process holds the folder

    def begin(self, fingerprint: Mapping[str, str], restart: bool) -> None:
        """Lock the folder, and empty it unless it holds results that this run may use."""
        self.folder.mkdir(parents=True, exist_ok=True)
        sync_folder(self.folder.parent)
        self._lock = lock_folder(self.folder)
        path = self.folder / FINGERPRINT
        try:
            if path.exists() and self.has_entries() and not restart:
                check_fingerprint(path, fingerprint)
                return
            for leftover in self.folder.iterdir():
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                elif leftover.name != LOCK:
                    leftover.unlink()
            content = json.dumps([dict(fingerprint), text_hash(fingerprint)], indent=1)
            with atomic_write(path) as file:
                file.write(content.encode())
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> RunState:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is None:
            return
        if not self.has_entries():
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)
        self._lock = None

    def path(self, key: str) -> Path:
        """The file of an entry."""
        return entry_file(self.folder, self.prefix + key)

    def part(self, name: str) -> RunState:
        """The results of one step of the run, by keys of its own."""
        part = RunState(self.folder, self.world)
        part.prefix = f"{self.prefix}{name} "
        return part

    def has_entries(self) -> bool:
        """Whether anything is finished."""
        return any(self.folder.glob("*.safetensors"))

    def holds(self, key: str) -> bool:
        """Whether there is an entry of this key, intact or damaged."""
        if self.folder is None:
            return False
        return self.world.share(self.world.first and self.path(key).exists())

    def load(self, key: str) -> Entry | None:
        """The entry of this key; None if there is none, or if it is damaged."""
        if not self.holds(key):
            return None
        return self.world.share(read_entry(self.path(key)) if self.world.first else None)

    def save(self, key: str, tensors: Mapping[str, Tensor], figures: Mapping[str, Any]) -> None:
        """Save an entry, in place of an earlier one of the same key."""
        if self.folder is None or not self.world.first:
            return
        if not (self.folder / FINGERPRINT).exists():
            raise UserError(f"{self.folder}: was removed during the run; start it again")
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        text = json.dumps(dict(figures))
        metadata = {"figures": text, "hash": content_hash(plain, text)}
        with atomic_write(self.path(key)) as file:
            file.write(safetensors_bytes(plain, metadata))

    def finish(self) -> None:
        """Remove the folder, once the output is on disk."""
        if self.folder is None:
            return
        self.world.meet()  # other processes may still be reading
        if self.world.first:
            shutil.rmtree(self.folder, ignore_errors=True)


class SharedCache(RunState):
    """Results that all runs with one fingerprint share, also at the same time."""

    def __init__(self, folder: str | os.PathLike[str], fingerprint: Mapping[str, str]) -> None:
        super().__init__(Path(folder) / text_hash(fingerprint))
        if not (self.folder / FINGERPRINT).exists():
            with atomic_write(self.folder / FINGERPRINT) as file:  # only read by people
                file.write(json.dumps(dict(fingerprint), indent=1).encode())

    def finish(self) -> None:
        """Nothing: other runs may use the results."""


def open_state(
    folder: Path | None,  # None: nothing is saved
    fingerprint: Mapping[str, str],
    restart: bool = False,  # discard what an interrupted run has finished
    world: World = ALONE,
) -> RunState:
    """The state in a folder, for this run alone.

    Raises UserError for results of another fingerprint, and if another run uses the folder; OSError
    if it cannot be written. All processes raise what the first one does.
    """
    state, failure = RunState(folder, world), None
    if folder is None:
        return state
    if world.first:
        try:
            state.begin(fingerprint, restart)
        except (UserError, OSError) as error:
            failure = error
    if failure := world.share(failure):
        raise failure
    return state


def state_folder(output: str | os.PathLike[str]) -> Path:
    """The folder of a run's state: hidden, next to its output."""
    return Path(output).with_name(f".{Path(output).name}.partial")


def entry_file(folder: Path, key: str, suffix: str = ".safetensors") -> Path:
    """The file of an entry."""
    return folder / f"{quote(key, safe=' ')}{suffix}"


def lock_folder(folder: Path) -> int:
    """An open file whose lock the system releases however the process ends.

    Raises UserError if another process holds it.
    """
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:  # not flock: processes that decode images would inherit it, and outlive a kill
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        os.close(lock)
        raise UserError(f"{folder}: in use by another run; wait until it has ended") from None
    except OSError:
        pass  # a file system without locks
    return lock


def check_fingerprint(path: Path, fingerprint: Mapping[str, str]) -> None:
    """Raise a UserError unless the file holds this fingerprint."""
    try:
        recorded, recorded_hash = json.loads(path.read_bytes())
        texts = all(isinstance(value, str) for value in recorded.values())
        if recorded_hash != text_hash(recorded) or not texts:
            raise ValueError
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: damaged; pass --restart to start over") from None
    if change := difference(recorded, fingerprint):
        raise UserError(
            f"{path.parent}: holds an interrupted run that differs from this one ({change}): "
            "repeat that command, or pass --restart to start over"
        )


def read_entry(path: Path) -> Entry | None:
    """An entry; None, with a warning, if its contents are not those that were saved."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
        text = metadata["figures"]
        figures = json.loads(text)
        if metadata["hash"] == content_hash(tensors, text) and isinstance(figures, dict):
            return Entry(tensors, figures)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError):
        pass  # RecursionError is a RuntimeError
    log.warning("%s: damaged; it is computed again", path)
    return None


class Notes:
    """Small results by name, in JSON's types, saved in a state; all of them as the context ends.

    Several processes start with the same notes; `collect` sends those of the others to the first.
    """

    def __init__(self, state: RunState) -> None:
        self.state, self.known, self.unwritten = state, {}, {}
        self.pages, self.written_at = 0, time.monotonic()
        while state.holds(self._page()):
            if entry := state.load(self._page()):
                self.known |= entry.figures
            self.pages += 1

    def _page(self) -> str:
        return f"notes {self.pages}"

    def get(self, key: str) -> Any:
        """The note of this name, or None."""
        return self.known.get(key)

    def add(self, key: str, figures: Any) -> None:
        """Add a note; it is written with the next one that is added a second or more later."""
        self.known[key] = self.unwritten[key] = figures
        if time.monotonic() - self.written_at >= SECONDS_BETWEEN_NOTES:
            self.write()

    def write(self) -> None:
        """Write what is not yet on disk."""
        if self.unwritten and self.state.world.first:
            self.state.save(self._page(), {}, self.unwritten)
            self.pages, self.unwritten = self.pages + 1, {}
        self.written_at = time.monotonic()

    def collect(self, more: bool) -> bool:
        """Add the notes of all processes to the first one's; whether any has `more` to do."""
        world = self.state.world
        if world.size == 1:
            return more
        shares = world.gather((None if world.first else self.unwritten, more))
        if world.first:
            for notes, _ in shares[1:]:
                self.known |= notes
                self.unwritten |= notes
            if time.monotonic() - self.written_at >= SECONDS_BETWEEN_NOTES:
                self.write()
        else:
            self.unwritten = {}
        return any(more for _, more in shares)

    def __enter__(self) -> Notes:
        return self

    def __exit__(self, *_: object) -> None:
        self.write()
