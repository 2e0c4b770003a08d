"""Costs where channels are cut, against the exported network; the choice, against all choices."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from modelutils import find_layers, get_model
from obc.solver import dp, joint
from obc.solver.errors import UserError
from obc.solver.search import profile_problem
from obc.toolkit.costs import layer_costs, profile_cost
from obc.toolkit.cut_costs import CutShares, seconds_table
from obc.toolkit.export_cut import cut_channels
from obc.toolkit.leveldb import Database
from obc.toolkit.profiles import write_scores

LEVELS = ("0000", "3000", "6000", "8000")
SHAPE = (3, 12, 12)


class Path3(nn.Module):
    """conv, norm, pool, depthwise, conv, conv, and flattened pixels into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.b, self.c = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 12, 1, bias=False)
        self.d, self.e = nn.Conv2d(12, 10, 2), nn.Linear(40, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.norm(self.a(x)).relu(), 2)
        return self.e(self.d(self.c(self.b(x)).relu()).relu().flatten(1))


class TwoReaders(nn.Module):
    """Two layers read what a third computes; a sum, whose channels stay; the sum's reader."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left = nn.Conv2d(3, 10, 3), nn.Conv2d(10, 6, 3, padding=1)
        self.right, self.last = nn.Conv2d(10, 6, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.last((self.left(x) + self.right(x)).relu()).mean((2, 3))


NETS = {"path": Path3, "two readers": TwoReaders, "rn8": lambda: get_model("rn8", "digits")}


def database_of(model: nn.Module, kind: str = "struct") -> Database:
    """Levels without random input channels, more of them at each."""
    generator, states = torch.Generator().manual_seed(3), {}
    order = {
        name: torch.randperm(layer.weight.shape[1], generator=generator)
        for name, layer in find_layers(model).items()
    }
    for level in LEVELS:
        state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        for name, channels in order.items():
            if name == "e":  # the four pixels of a channel together
                channels = (channels[channels < 10, None] * 4 + torch.arange(4)).flatten()
            gone = channels[: round(len(channels) * int(level) / 1e4)]
            if state[f"{name}.weight"].shape[1] > 1:
                state[f"{name}.weight"][:, gone] = 0
        states[level] = state
    return Database(kind, "net", states)


def counted_flops(model: nn.Module, shape: tuple[int, ...]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(torch.zeros(1, *shape))
    return sum(counter.get_flop_counts()["Global"].values())


@pytest.mark.parametrize("name", NETS)
def test_a_profile_costs_the_flops_of_the_network_that_is_cut(name: str) -> None:
    torch.manual_seed(0)
    model, shape = NETS[name]().eval(), (3, 16, 16) if name == "rn8" else SHAPE
    db = database_of(model)
    costs = layer_costs(db, model, shape, "flops")
    scores = {layer: dict.fromkeys(LEVELS, 0.0) for layer in db.layers}
    problem = profile_problem(db.levels, costs, scores, Path("scores"), 1.5, 100)
    assert problem.dense == counted_flops(model, shape)
    rng, seen = np.random.default_rng(1), set()
    for picks in ([2] * len(db.layers), *rng.integers(4, size=(4, len(db.layers)))):
        smaller = NETS[name]()
        db.stitch(smaller, profile := problem.profile(picks))
        smaller, _ = cut_channels(smaller.eval(), torch.randn(2, *shape))
        expected = counted_flops(smaller, shape)
        assert problem.cost(picks) == pytest.approx(expected, rel=1e-12)
        assert profile_cost(db, profile, model, shape, "flops")[1] == pytest.approx(
            expected, rel=1e-12
        )
        seen.add(expected)
    assert len(seen) > 3
    assert sum(costs.levels[x]["6000"] for x in db.layers) == pytest.approx(
        problem.cost([2] * len(db.layers))
    )


def test_only_what_can_be_cut_saves_and_readers_must_agree() -> None:
    torch.manual_seed(1)
    model = TwoReaders().eval()
    db = database_of(model)
    shares = CutShares(db, model, SHAPE)
    assert shares.scope("last") == ("last",) and set(shares.table("last")) == {1.0}  # reads a sum
    assert shares.scope("stem") == ("stem", "left", "right")
    reads = {x: db.layer(x, "6000")["weight"].flatten(2).any(2).any(0) for x in ("left", "right")}
    both = int((reads["left"] | reads["right"]).sum())
    assert both > 4 and shares.table("stem")[0, 2, 2] == both / 10
    assert shares.table("stem")[0, 0, 3] == 1.0 == shares.left("stem", {"left": "8000"})
    params = layer_costs(db, model, SHAPE, "params")
    assert params.levels["left"]["6000"] == model.left.weight.numel() * both / 10


def test_a_network_that_cannot_be_traced_saves_nothing() -> None:
    class Wild(TwoReaders):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(x.sum()) < 1e9 else x

    model = Wild().eval()
    costs = layer_costs(db := database_of(model), model, SHAPE, "flops")
    assert all(costs.levels[x]["8000"] == costs.dense[x] for x in db.layers)


def test_tables_that_would_be_too_large_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TwoReaders().eval()
    monkeypatch.setattr("obc.toolkit.cut_costs.MOST_ENTRIES", 63)
    with pytest.raises(UserError, match="levels of 3 layers.*larger --delta-sparse"):
        layer_costs(database_of(model), model, SHAPE, "flops")


def test_seconds_between_levels_follow_the_share_that_is_left(tmp_path: Path) -> None:
    shares = np.array([[1.0, 0.5], [0.5, 0.25]])
    table = seconds_table(shares, [4.0, 1.0])
    assert table[0, 0] == 4 and table[1, 1] == 1 and table[0, 1] == table[1, 0] == 2
    assert seconds_table(np.ones(3), [3.0, 9.0, 4.0]).tolist() == [4.0] * 3  # one network, noise
    model = TwoReaders().eval()
    db = database_of(model)
    path = tmp_path / "timings.txt"
    at = dict(zip(LEVELS, (0.8, 0.6, 0.5, 0.3), strict=True))
    write_scores(path, {x: {"dense": 1.0, **at} for x in db.layers})
    costs = layer_costs(db, model, SHAPE, "timingsq", path)
    assert costs.dense["stem"] == 1 and costs.levels["stem"] == pytest.approx(
        at | {"0000": 0.7, "3000": 0.7}  # the two readers ignore no channel together: one network
    )
    assert costs.levels["last"] == dict.fromkeys(LEVELS, pytest.approx(0.55))  # never cut


# -- the choice ------------------------------------------------------------------------------------


def random_problem(seed: int, layers: int, levels: int, chain: bool) -> tuple[list, list, list]:
    """Scopes, costs and errors; chain: each layer's cost depends on the next one's level, too."""
    rng = np.random.default_rng(seed)
    scopes = []
    for i in range(layers):
        others = [i + 1] if chain else rng.permutation(layers)[: rng.integers(0, 3)].tolist()
        scopes.append((i, *[x for x in others if x != i and x < layers]))
    shares = np.sort(rng.random((layers, levels)), axis=1)[:, ::-1]
    costs = []
    for scope in scopes:
        table = np.full((levels,) * len(scope), rng.lognormal())
        for axis, layer in enumerate(scope):
            table = table * shares[layer].reshape(
                [-1 if x == axis else 1 for x in range(len(scope))]
            )
        costs.append(table)
    return scopes, costs, list(np.sort(rng.random((layers, levels)), axis=1))


def brute_force(scopes: list, costs: list, errors: list, budget: float) -> float:
    least = np.inf
    for picks in itertools.product(*(range(len(e)) for e in errors)):
        cost = sum(c[tuple(picks[x] for x in s)] for c, s in zip(costs, scopes, strict=True))
        if cost <= budget:
            least = min(least, sum(e[p] for e, p in zip(errors, picks, strict=True)))
    return least


@pytest.mark.parametrize(("seed", "chain"), [(seed, seed % 2 == 0) for seed in range(12)])
def test_the_choice_is_the_best_of_all(seed: int, chain: bool) -> None:
    scopes, costs, errors = random_problem(seed, layers=6, levels=4, chain=chain)
    if seed == 3:
        errors[2][1] = np.nan
    budget = 0.5 * sum(table.flat[0] for table in costs)
    choice = joint.solve_jointly(
        scopes, costs, [np.where(np.isfinite(e), e, np.nan) for e in errors], budget
    )
    spent = sum(c[tuple(choice.levels[x] for x in s)] for c, s in zip(costs, scopes, strict=True))
    assert spent == pytest.approx(choice.cost) and spent <= budget
    assert choice.error == pytest.approx(
        sum(e[p] for e, p in zip(errors, choice.levels, strict=True))
    )
    best = brute_force(scopes, costs, [np.where(np.isfinite(e), e, np.inf) for e in errors], budget)
    assert best - 1e-12 <= choice.error <= best + max(choice.gap, 1e-12)


def test_long_chains_are_weeded_and_still_nearly_best(monkeypatch: pytest.MonkeyPatch) -> None:
    scopes, costs, errors = random_problem(5, layers=9, levels=3, chain=True)
    budget = 0.4 * sum(table.flat[0] for table in costs)
    best = brute_force(scopes, costs, errors, budget)
    monkeypatch.setattr(joint, "MOST", 40)
    options = joint.unit_options(range(9), scopes, costs, errors)
    assert len(options.costs) <= 40
    choice = joint.solve_jointly(scopes, costs, errors, budget)
    assert choice.cost <= budget and best <= choice.error <= 1.05 * best


def test_separate_layers_are_chosen_as_by_the_plain_programme() -> None:
    _, costs, errors = random_problem(7, layers=8, levels=5, chain=False)
    costs = [table.reshape(5, -1)[:, 0] for table in costs]
    budget = 0.6 * sum(c[0] for c in costs)
    scopes = [(i,) for i in range(8)]
    plain, same = (
        dp.solve(costs, errors, budget),
        joint.solve_jointly(scopes, costs, errors, budget),
    )
    assert plain.levels == same.levels and plain.cost == same.cost


def test_units_are_linked_layers() -> None:
    assert joint.units([(0, 1), (1,), (2,), (3, 5), (4,), (5, 1)]) == [[0, 1, 3, 5], [2], [4]]
    with pytest.raises(dp.NoFiniteError) as caught:
        joint.solve_jointly(
            [(0,), (1, 0)], [np.ones(2), np.ones((2, 2))], [np.ones(2), np.full(2, np.nan)], 3
        )
    assert caught.value.layer == 1
