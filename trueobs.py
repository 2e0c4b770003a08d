"""`TrueOBS`: one layer, its Hessian, and the modes of compression that OBC offers for it.

Frantar, Singh, Alistarh, arXiv 2208.11580. The mathematics is in `hessian.py`, `inverse.py` and
`elimination.py` (the greedy elimination, its pivot rules), a layer's geometry in `layers.py`. Here
they are put together: rows are split into batches that fit in memory, groups of a convolution have
an H of their own, results go back into the layer's shape. Where several processes share a layer
(`distributed.py`), each eliminates its own rows, and then gets order, losses and weights of all.

    symbol  variable    shape       meaning
    W       W           (rows, d)   the layer's weights, one row an output channel
    d       columns                 weights in a row: (C/groups)·kh·kw, or in_features
    G       groups                  groups of a convolution; each has its own H (d, d)

Columns are in the order (channel, kh, kw); for N:M and blocks in the order (kh, kw, channel), so
that groups of M and blocks run along the input channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from obc.solver.codes import refined_codes
from obc.solver.distributed import ALONE, World
from obc.solver.elimination import (
    NM,
    ORDERS,
    Blocks,
    PivotRule,
    Quantise,
    Trace,
    Unstructured,
    eliminate,
)
from obc.solver.errors import log
from obc.solver.hessian import Gram
from obc.solver.inverse import Inverse, alive_inputs, damped_inverse, identity, without
from obc.solver.layers import view
from obc.solver.levels import Undamped, completed, first_counts, weights_at
from obc.solver.memory import batches_of, default_memory, layer_needs
from obc.solver.ranges import best_ranges
from obc.solver.refinement import never_worse, row_errors
from obc.solver.swaps import MOST_COLUMNS, swapped
from obc.solver.threads import Wait, at_once, one_thread
from quant import Grid

RuleOfRows = Callable[[Tensor], PivotRule]  # row numbers (R,) -> the rule for a batch of them
RowChoice = Callable[[Tensor], Tensor]  # `Snapshot.pruned` -> `Snapshot.apart`


@dataclass(frozen=True)
class Snapshot:
    """A layer's weights and Hessians at one moment, in one order of columns."""

    W: Tensor  # (rows, d) in the precision of the solver; zero where the input is dead
    pruned: Tensor  # (rows, d) bool, weights that were zero before, their inputs alive
    apart: Tensor  # (rows,) bool, rows that need an inverse without the columns of their zeros
    H: Tensor  # (groups, d, d) float64
    group: Tensor  # (rows,) which H is each row's
    inverse: Inverse
    innermost: bool  # whether columns are in the order (kh, kw, channel)


@dataclass(frozen=True)
class RemovalOrder:
    """What a `prepare_…` has found: enough for the weights at any number of levels."""

    snapshot: Snapshot
    trace: Trace
    size: int  # columns in a unit
    shared: bool = False  # whether the rows of a group are one system


class TrueOBS:
    """Collects a layer's Hessian and compresses the layer with it.

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
        layer: nn.Module,  # of a kind in `layers.VIEWS`
        rel_damp: float = 0.0,  # × mean(diag H), added to the diagonal
        memory: int | None = None,  # bytes the solver may use; default: half of what is free
        world: World = ALONE,  # the processes that share the rows, if there are several
        order: str = "obs",  # of removal; "magnitude" and "nearest" take H for 1: baselines
    ) -> None:
        if order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}; got {order}")
        self.layer, self.view, self.rel_damp, self.world = layer, view(layer), rel_damp, world
        self.rows, self.columns, self.groups = self.view.rows, self.view.columns, self.view.groups
        self.order = order
        self.memory = memory or default_memory(layer.weight.device)
        self.nsamples = 0
        self.gram: Gram | None = Gram(layer)
        self.quantizer: Grid | None = None
        self.trace: Trace | None = None  # of the last mode
        self.Losses: Tensor | None = None  # its (rows, steps), in order of removal
        self.damping = 0.0  # what the last inverse needed, × mean(diag H); the worst group's
        self.rank_deficit = 0
        self.nearest_rows = 0  # that the last `quantize` rounded to nearest, which was better
        self._scaled: Tensor | None = None  # H, made from the Gram matrix once it is asked for
        self._scaled_by = 0  # images in it
        self._removal: RemovalOrder | None = None

    # -- the Hessian -------------------------------------------------------------------------------

    def add_batch(self, inp: Tensor, out: Tensor | None = None, wait: Wait = at_once) -> None:
        """Add a batch of the layer's inputs. `out` is not needed; OBC's hooks pass it."""
        self.gram.add(inp.detach(), wait)
        self.nsamples += len(inp)

    def end_shard(self) -> None:
        """Start a new sum: the batches to come are another shard's (`distributed.py`)."""
        self.gram.end_shard()

    def combine(self, world: World) -> None:
        """Add up the shards that have ended in all processes, each of which has to call this."""
        self.gram.all_shards()
        world.sum_in_order(self.gram.sums())
        self.nsamples = sum(world.gather(self.nsamples))
        self.gram.patches = sum(world.gather(self.gram.patches))

    def set_hessian(
        self,
        H: Tensor,  # (groups, d, d) float64, (2/N) Σ x xᵀ; columns in the order (channel, kh, kw)
        nsamples: int,  # N; batches that are added later count beside these
    ) -> None:
        """Take a Hessian from elsewhere in place of the batches seen so far."""
        shape = (self.groups, self.columns, self.columns)
        if H.shape != shape or H.dtype != torch.float64 or nsamples < 1:
            raise ValueError(f"H must be {shape} in float64, of at least one image")
        self.gram = Gram(self.layer)
        self._scaled, self._scaled_by, self.nsamples = H, nsamples, nsamples

    @property
    def H(self) -> Tensor:  # (d, d), or (groups, d, d) if grouped; float64
        """(2/N) Σ x xᵀ over the N images seen; columns in the order (channel, kh, kw)."""
        return self._hessian()[0] if self.groups == 1 else self._hessian()

    def _hessian(self) -> Tensor:  # (groups, d, d)
        if self.nsamples == 0:
            raise ValueError("no calibration batch has been added to this layer")
        if self.gram.total is not None:
            fresh = self.gram.take().mul_(2 / self.nsamples)
            if self._scaled is not None:  # batches were added after H had been asked for
                fresh += self._scaled * (self._scaled_by / self.nsamples)
            self._scaled, self._scaled_by = fresh, self.nsamples
        return self._scaled

    def squared_error(self, weight: Tensor, reference: Tensor) -> float:
        """Σ_rows (w − ŵ) H (w − ŵ)ᵀ / 2: mean over images of the squared change of the outputs."""
        W, dense = (self.view.rows_first(x).flatten(1) for x in (weight, reference))
        errors = row_errors(W, dense, self._hessian())
        return max(0.0, float(errors.sum()))  # rounding can make it negative

    def free(self) -> None:
        """Release the Hessian and everything prepared."""
        self.gram = self._scaled = self._removal = None

    # -- from the layer and back -------------------------------------------------------------------

    def _snapshot(self, innermost: bool = False, choose_apart: RowChoice | None = None) -> Snapshot:
        """The weights as they are now, H, and its inverse. Weights of dead inputs are zero."""
        H, weight = self._hessian(), self.view.matrix
        group = torch.arange(self.rows, device=weight.device) // (self.rows // self.groups)
        W = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        alive = alive_inputs(H)[group]
        W *= alive
        if innermost:
            order = self.view.innermost.to(W.device)
            W, alive, H = W[:, order], alive[:, order], H[:, order[:, None], order]
        if self.order == "obs":
            inverse, pruned = damped_inverse(H, self.rel_damp, W.dtype), (W == 0) & alive
        else:  # H counts as 1, and no row needs an inverse of its own
            inverse, pruned = identity(H, W.dtype), torch.zeros_like(alive)
        self.damping, self.rank_deficit = float(inverse.damping.max()), int(inverse.deficit.max())
        apart = choose_apart(pruned) if choose_apart else pruned.new_zeros(self.rows)
        return Snapshot(W, pruned, apart, H, group, inverse, innermost)

    def _as_layer(self, W: Tensor, innermost: bool = False) -> Tensor:
        """(…, R, d) -> (…, R, *view.shape[1:]), in the layer's dtype. Never NaN."""
        if not torch.isfinite(W).all():
            raise ArithmeticError("the elimination produced NaN or infinity; try --rel-damp 1e-2")
        if innermost:
            W = W[..., self.view.innermost.argsort().to(W.device)]
        return self.view.shaped(W).to(self.layer.weight.dtype)

    def _require_divisible(self, size: int) -> None:
        if size < 1 or not self.view.divides_by(size):
            raise ValueError(f"{self.view.channels} input channels are not a multiple of {size}")

    # -- one elimination for all rows --------------------------------------------------------------

    def _eliminate(self, snapshot: Snapshot, rule_of: RuleOfRows, steps: int) -> Trace:
        W = snapshot.W
        trace = Trace(
            order=torch.empty(self.rows, steps, dtype=torch.int32, device=W.device),
            losses=W.new_empty(self.rows, steps),
            weights=W.new_empty(self.rows, 1, self.columns),
        )
        for numbers, inverse, _, system in self._systems(snapshot):
            rows = numbers[:, 0]
            batch = eliminate(W[numbers], inverse, system, rule_of(rows), steps)
            trace.order[rows] = batch.order.to(torch.int32)
            trace.losses[rows] = batch.losses
            trace.weights[rows] = batch.weights
        for tensor in (trace.order, trace.losses, trace.weights):
            self.world.fill_rows(tensor)
        self.damping = max(self.world.gather(self.damping))
        self.trace, self.Losses = trace, trace.losses
        return trace

    def _systems(
        self,
        snapshot: Snapshot,
        levels: int = 0,  # how many weights of each row the caller makes
        shared: bool = False,  # whether rows of a group share one system, but for those apart
    ) -> Iterator[tuple[Tensor, Inverse, Tensor, Tensor]]:
        """This process's rows, R systems of q rows at a time.

        Yields row numbers (R, q), the inverses and the H to start from, and which of these is each
        system's (R,). Rows apart come last, with inverses of their own.
        """
        count, count_apart = (  # rows at a time
            layer_needs(self.layer, snapshot.W.dtype, levels, snapshot.innermost, x).rows(
                self.memory
            )
            for x in (False, True)
        )
        numbers = torch.arange(self.rows, device=snapshot.W.device)
        mine = numbers[self.world.rows(self.rows)]
        apart = snapshot.apart[mine]
        batches = batches_of(mine[~apart, None], count)
        if shared:
            groups = numbers.view(self.groups, -1).split(max(1, count * self.groups // self.rows))
            batches = (rows for some_groups in groups for rows in some_groups.split(count, 1))
        for rows in batches:
            yield rows, snapshot.inverse, snapshot.H, snapshot.group[rows[:, 0]]
        for rows in batches_of(mine[apart], count_apart):
            H = without(snapshot.H[snapshot.group[rows]], snapshot.pruned[rows])
            inverses = damped_inverse(H, self.rel_damp, snapshot.W.dtype)
            self.damping = max(self.damping, float(inverses.damping.max()))
            yield rows[:, None], inverses, H, torch.arange(len(rows), device=rows.device)

    def _weights_at(
        self,
        snapshot: Snapshot,
        order: Tensor,  # (rows, d)
        counts: Tensor,  # (levels, rows) columns that are gone
        shared: bool = False,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """A few rows of this process (R,), and their weights (levels, R, d)."""
        for numbers, inverse, H, system in self._systems(snapshot, len(counts), shared):
            first, damped, undamped = numbers[:, 0], inverse.damping[system] > 0, None
            if self.rel_damp == 0 and bool(damped.any()):  # damped without being asked to
                undamped = Undamped(snapshot.H, snapshot.group[first], damped)
            W, steps, gone = snapshot.W[numbers], order[first].long(), counts[:, first]
            weights = weights_at(W, inverse, H, system, steps, gone, undamped).flatten(1, 2)
            rows = numbers.flatten()
            if shared and inverse is snapshot.inverse:  # rows apart are still to come
                final = torch.nonzero(~snapshot.apart[rows]).flatten()
                if len(final) < len(rows):
                    rows, weights = rows[final], weights[:, final]
            yield rows, weights

    # -- modes with one result ---------------------------------------------------------------------

    def quantize(self, refine: bool = False, fit_range: bool = False) -> None:
        """OBQ (section 5): round the weights to `quantizer`'s grid, one by one, in place.

        Rows that rounding to nearest serves better are rounded to nearest. refine: then move codes
        while that lowers the error of a row (`codes.py`). fit_range: first replace the quantizer by
        one whose ranges suit the Hessian (`ranges.py`).
        """
        if (grid := self.quantizer) is None:
            raise ValueError("assign a quantizer to this layer before quantize()")
        snapshot = self._snapshot()
        dtype = snapshot.W.dtype
        if fit_range:
            self.quantizer = grid = self._fitted_grid(snapshot, grid)
        scale, zero = grid.scale.to(dtype), grid.zero.to(dtype)  # (rows, 1)
        low, high = -zero, grid.maxq.to(dtype) - zero
        trace = self._eliminate(
            snapshot, lambda rows: Quantise(scale[rows], low[rows], high[rows]), self.columns
        )
        quantised = grid(trace.weights[:, 0].to(grid.scale.dtype))  # onto the grid to the last bit
        if self.order == "obs":
            nearest = grid(snapshot.W.to(grid.scale.dtype))
            rows = quantised, nearest, snapshot.W, snapshot.H
            quantised, self.nearest_rows = never_worse(*rows)
        if refine:
            rows, moved = self.world.rows(self.rows), quantised.to(dtype)
            tensors = moved, snapshot.W, snapshot.group, scale, low, high
            codes = refined_codes(*(x[rows] for x in tensors), snapshot.H, self._room(dtype))
            moved[rows] = scale[rows] * codes
            self.world.fill_rows(moved)
            moved = grid(moved.to(grid.scale.dtype))  # onto the grid to the last bit
            quantised, _ = never_worse(quantised, moved, snapshot.W, snapshot.H)
        self.view.write(self._as_layer(quantised))

    def _room(self, dtype: torch.dtype, swaps: bool = False) -> int:
        """Bytes for the rows of a search."""
        return self.memory - layer_needs(self.layer, dtype, innermost=swaps, swaps=swaps).layer

    def _fitted_grid(self, snapshot: Snapshot, grid: Grid) -> Grid:
        """A grid like this one, its ranges chosen by the Hessian."""
        highest, rows = int(grid.maxq), self.world.rows(self.rows)
        tensors = snapshot.W[rows], snapshot.group[rows], snapshot.inverse.matrix
        diagonal = snapshot.H.diagonal(dim1=1, dim2=2)
        symmetric = bool((2 * grid.zero == highest + 1).all())
        scale, zero = grid.scale.clone(), grid.zero.clone()
        own = scale[rows], zero[rows], highest, symmetric, self._room(snapshot.W.dtype)
        scale[rows], zero[rows] = best_ranges(*tensors, diagonal, *own)
        self.world.fill_rows(scale)
        self.world.fill_rows(zero)
        return Grid(scale, zero, grid.maxq)

    def nmprune(self, n: int, m: int, swaps: bool = False) -> None:
        """N:M (section 4): n zeros in every m weights along the input channels, in place.

        swaps: then kept and pruned weights of a group change places while that lowers the error of
        a row (`swaps.py`).
        """
        self._require_divisible(m)
        if not 0 <= n <= m:
            raise ValueError(f"N:M needs 0 <= N <= M; got {n}:{m}")
        d = self.columns
        snapshot = self._snapshot(True, lambda zeros: zeros.view(-1, d // m, m).sum(2).amax(1) > n)
        trace = self._eliminate(
            snapshot, lambda rows: NM(n, m, len(rows), d, rows.device), d // m * n
        )
        weights = trace.weights[:, 0].clone()
        if self.rel_damp == 0 < self.damping:  # refine what stays
            counts = torch.full((1, self.rows), trace.order.shape[1], device=weights.device)
            for rows, refined in self._weights_at(snapshot, completed(trace.order, d), counts):
                weights[rows] = refined[0]
            self.world.fill_rows(weights)
        if swaps:
            weights = self._swapped(snapshot, weights, m)
        self.view.write(self._as_layer(weights, innermost=True))

    def _swapped(self, snapshot: Snapshot, weights: Tensor, size: int) -> Tensor:
        """N:M weights after swaps, where these are better."""
        if self.columns > MOST_COLUMNS:
            log.info("no swaps: %d columns are more than %d", self.columns, MOST_COLUMNS)
            return weights
        W, H, rows = snapshot.W, snapshot.H, self.world.rows(self.rows)
        system, damping = snapshot.group[rows], snapshot.inverse.damping
        result, room = weights.double(), self._room(W.dtype, swaps=True)
        result[rows] = swapped(weights[rows], W[rows], H, system, damping, size, room)
        self.world.fill_rows(result)
        return never_worse(weights, result.to(W.dtype), W, H)[0]

    # -- modes with many levels --------------------------------------------------------------------

    def prepare_unstr(self) -> None:
        """Find every row's order of removal for `prune_unstr` (section 4, algorithm 1)."""
        snapshot = self._snapshot()
        trace = self._eliminate(snapshot, lambda rows: Unstructured(), self.columns)
        self._removal = RemovalOrder(snapshot, trace, 1)

    def prepare_blocked(self, size: int = 4) -> None:
        """Find every row's order of removal for `prune_blocked` (section 4, blocks of `size`)."""
        self._require_divisible(size)

        def ragged(pruned: Tensor) -> Tensor:
            blocks = pruned.view(self.rows, -1, size)
            return (blocks.any(2) & ~blocks.all(2)).any(1)

        snapshot = self._snapshot(True, ragged)
        trace = self._eliminate(snapshot, lambda rows: Blocks(size), self.columns)
        self._removal = RemovalOrder(snapshot, trace, size)

    def prune_unstr(self, sparsities: Sequence[float]) -> list[Tensor]:
        """The prepared weights at each sparsity (0 … 1), of the rows of this process.

        All rows share one threshold. Rows of other processes are zero.
        """
        levels = self.layer.weight.new_zeros(len(sparsities), *self.view.shape)
        for rows, weights in self.level_parts(sparsities):
            levels[:, rows] = weights
        return [self.view.own_form(level) for level in levels]

    prune_blocked = prune_unstr

    def level_parts(self, sparsities: Sequence[float]) -> Iterator[tuple[Tensor, Tensor]]:
        """The prepared weights at each sparsity, a few rows of the layer at a time.

        Yields their numbers (R,) and (levels, R, *view.shape[1:]): for callers that cannot hold
        all levels of a layer in memory.
        """
        if (removal := self._removal) is None:
            raise ValueError("call prepare_unstr() or prepare_blocked() before asking for levels")
        snapshot, order = removal.snapshot, removal.trace.order
        counts = first_counts(removal.trace.losses, sparsities, removal.size)  # (levels, systems)
        if removal.shared:
            order, counts = order[snapshot.group], counts[:, snapshot.group]
        for rows, weights in self._weights_at(snapshot, order, counts, removal.shared):
            yield rows, self._as_layer(weights, snapshot.innermost)

    @one_thread()
    def prepare_struct(self, size: int = 1) -> None:
        """Find the order in which blocks of `size` columns go, in all rows of a group at once."""
        if self.world.size > 1:
            raise ValueError("rows that share their columns cannot be divided among processes")
        if size < 1 or self.columns % size:
            raise ValueError(f"{self.columns} columns are not a multiple of {size}")
        snapshot = self._snapshot(choose_apart=lambda pruned: pruned.any(1))
        W = snapshot.W.view(self.groups, -1, self.columns)  # rows of a group share one system
        system = torch.arange(self.groups, device=W.device)
        trace = eliminate(W, snapshot.inverse, system, Blocks(size), self.columns)
        self.trace, self.Losses = trace, trace.losses
        self._removal = RemovalOrder(snapshot, trace, size, shared=True)

    def prune_struct(self, sparsities: Sequence[float], size: int = 1) -> list[Tensor]:
        """Structured pruning: the same columns, in blocks of `size`, go in all rows of a group.

        OBS of section 4 summed over rows; with size = kh·kw whole input channels go. The columns
        stay in the layer, as zeros. Zeros of single rows do not steer the choice, but stay.
        """
        self.prepare_struct(size)
        return self.prune_unstr(sparsities)
