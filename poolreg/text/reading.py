"""Files as documents: .jsonl, .jsonl.gz, .parquet, and any other text file as one document.

Text is kept exactly as it stands: no newline is translated, nothing is normalised, and what is
not text is refused with its file and line instead of being repaired.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from poolreg.errors import NotFound, Refused, StorageError, UsageError

LONGEST_LINE = 64 << 20
"""The longest line of a .jsonl file, bytes after decompression (what a gzip bomb would fill)."""

LARGEST_TEXT = 1 << 30
"""The largest plain text file, bytes: it is one document and is held in memory."""

_BOM = b"\xef\xbb\xbf"
_FORMATS = "poolreg reads .jsonl, .jsonl.gz, .parquet and UTF-8 text files"


def expand_files(paths: Sequence[Path]) -> tuple[Path, ...]:
    """Return the files that `paths` name, absolute, in the given order, each once.

    A folder stands for all files below it in the order of their relative paths; names that
    begin with a dot are passed over and links to folders are not followed. Raises `NotFound`
    for a path that does not exist, `Refused` for what is not a regular file, `UsageError` when
    there is no file at all.
    """
    files: dict[Path, Path] = {}
    for path in paths:
        with reading(path):
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
def reading(path: Path) -> Iterator[None]:
    """Turn an `OSError` of reading `path` into the error that says what to do about it."""
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
    with reading(path):
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
