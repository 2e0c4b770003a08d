"""Whole tables of the papers: `python -m recipes NAME MODEL DATASET [options]`.

Each recipe is a function in `tables.py` or `fine_tuning.py`; `recipes/NAME.sh` is the same command.
A recipe that was interrupted is started again: the command it was in resumes.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file, by recipes/NAME.sh
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import obc.toolkit.starting  # noqa: E402, F401  # isort: skip

import argparse  # noqa: E402
import os  # noqa: E402
import shlex  # noqa: E402
from collections.abc import Mapping  # noqa: E402

from obc.toolkit import cli  # noqa: E402
from obc.toolkit.timings import TIMED  # noqa: E402
from recipes.fine_tuning import fine_tuning  # noqa: E402
from recipes.recipe import Recipe  # noqa: E402
from recipes.tables import block8, deploy, mixed, nm, quantisation, unstructured  # noqa: E402

RECIPES = {
    function.__name__: function
    for function in (quantisation, nm, unstructured, mixed, block8, deploy, fine_tuning)
}
ENVIRONMENT = {  # variable → option; what is given on the command line counts more
    "OUT": "--out",
    "TARGETS": "--targets",
    "TIMINGS": "--timings",
    "RUNTIME": "--runtime",
    "BITS": "--bits",
    "SEEDS": "--seeds",
    "STUDY": "--study",
}
WORDS = {  # the same, whose value is one word with spaces
    "TRAIN": "--train",
    "TRAIN_QUANTISED": "--train-quantised",
    "TRAIN_PRUNED": "--train-pruned",
}
FLAGS = {("SEARCH", "0"): "--no-search", ("RESOLVE", "0"): "--no-resolve"}
FLAGS |= {("TUNE", "--noaug"): "--tune-noaug"}


def own_options(name: str) -> cli.Parser:
    """The options of one recipe that are not common options."""
    parser = cli.Parser(prog=f"python -m recipes {name}", add_help=False)
    add = parser.group("this recipe").add_argument
    add("--out", metavar="DIR", help="folder of the results (default: results/MODEL-DATASET)")
    if name not in ("deploy", "fine_tuning"):
        text = "tune norms on images without augmentation, too: for networks trained so"
        add("--tune-noaug", action="store_true", help=text)
    if name == "deploy":
        text = "what runs the exported networks"
        add("--runtime", choices=list(TIMED), default="ort", help=text)
        text = "how many times faster than 8 bits alone (default: 1.5 2 3)"
        add("--targets", metavar="F", nargs="+", type=cli.positive_float, help=text)
    if name in ("unstructured", "mixed", "block8"):
        text = "dense cost / allowed cost (default: the paper's)"
        add("--targets", metavar="F", nargs="+", type=cli.positive_float, help=text)
        for word, text in (
            ("search", "leave out the SPDY search"),
            ("resolve", "leave out what is solved anew"),
        ):
            add(f"--no-{word}", action="store_true", help=text)
    if name in ("unstructured", "block8", "deploy"):
        for option, kind, text in (
            ("--min-sparsity", cli.fraction, "at the first level"),
            ("--max-sparsity", cli.fraction, "at the last level"),
            ("--delta-sparse", cli.fraction, "fraction of what is left that the next level drops"),
        ):
            add(option, metavar="F", type=kind, help=f"{text} (default: as in main_trueobs.py)")
    if name == "block8":
        text = "measured seconds: the targets are about them, not about BOPs"
        add("--timings", metavar="FILE", help=text)
    if name == "fine_tuning":
        add_fine_tuning_options(parser)
    return parser


def add_fine_tuning_options(parser: cli.Parser) -> None:
    """Add the options of fine_tuning."""
    add = parser.group("this recipe").add_argument
    width = cli.number(int, lambda x: 2 <= x <= 15, "2 to 15")
    add("--bits", metavar="B", nargs="+", type=width, default=[8, 4, 3, 2], help="bit widths")
    text = "a training for each of these (default: --seed)"
    add("--seeds", metavar="N", nargs="+", type=cli.seed, help=text)
    text, default = "where the trained networks go", "plots_data/fine_tuning"
    add("--study", metavar="DIR", default=default, help=text)
    for option, default, networks in (
        ("--train", "--max-epochs 3 --batch-size 64", "all networks"),
        ("--train-quantised", "", "the quantised ones"),
        ("--train-pruned", "", "the pruned ones"),
    ):
        text = f"options of train-compressed for {networks}"
        add(option, metavar="WORDS", type=shlex.split, default=default, help=text)


def environment_words(parser: cli.Parser, environment: Mapping[str, str]) -> list[str]:
    """What the environment says about a recipe, as options: its shell scripts were set so."""
    words = shlex.split(environment.get("GRID", ""))
    words += [flag for (name, value), flag in FLAGS.items() if environment.get(name) == value]
    for name, option in ENVIRONMENT.items():
        if value := environment.get(name):
            words += [option, *value.split()]
    words += [
        f"{option}={environment[name]}" for name, option in WORDS.items() if name in environment
    ]
    known = {flag for action in parser._actions for flag in action.option_strings}
    kept, keep = [], False
    for word in words:
        if word.startswith("--"):
            keep = word.partition("=")[0] in known
        kept += [word] if keep else []
    return kept


def build_parser() -> cli.Parser:
    text, example = __doc__.splitlines()[0], "python -m recipes nm rn8 digits --noaug"
    parser = cli.Parser(prog="python -m recipes", description=text, example=example)
    commands = parser.add_subparsers(dest="recipe", metavar="NAME", required=True)
    for name, function in RECIPES.items():
        own, text = own_options(name), function.__doc__.splitlines()[0]
        added = commands.add_parser(name, help=text, description=text, parents=[own])
        cli.add_common_options(added)
        text = "start over instead of resuming an interrupted command"
        added.group(cli.RUN).add_argument("--restart", action="store_true", help=text)
        words = environment_words(own, os.environ)
        added.set_defaults(**vars(own.parse_args(words)))
    return parser


def run_recipe(args: argparse.Namespace, words: list[str]) -> None:
    """Run the recipe of a command line, which is given as parsed and as words."""
    common = own_options(args.recipe).parse_known_args(words[1:])[1]
    RECIPES[args.recipe](Recipe(args, common[2:]))  # without MODEL DATASET


def main(argv: list[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    return cli.command(build_parser, lambda args: run_recipe(args, words), words)


if __name__ == "__main__":
    sys.exit(main())
