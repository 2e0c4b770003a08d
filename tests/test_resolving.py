"""resolving.py, post_proc.py --resolve: a stitched model solved anew at its levels."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_sequential import ORDER, batches, expected_targets, model_of
from torch import Tensor, nn

import post_proc
import quant
from datautils import load_data
from datautils import test_batches as batches_of_test
from modelutils import find_layers, get_model, load_checkpoint
from obc.inputs.files import save_checkpoint
from obc.solver.layers import view
from obc.toolkit.calibrate import attach_activation_grids
from obc.toolkit.compress import Compression
from obc.toolkit.leveldb import Database
from obc.toolkit.modes import BlockedMode, Mode, NMPruneMode, QuantMode, StructMode, UnstrMode
from obc.toolkit.resolving import ResolveMode, modes_of
from obc.toolkit.resume import RunState
from obc.toolkit.sequential import SequentialCompression

QUICK = ["--nsamples", "64", "--batchsize", "32", "--noaug", "--device", "cpu"]
LAYERS = list(find_layers(get_model("rn8", "digits")))
BUFFERS = ("scale", "zero", "maxq")

State = dict[str, Tensor]


class Small(nn.Module):
    """A layer of 3 input channels, one of 8, one of two groups of 4, and a linear one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.wide = nn.Conv2d(8, 8, 3, stride=2)
        self.grouped = nn.Conv2d(8, 16, (1, 2), groups=2)
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.wide(F.leaky_relu(self.stem(x), 0.2)), 0.2)
        return self.head(F.leaky_relu(self.grouped(x), 0.2).mean((2, 3)))


SMALL = ["stem", "wide", "grouped", "head"]


def small() -> Small:
    torch.manual_seed(0)
    return Small().eval()


def level_of(dense: nn.Module, *modes: Mode) -> State:
    """The dense network compressed in one mode after the other, each layer by itself."""
    compressed = copy.deepcopy(dense)
    for mode in modes:
        grids = mode.activation_grids(dense, batches(), torch.device("cpu"))
        seen = copy.deepcopy(dense)
        for model in (seen, compressed):
            attach_activation_grids(model, grids)
        Compression(seen, compressed, mode, RunState(), RunState()).run(batches())
    return compressed.state_dict()


def sequentially(dense: nn.Module, start: nn.Module, mode: Mode, **modes: Mode) -> nn.Module:
    result = copy.deepcopy(start)
    SequentialCompression(dense, result, mode, RunState(), RunState(), modes=modes).run(batches())
    return result


def resolved(
    dense: nn.Module, kind: str, states: dict[str, State], profile: dict[str, str], remask: bool
) -> tuple[nn.Module, nn.Module]:
    """The stitched model, as it is and solved anew."""
    db, stitched = Database(kind, "model", states), copy.deepcopy(dense)
    db.stitch(stitched, profile)
    modes = modes_of(profile, db, stitched, remask)
    return stitched, sequentially(dense, stitched, ResolveMode(), **modes)


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# -- one level is what --sequential makes ----------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "level", "mode", "options"),
    [
        ("unstr", "7500", UnstrMode, {"sparsity": 0.75}),
        ("4block", "5000", BlockedMode, {"sparsity": 0.5}),
        ("struct", "5000", StructMode, {"sparsity": 0.5}),
        ("mixed", "4w3a", QuantMode, {"wbits": 4, "abits": 3}),
        ("mixed", "4w3a", QuantMode, {"wbits": 4, "abits": 3, "asym": True}),
        ("mixed", "3w32a", QuantMode, {"wbits": 3, "wasym": True}),
        ("mixed", "3w32a", QuantMode, {"wbits": 3, "wasym": True, "wperweight": True}),
    ],
)
def test_level_chosen_anew_is_the_sequential_one(kind, level, mode, options):
    dense = small()
    states = {level: level_of(dense, mode(**options))}
    layers = SMALL[1:] if kind == "4block" else SMALL  # it leaves out what does not divide
    _, result = resolved(dense, kind, states, dict.fromkeys(layers, level), remask=True)
    expected = sequentially(dense, dense, mode(**options, sequential=True))
    assert same(result.state_dict(), expected.state_dict())
    assert not torch.equal(result.head.weight, states[level]["head.weight"])


@pytest.mark.parametrize(
    ("kind", "level", "pruning", "wbits"),
    [("mixed", "24_4w4a", NMPruneMode(), 4), ("4block_8w8a", "5000", BlockedMode(sparsity=0.5), 8)],
)
def test_level_with_its_own_zeros_is_the_sequential_one_from_there(kind, level, pruning, wbits):
    dense, quantising = small(), QuantMode(wbits=wbits, abits=wbits)
    pruned, made = level_of(dense, pruning), level_of(dense, pruning, quantising)
    zeros = made if kind == "mixed" else pruned  # with N:M, zeros from rounding stay
    start = copy.deepcopy(dense)
    for name in SMALL[1:]:  # of the first, the channels do not divide
        start.get_submodule(name).weight.data *= zeros[f"{name}.weight"] != 0
    _, result = resolved(dense, kind, {level: made}, dict.fromkeys(SMALL, level), remask=False)
    expected = sequentially(dense, start, replace(quantising, sequential=True))
    assert same(result.state_dict(), expected.state_dict())
    for name in SMALL[1:]:
        assert not result.get_submodule(name).weight[pruned[f"{name}.weight"] == 0].any()


# -- a level for each layer ------------------------------------------------------------------------


def test_own_zeros_stay_and_the_others_are_the_least_squares():
    """In a model whose layers run in another order, twice or grouped; W' by brute force."""
    dense = model_of()
    generator = torch.Generator().manual_seed(4)
    states: dict[str, dict[str, Tensor]] = {}
    for level, sparsity in (("3000", 0.3), ("6000", 0.6), ("0000", 0.0)):
        states[level] = copy.deepcopy(dense.state_dict())
        for name in ORDER:
            weight = states[level][f"{name}.weight"]
            weight *= torch.rand(weight.shape, generator=generator) >= sparsity
    levels = ("3000", "6000", "0000", "6000", "3000", "6000", "0000")
    stitched, result = resolved(
        dense, "unstr", states, dict(zip(ORDER, levels, strict=True)), remask=False
    )
    assert torch.equal(result.never.weight, dense.never.weight)
    expected = expected_targets(dense, stitched, result)
    for name in ORDER:
        before, after = (x.get_submodule(name).weight for x in (stitched, result))
        assert torch.equal(before == 0, after == 0)
        atol = 2e-4 * np.abs(expected[name]).max()
        ours = view(result.get_submodule(name)).matrix.double().numpy()
        np.testing.assert_allclose(ours, expected[name], atol=atol, err_msg=name)


@pytest.mark.parametrize("remask", [False, True])
def test_every_layer_keeps_its_level(remask):
    dense = small()
    states = {
        "4w4a": level_of(dense, QuantMode(wbits=4, abits=4)),
        "24_5w32a": level_of(dense, NMPruneMode(), QuantMode(wbits=5)),
        "3w2a": level_of(dense, QuantMode(wbits=3, abits=2, wasym=True)),
    }
    profile = dict(zip(SMALL, ("4w4a", "24_5w32a", "3w2a", "24_5w32a"), strict=True))
    stitched, result = (x.state_dict() for x in resolved(dense, "mixed", states, profile, remask))
    assert stitched.keys() == result.keys()
    for name, level in profile.items():
        weight, before = (x[f"{name}.weight"].flatten(1) for x in (result, stitched))
        grid = quant.Grid(*(result[f"{name}.weight_quant.{buffer}"] for buffer in BUFFERS))
        assert torch.equal(grid(weight), weight) and f"{grid.bits}w" in level
        assert bool((grid.zero == 2 ** (grid.bits - 1)).all()) == (level != "3w2a")
        if level != "24_5w32a":
            assert f"w{int(result[f'{name}.act_quant.maxq']).bit_length()}a" in level
            continue
        groups = (weight == 0)[:, view(dense.get_submodule(name)).innermost].unflatten(1, (-1, 4))
        assert (groups.sum(2) >= 2).all()
        assert bool((weight[before == 0] == 0).all()) == (not remask)


@pytest.mark.parametrize(("kind", "unit"), [("unstr", 1), ("4block", 4)])
@pytest.mark.parametrize("remask", [False, True])
def test_levels_that_no_solver_would_choose(kind, unit, remask):
    """Random masks: the same zeros, or as many in every layer."""
    dense = small()
    generator = torch.Generator().manual_seed(0)
    states = {level: copy.deepcopy(dense.state_dict()) for level in ("2000", "7000")}
    for level, state in states.items():
        for name in SMALL if unit == 1 else SMALL[1:]:
            layer = view(dense.get_submodule(name))
            shape = layer.rows, layer.columns // unit
            kept = torch.rand(shape, generator=generator) >= int(level) / 10_000
            kept = kept.repeat_interleave(unit, 1)[:, layer.innermost.argsort()]
            state[f"{name}.weight"] *= layer.shaped(kept)
    profile = dict(zip(SMALL, ("7000", "2000", "7000", "2000"), strict=True))
    stitched, result = resolved(dense, kind, states, profile, remask)
    for name in SMALL if unit == 1 else SMALL[1:]:
        before, after = (view(x.get_submodule(name)).matrix == 0 for x in (stitched, result))
        assert before.sum() == after.sum() > 0
        assert torch.equal(before, after) == (not remask)
        blocks = after[:, view(dense.get_submodule(name)).innermost].unflatten(1, (-1, unit))
        assert torch.equal(blocks.any(2), blocks.all(2))


def test_what_counts_as_pruned():
    layer = nn.Conv2d(8, 2, 2, groups=2)  # 4 channels a group, 2 × 2 taps
    weight = layer.weight.data.fill_(1.0)
    assert all(x.like(view(layer), "24_4w4a") is None for x in (UnstrMode, BlockedMode, StructMode))
    weight[0, :, 0, 0] = 0  # a block along the channels
    weight[1, 2] = 0  # a channel of the second group
    assert UnstrMode.like(view(layer), "").sparsity == 8 / 32
    assert BlockedMode.like(view(layer), "").sparsity == 4 / 32
    assert StructMode.like(view(layer), "").sparsity == 4 / 32
    gone = BlockedMode(sparsity=0.5).gone(view(layer)).view(weight.shape)
    assert gone[0, :, 0, 0].all() and gone.sum() == 4
    gone = StructMode(sparsity=0.5).gone(view(layer)).view(weight.shape)
    assert gone[1, 2].all() and gone.sum() == 4
    assert NMPruneMode.like(view(layer), "24_4w4a") is None  # the name alone is not enough
    weight[:, :2] = 0
    mode = NMPruneMode.like(view(layer), "24_4w4a")
    assert (mode.prunen, mode.prunem) == (2, 4)
    assert NMPruneMode.like(view(layer), "4w4a") is None
    wide = nn.Linear(32, 2)
    wide.weight.data[:, ::2] = 0
    mode = NMPruneMode.like(view(wide), "816_8w8a")
    assert (mode.prunen, mode.prunem) == (8, 16)


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def database(monkeypatch, tmp_path) -> dict[str, State]:
    """The smallest weights of every layer at zero; a profile of two levels."""
    monkeypatch.chdir(tmp_path)
    states = {}
    for level in ("6000", "8000"):
        states[level] = copy.deepcopy(get_model("rn8", "digits").state_dict())
        for name in LAYERS:
            weight = states[level][f"{name}.weight"]
            weight *= weight.abs() > weight.abs().flatten().quantile(int(level) / 10_000)
        save_checkpoint(states[level], Path("models_unstr") / f"rn8_{level}.pth")
    write_profile({name: ("8000", "6000")[i % 2] for i, name in enumerate(LAYERS)})
    return states


def write_profile(levels: dict[str, str]) -> None:
    Path("profile.txt").write_text("".join(f"{x} {name}\n" for name, x in levels.items()))


def post_process(*words: str, save: str = "out.pth", status: int = 0) -> State:
    command = ["rn8", "digits", "profile.txt", "--database", "unstr", *words, *QUICK]
    assert post_proc.main([*command, "--save", save]) == status
    return load_checkpoint(save) if status == 0 else {}


def divergence(state: State) -> float:
    """KL(dense ‖ compressed) over test images."""
    dense, model = get_model("rn8", "digits").eval(), get_model("rn8", "digits").eval()
    model.load_state_dict(state)
    images, _ = next(iter(batches_of_test(load_data("digits"), batchsize=500, workers=0)))
    with torch.no_grad():
        ours, theirs = (F.log_softmax(x(images), 1) for x in (model, dense))
    return float(F.kl_div(ours, theirs, log_target=True, reduction="batchmean"))


def test_it_is_nearer_to_the_dense_network(database):
    stitched, tuned = post_process(), post_process("--bnt")
    own, anew = post_process("--resolve"), post_process("--resolve", "--remask")
    assert divergence(own) < 0.5 * min(divergence(stitched), divergence(tuned))
    assert divergence(anew) < divergence(own)


def test_interrupted_run_resumes_to_the_same_bits(database, monkeypatch):
    words = ["--resolve", "--bnt", "--bnt-batches", "2"]
    whole = post_process(*words, save="whole.pth")
    real, solved = SequentialCompression._solved, []

    def stops_after(count: int):
        def solve(self, plan, name, sums):
            if len(solved) == count:
                raise KeyboardInterrupt
            solved.append(name)
            return real(self, plan, name, sums)

        return solve

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SequentialCompression, "_solved", stops_after(3))
    post_process(*words, save="parts.pth", status=130)
    monkeypatch.setattr(SequentialCompression, "_solved", stops_after(99))
    with monkeypatch.context() as patch:
        patch.setattr(post_proc, "batchnorm_tune", interrupt)
        post_process(*words, save="parts.pth", status=130)
    assert same(post_process(*words, save="parts.pth"), whole)
    assert sorted(solved) == sorted(LAYERS)  # none of them twice
    assert not Path(".parts.pth.partial").exists()
    errors = [
        [layer["squared_error"] for layer in json.loads(Path(f"{x}.json").read_text())["layers"]]
        for x in ("whole", "parts")
    ]
    assert errors[0] == errors[1] and len(errors[0]) == len(LAYERS)
    record = json.loads(Path("parts.json").read_text())
    assert [step["name"] for step in record["corrections"]] == ["resolve", "bnt"]


def test_layers_left_dense(database):
    write_profile(dict.fromkeys(LAYERS[:-2], "8000"))
    result = post_process("--resolve", "--skip-firstlast")
    dense = get_model("rn8", "digits").state_dict()
    for name in LAYERS:
        key = f"{name}.weight"
        assert torch.equal(result[key], dense[key]) == (name in (LAYERS[0], *LAYERS[-2:]))
        assert not torch.equal(result[key], database["8000"][key])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--resolve"], "--resolve has no effect without --database"),
        (["--database", "unstr", "--remask"], "--remask has no effect without --resolve"),
        (
            ["--database", "unstr", "--rel-damp", "0.1"],
            "--rel-damp has no effect without --resolve",
        ),
        (["--database", "unstr", "--shards", "2"], "--shards has no effect without --resolve"),
    ],
)
def test_options_that_belong_together(words, message, tmp_path, capsys):
    assert post_proc.main(["rn8", "digits", str(tmp_path / "profile.txt"), *words, *QUICK]) == 2
    assert message in capsys.readouterr().err
