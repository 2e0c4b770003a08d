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
from pretend_gpu import GPU, PretendedGPU, pretended_gpu
from torch import Tensor, nn

import database
import main_trueobs
import post_proc
import spdy
from modelutils import find_layers
from obc.inputs.checkpoints import load_checkpoint
from obc.solver import codes, search
from obc.solver.memory import layer_needs
from obc.toolkit import sensitivity
from obc.toolkit.leveldb import Database
from quant import fit_activation_grid, fit_weight_grid, set_activation_grid
from trueobs import TrueOBS

# What loads a state dict takes our device for the one that holds no values.
pytestmark = pytest.mark.filterwarnings("ignore:.*which is a no-op")
LAYERS = ("layer1.0.conv1", "layer2.0.conv1", "linear")
SMALL = ("--nsamples", "64", "--noaug", "--memory", "1")


@pytest.fixture(autouse=True)
def engine_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, too, what a GPU runs."""
    torch.set_num_threads(1)
    for module in ("elimination", "levels", "swaps", "codes"):
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

    for module in ("calibrate", "compress"):
        monkeypatch.setattr(f"obc.toolkit.{module}.find_layers", some_layers)


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
    "sequential": "quant --sequential --wbits 4 --abits 4 --save q.pth",
    "quant": "quant --wbits 4 --abits 4 --save q.pth",
    "nmprune": "nmprune --save nm.pth",
    "unstr": "unstr --max-sparsity 0.8 --delta-sparse 0.4 --sparse-dir .",
    "blocked": "blocked --max-sparsity 0.8 --delta-sparse 0.4 --sparse-dir .",
    "struct": "struct --max-sparsity 0.8 --delta-sparse 0.4 --sparse-dir .",
}


@pytest.mark.parametrize("mode", MODES)
def test_same_checkpoints(mode, of_three_layers, one_layout, tmp_path, monkeypatch) -> None:
    """Zeros, codes and grids to the last bit; other weights as far as H determines them."""
    gpu = both_ways(main_trueobs.main, MODES[mode], tmp_path, monkeypatch)
    files = sorted(path.name for path in (tmp_path / "here").glob("*.pth"))
    assert files and files == sorted(path.name for path in (tmp_path / "there").glob("*.pth"))
    for file in files:
        largest, other_zeros = differences(tmp_path / "there" / file, tmp_path / "here" / file)
        assert not other_zeros
        free = () if "quant" in MODES[mode] else LAYERS  # whose weights are on no grid
        assert set(largest) <= {f"{name}.weight" for name in free}
        damped = largest.pop("linear.weight", 0.0)  # 64 inputs, one of which is always zero
        assert damped < 1e-3 and all(x < 1e-4 for x in largest.values())
    assert gpu.waits_in("obc/solver/elimination.py") == 0
    assert gpu.waits_in("obc/solver/hessian.py") == 0
    assert gpu.waits_in("quant.py") <= len(LAYERS)  # the choice of activations for a large input


def both_ways(
    command: Callable[[list[str]], int], words: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> PretendedGPU:
    """Run a command in two folders, on the CPU and on the pretended GPU."""
    for place in ("here", "there"):
        (folder / place).mkdir(exist_ok=True)
        monkeypatch.chdir(folder / place)
        if place == "here":
            run(command, words, "--device", "cpu")
        else:
            with on_the_gpu(monkeypatch) as gpu:
                run(command, words)
    return gpu


# -- what follows compression: bit for bit, since the operations are the same ----------------------


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantised checkpoint and a database of three levels, by baselines on the CPU."""
    folder = tmp_path_factory.mktemp("compressed")
    words = f"quant --wbits 4 --abits 4 --order nearest --save {folder}/q.pth --device cpu"
    run(main_trueobs.main, words)
    words = "--max-sparsity 0.8 --delta-sparse 0.5 --order magnitude --device cpu"
    run(main_trueobs.main, f"unstr {words} --sparse-dir {folder}/models_unstr")
    return folder


@pytest.fixture
def one_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images in the layout of a GPU, on the CPU as well: otherwise sums are in another order."""
    monkeypatch.setattr(torch, "channels_last", torch.contiguous_format)


CORRECTIONS = {
    "statistics": "--bnt --bnt-batches 3 --statcorr",
    "gap": "--gap --gap-epochs 1",
    "lintune": "--lintune --lintune-epochs 1",
    "lintune on labels": "--lintune --lintune-loss --lintune-epochs 1",
    "finetune": "--finetune --finetune-epochs 1",
    "finetune on logits": "--finetune --finetune-mse --finetune-epochs 1",
}


@pytest.mark.parametrize("name", CORRECTIONS)
def test_same_corrections(name, compressed, one_layout, tmp_path, monkeypatch) -> None:
    words = f"{compressed}/q.pth {CORRECTIONS[name]} --save x.pth"
    gpu = both_ways(post_proc.main, words, tmp_path, monkeypatch)
    largest, _ = differences(tmp_path / "there/x.pth", tmp_path / "here/x.pth")
    assert not largest
    assert load_checkpoint(tmp_path / "here/x.pth").keys() >= {"conv1.weight_quant.scale"}
    steps = 1  # of a training: one batch
    assert gpu.waits_in("obc/toolkit/training.py") <= 3 * steps


@pytest.mark.parametrize("action", ["loss", "squared"])
def test_same_scores(action, compressed, one_layout, tmp_path, monkeypatch) -> None:
    both_ways(database.main, f"unstr {action} --prefix {compressed}", tmp_path, monkeypatch)
    here, there = (tmp_path / x / f"scores/rn8_unstr_{action}.txt" for x in ("here", "there"))
    assert here.read_text() == there.read_text()


@pytest.mark.parametrize("correction", ["", "--statcorr"])
def test_same_search(correction, compressed, one_layout, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(search, "RANDOM_VECTORS", 4)
    monkeypatch.setattr(search, "TRIES", 2)
    database.main(f"rn8 digits unstr spdy --prefix {compressed} --score_path {tmp_path}".split())
    words = f"2 unstr --errors spdy --score_path {tmp_path} {correction}"
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "models_unstr").symlink_to(compressed / "models_unstr")
    both_ways(spdy.main, words, tmp_path, monkeypatch)
    here, there = (tmp_path / x / "rn8_unstr_200x_spdy.txt" for x in ("here", "there"))
    assert here.read_text() == there.read_text()


# -- waits: as many for small layers as for large ones, for few levels as for many -----------------


def pretended_layer(rows: int, channels: int, groups: int, zeros: float) -> tuple[nn.Module, ...]:
    generator = torch.Generator().manual_seed(rows)
    layer = nn.Conv2d(channels * groups, rows, 3, padding=1, groups=groups, bias=False)
    layer.weight.data.normal_(generator=generator)
    layer.weight.data[torch.rand(layer.weight.shape, generator=generator) < zeros] = 0
    return layer.to(GPU), torch.randn(16, channels * groups, 8, 8, generator=generator).to(GPU)


SOLVE: dict[str, Callable[[TrueOBS], object]] = {
    "quant": lambda solver: solver.quantize(),
    "quant, ranges": lambda solver: solver.quantize(fit_range=True),
    "quant, refined": lambda solver: solver.quantize(refine=True),
    "nmprune": lambda solver: solver.nmprune(2, 4),
    "nmprune, swaps": lambda solver: solver.nmprune(2, 4, swaps=True),
    "unstr": lambda solver: solver.prepare_unstr(),
    "blocked": lambda solver: solver.prepare_blocked(4),
    "struct": lambda solver: solver.prepare_struct(9),
}
SEARCHES = [mode for mode in SOLVE if "," in mode]
ONCE, EACH = 17, 8  # waits for a layer; for a batch of its rows, most of them for the inverses
APART = 12  # for a batch of rows with inverses of their own


def solve(mode: str, solver: TrueOBS, levels: int) -> int:
    """Compress a layer; how many batches its rows are in, twice if levels are made of them."""
    if mode.startswith("quant"):
        solver.quantizer = fit_weight_grid(solver.view.matrix, 4)
    batches = 0
    systems = solver._systems

    def counted(*args, **kwargs):
        nonlocal batches
        for batch in systems(*args, **kwargs):
            batches += 1
            yield batch

    solver._systems = counted
    SOLVE[mode](solver)
    if mode in ("unstr", "blocked", "struct"):
        for _ in solver.level_parts([i / (levels + 1) for i in range(levels)]):
            pass
    return batches


@pytest.mark.parametrize("zeros", [0.0, 0.3])
@pytest.mark.parametrize("mode", SOLVE)
def test_waits_do_not_depend_on_sizes(mode: str, zeros: float) -> None:
    waits = []
    for rows, channels, levels in ((8, 4, 4), (24, 8, 9)):
        with pretended_gpu() as gpu:
            layer, x = pretended_layer(rows, channels, 1, zeros)
            before, solver = gpu.waited, TrueOBS(layer, memory=1 << 30)
            solver.add_batch(x)
            assert gpu.waited == before
            batches = solve(mode, solver, levels)
            waits.append(gpu.waited - before)
            assert gpu.waits_in("obc/solver/elimination.py") == gpu.waits_in("quant.py") == 0
    ladder = 10 if zeros else 0  # steps of damping, if there are any, differ from H to H
    sweeps = codes.SWEEPS if mode == "quant, refined" else 0  # over all codes differ, too
    assert abs(waits[0] - waits[1]) <= ladder + sweeps
    assert max(waits) <= ONCE + (EACH + (APART if zeros else 0)) * batches + sweeps


@pytest.mark.parametrize("mode", SOLVE)
def test_a_batch_of_rows_costs_few_waits(mode: str) -> None:
    """With the least memory, each row is a batch of its own."""
    with pretended_gpu() as gpu:
        layer, x = pretended_layer(12, 4, 1, 0.0)
        solver = TrueOBS(layer, memory=1)
        solver.add_batch(x)
        before = gpu.waited
        batches = solve(mode, solver, 3)
        assert gpu.waited - before <= ONCE + EACH * batches
    assert batches >= (12 if mode != "struct" else 1)


@pytest.mark.parametrize("measure", [sensitivity.losses, sensitivity.squared_errors])
def test_waits_for_scores_do_not_depend_on_levels(measure: Callable) -> None:
    waits, images = [], torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for levels in (2, 5):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
        states = {}
        for number in range(levels):
            pruned = copy.deepcopy(model)
            for layer in (pruned[0], pruned[3]):
                layer.weight.data[:, : number + 1] *= 1 - number / levels
                set_activation_grid(layer, fit_activation_grid(images, 2 + number))
            states[f"{number:04d}"] = pruned.state_dict()
        with pretended_gpu() as gpu:
            there = model.to(GPU)
            before = gpu.waited
            measure(there, Database("unstr", "net", states), [(images, torch.arange(6) % 5)], GPU)
            waits.append(gpu.waited - before)
    assert waits[0] == waits[1]


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("groups", "zeros"), [(1, 0.0), (2, 0.0), (1, 0.3)])
@pytest.mark.parametrize("mode", SOLVE)
def test_the_memory_that_is_promised(
    mode: str, groups: int, zeros: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the byte: nothing is set apart for libraries here; 80 kB for the buffers of a search."""
    monkeypatch.setattr("obc.solver.memory.OVERHEAD", 80_000 * (mode in SEARCHES))
    levels = 9 if mode in ("unstr", "blocked", "struct") else 0
    for rows_at_a_time in (1, 3):
        with pretended_gpu() as gpu:
            layer, x = pretended_layer(8, 4, groups, zeros)
            needs = layer_needs(
                layer,
                levels=levels,
                innermost=mode.startswith(("nmprune", "blocked")),
                apart=bool(zeros) and mode.startswith(("nmprune", "blocked", "struct")),
                swaps="swaps" in mode,
            )
            memory = needs.layer + max(needs.inverting, rows_at_a_time * needs.row)
            before, solver = gpu.bytes, TrueOBS(layer, memory=memory)
            solver.add_batch(x)
            gpu.peak = gpu.bytes
            solve(mode, solver, levels)
            assert gpu.peak - before <= memory


@pytest.mark.parametrize("mode", SEARCHES)
def test_searches_keep_to_the_memory_of_larger_layers(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows at once would take several times as much."""
    monkeypatch.setattr("obc.solver.memory.OVERHEAD", 80_000)
    with pretended_gpu() as gpu:
        layer, x = pretended_layer(96, 16, 1, 0.0)
        swaps = "swaps" in mode
        needs = layer_needs(layer, innermost=swaps, swaps=swaps)
        before, solver = gpu.bytes, TrueOBS(layer, memory=needs.layer + 2 * needs.row)
        solver.add_batch(x)
        gpu.peak = gpu.bytes
        solve(mode, solver, 0)
        assert gpu.peak - before <= needs.layer + 2 * needs.row
