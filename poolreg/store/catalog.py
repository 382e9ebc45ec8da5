"""The catalog: a DuckDB picture of the journal, and the only module that knows DuckDB.

`refresh` brings the published file up to date: under an exclusive lock it copies the file,
inserts the new journal lines in one transaction together with how far it read, closes, flushes
and renames. Readers open the published file read-only and are never blocked. A missing,
damaged or differently versioned catalog is rebuilt from the journal; nothing is lost with it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from poolreg.errors import Damage, QueryError, StorageError
from poolreg.files import lock, storage_errors, sync_folder
from poolreg.schema import script, statements
from poolreg.store.journal import Journal, Record
from poolreg.store.records import KINDS, Kind, Row, rows

SCHEMA_VERSION = 4
_BATCH = 50_000  # records; bounds the memory of indexing

# Connections of a parent process: in a forked child even closing one would hang.
_inherited: list[duckdb.DuckDBPyConnection] = []


@dataclass(frozen=True)
class Table:
    """The result of a query: column names and rows."""

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]

    def dicts(self) -> list[Row]:
        """Return the rows as dictionaries."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


class Catalog:
    """The catalog of one pool folder."""

    def __init__(self, root: Path, journal: Journal) -> None:
        self.path = root / "catalog.duckdb"
        self._lock = root / "locks" / "catalog"
        self._staging = root / "tmp"
        self._journal = journal
        self._connection: duckdb.DuckDBPyConnection | None = None
        self._seen: dict[str, int] | None = None  # segment sizes that the connection shows
        self._opened: tuple[int, int, int] | None = None  # identity of the file that it shows
        self._pid = 0

    def close(self) -> None:
        """Close the read connection; the next query opens it again."""
        if self._connection is not None:
            if self._pid == os.getpid():
                self._connection.close()
            else:
                _inherited.append(self._connection)
        self._connection = self._seen = None

    def refresh(self) -> None:
        """Bring the catalog up to date with the journal; cheap when nothing is new."""
        segments = self._journal.segments()
        if self._seen == segments and self._pid == os.getpid():
            return
        if self._known_segments() == segments:
            return
        with lock(self._lock, what="the catalog"):
            known = self._known_segments()
            # A connection left open would go on showing the file that is about to be replaced.
            self.close()
            if known is None or known != self._journal.segments():
                self._rebuild(from_scratch=known is None)

    def select(self, name: str, **parameters: Any) -> list[Row]:
        """Run a named statement of `schema/lookups.sql` and return its rows."""
        statement = statements("lookups.sql")[name].sql
        return self._healed(lambda: _fetch(self._reader(), statement, parameters)).dicts()

    def sandbox(
        self,
        sql: str,
        *,
        seconds: float = 60.0,
        memory: str = "2GB",
        parameters: Sequence[Any] = (),
    ) -> Table:
        """Run a user's SQL read-only: no files, no extensions, no settings, bounded time.

        Raises `QueryError` with DuckDB's message.
        """
        self.close()
        return self._healed(lambda: self._sandboxed(sql, seconds, memory, parameters))

    def _sandboxed(self, sql: str, seconds: float, memory: str, parameters: Sequence[Any]) -> Table:
        with contextlib.closing(_read_only(self.path)) as connection:
            for setting in _SANDBOX:
                connection.execute(setting.format(memory=memory))
            _check_reading(connection, sql)
            # In a thread of its own: DuckDB looks for Ctrl-C only now and then, a wait always does.
            with ThreadPoolExecutor(max_workers=1) as worker:
                result = worker.submit(_fetch, connection, sql, list(parameters))
                try:
                    return result.result(timeout=seconds)
                except TimeoutError as error:
                    raise QueryError(
                        f"the query ran longer than {seconds:g} seconds", hint="raise --max-seconds"
                    ) from error
                finally:
                    connection.interrupt()

    def _healed(self, query: Callable[[], Table]) -> Table:
        """Run a query; if the file turns out damaged, make it again and run the query once more."""
        try:
            return query()
        except (duckdb.Error, QueryError) as error:
            if not _is_damage(error if isinstance(error, duckdb.Error) else error.__cause__):
                raise
        self.close()
        with lock(self._lock, what="the catalog"):
            self._rebuild(from_scratch=True)
        return query()

    def _reader(self) -> duckdb.DuckDBPyConnection:
        # A forked child that used its parent's connection would lose data without a word.
        if self._pid != os.getpid():
            self.close()
        if self._connection is None:
            # Looked at before opening: a file that is replaced in between is opened again.
            self._opened = _identity(self.path)
            self._connection, self._pid = _read_only(self.path), os.getpid()
        return self._connection

    def _known_segments(self) -> dict[str, int] | None:
        """Return the segment sizes that the catalog has seen, or None if it is unusable."""
        if not self.path.is_file():
            return None
        if not self._shows_published():
            self.close()
        try:
            reader = self._reader()
            if self._seen is None:
                if reader.execute("FROM catalog_info").fetchone() != (SCHEMA_VERSION,):
                    return None
                rows = reader.execute("SELECT segment, seen_bytes FROM journal_segments").fetchall()
                self._seen = dict(rows)
        except duckdb.Error:
            # Not a catalog of ours, or damaged: it is derived, so it is simply made again.
            return None
        segments = self._journal.segments()
        if any(segments.get(name, -1) < size for name, size in self._seen.items()):
            return None
        return dict(self._seen)

    def _shows_published(self) -> bool:
        """Tell whether the open connection shows the file that is published now.

        While it is open no other file can have its inode.
        """
        if self._connection is None or self._pid != os.getpid():
            return False
        return self._opened == _identity(self.path)

    def _rebuild(self, *, from_scratch: bool) -> None:
        try:
            self._publish(from_scratch=from_scratch)
        except duckdb.Error as error:
            if not from_scratch:
                # The file to build upon is damaged; it is derived, so it is simply made again.
                self._rebuild(from_scratch=True)
                return
            raise StorageError(
                f"indexing the catalog: {error}",
                hint="check the disk and its free space; the journal holds everything",
            ) from error

    def _publish(self, *, from_scratch: bool) -> None:
        # One name is enough under the lock, and what a killed process left is not built upon.
        staging = self._staging / "catalog.tmp"
        leftovers = (staging, self._staging / "catalog.tmp.wal")
        with storage_errors("indexing the catalog"):
            try:
                for leftover in leftovers:
                    leftover.unlink(missing_ok=True)
                if not from_scratch:
                    shutil.copyfile(self.path, staging)
                with contextlib.closing(duckdb.connect(staging)) as connection:
                    self._index(connection, from_scratch)
                with open(staging, "rb") as file:
                    os.fsync(file.fileno())
                staging.replace(self.path)
                sync_folder(self.path.parent)
            finally:
                for leftover in leftovers:
                    leftover.unlink(missing_ok=True)

    def _index(self, connection: duckdb.DuckDBPyConnection, from_scratch: bool) -> None:
        connection.execute("BEGIN")
        if from_scratch:
            for file in ("tables.sql", "macros.sql", "views.sql"):
                connection.execute(script(file))
            connection.execute("INSERT INTO catalog_info VALUES (?)", [SCHEMA_VERSION])
        known = dict(
            connection.execute("SELECT segment, indexed_bytes FROM journal_segments").fetchall()
        )
        loader = _Loader(connection)
        for segment, size in self._journal.segments().items():
            offset = known.get(segment, 0)
            for record, after in self._journal.read(segment, offset, size):
                loader.add(record)
                offset = after
            connection.execute(
                "INSERT OR REPLACE INTO journal_segments VALUES (?, ?, ?)", [segment, offset, size]
            )
        loader.flush()
        for settling in statements("settle.sql").values():
            connection.execute(settling.sql)
        connection.execute("COMMIT")
        connection.execute("CHECKPOINT")


class _Loader:
    """Collects records and inserts their rows in batches.

    Of two records with one id the earlier counts, whichever is read first, so that indexing in
    steps gives the same tables as indexing at once.
    """

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        self.connection = connection
        self.pending: dict[str, dict[str, Record]] = {}
        self.objects: list[Row] = []
        self.count = 0

    def add(self, record: Record) -> None:
        """Take one record; of a kind that this version does not know, only its objects."""
        for digest, size in record.objects.items():
            self.objects.append({"digest": digest, "bytes": size, "kind": record.kind})
        if record.kind not in KINDS:
            return
        of_kind = self.pending.setdefault(record.kind, {})
        here = of_kind.get(record.id)
        if here is None or record.at < here.at:
            of_kind[record.id] = record
        self.count += 1
        if self.count % _BATCH == 0:
            self.flush()

    def flush(self) -> None:
        """Insert what is pending."""
        tables = {"objects": self.objects} if self.objects else {}
        for kind, records in self.pending.items():
            for record in self._unknown(KINDS[kind], records):
                for table, row in rows(record):
                    tables.setdefault(table, []).append(row)
        self.pending, self.objects = {}, []
        for table, found in tables.items():
            self._insert(table, found)

    def _unknown(self, kind: Kind, records: dict[str, Record]) -> list[Record]:
        """Return the records that are new; those that turn out earlier replace what is there."""
        statement = f"SELECT {kind.key}, strftime(added, '%Y-%m-%dT%H:%M:%S.%fZ') FROM {kind.table} WHERE {kind.key} IN (SELECT unnest(?))"  # noqa: E501, S608
        present = dict(self.connection.execute(statement, [list(records)]).fetchall())
        earlier = [key for key, added in present.items() if records[key].at < added]
        if earlier:
            for table, column in ((kind.table, kind.key), *kind.parts):
                delete = f"DELETE FROM {table} WHERE {column} IN (SELECT unnest(?))"  # noqa: S608
                self.connection.execute(delete, [earlier])
        return [r for key, r in records.items() if key not in present or key in earlier]

    def _insert(self, table: str, found: list[Row]) -> None:
        # Imported here: a reading command that finds nothing new needs no Arrow.
        import pyarrow as pa

        shape = self.connection.table(table).limit(0).to_arrow_table().schema
        text = {pa.timestamp("us"): pa.string()}
        fields = [
            (field.name, text.get(field.type, field.type))
            for field in shape
            if field.name in found[0]
        ]
        whole = [name for name, kind in fields if pa.types.is_integer(kind)]
        special = statements("insert.sql").get(table)
        sql = special.sql if special else f"INSERT INTO {table} BY NAME FROM batch"
        try:
            if any(type(row[name]) is float for row in found for name in whole):
                raise OverflowError("a fraction where a whole number belongs")  # Arrow would cut it
            self.connection.register("batch", pa.Table.from_pylist(found, schema=pa.schema(fields)))
            self.connection.execute(sql)
        except (
            pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError,
            duckdb.DataError, duckdb.IntegrityError,
        ) as error:  # fmt: skip
            raise Damage(
                f"a record for {table} has a field of the wrong type: {error}",
                hint="remove the segment that was not written by poolreg from journal/",
            ) from error
        self.connection.unregister("batch")


_SQL_HINT = "see docs/schema.md for tables and columns"
_SANDBOX = (
    "SET temp_directory = ''",
    "SET enable_external_access = false",
    "SET autoinstall_known_extensions = false",
    "SET autoload_known_extensions = false",
    "SET allow_community_extensions = false",
    "SET memory_limit = '{memory}'",
    "SET lock_configuration = true",
)


_EXPLAIN = re.compile(r"\s*EXPLAIN\s+(ANALYZE\s+)?", re.IGNORECASE)


def _check_reading(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    """Refuse all but queries.

    The file access that DuckDB leaves for the attached catalog would let a COPY write its log
    and an ATTACH open it for writing.
    """
    if "\0" in sql or any("\ud800" <= letter <= "\udfff" for letter in sql):
        raise QueryError(
            "the query is not plain text", hint="remove NUL bytes and broken characters"
        )
    kinds = duckdb.StatementType
    try:
        found = connection.extract_statements(sql)
        inner = [_EXPLAIN.sub("", s.query, count=1) for s in found if s.type == kinds.EXPLAIN]
        found = [s for s in found if s.type != kinds.EXPLAIN]
        found += [s for text in inner for s in connection.extract_statements(text)]
    except duckdb.Error as error:
        raise QueryError(str(error), hint=_SQL_HINT) from error
    if not found:
        raise QueryError("there is no statement to run", hint=_SQL_HINT)
    for statement in found:
        if statement.type != kinds.SELECT:
            raise QueryError(
                f"only queries are allowed, not {statement.type.name}",
                hint="use SELECT, FROM, DESCRIBE, SHOW, SUMMARIZE or EXPLAIN; a PIVOT needs its "
                "values: PIVOT … ON column IN (…)",
            )


def _is_damage(error: BaseException | None) -> bool:
    # DuckDB reports a bad checksum as the bare base class.
    damage = (duckdb.IOException, duckdb.InternalException, duckdb.FatalException)
    return type(error) is duckdb.Error or isinstance(error, damage)


def _identity(path: Path) -> tuple[int, int, int]:
    """Return what tells a file from the one that replaces it."""
    with storage_errors("reading the catalog"):
        status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size


def _read_only(path: Path) -> duckdb.DuckDBPyConnection:
    """Open the published file as it is now.

    DuckDB would hand a second connection to a path the file that the first one has open, even
    after it was replaced; attaching to a database in memory of our own avoids that.
    """
    connection = duckdb.connect(":memory:")
    place = str(path).replace("'", "''")
    connection.execute("SET python_enable_replacements = false")
    connection.execute(f"ATTACH '{place}' AS pool (READ_ONLY)")
    connection.execute("USE pool")
    return connection


def _fetch(
    connection: duckdb.DuckDBPyConnection, sql: str, parameters: Mapping[str, Any] | Sequence[Any]
) -> Table:
    try:
        result = connection.execute(sql, parameters or None)
        columns = tuple(column[0] for column in result.description or ())
        return Table(columns, result.fetchall())
    except duckdb.InterruptException:
        raise
    except duckdb.Error as error:
        raise QueryError(str(error), hint=_SQL_HINT) from error
    except RuntimeError as error:
        if "interrupted" in str(error):  # what DuckDB makes of Ctrl-C
            raise KeyboardInterrupt from error
        raise
