"""The registry: objects, journal and catalog of one pool, changed together.

The invariant is kept here: objects are on the disk before the journal record that names them,
so a crash leaves garbage and never a dangling name. Names and digests are resolved here too.

    pool/
      FORMAT            the marker: format and identity
      objects/          immutable bytes, named by their sha256
      journal/          append-only records, one segment a writer
      catalog.duckdb    derived from the journal; safe to delete
      locks/  tmp/      flock files; staging on the same file system
"""

from __future__ import annotations

import contextlib
import difflib
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from poolreg.canonical import canonical_json
from poolreg.errors import Conflict, NoPool, NotFound, UsageError
from poolreg.files import lock, storage_errors
from poolreg.mixture import check_name
from poolreg.store import records
from poolreg.store.catalog import Catalog
from poolreg.store.journal import Journal, Record
from poolreg.store.marker import read_marker, write_marker
from poolreg.store.objects import ObjectStore

_PASSING = ("locks", "tmp")
_FOLDERS = ("objects", "journal", *_PASSING)
_SHORTEST_PREFIX = 6

# Partitions and models both stand in expressions, so they share one space of names.
_OTHER_SPACE = {"partition": "model", "model": "partition"}


class Registry:
    """One opened pool. Use `create`, `open` or `find`; `close` when done."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.objects = ObjectStore(root / "objects", root / "tmp")
        self.journal = Journal(root / "journal")
        self.catalog = Catalog(root, self.journal)
        self._writers = root / "locks" / "writers"

    @classmethod
    def create(cls, root: Path) -> Registry:
        """Make an empty pool; raises `Conflict` if the folder holds a pool or anything else."""
        if (root / "FORMAT").exists():
            raise Conflict(f"{root} is a pool already", hint="use it, or choose another folder")
        if root.exists() and not root.is_dir():
            raise Conflict(f"{root} is a file", hint="choose another folder")
        strange = (
            [p.name for p in root.iterdir() if p.name not in _FOLDERS] if root.exists() else []
        )
        if strange:
            raise Conflict(
                f"{root} is not empty (it holds {strange[0]!r})",
                hint="a pool needs a folder of its own, for example: poolreg init pool",
            )
        with storage_errors(f"making the pool {root}"):
            for name in _FOLDERS:
                (root / name).mkdir(parents=True, exist_ok=True)
            # Last: only a folder with FORMAT is a pool.
            write_marker(root)
        return cls.open(root)

    @classmethod
    def open(cls, root: Path) -> Registry:
        """Open the pool in `root`; raises `NoPool`, `UnknownFormat` or `Damage`."""
        read_marker(root)
        with storage_errors(f"opening the pool {root}"):
            for name in _PASSING:  # a copy of a pool may lack what was empty
                (root / name).mkdir(exist_ok=True)
        return cls(root)

    @classmethod
    def find(cls, given: str | Path | None = None) -> Registry:
        """Open `given`, else $POOLREG_POOL, else the nearest pool upwards from here.

        A folder counts when it is a pool or holds one in its subfolder `pool`.
        """
        chosen = given or os.environ.get("POOLREG_POOL")
        if chosen:
            root = Path(chosen).absolute()
            inner = root / "pool"
            return cls.open(inner if not (root / "FORMAT").is_file() and inner.is_dir() else root)
        here = Path.cwd()
        for folder in (here, *here.parents):
            for candidate in (folder, folder / "pool"):
                if (candidate / "FORMAT").is_file():
                    return cls.open(candidate)
        raise NoPool(
            f"no pool in {here} or above it",
            hint="make one with `poolreg init pool`, or name one with --pool DIR or POOLREG_POOL",
        )

    @property
    def id(self) -> str:
        """The pool's identity, made when the pool was; a copy has the same."""
        return read_marker(self.root)

    def close(self) -> None:
        """Close the catalog's connection."""
        self.catalog.close()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the writers' lock (shared) from the first object to the record that names it."""
        with lock(self._writers, shared=True, what="the pool"):
            yield

    @contextlib.contextmanager
    def steady(self) -> Iterator[None]:
        """Keep collection and compaction away while a long reading goes on.

        A pool that cannot be written to is steady as it is.
        """
        with contextlib.ExitStack() as stack:
            if os.access(self._writers.parent, os.W_OK):
                stack.enter_context(self.writing())
            yield

    @contextlib.contextmanager
    def alone(self, *, timeout: float | None = 10.0) -> Iterator[None]:
        """Keep all writers away, for what deletes files; raises `Locked`."""
        with lock(self._writers, timeout=timeout, what="the pool: nothing may write to it now"):
            yield

    def put_json(self, value: Any, objects: dict[str, int]) -> str:
        """Store canonical JSON, note its size in `objects`, and return its digest."""
        return self.put(canonical_json(value), objects)

    def put(self, data: bytes, objects: dict[str, int]) -> str:
        """Store bytes, note their size in `objects`, and return their digest."""
        digest = self.objects.put(data)
        objects[digest] = len(data)
        return digest

    def record(self, *new: Record) -> None:
        """Append records to the journal; returns when they are on the disk."""
        with self.writing():
            self.journal.append(new)

    def select(self, lookup: str, **parameters: Any) -> list[dict[str, Any]]:
        """Run a named look-up over an up-to-date catalog."""
        self.catalog.refresh()
        return self.catalog.select(lookup, **parameters)

    def one(self, lookup: str, **parameters: Any) -> dict[str, Any]:
        """Return the single row of a look-up that must find one; raises `NotFound`."""
        rows = self.select(lookup, **parameters)
        if not rows:
            what = " ".join(str(value)[:12] for value in parameters.values())
            raise NotFound(f"the pool does not hold {what}", hint="see: poolreg ls")
        return rows[0]

    # -- names ---------------------------------------------------------------------------

    def names(self, space: str) -> dict[str, str]:
        """Return the current names of a space with the digests that they name."""
        return {row["name"]: row["target"] for row in self.select("names", space=space)}

    def resolve(self, space: str, text: str) -> str:
        """Return the digest that a name or a unique digest prefix stands for.

        Raises `NotFound` with the nearest names, `UsageError` for an ambiguous prefix.
        """
        names = self.names(space)
        text = unicodedata.normalize("NFC", text)
        if text in names:
            return names[text]
        if len(text) >= _SHORTEST_PREFIX and not set(text) - set("0123456789abcdef"):
            found = [row["digest"] for row in self.select(f"{space}_digests", prefix=text)]
            if len(found) > 1:
                raise UsageError(
                    f"{text} begins {len(found)} {space} digests", hint="give more of its digits"
                )
            if found:
                return str(found[0])
        raise self.unknown(space, text, names)

    def unknown(self, space: str, text: str, known: Mapping[str, Any]) -> NotFound:
        """Return the error for a name that is not there: it was removed, or never was."""
        for row in self.select("removed"):
            if row["kind"] in space and text in (*row["names"], row["label"], row["digest"]):
                return NotFound(
                    f"the {row['kind']} {text} was removed",
                    hint=f"bring it back with: poolreg restore {text}",
                    name=text,
                )
        return unknown_name(space, text, known)

    def check_free(
        self, space: str, name: str, target: str | None, *, replace: bool = False
    ) -> str:
        """Return `name` in normal form if it may be given to `target`; raises `Conflict`."""
        name = check_name(name)
        other = _OTHER_SPACE.get(space)
        if other and name in self.names(other):
            raise Conflict(
                f"{name!r} names a {other} already; partitions and models share their names",
                hint="choose another name",
            )
        present = self.names(space).get(name)
        if present not in (None, target) and not replace:
            raise Conflict(
                f"the {space} name {name!r} is taken by {str(present)[:12]}",
                hint="choose another name, or pass --replace to move the name to the new one",
            )
        return name

    def remove(self, space: str, text: str) -> str:
        """Tombstone what `text` names and return its digest; the data stays until gc."""
        digest = self.resolve(space, text)
        self.record(self.removal(space, digest, removed=True))
        return digest

    def removal(self, space: str, digest: str, *, removed: bool) -> Record:
        """Return the record that removes a thing, or restores it, from now on.

        Raises `Conflict` where a name that a restored thing would get back is another thing's.
        """
        if not removed:
            self._check_names_come_back(space, digest)
        last = self._last("last_removal", digest=digest)
        return records.removal(space, digest, removed=removed, after=last)

    def _check_names_come_back(self, space: str, digest: str) -> None:
        other = _OTHER_SPACE.get(space)
        taken = self.names(other) if other else {}
        for row in self.select("names_of", space=space, target=digest):
            if row["name"] in taken:
                raise Conflict(
                    f"this {space} is known here and was removed; it was called {row['name']!r}, "
                    f"which names a {other} now",
                    hint=f"name or remove the {other} otherwise first",
                )

    def naming(self, space: str, name: str, target: str, *, parent: str | None = None) -> Record:
        """Return the record that gives a name its meaning from now on."""
        last = self._last("last_naming", space=space, label=name)
        return records.name(space, name, target, parent=parent, after=last)

    def location(self, partition: str, files: Sequence[Mapping[str, Any]], field: str) -> Record:
        """Return the record that says where a partition's text lies from now on."""
        last = self._last("last_location", partition=partition)
        return records.location(partition, files, field, after=last)

    def _last(self, lookup: str, **parameters: str) -> str:
        """Return when the latest statement of a kind was made; "" if there is none."""
        return str(self.select(lookup, **parameters)[0]["at"] or "")


def unknown_name(space: str, text: str, known: Mapping[str, Any]) -> NotFound:
    """Return the error for a name that is not there, with the nearest ones as the way out."""
    near = difflib.get_close_matches(text, list(known), n=3, cutoff=0.5)
    listed = ", ".join(near or sorted(known)[:8])
    hint = f"did you mean {listed}?" if near else f"known names: {listed or 'none yet'}"
    shown = text if len(text) <= 60 and text.isprintable() else repr(text[:60])
    return NotFound(f"no {space} is named {shown}", hint=hint, name=text)
