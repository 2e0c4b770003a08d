"""The demo: a network compressed in six ways, exported and run.

    python -m recipes.demo [MODEL DATASET [options]]

Without words, as `make demo`: rn8, which ships with its weights, on digits; no download, no GPU.
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
import copy  # noqa: E402
import io  # noqa: E402
import math  # noqa: E402
import time  # noqa: E402
from collections.abc import Iterator, Mapping, Sequence  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from typing import Any, NamedTuple  # noqa: E402

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor  # noqa: E402

from datautils import test_batches  # noqa: E402
from obc.inputs import files  # noqa: E402
from obc.inputs.preprocessing import Preprocessing  # noqa: E402
from obc.toolkit import cli, export_measure, export_onnx  # noqa: E402
from obc.toolkit.evaluation import BatchFigures, Evaluation  # noqa: E402
from obc.toolkit.leveldb import model_tag  # noqa: E402
from obc.toolkit.profiles import read_profile, read_scores  # noqa: E402
from obc.toolkit.records import read_record, write_run  # noqa: E402
from obc.toolkit.session import Session, common_options  # noqa: E402
from recipes import __main__ as recipes  # noqa: E402
from recipes import report  # noqa: E402
from recipes.recipe import run_command  # noqa: E402

NETWORK = ("rn8", "digits", "--noaug")  # unless another one is named
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


DENSE, HARD = "dense, float32", "2-bit weights"  # names in the table
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


@dataclass
class Demo:
    """A demo at work."""

    session: Session
    words: list[str]  # MODEL DATASET and the common options
    folder: Path
    tag: str

    @contextlib.contextmanager
    def quietly(self) -> Iterator[None]:
        """What commands print goes to a file."""
        with (
            open(self.folder / "log.txt", "a") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            yield

    def onnx_file(self, name: str) -> Path:
        return self.folder / "onnx" / f"{self.tag}_{name}.onnx"

    def export_dense(self) -> Path:
        """The dense network's ONNX file."""
        model = copy.deepcopy(self.session.model).cpu()
        with files.atomic_write(self.onnx_file("dense")) as file:
            file.write(export_onnx.contents(export_onnx.traced(model, self.session.image_shape)))
        return self.onnx_file("dense")

    def compress_and_export(self, way: Way) -> Path:
        """Compress the network in one way; its ONNX file."""
        checkpoint = str(self.folder / f"{self.tag}_{way.name}.pth")
        exported = self.onnx_file(way.name)
        network, common = self.words[:2], self.words[2:]
        with self.quietly():
            words = [*network, *way.options.split(), "--save", checkpoint, *common]
            run_command("main_trueobs.py", words)
            words = [*network, checkpoint, "--to", str(exported), *way.export.split(), *common]
            run_command("export.py", words)
        return exported

    def run_exported(
        self, paths: Mapping[str, Path]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Figures of exported networks, the first of which is the dense one; the hardest images."""
        runners = {
            name: export_measure.onnx_runtime(path.read_bytes(), threads=1)
            for name, path in paths.items()
        }
        counts: dict[str, list[BatchFigures]] = {name: [] for name in paths}
        data = self.session.image_data
        shown, times, made = [], {}, data.preprocessing
        for images, labels in test_batches(data):
            logits = {name: torch.from_numpy(run(images.numpy())) for name, run in runners.items()}
            for name, found in counts.items():
                found.append(BatchFigures.of(logits[name], labels, logits[DENSE]))
            shown += images_apart(images, labels, logits[DENSE], logits[HARD], made)
            shown = sorted(shown, key=lambda image: -image["kl"])[:HARDEST]
            times = times or export_measure.medians(runners, images[:BATCH].numpy())
        figures = [
            {
                "name": name,
                "bytes": path.stat().st_size,
                "seconds_per_image": times[name][0] / BATCH,
                **vars(Evaluation.of(counts[name])),
            }
            for name, path in paths.items()
        ]
        return figures, shown

    def choose_levels(self) -> dict[str, Any]:
        """The recipe `unstructured`, one target: results, levels, and losses it chose them by."""
        more = ["--targets", str(TARGET), "--delta-sparse", "0.2", "--no-search"]
        words = ["unstructured", *self.words, *more, "--out", str(self.folder)]
        with self.quietly():
            recipes.run_recipe(recipes.build_parser().parse_args(words), words)
        results = report.read_results(self.folder / "unstructured.tsv")[1:]  # without the dense
        profiles = {
            method: read_profile(self.folder / f"{self.tag}_unstr_{100 * TARGET}x_{ending}.txt")
            for method, ending in (("uniform", "uniform"), ("DP", "dp"))
        }
        losses = read_scores(self.folder / "scores" / f"{self.tag}_unstr_loss.txt")
        results = [line._asdict() for line in results]
        return {"results": results, "profiles": profiles, "losses": losses}


def images_apart(
    images: Tensor,  # (n, channels, s, s)
    labels: Tensor,  # (n,)
    dense: Tensor,  # (n, classes) logits
    compressed: Tensor,  # the same
    made: Preprocessing,  # how images are made
) -> list[dict[str, Any]]:
    """The images on which two networks are farthest apart, the farthest first."""
    dense, compressed = (logits.double().log_softmax(1) for logits in (dense, compressed))
    distances = (dense.exp() * (dense - compressed)).sum(1)
    return [
        {
            "kl": float(distances[index]),
            "png": png(images[index], made),
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


def png(
    image: Tensor,  # (channels, s, s), as the network sees it
    made: Preprocessing,  # how it was made
) -> str:
    """An image as a PNG in base64."""
    pixels = image.permute(1, 2, 0) * torch.tensor(made.std) + torch.tensor(made.mean)
    pixels = (255 * pixels).round().clamp(0, 255).byte().expand(-1, -1, 3)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, format="PNG")
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
        tables=[exported_table(record["networks"]), levels_table(record["levels"])],
        heat=heat(record["levels"]),
    )


# -- the command -----------------------------------------------------------------------------------


def run(args: argparse.Namespace, words: list[str]) -> None:
    started, folder, say = time.perf_counter(), Path(args.out), cli.print_result
    (folder / "onnx").mkdir(parents=True, exist_ok=True)
    (folder / "log.txt").unlink(missing_ok=True)
    demo = Demo(Session.of(common_options(args)), words, folder, model_tag(args.model))
    weights = sum(x.numel() for x in demo.session.model.parameters())
    say(f"{demo.tag} on {args.dataset}, {weights:,} weights, compressed by {args.nsamples} images:")
    paths = {DENSE: demo.export_dense()}
    for way in WAYS:
        say(f"  {way.title + ',':25} {way.why}")
        paths[way.title] = demo.compress_and_export(way)
    say(f"  {f'{TARGET}× fewer FLOPs,':25} a dynamic programme gives each layer its own sparsity;")
    say(f"  {'':25} solved anew at these levels, each makes up for those before it")
    levels = demo.choose_levels()
    networks, images = demo.run_exported(paths)
    figures = {"networks": networks, "levels": levels, "images": images, "batch": BATCH}
    figures |= {"classes": demo.session.image_data.classes}
    path = folder / "demo.json"
    write_run(path, "demo.py", vars(args), seconds=time.perf_counter() - started, **figures)
    record = read_record(path)
    with files.atomic_write(folder / "index.html") as file:
        file.write(page(record).encode())
    for rows in (exported_table(record["networks"]), levels_table(record["levels"])):
        say(f"\n{export_measure.markdown_table(rows)}")
    say("\nKL and same class: how close the outputs are to those of the dense network.")
    say(f"The same with pictures: {folder / 'index.html'}")


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="demo.py", description=__doc__.splitlines()[0])
    cli.add_common_options(parser)
    text = "folder for all files"
    parser.group(cli.FIRST).add_argument("--out", metavar="DIR", default="demo", help=text)
    return parser


def main(argv: list[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv) or [*NETWORK]
    out = cli.Parser(add_help=False)  # --out is not for the commands
    out.add_argument("--out")
    common = out.parse_known_args(words)[1]
    return cli.command(build_parser, lambda args: run(args, common), words)


if __name__ == "__main__":
    sys.exit(main())
