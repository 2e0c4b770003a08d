"""A command as a process of the operating system: requests to end, and freed memory."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import threading
import time
from collections.abc import Iterator

from command import starting


class Terminated(KeyboardInterrupt):
    """SIGTERM; it passes through whatever lets an interrupt through."""


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Inside, SIGINT raises KeyboardInterrupt and SIGTERM `Terminated`, its subclass.

    Where `starting` has answered them so far, a second one ends the process at once, and once the
    command is over they change nothing: its status stands. In a thread that is not the main one,
    nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in starting.ENDS}
    started = [number for number, handler in before.items() if handler is starting.end]

    def interrupt(number: int, frame: object) -> None:
        for other in started:
            signal.signal(other, starting.end)
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    for number in {signal.SIGTERM, *started}:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if number in started else handler)


def wait_to_be_ended(seconds: float) -> None:
    """Wait for a signal, which ends this process: one of several, after another has failed."""
    for number in starting.ENDS:  # they are ignored once a command is over
        signal.signal(number, signal.SIG_DFL)
    time.sleep(seconds)


def reuse_freed_memory() -> None:
    """Let glibc keep up to 512 MB of freed memory instead of handing it back at every chance.

    A network's activations come and go with every layer; each time the kernel has to clear their
    pages anew, which took a fifth of the time of rn20 on 2 cores. Elsewhere this does nothing.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD in malloc.h
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, 32 << 20)  # the most that glibc takes
        mallopt(trim_threshold, 512 << 20)


def give_back_freed_memory() -> None:
    """Hand memory that was freed back to the system, on glibc; elsewhere this does nothing.

    Pieces of it that are too small for the next matrix would add to what the process takes.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
