"""The demo: a network that ships with its weights, compressed in six ways, exported and run.

    python -m recipes.demo                  or `make demo`; no download, no GPU

Prints what it does and why, then two tables, and writes them to demo/index.html with pictures.
Everything else is in demo/: checkpoints, ONNX files, the commands' records, their log (log.txt),
and demo.json, the figures of the page.

    checkpoints ── export.py ──▶ ONNX files ── ONNX Runtime ──▶ sizes, times, classes   table 1
    database, profiles, solved anew ── the recipe `unstructured` ──▶ its results        table 2
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file, by demo.sh
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import obc.toolkit.starting  # noqa: E402, F401  # isort: skip

import argparse  # noqa: E402
import base64  # noqa: E402
import contextlib  # noqa: E402
import io  # noqa: E402
import math  # noqa: E402
import time  # noqa: E402
from collections.abc import Iterator, Mapping, Sequence  # noqa: E402
from typing import Any, NamedTuple  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from datautils import test_batches  # noqa: E402
from modelutils import BatchFigures, Evaluation  # noqa: E402
from obc.inputs import files  # noqa: E402
from obc.toolkit import cli, export_measure, export_onnx  # noqa: E402
from obc.toolkit.profiles import read_profile, read_scores  # noqa: E402
from obc.toolkit.records import read_record, write_run  # noqa: E402
from obc.toolkit.session import Session, common_options  # noqa: E402
from recipes import __main__ as recipes  # noqa: E402
from recipes import report  # noqa: E402
from recipes.recipe import run_command  # noqa: E402

NETWORK = ["rn8", "digits", "--noaug"]
TARGET = 4  # times fewer FLOPs
BATCH = 16  # images whose time is measured
HARDEST = 10  # images that are shown


class Way(NamedTuple):
    """A way to compress the network."""

    name: str  # of its files
    title: str  # in the table
    why: str  # printed while it runs
    options: str  # of main_trueobs.py
    export: str = ""  # options of export.py


DENSE = "dense, float32"
WAYS = (
    Way(
        "4w",
        "4-bit weights",
        "OBQ rounds one weight after another; those still free make up for each",
        "quant --wbits 4",
    ),
    Way(
        "2w",
        "2-bit weights",
        "with --sequential, each layer also makes up for the layers before it",
        "quant --wbits 2 --wasym --sequential",
    ),
    Way(
        "8w8a",
        "8-bit weights and inputs",
        "if layers' inputs have 8 bits, too, a runtime computes in integers",
        "quant --wbits 8 --abits 8",
        "--int8-sums",
    ),
    Way(
        "24",
        "2:4 sparsity",
        "two zeros in every four weights: some GPUs gain by it, a CPU does not",
        "nmprune --sequential",
    ),
    Way(
        "half",
        "half of the channels",
        "input channels that nothing reads are cut, with all that made them",
        "struct --sparsity 0.5 --sequential",
    ),
)


# -- at work ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def quietly(folder: Path) -> Iterator[None]:
    """What commands print goes to a file."""
    with (
        open(folder / "log.txt", "a") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        yield


def dense_onnx(session: Session, path: Path) -> None:
    """Write the dense network as ONNX."""
    graph = export_onnx.traced(session.model.cpu(), session.image_shape)
    with files.atomic_write(path) as file:
        file.write(export_onnx.contents(graph))


def compress_and_export(way: Way, folder: Path) -> Path:
    """Compress the network in one way; the ONNX file."""
    checkpoint = folder / f"rn8_{way.name}.pth"
    exported = folder / "onnx" / f"rn8_{way.name}.onnx"
    with quietly(folder):
        words = [*NETWORK, *way.options.split(), "--save", str(checkpoint)]
        run_command("main_trueobs.py", words)
        words = [*NETWORK, str(checkpoint), "--to", str(exported), *way.export.split()]
        run_command("export.py", words)
    return exported


def run_in_onnx_runtime(
    session: Session, paths: Mapping[str, Path]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Figures of exported networks, the first of which is the dense one; the hardest images."""
    runners = {
        name: export_measure.onnx_runtime(path.read_bytes(), threads=1)
        for name, path in paths.items()
    }
    batches = [(x.clone(), y.clone()) for x, y in test_batches(session.data)]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    logits = {name: torch.from_numpy(run(images.numpy())) for name, run in runners.items()}
    times = export_measure.medians(runners, images[:BATCH].numpy())
    dense, figures = next(iter(logits.values())), []
    for name, path in paths.items():
        evaluation = Evaluation.of([BatchFigures.of(logits[name], labels, dense)])
        seconds = times[name][0] / BATCH
        size = {"bytes": path.stat().st_size, "seconds_per_image": seconds}
        figures.append({"name": name, **size, **vars(evaluation)})
    return figures, hardest(logits, images, labels, "2-bit weights")


def non_uniform(folder: Path) -> dict[str, Any]:
    """The recipe `unstructured` at one target: its results, levels, and what it chose by."""
    words = ["unstructured", *NETWORK, "--targets", str(TARGET), "--delta-sparse", "0.2"]
    words += ["--no-search", "--out", str(folder)]
    with quietly(folder):
        recipes.run_recipe(recipes.build_parser().parse_args(words), words)
    profiles = {
        method: read_profile(folder / f"rn8_unstr_{100 * TARGET}x_{ending}.txt")
        for method, ending in (("uniform", "uniform"), ("DP", "dp"))
    }
    results = report.read_results(folder / "unstructured.tsv")[1:]  # the dense network is known
    return {
        "results": [line._asdict() for line in results],
        "profiles": profiles,
        "losses": read_scores(folder / "scores" / "rn8_unstr_loss.txt"),
    }


def hardest(
    logits: Mapping[str, Tensor],  # (n, classes) each
    images: Tensor,  # (n, 3, s, s)
    labels: Tensor,  # (n,)
    name: str,
) -> list[dict[str, Any]]:
    """The test images on which a network is farthest from the dense one."""
    dense, compressed = (logits[x].double().log_softmax(1) for x in (DENSE, name))
    distances = (dense.exp() * (dense - compressed)).sum(1)
    return [
        {
            "png": png(images[index]),
            "label": int(labels[index]),
            "dense": guess(dense[index]),
            "compressed": guess(compressed[index]),
        }
        for index in distances.argsort(descending=True)[:HARDEST].tolist()
    ]


def guess(log_probabilities: Tensor) -> dict[str, float]:
    """The class that a network chooses, and how sure it is, in percent."""
    best = int(log_probabilities.argmax())
    return {"class": best, "percent": 100 * math.exp(log_probabilities[best])}


def png(image: Tensor) -> str:  # (3, s, s), normalised
    """An image as a PNG in base64, from black to white."""
    from PIL import Image

    pixels = image.mean(0).numpy()
    pixels = 255 * (pixels - pixels.min()) / max(np.ptp(pixels), 1e-6)
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


# -- what it shows ---------------------------------------------------------------------------------


def exported_table(networks: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Head and rows of table 1."""
    dense = networks[0]
    head = ["in ONNX Runtime", "size", "smaller", "time", "speed", "top-1", "same class", "KL"]
    rows = [head]
    for one in networks:
        size, seconds = one["bytes"], one["seconds_per_image"]
        first = one is dense
        rows.append(
            [
                one["name"],
                f"{size / 1e3:.0f} kB",
                "" if first else f"{dense['bytes'] / size:.1f}×",
                f"{1e6 * seconds:.0f} µs",
                "" if first else f"{dense['seconds_per_image'] / seconds:.1f}×",
                f"{one['top1']:.2f} %",
                "" if first else f"{one['agreement']:.1f} %",
                "" if first else f"{one['kl']:.5f}",
            ]
        )
    return rows


def levels_text(profile: Mapping[str, str]) -> str:
    """The levels of a profile, the lowest and the highest.

    >>> levels_text({"conv1": "0000", "conv2": "8322"}), levels_text({"conv1": "5904"})
    ('0 % … 83.2 %', '59.0 %')
    """
    return " … ".join(
        dict.fromkeys(map(report.level_text, (min(profile.values()), max(profile.values()))))
    )


def levels_table(found: Mapping[str, Any]) -> list[list[str]]:
    """Head and rows of table 2."""
    rows = [[f"{TARGET}× fewer FLOPs", "zeros", "reached", "top-1", "same class", "KL"]]
    for one in found["results"]:
        levels = levels_text(found["profiles"][one["method"].partition(",")[0]])
        cells = [f"{float(one['reached']):.2f}×", f"{one['top1']:.2f} %", f"{one['agreement']} %"]
        rows.append([one["method"], levels, *cells, f"{float(one['kl']):.5f}"])
    return rows


def heat(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the picture: for each layer, how much each level costs, from 0 to 1, and the choice.

    Increases of the loss are drawn on a logarithmic scale from LEAST_ERROR to the largest.
    """
    losses, profiles = found["losses"], found["profiles"]
    most = math.log(max(x for levels in losses.values() for x in levels.values()))
    least = math.log(report.LEAST_ERROR)
    return [
        {
            "layer": layer,
            "cells": [
                {
                    "level": report.level_text(level),
                    "heat": (math.log(max(x, report.LEAST_ERROR)) - least) / (most - least),
                    "uniform": profiles["uniform"][layer] == level,
                    "DP": profiles["DP"][layer] == level,
                }
                for level, x in levels.items()
            ],
        }
        for layer, levels in losses.items()
    ]


def page(record: Mapping[str, Any]) -> str:
    """The page of demo.json."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, trim_blocks=True, undefined=StrictUndefined
    )
    return environment.get_template("demo.html.jinja").render(
        record=record,
        tables=[exported_table(record["networks"]), levels_table(record["non_uniform"])],
        heat=heat(record["non_uniform"]),
    )


# -- the command -----------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    started, folder = time.perf_counter(), Path(args.out)
    (folder / "onnx").mkdir(parents=True, exist_ok=True)
    (folder / "log.txt").write_text("")
    say = cli.print_result
    session = Session.of(common_options(recipes.build_parser().parse_args(["nm", *NETWORK])))
    weights = sum(x.numel() for x in session.model.parameters())
    say(f"rn8 has {weights:,} weights and reads handwritten digits. Compressed from 1,024 images:")
    paths = {DENSE: folder / "onnx" / "rn8_dense.onnx"}
    dense_onnx(session, paths[DENSE])
    for way in WAYS:
        say(f"  {way.title + ',':25} {way.why}")
        paths[way.title] = compress_and_export(way, folder)
    say(f"  {f'{TARGET}× fewer FLOPs,':25} a dynamic programme gives each layer its own sparsity;")
    say(f"  {'':25} solved anew at these levels, each makes up for those before it")
    found = non_uniform(folder)
    networks, images = run_in_onnx_runtime(session, paths)
    path = folder / "demo.json"
    figures = {"networks": networks, "non_uniform": found, "images": images}
    figures |= {"batch": BATCH, "target": TARGET}
    write_run(path, "demo.py", vars(args), seconds=time.perf_counter() - started, **figures)
    record = read_record(path)
    with files.atomic_write(folder / "index.html") as file:
        file.write(page(record).encode())
    for rows in (exported_table(record["networks"]), levels_table(record["non_uniform"])):
        say(f"\n{export_measure.markdown_table(rows)}")
    say("\nKL and same class: how close the outputs are to those of the dense network.")
    say(f"The same with pictures: {folder / 'index.html'}")


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="demo.py", description=__doc__.splitlines()[0])
    parser.add_argument("--out", metavar="DIR", default="demo", help="folder for all files")
    return parser


def main(argv: list[str] | None = None) -> int:
    return cli.command(build_parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
