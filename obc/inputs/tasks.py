"""What a network is for: its inputs, its loss, its figures. The one protocol of all datasets.

DATASET may be `path/to/task.py:function`: the function is called without arguments and returns a
`Task`. Three methods say everything; `digits`, `cifar10`, `imagenet` and `folder` are tasks, too
(`obc/toolkit/imagetask.py`).

    from obc.inputs.tasks import Task

    class Reading(Task):
        def calibration(self):            # batches to calibrate on, the same ones each time
            return [(tokens, labels), …]

        def inputs(self, batch):          # what the network takes of a batch (default: all of it)
            return batch[0]

        def loss(self, outputs, batch):   # mean over the batch, a tensor without axes
            return F.cross_entropy(outputs, batch[1])

        def evaluate(self, model):        # figures on test data, the one that matters most first
            return {"accuracy": …}

    def reading():
        return Reading()

*Batches* are tensors, tuples, lists or dictionaries of them. *Inputs* that are a tensor are given
to the network as they are, a tuple or list as its arguments, a dictionary as its keyword arguments.
Examples are counted along the first axis of the first tensor of the inputs. Batches are kept in
memory, as many as hold `--nsamples` examples; their order is fixed.

*The loss* is what `database.py loss`, `spdy.py` and `post_proc.py --finetune` reduce. A task that
needs none of them may leave it out.

*`evaluate`* gets a model in eval mode, without gradients, on the device of the run, and moves its
own test data there. Of several processes (torchrun), only the first evaluates.

*`logits = True`* says that outputs are scores of classes, (n, classes, …). Then every evaluation
also measures KL and agreement with the dense model: over all outputs while `evaluate` runs, which
therefore has to show every model the same batches. Without it, neither is measured, and the log
says so.

The function that returns the task may take weights, data and random numbers from wherever it
likes, but has to do the same each time: an interrupted run resumes only on the same batches.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from obc.solver.errors import UserError, log

Batch = Any  # tensors, in tuples, lists and dictionaries


class Task:
    """A task; see the module docstring."""

    name = "task"  # in messages; the toolkit sets that of the function
    logits = False  # whether outputs are scores of classes
    nsamples = 1024  # examples to calibrate on, at most
    augments = False  # whether `batches` can be other ones in each round

    def calibration(self) -> Iterable[Batch]:
        """Batches to calibrate on; the same ones each time."""
        raise UserError(f"{self.name}: a task needs a method calibration()")

    def inputs(self, batch: Batch) -> Batch:
        """What the network takes of a batch: a tensor, arguments, or keyword arguments."""
        return batch

    def loss(self, outputs: Any, batch: Batch) -> Tensor:  # ()
        """The mean loss of a batch, given what the network returned for its inputs."""
        raise UserError(f"{self.name}: this needs a loss; give the task a method loss()")

    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        """Figures on test data, by name; the first is the one that is shown last and alone."""
        raise UserError(f"{self.name}: a task needs a method evaluate()")

    # -- what the toolkit asks besides; image tasks have their own answers ----------------------

    @cached_property
    def kept(self) -> list[Batch]:
        """The calibration batches: as many as hold `nsamples` examples."""
        batches, count = [], 0
        with task_code(self, "calibration"):
            for batch in self.calibration():
                count += len(as_inputs(self.inputs(batch), self.name))
                batches.append(batch)
                if count >= self.nsamples:
                    break
        if not batches:
            raise UserError(f"{self.name}: calibration() has no batches")
        return batches

    @property
    def example(self) -> Inputs:
        """Inputs that the network takes, of any number of examples."""
        return next(iter(self.batches()))[0]

    @property
    def count(self) -> int:
        """Examples to calibrate on."""
        return sum(len(inputs) for inputs, _ in self.batches())

    @property
    def available(self) -> int:
        """Examples that there could be."""
        return self.count

    def batches(self, augment: bool = False, rounds: int = 1) -> TaskBatches:
        """Batches to calibrate on."""
        return TaskBatches(self, self.kept)

    def epochs(self, augment: bool, seed: int) -> TaskEpochs:
        """Epochs to train on."""
        return TaskEpochs(self.batches(), seed)

    def one_batch(self, count: int | None) -> Inputs:
        """One batch for statistics of so many examples or more; or all."""
        pieces, examples = [], 0
        for inputs, _ in self.batches():
            pieces.append(inputs)
            examples += len(inputs)
            if count is not None and examples >= count:
                break
        if (whole := merged(pieces)) is None:
            whole = max(pieces, key=len)
            log.info("%s: batches differ in size; one of %d is used", self.name, len(whole))
        return whole

    def tests(self) -> None:
        """Test batches of a classification, for processes to share; None: there is `evaluate`."""

    def marks(self) -> dict[str, str]:
        """What results depend on, by name."""
        leaves, structure = tree_flatten(self.kept)
        texts = [str(structure), *(repr(x) for x in leaves if not isinstance(x, Tensor))]
        content = hashlib.blake2b("\n".join(texts).encode(), digest_size=16)
        for x in leaves:
            if isinstance(x, Tensor) and x.numel():
                content.update(f"\n{x.dtype} {tuple(x.shape)}\n".encode())
                content.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return {"calibration batches": content.hexdigest()}

    def record(self) -> dict[str, Any]:
        """What records of runs say about the inputs."""
        return {}

    def test_marks(self) -> dict[str, str]:
        """What an evaluation depends on besides."""
        return {}

    def fresh(self, seed: int) -> None:
        """The same task with other examples to calibrate on; None: there are none."""

    def check(self, outputs: Any, inputs: Inputs, batch: Batch) -> None:
        """Raise a UserError for outputs that the loss has no use for."""

    @property
    def has_loss(self) -> bool:
        return type(self).loss is not Task.loss or "loss" in vars(self)

    def summed_loss(self, outputs: Any, batch: Batch, count: int) -> Tensor:  # () float64
        """The loss of a batch of so many examples, added up over them."""
        with task_code(self, "loss"):
            loss = self.loss(outputs, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise UserError(f"{self.name}: loss() has to return a tensor with one number")
        return loss.reshape(()).double() * count


@contextmanager
def task_code(task: Task, method: str) -> Iterator[None]:
    """Inside, what the user's code raises is the user's error."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{task.name}: {method}(): {type(error).__name__}: {error}") from error


# -- the arguments of a network --------------------------------------------------------------------


@dataclass(frozen=True)
class Arguments:
    """Several arguments of a network, which are used like a tensor of images.

    Nothing can tell which axes are those of examples, so they are never cut: a part is the whole.
    """

    args: tuple
    kwargs: Mapping[str, Any]

    def map(self, function: Callable[[Tensor], Tensor]) -> Arguments:
        """The same arguments with a function of each tensor in the place of the tensor."""
        return Arguments(*tree_map_only(Tensor, function, (self.args, dict(self.kwargs))))

    @property
    def tensors(self) -> list[Tensor]:
        leaves = tree_leaves((self.args, dict(self.kwargs)))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, part: slice) -> Arguments:
        return self

    def split(self, size: int) -> list[Arguments]:
        return [self]

    def clone(self) -> Arguments:
        return self.map(Tensor.clone)

    def cpu(self) -> Arguments:
        return self.map(Tensor.cpu)

    def to(self, device: torch.device, copy: bool = False, **layout: Any) -> Arguments:
        """On a device; the layout is one of images."""
        return self.map(lambda x: x.to(device, copy=copy))


Inputs = Tensor | Arguments


def as_inputs(values: Batch, name: str) -> Inputs:
    """What a task gives a network, as it is called with it."""
    if isinstance(values, Tensor):
        return values
    if isinstance(values, Mapping):
        inputs = Arguments((), values)
    elif isinstance(values, (tuple, list)):
        inputs = Arguments(tuple(values), {})
    else:
        raise UserError(
            f"{name}: inputs are a {type(values).__name__}; they have to be a tensor, a tuple of "
            "arguments or a dictionary of keyword arguments"
        )
    if not inputs.tensors or not inputs.tensors[0].ndim:
        raise UserError(f"{name}: the inputs need a tensor whose first axis is that of examples")
    return inputs


def call(model: Callable[..., Any], inputs: Inputs) -> Any:
    """What a model returns for inputs."""
    if isinstance(inputs, Arguments):
        return model(*inputs.args, **inputs.kwargs)
    return model(inputs)


def positional(forward: Callable[..., Any], inputs: Inputs) -> tuple[list[Any], dict[str, Any]]:
    """Values of all parameters of a function, in order; and, by name, those of no tensor."""
    if isinstance(inputs, Tensor):
        return [inputs], {}
    bound = inspect.signature(forward).bind(*inputs.args, **inputs.kwargs)
    bound.apply_defaults()
    fixed = {k: x for k, x in bound.arguments.items() if not isinstance(x, Tensor)}
    return list(bound.arguments.values()), fixed


def on_device(batch: Batch, device: torch.device) -> Batch:
    """A batch whose tensors are on a device."""
    return tree_map_only(Tensor, lambda x: x.to(device), batch)


def merged(pieces: Sequence[Inputs]) -> Inputs | None:
    """Several inputs as one; None if their sizes differ. What is no axis of examples stays."""
    if len(pieces) == 1:
        return pieces[0]
    if all(isinstance(piece, Tensor) for piece in pieces):
        columns = [pieces]
    else:
        columns = list(zip(*(piece.tensors for piece in pieces), strict=True))
    joined = []
    for column in columns:
        whole = [x.ndim and len(x) == len(piece) for x, piece in zip(column, pieces, strict=True)]
        if all(whole) and len({x.shape[1:] for x in column}) == 1:
            joined.append(torch.cat(list(column)))
        elif all(torch.equal(x, column[0]) for x in column):
            joined.append(column[0])
        else:
            return None
    if isinstance(pieces[0], Tensor):
        return joined[0]
    tensors = iter(joined)
    return pieces[0].map(lambda _: next(tensors))


# -- batches ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskBatches:
    """Batches of a task in a fixed order: pairs of inputs and the batch that they are of."""

    task: Task
    batches: Sequence[Batch]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Inputs, Batch]]:
        for batch in self.batches:
            yield as_inputs(self.task.inputs(batch), self.task.name), batch

    def shard(self, number: int, count: int) -> TaskBatches:
        """Every `count`-th batch, starting with batch `number`."""
        return TaskBatches(self.task, self.batches[number::count])


@dataclass(frozen=True)
class TaskEpochs:
    """Epochs of a task's batches, each in its own order."""

    batches: TaskBatches
    seed: int  # all that epochs depend on

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self.batches)

    def epoch(self, number: int) -> Iterable[tuple[Inputs, Batch]]:
        """The batches of an epoch, counted from 0."""
        generator = torch.Generator().manual_seed(self.seed + number)
        order = torch.randperm(len(self.batches), generator=generator).tolist()
        chosen = [self.batches.batches[index] for index in order]
        return TaskBatches(self.batches.task, chosen)
