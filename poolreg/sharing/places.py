"""Where a pool can be published, and how it lies there.

    poolreg.json                  {"format": 1}: this is a published pool
    journal/<sha256>.jsonl        records, in the journal's own lines; one segment a push
    objects/ab/cdef…              as in a pool
    models/NAME/…                 the same weights once more, as folders that any tool loads
    tables/NAME.parquet           the catalog, for readers without poolreg
    README.md, heatmap.png        the card

Only the first three are read back; the rest is a view of them for people and other tools. All
are named by content or made anew, so two pools are merged by union wherever they lie.

A `Place` lists what is there as a `Snapshot`, fetches single files of it or reads parts of them,
and publishes new ones. What differs between the Hub, a folder on any file system and a tar file
stands in `hub.py`, `trees.py` and `bundles.py`; what is sent and believed is decided in `push.py`
and `pull.py` alone.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from poolreg.errors import NameRefused
from poolreg.files import storage_errors
from poolreg.mixture import check_name

MARKER = "poolreg.json"
MARK = b'{"format":1}'

_OBJECT = re.compile(r"objects/([0-9a-f]{2})/([0-9a-f]{62})")
_SEGMENT = re.compile(r"journal/([0-9a-f]{64})\.jsonl")


@dataclass(frozen=True)
class Entry:
    """One file of a place: its size in bytes, and its sha256 or git blob id where known."""

    size: int
    sha256: str | None = None
    git_blob: str | None = None


@dataclass(frozen=True)
class Snapshot:
    """What a place holds at one moment. `version` is the Hub's commit, else empty.

    A path is whatever the place says; nothing is opened or written by it unless `object_path`
    or `segment_path` made it.
    """

    files: Mapping[str, Entry]
    version: str = ""

    def objects(self) -> dict[str, Entry]:
        """Return the objects by digest."""
        return self._named(_OBJECT)

    def segments(self) -> dict[str, Entry]:
        """Return the journal's segments by digest."""
        return self._named(_SEGMENT)

    def _named(self, shape: re.Pattern[str]) -> dict[str, Entry]:
        found = ((shape.fullmatch(path), entry) for path, entry in self.files.items())
        return {"".join(match.groups()): entry for match, entry in found if match}


@dataclass(frozen=True)
class Outgoing:
    """A file to publish: its path there, the local file, and the sha256 and size of its bytes."""

    path: str
    source: Path
    sha256: str
    size: int

    @classmethod
    def of(cls, path: str, source: Path) -> Outgoing:
        """Hash a local file that is to be published as `path`."""
        with storage_errors(f"reading {source.name}"), open(source, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(path, source, digest, source.stat().st_size)

    def is_at(self, entry: Entry | None) -> bool:
        """Tell whether a place's file is known to be this one."""
        if entry is None or entry.size != self.size:
            return False
        if entry.sha256 is not None:
            return entry.sha256 == self.sha256
        return self.source.is_file() and entry.git_blob == _git_blob(self.source)


class Place(Protocol):
    """One place where a pool is, or will be, published.

    Methods raise the errors of `poolreg.errors` only.
    """

    url: str  # what the user calls it, without a password
    alias: str  # a short name that can stand before the names that come from there
    repo_type: str  # model or dataset on the Hub, else empty
    revision: str | None  # branch, tag or commit of the Hub

    def create(self) -> None:
        """Make the place, empty, unless it is there."""

    def look(self) -> Snapshot:
        """Return what is there now; raises `NotFound` where there is no such place."""

    def fetch(self, path: str, target: Path, *, progress: Callable[[int], None]) -> None:
        """Write one file of the last snapshot to `target`; `progress` is told bytes.

        Whether they are the right bytes is for the caller to check.
        """

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the sizes in bytes of the files below a folder, by path; none if it is not there.

        A look at this folder alone, be there a pool around it or not.
        """

    def read(self, path: str, start: int, end: int) -> bytes:
        """Return bytes [start, end) of one file of what was looked at last.

        May be called by several threads at once. Whether they are the right bytes, and as many,
        is for the caller to check.
        """

    def publish(
        self, snapshot: Snapshot, objects: Sequence[Outgoing], rest: Sequence[Outgoing],
        deleted: Sequence[str], *, message: str, progress: Callable[[int], None],
    ) -> str:  # fmt: skip
        """Send `objects`, then make `rest` visible with them at once; returns the new version.

        Raises `Moved` if the place is no longer as `snapshot` shows; nothing is visible then.
        """


class Moved(Exception):
    """The place is not as it was looked at, or may not be; look again and send what is missing."""


def _git_blob(file: Path) -> str:
    """Return the id that git gives to a file's content; only small files have one there."""
    data = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


class Unanswered(Moved):
    """Nobody said whether the commit was made; a look will tell."""


def alias_of(address: str) -> str:
    """Return the last part of a path or URL, made into a name; "pool" if nothing is left."""
    last = re.sub(r"^[a-z0-9+.-]+://", "", address).rstrip("/").rpartition("/")[2]
    alias = re.sub(r"[^A-Za-z0-9_.-]+", "-", last).strip("-_.")[:60] or "pool"
    try:
        return check_name(alias)
    except NameRefused:  # a number, or a reserved word
        return f"pool-{alias}"


def object_path(digest: str) -> str:
    """Return where an object lies."""
    return f"objects/{digest[:2]}/{digest[2:]}"


def segment_path(digest: str) -> str:
    """Return where a segment of the journal lies."""
    return f"journal/{digest}.jsonl"
