"""Every step of every command that changes a pool: it fails there, or the process is killed.

Afterwards names resolve, what was acknowledged is there, whatever is needed is intact, and doing
it again gives the pool that an undisturbed run gives. Full disks and killed writers are the
subject of test_faults.py.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import faulty
import pytest
from collecting import stored
from faulty import COMMANDS, Holding, Steps, Workshop, holding, opened
from pools import contents
from test_faults import DEADLINE, acknowledged, mount, start

from poolreg import Pool, faults
from poolreg.errors import StorageError
from poolreg.store.journal import format_time
from poolreg.store.registry import Registry


@pytest.fixture(scope="module")
def workshop(tiny, tmp_path_factory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("faulty"), tiny)


@pytest.fixture(scope="module")
def undisturbed(workshop):
    """What a command does when nothing goes wrong: the pool before and after, and its steps."""
    known: dict[str, tuple[Holding | None, Holding, Steps]] = {}

    def look(name: str) -> tuple[Holding | None, Holding, Steps]:
        if name not in known:
            place = workshop.place(name)
            before = None if COMMANDS[name].damaged else holding(workshop.place(name))
            steps = Steps()
            with fault(steps):
                faulty.run(name, place)
            known[name] = before, holding(place), steps
        return known[name]

    return look


@contextlib.contextmanager
def fault(what: faults._Fault) -> Iterator[None]:
    faults._fault = what
    try:
        yield
    finally:
        faults._fault = None


def failing(name: str, place: Path, step: str, number: int) -> bool:
    """Do a command on a disk that fails at a step; tell whether it got there."""
    broken = faults._Fault.parse(f"{step}@{number}=EIO")
    with fault(broken):
        try:
            faulty.run(name, place)
        except (StorageError, OSError):
            assert broken.countdown <= 0
    return broken.countdown <= 0


def check(place: Path, before: Holding | None, after: Holding) -> None:
    """The pool is as it was or as it will be, whatever else was noted."""
    if before is None:
        return
    now = holding(place)
    assert before.records.keys() <= now.records.keys()
    assert (now.names, now.removed) in [(h.names, h.removed) for h in (before, after)]
    assert before.objects & after.objects <= now.objects <= before.objects | after.objects


def check_end(place: Path, after: Holding) -> None:
    """The pool is what an undisturbed run gives, and sound."""
    now = holding(place)
    assert now.records.keys() == after.records.keys()
    assert (now.names, now.removed, now.objects) == (after.names, after.removed, after.objects)
    with opened(place) as pool:
        assert pool.verify(full=True).findings == ()


OFTEN = {"put", "add evalset", "evaluate", "rm", "index what is new", "gc", "pull"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in OFTEN else pytest.mark.campaign) for n in COMMANDS]
)
def test_one_failure_after_the_other(workshop, undisturbed, name):
    before, after, steps = undisturbed(name)
    place, reached, looked_at = workshop.place(name), 0, {}
    for step, number in steps.firsts():
        reached += failing(name, place, step, number)
        if (files := contents(place / "pool")) != looked_at:
            check(place, before, after)
            looked_at = files
    assert reached
    faulty.run(name, place)
    check_end(place, after)


@pytest.mark.campaign
@pytest.mark.parametrize("name", COMMANDS)
def test_a_failure_at_each_step(workshop, undisturbed, name):
    before, after, steps = undisturbed(name)
    for step, number in steps.ends():
        place = workshop.place(name)
        assert failing(name, place, step, number), step
        check(place, before, after)
        faulty.run(name, place)
        check_end(place, after)
        shutil.rmtree(place)


# -- kills ---------------------------------------------------------------------------------------


def killed(name: str, place: Path, step: str, number: int) -> None:
    words = [sys.executable, faulty.__file__, name, str(place)]
    environment = {**os.environ, "POOLREG_FAULT": f"{step}@{number}=kill", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, check=False, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def check_kill(
    workshop: Workshop, undisturbed, name: str, *, step: str, number: int
) -> None:  # fmt: skip
    before, after, _ = undisturbed(name)
    place = workshop.place(name)
    killed(name, place, step, number)
    check(place, before, after)
    faulty.run(name, place)
    check_end(place, after)
    shutil.rmtree(place)


KILLS = [
    ("put", "object.place", 1), ("add evalset", "file.replaced", 2),
    ("add partition", "journal.write", 1), ("add model", "object.placed", 1),
    ("keep a merge", "journal.flush", 1), ("evaluate", "file.replace", 3),
    ("name", "journal.flushed", 1), ("restore", "journal.open", 1), ("gc", "gc.delete", 2),
    ("pull", "pull.records", 1), ("push", "file.replaced", 3), ("bundle", "pull.note", 1),
    ("repair", "repair.moved", 1),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "step", "number"),
    [pytest.param(*k, marks=() if k[0] in OFTEN else pytest.mark.campaign) for k in KILLS],
)
def test_kills(workshop, undisturbed, name, step, number):
    check_kill(workshop, undisturbed, name, step=step, number=number)


@pytest.mark.campaign
@pytest.mark.parametrize("name", COMMANDS)
def test_a_kill_at_each_step(workshop, undisturbed, name):
    for step, number in undisturbed(name)[2].ends():
        check_kill(workshop, undisturbed, name, step=step, number=number)


# -- short writes --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["put", "add evalset", "add model", "evaluate"])
def test_short_writes(workshop, undisturbed, monkeypatch, name):
    _, after, _ = undisturbed(name)
    place, write, calls = workshop.place(name), os.write, []

    def short(descriptor: int, data: bytes) -> int:
        calls.append(len(data))
        return write(descriptor, data[: max(1, len(data) // 3)])

    monkeypatch.setattr(os, "write", short)
    faulty.run(name, place)
    monkeypatch.undo()
    assert name == "put" or len(calls) > 3
    check_end(place, after)


# -- clocks, copies and disks that cannot be written to ------------------------------------------


def test_a_clock_that_jumps(workshop, monkeypatch):
    """What is said later counts, whatever the clock said then and says now."""
    place = workshop.place("name")
    jumps = iter([0, 90, -90, 2, -600, 0, 30, -31, 0] * 9)  # minutes

    def now() -> str:
        return format_time(datetime.now(UTC) + timedelta(minutes=next(jumps)))

    with opened(place) as pool:
        registry, evalsets = pool.registry, pool.registry.names("evalset")
        targets = list(evalsets.values())
        monkeypatch.setattr("poolreg.store.journal.now", now)
        monkeypatch.setattr("poolreg.store.records.now", now)
        for turn in range(8):
            registry.record(registry.naming("evalset", "moving", targets[turn % 3]))
            assert registry.resolve("evalset", "moving") == targets[turn % 3]
            pool.rm(["alpha"], kind="evalset")
            assert "alpha" not in registry.names("evalset")
            pool.restore(["alpha"], kind="evalset")
            assert registry.resolve("evalset", "alpha") == evalsets["alpha"]
        monkeypatch.undo()
        registry.catalog.rebuild()
        assert registry.resolve("evalset", "moving") == targets[7 % 3]
        assert registry.resolve("evalset", "alpha") == evalsets["alpha"]
        assert pool.verify(full=True).findings == ()


@pytest.mark.slow
@pytest.mark.parametrize("folders", [["journal", "objects"], ["objects", "journal"]])
def test_a_copy_made_while_others_write(tmp_path, folders):
    """As `cp -r` makes it, whichever folder comes first; what it lacks then is told."""
    copy = tmp_path / "copy"
    copy.mkdir()
    with contextlib.closing(Registry.create(tmp_path / "pool")) as registry:
        outputs = [tmp_path / f"acks-{writer}" for writer in "ab"]
        writers = [start(registry, o.name, count=0, output=o) for o in outputs]
        try:
            deadline = time.monotonic() + DEADLINE
            while not all(len(acknowledged(output)) > 3 for output in outputs):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            told = [ack for output in outputs for ack in acknowledged(output)]
            for name in ["FORMAT", "catalog.duckdb", "locks", "tmp", *folders]:
                subprocess.run(["cp", "-r", registry.root / name, copy], check=False)
        finally:
            for writer in writers:
                writer.kill()
                writer.wait()
    with Pool.open(copy) as pool:
        lacking = {f.key for f in pool.verify().findings if f.kind != "name"}  # of no evalsets
        present = pool.registry.names("evalset")
        assert all(present[label] == evaluation for label, evaluation, _ in told)
        assert pool.registry.catalog.differences() == {}
    if folders[0] == "journal":
        assert not lacking
    shutil.copytree(tmp_path / "pool" / "objects", copy / "objects", dirs_exist_ok=True)
    with Pool.open(copy) as pool:  # what came in between is brought by copying once more
        assert lacking <= stored(copy).keys()
        assert {finding.kind for finding in pool.verify(full=True).findings} == {"name"}


READING = [
    ["ls"], ["show", "alpha"], ["ask", "alpha+beta", "--on", "alpha"],
    ["sql", "select count(*) from models"], ["log"], ["stats"], ["verify"], ["verify", "--full"],
    ["journal", "ls"], ["diff", "alpha/1", "beta/1"],
]  # fmt: skip
WRITING = [
    ["gc", "--dry-run"], ["gc"], ["rm", "alpha", "--kind", "evalset"], ["journal", "compact"],
    ["evalset", "add", "new", "TEXT"], ["verify", "--repair"], ["push", "file:///nowhere"],
]  # fmt: skip


@pytest.fixture
def read_only(workshop, tmp_path, cli_run) -> Iterator[Path]:
    """A pool with an answer in it on a file system that cannot be written to."""
    place = workshop.place("name")
    cli_run("ask", "alpha+beta", "--on", "alpha", "--pool", place / "pool", "--threads", 1)
    disk = tmp_path / "disk"
    disk.mkdir()
    mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", disk)
    try:
        shutil.copytree(place / "pool", disk / "pool")
        mount("-o", "remount,ro", disk)
        yield disk / "pool"
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_a_pool_that_cannot_be_written_to(read_only, tmp_path, cli_run):
    text = tmp_path / "text.txt"
    text.write_text("some text")
    for words in READING:
        cli_run(*words, "--pool", read_only)
    cli_run("doctor", "--pool", read_only, code=None)
    for words in WRITING:
        said = cli_run(*[text if w == "TEXT" else w for w in words], "--pool", read_only, code=1)
        assert "read-only" in said.stderr.lower()
        assert "Traceback" not in said.stderr
    with Pool.open(read_only) as pool, pytest.raises(StorageError):
        pool.compact()
