"""Failures of code that is not ours: the forward of a user's or a library's model.

    with foreign_code():            # around whatever calls a model
        outputs = model(images)     # any exception of a forward becomes a FailedForward: one line

No list of exception classes decides what is foreign, but the place where the exception was raised:
if the deepest frame that is a module's call or ours is a module's call, the code below it is not
ours. What our hooks raise stays as it is, and so do user errors, interrupts and a lack of memory.
"""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn

from obc.inputs.usercode import TOOLKIT
from obc.solver.errors import UserError

CALLS = {"_call_impl", "_wrapped_call_impl", "_slow_forward", "forward"}  # of nn.Module
USUAL_SIZES = (32, 64, 224, 96, 28, 128, 160, 192, 240, 256, 299, 384)  # pixels
ALL_SIZES = range(4, 513, 4)
SECONDS_OF_TRIALS = 5.0


class FailedForward(UserError):
    """An exception of a model's own code, in one line; `__cause__` is the exception itself."""


@contextmanager
def foreign_code() -> Iterator[None]:
    """Inside, what the forward of a model raises becomes a FailedForward.

    It names the deepest module whose forward raised, and the shape of what it was called with.
    """
    try:
        yield
    except (UserError, MemoryError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:
        place = None if "DefaultCPUAllocator" in str(error) else _failed_call(error)
        if place is None:
            raise
        text = str(error).strip()
        reason = f"{type(error).__name__}: {text}" if text else type(error).__name__
        raise FailedForward(f"{place}: {reason}") from error


def _failed_call(error: BaseException) -> str | None:
    """Which module was called with what; None if the exception is not a module's."""
    root: nn.Module | None = None
    module: nn.Module | None = None
    inputs: list[Any] = []
    foreign = False
    for frame, _ in traceback.walk_tb(error.__traceback__):
        called = _called_module(frame)
        if called is None:
            foreign = foreign and not _is_ours(frame)
            continue
        foreign, root = True, root or called
        values = frame.f_locals
        if "args" in values and frame.f_code.co_name != "forward":
            inputs = [*values["args"], *(values.get("kwargs") or {}).values()]
        elif called is not module:
            inputs = []
        module = called
    if not foreign or root is None or module is None:
        return None
    names = {id(child): name for name, child in root.named_modules()}
    name = names.get(id(module)) or "the model"
    shapes = " and ".join(str(tuple(x.shape)) for x in inputs if isinstance(x, Tensor))
    return f"{name} ({type(module).__name__}) fails" + (f" on an input {shapes}" if shapes else "")


def _called_module(frame: FrameType) -> nn.Module | None:
    """The module that a frame is a call of; for an operation of a traced model, the model."""
    owner = frame.f_locals.get("self")
    if isinstance(owner, nn.Module) and frame.f_code.co_name in CALLS:
        return owner
    if isinstance(owner, fx.Interpreter) and frame.f_code.co_name.startswith("call_"):
        return owner.module
    return None


def _is_ours(frame: FrameType) -> bool:
    """Whether code is the toolkit's, apart from modules' forwards."""
    path = Path(frame.f_code.co_filename)
    folders = (TOOLKIT / "obc", TOOLKIT / "pruning_vs_quantization")
    flat = {TOOLKIT / name for name in ("quant.py", "trueobs.py", "modelutils.py")}
    return path in flat or any(folder in path.parents for folder in folders)


# -- what a model would take instead ---------------------------------------------------------------


def accepted_input(
    model: nn.Module,
    size: int,  # pixels; it fails with these
    reason: str,  # what the model said
    present: int = 3,  # channels that it fails with
) -> tuple[int, int] | None:
    """Channels and size of images that a model takes, found by trial; None if there are none."""
    first = next((x for x in model.parameters() if x.ndim == 4), None)
    own = [] if first is None else [first.shape[1]]
    channels = [count for count in dict.fromkeys([1, 3, *own]) if count != present]
    sizes = [other for other in dict.fromkeys(_likely_sizes(model, reason)) if other != size]
    trials = [(count, size) for count in channels]
    trials += [(count, other) for count in (present, *channels) for other in sizes]
    end = time.monotonic() + SECONDS_OF_TRIALS
    device = next(model.parameters()).device
    for count, side in trials:
        if time.monotonic() > end:
            break
        try:
            outputs = model(torch.zeros(2, count, side, side, device=device))
        except Exception:  # as expected
            continue
        if isinstance(outputs, Tensor) and outputs.ndim == 2 and len(outputs) == 2:
            return count, side
    return None


def _likely_sizes(model: nn.Module, reason: str) -> Iterator[int]:
    for module in model.modules():
        for name, value in vars(module).items():
            if name in ("image_size", "img_size", "input_size"):
                values = value if isinstance(value, tuple | list) else [value]
                yield from (x for x in values if isinstance(x, int) and x in range(1, 1025))
    yield from USUAL_SIZES
    yield from (x for x in map(int, re.findall(r"\b\d{1,3}\b", reason)) if x in range(4, 513))
    yield from ALL_SIZES
