"""Kinds of databases: the folders of their levels, and what a level leaves of a layer's weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from obc.solver.layers import innermost_order
from obc.toolkit.modes import BlockedMode, NMPruneMode, PruningMode, StructMode, UnstrMode
from quant import ACTIVATION_GRID, WEIGHT_GRID

SPARSITY = r"\d{4}"
FULL_BITS = 32


def nonzero_share(
    columns: Tensor,  # (rows, taps, channels), or blocks of them
) -> float:
    return int(torch.count_nonzero(columns)) / columns.numel()


def share_of_2_of_4(
    columns: Tensor,  # (rows, taps, channels)
) -> float:
    """1/2 if the weight is 2:4 sparse, else 1."""
    if columns.shape[2] % 4:  # left dense
        return 1.0
    return 0.5 if bool(((columns == 0).view(-1, 4).sum(1) >= 2).all()) else 1.0


def share_of_blocks(
    columns: Tensor,  # (rows, taps, channels)
) -> float:
    """The share of blocks of 4 that are not all zero."""
    return 1.0 if columns.shape[2] % 4 else nonzero_share(columns.reshape(-1, 4).any(1))


@dataclass(frozen=True)
class Kind:
    """A kind of database; to add one, add an entry to `KINDS`."""

    folders: tuple[str, ...]
    level_pattern: str  # regular expression of the names of levels
    constraint: str  # what a target of spdy.py limits by default
    pruning: type[PruningMode]  # how its levels are pruned, if they are
    quantised_share: Callable[[Tensor], float] = nonzero_share  # of a quantised weight left
    cuts: bool = False  # whether what is pruned is cut out (`cut_costs.py`)


KINDS = {
    "mixed": Kind(
        ("models_quant", "models_nm_quant"),
        r"(\d+_)?\d+w\d+a",
        "bops",
        NMPruneMode,
        share_of_2_of_4,
    ),
    "4block": Kind(("models_4block",), SPARSITY, "flops", BlockedMode),
    "unstr": Kind(("models_unstr",), SPARSITY, "flops", UnstrMode),
    "4block_8w8a": Kind(("models_4block_8w8a",), SPARSITY, "bops", BlockedMode, share_of_blocks),
    "struct": Kind(("models_struct",), SPARSITY, "flops", StructMode, cuts=True),
    "struct_8w8a": Kind(("models_struct_8w8a",), SPARSITY, "bops", StructMode, cuts=True),
}


def unit_cost(tensors: Mapping[str, Tensor], kind: str, constr: str) -> float:
    """What a level leaves of each of a layer's weights (params, bits) or FLOPs (flops, bops)."""
    weight_bits = grid_bits(tensors, WEIGHT_GRID)
    share = share_left(tensors["weight"], kind if weight_bits < FULL_BITS else None)
    if constr == "bits":
        return share * weight_bits
    if constr == "bops":
        return share * max(weight_bits, grid_bits(tensors, ACTIVATION_GRID))
    return share


def share_left(
    weight: Tensor,
    quantised_in: str | None = None,  # the kind of the database, if the weight is quantised
) -> float:
    """The share of weights that was not pruned; see `costs.py`."""
    columns = weight.flatten(1)[:, innermost_order(weight.shape)]
    columns = columns.view(len(weight), -1, weight.shape[1])
    return (KINDS[quantised_in].quantised_share if quantised_in else nonzero_share)(columns)


def grid_bits(tensors: Mapping[str, Tensor], grid: str) -> int:
    """Bits of a layer's weights or activations: 32 without a grid."""
    maxq = tensors.get(f"{grid}.maxq")
    return FULL_BITS if maxq is None else int(maxq).bit_length()
