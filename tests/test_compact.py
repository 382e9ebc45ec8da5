"""Compaction of the journal: the same records, in fewer files, whatever happens meanwhile."""

from __future__ import annotations

import binascii
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from poolreg import faults
from poolreg.canonical import digest_of
from poolreg.errors import Damage, Locked, StorageError, UnknownFormat
from poolreg.store import records
from poolreg.store.registry import Registry
from poolreg.upkeep import compact as module
from poolreg.upkeep.compact import compact


@pytest.fixture
def registry(tmp_path):
    with contextlib.closing(Registry.create(tmp_path / "pool")) as opened:
        yield opened


def name(label: str) -> records.Record:
    return records.name("evalset", label, digest_of(label))


def written(registry: Registry, *batches: list[str]) -> list[str]:
    """Write each batch of names as a process of its own would; return all of them."""
    for batch in batches:
        with contextlib.closing(Registry.open(registry.root)) as writer:
            writer.record(*map(name, batch))
    return [label for batch in batches for label in batch]


def lines(registry: Registry) -> Counter[bytes]:
    files = registry.journal.folder.iterdir()
    return Counter(line for file in files for line in file.read_bytes().splitlines(keepends=True))


def files(registry: Registry) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in registry.journal.folder.iterdir()}


def test_many_segments_become_one_with_the_same_lines(registry):
    labels = written(registry, ["a", "b"], ["c"], ["d", "e", "f"])
    before = lines(registry)
    done = compact(registry)
    assert (done.segments_before, done.segments, done.records, done.repeated) == (3, 1, 6, 0)
    assert done.bytes == done.bytes_before == sum(map(len, before))
    assert lines(registry) == before
    assert set(registry.names("evalset")) == set(labels)
    assert registry.catalog.differences() == {}
    assert not list((registry.root / "tmp").iterdir())
    assert compact(registry).segments_before == 1  # nothing left to do
    assert lines(registry) == before


def test_the_catalog_is_not_indexed_again(registry, monkeypatch):
    written(registry, ["a"], ["b"])
    registry.names("evalset")
    monkeypatch.setattr(
        "poolreg.store.indexing.index", lambda *_, **__: pytest.fail("nothing is new")
    )
    compact(registry)
    assert set(registry.names("evalset")) == {"a", "b"}


def test_without_a_catalog(registry):
    labels = written(registry, ["a"], ["b"])
    registry.catalog.path.unlink(missing_ok=True)
    compact(registry)
    registry.close()
    registry.catalog.path.unlink()
    assert set(registry.names("evalset")) == set(labels)


def test_repeats_and_torn_ends_are_left_behind(registry):
    written(registry, ["a"], ["b"])
    one, other = sorted(registry.journal.folder.iterdir())
    (registry.journal.folder / "again.jsonl").write_bytes(one.read_bytes() + other.read_bytes())
    (registry.journal.folder / "torn.jsonl").write_bytes(one.read_bytes()[:40])
    done = compact(registry)
    assert (done.records, done.repeated, done.segments) == (2, 2, 1)
    assert set(lines(registry).values()) == {1}
    assert set(registry.names("evalset")) == {"a", "b"}


def test_large_segments_stay(registry, monkeypatch):
    written(registry, ["a"] * 20, ["b"], ["c"])
    monkeypatch.setattr(module, "LARGE", 2000)
    large = [name for name, size in registry.journal.segments().items() if size >= 2000]
    before = files(registry)
    assert compact(registry).segments == 2
    assert len(large) == 1
    assert files(registry)[large[0]] == before[large[0]]


def test_a_writer_goes_on_after_its_segment_went(registry):
    registry.record(name("a"))
    written(registry, ["b"])
    with contextlib.closing(Registry.open(registry.root)) as other:
        compact(other)
    registry.record(name("c"))
    assert set(registry.names("evalset")) == {"a", "b", "c"}
    assert len(registry.journal.segments()) == 2


def test_readers_of_other_processes_see_no_loss(registry):
    written(registry, ["a"], ["b"])
    with contextlib.closing(Registry.open(registry.root)) as reader:
        assert set(reader.names("evalset")) == {"a", "b"}
        compact(registry)
        assert set(reader.names("evalset")) == {"a", "b"}
        written(registry, ["c"])
        compact(registry)
        assert set(reader.names("evalset")) == {"a", "b", "c"}


def test_a_writer_keeps_compaction_away(registry, monkeypatch):
    written(registry, ["a"], ["b"])
    before = files(registry)
    started, done = threading.Event(), threading.Event()

    def write() -> None:
        with contextlib.closing(Registry.open(registry.root)) as other, other.writing():
            started.set()
            done.wait(30)

    writer = threading.Thread(target=write)
    writer.start()
    started.wait(30)
    alone = Registry.alone
    monkeypatch.setattr(Registry, "alone", lambda self: alone(self, timeout=0.1))
    with pytest.raises(Locked):
        compact(registry)
    done.set()
    writer.join()
    assert files(registry) == before
    assert compact(registry).segments == 1


@pytest.mark.parametrize("what", ["flip", "newline", "version", "gone", "short"])
def test_damage_changes_nothing(registry, what):
    written(registry, ["a", "b"], ["c"])
    registry.names("evalset")
    path = min(registry.journal.folder.iterdir(), key=lambda path: -path.stat().st_size)
    data = bytearray(path.read_bytes())
    if what == "flip":
        data[30] ^= 1
    elif what == "newline":
        data[-1] ^= 1
    elif what == "version":
        record = json.dumps({"v": 9}).encode()
        data += b"%08x %s\n" % (binascii.crc32(record), record)
    elif what == "short":
        del data[len(data) // 2 + 1 :]
    path.unlink()
    if what != "gone":
        path.write_bytes(data)
    before = files(registry)
    with pytest.raises(UnknownFormat if what == "version" else Damage):
        compact(registry)
    assert files(registry) == before
    assert not list((registry.root / "tmp").iterdir())


STEPS = ["compact.write", "journal.adopt", "journal.adopted", "index.copy", "index.replace",
         "index.replaced", "journal.drop", "journal.drop@2"]  # fmt: skip
OFTEN = ("journal.adopted", "index.replaced", "journal.drop@2")  # kills in every run


KILLED = """
import sys
from pathlib import Path
from poolreg.store.registry import Registry
from poolreg.upkeep.compact import compact
compact(Registry.open(Path(sys.argv[1])))
"""


@pytest.mark.parametrize(
    ("step", "action"),
    [
        *((step, "EIO") for step in STEPS),
        *(
            pytest.param(step, "kill", marks=() if step in OFTEN else pytest.mark.campaign)
            for step in STEPS
        ),
    ],
)
def test_a_fault_at_any_step_loses_nothing(registry, monkeypatch, step, action):
    labels = written(registry, ["a", "b"], ["c"], ["d"])
    registry.names("evalset")
    before = lines(registry)
    if action == "kill":
        words = [sys.executable, "-c", KILLED, str(registry.root)]
        environment = {**os.environ, "POOLREG_FAULT": f"{step}=kill"}
        done = subprocess.run(words, env=environment, capture_output=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
    else:
        with monkeypatch.context() as patch:
            patch.setattr(faults, "_fault", faults._Fault.parse(f"{step}=EIO"))
            with pytest.raises(StorageError, match="Input/output error"):
                compact(registry)
    assert set(lines(registry)) == set(before)
    with contextlib.closing(Registry.open(registry.root)) as reader:
        assert set(reader.names("evalset")) == set(labels)
        assert reader.catalog.differences() == {}
        compact(reader)
        assert lines(reader) == before
        assert set(reader.names("evalset")) == set(labels)


def test_the_commands(cli_run, pool):
    root = Path(pool.root)
    with contextlib.closing(Registry.open(root)) as writer:
        writer.record(name("other"))
    with contextlib.closing(Registry.open(root)) as writer:
        writer.record(name("another"))
    before = lines(pool.registry)
    listed = json.loads(cli_run("journal", "ls", "--json", "--pool", root).output)
    assert {row["segment"]: row["bytes"] for row in listed} == pool.registry.journal.segments()
    assert "became 1" in cli_run("journal", "compact", "--pool", root).stderr
    assert "nothing to merge: 1 segment" in cli_run("journal", "compact", "--pool", root).stderr
    (done,) = json.loads(cli_run("journal", "compact", "--json", "--pool", root).output)
    assert done["segments"] == 1
    assert lines(pool.registry) == before
