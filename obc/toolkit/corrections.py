"""Corrections of statistics: what a compressed model's norms should know, found by forward passes.

Layers are compressed one by one, and their errors change the distributions that the norms after
them were made for. Both corrections are those of OBC (arXiv 2208.11580, section 6: batch-norm
tuning for models that have batch norm, a mean and variance correction for others); they touch
nothing but norms, so zeros and grids of weights stay. Corrections by training are in
`retraining.py`.

Batch-norm tuning. A batch norm divides by running statistics m, v of the dense model; those of the
compressed one are others. From m = 0, v = 1, with batch statistics m_t, v_t (v_t unbiased) and
momentum a = 0.1,

    m ← (1 − a) m + a m_t        v ← (1 − a) v + a v_t        t = 1 … T

so that the start has weight 0.9^T at the end: 3·10⁻⁵ for T = 100. For the many candidates of the
search (`spdy.py`), `batchnorm_averages` takes plain averages of one pass instead.

Statistics correction. For channel c of a norm's output y on one batch of images, with mean μ and
standard deviation σ there, and μ°, σ° in the dense model,

    y_c ← r y_c + s        r = σ°/σ        s = μ° − r μ

which is the norm again, with weight r·γ and bias r·β + s: it is folded there, and a saved model is
corrected as it is. Norms are corrected in order of execution in one forward pass: when a norm is
reached, all before it are corrected. A norm that is called several times is corrected by its first
call. Where σ or σ° is nothing (a constant channel), r = 1.

    symbol   variable        shape               meaning
    μ, σ     mean, std       the norm's weight   per channel, over images and positions; σ biased
    γ, β     weight, bias    the norm's weight   affine parameters of a norm
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from tqdm import tqdm

from modelutils import evaluating, placed
from obc.solver.distributed import ALONE, World
from obc.solver.errors import UserError, log
from obc.solver.layers import Call, forward_hooks

BatchNorm = nn.modules.batchnorm._BatchNorm  # of 1, 2 and 3 dimensions
MOMENTUM = 0.1
CONSTANT = 1e-6  # σ/√(μ² + σ²) below which a channel is constant: float32 has 7 digits


# -- batch-norm tuning -----------------------------------------------------------------------------


def batchnorm_tune(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],  # repeated if there are fewer than nbatches
    device: torch.device,
    nbatches: int = 100,
) -> None:
    """Collect the running statistics of all batch norms anew. Moves the model to `device`.

    A batch of a single image is left out: it has no variance where a map is one pixel.

    Raises:
        UserError: if the model has no batch norm with running statistics, or there is no batch.
    """
    norms = _running_norms(model)
    if not norms:
        raise UserError("batch-norm tuning (--bnt): this model has no batch norm; try --statcorr")
    model.to(device)
    momenta = [norm.momentum for norm in norms]
    progress = {"desc": "batch norm", "total": nbatches, "leave": False, "disable": None}
    try:
        with evaluating(model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = MOMENTUM
                norm.train()
            for images in tqdm(islice(_repeated(batches), nbatches), **progress):
                model(placed(images, device))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _repeated(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    """Images of the batches, over and over; not `itertools.cycle`, which would keep them all."""
    while True:
        found = False
        for images, _ in batches:
            if len(images) > 1:
                found = True
                yield images
        if not found:
            raise UserError("batch-norm tuning (--bnt) needs batches of two images or more")


def batchnorm_averages(
    model: nn.Module,
    batches: list[tuple[Tensor, Tensor]],  # of several processes, each its own
    device: torch.device,
    world: World = ALONE,
) -> None:
    """Replace the statistics of all batch norms by their averages over `batches`, in place.

    In training mode what a norm puts out does not depend on the averages so far. So each of several
    processes looks at its own batches, and the averages are of all, in their order. A batch of a
    single image is left out: it has no variance where a map is one pixel.
    """
    norms = _running_norms(model)
    if not norms:
        return
    momenta, found = [norm.momentum for norm in norms], []
    with evaluating(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum, norm.training = 1.0, True  # the statistics of the last batch alone
        for images, _ in batches:
            several = len(images) > 1
            if several:
                model(images.to(device))
            found.append(_statistics(norms).cpu() if several else None)
    found = [statistics for statistics in world.interleave(found) if statistics is not None]
    if not found:
        raise UserError(
            "batch norms need batches of two images or more: "
            "pass a larger --batchsize or --nsamples, or --nobatchnorm"
        )
    average = sum(found) / len(found)
    parts = iter(average.split([len(norm.running_mean) for norm in norms for _ in range(2)]))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.running_mean.copy_(next(parts))
        norm.running_var.copy_(next(parts))


def _statistics(norms: list[nn.Module]) -> Tensor:
    """Means and variances of all norms, one after the other, float64."""
    return torch.cat([x.double() for norm in norms for x in (norm.running_mean, norm.running_var)])


def _running_norms(model: nn.Module) -> list[nn.Module]:
    """Batch norms that keep statistics."""
    return [
        module
        for module in model.modules()
        if isinstance(module, BatchNorm) and module.running_mean is not None
    ]


# -- statistics correction -------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """Of a norm's output, per channel; both of the shape of the norm's weight."""

    mean: Tensor
    std: Tensor


def norm_moments(model: nn.Module, images: Tensor, device: torch.device) -> dict[str, Moments]:
    """Mean and standard deviation of every norm's output, on its first call. Logs norms left out.

    This is the dense model's part of `statistics_correction`, for those who correct many models.
    """
    found: dict[str, Moments] = {}

    def note(name: str, norm: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        if name not in found:
            found[name] = _moments(output, _channel_axis(norm, args[0]), norm.weight.dim())

    norms = _affine_norms(model)
    if not norms:
        raise UserError(
            "statistics correction (--statcorr): this model has no batch norm or layer "
            "norm with weight and bias"
        )
    _forward_with(model, norms, note, images, device)
    return found


def correct_statistics(
    model: nn.Module,
    wanted: dict[str, Moments],  # by name of the norm; from the dense model, on the same images
    images: Tensor,  # (n, 3, s, s) one batch, not augmented
    device: torch.device,
) -> None:
    """Give every norm's output the moments `wanted`, through the norm's own weight and bias."""
    done: set[str] = set()

    def correct(
        name: str, norm: nn.Module, args: tuple, kwargs: dict, output: Tensor
    ) -> Tensor | None:
        if name in done or name not in wanted:
            return None
        done.add(name)
        axis = _channel_axis(norm, args[0])
        _fold(norm, _moments(output, axis, norm.weight.dim()), wanted[name])
        return norm.forward(*args, **kwargs)  # what the corrected norm yields, to the last bit

    _forward_with(model, _affine_norms(model), correct, images, device)


def statistics_correction(
    model: nn.Module,
    dense: nn.Module,
    images: Tensor,  # (n, 3, s, s) one batch, not augmented
    device: torch.device,
) -> None:
    """Match mean and deviation of every norm output to the dense model's. Moves both to `device`.

    Raises:
        UserError: if the model has no batch norm or layer norm with weight and bias.
    """
    correct_statistics(model, norm_moments(dense, images, device), images, device)


def _affine_norms(model: nn.Module) -> dict[str, nn.Module]:
    norms = {}
    for name, module in model.named_modules():
        if isinstance(module, (BatchNorm, nn.LayerNorm)):
            if module.weight is None or module.bias is None:
                log.info("%s not corrected: the norm has no weight or no bias", name)
            else:
                norms[name] = module
    return norms


def _forward_with(
    model: nn.Module,
    norms: dict[str, nn.Module],
    see: Call,  # every call of a norm
    images: Tensor,
    device: torch.device,
) -> None:
    """One forward pass in eval mode."""
    model.to(device)
    with evaluating(model), forward_hooks(norms, see):
        model(placed(images, device))


def _channel_axis(norm: nn.Module, x: Tensor) -> int:
    """The axis of the output at which the norm's weight and bias stand (the first, if several).

    A batch norm's is 1. Layer norms have it last, but subclasses move axes about (torchvision's
    LayerNorm2d): with weight 0 and bias 0, 1, 2, … the output is a picture of the axis.
    """
    if isinstance(norm, BatchNorm):
        return 1
    kept = norm.weight.clone(), norm.bias.clone()
    count = torch.arange(norm.bias.numel(), dtype=norm.bias.dtype, device=x.device)
    count = count.view_as(norm.bias)
    try:
        norm.weight.zero_()
        norm.bias.copy_(count)
        picture = norm.forward(x[:1] if x.ndim > count.ndim else x)
    finally:
        norm.weight.copy_(kept[0])
        norm.bias.copy_(kept[1])
    for axis in range(picture.ndim - count.ndim, -1, -1):
        after = picture.ndim - axis - count.ndim
        if picture.shape[axis : axis + count.ndim] == count.shape and torch.equal(
            picture, count.reshape(*count.shape, *[1] * after).expand_as(picture)
        ):
            return axis
    raise UserError(
        f"statistics correction (--statcorr): {type(norm).__name__} is not a layer "
        "norm with a weight and a bias per channel"
    )


def _moments(y: Tensor, axis: int, width: int) -> Moments:
    """Over all axes of y but `width` ones from `axis` on."""
    others = [i for i in range(y.ndim) if not axis <= i < axis + width]
    var, mean = torch.var_mean(y, others, correction=0)
    return Moments(mean, var.sqrt())


def _fold(norm: nn.Module, now: Moments, wanted: Moments) -> None:
    """weight ← r γ, bias ← r β + s."""

    def varies(m: Moments) -> Tensor:
        return m.std > CONSTANT * torch.hypot(m.mean, m.std)

    r = torch.where(varies(now) & varies(wanted), wanted.std / now.std, 1.0)
    norm.weight.mul_(r)
    norm.bias.mul_(r).add_(wanted.mean - r * now.mean)
