"""Weights from untrusted files: tensors by name, or an error of one line that says what is wrong.

    load_checkpoint(path) ─▶ {key: tensor}          from a file that anyone may have made
    load_state(model, state, path)                  into a model with exactly these names and shapes

`.pth` is read with `weights_only=True`, so that nothing in it runs, and `.safetensors` has nothing
to run. Wrappers that training scripts put around a state dict are removed. A file cannot make us
allocate much more than its own size:

* an archive whose members are compressed, or larger than the archive, is refused before it is read:
  `torch.save` does not compress;
* tensors that claim more than `MAX_CLAIM` times the size of their file (by strides of zero, or by
  sharing one storage) are refused;
* values are read from the mapped file only once names, types and shapes agree with the model's.

A `.pth` can still keep the unpickler busy for a long time; safetensors cannot.
"""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError  # nosec B403  # an exception; nothing is unpickled by it
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from obc.inputs.files import MARKS
from obc.solver.errors import UserError, log

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
PREFIXES = ("module.", "_orig_mod.")  # of DataParallel, of torch.compile
MAX_CLAIM = 4  # × the size of the file, which holds tied weights once
MAX_PICKLE = 256 << 20  # bytes of names and shapes; a network of 10,000 tensors has 2 MB
VALUES_AT_ONCE = 1 << 24  # in the search for NaN


def load_checkpoint(path: str | os.PathLike[str], finite: bool = True) -> dict[str, Tensor]:
    """The state dict in a .pth, .th, .pt or .safetensors file: finite tensors on the CPU, by name.

    Wrappers and prefixes are removed. Raises UserError for anything else. The values are mapped
    from the file; with finite=False they are not read at all.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: {'is not a file' if Path(path).exists() else 'no such file'}")
    content = _read_safetensors(path) if Path(path).suffix == ".safetensors" else _read_torch(path)
    state = _unwrap(content, path)
    while prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in state)), ""):
        state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    _check_plain(state, path)
    if finite:
        check_finite(state, path)
    return state


def checkpoint_marks(path: str | os.PathLike[str]) -> dict[str, str]:
    """What `save_checkpoint` noted in a file about its origin; empty for files of others."""
    marks: Any = None
    if Path(path).suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            marks = file.metadata()
    elif zipfile.is_zipfile(path):
        content = _read_torch(path)
        marks = vars(content).get(MARKS) if isinstance(content, OrderedDict) else None
    items = marks.items() if isinstance(marks, Mapping) else ()
    return {key: value for key, value in items if isinstance(key, str) and isinstance(value, str)}


# -- reading ---------------------------------------------------------------------------------------


def _read_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{path}: cannot be read as safetensors ({reason})") from None


def _read_torch(path: str | os.PathLike[str]) -> Any:
    advice = "refuse to load it: save its state_dict() instead"
    try:
        zipped = zipfile.is_zipfile(path)  # older files are not, and cannot be mapped
        if zipped:
            _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong with the file is reported below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except UserError:
        raise
    except UnpicklingError as error:
        reason = "not a checkpoint"
        if name := re.search(r"GLOBAL (\S+)", str(error)):
            what = f"contains Python objects other than tensors ({name[1]})"
            raise UserError(f"{path}: {what}; {advice}") from None
    except PermissionError as error:
        reason = str(error.strerror)
    except Exception as error:  # from arbitrary bytes an unpickler can raise anything
        reason = "corrupt or truncated"
        if "TorchScript" in str(error):
            raise UserError(f"{path}: is a TorchScript program; {advice}") from None
    raise UserError(f"{path}: cannot be read ({reason})")


def _check_archive(path: str | os.PathLike[str]) -> None:
    """Raise a UserError for a zip archive that would grow beyond its own size when read."""
    size = os.path.getsize(path)
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.file_size > size:
            raise UserError(
                f"{path}: {member.filename} in it is compressed, or claims "
                f"{member.file_size:,} of the file's {size:,} bytes; refuse to load it"
            )
        if member.filename.endswith("data.pkl") and member.file_size > MAX_PICKLE:
            raise UserError(
                f"{path}: names alone take {member.file_size:,} bytes; refuse to load it"
            )


def _unwrap(content: Any, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors by name, from whatever dictionary a training script has put them in."""
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: contains a {type(content).__name__}, not a state dict")
    state = {k: v for k, v in content.items() if isinstance(v, Tensor) and isinstance(k, str)}
    if not state:
        raise UserError(f"{path}: no tensors in it")
    ignored = [
        key if isinstance(key, str) else f"a {type(key).__name__}"
        for key in content
        if key not in state
    ]
    if ignored:
        more = f" and {len(ignored) - 5} more" if len(ignored) > 5 else ""
        log.warning("%s: ignored, since not tensors: %s", path, ", ".join(ignored[:5]) + more)
    return state


# -- checking --------------------------------------------------------------------------------------


def _check_plain(state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Raise a UserError unless these are ordinary tensors, with no more values than were saved."""
    size, claimed = os.path.getsize(path), 0
    for key, tensor in state.items():
        if type(tensor) not in (Tensor, nn.Parameter):
            raise UserError(f"{path}: {key} is a {type(tensor).__name__}, not a plain tensor")
        oddity = None
        if tensor.is_quantized:
            oddity = f"quantised ({_short(tensor.dtype)})"
        elif tensor.is_nested or tensor.layout != torch.strided:
            oddity = "nested" if tensor.is_nested else _short(tensor.layout)
        elif tensor.device.type != "cpu":
            oddity = "without values"
        if oddity:
            raise UserError(f"{path}: {key} is {oddity}; save it as a plain tensor of numbers")
        claimed += tensor.numel() * tensor.element_size()
        if claimed > MAX_CLAIM * size:
            raise UserError(
                f"{path}: the tensors up to {key} claim {claimed:,} bytes, but the file has "
                f"{size:,}; refuse to load it"
            )


def check_finite(state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Raise a UserError that names the first tensor with a NaN or an infinity."""
    for key, tensor in state.items():
        if tensor.is_floating_point() or tensor.is_complex():
            for values in tensor.reshape(-1).split(VALUES_AT_ONCE):
                wide = values.float() if values.element_size() == 1 else values  # 8-bit floats
                if not torch.isfinite(wide).all():
                    raise UserError(f"{path}: {key} has NaN or infinite values")


def _short(dtype: torch.dtype | torch.layout) -> str:
    return str(dtype).removeprefix("torch.")


def _numbers(dtype: torch.dtype) -> str:
    """What kind of numbers a type holds."""
    if dtype.is_complex or dtype.is_floating_point:
        return "complex" if dtype.is_complex else "floating"
    return "bool" if dtype == torch.bool else "integer"


def load_state(
    model: nn.Module,
    state: Mapping[str, Tensor],
    path: str | os.PathLike[str],  # for error messages
) -> None:
    """Copy `state` into `model`, which must have exactly its names and shapes.

    Values are cast to the model's dtypes. Raises a UserError that names the first tensor that does
    not fit: by name, shape, kind of numbers (a cast would distort them), or values.
    """
    model_state = model.state_dict()
    optional = "num_batches_tracked"  # in files since PyTorch 0.4.1
    missing = [key for key in model_state if key not in state and not key.endswith(optional)]
    unexpected = [key for key in state if key not in model_state]
    texts = [
        f"{what} {keys[0]}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
        for what, keys in (("missing", missing), ("unexpected", unexpected))
        if keys
    ]
    if texts:
        raise UserError(f"{path}: does not fit the model: {'; '.join(texts)}")
    misfits = [key for key in state if state[key].shape != model_state[key].shape]
    if misfits:
        shape, should_be = (tuple(tensors[misfits[0]].shape) for tensors in (state, model_state))
        more = f", and {len(misfits) - 1} more" if len(misfits) > 1 else ""
        raise UserError(
            f"{path}: does not fit the model: {misfits[0]} is {shape}, should be {should_be}{more}"
        )
    for key, tensor in state.items():
        dtype, should_be = tensor.dtype, model_state[key].dtype
        numbers = (_numbers(dtype), _numbers(should_be))
        # Counts may be floating: a model saved in half precision has all its tensors in it.
        if numbers[0] != numbers[1] and numbers != ("floating", "integer"):
            raise UserError(
                f"{path}: {key} is {_short(dtype)}, should be {numbers[1]}; "
                f"save it as {_short(should_be)}"
            )
    check_finite(state, path)
    model.load_state_dict(model_state | dict(state))
