"""Independent pieces of work on a CPU, one thread each, and the memory that they work in.

Linear algebra of a single matrix gains little from several threads; several matrices at a time, one
per thread, gain almost all of it. Then a piece also gives the same bits for any number of threads.
(PyTorch and its libraries divide a sum among their threads, so its rounding depends on how many.)

    in_pieces(work, rows, size)       rows that do not interact
    one_at_a_thread(work, items, …)   pieces with an order, such as batches of images; what they
                                      add up, they add in this order (`Turns`)
    SpareBuffers(like)                the memory that one piece leaves to the next
    one_thread()                      a small step that should not depend on threads either
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from obc.solver.progress import progress

Item = TypeVar("Item")
Wait = Callable[[], None]  # returns once it is the caller's turn
CACHE_BYTES = 8 << 20  # matrices of one piece, so that they stay in the last-level cache


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, PyTorch uses a single thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


of_worker = threading.local()  # has the attribute `alone` in threads of a pool


def work_alone() -> None:
    """On this thread PyTorch uses no others."""
    of_worker.alone = True
    torch.get_num_threads()  # a thread's first operation copies the process's setting: do it now
    torch.set_num_threads(1)


@cache
def executor_of(threads: int) -> ThreadPoolExecutor:
    """A process keeps its threads: the first product on a new one costs milliseconds."""
    return ThreadPoolExecutor(threads, initializer=work_alone)


if hasattr(os, "register_at_fork"):  # a child process has none of its parent's threads
    os.register_at_fork(after_in_child=executor_of.cache_clear)


@contextmanager
def pool_of(threads: int) -> Iterator[Callable[..., Future]]:
    """Inside, `submit(work, *arguments)` runs work on some thread, where PyTorch uses no others.

    On leaving, all that was submitted has ended; after an error, what had not begun is cancelled.
    """
    before, futures = torch.get_num_threads(), []
    executor = executor_of(max(threads, before))  # which starts threads only as they are needed

    def submit(work: Callable[..., Item], *arguments: object) -> Future[Item]:
        futures.append(executor.submit(work, *arguments))
        return futures[-1]

    try:
        yield submit
    except BaseException:
        for future in futures:
            future.cancel()
        raise
    finally:
        try:
            wait(futures)
        finally:
            torch.set_num_threads(before)  # new threads copy what the workers set


# -- rows ------------------------------------------------------------------------------------------


def rows_of_a_piece(rows: int, row_bytes: int) -> int:
    """How many rows go together: as many as the cache holds, but some for every thread."""
    return max(1, min(CACHE_BYTES // row_bytes, -(-rows // torch.get_num_threads())))


def in_pieces(work: Callable[[slice], None], rows: int, size: int) -> None:
    """work(slice) for every `size` rows, on as many threads as torch uses."""
    threads = torch.get_num_threads()
    pieces = [slice(first, min(first + size, rows)) for first in range(0, rows, size)]
    if threads == 1 or len(pieces) <= 1 or hasattr(of_worker, "alone"):
        with one_thread():
            for piece in progress("this step", pieces, counted=False, within=True):
                work(piece)
        return
    with pool_of(min(threads, len(pieces))) as submit:
        futures = [submit(work, piece) for piece in pieces]
        for future in progress("this step", futures, counted=False, within=True):
            future.result()


# -- memory ----------------------------------------------------------------------------------------


class SpareBuffers:
    """Memory that pieces of work pass on to each other: as many buffers as are in use at a time.

    Large blocks that are freed and allocated again may end up elsewhere, or be cut up for small
    ones, so that the process would grow from piece to piece.
    """

    def __init__(self, like: Tensor) -> None:
        self._like, self._free = like, {}

    @contextmanager
    def lent(self, name: str, *shape: int) -> Iterator[Tensor]:
        """An uninitialised tensor; those of one name differ in their first size only.

        Where the work fails it is not passed on.
        """
        free = self._free.setdefault(name, deque())
        try:
            buffer = free.pop()
        except IndexError:
            buffer = None
        if buffer is None or len(buffer) < shape[0]:
            buffer = self._like.new_empty(shape)
        yield buffer[: shape[0]]
        free.append(buffer)


def reuse_freed_memory() -> None:
    """Let glibc keep up to 512 MB of freed memory instead of returning it to the system at once.

    A network's activations come and go with every layer, and each time the kernel has to clear
    their pages again: a fifth of the time of rn20 on 2 cores. Without glibc this does nothing.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD in malloc.h
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 32 << 20)  # the most that glibc accepts
        mallopt(trim_threshold, 512 << 20)


def give_back_freed_memory() -> None:
    """Return freed memory to the system; without glibc this does nothing.

    Fragments that are too small for the next matrix would add to the size of the process.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


# -- pieces with an order --------------------------------------------------------------------------


def at_once() -> None:
    """A `Wait` that does not wait."""


class Stopped(Exception):
    """Another piece failed, or the user interrupted: there is no need to go on with this one."""


class Turns:
    """Whose turn it is to add to a named sum: piece 0's, then 1's, 2's, …"""

    def __init__(self) -> None:
        self._changed, self._now, self._stopped = threading.Condition(), {}, False

    def wait(self, name: Hashable, number: int) -> None:
        """Return when it is this piece's turn. Raises Stopped if it never will be."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._now.get(name, 0) >= number)
            if self._stopped:
                raise Stopped

    def leave(self, name: Hashable, number: int) -> None:
        """Wait for this piece's turn, then pass it on to the next piece."""
        self.wait(name, number)
        with self._changed:
            self._now[name] = number + 1
            self._changed.notify_all()

    def stop(self) -> None:
        """Wake up everyone who waits, with Stopped."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


def one_at_a_thread(
    work: Callable[[int, Item], None],  # a piece's number, and the piece
    items: Iterable[Item],
    threads: int,
    turns: Turns,
) -> None:
    """work(0, item), work(1, item), …, up to `threads` of them at a time, started in this order.

    The items are taken one by one in the calling thread. The exception of the first piece that
    fails is raised here, once the later ones have stopped.
    """
    if threads == 1:
        with one_thread():
            for number, item in enumerate(items):
                work(number, item)
        return
    running: deque[Future] = deque()
    with pool_of(threads) as submit:
        try:
            for number, item in enumerate(items):
                if len(running) == threads:
                    running.popleft().result()
                running.append(submit(work, number, item))
            while running:
                running.popleft().result()
        except BaseException:
            turns.stop()
            raise
