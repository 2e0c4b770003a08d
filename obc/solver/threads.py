"""Independent pieces of work on a CPU, one thread each.

Linear algebra of a single matrix gains little from several threads; several matrices at a time, one
a thread, gain almost all. A piece gives the same bits then, however many threads there are: PyTorch
and its libraries divide sums among threads, and so add them up in another order for each number.

    in_pieces(work, rows, size)       rows that have nothing to do with each other
    one_at_a_thread(work, items, …)   pieces that come one after the other, such as batches of
                                      images; what they add up, they add `in_turn`
    SpareBuffers(like)                       the memory that a piece works in, for the next one
    one_thread()                      a small thing that shall not depend on threads either
"""

from __future__ import annotations

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

Item = TypeVar("Item")
Wait = Callable[[], None]  # returns once it is the caller's turn
CACHE_BYTES = 8 << 20  # matrices of one piece, so that they stay in the last cache


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, PyTorch uses a single thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Pool:
    """Threads that are given work."""

    def __init__(self, executor: ThreadPoolExecutor) -> None:
        self._executor, self._given = executor, []

    def submit(self, work: Callable[..., Item], *args: object) -> Future[Item]:
        """Have some thread do it."""
        self._given.append(self._executor.submit(work, *args))
        return self._given[-1]

    def end(self, cancel: bool) -> None:
        """Wait until all is done that was given, or at least begun."""
        for future in self._given if cancel else ():
            future.cancel()
        wait(self._given)


of_a_pool = threading.local()  # whether this thread is a worker


def work_alone() -> None:
    """PyTorch uses no other threads on this one."""
    of_a_pool.worker = True
    torch.get_num_threads()  # a thread's first operation takes over the process's number: now
    torch.set_num_threads(1)


@cache
def executor_of(threads: int) -> ThreadPoolExecutor:
    """A process keeps its threads: the first product on a new one costs milliseconds."""
    return ThreadPoolExecutor(threads, initializer=work_alone)


if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads
    os.register_at_fork(after_in_child=executor_of.cache_clear)


@contextmanager
def pool_of(threads: int) -> Iterator[Pool]:
    """Threads on each of which PyTorch uses no others; what they are given is done at the end."""
    before = torch.get_num_threads()
    pool, done = Pool(executor_of(max(threads, before))), False  # which starts as many as it needs
    try:
        yield pool
        done = True
    finally:
        try:
            pool.end(cancel=not done)
        finally:
            torch.set_num_threads(before)  # the workers' setting is also that of threads to come


# -- rows ------------------------------------------------------------------------------------------


def rows_of_a_piece(rows: int, row_bytes: int) -> int:
    """How many rows go together: what the cache holds, but something for every thread."""
    return max(1, min(CACHE_BYTES // row_bytes, -(-rows // torch.get_num_threads())))


def in_pieces(work: Callable[[slice], None], rows: int, size: int) -> None:
    """work(slice) for every `size` rows, on as many threads as torch uses."""
    threads = torch.get_num_threads()
    pieces = [slice(first, min(first + size, rows)) for first in range(0, rows, size)]
    if threads == 1 or len(pieces) <= 1 or hasattr(of_a_pool, "worker"):
        with one_thread():
            for piece in pieces:
                work(piece)
        return
    with pool_of(min(threads, len(pieces))) as pool:
        for future in [pool.submit(work, piece) for piece in pieces]:
            future.result()


class SpareBuffers:
    """Memory that pieces of work hand on to each other: as many buffers as work at a time.

    Large ones that are freed and asked for again lie elsewhere in memory, or fill with small ones,
    and what a process takes grows from piece to piece.
    """

    def __init__(self, like: Tensor) -> None:
        self._like, self._free = like, {}

    @contextmanager
    def lent(self, name: str, *shape: int) -> Iterator[Tensor]:
        """A tensor to be written to; those of a name differ in their first size only.

        It holds what was left in it. Where the work fails it is not handed on.
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


# -- one after the other ---------------------------------------------------------------------------


def at_once() -> None:
    """Wait for nobody."""


class Stopped(Exception):
    """Another piece failed, or the user interrupted: this one need not go on."""


class Turns:
    """Whose turn it is to add to something, by the thing's name: piece 0's, then 1's, 2's, …"""

    def __init__(self) -> None:
        self._changed, self._now, self._stopped = threading.Condition(), {}, False

    def wait(self, name: Hashable, number: int) -> None:
        """Until it is this piece's turn. Raises Stopped if it never will be."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._now.get(name, 0) >= number)
            if self._stopped:
                raise Stopped

    def leave(self, name: Hashable, number: int) -> None:
        """After this piece it is the next one's turn."""
        self.wait(name, number)
        with self._changed:
            self._now[name] = number + 1
            self._changed.notify_all()

    def stop(self) -> None:
        """Let nobody wait any longer."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


def one_at_a_thread(
    work: Callable[[int, Item], None],  # a piece's number, and the piece
    items: Iterable[Item],
    threads: int,
    turns: Turns,
) -> None:
    """work(0, item), work(1, item), …, `threads` of them at a time, begun in their order.

    The items themselves are made here, in the calling thread, as they are needed. What the first
    piece to fail raises is raised here, once the later ones have stopped.
    """
    if threads == 1:
        with one_thread():
            for number, item in enumerate(items):
                work(number, item)
        return
    running: deque[Future] = deque()
    with pool_of(threads) as pool:
        try:
            for number, item in enumerate(items):
                if len(running) == threads:
                    running.popleft().result()
                running.append(pool.submit(work, number, item))
            while running:
                running.popleft().result()
        except BaseException:
            turns.stop()
            raise
