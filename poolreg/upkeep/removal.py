"""Removal: taking things out of a pool, and back into it while their data is here.

A removed thing has a tombstone: it is in no list, its names are free, and what was measured stays.
Its data stays until it is collected. Restoring lifts the tombstone, if all that the thing is made
of is here or can be made again; adding the same thing again does so, too.
"""

from __future__ import annotations

import contextlib
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from poolreg.errors import Conflict, NotFound, UsageError
from poolreg.models.merges import builds_of, can_rebuild, rebuild
from poolreg.models.resolve import Resolver
from poolreg.progress import SILENT, Progress
from poolreg.store.journal import Record
from poolreg.store.registry import Registry, unknown_name

KINDS = ("partition", "evalset", "model")
GRACE = timedelta(days=14)
"""How long the data of what was removed is kept, if nobody says otherwise."""

_SHORTEST_PREFIX = 6


@dataclass(frozen=True)
class Dependents:
    """So many things that rest on another, with the names of the first few."""

    noun: str
    relation: str
    count: int
    first: tuple[str, ...]


@dataclass(frozen=True)
class Removed:
    """Something that was taken out of the pool, and what rests on it."""

    kind: str
    name: str
    digest: str
    dependents: tuple[Dependents, ...]


@dataclass(frozen=True)
class Restorable:
    """Something that is removed. `name` is what it was called (None: it never had a name).

    `objects` and `bytes` of it are here, `left` objects are where a pull left them, and `missing`
    ones were collected; `until` is when the default grace ends, after which those here may be, too.
    """

    kind: str
    name: str | None
    digest: str
    removed: datetime
    until: datetime
    objects: int
    bytes: int
    left: int
    missing: int
    names: tuple[str, ...] = field(default=(), repr=False)  # it has them again, once restored
    ever: tuple[str, ...] = field(default=(), repr=False)  # all that it was ever called


@dataclass(frozen=True)
class Restored:
    """Something that is back. `name` is what it is called now, `rebuilt` says that its weights
    were made again; `left` objects of it are, as before, only where the pool was pulled from."""

    kind: str
    name: str
    digest: str
    rebuilt: bool
    left: int


# -- taking out ------------------------------------------------------------------------------


def remove(registry: Registry, names: Sequence[str], *, kind: str | None = None) -> list[Removed]:
    """Tombstone all that is named, or nothing; names, unique digest prefixes, labels of models.

    Raises `NotFound`, and `UsageError` where a name means several things and `kind` says not which.
    """
    found = list(dict.fromkeys(_present(registry, name, kind) for name in names))
    removed = [
        Removed(space, label, digest, tuple(dependents(registry, digest)))
        for space, digest, label in found
    ]
    registry.record(*(registry.removal(space, digest, removed=True) for space, digest, _ in found))
    return removed


def dependents(registry: Registry, digest: str) -> list[Dependents]:
    """Return what rests on a partition, evalset or model."""
    return [
        Dependents(row["noun"], row["relation"], row["count"], tuple(row["first"]))
        for row in registry.select("dependents", digest=digest)
    ]


def _present(registry: Registry, text: str, kind: str | None) -> tuple[str, str, str]:
    """Return kind, digest and label of the one thing that `text` names."""
    text = unicodedata.normalize("NFC", text)
    found = []
    for space in (kind,) if kind else KINDS:
        try:
            found.append((space, _digest(registry, space, text, labels=bool(kind)), text))
        except NotFound:
            continue
    if not found and not kind:
        with contextlib.suppress(NotFound, UsageError):
            found = [("model", Resolver(registry).stored(text), text)]  # such as code/2
    # A name goes before the beginning of a digest that happens to be spelled alike.
    named = [item for item in found if text in registry.names(item[0])]
    found = named or found
    if len(found) > 1:
        raise UsageError(
            f"{text!r} is {' and '.join(_with_article(space) for space, _, _ in found)}",
            hint="say which with --kind",
        )
    if found:
        return found[0]
    if any(text in (*item.names, item.digest) for item in removed_things(registry)):
        raise NotFound(f"{text!r} is removed already", hint="see: poolreg restore", name=text)
    spaces = (kind,) if kind else KINDS
    known = {name: "" for space in spaces for name in registry.names(space)}
    raise unknown_name(kind or "partition, evalset or model", text, known)


def _digest(registry: Registry, space: str, text: str, *, labels: bool) -> str:
    if space == "model" and labels:
        return Resolver(registry).stored(text)
    return registry.resolve(space, text)


def _with_article(kind: str) -> str:
    return f"an {kind}" if kind == "evalset" else f"a {kind}"


# -- taking back -----------------------------------------------------------------------------


def removed_things(registry: Registry) -> list[Restorable]:
    """Return all that is removed, the latest first."""
    rows = registry.select("removed")
    objects = _objects_of(registry, [row["digest"] for row in rows])
    return [_restorable(registry, row, objects.get(row["digest"], [])) for row in rows]


def _restorable(
    registry: Registry, row: dict[str, Any], objects: Sequence[dict[str, Any]]
) -> Restorable:
    here = [item for item in objects if registry.objects.holds(item["object"], item["bytes"])]
    left = sum(item["was_left"] for item in objects if item not in here)
    label = [row["label"]] if row["label"] else []
    return Restorable(
        row["kind"], [*row["names"], *row["ever"], *label, None][0], row["digest"],
        row["removed"], row["removed"] + GRACE, len(here), sum(item["bytes"] for item in here),
        left, len(objects) - len(here) - left, tuple(row["names"]), (*row["ever"], *label),
    )  # fmt: skip


def _objects_of(registry: Registry, digests: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in registry.select("objects_of", digests=list(digests)):
        found.setdefault(row["of"], []).append(row)
    return found


def restore(
    registry: Registry, names: Sequence[str], *, kind: str | None = None, name: str | None = None,
    progress: Progress = SILENT,
) -> list[Restored]:  # fmt: skip
    """Lift the tombstones of all that is named, or of nothing.

    With `name` the one thing gets that name. A kept merge whose weights were collected is made
    again from its parents. Raises `NotFound` for what is not removed or not here any more,
    `UsageError` where a name means several removed things, `Conflict` where its name is taken.
    """
    if name and len(names) != 1:
        raise UsageError("one name is for one thing", hint="restore them one after the other")
    with registry.writing():  # from the look at the objects to the records
        gone = removed_things(registry)
        chosen = list({item.digest: item for item in (
            _absent(registry, gone, text, kind) for text in names)}.values())  # fmt: skip
        new: list[Record] = []
        for item in chosen:
            new += _naming(registry, item, name)
        _refuse_clashes(chosen)
        rebuilt = {item.digest: _complete(registry, item, progress) for item in chosen}
        registry.record(
            *new, *(registry.removal(item.kind, item.digest, removed=False) for item in chosen)
        )
    return [
        Restored(
            item.kind, name or item.name or item.digest[:12], item.digest, rebuilt[item.digest],
            item.left,
        )
        for item in chosen
    ]  # fmt: skip


def _absent(
    registry: Registry, gone: Iterable[Restorable], text: str, kind: str | None
) -> Restorable:
    """Return the one removed thing that `text` names, or once named."""
    text = unicodedata.normalize("NFC", text)
    of_kind = [item for item in gone if kind in (None, item.kind)]
    is_prefix = len(text) >= _SHORTEST_PREFIX and not set(text) - set("0123456789abcdef")
    found = (
        [item for item in of_kind if text in item.names]
        or [item for item in of_kind if text in item.ever]
        or [item for item in of_kind if is_prefix and item.digest.startswith(text)]
    )
    if len(found) > 1:
        kinds = {item.kind for item in found}
        listed = ", ".join(f"{item.kind} {item.digest[:12]}" for item in found)
        hint = "say which with --kind, or by its digest" if len(kinds) > 1 else "say its digest"
        raise UsageError(f"{text!r} names several removed things: {listed}", hint=hint)
    if found:
        return found[0]
    if any(text in registry.names(space) for space in ((kind,) if kind else KINDS)):
        raise NotFound(f"{text!r} is in the pool; it is not removed", hint="see: poolreg ls")
    known = {name: "" for item in of_kind for name in (*item.names, *item.ever)}
    raise unknown_name(f"removed {kind or 'partition, evalset or model'}", text, known)


def _naming(registry: Registry, item: Restorable, name: str | None) -> list[Record]:
    """Return the record that names a thing, if it needs one; raises `Conflict` for a taken name."""
    for present in item.names:
        registry.check_free(item.kind, present, item.digest)
    if name:
        name = registry.check_free(item.kind, name, item.digest)
        return [registry.naming(item.kind, name, item.digest)]
    if not item.names and item.kind != "model":  # a model goes without a name, too
        raise Conflict(
            f"the name of {item.kind} {item.digest[:12]}, {item.name!r}, means something else now",
            hint="give it another name with --as NAME",
        )
    return []


def _refuse_clashes(chosen: Sequence[Restorable]) -> None:
    """Raise `Conflict` for a partition and a model of one name that are restored together."""
    seen: dict[str, str] = {}
    for item in chosen:
        for label in item.names if item.kind != "evalset" else ():
            if seen.setdefault(label, item.digest) != item.digest:
                raise Conflict(
                    f"{label!r} is a partition and a model; they share their names",
                    hint="restore one of them",
                )


def _complete(registry: Registry, item: Restorable, progress: Progress) -> bool:
    """See that what a thing is made of is here; tell whether it had to be made again.

    What a partial pull left may stay where it is.
    """
    rows = _objects_of(registry, [item.digest]).get(item.digest, [])
    lacking = [r for r in rows if not registry.objects.holds(r["object"], r["bytes"])]
    if not any(not row["was_left"] for row in lacking):
        return False
    for build in builds_of(registry, item.digest) if item.kind == "model" else ():
        if can_rebuild(registry, build):
            progress.start("rebuilding", sum(row["bytes"] for row in lacking), "bytes")
            rebuild(registry, build, progress=progress)
            if all(registry.objects.holds(row["object"], row["bytes"]) for row in rows):
                return True
    hint = {
        "model": "add the model again: poolreg model add DIR; or, where the pool was pushed or "
        "pulled, fetch its data with poolreg pull, and restore it then",
        "partition": "add its text again: poolreg partition add NAME FILE…",
        "evalset": "add its text again: poolreg evalset add NAME FILE…",
    }[item.kind]
    raise NotFound(
        f"the data of {item.kind} {item.name or item.digest[:12]} was collected: {len(lacking)} "
        f"of its {len(rows)} objects are gone",
        hint=hint, digest=item.digest, lacking=[row["object"] for row in lacking],
    )  # fmt: skip
