"""Compaction: many journal segments become few, with the same records.

Every process that writes leaves a segment, so a pool that was used by many has thousands of small
files. Their lines are copied as they are into one new segment, which is in its place before the
old ones go: killed in between, a pool has records twice, which are the same records.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from poolreg import faults
from poolreg.errors import Damage
from poolreg.files import storage_errors
from poolreg.progress import SILENT, Progress
from poolreg.store.journal import parse
from poolreg.store.registry import Registry

LARGE = 256 << 20  # bytes; a segment of this size is left as it is
_STAGED = "journal.compacted"


@dataclass(frozen=True)
class Compacted:
    """What a compaction did: segments and bytes before and after, records, repeats left out."""

    segments_before: int
    segments: int
    bytes_before: int
    bytes: int
    records: int
    repeated: int


def compact(registry: Registry, *, progress: Progress = SILENT) -> Compacted:
    """Merge the segments of the journal, but for large ones; torn ends are left behind.

    Raises `Damage` for a bad line and `UnknownFormat` for records of a newer version, and changes
    nothing then; `Locked` while another process writes to the pool.
    """
    with registry.alone():
        registry.catalog.refresh()
        before = registry.journal.segments()
        old = {name: size for name, size in before.items() if size < LARGE}
        if len(old) < 2:
            total = sum(before.values())
            return Compacted(len(before), len(before), total, total, 0, 0)
        progress.start("compacting", sum(old.values()), "bytes")
        staged = registry.root / "tmp" / _STAGED
        try:
            records, repeated = _write(_lines(registry, old, progress), staged)
            size = staged.stat().st_size
            name = registry.journal.adopt(staged)
        finally:
            staged.unlink(missing_ok=True)
        registry.catalog.supersede(old, name, size)
        after = registry.journal.segments()
    return Compacted(
        len(before), len(after), sum(before.values()), sum(after.values()), records, repeated
    )


def _write(lines: Iterable[bytes], file: Path) -> tuple[int, int]:
    """Write lines to a file, each once; return how many, and how many repeats."""
    seen: set[bytes] = set()
    repeated = 0
    with storage_errors("compacting the journal"), open(file, "wb") as writer:
        for line in lines:
            key = blake2b(line, digest_size=16).digest()
            if key in seen:
                repeated += 1
                continue
            seen.add(key)
            writer.write(line)
        faults.step("compact.write")
        writer.flush()
        os.fsync(writer.fileno())
    return len(seen), repeated


def _lines(registry: Registry, segments: Mapping[str, int], progress: Progress) -> Iterator[bytes]:
    """Yield the checked lines of segments; raises `Damage` where one that was read is torn now."""
    read = {row["segment"]: row["indexed_bytes"] for row in registry.select("segments_read")}
    for segment, size in segments.items():
        end = 0
        for offset, line in registry.journal.whole_lines(segment, 0, size):
            parse(line, segment, offset)
            end = offset + len(line)
            progress.advance(len(line))
            yield line
        if end < read.get(segment, 0):
            raise Damage(
                f"the journal is damaged: the end of journal/{segment} was whole, and is torn",
                hint="see what is left of it: poolreg verify",
                segment=segment,
            )
