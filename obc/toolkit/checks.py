"""Before hours are spent: can a network be compressed and run, and what to do if it cannot."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from datautils import ImageData
from modelutils import Example, check_classes, check_layers, evaluating, example, find_layers
from obc.inputs.failures import FailedForward, accepted_input
from obc.inputs.preprocessing import PILLOW_MODES
from obc.inputs.tasks import Inputs, Task, call, on_device
from obc.inputs.tracing import equal_but_for_rounding
from obc.solver.errors import UserError, log

RARELY = 20  # calls until something random that rarely happens is seen


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Afterwards, all global generators are as before, whatever a model of the user's own draws."""
    before = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])  # noqa: NPY002


def check_model(model: nn.Module, name: str, data: ImageData) -> None:
    """Raise a UserError, before hours are spent, unless the model can be compressed and run."""
    classes = len(data.classes)
    check_network(model, name)
    device = next(model.parameters()).device
    images = torch.zeros(2, *data.preprocessing.image_shape, device=device)
    outputs = first_outputs(model, name, images)
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != len(images):
        raise UserError(f"{name} does not return class scores of shape (images, classes)")
    check_classes(f"{name} has", outputs.shape[1], data.name, classes)
    warn_if_random(model, name, images)


def check_task(model: nn.Module, name: str, task: Task) -> None:
    """The same for a model of another task."""
    check_network(model, name)
    inputs, batch = next(iter(task.batches()))
    device = next(model.parameters()).device
    inputs = inputs.to(device, copy=True)
    outputs = first_outputs(model, name, inputs)
    if task.has_loss:
        loss = task.summed_loss(outputs, on_device(batch, device), len(inputs))
        if not torch.isfinite(loss):
            raise UserError(f"{name}: the loss of the dense model is not finite on the first batch")
    warn_if_random(model, name, inputs)


def check_network(model: nn.Module, name: str) -> None:
    """Raise a UserError for a model without layers to compress, or with weights that are no use."""
    if not find_layers(model):
        raise UserError(f"{name} has no convolution or linear layer to compress")
    check_layers(model, name)
    for key, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{name}: {key} has NaN or infinite values")


def first_outputs(model: nn.Module, name: str, images: Inputs) -> object:
    """What a model returns; a UserError says what to do if it does not take the images."""
    try:
        with evaluating(model):
            return call(model, images)
    except FailedForward as error:
        hint = advice(model, images, str(error)) if isinstance(images, Tensor) else ""
        raise UserError(f"{name}: {error}{hint}") from None


def first_outputs_of(model: nn.Module, like: Example) -> object:
    """What a model returns for two images of noise, or for the inputs of a task."""
    inputs = example(model, like, 2, noise=True)
    with undisturbed(inputs.device), evaluating(model):
        return call(model, inputs)


def advice(
    model: nn.Module,
    images: Tensor,  # (n, c, s, s) that it fails on
    reason: str,
) -> str:
    """What to do about a model that fails, if other images would do: to follow the reason."""
    with evaluating(model):
        accepted = accepted_input(model, size := images.shape[-1], reason, images.shape[1])
    if accepted is None:
        return ""
    channels, other_size = accepted
    texts = []
    if channels != (present := images.shape[1]):
        what = f"it takes {channels} channel{'s' if channels > 1 else ''}, images have {present}"
        values = "one value each" if channels == 1 else f"{channels} values each"
        how = f"pass --mean and --std with {values} (or set its attribute preprocessing), or "
        how = how if channels in PILLOW_MODES else ""
        texts.append(f"{what}: {how}let its forward convert them")
    if other_size != size:
        texts.append(f"it takes {other_size}×{other_size} pixels: pass --image-size {other_size}")
    return f"; {'; '.join(texts)}"


def warn_if_random(model: nn.Module, name: str, images: Inputs) -> None:
    """Log a line if the outputs for the same images are not always the same."""
    noise = images
    if isinstance(images, Tensor) and images.is_floating_point():
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(images.shape, generator=generator).to(images.device)
    states = torch.get_rng_state(), random.getstate()
    with evaluating(model):
        first = call(model, noise.clone())
        draws = not torch.equal(states[0], torch.get_rng_state()) or states[1] != random.getstate()
        equal = torch.equal if draws and isinstance(first, Tensor) else equal_but_for_rounding
        for _ in range(RARELY if draws else 1):
            if not equal(call(model, noise.clone()), first):
                log.warning(
                    "%s: its outputs differ between two calls on the same images (dropout in eval "
                    "mode?), so results cannot be repeated",
                    name,
                )
                return
