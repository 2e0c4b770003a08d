"""Weights from files of strangers: tensors by name and nothing else, or one line that says why not.

    load_checkpoint(path) ─▶ {key: tensor}          a file, whatever made it
    load_state(model, state, path)                  into a model that it has to fit exactly

A file is not trusted. `.pth` is read with `weights_only=True`, so that nothing in it runs, and
`.safetensors` holds nothing that could; the wrappers that training scripts put around a state dict
are taken off. Nothing is allocated because a file claims to be large:

* an archive whose parts are compressed, or larger than the archive, is refused unread: what
  `torch.save` writes is stored as it is;
* tensors that claim more than `CLAIM` times the bytes of their file (by strides of zero, or by
  sharing one storage) are refused;
* values are read from the mapped file only after names, types and shapes were found to be the
  model's.

What an attacker can still do with a `.pth` is to keep the unpickler busy: prefer safetensors.
"""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError  # nosec B403  # an exception; nothing is unpickled by it
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from obc.solver.errors import UserError, log

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel, of torch.compile
CLAIM = 4  # × the file: tied weights are in it once
PIECE = 1 << 24  # values that are looked at together
MAX_PICKLE = 256 << 20  # bytes of names and shapes; a network of 10,000 tensors has 2 MB


def load_checkpoint(path: str | os.PathLike[str], finite: bool = True) -> dict[str, Tensor]:
    """The state dict in a .pth, .th, .pt or .safetensors file: finite tensors on the CPU, by name.

    Wrappers and prefixes are taken off. Raises UserError for anything else. Values are
    mapped from the file; with finite=False they are not even looked at.
    """
    if not Path(path).exists():
        raise UserError(f"{path}: no such file")
    if not Path(path).is_file():
        raise UserError(f"{path}: is not a file")
    content = _read_safetensors(path) if Path(path).suffix == ".safetensors" else _read_torch(path)
    state = _unwrap(content, path)
    while prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in state)), ""):
        state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    _check_plain(state, path)
    if finite:
        check_finite(state, path)
    return state


# -- reading ---------------------------------------------------------------------------------------


def _read_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({_first_line(error)})") from None


def _read_torch(path: str | os.PathLike[str]) -> Any:
    try:
        zipped = zipfile.is_zipfile(path)  # older files are not, and cannot be mapped
        if zipped:
            _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong with a file is said below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except UserError:
        raise
    except UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found:
            raise UserError(
                f"{path}: contains Python objects other than tensors ({found[1]}); "
                "refuse to load it: save its state_dict() instead"
            ) from None
        reason = "not a checkpoint"
    except PermissionError as error:
        reason = str(error.strerror)
    except Exception as error:  # from arbitrary bytes an unpickler can raise anything
        if "TorchScript" in str(error):
            raise UserError(
                f"{path}: is a TorchScript program; refuse to load it: "
                "save its state_dict() instead"
            ) from None
        reason = "corrupt or truncated"
    raise UserError(f"{path}: cannot be read ({reason})")


def _check_archive(path: str | os.PathLike[str]) -> None:
    """Raise a UserError for a zip archive that would unfold into more than it is."""
    size = os.path.getsize(path)
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
    for part in parts:
        if part.compress_type != zipfile.ZIP_STORED or part.file_size > size:
            raise UserError(
                f"{path}: {part.filename} in it is compressed, or claims "
                f"{part.file_size:,} of the file's {size:,} bytes; refuse to load it"
            )
        if part.filename.endswith("data.pkl") and part.file_size > MAX_PICKLE:
            raise UserError(f"{path}: names alone take {part.file_size:,} bytes; refuse to load it")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _unwrap(content: Any, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors by name, out of whatever dictionary a training script has put them in."""
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: contains a {type(content).__name__}, not a state dict")
    state = {
        key: value
        for key, value in content.items()
        if isinstance(value, Tensor) and isinstance(key, str)
    }
    if not state:
        raise UserError(f"{path}: no tensors in it")
    if len(state) < len(content):
        others = [
            key if isinstance(key, str) else f"a {type(key).__name__}"
            for key in content
            if key not in state
        ]
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        log.warning("%s: not used, since not tensors: %s", path, ", ".join(others[:5]) + more)
    return state


# -- checking --------------------------------------------------------------------------------------


def _check_plain(state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Raise a UserError unless these are ordinary tensors, with no more values than were saved."""
    room, claimed = CLAIM * os.path.getsize(path), 0
    for key, tensor in state.items():
        if type(tensor) not in (Tensor, nn.Parameter):
            raise UserError(f"{path}: {key} is a {type(tensor).__name__}, not a plain tensor")
        kind = _odd_kind(tensor)
        if kind:
            raise UserError(f"{path}: {key} is {kind}; save it as a plain tensor of numbers")
        claimed += tensor.numel() * tensor.element_size()
        if claimed > room:
            raise UserError(
                f"{path}: {key} and what stands before it claim {claimed:,} bytes, "
                f"the file has {room // CLAIM:,}; refuse to load it"
            )


def _odd_kind(tensor: Tensor) -> str | None:
    """What makes a tensor unfit to be weights, whatever the model; None if nothing does."""
    if tensor.is_quantized:
        return f"quantised ({str(tensor.dtype).removeprefix('torch.')})"
    if tensor.is_nested or tensor.layout != torch.strided:
        return "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
    return "without values" if tensor.device.type != "cpu" else None


def check_finite(state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Raise a UserError that names the first tensor with a NaN or an infinity."""
    for key, tensor in state.items():
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        for piece in tensor.reshape(-1).split(PIECE):
            wide = piece.float() if tensor.element_size() == 1 else piece  # 8-bit floats
            if not torch.isfinite(wide).all():
                raise UserError(f"{path}: {key} has NaN or infinite values")


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_complex:
        return "complex"
    return "floating" if dtype.is_floating_point else "bool" if dtype == torch.bool else "integer"


def _check_kinds(
    state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: str | os.PathLike[str]
) -> None:
    """Raise a UserError for a value that a cast to the model's type would distort."""
    for key, tensor in state.items():
        ours, theirs = _kind(wanted[key].dtype), _kind(tensor.dtype)
        rounded = ours == "integer" and theirs == "floating"  # counts of a model saved in halves
        if ours != theirs and not rounded:
            name = str(tensor.dtype).removeprefix("torch.")
            raise UserError(
                f"{path}: {key} is {name}, should be {ours}; save it as "
                f"{str(wanted[key].dtype).removeprefix('torch.')}"
            )


def load_state(
    model: nn.Module,
    state: Mapping[str, Tensor],
    path: str | os.PathLike[str],  # for error messages
) -> None:
    """Copy `state` into `model`, whose names and shapes it has to have exactly.

    Values are cast to the model's dtypes. Raises UserError that names the first misfit.
    """
    wanted = model.state_dict()
    optional = {key for key in wanted if key.endswith("num_batches_tracked")}  # since PyTorch 0.4.1
    missing = [key for key in wanted if key not in state and key not in optional]
    unexpected = [key for key in state if key not in wanted]
    if missing or unexpected:
        texts = [
            f"{kind} {keys[0]}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
            for kind, keys in (("missing", missing), ("unexpected", unexpected))
            if keys
        ]
        raise UserError(f"{path}: does not fit the model: {'; '.join(texts)}")
    misfits = [key for key in state if state[key].shape != wanted[key].shape]
    if misfits:
        key = misfits[0]
        more = f", and {len(misfits) - 1} more" if len(misfits) > 1 else ""
        raise UserError(
            f"{path}: does not fit the model: {key} is {tuple(state[key].shape)}, "
            f"should be {tuple(wanted[key].shape)}{more}"
        )
    _check_kinds(state, wanted, path)
    check_finite(state, path)
    complete = {key: state.get(key, tensor) for key, tensor in wanted.items()}
    model.load_state_dict(complete)
