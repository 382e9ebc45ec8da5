import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poolreg.canonical import sha256
from poolreg.errors import Damage, NotFound, StorageError
from poolreg.store import objects as module
from poolreg.store.objects import ObjectStore


@pytest.fixture
def store(tmp_path):
    return made_store(tmp_path)


def made_store(folder: Path) -> ObjectStore:
    (folder / "objects").mkdir(parents=True)
    (folder / "tmp").mkdir()
    return ObjectStore(folder / "objects", folder / "tmp")


def stored(store: ObjectStore) -> set[str]:
    found = [p for p in store.folder.rglob("*") if p.is_file()]
    return {path.parent.name + path.name for path in found}


def leftovers(store: ObjectStore) -> list[Path]:
    return list(store.staging.iterdir())


def overwrite(path: Path, data: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(data)


@settings(max_examples=25)
@given(st.lists(st.binary(max_size=2000), max_size=6))
def test_round_trip(tmp_path_factory, contents):
    store = made_store(tmp_path_factory.mktemp("store"))
    digests = [store.put(data) for data in contents]
    assert digests == [hashlib.sha256(data).hexdigest() for data in contents]
    assert [store.read(digest) for digest in digests] == contents
    assert stored(store) == set(digests)
    assert not leftovers(store)


def test_the_place_of_an_object(store):
    digest = store.put(b"abc")
    path = store.path(digest)
    assert path == store.folder / digest[:2] / digest[2:]
    assert path.read_bytes() == b"abc"
    assert path.stat().st_mode & 0o777 == 0o444
    assert store.has(digest)
    assert store.existing(digest) == path
    store.check(digest)


def test_writing_again_only_renews_the_time(store, tmp_path):
    digest = store.put(b"abc")
    os.utime(store.path(digest), (1e9, 1e9))
    before = store.path(digest).stat()
    (tmp_path / "x").write_bytes(b"abc")
    assert store.put(b"abc") == store.put_file(tmp_path / "x") == digest
    after = store.path(digest).stat()
    assert (before.st_ino, before.st_mtime) == (after.st_ino, 1e9)
    assert after.st_mtime > 1.5e9  # it is new again to a collection with a grace
    assert not leftovers(store)


@pytest.mark.parametrize("size", [0, 1, (1 << 22) - 1, 1 << 22, (1 << 23) + 5])
def test_files_of_any_size(store, tmp_path, size):
    data = os.urandom(size)
    (tmp_path / "x").write_bytes(data)
    told = []
    digest = store.put_file(tmp_path / "x", expect=sha256(data), progress=told.append)
    assert digest == sha256(data)
    assert store.read(digest) == data
    assert sum(told) == size
    assert store.path(digest).stat().st_mode & 0o777 == 0o444
    assert (tmp_path / "x").read_bytes() == data
    assert not leftovers(store)


def test_another_digest_than_expected_leaves_nothing(store, tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    with pytest.raises(Damage, match=r"changed in .*x") as caught:
        store.put_file(tmp_path / "x", expect="0" * 64)
    assert caught.value.exit_code == 3
    assert not stored(store)
    assert not leftovers(store)


def test_a_short_write_is_continued(store, tmp_path, monkeypatch):
    data, pwrite = os.urandom(100_000), os.pwrite
    (tmp_path / "x").write_bytes(data)
    monkeypatch.setattr(os, "pwrite", lambda file, part, at: pwrite(file, part[:7777], at))
    assert store.put_file(tmp_path / "x") == sha256(data)
    assert store.read(sha256(data)) == data


def test_a_copy_that_shares_blocks_is_what_is_hashed(store, tmp_path, monkeypatch):
    """As on XFS or Btrfs: the file may change while it is hashed, its clone does not."""
    data = os.urandom(100_000)
    (tmp_path / "x").write_bytes(data)

    def clone(_, target):
        os.pwrite(target, data, 0)
        (tmp_path / "x").write_bytes(b"something else")
        return True

    monkeypatch.setattr(module, "clone", clone)
    assert store.put_file(tmp_path / "x") == sha256(data)
    assert store.read(sha256(data)) == data


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
def test_a_failing_disk_leaves_nothing(store, tmp_path, monkeypatch, step):
    (tmp_path / "x").write_bytes(b"abc")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os if step == "fsync" else Path, step, fail)
        with pytest.raises(StorageError, match="No space left"):
            store.put(b"abc")
        with pytest.raises(StorageError, match="No space left"):
            store.put_file(tmp_path / "x")
    assert not stored(store)
    assert not leftovers(store)
    assert store.read(store.put(b"abc")) == b"abc"


def test_a_missing_source(store, tmp_path):
    with pytest.raises(StorageError, match="No such file"):
        store.put_file(tmp_path / "nothing")
    assert not leftovers(store)


@settings(max_examples=30)
@given(st.binary(min_size=1, max_size=300), st.data())
def test_every_flipped_bit_is_found(tmp_path_factory, data, draw):
    store = made_store(tmp_path_factory.mktemp("store"))
    digest = store.put(data)
    bit = draw.draw(st.integers(0, 8 * len(data) - 1))
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    overwrite(store.path(digest), changed)
    for look in (store.read, store.check):
        with pytest.raises(Damage, match=digest[:12]) as caught:
            look(digest)
        assert caught.value.data["digest"] == digest


@pytest.mark.parametrize("changed", [b"some byte", b"some bytes\0", b""])
def test_a_changed_length_is_found(store, changed):
    digest = store.put(b"some bytes")
    overwrite(store.path(digest), changed)
    for look in (store.read, store.check):
        with pytest.raises(Damage):
            look(digest)


def test_what_is_not_here(store):
    for look in (store.read, store.check, store.existing):
        with pytest.raises(NotFound, match="not in this pool"):
            look("ab" * 32)
    assert not store.has("ab" * 32)


@pytest.mark.parametrize(
    "digest", ["", "..", "../" * 20, "a" * 63, "A" * 64, "ab" * 31 + "/x", "ab" * 32 + "\n"]
)
def test_only_digests_name_objects(store, digest):
    for look in (store.read, store.check, store.existing, store.has, store.path):
        with pytest.raises(NotFound, match="not a digest"):
            look(digest)


def test_a_failing_read_is_a_storage_error(store, monkeypatch):
    digest = store.put(b"abc")

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", fail)
    monkeypatch.setattr(hashlib, "file_digest", fail)
    for look in (store.read, store.check):
        with pytest.raises(StorageError, match="Input/output error"):
            look(digest)


PUTS = """
import sys, random
from pathlib import Path
from poolreg.store.objects import ObjectStore
folder, seed = Path(sys.argv[1]), int(sys.argv[2])
store = ObjectStore(folder / "objects", folder / "tmp")
numbers = list(range(60))
random.Random(seed).shuffle(numbers)
for number in numbers:
    data = b"%d" % number * 3000
    if number % 2:
        store.put(data)
    else:
        (folder / f"{seed}-{number}").write_bytes(data)
        store.put_file(folder / f"{seed}-{number}")
"""


def test_processes_that_put_the_same_at_once(store, tmp_path):
    command = [sys.executable, "-c", PUTS, str(tmp_path)]
    children = [subprocess.Popen([*command, str(seed)]) for seed in range(3)]
    assert [child.wait() for child in children] == [0, 0, 0]
    contents = [b"%d" % number * 3000 for number in range(60)]
    assert stored(store) == {sha256(data) for data in contents}
    for data in contents:
        assert store.read(sha256(data)) == data
    assert not leftovers(store)
