"""Does the solver keep to its budget? Peak memory over what the process had before, and --memory.

    python -m benchmarks.bench_memory --out bench_memory.json

Per layer and budget, in a separate process: a layer with given Hessian sums is pruned without
structure, and its weights at 45 levels are written to disk. The peak is the highest resident memory
from then on (VmHWM, reset), less what was resident before the layer was made and after a small one
had loaded and compiled everything: showing images is outside of the budget, their sums are inside.
Linux only. The figure: peak / budget, at most 1.15.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

if not __package__:  # run by its path, not with -m
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import timing
from obc.solver.memory import layer_needs
from obc.solver.threads import give_back_freed_memory
from obc.toolkit import cli
from obc.toolkit.leveldb import LevelFile
from trueobs import TrueOBS

LEVELS = [1 - 0.9**k for k in range(44)] + [0.99]
CASES = [(128, 576, 2.0), (64, 1152, 1.0), (64, 1152, 1.5), (24, 2304, 1.0), (24, 2304, 2.0)]


@dataclass(frozen=True)
class MemoryFigures:
    """One layer and budget, in MB."""

    rows: int
    columns: int
    budget: float
    peak: float


def resident_mb(key: str) -> float:
    """VmRSS or VmHWM of this process."""
    words = Path("/proc/self/status").read_text().split()
    return int(words[words.index(f"{key}:") + 1]) * 1024 / 1e6


def with_sums(rows: int, d: int, memory: int | None) -> TrueOBS:
    """A layer that has seen its images."""
    obs = TrueOBS(nn.Linear(d, rows), memory=memory)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        obs.add_batch(torch.randn(d // 2, d, generator=generator).relu())
    give_back_freed_memory()  # as calibration ends
    return obs


def prune_to_disk(obs: TrueOBS) -> None:
    """Everything after calibration: the elimination, and all levels into a file."""
    obs.prepare_unstr()
    with tempfile.TemporaryDirectory() as folder:
        file = LevelFile(Path(folder) / "levels", obs.layer.weight.shape, torch.float32)
        for part, weights in obs.level_parts(LEVELS):
            file.write(part, weights)


def peak_mb(rows: int, d: int, memory: int) -> float:
    """Peak of `prune_to_disk`, with the sums, in MB over what was resident before."""
    cli.reuse_freed_memory()
    prune_to_disk(with_sums(8, 192, None))
    before = resident_mb("VmRSS")
    obs = with_sums(rows, d, memory)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    prune_to_disk(obs)
    return resident_mb("VmHWM") - before


def measure_memory(rows: int, d: int, times: float) -> MemoryFigures:
    """In a separate process, with `times` the least memory that suffices."""
    memory = int(times * layer_needs(nn.Linear(d, rows), levels=len(LEVELS)).least)
    pool = multiprocessing.get_context("spawn").Pool(1)
    peak = pool.apply(peak_mb, (rows, d, memory))
    pool.close()
    pool.join()
    return MemoryFigures(rows, d, memory / 1e6, peak)


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="bench_memory.py", description=__doc__.splitlines()[0])
    parser.add_argument("--out", metavar="FILE", help="record, machine and versions, as JSON")
    return parser


def run(args: argparse.Namespace) -> None:
    results = [measure_memory(*case) for case in CASES]
    cli.print_result("| rows | d | budget, MB | peak, MB | peak / budget |\n|---|---|---|---|---|")
    for it in results:
        cli.print_result(
            f"| {it.rows} | {it.columns} | {it.budget:.0f} | {it.peak:.0f} "
            f"| {it.peak / it.budget:.2f} |"
        )
    timing.finish(args, "bench_memory.py", results)


def main(argv: list[str] | None = None) -> int:
    return cli.command(build_parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
