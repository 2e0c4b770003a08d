"""Networks without trained weights and images without data, for timing.

The cost of a layer or a network does not depend on its weights. Names are those of the commands;
models of the user's own are not offered.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modelutils import CIFAR_BLOCKS, TORCHVISION_ALIASES, CifarResNet
from obc.inputs.vision import torchvision
from obc.solver import errors

CLASSES = 1000  # ImageNet's

BatchList = list[tuple[Tensor, Tensor]]  # images (n, 3, s, s), labels (n,)


def random_model(name: str, seed: int, device: torch.device) -> nn.Module:
    """A network with random weights (none on the device "meta"), in eval mode."""
    full = TORCHVISION_ALIASES.get(name, name)
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in CIFAR_BLOCKS and full not in known:
        raise errors.UserError(
            f"unknown model {name}; choose rn18, rn50, another of torchvision's, or rn8 … rn110"
        )
    made_on = device if device.type == "meta" else torch.device("cpu")
    with torch.random.fork_rng(devices=[]), made_on:
        torch.manual_seed(seed)
        if name in CIFAR_BLOCKS:
            model = CifarResNet(CIFAR_BLOCKS[name], CLASSES)
        else:
            model = torchvision.models.get_model(full, weights=None, num_classes=CLASSES)
    return model.to(device).eval()


def random_images(count: int, size: int, batchsize: int, seed: int) -> BatchList:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, size, size, generator=generator)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return list(zip(images.split(batchsize), labels.split(batchsize), strict=True))


def layout_of(device: torch.device) -> torch.memory_format:
    """The memory layout that the commands use for images."""
    return torch.channels_last if device.type == "cpu" else torch.contiguous_format
