"""Attention whose projections are layers of their own.

torch's nn.MultiheadAttention keeps the weights of three linear layers in one parameter, which it
multiplies by itself: no layer is called, so none can be seen, measured or compressed. Here

    out, weights = out_proj(softmax(Q Kᵀ/√d + masks) V)    Q = q_proj(query), K = k_proj(key), …

with a linear layer for each of the four. `split_attention` puts `SplitAttention` in the place of
the modules of a network, and leaves those which it does not compute the same as.

torch's fast paths, which go past the layers, are off then. (They return zeros for padding, where
the layers return something: a network that reads its padding gives other outputs without them.)

In files nothing changes: state dicts have torch's names and shapes, so they load into the network
with torch's modules, and the other way round. Only the grids of a quantised layer have its own:

    name.in_proj_weight (3E, E)       name.q_proj.weight, name.k_proj.weight, name.v_proj.weight
    name.in_proj_bias   (3E,)         name.q_proj.bias, …
    name.q_proj_weight, …             name.q_proj.weight, …   where keys have other sizes (kdim)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import skip_init
from torch.utils._pytree import tree_leaves

from obc.inputs.names import PROJECTIONS
from obc.solver.errors import UserError, log
from obc.solver.layers import PROOF_TOLERANCE, forward_hooks


class SplitAttention(nn.Module):
    """What an nn.MultiheadAttention computes, by four linear layers."""

    in_proj_weight = in_proj_bias = None  # so that torch's encoders do not go past the layers

    def __init__(self, packed: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = packed.embed_dim, packed.num_heads
        self.dropout, self.batch_first = packed.dropout, packed.batch_first
        self.add_zero_attn, self.training = packed.add_zero_attn, packed.training
        self._qkv_same_embed_dim = packed._qkv_same_embed_dim
        if self._qkv_same_embed_dim:
            weights = packed.in_proj_weight.detach().chunk(3)
        else:
            weights = [getattr(packed, f"{name}_weight").detach() for name in PROJECTIONS]
        bias = packed.in_proj_bias
        biases = [None] * 3 if bias is None else bias.detach().chunk(3)
        for name, *tensors in zip(PROJECTIONS, weights, biases, strict=True):
            setattr(self, name, linear(*tensors))
        self.out_proj = linear(packed.out_proj.weight, packed.out_proj.bias)
        self.bias_k, self.bias_v = packed.bias_k, packed.bias_v

    def forward(
        self,
        query: Tensor,  # (n, length, E), or (length, n, E) without batch_first, or (length, E)
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,  # a hint; the mask says it
    ) -> tuple[Tensor, Tensor | None]:
        projected = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        found = attended(
            *projected,
            (self.bias_k, self.bias_v),
            (key_padding_mask, attn_mask),
            self.num_heads,
            self.batch_first,
            self.add_zero_attn,
            self.dropout if self.training else 0.0,
            need_weights,
            average_attn_weights,
        )
        return self.out_proj(found[0]), found[1]

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:
        state = super().state_dict(*args, **options)
        self.join(state, options.get("prefix", ""))
        return state

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *others: Any) -> None:
        self.divide(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *others)

    def join(self, state: dict[str, Any], prefix: str) -> None:
        """Give the module's tensors in a state dict torch's names, in place."""
        below = {key: state.pop(key) for key in list(state) if key.startswith(prefix)}
        for kind in ("weight", "bias"):
            parts = {f"{prefix}{name}": f"{prefix}{name}.{kind}" for name in PROJECTIONS}
            if kind == "weight" and not self._qkv_same_embed_dim:
                state |= {f"{name}_weight": below.pop(key) for name, key in parts.items()}
            elif all(key in below for key in parts.values()):
                joined = torch.cat([below.pop(key) for key in parts.values()])
                state[f"{prefix}in_proj_{kind}"] = joined
        state |= below

    def divide(self, state: dict[str, Any], prefix: str) -> None:
        """The reverse of `join`; leaves a state dict without torch's names as it is."""
        for name in PROJECTIONS:
            if f"{prefix}{name}_weight" in state:
                state[f"{prefix}{name}.weight"] = state.pop(f"{prefix}{name}_weight")
        for kind in ("weight", "bias"):
            if (joined := state.pop(f"{prefix}in_proj_{kind}", None)) is not None:
                parts = zip(PROJECTIONS, joined.chunk(3), strict=True)
                state |= {f"{prefix}{name}.{kind}": part for name, part in parts}


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer of its own with these values."""
    rows, columns = weight.shape
    device, dtype = weight.device, weight.dtype
    layer = skip_init(nn.Linear, columns, rows, bias is not None, device=device, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def additive(
    mask: Tensor,  # (…, S), of numbers to add, or true where nothing is to be seen
    k: Tensor,  # (n, heads, S or more, d)
) -> Tensor:
    """A mask as numbers to add to scores; what comes after the first S keys is always seen."""
    if mask.dtype == torch.bool:
        numbers = torch.zeros(mask.shape, dtype=k.dtype, device=k.device)
        mask = numbers.masked_fill(mask, -math.inf)
    return F.pad(mask, (0, k.shape[2] - mask.shape[-1]))


@fx.wrap  # one operation of a traced network
def attended(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    more: tuple[Tensor | None, Tensor | None],  # (1, 1, E): another key, and its value
    masks: tuple[Tensor | None, Tensor | None],  # of keys (n, S); (L, S) or (n·heads, L, S)
    heads: int,
    batch_first: bool,
    zero: bool,  # whether there is another key of zeros, and its value
    dropout: float,
    need_weights: bool,
    average: bool,
) -> tuple[Tensor, Tensor | None]:  # as q; (n, L, S), or (n, heads, L, S)
    """Attention between projections, as F.multi_head_attention_forward computes it."""
    batched = q.ndim == 3
    if not batched:
        q, k, v = (x.unsqueeze(0) for x in (q, k, v))
        masks = (None if masks[0] is None else masks[0].unsqueeze(0), masks[1])
    elif not batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    if more[0] is not None:
        k, v = (
            torch.cat([x, y.expand(len(x), 1, -1)], 1) for x, y in zip((k, v), more, strict=True)
        )
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    if zero:
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
    mask, (padding, pairs) = None, (None if x is None else additive(x, k) for x in masks)
    if padding is not None:
        mask = padding[:, None, None]
    if pairs is not None:
        pairs = pairs.unflatten(0, (-1, heads)) if pairs.ndim == 3 else pairs
        mask = pairs if mask is None else mask + pairs
    weights = None
    if need_weights:
        scores = q * math.sqrt(1 / q.shape[3]) @ k.mT
        weights = (scores if mask is None else scores + mask).softmax(-1)
        weights = F.dropout(weights, dropout) if dropout else weights
        out = weights @ v
        weights = weights.mean(1) if average else weights
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    out = out.transpose(1, 2).flatten(2)
    if not batched:
        return out[0], None if weights is None else weights[0]
    return out if batch_first else out.transpose(0, 1), weights


# -- networks --------------------------------------------------------------------------------------


def split_attention(model: nn.Module, run: Callable[[], object]) -> None:
    """Divide every nn.MultiheadAttention of a model into layers, in place.

    `run` calls the model on real inputs, in eval mode. A module stays as it is, and the log says
    so, if it is not called, if it gives other outputs in parts, or if its class is not torch's own.
    """
    packed = {n: x for n, x in model.named_modules() if isinstance(x, nn.MultiheadAttention)}
    if not packed:
        return
    split = {name: SplitAttention(x) for name, x in packed.items() if _is_torchs(x)}
    reasons = {name: "its class is not torch's own" for name in packed}
    reasons |= {name: "the network does not call it" for name in split}
    differs = "in parts it gives other outputs"

    def compare(name: str, module: nn.Module, args: tuple, kwargs: dict, theirs: tuple) -> None:
        try:
            ours = split[name](*args, **kwargs)
        except (RuntimeError, TypeError, AttributeError):
            ours = (None, None)
        same = reasons[name] != differs and all(map(_close, ours, theirs))
        reasons[name] = "" if same else differs

    with _without_fast_paths(), forward_hooks({name: packed[name] for name in split}, compare):
        whole = run()
    proven = {name: x for name, x in split.items() if not reasons[name]}
    _replace(model, {id(packed[name]): x for name, x in proven.items()})
    try:
        parts = tree_leaves(run())
        failure = "" if all(map(_close, parts, tree_leaves(whole))) else "other outputs"
    except UserError as error:  # the model's own code looks into its attention
        failure = str(error)
    if failure:
        _replace(model, {id(x): packed[name] for name, x in proven.items()})
        reasons |= {name: f"the network needs it whole ({failure})" for name in proven}
    for name, reason in reasons.items():
        if reason:
            log.info("%s.in_proj_weight left dense: %s", name, reason)


def _is_torchs(module: nn.Module) -> bool:
    return type(module) is nn.MultiheadAttention and "forward" not in vars(module)


def _close(ours: object, theirs: object) -> bool:
    """Whether two outputs are equal up to rounding."""
    if not (isinstance(ours, Tensor) and isinstance(theirs, Tensor)):
        return ours is theirs or not (isinstance(ours, Tensor) or isinstance(theirs, Tensor))
    if ours.shape != theirs.shape:
        return False
    tolerance = PROOF_TOLERANCE * float(theirs.nan_to_num().abs().max())
    return torch.allclose(ours, theirs, rtol=0, atol=tolerance, equal_nan=True)


def _replace(model: nn.Module, others: Mapping[int, nn.Module]) -> None:
    """Put other modules in the place of some, which are named by their ids."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if id(child) in others:
                setattr(module, name, others[id(child)])
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # which only torch's own attention takes


@contextmanager
def _without_fast_paths() -> Iterator[None]:
    """Inside, torch's encoders call their layers."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


# -- state dicts -----------------------------------------------------------------------------------


def layer_names(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict of the model with a weight for each of its layers."""
    state = dict(state)
    for prefix, module in _split_modules(model):
        module.divide(state, prefix)
    return state


def torch_names(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The reverse of `layer_names`."""
    state = dict(state)
    for prefix, module in _split_modules(model):
        module.join(state, prefix)
    return state


def _split_modules(model: nn.Module) -> Iterator[tuple[str, SplitAttention]]:
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, SplitAttention):
            yield f"{name}." if name else "", module
