"""The table of modes: all that main_trueobs.py and the toolkit know about a mode of compression.

OBC (arXiv 2208.11580), sections 4 and 5. Every mode is a pivot rule of one solver (`TrueOBS`):

    mode      which weights are fixed, and at what               columns       result
    quant     each at its nearest value on the grid              c, kh, kw     one model
    nmprune   N in every group of M, at 0                        kh, kw, c     one model
    unstr     any, at 0                                          c, kh, kw     a level per sparsity
    blocked   blocks of `blocked_size`, at 0                     kh, kw, c     a level per sparsity
    struct    input channels, in all rows of a group, at 0       c, kh, kw     a level per sparsity

A mode is a class: its fields are the options that belong to it, its class variables and methods say
the rest. To add one, write its class and enter it in `MODES`; nothing else names a mode.

`--order` replaces the solver by the baselines that papers compare with: `magnitude` removes the
smallest weights and leaves the others as they are, `nearest` rounds each weight by itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import quant
from obc.inputs.batches import Batches
from obc.solver.elimination import ORDERS
from obc.solver.errors import UserError
from obc.solver.layers import LayerView
from obc.solver.levels import sparsity_grid
from obc.toolkit import cli
from obc.toolkit.calibrate import activation_grids
from trueobs import TrueOBS

NO_QUANTISATION = 32  # bits


def option(default: Any, text: str, flag: str = "", **parsing: Any) -> Any:
    """A field that is an option of main_trueobs.py, too; `parsing` is for `add_argument`."""
    return field(default=default, metadata={"flag": flag, "help": text, **parsing})


@dataclass(frozen=True)
class Mode(ABC):
    """A mode with its options. Raises UserError for values that make no sense."""

    name: ClassVar[str]
    text: ClassVar[str]  # for --help
    baseline: ClassVar[str] = "magnitude"  # the --order besides obs
    channels_innermost: ClassVar[bool] = False  # whether columns are in the order (kh, kw, c)
    rows_divisible: ClassVar[bool] = True  # whether processes can share the rows of a layer
    yields_levels: ClassVar[bool] = False  # a database of levels, or one model
    serves: ClassVar[tuple[str, ...]] = ()  # kinds of database that its output is for
    divisor_name: ClassVar[str] = ""  # in the reason for leaving a layer dense

    order: str = option(
        "obs",
        "obs; or a baseline: magnitude (pruning: the smallest weights go, the others stay as they "
        "are), nearest (quant: rounding to nearest)",
        choices=ORDERS,
    )
    sequential: bool = option(
        False,
        "layer by layer in order of execution: each by the inputs that the compressed network "
        "gives it, to return what the dense network does",
    )
    shift_dense: bool = option(
        False, "with --sequential: layers that are left dense make up for those before them, too"
    )

    def __post_init__(self) -> None:
        if self.order not in ("obs", self.baseline):
            raise UserError(
                f"--order {self.order} is not for {self.name}: choose obs or {self.baseline}"
            )
        if self.shift_dense and not self.sequential:
            raise UserError("--shift-dense needs --sequential")

    @property
    def divisor(self) -> int:
        """A layer is left dense unless its input channels are a multiple of this."""
        return 1

    @property
    def sparsities(self) -> list[float]:
        """Of the levels; empty for a mode that yields one model."""
        return []

    @property
    def nothing_to_solve(self) -> str:
        """Why no layer needs the solver; empty if they do."""
        return ""

    def misfit(self, layer: LayerView) -> str:
        """Why a layer is left dense; empty if it is not."""
        if layer.proof.flaw or layer.divides_by(self.divisor):
            return layer.proof.flaw
        return (
            f"{layer.channels} input channels are not a multiple of "
            f"{self.divisor_name} = {self.divisor}"
        )

    def activation_grids(
        self, dense: nn.Module, batches: Batches, device: torch.device
    ) -> dict[str, quant.Grid]:
        """Grids that the inputs of layers are rounded to, by layer, unless it is sequential."""
        return {}

    @property
    def rounds_inputs(self) -> bool:
        """Whether the layers' inputs are rounded."""
        return False

    def activation_grid(self, inputs: Tensor) -> quant.Grid:
        """The grid that one layer's inputs are rounded to."""
        raise NotImplementedError

    @abstractmethod
    def solve(self, solver: TrueOBS) -> None:
        """Compress the layer in place; or, of many levels, prepare `solver.level_parts`."""

    @abstractmethod
    def label(
        self,
        weight: Tensor,  # compressed; the last level's
    ) -> str:
        """What became of a layer, for its line in the log."""


def zeros_in(weight: Tensor) -> float:
    """The fraction of a weight that is zero."""
    return float((weight == 0).float().mean())


# -- one model -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QuantMode(Mode):
    """OBQ (section 5); options of both grids."""

    name = "quant"
    text = "OBQ: weights and, with --abits, activations on a grid"
    baseline = "nearest"
    serves = ("mixed", "4block_8w8a")

    wbits: int = option(NO_QUANTISATION, "bits of weights, 1-16; 32: none", type=cli.bits)
    abits: int = option(NO_QUANTISATION, "bits of activations; 32: none", type=cli.bits)
    wperweight: bool = option(False, "one weight scale per layer instead of per output channel")
    wasym: bool = option(False, "asymmetric weight grid")
    wminmax: bool = option(False, "min-max weight range instead of the search")
    asym: bool = option(False, "symmetric activation grid (a-sym)")
    aminmax: bool = option(False, "min-max activation range instead of the search")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wbits == self.abits == NO_QUANTISATION:
            raise UserError("quant needs --wbits or --abits below 32")

    @property
    def nothing_to_solve(self) -> str:
        if self.wbits < NO_QUANTISATION or self.shift_dense:
            return ""
        return f"weights left as they are (--wbits 32); activations: {self.abits} bits"

    def misfit(self, layer: LayerView) -> str:
        return super().misfit(layer) or ("--wbits 32" if self.wbits == NO_QUANTISATION else "")

    def activation_grids(
        self, dense: nn.Module, batches: Batches, device: torch.device
    ) -> dict[str, quant.Grid]:
        if self.sequential or not self.rounds_inputs:
            return {}
        images = next(iter(batches))[0].to(device)
        return activation_grids(dense, images, self.abits, self.asym, not self.aminmax)

    @property
    def rounds_inputs(self) -> bool:
        return self.abits < NO_QUANTISATION

    def activation_grid(self, inputs: Tensor) -> quant.Grid:
        return quant.fit_activation_grid(inputs, self.abits, self.asym, not self.aminmax)

    def solve(self, solver: TrueOBS) -> None:
        solver.quantizer = quant.fit_weight_grid(
            solver.view.matrix, self.wbits, not self.wasym, not self.wminmax, not self.wperweight
        )
        solver.quantize()
        quant.set_weight_grid(solver.layer, solver.quantizer)

    def label(self, weight: Tensor) -> str:
        return f"{self.wbits} bits"


@dataclass(frozen=True)
class NMPruneMode(Mode):
    """N:M sparsity (section 4)."""

    name = "nmprune"
    text = "N:M sparsity along the input channels"
    channels_innermost = True
    divisor_name = "M"

    prunen: int = option(2, "zeros per group", type=cli.nonnegative_int)
    prunem: int = option(4, "weights per group", type=cli.positive_int)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prunen > self.prunem:
            raise UserError(f"--prunen {self.prunen} is more than --prunem {self.prunem}")

    @property
    def divisor(self) -> int:
        return self.prunem

    def solve(self, solver: TrueOBS) -> None:
        solver.nmprune(self.prunen, self.prunem)

    def label(self, weight: Tensor) -> str:
        return f"sparsity {zeros_in(weight):.4f} ({self.prunen}:{self.prunem})"


# -- a database of levels --------------------------------------------------------------------------


@dataclass(frozen=True)
class LevelMode(Mode, ABC):
    """A mode that yields the layer at every sparsity of a grid, from one elimination.

    With `sparsity` it yields one model, whose layers all have this fraction of zeros.
    """

    default_grid: ClassVar[tuple[float, float, float]]  # minimum, maximum, delta

    sparsity: float | None = option(
        None, "one level, for --save, in place of a database", metavar="F", type=cli.fraction
    )
    min_sparsity: float | None = option(
        None, "fraction of zeros at the first level", metavar="F", type=cli.fraction
    )
    max_sparsity: float | None = option(None, "at the last level", metavar="F", type=cli.fraction)
    delta_sparse: float | None = option(
        None, "by which density shrinks per level", metavar="F", type=cli.fraction
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparsity is not None:
            if any(getattr(self, name) is not None for name in GRID_OPTIONS):
                raise UserError("--sparsity is one level: leave out --min-, --max-, --delta-sparse")
            return
        if self.sequential:
            raise UserError(
                f"--sequential yields one model: {self.name} needs --sparsity F and --save FILE"
            )
        for name, default in zip(GRID_OPTIONS, self.default_grid, strict=True):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        if self.min_sparsity > self.max_sparsity:
            raise UserError(
                f"--min-sparsity {self.min_sparsity:g} is above "
                f"--max-sparsity {self.max_sparsity:g}"
            )
        if self.delta_sparse == 0:
            raise UserError("--delta-sparse must be above 0")

    @property
    def yields_levels(self) -> bool:
        return self.sparsity is None

    @cached_property
    def sparsities(self) -> list[float]:
        if self.sparsity is not None:
            return [self.sparsity]
        return sparsity_grid(self.min_sparsity, self.max_sparsity, self.delta_sparse)

    @abstractmethod
    def prepare(self, solver: TrueOBS) -> None:
        """Find the order in which the layer's weights go."""

    def solve(self, solver: TrueOBS) -> None:
        self.prepare(solver)
        if not self.yields_levels:
            (weight,) = solver.prune_unstr(self.sparsities)
            solver.world.fill_rows(weight)
            solver.layer.weight.data.copy_(weight)

    def label(self, weight: Tensor) -> str:
        if not self.yields_levels:
            return f"sparsity {zeros_in(weight):.4f}"
        return f"{len(self.sparsities)} levels to sparsity {zeros_in(weight):.4f}"


GRID_OPTIONS = ("min_sparsity", "max_sparsity", "delta_sparse")


@dataclass(frozen=True)
class UnstrMode(LevelMode):
    """Unstructured sparsity (section 4)."""

    name = "unstr"
    text = "unstructured sparsity, a database of levels"
    serves = ("unstr",)
    default_grid = (0.0, 0.99, 0.1)

    def prepare(self, solver: TrueOBS) -> None:
        solver.prepare_unstr()


@dataclass(frozen=True)
class BlockedMode(LevelMode):
    """Sparsity in blocks (section 4)."""

    name = "blocked"
    text = "sparsity in blocks along the input channels, a database of levels"
    channels_innermost = True
    serves = ("4block",)
    divisor_name = "block size"
    default_grid = (0.0, 0.95, 0.1)

    blocked_size: int = option(4, "weights per block", "--blocked_size", type=cli.positive_int)

    @property
    def divisor(self) -> int:
        return self.blocked_size

    def prepare(self, solver: TrueOBS) -> None:
        solver.prepare_blocked(self.blocked_size)


@dataclass(frozen=True)
class StructMode(LevelMode):
    """Whole input channels: the OBS score summed over all rows of a group."""

    name = "struct"
    text = "whole input channels, a database of levels"
    rows_divisible = False
    default_grid = (0.0, 0.9, 0.05)

    def prepare(self, solver: TrueOBS) -> None:
        solver.prepare_struct(size=solver.view.taps)


MODES: dict[str, type[Mode]] = {
    mode.name: mode for mode in (QuantMode, NMPruneMode, UnstrMode, BlockedMode, StructMode)
}


# -- options ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModeOption:
    """An option of main_trueobs.py that belongs to some modes."""

    field: Field
    modes: tuple[str, ...]

    @property
    def flag(self) -> str:
        return self.field.metadata["flag"] or "--" + self.field.name.replace("_", "-")

    @property
    def owners(self) -> str:
        """The modes, in words.

        >>> mode_options()["max_sparsity"].owners
        'unstr, blocked and struct'
        """
        return " and ".join(", ".join(self.modes).rsplit(", ", 1))

    def arguments(self) -> dict[str, Any]:
        """For `ArgumentParser.add_argument`."""
        arguments = {key: x for key, x in self.field.metadata.items() if key != "flag"}
        if self.field.default is False:
            return arguments | {"action": "store_true"}
        if self.field.name in GRID_OPTIONS:  # each mode has its own
            index = GRID_OPTIONS.index(self.field.name)
            defaults = [f"{name} {MODES[name].default_grid[index]:g}" for name in self.modes]
            arguments["help"] += f" (default: {', '.join(defaults)})"
        return arguments | {"default": self.field.default}


def mode_options() -> dict[str, ModeOption]:
    """All options of modes by the names of their fields, in the order of the table."""
    owners: dict[str, list[str]] = {}
    for name, mode in MODES.items():
        for item in fields(mode):
            owners.setdefault(item.name, []).append(name)
    described = {item.name: item for mode in MODES.values() for item in fields(mode)}
    return {name: ModeOption(described[name], tuple(modes)) for name, modes in owners.items()}


def make_mode(name: str, options: Mapping[str, Any]) -> Mode:
    """A mode with its options; raises UserError for bad values and for options of other modes."""
    for option_name, item in mode_options().items():
        if name not in item.modes and options[option_name] != item.field.default:
            raise UserError(f"{item.flag} belongs to {item.owners}, not to {name}")
    return MODES[name](**{item.name: options[item.name] for item in fields(MODES[name])})


def modes_serving(kind: str) -> list[str]:
    """The modes whose output goes into a database of this kind."""
    return [name for name, mode in MODES.items() if kind in mode.serves]
