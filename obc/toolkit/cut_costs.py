"""What layers cost where pruned channels are cut out (databases struct, struct_8w8a).

A level without some of a layer's input channels makes that layer cheaper, and the one that computes
them, if the channels can be cut (`export_cut.py`): if one layer computes them, and only layers read
them. With K the channels of such a chain that some reader reads, of C,

    share of a layer left  =  K/C of the chain it reads  ·  K/C of the chain it computes or carries

and 1 in place of a factor without a chain: inputs pruned elsewhere, such as those of a residual
sum, save nothing. Several readers have to ignore a channel together. So a cost is a table over the
levels of all readers of both chains (`joint.py`), exact for FLOPs, parameters, bits and BOPs.

Seconds are measured with all layers at one level. In between, a layer's seconds are interpolated by
the share of it that is left.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from torch import nn

from modelutils import Example, example
from obc.solver.errors import UserError
from obc.toolkit.export_cut import Chain, chains
from obc.toolkit.leveldb import Database

MOST_ENTRIES = 5_000_000  # of a table


class CutShares:
    """The shares of layers that are left, by levels."""

    def __init__(self, db: Database, model: nn.Module, image_shape: Example) -> None:
        images = example(model, image_shape, 2, noise=True)
        self.db, self.model = db, model
        self.read_chain: dict[str, Chain] = {}
        self.own_chain: dict[str, Chain] = {}
        for chain in chains(model, images):
            self.read_chain |= dict.fromkeys(chain.consumers, chain)
            self.own_chain |= dict.fromkeys((chain.producer, *chain.carriers), chain)

    def of_layer(self, layer: str) -> list[Chain]:
        """The chains that a layer reads, and computes or carries."""
        found = (self.read_chain.get(layer), self.own_chain.get(layer))
        return [chain for chain in found if chain is not None]

    def scope(self, layer: str) -> tuple[str, ...]:
        """The layers of the database whose levels change what is left of a layer; itself first."""
        readers = (reader for chain in self.of_layer(layer) for reader in chain.consumers)
        return tuple(dict.fromkeys([layer, *(x for x in readers if x in self.db.layers)]))

    def reads(self, chain: Chain, reader: str, level: str | None) -> np.ndarray:  # (C,) bool
        """The channels that a reader at a level reads; None: dense."""
        if level is None or reader not in self.db.layers:
            weight = self.model.get_submodule(reader).weight.detach()
        else:
            weight = self.db.layer(reader, level)["weight"]
        return chain.read_by(reader, weight).cpu().numpy()

    def left(self, layer: str, levels: Mapping[str, str]) -> float:
        """The share of a layer that is left; layers without a level are dense."""
        share = 1.0
        for chain in self.of_layer(layer):
            reads = [self.reads(chain, x, levels.get(x)) for x in chain.consumers]
            share *= max(1, int(np.any(reads, axis=0).sum())) / chain.channels
        return share

    def table(self, layer: str) -> np.ndarray:  # an axis for each layer of the scope
        """The shares of a layer that are left, at all combinations of levels of its scope."""
        scope, count = self.scope(layer), len(self.db.levels)
        if count ** len(scope) > MOST_ENTRIES:
            raise UserError(
                f"what is left of {layer} depends on the levels of {len(scope)} layers, which is "
                f"too many at {count} levels: make the database with a larger --delta-sparse"
            )
        whole = np.ones((count,) * len(scope))
        for chain in self.of_layer(layer):
            operands: list = []
            for reader in chain.consumers:
                levels = self.db.levels if reader in scope else [None]
                unread = ~np.array([self.reads(chain, reader, level) for level in levels])
                axes = [scope.index(reader), len(scope)] if reader in scope else [len(scope)]
                operands += [(unread if reader in scope else unread[0]).astype(np.float64), axes]
            axes = sorted({axis for axis_list in operands[1::2] for axis in axis_list})[:-1]
            kept = chain.channels - np.einsum(*operands, axes)
            shape = [count if axis in axes else 1 for axis in range(len(scope))]
            whole = whole * (np.maximum(1, kept) / chain.channels).reshape(shape)
        return whole


def uniform(table: np.ndarray) -> np.ndarray:  # (levels,)
    """The entries of a table with all layers at the same level."""
    return table[(np.arange(len(table)),) * table.ndim]


def seconds_table(
    shares: np.ndarray,  # an axis for each layer of the scope
    seconds: Iterable[float],  # (levels,) with all layers at one level
) -> np.ndarray:
    """Seconds at all combinations of levels, by the share that is left.

    Levels that leave the same share are the same network, but for noise: their median counts.
    """
    measured, at = np.asarray(list(seconds)), np.round(uniform(shares), 12)
    known = np.unique(at)
    medians = [np.median(measured[at == share]) for share in known]
    return np.interp(shares, known, medians)


def cost_tables(
    shares: CutShares,
    work: Mapping[str, float],  # of each layer, dense
    bits: Mapping[str, Iterable[float]],  # of each layer at all levels
) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """The costs of layers at all combinations of levels of their scopes."""
    tables = {}
    for layer in shares.db.layers:
        table = shares.table(layer)
        own = np.asarray(list(bits[layer])).reshape(-1, *[1] * (table.ndim - 1))
        tables[layer] = shares.scope(layer), work[layer] * own * table
    return tables
