"""names.py, checkpoints.py: weights as training scripts write them, and the models they fit."""

from __future__ import annotations

import copy
import logging
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import prune

import database
import main_trueobs
import post_proc
from modelutils import CifarResNet, get_model
from obc.inputs.checkpoints import fitting_weights, load_state
from obc.inputs.files import save_checkpoint
from obc.inputs.names import StateDict, named_like, readings, without_shells
from obc.inputs.vision import torchvision
from obc.solver.errors import UserError
from obc.toolkit.fingerprints import weights_hash
from obc.toolkit.leveldb import Database

State = dict[str, Tensor]
QUICK = ["--nsamples", "64", "--noaug", "--device", "cpu"]


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Sequential(nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)),
    )


class Wrap(nn.Module):
    """A model whose own child has the name that DataParallel gives."""

    def __init__(self, name: str = "module") -> None:
        super().__init__()
        self.add_module(name, net())
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.name)(x)


def prefixed(state: State, prefix: str) -> State:
    return {f"{prefix}.{name}": tensor for name, tensor in state.items()}


def other(state: State) -> State:
    """Weights of the same names and shapes that are wrong."""
    return {name: torch.full_like(tensor, 7) for name, tensor in state.items()}


def check_loads(model: nn.Module, state: State, path: Path, **options) -> None:
    """The file in `path` brings exactly these weights into a model of other weights."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(3)
    load_state(model, fitting_weights(path, model, **options), path)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


STATE = net().state_dict()
CASES = {
    "plain": STATE,
    "model in state_dict": {"state_dict": {"model": STATE}, "epoch": 3},
    "four deep": {"a": {"b": {"model": {"state_dict": STATE}}}},
    "prefix of a child": prefixed(STATE, "encoder.backbone"),
    "wrapped, prefixed twice": {"net": prefixed(prefixed(STATE, "model"), "module")},
    "FSDP": {k.replace("2.", "2._fsdp_wrapped_module."): v for k, v in STATE.items()},
    "checkpointed": {
        k.replace("2.", "2._checkpoint_wrapped_module._orig_mod."): v for k, v in STATE.items()
    },
    "compiled, parallel, in the middle": {
        "model": {"_orig_mod.module." + k.replace("2.", "2.module."): v for k, v in STATE.items()}
    },
    "with optimizer": {
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
        "scaler": {"scale": torch.ones(1)},
        "weights": STATE,
    },
    "thop in every module": {
        **STATE,
        **{f"{m}total_{x}": torch.zeros(1) for m in ("", "0.", "2.0.") for x in ("ops", "params")},
    },
    "Lightning with a loss": {
        "state_dict": {**prefixed(STATE, "net"), "loss.weight": torch.ones(10)},
        "callbacks": {},
    },
    "EMA only": {"ema_state_dict": prefixed(STATE, "module"), "step": torch.tensor(3)},
    "EMA beside a model": {"model": other(STATE), "ema_model": STATE},
    "EMA before a model": {"model_ema": STATE, "model": other(STATE)},
    "EMA of another shape": {"ema": {name: torch.zeros(2, 2) for name in STATE}, "model": STATE},
    "EMA of another network": {"ema": {"conv.weight": torch.zeros(2, 2)}, "state_dict": STATE},
    "averaged prefix": {**prefixed(other(STATE), "online"), **prefixed(STATE, "ema")},
    "usual key first": {"teacher": other(STATE), "state_dict": STATE, "best": other(STATE)},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("zipped", [True, False])
def test_weights_as_scripts_write_them(case, zipped, tmp_path):
    path = tmp_path / "x.pth"
    torch.save(CASES[case], path, _use_new_zipfile_serialization=zipped)
    check_loads(net(), STATE, path)


def test_counts_of_batches_may_be_missing(tmp_path):
    """As in files from before PyTorch 0.4.1; the model's own count stays."""
    torch.save({k: v for k, v in STATE.items() if "num_batches" not in k}, tmp_path / "x.pth")
    check_loads(net(), STATE | {"1.num_batches_tracked": torch.tensor(3)}, tmp_path / "x.pth")


def test_swa_of_a_model_is_the_average(tmp_path):
    model = net()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    with torch.no_grad():
        model[0].weight.add_(2)
    averaged.update_parameters(model)
    torch.save(averaged.state_dict(), tmp_path / "swa.pth")
    check_loads(net(), averaged.module.state_dict(), tmp_path / "swa.pth")
    # A model that is an AveragedModel itself keeps its counter.
    check_loads(averaged, averaged.state_dict(), tmp_path / "swa.pth")


def test_masks_of_pruning_are_applied(tmp_path, caplog):
    model = net()
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.random_unstructured(model[2][3], "bias", 3)
    torch.save(prefixed(model.state_dict(), "module"), tmp_path / "x.pth")
    for layer, name in ((model[0], "weight"), (model[2][3], "bias")):
        prune.remove(layer, name)
    assert int((model[0].weight == 0).sum()) == 108
    with caplog.at_level(logging.INFO, "trueobs"):
        check_loads(net(), model.state_dict(), tmp_path / "x.pth")
    assert "applied the masks of 0.weight and 1 more" in caplog.text
    state = model.state_dict()
    broken = {**state, "0.weight_orig": state["0.weight"], "0.weight_mask": torch.ones(1)}
    del broken["0.weight"]
    torch.save(broken, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"0.weight_mask is \(1,\), another shape"):
        fitting_weights(tmp_path / "x.pth", net())


def test_what_was_taken_is_said_in_one_line(tmp_path, caplog):
    def said(content: dict, key: str | None = None) -> str:
        torch.save(content, tmp_path / "x.pth")
        caplog.clear()
        with caplog.at_level(logging.INFO, "trueobs"):
            fitting_weights(tmp_path / "x.pth", net(), key)
        assert len(caplog.messages) <= 1
        return "".join(caplog.messages)

    for usual in ({"state_dict": STATE}, {"model": prefixed(STATE, "module"), "epoch": 1}, STATE):
        assert said(usual) == ""
    both = {"model": other(STATE), "model_ema": STATE}
    line = said(both)
    assert "at model_ema (averaged" in line and "not those at model: --weights-key" in line
    assert said(both, "model") == said(both, "model_ema") == ""
    lightning = {"state_dict": {**prefixed(STATE, "net"), "loss.weight": torch.ones(10)}}
    assert "left out loss.weight" in said(lightning)
    assert "took the weights at backbone" in said(prefixed(STATE, "backbone"))


def test_the_key_chooses(tmp_path):
    path = tmp_path / "x.pth"
    wrong = other(STATE)
    torch.save(
        {
            "state_dict": {**prefixed(wrong, "online"), **prefixed(STATE, "target")},
            "model": {"ema": wrong, "raw": STATE},
            "model_ema": {**prefixed(wrong, "module")},
            "optimizer": {"momentum": torch.ones(1)},
        },
        path,
    )
    check_loads(net(), wrong, path, key="model_ema")
    check_loads(net(), wrong, path, key="model_ema.module")
    check_loads(net(), wrong, path, key="state_dict.online")
    check_loads(net(), STATE, path, key="state_dict.target")
    check_loads(net(), STATE, path, key="model.raw")
    check_loads(net(), wrong, path, key="model")  # of the two in it, the averaged ones
    with pytest.raises(UserError, match="no weights at mode .*it has .*model.raw"):
        fitting_weights(path, net(), "mode")
    with pytest.raises(UserError, match="does not fit the model at optimizer: missing 0.weight"):
        fitting_weights(path, net(), "optimizer")
    with pytest.raises(UserError, match="--weights-key has no effect without --weights"):
        get_model("rn8", "digits", weights_key="ema")


def test_the_key_in_a_command(tmp_path, capsys):
    state, path = get_model("rn8", "digits").state_dict(), tmp_path / "x.pth"
    noise = {k: torch.rand_like(v) if v.is_floating_point() else v for k, v in state.items()}
    torch.save({"model": noise, "ema": state}, path)
    words = ["rn8", "digits", "quant", "--wbits", "8", "--weights", str(path), *QUICK]
    top1 = {}
    for key in (None, "ema", "model"):
        assert main_trueobs.main(words + (["--weights-key", key] if key else [])) == 0
        out, err = capsys.readouterr()
        top1[key] = float(out.split()[-1])
        assert ("took the weights at ema" in err) == (key is None)
    assert top1[None] == top1["ema"] > 98 and top1["model"] < 50
    assert main_trueobs.main([*words, "--weights-key", "nowhere"]) == 2
    assert "no weights at nowhere (--weights-key): it has ema, model" in capsys.readouterr().err


@pytest.mark.parametrize("make", [Wrap, lambda: nn.DataParallel(net()), lambda: Wrap("_orig_mod")])
def test_models_with_a_name_of_a_wrapper_read_their_own_files(make, tmp_path):
    model, path = make(), tmp_path / "x.pth"
    inner = next(iter(model.children()))
    for content in (
        model.state_dict(),
        {"state_dict": prefixed(model.state_dict(), "module")},
        inner.state_dict(),
        prefixed(inner.state_dict(), "_orig_mod"),
    ):
        torch.save(content, path)
        check_loads(make(), model.state_dict(), path)
    save_file(dict(model.state_dict()), tmp_path / "x.safetensors")
    check_loads(make(), model.state_dict(), tmp_path / "x.safetensors")


MODEL = """
from torch import nn
def net():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
                         nn.Flatten(), nn.Linear(32, 10))
class Wrap(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = net()
    def forward(self, x):
        return self.module(x)
def wrap(): return Wrap()
def parallel(): return nn.DataParallel(net())
"""


@pytest.mark.parametrize("function", ["wrap", "parallel"])
def test_whole_commands_of_such_models(function, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("model.py").write_text(MODEL)
    model = [f"model.py:{function}", "digits"]
    save_checkpoint(get_model(model[0], "digits").state_dict(), "w.pth")
    weights = ["--weights", "w.pth", *QUICK]
    assert main_trueobs.main([*model, "quant", "--wbits", "4", "--save", "q.pth", *weights]) == 0
    quantised = capsys.readouterr().out.split()[-1]
    assert post_proc.main([*model, "q.pth", *weights]) == 0
    assert capsys.readouterr().out.split()[-1] == quantised
    assert main_trueobs.main([*model, "nmprune", "--save", "n.pth", *weights]) == 0
    assert main_trueobs.main([*model, "quant", "--wbits", "4", "--load", "n.pth", *weights]) == 0
    levels = ["unstr", "--max-sparsity", "0.5", "--delta-sparse", "0.5"]
    assert main_trueobs.main([*model, *levels, "--sparse-dir", "models_unstr", *weights]) == 0
    assert database.main([*model, "unstr", "loss", *weights]) == 0
    Path("profile.txt").write_text("5000 module.0\n")
    assert post_proc.main([*model, "profile.txt", "--database", "unstr", *weights]) == 0


def test_databases_follow_the_names_of_the_model(tmp_path):
    plain = {name: tensor.clone() for name, tensor in STATE.items()}
    half = plain | {"0.weight": torch.full_like(plain["0.weight"], 7)}
    for level, state in (("0000", plain), ("5000", half)):
        save_checkpoint(state, tmp_path / "models_unstr" / f"net_{level}.pth")
    inner = net()
    inner.load_state_dict(STATE)
    model = nn.DataParallel(inner)
    assert weights_hash(model.state_dict()) == weights_hash(STATE)
    db = Database.open("unstr", "net", tmp_path)
    db.check(model)
    assert db.layers == ["module.0", "module.2.0", "module.2.3"]
    db.stitch(model, {"module.0": "5000"})
    assert model.module[0].weight.eq(7).all()
    back = Database("unstr", "net", {"0000": nn.DataParallel(inner).state_dict()})
    back.check(inner)
    assert back.layers == ["0", "2.0", "2.3"]
    with pytest.raises(UserError, match="a database of another model"):
        back.check(nn.Sequential(nn.Linear(3, 3)))


def test_grids_go_with_their_layers(tmp_path):
    """A quantised model into the same one in DataParallel."""
    state = {
        **STATE,
        "0.weight_quant.scale": torch.ones(8, 1),
        "2.3.act_quant.zero": torch.ones(()),
    }
    path = tmp_path / "x.pth"
    torch.save({"state_dict": prefixed(state, "module")}, path)
    read = fitting_weights(path, Wrap(), additions=("weight_quant", "act_quant"))
    assert read.keys() == prefixed(state, "module").keys()
    with pytest.raises(UserError, match="unexpected module.0.weight_quant.scale and 1 more"):
        fitting_weights(path, Wrap())


# -- old names, which the model converts by itself -------------------------------------------------


def test_old_names_of_torchvision(tmp_path):
    torch.manual_seed(0)
    dense = torchvision.models.densenet121(num_classes=10)
    old = re.compile(r"(denselayer\d+\.)(norm|conv)([12])\.")
    torch.save({old.sub(r"\1\2.\3.", k): v for k, v in dense.state_dict().items()}, tmp_path / "d")
    model = get_model("densenet121", "digits", tmp_path / "d", 10)
    assert all(torch.equal(x, model.state_dict()[k]) for k, x in dense.state_dict().items())
    vit = torchvision.models.VisionTransformer(32, 8, 1, 2, 32, 64, num_classes=10)
    names = {"mlp.0.": "mlp.linear_1.", "mlp.3.": "mlp.linear_2."}
    state = {
        re.sub(r"mlp\.[03]\.", lambda m: names[m[0]], k): v for k, v in vit.state_dict().items()
    }
    fresh = torchvision.models.VisionTransformer(32, 8, 1, 2, 32, 64, num_classes=10)
    for content in (state, {"model": state}, prefixed(state, "module")):
        torch.save(content, tmp_path / "v.pth")
        check_loads(fresh, vit.state_dict(), tmp_path / "v.pth")


class FlatMobileNet(nn.Module):
    """MobileNet-V2 as table 2 of arXiv 1801.04381 has it, in flat blocks, as it was published."""

    TABLE = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1))
    TABLE += ((6, 160, 3, 2), (6, 320, 1, 1))  # expansion, channels, blocks, stride of the first

    def __init__(self, dropout: bool) -> None:
        super().__init__()

        def unit(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> list:
            conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
            return [conv, nn.BatchNorm2d(outputs), nn.ReLU6()]

        blocks, self.residual, inputs = [nn.Sequential(*unit(3, 32, 3, 2))], {}, 32
        for expansion, outputs, count, first_stride in self.TABLE:
            for number in range(count):
                stride, width = 1 if number else first_stride, inputs * expansion
                layers = unit(inputs, width, 1) if expansion > 1 else []
                layers += unit(width, width, 3, stride, width) + unit(width, outputs, 1)[:2]
                self.residual[len(blocks)] = stride == 1 and inputs == outputs
                blocks.append(nn.ModuleDict({"conv": nn.Sequential(*layers)}))
                inputs = outputs
        self.features = nn.Sequential(*blocks, nn.Sequential(*unit(inputs, 1280, 1)))
        head = nn.Linear(1280, 7)
        self.classifier = nn.Sequential(nn.Dropout(), head) if dropout else head

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.features):
            if number in self.residual:
                y = block["conv"](x)
                x = x + y if self.residual[number] else y
            else:
                x = block(x)
        return self.classifier(x.mean((2, 3)))


@pytest.mark.parametrize("dropout", [True, False])
def test_the_first_mobilenet_v2_has_flat_blocks(dropout, tmp_path):
    torch.manual_seed(0)
    flat = FlatMobileNet(dropout).eval()
    for module in flat.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    state = {f"module.{name}": tensor for name, tensor in flat.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "mobilenet_v2.pth.tar")
    model = get_model("mobilenet_v2", "imagenet", tmp_path / "mobilenet_v2.pth.tar", 7)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images), flat(images))


def test_old_names_with_another_number_of_classes(tmp_path):
    """The names are converted although the classifier of the usual model has another shape."""
    model = torchvision.models.vit_b_16(num_classes=10)
    state = {
        k.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): v
        for k, v in model.state_dict().items()
    }
    torch.save(state, tmp_path / "v.pth")
    read = get_model("vit_b_16", "digits", tmp_path / "v.pth", 10)
    assert read.heads.head.weight.shape[0] == 10
    layer = "encoder.layers.encoder_layer_3.mlp.3.weight"
    assert torch.equal(read.state_dict()[layer], model.state_dict()[layer])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_model_that_asks_for_versions(suffix, tmp_path):
    """MNASNet refuses files without them, as safetensors and copies of state dicts are."""
    torch.manual_seed(0)
    model, path = torchvision.models.mnasnet0_5(num_classes=10), tmp_path / f"m{suffix}"
    save_checkpoint(dict(model.state_dict()), path)
    read = get_model("mnasnet0_5", "digits", path, 10)
    assert all(torch.equal(x, read.state_dict()[k]) for k, x in model.state_dict().items())


class Renamed(nn.Linear):
    """Its weight was called `kernel` and transposed before version 2."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *others):
        if (local_metadata.get("version") or 1) < 2 and f"{prefix}kernel" in state_dict:
            state_dict[f"{prefix}weight"] = state_dict.pop(f"{prefix}kernel").T
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)


def test_conversions_of_values_run_once_and_by_version(tmp_path):
    weight, bias, path = torch.rand(3, 5), torch.rand(3), tmp_path / "x.pth"
    old = OrderedDict({"a.kernel": weight.T.clone(), "a.bias": bias})
    model = nn.Sequential(OrderedDict(a=Renamed(5, 3)))
    for versions in (None, {"": {}, "a": {"version": 1}}):
        if versions:
            old._metadata = versions
        torch.save(old, path)
        check_loads(model, {"a.weight": weight, "a.bias": bias}, path)
    torch.save({"state_dict": prefixed(old, "module")}, path)
    check_loads(model, {"a.weight": weight, "a.bias": bias}, path)
    bad = {"a.kernel": torch.full((5, 3), float("nan")), "a.bias": bias}
    torch.save(bad, path)
    with pytest.raises(UserError, match="a.weight has NaN"):
        load_state(model, fitting_weights(path, model), path)
    torch.save({"a.kernel": torch.zeros(5, 3, dtype=torch.complex64), "a.bias": bias}, path)
    with pytest.raises(UserError):
        load_state(model, fitting_weights(path, model), path)


# -- what does not fit -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({k: v for k, v in STATE.items() if k != "2.3.bias"}, "model: missing 2.3.bias$"),
        ({**STATE, "head.weight": torch.ones(1)}, "model: unexpected head.weight$"),
        ({"a": torch.ones(1)}, "missing 0.weight and 9 more; unexpected a$"),
        (
            {"ema": {**STATE, "x": torch.ones(1)}, "lr": torch.ones(1)},
            "model at ema: unexpected x$",
        ),
        ({"model": prefixed({**STATE, "q": torch.ones(1)}, "module")}, "unexpected module.q$"),
        ({"model": {"epoch": 3}}, "no tensors in it"),
    ],
)
def test_what_does_not_fit_is_named_truthfully(content, message, tmp_path):
    path = tmp_path / "x.pth"
    torch.save(content, path)
    with pytest.raises(UserError, match=message):
        fitting_weights(path, net())


def test_hostile_dictionaries_end(tmp_path):
    """Dictionaries in themselves, very many places, names that are no strings."""
    circle: dict = {"w": torch.zeros(1)}
    circle["again"] = circle
    torch.save(circle, tmp_path / "x.pth")
    with pytest.raises(UserError, match="does not fit"):
        fitting_weights(tmp_path / "x.pth", net())
    layer = nn.Linear(2, 2)
    many = {f"layer{n}.{name}": x for n in range(5000) for name, x in layer.state_dict().items()}
    torch.save(
        {**many, ("a", 1): torch.zeros(1), 7: {"weight": torch.zeros(1)}}, tmp_path / "x.pth"
    )
    assert fitting_weights(tmp_path / "x.pth", layer).keys() == {"weight", "bias"}
    found = readings({"": StateDict({"a.b": torch.zeros(1)})}, ["b"])
    assert [reading.place for reading in found if reading.fits] == ["a"]


def test_versions_that_are_no_versions(tmp_path):
    state = OrderedDict(STATE)
    state._metadata = {"": torch.ones(1), "0": {"version": "x"}, 3: {}, "1": {"version": 2}}
    torch.save(state, tmp_path / "x.pth")
    check_loads(net(), STATE, tmp_path / "x.pth")


def test_odd_tensors_in_wrappers_are_refused(tmp_path):
    path = tmp_path / "x.pth"
    huge = {**STATE, "0.bias": torch.zeros(1).expand(10**9)}
    torch.save({"ema": {"module": huge}}, path)
    with pytest.raises(UserError, match="claim 4,000,000,"):
        fitting_weights(path, net())
    masked = {k: v for k, v in STATE.items() if k != "0.weight"}
    masked |= {"0.weight_orig": STATE["0.weight"], "0.weight_mask": torch.ones(1).expand(10**9)}
    torch.save(masked, path)
    with pytest.raises(UserError, match="up to 0.weight_mask claim 4,000,001,"):
        fitting_weights(path, net())


def test_only_what_is_taken_has_to_be_plain(tmp_path):
    """Averaged weights are taken; what is wrong with the others does not matter."""
    odd = {**STATE, "0.weight": torch.zeros(8, 3, 3, 3).to_sparse()}
    torch.save({"ema": STATE, "model": odd}, tmp_path / "x.pth")
    check_loads(net(), STATE, tmp_path / "x.pth")
    with pytest.raises(UserError, match="0.weight is sparse_coo"):
        fitting_weights(tmp_path / "x.pth", net(), "model")


def test_names_without_shells():
    assert without_shells("_orig_mod.a.module.b.weight") == "a.b.weight"
    assert without_shells("modules.my_module.weight") == "modules.my_module.weight"
    tensors = {"module.a": torch.ones(1), "module.b": torch.ones(1)}
    assert named_like(tensors, ["a", "b"]).keys() == {"a", "b"}
    assert named_like(tensors, ["a", "c"]) is tensors


def test_the_shipped_network_from_every_wrapper(tmp_path):
    state = CifarResNet(1).state_dict()
    for number, content in enumerate(
        (
            {"params": state},
            {"state_dict": prefixed(state, "model.backbone")},
            {k.replace("layer2.", "layer2._orig_mod."): v for k, v in state.items()},
        )
    ):
        torch.save(content, tmp_path / f"{number}.pth")
        read = get_model("rn8", "cifar10", tmp_path / f"{number}.pth", 10)
        assert all(torch.equal(x, state[k]) for k, x in read.state_dict().items())
