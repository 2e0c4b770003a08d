"""The first import of every command: from here on a signal is answered with one line.

Python imports PyTorch for a second or more. An interrupt (SIGINT) during that time would show the
traceback of whatever is being imported, and a request to end (SIGTERM) would show nothing. So one
handler is installed before anything else; `phase`, which `cli.guarded` sets, decides what it does:

    starting     nothing is open yet: it prints one line and ends the process
    working      it raises KeyboardInterrupt or `Terminated`, which `guarded` turns into that line
    interrupted  a second signal while the first unwinds: it ends the process at once
    over         the output is written: it ignores the signal

Products of matrices in Intel's MKL depend, in their last bits, on where in memory the matrices lie,
unless MKL_CBWR is set before the first product; setting it costs nothing measurable. Idle threads
of OpenMP wait (OMP_WAIT_POLICY) instead of spinning: on a machine with other users spinning took
most of the time, on an idle one the two are equally fast. Neither overrides the user's choice.

None of this happens where the module is only imported, by a test or another program.
"""

from __future__ import annotations

import os
import sys
import time

BEGAN = time.monotonic()
ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
FOLDERS = ("obc", "recipes", "pruning_vs_quantization")  # with commands, besides the root
SIGINT, SIGTERM = 2, 15
ENDINGS = {SIGINT: ("interrupted", 130), SIGTERM: ("terminated", 143)}

phase = "starting"


class Terminated(KeyboardInterrupt):
    """SIGTERM; it passes through whatever lets an interrupt through."""


def is_program() -> bool:
    """Whether Python was asked to run one of our commands."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    if file is None:  # python -m PACKAGE.COMMAND, while it looks for the command in this package
        return sys.argv[:1] == ["-m"]
    folder, name = os.path.split(os.path.abspath(file))
    folders = (ROOT, *(os.path.join(ROOT, folder) for folder in FOLDERS))
    return folder in folders or name == "trueobs"  # which pip makes of obc/__main__.py


def seconds() -> float:
    """Time since this program began; 0 if it is not one of ours."""
    return time.monotonic() - BEGAN if is_program() else 0.0


def answer_signal(number: int, frame: object = None) -> None:
    """The handler of SIGINT and SIGTERM."""
    global phase
    if phase == "over":
        return
    if phase == "working":
        phase = "interrupted"
        raise Terminated if number == SIGTERM else KeyboardInterrupt
    message, status = ENDINGS[number]
    if os.environ.get("RANK", "0") == "0":  # only one of many processes (torchrun) reports
        os.write(2, f"error: {message}\n".encode())
    os._exit(status)


def install_handler() -> None:
    """Answer the signals that are not ignored, as they are in the background of a shell."""
    import signal  # takes ten milliseconds: long enough for an interrupt

    for number in ENDINGS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, answer_signal)


if is_program():
    os.environ.setdefault("MKL_CBWR", "AUTO")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        install_handler()
    except KeyboardInterrupt:
        answer_signal(SIGINT)
