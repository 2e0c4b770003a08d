"""Seconds of every layer at every level, measured in a runtime (database.py … timings).

All layers are at one level at a time, so that as many networks are exported as there are levels,
each as export.py does it: channels cut, weights in integers. The runtime's own profile has the time
of every operation. The graph's nodes carry the names of layers (export_onnx.py), and before it goes
to the runtime, those between layers get the name of the one whose output they work on; whatever the
runtime makes of them, merged or moved, keeps a part of these names, and what has none belongs to
the layer before it in the network (OpenVINO: in order of execution). So a layer's time includes its
norm, activation, sum and rounding. A profile takes time itself and does not see what a runtime does
around the operations: its times are scaled to add up to those of the network without a profile.

Every network takes turns with the dense one. What else the machine does meets both: seconds are
those of the level, times the dense network's median in all measurements over that in this one. All
are medians of the rounds after a warm-up.
"""

from __future__ import annotations

import copy
import json
import statistics
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from modelutils import find_layers
from obc.solver.errors import log
from obc.solver.progress import progress
from obc.toolkit import export_onnx, export_sums
from obc.toolkit.costs import DENSE
from obc.toolkit.export_cut import cut_channels
from obc.toolkit.export_measure import ONNX_RUNTIME, OPENVINO, RUNTIMES, openvino_request
from obc.toolkit.leveldb import Database
from obc.toolkit.resume import Notes

if TYPE_CHECKING:
    import onnx_ir as ir

TIMED = {"ort": ONNX_RUNTIME, "openvino": OPENVINO}  # --runtime
WARM_UP, LEAST_TIMED, MOST_TIMED, SECONDS_A_LEVEL = 3, 7, 60, 2.0
FAR_OFF = 0.15  # of the network's time

Times = dict[str, float]  # layer → seconds


@dataclass(frozen=True)
class TimingOptions:
    """How networks are exported and run."""

    runtime: str = "ort"
    batch: int = 1
    threads: int = 1
    int8_sums: bool = False


def runtime_version(runtime: str) -> str:
    """The runtime and its version, for the record."""
    return f"{TIMED[runtime]} {export_onnx.package(RUNTIMES[TIMED[runtime]][0]).__version__}"


# -- the network -----------------------------------------------------------------------------------


def exported(
    model: nn.Module, image_shape: tuple[int, int, int], sums_images: Tensor | None
) -> bytes:
    """A network as export.py writes it, in which every node has the name of a layer.

    sums_images: (n, 3, s, s), for --int8-sums.
    """
    generator = torch.Generator().manual_seed(0)
    smaller, _ = cut_channels(model, torch.randn(2, *image_shape, generator=generator))
    graph, _ = export_onnx.quantised_graph(smaller, image_shape)
    if sums_images is not None:
        export_sums.round_sums(graph, sums_images)
    name_nodes(graph, list(find_layers(model)))
    return export_onnx.contents(graph)


def name_nodes(graph: ir.Model, layers: Sequence[str]) -> None:
    """Name nodes and their outputs after layers: `layer<number>_<node>`."""
    numbers = {layer: number for number, layer in enumerate(layers)}
    nodes = list(graph.graph)
    own = {node.name: numbers[node.name] for node in nodes if node.name in numbers}
    # what a second call is named
    own |= {
        node.name: numbers[layer]
        for node in nodes
        if node.name and (layer := node.name.rpartition(".")[0]) in numbers and node.name not in own
    }
    steps = [
        (own.get(node.name), [x.name for x in node.inputs if x], [x.name for x in node.outputs])
        for node in nodes
    ]
    results = set(graph.graph.outputs)
    for index, (node, owner) in enumerate(zip(nodes, owners(steps), strict=True)):
        if owner is not None:
            node.name = f"layer{owner}_{index}"
            for place, value in enumerate(node.outputs):
                if value not in results:
                    value.name = f"layer{owner}_{index}_{place}"


def owners(
    steps: Sequence[tuple[int | None, list[str], list[str]]],  # own layer, inputs, outputs; sorted
) -> list[int | None]:
    """The layer that each step of a network belongs to.

    Its own; else that of the step before it, by the first input that has one; else the next.
    """
    found: dict[str, int] = {}  # value → layer
    result: list[int | None] = []
    for own, inputs, outputs in steps:
        owner = own if own is not None else next((found[x] for x in inputs if x in found), None)
        result.append(owner)
        found |= dict.fromkeys(outputs, owner) if owner is not None else {}
    readers: dict[str, int] = {}
    for index in range(len(steps) - 1, -1, -1):
        _, inputs, outputs = steps[index]
        if result[index] is None:
            result[index] = next((readers[x] for x in outputs if x in readers), None)
        if result[index] is not None:
            readers |= dict.fromkeys(inputs, result[index])
    return result


def number_in(text: str) -> int | None:
    """The layer's number in what a runtime made of a node's name.

    >>> number_in("fused layer12_40_0_nchwc"), number_in("ReorderOutput_token_3")
    (12, None)
    """
    _, mark, rest = text.partition("layer")
    digits, underscore, _ = rest.partition("_")
    return int(digits) if mark and underscore and digits.isdecimal() else None


# -- profiles --------------------------------------------------------------------------------------


class Profile(ABC):
    """A network in a runtime that tells how long each of its operations took."""

    @abstractmethod
    def run(self, images: np.ndarray) -> None:
        """One round."""

    @abstractmethod
    def rounds(self) -> list[dict[int, float]]:
        """The seconds of every layer, by number, in every round so far; at the end."""


class OrtProfile(Profile):
    """Nodes of ONNX Runtime's profile; which layer they are of, its optimised graph says."""

    def __init__(self, contents: bytes, threads: int) -> None:
        onnxruntime = export_onnx.package("onnxruntime")
        self.folder = tempfile.TemporaryDirectory(prefix="timings")
        optimised = Path(self.folder.name) / "optimised.onnx"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 4
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(self.folder.name) / "profile")
        options.optimized_model_filepath = str(optimised)
        self.session = onnxruntime.InferenceSession(
            contents, options, providers=["CPUExecutionProvider"]
        )
        nodes = export_onnx.package("onnx").load(optimised).graph.node
        steps = [(number_in(node.name), list(node.input), list(node.output)) for node in nodes]
        names = [node.name for node in nodes]
        self.owners = dict(zip(names, owners(steps), strict=True))

    def run(self, images: np.ndarray) -> None:
        self.session.run(None, {"images": images})

    def rounds(self) -> list[dict[int, float]]:
        events = json.loads(Path(self.session.end_profiling()).read_bytes())
        self.folder.cleanup()
        done, now = [], dict[int, float]()
        for event in events:
            name = event["name"]
            if event["cat"] == "Node" and name.endswith("_kernel_time"):
                owner = self.owners.get(name.removesuffix("_kernel_time"))
                if owner is not None:
                    now[owner] = now.get(owner, 0.0) + event["dur"] * 1e-6
            elif name == "model_run":
                done.append(now)
                now = {}
        return done


class OpenVinoProfile(Profile):
    """OpenVINO's counters, in order of execution; they keep the names of our nodes."""

    def __init__(self, contents: bytes, threads: int) -> None:
        self.request = openvino_request(contents, threads, "f32", profile=True)
        self.done: list[dict[int, float]] = []

    def run(self, images: np.ndarray) -> None:
        self.request.infer([images])
        now, owner = dict[int, float](), 0
        for operation in self.request.profiling_info:
            own = number_in(operation.node_name)
            owner = owner if own is None else own
            now[owner] = now.get(owner, 0.0) + operation.real_time.total_seconds()
        self.done.append(now)

    def rounds(self) -> list[dict[int, float]]:
        return self.done


PROFILES: dict[str, type[Profile]] = {"ort": OrtProfile, "openvino": OpenVinoProfile}


# -- measuring -------------------------------------------------------------------------------------


def times_beside(
    dense: bytes,
    level: bytes,
    layers: Sequence[str],
    images: np.ndarray,  # (n, 3, s, s)
    options: TimingOptions,
) -> dict[str, Times | float]:
    """The seconds of layers in two networks, and of each as a whole, in turns."""
    networks = {"dense": dense, "level": level}
    runtime, threads = options.runtime, options.threads
    profiles = {name: PROFILES[runtime](net, threads) for name, net in networks.items()}
    runners = {name: RUNTIMES[TIMED[runtime]][1](net, threads) for name, net in networks.items()}
    wholes: dict[str, list[float]] = {name: [] for name in networks}
    began = time.perf_counter()
    for done in range(WARM_UP + MOST_TIMED):
        if done >= WARM_UP + LEAST_TIMED and time.perf_counter() - began > SECONDS_A_LEVEL:
            break
        for name in networks:
            profiles[name].run(images)
            start = time.perf_counter()
            runners[name](images)
            wholes[name].append(time.perf_counter() - start)
    return {name: layer_medians(profile, layers) for name, profile in profiles.items()} | {
        f"{name} whole": statistics.median(times[WARM_UP:]) for name, times in wholes.items()
    }


def layer_medians(profile: Profile, layers: Sequence[str]) -> Times:
    """Median seconds of layers after the warm-up; 0 for those that the runtime does not run."""
    rounds = profile.rounds()[WARM_UP:]
    return {
        layer: statistics.median(times.get(number, 0.0) for times in rounds)
        for number, layer in enumerate(layers)
    }


def measure(
    db: Database,
    model: nn.Module,  # dense, on the CPU
    calibration: Tensor,  # (n, 3, s, s), for --int8-sums
    options: TimingOptions,
    notes: Notes,
) -> tuple[dict[str, Times], dict[str, dict[str, float]]]:
    """Seconds of every layer, `dense` and at each level; and, by level, in profile and network."""
    image_shape = tuple(calibration.shape[1:])
    layers, dense = list(find_layers(model)), exported(model, image_shape, None)
    generator = np.random.default_rng(0)
    images = generator.normal(size=(options.batch, *image_shape)).astype(np.float32)
    for level in progress("timing", db.levels):
        if notes.get(level) is None:
            at_level = copy.deepcopy(model)
            db.stitch(at_level, dict.fromkeys(db.layers, level))
            network = exported(at_level, image_shape, calibration if options.int8_sums else None)
            notes.add(level, times_beside(dense, network, layers, images, options))
    return combined({level: notes.get(level) for level in db.levels}, layers)


def combined(
    measured: Mapping[str, Mapping], layers: Sequence[str]
) -> tuple[dict[str, Times], dict[str, dict[str, float]]]:
    """One table of all measurements; see the module docstring."""
    usual = statistics.median(times["dense whole"] for times in measured.values())
    seconds, wholes = {layer: dict[str, float]() for layer in layers}, {}
    dense_sum = {level: sum(times["dense"].values()) for level, times in measured.items()}
    shares = {
        layer: statistics.median(
            x["dense"][layer] / dense_sum[level] for level, x in measured.items()
        )
        for layer in layers
    }
    for layer in layers:
        seconds[layer][DENSE] = usual * shares[layer] / sum(shares.values())
    for level, times in measured.items():
        total, whole = sum(times["level"].values()), times["level whole"]
        factor = usual / times["dense whole"]
        for layer in layers:
            seconds[layer][level] = times["level"][layer] / total * whole * factor
        wholes[level] = {"profiled": total * factor, "whole": whole * factor}
    warn_of_gaps(wholes)
    return seconds, wholes


def warn_of_gaps(wholes: Mapping[str, Mapping[str, float]]) -> None:
    """Warn where the layers in a profile do not add up to the network."""
    ratios = {level: x["profiled"] / x["whole"] for level, x in wholes.items()}
    far = {level: ratio for level, ratio in ratios.items() if abs(ratio - 1) > FAR_OFF}
    if far:
        worst = max(far, key=lambda level: abs(far[level] - 1))
        log.warning(
            "at %d of %d levels the layers' profile does not add up to the network's time, to "
            "which it is scaled; worst, %s: %.2f times. Is the machine busy, or the network small?",
            len(far),
            len(ratios),
            worst,
            far[worst],
        )
