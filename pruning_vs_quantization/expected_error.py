"""The expected squared error of pruning and of quantising numbers with a known distribution.

Kuzmin et al. (arXiv 2307.02973), section 3. For an even density p, p(−x) = p(x), a threshold t and
a grid of step Δ

    pruning       magnitudes below t become 0, where P(|x| ≤ t) = sparsity:
                  E = ∫_{−t}^{t} x² p(x) dx

    quantisation  x → Δ·c for the nearest c of the integers c₀ … c₁ (`codes`):
                  E(Δ) = Σ_c ∫ (x − Δc)² p(x) dx over [Δ(c−½), Δ(c+½)]                 rounding
                       + ∫_{−∞}^{Δ(c₀−½)} (x − Δc₀)² p + ∫_{Δ(c₁+½)}^{∞} (x − Δc₁)² p  clipping

**Densities.** Both errors follow in closed form from the half moments of p, for x ≥ 0

    h_k(x) = ∫₀ˣ tᵏ p(t) dt                                                       k = 0, 1, 2, 4

    density               p(t) ∝                      h_k(x)
    Gaussian              exp(−t²/2)                  2^(k/2−1) Γ((k+1)/2) P((k+1)/2, x²/2) / √π
    Laplace               exp(−|t|)                   Γ(k+1) P(k+1, x) / 2
    uniform               1 on [−1, 1]                x^(k+1) / (2k+2)
    Student-t, ν degrees  (1 + t²/ν)^(−(ν+1)/2)       c x^(k+1)/(k+1) · ₂F₁((ν+1)/2, (k+1)/2;
    truncated at ±r       on [−r, r]                                        (k+3)/2; −x²/ν)

where P is the regularised lower incomplete gamma function and ₂F₁ Gauss's hypergeometric function.
By symmetry ∫ₐᵇ tᵏ p = H_k(b) − H_k(a) with the primitive H_k(x) = sgn(x)^(k+1) h_k(|x|). The scale
is irrelevant: signal-to-noise ratios and kurtosis do not depend on it. Kurtosis means *excess*
kurtosis, E[x⁴]/E[x²]² − 3, which is 0 for a Gaussian.

Without truncation a Student-t has no variance for ν ≤ 2 and no kurtosis for ν ≤ 4. Here ν sets how
heavy the tails are, and r cuts off a fraction `tail` of the untruncated density, both sides
together. TAIL_SHARE = 0.65 % is a fit, not a derivation: it puts the points where pruning starts to
win at an excess kurtosis of 6.1, 11.1 and 17.9 for 2, 3 and 4 bits, where the paper has them "near
6, 11, 18"; from 0.5 % to 0.8 % all three are within 1 of that. Other readings miss it: ν = 2 with r
varied gives 5.9, 13.0, 25.4, a cut at 10 standard deviations 9.8, 14.7, 20.7.

**Tensors.** Weights rounded to FP16 are a histogram: there are 63,487 different finite numbers. One
pass over the weights, on their device, counts them; everything else is computed from the counts,
however large the tensor. Sums of values are exact in float64 up to 5·10⁸ in magnitude, since all
FP16 numbers are multiples of 2⁻²⁴.

**The best step.** With s = 1/Δ, and A = E[c·x] and B = E[c²] for the code c that x is rounded to at
s, the error is E(Δ) = E[x²] − φ(s)/s² with

    φ(s) = 2sA − B = E[max_c (2 s c x − c²)]            convex in s: a mean of maxima of lines

so that on an interval [a, b] of s the chord of φ bounds φ from above and E(Δ) from below:

    φ(s) ≤ α + βs,      E ≥ E[x²] − max over [a, b] of (α + βs)/s²      the maximum: ends, or −2α/β

Branch and bound over intervals, all of a round at once, therefore finds the least error of any
step, to a relative TOLERANCE and with proof; unimodality is not assumed (a bounded density has many
minima). A and B at a point also say where to go from it: with the codes fixed, the best step is
A/B, and iterating that ends in a minimum. The search starts from s = 1/(2·reach), below which
everything is rounded to zero, and ends where E ≥ E[x²] − 2·max|c|·E|x|/s exceeds the least error
so far. It works for densities and for the histograms of tensors alike.

**Codes.** A symmetric b-bit grid has a level at 0 and the same step on both sides. With all 2^b
codes, −2^(b−1) … 2^(b−1) − 1, one side has one level more; the balanced grid omits that level and
has 2^b − 1. At 2 bits that is −2 −1 0 1 against −1 0 1: for a Gaussian 8.26 against 7.21 dB. (Four
levels without a zero would give 9.25 dB, but no hardware uses such a grid.)

Equal size means b bits against 16-bit weights of sparsity 1 − b/16 (`sparsity_of`). SQNR is
10·log₁₀(E[x²] / E) in dB.

    symbol                                          variable  shape            dtype
    distinct FP16 weights of a tensor, ascending    values    (m,), m ≤ 63487  float64
    how often each occurs                           counts    (m,)             int64
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from pruning_vs_quantization.plots import study_package
from pruning_vs_quantization.proof import Integers, Reals

TAIL_SHARE = 0.0065
NEGLIGIBLE = 1e-13  # an unbounded density reaches to where less probability than this lies beyond
DENSE_BITS = 16  # of a weight that was not pruned
TOLERANCE = 1e-7  # of the least error, relative
RESOLUTION = 1e-14  # of E[x²]: what sums in float64 resolve
NARROWEST = 1e-12  # relative width of an interval whose ends float64 hardly distinguishes
FIRST_INTERVALS = 64
WEIGHTS_AT_ONCE = 1 << 24  # that are counted at a time


class Density(ABC):
    """An even density of any scale."""

    end: float = math.inf  # the density is 0 beyond ±end

    @abstractmethod
    def half_moment(
        self,
        order: int,
        x: Reals,  # ≥ 0, any shape; infinity allowed
    ) -> Reals:  # shape of x
        """∫₀ˣ t^order p(t) dt."""

    @abstractmethod
    def sample(self, count: int, generator: np.random.Generator) -> Reals:  # (count,)
        """Independent draws, or the medians of `count` equally probable strata.

        Strata are for unbounded densities: at 8 bits a sixth of a Laplace density's error comes
        from the 700 numbers in 10⁷ that are clipped, and independent draws would leave ±0.07 dB.
        """

    def primitive(
        self,
        order: int,  # 0, 1, 2
        x: ArrayLike,  # any shape; ±infinity allowed
    ) -> Reals:  # shape of x
        """∫ t^order p(t) dt up to x, plus a constant: only differences are meaningful."""
        x = np.asarray(x, dtype=np.float64)
        return np.sign(x) ** (order + 1) * self.half_moment(order, np.minimum(abs(x), self.end))

    def moment(self, order: int) -> float:
        """E|x|^order."""
        return 2 * float(self.half_moment(order, np.float64(self.end)))

    @property
    def kurtosis(self) -> float:
        """Excess kurtosis."""
        return self.moment(4) / self.moment(2) ** 2 - 3

    @property
    def reach(self) -> float:
        """The largest magnitude that occurs."""
        return self.end if math.isfinite(self.end) else self.magnitude_quantile(1 - NEGLIGIBLE)

    def magnitude_quantile(self, share: float) -> float:
        """The t for which P(|x| ≤ t) = share, for a share in [0, 1)."""
        if share <= 0:
            return 0.0

        def excess(t: float) -> float:
            return 2 * float(self.half_moment(0, np.float64(t))) - share

        high = min(1.0, self.end)
        while excess(high) < 0 and high < self.end:
            high = min(2 * high, self.end)
        brentq = study_package("scipy.optimize").brentq
        return brentq(excess, 0, high, xtol=1e-15, rtol=1e-14)


@dataclass(frozen=True)
class Gaussian(Density):
    """Standard normal."""

    def half_moment(self, order: int, x: Reals) -> Reals:
        special, shape = study_package("scipy.special"), (order + 1) / 2
        scale = 2 ** (order / 2 - 1) * math.gamma(shape) / math.sqrt(math.pi)
        return scale * special.gammainc(shape, np.square(x) / 2)

    def sample(self, count: int, generator: np.random.Generator) -> Reals:
        return study_package("scipy.special").ndtri((np.arange(count) + 0.5) / count)


@dataclass(frozen=True)
class Laplace(Density):
    """exp(−|x|) / 2."""

    def half_moment(self, order: int, x: Reals) -> Reals:
        special = study_package("scipy.special")
        return math.gamma(order + 1) / 2 * special.gammainc(order + 1, x)

    def sample(self, count: int, generator: np.random.Generator) -> Reals:
        shares = (np.arange(count) + 0.5) / count - 0.5
        return -np.sign(shares) * np.log1p(-2 * abs(shares))


@dataclass(frozen=True)
class Uniform(Density):
    """1/2 on [−1, 1]."""

    end: float = 1.0

    def half_moment(self, order: int, x: Reals) -> Reals:
        return np.minimum(x, 1.0) ** (order + 1) / (2 * order + 2)

    def sample(self, count: int, generator: np.random.Generator) -> Reals:
        return generator.uniform(-1, 1, count)


@dataclass(frozen=True)
class StudentT(Density):
    """Student-t with `degrees` > 0 degrees of freedom, scale 1, cut off at ±`end` (finite)."""

    degrees: float
    end: float

    @classmethod
    def with_tail(cls, degrees: float, tail: float = TAIL_SHARE) -> StudentT:
        """Cut off where a fraction `tail` of the untruncated density lies beyond."""
        stats = study_package("scipy.stats")
        return cls(degrees, float(stats.t.isf(tail / 2, degrees)))

    def _unnormalised(self, order: int, x: Reals) -> Reals:
        hypergeometric = study_package("scipy.special").hyp2f1
        a, b = (self.degrees + 1) / 2, (order + 1) / 2
        return x ** (order + 1) / (order + 1) * hypergeometric(a, b, b + 1, -(x**2) / self.degrees)

    def half_moment(self, order: int, x: Reals) -> Reals:
        mass = 2 * self._unnormalised(0, np.float64(self.end))
        return self._unnormalised(order, np.minimum(x, self.end)) / mass

    def sample(self, count: int, generator: np.random.Generator) -> Reals:
        """By rejection of draws beyond the end."""
        values = np.empty(0)
        while len(values) < count:
            drawn = generator.standard_t(self.degrees, count)
            values = np.concatenate([values, drawn[abs(drawn) <= self.end]])
        return values[:count]


class Histogram:
    """The weights of a tensor, rounded to FP16, and how often each occurs."""

    def __init__(self, values: Reals, counts: Integers) -> None:
        self.values, self.counts = values, counts  # (m,) ascending and distinct; (m,)
        self.size = int(counts.sum())
        sums = (np.cumsum(counts * values**order) for order in (0, 1, 2))
        self._sums = [np.concatenate([[0.0], each]) for each in sums]

    @classmethod
    def of(
        cls,
        weight: Tensor,  # any shape, dtype and device
    ) -> Histogram:
        """Raises ValueError for a tensor that is empty or, rounded to FP16, not finite."""
        if weight.numel() == 0:
            raise ValueError("has no weights")
        patterns = torch.zeros(1 << 16, dtype=torch.int64, device=weight.device)
        for piece in weight.detach().reshape(-1).split(WEIGHTS_AT_ONCE):
            codes = piece.to(torch.float16).view(torch.int16).to(torch.int64) & 0xFFFF
            patterns += torch.bincount(codes, minlength=1 << 16)
        counts = patterns.cpu().numpy()
        present = np.flatnonzero(counts)
        values = present.astype(np.uint16).view(np.float16).astype(np.float64)
        if not np.isfinite(values).all():
            raise ValueError("has weights that are not finite in FP16")
        values, where = np.unique(values, return_inverse=True)  # +0 and −0 are one
        return cls(values, np.bincount(where, weights=counts[present]).astype(np.int64))

    def primitive(self, order: int, x: ArrayLike) -> Reals:
        return self._sums[order][np.searchsorted(self.values, x, side="right")] / self.size

    def moment(self, order: int) -> float:
        return float(self.counts @ abs(self.values) ** order) / self.size

    @property
    def reach(self) -> float:
        return float(abs(self.values).max())

    @property
    def kurtosis(self) -> float:
        """Excess, biased: Σ(w − w̄)⁴/n / (Σ(w − w̄)²/n)² − 3; NaN for a constant tensor."""
        deviations = self.values - float(self.counts @ self.values) / self.size
        variance, fourth = (float(self.counts @ deviations**k) / self.size for k in (2, 4))
        return fourth / variance**2 - 3 if variance > 0 else math.nan

    def pruned_error(self, keep: int) -> float:
        """The mean squared error of keeping only the `keep` largest magnitudes."""
        order = np.argsort(abs(self.values), kind="stable")
        counts = self.counts[order]
        pruned = np.clip(self.size - keep - np.cumsum(counts) + counts, 0, counts)
        return float(pruned @ self.values[order] ** 2) / self.size


# What the expected error of a grid is computed from: both have `primitive`, `moment` and `reach`.
Distribution = Density | Histogram

# -- sizes and errors ------------------------------------------------------------------------------


def sparsity_of(bits: float) -> float:
    """The sparsity at which 16-bit weights take as much room as dense ones of `bits` bits.

    >>> [sparsity_of(bits) for bits in (8, 4, 2)]
    [0.5, 0.75, 0.875]
    """
    return 1 - bits / DENSE_BITS


def sparsity_percent(bits: float) -> str:
    """The same, for display.

    >>> sparsity_percent(2)
    '87.5 %'
    """
    return f"{100 * sparsity_of(bits):g} %"


def size_text(bits: int) -> str:
    """What is compared at a size.

    >>> size_text(4)
    'INT4 against 75 %'
    """
    return f"INT{bits} against {sparsity_percent(bits)}"


def integer_codes(bits: int, balanced: bool = False) -> Reals:  # (levels,), ascending
    """The codes of a symmetric grid: all 2^bits, or all but the lowest one.

    >>> integer_codes(2), integer_codes(2, balanced=True)
    (array([-2., -1.,  0.,  1.]), array([-1.,  0.,  1.]))
    """
    highest = 2 ** (bits - 1)
    return np.arange(-highest + balanced, highest, dtype=np.float64)


def round_to_grid(values: Reals, step: float, codes: Reals) -> Reals:
    """Every value rounded to the nearest of step·codes."""
    return step * np.clip(np.rint(values / step), codes[0], codes[-1])


def sqnr_db(power: float, error: float) -> float:
    """10·log₁₀(power / error); infinite without error, NaN if both are zero."""
    if error == 0:
        return math.inf if power > 0 else math.nan
    return 10 * math.log10(power / error) if power > 0 else -math.inf


@dataclass(frozen=True)
class GridError:
    """The expected squared error of a grid, in its two parts."""

    step: float
    rounding: float
    clipping: float

    @property
    def error(self) -> float:
        return self.rounding + self.clipping


def quantisation_error(
    distribution: Distribution,
    step: float,  # > 0
    codes: Reals,  # (levels,), ascending by 1
) -> GridError:
    """The expected squared error of rounding to the nearest of step·codes."""
    inner = step * np.append(codes - 0.5, codes[-1] + 0.5)

    def errors(levels: Reals, ends: Reals) -> float:  # Σ ∫ (x − level)² p(x) dx between ends
        mass, mean, power = (np.diff(distribution.primitive(order, ends)) for order in (0, 1, 2))
        return float((power - 2 * levels * mean + levels**2 * mass).sum())

    below = errors(step * codes[:1], np.array([-np.inf, inner[0]]))
    above = errors(step * codes[-1:], np.array([inner[-1], np.inf]))
    return GridError(step, errors(step * codes, inner), below + above)


# -- the best step ---------------------------------------------------------------------------------


def code_sums(
    distribution: Distribution,
    inverse_steps: Reals,  # (n,)
    codes: Reals,  # (levels,)
) -> tuple[Reals, Reals]:  # (n,) each
    """A = E[c·x] and B = E[c²] over the codes c that x is rounded to."""
    edges = 1 / inverse_steps[:, None] * np.concatenate([[-np.inf], codes[1:] - 0.5, [np.inf]])
    mass, mean = (np.diff(distribution.primitive(order, edges)) for order in (0, 1))
    return mean @ codes, mass @ codes**2


def chord_bounds(
    left: Reals,  # (n, 2): s and φ(s) at the left ends of intervals
    right: Reals,  # (n, 2): at the right ends
) -> Reals:  # (n,): upper bounds of φ(s)/s² on the intervals
    """The maximum of (α + βs)/s² over each interval."""
    slope = (right[:, 1] - left[:, 1]) / (right[:, 0] - left[:, 0])
    intercept = left[:, 1] - slope * left[:, 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        peak = np.clip(np.nan_to_num(-2 * intercept / slope), left[:, 0], right[:, 0])
    ends = np.maximum(left[:, 1] / left[:, 0] ** 2, right[:, 1] / right[:, 0] ** 2)
    return np.maximum(ends, (intercept + slope * peak) / peak**2)


def best_step(distribution: Distribution, codes: Reals) -> float:
    """The step of least expected squared error, proven as in the module docstring.

    Raises ValueError for a distribution that consists of zeros only.
    """
    power, reach = distribution.moment(2), distribution.reach
    if not power > 0:
        raise ValueError("no step fits: all values are zero")
    least, step = power, math.nan  # error and step of the best grid so far

    def with_phi(s: Reals) -> Reals:  # (n,) → (n, 2): s and φ(s)
        """Also notes the errors E[x²] − A²/B, at steps A/B, that the codes at s allow."""
        nonlocal least, step
        a, b = code_sums(distribution, s, codes)
        errors = power - np.divide(a**2, b, out=np.zeros_like(a), where=(b > 0) & (a > 0))
        best = int(errors.argmin())
        if errors[best] < least:
            least, step = max(float(errors[best]), 0.0), float(a[best] / b[best])
        return np.stack([s, 2 * s * a - b], 1)

    first, farthest = 0.5 / reach, 2 * float(abs(codes).max()) * distribution.moment(1)
    with_phi(np.geomspace(first, 2 * max(farthest / power, first), FIRST_INTERVALS + 1))
    last = farthest / max(power - least, RESOLUTION * power)  # beyond, no step is better
    ends = with_phi(np.geomspace(first, max(last, 2 * first), FIRST_INTERVALS + 1))
    left, right = ends[:-1], ends[1:]
    while True:
        undecided = power - chord_bounds(left, right) < least * (1 - TOLERANCE) - RESOLUTION * power
        undecided &= right[:, 0] > left[:, 0] * (1 + NARROWEST)
        if not undecided.any():
            break
        left, right = left[undecided], right[undecided]
        middle = with_phi(np.sqrt(left[:, 0] * right[:, 0]))
        left, right = np.concatenate([left, middle]), np.concatenate([middle, right])
    for _ in range(100):  # fit codes and step to each other in turn, down to the minimum
        a, b = code_sums(distribution, np.array([1 / step]), codes)
        previous, step = step, float(a[0] / b[0])
        if abs(step - previous) <= 1e-15 * step:
            break
    return step


def best_quantisation(distribution: Distribution, codes: Reals) -> GridError:
    """The grid of least expected squared error with these codes, whatever its step."""
    return quantisation_error(distribution, best_step(distribution, codes), codes)


# -- pruning against quantisation ------------------------------------------------------------------


def pruning_error(density: Density, sparsity: float) -> float:
    """The expected squared error of setting the smallest magnitudes to zero."""
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


def break_even(
    bits: int,
    light: float,  # degrees of freedom at which quantisation wins
    heavy: float,  # fewer, at which pruning wins
    tail: float,  # fraction of the density that is cut off
    balanced: bool = False,
) -> StudentT:
    """The truncated Student-t on which pruning does as well as quantisation."""

    def density(log_degrees: float) -> StudentT:
        return StudentT.with_tail(math.exp(log_degrees), tail)

    def advantage(log_degrees: float) -> float:
        return advantage_db(density(log_degrees), bits, balanced)

    brentq = study_package("scipy.optimize").brentq
    return density(brentq(advantage, math.log(heavy), math.log(light), xtol=1e-6))
