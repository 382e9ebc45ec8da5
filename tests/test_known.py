"""Hashes that are remembered: used for unchanged files, and never for any other."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from poolreg.canonical import sha256
from poolreg.errors import Refused
from poolreg.tensors import write_file
from poolreg.weights import checkpoint as module
from poolreg.weights import hashing, known
from poolreg.weights.checkpoint import digest_of_weights, fingerprint, read_checkpoint
from poolreg.weights.known import Seen


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of its own, that remembers files however new they are and wherever they lie."""
    monkeypatch.setenv("POOLREG_CACHE", str(tmp_path / "cache"))
    trusting(monkeypatch)
    return tmp_path / "cache" / "hashes"


def trusting(monkeypatch) -> None:
    monkeypatch.setattr(known, "REST", -1e9)
    monkeypatch.setattr(known, "_file_system", lambda _: "ext4")


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    arrays = {name: ("F32", np.arange(3, dtype="f4")) for name in "abc"}
    write_file(folder / "model.safetensors", arrays)
    return folder


@pytest.fixture
def hashed(monkeypatch) -> list[Path]:
    """The files that are hashed from now on."""
    files, real = [], module.hash_tensors

    def counted(work, **options):
        files.extend(path for path, _ in work)
        return real(work, **options)

    monkeypatch.setattr(module, "hash_tensors", counted)
    return files


def digest(folder: Path) -> str:
    """The digest by way of the cache; it is always the one of the bytes."""
    checkpoint = read_checkpoint(folder)
    found = digest_of_weights(checkpoint)
    assert found == fingerprint(checkpoint).digest
    return found


def test_unchanged_files_are_hashed_once(cache, folder, hashed):
    told: list[int] = []
    assert digest(folder) == digest(folder)
    assert digest_of_weights(read_checkpoint(folder), progress=told.append)
    assert len(hashed) == 1
    assert told == [36]
    (entry,) = cache.iterdir()
    check, text = entry.read_text().split("\n")
    assert check == sha256(text.encode())
    assert json.loads(text).keys() == set("abc")
    assert cache.stat().st_mode & 0o777 == 0o700


def rewrite(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def same_times(path: Path) -> None:
    before = path.stat()
    rewrite(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(path: Path) -> None:
    before = path.stat()
    shutil.copy2(path, path.with_suffix(".new"))
    rewrite(path.with_suffix(".new"))
    os.utime(path.with_suffix(".new"), ns=(before.st_atime_ns, before.st_mtime_ns))
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize("change", [rewrite, same_times, replaced])
def test_changed_files_are_hashed_again(cache, folder, hashed, change):
    before = digest(folder)
    change(folder / "model.safetensors")
    assert digest(folder) != before
    assert len(hashed) == 2


@contextlib.contextmanager
def mapped(path: Path):
    """What a process that has mapped a file writes to it, before the system brings it to a disk."""
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[-1] ^= 1
        yield memory


def test_files_that_are_mapped_to_write_are_hashed_again(folder, tmp_path, hashed, monkeypatch):
    """As long as a page is not on the disk, it can be written again without a change of times."""
    monkeypatch.setenv("POOLREG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(known, "REST", -1e9)
    with mapped(folder / "model.safetensors") as memory:
        before = digest(folder)
        memory[-1] ^= 1
        assert digest(folder) != before


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no such file system here")
def test_where_times_do_not_tell_of_changes_nothing_is_remembered(folder, hashed, monkeypatch):
    """In memory alone there is nothing to bring to a disk, so times stay."""
    import tempfile

    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        monkeypatch.setenv("POOLREG_CACHE", str(Path(name, "cache")))
        monkeypatch.setattr(known, "REST", -1e9)
        shutil.copytree(folder, Path(name, "model"))
        with mapped(Path(name, "model", "model.safetensors")) as memory:
            before = digest(Path(name, "model"))
            memory[-1] ^= 1
            assert digest(Path(name, "model")) != before
        assert not Path(name, "cache").exists()


@pytest.mark.parametrize("mounts", ["", "7 1 0:5 / / rw - nfs4 server:/x rw\n", None])
def test_where_the_kind_of_a_file_system_is_not_told(cache, folder, hashed, monkeypatch, mounts):
    monkeypatch.undo()
    monkeypatch.setenv("POOLREG_CACHE", str(cache.parent))
    monkeypatch.setattr(known, "REST", -1e9)
    real = known._read
    told = {"/proc/self/mountinfo": mounts or ""}

    def read(path: Path) -> str:
        if path.parent.name == "fdinfo":
            return "pos: 0\n" if mounts is None else "pos: 0\nmnt_id:\t7\nino: 3\n"
        return told.get(str(path)) if str(path) in told else real(path)

    monkeypatch.setattr(known, "_read", read)
    assert digest(folder) == digest(folder)
    assert not cache.exists()
    told["/proc/self/mountinfo"] = "6 1 0:4 / /x rw - tmpfs x rw\n7 1 0:5 / / rw a:1 - xfs x rw\n"
    if mounts is not None:
        assert digest(folder) == digest(folder)
        assert len(list(cache.iterdir())) == 1


def test_what_has_just_changed_is_not_remembered(cache, folder, hashed, monkeypatch):
    monkeypatch.setattr(known, "REST", 60.0)
    assert digest(folder) == digest(folder)
    assert len(hashed) == 2
    assert not cache.exists()


def test_what_was_hashed_before_the_system_was_started_is_hashed_again(
    cache, folder, hashed, monkeypatch, tmp_path
):
    """Devices have other numbers then, and what was written before a power cut may have old times."""
    assert digest(folder)
    (tmp_path / "boot").write_text("another")
    monkeypatch.setattr(known, "_BOOT", tmp_path / "boot")
    assert digest(folder)
    assert len(hashed) == 2
    monkeypatch.setattr(known, "_BOOT", tmp_path / "nothing")
    assert digest(folder) == digest(folder)
    assert len(hashed) == 4


def test_what_changes_after_it_was_hashed_is_not_remembered(cache, folder, monkeypatch):
    real = module.hash_tensors

    def touched(work, **options):
        found = real(work, **options)
        os.utime(work[0][0])
        return found

    monkeypatch.setattr(module, "hash_tensors", touched)
    assert digest(folder)
    assert not cache.exists()


@pytest.mark.parametrize("foreign", ["writable", "other user", "link"])
def test_what_others_may_have_written_counts_for_nothing(cache, folder, hashed, foreign, tmp_path):
    digest(folder)
    (entry,) = cache.iterdir()
    if foreign == "writable":
        cache.chmod(0o777)
    elif foreign == "link":
        cache.rename(tmp_path / "elsewhere")
        cache.symlink_to(tmp_path / "elsewhere")
    elif os.geteuid() == 0:
        os.chown(cache, 12345, -1)
    else:
        pytest.skip("only root can give files away")
    text = json.dumps(dict.fromkeys("abc", "0" * 64), separators=(",", ":"))
    (cache / entry.name).write_text(f"{sha256(text.encode())}\n{text}")
    digest(folder)
    assert len(hashed) == 2
    assert (cache / entry.name).read_text().endswith(text)


def test_models_with_values_that_are_not_finite_are_always_refused(cache, folder):
    bad = np.array([1, np.nan], "f4")
    write_file(folder / "model.safetensors", {"a": ("F32", bad)})
    for _ in range(2):
        with pytest.raises(Refused, match="NaN or infinite"):
            digest_of_weights(read_checkpoint(folder))
    assert not cache.exists()


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 300), byte=st.integers(1, 255), cut=st.booleans())
def test_entries_that_were_damaged_count_for_nothing(cache, folder, hashed, place, byte, cut):
    digest(folder)
    (entry,) = cache.iterdir()
    data = bytearray(entry.read_bytes())
    place %= len(data)
    data[place] ^= byte
    entry.write_bytes(data[: place if cut else None])
    before = len(hashed)
    digest(folder)
    assert len(hashed) == before + 1


def test_the_oldest_entries_go(cache, folder, monkeypatch):
    monkeypatch.setattr(known, "MAX_ENTRIES", 3)
    path = folder / "model.safetensors"
    cache.mkdir(parents=True)
    os.utime(cache, (0, 0))
    (cache / "mine.txt").write_text("not of the cache")
    os.utime(cache / "mine.txt", (0, 0))
    for second in range(6):
        os.utime(path, (second, second))
        Seen.of(path).remember(path, {"a": "0" * 64})
    assert len(list(cache.iterdir())) == 4
    assert (cache / "mine.txt").exists()
    assert Seen.of(path).recall("a") == {"a": "0" * 64}
    assert Seen.of(path).recall("ab") is None


@pytest.mark.parametrize("place", ["", "/proc/nowhere", "file/below"])
def test_without_a_place_nothing_is_remembered(folder, hashed, tmp_path, monkeypatch, place):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    trusting(monkeypatch)
    monkeypatch.setenv("POOLREG_CACHE", place)
    assert digest(folder) == digest(folder)
    assert len(hashed) == 2


def test_the_place_follows_the_convention(folder, tmp_path, monkeypatch):
    trusting(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("POOLREG_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    digest(folder)
    assert len(list((tmp_path / "home/.cache/poolreg/hashes").iterdir())) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    digest(folder)
    assert len(list((tmp_path / "xdg/poolreg/hashes").iterdir())) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    digest(folder)
    assert not (tmp_path / "relative").exists()


def test_users_without_a_home_do_without(folder, hashed, monkeypatch):
    def homeless(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    trusting(monkeypatch)
    monkeypatch.delenv("POOLREG_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", homeless)
    assert digest(folder) == digest(folder)
    assert len(hashed) == 2


# -- files that change meanwhile ------------------------------------------------------------------


def test_a_file_that_is_replaced_between_two_of_its_parts_is_refused(folder, monkeypatch):
    """Parts are hashed by threads that open the file themselves: they must see one file."""
    monkeypatch.setattr(hashing, "_BATCH", 1)
    path = folder / "model.safetensors"
    checkpoint = read_checkpoint(folder)

    def replace_it(_: int) -> None:
        write_file(path, {name: ("F32", np.ones(3, "f4")) for name in "abc"})

    with pytest.raises(Refused, match="changed while it was read"):
        digest_of_weights(checkpoint, threads=1, progress=replace_it)


@pytest.mark.parametrize("own", [True, False])
def test_threads_and_their_memory_are_bounded(own, folder, monkeypatch):
    """A machine of hundreds of cores does not hold hundreds of buffers."""
    monkeypatch.setattr(hashing, "_HANDED_OVER", 0 if own else 1 << 40)
    buffers = []

    class Counted(hashing._Crew):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            buffers.append((threading.active_count(), len(self._ring)))

    monkeypatch.setattr(hashing, "_Crew", Counted)
    (path,) = read_checkpoint(folder).weight_files
    infos = [info for _, info in read_checkpoint(folder).tensors.values()]
    hashing.hash_files([(path, infos)] * 100, threads=1000)
    assert {ring for _, ring in buffers} == {3 if own else 1}
    assert max(count for count, _ in buffers) <= threading.active_count() + 16 * 3
