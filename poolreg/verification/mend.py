"""Mending what a pool is held together by: FORMAT, the segments of the journal, the catalog.

All of it is done with every writer kept away. What is replaced is kept in quarantine/ first, each
change is one rename, and whatever a kill leaves is found and mended by the next run.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from poolreg import faults
from poolreg.canonical import canonical_json
from poolreg.errors import (
    Damage,
    NoPool,
    PoolregError,
    QueryError,
    UnknownFormat,
    UsageError,
)
from poolreg.files import read_capped, storage_errors, write_atomic
from poolreg.store.journal import parse
from poolreg.store.marker import NAME, has_checksum, read_marker, write_marker
from poolreg.store.registry import Registry
from poolreg.store.sandbox import peek
from poolreg.upkeep.census import Known
from poolreg.verification import quarantine
from poolreg.verification.findings import Mended
from poolreg.verification.lines import check, memory, sound
from poolreg.verification.salvage import salvage

_STAGED = "journal.mended"
_LOST = "records.lost"  # in tmp/, while records are lost that a known place may have
_ID = re.compile(rb'"id":"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})"')


def mend_folders(registry: Registry) -> Iterator[Mended]:
    """Make the folders without which nothing can be read."""
    for folder in (registry.objects.folder, registry.journal.folder):
        if not folder.is_dir():
            faults.step("repair.folder")
            with storage_errors(f"making {folder.name}/"):
                folder.mkdir()
            yield Mended(f"{folder.name}/", "made, empty")


def mend_marker(registry: Registry) -> Iterator[Mended]:
    """Write FORMAT anew where it is damaged, gone, or without a checksum; keep what can be read."""
    file = registry.root / NAME
    try:
        identity: str | None = read_marker(registry.root)
        if has_checksum(registry.root):
            return
    except (NoPool, Damage):
        found = _ID.search(file.read_bytes()[:4096]) if file.is_file() else None
        identity = found[1].decode() if found else None
    kept = quarantine.keep(registry, file) if file.is_file() else ""
    faults.step("repair.marker")
    write_marker(registry.root, identity)
    yield Mended(NAME, "written anew" + (", with the same id" if identity else ""), kept)


# -- the journal -----------------------------------------------------------------------------


def records_lost(registry: Registry) -> bool:
    """Tell whether records were lost, by this run or one before, and not looked for elsewhere."""
    return (registry.root / "tmp" / _LOST).exists()


def note_lost(registry: Registry) -> None:
    """Note that records are lost, and where the catalog says that others may be.

    A run after a kill finds it, and the places of which the journal may know nothing any more.
    """
    places: dict[tuple[str | None, ...], Known] = {}
    for place in (*noted_places(registry), *_remembered_places(registry)):
        places.setdefault(place[1:], place)
    noted = canonical_json([list(place) for place in places.values()])
    write_atomic(registry.root / "tmp" / _LOST, noted)


def forget_lost(registry: Registry) -> None:
    """Note that lost records were looked for."""
    with storage_errors("noting what was looked for"):
        (registry.root / "tmp" / _LOST).unlink(missing_ok=True)


def noted_places(registry: Registry) -> list[Known]:
    """Return the places that were noted when records were lost, newest first."""
    try:
        data = read_capped(registry.root / "tmp" / _LOST, 1 << 20, error=UsageError, what=_LOST)
        return [Known(*fields) for fields in json.loads(data)]
    except (UsageError, ValueError, TypeError):
        return []


def _remembered_places(registry: Registry) -> list[Known]:
    sql = "SELECT added::VARCHAR, place, repo_type, revision FROM transfers ORDER BY added DESC"
    try:
        return [Known(*row) for row in peek(registry.catalog.path, sql).rows]
    except QueryError:
        return []


@dataclass
class _Good:
    """What can be kept of a segment: lines as they are, lines that were set right, and bytes of
    bad lines that hold no record any more."""

    lines: list[tuple[int, int]]  # offsets, so that a large segment need not be in memory
    saved: list[bytes]
    lost: int = 0
    lost_bytes: int = 0


def mend_segments(registry: Registry) -> Iterator[Mended]:
    """Replace each segment with a bad line by one of its good lines."""
    read = memory(registry).read
    for name, size in registry.journal.segments().items():
        good = _good(registry, name, size, read.get(name, 0))
        if not good.lost and not good.saved:
            continue
        path = registry.journal.folder / name
        kept = quarantine.keep(registry, path)
        if good.lost:
            note_lost(registry)
        staged = registry.root / "tmp" / _STAGED
        if good.lines or good.saved:
            _write(registry, name, good)
            faults.step("repair.segment")
            registry.journal.adopt(staged)
        registry.journal.drop([name])
        yield Mended(f"journal/{name}", _told(good), kept)


def _told(good: _Good) -> str:
    told = [f"{len(good.lines):,} good lines kept"]
    if good.saved:
        told.append(f"{len(good.saved):,} damaged lines set right")
    if good.lost:
        told.append(f"{good.lost:,} lost ({good.lost_bytes:,} bytes)")
    return ", ".join(told)


def _good(registry: Registry, name: str, size: int, read: int) -> _Good:
    good = _Good([], [])
    bad: list[bytes] = []

    def settle() -> None:
        damaged = b"".join(bad)
        saved = salvage(damaged)
        good.saved += saved
        good.lost += max(0, len(bad) - len(saved))
        good.lost_bytes += max(0, len(damaged) - sum(map(len, saved)))
        bad.clear()

    for offset, line in registry.journal.lines(name, 0, size):
        last = offset + len(line) >= size and not line.endswith(b"\n")
        if not last and _kept(line, name, offset):
            settle()
            good.lines.append((offset, len(line)))
        elif not last or offset < read or sound(line[:-1]):
            bad.append(line)
    settle()
    return good


def _kept(line: bytes, segment: str, offset: int) -> bool:
    """Tell whether a line is a record, or one of a newer format."""
    if not line.endswith(b"\n") or not sound(line[:-1]):
        return False
    try:
        check(parse(line, segment, offset))
    except UnknownFormat:
        return True
    except PoolregError:
        return False
    return True


def _write(registry: Registry, name: str, good: _Good) -> None:
    """Write what is kept of a segment to a file beside the journal, flushed."""
    with (
        storage_errors("mending the journal"),
        open(registry.journal.folder / name, "rb") as reader,
        open(registry.root / "tmp" / _STAGED, "wb") as writer,
    ):
        for offset, length in good.lines:
            reader.seek(offset)
            writer.write(reader.read(length))
        writer.writelines(good.saved)
        faults.step("repair.write")
        writer.flush()
        os.fsync(writer.fileno())


# -- the catalog -----------------------------------------------------------------------------


def mend_catalog(registry: Registry) -> Iterator[Mended]:
    """Keep the present catalog, which may know what is lost, and make it anew."""
    path = registry.catalog.path
    kept = quarantine.keep(registry, path) if path.is_file() else ""
    faults.step("repair.catalog")
    try:
        registry.catalog.rebuild()
        done = "made anew from the journal"
    except (Damage, UnknownFormat) as error:
        done = f"cannot be made: {error.message}"
    yield Mended("catalog.duckdb", done, kept)
