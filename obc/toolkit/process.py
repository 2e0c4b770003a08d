"""A command as a process of the operating system: requests to end, and freed memory."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator

from obc.toolkit import starting


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
