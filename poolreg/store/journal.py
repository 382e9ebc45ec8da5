"""The journal: append-only segments of records, the only truth beside the objects.

    journal/<writer>.jsonl      crc32hex SP canonical-JSON LF, one record a line

A writer appends only to the segment that it created, so writers never disturb each other and
two journals are merged by putting their segments in one folder. `append` returns when the
lines are on the disk. A torn last line is the trace of a crash and is ignored; a bad line
before it is damage and is reported.
"""

from __future__ import annotations

import binascii
import functools
import json
import os
import platform
import re
import reprlib
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from poolreg import faults
from poolreg.canonical import canonical_json
from poolreg.errors import Damage, Refused, UnknownFormat
from poolreg.files import storage_errors, sync_folder

VERSION = 1
MAX_LINE = 64 << 20
MAX_VALUES = 4_000_000  # in one line; each takes far more memory than its two bytes
_LONG = 1 << 20
_BUFFER = 1 << 20  # bytes that are read at once
SEGMENT = re.compile(r"[A-Za-z0-9._-]{1,120}\.jsonl")


@dataclass(frozen=True)
class Record:
    """One fact. `id` is what makes it the same fact in another pool; `objects` maps the digest
    of each object that it names to its size in bytes; `at` is the UTC time of writing."""

    kind: str
    id: str
    body: dict[str, Any]
    objects: dict[str, int]
    at: str = ""

    def line(self) -> bytes:
        """Return the journal line."""
        fields = {"v": VERSION, "kind": self.kind, "id": self.id, "at": self.at}
        data = canonical_json(fields | {"body": self.body, "objects": self.objects})
        return b"%08x %s\n" % (binascii.crc32(data), data)


def now() -> str:
    """Return the present UTC time to the microsecond, in the journal's form."""
    return format_time(datetime.now(UTC))


def following(at: str) -> str:
    """Return the earliest time after `at`; nothing follows nothing."""
    return format_time(parse_time(at) + timedelta(microseconds=1)) if at else ""


def parse_time(at: str) -> datetime:
    """Return a time in the journal's form; raises `ValueError`."""
    return datetime.fromisoformat(at).replace(tzinfo=UTC)


def format_time(at: datetime) -> str:
    """Return a UTC time in the journal's form."""
    return at.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class Journal:
    """The segments of one folder, and this process's own segment for appending."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._segment: Path | None = None
        self._pid = 0

    def append(self, records: Sequence[Record]) -> None:
        """Write records and return when they are on the disk; raises `Refused` for a giant one."""
        stamp = now()
        lines = [(record if record.at else _stamped(record, stamp)).line() for record in records]
        for record, line in zip(records, lines, strict=True):
            if len(line) > MAX_LINE:
                raise Refused(
                    f"the {record.kind} record is larger than {MAX_LINE} bytes",
                    hint="put its many files into fewer, larger ones, or add them in several parts",
                )
        if not lines:
            return
        with storage_errors("writing the journal"):
            self._write(b"".join(lines))

    def _write(self, data: bytes) -> None:
        # A forked child must not append to its parent's segment, and nobody to one that was
        # compacted into another.
        if self._segment is None or self._pid != os.getpid() or not self._segment.exists():
            self._segment, self._pid = self.folder / _fresh_name(), os.getpid()
        created = not self._segment.exists()
        faults.step("journal.open")
        descriptor = os.open(
            self._segment, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644
        )
        size = os.fstat(descriptor).st_size
        try:
            self._write_all(descriptor, data)
        except BaseException:
            # Take back what was not acknowledged; whatever is left of it, nothing follows it.
            self._segment = None
            os.ftruncate(descriptor, size)
            raise
        finally:
            os.close(descriptor)
        if created:
            sync_folder(self.folder)

    @staticmethod
    def _write_all(descriptor: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            faults.step("journal.write")
            view = view[os.write(descriptor, view) :]
        faults.step("journal.flush")
        os.fsync(descriptor)
        faults.step("journal.flushed")

    def adopt(self, file: Path) -> str:
        """Make a finished file of lines a segment of its own: all of its records, or none.

        `file` is on the journal's file system and flushed. Returns the segment's name.
        """
        name = _fresh_name()
        with storage_errors("writing the journal"):
            faults.step("journal.adopt")
            file.rename(self.folder / name)
            faults.step("journal.adopted")
            sync_folder(self.folder)
        return name

    def drop(self, segments: Iterable[str]) -> None:
        """Delete segments whose records all stand in another."""
        with storage_errors("deleting compacted segments"):
            for name in segments:
                faults.step("journal.drop")
                (self.folder / name).unlink()
            sync_folder(self.folder)

    def segments(self) -> dict[str, int]:
        """Return the segments that hold anything and their sizes in bytes, oldest name first."""
        sizes = {}
        with storage_errors("reading the journal"):
            for path in sorted(self.folder.iterdir()):
                if SEGMENT.fullmatch(path.name) and path.is_file():
                    sizes[path.name] = path.stat().st_size
        # An empty one is the trace of an append that was taken back; it must not make the
        # catalog look stale where a full disk would not let it be brought up to date.
        return {name: size for name, size in sizes.items() if size}

    def all(self, segments: Mapping[str, int] | None = None) -> Iterator[Record]:
        """Yield the records of all segments, or of some with the sizes that they had."""
        for segment, size in (self.segments() if segments is None else segments).items():
            for record, _ in self.read(segment, 0, size):
                yield record

    def read(self, segment: str, start: int, stop: int) -> Iterator[tuple[Record, int]]:
        """Yield each record between two byte offsets, with the offset after it.

        Raises `Damage` for a bad line that is not the torn end, `UnknownFormat` for records of a
        newer version.
        """
        for offset, line in self.whole_lines(segment, start, stop):
            yield parse(line, segment, offset), offset + len(line)

    def whole_lines(self, segment: str, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
        """Yield the lines between two byte offsets, but not a torn end; raises `Damage`."""
        for offset, line in self.lines(segment, start, stop):
            if not line.endswith(b"\n"):
                if len(line) == MAX_LINE:
                    raise _damage(segment, offset, "a line is longer than 64 MiB")
                return
            yield offset, line

    def lines(self, segment: str, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
        """Yield the raw lines between two byte offsets, each with its own offset.

        One that does not end with a line feed is torn, or the beginning of one that is too long.
        """
        offset, path = start, self.folder / segment
        with storage_errors("reading the journal"), open(path, "rb", _BUFFER) as file:
            file.seek(start)
            while offset < stop and (line := file.readline(MAX_LINE)):
                yield offset, line
                offset += len(line)


def _fresh_name() -> str:
    host = re.sub(r"[^A-Za-z0-9]+", "-", platform.node())[:40] or "host"
    return f"{time.time_ns() // 1000}-{host}-{os.getpid()}-{secrets.token_hex(3)}.jsonl"


def _stamped(record: Record, at: str) -> Record:
    return Record(record.kind, record.id, record.body, record.objects, at)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _damage(segment: str, offset: int, why: str) -> Damage:
    return Damage(
        f"the journal is damaged: {why} (journal/{segment}, byte {offset})",
        hint="restore this segment from a copy of the pool; nothing was changed",
        segment=segment,
        offset=offset,
    )


@functools.cache
def _decoder() -> tuple[Callable[[bytes], Any], tuple[type[Exception], ...]]:
    """Return what reads a line that has the fields of this version and no others, and what it
    raises. Others are read slowly: it would skip over them without a look."""
    import msgspec

    fields = {"v": Literal[VERSION], "kind": str, "id": str, "at": str}
    fields |= {"body": dict[str, Any], "objects": dict[str, int]}
    shape = msgspec.defstruct("Line", fields.items(), forbid_unknown_fields=True)
    errors = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
    return msgspec.json.Decoder(shape).decode, errors


def parse(line: bytes, segment: str, offset: int) -> Record:
    """Return the record of a line; raises `Damage` for a bad one and `UnknownFormat`."""
    data = line[9:-1]
    if b"%08x " % binascii.crc32(data) != line[:9]:
        raise _damage(segment, offset, "a line does not match its checksum")
    if len(data) > _LONG and sum(map(data.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise _damage(segment, offset, f"a line holds more than {MAX_VALUES} values")
    decode, errors = _decoder()
    try:
        read = decode(data)
    except errors:  # what is wrong with it, if anything is, is said by Python's own reader
        return _parse_slowly(data, segment, offset)
    return Record(read.kind, read.id, read.body, read.objects, read.at)


def _parse_slowly(data: bytes, segment: str, offset: int) -> Record:
    try:
        fields = json.loads(data, parse_constant=_refuse)
        version = fields["v"]
        if type(version) is not int or version != VERSION:
            raise UnknownFormat(
                f"journal/{segment} holds records of format {reprlib.repr(version)}; "
                f"this poolreg reads format {VERSION}",
                hint="install a newer poolreg",
            )
        kind, identity, at = fields["kind"], fields["id"], fields["at"]
        body, objects = fields["body"], fields["objects"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damage(segment, offset, "a line is not a record") from error
    typed = isinstance(body, dict) and isinstance(objects, dict)
    if not (typed and all(isinstance(text, str) for text in (kind, identity, at))):
        raise _damage(segment, offset, "a record's fields have the wrong types")
    return Record(kind, identity, body, objects, at)
