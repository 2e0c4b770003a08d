"""A certified lower bound on integer least squares in a box, and codes drawn from it.

Park and Boyd, "A semidefinite programming method for integer convex quadratic minimization"
(arXiv 1504.07672), with the box. Count codes from integers near the continuous optimum, v = z − a,
s = t − a, l = low − a, h = high − a. For all integers v in the box and any integer c

    (v_i − c)(v_i − c − 1) ≥ 0        (v_i − l_i)(h_i − v_i) ≥ 0

The relaxation takes X for v vᵀ, keeps X ⪰ v vᵀ (a Schur complement) and, for c in CUTS, what these
constraints say of X_ii; with σ_i = 1/(h_i − l_i) to keep numbers small:

    minimise    tr(G X) − 2 sᵀG v + sᵀG s
    subject to  [X v; vᵀ 1] ⪰ 0
                X_ii ≥ (2c + 1) v_i − c(c + 1)                                   λ_ic ≥ 0
                σ_i (X_ii − (l_i + h_i) v_i + l_i h_i) ≤ 0                       κ_i ≥ 0

Certificate. Whatever λ, μ ≥ 0 (μ = σκ) are, every integer v in the box has

    f(v) ≥ f(v) − Σ λ_ic (v_i − c)(v_i − c − 1) − Σ μ_i (v_i − l_i)(h_i − v_i)
         =: q(v) = vᵀHv − 2βᵀv + γ                        H = G + diag(μ − Σ_c λ_c)

since only products of what is not negative were taken off. If H ⪰ 0, then for any v̂, r = Hv̂ − β,

    q(v) = q(v̂) + 2rᵀ(v − v̂) + (v − v̂)ᵀH(v − v̂)  ≥  q(v̂) − 2 Σ |r_i| max(v̂_i − l_i, h_i − v̂_i, …)

over the box. So the value is a lower bound whatever the solver did; its multipliers only make it a
good one. `certified_bound` clips them to their sign, makes sure of H ⪰ 0 and takes rounding off:

* H ⪰ 0 is believed if the least eigenvalue that LAPACK computes is at least `margin` = 4nε‖H‖, more
  than its error. If it is less, the diagonal is raised by what is missing: λ_i is lowered (the cut
  that says most first), and where it is used up, μ_i is raised. Both stay multipliers.
* 8n²ε times the sum of the magnitudes of all terms of q(v̂) is subtracted.

Codes. `randomised_rounding` draws v ~ N(v*, X* − v*v*ᵀ), rounds into the box and descends by single
steps (their section 4).

    symbol  variable  shape        meaning
    a       origin    (n,)         integers around which codes are counted
    λ       cuts      (n, 3)       multipliers of (v − c)(v − c − 1) ≥ 0
    μ       box       (n,)         multipliers of (v − l)(h − v) ≥ 0
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from pruning_vs_quantization import semidefinite
from pruning_vs_quantization.box import box_minimum
from pruning_vs_quantization.plots import study_package
from pruning_vs_quantization.proof import Reals
from pruning_vs_quantization.quantisation_heuristics import descend
from pruning_vs_quantization.quantisation_problem import QuantisationProblem

CUTS = (-1, 0, 1)
EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Relaxation:
    """The optimum of the relaxation as the solver found it, and what is proved by it."""

    lower: float  # certified: no codes in the box have a smaller error
    value: float  # the solver's own optimal value
    mean: Reals  # (n,) v* + a
    covariance: Reals  # (n, n) X* − v*v*ᵀ


def relax(problem: QuantisationProblem) -> Relaxation:
    """Solve the relaxation and certify its bound. Raises UserError where cvxpy is missing."""
    if not problem.live().any():
        return Relaxation(0.0, 0.0, problem.nearest(), np.zeros_like(problem.G))
    origin = np.clip(np.floor(box_minimum(problem)), problem.low, problem.high - 1)
    scale = float(np.trace(problem.G)) / len(origin)
    G, s = problem.G / scale, problem.t - origin
    low, high = problem.low - origin, problem.high - origin
    program = _program(len(s))
    mean, second, cuts, box = program.solve(G, s, low, high)
    lower = certified_bound(G, s, low, high, cuts, box)
    return Relaxation(
        lower=scale * lower,
        value=scale * program.value(G, s),
        mean=mean + origin,
        covariance=second - np.outer(mean, mean),
    )


def randomised_rounding(
    problem: QuantisationProblem,
    relaxation: Relaxation,
    samples: int,
    generator: np.random.Generator,
) -> Reals:  # (n,)
    """The best codes of `samples` draws after descent by single steps."""
    values, vectors = np.linalg.eigh(relaxation.covariance)
    spread = vectors * np.sqrt(np.maximum(values, 0))
    draws = relaxation.mean + generator.standard_normal((samples, len(values))) @ spread.T
    return descend(problem, np.clip(np.rint(draws), problem.low, problem.high))


# -- the certificate -------------------------------------------------------------------------------


def certified_bound(
    G: Reals,  # (n, n)
    s: Reals,  # (n,)
    low: Reals,  # (n,) lowest code of each unknown
    high: Reals,  # (n,)
    cuts: Reals,  # (n, 3) anything that is meant to be λ
    box: Reals,  # (n,) anything that is meant to be μ
) -> float:
    """A lower bound on (v − s) G (v − s)ᵀ over integers in the box, valid for any multipliers."""
    cuts, box = np.maximum(cuts, 0), np.maximum(box, 0)
    H = G + np.diag(box - cuts.sum(1))
    norm = float(np.abs(H).sum(1).max())  # an upper bound on the largest eigenvalue
    missing = 4 * len(s) * EPS * norm - float(np.linalg.eigvalsh(H)[0])
    if missing > 0:  # raise the diagonal by a little more: the new H is as rounded as the old one
        cuts, box = _raised(cuts, box, 2 * missing)
        H = G + np.diag(box - cuts.sum(1))
        if float(np.linalg.eigvalsh(H)[0]) < 4 * len(s) * EPS * norm:
            return 0.0
    c = np.array(CUTS, dtype=np.float64)
    beta = G @ s + (box * (low + high) - cuts @ (2 * c + 1)) / 2
    v = np.linalg.solve(H, beta)
    residual = H @ v - beta
    reach = np.maximum(np.abs(low - v), np.abs(high - v))
    e = v - s
    terms = (
        e * (G @ e),
        (-cuts * (v[:, None] - c) * (v[:, None] - c - 1)).sum(1),
        -box * (v - low) * (high - v),
        -2 * np.abs(residual) * reach,
    )
    magnitudes = np.abs(e) @ np.abs(G) @ np.abs(e) + sum(np.abs(t).sum() for t in terms[1:])
    value = sum(float(t.sum()) for t in terms)
    return max(0.0, value - 8 * len(s) ** 2 * EPS * float(magnitudes))


def _raised(cuts: Reals, box: Reals, amount: float) -> tuple[Reals, Reals]:
    """Multipliers with a diagonal of H that is larger by `amount`."""
    cuts, wanted = cuts.copy(), np.full(len(box), amount)
    for column in np.argsort(-cuts, axis=1).T:  # of every row the largest first
        row = np.arange(len(box))
        taken = np.minimum(cuts[row, column], wanted)
        cuts[row, column] -= taken
        wanted -= taken
    return cuts, box + wanted


# -- the semidefinite program ----------------------------------------------------------------------


@dataclass
class _Program:
    """The relaxation for one number of unknowns, compiled by cvxpy once."""

    problem: Any
    parameters: dict[str, Any]
    Z: Any  # (n + 1, n + 1) [X v; vᵀ 1]
    cuts: list[Any]  # constraints
    box: Any

    def solve(
        self, G: Reals, s: Reals, low: Reals, high: Reals
    ) -> tuple[Reals, Reals, Reals, Reals]:  # v (n,), X (n, n), λ (n, 3), μ (n,)
        """The relaxation's optimum and multipliers; without multipliers if the solver fails."""
        n, width = len(s), 1 / (high - low)
        self.parameters["G"].value, self.parameters["Gs"].value = G, G @ s
        self.parameters["width"].value = width
        self.parameters["sum"].value = width * (low + high)
        self.parameters["product"].value = width * low * high
        if not semidefinite.solve(self.problem, self.Z):
            v = np.clip(np.rint(s), low, high)
            return v, np.outer(v, v), np.zeros((n, len(CUTS))), np.zeros(n)
        cuts = np.stack([np.reshape(cut.dual_value, n) for cut in self.cuts], 1)
        Z = (self.Z.value + self.Z.value.T) / 2
        return Z[:n, n], Z[:n, :n], cuts, np.reshape(self.box.dual_value, n) * width

    def value(self, G: Reals, s: Reals) -> float:
        """The objective at the optimum."""
        return float(self.problem.value + s @ G @ s)


@lru_cache(maxsize=8)
def _program(n: int) -> _Program:
    cp = study_package("cvxpy")
    parameters = {"G": cp.Parameter((n, n), symmetric=True)}
    parameters |= {name: cp.Parameter(n) for name in ("Gs", "width", "sum", "product")}
    Z = cp.Variable((n + 1, n + 1), PSD=True)
    X, v = cp.diag(Z[:n, :n]), Z[:n, n]
    cuts = [X >= (2 * c + 1) * v - c * (c + 1) for c in CUTS]
    box = (
        cp.multiply(parameters["width"], X)
        <= cp.multiply(parameters["sum"], v) - parameters["product"]
    )
    objective = cp.trace(parameters["G"] @ Z[:n, :n]) - 2 * parameters["Gs"] @ v
    problem = cp.Problem(cp.Minimize(objective), [Z[n, n] == 1, *cuts, box])
    return _Program(problem, parameters, Z, cuts, box)
