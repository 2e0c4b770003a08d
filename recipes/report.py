"""The table and the pictures of a recipe.

    python recipes/report.py RECIPE MODEL DATASET RESULTS.tsv [--scores FILE] [--profiles FILE …]

RESULTS has a line a result, tab-separated: method, target, what was reached, top-1. The table goes
to standard output as Markdown, with the paper's number beside where MODEL DATASET is the paper's;
PNGs go beside RESULTS: accuracy against cost, error per layer and level, level per layer.
"""

from __future__ import annotations

import command.starting  # noqa: F401  # isort: skip

import argparse
import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from budget.profiles import read_profile, read_scores  # noqa: E402
from command import cli  # noqa: E402
from command.cli import UserError  # noqa: E402

# Top-1 on ImageNet with torchvision's IMAGENET1K_V1 weights (OBC, arXiv 2208.11580); mixed and
# unstructured figures of ResNet-18 and -34 are read off plots, ±0.05.
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


def read_results(path: Path) -> list[tuple[str, str, str, float]]:
    """Method, target, reached, top-1; a line each. Raises UserError that names the line."""
    try:
        lines = path.read_text().splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file") from None
    results = []
    for number, line in enumerate(lines, 1):
        try:
            method, target, reached, top1 = line.split("\t")
            results.append((method, target, reached, float(top1)))
        except ValueError:
            raise UserError(f"{path}, line {number}: expected method, target, reached, top-1; "
                            "did a command before it fail?") from None  # fmt: skip
    if not results:
        raise UserError(f"{path}: no results in it")
    return results


def paper_number(recipe: str, model: str, dataset: str, method: str, target: str) -> str:
    """The paper's top-1 for a line of a table, or a dash. DP and search both compare to its DP."""
    table = PAPER.get((recipe, "search" if method == "DP" else method), {})
    value = table.get(model, {}).get(target) if dataset == "imagenet" else None
    return "–" if value is None else f"{value:.2f}"


def markdown(args: argparse.Namespace, results: list[tuple[str, str, str, float]]) -> str:
    lines = ["| target | method | reached | top-1 | paper |", "|---|---|---|---|---|"]
    for method, target, reached, top1 in results:
        paper = "–"
        if not args.no_paper:
            paper = paper_number(args.recipe, args.model, args.dataset, method, target)
        if is_number(reached):  # times less than dense
            target, reached = f"{target}×", f"{float(reached):.2f}×"
        lines.append(f"| {target} | {method} | {reached} | {top1:.2f} | {paper} |")
    return "\n".join(lines)


def is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdecimal()


def draw_accuracy(args: argparse.Namespace, results: list[tuple[str, str, str, float]]) -> None:
    """Top-1 against cost, a line per method."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    numeric = all(is_number(reached) for _, _, reached, _ in results)
    for method in dict.fromkeys(method for method, *_ in results):
        points = [(reached, top1) for of, _, reached, top1 in results if of == method]
        xs = [float(reached) if numeric else reached for reached, _ in points]
        axes.plot(xs, [top1 for _, top1 in points], marker="o", label=method)
    axes.set_xlabel("dense / compressed" if numeric else "bits or pattern")
    axes.set(ylabel="top-1 (%)", title=f"{args.recipe}: {args.model} on {args.dataset}")
    axes.legend()
    axes.grid(alpha=0.3)
    save(figure, args.results.with_name(f"{args.recipe}_accuracy.png"))


def draw_errors(args: argparse.Namespace) -> None:
    """Error of each layer at each level, as a map in logarithmic colour."""
    scores = read_scores(args.scores)
    levels = list(next(iter(scores.values())))
    values = [[math.log10(max(of.get(lv, math.nan), 1e-6)) for lv in levels]
              for of in scores.values()]  # fmt: skip
    height = 1.5 + 0.2 * len(scores)
    figure, axes = plt.subplots(figsize=(8, height), layout="constrained")
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    axes.set_yticks(range(len(scores)), list(scores), fontsize=7)
    step = max(1, len(levels) // 12)
    axes.set_xticks(range(0, len(levels), step), levels[::step], fontsize=7, rotation=90)
    axes.set(xlabel="level", title=f"error per layer and level: {args.model} on {args.dataset}")
    figure.colorbar(image, label="log10 of the change of loss (from 1e-6)")
    save(figure, args.results.with_name(f"{args.recipe}_errors.png"))


def draw_profiles(args: argparse.Namespace) -> None:
    """The level that each profile gives to each layer."""
    profiles = {path.stem: read_profile(path) for path in args.profiles}
    levels = sorted({level for profile in profiles.values() for level in profile.values()})
    layers = list(next(iter(profiles.values())))
    for path in args.profiles:
        if profiles[path.stem].keys() != set(layers):
            raise UserError(f"{path}: not of the same layers as {args.profiles[0]}")
    figure, axes = plt.subplots(figsize=(2 + 0.35 * len(layers), 4.5), layout="constrained")
    markers = {"uniform": "_", "dp": "o", "spdy": "x"}
    for name, profile in profiles.items():
        method = name.rpartition("_")[2]
        ys = [levels.index(profile[layer]) for layer in layers]
        axes.plot(ys, marker=markers.get(method, "."), linestyle=":", label=name, alpha=0.8)
    axes.set_xticks(range(len(layers)), layers, rotation=90, fontsize=7)
    axes.set_yticks(range(len(levels)), levels, fontsize=6)
    axes.set(ylabel="level", title=f"chosen levels: {args.model} on {args.dataset}")
    axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, args.results.with_name(f"{args.recipe}_profiles.png"))


def save(figure: plt.Figure, path: Path) -> None:
    with cli.atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=120)
    plt.close(figure)
    cli.log.info("picture: %s", path)


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
    parser.add_argument("recipe", help="its name, e.g. unstructured")
    parser.add_argument("model", help="MODEL")
    parser.add_argument("dataset", help="DATASET")
    parser.add_argument("results", type=Path, help="lines method, target, reached, top-1")
    parser.add_argument("--no-paper", action="store_true", help="leave its numbers out")
    parser.add_argument("--scores", type=Path, help="scores to draw")
    parser.add_argument("--profiles", type=Path, nargs="*", help="profiles to draw")
    return parser


def main(argv: list[str] | None = None) -> int:
    return cli.command(build_parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
