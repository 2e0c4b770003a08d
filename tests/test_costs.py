"""Costs per layer against torch's own flop counter, and against the definitions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from obc.inputs.vision import torchvision
from obc.solver.errors import UserError
from obc.toolkit.costs import layer_costs, layer_flops
from obc.toolkit.kinds import share_left
from obc.toolkit.leveldb import Database
from quant import fit_activation_grid, fit_weight_grid, set_activation_grid, set_weight_grid

COUNTED = [
    name
    for name in torchvision.models.list_models(module=torchvision.models)
    if name.startswith(("resnet", "wide_resnet", "resnext"))
] + ["mobilenet_v2", "convnext_tiny"]


@pytest.mark.parametrize("name", COUNTED)
def test_flops_are_those_of_the_flop_counter(name: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None).eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 224, 224, device="meta"))
    counted = counter.get_flop_counts()["Global"]
    wanted = sum(n for op, n in counted.items() if "conv" in str(op) or "mm" in str(op))
    assert sum(layer_flops(model, (3, 224, 224)).values()) == wanted > 1e8


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2, dilation=1)
        self.linear = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.conv(x).mean((2, 3)))


def database_of(*levels: tuple[str, int, int, float]) -> tuple[Net, Database]:
    """Levels (name, weight bits, activation bits, share of the convolution's weights pruned)."""
    states = {}
    for name, wbits, abits, pruned in levels:
        torch.manual_seed(0)
        net = Net()
        net.conv.weight.data[:, : int(pruned * 4)] = 0  # of 4 input channels
        for layer in (net.conv, net.linear):
            if wbits < 32:
                flat = layer.weight.detach().flatten(1)
                set_weight_grid(layer, fit_weight_grid(flat, wbits))
                layer.weight.data = layer.weight_quant(flat).view_as(layer.weight)
            if abits < 32:
                set_activation_grid(layer, fit_activation_grid(torch.randn(50), abits))
        states[name] = net.state_dict()
    return Net(), Database("mixed", "net", states)


def test_costs_are_the_definitions() -> None:
    net, db = database_of(
        ("8w8a", 8, 8, 0), ("4w4a", 4, 4, 0), ("24_4w4a", 4, 4, 0.5), ("3w32a", 3, 32, 0)
    )
    flops = {"conv": 2 * 8 * 4 * 4 * 36, "linear": 2 * 5 * 8}  # an 8×8 image becomes 4×4
    params = {"conv": 8 * 36, "linear": 5 * 8}
    shape = (8, 8, 8)
    assert layer_flops(net, shape) == flops
    for constr, dense in (("flops", flops), ("params", params)):
        costs = layer_costs(db, net, shape, constr)
        assert costs.dense == dense
        assert costs.levels["conv"] == {
            "8w8a": dense["conv"],
            "4w4a": dense["conv"],
            "24_4w4a": dense["conv"] / 2,
            "3w32a": dense["conv"],
        }
    bops = layer_costs(db, net, shape, "bops")
    assert bops.dense["conv"] == 32 * flops["conv"]
    assert [bops.dense["conv"] / bops.levels["conv"][lv] for lv in db.levels] == [1, 4, 8, 16]
    assert [bops.dense["linear"] / bops.levels["linear"][lv] for lv in db.levels] == [1, 4, 8, 8]
    bits = layer_costs(db, net, shape, "bits")
    assert bits.dense["conv"] == 32 * params["conv"]
    assert bits.levels["conv"] == {
        "8w8a": 8 * 288,
        "4w4a": 4 * 288,
        "24_4w4a": 2 * 288,
        "3w32a": 3 * 288,
    }


def test_timings_come_from_a_file(tmp_path: Path) -> None:
    net, db = database_of(("8w8a", 8, 8, 0), ("4w4a", 4, 4, 0))
    path = tmp_path / "timings.txt"
    path.write_text("conv\n4e-3 dense\n2e-3 8w8a\n1e-3 4w4a\nlinear\n3 dense\n2 8w8a\n1 4w4a\n")
    costs = layer_costs(db, net, (4, 8, 8), "timingsq", path)
    assert costs.dense == {"conv": 4e-3, "linear": 3.0}
    assert costs.levels["conv"] == {"8w8a": 2e-3, "4w4a": 1e-3}
    path.write_text("conv\n4e-3 dense\n2e-3 8w8a\n")
    with pytest.raises(UserError, match="no seconds of conv at level 4w4a"):
        layer_costs(db, net, (4, 8, 8), "timingsq", path)
    with pytest.raises(UserError, match="needs measured seconds"):
        layer_costs(db, net, (4, 8, 8), "timingsq", tmp_path / "none.txt")


def test_zeros_of_rounding_are_not_pruning() -> None:
    _, db = database_of(("2w2a", 2, 2, 0), ("24_2w2a", 2, 2, 0.5), ("3w3a", 3, 3, 0))
    rounded = db.layer("conv", "2w2a")["weight"]
    assert 0.2 < float((rounded == 0).float().mean()) < 0.9
    shares = [share_left(db.layer("conv", level)["weight"], "mixed") for level in db.states]
    assert shares == [1.0, 0.5, 1.0]
    blocks = torch.randn(3, 8, 3, 3)
    blocks[0, :4] = 0  # 9 of 54 blocks of 4 input channels
    blocks[1, 0] = 0  # by rounding
    assert share_left(blocks, "4block_8w8a") == 45 / 54
    assert share_left(blocks) == (180 - 9) / 216
    for left_dense in (torch.zeros(3, 3, 3, 3), torch.zeros(3, 6, 2, 2), torch.zeros(3, 2, 6)):
        assert share_left(left_dense, "mixed") == share_left(left_dense, "4block_8w8a") == 1.0


def test_a_single_group_with_one_zero_is_not_2_4() -> None:
    weight = torch.ones(3, 8, 3, 3)
    weight[:, ::2] = 0
    assert share_left(weight, "mixed") == 0.5
    weight[1, 4, 2, 0] = 1
    assert share_left(weight, "mixed") == 1.0
