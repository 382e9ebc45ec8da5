"""The census of a pool: which objects its records name, and which of them something still needs.

It is taken from the journal itself, never from the catalog: verification and collection both go
by it. A record is dead when it is about a partition, model or evalset that is tombstoned, or holds
statistics that were gathered with one; all others live, those of unknown kinds too. An object is
dead when only dead records name it.

A million evaluations with an object each take about 300 MB.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from poolreg.canonical import is_digest
from poolreg.errors import Damage
from poolreg.progress import SILENT, Progress
from poolreg.store.journal import Record
from poolreg.store.registry import Registry

Thing = tuple[str, str]  # (partition, model or evalset; digest), or (space, name)

_MORTAL = frozenset({"partition", "model", "evalset"})
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]{15}Z")
_STEP = 1000  # records between two reports of progress


class Known(NamedTuple):
    """A place that the pool was pushed to or pulled from, and when last."""

    at: str
    place: str
    repo_type: str
    revision: str | None


class Dead(NamedTuple):
    """An object that only dead records name: its size in bytes, and when the last of them died."""

    size: int
    at: str


@dataclass(frozen=True)
class Census:
    """What the records of a journal name; objects stand as the 32 bytes of their digests.

    `live` and `dead` are disjoint. `weights` are weights files of models, `left` are objects that
    a partial pull left where they came from, `spare` are statistics that are gathered again where
    they are missed. `tombstones` says since when something is removed,
    `names` what each name stands for, `known` all partitions, evalsets and models, `builds` how
    kept merges were made, by model, and `places` where other copies may be, newest first.
    """

    records: int
    live: dict[bytes, int]
    dead: dict[bytes, Dead]
    weights: set[bytes]
    left: set[bytes]
    spare: set[bytes]
    tombstones: dict[Thing, str]
    names: dict[Thing, str]
    known: set[Thing]
    builds: dict[str, list[dict[str, Any]]]
    places: tuple[Known, ...]

    def size(self, digest: bytes) -> int | None:
        """Return the size that an object should have; None for one that no record names."""
        size = self.live.get(digest)
        if size is None and digest in self.dead:
            return self.dead[digest].size
        return size

    def dangling(self) -> list[Thing]:
        """Return the names that stand for what is in no record."""
        targets = {digest for _, digest in self.known}
        return sorted(spot for spot, target in self.names.items() if target not in targets)


def census(registry: Registry, *, progress: Progress = SILENT) -> Census:
    """Read the whole journal once; raises `Damage` for the first bad line, `UnknownFormat`."""
    counter = Counter()
    progress.start("reading the journal", 0, "records")
    for record in registry.journal.all():
        counter.add(record)
        if counter.records % _STEP == 0:
            progress.advance(_STEP)
    return counter.census()


class _Mortal(NamedTuple):
    things: tuple[Thing, ...]  # whose death kills the record
    objects: dict[bytes, int]


@dataclass
class Counter:
    """Takes records one by one, in any order; `census` may be asked for when all were taken."""

    records: int = 0
    live: dict[bytes, int] = field(default_factory=dict)
    weights: set[bytes] = field(default_factory=set)
    left: set[bytes] = field(default_factory=set)
    spare: set[bytes] = field(default_factory=set)
    known: set[Thing] = field(default_factory=set)
    builds: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    _places: dict[tuple[str, str, str | None], str] = field(default_factory=dict)
    _mortal: list[_Mortal] = field(default_factory=list)
    _removals: dict[Thing, tuple[str, str, bool]] = field(default_factory=dict)
    _namings: dict[Thing, tuple[str, str, str]] = field(default_factory=dict)

    def add(self, record: Record) -> None:
        """Take one record; raises `Damage` for one that does not say what it must."""
        try:
            self._add(record)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise Damage(
                f"a {record.kind} record lacks or mistypes a field: {error}",
                hint="the segment was written by something else than poolreg; put back what "
                "poolreg wrote, from a copy of the pool",
                record=record.id,
            ) from error
        self.records += 1

    def _add(self, record: Record) -> None:
        kind, body = record.kind, record.body
        objects = dict(_sized(record.objects))
        things = tuple(_needs(record))
        if things:
            self._mortal.append(_Mortal(things, objects))
        else:
            _join(self.live, objects)
        if kind in _MORTAL:
            self.known.add((kind, record.id))
        if kind == "model":
            files = body["files"]
            self.weights.update(_key(f["object"]) for f in files if f["role"] == "weights")
        elif kind == "calibration":
            self.spare.update(objects)
        elif kind == "removal":
            said = (_time(record.at), record.id, _truth(body["removed"]))
            _keep(self._removals, (body["kind"], body["target"]), said)
        elif kind == "name":
            _keep(self._namings, (body["space"], body["name"]), (record.at, record.id,
                                                                 body["target"]))  # fmt: skip
        elif kind == "transfer":
            self.left.update(map(_key, body["left"]))
            spot = body["place"], body["repo_type"], body["revision"]
            self._places[spot] = max(record.at, self._places.get(spot, ""))
        elif kind == "build" and body not in self.builds.setdefault(body["model"], []):
            self.builds[body["model"]].append(body)

    def census(self) -> Census:
        """Tell the living from the dead."""
        tombstones = {thing: at for thing, (at, _, removed) in self._removals.items() if removed}
        dead: dict[bytes, Dead] = {}
        for mortal in self._mortal:
            since = [tombstones[thing] for thing in mortal.things if thing in tombstones]
            if not since:
                _join(self.live, mortal.objects)
                continue
            for digest, size in mortal.objects.items():
                before = dead.get(digest, Dead(0, ""))
                # A record died with the first of what it needs, an object with its last record.
                dead[digest] = Dead(max(size, before.size), max(min(since), before.at))
        for digest in [digest for digest in dead if digest in self.live]:
            self.live[digest] = max(self.live[digest], dead.pop(digest).size)
        places = (Known(at, *spot) for spot, at in self._places.items())
        names = {spot: target for spot, (_, _, target) in self._namings.items()}
        return Census(
            self.records, self.live, dead, self.weights, self.left, self.spare, tombstones, names,
            self.known, self.builds, tuple(sorted(places, key=lambda place: place.at)[::-1]),
        )  # fmt: skip


def _needs(record: Record) -> Iterator[Thing]:
    """Yield the things without which a record is of no use; none for a record that never dies."""
    if record.kind in _MORTAL:
        yield record.kind, record.id
    elif record.kind == "calibration":
        yield "model", record.body["subject"]
        yield record.body["text_kind"], record.body["text"]


def _sized(objects: dict[str, int]) -> Iterator[tuple[bytes, int]]:
    for digest, size in objects.items():
        if type(size) is not int or size < 0:
            raise ValueError(f"the size of {digest[:12]} is {size!r}")
        yield _key(digest), size


def _key(digest: Any) -> bytes:
    if not isinstance(digest, str) or not is_digest(digest):
        raise ValueError(f"{str(digest)[:64]!r} is not a digest")
    return bytes.fromhex(digest)


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is not true or false")
    return value


def _time(at: str) -> str:
    # Times are compared as text, which is right in this form only.
    if not _TIME.fullmatch(at):
        raise ValueError(f"{at[:40]!r} is not a time")
    return at


def _join(objects: dict[bytes, int], more: dict[bytes, int]) -> None:
    for digest, size in more.items():
        if objects.setdefault(digest, size) < size:
            objects[digest] = size


def _keep(
    latest: dict[Thing, tuple[str, str, Any]], thing: Thing, said: tuple[str, str, Any]
) -> None:
    present = latest.get(thing)
    if present is None or present[:2] < said[:2]:
        latest[thing] = said
