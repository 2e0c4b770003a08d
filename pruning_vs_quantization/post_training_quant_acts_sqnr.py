"""How well can b-bit weights do on a layer's real inputs? Bounds, optima, and the toolkit's own.

    python -m pruning_vs_quantization.post_training_quant_acts_sqnr quant-bounds-data-opt \\
        --model-name rn18 --layer-name layer1.0.conv1 --n-bits 4 --image-net-dir DIR

For every selected output channel and chunk of inputs: round to nearest, GPTQ's order, OBQ, and the
optimum, or an interval that is proven to contain it. See `layer_study.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file in this folder, as the published README does
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import pruning_vs_quantization  # noqa: F401

import argparse

from obc.toolkit import cli
from pruning_vs_quantization import layer_study


def build_parser() -> argparse.ArgumentParser:
    words = ("quant-bounds-data-opt",)
    prog = "post_training_quant_acts_sqnr"
    return layer_study.layer_study_parser("quantisation", prog, __doc__, words)


def main(argv: list[str] | None = None) -> int:
    return cli.command(build_parser, layer_study.run_layer_study, argv)


if __name__ == "__main__":
    sys.exit(main())
