"""The options of `train-compressed`.

Every field of `TrainingOptions`, which is what training works with, is an option of the same name
(`n_bits` is --n-bits), with its type, default and help.

Learning rates follow PyTorch's schedulers, advanced after every step. With t epochs done of T (a
fraction within an epoch) and the initial learning rate η,

    cosine[:η_min]           η_min + (η − η_min)(1 + cos(π t/T)) / 2     η_min: 0.01 η by default
    multistep:E1,E2,…[:γ]    η γ^k, k of the epochs E1, E2, … are done   γ: 0.1 by default
    exponential:γ            η γ^⌊t⌋
    constant                 η

Steps of quantisers follow the same curve, in proportion to their own learning rate.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer, lr_scheduler

from datautils import DATASETS
from obc.solver.distributed import resolve_device
from obc.solver.errors import UserError
from obc.toolkit import cli
from obc.toolkit.leveldb import model_tag
from obc.toolkit.modes import option
from pruning_vs_quantization.learned_steps import RANGE_METHODS
from pruning_vs_quantization.study_files import add_study_options

SUFFIX = "_quantized"  # of published architecture names
FORMS = "cosine, cosine:1e-4, multistep:10,15, multistep:10,15:0.1, exponential:0.9 or constant"
OPTIMISERS = ("SGD", "Adam", "AdamW")
OURS = {"flag", "first"}  # what the metadata of an option holds besides argparse's words
NOT_SETTINGS = {"cuda", "num_workers", "tb_logging_dir"}  # results do not depend on them
NOT_SETTINGS |= {"model_dir"}  # says the same as weights
WEIGHT_FILES = (".pth", ".pt", ".th", ".tar", ".safetensors")


@dataclass(frozen=True)
class LearningRateSchedule:
    """One of the forms in the module docstring."""

    kind: str
    value: float | None = None  # η_min of a cosine, γ of the others
    epochs: tuple[int, ...] = ()  # of multistep

    def scheduler(
        self,
        optimizer: Optimizer,
        learning_rate: float,  # η; the optimiser's own may be another one
        steps: int,  # of an epoch
        max_epochs: int,  # T
    ) -> lr_scheduler.LRScheduler:
        """PyTorch's scheduler, to be advanced after every step."""
        if self.kind == "cosine":
            share = self.value / learning_rate if self.value else 0.01
            floor = share * optimizer.param_groups[0]["lr"]
            return lr_scheduler.CosineAnnealingLR(optimizer, max_epochs * steps, floor)
        if self.kind == "multistep":
            milestones = [epoch * steps for epoch in self.epochs]
            return lr_scheduler.MultiStepLR(optimizer, milestones, self.value)
        return lr_scheduler.StepLR(optimizer, steps, self.value or 1.0)


def learning_rate_schedule(text: str) -> LearningRateSchedule:
    """argparse type: one of FORMS.

    >>> learning_rate_schedule("multistep:10,15:0.5")
    LearningRateSchedule(kind='multistep', value=0.5, epochs=(10, 15))
    """
    kind, *words = text.split(":")
    epochs = ()
    try:
        if kind == "multistep":
            epochs = tuple(map(int, words.pop(0).split(","))) if words else ()
            words = words or ["0.1"]
        values = [float(word) for word in words]
    except ValueError:
        values = [math.nan]
    counts = {"cosine": (0, 1), "multistep": (1,), "exponential": (1,), "constant": (0,)}
    valid = len(values) in counts.get(kind, ()) and all(0 < x < math.inf for x in values)
    if kind == "multistep":
        valid = valid and min(epochs, default=0) >= 1 and list(epochs) == sorted({*epochs})
    if not valid:
        raise argparse.ArgumentTypeError(f"must be {FORMS}; got {text}")
    return LearningRateSchedule(kind, *(values or [None]), epochs)


FILE, FOLDER = {"metavar": "FILE"}, {"metavar": "DIR"}
COUNT = {"type": cli.positive_int, "metavar": "N"}
EPOCHS = COUNT | {"metavar": "E"}
RATE = {"type": cli.positive_float, "metavar": "F"}
WEIGHT_OPTION = {"type": cli.nonnegative_float, "metavar": "F"}
SHARE = {"type": cli.fraction, "metavar": "S"}
BITS_OPTION = {"type": cli.number(int, lambda x: 2 <= x <= 16, "2 to 16"), "metavar": "B"}
EMA_OPTION = {"type": cli.number(float, lambda x: 0 < x <= 1, "in (0, 1]"), "metavar": "F"}
FINAL = "its final value, reached along a cosine (default: the same)"

GROUPS = {  # first option of each -> title on the help page
    "architecture": "network and images",
    "max_epochs": "training",
    "weight_quant": "quantisation",
    "prune_method": "pruning",
    "oscillations_dampen_weight": "oscillating weights",
    "cuda": "machine",
}


@dataclass
class TrainingOptions:
    """All options, with their defaults filled in and checked."""

    architecture: str = option(
        None,
        "resnet18_quantized resnet50_quantized mobilenet_v2_quantized "
        "efficientnet_lite_quantized, or any MODEL of main_trueobs.py with _quantized appended",
        metavar="NAME_quantized",
        required=True,
    )
    dataset: str = option("imagenet", "what to train on", choices=DATASETS)
    images_dir: str | None = option(
        None,
        "folder with train/ and val/ (default: ../imagenet, ../cifar10; digits needs none)",
        **FOLDER,
    )
    classes: str | None = option(
        None, "class names, one a line, in the order of the network's outputs", **FILE
    )
    weights: str | None = option(
        None,
        "dense weights to start from (default: downloaded, or shipped with the toolkit)",
        **FILE,
    )
    model_dir: str | None = option(
        None, "the same as --weights: the file, or a folder with this one file", **FOLDER
    )
    image_size: int | None = option(
        None,
        "side of the network's input in pixels (default: what the network says, or else "
        "imagenet and folder 224, cifar10 32, digits 16)",
        **COUNT,
    )
    train_samples: int | None = option(
        None, "training images, chosen by --seed (default: all)", **COUNT
    )
    augment: bool = option(True, "random crops or shifts, and flips, of training images")
    num_workers: int | None = option(
        None,
        "processes that decode images (default: 0 for cifar10 and digits, which are decoded "
        "once, otherwise one per core, 8 at most)",
        type=cli.nonnegative_int,
        metavar="N",
    )

    max_epochs: int = option(20, "passes over the training images", **COUNT)
    batch_size: int = option(128, "images per batch", **COUNT)
    optimizer: str = option("SGD", "optimiser of weights, biases and norms", choices=OPTIMISERS)
    learning_rate: float = option(1e-2, "initial learning rate", **RATE)
    learning_rate_schedule: LearningRateSchedule = option(
        "cosine",
        f"{FORMS}. The number of a cosine is the final learning rate "
        "(default: 0.01 × --learning-rate), that of the others the factor",
        type=learning_rate_schedule,
        metavar="SCHEDULE",
    )
    momentum: float = option(0.9, "momentum of SGD", type=cli.fraction, metavar="F")
    weight_decay: float = option(1e-4, "weight decay of the optimiser", **WEIGHT_OPTION)
    reestimate_bn_stats: bool = option(
        False, "collect the running statistics of batch norms again before each evaluation"
    )
    reestimate_bn_batches: int = option(
        50, "training batches, not augmented, to average them over", **COUNT
    )

    weight_quant: bool = option(True, "quantise weights; first and last layer: 8 bits")
    act_quant: bool = option(True, "quantise the inputs of layers; first and last layer: 8 bits")
    n_bits: int = option(4, "bits of weights, 2 to 16", **BITS_OPTION)
    n_bits_act: int | None = option(None, "bits of inputs (default: as --n-bits)", **BITS_OPTION)
    per_channel: bool = option(False, "a step for each output channel, not for each layer")
    weight_quant_method: str = option(
        "MSE",
        "initial range of weights: of least squared error, or from minimum to maximum",
        choices=RANGE_METHODS,
    )
    act_quant_method: str = option("MSE", "the same for inputs", choices=RANGE_METHODS)
    num_est_batches: int = option(1, "batches to estimate the ranges of inputs from", **COUNT)
    sep_quant_optimizer: bool = option(True, "a separate optimiser for the steps")
    quant_optimizer: str = option("Adam", "optimiser of the steps", choices=OPTIMISERS)
    quant_learning_rate: float = option(
        1e-5, "its initial learning rate; it follows the same schedule", **RATE
    )
    quant_weight_decay: float = option(
        0.0, "weight decay of the steps, whichever optimiser they have", **WEIGHT_OPTION
    )

    prune_method: str = option(
        "none",
        "zhu_gupta: gradual magnitude pruning, sparsity along a cubic",
        choices=("none", "zhu_gupta"),
    )
    s_i: float = option(0.0, "initial sparsity", **SHARE)
    s_f: float | None = option(
        None, "final sparsity (default: 0.75, or that of the pattern)", **SHARE
    )
    prune_epoch_start: int = option(
        0, "epochs before pruning begins", type=cli.nonnegative_int, metavar="E"
    )
    prune_last_epoch: int | None = option(
        None,
        "epochs after which the last weights are removed (default: three quarters of --max-epochs)",
        **EPOCHS,
    )
    delta_t: int | None = option(
        None,
        "steps between masks (default: 100, or a twentieth of the pruning if that is less)",
        **COUNT,
    )
    tile_size: int | None = option(
        None,
        "prune in tiles of T weights along input channels (default: no pattern)",
        **COUNT | {"metavar": "T"},
    )
    zeros_per_tile: int | None = option(None, "zeros in each tile", **COUNT | {"metavar": "Z"})
    first_last_sparsity: float = option(
        0.5, "highest sparsity of first and last layer; 0.5 is the size of 8 bits", **SHARE
    )

    oscillations_dampen_weight: float = option(
        0.0,
        "weight in the loss of latent weights' squared distance to the grid; 0: none",
        **WEIGHT_OPTION,
    )
    oscillations_dampen_weight_final: float | None = option(None, FINAL, **WEIGHT_OPTION)
    oscillations_freeze_threshold: float = option(
        0.0, "oscillations per step above which a weight is frozen; 0: never", **WEIGHT_OPTION
    )
    oscillations_freeze_threshold_final: float | None = option(None, FINAL, **RATE)
    oscillations_freeze_ema_momentum: float = option(
        0.01, "momentum of the moving averages of frequency and code", **EMA_OPTION
    )

    cuda: bool | None = option(None, "as --device cuda; --no-cuda: as --device cpu")
    deterministic: bool = option(False, "only algorithms that give the same bits every time")
    tb_logging_dir: str | None = option(
        None, "folder for TensorBoard logs (default: no logs)", **FOLDER
    )

    def __post_init__(self) -> None:
        """Fill defaults that depend on other options; raise UserError for contradictions."""
        network_name(self.architecture)
        if self.model_dir is not None:
            if self.weights is not None:
                raise UserError("--model-dir and --weights say the same: pass one of them")
            self.weights = weights_in(self.model_dir)
        floor = self.learning_rate_schedule.value
        if self.learning_rate_schedule.kind == "cosine" and (floor or 0) > self.learning_rate:
            text = f"--learning-rate-schedule: the cosine ends at {floor:g}, above"
            raise UserError(f"{text} --learning-rate {self.learning_rate:g}")
        if self.prune_method != "none":
            self._check_pruning()
        elif self.tile_size or self.zeros_per_tile or self.s_f is not None:
            raise UserError("--s-f, --tile-size and --zeros-per-tile need --prune-method zhu_gupta")
        for name in ("dampen_weight", "freeze_threshold"):
            first, last = (f"oscillations_{name}{end}" for end in ("", "_final"))
            flag = f"--{first.replace('_', '-')}"
            if getattr(self, last) is None:
                setattr(self, last, getattr(self, first))
            elif name == "freeze_threshold" and not getattr(self, first):
                raise UserError(f"{flag}-final has no effect without {flag}")
            if getattr(self, last) and not self.weight_quant:
                raise UserError(f"{flag} has no effect with --no-weight-quant")
        self.n_bits_act = self.n_bits_act or self.n_bits

    def _check_pruning(self) -> None:
        tile, zeros = self.tile_size, self.zeros_per_tile
        if (tile is None) != (zeros is None):
            raise UserError("--tile-size and --zeros-per-tile belong together")
        if tile is not None and zeros >= tile:
            raise UserError(f"--zeros-per-tile {zeros} must be below --tile-size {tile}")
        default = 0.75 if tile is None else zeros / tile
        if self.s_f is None:
            self.s_f = default
        elif tile is not None and self.s_f != default:
            raise UserError(f"--s-f {self.s_f:g}: {zeros} zeros in tiles of {tile} are {default:g}")
        if self.s_i > self.s_f:
            raise UserError(f"--s-i {self.s_i:g} is above --s-f {self.s_f:g}")
        start, epochs = self.prune_epoch_start, self.max_epochs
        if self.prune_last_epoch is None:
            self.prune_last_epoch = max(start + 1, 3 * epochs // 4)
        if not start < self.prune_last_epoch <= epochs:
            text = f"--prune-last-epoch {self.prune_last_epoch} must be above --prune-epoch-start"
            raise UserError(f"{text} {start} and at most --max-epochs {epochs}")

    def settings(self) -> dict[str, Any]:
        """Everything that the results depend on, except the seed."""
        settings = {name: value for name, value in vars(self).items() if name not in NOT_SETTINGS}
        if self.classes is None:  # as in the results of before there was this option
            del settings["classes"]
        return settings | {"learning_rate_schedule": str(self.learning_rate_schedule)}

    def run_name(self, seed: int) -> str:
        """The name of a run's files: network, dataset, compression, seed."""
        words = [f"w{self.n_bits}"] * self.weight_quant + [f"a{self.n_bits_act}"] * self.act_quant
        if self.prune_method != "none":
            pattern = f"{self.zeros_per_tile}of{self.tile_size}" if self.tile_size else ""
            words.append(f"zeros{pattern or f'{100 * self.s_f:.10g}'}")
        network = model_tag(network_name(self.architecture))
        return "_".join([network, self.dataset, *(words or ["dense"]), f"seed{seed}"])


def add_training_options(parser: argparse.ArgumentParser) -> None:
    """All options of train-compressed."""
    for field in dataclasses.fields(TrainingOptions):
        if field.name in GROUPS:
            add = parser.add_argument_group(GROUPS[field.name]).add_argument
        words = {name: value for name, value in field.metadata.items() if name not in OURS}
        if not words.keys() & {"type", "metavar", "choices"}:
            words["action"] = argparse.BooleanOptionalAction
            words["help"] += " (default: off)" if field.default is False else ""
        added = add(f"--{field.name.replace('_', '-')}", **words)
        added.default = field.default  # later, or Python before 3.13 would add it to the help
        if field.name == "augment":
            add("--noaug", dest="augment", action="store_false", help="--no-augment")
    add_study_options(parser, "fine_tuning")


def training_options(args: argparse.Namespace) -> TrainingOptions:
    """From parsed arguments; raises UserError for contradictions."""
    fields = dataclasses.fields(TrainingOptions)
    return TrainingOptions(**{field.name: getattr(args, field.name) for field in fields})


def weights_in(model_dir: str) -> str:
    """The file of weights that --model-dir names, or that is alone in its folder."""
    if not os.path.isdir(model_dir):
        return model_dir
    files = sorted(name for name in os.listdir(model_dir) if name.endswith(WEIGHT_FILES))
    if len(files) != 1:
        names = ", ".join(files[:5]) or "no weights"
        raise UserError(f"--model-dir {model_dir}: contains {names}; name the file itself")
    return os.path.join(model_dir, files[0])


def network_name(architecture: str) -> str:
    """
    >>> network_name("resnet18_quantized")
    'resnet18'
    """
    name = architecture.removesuffix(SUFFIX)
    if not name or name == architecture:
        text = f"must be a model's name and {SUFFIX}, as in resnet18{SUFFIX}"
        raise UserError(f"--architecture {architecture}: {text}")
    return name


def training_device(device: str, cuda: bool | None) -> torch.device:
    """The device that --device, or --cuda or --no-cuda, names; raises UserError if it is absent."""
    if cuda is not None and device != "auto":
        raise UserError("--cuda and --no-cuda stand for --device: pass one of them")
    if cuda and not torch.cuda.is_available():
        raise UserError("--cuda: this PyTorch sees no GPU; pass --no-cuda to train on the CPU")
    return resolve_device({None: device, True: "cuda", False: "cpu"}[cuda])
