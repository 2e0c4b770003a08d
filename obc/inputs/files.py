"""Files that appear whole or not at all.

Everything is written under a temporary name beside its destination, forced to disk and renamed, so
that no reader ever sees half a file. Of several processes (torchrun), only the first writes.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from obc.solver.errors import UserError, rank


def _destination(path: str | os.PathLike[str]) -> Path:
    """Where `path` leads after links; a UserError if it is something that cannot be replaced."""
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
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file that appears under `path` only once it is complete and on disk.

    On any exception inside, the temporary file is removed and what was at `path` stays. The parent
    directory is made if it is missing. Of many processes, only the first one's file appears.
    """
    if rank():
        with open(os.devnull, "wb") as nowhere:
            yield nowhere
        return
    target = _destination(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name[:100]}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
        sync_folder(target.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            error.filename = str(path)  # the name that the user knows
        raise


def sync_folder(folder: Path) -> None:
    """Force to disk which files are in a folder, where a system knows of such a thing."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise a UserError now if `path` could not be written later. Leaves nothing behind."""
    target = _destination(path)
    existing = next(folder for folder in target.parents if os.path.lexists(folder))
    name = target.name if existing == target.parent else "x"
    probe = existing / f"{name[:-12]}{uuid.uuid4().hex[:12]}"  # as long as the name itself
    try:
        probe.open("xb").close()
        probe.unlink()
        if target.exists() and not os.access(target, os.W_OK):
            raise PermissionError(None, "is write-protected")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def save_checkpoint(state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write a plain state dict, tensors only: safetensors by that suffix, else torch.save's format.

    Tensors are copied to the CPU, contiguous and each with a storage of its own size, so that a
    view does not drag its whole base into the file.
    """
    plain: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}; a checkpoint holds tensors only")
        plain[name] = tensor.detach().to("cpu", copy=True).contiguous()
    if Path(path).suffix == ".safetensors":
        contents: bytes | memoryview = safetensors_bytes(plain)
    else:
        buffer = io.BytesIO()  # onto a full disk, torch.save would hide the OSError in C++'s own
        torch.save(plain, buffer)
        contents = buffer.getbuffer()
    with atomic_write(path) as file:
        file.write(contents)
