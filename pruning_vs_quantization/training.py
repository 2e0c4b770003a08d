"""Fine-tuning a network that is quantised, pruned, or both.

One step, with the network's W, its steps Δ and masks M (compressed_model.py),

    loss = cross-entropy(network with Q(M ⊙ W)) + λ dampening(W)
    W, biases, norms   one step of --optimizer
    Δ                  one step of --quant-optimizer, or of the same
    then               Δ kept positive, oscillating weights frozen, masks renewed if they are due

and after each epoch the plain network is made from what was learned, its batch norms re-estimated
if asked for, and its top-1 measured on the test images like that of any network of the toolkit. The
loop over epochs and steps is the toolkit's (obc/toolkit/training.py).
"""

from __future__ import annotations

import copy
import math
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelutils import find_layers, first_and_last
from obc.solver.errors import UserError, log
from obc.toolkit.corrections import BatchNorm, batchnorm_averages
from obc.toolkit.evaluation import evaluate
from obc.toolkit.resume import RunState
from obc.toolkit.training import TrainingTask, train
from pruning_vs_quantization import compressed_model as compressed
from pruning_vs_quantization import oscillations
from pruning_vs_quantization.learned_steps import input_grids, learned_steps
from pruning_vs_quantization.magnitude_pruning import CubicSchedule, GradualPruning
from pruning_vs_quantization.plots import study_package
from pruning_vs_quantization.training_images import TrainingData
from pruning_vs_quantization.training_options import TrainingOptions

STEPS_BETWEEN_MASKS, MASKS = 100, 20  # at most, at least


# -- before the first step -------------------------------------------------------------------------


def compressed_network(
    options: TrainingOptions,
    dense: nn.Module,
    ends: tuple[str, ...],  # the first and the last layer
    images: TrainingData,
    device: torch.device,
) -> nn.Module:
    """A copy of the dense network with the quantisers and trackers that the options ask for."""
    model = copy.deepcopy(dense)
    if options.weight_quant:
        bits = compressed.layer_bits(model, options.n_bits, ends)
        starting = options.per_channel, options.weight_quant_method
        compressed.quantise_weights(model, bits, *starting)
    if options.act_quant:
        bits = compressed.layer_bits(model, options.n_bits_act, ends)
        starting = options.act_quant_method, images.plain(options.num_est_batches)
        grids = input_grids(dense, find_layers(dense), bits, *starting, device)
        compressed.quantise_inputs(model, grids)
    if options.oscillations_freeze_threshold:
        oscillations.start_tracking(model)
    return model


def make_optimizers(options: TrainingOptions, model: nn.Module) -> list[torch.optim.Optimizer]:
    """One for weights, biases and norms, and one for the steps, or the same."""

    def optimizer(kind: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        momentum = {"momentum": options.momentum} if kind == "SGD" else {}
        return getattr(torch.optim, kind)(groups, **momentum)

    rate = options.learning_rate
    steps = [quantiser.step for quantiser in learned_steps(model)]
    ids = {id(step) for step in steps}
    others = [parameter for parameter in model.parameters() if id(parameter) not in ids]
    groups = [{"params": others, "lr": rate, "weight_decay": options.weight_decay}]
    step_group = {"params": steps, "lr": rate, "weight_decay": options.quant_weight_decay}
    if steps and options.sep_quant_optimizer:
        step_group["lr"] = options.quant_learning_rate
        of_steps = optimizer(options.quant_optimizer, [step_group])
        return [optimizer(options.optimizer, groups), of_steps]
    return [optimizer(options.optimizer, [*groups, step_group] if steps else groups)]


# -- the run ---------------------------------------------------------------------------------------


class FineTuning:
    """One run: the network, its optimisers, and its history."""

    def __init__(
        self,
        options: TrainingOptions,
        dense: nn.Module,  # on the device, in the memory layout that is fast there
        images: TrainingData,
        device: torch.device,
    ) -> None:
        norms = [module for module in dense.modules() if isinstance(module, BatchNorm)]
        if options.reestimate_bn_stats and not norms:
            raise UserError(
                "--reestimate-bn-stats: this model has no batch norm; pass --no-reestimate-bn-stats"
            )
        if options.tb_logging_dir is not None:
            study_package("tensorboard")  # or an error before the first epoch
        self.options, self.dense, self.images, self.device = options, dense, images, device
        ends = first_and_last(dense, torch.zeros(2, *images.data.preprocessing.image_shape))
        self.model = compressed_network(options, dense, ends, images, device)
        self.pruning: GradualPruning | None = None
        if options.prune_method != "none":
            first = options.prune_epoch_start * len(images)
            last = options.prune_last_epoch * len(images)
            every = options.delta_t or max(1, min(STEPS_BETWEEN_MASKS, (last - first) // MASKS))
            cubic = CubicSchedule(options.s_i, options.s_f, first, last)
            limit, tile = options.first_last_sparsity, options.tile_size
            self.pruning = GradualPruning(cubic, every, limit, ends, tile)
            self.pruning.start(self.model)
        self.optimizers = make_optimizers(options, self.model)
        schedule = options.learning_rate_schedule
        self.schedulers = [
            schedule.scheduler(optimizer, options.learning_rate, len(images), options.max_epochs)
            for optimizer in self.optimizers
        ]
        self.history: list[dict[str, Any]] = []
        self.learned: nn.Module | None = None  # the plain network after the last epoch
        self.dense_top1 = math.nan  # until it runs

    def run(self, state: RunState) -> nn.Module:
        """Train all epochs that are not in `state`; the plain network that was learned."""
        epochs = self.options.max_epochs, "--learning-rate"
        task = TrainingTask(
            "training", self.images, self.device, *epochs, state, seconds_between_saves=0.0
        )
        self.dense_top1 = evaluate(self.dense, self.images.test_batches(), self.device).top1
        log.info("dense top-1 %.2f", self.dense_top1)
        self.model.train()
        self.history = train(
            task,
            self.loss,
            self.optimizers,
            self.model.state_dict,
            schedulers=self.schedulers,
            after_step=self.after_step,
            after_epoch=self.evaluated,
        )
        return self.learned or self.plain()

    def annealed(self, option: str) -> float:
        """The present value of an option that has a final one, too."""
        first, last = (getattr(self.options, f"oscillations_{option}{x}") for x in ("", "_final"))
        steps = self.options.max_epochs * len(self.images)
        return oscillations.annealed(first, last, self.schedulers[0].last_epoch / steps)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:  # ()
        """The loss of a batch, as in the module docstring."""
        loss = F.cross_entropy(compressed.run_compressed(self.model, images), labels)
        options = self.options
        if options.oscillations_dampen_weight or options.oscillations_dampen_weight_final:
            loss = loss + self.annealed("dampen_weight") * oscillations.dampening(self.model)
        return loss

    def after_step(self) -> None:
        """Restore the constraints that a step of the optimisers may have violated."""
        for quantiser in learned_steps(self.model):
            quantiser.keep_positive()
        if self.options.oscillations_freeze_threshold:
            momentum = self.options.oscillations_freeze_ema_momentum
            oscillations.freeze(self.model, momentum, self.annealed("freeze_threshold"))
        if self.pruning:
            self.pruning.update(self.model, self.schedulers[0].last_epoch + 1)

    def evaluated(self, figures: dict[str, Any]) -> dict[str, Any]:
        """The figures of an epoch with accuracy, sparsity and time; logged."""
        started = time.perf_counter()
        self.learned = plain = self.plain()
        top1 = evaluate(plain, self.images.test_batches(), self.device).top1
        seconds = figures["training_s"] + time.perf_counter() - started
        sparsity = compressed.network_sparsity(plain)
        figures |= {"top1": top1, "sparsity": sparsity, "seconds": seconds}
        if self.options.oscillations_freeze_threshold:
            figures["frozen"] = oscillations.frozen_share(self.model)
        line = (
            f"epoch {figures['epoch']} of {self.options.max_epochs}  {seconds:.1f} s  "
            f"loss {figures['loss']:.4f}  top-1 {top1:.2f}  sparsity {sparsity:.4f}"
        )
        log.info(line + (f"  frozen {figures['frozen']:.4f}" if "frozen" in figures else ""))
        if self.options.tb_logging_dir is not None:
            epoch, writer = figures["epoch"], study_package("torch.utils.tensorboard").SummaryWriter
            with writer(self.options.tb_logging_dir, purge_step=epoch) as log_file:  # later: void
                for name in figures.keys() - {"epoch"}:
                    log_file.add_scalar(name, figures[name], epoch)
        return figures

    def plain(self) -> nn.Module:
        """What was learned, as a plain network; its batch norms re-estimated if asked for."""
        plain = compressed.deployed(self.model, self.dense)
        if self.options.reestimate_bn_stats:
            batches = self.images.plain(self.options.reestimate_bn_batches)
            batchnorm_averages(plain, batches, self.device)
        return plain

    def figures(self) -> dict[str, Any]:
        """The results."""
        return {
            "top1": self.history[-1]["top1"],
            "dense_top1": self.dense_top1,
            "sparsity": self.history[-1]["sparsity"],
            "bits_per_weight": compressed.bits_per_weight(self.model),
            "seconds": sum(figures["seconds"] for figures in self.history),
            "training_images": len(self.images.data.calibration),
            "test_images": len(self.images.data.test),
            "classes": len(self.images.data.classes),
            "epochs": self.history,
        }
