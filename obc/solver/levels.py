"""Weights at many levels of sparsity from one elimination.

OBC (arXiv 2208.11580), section 4, "global" selection: pruning a row to the end yields an order of
removal and a loss for every step, and nothing else is stored. At sparsity s the layer loses the
K = ceil(rows·d·s) weights of least loss, so row r loses its first k_r. With P the columns removed,
M the columns that remain and A = H⁻¹, the remaining weights of least squared error,

    ŵ_M  =  (H_MM)⁻¹ (H w)_M  =  w_M − A_MP (A_PP)⁻¹ w_P

take a factor of H_MM or of A_PP, whichever is smaller. From level to level columns are only ever
removed, so all A_PP are leading blocks of one matrix, A in the order of removal, and all H_MM of
another, H in the reverse order. One Cholesky factor of each, half of d wide, serves all levels:
2 (d/2)³/3 flops instead of the d³/3 of a factor of all of A. With S = L Lᵀ either of them and S_k
its leading block,

    S_k⁻¹ b_k  =  L⁻ᵀ (L⁻¹ b, truncated after k)

so that all levels of a row share a forward substitution, too. Where H was damped, `refinement.py`
improves the result. On a CPU systems are solved one by one: a row's weights are the same bits
whichever rows are solved with it, and for any number of threads.

    symbol  variable       shape           meaning
    L       removed.L      (R, k, k)       Cholesky factor of A_PP, columns in order of removal
    L       remaining.L    (R, k, k)       … of H_MM, columns in the reverse order
    k_r     counts         (levels, R)     columns that are removed at each level
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from types import ModuleType

import torch
from torch import Tensor

from obc.solver.elimination import compiled_engine
from obc.solver.inverse import Inverse
from obc.solver.refinement import refined, times
from obc.solver.threads import in_pieces, one_thread

FACTOR_COLUMNS = 96  # columns of a factor that are computed at a time


@dataclass(frozen=True)
class Undamped:
    """The Hessians of a batch of systems whose inverses were damped."""

    H: Tensor  # (G, d, d) float64
    system: Tensor  # (R,) which of the H is each system's
    damped: Tensor  # (R,) bool


def sparsity_grid(low: float, high: float, delta: float) -> list[float]:
    """Sparsities from `low` on, with densities that shrink by 1 − delta each; then `high` itself.

    >>> [round(s, 3) for s in sparsity_grid(0.0, 0.3, 0.1)]
    [0.0, 0.1, 0.19, 0.271, 0.3]
    """
    levels, density = [], 1 - low
    while density > 1 - high + 1e-9:
        levels.append(1 - density)
        density *= 1 - delta
    return [*levels, high]


def first_counts(
    losses: Tensor,  # (systems, steps) in each system's own order
    sparsities: Sequence[float],
    size: int = 1,  # steps that go together
) -> Tensor:  # (levels, systems) int64, how many columns each system loses from its start
    """Global selection (section 4): the units of least loss go, over all systems."""
    units = losses.view(len(losses), -1, size).sum(2)
    cheapest, counts = units.flatten().argsort(stable=True), []
    place = torch.empty_like(cheapest)  # of each unit among all
    place[cheapest] = torch.arange(len(place), device=place.device)
    place = place.view(units.shape)
    for sparsity in sparsities:
        if not 0 <= sparsity <= 1:
            raise ValueError(f"a sparsity must be in [0, 1]; got {sparsity}")
        K = ceil(units.numel() * sparsity * (1 - 1e-12))  # 0.3·10 is 3, not 3.0000000000000004
        counts.append((place < K).sum(1) * size)
    return torch.stack(counts)


def completed(order: Tensor, columns: int) -> Tensor:  # (rows, steps) -> (rows, columns)
    """An order of removal, followed by the columns that remain."""
    stays = torch.ones(len(order), columns, dtype=torch.bool, device=order.device)
    stays.scatter_(1, order.long(), False)
    return torch.cat([order.long(), torch.nonzero(stays)[:, 1].view(len(order), -1)], 1)


def is_removed(order: Tensor, counts: Tensor) -> Tensor:  # (levels, R, d) bool
    """Which columns are among the first `counts` (levels, R) of each system's `order` (R, d)."""
    place = torch.empty_like(order)
    place.scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    return place < counts[:, :, None]


def weights_at(
    W: Tensor,  # (R, q, d)
    inverse: Inverse,
    H: Tensor,  # (G, d, d) float64, what `inverse` is the inverse of, but for damping
    system: Tensor,  # (R,) which of the G is each system's
    order: Tensor,  # (R, d) int64, columns in order of removal
    counts: Tensor,  # (levels, R) how many of them are removed
    undamped: Undamped | None = None,  # H to refine the weights with
) -> Tensor:  # (levels, R, q, d)
    """Weights of every row at every level, in closed form. Those that are zero stay zero."""
    if inverse.matrix is None:
        return torch.where(is_removed(order, counts)[:, :, None], 0, W)
    levels, (R, q, _) = W.new_empty(len(counts), *W.shape), W.shape

    def solver_of(systems: slice) -> LevelSolver:
        return LevelSolver(inverse, H, system[systems], order[systems], counts[:, systems])

    def fill(systems: slice, solver: LevelSolver, rows: slice = slice(None)) -> None:
        H_of_them = undamped and Undamped(
            undamped.H, undamped.system[systems], undamped.damped[systems]
        )
        w = W[systems, rows].transpose(0, 1)
        levels[:, systems, rows] = solver.weights(w, H_of_them).transpose(1, 2)

    if W.device.type != "cpu":
        fill(slice(None), solver_of(slice(None)))
    elif q == 1:
        in_pieces(lambda systems: fill(systems, solver_of(systems)), R, 1)
    else:  # rows that share a system share its factors
        for systems in (slice(r, r + 1) for r in range(R)):
            with one_thread():
                solver = solver_of(systems)
            in_pieces(partial(fill, systems, solver), q, 1)
    return levels


class LevelSolver:
    """(H_MM)⁻¹ of R systems on the columns M that remain at each level, and weights by it."""

    def __init__(
        self,
        inverse: Inverse,
        H: Tensor,  # (G, d, d) float64
        system: Tensor,  # (R,)
        order: Tensor,  # (R, d)
        counts: Tensor,  # (levels, R)
    ) -> None:
        d, dtype = order.shape[1], inverse.matrix.dtype
        self.inverse, self.H, self.system, self.order = inverse, H, system, order
        few = counts <= d // 2
        diagonal = 1 / inverse.floor  # of H, damped and decoupled
        self.is_removed = is_removed(order, counts)  # (levels, R, d)
        self.removed = LeadingBlocks(inverse.matrix, None, system, order, counts * few, dtype)
        self.remaining = LeadingBlocks(
            H, diagonal, system, order.flip(1), (d - counts) * ~few, dtype
        )
        self.few_removed = few[:, :, None]

    def weights(
        self,
        w: Tensor,  # (q, R, d), q rows of each system
        undamped: Undamped | None,
    ) -> Tensor:  # (levels, q, R, d)
        """The rows' weights at all levels; in between, n = levels·q of them in a row."""
        q, count = len(w), len(self.few_removed)
        level = torch.arange(count * q, device=w.device) // q
        gradient, shape = self.gradient(w), (count, *w.shape)
        if q > 1:  # else all levels share the row
            w, gradient = w.repeat(count, 1, 1), gradient.repeat(count, 1, 1)
        solution = self.solve(w, gradient, level).masked_fill_(w == 0, 0)
        if undamped is not None:
            free = ~self.is_removed[level] & (w != 0) & undamped.damped[:, None]
            H, system = undamped.H, undamped.system

            def precondition(v: Tensor, which: Tensor) -> Tensor:
                return self.precondition(v, level[which])

            solution = refined(solution, w, H, system, free, precondition)
        return solution.to(w.dtype).view(shape)

    def gradient(self, w: Tensor) -> Tensor:  # (q, R, d) -> (q, R, d)
        """H w, damped like the inverse; zero where no level needs it."""
        if not self.remaining.size:
            return torch.zeros_like(w)
        shift = 1 / self.inverse.floor.double() - self.H.diagonal(dim1=1, dim2=2)  # (G, d)
        v = shift[self.system] * w
        if (engine := engine_for(w)) is None:
            return (v + times(w.double(), self.H, self.system)).to(w.dtype)
        for r, g in enumerate(self.system.tolist()):
            columns = self.order[r, -self.remaining.size :]
            product = torch.empty(len(columns), dtype=v.dtype)
            engine.multiply_rows(
                self.H[g].numpy(), columns.numpy(), w[0, r].double().numpy(), product.numpy()
            )
            v[0, r, columns] += product
        return v.to(w.dtype)

    def precondition(
        self,
        v: Tensor,  # (n, R, d)
        level: Tensor,  # (n,) which levels these are
    ) -> Tensor:  # (n, R, d)
        """`solve` for `refinement.py`."""
        x = v.to(self.inverse.matrix.dtype)
        return self.solve(times(x, self.inverse.matrix, self.system), x, level).to(v.dtype)

    def solve(
        self,
        u: Tensor,  # (n or 1, R, d): v A
        v: Tensor,  # (n or 1, R, d)
        level: Tensor,  # (n,)
    ) -> Tensor:  # (n, R, d): v_M (H_MM)⁻¹ on the columns M that remain at each level, else 0
        """Through A_PP where few columns are removed: A v − A_:P (A_PP)⁻¹ (A v)_P."""
        few, solution = self.few_removed[level], v.new_zeros(len(level), *v.shape[1:])
        if (use := chosen(few.flatten(1).any(1))) is not None:
            u = u[use] if len(u) > 1 else u
            correction = self.removed.solve(u, level[use])
            solution[use] = u - times(correction, self.inverse.matrix, self.system)
        if (use := chosen(~few.flatten(1).all(1))) is not None:
            x = self.remaining.solve(v[use] if len(v) > 1 else v, level[use])
            solution[use] = torch.where(few[use], solution[use], x)
        return solution.masked_fill_(self.is_removed[level], 0)


class LeadingBlocks:
    """Leading blocks of symmetric matrices in an order of their columns, and their inverses."""

    def __init__(
        self,
        matrices: Tensor,  # (G, d, d)
        diagonal: Tensor | None,  # (G, d) that replaces theirs
        system: Tensor,  # (R,)
        order: Tensor,  # (R, d)
        counts: Tensor,  # (levels, R) columns in a block
        dtype: torch.dtype,
    ) -> None:
        self.size = int(counts.max()) if counts.numel() else 0
        self.order, self.counts = order[:, : self.size], counts
        if not self.size:
            return
        for precision in (dtype, torch.float64):  # where float32 is not enough
            S = gathered(matrices, system, self.order, precision)
            if diagonal is not None:
                S.diagonal(dim1=1, dim2=2).copy_(diagonal[system].gather(1, self.order))
            if S.device.type == "cpu" and self.size > 2 * FACTOR_COLUMNS:
                self.L, failed = S, not all([factorise(matrix) for matrix in S])
            else:
                self.L, info = torch.linalg.cholesky_ex(S)
                failed = bool(info.any())
            if not failed:
                return
        raise ArithmeticError("the Hessian is not positive definite; try --rel-damp 1e-2")

    def solve(
        self,
        b: Tensor,  # (n or 1, R, d)
        level: Tensor,  # (n,)
    ) -> Tensor:  # (n, R, d)
        """S_k⁻¹ b_k for the leading block of each level, zero elsewhere."""
        n, (_, R, d) = len(level), b.shape
        result = b.new_zeros(n, R, d)
        if not self.size:
            return result
        index = self.order.expand(n, R, -1)
        columns = b.gather(2, index[: len(b)]).to(self.L.dtype).permute(1, 2, 0)  # (R, size, n)
        z = torch.linalg.solve_triangular(self.L, columns, upper=False)
        place = torch.arange(self.size, device=b.device)
        inside = place < self.counts[level][:, :, None]  # (n, R, size)
        x = torch.linalg.solve_triangular(self.L.mT, z * inside.permute(1, 2, 0), upper=True)
        return result.scatter_(2, index, x.permute(2, 0, 1).to(b.dtype))


def chosen(levels: Tensor) -> Tensor | slice | None:  # (n,) bool
    """An index of these levels, None if there are none; of all levels where a look at them would
    wait for a GPU, whose triangular solves take as long for all as for some."""
    if levels.device.type != "cpu":
        return slice(None)
    return levels if bool(levels.any()) else None


# -- matrices in another order ---------------------------------------------------------------------


def gathered(
    matrices: Tensor,  # (G, d, d) symmetric
    system: Tensor,  # (R,)
    columns: Tensor,  # (R, k)
    dtype: torch.dtype,
) -> Tensor:  # (R, k, k)
    """These rows and columns of every system's matrix, on and below the diagonal."""
    if (engine := engine_for(matrices)) is None:
        index = system[:, None, None], columns[:, :, None], columns[:, None, :]
        return matrices[index].to(dtype)
    out = torch.zeros(*columns.shape, columns.shape[1], dtype=dtype)
    for lower, g, order in zip(out, system.tolist(), columns, strict=True):
        engine.gather_lower(matrices[g].numpy(), order.numpy(), lower.numpy())
    return out


def engine_for(matrix: Tensor) -> ModuleType | None:
    return compiled_engine() if matrix.device.type == "cpu" else None


def factorise(S: Tensor) -> bool:  # (k, k)
    """Replace S = L Lᵀ by L, on and below the diagonal; false if there is no such L.

    A left-looking Cholesky, FACTOR_COLUMNS columns at a time: most work is products of panels.

        L_≥J,J L_JJᵀ  =  S_≥J,J − L_≥J,<J L_J,<Jᵀ
    """
    for first in range(0, len(S), FACTOR_COLUMNS):
        last = min(first + FACTOR_COLUMNS, len(S))
        panel, width = S[first:, first:last], last - first
        panel.addmm_(S[first:, :first], S[first:last, :first].T, alpha=-1)
        corner, info = torch.linalg.cholesky_ex(panel[:width])
        if info:
            return False
        panel[:width] = corner
        below = panel[width:]
        below[:] = torch.linalg.solve_triangular(corner.T, below, upper=True, left=False)
    return True
