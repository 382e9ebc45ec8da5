"""Doctor: can poolreg work here, and does anything stand in the way of the pool?

Where `verify` asks whether the pool is what it was, this asks about its surroundings: versions,
disk, file system, locks, clock, leftovers. Nothing of the pool is changed, nor its catalog brought
up to date; a pool that is read-only, of another format or without a catalog can be looked at.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from poolreg.doctor.checks import Check
from poolreg.doctor.environment import environment
from poolreg.doctor.filesystem import file_system
from poolreg.doctor.holders import Holder, holders
from poolreg.errors import NoPool, PoolregError, QueryError
from poolreg.schema import statements
from poolreg.store.indexing import SCHEMA_VERSION
from poolreg.store.registry import Registry
from poolreg.store.sandbox import peek
from poolreg.upkeep.stats import files_below

MANY_SEGMENTS = 1000
_OLD = 24 * 3600  # seconds after which what lies in tmp/ is called left over
_READ_AT_MOST = 64 << 20  # bytes of journal that the catalog has not read
_SHOWN = 3  # leftovers
_AHEAD = 120  # seconds that clocks of several machines may differ
_NEXT = "the next command that reads makes it: poolreg ls"


@dataclass(frozen=True)
class _Catalog:
    """What the published catalog says, `indexed` being how far it has read each segment."""

    largest_model: int = 0
    newest: str = ""
    indexed: dict[str, int] | None = None


def doctor(folder: str | Path | None = None, *, torch: bool = False) -> list[Check]:
    """Check the environment and the pool: `folder`, else the one that `Registry.find` finds.

    Without a pool, and with none asked for, only the environment is checked. `torch` also looks
    for a GPU, which takes seconds. Raises `NoPool` if the pool that was asked for is not there.
    """
    try:
        registry = Registry.find(folder)
    except NoPool:
        if folder or os.environ.get("POOLREG_POOL"):
            raise
        none = Check("pool", "unknown", "none here or above", "poolreg init, or --pool DIR")
        return [*environment(torch=torch), none]
    except PoolregError as error:
        failed = Check("pool", "failed", error.message, error.hint)
        return [*environment(torch=torch), failed]
    try:
        return examine(registry, torch=torch)
    finally:
        registry.close()


def examine(registry: Registry, *, torch: bool = False) -> list[Check]:
    """Check the environment and an opened pool."""
    catalog, checked = _catalog(registry)
    held = holders(registry.root)
    return [
        *environment(torch=torch),
        Check("pool", "ok", str(registry.root)),
        *file_system(registry.root, largest_model=catalog.largest_model),
        _locks(held),
        _leftovers(registry.root / "tmp", {holder.lock for holder in held or ()}),
        _journal(registry),
        checked,
        _clock(registry, catalog),
    ]


# -- catalog, journal, clock -----------------------------------------------------------------


def _catalog(registry: Registry) -> tuple[_Catalog, Check]:
    path = registry.root / "catalog.duckdb"
    if not path.is_file():
        return _Catalog(), Check("catalog", "warning", "not there", _NEXT)
    try:
        ((version,),) = _asked(path, "catalog_version")
        if version != SCHEMA_VERSION:
            found = f"of version {version}, this poolreg's is {SCHEMA_VERSION}"
            return _Catalog(), Check("catalog", "warning", found, _NEXT)
        ((largest, newest, indexed),) = _asked(path, "checkup")
    except (QueryError, ValueError) as error:
        found = f"cannot be read: {str(error).splitlines()[0]}"
        return _Catalog(), Check("catalog", "warning", found, _NEXT)
    stamp = f"{newest:%Y-%m-%dT%H:%M:%S.%fZ}" if newest else ""
    catalog = _Catalog(largest, stamp, indexed or {})
    return catalog, _up_to_date(registry, indexed or {})


def _asked(path: Path, lookup: str) -> list[tuple[Any, ...]]:
    return peek(path, statements("lookups.sql")[lookup].sql).rows


def _up_to_date(registry: Registry, indexed: dict[str, int]) -> Check:
    segments = registry.journal.segments()
    lost = [name for name, size in indexed.items() if size > segments.get(name, 0)]
    if lost:
        return Check(
            "catalog", "failed", f"it has read more of journal/{lost[0]} than is there",
            "restore the segment from a copy of the pool; else: poolreg verify --repair",
        )  # fmt: skip
    new = sum(size - indexed.get(name, 0) for name, size in segments.items())
    if not new:
        return Check("catalog", "ok", "up to date")
    found = f"{new:,} bytes of the journal are not in it yet"
    if not os.access(registry.root, os.W_OK):
        return Check("catalog", "warning", f"{found}, and it cannot be written to",
                     "run poolreg ls where the pool is writable")  # fmt: skip
    return Check("catalog", "ok", f"{found}; the next command reads them")


def _journal(registry: Registry) -> Check:
    sizes = registry.journal.segments().values()
    found = f"{len(sizes):,} segments, {sum(sizes):,} bytes"
    if len(sizes) > MANY_SEGMENTS:
        return Check("journal", "warning", f"{found}: many small files are slow to look through",
                     "poolreg journal compact")  # fmt: skip
    return Check("journal", "ok", found)


def _clock(registry: Registry, catalog: _Catalog) -> Check:
    segments = registry.journal.segments()
    indexed = catalog.indexed or {}
    new = sum(size - indexed.get(name, 0) for name, size in segments.items())
    if new > _READ_AT_MOST:
        return Check("clock", "unknown", "not looked: the catalog is far behind the journal", _NEXT)
    newest = catalog.newest
    try:
        for name, size in segments.items():
            for record, _ in registry.journal.read(name, indexed.get(name, 0), size):
                newest = max(newest, record.at)
    except PoolregError as error:
        return Check("clock", "failed", error.message, error.hint)
    if not newest:
        return Check("clock", "ok", "no records yet")
    present = datetime.now(UTC)
    times = f"newest record {newest[:19]}, now {present:%Y-%m-%dT%H:%M:%S} (UTC)"
    if _seconds(newest) <= present.timestamp() + _AHEAD:
        return Check("clock", "ok", times)
    return Check("clock", "warning", f"it ran ahead, or stands behind now: {times}",
                 "set the clock; until then a new name may lose to an earlier one")  # fmt: skip


def _seconds(at: str) -> float:
    try:
        return datetime.fromisoformat(at).timestamp()
    except ValueError:
        return float("inf")


# -- processes and what they left ------------------------------------------------------------


def _locks(found: list[Holder] | None) -> Check:
    if found is None:
        return Check("locks", "unknown", "this system does not tell who holds them")
    if not found:
        return Check("locks", "ok", "nobody holds one")
    text = "; ".join(_told(holder) for holder in found)
    if any(holder.waiting for holder in found):
        return Check("locks", "warning", text,
                     "wait for the holder, or end it: a pool is whole at any time")  # fmt: skip
    return Check("locks", "ok", text)


def _told(holder: Holder) -> str:
    does = "waits for" if holder.waiting else "holds" if holder.exclusive else "shares"
    who = holder.command or "of another container or user"
    return f"process {holder.process} {does} {holder.lock} ({who})"


def _leftovers(folder: Path, in_use: set[str]) -> Check:
    """Tell what lies in tmp/ and is not in use."""
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        with contextlib.suppress(FileNotFoundError):  # its writer was done meanwhile
            if f"tmp/{path.name}" not in in_use:
                found.append((path.name, *_age_and_size(path)))
    if not found:
        return Check("tmp", "ok", "nothing left over")
    found.sort(key=lambda item: -item[1])
    told = [f"{name} ({_ago(age)}, {size:,} bytes)" for name, age, size in found[:_SHOWN]]
    more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    text = f"{len(found)} in {sum(size for *_, size in found):,} bytes: {', '.join(told)}{more}"
    if found[0][1] < _OLD:
        return Check("tmp", "ok", f"{text}; from work that goes on, or was broken off lately")
    return Check("tmp", "warning", f"{text}; left over from work that was broken off",
                 "poolreg gc --dry-run shows what it would delete")  # fmt: skip


def _age_and_size(path: Path) -> tuple[float, int]:
    """Return the seconds since anything in a file or folder changed, and its bytes."""
    if path.is_dir() and not path.is_symlink():
        found = [status for _, status in files_below(path)]
    else:
        found = []
    times = [status.st_mtime for status in found] + [path.lstat().st_mtime]
    size = sum(status.st_size for status in found) if path.is_dir() else path.lstat().st_size
    return max(0.0, time.time() - max(times)), size


def _ago(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} old"
    return f"{seconds:.0f} s old"
