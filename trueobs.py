"""`TrueOBS`: one layer, its Hessian, and the modes of compression that OBC offers for it.

Frantar, Singh, Alistarh, arXiv 2208.11580. The mathematics is in `hessian.py`, `inverse.py` and
`elimination.py` (the greedy elimination, its pivot rules); here they meet a layer: rows are split
into batches that fit in memory, groups of a convolution have their own H, results go back into the
layer's shape. Where several processes share a layer (`distributed.py`), each eliminates
its own rows; order, losses and weights are then put together, so that all know them all.

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

import torch
from torch import Tensor, nn

from obc.solver.distributed import ALONE, World
from obc.solver.elimination import NM, Blocks, PivotRule, Quantise, Trace, Unstructured, eliminate
from obc.solver.hessian import Gram
from obc.solver.inverse import Inverse, alive_inputs, badly_scaled, damped_inverse, without
from obc.solver.levels import Undamped, completed, first_counts, weights_at
from obc.solver.memory import Needs, batches_of, default_memory, layer_needs
from obc.solver.refinement import never_worse, row_errors
from obc.solver.threads import Wait, at_once, one_thread
from quant import Grid

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
    shared: bool = False  # whether the rows of a group are one system


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
        world: World = ALONE,  # the processes that share the rows, if there are several
    ) -> None:
        self.layer, self.rel_damp, self.world = layer, rel_damp, world
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
        self._scaled_by = 0  # images in it
        self._prepared: Prepared | None = None

    # -- the Hessian -------------------------------------------------------------------------------

    def add_batch(self, inp: Tensor, out: Tensor | None = None, wait: Wait = at_once) -> None:
        """Add a batch of the layer's inputs. `out` is not needed; OBC's hooks pass it."""
        self.gram.add(inp.detach(), wait)
        self.nsamples += len(inp)

    def end_shard(self) -> None:
        """Sum what comes now apart: images of another shard, or process (`distributed.py`)."""
        self.gram.end_shard()

    def combine(self, world: World) -> None:
        """Sum over the shards that have ended, in all processes, which have to call this."""
        self.gram.all_shards()
        world.sum_in_order(self.gram.sums())
        self.nsamples = sum(world.gather(self.nsamples))

    @property
    def H(self) -> Tensor:  # (d, d), or (groups, d, d) if grouped; float64
        """(2/N) Σ x xᵀ over the N images seen; columns in the order (channel, kh, kw)."""
        H = self._hessian()
        return H[0] if self.groups == 1 else H

    def _hessian(self, channels_innermost: bool = False) -> Tensor:  # (groups, d, d)
        if self.nsamples == 0:
            raise ValueError("no calibration batch has been added to this layer")
        if self.gram.total is not None:
            fresh = self.gram.take().mul_(2 / self.nsamples)
            if self._scaled is not None:  # batches were added after H had been asked for
                fresh += self._scaled * (self._scaled_by / self.nsamples)
            self._scaled, self._scaled_by = fresh, self.nsamples
        if channels_innermost:
            order = self._innermost().to(self._scaled.device)
            return self._scaled[:, order[:, None], order]
        return self._scaled

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
        """(…, R, d) -> (…, R, *layer.weight.shape[1:]), in the layer's dtype. Never NaN."""
        if not torch.isfinite(W).all():
            raise ArithmeticError("the elimination produced NaN or infinity; try --rel-damp 1e-2")
        if channels_innermost:
            W = W[..., self._innermost().argsort().to(W.device)]
        return W.reshape(*W.shape[:-1], *self.layer.weight.shape[1:]).to(self.layer.weight.dtype)

    def squared_error(self, weight: Tensor, reference: Tensor) -> float:
        """Σ_rows (w − ŵ) H (w − ŵ)ᵀ / 2: mean over images of the squared change of the outputs."""
        errors = row_errors(weight.flatten(1), reference.flatten(1), self._hessian())
        return max(0.0, float(errors.sum()))  # rounding can go below

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
        for rows, inverse, _, system in self._systems(problem, apart):
            part = eliminate(W[rows, None], inverse, system, rule_of(rows), steps)
            trace.order[rows] = part.order.to(torch.int32)
            trace.losses[rows] = part.losses
            trace.weights[rows] = part.weights
        for part in (trace.order, trace.losses, trace.weights):
            self.world.fill_rows(part)
        self.damping = max(self.world.gather(self.damping))
        self.trace, self.Losses = trace, trace.losses
        return trace

    def _systems(
        self, problem: Problem, apart: Tensor | None, levels: int = 0
    ) -> Iterator[tuple[Tensor, Inverse, Tensor, Tensor]]:
        """ImageBatches of this process's rows, inverses and H they start from, and which is each row's.

        Rows `apart` get an inverse of their own, without the columns of their zeros. `levels`: how
        many weights of each row the caller makes.
        """
        group = self._group(torch.arange(self.rows, device=problem.W.device))
        own = torch.zeros_like(group, dtype=torch.bool)
        own[self.world.rows(self.rows)] = True
        if apart is None:
            apart = torch.zeros_like(own)
        together, alone = (torch.nonzero(own & kind)[:, 0] for kind in (~apart, apart))
        for rows in batches_of(together, self._needs(problem, levels).rows(self.memory)):
            yield rows, problem.inverse, problem.H, group[rows]
        for rows in batches_of(alone, self._needs(problem, levels, True).rows(self.memory)):
            H = without(problem.H[group[rows]], problem.pruned[rows])
            inverses = damped_inverse(H, self.rel_damp, self._solve_dtype())
            self.damping = max(self.damping, float(inverses.damping.max()))
            yield rows, inverses, H, torch.arange(len(rows), device=group.device)

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

    def _needs(self, problem: Problem, levels: int = 0, apart: bool = False) -> Needs:
        return layer_needs(self.layer, problem.W.dtype, levels, problem.channels_innermost, apart)

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
        weights = trace.weights[:, 0].clone()
        if self._damped_by_need(self.damping > 0):  # refine what stays
            counts = torch.full((1, self.rows), trace.order.shape[1], device=weights.device)
            order = completed(trace.order, self.columns)
            for rows, at in self._rows_at(problem, order, counts, too_many):
                weights[rows] = at[0]
            self.world.fill_rows(weights)
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
        """All that `level_parts` yields, together; of the rows of this process."""
        levels = self.layer.weight.new_zeros(len(sparsities), *self.layer.weight.shape)
        for rows, weights in self.level_parts(sparsities):
            levels[:, rows] = weights
        return list(levels)

    def level_parts(self, sparsities: Sequence[float]) -> Iterator[tuple[Tensor, Tensor]]:
        """The prepared weights at each sparsity, a few rows of the layer at a time.

        Yields their numbers (R,) and (levels, R, *weight.shape[1:]). For those who cannot hold all
        levels of a layer in memory.
        """
        if (prepared := self._prepared) is None:
            raise ValueError("call prepare_unstr() or prepare_blocked() before asking for levels")
        problem, apart, order, wanted = prepared.problem, prepared.apart, prepared.trace.order, None
        counts = first_counts(prepared.trace.losses, sparsities, prepared.size)  # (levels, systems)
        if prepared.shared:
            yield from self._shared_parts(problem, order, counts, ~apart)
            of_row = self._group(torch.arange(self.rows, device=counts.device))
            order, counts, wanted = order[of_row], counts[:, of_row], apart
        for rows, weights in self._rows_at(problem, order, counts, apart, wanted):
            yield rows, self._as_layer(weights, problem.channels_innermost)

    def _rows_at(
        self,
        problem: Problem,
        order: Tensor,  # (rows, d)
        counts: Tensor,  # (levels, rows)
        apart: Tensor,  # (rows,) bool
        wanted: Tensor | None = None,  # (rows,) bool; all if None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Some rows of this process (R,), and their weights (levels, R, d)."""
        for rows, inverse, H, system in self._systems(problem, apart, len(counts)):
            if wanted is not None:
                system, rows = system[wanted[rows]], rows[wanted[rows]]
            if len(rows):
                W, steps = problem.W[rows, None], order[rows].long()
                undamped = self._undamped(problem, self._group(rows), inverse, system)
                at = weights_at(W, inverse, H, system, steps, counts[:, rows], undamped)
                yield rows, at[:, :, 0]

    def _shared_parts(
        self,
        problem: Problem,
        order: Tensor,  # (groups, d)
        counts: Tensor,  # (levels, groups)
        wanted: Tensor,  # (rows,) bool
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """`level_parts` where all rows of a group share one system."""
        q, device = self.rows // self.groups, order.device
        batch = self._needs(problem, len(counts)).rows(self.memory)
        for groups in torch.arange(self.groups, device=device).split(max(1, batch // q)):
            for part in torch.arange(q, device=device).split(batch):
                rows = (groups[:, None] * q + part).flatten()
                W = problem.W[rows].view(len(groups), len(part), -1)
                undamped = self._undamped(problem, groups, problem.inverse, groups)
                steps, gone = order[groups], counts[:, groups]
                at = weights_at(W, problem.inverse, problem.H, groups, steps, gone, undamped)
                kept = wanted[rows]
                yield rows[kept], self._as_layer(at.flatten(1, 2)[:, kept])

    @one_thread()
    def prepare_struct(self, size: int = 1) -> None:
        """Find the order in which blocks of `size` columns go, in all rows of a group at once."""
        if self.world.size > 1:
            raise ValueError("rows that share their columns cannot be divided among processes")
        self._require_divisible(size)
        problem = self._problem()
        W = problem.W.view(self.groups, -1, self.columns)  # rows of a group share one system
        system = torch.arange(self.groups, device=W.device)
        trace = eliminate(W, problem.inverse, system, Blocks(size), self.columns)
        self.trace, self.Losses = trace, trace.losses
        self._prepared = Prepared(problem, trace, size, problem.pruned.any(1), shared=True)

    def prune_struct(self, sparsities: Sequence[float], size: int = 1) -> list[Tensor]:
        """Structured pruning: the same columns, in blocks of `size`, go in all rows of a group.

        OBS of section 4 summed over rows; with size = kh·kw whole input channels go. The columns
        stay in the layer, as zeros. Zeros of single rows do not steer the choice, but stay.
        """
        self.prepare_struct(size)
        return self._levels(sparsities)
