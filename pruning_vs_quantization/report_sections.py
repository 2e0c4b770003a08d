"""What the four parts of the study have left in a folder, as sections of its page.

    densities       gap of a Gaussian's SQNR, dB                        expected_sqnr
    weights         median over tensors of the gap of SQNR, dB          quant_pruning_weights_sqnr
    layer outputs   median over layers of the best solutions' gap, dB   post_training_*_acts_sqnr
    fine-tuning     gap of mean top-1, points                           main train-compressed, table

A gap is that of quantisation over pruning at equal size, by bit width (`report_page.py`).
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelutils import TORCHVISION_ALIASES
from obc.solver.errors import UserError
from obc.toolkit.leveldb import model_tag
from pruning_vs_quantization import expected_sqnr, plot_weights_sqnr, plots, study_files
from pruning_vs_quantization.expected_error import sparsity_percent
from pruning_vs_quantization.fine_tuning_table import PRUNED, QUANTISED, Result, markdown
from pruning_vs_quantization.report_page import COMMANDS, Section, Table, signed

CLOSEST = 5  # tensors that are named
Pair = tuple[dict[str, Any], dict[str, Any]]  # a layer's summaries, quantised and pruned


def gather(folder: Path, model: str | None) -> list[Section]:
    """Whatever has been run, in the order of the answer's weight. Raises UserError."""
    sections: list[Section] = []
    for part, of in zip(COMMANDS, (densities, weights, layer_outputs, fine_tuning), strict=True):
        try:
            sections += of(folder, model)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{folder}: a result of the part {part} is not as its command writes "
                f"it ({type(error).__name__}: {error}); run it again with --restart"
            ) from None
    return sections


def same_model(name: str, wanted: str | None) -> bool:
    """Whether a result is of the model that was asked for: rn18 is resnet18."""
    names = {TORCHVISION_ALIASES.get(of, of) for of in (name, wanted or name)}
    return len(names) == 1


def densities(folder: Path, model: str | None) -> Iterator[Section]:  # of no model
    """Part 1."""
    path = folder / "expected_sqnr" / "expected_sqnr.json"
    if not path.exists():
        return
    settings, figures = study_files.read_result(path)
    bits = settings["bits"]
    gaussian = figures["densities"]["Gaussian"]["bits"]
    crossings = [
        f"{of['crossing']:.1f} at {width} bits"
        for width, of in sorted(figures["kurtosis"].items())
        if of["crossing"] is not None
    ]
    text = "Closed-form expected errors, each grid with its range of least error. "
    text += (
        "Heavy tails favour pruning: on truncated Student-t densities it starts to win at an "
        f"excess kurtosis of {', '.join(crossings)}."
        if crossings
        else "Pruning starts to win at none of the kurtoses looked at."
    )
    yield Section(
        "densities",
        "a Gaussian",
        "dB",
        {int(width): of["quant_sqnr"] - of["pruning_sqnr"] for width, of in gaussian.items()},
        text,
        [Table.parse(expected_sqnr.table(figures, bits))],
        [
            ("Expected SQNR of densities", plots.png_bytes(expected_sqnr.draw_sqnr(figures, bits))),
            (
                "How much quantisation is ahead, against kurtosis",
                plots.png_bytes(expected_sqnr.draw_kurtosis(figures, bits)),
            ),
        ],
    )


@dataclass(frozen=True)
class Tensor:
    """A weight tensor at one bit width, with finite figures."""

    model: str
    bits: int
    layer: str
    figures: dict[str, Any]

    @property
    def gap(self) -> float:
        return self.figures["quant_sqnr"] - self.figures["pruning_sqnr"]


def tensors(folder: Path, model: str | None) -> Iterator[Tensor]:
    for path in sorted(folder.glob("*_bits_mse.json")):
        named = plot_weights_sqnr.FILE_NAME.fullmatch(path.name)
        if named and same_model(named["model"], model_tag(model) if model else None):
            for layer, figures in study_files.read_json(path).items():
                if None not in (figures["quant_sqnr"], figures["pruning_sqnr"]):
                    yield Tensor(named["model"], int(named["bits"]), layer, figures)


def weights(folder: Path, model: str | None) -> Iterator[Section]:
    """Part 2."""
    found = list(tensors(folder / "weights_sqnr", model))
    if not found:
        return
    models = sorted({tensor.model for tensor in found})
    by_bits: dict[int, list[Tensor]] = {}
    for tensor in sorted(found, key=lambda tensor: -tensor.bits):
        by_bits.setdefault(tensor.bits, []).append(tensor)
    rows = []
    for bits, of in by_bits.items():
        medians = [
            statistics.median(tensor.figures[key] for tensor in of)
            for key in ("quant_sqnr", "pruning_sqnr")
        ]
        worse = sum(tensor.gap < 0 for tensor in of)
        rows.append(
            [
                f"{bits}",
                sparsity_percent(bits),
                f"{len(of)}",
                *(f"{value:.2f}" for value in medians),
                f"{worse}",
            ]
        )
    closest = sorted(found, key=lambda tensor: tensor.gap)[:CLOSEST]
    points = {
        bits: [(t.figures["pruning_sqnr"], t.figures["quant_sqnr"]) for t in of]
        for bits, of in by_bits.items()
    }
    yield Section(
        "weights",
        models[0] if len(models) == 1 else f"{len(models)} models",
        "dB",
        {bits: statistics.median(tensor.gap for tensor in of) for bits, of in by_bits.items()},
        f"Every Conv2d and Linear tensor of {', '.join(models)}, rounded to FP16; one grid for a "
        "tensor, with the range of least squared error, against magnitude pruning. The second "
        "table names the tensors on which pruning comes closest.",
        [
            Table(
                [
                    "bits",
                    "sparsity",
                    "tensors",
                    "quantising, median dB",
                    "pruning, median dB",
                    "pruning better in",
                ],
                rows,
            ),
            Table(
                ["model", "tensor", "bits", "excess kurtosis", "quantisation − pruning"],
                [
                    [
                        t.model,
                        t.layer,
                        f"{t.bits}",
                        f"{t.figures['sample_kurtosis']:.1f}",
                        signed(t.gap, "dB"),
                    ]
                    for t in closest
                ],
            ),
        ],
        [
            (
                "A dot per tensor; above the diagonal quantisation loses less",
                plots.png_bytes(plot_weights_sqnr.draw(points)),
            )
        ],
    )


def layer_outputs(folder: Path, model: str | None) -> Iterator[Section]:
    """Part 3: layers that both studies have looked at."""
    networks: dict[tuple[str, str], dict[tuple[str, int], dict[str, Any]]] = {}
    for path in sorted((folder / "layer_outputs").glob("*_bits_*.json")):
        settings, figures = study_files.read_result(path)
        if same_model(settings["model"], model) and figures["summary"]:
            layers = networks.setdefault((settings["model"], settings["dataset"]), {})
            of = layers.setdefault((figures["layer"], figures["bits"]), {})
            of[figures["kind"]] = figures["summary"]
    for (name, dataset), layers in networks.items():
        both = {
            key: (of["quantisation"], of["pruning"])
            for key, of in sorted(layers.items(), key=lambda item: in_order(*item[0]))
            if len(of) == 2
        }
        if not both:
            continue
        by_bits: dict[int, list[Pair]] = {}
        for bits in sorted({bits for _, bits in both}, reverse=True):
            by_bits[bits] = [pair for key, pair in both.items() if key[1] == bits]
        pictures = sorted((folder / "layer_outputs").glob(f"{model_tag(name)}_layer_outputs.png"))
        yield Section(
            "layer outputs",
            f"{name} on {dataset}",
            "dB",
            {bits: median_gap(of) for bits, of in by_bits.items()},
            "The best solutions of the layers' least-squares problems on real inputs; nothing can "
            "pass their limits. One side is proven better where its best passes the other's "
            "limit. Below optimum: what the toolkit's own answer loses to the best one, mean.",
            [output_table(by_bits), layer_table(both)],
            [
                ("From the best solution found to the proven limit, by layer", path.read_bytes())
                for path in pictures
            ],
        )


def in_order(layer: str, bits: int) -> tuple[list[str | int], int]:
    """A key that sorts features.2 before features.10, and many bits before few."""
    words = re.split(r"(\d+)", layer)  # text and numbers, in turns
    return [int(word) if i % 2 else word for i, word in enumerate(words)], -bits


def sqnr_of(summary: dict[str, Any], key: str) -> float:
    """In dB; a null is infinite."""
    return math.inf if summary[key] is None else summary[key]


def output_gap(quantised: dict[str, Any], pruned: dict[str, Any]) -> float:
    """The difference of the best solutions' SQNR; 0 where both lose nothing."""
    ours, theirs = sqnr_of(quantised, "sqnr_best"), sqnr_of(pruned, "sqnr_best")
    return 0.0 if ours == theirs else ours - theirs


def median_gap(pairs: list[Pair]) -> float:
    return statistics.median(output_gap(*pair) for pair in pairs)


def output_table(by_bits: dict[int, list[Pair]]) -> Table:
    """A row per bit width."""
    rows = []
    for bits, of in by_bits.items():
        proven = [
            sum(
                sqnr_of(ours, "sqnr_best") > sqnr_of(theirs, "sqnr_limit") for ours, theirs in pairs
            )
            for pairs in (of, [(pruned, quantised) for quantised, pruned in of])
        ]
        own = [
            statistics.fmean(summary["own_gap_mean"] or 0.0 for summary in side)
            for side in zip(*of, strict=True)
        ]
        rows.append(
            [
                f"{bits}",
                sparsity_percent(bits),
                f"{len(of)}",
                signed(median_gap(of), "dB"),
                *map(str, proven),
                *(f"{value:.2f} dB" for value in own),
            ]
        )
    return Table(
        [
            "bits",
            "sparsity",
            "layers",
            "quantisation − pruning, median",
            "quantisation proven better in",
            "pruning proven better in",
            "OBQ below optimum",
            "ExactOBS below optimum",
        ],
        rows,
    )


def layer_table(both: dict[tuple[str, int], Pair]) -> Table:
    """A row per layer and bit width; `best … limit` where the two are not one."""
    rows = []
    for (layer, bits), pair in both.items():
        proven, of = (sum(side[key] for side in pair) for key in ("proven", "subproblems"))
        rows.append(
            [
                layer,
                f"{bits}",
                f"{proven} of {of}",
                *map(interval, pair),
                signed(output_gap(*pair), "dB"),
                *map(own_gap, pair),
            ]
        )
    return Table(
        [
            "layer",
            "bits",
            "proven optimal",
            "quantised, dB",
            "pruned, dB",
            "quantisation − pruning",
            "OBQ below optimum, dB",
            "ExactOBS below optimum, dB",
        ],
        rows,
        folded="Layer by layer",
    )


def interval(summary: dict[str, Any]) -> str:
    """From the best SQNR found to the limit, in dB."""
    ends = [
        f"{sqnr_of(summary, key):.2f}".replace("inf", "∞") for key in ("sqnr_best", "sqnr_limit")
    ]
    return " … ".join(dict.fromkeys(ends))


def own_gap(summary: dict[str, Any]) -> str:
    """What the toolkit's own answer loses to the best one; more, if that is not proven optimal."""
    mean = math.inf if summary["own_gap_mean"] is None else summary["own_gap_mean"]
    more = "≥ " if summary["proven"] < summary["subproblems"] else ""
    return more + f"{mean:.2f}".replace("inf", "∞")


def fine_tuning(folder: Path, model: str | None) -> Iterator[Section]:
    """Part 4: the tables that `main table` has made."""
    for path in sorted((folder / "fine_tuning").glob("table_*.json")):
        record = study_files.read_json(path)
        name = record["architecture"].removesuffix("_quantized")
        if not same_model(name, model):
            continue
        results = [Result(**one) for one in record["results"]]
        means = {method: mean_top1(results, method) for method in (QUANTISED, PRUNED)}
        gaps = {
            bits: means[QUANTISED][bits] - means[PRUNED][bits]
            for bits in sorted(means[QUANTISED], reverse=True)
            if bits in means[PRUNED]
        }
        picture = path.with_suffix(".png")
        yield Section(
            "fine-tuning",
            f"{name} on {record['dataset']}",
            "points",
            gaps,
            f"Top-1 in percent; {record['conditions']}.",
            [Table.parse(markdown(results))],
            [("Top-1 against size", picture.read_bytes())] if picture.exists() else [],
        )


def mean_top1(results: list[Result], method: str) -> dict[float, float]:
    """By bits a weight."""
    found: dict[float, list[float]] = {}
    for one in results:
        if one.method == method:
            found.setdefault(one.bits, []).append(one.top1)
    return {bits: statistics.fmean(values) for bits, values in found.items()}
