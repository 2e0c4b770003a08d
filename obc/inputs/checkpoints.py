"""Weights from untrusted files: tensors by name, or an error of one line that says what is wrong.

    fitting_weights(path, model) ─▶ {name: tensor}  from a file that anyone may have made
    load_state(model, state, path)                  into a model with exactly these names and shapes
    load_checkpoint(path) ─▶ {key: tensor}          by the names in the file, without a model

`.pth` is read with `weights_only=True`, so that nothing in it runs, and `.safetensors` has nothing
to run. What surrounds the names in a file is removed as far as the model requires (`names.py`); old
names are left to the model's own conversion, which PyTorch runs while it loads. Of several state
dicts that fit, averaged weights (`ema`, `model_ema`, …) are taken, as timm does: they are meant for
evaluation. A file cannot make us allocate much more than its own size:

* an archive whose members are compressed, or larger than the archive, is refused before it is read:
  `torch.save` does not compress;
* tensors that claim more than `MAX_CLAIM` times the size of their file (by strides of zero, or by
  sharing one storage) are refused;
* values are read from the mapped file only once names, types and shapes agree with the model's.

A `.pth` can still keep the unpickler busy for a long time; safetensors cannot.
"""

from __future__ import annotations

import copy
import os
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path
from pickle import UnpicklingError  # nosec B403  # an exception; nothing is unpickled by it
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from obc.inputs.files import MARKS
from obc.inputs.names import UNCOUNTED, WRAPPERS, Reading, StateDict, readings
from obc.solver.errors import UserError, log

MAX_CLAIM = 4  # × the size of the file, which holds tied weights once
MAX_PICKLE = 256 << 20  # bytes of names and shapes; a network of 10,000 tensors has 2 MB
MAX_DICTS = 1000  # in one file
MAX_CONVERSIONS = 4  # places that the model's own conversion of names is tried on
VALUES_AT_ONCE = 1 << 24  # in the search for NaN


def load_checkpoint(path: str | os.PathLike[str], finite: bool = True) -> dict[str, Tensor]:
    """The state dict in a .pth, .th, .pt or .safetensors file: finite tensors on the CPU, by name.

    Wrappers are removed; names stay as they are. Raises UserError for anything else. The values are
    mapped from the file; with finite=False they are not read at all.
    """
    content = _read(path)
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    content = _state_dict(content, path)
    if not content.tensors:
        raise UserError(f"{path}: no tensors in it")
    _log_ignored(content.ignored, path)
    _check_plain(content.tensors, path)
    if finite:
        check_finite(content.tensors, path)
    return dict(content.tensors)


def fitting_weights(
    path: str | os.PathLike[str],
    model: nn.Module,
    key: str | None = None,  # the place in the file; None: the preferred one of those that fit
    additions: Collection[str] = (),  # modules that a layer may have in the file only
) -> dict[str, Tensor]:
    """The tensors in a file that fit the model, by the model's names; their values are not read.

    Logs what was taken if this was not plain. Raises UserError if no names fit; `load_state`
    compares shapes.
    """
    names = _tensors_by_name(model)
    found = readings(_state_dicts(_read(path), path), names, additions)
    fits = [reading for reading in found if reading.fits]
    places = [reading.place for reading in fits or found if reading.place]
    if key is not None:
        found = [reading for reading in found if reading.is_at(key)]
        if not found:
            there = f"it has {', '.join(places[:8])}" if places else "it is a plain state dict"
            raise UserError(f"{path}: no weights at {key} (--weights-key): {there}")
    fits = [reading for reading in found if reading.fits]
    if fits:
        best = min(fits, key=lambda reading: _misfits(reading, names))
        masks = {f"{name}_mask": mask for name, mask in best.masks.items()}
        _check_plain(best.tensors | masks, path)
    else:
        found.sort(key=lambda reading: len(reading.missing) + len(reading.unexpected))
        best = _convertible(found[:MAX_CONVERSIONS], model, path)
    _log_choice(best, [x.place for x in fits if x is not best], path, chosen=key is not None)
    return _masked(best, path)


def _convertible(found: list[Reading], model: nn.Module, path: str | os.PathLike[str]) -> Reading:
    """The first reading with names that the model converts to its own."""
    for reading in found:
        masks = {f"{name}_mask": mask for name, mask in reading.masks.items()}
        _check_plain(reading.tensors | masks, path)
        if _conversion(model, reading.tensors, reading.versions)[0]:
            return reading
    raise UserError(_differences(found[0], path))


def _misfits(reading: Reading, ours: Mapping[str, Tensor]) -> int:
    """How many tensors have other shapes than the model's."""
    return sum(
        not _same_shape(x, ours[name]) for name, x in reading.tensors.items() if name in ours
    )


def _differences(reading: Reading, path: str | os.PathLike[str]) -> str:
    """In which names a file and a model differ."""
    texts = [
        f"{what} {keys[0]}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
        for what, keys in (("missing", reading.missing), ("unexpected", reading.unexpected))
        if keys
    ]
    place = f" at {reading.place}" if reading.place else ""
    return f"{path}: does not fit the model{place}: {'; '.join(texts)}"


def _log_choice(
    reading: Reading, others: list[str], path: str | os.PathLike[str], chosen: bool
) -> None:
    """Log in one line which weights are taken, unless these are all there are, as usual."""
    _log_ignored(reading.ignored if not reading.place else (), path)
    notes = []
    if not chosen and (others or reading.averaged or not reading.usual):
        place = f"at {reading.place}" if reading.place else "outside of all dictionaries"
        others = [f"at {other}" if other else "outside" for other in others]
        averaged = " (averaged, as for evaluation)" if reading.averaged else ""
        rejected = f", not those {', '.join(others[:5])}: --weights-key chooses" if others else ""
        notes.append(f"took the weights {place}{averaged}{rejected}")
    if reading.left_out:
        notes.append(f"left out {_some(reading.left_out)}")
    if reading.masks:
        notes.append(f"applied the masks of {_some(list(reading.masks))}")
    if not reading.fits:
        notes.append("the model converted old names")
    if notes:
        log.info("%s: %s", path, "; ".join(notes))


def _some(names: list[str]) -> str:
    """The first name, and how many more there are."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _masked(reading: Reading, path: str | os.PathLike[str]) -> OrderedDict[str, Tensor]:
    """The tensors, those that are pruned multiplied by their masks, with versions of modules."""
    tensors = OrderedDict(reading.tensors)
    for name, mask in reading.masks.items():
        if mask.shape != tensors[name].shape:
            raise UserError(
                f"{path}: {name}_mask is {tuple(mask.shape)}, another shape than {name}"
            )
        tensors[name] = tensors[name] * mask.to(tensors[name].dtype)
    tensors._metadata = reading.versions  # where PyTorch looks for them
    return tensors


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


def _read(path: str | os.PathLike[str]) -> Any:
    """Whatever is in the file."""
    if not Path(path).is_file():
        raise UserError(f"{path}: {'is not a file' if Path(path).exists() else 'no such file'}")
    return _read_safetensors(path) if Path(path).suffix == ".safetensors" else _read_torch(path)


def _state_dicts(content: Any, path: str | os.PathLike[str]) -> dict[str, StateDict]:
    """All dictionaries of tensors in a file, by the keys that lead to them, outermost first."""
    state_dicts, seen, unread = {}, set(), [("", content)]
    for where, mapping in unread:  # which grows
        if id(mapping) in seen or len(seen) == MAX_DICTS:
            continue
        seen.add(id(mapping))
        found = _state_dict(mapping, path)
        if found.tensors:
            state_dicts.setdefault(where, found)
        unread += [
            (f"{where}.{key}" if where else key, value)
            for key, value in mapping.items()
            if isinstance(key, str) and isinstance(value, Mapping)
        ]
    if not state_dicts:
        raise UserError(f"{path}: no tensors in it")
    return state_dicts


def _state_dict(content: Any, path: str | os.PathLike[str]) -> StateDict:
    """The tensors in one dictionary."""
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: contains a {type(content).__name__}, not a state dict")
    tensors = {k: v for k, v in content.items() if isinstance(v, Tensor) and isinstance(k, str)}
    ignored = [x if isinstance(x, str) else f"a {type(x).__name__}" for x in content]
    versions = getattr(content, "_metadata", None)
    versions = versions if isinstance(versions, dict) else {}
    return StateDict(
        tensors,
        [key for key in ignored if key not in tensors],
        {
            module: {"version": version["version"]}
            for module, version in versions.items()
            if isinstance(module, str)
            and isinstance(version, dict)
            and isinstance(version.get("version"), int)
        },
    )


def _log_ignored(ignored: Collection[str], path: str | os.PathLike[str]) -> None:
    if ignored:
        more = f" and {len(ignored) - 5} more" if len(ignored) > 5 else ""
        names = ", ".join(list(ignored)[:5]) + more
        log.warning("%s: ignored, since not tensors: %s", path, names)


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


# -- loading ---------------------------------------------------------------------------------------


def _tensors_by_name(model: nn.Module) -> dict[str, Tensor]:
    return {name: x for name, x in model.state_dict().items() if isinstance(x, Tensor)}


def _same_shape(tensor: Tensor, ours: Tensor) -> bool:
    return is_lazy(ours) or (not tensor.is_nested and tensor.shape == ours.shape)


def _with_versions(
    state: Mapping[str, Tensor], versions: Mapping[str, dict[str, Any]]
) -> OrderedDict[str, Tensor]:
    """A state dict to load; a copy, since loading notes things in it."""
    state = OrderedDict(state)
    state._metadata = {module: dict(version) for module, version in versions.items()}
    return state


def _conversion(
    model: nn.Module, state: Mapping[str, Tensor], versions: Mapping[str, dict[str, Any]]
) -> tuple[bool, dict[str, Tensor] | None]:
    """What the model's own conversion of old names makes of a state dict.

    Whether it has the model's names then; and the tensors by these names, if shapes fit, too.
    """
    wrong = [["not loaded"]]

    def see(module: nn.Module, keys: Any) -> None:  # before an error because of shapes
        missing = [name for name in keys.missing_keys if not name.endswith(UNCOUNTED)]
        wrong[:] = [missing + list(keys.unexpected_keys)]

    try:  # what runs is the model's own code, which may raise anything
        trial = copy.deepcopy(model)
        trial.register_load_state_dict_post_hook(see)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial.load_state_dict(_with_versions(state, versions), strict=False, assign=True)
    except Exception:
        return not wrong[0], None
    return not wrong[0], None if wrong[0] else _tensors_by_name(trial)


def load_state(
    model: nn.Module,
    state: Mapping[str, Tensor],
    path: str | os.PathLike[str],  # for error messages
) -> None:
    """Copy `state` into `model`, which must have exactly its names and shapes.

    Names and shapes may be old ones that the model converts by itself. Values are cast to the
    model's dtypes. Raises a UserError that names the first tensor that does not fit: by name,
    shape, kind of numbers (a cast would distort them), or values.
    """
    ours, versions = _tensors_by_name(model), getattr(state, "_metadata", {})
    missing = [key for key in ours if key not in state and not key.endswith(UNCOUNTED)]
    unexpected = [key for key in state if key not in ours]
    wrong = missing or unexpected
    misfits = [key for key in state if key in ours and not _same_shape(state[key], ours[key])]
    final = _conversion(model, state, versions)[1] if wrong or misfits else state
    if final is None and wrong:
        reading = Reading("", dict(state), {}, {}, missing, unexpected, [], ())
        raise UserError(_differences(reading, path))
    if final is None:
        shape, should_be = (tuple(tensors[misfits[0]].shape) for tensors in (state, ours))
        more = f", and {len(misfits) - 1} more" if len(misfits) > 1 else ""
        raise UserError(
            f"{path}: does not fit the model: {misfits[0]} is {shape}, should be {should_be}{more}"
        )
    for key, tensor in final.items():
        dtype, should_be = tensor.dtype, ours[key].dtype if key in ours else tensor.dtype
        numbers = (_numbers(dtype), _numbers(should_be))
        # Counts may be floating: a model saved in half precision has all its tensors in it.
        if numbers[0] != numbers[1] and numbers != ("floating", "integer"):
            raise UserError(
                f"{path}: {key} is {_short(dtype)}, should be {numbers[1]}; "
                f"save it as {_short(should_be)}"
            )
    check_finite(final, path)
    for assumed in (versions, getattr(model.state_dict(), "_metadata", {})):
        try:  # a module may refuse a file that has no versions
            model.load_state_dict(_with_versions(state, assumed), strict=False)
            return
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
    raise UserError(f"{path}: the model cannot load it: {reason}")
