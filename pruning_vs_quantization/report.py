"""One page of everything that has been run: is pruning or quantisation better, for your own model?

    python -m pruning_vs_quantization.report [FOLDER …] [--model rn20]

Gathers the results of the study's parts in FOLDER and below into report.html, a page that needs no
network, and report.md. Each part gives, by bit width, a gap

    quantisation − pruning at equal size      above 0: quantisation loses less

in dB of SQNR or in points of accuracy:

    densities       gap of a Gaussian's SQNR, dB                        expected_sqnr
    weights         median over tensors of the gap of SQNR, dB          quant_pruning_weights_sqnr
    layer outputs   median over layers of the best solutions' gap, dB   post_training_*_acts_sqnr
    fine-tuning     gap of mean top-1, points                           main train-compressed, table

The parts are ordered: the later, the closer to what a user wants, so the answer follows the last
one that has been run, and says where others disagree. Gaps within EVEN favour neither. There is no
verdict where both sides were not made under the same conditions, where a trained network is not
better than chance, or where so many test images cannot tell a difference (`no_verdict`).
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file in this folder, as the published README does
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import pruning_vs_quantization  # noqa: F401

import argparse
import base64
import math
import operator
import os
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from modelutils import TORCHVISION_ALIASES
from obc.inputs import files
from obc.solver.errors import UserError, log
from obc.toolkit import cli
from obc.toolkit.leveldb import model_tag
from pruning_vs_quantization import expected_sqnr, plot_weights_sqnr, plots, study_files
from pruning_vs_quantization.expected_error import sparsity_percent
from pruning_vs_quantization.fine_tuning_table import (
    PRUNED,
    QUANTISED,
    Result,
    accuracy_table,
    dense_accuracies,
    no_verdict,
)
from pruning_vs_quantization.layer_study import decibel_text
from pruning_vs_quantization.study_files import TextTable, signed

QUESTION = (
    "b-bit weights take the room of 16-bit weights of which a fraction of b/16 is kept. "
    "Which of the two loses less?"
)
LEGEND = "Quantisation − pruning: above 0, quantisation loses less."
EVEN = {"dB": 0.1, "points": 0.3}  # points: the standard error of a difference on 10,000 images
CLOSEST = 5  # tensors that are named
NUMERIC_CELL = re.compile(r"[+\-−≥ ]*[\d∞]")
SAME_INPUTS = ("weights", "nsamples", "image_size", "calibration_seed", "opt_dim")
SAME_INPUTS += ("num_output_channels", "num_chunks")  # settings of both sides of a layer
LayerPair = tuple[dict[str, Any], dict[str, Any]]  # a layer's summaries, quantised and pruned


@dataclass
class Section:
    """What one part says about one network."""

    part: str  # of REPORT_PARTS
    subject: str  # the network, or a density
    unit: str
    gaps: dict[float, float]  # bits → quantisation − pruning
    text: str
    tables: list[TextTable] = field(default_factory=list)
    pictures: list[tuple[str, bytes]] = field(default_factory=list)  # caption, PNG
    doubts: dict[float, str] = field(default_factory=dict)  # bits → why a gap is no verdict
    models: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        return f"{self.part.capitalize()}: {self.subject}"


def network_tag(name: str) -> str:
    """A network's one name: rn18 is resnet18, path/to/net.py:small is small."""
    return model_tag(TORCHVISION_ALIASES.get(name, name))


# -- the parts -------------------------------------------------------------------------------------


def densities_section(folder: Path, tag: str | None) -> Iterator[Section]:
    """Part 1, which concerns no model."""
    settings, figures = study_files.read_result(folder / "expected_sqnr.json")
    bits = settings["bits"]
    crossings = ", ".join(
        f"{line['crossing']:.1f} at {width} bits"
        for width, line in sorted(figures["kurtosis"].items())
        if line["crossing"] is not None
    )
    text = "Closed-form expected errors, each grid with its range of least error. "
    if crossings:
        text += "Heavy tails favour pruning: on truncated Student-t densities it starts to win at "
        text += f"an excess kurtosis of {crossings}."
    else:
        text += "Pruning does not win at any of the kurtoses considered."
    ahead = "How much quantisation is ahead, against kurtosis"
    pictures = [
        ("Expected SQNR of densities", plots.png_bytes(expected_sqnr.draw_sqnr(figures, bits))),
        (ahead, plots.png_bytes(expected_sqnr.draw_kurtosis(figures, bits))),
    ]
    gaussian = figures["densities"]["Gaussian"]["bits"].items()
    gaps = {int(width): x["quant_sqnr"] - x["pruning_sqnr"] for width, x in gaussian}
    tables = [expected_sqnr.sqnr_table(figures, bits)]
    subject = "a Gaussian" + ", balanced grids" * bool(settings.get("balanced"))
    yield Section("densities", subject, "dB", gaps, text, tables, pictures)


def weights_section(folder: Path, tag: str | None) -> Iterator[Section]:
    """Part 2."""
    every, _ = plot_weights_sqnr.read_tensors(folder)
    every = [x for x in every if tag in (None, network_tag(x.model))]
    if not every:
        return
    models, subject = sorted({x.model for x in every}), plot_weights_sqnr.networks_text(every)
    text = (
        f"Every Conv2d and Linear tensor of {', '.join(models)}, rounded to FP16; one grid per "
        "tensor, with the range of least squared error, against magnitude pruning. The second "
        "table names the tensors on which pruning comes closest."
    )
    sizes, gaps = [], {}
    for bits, tensors in plot_weights_sqnr.tensors_by_bits(every).items():
        *sides, gaps[bits] = (
            statistics.median(getattr(tensor, name) for tensor in tensors)
            for name in ("quantised", "pruned", "gap")
        )
        row = [f"{bits}", sparsity_percent(bits), f"{len(tensors)}", *(f"{x:.2f}" for x in sides)]
        sizes.append([*row, f"{sum(tensor.gap < 0 for tensor in tensors)}"])
    closest = [
        [x.model, x.layer, f"{x.bits}", "–" if x.kurtosis is None else f"{x.kurtosis:.1f}"]
        + [signed(x.gap, "dB")]
        for x in sorted(every, key=lambda tensor: tensor.gap)[:CLOSEST]
    ]
    head = ["bits", "sparsity", "tensors", "quantising, median dB", "pruning, median dB"]
    tables = [TextTable([*head, "pruning better in"], sizes)]
    head = ["model", "tensor", "bits", "excess kurtosis", "quantisation − pruning"]
    tables.append(TextTable(head, closest))
    caption = "A dot per tensor; below the diagonal quantisation wins"
    pictures = [(caption, plots.png_bytes(plot_weights_sqnr.draw_tensors(every, subject)))]
    if any(tensor.kurtosis is not None for tensor in every):
        figure = plot_weights_sqnr.draw_tensor_kurtosis(every, subject)
        pictures.append(("Both against the kurtosis of the tensor", plots.png_bytes(figure)))
    yield Section("weights", subject, "dB", gaps, text, tables, pictures, models=models)


def layer_outputs_section(folder: Path, tag: str | None) -> Iterator[Section]:
    """Part 3: layers that both studies have covered."""
    networks: Any = defaultdict(lambda: defaultdict(dict))  # … → layer, bits → kind → a result
    for path in sorted(folder.iterdir()):
        if LAYER_FILES.fullmatch(path.name):
            settings, figures = study_files.read_result(path)
            if tag in (None, network_tag(settings["model"])) and figures["summary"]:
                layers = networks[settings["model"], settings["dataset"]]
                result = figures["summary"], settings
                layers[figures["layer"], figures["bits"]][figures["kind"]] = result
    for (name, dataset), layers in networks.items():
        pairs: dict[tuple[str, int], LayerPair] = {}
        one_sided = sum(len(kinds) < 2 for kinds in layers.values())
        for layer, bits in sorted(layers, key=natural_order):
            if len(kinds := layers[layer, bits]) < 2:
                continue
            (quantised, settings), (pruned, others) = kinds["quantisation"], kinds["pruning"]
            if unlike := [x for x in SAME_INPUTS if settings.get(x) != others.get(x)]:
                text = "%s of %s at %d bits left out: quantised and pruned with another %s"
                log.warning(text, layer, name, bits, unlike[0])
            else:
                pairs[layer, bits] = quantised, pruned
        if one_sided:
            text = "%s: %d of %d layers and bit widths are quantised or pruned only, and left out; "
            text += "to compare, run post_training_quant_acts_sqnr and …_pruning_acts_sqnr"
            log.warning(text, name, one_sided, len(layers))
        if not pairs:
            continue
        by_bits = {
            bits: [pair for (_, width), pair in pairs.items() if width == bits]
            for bits in sorted({bits for _, bits in pairs}, reverse=True)
        }
        gaps = {bits: statistics.median(map(output_gap, x)) for bits, x in by_bits.items()}
        text = (
            "The best known solutions of the layers' least-squares problems on real inputs; no "
            "solution can exceed their limits. One side is proven better where its best exceeds "
            "the other's limit. Below optimum: the mean loss of the toolkit's own answer against "
            "the best one."
        )
        tables, subject = [sizes_table(by_bits), layers_table(pairs)], f"{name} on {dataset}"
        caption = "From the best known solution to the proven limit, by layer"
        drawn = folder / f"{model_tag(name)}_layer_outputs.png"
        pictures = [(caption, drawn.read_bytes())] if drawn.exists() else []
        yield Section("layer outputs", subject, "dB", gaps, text, tables, pictures, models=[name])


def natural_order(layer: tuple[str, int]) -> tuple[list[str | int], int]:
    """A key that sorts features.2 before features.10, and many bits before few."""
    words = re.split(r"(\d+)", layer[0])  # text and numbers, in turns
    return [int(word) if i % 2 else word for i, word in enumerate(words)], -layer[1]


def finite_or_inf(summary: dict[str, Any], key: str) -> float:
    """A figure in dB; null is infinite."""
    return math.inf if summary[key] is None else summary[key]


def output_gap(pair: LayerPair) -> float:
    """The difference of the best solutions' SQNR; 0 if both have no error."""
    quantised, pruned = (finite_or_inf(side, "sqnr_best") for side in pair)
    return 0.0 if quantised == pruned else quantised - pruned


def sizes_table(by_bits: dict[int, list[LayerPair]]) -> TextTable:
    """A row per bit width."""
    head = ["bits", "sparsity", "layers", "quantisation − pruning, median"]
    head += ["quantisation proven better in", "pruning proven better in"]
    head += ["OBQ below optimum", "ExactOBS below optimum"]
    rows = []
    for bits, pairs in by_bits.items():
        median = signed(statistics.median(map(output_gap, pairs)), "dB")
        row = [f"{bits}", sparsity_percent(bits), f"{len(pairs)}", median]
        for side in (0, 1):
            best = (finite_or_inf(pair[side], "sqnr_best") for pair in pairs)
            limits = (finite_or_inf(pair[1 - side], "sqnr_limit") for pair in pairs)
            row.append(f"{sum(map(operator.gt, best, limits))}")
        for side in (0, 1):
            own = statistics.fmean(pair[side]["own_gap_mean"] or 0.0 for pair in pairs)
            row.append(f"{own:.2f} dB")
        rows.append(row)
    return TextTable(head, rows)


def layers_table(pairs: dict[tuple[str, int], LayerPair]) -> TextTable:
    """A row per layer and bit width; `best … limit` where the two differ."""
    head = ["layer", "bits", "proven optimal", "quantised, dB", "pruned, dB"]
    head += ["quantisation − pruning", "OBQ below optimum, dB", "ExactOBS below optimum, dB"]
    rows = []
    for (layer, bits), pair in pairs.items():
        intervals, own_gaps = [], []
        for side in pair:
            ends = [decibel_text(side[key]) for key in ("sqnr_best", "sqnr_limit")]
            intervals.append(" … ".join(dict.fromkeys(ends)))
            more = "≥ " if side["proven"] < side["subproblems"] else ""
            own_gaps.append(more + decibel_text(side["own_gap_mean"]))
        proven, total = (sum(side[key] for side in pair) for key in ("proven", "subproblems"))
        cells = [layer, f"{bits}", f"{proven} of {total}", *intervals]
        rows.append([*cells, signed(output_gap(pair), "dB"), *own_gaps])
    return TextTable(head, rows, folded="Layer by layer")


def fine_tuning_section(folder: Path, tag: str | None) -> Iterator[Section]:
    """Part 4: the tables that `main table` has made."""
    for path in sorted(folder.glob("table_*.json")):
        record = study_files.read_json(path)
        name = record["architecture"].removesuffix("_quantized")
        if tag not in (None, network_tag(name)):
            continue
        results = [Result(**one) for one in record["results"]]
        gaps, doubts = {}, {}
        for bits in sorted({one.bits for one in results}, reverse=True):
            sides = [
                [one for one in results if (one.bits, one.method) == (bits, method)]
                for method in (QUANTISED, PRUNED)
            ]
            if all(sides):
                quantised, pruned = (statistics.fmean(x.top1 for x in side) for side in sides)
                gaps[bits] = quantised - pruned
                if why := no_verdict(*sides):
                    doubts[bits] = why
        dense = "".join(f"dense {top1:.2f}; " for top1 in dense_accuracies(results))
        text = f"Top-1 in percent; {dense}{record['conditions']}."
        drawn, subject = path.with_suffix(".png"), f"{name} on {record['dataset']}"
        pictures = [("Top-1 against size", drawn.read_bytes())] if drawn.exists() else []
        of_table = [accuracy_table(results)], pictures, doubts, [name]
        yield Section("fine-tuning", subject, "points", gaps, text, *of_table)


STUDY = "python -m pruning_vs_quantization."
LAYER_FILES = re.compile(r".+_\d_bits_(quantisation|pruning)\.json")
REPORT_PARTS: dict[str, tuple[str | re.Pattern, Callable[..., Iterator[Section]], str]] = {
    # by rising weight in the answer: names of its files, its sections, the command that makes them
    "densities": (r"expected_sqnr\.json", densities_section, "expected_sqnr"),
    "weights": (
        plot_weights_sqnr.FILE_NAME,
        weights_section,
        "quant_pruning_weights_sqnr --models MODEL",
    ),
    "layer outputs": (
        LAYER_FILES,
        layer_outputs_section,
        "post_training_quant_acts_sqnr quant-bounds-data-opt … "
        "and post_training_pruning_acts_sqnr …",
    ),
    "fine-tuning": (
        r"table_.+\.json",
        fine_tuning_section,
        "main train-compressed … and … table …",
    ),
}


def study_sections(folders: list[Path], model: str | None) -> list[Section]:
    """Everything on a model, or on any, in these folders and all below that are not hidden.

    Raises UserError for files that are not results.
    """
    places: dict[str, set[Path]] = {part: set() for part in REPORT_PARTS}
    for folder in folders:
        for where, below, names in os.walk(folder):
            below[:] = [name for name in below if not name.startswith(".")]
            for part, (pattern, _, _) in REPORT_PARTS.items():
                if any(re.fullmatch(pattern, name) for name in names):
                    places[part].add(Path(where))
    sections: dict[tuple[str, str], Section] = {}
    for part, folder in ((part, x) for part, every in places.items() for x in sorted(every)):
        try:
            for section in REPORT_PARTS[part][1](folder, model and network_tag(model)):
                if (part, section.subject) in sections:  # with other settings
                    section.subject += f", {folder}"
                sections[part, section.subject] = section
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{folder}: a result of the part {part} is not as its command writes "
                f"it ({type(error).__name__}: {error}); run it again with --restart"
            ) from None
    return list(sections.values())


# -- the answer ------------------------------------------------------------------------------------


def better(section: Section, bits: float) -> str:
    """Which of the two a section favours at a size; empty where its gap is no verdict."""
    if bits in section.doubts:
        return ""
    gap = section.gaps[bits]
    if abs(gap) <= EVEN[section.unit]:
        return "neither"
    return "quantisation" if gap > 0 else "pruning"


def join_words(words: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([*([", ".join(words[:-1])] if words[1:] else []), words[-1]])


def answer(sections: list[Section]) -> str:
    """The study's question answered in a sentence or two, and where earlier parts disagree."""
    sections = [section for section in sections if section.gaps]
    if not sections:
        return "No size has been both quantised and pruned yet, so there is nothing to compare."
    last = sections[-1]

    def sizes(section: Section, bits: list[float]) -> str:
        return join_words([f"{b:g} bits ({signed(section.gaps[b], section.unit)})" for b in bits])

    by_winner: dict[str, list[float]] = {}
    for bits in sorted(last.gaps, reverse=True):
        by_winner.setdefault(better(last, bits), []).append(bits)
    doubtful = by_winner.pop("", [])
    verdicts = [f"{winner} is better at {sizes(last, bits)}" for winner, bits in by_winner.items()]
    for why in dict.fromkeys(last.doubts[bits] for bits in doubtful):
        same = [bits for bits in doubtful if last.doubts[bits] == why]
        verdicts.append(f"no verdict at {sizes(last, same)}, since {why}")
    heads = {"quantisation": "Quantise.", "pruning": "Prune.", "neither": "Either will do."}
    head = heads[next(iter(by_winner))] if len(by_winner) == 1 else "It depends on the size."
    head = head if by_winner else "No verdict."
    text = f"{head} By {last.part}, {last.subject}: {'; '.join(verdicts)}."
    text = text.replace("neither is better", "neither is clearly better")
    dissent = []
    for section in sections[:-1]:
        same = [bits for bits in section.gaps if bits in last.gaps]
        other = [x for x in same if better(section, x) not in ("", better(last, x))]
        if other:
            dissent.append(f"{section.part}, {section.subject}, at {sizes(section, other)}")
    if dissent:
        return f"{text} Otherwise by {'; '.join(dissent)}."
    agree = bool(sections[:-1] and by_winner)
    return text + (" The other parts that have been run agree." if agree else "")


def summary_table(sections: list[Section]) -> TextTable:
    """Quantisation − pruning, a row per size and a column per part."""
    sections = [section for section in sections if section.gaps]
    rows = []
    for bits in sorted({bits for section in sections for bits in section.gaps}, reverse=True):
        gaps = (signed(section.gaps.get(bits), section.unit) for section in sections)
        rows.append([f"{bits:g}", sparsity_percent(bits), *gaps])
    return TextTable(["bits", "sparsity", *(section.title for section in sections)], rows)


# -- the page --------------------------------------------------------------------------------------


def parts_not_run(sections: list[Section]) -> list[tuple[str, str]]:
    """The parts without results, and the commands to run for them."""
    done = {section.part for section in sections}
    return [(part, STUDY + x) for part, (*_, x) in REPORT_PARTS.items() if part not in done]


def text_columns(table: TextTable) -> list[bool]:
    """Which columns hold words rather than numbers."""
    columns = [
        [row[i] for row in table.rows if row[i] not in ("", "–")] for i in range(len(table.head))
    ]
    return [any(cells) and not any(map(NUMERIC_CELL.match, cells)) for cells in columns]


def html_page(title: str, sections: list[Section]) -> str:
    """The whole page, with its pictures."""
    jinja2 = plots.study_package("jinja2")
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["base64"] = lambda png: base64.b64encode(png).decode()
    environment.filters["width"] = lambda png: int.from_bytes(png[16:20], "big") * 96 // plots.DPI
    return environment.get_template("report.html.jinja").render(
        title=title,
        question=QUESTION,
        answer=answer(sections),
        summary=summary_table(sections),
        legend=LEGEND,
        sections=sections,
        missing=parts_not_run(sections),
        text_columns=text_columns,
    )


def markdown_page(title: str, sections: list[Section]) -> str:
    """The same without pictures."""
    paragraphs = [f"# {title}", QUESTION, f"**{answer(sections)}**"]
    paragraphs += [summary_table(sections).markdown(), LEGEND]
    for section in sections:
        tables = [table.markdown() for table in section.tables]
        paragraphs += [f"## {section.title}", section.text, *tables]
    paragraphs += [f"Not run: {part}. `{command}`" for part, command in parts_not_run(sections)]
    return "\n\n".join(paragraphs) + "\n"


def run(args: argparse.Namespace) -> None:
    folders = args.folders or [study_files.PLOTS_DATA]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
    sections = study_sections(folders, None if args.model == "all" else args.model)
    names = sorted({network_tag(name) for section in sections for name in section.models})
    where = " and ".join(map(str, folders))
    if len(names) > 1 and args.model is None:
        first = ", ".join(names[:8]) + f" and {len(names) - 8} more" * (len(names) > 8)
        raise UserError(f"{where}: results of {first}; pass --model MODEL, or --model all")
    if not sections or (args.model not in (None, "all") and not names):
        whose = f" for {args.model}" if args.model else ""
        command = STUDY + REPORT_PARTS["weights"][2]
        raise UserError(f"{where}: no results of the study{whose}; begin with {command}")
    title, out = "Pruning or quantisation?", args.out or folders[0]
    title += f" {sections[-1].subject}" if len(names) == 1 else ""
    for name, page in {"report.md": markdown_page, "report.html": html_page}.items():
        content = page(title, sections).encode()
        with files.atomic_write(out / name) as file:
            file.write(content)
    cli.print_result(f"{summary_table(sections).markdown()}\n\n{answer(sections)}")
    log.info("page: %s", out / "report.html")


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="report",
        description=__doc__.splitlines()[0],
        example="python -m pruning_vs_quantization.report plots_data",
    )
    add = parser.add_argument
    text = f"where results are, also in folders below (default: {study_files.PLOTS_DATA})"
    add("folders", metavar="FOLDER", nargs="*", type=Path, help=text)
    text = "the model whose results are shown, if there are several; all: every one"
    add("--model", metavar="MODEL", help=text)
    text = "where report.html and report.md go (default: the first FOLDER)"
    add("--out", metavar="DIR", type=Path, help=text)
    return parser


def main(argv: list[str] | None = None) -> int:
    return cli.command(build_parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
