"""What has arrived of a published pool so far: fetched into a staging folder, compared, kept.

An interrupted pull finds here what it fetched before. Nothing in the staging folder is named by
what a place says: segments and objects are named by their digests, and are compared with them
before they get that name.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

from poolreg import faults
from poolreg.errors import NotFound, Refused, StorageError
from poolreg.files import storage_errors
from poolreg.progress import Progress
from poolreg.sharing.inbound import read_segment
from poolreg.sharing.places import (
    MARK,
    MARKER,
    Outgoing,
    Place,
    Snapshot,
    object_path,
    segment_path,
)
from poolreg.sharing.scratch import Overlay
from poolreg.store.journal import Record
from poolreg.store.objects import ObjectStore
from poolreg.workers import at_once

THREADS = 8
MAX_JOURNAL = 4 << 30  # bytes; a million evaluations are about 0.7 GB
_MAX_MARKER = 1 << 12

_REPAIR = "whoever has the original can repair it with poolreg push"


class Arrival:
    """One state of one place, and what has been fetched of it into `staging`."""

    def __init__(self, place: Place, snapshot: Snapshot, store: ObjectStore, staging: Path) -> None:
        self.place = place
        self.snapshot = snapshot
        self.store = store
        self.staging = staging
        with storage_errors("preparing to fetch"):
            (staging / "objects").mkdir(parents=True, exist_ok=True)
            (staging / "journal").mkdir(exist_ok=True)
            for file in (staging / "journal").iterdir():
                _keep_if(file, file.stem)
            for file in (staging / "objects").glob("??/*"):
                _keep_if(file, file.parent.name + file.name)

    @cached_property
    def objects(self) -> Overlay:
        """The pool's objects, and beside them those that have arrived."""
        return Overlay(self.store, self.staging / "objects", self.staging)

    def discard(self) -> None:
        """Forget what has arrived."""
        shutil.rmtree(self.staging, ignore_errors=True)

    def check_marker(self) -> None:
        """Raise `NotFound` where there is no pool, `Refused` for one of an unknown form."""
        entry = self.snapshot.files.get(MARKER)
        if entry is None:
            raise NotFound(
                f"{self.place.url} holds no pool",
                hint="check the name (and --revision, --repo-type); poolreg push makes one",
            )
        file = self.staging / MARKER
        file.unlink(missing_ok=True)
        if entry.size <= _MAX_MARKER:
            self.place.fetch(MARKER, file, progress=lambda _: None)
        if not file.is_file() or file.read_bytes() != MARK:
            raise Refused(
                f"{self.place.url} is published in a form that this poolreg does not know",
                hint="install a newer poolreg",
            )

    def segments(self) -> dict[str, Path]:
        """Return the segments of the journal that have arrived, by digest, in order."""
        files = {file.stem: file for file in sorted((self.staging / "journal").glob("*.jsonl"))}
        return {digest: files[digest] for digest in sorted(self.snapshot.segments())}

    def records(self) -> Iterator[Record]:
        """Yield the checked records of all segments; raises `Refused`."""
        for digest, file in self.segments().items():
            yield from read_segment(file, digest)

    def fetch_journal(self, progress: Progress) -> None:
        """Bring all segments; raises `Refused` for bytes that do not match their name."""
        entries = self.snapshot.segments()
        total = sum(entry.size for entry in entries.values())
        if total > MAX_JOURNAL:
            raise Refused(
                f"the published journal is larger than {MAX_JOURNAL >> 30} GiB",
                hint="nothing was fetched; ask whoever published it what it holds",
            )
        folder = self.staging / "journal"
        missing = [digest for digest in entries if not (folder / f"{digest}.jsonl").is_file()]
        self.check_space(sum(entries[digest].size for digest in missing))
        progress.start("fetching the journal", sum(entries[d].size for d in missing), "bytes")

        def bring(digest: str, tell: Callable[[int], None]) -> None:
            # A segment that this pool pushed or pulled before is at hand as an object.
            if not self.store.has(digest):
                part = folder / f"{digest}.part"
                self._fetch(segment_path(digest), digest, part, tell)
                part.replace(folder / f"{digest}.jsonl")
            else:
                (folder / f"{digest}.jsonl").symlink_to(self.store.path(digest).resolve())

        at_once(bring, missing, threads=THREADS, progress=progress.advance)

    def keep_journal(self) -> None:
        """Keep the segments as objects, so that the next push or pull need not fetch them.

        No record names them, so they go with the next garbage collection, which does no harm.
        """
        for digest, file in self.segments().items():
            if not file.is_symlink():
                self.store.take(file, digest)

    def fetch_objects(self, sizes: Mapping[str, int], progress: Progress) -> None:
        """Bring those objects that the place has, each of the size that the records say.

        Raises `Refused` for one that is not what its name says.
        """
        there = self.snapshot.objects()
        present = {digest: size for digest, size in sizes.items() if digest in there}
        for digest, size in present.items():
            if there[digest].size != size or there[digest].sha256 not in (None, digest):
                raise Refused(
                    f"object {digest[:12]} of {self.place.url} is not what its name says",
                    hint=_REPAIR,
                    digest=digest,
                )
        self.check_space(sum(present.values()))
        progress.start("fetching", sum(present.values()), "bytes")

        def bring(digest: str, tell: Callable[[int], None]) -> None:
            part = self.staging / f"{digest}.part"
            self._fetch(object_path(digest), digest, part, tell)
            self.objects.take(part, digest)

        at_once(bring, present, threads=THREADS, progress=progress.advance)

    def _fetch(self, path: str, digest: str, part: Path, tell: Callable[[int], None]) -> None:
        part.unlink(missing_ok=True)
        faults.step("pull.fetch")
        self.place.fetch(path, part, progress=tell)
        with storage_errors(f"reading {part.name}"), open(part, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())  # an object is on the disk before a record names it
        if found != digest:
            part.unlink()
            raise Refused(
                f"{path} of {self.place.url} does not hold the bytes that its name promises",
                hint=_REPAIR,
                digest=digest,
            )

    def check_space(self, size: int) -> None:
        """Raise `StorageError` where so many bytes do not fit."""
        with storage_errors("looking at the disk"):
            free = shutil.disk_usage(self.staging).free
        if size > free:
            raise StorageError(
                f"{size:,} bytes are to be written, and {free:,} are free on this disk",
                hint="free some space, or fetch less with --only or --results-only",
            )


def _keep_if(file: Path, digest: str) -> None:
    """Delete what an interrupted process or a power cut left, unless it is whole."""
    if not file.is_file() or Outgoing.of("", file).sha256 != digest:
        file.unlink()
