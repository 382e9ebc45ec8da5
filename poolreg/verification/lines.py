"""The lines of a journal as they are: all bad ones, torn ends, and what the catalog remembers.

A line that a crash has torn was never acknowledged, so it is no damage; but a line that the
catalog had read, or of which only the line feed is not what it was, had been whole.
"""

from __future__ import annotations

import binascii
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from poolreg.errors import Damage, PoolregError, QueryError, UnknownFormat
from poolreg.progress import Progress
from poolreg.store import records
from poolreg.store.indexing import SCHEMA_VERSION
from poolreg.store.journal import MAX_LINE, SEGMENT, Record, parse
from poolreg.store.registry import Registry
from poolreg.store.sandbox import peek
from poolreg.upkeep.census import Census, Counter, Known
from poolreg.verification.findings import Finding

_NEWER = "install a newer poolreg"


@dataclass(frozen=True)
class Memory:
    """How many bytes of each segment a catalog had read; nothing, if it cannot say."""

    read: Mapping[str, int]
    findings: tuple[Finding, ...] = ()
    remarks: tuple[str, ...] = ()


def memory(registry: Registry) -> Memory:
    """Ask the published catalog, as it is, how far it had read the journal."""
    path = registry.catalog.path
    if not path.is_file():
        return Memory({}, remarks=("there is no catalog; the next command makes it",))
    try:
        version = peek(path, "FROM catalog_info").rows
        if version != [(SCHEMA_VERSION,)]:
            remark = "the catalog is of another version; the next command makes it anew"
            return Memory({}, remarks=(remark,))
        rows = peek(path, "SELECT segment, indexed_bytes FROM journal_segments").rows
    except QueryError as error:
        why = f"cannot be read: {error.message.splitlines()[0]}"
        return Memory({}, (catalog_finding(why),))
    return Memory(dict(rows))


def catalog_finding(why: str) -> Finding:
    """Return the finding that the catalog is not what the journal gives."""
    way_out = "make it anew from the journal: poolreg verify --repair"
    return Finding("catalog.duckdb", why, way_out, "catalog", "catalog.duckdb")


@dataclass(frozen=True)
class Reading:
    """A journal that was read to its end, whatever stood in it."""

    census: Census
    findings: tuple[Finding, ...]
    remarks: tuple[str, ...]


def read_journal(registry: Registry, read: Mapping[str, int], progress: Progress) -> Reading:
    """Read all lines; `read` says how many bytes of each segment had been read before."""
    segments = registry.journal.segments()
    progress.start("reading the journal", sum(segments.values()), "bytes")
    counter, bad, remarks = Counter(), [], []
    tell = gathered(progress.advance)
    for name, size in segments.items():
        for offset, line in registry.journal.lines(name, 0, size):
            tell(len(line))
            if not line.endswith(b"\n") and len(line) < MAX_LINE:
                why = _why_not_torn(line, offset, read.get(name, 0))
                if not why:
                    remarks.append(f"journal/{name} ends with a torn line, which was never "
                                   "acknowledged")  # fmt: skip
            else:
                why = _take(line, name, offset, counter)
            if why:
                bad.append((name, offset, why))
    census = counter.census()
    ways_out = _WaysOut(census.places)
    findings = [ways_out.of_line(*found) for found in bad]
    findings += [
        ways_out.of_segment(name, segments.get(name, 0), size)
        for name, size in sorted(read.items())
        if segments.get(name, 0) < size
    ]
    return Reading(census, tuple(findings), (*remarks, *_strange(registry)))


def _take(line: bytes, segment: str, offset: int, counter: Counter) -> str:
    """Count the record of a line; returns what is wrong with it."""
    if not line.endswith(b"\n"):
        return "a line is longer than 64 MiB"
    try:
        record = parse(line, segment, offset)
        check(record)
        counter.add(record)
    except UnknownFormat:
        return _NEWER
    except Damage as error:
        # What the journal says names the place, too, which stands beside it here.
        text = error.message.removeprefix("the journal is damaged: ")
        return text.removesuffix(f" (journal/{segment}, byte {offset})")
    return ""


def check(record: Record) -> None:
    """Raise `Damage` for a record of a known kind that the catalog could not take."""
    if record.kind in records.KINDS:
        for _ in records.rows(record):
            pass


def _why_not_torn(line: bytes, offset: int, read: int) -> str:
    if offset < read:
        return "the last line was whole when the catalog read it, and is not any more"
    if sound(line[:-1]):
        return "the line feed after the last line was changed"
    return ""


def sound(line: bytes) -> bool:
    """Tell whether a line, without its line feed, has the checksum that stands before it."""
    crc, space, data = line.partition(b" ")
    return bool(space) and b"%08x" % binascii.crc32(data) == crc


class _WaysOut:
    """What can be done about a damaged journal, given the places that may have its records."""

    def __init__(self, places: tuple[Known, ...]) -> None:
        self.again = ""
        if places:
            self.again = f", then pulls from {places[0].place} what it has of them"

    def of_line(self, segment: str, offset: int, why: str) -> Finding:
        what = f"journal/{segment}, byte {offset}"
        if why is _NEWER:
            return Finding(what, "a record of a newer format", _NEWER, "newer", segment)
        way_out = (
            "restore the segment from a copy of the pool; or poolreg verify --repair, which keeps "
            f"its good lines{self.again}"
        )
        return Finding(what, why, way_out, "line", segment)

    def of_segment(self, segment: str, size: int, was: int) -> Finding:
        lost = f"has {size:,} bytes of {was:,} that had been read" if size else "is gone"
        way_out = (
            "restore it from a copy of the pool; or poolreg verify --repair, which goes on without "
            f"the records that are lost{self.again}"
        )
        return Finding(f"journal/{segment}", lost, way_out, "segment", segment)


def _strange(registry: Registry) -> Iterator[str]:
    for path in sorted(registry.journal.folder.iterdir()):
        if not SEGMENT.fullmatch(path.name) or not path.is_file():
            yield f"journal/{path.name} is no segment, and is not read"


def sound_records(registry: Registry, kind: str | None = None) -> Iterator[Record]:
    """Yield the records of all lines that are as they were written, or of one kind."""
    mark = b'"kind":"%s"' % (kind or "").encode()
    for name, size in registry.journal.segments().items():
        for offset, line in registry.journal.lines(name, 0, size):
            if not line.endswith(b"\n") or (kind and mark not in line):
                continue
            try:
                record = parse(line, name, offset)
                check(record)
            except PoolregError:
                continue  # said before, by `read_journal`
            if kind in (None, record.kind):
                yield record


def gathered(advance: Callable[[int], None], step: int = 1 << 20) -> Callable[[int], None]:
    """Return what passes many small amounts on to `advance` in fewer, of at least `step`."""
    waiting = 0

    def tell(amount: int) -> None:
        nonlocal waiting
        waiting += amount
        if waiting >= step:
            advance(waiting)
            waiting = 0

    return tell
