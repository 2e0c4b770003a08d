"""One run on many devices: which process this is, and how processes put their parts together.

    torchrun --nproc-per-node 2 main_trueobs.py …

starts N processes of the same arguments, each with a rank, 0 … N−1. All of them run the same
program; where there is much to do each does its share, and all know the result:

    images       batches r, r + N, …       sums over images are added in the order of ranks
    rows         one contiguous share      rows are independent: shares are put side by side
    layers       dealt out, longest first  small ones, whole

What is added is added in an order that does not depend on timing. So a run depends on how the
images were divided and on nothing else: N processes yield, bit for bit, what one process yields
that divides its images into N shards and adds those up (--shards N), given as many threads.

`World` is a process's view of it. Alone it has rank 0 of 1; all of its operations then do nothing,
and torch.distributed is not even imported. NCCL carries what is on GPUs, gloo the rest. A process
that fails ends with its message, and torchrun ends the others; one that waits for another longer
than PATIENCE gives up.
"""

from __future__ import annotations

import os
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
PIECE = 1 << 22  # numbers of a sum that travel at once
CUT = 0.25  # × one process's share of all work: what costs more is divided among all of them


@dataclass(frozen=True)
class World:
    """This process among all; every operation has to be called by all of them, in one order."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks and writes files."""
        return self.rank == 0

    def rows(self, count: int, rank: int | None = None) -> slice:
        """The share of `count` rows that is a process's (this one's, if none is named)."""
        rank = self.rank if rank is None else rank
        return slice(rank * count // self.size, (rank + 1) * count // self.size)

    def own(self, items: list) -> list:
        """Every N-th of a list; of batches, use `batches.ImageBatches.shard`."""
        return items[self.rank :: self.size]

    def sum_in_order(self, x: Tensor) -> None:
        """x ← ((x₀ + x₁) + x₂) + …, in place, x_r being rank r's (all contiguous, of one shape)."""
        if self.size == 1:
            return
        for part in x.view(-1).split(PIECE):
            theirs = part.new_empty(self.size, len(part))
            with self._talking() as group:
                group.all_gather(list(theirs), part)
            part.copy_(theirs[0])
            for other in theirs[1:]:
                part += other

    def fill_rows(self, x: Tensor) -> None:
        """Fill the rows of x that are others', in place; this process's own are right already."""
        if self.size == 1:
            return
        for rank in range(self.size):
            share = x[self.rows(len(x), rank)]
            if share.numel():
                with self._talking() as group:
                    group.broadcast(share, src=rank)

    def gather(self, value: Any) -> list[Any]:
        """What each process passed, in the order of ranks. Anything that can be pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self._talking() as group:
            group.all_gather_object(values, value)
        return values

    def interleave(self, items: list[Any]) -> list[Any]:
        """The inverse of `own`: one list of what all processes have."""
        shares = self.gather(items)
        longest = max(map(len, shares))
        return [share[i] for i in range(longest) for share in shares if i < len(share)]

    def meet(self) -> None:
        """Go on once all processes are here."""
        self.gather(None)

    def share(self, value: Any) -> Any:
        """What the first process passed."""
        return self.gather(value if self.first else None)[0]

    def leave(self) -> None:
        """The last thing to do, unless the run failed."""
        if self.size > 1:
            with self._talking() as group:
                group.destroy_process_group()

    @contextmanager
    def _talking(self) -> Iterator[Any]:
        """torch.distributed; where another process is gone, say so, unless torchrun ends us."""
        import torch.distributed as group

        try:
            yield group
        except RuntimeError as error:
            time.sleep(errors.GRACE_S)
            raise UserError(
                f"lost another of the {self.size} processes, whose own message tells why ({error})"
            ) from None


ALONE = World()


def join(device: torch.device) -> World:
    """The world that torchrun has made, or `ALONE`. Raises UserError if it cannot be reached."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if errors.rank() >= size or size == 1 or "MASTER_ADDR" not in os.environ:
        return ALONE
    import torch.distributed as group

    on_cpu = device.type == "cpu"
    if not group.is_available() or not (on_cpu or group.is_nccl_available()):
        raise UserError("this PyTorch was built without torch.distributed, or without NCCL")
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
    divisible: bool = True,  # whether a piece can be divided among all
) -> dict[str, int | None]:
    """Which rank does each piece; None: all of them, a share each.

    Dear pieces are divided evenly, so that none of them holds up the rest. The others go, the
    dearest first, to whoever has least to do.

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
