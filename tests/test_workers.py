"""Calls in spawned processes: their order, their progress, their errors."""

from __future__ import annotations

import os

import pytest
from pools import root_of

from poolreg.errors import PoolregError, Refused
from poolreg.workers import run_jobs


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
        list(run_jobs(root_of, [(-9, 0.1), (4, 0.0), (9, 5.0)], workers=2, progress=Seen()))
