"""Files that are written whole or not at all.

Every file is written under a temporary name in the folder of its destination, forced to disk and
renamed, so that no reader ever sees half a file. Temporary files are hidden, and locked until the
process that writes them ends. The next process to write into a folder removes those that are not
locked: they are left over from killed processes. Of several processes (torchrun), only the first
writes.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import stat
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from obc.solver.errors import UserError, rank

TEMPORARY_NAME = ".obc.{}.tmp"
MARKS = "obc_marks"  # the attribute of a state dict that says what it was made of


def resolved(path: str | os.PathLike[str]) -> Path:
    """Where `path` leads after links; raises UserError if no file can take its place."""
    target = Path(os.path.realpath(path))
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return target
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    if stat.S_ISDIR(mode):
        raise UserError(f"{path}: is a directory; name a file")
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: is not a regular file; choose another name")
    return target


@contextlib.contextmanager
def temporary_file(folder: Path) -> Iterator[BinaryIO]:
    """A hidden file in `folder`, removed at the end unless it has been renamed."""
    for leftover in folder.glob(TEMPORARY_NAME.format("*")):
        with contextlib.suppress(OSError), open(leftover, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its process lives
            leftover.unlink()
    path = folder / TEMPORARY_NAME.format(uuid.uuid4().hex[:12])
    try:
        with open(path, "xb") as file:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if path.exists():
                yield file
                return
    finally:
        path.unlink(missing_ok=True)
    with temporary_file(folder) as file:  # that one was removed before it was locked
        yield file


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file that appears under `path` only once it is complete and on disk.

    After an exception inside, what was at `path` is still there. The parent directory is made if it
    is missing. Of several processes, only the first one's file appears.
    """
    if rank():
        with open(os.devnull, "wb") as nowhere:
            yield nowhere
        return
    target = resolved(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary_file(target.parent) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, target)
        sync_folder(target.parent)
    except OSError as error:
        if error.filename is None or str(error.filename).endswith(".tmp"):
            error.filename = str(path)  # the name that the user knows
        raise


def sync_folder(folder: Path) -> None:
    """Force the list of a folder's files to disk, on systems that can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise a UserError now if `path` could not be written later. Leaves nothing behind."""
    target = resolved(path)
    existing = next(folder for folder in target.parents if os.path.lexists(folder))
    try:
        with temporary_file(existing):
            pass
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(None, "is write-protected")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def check_keeps(
    option: str,  # that names the output
    path: str | os.PathLike[str],
    inputs: Mapping[str, str | os.PathLike[str] | None],  # by the option or word that names them
) -> None:
    """Raise a UserError if an output would overwrite an input, under whatever name."""
    for name, other in inputs.items():
        if other and os.path.exists(other) and os.path.exists(path):
            if os.path.samefile(path, other):
                raise UserError(
                    f"{option} {path}: would overwrite {name} {other}; choose another name"
                )


def save_checkpoint(
    state: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    marks: Mapping[str, str] | None = None,  # for `checkpoint_marks`
) -> None:
    """Write a plain state dict of tensors: as safetensors by its suffix, else as torch.save does.

    Marks are no entries of it: they become safetensors' metadata, or an attribute of the dictionary
    (like the `_metadata` of PyTorch's own), which `load_state_dict` does not look at. Tensors are
    copied to the CPU, each contiguous and with its own storage, so that a view does not bring its
    whole base into the file. Raises TypeError for anything but a tensor.
    """
    plain: dict[str, Tensor] = OrderedDict() if marks else {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; a checkpoint holds tensors only")
        plain[name] = tensor.detach().to("cpu", copy=True).contiguous()
    if Path(path).suffix == ".safetensors":
        contents: bytes | memoryview = safetensors_bytes(plain, dict(marks) if marks else None)
    else:
        if marks:
            setattr(plain, MARKS, dict(marks))
        buffer = io.BytesIO()  # torch.save itself would report a full disk as a RuntimeError
        torch.save(plain, buffer)
        contents = buffer.getbuffer()
    with atomic_write(path) as file:
        file.write(contents)
