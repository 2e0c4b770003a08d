"""The C library's allocator: when freed memory is kept for reuse, and when it goes back (glibc)."""

from __future__ import annotations

import contextlib
import ctypes


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
