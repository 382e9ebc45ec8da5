"""SQL over the tables of a published pool, where they lie.

`sql_remote` runs the SQL of `poolreg sql` without fetching the pool: of each file that a query
needs its end is read, then only the columns and row groups that the query asks for.

Files come from strangers. One that was written for another version of the catalog, or whose
columns are not the catalog's, is refused before DuckDB sees it; DuckDB's memory limit and the
sandbox hold for the rest. The exported views are read as they were written, as the tables are.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from poolreg.errors import NotFound, PoolregError, QueryError, Refused, UnknownFormat
from poolreg.sharing.places import Place
from poolreg.sharing.tables import FOLDER, NAMES, VERSION_KEY, table_path
from poolreg.sharing.where import place_at
from poolreg.store.indexing import SCHEMA_VERSION
from poolreg.store.sandbox import Table, query_parquet

_END = 1 << 16  # bytes read at once from a file's end; a file that is not larger is read whole
_FOOTER_LIMIT = 1 << 24


@dataclass(frozen=True)
class Published:
    """The tables of a published pool: where they lie, and their sizes in bytes by name."""

    place: Place
    sizes: Mapping[str, int]


def sql_remote(
    where: str, sql: str, parameters: Sequence[Any] = (), *, seconds: float = 60.0,
    revision: str | None = None, repo_type: str = "model",
) -> Table:  # fmt: skip
    """Run SQL over the tables of a published pool without pulling it; raises `QueryError`.

    `where` is a repository of the Hub, `you/pool`, read at one commit, or a URL that fsspec knows.
    """
    place = place_at(where, repo_type=repo_type, revision=revision)
    return query_published(find_tables(place), sql, parameters=parameters, seconds=seconds)


def find_tables(place: Place) -> Published:
    """Find the tables of a published pool; whatever else lies beside them is nothing to us.

    Raises `NotFound` if there is no such place or no tables in it, `StorageError` if it cannot be
    reached.
    """
    files = place.sizes(FOLDER)
    sizes = {name: files[table_path(name)] for name in NAMES if table_path(name) in files}
    if not sizes:
        raise NotFound(
            f"{place.url} has no tables to query",
            hint="is it the place of a pool? poolreg push publishes one with its tables",
        )
    return Published(place, sizes)


def query_published(found: Published, sql: str, **options: Any) -> Table:
    """Run a user's SQL over published tables, sandboxed; options as in `run_sandboxed`.

    Tables that are not there are empty, views that are not there are made of the tables. Raises
    `QueryError`; `Refused` and `UnknownFormat` for a file that is not a table of ours.
    """
    files = _Files(found)
    try:
        return query_parquet(files, sql, **options)
    except QueryError:
        if files.failure is not None:  # DuckDB has made a text of it
            raise files.failure from None
        raise


class _Files(AbstractFileSystem):  # type: ignore[misc]
    """The files as DuckDB sees them; see `sandbox.ParquetFiles`."""

    protocol = "published"
    cachable = False

    def __init__(self, found: Published) -> None:
        super().__init__()
        self.names = [name for name in NAMES if name in found.sizes]
        self.failure: PoolregError | None = None
        self._found = found
        self._empty: dict[str, bytes] = {}
        self._columns: dict[str, set[Any]] = {}
        self._ends: dict[str, bytes] = {}
        self._real = False

    def stand_in(self, shapes: Mapping[str, pa.Schema] | None) -> None:
        for name, schema in (shapes or {}).items():
            sink = io.BytesIO()
            pq.write_table(schema.empty_table(), sink, store_schema=False)
            self._empty[name] = sink.getvalue()
            self._columns[name] = _columns(pq.read_metadata(sink))
        self._real = shapes is None

    def glob(self, path: str, **_: Any) -> list[str]:
        return [path]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        name = _name(path)
        size = self._found.sizes[name] if self._real else len(self._empty[name])
        return {"name": path, "size": size, "type": "file"}

    def modified(self, _: str) -> datetime:
        # By this DuckDB tells whether what it has read before is still good.
        return datetime(2000, 1, 2 if self._real else 1)

    def _open(self, path: str, mode: str = "rb", **_: Any) -> io.RawIOBase | io.BytesIO:
        name = _name(path)
        if mode != "rb":
            raise PermissionError("published tables are only read")
        if not self._real:
            return io.BytesIO(self._empty[name])
        with self._noting():
            if name not in self._ends:
                self._ends[name] = self._checked_end(name)
        return _Ranges(self._found.sizes[name], lambda start, end: self._read(name, start, end))

    def _read(self, name: str, start: int, end: int) -> bytes:
        kept = self._ends[name]
        begins = self._found.sizes[name] - len(kept)
        if start >= begins:
            return kept[start - begins : end - begins]
        with self._noting():
            return self._fetch(name, start, end)

    def _fetch(self, name: str, start: int, end: int) -> bytes:
        data = self._found.place.read(table_path(name), start, end)
        if len(data) != end - start:  # DuckDB would write past its buffer
            raise Refused(
                f"reading {table_path(name)} of {self._found.place.url} gave {len(data):,} bytes "
                f"in place of {end - start:,}",
                hint="it has changed meanwhile, or the place cannot give parts of files; try again",
            )
        return data

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except PoolregError as error:
            self.failure = error
            raise

    def _checked_end(self, name: str) -> bytes:
        """Return the end of a file, or all of it, if it is the table that it should be."""
        size = self._found.sizes[name]
        end = self._fetch(name, max(0, size - _END), size)
        needed = int.from_bytes(end[-8:-4], "little") + 8
        if len(end) < needed <= min(size, _FOOTER_LIMIT):
            end = self._fetch(name, size - needed, size)
        url = self._found.place.url
        where = f"{table_path(name)} of {url}"
        way_out = f"pull the pool and query it there: poolreg pull {url}"
        try:
            metadata = pq.read_metadata(io.BytesIO(end))
            wrong = self._columns[name] - _columns(metadata)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise Refused(f"{where} is not a Parquet file: {error}", hint=way_out) from error
        version = (metadata.metadata or {}).get(VERSION_KEY)
        if version != str(SCHEMA_VERSION).encode():
            raise UnknownFormat(
                f"{where} has version {(version or b'none').decode(errors='replace')} of the "
                f"tables; this poolreg reads version {SCHEMA_VERSION}",
                hint=f"{way_out} (any version can be pulled)",
            )
        if wrong:
            column, kind, *_ = min(wrong)
            raise Refused(f"{where} has no column {column} of type {kind}", hint=way_out)
        return end


def _columns(metadata: pq.FileMetaData) -> set[Any]:
    """Return what each column is on the disk."""
    columns = (metadata.schema.column(number) for number in range(metadata.num_columns))
    return {(c.path, c.physical_type, str(c.logical_type), c.max_repetition_level) for c in columns}


def _name(path: str) -> str:
    return path.removeprefix("published://").removesuffix(".parquet")


class _Ranges(io.RawIOBase):
    """A file of which ranges are read."""

    def __init__(self, size: int, fetch: Callable[[int, int], bytes]) -> None:
        self._size, self._fetch, self._place = size, fetch, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        self._place = max(0, start + offset)
        return self._place

    def read(self, size: int | None = -1) -> bytes:
        end = self._size if size is None or size < 0 else min(self._size, self._place + size)
        if end <= self._place:
            return b""
        data = self._fetch(self._place, end)
        self._place += len(data)
        return data
