import binascii
import contextlib
import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path

import duckdb
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from many import MODEL, digest

from poolreg.canonical import canonical_json, digest_of
from poolreg.errors import Damage, StorageError, UnknownFormat
from poolreg.store import catalog, indexing, records
from poolreg.store.catalog import Catalog
from poolreg.store.journal import Journal, Record
from poolreg.store.registry import Registry


@pytest.fixture
def registry(tmp_path):
    with_pool = Registry.create(tmp_path / "pool")
    yield with_pool
    with_pool.close()


def at(second: int) -> str:
    return f"2024-01-{1 + second // 86400:02d}T{second // 3600 % 24:02d}:{second // 60 % 60:02d}:{second % 60:02d}.000000Z"


def tables(connection) -> dict[str, list]:
    """All rows of all tables but the one that says how far the journal was read."""
    rows = connection.execute("SELECT table_name FROM duckdb_tables()").fetchall()
    return {
        name: sorted(connection.execute(f"FROM {name}").fetchall(), key=repr)
        for (name,) in rows
        if name != "journal_segments"
    }


def published(registry: Registry) -> dict[str, list]:
    registry.catalog.refresh()
    with duckdb.connect(registry.root / "catalog.duckdb", read_only=True) as connection:
        return tables(connection)


# -- records of every kind ------------------------------------------------------------------

few = st.sampled_from([digest(letter) for letter in "abc"])
maybe = st.none() | few
number = st.integers(0, 2**40)
seconds = st.integers(0, 86399)
real = st.floats(0, 1e6)


def statement(kind: str, body: dict, second: int) -> Record:
    return Record(kind, digest_of([kind, body, second]), body, {}, at(second))


def unit_bodies(partition: str, count: int) -> list[dict]:
    return [
        {"digest": digest_of([partition, n]), "documents": n, "bytes": 10 * n} for n in range(count)
    ]


bodies = {
    "partition": st.builds(
        lambda key, content, n, u: (key, {
            "content": content, "documents": n, "bytes": n, "duplicates": 0,
            "units": unit_bodies(key, u),
        }), few, few, number, st.integers(1, 3),
    ),
    "evalset": st.builds(
        lambda key, o, c, n: (key, {"object": o, "content": c, "documents": n, "bytes": n}),
        few, few, few, number,
    ),
    "model": st.builds(
        lambda key, n, t, tensors: (key, {
            "model_type": "llama", "parameters": n, "bytes": n, "dtype": "F32", "tokenizer": t,
            "context_length": 16, "vocab_size": None, "trusted_code": False,
            "files": [{"role": "weights", "name": "w", "object": key, "bytes": n}],
            "tensors": [[f"t{i}", "F32", [i, 2], key] for i in range(tensors)],
        }), few, number, maybe, st.integers(0, 2),
    ),
    "run": st.builds(
        lambda key, m, s, r, n, u: (key, {
            "model": m, "role": r, "seed": s, "blend": s, "mixture": None, "scheme": None,
            "budget": None, "how": "trained", "tokens": n, "steps": n, "seconds": 0.5,
            "final_loss": None, "recipe": {"job": m, "é": [n]} if n % 2 else None,
            "units": [{"unit": u, "tokens": n, "epochs": 1.5}] * (n % 3),
        }), few, few, maybe, st.sampled_from(["seed", "unit", "reference"]), number, few,
    ),
    "recipe": st.builds(
        lambda key, m, n: (key, {"components": [[m, i + 1, n + 1] for i in range(n)]}),
        few, few, st.integers(1, 3),
    ),
    "mixture": st.builds(
        lambda key, p, n: (key, {
            "mixture": "a+b", "scheme": "micro", "seed": p, "subject": key, "blend": p, "size": n,
            "unit_tokens": None, "origin": "design", "weights": [[p, 0, 1, n]] * n,
        }), few, few, st.integers(1, 3),
    ),
    "protocol": st.builds(
        lambda key, t, n: (key, {
            "max_length": n, "dtype": "float32", "prefix": "bos", "tokenizer": t, "version": 1,
            "window": "rolling",
        }), few, few, st.integers(1, 99),
    ),
    "evaluation": st.builds(
        lambda key, s, e, p, x, n: (key, {
            "subject": s, "evalset": e, "protocol": p, "nll": x, "tokens": n, "bytes": n,
            "documents": 1, "seconds": x, "device": "cpu", "document_scores": None,
            "token_scores": s,
        }), few, few, few, few, real, number,
    ),
    "lap": st.builds(
        lambda key, s, e, p, x, n: (key, {
            "subject": s, "evalset": e, "protocol": p, "lap": n % 5, "nll": x, "tokens": n,
            "bytes": n, "documents": 1, "seconds": x, "device": "cpu", "document_scores": s,
        }), few, few, few, few, real, number,
    ),
    "calibration": st.builds(
        lambda key, s, t, p, n, x: (key, {
            "subject": s, "text": t, "text_kind": "evalset", "protocol": p, "token_limit": n,
            "tokens": n, "held_out_tokens": n // 8, "largest": 8, "condition": x, "windows": t,
            "layers": [s] * (n % 3), "seconds": 0.5,
        }), few, few, few, few, number, st.none() | real,
    ),
    "variant": st.builds(
        lambda key, m, p, c, n, parts: (key, {
            "model": m, "parent": p, "parent_label": "a+b", "method": "poolreg", "target": "full",
            "ratio": 0.25, "achieved": 0.26, "without": ["obs", "probe"][: n % 3], "epsilon": 0.1,
            "step": None if n % 2 else 4, "sequential": n % 5 == 0, "calibration": c,
            "block_parameters": n, "parent_block_parameters": 2 * n, "parent_parameters": 3 * n,
            "parent_bytes": n, "shared_bytes": 0, "logit_difference": 1e-7, "seconds": 0.5,
            "modules": [[i, "mlp", 8, 4, n, n // 2, None if n % 2 else 0.1, 0.2]
                        for i in range(parts)],
        }), few, few, few, few, number, st.integers(0, 2),
    ),
    "task_score": st.builds(
        lambda key, s, x, h, n: (key, {
            "subject": s, "harness": "lm-eval", "harness_version": "0.4.13", "task": "t",
            "metric": "acc", "filter": "none", "value": x, "stderr": None if n % 2 else x,
            "higher_is_better": [True, False, None][n % 3], "n_shot": n % 7, "samples": n,
            "sample_limit": None if n % 5 else 0.5, "task_hash": h, "task_version": "1",
            "measured": None if n % 3 else "2024-01-01T00:00:00.500000", "request": h,
        }), few, few, real, maybe, number,
    ),
    "build": st.builds(
        lambda key, m, s, d, n: (key, {
            "model": m, "subject": s, "dtype": d, "max_shard_bytes": n,
        }), few, few, few, st.sampled_from([None, "bfloat16"]), number,
    ),
    "contamination": st.builds(
        lambda key, e, p, n: (key, {"evalset": e, "partition": p, "documents": n}),
        few, few, few, number,
    ),
}  # fmt: skip
statements_made = {
    "name": st.builds(
        lambda s, n, t, p: {"space": s, "name": n, "target": t, "parent": p},
        st.sampled_from(["partition", "model", "evalset"]), st.sampled_from(["x", "y"]), few,
        st.sampled_from([None, "x"]),
    ),
    "transfer": st.builds(
        lambda d, r, v, n: {
            "direction": d, "place": "me/pool", "repo_type": "model", "revision": r, "version": v,
            "records": n, "objects": n, "bytes": n, "left": [digest("a")] * (n % 2),
        }, st.sampled_from(["push", "pull"]), st.sampled_from([None, "v1"]), maybe, number,
    ),
    "trust": st.builds(lambda m: {"model": m}, few),
    "removal": st.builds(
        lambda k, t, r: {"kind": k, "target": t, "removed": r},
        st.sampled_from(["partition", "model", "evalset"]), few, st.booleans(),
    ),
    "location": st.builds(
        lambda p, n, f: {"partition": p, "field": f, "files": [
            {"path": f"/x{i}", "bytes": n, "sha256": p, "documents": i} for i in range(1 + n % 3)
        ]}, few, number, st.sampled_from(["text", "body"]),
    ),
}  # fmt: skip
objects = st.dictionaries(few, st.just(77), max_size=2)
keyed = st.one_of(
    st.builds(lambda kind, made, o, second: Record(kind, *made, o, at(second)),
              st.just(kind), made, objects, seconds)
    for kind, made in bodies.items()
)  # fmt: skip
stated = st.one_of(
    st.builds(statement, st.just(kind), made, seconds) for kind, made in statements_made.items()
)
unknown = st.builds(
    lambda key, o, second: Record("hologram", key, {"new": 1}, o, at(second)), few, objects, seconds
)
any_record = keyed | stated | unknown


def without_ties(written: list[Record]) -> list[Record]:
    """Of records with one id and one time, take the first everywhere: writers never tie."""
    first: dict[tuple, Record] = {}
    return [first.setdefault((r.kind, r.id, r.at), r) for r in written]


def write(journal: Journal, segment: int, record: Record) -> None:
    with open(journal.folder / f"{segment}.jsonl", "ab") as file:
        file.write(record.line())


def empty_catalog(folder: Path) -> Catalog:
    for name in ("journal", "locks", "tmp"):
        (folder / name).mkdir()
    return Catalog(folder, Journal(folder / "journal"))


@pytest.mark.slow
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(any_record, max_size=25),
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["", "", "", "index"])), min_size=25),
    st.sampled_from([1, 2, 50_000]),
    st.sampled_from([1, 3, 50_000]),
)
def test_indexing_in_steps_equals_indexing_at_once(
    tmp_path_factory, written, steps, batch, other_batch
):
    catalog = empty_catalog(tmp_path_factory.mktemp("pool"))
    with duckdb.connect(":memory:") as in_steps, duckdb.connect(":memory:") as at_once:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(indexing, "_BATCH", batch)
            journal = catalog._journal

            def indexed(connection, *, from_scratch):
                sizes = journal.segments()
                indexing.index(connection, journal, sizes, from_scratch=from_scratch)

            indexed(in_steps, from_scratch=True)
            for record, (segment, step) in zip(without_ties(written), steps, strict=False):
                write(catalog._journal, segment, record)
                if step:
                    indexed(in_steps, from_scratch=False)
            indexed(in_steps, from_scratch=False)
            patch.setattr(indexing, "_BATCH", other_batch)
            indexed(at_once, from_scratch=True)
        assert tables(in_steps) == tables(at_once)


def test_the_strategies_make_records_of_every_kind():
    assert bodies.keys() | statements_made.keys() == records.KINDS.keys()


def test_the_earlier_of_two_records_counts(registry):
    def evaluation(second, nll, size):
        body = {
            "subject": "s", "evalset": "e", "protocol": "p", "nll": nll, "tokens": 1, "bytes": 1,
            "documents": 1, "seconds": 1.0, "device": "cpu", "document_scores": None,
            "token_scores": None,
        }  # fmt: skip
        return Record("evaluation", "key", body, {digest(f"{nll}"): size}, at(second))

    journal, found = registry.journal, []
    for segment, record in ((1, evaluation(50, 5.0, 5)), (0, evaluation(70, 7.0, 7)),
                            (2, evaluation(30, 3.0, 3)), (0, evaluation(30, 3.0, 3))):  # fmt: skip
        write(journal, segment, record)
        registry.catalog.refresh()
        found.append([r["nll"] for r in registry.catalog.select("evaluations", digests=["key"])])
    assert found == [[5.0], [5.0], [3.0], [3.0]]
    # What any of them names is named.
    named = {r["digest"]: (r["bytes"], r["kind"]) for r in registry.catalog.select("objects")}
    assert named == {digest(f"{n}.0"): (n, "evaluation") for n in (5, 7, 3)}


@pytest.mark.parametrize("order", ["earlier later", "later earlier", "earlier indexed later"])
def test_what_an_outdated_record_says_is_not_looked_at(registry, order):
    said = {
        "earlier": Record("evalset", "i", EVALSET, {}, at(1)),
        "later": Record("evalset", "i", {"bytes": "many"}, {}, at(2)),
    }
    for segment, word in enumerate(order.split()):
        if word == "indexed":
            registry.catalog.refresh()
        else:
            write(registry.journal, segment, said[word])
    registry.catalog.refresh()
    assert registry.catalog.sandbox("SELECT digest, bytes FROM evalsets").rows == [("i", 1)]


def test_objects_of_records_of_a_later_version_are_known(registry):
    registry.record(Record("hologram", "x", {"new": [1]}, {digest("a"): 3, digest("b"): 4}))
    registry.catalog.refresh()
    named = {r["digest"]: (r["bytes"], r["kind"]) for r in registry.catalog.select("objects")}
    assert named == {digest("a"): (3, "hologram"), digest("b"): (4, "hologram")}


def test_the_latest_name_place_and_removal_count_whichever_is_read_first(registry):
    a, b = digest("a"), digest("b")
    body = {"content": a, "documents": 1, "bytes": 1, "duplicates": 0, "units": unit_bodies(a, 1)}
    facts = {"bytes": 1, "sha256": a, "documents": 1}
    steps = [
        Record("partition", a, body, {}, at(0)),
        statement("name", {"space": "partition", "name": "x", "target": a, "parent": None}, 20),
        statement("name", {"space": "partition", "name": "x", "target": b, "parent": "p"}, 10),
        statement("removal", {"kind": "partition", "target": a, "removed": True}, 30),
        statement("removal", {"kind": "partition", "target": a, "removed": False}, 40),
        statement("removal", {"kind": "partition", "target": a, "removed": True}, 35),
        statement("location", {"partition": a, "field": "f", "files": [{"path": "2", **facts}]}, 9),
        statement("location", {"partition": a, "field": "g", "files": [{"path": "1", **facts}]}, 5),
    ]
    states = []
    for number, record in enumerate(steps):
        write(registry.journal, number, record)
        registry.catalog.refresh()
        names = [row["target"] for row in registry.catalog.select("names", space="partition")]
        (row,) = registry.catalog.select("partition", digest=a)
        places = [f["path"] for f in registry.catalog.select("partition_files", partition=a)]
        states.append((names, row["removed"], places))
    assert states == [
        ([], False, []), ([a], False, []), ([a], False, []), ([], True, []), ([a], False, []),
        ([a], False, []), ([a], False, ["2"]), ([a], False, ["2"]),
    ]  # fmt: skip


def test_rows_fit_their_tables(registry):
    registry.catalog.refresh()
    for main, *parts in records.KINDS.values():
        for table in (main, *parts):
            known = registry.catalog.sandbox(f"FROM {table.name} LIMIT 0").columns
            assert set(table.columns) <= set(known), table.name
            assert table is not main or table.columns[0] == known[0]


@pytest.mark.parametrize("damaged", [False, True])
def test_python_collects_garbage_after_indexing(registry, damaged):
    add_names(registry, "a")
    if damaged:
        (registry.journal.folder / "bad.jsonl").write_bytes(b"00000000 {}\n")
    with pytest.raises(Damage) if damaged else contextlib.nullcontext():
        registry.catalog.refresh()
    assert gc.isenabled()


def test_look_ups_are_remembered_while_nothing_is_new(registry, monkeypatch):
    asked = []
    fetched = catalog.fetch
    monkeypatch.setattr(catalog, "fetch", lambda *given: asked.append(1) or fetched(*given))
    add_names(registry, "a")
    for _ in range(3):
        (row,) = registry.select("names", space="model")
        assert row["name"] == "a"
        row["name"] = "spoilt"
    assert len(asked) == 1
    assert registry.select("names", space="evalset") == []
    add_names(registry, "b")
    assert [row["name"] for row in registry.select("names", space="model")] == ["a", "b"]
    assert len(asked) == 3
    for _ in range(2):  # long questions are not kept
        registry.select("evaluations", digests=["x"])
    assert len(asked) == 5


# -- the published file ---------------------------------------------------------------------


class Counted:
    """Counts how often the catalog is published, and how often from scratch."""

    def __init__(self, monkeypatch) -> None:
        self.total = self.scratch = 0
        publish = Catalog._publish

        def counted(catalog, change, *, copied):
            self.total += 1
            self.scratch += not copied
            publish(catalog, change, copied=copied)

        monkeypatch.setattr(Catalog, "_publish", counted)


def add_names(registry: Registry, *labels: str) -> None:
    registry.record(*(records.name("model", label, digest(label)) for label in labels))


def test_nothing_new_publishes_nothing(registry, monkeypatch):
    count = Counted(monkeypatch)
    for label in ("a", "b"):
        add_names(registry, label)
        for _ in range(3):
            assert label in registry.names("model")
    assert (count.total, count.scratch) == (2, 1)
    again = Registry.open(registry.root)
    assert set(again.names("model")) == {"a", "b"}
    assert count.total == 2
    again.close()


def test_a_torn_end_is_not_indexed_forever(registry, monkeypatch):
    count = Counted(monkeypatch)
    add_names(registry, "a")
    line = records.name("model", "b", digest("b")).line()
    segment = registry.journal.folder / "torn.jsonl"
    segment.write_bytes(line[:-5])
    for _ in range(5):
        assert set(registry.names("model")) == {"a"}
    assert (count.total, count.scratch) == (1, 1)
    segment.write_bytes(line)  # it was not torn, only slow
    for _ in range(5):
        assert set(registry.names("model")) == {"a", "b"}
    assert (count.total, count.scratch) == (2, 1)


@pytest.mark.parametrize("left", [1, 0])
def test_a_segment_that_has_lost_records_is_reported(registry, monkeypatch, left):
    add_names(registry, "a")
    lines = [records.name("model", label, digest(label)).line() for label in ("b", "c")]
    segment = registry.journal.folder / "other.jsonl"
    segment.write_bytes(b"".join(lines))
    assert set(registry.names("model")) == {"a", "b", "c"}
    if left:
        segment.write_bytes(lines[0])
    else:
        segment.unlink()
    before = registry.catalog.path.read_bytes()
    for opened in (registry, Registry.open(registry.root)):
        with pytest.raises(Damage, match=r"journal/other\.jsonl is") as caught:
            opened.names("model")
        assert "verify --repair" in caught.value.hint
        opened.close()
    assert registry.catalog.path.read_bytes() == before
    monkeypatch.setattr(indexing, "SCHEMA_VERSION", indexing.SCHEMA_VERSION + 1)
    with pytest.raises(Damage):  # nor does another version of the schema forget it
        registry.names("model")
    registry.catalog.rebuild()
    assert set(registry.names("model")) == ({"a", "b"} if left else {"a"})


def test_a_torn_tail_that_is_taken_back_is_no_loss(registry):
    add_names(registry, "a")
    line = records.name("model", "b", digest("b")).line()
    segment = registry.journal.folder / "other.jsonl"
    segment.write_bytes(line + line[:50])
    assert set(registry.names("model")) == {"a", "b"}
    segment.write_bytes(line)
    assert set(registry.names("model")) == {"a", "b"}


def test_a_catalog_equals_one_made_anew(registry):
    assert registry.catalog.differences() == {}
    add_names(registry, "a")
    registry.names("model")
    add_names(registry, "b")  # not indexed yet, which is no difference
    assert registry.catalog.differences() == {}
    registry.names("model")
    registry.close()
    with duckdb.connect(registry.catalog.path) as connection:
        connection.execute("UPDATE names SET name = 'z' WHERE name = 'a'")
        connection.execute("DELETE FROM names WHERE name = 'b'")
        connection.execute("DROP TABLE trusts")
    assert registry.catalog.differences() == {"names": (1, 2), "trusts": (0, 0)}
    assert not list((registry.root / "tmp").iterdir())
    data = registry.catalog.path.read_bytes()
    registry.catalog.path.unlink()
    registry.catalog.path.write_bytes(data[: len(data) // 2])
    with pytest.raises(Damage, match="cannot be read"):
        registry.catalog.differences()


@pytest.mark.parametrize("content", [None, b"", b"junk", b"\0" * 100_000])
def test_a_lost_or_foreign_file_is_made_again(registry, content):
    add_names(registry, "a")
    before = published(registry)
    registry.close()
    registry.catalog.path.unlink()
    if content is not None:
        registry.catalog.path.write_bytes(content)
    assert published(registry) == before


def test_a_database_of_somebody_else_is_replaced(registry):
    add_names(registry, "a")
    before = published(registry)
    registry.close()
    registry.catalog.path.unlink()
    with duckdb.connect(registry.catalog.path) as connection:
        connection.execute("CREATE TABLE catalog_info (schema_version VARCHAR)")
    assert published(registry) == before


def test_another_schema_version_is_made_again(registry, monkeypatch):
    add_names(registry, "a")
    before = published(registry)
    count = Counted(monkeypatch)
    for version in (indexing.SCHEMA_VERSION + 1, indexing.SCHEMA_VERSION):
        monkeypatch.setattr(indexing, "SCHEMA_VERSION", version)
        found = published(registry)
        assert found.pop("catalog_info") == [(version,)]
        assert found == {name: rows for name, rows in before.items() if name != "catalog_info"}
    assert count.scratch == 2


@pytest.mark.slow
@pytest.mark.parametrize("incremental", [False, True])
def test_a_damaged_file_is_made_again(registry, incremental):
    add_names(registry, *(f"model-{n}" for n in range(5_000)))
    expected = registry.names("model")
    assert len(expected) == 5_000
    registry.close()
    path = registry.catalog.path
    whole = path.read_bytes()
    blocks = range(0, len(whole), max(4096, len(whole) // 8))
    changes = [(place + 5000, None) for place in blocks] + [(0, 1000), (0, len(whole) // 2)]
    for number, (place, cut) in enumerate(changes):
        data = bytearray(whole[:cut])
        data[min(place, len(data) - 1)] ^= 0x55
        path.unlink()
        path.write_bytes(data)
        if incremental:
            add_names(registry, f"new-{number}")
            expected[f"new-{number}"] = digest(f"new-{number}")
        reopened = Registry.open(registry.root)
        assert reopened.names("model") == expected
        assert reopened.catalog.sandbox("SELECT count(*) FROM names").rows == [(len(expected),)]
        reopened.close()


def test_what_a_killed_process_left_is_not_built_upon(registry):
    add_names(registry, "a")
    before = published(registry)
    for incremental in (False, True):
        if not incremental:
            registry.close()
            registry.catalog.path.unlink()
        # Its pid may be ours: in a container process ids repeat.
        for name in ("catalog.tmp", "catalog.tmp.wal", f"catalog.{os.getpid()}.tmp.wal"):
            (registry.root / "tmp" / name).write_bytes(b"junk")
        assert published(registry) == before
        add_names(registry, "b")
        before = published(registry)
        assert not list((registry.root / "tmp").glob("catalog.tmp*"))


def test_damage_in_the_journal_leaves_the_catalog(registry):
    add_names(registry, "a")
    before = registry.catalog.path.read_bytes() if published(registry) else b""
    data = canonical_json({"v": 99})
    for line, error in ((b"00000000 {}\n", Damage),
                        (b"%08x %s\n" % (binascii.crc32(data), data), UnknownFormat)):  # fmt: skip
        (registry.journal.folder / "bad.jsonl").write_bytes(line)
        with pytest.raises(error):
            registry.names("model")
        assert registry.catalog.path.read_bytes() == before
        assert not list((registry.root / "tmp").iterdir())
    (registry.journal.folder / "bad.jsonl").unlink()
    assert set(registry.names("model")) == {"a"}


NAME = {"space": "model", "name": "x", "target": "t", "parent": None}
EVALSET = {"object": "o", "content": "c", "documents": 1, "bytes": 1}
PARTITION = {"content": "c", "documents": 1, "bytes": 1, "duplicates": 0, "units": []}
UNIT = {"digest": "same", "documents": 1, "bytes": 1}


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("name", {}),
        ("name", {**NAME, "name": 5}),
        ("name", {**NAME, "name": ["x"]}),
        ("name", {**NAME, "target": {"a": 1}}),
        ("evalset", {**EVALSET, "bytes": "many"}),
        ("evalset", {**EVALSET, "bytes": 2**70}),
        ("evalset", {**EVALSET, "bytes": 1.5}),
        ("evalset", {**EVALSET, "documents": [1]}),
        ("partition", {**PARTITION, "units": 3}),
        ("partition", {**PARTITION, "units": [None]}),
        ("partition", {**PARTITION, "units": [UNIT, UNIT]}),
        ("model", {**MODEL, "tensors": [["a", "F32"]]}),
        ("model", {**MODEL, "tensors": [["a", "F32", "shape", "x"]]}),
        ("model", {**MODEL, "tensors": [["a", "F32", ["b"], "x"]]}),
        ("model", {**MODEL, "tensors": {"a": 1}}),
        ("model", {**MODEL, "trusted_code": "no"}),
        ("model", {**MODEL, "context_length": 2**40}),
        ("recipe", {"components": [["m", 1, 0]]}),
        ("recipe", {"components": [["m", "1", "2"]]}),
        ("recipe", {"components": [["m", 10**400, 1]]}),
        ("removal", {"kind": "model", "target": "t", "removed": "yes"}),
    ],
)
def test_fields_of_the_wrong_type_are_damage(registry, kind, body):
    registry.record(Record(kind, "id", body, {}))
    with pytest.raises(Damage) as caught:
        registry.catalog.refresh()
    assert caught.value.exit_code == 3
    assert caught.value.hint


@pytest.mark.parametrize("when", ["", "yesterday", "2024-13-01T00:00:00.000000Z", "\ud800"])
def test_a_time_that_is_none_is_damage(registry, when):
    fields = {"v": 1, "kind": "name", "id": "i", "at": when, "body": NAME, "objects": {}}
    data = module_json(fields)
    segment = registry.journal.folder / "x.jsonl"
    segment.write_bytes(b"%08x %s\n" % (binascii.crc32(data), data))
    with pytest.raises(Damage):
        registry.catalog.refresh()


def module_json(value) -> bytes:
    """JSON of somebody else, who escapes what is not ASCII."""
    import json

    return json.dumps(value).encode()


def test_a_size_that_is_none_is_damage(registry):
    registry.record(Record("evalset", "i", EVALSET, {"ab": "big"}))
    with pytest.raises(Damage):
        registry.catalog.refresh()


def test_a_full_disk_is_a_storage_error(registry, monkeypatch):
    add_names(registry, "a")
    before = published(registry)
    registry.close()
    add_names(registry, "b")

    def full(*_, **__):
        raise duckdb.IOException("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(indexing, "index", full)
        with pytest.raises(StorageError, match="No space left"):
            registry.catalog.refresh()
    assert not list((registry.root / "tmp").iterdir())
    with duckdb.connect(registry.catalog.path, read_only=True) as connection:
        assert tables(connection) == before
    assert set(registry.names("model")) == {"a", "b"}


def test_one_database_for_all_writes_and_look_ups(registry, monkeypatch):
    """To make a DuckDB instance takes longer than to index a record; indexing limits its memory."""
    made = []
    connect = catalog.connect
    monkeypatch.setattr(catalog, "connect", lambda place: made.append(place) or connect(place))
    limits = set()
    for label in "abc":
        registry.record(records.name("evalset", label, digest(label)))
        assert label in registry.names("evalset")
        limit = "SELECT current_setting('memory_limit')"
        limits.add(registry.catalog._reader().execute(limit).fetchone())
    assert made == [":memory:"]
    assert "512" not in str(limits)
    assert "488" not in str(limits)  # as DuckDB prints 512 MB


# -- several readers and writers ------------------------------------------------------------


def test_two_registries_of_one_process_see_each_other(registry):
    other = Registry.open(registry.root)
    for number in range(4):
        writer, reader = (registry, other) if number % 2 else (other, registry)
        add_names(writer, f"n{number}")
        assert len(writer.names("model")) == number + 1
        assert len(reader.names("model")) == number + 1
        assert reader.catalog.sandbox("SELECT count(*) FROM names").rows == [(number + 1,)]
    other.close()


def test_a_reader_opened_after_a_replacement_sees_it(registry, tmp_path):
    add_names(registry, "a")
    assert set(registry.names("model")) == {"a"}  # and keeps its connection open
    copy = tmp_path / "copy"
    shutil.copytree(registry.root, copy)
    other = Registry.open(copy)
    add_names(other, "b")
    other.catalog.refresh()
    other.close()
    Path(copy / "catalog.duckdb").replace(registry.catalog.path)
    late = Catalog(registry.root, registry.journal)
    assert len(late.select("names", space="model")) == 2
    late.close()


def test_a_forked_child_reads_and_writes(registry):
    add_names(registry, "a")
    assert set(registry.names("model")) == {"a"}
    child = os.fork()
    if child == 0:
        code = 1
        try:
            add_names(registry, "b")
            code = 0 if set(registry.names("model")) == {"a", "b"} else 2
            registry.close()
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert set(registry.names("model")) == {"a", "b"}


WRITER = """
import sys
from pathlib import Path
from poolreg.store import records, sandbox
from poolreg.store.registry import Registry
registry = Registry.open(Path(sys.argv[1]))
for number in range(int(sys.argv[3])):
    registry.record(records.name("model", f"{sys.argv[2]}-{number}", "0" * 64))
    assert f"{sys.argv[2]}-{number}" in registry.names("model")
registry.close()
"""


@pytest.mark.slow
def test_processes_that_refresh_at_once_and_a_reader(registry):
    registry.catalog.refresh()
    command = [sys.executable, "-c", WRITER, str(registry.root)]
    writers = [subprocess.Popen([*command, label, "12"]) for label in "ab"]
    seen = [0]
    while any(writer.poll() is None for writer in writers):
        reader = Catalog(registry.root, registry.journal)  # only reads, whatever is going on
        seen.append(len(reader.select("names", space="model")))
        seen.append(reader.sandbox("SELECT count(*) FROM names WHERE current").rows[0][0])
        reader.close()
    assert [writer.wait() for writer in writers] == [0, 0]
    assert seen == sorted(seen)
    assert set(registry.names("model")) == {f"{label}-{n}" for label in "ab" for n in range(12)}
