"""Repair: what can be brought back is, what cannot is told, and nothing is ever deleted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import duckdb
import pools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poolreg import Pool
from poolreg.canonical import sha256
from poolreg.store.journal import Record
from poolreg.store.marker import has_checksum, read_marker
from poolreg.verification.repair import repair
from poolreg.verification.salvage import flipped_bit, salvage
from poolreg.verification.verify import Depth, open_damaged, verify

REPO = "me/pool"


def files_of(pool: Pool, name: str) -> dict[str, Path]:
    return {f["name"]: pool.registry.objects.path(f["object"]) for f in pool.model(name)["files"]}


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.chmod(0o644)
    path.write_bytes(bytes(data))


def largest(root: Path) -> Path:
    return max((root / "journal").iterdir(), key=lambda path: path.stat().st_size)


def lines(root: Path) -> Counter[bytes]:
    """Return the good lines of a journal, each with how often it stands there."""
    found = (path.read_bytes().splitlines() for path in (root / "journal").iterdir())
    return Counter(line for segment in found for line in segment)


def kept(root: Path) -> dict[str, bytes]:
    """Return what lies in quarantine/, by name without the time."""
    return {p.name.rpartition("-")[0]: p.read_bytes() for p in (root / "quarantine").iterdir()}


def repaired(root: Path, **depth):
    registry = open_damaged(root)
    try:
        return repair(registry, Depth(**depth))
    finally:
        registry.close()


@pytest.fixture
def root(tiny, tmp_path) -> Path:
    """A copy of the tiny pool, closed; the files of its partitions are where they were."""
    return tiny.copy(tmp_path / "pool")


@pytest.fixture
def pushed(hub, published, tmp_path) -> Path:
    """A pool that was pushed to the Hub."""
    hub.repos["model", REPO] = published.repo.copy()
    return Path(shutil.copytree(published.pushed, tmp_path / "pool"))


def whole(root: Path) -> None:
    registry = open_damaged(root)
    found = verify(registry, Depth(full=True))
    registry.close()
    assert (found.findings, found.unchecked) == ((), ())


# -- what holds a pool together --------------------------------------------------------------


def test_a_whole_pool_is_left_alone(root):
    before = pools.contents(root)
    found = repaired(root, full=True)
    assert (found.findings, found.mended) == ((), ())
    assert found.hashed == found.objects
    assert pools.contents(root) == before
    assert not (root / "quarantine").exists()


@pytest.mark.parametrize("how", ["flipped", "emptied", "gone", "old"])
def test_the_marker(root, how, cli_run):
    identity, data = read_marker(root), (root / "FORMAT").read_bytes()
    if how == "flipped":
        flip(root / "FORMAT", data.index(b"crc32"))
    elif how == "emptied":
        (root / "FORMAT").write_bytes(b"")
    elif how == "gone":
        (root / "FORMAT").unlink()
    else:
        (root / "FORMAT").write_text(json.dumps({"format": 1, "id": identity}))
    cli_run("verify", "--pool", root, code=3)
    assert "written anew" in cli_run("verify", "--pool", root, "--repair").stdout
    assert has_checksum(root)
    assert (read_marker(root) == identity) == (how in ("flipped", "old"))
    if how != "gone":
        assert "FORMAT" in kept(root)
    cli_run("ls", "--pool", root)
    whole(root)


@pytest.mark.parametrize("place", ["crc", "data", "line feed", "first byte", "last line feed"])
def test_one_flipped_bit_of_the_journal_is_set_right(root, place):
    before, segment = lines(root), largest(root)
    data = segment.read_bytes()
    second = data.index(b"\n") + 1
    flip(segment, {"crc": second + 3, "data": second + 50, "line feed": second - 1,
                   "first byte": 0, "last line feed": len(data) - 1}[place], 2)  # fmt: skip
    damaged = segment.read_bytes()
    found = repaired(root)
    assert found.findings == ()
    assert "set right" in found.mended[0].done
    assert "lost" not in found.mended[0].done
    assert lines(root) == before
    assert kept(root)[segment.name] == damaged
    whole(root)


def test_a_byte_that_became_a_line_feed(pool):
    pool.registry.record(Record("from the future", "x", {"text": "JUMPS"}, {}))
    pool.close()
    before, segment = lines(pool.root), max((pool.root / "journal").iterdir())
    flip(segment, segment.read_bytes().index(b"JUMPS"), 6)
    assert b"\nUMPS" in segment.read_bytes()
    assert repaired(pool.root).findings == ()
    assert lines(pool.root) == before


def test_lines_that_are_lost_are_counted(root):
    segment = largest(root)
    data = segment.read_bytes().splitlines(keepends=True)
    segment.write_bytes(b"".join([*data[:-1], b"0" * 500 + b"\n", data[-1]]))
    found = repaired(root)
    assert found.findings == ()
    assert "1 lost (501 bytes)" in found.mended[0].done
    assert lines(root)[data[0].rstrip()] == 1
    whole(root)


def test_a_segment_without_one_good_line(root):
    extra = root / "journal" / "0-extra.jsonl"
    extra.write_bytes(b"garbage\n")
    found = repaired(root)
    assert found.findings == ()
    assert not extra.exists()
    assert kept(root)[extra.name] == b"garbage\n"


@pytest.mark.parametrize("how", ["gone", "shorter", "one byte shorter", "empty"])
def test_what_the_catalog_had_read_and_is_gone(pool, how):
    pool.registry.record(Record("from the future", "x", {}, {}))
    pool.close()
    root, before = pool.root, lines(pool.root)
    (segment,) = (p for p in (root / "journal").iterdir() if b"from the future" in p.read_bytes())
    data = segment.read_bytes()
    if how == "gone":
        segment.unlink()
    else:
        cut = {"shorter": 30, "one byte shorter": len(data) - 1, "empty": 0}[how]
        segment.write_bytes(data[:cut])
    old = (root / "catalog.duckdb").read_bytes()
    found = repaired(root)
    assert found.findings == ()
    assert kept(root)["catalog.duckdb"] == old
    lost = before - lines(root)
    assert lost == ({} if how == "one byte shorter" else Counter([data.rstrip()]))
    whole(root)


@pytest.mark.parametrize("how", ["unreadable", "different"])
def test_the_catalog(root, how):
    path = root / "catalog.duckdb"
    if how == "unreadable":
        path.write_bytes(b"x" * 9000)
    else:
        with duckdb.connect(path) as connection:
            connection.execute("DELETE FROM models")
    old = path.read_bytes()
    found = repaired(root, full=True, merges=0)
    assert found.findings == ()
    assert kept(root) == {"catalog.duckdb": old}
    whole(root)


@pytest.mark.parametrize("folder", ["journal", "objects"])
def test_folders_that_are_gone(pushed, folder):
    before = lines(pushed)
    shutil.rmtree(pushed / folder)
    found = repaired(pushed)
    assert found.findings == ()
    lost = {json.loads(line[9:])["kind"] for line in before - lines(pushed)}
    assert lost == ({"location", "transfer"} if folder == "journal" else set())
    whole(pushed)


# -- objects ---------------------------------------------------------------------------------


def test_what_cannot_be_made_again_is_put_away(root, cli_run, tiny):
    with Pool.open(root) as pool:
        weights = files_of(pool, "base")["model.safetensors"]
    data = weights.read_bytes()
    flip(weights, 3000)
    digest = weights.parent.name + weights.name
    told = cli_run("verify", "--pool", root, "--full", "--repair", "--json", code=3)
    found = json.loads(told.stdout)
    (finding,) = found["findings"]
    assert (finding["problem"], finding["of"]) == ("missing", "model.safetensors of model base")
    assert "--repair" not in finding["way_out"]
    assert found["mended"][0]["kept"].startswith(f"quarantine/{digest}-")
    assert kept(root)[digest] != data
    # The way out that it names works.
    cli_run("model", "add", tiny.seed, "--seed", "--name", "base", "--pool", root)
    assert weights.read_bytes() == data
    whole(root)


def test_partitions_from_their_files_and_evalsets_from_their_text(root):
    with Pool.open(root) as pool:
        registry = pool.registry
        paths = [
            registry.objects.path(registry.one(lookup, digest=registry.resolve(space, "alpha"))[
                "content"]) for lookup, space in (("partition", "partition"), ("evalset", "evalset"))
        ]  # fmt: skip
    before = [path.read_bytes() for path in paths]
    paths[0].unlink()
    flip(paths[1], 7)
    found = repaired(root, full=True, merges=0)
    assert found.findings == ()
    assert [path.read_bytes() for path in paths] == before
    assert {done.done.partition(" from ")[0] for done in found.mended} == {"put away", "made again"}
    whole(root)


def test_text_that_changed_since_is_not_taken(root, tiny, tmp_path):
    with Pool.open(root) as pool:
        texts = pools.write_texts(tmp_path / "texts", ["zeta"])
        pool.add_partition("zeta", [texts / "zeta.train.jsonl"])
        row = pool.registry.one("partition", digest=pool.registry.resolve("partition", "zeta"))
        pool.registry.objects.path(row["content"]).unlink()
    pools.write_texts(tmp_path / "texts", ["zeta"], lines=5)
    found = repaired(root)
    assert [f.problem for f in found.findings] == ["missing"]
    assert any("is not what it was" in remark for remark in found.remarks)


def test_kept_merges_from_their_recipes(root):
    with Pool.open(root) as pool:
        pool.keep_merge("alpha+beta", "blend", dtype="bfloat16")
        weights = files_of(pool, "blend")["model.safetensors"]
    before = weights.read_bytes()
    flip(weights, 4000)
    found = repaired(root, full=True)
    assert found.findings == ()
    assert weights.read_bytes() == before
    assert any("recipe" in done.done for done in found.mended)
    whole(root)


def test_objects_come_back_from_a_known_place(pushed):
    with Pool.open(pushed) as pool:
        base, unit = (files_of(pool, name)["model.safetensors"] for name in ("base", "alpha/1"))
        config = files_of(pool, "base")["config.json"]
    paths = (base, unit, config)
    before = [path.read_bytes() for path in paths]
    base.unlink()
    flip(unit, 100)
    flip(config, 0)
    found = repaired(pushed, full=True)
    assert found.findings == ()
    assert [path.read_bytes() for path in paths] == before
    assert sum(done.done == f"fetched from {REPO}" for done in found.mended) == 3
    assert len(kept(pushed)) == 2
    whole(pushed)


def test_a_place_that_cannot_be_reached_is_told_and_the_next_one_asked(root, hub, tmp_path):
    with Pool.open(root) as pool:
        pool.push(f"file://{tmp_path / 'published'}")
        pool.push(REPO)
        weights = files_of(pool, "base")["model.safetensors"]
    before = weights.read_bytes()
    weights.unlink()
    del hub.repos["model", REPO]
    found = repaired(root)
    assert found.findings == ()
    assert weights.read_bytes() == before
    assert any(remark.startswith(REPO) for remark in found.remarks)


def test_a_place_that_lies_is_not_believed(root, tmp_path):
    place = tmp_path / "published"
    with Pool.open(root) as pool:
        pool.push(f"file://{place}")
        weights = files_of(pool, "base")["model.safetensors"]
    digest = weights.parent.name + weights.name
    weights.unlink()
    flip(place / "objects" / digest[:2] / digest[2:], 500)
    found = repaired(root)
    assert [f.key for f in found.findings] == [digest]
    assert any("does not match its name" in remark for remark in found.remarks)


def test_lost_records_come_back_from_a_known_place(pushed):
    segments = sorted((pushed / "journal").iterdir(), key=lambda path: path.stat().st_size)
    before = {line.partition(b'"id":"')[2][:64] for line in lines(pushed)
              if b'"kind":"evaluation"' in line}  # fmt: skip
    assert before
    (segment,) = (path for path in segments if b'"kind":"evaluation"' in path.read_bytes())
    data = segment.read_bytes().splitlines(keepends=True)
    broken = [b"#" * 99 + b"\n" if b'"kind":"evaluation"' in line else line for line in data]
    segment.write_bytes(b"".join(broken))
    found = repaired(pushed)
    assert found.findings == ()
    assert any("came from me/pool" in done.done for done in found.mended)
    after = {line.partition(b'"id":"')[2][:64] for line in lines(pushed)
             if b'"kind":"evaluation"' in line}  # fmt: skip
    assert after == before
    assert not (pushed / "tmp" / "records.lost").exists()
    whole(pushed)


def test_a_place_that_only_the_catalog_knows(pushed):
    before = lines(pushed)
    for path in (pushed / "journal").iterdir():
        path.unlink()
    found = repaired(pushed)
    assert found.findings == ()
    lost = before - lines(pushed)
    assert {json.loads(line[9:])["kind"] for line in lost} == {"location", "transfer"}
    assert not (pushed / "tmp" / "records.lost").exists()
    whole(pushed)


def test_places_are_asked_again_until_one_is_reached(pushed, hub):
    repo = hub.repos.pop(("model", REPO))
    (segment,) = (path for path in (pushed / "journal").iterdir()
                  if b'"kind":"evaluation"' in path.read_bytes())  # fmt: skip
    segment.unlink()
    found = repaired(pushed)
    assert any(remark.startswith(REPO) for remark in found.remarks)
    hub.repos["model", REPO] = repo
    found = repaired(pushed)
    assert found.findings == ()
    assert any("came from me/pool" in done.done for done in found.mended)
    whole(pushed)


# -- killed anywhere -------------------------------------------------------------------------

DAMAGE = """
import sys
from pathlib import Path
from poolreg.verification.verify import Depth, open_damaged
from poolreg.verification.repair import repair
repair(open_damaged(Path(sys.argv[1])), Depth(full=True, merges=0))
"""


def damaged(root: Path) -> tuple[Counter[bytes], dict[Path, bytes]]:
    """Damage one thing of each kind; return the lines and the objects that can come back."""
    before = lines(root)
    with Pool.open(root) as pool:
        path = pool.registry.objects.path(pool.registry.one(
            "partition", digest=pool.registry.resolve("partition", "alpha"))["content"])  # fmt: skip
        garbage = pool.registry.objects.path(pool.registry.objects.put(b"garbage"))
    data = path.read_bytes()
    flip(path, 1)
    flip(garbage, 1)
    flip(largest(root), 700)
    flip(root / "FORMAT", 3)
    flip(root / "catalog.duckdb", 9000)
    return before, {path: data}


@pytest.mark.slow
@pytest.mark.campaign
def test_a_repair_that_was_killed_is_finished_by_the_next(root, tmp_path):
    traced = Path(shutil.copytree(root, tmp_path / "traced"))
    damaged(traced)
    environment = {**os.environ, "POOLREG_FAULT": "trace"}
    command = [sys.executable, "-c", DAMAGE]
    told = subprocess.run([*command, traced], env=environment, text=True, capture_output=True,
                          check=True, timeout=120)  # fmt: skip
    steps = [step for step in told.stderr.split() if step.startswith(("repair.", "journal."))]
    assert {"repair.move", "repair.moved", "repair.copy", "repair.marker", "repair.segment",
            "repair.write", "repair.catalog", "repair.object", "journal.adopt", "journal.adopted",
            "journal.drop"} <= set(steps)  # fmt: skip
    for step in sorted(set(steps)):
        copy = Path(shutil.copytree(root, tmp_path / step))
        before, objects = damaged(copy)
        killed = {**os.environ, "POOLREG_FAULT": f"{step}@1=kill"}
        assert subprocess.run([*command, copy], env=killed, check=False, timeout=120,
                              capture_output=True).returncode == -9  # fmt: skip
        assert repaired(copy, full=True, merges=0).findings == ()
        assert lines(copy).keys() == before.keys(), step
        assert {path: path.read_bytes() for path in objects} == objects
        whole(copy)


# -- salvage ---------------------------------------------------------------------------------

BODIES = st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=9), max_size=4)


@settings(max_examples=100, deadline=None)
@given(st.lists(BODIES, min_size=1, max_size=4), st.data())
def test_any_one_bit_of_a_line_is_found(bodies, data):
    written = [Record("x", sha256(b"x"), body, {}, "t").line() for body in bodies]
    number = data.draw(st.integers(0, len(written) - 1))
    line = bytearray(written[number])
    position = data.draw(st.integers(0, len(line) - 1))
    line[position] ^= 1 << data.draw(st.integers(0, 7))
    assert salvage(bytes(line)) == [written[number]]


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=300), st.data())
def test_what_cannot_be_sure_is_not_made_up(garbage, data):
    assert salvage(garbage) == []
    line = Record("x", "y", {"text": "the cat"}, {}, "t").line()
    cut = data.draw(st.integers(0, len(line) - 2))
    assert salvage(line[:cut]) == []


@given(st.binary(min_size=1, max_size=200), st.data())
def test_the_flipped_bit(content, data):
    import binascii

    position, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    changed = bytearray(content)
    changed[position] ^= 1 << bit
    wrong = binascii.crc32(content) ^ binascii.crc32(changed)
    assert flipped_bit(len(content), wrong) == (position, bit)
