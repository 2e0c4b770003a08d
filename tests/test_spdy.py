"""search.py on synthetic evaluations, and spdy.py on the small network that is shipped."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

import database
import main_trueobs
import spdy
from obc.solver import dp, errors, search
from obc.toolkit import profiles, resume
from obc.toolkit.costs import Costs

ROOT = Path(__file__).resolve().parents[1]


# ------------------------------------------------------------------------ synthetic searches


@pytest.fixture(autouse=True)
def short_search(monkeypatch):
    monkeypatch.setattr(search, "RANDOM_VECTORS", 12)
    monkeypatch.setattr(search, "TRIES", 6)


def make_problem(seed=0, layers=20, levels=6, target=3.0):
    rng = np.random.default_rng(seed)
    size, density = rng.lognormal(0, 1, layers), 0.6 ** np.arange(levels)
    return search.ProfileProblem(
        levels={f"layer{i}": [f"{k:04d}" for k in range(levels)] for i in range(layers)},
        costs=[s * density for s in size],
        errors=[scale * (1 - density) ** 2 for scale in rng.lognormal(-2, 1, layers)],
        dense=math.fsum(size),
        target=target,
    )


class Loss:
    """A loss that is not the sum of the errors; counts and, when told to, is interrupted."""

    def __init__(self, problem, stop_before=math.inf):
        rng = np.random.default_rng(7)
        self.true = [e * rng.uniform(0.2, 5) for e in problem.errors]
        self.seen, self.stop_before = [], stop_before

    def __call__(self, picks):
        if len(self.seen) == self.stop_before:
            raise KeyboardInterrupt
        self.seen.append(tuple(picks))
        each = [e[p] for e, p in zip(self.true, picks, strict=True)]
        return sum(each) + 3 * sum(a * b for a, b in zip(each, each[1:], strict=False))


def run_search(problem, loss, seed=0):
    state = search.SearchState.start(len(problem.levels), seed)
    return search.search(problem, loss, state, lambda state: None)


def test_the_search_is_better_than_the_plain_programme_and_fits():
    problem = make_problem()
    loss = Loss(problem)
    state = run_search(problem, loss)
    plain = problem.solve().levels
    assert loss.seen[0] == tuple(plain)
    assert state.loss < state.losses[search.picks_key(plain)] == state.history[0][1]
    assert problem.solve(state.coefficients).levels == state.picks
    assert Loss(problem)(state.picks) == state.loss
    assert problem.cost(state.picks) <= problem.budget
    assert all(0 <= a <= 1 for a in state.coefficients)


def test_no_profile_is_evaluated_twice():
    loss = Loss(problem := make_problem(layers=4))
    state = run_search(problem, loss)
    assert len(set(loss.seen)) == len(loss.seen) == len(state.losses) < state.candidates


def test_the_seed_decides():
    problem = make_problem()
    states = [asdict(run_search(problem, Loss(problem), seed)) for seed in (0, 0, 1)]
    assert states[0] == states[1] != states[2]


def test_local_search_draws_fewer_and_fewer_coefficients_until_nothing_improves():
    problem = make_problem()
    generator = np.random.default_rng(0)
    state = search.SearchState.start(20, 0)
    assert state.resampled == 2
    drawn = []
    while state.resampled:
        coefficients = search.next_coefficients(state, 20, generator)
        drawn.append(sum(a != b for a, b in zip(coefficients, state.coefficients, strict=False)))
        search.advance(
            state,
            coefficients,
            problem.solve(coefficients).levels,
            1.0 if len(drawn) != 15 else 0.5,
        )
    # 12 vectors; then 2 misses, a hit (the 15th), 6 misses with 2 coefficients, and 6 with 1
    assert drawn[12:] == [2] * 9 + [1] * 6
    assert state.history == [[1, 1.0], [15, 0.5]]


def kept_search(problem, loss, folder):
    """A search that goes on from the state in a folder."""
    with resume.open_state(folder, {"MODEL": "rn8"}) as kept:
        return spdy.run_search(ByPicks(problem), loss, kept, seed=0)


class ByPicks(search.ProfileProblem):
    """A problem whose profiles are its picks, as the synthetic losses want them."""

    def __init__(self, problem):
        super().__init__(
            **{x.name: getattr(problem, x.name) for x in fields(search.ProfileProblem)}
        )

    def profile(self, choice):
        return choice


def test_interrupted_at_every_evaluation_it_ends_the_same(tmp_path):
    problem = make_problem()
    whole = Loss(problem)
    expected = run_search(problem, whole)
    seen = []
    for _ in range(10_000):
        loss = Loss(problem, stop_before=1)
        try:
            state = kept_search(problem, loss, tmp_path / "state")
            break
        except KeyboardInterrupt:
            assert len(loss.seen) == 1
        finally:
            seen += loss.seen
    assert asdict(state) == asdict(expected)
    assert seen == whole.seen


def test_losses_that_are_not_finite_are_never_the_best(tmp_path):
    problem = make_problem()
    first = tuple(problem.solve().levels)
    state = run_search(problem, lambda picks: math.nan if tuple(picks) == first else 1.0)
    assert state.loss == 1 and state.losses[search.picks_key(first)] is None
    with resume.open_state(tmp_path / "state", {}) as kept:
        kept.save("search", {}, asdict(state))
        assert search.SearchState(**kept.load("search").figures) == state
    with pytest.raises(errors.UserError, match="no candidate has a finite"):
        run_search(problem, lambda picks: math.inf)


# ------------------------------------------------------------------------------- the problem


COSTS = Costs({"a": 8.0, "b": 2.0}, {"a": {"0": 8.0, "5": 4.0}, "b": {"0": 2.0, "5": 1.0}})


def problem_of(scores, target=1.5, costs=COSTS):
    return search.profile_problem(["0", "5"], costs, scores, Path("scores.txt"), target, 100)


def test_costs_and_scores_become_a_problem(caplog):
    problem = problem_of({"b": {"5": 0.1, "0": 0.0}, "a": {"0": math.nan, "5": 1.0}})
    assert problem.budget == 10 / 1.5 and list(problem.levels) == ["a", "b"]
    assert "a: never chosen, its score is not finite: 0" in caplog.text
    assert problem.profile(problem.solve().levels) == {"a": "5", "b": "0"}
    assert problem.profile(problem.solve([0.0, 0.0]).levels) == {"a": "5", "b": "5"}


def test_a_target_out_of_reach_names_one_that_can_be_reached():
    good = {"a": {"0": 0.0, "5": 1.0}, "b": {"0": 0.0, "5": 1.0}}
    with pytest.raises(
        errors.UserError, match=r"target 3 cannot be reached .* the largest .* is 2$"
    ):
        problem_of(good, target=3.0).solve()
    assert problem_of(good, target=2.0).solve().levels == [1, 1]
    third = Costs({"a": 10.0, "b": 1.0}, {"a": {"0": 9.0, "5": 3.0}, "b": {"0": 1.0, "5": 0.0}})
    with pytest.raises(errors.UserError, match=r"the largest that can is 3.6666$"):
        problem_of(good, target=3.7, costs=third).solve()
    assert problem_of(good, target=3.6666, costs=third).solve().levels == [1, 1]


@pytest.mark.parametrize(
    ("scores", "costs", "message"),
    [
        ({"a": {"0": 0.0, "5": 1.0}}, COSTS, "scores.txt: no score of b at level 0"),
        (
            {"a": {"0": 0.0}, "b": {"0": 0.0, "5": 1.0}},
            COSTS,
            "scores.txt: no score of a at level 5",
        ),
        (
            {"a": {"0": math.inf, "5": math.nan}, "b": {"0": 0.0, "5": 1.0}},
            COSTS,
            "a: no level has a finite score",
        ),
        (
            {"a": {"0": 0.0}},
            Costs({"a": 1.0}, {"a": {"0": -1.0, "5": 0.0}}),
            "scores.txt: no score",
        ),
        (
            {"a": {"0": 0.0, "5": 0.0}},
            Costs({"a": 1.0}, {"a": {"0": 1.0, "5": -1.0}}),
            "a: a cost is negative",
        ),
        (
            {"a": {"0": 0.0, "5": 0.0}},
            Costs({"a": 0.0}, {"a": {"0": 0.0, "5": 0.0}}),
            "nothing to compress",
        ),
    ],
)
def test_scores_and_costs_that_do_not_fit(scores, costs, message):
    with pytest.raises(errors.UserError, match=message):
        problem_of(scores, costs=costs).solve()


def test_profiles_of_other_databases_are_refused():
    problem = problem_of({"a": {"0": 0.0, "5": 1.0}, "b": {"0": 0.0, "5": 1.0}})
    assert problem.picks({"b": "5", "a": "0"}, "p.txt") == [0, 1]
    for profile, message in (
        ({"a": "0"}, "p.txt: no level for layer b"),
        ({"a": "0", "c": "0"}, "p.txt: layer c is not in the database"),
        ({"a": "9", "b": "0"}, "p.txt: level 9 of a is not in the database"),
    ):
        with pytest.raises(errors.UserError, match=message):
            problem.picks(profile, "p.txt")


# --------------------------------------------------------------------- batch-norm statistics


def test_batch_norms_get_the_averages_of_the_batches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5)).eval()
    batches = [(torch.randn(8, 3) + i, torch.zeros(8)) for i in range(4)]
    batches.append((torch.full((1, 3), 100.0), torch.zeros(1)))  # one image: no variance
    spdy.batchnorm_averages(model, batches, torch.device("cpu"))
    several = [images for images, _ in batches[:4]]
    mean = torch.stack([x.mean(0) for x in several]).mean(0)
    variance = torch.stack([x.var(0) for x in several]).mean(0)
    torch.testing.assert_close(model[0].running_mean, mean)
    torch.testing.assert_close(model[0].running_var, variance)
    assert not model.training and not model[0].training and model[0].momentum == 0.1
    with pytest.raises(errors.UserError, match="two images or more"):
        spdy.batchnorm_averages(model, batches[4:], torch.device("cpu"))


# ------------------------------------------------------------------------------- the command


COMMON = ["--nsamples", "48", "--batchsize", "24"]


@pytest.fixture(scope="session")
def small_database(tmp_path_factory) -> Path:
    """A folder with a database of rn8 in three levels, and its scores."""
    folder = tmp_path_factory.mktemp("rn8")
    log = logging.getLogger("trueobs")
    handlers, level = list(log.handlers), log.level
    grid = ["--min-sparsity", "0", "--max-sparsity", "0.9", "--delta-sparse", "0.6"]
    words = ["unstr", "--sparse-dir", str(folder / "models_unstr"), "--noaug", *grid]
    assert main_trueobs.main(["rn8", "digits", *words, *COMMON]) == 0
    for mode in ("loss", "spdy"):
        words = ["unstr", mode, "--prefix", str(folder), "--score_path", str(folder / "scores")]
        assert database.main(["rn8", "digits", *words, *COMMON]) == 0
    log.handlers[:], log.level = handlers, level
    return folder


@pytest.fixture
def workplace(small_database, tmp_path, monkeypatch) -> Path:
    """A current folder with the database and its scores in it."""
    for name in ("models_unstr", "scores"):
        (tmp_path / name).symlink_to(small_database / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*words: str) -> int:
    return spdy.main(["rn8", "digits", *words, *COMMON])


def results(capsys) -> dict[str, str]:
    """Result lines by all but their last word."""
    lines = capsys.readouterr().out.splitlines()
    return dict(line.rsplit(" ", 1) for line in lines)


def test_the_programme_from_end_to_end(workplace, capsys):
    assert command("2", "unstr", "--dp") == 0
    found = results(capsys)
    assert found["target"] == "2" and float(found["reached"]) >= 2
    assert float(found["discretisation error at most"]) >= 0
    assert found["profile"] == "rn8_unstr_200x_dp.txt"
    profile = profiles.read_profile("rn8_unstr_200x_dp.txt")
    db = database.Database.open("unstr", "rn8")
    assert list(profile) == db.layers and set(profile.values()) <= set(db.levels)
    record = json.loads(Path("rn8_unstr_200x_dp.json").read_text())
    assert record["cost"] <= record["budget"] == record["dense_cost"] / 2
    assert math.isclose(sum(layer["cost"] for layer in record["layers"]), record["cost"])
    assert record["arguments"]["constr"] == "flops" and record["arguments"]["errors"] == "loss"
    assert {layer["name"]: layer["level"] for layer in record["layers"]} == profile


def test_scores_of_another_database_are_refused(workplace, capsys):
    """The same command is right with the levels that the scores were measured on, only."""
    assert command("2", "unstr", "--dp") == 0
    original = (workplace / "models_unstr").resolve()
    (workplace / "models_unstr").unlink()
    shutil.copytree(original, workplace / "models_unstr")
    capsys.readouterr()
    path = Path("models_unstr/rn8_6000.pth")
    state = torch.load(path, weights_only=True)
    state["linear.weight"] *= 1.5  # as another calibration might have it; the mark stays
    torch.save(state, path)
    for words in (["2", "unstr", "--dp"], ["2", "unstr"], ["2", "unstr", "--errors", "spdy"]):
        assert command(*words) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and str(path) in err and "scores/rn8_unstr_" in err
    profile = "rn8_unstr_200x_dp.txt"
    chosen = "6000 linear" in Path(profile).read_text()
    words = ["stitch", "--profile", profile, *COMMON]
    assert database.main(["rn8", "digits", "unstr", *words]) == (2 if chosen else 0)


@pytest.mark.parametrize("options", [[], ["--errors", "spdy"], ["--nobatchnorm"], ["--statcorr"]])
def test_the_search_from_end_to_end(options, workplace, capsys):
    assert command("2.5", "unstr", *options) == 0
    record = json.loads(Path("rn8_unstr_250x_spdy.json").read_text())
    assert record["loss"] <= record["dp_loss"] == record["history"][0][1]
    assert record["cost"] <= record["budget"]
    assert results(capsys)["profile"] == "rn8_unstr_250x_spdy.txt"
    assert not list(workplace.glob(".*"))  # no state, no half-written file
    assert command("2.5", "unstr", *options, "--score", "rn8_unstr_250x_spdy.txt") == 0
    found = results(capsys)
    assert found["calibration loss"] == f"{record['loss']:.6f}"
    assert found["objective"] == f"{record['objective']:.6g}"


def test_an_evaluation_leaves_the_dense_model_alone(workplace):
    args = spdy.build_parser().parse_args(["rn8", "digits", "2", "unstr", *COMMON])
    session, db = spdy.Session.of(spdy.common_options(args)), database.Database.open("unstr", "rn8")
    before = copy.deepcopy(session.model.state_dict())
    evaluator = spdy.Evaluator(session, db)
    losses = [evaluator(dict.fromkeys(db.layers, level)) for level in (*db.levels, db.levels[0])]
    assert losses[0] == losses[-1] != losses[1]
    for key, tensor in session.model.state_dict().items():
        assert torch.equal(tensor, before[key]), key


def test_interrupted_and_continued_the_command_writes_the_same(workplace, capsys, monkeypatch):
    assert command("3", "unstr") == 0
    expected = Path("rn8_unstr_300x_spdy.txt").read_text()
    record = json.loads(Path("rn8_unstr_300x_spdy.json").read_text())
    Path("rn8_unstr_300x_spdy.txt").unlink()
    evaluate, calls = spdy.Evaluator.__call__, []

    def interrupted(self, profile):
        calls.append(profile)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return evaluate(self, profile)

    monkeypatch.setattr(spdy.Evaluator, "__call__", interrupted)
    assert command("3", "unstr") == 130
    state = Path(".rn8_unstr_300x_spdy.txt.partial")
    assert state.exists() and not Path("rn8_unstr_300x_spdy.txt").exists()
    capsys.readouterr()
    assert command("3", "unstr", "--seed", "1") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "(--seed was 0, is now 1)" in error
    assert command("3", "unstr") == 0
    assert len(calls) == record["evaluations"] + 1 and not state.exists()
    assert Path("rn8_unstr_300x_spdy.txt").read_text() == expected
    again = json.loads(Path("rn8_unstr_300x_spdy.json").read_text())
    for key in ("loss", "history", "coefficients", "candidates"):
        assert again[key] == record[key]


def evaluations(state):
    with safe_open(state, "pt") as file:
        return len(json.loads(file.metadata()["figures"])["losses"])


@pytest.mark.slow
def test_killed_in_the_middle_the_search_continues(workplace, monkeypatch):
    monkeypatch.undo()  # the constants as they are, for this process too
    words = ["rn8", "digits", "3", "unstr", *COMMON, "--device", "cpu"]
    run = [sys.executable, str(ROOT / "spdy.py"), *words]
    state = workplace / ".rn8_unstr_300x_spdy.txt.partial" / "search.safetensors"
    with subprocess.Popen(run, cwd=workplace, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if state.exists() and evaluations(state) > 5:
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.01)
    assert process.returncode == -signal.SIGKILL
    assert not list(workplace.glob("rn8_*"))
    monkeypatch.chdir(workplace)
    assert spdy.main(words) == 0
    continued = json.loads(Path("rn8_unstr_300x_spdy.json").read_text())
    assert spdy.main(words) == 0
    whole = json.loads(Path("rn8_unstr_300x_spdy.json").read_text())
    assert continued["history"] == whole["history"]
    assert continued["layers"] == whole["layers"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["0", "unstr"], "TARGET must be a number above 0; got 0"),
        (["2", "blocked"], "DATABASE: invalid choice: 'blocked'"),
        (["2", "unstr", "--dpbuckets", "0"], "--dpbuckets must be a whole number from 1; got 0"),
        (["2", "unstr", "--dp", "--score", "x"], "--score FILE scores a profile, --dp makes one"),
        (["2", "unstr", "--constr", "timingsq"], "--timings FILE goes with --constr timingsq"),
        (["2", "unstr", "--constr", "flops", "--timings", "x"], "--timings FILE goes with"),
        (["2", "mixed", "--dp"], "no mixed database of rn8"),
        (
            ["2", "unstr", "--dp", "--errors", "squared"],
            "scores/rn8_unstr_squared.txt: no such file; "
            "make it with python database.py rn8 digits unstr squared",
        ),
        (["1000", "unstr"], "target 1000 cannot be reached with this database; the largest"),
        (["2", "unstr", "--score", "nowhere.txt"], "nowhere.txt: cannot be read"),
    ],
)
def test_mistakes_are_one_line_and_status_2(words, message, workplace, capsys):
    try:
        status = command(*words)
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2 and "Traceback" not in error
    assert error.splitlines()[-1].startswith(f"error: {message}")
    assert not list(workplace.glob("*.txt")) and not list(workplace.glob(".*"))


def test_defaults_of_the_recipes():
    for words, constr in (
        (["2", "unstr", "--dp"], "flops"),
        (["8", "mixed", "--dp"], "bops"),
        (["2", "4block"], "flops"),
        (["4", "4block_8w8a"], "bops"),
        (["2", "4block", "--timings", "seconds.txt"], "timingsq"),
        (["2", "unstr", "--constr", "params"], "params"),
    ):
        args = spdy.build_parser().parse_args(["rn18", "imagenet", *words])
        spdy.check_options(args)
        assert args.constr == constr and args.errors == "loss" and args.dpbuckets == dp.BUCKETS


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("2", "rn8_unstr_200x_dp.txt"),
        ("2.3", "rn8_unstr_230x_dp.txt"),
        ("2.005", "rn8_unstr_200.5x_dp.txt"),
        ("16", "rn8_unstr_1600x_dp.txt"),
    ],
)
def test_names_of_profiles(target, name):
    path = spdy.profile_file("there", "rn8", "unstr", float(target), "dp")
    assert path == Path("there") / name
    path = spdy.profile_file("there", "nets/mine.py:net", "unstr", float(target), "dp")
    assert path.name == name.replace("rn8", "net")
