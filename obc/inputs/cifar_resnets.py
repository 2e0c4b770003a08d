"""The ResNets for small images of He et al. 2015, "Deep residual learning for image recognition".

Section 4.2: 6n + 2 layers in three stages of widths 16, 32, 64, with shortcuts that have no
parameters ("option A": every second pixel, new channels zero). Deviation: the zero channels are
added on both sides of the old ones, as in the checkpoints that are in common use.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a parameter-free shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.new_channels = outputs - inputs

    def forward(
        self,
        x: Tensor,  # (n, inputs, s, s)
    ) -> Tensor:  # (n, outputs, s / stride, s / stride)
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        """Option A: subsample, and pad the channels with zeros on both sides."""
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            before = self.new_channels // 2
            x = F.pad(x, (0, 0, 0, 0, before, self.new_channels - before))
        return x


class CifarResNet(nn.Module):
    """The ResNet with 6n + 2 layers for small images (He et al. 2015, §4.2)."""

    def __init__(self, n: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(n, 16, 16, stride=1)
        self.layer2 = self._stage(n, 16, 32, stride=2)
        self.layer3 = self._stage(n, 32, 64, stride=2)
        self.linear = nn.Linear(64, classes)
        for layer in self.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(layer.weight)

    @staticmethod
    def _stage(n: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
        first = BasicBlock(inputs, outputs, stride)
        return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(n - 1)))

    def forward(
        self,
        x: Tensor,  # (n, 3, s, s)
    ) -> Tensor:  # (n, classes)
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(out.mean(dim=(2, 3)))
