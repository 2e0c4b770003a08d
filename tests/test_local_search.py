"""N:M swaps and the refinement of codes: move by move as by brute force, and never worse."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from hard_hessians import INPUTS, LAYERS, hard_case
from oracles import (
    codes_oracle,
    hessian_oracle,
    ordered_rounding_oracle,
    quantise_oracle,
    squared_error,
    swaps_oracle,
)
from test_trueobs import Case, assert_close, case, rounding
from torch import nn

import main_trueobs
import trueobs
from modelutils import find_layers, get_model
from obc.inputs.checkpoints import load_checkpoint
from obc.solver import codes, swaps
from obc.solver.refinement import row_errors
from obc.toolkit.modes import NMPruneMode, QuantMode
from quant import fit_weight_grid
from trueobs import TrueOBS


@pytest.fixture(params=["compiled", "torch"])
def search(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search in compiled code, and what runs on other devices."""
    if request.param == "torch":
        for module in (swaps, codes):
            monkeypatch.setattr(module, "compiled_engine", lambda: None)


# -- N:M swaps -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("search")
@pytest.mark.parametrize(
    ("name", "n", "m", "sparse"),
    [
        ("conv", 2, 4, 0.0),
        ("conv", 3, 4, 0.3),
        ("groups", 4, 8, 0.0),
        ("linear", 1, 2, 0.2),
        ("linear", 2, 5, 0.0),
    ],
)
def test_swaps_are_those_of_brute_force(name: str, n: int, m: int, sparse: float) -> None:
    it, plain = case(name, sparse), case(name, sparse)
    it.obs.nmprune(n, m, swaps=True)
    plain.obs.nmprune(n, m)
    order, counts = it.innermost, []
    for (w, H), before, after in zip(it.permuted(), plain.weights(), it.weights(), strict=True):
        kept = before[order] != 0
        wanted, count = swaps_oracle(w, H, kept, m, swaps.LEAST_SWAP_GAIN)
        counts.append(count)
        assert_close(after[order], wanted, 1e-7)
    assert max(counts) > 1


def test_swaps_keep_the_pattern_and_are_bounded_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    little, much = case("conv", 0.2, memory=1), case("conv", 0.2)
    for it in (little, much):
        it.obs.nmprune(2, 4, swaps=True)
        zeros = (it.weights()[:, it.innermost].reshape(6, -1, 4) == 0).sum(2)
        assert (zeros >= 2).all() and (it.weights()[it.W == 0] == 0).all()
    assert np.array_equal(little.weights(), much.weights())
    monkeypatch.setattr(trueobs, "MOST_COLUMNS", 71)  # one less than there are
    plain, limited = case("conv"), case("conv")
    plain.obs.nmprune(2, 4)
    limited.obs.nmprune(2, 4, swaps=True)
    assert np.array_equal(plain.weights(), limited.weights())


def test_a_row_without_a_factor_is_left_to_no_swap() -> None:
    H = torch.diag(torch.tensor([1.0, 0, 1, 1]))
    kept = torch.tensor([[True, True, False, False], [True, False, True, False]])
    alone, together = swaps.swept(H, kept[0])[1], swaps.swept_in_place(H, kept)
    assert alone.isnan().all() and together[0].isnan().all() and together[1].isfinite().all()


# -- refinement of codes ---------------------------------------------------------------------------


def refine(it: Case, bits: int, symmetric: bool) -> None:
    it.obs.quantizer = fit_weight_grid(torch.from_numpy(it.W), bits, symmetric)
    it.obs.quantize(refine=True)


@pytest.mark.usefixtures("search")
@pytest.mark.parametrize(
    ("name", "bits", "symmetric", "sparse"),
    [
        ("linear", 1, False, 0.0),
        ("conv", 2, True, 0.3),
        ("linear", 3, False, 0.3),
        ("groups", 4, True, 0.0),
        ("two per group", 5, False, 0.0),
        ("depthwise", 3, True, 0.0),
        ("linear", 8, False, 0.0),
    ],
)
def test_moves_of_codes_are_those_of_brute_force(
    name: str, bits: int, symmetric: bool, sparse: float
) -> None:
    it = case(name, sparse)
    refine(it, bits, symmetric)
    grid, moved = it.obs.quantizer, 0
    for r, (w, H, after) in enumerate(zip(it.W, it.H, it.weights(), strict=True)):
        nearest, step = rounding(grid, r)
        rivals = quantise_oracle(w, H, nearest, step, mask=w != 0).weights, nearest(w)
        start = np.round(min(rivals, key=lambda w_hat: squared_error(w, w_hat, H)) / step)
        zero = int(grid.zero[r])
        limits = -zero, int(grid.maxq) - zero
        wanted = codes_oracle(start, step, *limits, w, H, codes.NEIGHBOURS, codes.LEAST_MOVE_GAIN)
        assert_close(after, step * wanted)
        moved += int((wanted != start).sum())
    assert moved or it.W.shape[1] < 10  # where few columns interact, OBQ is hard to improve on


# -- ranges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bits", "symmetric"),
    [("conv", 2, False), ("groups", 3, True), ("depthwise", 2, False)],
)
def test_ranges_are_the_best_of_all_candidates(name: str, bits: int, symmetric: bool) -> None:
    it = case(name)
    start = fit_weight_grid(torch.from_numpy(it.W), bits, symmetric)
    it.obs.quantizer = start
    it.obs.quantize(fit_range=True)
    chosen, shifts, changed = it.obs.quantizer, (0,) if symmetric else (-1, 0, 1), 0
    for r, (w, H) in enumerate(zip(it.W, it.H, strict=True)):

        def error(step: float, zero: int, w: np.ndarray = w, H: np.ndarray = H) -> float:
            def nearest(weights: np.ndarray) -> np.ndarray:
                codes = np.clip(np.round(weights / step) + zero, 0, 2**bits - 1)
                return step * (codes - zero)

            return ordered_rounding_oracle(w, H, nearest)

        step, zero = float(start.scale[r]), int(start.zero[r])
        zeros = {min(max(zero + shift, 0), 2**bits - 1) for shift in shifts}
        best = min(error(step * x / 20, z) for x in range(12, 29) for z in zeros)
        ours = error(float(chosen.scale[r]), int(chosen.zero[r]))
        assert ours == pytest.approx(best, rel=1e-7)
        changed += float(chosen.scale[r]) != step
    assert changed and chosen.bits == bits


# -- never worse -----------------------------------------------------------------------------------


def errors_of_rows(layer: nn.Module, W: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
    H = H if H.ndim == 3 else H[None]
    return row_errors(layer.weight.detach().flatten(1), W.flatten(1), H)


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", LAYERS)
def test_no_row_is_worse_after_a_search(name: str, inputs: str) -> None:
    layer, x = hard_case(name, inputs)
    W = layer.weight.detach().clone()
    W[1].view(-1)[:3] = 0

    def solved(mode: str, search: bool) -> tuple[nn.Module, torch.Tensor]:
        obs = TrueOBS(copy.deepcopy(layer))
        obs.layer.weight.data.copy_(W)
        obs.add_batch(x)
        if mode == "nm":
            obs.nmprune(2, 4, swaps=search)
        else:
            obs.quantizer = fit_weight_grid(W.flatten(1), 3, symmetric=mode == "symmetric")
            obs.quantize(refine=search)
            weight = obs.view.matrix
            assert torch.equal(obs.quantizer(weight), weight)
        assert (obs.layer.weight[W == 0] == 0).all()
        return obs.layer, obs.H

    modes = ["asymmetric", "symmetric", *(["nm"] if W.shape[1] % 4 == 0 else [])]
    for mode in modes:
        (plain, H), (searched, _) = (solved(mode, search) for search in (False, True))
        before, after = (errors_of_rows(one, W, H) for one in (plain, searched))
        assert torch.isfinite(searched.weight).all() and (after <= before).all()


def test_no_row_is_worse_than_rounded_to_nearest() -> None:
    """Random layers with few rows, on which OBQ alone loses some rows to rounding."""
    torch.manual_seed(0)
    lost = 0
    for _ in range(20):
        layer, x = nn.Linear(32, 10).double(), torch.randn(100, 32).double()
        W, obs = layer.weight.detach().clone(), TrueOBS(layer)
        obs.add_batch(x)
        obs.quantizer = fit_weight_grid(W, 3)
        obs.quantize()
        H = hessian_oracle(x.T.numpy(), 100)
        for r, (w, ours) in enumerate(zip(W.numpy(), layer.weight, strict=True)):
            nearest, step = rounding(obs.quantizer, r)
            obq = quantise_oracle(w, H, nearest, step, mask=w != 0).weights
            best = min(squared_error(w, rival, H) for rival in (obq, nearest(w)))
            lost += squared_error(w, nearest(w), H) < squared_error(w, obq, H)
            assert squared_error(w, ours.detach().numpy(), H) == pytest.approx(best, rel=1e-9)
    assert lost > 0


# -- the options -----------------------------------------------------------------------------------


def test_searches_are_on_with_sequential_and_where_asked_for() -> None:
    for mode in (NMPruneMode(), QuantMode(wbits=4)):
        assert not mode.searches and replace(mode, sequential=True).searches
        assert replace(mode, **{mode.search_name: True}).searches
        assert not replace(mode, **{mode.search_name: False}, sequential=True).searches
        assert not replace(mode, sequential=True, order=mode.baseline).searches


def command(*words: object) -> int:
    return main_trueobs.main(["rn8", "digits", *map(str, words), "--nsamples", "64", "--noaug"])


def test_searches_lower_every_squared_error(tmp_path, capsys) -> None:
    paths = [tmp_path / f"{name}.pth" for name in ("plain", "searched")]
    for words in (["nmprune"], ["quant", "--wbits", "3", "--wasym"]):
        option = "swaps" if words[0] == "nmprune" else "refine"
        errors = []
        for path, flag in zip(paths, (f"--no-{option}", f"--{option}"), strict=True):
            assert command(*words, flag, "--save", path, "--restart") == 0
            lines = [line for line in capsys.readouterr().err.splitlines() if "squared" in line]
            errors.append([float(line.split("squared error ")[1].split()[0]) for line in lines])
        assert all(after <= before for before, after in zip(*errors, strict=True))
        assert sum(errors[1]) < sum(errors[0])
        weights = [load_checkpoint(path)["layer3.0.conv2.weight"] for path in paths]
        assert not torch.equal(*weights)


def test_mistakes_and_doubts_are_told(capsys) -> None:
    assert command("nmprune", "--order", "magnitude", "--swaps") == 2
    assert "leave out --order magnitude" in capsys.readouterr().err
    assert command("unstr", "--sparse-dir", "x", "--refine") == 2
    assert "--refine belongs to quant" in capsys.readouterr().err
    assert command("quant", "--wbits", 2, "--hscale", "--wperweight") == 2
    assert "leave out --wperweight" in capsys.readouterr().err
    assert command("quant", "--wbits", 2, "--refine", "--hscale") == 0
    lines = capsys.readouterr().err
    assert "use it with --sequential" in lines and "try --wasym" in lines


def test_advice_for_an_asymmetric_grid_where_weights_are_on_one_side() -> None:
    layers = find_layers(get_model("rn8", "digits"))
    for layer in layers.values():
        layer.weight.data.sign_().mul_(torch.rand_like(layer.weight) + 1e-3)  # no side
    assert QuantMode(wbits=3).advice(layers) == []
    layers["conv1"].weight.data.abs_()  # half of a symmetric grid is of no use: 4 times the error
    (line,) = QuantMode(wbits=3).advice(layers)
    times = float(line.split("(conv1: ")[1].split()[0])
    assert "1 of 8 layers" in line and 3 < times < 8
    assert not QuantMode(wbits=3, wasym=True).advice(layers)
    assert not QuantMode(wbits=5).advice(layers)


@pytest.mark.parametrize("flag", ["--swaps", "--no-swaps"])
def test_a_record_repeats_a_search_or_its_absence(flag, tmp_path, capsys) -> None:
    words = ["nmprune", *(["--sequential"] if flag == "--no-swaps" else []), flag]
    first, second = tmp_path / "a.pth", tmp_path / "b.pth"
    assert command(*words, "--save", first) == 0
    repeat = ["--repeat", str(first.with_suffix(".json")), "--save", str(second)]
    assert main_trueobs.main(repeat) == 0
    states = [load_checkpoint(path) for path in (first, second)]
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())
    capsys.readouterr()
    assert main_trueobs.main([*repeat, "--no-swaps" if flag == "--swaps" else "--swaps"]) == 2
    assert "would not repeat the run (--swaps was" in capsys.readouterr().err
