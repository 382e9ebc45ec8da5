"""Collection: deleting what nothing needs any more, and nothing else.

Deleted are objects that only removed things name, objects that no record names (the traces of
kills, and what pulls and pushes keep for the next time), and what was left in tmp/. Everything
waits for a grace first, and whatever cannot be read stops the collection before it begins. It is
planned and run under the lock that keeps all writers away, so from the first object of a writer
to the record that names it nothing is deleted.

The grace is what protects where that lock does not reach: a file system on which flock does not
work across machines, and a copy of a pool that is still arriving, objects first, records later.
An object counts from when it came to this file system (the later of the times of its content and
of its inode: a copy may keep the former, but not the latter), a removed one also from its removal.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, timedelta
from pathlib import Path
from typing import Literal

from poolreg import faults
from poolreg.canonical import is_digest
from poolreg.errors import Conflict
from poolreg.files import storage_errors, sync_folder
from poolreg.progress import SILENT, Progress
from poolreg.store.journal import parse_time
from poolreg.store.registry import Registry
from poolreg.store.staging import unused
from poolreg.upkeep.census import Census, census
from poolreg.upkeep.removal import GRACE

Reason = Literal["removed", "of no record", "temporary"]
REASONS: tuple[Reason, ...] = ("removed", "of no record", "temporary")

DAY = 86_400.0  # seconds
_BLOCK = 512  # bytes, the unit of st_blocks whatever the file system's
_TORN_STEP = 1 << 16


@dataclass(frozen=True)
class Garbage:
    """A file, or a folder of tmp/, that goes: its place in the pool, the bytes that this frees."""

    reason: Reason
    path: str
    bytes: int


@dataclass(frozen=True)
class Amount:
    """So many files and the bytes that they take."""

    reason: Reason
    files: int
    bytes: int


@dataclass(frozen=True)
class Plan:
    """What a collection deletes; `waiting` is garbage that is within the grace or in use.

    `kept` counts objects that live.
    """

    grace: timedelta
    garbage: tuple[Garbage, ...]
    waiting: tuple[Amount, ...]
    kept: int

    @property
    def bytes(self) -> int:
        """What it frees, in bytes on the disk."""
        return sum(item.bytes for item in self.garbage)

    @property
    def amounts(self) -> tuple[Amount, ...]:
        """The garbage by reason."""
        return _amounts(self.garbage)

    def biggest(self, count: int) -> list[Garbage]:
        """Return the items that free most."""
        return heapq.nsmallest(count, self.garbage, key=lambda item: (-item.bytes, item.path))


def collect(
    registry: Registry, *, grace: timedelta = GRACE, dry_run: bool = False,
    progress: Progress = SILENT,
) -> Plan:  # fmt: skip
    """Delete the garbage that is older than `grace` and return what it was; see `plan_collection`.

    Raises `Locked` while another process writes to the pool. Killed at any time, garbage is gone
    or not, and nothing else.
    """
    with registry.alone():
        plan = plan_collection(registry, grace, progress=progress)
        if not dry_run:
            _delete(registry, plan, progress)
        return plan


def plan_collection(registry: Registry, grace: timedelta, *, progress: Progress = SILENT) -> Plan:
    """Find the garbage that is older than `grace`; nobody may write to the pool meanwhile.

    Raises `Damage`, `UnknownFormat` or `StorageError` for whatever cannot be read, `Conflict` where
    the clock is behind the newest record, so that no age can be told.
    """
    registry.catalog.refresh()  # it knows whether the journal has lost records
    now = _now(registry)
    _check_clock(registry, now)
    counted = census(registry, progress=progress)
    found = _Found(now, grace.total_seconds())
    _look_through_objects(registry, counted, found, progress)
    _look_through_leftovers(registry, found)
    garbage = tuple(sorted(found.garbage, key=lambda item: item.path))
    return Plan(grace, garbage, _amounts(found.waiting), found.kept)


class _Found:
    """What was found so far: garbage, and what is not old enough to be it."""

    def __init__(self, now: float, grace: float) -> None:
        self.now, self.grace = now, grace
        self.garbage: list[Garbage] = []
        self.waiting: list[Garbage] = []
        self.kept = 0

    def add(self, item: Garbage, since: float, *, floor: float = 0.0, free: bool = True) -> None:
        # A time in the future is that of a clock that was wrong: nothing is known, so it waits.
        age = max(self.now - since, 0.0)
        old = age >= max(self.grace, floor)
        (self.garbage if old and free else self.waiting).append(item)


def _now(registry: Registry) -> float:
    """Return the earlier of this machine's time and the file system's, which gave files theirs."""
    with (
        storage_errors("writing to the pool"),
        tempfile.TemporaryFile(dir=registry.root / "tmp") as probe,
    ):
        return min(time.time(), os.fstat(probe.fileno()).st_mtime)


def _check_clock(registry: Registry, now: float) -> None:
    newest = registry.select("checkup")[0]["newest"]
    if newest and (ahead := newest.replace(tzinfo=UTC).timestamp() - now) > DAY:
        raise Conflict(
            f"the newest record was written {ahead / DAY:.0f} days after what the clock of this "
            "machine says, so nothing's age is known",
            hint="set the clock right; if the record's time is wrong, wait until it has passed",
        )


# -- objects ---------------------------------------------------------------------------------


def _look_through_objects(
    registry: Registry, counted: Census, found: _Found, progress: Progress
) -> None:
    torn = _torn_digests(registry)
    progress.start("looking through objects", 0, "objects")
    for digest, entry in _objects(registry.objects.folder):
        progress.advance(1)
        key = bytes.fromhex(digest)
        if key in counted.live or digest in torn:
            found.kept += 1
            continue
        status = entry.stat(follow_symlinks=False)
        since = max(status.st_mtime, status.st_ctime)
        reason: Reason = "of no record"
        if key in counted.dead:
            reason = "removed"
            since = max(since, parse_time(counted.dead[key].at).timestamp())
        path = f"objects/{digest[:2]}/{digest[2:]}"
        found.add(Garbage(reason, path, _freed(status)), since)


def _objects(folder: Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield all objects, by digest; what has another name or is no file is not looked at."""
    with storage_errors("looking through objects"):
        for outer in os.scandir(folder):
            if len(outer.name) != 2 or not outer.is_dir():
                continue
            for entry in os.scandir(outer.path):
                digest = outer.name + entry.name
                if is_digest(digest) and entry.is_file(follow_symlinks=False):
                    yield digest, entry


def _torn_digests(registry: Registry) -> set[str]:
    """Return the digests in the torn ends of segments: some may be on their way into a record."""
    found: set[str] = set()
    for segment, size in registry.journal.segments().items():
        tail = _tail(registry.journal.folder / segment, size)
        found |= {digest.decode() for digest in re.findall(rb"(?=([0-9a-f]{64}))", tail)}
    return found


def _tail(segment: Path, size: int) -> bytes:
    """Return what stands after the last line feed."""
    with storage_errors("reading the journal"), open(segment, "rb") as file:
        start, tail = size, b""
        while start > 0 and b"\n" not in tail:
            start = max(start - max(_TORN_STEP, len(tail)), 0)
            file.seek(start)
            tail = file.read(size - start)
    return tail.rpartition(b"\n")[2]


def _freed(status: os.stat_result) -> int:
    """Return what deleting a file frees: nothing where it has another name, too."""
    return status.st_blocks * _BLOCK if status.st_nlink == 1 else 0


# -- leftovers in tmp/ -----------------------------------------------------------------------


def _look_through_leftovers(registry: Registry, found: _Found) -> None:
    """Find what killed processes left in tmp/.

    Readers and long trainings work there without the writers' lock. Trainings and the like lock
    their own folder; the rest is short, so what was written to within a day may be in use, and
    stays whatever the grace. Interrupted trainings and transfers go on from what they left here.
    """
    with storage_errors("looking through tmp"):
        for entry in os.scandir(registry.root / "tmp"):
            path = Path(entry.path)
            # What vanishes meanwhile was a reader's, and is no leftover.
            with contextlib.suppress(FileNotFoundError), unused(path) as free:
                since, size = _newest(path)
                item = Garbage("temporary", f"tmp/{entry.name}", size)
                found.add(item, since, floor=DAY, free=free)


def _newest(path: Path) -> tuple[float, int]:
    """Return when something was last written to in a file or folder, and the bytes it takes."""
    status = path.lstat()
    newest, size = max(status.st_mtime, status.st_ctime), _freed(status)
    if path.is_dir() and not path.is_symlink():
        for entry in os.scandir(path):
            inner, bytes_inside = _newest(Path(entry.path))
            newest, size = max(newest, inner), size + bytes_inside
    return newest, size


# -- deleting --------------------------------------------------------------------------------


def _delete(registry: Registry, plan: Plan, progress: Progress) -> None:
    progress.start("deleting", len(plan.garbage), "files")
    folders = set()
    with storage_errors("deleting"):
        for item in plan.garbage:
            path = registry.root / item.path
            with unused(path) as free:
                if free:
                    faults.step("gc.delete")
                    _remove(path)
                    folders.add(path.parent)
            progress.advance(1)
        faults.step("gc.flush")
        for folder in folders:
            sync_folder(folder)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
        return
    with contextlib.suppress(FileNotFoundError):  # a reader's own leftover may go meanwhile
        path.unlink()


def _amounts(items: Iterable[Garbage]) -> tuple[Amount, ...]:
    sums: dict[Reason, list[int]] = {}
    for item in items:
        sums.setdefault(item.reason, []).append(item.bytes)
    return tuple(Amount(r, len(sums[r]), sum(sums[r])) for r in REASONS if r in sums)
