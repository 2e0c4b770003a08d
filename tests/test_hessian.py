"""The layer-wise Hessian against columns unfolded one by one, and its damped inverse.

`conv_columns_oracle` and `hessian_oracle` are numpy loops in float64 (tests/oracles.py).
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Array, conv_columns_oracle, hessian_oracle
from torch import Tensor, nn

from obc.solver import hessian
from obc.solver.errors import SingularHessian
from obc.solver.hessian import Gram
from obc.solver.inverse import DAMPING_LADDER, damped_inverse, rank_deficit, without

TOLERANCE = 1e-9

# kernel, stride, padding, dilation
SHAPES = [
    ((1, 1), (1, 1), (0, 0), (1, 1)),
    ((1, 1), (2, 3), (1, 0), (1, 1)),
    ((3, 3), (1, 1), (1, 1), (1, 1)),
    ((3, 3), (2, 2), (1, 1), (1, 1)),
    ((2, 3), (1, 2), (0, 2), (2, 1)),
    ((4, 2), (1, 1), "same", (1, 1)),
    ((3, 2), (1, 1), "same", (2, 3)),
    ((3, 1), (3, 1), "valid", (1, 2)),
    ((1, 5), (1, 1), (0, 2), (1, 1)),
    ((5, 1), (2, 1), (2, 0), (1, 1)),
    ((3, 3), (3, 3), (2, 2), (2, 2)),
    ((7, 7), (1, 1), (3, 3), (1, 1)),  # windows as high as the image: nothing shared
    ((7, 3), (2, 1), (3, 1), (1, 1)),
    ((4, 3), (3, 1), (3, 1), (2, 1)),  # several phases of the stride
]
MODES = ("zeros", "reflect", "replicate", "circular")


def inputs(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def oracle_gram(layer: nn.Conv2d, x: Tensor) -> Array:  # (G, d, d)
    shape = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    columns = conv_columns_oracle(x.double().numpy(), *shape, layer.groups, layer.padding_mode)
    return np.stack([hessian_oracle(c, 2) for c in columns])  # 2/N is 1 for N = 2


def gram_of(layer: nn.Module, *batches: Tensor) -> Tensor:
    gram = Gram(layer)
    for batch in batches:
        gram.add(batch)
    return gram.matrix()


def assert_close(ours: Tensor, oracle: Array, tolerance: float = TOLERANCE) -> None:
    """Within `tolerance` of the largest entry."""
    np.testing.assert_allclose(ours, oracle, rtol=0, atol=tolerance * np.abs(oracle).max())


# ------------------------------------------------------------------------------- the convolutions


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), SHAPES)
def test_convolution_is_the_oracle(kernel, stride, padding, dilation, mode, groups) -> None:
    layer = nn.Conv2d(4, 4, kernel, stride, padding, dilation, groups, padding_mode=mode)
    x = inputs(3, 4, 8, 9)
    wanted = oracle_gram(layer, x)
    assert_close(gram_of(layer, x), wanted)
    assert_close(gram_of(layer, x[:1], x[1:]), wanted)


def test_columns_stand_as_the_weights_do() -> None:
    """Columns times weights is what the layer computes: the oracle's own order is right too."""
    layer = nn.Conv2d(6, 4, (3, 2), (2, 1), (1, 2), (1, 2), 2, bias=False, padding_mode="circular")
    layer.double()
    x = inputs(2, 6, 7, 8)
    columns = conv_columns_oracle(x.numpy(), (3, 2), (2, 1), (1, 2), (1, 2), 2, "circular")
    W = layer.weight.detach().flatten(1).numpy()
    out = np.concatenate([W[:2] @ columns[0], W[2:] @ columns[1]])
    wanted = layer(x).detach().transpose(0, 1).flatten(1).numpy()
    np.testing.assert_allclose(out, wanted, rtol=TOLERANCE, atol=TOLERANCE)


def test_depthwise_convolution() -> None:
    layer = nn.Conv2d(6, 12, 3, padding="same", groups=6)
    x = inputs(2, 6, 5, 5)
    assert_close(gram_of(layer, x), oracle_gram(layer, x))


@pytest.mark.parametrize("chunk_bytes", [1, 5_000, 20_000])
def test_chunks_change_nothing(chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    conv, linear = nn.Conv2d(4, 2, 3, 2, padding=1, groups=2), nn.Linear(6, 3)
    x, z = inputs(7, 4, 6, 6), inputs(50, 3, 6)
    wanted = gram_of(conv, x), gram_of(linear, z)
    monkeypatch.setattr(hessian, "CHUNK_BYTES", chunk_bytes)
    assert_close(gram_of(conv, x), wanted[0].numpy(), 1e-13)
    assert_close(gram_of(linear, z), wanted[1].numpy(), 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_precision_of_the_inputs(dtype: torch.dtype) -> None:
    """Float16 products are taken in float32: no overflow, no loss beyond the inputs' own."""
    conv, linear = nn.Conv2d(8, 2, 3, padding=1), nn.Linear(24, 3)
    x, z = (300 * inputs(8, 8, 9, 9)).to(dtype), (300 * inputs(400, 24)).to(dtype)
    gram = gram_of(conv, x)
    assert gram.dtype == torch.float64
    assert_close(gram, oracle_gram(conv, x), 1e-5)
    assert_close(gram_of(linear, z)[0], z.double().T.numpy() @ z.double().numpy(), 1e-5)


def test_layout_of_the_inputs_does_not_matter() -> None:
    layer = nn.Conv2d(4, 2, 3, padding=1, groups=2)
    x = inputs(3, 4, 6, 7)
    wanted = gram_of(layer, x)
    assert_close(gram_of(layer, x.to(memory_format=torch.channels_last)), wanted.numpy())
    assert_close(gram_of(layer, x.transpose(2, 3).contiguous().transpose(2, 3)), wanted.numpy())


@pytest.mark.parametrize("padding", [(0, 0), (2, 1)])
def test_inputs_are_not_changed(padding: tuple[int, int]) -> None:
    layer, x = nn.Conv2d(4, 2, 3, padding=padding), inputs(3, 4, 6, 7)
    before = x.clone()
    gram = Gram(layer)
    gram.add(x)
    first = gram.matrix()
    gram.matrix().zero_()  # a copy
    assert torch.equal(x, before) and torch.equal(first, gram.matrix())


def test_matrix_is_symmetric_to_the_last_bit() -> None:
    H = gram_of(nn.Conv2d(4, 2, 3, padding=1), inputs(3, 4, 6, 7))
    assert torch.equal(H, H.transpose(1, 2))


def test_hook_in_inference_mode() -> None:
    layer, x = nn.Conv2d(3, 2, 3), inputs(2, 3, 5, 5)
    layer.double()
    gram = Gram(layer)
    layer.register_forward_hook(lambda module, args, out: gram.add(args[0]))
    with torch.inference_mode():
        layer(x[:1])
    layer(x[1:])
    assert_close(gram.matrix(), oracle_gram(layer, x))


# ----------------------------------------------------------------------------------- linear layers


@pytest.mark.parametrize("leading", [(20,), (5, 4), (2, 5, 2), (20, 1)])
def test_linear_with_leading_dimensions(leading: tuple[int, ...]) -> None:
    x = inputs(20, 7).view(*leading, 7)
    columns = x.reshape(-1, 7).T.numpy()
    assert_close(gram_of(nn.Linear(7, 3), x)[0], hessian_oracle(columns, 2))


# ---------------------------------------------------------------------------------- any convolution


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Conv2d, tuple[int, ...]]:
    pairs = {
        name: draw(st.tuples(st.integers(low, high), st.integers(low, high)))
        for name, low, high in [("kernel", 1, 5), ("dilation", 1, 3), ("stride", 1, 4)]
    }
    padding = draw(st.sampled_from(["same", "valid", (0, 0), (1, 2), (2, 1), (3, 3)]))
    if padding == "same":
        pairs["stride"] = (1, 1)
    mode, groups = draw(st.sampled_from(MODES)), draw(st.integers(1, 3))
    reach = zip(pairs["dilation"], pairs["kernel"], strict=True)
    size = [max(4, d * (k - 1) + 1) + draw(st.integers(0, 4)) for d, k in reach]
    channels = groups * draw(st.integers(1, 2))
    layer = nn.Conv2d(
        channels,
        groups,
        pairs["kernel"],
        pairs["stride"],
        padding,
        pairs["dilation"],
        groups,
        padding_mode=mode,
    )
    return layer, (draw(st.integers(1, 3)), channels, *size)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(convolutions())
def test_property_any_convolution_is_the_oracle(drawn: tuple[nn.Conv2d, tuple[int, ...]]) -> None:
    layer, shape = drawn
    x = inputs(*shape)
    assert_close(gram_of(layer, x), oracle_gram(layer, x))


# ----------------------------------------------------------------------------------- the inverse


def rank(d: int, r: int, seed: int = 0) -> Tensor:  # (1, d, d) of rank r
    x = inputs(r, d, seed=seed)
    return (x.T @ x)[None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_positive_definite_needs_no_damping(dtype: torch.dtype) -> None:
    H = torch.cat([rank(20, 80, seed) for seed in (0, 1, 2)])
    before = H.clone()
    inverse = damped_inverse(H, dtype=dtype)
    assert torch.equal(H, before)
    assert inverse.matrix.dtype == inverse.floor.dtype == dtype
    assert not inverse.damping.any() and not inverse.deficit.any()
    tolerance = TOLERANCE if dtype == torch.float64 else 1e-6
    assert_close(inverse.matrix, np.linalg.inv(H.numpy()), tolerance)
    np.testing.assert_allclose(inverse.floor, 1 / H.diagonal(dim1=1, dim2=2), rtol=1e-6)
    assert (inverse.matrix.diagonal(dim1=1, dim2=2) >= inverse.floor * (1 - 1e-6)).all()


def test_rel_damp_is_added_in_any_case() -> None:
    H = rank(20, 80)
    inverse = damped_inverse(H, rel_damp=0.1, dtype=torch.float64)
    damped = H[0].numpy() + 0.1 * np.diag(H[0]).mean() * np.eye(20)
    assert_close(inverse.matrix[0], np.linalg.inv(damped))
    assert inverse.damping.tolist() == [0.1] and inverse.deficit.tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("r", [1, 5, 19])
def test_ladder_takes_the_smallest_step_that_works(dtype: torch.dtype, r: int) -> None:
    H = rank(20, r)
    inverse = damped_inverse(H, dtype=dtype)
    step = float(inverse.damping)
    assert step in DAMPING_LADDER and inverse.deficit.tolist() == [20 - r]
    mean = np.diag(H[0]).mean()

    def works(damping: float) -> bool:  # the definition in the docstring, by numpy
        trial = H[0].numpy() + damping * mean * np.eye(20)
        if np.linalg.eigvalsh(trial).min() <= 0:
            return False
        shrink = np.diag(trial) * np.diag(np.linalg.inv(trial))
        return shrink.max() < 1e-2 / torch.finfo(dtype).eps

    assert works(step)
    assert not any(works(smaller) for smaller in DAMPING_LADDER if smaller < step)
    wanted = np.linalg.inv(H[0].numpy() + step * mean * np.eye(20))
    assert_close(inverse.matrix[0], wanted, 1e-6)


@pytest.mark.parametrize("rel_damp", [0.0, 1e-15, 1e-8, 1e-6])
@pytest.mark.parametrize("seed", range(8))
def test_damping_is_the_smallest_of_the_ladder_that_works(seed: int, rel_damp: float) -> None:
    """Also where inputs differ in size, and where sums in float32 are not quite semidefinite."""
    generator = torch.Generator().manual_seed(seed)
    for d, size in ((2, 1), (4, 1), (24, 4), (150, 1)):
        x = inputs(max(1, d * 2 // 3), d, seed=seed)
        x = (x * 10 ** (size * torch.rand(d, generator=generator, dtype=x.dtype))).float()
        for H in ((x.T @ x).double(), x.double().T @ x.double()):
            H = (H + H.T) / 2
            assert float(damped_inverse(H[None], rel_damp).damping) == smallest(H, rel_damp)


def smallest(H: Tensor, rel_damp: float) -> float:
    """Damping, by trying every step in turn."""
    limit = 1e-2 / torch.finfo(torch.float32).eps
    for step in (0.0, *DAMPING_LADDER):
        trial = H + (rel_damp + step) * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
        factor, info = torch.linalg.cholesky_ex(trial)
        if info == 0:
            shrink = trial.diagonal() * torch.cholesky_inverse(factor).diagonal()
            if float(shrink.max()) < limit:
                return rel_damp + step
    raise AssertionError("no step of the ladder works")


@pytest.mark.parametrize("spread", [0, 3, 6, 9])
def test_rank_deficit_is_the_number_of_small_eigenvalues(spread: int) -> None:
    """Also where 2×2 pivots come up, and where eigenvalues are close to the limit."""
    generator = torch.Generator().manual_seed(spread)
    for d in (1, 2, 7, 40):
        basis, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
        values = 10 ** (-spread * torch.rand(d, generator=generator, dtype=torch.float64))
        values[d // 2 :: 3] = 0
        H = (basis * values) @ basis.T
        small = torch.linalg.eigvalsh(H) < 1e-7 * torch.linalg.matrix_norm(H)
        assert rank_deficit((H + H.T) / 2) == int(small.sum())


def test_only_the_groups_that_need_it_are_damped() -> None:
    H = torch.cat([rank(12, 40), rank(12, 5), rank(12, 40, 1)])
    inverse = damped_inverse(H, dtype=torch.float64)
    assert inverse.damping.tolist() == [0, 1e-8, 0] and inverse.deficit.tolist() == [0, 7, 0]
    assert_close(inverse.matrix[[0, 2]], np.linalg.inv(H[[0, 2]].numpy()))


@pytest.mark.parametrize("r", [60, 6])
def test_dead_inputs_are_decoupled(r: int) -> None:
    x = inputs(r, 12)
    x[:, [3, 7]] = 0
    H = (x.T @ x)[None]
    inverse = damped_inverse(H, dtype=torch.float64)
    alive = [i for i in range(12) if i not in (3, 7)]
    assert inverse.deficit.tolist() == [max(0, 10 - r)]
    assert (inverse.damping == 0).tolist() == [r == 60]
    for p in (3, 7):
        assert not inverse.matrix[0, p, alive].any() and inverse.matrix[0, p, p] > 0
    assert torch.isfinite(inverse.matrix).all()
    if r == 60:
        wanted = np.linalg.inv(H[0].numpy()[np.ix_(alive, alive)])
        assert_close(inverse.matrix[0][alive][:, alive], wanted)


def test_all_inputs_dead() -> None:
    inverse = damped_inverse(torch.zeros(1, 4, 4, dtype=torch.float64))
    assert torch.equal(inverse.matrix[0], torch.eye(4)) and not inverse.damping.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [(2, 2), (1, 3), (0, 0)])
def test_no_inverse_of_nan_or_infinity(bad: float, place: tuple[int, int]) -> None:
    H = rank(6, 20)
    H[0][place] = H[0][place[::-1]] = bad
    with pytest.raises(SingularHessian, match="NaN or infinity"):
        damped_inverse(H)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scale_of_the_hessian_does_not_matter(scale: float) -> None:
    for r in (5, 40):
        H = rank(12, r)
        plain, scaled = damped_inverse(H), damped_inverse(H * scale)
        assert torch.equal(plain.damping, scaled.damping)
        assert_close(scaled.matrix * scale, plain.matrix.numpy(), 1e-5)


def test_without_decouples_absent_weights_of_each_row() -> None:
    H = rank(5, 9)[0]
    zero = torch.tensor([[0, 1, 0, 0, 1], [0, 0, 0, 0, 0]]).bool()
    first, second = without(H.expand(2, -1, -1), zero)
    assert torch.equal(second, H)
    for i, j in itertools.product(range(5), repeat=2):
        coupled = i == j or not (zero[0, i] or zero[0, j])
        assert float(first[i, j]) == (float(H[i, j]) if coupled else 0)


def test_products_that_are_not_symmetric_yield_a_symmetric_matrix() -> None:
    """As MKL's are, where it promises bits that do not depend on addresses."""
    for layer, size in ((nn.Linear(7, 2), 7), (nn.Conv2d(2, 2, 3), 18)):
        gram = Gram(layer)
        gram.sums().copy_(torch.randn(1, size, size))
        H = gram.matrix()
        assert torch.equal(H, H.mT) and not torch.equal(H, torch.zeros_like(H))


def test_patches_are_counted_over_batches_and_shards():
    """A 3×3 convolution with stride 2 and no padding has 2·3 windows in 5×7 pixels."""
    gram = Gram(nn.Conv2d(4, 4, 3, stride=2, groups=2))
    for images in (2, 3):
        gram.add(torch.randn(images, 4, 5, 7))
    assert gram.patches == 5 * 6
    gram.end_shard()
    gram.add(torch.randn(1, 4, 5, 7))
    assert gram.patches == 6
    gram.end_shard()
    gram.all_shards()
    assert gram.patches == 6 * 6
    linear = Gram(nn.Linear(8, 2))
    linear.add(torch.randn(5, 3, 8))  # three tokens an image
    assert linear.patches == 15
