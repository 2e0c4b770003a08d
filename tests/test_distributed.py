"""Many processes write what one writes, and one that fails ends them all; gloo, on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import database
import main_trueobs
import post_proc
from obc.inputs.checkpoints import load_checkpoint
from obc.solver.distributed import ALONE, World, deal
from obc.toolkit.profiles import write_profile

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["--nsamples", "64", "--batchsize", "16", "--noaug", "--device", "cpu"]
GRID = ["--max-sparsity", "0.8", "--delta-sparse", "0.4"]

gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this PyTorch has no gloo",
)


def torchrun(folder: Path, script: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Two processes of a command."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*line, str(ROOT / script), *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(autouse=True)
def one_thread():
    """What products yield depends on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# -- who does what ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_every_row_has_one_owner(size):
    for count in (0, 1, 5, 64):
        shares = [range(count)[World(rank, size).rows(count)] for rank in range(size)]
        assert [row for share in shares for row in share] == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_expensive_pieces_are_divided_and_the_rest_is_even():
    costs = {"huge": 1000.0, **{f"{i}": float(i) for i in range(1, 30)}}
    owners = deal(costs, 4)
    assert owners["huge"] is None
    loads = [sum(costs[name] for name in costs if owners[name] == rank) for rank in range(4)]
    assert sum(loads) == sum(range(1, 30)) and max(loads) - min(loads) <= 2
    assert None not in deal(costs, 4, divisible=False).values()
    assert set(deal(costs, 1).values()) == {0}


def test_alone_nothing_is_done():
    x = torch.arange(4.0)
    ALONE.sum_in_order(x)
    ALONE.fill_rows(x)
    assert x.tolist() == [0, 1, 2, 3]
    assert ALONE.gather("x") == ["x"] and ALONE.interleave([1, 2]) == [1, 2]


# -- the same files --------------------------------------------------------------------------------


@gloo
@pytest.mark.parametrize(
    "mode",
    [
        ("unstr", *GRID),
        ("quant", "--wbits", "4", "--abits", "4", "--refine", "--hscale"),
        ("nmprune", "--swaps"),
        ("struct", *GRID),
        ("unstr", "--sparsity", "0.7"),
        ("quant", "--wbits", "3", "--abits", "4", "--sequential"),
        ("struct", "--sparsity", "0.5", "--sequential"),
    ],
    ids=" ".join,
)
def test_two_processes_write_what_one_writes(mode, tmp_path):
    many = "--max-sparsity" in mode
    words = ["rn8", "digits", *mode, *QUICK]

    def output(name: str) -> list[str]:
        return ["--sparse-dir" if many else "--save", str(tmp_path / name) + ".pth" * (not many)]

    done = torchrun(tmp_path, "main_trueobs.py", *words, *output("two"))
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == (1 if many else 2)
    assert main_trueobs.main([*words, *output("one"), "--shards", "2"]) == 0
    found = sorted(tmp_path.glob("one/*.pth" if many else "one.pth"))
    assert len(found) == (5 if many else 1)
    for path in found:
        other = Path(str(path).replace("/one", "/two"))
        one, two = (torch.load(name, weights_only=True) for name in (path, other))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@gloo
def test_two_processes_resolve_what_one_resolves(tmp_path):
    levels = ["--sparse-dir", str(tmp_path / "models_unstr"), *GRID]
    assert main_trueobs.main(["rn8", "digits", "unstr", *QUICK, *levels]) == 0
    profile = tmp_path / "profile.txt"
    write_profile(profile, {"layer1.0.conv1": "6400", "layer3.0.conv2": "8000", "linear": "4000"})
    words = ["rn8", "digits", str(profile), "--database", "unstr", "--prefix", str(tmp_path)]
    words += ["--resolve", *QUICK]
    done = torchrun(tmp_path, "post_proc.py", *words, "--save", str(tmp_path / "two.pth"))
    assert done.returncode == 0, done.stderr
    assert post_proc.main([*words, "--save", str(tmp_path / "one.pth"), "--shards", "2"]) == 0
    one, two = (load_checkpoint(tmp_path / f"{name}.pth") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


TASK = """
import torch
from torch import nn

from obc.inputs.tasks import Task


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))


class Distances(Task):
    def calibration(self):
        generator = torch.Generator().manual_seed(0)
        for _ in range(6):
            yield torch.randn(10, 8, generator=generator), torch.randn(10, 2, generator=generator)

    def inputs(self, batch):
        return batch[0]

    def loss(self, outputs, batch):
        return (outputs - batch[1]).square().mean()

    def evaluate(self, model):
        inputs, wanted = next(self.calibration())
        return {"distance": (model(inputs) - wanted).square().mean()}


def distances():
    return Distances()
"""


@gloo
@pytest.mark.parametrize("mode", [("quant", "--wbits", "3"), ("nmprune", "--sequential")])
def test_two_processes_share_a_task_of_the_user(mode, tmp_path, capsys):
    code = tmp_path / "task.py"
    code.write_text(TASK)
    words = [f"{code}:network", f"{code}:distances", *mode]
    done = torchrun(tmp_path, "main_trueobs.py", *words, "--save", str(tmp_path / "two.pth"))
    assert done.returncode == 0, done.stderr
    assert main_trueobs.main([*words, "--save", str(tmp_path / "one.pth"), "--shards", "2"]) == 0
    assert done.stdout == capsys.readouterr().out and "distance" in done.stdout
    one, two = (load_checkpoint(tmp_path / f"{name}.pth") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


LEAVING = """
from pathlib import Path

import torch
from obc.solver.distributed import join

world = join(torch.device("cpu"))
import torch.distributed.nn  # as torchvision does; its functions have the group as a default

world.meet()
world.leave()
threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
assert not [name for name in threads if "gloo" in name], threads
"""


@gloo
def test_no_thread_of_the_group_is_left_when_python_ends(tmp_path):
    """One that is still alive then, and asks for Python, aborts the process."""
    (tmp_path / "leaving.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{LEAVING}"
    )
    done = torchrun(tmp_path, tmp_path / "leaving.py")
    assert done.returncode == 0, done.stderr


@gloo
@pytest.mark.parametrize("action", ["loss", "squared"])
def test_two_processes_find_the_same_scores(action, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make = ["unstr", "--sparse-dir", "models_unstr", *GRID, *QUICK]
    assert main_trueobs.main(["rn8", "digits", *make]) == 0
    words = ["rn8", "digits", "unstr", action, *QUICK]
    assert database.main([*words, "--score_path", "one"]) == 0
    done = torchrun(tmp_path, "database.py", *words, "--score_path", "two")
    assert done.returncode == 0, done.stderr
    name = f"rn8_unstr_{action}.txt"
    assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()


# -- what goes wrong -------------------------------------------------------------------------------


@gloo
def test_a_mistake_is_told_once_and_ends_all(tmp_path):
    done = torchrun(tmp_path, "main_trueobs.py", "rn8", "digits", "quant", *QUICK)
    assert done.returncode != 0
    assert done.stderr.count("error: quant needs --wbits") == 1


FAILING = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import main_trueobs, trueobs
from obc.solver import errors
from obc.toolkit import compress

class Failing(trueobs.TrueOBS):
    def quantize(self, *searches):
        if errors.rank() == 1:
            raise errors.UserError("this one fails")
        super().quantize(*searches)

compress.TrueOBS = Failing
sys.exit(main_trueobs.main())
"""


@gloo
def test_one_that_fails_ends_the_other(tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    words = ["rn8", "digits", "quant", "--wbits", "4", *QUICK]
    done = torchrun(tmp_path, str(tmp_path / "failing.py"), *words)
    assert done.returncode != 0
    assert "error: this one fails" in done.stderr
