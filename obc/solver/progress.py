"""Progress of long loops: a bar on a terminal, elsewhere a line in the log every half minute.

    for images, labels in progress("evaluating", batches):
        …
    with progress("compressing", total=8) as bar:
        bar.update()

A bar is of no use in a file. There, a thread that lives as long as some loop does writes what is
done, of how many, and the time left, at the average pace so far:

    calibrating: 120 of 800 (15 %), 05:10 so far, about 29:17 left

so that a line appears even while a single step takes long. Loops within loops share a line, the
outermost first, such as the rows of a large layer. Processes but the first are silent.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tqdm import tqdm

from obc.solver.errors import log, rank

SECONDS_BETWEEN_LINES = 30.0
BRIEF_S = 10.0  # loops that take no longer are not worth a line
SHARE_ONLY = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}"


def progress(
    task: str,
    items: Iterable[Any] | None = None,  # None: the caller counts, by `update`
    *,
    total: float | None = None,  # default: the number of items, if they have one
    done: float = 0,  # of the total, before
    counted: bool = True,  # whether the numbers mean something to a user, or only their share does
    within: bool = False,  # part of a step of another loop: no bar of its own
) -> ProgressBar:
    """A loop, or a context to call `update` in, that shows how far it is."""
    if sys.stderr and sys.stderr.isatty() and not rank():
        style = {} if counted else {"bar_format": SHARE_ONLY, "smoothing": 0}
        style |= {"disable": within, "leave": False}
        return tqdm(items, desc=task, total=total, initial=done, **style)
    if total is None and hasattr(items, "__len__"):
        total = len(items)
    return Loop(task, items, total, done, counted)


class Loop:
    """A loop whose progress goes to the log; it has the methods of tqdm that we use."""

    def __init__(
        self,
        task: str,
        items: Iterable[Any] | None = None,
        total: float | None = None,
        done: float = 0,
        counted: bool = True,
        reporter: Reporter | None = None,
    ) -> None:
        self.task, self.items, self.total, self.counted = task, items, total, counted
        self.done = self.done_before = done
        self.note = ""
        self.reporter = reporter or REPORTER
        self.started = self.reporter.clock()

    def __iter__(self) -> Iterator[Any]:
        with self:
            for item in self.items:
                yield item
                self.update()

    def __enter__(self) -> Loop:
        self.started = self.reporter.clock()
        self.reporter.begin(self)
        return self

    def __exit__(self, *error: object) -> None:
        self.reporter.end(self)

    def update(self, steps: float = 1) -> None:
        self.done += steps

    def set_postfix_str(self, text: str) -> None:
        self.note = text

    def line(self) -> str:
        """What is done, of how many, since when, and the time left."""
        elapsed, total, done = self.reporter.clock() - self.started, self.total, self.done
        share = f"{100 * min(1, done / total):.0f} %" if total else f"{done:,.0f} done"
        if total and self.counted:
            share = f"{done:,.0f} of {total:,.0f} ({share})"
        parts = [share, f"{tqdm.format_interval(elapsed)} so far"]
        if total and done > self.done_before:
            left = elapsed * max(0, total - done) / (done - self.done_before)
            parts.append(f"about {tqdm.format_interval(left)} left")
        elif total:
            parts.append("time left not known yet")
        return f"{self.task}: {', '.join([*parts, self.note] if self.note else parts)}"


class Reporter:
    """Logs the loops that are under way, from a thread of its own."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.loops = clock, []
        self.lock, self.over = threading.Lock(), threading.Event()
        self.reported_at = clock()

    def begin(self, loop: Loop) -> None:
        if rank() or not log.isEnabledFor(logging.INFO):
            return
        with self.lock:
            self.loops.append(loop)
            if len(self.loops) == 1:
                self.over = threading.Event()
                arguments = {"args": (self.over,), "daemon": True, "name": "progress"}
                threading.Thread(target=self.watch, **arguments).start()

    def end(self, loop: Loop) -> None:
        with self.lock:
            if loop in self.loops:
                self.loops.remove(loop)
            if not self.loops:
                self.over.set()

    def watch(self, over: threading.Event) -> None:
        """Report when it is time, until all loops are over."""
        while not over.wait(max(0.01, self.seconds_to_wait())):
            if self.seconds_to_wait() <= 0:
                self.report()

    def seconds_to_wait(self) -> float:
        """Until the next line."""
        with self.lock:
            started = min((loop.started for loop in self.loops), default=self.clock())
        due = max(self.reported_at + SECONDS_BETWEEN_LINES, started + BRIEF_S)
        return due - self.clock()

    def report(self) -> None:
        """A line for all loops under way; those that have just begun are left out."""
        self.reported_at = self.clock()
        with self.lock:
            outer, *inner = self.loops or [None]
            loops = [outer, *(x for x in inner if self.clock() - x.started >= BRIEF_S)]
        if outer is not None:
            log.info("; ".join(loop.line() for loop in loops))


REPORTER = Reporter()
ProgressBar = tqdm | Loop
