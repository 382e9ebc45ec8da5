"""The catalog: a DuckDB picture of the journal, for look-ups and for the SQL of users.

`refresh` brings the published file up to date: under an exclusive lock it copies the file,
inserts the new journal lines in one transaction together with how far it read, closes, flushes
and renames. Readers open the published file read-only and are never blocked. A missing,
damaged or differently versioned catalog is rebuilt from the journal; nothing is lost with it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb

from poolreg.errors import Damage, QueryError, StorageError
from poolreg.files import lock, storage_errors, sync_folder
from poolreg.schema import statements
from poolreg.store.journal import Journal, Record
from poolreg.store.records import KINDS, Kind, Row, rows
from poolreg.store.sandbox import Table, connect, create_schema, fetch, read_only, run_sandboxed

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = 5
_BATCH = 50_000  # records; bounds the memory of indexing

# Connections of a parent process: in a forked child even closing one would hang.
_inherited: list[duckdb.DuckDBPyConnection] = []


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
        return self._healed(lambda: fetch(self._reader(), statement, parameters)).dicts()

    def sandbox(self, sql: str, **options: Any) -> Table:
        """Run a user's SQL read-only: no files, no extensions, no settings, bounded time.

        Options are those of `poolreg.store.sandbox.run_sandboxed`; raises `QueryError`.
        """
        self.close()
        return self._healed(lambda: self._sandboxed(sql, options))

    def _sandboxed(self, sql: str, options: Mapping[str, Any]) -> Table:
        with contextlib.closing(read_only(self.path)) as connection:
            return run_sandboxed(connection, sql, **options)

    def batches(
        self, names: Sequence[str], rows: int
    ) -> Iterator[tuple[str, pa.RecordBatchReader]]:
        """Yield tables and views by name, all of one state of the catalog, as streams of `rows`.

        Rows are ordered by all columns (digests that only number the rows last), so that equal
        content comes in equal order; memory is bounded, what is too large is sorted on the disk.
        """
        try:
            with contextlib.closing(read_only(self.path)) as connection:
                connection.execute("SET memory_limit = '512MB'")
                connection.execute("SET temp_directory = ?", [str(self._staging / "sort")])
                for name in names:
                    table = connection.table(name)
                    numbers = [c for c in table.columns[:1] if c in ("digest", "record")]
                    order = [f'"{c}"' for c in (*table.columns[len(numbers) :], *numbers)]
                    yield name, table.order(", ".join(order)).to_arrow_reader(rows)
        except duckdb.Error as error:
            raise StorageError(
                f"reading the catalog: {error}",
                hint="check the disk and its free space; catalog.duckdb may be deleted",
            ) from error

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
            self._connection, self._pid = read_only(self.path), os.getpid()
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
                with contextlib.closing(connect(staging)) as connection:
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
            create_schema(connection)
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


def _is_damage(error: BaseException | None) -> bool:
    # DuckDB reports a bad checksum as the bare base class.
    damage = (duckdb.IOException, duckdb.InternalException, duckdb.FatalException)
    return type(error) is duckdb.Error or isinstance(error, damage)


def _identity(path: Path) -> tuple[int, int, int]:
    """Return what tells a file from the one that replaces it."""
    with storage_errors("reading the catalog"):
        status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size
