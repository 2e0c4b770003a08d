"""Weights at many levels of sparsity from one elimination.

OBC (arXiv 2208.11580), section 4, "global" selection: pruning a row to the end yields an order and
a loss for every step, and nothing else is kept. At sparsity s the layer loses the
K = ceil(rows·d·s) weights of least loss, so row r loses its first k_r. With P the columns that are
gone, M those that are kept and A = H⁻¹, the weights of least squared error that are left,

    ŵ_M  =  (H_MM)⁻¹ (H w)_M  =  w_M − A_MP (A_PP)⁻¹ w_P

take a factor of H_MM or one of A_PP, whichever is the smaller. Levels only ever lose more columns,
so all A_PP are leading blocks of one matrix, A in the order of removal, and all H_MM those of H in
the opposite order. One Cholesky factor of each, half of d wide, serves all levels: 2 (d/2)³/3 flops
instead of the d³/3 of a factor of all of A. With S = L Lᵀ either of them, S_k its leading block,

    S_k⁻¹ b_k  =  L⁻ᵀ (L⁻¹ b, cut off after k)

so that all levels of a row share a forward substitution, too. Where H was damped, `refinement.py`
improves on the result. On a CPU systems are done one by one: a row's weights are the same bits
whichever rows are done with it, and whatever the number of threads.

    symbol  variable   shape           meaning
    L       gone.L     (R, k, k)       Cholesky factor of A_PP, columns in order of removal
    L       kept.L     (R, k, k)       … of H_MM, columns in the opposite order
    k_r     counts     (levels, R)     columns that are gone at each level
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

BLOCK = 96  # columns of a factor that are made at a time


@dataclass(frozen=True)
class Undamped:
    """The Hessians that a batch of systems is about, where their inverses were damped."""

    H: Tensor  # (G, d, d) float64
    system: Tensor  # (R,) which H is each system's
    damped: Tensor  # (R,) bool


def sparsity_grid(low: float, high: float, delta: float) -> list[float]:
    """Sparsities whose density shrinks by the factor 1 − delta, from `low`; then `high` itself.

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
    cheapest = units.flatten().argsort(stable=True) // units.shape[1]
    counts = []
    for sparsity in sparsities:
        if not 0 <= sparsity <= 1:
            raise ValueError(f"a sparsity must be in [0, 1]; got {sparsity}")
        K = ceil(units.numel() * sparsity * (1 - 1e-12))  # 0.3·10 is 3, not 3.0000000000000004
        counts.append(torch.bincount(cheapest[:K], minlength=len(losses)) * size)
    return torch.stack(counts)


def completed(order: Tensor, columns: int) -> Tensor:  # (rows, steps) -> (rows, columns)
    """An order of removal, and after it the columns that stay."""
    stays = torch.ones(len(order), columns, dtype=torch.bool, device=order.device)
    stays.scatter_(1, order.long(), False)
    return torch.cat([order.long(), torch.nonzero(stays)[:, 1].view(len(order), -1)], 1)


def is_gone(order: Tensor, counts: Tensor) -> Tensor:  # (levels, R, d) bool
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
    counts: Tensor,  # (levels, R) how many of them are gone
    undamped: Undamped | None = None,  # H to refine the weights by
) -> Tensor:  # (levels, R, q, d)
    """Weights of every row at every level, in closed form. Those that are zero stay zero."""
    if inverse.matrix is None:
        return torch.where(is_gone(order, counts)[:, :, None], 0, W)
    levels, (R, q, _) = W.new_empty(len(counts), *W.shape), W.shape

    def kept_of(part: slice) -> Kept:
        return Kept(inverse, H, system[part], order[part], counts[:, part])

    def fill(part: slice, kept: Kept, rows: slice = slice(None)) -> None:
        own = undamped and Undamped(undamped.H, undamped.system[part], undamped.damped[part])
        for row in range(q)[rows]:
            levels[:, part, row] = kept.weights(W[part, row], own)

    if W.device.type != "cpu":
        fill(slice(None), kept_of(slice(None)))
    elif q == 1:
        in_pieces(lambda part: fill(part, kept_of(part)), R, 1)
    else:  # rows that share a system share its factors
        for part in (slice(r, r + 1) for r in range(R)):
            with one_thread():
                kept = kept_of(part)
            in_pieces(partial(fill, part, kept), q, 1)
    return levels


class Kept:
    """(H_MM)⁻¹ of R systems on the columns M that each level keeps, and weights by it."""

    def __init__(
        self,
        inverse: Inverse,
        H: Tensor,  # (G, d, d) float64
        system: Tensor,  # (R,)
        order: Tensor,  # (R, d)
        counts: Tensor,  # (levels, R)
    ) -> None:
        d = order.shape[1]
        self.inverse, self.H, self.system, self.order = inverse, H, system, order
        few = counts <= d // 2
        diagonal = 1 / inverse.floor  # of H, damped and decoupled
        dtype = inverse.matrix.dtype
        self.is_gone = is_gone(order, counts)  # (levels, R, d)
        self.gone = Leading(inverse.matrix, None, system, order, counts * few, dtype)
        self.kept = Leading(H, diagonal, system, order.flip(1), (d - counts) * ~few, dtype)
        self.few = few[:, :, None]

    def weights(
        self,
        w: Tensor,  # (R, d), one row of each system
        undamped: Undamped | None,
    ) -> Tensor:  # (levels, R, d)
        """The row's weights at all levels."""
        level = torch.arange(len(self.few), device=w.device)
        now = self.solve(w[None], self.gradient(w)[None], level).masked_fill_(w == 0, 0)
        if undamped is not None:
            free = ~self.is_gone & (w != 0) & undamped.damped[:, None]
            now = refined(now, w, undamped.H, undamped.system, free, self.precondition)
        return now.to(w.dtype)

    def gradient(self, w: Tensor) -> Tensor:  # (R, d) -> (R, d)
        """H w, damped like the inverse; where a level that keeps few columns asks for it."""
        if not self.kept.size:
            return torch.zeros_like(w)
        shift = 1 / self.inverse.floor.double() - self.H.diagonal(dim1=1, dim2=2)  # (G, d)
        v = shift[self.system] * w
        if (fast := _compiled(w)) is None:
            return (v + times(w.double()[None], self.H, self.system)[0]).to(w.dtype)
        for r, g in enumerate(self.system.tolist()):
            columns = self.order[r, -self.kept.size :]
            part = torch.empty(len(columns), dtype=v.dtype)
            fast.multiply_rows(
                self.H[g].numpy(), columns.numpy(), w[r].double().numpy(), part.numpy()
            )
            v[r, columns] += part
        return v.to(w.dtype)

    def precondition(
        self,
        v: Tensor,  # (some, R, d)
        level: Tensor,  # (some,) which levels these are
    ) -> Tensor:  # (some, R, d)
        """`solve` for `refinement.py`."""
        x = v.to(self.inverse.matrix.dtype)
        return self.solve(times(x, self.inverse.matrix, self.system), x, level).to(v.dtype)

    def solve(
        self,
        u: Tensor,  # (some or 1, R, d): v A
        v: Tensor,  # (some or 1, R, d)
        level: Tensor,  # (some,)
    ) -> Tensor:  # (some, R, d): v_M (H_MM)⁻¹ on the columns M kept at each level, else 0
        """By way of A_PP where few columns are gone: A v − A_:P (A_PP)⁻¹ (A v)_P."""
        few, found = self.few[level], v.new_zeros(len(level), *v.shape[1:])
        if bool((some := few.flatten(1).any(1)).any()):
            u = u[some] if len(u) > 1 else u
            found[some] = u - times(
                self.gone.solve(u, level[some]), self.inverse.matrix, self.system
            )
        if bool((some := ~few.flatten(1).all(1)).any()):
            x = self.kept.solve(v[some] if len(v) > 1 else v, level[some])
            found[some] = torch.where(few[some], found[some], x)
        return found.masked_fill_(self.is_gone[level], 0)


class Leading:
    """Leading blocks of symmetric matrices in an order of their columns, and their inverses."""

    def __init__(
        self,
        matrices: Tensor,  # (G, d, d)
        diagonal: Tensor | None,  # (G, d) that takes the place of theirs
        system: Tensor,  # (R,)
        order: Tensor,  # (R, d)
        counts: Tensor,  # (levels, R) columns in a block
        dtype: torch.dtype,
    ) -> None:
        self.size = int(counts.max()) if counts.numel() else 0
        self.order, self.counts = order[:, : self.size], counts
        if not self.size:
            return
        self.L, failed = self._factors(matrices, diagonal, system, dtype)
        if failed:  # float32 does not carry here
            self.L, failed = self._factors(matrices, diagonal, system, torch.float64)
        if failed:
            raise ArithmeticError("the Hessian is not positive definite; try --rel-damp 1e-2")

    def _factors(
        self, matrices: Tensor, diagonal: Tensor | None, system: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, bool]:  # (R, size, size), whether there is no factor of some
        """Cholesky factors; on and below their diagonal."""
        S = gathered(matrices, system, self.order, dtype)
        if diagonal is not None:
            S.diagonal(dim1=1, dim2=2).copy_(diagonal[system].gather(1, self.order))
        if S.device.type == "cpu" and self.size > 2 * BLOCK:
            return S, any([not factorise(matrix) for matrix in S])
        L, info = torch.linalg.cholesky_ex(S)
        return L, bool(info.any())

    def solve(
        self,
        b: Tensor,  # (some or 1, R, d)
        level: Tensor,  # (some,)
    ) -> Tensor:  # (some, R, d)
        """S_k⁻¹ b_k for the leading block of each level, zero elsewhere."""
        some, (_, R, d) = len(level), b.shape
        result = b.new_zeros(some, R, d)
        if not self.size:
            return result
        index = self.order.expand(some, R, -1)
        columns = b.gather(2, index[: len(b)]).to(self.L.dtype).permute(1, 2, 0)  # (R, size, some)
        z = torch.linalg.solve_triangular(self.L, columns, upper=False)
        place = torch.arange(self.size, device=b.device)
        inside = place < self.counts[level][:, :, None]  # (some, R, size)
        x = torch.linalg.solve_triangular(self.L.mT, z * inside.permute(1, 2, 0), upper=True)
        return result.scatter_(2, index, x.permute(2, 0, 1).to(b.dtype))


# -- matrices in another order ---------------------------------------------------------------------


def gathered(
    matrices: Tensor,  # (G, d, d) symmetric
    system: Tensor,  # (R,)
    columns: Tensor,  # (R, k)
    dtype: torch.dtype,
) -> Tensor:  # (R, k, k)
    """Some rows and columns of every system's matrix; on and below the diagonal."""
    if (fast := _compiled(matrices)) is None:
        index = system[:, None, None], columns[:, :, None], columns[:, None, :]
        return matrices[index].to(dtype)
    out = torch.zeros(*columns.shape, columns.shape[1], dtype=dtype)
    for part, g, chosen in zip(out, system.tolist(), columns, strict=True):
        fast.gather_lower(matrices[g].numpy(), chosen.numpy(), part.numpy())
    return out


def _compiled(matrix: Tensor) -> ModuleType | None:
    return compiled_engine() if matrix.device.type == "cpu" else None


def factorise(S: Tensor) -> bool:  # (k, k)
    """L of S = L Lᵀ in place of S, on and below the diagonal; false if there is none.

    A left-looking Cholesky, BLOCK columns at a time: almost all of it is products of panels.

        L_≥J,J L_JJᵀ  =  S_≥J,J − L_≥J,<J L_J,<Jᵀ
    """
    for first in range(0, len(S), BLOCK):
        last = min(first + BLOCK, len(S))
        panel, width = S[first:, first:last], last - first
        panel.addmm_(S[first:, :first], S[first:last, :first].T, alpha=-1)
        corner, info = torch.linalg.cholesky_ex(panel[:width])
        if info:
            return False
        panel[:width] = corner
        below = panel[width:]
        below[:] = torch.linalg.solve_triangular(corner.T, below, upper=True, left=False)
    return True
