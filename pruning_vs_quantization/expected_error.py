"""The expected squared error of pruning and of quantising a number with a known density.

Kuzmin et al. (arXiv 2307.02973), section 3. For an even density p with threshold and grid

    pruning       magnitudes below t become 0, where P(|x| ≤ t) = sparsity:
                  E = ∫_{−t}^{t} x² p(x) dx

    quantisation  x → Δ·c for the nearest c of the integers c₀ … c₁ (`codes`):
                  E(Δ) = Σ_c ∫ (x − Δc)² p(x) dx over [Δ(c−½), Δ(c+½)]                 rounding
                       + ∫_{−∞}^{Δ(c₀−½)} (x − Δc₀)² p + ∫_{Δ(c₁+½)}^{∞} (x − Δc₁)² p  clipping

both in closed form by partial moments (`distributions.py`).

The best step. With s = 1/Δ, and A = E[c·x] and B = E[c²] for the code c that x is rounded to at s,
the error is E(Δ) = E[x²] − φ(s)/s² with

    φ(s) = 2sA − B = E[max_c (2 s c x − c²)]            convex in s: a mean of maxima of lines

so that on an interval [a, b] of s the chord of φ bounds φ from above and E(Δ) from below:

    φ(s) ≤ α + βs,      E ≥ E[x²] − max over [a, b] of (α + βs)/s²      the maximum: ends, or −2α/β

Branch and bound on intervals, all of a round at once, therefore finds the least error that any step
has, to a relative TOLERANCE, with proof; no unimodality is asked for (a bounded density has many
minima). What A and B say at a point is also where to go from it: with the codes held, the best
step is A/B, and repeating that ends in a minimum. It starts from 1/(2·reach), below which all is
rounded to zero, and ends where E ≥ E[x²] − 2·max|c|·E|x|/s exceeds what has been found. Nothing
here needs a density: a tensor's weights do as well, and `tensor_sqnr.py` uses it for them.

Codes. A symmetric b-bit grid has a level at 0 and the same step on both sides. With all 2^b codes,
−2^(b−1) … 2^(b−1) − 1, one side has a level more; the balanced grid leaves that one out and has
2^b − 1. At 2 bits that is −2 −1 0 1 against −1 0 1: for a Gaussian 8.26 against 7.21 dB. (Four
levels without a zero would give 9.25 dB and are no grid that hardware uses.)

Equal size: b bits against 16-bit weights of sparsity 1 − b/16 (`sparsity_of`). SQNR is
10·log₁₀(E[x²] / E) in dB.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pruning_vs_quantization.distributions import Density, Distribution, Reals, StudentT
from pruning_vs_quantization.plots import study_package

DENSE_BITS = 16  # of a weight that was not pruned
TOLERANCE = 1e-7  # of the least error, relative
RESOLUTION = 1e-14  # of E[x²]: what sums in float64 can tell apart
NARROWEST = 1e-12  # interval, relative: ends that float64 hardly tells apart
FIRST_INTERVALS = 64


def sparsity_of(bits: float) -> float:
    """The sparsity at which 16-bit weights take as much room as dense ones of `bits` bits.

    >>> [sparsity_of(bits) for bits in (8, 4, 2)]
    [0.5, 0.75, 0.875]
    """
    return 1 - bits / DENSE_BITS


def sparsity_percent(bits: float) -> str:
    """The same for a reader.

    >>> sparsity_percent(2)
    '87.5 %'
    """
    return f"{100 * sparsity_of(bits):g} %"


def integer_codes(bits: int, balanced: bool = False) -> Reals:  # (levels,), ascending
    """The codes of a symmetric grid: all 2^bits, or without the lowest one.

    >>> integer_codes(2), integer_codes(2, balanced=True)
    (array([-2., -1.,  0.,  1.]), array([-1.,  0.,  1.]))
    """
    highest = 2 ** (bits - 1)
    return np.arange(-highest + balanced, highest, dtype=np.float64)


def sqnr_db(power: float, error: float) -> float:
    """10·log₁₀(power / error); infinite without error, NaN where there is neither."""
    if error == 0:
        return math.inf if power > 0 else math.nan
    return 10 * math.log10(power / error) if power > 0 else -math.inf


@dataclass(frozen=True)
class Quantised:
    """The expected squared error of a grid, in its two parts."""

    step: float
    rounding: float
    clipping: float

    @property
    def error(self) -> float:
        return self.rounding + self.clipping


def _edges(
    steps: Reals,  # (n, 1)
    codes: Reals,  # (levels,)
) -> Reals:  # (n, levels + 1): the ends of the cells
    return steps * np.concatenate([[-np.inf], codes[1:] - 0.5, [np.inf]])


def quantisation_error(
    distribution: Distribution,
    step: float,  # > 0
    codes: Reals,  # (levels,), ascending by 1
) -> Quantised:
    """The expected squared error of rounding to the nearest of step·codes."""
    inner = step * np.append(codes - 0.5, codes[-1] + 0.5)

    def errors(levels: Reals, ends: Reals) -> float:
        """Σ ∫ (x − level)² p(x) dx between neighbouring ends."""
        mass, mean, power = (np.diff(distribution.primitive(order, ends)) for order in (0, 1, 2))
        return float((power - 2 * levels * mean + levels**2 * mass).sum())

    below = errors(step * codes[:1], np.array([-np.inf, inner[0]]))
    above = errors(step * codes[-1:], np.array([inner[-1], np.inf]))
    return Quantised(step, errors(step * codes, inner), below + above)


def code_sums(
    distribution: Distribution,
    inverse_steps: Reals,  # (n,)
    codes: Reals,  # (levels,)
) -> tuple[Reals, Reals]:  # (n,) each
    """A = E[c·x] and B = E[c²] over the codes c that x is rounded to."""
    edges = _edges(1 / inverse_steps[:, None], codes)
    mass, mean = (np.diff(distribution.primitive(order, edges)) for order in (0, 1))
    return mean @ codes, mass @ codes**2


def _chord_bounds(
    points: Reals,  # (n, 2): the ends a, b of intervals of s
    phi: Reals,  # (n, 2): φ(a), φ(b)
) -> Reals:  # (n,): upper bounds of φ(s)/s² on [a, b]
    slope = (phi[:, 1] - phi[:, 0]) / (points[:, 1] - points[:, 0])
    intercept = phi[:, 0] - slope * points[:, 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        peak = np.clip(np.nan_to_num(-2 * intercept / slope), points[:, 0], points[:, 1])
    return np.maximum((phi / points**2).max(1), (intercept + slope * peak) / peak**2)


def best_step(distribution: Distribution, codes: Reals) -> float:
    """The step of least expected squared error, proven as in the module docstring.

    Raises ValueError for a distribution that is nothing but zeros.
    """
    power, reach = distribution.moment(2), distribution.reach
    if not power > 0:
        raise ValueError("no step fits: all values are zero")
    farthest = 2 * float(abs(codes).max()) * distribution.moment(1)
    found = _Best(power)

    def phi(points: Reals) -> Reals:
        a, b = code_sums(distribution, points, codes)
        found.offer(a, b)
        return 2 * points * a - b

    ends = np.geomspace(0.5 / reach, 2 * max(farthest / power, 0.5 / reach), FIRST_INTERVALS + 1)
    phi(ends)
    last = farthest / max(power - found.error, RESOLUTION * power)  # beyond, no step is better
    ends = np.geomspace(ends[0], max(last, 2 * ends[0]), FIRST_INTERVALS + 1)
    values = phi(ends)
    points, values = _pairs(ends), _pairs(values)
    while True:
        wanted = found.error * (1 - TOLERANCE) - RESOLUTION * power
        undecided = power - _chord_bounds(points, values) < wanted
        undecided &= points[:, 1] > points[:, 0] * (1 + NARROWEST)
        if not undecided.any():
            return _settled(distribution, codes, found.step)
        points, values = points[undecided], values[undecided]
        middle = np.sqrt(points[:, 0] * points[:, 1])
        points, values = _halves(points, middle), _halves(values, phi(middle))


class _Best:
    """The best step so far."""

    def __init__(self, power: float) -> None:
        self.power, self.error, self.step = power, power, math.nan

    def offer(self, a: Reals, b: Reals) -> None:
        """Codes with the sums A and B allow the error E[x²] − A²/B, at the step A/B."""
        errors = self.power - np.divide(a**2, b, out=np.zeros_like(a), where=(b > 0) & (a > 0))
        best = int(errors.argmin())
        if errors[best] < self.error:
            self.error, self.step = max(float(errors[best]), 0.0), float(a[best] / b[best])


def _pairs(x: Reals) -> Reals:  # (n + 1,) → (n, 2)
    return np.stack([x[:-1], x[1:]], axis=1)


def _halves(pairs: Reals, middle: Reals) -> Reals:  # (n, 2), (n,) → (2n, 2)
    return np.concatenate([np.stack([pairs[:, 0], middle], 1), np.stack([middle, pairs[:, 1]], 1)])


def _settled(distribution: Distribution, codes: Reals, step: float) -> float:
    """The minimum that a step leads to when codes and step are fitted to each other in turn."""
    for _ in range(100):
        a, b = code_sums(distribution, np.array([1 / step]), codes)
        previous, step = step, float(a[0] / b[0])
        if abs(step - previous) <= 1e-15 * step:
            break
    return step


def best_quantisation(distribution: Distribution, codes: Reals) -> Quantised:
    """The grid of least expected squared error with these codes, whatever its step."""
    return quantisation_error(distribution, best_step(distribution, codes), codes)


def pruning_error(density: Density, sparsity: float) -> float:
    """The expected squared error of setting a share of `sparsity`, the smallest, to zero."""
    threshold = density.magnitude_quantile(sparsity)
    return 2 * float(density.half_moment(2, np.float64(threshold)))


def quantisation_sqnr_db(density: Density, bits: int, balanced: bool = False) -> float:
    """SQNR of the best symmetric grid of `bits` bits, in dB."""
    grid = best_quantisation(density, integer_codes(bits, balanced))
    return sqnr_db(density.moment(2), grid.error)


def pruning_sqnr_db(density: Density, bits: int) -> float:
    """SQNR of magnitude pruning to the size of `bits` bits, in dB."""
    return sqnr_db(density.moment(2), pruning_error(density, sparsity_of(bits)))


def advantage_db(density: Density, bits: int, balanced: bool = False) -> float:
    """By how much quantisation beats pruning at equal size, in dB."""
    return quantisation_sqnr_db(density, bits, balanced) - pruning_sqnr_db(density, bits)


def crossing(
    bits: int,
    light: float,  # degrees of freedom at which quantisation wins
    heavy: float,  # fewer, at which pruning wins
    tail: float,  # share of the density that is cut off
    balanced: bool = False,
) -> StudentT:
    """The truncated Student-t on which pruning does as well as quantisation."""

    def advantage(log_degrees: float) -> float:
        return advantage_db(StudentT.with_tail(math.exp(log_degrees), tail), bits, balanced)

    find = study_package("scipy.optimize").brentq
    return StudentT.with_tail(
        math.exp(find(advantage, math.log(heavy), math.log(light), xtol=1e-6)), tail
    )
