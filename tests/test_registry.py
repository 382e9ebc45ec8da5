"""The registry: finding a pool, its FORMAT, names, digests and the journal behind them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pools
import pytest

from poolreg.errors import (
    Conflict,
    Damage,
    NameRefused,
    NoPool,
    NotFound,
    StorageError,
    UnknownFormat,
    UsageError,
)
from poolreg.store import marker, records
from poolreg.store.registry import Registry
from poolreg.text import partitions as data


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


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty current folder, with no pool named in the environment."""
    monkeypatch.delenv("POOLREG_POOL", raising=False)
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.txt"
    path.write_text(text)
    return path


def add(registry: Registry, name: str, text: str, **options) -> str:
    path = write(registry.root.parent, f"{name}-{len(text)}", text)
    return data.add_partition(registry, name, [path], **options).digest


def name_model(registry: Registry, name: str, target: str = "f" * 64) -> None:
    registry.record(records.name("model", name, target))


def evalset_record(digest: str) -> records.Record:
    facts = {"object": "0" * 64, "content": "0" * 64, "documents": 1, "bytes": 1}
    return records.keyed("evalset", digest, facts)


# -- create and open --------------------------------------------------------------------------


def test_create_makes_a_pool_that_opens_again(tmp_path):
    Registry.create(tmp_path / "deep" / "pool").close()
    fields = json.loads((tmp_path / "deep" / "pool" / "FORMAT").read_text())
    assert fields["format"] == marker.VERSION
    opened = Registry.open(tmp_path / "deep" / "pool")
    assert opened.names("partition") == {}
    opened.close()


def test_two_pools_have_different_ids(tmp_path):
    ids = set()
    for name in ("one", "two"):
        Registry.create(tmp_path / name).close()
        ids.add(json.loads((tmp_path / name / "FORMAT").read_text())["id"])
    assert len(ids) == 2


def test_create_refuses_a_pool_and_leaves_it_as_it_is(registry):
    before = (registry.root / "FORMAT").read_bytes()
    with pytest.raises(Conflict, match="is a pool already"):
        Registry.create(registry.root)
    assert (registry.root / "FORMAT").read_bytes() == before


def test_create_refuses_a_folder_that_holds_anything_else(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(Conflict, match=r"not empty \(it holds 'notes.txt'\)"):
        Registry.create(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_create_refuses_a_file(tmp_path):
    with pytest.raises(Conflict, match="is a file"):
        Registry.create(write(tmp_path, "pool", "x"))


def test_interrupted_create_is_no_pool_and_can_be_repeated(tmp_path, monkeypatch):
    root = tmp_path / "pool"

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(marker, "staged", full)
        with pytest.raises(StorageError):
            Registry.create(root)
    assert sorted(path.name for path in root.iterdir()) == ["journal", "locks", "objects", "tmp"]
    with pytest.raises(NoPool):
        Registry.open(root)
    with monkeypatch.context() as killed:  # with FORMAT written but not yet in its place
        killed.setattr(Path, "replace", full)
        killed.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(StorageError):
            Registry.create(root)
    assert [path.read_bytes()[:10] for path in (root / "tmp").iterdir()] == [b'{"crc32":"']
    Registry.create(root).close()
    Registry.open(root).close()


@pytest.mark.parametrize(
    "text",
    ["", "garbage", "[1]", "1", "null", '{"format": 1}', '{"id": "x"}', "[" * 4000, '"format"'],
)
def test_open_refuses_a_format_file_that_is_none(registry, text):
    (registry.root / "FORMAT").write_text(text)
    with pytest.raises(Damage, match="is not the FORMAT file of a pool"):
        Registry.open(registry.root)


def test_open_refuses_bytes_and_giant_format_files(registry):
    for content in (b"\xff\xfe\x00", b'{"format": 1, "id": "' + b"x" * 5000 + b'"}'):
        (registry.root / "FORMAT").write_bytes(content)
        with pytest.raises(Damage):
            Registry.open(registry.root)


@pytest.mark.parametrize("version", [marker.VERSION + 1, 0, "1", True, None, [1]])
def test_open_refuses_another_format(registry, version):
    (registry.root / "FORMAT").write_text(json.dumps({"format": version, "id": "x"}))
    with pytest.raises(UnknownFormat, match="this poolreg reads format 1"):
        Registry.open(registry.root)


# -- find -------------------------------------------------------------------------------------


def test_find_without_a_pool(here):
    with pytest.raises(NoPool, match="poolreg init") as caught:
        Registry.find()
    assert caught.value.exit_code == 10
    with pytest.raises(NoPool):
        Registry.find(here)


def test_find_looks_here_and_upwards(here, monkeypatch):
    root = here / "project"
    Registry.create(root).close()
    for folder in (root, root / "journal"):
        monkeypatch.chdir(folder)
        assert Registry.find().root == root


def test_find_looks_into_the_subfolder_pool_on_the_way_up(here, monkeypatch):
    Registry.create(here / "pool").close()
    below = here / "src" / "deep"
    below.mkdir(parents=True)
    for folder in (here, below):
        monkeypatch.chdir(folder)
        assert Registry.find().root == here / "pool"


def test_find_takes_the_nearest_pool(here, monkeypatch):
    Registry.create(here / "pool").close()
    Registry.create(here / "inner" / "pool").close()
    monkeypatch.chdir(here / "inner")
    assert Registry.find().root == here / "inner" / "pool"


def test_find_passes_over_a_folder_pool_without_format(here, monkeypatch):
    Registry.create(here / "pool").close()
    (here / "inner" / "pool").mkdir(parents=True)
    monkeypatch.chdir(here / "inner")
    assert Registry.find().root == here / "pool"


def test_find_takes_a_given_path_before_the_environment_before_here(here, monkeypatch):
    for name in ("pool", "other", "third"):
        Registry.create(here / name).close()
    assert Registry.find().root == here / "pool"
    monkeypatch.setenv("POOLREG_POOL", "other")
    assert Registry.find().root == here / "other"
    assert Registry.find("third").root == here / "third"
    assert Registry.find(here).root == here / "pool", "the folder that holds `pool`"


def test_find_does_not_search_upwards_from_a_given_path(here, monkeypatch):
    Registry.create(here / "pool").close()
    (here / "empty").mkdir()
    with pytest.raises(NoPool):
        Registry.find(here / "empty")
    monkeypatch.setenv("POOLREG_POOL", str(here / "empty"))
    with pytest.raises(NoPool):
        Registry.find()


def test_a_copy_without_the_empty_folders_opens(registry):
    name_model(registry, "net")
    registry.close()
    for name in ("locks", "tmp"):
        shutil.rmtree(registry.root / name)
    registry.catalog.path.unlink(missing_ok=True)
    opened = Registry.open(registry.root)
    assert opened.resolve("model", "net") == "f" * 64
    opened.close()
    shutil.rmtree(registry.root / "journal")  # that is no empty folder: say so
    with pytest.raises(StorageError, match="reading the journal"):
        opened.names("model")


# -- names ------------------------------------------------------------------------------------


def test_partitions_and_models_share_their_names_and_evalsets_do_not(registry):
    add(registry, "text", "some text")
    name_model(registry, "net")
    with pytest.raises(Conflict, match="names a partition already"):
        registry.check_free("model", "text", "0" * 64, replace=True)
    with pytest.raises(Conflict, match="names a model already"):
        add(registry, "net", "other text", replace=True)
    path = write(registry.root.parent, "held", "held out")
    data.add_evalset(registry, "text", [path])
    data.add_evalset(registry, "net", [path])
    assert set(registry.names("evalset")) == {"text", "net"}
    assert set(registry.names("partition")) == {"text"}


def test_a_name_moves_only_with_replace_and_its_history_is_kept(registry):
    old = add(registry, "a", "first text")
    before = pools.contents(registry.root)
    with pytest.raises(Conflict, match="is taken by " + old[:12]) as caught:
        add(registry, "a", "the second text")
    assert "--replace" in caught.value.hint
    assert pools.contents(registry.root) == before
    new = add(registry, "a", "the second text", replace=True)
    assert registry.names("partition") == {"a": new}
    registry.catalog.refresh()
    history = registry.catalog.sandbox("SELECT name, target, current FROM names ORDER BY added")
    assert history.rows == [("a", old, False), ("a", new, True)]


def test_check_free_returns_the_name_composed(registry):
    assert registry.check_free("partition", "cafe\u0301", None) == "caf\u00e9"
    digest = add(registry, "cafe\u0301", "some text")
    assert registry.resolve("partition", "caf\u00e9") == digest
    assert registry.resolve("partition", "cafe\u0301") == digest


def test_a_removed_name_is_free_and_adding_again_restores_the_text(registry):
    digest = add(registry, "a", "some text")
    assert registry.remove("partition", "a") == digest
    assert registry.names("partition") == {}
    for text in ("a", digest[:10], digest):
        with pytest.raises(NotFound):
            registry.resolve("partition", text)
    registry.check_free("model", "a", "0" * 64)
    other = add(registry, "a", "quite another text")
    assert add(registry, "b", "some text") == digest
    assert registry.names("partition") == {"a": other, "b": digest}
    assert registry.resolve("partition", digest) == digest


def test_remove_of_an_unknown_name_records_nothing(registry):
    add(registry, "a", "some text")
    before = pools.contents(registry.root)
    with pytest.raises(NotFound):
        registry.remove("partition", "b")
    with pytest.raises(NotFound, match="does not hold 777777777777\n"):
        registry.one("partition", digest="7" * 64)
    assert pools.contents(registry.root) == before


def test_digest_prefixes(registry):
    one, two = "abcdef0" + "0" * 57, "abcdef1" + "0" * 57
    registry.record(evalset_record(one), evalset_record(two))
    assert registry.resolve("evalset", "abcdef0") == one
    assert registry.resolve("evalset", two) == two
    with pytest.raises(UsageError, match="abcdef begins 2 evalset digests"):
        registry.resolve("evalset", "abcdef")
    registry.remove("evalset", one)
    assert registry.resolve("evalset", "abcdef") == two, "a removed one does not count"
    for text in ("abcde", "ABCDEF1", "abcdef2", "abcdefg", "", "abcde%", two + "0"):
        with pytest.raises(NotFound):
            registry.resolve("evalset", text)
    with pytest.raises(NotFound):
        registry.resolve("partition", "abcdef1")


def test_a_name_goes_before_a_digest_that_begins_with_it(registry):
    digest = "abcdef" + "0" * 58
    registry.record(evalset_record(digest), records.name("evalset", "abcdef", "1" * 64))
    assert registry.resolve("evalset", "abcdef") == "1" * 64


def test_an_unknown_name_gets_the_nearest_as_a_hint(registry):
    with pytest.raises(NotFound) as caught:
        registry.resolve("model", "pyton")
    assert caught.value.hint == "known names: none yet"
    for name in ("python", "prose"):
        name_model(registry, name)
    with pytest.raises(NotFound, match="no model is named pyton") as caught:
        registry.resolve("model", "pyton")
    assert caught.value.hint == "did you mean python?"
    assert caught.value.data == {"name": "pyton"}
    with pytest.raises(NotFound) as caught:
        registry.resolve("model", "zzzz")
    assert caught.value.hint == "known names: prose, python"


def test_an_unknown_hostile_name_is_not_written_to_the_terminal(registry):
    for name in ("\x1b[31mred", "\x1b" + "x" * 500, "x" * 500):
        with pytest.raises(NotFound) as caught:
            registry.resolve("model", name)
        assert "\x1b" not in str(caught.value)
        assert len(caught.value.message) < 120


HOSTILE = [
    "", " ", "a b", "../a", "/a", "a/1", ".hidden", "-rf", "a+b", "2*a", "all", "all-a", "12",
    "1e3", "a\0b", "a\nb", "\x1b[31m", "a\u202eb", "x" * 5000, "';DROP TABLE names;--",
]  # fmt: skip


def test_hostile_names_are_refused_and_nothing_is_recorded(registry):
    add(registry, "a", "some text")
    path = write(registry.root.parent, "new", "new text")
    before = pools.contents(registry.root)
    for name in HOSTILE:
        with pytest.raises(NameRefused):
            data.add_partition(registry, name, [path])
        with pytest.raises(NameRefused):
            data.add_evalset(registry, name, [path], replace=True)
        with pytest.raises(NameRefused):
            registry.check_free("model", name, None)
    for name in filter(None, HOSTILE):
        with pytest.raises(NameRefused):
            data.add_partition(registry, "b", [path], parent=name)
    assert pools.contents(registry.root) == before


# -- journal and catalog ----------------------------------------------------------------------


def test_two_registries_of_one_pool_see_what_the_other_writes(registry):
    other = Registry.open(registry.root)
    first = add(registry, "a", "some text")
    assert other.names("partition") == {"a": first}
    second = add(other, "b", "another text")
    assert registry.names("partition") == {"a": first, "b": second}
    with pytest.raises(Conflict):
        add(registry, "b", "a third, longer text")
    other.close()


def test_a_record_is_there_after_opening_again_and_after_closing(registry):
    name_model(registry, "net")
    registry.close()
    assert registry.names("model") == {"net": "f" * 64}
    opened = Registry.open(registry.root)
    assert opened.resolve("model", "net") == "f" * 64
    opened.close()


def test_put_stores_before_anything_is_recorded(registry):
    objects: dict[str, int] = {}
    digest = registry.put_json({"b": 1, "a": [2]}, objects)
    assert registry.objects.read(digest) == b'{"a":[2],"b":1}'
    assert objects == {digest: 15}
    assert not list((registry.root / "journal").iterdir())


def test_a_deleted_catalog_is_rebuilt_to_the_same(registry):
    lookups = {
        "partition_list": {}, "evalset_list": {}, "contamination": {}, "partition_contents": {},
        "names": {"space": "model"},
    }  # fmt: skip
    add(registry, "a", "one line\n" * 40, units=2, parent="group")
    digest = add(registry, "b", "text of b")
    add(registry, "b", "a new text of b", replace=True)
    name_model(registry, "net")
    data.add_evalset(registry, "held", [write(registry.root.parent, "held", "a new text of b")])
    before = {lookup: registry.select(lookup, **given) for lookup, given in lookups.items()}
    assert len(before["partition_list"]) == 2
    assert len(before["contamination"]) == 1
    registry.close()
    registry.catalog.path.unlink()
    opened = Registry.open(registry.root)
    for lookup, given in lookups.items():
        rows = opened.select(lookup, **given)
        assert sorted(map(repr, rows)) == sorted(map(repr, before[lookup])), lookup
    assert opened.resolve("partition", digest[:8]) == digest
    opened.close()
