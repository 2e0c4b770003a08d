"""The benchmarks at tiny settings: complete tables and records; wrong answers are noticed."""

from __future__ import annotations

import dataclasses
import json
import mmap
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks import (
    bench_calibration,
    bench_loss,
    bench_modes,
    bench_networks,
    bench_trueobs,
    bench_zoo,
    timing,
)

CPU = torch.device("cpu")
TINY = {  # name: script, words
    "trueobs": (bench_trueobs, "--columns 32 --rows 2 --points 2 --burst 4"),
    "modes": (
        bench_modes,
        "--columns 32 64 --rows 3 --limit-columns 48 --limit-rows 2 --check-steps 64",
    ),
    "unstr": (bench_networks, "rn8 unstr --rows-fraction 0.05 --memory 0.5"),
    "quant": (bench_networks, "rn8 quant --rows-fraction 0.05 --memory 0.5"),
    "calibration": (bench_calibration, "--model rn8 --images 6 --batchsize 4 --image-size 12"),
    "loss": (
        bench_loss,
        "--model rn8 --levels 3 --images 6 --batchsize 4 --image-size 12 --plain-share 1",
    ),
}
COMMON = ["--repeats", "2"]


def tables(text: str) -> list[list[list[str]]]:
    """The cells of all Markdown tables, without the rule below the header."""
    cells: list[list[list[str]]] = []
    for paragraph in text.strip().split("\n\n"):
        lines = [line for line in paragraph.splitlines() if line.startswith("|")]
        rows = [line.strip("|").split("|") for line in lines]
        assert all(set(cell) == {"-"} for cell in rows[1])
        cells.append([rows[0], *rows[2:]])
    return cells


def run(script: ModuleType, words: str, out: Path) -> tuple[int, dict]:
    """Exit status and record."""
    status = script.main([*words.split(), *COMMON, "--out", str(out)])
    return status, json.loads(out.read_text())


@pytest.mark.parametrize("name", TINY)
def test_table_and_record_are_complete(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    script, words = TINY[name]
    status, record = run(script, words, tmp_path / "record.json")
    output = capsys.readouterr()
    assert (status, output.err) == (0, "")
    assert record["command"] == f"benchmarks/{script.__name__.rpartition('.')[2]}.py"
    assert record["environment"]["torch"] == torch.__version__
    assert record["arguments"]["repeats"] == 2
    printed = tables(output.out)
    assert all(len(row) == len(table[0]) for table in printed for row in table)
    assert sum(len(table) - 1 for table in printed) == len(record["results"])
    times = [
        values
        for result in record["results"]
        for key, value in result.items()
        for values in (value.values() if isinstance(value, dict) else [value])
        if key.endswith("_s") or key == "seconds_a_row"
        if isinstance(values, list)
    ]
    assert times and all(len(repeats) == 2 and min(repeats) > 0 for repeats in times)
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_networks_pass_or_their_error_is_in_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in "ab":
            (tmp_path / part / name).mkdir(parents=True)
            pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / part / name / "x.png")
    words = ["rn8", "rn9", "--datapath", str(tmp_path), "--image-size", "12"]
    assert bench_zoo.main([*words, "--out", str(tmp_path / "zoo.json")]) == 0
    ((_, good, bad),) = tables(capsys.readouterr().out)
    assert good[0].strip() == "rn8" and all(" s, " in cell for cell in good[2:])
    assert all("unknown model rn9" in cell for cell in bad[2:])
    results = json.loads((tmp_path / "zoo.json").read_text())["results"]
    assert len(results) == 6 and all(0.05 < result["memory_gb"] < 8 for result in results)


def test_a_figure_says_whether_it_is_extrapolated_or_measured(
    capsys: pytest.CaptureFixture,
) -> None:
    words = TINY["loss"][1].removesuffix("1")
    assert bench_loss.main([*words.split(), "0.2", "--repeats", "1"]) == 0
    assert "| extrapolated from 5 pairs |" in capsys.readouterr().out  # of 8 layers × 3 levels
    assert bench_loss.main([*words.split(), "1", "--repeats", "1"]) == 0
    assert "| measured |" in capsys.readouterr().out


def test_extrapolation_to_all_rows_does_not_scale_the_inverse() -> None:
    layer = bench_networks.LayerFigures("x", 100, 8, 10, [9.0, 3.0, 4.0], 1.0, 0.0, 0, 0.0, [])
    assert layer.seconds == 1 + (4 - 1) * 10


# -- wrong answers ---------------------------------------------------------------------------------


def reversed_order(*words: object) -> object:
    trace = ELIMINATE(*words)
    return dataclasses.replace(trace, order=trace.order.flip(1))


def weights_off(*words: object) -> object:
    trace = ELIMINATE(*words)
    return dataclasses.replace(trace, weights=trace.weights + 0.01)


def off_by_a_percent(solver: object, mode: str, levels: list, file: object) -> float:
    write_s = SOLVE(solver, mode, levels, file)
    if file.path.exists():
        content = np.fromfile(file.path, np.float32)
        (content * np.float32(1.01)).tofile(file.path)
    return write_s


def nearest(solver: object, *_: object) -> float:
    SOLVE(solver, "quant", [], None)
    generator = torch.Generator().manual_seed(0)  # the weights it was made with
    weight = solver.layer.weight
    dense = torch.randn(weight.shape, generator=generator) * (2 / weight[0].numel()) ** 0.5
    weight.data.copy_(solver.quantizer(dense.flatten(1)).view_as(dense))
    return 0.0


def without_the_last_batch(dense: nn.Module, solvers: dict, batches: list, device: object) -> None:
    CALIBRATE(dense, solvers, batches[:-1] or batches, device)


def losses_off(*words: object) -> dict:
    scores = LOSSES(*words)
    return {
        name: {level: value + 2e-3 for level, value in levels.items()}
        for name, levels in scores.items()
    }


ELIMINATE, SOLVE = bench_modes.eliminate, bench_networks.run_solver
CALIBRATE, LOSSES = bench_calibration.calibrate, bench_loss.sensitivity.losses
WRONG = {
    "another order": (
        "modes",
        "benchmarks.bench_modes.eliminate",
        reversed_order,
        "unstructured at d = 32: a choice is",
    ),
    "zeros missing": (
        "modes",
        "benchmarks.bench_modes.eliminate",
        weights_off,
        "groups have other than 2 zeros",
    ),
    "not optimal": (
        "unstr",
        "benchmarks.bench_networks.run_solver",
        off_by_a_percent,
        "remaining weights are not optimal",
    ),
    "nearest": (
        "quant",
        "benchmarks.bench_networks.run_solver",
        nearest,
        "times the error of rounding to nearest",
    ),
    "a batch is missing": (
        "calibration",
        "benchmarks.bench_calibration.calibrate",
        without_the_last_batch,
        "conv1: H differs by",
    ),
    "other losses": (
        "loss",
        "obc.toolkit.sensitivity.losses",
        losses_off,
        "losses differ by 0.002",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_ends_in_an_error(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    which, target, replacement, text = WRONG[name]
    script, words = TINY[which]
    monkeypatch.setattr(target, replacement)
    status, record = run(script, words, tmp_path / "record.json")
    error = capsys.readouterr().err
    assert status == 2 and record["results"]
    assert error.startswith("error: wrong answers") and error.count("\n") == 1
    assert text in error


@pytest.mark.parametrize("mode", ["quantise", "2:4", "4-blocks"])
def test_the_textbook_loop_of_every_mode_notices_a_swap(mode: str) -> None:
    """Two units of the order are exchanged, far from a tie."""
    problem = timing.random_problem(32, 2, CPU, 0)
    grid = bench_modes.fit_weight_grid(problem.W[:, 0], 4)
    order = bench_modes.engine(mode, problem, grid).order
    assert bench_modes.follow(mode, problem, grid, order) <= bench_modes.NEAR_TIE
    swapped = order.clone()
    swapped[:, :4], swapped[:, 8:12] = order[:, 8:12], order[:, :4]
    assert bench_modes.follow(mode, problem, grid, swapped) > bench_modes.NEAR_TIE


# -- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script, words, line",
    [
        (bench_modes, "--columns 30", "--columns 30 must be a multiple of 4"),
        (bench_networks, "rn18 unstr --rows-fraction 1.5", "--rows-fraction must be at most 1"),
        (bench_networks, "rn99 quant", "unknown model rn99"),
        (bench_networks, "rn18 struct", "MODE"),
        (bench_networks, "rn18 unstr --scratch /nowhere", "--scratch /nowhere: no such folder"),
        (bench_loss, "--weights x.pth", "--weights and --datapath go with --dataset"),
        (bench_loss, "--plain-share 2", "--plain-share must be at most 1"),
        (bench_loss, "--model rn8 --levels 46", "--levels 46 is more than the grid's 45"),
        (bench_calibration, "--images 0", "--images must be a whole number from 1"),
        (bench_trueobs, "--columns 4", "--burst 8 is more than --columns 4"),
        (bench_modes, "--device gpu", "--device must be auto, cpu, cuda"),
        (bench_modes, "--out /dev/null/x.json", "/dev/null/x.json"),
    ],
)
def test_user_errors_are_one_line(
    script: ModuleType, words: str, line: str, capsys: pytest.CaptureFixture
) -> None:
    try:
        status = script.main(words.split())
    except SystemExit as error:
        status = error.code
    output = capsys.readouterr()
    assert (status, output.out, output.err.count("\n")) == (2, "", 1)
    assert line in output.err and output.err.startswith("error: ")


def test_peak_memory_starts_at_the_reset() -> None:
    peak = timing.PeakMemory(CPU)
    before = peak.bytes()
    with mmap.mmap(-1, 64 << 20) as block:  # not from malloc, which may reuse freed pages
        block.write(b"1" * len(block))
        assert 56 << 20 < peak.bytes() - before < 160 << 20
    if Path("/proc/self/clear_refs").exists():
        peak.reset()
        assert peak.bytes() - before < 32 << 20


def test_goals_are_upper_or_lower_limits() -> None:
    assert timing.against(2.0, 1.8) == "2.00 (≤ 1.8: missed)"
    assert timing.against(2.6, 2.5, most=False) == "2.60 (≥ 2.5: met)"


SCRIPTS = sorted(Path(timing.__file__).parent.glob("bench_*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_readme_names_every_script(script: Path) -> None:
    readme = script.with_name("README.md").read_text()
    assert f"`{script.name}`" in readme and f"benchmarks.{script.stem}" in readme
