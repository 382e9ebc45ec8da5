"""Push and pull cut at any point: nothing half-visible, nothing sent twice, nothing lost.

A pool in an older and a newer state, a Hub that holds the one or the other or nothing, and cuts of
two kinds: the Hub fails from some request on, or the process dies at some byte on the wire or some
step on the disk. All points are drawn with a fixed seed from those of an uninterrupted run.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hub as hub_module
import pools
import pytest
from hub import Fault, Hub, Repo, Request
from huggingface_hub.utils import close_session, disable_progress_bars
from poolreg.cli.pull import opened
from test_faults import fill, mount

from poolreg import Pool
from poolreg.errors import Conflict, Locked, NotFound, StorageError
from poolreg.files import lock
from poolreg.models.merges import keep_merge
from poolreg.sharing import arrival
from poolreg.sharing import push as pushing
from poolreg.sharing.arrival import THREADS
from poolreg.sharing.contents import STAYING
from poolreg.sharing.pull import Pulled
from poolreg.sharing.push import Pushed
from poolreg.store.journal import Journal, Record
from poolreg.store.marker import write_marker

REPO = "someone/pool"
DEADLINE = 120.0  # seconds after which a child that should go on is taken for hung

# argv: a pattern, a number, and the command line. Dies at the so many-th renaming of a file to a
# path with that pattern, before it happens. Objects and journals are published by renaming.
DIES = """
import os, re, signal, sys
from poolreg.cli.main import main

pattern, left = sys.argv[1], int(sys.argv[2])
del sys.argv[1:3]

def look(event, args):
    global left
    if event == "os.rename" and re.search(pattern, os.fspath(args[1])):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(look)
main()
"""


# -- what is looked at ------------------------------------------------------------------------


def records_of(pool: Pool) -> list[Record]:
    """The records that travel."""
    return [r for r in pool.registry.journal.all() if r.kind not in STAYING]


def objects_at(root: Path) -> set[str]:
    return {path.parent.name + path.name for path in root.glob("objects/??/*")}


def holding(root: Path) -> tuple[list[tuple[str, str]], set[str]]:
    """The records of a sound pool, each once, and the objects that they name."""
    with Pool.open(root) as pool:
        assert pool.verify(full=True).findings == ()
        for space in ("partition", "model", "evalset"):
            for name, target in pool.registry.names(space).items():
                assert pool.registry.resolve(space, name) == target
        found = records_of(pool)
    ids = sorted({(record.kind, record.id) for record in found})
    named = {digest for record in found for digest in record.objects}
    assert named <= objects_at(root)
    return ids, named


whole = functools.cache(holding)  # of a pool that does not change


def log(hub: Hub, pattern: str) -> list[Request]:
    return [one for one in hub.requests if re.search(pattern, f"{one.method} {one.path}")]


def put(hub: Hub) -> list[str]:
    """The blobs that were uploaded, or began to be."""
    return [one.path.rpartition("/")[2] for one in log(hub, "^PUT ")]


def asked(hub: Hub) -> dict[str, Request]:
    """The last request of each object by digest."""
    requests = log(hub, "^GET .*/objects/..")
    return {"".join(one.path.split("/")[-2:]): one for one in requests}


def sent(hub: Hub) -> int:
    """The bytes that moved, both ways."""
    return sum(one.received + one.sent for one in hub.requests)


# -- the world --------------------------------------------------------------------------------


def kept(repo: Repo) -> dict[str, dict]:
    return {name: dict(value) for name, value in vars(repo).items() if isinstance(value, dict)}


@dataclass(frozen=True)
class Run:
    """An uninterrupted run: the pool after it, its requests, and the bytes that moved."""

    root: Path
    requests: int
    bytes: int


@dataclass(frozen=True)
class World:
    """Pools never to be changed, and what the Hub holds where `older` or `newer` was pushed."""

    hub: Hub
    older: Path
    newer: Path
    mine: Path  # another pool, with content of its own
    states: dict[str, dict[str, dict]]
    pushes: dict[str, Run]  # of `newer`, by the state of the Hub
    pulls: dict[str, Run]  # of the newer state, into nothing or mine

    def reset(self, state: str) -> Repo | None:
        """Put the Hub into a state: nothing, older or newer."""
        self.hub.faults.clear()
        self.hub.before_commit = None
        self.hub.requests = []
        self.hub.repos.clear()
        if state == "nothing":
            return None
        repo = self.hub.repos["model", REPO] = Repo("model", REPO)
        vars(repo).update({name: dict(value) for name, value in self.states[state].items()})
        return repo


def pull(root: Path) -> Pulled:
    make = Pool.open if (root / "FORMAT").exists() else Pool.create
    with make(root) as pool:
        return pool.pull(REPO)


def grow(pool: Pool, base: Path, seed: Path, texts: Path, units: dict[str, int]) -> None:
    pools.add_data(pool, texts, units)
    for name, count in units.items():
        for unit in range(1, count + 1):
            folder = pools.unit_folder(base / f"{name}-{unit}", seed, 10 * ord(name[0]) + unit)
            pool.add_model(folder, role="unit", partition=name, unit=unit, seed="base", tokens=100)


def make_pools(base: Path) -> tuple[Path, Path, Path]:
    """Models of 1.3 MB, which are fetched as large files, evalsets of 300 kB, which are not."""
    texts = pools.write_texts(base / "texts", ["alpha", "beta", "gamma"])
    pools.write_prose(texts / "beta.held.jsonl", 3000)
    seed = pools.saved(pools.random_model("llama", hidden_size=128, intermediate_size=256,
                                          head_dim=32), base / "seed")  # fmt: skip
    with Pool.create(base / "older") as pool:
        pool.add_model(seed, name="base", role="seed")
        grow(pool, base, seed, texts, {"alpha": 1})
    shutil.copytree(base / "older", base / "newer")
    with Pool.open(base / "newer") as pool:
        grow(pool, base, seed, texts, {"beta": 2})
        keep_merge(pool.registry, pool.resolve("alpha+beta"), "both")
    with Pool.create(base / "mine") as pool:
        pools.add_data(pool, texts, {"gamma": 1})
        pool.add_evalset("beta", [texts / "gamma.train.jsonl"])  # theirs is something else
        pool.add_model(pools.model_folder(base / "small"), name="base", role="seed")
    return base / "older", base / "newer", base / "mine"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[World]:
    base = tmp_path_factory.mktemp("cut")
    older, newer, mine = make_pools(base)
    states, pushes, pulls = {}, {}, {}
    with (
        pytest.MonkeyPatch.context() as patch,
        Hub(base / "hub") as hub,
        disable_progress_bars(),
    ):
        hub.adopt(patch)
        for state in ("nothing", "older"):
            if state == "nothing":
                with Pool.open(shutil.copytree(older, base / "first")) as pool:
                    pool.push(REPO)
                states["older"] = kept(hub.repo(REPO))
                hub.repos.clear()
            else:
                vars(hub.repo(REPO)).update(
                    {name: dict(value) for name, value in states["older"].items()}
                )
            hub.requests = []
            root = Path(shutil.copytree(newer, base / f"on-{state}"))
            with Pool.open(root) as pool:
                pool.push(REPO)
            pushes[state] = Run(root, len(hub.requests), sent(hub))
            states[f"newer on {state}"] = kept(hub.repo(REPO))
        shutil.copytree(mine, base / "into-mine")
        for into in ("nothing", "mine"):
            hub.requests = []
            pull(base / f"into-{into}")
            pulls[into] = Run(base / f"into-{into}", len(hub.requests), sent(hub))
        yield World(hub, older, newer, mine, states, pushes, pulls)
    close_session()


@pytest.fixture(autouse=True)
def no_naps(monkeypatch):
    """The client's pauses before it tries again take no time, and it says nothing of them."""
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "level", logging.ERROR)
    for module in ("utils._http", "file_download"):
        name = f"huggingface_hub.{module}.time"
        monkeypatch.setattr(name, SimpleNamespace(sleep=lambda _: None))


# -- how it is cut ----------------------------------------------------------------------------


class Metered(Request):
    """A request of the log that tells when bytes of it move."""

    tell: Callable[[], None] = staticmethod(lambda: None)

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name in ("status", "received", "sent"):
            Metered.tell()


class Log(list):
    """A log that calls `act` once, when the request of that number comes."""

    def __init__(self, number: int, act: Callable[[], object]) -> None:
        super().__init__()
        self.number, self.act = number, act

    def append(self, request: Request) -> None:
        super().append(request)
        if len(self) == self.number:
            self.act()


def away(hub: Hub, kind: str, number: int, after: int = 0) -> None:
    """Let the Hub fail from the request of that number on; "cut" first cuts a large body."""
    if kind == "cut":
        hub.fail(Fault("^(GET .*/objects|PUT)", "cut", after=after, skip=number % 7))
        hub.requests = Log(number + 7, lambda: hub.fail(Fault("", "drop", times=None)))
    else:
        hub.requests = Log(number, lambda: hub.fail(Fault("", kind, times=None)))


def start(hub: Hub, *words: object, code: str = "from poolreg.cli.main import main; main()"):
    """Start a command in a child that knows the Hub by its environment alone."""
    environment = {**os.environ, **hub.environment(), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def struck_on_the_wire(
    hub: Hub, at: Callable[[], bool], *words: object, how: signal.Signals = signal.SIGKILL
) -> str:
    """Run a command, send it a signal as soon as `at` holds, and return what it said."""
    children, struck = [], threading.Event()

    def look() -> None:
        if children and not struck.is_set() and at():
            struck.set()
            children[0].send_signal(how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub_module, "Request", Metered)
        patch.setattr(Metered, "tell", staticmethod(look))
        children.append(start(hub, *words))
        said = ended(children[0])
    assert struck.is_set(), said
    assert children[0].returncode == (-how if how == signal.SIGKILL else 130), said
    return said


def ended(child: subprocess.Popen[str], *, kill: bool = False) -> str:
    """Wait for a child to end and return what it said."""
    try:
        if kill:
            child.kill()
        return child.communicate(timeout=DEADLINE)[1]
    finally:
        child.kill()
        child.wait()


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def killed_on_the_disk(hub: Hub, pattern: str, number: int, *words: object) -> None:
    """Run a command that dies before it renames a file to such a path."""
    child = start(hub, pattern, number, *words, code=DIES)
    said = ended(child)
    assert child.returncode == -signal.SIGKILL, said


KINDS = ("status", "drop", "lost", "cut")


def cuts(count: int, first: int) -> list[Any]:
    """The numbers of so many cuts, of which but the first are made in every run."""
    more = [pytest.param(n, marks=pytest.mark.campaign) for n in range(first, count)]
    return [*range(first), *more]


# -- pull -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Puller:
    """A pool to pull the newer state into: a new one, or a copy of mine."""

    world: World
    root: Path
    into: str

    @property
    def run(self) -> Run:
        return self.world.pulls[self.into]

    def has_all(self) -> bool:
        """Check what is seen after a cut: all of the pull, or nothing of it."""
        if not (self.root / "FORMAT").exists():
            return False
        found, before = holding(self.root), ([], set())
        if self.into == "mine":
            before = whole(self.world.mine)
        assert found in (before, whole(self.run.root))
        return found != before

    def at_hand(self) -> set[str]:
        """The objects that came and were kept; those that threads were at need not be."""
        staged = map(objects_at, (self.root / "tmp").glob("incoming-*"))
        return objects_at(self.root).union(*staged)

    def goes_on(self) -> int:
        """Run again: it brings all that is missing and nothing else; return the bytes."""
        at_hand = self.at_hand()
        self.world.hub.faults.clear()
        self.world.hub.requests = []
        pull(self.root)
        assert not at_hand & asked(self.world.hub).keys()
        assert holding(self.root) == whole(self.run.root)
        assert objects_at(self.root) == objects_at(self.run.root)
        assert list((self.root / "tmp").iterdir()) == []
        return sent(self.world.hub)


def puller(world: World, folder: Path, number: int) -> Puller:
    world.reset("newer on older")
    into = ("nothing", "mine")[number // 4 % 2]
    if into == "mine":
        shutil.copytree(world.mine, folder / "pool")
    return Puller(world, folder / "pool", into)


def complete(world: World) -> set[str]:
    """The objects that the Hub sent to their last byte."""
    sizes = {
        "".join(path.split("/")[1:]): entry.size
        for path, entry in world.hub.tree(REPO).items()
        if path.startswith("objects/")
    }
    return {
        digest for digest, one in asked(world.hub).items()
        if one.status == 200 and one.sent == sizes[digest]
    }  # fmt: skip


@pytest.mark.parametrize("number", cuts(12, 2))
def test_a_pull_from_a_hub_that_goes_away(world, tmp_path, number):
    draw, cut = random.Random(number), puller(world, tmp_path, number)
    kind = KINDS[number % 4]
    away(world.hub, kind, draw.randint(1, cut.run.requests), draw.randint(0, 300_000))
    with contextlib.suppress(StorageError) if kind == "cut" else pytest.raises(StorageError):
        pull(cut.root)
    assert len(complete(world) - cut.at_hand()) <= THREADS
    first, done = sent(world.hub), cut.has_all()
    again = cut.goes_on()
    print(f"{kind}, {cut.into}: {first:,} bytes{' (all)' * done}, then {again:,} of "
          f"{cut.run.bytes:,}")  # fmt: skip


# The last byte of what is fetched, and what follows: into the staging folder, the store, the
# journal, and the catalog.
@pytest.mark.slow
@pytest.mark.parametrize("number", cuts(8, 1))
def test_a_pull_that_is_killed(world, tmp_path, number):
    draw, cut = random.Random(number), puller(world, tmp_path, number)
    words, where = ("pull", REPO, cut.root), draw.randint(1, cut.run.bytes)
    steps = ("tmp/incoming-[0-9a-f]+/objects/", "objects/", "journal/", "catalog.duckdb$")
    if number % 2:
        what = steps[number // 2]
        pattern = f"^{re.escape(str(cut.root))}/{what}"
        killed_on_the_disk(world.hub, pattern, draw.randint(6, 10) if number < 5 else 1, *words)
    else:
        what = f"after {where:,} bytes"
        struck_on_the_wire(world.hub, lambda: sent(world.hub) >= where, *words)
    first, done = sent(world.hub), cut.has_all()
    assert done <= (number == 7)
    again = cut.goes_on()
    print(f"{what}, {cut.into}: {first:,} bytes{' (all)' * done}, then {again:,}")


# -- push -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pusher:
    """A copy of the newer pool to push, to a Hub that holds nothing or the older state."""

    world: World
    root: Path
    state: str

    @property
    def run(self) -> Run:
        return self.world.pushes[self.state]

    def push(self) -> Pushed:
        with Pool.open(self.root) as pool:
            return pool.push(REPO)

    def is_there(self, reader: Path) -> bool:
        """Check what a reader sees after a cut: the newer state, or what was there before."""
        self.world.hub.faults.clear()
        self.world.hub.requests = []
        try:
            pull(reader)
        except NotFound:
            assert self.state == "nothing"
            return False
        found, newer = holding(reader), whole(self.world.newer)
        assert found == newer or (found == whole(self.world.older) and self.state == "older")
        return found == newer

    def goes_on(self, reader: Path) -> int:
        """Run again: it sends what is missing, and nothing else; return the bytes."""
        hub = self.world.hub
        done, before = self.is_there(reader), publications(hub)
        stored = set(hub.repo(REPO).uploads) if hub.repos else set()
        hub.requests = []
        assert self.push().changed == (not done)
        again, uploads = sent(hub), put(hub)
        assert not stored & set(uploads)
        assert len(uploads) == len(set(uploads))
        assert publications(hub) == before + (not done)
        assert bool(log(hub, "/commit/")) == (not done)
        assert named(hub.repo(REPO)) == named_in(self.world.states[f"newer on {self.state}"])
        assert holding(self.root) == whole(self.world.newer)
        pull(reader)
        assert holding(reader) == whole(self.world.newer)
        return again


def named(repo: Repo) -> dict[str, str]:
    return {path: entry.oid for path, entry in repo.at("main").tree.items()}


def named_in(state: dict[str, dict]) -> dict[str, str]:
    tree = state["commits"][state["branches"]["main"]].tree
    return {path: entry.oid for path, entry in tree.items()}


def publications(hub: Hub) -> int:
    """How often the journal changed."""
    if not hub.repos:
        return 0
    found = {
        tuple(sorted(path for path in commit.tree if path.startswith("journal/")))
        for commit in hub.repo(REPO).commits.values()
    }
    return len(found - {()})


def pusher(world: World, folder: Path, number: int) -> Pusher:
    state = ("older", "nothing")[number // 4 % 2]
    world.reset(state)
    return Pusher(world, Path(shutil.copytree(world.newer, folder / "pool")), state)


@pytest.mark.parametrize("number", cuts(14, 2))
def test_a_push_to_a_hub_that_goes_away(world, tmp_path, number):
    draw, cut = random.Random(number), pusher(world, tmp_path, number)
    kind = KINDS[number % 4]
    away(world.hub, kind, draw.randint(1, cut.run.requests), draw.randint(0, 300_000))
    with contextlib.suppress(StorageError) if kind == "cut" else pytest.raises(StorageError):
        cut.push()
    first, done = sent(world.hub), cut.is_there(tmp_path / "reader")
    again = cut.goes_on(tmp_path / "reader")
    print(f"{kind}, {cut.state}: {first:,} bytes{' (all)' * done}, then {again:,} of "
          f"{cut.run.bytes:,}")  # fmt: skip


def test_a_push_whose_answer_is_lost(world, tmp_path):
    cut = pusher(world, tmp_path, 0)
    world.hub.fail(Fault("/commit/", "lost"))
    before = publications(world.hub)
    done = cut.push()
    assert (done.changed, done.version) == (True, world.hub.head(REPO))
    assert publications(world.hub) == before + 1
    assert len(put(world.hub)) == len(set(put(world.hub)))
    assert cut.is_there(tmp_path / "reader")
    cut.goes_on(tmp_path / "reader")


@pytest.mark.slow
@pytest.mark.parametrize("number", cuts(6, 1))
def test_a_push_that_is_killed(world, tmp_path, number):
    draw, cut = random.Random(number), pusher(world, tmp_path, number)
    where, hub = draw.randint(1, cut.run.bytes), world.hub

    def reached() -> bool:
        if number < 4:
            return sent(hub) >= where
        # It is about to commit, or the commit is made.
        if number == 4:
            return bool(log(hub, "/validate-yaml"))
        last = log(hub, "^PUT|/commit/")[-1:]
        return bool(put(hub)) and "/commit/" in last[0].path and last[0].status == 200

    struck_on_the_wire(hub, reached, "push", REPO, "--pool", cut.root)
    first, done = sent(hub), cut.is_there(tmp_path / "reader")
    assert done == (number == 5)
    again = cut.goes_on(tmp_path / "reader")
    print(f"{number}, {cut.state}: {first:,} bytes{' (all)' * done}, then {again:,} of "
          f"{cut.run.bytes:,}")  # fmt: skip


# -- interrupted by hand ----------------------------------------------------------------------


@pytest.mark.slow
def test_an_interrupted_pull_goes_on(world, tmp_path):
    cut = puller(world, tmp_path, 4)
    said = struck_on_the_wire(
        world.hub, lambda: bool(complete(world)), "pull", REPO, cut.root, how=signal.SIGINT
    )
    assert "interrupted: the pool is whole; run the same command again to go on" in said
    assert "Traceback" not in said
    assert not cut.has_all()
    assert len(complete(world) - cut.at_hand()) <= THREADS
    assert cut.goes_on() < cut.run.bytes


@pytest.mark.slow
def test_an_interrupted_push_goes_on(world, tmp_path):
    cut = pusher(world, tmp_path, 0)
    said = struck_on_the_wire(
        world.hub, lambda: bool(put(world.hub)), "push", REPO, "--pool", cut.root,
        how=signal.SIGINT,
    )  # fmt: skip
    assert "interrupted: the pool is whole; run the same command again to go on" in said
    assert "Traceback" not in said
    assert not cut.is_there(tmp_path / "reader")
    assert cut.goes_on(tmp_path / "reader") < cut.run.bytes


@pytest.mark.slow
def test_a_pull_from_a_silent_hub_can_be_interrupted(world, tmp_path):
    cut, silent = puller(world, tmp_path, 0), threading.Event()

    class Silent(list):
        def append(self, request: Request) -> None:
            super().append(request)
            if "/objects/" in request.path:
                silent.wait(DEADLINE)

    world.hub.requests = Silent()
    child = start(world.hub, "pull", REPO, cut.root)
    try:
        wait_until(lambda: bool(asked(world.hub)))
        child.send_signal(signal.SIGINT)
        child.wait(25.0)  # the client itself would give up after more than a minute
    except subprocess.TimeoutExpired:
        pytest.fail("it still waits for the network")
    finally:
        silent.set()
        ended(child, kill=True)
    assert child.returncode == 130


# -- a full disk ------------------------------------------------------------------------------


@pytest.fixture
def cramped(world, tmp_path):
    """A pull into a copy of mine on a file system of 40 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount("-t", "tmpfs", "-o", "size=40m", "tmpfs", disk)
    world.reset("newer on older")
    shutil.copytree(world.mine, disk / "pool")
    yield Puller(world, disk / "pool", "mine")
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_pull_that_the_disk_has_no_room_for(world, tmp_path, cli_run, monkeypatch):
    cut = puller(world, tmp_path, 4)
    with monkeypatch.context() as patch:
        patch.setattr(arrival.shutil, "disk_usage", lambda _: SimpleNamespace(free=4_000_000))
        done = cli_run("pull", REPO, cut.root, code=1)
    assert re.search("[0-9,]{9} bytes are to be written, and 4,000,000 are free", done.stderr)
    assert not asked(world.hub)
    assert not cut.has_all()
    cut.goes_on()


@pytest.mark.parametrize(
    "number", [10, *(pytest.param(n, marks=pytest.mark.campaign) for n in (6, 14))]
)
def test_a_pull_that_finds_the_disk_full(world, cramped, cli_run, number):
    filler = cramped.root.parent / "filler"
    world.hub.requests = Log(number, lambda: fill(cramped.root.parent, free=0))
    done = cli_run("pull", REPO, cramped.root, code=1)
    assert "No space left on device\nfree some disk space" in done.stderr
    assert not cramped.has_all()
    filler.unlink()
    cramped.goes_on()


# -- at the same time -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def diverged(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A pool, and two that grew out of it; both gave the names `star` and `more` to their own."""
    base = tmp_path_factory.mktemp("diverged")
    texts = pools.write_texts(base / "texts", ["alpha", "beta", "gamma"])
    seed = pools.model_folder(base / "seed")
    with Pool.create(base / "common") as pool:
        pool.add_model(seed, name="base", role="seed")
        grow(pool, base, seed, texts, {"alpha": 1})
    for name, other in (("beta", "gamma"), ("gamma", "beta")):
        shutil.copytree(base / "common", base / f"with-{name}")
        change_id(base / f"with-{name}", other)
        with Pool.open(base / f"with-{name}") as pool:
            grow(pool, base, seed, texts, {name: 1})
            star = pools.model_folder(base / f"{name}-star", seed=len(name))
            pool.add_model(star, name="star", role="other")
            pool.add_evalset("more", [texts / f"{name}.train.jsonl"])
            pool.add_partition("part", [texts / f"{other}.held.jsonl"], units=1)
    return base / "common", base / "with-beta", base / "with-gamma"


def change_id(root: Path, name: str) -> None:
    """Let a copy be a pool of its own, as one that was pulled would be."""
    write_marker(root, str(uuid.uuid5(uuid.NAMESPACE_DNS, name)))


def copies(diverged: tuple[Path, Path, Path], folder: Path) -> tuple[Path, Path]:
    one, other = (Path(shutil.copytree(root, folder / root.name)) for root in diverged[1:])
    return one, other


def push(root: Path) -> Pushed:
    with Pool.open(root) as pool:
        return pool.push(REPO)


def facts_of(*roots: Path) -> set[tuple[str, str]]:
    """The records of pools, but names: these hang on who came first."""
    found = set()
    for root in roots:
        found |= {one for one in holding(root)[0] if one[0] != "name"}
    return found


def meanings(root: Path) -> dict[tuple[str, str], set[str]]:
    """What each name means, with or without its origin."""
    found: dict[tuple[str, str], set[str]] = {}
    with Pool.open(root) as pool:
        for space in ("partition", "model", "evalset"):
            for name, target in pool.registry.names(space).items():
                found.setdefault((space, name.rpartition("/")[2]), set()).add(target)
    return found


def both(one: Path, other: Path) -> dict[tuple[str, str], set[str]]:
    found = meanings(one)
    for name, targets in meanings(other).items():
        found.setdefault(name, set()).update(targets)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("state", ["nothing", pytest.param("common", marks=pytest.mark.campaign)])
def test_a_push_between_look_and_commit(world, diverged, tmp_path, state):
    hub, (one, other) = world.hub, copies(diverged, tmp_path)
    world.reset("nothing")
    if state == "common":
        push(Path(shutil.copytree(diverged[0], tmp_path / "common")))
    hub.requests = []
    between: list[Pushed] = []
    hub.before_commit = lambda _: between.append(push(other))
    done = push(one)
    assert between[0].changed
    assert done.changed
    assert done.version == hub.head(REPO)
    assert [one.status for one in log(hub, "/commit/")].count(412) == 1
    assert not [digest for digest, times in Counter(put(hub)).items() if times > 1]
    pull(tmp_path / "reader")
    assert facts_of(tmp_path / "reader") == facts_of(one, other)
    assert meanings(tmp_path / "reader") == both(one, other)
    assert {(conflict.space, conflict.name) for conflict in done.clashes} == {
        ("model", "star"), ("evalset", "more"), ("partition", "part"),
    }  # fmt: skip
    assert not push(one).changed
    assert not push(other).changed


@pytest.mark.campaign
@pytest.mark.slow
def test_others_who_keep_publishing(world, diverged, tmp_path, monkeypatch):
    hub, (one, other) = world.hub, copies(diverged, tmp_path)
    world.reset("nothing")
    push(other)
    stored = set(hub.repo(REPO).uploads)
    hub.requests = []
    notes = itertools.count()

    def publish(_: Hub) -> None:
        hub.commit_files(REPO, {"README.md": b"note %d" % next(notes)})
        hub.before_commit = publish

    hub.before_commit = publish
    monkeypatch.setattr(pushing, "ATTEMPTS", 3)
    with pytest.raises(Conflict, match="others keep publishing"):
        push(one)
    hub.before_commit = None
    assert next(notes) == 3
    assert not stored & set(put(hub))
    pull(tmp_path / "reader")
    assert facts_of(tmp_path / "reader") == facts_of(other)
    hub.requests = []
    assert push(one).changed
    pull(tmp_path / "reader")
    assert facts_of(tmp_path / "reader") == facts_of(one, other)


@pytest.mark.campaign
@pytest.mark.slow
def test_two_processes_that_push_at_once(world, diverged, tmp_path):
    hub, two = world.hub, copies(diverged, tmp_path)
    world.reset("nothing")
    push(Path(shutil.copytree(diverged[0], tmp_path / "common")))
    for turn in range(3):
        hub.requests = []
        hub.before_commit = meet
        for root in two:
            (tmp_path / "new.txt").write_text(f"turn {turn} of {root.name}")
            with Pool.open(root) as pool:
                pool.add_evalset(f"turn-{turn}", [tmp_path / "new.txt"])
        children = [start(hub, "push", REPO, "--pool", root) for root in two]
        said = [ended(child) for child in children]
        assert [child.returncode for child in children] == [0, 0], said
        assert [one.status for one in log(hub, "/commit/")].count(412) == 1
        pull(tmp_path / "reader")
        assert facts_of(tmp_path / "reader") == facts_of(*two)
        assert meanings(tmp_path / "reader") == both(*two)


def meet(hub: Hub) -> None:
    """Let the first commit wait for the second."""
    wait_until(lambda: len(log(hub, "/commit/")) == 2)


@pytest.mark.campaign
@pytest.mark.slow
def test_a_union_in_both_orders(world, diverged, tmp_path):
    unions = []
    for turn in ("there", "back"):
        (tmp_path / turn).mkdir()
        two = copies(diverged, tmp_path / turn)
        expected, names = facts_of(*two), both(*two)
        plain = [meanings(root) for root in two]
        order = two if turn == "there" else two[::-1]
        world.reset("nothing")
        heads = []
        for _ in range(3):
            told = [act(root) for root in order for act in (push, pull)]
            heads.append(world.hub.head(REPO))
        # It comes to rest, in all of them.
        assert heads[1] == heads[2]
        assert [done.records for done in told] == [0] * 4
        pull(tmp_path / turn / "reader")
        for root in (*two, tmp_path / turn / "reader"):
            assert facts_of(root) == expected
            assert meanings(root) == names
        unions.append((expected, holding(two[0])[1]))
        assert holding(two[0])[1] == holding(two[1])[1]
        # What a name meant in a pool, it still means there.
        for root, before in zip(two, plain, strict=True):
            with Pool.open(root) as pool:
                for (space, name), targets in before.items():
                    assert {pool.registry.names(space)[name]} == targets
    assert unions[0] == unions[1]


def test_while_a_pull_runs_another_is_refused(world, tmp_path, cli_run):
    cut, refused = puller(world, tmp_path, 4), []

    def others() -> None:
        for act in (pull, push):
            with pytest.raises(Locked) as caught:
                act(cut.root)
            refused.append(caught.value.exit_code)

    world.hub.requests = Log(8, others)
    pull(cut.root)
    assert refused == [11, 11]
    assert holding(cut.root) == whole(cut.run.root)
    with lock(cut.root / "locks/sharing"):
        for words in (("pull", REPO, cut.root), ("push", REPO, "--pool", cut.root)):
            assert "another process is using this pool" in cli_run(*words, code=11).stderr


@pytest.mark.slow
def test_two_processes_that_pull_at_once(world, tmp_path):
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        cut = puller(world, folder, 4 * number)
        children = [start(world.hub, "pull", REPO, cut.root) for _ in range(2)]
        said = [ended(child) for child in children]
        codes = sorted(child.returncode for child in children)
        assert codes in ([0, 0], [0, 11]), said
        assert holding(cut.root) == whole(cut.run.root)


def test_a_new_folder_that_another_process_pulls_into_stays(tmp_path, monkeypatch):
    with Pool.create(tmp_path / "pool") as pool, lock(pool.root / "locks/sharing"):
        # As where both looked before either had made it.
        monkeypatch.setattr(Pool, "create", Pool.open)
        monkeypatch.setattr(Path, "exists", lambda _: False)
        with pytest.raises(Locked), opened(pool.root, None) as late:
            late.pull("file:///nowhere")
        assert (pool.root / "FORMAT").is_file()


def test_what_was_fetched_is_on_the_disk_before_it_is_named(world, tmp_path, monkeypatch):
    cut, flushed, adopt, fsync = puller(world, tmp_path, 0), set(), Journal.adopt, os.fsync
    waiting: list[Path] = []

    def flush(descriptor: int) -> None:
        fsync(descriptor)
        flushed.add(os.fstat(descriptor).st_ino)

    def look(journal: Journal, file: Path) -> None:
        found = (
            path for path in cut.root.glob("objects/??/*") if path.stat().st_ino not in flushed
        )
        waiting.extend(found)
        adopt(journal, file)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Journal, "adopt", look)
    pull(cut.root)
    assert waiting == []
    assert len(flushed) > len(whole(cut.run.root)[1])
