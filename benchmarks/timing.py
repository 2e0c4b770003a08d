"""What the benchmarks share: options, clocks, peak memory, a problem to solve, the record.

Times are `time.perf_counter` around work that has finished on the GPU, too. Things compared with
each other are timed in turn, round after round, after a warm-up of each, so that other load on the
machine affects all of them. Peak memory on a CPU is the kernel's own high-water mark of the
resident set (`VmHWM`), which misses nothing between two samples and can be reset; on a GPU it is
that of PyTorch's allocator. A wrong answer ends a benchmark with an error, after its record is
written.
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

TimedWork = Callable[[], object]


# -- options and record ----------------------------------------------------------------------------


def build_parser(prog: str, description: str, repeats: int = 5) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark has."""
    parser = cli.Parser(prog=prog, description=description)
    add = parser.add_argument
    text = "timed runs after a warm-up"
    add("--repeats", metavar="N", type=cli.positive_int, default=repeats, help=text)
    add(
        "--seed", metavar="N", type=cli.nonnegative_int, default=0, help="seed of everything random"
    )
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
    script: str,  # file name of the benchmark
    results: Sequence[Any],  # dataclasses
    faults: Sequence[str] = (),  # wrong answers
) -> None:
    """Write the record; then raise UserError if an answer was wrong."""
    if args.out:
        content = [asdict(result) for result in results]
        records.write_run(args.out, f"benchmarks/{script}", vars(args), results=content)
    if faults:
        raise errors.UserError(f"wrong answers, so these times are worthless: {'; '.join(faults)}")


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


def seconds_of(work: TimedWork, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def alternating(
    works: Mapping[str, TimedWork],
    device: torch.device,
    repeats: int,
    warm_up: bool = True,  # run each once before, untimed; the first run compiles
) -> dict[str, list[float]]:
    """Seconds of each, one entry per round."""
    for work in works.values() if warm_up else ():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(seconds_of(work, device))
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
        with contextlib.suppress(OSError):  # elsewhere: the peak since the process started
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
class RandomProblem:
    """Rows to compress: correlated, rectified inputs and normal weights."""

    W: Tensor  # (R, 1, d) float32
    inverse: Inverse  # one system
    system: Tensor  # (R,) zeros


def random_problem(d: int, rows: int, device: torch.device, seed: int) -> RandomProblem:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(d) + 0.5 * torch.randn(d, d, generator=generator) / d**0.5
    x = torch.randn(4 * d, d, generator=generator).to(device) @ mixing.to(device)
    x = x.relu().double()
    H = 2 / len(x) * x.T @ x
    W = torch.randn(rows, 1, d, generator=generator).to(device)
    return RandomProblem(
        W, damped_inverse(H[None]), torch.zeros(rows, dtype=torch.int64, device=device)
    )
