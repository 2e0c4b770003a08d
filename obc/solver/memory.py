"""How much memory compressing a layer takes, and what a budget leaves room for (--memory).

For a layer of `rows` rows, d columns and G groups, in addition to the network itself, in bytes:

    always      G·d²·(8 + item)   H in float64 and its inverse; 8·G·d² more where columns are
                                  put in another order (N:M, blocks), a copy of H for swaps
                rows·d·…          order, losses and weights of all rows, and a few MB
    inverting   8·d²              one matrix more, a few groups at a time (then 8 + item each);
                                  or, after the elimination, the matrices of a row that swaps
    eliminating n·row + at most `tasks`·matrix     n rows at a time
    levels      n·row + at most `tasks`·matrix     with row a few times `levels`·d, matrix a few d²

While the images are shown, the sums of all layers of a pass are in memory, 8·G·d² each; while one
of these layers is compressed, those of the layers to come are.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from obc.solver.elimination import bytes_per_system, bytes_per_task
from obc.solver.errors import UserError
from obc.solver.inverse import TOGETHER
from obc.solver.layers import view
from obc.solver.swaps import MATRICES_OF_A_SWAP, MOST_COLUMNS
from obc.solver.threads import give_back_freed_memory

MATRICES_OF_A_ROW = 1.5  # d×d, while a row's weights at many levels are computed
VECTORS_OF_A_LEVEL = 5  # of length d, at the same time
OVERHEAD = 8 << 20  # buffers of libraries and the like
THREAD_OVERHEAD = 24 << 20  # the same for every further thread, and a d×d matrix (measured, MKL)


@dataclass(frozen=True)
class Needs:
    """Memory for one layer, in bytes."""

    sums: int  # for Σ x xᵀ, from the first image on; included in `layer`
    layer: int  # at every step
    inverting: int  # more, while H is inverted, or a row swaps
    row: int  # more, for every row of a batch
    matrix: int = 0  # more, for every row that a thread works on, on a CPU
    tasks: int = 0  # rows that threads may work on at a time

    @property
    def least(self) -> int:
        """With one row at a time."""
        return self.layer + max(self.inverting, self.row + self.matrix)

    def rows(self, memory: float) -> int:
        """How many rows a batch may have: at least one, however little memory there is."""
        room = int(memory) - self.layer
        many = (room - self.tasks * self.matrix) // self.row
        return many if many >= self.tasks > 0 else max(1, room // (self.row + self.matrix))


def layer_needs(
    layer: nn.Module,
    dtype: torch.dtype = torch.float32,  # that the layer is solved in
    levels: int = 0,  # of sparsity, at which its weights are computed
    innermost: bool = False,  # whether its columns are put in another order
    apart: bool = False,  # whether rows have inverses of their own
    swaps: bool = False,  # whether the N:M zeros of a row are searched (`swaps.py`)
) -> Needs:
    """What `TrueOBS` takes for a layer."""
    shape, device, item = view(layer), layer.weight.device, torch.finfo(dtype).bits // 8
    rows, d = shape.rows, shape.columns
    sums = 8 * shape.groups * d * d
    always = OVERHEAD + sums * (1 + innermost) + sums // 8 * item + rows * d * (5 * item + 8)
    if device.type == "cpu":
        always += (torch.get_num_threads() - 1) * (THREAD_OVERHEAD + 8 * d * d)
    row, (matrix, tasks) = bytes_per_system(d, item, device), bytes_per_task(d, item, device)
    if levels:
        row += item * VECTORS_OF_A_LEVEL * d * levels
        matrices = int(item * MATRICES_OF_A_ROW * d * d)
        row, matrix = (row, max(matrix, matrices)) if tasks else (row + matrices, 0)
    if innermost:  # N:M keeps the u's of all steps and their triangle (elimination_cpu.py)
        matrix *= 2
    if apart:
        row += 32 * d * d
    inverting = min(shape.groups * d * d, max(d * d, TOGETHER))
    inverting *= 8 + item * (shape.groups > 1)
    if swaps and d <= MOST_COLUMNS:
        always, inverting = (
            always + sums // 8 * item,
            max(inverting, item * MATRICES_OF_A_SWAP * d * d),
        )
    return Needs(sums, always, inverting, row, matrix, tasks)


def in_passes(needs: Mapping[str, Needs], memory: int) -> list[list[str]]:
    """Names of layers, in their order, in groups; each group takes a pass over the images.

    Raises UserError where the memory is too small for one of the layers alone.
    """
    name, largest = max(needs.items(), key=lambda item: item[1].least)
    if largest.least > memory:
        gigabytes = (largest.least // 100_000 + 1) / 1e4
        too_little = f"{memory / 1e9:.3g} GB is too little for {name}"
        raise UserError(f"{too_little}; it needs at least --memory {gigabytes:g}")
    passes: list[list[str]] = []
    for name in needs:
        if not passes or most_at_a_time(needs[name] for name in [*passes[-1], name]) > memory:
            passes.append([])
        passes[-1].append(name)
    return passes


def most_at_a_time(needs: Iterable[Needs]) -> int:
    """Peak memory of the layers of one pass, compressed one after the other, row by row."""
    needs = list(needs)
    waiting, most = sum(layer.sums for layer in needs), 0
    for layer in needs:
        waiting -= layer.sums
        most = max(most, waiting + layer.least)
    return most


def default_memory(device: torch.device) -> int:
    """Half of the memory that is free now, in bytes; on a CPU, of what Linux calls available.

    Processes on one machine share its memory equally. On a GPU it is rounded down to a power of
    two: the last bits of results depend on it there, and should not depend on other programs.
    """
    if device.type != "cpu":
        return 1 << (torch.cuda.mem_get_info(device)[0] // 2).bit_length() - 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    try:
        words = Path("/proc/meminfo").read_text().split()
        return int(words[words.index("MemAvailable:") + 1]) * 1024 // 2 // processes
    except (OSError, ValueError):  # another system: what any machine has
        return (2 << 30) // processes


def batches_of(rows: Tensor, count: int) -> Iterator[Tensor]:
    """Row numbers, `count` at a time; nothing if there are none.

    Memory that a batch has freed goes back to the system: the next batch could not use its pieces.
    """
    for batch in rows.split(count) if len(rows) else ():
        yield batch
        give_back_freed_memory()
