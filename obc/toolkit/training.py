"""Corrections by training: after compression, on the calibration images, with zeros and grids kept.

Global AdaPrune is due to Hubara et al. (arXiv 2102.08124, a layer at a time) and Frantar & Alistarh
(SPDY, ICML 2022, all layers at once). Parameters are trained with Adam to reduce

    global AdaPrune    mean over conv and linear layers l of  ‖Ŷ_l − Y_l‖² / ‖Y_l‖²
    vectors, or all    mean (ẑ − z)², or cross-entropy of ẑ

with Y_l, z outputs and logits of the dense model, Ŷ_l, ẑ those of the compressed one on its own
inputs. What compression has won is kept: the weight W of a conv or linear layer is a function of
a free latent weight V, W = Q(M ⊙ V), with M = [W ≠ 0] at the start and Q the layer's grid, if any.
A rounding's gradient is zero almost everywhere; it is taken to be 1 within the grid's range and 0
beyond ("straight through", Bengio et al., arXiv 1308.3432), for weights and activations alike.
Training is done in eval mode: batch norms keep their running statistics, so what is trained is
what will be used, and dropout is off. V lives outside of the model, which is written once, at the
end; whatever interrupts the training leaves the model as it was. A quantised weight moves once its
latent has gone half a step: at rates of 1e-5, norms and biases do most of what can be done there.

    symbol   variable   shape               meaning
    V        latent     the parameter's     what Adam moves
    M        mask       the weight's, bool  False: zero, and stays so
    Q        grid                           `weight_quant` of the layer (quant.py)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from modelutils import eval_mode, find_layers, placed
from obc.solver.errors import UserError, log
from obc.solver.layers import forward_hooks
from obc.toolkit.resume import RunState
from quant import ACTIVATION_GRID, WEIGHT_GRID, Grid

SECONDS_BETWEEN_EPOCHS = 5.0  # at least, that are kept
LATENT, AVERAGES = "latent", ("step", "exp_avg", "exp_avg_sq")  # the latter as Adam names them

Forward = Callable[[Tensor], Tensor]  # images -> logits, of the model that is trained
Loss = Callable[[Forward, Tensor, Tensor], Tensor]  # forward, images, labels -> ()


class Batches(Protocol):
    """Pairs of images (n, 3, s, s) and labels (n,), iterated once an epoch, shuffled or not."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...
    def __len__(self) -> int: ...


# -- constraints -----------------------------------------------------------------------------------


class _StraightThrough(torch.autograd.Function):
    """`rounded` forwards; backwards x's gradient, where x was not clamped."""

    @staticmethod
    def forward(ctx, x: Tensor, rounded: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward((x - rounded).abs() <= 0.5001 * scale)
        return rounded.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None


@dataclass(frozen=True)
class _Trainable:
    """A parameter as a function of its latent."""

    latent: Tensor
    mask: Tensor | None = None
    grid: Grid | None = None

    def value(self) -> Tensor:
        if self.mask is None:
            return self.latent
        value = self.latent * self.mask
        if self.grid is not None:
            rows = value.flatten(1)
            rounded = self.grid(rows.detach())
            value = _StraightThrough.apply(rows, rounded, self.grid.scale).view_as(value)
        return value


def _trainables(model: nn.Module, chosen: Callable[[Tensor], bool]) -> dict[str, _Trainable]:
    """The chosen parameters by name, with the constraints of conv and linear weights."""
    layers = {f"{name}.weight": layer for name, layer in find_layers(model).items()}
    trainables = {}
    for name, parameter in model.named_parameters():
        if chosen(parameter):
            latent = parameter.detach().clone().requires_grad_()
            if name in layers:
                grid = getattr(layers[name], WEIGHT_GRID, None)
                trainables[name] = _Trainable(latent, parameter.detach() != 0, grid)
            else:
                trainables[name] = _Trainable(latent)
    return trainables


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients for the model's own parameters: the latents stand in for them."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_()


@contextmanager
def _rounding_with_gradient(model: nn.Module) -> Iterator[None]:
    """Activation grids let gradients through; their results stay the same."""

    def pass_gradient(name: str, grid: Grid, args: tuple, kwargs: dict, rounded: Tensor) -> Tensor:
        return _StraightThrough.apply(args[0], rounded.detach(), grid.scale)

    grids = {
        name: module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == ACTIVATION_GRID
    }
    with forward_hooks(grids, pass_gradient):
        yield


# -- what an interrupted training goes on from -----------------------------------------------------


class _Course:
    """A training after so many epochs: latents, Adam's averages, losses; kept in a state."""

    def __init__(
        self, state: RunState, task: str, trainables: dict[str, _Trainable], adam: torch.optim.Adam
    ) -> None:
        self.state, self.key = state, f"{task} under way"
        self.latents, self.adam = {x: item.latent for x, item in trainables.items()}, adam
        self.saved = time.monotonic()

    def resume(self, batches: Batches) -> list[float]:
        """Take over what is kept, and leave out the epochs it is from; their losses."""
        entry = self.state.load(self.key)
        if entry is None:
            return []
        for name, latent in self.latents.items():
            latent.data.copy_(entry.tensors[f"{name} {LATENT}"])
            kept = {key: entry.tensors.get(f"{name} {key}") for key in AVERAGES}
            if any(tensor is None for tensor in kept.values()):
                continue  # it had no gradient
            self.adam.state[latent] = {  # Adam counts its steps on the CPU
                key: tensor.to(latent.device) if tensor.ndim else tensor
                for key, tensor in kept.items()
            }
        losses = entry.figures["losses"]
        for _ in losses:
            iter(batches)  # an epoch that is over
        log.info("resuming: %d epochs are done", len(losses))
        return losses

    def save(self, losses: list[float]) -> None:
        """Keep an epoch, if the last one that was kept is some seconds ago."""
        if time.monotonic() - self.saved < SECONDS_BETWEEN_EPOCHS:
            return
        tensors = {}
        for name, latent in self.latents.items():
            parts = {LATENT: latent, **self.adam.state[latent]}
            tensors |= {f"{name} {key}": parts[key] for key in (LATENT, *AVERAGES) if key in parts}
        self.state.save(self.key, tensors, {"losses": losses})
        self.saved = time.monotonic()


# -- the loop ------------------------------------------------------------------------------------


def _train(
    model: nn.Module,
    batches: Batches,
    device: torch.device,
    loss_of: Loss,
    trainables: dict[str, _Trainable],
    *,
    epochs: int,
    lr: float,
    task: str,
    state: RunState | None = None,
) -> list[float]:
    """Adam on the latents; then the parameters are written. Returns the mean loss per epoch."""
    adam = torch.optim.Adam([item.latent for item in trainables.values()], lr=lr)
    progress = tqdm(total=epochs * len(batches), desc=task, leave=False, disable=None)
    course = _Course(state or RunState(), task, trainables, adam)
    losses = course.resume(batches)
    progress.update(len(losses) * len(batches))
    with progress, eval_mode(model), _frozen(model), _rounding_with_gradient(model):
        for _ in range(len(losses), epochs):
            total, count = torch.zeros((), dtype=torch.float64, device=device), 0
            for images, labels in batches:
                values = {name: item.value() for name, item in trainables.items()}
                images, labels = placed(images, device), labels.to(device)
                loss = loss_of(lambda x, v=values: functional_call(model, v, x), images, labels)
                adam.zero_grad()
                loss.backward()
                adam.step()
                total += loss.detach() * len(images)
                count += len(images)
                progress.update()
            losses.append(float(total) / max(count, 1))
            progress.set_postfix_str(f"loss {losses[-1]:.4g}")
            if not math.isfinite(losses[-1]):
                raise UserError(f"{task}: the loss is not finite; pass a smaller --{task}-lr")
            course.save(losses)
    with torch.no_grad():
        for name, item in trainables.items():
            model.get_parameter(name).copy_(item.value())
    return losses


# -- the corrections -------------------------------------------------------------------------------


def global_adaprune(
    model: nn.Module,
    dense: nn.Module,
    batches: Batches,
    device: torch.device,
    epochs: int = 100,
    lr: float = 1e-5,
    state: RunState | None = None,  # of an interrupted training
) -> list[float]:  # mean loss per epoch
    """Train all parameters so that every conv and linear output is the dense model's again.

    Moves both models to `device`. Raises UserError where the loss is not finite.
    """
    layers, dense_layers = find_layers(model), find_layers(dense.to(device))

    def loss_of(forward: Forward, images: Tensor, labels: Tensor) -> Tensor:
        outputs: dict[str, list[Tensor]] = {name: [] for name in layers}  # a layer's calls
        errors: list[Tensor] = []

        def keep(name: str, layer: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            outputs[name].append(output.clone())  # the next module may work in place

        def compare(name: str, layer: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            errors.append(_relative_error(output, outputs[name].pop(0)))

        with forward_hooks(dense_layers, keep):
            _logits(dense, images)
        with forward_hooks(layers, compare):
            forward(images)
        return torch.stack(errors).mean()

    trainables = _trainables(model.to(device), lambda parameter: True)
    return _train(
        model, batches, device, loss_of, trainables, epochs=epochs, lr=lr, task="gap", state=state
    )


def train_vectors(
    model: nn.Module,
    dense: nn.Module,
    batches: Batches,
    device: torch.device,
    epochs: int = 100,
    lr: float = 1e-4,
    cross_entropy: bool = False,  # else squared distance to the dense model's logits
    state: RunState | None = None,  # of an interrupted training
) -> list[float]:  # mean loss per epoch
    """Train the parameters that are vectors: biases and norms.

    Moves both models to `device`. Raises UserError if there are none, or the loss is not finite.
    """
    trainables = _trainables(model.to(device), lambda parameter: parameter.ndim == 1)
    if not trainables:
        raise UserError("--lintune: this model has no biases and no norms to train")
    loss_of = _cross_entropy if cross_entropy else _distance_to(dense.to(device))
    return _train(
        model,
        batches,
        device,
        loss_of,
        trainables,
        epochs=epochs,
        lr=lr,
        task="lintune",
        state=state,
    )


def finetune(
    model: nn.Module,
    dense: nn.Module,
    batches: Batches,
    device: torch.device,
    epochs: int = 2,
    lr: float = 1e-5,
    cross_entropy: bool = True,  # else squared distance to the dense model's logits
    state: RunState | None = None,  # of an interrupted training
) -> list[float]:  # mean loss per epoch
    """Train all parameters.

    Moves both models to `device`. Raises UserError where the loss is not finite.
    """
    trainables = _trainables(model.to(device), lambda parameter: True)
    loss_of = _cross_entropy if cross_entropy else _distance_to(dense.to(device))
    return _train(
        model,
        batches,
        device,
        loss_of,
        trainables,
        epochs=epochs,
        lr=lr,
        task="finetune",
        state=state,
    )


def _cross_entropy(forward: Forward, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(forward(images), labels)


def _distance_to(dense: nn.Module) -> Loss:
    def loss_of(forward: Forward, images: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(forward(images), _logits(dense, images))

    return loss_of


def _logits(dense: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad(), eval_mode(dense):
        return dense(images)


def _relative_error(output: Tensor, wanted: Tensor) -> Tensor:
    tiny = torch.finfo(wanted.dtype).tiny
    return (output - wanted).square().sum() / wanted.square().sum().clamp(min=tiny)
