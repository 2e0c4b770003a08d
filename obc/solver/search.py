"""The search for a profile: coefficients of a dynamic programme, chosen by evaluation.

SPDY (Frantar & Alistarh, arXiv 2201.13096), as used by OBC (arXiv 2208.11580).

    minimise  Σ_i a_i · error_i(level_i)   where  Σ_i cost_i(level_i) ≤ Σ_i dense cost_i / TARGET

The dynamic programme (`dp.py`, and `joint.py` where one layer's cost depends on another's level)
solves this, but errors do not quite add up over layers: the optimum
for a_i = 1 is not the profile of least loss. The search looks for the a in [0, 1]^L whose solution
has the least loss according to the caller's evaluation:

    1  RANDOM_VECTORS vectors: all ones, so that the search is never worse than the plain programme;
       the others random
    2  from the best one, draw RESAMPLED of its coefficients anew; after TRIES draws in a row
       without a lower loss, draw one coefficient fewer; stop at none

A candidate whose solution has been seen before costs no evaluation. A `SearchState` is all that the
further course depends on, the random generator included: saved after each evaluation, it lets an
interrupted search end where it would have ended. Nothing here knows of models or images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from obc.solver import dp, joint
from obc.solver.errors import UserError, log
from obc.solver.progress import progress

RANDOM_VECTORS = 100
RESAMPLED = 0.1  # of the layers, at first
TRIES = 100


# -- the problem -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Costs:
    """Costs in one unit, of each layer when dense and with all layers at each level.

    Where a layer's cost depends on the levels of others: these, itself first, and the table.
    """

    dense: dict[str, float]
    levels: dict[str, dict[str, float]]
    joint: dict[str, tuple[tuple[str, ...], np.ndarray]] = field(default_factory=dict)


@dataclass(frozen=True)
class ProfileProblem:
    """The levels of every layer, their costs and errors, and the budget."""

    levels: dict[str, list[str]]  # layer → names
    costs: list[np.ndarray]  # L × (levels,), any unit; or an axis for each layer of its scope
    errors: list[np.ndarray]  # L × (levels,)
    dense: float  # cost of all layers, dense
    target: float
    buckets: int = dp.BUCKETS
    scopes: list[tuple[int, ...]] | None = None  # whose levels a cost depends on; None: its own

    @property
    def budget(self) -> float:
        return self.dense / self.target

    def solve(self, coefficients: Sequence[float] | None = None) -> dp.Choice:
        """The best choice where layer i's errors count `coefficients[i]` times.

        Raises UserError where nothing can be chosen.
        """
        factors = np.ones(len(self.levels)) if coefficients is None else coefficients
        errors = [a * e for a, e in zip(factors, self.errors, strict=True)]
        try:
            if self.scopes is None:
                return dp.solve(self.costs, errors, self.budget, self.buckets)
            return joint.solve_jointly(self.scopes, self.costs, errors, self.budget, self.buckets)
        except dp.OverBudget as error:
            largest = math.floor(1e4 * self.dense / error.least) / 1e4
            tables = zip(self.levels, self.costs, strict=True)
            fixed = {layer: table.flat[0] for layer, table in tables if np.ptp(table) == 0}
            share = 100 * math.fsum(fixed.values()) / self.dense
            hint = f"; {share:.2g} % are layers that cost the same at all levels" if fixed else ""
            raise UserError(
                f"target {self.target:g} cannot be reached with this database; "
                f"the largest that can is {largest:.10g}{hint}"
            ) from None
        except dp.NoFiniteError as error:
            layer = list(self.levels)[error.layer]
            raise UserError(
                f"{layer}: no level has a finite score, so none can be chosen; "
                "measure the scores again (database.py)"
            ) from None

    def profile(self, choice: Sequence[int]) -> dict[str, str]:
        """Layer → level."""
        return {
            layer: names[pick]
            for (layer, names), pick in zip(self.levels.items(), choice, strict=True)
        }

    def picks(self, profile: Mapping[str, str], path: str) -> list[int]:
        """The inverse of `profile`; raises UserError for a profile of another database."""
        for layer, level in profile.items():
            if level not in self.levels.get(layer, ()):
                what = f"level {level} of {layer}" if layer in self.levels else f"layer {layer}"
                raise UserError(f"{path}: {what} is not in the database")
        missing = self.levels.keys() - profile.keys()
        if missing:
            raise UserError(f"{path}: no level for layer {sorted(missing)[0]}")
        return [names.index(profile[layer]) for layer, names in self.levels.items()]

    def cost(self, picks: Sequence[int]) -> float:
        """Total cost of a choice."""
        return math.fsum(self.layer_costs(picks))

    def layer_costs(self, picks: Sequence[int]) -> list[float]:
        """The cost of each layer in a choice."""
        scopes = self.scopes or [(layer,) for layer in range(len(picks))]
        return [
            float(cost[tuple(picks[layer] for layer in scope)])
            for cost, scope in zip(self.costs, scopes, strict=True)
        ]

    def error(self, picks: Sequence[int]) -> float:
        """Total error of a choice, all coefficients one."""
        return math.fsum(error[pick] for error, pick in zip(self.errors, picks, strict=True))


def profile_problem(
    levels: Sequence[str],
    costs: Costs,
    scores: Mapping[str, Mapping[str, float]],
    path: Path,  # of the scores, for error messages
    target: float,
    buckets: int,
) -> ProfileProblem:
    """Costs and scores as one problem; raises UserError where they do not fit."""
    for layer in costs.dense:
        missing = [level for level in levels if level not in scores.get(layer, {})]
        if missing:
            raise UserError(
                f"{path}: no score of {layer} at level {missing[0]}; "
                "measure the scores again (database.py)"
            )
        broken = [level for level in levels if not math.isfinite(scores[layer][level])]
        if broken:
            log.warning("%s: never chosen, its score is not finite: %s", layer, ", ".join(broken))
        if not all(math.isfinite(c) and c >= 0 for c in costs.levels[layer].values()):
            raise UserError(f"{layer}: a cost is negative or not finite; check --timings")
    dense = math.fsum(costs.dense.values())
    if not 0 < dense < math.inf:
        raise UserError(f"the dense layers cost {dense:g} together: there is nothing to compress")
    cost_table, error_table = (
        [np.array([table[layer][level] for level in levels], float) for layer in costs.dense]
        for table in (costs.levels, scores)
    )
    for errors in error_table:
        errors[~np.isfinite(errors)] = np.nan  # not even the coefficient 0 makes it finite
    names = {layer: list(levels) for layer in costs.dense}
    scopes = None
    if costs.joint:
        numbers = {layer: number for number, layer in enumerate(costs.dense)}
        scopes = [tuple(numbers[x] for x in costs.joint.get(n, ((n,),))[0]) for n in numbers]
        for layer, (_, table) in costs.joint.items():
            cost_table[numbers[layer]] = table
    return ProfileProblem(names, cost_table, error_table, dense, target, buckets, scopes)


# -- the search ------------------------------------------------------------------------------------


@dataclass
class SearchState:
    """Where a search stands: all that its further course depends on."""

    generator: dict[str, Any]  # of NumPy's PCG64
    resampled: int  # coefficients drawn anew per candidate of step 2; 0 when all is done
    candidates: int = 0
    failures: int = 0  # candidates in a row without a lower loss
    coefficients: list[float] = field(default_factory=list)  # the best so far
    picks: list[int] = field(default_factory=list)
    loss: float | None = None
    losses: dict[str, float | None] = field(default_factory=dict)  # picks → loss; None: not finite
    history: list[list[float]] = field(default_factory=list)  # [candidate, lowest loss so far]

    @classmethod
    def start(cls, layers: int, seed: int) -> SearchState:
        generator = np.random.Generator(np.random.PCG64(seed)).bit_generator.state
        return cls(generator, max(1, round(RESAMPLED * layers)))


def picks_key(picks: Sequence[int]) -> str:
    """A choice as a key of `SearchState.losses`."""
    return " ".join(map(str, picks))


def search(
    problem: ProfileProblem,
    evaluate: Callable[[list[int]], float],  # picks → loss
    state: SearchState,
    save: Callable[[SearchState], None],
) -> SearchState:
    """Run a search to its end from wherever `state` is, which it changes; returns it."""
    generator = np.random.Generator(np.random.PCG64())
    generator.bit_generator.state = state.generator
    total = state.candidates + least_candidates_left(state)
    with progress("search", total=total, done=state.candidates) as bar:
        while state.resampled:
            coefficients = next_coefficients(state, len(problem.levels), generator)
            picks = problem.solve(coefficients).levels
            key = picks_key(picks)
            known = key in state.losses
            if not known:
                loss = float(evaluate(picks))
                state.losses[key] = loss if math.isfinite(loss) else None
            advance(state, coefficients, picks, state.losses[key])
            state.generator = generator.bit_generator.state
            if not known or not state.resampled:
                save(state)
            bar.total = state.candidates + least_candidates_left(state)
            bar.update()
            best = math.nan if state.loss is None else state.loss
            bar.set_postfix_str(f"best loss {best:.5f}, {len(state.losses)} evaluated")
    if state.loss is None:
        raise UserError("no candidate has a finite calibration loss; try --dp, or another target")
    return state


def least_candidates_left(state: SearchState) -> int:
    """How many candidates are to come if none of them lowers the loss any more."""
    random_vectors = max(0, RANDOM_VECTORS - state.candidates)
    return random_vectors + TRIES * state.resampled - state.failures


def next_coefficients(
    state: SearchState, layers: int, generator: np.random.Generator
) -> list[float]:
    """Step 1, then step 2 of the search."""
    if state.candidates == 0:
        return [1.0] * layers
    if state.candidates < RANDOM_VECTORS or not state.coefficients:
        return generator.random(layers).tolist()
    coefficients = np.array(state.coefficients)
    chosen = generator.choice(layers, state.resampled, replace=False)
    coefficients[chosen] = generator.random(state.resampled)
    return coefficients.tolist()


def advance(
    state: SearchState, coefficients: list[float], picks: list[int], loss: float | None
) -> None:
    """Record a candidate's loss."""
    state.candidates += 1
    if loss is not None and (state.loss is None or loss < state.loss):
        state.coefficients, state.picks, state.loss = coefficients, picks, loss
        state.history.append([state.candidates, loss])
        state.failures = 0
    elif state.candidates > RANDOM_VECTORS:
        state.failures += 1
        if state.failures == TRIES:
            state.resampled, state.failures = state.resampled - 1, 0
