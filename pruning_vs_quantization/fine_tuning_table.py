"""The table and the plot of fine-tuning: quantised against pruned at equal size.

There is a row for each size of b bits per weight; pruned weights count as FP16 with sparsity
1 − b/16. Runs of train-compressed are recognised by their settings, not by file names; only runs
that quantise weights and nothing else, or prune and nothing else, are included. Several seeds are
averaged, and their range is shown. Results without training come from a text file with a line
`<method> <bits> <reached> <top-1>` each, tab-separated, as recipes/fine_tuning.sh writes it.

Two top-1 p and q (fractions) on the same n test images differ only if |p − q| > 2σ with

    σ² = (p(1 − p) + q(1 − q)) / n

and a network has learned something only if p > 1/classes + 2σ of its own. `no_verdict` says which
of this, or of the conditions that both sides have to share, is missing.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from obc.solver.errors import UserError, log
from obc.toolkit import cli
from obc.toolkit.leveldb import model_tag
from obc.toolkit.profiles import Table, read_lines
from obc.toolkit.records import write_record
from pruning_vs_quantization import plots
from pruning_vs_quantization.expected_error import DENSE_BITS, sparsity_percent
from pruning_vs_quantization.study_files import TextTable, read_result
from pruning_vs_quantization.training_options import network_name

QUANTISED, PRUNED, OBQ, EXACT_METHOD = "quantised", "pruned", "OBQ", "ExactOBS"
CLASSES_OF = {"imagenet": 1000, "cifar10": 10, "digits": 10}
SHARED = ("weights", "image_size", "augment", "batch_size", "max_epochs", "images_dir")  # settings
SHARED_FIGURES = ("training_images", "test_images", "preprocessing")
TITLE_WIDTH = 70  # characters that fit above the plot
TABLE_COLUMNS = {  # method: heading
    QUANTISED: "quantised, trained",
    PRUNED: "pruned, trained",
    OBQ: "OBQ, BN tuning",
    EXACT_METHOD: "ExactOBS, BN tuning",
}
METHOD_LOOKS = {
    QUANTISED: plots.QUANTISATION | {"linestyle": "-"},
    PRUNED: plots.PRUNING | {"linestyle": "-"},
    OBQ: plots.QUANTISATION | {"linestyle": ":"},
    EXACT_METHOD: plots.PRUNING | {"linestyle": ":"},
}


@dataclass(frozen=True)
class Result:
    """One network in the comparison."""

    method: str  # of TABLE_COLUMNS
    bits: float  # size, in bits per weight
    top1: float
    seed: int | None = None  # of training
    seconds: float | None = None  # of training
    reached: float | None = None  # bits per weight, with the first and the last layer's own
    training: str | None = None  # how long, and on what
    classes: int | None = None
    shared: dict[str, Any] | None = None  # the conditions that a comparison needs to be alike
    dense_top1: float | None = None  # of the network that training started from


def trained_results(folder: Path, architecture: str, dataset: str) -> list[Result]:
    """The comparable runs in a folder; logs the others. Raises UserError if there are none."""
    results = []
    for path in sorted(folder.glob("*_seed*.json")):
        settings, figures = read_result(path)
        if (settings.get("architecture"), settings.get("dataset")) != (architecture, dataset):
            continue
        if (result := run_result(settings, figures)) is None:
            log.info("%s: not a comparison at equal size, left out", path)
        else:
            results.append(result)
    if not results:
        text = f"{folder}: contains no trained {architecture} on {dataset}; run train-compressed"
        raise UserError(f"{text} first, or name another --out")
    return results


def run_result(settings: dict[str, Any], figures: dict[str, Any]) -> Result | None:
    """A trained network; None if it is not one of two to compare at equal size."""
    pruned, epochs = settings["prune_method"] != "none", settings["max_epochs"]
    if settings["act_quant"] or pruned == settings["weight_quant"]:
        return None
    shared = {name: settings.get(name) for name in SHARED}
    for name in ("weights", "images_dir"):
        shared[name] = shared[name] and os.path.realpath(shared[name])
    return Result(
        PRUNED if pruned else QUANTISED,
        DENSE_BITS * (1 - settings["s_f"]) if pruned else float(settings["n_bits"]),
        figures["top1"],
        settings["seed"],
        figures["seconds"],
        figures["bits_per_weight"],
        f"{epochs} epoch{'s' * (epochs > 1)} of {figures['training_images']} images in batches "
        f"of {settings['batch_size']}, learning rate {settings['learning_rate']:g}",
        figures.get("classes") or CLASSES_OF.get(settings["dataset"]),
        shared | {name: figures.get(name) for name in SHARED_FIGURES},
        figures.get("dense_top1"),
    )


def no_verdict(quantised: list[Result], pruned: list[Result]) -> str:
    """Why two sides of a size cannot be compared; empty if their difference means something."""
    results = [*quantised, *pruned]
    shared = [one.shared for one in results]
    if any(not each or not each.get("test_images") for each in shared):
        return "the number of test images and the conditions are not known; run `main table` again"
    if (classes := results[0].classes) is None:
        return "the number of classes is not known; train again"
    for name in shared[0]:
        if len({str(each.get(name)) for each in shared}) > 1:
            first, *others = dict.fromkeys(str(each.get(name)) for each in shared)
            name = name.replace("_", " ")
            return f"not trained alike, {name} {first} and {', '.join(others)}; train them alike"
    images, variances, tops = shared[0]["test_images"], [], []
    for method, side in (("quantised", quantised), ("pruned", pruned)):
        tops.append(top1 := statistics.fmean(one.top1 for one in side) / 100)
        variances.append(top1 * (1 - top1) / images)
        chance = 1 / classes
        if top1 <= chance + 2 * math.sqrt(max(variances[-1], chance * (1 - chance) / images)):
            return (
                f"the {method} network, {100 * top1:.2f} % right, is not above chance, "
                f"{100 * chance:g} %; train longer"
            )
    if abs(tops[0] - tops[1]) <= (error := 2 * math.sqrt(sum(variances))):
        return f"{images} test images tell only differences above {100 * error:.2f} points"
    return ""


def conditions(results: Iterable[Result]) -> str:
    """How the networks were trained, with a warning if they were trained differently."""
    methods: dict[str, list[str]] = {}
    for one in results:
        if one.training and one.method not in methods.setdefault(one.training, []):
            methods[one.training].append(one.method)
    if len(methods) == 1:
        return f"trained for {next(iter(methods))}"
    return "not all trained the same way: " + "; ".join(
        f"{' and '.join(names)} for {training}" for training, names in methods.items()
    )


def untrained_results(path: Path) -> list[Result]:
    """From lines `<method> <bits> <reached> <top-1>`. Raises UserError that names the line."""
    results = []
    for number, words in read_lines(Table(path)):
        try:
            results.append(Result(words[0], float(words[1]), float(words[-1])))
        except (ValueError, IndexError):
            text = "expected method, bits, reached, top-1; did an earlier command fail?"
            raise UserError(f"{path}, line {number}: {text}") from None
        if words[0] not in (OBQ, EXACT_METHOD):
            text = f"{words[0]} is neither {OBQ} nor {EXACT_METHOD}"
            raise UserError(f"{path}, line {number}: {text}")
    return results


def dense_accuracies(results: Iterable[Result]) -> list[float]:
    """Top-1 of the networks that training started from: one, if these were the same."""
    return sorted({one.dense_top1 for one in results if one.dense_top1 is not None})


def accuracy_table(results: list[Result]) -> TextTable:
    """The dense network, then every size, largest first."""
    rows = []
    if dense := dense_accuracies(results):
        methods = {one.method for one in results}
        cells = [accuracy_text(dense if method in methods else []) for method in TABLE_COLUMNS]
        rows.append(["dense", "0 %", *cells, "–", "–"])
    for bits in sorted({result.bits for result in results}, reverse=True):
        row = [result for result in results if result.bits == bits]
        cells = [
            accuracy_text([x.top1 for x in row if x.method == method]) for method in TABLE_COLUMNS
        ]
        seeds = sorted({one.seed for one in row if one.seed is not None})
        minutes = sorted(one.seconds / 60 for one in row if one.seconds is not None)
        ends = dict.fromkeys(f"{minutes[i]:.1f}" for i in (0, -1) if minutes)
        cells += [" ".join(map(str, seeds)) or "–", " … ".join(ends) or "–"]
        rows.append([f"{bits:g}", sparsity_percent(bits), *cells])
    head = ["bits", "sparsity", *TABLE_COLUMNS.values(), "seeds", "minutes per run"]
    return TextTable(head, rows)


def accuracy_text(values: list[float]) -> str:
    """The mean, and the range of several; a dash for none."""
    if not values:
        return "–"
    text = f"{sum(values) / len(values):.2f}"
    return text if len(values) == 1 else f"{text} ({min(values):.2f} … {max(values):.2f})"


def draw_accuracies(results: list[Result], title: str) -> Any:
    """Top-1 against size, a line for each method; the dense network is a dashed line."""
    figure, axes = plots.new_figure()
    for top1 in dense_accuracies(results):
        look = {"color": plots.NEUTRAL_COLOUR, "linestyle": "--", "linewidth": 1}
        axes.axhline(top1, **look, label=f"dense: {top1:.2f}")
    for method, look in METHOD_LOOKS.items():
        points: dict[float, list[float]] = {}
        for one in sorted(results, key=lambda result: result.bits):
            if one.method == method:
                points.setdefault(one.bits, []).append(one.top1)
        if points:
            means = [statistics.fmean(values) for values in points.values()]
            axes.plot(list(points), means, **look | {"label": TABLE_COLUMNS[method]})
    sizes = sorted({result.bits for result in results})
    axes.set_xticks(sizes, [f"{bits:g}\n{sparsity_percent(bits)}" for bits in sizes])
    axes.set_xlabel("bits per weight, and the sparsity of FP16 weights of that size")
    axes.set_ylabel("top-1 (%)")
    axes.set_ylim(top=min(axes.get_ylim()[1], 101))
    axes.set_title(textwrap.fill(title, TITLE_WIDTH), fontsize=10)
    plots.draw_legend(axes)
    return figure


def make_table(args: argparse.Namespace) -> None:
    """The command `main table`: print the table; save it and the plot in --out."""
    results = trained_results(args.out, args.architecture, args.dataset)
    if args.untrained is not None:
        results += untrained_results(args.untrained)
    name = model_tag(network_name(args.architecture))
    stem, training = args.out / f"table_{name}_{args.dataset}", conditions(results)
    record = {"architecture": args.architecture, "dataset": args.dataset, "conditions": training}
    record["results"] = [asdict(one) for one in results]
    write_record(stem.with_name(f"{stem.name}.json"), record)
    plots.save_figure(draw_accuracies(results, f"{name} on {args.dataset}, {training}"), stem)
    cli.print_result(f"{accuracy_table(results).markdown()}\n\n{training}")
