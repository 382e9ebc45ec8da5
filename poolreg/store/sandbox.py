"""Where a user's SQL runs: DuckDB with files, extensions and settings out of reach.

The same sandbox stands around a pool's catalog (`Catalog.sandbox`) and around tables that were
published elsewhere (`query_parquet`). Only queries run in it, for a bounded time and in bounded
memory; nothing can be changed, written or loaded.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import duckdb

from poolreg.errors import QueryError
from poolreg.schema import script
from poolreg.store.records import Row

if TYPE_CHECKING:
    import pyarrow as pa

MAX_SQL = 100_000  # characters; the parser takes 5 kB for each of many open brackets

_HINT = "see docs/schema.md for tables and columns"
_SETTINGS = (
    "SET temp_directory = ''",
    "SET enable_external_access = false",
    "SET autoinstall_known_extensions = false",
    "SET autoload_known_extensions = false",
    "SET allow_community_extensions = false",
    "SET memory_limit = '{memory}'",
    "SET lock_configuration = true",
)
_ROW = 100  # bytes of a row besides its values
_NESTED = {dict, list, tuple}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
_EXPLAIN = re.compile(r"\s*EXPLAIN\s+(ANALYZE\s+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Table:
    """The result of a query: column names and rows."""

    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]

    def dicts(self) -> list[Row]:
        """Return the rows as dictionaries."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


def run_sandboxed(
    connection: duckdb.DuckDBPyConnection, sql: str, *, parameters: Sequence[Any] = (),
    seconds: float = 60.0, memory: str = "2GB",
) -> Table:  # fmt: skip
    """Lock the connection up, for good, and run a user's SQL in it.

    `memory` bounds what DuckDB works in, and once more what the result takes here. `seconds` are
    exceeded where DuckDB cannot be interrupted: in planning, and in a function of one giant text.
    Raises `QueryError` with DuckDB's message.
    """
    from concurrent.futures import ThreadPoolExecutor

    for setting in _SETTINGS:
        connection.execute(setting.format(memory=memory))
    _check_reading(connection, sql)
    # In a thread of its own: DuckDB looks for Ctrl-C only now and then, a wait always does.
    with ThreadPoolExecutor(max_workers=1) as worker:
        most = int(memory[:-2]) * _UNITS[memory[-2:]]
        result = worker.submit(fetch, connection, sql, list(parameters), most=most)
        try:
            return result.result(timeout=seconds)
        except TimeoutError as error:
            raise QueryError(
                f"the query ran longer than {seconds:g} seconds", hint="raise --max-seconds"
            ) from error
        finally:
            connection.interrupt()


def _check_reading(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    """Refuse all but queries.

    The file access that DuckDB leaves for the attached catalog would let a COPY write its log
    and an ATTACH open it for writing.
    """
    if "\0" in sql or any("\ud800" <= letter <= "\udfff" for letter in sql):
        raise QueryError(
            "the query is not plain text", hint="remove NUL bytes and broken characters"
        )
    if len(sql) > MAX_SQL:
        raise QueryError(f"the query is longer than {MAX_SQL} characters", hint=_HINT)
    kinds = duckdb.StatementType
    try:
        found = connection.extract_statements(sql)
        inner = [_EXPLAIN.sub("", s.query, count=1) for s in found if s.type == kinds.EXPLAIN]
        found = [s for s in found if s.type != kinds.EXPLAIN]
        found += [s for text in inner for s in connection.extract_statements(text)]
    except duckdb.Error as error:
        raise _query_error(error) from error
    except ValueError as error:  # a kind of statement that has no name in Python
        raise QueryError("only queries are allowed", hint=_HINT) from error
    if not found:
        raise QueryError("there is no statement to run", hint=_HINT)
    for statement in found:
        if statement.type != kinds.SELECT:
            raise QueryError(
                f"only queries are allowed, not {statement.type.name}",
                hint="use SELECT, FROM, DESCRIBE, SHOW, SUMMARIZE or EXPLAIN; a PIVOT needs its "
                "values: PIVOT … ON column IN (…)",
            )


def fetch(
    connection: duckdb.DuckDBPyConnection, sql: str, parameters: Mapping[str, Any] | Sequence[Any],
    *, most: int | None = None,
) -> Table:  # fmt: skip
    """Run a statement and return all rows; raises `QueryError`, too, for `most` bytes of them."""
    try:
        result = connection.execute(sql, parameters or None)
        columns = tuple(column[0] for column in result.description or ())
        return Table(columns, result.fetchall() if most is None else _bounded(result, most))
    except duckdb.InterruptException:
        raise
    except duckdb.Error as error:
        raise _query_error(error) from error
    except RuntimeError as error:
        if "interrupted" in str(error):  # what DuckDB makes of Ctrl-C
            raise KeyboardInterrupt from error
        raise


def _bounded(result: duckdb.DuckDBPyConnection, most: int) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    size = 0
    while piece := result.fetchmany(64):
        flat = {type(value) for row in piece for value in row}.isdisjoint(_NESTED)
        values = itertools.chain.from_iterable(piece)
        size += len(piece) * _ROW + sum(map(sys.getsizeof if flat else _size, values))
        if size > most:
            raise QueryError(
                f"Out of Memory: the result takes more than {most} bytes",
                hint="select fewer columns or rows: LIMIT",
            )
        rows += piece
    return rows


def _size(value: Any) -> int:
    """Return about how many bytes a value takes, those in it included."""
    size = sys.getsizeof(value)
    if isinstance(value, dict):
        return size + sum(map(_size, value)) + sum(map(_size, value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return size + sum(map(_size, value))
    return size


def _query_error(error: duckdb.Error) -> QueryError:
    said = str(error).partition("\n\nStack Trace:")[0]
    if "pytz" in said:
        said = "a time with a time zone cannot be shown; cast it: now()::TIMESTAMP"
    return QueryError(said, hint=_HINT)


# -- the databases that it stands around -----------------------------------------------------


def connect(place: Path | str) -> duckdb.DuckDBPyConnection:
    """Connect, without DuckDB's own progress bar, which it prints among the results."""
    connection = duckdb.connect(place)
    connection.execute("SET enable_progress_bar = false")
    return connection


def read_only(path: Path) -> duckdb.DuckDBPyConnection:
    """Open a catalog's file as it is now.

    DuckDB would hand a second connection to a path the file that the first one has open, even
    after it was replaced; attaching to a database in memory of our own avoids that.
    """
    connection = connect(":memory:")
    connection.execute("SET python_enable_replacements = false")
    attach(connection, path, "pool")
    return connection


def peek(path: Path, sql: str) -> Table:
    """Run a statement over a catalog's file as it is, which mends nothing; raises `QueryError`."""
    try:
        connection = read_only(path)
    except duckdb.Error as error:
        raise _query_error(error) from error
    with contextlib.closing(connection):
        return fetch(connection, sql, ())


def attach(
    connection: duckdb.DuckDBPyConnection, path: Path, name: str, *, writable: bool = False
) -> None:
    """Attach a catalog's file under a name that needs no quotes, and look there first."""
    place = str(path).replace("'", "''")
    connection.execute(f"ATTACH '{place}' AS {name} {'' if writable else '(READ_ONLY)'}")
    connection.execute(f"USE {name}")


def detach(connection: duckdb.DuckDBPyConnection, name: str) -> None:
    """Close an attached file."""
    connection.execute("USE memory")
    connection.execute(f"DETACH {name}")


def create_schema(connection: duckdb.DuckDBPyConnection) -> None:
    """Create the catalog's tables, macros and views, all empty."""
    for file in ("tables.sql", "macros.sql", "views.sql"):
        connection.execute(script(file))


class ParquetFiles(Protocol):
    """An fsspec file system of Parquet files, `protocol://NAME.parquet` for each of `names`."""

    protocol: str
    names: Sequence[str]

    def stand_in(self, shapes: Mapping[str, pa.Schema] | None) -> None:
        """Show empty files of these columns by name; with None the real ones, from then on."""


def query_parquet(files: ParquetFiles, sql: str, **options: Any) -> Table:
    """Run a user's SQL over Parquet files that take the place of tables and views of a catalog.

    Nothing of a file is read before the query needs it, and then only the columns and row groups
    that it needs: DuckDB binds a view each time it is used, and when it is created there are
    empty files to bind to. Options and errors are those of `run_sandboxed`.
    """
    with contextlib.closing(connect(":memory:")) as connection:
        connection.execute("SET python_enable_replacements = false")
        create_schema(connection)
        shapes = {name: connection.table(name).to_arrow_table().schema for name in files.names}
        connection.register_filesystem(files)
        files.stand_in(shapes)
        places = {name: f"{files.protocol}://{name}.parquet" for name in files.names}
        for name, place in places.items():
            _replace(connection, name, place)
        files.stand_in(None)
        connection.execute(f"SET allowed_paths = {list(places.values())}")
        return run_sandboxed(connection, sql, **options)


def _replace(connection: duckdb.DuckDBPyConnection, name: str, place: str) -> None:
    """Put a Parquet file in the place of a table or view, with the very same columns."""
    relation = connection.table(name)
    columns = ", ".join(
        f'CAST("{column}" AS {kind}) AS "{column}"'
        for column, kind in zip(relation.columns, relation.types, strict=True)
    )
    (found,) = connection.execute(
        "SELECT count(*) FROM duckdb_views() WHERE view_name = ?", [name]
    ).fetchall()
    connection.execute(f"DROP {'VIEW' if found[0] else 'TABLE'} {name}")
    connection.execute(f"CREATE VIEW {name} AS SELECT {columns} FROM read_parquet('{place}')")  # noqa: S608
