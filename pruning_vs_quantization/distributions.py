"""Symmetric densities, and the partial moments that expected errors are made of.

Section 3 of Kuzmin et al. (arXiv 2307.02973) compares pruning and quantisation on densities p that
are even, p(−x) = p(x). All that is needed of one are its half moments, in closed form, for x ≥ 0:

    h_k(x) = ∫₀ˣ tᵏ p(t) dt                                                       k = 0, 1, 2, 4

    density               p(t) ∝                      h_k(x)
    Gaussian              exp(−t²/2)                  2^(k/2−1) Γ((k+1)/2) P((k+1)/2, x²/2) / √π
    Laplace               exp(−|t|)                   Γ(k+1) P(k+1, x) / 2
    uniform               1 on [−1, 1]                x^(k+1) / (2k+2)
    Student-t, ν degrees  (1 + t²/ν)^(−(ν+1)/2)       c x^(k+1)/(k+1) · ₂F₁((ν+1)/2, (k+1)/2;
    truncated at ±r       on [−r, r]                                        (k+3)/2; −x²/ν)

P is the regularised lower incomplete gamma function, ₂F₁ Gauss's hypergeometric function. By
symmetry ∫ₐᵇ tᵏ p = H_k(b) − H_k(a) with the primitive H_k(x) = sgn(x)^(k+1) h_k(|x|). The scale is
of no consequence: signal-to-noise ratios and kurtosis do not depend on it. Kurtosis is the *excess*
E[x⁴]/E[x²]² − 3, which is 0 for a Gaussian.

Truncation. Without it a Student-t has no variance for ν ≤ 2 and no kurtosis for ν ≤ 4. Here the
heaviness of the tails is varied by ν, and r is where a share `tail` of the untruncated
density is cut off, both sides together. TAIL = 0.65 % is a fit, not a derivation: it puts the
points where pruning starts to win, with 2^b levels, at an excess kurtosis of 6.1, 11.1 and 17.9 for
2, 3 and 4 bits, where the paper has them "near 6, 11, 18"; from 0.5 % to 0.8 % all three are
within 1 of that. Other readings miss it: ν = 2 with r varied gives 5.9, 13.0, 25.4, a cut at
10 standard deviations 9.8, 14.7, 20.7, no truncation an infinite kurtosis at 3 and 4 bits.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pruning_vs_quantization.plots import study_package

TAIL = 0.0065
NEGLIGIBLE = 1e-13  # probability beyond what counts as the reach of an unbounded density

Reals = NDArray[np.float64]


class Distribution(ABC):
    """What the expected error of a grid is computed from: a density, or the weights of a tensor."""

    @abstractmethod
    def primitive(
        self,
        order: int,  # 0, 1, 2
        x: ArrayLike,  # any shape; ±infinity allowed
    ) -> Reals:  # shape of x
        """∫ t^order p(t) dt up to x, but for a constant: only differences mean anything."""

    @abstractmethod
    def moment(self, order: int) -> float:
        """E|x|^order."""

    @property
    @abstractmethod
    def reach(self) -> float:
        """The largest magnitude there is."""


class Density(Distribution):
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
        """Independent draws, or the medians of `count` equally probable strata."""

    def primitive(self, order: int, x: ArrayLike) -> Reals:
        x = np.asarray(x, dtype=np.float64)
        return np.sign(x) ** (order + 1) * self.half_moment(order, np.minimum(abs(x), self.end))

    def moment(self, order: int) -> float:
        return 2 * float(self.half_moment(order, np.float64(self.end)))

    @property
    def kurtosis(self) -> float:
        """Excess kurtosis."""
        return self.moment(4) / self.moment(2) ** 2 - 3

    @property
    def reach(self) -> float:
        """Where the density ends, or where no more than NEGLIGIBLE probability lies beyond."""
        return self.end if math.isfinite(self.end) else self.magnitude_quantile(1 - NEGLIGIBLE)

    def magnitude_quantile(self, share: float) -> float:
        """The t for which P(|x| ≤ t) = share, for a share in [0, 1)."""
        if share <= 0:
            return 0.0
        high = min(1.0, self.end)
        while 2 * self.half_moment(0, np.float64(high)) < share and high < self.end:
            high = min(2 * high, self.end)
        find = study_package("scipy.optimize").brentq
        return find(
            lambda t: 2 * float(self.half_moment(0, np.float64(t))) - share,
            0,
            high,
            xtol=1e-15,
            rtol=1e-14,
        )


def _strata(count: int) -> Reals:  # (count,), in (0, 1)
    """The middles of `count` equal parts of [0, 1].

    For unbounded densities. At 8 bits a sixth of a Laplace density's error is of the 700 numbers in
    10⁷ that are clipped: independent draws would leave ±0.07 dB.
    """
    return (np.arange(count) + 0.5) / count


@dataclass(frozen=True)
class Gaussian(Density):
    """Standard normal."""

    def half_moment(self, order: int, x: Reals) -> Reals:
        special, shape = study_package("scipy.special"), (order + 1) / 2
        scale = 2 ** (order / 2 - 1) * math.gamma(shape) / math.sqrt(math.pi)
        return scale * special.gammainc(shape, np.square(x) / 2)

    def sample(self, count: int, generator: np.random.Generator) -> Reals:
        return study_package("scipy.special").ndtri(_strata(count))


@dataclass(frozen=True)
class Laplace(Density):
    """exp(−|x|) / 2."""

    def half_moment(self, order: int, x: Reals) -> Reals:
        special = study_package("scipy.special")
        return math.gamma(order + 1) / 2 * special.gammainc(order + 1, x)

    def sample(self, count: int, generator: np.random.Generator) -> Reals:
        shares = _strata(count) - 0.5
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
    def with_tail(cls, degrees: float, tail: float = TAIL) -> StudentT:
        """Cut off where a share `tail` of the untruncated density lies beyond."""
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
        """By rejection of what lies beyond the end."""
        kept = np.empty(0)
        while len(kept) < count:
            drawn = generator.standard_t(self.degrees, count)
            kept = np.concatenate([kept, drawn[abs(drawn) <= self.end]])
        return kept[:count]
