"""A command that is interrupted ends with one line, even while Python imports PyTorch."""

from __future__ import annotations

import ast
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STUDY = "pruning_vs_quantization"
PROGRAMS = {
    "main_trueobs": ["main_trueobs.py", "rn8", "digits", "quant", "--wbits", "4"],
    "database": ["database.py", "rn8", "digits", "unstr", "loss"],
    "spdy": ["spdy.py", "rn8", "digits", "2", "unstr"],
    "post_proc": ["post_proc.py", "rn8", "digits", "no.pth", "--bnt"],
    "postproc": ["postproc.py", "rn8", "digits", "no.pth", "--bnt"],
    "study": ["-m", f"{STUDY}.main", "train-compressed", "--architecture", "rn8_quantized"],
    "study as a file": [f"{STUDY}/main.py", "table", "--architecture", "rn8_quantized"],
}
ENDS = {signal.SIGINT: (130, "error: interrupted\n"), signal.SIGTERM: (143, "error: terminated\n")}

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def importing(words: list[str], **options) -> subprocess.Popen:
    """A command that has started to import PyTorch."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, text=True, **pipes, **options)
    maps = Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and "/torch/" not in maps.read_text():
        time.sleep(0.002)
    return process


@linux
@pytest.mark.parametrize("number", ENDS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_interrupted_while_it_imports(name, number):
    process = importing(PROGRAMS[name])
    time.sleep(random.uniform(0, 0.3))
    process.send_signal(number)
    out, error = process.communicate(timeout=120)
    assert (process.returncode, error, out) == (*ENDS[number], "")


@linux
def test_one_of_many_processes_speaks():
    process = importing(PROGRAMS["main_trueobs"], env=os.environ | {"RANK": "1"})
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=120) == ("", "") and process.returncode == 130


@linux
def test_what_is_ignored_stays_so():
    ignoring = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # noqa: E731  # as nohup does
    process = importing(PROGRAMS["post_proc"], preexec_fn=ignoring)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=120)[1] == "error: no.pth: no such file\n"


@pytest.mark.parametrize(
    "name",
    [
        "main_trueobs",
        "database",
        "spdy",
        "post_proc",
        "postproc",
        "recipes/__main__",
        "recipes/demo",
        "recipes/picture",
        "recipes/report",
        "recipes/uniform",
        f"{STUDY}/__init__",
    ],
)
def test_it_is_the_first_import(name):
    nodes = ast.parse((ROOT / f"{name}.py").read_text()).body
    imports = [ast.unparse(x) for x in nodes if isinstance(x, ast.Import | ast.ImportFrom)]
    path = ("import sys", "from pathlib import Path")  # recipes have to find the toolkit first
    first, second = [*(x for x in imports if x not in path), ""][:2]
    assert "import obc.toolkit.starting" in (first, second) and (
        first == "import obc.toolkit.starting" or first.startswith("from __future__ ")
    )


TWICE = """
import sys, time, os, signal
sys.modules["__main__"].__file__ = FILE  # as if this were main_trueobs.py
from obc.toolkit import starting
from obc.toolkit.cli import guarded
def work(args):
    try:
        os.kill(os.getpid(), NUMBER)
    except KeyboardInterrupt:
        print("once", flush=True)
        AGAIN
        raise
status = guarded(work, None)
os.kill(os.getpid(), NUMBER)
print("over")
sys.exit(status)
"""


@pytest.mark.parametrize("number", ENDS)
@pytest.mark.parametrize("again", [True, False])
def test_the_second_signal_ends_at_once_and_none_comes_after_the_end(again, number):
    code = TWICE.replace("FILE", repr(str(ROOT / "main_trueobs.py")))
    code = code.replace("AGAIN", "os.kill(os.getpid(), NUMBER); time.sleep(9)" * again)
    code = code.replace("NUMBER", str(int(number)))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    status, line = ENDS[number]
    out = "once\n" if again else "once\nover\n"
    assert (done.returncode, done.stdout, done.stderr) == (status, out, line)
