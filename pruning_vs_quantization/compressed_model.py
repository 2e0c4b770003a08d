"""A network that is trained in compressed form, the plain one it stands for, and that one folded.

While a network is trained, every conv and linear layer computes with Q(M ⊙ W) in place of its
weight W, and with Q'(x) in place of its input x, as far as the options ask for it:

    Q   `weight_step`     learned steps (learned_steps.py)    ┐
    Q'  `input_step`      the same, of the layer's input      ├ buffers and modules of the layer, so
    M   `pruning_mask`    (magnitude_pruning.py)              ┘ that a state dict is complete

The optimiser updates W, the layer's own parameter; the network is run with Q(M ⊙ W) in its place
(`torch.func.functional_call`). `deployed` makes the plain model: weights on their grids and zeros
in place, with the grids stored as quant.py stores them. It is the one that is evaluated and saved,
so that training and deployment cannot differ unnoticed.

`folded` moves its batch norms into the layers before them, as on a device. With running mean m,
variance v, weight γ and bias β,

    BN(Σ w x + b) = Σ (g w) x + (β + g (b − m))        g = γ / √(v + ε), per output channel

so the layer's weights become g w. Folding happens after training, to weights that are already on a
grid, w = Δ q with whole numbers q from −z to 2^b − 1 − z. Codes are kept and steps take up the
factors: Δ' = |g| Δ, per output channel even where the layer has a single Δ, which costs a device
nothing: it rescales each channel's sum anyway. Where g < 0, codes are reversed:
code' = 2^b − 1 − code and z' = 2^b − 1 − z, so that g w = Δ' (code' − z') exactly. Where g = 0, the
channel is its bias; its weights are 0 and its step is 1. (Folding before quantising would choose
one Δ for the weights g w, whose channels differ far more in size than those of w.)

A folded model has the same layers and loads like any other checkpoint: the layer has the folded
weight and grid, and of the batch norm only the bias remains, with m = 0, v = 1 − ε, γ = 1. Its
statistics must not be tuned again; those of the unfolded model may. This, and norms derived from
PyTorch's (such as timm's), is why torch.fx's own fusion of modules does not serve here. A norm is
folded if it has γ and β and is the only consumer of its layer's output.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.fusion import fuse_conv_bn_weights

import quant
from modelutils import find_layers
from obc.inputs.tracing import InPlaceTracer
from obc.solver.errors import UserError, log
from pruning_vs_quantization.expected_error import DENSE_BITS
from pruning_vs_quantization.learned_steps import LearnedStep, weight_grid
from pruning_vs_quantization.magnitude_pruning import MASK

WEIGHT_STEP, INPUT_STEP = "weight_step", "input_step"
FIRST_LAST_BITS = 8
TUNED_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)  # and classes derived from them, such as timm's
FOLDABLE = (nn.Conv2d, nn.Linear)


def layer_bits(model: nn.Module, bits: int, ends: Collection[str]) -> dict[str, int]:
    """Bits by name of the layer: `bits`, but 8 in the first and the last, which are `ends`."""
    return {name: FIRST_LAST_BITS if name in ends else bits for name in find_layers(model)}


def quantise_weights(
    model: nn.Module,
    bits: Mapping[str, int],  # by name of the layer
    per_channel: bool,
    method: str,  # one of learned_steps.RANGE_METHODS
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
            layer.register_forward_pre_hook(round_input)
        else:
            log.info("%s: input not quantised: no image reached it", name)


def round_input(layer: nn.Module, args: tuple) -> tuple:
    """A forward pre-hook: the input rounded by the learned step."""
    return (getattr(layer, INPUT_STEP).quantise_input(args[0]), *args[1:])


def effective_weights(model: nn.Module) -> dict[str, Tensor]:
    """Q(M ⊙ W) by name of the parameter, of all layers that have Q or M."""
    weights = {}
    for name, layer in find_layers(model).items():
        weight = layer.weight
        if hasattr(layer, MASK):
            weight = weight * getattr(layer, MASK)
        if hasattr(layer, WEIGHT_STEP):
            weight = getattr(layer, WEIGHT_STEP).quantise_weight(weight)
        if weight is not layer.weight:
            weights[f"{name}.weight"] = weight
    return weights


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
    """A copy of `dense` with what `model` has learned: plain weights and their grids."""
    plain, trained = copy.deepcopy(dense), model.state_dict()
    state = {key: trained[key] for key in plain.state_dict()}
    plain.load_state_dict(state | effective_weights(model))
    layers = find_layers(model)
    for name, layer in find_layers(plain).items():
        if (step := getattr(layers[name], WEIGHT_STEP, None)) is not None:
            quant.set_weight_grid(layer, step.grid(len(layer.weight)))
        if (step := getattr(layers[name], INPUT_STEP, None)) is not None:
            quant.set_activation_grid(layer, step.grid())
    return plain


def network_sparsity(plain: nn.Module) -> float:
    """Share of zeros among the weights of all conv and linear layers."""
    weights = [layer.weight for layer in find_layers(plain).values()]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(map(Tensor.numel, weights))


def bits_per_weight(model: nn.Module) -> float:
    """Mean over the weights of all conv and linear layers: their bits × the share not masked.

    Neither the masks nor the steps are counted, as in the study: 75 % zeros and 4 bits are equally
    large.
    """
    bits = weights = 0.0
    for layer in find_layers(model).values():
        step, count = getattr(layer, WEIGHT_STEP, None), layer.weight.numel()
        unmasked = getattr(layer, MASK).sum() if hasattr(layer, MASK) else count
        bits += (DENSE_BITS if step is None else step.grid().bits) * float(unmasked)
        weights += count
    return bits / weights


# -- batch norms folded ----------------------------------------------------------------------------


class _LayerTracer(InPlaceTracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, (*FOLDABLE, *TUNED_NORMS)) or super().is_leaf_module(module, name)


def layers_before_norms(model: nn.Module) -> dict[str, str]:
    """Layer → the batch norm to fold into it. Raises whatever tracing the model raises."""
    modules = dict(model.named_modules())
    nodes = list(_LayerTracer().trace(model).nodes)
    calls = [node for node in nodes if node.op == "call_module"]
    owners = {node.target.rpartition(".")[0] for node in nodes if node.op == "get_attr"}
    targets = [node.target for node in calls]
    pairs = {}
    for call in calls:
        layer, norm = call.args[0] if call.args else None, modules[call.target]
        if not isinstance(norm, TUNED_NORMS) or not norm.affine or norm.running_mean is None:
            continue
        if layer not in calls or not isinstance(modules[layer.target], FOLDABLE):
            continue
        once = targets.count(layer.target) == targets.count(call.target) == 1
        once &= not {layer.target, call.target} & owners  # of tensors that are used by themselves
        if once and len(layer.users) == 1:
            pairs[layer.target] = call.target
    return pairs


def folded(plain: nn.Module) -> nn.Module | None:
    """A copy of a model with its batch norms folded; None, with a warning, if it is not possible.

    `plain` is in eval mode, as `deployed` makes it.
    """
    model = copy.deepcopy(plain)
    try:
        pairs = layers_before_norms(model)
    except Exception as error:  # tracing runs the model's own Python: anything can happen
        log.warning("batch norms not folded: the model cannot be traced (%s)", error)
        return None
    for layer, norm in pairs.items():
        fold(model.get_submodule(layer), model.get_submodule(norm))
    for name, module in model.named_modules():
        if isinstance(module, TUNED_NORMS) and name not in pairs.values():
            log.info("%s not folded: it does not follow a layer of its own", name)
    return model


@torch.no_grad()
def fold(layer: nn.Module, norm: nn.Module) -> None:
    """Move a norm's factors into a layer's weight and grid; the norm keeps the bias."""
    statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    weight, bias = fuse_conv_bn_weights(layer.weight, layer.bias, *statistics)
    grid = layer._modules.get(quant.WEIGHT_GRID)
    if grid is not None:
        shape = (-1, *[1] * (weight.ndim - 1))
        codes = torch.round(layer.weight / grid.scale.view(shape))
        factor = (norm.weight / torch.sqrt(norm.running_var + norm.eps))[:, None]  # g
        scale = factor.abs() * grid.scale
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        zero = torch.where(factor < 0, grid.maxq.to(grid.zero.dtype) - grid.zero, grid.zero)
        weight = codes * (factor.sign() * scale).view(shape)
        quant.set_weight_grid(layer, quant.Grid(scale, zero, grid.maxq.clone()))
    layer.weight.copy_(weight)
    if layer.bias is not None:
        layer.bias.zero_()
    norm.weight.fill_(1)
    norm.bias.copy_(bias)
    norm.running_mean.zero_()
    norm.running_var.fill_(1 - norm.eps)
