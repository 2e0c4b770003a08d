"""How well can b-bit weights do on a layer's real inputs? Bounds, optima, and the toolkit's own.

    python -m pruning_vs_quantization.post_training_quant_acts_sqnr quant-bounds-data-opt \\
        --model-name rn18 --layer-name layer1.0.conv1 --n-bits 4 --image-net-dir DIR

For every output channel and chunk of inputs that is looked at: round to nearest, GPTQ's order, OBQ,
and the optimum, or an interval that is proven to hold it. See `layer_study.py`.
"""

from __future__ import annotations

import argparse
import sys

from obc.toolkit import cli
from pruning_vs_quantization import layer_options
from pruning_vs_quantization.layer_study import QUANTISATION
from pruning_vs_quantization.layer_study import run as run_study

COMMANDS = ("quant-bounds-data-opt",)


def build_parser() -> argparse.ArgumentParser:
    return layer_options.build_parser(
        "post_training_quant_acts_sqnr", __doc__.splitlines()[0], COMMANDS
    )


def run(args: argparse.Namespace) -> None:
    run_study(QUANTISATION, args)


def main(argv: list[str] | None = None) -> int:
    return cli.command(build_parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
