"""Fine-tuning a network that is quantised, pruned, or both.

One step, with the network's W, its steps Δ and masks M (compressed_model.py),

    loss = cross-entropy(network with Q(M ⊙ W)) + λ dampening(W)
    W, biases, norms   one stride of --optimizer
    Δ                  one stride of --quant-optimizer, or of the same
    then               Δ kept positive, oscillating weights frozen, masks renewed if they are due

and after each epoch the plain network that was learned is made, its batch norms re-estimated if
asked for, and its top-1 measured on the test images as any network of the toolkit is.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from modelutils import evaluate, find_layers
from obc.solver.errors import UserError, log
from obc.toolkit.corrections import BatchNorm, placed
from pruning_vs_quantization import compressed_model as compressed
from pruning_vs_quantization import oscillations
from pruning_vs_quantization.learned_steps import learned_steps
from pruning_vs_quantization.magnitude_pruning import CubicSchedule, GradualPruning
from pruning_vs_quantization.plots import study_package
from pruning_vs_quantization.schedules import cosine
from pruning_vs_quantization.starting_ranges import input_grids
from pruning_vs_quantization.training_images import TrainingData
from pruning_vs_quantization.training_state import Progress, load_training, save_training
from spdy import batchnorm_averages

Optimisers = list[torch.optim.Optimizer]
STEPS_BETWEEN_MASKS, MASKS = 100, 20  # at most, at least


# -- before the first step -------------------------------------------------------------------------


def compressed_network(
    args: argparse.Namespace, dense: nn.Module, images: TrainingData, device: torch.device
) -> nn.Module:
    """A copy of the dense network with quantisers and trackers, as the options say."""
    model = copy.deepcopy(dense)
    if args.weight_quant:
        bits = compressed.layer_bits(model, args.n_bits)
        compressed.quantise_weights(model, bits, args.per_channel, args.weight_quant_method)
    if args.act_quant:
        bits = compressed.layer_bits(model, args.n_bits_act)
        grids = input_grids(
            dense,
            find_layers(dense),
            bits,
            args.act_quant_method,
            images.plain(args.num_est_batches),
            device,
        )
        compressed.quantise_inputs(model, grids)
    if args.oscillations_freeze_threshold:
        oscillations.start_tracking(model)
    return model


def pruning_plan(args: argparse.Namespace, steps_per_epoch: int) -> GradualPruning | None:
    """How to prune, if at all."""
    if args.prune_method == "none":
        return None
    first, last = (
        epoch * steps_per_epoch for epoch in (args.prune_epoch_start, args.prune_last_epoch)
    )
    every = args.delta_t or max(1, min(STEPS_BETWEEN_MASKS, (last - first) // MASKS))
    schedule = CubicSchedule(args.s_i, args.s_f, first, last)
    return GradualPruning(schedule, every, args.first_last_sparsity, args.tile_size)


def make_optimisers(args: argparse.Namespace, model: nn.Module) -> Optimisers:
    """One for the weights and all that is like them, and one for the steps, or the same.

    Every group of parameters has its learning rate at the start under "start".
    """
    steps = [quantiser.step for quantiser in learned_steps(model)]
    known = {id(step) for step in steps}
    others = [parameter for parameter in model.parameters() if id(parameter) not in known]
    groups = [_group(others, args.learning_rate, args.weight_decay)]
    if not steps:
        return [_optimiser(args, args.optimizer, groups)]
    if not args.sep_quant_optimizer:
        groups.append(_group(steps, args.learning_rate, args.quant_weight_decay))
        return [_optimiser(args, args.optimizer, groups)]
    of_steps = _group(steps, args.quant_learning_rate, args.quant_weight_decay)
    return [
        _optimiser(args, args.optimizer, groups),
        _optimiser(args, args.quant_optimizer, [of_steps]),
    ]


def _group(parameters: list[Tensor], rate: float, weight_decay: float) -> dict[str, Any]:
    return {"params": parameters, "lr": rate, "start": rate, "weight_decay": weight_decay}


def _optimiser(args: argparse.Namespace, kind: str, groups: list[dict]) -> torch.optim.Optimizer:
    options = {"momentum": args.momentum} if kind == "SGD" else {}
    return getattr(torch.optim, kind)(groups, **options)


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Inside, only algorithms that give the same bits every time, if that is wanted."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


# -- the run ---------------------------------------------------------------------------------------


class Training:
    """One run: the network, its optimisers, and how far they have come."""

    def __init__(
        self, args: argparse.Namespace, dense: nn.Module, images: TrainingData, device: torch.device
    ) -> None:
        """`dense` is on the device, in the memory layout that is fast there."""
        self.args, self.dense, self.images, self.device = args, dense, images, device
        self.model = compressed_network(args, dense, images, device)
        self.pruning = pruning_plan(args, images.steps)
        if self.pruning:
            self.pruning.start(self.model)
        self.optimisers = make_optimisers(args, self.model)
        self.progress = Progress()
        norms = any(isinstance(module, BatchNorm) for module in dense.modules())
        if args.reestimate_bn_stats and not norms:
            raise UserError(
                "--reestimate-bn-stats: this model has no batch norm; pass --no-reestimate-bn-stats"
            )

    def run(self, state: Path, settings: dict[str, Any]) -> nn.Module:
        """Train all epochs that are left; the plain network that was learned.

        After each epoch all there is to know is written to the file `state`; one that is there is
        where training goes on.
        """
        if state.exists():
            self.progress = load_training(state, settings, self.model, self.optimisers)
            log.info("%s: going on after epoch %d", state, self.progress.epochs)
        plain = self._plain() if self.progress.epochs == self.args.max_epochs else self.dense
        with logbook(self.args.tb_logging_dir, self.progress.epochs) as write:
            while self.progress.epochs < self.args.max_epochs:
                plain = self._epoch()
                write(self.progress.history[-1])
                save_training(state, settings, self.progress, self.model, self.optimisers)
        return plain

    def _epoch(self) -> nn.Module:
        """Train for an epoch, evaluate, enter it in the history; the plain network."""
        started, progress = time.perf_counter(), self.progress
        loss = self._pass(progress.epochs)
        trained = time.perf_counter()
        plain = self._plain()
        entry = {
            "epoch": progress.epochs + 1,
            "loss": loss,
            "top1": evaluate(plain, self.images.test_batches(), self.device),
            "sparsity": compressed.sparsity(plain),
            "learning_rate": self.optimisers[0].param_groups[0]["lr"],
            "training_s": trained - started,
            "seconds": time.perf_counter() - started,
        }
        if self.args.oscillations_freeze_threshold:
            entry["frozen"] = oscillations.frozen_share(self.model)
        progress.epochs += 1
        progress.seconds += entry["seconds"]
        progress.history.append(entry)
        line = (
            f"epoch {progress.epochs} of {self.args.max_epochs}  {entry['seconds']:.1f} s  "
            f"loss {loss:.4f}  top-1 {entry['top1']:.2f}  sparsity {entry['sparsity']:.4f}"
        )
        log.info(line + (f"  frozen {entry['frozen']:.4f}" if "frozen" in entry else ""))
        return plain

    def _pass(self, number: int) -> float:
        """One pass over the training images, the epoch counted from 0; the mean loss."""
        total, steps = torch.zeros((), device=self.device), self.images.steps
        bar = tqdm(total=steps, desc=f"epoch {number + 1}", leave=False, disable=None)
        self.model.train()
        with bar:
            for step, (images, labels) in enumerate(self.images.epoch(number), number * steps):
                total += self._step(step, images, labels)
                bar.update()
        loss = float(total) / steps
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is not finite in epoch {number + 1}; pass a smaller --learning-rate"
            )
        return loss

    def _step(self, step: int, images: Tensor, labels: Tensor) -> Tensor:  # the loss
        """One step, counted from 0, as in the module docstring."""
        args, done = self.args, step / (self.args.max_epochs * self.images.steps)
        self._set_learning_rates(step / self.images.steps)
        logits = compressed.run_compressed(self.model, placed(images, self.device))
        loss = F.cross_entropy(logits, labels.to(self.device))
        first, last = args.oscillations_dampen_weight, args.oscillations_dampen_weight_final
        if first or last:
            loss = loss + cosine(first, last, done) * oscillations.dampening(self.model)
        for optimiser in self.optimisers:
            optimiser.zero_grad()
        loss.backward()
        for optimiser in self.optimisers:
            optimiser.step()
        for quantiser in learned_steps(self.model):
            quantiser.keep_positive()
        first, last = args.oscillations_freeze_threshold, args.oscillations_freeze_threshold_final
        if first:
            threshold = cosine(first, last, done)
            oscillations.freeze(self.model, args.oscillations_freeze_ema_momentum, threshold)
        if self.pruning:
            self.pruning.update(self.model, step + 1)
        return loss.detach()

    def _set_learning_rates(self, epochs_done: float) -> None:
        args = self.args
        share = args.learning_rate_schedule.share(args.learning_rate, epochs_done, args.max_epochs)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["start"] * share

    def _plain(self) -> nn.Module:
        """What has been learned, as a plain network, its batch norms re-estimated if asked for."""
        plain = compressed.deployed(self.model, self.dense)
        if self.args.reestimate_bn_stats:
            batches = self.images.plain(self.args.reestimate_bn_batches)
            batchnorm_averages(plain, batches, self.device)
        return plain

    def figures(self) -> dict[str, Any]:
        """What came out."""
        last = self.progress.history[-1]
        return {
            "top1": last["top1"],
            "sparsity": last["sparsity"],
            "bits_per_weight": compressed.bits_per_weight(self.model),
            "seconds": self.progress.seconds,
            "training_images": len(self.images.data.calibration),
            "test_images": len(self.images.data.test),
            "epochs": self.progress.history,
        }


@contextmanager
def logbook(folder: str | None, epochs_done: int) -> Iterator[Any]:
    """A function that takes the record of an epoch; for TensorBoard, if there is a folder."""
    if folder is None:
        yield lambda entry: None
        return
    study_package("tensorboard")
    writer = study_package("torch.utils.tensorboard").SummaryWriter(
        folder, purge_step=epochs_done + 1
    )

    def write(entry: dict[str, Any]) -> None:
        for name, value in entry.items():
            if name != "epoch":
                writer.add_scalar(name, value, entry["epoch"])
        writer.flush()

    try:
        yield write
    finally:
        writer.close()
