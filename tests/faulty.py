"""The commands that change a pool, each on a pool made for it, for tests that cut them short.

Run as a script it does one of them: `faulty.py NAME FOLDER`, where FOLDER is what `prepare` filled.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from collecting import add_calibration, add_evalset, journal, live_objects, stored
from pools import Tiny, add_data, unit_folder

from poolreg import Pool, faults
from poolreg.canonical import sha256
from poolreg.errors import NotFound
from poolreg.evaluation.protocol import Protocol, evaluation_id
from poolreg.models.merges import keep_merge
from poolreg.store import records

# What a second try may say once more, or otherwise: what was sent, and that a thing is not removed.
PASSING = ("transfer", "removal")
STATEMENTS = ("name", "location", "trust")
_KINDS = ("partition", "evalset", "model")


@dataclass(frozen=True)
class Command:
    """Something that changes the pool of a folder, and what was done there before."""

    run: Callable[[Path, Pool], object]
    before: Callable[[Path, Pool], object] = lambda *_: None
    damaged: bool = False  # whether the pool is so until it ran


PROTOCOL = Protocol(16, "0" * 64)


def add_evaluation(pool: Pool, subject: str, evalset: str) -> str:
    """Record an evaluation as a measurement would, with its scores and protocol."""
    objects: dict[str, int] = {}
    with pool.registry.writing():
        body = {
            "subject": subject, "evalset": evalset, "protocol": PROTOCOL.digest, "nll": 1.5,
            "tokens": 2, "bytes": 3, "documents": 1, "seconds": 0.5, "device": "cpu",
            "document_scores": pool.registry.put(f"{subject} {evalset}".encode(), objects),
            "token_scores": None,
        }  # fmt: skip
        key = evaluation_id(subject, evalset, PROTOCOL.digest)
        pool.registry.record(
            records.keyed("protocol", PROTOCOL.digest, PROTOCOL.as_record()),
            records.keyed("evaluation", key, body, objects),
        )
    return key


# -- commands, each given the folder that holds the pool and what else it needs -----------------


def _put(place: Path, pool: Pool) -> None:
    (place / "file").write_bytes(b"a file of some bytes")
    pool.registry.objects.put_file(place / "file")
    pool.registry.objects.put(b"some bytes")


def _partition(place: Path, pool: Pool) -> None:
    pool.add_partition("delta", [place.parent.parent / "delta.txt"], units=2)


def _model(place: Path, pool: Pool) -> None:
    pool.add_model(place.parent.parent / "new", name="new", role="unit", partition="alpha",
                   seed="base", replace=True)  # fmt: skip


def _merge(place: Path, pool: Pool) -> None:
    subject = pool.resolve("alpha+beta")
    keep_merge(pool.registry, subject, "merged", threads=1, replace=True)


def _evaluate(place: Path, pool: Pool) -> None:
    subject, evalset = pool.registry.names("model")["base"], pool.registry.names("evalset")["beta"]
    add_evaluation(pool, subject, evalset)
    add_calibration(pool.registry, subject, evalset, "evalset", [b"layer 1", b"layer 2"])


def _name(place: Path, pool: Pool) -> None:
    target = pool.registry.names("evalset")["beta"]
    pool.registry.record(*(records.name("evalset", label, target) for label in ("alpha", "zeta")))


def _rm(place: Path, pool: Pool) -> None:
    with contextlib.suppress(NotFound):  # done already
        pool.rm(["beta", "gamma"], kind="evalset")


def _restore(place: Path, pool: Pool) -> None:
    with contextlib.suppress(NotFound):
        pool.restore(["beta", "gamma"], kind="evalset")


def _some_garbage(place: Path, pool: Pool) -> None:
    _rm(place, pool)
    pool.rm(["beta/1"], kind="model")
    pool.registry.objects.put(b"what a killed writer left")


def _many_segments(place: Path, pool: Pool) -> None:
    for number in range(2):
        with Pool.open(pool.root) as other:
            add_evalset(other.registry, f"more-{number}", f"text {number}")


def _unindexed(place: Path, pool: Pool) -> None:
    with contextlib.closing(Pool.open(pool.root).registry) as other:
        other.record(records.name("evalset", "beta", other.names("evalset")["alpha"]))


def _without_catalog(place: Path, pool: Pool) -> None:
    pool.registry.close()
    (pool.root / "catalog.duckdb").unlink()


def _friend(place: Path, where: Callable[[Pool], object]) -> None:
    with Pool.create(place / "friend") as friend:
        evalset = add_evalset(friend.registry, "gift", "a text from elsewhere")
        add_evalset(friend.registry, "alpha", "another text of a name that is taken")
        model = friend.add_model(place.parent.parent / "new", name="given").digest
        add_evaluation(friend, model, evalset)
        where(friend)
    shutil.rmtree(place / "friend")


def _published(place: Path) -> str:
    return f"file://{place}/published"


def _damage(place: Path, pool: Pool) -> None:
    (row,) = [row for row in pool.registry.select("evalset_contents")
              if row["digest"] == pool.registry.names("evalset")["beta"]]  # fmt: skip
    file = pool.registry.objects.path(row["content"])
    file.chmod(0o644)
    file.write_bytes(b"x" * file.stat().st_size)
    pool.registry.close()
    (pool.root / "catalog.duckdb").write_bytes(b"no catalog" * 1000)
    segment = min((pool.root / "journal").iterdir())
    segment.with_name("0-copy.jsonl").write_bytes(segment.read_bytes()[:-9] + b"x" * 8 + b"\n")


COMMANDS = {
    "put": Command(_put),
    "add evalset": Command(lambda _, pool: add_evalset(pool.registry, "new", "a new text")),
    "add partition": Command(_partition),
    "add model": Command(_model),
    "keep a merge": Command(_merge),
    "evaluate": Command(_evaluate),
    "name": Command(_name),
    "rm": Command(_rm),
    "restore": Command(_restore, _rm),
    "index": Command(lambda _, pool: pool.registry.names("evalset"), _without_catalog),
    "index what is new": Command(lambda _, pool: pool.registry.names("evalset"), _unindexed),
    "gc": Command(lambda _, pool: pool.gc(grace=timedelta(0)), _some_garbage),
    "compact": Command(lambda _, pool: pool.compact(), _many_segments),
    "pull": Command(
        lambda place, pool: pool.pull(_published(place)),
        lambda place, _: _friend(place, lambda friend: friend.push(_published(place))),
    ),
    "push": Command(
        lambda place, pool: pool.push(_published(place)),
        lambda place, pool: (pool.push(_published(place), results_only=True),
                             add_evalset(pool.registry, "new", "a new text")),
    ),
    "bundle": Command(
        lambda place, pool: pool.apply_bundle(place / "gifts.tar"),
        lambda place, _: _friend(place, lambda friend: friend.create_bundle(place / "gifts.tar")),
    ),
    "repair": Command(lambda _, pool: pool.verify(full=True, repair=True), _damage, damaged=True),
}  # fmt: skip


# -- prepared folders --------------------------------------------------------------------------


@dataclass(frozen=True)
class Workshop:
    """Prepares the folder of each command once, below `base`, and hands out copies."""

    base: Path
    tiny: Tiny
    _made: dict[str, Path] = field(default_factory=dict)

    def place(self, name: str) -> Path:
        """A folder as it is before a command: with the pool, and what else the command needs."""
        if name not in self._made:
            first = self.base / "first" / name
            shutil.copytree(self._start(), first)
            with opened(first) as pool:
                COMMANDS[name].before(first, pool)
            self._made[name] = first
        return Path(shutil.copytree(self._made[name], self.base / "trials" / secrets.token_hex(4)))

    def _start(self) -> Path:
        """A folder with a pool of two partitions with a model each, and three evalsets."""
        if not (start := self.base / "start").exists():
            (self.base / "delta.txt").write_text("some lines\nto train on\n")
            unit_folder(self.base / "new", self.tiny.seed, 77)
            with Pool.create(start / "pool") as pool:
                add_data(pool, self.tiny.texts, {"alpha": 1, "beta": 1})
                pool.add_evalset("gamma", [self.tiny.texts / "gamma.held.jsonl"])
                pool.add_model(self.tiny.seed, name="base", role="seed")
                for name in ("alpha", "beta"):
                    folder = self.tiny.units[name, 1]
                    pool.add_model(folder, role="unit", partition=name, seed="base")
        return start


@contextlib.contextmanager
def opened(place: Path) -> Iterator[Pool]:
    """The pool of a folder, as it is: closing it does not index it."""
    pool = Pool.open(place / "pool")
    try:
        yield pool
    finally:
        pool.registry.close()


def run(name: str, place: Path) -> None:
    """Do a command."""
    with opened(place) as pool:
        COMMANDS[name].run(place, pool)


class Steps(faults._Fault):
    """Takes the place of a fault and notes the steps that are passed."""

    def __init__(self) -> None:
        super().__init__("*", 0, "trace")
        self.passed_so_far: list[str] = []

    def passed(self, step: str) -> None:
        self.passed_so_far.append(step)

    def firsts(self) -> list[tuple[str, int]]:
        """The first passing of each step."""
        return [(step, 1) for step in dict.fromkeys(self.passed_so_far)]

    def ends(self) -> list[tuple[str, int]]:
        """The first and the last passing of each step."""
        times = Counter(self.passed_so_far)
        return [(step, n) for step, last in times.items() for n in sorted({1, last})]


# -- what is looked at afterwards ----------------------------------------------------------------


@dataclass(frozen=True)
class Holding:
    """What a pool says, but for when it was said, and the digests of objects that it needs."""

    records: Counter[str]
    names: dict[tuple[str, str], str]
    removed: frozenset[str]
    objects: frozenset[str]


def holding(place: Path) -> Holding:
    """Read a pool, whose names must resolve; whatever it needs is intact."""
    root = place / "pool"
    found = Counter(_said(line) for line in journal(root) if line["kind"] not in PASSING)
    needed, here = live_objects(root), stored(root)
    assert needed <= here.keys()
    for digest in needed:
        assert sha256(here[digest].read_bytes()) == digest
    with opened(place) as pool:
        names = {
            (space, name): target
            for space in _KINDS
            for name, target in pool.registry.names(space).items()
        }
        for (space, name), target in names.items():
            assert pool.registry.resolve(space, name) == target
        assert {line["id"] for line in journal(root)} >= set(names.values())
        removed = frozenset(item.digest for item in pool.removed())
    return Holding(found, names, removed, frozenset(needed))


def _said(record: dict) -> str:
    """A record without its time, which is part of a statement's id."""
    named = [] if record["kind"] in STATEMENTS else [record["id"]]
    return json.dumps([record["kind"], *named, record["body"], record["objects"]])


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]))
