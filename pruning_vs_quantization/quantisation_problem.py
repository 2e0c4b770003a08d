"""Quantising one row of weights on one chunk of inputs: integer least squares in a box.

Kuzmin et al. (arXiv 2307.02973), section 5.1. With w the weights, G = E[x xᵀ] of their inputs and a
symmetric uniform grid of step Δ and codes low … high,

    minimise  f(z) = (z − t) Δ²G (z − t)ᵀ      over integers low ≤ z ≤ high,        t = w/Δ

f is the squared error of the layer's output that the chunk adds, (w − ŵ) G (w − ŵ)ᵀ with ŵ = Δz.

    symbol  variable   shape   meaning
    Δ²G     G          (n, n)  float64, symmetric positive semidefinite, perhaps singular
    t       t          (n,)    weights in steps
    z                  (n,)    codes, float64 of integer value

Inputs that are always zero have a row and a column of zeros in G; their codes do not matter, and
the solvers leave them out (`live`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pruning_vs_quantization.proof import Flags, Reals


@dataclass(frozen=True)
class QuantisationProblem:
    """min (z − t) G (z − t)ᵀ over integers in a box."""

    G: Reals  # (n, n)
    t: Reals  # (n,)
    low: int
    high: int

    @classmethod
    def of(cls, G: Reals, w: Reals, step: float, low: int, high: int) -> QuantisationProblem:
        """From weights, the second moment of their inputs, and a grid."""
        return cls(step * step * (G + G.T) / 2, w / step, low, high)

    def error(self, z: Reals) -> float:
        """f(z)."""
        e = z - self.t
        return float(e @ self.G @ e)

    def nearest(self) -> Reals:  # (n,)
        """Every weight rounded by itself: round to nearest."""
        return np.clip(np.rint(self.t), self.low, self.high)

    def live(self) -> Flags:  # (n,)
        """Which inputs are not always zero."""
        return np.diagonal(self.G) > 0

    def part(self, columns: Flags) -> QuantisationProblem:
        """The problem of some of the unknowns, when the others do not matter."""
        return QuantisationProblem(
            np.ascontiguousarray(self.G[np.ix_(columns, columns)]),
            self.t[columns],
            self.low,
            self.high,
        )
