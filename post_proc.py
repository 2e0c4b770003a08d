"""Correct a compressed model: `python post_proc.py MODEL DATASET FILE` (see --help).

FILE is a checkpoint that main_trueobs.py saved or, with --database, a profile to stitch. Then the
corrections that are asked for, always in this order; last, the model is saved and its accuracy
measured.

    --gap        outputs of all layers back to the dense model's    retraining.py
    --bnt        running statistics of batch norms                  corrections.py
    --statcorr   mean and deviation of norm outputs                 corrections.py
    --lintune    biases and norms trained on the logits             retraining.py
    --finetune   all parameters trained on the labels               retraining.py

Why this order. Global AdaPrune aims at the dense model's outputs before the norms, for which the
dense statistics, that the norms still have, are the right ones: it comes first. Statistics are
taken of what is there after that; the correction after the tuning, since tuning would replace the
statistics that the correction was folded for. Training on logits or labels comes last and starts
from good statistics: it is done with statistics fixed, so whatever changed them afterwards would
undo what has been learned around them.

A training epoch is one pass over the calibration images, in a new order and, unless --noaug, with
new augmentation. Statistics correction takes the first N of them, never augmented.
"""

from __future__ import annotations

import obc.toolkit.starting  # noqa: F401  # isort: skip

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import torch
from torch import Tensor, nn

from datautils import calibration_batches
from modelutils import find_layers
from obc.inputs import files
from obc.solver.errors import UserError, log
from obc.toolkit import cli, records
from obc.toolkit.corrections import batchnorm_tune, statistics_correction
from obc.toolkit.fingerprints import content_hash
from obc.toolkit.leveldb import KINDS, Database, model_tag
from obc.toolkit.profiles import read_profile
from obc.toolkit.resume import RunState, open_state, state_folder
from obc.toolkit.session import Invocation, Session, common_options, load_compressed
from obc.toolkit.training import finetune, global_adaprune, train_vectors
from quant import put_layer

DEPENDENT = {  # option: the correction that it belongs to
    "statcorr_samples": "statcorr",
    "lintune_loss": "lintune",
    "finetune_mse": "finetune",
    "prefix": "database",
}


# -- options ---------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="post_proc.py", description=__doc__.splitlines()[0])
    cli.add_common_options(parser)
    cli.add_resume_options(parser)
    add = parser.add_argument
    add("file", metavar="FILE", help="compressed checkpoint; with --database, profile to stitch")
    add("--database", choices=list(KINDS), help="kind of the database that FILE is a profile of")
    add("--prefix", metavar="DIR", help="where models_unstr/ etc. are (default: here)")
    add("--skip-firstlast", action="store_true", help="leave first and last layer dense")
    add("--save", metavar="FILE", help="where to save the corrected model")
    group = parser.add_argument_group("corrections of statistics")
    add = group.add_argument
    add("--bnt", action="store_true", help="batch-norm tuning")
    add(
        "--bnt-batches",
        metavar="N",
        type=cli.positive_int,
        default=100,
        help="batches that batch norms are tuned on",
    )
    add("--statcorr", action="store_true", help="match norm outputs' statistics to the dense ones")
    add(
        "--statcorr-samples",
        metavar="N",
        type=cli.positive_int,
        help="images that statistics are taken of, one batch (default: --nsamples)",
    )
    group = parser.add_argument_group("corrections by training")
    add = group.add_argument
    add("--gap", action="store_true", help="global AdaPrune: match all layers' outputs at once")
    add("--lintune", action="store_true", help="train biases and norms on the dense logits")
    add("--lintune-loss", action="store_true", help="… on the labels instead, by cross-entropy")
    add("--finetune", action="store_true", help="train all parameters on the labels")
    add("--finetune-mse", action="store_true", help="… on the dense logits instead")
    for name, epochs, lr in (("gap", 100, 1e-5), ("lintune", 100, 1e-4), ("finetune", 2, 1e-5)):
        add(
            f"--{name}-epochs",
            metavar="N",
            type=cli.positive_int,
            default=epochs,
            help="passes over the calibration images",
        )
        add(
            f"--{name}-lr",
            metavar="F",
            type=cli.positive_float,
            default=lr,
            help="Adam's learning rate",
        )
    return parser


def check_options(args: argparse.Namespace) -> None:
    """What argparse cannot see by itself; raises UserError before any work is done."""
    for option, wanted in DEPENDENT.items():
        if getattr(args, option) and not getattr(args, wanted):
            flag, needed = (f"--{name.replace('_', '-')}" for name in (option, wanted))
            raise UserError(f"{flag} has no effect without {needed}")
    args.nrounds = args.nrounds or (1 if args.noaug else 10)
    if not Path(args.file).exists():
        raise UserError(f"{args.file}: no such file")
    if args.save:
        if Path(args.save).suffix == ".json":
            raise UserError(f"--save {args.save}: .json is for the record; name a .pth")
        files.check_writable(args.save)


# -- the model and its images ----------------------------------------------------------------------


def load_model(args: argparse.Namespace, dense: nn.Module) -> nn.Module:
    """The model in the checkpoint FILE, or stitched from a database by the profile FILE."""
    model = copy.deepcopy(dense)
    if args.database:
        profile = read_profile(args.file)
        db = Database.open(args.database, model_tag(args.model), args.prefix or ".")
        db.stitch(model, profile)
        for name in find_layers(model).keys() - profile.keys():
            log.info("%s left dense: not in the profile", name)
    else:
        load_compressed(model, args.file)
    if args.skip_firstlast:
        names = list(find_layers(model))
        for name in dict.fromkeys((names[0], names[-1])):
            put_layer(model.get_submodule(name), dense.get_submodule(name).state_dict())
            log.info("%s left dense: --skip-firstlast", name)
    return model


class Epochs:
    """Batches of calibration images: every iteration in a new order, with new augmentation.

    A new object begins at the same first epoch; epochs depend on --seed alone.
    """

    def __init__(self, session: Session) -> None:
        self.session, self.numbers = session, count()

    def __len__(self) -> int:
        return len(self.session.calibration())

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        options, data = self.session.options, self.session.data
        generator = torch.Generator().manual_seed(options.seed)
        for _ in range(next(self.numbers) + 1):
            seed = int(torch.randint(2**62, (), generator=generator))
        generator.manual_seed(seed)
        chosen = data.calibration.chosen
        order = torch.randperm(len(chosen), generator=generator).tolist()
        images = replace(data.calibration, chosen=[chosen[index] for index in order])
        shuffled = replace(data, calibration=images)
        return iter(
            calibration_batches(
                shuffled,
                batchsize=options.batchsize,
                workers=options.workers,
                augment=not options.noaug,
                seed=seed,
            )
        )


def statistics_images(session: Session, count: int | None) -> Tensor:  # (N, 3, s, s)
    """The one batch that statistics correction looks at."""
    available = len(session.data.calibration)
    wanted = count or available
    if wanted > available:
        raise UserError(
            f"--statcorr-samples {wanted} is more than the {available} calibration "
            "images; pass --nsamples"
        )
    workers = session.options.workers
    images, _ = next(iter(calibration_batches(session.data, batchsize=wanted, workers=workers)))
    return images


# -- the corrections -------------------------------------------------------------------------------


@dataclass
class StepReport:
    """What a correction did; a line in the log and an entry in the record."""

    name: str
    seconds: float
    losses: list[float] | None  # mean per epoch, of a training

    def line(self) -> str:
        text = f"{self.name} {self.seconds:.2f} s"
        if self.losses:
            text += f"  loss {self.losses[0]:.4g} in the first epoch, {self.losses[-1]:.4g} in the "
            text += f"last of {len(self.losses)}"
        return text


def corrections(
    args: argparse.Namespace, session: Session, model: nn.Module, state: RunState
) -> dict[str, Callable[[], list[float] | None]]:
    """All corrections by option, in the order of the module docstring; each changes `model`."""
    dense, device = session.model, session.device
    models = (model, dense)

    def tune_batchnorms() -> None:
        batches = session.calibration(augment=not args.noaug, nrounds=args.nrounds)
        batchnorm_tune(model, batches, device, args.bnt_batches)

    return {
        "gap": lambda: global_adaprune(
            *models, Epochs(session), device, args.gap_epochs, args.gap_lr, state
        ),
        "bnt": tune_batchnorms,
        "statcorr": lambda: statistics_correction(
            *models, statistics_images(session, args.statcorr_samples), device
        ),
        "lintune": lambda: train_vectors(
            *models,
            Epochs(session),
            device,
            args.lintune_epochs,
            args.lintune_lr,
            cross_entropy=args.lintune_loss,
            state=state,
        ),
        "finetune": lambda: finetune(
            *models,
            Epochs(session),
            device,
            args.finetune_epochs,
            args.finetune_lr,
            cross_entropy=not args.finetune_mse,
            state=state,
        ),
    }


def correct(
    args: argparse.Namespace, session: Session, model: nn.Module, state: RunState
) -> list[StepReport]:
    """Run the corrections that are asked for; a report of each, logged."""
    reports = []
    for name, correction in corrections(args, session, model, state).items():
        if not getattr(args, name):
            continue
        if entry := state.load(name):
            model.load_state_dict(entry.tensors)
            reports.append(StepReport(**entry.figures))
            log.info("resuming: %s is done", name)
            continue
        started = time.perf_counter()
        losses = correction()
        reports.append(StepReport(name, time.perf_counter() - started, losses))
        log.info(reports[-1].line())
        state.save(name, model.state_dict(), vars(reports[-1]))
    return reports


# -- the command -----------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    check_options(args)
    started = time.perf_counter()
    session = Session.of(common_options(args))
    model = load_model(args, session.model)
    contents = {"compressed model": content_hash(model.state_dict())}
    invocation = Invocation.of(build_parser(), args)
    marks = session.fingerprint(invocation, contents)
    records.check_repeat(args.repeat, marks)
    folder = state_folder(args.save) if args.save else None
    with open_state(folder, marks, args.restart, session.world) if folder else RunState() as state:
        reports = correct(args, session, model, state)
        if args.save:
            files.save_checkpoint(model.state_dict(), args.save)
        accuracy = session.accuracy(model)
        if args.save:
            records.write_run(
                Path(args.save).with_suffix(".json"),
                invocation.command,
                invocation.arguments,
                fingerprint=marks,
                seconds=time.perf_counter() - started,
                top1=accuracy,
                corrections=[vars(report) for report in reports],
            )
        state.finish()
    cli.print_result(f"top-1 {accuracy:.2f}")
    session.world.leave()


def main(argv: list[str] | None = None) -> int:
    return cli.command(build_parser, run, records.repeated(build_parser, argv))


if __name__ == "__main__":
    sys.exit(main())
