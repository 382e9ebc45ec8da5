"""What a pool promises when things go wrong: kills, writers at once, full and read-only disks."""

import contextlib
import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import duckdb
import pytest

from poolreg.canonical import digest_of
from poolreg.errors import StorageError
from poolreg.store import records
from poolreg.store.journal import Record
from poolreg.store.registry import Registry
from poolreg.text import partitions as data

DEADLINE = 60.0  # seconds after which a process that should go on is taken for hung

# argv: pool, writer's label, records to write (0: without end), seed.
WRITER = """
import random, sys
from pathlib import Path
from poolreg.store import records
from poolreg.canonical import digest_of
from poolreg.store.registry import Registry

root, writer, count, draw = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), random.Random(sys.argv[4])
registry = Registry.open(root)
number = 0
while not count or number < count:
    label, objects = f"w{writer}-{number}", {}
    content = draw.randbytes(draw.choice([10, 3000, 400_000]))
    with registry.writing():
        if draw.random() < 0.3:
            source = root.parent / f"source-{writer}"
            source.write_bytes(content)
            stored = registry.objects.put_file(source)
            objects[stored] = len(content)
        else:
            stored = registry.put(content, objects)
        body = {
            "subject": label, "evalset": "e", "protocol": "p", "nll": 1.5, "tokens": 1, "bytes": 1,
            "documents": 1, "seconds": 0.0, "device": "cpu", "document_scores": stored,
            "token_scores": None,
        }
        evaluation = records.keyed("evaluation", digest_of({"of": label}), body, objects)
        name = records.name("evalset", label, evaluation.id)
        registry.record(evaluation, name)
    print(label, evaluation.id, name.id, flush=True)
    number += 1
    if draw.random() < 0.15:
        registry.catalog.refresh()
registry.close()
"""


@pytest.fixture
def registry(tmp_path):
    with contextlib.closing(Registry.create(tmp_path / "pool")) as opened:
        yield opened


def start(registry: Registry, writer: object, *, count: int, output: Path) -> subprocess.Popen:
    """Start a writing process; its acknowledgements go to a file, so it never waits for us."""
    words = [sys.executable, "-c", WRITER, registry.root, writer, count, f"seed {writer}"]
    with open(output, "wb") as out, open(output.with_suffix(".err"), "wb") as err:
        return subprocess.Popen([str(word) for word in words], stdout=out, stderr=err)


def acknowledged(output: Path) -> list[list[str]]:
    """The label, evaluation and naming of each acknowledged append; a torn last line is none."""
    whole, _, _ = output.read_text().rpartition("\n")
    return [line.split() for line in whole.splitlines()]


def journal_records(registry: Registry) -> list[Record]:
    return [
        record
        for segment, size in registry.journal.segments().items()
        for record, _ in registry.journal.read(segment, 0, size)
    ]


def journal_bytes(registry: Registry) -> dict[str, bytes]:
    """The segments that hold anything; one that was begun and taken back is empty."""
    contents = {path.name: path.read_bytes() for path in registry.journal.folder.iterdir()}
    return {name: content for name, content in contents.items() if content}


def column(registry: Registry, sql: str) -> list:
    registry.catalog.refresh()
    with duckdb.connect(registry.root / "catalog.duckdb", read_only=True) as connection:
        return [row[0] for row in connection.execute(sql).fetchall()]


def check_all_there(registry: Registry, acks: list[list[str]]) -> None:
    """Every acknowledged record is in the journal once and in the catalog, with its object."""
    found = journal_records(registry)
    times = Counter(record.id for record in found)
    evaluations = set(column(registry, "SELECT digest FROM evaluations"))
    namings = set(column(registry, "SELECT record FROM names"))
    names = registry.names("evalset")
    for label, evaluation, naming in acks:
        assert times[evaluation] == times[naming] == 1
        assert evaluation in evaluations
        assert naming in namings
        assert names[label] == evaluation
    # What was not acknowledged may be there as well, but then it is whole too.
    assert evaluations == {r.id for r in found if r.kind == "evaluation"}
    assert namings == {r.id for r in found if r.kind == "name"}
    assert set(names.values()) <= evaluations
    for record in found:
        for digest, size in record.objects.items():
            registry.objects.check(digest)
            assert registry.objects.path(digest).stat().st_size == size


# -- kills and writers at once ------------------------------------------------------------------


def killed_round(registry: Registry, writer: int, wait: float) -> list[list[str]]:
    """Kill a writer `wait` seconds after its first acknowledgement; return what it had told."""
    output = registry.root.parent / f"acks-{writer}"
    process = start(registry, writer, count=0, output=output)
    try:
        deadline = time.monotonic() + DEADLINE
        while not acknowledged(output):
            assert process.poll() is None, output.with_suffix(".err").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(wait)
    finally:
        process.kill()
        code = process.wait()
    assert code == -signal.SIGKILL, output.with_suffix(".err").read_text()
    return acknowledged(output)


@pytest.mark.slow
def test_killed_writers_lose_nothing_that_was_acknowledged(registry):
    draw, acks = random.Random(7), []
    for writer in range(12):
        acks += killed_round(registry, writer, draw.uniform(0.05, 0.4))
        if writer % 4 == 3:
            check_all_there(registry, acks)
    assert len(acks) >= 12
    # Whatever the kills left in tmp, leave the worst of it: a catalog and an object half written.
    tmp = registry.root / "tmp"
    (tmp / "catalog.tmp").write_bytes(b"half a catalog")
    (tmp / "catalog.tmp.wal").write_bytes(b"half a log")
    (tmp / f".{acks[0][1][:40]}.1.00000000.tmp").write_bytes(b"half an object")
    last = registry.root.parent / "acks-last"
    writer = start(registry, "last", count=10, output=last)
    assert writer.wait(DEADLINE) == 0, last.with_suffix(".err").read_text()
    assert len(acknowledged(last)) == 10
    check_all_there(registry, acks + acknowledged(last))
    registry.close()
    (registry.root / "catalog.duckdb").unlink()
    check_all_there(registry, acks + acknowledged(last))
    assert registry.resolve("evalset", acks[0][0]) == acks[0][1]


@pytest.mark.slow
def test_two_writers_and_a_reader_at_once(registry):
    count = 60
    outputs = [registry.root.parent / f"acks-{writer}" for writer in "ab"]
    writers = [
        start(registry, output.name, count=count, output=output.with_name(output.name))
        for output in outputs
    ]
    seen, deadline = [0], time.monotonic() + DEADLINE
    try:
        while any(writer.poll() is None for writer in writers):
            assert time.monotonic() < deadline
            told = sum(len(acknowledged(output)) for output in outputs)
            seen.append(len(registry.names("evalset")))
            assert seen[-1] >= max(told, seen[-2])  # what was told is seen, and stays
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    for writer, output in zip(writers, outputs, strict=True):
        assert writer.returncode == 0, output.with_suffix(".err").read_text()
        assert output.with_suffix(".err").read_text() == ""
    acks = [ack for output in outputs for ack in acknowledged(output)]
    assert len(acks) == len(registry.names("evalset")) == 2 * count
    check_all_there(registry, acks)
    assert list((registry.root / "tmp").iterdir()) == []


def test_a_forked_child_and_its_parent_both_write(registry):
    def write(label: str) -> None:
        registry.record(records.name("evalset", label, digest_of({"of": label})))

    write("before")
    assert set(registry.names("evalset")) == {"before"}  # the catalog is open when we fork
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            for number in range(10):
                write(f"child-{number}")
            code = 0 if len(registry.names("evalset")) >= 11 else 2
        os._exit(code)
    for number in range(10):
        write(f"parent-{number}")
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    expected = {"before"} | {f"{who}-{n}" for who in ("child", "parent") for n in range(10)}
    assert set(registry.names("evalset")) == expected
    contents = sorted(journal_bytes(registry).values(), key=len)
    assert [content.count(b"\n") for content in contents] == [10, 11]
    assert b'"child-0"' in contents[0]
    assert b'"child-' not in contents[1]


# -- full and read-only disks -------------------------------------------------------------------


def mount(*words: object) -> None:
    """Run mount, or skip where this machine does not let us."""
    if not shutil.which("mount") or os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount("-t", "tmpfs", "-o", "size=16m", "tmpfs", place)
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def small_pool(small_disk):
    """A pool on the small disk that holds one evalset, `first`."""
    with contextlib.closing(Registry.create(small_disk / "pool")) as opened:
        add(opened, "first", 1000)
        opened.catalog.refresh()
        yield opened


def add(registry: Registry, name: str, size: int) -> data.Added:
    """Add an evalset of one document that does not compress, of `size` bytes."""
    path = registry.root.parents[1] / f"{name}.txt"
    path.write_text(random.Random(name).randbytes(size // 2).hex())
    return data.add_evalset(registry, name, [path])


def fill(disk: Path, free: int) -> Path:
    """Fill the disk but for about `free` bytes; return the file to delete."""
    filler = disk / "filler"
    with open(filler, "wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while file.write(bytes(4096)) == 4096:
                pass
        file.truncate(max(0, file.tell() - free))
    return filler


def test_an_evalset_too_large_for_the_disk(small_pool, small_disk):
    journal = journal_bytes(small_pool)
    catalog = (small_pool.root / "catalog.duckdb").read_bytes()
    filler = fill(small_disk, free=1_200_000)
    for _ in range(2):
        with pytest.raises(StorageError) as caught:
            add(small_pool, "large", 1_500_000)
        assert caught.value.__cause__.errno == errno.ENOSPC
        assert "free some disk space" in caught.value.hint
        assert journal_bytes(small_pool) == journal
        assert (small_pool.root / "catalog.duckdb").read_bytes() == catalog
        assert list((small_pool.root / "tmp").iterdir()) == []
        assert list(small_pool.names("evalset")) == ["first"]
        with contextlib.closing(Registry.open(small_pool.root)) as again:
            first = again.resolve("evalset", "first")
            assert len(data.evalset_documents(again, first)[0]) == 1000
    filler.unlink()
    added = add(small_pool, "large", 1_500_000)
    assert added.new
    assert small_pool.resolve("evalset", "large") == added.digest
    assert len(data.evalset_documents(small_pool, added.digest)[0]) == 1_500_000


@pytest.mark.parametrize("fresh", [False, True])
def test_an_append_that_finds_the_disk_full_is_taken_back(small_pool, small_disk, fresh):
    pool = Registry.open(small_pool.root) if fresh else small_pool
    before = journal_bytes(pool)
    filler = fill(small_disk, free=40_000)
    large = records.fact("of a later version", {"text": "x" * 200_000})
    with pytest.raises(StorageError) as caught:
        pool.record(large)
    assert "free some disk space" in caught.value.hint
    assert journal_bytes(pool) == before
    # What fits goes on being written, and the refused record left no trace before it.
    small = records.name("evalset", "second", pool.names("evalset")["first"])
    pool.record(small)
    filler.unlink()
    pool.record(large)
    ids = [record.id for record in journal_records(pool)]
    assert ids.count(small.id) == ids.count(large.id) == 1
    assert set(pool.names("evalset")) == {"first", "second"}
    pool.close()


@pytest.mark.parametrize("free", [0, 100_000, 300_000, 500_000])
def test_a_catalog_that_finds_the_disk_full_is_brought_up_later(small_pool, small_disk, free):
    target = small_pool.names("evalset")["first"]
    labels = [f"n{number}" for number in range(4000)]
    small_pool.record(*(records.name("evalset", label, target) for label in labels))
    published = (small_pool.root / "catalog.duckdb").read_bytes()
    filler = fill(small_disk, free=free)
    with pytest.raises(StorageError) as caught:
        small_pool.names("evalset")
    assert "space" in caught.value.hint
    assert (small_pool.root / "catalog.duckdb").read_bytes() == published
    assert list((small_pool.root / "tmp").iterdir()) == []
    filler.unlink()
    assert set(small_pool.names("evalset")) == {"first", *labels}


def test_reading_a_read_only_pool(small_pool, small_disk, cli_run):
    digest = small_pool.names("evalset")["first"]
    small_pool.close()
    mount("-o", "remount,ro", small_disk)
    with contextlib.closing(Registry.open(small_pool.root)) as pool:
        assert pool.resolve("evalset", "first") == pool.resolve("evalset", digest[:8]) == digest
        assert len(data.evalset_documents(pool, digest)[0]) == 1000
        assert pool.catalog.sandbox("SELECT digest FROM evalsets").rows == [(digest,)]
        with pytest.raises(StorageError, match="Read-only"):
            add(pool, "second", 1000)
        with pytest.raises(StorageError) as caught:
            pool.remove("evalset", "first")
        assert "read-only" in caught.value.hint
    assert "first" in cli_run("ls", "--pool", small_pool.root).output
