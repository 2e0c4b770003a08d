"""A command as a process of the operating system: requests to end, and freed memory."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import threading
from collections.abc import Iterator


class Terminated(KeyboardInterrupt):
    """SIGTERM; it passes through whatever lets an interrupt through."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM is raised as `Terminated` (in the main thread; elsewhere nothing changes)."""

    def raise_terminated(number: int, frame: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, raise_terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
