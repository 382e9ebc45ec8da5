"""What a journal says, as far as two pools must know of each other to become one.

`Contents` is read from all of a pool's records: which are there, what names mean, what was
removed. `incoming` compares two of them and decides which records one may take from the other:
all that are new, except for what is true on one machine only and names that would change their
meaning. Such a name is kept beside the present one, with where it comes from: `hub/code`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from poolreg.canonical import digest_of
from poolreg.store.journal import Record

# Where files lie on a machine, and what was sent where.
STAYING = frozenset({"location", "transfer"})

# Statistics are large, and are gathered again where they are needed.
_WITHOUT_OBJECTS = frozenset({"calibration"})

Place = tuple[str, str]  # (space, name) of a naming, (kind, target) of a removal

# Partitions and models both stand in expressions, so they share one space of names.
_OTHER = {"partition": "model", "model": "partition"}


@dataclass(frozen=True)
class Statement:
    """The latest record about one name or one removal."""

    at: str
    id: str
    body: dict[str, Any]

    @property
    def target(self) -> str:
        """The digest that it is about."""
        return str(self.body["target"])


@dataclass
class Contents:
    """What a pool's records say; `ids` is by kind."""

    ids: dict[str, set[str]] = field(default_factory=dict)
    namings: dict[Place, Statement] = field(default_factory=dict)
    removals: dict[Place, Statement] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Iterable[Record]) -> Contents:
        """Read all of a pool's records."""
        contents = cls()
        for record in records:
            contents.add(record)
        return contents

    def add(self, record: Record) -> None:
        """Take one more record."""
        self.ids.setdefault(record.kind, set()).add(record.id)
        statement = Statement(record.at, record.id, record.body)
        if record.kind == "name":
            _keep(self.namings, (record.body["space"], record.body["name"]), statement)
        elif record.kind == "removal":
            _keep(self.removals, (record.body["kind"], record.body["target"]), statement)

    def has(self, kind: str, identity: str) -> bool:
        """Tell whether a record is there."""
        return identity in self.ids.get(kind, ())

    def removed(self, kind: str, target: str) -> bool:
        """Tell whether something is tombstoned."""
        latest = self.removals.get((kind, target))
        return latest is not None and bool(latest.body["removed"])

    def meaning(self, space: str, name: str) -> str | None:
        """Return the digest that a name stands for."""
        latest = self.namings.get((space, name))
        return None if latest is None or self.removed(space, latest.target) else latest.target


def _keep(latest: dict[Place, Statement], place: Place, statement: Statement) -> None:
    present = latest.get(place)
    if present is None or (present.at, present.id) < (statement.at, statement.id):
        latest[place] = statement


def travelling(record: Record) -> Record:
    """Return a record as it travels: of a calibration only what was calibrated on what."""
    return replace(record, objects={}) if record.kind in _WITHOUT_OBJECTS else record


@dataclass(frozen=True)
class Conflict:
    """A name that means something else on the other side, and what it is called beside it."""

    space: str
    name: str
    kept_as: str


@dataclass(frozen=True)
class Incoming:
    """What one side may take from the other: `wants` says it of each record; `made` are the
    namings that stand for those that may not."""

    theirs: Contents
    ours: Contents
    refused: frozenset[Place]
    made: tuple[Record, ...]
    conflicts: tuple[Conflict, ...]

    def wants(self, record: Record) -> bool:
        """Tell whether a record of theirs is to be added to ours."""
        if record.kind in STAYING or self.ours.has(record.kind, record.id):
            return False
        if record.kind == "name":
            return (record.body["space"], record.body["name"]) not in self.refused
        if record.kind == "removal":
            # What we have too is for us to remove.
            return not self.ours.has(record.body["kind"], record.body["target"])
        return True


def incoming(theirs: Contents, ours: Contents, *, origin: str) -> Incoming:
    """Decide what `ours` takes from `theirs`; `origin` is said before names that are taken."""
    refused, made, conflicts = set(), [], []
    for (space, name), statement in theirs.namings.items():
        known = _known_as(ours, space, name, statement.target)
        if not known and _agrees(theirs, ours, space, name):
            continue
        refused.add((space, name))
        if known or theirs.removed(space, statement.target):
            continue
        kept_as = f"{origin}/{name.replace('/', '-')}"
        if ours.meaning(space, kept_as) == statement.target:
            continue
        conflicts.append(Conflict(space, name, kept_as))
        body = {"space": space, "name": kept_as, "target": statement.target, "parent": None}
        # The time is that of the naming itself, so that saying it again changes nothing.
        key = digest_of({"kind": "name", "body": body, "at": statement.at})
        made.append(Record("name", key, body, {}, statement.at))
    made.sort(key=lambda record: record.id)
    return Incoming(theirs, ours, frozenset(refused), tuple(made), tuple(conflicts))


def _agrees(theirs: Contents, ours: Contents, space: str, name: str) -> bool:
    """Tell whether taking their namings of a name changes nothing that we did not follow."""
    statement, present = theirs.namings[space, name], ours.namings.get((space, name))
    other = _OTHER.get(space)
    if other and ours.meaning(other, name):
        return False
    if present is None:
        return True
    if (present.at, present.id) >= (statement.at, statement.id):
        # Ours is later, so it stays; that is right if it means the same or came after theirs.
        return present.target == statement.target or ours.has("name", statement.id)
    return (
        ours.meaning(space, name) in (None, statement.target)
        or theirs.has("name", present.id)  # they had ours and gave the name to something else
    )


def _known_as(ours: Contents, space: str, name: str, target: str) -> bool:
    """Tell whether a name with an origin is what we ourselves call by the plain name."""
    _, slash, plain = name.partition("/")
    return bool(slash) and ours.meaning(space, plain) == target
