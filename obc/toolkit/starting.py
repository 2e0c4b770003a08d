"""The first import of every command: from here on an interrupt is one line, not a traceback.

Python imports PyTorch for a second or more. An interrupt (SIGINT) that comes then would show the
traceback of whatever was being imported; a request to end (SIGTERM) would show nothing. There is
nothing to lose yet: the process says why it ends, and ends. `process.interruptible` takes over as
soon as there is.

Products of matrices in Intel's MKL depend, in their last bits, on where in memory the matrices lie,
unless it is asked (MKL_CBWR) before its first product; it costs nothing measurable. Threads of
OpenMP that have nothing to do wait (OMP_WAIT_POLICY) and do not spin: on a machine that others use,
too, spinning took most of the time, on a quiet one the two are alike. Neither overrides the user.

Nothing of this is done where the module is only imported, by a test or another program.
"""

from __future__ import annotations

import os
import sys
import time

BEGAN = time.monotonic()
ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
SIGINT, SIGTERM = 2, 15
ENDS = {SIGINT: ("interrupted", 130), SIGTERM: ("terminated", 143)}


def is_program() -> bool:
    """Whether what Python was asked to run is a command of ours."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    if file is None:  # python -m PACKAGE.COMMAND, while it looks for the command in this package
        return sys.argv[:1] == ["-m"]
    return os.path.dirname(os.path.abspath(file)) in (ROOT, os.path.join(ROOT, "recipes"))


def seconds() -> float:
    """Since this program began; 0 where it is not one of ours."""
    return time.monotonic() - BEGAN if is_program() else 0.0


def end(number: int, frame: object = None) -> None:
    """Say why, and end at once: nothing is open that would have to be closed."""
    why, status = ENDS[number]
    if os.environ.get("RANK", "0") == "0":  # of many processes (torchrun) one speaks
        os.write(2, f"error: {why}\n".encode())
    os._exit(status)


def answer_signals() -> None:
    """Let signals end the process, those that are not ignored (as in a shell's background)."""
    import signal  # which takes ten milliseconds: time enough for an interrupt

    for number in ENDS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, end)


if is_program():
    os.environ.setdefault("MKL_CBWR", "AUTO")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        answer_signals()
    except KeyboardInterrupt:
        end(SIGINT)
