"""Calls in spawned processes: their order, their progress, their errors."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import types

import pytest
from pools import Gate, Rooter, Stubborn, divmod_by, raise_untold, root_of

from poolreg import workers
from poolreg.errors import PoolregError, Refused
from poolreg.workers import run_jobs, stream


class Seen:
    """Keeps what progress was told."""

    def __init__(self) -> None:
        self.done = 0
        self.notes: list[str] = []

    def start(self, what: str, total: int, unit: str) -> None:
        raise AssertionError(f"only the caller announces a stage: {what}, {total} {unit}")

    def advance(self, amount: int) -> None:
        self.done += amount

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize("workers", [2, 7])
def test_results_come_in_the_order_of_the_jobs(workers):
    seen = Seen()
    jobs = [(value * value, 0.2 if value == 0 else 0.0) for value in range(5)]
    results = list(run_jobs(root_of, jobs, workers=workers, progress=seen))
    assert [root for root, _ in results] == [0, 1, 2, 3, 4]
    pids = {pid for _, pid in results}
    assert os.getpid() not in pids
    assert 1 <= len(pids) <= min(workers, 5)
    assert seen.done == 5
    assert sorted(seen.notes) == ["0", "1", "16", "4", "9"]


@pytest.mark.parametrize("workers", [0, 1])
def test_one_worker_is_this_process(workers):
    seen = Seen()
    results = list(run_jobs(root_of, [(4, 0.0), (9, 0.0)], workers=workers, progress=seen))
    assert results == [(2, os.getpid()), (3, os.getpid())]
    assert seen.notes == ["4", "9"]
    assert list(run_jobs(root_of, [], workers=4, progress=seen)) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_arrives_whole(workers):
    """With its hint and its facts, and without doing what had not begun."""
    seen = Seen()
    jobs = [(-4, 0.0)] + [(9, 0.3)] * 12
    with pytest.raises(Refused) as caught:
        list(run_jobs(root_of, jobs, workers=workers, progress=seen))
    assert str(caught.value) == "-4 has no root\nuse a square"
    assert caught.value.data == {"value": -4}
    assert seen.done < 12


def test_a_killed_worker_is_an_error_of_ours():
    with pytest.raises(PoolregError, match=r"a worker process was killed.*\n.*fewer workers"):
        list(run_jobs(root_of, [(-9, 0.1), (4, 0.0), (9, 0.5)], workers=2, progress=Seen()))


@pytest.mark.parametrize("workers", [1, 3])
def test_results_of_runs_come_as_they_are_made(workers):
    seen = Seen()
    runs = [[n * n for n in range(start, start + 4)] for start in range(0, 40, 4)]
    results = list(stream(Rooter, (0.001,), runs, workers=workers, progress=seen))
    assert sorted(root for root, _, _ in results) == list(range(40))
    for run in runs:  # each in order, in one process
        places = [i for i, (root, _, _) in enumerate(results) if root * root in run]
        assert [results[i][0] ** 2 for i in places] == run
        assert len({results[i][1:] for i in places}) == 1
    processes = {process for _, process, _ in results}
    assert len(processes) == workers
    assert (os.getpid() in processes) == (workers == 1)
    assert max(number for _, _, number in results) > 1  # what was set up served again
    assert seen.done == 40


def test_a_slow_run_holds_nobody_up(tmp_path):
    """One that waits until all the others are done."""
    gate = tmp_path / "gate"
    results = []
    for value in stream(Gate, (gate,), [[n] for n in range(30)], workers=2, progress=Seen()):
        results.append(value)
        if len(results) == 29:
            gate.touch()
    assert sorted(results) == list(range(30))
    assert results[-1] == 0


def test_after_an_error_what_has_begun_is_done(tmp_path):
    gate = tmp_path / "gate"

    class Opening(Seen):
        def note(self, text: str) -> None:
            if text == "-4":
                gate.touch()

    seen: list[int] = []
    runs = [[4, -4, 9], [0, 1, 2, 3, 5, 6, 7], *([100] for _ in range(9))]
    results = stream(Gate, (gate,), runs, workers=2, progress=Opening())
    with pytest.raises(Refused, match="-4 is negative"):
        seen.extend(results)
    assert sorted(seen) == [0, 1, 2, 3, 4, 5, 6, 7]


def test_an_error_that_cannot_travel():
    """It arrives as one of ours, in its own words."""
    with pytest.raises(PoolregError, match=r"Untold: only here"):
        list(run_jobs(raise_untold, [(1,), (2,)], workers=2, progress=Seen()))
    with pytest.raises(ZeroDivisionError) as caught:
        list(run_jobs(divmod_by, [(1, 0), (2, 1)], workers=2, progress=Seen()))
    assert "in divmod_by" in caught.value.__notes__[0]


def test_who_stops_listening_leaves_no_process():
    results = stream(Rooter, (0.01,), [[n] for n in range(100)], workers=2, progress=Seen())
    processes = {next(results)[1] for _ in range(10)}
    results.close()
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_an_interruption_is_the_parents(monkeypatch):
    """Ctrl-C reaches the whole group: also workers that are only just starting."""
    send, signalled = workers._send, []

    def interrupted(worker, run):
        for child in multiprocessing.active_children() if not signalled else ():
            os.kill(child.pid, signal.SIGINT)
            signalled.append(child.pid)
        send(worker, run)

    monkeypatch.setattr(workers, "_send", interrupted)
    results = stream(Rooter, (0.0,), [[4], [9]], workers=2, progress=Seen())
    assert {root for root, *_ in results} == {2, 3}
    assert len(signalled) == 2


def test_who_is_stopped_while_starting_says_nothing(tmp_path, monkeypatch, capfd):
    """Extension modules complain when their import is cut off by an exception."""
    code = "import time\ntry:\n    time.sleep(60)\nexcept SystemExit:\n    raise ImportError from None\n"
    (tmp_path / "slow.py").write_text(code)
    here = types.ModuleType("slow")
    exec("def start(): ...", here.__dict__)
    monkeypatch.setitem(sys.modules, "slow", here)
    monkeypatch.syspath_prepend(tmp_path)

    def stop(_):
        time.sleep(2)
        raise KeyboardInterrupt

    monkeypatch.setattr(workers, "wait", stop)
    with pytest.raises(KeyboardInterrupt):
        list(stream(here.start, (), [[1], [2]], workers=2, progress=Seen()))
    assert multiprocessing.active_children() == []
    assert capfd.readouterr().err == ""


def test_stubborn_workers_share_one_delay(monkeypatch):
    """However many there are, an interruption takes no longer than for one."""
    monkeypatch.setattr(workers, "_PATIENCE", 1.0)
    results = stream(Stubborn, (), [[n] for n in range(6)], workers=6, progress=Seen())
    processes = {next(results) for _ in range(6)}
    started = time.monotonic()
    results.close()
    assert time.monotonic() - started < 3.5
    assert multiprocessing.active_children() == []
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
