"""What changes as training goes on: learning rates, and anything else that is annealed.

With t epochs done of T (a fraction within an epoch) and learning rate η at the start,

    cosine[:η_min]           η_min + (η − η_min)(1 + cos(π t/T)) / 2     η_min: 0.01 η by default
    multistep:E1,E2,…[:γ]    η γ^k, k of the epochs E1, E2, … are done   γ: 0.1 by default
    exponential:γ            η γ^⌊t⌋
    constant                 η

A schedule is a function of t alone and has no state: a run that goes on where it stopped needs none
to be restored. Step sizes with an optimiser of their own follow the same curve, as a share of their
own learning rate.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

COSINE_FLOOR, MULTISTEP_GAMMA = 0.01, 0.1
FORMS = "cosine, cosine:1e-4, multistep:10,15, multistep:10,15:0.1, exponential:0.9 or constant"


def cosine(start: float, end: float, done: float) -> float:
    """From `start` to `end` along half a cosine; `done` in [0, 1].

    >>> [round(cosine(4.0, 0.0, done), 3) for done in (0, 0.5, 1)]
    [4.0, 2.0, 0.0]
    """
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


@dataclass(frozen=True)
class LearningRateSchedule:
    """One of the forms in the module docstring."""

    kind: str
    value: float | None = None  # η_min of a cosine, γ of the others
    epochs: tuple[int, ...] = ()  # of multistep

    def share(
        self,
        learning_rate: float,  # η
        epochs_done: float,  # t
        max_epochs: int,  # T
    ) -> float:
        """The learning rate at t, over η."""
        if self.kind == "cosine":
            floor = COSINE_FLOOR if self.value is None else self.value / learning_rate
            return cosine(1.0, floor, epochs_done / max_epochs)
        if self.kind == "multistep":
            return self.value ** sum(epoch <= epochs_done for epoch in self.epochs)
        return self.value ** math.floor(epochs_done) if self.kind == "exponential" else 1.0


def learning_rate_schedule(text: str) -> LearningRateSchedule:
    """argparse type: one of FORMS.

    >>> learning_rate_schedule("multistep:10,15:0.5")
    LearningRateSchedule(kind='multistep', value=0.5, epochs=(10, 15))
    """
    kind, *words = text.split(":")
    try:
        return _parsed(kind, words)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be {FORMS}; got {text}") from None


def _parsed(kind: str, words: list[str]) -> LearningRateSchedule:
    """Raises ValueError for what is no schedule."""
    if kind == "multistep":
        epochs = tuple(int(word) for word in words[0].split(",")) if words else ()
        gamma = [_positive(word) for word in words[1:]] or [MULTISTEP_GAMMA]
        if not epochs or min(epochs) < 1 or list(epochs) != sorted(set(epochs)) or len(gamma) > 1:
            raise ValueError
        return LearningRateSchedule(kind, gamma[0], epochs)
    values = [_positive(word) for word in words]
    allowed = {"cosine": (0, 1), "exponential": (1,), "constant": (0,)}.get(kind, ())
    if len(values) not in allowed:
        raise ValueError
    return LearningRateSchedule(kind, *values)


def _positive(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise ValueError
    return value
