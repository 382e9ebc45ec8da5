"""Indexing: the records of a journal become rows of a catalog, in one transaction.

Indexing in steps gives the same tables as indexing at once, in whatever order segments come, so
two catalogs of one journal can be compared row by row.
"""

from __future__ import annotations

from collections.abc import Mapping

import duckdb

from poolreg import faults
from poolreg.errors import Damage
from poolreg.schema import statements
from poolreg.store.journal import Journal, Record
from poolreg.store.records import KINDS, Kind, Row, rows
from poolreg.store.sandbox import create_schema

SCHEMA_VERSION = 6
_BATCH = 50_000  # records; bounds the memory of indexing
_HOW_FAR = {"catalog_info", "journal_segments"}  # tables about the catalog, not of the pool


def index(
    connection: duckdb.DuckDBPyConnection, journal: Journal, segments: Mapping[str, int], *,
    from_scratch: bool,
) -> None:  # fmt: skip
    """Insert what segments of these sizes hold beyond what the catalog knows, and commit."""
    connection.execute("BEGIN")
    if from_scratch:
        create_schema(connection)
        connection.execute("INSERT INTO catalog_info VALUES (?)", [SCHEMA_VERSION])
    known = dict(
        connection.execute("SELECT segment, indexed_bytes FROM journal_segments").fetchall()
    )
    loader = _Loader(connection)
    for segment, size in segments.items():
        offset = known.get(segment, 0)
        for record, after in journal.read(segment, offset, size):
            loader.add(record)
            offset = after
        connection.execute(
            "INSERT OR REPLACE INTO journal_segments VALUES (?, ?, ?)", [segment, offset, size]
        )
    loader.flush()
    for settling in statements("settle.sql").values():
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
                hint="something else than poolreg wrote it; see in which segment: poolreg verify",
            ) from error
        self.connection.unregister("batch")
