"""What a journal says, as far as two pools must know of each other to become one.

`Contents` is read from all of a pool's records: which are there, what names mean, what was
removed, which model stands for a base unit. `incoming` compares two of them and decides which
records one may take from the other: all that are new, except for what is true on one machine
only, and statements that would change a meaning behind somebody's back. A name that is taken is
kept beside the present one, with where it comes from: `hub/code`. A statement is followed where
its author had seen ours: then it was meant to replace it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from poolreg.canonical import digest_of
from poolreg.errors import Refused
from poolreg.mixture import MAX_NAME, check_name
from poolreg.store.journal import Record

# Where files lie on a machine, whose code may run there, what was sent where, races not yet run.
STAYING = frozenset({"location", "trust", "transfer", "lap"})
# Statistics are large, and are gathered again where they are needed.
_WITHOUT_OBJECTS = frozenset({"calibration"})
MOST_STATEMENTS = 2_000_000  # about 2 GB of memory

Spot = tuple[str, str]  # what a statement is about: (space, name), (kind, target), (seed, unit)

# Partitions and models both stand in expressions, so they share one space of names.
_OTHER = {"partition": "model", "model": "partition"}


@dataclass(frozen=True, slots=True)
class Statement:
    """The latest record about one spot: `target` is what the spot means since."""

    at: str
    id: str
    target: str
    removed: bool = False


@dataclass
class Contents:
    """What a pool's records say; `ids` is by kind."""

    ids: dict[str, set[str]] = field(default_factory=dict)
    namings: dict[Spot, Statement] = field(default_factory=dict)
    removals: dict[Spot, Statement] = field(default_factory=dict)
    standing: dict[Spot, Statement] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Iterable[Record]) -> Contents:
        """Read all of a pool's records."""
        contents = cls()
        for record in records:
            contents.add(record)
        return contents

    def add(self, record: Record) -> None:
        """Take one more record; raises `Refused` beyond any honest number of names."""
        self.ids.setdefault(record.kind, set()).add(record.id)
        body = record.body
        if record.kind == "name":
            said = Statement(record.at, record.id, body["target"])
            _keep(self.namings, (body["space"], body["name"]), said)
        elif record.kind == "removal":
            said = Statement(record.at, record.id, body["target"], bool(body["removed"]))
            _keep(self.removals, (body["kind"], body["target"]), said)
        for spot in unit_spots(record):
            _keep(self.standing, spot, Statement(record.at, record.id, body["model"]))
        if len(self.namings) + len(self.removals) + len(self.standing) > MOST_STATEMENTS:
            raise Refused(f"there are more than {MOST_STATEMENTS:,} names and removals")

    def has(self, kind: str, identity: str) -> bool:
        """Tell whether a record is there."""
        return identity in self.ids.get(kind, ())

    def removed(self, kind: str, target: str) -> bool:
        """Tell whether something is tombstoned."""
        latest = self.removals.get((kind, target))
        return latest is not None and latest.removed

    def meaning(self, space: str, name: str) -> str | None:
        """Return the digest that a name stands for."""
        latest = self.namings.get((space, name))
        return None if latest is None or self.removed(space, latest.target) else latest.target


def unit_spots(record: Record) -> list[Spot]:
    """Return the (seed, base unit) that a run makes a model stand for; none for other records."""
    if record.kind != "run" or record.body["role"] != "unit" or not record.body["seed"]:
        return []
    return [(record.body["seed"], unit["unit"]) for unit in record.body["units"]]


def _keep(latest: dict[Spot, Statement], spot: Spot, said: Statement) -> None:
    present = latest.get(spot)
    if present is None or (present.at, present.id) < (said.at, said.id):
        latest[spot] = said


def travelling(record: Record) -> Record:
    """Return a record as it travels: of a calibration only what was calibrated on what."""
    return replace(record, objects={}) if record.kind in _WITHOUT_OBJECTS else record


@dataclass(frozen=True)
class Clash:
    """Something that means something else on the other side, and how theirs is known beside it.

    `kept_as` is a name, or the beginning of a model's digest where a base unit has another model.
    """

    space: str
    name: str
    kept_as: str


@dataclass(frozen=True)
class Incoming:
    """What one side may take from the other: `wants` says it of each record; `made` are the
    namings that stand for those that may not. `moved` are names that follow the other side."""

    theirs: Contents
    ours: Contents
    refused: frozenset[Spot]
    made: tuple[Record, ...]
    clashes: tuple[Clash, ...]
    moved: tuple[str, ...]

    def wants(self, record: Record) -> bool:
        """Tell whether a record of theirs is to be added to ours."""
        if record.kind in STAYING or self.ours.has(record.kind, record.id):
            return False
        body = record.body
        if record.kind == "name":
            return (body["space"], body["name"]) not in self.refused
        if record.kind == "removal":
            lifted = not body["removed"]
            if lifted and _name_was_taken(self.ours, body["kind"], body["target"]):
                return False
            return self._wants_removal(body["kind"], body["target"])
        if record.kind == "build":
            return not self.ours.has("model", body["model"])  # how ours came to be is ours to say
        return not self.refused.intersection(unit_spots(record))

    def _wants_removal(self, kind: str, target: str) -> bool:
        if not self.theirs.has(kind, target):
            return False  # it would hide what neither side has, once it comes
        if not self.ours.has(kind, target):
            return True
        # What we have is ours to remove, unless they had seen what we last said of it.
        present = self.ours.removals.get((kind, target))
        return present is not None and self.theirs.has("removal", present.id)


def incoming(theirs: Contents, ours: Contents, *, origin: str) -> Incoming:
    """Decide what `ours` takes from `theirs`; `origin` is said before names that are taken.

    Raises `NameRefused` for an origin that cannot be a name.
    """
    check_name(origin)
    refused: set[Spot] = set()
    made: dict[Spot, Record] = {}
    clashes, moved = [], []
    for spot, said in sorted(theirs.namings.items()):
        space, name = spot
        known = _known_as(ours, space, name, said.target)
        if not known and _agrees(theirs, ours, space, name):
            if ours.meaning(space, name) not in (None, said.target) and _later(theirs, ours, spot):
                moved.append(f"{space} {name}")
            continue
        refused.add(spot)
        if known or theirs.removed(space, said.target) or _name_was_taken(ours, space, said.target):
            continue
        kept_as = _free(ours, made, space, origin, name, said.target)
        if ours.meaning(space, kept_as) == said.target:
            continue
        clashes.append(Clash(space, name, kept_as))
        made[space, kept_as] = _naming(space, kept_as, said)
    for spot, said in sorted(theirs.standing.items()):
        present = ours.standing.get(spot)
        gone = present is None or ours.removed("model", present.target)
        if present and not gone and not _follows(theirs.ids, ours.ids, "run", said, present):
            refused.add(spot)
            clashes.append(Clash("unit model", spot[1][:12], said.target[:12]))
        elif present and not gone and present.target != said.target and present.at < said.at:
            moved.append(f"unit {spot[1][:12]}")
    return Incoming(
        theirs, ours, frozenset(refused), tuple(made.values()), tuple(clashes), tuple(moved)
    )  # fmt: skip


def _name_was_taken(ours: Contents, kind: str, target: str) -> bool:
    """Tell whether a name of something that we removed is by now that of a thing of the other kind,
    so that it cannot come back as it was."""
    other = _OTHER.get(kind)
    if other is None or not ours.removed(kind, target):
        return False
    names = [name for (space, name), said in ours.namings.items()
             if (space, said.target) == (kind, target)]  # fmt: skip
    return any(ours.meaning(other, name) is not None for name in names)


def _naming(space: str, name: str, said: Statement) -> Record:
    # The time is that of the naming itself, so that saying it again changes nothing.
    body = {"space": space, "name": name, "target": said.target, "parent": None}
    key = digest_of({"kind": "name", "body": body, "at": said.at})
    return Record("name", key, body, {}, said.at)


def _free(
    ours: Contents, made: dict[Spot, Record], space: str, origin: str, name: str, target: str
) -> str:
    """Return what to call `name` here: with its origin, and more where that is taken, too."""
    plain = name.replace("/", "-")
    if len(plain) > MAX_NAME:
        plain = f"{plain[: MAX_NAME - 13]}-{target[:12]}"
    for kept_as in (f"{origin}/{plain}", f"{origin[: MAX_NAME - 7]}-{target[:6]}/{plain}"):
        other = _OTHER.get(space, space)
        taken = (space, kept_as) in made or ours.meaning(space, kept_as) not in (None, target)
        if not taken and (other == space or not ours.meaning(other, kept_as)):
            return kept_as
    return f"{origin[: MAX_NAME - 65]}-{target}/{plain}"


def _later(theirs: Contents, ours: Contents, spot: Spot) -> bool:
    said, present = theirs.namings[spot], ours.namings[spot]
    return (present.at, present.id) < (said.at, said.id)


def _agrees(theirs: Contents, ours: Contents, space: str, name: str) -> bool:
    """Tell whether taking their namings of a name changes nothing that we did not follow."""
    said, present = theirs.namings[space, name], ours.namings.get((space, name))
    other = _OTHER.get(space)
    if other and ours.meaning(other, name):
        return False
    if present is None:
        return True
    later = (present.at, present.id) < (said.at, said.id)
    if later and ours.meaning(space, name) is None:
        return True  # what we called so is gone
    return _follows(theirs.ids, ours.ids, "name", said, present)


def _follows(
    theirs: dict[str, set[str]], ours: dict[str, set[str]], kind: str, said: Statement,
    present: Statement,
) -> bool:  # fmt: skip
    """Tell whether the later of two statements means the same, or was made knowing the earlier."""
    if present.target == said.target:
        return True
    if (present.at, present.id) < (said.at, said.id):
        return present.id in theirs.get(kind, ())
    return said.id in ours.get(kind, ())


def _known_as(ours: Contents, space: str, name: str, target: str) -> bool:
    """Tell whether a name with an origin is what we ourselves call by the plain name."""
    _, slash, plain = name.partition("/")
    return bool(slash) and ours.meaning(space, plain) == target
