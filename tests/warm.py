"""Commands in processes that need not import PyTorch, which would take seconds for each.

    Warm ── a server that has imported everything once (this file, run as a script)
      │       forks for each request ── a process that runs one command, as `python` would
      └── `python`, a stand-in for the interpreter that hands its arguments to the server

Such a command is a process with its own folder, standard streams and exit status, and it receives
signals. Only its imports have been done before.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODULES = ("database", "main_trueobs", "post_proc", "spdy", "pruning_vs_quantization.main")
MODULES += ("recipes.__main__", "recipes.uniform")
STAND_IN = """#!{python} -IS
import json, os, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(connection, [b"!"], [0, 1, 2])
connection.sendall(request)
connection.shutdown(socket.SHUT_WR)
answer = connection.makefile().read().split()
sys.exit(int(answer[-1]) if answer[-2:-1] == ["status"] else 99)
"""


# -- the side of the tests -------------------------------------------------------------------------


class Running:
    """A command at work."""

    def __init__(self, address: str, words: list[str], folder: Path, stderr: Path) -> None:
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(address)
        with open(os.devnull, "r+b") as null, open(stderr, "wb") as file:
            streams = [null.fileno(), null.fileno(), file.fileno()]
            socket.send_fds(self.connection, [b"!"], streams)
        self.connection.sendall(json.dumps([words, str(folder), dict(os.environ)]).encode())
        self.connection.shutdown(socket.SHUT_WR)
        self.answers = self.connection.makefile()
        self.pid = self.answer("pid")

    def answer(self, expected: str) -> int:
        """The next number that the server sends with this word."""
        for line in self.answers:
            word, number = line.split()
            if word == expected:
                return int(number)
        raise EOFError(f"the server did not say {expected}")

    def wait_for_work(self) -> None:
        """Wait until its work has begun."""
        self.answer("working")

    def wait_for_use(self, seconds: float) -> None:
        """Wait until it has used this much CPU time, however busy the machine is, or has ended."""
        with suppress(OSError):
            while float(Path(f"/proc/{self.pid}/schedstat").read_text().split()[0]) < 1e9 * seconds:
                time.sleep(0.002)

    def signal(self, number: int) -> None:
        """Send a signal, unless the command has ended."""
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            pass

    def wait(self) -> int:
        """The exit status, as `subprocess` has it: negative for a signal."""
        self.used_s = self.answer("used_us") / 1e6  # CPU time
        status = self.answer("status")
        self.answers.close()
        self.connection.close()
        return status


class Warm:
    """The server, which runs commands."""

    def __init__(self, folder: Path) -> None:
        self.address, self.python = str(folder / "socket"), folder / "python"
        self.python.write_text(STAND_IN.format(python=sys.executable, address=self.address))
        self.python.chmod(0o755)

    def start(self, script: str, *words: object, folder: Path, stderr: Path) -> Running:
        """Run one of our scripts (or "-m", a module) in `folder`, standard error into a file."""
        program = script if script == "-m" else str(ROOT / script)
        return Running(self.address, [program, *map(str, words)], folder, stderr)


@contextmanager
def warm_server(folder: Path) -> Iterator[Warm]:
    """`folder` needs a short path: it holds a socket."""
    warm = Warm(folder)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # threads do not survive a fork
    server = subprocess.Popen(
        [sys.executable, __file__, warm.address],
        cwd=ROOT,
        text=True,
        env=environment,
        stdout=subprocess.PIPE,
    )
    try:
        assert server.stdout.readline() == "ready\n"
        yield warm
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


# -- the server ------------------------------------------------------------------------------------


def run_script(words: list[str], folder: str, environment: dict[str, str]) -> int:
    """What `python WORDS…` does; the exit status."""
    from obc.toolkit import starting

    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    starting.install_handler()
    if module := words[0] == "-m":
        words = words[1:]
    sys.argv[:] = words
    sys.path[0] = str(ROOT if module else Path(words[0]).resolve().parent)
    try:
        if module:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def announce_work(connection: socket.socket) -> None:
    """Let `cli.guarded` report when it begins."""
    from obc.toolkit import cli

    guarded = cli.guarded

    def announced(body, args):
        def work(args):
            connection.sendall(b"working 1\n")
            connection.close()
            body(args)

        return guarded(work, args)

    cli.guarded = announced


def serve(connection: socket.socket) -> None:
    """Answer one request: with the id of a process, and at its end with its status."""
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    words, folder, environment = json.loads(connection.makefile().read())
    child = os.fork()
    if child == 0:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        for stream in streams:
            os.close(stream)
        announce_work(connection)
        status = run_script(words, folder, environment)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # an orderly exit of the interpreter would take a second
    for stream in streams:
        os.close(stream)
    connection.sendall(f"pid {child}\n".encode())
    _, status, usage = os.wait4(child, 0)
    used_us = round(1e6 * (usage.ru_utime + usage.ru_stime))
    status = os.waitstatus_to_exitcode(status)
    connection.sendall(f"used_us {used_us}\nstatus {status}\n".encode())


def eliminate_once() -> None:
    """Load the compiled kernels."""
    import torch

    from trueobs import TrueOBS

    layer = TrueOBS(torch.nn.Linear(8, 2))
    layer.add_batch(torch.eye(8))
    layer.prepare_unstr()
    layer.prune_unstr([0.5])


def main(address: str) -> None:
    sys.path.insert(0, str(ROOT))
    for module in MODULES:
        __import__(module)
    eliminate_once()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who serve
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            serve(connection)
            os._exit(0)
        connection.close()


if __name__ == "__main__":
    main(sys.argv[1])
