"""The catalog: a DuckDB picture of the journal, for look-ups and for the SQL of users.

`refresh` brings the published file up to date: under an exclusive lock it copies the file,
inserts the new journal lines in one transaction together with how far it read, closes, flushes
and renames. Readers open the published file read-only and are never blocked. A missing,
damaged or differently versioned catalog is rebuilt from the journal; nothing is lost with it.

It is a witness, too: a segment that it has read and that is shorter now, or gone, has lost
records, and that is reported instead of forgotten.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb

from poolreg import faults
from poolreg.errors import Damage, QueryError, StorageError
from poolreg.files import lock, storage_errors, sync_folder
from poolreg.schema import statements
from poolreg.store import indexing
from poolreg.store.journal import Journal
from poolreg.store.records import Row
from poolreg.store.sandbox import (
    Table,
    attach,
    connect,
    detach,
    fetch,
    read_only,
    run_sandboxed,
)
from poolreg.weights.disk import clone

if TYPE_CHECKING:
    import pyarrow as pa

_MOST_ANSWERS, _MOST_ROWS = 1000, 1000  # of look-ups that are remembered

# Connections of a parent process: in a forked child even closing one would hang.
_inherited: list[duckdb.DuckDBPyConnection] = []


class Catalog:
    """The catalog of one pool folder."""

    def __init__(self, root: Path, journal: Journal) -> None:
        self.path = root / "catalog.duckdb"
        self._lock = root / "locks" / "catalog"
        self._staging = root / "tmp"
        self._journal = journal
        # A database in memory that files are attached to: to make one takes longer than a look-up.
        self._connection: duckdb.DuckDBPyConnection | None = None
        self._pid = 0
        self._opened: tuple[int, int, int] | None = None  # identity of the file that it shows
        self._answers: dict[tuple[Any, ...], Table] = {}  # of that file, to short questions
        self._seen: dict[str, int] | None = None  # segment sizes that it shows
        self._indexed: dict[str, int] = {}  # how much of each segment is in the published file

    def close(self) -> None:
        """Close the database; the next query opens it again."""
        self._forget()
        if self._connection is not None:
            if self._pid == os.getpid():
                self._connection.close()
            else:
                _inherited.append(self._connection)
        self._connection = self._opened = None

    def _forget(self) -> None:
        self._seen = None
        self._answers.clear()

    def _leave(self) -> None:
        """Let go of the published file: a connection would go on showing it when it is replaced."""
        self._forget()
        # A forked child that used its parent's connection would lose data without a word.
        if self._pid != os.getpid():
            self.close()
        elif self._connection is not None and self._opened is not None:
            self._opened = None
            try:
                detach(self._connection, "pool")
            except duckdb.Error:  # after an error that DuckDB does not recover from
                self.close()

    def _database(self) -> duckdb.DuckDBPyConnection:
        """Return the database, which shows nothing."""
        self._leave()
        if self._connection is None:
            self._connection, self._pid = connect(":memory:"), os.getpid()
        return self._connection

    def refresh(self) -> None:
        """Bring the catalog up to date with the journal; cheap when nothing is new.

        Raises `Damage` where the journal has lost what the catalog had read.
        """
        segments = self._journal.segments()
        if self._seen == segments and self._pid == os.getpid():
            return
        if self._known_segments() == segments:
            return
        with lock(self._lock, what="the catalog"):
            known = self._known_segments()
            self._leave()
            self._check_nothing_is_lost()
            if known is None or known != self._journal.segments():
                self._index(from_scratch=known is None)

    def rebuild(self) -> None:
        """Make the catalog anew from the journal as it is, whatever the present one had read."""
        with lock(self._lock, what="the catalog"):
            self._leave()
            self._index(from_scratch=True)

    def supersede(self, old: Mapping[str, int], name: str, size: int) -> None:
        """Delete `old` segments, whose records all stand in segment `name` now, and go on.

        Killed in between, the old ones are still there or known to be superseded.
        """
        with lock(self._lock, what="the catalog"):
            known = self._known_segments() or {}
            self._leave()
            if all(known.get(segment) == seen for segment, seen in old.items()):
                self._publish(
                    lambda connection: indexing.supersede(connection, old, name, size), copied=True
                )
            else:
                self.path.unlink(missing_ok=True)  # it would miss what is deleted now
            self._journal.drop(old)

    def differences(self) -> dict[str, tuple[int, int]]:
        """Compare the published file, as it is, with one made anew from what it says it has read.

        Returns the tables that differ, each with the number of rows that only the published and
        only the new one has; nothing for a missing or older catalog, which the next command makes
        anew. Raises `Damage` if it cannot be read or has read what is gone.
        """
        fresh = self._staging / f"catalog.{os.getpid()}.check"
        if not self.path.is_file():
            return {}
        try:
            with lock(self._lock, what="the catalog"):
                self._leave()
                with contextlib.closing(read_only(self.path)) as reader:
                    if reader.execute("FROM catalog_info").fetchone() != (indexing.SCHEMA_VERSION,):
                        return {}
                    known = self._read_segments(reader)
                self._check_nothing_is_lost()
                with contextlib.closing(connect(fresh)) as connection:
                    indexing.index(connection, self._journal, known, from_scratch=True)
            with contextlib.closing(read_only(self.path)) as connection:
                attach(connection, fresh, "fresh")
                return indexing.differences(connection, "pool", "fresh")
        except duckdb.Error as error:
            raise Damage(
                f"the catalog cannot be read: {error}",
                hint="make it anew: poolreg verify --repair, or delete catalog.duckdb",
            ) from error
        finally:
            for leftover in (fresh, fresh.with_name(fresh.name + ".wal")):
                with storage_errors("comparing the catalog"):
                    leftover.unlink(missing_ok=True)

    def select(self, name: str, **parameters: Any) -> list[Row]:
        """Run a named statement of `schema/lookups.sql` and return its rows."""
        return self._healed(lambda: self._looked_up(name, parameters)).dicts()

    def _looked_up(self, name: str, parameters: Mapping[str, Any]) -> Table:
        reader = self._reader()
        key = (name, *parameters.items())
        short = all(isinstance(value, str) for value in parameters.values())
        if short and key in self._answers:
            return self._answers[key]
        found = fetch(reader, statements("lookups.sql")[name].sql, parameters)
        if short and len(found.rows) <= _MOST_ROWS and len(self._answers) < _MOST_ANSWERS:
            self._answers[key] = found
        return found

    def sandbox(self, sql: str, **options: Any) -> Table:
        """Run a user's SQL read-only: no files, no extensions, no settings, bounded time.

        Options are those of `poolreg.store.sandbox.run_sandboxed`; raises `QueryError`.
        """
        self._leave()
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
            self._index(from_scratch=True)
        return query()

    def _reader(self) -> duckdb.DuckDBPyConnection:
        if self._connection is not None and self._opened is not None and self._pid == os.getpid():
            return self._connection
        database = self._database()
        # Looked at before opening: a file that is replaced in between is opened again.
        opened = _identity(self.path)
        attach(database, self.path, "pool")
        self._opened = opened
        return database

    def _known_segments(self) -> dict[str, int] | None:
        """Return the segment sizes that the catalog has seen, or None if it is unusable."""
        self._indexed = {}
        if not self.path.is_file():
            return None
        if not self._shows_published():
            self._leave()
        try:
            reader = self._reader()
            known = self._read_segments(reader)
            if self._seen is None:
                if reader.execute("FROM catalog_info").fetchone() != (indexing.SCHEMA_VERSION,):
                    return None
                self._seen = known
        except duckdb.Error:
            # Not a catalog of ours, or damaged: it is derived, so it is simply made again.
            self.close()
            return None
        segments = self._journal.segments()
        if any(segments.get(name, -1) < size for name, size in self._seen.items()):
            return None
        return dict(self._seen)

    def _read_segments(self, reader: duckdb.DuckDBPyConnection) -> dict[str, int]:
        """Return the segment sizes that a catalog has seen, noting how much of them it holds."""
        rows = reader.execute("FROM journal_segments").fetchall()
        self._indexed = {segment: indexed for segment, indexed, _ in rows}
        return {segment: seen for segment, _, seen in rows}

    def _shows_published(self) -> bool:
        """Tell whether the open connection shows the file that is published now.

        While it is open no other file can have its inode.
        """
        if self._opened is None or self._pid != os.getpid():
            return False
        return self._opened == _identity(self.path)

    def _check_nothing_is_lost(self) -> None:
        """Raise `Damage` if a segment lacks what the catalog, looked at last, had read of it."""
        segments = self._journal.segments()
        for name, size in self._indexed.items():
            if size > segments.get(name, 0):
                what = "is shorter than it was" if name in segments else "is gone"
                raise Damage(
                    f"the journal has lost records: journal/{name} {what} "
                    f"({segments.get(name, 0):,} of {size:,} bytes)",
                    hint="restore it from a copy of the pool; or go on without what it held: "
                    "poolreg verify --repair",
                    segment=name,
                )

    def _index(self, *, from_scratch: bool) -> None:
        try:
            self._publish(
                lambda connection: indexing.index(
                    connection, self._journal, self._journal.segments(), from_scratch=from_scratch
                ),
                copied=not from_scratch,
            )
        except duckdb.Error as error:
            if not from_scratch:
                # The file to build upon is damaged; it is derived, so it is simply made again.
                self._index(from_scratch=True)
                return
            raise StorageError(
                f"indexing the catalog: {error}",
                hint="check the disk and its free space; the journal holds everything",
            ) from error

    def _change(self, staging: Path, change: Callable[[duckdb.DuckDBPyConnection], None]) -> None:
        database = self._database()
        try:
            attach(database, staging, "pool", writable=True)
            change(database)
            detach(database, "pool")
            database.execute("RESET memory_limit")
        except BaseException:
            self.close()  # and with it whatever the change had begun
            raise

    def _publish(
        self, change: Callable[[duckdb.DuckDBPyConnection], None], *, copied: bool
    ) -> None:
        """Change a copy of the published file, or an empty one, and put it in its place."""
        # One name is enough under the lock, and what a killed process left is not built upon.
        staging = self._staging / "catalog.tmp"
        leftovers = (staging, self._staging / "catalog.tmp.wal")
        with storage_errors("indexing the catalog"):
            try:
                for leftover in leftovers:
                    leftover.unlink(missing_ok=True)
                faults.step("index.copy")
                if copied:
                    _copy(self.path, staging)
                self._change(staging, change)
                with open(staging, "rb") as file:
                    os.fsync(file.fileno())
                faults.step("index.replace")
                staging.replace(self.path)
                faults.step("index.replaced")
                sync_folder(self.path.parent)
            finally:
                for leftover in leftovers:
                    leftover.unlink(missing_ok=True)


def _copy(source: Path, target: Path) -> None:
    with open(source, "rb") as reader, open(target, "xb") as writer:
        cloned = clone(reader.fileno(), writer.fileno())
    if not cloned:
        shutil.copyfile(source, target)


def _is_damage(error: BaseException | None) -> bool:
    # DuckDB reports a bad checksum as the bare base class.
    damage = (duckdb.IOException, duckdb.InternalException, duckdb.FatalException)
    return type(error) is duckdb.Error or isinstance(error, damage)


def _identity(path: Path) -> tuple[int, int, int]:
    """Return what tells a file from the one that replaces it."""
    with storage_errors("reading the catalog"):
        status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size
