"""A model as a list of operations: run from any of them, batch norms folded into convolutions.

torch.fx traces the model into operations 0 … n−1. To see what a change in one layer does, `advance`
runs the operations before the layer once, and `finish` runs the rest for each change, from copies
of the values that are alive at that point: a model may work in place. Nothing is rewritten but
this: a batch norm (in eval mode) that alone reads the output of a convolution is folded into it,

    y = γ (W∗x + b − μ)/√(σ² + ε) + β  =  W'∗x + b',    W' = W γ/√(σ² + ε),

after the last call of the layer that is being changed. This changes the output by rounding only.
The layer's inputs are exactly the plain model's, or a layer with 4-bit inputs could round them to
other codes.

A trace sees tensors, not Python: hooks of the whole model, a random number or a tensor that is made
while tracing are lost. So `resumable` compares it with the plain model on real images. A model that
cannot be traced, or that differs, runs as a whole, and the log says so once a command.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._pytree import tree_leaves

from obc.inputs.tasks import Inputs, call, positional
from obc.solver.errors import log

TWIN_TOLERANCE = (
    1e-3  # of the spread of the outputs: 300 × what folding does to ResNets and MobileNets
)
IMAGES_COMPARED = 16
logged: set[str] = set()  # lines of this command; a search evaluates hundreds of models
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


class Operations(fx.Interpreter):
    """A model in eval mode, as it is: `begin`, then `run_to` one operation after another."""

    def __init__(
        self,
        model: nn.Module,
        tracer: type[InPlaceTracer] = InPlaceTracer,
        like: Operations | None = None,  # of the same modules: they need not be traced again
        inputs: Inputs | None = None,  # like those to come: what is no tensor stays as it is
    ) -> None:
        # Tracing runs the model's code, which may leave values in it.
        self.traced = like.traced if like else twin(model)
        fixed = positional(self.traced.forward, inputs)[1] if inputs is not None else {}
        graph = like.graph if like else tracer().trace(self.traced, fixed or None)
        super().__init__(model, graph=graph)
        self.nodes = list(self.graph.nodes)

    def calls(self, layer: str) -> list[int]:
        """The operations that use a layer or a tensor of it, under whatever name."""
        ours = _tensor_ids(self.module.get_submodule(layer))
        return [number for number, node in enumerate(self.nodes) if ours & self._tensors_of(node)]

    def _tensors_of(self, node: fx.Node) -> set[int]:
        if node.op == "call_module":
            return _tensor_ids(self.module.get_submodule(node.target))
        return {id(self.fetch_attr(node.target))} if node.op == "get_attr" else set()

    def fetch_attr(self, target: str) -> object:
        """An attribute of the model, or a tensor that its code made while it was traced."""
        try:
            return super().fetch_attr(target)
        except RuntimeError:  # there is none of that name
            return operator.attrgetter(target)(self.traced)

    def begin(self, images: Inputs) -> None:
        """Get ready to run on a batch of images."""
        values, _ = positional(self.traced.forward, images.clone())
        self.env, self.args_iter, self.position = {}, iter(values), 0
        self.run_to(sum(node.op == "placeholder" for node in self.nodes))

    def run_to(self, number: int) -> None:
        """Run what comes before operation `number`, and keep the values that are still needed."""
        for node in self.nodes[self.position : number]:
            self.env[node] = self.run_node(node)
            for value in self.user_to_last_uses.get(node, ()):
                del self.env[value]
        self.position = number


class TracedModel(Operations):
    """A model in eval mode: `begin`, then `advance` from layer to layer, with calls of `finish`."""

    def __init__(self, model: nn.Module, inputs: Inputs | None = None) -> None:
        super().__init__(model, inputs=inputs)
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

    def run_node(self, node: fx.Node) -> object:
        """One operation, on the values in `env`."""
        if node in self.folded and self.place[node] >= self.folded_from:
            args, kwargs = self.fetch_args_kwargs_from_env(node)
            return self.folded[node](*args, **kwargs)
        if node in self.norms and self.place[self.norms[node]] >= self.folded_from:
            return self.env[self.norms[node]]
        return super().run_node(node)

    def begin(self, images: Inputs) -> None:
        """Get ready to run on a batch of images, with no layer changed."""
        self.folded_from = 0
        super().begin(images)

    def advance(self, first: int, last: int | None = None) -> None:
        """Run up to operation `first`: the first call of a layer that will be changed.

        `last` is its last call, if there are several.
        """
        self.folded_from = len(self.nodes)
        self.run_to(first)
        self.folded_from = (first if last is None else last) + 1

    def finish(self) -> object:
        """The model's output. Can be called again, with other weights in the changed layer."""
        env, position = self.env, self.position
        self.env = dict(zip(env, copy.deepcopy(list(env.values())), strict=True))
        self.run_to(len(self.nodes))
        output = self.env[self.nodes[-1]]
        self.env, self.position = env, position
        return output


class UntracedModel:
    """`TracedModel` for a model that cannot be traced: one operation, which is all of it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def calls(self, layer: str) -> list[int]:
        return [0]

    def begin(self, images: Inputs) -> None:
        self.images = images

    def advance(self, first: int, last: int | None = None) -> None:
        """There is nothing to do before operation 0."""

    def finish(self) -> object:
        return call(self.model, self.images.clone())


def resumable(model: nn.Module, images: Inputs | None = None) -> TracedModel | UntracedModel:
    """A model, in eval mode, to be run again and again with one layer changed.

    Where there are images, the first ones prove that it gives the plain model's answers.
    """
    try:
        run = TracedModel(model, images)
    except Exception as error:  # tracing runs the model's own code, which may raise anything
        return whole(model, f"the model cannot be traced ({error})")
    if images is None:
        return run
    images = images[:IMAGES_COMPARED]
    try:
        run.begin(images)
        outputs = run.finish()
    except Exception as error:
        return whole(model, f"the traced model fails ({error})")
    if not equal_but_for_rounding(outputs, call(model, images.clone())):
        return whole(model, "the traced model gives other outputs than the model itself")
    return run


def whole(model: nn.Module, reason: str) -> UntracedModel:
    """The model as one operation; the reason is logged once a command."""
    line = f"{reason}: it always runs as a whole"
    if line not in logged:
        logged.add(line)
        log.warning("%s", line)
    return UntracedModel(model)


def equal_but_for_rounding(outputs: object, plain: object) -> bool:
    """Whether two outputs of a model differ by less than `TWIN_TOLERANCE` × the second's spread."""
    if not (isinstance(outputs, Tensor) and isinstance(plain, Tensor)):
        parts, others = tree_leaves(outputs), tree_leaves(plain)  # a trace has dicts of its own
        if len(parts) != len(others) or isinstance(outputs, Tensor) != isinstance(plain, Tensor):
            return False
        if any(part is outputs for part in parts):  # a leaf, such as None
            return outputs == plain
        return all(map(equal_but_for_rounding, parts, others))
    if outputs.shape != plain.shape or outputs.dtype != plain.dtype:
        return False
    outputs, plain = outputs.double(), plain.double()
    finite = plain[plain.isfinite()]
    tolerance = TWIN_TOLERANCE * float(finite.std(correction=0)) if len(finite) else 0.0
    return torch.allclose(outputs, plain, rtol=0, atol=tolerance, equal_nan=True)


def twin(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares the model's parameters, but nothing that a call may change.

    For another thread, or to be traced.
    """
    attributes = (x for module in model.modules() for x in vars(module).values())
    computed = [x for x in attributes if torch.is_tensor(x) and x.requires_grad]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *computed]})


def _tensor_ids(module: nn.Module) -> set[int]:
    return {id(tensor) for tensor in chain(module.parameters(), module.buffers())}
