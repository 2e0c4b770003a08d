"""cli.py: one line for a mistake, and files that are whole or not there."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import math
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from obc.inputs import files
from obc.solver import errors
from obc.solver.distributed import resolve_device
from obc.toolkit import cli, records

ROOT = Path(__file__).resolve().parents[1]


def make_parser() -> cli.Parser:
    parser = cli.Parser(prog="some_command.py", description="A command.")
    cli.add_common_options(parser)
    parser.add_argument("--max-sparsity", type=cli.fraction, default=0.99, help="last level")
    return parser


# ------------------------------------------------------------------------------- options


def test_defaults_of_the_common_options():
    args = make_parser().parse_args(["rn18", "imagenet"])
    expected = {
        "model": "rn18",
        "dataset": "imagenet",
        "weights": None,
        "datapath": None,
        "image_size": None,
        "seed": 0,
        "nsamples": 1024,
        "batchsize": 128,
        "workers": None,
        "nrounds": None,
        "noaug": False,
        "device": "auto",
        "memory": None,
    }
    assert {name: getattr(args, name) for name in expected} == expected


def test_help_names_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        make_parser().parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for option in (
        "--weights",
        "--datapath",
        "--image-size",
        "--seed",
        "--nsamples",
        "--batchsize",
        "--workers",
        "--nrounds",
        "--noaug",
        "--device",
        "--memory",
    ):
        assert option in text
    assert "(default: 1024)" in text and "(default: 128)" in text and "(default: auto)" in text
    assert "None" not in text and "False" not in text


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--nsamples", "0"], "error: --nsamples must be a whole number from 1; got 0"),
        (["--batchsize", "1.5"], "error: --batchsize must be a whole number from 1; got 1.5"),
        (["--memory", "inf"], "error: --memory must be a number above 0; got inf"),
        (["--workers", "-1"], "error: --workers must be a whole number from 0; got -1"),
        (["--seed", "x"], "error: --seed must be a whole number from 0 to 2^63 - 1; got x"),
        (
            ["--seed", str(2**64)],
            f"error: --seed must be a whole number from 0 to 2^63 - 1; got {2**64}",
        ),
        (["--memory", "nan"], "error: --memory must be a number above 0; got nan"),
        (["--memory", "0"], "error: --memory must be a number above 0; got 0"),
        (
            ["--max-sparsity", "95"],
            "error: --max-sparsity must be in [0, 1); got 95. Did you mean 0.95?",
        ),
        (["--max-sparsity", "1"], "error: --max-sparsity must be in [0, 1); got 1"),
        (["--nsample", "4"], "error: unrecognized arguments: --nsample 4"),
    ],
)
def test_a_wrong_option_is_one_line_and_status_2(words, line, capsys):
    with pytest.raises(SystemExit) as stop:
        make_parser().parse_args(["rn18", "imagenet", *words])
    assert stop.value.code == 2
    assert capsys.readouterr().err == line + "\n"


def test_missing_positionals_are_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        make_parser().parse_args([])
    assert stop.value.code == 2
    assert (
        capsys.readouterr().err == "error: the following arguments are required: MODEL, DATASET\n"
    )


@pytest.mark.parametrize(
    ("gpus", "text", "expected"),
    [
        (0, "auto", "cpu"),
        (0, "cpu", "cpu"),
        (2, "auto", "cuda:0"),
        (2, "cuda", "cuda:0"),
        (2, "cuda:1", "cuda:1"),
        (2, "cpu", "cpu"),
        (0, "cuda", "--device cuda: this PyTorch sees no GPU; use --device cpu"),
        (2, "cuda:2", "--device cuda:2: there are 2 GPUs"),
        (2, "gpu", "--device must be auto, cpu, cuda or cuda:N; got gpu"),
        (2, "cuda:", "--device must be"),
        (2, "cuda:-1", "--device must be"),
    ],
)
def test_resolve_device(gpus, text, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if expected.startswith("--"):
        with pytest.raises(errors.UserError) as caught:
            resolve_device(text)
        assert str(caught.value).startswith(expected)
    else:
        assert resolve_device(text) == torch.device(expected)


# -------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (errors.UserError("no such layer;\n use conv1"), 2, "error: no such layer; use conv1"),
        (
            OSError(errno.ENOSPC, "No space left on device", "a.pth"),
            2,
            "error: a.pth: No space left on device",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "b.pth"),
            2,
            "error: b.pth: Permission denied",
        ),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (MemoryError(), 2, "error: out of memory; pass a smaller --memory or --batchsize"),
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            2,
            "error: the GPU ran out of memory; pass a smaller --memory or --batchsize",
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            2,
            "error: out of memory; pass a smaller --memory or --batchsize",
        ),
    ],
)
def test_guarded_turns_an_error_into_one_line(error, status, line, capsys):
    def body(_args):
        raise error

    assert cli.guarded(body, argparse.Namespace()) == status
    assert capsys.readouterr() == ("", line + "\n")


def test_guarded_passes_the_arguments_and_returns_0(capsys):
    assert (
        cli.guarded(lambda args: cli.print_result(f"top-1 {args.x}"), argparse.Namespace(x=5)) == 0
    )
    assert capsys.readouterr() == ("top-1 5\n", "")


def test_guarded_lets_programming_errors_through():
    def body(_args):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        cli.guarded(body, argparse.Namespace())


def test_a_reader_that_leaves_early_is_no_traceback():
    code = (
        "import sys, argparse\nfrom obc.toolkit import cli\n"
        "def body(args):\n"
        "    for i in range(100000): cli.print_result(str(i))\n"
        "sys.exit(cli.guarded(body, argparse.Namespace()))"
    )
    done = subprocess.run(
        f"{sys.executable} -c '{code}' | head -1",
        shell=True,
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    assert done.stdout == "0\n"
    assert done.stderr == "error: standard output was closed before everything was written\n"


def test_logging_goes_to_stderr_once(capsys):
    cli.setup_logging()
    cli.setup_logging()
    logging.getLogger("trueobs").info("conv1: 3 s")
    logging.getLogger("trueobs").warning("conv1 left dense")
    assert capsys.readouterr() == ("", "conv1: 3 s\nwarning: conv1 left dense\n")


# --------------------------------------------------------------------------------- files


def test_atomic_write_replaces_at_the_end_only(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")
    with files.atomic_write(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["x.bin"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_atomic_write_leaves_nothing_of_a_failure(tmp_path, error):
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")
    with pytest.raises(type(error)), files.atomic_write(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.bin"]


def test_atomic_write_obeys_the_umask_and_follows_links(tmp_path):
    (tmp_path / "real").write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    before = os.umask(0o027)
    try:
        with files.atomic_write(tmp_path / "link") as file:
            file.write(b"new")
    finally:
        os.umask(before)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    "write", [files.check_writable, lambda path: files.save_checkpoint({"a": torch.zeros(1)}, path)]
)
def test_what_is_not_a_regular_file_is_never_replaced(write, tmp_path):
    with pytest.raises(errors.UserError, match="is a directory; name a file"):
        write(tmp_path)
    with pytest.raises(errors.UserError, match="/dev/null: is not a regular file"):
        write("/dev/null")


def test_check_writable_makes_nothing_and_atomic_write_makes_the_parent(tmp_path):
    path = tmp_path / "models_nm" / "deep" / "rn18_24.pth"
    files.check_writable(path)
    assert os.listdir(tmp_path) == []
    with files.atomic_write(path) as file:
        file.write(b"x")
    assert path.read_bytes() == b"x"
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(errors.UserError, match="cannot be written"):
        files.check_writable(tmp_path / "file" / "x.pth")
    with pytest.raises(errors.UserError, match="cannot be written"):
        files.check_writable(tmp_path / ("x" * 300))


def killed(work) -> None:
    """Do `work` in a process that is killed at the end of it, or before."""
    child = os.fork()
    if child == 0:
        work()
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("next_run", [files.check_writable, lambda path: write(path, b"new")])
def test_what_a_killed_run_leaves_is_hidden_and_the_next_run_removes_it(
    next_run, tmp_path, monkeypatch
):
    kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
    path = tmp_path / "rn8_unstr_200x_dp.txt"
    (tmp_path / ".other.0123456789ab.tmp").touch()  # of another program
    for module, name, work in (
        (files.fcntl, "flock", files.check_writable),  # killed while the probe is there
        (files.os, "replace", lambda path: write(path, b"whole")),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, kill)
            killed(lambda work=work: work(path))
        other, leftover = sorted(os.listdir(tmp_path), key=len)[::-1]
        assert other == ".other.0123456789ab.tmp"
        assert re.fullmatch(r"\.obc\.[0-9a-f]{12}\.tmp", leftover)
        next_run(path)
        assert set(os.listdir(tmp_path)) <= {path.name, other}
        path.unlink(missing_ok=True)


def write(path: Path, content: bytes) -> None:
    with files.atomic_write(path) as file:
        file.write(content)


def test_what_another_process_or_thread_is_writing_stays(tmp_path):
    begun, go_on = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with files.atomic_write(tmp_path / "a") as file:
            os.write(begun[1], b"!")
            os.read(go_on[0], 1)
            file.write(b"theirs")
        os._exit(0)
    os.read(begun[0], 1)
    with files.atomic_write(tmp_path / "b") as file:
        file.write(b"ours")
        files.check_writable(tmp_path / "c")
    os.write(go_on[1], b"!")
    assert os.waitpid(child, 0)[1] == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        "a": b"theirs",
        "b": b"ours",
    }


def test_a_temporary_file_removed_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    """Another run may look for leftovers between the two."""
    flock, removed = files.fcntl.flock, []

    def late(file, operation):
        if not removed:
            removed.append(file.name)
            os.unlink(file.name)
        flock(file, operation)

    monkeypatch.setattr(files.fcntl, "flock", late)
    write(tmp_path / "x", b"new")
    assert removed and (tmp_path / "x").read_bytes() == b"new" and os.listdir(tmp_path) == ["x"]


def test_check_writable_in_a_folder_without_permission(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("the superuser may write anywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(errors.UserError, match="cannot be written"):
        files.check_writable(tmp_path / "x.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_checkpoints_hold_plain_small_tensors(tmp_path, suffix):
    base = torch.arange(100_000.0)
    shared = torch.ones(2, 3)
    state = {
        "view": base[10:12],
        "transposed": shared.t(),
        "twice": shared,
        "parameter": torch.nn.Parameter(torch.full((2,), 7.0)),
        "count": torch.tensor(3),
    }
    path = tmp_path / f"x{suffix}"
    files.save_checkpoint(state, path)
    read = load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)
    assert read.keys() == state.keys()
    for name, tensor in state.items():
        assert torch.equal(read[name], tensor)
        assert type(read[name]) is torch.Tensor and not read[name].requires_grad
    assert path.stat().st_size < 10_000


def test_a_checkpoint_takes_tensors_only(tmp_path):
    with pytest.raises(TypeError, match="epoch is a int"):
        files.save_checkpoint({"epoch": 3}, tmp_path / "x.pth")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path, suffix, capsys):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        status = cli.guarded(
            lambda _: files.save_checkpoint({"a": torch.ones(200_000)}, path), argparse.Namespace()
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2
    assert capsys.readouterr().err == f"error: {path}: File too large\n"
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == [path.name]


def test_records_are_strict_json(tmp_path):
    path = tmp_path / "run.json"
    records.write_record(
        path,
        {
            "nan": math.nan,
            "inf": [1.5, -math.inf],
            3: (1, 2),
            "path": Path("a/b"),
            "numpy": np.float32(0.5),
            "array": np.array([1.0, math.nan]),
            "device": torch.device("cpu"),
            "tensor": torch.tensor([2, 3]),
            "none": None,
        },
    )
    assert json.loads(path.read_text()) == {
        "nan": None,
        "inf": [1.5, None],
        "3": [1, 2],
        "path": "a/b",
        "numpy": 0.5,
        "array": [1.0, None],
        "device": "cpu",
        "tensor": [2, 3],
        "none": None,
    }
    with pytest.raises(TypeError):
        records.write_record(path, {"x": object()})
    assert json.loads(path.read_text())["3"] == [1, 2]


def test_environment_can_be_recorded(tmp_path):
    machine = records.environment()
    assert machine["torch"] == torch.__version__ and machine["cores"] >= 1 and machine["processor"]
    assert machine["git"] is None or len(machine["git"]["commit"]) == 40
    records.write_record(tmp_path / "run.json", machine)
