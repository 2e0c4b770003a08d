"""The picture in README.md: accuracy against FLOPs, drawn from the results of `unstructured`.

    python -m recipes unstructured rn20 cifar10 --targets 2 3 4 6 8 --no-search --noaug …
    python -m recipes.picture results/rn20-cifar10/unstructured.tsv --to docs/accuracy

Writes docs/accuracy-light.svg and docs/accuracy-dark.svg, the same bytes for the same results.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import obc.toolkit.starting  # noqa: E402, F401  # isort: skip

import argparse  # noqa: E402
from collections.abc import Sequence  # noqa: E402

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from obc.inputs import files  # noqa: E402
from obc.solver.errors import UserError, log  # noqa: E402
from obc.toolkit import cli  # noqa: E402
from recipes.report import COSTS, DENSE, TableLine, read_results  # noqa: E402

THEMES = {  # text, dense, uniform, DP, solved anew
    "light": ("#1f2328", "#818b98", "#818b98", "#0072b2", "#d55e00"),
    "dark": ("#f0f6fc", "#9198a1", "#9198a1", "#58a6e0", "#ff9a4d"),
}
METHODS = {  # method in the results → label
    "uniform": "the same sparsity in all layers",
    "DP": "a sparsity for each layer (DP)",
    "DP, solved anew": "… and solved anew",
}


def draw(results: Sequence[TableLine], title: str, theme: str) -> plt.Figure:
    """Top-1 against cost, one line for each of METHODS, the dense model's dashed."""
    text, grey, *colours = THEMES[theme]
    figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
    figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    (dense,) = (one.top1 for one in results if one.method == DENSE)
    axes.axhline(dense, color=grey, linestyle=(0, (4, 3)), linewidth=1.2)
    axes.text(
        0.995,
        dense,
        f"dense, {dense:.2f}",
        color=text,
        horizontalalignment="right",
        verticalalignment="bottom",
        transform=axes.get_yaxis_transform(),
    )
    for (method, label), colour in zip(METHODS.items(), colours, strict=True):
        points = sorted((float(x.reached), x.top1) for x in results if x.method == method)
        if not points:
            raise UserError(
                f"no results of {method}; make them with python -m recipes unstructured"
            )
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=5, label=label)
    axes.margins(y=0.1)
    axes.set_xlabel(COSTS["flops"], color=text)
    axes.set_ylabel("top-1 (%)", color=text)
    axes.set_title(title, color=text, fontsize=11, loc="left")
    axes.tick_params(colors=text, length=0)
    axes.grid(color=grey, alpha=0.25)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.legend(frameon=False, labelcolor=text, loc="lower left")
    return figure


def run(args: argparse.Namespace) -> None:
    results = read_results(args.results)
    with matplotlib.rc_context({"svg.hashsalt": "trueobs", "font.size": 10}):
        for theme in THEMES:
            figure = draw(results, args.title, theme)
            path = Path(f"{args.to}-{theme}.svg")
            with files.atomic_write(path) as file:
                figure.savefig(file, format="svg", metadata={"Date": None})
            plt.close(figure)
            log.info("plot: %s", path)


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="picture.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("results", metavar="RESULTS", type=Path, help="unstructured.tsv of the recipe")
    text = "ResNet-20 on CIFAR-10, pruned without training"
    add("--title", metavar="TEXT", default=text, help="title of the picture")
    add("--to", metavar="NAME", default="docs/accuracy", help="NAME-light.svg and NAME-dark.svg")
    return parser


def main(argv: list[str] | None = None) -> int:
    return cli.command(build_parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
