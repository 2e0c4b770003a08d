"""memory.py: a budget is divided, kept to, or refused; levelfile.py: what is written comes back."""

from __future__ import annotations

import copy
import math
import multiprocessing
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import main_trueobs
import trueobs
from benchmarks.bench_memory import measure_memory, resident_mb
from obc.solver.errors import UserError
from obc.solver.memory import Needs, in_passes, layer_needs, most_at_a_time
from obc.solver.threads import SpareBuffers
from obc.toolkit import cli
from obc.toolkit.leveldb import LevelFile
from obc.toolkit.modes import QuantMode
from obc.toolkit.resume import RunState
from obc.toolkit.sequential import SequentialCompression


def needs(sums: int, work: int = 1) -> Needs:
    return Needs(sums=sums, layer=2 * sums, inverting=sums, row=work)


def test_passes_hold_the_sums_of_layers_to_come():
    layers = {"a": needs(10), "b": needs(10), "c": needs(10)}
    assert most_at_a_time(layers.values()) == 20 + 30  # b and c wait while a is inverted
    assert in_passes(layers, 50) == [["a", "b", "c"]]
    assert in_passes(layers, 49) == [["a", "b"], ["c"]]
    assert in_passes(layers, 39) == [["a"], ["b"], ["c"]]
    with pytest.raises(UserError, match="too little for a; it needs at least --memory 0.0001"):
        in_passes(layers, 29)


def test_rows_share_what_is_left():
    engine = Needs(sums=10, layer=20, inverting=10, row=1, matrix=5, tasks=4)
    assert engine.rows(100) == 60  # four matrices, whatever the rows
    assert engine.rows(43) == 3  # not room for four tasks: a matrix each
    assert engine.rows(0) == 1
    assert Needs(sums=10, layer=20, inverting=10, row=7).rows(41) == 3


@pytest.mark.parametrize("n", [2, 4])
def test_buffers_of_a_row_are_within_the_bound_for_n_m(n, monkeypatch):
    """4:4 keeps the u's of all steps and their triangle: two d×d matrices a row."""
    lent, sizes = SpareBuffers.lent, []

    @contextmanager
    def watched(spare, name, *shape):
        sizes.append(4 * math.prod(shape[1:]))
        with lent(spare, name, *shape) as buffer:
            yield buffer

    monkeypatch.setattr(SpareBuffers, "lent", watched)
    layer = torch.nn.Linear(512, 1)
    obs = trueobs.TrueOBS(layer)
    obs.add_batch(torch.randn(600, 512, generator=torch.Generator().manual_seed(0)))
    obs.nmprune(n, 4)
    assert len(sizes) == 3 and sum(sizes) <= layer_needs(layer, innermost=True).matrix


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [1, 2], [0, 3], [2]])
def test_levels_come_back(rows, tmp_path):
    file = LevelFile(tmp_path / "levels", (4, 2, 3), torch.float32)
    weights = torch.randn(3, 4, 2, 3)
    file.write(torch.arange(4), torch.zeros(3, 4, 2, 3))
    file.write(torch.tensor(rows), weights[:, rows])
    wanted = torch.zeros_like(weights)
    wanted[:, rows] = weights[:, rows]
    assert all(torch.equal(file.read(level), wanted[level]) for level in range(3))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_solver_keeps_to_its_budget():
    result = measure_memory(16, 2304, 1.0)
    assert result.peak <= 1.15 * result.budget


def peak_of_walk(batches: int, memory_gb: float) -> float:
    """Of both networks in order of execution, in MB over what was resident with the images."""
    torch.set_num_threads(1)
    cli.reuse_freed_memory()
    mode = QuantMode(wbits=4, sequential=True)
    for count, size in ((2, 8), (batches, 64)):  # the first loads and compiles everything
        layers = [nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU()) for _ in range(3)]
        dense = nn.Sequential(*layers, nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten())
        images = [(torch.randn(8, 16, size, size), torch.zeros(8)) for _ in range(count)]
        before = resident_mb("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        compressed, states = copy.deepcopy(dense), (RunState(), RunState())
        walk = SequentialCompression(dense.eval(), compressed, mode, *states, memory_gb=memory_gb)
        walk.run(images)
    return resident_mb("VmHWM") - before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_boundaries_keep_to_the_budget():
    """Two networks' activations at a boundary: 4.2 MB a batch, of which a few more are at work."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        peak = pool.apply(peak_of_walk, (24, 0.02))
    assert peak <= 1.15 * 20 + 12 * 4.2 < 24 * 4.2


def test_too_little_memory_is_one_line(capsys):
    words = ["rn8", "digits", "nmprune", "--memory", "0.001", "--noaug", "--device", "cpu"]
    assert main_trueobs.main(words) == 2
    top1, line = capsys.readouterr().err.splitlines()
    assert top1.startswith("dense: ")
    assert line.startswith("error: 0.001 GB is too little for layer3.0.conv2; it needs at least")


@pytest.mark.parametrize(
    "words",
    [
        "nmprune",
        "nmprune --save {}/x.pth",
        "nmprune --prunem 1000000 --save {}/none/x.pth",
        "unstr --sparse-dir {}/none/of/these",
    ],
)
def test_a_plan_is_told_and_nothing_done(words, tmp_path, capsys):
    """Also without a place for results, with one to be made, and where no layer can be pruned."""
    words = words.format(tmp_path).split()
    assert main_trueobs.main(["rn8", "digits", *words, "--noaug", "--plan"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert 2 <= len(out) <= 9 and all(line.startswith("plan: ") for line in out)
    assert " over the images; memory: up to " in out[0]
    assert not list(tmp_path.iterdir())
