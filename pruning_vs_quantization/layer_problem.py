"""The subproblems of a layer: chunks of its inputs with their second moments, and their solutions.

Row r of a layer's weights (d numbers, columns in the order (channel, kh, kw)) is cut into chunks of
at most `opt_dim` consecutive columns. A chunk of weights w sees the inputs x at its columns, over
all positions of all images, and an error w − ŵ in it changes the layer's output by (w − ŵ) x, so

    mean squared change of the output  =  (w − ŵ) G (w − ŵ)ᵀ        G = E[x xᵀ]
    mean squared output of the chunk   =  w G wᵀ                     the signal of its SQNR

G is that of hessian.py's `Gram` for a layer that has the chunk's channels only: strides, padding,
dilation and groups are the layer's own. E is the mean over images of the sum over positions, a
factor that cancels in every SQNR. Inputs are converted to float64 before anything is multiplied.

All quantisers, or all pruners, are applied to each subproblem. Every record holds a proven
interval: `lower` ≤ the least error that is possible ≤ `error`, that of the best known solution.
The method determines where the two come from,

    sdp      lower: the certified relaxation     error: the heuristics and solutions drawn from it
    exact    both: the search, started from the heuristics
    both     the better of each

and `errors` has each heuristic's own error, so that its distance from the optimum is known.

    symbol  variable  shape
    w       w         (n,)    weights of the chunk, n ≤ opt_dim
    G       G         (n, n)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modelutils import evaluating, placed
from obc.solver.hessian import Gram
from obc.solver.layers import view
from obc.solver.progress import progress
from obc.toolkit.calibrate import watching
from pruning_vs_quantization import pruning_bounds, quantisation_bounds
from pruning_vs_quantization.expected_error import Histogram, best_step, integer_codes, sparsity_of
from pruning_vs_quantization.proof import PROVEN, ProvenSolution, Reals, SearchLimits
from pruning_vs_quantization.pruning_bounds import PruningProblem
from pruning_vs_quantization.quantisation_bounds import QuantisationProblem
from pruning_vs_quantization.quantisation_search import closest

RANGES = ("MSE", "minmax")
METHODS = ("sdp", "exact", "both")
SAMPLES = 100  # of the randomised rounding
ROUNDING = 1e-12  # of the signal: errors are not known more precisely

QUANTISERS: Mapping[str, Callable[[QuantisationProblem], Reals]] = {
    "nearest": QuantisationProblem.nearest,
    "gptq": quantisation_bounds.babai,
    "gptq_act_order": lambda problem: quantisation_bounds.babai(problem, falling=True),
    "obq": quantisation_bounds.obq,
}
PRUNERS: Mapping[str, Callable[[PruningProblem], Reals]] = {
    "magnitude": pruning_bounds.magnitude,
    "magnitude_least_squares": pruning_bounds.magnitude_least_squares,
    "exact_obs": pruning_bounds.exact_obs,
}


@dataclass(frozen=True, order=True)
class Chunk:
    """Consecutive columns of one group of a layer."""

    group: int
    start: int
    stop: int


@dataclass(frozen=True)
class Subproblem:
    """One row's weights on one chunk."""

    row: int  # output channel
    chunk: Chunk
    w: Reals  # (n,)
    G: Reals  # (n, n)

    @property
    def signal(self) -> float:
        """The mean squared output of the chunk."""
        return float(self.w @ self.G @ self.w)


def evenly_spread(count: int, total: int) -> list[int]:
    """`count` of the numbers 0 … total − 1, evenly spread; all if there are no more, or it is < 1.

    >>> evenly_spread(3, 9), evenly_spread(9, 3), evenly_spread(-1, 3)
    ([0, 4, 8], [0, 1, 2], [0, 1, 2])
    """
    count = min(count, total) if count > 0 else total
    return sorted({round(i) for i in np.linspace(0, total - 1, count)})


def rows_and_chunks(
    layer: nn.Module,
    opt_dim: int,
    channels: int,  # number of output channels; below 1: all
    chunks: int,  # number of chunks of each; below 1: all
) -> list[tuple[int, Chunk]]:
    """The rows and chunks to study, evenly spread."""
    rows, d = view(layer).rows, view(layer).columns
    per_group = rows // view(layer).groups
    starts = list(range(0, d, opt_dim))
    chosen = [starts[i] for i in evenly_spread(chunks, len(starts))]
    return [
        (row, Chunk(row // per_group, start, min(start + opt_dim, d)))
        for row in evenly_spread(channels, rows)
        for start in chosen
    ]


def subproblems(
    layer: nn.Module,
    places: Iterable[tuple[int, Chunk]],  # rows and chunks
    moments: Mapping[Chunk, Reals],
) -> list[Subproblem]:
    """The weights of a layer at these places, with their inputs' second moments."""
    W = view(layer).matrix.double().cpu().numpy()
    return [Subproblem(row, c, W[row, c.start : c.stop], moments[c]) for row, c in places]


def grid_steps(
    weight: Tensor,  # (rows, …)
    bits: int,
    balanced: bool = False,  # without the lowest code
    per_channel: bool = False,  # else one step for the layer
    method: str = "MSE",  # of RANGES
) -> Reals:  # (rows,)
    """The step of a layer's symmetric grid: of least squared error, or from the largest weight.

    The first is proven, on the weights rounded to FP16 (`expected_error.best_step`); the second is
    quant.py's, 2·max|w| over the number of steps.
    """
    W, codes, steps = weight.detach().flatten(1), integer_codes(bits, balanced), []
    for tensor in W if per_channel else [W]:
        if not bool(tensor.to(torch.float16).any()):
            steps.append(1.0)  # nothing to quantise
        elif method == "MSE":
            steps.append(best_step(Histogram.of(tensor), codes))
        else:
            steps.append(2 * float(tensor.abs().max()) / (codes[-1] - codes[0]))
    return np.array(steps) if per_channel else np.repeat(steps, len(W))


# -- second moments --------------------------------------------------------------------------------


class ChunkMoments:
    """E[x xᵀ] of one chunk's inputs, batch after batch."""

    def __init__(self, layer: nn.Module, chunk: Chunk) -> None:
        self.chunk, self.layer = chunk, view(layer)
        taps = self.layer.taps
        first, last = chunk.start // taps, -(-chunk.stop // taps)  # channels of the group
        self.first_input, self.inputs = chunk.group * self.layer.channels + first, last - first
        self.columns = slice(chunk.start - first * taps, chunk.stop - first * taps)
        self.gram = Gram(self.layer.resized(rows=1, channels=self.inputs))

    def add(self, inputs: Tensor) -> None:
        """Add the inputs of one call of the layer."""
        channels = inputs.narrow(self.layer.channel_axis, self.first_input, self.inputs)
        self.gram.add(channels.double())

    def matrix(
        self,
        images: int,  # that the model was shown, in however many calls of the layer
    ) -> Reals:  # (n, n); zero if the layer has seen nothing
        G = self.gram.matrix()[0, self.columns, self.columns].cpu().numpy()
        return (G + G.T) / (2 * max(1, images))


def second_moments(
    model: nn.Module,
    chunks: Mapping[str, Iterable[Chunk]],  # by name of the layer
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
) -> dict[str, dict[Chunk, Reals]]:
    """G of every chunk, over all calibration images."""
    layers = {name: model.get_submodule(name) for name in chunks}
    moments = {
        name: [ChunkMoments(layers[name], chunk) for chunk in sorted(set(of_layer))]
        for name, of_layer in chunks.items()
    }

    def add(name: str, inputs: Tensor) -> None:
        for each in moments[name]:
            each.add(inputs)

    count = 0
    with evaluating(model), watching(layers, add):
        for images, _ in progress("inputs of the layers", batches):
            model(placed(images, device))
            count += len(images)
    return {name: {m.chunk: m.matrix(count) for m in each} for name, each in moments.items()}


# -- solutions -------------------------------------------------------------------------------------


@dataclass
class SubproblemRecord:
    """What is known about one subproblem. Errors are squared, in the units of `signal`."""

    unknowns: int
    signal: float
    errors: dict[str, float]  # of each heuristic
    error: float  # of the best known solution
    lower: float = 0.0  # proven: nothing has less
    relaxation: float | None = None  # the certified bound of the semidefinite relaxation
    finished: bool = False  # whether the search has covered everything
    nodes: int = 0
    seconds: float = 0.0  # of the search
    ridge: float = 0.0  # added to G, × its diagonal (pruning_bounds.py)
    solution: list[float] = field(default_factory=list)  # codes, or weights

    @classmethod
    def of_heuristics(
        cls,
        problem: QuantisationProblem | PruningProblem,
        signal: float,
        heuristics: Mapping[str, Callable[[Any], Reals]],
    ) -> tuple[SubproblemRecord, list[Reals]]:
        """The errors of all heuristics with the best of their solutions; and all of these."""
        solutions = {name: solve(problem) for name, solve in heuristics.items()}
        errors = {name: problem.error(solution) for name, solution in solutions.items()}
        best = min(errors, key=errors.__getitem__)
        codes = solutions[best].tolist()
        record = cls(len(codes), signal, errors, errors[best], solution=codes)
        return record, list(solutions.values())

    def improve(self, error: float, solution: Reals, lower: float = 0.0) -> None:
        """Take a solution if it is better, and a proven bound.

        Raises ArithmeticError if a solution contradicts the bound.
        """
        if error < self.error:
            self.error, self.solution = error, solution.tolist()
        if lower > self.error * (1 + PROVEN) + ROUNDING * self.signal:
            raise ArithmeticError(f"a bound of {lower!r} is above an error of {self.error!r}")
        self.lower = min(max(self.lower, lower), self.error)

    def add_relaxation(self, problem: Any, lower: float, heuristic: str, solution: Reals) -> None:
        """Take a relaxation's bound, and the solution that a heuristic derived from it."""
        self.errors[heuristic], self.relaxation = problem.error(solution), lower
        self.improve(self.errors[heuristic], solution, lower)

    def add_search(self, result: ProvenSolution) -> None:
        self.improve(result.error, result.solution, result.lower)
        self.finished, self.nodes, self.seconds = result.finished, result.nodes, result.seconds

    def as_json(self) -> dict[str, object]:
        """With `proven`: whether the best solution is proven to be optimal."""
        return asdict(self) | {"proven": self.lower >= self.error * (1 - PROVEN)}


def quantised(
    G: Reals,  # (n, n)
    w: Reals,  # (n,)
    step: float,
    bits: int,
    balanced: bool,
    method: str,  # of METHODS
    limits: SearchLimits,
    generator: np.random.Generator,
) -> SubproblemRecord:
    """Every quantiser on one subproblem."""
    codes = integer_codes(bits, balanced)
    problem = QuantisationProblem.of(G, w, step, int(codes[0]), int(codes[-1]))
    record, solutions = SubproblemRecord.of_heuristics(problem, float(w @ G @ w), QUANTISERS)
    best = quantisation_bounds.descend(problem, np.stack(solutions))
    record.improve(problem.error(best), best)
    if method != "exact":
        relaxation = quantisation_bounds.relax_codes(problem)
        drawn = quantisation_bounds.randomised_rounding(problem, relaxation, SAMPLES, generator)
        record.add_relaxation(problem, relaxation.lower, "randomised_rounding", drawn)
    if method != "sdp":
        record.add_search(closest(problem, np.array(record.solution), limits))
    return record


def pruned(G: Reals, w: Reals, bits: int, method: str, limits: SearchLimits) -> SubproblemRecord:
    """Every pruner on one subproblem, at the size of `bits` bits a weight."""
    problem = PruningProblem.of(G, w, sparsity_of(bits))
    record, _ = SubproblemRecord.of_heuristics(problem, float(w @ problem.G @ w), PRUNERS)
    record.ridge = problem.ridge
    if method != "exact":
        relaxation = pruning_bounds.relax_subset(problem)
        rounded = problem.refitted(problem.largest(relaxation.share))
        record.add_relaxation(problem, relaxation.lower, "relaxation_rounded", rounded)
    if method != "sdp":
        record.add_search(pruning_bounds.best_subset(problem, np.array(record.solution), limits))
    return record
