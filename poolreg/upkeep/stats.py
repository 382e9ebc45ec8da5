"""How large a pool is and why: bytes by what they hold, what sharing saves, what is biggest.

What stands in the folder is measured there, in one walk; what it is for comes from the catalog.
Sizes are those of the files in bytes, not of the blocks that they take.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from poolreg.canonical import is_digest
from poolreg.files import storage_errors
from poolreg.store.registry import Registry

# Folders and files beside objects/ and journal/.
_BESIDE = ("FORMAT", "tmp", "quarantine", "locks", "catalog.duckdb")


@dataclass(frozen=True)
class Content:
    """Objects that hold one kind of thing: those here, and those that records name and are not.

    Of the missing ones `left_elsewhere` were left by a pull where they came from.
    """

    content: str
    objects: int
    bytes: int
    missing: int
    missing_bytes: int
    left_elsewhere: int


@dataclass(frozen=True)
class Journal:
    """The segments of the journal."""

    segments: int
    bytes: int
    largest: str
    largest_bytes: int


@dataclass(frozen=True)
class Place:
    """A part of the pool's folder."""

    files: int
    bytes: int


@dataclass(frozen=True)
class Sharing:
    """What is stored once for all: the files of all models have `bytes` together, the distinct
    ones among them `distinct_bytes`; `saved_bytes` is the difference."""

    bytes: int
    distinct_bytes: int
    saved_bytes: int


@dataclass(frozen=True)
class Big:
    """One of the biggest objects; `owners` is how many things it belongs to, `owner` the first."""

    digest: str
    bytes: int
    owner: str
    owners: int


@dataclass(frozen=True)
class Stats:
    """What a pool comes to. `unnamed` are files under objects/ that no record names, `merges` the
    averages that were asked for and never stored, `places` the rest of the folder."""

    records: dict[str, int]
    journal: Journal
    contents: tuple[Content, ...]
    unnamed: Place
    model_files: Sharing
    merges: int
    merges_bytes: int
    places: dict[str, Place]
    biggest: tuple[Big, ...]
    bytes: int
    free_bytes: int
    disk_bytes: int


def stats(registry: Registry, *, biggest: int = 10) -> Stats:
    """Measure a pool; `biggest` is how many of its largest objects are listed."""
    here, strange = _walk(registry.objects.folder)
    rows = registry.select("object_use", digests=list(here), sizes=list(here.values()))
    unnamed = strange
    contents = []
    for row in rows:
        if row["content"] == "of no record":
            unnamed = Place(strange.files + row["objects"], strange.bytes + row["bytes"])
        else:
            contents.append(Content(**row))
    segments = registry.journal.segments()
    largest = max(segments, key=lambda name: segments[name], default="")
    journal = Journal(
        len(segments), sum(segments.values()), largest, segments.get(largest, 0)
    )  # fmt: skip
    (shared,) = registry.select("shared_bytes")
    (merges,) = registry.select("unstored_merges")
    places = {name: measured(registry.root / name) for name in _BESIDE}
    disk = shutil.disk_usage(registry.root)
    return Stats(
        {row["kind"]: row["records"] for row in registry.select("record_counts")}, journal,
        tuple(contents), unnamed,
        Sharing(**shared, saved_bytes=shared["bytes"] - shared["distinct_bytes"]),
        merges["merges"], merges["bytes"], places, _biggest(registry, here, biggest),
        sum(here.values()) + strange.bytes + journal.bytes + sum(p.bytes for p in places.values()),
        disk.free, disk.total,
    )  # fmt: skip


def _walk(folder: Path) -> tuple[dict[str, int], Place]:
    """Return the objects in a store with their sizes, and what else lies there."""
    here: dict[str, int] = {}
    files = size = 0
    for path, status in files_below(folder):
        # objects/ab/cdef…: the folder's two digits are the digest's first
        _, parent, name = path.rsplit("/", 2)
        if len(parent) == 2 and is_digest(parent + name):
            here[parent + name] = status.st_size
        else:
            files, size = files + 1, size + status.st_size
    return here, Place(files, size)


def _biggest(registry: Registry, here: dict[str, int], number: int) -> tuple[Big, ...]:
    chosen = heapq.nsmallest(number, here, key=lambda digest: (-here[digest], digest))
    owners: dict[str, list[str]] = {digest: [] for digest in chosen}
    for row in registry.select("object_owners", digests=chosen):
        owners[row["digest"]].append(row["owner"])
    return tuple(
        Big(digest, here[digest], found[0] if found else "", len(found))
        for digest, found in owners.items()
    )


def files_below(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Yield all that is no folder below `folder`, as it is; what vanishes meanwhile is no more."""
    todo = [str(folder)]
    while todo:
        with storage_errors(f"looking through {folder.name}"):
            try:
                found = list(os.scandir(todo.pop()))
            except FileNotFoundError:
                continue
            for entry in found:
                if entry.is_dir(follow_symlinks=False):
                    todo.append(entry.path)
                    continue
                with contextlib.suppress(FileNotFoundError):
                    yield entry.path, entry.stat(follow_symlinks=False)


def measured(path: Path) -> Place:
    """Return the files in a folder, or one file, with their bytes; nothing where nothing is."""
    if path.is_file():
        return Place(1, path.stat().st_size)
    sizes = [status.st_size for _, status in files_below(path)]
    return Place(len(sizes), sum(sizes))
