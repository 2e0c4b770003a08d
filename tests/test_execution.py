"""The plain model as it runs: its order, its chance, and the memory that it writes into.

A network here works on its images in place, or on a layer's input after the layer; the right answer
is that of the same network working on copies.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import main_trueobs
import post_proc
import quant
import spdy
from modelutils import first_and_last
from obc.inputs.checkpoints import load_checkpoint
from obc.inputs.files import save_checkpoint
from obc.toolkit import calibrate, training
from obc.toolkit.checks import warn_if_random
from obc.toolkit.corrections import batchnorm_averages, statistics_correction
from obc.toolkit.evaluation import mean_loss
from obc.toolkit.leveldb import Database
from obc.toolkit.session import CommonOptions, Session
from pruning_vs_quantization.learned_steps import input_grids
from trueobs import TrueOBS

CPU = torch.device("cpu")


# -- first and last --------------------------------------------------------------------------------

NETWORK = """
import torch.nn.functional as F
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.{first} = self.make()["{first}"]
        for name in "{order}".split():
            setattr(self, name, self.make()[name])

    def make(self):
        return {{
            "fc": nn.Linear(8, 10), "aux": nn.Linear(8, 10), "proxy": nn.Conv2d(8, 8, 1),
            "stem": nn.Conv2d(3, 8, 3, 2), "body": nn.Conv2d(8, 8, 3, 2),
        }}

    def forward(self, x):
        x = F.relu(self.body(input=F.relu(self.stem(input=x))))
        self.aux(x.mean((2, 3))[:0])
        x = x.mean((2, 3))
        return self.fc(x) + (self.aux(x) if self.training else 0)

def net():
    return Net()
"""
ORDERS = ["fc stem body aux proxy", "proxy aux body fc stem", "aux fc proxy stem body"]


def written_net(folder: Path, order: str) -> str:
    first, _, rest = order.partition(" ")
    (folder / "net.py").write_text(NETWORK.format(first=first, order=rest))
    return f"{folder / 'net.py'}:net"


@pytest.mark.parametrize("order", ORDERS)
def test_skip_firstlast_goes_by_execution(
    order: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither a head for training, registered last, nor one that is called with no image."""
    name = written_net(tmp_path, order)
    names = {"fc": (10, 8), "aux": (10, 8), "proxy": (8, 8, 1, 1)}
    names |= {"stem": (8, 3, 3, 3), "body": (8, 8, 3, 3)}
    torch.manual_seed(0)
    state = {f"{layer}.weight": torch.randn(shape) for layer, shape in names.items()}
    state |= {f"{layer}.bias": torch.randn(shape[0]) for layer, shape in names.items()}
    halved = {key: x / 2 if "weight" in key else x for key, x in state.items()}
    save_checkpoint(state, tmp_path / "dense.pth")
    save_checkpoint(halved, tmp_path / "halved.pth")
    words = [name, "digits", tmp_path / "halved.pth", "--weights", tmp_path / "dense.pth"]
    words += ["--skip-firstlast", "--save", tmp_path / "saved.pth", "--nsamples", "20", "--noaug"]
    assert post_proc.main([str(word) for word in words]) == 0
    saved, log = load_checkpoint(tmp_path / "saved.pth"), capsys.readouterr().err
    for layer in names:
        skipped = layer in ("stem", "fc")
        right = (state if skipped else halved)[f"{layer}.weight"]
        assert torch.equal(saved[f"{layer}.weight"], right), layer
        assert (f"{layer} left dense" in log) == skipped


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.other, self.mix = nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(F.relu(self.other(F.relu(self.mix(x.flatten(1))))))


def test_one_name_if_a_layer_is_both() -> None:
    model = Shared().train()
    assert first_and_last(model, torch.zeros(2, 3, 2, 2)) == ("mix",)
    assert model.training and not model.mix._forward_hooks
    single = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    assert first_and_last(single, torch.zeros(1, 3, 2, 2)) == ("1",)


# -- chance ----------------------------------------------------------------------------------------


class Chance(nn.Module):
    def __init__(self, change: Callable[[Tensor, bool], Tensor]) -> None:
        super().__init__()
        self.conv, self.fc, self.change = nn.Conv2d(3, 8, 3), nn.Linear(8, 10), change

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.change(F.relu(self.conv(x)), self.training).mean((2, 3)))


BY_CHANCE = {
    "dropout in eval mode": lambda x, training: F.dropout(x, 0.3),
    "noise": lambda x, training: x + 1e-4 * torch.randn_like(x),
    "a layer dropped now and then": lambda x, training: x if random.random() > 0.3 else 0 * x,
    "by PyTorch's generator": lambda x, training: x * (torch.rand(()) > 0.3),
}
CERTAIN = {
    "dropout in training": lambda x, training: F.dropout(x, 0.3, training),
    "a draw that changes nothing": lambda x, training: x + 0 * torch.rand_like(x),
    "nothing": lambda x, training: x,
    "its input in place": lambda x, training: x.mul_(2),
}


@pytest.mark.parametrize("kind", [*BY_CHANCE, *CERTAIN])
def test_outputs_that_differ_between_two_calls_are_named(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    random.seed(0)
    model = Chance((BY_CHANCE | CERTAIN)[kind]).eval()
    warn_if_random(model, "net.py:net", torch.zeros(2, 3, 8, 8))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (kind in BY_CHANCE)
    assert all("net.py:net: its outputs differ between two calls" in line for line in lines)


@pytest.mark.parametrize("probability", [0.0, 0.4])
def test_commands_say_it_once(
    probability: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "drop.py").write_text(
        "import torch.nn.functional as F\nfrom torch import nn\n"
        "class Drop(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)\n"
        "    def forward(self, x):\n"
        f"        return self.b(F.dropout(F.relu(self.a(x)), {probability}).mean((2, 3)))\n"
        "def drop(): return Drop()\n"
    )
    words = [
        f"{tmp_path}/drop.py:drop",
        "digits",
        "quant",
        "--wbits",
        "8",
        "--noaug",
        "--nsamples",
        "32",
    ]
    for _ in range(2):  # each command
        assert main_trueobs.main([*words, "--save", f"{tmp_path}/q.pth", "--restart"]) == 0
        said = capsys.readouterr().err.count("outputs differ between two calls")
        assert said == (probability > 0)


# -- memory ----------------------------------------------------------------------------------------


class Writing(nn.Module):
    """Normalises its images, and changes the inputs of its layers, in place or not."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.a, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.b, self.fc = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 10)
        self.register_buffer("scratch", torch.zeros(4, 8, 8))
        self.in_place = in_place
        for tensor in (self.bn.weight.data, self.bn.bias.data, self.bn.running_mean):
            tensor.normal_()

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.in_place else x.clone()
        x.mul_(3).sub_(0.7)
        y = self.bn(self.a(x))
        z = self.b(y)
        y = y if self.in_place else y.clone()
        y.mul_(-2).add_(z)  # y was b's input
        if self.in_place:
            self.scratch.copy_(y.mean(0))
            y = y + self.scratch
        else:
            y = y + y.mean(0)
        features = F.relu_(y).mean((2, 3))
        scores = self.fc(features)
        features.mul_(9 if self.in_place else 1)
        return scores


def images(count: int = 40) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def batches() -> list[tuple[Tensor, Tensor]]:
    labels = torch.arange(40) % 10
    return [(images()[:20], labels[:20]), (images()[20:], labels[20:])]


def both(act: Callable[[nn.Module], object]) -> tuple[object, object]:
    return tuple(act(Writing(in_place).eval()) for in_place in (True, False))


def test_evaluation_and_norms_of_images_that_are_kept() -> None:
    kept = batches()

    def act(model: nn.Module) -> list:
        results = []
        for _ in range(3):
            batchnorm_averages(model, kept, CPU)
            results.append((mean_loss(model, kept, CPU), model.bn.running_mean.tolist()))
        assert results[0] == results[1] == results[2]
        return results

    one, other = both(act)
    assert one[0][0] == pytest.approx(other[0][0], rel=1e-6)
    assert one[0][1] == pytest.approx(other[0][1], rel=1e-6)
    assert all(torch.equal(x, y) for (x, _), (y, _) in zip(kept, batches(), strict=True))


def test_statistics_correction_shows_both_models_the_same_images() -> None:
    def act(model: nn.Module) -> Tensor:
        dense = copy.deepcopy(model)
        model.a.weight.data.mul_(0.5)
        statistics_correction(model, dense, images(), CPU)
        return torch.cat([model.bn.weight.data, model.bn.bias.data])

    torch.testing.assert_close(*both(act))


@pytest.mark.parametrize("train", [training.global_adaprune, training.finetune])
def test_training_on_the_dense_models_outputs(train: Callable) -> None:
    class Epochs:
        def __len__(self) -> int:
            return 2

        def epoch(self, number: int) -> list[tuple[Tensor, Tensor]]:
            return batches()

    def act(model: nn.Module) -> list[float]:
        dense = copy.deepcopy(model)
        model.fc.weight.data.mul_(0.9)
        task = training.TrainingTask("test", Epochs(), CPU, 2, "--lr")
        options = {"labelled": None} if train is training.finetune else {}
        return train(model, dense, task, **options)

    one, other = (act(Normalising(in_place).eval()) for in_place in (True, False))
    assert one == pytest.approx(other, rel=1e-5)


class Normalising(Writing):
    """What autograd can go back through."""

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.in_place else x.clone()
        x.mul_(3).sub_(0.7)
        return self.fc(F.relu(self.b(F.relu(self.bn(self.a(x))))).mean((2, 3)))


def test_hessians_of_all_threads() -> None:
    """Images of the first call are counted as they are, and threads have a scratch buffer each."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:

        def act(model: nn.Module) -> Tensor:
            solvers = {name: TrueOBS(model.get_submodule(name)) for name in ("a", "b", "fc")}
            calibrate.calibrate(model, solvers, batches() * 4, CPU)
            return torch.cat([solver.H.flatten() for solver in solvers.values()])

        one, other = both(act)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_activation_grids_are_fitted_on_the_inputs_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fit = quant.fit_activation_grid

    def late(*words: object) -> quant.Grid:
        time.sleep(0.05)  # the model goes on meanwhile
        return fit(*words)

    monkeypatch.setattr(quant, "fit_activation_grid", late)
    one, other = both(lambda model: calibrate.activation_grids(model, images(), 4, False, True))
    assert one.keys() == other.keys() == {"a", "b", "fc"}
    for name in one:
        assert one[name].scale == pytest.approx(float(other[name].scale), rel=1e-6), name


def test_starting_grids_of_the_study() -> None:
    def act(model: nn.Module) -> list[float]:
        layers = {name: model.get_submodule(name) for name in ("a", "b", "fc")}
        grids = input_grids(model, layers, dict.fromkeys(layers, 4), "MSE", batches(), CPU)
        return [float(grid.scale) for grid in grids.values()]

    one, other = both(act)
    assert one == pytest.approx(other, rel=1e-6)


def test_candidates_of_the_search_see_the_same_images(tmp_path: Path) -> None:
    (tmp_path / "writing.py").write_text(
        "import torch.nn.functional as F\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)\n"
        "        self.b = nn.Linear(8, 10)\n"
        "    def forward(self, x):\n"
        "        x.mul_(1.5)\n"
        "        return self.b(F.relu_(self.bn(self.a(x))).mean((2, 3)))\n"
        "def net(): return Net()\n"
    )
    words = [f"{tmp_path}/writing.py:net", "digits", "3", "unstr"]
    words += ["--nsamples", "64", "--batchsize", "32"]
    args = spdy.build_parser().parse_args(words)
    args.noaug = True
    session = Session.of(
        CommonOptions(**{name: getattr(args, name) for name in CommonOptions.__annotations__})
    )
    db = Database("unstr", "net", {"0000": session.model.state_dict()})
    for correction in ("averages", "statcorr", "none"):
        evaluator = spdy.Evaluator(session, db, correction)
        first, again = (evaluator(dict.fromkeys(db.layers, "0000")) for _ in range(2))
        assert first == again
