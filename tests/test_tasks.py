"""tasks.py: a network of any inputs through all commands, by a task of the user's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import database
import export
import main_trueobs
import post_proc
import spdy
from datautils import load_data
from obc.inputs.tasks import Arguments, Task, TaskBatches, as_inputs, call, merged
from obc.inputs.tracing import TracedModel, resumable
from obc.solver.errors import UserError
from obc.toolkit.imagetask import ImageTask

# A reader takes tokens and a mask, by keyword, and scores 3 classes; a scale takes two tensors and
# returns two numbers, which are no scores.
FILE = """
import torch
import torch.nn.functional as F
from torch import nn

from obc.inputs.tasks import Task
from texts import texts


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.last = nn.Linear(16, 3)

    def forward(self, tokens, mask=None, unused=None):
        hidden = self.block(self.words(tokens), src_key_padding_mask=mask)
        if unused is not None:
            raise RuntimeError("unused is None")
        return self.last(hidden.mean(1))


def reader():
    torch.manual_seed(0)
    return Reader()


class Classes(Task):
    logits = True

    def calibration(self):
        return texts(0, 6)

    def inputs(self, batch):
        return {"mask": batch["mask"], "tokens": batch["tokens"]}

    def loss(self, outputs, batch):
        return F.cross_entropy(outputs, batch["label"])

    def evaluate(self, model):
        pairs = [(model(x["tokens"], x["mask"]).argmax(1), x["label"]) for x in texts(1, 4)]
        right = torch.cat([ours == theirs for ours, theirs in pairs])
        return {"right": right.double().mean(), "of": len(right)}


def classes():
    return Classes()


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.norm, self.two = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)

    def forward(self, left, right):
        hidden = torch.relu(self.norm(self.one(left + 2 * right)))
        return {"sum": self.two(hidden), "spread": hidden.std(1)}


def scale():
    torch.manual_seed(0)
    return Scale()


class Numbers(Task):
    def calibration(self):
        generator = torch.Generator().manual_seed(0)
        for _ in range(4):
            yield torch.randn(16, 8, generator=generator), torch.randn(16, 8, generator=generator)

    def loss(self, outputs, batch):
        return (outputs["sum"] - batch[0][:, :1]).square().mean()

    def evaluate(self, model):
        left, right = next(self.calibration())
        return {"distance": self.loss(model(left, right), (left, right))}


def numbers():
    return Numbers()


class NoLoss(Numbers):
    loss = Task.loss

    def evaluate(self, model):
        left, right = next(self.calibration())
        return {"mean": model(left, right)["sum"].mean()}


def no_loss():
    return NoLoss()


def wrong_kind():
    return {"calibration": []}


class Broken(Numbers):
    def evaluate(self, model):
        return 1 / 0


def broken():
    return Broken()


class Empty(Numbers):
    def calibration(self):
        return []


def empty():
    return Empty()


class NoNumbers(Numbers):
    def evaluate(self, model):
        return {}


def no_numbers():
    return NoNumbers()
"""
TEXTS = """
import torch

def texts(seed, count):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        tokens = torch.randint(20, (8, 5), generator=generator)
        yield {"tokens": tokens, "mask": tokens == 0, "label": tokens[:, 0] % 3}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "own.py").write_text(FILE)
    (folder / "texts.py").write_text(TEXTS)
    return folder


@pytest.fixture(scope="module")
def code(folder: Path) -> dict:
    """What is in the files, for answers without the toolkit."""
    scope: dict = {}
    exec(TEXTS, scope)
    exec(FILE.replace("from texts import texts\n", ""), scope)
    return scope


def run(command, folder: Path, model: str, task: str, *words: object) -> int:
    return command.main([f"{folder}/own.py:{model}", f"{folder}/own.py:{task}", *map(str, words)])


def record(path: Path) -> dict:
    return json.loads(path.with_suffix(".json").read_text())


def right(model: nn.Module, code: dict) -> float:
    with torch.no_grad():
        pairs = [(model(x["tokens"], x["mask"]), x["label"]) for x in code["texts"](1, 4)]
    return float(torch.cat([x.argmax(1) == y for x, y in pairs]).double().mean())


# ------------------------------------------------------------------------------------ one model


@pytest.mark.parametrize(
    "words", ["quant --wbits 3", "quant --wbits 4 --abits 4", "nmprune", "unstr --sparsity 0.5"]
)
@pytest.mark.parametrize("sequential", ["", "--sequential"])
def test_figures_of_one_model_are_those_of_plain_pytorch(
    words: str, sequential: str, folder: Path, code: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "one.pth"
    more = [*words.split(), *sequential.split(), "--save", path, "--restart"]
    assert run(main_trueobs, folder, "reader", "classes", *more) == 0
    lines, log = capsys.readouterr()
    model, dense = code["reader"]().eval(), code["reader"]().eval()
    if "abits" not in words:
        model.load_state_dict(torch.load(path, weights_only=True), strict=False)
        assert lines.splitlines()[-1] == f"right {right(model, code):.4f}"
        with torch.no_grad():
            outputs = [
                [one(x["tokens"], x["mask"]).double().log_softmax(1) for x in code["texts"](1, 4)]
                for one in (model, dense)
            ]
        ours, theirs = map(torch.cat, outputs)
        kl = (theirs.exp() * (theirs - ours)).sum(1).mean()
        assert record(path)["kl"] == pytest.approx(float(kl), rel=1e-3)
        agreement = (ours.argmax(1) == theirs.argmax(1)).double().mean()
        assert record(path)["agreement"] == pytest.approx(100 * float(agreement))
    assert lines.splitlines()[-2] == "of 32.0000"
    assert record(path)["figures"].keys() == {"right", "of"} and "top1" not in record(path)
    with torch.no_grad():
        batches = list(code["texts"](0, 6))
        scores = torch.cat([dense(x["tokens"], x["mask"]) for x in batches])
    loss = nn.functional.cross_entropy(scores, torch.cat([x["label"] for x in batches]))
    assert record(path)["dense_loss_calibration"] == pytest.approx(float(loss), rel=1e-5)
    assert f"dense: loss {loss:.4g} on 48 calibration examples" in log
    assert "always runs as a whole" not in log  # it was traced, keyword arguments and all
    assert {x["name"] for x in record(path)["layers"]} >= {"block.self_attn.q_proj", "last"}


def test_hessians_are_those_of_a_batch(folder: Path, code: dict) -> None:
    """With every weight gone, the squared error is that of the outputs."""
    path = folder / "zero.pth"
    words = ["nmprune", "--prunen", 4, "--prunem", 4, "--only", "one", "--save", path]
    assert run(main_trueobs, folder, "scale", "numbers", *words) == 0
    model, batches = code["scale"](), list(code["numbers"]().calibration())
    with torch.no_grad():
        x = torch.cat([left + 2 * right for left, right in batches])
        outputs = x @ model.one.weight.T
    (layer,) = (x for x in record(path)["layers"] if x["name"] == "one")
    assert layer["squared_error"] == pytest.approx(float(outputs.square().sum() / 64), rel=1e-4)
    assert record(path)["figures"].keys() == {"distance"} and "kl" not in record(path)


def test_check_nsamples_and_other_reports(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["quant", "--wbits", "4", "--nsamples", "20", "--check"]
    assert run(main_trueobs, folder, "reader", "classes", *words) == 0
    log = capsys.readouterr().err
    assert "on 24 calibration examples" in log  # whole batches of 8
    assert "last checked" in log and "on no others" in log
    assert run(main_trueobs, folder, "reader", "classes", "layers") == 0
    lines = capsys.readouterr().out.splitlines()
    (words,) = (line.split() for line in lines if line.startswith("block.linear1"))
    assert words[1:6] == ["Linear", "32×16", "16", "5", f"{2 * 5 * 32 * 16 / 1e6:.3g}"]
    assert any(line.startswith("in no layer: words.weight (Embedding)") for line in lines)
    assert run(main_trueobs, folder, "scale", "no_loss", "dense") == 0
    lines, log = capsys.readouterr()
    assert lines.startswith("mean ") and "dense: loss" not in log
    assert run(main_trueobs, folder, "reader", "classes", "quant", "--wbits", 4, "--plan") == 0


# ------------------------------------------------------------------------- databases, corrections


@pytest.mark.parametrize(("model", "task"), [("reader", "classes"), ("scale", "numbers")])
def test_databases_scores_profiles_and_corrections(
    model: str, task: str, folder: Path, code: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    place = folder / model
    grid = ["--max-sparsity", 0.6, "--delta-sparse", 0.3, "--sparse-dir", place / "models_unstr"]
    assert run(main_trueobs, folder, model, task, "unstr", *grid) == 0
    scores = ["--prefix", place, "--score_path", place / "scores"]
    for errors in ("squared", "loss"):
        assert run(database, folder, model, task, "unstr", errors, *scores) == 0
    measured = (place / "scores" / f"{model}_unstr_loss.txt").read_text()
    if model == "scale":  # one layer at its last level, in plain PyTorch
        level = max(place.glob("models_unstr/*.pth"))
        plain, changed = code["scale"]().eval(), code["scale"]().eval()
        state = torch.load(level, weights_only=True)
        changed.one.load_state_dict({x: state[f"one.{x}"] for x in ("weight", "bias")})
        batches, numbers = list(code["numbers"]().calibration()), code["numbers"]()
        with torch.no_grad():
            ours, theirs = (
                sum(float(numbers.loss(one(*x), x)) for x in batches) / 4
                for one in (changed, plain)
            )
        lines = measured.split("one\n")[1].splitlines()
        value = next(line for line in lines if line.endswith(level.stem[-4:])).split()[0]
        assert float(value) == pytest.approx(ours - theirs, rel=1e-3, abs=1e-6)
    for method in (["--dp"], []):
        assert run(spdy, folder, model, task, 1.5, "unstr", *scores, *method) == 0
    assert run(database, folder, model, task, "unstr", "eval", "--prefix", place) == 0
    profile = place / f"{model}_unstr_150x_dp.txt"
    tuned = ["--bnt"] if model == "scale" else ["--statcorr"]
    for corrections in (
        [*tuned, "--gap", "--gap-epochs", 2, "--finetune"],
        ["--resolve", "--lintune", "--lintune-loss", "--lintune-epochs", 1],
        ["--lintune", "--lintune-epochs", 2, "--skip", "*two*" if model == "scale" else "last"],
    ):
        words = [profile, "--database", "unstr", "--prefix", place, *corrections]
        path = place / "corrected.pth"
        capsys.readouterr()
        assert run(post_proc, folder, model, task, *words, "--save", path, "--restart") == 0
        corrected = code[model]().eval()
        corrected.load_state_dict(torch.load(path, weights_only=True))
        line = capsys.readouterr().out.splitlines()[-1]
        if model == "reader":
            assert line == f"right {right(corrected, code):.4f}"
        else:
            with torch.no_grad():
                distance = code["numbers"]().evaluate(corrected)["distance"]
            assert line == f"distance {distance:.4f}"
    losses = [x for x in record(path)["corrections"] if x["name"] == "lintune"][0]["losses"]
    assert losses[-1] < losses[0]


def test_an_interrupted_run_resumes_on_the_same_batches_only(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = folder / "resumed"
    place.mkdir()
    for name in ("own.py", "texts.py"):
        (place / name).write_text((folder / name).read_text())
    words = ["quant", "--wbits", 4, "--save", place / "one.pth"]
    assert run(main_trueobs, place, "reader", "classes", *words) == 0
    fingerprint = record(place / "one.pth")["fingerprint"]
    assert {"code of the task", "calibration batches"} <= fingerprint.keys()
    repeat = ["--repeat", place / "one.json", "--save", place / "two.pth"]
    assert main_trueobs.main([*map(str, repeat)]) == 0
    one, two = (torch.load(place / f"{x}.pth", weights_only=True) for x in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)


# ------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("task", "words", "message"),
    [
        ("numbers", "--image-size 8", "--image-size is for images"),
        ("numbers", "--classes x.txt", "--classes is for images"),
        ("numbers", "--nrounds 3", "--nrounds counts augmented passes"),
        ("wrong_kind", "", "returned a dict; it has to return a Task"),
        ("missing", "", "no function missing in it"),
        ("broken", "", "broken: evaluate(): ZeroDivisionError"),
        ("empty", "", "empty: calibration() has no batches"),
        ("no_numbers", "", "evaluate() has to return a dictionary of numbers"),
        ("classes", "", "Scale.forward"),
    ],
)
def test_what_does_not_fit_is_one_line(
    task: str, words: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(main_trueobs, folder, "scale", task, "quant", "--wbits", 4, *words.split()) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_what_needs_a_loss_or_images_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "quantised.pth"
    words = ["quant", "--wbits", 4, "--save", path]
    assert run(main_trueobs, folder, "scale", "numbers", *words) == 0
    assert "KL and agreement are not measured" in capsys.readouterr().err
    for command, task, more, message in (
        (post_proc, "no_loss", ["--finetune"], "no_loss: this needs a loss"),
        (export, "numbers", ["--to", folder / "a.onnx"], "this needs a dataset of images"),
    ):
        assert run(command, folder, "scale", task, path, *more) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


# ------------------------------------------------------------------------------------- the pieces


def test_built_in_datasets_are_tasks() -> None:
    task = ImageTask(load_data("digits", nsamples=24), batchsize=10, workers=None, seed=0)
    assert isinstance(task, Task) and task.logits and task.has_loss
    batch = next(iter(task.calibration()))
    scores = torch.randn(10, 10)
    expected = nn.functional.cross_entropy(scores, batch[1])
    assert task.loss(scores, batch) == task.loss(scores, batch[1]) == expected
    assert torch.equal(task.inputs(batch), batch[0])
    assert (task.count, len(task.batches())) == (24, 3)

    class Right(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, images: Tensor) -> Tensor:
            return torch.eye(10)[torch.zeros(len(images), dtype=torch.long)]

    labels = torch.cat([labels for _, labels in task.tests()])
    share = float((labels == 0).double().mean())
    assert task.evaluate(Right()) == {"top1": pytest.approx(100 * share)}


def test_arguments_are_called_as_they_are_named() -> None:
    x, y = torch.arange(6.0).view(3, 2), torch.ones(4, 4)

    def model(first: Tensor, second: Tensor, flag: bool = False) -> tuple:
        return first, second, flag

    assert call(model, as_inputs((x, y), "t")) == (x, y, False)
    arguments = as_inputs({"second": y, "first": x, "flag": True}, "t")
    assert call(model, arguments)[2] and len(arguments) == 4  # the first tensor of the dictionary
    moved = arguments.to(torch.device("cpu"), copy=True)
    assert moved.tensors[0] is not y and torch.equal(moved.tensors[0], y)
    for wrong in (3, "text", (), {"flag": True}, (torch.tensor(1.0),)):
        with pytest.raises(UserError, match="t: "):
            as_inputs(wrong, "t")


def test_batches_are_merged_where_their_sizes_allow_it() -> None:
    a, b, mask = torch.ones(2, 3), torch.zeros(4, 3), torch.eye(3)
    assert torch.equal(merged([a, b]), torch.cat([a, b]))
    whole = merged([Arguments((a,), {"mask": mask}), Arguments((b,), {"mask": mask})])
    assert torch.equal(whole.args[0], torch.cat([a, b])) and whole.kwargs["mask"] is mask
    assert merged([a, torch.zeros(4, 5)]) is None
    assert merged([Arguments((a,), {"mask": mask}), Arguments((b,), {"mask": a})]) is None


def test_a_model_of_several_arguments_is_traced(code: dict) -> None:
    """None is not given, a flag is fixed, tensors are free."""
    model = code["reader"]().eval()
    batches = TaskBatches(code["classes"](), list(code["texts"](0, 2)))
    (first, _), (second, _) = batches
    with torch.inference_mode():
        traced = resumable(model, first)
        assert isinstance(traced, TracedModel)
        traced.begin(second)
        torch.testing.assert_close(traced.finish(), call(model, second))
