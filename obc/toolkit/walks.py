"""A network that is run in parts, and what its layers see and return on the way.

    Walk        the model as a list of operations: run to one of them, leave, and resume from there
    WholeWalk   the same for a model that cannot be traced: one operation, which is all of it

In a walk of `sequential.py` a layer's inputs are those that the network gives it there, rounded if
the layer rounds them; its outputs are without the bias.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, fx, nn

from obc.inputs.tasks import Inputs, call
from obc.inputs.tracing import InPlaceTracer, Operations, equal_but_for_rounding, whole
from obc.solver.layers import compressible, first_input, forward_hooks, view


class LayerTracer(InPlaceTracer):
    """Layers to compress are single operations, whatever their class computes."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return compressible(module) or super().is_leaf_module(module, name)


class Walk(Operations):
    """A network that can leave its values at a boundary, and continue from there."""

    def __init__(
        self, model: nn.Module, like: Walk | None = None, inputs: Inputs | None = None
    ) -> None:
        super().__init__(model, LayerTracer, like, inputs)

    def leave(self) -> tuple[int, dict[fx.Node, Any]]:
        """The next operation, and the values that are needed from there on."""
        values = {
            node: None if node.op == "get_attr" else value for node, value in self.env.items()
        }
        return self.position, values

    def resume(self, position: int, values: dict[fx.Node, Any]) -> None:
        """Continue from what `leave` returned; the model's own tensors are as they are now."""
        self.position, self.env = position, {}
        for node, value in values.items():
            self.env[node] = self.run_node(node) if node.op == "get_attr" else value

    def run_ahead(self, number: int) -> None:
        """Run what comes before operation `number`, then go back."""
        position, values = self.leave()
        copies = copy.deepcopy(list(values.values()))  # the model may work in place
        self.resume(position, dict(zip(values, copies, strict=True)))
        try:
            self.run_to(number)
        finally:
            self.resume(position, values)

    def only_runs(self, layer: str, first: int, last: int) -> bool:
        """Whether operations first … last are one call of the layer itself."""
        node = self.nodes[first]
        return first == last and node.op == "call_module" and node.target == layer


class WholeWalk:
    """A `Walk` of a model that cannot be traced: one operation, which is all of it."""

    def __init__(self, model: nn.Module, like: WholeWalk | None = None) -> None:
        self.module = model

    def calls(self, layer: str) -> list[int]:
        return [0]

    def begin(self, images: Inputs) -> None:
        self.images, self.position = images, 0

    def run_to(self, number: int) -> None:
        if number > self.position:
            call(self.module, self.images.clone())
        self.position = number

    def leave(self) -> tuple[int, Inputs]:
        return self.position, self.images

    def resume(self, position: int, values: Inputs) -> None:
        self.position, self.images = position, values

    def run_ahead(self, number: int) -> None:
        try:
            self.run_to(number)
        finally:
            self.position = 0

    def only_runs(self, layer: str, first: int, last: int) -> bool:
        return False


def walk_of(model: nn.Module, images: Inputs) -> Walk | WholeWalk:
    """The model in operations, if they give what the model gives; else as a whole."""
    try:
        walk = Walk(model, inputs=images)
        walk.begin(images)
        walk.run_to(len(walk.nodes))
        outputs = walk.env[walk.nodes[-1]]
    except Exception as error:  # tracing runs the model's own code, which may raise anything
        return WholeWalk(whole(model, f"the model cannot be traced ({error})").model)
    if not equal_but_for_rounding(outputs, call(model, images.clone())):
        reason = "the traced model gives other outputs than the model itself"
        return WholeWalk(whole(model, reason).model)
    return walk


class LastCall(BaseException):
    """The input of a layer's last call is known. The network, which need not run on, lets it by."""


@contextmanager
def inputs_of(layer: nn.Module, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Inside, `see` gets the input of every call of a layer, rounded if the layer rounds it."""

    def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if (x := first_input(args, kwargs)).numel():
            see(x)

    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def outputs_of(layer: nn.Module, outputs: list[Tensor]) -> Iterator[None]:
    """Inside, the output of every call of a layer, without its bias, is put into the list."""
    axes_behind = -1 - view(layer).channel_axis

    def see(_: str, __: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
        if not first_input(args, kwargs).numel():
            return
        if layer.bias is None:
            outputs.append(output.clone())  # what follows may work in place
        else:
            outputs.append(output - layer.bias.view(-1, *[1] * axes_behind))

    with forward_hooks({"": layer}, see):
        yield


def outputs_of_layers(
    model: nn.Module, names: Iterable[str], images: Inputs
) -> dict[str, list[Tensor]]:
    """The outputs of all calls of layers, without their biases."""
    outputs: dict[str, list[Tensor]] = {name: [] for name in names}
    with ExitStack() as stack:
        for name in outputs:
            stack.enter_context(outputs_of(model.get_submodule(name), outputs[name]))
        call(model, images.clone())
    return outputs
