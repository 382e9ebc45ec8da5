"""Indexing: the records of a journal become rows of a catalog, in one transaction.

Indexing in steps gives the same tables as indexing at once, in whatever order segments come, so
two catalogs of one journal can be compared row by row.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import duckdb

from poolreg import faults
from poolreg.errors import Damage
from poolreg.schema import statements
from poolreg.store.journal import Journal, Record
from poolreg.store.records import KINDS, Table, Values, rows
from poolreg.store.sandbox import create_schema

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = 8
_BATCH = 50_000  # records; bounds the memory of indexing, with
_MEMORY = "512MB"  # for DuckDB
_HOW_FAR = {"catalog_info", "journal_segments"}  # tables about the catalog, not of the pool


def index(
    connection: duckdb.DuckDBPyConnection, journal: Journal, segments: Mapping[str, int], *,
    from_scratch: bool,
) -> None:  # fmt: skip
    """Insert what segments of these sizes hold beyond what the catalog knows, and commit."""
    connection.execute(f"SET memory_limit = '{_MEMORY}'")
    connection.execute("BEGIN")
    if from_scratch:
        create_schema(connection)
        connection.execute("INSERT INTO catalog_info VALUES (?)", [SCHEMA_VERSION])
    known = connection.execute("SELECT segment, indexed_bytes FROM journal_segments").fetchall()
    ends = dict.fromkeys(segments, 0) | dict(known)
    changed = _load_all(connection, _batches(journal, segments, ends))
    connection.execute(
        "INSERT OR REPLACE INTO journal_segments SELECT unnest(?), unnest(?), unnest(?)",
        [list(segments), [ends[segment] for segment in segments], list(segments.values())],
    )
    for settling in statements("settle.sql").values():
        if any(table in settling.sql for table in changed):
            connection.execute(settling.sql)
    faults.step("index.commit")
    connection.execute("COMMIT")
    connection.execute("CHECKPOINT")


def supersede(
    connection: duckdb.DuckDBPyConnection, old: Mapping[str, int], name: str, size: int
) -> None:
    """Say that the records of `old` segments, all indexed, stand in segment `name` from now on."""
    connection.execute("BEGIN")
    connection.execute(
        "DELETE FROM journal_segments WHERE segment IN (SELECT unnest(?))", [list(old)]
    )
    connection.execute(
        "INSERT OR REPLACE INTO journal_segments VALUES (?, ?, ?)", [name, size, size]
    )
    connection.execute("COMMIT")
    connection.execute("CHECKPOINT")


def differences(
    connection: duckdb.DuckDBPyConnection, one: str, other: str
) -> dict[str, tuple[int, int]]:
    """Return the tables of two attached catalogs that differ, with the rows only each has."""
    listed = "SELECT table_name FROM duckdb_tables() WHERE database_name = ? ORDER BY ALL"
    names = [
        {name for (name,) in connection.execute(listed, [side]).fetchall()} - _HOW_FAR
        for side in (one, other)
    ]
    found = {}
    for table in sorted(names[0] | names[1]):
        counts = (0, 0)
        if table in names[0] & names[1]:
            mine, theirs = f'"{one}"."{table}"', f'"{other}"."{table}"'
            counts = _only_in(connection, mine, theirs), _only_in(connection, theirs, mine)
        if table not in names[0] & names[1] or any(counts):
            found[table] = counts
    return found


def _only_in(connection: duckdb.DuckDBPyConnection, one: str, other: str) -> int:
    rows = connection.execute(f"SELECT count(*) FROM (FROM {one} EXCEPT ALL FROM {other})")  # noqa: S608
    return int(rows.fetchall()[0][0])


@dataclass
class _Batch:
    """Records of known kinds, by kind and id, and the objects that records name.

    Of two records with one id the earlier counts, whichever is read first, so that indexing in
    steps gives the same tables as indexing at once.
    """

    records: dict[str, dict[str, Record]] = field(default_factory=dict)
    objects: list[Values] = field(default_factory=list)

    def add(self, record: Record) -> None:
        """Take one record; of a kind that this version does not know, only its objects."""
        kind = record.kind
        for digest, size in record.objects.items():
            self.objects.append((digest, size, kind))
        if kind in KINDS:
            of_kind = self.records.setdefault(kind, {})
            here = of_kind.get(record.id)
            if here is None or record.at < here.at:
                of_kind[record.id] = record


def _batches(
    journal: Journal, segments: Mapping[str, int], ends: dict[str, int]
) -> Iterator[_Batch]:
    """Yield the records after `ends` in batches, and move `ends` behind them."""
    batch, count = _Batch(), 0
    for segment, size in segments.items():
        for record, end in journal.read(segment, ends[segment], size):
            batch.add(record)
            ends[segment] = end
            count += 1
            if count % _BATCH == 0:
                yield batch
                batch = _Batch()
    yield batch


def _load_all(connection: duckdb.DuckDBPyConnection, batches: Iterator[_Batch]) -> set[str]:
    """Insert batches, each while the next one is read; returns the tables that may have changed."""
    from concurrent.futures import Future, ThreadPoolExecutor

    changed: set[str] = set()
    with _no_garbage(), ThreadPoolExecutor(max_workers=1) as worker:
        loading: Future[set[str]] | None = None
        for batch in batches:
            if loading:
                changed |= loading.result()
            loading = worker.submit(_load, connection, batch)
        if loading:
            changed |= loading.result()
    return changed


@contextlib.contextmanager
def _no_garbage() -> Iterator[None]:
    """Let Python not look for cycles: rows make none, and the search takes a fifth of the time."""
    wanted = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if wanted:
            gc.enable()


def _load(connection: duckdb.DuckDBPyConnection, batch: _Batch) -> set[str]:
    changed = set()
    if batch.objects:
        _insert(connection, "objects", ("digest", "bytes", "kind"), batch.objects)
    for kind, records in batch.records.items():
        _keep_new(connection, KINDS[kind], records)
        made = [rows(record) for record in records.values()]
        for number, table in enumerate(KINDS[kind]):
            found = [row for of_tables in made for row in of_tables[number]]
            if found:
                _insert(connection, table.name, table.columns, found)
        changed |= {table.name for table in KINDS[kind]}
    return changed


def _keep_new(
    connection: duckdb.DuckDBPyConnection, tables: Sequence[Table], records: dict[str, Record]
) -> None:
    """Leave out records that are there; those that turn out earlier replace what is there."""
    # Imported here: a reading command that finds nothing new needs no Arrow.
    import pyarrow as pa

    main, key = tables[0].name, tables[0].columns[0]
    with _told(main):
        batch = pa.table({"id": list(records)})  # noqa: F841 (DuckDB finds it by its name)
        statement = f"SELECT {key}, strftime(added, '%Y-%m-%dT%H:%M:%S.%fZ') FROM {main} WHERE {key} IN (SELECT id FROM batch)"  # noqa: E501, S608
        present = dict(connection.execute(statement).fetchall())
    earlier = [known for known, added in present.items() if records[known].at < added]
    for table in tables if earlier else ():
        delete = f"DELETE FROM {table.name} WHERE {table.columns[0]} IN (SELECT unnest(?))"  # noqa: S608
        connection.execute(delete, [earlier])
    for known in present.keys() - earlier:
        del records[known]


def _insert(
    connection: duckdb.DuckDBPyConnection, table: str, columns: Sequence[str], found: list[Values]
) -> None:
    import pyarrow as pa

    shape = connection.table(table).limit(0).to_arrow_table().schema
    special = statements("insert.sql").get(table)
    with _told(table):
        values = zip(*found, strict=True)
        batch = pa.table({  # noqa: F841
            name: _column(shape.field(name).type, each)
            for name, each in zip(columns, values, strict=True)
        })  # fmt: skip
        connection.execute(special.sql if special else f"INSERT INTO {table} BY NAME FROM batch")


def _column(kind: pa.DataType, values: Sequence[Any]) -> pa.Array:
    import pyarrow as pa

    if pa.types.is_integer(kind) and float in set(map(type, values)):
        raise OverflowError("a fraction where a whole number belongs")  # Arrow would cut it
    return pa.array(values, pa.string() if pa.types.is_timestamp(kind) else kind)


@contextlib.contextmanager
def _told(table: str) -> Iterator[None]:
    """Turn what Arrow and DuckDB say of values into `Damage`."""
    import pyarrow as pa

    try:
        yield
    except (
        pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError,
        duckdb.DataError, duckdb.IntegrityError,
    ) as error:  # fmt: skip
        raise Damage(
            f"a record for {table} has a field of the wrong type: {error}",
            hint="something else than poolreg wrote it; see in which segment: poolreg verify",
        ) from error
