"""Progress off a terminal: lines in the log, by a clock that the tests turn."""

from __future__ import annotations

import logging
import time

import pytest

from obc.solver import progress as module
from obc.solver.progress import Loop, Reporter, progress
from obc.solver.search import SearchState, least_candidates_left
from obc.solver.threads import in_pieces


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch, caplog) -> Clock:
    """The reporter's clock; its thread is not started, so lines are due when a test asks."""
    caplog.set_level(logging.INFO, logger="trueobs")
    clock = Clock()
    monkeypatch.setattr(module, "REPORTER", Reporter(clock))
    monkeypatch.setattr(module.threading.Thread, "start", lambda self: None)
    return clock


def lines(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def spend(clock: Clock, seconds: float) -> None:
    """Let the clock run; do every half second what the thread does."""
    for _ in range(int(2 * seconds)):
        clock.now += 0.5
        if module.REPORTER.loops and module.REPORTER.seconds_to_wait() <= 0:
            module.REPORTER.report()


def test_a_long_loop_says_how_far_it_is_and_how_long_it_takes(clock, caplog):
    for _ in progress("calibrating", range(40)):
        spend(clock, 6)
    assert len(lines(caplog)) == 8  # 240 s, a line every 30
    assert lines(caplog)[0] == "calibrating: 4 of 40 (10 %), 00:30 so far, about 04:30 left"
    assert lines(caplog)[-1] == "calibrating: 39 of 40 (98 %), 04:00 so far, about 00:06 left"


def test_a_step_of_many_minutes_is_not_silent(clock, caplog):
    with progress("compressing", total=1e12, done=5e11, counted=False) as bar:
        spend(clock, 35 * 60)
        assert len(lines(caplog)) == 70
        assert lines(caplog)[-1] == "compressing: 50 %, 35:00 so far, time left not known yet"
        bar.set_postfix_str("3 of 4 layers")
        bar.update(2.5e11)
        spend(clock, 30)
    assert lines(caplog)[-1] == "compressing: 75 %, 35:30 so far, about 35:30 left, 3 of 4 layers"
    spend(clock, 300)
    assert len(lines(caplog)) == 71  # nothing is under way


def test_short_loops_say_nothing_but_many_of_them_within_a_long_one_do(clock, caplog):
    spend(clock, 100)
    for _ in progress("evaluating", range(3)):
        spend(clock, 1)
    assert not lines(caplog)
    for _ in progress("search", range(100)):
        for _ in progress("evaluating", range(2)):
            spend(clock, 1)
    assert [line.partition(":")[0] for line in lines(caplog)] == ["search"] * len(lines(caplog))
    assert len(lines(caplog)) == 7  # after 10 s, as the last line is long ago; then every 30


def test_loops_within_loops_share_a_line(clock, caplog):
    outer = progress("models", range(2))
    for _ in outer:
        for _ in progress("decoding", (x for x in range(3))):
            spend(clock, 20)
    assert lines(caplog)[0].startswith("models: 0 of 2 (0 %), 00:30 so far, time left not known")
    assert lines(caplog)[0].endswith("; decoding: 1 done, 00:30 so far")


def test_the_rows_of_a_large_layer_are_seen(clock, caplog):
    with progress("compressing", total=100.0, counted=False):
        in_pieces(lambda rows: spend(clock, 5), 40, 1)
    assert len(lines(caplog)) == 6
    assert lines(caplog)[-1] == (
        "compressing: 0 %, 03:00 so far, time left not known yet; "
        "this step: 88 %, 03:00 so far, about 00:25 left"
    )


def test_what_was_done_before_does_not_count_for_the_pace(clock):
    loop = Loop("loss", total=100, done=90)
    loop.update(5)
    clock.now += 50
    assert loop.line() == "loss: 95 of 100 (95 %), 00:50 so far, about 00:50 left"
    loop.update(50)  # more than was foreseen
    assert loop.line() == "loss: 145 of 100 (100 %), 00:50 so far, about 00:00 left"


def test_an_error_ends_the_loop(clock, caplog):
    with pytest.raises(ValueError), progress("training", total=3):
        raise ValueError
    for _ in progress("training", range(3)):
        break
    assert module.REPORTER.loops == []


@pytest.mark.parametrize("why", ["rank", "level"])
def test_other_processes_and_quiet_logs_are_silent(why, clock, caplog, monkeypatch):
    if why == "rank":
        for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "here"}.items():
            monkeypatch.setenv(name, value)
    else:
        caplog.set_level(logging.ERROR, logger="trueobs")
    with progress("compressing", total=3):
        spend(clock, 100)
    assert not lines(caplog)


def test_the_thread_reports_in_time_and_ends_with_the_loops(monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="trueobs")
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.05)
    monkeypatch.setattr(module, "BRIEF_S", 0.0)
    with progress("compressing", total=3):
        thread = next(x for x in module.threading.enumerate() if x.name.startswith("progress"))
        deadline = time.monotonic() + 20
        while len(lines(caplog)) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert len(lines(caplog)) >= 3
    thread.join(20)
    assert not thread.is_alive()


def test_a_terminal_has_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(module.sys.stderr, "isatty", lambda: True, raising=False)
    assert [*progress("evaluating", [1, 2])] == [1, 2]
    with progress("compressing", total=4.0, counted=False) as bar:
        bar.set_postfix_str("1 of 2 layers")
        bar.update(1.0)
    shown = capsys.readouterr().err
    assert "evaluating:   0%" in shown and "0/2" in shown
    assert [*progress("rows", [1, 2], within=True)] == [1, 2]
    assert not capsys.readouterr().err
    assert "compressing:   0%" in shown and "1 of 2 layers" in shown and "0/4" not in shown


def test_a_search_knows_the_least_that_is_left():
    state = SearchState.start(layers=20, seed=0)
    assert least_candidates_left(state) == 100 + 2 * 100
    state.candidates, state.failures, state.resampled = 150, 30, 1
    assert least_candidates_left(state) == 70
