"""All quantisers, or all pruners, on one subproblem: errors, bounds, and what they cost.

Every record holds an interval that is proven: `lower` ≤ the least error that is possible ≤ `error`,
the least that was found. `--method` says where the two come from,

    sdp      lower: the certified relaxation     error: the heuristics and solutions drawn from it
    exact    both: the search, started from the heuristics
    both     the better of each

and `errors` has each heuristic's own error, so that its distance from the optimum is known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field

import numpy as np

import pruning_vs_quantization.pruning_bounds as pruning_bounds
import pruning_vs_quantization.quantisation_bounds as quantisation_bounds
from pruning_vs_quantization.expected_error import integer_codes, sparsity_of
from pruning_vs_quantization.proof import PROVEN, Found, Limits, Reals
from pruning_vs_quantization.pruning_problem import (
    PruningProblem,
    exact_obs,
    magnitude,
    magnitude_least_squares,
)
from pruning_vs_quantization.pruning_search import best_subset
from pruning_vs_quantization.quantisation_heuristics import babai, descend, obq
from pruning_vs_quantization.quantisation_problem import QuantisationProblem
from pruning_vs_quantization.quantisation_search import closest

METHODS = ("sdp", "exact", "both")
SAMPLES = 100  # of the randomised rounding
ROUNDING = 1e-12  # of the signal: errors are not known better than that

QUANTISERS: Mapping[str, Callable[[QuantisationProblem], Reals]] = {
    "nearest": QuantisationProblem.nearest,
    "gptq": babai,
    "gptq_act_order": lambda problem: babai(problem, falling=True),
    "obq": obq,
}
PRUNERS: Mapping[str, Callable[[PruningProblem], Reals]] = {
    "magnitude": magnitude,
    "magnitude_least_squares": magnitude_least_squares,
    "exact_obs": exact_obs,
}


@dataclass
class Record:
    """What is known of one subproblem. Errors are squared, in the units of `signal`."""

    unknowns: int
    signal: float
    errors: dict[str, float]  # of each heuristic
    error: float  # the least that was found
    lower: float = 0.0  # proven: nothing has less
    relaxation: float | None = None  # the certified bound of the semidefinite relaxation
    finished: bool = False  # whether the search has seen everything
    nodes: int = 0
    seconds: float = 0.0  # of the search
    ridge: float = 0.0  # added to G, × its diagonal (pruning_problem.py)
    solution: list[float] = field(default_factory=list)  # codes, or weights

    def improve(self, error: float, solution: Reals) -> None:
        """Take a solution if it is better."""
        if not self.solution or error < self.error:
            self.error, self.solution = error, solution.tolist()

    def raise_lower(self, lower: float) -> None:
        """Take a proven bound. Raises ArithmeticError if a solution gives it the lie."""
        if lower > self.error * (1 + PROVEN) + ROUNDING * self.signal:
            raise ArithmeticError(f"a bound of {lower!r} is above an error of {self.error!r}")
        self.lower = min(max(self.lower, lower), self.error)

    def take(self, found: Found) -> None:
        """Take what a search has found."""
        self.improve(found.error, found.solution)
        self.raise_lower(found.lower)
        self.finished, self.nodes, self.seconds = found.finished, found.nodes, found.seconds

    def relax(self, lower: float, heuristic: str, error: float, solution: Reals) -> None:
        """Take a relaxation's bound, and the solution that a heuristic drew from it."""
        self.errors[heuristic], self.relaxation = error, lower
        self.improve(error, solution)
        self.raise_lower(lower)

    @property
    def proven(self) -> bool:
        """Whether the best solution is proven to be optimal."""
        return self.lower >= self.error * (1 - PROVEN)

    def as_json(self) -> dict[str, object]:
        return asdict(self) | {"proven": self.proven}


def _tried(problem: object, signal: float, heuristics: Mapping) -> tuple[Record, list[Reals]]:
    """A record with the errors of all heuristics, and their solutions."""
    solutions = {name: solve(problem) for name, solve in heuristics.items()}
    errors = {name: problem.error(solution) for name, solution in solutions.items()}
    best = min(errors, key=errors.__getitem__)
    record = Record(len(solutions[best]), signal, errors, errors[best])
    record.improve(errors[best], solutions[best])
    return record, list(solutions.values())


def quantised(
    G: Reals,  # (n, n)
    w: Reals,  # (n,)
    step: float,
    bits: int,
    balanced: bool,
    method: str,
    limits: Limits,
    generator: np.random.Generator,
) -> Record:
    """Every quantiser on one subproblem."""
    codes = integer_codes(bits, balanced)
    problem = QuantisationProblem.of(G, w, step, int(codes[0]), int(codes[-1]))
    record, solutions = _tried(problem, float(w @ G @ w), QUANTISERS)
    best = descend(problem, np.stack(solutions))
    record.improve(problem.error(best), best)
    if method != "exact":
        relaxation = quantisation_bounds.relax(problem)
        drawn = quantisation_bounds.randomised_rounding(problem, relaxation, SAMPLES, generator)
        record.relax(relaxation.lower, "randomised_rounding", problem.error(drawn), drawn)
    if method != "sdp":
        record.take(closest(problem, np.array(record.solution), limits))
    return record


def pruned(G: Reals, w: Reals, bits: int, method: str, limits: Limits) -> Record:
    """Every pruner on one subproblem, at the size of `bits` bits a weight."""
    problem = PruningProblem.of(G, w, sparsity_of(bits))
    record, _ = _tried(problem, float(w @ problem.G @ w), PRUNERS)
    record.ridge = problem.ridge
    if method != "exact":
        relaxation = pruning_bounds.relax(problem)
        rounded = pruning_bounds.rounded(problem, relaxation)
        record.relax(relaxation.lower, "relaxation_rounded", problem.error(rounded), rounded)
    if method != "sdp":
        record.take(best_subset(problem, np.array(record.solution), limits))
    return record
