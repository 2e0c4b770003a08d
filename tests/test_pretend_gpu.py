"""The GPU's path on a machine without one: its answers, its waits, its memory (pretend_gpu.py).

Whole commands run on rn8, with three of its layers compressed, once on the CPU by the engine in
PyTorch and once on the pretended GPU. What follows from the sizes of a layer is tried on layers of
several sizes: how often the CPU waits for the GPU must not depend on them, and the memory is what
`memory.py` promises.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from pretend_gpu import GPU, OnGPU, PretendedGPU, pretended_gpu
from torch import Tensor, nn

import database
import main_trueobs
import post_proc
import spdy
from modelutils import find_layers
from obc.inputs.checkpoints import load_checkpoint
from obc.solver import search
from obc.solver.memory import layer_needs
from quant import fit_weight_grid
from trueobs import TrueOBS

LAYERS = ("layer1.0.conv1", "layer2.0.conv1", "linear")
SMALL = ("--nsamples", "64", "--noaug", "--memory", "1")


@pytest.fixture(autouse=True)
def engine_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, too, what a GPU runs."""
    torch.set_num_threads(1)
    for module in ("elimination", "levels"):
        monkeypatch.setattr(f"obc.solver.{module}.compiled_engine", lambda: None)


# -- the pretended GPU itself ----------------------------------------------------------------------


def test_it_refuses_what_a_gpu_refuses() -> None:
    with pretended_gpu():
        there, here = torch.arange(3.0).to(GPU), torch.ones(3)
        for mixed in (
            lambda: there + here,
            lambda: here.mul_(there),
            lambda: torch.cat([here, there]),
            lambda: here[there.long()],
            lambda: torch.where(there > 1, here, there),
        ):
            with pytest.raises(RuntimeError, match="among tensors on the GPU"):
                mixed()
        for from_outside in (lambda: there.numpy(), lambda: copy.copy(there).__reduce_ex__(2)):
            with pytest.raises(TypeError, match="to the CPU first"):
                from_outside()
        assert torch.equal((there * torch.tensor(2.0)).cpu(), torch.tensor([0.0, 2.0, 4.0]))
        assert (there + 1).device == GPU and (there + 1).cpu().device.type == "cpu"


WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "bool": lambda x: bool((x > 1).any()),
    "int": lambda x: int(x.max()),
    "if": lambda x: 1 if x[0] else 0,
    "tolist": lambda x: x.tolist(),
    "to the CPU": lambda x: x.cpu(),
    "from the CPU": lambda x: torch.ones(3).to(GPU),
    "numbers": lambda x: torch.tensor([1.0, 2.0], device=GPU),
    "new_tensor": lambda x: x.new_tensor(3),
    "copy_": lambda x: x.copy_(torch.ones(3)),
    "nonzero": lambda x: torch.nonzero(x),
    "mask": lambda x: x[x > 1],
    "by mask": lambda x: x.index_put_((x > 1,), torch.ones(1, device=GPU).expand(1)),
    "index on the CPU": lambda x: x[torch.tensor([0, 1])],
    "list": lambda x: x[[0, 1]],
    "bincount": lambda x: torch.bincount(x.long()),
    "unique": lambda x: torch.unique(x),
    "equal": lambda x: torch.equal(x, x.clone()),
    "Cholesky": lambda x: torch.linalg.cholesky(x.diag() + torch.eye(3, device=GPU)),
}
FREE: dict[str, Callable[[Tensor], object]] = {
    "sum": lambda x: (x * 2 + 1).sum(),
    "masked_fill": lambda x: x.masked_fill(x > 1, 0),
    "fill by mask": lambda x: x.clone().__setitem__(x > 1, 0.0),
    "index": lambda x: x[torch.arange(2, device=GPU)],
    "sort": lambda x: x.argsort(),
    "full": lambda x: x.new_full((), 3.0) + torch.zeros(3, device=GPU),
    "Cholesky": lambda x: torch.linalg.cholesky_ex(x.diag()),
    "slices": lambda x: x[1:].view(1, 2).T.reshape(-1),
}


@pytest.mark.parametrize("inference", [False, True])
def test_it_counts_waits(inference: bool) -> None:
    with pretended_gpu() as gpu, torch.inference_mode(inference):
        for name, operation in (WAITS | FREE).items() if not inference else WAITS.items():
            x = torch.arange(3.0, device=GPU)
            before = gpu.waited
            operation(x)
            assert (gpu.waited > before) == (WAITS.get(name) is operation), name


def test_it_counts_bytes() -> None:
    with pretended_gpu() as gpu:
        x = torch.zeros(1000, device=GPU)
        view, other = x[10:].view(-1, 10), torch.zeros(10)
        assert gpu.bytes == 4000
        del x
        assert gpu.bytes == 4000  # the view keeps it
        y = view.double()
        assert gpu.bytes == gpu.peak == 4000 + 8 * 990
        del view, y, other
        assert (gpu.bytes, gpu.peak) == (0, 4000 + 8 * 990)


# -- commands --------------------------------------------------------------------------------------


@pytest.fixture
def of_three_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three layers of rn8 are compressed, with strides and without, and a linear one."""

    def some_layers(model: nn.Module) -> dict[str, nn.Module]:
        return {name: layer for name, layer in find_layers(model).items() if name in LAYERS}

    monkeypatch.setattr("obc.toolkit.compress.find_layers", some_layers)


@contextmanager
def on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedGPU]:
    """Inside, commands choose the pretended GPU."""
    with pretended_gpu() as gpu, monkeypatch.context() as patched:
        patched.setattr("obc.toolkit.session.resolve_device", lambda text: GPU)
        yield gpu


def run(command: Callable[[list[str]], int], words: str, *more: str) -> None:
    assert command(["rn8", "digits", *words.split(), *SMALL, *more]) == 0


def differences(
    there: Path, here: Path
) -> tuple[dict[str, float], dict[str, int]]:  # largest, zeros elsewhere
    """What differs in two checkpoints, by name."""
    a, b = load_checkpoint(there), load_checkpoint(here)
    assert a.keys() == b.keys() and all(type(x) is Tensor for x in a.values())
    unequal = [name for name in a if not torch.equal(a[name], b[name])]
    largest = {x: float((a[x].double() - b[x].double()).abs().max()) for x in unequal}
    zeros = {x: int(((a[x] == 0) != (b[x] == 0)).sum()) for x in unequal}
    return largest, {name: count for name, count in zeros.items() if count}


MODES = {
    "quant": "quant --wbits 4 --abits 4 --save q.pth",
    "nmprune": "nmprune --save nm.pth",
    "unstr": "unstr --max-sparsity 0.8 --delta-sparse 0.4 --sparse-dir .",
    "blocked": "blocked --max-sparsity 0.8 --delta-sparse 0.4 --sparse-dir .",
    "struct": "struct --max-sparsity 0.8 --delta-sparse 0.4 --sparse-dir .",
}


@pytest.mark.parametrize("mode", MODES)
def test_same_checkpoints(mode, of_three_layers, tmp_path, monkeypatch) -> None:
    """Zeros, codes and grids to the last bit; other weights as far as H determines them."""
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        if place == "here":
            run(main_trueobs.main, MODES[mode], "--device", "cpu")
        else:
            with on_the_gpu(monkeypatch) as gpu:
                run(main_trueobs.main, MODES[mode])
    files = sorted(path.name for path in (tmp_path / "here").glob("*.pth"))
    assert files and files == sorted(path.name for path in (tmp_path / "there").glob("*.pth"))
    for file in files:
        largest, other_zeros = differences(tmp_path / "there" / file, tmp_path / "here" / file)
        assert not other_zeros
        assert set(largest) <= {f"{name}.weight" for name in LAYERS if mode != "quant"}
        damped = largest.pop("linear.weight", 0.0)  # 64 inputs, one of which is always zero
        assert damped < 1e-3 and all(x < 1e-4 for x in largest.values())
    assert gpu.waits_in("obc/solver/elimination.py") == 0
    assert gpu.waits_in("obc/solver/hessian.py") == 0
    assert gpu.waits_in("quant.py") <= 1  # the choice of activations for a large input
