"""What a run of main_trueobs.py does with every layer, as far as its cost depends on it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

from obc.solver.elimination import NM, Blocks, PivotRule, Quantise, Unstructured


@dataclass(frozen=True)
class Task:
    """What is to be done with every layer."""

    levels: int = 0  # weights at so many levels; 0: one result
    innermost: bool = False  # whether columns are put in another order
    shared: bool = False  # whether all rows of a group go through one elimination
    size: int = 1  # columns that go together
    nm: tuple[int, int] = (0, 0)  # zeros in every so many weights; (0, 0): no such limit
    quantise: bool = False

    @property
    def refines(self) -> bool:
        """Whether weights are refined where H had to be damped."""
        return not self.quantise

    @classmethod
    def of(cls, args: argparse.Namespace, levels: int) -> Task:
        """From the options of main_trueobs.py."""
        mode = args.mode
        return cls(
            levels=levels,
            innermost=mode in ("nmprune", "blocked"),
            shared=mode == "struct",
            size={"blocked": args.blocked_size, "struct": 8}.get(mode, 1),  # 8: about kh·kw
            nm=(args.prunen, args.prunem) if mode == "nmprune" else (0, 0),
            quantise=mode == "quant",
        )

    def rule(self, rows: int, d: int, device: torch.device) -> PivotRule:
        """The rule by which columns go."""
        if self.quantise:
            one = torch.ones(rows, 1, device=device)
            return Quantise(one * 0.3, one * -8, one * 7)
        if self.nm[1]:
            return NM(*self.nm, rows, d, device)
        return Blocks(self.size) if self.size > 1 else Unstructured()

    def whole(self, d: int) -> bool:
        """Whether d columns are whole groups or blocks; else a layer stays dense."""
        return self.shared or d % (self.nm[1] or self.size) == 0

    def steps(self, d: int) -> int:
        """Columns that go, of d."""
        return d * self.nm[0] // self.nm[1] if self.nm[1] else d
