"""Corrections of normalisation statistics by forward passes: batch-norm tuning, mean and deviation.

Layers are compressed one by one, and their errors shift the distributions that the norms after them
expect. Both corrections are OBC's (arXiv 2208.11580, section 6: batch-norm tuning for models with
batch norm, a mean and variance correction for others). They change norms only, so zeros and grids
of weights are preserved. Corrections by training are in `training.py`.

Batch-norm tuning. A batch norm normalises by running statistics m, v, which were collected on the
dense model and do not fit the compressed one. They are collected again: from m = 0, v = 1, with
batch statistics m_t, v_t (v_t unbiased) and momentum a = 0.1,

    m ← (1 − a) m + a m_t        v ← (1 − a) v + a v_t        t = 1 … T

so that the start has weight 0.9^T at the end: 3·10⁻⁵ for T = 100. For the many candidates of the
search (`spdy.py`), `batchnorm_averages` takes plain averages over one pass instead.

Statistics correction. For channel c of a norm's output y on one batch of images, with mean μ and
standard deviation σ, and μ°, σ° in the dense model,

    y_c ← r y_c + s        r = σ°/σ        s = μ° − r μ

which is the same norm with weight r·γ and bias r·β + s: the correction is folded into the norm, so
a saved model needs nothing else. Norms are corrected in order of execution in one forward pass:
when a norm is reached, all norms before it are corrected. A norm that is called several times is
corrected by its first call. Where σ or σ° is 0 (a constant channel), r = 1.

    symbol   variable        shape               meaning
    μ, σ     mean, std       the norm's weight   per channel, over images and positions; σ biased
    γ, β     weight, bias    the norm's weight   affine parameters of a norm
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from modelutils import evaluating, placed
from obc.solver.distributed import ALONE, World
from obc.solver.errors import UserError, log
from obc.solver.layers import forward_hooks
from obc.solver.progress import progress

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
    """Collect the running statistics of all batch norms again. Moves the model to `device`.

    Batches of a single image are left out: maps of one pixel would have no variance.

    Raises:
        UserError: if the model has no batch norm with running statistics, or there are no batches.
    """
    norms = _running_norms(model)
    if not norms:
        raise UserError("batch-norm tuning (--bnt): this model has no batch norm; try --statcorr")
    model.to(device)
    with evaluating(model), _collecting(norms, MOMENTUM):
        for images in progress("batch norm", islice(_repeated(batches), nbatches), total=nbatches):
            model(placed(images, device))


@contextmanager
def _collecting(norms: list[nn.Module], momentum: float) -> Iterator[None]:
    """Training mode of some norms, from fresh statistics; their own momentum comes back."""
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = momentum
            norm.train()
        yield
    finally:
        for norm, own in zip(norms, momenta, strict=True):
            norm.momentum = own


def _repeated(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    """Images of the batches, over and over; `itertools.cycle` would keep them all in memory."""
    while True:
        empty = True
        for images, _ in batches:
            if len(images) > 1:
                empty = False
                yield images
        if empty:
            raise UserError("batch-norm tuning (--bnt) needs batches of two images or more")


def batchnorm_averages(
    model: nn.Module,
    batches: list[tuple[Tensor, Tensor]],  # of several processes, each its own
    device: torch.device,
    world: World = ALONE,
) -> None:
    """Replace the statistics of all batch norms by their averages over `batches`, in place.

    In training mode a norm's output does not depend on its running averages, so each of several
    processes runs its own batches, and the averages are over all batches, in their order. Batches
    of a single image are left out: maps of one pixel would have no variance.
    """
    norms = _running_norms(model)
    if not norms:
        return
    statistics = []
    with evaluating(model), _collecting(norms, 1.0):  # the statistics of the last batch alone
        for images, _ in batches:
            several = len(images) > 1
            if several:
                model(placed(images, device))
            statistics.append(_statistics(norms).cpu() if several else None)
    statistics = [of_batch for of_batch in world.interleave(statistics) if of_batch is not None]
    if not statistics:
        raise UserError(
            "batch norms need batches of two images or more: "
            "pass a larger --batchsize or --nsamples, or --nobatchnorm"
        )
    average = sum(statistics) / len(statistics)
    tensors = iter(average.split([len(norm.running_mean) for norm in norms for _ in range(2)]))
    for norm in norms:
        norm.running_mean.copy_(next(tensors))
        norm.running_var.copy_(next(tensors))


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
    """Moments of a norm's output per channel, in the shape of the norm's weight."""

    mean: Tensor
    std: Tensor


def norm_moments(model: nn.Module, images: Tensor, device: torch.device) -> dict[str, Moments]:
    """Mean and standard deviation of every norm's output, on its first call. Logs norms left out.

    This is the dense model's part of `statistics_correction`, to be shared by many models.
    """
    moments: dict[str, Moments] = {}

    def measure(name: str, norm: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        if name not in moments:
            moments[name] = _moments(output, _channel_axis(norm, args[0]), norm.weight.dim())

    norms = _affine_norms(model)
    if not norms:
        raise UserError(
            "statistics correction (--statcorr): this model has no batch norm or layer "
            "norm with weight and bias"
        )
    model.to(device)
    with evaluating(model), forward_hooks(norms, measure):
        model(placed(images, device))
    return moments


def correct_statistics(
    model: nn.Module,
    targets: dict[str, Moments],  # by name of the norm; from the dense model, on the same images
    images: Tensor,  # (n, 3, s, s) one batch, not augmented
    device: torch.device,
) -> None:
    """Give every norm's output its target moments, through the norm's own weight and bias."""
    corrected: set[str] = set()

    def correct(
        name: str, norm: nn.Module, args: tuple, kwargs: dict, output: Tensor
    ) -> Tensor | None:
        if name in corrected or name not in targets:
            return None
        corrected.add(name)
        axis = _channel_axis(norm, args[0])
        _fold(norm, _moments(output, axis, norm.weight.dim()), targets[name])
        return norm.forward(*args, **kwargs)  # exactly what the corrected norm computes

    model.to(device)
    with evaluating(model), forward_hooks(_affine_norms(model), correct):
        model(placed(images, device))


def statistics_correction(
    model: nn.Module,
    dense: nn.Module,
    images: Tensor,  # (n, 3, s, s) one batch, not augmented
    device: torch.device,
) -> None:
    """Match the moments of every norm's output to the dense model's. Moves both to `device`.

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


def _channel_axis(norm: nn.Module, x: Tensor) -> int:
    """The axis of the output that the norm's weight and bias belong to (the first, if several).

    It is 1 in a batch norm and the last one in a layer norm, but subclasses permute axes
    (torchvision's LayerNorm2d): with weight 0 and bias 0, 1, 2, … the output shows the axis.
    """
    if isinstance(norm, BatchNorm):
        return 1
    weight, bias = norm.weight.clone(), norm.bias.clone()
    count = torch.arange(norm.bias.numel(), dtype=norm.bias.dtype, device=x.device)
    count = count.view_as(norm.bias)
    try:
        norm.weight.zero_()
        norm.bias.copy_(count)
        picture = norm.forward(x[:1] if x.ndim > count.ndim else x)
    finally:
        norm.weight.copy_(weight)
        norm.bias.copy_(bias)
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
    """Moments over all axes of y except `width` axes from `axis` on."""
    others = [i for i in range(y.ndim) if not axis <= i < axis + width]
    var, mean = torch.var_mean(y, others, correction=0)
    return Moments(mean, var.sqrt())


def _fold(norm: nn.Module, current: Moments, target: Moments) -> None:
    """weight ← r γ, bias ← r β + s."""

    def varies(m: Moments) -> Tensor:
        return m.std > CONSTANT * torch.hypot(m.mean, m.std)

    r = torch.where(varies(current) & varies(target), target.std / current.std, 1.0)
    norm.weight.mul_(r)
    norm.bias.mul_(r).add_(target.mean - r * current.mean)
