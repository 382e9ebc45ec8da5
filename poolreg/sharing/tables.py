"""Tables of a published pool: written as Parquet, and queried where they lie.

`export_tables` writes the catalog's tables and the views that people look for, one file each,
so that any reader of Parquet can look into a pool. `sql_remote` runs the SQL of `poolreg sql`
over such files without fetching the pool: of each file that a query needs its end is read, then
only the columns and row groups that the query asks for.

Files come from strangers. One that was written for another version of the catalog, or whose
columns are not the catalog's, is refused before DuckDB sees it; DuckDB's memory limit and the
sandbox hold for the rest. The exported views are read as they were written, as the tables are.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from poolreg.errors import (
    MissingPackage,
    NotFound,
    PoolregError,
    QueryError,
    Refused,
    StorageError,
    UnknownFormat,
    UsageError,
)
from poolreg.files import storage_errors
from poolreg.schema import script
from poolreg.sharing.hub import HubPlace, hub_errors
from poolreg.sharing.trees import plain_errors
from poolreg.store.catalog import SCHEMA_VERSION, Catalog
from poolreg.store.sandbox import Table, query_parquet

FOLDER = "tables"
VIEWS = ("scores", "task_results", "proxy_pairs", "variant_list", "lineage", "model_labels")
# What is true of one catalog or one machine only.
_PRIVATE = {"catalog_info", "journal_segments", "partition_files", "transfers"}
_TABLES = re.findall(r"^CREATE TABLE (\w+)", script("tables.sql"), re.MULTILINE)
NAMES = (*(name for name in _TABLES if name not in _PRIVATE), *VIEWS)

_VERSION = b"poolreg.schema_version"
_GROUP = 1 << 15  # rows; what a query need not read is left out by groups
_END = 1 << 16  # bytes read at once from a file's end; a file that is not larger is read whole
_FOOTER_LIMIT = 1 << 24
_DERIVED = "check the disk and its free space; catalog.duckdb may be deleted, it is made again"


# -- writing ---------------------------------------------------------------------------------


def export_tables(catalog: Catalog, folder: Path) -> list[Path]:
    """Write the tables and main views that have rows to `folder/NAME.parquet`, all of one moment.

    Equal content gives equal bytes as long as one version of pyarrow writes them. Memory is
    bounded by a row group and by what the catalog takes for sorting.
    """
    catalog.refresh()
    paths = {name: folder / f"{name}.parquet" for name in NAMES}
    try:
        with storage_errors("writing the tables"):
            folder.mkdir(parents=True, exist_ok=True)
            rows = catalog.batches(NAMES, _GROUP)
            return [paths[name] for name, stream in rows if _write(paths[name], stream)]
    except pa.ArrowException as error:
        raise StorageError(f"writing the tables: {error}", hint=_DERIVED) from error


def _write(path: Path, stream: pa.RecordBatchReader) -> bool:
    """Write a file unless there are no rows."""
    with pq.ParquetWriter(path, stream.schema, compression="zstd", store_schema=False) as writer:
        writer.add_key_value_metadata({_VERSION: str(SCHEMA_VERSION)})
        for group in _groups(stream):
            writer.write_table(group, row_group_size=_GROUP)
    empty = pq.read_metadata(path).num_rows == 0
    if empty:
        path.unlink()
    return not empty


def _groups(stream: pa.RecordBatchReader) -> Iterator[pa.Table]:
    """Yield the rows of a stream in pieces whose sizes do not depend on its batches."""
    waiting = stream.schema.empty_table()
    for batch in stream:
        waiting = pa.concat_tables([waiting, pa.Table.from_batches([batch])])
        while waiting.num_rows >= _GROUP:
            yield waiting.slice(0, _GROUP).combine_chunks()
            waiting = waiting.slice(_GROUP)
    if waiting.num_rows:
        yield waiting.combine_chunks()


# -- finding them ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """The tables of a published pool: their sizes in bytes by name, and how to read them.

    `read(name, start, end)` returns these bytes of a table's file and may be called by several
    threads at once; it raises errors of `poolreg.errors` only.
    """

    url: str
    sizes: Mapping[str, int]
    read: Callable[[str, int, int], bytes]


def remote_tables(
    place: str, *, revision: str | None = None, repo_type: str = "model"
) -> Published:  # fmt: skip
    """Find the tables of a pool on the Hub (`OWNER/NAME`, read at one commit) or at an fsspec URL.

    Raises `NotFound` if there is no such place or no tables in it, `StorageError` if it cannot be
    reached.
    """
    if "://" not in place:
        found = _on_the_hub(HubPlace(place, repo_type=repo_type, revision=revision))
    elif revision is not None or repo_type != "model":
        raise UsageError(
            f"{place} is no repository of the Hub",
            hint="revisions and dataset repositories are the Hub's only",
        )
    else:
        found = _on_a_file_system(place)
    if not found.sizes:
        raise NotFound(
            f"{found.url} has no tables to query",
            hint="is it the place of a pool? poolreg push publishes one with its tables",
        )
    return found


def _on_the_hub(place: HubPlace) -> Published:
    # Not HfFileSystem: it first asks for the list of all files of the repository.
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

    repo, kind, api = place.url, place.repo_type, place.api
    with hub_errors(repo):
        info = api.repo_info(repo, revision=place.revision, repo_type=kind, expand="sha")
        commit = str(info.sha)
        try:
            listed = list(api.list_repo_tree(repo, FOLDER, revision=commit, repo_type=kind))
        except EntryNotFoundError:
            listed = []

    def read(name: str, start: int, end: int) -> bytes:
        path = f"{FOLDER}/{name}.parquet"
        headers = build_hf_headers(token=api.token, library_name="poolreg")
        with hub_errors(repo):
            url = hf_hub_url(repo, path, repo_type=kind, revision=commit, endpoint=api.endpoint)
            headers["range"] = f"bytes={start}-{end - 1}"
            answer = http_backoff("GET", url, headers=headers, follow_redirects=True)
            hf_raise_for_status(answer)
            return bytes(answer.content)

    return Published(
        repo, _sizes((file.path, getattr(file, "size", None)) for file in listed), read
    )


def _on_a_file_system(url: str) -> Published:
    shown = re.sub(r"//[^/]*@", "//", url)  # a password must not get into messages
    try:
        with plain_errors(shown):
            system, root = url_to_fs(url, skip_instance_cache=True)
    except ImportError as error:
        raise MissingPackage(f"{shown} needs a package", hint=str(error)) from error
    folder = f"{root.rstrip('/')}/{FOLDER}"
    with plain_errors(shown):
        try:
            listed = system.ls(folder, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            listed = []

    def read(name: str, start: int, end: int) -> bytes:
        with plain_errors(f"{name}.parquet of {shown}"):
            return bytes(system.cat_file(f"{folder}/{name}.parquet", start=start, end=end))

    return Published(shown, _sizes((file["name"], file.get("size")) for file in listed), read)


def _sizes(listed: Iterable[tuple[str, int | None]]) -> dict[str, int]:
    """Return the tables in a listing; whatever else lies there is nothing to us."""
    files = {path.rpartition("/")[2]: size for path, size in listed}
    sizes = {name: files.get(f"{name}.parquet") for name in NAMES}
    return {name: size for name, size in sizes.items() if size is not None}


# -- querying --------------------------------------------------------------------------------


def sql_remote(
    place: str, sql: str, parameters: Sequence[Any] = (), *, seconds: float = 60.0,
    revision: str | None = None, repo_type: str = "model",
) -> Table:  # fmt: skip
    """Run SQL over the tables of a published pool without pulling it; raises `QueryError`.

    `place` is a repository of the Hub, `you/pool`, read at one commit, or a URL that fsspec knows.
    """
    found = remote_tables(place, revision=revision, repo_type=repo_type)
    return query_published(found, sql, parameters=parameters, seconds=seconds)


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
        data = self._found.read(name, start, end)
        if len(data) != end - start:  # DuckDB would write past its buffer
            raise Refused(
                f"reading {FOLDER}/{name}.parquet of {self._found.url} gave {len(data):,} bytes "
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
        where = f"{FOLDER}/{name}.parquet of {self._found.url}"
        way_out = f"pull the pool and query it there: poolreg pull {self._found.url}"
        try:
            metadata = pq.read_metadata(io.BytesIO(end))
            wrong = self._columns[name] - _columns(metadata)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise Refused(f"{where} is not a Parquet file: {error}", hint=way_out) from error
        version = (metadata.metadata or {}).get(_VERSION)
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
