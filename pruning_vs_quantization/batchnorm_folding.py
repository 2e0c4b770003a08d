"""Batch norms folded into the layers before them, on grids: the arithmetic of a device.

In training and evaluation a batch norm follows its layer. A device has none: with running mean m,
variance v, weight γ and bias β,

    BN(Σ w x + b) = Σ (g w) x + (β + g (b − m))        g = γ / √(v + ε), per output channel

so the layer's weights become g w. Folding happens after training, to weights that are on a grid
already, w = Δ q with whole numbers q from −z to 2^b − 1 − z. Their codes stay what they are and the
steps take the factors in: Δ' = |g| Δ, per output channel even where Δ was one number for the layer.
That costs a device nothing: it is the multiplier that brings a channel's sum of integer products to
the next layer's scale, which has to be there anyhow, beside the bias. Where g < 0, the codes turn
about: code' = 2^b − 1 − code and z' = 2^b − 1 − z, so that g w = Δ' (code' − z') exactly. Where
g = 0 the channel is its bias, its weights and its step are 0 and 1.

(The other way, folding before quantising, would choose one Δ for the weights g w, whose channels
differ in size far more than those of w. With a step per channel both are the same.)

A folded model has the same layers and loads like any other checkpoint: the layer has the folded
weight and grid, and the batch norm is left with nothing but the bias, m = 0, v = 1 − ε, γ = 1, so
that it multiplies by 1. It must not be batch-norm tuned again; the unfolded one may.

Only a norm with γ and β that is the one reader of a layer's output is folded; torch.fx finds them.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn

import quant
from obc.solver.errors import log
from obc.solver.layers import along_rows, compressible

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)  # and what is derived from them, such as timm's


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        known = compressible(module) or isinstance(module, NORMS)
        return known or super().is_leaf_module(module, name)


def layers_before_norms(model: nn.Module) -> dict[str, str]:
    """Layer → the batch norm to fold into it. Raises whatever tracing the model raises."""
    modules = dict(model.named_modules())
    calls = [node for node in _Tracer().trace(model).nodes if node.op == "call_module"]
    targets = [node.target for node in calls]
    pairs = {}
    for norm in calls:
        layer = norm.args[0] if norm.args else None
        if layer not in calls or len(layer.users) > 1:
            continue
        once = targets.count(layer.target) == targets.count(norm.target) == 1
        if once and _foldable(modules[layer.target], modules[norm.target]):
            pairs[layer.target] = norm.target
    return pairs


def _foldable(layer: nn.Module, norm: nn.Module) -> bool:
    return (
        compressible(layer)
        and isinstance(norm, NORMS)
        and norm.affine
        and norm.running_mean is not None
    )


@torch.no_grad()
def folded(plain: nn.Module) -> nn.Module | None:
    """A copy of a model with its batch norms folded; None, with a warning, if it is not possible.

    `plain` is in eval mode, as `compressed_model.deployed` makes it.
    """
    model = copy.deepcopy(plain)
    try:
        pairs = layers_before_norms(model)
    except Exception as error:  # tracing runs the model's own Python: anything can happen
        log.warning("batch norms not folded: the model cannot be traced (%s)", error)
        return None
    for layer, norm in pairs.items():
        fold(model.get_submodule(layer), model.get_submodule(norm))
    norms = [name for name, module in model.named_modules() if isinstance(module, NORMS)]
    for name in [name for name in norms if name not in pairs.values()]:
        log.info("%s not folded: it does not follow a layer of its own", name)
    return model


@torch.no_grad()
def fold(layer: nn.Module, norm: nn.Module) -> None:
    """Move a norm's factors into a layer's weight and grid; the norm keeps the bias."""
    factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)  # g
    bias = norm.bias - factor * norm.running_mean
    if layer.bias is not None:
        bias += factor * layer.bias
        layer.bias.zero_()
    grid = layer._modules.get(quant.WEIGHT_GRID)
    if grid is None:
        layer.weight.mul_(along_rows(factor, layer.weight))
    else:
        codes = torch.round(layer.weight / along_rows(grid.scale, layer.weight))
        grid = scaled_grid(grid, factor[:, None])
        layer.weight.copy_(codes * along_rows(factor.sign()[:, None] * grid.scale, codes))
        quant.set_weight_grid(layer, grid)
    norm.weight.fill_(1)
    norm.bias.copy_(bias)
    norm.running_mean.zero_()
    norm.running_var.fill_(1 - norm.eps)


def scaled_grid(
    grid: quant.Grid,  # scale and zero (rows, 1)
    factor: Tensor,  # (rows, 1), of any sign
) -> quant.Grid:
    """The grid of factor · w for weights w on a grid, as in the module docstring."""
    scale = factor.abs() * grid.scale
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = torch.where(factor < 0, grid.maxq.to(grid.zero.dtype) - grid.zero, grid.zero)
    return quant.Grid(scale, zero, grid.maxq.clone())
