"""A compressed network as an ONNX graph of integer weights (QuantizeLinear, DequantizeLinear).

Where a layer's weight is read and where its input is rounded, a copy of the network calls an
operator of ours, obc::Weight or obc::Input, with the layer's name. torch.onnx.export carries these
marks into the graph, whatever it renames or merges; each is then replaced:

    obc::Weight   codes ─▶ DequantizeLinear, a scale for each output channel
    obc::Input    x ─▶ (Clip) ─▶ QuantizeLinear ─▶ DequantizeLinear, with the checkpoint's own grid

so that the graph rounds where the checkpoint rounds and nowhere else. Every layer's input has a
mark, which disappears where it is not rounded; the node that reads it is given the layer's name.
Codes are stored as INT8, INT4 or INT2 if the grid is symmetric, W = Δ (q − 2^(b−1)), and as UINT8,
UINT4 or UINT2 with zero points if it is not; 3 bits take 4, 5 to 7 take 8. Where a layer's input is
rounded, 2 bits take 4: ONNX Runtime makes an integer convolution of that, and has none for INT2.
Inputs are UINT8, or UINT16 above 8 bits, clipped to their grid first if it has fewer codes than the
type.

A batch norm y ↦ f·y + … behind a layer that is called once goes into scale and bias: Δ becomes f·Δ,
the codes stay. If f < 0, codes change sign instead of the scale: q − z = −((2^b − 1 − q) − (2^b − 1
− z)) for unsigned codes, q ↦ −q for signed ones, unless one is the type's lowest, which has no
negative: then the scale is negative. f = 0 makes all of a channel's codes z.
"""

from __future__ import annotations

import copy
import importlib
import io
import logging
import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from modelutils import evaluating, find_layers
from obc.inputs.files import atomic_write
from obc.solver.errors import UserError
from obc.toolkit.export_codes import Codes, OffGrid, weight_codes
from quant import ACTIVATION_GRID, Grid, set_activation_grid

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN, INPUT, WEIGHT = "obc", "Input", "Weight"
OPSET, OPSET_OF_2_BITS = 21, 25
TINY = 1e-30  # scales below it are 0: the square of a smaller one is no float32
REQUIREMENTS = "requirements-export.txt"


def package(name: str) -> ModuleType:
    """An optional package; raises UserError that says what to install if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"this needs the package {name} ({error}): pip install -r {REQUIREMENTS}"
        ) from None


# -- what is to be exported ------------------------------------------------------------------------


@dataclass
class ExportedLayer:
    """What became of a layer in the graph; an entry of the record."""

    name: str
    weight_bits: int = 32
    input_bits: int = 32
    stored: str = "FLOAT"  # type of the weight
    norm: str = ""  # what became of a batch norm behind it
    left: str = ""  # why it is in float32 although the checkpoint has it quantised


@dataclass(frozen=True)
class Quantised:
    """The quantised layers of a model, by name."""

    codes: dict[str, Codes]
    inputs: dict[str, Grid]
    layers: dict[str, ExportedLayer]  # all layers, quantised or not

    @classmethod
    def of(cls, model: nn.Module) -> Quantised:
        codes, inputs, layers = {}, {}, {}
        for name, layer in find_layers(model).items():
            layers[name] = note = ExportedLayer(name)
            try:
                if (found := weight_codes(layer)) is not None:
                    codes[name], note.weight_bits = found, found.bits
            except OffGrid as error:
                note.left = str(error)
            grid = layer._modules.get(ACTIVATION_GRID)
            if isinstance(grid, Grid):
                inputs[name], note.input_bits = grid, grid.bits
        return cls(codes, inputs, layers)

    def width(self, name: str) -> int:
        """Bits of a layer's stored codes; see the module docstring."""
        return max(self.codes[name].width, 4 if name in self.inputs else 2)


class _Mark(nn.Module):
    """An operator in the exported graph that names a layer and changes nothing."""

    def __init__(self, kind: str, layer: str) -> None:
        super().__init__()
        self.kind, self.layer = kind, layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{self.kind}",
            (x,),
            {"layer": self.layer},
            dtype=x.dtype,
            shape=x.shape,
            version=1,
        )


def _marked(model: nn.Module, quantised: Quantised) -> nn.Module:
    """A copy of the model with a mark at every layer's input, and at its weight if quantised."""
    model = copy.deepcopy(model)
    for name, layer in find_layers(model).items():
        set_activation_grid(layer, _Mark(INPUT, name))  # in place of a grid
        if name in quantised.codes:
            mark = _Mark(WEIGHT, name)
            parametrize.register_parametrization(layer, "weight", mark, unsafe=True)
    return model


# -- tracing ---------------------------------------------------------------------------------------


def traced(model: nn.Module, image_shape: tuple[int, int, int], opset: int = OPSET) -> ir.Model:
    """A network as a graph for any number of images.

    Raises UserError if it cannot be traced, or if it calls an operator that ONNX lacks.
    """
    for name in ("onnx", "onnxscript"):
        package(name)
    images = torch.zeros(2, *image_shape)
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), evaluating(model):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model,
                (images,),
                dynamo=True,
                optimize=True,
                verbose=False,
                opset_version=opset,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise UserError(_reason(error)) from None
    finally:
        logger.setLevel(level)
    return program.model


def save_program(
    model: nn.Module, image_shape: tuple[int, int, int], path: str | os.PathLike[str]
) -> None:
    """A network as a program of torch.export, for any number of images; loads without us."""
    shapes = ({0: torch.export.Dim("batch")},)
    try:
        with warnings.catch_warnings(), evaluating(model):
            warnings.simplefilter("ignore")
            images = torch.zeros(2, *image_shape)
            program = torch.export.export(model, (images,), dynamic_shapes=shapes)
    except UserError:
        raise
    except Exception as error:  # the network's own code, in a tracer's hands
        raise UserError(_reason(error)) from None
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


def _reason(error: BaseException) -> str:
    """Why a network could not be exported, in a line."""
    texts, cause = [], error
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    if missing := re.search(r"OpOverload\(op='([\w.]+)'", " ".join(texts)):
        operator = missing[1].replace(".", "::", 1)
        return f"the network calls {operator}, which ONNX lacks; express it in PyTorch's operators"
    last = next(line for line in reversed(texts) if line.strip()).strip().splitlines()[0]
    return f"the network cannot be traced by torch.export, which export.py uses: {last}"


# -- the graph -------------------------------------------------------------------------------------


class GraphEditor:
    """Constants and nodes for an onnx-ir graph."""

    def __init__(self, model: ir.Model) -> None:
        self.ir, self.model, self.graph = package("onnx_ir"), model, model.graph

    def constant(self, name: str, array: np.ndarray, kind: str | None = None) -> ir.Value:
        """An initialiser; `kind` names an ONNX type of integers, such as INT4."""
        dtype = self.ir.DataType[kind] if kind else self.ir.DataType.from_numpy(array.dtype)
        tensor = self.ir.Tensor(array.astype(dtype.numpy()), dtype=dtype, name=name)
        value = self.ir.Value(
            name=name, const_value=tensor, shape=tensor.shape, type=self.ir.TensorType(dtype)
        )
        self.graph.register_initializer(value)
        return value

    def node(
        self, op: str, name: str, inputs: list[ir.Value], before: ir.Node, **attributes: Any
    ) -> ir.Value:
        """The output of a new node."""
        node = self.ir.node(op, inputs=inputs, attributes=attributes or None, name=name)
        node.outputs[0].name = name
        self.graph.insert_before(before, node)
        return node.outputs[0]

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let all that reads `old`, the graph's outputs included, read `new`."""
        self.ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)

    def round_trip(
        self, x: ir.Value, grid: tuple[float, int, int], name: str, before: ir.Node
    ) -> ir.Value:
        """x rounded to the grid (scale, zero, maxq)."""
        scale, zero, maxq = np.float32(grid[0]), grid[1], grid[2]
        kind, highest = ("UINT8", 255) if maxq <= 255 else ("UINT16", 65535)
        step = self.constant(f"{name}.scale", scale)
        at_zero = self.constant(f"{name}.zero", np.array(zero), kind)
        if maxq < highest:
            ends = (scale * np.float32(code - zero) for code in (0, maxq))
            names = (f"{name}.low", f"{name}.high")
            low, high = (self.constant(*end) for end in zip(names, ends, strict=True))
            x = self.node("Clip", f"{name}.clipped", [x, low, high], before)
        codes = self.node("QuantizeLinear", f"{name}.codes", [x, step, at_zero], before)
        return self.node("DequantizeLinear", f"{name}.rounded", [codes, step, at_zero], before)

    def tidy(self) -> None:
        """Nodes in order, nothing left that nobody reads."""
        self.graph.sort()
        passes = importlib.import_module("onnx_ir.passes.common")
        passes.RemoveUnusedNodesPass()(self.model)
        passes.RemoveUnusedOpsetsPass()(self.model)


def quantised_graph(
    model: nn.Module, image_shape: tuple[int, int, int]
) -> tuple[ir.Model, list[ExportedLayer]]:
    """A compressed network as a graph that rounds exactly where the network rounds."""
    quantised = Quantised.of(model)
    narrow = any(quantised.width(name) == 2 for name in quantised.codes)
    opset = OPSET_OF_2_BITS if narrow else OPSET
    graph = traced(_marked(model, quantised), image_shape, opset)
    editor = GraphEditor(graph)
    marks = [node for node in graph.graph if node.domain == DOMAIN]
    _quantise_inputs(editor, [mark for mark in marks if mark.op_type == INPUT], quantised)
    _quantise_weights(editor, [mark for mark in marks if mark.op_type == WEIGHT], quantised)
    editor.tidy()
    called = {mark.attributes["layer"].as_string() for mark in marks}
    for name in (quantised.codes.keys() | quantised.inputs.keys()) - called:
        quantised.layers[name].left = "the network does not call it"
    return graph, list(quantised.layers.values())


def _quantise_inputs(editor: GraphEditor, marks: list[ir.Node], quantised: Quantised) -> None:
    """Replace marks of inputs; layers that round one tensor to one grid share the rounded one.

    The nodes that read a layer's input are named after the layer.
    """
    rounded: dict[tuple, ir.Value] = {}
    calls: Counter[str] = Counter()
    for mark in marks:
        name = mark.attributes["layer"].as_string()
        for use in mark.outputs[0].uses():
            use.node.name = f"{name}.{calls[name]}" if calls[name] else name
            calls[name] += 1
        if (grid := quantised.inputs.get(name)) is None:
            editor.replace(mark.outputs[0], mark.inputs[0])
            continue
        x, ends = mark.inputs[0], (float(grid.scale), int(grid.zero), int(grid.maxq))
        if (x, ends) not in rounded:
            place = f"{name}.input" if not rounded else f"{name}.input{len(rounded)}"
            rounded[x, ends] = editor.round_trip(x, ends, place, mark)
        editor.replace(mark.outputs[0], rounded[x, ends])


def _quantise_weights(editor: GraphEditor, marks: list[ir.Node], quantised: Quantised) -> None:
    """Replace marks of weights by codes, and fold the norms behind them."""
    names = [mark.attributes["layer"].as_string() for mark in marks]
    for index, (mark, name) in enumerate(zip(marks, names, strict=True)):
        note, codes = quantised.layers[name], quantised.codes[name]
        axis, read = 0, mark.outputs[0]
        users = [use.node for use in read.uses()]
        if len(users) == 1 and users[0].op_type == "Transpose":
            axis, read = 1, users[0].outputs[0]  # stored the way it is read
        norm = None if names.count(name) > 1 else _norm_behind(read)
        factor = np.ones(len(codes.scale))
        if norm is not None:
            factor = _fold_bias(editor, norm, name)
            negative = int((factor < 0).sum())
            note.norm = "folded" + (f", {negative} negative factors" if negative else "")
        stored, kind = _stored(codes, factor, quantised.width(name))
        place = f"{name}.weight" if names.index(name) == index else f"{name}.weight{index}"
        note.stored = kind
        inputs = [
            editor.constant(f"{place}.codes", stored.codes if axis == 0 else stored.codes.T, kind),
            editor.constant(f"{place}.scale", stored.scale),
        ]
        if stored.zero.any() or quantised.width(name) == 8:  # runtimes look for it there
            inputs.append(editor.constant(f"{place}.zero", stored.zero, kind))
        decoded = editor.node("DequantizeLinear", f"{place}.decoded", inputs, mark, axis=axis)
        editor.replace(read, decoded)


@dataclass(frozen=True)
class _Stored:
    """Codes as they are written, W · factor = scale · (codes − zero)."""

    codes: np.ndarray  # of the weight's shape, integer
    scale: np.ndarray  # (rows,) float32
    zero: np.ndarray  # (rows,)


def _stored(
    codes: Codes,
    factor: np.ndarray,  # (rows,)
    width: int,  # bits
) -> tuple[_Stored, str]:
    """A weight times the factors, and the type of its codes, of which only signs change."""
    q, zero = codes.codes.numpy().astype(np.int64), codes.zero.numpy().astype(np.int64)
    scale = codes.scale.double().numpy() * factor
    kind, rows = f"INT{width}", (len(q), *[1] * (q.ndim - 1))
    flip = factor < 0
    if codes.symmetric:
        half = 2 ** (codes.bits - 1)
        q, zero = q - half, np.zeros_like(zero)
        flip &= q.reshape(len(q), -1).min(1) > -(2 ** (width - 1))
        q = np.where(flip.reshape(rows), -q, q)
    else:
        kind, highest = f"U{kind}", 2**codes.bits - 1
        q = np.where(flip.reshape(rows), highest - q, q)
        zero = np.where(flip, highest - zero, zero)
    scale = np.where(flip, -scale, scale)
    nothing = abs(scale) < TINY
    q = np.where(nothing.reshape(rows), zero.reshape(rows), q)
    scale = np.where(nothing, 1, scale).astype(np.float32)
    return _Stored(q, scale, zero), kind


def _norm_behind(weight: ir.Value) -> ir.Node | None:
    """The batch norm that alone reads the only layer that reads a weight."""
    layers = [use.node for use in weight.uses()]
    if len(layers) != 1 or layers[0].op_type not in ("Conv", "Gemm"):
        return None
    readers = list(layers[0].outputs[0].uses())
    if len(readers) != 1 or readers[0].node.op_type != "BatchNormalization" or readers[0].idx:
        return None
    constants = [*readers[0].node.inputs[1:], *layers[0].inputs[2:]]
    return readers[0].node if all(x is None or x.const_value for x in constants) else None


def _fold_bias(editor: GraphEditor, norm: ir.Node, name: str) -> np.ndarray:  # (rows,)
    """Take a norm out of the graph: its shift goes into the layer's bias. Returns its factor."""
    gamma, beta, mean, variance = (
        x.const_value.numpy().astype(np.float64) for x in norm.inputs[1:]
    )
    layer = norm.inputs[0].producer()
    epsilon = norm.attributes["epsilon"].as_float() if "epsilon" in norm.attributes else 1e-5
    factor = gamma / np.sqrt(variance + epsilon)
    bias = layer.inputs[2] if len(layer.inputs) > 2 else None
    bias = 0 if bias is None else bias.const_value.numpy().astype(np.float64)
    bias = ((bias - mean) * factor + beta).astype(np.float32)
    folded = editor.constant(f"{name}.folded_bias", bias)
    layer.resize_inputs(3)
    layer.replace_input_with(2, folded)
    editor.replace(norm.outputs[0], layer.outputs[0])
    return factor


def contents(model: ir.Model) -> bytes:
    """The file of a graph, without the exporter's notes on where in the code nodes come from."""
    for node in model.graph:
        node.doc_string = None
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    return package("onnx_ir").to_proto(model).SerializeToString()


def as_records(layers: list[ExportedLayer]) -> list[Mapping[str, Any]]:
    return [asdict(layer) for layer in layers]
