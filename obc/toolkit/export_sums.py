"""Rounding residual sums, too (--int8-sums): for runtimes whose integer layers round their output.

ONNX Runtime computes a convolution in integers if its output is rounded as well. In an exact export
a residual sum is not, so the convolutions before it run in float32. Here every operand of a sum
that a layer computes is rounded to 8 bits, on a grid that is fitted to the first calibration batch,
like those of layers' inputs (quant.py); sums and poolings read a tensor that is already rounded in
that form; and pooling, which changes no value, comes after the rounding. This is another network,
with an accuracy of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from obc.toolkit.export_onnx import GraphEditor, contents, package
from quant import fit_activation_grid

if TYPE_CHECKING:
    import onnx_ir as ir

SUM_BITS = 8
LAYERS_OF_SUMS = ("Conv", "Gemm", "MatMul")


def round_sums(model: ir.Model, images: Tensor) -> int:
    """Round the operands of sums in a graph, in place; images: (n, 3, s, s). Returns how many."""
    editor = GraphEditor(model)
    _share_rounded(editor)
    operands = [
        (node, index)
        for node in editor.graph
        if node.op_type == "Add"
        for index, x in enumerate(node.inputs)
        if x.producer() is not None
        and x.producer().op_type in LAYERS_OF_SUMS
        and not any(other.const_value for other in node.inputs)
    ]
    values = dict.fromkeys(node.inputs[index] for node, index in operands)
    for number, (x, seen) in enumerate(
        zip(values, _values(model, list(values), images), strict=True)
    ):
        grid = fit_activation_grid(seen, SUM_BITS)
        ends = float(grid.scale), int(grid.zero), int(grid.maxq)
        readers = [(node, index) for node, index in operands if node.inputs[index] is x]
        rounded = editor.round_trip(x, ends, f"sum{number}", readers[0][0])
        for node, index in readers:
            node.replace_input_with(index, rounded)
    _pool_rounded(editor)
    editor.tidy()
    return len(values)


def _share_rounded(editor: GraphEditor) -> None:
    """Let sums and poolings read the rounded form of a tensor that a layer reads rounded."""
    for node in [node for node in editor.graph if node.op_type == "QuantizeLinear"]:
        x, decoded = node.inputs[0], [use.node for use in node.outputs[0].uses()][0].outputs[0]
        for use in list(x.uses()):
            if use.node is not node and use.node.op_type in ("Add", "MaxPool"):
                use.node.replace_input_with(use.idx, decoded)


def _pool_rounded(editor: GraphEditor) -> None:
    """Round before a maximum instead of after it, which is the same."""
    for pool in [node for node in editor.graph if node.op_type == "MaxPool"]:
        after = [use.node for use in pool.outputs[0].uses()]
        for number, node in enumerate(node for node in after if node.op_type == "QuantizeLinear"):
            scale, zero = (x.const_value.numpy() for x in node.inputs[1:])
            if zero.dtype.itemsize == 1 and number == 0:
                grid = float(scale), int(zero), 255
                rounded = editor.round_trip(pool.inputs[0], grid, f"{pool.name}.input", pool)
                pool.replace_input_with(0, rounded)


def _values(model: ir.Model, values: list[ir.Value], images: Tensor) -> list[Tensor]:
    """What some tensors of a graph are for a batch of images."""
    outputs = list(model.graph.outputs)
    model.graph.outputs.extend(value for value in values if value not in outputs)
    try:
        session = package("onnxruntime").InferenceSession(
            contents(model), providers=["CPUExecutionProvider"]
        )
        found = session.run([value.name for value in values], {"images": images.numpy()})
    finally:
        del model.graph.outputs[len(outputs) :]
    return [torch.from_numpy(value) for value in found]
