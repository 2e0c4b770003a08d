"""Models by name, their weights, their layers.

    get_model("rn20", "cifar10", "rn20.pth") ─▶ nn.Module in eval mode
    find_layers(model)                       ─▶ {name: conv or linear layer}, the compressible ones

MODEL is one of

* rn18 rn34 rn50 rn101 rn152, torchvision's ResNets, or any other torchvision classification model;
* rn8 rn20 rn32 rn44 rn56 rn110, the CIFAR ResNets (`cifar_resnets.py`);
* timm:NAME, a network of timm's (`timm_models.py`);
* path/to/file.py:function, the user's own model: the function is called without arguments
  (`usercode.py`).

Files of weights are not trusted (`checkpoints.py`).
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from obc.inputs.checkpoints import fitting_weights, load_checkpoint, load_state  # noqa: F401
from obc.inputs.cifar_resnets import CifarResNet
from obc.inputs.failures import foreign_code
from obc.inputs.tasks import Arguments, Inputs, call
from obc.inputs.timm_models import TIMM, timm_model, timm_preprocessing
from obc.inputs.usercode import user_module
from obc.inputs.vision import make_importable, torchvision
from obc.solver.errors import UserError
from obc.solver.layers import compressible, forward_hooks, leave_dense
from quant import ACTIVATION_GRID, WEIGHT_GRID

TORCHVISION_ALIASES = {f"rn{depth}": f"resnet{depth}" for depth in (18, 34, 50, 101, 152)}
AUXILIARY_CLASSIFIERS = ("googlenet", "inception_v3")  # which a file may lack
CIFAR_BLOCKS = {f"rn{6 * n + 2}": n for n in (1, 3, 5, 7, 9, 18)}  # name: n, blocks per stage
Example = tuple[int, ...] | Inputs  # the shape of an image, or inputs of a task
T = TypeVar("T")
RANDOM = "random"  # in place of a file of weights
SHIPPED_WEIGHTS = {("rn8", "digits"): Path(__file__).resolve().parent / "assets/rn8_digits.pth"}


# ---------------------------------------------------------------------------- models by name


def get_model(
    name: str,
    dataset: str,
    weights: str | os.PathLike[str] | None = None,  # a file, or RANDOM
    classes: int | None = None,  # of the dataset; None: as many as the weights have
    weights_key: str | None = None,  # which weights in that file; None: those that fit
) -> nn.Module:
    """The model `name` with its weights, in eval mode, float32, on the CPU.

    Raises UserError for an unknown name, for weights that are missing or do not fit, and if the
    weights and the dataset have different numbers of classes.
    """
    if weights_key is not None and weights in (None, RANDOM):
        raise UserError("--weights-key has no effect without --weights FILE")
    if ".py:" in name:
        model = _from_file(name)
        if weights not in (None, RANDOM):
            load_state(model, _dense_weights(weights, model, weights_key), weights)
    elif name in CIFAR_BLOCKS or name.startswith(TIMM) or _torchvision_name(name) is not None:
        path = SHIPPED_WEIGHTS.get((name, dataset)) if weights is None else weights
        if path == RANDOM:
            model = _build(name, **({"num_classes": classes} if classes else {}))
        elif path is None:
            model = _pretrained(name, dataset, classes)
        else:
            model = _with_weights(name, path, dataset, classes, weights_key)
    else:
        known = [*TORCHVISION_ALIASES, *CIFAR_BLOCKS, *_torchvision_names()]
        close = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "see --help"
        if name.endswith(".py"):
            hint = f"name the function that makes it, {name}:function"
        raise UserError(f"unknown model {name}; {hint}")
    return model.float().eval()


def _torchvision_names() -> list[str]:
    return torchvision.models.list_models(module=torchvision.models)


def _torchvision_name(name: str) -> str | None:
    full = TORCHVISION_ALIASES.get(name, name)
    return full if full in _torchvision_names() else None


def _build(name: str, auxiliary: bool = False, **options: int) -> nn.Module:
    """The model `name`, not trained; GoogLeNet and Inception with auxiliary classifiers or not."""
    if name in CIFAR_BLOCKS:
        return CifarResNet(CIFAR_BLOCKS[name], classes=options.get("num_classes", 10))
    if name.startswith(TIMM):
        return timm_model(name, classes=options.get("num_classes"))
    full = _torchvision_name(name)
    if full in AUXILIARY_CLASSIFIERS:  # as torchvision's pretrained ones are
        options |= {"transform_input": True, "init_weights": False, "aux_logits": auxiliary}
    return torchvision.models.get_model(full, weights=None, **options)


def _with_weights(
    name: str, path: str | os.PathLike[str], dataset: str, classes: int | None, key: str | None
) -> nn.Module:
    """The model with the weights in the file `path` and as many classes as they have."""
    choices = (True, False) if _torchvision_name(name) in AUXILIARY_CLASSIFIERS else (False,)
    for auxiliary in choices:
        model = _build(name, auxiliary)
        try:
            state = _dense_weights(path, model, key)
            break
        except UserError:
            if auxiliary is choices[-1]:
                raise
    classifier, last = list(find_layers(model).items())[-1]
    trained_classes = len(state.get(f"{classifier}.weight", last.weight))
    check_classes(f"{path}: these weights have", trained_classes, dataset, classes)
    if trained_classes != len(last.weight):
        model = _build(name, auxiliary, num_classes=trained_classes)
    load_state(model, state, path)
    return model


def check_classes(subject: str, trained: int, dataset: str, classes: int | None) -> None:
    if classes is not None and trained != classes:
        raise UserError(
            f"{subject} {trained} classes, but {dataset} has {classes}; pass --classes FILE, the "
            "network's class names, one a line in the order of its outputs, or a network trained "
            "on this dataset"
        )


def _torchvision_weights(name: str) -> Any:
    """torchvision's weights: IMAGENET1K_V1, or else its default ones; None if it has none."""
    full = _torchvision_name(name)
    known = full and torchvision.models.get_model_weights(full)
    return getattr(known, "IMAGENET1K_V1", None) or getattr(known, "DEFAULT", None)


def _pretrained(name: str, dataset: str, classes: int | None) -> nn.Module:
    """The model with the weights that torchvision or timm has for it."""
    if name.startswith(TIMM):
        model = timm_model(name, pretrained=True)
        check_classes(f"{name}: the weights to download have", model.num_classes, dataset, classes)
        return model
    weights = _torchvision_weights(name)
    if weights is None:
        raise UserError(f"{name} on {dataset} has no weights to download; pass --weights FILE")
    trained_classes = len(weights.meta["categories"])
    check_classes(f"{name}: the weights to download have", trained_classes, dataset, classes)
    try:
        return torchvision.models.get_model(_torchvision_name(name), weights=weights)
    except (OSError, RuntimeError) as error:  # no network, no such page, another file than expected
        raise UserError(
            f"{name}: its weights cannot be downloaded ({error}); pass --weights FILE"
        ) from None


def own_preprocessing(name: str, photographs: bool, model: nn.Module) -> dict[str, Any]:
    """What a model says about the images it takes (`preprocessing.py`); {} if it says nothing.

    Sizes and crops of torchvision's and timm's weights are for photographs.
    """
    if ".py:" in name:
        told = getattr(model, "preprocessing", None) or {}
        if not isinstance(told, Mapping):
            raise UserError(f"{name}: its attribute preprocessing must be a dict; got {told!r}")
        return dict(told)
    if name.startswith(TIMM):
        told = timm_preprocessing(model)
    elif (weights := _torchvision_weights(name)) is not None:
        made = weights.transforms()
        (size,), (resize,) = made.crop_size, made.resize_size
        told = {"size": size, "resize": resize, "interpolation": made.interpolation.value}
        told |= {"mean": tuple(made.mean), "std": tuple(made.std)}
    else:
        return {}
    return told if photographs else {key: told[key] for key in ("mean", "std")}


def _from_file(name: str) -> nn.Module:
    """The user's own model."""
    return made_by(name, nn.Module)


def made_by(name: str, kind: type[T]) -> T:
    """What the function returns, for path/to/file.py:function."""
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        raise UserError(f"{name}: there is no file {path}")
    make_importable()  # torchvision, should the file import it
    try:
        with user_module(Path(path)) as module:
            build = getattr(module, function, None)
            if not callable(build):
                raise UserError(f"{path}: no function {function or '(empty name)'} in it")
            made = build()
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise UserError(f"{name}: {type(error).__name__}: {error}") from error
    if not isinstance(made, kind):
        expected = f"{'an nn.' if kind is nn.Module else 'a '}{kind.__name__}"
        raise UserError(f"{name} returned a {type(made).__name__}; it has to return {expected}")
    return made


# -------------------------------------------------------------------------------- checkpoints


def _dense_weights(
    path: str | os.PathLike[str], model: nn.Module, key: str | None
) -> dict[str, Tensor]:
    """Weights to start from. Their values are read once they are known to fit (load_state)."""
    state = fitting_weights(path, model, key, additions=(ACTIVATION_GRID, WEIGHT_GRID))
    if any(f".{grid}." in key for grid in (ACTIVATION_GRID, WEIGHT_GRID) for key in state):
        raise UserError(f"{path}: a quantised checkpoint; --weights takes dense ones")
    return state


# ----------------------------------------------------------------------- layers and evaluation


def find_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All layers that can be compressed, by name, in order of registration."""
    return {name: module for name, module in model.named_modules() if compressible(module)}


def example(
    model: nn.Module,  # on whose device it is
    like: Example,
    count: int = 1,
    noise: bool = False,  # else zeros
) -> Inputs:
    """A few images of a shape, or the inputs of a task as they are."""
    device = next(model.parameters()).device
    if isinstance(like, Inputs):
        return like.to(device, copy=True)
    if noise:
        return torch.randn(count, *like, generator=torch.Generator().manual_seed(0)).to(device)
    return torch.zeros(count, *like, device=device)


def first_and_last(
    model: nn.Module,
    image: Inputs,  # (n, 3, s, s), of any values
) -> tuple[str, ...]:
    """Names of the layers that an image reaches first and last; one name if they are the same.

    In eval mode, so that heads for training only are neither. Empty if no layer is called.
    """
    names: list[str] = []

    def see(name: str, layer: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        if output.numel():
            names.append(name)

    device = next(model.parameters()).device
    with evaluating(model), forward_hooks(find_layers(model), see):
        call(model, placed(image, device))
    return tuple(dict.fromkeys([*names[:1], *names[-1:]]))


def check_layers(model: nn.Module, name: str) -> None:
    """Raise a UserError for a layer whose weight cannot be replaced by another one.

    A layer whose weight is that of an embedding, too, is left dense.
    """
    owners: dict[int, str] = {}
    for layer, module in find_layers(model).items():
        weight = module._parameters.get("weight")
        if weight is None:  # weight norm, spectral norm and their like compute it
            raise UserError(
                f"{name}: the weight of {layer} is computed from other tensors (weight "
                "norm?); put a plain weight in its place first: see "
                "torch.nn.utils.parametrize.remove_parametrizations"
            )
        if is_lazy(weight):
            raise UserError(
                f"{name}: {layer} has no weight yet (a lazy layer); "
                "run the model on an image before it is returned"
            )
        other = owners.setdefault(id(weight), layer)
        if other != layer:
            raise UserError(
                f"{name}: {other} and {layer} share one weight, which cannot be "
                "compressed for both; use one module twice, or give each its own"
            )
    for other, module in model.named_modules():
        if not compressible(module):
            for parameter in module.parameters(recurse=False):
                if id(parameter) in owners:
                    kind = type(module).__name__
                    reason = f"its weight is also that of {other} ({kind})"
                    leave_dense(model.get_submodule(owners[id(parameter)]), reason)


def other_weights(model: nn.Module) -> dict[str, int]:
    """Sizes of the matrices and larger tensors that are in no layer to compress, largest first.

    By their names, with the kind of module that has them: "words.weight (Embedding)".
    """
    ours = {id(layer.weight) for layer in find_layers(model).values()}
    sizes = {}
    for name, parameter in model.named_parameters():
        if parameter.squeeze().ndim > 1 and id(parameter) not in ours:
            kind = type(model.get_submodule(name.rpartition(".")[0])).__name__
            sizes[f"{name} ({kind})"] = parameter.numel()
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode, with gradients; every module's own mode comes back afterwards.

    What the model's own code raises becomes a `FailedForward`, a UserError.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with foreign_code():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module's own mode comes back afterwards."""
    with eval_mode(model), torch.inference_mode():
        yield


def placed(images: Inputs, device: torch.device) -> Inputs:
    """Images on a device, in the memory layout that is fast there: a copy, to work on in place."""
    if isinstance(images, Arguments):
        return images.to(device, copy=True)
    # Channels last is 30 % faster than planes for rn20 on 2 cores (7.5 instead of 11 s).
    on_cpu = torch.device(device).type == "cpu" and images.ndim == 4
    layout = torch.channels_last if on_cpu else torch.preserve_format
    return images.to(device, memory_format=layout, copy=True)
