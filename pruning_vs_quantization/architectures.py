"""The networks of the study by name: `<network>_quantized`.

<network> is any MODEL of the toolkit (resnet18, mobilenet_v2, rn20, path/to/file.py:function) or
efficientnet_lite, timm's efficientnet_lite0. The suffix is that of the published commands; the
network so named is the dense one, which training then compresses as it is told.
"""

from __future__ import annotations

import logging

from torch import nn

from modelutils import get_model, load_checkpoint, load_state
from obc.inputs.vision import torchvision
from obc.solver.errors import UserError
from pruning_vs_quantization.plots import study_package

SUFFIX = "_quantized"
TIMM_NAMES = {"efficientnet_lite": "efficientnet_lite0"}


def dense_network(
    architecture: str,
    dataset: str,
    weights: str | None,  # a file; None: the weights to download, or the shipped
    classes: int | None = None,  # of the dataset; None: whatever the weights have
) -> nn.Module:
    """The trained dense network, in eval mode, on the CPU. Raises UserError where there is none."""
    name = network_name(architecture)
    if name in TIMM_NAMES:
        return _timm_network(name, weights, classes)
    return get_model(name, dataset, weights, classes)


def network_name(architecture: str) -> str:
    """
    >>> network_name("resnet18_quantized")
    'resnet18'
    """
    name = architecture.removesuffix(SUFFIX)
    if not name or name == architecture:
        raise UserError(
            f"--architecture {architecture}: must be a model's name and {SUFFIX}, "
            f"as in resnet18{SUFFIX}"
        )
    return name


def _timm_network(name: str, weights: str | None, classes: int | None) -> nn.Module:
    torchvision.ops  # noqa: B018  timm imports torchvision, which must come in vision.py's way
    timm = study_package("timm")
    if weights is None:
        return _downloaded(timm, name).float().eval()
    state = load_checkpoint(weights)
    found = len(state.get("classifier.weight", ()))
    if classes not in (None, found):
        raise UserError(f"{weights}: these weights have {found} classes, the dataset has {classes}")
    model = timm.create_model(TIMM_NAMES[name], num_classes=found)
    load_state(model, state, weights)
    return model.float().eval()


def _downloaded(timm, name: str) -> nn.Module:
    hub = logging.getLogger("huggingface_hub")  # tells of each try; the last one's error is ours
    level = hub.level
    hub.setLevel(logging.CRITICAL)
    try:
        return timm.create_model(TIMM_NAMES[name], pretrained=True)
    except (OSError, RuntimeError) as error:  # no network, no such page
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{name}: its weights cannot be downloaded ({reason}); pass --weights FILE"
        ) from None
    finally:
        hub.setLevel(level)
