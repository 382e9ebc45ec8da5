"""Verification: every kind of damage is found and named with its way out, and nothing else is."""

from __future__ import annotations

import binascii
import json
import os
import shutil
from pathlib import Path

import duckdb
import pools
import pytest

from poolreg import Pool
from poolreg.canonical import canonical_json, digest_of, sha256
from poolreg.errors import NoPool, UsageError
from poolreg.progress import SILENT
from poolreg.store import records
from poolreg.store.journal import Record
from poolreg.verification import hashing
from poolreg.verification.findings import Finding, Verdict
from poolreg.verification.hashing import Cursor, Part
from poolreg.verification.verify import Depth, marker_findings, open_damaged, verify


def files_of(pool: Pool, name: str) -> dict[str, Path]:
    """Return where the files of a model stand in the store."""
    return {f["name"]: pool.registry.objects.path(f["object"]) for f in pool.model(name)["files"]}


def digest_at(path: Path) -> str:
    return path.parent.name + path.name


def overwrite(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    overwrite(path, bytes(data))


def segments(root: Path) -> list[Path]:
    """Return the segments of a pool, the largest first."""
    return sorted((root / "journal").iterdir(), key=lambda path: -path.stat().st_size)


def looked(root: Path, **depth) -> Verdict:
    """Verify a pool as the command line opens it."""
    registry = open_damaged(root)
    try:
        return verify(registry, Depth(**depth))
    finally:
        registry.close()


def only(found: Verdict) -> Finding:
    (finding,) = found.findings
    assert finding.way_out
    return finding


@pytest.fixture
def root(tiny, tmp_path) -> Path:
    """A copy of the tiny pool, closed."""
    return tiny.copy(tmp_path / "pool")


# -- pools that are whole --------------------------------------------------------------------


def test_a_whole_pool(pool):
    found = pool.verify(full=True)
    assert (found.findings, found.remarks, found.unchecked, found.mended) == ((), (), (), ())
    assert found.hashed == found.objects > 10
    assert found.hashed_bytes == found.bytes
    assert found.catalog
    assert found.headers == 7 * 5
    assert (found.elsewhere, found.collected, found.unnamed) == (0, 0, 0)


def test_verifying_changes_nothing(root):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    looked(root, full=True)
    after = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    assert {path: time for path, time in after.items() if "locks" not in path.parts} == {
        path: time for path, time in before.items() if "locks" not in path.parts
    }


def test_what_was_removed_may_be_gone(pool, tiny, tmp_path):
    pool.add_model(pools.unit_folder(tmp_path / "more", tiny.seed, 70), name="more")
    weights = files_of(pool, "more")["model.safetensors"]
    pool.remove("model", "more")
    weights.unlink()
    found = pool.verify(full=True)
    assert (found.findings, found.collected) == ((), 1)


def test_what_was_left_is_told_from_what_was_lost(hub, published, tiny, tmp_path):
    hub.repos["model", "me/pool"] = published.repo.copy()
    with Pool.create(tmp_path / "b") as other:
        other.pull("me/pool", results_only=True)
        other.add_model(pools.unit_folder(tmp_path / "own", tiny.seed, 44), name="own")
        found = other.verify()
        assert (found.findings, found.elsewhere) == ((), 7)
        files_of(other, "own")["model.safetensors"].unlink()
        assert only(other.verify()).problem == "missing"


def test_a_torn_line_is_a_remark(root):
    with open(segments(root)[0], "ab") as file:
        file.write(b'0123abcd {"at":"2026')
    found = looked(root, full=True)
    assert found.findings == ()
    assert "torn line" in found.remarks[0]


def test_strange_files_are_remarks(root):
    (root / "journal" / "notes.txt").touch()
    (root / "objects" / "notes.txt").touch()
    (root / "objects" / "ab").mkdir(exist_ok=True)
    (root / "objects" / "ab" / ".DS_Store").touch()
    found = looked(root)
    assert found.findings == ()
    assert sorted(remark.split()[0] for remark in found.remarks) == [
        "journal/notes.txt", "objects/ab/.DS_Store", "objects/notes.txt",
    ]  # fmt: skip


def test_objects_of_no_record_are_counted(pool):
    pool.registry.objects.put(b"garbage")
    found = pool.verify(full=True)
    assert (found.findings, found.unnamed) == ((), 1)


def test_a_pool_that_cannot_be_written_to(root, monkeypatch):
    real = os.access
    monkeypatch.setattr(
        "os.access", lambda path, mode, **more: mode != os.W_OK and real(path, mode, **more)
    )
    monkeypatch.setattr("poolreg.store.registry.lock", None)  # which would write
    assert looked(root, headers=True).findings == ()


# -- objects ---------------------------------------------------------------------------------


def test_objects_missing_short_and_flipped(pool, cli_run):
    gone, short, flipped = list(files_of(pool, "base").values())[:3]
    gone.unlink()
    overwrite(short, short.read_bytes()[:-1])
    flip(flipped, 1)
    told = cli_run("--pool", pool.root, "verify", "--full", "--json", code=3)
    findings = {f["what"]: f for f in json.loads(told.stdout)["findings"] if f["kind"] == "object"}
    assert findings[f"object {digest_at(gone)}"]["problem"] == "missing"
    assert "instead of" in findings[f"object {digest_at(short)}"]["problem"]
    assert "not what they were" in findings[f"object {digest_at(flipped)}"]["problem"]
    assert len(findings) == 3
    assert {f["of"].partition(" of ")[2] for f in findings.values()} == {"model base"}
    told = cli_run("--pool", pool.root, "verify", code=3)
    assert "add the model again" in told.stdout
    assert "2 problems" in told.output  # the flip is seen only when it is looked for


def test_a_flip_is_found_at_the_level_that_looks_for_it(pool):
    path = files_of(pool, "base")["model.safetensors"]
    flip(path, path.stat().st_size - 1)
    assert pool.verify().findings == pool.verify(headers=True).findings == ()
    assert only(pool.verify(full=True)).key == digest_at(path)


def test_headers_are_read_strictly(pool):
    path = files_of(pool, "base")["model.safetensors"]
    flip(path, 8)  # the header's first brace
    found = only(pool.verify(headers=True))
    assert found.kind == "model"
    assert digest_at(path) in found.problem
    flip(path, 8)
    config = files_of(pool, "base")["config.json"]
    flip(config, 0)
    (*_, found) = pool.verify(headers=True).findings
    assert "config.json" in found.problem


def test_tensors_are_those_of_the_record(pool):
    (model,) = (r for r in pool.registry.journal.all() if r.kind == "model" and r.id ==
                pool.registry.resolve("model", "base"))  # fmt: skip
    tensors = [[*model.body["tensors"][0][:2], [1, 1], "0" * 64], *model.body["tensors"][1:]]
    key = sha256(b"another")
    pool.registry.record(
        Record("model", key, {**model.body, "tensors": tensors}, dict(model.objects)),
        records.name("model", "another", key),
    )
    found = only(pool.verify(headers=True))
    assert f"tensor {model.body['tensors'][0][0]} is not as its record says" in found.problem


def test_a_bad_object_of_no_record(pool):
    digest = pool.registry.objects.put(b"garbage")
    flip(pool.registry.objects.path(digest), 0)
    found = only(pool.verify(full=True))
    assert found.of == "no record"
    assert "nothing needs it" in found.way_out


# -- the journal -----------------------------------------------------------------------------


@pytest.mark.parametrize("bit", range(8))
@pytest.mark.parametrize("place", ["crc", "space", "data", "line feed", "last line feed"])
def test_every_class_of_byte_of_a_line(root, place, bit):
    segment = segments(root)[0]
    data = segment.read_bytes()
    second = data.index(b"\n") + 1
    position = {
        "crc": second + 3, "space": second + 8, "data": second + 40, "line feed": second - 1,
        "last line feed": len(data) - 1,
    }[place]  # fmt: skip
    flip(segment, position, bit)
    found = looked(root)
    lines = [finding for finding in found.findings if finding.kind == "line"]
    assert lines
    assert all(finding.key == segment.name for finding in lines)
    assert "poolreg verify --repair" in lines[0].way_out
    (root / "catalog.duckdb").unlink()  # without a witness, too
    again = [f.what for f in looked(root).findings if f.kind == "line"]
    assert again == [finding.what for finding in lines]


def test_all_bad_lines_are_listed(root):
    segment = segments(root)[0]
    lines = segment.read_bytes().splitlines(keepends=True)
    segment.write_bytes(b"".join(b"x" + line if n % 2 else line for n, line in enumerate(lines)))
    bad = [finding for finding in looked(root).findings if finding.kind == "line"]
    assert len(bad) == len(lines) // 2 >= 1
    assert len({finding.what for finding in bad}) == len(bad)


def test_records_that_say_too_little(root):
    body = {"space": "model"}
    data = canonical_json({"v": 1, "kind": "name", "id": "x", "at": "2026-01-01T00:00:00.000000Z",
                           "body": body, "objects": {}})  # fmt: skip
    for text, words in ((data, "lacks or mistypes"), (b"[]", "not a record")):
        (root / "journal" / "z.jsonl").write_bytes(b"%08x %s\n" % (binascii.crc32(text), text))
        assert words in only(looked(root)).problem


def test_records_of_a_newer_format(root):
    text = canonical_json({"v": 2})
    (root / "journal" / "z.jsonl").write_bytes(b"%08x %s\n" % (binascii.crc32(text), text))
    found = only(looked(root, full=True))
    assert (found.kind, found.way_out) == ("newer", "install a newer poolreg")


def test_a_segment_that_was_read_and_is_gone_or_shorter(root):
    segment = segments(root)[0]
    data = segment.read_bytes()
    last = data.rindex(b"\n", 0, -1) + 1
    segment.write_bytes(data[:last])  # at the end of a line
    found = looked(root).findings
    assert [f.kind for f in found if f.kind != "name"] == ["segment"]
    assert f"{last:,} bytes of {len(data):,}" in found[0].problem
    segment.write_bytes(data[:-1])  # only the line feed is gone
    assert {f.kind for f in looked(root).findings} == {"line", "segment"}
    segment.unlink()
    assert any(f.problem == "is gone" for f in looked(root).findings)


def test_names_that_stand_for_nothing(pool):
    pool.registry.record(records.name("model", "ghost", "0" * 64))
    found = only(pool.verify())
    assert (found.what, found.kind) == ("model ghost", "name")


def test_a_catalog_is_not_healed_before_it_was_looked_at(root):
    flip(root / "catalog.duckdb", 20)
    found = [looked(root, full=full) for full in (False, True)]
    assert all([f.kind for f in verdict.findings] == ["catalog"] for verdict in found)


def test_a_catalog_that_says_something_else(root):
    with duckdb.connect(root / "catalog.duckdb") as connection:
        connection.execute("UPDATE models SET parameters = parameters + 1")
    assert looked(root).findings == ()
    found = only(looked(root, full=True))
    assert "models (7 rows only here, 7 only there)" in found.problem


@pytest.mark.parametrize("older", [False, True])
def test_no_catalog_is_no_damage(root, older):
    if older:
        with duckdb.connect(root / "catalog.duckdb") as connection:
            connection.execute("UPDATE catalog_info SET schema_version = 1")
    else:
        (root / "catalog.duckdb").unlink()
    found = looked(root, full=True)
    assert (found.findings, found.catalog) == ((), False)
    assert "the next command makes it" in found.remarks[0]


# -- FORMAT and the folders ------------------------------------------------------------------


def test_every_bit_of_the_marker(root):
    for position in range((root / "FORMAT").stat().st_size):
        for bit in range(8):
            flip(root / "FORMAT", position, bit)
            registry = open_damaged(root)
            assert [f.kind for f in marker_findings(registry)] == ["marker"], (position, bit)
            flip(root / "FORMAT", position, bit)
    assert looked(root).findings == ()


def test_a_marker_that_is_gone_or_old(root, cli_run):
    (root / "FORMAT").write_bytes(canonical_json({"format": 1, "id": "x"}))
    assert "no checksum" in only(looked(root)).problem
    (root / "FORMAT").unlink()
    assert only(looked(root)).problem == "is gone"
    assert "FORMAT" in cli_run("verify", "--pool", root, code=3).stdout
    with pytest.raises(NoPool):
        open_damaged(root / "objects")


def test_folders_that_are_gone(root):
    shutil.rmtree(root / "journal")
    found = looked(root, full=True)
    assert (only(found).what, found.unchecked) == ("journal/", ("all that lies in the pool",))


# -- parts, pauses, merges -------------------------------------------------------------------


def test_the_parts_are_the_whole(pool):
    everything = pool.verify(full=True, merges=0)
    found = [
        hashing.hash_objects(
            pool.registry, Part(n, 7), deadline=None, resume=False, progress=SILENT
        )
        for n in range(1, 8)
    ]
    assert sum(part.objects for part in found) == everything.hashed
    assert sum(part.bytes for part in found) == everything.hashed_bytes
    assert pool.verify(full=True, sample="2/7").hashed == found[1].objects
    for text in ("0/3", "4/3", "1", "a/b", "1/1/1", ""):
        with pytest.raises(UsageError, match="N/T"):
            Part.parse(text)


@pytest.fixture
def small_batches(monkeypatch) -> None:
    monkeypatch.setattr(hashing, "_BATCH", 1)
    monkeypatch.setattr(hashing, "_SAVE_EVERY", 0.0)


@pytest.mark.usefixtures("small_batches")
def test_a_pass_in_pieces_sees_everything_once(pool):
    path = files_of(pool, "base")["config.json"]
    flip(path, 3)
    total, hashed, rounds = pool.verify().objects, 0, 0
    while True:
        found = pool.verify(full=True, merges=0, max_seconds=0, resume=rounds > 0)
        hashed, rounds = hashed + found.hashed, rounds + 1
        assert found.unchecked[0].startswith(f"{total - hashed} objects") or hashed == total
        if hashed == total:
            break
        assert Cursor.file(pool.registry).exists()
    assert rounds == total
    assert any(f.key == digest_at(path) for f in found.findings)  # from an earlier piece
    assert not Cursor.file(pool.registry).exists()


@pytest.mark.usefixtures("small_batches")
def test_an_interrupted_pass_goes_on(pool, monkeypatch):
    hashed = hashing.problems_of
    batches = iter(range(6))  # the first call is about suspects, of which there are none

    def interrupted(registry, digests, **options):
        if next(batches) == 5:
            raise KeyboardInterrupt
        return hashed(registry, digests, **options)

    with monkeypatch.context() as patch:
        patch.setattr(hashing, "problems_of", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.verify(full=True, merges=0)
    found = pool.verify(full=True, merges=0, resume=True)
    assert found.objects - found.hashed == 4


@pytest.mark.parametrize(
    "nonsense", [b"", b"[]", b"{", b'{"part":"1/1","after":"zz","bad":[]}', b"\xff" * 9]
)
def test_a_cursor_that_is_nonsense_is_ignored(pool, nonsense):
    Cursor.file(pool.registry).write_bytes(nonsense)
    found = pool.verify(full=True, merges=0, resume=True)
    assert found.hashed == found.objects


def test_a_cursor_of_another_part_is_ignored(pool):
    Cursor(Part(1, 2), b"\xff" * 32).save(pool.registry)
    found = pool.verify(full=True, merges=0, resume=True)
    assert found.hashed == found.objects


def test_merges_are_made_again(pool):
    pool.keep_merge("alpha+beta", "plain")
    kept = pool.keep_merge("alpha+gamma", "blend", dtype="bfloat16")
    before = pools.contents(pool.root).keys()
    assert pool.verify(full=True, merges=0).merges == 0
    assert pool.verify(full=True, merges=1).merges == 1
    found = pool.verify(full=True)
    assert (found.merges, found.findings) == (2, ())
    assert pools.contents(pool.root).keys() == before
    # A recipe that gives something else than what is there.
    (build,) = (r.body for r in pool.registry.journal.all()
                if r.kind == "build" and r.body["model"] == kept.digest)  # fmt: skip
    wrong = {**build, "model": pool.registry.resolve("model", "base")}
    pool.registry.record(records.keyed("build", digest_of(wrong), wrong))
    found = only(pool.verify(full=True))
    assert (found.what, found.kind) == ("merge base", "merge")
    assert "cannot be rebuilt" in found.problem


def test_the_command_line(cli_run, cli_pool):
    told = cli_run("verify", "--pool", cli_pool, "--full").stderr
    assert "hashed" in told
    assert "catalog compared" in told
    assert cli_run("verify", "--pool", cli_pool, "--format", "quiet").stdout == ""
    cli_run("verify", "--pool", cli_pool, "--resume", code=2)
    cli_run("verify", "--pool", cli_pool, "--full", "--sample", "5/3", code=2)
    cli_run("verify", "--pool", cli_pool.parent / "none", code=10)
