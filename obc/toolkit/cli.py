"""What all commands share: options, error lines, logging, files that are never half-written.

The contract of a command (CLI.md): results on standard output, progress and log lines on standard
error, exit status 0; or, for anything the user got wrong, one line ``error: …`` on standard error
and exit status 2 — never a traceback, never half a file. A command is therefore

    def main(argv=None) -> int:
        return command(build_parser, run, argv)

with ``run(args)`` raising `UserError` wherever it has something to tell, and every file it leaves
behind going through `atomic_write`: written under a temporary name, forced to disk, renamed.
An interrupt (SIGINT) or a request to end (SIGTERM) is a line and status 130 or 143; what is done
by then is kept where the command resumes (`resuming.py`).

Started by torchrun, a command is many processes of the same arguments (`distributed.py`). The first
one speaks and writes files for all. The others keep quiet; of an error they speak, too, but wait a
little before: the first, if it has the same error, ends in the meantime, and torchrun ends them.
"""

from __future__ import annotations

import argparse
import io
import logging
import math
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from obc.solver.errors import GRACE_S, UserError, log, one_line, printable, rank
from obc.solver.threads import reuse_freed_memory
from obc.toolkit.process import Terminated, interruptible, wait_to_be_ended

# ---------------------------------------------------------------------------------- options


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except those that say nothing (None, False)."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that answers a mistake with one line, and takes no abbreviated options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", _Help)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        if rank():
            wait_to_be_ended(GRACE_S)
        message = re.sub(r"^argument ([^:]+): must", r"\1 must", message)
        self.exit(2, _error_line(message.removeprefix("argument ")))


def _number(text: str, kind: type[int] | type[float], wanted: str) -> float:
    """`text` as a finite number, or the argparse error `must be <wanted>; got <text>`."""
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be {wanted}; got {text}")
    return value


def positive_int(text: str) -> int:
    """argparse type: 1, 2, 3, …"""
    value = _number(text, int, "a whole number from 1")
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1; got {text}")
    return int(value)


def nonnegative_int(text: str) -> int:
    """argparse type: 0, 1, 2, …"""
    value = _number(text, int, "a whole number from 0")
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0; got {text}")
    return int(value)


def positive_float(text: str) -> float:
    """argparse type: a finite number above 0."""
    value = _number(text, float, "a number above 0")
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be a number above 0; got {text}")
    return value


def nonnegative_float(text: str) -> float:
    """argparse type: a finite number from 0."""
    value = _number(text, float, "a number from 0")
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be a number from 0; got {text}")
    return value


def fraction(text: str) -> float:
    """argparse type: a number in [0, 1), such as a sparsity."""
    value = _number(text, float, "in [0, 1)")
    if not 0 <= value < 1:
        hint = f". Did you mean {value / 100:g}?" if 1 < value < 100 else ""
        raise argparse.ArgumentTypeError(f"must be in [0, 1); got {text}{hint}")
    return value


def bits(text: str) -> int:
    """argparse type: 1 … 16, or 32 for none."""
    value = int(text) if text.isdecimal() else 0
    if not (1 <= value <= 16 or value == 32):
        raise argparse.ArgumentTypeError(f"must be 1 to 16, or 32 for none; got {text}")
    return value


def _seed(text: str) -> int:
    value = nonnegative_int(text)
    if value >= 2**63:
        raise argparse.ArgumentTypeError(f"must be below 2^63; got {text}")
    return value


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Add MODEL, DATASET and the options that every command takes (CLI.md, "Common options")."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="rn18 rn34 rn50 rn101 rn152, rn8 rn20 rn32 rn44 rn56 rn110, any other "
        "torchvision classification model, or path/to/file.py:function",
    )
    parser.add_argument("dataset", metavar="DATASET", help="imagenet, cifar10, digits or folder")
    common = parser.add_argument_group("common options")
    add = common.add_argument
    add(
        "--weights",
        metavar="FILE",
        help="dense weights, .pth .th .pt or .safetensors (default: torchvision's, or the shipped)",
    )
    add(
        "--datapath",
        metavar="DIR",
        help="where the images are (default: ../imagenet, ../cifar10; digits needs none)",
    )
    add(
        "--image-size",
        metavar="N",
        type=positive_int,
        help="side of the network's input in pixels "
        "(default: imagenet and folder 224, cifar10 32, digits 16)",
    )
    add("--seed", metavar="N", type=_seed, default=0, help="seed of every random choice")
    add("--nsamples", metavar="N", type=positive_int, default=1024, help="calibration images")
    add("--batchsize", metavar="N", type=positive_int, default=128, help="images per batch")
    add(
        "--workers",
        metavar="N",
        type=nonnegative_int,
        help="processes that decode images "
        "(default: 0 for cifar10 and digits, otherwise one per core, 8 at most)",
    )
    add(
        "--nrounds",
        metavar="N",
        type=positive_int,
        help="passes over the calibration images (default: 10 augmented, 1 with --noaug)",
    )
    add(
        "--skip-bad-images",
        action="store_true",
        help="go on without images that cannot be read, instead of refusing to start",
    )
    add("--noaug", action="store_true", help="calibration images without augmentation")
    add("--device", metavar="auto|cpu|cuda[:N]", default="auto", help="where to compute")
    add(
        "--memory",
        metavar="GB",
        type=positive_float,
        help="working memory of the solver in GB (default: from what is free)",
    )


def add_resume_options(parser: argparse.ArgumentParser) -> None:
    """Options of the commands that go on where they were interrupted (resuming.py, records.py)."""
    parser.add_argument(
        "--restart",
        action="store_true",
        help="start over instead of going on where an interrupted run stopped",
    )
    parser.add_argument(
        "--repeat",
        metavar="RECORD",
        help="in place of all other arguments: repeat the run of a JSON record",
    )


# -------------------------------------------------------------------- errors, logging, results


def _error_line(message: object) -> str:
    return f"error: {one_line(str(message))}\n"


def _os_error_text(error: OSError) -> str:
    reason = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {reason}" if error.filename else reason


def command(
    build_parser: Callable[[], argparse.ArgumentParser],
    run: Callable[[argparse.Namespace], None],
    argv: list[str] | None = None,  # None: the process's own
) -> int:
    """A whole command: options, logging, the work; its exit status."""
    args = build_parser().parse_args(argv)
    if rank():
        setup_logging(logging.ERROR)
        sys.stderr = _NoTerminal(sys.stderr.buffer, line_buffering=True)
    else:
        setup_logging()
    reuse_freed_memory()
    return guarded(run, args)


def guarded(body: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Run `body(args)`; return the exit status, with the user's mistakes as one line on stderr.

    Programming errors are not caught: their traceback is what we want to see.
    """
    status = 2
    try:
        with interruptible():  # in here, so that none of its moments is outside
            body(args)
            sys.stdout.flush()
        return 0
    except UserError as error:
        message = str(error)
    except torch.OutOfMemoryError:
        message = "the GPU ran out of memory; pass a smaller --memory or --batchsize"
    except BrokenPipeError:  # the reader of our output left (… | head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would complain again on leaving
        message = "standard output was closed before all was written"
    except OSError as error:  # disk full, no permission, …
        message = _os_error_text(error)
    except (MemoryError, RuntimeError) as error:  # PyTorch reports a failed malloc by the latter
        if not isinstance(error, MemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        message = "out of memory; pass a smaller --memory or --batchsize"
    except Terminated:
        message, status = "terminated", 143
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    if rank():
        wait_to_be_ended(GRACE_S)
    tqdm.write(_error_line(message), file=sys.stderr, end="")
    return status


def print_result(line: str) -> None:
    """A result, such as `top-1 87.93`, on standard output; of many processes, the first's."""
    if rank() == 0:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


class _NoTerminal(io.TextIOWrapper):
    """Standard error of a process that shall show no progress bars, wherever it leads."""

    def isatty(self) -> bool:
        return False


class _TqdmHandler(logging.Handler):
    """Log lines on standard error, above a progress bar rather than through it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        if record.levelno <= logging.INFO:
            return line
        return f"{record.levelname.lower()}: {printable(line)}"


def setup_logging(level: int = logging.INFO) -> None:
    """Let the logger "trueobs" write to standard error; calling it again changes only the level."""
    log.setLevel(level)
    if not any(isinstance(handler, _TqdmHandler) for handler in log.handlers):
        handler = _TqdmHandler()
        handler.setFormatter(_Lines("%(message)s"))
        log.addHandler(handler)


# ------------------------------------------------------------------------------------ files
