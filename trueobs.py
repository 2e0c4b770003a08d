"""`TrueOBS`: one layer, its Hessian, and the modes of compression that OBC offers for it.

Frantar, Singh, Alistarh, arXiv 2208.11580. The mathematics is in `hessian.py` (H and its inverse)
and `elimination.py` (the greedy elimination and its pivot rules); here they meet a layer: rows are
split into batches that fit in memory, groups of a convolution get their own H, and results go back
into the layer's shape.

    symbol  variable    shape       meaning
    W       W           (rows, d)   the layer's weights, one row an output channel
    d       columns                 weights in a row: (C/groups)·kh·kw, or in_features
    G       groups                  groups of a convolution; each has its own H (d, d)

Columns stand in the order (channel, kh, kw); for N:M and blocks in the order (kh, kw, channel), so
that groups of M and blocks run along the input channels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from elimination import (
    NM,
    Blocks,
    PivotRule,
    Quantise,
    Trace,
    Unstructured,
    bytes_per_system,
    eliminate,
)
from hessian import Gram, Inverse, alive_inputs, damped_inverse, without
from levels import Undamped, first_counts, weights_at
from quant import Grid
from refinement import never_worse

log = logging.getLogger("trueobs")

RuleOfRows = Callable[[Tensor], PivotRule]  # row numbers (R,) -> the rule for a batch of them


@dataclass(frozen=True)
class Problem:
    """A layer's weights and Hessians at one moment, in one order of columns."""

    W: Tensor  # (rows, d) in the precision of the solver; zero where the input is dead
    pruned: Tensor  # (rows, d) bool, weights that were zero before, their inputs alive
    H: Tensor  # (groups, d, d) float64
    inverse: Inverse
    channels_innermost: bool


@dataclass(frozen=True)
class Prepared:
    """All that `prune_unstr` and `prune_blocked` need for any number of levels."""

    problem: Problem
    trace: Trace
    size: int  # columns in a unit
    apart: Tensor  # (rows,) bool, rows that have an inverse of their own


class TrueOBS:
    """Collects a layer's Hessian and compresses the layer by it.

    The modes that yield one result (`quantize`, `nmprune`) write it into the layer; those that
    yield many (`prune_unstr`, `prune_blocked`, `prune_struct`) return a list of weights. All start
    from the weights the layer has when the mode is called; weights that are zero then stay zero.

    >>> layer = nn.Linear(8, 4)
    >>> obs = TrueOBS(layer)
    >>> obs.add_batch(torch.randn(100, 8), None)
    >>> obs.nmprune(2, 4)
    >>> int((layer.weight == 0).sum())
    16
    """

    def __init__(
        self,
        layer: nn.Conv2d | nn.Linear,
        rel_damp: float = 0.0,  # × mean(diag H), added to the diagonal
        memory: int | None = None,  # bytes the solver may use; default: half of what is free
    ) -> None:
        self.layer, self.rel_damp = layer, rel_damp
        self.rows, self.columns = len(layer.weight), layer.weight[0].numel()
        self.groups = getattr(layer, "groups", 1)
        self.memory = memory or default_memory(layer.weight.device)
        self.nsamples = 0
        self.gram: Gram | None = Gram(layer)
        self.quantizer: Grid | None = None
        self.trace: Trace | None = None  # of the last mode
        self.Losses: Tensor | None = None  # its (rows, steps), in order of removal
        self.damping = 0.0  # what the last inverse needed, × mean(diag H); the worst group's
        self.rank_deficit = 0
        self._scaled: Tensor | None = None  # H, made from the Gram matrix once it is asked for
        self._prepared: Prepared | None = None

    # -- the Hessian -------------------------------------------------------------------------------

    def add_batch(self, inp: Tensor, out: Tensor | None = None) -> None:
        """Add a batch of the layer's inputs. `out` is not needed; OBC's hooks pass it."""
        self.gram.add(inp.detach())
        self.nsamples += len(inp)
        self._scaled = None

    @property
    def H(self) -> Tensor:  # (d, d), or (groups, d, d) if grouped; float64
        """(2/N) Σ x xᵀ over the N images seen; columns in the order (channel, kh, kw)."""
        H = self._hessian()
        return H[0] if self.groups == 1 else H

    def _hessian(self, channels_innermost: bool = False) -> Tensor:  # (groups, d, d)
        if self.nsamples == 0:
            raise ValueError("no calibration batch has been added to this layer")
        if self._scaled is None:
            self._scaled = self.gram.matrix().mul_(2 / self.nsamples)
        H = self._scaled
        if channels_innermost:
            order = self._innermost().to(H.device)
            H = H[:, order][:, :, order]
        return H

    def _innermost(self) -> Tensor:  # (d,) columns (channel, kh, kw) in the order (kh, kw, channel)
        spatial = self.layer.weight[0, 0].numel()
        return torch.arange(self.columns).view(-1, spatial).T.flatten()

    def _solve_dtype(self) -> torch.dtype:
        return torch.float64 if self.layer.weight.dtype == torch.float64 else torch.float32

    def free(self) -> None:
        """Let go of the Hessian and of everything prepared."""
        self.gram = self._scaled = self._prepared = None

    # -- weights as a matrix -----------------------------------------------------------------------

    def _weights(self, channels_innermost: bool = False) -> Tensor:  # (rows, d)
        """The layer's weights; those whose input is always zero ("dead") are zero."""
        W = self.layer.weight.detach().to(self._solve_dtype()).flatten(1).clone()
        W *= alive_inputs(self._hessian()).repeat_interleave(self.rows // self.groups, 0)
        return W[:, self._innermost().to(W.device)] if channels_innermost else W

    def _as_layer(self, W: Tensor, channels_innermost: bool = False) -> Tensor:
        """(…, rows, d) -> (…, *layer.weight.shape), in the layer's dtype. Never NaN."""
        if not torch.isfinite(W).all():
            raise ArithmeticError("the elimination produced NaN or infinity; try --rel-damp 1e-2")
        if channels_innermost:
            W = W[..., self._innermost().argsort().to(W.device)]
        return W.reshape(*W.shape[:-2], *self.layer.weight.shape).to(self.layer.weight.dtype)

    def squared_error(self, weight: Tensor, reference: Tensor) -> float:
        """Σ_rows (w − ŵ) H (w − ŵ)ᵀ / 2: mean over images of the squared change of the outputs."""
        delta = (reference - weight).double().reshape(self.groups, -1, self.columns)
        return float((delta @ self._hessian() * delta).sum() / 2)

    # -- one elimination for all rows --------------------------------------------------------------

    def _eliminate(
        self,
        problem: Problem,
        rule_of: RuleOfRows,
        steps: int,
        apart: Tensor | None = None,  # (rows,) bool, rows whose zeros need an inverse of their own
    ) -> Trace:
        W = problem.W
        trace = Trace(
            order=torch.empty(self.rows, steps, dtype=torch.int32, device=W.device),
            losses=W.new_empty(self.rows, steps),
            weights=W.new_empty(self.rows, 1, self.columns),
        )
        for rows, inverse, system in self._systems(problem, apart):
            part = eliminate(W[rows, None], inverse, system, rule_of(rows), steps)
            trace.order[rows] = part.order.to(torch.int32)
            trace.losses[rows] = part.losses
            trace.weights[rows] = part.weights
        self.trace, self.Losses = trace, trace.losses
        return trace

    def _systems(
        self, problem: Problem, apart: Tensor | None, matrices: bool = False
    ) -> Iterator[tuple[Tensor, Inverse, Tensor]]:
        """Batches of rows, the inverses they start from, and which of them is each row's.

        Rows `apart` get an inverse of their own, without the columns of their zeros. `matrices`:
        whether the caller needs memory for a d×d matrix or two a row.
        """
        group = torch.arange(self.rows, device=problem.W.device) // (self.rows // self.groups)
        if apart is None:
            apart = torch.zeros_like(group, dtype=torch.bool)
        for rows in self._batches(torch.nonzero(~apart)[:, 0], matrices):
            yield rows, problem.inverse, group[rows]
        for rows in self._batches(torch.nonzero(apart)[:, 0], matrices=True):
            H = without(problem.H[group[rows]], problem.pruned[rows])
            own = damped_inverse(H, self.rel_damp, self._solve_dtype())
            self.damping = max(self.damping, float(own.damping.max()))
            del H  # not needed while the caller works
            yield rows, own, torch.arange(len(rows), device=group.device)

    def _group(self, rows: Tensor) -> Tensor:
        """Which group each of these rows is in."""
        return rows // (self.rows // self.groups)

    def _undamped(
        self, problem: Problem, group: Tensor, inverse: Inverse, system: Tensor
    ) -> Undamped | None:
        """H, where an inverse was damped without being asked to; None where none was."""
        damped = inverse.damping[system] > 0
        return Undamped(problem.H, group, damped) if self._damped_by_need(damped) else None

    def _damped_by_need(self, damped: Tensor | bool) -> bool:
        return self.rel_damp == 0 and bool(torch.as_tensor(damped).any())

    def _problem(self, channels_innermost: bool = False) -> Problem:
        """The weights as they are now, H, and its inverse."""
        W, H = self._weights(channels_innermost), self._hessian(channels_innermost)
        inverse = damped_inverse(H, self.rel_damp, self._solve_dtype())
        self.damping = float(inverse.damping.max())
        self.rank_deficit = int(inverse.deficit.max())
        alive = alive_inputs(H).repeat_interleave(self.rows // self.groups, 0)
        return Problem(W, (W == 0) & alive, H, inverse, channels_innermost)

    def _batches(self, rows: Tensor, matrices: bool = False) -> Iterator[Tensor]:
        """Split rows so that a batch fits in the memory budget."""
        d = self.columns
        item = torch.finfo(self._solve_dtype()).bits // 8
        row_bytes = bytes_per_system(d, item, rows.device)
        if matrices:  # up to float64, with what it takes to make them
            row_bytes += 4 * d * d * 8
        if len(rows):
            yield from rows.split(max(1, self.memory // row_bytes))

    # -- modes with one result --------------------------------------------------------------------

    def quantize(self) -> None:
        """OBQ (section 5): round the weights to `quantizer`'s grid, one by one, in place."""
        grid = self.quantizer
        if grid is None:
            raise ValueError("assign a quantizer to this layer before quantize()")
        problem = self._problem()
        dtype = problem.W.dtype
        scale, zero = grid.scale.to(dtype), grid.zero.to(dtype)  # (rows, 1)
        low, high = -zero, grid.maxq.to(dtype) - zero

        def rule_of(rows: Tensor) -> PivotRule:
            return Quantise(scale[rows], low[rows], high[rows])

        trace = self._eliminate(problem, rule_of, self.columns)
        quantised = grid(trace.weights[:, 0].to(grid.scale.dtype))  # onto the grid to the last bit
        if self._damped_by_need(self.damping > 0) or badly_scaled(problem.H):
            nearest = grid(problem.W.to(grid.scale.dtype))
            quantised, kept = never_worse(quantised, nearest, problem.W, problem.H)
            if kept:
                log.info("rounding to nearest does better in %d of %d rows: kept", kept, self.rows)
        self.layer.weight.data.copy_(self._as_layer(quantised))

    def nmprune(self, n: int, m: int) -> None:
        """N:M (section 4): n zeros in every m weights along the input channels, in place."""
        self._require_divisible(m)
        if not 0 <= n <= m:
            raise ValueError(f"N:M needs 0 <= N <= M; got {n}:{m}")
        problem = self._problem(channels_innermost=True)
        too_many = problem.pruned.view(self.rows, -1, m).sum(2).amax(1) > n

        def rule_of(rows: Tensor) -> PivotRule:
            return NM(n, m, len(rows), self.columns, rows.device)

        trace = self._eliminate(problem, rule_of, self.columns // m * n, too_many)
        weights = trace.weights[:, 0]
        if self._damped_by_need(self.damping > 0):  # refine what stays
            levels = torch.empty_like(weights)[None]
            counts = torch.full((1, self.rows), trace.order.shape[1], device=weights.device)
            self._fill_levels(levels, problem, completed(trace.order, self.columns), counts,
                              too_many)  # fmt: skip
            weights = levels[0]
        self.layer.weight.data.copy_(self._as_layer(weights, True))

    def _require_divisible(self, size: int) -> None:
        if size < 1 or self.columns % size:
            raise ValueError(f"{self.columns} columns are not a multiple of {size}")

    # -- modes with many levels -------------------------------------------------------------------

    def prepare_unstr(self) -> None:
        """Find every row's order of removal for `prune_unstr` (section 4, algorithm 1)."""
        problem = self._problem()
        trace = self._eliminate(problem, lambda rows: Unstructured(), self.columns)
        together = torch.zeros(self.rows, dtype=torch.bool, device=trace.order.device)
        self._prepared = Prepared(problem, trace, 1, together)

    def prune_unstr(self, sparsities: Sequence[float]) -> list[Tensor]:
        """The prepared weights at each sparsity (0 … 1), all rows sharing one threshold."""
        return self._levels(sparsities)

    def prepare_blocked(self, size: int = 4) -> None:
        """Find every row's order of removal for `prune_blocked` (section 4, blocks of `size`)."""
        self._require_divisible(size)
        problem = self._problem(channels_innermost=True)
        zeros = problem.pruned.view(self.rows, -1, size)
        ragged = (zeros.any(2) & ~zeros.all(2)).any(1)
        trace = self._eliminate(problem, lambda rows: Blocks(size), self.columns, ragged)
        self._prepared = Prepared(problem, trace, size, ragged)

    def prune_blocked(self, sparsities: Sequence[float]) -> list[Tensor]:
        """The prepared weights at each sparsity, in blocks along the input channels."""
        return self._levels(sparsities)

    def _levels(self, sparsities: Sequence[float]) -> list[Tensor]:
        if self._prepared is None:
            raise ValueError("call prepare_unstr() or prepare_blocked() before asking for levels")
        problem, trace = self._prepared.problem, self._prepared.trace
        counts = first_counts(trace.losses, sparsities, self._prepared.size)  # (levels, rows)
        levels = problem.W.new_empty(len(sparsities), self.rows, self.columns)
        self._fill_levels(levels, problem, trace.order, counts, self._prepared.apart)
        return list(self._as_layer(levels, problem.channels_innermost))

    def _fill_levels(
        self,
        levels: Tensor,  # (levels, rows, d), filled for the rows wanted
        problem: Problem,
        order: Tensor,  # (rows, d)
        counts: Tensor,  # (levels, rows)
        apart: Tensor,  # (rows,) bool
        wanted: Tensor | None = None,  # (rows,) bool; all if None
    ) -> None:
        for rows, inverse, system in self._systems(problem, apart, matrices=True):
            if wanted is not None:
                system, rows = system[wanted[rows]], rows[wanted[rows]]
            if len(rows):
                W, steps = problem.W[rows, None], order[rows].long()
                undamped = self._undamped(problem, self._group(rows), inverse, system)
                at = weights_at(W, inverse, system, steps, counts[:, rows], undamped)
                levels[:, rows] = at[:, :, 0]

    def prune_struct(self, sparsities: Sequence[float], size: int = 1) -> list[Tensor]:
        """Structured pruning: the same columns, in blocks of `size`, go in all rows of a group.

        OBS of section 4 summed over rows; with size = kh·kw whole input channels go. The columns
        stay in the layer, as zeros. Zeros of single rows do not steer the choice, but stay.
        """
        self._require_divisible(size)
        problem = self._problem()
        W = problem.W.view(self.groups, -1, self.columns)  # rows of a group share one system
        system = torch.arange(self.groups, device=W.device)
        trace = eliminate(W, problem.inverse, system, Blocks(size), self.columns)
        self.trace, self.Losses = trace, trace.losses
        counts = first_counts(trace.losses, sparsities, size)
        undamped = self._undamped(problem, system, problem.inverse, system)
        levels = weights_at(W, problem.inverse, system, trace.order, counts, undamped)
        levels = levels.flatten(1, 2)
        own_zeros = problem.pruned.any(1)
        if own_zeros.any():
            of_row = torch.arange(self.rows, device=W.device) // (self.rows // self.groups)
            order = trace.order[of_row]
            self._fill_levels(levels, problem, order, counts[:, of_row], own_zeros, own_zeros)
        return list(self._as_layer(levels))


def badly_scaled(H: Tensor) -> bool:  # (G, d, d)
    """Whether inputs differ so much in size that float32 does not resolve what they share."""
    diagonal = H.diagonal(dim1=1, dim2=2)
    least = torch.where(diagonal > 0, diagonal, torch.inf).amin(1)
    return bool((diagonal.amax(1) * torch.finfo(torch.float32).eps > least).any())


def completed(order: Tensor, columns: int) -> Tensor:  # (rows, steps) -> (rows, columns)
    """An order of removal, and after it the columns that stay."""
    stays = torch.ones(len(order), columns, dtype=torch.bool, device=order.device)
    stays.scatter_(1, order.long(), False)
    return torch.cat([order.long(), torch.nonzero(stays)[:, 1].view(len(order), -1)], 1)


def default_memory(device: torch.device) -> int:
    """Half of the memory that is free now, in bytes; of a CPU, what Linux says is available."""
    if device.type != "cpu":
        return torch.cuda.mem_get_info(device)[0] // 2
    try:
        words = Path("/proc/meminfo").read_text().split()
        return int(words[words.index("MemAvailable:") + 1]) * 1024 // 2
    except (OSError, ValueError):  # another system: a size that any machine has
        return 2 << 30
