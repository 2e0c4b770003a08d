"""What all commands share: options, error lines, logging, results on standard output.

The contract of a command: results go to standard output, progress and log lines to standard error,
and the exit status is 0. User errors are reported in one line ``error: …`` on standard error with
exit status 2: never a traceback, never half a file. A command is therefore

    def main(argv=None) -> int:
        return command(build_parser, run, argv)

where ``run(args)`` raises `UserError` for whatever the user has to correct, and every file is
written by `files.atomic_write`. An interrupt (SIGINT) or a request to end (SIGTERM) is one line and
status 130 or 143; commands that resume keep what is finished by then (`resume.py`).

Started by torchrun, a command is many processes with the same arguments (`distributed.py`). The
first one reports and writes files for all. The others report nothing but errors, and those only
after a pause: if the first has the same error, it ends in the meantime, and torchrun ends the rest.
"""

from __future__ import annotations

import argparse
import io
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from obc.inputs.preprocessing import CROPS, INTERPOLATIONS, channel_values
from obc.inputs.tracing import logged
from obc.solver.errors import GRACE_S, UserError, log, one_line, printable, rank
from obc.solver.threads import reuse_freed_memory
from obc.toolkit import starting

# ---------------------------------------------------------------------------------- options

FIRST, INPUTS, RUN = "options to begin with", "weights and images", "the run"  # titles of groups


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except for those that say nothing (None, False)."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports errors in one line, and takes no abbreviated options."""

    def __init__(self, *args: Any, example: str | None = None, **kwargs: Any) -> None:
        """Its help page ends with `example`, a command that can be pasted into a shell."""
        kwargs.setdefault("formatter_class", _Help)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)
        self.example = example

    def format_help(self) -> str:
        return super().format_help() + (f"\nexample:\n  {self.example}\n" if self.example else "")

    def group(self, title: str) -> argparse._ArgumentGroup:
        """The group of options under a title, which is made if it is missing."""
        groups = (group for group in self._action_groups if group.title == title)
        return next(groups, None) or self.add_argument_group(title)

    def error(self, message: str) -> NoReturn:
        wait_for_the_first()
        message = re.sub(r"^argument ([^:]+): must", r"\1 must", message)
        self.exit(2, f"error: {one_line(message.removeprefix('argument '))}\n")


def number(
    kind: type[int] | type[float],
    valid: Callable[[float], bool],  # false for NaN
    requirement: str,
    percent: bool = False,  # whether users may pass percent by mistake
) -> Callable[[str], float]:
    """An argparse type for valid numbers; for others, "must be REQUIREMENT; got …"."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if valid(value):
            return value
        hint = f". Did you mean {value / 100:g}?" if percent and 1 < value < 100 else ""
        raise argparse.ArgumentTypeError(f"must be {requirement}; got {text}{hint}")

    return parse


positive_int = number(int, lambda x: x >= 1, "a whole number from 1")
nonnegative_int = number(int, lambda x: x >= 0, "a whole number from 0")
positive_float = number(float, lambda x: 0 < x < math.inf, "a number above 0")
nonnegative_float = number(float, lambda x: 0 <= x < math.inf, "a number from 0")
fraction = number(float, lambda x: 0 <= x < 1, "in [0, 1)", percent=True)
bits = number(int, lambda x: 1 <= x <= 16 or x == 32, "1 to 16, or 32 for none")
seed = number(int, lambda x: 0 <= x < 2**63, "a whole number from 0 to 2^63 - 1")


def channels(text: str) -> str:
    """An argparse type for numbers by channel, which stay text: a record keeps it as it is."""
    try:
        channel_values(text, "")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).strip()) from None
    return text


def add_common_options(parser: Parser) -> None:
    """Add MODEL, DATASET and the options that every command takes."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="rn18 rn34 rn50 rn101 rn152, rn8 rn20 rn32 rn44 rn56 rn110, any other "
        "torchvision classification model, timm:NAME, or path/to/file.py:function",
    )
    parser.add_argument(
        "dataset",
        metavar="DATASET",
        help="imagenet, cifar10, digits, folder, or path/to/task.py:function",
    )
    add = parser.group(FIRST).add_argument
    add(
        "--weights",
        metavar="FILE",
        help="dense weights, .pth .th .pt or .safetensors; random: untrained ones, to try things "
        "(default: torchvision's, or the shipped)",
    )
    add(
        "--datapath",
        metavar="DIR",
        help="folder of the images (default: ../imagenet, ../cifar10; digits needs none)",
    )
    add("--nsamples", metavar="N", type=positive_int, default=1024, help="calibration images")
    add_input_options(parser)
    add_run_options(parser)


def add_input_options(parser: Parser) -> None:
    """Add the common options about weights and images."""
    add = parser.group(INPUTS).add_argument
    add(
        "--weights-key",
        metavar="KEY",
        help="which weights in that file, if there are several, such as model or model_ema "
        "(default: those that fit, averaged ones first)",
    )
    add(
        "--classes",
        metavar="FILE",
        help="class names, one a line, in the order of the network's outputs "
        "(default: the class folders, sorted as text)",
    )
    add(
        "--labels",
        metavar="FILE",
        help="labels of the test images, if val/ has no class folders: lines `name label`, or a "
        "label for each image in the order of their names",
    )
    add_preprocessing_options(parser)
    add("--noaug", action="store_true", help="calibration images without augmentation")
    add(
        "--nrounds",
        metavar="N",
        type=positive_int,
        help="passes over the calibration images (default: 10 augmented, 1 with --noaug)",
    )
    add("--batchsize", metavar="N", type=positive_int, default=128, help="images per batch")
    add(
        "--skip-bad-images",
        action="store_true",
        help="leave out images that cannot be read, instead of refusing to start",
    )


def add_preprocessing_options(parser: Parser) -> None:
    """Add the options about how an image becomes the network's input (`preprocessing.py`)."""
    add = parser.group(INPUTS).add_argument
    add(
        "--image-size",
        metavar="N",
        type=positive_int,
        help="side of the network's input in pixels (default: what the network says, or else "
        "imagenet and folder 224, cifar10 32, digits 16)",
    )
    add(
        "--resize",
        metavar="N",
        type=positive_int,
        help="shorter side in pixels, before the centre is cut out (default: what the network "
        "says, or else 8/7 of the image size)",
    )
    add(
        "--crop",
        choices=CROPS,
        help="how a test image becomes square: its centre, or the whole of it, squashed "
        "(default: what the network says, or else center; cifar10 and digits squash)",
    )
    add(
        "--interpolation",
        choices=INTERPOLATIONS,
        help="of resized images (default: what the network says, or else bilinear)",
    )
    for name, what in (("mean", "mean"), ("std", "standard deviation")):
        add(
            f"--{name}",
            metavar="R,G,B",
            type=channels,
            help=f"{what} that pixels in [0, 1] are normalised by, as in 0.5,0.5,127/255; one "
            "value for grey images (default: what the network says, or else ImageNet's)",
        )


def add_run_options(parser: Parser) -> None:
    """Add the common options about where and how to compute."""
    add = parser.group(RUN).add_argument
    add("--seed", metavar="N", type=seed, default=0, help="seed of every random choice")
    add("--device", metavar="auto|cpu|cuda[:N]", default="auto", help="where to compute")
    add(
        "--memory",
        metavar="GB",
        type=positive_float,
        help="working memory of the solver in GB (default: depends on what is free)",
    )
    add(
        "--workers",
        metavar="N",
        type=nonnegative_int,
        help="processes that decode images "
        "(default: 0 for cifar10 and digits, otherwise one per core, 8 at most)",
    )


def add_shards_option(group: argparse._ActionsContainer) -> None:
    """Add --shards."""
    group.add_argument(
        "--shards",
        metavar="N",
        type=positive_int,
        help="sum Hessians as N processes of torchrun would (default: the number of processes)",
    )


def add_damping_option(group: argparse._ArgumentGroup) -> None:
    """Add --rel-damp."""
    group.add_argument(
        "--rel-damp",
        metavar="F",
        type=nonnegative_float,
        default=0.0,
        help="fraction of mean(diag H) added to the diagonal of H",
    )


def add_resume_options(parser: Parser) -> None:
    """Add the options of commands that resume (`resume.py`) and repeat a run (`records.py`)."""
    add = parser.group(RUN).add_argument
    add("--restart", action="store_true", help="start over instead of resuming an interrupted run")
    add(
        "--repeat",
        metavar="RECORD",
        help="repeat the run of a JSON record; further options replace those in it",
    )


# -------------------------------------------------------------------- errors, logging, results


def wait_for_the_first() -> None:
    """In every process but the first, wait before an error: torchrun ends them meanwhile."""
    if rank():
        starting.phase = "starting"  # so that a signal ends the process at once
        time.sleep(GRACE_S)


def command(
    build_parser: Callable[[], argparse.ArgumentParser],
    run: Callable[[argparse.Namespace], None],
    argv: list[str] | None = None,  # None: the process's own
) -> int:
    """A whole command: options, logging, work; returns the exit status."""
    args = build_parser().parse_args(argv)
    if rank():
        setup_logging(logging.ERROR)
        sys.stderr = _NoTerminal(sys.stderr.buffer, line_buffering=True)
    else:
        setup_logging()
    reuse_freed_memory()
    logged.clear()
    return guarded(run, args)


def guarded(body: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Run `body(args)` and return the exit status; user errors are one line on standard error.

    Programming errors are not caught: their traceback is what we want to see.
    """
    status = 2
    try:
        try:
            starting.phase = "working"
            body(args)
            sys.stdout.flush()
        finally:
            starting.phase = "over"
        return 0
    except UserError as error:
        message = str(error)
    except torch.OutOfMemoryError:
        message = "the GPU ran out of memory; pass a smaller --memory or --batchsize"
    except BrokenPipeError:  # the reader of our output has ended (… | head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would complain again at exit
        message = "standard output was closed before everything was written"
    except OSError as error:  # disk full, no permission, …
        message = error.strerror or str(error) or type(error).__name__
        message = f"{error.filename}: {message}" if error.filename else message
    except (MemoryError, RuntimeError) as error:  # the latter for a failed malloc in PyTorch
        if not isinstance(error, MemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        message = "out of memory; pass a smaller --memory or --batchsize"
    except starting.Terminated:
        message, status = "terminated", 143
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    wait_for_the_first()
    tqdm.write(f"error: {one_line(message)}", file=sys.stderr)
    return status


def print_result(line: str) -> None:
    """Print a result, such as `top-1 87.93`; of several processes, only the first prints."""
    if rank() == 0:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


class _NoTerminal(io.TextIOWrapper):
    """Standard error of a process that shows no progress bars, wherever it leads."""

    def isatty(self) -> bool:
        return False


class _LogLines(logging.Handler):
    """Log lines on standard error, above a progress bar rather than through it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
            if record.levelno > logging.INFO:
                line = f"{record.levelname.lower()}: {printable(line)}"
            tqdm.write(line, file=sys.stderr)
        except Exception:
            self.handleError(record)


def setup_logging(level: int = logging.INFO) -> None:
    """Send the log to standard error; calling it again only changes the level."""
    log.setLevel(level)
    if not any(isinstance(handler, _LogLines) for handler in log.handlers):
        log.addHandler(_LogLines())
