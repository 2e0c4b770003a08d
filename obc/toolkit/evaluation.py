"""How good a model is on test data, and how close to the dense one.

    top-1        percent of the images whose largest score is their label's
    KL           mean of Σ_c p_c (log p_c − log q_c) in nats, p: the dense model's classes, q: its
    agreement    percent of the images that both models give the same class

Tasks of the user's own have figures of their own in place of top-1 (`obc/inputs/tasks.py`); KL and
agreement then need outputs that are scores of classes. Of several processes each sees its share of
the images. Models run as graphs with their norms folded where that changes nothing but rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelutils import evaluating, placed
from obc.inputs.batches import Batches
from obc.inputs.tasks import Inputs, Task, on_device, task_code
from obc.inputs.tracing import TracedModel, UntracedModel, resumable
from obc.solver.distributed import ALONE, World
from obc.solver.errors import UserError
from obc.solver.layers import forward_hooks
from obc.solver.progress import progress
from quant import ACTIVATION_GRID


@contextmanager
def _running(model: nn.Module, device: torch.device) -> Iterator[Callable[[Inputs], Any]]:
    """Inside, a function from inputs on the device to outputs, as fast as the model allows."""
    model.to(device)
    run: TracedModel | UntracedModel | None = None

    def outputs_of(images: Inputs) -> Any:
        nonlocal run
        run = run or _fastest(model, images)
        run.begin(images)
        return run.finish()

    with evaluating(model):
        yield outputs_of


def _fastest(model: nn.Module, images: Inputs) -> TracedModel | UntracedModel:
    """The model with its norms folded, unless it rounds activations: folding would move codes."""
    rounds = any(name.endswith(f".{ACTIVATION_GRID}") for name, _ in model.named_modules())
    return UntracedModel(model) if rounds else resumable(model, images)


class Classification(Task):
    """Images and their labels: scores of classes, cross-entropy. (`imagetask.py` has the images.)

    A batch is a pair. Of pairs that come apart, the labels (n,) are what losses are given.
    """

    name, logits = "classification", True

    def inputs(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return batch[0]

    def loss(self, outputs: Tensor, batch: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(outputs, batch if isinstance(batch, Tensor) else batch[1])

    def summed_loss(self, outputs: Tensor, batch: Tensor, count: int) -> Tensor:
        return F.cross_entropy(outputs, batch, reduction="sum").double()

    def check(self, logits: object, images: Inputs, labels: Tensor) -> None:
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
            raise UserError("the model does not return class scores of shape (images, classes)")
        if int(labels.max()) >= logits.shape[1]:
            raise UserError(
                f"the model has {logits.shape[1]} classes, but there is an image of "
                f"class {int(labels.max())} (counted from 0)"
            )


CLASSIFICATION = Classification()


@dataclass(frozen=True)
class Evaluation:
    """How good a model is and, if its scores were compared, how close to the dense model.

    Top-1 of 10,000 images is known to ±0.3; KL shows much smaller differences between models.
    """

    top1: float | None  # percent; None: the task has figures of its own
    kl: float | None = None  # mean over the images of KL(dense ‖ model), in nats
    agreement: float | None = None  # percent of images that both give the same class
    figures: Mapping[str, float] = field(default_factory=dict)  # of a task, the first one first

    @classmethod
    def of(cls, figures: Sequence[BatchFigures]) -> Evaluation:
        """From those of all batches."""
        images, right = (sum(getattr(one, name) for one in figures) for name in ("images", "right"))
        if any(one.kl is None for one in figures):
            return cls(100 * right / images)
        kl, agreeing = sum(one.kl for one in figures), sum(one.agreeing for one in figures)
        return cls(100 * right / images, kl / images, 100 * agreeing / images)

    @property
    def line(self) -> str:
        """The figure that matters most."""
        if self.top1 is not None:
            return f"top-1 {self.top1:.2f}"
        name, value = next(iter(self.figures.items()))
        return f"{name} {value:.4f}"

    @property
    def closeness(self) -> str:
        """How close the model is to the dense one; empty if that was not measured."""
        return "" if self.kl is None else f"KL {self.kl:.3g}  agreement {self.agreement:.2f}"

    def __str__(self) -> str:
        others = [f"{name} {value:.4f}" for name, value in list(self.figures.items())[1:]]
        return "\n".join(filter(None, (self.closeness, *others, self.line)))

    def record(self) -> dict[str, Any]:
        """As it is in a record."""
        figures = {"figures": dict(self.figures)} if self.figures else {"top1": self.top1}
        if self.kl is None and self.figures:
            return figures
        return figures | {"kl": self.kl, "agreement": self.agreement}


class BatchFigures(NamedTuple):
    """What a batch adds to an `Evaluation`."""

    images: int
    right: int
    agreeing: int | None  # None, as the next: not compared
    kl: float | None  # summed over the images

    @classmethod
    def of(
        cls,
        logits: Tensor,  # (n, classes)
        labels: Tensor,  # (n,)
        dense: Tensor | None,  # (n, classes) logits of the model to compare with
    ) -> BatchFigures:
        chosen = logits.argmax(dim=1)
        right = int((chosen == labels).sum())
        if dense is None:
            return cls(len(labels), right, None, None)
        logs = [scores.double().log_softmax(dim=1) for scores in (logits, dense)]
        kl = float(F.kl_div(*logs, log_target=True, reduction="sum").clamp(min=0))
        return cls(len(labels), right, int((chosen == dense.argmax(dim=1)).sum()), kl)


@dataclass
class DenseScores:
    """The dense model, and its logits for batches of images once they are known."""

    model: nn.Module
    batches: list[Tensor] = field(default_factory=list)  # (n, classes) each, on the CPU


def evaluate(
    model: nn.Module,
    batches: Batches,  # this process's share: every N-th
    device: torch.device,
    dense: DenseScores | None = None,  # always with the same batches
    world: World = ALONE,
) -> Evaluation:
    """Top-1, KL and agreement. Moves the model to `device` and changes nothing else in it.

    The first time the dense model sees the batches, too, so that images are decoded once.
    ImageBatches are summed in their own order, whichever process has them.
    """
    figures: list[BatchFigures] = []
    known, seen = dense.batches if dense else [], list[Tensor]()
    with ExitStack() as stack:
        outputs_of = stack.enter_context(_running(model, device))
        unknown = dense is not None and not known
        dense_outputs = stack.enter_context(_running(dense.model, device)) if unknown else None
        for number, (images, labels) in enumerate(progress("evaluating", batches)):
            images, other = placed(images, device), None
            logits = outputs_of(images)
            CLASSIFICATION.check(logits, images, labels)
            if dense_outputs:
                other = dense_outputs(images)
                seen.append(other.float().cpu())
            elif known:
                other = known[number].to(device)
            figures.append(BatchFigures.of(logits, labels.to(device), other))
    if dense:
        dense.batches = known or seen
    figures = world.interleave(figures)
    if not figures:
        raise UserError("no images to evaluate on")
    return Evaluation.of(figures)


def evaluate_task(
    model: nn.Module,
    task: Task,
    device: torch.device,
    dense: DenseScores | None = None,  # always of the same task
    world: World = ALONE,
) -> Evaluation:
    """The figures of a task and, if outputs are scores of classes, KL and agreement.

    Of several processes, the first one measures. Moves the model to `device`.
    """
    result = None
    if world.first:
        compared = dense is not None and task.logits
        if compared and not dense.batches:
            _, dense.batches = _figures(dense.model, task, device, keep=True)
        figures, outputs = _figures(model, task, device, keep=compared)
        result = Evaluation(None, figures=figures)
        if compared:
            kl, agreement = _closeness(task, outputs, dense.batches)
            result = replace(result, kl=kl, agreement=agreement)
    return world.share(result)


def _figures(
    model: nn.Module, task: Task, device: torch.device, keep: bool
) -> tuple[dict[str, float], list[Tensor]]:  # figures, and outputs on the CPU if they are kept
    outputs: list[Tensor] = []

    def see(name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if not isinstance(output, Tensor) or output.ndim < 2:
            raise UserError(f"{task.name}: logits is set, but outputs are not (n, classes, …)")
        outputs.append(output.float().cpu())

    model.to(device)
    hooks = forward_hooks({"": model}, see) if keep else nullcontext()
    with evaluating(model), hooks, task_code(task, "evaluate"):
        figures = task.evaluate(model)
    try:
        figures = {str(name): float(value) for name, value in figures.items()}
    except (AttributeError, TypeError, ValueError):
        figures = {}
    if not figures:
        raise UserError(f"{task.name}: evaluate() has to return a dictionary of numbers")
    return figures, outputs


def _closeness(
    task: Task, outputs: list[Tensor], dense: list[Tensor]
) -> tuple[float, float]:  # KL in nats and agreement in percent, over all examples and positions
    if not outputs or [x.shape for x in outputs] != [x.shape for x in dense]:
        raise UserError(f"{task.name}: evaluate() has to show every model the same batches")
    kl = agreeing = count = 0
    for ours, theirs in zip(outputs, dense, strict=True):
        logs = [x.double().log_softmax(1) for x in (ours, theirs)]
        kl += float(F.kl_div(*logs, log_target=True, reduction="sum").clamp(min=0))
        same = ours.argmax(1) == theirs.argmax(1)
        agreeing, count = agreeing + int(same.sum()), count + same.numel()
    return kl / count, 100 * agreeing / count


def mean_loss(
    model: nn.Module,
    batches: Batches,  # this process's share: every N-th
    device: torch.device,
    world: World = ALONE,
    task: Task = CLASSIFICATION,
) -> float:
    """Mean loss, of images the cross-entropy in nats.

    Moves the model to `device` and changes nothing else in it. ImageBatches are summed in their own
    order, whichever process has them.
    """
    sums = []
    with _running(model, device) as outputs_of:
        for images, batch in progress("loss", batches):
            outputs = outputs_of(placed(images, device))
            task.check(outputs, images, batch)
            outputs = outputs.float() if isinstance(outputs, Tensor) else outputs
            loss = task.summed_loss(outputs, on_device(batch, device), len(images))
            sums.append((loss, len(images)))
    sums = world.interleave([(float(loss), count) for loss, count in sums])
    if not sums:
        raise UserError("no images to evaluate on")
    loss, total = map(sum, zip(*sums, strict=True))
    return loss / total
