"""The table and the plots of a recipe.

    python recipes/report.py RECIPE MODEL DATASET RESULTS.tsv [--scores FILE] [--profiles FILE …]

RESULTS has one line per result, tab-separated: method, target, reached, top-1 and, if they are
known, KL and agreement with the dense model (for this one: `dense`, `-`, `-`, top-1). The table is
printed as Markdown, with the paper's number where the paper has MODEL and DATASET. Plots are
written next to RESULTS as PNGs: accuracy against cost, error per layer and level, level per layer.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import obc.toolkit.starting  # noqa: E402, F401  # isort: skip

import argparse  # noqa: E402
import math  # noqa: E402
import re  # noqa: E402
from itertools import cycle  # noqa: E402
from typing import NamedTuple  # noqa: E402

import matplotlib  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from obc.inputs import files  # noqa: E402
from obc.solver import errors  # noqa: E402
from obc.solver.errors import UserError  # noqa: E402
from obc.toolkit import cli  # noqa: E402
from obc.toolkit.profiles import read_profile, read_scores  # noqa: E402

DENSE = "dense"  # the method in the dense model's line

LEAST_ERROR = 1e-6  # smaller errors, and negative ones, are drawn like this one
COSTS = {  # label of the axis
    "params": "times fewer weights",
    "bits": "times fewer bits",
    "flops": "times fewer FLOPs",
    "bops": "times fewer BOPs",
    "timingsq": "times less time",
}

# Top-1 on ImageNet with torchvision's IMAGENET1K_V1 weights (OBC, arXiv 2208.11580); mixed and
# unstructured figures of ResNet-18 and -34 are read off plots, ±0.05.
PAPER_DENSE = {"rn18": 69.76, "rn34": 73.31, "rn50": 76.13}
PAPER: dict[tuple[str, str], dict[str, dict[str, float]]] = {
    ("quantisation", "asymmetric, BN-tuned"): {
        "rn18": {"4": 69.56, "3": 68.69, "2": 64.04},
        "rn50": {"4": 75.72, "3": 75.24, "2": 70.71},
    },
    ("quantisation", "symmetric"): {
        "rn18": {"4": 69.18, "3": 67.14, "2": 48.34},
        "rn34": {"4": 72.85, "3": 71.01, "2": 51.62},
        "rn50": {"4": 75.50, "3": 73.61, "2": 46.33},
    },
    ("nm", "first and last dense, BN-tuned"): {
        "rn18": {"2:4": 68.81, "4:8": 69.18},
        "rn34": {"2:4": 72.66, "4:8": 72.95},
        "rn50": {"2:4": 74.71, "4:8": 75.20},
    },
    ("unstructured", "search"): {"rn50": {"2": 75.64, "3": 75.01, "4": 74.05}},
    ("mixed", "search"): {
        "rn18": {"6": 69.34, "8": 68.90, "10": 68.54, "12": 68.05, "14": 66.18},
        "rn34": {"6": 72.83, "8": 72.61, "10": 72.36, "12": 72.12, "14": 71.89},
        "rn50": {"6": 75.78, "8": 75.49, "10": 75.04, "12": 74.56, "14": 74.03},
    },
    ("block8", "search"): {"rn50": {"4": 75.17, "5": 74.25}},
}


class TableLine(NamedTuple):
    """A line of RESULTS."""

    method: str
    target: str
    reached: str
    top1: float
    kl: str = "–"
    agreement: str = "–"


def read_results(path: Path) -> list[TableLine]:
    """Raises a UserError that names a bad line."""
    try:
        lines = path.read_text().splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file") from None
    results = []
    for number, line in enumerate(lines, 1):
        try:
            method, target, reached, top1, *rest = line.split("\t")
            results.append(TableLine(method, target, reached, float(top1), *rest))
        except (ValueError, TypeError):
            raise UserError(
                f"{path}, line {number}: expected method, target, reached, top-1; "
                "did an earlier command fail?"
            ) from None
    if not results:
        raise UserError(f"{path}: no results in it")
    return results


def paper_number(recipe: str, model: str, dataset: str, method: str, target: str) -> str:
    """The paper's top-1 for a line of the table, or a dash; the same for DP and search."""
    table = PAPER.get((recipe, "search" if method == "DP" else method), {})
    value = PAPER_DENSE.get(model) if method == DENSE else table.get(model, {}).get(target)
    value = value if dataset == "imagenet" else None
    return "–" if value is None else f"{value:.2f}"


def markdown(args: argparse.Namespace, results: list[TableLine]) -> str:
    head = "| target | method | reached | top-1 | KL | agreement | paper |"
    lines = [head, "|---" * head.count(" | ") + "|---|"]
    for method, target, reached, top1, kl, agreement in results:
        paper = "–"
        if not args.no_paper:
            paper = paper_number(args.recipe, args.model, args.dataset, method, target)
        if method == DENSE:
            target = reached = "–"
        if is_number(reached):  # times less than dense
            target, reached = f"{target}×", f"{float(reached):.2f}×"
        cells = target, method, reached, f"{top1:.2f}", kl, agreement, paper
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdecimal()


def draw_accuracy(args: argparse.Namespace, results: list[TableLine]) -> None:
    """Top-1 against cost, one line per method, with the dense model's as a dashed line."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    compressed = [result for result in results if result.method != DENSE]
    numeric = all(is_number(result.reached) for result in compressed)
    methods = dict.fromkeys(result.method for result in compressed)
    for method, marker in zip(methods, cycle("osx^"), strict=False):
        points = [(one.reached, one.top1) for one in compressed if one.method == method]
        xs = [float(reached) if numeric else reached for reached, _ in points]
        axes.plot(xs, [top1 for _, top1 in points], marker=marker, label=method, alpha=0.8)
    for top1 in (result.top1 for result in results if result.method == DENSE):
        axes.axhline(top1, color="grey", linestyle="--", label=f"dense, {top1:.2f}", zorder=0)
    values = [result.top1 for result in results]
    margin = max(0.5, 0.05 * (max(values) - min(values)))
    axes.set_ylim(min(values) - margin, max(values) + margin)
    axes.set_xlabel(COSTS.get(args.cost, "times less than dense") if numeric else "bits or pattern")
    axes.set(ylabel="top-1 (%)", title=f"{args.recipe}: {args.model} on {args.dataset}")
    axes.legend()
    axes.grid(alpha=0.3)
    save_figure(figure, args.results.with_name(f"{args.recipe}_accuracy.png"))


def draw_errors(args: argparse.Namespace) -> None:
    """Error of each layer at each level, as an image on a logarithmic colour scale."""
    scores = read_scores(args.scores)
    levels = list(next(iter(scores.values())))
    values = [
        [math.log10(max(errors_of.get(level, math.nan), LEAST_ERROR)) for level in levels]
        for errors_of in scores.values()
    ]
    figure, axes = plt.subplots(figsize=(8, 2.2 + 0.2 * len(scores)), layout="constrained")
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    axes.set_yticks(range(len(scores)), list(scores), fontsize=7)
    step = max(1, len(levels) // 12)
    names = list(map(level_text, levels[::step]))
    axes.set_xticks(range(0, len(levels), step), names, fontsize=7, rotation=90)
    axes.set(xlabel="level", title=f"error per layer and level: {args.model} on {args.dataset}")
    figure.colorbar(image, label=f"log10 of the change in loss\n(darkest: up to {LEAST_ERROR:g})")
    save_figure(figure, args.results.with_name(f"{args.recipe}_errors.png"))


def draw_profiles(args: argparse.Namespace) -> None:
    """The level that each profile gives to each layer: one row per profile, coloured by level."""
    profiles = {path: read_profile(path) for path in args.profiles}
    layers = list(next(iter(profiles.values())))
    for path, profile in profiles.items():
        if profile.keys() != set(layers):
            raise UserError(f"{path}: has other layers than {args.profiles[0]}")
    used = {level for profile in profiles.values() for level in profile.values()}
    ordered = list(next(iter(read_scores(args.scores).values()))) if args.scores else []
    levels = [level for level in ordered if level in used] + sorted(used.difference(ordered))
    values = [[levels.index(profile[layer]) for layer in layers] for profile in profiles.values()]
    size = (2 + 0.4 * len(layers), 2 + 0.22 * len(profiles))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    axes.imshow(values, aspect="auto", cmap="YlOrRd", vmin=0, vmax=2 * max(1, len(levels) - 1))
    for row, profile in enumerate(profiles.values()):
        for column, layer in enumerate(layers):
            text = level_text(profile[layer])
            axes.text(column, row, text, ha="center", va="center", fontsize=5)
    axes.set_xticks(range(len(layers)), layers, rotation=90, fontsize=7)
    axes.set_yticks(range(len(profiles)), [profile_label(path) for path in profiles], fontsize=7)
    axes.set_title(f"chosen levels: {args.model} on {args.dataset}", fontsize=9)
    save_figure(figure, args.results.with_name(f"{args.recipe}_profiles.png"))


def level_text(level: str) -> str:
    """A level's name for people: that of a sparsity in percent, others as they are.

    >>> level_text("5904"), level_text("8w8a"), level_text("0000")
    ('59.0 %', '8w8a', '0 %')
    """
    if not re.fullmatch(r"\d{4}", level):
        return level
    return f"{int(level) / 100:.1f} %" if int(level) else "0 %"


def profile_label(path: Path) -> str:
    """A short name for a profile.

    >>> profile_label(Path("rn18_unstr_230x_dp.txt")), profile_label(Path("mine.txt"))
    ('2.3× dp', 'mine')
    """
    match = re.search(r"_([\d.]+)x_(\w+)$", path.stem)
    return f"{float(match[1]) / 100:g}× {match[2]}" if match else path.stem


def save_figure(figure: plt.Figure, path: Path) -> None:
    with files.atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
    plt.close(figure)
    errors.log.info("plot: %s", path)


def run(args: argparse.Namespace) -> None:
    results = read_results(args.results)
    cli.print_result(markdown(args, results))
    draw_accuracy(args, results)
    if args.scores:
        draw_errors(args)
    if args.profiles:
        draw_profiles(args)


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="report.py", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="name of the recipe, e.g. unstructured")
    parser.add_argument("model", help="MODEL")
    parser.add_argument("dataset", help="DATASET")
    parser.add_argument("results", type=Path, help="lines of method, target, reached, top-1")
    parser.add_argument("--no-paper", action="store_true", help="leave out the paper's numbers")
    parser.add_argument("--cost", choices=[*COSTS], help="what the targets are about")
    parser.add_argument("--scores", type=Path, help="scores to plot")
    parser.add_argument("--profiles", type=Path, nargs="*", help="profiles to plot")
    return parser


def main(argv: list[str] | None = None) -> int:
    return cli.command(build_parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
