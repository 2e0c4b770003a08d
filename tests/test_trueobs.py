"""The elimination engine and `TrueOBS` against textbook oracles, and invariants for any layer.

The oracles (tests/oracles.py) are numpy in float64 and share no code with what is tested; columns
and Hessians come from them as well. Symbols as in trueobs.py; to 1e-9 unless it says otherwise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import ceil

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracles import (
    Array,
    OracleTrace,
    block_oracle,
    conv_columns_oracle,
    decouple_dead,
    global_selection_oracle,
    hessian_oracle,
    magnitude_nm_oracle,
    magnitude_oracle,
    masked_least_squares,
    nm_oracle,
    quantise_oracle,
    squared_error,
    structured_oracle,
    unstructured_oracle,
)
from torch import Tensor, nn

from obc.solver import elimination, levels
from obc.solver.elimination import (
    NM,
    Blocks,
    PivotRule,
    Quantise,
    Trace,
    Unstructured,
    compiled_engine,
    eliminate,
    eliminate_in_torch,
)
from obc.solver.inverse import damped_inverse
from obc.solver.levels import first_counts
from obc.solver.threads import SpareBuffers
from quant import Grid, fit_weight_grid
from trueobs import TrueOBS

TOLERANCE = 1e-9
SPARSITIES = (0.0, 0.1, 0.37, 0.5, 0.75, 0.99, 1.0)
QUICKLY = settings(max_examples=25, deadline=None, derandomize=True)

# name: layer, shape of its calibration inputs
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda: nn.Conv2d(8, 6, 3, padding=1), (30, 8, 5, 5)),
    "wide": (lambda: nn.Conv2d(16, 3, 3, padding=1), (30, 16, 5, 5)),
    "groups": (lambda: nn.Conv2d(16, 6, 3, stride=2, padding=1, groups=2), (60, 16, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8), (20, 8, 4, 4)),
    "two per group": (lambda: nn.Conv2d(4, 8, (2, 2), groups=4), (20, 4, 4, 4)),
    "same": (lambda: nn.Conv2d(4, 3, (3, 2), padding="same", dilation=2), (20, 4, 5, 6)),
    "reflect": (
        lambda: nn.Conv2d(8, 3, (1, 3), padding="same", padding_mode="reflect"),
        (20, 8, 4, 5),
    ),
    "circular": (
        lambda: nn.Conv2d(4, 4, 3, stride=(2, 1), padding=(1, 2), padding_mode="circular"),
        (30, 4, 6, 5),
    ),
    "replicate": (
        lambda: nn.Conv2d(4, 3, 3, dilation=(1, 2), padding=2, padding_mode="replicate"),
        (30, 4, 5, 6),
    ),
    "pointwise": (lambda: nn.Conv2d(24, 5, 1, stride=2), (30, 24, 5, 5)),
    "linear": (lambda: nn.Linear(40, 6), (30, 7, 40)),
}
BLOCKABLE = ("conv", "groups", "linear", "reflect")  # channels are a multiple of 8


# ------------------------------------------------------------------------------------ the layers


@dataclass
class Case:
    """A layer with calibration inputs seen, and what the oracles know of it."""

    layer: nn.Module
    obs: TrueOBS
    W: Array  # (rows, d) weights to start from
    H: list[Array]  # (d, d) for every row: its group's
    innermost: np.ndarray  # (d,) columns in the order (kh, kw, channel)

    def weights(self, weight: Tensor | None = None) -> Array:  # (rows, d)
        weight = self.layer.weight if weight is None else weight
        return weight.detach().double().flatten(1).numpy()

    def permuted(self) -> list[tuple[Array, Array]]:  # rows (w, H) with input channels innermost
        order = self.innermost
        return [(w[order], H[order][:, order]) for w, H in zip(self.W, self.H, strict=True)]


def columns_of(layer: nn.Module, x: Array) -> list[Array]:  # one (d, L) a group
    if isinstance(layer, nn.Linear):
        return [x.reshape(-1, x.shape[-1]).T]
    shape = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    return conv_columns_oracle(x, *shape, layer.groups, layer.padding_mode)


def random_inputs(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Correlated channels."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    channel = -1 if len(shape) == 3 else 1
    return x + x.mean(channel, keepdim=True)


def case_of(
    layer: nn.Module,
    x: Tensor,
    sparse: float = 0.0,
    memory: int | None = None,
    H: list[Array] | None = None,  # per group, if known
) -> Case:
    generator = torch.Generator().manual_seed(1)
    layer = layer.to(x.dtype)
    shape = layer.weight.shape
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    weight *= torch.rand(shape, generator=generator) >= sparse
    layer.weight.data.copy_(weight)
    obs = TrueOBS(layer, memory=memory)
    half = len(x) // 2
    for part in (x[:half], x[half:]):
        if len(part):
            obs.add_batch(part, None)
    if H is None:
        H = [hessian_oracle(c, len(x)) for c in columns_of(layer, x.double().numpy())]
    W = layer.weight.detach().double().flatten(1).numpy().copy()
    per_row = [H[r * len(H) // len(W)] for r in range(len(W))]
    for r, H_row in enumerate(per_row):
        W[r] = decouple_dead(W[r], H_row)[0]
    spatial = layer.weight[0, 0].numel()
    return Case(layer, obs, W, per_row, np.arange(W.shape[1]).reshape(-1, spatial).T.ravel())


@cache
def known_hessians(name: str) -> list[Array]:
    make, shape = LAYERS[name]
    return [hessian_oracle(c, shape[0]) for c in columns_of(make(), random_inputs(shape).numpy())]


def case(name: str, sparse: float = 0.0, memory: int | None = None) -> Case:
    make, shape = LAYERS[name]
    return case_of(make(), random_inputs(shape), sparse, memory, known_hessians(name))


def assert_close(ours: Tensor | Array, oracle: Array, tolerance: float = TOLERANCE) -> None:
    np.testing.assert_allclose(np.asarray(ours), oracle, rtol=tolerance, atol=tolerance)


def check_trace(obs: TrueOBS, r: int, trace: OracleTrace, unit: int = 1) -> None:
    """Row r went as the oracle did, once its zeros were out of the way."""
    order = (obs.trace.order[r, ::unit] // unit).tolist()
    losses = obs.Losses[r].view(-1, unit).sum(1)
    zeros = len(order) - len(trace.order)
    assert order[zeros:] == trace.order
    assert_close(losses[zeros:], trace.losses)
    assert not losses[:zeros].any()


def check_levels(
    levels: list[Array],  # (rows, d), one for each of SPARSITIES
    traces: list[OracleTrace],
    steps: int,  # in all, those for weights that are zero from the start included
) -> None:
    losses = np.stack([np.pad(t.losses, (steps - len(t.losses), 0)) for t in traces])
    for sparsity, W in zip(SPARSITIES, levels, strict=True):
        counts = global_selection_oracle(losses, sparsity)
        for w, count, trace in zip(W, counts, traces, strict=True):
            assert_close(w, trace.weights_after(max(0, count - steps + len(trace.order))))


def without_zeros(w: Array, H: Array) -> Array:
    """H in which the columns of absent weights have nothing to do with the others."""
    return np.where(np.outer(w != 0, w != 0), H, np.diag(np.diag(H)))


# ---------------------------------------------------------------------- each mode and its oracle


@pytest.fixture(params=["compiled", "torch"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both engines, the compiled one for CPUs and the one for any device."""
    if request.param == "torch":
        for module in (elimination, levels):
            monkeypatch.setattr(module, "compiled_engine", lambda: None)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("sparse", [0.0, 0.4])
@pytest.mark.parametrize("name", LAYERS)
def test_unstructured_is_the_oracle(name: str, sparse: float) -> None:
    it = case(name, sparse)
    rows = zip(it.W, it.H, strict=True)
    traces = [unstructured_oracle(w, H, w != 0) for w, H in rows]
    it.obs.prepare_unstr()
    for r, trace in enumerate(traces):
        check_trace(it.obs, r, trace)
    levels = [it.weights(W) for W in it.obs.prune_unstr(SPARSITIES)]
    check_levels(levels, traces, it.W.shape[1])


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("sparse", [0.0, 0.6])  # at 0.6 many groups have too many zeros already
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (4, 8), (1, 2), (0, 4), (4, 4)])
@pytest.mark.parametrize("name", ["conv", "groups", "linear"])
def test_nm_is_the_oracle(name: str, n: int, m: int, sparse: float) -> None:
    it = case(name, sparse)
    it.obs.nmprune(n, m)
    pruned = it.weights()[:, it.innermost]
    for r, (w, H) in enumerate(it.permuted()):
        trace = nm_oracle(w, H, n, m, w != 0)
        assert_close(pruned[r], trace.weights)
        losses = it.obs.Losses[r]
        zeros = len(losses) - len(trace.losses)
        assert_close(losses[zeros:], trace.losses)
        assert not losses[:zeros].any()
        had = (w == 0).reshape(-1, m).sum(1)
        np.testing.assert_array_equal((pruned[r] == 0).reshape(-1, m).sum(1), np.maximum(had, n))


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("sparse", [0.0, 0.5])  # at 0.5 all blocks are ragged, some are empty
@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("name", BLOCKABLE)
def test_blocked_is_the_oracle(name: str, size: int, sparse: float) -> None:
    it = case(name, sparse)
    it.obs.prepare_blocked(size)
    traces = [block_oracle(w, without_zeros(w, H), size) for w, H in it.permuted()]
    for r, trace in enumerate(traces):
        check_trace(it.obs, r, trace, size)
    levels = [it.weights(W)[:, it.innermost] for W in it.obs.prune_blocked(SPARSITIES)]
    check_levels(levels, traces, it.W.shape[1] // size)
    assert all((level[it.W[:, it.innermost] == 0] == 0).all() for level in levels)


@pytest.mark.parametrize("zeroed", [False, True])
@pytest.mark.parametrize(
    ("name", "size"),
    [("conv", 9), ("conv", 1), ("groups", 9), ("depthwise", 1), ("linear", 4), ("pointwise", 1)],
)
def test_structured_is_the_oracle(name: str, size: int, zeroed: bool) -> None:
    it = case(name)
    if zeroed:  # two structures of all rows have gone already
        it.layer.weight.data.flatten(1)[:, size : 3 * size] = 0
        it.W[:, size : 3 * size] = 0
    levels = it.obs.prune_struct(SPARSITIES, size)
    groups = it.obs.groups
    traces = []
    for W, H in zip(
        it.W.reshape(groups, -1, it.W.shape[1]), it.H[:: len(it.W) // groups], strict=True
    ):
        traces.append(structured_oracle(W, without_zeros(W[0], H), size))
    for g, trace in enumerate(traces):
        assert_close(it.obs.Losses[g].view(-1, size).sum(1), trace.losses)
    grouped = [it.weights(W).reshape(groups, -1, it.W.shape[1]) for W in levels]
    check_levels(grouped, traces, it.W.shape[1] // size)


def test_structured_keeps_single_zero_columns_of_a_block() -> None:
    it = case("conv")
    it.layer.weight.data.flatten(1)[:, 10] = 0  # in all rows, but not its whole block of 9
    for weight in it.obs.prune_struct([0.0, 0.25, 0.5], 9):
        assert not weight.flatten(1)[:, 10].any()


def test_structured_keeps_the_zeros_of_single_rows_and_stays_optimal() -> None:
    it = case("conv")
    it.layer.weight.data.flatten(1)[1, [2, 5]] = 0
    W = it.weights()
    pruned = it.weights(it.obs.prune_struct([0.5], 9)[0])
    assert (pruned[W == 0] == 0).all()
    for w, kept, H in zip(W, pruned, it.H, strict=True):
        assert_close(kept, masked_least_squares(w, H, kept != 0))


def rounding(grid: Grid, r: int) -> tuple[Callable[[Array], Array], float]:
    step, zero, maxq = float(grid.scale[r]), float(grid.zero[r]), int(grid.maxq)
    return lambda w: step * (np.clip(np.round(w / step) + zero, 0, maxq) - zero), step


def check_quantised(it: Case) -> None:
    it.obs.quantize()
    quantised = it.weights()
    for r, (w, H) in enumerate(zip(it.W, it.H, strict=True)):
        trace = quantise_oracle(w, H, *rounding(it.obs.quantizer, r), mask=w != 0)
        rivals = trace.weights, rounding(it.obs.quantizer, r)[0](w)  # the better one is used
        assert_close(quantised[r], min(rivals, key=lambda w_hat: squared_error(w, w_hat, H)))
        zeros = int((w == 0).sum())
        assert_close(it.obs.Losses[r, zeros:], trace.losses)
        assert not it.obs.Losses[r, :zeros].any()
    assert (quantised[it.W == 0] == 0).all()


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("sparse", [0.0, 0.5])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("name", "symmetric", "per_channel"),
    [
        ("conv", True, True),
        ("groups", False, True),
        ("linear", True, False),
        ("depthwise", True, True),
        ("circular", False, False),
    ],
)
def test_quantise_is_the_oracle(
    name: str, symmetric: bool, per_channel: bool, bits: int, sparse: float
) -> None:
    it = case(name, sparse)
    weight = torch.from_numpy(it.W)
    it.obs.quantizer = fit_weight_grid(weight, bits, symmetric, per_channel=per_channel)
    check_quantised(it)


def test_weights_outside_of_the_grid_go_first() -> None:
    it = case("conv")
    grid = fit_weight_grid(torch.from_numpy(it.W), 3)
    it.obs.quantizer = Grid(grid.scale / 3, grid.zero, grid.maxq)  # too narrow on purpose
    plain = quantise_oracle(it.W[0], it.H[0], rounding(it.obs.quantizer, 0)[0], step_size=np.inf)
    check_quantised(it)
    assert not np.allclose(plain.weights, it.weights()[0])  # the rule had something to say


def test_modes_of_dead_inputs_are_the_oracle() -> None:
    make, shape = LAYERS["conv"]
    x = random_inputs(shape)
    x[:, [1, 6]] = 0
    for mode, run in MODES.items():
        it = case_of(make(), x)
        dead = np.diag(it.H[0]) == 0
        assert dead.sum() == 18
        for weight in run(it):
            assert torch.isfinite(weight).all(), mode
            assert not it.weights(weight)[:, dead].any(), mode
        assert it.obs.damping == 0 and it.obs.rank_deficit == 0
    it = case_of(make(), x)
    problems = [decouple_dead(w, H) for w, H in zip(it.W, it.H, strict=True)]
    it.obs.prepare_unstr()
    for r, (w, H) in enumerate(problems):
        check_trace(it.obs, r, unstructured_oracle(w, H, w != 0))


# -------------------------------------------------------------------------------------- the engine


def spd(d: int, seed: int) -> Array:
    x = np.random.default_rng(seed).normal(size=(3 * d, d))
    x += x.mean(1, keepdims=True)
    return x.T @ x / d


@dataclass(frozen=True)
class EngineMode:
    rule: Callable[[int], PivotRule]  # of R systems
    oracle: Callable[[Array, Array], OracleTrace]  # of (w, H)
    steps: int
    unit: int = 1


D = 48
STEP, LOW, HIGH = 0.375, -4.0, 3.0  # exact in float32
ENGINE = {
    "unstructured": EngineMode(lambda R: Unstructured(), unstructured_oracle, D),
    "2:4": EngineMode(
        lambda R: NM(2, 4, R, D, torch.device("cpu")), lambda w, H: nm_oracle(w, H, 2, 4), D // 2
    ),
    "blocks": EngineMode(lambda R: Blocks(4), lambda w, H: block_oracle(w, H, 4), D, 4),
    "quantise": EngineMode(
        lambda R: Quantise(*torch.tensor([[[v]] * R for v in (STEP, LOW, HIGH)]).double()),
        lambda w, H: quantise_oracle(
            w, H, lambda v: STEP * np.clip(np.round(v / STEP), LOW, HIGH), STEP
        ),
        D,
    ),
}


def run_engine(mode: EngineMode, panel: int, engine: str) -> tuple[Trace, Array, list[Array]]:
    H = [spd(D, seed) for seed in (1, 2)]
    W = np.random.default_rng(0).normal(size=(5, D))
    inverse = damped_inverse(torch.from_numpy(np.stack(H)), dtype=torch.float64)
    system = torch.tensor([0, 1, 1, 0, 1])
    given_W = torch.from_numpy(W)[:, None]
    before = given_W.clone(), inverse.matrix.clone()
    assert engine == "torch" or compiled_engine() is not None
    run = eliminate if engine == "compiled" else eliminate_in_torch
    trace = run(given_W, inverse, system, mode.rule(5), mode.steps, panel)
    assert torch.equal(before[0], given_W) and torch.equal(before[1], inverse.matrix)
    return trace, W, [H[g] for g in system]


@pytest.mark.parametrize("panel", [4, 12, 20, D])
@pytest.mark.parametrize("engine", ["compiled", "torch"])
@pytest.mark.parametrize("name", ENGINE)
def test_engine_is_the_oracle_for_every_panel_width(name: str, engine: str, panel: int) -> None:
    mode = ENGINE[name]
    trace, W, H = run_engine(mode, panel, engine)
    for r in range(len(W)):
        oracle = mode.oracle(W[r], H[r])
        assert (trace.order[r, :: mode.unit] // mode.unit).tolist() == oracle.order
        assert_close(trace.losses[r].view(-1, mode.unit).sum(1), oracle.losses)
        assert_close(trace.weights[r, 0], oracle.weights)


@pytest.fixture
def nan_in_new_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is read before it was written shows, in memory that is handed on, too."""
    lent = SpareBuffers.lent

    @contextmanager
    def with_nan(spare: SpareBuffers, name: str, *shape: int) -> Iterator[Tensor]:
        with lent(spare, name, *shape) as buffer:
            yield buffer.fill_(torch.nan)

    monkeypatch.setattr(SpareBuffers, "lent", with_nan)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nan_in_new_memory")
@pytest.mark.parametrize("tile", [1, 3, 8, 16, D - 1])
@pytest.mark.parametrize("name", ENGINE)
def test_engine_is_the_oracle_for_every_tile(
    name: str, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of A is stored; which half depends on the tile."""
    monkeypatch.setattr(compiled_engine(), "tile_of", lambda d: tile)
    mode = ENGINE[name]
    trace, W, H = run_engine(mode, 4, "compiled")
    for r in range(len(W)):
        oracle = mode.oracle(W[r], H[r])
        assert (trace.order[r, :: mode.unit] // mode.unit).tolist() == oracle.order
        assert_close(trace.weights[r, 0], oracle.weights)


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 4), (7, 8), (4, 4), (0, 4)])
@pytest.mark.parametrize("d", [8, 240, 512])
def test_compiled_nm_is_that_in_torch_on_sparse_rows(d: int, n: int, m: int) -> None:
    """Weights that are zero go first, all with the same score."""
    H, generator = spd(d, 5), torch.Generator().manual_seed(0)
    W = torch.randn(3, 1, d, dtype=torch.float64, generator=generator)
    W[:2, :, ::m] = 0
    inverse = damped_inverse(torch.from_numpy(H)[None], dtype=torch.float64)
    system, steps = torch.zeros(3, dtype=torch.int64), d // m * n
    for panel in (16, 96):
        traces = [
            run(W, inverse, system, NM(n, m, 3, d, W.device), steps, panel)
            for run in (eliminate, eliminate_in_torch)
        ]
        gone = [trace.order.long().sort(1).values for trace in traces]  # zeros go in any order
        assert torch.equal(*gone)
        assert_close(traces[0].losses, traces[1].losses)
        assert_close(traces[0].weights, traces[1].weights)


def test_columns_that_are_not_whole_groups_are_refused() -> None:
    inverse = damped_inverse(torch.eye(10, dtype=torch.float64)[None])
    W, system = torch.ones(1, 1, 10), torch.tensor([0])
    for rule in (NM(1, 4, 1, 10, W.device), Blocks(4)):
        with pytest.raises(ValueError, match="10 columns are not whole groups or blocks"):
            eliminate(W, inverse, system, rule, 4)


@pytest.mark.parametrize("panel", [1, 7, D + 50])
@pytest.mark.parametrize("engine", ["compiled", "torch"])
@pytest.mark.parametrize("name", ["unstructured", "2:4", "quantise"])
def test_odd_panels_change_nothing(name: str, engine: str, panel: int) -> None:
    odd, whole = (run_engine(ENGINE[name], width, engine)[0] for width in (panel, D))
    assert torch.equal(odd.order, whole.order)
    same_trace(odd, whole)


def same_trace(one: Trace, other: Trace) -> None:
    assert torch.equal(one.order, other.order)
    assert_close(one.losses, other.losses.numpy())
    assert_close(one.weights, other.weights.numpy())


@pytest.mark.parametrize("name", ENGINE)
def test_threads_change_nothing(name: str) -> None:
    """Not the result, and not how many threads others may use afterwards."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run_engine(ENGINE[name], 12, "compiled")[0]
        torch.set_num_threads(3)
        same_trace(run_engine(ENGINE[name], 12, "compiled")[0], alone)
        with ThreadPoolExecutor(1) as pool:
            seen = {torch.get_num_threads(), pool.submit(torch.get_num_threads).result()}
        assert seen == {3}
    finally:
        torch.set_num_threads(threads)


# -------------------------------------------------------------------------------------- the modes


def levels_of(it: Case, prepare: Callable[[], None], prune: Callable) -> list[Tensor]:
    prepare()
    return prune([0.0, 0.3, 0.7])


def written(it: Case, mode: Callable[[], None]) -> list[Tensor]:
    mode()
    return [it.layer.weight.detach()]


def quantised(it: Case, bits: int = 3) -> list[Tensor]:
    it.obs.quantizer = fit_weight_grid(it.layer.weight.detach().flatten(1), bits)
    return written(it, it.obs.quantize)


MODES: dict[str, Callable[[Case], list[Tensor]]] = {
    "quantise": quantised,
    "2:4": lambda it: written(it, lambda: it.obs.nmprune(2, 4)),
    "unstructured": lambda it: levels_of(it, it.obs.prepare_unstr, it.obs.prune_unstr),
    "blocked": lambda it: levels_of(it, lambda: it.obs.prepare_blocked(4), it.obs.prune_blocked),
    "structured": lambda it: it.obs.prune_struct([0.0, 0.3, 0.7], 1),
}


@pytest.mark.parametrize("name", ["conv", "groups", "linear", "damped"])
@pytest.mark.parametrize("mode", MODES)
def test_memory_budget_changes_no_bit(mode: str, name: str) -> None:
    def at(memory: int) -> tuple[list[Tensor], Tensor]:
        sparse = 0.0 if mode == "structured" else 0.3
        if name == "damped":  # 20 inputs for 40 columns
            x = random_inputs((20, 1, 40))[:, 0].float()
            it = case_of(nn.Linear(40, 19), x, sparse, memory)
        else:
            make, shape = LAYERS[name]
            it = case_of(make(), random_inputs(shape).float(), sparse, memory)
        return MODES[mode](it), it.obs.Losses

    (ample, losses), (tight, same) = at(1 << 34), at(1)
    assert all(torch.equal(one, other) for one, other in zip(ample, tight, strict=True))
    assert torch.equal(losses, same)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_but_the_weight_changes(mode: str) -> None:
    make, shape = LAYERS["groups"]
    x = random_inputs(shape)
    before = x.clone()
    it = case_of(make(), x)
    state = copy.deepcopy(it.layer.state_dict())
    gram = it.obs.H
    MODES[mode](it)
    assert torch.equal(x, before) and torch.equal(gram, it.obs.H)
    assert list(it.layer.state_dict()) == list(state)
    assert torch.equal(it.layer.bias, state["bias"])
    changed = not torch.equal(it.layer.weight, state["weight"])
    assert changed == (mode in ("quantise", "2:4"))  # the others return levels
    assert it.layer.weight.requires_grad and it.layer.weight.grad is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", MODES)
def test_bad_inputs_raise_and_leave_the_weight_alone(mode: str, bad: float) -> None:
    make, shape = LAYERS["conv"]
    x = random_inputs(shape)
    x[3, 2, 1, 1] = bad
    it = case_of(make(), x, H=known_hessians("conv"))
    weight = it.layer.weight.detach().clone()
    with pytest.raises((ValueError, ArithmeticError)):
        MODES[mode](it)
    assert torch.equal(it.layer.weight, weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("mode", MODES)
def test_rank_deficient_hessian_is_damped(mode: str, dtype: torch.dtype) -> None:
    x = random_inputs((6, 1, 40))[:, 0].to(dtype)  # 6 inputs for 40 columns
    x[:, 7] = x[:, 3]
    x[:, 12] = 0
    it = case_of(nn.Linear(40, 5), x)
    for weight in MODES[mode](it):
        assert torch.isfinite(weight).all()
        assert not weight[:, 12].any()
    assert it.obs.damping > 0
    assert it.obs.rank_deficit == 40 - 6 - 1  # the dead column is decoupled, not deficient


@pytest.mark.parametrize("mode", MODES)
def test_duplicated_channels_are_damped(mode: str) -> None:
    make, shape = LAYERS["conv"]
    x = random_inputs(shape)
    x[:, 5] = x[:, 2]
    it = case_of(make(), x)
    assert all(torch.isfinite(weight).all() for weight in MODES[mode](it))
    assert it.obs.damping == pytest.approx(1e-8) and it.obs.rank_deficit == 9


@pytest.mark.parametrize("name", ["conv", "linear"])
def test_rel_damp_is_the_oracle_of_a_damped_hessian(name: str) -> None:
    it = case(name)
    it.obs.rel_damp = 0.05
    it.obs.prepare_unstr()
    for r, (w, H) in enumerate(zip(it.W, it.H, strict=True)):
        damped = H + 0.05 * np.diag(H).mean() * np.eye(len(H))
        check_trace(it.obs, r, unstructured_oracle(w, damped))
    assert it.obs.damping == 0.05


# ---------------------------------------------------------------------- selection and known answers


@pytest.mark.parametrize("size", [1, 3])
def test_global_selection_is_the_oracle(size: int) -> None:
    losses = torch.rand(7, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    losses[2, :9], losses[5, 3:12] = 0, 0  # ties
    units = losses.view(7, -1, size).sum(2).numpy()
    for sparsity in (0.0, 0.013, 0.37, 0.5, 0.919, 1.0):
        counts = global_selection_oracle(units, sparsity) * size
        assert first_counts(losses, [sparsity], size)[0].tolist() == counts.tolist()


def test_selection_takes_the_ceiling_of_the_decimal() -> None:
    """100 · 0.07 is 7.000000000000001 in floating point; 7 weights go, not 8."""
    for steps in (10, 13, 100):
        losses = torch.rand(10, steps, generator=torch.Generator().manual_seed(0))
        for percent in range(101):
            wanted = ceil(Fraction(percent, 100) * 10 * steps)
            assert int(first_counts(losses, [percent / 100]).sum()) == wanted


def identity_case() -> Case:
    return case_of(nn.Linear(32, 4), torch.eye(32, dtype=torch.float64) * 32**0.5)


def test_identity_hessian_gives_magnitude_pruning() -> None:
    it = identity_case()
    it.obs.prepare_unstr()
    magnitudes = np.abs(it.W)
    for sparsity, weight in zip(SPARSITIES, it.obs.prune_unstr(SPARSITIES), strict=True):
        cheapest = np.argsort(magnitudes, axis=None)[: ceil(128 * sparsity)]
        wanted = it.W.copy()
        wanted.flat[cheapest] = 0
        assert_close(weight, wanted)
    it.obs.nmprune(2, 4)
    ranks = magnitudes.reshape(4, 8, 4).argsort(2).argsort(2).reshape(4, 32)
    assert_close(it.layer.weight.detach(), np.where(ranks >= 2, it.W, 0))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_identity_hessian_gives_round_to_nearest(bits: int) -> None:
    it = identity_case()
    grid = fit_weight_grid(torch.from_numpy(it.W), bits)
    quantised(it, bits)
    assert_close(it.layer.weight.detach(), grid(torch.from_numpy(it.W)).numpy())


# ------------------------------------------------------------------- orders that ignore the Hessian


def baseline_case(name: str, order: str, sparse: float, dead: bool) -> Case:
    make, shape = LAYERS[name]
    x = random_inputs(shape)
    if dead:
        x.movedim(-1 if name == "linear" else 1, 0)[2] = 0
    it = case_of(make(), x, sparse)
    it.obs.order = order
    return it


@pytest.mark.parametrize(("sparse", "dead"), [(0.0, False), (0.4, False), (0.0, True)])
@pytest.mark.parametrize("name", ["conv", "groups", "depthwise", "linear"])
def test_magnitude_order_is_the_oracle(name: str, sparse: float, dead: bool) -> None:
    """The smallest weights, blocks or structures go; the others keep their dense values."""
    it = baseline_case(name, "magnitude", sparse, dead)
    rows, d = it.W.shape
    it.obs.prepare_unstr()
    for sparsity, weight in zip(SPARSITIES, it.obs.prune_unstr(SPARSITIES), strict=True):
        np.testing.assert_array_equal(
            it.weights(weight), magnitude_oracle(it.W[:, None], sparsity)[:, 0]
        )
    assert_close(it.obs.Losses.sum(1), (it.W**2).sum(1) / 2)
    groups = it.obs.groups
    structures = it.W.reshape(groups, rows // groups, d)
    for size in (1, 3 if d % 3 == 0 else 4):
        for sparsity in (0.3, 0.7):
            weight = it.weights(it.obs.prune_struct([sparsity], size)[0])
            wanted = magnitude_oracle(structures, sparsity, size)
            np.testing.assert_array_equal(weight, wanted.reshape(rows, d))
    if d % 4 == 0:
        innermost = it.W[:, it.innermost]
        it.obs.prepare_blocked(4)
        for sparsity, weight in zip(SPARSITIES, it.obs.prune_blocked(SPARSITIES), strict=True):
            wanted = magnitude_oracle(innermost[:, None], sparsity, 4)[:, 0]
            np.testing.assert_array_equal(it.weights(weight)[:, it.innermost], wanted)
        for n, m in ((2, 4), (0, 4), (1, 2), (4, 4)):
            it.layer.weight.data.copy_(torch.from_numpy(it.W).view_as(it.layer.weight))
            it.obs.nmprune(n, m)
            wanted = magnitude_nm_oracle(innermost, n, m)
            np.testing.assert_array_equal(it.weights()[:, it.innermost], wanted)
    assert it.obs.damping == it.obs.rank_deficit == 0


@pytest.mark.parametrize(("sparse", "dead"), [(0.0, False), (0.4, False), (0.0, True)])
@pytest.mark.parametrize("name", ["conv", "groups", "depthwise", "linear"])
def test_nearest_order_rounds_each_weight_on_its_own(name: str, sparse: float, dead: bool) -> None:
    for bits in (2, 3, 8):
        it = baseline_case(name, "nearest", sparse, dead)
        it.obs.quantizer = fit_weight_grid(torch.from_numpy(it.W), bits)
        it.obs.quantize()
        for r, (w, rounded) in enumerate(zip(it.W, it.weights(), strict=True)):
            values = float(it.obs.quantizer.scale[r]) * (
                np.arange(2**bits) - float(it.obs.quantizer.zero[r])
            )
            assert_close(np.abs(rounded[:, None] - values).min(1), np.zeros_like(w))
            distance = np.abs(w[:, None] - values).min(1)  # the largest weight is halfway
            assert_close(np.abs(rounded - w), distance)


def test_an_order_needs_no_sound_hessian_and_says_who_runs_it(caplog) -> None:
    x = random_inputs((6, 1, 40))[:, 0]  # 6 inputs for 40 columns
    it = case_of(nn.Linear(40, 5), x)
    it.obs.order = "magnitude"
    elimination.log_uncompiled.cache_clear()
    with caplog.at_level("INFO", logger="trueobs"):
        it.obs.prepare_unstr()
        it.obs.prepare_unstr()
    assert [record.getMessage() for record in caplog.records] == [
        "an order that ignores the Hessian has no compiled form: PyTorch runs it"
    ]
    wanted = magnitude_oracle(it.W[:, None], 0.5)[:, 0]
    np.testing.assert_array_equal(it.weights(it.obs.prune_unstr([0.5])[0]), wanted)
    with pytest.raises(ValueError, match="order must be one of obs, magnitude, nearest; got best"):
        TrueOBS(it.layer, order="best")


def test_a_rule_without_a_compiled_form_is_named_once(caplog) -> None:
    class LastFirst(PivotRule):
        """The last column goes first."""

        def rank(self, scores: Tensor, error: Tensor) -> Tensor:
            place = -torch.arange(scores.shape[1], dtype=scores.dtype)
            return torch.where(scores < torch.inf, place, scores)

    inverse = damped_inverse(torch.from_numpy(spd(8, 1))[None], dtype=torch.float64)
    W, system = torch.ones(1, 1, 8, dtype=torch.float64), torch.tensor([0])
    with caplog.at_level("INFO", logger="trueobs"):
        for _ in range(2):
            trace = eliminate(W, inverse, system, LastFirst(), 3, panel=8)
    assert trace.order.tolist() == [[7, 6, 5]]
    assert [record.getMessage() for record in caplog.records] == [
        "the rule LastFirst has no compiled form: PyTorch runs it"
    ]


def test_levels_belong_to_the_weights_that_were_prepared() -> None:
    """A script may try a level in the layer before it asks for the next."""
    it = case("conv")
    it.obs.prepare_unstr()
    wanted = it.obs.prune_unstr([0.3, 0.6])
    it.layer.weight.data.copy_(wanted[1])
    assert_close(it.obs.prune_unstr([0.3])[0], wanted[0].numpy())


def test_names_that_users_of_obc_know() -> None:
    layer = nn.Linear(8, 4)
    obs = TrueOBS(layer, rel_damp=0)
    obs.add_batch(random_inputs((30, 1, 8))[:, 0].float(), torch.zeros(30, 4))
    assert (obs.rows, obs.columns, obs.nsamples) == (4, 8, 30)
    assert obs.H.shape == (8, 8) and obs.layer is layer
    obs.prepare_unstr()
    assert [w.shape for w in obs.prune_unstr([0, 0.5])] == [layer.weight.shape] * 2
    obs.prepare_blocked(4)
    assert len(obs.prune_blocked([0.25])) == len(obs.prune_struct([0.5], 2)) == 1
    obs.nmprune(2, 4)
    obs.quantizer = fit_weight_grid(layer.weight.detach(), 4)
    obs.quantize()
    assert obs.Losses.shape == (4, 8)
    assert int((layer.weight == 0).sum()) >= 16
    obs.free()
    assert obs.gram is None


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda obs: obs.quantize(), "quantizer"),
        (lambda obs: obs.nmprune(5, 4), "0 <= N <= M"),
        (lambda obs: obs.nmprune(2, 5), "multiple of 5"),
        (lambda obs: obs.prepare_blocked(7), "multiple of 7"),
        (lambda obs: obs.prune_struct([0.5], 7), "multiple of 7"),
        (lambda obs: obs.prune_unstr([0.5]), "prepare_unstr"),
        (lambda obs: obs.prune_struct([95]), "95"),
        (lambda obs: TrueOBS(obs.layer).H, "no calibration"),
    ],
)
def test_misuse_is_named(call: Callable[[TrueOBS], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(case("conv").obs)


# ------------------------------------------------------------------------ properties of any layer


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    def pair(low: int, high: int) -> tuple[int, int]:
        return draw(st.tuples(st.integers(low, high), st.integers(low, high)))

    groups = draw(st.integers(1, 3))
    channels, rows = groups * draw(st.integers(1, 4)), groups * draw(st.integers(1, 3))
    kernel, dilation, mode = (
        pair(1, 3),
        pair(1, 2),
        draw(st.sampled_from(["zeros", "reflect", "circular", "replicate"])),
    )
    padding = draw(st.sampled_from(["same", "valid", (0, 1), (1, 1), (2, 0)]))
    stride = (1, 1) if padding == "same" else pair(1, 3)
    reach = zip(dilation, kernel, strict=True)
    size = [d * (k - 1) + 1 + draw(st.integers(2, 4)) for d, k in reach]
    layer = nn.Conv2d(channels, rows, kernel, stride, padding, dilation, groups, padding_mode=mode)
    return layer, (draw(st.integers(1, 20)), channels, *size)


@st.composite
def linears(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    columns = draw(st.integers(1, 24))
    leading = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    return nn.Linear(columns, draw(st.integers(1, 5))), (*leading, columns)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any layer on any inputs: dead, duplicated, too few; with zeros in the weights or none."""
    layer, shape = draw(convolutions() | linears())
    dtype = draw(st.sampled_from([torch.float64, torch.float64, torch.float32]))
    axis = 1 if isinstance(layer, nn.Conv2d) else len(shape) - 1
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).movedim(axis, 0)
    channel = st.integers(0, shape[axis] - 1)
    for original, duplicate in draw(st.lists(st.tuples(channel, channel), max_size=1)):
        x[duplicate] = x[original]
    x[draw(st.lists(channel, max_size=2))] = 0
    memory = draw(st.sampled_from([1, 1 << 34]))
    return case_of(layer, x.movedim(0, axis), draw(st.sampled_from([0.0, 0.4])), memory)


def check_result(it: Case, weight: Tensor, best: bool) -> None:
    """Finite, zeros stay, and, if pruned with a sound H, the best that the kept weights can do."""
    assert weight.shape == it.layer.weight.shape and weight.dtype == it.layer.weight.dtype
    assert torch.isfinite(weight).all()
    W = it.weights(weight)
    assert (W[it.W == 0] == 0).all()  # dead inputs are zero in it.W
    for w, w_hat, H in zip(it.W, W, it.H, strict=True):
        w, H = decouple_dead(w, H)
        if not best or weight.dtype == torch.float32 or np.linalg.cond(H) > 1e6:
            continue
        if not (w_hat != w).any():
            continue
        gradient = (H @ (w_hat - w))[w_hat != 0]
        scale = np.abs(H).max() * np.abs(w).sum()
        assert np.abs(gradient).max(initial=0) <= TOLERANCE * scale
        optimum = squared_error(w, masked_least_squares(w, H, w_hat != 0), H)
        assert squared_error(w, w_hat, H) >= optimum * (1 - TOLERANCE)


@QUICKLY
@given(cases(), st.lists(st.floats(0, 1), min_size=1, max_size=3))
def test_property_unstructured(it: Case, sparsities: list[float]) -> None:
    it.obs.prepare_unstr()
    for sparsity, weight in zip(sparsities, it.obs.prune_unstr(sparsities), strict=True):
        check_result(it, weight, best=True)
        wanted = max(ceil(it.W.size * sparsity * (1 - 1e-12)), int((it.W == 0).sum()))
        assert int((weight == 0).sum()) == wanted
    if it.obs.damping == 0 and it.layer.weight.dtype == torch.float64:
        nothing, everything = it.obs.prune_unstr([0, 1])
        error = it.obs.squared_error(everything, nothing)
        assert float(it.obs.Losses.sum()) == pytest.approx(error, rel=1e-4)


@QUICKLY
@given(cases(), st.data())
def test_property_nm(it: Case, data: st.DataObject) -> None:
    m = data.draw(st.sampled_from([m for m in range(1, 9) if it.W.shape[1] % m == 0]))
    n = data.draw(st.integers(0, m))
    it.obs.nmprune(n, m)
    check_result(it, it.layer.weight.detach(), best=True)
    had, has = (
        (W[:, it.innermost] == 0).reshape(len(W), -1, m).sum(2) for W in (it.W, it.weights())
    )
    np.testing.assert_array_equal(has, np.maximum(had, n))


@QUICKLY
@given(cases(), st.data(), st.lists(st.floats(0, 1), min_size=1, max_size=2))
def test_property_blocked(it: Case, data: st.DataObject, sparsities: list[float]) -> None:
    size = data.draw(st.sampled_from([c for c in (1, 2, 3, 4, 8) if it.obs.view.divides_by(c)]))
    it.obs.prepare_blocked(size)
    for sparsity, weight in zip(sparsities, it.obs.prune_blocked(sparsities), strict=True):
        check_result(it, weight, best=True)
        blocks = (it.weights(weight)[:, it.innermost] == 0).reshape(-1, size)
        empty = (it.W[:, it.innermost] == 0).reshape(-1, size).all(1)
        wanted = max(ceil(len(blocks) * sparsity * (1 - 1e-12)), int(empty.sum()))
        assert int(blocks.all(1).sum()) == wanted


@QUICKLY
@given(cases(), st.data(), st.lists(st.floats(0, 1), min_size=1, max_size=2))
def test_property_structured(it: Case, data: st.DataObject, sparsities: list[float]) -> None:
    zero = (it.W == 0).reshape(it.obs.groups, -1, it.W.shape[1])
    assume((zero.all(1) == zero.any(1)).all())
    size = data.draw(st.sampled_from([c for c in range(1, 10) if it.W.shape[1] % c == 0]))
    for weight in it.obs.prune_struct(sparsities, size):
        check_result(it, weight, best=True)
        gone = (it.weights(weight) == 0).reshape(it.obs.groups, -1, it.W.shape[1])
        assert (gone.all(1) == gone.any(1)).all()


@QUICKLY
@given(cases(), st.integers(1, 8), st.booleans(), st.booleans())
def test_property_quantise(it: Case, bits: int, symmetric: bool, per_channel: bool) -> None:
    weight = it.layer.weight.detach().flatten(1)
    it.obs.quantizer = fit_weight_grid(weight, bits, symmetric, per_channel=per_channel)
    it.obs.quantize()
    after = it.layer.weight.detach()
    check_result(it, after, best=False)
    assert torch.equal(it.obs.quantizer(after.flatten(1)), after.flatten(1))
    assert all(len(torch.unique(row)) <= 2**bits for row in after)


def test_a_squared_error_is_never_negative(monkeypatch) -> None:
    """Of nearly nothing, in an H of nearly no rank, rounding leaves one: it was printed so."""
    solver = TrueOBS(nn.Linear(2, 1))
    monkeypatch.setattr(solver, "_hessian", lambda: torch.full((1, 2, 2), -1e-30).double())
    assert solver.squared_error(torch.zeros(1, 2), torch.ones(1, 2)) == 0
