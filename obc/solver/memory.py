"""How much memory compressing a layer takes, and what a budget leaves room for (--memory).

For a layer of `rows` rows, d columns and G groups, beside the network itself, in bytes:

    always      G·d²·(8 + item)   H in float64 and its inverse; 8·G·d² more where columns are
                                  put in another order (N:M, blocks)
                rows·d·…          order, losses and weights of all rows, and a few MB
    inverting   8·d²              one matrix more, a few groups at a time
    eliminating n·row + at most `tasks`·matrix     n rows at a time
    levels      n·row + at most `tasks`·matrix     with row a few times `levels`·d, matrix a few d²

While images are shown, the sums of all layers of a pass are in memory, 8·G·d² each; as one layer of
a pass is compressed, those of the layers to come are.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from obc.solver.allocator import give_back_freed_memory
from obc.solver.elimination import bytes_per_system, bytes_per_task
from obc.solver.errors import UserError
from obc.solver.inverse import TOGETHER

MATRICES_OF_A_ROW = 1.5  # d×d, while a row's weights at many levels are made
VECTORS_OF_A_LEVEL = 5  # of d, likewise
OVERHEAD = 8 << 20  # buffers of libraries, and other small things
THREAD_OVERHEAD = 24 << 20  # the same for every further thread, and a d×d matrix (measured, MKL)


@dataclass(frozen=True)
class Needs:
    """Memory for one layer, in bytes."""

    sums: int  # of its inputs' products, from the first image on; a part of `layer`
    layer: int  # whatever the step
    inverting: int  # beside it, while H is inverted
    row: int  # for every row in work at a time
    matrix: int = 0  # for every row that a thread works on, on a CPU
    tasks: int = 0  # how many may be

    @property
    def least(self) -> int:
        """With one row at a time."""
        return self.layer + max(self.inverting, self.row + self.matrix)

    def rows(self, memory: float) -> int:
        """How many rows may be in work at a time; one, whatever the memory."""
        room = int(memory) - self.layer
        many = (room - self.tasks * self.matrix) // self.row
        return many if many >= self.tasks > 0 else max(1, room // (self.row + self.matrix))


def layer_needs(
    layer: nn.Module,
    dtype: torch.dtype = torch.float32,  # that the layer is solved in
    levels: int = 0,  # that are made of it
    innermost: bool = False,  # whether its columns are put in another order
    apart: bool = False,  # whether rows have inverses of their own
) -> Needs:
    """What `TrueOBS` takes for a layer."""
    weight = layer.weight.flatten(1)
    (rows, d), device, item = weight.shape, weight.device, torch.finfo(dtype).bits // 8
    sums = 8 * getattr(layer, "groups", 1) * d * d
    always = sums + sums // 8 * item + sums * innermost + rows * d * (5 * item + 8)
    always += OVERHEAD
    if device.type == "cpu":
        always += (torch.get_num_threads() - 1) * (THREAD_OVERHEAD + 8 * d * d)
    inverting = min(sums, 8 * max(d * d, TOGETHER))
    row = bytes_per_system(d, item, device)
    matrix, tasks = bytes_per_task(d, item, device)
    if levels:
        row += item * VECTORS_OF_A_LEVEL * d * levels
        matrices = int(item * MATRICES_OF_A_ROW * d * d)
        row, matrix = (row, max(matrix, matrices)) if tasks else (row + matrices, 0)
    if innermost:  # N:M keeps the u's of all steps and their triangle (elimination_cpu.py)
        matrix *= 2
    if apart:
        row += 32 * d * d
    return Needs(sums, always, inverting, row, matrix, tasks)


def in_passes(needs: Mapping[str, Needs], memory: int) -> list[list[str]]:
    """Layers, in their order, in groups that go together; each group takes a pass over the images.

    Raises UserError where the memory is not enough for some layer alone.
    """
    name, dearest = max(needs.items(), key=lambda item: item[1].least)
    if dearest.least > memory:
        raise UserError(
            f"{memory / 1e9:.3g} GB are too little for {name}; the least that does is --memory "
            f"{(dearest.least // 100_000 + 1) / 1e4:g}"
        )
    passes: list[list[str]] = []
    for name in needs:
        if not passes or most_at_a_time(needs[name] for name in [*passes[-1], name]) > memory:
            passes.append([])
        passes[-1].append(name)
    return passes


def most_at_a_time(needs: Iterable[Needs]) -> int:
    """What layers of one pass take, one row at a time, one layer after the other."""
    needs = list(needs)
    waiting, most = sum(layer.sums for layer in needs), 0
    for layer in needs:
        waiting -= layer.sums
        most = max(most, waiting + layer.least)
    return most


def default_memory(device: torch.device) -> int:
    """Half of the memory that is free now, in bytes; of a CPU, what Linux says is available.

    Processes on one machine share its CPU's memory alike. Of a GPU, the power of two below: last
    bits depend on it there, and should not on what else is on a GPU.
    """
    if device.type != "cpu":
        return 1 << (torch.cuda.mem_get_info(device)[0] // 2).bit_length() - 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    try:
        words = Path("/proc/meminfo").read_text().split()
        return int(words[words.index("MemAvailable:") + 1]) * 1024 // 2 // processes
    except (OSError, ValueError):  # another system: a size that any machine has
        return (2 << 30) // processes


def batches_of(rows: Tensor, count: int) -> Iterator[Tensor]:
    """Row numbers, `count` at a time; nothing if there are none.

    What a batch has freed is handed back: in pieces too small for the next one it would only add.
    """
    for batch in rows.split(count) if len(rows) else ():
        yield batch
        give_back_freed_memory()
