"""What pruning and quantising lose on the weights of one tensor, at equal size.

Kuzmin et al. (arXiv 2307.02973), section 3: b bits a weight against 16-bit weights of which a share
of b/16 is kept. The reference is the tensor rounded to FP16: that is what a pruned tensor stores,
so the weights it keeps have no error, and the rounding to FP16 itself, which both methods start
from, counts for neither. With w of n weights and ŵ what has become of them

    SQNR = 10·log₁₀(Σw² / Σ(w − ŵ)²) dB       mse = Σ(w − ŵ)² / n

    quantised   ŵ = Δ·clip(round(w/Δ), c₀, c₁) with one Δ for the tensor, the one of least squared
                error (`expected_error.best_step`: branch and bound, proven to 10⁻⁷)
    pruned      ŵ = the ⌊n·b/16⌋ largest magnitudes as they are, the others 0
    corrected   a share z of the quantised weights is 0, which a sparse format need not store
                either; what is left are (1 − z)·n weights of b bits, the size of (1 − z)·b/16 FP16
                weights per weight: ⌊n·(1 − z)·b/16⌋ magnitudes are kept. Where the zeros are costs
                both the same and is left out, as in the paper

    symbol    variable     shape         dtype
    values    distinct FP16 weights, ascending     (m,), m ≤ 63487     float64
    counts    how often each occurs                (m,)                int64

**A tensor in FP16 is a histogram**: there are 63,487 different finite numbers. One pass over the
weights, on their device, counts them; everything else, however large the tensor, is computed from
the counts. Sums of values are exact in float64 up to 5·10⁸ of them in size, for all FP16
numbers are multiples of 2⁻²⁴.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pruning_vs_quantization.distributions import Distribution, Reals
from pruning_vs_quantization.expected_error import DENSE_BITS, best_step, integer_codes, sqnr_db

PIECE = 1 << 24  # weights that are counted at a time
NO_ERROR = 1e-28  # of the weights' power: what float64 makes of an error of nothing


class Histogram(Distribution):
    """The weights of a tensor, rounded to FP16, and how often each occurs."""

    def __init__(self, values: Reals, counts: NDArray[np.int64]) -> None:
        self.values, self.counts = values, counts  # (m,) ascending and distinct; (m,)
        self.size = int(counts.sum())
        self._sums = [
            np.concatenate([[0.0], np.cumsum(counts * values**order)]) for order in (0, 1, 2)
        ]

    @classmethod
    def of(
        cls,
        weight: Tensor,  # any shape, dtype and device
    ) -> Histogram:
        """Raises ValueError for a tensor that is empty or, rounded to FP16, not finite."""
        if weight.numel() == 0:
            raise ValueError("has no weights")
        patterns = torch.zeros(1 << 16, dtype=torch.int64, device=weight.device)
        for piece in weight.detach().reshape(-1).split(PIECE):
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

    def pruned_error(self, kept: int) -> float:
        """The mean squared error of leaving the `kept` largest magnitudes and no others."""
        order = np.argsort(abs(self.values), kind="stable")
        lost = np.clip(
            self.size - kept - np.cumsum(self.counts[order]) + self.counts[order],
            0,
            self.counts[order],
        )
        return float(lost @ self.values[order] ** 2) / self.size


@dataclass(frozen=True)
class TensorFigures:
    """Errors of both methods at one bit width. SQNR in dB, infinite where there is no error."""

    sample_kurtosis: float  # excess, biased
    quant_sqnr: float
    quant_mse: float
    quant_sparsity: float  # share of zeros among the quantised weights
    pruning_sqnr: float
    pruning_mse: float
    pruning_sqnr_corrected: float
    pruning_mse_corrected: float

    def as_json(self) -> dict[str, float | str | None]:
        """Values by name; those that JSON cannot hold are None, and `reason` says why."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        reasons = [
            f"{name}: {_reason(value)}"
            for name, value in values.items()
            if not math.isfinite(value)
        ]
        record = {name: value if math.isfinite(value) else None for name, value in values.items()}
        return record | ({"reason": "; ".join(reasons)} if reasons else {})


def _reason(value: float) -> str:
    return "undefined, the weights are all the same" if math.isnan(value) else "infinite, no error"


def tensor_figures(histogram: Histogram, bits: int, balanced: bool = False) -> TensorFigures:
    """Both methods at the size of `bits` bits a weight."""
    values, counts, size = histogram.values, histogram.counts, histogram.size
    codes, power = integer_codes(bits, balanced), histogram.moment(2)
    quantised = np.zeros_like(values)
    if power > 0:
        step = best_step(histogram, codes)
        quantised = step * np.clip(np.rint(values / step), codes[0], codes[-1])
    zeros = int(counts[quantised == 0].sum())
    errors = (
        float(counts @ (values - quantised) ** 2) / size,
        histogram.pruned_error(size * bits // DENSE_BITS),
        histogram.pruned_error((size - zeros) * bits // DENSE_BITS),
    )
    errors = [error if error > NO_ERROR * power else 0.0 for error in errors]
    quant, pruning, corrected = ((sqnr_db(power, error), error) for error in errors)
    return TensorFigures(histogram.kurtosis, *quant, zeros / size, *pruning, *corrected)
