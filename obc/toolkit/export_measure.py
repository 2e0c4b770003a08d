"""What an exported network is worth: size, latency and outputs, in the runtimes that are installed.

Latencies are medians of interleaved rounds after a warm-up: every network of a runtime in turn, so
that what else the machine does meets all alike. Each network is compared with the dense one in
float32 and, in OpenVINO, with what it makes of that by default (bfloat16 where the processor has
it). Outputs are compared with those of PyTorch, which rounds as the checkpoint says, on the test
images; how far PyTorch is from itself, with other batches in another memory layout, is the floor.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modelutils import evaluating
from obc.solver.errors import UserError
from obc.solver.progress import progress
from obc.toolkit.evaluation import BatchFigures, Evaluation
from obc.toolkit.export_onnx import REQUIREMENTS, package

Runner = Callable[[np.ndarray], np.ndarray]  # images (n, 3, s, s) → logits (n, classes)

BATCHES = (1, 16)
SECONDS, MOST_ROUNDS, LEAST_ROUNDS = 4.0, 50, 5  # of a measurement
ONNX_RUNTIME, OPENVINO = "ONNX Runtime", "OpenVINO"


# -- runtimes --------------------------------------------------------------------------------------


def onnx_runtime(contents: bytes, threads: int = 0, plain: bool = False) -> Runner:
    """A network in ONNX Runtime on the CPU; 0 threads for all; plain: run as written."""
    onnxruntime = package("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    if plain:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(contents, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0]


@cache
def openvino_core() -> Any:
    """The one `Core` of this process.

    Each replaces the stack that signals are handled on and, when it goes, frees its own. After two
    of them the next signal, such as that of a child that ended, would be a segmentation fault.
    """
    return package("openvino").Core()


def openvino_request(contents: bytes, threads: int, precision: str | None, profile: bool) -> Any:
    """A network in OpenVINO on the CPU; 0 threads for all; precision None for its default."""
    core = openvino_core()
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    settings |= {"PERF_COUNT": True} if profile else {}
    settings |= {"INFERENCE_PRECISION_HINT": precision} if precision else {}
    return core.compile_model(core.read_model(contents), "CPU", settings).create_infer_request()


def openvino(contents: bytes, threads: int = 0, precision: str | None = "f32") -> Runner:
    """A network in OpenVINO; arguments as above."""
    request = openvino_request(contents, threads, precision, profile=False)
    return lambda images: request.infer([images])[0].copy()


RUNTIMES = {ONNX_RUNTIME: ("onnxruntime", onnx_runtime), OPENVINO: ("openvino", openvino)}


def installed_runtimes() -> list[str]:
    """Raises UserError if there is none."""
    names = [name for name, (module, _) in RUNTIMES.items() if importlib.util.find_spec(module)]
    if not names:
        raise UserError(f"--measure needs onnxruntime or openvino: pip install -r {REQUIREMENTS}")
    return names


# -- latency ---------------------------------------------------------------------------------------


@dataclass
class Latency:
    """Seconds of a network for a batch; an entry of the record."""

    runtime: str
    network: str  # exported, float32, default
    batch: int
    threads: int  # 0 for all
    seconds: float | None  # median; None if the runtime cannot run it
    rounds: int
    reason: str = ""  # why it cannot


def medians(runners: dict[str, Runner], images: np.ndarray) -> dict[str, tuple[float, int]]:
    """Median seconds and rounds of each, interleaved."""
    times: dict[str, list[float]] = {name: [] for name in runners}
    for run in runners.values():
        run(images)
        run(images)
    began = time.perf_counter()
    for done in range(MOST_ROUNDS):
        if done >= LEAST_ROUNDS and time.perf_counter() - began > SECONDS:
            break
        for name, run in runners.items():
            start = time.perf_counter()
            run(images)
            times[name].append(time.perf_counter() - start)
    return {name: (statistics.median(seconds), len(seconds)) for name, seconds in times.items()}


def latencies(
    exported: bytes, dense: bytes, image_shape: tuple[int, int, int], runtime: str
) -> list[Latency]:
    """An exported network beside the dense one, for every batch and number of threads."""
    make, found = RUNTIMES[runtime][1], []
    for threads in (1, 0):
        networks: dict[str, tuple] = {"exported": (exported, threads), "float32": (dense, threads)}
        if runtime == OPENVINO:
            networks["default"] = (dense, threads, None)
        runners, reasons = {}, {}
        for name, words in networks.items():
            try:
                runners[name] = make(*words)
            except Exception as error:  # a type or operator that this runtime lacks
                reasons[name] = str(error).strip().splitlines()[-1][:200]
        for batch in BATCHES:
            generator = np.random.default_rng(0)
            images = generator.normal(size=(batch, *image_shape)).astype(np.float32)
            times = medians(runners, images)
            for name in networks:
                seconds, rounds = times.get(name, (None, 0))
                reason = reasons.get(name, "")
                found.append(Latency(runtime, name, batch, threads, seconds, rounds, reason))
    return found


def runs_exported(found: list[Latency], runtime: str) -> bool:
    """Whether a runtime can run the exported network."""
    return all(x.seconds for x in found if (x.runtime, x.network) == (runtime, "exported"))


# -- outputs ---------------------------------------------------------------------------------------


def evaluations(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], runners: dict[str, Runner]
) -> dict[str, Evaluation]:
    """PyTorch, PyTorch in another layout, and each runner, each compared with PyTorch."""
    names = ("PyTorch", "PyTorch, other batches", *runners)
    figures: dict[str, list[BatchFigures]] = {name: [] for name in names}
    with evaluating(model):
        for images, labels in progress("exported network", batches):
            reference = model(images)
            halves = images.to(memory_format=torch.channels_last).split(-(-len(images) // 2))
            outputs = [reference, torch.cat([model(half) for half in halves])]
            outputs += [torch.from_numpy(run(images.numpy())) for run in runners.values()]
            for name, logits in zip(names, outputs, strict=True):
                figures[name].append(BatchFigures.of(logits, labels, reference))
    return {name: Evaluation.of(one) for name, one in figures.items()}


# -- a page of it ----------------------------------------------------------------------------------


def markdown_table(rows: list[list[str]]) -> str:
    """Rows under a head, as Markdown; the first column to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(
        "| "
        + " | ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in rows
    )


def latency_table(found: list[Latency]) -> str:
    rows = [["runtime, network", "batch", "threads", "ms", "speed-up"]]
    base = {(x.runtime, x.batch, x.threads): x.seconds for x in found if x.network == "float32"}
    for x in found:
        times = base[x.runtime, x.batch, x.threads]
        ratio = f"{times / x.seconds:.2f} ×" if x.seconds and times else ""
        ms = f"{1e3 * x.seconds:.2f}" if x.seconds else "cannot run"
        threads = str(x.threads or "all")
        rows.append([f"{x.runtime}, {x.network}", str(x.batch), threads, ms, ratio])
    return markdown_table(rows)


def evaluation_table(found: dict[str, Evaluation]) -> str:
    rows = [["network", "top-1", "same class", "KL"]]
    rows += [
        [name, f"{x.top1:.2f} %", f"{x.agreement:.2f} %", f"{x.kl:.2g}"]
        for name, x in found.items()
    ]
    return markdown_table(rows)
