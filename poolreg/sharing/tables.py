"""Tables of a published pool, written as Parquet.

The catalog's tables and the views that people look for, one file each, so that any reader of
Parquet can look into a pool; `published.py` queries them where they lie.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from poolreg.errors import StorageError
from poolreg.files import storage_errors
from poolreg.schema import script
from poolreg.store.catalog import Catalog
from poolreg.store.indexing import SCHEMA_VERSION

FOLDER = "tables"
VIEWS = ("scores", "task_results", "proxy_pairs", "variant_list", "lineage", "model_labels")
# What is true of one catalog or one machine only.
_PRIVATE = {"catalog_info", "journal_segments", "partition_files", "transfers", "laps"}
_TABLES = re.findall(r"^CREATE TABLE (\w+)", script("tables.sql"), re.MULTILINE)
NAMES = (*(name for name in _TABLES if name not in _PRIVATE), *VIEWS)
VERSION_KEY = b"poolreg.schema_version"  # in each file's metadata

_GROUP = 1 << 15  # rows; what a query need not read is left out by groups
_DERIVED = "check the disk and its free space; catalog.duckdb may be deleted, it is made again"


def table_path(name: str) -> str:
    """Return where a table lies."""
    return f"{FOLDER}/{name}.parquet"


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
        writer.add_key_value_metadata({VERSION_KEY: str(SCHEMA_VERSION)})
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
