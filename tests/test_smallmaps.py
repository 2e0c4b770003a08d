"""Products in place of convolutions: the same maps, whatever stride, padding and layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from obc.inputs.smallmaps import PIXELS, SmallMaps, is_small, on_same_input

CONVOLUTIONS = {
    "3×3": {"kernel_size": 3, "padding": 1},
    "stride 2": {"kernel_size": 3, "padding": 1, "stride": 2},
    "no bias": {"kernel_size": 3, "padding": 1, "bias": False},
    "even kernel, same": {"kernel_size": (2, 4), "padding": "same"},
    "dilated": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "reflected": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "no padding": {"kernel_size": 2},
    "oblong": {"kernel_size": (1, 3), "padding": (0, 1), "stride": (2, 1)},
}


def images(size: tuple[int, int], layout: torch.memory_format) -> Tensor:
    x = torch.randn(5, 256, *size, generator=torch.Generator().manual_seed(0))
    return x.to(memory_format=layout)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    ("kind", "size"),
    [
        (kind, size)
        for kind in CONVOLUTIONS
        for size in [(1, 1), (2, 2), (2, 4), (3, 3), (4, 4)]
        if size > (1, 1) or kind not in ("reflected", "no padding")
    ],
)
def test_the_same_as_the_convolution(kind, size, layout):
    torch.manual_seed(1)
    conv = nn.Conv2d(256, 32, **CONVOLUTIONS[kind]).eval().requires_grad_(False)
    x = images(size, layout)
    assert is_small(conv, x)
    fast, wanted = SmallMaps(conv), conv(x)
    for _ in range(2):  # the second time from what the first has kept
        torch.testing.assert_close(fast(x), wanted, rtol=1e-5, atol=1e-5)
    call = on_same_input(conv, x)
    torch.testing.assert_close(call(), wanted, rtol=1e-5, atol=1e-5)
    conv.weight.mul_(-2)  # the input stays, the weights do not
    torch.testing.assert_close(call(), conv(x), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [1, 3, 7, 8, 37, 74, 96, 127])
def test_any_number_of_columns(count, bias):
    """Primes, too, which no number of pixels in an image divides."""
    conv = nn.Conv2d(64, 32, 3, bias=bias).requires_grad_(False)
    x = torch.randn(count, 64, 3, 3, generator=torch.Generator().manual_seed(0))
    assert is_small(conv, x)
    for y in (on_same_input(conv, x)(), SmallMaps(conv)(x)):
        torch.testing.assert_close(y, conv(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(256, 8, 3, padding=1, groups=2),
        nn.Conv2d(256, 8, 1),  # a product already
        nn.Conv2d(8, 8, 3, padding=1),  # narrow
        nn.Conv2d(256, 8, 3, padding=1).double(),
        nn.BatchNorm2d(256),
    ],
)
def test_what_stays_a_convolution(module):
    assert not is_small(module, images((4, 4), torch.channels_last))


def test_large_maps_stay_with_the_convolution():
    conv = nn.Conv2d(256, 8, 3, padding=1)
    x = images((4, PIXELS // 4 + 1), torch.channels_last)
    assert not is_small(conv, x) and not is_small(conv, "no tensor")
    assert torch.equal(SmallMaps(conv)(x), conv(x))


def test_hooks_are_called():
    conv = nn.Conv2d(256, 8, 3, padding=1).requires_grad_(False)
    x = images((2, 2), torch.channels_last)
    call, fast = on_same_input(conv, x), SmallMaps(conv)
    conv.register_forward_pre_hook(lambda module, inputs: (inputs[0].round(),))
    assert not is_small(conv, x)
    assert torch.equal(call(), conv(x)) and torch.equal(fast(x), conv(x))
    assert not torch.equal(conv(x), nn.Conv2d.forward(conv, x))
