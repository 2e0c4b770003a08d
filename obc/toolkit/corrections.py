"""Corrections of normalisation statistics by forward passes: batch-norm tuning, mean and deviation.

Layers are compressed one by one, and their errors shift the distributions that the norms after them
expect. Both corrections are OBC's (arXiv 2208.11580, section 6: batch-norm tuning for models with
batch norm, a mean and variance correction for others). They change norms only, so zeros and grids
of weights are preserved. Corrections by training are in `training.py`.

Batch-norm tuning. A batch norm normalises by running statistics m, v, which were collected on the
dense model and do not fit the compressed one. They are collected again: from m = 0, v = 0, with
batch statistics m_t, v_t (v_t unbiased) and momentum a = 0.1,

    m ← (1 − a) m + a m_t        v ← (1 − a) v + a v_t        t = 1 … T

Then the start has weight 0.9^T, and both are divided by 1 − 0.9^T: they are averages of the batches
alone, for any T. Deviation from OBC: it keeps a start of m = 0, v = 1, of weight 3·10⁻⁵ for
T = 100. For the many candidates of the search (`spdy.py`), `batchnorm_averages` takes plain
averages over one pass instead.

Statistics correction. For channel c of a norm's output y on one batch of images, with mean μ and
standard deviation σ, and μ°, σ° in the dense model,

    y_c ← r y_c + s        r = σ°/σ        s = μ° − r μ

which is the same norm with weight r·γ and bias r·β + s: the correction is folded into the norm, so
a saved model needs nothing else. Norms are corrected in order of execution in one forward pass:
when a norm is reached, all norms before it are corrected. A norm that is called several times is
corrected by its first call. Where σ or σ° is 0 (a constant channel), r = 1.

Batch, layer, group and instance norms are corrected, and subclasses of them. A subclass may do more
than its kind of norm does. If its output is a function of each element of y alone, such as an
activation, the moments of y are matched, as if the activation were a module of its own. This is
seen with γ = 0, where y = β: with β a column of y, the output must be the same as in that column.
Norms that do anything else are left as they are, with a line in the log.

    symbol   variable        shape               meaning
    μ, σ     mean, std       the norm's weight   per channel, over images and positions; σ biased
    γ, β     weight, bias    the norm's weight   affine parameters of a norm
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelutils import evaluating, placed
from obc.inputs.tasks import Inputs, call
from obc.solver.distributed import ALONE, World
from obc.solver.errors import UserError, log
from obc.solver.layers import first_input, forward_hooks
from obc.solver.progress import progress

BatchNorm = nn.modules.batchnorm._BatchNorm  # of 1, 2 and 3 dimensions
InstanceNorm = nn.modules.instancenorm._InstanceNorm
COMPARED_COLUMNS = 8  # of a norm's output, in which it is compared with its bias alone
MOMENTUM = 0.1
CONSTANT = 1e-6  # σ/√(μ² + σ²) below which a channel is constant: float32 has 7 digits


# -- batch-norm tuning -----------------------------------------------------------------------------


def batchnorm_tune(
    model: nn.Module,
    batches: Iterable[tuple[Inputs, Any]],  # repeated if there are fewer than nbatches
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
        others = "--statcorr" if _affine_norms(model) else "--gap or --finetune"
        raise UserError(
            "batch-norm tuning (--bnt): this model has no batch norm with running statistics; "
            f"try {others}"
        )
    model.to(device)
    before = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
    with evaluating(model), _collecting(norms, MOMENTUM):
        for images in progress("batch norm", islice(_repeated(batches), nbatches), total=nbatches):
            call(model, placed(images, device))
    for norm, (mean, var) in zip(norms, before, strict=True):
        if (count := int(norm.num_batches_tracked)) == 0:  # no image has reached it
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(var)
        else:
            norm.running_mean /= 1 - (1 - MOMENTUM) ** count
            norm.running_var /= 1 - (1 - MOMENTUM) ** count


@contextmanager
def _collecting(norms: list[nn.Module], momentum: float) -> Iterator[None]:
    """Training mode of some norms, from fresh statistics; their own momentum comes back."""
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.running_var.zero_()
            norm.momentum = momentum
            norm.training = True  # not what is in it, such as dropout
        yield
    finally:
        for norm, own in zip(norms, momenta, strict=True):
            norm.momentum = own


def _repeated(batches: Iterable[tuple[Inputs, Any]]) -> Iterator[Inputs]:
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
    batches: list[tuple[Inputs, Any]],  # of several processes, each its own
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
                call(model, placed(images, device))
            statistics.append(_statistics(norms).cpu() if several else None)
    statistics = [of_batch for of_batch in world.interleave(statistics) if of_batch is not None]
    if not statistics:
        raise UserError(
            "batch norms need batches of two images or more: "
            "pass a larger --batchsize or --nsamples, or --nobatchnorm"
        )
    average = (sum(statistics) / len(statistics)).to(device)
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


def norm_moments(model: nn.Module, images: Inputs, device: torch.device) -> dict[str, Moments]:
    """Mean and standard deviation of every norm's output, on its first call. Logs norms left out.

    This is the dense model's part of `statistics_correction`, to be shared by many models.
    """
    moments: dict[str, Moments] = {}
    seen: set[str] = set()

    def measure(name: str, norm: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        x = first_input(args, kwargs)
        if name in seen or x.numel() == 0:
            return
        seen.add(name)
        kind = type(norm).__name__
        if (affine := _affine_output(norm, x, output)) is None:
            log.warning("%s not corrected: %s does more than scale and shift", name, kind)
            return
        y, axis = affine
        if y is not output:
            log.info("%s: the moments before the activation of its %s are matched", name, kind)
        moments[name] = _moments(y, axis, norm.weight.dim())

    norms = _affine_norms(model)
    model.to(device)
    with evaluating(model), forward_hooks(norms, measure):
        call(model, placed(images, device))
    if not moments:
        raise UserError(
            "statistics correction (--statcorr): this model has no norm with a weight and a bias "
            "that can be corrected; post_proc.py --gap and --finetune do not need one"
        )
    return moments


def correct_statistics(
    model: nn.Module,
    targets: dict[str, Moments],  # by name of the norm; from the dense model, on the same images
    images: Inputs,  # one batch, not augmented
    device: torch.device,
) -> None:
    """Give every norm's output its target moments, through the norm's own weight and bias."""
    corrected: set[str] = set()

    def correct(
        name: str, norm: nn.Module, args: tuple, kwargs: dict, output: Tensor
    ) -> Tensor | None:
        x = first_input(args, kwargs)
        if name in corrected or name not in targets or x.numel() == 0:
            return None
        corrected.add(name)
        if (affine := _affine_output(norm, x, output)) is None:
            log.warning("%s not corrected: it does more than scale and shift", name)
            return None
        y, axis = affine
        _fold(norm, _moments(y, axis, norm.weight.dim()), targets[name])
        return norm.forward(*args, **kwargs)  # exactly what the corrected norm computes

    model.to(device)
    with evaluating(model), forward_hooks(_affine_norms(model), correct):
        call(model, placed(images, device))


def statistics_correction(
    model: nn.Module,
    dense: nn.Module,
    images: Inputs,  # one batch, not augmented
    device: torch.device,
) -> None:
    """Match the moments of every norm's output to the dense model's. Moves both to `device`.

    Raises:
        UserError: if the model has no norm with weight and bias that can be corrected.
    """
    correct_statistics(model, norm_moments(dense, images, device), images, device)


def _affine_norms(model: nn.Module) -> dict[str, nn.Module]:
    norms = {}
    for name, module in model.named_modules():
        if isinstance(module, (BatchNorm, nn.LayerNorm, nn.GroupNorm, InstanceNorm)):
            if module.weight is None or module.bias is None:
                log.info("%s not corrected: the norm has no weight or no bias", name)
            else:
                norms[name] = module
    return norms


def _affine_output(norm: nn.Module, x: Tensor, output: Tensor) -> tuple[Tensor, int] | None:
    """A norm's y = γ n + β before its activation, if any, and the axis of γ and β in y.

    None if the output is not a function of each element of y alone.
    """
    if (axis := _channel_axis(norm, x)) is not None:
        return output, axis
    for axis in {1, x.ndim - norm.weight.ndim} if isinstance(norm, nn.LayerNorm) else {1}:
        y = _plain_norm(norm, x, axis)
        if y is not None and output.shape == y.shape and _follows_columns(norm, x, y, output, axis):
            return y, axis
    return None


def _plain_norm(norm: nn.Module, x: Tensor, axis: int) -> Tensor | None:
    """What a norm computes that does no more than its kind of norm, in eval mode."""
    affine = norm.weight, norm.bias
    if isinstance(norm, nn.GroupNorm):
        return F.group_norm(x, norm.num_groups, *affine, norm.eps)
    if isinstance(norm, nn.LayerNorm):
        width = norm.weight.ndim
        if x.shape[axis : axis + width] != norm.weight.shape:
            return None
        axes, last = range(axis, axis + width), range(-width, 0)
        y = F.layer_norm(x.movedim(tuple(axes), tuple(last)), norm.weight.shape, *affine, norm.eps)
        return y.movedim(tuple(last), tuple(axes))
    statistics = norm.running_mean, norm.running_var
    if isinstance(norm, InstanceNorm):
        own = not norm.track_running_stats
        return F.instance_norm(x, *statistics, *affine, own, 0.0, norm.eps)
    return F.batch_norm(x, *statistics, *affine, norm.running_mean is None, 0.0, norm.eps)


@contextmanager
def _only_bias(norm: nn.Module, bias: Tensor) -> Iterator[None]:
    """Inside, the norm's weight is 0 and its bias is another one."""
    kept = norm.weight.clone(), norm.bias.clone()
    try:
        norm.weight.zero_()
        norm.bias.copy_(bias)
        yield
    finally:
        norm.weight.copy_(kept[0])
        norm.bias.copy_(kept[1])


def _follows_columns(norm: nn.Module, x: Tensor, y: Tensor, output: Tensor, axis: int) -> bool:
    """Whether the output at a position depends on y (the plain norm) at that position only.

    Tested at some positions: with weight 0 and y's channels there for a bias, the norm yields the
    same output.
    """
    width = norm.weight.ndim
    axes, last = tuple(range(axis, axis + width)), tuple(range(-width, 0))
    ours, theirs = (z.movedim(axes, last).reshape(-1, *norm.weight.shape) for z in (y, output))
    for place in torch.linspace(0, len(ours) - 1, COMPARED_COLUMNS).long().tolist():
        with _only_bias(norm, ours[place]):
            alone = norm.forward(x[:1] if x.ndim > width else x)
        after = alone.ndim - axis - width
        expected = theirs[place].reshape(*norm.weight.shape, *[1] * after).expand_as(alone)
        if not torch.allclose(alone, expected, rtol=1e-4, atol=1e-5):
            return False
    return True


def _channel_axis(norm: nn.Module, x: Tensor) -> int | None:
    """The axis of the output that the norm's weight and bias belong to (the first, if several).

    It is 1 in a batch norm and the last one in a layer norm, but subclasses permute axes
    (torchvision's LayerNorm2d): with weight 0 and a bias of different numbers the output shows the
    axis. None if the output shows something else: there is an activation after the norm.
    """
    count = torch.arange(norm.bias.numel(), dtype=norm.bias.dtype, device=x.device) + 0.5
    count = count.view_as(norm.bias)
    pictures = []
    for sign in (1, -1):
        with _only_bias(norm, sign * count):
            pictures.append(sign * norm.forward(x[:1] if x.ndim > count.ndim else x))
    for axis in range(pictures[0].ndim - count.ndim, -1, -1):
        after = pictures[0].ndim - axis - count.ndim
        expected = count.reshape(*count.shape, *[1] * after)
        if all(
            picture.shape[axis : axis + count.ndim] == count.shape
            and torch.equal(picture, expected.expand_as(picture))
            for picture in pictures
        ):
            return axis
    return None


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
