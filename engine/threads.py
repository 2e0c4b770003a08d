"""Independent pieces of work on a CPU, one thread each.

Linear algebra of a single matrix gains little from several threads; several matrices at a time, one
a thread, gain almost all. A piece gives the same bits then, however many threads there are.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

CACHE_BYTES = 8 << 20  # matrices of one piece, so that they stay in the last cache


def rows_of_a_piece(rows: int, row_bytes: int) -> int:
    """How many rows go together: what the cache holds, but something for every thread."""
    return max(1, min(CACHE_BYTES // row_bytes, -(-rows // torch.get_num_threads())))


def in_pieces(work: Callable[[slice], None], rows: int, size: int) -> None:
    """work(slice) for every `size` rows, on as many threads as torch uses."""
    threads = torch.get_num_threads()
    pieces = [slice(first, min(first + size, rows)) for first in range(0, rows, size)]
    if threads == 1:
        for piece in pieces:
            work(piece)
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(work, pieces))  # list: so that an exception is raised here
    finally:
        torch.set_num_threads(threads)  # the workers' setting is also that of threads to come
