"""Cutting channels that nobody reads: a smaller network with the same outputs.

Structured pruning leaves columns of zeros: input channels that a layer ignores. If every layer that
reads a channel ignores it, the row that computes it can go, with its bias and its entries in the
norm behind it:

    conv ─▶ norm ─▶ ReLU ─▶ (pool, depthwise conv ─▶ norm …, flatten) ─▶ conv or linear layer

Two walks over the graph of torch.export. Forwards: whose channels could be cut, being computed by
a layer that is called once and passed on by operators that treat channels one by one; sums, such
as residual ones, and whatever is not known to do so end it. Backwards: which channels are read; a
layer reads the columns in which a row that is itself read has a nonzero weight, so that what only a
cut row has read goes, too. Then the tensors of the layers and norms are sliced, grids included.

The network's own code stays, and may rely on a size that is no longer right: the smaller network is
run, and given up unless its outputs are those of the larger.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from modelutils import evaluating, find_layers
from obc.solver.errors import log
from quant import ACTIVATION_GRID, WEIGHT_GRID

LAYERS = ("conv1d", "conv2d", "linear")
NORMS = ("batch_norm",)
PLAIN_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)
BY_CHANNEL = """relu relu6 hardtanh clamp clamp_min leaky_relu elu gelu silu hardswish hardsigmoid
    sigmoid tanh dropout feature_dropout alpha_dropout max_pool1d max_pool2d avg_pool1d avg_pool2d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d contiguous clone detach
""".split()
CUT_TOLERANCE = 1e-5  # relative difference of outputs, which are summed in another order


@dataclass(frozen=True)
class Cut:
    """What was cut."""

    channels: dict[str, tuple[int, int]]  # layer → outputs before and after

    def line(self) -> str:
        gone = sum(before - after for before, after in self.channels.values())
        return f"cut {gone} channels of {len(self.channels)} layers that nothing reads"


def cut_channels(model: nn.Module, images: Tensor) -> tuple[nn.Module, Cut]:
    """The model without the channels that nothing reads; a copy, or the model if there are none.

    images: (2 or more, 3, s, s), to trace and to check with.
    """
    nothing = model, Cut({})
    try:
        graph = _Graph(model, images)
    except Exception as error:  # the network's own code, in a tracer's hands
        log.warning("no channels cut: the network cannot be traced (%s)", type(error).__name__)
        return nothing
    kept = graph.kept()
    smaller = copy.deepcopy(model)
    channels = {}
    for name, (inputs, outputs) in kept.items():
        module = smaller.get_submodule(name)
        if not outputs.all() and name in graph.layers:
            channels[name] = len(outputs), int(outputs.sum())
        if not (inputs.all() and outputs.all()):  # channels may be on another axis
            _slice(module, inputs, outputs)
    if not channels:
        return nothing
    try:
        expected, outputs = (_outputs_on(network, images) for network in (model, smaller))
        worst = float((outputs - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
        reason = "" if worst < CUT_TOLERANCE else f"outputs change by {worst:.1g}"
    except Exception as error:
        reason = str(error).splitlines()[0]
    if reason:
        log.warning("no channels cut: the network does not run without them (%s)", reason)
        return nothing
    return smaller, Cut(channels)


@dataclass(frozen=True)
class Chain:
    """Channels that could be cut: what computes, passes on, and reads them, and nothing else."""

    producer: str
    carriers: tuple[str, ...]  # depthwise layers on the way
    consumers: dict[str, int]  # layer → its input features for each channel
    channels: int

    def read_by(self, consumer: str, weight: Tensor) -> Tensor:  # (channels,) bool
        """Which channels a consumer with this weight reads."""
        return weight.transpose(0, 1).flatten(1).any(1).view(self.channels, -1).any(1)


def chains(model: nn.Module, images: Tensor) -> list[Chain]:
    """All chains of a network, in order; none if it cannot be traced, as `cut_channels` says."""
    try:
        return _Graph(model, images).chains()
    except Exception:  # the network's own code, in a tracer's hands
        return []


def _outputs_on(model: nn.Module, images: Tensor) -> Tensor:
    """What a network returns if it does not round: a sum in another order may round otherwise."""
    plain = _without_rounding(model)
    with evaluating(plain):
        return plain(images)


def _without_rounding(model: nn.Module) -> nn.Module:
    """A copy whose layers take their inputs as they are."""
    plain = copy.deepcopy(model)
    for layer in find_layers(plain).values():
        layer._modules.pop(ACTIVATION_GRID, None)
    return plain


class _Graph:
    """The calls of a network, without the rounding of inputs, which treats numbers one by one."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        plain = _without_rounding(model)
        with warnings.catch_warnings(), evaluating(plain):
            warnings.simplefilter("ignore")
            program = torch.export.export(plain, (images,))
        self.nodes = [node for node in program.graph.nodes if node.op == "call_function"]
        self.results = program.graph.output_node().all_input_nodes
        signature = program.graph_signature
        self.owners = dict(signature.inputs_to_parameters) | dict(signature.inputs_to_buffers)
        self.layers = find_layers(plain)
        self.modules: dict[fx.Node, str] = {}  # call of a layer or norm → its name
        for node in self.nodes:
            if _operator(node) in (*LAYERS, *NORMS) and len(node.args) > 1:
                owner = self.owners.get(getattr(node.args[1], "name", ""), "")
                if owner.endswith(".weight"):
                    self.modules[node] = owner.removesuffix(".weight")
        calls = Counter(self.modules.values())
        self.once = {node for node, name in self.modules.items() if calls[name] == 1}

    def kept(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Which inputs and outputs every layer and norm that is called once keeps."""
        cuttable = self._cuttable()
        read = {node: torch.zeros(_channels(node), dtype=torch.bool) for node in cuttable}
        for node in read.keys() & set(self.results):
            read[node][:] = True
        for node in reversed(self.nodes):
            if node in cuttable and not read[node].any():
                read[node][0] = True  # a layer without outputs is none
            for source in node.all_input_nodes:
                if source in cuttable:
                    read[source] |= self._reads(node, source, read.get(node))
        for node in self.nodes:  # what one reader needs all get
            if node in cuttable and (source := cuttable[node]) is not None:
                read[node] = read[source].repeat_interleave(len(read[node]) // len(read[source]))

        def mask(node: fx.Node) -> Tensor:
            return read.get(node, torch.ones(_channels(node), dtype=torch.bool))

        return {self.modules[node]: (mask(node.args[0]), mask(node)) for node in self.once}

    def chains(self) -> list[Chain]:
        """Layers whose channels only layers read that could ignore some of them."""
        cuttable = self._cuttable()
        origin: dict[fx.Node, fx.Node] = {}
        for node, source in cuttable.items():
            origin[node] = node if source is None else origin[source]
        consumers: dict[fx.Node, dict[str, int]] = {node: {} for node in origin.values()}
        carriers: dict[fx.Node, list[str]] = {node: [] for node in consumers}
        read_whole = {origin[node] for node in self.results if node in origin}
        for node in self.nodes:
            for source in node.all_input_nodes:
                if source not in origin:
                    continue
                start, first = origin[source], source is node.args[0]
                if first and cuttable.get(node) is source:
                    if _operator(node) in LAYERS:
                        carriers[start].append(self.modules[node])
                elif first and _operator(node) in LAYERS and _is_plain(node) and node in self.once:
                    consumers[start][self.modules[node]] = _channels(source) // _channels(start)
                else:
                    read_whole.add(start)
        return [
            Chain(self.modules[x], tuple(carriers[x]), consumers[x], _channels(x))
            for x in consumers
            if consumers[x] and x not in read_whole
        ]

    def _cuttable(self) -> dict[fx.Node, fx.Node | None]:
        """Calls whose channels are computed by one layer, each by itself.

        With the call that they have their channels from; None for the layer that computes them.
        """
        cuttable: dict[fx.Node, fx.Node | None] = {}
        for node in self.nodes:
            kind, source = _operator(node), node.args[0] if node.args else None
            if kind in LAYERS and node in self.once and _is_plain(node):
                if type(self.layers.get(self.modules[node])) in PLAIN_LAYERS:
                    cuttable[node] = None
            elif source in cuttable and (
                kind in BY_CHANNEL
                or (kind in NORMS and node in self.once)
                or (kind in LAYERS and node in self.once and _depthwise(node))
                or _flattens(node)
                or _averages_images(node)
            ):
                cuttable[node] = source
        return cuttable

    def _reads(self, node: fx.Node, source: fx.Node, outputs: Tensor | None) -> Tensor:
        """Which channels of `source` a call reads; outputs: those of its own that are read."""
        everything = torch.ones(_channels(source), dtype=torch.bool)
        if source is not node.args[0]:
            return everything
        if _operator(node) in LAYERS and _is_plain(node) and node in self.once:
            weight = self.layers[self.modules[node]].weight.detach()
            rows = weight if outputs is None else weight[outputs]
            return rows.transpose(0, 1).flatten(1).any(1)
        return everything if outputs is None else outputs.view(len(everything), -1).any(1)


def _operator(node: fx.Node) -> str:
    """The name of an operator, without the mark of those that work in place."""
    packet = getattr(node.target, "overloadpacket", None)
    return packet.__name__.rstrip("_") if packet else ""


def _channels(node: fx.Node) -> int:
    return node.meta["val"].shape[1]


def _groups(node: fx.Node) -> int:
    return node.args[6] if _operator(node) != "linear" and len(node.args) > 6 else 1


def _is_plain(node: fx.Node) -> bool:
    """Whether a layer has one group, and channels on axis 1."""
    return _groups(node) == 1 and (_operator(node) != "linear" or node.meta["val"].ndim == 2)


def _depthwise(node: fx.Node) -> bool:
    return 1 < _groups(node) == _channels(node) == _channels(node.args[0])


def _flattens(node: fx.Node) -> bool:
    """(n, C, …) to (n, C · …)."""
    if _operator(node) not in ("flatten", "view", "reshape"):
        return False
    before, after = node.args[0].meta["val"].shape, node.meta["val"].shape
    return len(after) == 2 and after[0] == before[0]


def _averages_images(node: fx.Node) -> bool:
    if _operator(node) != "mean" or len(node.args) < 2:
        return False
    axes = len(node.args[0].meta["val"].shape)
    return not {0, 1} & {axis % axes for axis in node.args[1]}


def _slice(module: nn.Module, inputs: Tensor, outputs: Tensor) -> None:
    """Keep some inputs and outputs of a layer or norm, in place."""
    whole = getattr(module, "groups", 1) == 1  # or depthwise: then both are the same channels
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            if tensor is not None and tensor.ndim:
                kept = tensor.detach()[outputs]
                kept = kept[:, inputs] if kept.ndim > 1 and whole else kept
                tensors[name] = nn.Parameter(kept) if isinstance(tensor, nn.Parameter) else kept
    if (grid := module._modules.get(WEIGHT_GRID)) is not None:
        grid.scale, grid.zero = grid.scale[outputs], grid.zero[outputs]
    sizes = {"in_channels": inputs, "in_features": inputs, "out_channels": outputs}
    for name, mask in (sizes | {"out_features": outputs, "num_features": outputs}).items():
        if hasattr(module, name):
            setattr(module, name, int(mask.sum()))
    if not whole and len(outputs) == module.groups:
        module.groups = int(outputs.sum())
