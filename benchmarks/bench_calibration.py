"""Calibration of a whole network: our Gram matrices against unfold and multiply.

    python -m benchmarks.bench_calibration --out bench_calibration.json

Timed in one process, on the same threads and the same random images: `--images` go through the
dense model (rn18 with random weights, `--image-size` 224) in batches, and every layer's Σ x xᵀ is
accumulated in float64, by

* ours: `calibrate.calibrate` with a `TrueOBS` for each layer, as main_trueobs.py does it;
* plain: a hook on each layer that unfolds its whole input batch to columns x (positions, d) and
  adds xᵀ x, a product in float32, to a float64 sum;
* forward: the model alone, which is in both.

They take turns, round after round, after a warm-up of each on the first batch; medians of
`--repeats`, scaled to seconds per 100 images. Images are laid out as `calibrate` has them
(channels last on a CPU) for all three, so that all layers' inputs are the same to the last bit.
Excluded: reading, decoding and augmenting images; the 2/N and the order of columns.

Checked in the same run: ‖H − H'‖ / ‖H'‖ (Frobenius) of ours to plain, the worst layer, ≤ 1e-6.

Prediction. A 3×3 stride-1 layer needs 9 products of C×C a position in `hessian.py`'s way (3 of
(3C)² at f = 3C) where the plain way needs 81, and the plain way also writes 9 copies of the input
where ours writes 3: a ratio of up to 3 where products dominate, less where the model's own forward
pass matters. Goal: ≥ 2.5, with the forward pass in both.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from benchmarks import timing
from benchmarks.networks import BatchList, layout_of, random_images, random_model
from benchmarks.timing import against, alternating
from modelutils import evaluating, find_layers
from obc.solver.layers import view
from obc.toolkit import cli
from obc.toolkit.calibrate import calibrate, prove_layers, watching
from trueobs import TrueOBS

GOAL, SAME = 2.5, 1e-6


@dataclass(frozen=True)
class CalibrationFigures:
    """Seconds for all images, one entry per repeat."""

    model: str
    images: int
    image_size: int
    layers: int
    ours_s: list[float]
    plain_s: list[float]
    forward_s: list[float]
    difference: dict[str, float]  # by layer, ‖H − H'‖ / ‖H'‖

    @property
    def worst(self) -> float:
        return max(self.difference.values())


class Plain:
    """Σ x xᵀ of every layer, the plain way."""

    def __init__(self, layers: dict[str, nn.Module]) -> None:
        self.layers = layers
        self.totals = {
            name: layer.weight.new_zeros(view(layer).groups, *2 * [view(layer).columns]).double()
            for name, layer in layers.items()
        }

    def see(self, name: str, inputs: Tensor) -> None:
        x = view(self.layers[name]).patches(inputs)
        self.totals[name] += x.mT @ x


class CalibrationBench:
    """One model and its images; each way of going through them, and its result."""

    def __init__(self, model: nn.Module, batches: BatchList) -> None:
        self.model, self.batches = model, batches
        self.device = next(model.parameters()).device
        self.layers = {x: y for x, y in find_layers(model).items() if not view(y).proof.flaw}
        self.solvers: dict[str, TrueOBS] = {}
        self.totals: dict[str, Tensor] = {}

    def forward(self) -> None:
        with evaluating(self.model):
            for images, _ in self.batches:
                self.model(images.to(self.device, memory_format=layout_of(self.device)))

    def ours(self) -> None:
        self.solvers = {name: TrueOBS(layer) for name, layer in self.layers.items()}
        calibrate(self.model, self.solvers, self.batches, self.device)

    def plain(self) -> None:
        plain = Plain(self.layers)
        with watching(self.layers, plain.see):
            self.forward()
        self.totals = plain.totals

    def differences(self) -> dict[str, float]:
        """‖H − H'‖ / ‖H'‖, by layer."""
        images = sum(len(labels) for _, labels in self.batches)
        differences = {}
        for name, total in self.totals.items():
            H = total * (2 / images)
            differences[name] = float((self.solvers[name].H - H).norm() / H.norm())
        return differences


def measure_calibration(args: argparse.Namespace, device: torch.device) -> CalibrationFigures:
    model = random_model(args.model, args.seed, device)
    batches = random_images(args.images, args.image_size, args.batchsize, args.seed)
    prove_layers(model, model, batches, device)
    warm = CalibrationBench(model, batches[:1])
    for work in (warm.ours, warm.plain, warm.forward):
        work()
    bench = CalibrationBench(model, batches)
    works = {"ours": bench.ours, "plain": bench.plain, "forward": bench.forward}
    times = alternating(works, device, args.repeats, warm_up=False)
    return CalibrationFigures(
        model=args.model,
        images=args.images,
        image_size=args.image_size,
        layers=len(bench.layers),
        ours_s=times["ours"],
        plain_s=times["plain"],
        forward_s=times["forward"],
        difference=bench.differences(),
    )


HEADER = """\
| network | pixels | images | ours, s/100 | unfold and multiply, s/100 | ratio | \
forward alone, s/100 | worst difference of H |
|---|---|---|---|---|---|---|---|"""


def calibration_row(result: CalibrationFigures) -> str:
    ours, plain, forward = (
        100 / result.images * median(times)
        for times in (result.ours_s, result.plain_s, result.forward_s)
    )
    return (
        f"| {result.model} | {result.image_size} | {result.images} | {ours:.3g} | {plain:.3g} "
        f"| {against(plain / ours, GOAL, most=False)} | {forward:.3g} | {result.worst:.1e} |"
    )


def build_parser() -> argparse.ArgumentParser:
    parser = timing.build_parser("bench_calibration.py", __doc__.splitlines()[0])
    add, positive = parser.add_argument, cli.positive_int
    add("--model", metavar="MODEL", default="rn18", help="one of torchvision's, or rn8 … rn110")
    add("--images", metavar="N", type=positive, default=100, help="number of images")
    add("--batchsize", metavar="N", type=positive, default=25, help="images per batch")
    add("--image-size", metavar="N", type=positive, default=224, help="pixels")
    return parser


def run(args: argparse.Namespace) -> None:
    device = timing.start(args)
    result = measure_calibration(args, device)
    cli.print_result(HEADER)
    cli.print_result(calibration_row(result))
    faults = [
        f"{name}: H differs by {value:.2g}"
        for name, value in result.difference.items()
        if not value <= SAME
    ]
    timing.finish(args, "bench_calibration.py", [result], faults)


def main(argv: list[str] | None = None) -> int:
    return cli.command(build_parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
