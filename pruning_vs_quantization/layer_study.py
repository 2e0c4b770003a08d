"""Layer by layer: part 3 of the study, behind both post_training_*_acts_sqnr commands.

Kuzmin et al. (arXiv 2307.02973), section 5.1, with the subproblems of layer_problem.py, one for
each selected output channel and chunk of inputs. A layer at a bit width is one result file, and is
skipped if it exists:

    <out>/<model>_<layer>_<b>_bits_<quantisation|pruning>.json
        subproblems   a record each (layer_problem.SubproblemRecord), with row and columns
        summary       of the layer (`layer_summary`)

SQNRs are those of the chunks together: 10·log₁₀ of the sum of the signals over the sum of the
errors, so that sums of proven bounds bound the whole:

    sqnr_best = that of the best known solutions  ≤  the optimum's  ≤  sqnr_limit, of the bounds

The gap of a heuristic is what an optimal solution would gain over it, in dB: at least
error / best error, at most error / bound; if all subproblems are proven, the two are the same.

The picture is Fig. 4 of the paper with both sides proven: for each layer, from the first on top to
the last, an interval from sqnr_best to sqnr_limit, for quantising and for pruning, a panel per bit
width; the toolkit's own answers are small circles. It shows all results in the folder.
"""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from modelutils import find_layers
from obc.inputs import files
from obc.solver.errors import UserError, log
from obc.solver.layers import view
from obc.solver.progress import progress
from obc.toolkit import cli
from obc.toolkit.calibrate import prove_layers
from obc.toolkit.fingerprints import content_hash
from obc.toolkit.leveldb import model_tag
from obc.toolkit.session import IMAGE_OPTIONS, Session, common_options
from pruning_vs_quantization import layer_problem, plots, study_files
from pruning_vs_quantization.expected_error import size_text, sqnr_db
from pruning_vs_quantization.layer_problem import Chunk
from pruning_vs_quantization.proof import Reals, SearchLimits

MOST_UNKNOWNS = 256  # more cannot be solved with a proof
OF_GRIDS = ("range_search_method", "per_channel", "balanced")  # do not matter to pruning
SETTINGS = ("model", "dataset", "nsamples", "opt_dim", "num_output_channels", "num_chunks")
SETTINGS += ("method", "time_limit", "node_limit", *OF_GRIDS)
INCHES_A_LAYER, INCHES_A_PANEL = 0.26, 2.2
HEURISTICS = {  # by kind: name in the files → heading; the last one is the toolkit's own
    "quantisation": {
        "nearest": "nearest",
        "gptq": "GPTQ",
        "gptq_act_order": "GPTQ, act order",
        "obq": "OBQ",
    },
    "pruning": {
        "magnitude": "magnitude",
        "magnitude_least_squares": "magnitude + LS",
        "exact_obs": "ExactOBS",
    },
}
FIXED = ("nrounds", "memory", "weights_key", "labels", *IMAGE_OPTIONS)  # common options: no choice
STYLES = {  # by kind: colour, marker, shift from the layer's place
    "quantisation": (plots.QUANTISATION_COLOUR, "s", -0.12),
    "pruning": (plots.PRUNING_COLOUR, "D", 0.12),
}


# -- a layer ---------------------------------------------------------------------------------------


def layer_figures(
    args: argparse.Namespace,
    name: str,
    layer: nn.Module,
    bits: int,
    places: list[tuple[int, Chunk]],  # rows and chunks
    moments: Mapping[Chunk, Reals],
) -> dict[str, Any]:
    """Every subproblem of a layer at a bit width, and their summary."""
    kind, limits = args.kind, SearchLimits(args.time_limit, args.node_limit or math.inf)
    if kind == "quantisation":
        grid = args.balanced, args.per_channel, args.range_search_method
        steps = layer_problem.grid_steps(layer.weight, bits, *grid)
    records, silent = [], 0
    every = layer_problem.subproblems(layer, places, moments)
    for sub in progress(f"{name}, {bits} bits", every):
        if not sub.signal > 0:
            silent += 1
            continue
        if kind == "pruning":
            record = layer_problem.pruned(sub.G, sub.w, bits, args.method, limits)
        else:
            generator = np.random.default_rng([args.seed, bits, sub.row, sub.chunk.start])
            grid = float(steps[sub.row]), bits, args.balanced
            record = layer_problem.quantised(sub.G, sub.w, *grid, args.method, limits, generator)
        place = {"row": sub.row, "start": sub.chunk.start, "stop": sub.chunk.stop}
        records.append(place | record.as_json())
        if args.verbose_solvers:
            line = (
                f"{name}, {bits} bits, channel {sub.row}, inputs {sub.chunk.start}–{sub.chunk.stop}"
                f": error {record.error:.6g}, proven above {record.lower:.6g}"
            )
            if record.relaxation is not None:
                line += f" (relaxation {record.relaxation:.6g})"
            if record.nodes:
                line += f" {record.nodes} nodes in {record.seconds:.3f} s"
            log.info("%s", line + ("" if records[-1]["proven"] else ", not proven optimal"))
    if silent:
        skipped = "%s: %d of %d chunks skipped, their output is always zero"
        log.info(skipped, name, silent, len(every))
    figures = {"kind": kind, "layer": name, "bits": bits, "summary": layer_summary(records, kind)}
    return figures | {"silent": silent, "subproblems": records}


def layer_summary(records: list[dict[str, Any]], kind: str) -> dict[str, Any] | None:
    """SQNRs in dB of all chunks together, and how far from optimal the toolkit's answers are."""
    if not records:
        return None
    signal, best, bound = (
        sum(record[key] for record in records) for key in ("signal", "error", "lower")
    )
    names, own = records[0]["errors"], list(HEURISTICS[kind])[-1]
    errors = {name: sum(record["errors"][name] for record in records) for name in names}
    gaps = [sqnr_db(record["errors"][own], record["error"]) for record in records]
    gaps = [0.0 if math.isnan(gap) else gap for gap in gaps]  # both without error
    seconds = [record["seconds"] for record in records]
    return {
        "subproblems": len(records),
        "proven": sum(record["proven"] for record in records),
        "sqnr": {name: sqnr_db(signal, error) for name, error in errors.items()},
        "sqnr_best": sqnr_db(signal, best),
        "sqnr_limit": sqnr_db(signal, bound),
        "own": own,
        "own_gap_mean": sum(gaps) / len(gaps),
        "own_gap_worst": max(gaps),
        "seconds_median": float(np.median(seconds)),
        "seconds_95": float(np.percentile(seconds, 95)),
    }


def layer_row(figures: Mapping[str, Any]) -> str:
    """A layer at a bit width."""
    layer, names = figures["summary"], HEURISTICS[figures["kind"]]
    start = [figures["layer"], f"{figures['bits']}"]
    if layer is None:
        return study_files.markdown_row([*start, "no output"]) + " |" * (len(names) + 4)
    unproven = "≥ " if layer["proven"] < layer["subproblems"] else ""
    sqnrs = [*(layer["sqnr"][name] for name in names), layer["sqnr_best"], layer["sqnr_limit"]]
    gaps = [unproven + decibel_text(layer[key]) for key in ("own_gap_mean", "own_gap_worst")]
    cells = [*start, f"{layer['proven']} of {layer['subproblems']}", *map(decibel_text, sqnrs)]
    return study_files.markdown_row([*cells, *gaps])


def decibel_text(value: float | None) -> str:
    """`4.13`; JSON has null for infinity."""
    return "∞" if value is None or value == math.inf else f"{value:.2f}"


# -- the picture -----------------------------------------------------------------------------------


def draw_layers(folder: Path, model: str, layers: list[str]) -> None:
    """Draw <model>_layer_outputs.png and .pdf of all results in a folder; layers in their order."""
    stem = model_tag(model)
    results: dict[int, dict[str, dict[str, Any]]] = {}  # bits → kind → layer → summary
    for path in sorted(folder.glob(f"{stem}_*_bits_*.json")):
        settings, figures = study_files.read_result(path)
        if settings.get("model") == model and figures.get("summary"):
            kinds = results.setdefault(figures["bits"], {kind: {} for kind in HEURISTICS})
            kinds[figures["kind"]][figures["layer"]] = figures["summary"]
    drawn = {name for kinds in results.values() for every in kinds.values() for name in every}
    names = [name for name in layers if name in drawn]
    if not names:
        return
    size = 1.6 + INCHES_A_PANEL * max(2, len(results)), 1.6 + INCHES_A_LAYER * max(4, len(names))
    try:
        figure, panels = plots.new_figure(1, len(results), *size, sharey=True, squeeze=False)
    except UserError as error:  # matplotlib is missing; the results are complete
        log.warning("no picture: %s", error)
        return
    for axes, bits in zip(panels[0], sorted(results, reverse=True), strict=True):
        for kind, summaries in results[bits].items():
            draw_intervals(axes, kind, {n: x for n, x in enumerate(map(summaries.get, names)) if x})
        axes.set_xlabel("SQNR (dB)", fontsize=9)
        axes.set_title(size_text(bits), fontsize=10)
    panels[0, 0].set_yticks(range(len(names)), names, fontsize=8)
    panels[0, 0].set_ylim(len(names) - 0.3, -0.7)  # the first layer on top, a single one centred
    labels = {  # of each kind of mark once
        label: handle
        for axes in panels[0]
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    look = {"loc": "outside upper center", "ncols": 2, "fontsize": 9, "frameon": False}
    figure.legend(labels.values(), labels.keys(), title=model, **look)
    plots.save_figure(figure, folder / f"{stem}_layer_outputs")


def draw_intervals(axes: Any, kind: str, summaries: Mapping[int, Mapping[str, Any]]) -> None:
    """Intervals of one study, a little above or below each layer's place."""
    colour, marker, shift = STYLES[kind]
    for place, layer in summaries.items():
        y, best, limit = place + shift, layer["sqnr_best"], layer["sqnr_limit"]
        if best is None:  # no error at all
            continue
        look = {"color": colour, "label": f"{kind}: best to proven limit"}
        axes.plot(best, y, marker, markersize=5, **look)
        if limit is not None:
            axes.hlines(y, best, limit, color=colour, linewidth=2)
        if (own := layer["sqnr"][layer["own"]]) is not None:
            look = {"color": colour, "label": HEURISTICS[kind][layer["own"]], "fillstyle": "none"}
            axes.plot(own, y, "o", markersize=4.5, **look)


# -- the command -----------------------------------------------------------------------------------


def run_layer_study(args: argparse.Namespace) -> None:
    """Every layer at every bit width that has no result yet; table and picture of all."""
    kind = args.kind
    if args.image_net_dir is not None:
        if args.dataset not in (None, "imagenet") or args.datapath is not None:
            text = "--image-net-dir DIR is --dataset imagenet --datapath DIR"
            raise UserError(f"{text}; give one or the other")
        args.datapath = args.image_net_dir
    args.dataset, args.bits = args.dataset or "imagenet", list(dict.fromkeys(args.bits))
    session = Session.of(common_options(args))
    layers = chosen_layers(session.model, args.model, args.layer_name or ())
    names = [name for name in SETTINGS if kind == "quantisation" or name not in OF_GRIDS]
    settings = {name: getattr(args, name) for name in names}
    settings |= {"image_size": session.image_data.image_size, "calibration_seed": args.seed}
    settings["weights"] = content_hash(session.model.state_dict())
    work, figures = {}, {}
    for name, bits in ((name, bits) for name in layers for bits in args.bits):
        path = args.out / f"{model_tag(args.model)}_{name}_{bits}_bits_{kind}.json"
        work[name, bits] = path, settings | {"layer": name, "bits": bits}
        files.check_writable(path)
        figures[name, bits] = study_files.finished(*work[name, bits], args.restart)
    pending = {name for (name, _), done in figures.items() if done is None}
    if pending:
        prove_layers(session.model, session.model, session.calibration(), session.device)
    flaws = {name: flaw for name in layers if (flaw := view(layers[name]).proof.flaw)}
    for name, flaw in flaws.items():
        log.info("%s left out: %s", name, flaw)
    figures = {key: done for key, done in figures.items() if key[0] not in flaws}
    if not figures:
        raise UserError(f"no layer can be studied: {flaw}")
    counts = args.opt_dim, args.num_output_channels, args.num_chunks
    places = {
        name: layer_problem.rows_and_chunks(layers[name], *counts)
        for name in layers
        if name in pending - flaws.keys()
    }
    if places:
        session.dense_top1()
    chunks = {name: [chunk for _, chunk in of_layer] for name, of_layer in places.items()}
    images = session.calibration() if chunks else ()
    moments = layer_problem.second_moments(session.model, chunks, images, session.device)
    *_, own = names = HEURISTICS[kind].values()
    head = ["layer", "bits", "proven optimal", *names, "best found", "limit"]
    cli.print_result(study_files.markdown_head([*head, f"{own} below optimum: mean", "worst"]))
    for (name, bits), done in figures.items():
        if done is None:
            done = layer_figures(args, name, layers[name], bits, places[name], moments[name])
            study_files.write_result(*work[name, bits], done)
        cli.print_result(layer_row(done))
    draw_layers(args.out, args.model, list(find_layers(session.model)))


def chosen_layers(
    model: nn.Module,
    model_name: str,
    names: list[str],  # none: all
) -> dict[str, nn.Module]:
    """Layers by name. Raises UserError for names that the model lacks."""
    layers = find_layers(model)
    for name in names:
        if name not in layers:
            close = difflib.get_close_matches(name, layers, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(layers)}"
            raise UserError(f"--layer-name {name}: no such layer in {model_name}; {hint}")
    return {name: layers[name] for name in dict.fromkeys(names or layers)}


def range_method(text: str) -> str:
    """argparse type: one of RANGES, however it is spelled."""
    for known in layer_problem.RANGES:
        if text.replace("_", "").replace("-", "").lower() == known.lower():
            return known
    raise argparse.ArgumentTypeError(f"must be {' or '.join(layer_problem.RANGES)}; got {text}")


def layer_study_parser(
    kind: str, prog: str, text: str, commands: tuple[str, ...]
) -> argparse.ArgumentParser:
    """The options of both commands, which are the same; the first line of `text` describes it."""
    example = f"python -m pruning_vs_quantization.{prog} {commands[0]} --model-name rn8 "
    example += "--dataset digits --layer-name layer1.0.conv1 --n-bits 4 --opt-dim 16 --num-chunks 1"
    parser = cli.Parser(prog=prog, description=text.splitlines()[0], example=example)
    positive, natural = cli.positive_int, cli.nonnegative_int
    text = "the question (there is only one)"
    parser.add_argument("command", nargs="?", choices=commands, default=commands[0], help=text)

    add = parser.add_argument_group("network and images").add_argument
    text = "rn18, rn20, any torchvision classification model, or path/to/file.py:function"
    add("--model-name", metavar="MODEL", dest="model", required=True, help=text)
    add("--weights", metavar="FILE", help="dense weights (default: torchvision's, or the shipped)")
    text = "imagenet, cifar10, digits or folder (default: imagenet)"
    add("--dataset", metavar="DATASET", help=text)
    add("--datapath", metavar="DIR", help="where the images are")
    add("--classes", metavar="FILE", help="class names, one a line, in the network's order")
    add("--image-net-dir", metavar="DIR", help="--dataset imagenet --datapath DIR")
    text = "side of the network's input in pixels (default: the network's, or the dataset's)"
    add("--image-size", metavar="N", type=positive, help=text)
    add("--nsamples", metavar="N", type=positive, default=256, help="calibration images")
    add("--batchsize", metavar="N", type=positive, default=32, help="images per batch")
    add("--skip-bad-images", action="store_true", help="leave out images that cannot be read")
    text = "processes that decode images (default: depends on the dataset)"
    add("--workers", metavar="N", type=natural, help=text)

    add = (group := parser.add_argument_group("subproblems")).add_argument
    add("--layer-name", metavar="NAME", action="append", help="a layer, or several (default: all)")
    study_files.add_grid_options(group)
    group.set_defaults(bits=[8, 4, 3, 2])
    same = {"type": study_files.bit_width, "nargs": 1, "dest": "bits", "default": argparse.SUPPRESS}
    add("--n-bits", metavar="B", **same, help="the same as --bits B")
    text = "range of the grid: of least squared error, or up to the largest weight"
    add("--range-search-method", type=range_method, metavar="MSE|minmax", default="MSE", help=text)
    text = "a grid for each output channel (default: one for the layer)"
    add("--per-channel", action="store_true", help=text)
    text = "output channels of each layer, evenly spread; -1: all"
    count = cli.number(int, lambda n: n >= 1 or n == -1, "a whole number from 1, or -1 for all")
    add("--num-output-channels", metavar="N", type=count, default=8, help=text)
    text = "unknowns of a subproblem: a row is cut into chunks of at most this many inputs"
    size = cli.number(int, lambda n: 1 <= n <= MOST_UNKNOWNS, f"from 1 to {MOST_UNKNOWNS}")
    add("--opt-dim", metavar="N", type=size, default=32, help=text)
    text = "chunks of each output channel, evenly spread; 0: all"
    add("--num-chunks", metavar="N", type=natural, default=8, help=text)

    add = parser.add_argument_group("solvers").add_argument
    text = "certified semidefinite bound, exact search, or both"
    add("--method", choices=layer_problem.METHODS, default="both", help=text)
    text = "seconds for the search of a subproblem; after that its result is [proven bound, best]"
    add("--time-limit", metavar="S", type=cli.positive_float, default=10.0, help=text)
    add("--node-limit", metavar="N", type=cli.positive_int, help="the same in nodes")
    add("--verbose-solvers", action="store_true", help="log a line for each subproblem")
    study_files.add_study_options(parser, "layer_outputs")
    parser.set_defaults(kind=kind, noaug=True, **dict.fromkeys(FIXED))
    return parser
