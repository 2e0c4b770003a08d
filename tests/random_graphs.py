"""Random small networks that reuse layers and memory, and what the toolkit must say of each.

A network is a list of steps on feature maps (n, 4, s, s), every one of which may be read, viewed or
overwritten by later ones: shared and repeated layers, calls by keyword, residual sums, in-place
activations, assignments to slices, `out=`, layers that are never called or see no image. The right
answers come from the plain model:

    evaluation          mean_loss = cross-entropy of the plain outputs; the images stay as they were
    losses              those of the model with one layer stitched, run as a whole
    squared errors      of each layer on copies of the inputs that it has in the plain model
    first and last      the first and the last call that a hook sees
    registration        in another order: exactly the same losses, the same first and last
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modelutils import evaluating, first_and_last
from obc.inputs.tracing import TracedModel, resumable
from obc.toolkit.evaluation import mean_loss
from obc.toolkit.leveldb import Database
from obc.toolkit.sensitivity import losses, squared_errors
from quant import fit_activation_grid, set_activation_grid

CPU = torch.device("cpu")
CHANNELS, CLASSES, IMAGES = 4, 3, 5
LEVELS = ("0000", "5000", "7500")  # dense; pruned; pruned, with inputs of 5 bits
Random = np.random.Generator


# -- steps: the network, its feature maps, the numbers of two of them, a layer ---------------------


def overwrite_slice(net: nn.Module, maps: list, i: int, j: int, layer: str) -> None:
    maps[i][:, 0] = maps[j][:, 1]


def overwrite_with_index_put(net: nn.Module, maps: list, i: int, j: int, layer: str) -> None:
    maps[i].index_put_((torch.tensor([0, 2]),), maps[j][:2].clone())


def add_in_place(net: nn.Module, maps: list, i: int, j: int, layer: str) -> None:
    maps[i] += maps[j]


def scale_view(net: nn.Module, maps: list, i: int, j: int, layer: str) -> None:
    maps[i][:, :2].mul_(-0.5)


def halve_in_pieces(net: nn.Module, maps: list, i: int, j: int, layer: str) -> None:
    first, second = maps[i].chunk(2, dim=1)
    first.add_(second, alpha=0.5)


def call_without_images(net: nn.Module, maps: list, i: int, j: int, layer: str) -> None:
    getattr(net, layer)(maps[i][:0])


def add_out(net: nn.Module, maps: list, i: int, j: int, layer: str) -> None:
    torch.add(maps[i], maps[j], alpha=0.5, out=maps[i])


def weight_by_itself(net: nn.Module, maps: list, i: int, j: int, layer: str) -> Tensor:
    conv = getattr(net, layer)
    return F.conv2d(maps[i], conv.weight, None, padding=conv.padding, groups=conv.groups)


STEPS: dict[str, Callable[[nn.Module, list, int, int, str], Tensor | None]] = {
    "conv": lambda net, maps, i, j, layer: getattr(net, layer)(maps[i]),
    "conv by keyword": lambda net, maps, i, j, layer: getattr(net, layer)(input=maps[i]),
    "conv, norm": lambda net, maps, i, j, layer: net.norm0(getattr(net, layer)(maps[i])),
    "conv, norm by keyword": lambda net, maps, i, j, layer: net.norm1(
        input=getattr(net, layer)(maps[i])
    ),
    "conv, norm, relu": lambda net, maps, i, j, layer: net.relu(
        net.norm2(getattr(net, layer)(maps[i]))
    ),
    "conv, relu": lambda net, maps, i, j, layer: net.relu(getattr(net, layer)(maps[i])),
    "norm": lambda net, maps, i, j, layer: net.norm1(maps[i]),
    "relu": lambda net, maps, i, j, layer: net.relu(maps[i]),
    "leaky relu in place": lambda net, maps, i, j, layer: F.leaky_relu(maps[i], 0.3, True),
    "hardtanh in place": lambda net, maps, i, j, layer: F.hardtanh_(maps[i], -2, 2),
    "clamp in place": lambda net, maps, i, j, layer: maps[i].clamp_(min=-1.5),
    "sum": lambda net, maps, i, j, layer: maps[i] + maps[j],
    "residual": lambda net, maps, i, j, layer: maps[i] + getattr(net, layer)(maps[i]),
    "product": lambda net, maps, i, j, layer: maps[i] * maps[j].sigmoid(),
    "alias": lambda net, maps, i, j, layer: net.nothing(maps[i]),
    "view": lambda net, maps, i, j, layer: maps[i].transpose(2, 3),
    "permuted": lambda net, maps, i, j, layer: torch.cat([maps[i][:, 2:], maps[j][:, :2]], dim=1),
    "add in place": add_in_place,
    "slice": overwrite_slice,
    "index_put_": overwrite_with_index_put,
    "scaled view": scale_view,
    "pieces": halve_in_pieces,
    "out=": add_out,
    "no images": call_without_images,
    "weight by itself": weight_by_itself,
}


class RandomNet(nn.Module):
    """Steps, then a mean over positions and one or two linear layers."""

    def __init__(self, modules: dict[str, nn.Module], steps: list[tuple], options: dict) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.steps, self.options = steps, options

    def forward(self, x: Tensor) -> Tensor:
        if self.options["images in place"]:
            x.sub_(0.3).mul_(1.5)
        maps = [self.stem(x)]
        for step, i, j, layer in self.steps:
            made = STEPS[step](self, maps, i % len(maps), j % len(maps), layer)
            if made is not None:
                maps.append(made)
        features = maps[-1].mean((2, 3))
        for _ in range(self.options["mixings"]):  # one layer, several times
            features = self.relu(self.mix(features))
            features += 0.1
        return self.head(features) + self.side(maps[len(maps) // 2].amax((2, 3)))


def runnable_net(rng: Random) -> RandomNet:
    """A random network that PyTorch runs: it refuses to add a transpose to its map in place."""
    while True:
        net = random_net(rng)
        try:
            plain_loss(net, torch.zeros(IMAGES, 3, 6, 6), torch.zeros(IMAGES, dtype=torch.int64))
            return net
        except RuntimeError:
            continue


def random_net(rng: Random) -> RandomNet:
    """Layers with random values, in a random order of registration."""
    torch.manual_seed(int(rng.integers(2**31)))
    modules: dict[str, nn.Module] = {"stem": nn.Conv2d(3, CHANNELS, 3, padding=1)}
    for number in range(3):
        groups, size = int(rng.choice([1, 1, 2, CHANNELS])), int(rng.choice([1, 3]))
        conv = nn.Conv2d(CHANNELS, CHANNELS, size, 1, size // 2, 1, groups, bool(rng.integers(2)))
        modules[f"conv{number}"] = conv
        norm = modules[f"norm{number}"] = nn.BatchNorm2d(CHANNELS)
        norm.running_var.uniform_(0.5, 2)
        for tensor in (norm.running_mean, norm.weight.data, norm.bias.data):
            tensor.normal_()
    modules |= {
        "relu": nn.ReLU(inplace=bool(rng.integers(4))),
        "nothing": nn.Dropout() if rng.integers(2) else nn.Identity(),
        "mix": nn.Linear(CHANNELS, CHANNELS),
        "head": nn.Linear(CHANNELS, CLASSES),
        "side": nn.Linear(CHANNELS, CLASSES, bias=False),
        "unused": nn.Linear(CHANNELS, CLASSES),
    }
    names = list(STEPS)
    steps = [
        (
            names[rng.integers(len(names))],
            int(rng.integers(99)),
            int(rng.integers(99)),
            f"conv{rng.integers(3)}",
        )
        for _ in range(rng.integers(3, 12))
    ]
    options = {"images in place": not rng.integers(4), "mixings": int(rng.integers(3))}
    net = RandomNet(dict(shuffled(list(modules.items()), rng)), steps, options).eval()
    if not rng.integers(20):  # a trace does not see it
        net.register_forward_hook(lambda net, args, output: output * torch.tensor([2.0, 1.0, 0.5]))
    return net


def shuffled(items: list, rng: Random) -> list:
    return [items[index] for index in rng.permutation(len(items))]


def registered_anew(net: RandomNet, rng: Random) -> RandomNet:
    """The same network, its layers registered in another order."""
    other = copy.deepcopy(net)
    other._modules = dict(shuffled(list(other._modules.items()), rng))
    return other


def random_levels(net: nn.Module, rng: Random) -> Database:
    states = {}
    for level in LEVELS:
        compressed = copy.deepcopy(net)
        for layer in compressed.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear) and level != LEVELS[0]:
                weight = layer.weight.data.view(-1)
                weight[torch.from_numpy(rng.random(len(weight))) < int(level) / 1e4] = 0
                if level == LEVELS[-1]:
                    set_activation_grid(
                        layer, fit_activation_grid(torch.randn(99), 5, search=False)
                    )
        states[level] = compressed.state_dict()
    return Database("unstr", "net", states)


# -- the right answers -----------------------------------------------------------------------------


def plain_loss(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(net(images.clone()).double(), labels))


def layer_calls(net: nn.Module, names: list[str], images: Tensor) -> list[tuple[str, tuple, dict]]:
    """Name, inputs and output, copied, of every call of a layer in the plain model."""
    calls: list = []

    def before(name: str, args: tuple, kwargs: dict) -> None:
        calls.append([name, copy.deepcopy(args), copy.deepcopy(kwargs)])

    handles = [
        net.get_submodule(name).register_forward_pre_hook(
            lambda layer, args, kwargs, name=name: before(name, args, kwargs), with_kwargs=True
        )
        for name in names
    ]
    with torch.no_grad():
        net(images.clone())
    for handle in handles:
        handle.remove()
    return [tuple(call) for call in calls]


def plain_squares(net: nn.Module, db: Database, images: Tensor) -> dict[str, dict[str, float]]:
    calls, squares, stitched = layer_calls(net, db.layers, images), {}, copy.deepcopy(net)
    for name in db.layers:
        inputs = [(args, kwargs) for called, args, kwargs in calls if called == name]
        layer, squares[name] = stitched.get_submodule(name), {}
        with torch.no_grad():
            dense = [net.get_submodule(name)(*args, **kwargs).double() for args, kwargs in inputs]
            signal = sum(float(y.square().sum()) for y in dense)
            for level in db.levels:
                db.stitch(stitched, {name: level})
                outputs = [layer(*args, **kwargs).double() for args, kwargs in inputs]
                pairs = zip(outputs, dense, strict=True)
                error = sum(float((y - right).square().sum()) for y, right in pairs)
                squares[name][level] = error / (signal or 1.0)
    return squares


def close(one: float, other: float, scale: float) -> bool:
    return abs(one - other) <= 1e-4 * max(scale, 1e-2)


def wrong_scores(
    of: str, scores: dict[str, dict[str, float]], right: dict[str, dict[str, float]], scale: float
) -> list[str]:
    return [
        f"{of} of {layer} {level}: {scores[layer][level]}, not {value}"
        for layer, by_level in right.items()
        for level, value in by_level.items()
        if not close(scores[layer][level], value, scale + abs(value))
    ]


def plain_losses(
    net: nn.Module, db: Database, images: Tensor, labels: Tensor
) -> dict[str, dict[str, float]]:
    stitched, dense = copy.deepcopy(net), plain_loss(net, images, labels)
    changes: dict[str, dict[str, float]] = {}
    for layer in db.layers:
        for level in reversed(db.levels):  # the last one is dense
            db.stitch(stitched, {layer: level})
            changes.setdefault(layer, {})[level] = plain_loss(stitched, images, labels) - dense
    return changes


def plain_ends(net: nn.Module, layers: list[str], images: Tensor) -> tuple[str, ...]:
    """The first and the last layer that is called with images."""
    called = [
        name
        for name, args, kwargs in layer_calls(net, layers, images)
        if len((*args, *kwargs.values())[0])
    ]
    return tuple(dict.fromkeys((called[0], called[-1])))


def wrong_answers(rng: Random) -> tuple[list[str], bool]:
    """What the toolkit says wrongly of a random network; whether the fast path was taken."""
    net = runnable_net(rng)
    db, other = random_levels(net, rng), registered_anew(net, rng)
    images = torch.randn(IMAGES, 3, 6, 6)
    labels, before = torch.randint(CLASSES, (IMAGES,)), images.clone()
    batches, dense = [(images, labels)], plain_loss(net, images, labels)
    scores = losses(net, db, batches, CPU)
    squares = squared_errors(net, db, batches, CPU)
    wrong = wrong_scores("loss", scores, plain_losses(net, db, images, labels), dense)
    wrong += wrong_scores("squared error", squares, plain_squares(net, db, images), 0.0)
    ends = plain_ends(net, db.layers, images)
    facts = {
        "evaluation": close(mean_loss(net, batches, CPU), dense, dense),
        "first and last": first_and_last(net, images) == first_and_last(other, images) == ends,
        "order of registration": losses(other, db, batches, CPU) == scores,
        "images as they were": torch.equal(images, before),
    }
    wrong += [fact for fact, holds in facts.items() if not holds]
    with evaluating(net):
        return wrong, isinstance(resumable(net, images), TracedModel)
