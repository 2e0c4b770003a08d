"""One run on many devices: which process this is, and how processes combine their results.

    torchrun --nproc-per-node 2 main_trueobs.py …

starts N processes with the same arguments, each with a rank, 0 … N−1. All run the same program;
where there is much to do, each does its share, and all learn the result:

    images       batches r, r + N, …           sums over images are added in the order of ranks
    rows         one contiguous share          rows are independent: shares are concatenated
    layers       assigned, longest first       small ones, as a whole

No order of addition depends on timing. So a run depends on how the images were divided and on
nothing else: N processes give bit for bit the result of one process that divides its images into N
shards and adds those up (--shards N) with as many threads.

`World` is a process's view of the others. A single process has rank 0 of 1; all operations do
nothing then, and torch.distributed is not even imported. NCCL carries tensors on GPUs, gloo the
rest. A process that fails ends with its message, and torchrun ends the others; one that waits for
another longer than PATIENCE gives up.
"""

from __future__ import annotations

import importlib
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from obc.solver import errors
from obc.solver.errors import UserError

PATIENCE = timedelta(minutes=30)
SUM_PIECE = 1 << 22  # numbers of a sum that are sent together
CUT = 0.25  # × one process's share of all work: anything more expensive is divided among all


@dataclass(frozen=True)
class World:
    """This process among all; all of them have to call every operation, in the same order."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes files."""
        return self.rank == 0

    def rows(self, count: int, rank: int | None = None) -> slice:
        """A process's share of `count` rows (this one's, unless a rank is given)."""
        rank = self.rank if rank is None else rank
        return slice(rank * count // self.size, (rank + 1) * count // self.size)

    def sum_in_order(self, x: Tensor) -> None:
        """x ← ((x₀ + x₁) + x₂) + …, in place; x_r is rank r's (all contiguous, of one shape)."""
        if self.size == 1:
            return
        for piece in x.view(-1).split(SUM_PIECE):
            pieces = piece.new_empty(self.size, len(piece))
            with self._group() as group:
                group.all_gather(list(pieces), piece)
            piece.copy_(pieces[0])
            for other in pieces[1:]:
                piece += other

    def fill_rows(self, x: Tensor) -> None:
        """Fill in the other processes' rows of x, in place; this process's rows are correct."""
        if self.size == 1:
            return
        for rank in range(self.size):
            share = x[self.rows(len(x), rank)]
            if share.numel():
                with self._group() as group:
                    group.broadcast(share, src=rank)

    def gather(self, value: Any) -> list[Any]:
        """The values that the processes passed, in the order of ranks; anything picklable."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self._group() as group:
            group.all_gather_object(values, value)
        return values

    def interleave(self, items: list[Any]) -> list[Any]:
        """One list of all processes' items, where process r has items r, r + N, … of it."""
        shares = self.gather(items)
        longest = max(map(len, shares))
        return [share[i] for i in range(longest) for share in shares if i < len(share)]

    def meet(self) -> None:
        """Wait until all processes have reached this point."""
        self.gather(None)

    def share(self, value: Any) -> Any:
        """The value that the first process passed."""
        return self.gather(value if self.first else None)[0]

    def leave(self) -> None:
        """To be called last, unless the run failed."""
        if self.size > 1:
            with self._group() as group:
                group.destroy_process_group()

    @contextmanager
    def _group(self) -> Iterator[Any]:
        """torch.distributed; the loss of a process is a UserError, if torchrun does not end us."""
        import torch.distributed as group

        try:
            yield group
        except RuntimeError as error:
            time.sleep(errors.GRACE_S)
            raise UserError(
                f"lost one of the {self.size} processes; its own message says why ({error})"
            ) from None


ALONE = World()


def resolve_device(text: str) -> torch.device:
    """The device that --device names; "auto" is a GPU if there is one, else the CPU.

    Each process on a machine gets a GPU of its own.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", text):
        raise UserError(f"--device must be auto, cpu, cuda or cuda:N; got {text}")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text == "cpu" or (text == "auto" and not gpus):
        return torch.device("cpu")
    if not gpus:
        raise UserError(f"--device {text}: this PyTorch sees no GPU; use --device cpu")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if processes > gpus or (":" in text and processes > 1):
        raise UserError(
            f"--device {text}: {processes} processes on {gpus} GPUs; each needs its own: "
            f"pass --device cuda and torchrun --nproc-per-node {gpus}"
        )
    index = int(text.partition(":")[2] or os.environ.get("LOCAL_RANK", 0))
    if index >= gpus:
        raise UserError(f"--device {text}: there are {gpus} GPUs; use cuda:0 to cuda:{gpus - 1}")
    return torch.device("cuda", index)


def join(device: torch.device) -> World:
    """The world that torchrun has started, or `ALONE`. Raises UserError if it is unreachable."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if errors.rank() >= size or size == 1 or "MASTER_ADDR" not in os.environ:
        return ALONE
    import torch.distributed as group

    on_cpu = device.type == "cpu"
    if not group.is_available() or not (on_cpu or group.is_nccl_available()):
        raise UserError("this PyTorch was built without torch.distributed, or without NCCL")
    # The defaults of this module's functions are the group at the time of its import. Imported
    # later, as torchvision does, it would keep the group and its threads alive beyond `leave`, and
    # a thread that asks for Python while Python ends aborts the process.
    importlib.import_module("torch.distributed.nn")
    backend = "gloo" if on_cpu else f"cpu:gloo,{device.type}:nccl"
    try:
        if not group.is_initialized():
            group.init_process_group(
                backend, timeout=PATIENCE, device_id=None if on_cpu else device
            )
    except (RuntimeError, ValueError) as error:
        raise UserError(f"cannot reach the other {size - 1} processes: {error}") from None
    return World(errors.rank(), size)


def deal(
    costs: Mapping[str, float],
    size: int,
    divisible: bool = True,  # whether a piece of work can be divided among all
) -> dict[str, int | None]:
    """Which rank does each piece of work; None: all of them, a share each.

    Expensive pieces are divided evenly, so that none of them holds up the rest. The others go, the
    most expensive first, to the rank that has the least to do.

    >>> deal({"small": 1, "huge": 100, "middle": 2}, 2)
    {'huge': None, 'middle': 0, 'small': 1}
    """
    limit = CUT * sum(costs.values()) / size
    load = [0.0] * size
    owners: dict[str, int | None] = {}
    for name in sorted(costs, key=lambda name: -costs[name]):
        if size > 1 and divisible and costs[name] > limit:
            owners[name] = None
            continue
        owners[name] = load.index(min(load))
        load[owners[name]] += costs[name]
    return owners
