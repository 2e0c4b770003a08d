"""SQNR of quantising and of pruning every weight tensor of a model zoo (the command of part 2).

    python -m pruning_vs_quantization.quant_pruning_weights_sqnr
    python -m pruning_vs_quantization.quant_pruning_weights_sqnr --models rn20 --weights rn20.pth

Without arguments: every Conv2d and Linear tensor of torchvision's pretrained classification,
detection, segmentation and video models (`model_zoo.py`). The mathematics is in `tensor_sqnr.py`.
In --out there is

    <model>_<b>_bits_mse.json   layer → sample_kurtosis (excess, biased), quant_sqnr, quant_mse,
                                quant_sparsity, pruning_sqnr, pruning_mse, pruning_sqnr_corrected,
                                pruning_mse_corrected; SQNR in dB, infinity as null with a `reason`
    settings.json               what each model's weights and grids were, so that a rerun skips what
                                is done and refuses to mix

A model whose weights cannot be had is reported and skipped.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from modelutils import CIFAR_BLOCKS, TORCHVISION_ALIASES, find_layers
from obc.solver.distributed import resolve_device
from obc.solver.errors import UserError, log
from obc.toolkit import cli, records
from obc.toolkit.leveldb import model_tag
from pruning_vs_quantization import study_files
from pruning_vs_quantization.model_zoo import Downloads, load_model, weights_identity, zoo_names
from pruning_vs_quantization.tensor_sqnr import Histogram, tensor_figures

COLUMNS = ("model", "bits", "tensors", "quantising", "pruning", "corrected", "pruning better in")


# ------------------------------------------------------------------------------------- the files


def result_path(folder: Path, model: str, bits: int) -> Path:
    return folder / f"{model_tag(model)}_{bits}_bits_mse.json"


class Folder:
    """The results in a folder, and what they were made with."""

    def __init__(self, path: Path) -> None:
        self.path, self.sidecar = path, path / "settings.json"
        content = study_files.read_json(self.sidecar) if self.sidecar.exists() else {}
        self.models: dict[str, Any] = dict(content.get("models", {}))

    def missing(self, model: str, settings: Mapping[str, Any], bits: list[int]) -> list[int]:
        """The bit widths without a result. Raises UserError for results with other settings."""
        files = {width: result_path(self.path, model, width) for width in bits}
        done = [width for width in bits if files[width].exists()]
        if done:
            earlier = self.models.get(model_tag(model), {})
            study_files.check_same_settings(f"{self.sidecar}: {model}", earlier, settings)
        for width in done:
            study_files.read_json(files[width])  # says which file is broken
        return [width for width in bits if width not in done]

    def begin(self, model: str, settings: Mapping[str, Any]) -> None:
        """Note a model's settings; results with other ones go."""
        if self.models.get(model_tag(model)) == settings:
            return
        for path in self.path.glob(f"{model_tag(model)}_[0-9]_bits_mse.json"):
            path.unlink()
        self.models[model_tag(model)] = dict(settings)
        record = {"models": self.models, "environment": records.environment()}
        records.write_record(self.sidecar, record)


# ------------------------------------------------------------------------------------- the work


def model_figures(
    model: nn.Module, bits: list[int], balanced: bool, device: torch.device
) -> dict[int, dict[str, dict[str, Any]]]:  # bits → layer → figures
    """Both methods on each Conv2d and Linear tensor. Raises UserError for weights in vain."""
    figures: dict[int, dict[str, dict[str, Any]]] = {width: {} for width in bits}
    for name, layer in find_layers(model).items():
        try:
            histogram = Histogram.of(layer.weight.to(device))
        except ValueError as error:
            raise UserError(f"{name} {error}") from None
        for width in bits:
            figures[width][name] = tensor_figures(histogram, width, balanced).as_json()
    if not figures[bits[0]]:
        raise UserError("has no Conv2d or Linear layer")
    return figures


def log_coverage(name: str, model: nn.Module) -> None:
    """Say what is looked at, and what is not, such as Conv3d and the projections of attention."""
    layers = find_layers(model)
    seen = sum(layer.weight.numel() for layer in layers.values())
    others = sum(parameter.numel() for parameter in model.parameters()) - seen
    log.info(
        "%s: %d tensors of %s weights; left out, since no weight of a Conv2d or Linear: %s "
        "parameters",
        name,
        len(layers),
        f"{seen:,}",
        f"{others:,}",
    )


def rows(folder: Path, model: str, bits: list[int]) -> Iterator[str]:
    """The table's lines for a model: medians over its tensors, dB."""
    for width in bits:
        layers = study_files.read_json(result_path(folder, model, width)).values()
        medians = [
            median(layer[key] for layer in layers)
            for key in ("quant_sqnr", "pruning_sqnr", "pruning_sqnr_corrected")
        ]
        worse = sum(finite(layer["pruning_sqnr"]) > finite(layer["quant_sqnr"]) for layer in layers)
        texts = " | ".join(f"{value:.2f}" for value in medians)
        yield f"| {model} | {width} | {len(layers)} | {texts} | {worse} |"


def finite(sqnr_db: float | None) -> float:
    """SQNR as a number again; null is infinity."""
    return math.inf if sqnr_db is None else sqnr_db


def median(values: Iterator[float | None]) -> float:
    return statistics.median(map(finite, values))


def wanted_models(args: argparse.Namespace) -> list[str]:
    """The models that the options name. Raises UserError for what does not exist."""
    if args.weights is not None and len(args.models or ()) != 1:
        raise UserError("--weights FILE is for one model; name it with --models MODEL")
    if args.weights is not None and not os.path.isfile(args.weights):
        raise UserError(f"{args.weights}: no such file")
    if not args.models:
        return [name for names in zoo_names().values() for name in names]
    known = {*CIFAR_BLOCKS, *TORCHVISION_ALIASES}
    for name in args.models:
        if ".py:" not in name and name not in known:
            known |= {full for names in zoo_names().values() for full in names}
            if name not in known:
                raise UserError(
                    f"unknown model {name}; torchvision's names, rn18, rn20, … or "
                    "path/to/file.py:function"
                )
    models = list(dict.fromkeys(args.models))
    tags = [model_tag(name) for name in models]
    for name, tag in zip(models, tags, strict=True):
        if tags.count(tag) > 1:
            raise UserError(
                f"{name}: another model's files would be called {tag} too; "
                "run them with different --out"
            )
    return models


def run(args: argparse.Namespace) -> None:
    device, models = resolve_device(args.device), wanted_models(args)
    bits = sorted(set(args.bits), reverse=True)
    folder, downloads, skipped = Folder(args.out), Downloads(), []
    settings = {
        name: {
            "model": name,
            "weights": weights_identity(name, args.weights),
            "balanced": args.balanced,
        }
        for name in models
    }
    missing = {
        name: bits if args.restart else folder.missing(name, settings[name], bits)
        for name in models
    }
    cli.print_result("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|")
    for name in tqdm(models, desc="models", leave=False, disable=None):
        if missing[name]:
            try:
                model = load_model(name, args.weights, downloads)
                figures = model_figures(model, missing[name], args.balanced, device)
            except UserError as error:
                if len(models) == 1:
                    raise UserError(f"{name}: {error}") from None
                log.warning("%s skipped: %s", name, error)
                skipped.append(name)
                continue
            log_coverage(name, model)
            folder.begin(name, settings[name])
            for width, layers in figures.items():
                records.write_record(result_path(args.out, name, width), layers)
        else:
            log.info("%s: done already", name)
        for row in rows(args.out, name, bits):
            cli.print_result(row)
    if len(skipped) == len(models):
        raise UserError(
            "no model's weights could be had; download them, or pass --models MODEL --weights FILE"
        )
    if skipped:
        log.warning("%d of %d models skipped", len(skipped), len(models))


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="quant_pruning_weights_sqnr", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models",
        metavar="MODEL",
        nargs="+",
        help="torchvision's names, rn18, rn20, …, or path/to/file.py:function "
        "(default: torchvision's whole zoo)",
    )
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="weights of the one model that --models names "
        "(default: torchvision's, or the shipped)",
    )
    study_files.add_grid_options(parser)
    study_files.add_study_options(parser, "weights_sqnr")
    return parser


def main(argv: list[str] | None = None) -> int:
    return cli.command(build_parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
