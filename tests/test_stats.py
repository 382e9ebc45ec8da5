"""How large a pool is: every figure against a walk of the folder and a reading of the journal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from poolreg.schema import statements

from poolreg import Pool
from poolreg.store import records
from poolreg.upkeep.stats import Place

pytestmark = pytest.mark.usefixtures("one_thread")


def walked(folder: Path) -> Place:
    """The plain reference: all files of a folder."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return Place(len(sizes), sum(sizes))


def object_sizes(root: Path) -> dict[str, int]:
    return {
        path.parent.name + path.name: path.stat().st_size
        for path in (root / "objects").rglob("*") if path.is_file()
    }  # fmt: skip


def journal_records(pool: Pool) -> list[records.Record]:
    return list({record.id: record for record in pool.registry.journal.all()}.values())


def contents_of(pool: Pool) -> dict[str, set[str]]:
    """The plain reference: which objects hold what, read from the journal."""
    found: dict[str, set[str]] = {}
    for record in journal_records(pool):
        body = record.body
        if record.kind == "model":
            for file in body["files"]:
                what = "weights" if file["role"] == "weights" else "configs and tokenizers"
                found.setdefault(what, set()).add(file["object"])
        if record.kind in ("partition", "evalset"):
            found.setdefault("document digests", set()).add(body["content"])
        if record.kind == "evalset":
            found.setdefault("evalset texts", set()).add(body["object"])
        if record.kind == "evaluation":
            for key in ("document_scores", "token_scores"):
                if body[key]:
                    found.setdefault(key.replace("_", " "), set()).add(body[key])
    return found


@pytest.fixture
def measured(pool) -> Pool:
    pool.ask(["alpha+beta", "alpha+gamma", "all"])
    return pool


def test_every_kind_of_record_is_counted(measured):
    counted = statements("lookups.sql")["record_counts"].sql
    for kind in records.KINDS:
        assert f"SELECT '{kind}'" in counted
    found = measured.stats().records
    assert found.keys() == records.KINDS.keys()
    assert {kind: n for kind, n in found.items() if n} == Counter(
        record.kind for record in journal_records(measured)
    )


def test_bytes_are_those_of_the_folder(measured):
    pool, root = measured, measured.root
    (root / "tmp" / "train-x").mkdir()
    (root / "tmp" / "train-x" / "state").write_bytes(bytes(777))
    (root / "quarantine").mkdir()
    (root / "quarantine" / "bad").write_bytes(bytes(55))
    found = pool.stats()
    assert found.bytes == walked(root).bytes
    assert found.places == {name: walked(root / name) for name in ("tmp", "quarantine", "locks")} | {
        name: Place(1, (root / name).stat().st_size) for name in ("FORMAT", "catalog.duckdb")
    }  # fmt: skip
    assert found.places["tmp"] == Place(1, 777)
    sizes = {path.name: path.stat().st_size for path in (root / "journal").iterdir()}
    assert (found.journal.segments, found.journal.bytes) == (len(sizes), sum(sizes.values()))
    assert found.journal.largest_bytes == sizes[found.journal.largest] == max(sizes.values())
    disk = os.statvfs(root)
    assert found.disk_bytes == disk.f_blocks * disk.f_frsize
    assert 0 < found.free_bytes < found.disk_bytes


def test_objects_by_what_they_hold(measured):
    sizes, held = object_sizes(measured.root), contents_of(measured)
    assert len(held) == 6
    found = {part.content: part for part in measured.stats().contents}
    assert found.keys() == held.keys()
    for content, digests in held.items():
        assert found[content].objects == len(digests), content
        assert found[content].bytes == sum(sizes[digest] for digest in digests), content
        assert found[content].missing == found[content].missing_bytes == 0


def test_what_no_record_names_and_what_is_not_here(measured):
    pool, root = measured, measured.root
    before = {part.content: part for part in pool.stats().contents}
    orphan = pool.registry.objects.put(b"nobody names me")
    (root / "objects" / "stray").write_bytes(b"12345")
    (root / "objects" / orphan[:2] / "half.tmp").write_bytes(b"1")
    weights = sorted(contents_of(pool)["weights"])
    gone = [root / "objects" / digest[:2] / digest[2:] for digest in weights[:2]]
    lost = sum(path.stat().st_size for path in gone)
    for path in gone:
        path.unlink()
    said = records.transfer("pull", "me/pool", version="", records=1, objects=0, bytes=0,
                            left=[weights[0]], repo_type="model", revision=None)  # fmt: skip
    pool.registry.record(said)
    found = pool.stats()
    assert found.unnamed == Place(3, len(b"nobody names me") + 5 + 1)
    parts = {part.content: part for part in found.contents}
    part = parts.pop("weights")
    assert (part.missing, part.missing_bytes, part.left_elsewhere) == (2, lost, 1)
    assert part.objects == before["weights"].objects - 2
    assert part.bytes == before["weights"].bytes - lost
    assert parts == {name: part for name, part in before.items() if name != "weights"}
    assert found.bytes == walked(root).bytes


def test_objects_of_records_from_a_later_version_are_other(measured):
    objects: dict[str, int] = {}
    measured.registry.put(b"of a later version", objects)
    measured.registry.record(records.fact("later", {"x": 1}, objects))
    parts = {part.content: part for part in measured.stats().contents}
    assert (parts["other"].objects, parts["other"].bytes) == (1, len(b"of a later version"))


def test_what_sharing_and_not_storing_saves(measured):
    pool = measured
    models = [record for record in journal_records(pool) if record.kind == "model"]
    files = [(file["object"], file["bytes"]) for model in models for file in model.body["files"]]
    found = pool.stats()
    assert found.model_files.bytes == sum(size for _, size in files)
    assert found.model_files.distinct_bytes == sum(size for _, size in set(files))
    # Seven models of one tokenizer: it is stored once.
    assert found.model_files.saved_bytes > 6 * min(size for _, size in files)
    # alpha+beta, alpha+gamma and all; alpha is one model and no merge.
    size = models[0].body["bytes"]
    assert (found.merges, found.merges_bytes) == (3, 3 * size)
    pool.ask("alpha")
    assert pool.stats().merges == 3
    pool.keep_merge("alpha+beta", "both")
    assert (pool.stats().merges, pool.stats().merges_bytes) == (2, 2 * size)
    pool.remove("model", "both")
    assert pool.stats().merges == 3


def test_the_biggest_and_whose_they_are(measured):
    sizes = object_sizes(measured.root)
    found = measured.stats(biggest=1000).biggest
    assert {big.digest: big.bytes for big in found} == sizes
    assert [big.bytes for big in found] == sorted(sizes.values(), reverse=True)
    assert measured.stats(biggest=3).biggest == found[:3]
    assert measured.stats(biggest=0).biggest == ()
    whose = {big.digest: (big.owner, big.owners) for big in found}
    files = measured.sql("SELECT object, name, model FROM model_files").dicts()
    labels = dict(measured.sql("SELECT model, label FROM model_labels").rows)
    for file in files:
        owners = sorted(
            f"{labels[f['model']]} {f['name']}" for f in files if f["object"] == file["object"]
        )
        assert whose[file["object"]] == (owners[0], len(owners))
    (row,) = measured.sql("SELECT object, content FROM evalsets JOIN evalset_names ON evalset = digest WHERE name = 'beta'").rows  # fmt: skip
    assert [whose[digest][0] for digest in row] == ["beta (evalset)"] * 2
    scores = {owner for owner, _ in whose.values() if " on " in owner}
    assert {"alpha+beta on gamma", "base on alpha", "alpha+beta+gamma on beta"} & scores
    assert not any(owner == "" for owner, _ in whose.values())


def test_calibrations_and_removed_models_count(pool):
    objects: dict[str, int] = {}
    layers = [pool.registry.put(bytes(9000 + n), objects) for n in range(2)]
    windows = pool.registry.put(b"windows", objects)
    base = pool.resolve("base").digest
    body = {
        "subject": base, "text": "t", "text_kind": "evalset", "protocol": "p", "token_limit": 1,
        "tokens": 1, "held_out_tokens": 1, "largest": 1, "condition": None, "windows": windows,
        "layers": layers, "seconds": 1.0,
    }  # fmt: skip
    pool.registry.record(records.keyed("calibration", "c" * 64, body, objects))
    parts = {part.content: part for part in pool.stats().contents}
    assert (parts["calibrations"].objects, parts["calibrations"].bytes) == (
        3,
        sum(objects.values()),
    )
    weights = parts["weights"]
    pool.remove("model", "alpha/1")
    assert weights in pool.stats().contents  # the data stays
    whose = {big.digest: big.owner for big in pool.stats(biggest=100).biggest}
    assert whose[layers[0]] == whose[windows] == "base (calibration)"


def test_an_empty_pool(tmp_path, cli_run):
    with Pool.create(tmp_path / "pool") as pool:
        found = pool.stats()
    assert set(found.records.values()) == {0}
    assert (found.contents, found.biggest, found.merges) == ((), (), 0)
    assert found.journal.segments == 0
    assert "saved" in cli_run("stats", "--pool", tmp_path / "pool").stdout


def test_the_command(cli_run, cli_pool):
    found = json.loads(cli_run("stats", "--pool", cli_pool, "--json", "--biggest", 2).stdout)
    with Pool.open(cli_pool) as pool:
        stats = pool.stats(biggest=2)
    assert found["bytes"] == stats.bytes
    assert found["places"]["tmp"] == {"files": 0, "bytes": 0}
    assert found["contents"][0]["content"] == "weights"
    assert [big["digest"] for big in found["biggest"]] == [big.digest for big in stats.biggest]
    lines = cli_run("stats", "--pool", cli_pool).stdout.splitlines()
    assert lines[0].split() == ["of", "what", "count", "size"]
    assert any("merges not stored" in line for line in lines)
    assert any("belongs to" in line for line in lines)
    csv = cli_run("stats", "--pool", cli_pool, "--format", "csv").stdout.splitlines()
    assert csv[0] == "of,what,count,bytes"
    assert "evaluation" in cli_run("stats", "--pool", cli_pool, "--format", "quiet").stdout.split()


def test_it_imports_no_torch(cli_pool):
    code = (
        "import sys; from poolreg import Pool; from pathlib import Path\n"
        "with Pool.open(sys.argv[1]) as pool: pool.stats(); pool.log(); pool.doctor()\n"
        "print(sorted({'torch', 'transformers', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, cli_pool], capture_output=True, text=True,
                          check=True)  # fmt: skip
    assert done.stdout.strip() == "[]"
