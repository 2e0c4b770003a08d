"""SQNR of quantising and of pruning every weight tensor of a model zoo (the command of part 2).

    python -m pruning_vs_quantization.quant_pruning_weights_sqnr
    python -m pruning_vs_quantization.quant_pruning_weights_sqnr --models rn20 --weights rn20.pth

Without arguments: every Conv2d and Linear tensor of torchvision's pretrained classification,
detection, segmentation and video models; one whose weights are unavailable is reported and skipped.

Kuzmin et al. (arXiv 2307.02973), section 3: b bits a weight against 16-bit weights of which a
fraction of b/16 is kept. The reference is the tensor rounded to FP16, as a pruned tensor stores it.
With w the n weights and ŵ what they become

    SQNR = 10·log₁₀(Σw² / Σ(w − ŵ)²) dB       mse = Σ(w − ŵ)² / n

    quantised   ŵ = Δ·clip(round(w/Δ), c₀, c₁) with one Δ per tensor, the one of least squared error
                (`expected_error.best_step`: branch and bound, proven to 10⁻⁷)
    pruned      ŵ = the ⌊n·b/16⌋ largest magnitudes as they are, the others 0
    corrected   a fraction z of the quantised weights is 0, which a sparse format need not store
                either: ⌊n·(1 − z)·b/16⌋ magnitudes are kept. Storing the positions of the zeros
                costs both the same and is not counted, as in the paper

The folder --out receives

    <model>_<b>_bits_mse.json   layer → sample_kurtosis (excess, biased), quant_sqnr, quant_mse,
                                quant_sparsity, pruning_sqnr, pruning_mse, pruning_sqnr_corrected,
                                pruning_mse_corrected; SQNR in dB, infinity as null with a `reason`
    settings.json               each model's weights and grids, so that a rerun skips what is done
                                and never mixes results of different settings
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # started as a file in this folder, as the published README does
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    import pruning_vs_quantization  # noqa: F401

import argparse
import math
import os
import socket
import statistics
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import torch
from torch import nn

from modelutils import (
    CIFAR_BLOCKS,
    SHIPPED_WEIGHTS,
    TORCHVISION_ALIASES,
    find_layers,
    get_model,
    load_state,
)
from obc.inputs.checkpoints import fitting_weights
from obc.inputs.vision import torchvision
from obc.solver.distributed import resolve_device
from obc.solver.errors import UserError, log
from obc.solver.progress import progress
from obc.toolkit import cli, records
from obc.toolkit.fingerprints import bytes_hash
from obc.toolkit.leveldb import model_tag
from pruning_vs_quantization import expected_error, study_files
from pruning_vs_quantization.expected_error import DENSE_BITS, Histogram

COLUMNS = ("model", "bits", "tensors", "quantising", "pruning", "corrected", "pruning better in")
NO_ERROR = 1e-28  # × the power of the weights: rounding errors of float64 where there is no error
TASKS = ("detection", "segmentation", "video")  # submodules of torchvision.models besides itself
NAMED = 5  # models, of those that are skipped for the same reason
ANSWER_SECONDS, STALL_SECONDS = 10, 60  # for a server to answer at all; without data in a download

# -- a tensor --------------------------------------------------------------------------------------


def tensor_figures(
    histogram: Histogram, bits: int, balanced: bool = False
) -> dict[str, float | str | None]:
    """Both methods at the size of `bits` bits a weight, as in the module docstring.

    Values that JSON cannot hold are None; `reason` then says why.
    """
    values, counts, size = histogram.values, histogram.counts, histogram.size
    codes, power = expected_error.integer_codes(bits, balanced), histogram.moment(2)
    quantised = 0 * values
    if power > 0:
        step = expected_error.best_step(histogram, codes)
        quantised = expected_error.round_to_grid(values, step, codes)
    zeros = int(counts[quantised == 0].sum())
    figures, reasons = {"sample_kurtosis": histogram.kurtosis}, []
    for method, suffix, error in (
        ("quant", "", float(counts @ (values - quantised) ** 2) / size),
        ("pruning", "", histogram.pruned_error(size * bits // DENSE_BITS)),
        ("pruning", "_corrected", histogram.pruned_error((size - zeros) * bits // DENSE_BITS)),
    ):
        mse = error if error > NO_ERROR * power else 0.0
        figures[f"{method}_sqnr{suffix}"] = expected_error.sqnr_db(power, mse)
        figures[f"{method}_mse{suffix}"] = mse
        if method == "quant":
            figures["quant_sparsity"] = zeros / size
    for name, value in figures.items():
        if not math.isfinite(value):
            figures[name] = None
            constant = "undefined, the weights are all the same"
            reasons.append(f"{name}: {constant if math.isnan(value) else 'infinite, no error'}")
    return figures | ({"reason": "; ".join(reasons)} if reasons else {})


def model_figures(
    model: nn.Module, bits: list[int], balanced: bool, device: torch.device
) -> dict[int, dict[str, dict[str, Any]]]:  # bits → layer → figures
    """Both methods on each Conv2d and Linear tensor. Raises UserError for unusable weights."""
    figures: dict[int, dict[str, dict[str, Any]]] = {width: {} for width in bits}
    layers = find_layers(model)
    if not layers:
        raise UserError("has no Conv2d or Linear layer")
    for name, layer in layers.items():
        try:
            histogram = Histogram.of(layer.weight.to(device))
        except ValueError as error:
            raise UserError(f"{name} {error}") from None
        for width in bits:
            figures[width][name] = tensor_figures(histogram, width, balanced)
    return figures


# -- models and their weights ----------------------------------------------------------------------


def zoo_names() -> dict[str, list[str]]:
    """torchvision's models by task; classification first."""
    models = torchvision.models
    modules = {"classification": models} | {task: getattr(models, task) for task in TASKS}
    return {task: models.list_models(module=module) for task, module in modules.items()}


def pretrained_weights(name: str) -> Any:
    """torchvision's weights of a model: IMAGENET1K_V1, or else its default ones."""
    known = torchvision.models.get_model_weights(TORCHVISION_ALIASES.get(name, name))
    return getattr(known, "IMAGENET1K_V1", None) or known.DEFAULT


def check_download(url: str, silent: dict[str, str]) -> None:
    """Raise a UserError unless `url` has been downloaded before, or its server answers.

    `silent` has the servers that did not, and why: without a network a whole zoo fails at once.
    """
    name, host = Path(urlsplit(url).path).name, urlsplit(url).hostname
    if (Path(torch.hub.get_dir()) / "checkpoints" / name).exists():
        return
    if host not in silent:
        try:
            request = Request(url, method="HEAD")
            urlopen(request, timeout=ANSWER_SECONDS).close()  # nosec B310  # torchvision's own
            return
        except HTTPError as error:
            raise UserError(f"{url}: {error.code} {error.reason}") from None
        except OSError as error:
            silent[host] = str(getattr(error, "reason", error))
    raise UserError(f"{host} does not answer ({silent[host]})")


def zoo_model(name: str, weights: str | None, silent: dict[str, str]) -> nn.Module:
    """The model with its weights, on the CPU. Raises UserError if they are unavailable."""
    full = TORCHVISION_ALIASES.get(name, name)
    names = zoo_names() if ".py:" not in name and name not in CIFAR_BLOCKS else {}
    task = next((task for task, models in names.items() if full in models), None)
    if task is None or (weights is not None and task == "classification"):
        dataset = next((data for model, data in SHIPPED_WEIGHTS if model == name), "imagenet")
        return get_model(name, dataset, weights)
    if weights is not None:
        backbone = {} if task == "video" else {"weights_backbone": None}
        model = torchvision.models.get_model(full, weights=None, **backbone)
        load_state(model, fitting_weights(weights, model), weights)
        return model
    chosen = pretrained_weights(name)
    check_download(chosen.url, silent)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALL_SECONDS)  # or a connection that is silent would never end
    try:
        return torchvision.models.get_model(full, weights=chosen)
    except (OSError, RuntimeError) as error:
        raise UserError(f"its weights cannot be downloaded ({error})") from None
    finally:
        socket.setdefaulttimeout(before)


def weights_identity(name: str, weights: str | None) -> str:
    """Identifies a set of weights without loading or downloading it."""
    shipped = next((path for (model, _), path in SHIPPED_WEIGHTS.items() if model == name), None)
    path = Path(weights) if weights is not None else shipped
    if path is None:
        own = ".py:" in name or name in CIFAR_BLOCKS
        return "its own" if own else str(pretrained_weights(name))
    with open(path, "rb") as file:
        return f"{path.name}, {bytes_hash(iter(lambda: file.read(1 << 24), b''))}"


def chosen_models(names: list[str], weights: str | None) -> list[str]:
    """The models of these names, or the whole zoo.

    Raises UserError for a model that does not exist or whose files would overwrite another's, and
    for weights that do not exist or belong to no single model.
    """
    if weights is not None and len(names) != 1:
        raise UserError("--weights FILE is for one model; name it with --models MODEL")
    if weights is not None and not os.path.isfile(weights):
        raise UserError(f"{weights}: no such file")
    if not names:
        return [name for zoo in zoo_names().values() for name in zoo]
    known = {*CIFAR_BLOCKS, *TORCHVISION_ALIASES}
    for name in names:
        if ".py:" not in name and name not in known:
            known |= {full for zoo in zoo_names().values() for full in zoo}
            if name not in known:
                forms = "torchvision's names, rn18, rn20, … or path/to/file.py:function"
                raise UserError(f"unknown model {name}; {forms}")
    models = list(dict.fromkeys(names))
    tags = [model_tag(name) for name in models]
    for name, tag in zip(models, tags, strict=True):
        if tags.count(tag) > 1:
            text = f"{name}: another model's files would be called {tag} too"
            raise UserError(f"{text}; run them with different --out")
    return models


# -- results and the command -----------------------------------------------------------------------


class WeightResults:
    """The results in a folder, and the settings they were made with."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.sidecar = folder, folder / "settings.json"
        content = study_files.read_json(self.sidecar) if self.sidecar.exists() else {}
        self.models: dict[str, Any] = dict(content.get("models", {}))

    def path(self, model: str, bits: int) -> Path:
        return self.folder / f"{model_tag(model)}_{bits}_bits_mse.json"

    def missing(self, model: str, settings: Mapping[str, Any], bits: list[int]) -> list[int]:
        """The bit widths without a result. Raises UserError for results with other settings."""
        done = [width for width in bits if self.path(model, width).exists()]
        if done:
            earlier = self.models.get(model_tag(model), {})
            study_files.check_same_settings(f"{self.sidecar}: {model}", earlier, settings)
        for width in done:
            study_files.read_json(self.path(model, width))  # names the file if it is broken
        return [width for width in bits if width not in done]

    def write(self, model: str, settings: dict[str, Any], figures: dict[int, Any]) -> None:
        """Write a model's results, after removing those with other settings."""
        tag = model_tag(model)
        if self.models.get(tag) != settings:
            for path in self.folder.glob(f"{tag}_[0-9]_bits_mse.json"):
                path.unlink()
            self.models[tag] = settings
            sidecar = {"models": self.models, "environment": records.environment()}
            records.write_record(self.sidecar, sidecar)
        for width, layers in figures.items():
            records.write_record(self.path(model, width), layers)

    def rows(self, model: str, bits: list[int]) -> Iterator[list[str]]:
        """The table's rows for a model: medians over its tensors, dB."""
        keys = ("quant_sqnr", "pruning_sqnr", "pruning_sqnr_corrected")
        for width in bits:
            layers = study_files.read_json(self.path(model, width)).values()
            sqnrs = [[math.inf if x[key] is None else x[key] for x in layers] for key in keys]
            medians = [f"{statistics.median(values):.2f}" for values in sqnrs]
            better = sum(pruning > quant for quant, pruning in zip(*sqnrs[:2], strict=True))
            yield [model, f"{width}", f"{len(layers)}", *medians, f"{better}"]


def run(args: argparse.Namespace) -> None:
    device, models = resolve_device(args.device), chosen_models(args.models or [], args.weights)
    bits = sorted(set(args.bits), reverse=True)
    results, silent = WeightResults(args.out), {}
    skipped: dict[str, list[str]] = {}  # reason → models
    settings, missing = {}, {}
    for name in models:
        weights = weights_identity(name, args.weights)
        settings[name] = {"model": name, "weights": weights, "balanced": args.balanced}
        missing[name] = bits if args.restart else results.missing(name, settings[name], bits)
    cli.print_result(study_files.markdown_head(COLUMNS))
    for name in progress("models", models):
        if missing[name]:
            try:
                model = zoo_model(name, args.weights, silent)
                figures = model_figures(model, missing[name], args.balanced, device)
            except UserError as error:
                if len(models) == 1:
                    raise UserError(f"{name}: {error}") from None
                skipped.setdefault(str(error), []).append(name)
                continue
            compared = [layer.weight.numel() for layer in find_layers(model).values()]
            others = sum(map(torch.numel, model.parameters())) - sum(compared)  # Conv3d, attention
            log.info(
                "%s: %d tensors of %s weights; not compared, not being the weight of a Conv2d or "
                "Linear: %s parameters",
                *(name, len(compared), f"{sum(compared):,}", f"{others:,}"),
            )
            results.write(name, settings[name], figures)
        else:
            log.info("%s: done already", name)
        for row in results.rows(name, bits):
            cli.print_result(study_files.markdown_row(row))
    for reason, names in skipped.items():
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        log.warning("skipped %s%s: %s", ", ".join(names[:NAMED]), more, reason)
    if sum(map(len, skipped.values())) == len(models):
        raise UserError(
            "no model's weights are available; download them, or pass --models MODEL --weights FILE"
        )


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="quant_pruning_weights_sqnr",
        description=__doc__.splitlines()[0],
        example="python -m pruning_vs_quantization.quant_pruning_weights_sqnr --models rn8",
    )
    text = "torchvision's names, rn18, rn20, …, or path/to/file.py:function"
    text += " (default: torchvision's whole zoo)"
    parser.add_argument("--models", metavar="MODEL", nargs="+", help=text)
    text = "weights of the one model in --models (default: torchvision's, or the shipped ones)"
    parser.add_argument("--weights", metavar="FILE", help=text)
    study_files.add_grid_options(parser)
    study_files.add_study_options(parser, "weights_sqnr")
    return parser


def main(argv: list[str] | None = None) -> int:
    return cli.command(build_parser, run, argv)


if __name__ == "__main__":
    sys.exit(main())
