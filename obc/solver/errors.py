"""The exceptions that all parts raise, the logger, and the rank of this process."""

from __future__ import annotations

import logging
import os

GRACE_S = 3.0  # for how long a process that is not the first keeps an error to itself
log = logging.getLogger("trueobs")


class UserError(Exception):
    """Something the user got wrong. The message is one line that says what to do."""

    def __str__(self) -> str:
        return one_line(super().__str__())


def rank() -> int:
    """Which of torchrun's processes this is; 0 if it is the only one."""
    launched = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))
    return int(os.environ["RANK"]) if launched else 0


def printable(text: str) -> str:
    """Text that a terminal can be trusted with, whatever names of strangers are in it."""
    return "".join(c if c.isprintable() else "?" for c in text[:2000])


def one_line(text: str) -> str:
    """Text without line breaks, and printable."""
    return printable(" ".join(text.split()))


class SingularHessian(ValueError):
    """H is not positive definite even with its whole mean added to the diagonal."""
