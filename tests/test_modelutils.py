"""modelutils.py: names, weights, checkpoints of all kinds, layers; evaluation.py."""

from __future__ import annotations

import io
import logging
import math
import pickle
import urllib.error

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from datautils import load_data
from datautils import test_batches as batches_of_tests
from modelutils import (
    CIFAR_BLOCKS,
    CifarResNet,
    check_layers,
    find_layers,
    get_model,
    load_checkpoint,
    load_state,
    other_weights,
)
from obc.inputs.checkpoints import fitting_weights
from obc.inputs.files import save_checkpoint
from obc.solver.errors import UserError
from obc.solver.layers import view
from obc.toolkit.evaluation import DenseScores, Evaluation, evaluate, mean_loss

CPU = torch.device("cpu")


@pytest.fixture
def rn8_file(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "rn8.pth"
    save_checkpoint(CifarResNet(1).state_dict(), path)
    return path


# ------------------------------------------------------------------------ the networks


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # He et al. 2015, table 6, in millions
        ("rn20", 0.27),
        ("rn32", 0.46),
        ("rn44", 0.66),
        ("rn56", 0.85),
        ("rn110", 1.7),
    ],
)
def test_cifar_resnets_have_the_published_size(name, parameters):
    model = CifarResNet(CIFAR_BLOCKS[name])
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e6 == pytest.approx(parameters, abs=0.03)
    assert len(find_layers(model)) == int(name[2:])  # "6n + 2 layers": none in the shortcuts


def test_names_of_layers_and_shape_of_scores():
    model = CifarResNet(1, classes=7).eval()
    assert list(find_layers(model)) == [
        "conv1",
        "layer1.0.conv1",
        "layer1.0.conv2",
        "layer2.0.conv1",
        "layer2.0.conv2",
        "layer3.0.conv1",
        "layer3.0.conv2",
        "linear",
    ]
    assert {"bn1.running_mean", "layer3.0.bn2.weight", "linear.bias"} <= model.state_dict().keys()
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 7)


def test_shortcuts_keep_every_second_pixel_and_pad_channels_on_both_sides():
    block = CifarResNet(1).layer2[0].eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 16, 8, 8)
    expected = torch.zeros(2, 32, 4, 4)
    expected[:, 8:24] = x[:, :, ::2, ::2]
    assert torch.equal(block(x), expected)


# ----------------------------------------------------------------------- models by name


def test_rn8_on_digits_needs_nothing():
    digits = load_data("digits")
    model = get_model("rn8", "digits", classes=10)
    assert not model.training
    assert evaluate(model, batches_of_tests(digits), CPU).top1 >= 98.5


def test_unknown_models_come_with_suggestions():
    with pytest.raises(UserError, match="unknown model resnet19; did you mean resnet1"):
        get_model("resnet19", "imagenet")
    with pytest.raises(UserError, match="unknown model r2d2x; see --help"):
        get_model("r2d2x", "imagenet")
    with pytest.raises(UserError, match="unknown model fasterrcnn_resnet50_fpn"):
        get_model("fasterrcnn_resnet50_fpn", "imagenet")


@pytest.mark.parametrize(("name", "dataset"), [("rn20", "cifar10"), ("rn8", "cifar10")])
def test_no_weights_to_download(name, dataset):
    with pytest.raises(UserError) as caught:
        get_model(name, dataset, classes=10)
    assert (
        str(caught.value) == f"{name} on {dataset} has no weights to download; pass --weights FILE"
    )


@pytest.mark.parametrize(
    "error",
    [
        urllib.error.URLError("no network"),
        TimeoutError("timed out"),
        RuntimeError('invalid hash value (expected "1", got "2")'),
    ],
)
def test_a_failing_download_is_one_line(error, monkeypatch):
    def download(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    with pytest.raises(UserError, match="rn18: its weights cannot be downloaded .*pass --weights"):
        get_model("rn18", "imagenet", classes=1000)


def test_pretrained_weights_are_version_1_or_the_default(monkeypatch):
    from obc.inputs.vision import torchvision

    asked = []
    monkeypatch.setattr(
        torchvision.models,
        "get_model",
        lambda name, weights: asked.append((name, weights.name)) or nn.ReLU(),
    )
    for name in ("rn50", "vit_h_14", "mobilenet_v2"):
        get_model(name, "imagenet", classes=1000)
    assert asked == [
        ("resnet50", "IMAGENET1K_V1"),
        ("vit_h_14", "IMAGENET1K_SWAG_E2E_V1"),
        ("mobilenet_v2", "IMAGENET1K_V1"),
    ]


def test_classes_of_pretrained_weights_and_dataset_have_to_agree():
    with pytest.raises(UserError, match="rn18: .* have 1000 classes, but cifar10 has 10; pass"):
        get_model("rn18", "cifar10", classes=10)


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small", "googlenet"])
def test_classes_follow_the_file(name, tmp_path):
    from obc.inputs.vision import torchvision

    options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None, num_classes=5, **options)
    path = tmp_path / "five.safetensors"
    save_checkpoint(model.state_dict(), path)
    loaded = get_model(name, "folder", path)
    assert list(find_layers(loaded).values())[-1].weight.shape[0] == 5
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(map(torch.equal, loaded.state_dict().values(), model.state_dict().values()))
    with pytest.raises(UserError, match="five.safetensors: .* have 5 classes, but folder has 3"):
        get_model(name, "folder", path, classes=3)


def test_weights_of_another_model(rn8_file):
    with pytest.raises(UserError, match="missing layer1.1.conv1.weight and 66 more; unexpected li"):
        get_model("rn18", "cifar10", rn8_file, 10)
    with pytest.raises(UserError, match="missing layer1.1.conv1.weight and 59 more$"):
        get_model("rn20", "cifar10", rn8_file, 10)


@pytest.mark.parametrize("grid", ["act_quant", "weight_quant"])
def test_quantised_weights_are_not_dense_ones(grid, rn8_file):
    state = load_checkpoint(rn8_file) | {f"conv1.{grid}.scale": torch.ones(1)}
    save_checkpoint(state, rn8_file)
    with pytest.raises(UserError, match="--weights takes dense ones"):
        get_model("rn8", "cifar10", rn8_file, 10)


USER_MODEL = """
from torch import nn
def good():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).half().train()
def bad():
    return 3
def worse():
    raise ZeroDivisionError("oh dear")
"""


def test_a_model_of_the_users_own(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(USER_MODEL)
    model = get_model(f"{path}:good", "folder", classes=4)
    assert not model.training and next(model.parameters()).dtype == torch.float32
    weights = tmp_path / "own.pth"
    save_checkpoint({"1.weight": torch.ones(4, 12), "1.bias": torch.ones(4)}, weights)
    assert get_model(f"{path}:good", "folder", weights)[1].bias.sum() == 4
    for function, message in (
        ("bad", "bad returned a int; it has to return an nn.Module"),
        ("worse", "worse: ZeroDivisionError: oh dear"),
        ("none", "own.py: no function none in it"),
    ):
        with pytest.raises(UserError, match=message):
            get_model(f"{path}:{function}", "folder")
    with pytest.raises(UserError, match="there is no file nowhere.py"):
        get_model("nowhere.py:f", "folder")
    path.write_text("def f(:")
    with pytest.raises(UserError, match="SyntaxError"):
        get_model(f"{path}:f", "folder")


def test_a_file_is_imported_as_python_would(tmp_path):
    """It finds its neighbours, and dataclasses in it find their module."""
    (tmp_path / "user_parts_of_a_net.py").write_text("CLASSES = 4\n")
    (tmp_path / "own.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from torch import nn\n"
        "from user_parts_of_a_net import CLASSES\n"
        "@dataclass\n"
        "class Settings:\n"
        "    classes: int = CLASSES\n"
        "def net():\n"
        "    return nn.Linear(12, Settings().classes)\n"
        "def leaves():\n"
        "    raise SystemExit(0)\n"
    )
    assert get_model(f"{tmp_path}/own.py:net", "folder").out_features == 4
    with pytest.raises(UserError, match="own.py:leaves: SystemExit: 0"):
        get_model(f"{tmp_path}/own.py:leaves", "folder")
    with pytest.raises(UserError, match="own.py:function$"):
        get_model(f"{tmp_path}/own.py", "folder")


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (tied, "0 and 1 share one weight"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "is computed from other"),
        (lambda: nn.utils.weight_norm(nn.Linear(4, 4)), "is computed from other"),
        (lambda: nn.utils.spectral_norm(nn.Conv2d(4, 4, 1)), "is computed from other"),
        (lambda: nn.LazyLinear(4), "a lazy layer"),
    ],
)
def test_weights_that_cannot_be_replaced_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        check_layers(nn.Sequential(make()) if make is not tied else make(), "mine")


def test_a_module_that_is_used_twice_is_one_layer():
    layer = nn.Linear(4, 4)
    check_layers(nn.Sequential(layer, nn.ReLU(), layer), "mine")


def test_what_is_in_no_layer_is_counted():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.zeros(1, 1, 8))  # a vector, whatever its shape
            self.positions = nn.Parameter(torch.zeros(1, 5, 8))
            self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(8, 2))
            self.other = nn.ConvTranspose1d(8, 8, 3)

    counts = other_weights(Net())
    assert list(counts.items()) == [
        ("other.weight (ConvTranspose1d)", 192),
        ("positions (Net)", 40),
    ]


def test_a_layer_that_shares_its_weight_with_an_embedding_is_left_dense():
    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8), nn.Linear(8, 5))
    model[2].weight = model[0].weight
    check_layers(model, "mine")
    reasons = [view(layer).left_dense for layer in find_layers(model).values()]
    assert reasons == ["", "its weight is also that of 0 (Embedding)"]


# -------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "best_prec1": 91.7, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"state": {}}},
        lambda state: {"model_state_dict": state},
        lambda state: {"module." + key: tensor for key, tensor in state.items()},
        lambda state: {"state_dict": {"module." + key: tensor for key, tensor in state.items()}},
        lambda state: {
            "net": {f"_orig_mod.module.{key}": t for key, t in state.items()},
            "acc": 91.7,
        },
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_wrappers_and_prefixes_come_off(wrap, zipped, tmp_path):
    state = CifarResNet(1).state_dict()
    path = tmp_path / "x.th"
    torch.save(wrap(state), path, _use_new_zipfile_serialization=zipped)
    read = fitting_weights(path, CifarResNet(1))
    assert read.keys() == state.keys()
    assert all(torch.equal(read[key], state[key]) for key in state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_half_precision_files_make_float32_models(dtype, suffix, tmp_path):
    state = {
        key: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for key, tensor in CifarResNet(1).state_dict().items()
    }
    path = tmp_path / f"x{suffix}"
    save_checkpoint(state, path)
    model = get_model("rn8", "cifar10", path, 10)
    assert model.conv1.weight.dtype == torch.float32
    assert torch.equal(model.conv1.weight.to(dtype), state["conv1.weight"])


class Harmful:
    def __reduce__(self):
        return print, ("this must never be printed",)


def bytes_of(saved) -> bytes:
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pth", b"", r"cannot be read"),
        ("b.pth", b"no checkpoint at all", r"cannot be read"),
        ("c.pth", bytes_of({"w": torch.zeros(1000)})[:2000], r"cannot be read"),
        (
            "d.pth",
            pickle.dumps(Harmful(), 2),
            r"objects other than tensors .*print.*refuse to load it",
        ),
        ("d4.pth", pickle.dumps(Harmful(), 4), r"cannot be read \(not a checkpoint\)"),
        ("e.pth", bytes_of({"w": torch.zeros(1), "x": Harmful()}), r"objects other than .*print"),
        ("f.pth", bytes_of({"epoch": 3}), r"no tensors in it"),
        ("g.pth", bytes_of([torch.zeros(1)]), r"contains a list, not a state dict"),
        (
            "h.pth",
            bytes_of({"w": torch.tensor([1, float("nan")])}),
            r"w has NaN or infinite values",
        ),
        ("i.pth", bytes_of({"w": torch.tensor([float("inf")])}), r"w has NaN or infinite values"),
        ("j.safetensors", b"\x10\0\0\0\0\0\0\0{", r"cannot be read as safetensors"),
        ("k.safetensors", b"", r"cannot be read as safetensors"),
    ],
    ids=lambda value: value if str(value).endswith(("pth", "safetensors")) else "",
)
def test_what_is_no_checkpoint(name, content, message, tmp_path, capsys):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value)
    assert capsys.readouterr().out == ""


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(UserError, match="x.pth: no such file"):
        load_checkpoint(tmp_path / "x.pth")
    with pytest.raises(UserError, match="is not a file"):
        load_checkpoint(tmp_path)


def test_a_whole_model_or_a_program_is_refused(tmp_path):
    torch.save(CifarResNet(1), tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"than tensors \(obc.inputs.cifar_resnets.CifarResNet\)"):
        load_checkpoint(tmp_path / "model.pth")


def test_what_is_not_a_tensor_is_mentioned(tmp_path, caplog):
    torch.save({"w": torch.ones(1), "epoch": 3}, tmp_path / "x.pth")
    with caplog.at_level(logging.WARNING, "trueobs"):
        assert list(load_checkpoint(tmp_path / "x.pth")) == ["w"]
    assert "ignored, since not tensors: epoch" in caplog.text


def test_a_state_has_to_fit_exactly():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    state = {key: torch.ones_like(tensor) for key, tensor in model.state_dict().items()}
    before = model[0].weight.clone()
    for change, message in (
        ({"0.bias": None}, "x.pth: does not fit the model: missing 0.bias$"),
        ({"0.bias": None, "1.bias": None}, "missing 0.bias and 1 more$"),
        ({"head": torch.ones(1)}, "unexpected head$"),
        (
            {"0.bias": torch.ones(5), "1.bias": torch.ones(5)},
            r"0.bias is \(5,\), should be \(4,\), and 1 more$",
        ),
    ):
        wrong = {key: tensor for key, tensor in (state | change).items() if tensor is not None}
        with pytest.raises(UserError, match=message):
            load_state(model, wrong, "x.pth")
        assert torch.equal(model[0].weight, before)
    state.pop("1.num_batches_tracked")  # absent from files older than PyTorch 0.4.1
    load_state(model, state, "x.pth")
    assert model[0].weight.eq(1).all()


# ------------------------------------------------------------------ layers and evaluation


def test_find_layers_takes_convolutions_and_linear_layers_only():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.BatchNorm2d(4),
        nn.ConvTranspose1d(4, 4, 1),
        nn.Sequential(nn.Conv2d(4, 4, 1, groups=4), nn.Linear(1, 2)),
    )
    assert list(find_layers(model)) == ["0", "3.0", "3.1"]


class Scores(nn.Module):
    """Scores are the first pixels of the image; remembers the modes it ran in."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.norm, self.drop, self.classes = nn.BatchNorm2d(3), nn.Dropout(), classes
        self.modes: set[tuple[bool, bool]] = set()

    def forward(self, x):
        self.modes.add((self.norm.training, torch.is_inference_mode_enabled()))
        return self.drop(x).flatten(1)[:, : self.classes]


def test_evaluation_counts_right_and_restores_every_mode():
    torch.manual_seed(0)
    batches = [(torch.randn(n, 3, 2, 2), torch.randint(3, (n,))) for n in (5, 5, 2)]
    scores = torch.cat([images.flatten(1)[:, :3] for images, _ in batches])
    labels = torch.cat([labels for _, labels in batches])
    model = Scores().train()
    model.norm.eval()
    right = sum(int(row.argmax() == label) for row, label in zip(scores, labels, strict=True))
    assert evaluate(model, batches, CPU) == Evaluation(pytest.approx(100 * right / 12))
    assert mean_loss(model, batches, CPU) == pytest.approx(
        F.cross_entropy(scores.double(), labels).item()
    )
    assert model.modes == {(False, True)}
    assert (model.training, model.norm.training, model.drop.training) == (True, False, True)
    with pytest.raises(UserError, match="no images"):
        evaluate(model, [], CPU)


def test_kl_and_agreement_with_the_dense_model_by_their_definitions():
    torch.manual_seed(1)
    batches = [(torch.randn(n, 3, 2, 2), torch.randint(4, (n,))) for n in (5, 1, 6)]
    dense, model = (nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval() for _ in range(2))
    kl, same = 0.0, 0
    for image in torch.cat([images for images, _ in batches]):
        p, q = (net(image[None])[0].double().softmax(0).tolist() for net in (dense, model))
        kl += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 12
        same += p.index(max(p)) == q.index(max(q))
    scores = DenseScores(dense)
    found = evaluate(model, batches, CPU, scores)
    assert [len(one) for one in scores.batches] == [5, 1, 6]
    scores.model = None  # it has been seen
    assert evaluate(model, batches, CPU, scores) == found
    assert (found.kl, found.agreement) == (pytest.approx(kl), pytest.approx(100 * same / 12))
    assert evaluate(dense, batches, CPU, scores) == Evaluation(
        evaluate(dense, batches, CPU).top1, 0.0, 100.0
    )
    assert str(Evaluation(87.123, 0.01234, 98.456)) == "KL 0.0123  agreement 98.46\ntop-1 87.12"
    with torch.no_grad():
        model[1].bias[0] = math.inf  # a wrecked model is reported, not hidden
    assert math.isnan(evaluate(model, batches, CPU, scores).kl)


def test_modes_come_back_after_an_error_too():
    model = Scores(classes=2).train()
    with pytest.raises(UserError, match="the model has 2 classes, but there is .* class 5"):
        evaluate(model, [(torch.zeros(1, 3, 2, 2), torch.tensor([5]))], CPU)
    assert model.training and model.drop.training
    with pytest.raises(UserError, match="does not return class scores"):
        evaluate(nn.Identity(), [(torch.zeros(1, 3, 2, 2), torch.tensor([0]))], CPU)


# ------------------------------------------------------------------------- real weights


def test_a_foreign_checkpoint_loads(shared_data):
    foreign = get_model("rn20", "cifar10", shared_data / "foreign_resnet20.th", 10)
    ours = get_model("rn20", "cifar10", shared_data / "rn20_cifar10.pth", 10)
    assert foreign.state_dict().keys() == ours.state_dict().keys()


def test_a_half_precision_torchvision_checkpoint_loads(shared_data):
    model = get_model("rn18", "cifar10", shared_data / "rn18_cifar10_64px.pth", 10)
    assert model.fc.weight.shape == (10, 512) and model.fc.weight.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "weights", "size", "top1"),
    [
        ("rn20", "rn20_cifar10.pth", 32, 87.93),
        ("rn20", "foreign_resnet20.th", 32, 81.03),
        ("rn18", "rn18_cifar10_64px.pth", 64, 85.12),
    ],
)
def test_published_accuracies(name, weights, size, top1, shared_data, cifar10_images):
    data = load_data("cifar10", datapath=cifar10_images, image_size=size)
    model = get_model(name, "cifar10", shared_data / weights, len(data.classes))
    assert evaluate(model, batches_of_tests(data), CPU).top1 == pytest.approx(top1, abs=0.05)
