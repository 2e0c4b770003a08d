"""ExactOBS as a pivoted Cholesky factorisation of the inverse Hessian.

Frantar, Singh, Alistarh, "Optimal Brain Compression", NeurIPS 2022, arXiv 2208.11580, sections 4
and 5. Per output row w of a layer, minimise the squared output error

    E(ŵ) = (w − ŵ) H (w − ŵ)ᵀ / 2,        H = (2/N) Σ x xᵀ        (N calibration images)

by fixing one weight at a time at its target (0, or its rounded value). With A = H⁻¹ restricted to
the free weights, one step fixes the p of least e_p²/A_pp, where e_p = w_p − target_p:

    w −= A[:,p] e_p/A_pp        A −= A[:,p] A[p,:]/A_pp        loss = e_p²/(2 A_pp)

With u = A[:,p]/√A_pp this is a Cholesky factorisation of H⁻¹ that chooses its pivots by OBS's
score. Like LAPACK's dpstrf it is blocked: within a panel of b steps A is not touched, a column is
brought up to date with the panel's u's (c = A[:,p] − Uᵀ U[:,p]), and after the panel one matrix
product A −= UᵀU does the rest. Live columns move into the holes that pivots leave, so that A stays
a leading m×m block that shrinks: d³/3 multiply-adds a row, at the speed of matrix products.

    symbol  variable  shape       meaning
    R                             linear systems in a batch (rows; groups if structured)
    q                             rows that share one system (1; all of a group if structured)
    d, m                          columns in all; columns still live
    c       unit                  columns that go together (1, or the block size)
    A       A         (R, m, m)   inverse Hessian over the live columns, as of the last flush
    U       U         (R, b, m)   the panel's u's
    w       w         (R, q, m)   current weights of the live columns
    D       D         (c,c,R,m/c) current diagonal blocks of A, up to date at each choice of pivot

A compression mode is a `PivotRule`. The class `Elimination` is the algorithm in torch, for any
device and any q; on a CPU, systems of one row each go through `elimination_cpu`, the same algorithm
compiled, which never computes the half of A above its diagonal. With H = 1 the loop is a sort
(`sort_columns`): the baselines of magnitude pruning and of rounding to nearest. Deviations from the
paper: none in the result; only the order of operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from obc.solver.errors import log
from obc.solver.inverse import Inverse

INFINITY = float("inf")
ORDERS = ("obs", "magnitude", "nearest")  # OBS's; as if H = 1, when pruning or when rounding


@dataclass(frozen=True)
class Trace:
    """The result of one elimination."""

    order: Tensor  # (R, steps) int64, column fixed at each step
    losses: Tensor  # (R, steps) increase of E at each step, summed over the q rows
    weights: Tensor  # (R, q, d) weights after the last step


class PivotRule:
    """Which columns may go next, and which values they are fixed at."""

    unit = 1  # columns that go together
    nm = (0, 0)  # N and M of a limit on zeros per group, or no limit
    grid: Tensor | None = None  # (R, 4) step, lowest, highest code, half a step; None: prune

    def error(self, w: Tensor) -> Tensor:
        """Distance of weights (R, q, m) from the values they would be fixed at."""
        return w

    def rank(
        self,
        scores: Tensor,  # (R, units) OBS scores, infinite where barred
        error: Tensor,  # (R, q, m) from `error`
    ) -> Tensor:  # (R, units) the least goes next
        """What decides which unit goes next: OBS's score, unless a rule overrides it."""
        return scores

    def bar(
        self,
        barred: Tensor,  # (R, units) infinite where a position may not go; changed in place
        chosen: Tensor,  # (R, 1) position just chosen, barred already
        columns: Tensor,  # (R, m) column at each position
    ) -> None:
        """Bar further positions after a choice."""
        return


class Unstructured(PivotRule):
    """Any free weight (section 4, algorithm 1)."""


class Blocks(PivotRule):
    """Whole blocks of `size` columns; structured pruning if q > 1 (section 4, group OBS)."""

    def __init__(self, size: int) -> None:
        self.unit = size


class NM(PivotRule):
    """At most n zeros in every group of m consecutive columns (section 4, N:M)."""

    def __init__(self, n: int, m: int, systems: int, columns: int, device: torch.device) -> None:
        self.nm = (n, m)
        self.zeros = torch.zeros(systems, columns // m, dtype=torch.int64, device=device)
        self.one = torch.ones(systems, 1, dtype=torch.int64, device=device)

    def bar(self, barred: Tensor, chosen: Tensor, columns: Tensor) -> None:
        n, m = self.nm
        group = columns.gather(1, chosen).div_(m, rounding_mode="floor")
        self.zeros.scatter_add_(1, group, self.one)
        full = self.zeros.gather(1, group) >= n
        low = torch.where(full, group * m, -1)  # of a full group: bar its other columns
        inside = (columns >= low) & (columns < low + full * m)
        barred.masked_fill_(inside, INFINITY)


class Quantise(PivotRule):
    """Round to each row's grid (section 5, OBQ); weights far outside the grid go first."""

    def __init__(
        self,
        step: Tensor,  # (R, 1) distance of two grid values
        low: Tensor,  # (R, 1) lowest grid value, in steps
        high: Tensor,  # (R, 1) highest grid value, in steps
    ) -> None:
        widest = torch.maximum(low.abs(), high.abs())
        rounding = 4 * torch.finfo(step.dtype).eps * widest  # so that rounding makes no outlier
        half_step = step * (0.5 + rounding)
        self.grid = torch.cat([step, low, high, half_step], 1)

    def error(self, w: Tensor) -> Tensor:
        step, low, high, _ = self.grid[:, None].split(1, dim=2)  # (R, 1, 1) each
        code = torch.round(w / step)
        torch.minimum(torch.maximum(code, low, out=code), high, out=code)
        return torch.sub(w, code.mul_(step), out=code)

    def rank(self, scores: Tensor, error: Tensor) -> Tensor:
        distance = error[:, 0].abs()
        outlier = (distance > self.grid[:, 3:]) & (scores < INFINITY)
        return torch.where(outlier, -distance, scores)


COMPILED_RULES = (Unstructured, Blocks, NM, Quantise)  # those that `elimination_cpu` knows


@cache
def compiled_engine() -> ModuleType | None:
    """The kernels for CPUs, or None (and a warning) where numba cannot compile them."""
    try:
        from obc.solver import elimination_cpu  # takes seconds where nothing is cached
    except (ImportError, RuntimeError) as error:  # not installed; no folder to cache in
        log.warning("no compiled kernels on this CPU (%s): pip install numba", error)
        return None
    return elimination_cpu


@cache
def log_uncompiled(what: str) -> None:
    """Log once which engine runs what `elimination_cpu` does not know."""
    log.info("%s has no compiled form: PyTorch runs it", what)


def panel_width(columns: int, unit: int) -> int:
    """Steps between two flushes, a multiple of the unit: (nearly) the fastest of 48 … 256."""
    return max(1, min(96, columns) // unit) * unit


def eliminate(
    W: Tensor,  # (R, q, d) initial weights; those that are zero stay zero
    inverse: Inverse,  # of G Hessians
    system: Tensor,  # (R,) int64, which of the G inverses each system starts from
    rule: PivotRule,
    steps: int,  # columns to fix, a multiple of rule.unit
    panel: int | None = None,  # columns between two flushes
) -> Trace:
    """Fix `steps` columns of every system, one after the other, each the best one by `rule`.

    OBC section 4, algorithm 1, for all modes; see the module docstring for the blocked form.
    """
    if W.shape[2] % (rule.nm[1] or rule.unit):  # compiled code does not check bounds
        raise ValueError(f"{W.shape[2]} columns are not whole groups or blocks")
    panel = min(panel or panel_width(W.shape[2], rule.unit), steps)
    panel = max(1, panel // rule.unit) * rule.unit
    if inverse.matrix is None:
        log_uncompiled("an order that ignores the Hessian")
        return sort_columns(W, rule, steps)
    if type(rule) not in COMPILED_RULES:
        log_uncompiled(f"the rule {type(rule).__name__}")
    elif W.shape[1] == 1 and W.device.type == "cpu" and (engine := compiled_engine()) is not None:
        grid = W.new_empty(len(W), 0) if rule.grid is None else rule.grid
        order, losses, weights = engine.eliminate_rows(
            W[:, 0], inverse.matrix, inverse.floor, system, rule.unit, rule.nm, grid, steps, panel
        )
        return Trace(order, losses, weights[:, None])
    return eliminate_in_torch(W, inverse, system, rule, steps, panel)


def sort_columns(W: Tensor, rule: PivotRule, steps: int) -> Trace:
    """`eliminate` for H = 1: no step changes another column's score, so the order is a sort.

    This is magnitude pruning, or rounding to the nearest grid value; other weights keep theirs.
    """
    R, _, d = W.shape
    error = rule.error(W)
    losses = error.square().sum(1) / 2  # (R, d)
    scores = losses.view(R, d // rule.unit, rule.unit).sum(2)
    n, m = rule.nm
    if m:
        rank = scores.view(R, d // m, m).argsort(dim=2, stable=True).argsort(2).view(R, d)
        scores = scores.masked_fill(rank >= n, INFINITY)
    units = scores.argsort(dim=1, stable=True)[:, : steps // rule.unit, None] * rule.unit
    order = (units + torch.arange(rule.unit, device=W.device)).flatten(1)
    fixed = torch.zeros(R, d, dtype=torch.bool, device=W.device).scatter_(1, order, True)
    weights = torch.where(fixed[:, None], W - error, W)
    return Trace(order, losses.gather(1, order), weights)


def bytes_per_system(d: int, item: int, device: torch.device) -> int:
    """Memory that `eliminate` needs for each further system of one row, in bytes."""
    vectors = 40 * d * item
    if device.type == "cpu" and compiled_engine() is not None:
        return vectors  # matrices: see `bytes_per_task`
    return vectors + d * d * item + 4 * d * panel_width(d, 1) * item


def bytes_per_task(d: int, item: int, device: torch.device) -> tuple[int, int]:
    """Memory for a row that the compiled engine works on, and the most rows that it works on at
    a time; zeros without it."""
    engine = compiled_engine() if device.type == "cpu" else None
    return (0, 0) if engine is None else engine.bytes_per_row_in_work(d, item)


def eliminate_in_torch(
    W: Tensor, inverse: Inverse, system: Tensor, rule: PivotRule, steps: int, panel: int
) -> Trace:
    """`eliminate` for any device and any q."""
    batch = Elimination(W, inverse, system, rule, panel)
    weights = torch.zeros_like(W)
    order, losses = [], []
    for start in range(0, steps, panel):
        count = min(panel, steps - start)
        picks, errors, pivots, targets = batch.run_panel(count)
        columns = batch.columns.gather(1, picks)
        weights.scatter_(2, columns[:, None].expand(-1, W.shape[1], -1), targets)
        order.append(columns)
        losses.append(errors.square().sum(1) / (2 * pivots))
        batch.close_panel(picks, flush=start + count < steps)
    live = batch.columns[:, None].expand(-1, W.shape[1], -1)
    weights.scatter_(2, live, batch.w)
    if not order:
        return Trace(batch.columns[:, :0], batch.floor[:, :0], weights)
    return Trace(torch.cat(order, 1), torch.cat(losses, 1), weights)


class Elimination:
    """One batch of systems in `eliminate_in_torch`: the state of the blocked algorithm."""

    def __init__(
        self,
        W: Tensor,  # (R, q, d)
        inverse: Inverse,
        system: Tensor,  # (R,)
        rule: PivotRule,
        panel: int,
    ) -> None:
        R, _, d = W.shape
        c = rule.unit
        self.rule, self.inverse, self.system = rule, inverse, system
        self.row = torch.arange(R, device=W.device)
        self.m, self.w = d, W.clone()
        self.A: Tensor | None = None  # made at the first flush; before, all share the inverse
        self.U = W.new_empty(R, panel, d)
        self.columns = torch.arange(d, device=W.device).repeat(R, 1)
        zero = (W == 0).view(R, -1, d // c, c).all(3).all(1)  # absent already: first to go
        self.barred = torch.zeros_like(zero, dtype=W.dtype).masked_fill_(zero, -INFINITY)
        self.floor = inverse.floor.index_select(0, system)
        tiles = inverse.matrix.view(-1, d // c, c, d // c, c).diagonal(dim1=1, dim2=3)
        self.D = tiles.permute(1, 2, 0, 3).index_select(2, system)

    # -- one panel ------------------------------------------------------------------------------

    def run_panel(self, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Fix `count` columns; their positions (R, count), errors (R, q, count), pivots A_pp
        (R, count) and the values they are fixed at (R, q, count)."""
        c = self.rule.unit
        picks, errors, pivots, values = [], [], [], []
        for k in range(0, count, c):
            chosen = self.choose()
            for j in range(c):
                p = chosen * c + j if c > 1 else chosen
                value, error, pivot = self.fix(p, k + j)
                picks.append(p)
                values.append(value)
                errors.append(error)
                pivots.append(pivot)
            self.update_blocks(k)
        errors = torch.cat(errors, 2)
        return torch.cat(picks, 1), errors, torch.cat(pivots, 1), torch.cat(values, 2) - errors

    def choose(self) -> Tensor:  # (R, 1) position of the unit that goes next
        """The unit of least Σ w_B (A_BB)⁻¹ w_Bᵀ over the rows, unless `rule` prefers another."""
        error = self.rule.error(self.w)
        scores = self.rule.rank(self.unit_scores(error), error)
        chosen = scores.argmin(1, keepdim=True)
        self.barred.scatter_(1, chosen, INFINITY)
        self.rule.bar(self.barred, chosen, self.columns)
        return chosen

    def unit_scores(self, error: Tensor) -> Tensor:  # (R, q, m) -> (R, units)
        """Σ_q e_B (A_BB)⁻¹ e_Bᵀ of every unit, by eliminating its own columns; barred: infinite."""
        c = self.rule.unit
        R, q, m = error.shape
        if c == 1 and q == 1:
            return torch.addcdiv(self.barred, error[:, 0] * error[:, 0], self.D[0, 0])
        z = error.view(R, q, m // c, c).permute(3, 1, 0, 2).contiguous()  # (c, q, R, units)
        D, scores = self.D.clone(), self.barred.clone()
        floor = self.floor.view(R, m // c, c).permute(2, 0, 1)
        for j in range(c):
            pivot = torch.maximum(D[j, j], floor[j])
            scores += z[j].square().sum(0) / pivot
            factor = D[j + 1 :, j] / pivot  # (c−j−1, R, units)
            z[j + 1 :] -= factor[:, None] * z[j]
            D[j + 1 :, j + 1 :] -= factor[:, None] * D[j, j + 1 :]
        return scores

    def fix(self, p: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Step k of the panel: fix position p (R, 1) of every system.

        Returns its weight before (R, q, 1), its error (R, q, 1) and its pivot A_pp (R, 1).
        """
        c = self.current_column(p, k)
        pivot = torch.maximum(c.gather(1, p), self.floor.gather(1, p))
        value = self.w.gather(2, p[:, None].expand(-1, self.w.shape[1], 1))
        error = self.rule.error(value)
        scale = pivot.rsqrt()
        u = torch.mul(c, scale, out=self.U[:, k, : self.m])
        self.w.addcmul_(u[:, None], error * scale[:, None], value=-1)
        return value, error, pivot

    def current_column(self, p: Tensor, k: int) -> Tensor:  # (R, m)
        """Column p of A up to date: as of the last flush, minus the panel's k steps."""
        if self.A is None:
            c = self.inverse.matrix[self.system, p[:, 0]]
        else:
            R, d, _ = self.A.shape
            c = self.A.view(R * d, d)[:, : self.m].index_select(0, self.row * d + p[:, 0])
        if k:
            U = self.U[:, :k, : self.m]
            at_p = U.gather(2, p[:, :, None].expand(-1, k, 1))
            c.unsqueeze(1).baddbmm_(at_p.transpose(1, 2), U, alpha=-1)
        return c

    def update_blocks(self, k: int) -> None:
        """Bring the diagonal blocks up to date after the unit fixed by panel steps k, k+1, …"""
        R, m, c = self.columns.shape[0], self.m, self.rule.unit
        for u in self.U[:, k : k + c, :m].unbind(1):
            u = u.reshape(R, m // c, c).permute(2, 0, 1).contiguous() if c > 1 else u[None]
            self.D.addcmul_(u[:, None], u[None], value=-1)
        diagonal = self.D.diagonal(dim1=0, dim2=1)  # (R, units, c)
        torch.maximum(diagonal, self.floor.view(R, m // c, c), out=diagonal)

    # -- one flush --------------------------------------------------------------------------------

    def close_panel(self, picks: Tensor, flush: bool) -> None:
        """Drop the picked columns and, if there are more steps to come, bring A up to date."""
        count, c = picks.shape[1], self.rule.unit
        source, hole = vacancies(picks[:, ::c] // c, self.m // c)  # in units
        self.barred = relocate(self.barred, source, hole)
        self.D = relocate(self.D, source, hole)
        if c > 1:
            within = torch.arange(c, device=picks.device)
            source = (source[:, :, None] * c + within).flatten(1)
            hole = (hole[:, :, None] * c + within).flatten(1)
        self.w = relocate(self.w, source[:, None], hole[:, None])
        self.columns = relocate(self.columns, source, hole)
        self.floor = relocate(self.floor, source, hole)
        if flush:
            self.shrink(source, hole, count)
        self.m -= count

    def shrink(self, source: Tensor, hole: Tensor, count: int) -> None:
        """Move the rows and columns `source` of A to `hole`; A −= UᵀU on the live block."""
        if self.A is None:
            self.A = self.inverse.matrix.index_select(0, self.system)
        R, d, _ = self.A.shape
        m, live = self.m, self.m - count
        rows = self.A.view(R * d, d)[:, :m].index_select(
            0, (self.row[:, None] * d + source).view(-1)
        )
        rows = relocate(rows.view(R, count, m), source[:, None], hole[:, None])  # (R, count, live)
        self.A[self.row[:, None], hole, :live] = rows
        target = hole[:, None].expand(-1, live, -1)
        self.A[:, :live, :m].scatter_(2, target, rows.transpose(1, 2))
        U = relocate(self.U[:, :count, :m], source[:, None], hole[:, None])
        self.A[:, :live, :live].baddbmm_(U.transpose(1, 2), U, alpha=-1)


def vacancies(
    removed: Tensor,  # (R, k) positions just removed, of m
    m: int,
) -> tuple[Tensor, Tensor]:  # (R, k) sources, (R, k) holes
    """Which of the last k positions are alive, and the holes before them that they move into.

    The i-th source goes to the i-th hole; where nothing has to move, both are among the last k,
    which are dropped.
    """
    R, k = removed.shape
    dead = torch.zeros(R, m, dtype=torch.bool, device=removed.device).scatter_(1, removed, True)
    source = dead[:, m - k :].to(torch.uint8).argsort(dim=1, stable=True) + (m - k)
    return source, removed.sort(1).values


def relocate(x: Tensor, source: Tensor, hole: Tensor) -> Tensor:
    """x with entries moved from source to hole in its last dimension, and without the last k."""
    k = hole.shape[-1]
    shape = (*x.shape[:-1], k)
    moved = x.gather(-1, source.expand(shape))
    return x.scatter(-1, hole.expand(shape), moved)[..., : x.shape[-1] - k].contiguous()
