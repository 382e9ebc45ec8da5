"""What a catalog of a million evaluations costs: indexing, look-ups, named queries and views.

    python tests/benchmarks/catalog.py [--evaluations 1000000] [--pairs 3] [--keep DIR]

writes two pools, one with evaluations alone and one as a sweep over all unions of 17 partitions
leaves it (with 125,000 mixtures and averages of 8 models each). Each figure stands beside a floor
measured in turn with it: reading the journal with its checksums, parsing it, DuckDB's own bulk
load of the same rows from Arrow, a copy of the catalog's file, a scan of the column of keys, a
join of evaluations and mixtures.
Figures are medians of seconds on the clock; on a busy machine compare them with the floor.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import duckdb
from many import EVALSETS, add_evaluations, digest, evaluation, write_sweep
from poolreg.schema import statements

from poolreg.store.registry import Registry

INDEX = """
import re, sys, time
from pathlib import Path
from poolreg.store.registry import Registry
import pyarrow, msgspec
registry = Registry.open(Path(sys.argv[1]))
began = time.perf_counter()
registry.catalog.refresh()
seconds = time.perf_counter() - began
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
print(seconds, peak)
"""


def indexed(root: Path, *, from_scratch: bool = False) -> tuple[float, float]:
    """Bring the catalog up to date in a process of its own; return its seconds and peak MB."""
    if from_scratch:
        (root / "catalog.duckdb").unlink(missing_ok=True)
    command = [sys.executable, "-c", INDEX, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, peak = map(float, done.stdout.split())
    return seconds, peak


def spent(call: Callable[[], Any]) -> float:
    """Return the seconds that a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def pairs(count: int, ours: Callable[[], float], *floors: Callable[[], float]) -> list[float]:
    """Measure ours and its floors in turn, so often; return the medians."""
    rounds = [[measure() for measure in (ours, *floors)] for _ in range(count)]
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def row(what: str, ours: float, goal: str, *floors: tuple[str, float]) -> None:
    """Print a row of the table."""
    beside = "; ".join(f"{name} {seconds:.3g} s" for name, seconds in floors)
    print(f"| {what} | {ours:.3g} s | {goal} | {beside} |", flush=True)


# -- floors ----------------------------------------------------------------------------------


def checked(root: Path) -> None:
    """Read the journal and compute the checksum of each line."""
    for path in (root / "journal").iterdir():
        with open(path, "rb", 1 << 20) as file:
            for line in file:
                zlib.crc32(line[9:-1])


def parsed(root: Path) -> None:
    """Read the journal with the standard library's JSON."""
    for path in (root / "journal").iterdir():
        with open(path, "rb", 1 << 20) as file:
            for line in file:
                json.loads(line[9:-1])


def bulk_load(root: Path, scratch: Path) -> Callable[[], float]:
    """Return what loads the rows of the catalog's tables into a new database, without keys."""
    with duckdb.connect(root / "catalog.duckdb", read_only=True) as source:
        names = source.execute("SELECT table_name FROM duckdb_tables()").fetchall()
        tables = {name: source.table(name).to_arrow_table() for (name,) in names}

    def load() -> float:
        target = scratch / "floor.duckdb"
        target.unlink(missing_ok=True)
        began = time.perf_counter()
        with duckdb.connect(target) as connection:
            for name, table in tables.items():
                connection.register("rows_of_it", table)
                connection.execute(f'CREATE TABLE "{name}" AS FROM rows_of_it')
            connection.execute("CHECKPOINT")
        return time.perf_counter() - began

    return load


def copied(root: Path, scratch: Path) -> None:
    """Copy the catalog's file and flush the copy."""
    target = scratch / "copy.duckdb"
    target.write_bytes((root / "catalog.duckdb").read_bytes())
    with open(target, "rb") as file:
        os.fsync(file.fileno())
    target.unlink()


# -- figures ---------------------------------------------------------------------------------


def more(root: Path, count: int) -> None:
    """Write a segment of so many new evaluations."""
    start = time.time_ns()
    with open(root / "journal" / f"2-more-{start}.jsonl", "wb") as journal:
        for number in range(start, start + count):
            made = evaluation(
                number, subject=digest("s"), evalset=digest("e"), protocol=digest("p"), nll=1.0
            )
            journal.write(made.line())


def index_all(what: str, root: Path, scratch: Path, given: argparse.Namespace, goal: str) -> None:
    """Measure indexing from scratch."""
    _, peak = indexed(root, from_scratch=True)
    load = bulk_load(root, scratch)
    ours, read, parse, loaded = pairs(
        given.pairs,
        lambda: indexed(root, from_scratch=True)[0],
        lambda: spent(lambda: checked(root)),
        lambda: spent(lambda: parsed(root)),
        load,
    )
    row(f"index {what} ({peak:,.0f} MB at most)", ours, goal, ("reading with checksums", read),
        ("json.loads alone", parse), ("DuckDB's bulk load", loaded))  # fmt: skip


def index_more(root: Path, scratch: Path, given: argparse.Namespace) -> None:
    """Measure indexing little, and finding that there is nothing."""

    def grown(count: int) -> Callable[[], float]:
        def measure() -> float:
            more(root, count)
            return indexed(root)[0]

        return measure

    size = (root / "catalog.duckdb").stat().st_size / 1e6
    for count, goal in ((1000, "0.5 s"), (1, "")):
        ours, copy = pairs(2 * given.pairs + 1, grown(count), lambda: spent(
            lambda: copied(root, scratch)))  # fmt: skip
        row(f"index {count:,} more", ours, goal, (f"copy and flush of {size:,.0f} MB", copy))
    (ours,) = pairs(2 * given.pairs + 1, lambda: indexed(root)[0])
    row("nothing new", ours, "")


def look_up(root: Path, given: argparse.Namespace) -> None:
    """Measure the memo: 10⁴ keys, and one, among all."""
    keys = [digest(str(number * given.evaluations // 10_000)) for number in range(10_000)]
    registry = Registry.open(root)
    registry.catalog.refresh()
    scan = "SELECT max(digest) FROM evaluations"
    with duckdb.connect(root / "catalog.duckdb", read_only=True) as reader:
        for asked, goal in ((keys, "0.2 s"), (keys[:1], "")):
            ours, floor = pairs(
                3 * given.pairs,
                lambda asked=asked: spent(lambda: registry.catalog.select(
                    "evaluations", digests=asked)),
                lambda: spent(lambda: reader.execute(scan).fetchall()),
            )  # fmt: skip
            row(f"look up {len(asked):,} keys", ours, goal, ("scan of the keys", floor))
    registry.close()


def queries(root: Path, given: argparse.Namespace) -> None:
    """Measure each named query, and each view to its last row."""
    registry = Registry.open(root)
    catalog = registry.catalog
    catalog.refresh()
    listed = "SELECT view_name FROM duckdb_views() WHERE database_name = 'pool' AND NOT internal"
    views = [name for (name,) in catalog.sandbox(listed).rows]
    asked: Mapping[str, str] = {
        **{f"query {name}": s.sql for name, s in statements("queries.sql").items()},
        **{f"view {name}": f"SELECT count(COLUMNS(*)) FROM {name}" for name in views},
    }
    join = "SELECT sum(nll) FROM evaluations JOIN mixtures USING (subject)"
    for name, sql in asked.items():
        ours, floor = pairs(
            given.pairs,
            lambda sql=sql: spent(lambda: catalog.sandbox(sql)),
            lambda: spent(lambda: catalog.sandbox(join)),
        )
        row(name, ours, "1 s", ("a join", floor))
    registry.close()


def main() -> None:
    """Make the pools and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--evaluations", type=int, default=1_000_000)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="make the pools here, or take those that are")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        plain, sweep = ((given.keep or scratch) / name for name in ("plain", "sweep"))
        if not plain.exists():
            Registry.create(plain).close()
            add_evaluations(
                plain, given.evaluations, 200, evalset=digest(EVALSETS[0]),
                protocol=digest("protocol"), objects=False,
            )  # fmt: skip
        if not sweep.exists():
            write_sweep(sweep, given.evaluations, 200)
        print("| what | ours | goal | floor |\n|---|---:|---:|---|")
        index_all(f"{given.evaluations:,} evaluations", plain, scratch, given, "15 s")
        index_all("them with their mixtures", sweep, scratch, given, "")
        index_more(plain, scratch, given)
        look_up(plain, given)
        queries(sweep, given)


if __name__ == "__main__":
    main()
