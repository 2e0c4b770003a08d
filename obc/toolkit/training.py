"""Training of compressed networks: one loop, one estimator, and the three corrections that train.

Rounding has a zero derivative almost everywhere. Both kinds of training pass gradients *straight
through* it (Bengio et al., arXiv 1308.3432): rounding to a grid of step Δ with codes from l to u,

    Q(x) = Δ · round(clamp(x/Δ, l, u))            ∂Q/∂x        ∂Q/∂Δ
    x/Δ below l − m                               0            l
    x/Δ between l − m and u + m                   1            round(x/Δ) − x/Δ
    x/Δ above u + m                               0            u

is differentiated as if the rounding error were a constant. Corrections keep their steps and let
gradients pass wherever rounding moves a value by half a step at most, m = ½; learned steps (the
study's fine-tuning) have m = 0, where these are the exact derivatives for a constant error.

Corrections train with Adam, on the calibration images, to reduce

    global AdaPrune    mean over conv and linear layers l of  ‖Ŷ_l − Y_l‖² / ‖Y_l‖²
    vectors, or all    mean (ẑ − z)², or the cross-entropy of ẑ

with Y_l, z the outputs and logits of the dense model, Ŷ_l, ẑ those of the compressed one on its own
inputs. Global AdaPrune is due to Hubara et al. (arXiv 2102.08124, one layer at a time) and Frantar
and Alistarh (SPDY, ICML 2022, all layers at once). Compression is preserved: the weight W of a conv
or linear layer is a function of a free latent weight V, W = Q(M ⊙ V), with M = [W ≠ 0] at the start
and Q the layer's grid, if it has one. Models are trained in eval mode: batch norms keep their
running statistics, so what is trained is what will be used, and dropout is off. V is kept outside
the model, which is written once, at the end; if training is interrupted, the model is unchanged. A
quantised weight moves only once its latent has moved by half a step: at learning rates of 1e-5,
norms and biases account for most of the improvement.

    symbol   variable    shape               meaning
    V        latent      the parameter's     what Adam moves
    M        mask        the weight's, bool  False where the weight is zero and stays zero
    Q        grid                            `weight_quant` of the layer (quant.py)
    Δ        step        (rows, 1) or ()     step of a grid
    l, u     low, high   broadcast to x      lowest and highest code
    m        margin      float               in steps
"""

from __future__ import annotations

import io
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._pytree import tree_leaves

from modelutils import eval_mode, find_layers, placed
from obc.inputs.failures import foreign_code
from obc.inputs.tasks import Batch, Inputs, Task, call, on_device
from obc.solver.errors import UserError, log
from obc.solver.layers import forward_hooks, view
from obc.solver.progress import progress
from obc.toolkit.evaluation import CLASSIFICATION
from obc.toolkit.resume import RunState
from quant import ACTIVATION_GRID, WEIGHT_GRID, Grid

SECONDS_BETWEEN_SAVES = 5.0  # at least, between two saved epochs of a correction
HALF_STEP = 0.5001  # the margin of grids that are not trained: ½, and room for rounding

Forward = Callable[[Inputs], Any]  # images -> logits, of the model that is trained
Loss = Callable[[Forward, Inputs, Batch], Tensor]  # forward, images, labels -> ()


class EpochImages(Protocol):
    """Training images: epochs of as many batches, pairs of inputs and what the loss is given."""

    def __len__(self) -> int:
        """Batches of an epoch."""

    def epoch(self, number: int) -> Iterable[tuple[Inputs, Batch]]:
        """The batches of an epoch, counted from 0; a function of `number` alone."""


@dataclass(frozen=True)
class TrainingTask:
    """What to train on and for how long, and where finished epochs are saved."""

    name: str  # in messages, and of the entry in `state`
    images: EpochImages
    device: torch.device
    epochs: int
    rate_option: str  # that sets the learning rate, for the error message
    state: RunState = field(default_factory=RunState)
    seconds_between_saves: float | None = None  # None: SECONDS_BETWEEN_SAVES


# -- the straight-through estimator ----------------------------------------------------------------


class StraightThrough(torch.autograd.Function):
    """Q(x), with the derivatives in the module docstring."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        step: Tensor,
        low: Tensor,
        high: Tensor,
        margin: float = 0.0,
        step_share: Tensor | float = 1.0,  # what ∂Q/∂Δ is multiplied by
    ) -> Tensor:  # like x
        ctx.save_for_backward(x, step, low, high)
        ctx.margin, ctx.step_share = margin, step_share
        return torch.round(x / step).clamp_(low, high).mul_(step)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, step, low, high = ctx.saved_tensors
        ratio = x / step
        inside = (ratio >= low - ctx.margin) & (ratio <= high + ctx.margin)
        by_step = None
        if ctx.needs_input_grad[1]:
            ratio = ratio.clamp(low, high)
            by_step = ratio.round()
            by_step -= ratio * inside
            by_step = (by_step * gradient).sum_to_size(step.shape) * ctx.step_share
        return gradient * inside, by_step, None, None, None, None


def round_straight_through(x: Tensor, grid: Grid) -> Tensor:
    """`grid(x)`, with gradients for x."""
    low, high = -grid.zero, grid.maxq - grid.zero
    return StraightThrough.apply(x, grid.scale, low, high, HALF_STEP)


# -- the loop --------------------------------------------------------------------------------------


def train(
    task: TrainingTask,
    loss_of: Callable[[Inputs, Batch], Tensor],  # images, labels -> ()
    optimizers: Sequence[Optimizer],
    tensors: Callable[[], Mapping[str, Tensor]],  # everything else that training changes
    *,
    schedulers: Sequence[LRScheduler] = (),  # advanced after every step
    after_step: Callable[[], None] = lambda: None,  # before the schedulers
    after_epoch: Callable[[dict[str, Any]], Mapping[str, Any]] = lambda figures: {},
) -> list[dict[str, Any]]:
    """Run all epochs that are not done yet; the figures of each epoch.

    Figures: `epoch` (from 1), `loss` (mean over its images), `learning_rate` (of its last step, in
    the first optimizer), `training_s`, and whatever `after_epoch` returns for these. Raises
    UserError where the loss is not finite.
    """
    device, steps, pause = task.device, len(task.images), task.seconds_between_saves
    history = load_training(task, tensors(), optimizers)
    steps_done, saved_at = len(history) * steps, time.monotonic()
    for scheduler in schedulers if history else ():
        scheduler.load_state_dict({"last_epoch": steps_done, "_step_count": steps_done + 1})
    bar = progress(task.name, total=task.epochs * steps, done=steps_done)
    with bar:
        for number in range(len(history), task.epochs):
            started, count = time.perf_counter(), 0
            total = torch.zeros((), dtype=torch.float64, device=device)
            for images, labels in task.images.epoch(number):
                with foreign_code():
                    loss = loss_of(placed(images, device), on_device(labels, device))
                for optimizer in optimizers:
                    optimizer.zero_grad()
                loss.backward()
                for optimizer in optimizers:
                    optimizer.step()
                after_step()
                learning_rate = optimizers[0].param_groups[0]["lr"]
                for scheduler in schedulers:
                    scheduler.step()
                total += loss.detach() * len(images)
                count += len(images)
                bar.update()
            loss = float(total) / max(count, 1)
            if not math.isfinite(loss):
                raise UserError(
                    f"{task.name}: the loss is not finite in epoch {number + 1}; "
                    f"pass a smaller {task.rate_option}"
                )
            bar.set_postfix_str(f"loss {loss:.4g}")
            figures = {"epoch": number + 1, "loss": loss, "learning_rate": learning_rate}
            figures["training_s"] = time.perf_counter() - started
            history.append(figures | dict(after_epoch(figures)))
            if time.monotonic() - saved_at >= (SECONDS_BETWEEN_SAVES if pause is None else pause):
                save_training(task, tensors(), optimizers, history)
                saved_at = time.monotonic()
    return history


# -- what an interrupted training resumes from -----------------------------------------------------


def save_training(
    task: TrainingTask,
    tensors: Mapping[str, Tensor],
    optimizers: Sequence[Optimizer],
    history: list[dict[str, Any]],
) -> None:
    """Save an epoch: tensors, optimizers, states of the random generators, figures."""
    content = {
        "tensors": dict(tensors),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "torch": torch.get_rng_state(),
        "gpus": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
    }
    file = io.BytesIO()
    torch.save(content, file)
    packed = torch.frombuffer(file.getbuffer(), dtype=torch.uint8)
    task.state.save(f"{task.name} under way", {"packed": packed}, {"history": history})


def load_training(
    task: TrainingTask, tensors: Mapping[str, Tensor], optimizers: Sequence[Optimizer]
) -> list[dict[str, Any]]:
    """Restore, in place, what `save_training` saved; the figures of the epochs that are done."""
    entry = task.state.load(f"{task.name} under way")
    if entry is None:
        return []
    file = io.BytesIO(entry.tensors["packed"].numpy())
    content = torch.load(file, map_location="cpu", weights_only=True)
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(content["tensors"][name])
    for optimizer, saved in zip(optimizers, content["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    torch.set_rng_state(content["torch"])
    if content["gpus"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(content["gpus"])
    random.setstate(content["python"])
    history = entry.figures["history"]
    log.info("resuming: %d epochs are done", len(history))
    return history


# -- parameters under the constraints of compression -----------------------------------------------


@dataclass(frozen=True)
class ConstrainedParameter:
    """A parameter as a function of its latent."""

    latent: Tensor
    mask: Tensor | None = None
    grid: Grid | None = None
    layer: nn.Module | None = None  # that it is the weight of

    def value(self) -> Tensor:
        """Q(M ⊙ V), of the parameter's shape."""
        value = self.latent if self.mask is None else self.latent * self.mask
        if self.grid is None:
            return value
        seen = view(self.layer)
        rows = round_straight_through(seen.rows_first(value).flatten(1), self.grid)
        return seen.own_form(rows.view(seen.shape))


def constrained_parameters(
    model: nn.Module, chosen: Callable[[Tensor], bool]
) -> dict[str, ConstrainedParameter]:
    """The chosen parameters by name, conv and linear weights with their masks and grids."""
    layers = {f"{name}.weight": layer for name, layer in find_layers(model).items()}
    parameters = {}
    for name, parameter in model.named_parameters():
        if chosen(parameter):
            latent = parameter.detach().clone().requires_grad_()
            mask = parameter.detach() != 0 if name in layers else None
            layer = layers.get(name)
            grid = getattr(layer, WEIGHT_GRID, None)
            parameters[name] = ConstrainedParameter(latent, mask, grid, layer)
    return parameters


@contextmanager
def latents_in_charge(model: nn.Module) -> Iterator[None]:
    """Eval mode, gradients through activation grids, none for the model's own parameters."""

    def round_input(name: str, grid: Grid, args: tuple, kwargs: dict, rounded: Tensor) -> Tensor:
        return round_straight_through(args[0], grid)

    grids = {
        name: module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == ACTIVATION_GRID
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        with eval_mode(model), forward_hooks(grids, round_input):
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_()


def _train_constrained(
    task: TrainingTask,
    model: nn.Module,
    parameters: dict[str, ConstrainedParameter],
    loss_of: Loss,
    lr: float,
) -> list[float]:  # mean loss per epoch
    """Train latents with Adam, then write the parameters into the model."""
    latents = {name: parameter.latent for name, parameter in parameters.items()}

    def loss_of_latents(images: Inputs, labels: Batch) -> Tensor:
        values = {name: parameter.value() for name, parameter in parameters.items()}

        def forward(inputs: Inputs) -> Any:
            def trained(*args: Any, **kwargs: Any) -> Any:
                return functional_call(model, values, args, kwargs)

            return call(trained, inputs.clone())

        return loss_of(forward, images, labels)

    adam = torch.optim.Adam(latents.values(), lr=lr)
    with latents_in_charge(model):
        history = train(task, loss_of_latents, [adam], lambda: latents)
    with torch.no_grad():
        for name, parameter in parameters.items():
            model.get_parameter(name).copy_(parameter.value())
    return [figures["loss"] for figures in history]


# -- the corrections -------------------------------------------------------------------------------


def global_adaprune(
    model: nn.Module, dense: nn.Module, task: TrainingTask, lr: float = 1e-5
) -> list[float]:  # mean loss per epoch
    """Train all parameters to restore the dense model's outputs of every conv and linear layer.

    Moves both models to the task's device. Raises UserError where the loss is not finite.
    """
    layers = find_layers(model.to(task.device))
    dense_layers = {name: dense.get_submodule(name) for name in layers}
    dense.to(task.device)

    def loss_of(forward: Forward, images: Inputs, labels: Batch) -> Tensor:
        targets: dict[str, list[Tensor]] = defaultdict(list)  # an output for each call
        errors: list[Tensor] = []

        def record(name: str, layer: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            targets[name].append(output.clone())  # the next module may work in place

        def compare(name: str, layer: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            target = targets[name].pop(0)
            norm = target.square().sum().clamp(min=torch.finfo(target.dtype).tiny)
            errors.append((output - target).square().sum() / norm)

        with forward_hooks(dense_layers, record):
            _outputs(dense, images)
        with forward_hooks(layers, compare):
            forward(images)
        return torch.stack(errors).mean()

    parameters = constrained_parameters(model, lambda parameter: True)
    return _train_constrained(task, model, parameters, loss_of, lr)


def train_vectors(
    model: nn.Module,
    dense: nn.Module,
    task: TrainingTask,
    lr: float = 1e-4,
    labelled: Task | None = None,  # else squared distance to the dense model's outputs
) -> list[float]:  # mean loss per epoch
    """Train the parameters that are vectors: biases and norms.

    Moves both models to the task's device. Raises UserError if the model has no such parameters or
    the loss is not finite.
    """
    parameters = constrained_parameters(model.to(task.device), lambda p: p.ndim == 1)
    if not parameters:
        raise UserError("--lintune: this model has no biases and no norms to train")
    loss_of = _loss_of(labelled) if labelled else _distance_to(dense.to(task.device))
    return _train_constrained(task, model, parameters, loss_of, lr)


def finetune(
    model: nn.Module,
    dense: nn.Module,
    task: TrainingTask,
    lr: float = 1e-5,
    labelled: Task | None = CLASSIFICATION,  # else squared distance to the dense model's outputs
) -> list[float]:  # mean loss per epoch
    """Train all parameters.

    Moves both models to the task's device. Raises UserError where the loss is not finite.
    """
    parameters = constrained_parameters(model.to(task.device), lambda parameter: True)
    loss_of = _loss_of(labelled) if labelled else _distance_to(dense.to(task.device))
    return _train_constrained(task, model, parameters, loss_of, lr)


def _loss_of(labelled: Task) -> Loss:
    return lambda forward, images, labels: labelled.loss(forward(images), labels)


def _distance_to(dense: nn.Module) -> Loss:
    def distance(forward: Forward, images: Inputs, labels: Batch) -> Tensor:
        ours, theirs = (tree_leaves(x) for x in (forward(images), _outputs(dense, images)))
        pairs = [x for x in zip(ours, theirs, strict=True) if isinstance(x[0], Tensor)]
        return sum(F.mse_loss(*pair) for pair in pairs) / len(pairs)

    return distance


def _outputs(dense: nn.Module, images: Inputs) -> Any:
    with torch.no_grad(), eval_mode(dense):
        return call(dense, images.clone())  # a model may work in place, on its images too
