"""Do the squared errors that the solver claims hold? Measured again, without any Hessian.

The solver claims, per image, Σ_rows (w−ŵ) H (w−ŵ)ᵀ / 2 with H = (2/N) Σ x xᵀ. Since a layer is
linear in its weights, that is the mean over the N images of

    ‖layer(x; W) − layer(x; Ŵ)‖² = ‖layer(x; W − Ŵ)‖²        summed over channels and positions

(bias left out), which is measured here by running the layer's own operation with W − Ŵ as weights
on what the layer sees in the dense model. On the calibration images both have to agree up to
rounding: where they part by more than `TOLERANCE`, the Hessian or the solver is wrong. On *fresh*
images, which H has not seen, the error shows how far the choice of weights carries over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from datautils import ImageData, ImageSet
from modelutils import evaluating
from obc.inputs.batches import Batches
from obc.solver.errors import log
from obc.toolkit.calibrate import watching

TOLERANCE = 0.05  # relative


def measured_errors(
    dense: nn.Module,
    changes: Mapping[str, Tensor],  # layer → W − Ŵ, in the shape of its weight
    batches: Batches,
    device: torch.device,
) -> dict[str, float]:
    """Mean over images of ‖layer(x; W − Ŵ)‖² for every layer, in one pass over the images."""
    sums = {name: torch.zeros((), dtype=torch.float64, device=device) for name in changes}
    layers = {name: dense.get_submodule(name) for name in changes}
    changes = {name: change.to(device) for name, change in changes.items()}
    count = 0

    def see(name: str, x: Tensor) -> None:
        change, layer = changes[name], layers[name]
        if isinstance(layer, nn.Linear):
            output = F.linear(x.to(change.dtype), change)
        else:
            output = layer._conv_forward(x.to(change.dtype), change, None)
        sums[name] += output.double().square().sum()

    layout = torch.channels_last if device.type == "cpu" else torch.contiguous_format
    with evaluating(dense), watching(layers, see):
        for images, _ in tqdm(batches, desc="checking", leave=False, disable=None):
            dense(images.to(device, memory_format=layout))
            count += len(images)
    return {name: float(total) / count for name, total in sums.items()}


def fresh_images(data: ImageData, seed: int) -> tuple[ImageData, str]:
    """The dataset with other images to calibrate on, at most as many; and which ones they are.

    Training images that were not chosen; where all were, test images.
    """
    chosen, count = set(data.calibration.chosen), len(data.calibration.chosen)
    others: ImageSet = data.calibration
    left = [index for index in range(len(others.source)) if index not in chosen]
    what = "training"
    if not left:
        others, left, what = data.test, list(data.test.chosen), "test"
    generator = torch.Generator().manual_seed(seed)
    drawn = [left[i] for i in torch.randperm(len(left), generator=generator)[:count].tolist()]
    images = replace(others, chosen=drawn)
    return replace(data, calibration=images), f"{len(drawn)} other {what} images"


def compare(name: str, claimed: float, measured: float, fresh: float) -> None:
    """A line in the log; a warning where claim and measurement part."""
    line = f"{name} checked {measured:.4g} (claimed {claimed:.4g}), fresh images {fresh:.4g}"
    if abs(measured - claimed) > TOLERANCE * max(abs(measured), abs(claimed)):
        log.warning("%s: they part by more than %g %%", line, 100 * TOLERANCE)
    else:
        log.info(line)
