"""The accuracy of the dense model, for comparison.

python recipes/dense.py MODEL DATASET
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import obc.toolkit.starting  # noqa: E402, F401  # isort: skip

import argparse  # noqa: E402

from obc.toolkit import cli  # noqa: E402
from obc.toolkit.session import Session, common_options  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="dense.py", description=__doc__.splitlines()[0])
    cli.add_common_options(parser)
    return parser


def run(args: argparse.Namespace) -> None:
    session = Session.of(common_options(args))
    cli.print_result(str(session.evaluation(session.model)))


def main(argv: list[str] | None = None) -> int:
    return cli.command(build_parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
