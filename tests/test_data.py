"""Partitions and evalsets: what is recorded of them, units, drift, overlaps and groups."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pools
import pytest

from poolreg.errors import Conflict, Drift, NotFound, Refused, UsageError
from poolreg.store import records
from poolreg.store.registry import Registry
from poolreg.text import corpus
from poolreg.text import partitions as data
from poolreg.text.corpus import FileDrift
from poolreg.text.partitions import Overlap

DOCUMENTS = [
    "the first document",
    "naïve café, 東京",
    "three\nlines\nhere\n",
    "\ttabs and 'quotes'",
]


@pytest.fixture(scope="module")
def empty(tmp_path_factory) -> Path:
    """An empty pool with its catalog; only to be copied."""
    made = Registry.create(tmp_path_factory.mktemp("empty") / "pool")
    made.catalog.refresh()
    made.close()
    return made.root


@pytest.fixture
def registry(empty, tmp_path) -> Iterator[Registry]:
    """An empty pool in `pool`."""
    opened = Registry.open(Path(shutil.copytree(empty, tmp_path / "pool")))
    yield opened
    opened.close()


def size(documents: Sequence[str]) -> int:
    return sum(len(document.encode()) for document in documents)


@pytest.fixture
def write(tmp_path):
    """Write documents as a JSON lines file."""

    def jsonl(name: str, documents: Sequence[str] = DOCUMENTS, field: str = "text") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps({field: document}) + "\n" for document in documents)
        if name.endswith(".gz"):
            path.write_bytes(gzip.compress(lines.encode()))
        else:
            path.write_text(lines)
        return path

    return jsonl


# -- adding partitions ------------------------------------------------------------------------


def test_a_partition_has_the_facts_of_its_text(registry, write):
    seen: list[int] = []
    added = data.add_partition(registry, "a", [write("a.jsonl")], progress=seen.append)
    assert (added.name, added.new, added.units, added.overlaps) == ("a", True, 1, ())
    assert (added.documents, added.bytes) == (len(DOCUMENTS), size(DOCUMENTS))
    assert sum(seen) == size(DOCUMENTS)
    row = registry.one("partition", digest=registry.resolve("partition", "a"))
    facts = (row["digest"], row["documents"], row["bytes"], row["duplicates"], row["units"])
    assert facts == (added.digest, len(DOCUMENTS), size(DOCUMENTS), 0, 1)


def test_the_digest_is_of_the_documents_and_not_of_files(registry, write):
    one = data.add_partition(registry, "a", [write("a.jsonl")])
    elsewhere = [
        write("deep/x.jsonl", DOCUMENTS[:1], field="body"),
        write("deep/w.jsonl.gz", DOCUMENTS[1:], field="body"),
    ]
    other = data.add_partition(registry, "b", elsewhere, field="body")
    assert (other.digest, other.new) == (one.digest, False)
    turned = data.add_partition(registry, "turned", [write("turned.jsonl", DOCUMENTS[::-1])])
    cut = data.add_partition(registry, "cut", [write("a.jsonl")], units=2)
    assert len({one.digest, turned.digest, cut.digest}) == 3


def test_duplicates_are_counted_and_kept(registry, write):
    path = write("a.jsonl", ["x", "y", "x", "x"])
    added = data.add_partition(registry, "a", [path])
    assert (added.documents, added.bytes, added.duplicates) == (4, 4, 2)
    assert list(data.unit_text(registry, added.digest, 1)) == ["x", "y", "x", "x"]
    assert data.add_evalset(registry, "e", [path]).duplicates == 2


def test_the_same_text_under_other_file_names_moves_the_location(registry, write):
    old = write("old.jsonl")
    first = data.add_partition(registry, "a", [old])
    moved = [write("new/1.jsonl", DOCUMENTS[:2]), write("new/2.jsonl", DOCUMENTS[2:])]
    again = data.add_partition(registry, "a", moved)
    assert (again.digest, again.new) == (first.digest, False)
    old.unlink()
    places = registry.select("partition_files", partition=first.digest)
    assert [row["path"] for row in places] == [str(path) for path in moved]
    assert list(data.unit_text(registry, first.digest, 1)) == DOCUMENTS
    assert len(registry.select("partition_list")) == 1


def test_a_changed_text_needs_replace_and_the_old_digest_stays(registry, write):
    first = data.add_partition(registry, "a", [write("a.jsonl")])
    changed = write("b.jsonl", [*DOCUMENTS, "one more"])
    before = pools.contents(registry.root)
    with pytest.raises(Conflict, match="is taken by"):
        data.add_partition(registry, "a", [changed])
    with pytest.raises(Conflict, match="is taken by"):
        data.add_partition(registry, "a", [write("a.jsonl")], units=2)
    assert pools.contents(registry.root) == before
    second = data.add_partition(registry, "a", [changed], replace=True)
    assert registry.resolve("partition", "a") == second.digest != first.digest
    assert registry.resolve("partition", first.digest[:8]) == first.digest
    assert list(data.unit_text(registry, first.digest, 1)) == DOCUMENTS


BAD_FILES = {
    "nul.txt": b"text\0text",
    "latin.txt": b"caf\xe9",
    "empty.txt": b"",
    "json.jsonl": b'{"text": "good"}\n{"text": \n',
    "list.jsonl": b'["text"]\n',
    "number.jsonl": b'{"text": 3}\n',
    "field.jsonl": b'{"body": "x"}\n',
    "surrogate.jsonl": b'{"text": "\\ud800"}\n',
    "zip.jsonl.gz": b"not gzip",
    "columns.parquet": b"PAR1 not parquet",
}


def test_refused_text_leaves_the_pool_as_it_was(registry, write, tmp_path):
    good = write("good.jsonl")
    data.add_partition(registry, "a", [good])
    before = pools.contents(registry.root)
    for name, content in BAD_FILES.items():
        path = tmp_path / name
        path.write_bytes(content)
        given = [path] if name == "empty.txt" else [good, path]
        with pytest.raises(Refused):
            data.add_partition(registry, "b", given)
        with pytest.raises(Refused):
            data.add_evalset(registry, "b", given)
    for given in ([tmp_path / "absent.txt"], [good, tmp_path / "absent.txt"]):
        with pytest.raises(NotFound):
            data.add_partition(registry, "b", given)
    with pytest.raises(UsageError):
        data.add_evalset(registry, "b", [])
    assert pools.contents(registry.root) == before


# -- units ------------------------------------------------------------------------------------


@pytest.mark.parametrize("units", [1, 7])
def test_units_cover_the_text_in_order(registry, write, units):
    documents = [f"{i} " + "word " * (i % 5) + "\nnext line é" for i in range(40)]
    files = [write("1.jsonl", documents[:15]), write("2.jsonl", documents[15:])]
    added = data.add_partition(registry, "a", files, units=units)
    assert added.units == units
    parts = [list(data.unit_text(registry, added.digest, i)) for i in range(1, units + 1)]
    assert "".join(map("".join, parts)) == "".join(documents)
    rows = registry.select("partition_units", partition=added.digest)
    recorded = [(row["unit"], row["documents"], row["bytes"]) for row in rows]
    assert recorded == [(i, len(part), size(part)) for i, part in enumerate(parts, start=1)]
    assert len({row["digest"] for row in rows}) == units
    longest = max(len(line.encode()) for document in documents for line in document.split("\n"))
    assert all(abs(size(part) - size(documents) / units) <= longest + 2 for part in parts)


def test_units_that_cannot_be_cut_are_refused(registry, write):
    before = pools.contents(registry.root)
    for units in (0, -1, size(DOCUMENTS) + 1):
        with pytest.raises(UsageError, match="cannot be cut"):
            data.add_partition(registry, "a", [write("a.jsonl")], units=units)
    assert pools.contents(registry.root) == before


def test_a_line_longer_than_a_unit_is_refused(registry, write):
    with pytest.raises(UsageError, match="would be empty"):
        data.add_partition(registry, "a", [write("a.jsonl", ["x" * 100, "y"])], units=3)


def test_there_is_no_such_unit(registry, write):
    added = data.add_partition(registry, "a", [write("a.jsonl")], units=2)
    for unit in (0, 3, -1):
        with pytest.raises(UsageError, match="no unit"):
            data.unit_text(registry, added.digest, unit)


# -- drift ------------------------------------------------------------------------------------


def two_files(registry: Registry, write) -> tuple[Path, Path, str]:
    one, two = write("1.jsonl", DOCUMENTS[:2]), write("2.jsonl", DOCUMENTS[2:])
    return one, two, data.add_partition(registry, "a", [one, two]).digest


def test_a_partition_that_is_as_it_was(registry, write):
    one, two, digest = two_files(registry, write)
    one.write_bytes(one.read_bytes())  # a new time of change is no drift
    seen: list[int] = []
    check = data.check_partition(registry, "a", progress=seen.append)
    assert check == data.PartitionCheck("a", 2, ())
    assert sum(seen) == one.stat().st_size + two.stat().st_size
    assert data.check_partition(registry, digest[:8]).drifted == ()


def test_drift_is_reported_and_refused(registry, write):
    one, two, digest = two_files(registry, write)
    good = two.read_bytes()
    two.write_bytes(good.replace(b"lines", b"LINES"))  # of the same size
    drifted = (FileDrift(str(two), "changed"),)
    assert data.check_partition(registry, "a") == data.PartitionCheck("a", 2, drifted)
    with pytest.raises(Drift, match=f"{two} is changed") as caught:
        data.unit_text(registry, digest, 1)
    assert caught.value.exit_code == 3
    assert caught.value.data["files"] == [str(two)]
    one.unlink()
    reasons = [(d.path, d.reason) for d in data.check_partition(registry, "a").drifted]
    assert reasons == [(str(one), "missing"), (str(two), "changed")]
    with pytest.raises(Drift, match=r"is missing \(and 1 more\)") as caught:
        data.unit_text(registry, digest, 1)
    assert caught.value.data["files"] == [str(one), str(two)]


def test_a_restored_file_is_no_drift(registry, write):
    one, _, digest = two_files(registry, write)
    good = one.read_bytes()
    one.write_bytes(good + b'{"text": "more"}\n')
    with pytest.raises(Drift):
        data.unit_text(registry, digest, 1)
    one.write_bytes(good)
    assert list(data.unit_text(registry, digest, 1)) == DOCUMENTS


def test_unknown_partitions_are_not_found(registry):
    with pytest.raises(NotFound):
        data.check_partition(registry, "a")
    with pytest.raises(NotFound):
        data.unit_text(registry, "0" * 64, 1)


# -- evalsets ---------------------------------------------------------------------------------


def test_an_evalset_comes_back_without_its_file(registry, write):
    documents = [*DOCUMENTS, '"quoted" \\ \u2028 \x07 😀', "x" * 10_000, " "]
    path = write("held.jsonl", documents)
    added = data.add_evalset(registry, "held", [path])
    assert (added.documents, added.bytes, added.units) == (len(documents), size(documents), 0)
    path.unlink()
    assert data.evalset_documents(registry, added.digest) == documents
    with pytest.raises(NotFound):
        data.evalset_documents(registry, "0" * 64)


def test_an_evalset_is_its_documents_in_order(registry, write):
    one = data.add_evalset(registry, "e", [write("e.jsonl")])
    again = data.add_evalset(registry, "e", [write("other.jsonl.gz")])
    assert (again.digest, again.new) == (one.digest, False)
    turned = write("turned.jsonl", DOCUMENTS[::-1])
    with pytest.raises(Conflict, match="is taken by"):
        data.add_evalset(registry, "e", [turned])
    two = data.add_evalset(registry, "e", [turned], replace=True)
    assert registry.resolve("evalset", "e") == two.digest != one.digest
    assert data.evalset_documents(registry, one.digest) == DOCUMENTS


def test_an_evalset_that_changes_while_it_is_read_is_refused(registry, write, monkeypatch):
    path = write("e.jsonl")
    scan = corpus.scan

    def scan_and_change(*given, **options):
        found = scan(*given, **options)
        write("e.jsonl", [*DOCUMENTS[1:], "another"])
        return found

    before = pools.contents(registry.root)
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "scan", scan_and_change)
        with pytest.raises(Refused, match="changed while they were read"):
            data.add_evalset(registry, "e", [path])
    assert pools.contents(registry.root) == before
    assert data.evalset_documents(registry, data.add_evalset(registry, "e", [path]).digest)


# -- overlaps ---------------------------------------------------------------------------------


def contamination(registry: Registry) -> list[tuple[str, str, int]]:
    rows = registry.select("contamination")
    return [(row["evalset"], row["partition"], row["documents"]) for row in rows]


@pytest.mark.parametrize("partition_first", [True, False])
def test_an_overlap_is_found_in_both_orders(registry, write, partition_first):
    train, held = write("train.jsonl"), write("held.jsonl", ["new", *DOCUMENTS[1:3], DOCUMENTS[1]])
    steps = [
        lambda: data.add_partition(registry, "train", [train]),
        lambda: data.add_evalset(registry, "held", [held]),
    ]
    first, second = (step() for step in (steps if partition_first else steps[::-1]))
    assert first.overlaps == ()
    assert second.overlaps == (Overlap("held", "train", 3),)
    partition, evalset = (first, second) if partition_first else (second, first)
    assert contamination(registry) == [(evalset.digest, partition.digest, 3)]


def test_only_whole_equal_documents_overlap(registry, write):
    data.add_partition(registry, "train", [write("train.jsonl")])
    near = [DOCUMENTS[0] + " ", DOCUMENTS[1].upper(), "three\nlines\nhere"]
    assert data.add_evalset(registry, "near", [write("near.jsonl", near)]).overlaps == ()
    assert contamination(registry) == []


def test_every_overlap_is_named(registry, write):
    for name, documents in (("a", DOCUMENTS[:2]), ("b", DOCUMENTS[1:])):
        data.add_partition(registry, name, [write(f"{name}.jsonl", documents)])
    found = data.add_evalset(registry, "e", [write("e.jsonl", DOCUMENTS[:2])]).overlaps
    assert set(found) == {Overlap("e", "a", 2), Overlap("e", "b", 1)}


def test_adding_twice_states_an_overlap_once(registry, write):
    data.add_evalset(registry, "e", [write("e.jsonl")])
    for _ in range(2):
        assert data.add_partition(registry, "a", [write("a.jsonl")]).overlaps
    assert len(contamination(registry)) == 1


def test_an_overlap_with_a_removed_evalset_shows_when_it_returns(registry, write):
    held = write("held.jsonl", DOCUMENTS[:1])
    data.add_evalset(registry, "held", [held])
    registry.remove("evalset", "held")
    assert data.add_partition(registry, "a", [write("a.jsonl")]).overlaps == ()
    again = data.add_evalset(registry, "held", [held])
    assert (again.new, again.overlaps) == (False, (Overlap("held", "a", 1),))


# -- parents ----------------------------------------------------------------------------------


def name_tree(registry: Registry, parents: dict[str, str | None]) -> None:
    registry.record(
        *(records.name("partition", name, "0" * 64, parent=up) for name, up in parents.items())
    )


def test_groups_are_parents_without_text(registry):
    name_tree(
        registry,
        {"python": "code", "rust": "code", "prose": None, "async": "python", "web": "prose"},
    )  # fmt: skip
    found = {group: sorted(names) for group, names in data.groups(registry).items()}
    assert found == {"code": ["async", "python", "rust"]}
    assert sorted(data.everything(registry)) == ["async", "rust", "web"]


def test_groups_and_all_of_an_empty_pool(registry):
    assert data.groups(registry) == {}
    assert data.everything(registry) == []


def test_a_removed_child_makes_its_parent_a_leaf_again(registry, write):
    data.add_partition(registry, "python", [write("python.jsonl")])
    data.add_partition(registry, "async", [write("async.jsonl", ["other"])], parent="python")
    assert data.everything(registry) == ["async"]
    registry.remove("partition", "async")
    assert data.everything(registry) == ["python"]


def test_a_circle_of_parents_is_a_conflict_and_can_be_undone(registry):
    name_tree(registry, {"a": "b", "b": "c"})
    assert data.groups(registry) == {"c": ["a", "b"]}
    name_tree(registry, {"c": "a"})
    with pytest.raises(Conflict, match="form a circle"):
        data.groups(registry)
    name_tree(registry, {"c": None})
    assert data.groups(registry) == {}
    assert data.everything(registry) == ["a"]


def test_no_partition_is_its_own_parent(registry, write):
    with pytest.raises(UsageError, match="its own parent"):
        data.add_partition(registry, "é", [write("a.jsonl")], parent="e\u0301")
    assert registry.names("partition") == {}


def test_no_partition_stands_below_itself(registry, write):
    paths = {name: [write(f"{name}.jsonl", [f"text of {name}"])] for name in "abc"}
    data.add_partition(registry, "a", paths["a"], parent="b")
    data.add_partition(registry, "b", paths["b"], parent="c")
    before = pools.contents(registry.root)
    with pytest.raises(UsageError, match="'a' stands below 'c'"):
        data.add_partition(registry, "c", paths["c"], parent="a")
    with pytest.raises(UsageError, match="'a' stands below 'b'"):
        data.add_partition(registry, "b", paths["b"], parent="a")
    assert pools.contents(registry.root) == before
    data.add_partition(registry, "b", paths["b"])
    data.add_partition(registry, "c", paths["c"], parent="a")  # now a is above nothing of c
    assert data.everything(registry) == ["c"]
