"""Quantising one row of weights on one chunk of inputs: integer least squares in a box, bounded.

Kuzmin et al. (arXiv 2307.02973), section 5.1. With w the weights, Γ = E[x xᵀ] of their inputs and a
symmetric uniform grid of step Δ and codes low … high,

    minimise  f(z) = (z − t) G (z − t)ᵀ      over integers low ≤ z ≤ high,      t = w/Δ,  G = Δ²Γ

f is the squared error of the layer's output that the chunk adds, (w − ŵ) Γ (w − ŵ)ᵀ with ŵ = Δz.
Inputs that are always zero have a zero row and column in G; their codes do not matter, and the
solvers leave them out (`live`).

**Quantisers without a proof**, with which bounds and optimum are compared:

* `babai` rounds one weight after the other, each to the value that is best given those before it
  and the later ones free: Babai's nearest plane, clipped to the box. Columns from left to right are
  GPTQ's order (arXiv 2210.17323), columns of falling G_pp its "act-order".
* `obq` is the toolkit's own answer: the greedy elimination of `elimination.py` with the rule
  `Quantise` (OBC, arXiv 2208.11580, section 5) in float32, damped only where the toolkit would.
* `descend` improves any codes by single steps, z_i ± 1 inside the box, always the one that gains
  most, until none gains (Park and Boyd's 1-opt, arXiv 1504.07672, section 4). With g = 2G(z − t), a
  step of d = ±1 at i changes f by G_ii + d·g_i, and g by 2d·G[:, i].

**The relaxation.** Park and Boyd, "A semidefinite programming method for integer convex quadratic
minimization" (arXiv 1504.07672), with the box. Count codes from integers near the continuous
optimum, v = z − a, s = t − a, l = low − a, h = high − a. For all integers v in the box and any
integer c

    (v_i − c)(v_i − c − 1) ≥ 0        (v_i − l_i)(h_i − v_i) ≥ 0

The relaxation takes X for v vᵀ, keeps X ⪰ v vᵀ (a Schur complement) and, for c in CUTS, what these
constraints say about X_ii; σ_i = 1/(h_i − l_i) keeps numbers small:

    minimise    tr(G X) − 2 sᵀG v + sᵀG s
    subject to  [X v; vᵀ 1] ⪰ 0
                X_ii ≥ (2c + 1) v_i − c(c + 1)                                   λ_ic ≥ 0
                σ_i (X_ii − (l_i + h_i) v_i + l_i h_i) ≤ 0                       κ_i ≥ 0

**Certificate.** Whatever λ, μ ≥ 0 (μ = σκ) are, every integer v in the box has

    f(v) ≥ f(v) − Σ λ_ic (v_i − c)(v_i − c − 1) − Σ μ_i (v_i − l_i)(h_i − v_i)
         =: q(v) = vᵀHv − 2βᵀv + γ                        H = G + diag(μ − Σ_c λ_c)

since only nonnegative products were subtracted. If H ⪰ 0, then for any v̂, r = Hv̂ − β,

    q(v) = q(v̂) + 2rᵀ(v − v̂) + (v − v̂)ᵀH(v − v̂)  ≥  q(v̂) − 2 Σ |r_i| max(v̂_i − l_i, h_i − v̂_i, …)

over the box. So the value is a lower bound whatever the solver did; its multipliers only make it a
good one. `quantisation_certificate` clips them to their sign, ensures H ⪰ 0 and subtracts rounding:

* H ⪰ 0 is accepted if the least eigenvalue that LAPACK computes is at least 4nε‖H‖, more than its
  error. If it is less, the diagonal is raised by what is missing: λ_i is lowered (the strongest cut
  first), and once it is used up, μ_i is raised. Both stay valid multipliers.
* 8n²ε times the sum of the magnitudes of all terms of q(v̂) is subtracted.

`randomised_rounding` draws v ~ N(v*, X* − v*v*ᵀ), rounds into the box and descends by single steps
(Park and Boyd, section 4).

    symbol  variable  shape    meaning
    G       G         (n, n)   float64, symmetric positive semidefinite, possibly singular
    t       t         (n,)     weights in steps
    z                 (n,)     codes, float64 with integer values
    a       origin    (n,)     integers from which codes are counted
    λ       cuts      (n, 3)   multipliers of (v − c)(v − c − 1) ≥ 0
    μ       box       (n,)     multipliers of (v − l)(h − v) ≥ 0
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from obc.solver.elimination import Quantise, eliminate
from obc.solver.inverse import alive_inputs, damped_inverse
from pruning_vs_quantization.plots import study_package
from pruning_vs_quantization.proof import EPS, Flags, Reals, compiled, solve_semidefinite

CUTS = (-1, 0, 1)
GAIN = 1e-12  # × the largest G_ii: a step that gains less is rounding
STEPS = 50  # of the active set × the number of unknowns; only rounding could make it take more


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

    def box_minimum(self) -> Reals:  # (n,)
        """The minimiser of f over all real x in the box, by an active set.

        Some coordinates are held at a side of the box, the others (`free`) solve their linear
        system. The step towards that solution ends where a coordinate meets a side, and is held
        there from then on; after a full step, the held coordinate whose gradient points most into
        the box is released. Each full step ends in the optimum of its active set, and the error
        falls from one to the next, so that no active set recurs and the method ends (Nocedal and
        Wright, Numerical Optimization, 16.5). The result may be off by rounding: callers that need
        a proof check the gradient themselves. SciPy's lsq_linear (BVLS) would do the same, but
        leaves gradients worth up to 3·10⁻³ tr(G) where G is nearly singular, and the bounds of the
        search would lose that much.
        """
        G, t, low, high = self.G, self.t, float(self.low), float(self.high)
        ridge = 1e-13 * np.trace(G) / len(t)  # only guides the way; G may be singular
        scale = np.abs(G).sum(1) * (high - low)
        x, free = np.clip(t, low, high), (t >= low) & (t <= high)
        for _ in range(STEPS * len(t)):
            target, held = x.copy(), ~free
            pull = G[np.ix_(free, held)] @ (x[held] - t[held])
            system = G[np.ix_(free, free)] + ridge * np.eye(int(free.sum()))
            target[free] = t[free] - np.linalg.solve(system, pull)
            move, share = target - x, np.full(len(x), np.inf)
            moving = free & (move != 0)
            share[moving] = (np.where(move > 0, high - x, low - x)[moving]) / move[moving]
            first = int(np.argmin(share))  # of the coordinates to meet a side of the box
            if share[first] < 1:
                x = x + share[first] * move
                x[first] = high if move[first] > 0 else low
                x, free[first] = np.clip(x, low, high), False
                continue
            x = target
            gradient = G @ (x - t)
            inward = np.where(free, -np.inf, np.where(x <= low, -gradient, gradient))
            best = int(np.argmax(inward))
            if inward[best] <= 1e-13 * scale[best]:
                break
            free[best] = True
        return x


# -- quantisers without a proof --------------------------------------------------------------------


def babai(
    problem: QuantisationProblem,
    falling: bool = False,  # columns of falling G_pp, else from left to right
) -> Reals:  # (n,)
    """Codes by Babai's nearest plane, clipped to the box."""
    diagonal = np.diagonal(problem.G)
    order = np.argsort(-diagonal, kind="stable") if falling else np.arange(len(problem.t))
    G = torch.from_numpy(problem.G[np.ix_(order, order)])
    A = damped_inverse(G[None], dtype=torch.float64).matrix[0]
    # U upper with A = UᵀU: row p is what fixing column p, after those before it, does to the rest
    U = torch.linalg.cholesky(A, upper=True).numpy()
    t, z = problem.t[order], np.empty(len(order))
    for p in range(len(order)):
        code = min(max(np.rint(t[p]), problem.low), problem.high)
        t[p:] -= U[p, p:] * ((t[p] - code) / U[p, p])
        z[order[p]] = code
    return z


def obq(problem: QuantisationProblem) -> Reals:  # (n,)
    """Codes by the toolkit's OBQ."""
    H = torch.from_numpy(problem.G)[None]
    t = torch.from_numpy(problem.t).float()[None] * alive_inputs(H)
    low, high = (torch.full((1, 1), float(code)) for code in (problem.low, problem.high))
    rule = Quantise(torch.ones(1, 1), low, high)
    system = torch.zeros(1, dtype=torch.int64)
    trace = eliminate(t[:, None], damped_inverse(H), system, rule, t.shape[1])
    return np.clip(np.rint(trace.weights[0, 0].double().numpy()), problem.low, problem.high)


def descend(
    problem: QuantisationProblem,
    starts: Reals,  # (m, n) codes inside the box
) -> Reals:  # (n,)
    """The best codes that single steps lead to from any of the starts."""
    ends = descents(problem.G, problem.t, starts, float(problem.low), float(problem.high))
    return min(ends, key=problem.error)


@compiled
def descents(
    G: Reals,  # (n, n)
    t: Reals,  # (n,)
    starts: Reals,  # (m, n)
    low: float,
    high: float,
) -> Reals:  # (m, n)
    """Where steepest descent by single steps ends, from each start."""
    ends = starts.copy()
    n, gradient, least = len(t), np.empty(len(t)), 0.0
    for i in range(n):
        least = max(least, GAIN * G[i, i])
    for row in range(len(ends)):
        for i in range(n):
            gradient[i] = 0.0
            for j in range(n):
                gradient[i] += 2 * G[i, j] * (ends[row, j] - t[j])
        while True:
            best, where, step = -least, -1, 0.0
            for i in range(n):
                d = -1.0 if gradient[i] > 0 else 1.0
                change = G[i, i] - abs(gradient[i])
                if change < best and low <= ends[row, i] + d <= high:
                    best, where, step = change, i, d
            if where < 0:
                break
            ends[row, where] += step
            for i in range(n):
                gradient[i] += 2 * step * G[i, where]
    return ends


# -- the relaxation --------------------------------------------------------------------------------


@dataclass(frozen=True)
class CodeRelaxation:
    """The optimum of the relaxation as the solver returned it, and what it proves."""

    lower: float  # certified: no codes in the box have a smaller error
    value: float  # the solver's own optimal value
    mean: Reals  # (n,) v* + a
    covariance: Reals  # (n, n) X* − v*v*ᵀ


@lru_cache(maxsize=8)
def code_program(n: int) -> tuple[Any, dict[str, Any], Any, list[Any], Any]:
    """The relaxation for n unknowns, compiled once: program, parameters, Z, cuts, box.

    Z is [X v; vᵀ 1]; cuts and box are the constraints.
    """
    cp = study_package("cvxpy")
    parameters = {"G": cp.Parameter((n, n), symmetric=True)}
    parameters |= {name: cp.Parameter(n) for name in ("Gs", "width", "sum", "product")}
    G, Gs, width, total, product = parameters.values()
    Z = cp.Variable((n + 1, n + 1), PSD=True)
    X, v = cp.diag(Z[:n, :n]), Z[:n, n]
    cuts = [X >= (2 * c + 1) * v - c * (c + 1) for c in CUTS]
    box = cp.multiply(width, X) <= cp.multiply(total, v) - product
    objective = cp.trace(G @ Z[:n, :n]) - 2 * Gs @ v
    program = cp.Problem(cp.Minimize(objective), [Z[n, n] == 1, *cuts, box])
    return program, parameters, Z, cuts, box


def relax_codes(problem: QuantisationProblem) -> CodeRelaxation:
    """Solve the relaxation and certify its bound. Raises UserError if cvxpy is missing."""
    if not problem.live().any():
        return CodeRelaxation(0.0, 0.0, problem.nearest(), np.zeros_like(problem.G))
    origin = np.clip(np.floor(problem.box_minimum()), problem.low, problem.high - 1)
    n, scale = len(origin), float(np.trace(problem.G)) / len(origin)
    G, s = problem.G / scale, problem.t - origin
    low, high = problem.low - origin, problem.high - origin
    width = 1 / (high - low)
    program, parameters, Z, cuts, box = code_program(n)
    values = (G, G @ s, width, width * (low + high), width * low * high)
    for parameter, value in zip(parameters.values(), values, strict=True):
        parameter.value = value
    if solve_semidefinite(program, Z):
        λ = np.stack([np.reshape(cut.dual_value, n) for cut in cuts], 1)
        μ = np.reshape(box.dual_value, n) * width
        second = (Z.value + Z.value.T) / 2
        mean, second = second[:n, n], second[:n, :n]
        value = float(program.value + s @ G @ s)
    else:  # no multipliers
        λ, μ, value = np.zeros((n, len(CUTS))), np.zeros(n), 0.0
        mean = np.clip(np.rint(s), low, high)
        second = np.outer(mean, mean)
    lower = quantisation_certificate(G, s, low, high, λ, μ)
    covariance = second - np.outer(mean, mean)
    return CodeRelaxation(scale * lower, scale * value, mean + origin, covariance)


def quantisation_certificate(
    G: Reals,  # (n, n)
    s: Reals,  # (n,)
    low: Reals,  # (n,) lowest code of each unknown
    high: Reals,  # (n,)
    cuts: Reals,  # (n, 3) any values in place of λ
    box: Reals,  # (n,) any values in place of μ
) -> float:
    """A lower bound on (v − s) G (v − s)ᵀ over integers in the box, valid for any multipliers."""
    n, cuts, box = len(s), np.maximum(cuts, 0), np.maximum(box, 0)
    H = G + np.diag(box - cuts.sum(1))
    norm = float(np.abs(H).sum(1).max())  # an upper bound on the largest eigenvalue
    missing = 4 * n * EPS * norm - float(np.linalg.eigvalsh(H)[0])
    if missing > 0:  # raise the diagonal a little further: the new H has the same rounding errors
        rows, raise_by = np.arange(n), np.full(n, 2 * missing)
        for column in np.argsort(-cuts, axis=1).T:  # in every row the largest cut first
            taken = np.minimum(cuts[rows, column], raise_by)
            cuts[rows, column] -= taken
            raise_by -= taken
        box = box + raise_by
        H = G + np.diag(box - cuts.sum(1))
        if float(np.linalg.eigvalsh(H)[0]) < 4 * n * EPS * norm:
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
    return max(0.0, value - 8 * n**2 * EPS * float(magnitudes))


def randomised_rounding(
    problem: QuantisationProblem,
    relaxation: CodeRelaxation,
    samples: int,
    generator: np.random.Generator,
) -> Reals:  # (n,)
    """The best codes of `samples` draws after descent by single steps."""
    values, vectors = np.linalg.eigh(relaxation.covariance)
    spread = vectors * np.sqrt(np.maximum(values, 0))
    draws = relaxation.mean + generator.standard_normal((samples, len(values))) @ spread.T
    return descend(problem, np.clip(np.rint(draws), problem.low, problem.high))
