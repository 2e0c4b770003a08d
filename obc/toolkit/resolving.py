"""A model stitched by a profile, solved anew layer by layer (post_proc.py --resolve).

The layers of a database are compressed as if all others were dense: they have to be independent.
Those of a stitched model need not be. Here they go through sequential compression (sequential.py),
each with a mode of its own that leaves it at its level: as many zeros in the same pattern, as many
bits for weights and inputs. It starts from the dense weights, and then

    own mask     the weights that the level has pruned stay zero, the others are shifted to make up
                 for them and for the layers before
    --remask     the shifted weights are pruned anew, as much as at the level
    quantised    grids are fitted to the shifted weights and to what the compressed network gives;
                 they are symmetric where those of the level are

Zeros of a quantised level that come from rounding cannot be told from pruned ones. What counts as
pruned: in an unstructured database every zero; in one of blocks, blocks that are all zero; in one
of channels, input channels that are all zero; with N:M, which the level's name says, every zero of
a layer that has the pattern; otherwise none.

A layer that the profile has at level 0000 is shifted as well. Those that it leaves out stay dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

import quant
from modelutils import find_layers
from obc.solver.layers import LayerView, view
from obc.toolkit.kinds import KINDS
from obc.toolkit.leveldb import Database
from obc.toolkit.modes import NO_QUANTISATION, Mode, PruningMode, QuantMode
from trueobs import TrueOBS


@dataclass(frozen=True)
class ResolveMode(Mode):
    """Compresses a layer as much as at a level: prunes it, then rounds it."""

    name = "resolve"
    text = "as much as at a level of a database"

    level: str = ""
    pruning: PruningMode | None = None  # None: nothing is pruned
    remask: bool = False  # prune anew; else what was pruned stays so
    quantisation: QuantMode | None = None
    excluded: str = ""  # why the layer is left as it is

    @property
    def chosen(self) -> PruningMode | None:
        """The mode that chooses the zeros, if they are chosen here."""
        return self.pruning if self.remask else None

    @property
    def sparsities(self) -> list[float]:
        return self.chosen.sparsities if self.chosen else []

    @property
    def channels_innermost(self) -> bool:
        return bool(self.chosen and self.chosen.channels_innermost)

    @property
    def rows_divisible(self) -> bool:
        return not self.chosen or self.chosen.rows_divisible

    @property
    def swaps_weights(self) -> bool:
        return bool(self.chosen and self.chosen.swaps_weights)

    @property
    def rounds_inputs(self) -> bool:
        return bool(self.quantisation and self.quantisation.rounds_inputs)

    def activation_grid(self, inputs: Tensor) -> quant.Grid:
        return self.quantisation.activation_grid(inputs)

    def misfit(self, layer: LayerView) -> str:
        return self.excluded or super().misfit(layer)

    def start(self, layer: nn.Module, dense: nn.Module) -> Tensor:
        weight = view(dense).matrix
        if self.pruning is None or self.remask:
            return weight
        return weight.masked_fill(self.pruning.gone(view(layer)), 0)

    def solve(self, solver: TrueOBS) -> None:
        if self.chosen:
            self.chosen.solve(solver)
        if self.quantisation and self.quantisation.wbits < NO_QUANTISATION:
            self.quantisation.solve(solver)

    def label(self, weight: Tensor) -> str:
        texts = [f"level {self.level}"]
        if self.pruning:
            texts.append(self.pruning.label(weight))
        if self.quantisation:
            texts.append(f"{self.quantisation.wbits} bits")
        return ", ".join(texts)


def modes_of(
    profile: Mapping[str, str], db: Database, stitched: nn.Module, remask: bool
) -> dict[str, Mode]:
    """A mode for each layer of a stitched model, after its level in the profile."""
    modes: dict[str, Mode] = {}
    for name, layer in find_layers(stitched).items():
        if (level := profile.get(name)) is None:
            modes[name] = ResolveMode(excluded="not in the profile")
            continue
        modes[name] = ResolveMode(
            sequential=True,
            level=level,
            pruning=KINDS[db.kind].pruning.like(view(layer), level),
            remask=remask,
            quantisation=quantisation_of(layer, db.states[level]),
        )
    return modes


def quantisation_of(layer: nn.Module, state: Mapping[str, Tensor]) -> QuantMode | None:
    """The bits of a layer's grids, with the options that all grids of its level were fitted with.

    state: the tensors of the level; a single grid may look symmetric by chance.
    """
    weight, inputs = (
        layer._modules.get(name) for name in (quant.WEIGHT_GRID, quant.ACTIVATION_GRID)
    )
    if weight is None and inputs is None:
        return None
    scales = [x for key, x in state.items() if key.endswith(f".{quant.WEIGHT_GRID}.scale")]
    return QuantMode(
        sequential=True,
        wbits=weight.bits if weight else NO_QUANTISATION,
        abits=inputs.bits if inputs else NO_QUANTISATION,
        wasym=not symmetric(state, quant.WEIGHT_GRID),
        asym=symmetric(state, quant.ACTIVATION_GRID),
        wperweight=all(bool((scale == scale[0]).all()) for scale in scales),
    )


def symmetric(state: Mapping[str, Tensor], grid: str) -> bool:
    """Whether the zero points of all grids of a level are those of symmetric ones."""
    zeros = [x for key, x in state.items() if key.endswith(f".{grid}.zero")]
    highest = [x for key, x in state.items() if key.endswith(f".{grid}.maxq")]
    return all(bool((2 * z == m + 1).all()) for z, m in zip(zeros, highest, strict=True))
