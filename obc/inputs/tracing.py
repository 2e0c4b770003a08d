"""A model as a list of operations: run from any of them, batch norms folded into convolutions.

torch.fx traces the model into operations 0 … n−1. To see what a change in one layer does, `advance`
runs the operations before the layer once, and `finish` runs the rest for each change, from copies
of the values that are alive at that point: a model may work in place. Nothing is rewritten but
this: a batch norm (in eval mode) that alone reads the output of a convolution is folded into it,

    y = γ (W∗x + b − μ)/√(σ² + ε) + β  =  W'∗x + b',    W' = W γ/√(σ² + ε),

after the layer that is being changed. This changes the output by rounding only. The layer's input
is exactly the plain model's, or a layer with 4-bit inputs could round them to other codes. A model
that cannot be traced runs as a whole.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from obc.solver.errors import log

IN_PLACE = "iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior ixor setitem".split()


def _traced(name: str) -> Callable[..., fx.Proxy]:
    return lambda self, *args: self.tracer.create_proxy(
        "call_function", getattr(operator, name), (self, *args), {}
    )


class InPlaceTracer(fx.Tracer):
    """Records `x += y` and `x[i] = y` as in place; torch.fx itself records x + y, and fails."""

    Value = type("Value", (fx.Proxy,), {f"__{name}__": _traced(name) for name in IN_PLACE})

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return self.Value(node, self)


class TracedModel(fx.Interpreter):
    """A model in eval mode: `begin`, then `advance` from layer to layer, with calls of `finish`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, graph=InPlaceTracer().trace(model))
        self.nodes = list(self.graph.nodes)
        self.place = {node: number for number, node in enumerate(self.nodes)}
        self.folded_from = 0  # operations before this one run as the model has them
        self.folded: dict[fx.Node, nn.Module] = {}  # convolution -> the same with its norm in it
        self.norms: dict[fx.Node, fx.Node] = {}  # batch norm -> the convolution that includes it
        for norm in self.nodes:
            conv = norm.args[0] if norm.args else None
            if isinstance(conv, fx.Node) and self._folds(conv, norm):
                layers = (self.module.get_submodule(node.target) for node in (conv, norm))
                fused = fuse_conv_bn_eval(*layers)
                self.folded[conv] = fused.to(memory_format=torch.channels_last)
                self.norms[norm] = conv

    def _folds(self, conv: fx.Node, norm: fx.Node) -> bool:
        """Whether `norm` is a batch norm, and the only one to see the output of a convolution."""
        if not conv.op == norm.op == "call_module" or len(conv.users) > 1:
            return False
        layer, batch_norm = (self.module.get_submodule(node.target) for node in (conv, norm))
        return (
            type(layer) is nn.Conv2d
            and type(batch_norm) is nn.BatchNorm2d
            and not batch_norm.training
            and batch_norm.running_mean is not None
            and not (layer._forward_hooks or batch_norm._forward_hooks)
            and not batch_norm._forward_pre_hooks
            and len(self.calls(conv.target)) == 1
        )

    def calls(self, layer: str) -> list[int]:
        """The operations that use a layer, a tensor of it, or a module that it is part of."""
        return [
            number
            for number, node in enumerate(self.nodes)
            if node.op in ("call_module", "get_attr")
            and (f"{layer}.".startswith(f"{node.target}.") or node.target.startswith(f"{layer}."))
        ]

    def run_node(self, node: fx.Node) -> object:
        """One operation, on the values in `env`."""
        if node in self.folded and self.place[node] >= self.folded_from:
            args, kwargs = self.fetch_args_kwargs_from_env(node)
            return self.folded[node](*args, **kwargs)
        if node in self.norms and self.place[self.norms[node]] >= self.folded_from:
            return self.env[self.norms[node]]
        return super().run_node(node)

    def begin(self, images: Tensor) -> None:
        """Get ready to run on a batch of images, with no layer changed."""
        self.env, self.args_iter, self.folded_from = {}, iter([images]), 0
        placeholders = [node for node in self.nodes if node.op == "placeholder"]
        self.position = 0
        self._run_to(len(placeholders))

    def advance(self, number: int) -> None:
        """Run up to operation `number`, which is the first call of a layer that will be changed."""
        self.folded_from = len(self.nodes)
        self._run_to(number)
        self.folded_from = number + 1

    def finish(self) -> object:
        """The model's output. Can be called again, with other weights in the changed layer."""
        env, position = self.env, self.position
        self.env = dict(zip(env, copy.deepcopy(list(env.values())), strict=True))
        self._run_to(len(self.nodes))
        output = self.env[self.nodes[-1]]
        self.env, self.position = env, position
        return output

    def _run_to(self, number: int) -> None:
        for node in self.nodes[self.position : number]:
            self.env[node] = self.run_node(node)
            for value in self.user_to_last_uses.get(node, ()):
                del self.env[value]
        self.position = number


class UntracedModel:
    """`TracedModel` for a model that cannot be traced: one operation, which is all of it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def calls(self, layer: str) -> list[int]:
        return [0]

    def begin(self, images: Tensor) -> None:
        self.images = images

    def advance(self, number: int) -> None:
        """There is nothing to do before operation 0."""

    def finish(self) -> object:
        return self.model(self.images.clone())


def resumable(model: nn.Module) -> TracedModel | UntracedModel:
    """A model, to be run again and again with one layer changed."""
    try:
        return TracedModel(model)
    except Exception as error:  # tracing runs the model's own code, which may raise anything
        log.warning("the model cannot be traced (%s): it always runs as a whole", error)
        return UntracedModel(model)
