"""Text on disk as documents: reading, fingerprints, base units, drift and evalset bytes.

A corpus is an ordered sequence of documents (strings that are not empty). Where they stand is
a detail: the digest of a document is the sha256 of its UTF-8 bytes, and the identity of a corpus
is the sha256 of its documents' digests in order, so renamed or repacked files are the same
data. Text is kept exactly as it stands: no newline is translated, nothing is normalised, and
what is not text is refused with its file and line instead of being repaired.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from poolreg.canonical import canonical_json, sha256
from poolreg.errors import Drift, NotFound, Refused, StorageError, UsageError

SLICING = 1
"""Version of the rule by which `unit_documents` cuts; a new rule is a new number."""

LONGEST_LINE = 64 << 20
"""The longest line of a .jsonl file, bytes after decompression (what a gzip bomb would fill)."""

LARGEST_TEXT = 1 << 30
"""The largest plain text file, bytes: it is one document and is held in memory."""

Digests = bytes
"""The sha256 of each document's UTF-8 bytes, concatenated in order: 32 bytes a document."""

_DIGEST_BYTES = 32
_PROGRESS_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_FORMATS = "poolreg reads .jsonl, .jsonl.gz, .parquet and UTF-8 text files"


@dataclass(frozen=True)
class FileFacts:
    """What a file was when it was read: absolute path, size, sha256, documents in it."""

    path: str
    bytes: int
    sha256: str
    documents: int


@dataclass(frozen=True)
class Scan:
    """A corpus that was read once: its files, its counts and the digests of its documents."""

    files: tuple[FileFacts, ...]
    documents: int
    bytes: int  # UTF-8 bytes of the documents' text
    duplicates: int  # documents that repeat an earlier one exactly; they are kept
    digests: Digests

    @property
    def content_digest(self) -> str:
        """The identity of the corpus: the sha256 of `digests`."""
        return sha256(self.digests)


@dataclass(frozen=True)
class UnitFacts:
    """One base unit: its content digest (as `Scan.content_digest`), documents and UTF-8 bytes."""

    digest: str
    documents: int
    bytes: int


Reason = Literal["missing", "changed", "unreadable"]


@dataclass(frozen=True)
class FileDrift:
    """A file that is no longer what it was."""

    path: str
    reason: Reason


# --- files -------------------------------------------------------------------------------


def expand_files(paths: Sequence[Path]) -> tuple[Path, ...]:
    """Return the files that `paths` name, absolute, in the given order, each once.

    A folder stands for all files below it in the order of their relative paths; names that
    begin with a dot are passed over and links to folders are not followed. Raises `NotFound`
    for a path that does not exist, `Refused` for what is not a regular file, `UsageError` when
    there is no file at all.
    """
    files: dict[Path, Path] = {}
    for path in paths:
        with _reading(path):
            for file in _files_below(path) if path.is_dir() else [path]:
                _check_file(file)
                files.setdefault(file.resolve(), file.absolute())
    if not files:
        places = ", ".join(str(path) for path in paths) or "an empty list"
        raise UsageError(f"no file to read in {places}", hint="name at least one file of text")
    return tuple(files.values())


def _files_below(folder: Path) -> list[Path]:
    def fail(error: OSError) -> None:
        raise error  # os.walk would pass over a folder that it cannot open

    found: list[Path] = []
    for place, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(found, key=lambda file: file.relative_to(folder).as_posix())


def _check_file(file: Path) -> None:
    if not file.exists():
        raise NotFound(
            f"no such file: {file}",
            hint="check the path; a pattern with * must be expanded by the shell",
            path=str(file),
        )
    if not file.is_file():
        raise Refused(f"not a regular file: {file}", hint="save the text to a file first")
    try:
        str(file.absolute()).encode()
    except UnicodeEncodeError:
        raise Refused(
            f"the name of a file is not UTF-8: {str(file)!r}", hint="rename the file"
        ) from None


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise NotFound(f"no such file: {path}", hint="check the path", path=str(path)) from error
    except OSError as error:
        raise StorageError(
            f"cannot read {path}: {error.strerror or error}",
            hint="check the permissions of the file and the disk",
            path=str(path),
        ) from error


# --- documents ---------------------------------------------------------------------------


def read_files(paths: Iterable[Path], *, field: str = "text") -> Iterator[str]:
    """Yield the documents of several files in order; see `read_documents`."""
    for path in paths:
        yield from read_documents(path, field=field)


def read_documents(path: Path, *, field: str = "text") -> Iterator[str]:
    """Yield the documents of one file in order, streaming; empty documents are passed over.

    `.jsonl` and `.jsonl.gz` hold a JSON object a line with the text in `field`, `.parquet` a
    column `field`; any other file is UTF-8 text and one document. A leading byte order mark is
    dropped. Raises `Refused` with the line or row for anything that is not text: invalid UTF-8,
    raw NUL bytes, bad JSON, a missing or non-string field, lone surrogates, a truncated or
    damaged gzip or parquet file, a line over `LONGEST_LINE`, a text over `LARGEST_TEXT`.
    """
    name = path.name.lower()
    if name.endswith(".parquet"):
        documents = _parquet_documents(path, field)
    elif name.endswith((".jsonl", ".jsonl.gz")):
        documents = _json_documents(path, field)
    else:
        documents = _text_documents(path)
    with _reading(path):
        yield from (document for document in documents if document)


def _text_documents(path: Path) -> Iterator[str]:
    with open(path, "rb") as file:
        data = file.read(LARGEST_TEXT + 1)
    if len(data) > LARGEST_TEXT:
        raise Refused(
            f"{path} is larger than {LARGEST_TEXT} bytes, and a text file is one document",
            hint="split it, or write its documents to a .jsonl file, one JSON object a line",
        )
    yield _decode(data.removeprefix(_BOM), str(path))


def _json_documents(path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        where = f"{path}, line {number}"
        text = _decode(line.removeprefix(_BOM) if number == 1 else line, where)
        if text.strip():  # a blank line is no record
            yield _field_of(_parse(text, where), field, where)


def _lines(path: Path) -> Iterator[bytes]:
    zipped = path.name.lower().endswith(".gz")
    with open(path, "rb") as raw:
        file: io.BufferedIOBase = gzip.GzipFile(fileobj=raw) if zipped else raw
        for number in itertools.count(1):
            try:
                # Not `for line in file`: a line of a hostile file may be longer than memory.
                line = file.readline(LONGEST_LINE + 1)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise Refused(
                    f"{path}, line {number}: not a whole gzip file: {error}",
                    hint="fetch or compress the file again",
                ) from error
            if len(line) > LONGEST_LINE:
                raise Refused(
                    f"{path}, line {number}: a line is longer than {LONGEST_LINE} bytes",
                    hint="a .jsonl file holds one JSON object a line; split the document",
                )
            if not line:
                return
            yield line


def _decode(data: bytes, where: str) -> str:
    if b"\0" in data:
        raise Refused(f"{where}: NUL bytes, so this is not UTF-8 text", hint=_FORMATS)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused(
            f"{where}: not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}",
            hint=f"convert the file to UTF-8 or decompress it; {_FORMATS}",
        ) from error


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise Refused(
            f"{where}: not JSON: {error.msg} (column {error.colno})",
            hint="a .jsonl file holds one JSON object a line",
        ) from error
    except (ValueError, RecursionError) as error:  # a giant integer, a thousand brackets
        raise Refused(
            f"{where}: JSON that cannot be read: {error}", hint="remove or repair the line"
        ) from error
    if not isinstance(record, dict):
        raise Refused(
            f"{where}: not a JSON object but {type(record).__name__}",
            hint='write each document as {"text": "…"} on a line of its own',
        )
    return record


def _field_of(record: dict[str, Any], field: str, where: str) -> str:
    if field not in record:
        names = ", ".join(repr(key[:40]) for key in itertools.islice(record, 8)) or "none"
        raise Refused(
            f"{where}: no field {field!r}", hint=f"choose the field (--field); here are: {names}"
        )
    return _check_text(record[field], f"{where}, field {field!r}")


def _check_text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise Refused(
            f"{where}: not a string but {'null' if value is None else type(value).__name__}",
            hint="leave the document out or write its text as a string",
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise Refused(
            f"{where}: a lone surrogate (U+{ord(value[error.start]):04X}) has no UTF-8 form",
            hint="repair the text where it was made; half of a character was cut off",
        ) from None
    return value


def _parquet_documents(path: Path, field: str) -> Iterator[str]:
    import pyarrow as pa
    from pyarrow import parquet

    row = 0
    with open(path, "rb") as source:
        try:
            with parquet.ParquetFile(source) as file:
                _check_column(file.schema_arrow, field, path)
                for batch in file.iter_batches(batch_size=256, columns=[field]):
                    for value in batch.column(0):
                        row += 1
                        yield _check_text(value.as_py(), f"{path}, row {row}, field {field!r}")
        except UnicodeDecodeError as error:
            raise Refused(
                f"{path}, row {row}: not UTF-8", hint="write the column as UTF-8 strings"
            ) from error
        except (pa.ArrowException, OSError) as error:
            raise Refused(
                f"{path}, after row {row}: not a whole parquet file: {error}",
                hint="fetch or write the file again",
            ) from error


def _check_column(schema: Any, field: str, path: Path) -> None:
    import pyarrow as pa

    if schema.names.count(field) != 1:
        names = ", ".join(repr(name[:40]) for name in schema.names[:8]) or "none"
        raise Refused(
            f"{path}: {'several columns' if field in schema.names else 'no column'} {field!r}",
            hint=f"choose the column (--field); here are: {names}",
        )
    kind = schema.field(field).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not any(check(kind) for check in (pa.types.is_string, pa.types.is_large_string)):
        raise Refused(
            f"{path}: column {field!r} holds {kind}, not strings",
            hint="choose a column of text (--field)",
        )


# --- fingerprints ------------------------------------------------------------------------


def scan(
    paths: Sequence[Path], *, field: str = "text", progress: Callable[[int], None] | None = None
) -> Scan:
    """Read all documents of `paths` (as `expand_files` gives them) once and fingerprint them.

    `progress` gets the UTF-8 bytes of text read since its last call, about every MiB. Raises
    what `read_documents` raises, and `Refused` for a file that changes meanwhile and for a
    corpus without any text.
    """
    files: list[FileFacts] = []
    digests = bytearray()
    size = 0
    for path in paths:
        before, first = _stamp(path), len(digests)
        length, digest = _hash_file(path)
        for data in _counted(read_documents(path, field=field), progress):
            digests += hashlib.sha256(data).digest()
            size += len(data)
        if _stamp(path) != before:
            raise Refused(f"{path} changed while it was read", hint="wait until it is written")
        documents = (len(digests) - first) // _DIGEST_BYTES
        files.append(FileFacts(str(path.absolute()), length, digest, documents))
    if not digests:
        raise Refused("no text in the given files", hint="all documents in them are empty")
    found = len(digests) // _DIGEST_BYTES
    unique = len(set(_split_digests(bytes(digests))))
    return Scan(tuple(files), found, size, found - unique, bytes(digests))


def _counted(documents: Iterable[str], progress: Callable[[int], None] | None) -> Iterator[bytes]:
    pending = 0
    for document in documents:
        data = document.encode()
        yield data
        pending += len(data)
        if progress and pending >= _PROGRESS_BYTES:
            progress(pending)
            pending = 0
    if progress and pending:
        progress(pending)


def _stamp(path: Path) -> tuple[int, int, int]:
    with _reading(path):
        facts = path.stat()
    return facts.st_size, facts.st_mtime_ns, facts.st_ino


def _hash_file(path: Path, progress: Callable[[int], None] | None = None) -> tuple[int, str]:
    state, size = hashlib.sha256(), 0
    with _reading(path), open(path, "rb") as file:
        while block := file.read(1 << 20):
            state.update(block)
            size += len(block)
            if progress:
                progress(len(block))
    return size, state.hexdigest()


def document_digests(documents: Iterable[str]) -> Digests:
    """Return the digests of `documents` in order."""
    return b"".join(hashlib.sha256(document.encode()).digest() for document in documents)


def shared_documents(evalset: Digests, partition: Digests) -> tuple[int, ...]:
    """Return the indices of the documents of `evalset` that also stand, exactly, in `partition`."""
    wanted = set(_split_digests(evalset))
    present = wanted.intersection(_split_digests(partition))
    return tuple(i for i, digest in enumerate(_split_digests(evalset)) if digest in present)


def _split_digests(digests: Digests) -> Iterator[bytes]:
    return (digests[i : i + _DIGEST_BYTES] for i in range(0, len(digests), _DIGEST_BYTES))


def check_files(
    files: Sequence[FileFacts], *, progress: Callable[[int], None] | None = None
) -> tuple[FileDrift, ...]:
    """Return the files that are missing or whose bytes are not what they were.

    `progress` gets the bytes hashed since its last call; a file of another size is not read.
    """
    found = ((facts.path, _drift_of(facts, progress)) for facts in files)
    return tuple(FileDrift(path, reason) for path, reason in found if reason)


def _drift_of(facts: FileFacts, progress: Callable[[int], None] | None) -> Reason | None:
    path, recorded = Path(facts.path), (facts.bytes, facts.sha256)
    try:
        same = path.stat().st_size == facts.bytes and _hash_file(path, progress) == recorded
    except (FileNotFoundError, NotADirectoryError, NotFound):
        return "missing"
    except (OSError, StorageError):
        return "unreadable"
    return None if same else "changed"


# --- base units --------------------------------------------------------------------------


def unit_documents(
    documents: Iterable[str], index: int, *, of: int, total_bytes: int
) -> Iterator[str]:
    """Yield the documents of base unit `index` (from 1) of `of`, in order, streaming.

    The rule (`SLICING` = 1). T is `total_bytes`, the UTF-8 bytes of all documents. The text is
    one stream of bytes that is cut after unit i (i < N) for the target t_i = floor(i·T/N):

    1. if a document ends at t_i, there;
    2. else, if the document around t_i has at most 1% of a unit's bytes (T/100N), at its end;
    3. else at the first line end (after a LF, or the end of the document) at or after t_i.

    So the rule looks at nothing but the text, N and T; each byte is in one unit; a unit's size
    differs from T/N by less than the longest line or 1% of a unit, whichever is more, and a
    byte of rounding; no line is ever cut. A part of a cut document is a document of its unit.

    Raises `UsageError` if a unit would be empty, `Drift` if the text is not `total_bytes` long
    (found only by reading to the end, that is, for the last unit).
    """
    if not 1 <= index <= of:
        raise UsageError(f"there is no unit {index} of {of}", hint=f"choose one of 1 to {of}")
    pieces = _cut(documents, of, total_bytes)
    ours = itertools.takewhile(lambda item: item[0] <= index, pieces)
    return (piece.decode() for unit, piece in ours if unit == index)


def unit_facts(documents: Iterable[str], *, of: int, total_bytes: int) -> tuple[UnitFacts, ...]:
    """Return what each of `of` base units holds; the rule and errors of `unit_documents`."""
    facts = []
    cut = _cut(documents, of, total_bytes)
    for _, pieces in itertools.groupby(cut, key=lambda item: item[0]):
        state, count, size = hashlib.sha256(), 0, 0
        for _, piece in pieces:
            state.update(hashlib.sha256(piece).digest())
            count += 1
            size += len(piece)
        facts.append(UnitFacts(state.hexdigest(), count, size))
    return tuple(facts)


def _cut(documents: Iterable[str], of: int, total: int) -> Iterator[tuple[int, bytes]]:
    if not 1 <= of <= total:
        raise UsageError(f"{total} bytes of text cannot be cut into {of} units")
    unit, target, position = 1, total // of, 0
    for document in documents:
        data = document.encode()
        short = len(data) * 100 * of <= total
        start = 0
        while start < len(data):
            last = start + target - position  # where the target stands in this document
            if unit == of or short or len(data) < last:
                stop = len(data)
            else:
                stop = data.find(b"\n", last - 1) + 1 or len(data)
            yield unit, data[start:stop]
            position += stop - start
            start = stop
            if unit < of and position >= target:
                unit, target = unit + 1, total * (unit + 1) // of
                _check_room(unit, of, target - position)
    if position != total:
        raise Drift(
            f"the text has {position} bytes where {total} were recorded",
            hint="the files changed since they were added; run `poolreg partition check`",
        )


def _check_room(unit: int, of: int, room: int) -> None:
    if room <= 0:
        raise UsageError(
            f"unit {unit} of {of} would be empty: the line before it is longer than a unit",
            hint="ask for fewer units; a line is never cut",
        )


# --- evalsets as objects -----------------------------------------------------------------


def encode_documents(documents: Iterable[str]) -> bytes:
    """Return the one stored form of an evalset: a canonical JSON string and LF a document."""
    return b"".join(canonical_json(document) + b"\n" for document in documents)


def decode_documents(data: bytes) -> list[str]:
    """Return the documents of `encode_documents`; anything else is `Refused`."""
    lines = data.split(b"\n")
    if lines.pop():
        raise Refused("stored evalset: the last line is not ended", hint="add the evalset again")
    return [_decode_document(line, number) for number, line in enumerate(lines, start=1)]


def _decode_document(line: bytes, number: int) -> str:
    try:
        document = json.loads(line.decode())
        # Only the canonical spelling: one content, one object.
        canonical = canonical_json(document) == line
    except (ValueError, RecursionError, Refused):
        document, canonical = None, False
    if not isinstance(document, str) or not canonical:
        raise Refused(
            f"stored evalset: line {number} is not a canonical JSON string",
            hint="add the evalset again from its files",
        )
    return document
