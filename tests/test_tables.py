"""Tables of published pools: how they are written, and SQL over them where they lie."""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import synthetic
from hub import Fault, Hub
from poolreg.schema import script, statements

from poolreg import Pool
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
from poolreg.sharing import published, tables
from poolreg.sharing.published import find_tables, query_published, sql_remote
from poolreg.sharing.tables import NAMES, VERSION_KEY, VIEWS, export_tables, table_path
from poolreg.sharing.where import place_at
from poolreg.store import sandbox

TABLES = re.findall(r"^CREATE TABLE (\w+)", script("tables.sql"), re.M)
ALL_VIEWS = re.findall(r"^CREATE VIEW (\w+)", script("views.sql"), re.M)


@pytest.fixture(scope="module")
def shared(referenced, tmp_path_factory) -> Any:
    """The referenced pool, open, and a folder where its tables are published."""
    base = tmp_path_factory.mktemp("shared")
    with Pool.open(referenced.copy(base / "pool")) as pool:
        export_tables(pool.registry.catalog, base / "there" / "tables")
        yield pool, base / "there"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in sorted((folder / "tables").iterdir())}


class Memory:
    """A place with tables that are held in memory, and a log of what is read of them."""

    url = "there"

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.log: list[tuple[str, int]] = []

    @property
    def found(self) -> published.Published:
        return published.Published(self, {name: len(data) for name, data in self.files.items()})

    def read(self, path: str, start: int, end: int) -> bytes:
        name = Path(path).stem
        assert path == table_path(name)
        self.log.append((name, end - start))
        return self.files[name][start:end]

    def sql(self, text: str, **options: Any) -> list[tuple[Any, ...]]:
        self.log.clear()
        return query_published(self.found, text, **options).rows

    @property
    def opened(self) -> set[str]:
        return {name for name, _ in self.log}


@pytest.fixture
def memory(shared) -> Memory:
    return Memory(contents(shared[1]))


def parquet(table: pa.Table, version: object = tables.SCHEMA_VERSION, **options: Any) -> bytes:
    """A file as poolreg would write it, of any columns."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, table.schema, store_schema=False, **options) as writer:
        writer.write_table(table)
        if version is not None:
            writer.add_key_value_metadata({VERSION_KEY: str(version)})
    return sink.getvalue()


# -- writing --------------------------------------------------------------------------------


def test_only_what_is_true_of_one_machine_is_kept_back():
    private = {"catalog_info", "journal_segments", "laps", "partition_files", "transfers"}
    assert set(TABLES) - set(NAMES) == private
    assert set(NAMES) - set(TABLES) == set(VIEWS) <= set(ALL_VIEWS)


def test_files_hold_the_rows_and_no_path_of_this_machine(shared, referenced):
    pool, there = shared
    written = contents(there)
    for name in NAMES:
        (count,) = pool.sql(f"SELECT count(*) FROM {name}").rows[0]
        assert count == (pq.read_metadata(io.BytesIO(written[name])).num_rows if name in written else 0)  # fmt: skip
    assert {"evaluations", "scores", "proxy_pairs"} <= written.keys()
    assert "task_results" not in written  # nothing stands in it
    texts = str(referenced.texts).encode()
    assert pool.sql("SELECT count(*) FROM partition_files").rows == [(4,)]
    for data in written.values():
        assert texts not in str(pq.read_table(io.BytesIO(data)).to_pylist()).encode()


def test_equal_content_gives_equal_bytes(shared, tmp_path):
    pool, there = shared
    export_tables(pool.registry.catalog, tmp_path / "tables")
    assert contents(tmp_path) == contents(there)
    # The same records in another order of segments: rows come in other places.
    other = tmp_path / "other"
    shutil.copytree(pool.root, other)
    (other / "catalog.duckdb").unlink()
    lines = [
        line for p in (other / "journal").iterdir() for line in p.read_bytes().splitlines(True)
    ]
    for path in (other / "journal").iterdir():
        path.unlink()
    for number, line in enumerate(reversed(lines)):
        with (other / "journal" / f"{number % 3}.jsonl").open("ab") as file:
            file.write(line)
    with Pool.open(other) as again:
        assert again.sql("SELECT subject FROM evaluations").rows != pool.sql("SELECT subject FROM evaluations").rows  # fmt: skip
        export_tables(again.registry.catalog, tmp_path / "again" / "tables")
    assert contents(tmp_path / "again") == contents(there)


def test_many_rows_are_cut_into_groups_of_one_size(tmp_path, monkeypatch):
    registry = synthetic.synthetic_pool(
        tmp_path / "pool", list("abcde"), [f"e{n}" for n in range(99)]
    )
    monkeypatch.setattr(tables, "_GROUP", 1000)
    export_tables(registry.catalog, tmp_path / "tables")
    read = pq.ParquetFile(tmp_path / "tables" / "evaluations.parquet")
    sizes = [read.metadata.row_group(n).num_rows for n in range(read.num_row_groups)]
    assert sizes == [1000, 1000, 1000, 32 * 99 - 3000]
    found = find_tables(place_at(f"file://{tmp_path}"))
    assert query_published(found, "SELECT count(*), sum(tokens) FROM evaluations").rows == [
        (32 * 99, 32 * 99 * synthetic.TOKENS)
    ]
    registry.close()


def test_errors_while_writing(shared, tmp_path, monkeypatch):
    pool, _ = shared
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="writing the tables"):
        export_tables(pool.registry.catalog, tmp_path / "file")

    def broken(*_: object, **__: object) -> None:
        raise pa.ArrowInvalid("no")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", broken)
    with pytest.raises(StorageError, match="writing the tables: no"):
        export_tables(pool.registry.catalog, tmp_path / "tables")


# -- the same answers as in the pool ----------------------------------------------------------


def close(value: Any) -> Any:
    """Drop the last digits: sums of floats depend on the order of rows."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, dict):
        return {key: close(item) for key, item in value.items()}
    return sorted(map(close, value), key=repr) if isinstance(value, list) else value


QUERIES = {name: query.sql for name, query in statements("queries.sql").items()}


@pytest.mark.parametrize("without", [(), VIEWS], ids=["with", "without"])
def test_every_table_view_and_query_gives_the_same_rows(shared, without):
    pool, there = shared
    memory = Memory({k: v for k, v in contents(there).items() if k not in without})
    asked = {name: f"FROM {name}" for name in (*NAMES, *ALL_VIEWS)}
    asked |= {f"query_{name}": text.rstrip(";") for name, text in QUERIES.items()}
    # All at once: the schema is made anew for every query.
    sql = "SELECT " + ", ".join(
        f"(SELECT list(t) FROM ({q}) AS t) AS {n}" for n, q in asked.items()
    )
    (here,), (remote,) = pool.sql(sql).dicts(), query_published(memory.found, sql).dicts()
    for name in asked:
        assert close(remote[name]) == close(here[name]), name
    assert sum(map(bool, here.values())) > 20
    table, same = pool.sql("FROM scores"), query_published(memory.found, "FROM scores")
    assert same.columns == table.columns


def test_an_unpublished_table_is_empty_with_its_columns(shared, memory):
    pool, _ = shared
    for name in ("partition_files", "variants"):
        assert memory.sql(f"FROM {name}") == []
        assert memory.sql(f"DESCRIBE {name}") == pool.sql(f"DESCRIBE {name}").rows
    assert memory.sql("SELECT sum(tokens) FROM evaluations WHERE subject = ?", parameters=["x"]) == [(None,)]  # fmt: skip


@pytest.mark.parametrize(
    ("sql", "needed"),
    [
        ("SELECT 1", set()),
        ("FROM variants", set()),
        ("SHOW TABLES", set()),
        ("SELECT label FROM scores WHERE evalset = 'wiki'", {"scores"}),
        ("SELECT count(*) FROM query_table('evaluations')", {"evaluations"}),
        ("FROM tokenizers", {"models"}),
        ("FROM measures", {"scores", "mixtures", "model_labels"}),
        (QUERIES["leaderboard"], {"scores"}),
        (QUERIES["ledger"], {"runs", "mixtures", "evaluations", "models"}),
    ],
)
def test_only_what_a_query_needs_is_opened(memory, sql, needed):
    memory.sql(sql)
    assert memory.opened == needed


def test_of_a_large_table_only_columns_and_row_groups_are_read(tmp_path):
    random = hashlib.shake_256(b"x").digest(32 * 40_000).hex()
    rows = {
        "subject": [f"{n // 4000:064}" for n in range(40_000)],
        "nll": [n / 7 for n in range(40_000)],
        "document_scores": [random[64 * n : 64 * n + 64] for n in range(40_000)],
    }
    shape = query_published(Memory({}).found, "DESCRIBE evaluations").rows
    types = {"VARCHAR": pa.string(), "DOUBLE": pa.float64(), "BIGINT": pa.int64(), "TIMESTAMP": pa.timestamp("us")}  # fmt: skip
    whole = pa.table({n: pa.array(rows.get(n, [None] * 40_000), types[t]) for n, t, *_ in shape})
    memory = Memory({"evaluations": parquet(whole, write_batch_size=1000, data_page_size=4000)})
    size = len(memory.files["evaluations"])
    assert size > 1_300_000
    total = memory.sql("SELECT sum(nll) FROM evaluations")[0][0]
    assert math.isclose(total, sum(rows["nll"]))
    assert sum(count for _, count in memory.log) < 0.4 * size
    memory.sql("SELECT count(*) FROM evaluations")
    assert [count for _, count in memory.log] == [published._END]
    # One column is used twice and read once.
    memory.sql("SELECT sum(a.nll * b.nll) FROM evaluations a JOIN evaluations b ON a.nll = b.nll")
    assert sum(count for _, count in memory.log) < 0.4 * size


# -- the sandbox --------------------------------------------------------------------------------

REFUSED = [
    "COPY scores TO '{base}/out.csv'",
    "COPY (SELECT 1) TO 'published://scores.parquet'",
    "ATTACH '{base}/new.duckdb'",
    "INSTALL httpfs",
    "SET enable_external_access = true",
    "SET allowed_paths = ['{base}/f.csv']",
    "CREATE TABLE t (a INTEGER)",
    "DROP VIEW scores",
    "SELECT * FROM read_text('{base}/f.csv')",
    "SELECT * FROM read_csv('{base}/f.csv')",
    "SELECT * FROM read_parquet('{base}/f.parquet')",
    "SELECT * FROM '{base}/f.parquet'",
    "SELECT * FROM glob('{base}/*')",
    "SELECT * FROM glob('published://*')",
    "SELECT * FROM read_blob('published://../f.csv')",
    "SELECT * FROM read_parquet('published://objects.parquet/../x.parquet')",
    "SELECT * FROM read_text('file://{base}/f.csv')",
    "SELECT * FROM read_text('memory://f.csv')",
    "SELECT * FROM arrow_here",
    "SELECT * FROM nothing",
    "",
    "\ud800",
]


@pytest.mark.parametrize("sql", REFUSED, ids=range(len(REFUSED)))
def test_what_the_sandbox_refuses(shared, tmp_path, monkeypatch, sql):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f.csv").write_text("a,b\n1,2\n")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "f.parquet")
    for where in (sandbox, published, sys.modules[__name__]):
        monkeypatch.setattr(where, "arrow_here", pa.table({"a": [1, 2, 3]}), raising=False)
    before = sorted(tmp_path.rglob("*"))
    few = Memory({"scores": contents(shared[1])["scores"]})
    with pytest.raises(QueryError):
        few.sql(sql.replace("{base}", str(tmp_path)))
    assert sorted(tmp_path.rglob("*")) == before


def test_time_and_memory_are_bounded(memory):
    with pytest.raises(QueryError, match=r"longer than 0\.3 seconds"):
        memory.sql("SELECT count(*) FROM range(1000000) a, range(1000000) b WHERE (a.range * b.range) % 7 = 3", seconds=0.3)  # fmt: skip
    with pytest.raises(QueryError, match="Memory"):
        memory.sql("SELECT list(md5(range::VARCHAR)) FROM range(3000000)", memory="40MB")


# -- files of strangers -------------------------------------------------------------------------


def names_table(**changed: Any) -> pa.Table:
    columns: dict[str, Any] = dict.fromkeys(["record", "space", "name", "target", "parent"])
    made = {name: pa.array([name], pa.string()) for name in columns}
    made |= {"added": pa.array([0], pa.timestamp("us")), "current": pa.array([True])}
    return pa.table({k: v for k, v in (made | changed).items() if v is not None})


def test_a_file_of_ours_is_taken_and_more_columns_are_not_shown():
    assert Memory({"names": parquet(names_table())}).sql("SELECT name FROM names") == [("name",)]
    more = Memory({"names": parquet(names_table(more=pa.array([1])))})
    assert len(more.sql("FROM names")[0]) == 7


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        (b"", Refused, "not a Parquet file"),
        (b"junk", Refused, "not a Parquet file"),
        (b"PAR1" + b"\xff" * 100_000, Refused, "not a Parquet file"),
        (b"x" * 300_000 + b"\xff\xff\xff\x7fPAR1", Refused, "not a Parquet file"),
        (parquet(names_table())[:-300], Refused, "not a Parquet file"),
        (parquet(names_table(name=None)), Refused, "no column name of type BYTE_ARRAY"),
        (parquet(names_table(name=pa.array([1]))), Refused, "no column name of type BYTE_ARRAY"),
        (parquet(names_table(name=pa.array([b"\xff"]))), Refused, "no column name of type BYTE"),
        (parquet(names_table(name=pa.array([["a"]]))), Refused, "no column name of type BYTE"),
        (parquet(names_table(name=pa.array([{"a": "b"}]))), Refused, "no column name of type"),
        (parquet(names_table(current=pa.array(["yes"]))), Refused, "no column current"),
        (parquet(names_table(added=pa.array([0], pa.timestamp("ns")))), Refused, "no column added"),
        (parquet(names_table(), version=None), UnknownFormat, "version none"),
        (parquet(names_table(), version=3), UnknownFormat, "version 3"),
        (parquet(names_table(), version=99), UnknownFormat, "poolreg pull there"),
    ],
    ids=range(15),
)
def test_a_file_that_is_not_ours_is_refused(data, error, match):
    with pytest.raises(error, match=match) as caught:
        Memory({"names": data}).sql("FROM names")
    assert "tables/names.parquet of there" in caught.value.message
    assert caught.value.hint


def test_damage_behind_a_good_end_is_a_query_error(memory):
    data = bytearray(memory.files["evaluations"])
    data[4:2000] = b"\xff" * 1996
    memory.files["evaluations"] = bytes(data)
    with pytest.raises(QueryError) as caught:
        memory.sql("FROM evaluations")
    assert "Stack Trace" not in caught.value.message
    # A bomb: as long as its columns are right it may unpack to much, and is stopped then.
    much = names_table(name=pa.array(["x" * (1 << 26)]))
    bomb = Memory({"names": parquet(much, compression="zstd", use_dictionary=False)})
    assert len(bomb.files["names"]) < 1 << 17
    assert bomb.sql("SELECT length(max(name)) FROM names") == [(1 << 26,)]
    with pytest.raises(QueryError, match="Memory"):
        bomb.sql("SELECT max(name) FROM names", memory="40MB")


def test_shorter_files_than_were_listed_and_errors_while_reading(memory):
    class Broken(Memory):
        def read(self, *_: object) -> bytes:
            raise StorageError("the cable is out", hint="put it in")

    with pytest.raises(StorageError, match="cable"):
        Broken(memory.files).sql("FROM scores")
    sizes = {name: size + 9 for name, size in memory.found.sizes.items()}
    with pytest.raises(Refused, match="in place of"):
        query_published(replace(memory.found, sizes=sizes), "FROM scores")


def test_a_place_that_gives_more_than_was_asked_for(memory, monkeypatch):
    monkeypatch.setattr(published, "_END", 4000)

    class Generous(Memory):
        def read(self, path: str, start: int, end: int) -> bytes:
            data = self.files[Path(path).stem]
            return data[start:end] if end == len(data) else b"x" * (1 << 20)

    with pytest.raises(Refused, match="in place of"):
        Generous(memory.files).sql("FROM evaluations")


# -- places ---------------------------------------------------------------------------------


def test_places_on_file_systems(shared, memory):
    _, there = shared
    count = [(len(pq.read_table(there / "tables" / "scores.parquet")),)]
    sql = "SELECT count(*) FROM scores"
    for place in (f"file://{there}", f"file://{there}/"):
        assert sql_remote(place, sql).rows == count
    store = fsspec.filesystem("memory")
    try:
        for name, data in memory.files.items():
            store.pipe_file(f"/a/pool/tables/{name}.parquet", data)
        store.pipe_file("/a/pool/tables/evil.parquet", b"x")
        assert sql_remote("memory://a/pool", sql).rows == count
    finally:
        store.rm("/a", recursive=True)


@pytest.mark.parametrize(
    ("place", "options", "error"),
    [
        ("memory://nothing/here", {}, NotFound),
        ("file:///nothing/here", {}, NotFound),
        ("s4://bucket/x", {}, UsageError),
        ("file:///x", {"revision": "main"}, UsageError),
        ("/data/pool", {}, UsageError),
    ],
)
def test_places_that_are_none(place, options, error):
    with pytest.raises(error) as caught:
        sql_remote(place, "FROM scores", **options)
    assert caught.value.hint


def test_a_file_system_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "adlfs", None)
    with pytest.raises(MissingPackage, match="abfs://"):
        sql_remote("abfs://x/y", "FROM scores")


# -- the Hub ----------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path) -> Any:
    with Hub(tmp_path / "hub") as running:
        yield running


def publish(hub: Hub, files: dict[str, bytes], **more: Any) -> str:
    return hub.commit_files(
        "you/pool", {f"tables/{n}.parquet": d for n, d in files.items()}, **more
    )


def test_a_repository_is_read_at_one_commit(hub, memory, monkeypatch):
    hub.adopt(monkeypatch)
    first = publish(hub, memory.files)
    found = find_tables(place_at("you/pool"))
    sql = "SELECT count(*) FROM names"
    before = query_published(found, sql).rows
    publish(hub, {"names": parquet(names_table())}, message="meanwhile")
    assert query_published(found, sql).rows == before != [(1,)]
    assert sql_remote("you/pool", sql).rows == [(1,)]
    assert sql_remote("you/pool", sql, revision=first).rows == before
    publish(hub, memory.files, repo_type="dataset")
    assert sql_remote("you/pool", sql, repo_type="dataset").rows == before


def test_what_can_be_wrong_with_a_repository(hub, memory, monkeypatch):
    hub.adopt(monkeypatch)
    hub.commit_files("you/model", {"config.json": b"{}"})
    publish(hub, memory.files)
    for place, options, match in (
        ("you/nothing", {}, "no repository you/nothing"), ("you/model", {}, "no tables"),
        ("you/pool", {"revision": "v9"}, "revision"),
    ):  # fmt: skip
        with pytest.raises(NotFound, match=match) as caught:
            sql_remote(place, "FROM scores", **options)
        assert caught.value.hint
    hub.fail(Fault("resolve", "status", status=403, times=None))
    with pytest.raises(PoolregError, match="you/pool") as caught:
        sql_remote("you/pool", "FROM scores")
    assert caught.value.hint


def cli(hub: Hub, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from importlib.metadata import entry_points; sys.argv[0] = 'poolreg'; list(entry_points(group='console_scripts', name='poolreg'))[0].load()()"
    environment = {k: v for k, v in os.environ.items() if k != "POOLREG_POOL"} | hub.environment()
    return subprocess.run(
        [sys.executable, "-c", code, *words], cwd=folder, env=environment, text=True,
        capture_output=True, timeout=120,
    )  # fmt: skip


def test_the_command_line_reads_little_and_needs_no_pool(hub, shared, memory, tmp_path):
    pool, _ = shared
    publish(hub, memory.files)
    hub.clear()
    asked = "SELECT label FROM scores WHERE evalset = 'prose' ORDER BY perplexity LIMIT 1"
    done = cli(hub, tmp_path, "sql", "--remote", "you/pool", asked, "--format", "quiet")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == pool.sql(asked).rows[0][0] + "\n"
    reads = [r for r in hub.requests if "/resolve/" in r.path]
    assert [r.path.rpartition("/")[2] for r in reads] == ["scores.parquet"]
    assert len(hub.requests) == 3
    assert sum(r.sent for r in hub.requests) < 0.3 * sum(map(len, memory.files.values()))


def test_command_lines(cli_run, shared, tmp_path):
    pool, there = shared
    done = cli_run("query", "best", "--remote", f"file://{there}", "--format", "csv")
    assert done.stdout == cli_run("query", "best", "--pool", pool.root, "--format", "csv").stdout
    assert "nope" in cli_run("query", "nope", "--remote", f"file://{there}", code=1).stderr
    for words in (
        ("--remote", f"file://{there}", "--pool", pool.root), ("--revision", "main"),
        ("--repo-type", "dataset", "--pool", pool.root),
        ("--remote", f"file://{there}", "--revision", "main"),
    ):  # fmt: skip
        cli_run("sql", "FROM scores", *words, code=2)
    cli_run("--pool", pool.root, "sql", "FROM scores", "--remote", f"file://{there}", code=2)
