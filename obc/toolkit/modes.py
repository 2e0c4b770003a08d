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

import argparse
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import quant
from modelutils import find_layers
from obc.inputs.batches import Batches
from obc.solver.elimination import ORDERS
from obc.solver.errors import UserError
from obc.solver.layers import LayerView, view
from obc.solver.levels import sparsity_grid
from obc.toolkit import cli
from obc.toolkit.calibrate import activation_grids
from trueobs import TrueOBS

NO_QUANTISATION = 32  # bits
LONE_BITS = 2  # of weights, at which smaller errors of lone layers need not help the network
SYMMETRIC_BITS = 4  # of weights, up to which it is seen whether an asymmetric grid is much better
MUCH_WORSE = 1.3  # × the squared error of rounding to an asymmetric grid


def pattern_and_bits(text: str) -> str:
    """An argparse type for PATTERN=B; returns the text.

    >>> pattern_and_bits("layer1.*=8")
    'layer1.*=8'
    """
    pattern, _, bits = text.rpartition("=")
    if not pattern or not re.fullmatch(r"[1-9]|1[0-6]", bits):
        raise argparse.ArgumentTypeError(
            f"must be a pattern of names, =, and 1 to 16 bits, as in 'layer1.*=8'; got {text} "
            "(--skip PATTERN leaves layers dense)"
        )
    return text


def option(
    default: Any,
    text: str,
    flag: str = "",
    first: bool = False,  # whether --help shows it among the options to begin with
    **parsing: Any,  # for `add_argument`
) -> Any:
    """A field that is an option of main_trueobs.py, too."""
    return field(default=default, metadata={"flag": flag, "first": first, "help": text, **parsing})


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
    search_name: ClassVar[str] = ""  # of the option for a search after the elimination
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
        first=True,
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
        if self.search and self.order != "obs":
            raise UserError(
                f"--{self.search_name} improves on --order obs: leave out --order {self.order}"
            )

    @property
    def search(self) -> bool | None:
        """Whether a search follows the elimination, if that was said."""
        return getattr(self, self.search_name) if self.search_name else None

    @property
    def searches(self) -> bool:
        """Whether a search follows the elimination: if not said, where layers go in order."""
        return self.search if self.search is not None else self.sequential and self.order == "obs"

    @property
    def swaps_weights(self) -> bool:
        """Whether that search takes memory for swaps."""
        return self.searches and self.search_name == "swaps"

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

    def for_layer(self, name: str) -> Mode:
        """The mode as it is applied to a layer; some have options for layers by name."""
        return self

    @property
    def aim(self) -> str:
        """What it does to a layer, in a word."""
        return "yes"

    def misfit(self, layer: LayerView) -> str:
        """Why a layer is left dense; empty if it is not."""
        if layer.left_dense or layer.divides_by(self.divisor):
            return layer.left_dense
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

    def start(
        self,
        layer: nn.Module,
        dense: nn.Module,  # the same layer of the dense network
    ) -> Tensor:  # (rows, d)
        """The weights that a layer starts from when layers are compressed in order: its own."""
        return view(layer).matrix

    def advice(self, layers: Mapping[str, nn.Module]) -> list[str]:
        """What to reconsider before the layers are compressed."""
        return []

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


class PruningMode(Mode, ABC):
    """A mode that can prune a layer as much as another weight of the layer was pruned."""

    @classmethod
    @abstractmethod
    def like(cls, layer: LayerView, level: str) -> PruningMode | None:
        """The mode at the sparsity of a layer that a database has at a level.

        None if nothing is pruned there.
        """

    @abstractmethod
    def gone(self, layer: LayerView) -> Tensor:  # (rows, d) bool
        """Which of a layer's weights belong to what was pruned: units of the mode that are zero."""


# -- one model -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QuantMode(Mode):
    """OBQ (section 5); options of both grids."""

    name = "quant"
    text = "OBQ: weights and, with --abits, activations on a grid"
    baseline = "nearest"
    search_name = "refine"
    serves = ("mixed", "4block_8w8a", "struct_8w8a")

    wbits: int = option(
        NO_QUANTISATION, "bits of weights, 1-16; 32: none", first=True, metavar="B", type=cli.bits
    )
    abits: int = option(
        NO_QUANTISATION, "bits of activations; 32: none", first=True, metavar="B", type=cli.bits
    )
    bits: list[str] | None = option(
        None,
        "these layers' weights, and their inputs if inputs are rounded, on grids of B bits; "
        "a pattern (glob) of names, the last that matches counts; may be repeated",
        metavar="PATTERN=B",
        type=pattern_and_bits,
        action="append",
    )
    wperweight: bool = option(False, "one weight scale per layer instead of per output channel")
    wasym: bool = option(False, "asymmetric weight grid")
    wminmax: bool = option(False, "min-max weight range instead of the search")
    hscale: bool = option(
        False, "choose the weight range, and the zero, by the error of the layer's outputs"
    )
    refine: bool | None = option(
        None,
        "then move codes while that lowers a row's error (default: with --sequential)",
        action=argparse.BooleanOptionalAction,
    )
    asym: bool = option(False, "symmetric activation grid (a-sym)")
    aminmax: bool = option(False, "min-max activation range instead of the search")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wbits == self.abits == NO_QUANTISATION:
            hint = "; to quantise some layers only: --wbits B --only PATTERN" if self.bits else ""
            raise UserError(f"quant needs --wbits or --abits below 32{hint}")
        if self.hscale and (self.wperweight or self.order != "obs"):
            flag = "--wperweight" if self.wperweight else f"--order {self.order}"
            raise UserError(f"--hscale chooses a range for each row by OBS: leave out {flag}")

    def for_layer(self, name: str) -> QuantMode:
        own = [text.rpartition("=") for text in self.bits or ()]
        bits = [int(bits) for pattern, _, bits in own if fnmatchcase(name, pattern)][-1:]
        if not bits:
            return self
        widths = ("wbits", "abits")
        return replace(self, **{x: bits[0] for x in widths if getattr(self, x) < NO_QUANTISATION})

    @property
    def nothing_to_solve(self) -> str:
        if self.wbits < NO_QUANTISATION or self.shift_dense:
            return ""
        return f"weights left as they are (--wbits 32); activations: {self.abits} bits"

    def misfit(self, layer: LayerView) -> str:
        if reason := super().misfit(layer):
            return reason
        return "weights left as they are (--wbits 32)" if self.wbits == NO_QUANTISATION else ""

    def activation_grids(
        self, dense: nn.Module, batches: Batches, device: torch.device
    ) -> dict[str, quant.Grid]:
        if self.sequential or not self.rounds_inputs:
            return {}
        images = next(iter(batches))[0].to(device)
        layer_bits = {name: self.for_layer(name).abits for name in find_layers(dense)}
        search = not self.aminmax
        return activation_grids(dense, images, self.abits, self.asym, search, layer_bits)

    @property
    def rounds_inputs(self) -> bool:
        return self.abits < NO_QUANTISATION

    def activation_grid(self, inputs: Tensor) -> quant.Grid:
        return quant.fit_activation_grid(inputs, self.abits, self.asym, not self.aminmax)

    def advice(self, layers: Mapping[str, nn.Module]) -> list[str]:
        lines = []
        if self.searches and not self.sequential and self.wbits <= LONE_BITS:
            lines.append(
                f"--refine at {self.wbits} bits lowers the error of every layer, but may not help "
                "the network, where errors of layers add up: use it with --sequential"
            )
        ratios = {}  # the squared error on a symmetric grid / on an asymmetric one
        for name, layer in layers.items() if not self.wasym else ():
            seen, bits = view(layer), self.for_layer(name).wbits
            if bits <= SYMMETRIC_BITS and not self.misfit(seen):
                ratios[name] = quant.symmetric_loss(seen.matrix.detach(), bits).cpu()
        if worse := {name: float(x) for name, x in ratios.items() if x >= MUCH_WORSE}:
            worst = max(worse, key=worse.__getitem__)
            lines.append(
                f"symmetric grids of few bits round {len(worse)} of {len(ratios)} layers with at "
                f"least {MUCH_WORSE} times the squared error of asymmetric ones "
                f"({worst}: {worse[worst]:.2g} times): try --wasym"
            )
        return lines

    def solve(self, solver: TrueOBS) -> None:
        solver.quantizer = quant.fit_weight_grid(
            solver.view.matrix, self.wbits, not self.wasym, not self.wminmax, not self.wperweight
        )
        solver.quantize(self.searches, self.hscale)
        quant.set_weight_grid(solver.layer, solver.quantizer)

    def label(self, weight: Tensor) -> str:
        return f"{self.wbits} bits"

    @property
    def aim(self) -> str:
        if self.abits == NO_QUANTISATION:
            return f"{self.wbits} bits"
        return f"{self.abits} bits in" if self.nothing_to_solve else f"{self.wbits}w{self.abits}a"


@dataclass(frozen=True)
class NMPruneMode(PruningMode):
    """N:M sparsity (section 4)."""

    name = "nmprune"
    text = "N:M sparsity along the input channels"
    search_name = "swaps"
    channels_innermost = True
    divisor_name = "M"

    prunen: int = option(2, "zeros per group", metavar="N", type=cli.nonnegative_int)
    prunem: int = option(4, "weights per group", metavar="M", type=cli.positive_int)
    swaps: bool | None = option(
        None,
        "then let kept and pruned weights of a group change places while that lowers a row's "
        "error (default: with --sequential)",
        action=argparse.BooleanOptionalAction,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prunen > self.prunem:
            raise UserError(f"--prunen {self.prunen} is more than --prunem {self.prunem}")

    @property
    def divisor(self) -> int:
        return self.prunem

    @property
    def aim(self) -> str:
        return f"{self.prunen}:{self.prunem}"

    @classmethod
    def like(cls, layer: LayerView, level: str) -> PruningMode | None:
        digits, underscore, _ = level.partition("_")  # as in 24_8w8a
        for cut in range(1, len(digits) if underscore else 0):
            n, m = int(digits[:cut]), int(digits[cut:])
            if n <= m and layer.divides_by(m):
                groups = layer.matrix[:, layer.innermost].view(layer.rows, -1, m)
                if bool(((groups == 0).sum(2) >= n).all()):
                    return cls(sequential=True, prunen=n, prunem=m)
        return None

    def gone(self, layer: LayerView) -> Tensor:
        return layer.matrix == 0

    def solve(self, solver: TrueOBS) -> None:
        solver.nmprune(self.prunen, self.prunem, self.searches)

    def label(self, weight: Tensor) -> str:
        return f"sparsity {zeros_in(weight):.4f} ({self.prunen}:{self.prunem})"


# -- a database of levels --------------------------------------------------------------------------


@dataclass(frozen=True)
class LevelMode(PruningMode, ABC):
    """A mode that yields the layer at every sparsity of a grid, from one elimination.

    With `sparsity` it yields one model, whose layers all have this fraction of zeros.
    """

    default_grid: ClassVar[tuple[float, float, float]]  # minimum, maximum, delta

    sparsity: float | None = option(
        None,
        "one level, for --save, in place of a database",
        first=True,
        metavar="F",
        type=cli.fraction,
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

    @classmethod
    def like(cls, layer: LayerView, level: str) -> PruningMode | None:
        sparsity = float(cls(sparsity=0.0).gone(layer).double().mean())
        return cls(sequential=True, sparsity=sparsity) if sparsity else None

    @abstractmethod
    def prepare(self, solver: TrueOBS) -> None:
        """Find the order in which the layer's weights go."""

    def solve(self, solver: TrueOBS) -> None:
        self.prepare(solver)
        if not self.yields_levels:
            (weight,) = solver.prune_unstr(self.sparsities)
            rows = solver.view.rows_first(weight).contiguous()
            solver.world.fill_rows(rows)
            solver.view.write(rows)

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

    def gone(self, layer: LayerView) -> Tensor:
        return layer.matrix == 0

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

    blocked_size: int = option(
        4, "weights per block", "--blocked_size", metavar="C", type=cli.positive_int
    )

    @property
    def divisor(self) -> int:
        return self.blocked_size

    def gone(self, layer: LayerView) -> Tensor:
        zero = layer.matrix == 0
        if not layer.divides_by(self.blocked_size):
            return torch.zeros_like(zero)
        blocks = zero[:, layer.innermost].view(layer.rows, -1, self.blocked_size)
        blocks = blocks.all(2, keepdim=True).expand_as(blocks).flatten(1)
        return blocks[:, layer.innermost.argsort()]

    def prepare(self, solver: TrueOBS) -> None:
        solver.prepare_blocked(self.blocked_size)


@dataclass(frozen=True)
class StructMode(LevelMode):
    """Whole input channels: the OBS score summed over all rows of a group."""

    name = "struct"
    text = "whole input channels, a database of levels"
    rows_divisible = False
    serves = ("struct",)
    default_grid = (0.0, 0.9, 0.05)

    def gone(self, layer: LayerView) -> Tensor:
        zero = layer.matrix.view(layer.groups, -1, layer.channels, layer.taps) == 0
        return (
            zero.all(3, keepdim=True).all(1, keepdim=True).expand_as(zero).reshape_as(layer.matrix)
        )

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
    def first(self) -> bool:
        return self.field.metadata["first"]

    @property
    def owners(self) -> str:
        """The modes, in words.

        >>> mode_options()["max_sparsity"].owners
        'unstr, blocked and struct'
        """
        return " and ".join(", ".join(self.modes).rsplit(", ", 1))

    def arguments(self) -> dict[str, Any]:
        """For `ArgumentParser.add_argument`."""
        ours = ("flag", "first")
        arguments = {key: x for key, x in self.field.metadata.items() if key not in ours}
        if self.first and len(self.modes) < len(MODES):
            arguments["help"] = f"{self.owners}: {arguments['help']}"
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
