"""A GPU that does not exist: tensors in memory that say that they are on another device.

    with pretended_gpu() as gpu:
        x = torch.ones(3).to(GPU)
        y = x + torch.ones(3)             raises: a tensor on the CPU among tensors on the GPU
        bool((x > 0).any())               counted in gpu.waits, with the line of ours it comes from
        gpu.peak                          most bytes in tensors on the GPU at a time

What a GPU computes is computed on the CPU by the same operations of PyTorch, so results can be
compared to the last bit. Seen are the operations that reach PyTorch's dispatcher, and what each
would do on a GPU: where its result would be, whether the CPU would have to wait for the GPU, and
what memory it takes (but for what a library needs inside of an operation). The device's name is
"meta", the only one besides the CPU's that PyTorch knows how to index without a driver.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, ValuesView
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

GPU = torch.device("meta")
ROOT = Path(__file__).resolve().parents[1]
NOT_OURS = tuple(str(ROOT / folder) for folder in ("tests", ".venv"))

# Operations whose result, or whose result's size, the CPU has to know; on CUDA, bincount looks at
# the largest value, and linear algebra that reports errors at whether there was one.
WAITING = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose"),
    *("nonzero", "masked_select", "bincount"),
    *("unique_dim", "unique_consecutive", "_unique", "_unique2"),
    *("_linalg_check_errors", "linalg_cholesky", "linalg_inv", "linalg_solve"),
}
INDEXING = {"index", "index_put", "index_put_", "_unsafe_index"}
MADE_FROM_VALUES = {torch.tensor, torch.as_tensor, Tensor.new_tensor}
SUBSCRIPTS = {Tensor.__getitem__, Tensor.__setitem__}


class OnGPU(Tensor):
    """A tensor that says that it is on the GPU; `inner` has its values."""

    @staticmethod
    def __new__(cls, inner: Tensor, requires_grad: bool = False) -> OnGPU:
        with torch.inference_mode(False):  # what that mode forbids, it forbids `inner`
            made = Tensor._make_wrapper_subclass(
                cls,
                inner.size(),
                strides=inner.stride(),
                storage_offset=inner.storage_offset(),
                dtype=inner.dtype,
                device=GPU,
                requires_grad=requires_grad,
            )
        made.inner = inner
        PretendedGPU.now.hold(inner)
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return PretendedGPU.now.run(func, args, kwargs or {})

    def tolist(self) -> Any:
        PretendedGPU.now.wait("tolist")
        return self.inner.tolist()

    def numpy(self, **options: Any) -> None:
        raise TypeError("a tensor on the GPU has no NumPy array: copy it to the CPU first")

    def __reduce_ex__(self, protocol: int) -> None:
        raise TypeError("a tensor on the GPU would be saved: copy it to the CPU first")

    def __deepcopy__(self, memo: dict) -> OnGPU:
        copy = OnGPU(self.inner.clone(), self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copy._is_param = True
        return memo.setdefault(id(self), copy)

    def __repr__(self) -> str:
        return f"OnGPU({self.inner})"


class PretendedGPU:
    """What has happened on the GPU so far."""

    now: PretendedGPU

    def __init__(self) -> None:
        self.waits: Counter[tuple[str, str]] = Counter()  # (operation, line of ours)
        self.operations = self.bytes = self.peak = 0
        self._alive: dict[int, tuple[int, weakref.ref]] = {}

    # -- memory ------------------------------------------------------------------------------------

    def hold(self, inner: Tensor) -> None:
        """Count the memory of a tensor, once for all of its views, until it is freed."""
        storage = inner.untyped_storage()
        if (key := storage._cdata) not in self._alive:
            self._alive[key] = storage.nbytes(), weakref.ref(storage, partial(self._release, key))
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)

    def _release(self, key: int, _: weakref.ref) -> None:
        self.bytes -= self._alive.pop(key)[0]

    # -- waiting -----------------------------------------------------------------------------------

    def wait(self, operation: str) -> None:
        """Count that the CPU waits for the GPU here."""
        self.waits[operation, line_of_ours()] += 1

    @property
    def waited(self) -> int:
        return self.waits.total()

    def waits_in(self, file: str) -> int:
        """How often lines of a file of ours have waited."""
        return sum(count for (_, line), count in self.waits.items() if line.startswith(file))

    # -- operations --------------------------------------------------------------------------------

    def run(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """One operation: on the GPU if its tensors are, or if it is to make one there."""
        operation = Operation.of(func)
        if operation.name == "to":  # in inference mode; elsewhere PyTorch makes it a copy
            return copied(func, args, kwargs)
        self.operations += 1
        tensors = tensors_in((args, kwargs.values()))
        self._check(operation, tensors, args, kwargs)
        there, device = any(type(x) is OnGPU for x in tensors), kwargs.get("device")
        if device is not None:
            there = torch.device(device).type == GPU.type
            kwargs = kwargs | {"device": torch.device("cpu") if there else device}
        with _disable_current_modes():
            result = func(*inner(args), **{name: inner(x) for name, x in kwargs.items()})
        if operation.written:
            written = [kwargs[x] if isinstance(x, str) else args[x] for x in operation.written]
            for tensor in written:
                if type(tensor) is OnGPU and tensor.stride() != tensor.inner.stride():
                    raise NotImplementedError(f"{func} changes the shape of a tensor in place")
            return written[0] if len(written) == 1 else tuple(written)
        return wrapped(result) if there else result

    def _check(
        self, operation: Operation, tensors: list[Tensor], args: tuple, kwargs: dict
    ) -> None:
        """Count a wait, or raise, if the operation on a GPU would."""
        name, here = operation.name, [x for x in tensors if type(x) is not OnGPU]
        if any(x.device.type == GPU.type for x in here):
            raise AssertionError(f"{name}: this tensor escaped the pretended GPU")
        if name in ("copy_", "_to_copy"):
            to = args[0].device if name == "copy_" else kwargs.get("device") or args[0].device
            source = args[1 if name == "copy_" else 0]
            non_blocking = kwargs.get("non_blocking") or args[2:3] == (True,)
            if to.type != source.device.type and not non_blocking:
                self.wait("copy to the " + ("GPU" if to.type == GPU.type else "CPU"))
            elif to.type != source.device.type and to.type != GPU.type:
                raise AssertionError(f"{name}: the CPU would read values that are still to come")
        elif len(here) < len(tensors):
            if name in INDEXING:
                indices = [x for x in args[1] if x is not None]
                masks = any(x.dtype in (torch.bool, torch.uint8) for x in indices)
                fills = len(args) > 2 and len(indices) == 1 and args[2].ndim == 0  # a masked_fill
                if (masks and not fills) or any(type(x) is not OnGPU for x in indices):
                    self.wait(name)
                here = [x for x in here if not any(x is index for index in indices)]
            if any(x.ndim for x in here):
                raise RuntimeError(f"{name}: a tensor on the CPU among tensors on the GPU")
            if name in WAITING or (name == "repeat_interleave" and len(args) + len(kwargs) == 1):
                self.wait(name)


@dataclass(frozen=True)
class Operation:
    """What there is to know of an operation of PyTorch."""

    name: str
    written: tuple[int | str, ...]  # arguments that it writes to and returns

    @staticmethod
    @cache
    def of(func: Callable) -> Operation:
        arguments = func._schema.arguments
        written = tuple(
            argument.name if argument.kwarg_only else place
            for place, argument in enumerate(arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        )
        return Operation(func.overloadpacket.__name__, written)


def copied(func: Callable, args: tuple, kwargs: dict) -> Tensor:
    """x.to(…), with a copy only where there has to be one."""
    names = [argument.name for argument in func._schema.arguments]
    options = dict(zip(names, args, strict=False)) | kwargs
    x, other, copy = options.pop("self"), options.pop("other", None), options.pop("copy", False)
    if other is not None:
        options |= {"dtype": other.dtype, "device": other.device}
    options = {name: value for name, value in options.items() if value is not None}
    same = (x.dtype, x.device.type) == (
        options.get("dtype", x.dtype),
        torch.device(options.get("device", x.device)).type,
    )
    keeps_layout = options.get("memory_format") in (None, torch.preserve_format)
    if (
        same
        and not copy
        and (keeps_layout or x.is_contiguous(**{"memory_format": options["memory_format"]}))
    ):
        return x
    with inside(PretendedGPU.now):
        return torch.ops.aten._to_copy(x, **options)


def tensors_in(arguments: Iterable) -> list[Tensor]:
    found = []
    for x in arguments:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, (tuple, list, ValuesView)):
            found += tensors_in(x)
    return found


def inner(x: Any) -> Any:
    """An argument as the CPU gets it."""
    if type(x) is OnGPU:
        return x.inner
    return type(x)(map(inner, x)) if type(x) in (tuple, list) else x


def wrapped(x: Any) -> Any:
    """A result as the GPU returns it."""
    if isinstance(x, Tensor):
        return OnGPU(x)
    return (
        tuple(map(wrapped, x))
        if isinstance(x, tuple)
        else ([wrapped(y) for y in x] if isinstance(x, list) else x)
    )


def line_of_ours() -> str:
    """file:line of the innermost frame that is in our code, tests apart."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(str(ROOT)) and not path.startswith(NOT_OURS):
            return f"{Path(path).relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "a test"


class Operations(TorchDispatchMode):
    """Hands what concerns the GPU to it."""

    def __init__(self, gpu: PretendedGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        there = device is not None and torch.device(device).type == GPU.type
        if there or any(type(x) is OnGPU for x in tensors_in((args, kwargs.values()))):
            return self.gpu.run(func, args, kwargs)
        return func(*args, **kwargs)


class Functions(TorchFunctionMode):
    """Makes tensors of Python's numbers, which PyTorch makes below its dispatcher, on the CPU and
    copies them, as happens on a GPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in MADE_FROM_VALUES and not isinstance(args[-1], Tensor):
            like = args[0] if func is Tensor.new_tensor else None
            device = kwargs.pop("device", None) or (like.device if like is not None else "cpu")
            if torch.device(device).type == GPU.type:
                if like is not None:
                    kwargs.setdefault("dtype", like.dtype)
                return torch.tensor(args[-1], **kwargs).to(GPU)
            kwargs["device"] = device
        elif func in SUBSCRIPTS and type(args[0]) is OnGPU:
            args = (args[0], without_lists(args[1]), *args[2:])
        return func(*args, **kwargs)


def without_lists(index: Any) -> Any:
    """An index whose lists of numbers are tensors on the GPU."""
    if isinstance(index, list):
        return torch.tensor(index).to(GPU)
    return tuple(map(without_lists, index)) if isinstance(index, tuple) else index


@contextmanager
def inside(gpu: PretendedGPU) -> Iterator[None]:
    """On this thread, operations on the GPU go to it."""
    with Functions(), Operations(gpu):
        yield


@contextmanager
def pretended_gpu(free_bytes: int = 1 << 32) -> Iterator[PretendedGPU]:
    """Inside, `GPU` is a device, on threads of pools as well."""
    gpu = PretendedGPU.now = PretendedGPU()
    submit, free = ThreadPoolExecutor.submit, (free_bytes, free_bytes)

    def work_inside(work: Callable, *args: Any, **kwargs: Any) -> Any:
        with inside(gpu):
            return work(*args, **kwargs)

    def submit_inside(pool: ThreadPoolExecutor, *args: Any, **kwargs: Any) -> Future:
        return submit(pool, work_inside, *args, **kwargs)

    with (
        mock.patch.object(ThreadPoolExecutor, "submit", submit_inside),
        mock.patch.object(torch.cuda, "mem_get_info", lambda device: free),
        inside(gpu),
    ):
        yield gpu
