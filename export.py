"""Write a compressed network for runtimes: `python export.py MODEL DATASET FILE --to FILE`.

FILE is a checkpoint or, with --database, a profile to stitch. The suffix of --to says what is
written:

    .onnx         integer weights, inputs rounded where the checkpoint rounds   export_onnx.py
    .pt2          a program of torch.export, which loads without this toolkit
    .safetensors  a checkpoint with packed codes                                export_codes.py

Channels that nothing reads are cut first (export_cut.py), except in a checkpoint. Where ONNX
Runtime is installed, a graph is checked against the network on calibration images, layer by layer
(export_check.py). --measure runs the ONNX file in the runtimes that are installed
(export_measure.py).
"""

from __future__ import annotations

import obc.toolkit.starting  # noqa: F401  # isort: skip

import argparse
import copy
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from datautils import test_batches
from obc.inputs import files
from obc.solver.errors import UserError, log
from obc.toolkit import cli, export_check, export_measure, export_onnx, export_sums, records
from obc.toolkit.export_codes import packed_state
from obc.toolkit.export_cut import Cut, cut_channels
from obc.toolkit.fingerprints import content_hash
from obc.toolkit.leveldb import Database, check_checkpoint, model_tag, origin_marks
from obc.toolkit.profiles import read_profile
from obc.toolkit.session import Invocation, Session, common_options, dense_files, load_compressed
from obc.toolkit.stitching import add_file_options, stitched
from obc.toolkit.timings import TIMED

EXPORT_SUFFIXES = (".onnx", ".pt2", ".safetensors")
ONNX_ONLY = ("int8_sums", "measure", "runtime")  # options


def build_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="export.py", description=__doc__.splitlines()[0])
    cli.add_common_options(parser)
    cli.add_resume_options(parser)
    add_file_options(parser)
    add = parser.add_argument
    add("--to", metavar="FILE", required=True, help="what to write: .onnx, .pt2 or .safetensors")
    add("--no-cut", action="store_true", help="keep channels that no layer reads")
    add("--int8-sums", action="store_true", help="round residual sums, too: another network")
    add("--strict", action="store_true", help="refuse a layer left in float32, or a wrong graph")
    add("--measure", action="store_true", help="size, latency and outputs in installed runtimes")
    add("--runtime", choices=list(TIMED), help="measure in this one only")
    return parser


def check_options(args: argparse.Namespace) -> None:
    """Checks beyond argparse's; raises UserError before any work is done."""
    suffix = Path(args.to).suffix
    if suffix not in EXPORT_SUFFIXES:
        *others, last = EXPORT_SUFFIXES
        raise UserError(f"--to {args.to}: name a {', '.join(others)} or {last} file")
    for option in ONNX_ONLY:
        if getattr(args, option) and suffix != ".onnx":
            raise UserError(f"--{option.replace('_', '-')} needs --to FILE.onnx")
    if args.runtime and not args.measure:
        raise UserError("--runtime has no effect without --measure")
    if args.prefix and not args.database:
        raise UserError("--prefix has no effect without --database")
    if not Path(args.file).exists():
        raise UserError(f"{args.file}: no such file")
    check_packages(args)
    inputs = {"the input": args.file, **dense_files(args.model, args.dataset, args.weights)}
    for output in (args.to, records.export_record(args.to)):
        files.check_writable(output)
        files.check_keeps("--to", output, inputs)


def check_packages(args: argparse.Namespace) -> None:
    """Raise a UserError if a package that the run needs is missing."""
    if Path(args.to).suffix == ".onnx":
        for name in ("onnx", "onnx_ir", "onnxscript"):
            export_onnx.package(name)
    if args.int8_sums:
        export_onnx.package("onnxruntime")
    if args.runtime:
        export_onnx.package(export_measure.RUNTIMES[TIMED[args.runtime]][0])
    elif args.measure:
        export_measure.installed_runtimes()


def exported_model(session: Session, args: argparse.Namespace) -> nn.Module:
    """The model in a checkpoint, or stitched from a database by a profile, on the CPU."""
    if args.database:
        profile = read_profile(args.file)
        db = Database.open(args.database, model_tag(args.model), args.prefix or ".")
        return stitched(session, db, profile).cpu()
    model = copy.deepcopy(session.model)
    load_compressed(model, args.file)
    check_checkpoint(args.file, session.model, session.weights_name)
    return model.cpu()


def check_left(left: dict[str, str], strict: bool) -> None:
    """Name the quantised layers that stay in float32; with --strict, a UserError."""
    for name, reason in left.items():
        if strict:
            raise UserError(f"--strict: {name} would stay in float32: {reason}")
        log.warning("%s left in float32: %s", name, reason)


def write_onnx(
    session: Session, model: nn.Module, args: argparse.Namespace
) -> tuple[bytes, dict[str, Any]]:
    """The contents of an ONNX file, and figures for the record."""
    graph, layers = export_onnx.quantised_graph(model, session.image_shape)
    check_left({x.name: x.left for x in layers if x.left}, args.strict)
    figures: dict[str, Any] = {"layers": export_onnx.as_records(layers), "rounded_sums": 0}
    images = next(iter(session.calibration()))[0]
    if export_check.can_check() and (wrong := export_check.wrong_place(model, graph, images)):
        if args.strict:
            raise UserError(f"--strict: the exported graph is wrong: {wrong}")
        log.warning("the exported graph is wrong: %s", wrong)
    if args.int8_sums:
        figures["rounded_sums"] = export_sums.round_sums(graph, images)
        log.info("rounded %d operands of sums, too", figures["rounded_sums"])
    return export_onnx.contents(graph), figures


def measured(
    session: Session, model: nn.Module, exported: bytes, args: argparse.Namespace
) -> dict[str, Any]:
    """Size, latencies and outputs of an exported network: printed, and for the record."""
    dense_model = copy.deepcopy(session.model).cpu()
    dense = export_onnx.contents(export_onnx.traced(dense_model, session.image_shape))
    cli.print_result(
        f"{len(exported) / 1e6:.2f} MB, {100 * len(exported) / len(dense):.1f} % of float32's "
        f"{len(dense) / 1e6:.2f} MB ({len(dense) / len(exported):.2f} × smaller)\n"
    )
    times, runners = [], {}
    names = [TIMED[args.runtime]] if args.runtime else export_measure.installed_runtimes()
    for name in names:
        times += export_measure.latencies(exported, dense, session.image_shape, name)
        if export_measure.runs_exported(times, name):
            runners[name] = export_measure.RUNTIMES[name][1](exported)
    cli.print_result(export_measure.latency_table(times) + "\n")
    batches = test_batches(session.image_data, batchsize=args.batchsize, workers=args.workers)
    outputs = export_measure.evaluations(model, batches, runners)
    cli.print_result(export_measure.evaluation_table(outputs))
    return {
        "bytes": len(exported),
        "float32_bytes": len(dense),
        "latencies": [vars(x) for x in times],
        "outputs": {name: asdict(x) for name, x in outputs.items()},
    }


def run(args: argparse.Namespace) -> None:
    check_options(args)
    started = time.perf_counter()
    session = Session.of(common_options(args))
    model, suffix = exported_model(session, args), Path(args.to).suffix
    invocation = Invocation.of(build_parser(), args)
    marks = session.fingerprint(invocation, {"compressed model": content_hash(model.state_dict())})
    figures: dict[str, Any] = {}
    whole, cut = model, Cut({})
    if suffix != ".safetensors" and not args.no_cut:
        generator = torch.Generator().manual_seed(args.seed)
        model, cut = cut_channels(model, torch.randn(2, *session.image_shape, generator=generator))
    if cut.channels:
        log.info(cut.line())
    if suffix == ".safetensors":
        state, left = packed_state(model)
        check_left(left, args.strict)
        files.save_checkpoint(state, args.to, origin_marks(session.model))
    elif suffix == ".pt2":
        export_onnx.save_program(model, session.image_shape, args.to)
    else:
        exported, figures = write_onnx(session, model, args)
        with files.atomic_write(args.to) as file:
            file.write(exported)
        if args.measure:
            figures["dense_top1_calibration"] = session.dense_top1()
            figures |= measured(session, whole, exported, args)
    records.write_run(
        records.export_record(args.to),
        invocation.command,
        invocation.arguments,
        fingerprint=marks,
        seconds=time.perf_counter() - started,
        preprocessing=session.image_data.preprocessing.record(),
        cut={name: list(sizes) for name, sizes in cut.channels.items()},
        **figures,
    )
    if not args.measure:
        cli.print_result(f"{args.to}: {Path(args.to).stat().st_size / 1e6:.2f} MB")
    session.world.leave()


def main(argv: list[str] | None = None) -> int:
    return cli.command(build_parser, run, records.repeated(build_parser, argv))


if __name__ == "__main__":
    sys.exit(main())
