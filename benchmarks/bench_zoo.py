"""Does a network pass through the commands, and what does that take?

    python -m benchmarks.bench_zoo --datapath DIR [NETWORK …] [--image-size N]

Each network has random weights, since neither what is compressed nor how long it takes depends on
them, and goes through `layers`, `quant --wbits 4` and `nmprune` of main_trueobs.py, each as a
process of its own on --nsamples photographs. A row has the share of the weights that is in layers
to compress, and for each command its seconds (start and evaluation included) and the highest
resident memory; or its error line.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess  # nosec B404  # our own commands
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.timing import finish, start
from obc.toolkit import cli

CHECKOUT = Path(__file__).resolve().parents[1]
ZOO_COMMANDS = ("layers", "quant --wbits 4", "nmprune")
NETWORKS = (
    *("rn18", "mobilenet_v2", "efficientnet_b0", "convnext_tiny", "vit_b_16", "swin_t"),
    *("regnet_y_400mf", "timm:resnet18.a1_in1k", "timm:vit_tiny_patch16_224"),
    *("timm:convnext_atto.d2_in1k", "timm:mixer_s32_224", "timm:efficientnet_lite0.ra_in1k"),
    *("timm:mobilevit_xxs.cvnets_in1k", "timm:ghostnet_100.in1k", "timm:resmlp_12_224.fb_in1k"),
    *("timm:repvgg_a0.rvgg_in1k", "timm:test_mambaout.in1k"),
)


@dataclass(frozen=True)
class Passage:
    """A network on its way through one command."""

    network: str
    command: str
    seconds: float
    memory_gb: float
    share: str  # of all parameters, in layers to compress: `layers` says so
    error: str  # its line; empty if it went through

    def __str__(self) -> str:
        return self.error or f"{self.seconds:.0f} s, {self.memory_gb:.1f} GB"


def passage(network: str, command: str, args: argparse.Namespace, folder: str) -> Passage:
    words = [sys.executable, "main_trueobs.py", network, "folder", *command.split()]
    words += ["--weights", "random", "--device", args.device]
    if args.image_size is not None:
        words += ["--image-size", str(args.image_size)]
    if command != "layers":
        words += ["--datapath", str(Path(args.datapath).resolve()), "--workers", "0", "--noaug"]
        words += ["--nsamples", str(args.nsamples), "--save", str(Path(folder) / "model.pth")]
        words += ["--restart"]
    started = time.perf_counter()
    with open(Path(folder) / "out", "w+") as out, open(Path(folder) / "err", "w+") as err:
        process = subprocess.Popen(words, cwd=CHECKOUT, stdout=out, stderr=err)  # nosec B603
        _, status, usage = os.wait4(process.pid, 0)
        out.seek(0), err.seek(0)
        share = re.search(r"\((\S+ %) of all parameters\)", out.read())
        error = (err.read().splitlines() or ["error"])[-1] if status else ""
    seconds, peak = time.perf_counter() - started, usage.ru_maxrss / 1e6
    return Passage(network, command, seconds, peak, share[1] if share else "", error)


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="bench_zoo.py", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("networks", metavar="NETWORK", nargs="*", default=NETWORKS, help="names of the commands")
    add("--datapath", metavar="DIR", required=True, help="folder with train/ and val/")
    add("--nsamples", metavar="N", type=cli.positive_int, default=32, help="photographs")
    add("--image-size", metavar="N", type=cli.positive_int, help="pixels, if not the network's")
    add("--device", metavar="auto|cpu|cuda[:N]", default="cpu", help="where to compute")
    add("--out", metavar="FILE", help="record of all times, machine and versions, as JSON")
    return parser


def run(args: argparse.Namespace) -> None:
    start(args)
    cli.print_result(f"| network | in layers | {' | '.join(ZOO_COMMANDS)} |")
    cli.print_result("|---" * (2 + len(ZOO_COMMANDS)) + "|")
    passages: list[Passage] = []
    with tempfile.TemporaryDirectory() as folder:
        for network in args.networks:
            row = [passage(network, command, args, folder) for command in ZOO_COMMANDS]
            passages += row
            cells = (network, row[0].share, *map(str, row))
            cli.print_result(f"| {' | '.join(cells)} |")
    finish(args, "bench_zoo.py", passages)


def main(argv: list[str] | None = None) -> int:
    return cli.command(build_parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
