"""The exceptions of all parts, the logger, and the rank of this process."""

from __future__ import annotations

import logging
import os

GRACE_S = 3.0  # for how long all processes but the first hold back an error
log = logging.getLogger("trueobs")


class UserError(Exception):
    """An error that the user can correct. The message is one line that says how."""

    def __str__(self) -> str:
        return one_line(super().__str__())


def rank() -> int:
    """The number of this process among torchrun's; 0 if it is the only one."""
    launched = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))
    return int(os.environ["RANK"]) if launched else 0


def printable(text: str) -> str:
    """Text that is safe to print on a terminal, whatever untrusted names it contains."""
    return "".join(c if c.isprintable() else "?" for c in text[:2000])


def one_line(text: str) -> str:
    """Text without line breaks, and printable."""
    return printable(" ".join(text.split()))


class SingularHessian(ValueError):
    """H is not positive definite even with its whole mean added to the diagonal."""
