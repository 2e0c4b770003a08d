"""Whether an exported graph computes what the network does, at every layer's input.

The graph as written, without a runtime's own optimisations, and the network in PyTorch see the same
images. At the input of each layer, after it is rounded, and at the outputs, the difference is

    ‖x in the graph − x in PyTorch‖ / ‖x in PyTorch‖

Sums in another order change the last digits. Where inputs are rounded, a few numbers then fall on
the next grid point, a small share of all; a wrong scale, sign or shift is far above that.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from modelutils import evaluating, find_layers
from obc.solver.layers import first_input
from obc.toolkit.export_onnx import contents, package
from quant import ACTIVATION_GRID

if TYPE_CHECKING:
    import onnx_ir as ir

IMAGES = 8
OUTPUTS = "the outputs"
SUMS_IN_ANOTHER_ORDER, NEXT_GRID_POINTS = 1e-4, 0.05  # relative differences


def can_check() -> bool:
    return importlib.util.find_spec("onnxruntime") is not None


def differences(model: nn.Module, graph: ir.Model, images: Tensor) -> dict[str, float]:
    """Relative differences at the layers' inputs, in order of execution, and of the outputs."""
    nodes = {node.name: node for node in graph.graph}
    expected: dict[str, Tensor] = {}

    def see(name: str, args: tuple, kwargs: dict) -> None:
        if name in nodes:
            expected.setdefault(name, first_input(args, kwargs).detach().clone())

    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: see(name, args, kwargs), with_kwargs=True
        )
        for name, layer in find_layers(model).items()
    ]
    try:
        with evaluating(model):
            logits = model(images)
    finally:
        for hook in hooks:
            hook.remove()
    values = [nodes[name].inputs[0] for name in expected]
    found = graph_values(graph, values, images)
    pairs = dict(zip(expected, zip(found[1:], expected.values(), strict=True), strict=True))
    pairs[OUTPUTS] = found[0], logits
    return {name: relative_difference(*pair) for name, pair in pairs.items()}


def graph_values(model: ir.Model, values: list[ir.Value], images: Tensor) -> list[Tensor]:
    """The outputs of a graph, and some of its other values, for a batch of images."""
    onnxruntime, outputs = package("onnxruntime"), list(model.graph.outputs)
    names = [outputs[0].name, *(value.name for value in values)]
    inputs = set(model.graph.inputs)
    model.graph.outputs.extend(
        value for value in dict.fromkeys(values) if value not in inputs and value not in outputs
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(
            contents(model), options, providers=["CPUExecutionProvider"]
        )
    finally:
        del model.graph.outputs[len(outputs) :]
    given = {"images": images.numpy()}
    asked = [name for name in dict.fromkeys(names) if name not in given]
    found = given | dict(zip(asked, session.run(asked, given), strict=True))
    return [torch.from_numpy(found[name]) for name in names]


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖; infinite where the shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    size = float(expected.double().norm())
    distance = float((found.double() - expected.double()).norm())
    return distance / size if size else distance


def wrong_place(model: nn.Module, graph: ir.Model, images: Tensor) -> str:
    """Where a graph first differs from the network beyond rounding, in words; empty if nowhere."""
    grids = [layer._modules.get(ACTIVATION_GRID) for layer in find_layers(model).values()]
    bits = min((grid.bits for grid in grids if grid is not None), default=None)
    allowed = SUMS_IN_ANOTHER_ORDER if bits is None else max(NEXT_GRID_POINTS, 2.0**-bits)
    before = "the images"
    for place, difference in differences(model, graph, images[:IMAGES]).items():
        if not difference <= allowed:
            where = place if place == OUTPUTS else f"the input of {place}"
            return f"{where} differs by {100 * difference:.2g} % from PyTorch's, after {before}"
        before = place
    return ""
