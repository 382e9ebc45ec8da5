"""What `poolreg sql` can do to a pool, its files and its process: read the catalog, nothing else."""

import dataclasses
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from poolreg.canonical import sha256
from poolreg.errors import QueryError
from poolreg.store import records, sandbox
from poolreg.store.registry import Registry


@pytest.fixture(scope="session")
def playground(tmp_path_factory):
    """A pool, a folder with files to be read, and an own home folder."""
    base = tmp_path_factory.mktemp("playground")
    (base / "home").mkdir()
    (base / "f.csv").write_text("a,b\n1,2\n")
    with duckdb.connect(base / "o.duckdb") as other:
        other.execute("CREATE TABLE secret AS SELECT 42 AS answer")
    registry = Registry.create(base / "pool")
    registry.record(records.name("model", "a", sha256(b"a")))
    registry.catalog.refresh()
    registry.close()
    return registry


def files_of(folder: Path) -> dict[Path, bytes | None]:
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


FORBIDDEN = [
    # what writes, or hides what writes
    "COPY names TO '{base}/out.csv'",
    "COPY (SELECT 1) TO '{base}/out.parquet'",
    "COPY (SELECT 1) TO '{pool}'",
    "COPY (SELECT 1) TO '{pool}' (FORMAT csv, USE_TMP_FILE false)",
    "COPY (SELECT 1) TO '{pool}.wal' (FORMAT csv)",
    "EXPLAIN ANALYZE COPY (SELECT 1) TO '{pool}.wal' (FORMAT csv)",
    "EXPLAIN /* */ ANALYZE COPY (SELECT 1) TO '{pool}.wal' (FORMAT csv)",
    "explain -- x\n analyze copy (SELECT 1) TO '{pool}.wal' (FORMAT csv)",
    "EXPLAIN (ANALYZE) COPY (SELECT 1) TO '{pool}.wal' (FORMAT csv)",
    "SELECT 1; COPY (SELECT 1) TO '{pool}.wal' (FORMAT csv)",
    "COPY (PIVOT names ON space USING count(*)) TO '{pool}.wal' (FORMAT csv)",
    "PREPARE p AS COPY (SELECT 1) TO '{pool}.wal' (FORMAT csv); EXECUTE p",
    "COPY FROM DATABASE pool TO memory",
    "EXPORT DATABASE '{base}/out'",
    "IMPORT DATABASE '{base}/out'",
    "CREATE TABLE t (a INTEGER)",
    "CREATE TABLE pool.main.t AS SELECT 1",
    "CREATE TABLE memory.main.t AS SELECT 1",
    "CREATE TEMP TABLE t AS SELECT 1",
    "CREATE VIEW v AS SELECT 1",
    "CREATE MACRO f(x) AS x",
    "CREATE PERSISTENT SECRET s (TYPE s3)",
    "INSERT INTO names (name) VALUES ('x')",
    "WITH t AS (INSERT INTO names (name) VALUES ('x') RETURNING name) SELECT * FROM t",
    "UPDATE names SET name = 'x'",
    "DELETE FROM names",
    "TRUNCATE names",
    "DROP TABLE names",
    "ALTER TABLE names ADD COLUMN x INTEGER",
    "COMMENT ON TABLE names IS 'x'",
    "CHECKPOINT",
    "FORCE CHECKPOINT",
    "VACUUM",
    "ANALYZE",
    "BEGIN",
    "COPY names FROM '{base}/f.csv'",
    "COPY (SELECT 1) TO '/dev/stdout'",
    "EXPLAIN ANALYZE/**/COPY (SELECT 1) TO '{pool}.wal'",
    "EXPLAIN EXPLAIN ANALYZE COPY (SELECT 1) TO '{pool}.wal' (FORMAT csv)",
    "EXPLAIN SELECT 1; EXPLAIN ANALYZE COPY (SELECT 1) TO '{pool}.wal' (FORMAT csv)",
    "EXPLAIN ANALYZE SELECT 1; COPY (SELECT 1) TO '{pool}.wal' (FORMAT csv)",
    "EXPLAIN ANALYZE INSERT INTO names (name) VALUES ('x')",
    "EXPLAIN ANALYZE CREATE TABLE t (a INTEGER)",
    "SELECT $$;$$; COPY (SELECT 1) TO '{pool}.wal' (FORMAT csv)",
    "SELECT ';'; ; COPY (SELECT 1) TO '{pool}.wal' (FORMAT csv)",
    "SELECT 1 /* ; */; COPY (SELECT 1) TO '{pool}.wal' (FORMAT csv)",
    "SELECT 1 -- ;\n; COPY (SELECT 1) TO '{pool}.wal' (FORMAT csv)",
    "SELECT * FROM query('COPY (SELECT 1) TO ''{base}/x''')",
    "SELECT * FROM query('SELECT 1; COPY (SELECT 1) TO ''{base}/x''')",
    "SELECT * INTO t FROM names",
    "MERGE INTO names USING names n ON true WHEN MATCHED THEN DELETE",
    "CREATE SCHEMA s",
    "CREATE SEQUENCE s",
    "CREATE TYPE t AS ENUM ('a')",
    "CREATE OR REPLACE VIEW scores AS SELECT 1",
    "DROP VIEW scores",
    "DROP SCHEMA main",
    "COMMIT",
    "ROLLBACK",
    # other databases
    "ATTACH '{base}/o.duckdb'",
    "ATTACH '{base}/new.duckdb' AS n",
    "ATTACH '{base}/o.duckdb' (READ_ONLY)",
    "ATTACH ':memory:' AS m",
    "USE memory",
    "USE memory; DETACH pool; ATTACH '{pool}' AS p; CREATE TABLE p.t (a INTEGER)",
    "DETACH pool",
    "ATTACH '' AS t",
    "ATTACH '{pool}' AS x (READ_ONLY)",
    "USE pool",
    "DETACH memory",
    # what reads files, lists them or fetches them
    "SELECT * FROM read_text('{base}/f.csv')",
    "SELECT * FROM read_blob('{base}/f.csv')",
    "SELECT * FROM read_csv('{base}/f.csv')",
    "SELECT * FROM read_json('{base}/f.csv')",
    "SELECT * FROM read_parquet('{base}/f.csv')",
    "SELECT * FROM sniff_csv('{base}/f.csv')",
    "SELECT * FROM read_duckdb('{base}/o.duckdb', table_name='secret')",
    "SELECT * FROM glob('{base}/*')",
    "SELECT * FROM '{base}/f.csv'",
    "SELECT * FROM query('FROM read_text(''{base}/f.csv'')')",
    "SELECT * FROM read_text('https://example.org/')",
    "SELECT * FROM read_csv_auto('{base}/f.csv')",
    "SELECT * FROM read_csv(['{base}/f.csv'])",
    "SELECT * FROM read_json_auto('{base}/f.csv')",
    "SELECT * FROM read_ndjson_objects('{base}/f.csv')",
    "SELECT * FROM read_json_objects('{base}/f.csv')",
    "SELECT * FROM parquet_scan('{base}/f.csv')",
    "SELECT * FROM parquet_metadata('{base}/f.csv')",
    "SELECT * FROM parquet_schema('{base}/f.csv')",
    "SELECT * FROM parquet_kv_metadata('{base}/f.csv')",
    "SELECT * FROM parquet_file_metadata('{base}/f.csv')",
    "SELECT * FROM read_text('/proc/self/environ')",
    "SELECT * FROM read_csv('/dev/stdin')",
    "SELECT * FROM read_text('../f.csv')",
    "SELECT * FROM read_text('{base}/pool/../f.csv')",
    "SELECT * FROM read_text('{pool}/../FORMAT')",
    "SELECT * FROM read_text('file://{base}/f.csv')",
    "SELECT * FROM read_parquet('s3://bucket/x.parquet')",
    "SELECT * FROM 'f.csv'",
    'FROM "f.csv"',
    "FROM '*.csv'",
    "FROM '{base}/o.duckdb'",
    "DESCRIBE '{base}/f.csv'",
    "SUMMARIZE '{base}/f.csv'",
    "DESCRIBE SELECT * FROM read_csv('{base}/f.csv')",
    "PIVOT '{base}/f.csv' ON a IN (1) USING count(*)",
    "WITH t AS (FROM '{base}/f.csv') FROM t",
    "SELECT (SELECT a FROM '{base}/f.csv')",
    "SELECT * FROM query_table('{base}/f.csv')",
    "SELECT * FROM query_table(['{base}/f.csv'])",
    "SELECT * FROM json_execute_serialized_sql(json_serialize_sql('FROM read_text(''{base}/f.csv'')'))",
    "SELECT * FROM glob('{pool}*')",
    "SELECT * FROM glob('/*')",
    "SELECT * FROM sql_auto_complete('SELECT * FROM ''{base}/')",
    "SELECT * FROM duckdb_secrets()",
    "SELECT * FROM which_secret('s3://a', 's3')",
    # settings, extensions, logs
    "INSTALL httpfs",
    "FORCE INSTALL httpfs FROM 'https://example.org'",
    "LOAD httpfs",
    "LOAD '{base}/x.duckdb_extension'",
    "SET threads = 1",
    "SET GLOBAL enable_external_access = true",
    "RESET enable_external_access",
    "SET lock_configuration = false",
    "SET VARIABLE a = 1",
    "PRAGMA profiling_output = '{base}/p.json'",
    "PRAGMA enable_profiling = 'json'",
    "CALL enable_logging('QueryLog', storage = 'file', storage_path = '{base}/logs')",
    "SELECT * FROM enable_logging('QueryLog', storage = 'file', storage_path = '{base}/logs')",
    "SELECT * FROM force_checkpoint('pool')",
    "SET memory_limit = '90GB'",
    "SET max_expression_depth = 100000",
    "SET temp_directory = '{base}'",
    "SET allowed_paths = ['{base}/f.csv']",
    "SET search_path = 'memory'",
    "RESET lock_configuration",
    "RESET memory_limit",
    "PRAGMA memory_limit = '90GB'",
    "PRAGMA database_list",
    "PRAGMA enable_object_cache",
    "PRAGMA threads = 8",
    "CALL pragma_version()",
    "UPDATE EXTENSIONS",
    "SELECT * FROM enable_logging()",
    "SELECT * FROM enable_logging(storage = 'stdout')",
    "SELECT * FROM disable_logging()",
    "SELECT * FROM enable_profiling(save_location = '{base}/p.json')",
    # prepared statements
    "EXECUTE p",
    "DEALLOCATE p",
    "PREPARE p AS SELECT 1",
    # Python variables, memory, the environment
    "SELECT * FROM arrow_here",
    "SELECT getenv('HOME')",
    "FROM playground",
    "SELECT * FROM sandbox.arrow_here",
    "SELECT * FROM query_table('arrow_here')",
    "SELECT * FROM pandas_scan(1)",
    "SELECT * FROM arrow_scan('1'::POINTER, '2'::POINTER, '3'::POINTER)",
    "SELECT * FROM python_map_function((SELECT 1), 1)",
    # what is no query at all
    "",
    "   ",
    ";",
    "-- nothing",
    "SELEC 1",
    "SELECT * FROM nothing",
    "SELECT 1/0 FROM nothing",
    "SELECT 'x'::INTEGER",
    "SELECT ?",
    "SELECT $x",
    "SELECT '\0'",
    "\ud800",
    "SELECT " + "(" * 100_000 + "1" + ")" * 100_000,
    "SELECT " + "NOT " * 20_000 + "true",
    "SELECT " + "[" * 20_000 + "]" * 20_000,
]


def filled(playground: Registry, sql: str) -> str:
    base, pool = str(playground.root.parent), str(playground.catalog.path)
    return sql.replace("{base}", base).replace("{pool}", pool)


@pytest.fixture
def here(playground, monkeypatch) -> Path:
    """The folder with the files, as the current one; variables lie where DuckDB would look."""
    base = playground.root.parent
    monkeypatch.chdir(base)
    monkeypatch.setenv("HOME", str(base / "home"))
    monkeypatch.setattr(sandbox, "arrow_here", pa.table({"a": [1, 2, 3]}), raising=False)
    return base


@pytest.mark.parametrize("sql", FORBIDDEN, ids=range(len(FORBIDDEN)))
def test_what_the_sandbox_refuses(playground, here, sql):
    before = files_of(here)
    with pytest.raises(QueryError) as caught:
        playground.catalog.sandbox(filled(playground, sql))
    assert caught.value.exit_code == 1
    assert files_of(here) == before


HARMLESS = {
    # It is the catalog itself, which the query sees anyway.
    "SELECT size > 0 FROM read_blob('{pool}')": [(True,)],
    "SELECT name FROM read_duckdb('{pool}', table_name = 'names')": [("a",)],
    "SELECT file FROM glob('{pool}')": [("{pool}",)],
    "SELECT * FROM read_text('{pool}.wal')": [],  # there is none
    # It runs a query, which is bound and checked as any other.
    "SELECT * FROM query('SELECT 42')": [(42,)],
    "SELECT name FROM query_table('names')": [("a",)],
    "SELECT * FROM json_execute_serialized_sql(json_serialize_sql('SELECT 42'))": [(42,)],
    "SELECT json_serialize_sql('COPY (SELECT 1) TO ''x''')->>'error'": [("true",)],
    # The database is read-only, and nothing is logged.
    "SELECT * FROM checkpoint()": [],
    "SELECT * FROM checkpoint('pool')": [],
    "SELECT write_log('x', level := 'error')": [(None,)],
    "SELECT write_log('x'); SELECT count(*) FROM duckdb_logs()": [(0,)],
    "SELECT * FROM truncate_duckdb_logs()": [],
    # It lasts no longer than the connection, which is of this one query.
    "SELECT setseed(0.5)": [(None,)],
    "SELECT getvariable('x')": [(None,)],
    # A comment in a comment goes on to its end.
    "SELECT 1 /* /* */ ; COPY (SELECT 1) TO '{pool}.wal' (FORMAT csv) -- */": [(1,)],
    "SELECT 'COPY (SELECT 1) TO x; ' AS \"; ATTACH x\"": [("COPY (SELECT 1) TO x; ",)],
    # What it tells is the version's, or of the settings that hold.
    "SELECT current_setting('home_directory')": [("",)],
    "SELECT current_setting('enable_external_access')": [(False,)],
    "SELECT * FROM duckdb_temporary_files()": [],
    "SELECT database_name FROM duckdb_databases() WHERE NOT internal AND NOT readonly": [
        ("memory",)
    ],
    # Regular expressions take time in proportion to the text.
    "SELECT regexp_matches(repeat('a', 100000), '(a+)+$b')": [(False,)],
}


@pytest.mark.parametrize("sql", HARMLESS, ids=range(len(HARMLESS)))
def test_what_looks_worse_than_it_is(playground, here, sql):
    before = files_of(here)
    pool = str(playground.catalog.path)
    expected = [tuple(pool if item == "{pool}" else item for item in row) for row in HARMLESS[sql]]
    assert playground.catalog.sandbox(filled(playground, sql)).rows == expected
    assert files_of(here) == before
    assert playground.names("model") == {"a": sha256(b"a")}


@pytest.mark.parametrize("table", ["names", "models", "evaluations", "journal_segments"])
def test_nothing_can_be_written_where_reading_is_allowed(playground, here, table):
    """Even without the check of statements the catalog would stay as it is."""
    before = files_of(here)
    with sandbox.read_only(playground.catalog.path) as connection:
        for verb in (f"DELETE FROM {table}", f"DROP TABLE {table}", "CREATE TABLE x (a INTEGER)"):
            with pytest.raises(duckdb.Error, match="read-only"):
                connection.execute(verb)
    assert files_of(here) == before


@pytest.mark.parametrize(
    ("sql", "count"),
    [
        ("SELECT 1", 1), ("FROM names", 1), ("TABLE names", 1), ("VALUES (1), (2)", 2),
        ("WITH x AS (SELECT 1 AS a) SELECT a FROM x UNION ALL SELECT 2", 2), ("(SELECT 1)", 1),
        ("DESCRIBE names", 7), ("SUMMARIZE names", 7), ("SHOW TABLES", None),
        ("EXPLAIN SELECT 1", 1), ("EXPLAIN ANALYZE FROM names", 1), ("explain analyze select 1", 1),
        ("SELECT 1; SELECT 2 UNION ALL SELECT 3;", 2), ("-- first\nSELECT 1", 1),
        ("PIVOT names ON space IN ('model') USING count(*)", None),
        ("SELECT name FROM names WHERE name = 'a'", 1),
        ("SELECT perplexity(1.0, 1), bits_per_byte(1.0, 1), loss(1.0, 1)", 1),
    ],
)  # fmt: skip
def test_what_it_allows(playground, sql, count):
    rows = playground.catalog.sandbox(sql).rows
    assert rows
    assert count is None or len(rows) == count


def test_parameters(playground):
    table = playground.catalog.sandbox("SELECT ? AS x, ? AS y", parameters=["'; DROP", None])
    assert table.dicts() == [{"x": "'; DROP", "y": None}]
    for parameters in ([], [1, 2, 3], [object(), 1]):
        with pytest.raises(QueryError):
            playground.catalog.sandbox("SELECT ?, ?", parameters=parameters)


@pytest.mark.parametrize(
    "sql",
    [
        "WITH RECURSIVE t(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM t) SELECT count(*) FROM t",
        "SELECT count(*) FROM range(1000000) a, range(1000000) b WHERE (a.range * b.range) % 7 = 3",
        "SELECT * FROM range(1000000000000)",
    ],
)
def test_an_endless_query_is_stopped(playground, sql):
    with pytest.raises(QueryError, match=r"longer than 0\.3 seconds"):
        playground.catalog.sandbox(sql, seconds=0.3)
    assert playground.catalog.sandbox("SELECT 1").rows == [(1,)]


def test_a_query_that_needs_much_memory_is_refused_and_spills_nothing(playground, here):
    before = files_of(here)
    sql = "SELECT list(md5(range::VARCHAR)) FROM range(3000000)"
    with pytest.raises(QueryError, match="Memory"):
        playground.catalog.sandbox(sql, memory="40MB")
    assert files_of(here) == before
    place = playground.catalog.sandbox("SELECT current_setting('temp_directory')").rows
    assert place == [("",)]


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT repeat('x', 100000) FROM range(10000)",
        "SELECT range(1000) FROM range(100000)",
        "SELECT {'a': [repeat('x', 100000)]} FROM range(10000)",
        "SELECT histogram(range) FROM range(3000000)",
        "SELECT * FROM range(3000000) a ORDER BY md5(a.range::VARCHAR)",
        "SELECT repeat('x', 10000000000)",
    ],
)
def test_results_and_bombs_are_bounded(playground, here, sql):
    before = files_of(here)
    with pytest.raises(QueryError, match=r"Memory|of size"):
        playground.catalog.sandbox(sql, memory="40MB")
    assert files_of(here) == before


def test_a_result_within_bounds_comes_whole(playground):
    sql = "SELECT range, [range], repeat('x', 100) FROM range(1000)"
    rows = playground.catalog.sandbox(sql, memory="40MB").rows
    assert rows == [(n, [n], "x" * 100) for n in range(1000)]


def test_a_long_query_is_refused_before_it_is_read(playground):
    playground.catalog.sandbox("SELECT 1" + " " * (sandbox.MAX_SQL - 8))
    with pytest.raises(QueryError, match="longer than 100000 characters"):
        playground.catalog.sandbox("SELECT 1" + " " * (sandbox.MAX_SQL - 7))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.text(max_size=30) | st.lists(st.sampled_from(
    ["SELECT", "FROM", "names", "WHERE", "COPY", "TO", "'x'", "(", ")", "*", ",", ";", "EXPLAIN", "ANALYZE", "WITH", "a", "AS", "1", "?", "$1", "--", "PIVOT", "ON"]
), max_size=8).map(" ".join))  # fmt: skip
@example("EXPLAIN")
@example("EXPLAIN EXPLAIN SELECT 1")
def test_any_text_is_a_query_or_refused(playground, sql):
    try:
        table = playground.catalog.sandbox(sql, seconds=5)
    except QueryError:
        return
    assert dataclasses.is_dataclass(table)
