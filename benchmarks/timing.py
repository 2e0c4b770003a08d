"""What the timing scripts share: options, clocks, peak memory, a problem to solve, the record.

A time is `time.perf_counter` around work that a GPU has finished as well. Things compared with each
other are timed in turn, round after round, after a warm-up of each: what else the machine does then
meets all of them. Peak memory on a CPU is the kernel's own high-water mark of the resident set
(`VmHWM`), which misses nothing between two samples and can be set back; on a GPU that of PyTorch's
allocator. An answer that is wrong ends a script with an error, after its record is written.
"""

from __future__ import annotations

import argparse
import contextlib
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from obc.inputs import files
from obc.solver import errors
from obc.solver.distributed import resolve_device
from obc.solver.inverse import Inverse, damped_inverse
from obc.toolkit import cli, records

Work = Callable[[], object]


# -- options and record ----------------------------------------------------------------------------


def build_parser(prog: str, description: str, repeats: int = 5) -> argparse.ArgumentParser:
    """A parser with the options that every script has."""
    parser = cli.Parser(prog=prog, description=description)
    add = parser.add_argument
    add("--repeats", metavar="N", type=cli.positive_int, default=repeats, help="after a warm-up")
    add("--seed", metavar="N", type=cli.nonnegative_int, default=0, help="of all that is random")
    add("--device", metavar="auto|cpu|cuda[:N]", default="cpu", help="where to compute")
    add("--out", metavar="FILE", help="record of all times, machine and versions, as JSON")
    return parser


def start(args: argparse.Namespace) -> torch.device:
    """Check --out and --device before any work."""
    if args.out:
        files.check_writable(args.out)
    return resolve_device(args.device)


def finish(
    args: argparse.Namespace,
    script: str,  # its file's name
    results: Sequence[Any],  # dataclasses
    faults: Sequence[str] = (),  # answers that are wrong
) -> None:
    """Write the record; then a UserError if what was timed gave a wrong answer."""
    if args.out:
        record = {
            "command": f"benchmarks/{script}",
            "arguments": vars(args),
            "environment": records.environment(),
            "results": [asdict(result) for result in results],
        }
        records.write_record(args.out, record)
    if faults:
        raise errors.UserError(
            f"wrong answers, so these times are worth nothing: {'; '.join(faults)}"
        )


def against(value: float, goal: float | None, most: bool = True, digits: str = ".2f") -> str:
    """A figure with its goal, and whether it is met.

    >>> against(1.234, 1.3), against(2.4, 2.5, most=False), against(7.0, None)
    ('1.23 (≤ 1.3: met)', '2.40 (≥ 2.5: missed)', '7.00')
    """
    if goal is None:
        return f"{value:{digits}}"
    met = value <= goal if most else value >= goal
    return f"{value:{digits}} ({'≤' if most else '≥'} {goal:g}: {'met' if met else 'missed'})"


# -- clocks ----------------------------------------------------------------------------------------


def seconds(work: Work, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def alternating(
    works: Mapping[str, Work],
    device: torch.device,
    repeats: int,
    warm_up: bool = True,  # each once before, untimed; it compiles, on first use
) -> dict[str, list[float]]:
    """Seconds of each, once a round."""
    for work in works.values() if warm_up else ():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(seconds(work, device))
    return times


class PeakMemory:
    """Highest memory in use since `reset`, in bytes: of the GPU, or the resident set."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        with contextlib.suppress(OSError):  # another system: since the process started, then
            Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            words = Path("/proc/self/status").read_text().split()
            return int(words[words.index("VmHWM:") + 1]) * 1024
        except (OSError, ValueError):
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# -- a problem -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """Rows to compress: correlated, rectified inputs and normal weights."""

    W: Tensor  # (R, 1, d) float32
    inverse: Inverse  # one system
    system: Tensor  # (R,) zeros


def make_problem(d: int, rows: int, device: torch.device, seed: int) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(d) + 0.5 * torch.randn(d, d, generator=generator) / d**0.5
    x = torch.randn(4 * d, d, generator=generator).to(device) @ mixing.to(device)
    x = x.relu().double()
    H = 2 / len(x) * x.T @ x
    W = torch.randn(rows, 1, d, generator=generator).to(device)
    return Problem(W, damped_inverse(H[None]), torch.zeros(rows, dtype=torch.int64, device=device))
