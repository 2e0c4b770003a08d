"""Models by name, their weights, their layers, and how well they do.

    get_model("rn20", "cifar10", "rn20.pth") ─▶ nn.Module in eval mode
    find_layers(model)                       ─▶ {name: conv or linear layer}, the compressible ones
    evaluate(model, batches, device)         ─▶ top-1 in percent

MODEL is one of

* rn18 rn34 rn50 rn101 rn152, torchvision's ResNets, or any other torchvision classification model;
* rn8 rn20 rn32 rn44 rn56 rn110, the CIFAR ResNets (`cifar_resnets.py`);
* path/to/file.py:function, a model of the user's own: called without arguments.

Weights are tensors in a file and nothing else: files are read with `weights_only=True` or as
safetensors, the wrappers that training scripts put around a state dict are taken off, and names and
shapes have to fit exactly.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from cifar_resnets import CifarResNet
from cli import UserError, log
from distributed import ALONE, World
from quant import put_layer
from tracing import folded
from vision import torchvision

TORCHVISION_ALIASES = {f"rn{depth}": f"resnet{depth}" for depth in (18, 34, 50, 101, 152)}
CIFAR_BLOCKS = {f"rn{6 * n + 2}": n for n in (1, 3, 5, 7, 9, 18)}  # name: n, blocks per stage
SHIPPED_WEIGHTS = {("rn8", "digits"): Path(__file__).resolve().parent / "assets/rn8_digits.pth"}
WRAPPERS = ("state_dict", "model_state_dict", "model")

Batches = Iterable[tuple[Tensor, Tensor]]  # images (n, 3, s, s) float32, labels (n,) int64


# ---------------------------------------------------------------------------- models by name


def get_model(
    name: str,
    dataset: str,
    weights: str | os.PathLike[str] | None = None,
    classes: int | None = None,  # of the dataset; None: whatever the weights have
) -> nn.Module:
    """The model `name` with its weights, in eval mode, float32, on the CPU.

    Raises UserError for an unknown name, for weights that are missing or do not fit, and where
    weights and dataset have different numbers of classes.
    """
    if ".py:" in name:
        model = _from_file(name)
        if weights is not None:
            load_state(model, _dense_checkpoint(weights), weights)
    elif name in CIFAR_BLOCKS or _torchvision_name(name) is not None:
        path = weights if weights is not None else SHIPPED_WEIGHTS.get((name, dataset))
        if path is not None:
            model = _with_weights(name, path, dataset, classes)
        else:
            model = _pretrained(name, dataset, classes)
    else:
        known = [*TORCHVISION_ALIASES, *CIFAR_BLOCKS, *_torchvision_names()]
        close = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "see --help"
        raise UserError(f"unknown model {name}; {hint}")
    return model.float().eval()


def _torchvision_names() -> list[str]:
    return torchvision.models.list_models(module=torchvision.models)


def _torchvision_name(name: str) -> str | None:
    full = TORCHVISION_ALIASES.get(name, name)
    return full if full in _torchvision_names() else None


def _build(name: str, state: Mapping[str, Any], **options: int) -> nn.Module:
    """The model `name` without weights; `state` tells which optional parts it has."""
    if name in CIFAR_BLOCKS:
        return CifarResNet(CIFAR_BLOCKS[name], classes=options.get("num_classes", 10))
    full = _torchvision_name(name)
    if full in ("googlenet", "inception_v3"):  # as torchvision's pretrained ones are
        auxiliary = any(key.lower().startswith("aux") for key in state)
        options |= {"transform_input": True, "init_weights": False, "aux_logits": auxiliary}
    return torchvision.models.get_model(full, weights=None, **options)


def _with_weights(
    name: str,
    path: str | os.PathLike[str],
    dataset: str,
    classes: int | None,
) -> nn.Module:
    """The model with the weights in the file `path` and as many classes as they have."""
    state = _dense_checkpoint(path)
    model = _build(name, state)
    classifier, last = list(find_layers(model).items())[-1]
    if f"{classifier}.weight" not in state:
        raise UserError(f"{path}: no {classifier}.weight in it, so these are not weights of {name}")
    found = len(state[f"{classifier}.weight"])
    _check_classes(f"{path}: these weights have", found, dataset, classes)
    if found != len(last.weight):
        model = _build(name, state, num_classes=found)
    load_state(model, state, path)
    return model


def _check_classes(what: str, found: int, dataset: str, classes: int | None) -> None:
    if classes is not None and found != classes:
        raise UserError(f"{what} {found} classes, but {dataset} has {classes}; "
                        "pass --weights FILE made for this dataset")


def _pretrained(name: str, dataset: str, classes: int | None) -> nn.Module:
    """The model with torchvision's own weights: IMAGENET1K_V1, or else its default ones."""
    full = _torchvision_name(name)
    if full is None:
        raise UserError(f"{name} on {dataset} has no weights to download; pass --weights FILE")
    known = torchvision.models.get_model_weights(full)
    weights = getattr(known, "IMAGENET1K_V1", None) or getattr(known, "DEFAULT", None)
    if weights is None:
        raise UserError(f"{name} on {dataset} has no weights to download; pass --weights FILE")
    found = len(weights.meta["categories"])
    _check_classes(f"{name}: the weights to download have", found, dataset, classes)
    try:
        return torchvision.models.get_model(full, weights=weights)
    except (OSError, RuntimeError) as error:  # no network, no such page, not what was expected
        raise UserError(f"{name}: its weights cannot be downloaded ({error}); "
                        "pass --weights FILE") from None


def _from_file(name: str) -> nn.Module:
    """path/to/file.py:function → what the function returns."""
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        raise UserError(f"{name}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"user_model_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        build = getattr(module, function, None)
        if not callable(build):
            raise UserError(f"{path}: no function {function or '(empty name)'} in it")
        model = build()
    except UserError:
        raise
    except Exception as error:  # the user's own code: anything can happen
        raise UserError(f"{name}: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"{name} returned a {type(model).__name__}; it has to return an nn.Module")
    return model


# -------------------------------------------------------------------------------- checkpoints


def _dense_checkpoint(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    state = load_checkpoint(path)
    if any(".act_quant." in key for key in state):
        raise UserError(f"{path}: a compressed checkpoint, with quantised activations; "
                        "--weights takes dense ones")
    return state


def load_checkpoint(path: str | os.PathLike[str], finite: bool = True) -> dict[str, Tensor]:
    """The state dict in a .pth, .th, .pt or .safetensors file: finite tensors on the CPU, by name.

    Wrappers and `module.` prefixes are taken off. Raises UserError for anything else. Values are
    mapped from the file; with finite=False they are not even looked at.
    """
    if not Path(path).exists():
        raise UserError(f"{path}: no such file")
    if not Path(path).is_file():
        raise UserError(f"{path}: is not a file")
    content = _read_safetensors(path) if Path(path).suffix == ".safetensors" else _read_torch(path)
    state = _unwrap(content, path)
    while all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    for key, tensor in state.items() if finite else ():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {key} has NaN or infinite values")
    return state


def _read_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({error})") from None


def _read_torch(path: str | os.PathLike[str]) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong with a file is said below
            return torch.load(path, map_location="cpu", weights_only=True,
                              mmap=zipfile.is_zipfile(path))  # older files cannot be mapped
    except UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found:
            raise UserError(f"{path}: contains Python objects other than tensors ({found[1]}); "
                            "refuse to load it: save its state_dict() instead") from None
        reason = "not a checkpoint"
    except PermissionError as error:
        reason = str(error.strerror)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        if "TorchScript" in str(error):
            raise UserError(f"{path}: is a TorchScript program; refuse to load it: "
                            "save its state_dict() instead") from None
        reason = "corrupt or truncated"
    raise UserError(f"{path}: cannot be read ({reason})")


def _unwrap(content: Any, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors by name, out of whatever dictionary a training script has put them in."""
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: contains a {type(content).__name__}, not a state dict")
    state = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if not state:
        raise UserError(f"{path}: no tensors in it")
    if len(state) < len(content):
        others = [str(key) for key in content if str(key) not in state]
        log.warning("%s: not used, since not tensors: %s", path, ", ".join(others))
    return state


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
        texts = [f"{kind} {keys[0]}" + (f" and {len(keys) - 1} more" if len(keys) > 1 else "")
                 for kind, keys in (("missing", missing), ("unexpected", unexpected)) if keys]
        raise UserError(f"{path}: does not fit the model: {'; '.join(texts)}")
    misfits = [key for key in state if state[key].shape != wanted[key].shape]
    if misfits:
        key = misfits[0]
        more = f", and {len(misfits) - 1} more" if len(misfits) > 1 else ""
        raise UserError(f"{path}: does not fit the model: {key} is {tuple(state[key].shape)}, "
                        f"should be {tuple(wanted[key].shape)}{more}")
    complete = {key: state.get(key, tensor) for key, tensor in wanted.items()}
    model.load_state_dict(complete)


# ----------------------------------------------------------------------- layers and evaluation


def find_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All convolutions and linear layers by name, in order of registration."""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, (nn.Conv2d, nn.Linear))}


def share_layers(layers: Mapping[str, nn.Module], own: Iterable[str], world: World) -> None:
    """Put in the layers that other processes have changed; `own` are those that this one has."""
    if world.size > 1:
        states = {name: layers[name].state_dict() for name in own}
        on_cpu = {name: {k: v.cpu() for k, v in state.items()} for name, state in states.items()}
        for rank, theirs in enumerate(world.gather(on_cpu)):
            for name, state in theirs.items() if rank != world.rank else ():
                put_layer(layers[name], state)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module's own mode comes back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _outputs(
    model: nn.Module,
    batches: Batches,
    device: torch.device,
    task: str,
) -> Iterator[tuple[Tensor, Tensor]]:  # logits (n, classes), labels (n,)
    model.to(device)
    # Pixels' channels side by side: 30 % faster than planes for rn20 on 2 cores (7.5 to 11 s).
    on_cpu = torch.device(device).type == "cpu"
    layout = torch.channels_last if on_cpu else torch.contiguous_format
    with evaluating(model):
        run = folded(model)
        for images, labels in tqdm(batches, desc=task, leave=False, disable=None):
            logits = run(images.to(device, memory_format=layout))
            if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
                raise UserError("the model does not return class scores of shape (images, classes)")
            if int(labels.max()) >= logits.shape[1]:
                raise UserError(f"the model tells {logits.shape[1]} classes apart, but there is "
                                f"an image of class {int(labels.max())}, counted from 0")
            yield logits, labels.to(device)


def evaluate(
    model: nn.Module,
    batches: Batches,  # of several processes, each its own
    device: torch.device,
    world: World = ALONE,
) -> float:
    """Top-1 accuracy in percent. Moves the model to `device`; changes nothing else about it."""
    correct, total = torch.zeros((), dtype=torch.int64, device=device), 0
    for logits, labels in _outputs(model, batches, device, "evaluating"):
        correct += (logits.argmax(dim=1) == labels).sum()
        total += len(labels)
    correct, total = map(sum, zip(*world.gather((int(correct), total)), strict=True))
    if not total:
        raise UserError("no images to evaluate on")
    return 100 * correct / total


def mean_loss(
    model: nn.Module,
    batches: Batches,  # of several processes, each its own: every N-th
    device: torch.device,
    world: World = ALONE,
) -> float:
    """Mean cross-entropy in nats. Moves the model to `device`; changes nothing else about it.

    Batches are added in their order, whichever process they are with.
    """
    sums = [
        (F.cross_entropy(logits.float(), labels, reduction="sum").double(), len(labels))
        for logits, labels in _outputs(model, batches, device, "loss")
    ]
    sums = world.interleave([(float(loss), count) for loss, count in sums])
    if not sums:
        raise UserError("no images to evaluate on")
    loss, total = map(sum, zip(*sums, strict=True))
    return loss / total
