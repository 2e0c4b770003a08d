"""A network that is trained in compressed form, and the plain one that it stands for.

Every conv and linear layer computes with Q(M ⊙ W) in place of its weight W, and with Q'(x) in place
of its input x; which of these there are depends on what was asked for:

    Q   `weight_step`     learned steps (learned_steps.py)    ┐
    Q'  `input_step`      the same, of the layer's input      ├ buffers and modules of the layer, so
    M   `pruning_mask`    (magnitude_pruning.py)              ┘ that a state dict holds all there is

The optimiser moves W, which stays the layer's own parameter; the network is run with the values of
Q(M ⊙ W) put in its place (`torch.func.functional_call`), gradients passing through.

`deployed` makes the plain model: weights on their grids and zeros in place, grids beside them as
quant.py stores them. It is what is evaluated and saved, so no difference between training and
deployment can hide. Batch norms stay as they are; folding them is batchnorm_folding.py's.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

import quant
from modelutils import find_layers
from obc.solver.errors import UserError, log
from pruning_vs_quantization.expected_error import DENSE_BITS
from pruning_vs_quantization.first_and_last import first_and_last
from pruning_vs_quantization.learned_steps import LearnedStep
from pruning_vs_quantization.magnitude_pruning import MASK
from pruning_vs_quantization.starting_ranges import weight_grid

WEIGHT_STEP, INPUT_STEP = "weight_step", "input_step"
FIRST_LAST_BITS = 8


def layer_bits(model: nn.Module, bits: int) -> dict[str, int]:
    """Bits by name of the layer: `bits`, but 8 in the first and the last."""
    ends = first_and_last(model)
    return {name: FIRST_LAST_BITS if name in ends else bits for name in find_layers(model)}


def quantise_weights(
    model: nn.Module,
    bits: Mapping[str, int],  # by name of the layer
    per_channel: bool,
    method: str,  # of starting_ranges.METHODS
) -> None:
    """Give each layer a learned step for its weight."""
    for name, layer in find_layers(model).items():
        grid = weight_grid(layer.weight, bits[name], per_channel, method)
        layer.add_module(WEIGHT_STEP, LearnedStep(grid))


def quantise_inputs(model: nn.Module, grids: Mapping[str, quant.Grid]) -> None:
    """Make layers round their inputs, with steps learned from those of `grids`."""
    for name, layer in find_layers(model).items():
        if name in grids:
            layer.add_module(INPUT_STEP, LearnedStep(grids[name]))
            layer.register_forward_pre_hook(_round_input)
        else:
            log.info("%s: its input is not quantised: it saw no image", name)


def _round_input(layer: nn.Module, args: tuple) -> tuple:
    return (getattr(layer, INPUT_STEP).of_input(args[0]), *args[1:])


def effective_weights(model: nn.Module) -> dict[str, Tensor]:
    """What the layers compute with, by name of the parameter, where it is not the parameter."""
    weights = {}
    for name, layer in find_layers(model).items():
        weight = effective_weight(layer)
        if weight is not layer.weight:
            weights[f"{name}.weight"] = weight
    return weights


def effective_weight(layer: nn.Module) -> Tensor:
    """Q(M ⊙ W), of the layer weight's shape."""
    weight = layer.weight
    if hasattr(layer, MASK):
        weight = weight * getattr(layer, MASK)
    if hasattr(layer, WEIGHT_STEP):
        weight = getattr(layer, WEIGHT_STEP).of_weight(weight)
    return weight


def run_compressed(model: nn.Module, images: Tensor) -> Tensor:  # (n, classes)
    """The logits; raises UserError if the model does not return class scores."""
    logits = functional_call(model, effective_weights(model), (images,))
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise UserError(
            "in training mode the model does not return class scores of shape (images, classes)"
        )
    return logits


@torch.no_grad()
def deployed(model: nn.Module, dense: nn.Module) -> nn.Module:
    """A copy of `dense` with what `model` has learned: plain weights, grids beside them."""
    plain, trained = copy.deepcopy(dense), model.state_dict()
    state = {key: trained[key] for key in plain.state_dict()}
    plain.load_state_dict(state | effective_weights(model))
    layers = find_layers(model)
    for name, layer in find_layers(plain).items():
        of_weight, of_input = (
            getattr(layers[name], kind, None) for kind in (WEIGHT_STEP, INPUT_STEP)
        )
        if of_weight is not None:
            quant.set_weight_grid(layer, of_weight.grid(len(layer.weight)))
        if of_input is not None:
            quant.set_activation_grid(layer, of_input.grid())
    return plain


def sparsity(plain: nn.Module) -> float:
    """Share of zeros among the weights of all conv and linear layers."""
    weights = [layer.weight for layer in find_layers(plain).values()]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(map(Tensor.numel, weights))


def bits_per_weight(model: nn.Module) -> float:
    """Mean over the weights of all conv and linear layers: their bits × the share not masked.

    Neither the masks nor the steps are counted, as in the study: 75 % of zeros and 4 bits weigh
    the same.
    """
    bits = weights = 0.0
    for layer in find_layers(model).values():
        step = getattr(layer, WEIGHT_STEP, None)
        of_layer = DENSE_BITS if step is None else step.grid().bits
        kept = getattr(layer, MASK).sum() if hasattr(layer, MASK) else layer.weight.numel()
        bits += of_layer * float(kept)
        weights += layer.weight.numel()
    return bits / weights
