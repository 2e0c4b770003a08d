"""Interrupted, killed, damaged, cached and repeated runs give the results of undisturbed ones.

To the bit; or they say in one line why they do not."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import database
import main_trueobs
import post_proc
import spdy
from modelutils import SHIPPED_WEIGHTS, load_checkpoint
from obc.solver import hessian
from obc.toolkit import compress, fingerprints, records, training
from trueobs import TrueOBS

QUICK = ["--nsamples", "64", "--batchsize", "32", "--noaug", "--device", "cpu"]
SCRIPTS = {"main_trueobs": main_trueobs, "database": database, "post_proc": post_proc, "spdy": spdy}
LAYERS = 8  # of rn8
NM = "main_trueobs nmprune --save nm.pth"
QUANT = "main_trueobs quant --wbits 4 --abits 4 --load start.pth --save q.pth"
SEQUENTIAL = "main_trueobs quant --wbits 3 --abits 4 --sequential --save s.pth"
UNSTR = "main_trueobs unstr --delta-sparse 0.5 --sparse-dir models_unstr"
STRUCT = "main_trueobs struct --delta-sparse 0.5 --sparse-dir models_struct"
GAP = "post_proc start.pth --gap --gap-epochs 6 --finetune --bnt --save gap.pth"
LOSS, SQUARED = "database unstr loss", "database unstr squared"
EVALUATION, SEARCH = "database unstr eval", "spdy 2 unstr"


def words_of(line: str) -> tuple[str, list[str]]:
    script, *words = line.split()
    return script, ["rn8", "digits", *words, *QUICK]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands' inputs: a database, losses and a checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("made"))
        for line in (UNSTR, "main_trueobs nmprune --save start.pth", LOSS):
            script, words = words_of(line)
            assert SCRIPTS[script].main(words) == 0
        return Path.cwd()


@pytest.fixture
def work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "work"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, list[str]]]:
    """Run a line with more words: status, standard output, lines of standard error."""

    def run(line: str, *more: object) -> tuple[int, str, list[str]]:
        script, words = words_of(line)
        capfd.readouterr()
        try:
            status = SCRIPTS[script].main([*words, *map(str, more)])
        except SystemExit as stop:
            status = stop.code
        out, err = capfd.readouterr()
        return status, out, err.splitlines()

    return run


def contents(folder: Path) -> dict[str, bytes]:
    """The contents of all files but records, by name; of hidden ones, only that they exist."""
    files = {}
    for path in (path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if ".partial" in name or ".tmp" in name:
            files[name] = b"hidden"
        elif path.suffix != ".json":
            files[name] = path.read_bytes()
    return files


@contextmanager
def interrupted(module: object, name: str, after: int) -> Iterator[list[str]]:
    """Inside, a function of a module is interrupted in its call number `after` + 1."""
    function, calls = getattr(module, name), []

    def counted(*args, **kwargs):
        calls.append(args[0])
        if len(calls) > after:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, counted)
        yield calls


# -- killed ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("line", [NM, QUANT, SEQUENTIAL, UNSTR, LOSS, GAP])
def test_a_run_that_is_killed_repeatedly_ends_the_same(line, work, warm, tmp_path):
    script, words = words_of(line)
    stderr, before = tmp_path / "stderr", contents(work)

    def start():
        process = warm.start(f"{script}.py", *words, folder=work, stderr=stderr)
        process.wait_for_work()
        return process

    process, begun = start(), time.monotonic()
    assert process.wait() == 0
    duration, expected = time.monotonic() - begun, contents(work)
    for name in expected.keys() - before.keys():
        (work / name).unlink()
    moments, ends = random.Random(line), []
    for _ in range(4):
        process = start()
        time.sleep(moments.uniform(0.2, 0.8) * duration)
        process.signal(signal.SIGKILL)
        ends.append(process.wait())
    assert start().wait() == 0, stderr.read_text()
    assert -signal.SIGKILL in ends
    assert contents(work) == expected


# -- interrupted -----------------------------------------------------------------------------------


@pytest.mark.parametrize("line", [NM, QUANT, UNSTR, STRUCT])
def test_only_the_unfinished_layers_are_compressed(line, work, command, monkeypatch):
    assert command(line)[0] == 0
    expected = contents(work)
    output = Path(line.split()[-1])
    with interrupted(compress, "compress_layer", 3):
        status, _, err = command(line, "--restart")
    assert status == 130 and err[-1] == "error: interrupted"
    calibrated = []
    calibrate = compress.calibrate
    monkeypatch.setattr(
        compress,
        "calibrate",
        lambda dense, solvers, *rest: (
            calibrated.extend(solvers),
            calibrate(dense, solvers, *rest),
        ),
    )
    one_by_one = lambda needs, memory: [[name] for name in needs]  # noqa: E731
    monkeypatch.setattr("obc.toolkit.planning.in_passes", one_by_one)
    status, _, err = command(line, "--memory", "0.02")  # in many passes, and to the same bits
    assert status == 0 and "resuming: 3 of 8 layers are done" in err
    assert len(calibrated) == LAYERS - 3 and len([x for x in err if x.startswith("pass ")]) > 1
    assert contents(work) == expected
    record = output / "rn8.json" if output.suffix == "" else output.with_suffix(".json")
    assert len(json.loads(record.read_text())["layers"]) == LAYERS


@pytest.mark.parametrize(
    ("line", "module", "name", "after", "said"),
    [
        (LOSS, "sensitivity", "summed_loss", 40, "layers × batches are done"),
        (SQUARED, "sensitivity", "batch_squares", 1, "resuming: 1 of 2 batches are done"),
        (GAP, "post_proc", "batchnorm_tune", 0, "resuming: gap is done"),
    ],
)
def test_what_is_measured_is_not_measured_again(
    line, module, name, after, said, work, command, monkeypatch
):
    from obc.toolkit import sensitivity

    monkeypatch.setattr("obc.toolkit.resume.SECONDS_BETWEEN_NOTES", 0.0)
    assert command(line)[0] == 0
    expected = contents(work)
    module = {"sensitivity": sensitivity, "post_proc": post_proc}[module]
    with interrupted(module, name, after):
        assert command(line)[0] == 130
    with interrupted(module, name, 10**9) as calls:
        status, _, err = command(line)
    assert status == 0 and any(said in x for x in err), err
    assert contents(work) == expected
    if line == SQUARED:
        assert len(calls) == 1


def test_an_evaluation_of_levels_goes_on(work, command, monkeypatch):
    status, expected, _ = command(EVALUATION)
    assert status == 0
    with interrupted(database.Session, "evaluation", 3):
        assert command(EVALUATION)[0] == 130
    with interrupted(database.Session, "evaluation", 10**9) as calls:
        status, out, err = command(EVALUATION)
    levels = len(expected.splitlines()) - 1
    assert (status, out) == (0, expected) and len(calls) == levels - 3
    assert f"resuming: 3 of {levels} levels are done" in err


@pytest.mark.parametrize("after", [1, 4])
def test_a_training_goes_on_with_its_next_epoch(after, work, command, monkeypatch):
    line = "post_proc start.pth --lintune --lintune-epochs 5 --save tuned.pth"
    assert command(line)[0] == 0
    expected = contents(work)
    monkeypatch.setattr(training, "SECONDS_BETWEEN_SAVES", 0.0)
    save, saved = training.save_training, []

    def interrupt(*training_state):
        save(*training_state)
        saved.append(training_state)
        if len(saved) == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "save_training", interrupt)
    assert command(line)[0] == 130
    status, _, err = command(line)
    assert status == 0 and f"resuming: {after} epochs are done" in err
    assert len(saved) == 5 and contents(work) == expected


def test_asked_to_end_it_says_so(work, warm, tmp_path):
    script, words = words_of(UNSTR)
    process = warm.start(f"{script}.py", *words, folder=work, stderr=tmp_path / "stderr")
    process.wait_for_work()
    time.sleep(0.3)
    process.signal(signal.SIGTERM)
    assert process.wait() == 143
    lines = (tmp_path / "stderr").read_text().splitlines()
    assert lines[-1] == "error: terminated" and not any("Traceback" in x for x in lines)


# -- changed code -------------------------------------------------------------------------------


@pytest.fixture
def edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Fingerprints are of a copy of our code; a function that adds lines to a file of the copy."""
    code, copy = fingerprints.CODE_ROOT, tmp_path / "code"
    for pattern in ("*.py", "obc/**/*.py"):
        for path in code.glob(pattern):
            (copy / path.relative_to(code)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy / path.relative_to(code))
    monkeypatch.setattr(fingerprints, "CODE_ROOT", copy)

    def edited(name: str, addition: str) -> None:
        (copy / name).write_text((code / name).read_text() + addition)
        fingerprints.parsed.cache_clear()  # as in another process

    return edited


def test_a_run_is_not_resumed_with_other_kernels(work, command, edit):
    with interrupted(compress, "compress_layer", 3):
        assert command(NM)[0] == 130
    kernels = [f"obc/solver/{x.name}" for x in Path(hessian.__file__).parent.glob("*_cpu.py")]
    for name in kernels:
        edit(name, "# only words\n")
        with interrupted(compress, "compress_layer", 0):
            status, _, err = command(NM)
        assert status == 130 and "resuming: 3 of 8 layers are done" in err
        edit(name, "NEW = 1\n")
        status, _, err = command(NM)
        said = "error: .nm.pth.partial: holds an interrupted run that differs from this one"
        assert status == 2 and err[0].startswith(f"{said} (code changed): ") and len(err) == 1
        edit(name, "")
    assert kernels


def test_cached_hessians_count_unless_the_code_that_makes_them_changed(work, command, edit):
    assert command(NM, "--cache", "cache")[0] == 0
    reused = "calibrated before (--cache): 8 of 8 layers"
    for name, addition in (
        ("obc/solver/hessian.py", "# only words\n"),
        ("obc/solver/elimination.py", "# only words\n"),
        ("obc/solver/elimination.py", "NEW = 1\n"),
    ):
        edit(name, addition)
        assert reused in command(NM, "--cache", "cache")[2]
    edit("obc/solver/hessian.py", "NEW = 1\n")
    assert reused not in command(NM, "--cache", "cache")[2]


def test_a_run_is_not_resumed_under_other_switches(work, command, monkeypatch):
    monkeypatch.setenv("MKL_CBWR", "AUTO")
    with interrupted(compress, "compress_layer", 3):
        assert command(NM)[0] == 130
    for value, now in (("COMPATIBLE", "COMPATIBLE"), (None, "not set")):
        monkeypatch.setenv("MKL_CBWR", value) if value else monkeypatch.delenv("MKL_CBWR")
        status, _, err = command(NM)
        assert status == 2 and f"(MKL_CBWR was AUTO, is now {now})" in err[0]


# -- refused, damaged ------------------------------------------------------------------------------


def test_another_run_is_refused_and_told_the_difference(work, command):
    with interrupted(compress, "compress_layer", 2):
        assert command(QUANT)[0] == 130
    other = load_checkpoint(SHIPPED_WEIGHTS["rn8", "digits"])
    other["bn1.weight"] = other["bn1.weight"] * 2
    torch.save(other, "other.pth")
    before = contents(work)
    for more, said in [
        (["--wbits", "3"], "(--wbits was 4, is now 3): repeat that command"),
        (["--wasym"], "--wasym was off, is now on"),
        (["--seed", "1"], "--seed was 0, is now 1"),
        (["--nsamples", "65"], "--nsamples was 64, is now 65"),
        (["--weights", "other.pth", "--load", "other.pth"], "dense weights changed"),
        (["--load", "other.pth"], "--load changed"),
    ]:
        status, _, err = command(QUANT, *more)
        assert status == 2 and len(err) == 1 and err[0].startswith("error: .q.pth.partial: "), err
        assert said in err[0] and "--restart to start over" in err[0]
        assert contents(work) == before
    status, _, err = command(QUANT, "--wbits", "3", "--restart")
    assert status == 0 and not any("resuming" in x for x in err)


def test_a_damaged_layer_is_done_again(work, command):
    assert command(NM)[0] == 0
    expected = contents(work)
    with interrupted(compress, "compress_layer", 3):
        assert command(NM)[0] == 130
    path = work / ".nm.pth.partial" / "layer1.0.conv1.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    status, _, err = command(NM)
    assert status == 0 and "resuming: 2 of 8 layers are done" in err
    warning = "warning: .nm.pth.partial/layer1.0.conv1.safetensors: damaged; it is computed again"
    assert warning in err
    assert contents(work) == expected


def test_a_damaged_file_of_levels_is_done_again(work, command):
    assert command(UNSTR)[0] == 0
    expected = contents(work)
    with interrupted(compress, "compress_layer", 3):
        assert command(UNSTR)[0] == 130
    path = work / "models_unstr" / ".rn8.partial" / "layer1.0.conv1.levels"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    (path.parent / "conv1.levels").unlink()
    status, _, err = command(UNSTR)
    assert status == 0 and "resuming: 1 of 8 layers are done" in err
    for name in ("layer1.0.conv1", "conv1"):
        file = f"models_unstr/.rn8.partial/{name}.levels"
        assert f"warning: {file}: damaged; it is computed again" in err
    assert contents(work) == expected


def test_a_full_disk_is_a_line_and_the_run_goes_on_from_there(work, command, monkeypatch):
    assert command(NM)[0] == 0
    expected = contents(work)
    from obc.toolkit import resume

    save, saved = resume.RunState.save, []

    def full(state, key, *rest):
        saved.extend([key] if state.folder else [])
        if len(saved) == 4:
            raise OSError(28, "No space left on device", str(state.path(key)))
        return save(state, key, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(resume.RunState, "save", full)
        status, _, err = command(NM)
    assert status == 2 and err[-1].endswith(": No space left on device")
    status, _, err = command(NM)
    assert status == 0 and "resuming: 3 of 8 layers are done" in err
    assert contents(work) == expected


# -- cached ----------------------------------------------------------------------------------------


def test_a_cache_of_hessians_saves_the_calibration_and_changes_nothing(work, command, monkeypatch):
    assert command(NM)[0] == 0
    expected = (work / "nm.pth").read_bytes()
    assert command("main_trueobs quant --wbits 3 --save q.pth", "--cache", "cache")[0] == 0
    saved = list((work / "cache").rglob("*.safetensors"))
    assert len(saved) == LAYERS
    calibrated = []
    calibrate = compress.calibrate
    monkeypatch.setattr(
        compress,
        "calibrate",
        lambda dense, solvers, *rest: (
            calibrated.extend(solvers),
            calibrate(dense, solvers, *rest),
        ),
    )
    status, _, err = command(NM, "--cache", "cache")
    assert status == 0 and "calibrated before (--cache): 8 of 8 layers" in err
    assert not calibrated and (work / "nm.pth").read_bytes() == expected

    damaged = next(path for path in saved if path.stem == "layer2.0.conv1")
    content = bytearray(damaged.read_bytes())
    content[-9] ^= 1
    damaged.write_bytes(content)
    status, _, err = command(NM, "--cache", "cache")
    assert status == 0 and "calibrated before (--cache): 7 of 8 layers" in err
    assert calibrated == ["layer2.0.conv1"] and (work / "nm.pth").read_bytes() == expected
    for more in (["--seed", "1"], ["--nsamples", "63"], ["--batchsize", "64"]):
        calibrated.clear()
        assert command(NM, "--cache", "cache", *more)[0] == 0
        assert len(calibrated) == LAYERS, more


# -- checked ---------------------------------------------------------------------------------------

CHECKED = re.compile(r"(warning: )?(\S+) checked (\S+) \(claimed (\S+)\), fresh images ([^ :]+)")


def checked(err: list[str]) -> dict[str, tuple[bool, float, float, float]]:
    matches = filter(None, map(CHECKED.match, err))
    return {m[2]: (bool(m[1]), *(float(m[i]) for i in (3, 4, 5))) for m in matches}


@pytest.mark.parametrize("line", [QUANT, UNSTR])
def test_claims_hold_on_the_calibration_images(line, work, command):
    status, _, err = command(line, "--check")
    assert status == 0
    lines = checked(err)
    assert len(lines) == LAYERS
    for warned, measured, claimed, fresh in lines.values():
        assert not warned and measured == pytest.approx(claimed, rel=2e-3)
        assert 0.5 * claimed < fresh < 3 * claimed
    output = Path(line.split()[-1])
    record = output / "rn8.json" if output.suffix == "" else output.with_suffix(".json")
    for layer in json.loads(record.read_text())["layers"]:
        assert layer["checked_error"] == pytest.approx(lines[layer["name"]][1], rel=1e-3)


def test_a_wrong_hessian_is_noticed(work, command, monkeypatch):
    hessian = TrueOBS._hessian

    def wrong(solver, *rest):
        H = hessian(solver, *rest)
        return H if solver.columns != 64 else 1.1 * H  # of the last layer

    monkeypatch.setattr(TrueOBS, "_hessian", wrong)
    status, _, err = command(NM, "--check")
    warned = {name for name, line in checked(err).items() if line[0]}
    assert status == 0 and warned == {"linear"}
    assert any(line.endswith("they differ by more than 5 %") for line in err)


def test_fresh_images_are_test_images_where_all_others_are_taken(work, command):
    status, _, err = command(NM, "--check", "--nsamples", "1500")
    assert status == 0 and any("other test images" in line for line in err)


# -- repeated --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "record"),
    [
        (QUANT, "q.json"),
        (UNSTR, "models_unstr/rn8.json"),
        (LOSS, "scores/rn8_unstr_loss.json"),
        ("spdy 2 unstr --dp", "rn8_unstr_200x_dp.json"),
        ("post_proc start.pth --bnt --save bnt.pth", "bnt.json"),
    ],
)
def test_a_record_repeats_its_run(line, record, work, capfd):
    script, words = words_of(line)
    assert SCRIPTS[script].main(words) == 0
    expected, before = contents(work), json.loads(Path(record).read_text())
    shutil.copy(record, "copy.json")
    made = {
        QUANT: ["q.pth"],
        UNSTR: [str(x) for x in Path("models_unstr").glob("*.pth")],
        LOSS: ["scores/rn8_unstr_loss.txt"],
    }.get(line, [])
    for name in made if line != LOSS else []:
        Path(name).unlink()
    if line == UNSTR:
        Path(record).unlink()
    assert SCRIPTS[script].main(["--repeat", "copy.json"]) == 0, capfd.readouterr().err
    assert contents(work) == expected
    again = json.loads(Path(record).read_text())
    assert records.flaw(again) is None and again["fingerprint"] == before["fingerprint"]
    for item in (again, *again.get("layers", ()), *again.get("corrections", ())):
        if script != "spdy" or item is not again:  # whose own figures its docstring leaves open
            assert all(re.search(rf"\b{key}\b", records.__doc__) for key in item)
    assert again["arguments"] | {"repeat": None} == before["arguments"]


def test_what_is_no_record_or_of_something_else_is_refused(work, capfd):
    assert main_trueobs.main(words_of(NM)[1]) == 0
    record = json.loads(Path("nm.json").read_text())
    weights = load_checkpoint(SHIPPED_WEIGHTS["rn8", "digits"])
    weights["bn1.weight"] = weights["bn1.weight"] * 2
    torch.save(weights, "other.pth")

    def refused(text: str, said: str, *more: str) -> None:
        Path("bad.json").write_text(text)
        capfd.readouterr()
        try:
            status = main_trueobs.main(["--repeat", "bad.json", *more])
        except SystemExit as stop:
            status = stop.code
        err = capfd.readouterr().err.splitlines()
        assert status == 2 and len(err) == 1, err
        assert err[0].startswith("error: bad.json: ") and said in err[0], err[0]

    def changed(**changes: object) -> str:
        return json.dumps(record | changes)

    arguments, marks = record["arguments"], record["fingerprint"]
    refused("{", "not the record of a run (not JSON)")
    refused("[1]", "not the record of a run (not an object)")
    refused("{}", "not the record of a run (no command)")
    refused(changed(layers=[3]), "layers holds something without a name")
    refused(changed(arguments=3), "arguments is not of the right type")
    refused(changed(command="spdy.py"), "a record of spdy.py")
    refused(changed(arguments=arguments | {"wbits": [4]}), "wbits is [4]")
    refused(changed(arguments=arguments | {"turbo": 1}), "has no option turbo")
    refused(
        changed(fingerprint=marks | {"calibration images": "0" * 32}), "calibration images changed"
    )
    refused(json.dumps(record), "dense weights changed", "--weights", "other.pth")
    refused(
        json.dumps(record),
        "this would not repeat the run (--prunen was 2, is now 1)",
        "--prunen",
        "1",
    )
    Path("old.json").write_text(changed(fingerprint=marks | {"torch": "1.0"}))
    assert main_trueobs.main(["--repeat", "old.json", "--save", "elsewhere.pth"]) == 0
    warning = "warning: old.json: the last digits may differ from the run's (torch was 1.0"
    assert warning in capfd.readouterr().err
    assert Path("elsewhere.pth").read_bytes() == Path("nm.pth").read_bytes()


def test_a_record_from_before_an_option_repeats_its_run(work, capfd):
    """What a record does not name had its default then; any other value is still refused."""
    assert main_trueobs.main(words_of(NM)[1]) == 0
    record = json.loads(Path("nm.json").read_text())
    del record["fingerprint"]["--order"], record["arguments"]["order"]
    Path("old.json").write_text(json.dumps(record))
    assert main_trueobs.main(["--repeat", "old.json", "--save", "again.pth"]) == 0
    assert Path("again.pth").read_bytes() == Path("nm.pth").read_bytes()
    capfd.readouterr()
    assert main_trueobs.main(["--repeat", "old.json", "--order", "magnitude"]) == 2
    assert "(--order was obs, is now magnitude)" in capfd.readouterr().err


# -- determinism -----------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "line",
    [
        "quant --wbits 4 --abits 4 --save x/q.pth",
        "quant --wbits 3 --wperweight --save x/q.pth",
        "nmprune --save x/q.pth",
        "unstr --sparse-dir x --delta-sparse 0.5",
        "blocked --sparse-dir x --delta-sparse 0.5",
        "struct --sparse-dir x --delta-sparse 0.5",
    ],
)
def test_any_number_of_threads(line, work, command, threads):
    """Results are the same to the bit, and so are the squared errors of layers."""
    results = []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        status, _, err = command(f"main_trueobs {line}", "--nsamples", 96)
        assert status == 0 and torch.get_num_threads() == number and "resuming" not in " ".join(err)
        files = {path.name: path.read_bytes() for path in Path("x").glob("*.pth")}
        layers = json.loads(next(Path("x").glob("*.json")).read_text())["layers"]
        results.append((files, [layer | {"seconds": 0} for layer in layers]))
        shutil.rmtree("x")
    assert results[0][0] and results[0] == results[1] == results[2]


def test_another_number_of_threads_resumes(work, command, threads):
    torch.set_num_threads(1)
    line = "main_trueobs nmprune --save {}.pth"
    assert command(line.format("whole"))[0] == 0
    with interrupted(compress, "compress_layer", 3):
        assert command(line.format("nm"))[0] == 130
    torch.set_num_threads(2)
    status, _, err = command(line.format("nm"))
    assert status == 0 and "resuming: 3 of 8 layers are done" in err
    assert Path("nm.pth").read_bytes() == Path("whole.pth").read_bytes()
