"""tracing.py: a traced model gives the model's own answers, from wherever it is resumed."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelutils import evaluating
from obc.inputs.tracing import Resumable


class Tangled(nn.Module):
    """ReLUs and sums whose arguments may, and may not, be overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.conv3 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        first = self.bn1(self.conv1(x))
        corner = first[:, :, :1, :1]  # a view: what lies below must not change
        once = self.relu(first)
        twice = self.conv2(once)
        kept = twice + once  # twice lives on
        broadcast = self.conv3(corner) + kept  # of another shape than its first argument
        own = F.relu(self.conv3(broadcast)) + x.mean()
        return operator.add(own, torch.add(self.conv2(own), twice)) + corner


@pytest.mark.parametrize("inplace", [False, True])
def test_overwriting_changes_no_answer_from_any_operation(inplace: bool) -> None:
    torch.manual_seed(0)
    model = Tangled()
    model.relu = nn.ReLU(inplace=inplace)
    images = torch.randn(2, 3, 5, 5)
    with evaluating(model):
        run = Resumable(model)
        wanted = model(images)
        for start in range(1, len(run.nodes)):  # 0 is the images
            values = run.images(images)
            run.advance(values, 0, start)
            put_back = run.kept(values)
            for _ in range(2):  # the values at `start` serve every level
                answer = run.finish(dict(values), start)
                torch.testing.assert_close(answer, wanted, rtol=1e-5, atol=1e-5)
                put_back()


def test_only_what_nobody_else_sees_is_overwritten() -> None:
    run = Resumable(Tangled().eval())
    names = {str(node.args[0]) for node in run.overwriting}
    assert "conv2" not in names and "bn1" not in names  # both have other users
    assert {"conv3", "conv3_1", "conv2_1"} <= names
