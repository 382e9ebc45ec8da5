import errno
import functools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poolreg.errors import Locked, NoPool, Refused, StorageError
from poolreg.files import (
    lock,
    read_capped,
    staged,
    staged_folder,
    storage_errors,
    sync_file,
    sync_folder,
    write_atomic,
)


def inside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- atomic files ---------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.lists(st.binary(max_size=5000), min_size=1, max_size=4))
def test_the_last_write_counts(tmp_path_factory, contents):
    folder = tmp_path_factory.mktemp("files")
    for data in contents:
        write_atomic(folder / "x", data)
    assert (folder / "x").read_bytes() == contents[-1]
    assert inside(folder) == ["x"]


@pytest.mark.parametrize("mode", [0o644, 0o444, 0o600])
def test_the_mode_is_set(tmp_path, mode):
    write_atomic(tmp_path / "x", b"1", mode=mode)
    write_atomic(tmp_path / "x", b"2", mode=mode)  # a read-only file is replaced, too
    assert (tmp_path / "x").read_bytes() == b"2"
    assert (tmp_path / "x").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, NoPool])
@pytest.mark.parametrize("old", [None, b"old"])
def test_an_error_leaves_the_old_file(tmp_path, error, old):
    if old is not None:
        (tmp_path / "x").write_bytes(old)

    def write():
        with staged(tmp_path / "x") as file:
            file.write(b"new" * 100_000)
            raise error("stop")

    with pytest.raises(error):
        write()
    assert inside(tmp_path) == ([] if old is None else ["x"])
    assert old is None or (tmp_path / "x").read_bytes() == old


def test_the_target_is_untouched_until_the_end(tmp_path):
    (tmp_path / "tmp").mkdir()
    write_atomic(tmp_path / "x", b"old")
    with staged(tmp_path / "x", folder=tmp_path / "tmp") as file:
        file.write(b"new")
        file.flush()
        assert (tmp_path / "x").read_bytes() == b"old"
        assert len(inside(tmp_path / "tmp")) == 1  # the temporary file lives where it was told
    assert (tmp_path / "x").read_bytes() == b"new"
    assert inside(tmp_path / "tmp") == []


def test_two_writers_of_one_target(tmp_path):
    with staged(tmp_path / "x") as one, staged(tmp_path / "x") as other:
        one.write(b"one")
        other.write(b"other")
    assert (tmp_path / "x").read_bytes() == b"one"  # it ended last
    assert inside(tmp_path) == ["x"]


@pytest.mark.parametrize("name", ["x" * 255, "漢" * 85, "🙂" * 63])
def test_the_longest_names(tmp_path, name):
    write_atomic(tmp_path / name, b"1")
    with staged_folder(tmp_path / f"{name[:-1]}y") as folder:
        (folder / "a").write_bytes(b"2")
    assert inside(tmp_path) == sorted([name, f"{name[:-1]}y"])


def test_too_many_open_files_name_the_way_out():
    with pytest.raises(StorageError, match="ulimit -n"), storage_errors("merging"):
        raise OSError(errno.EMFILE, "Too many open files")


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
def test_a_failing_disk(tmp_path, monkeypatch, step):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    write_atomic(tmp_path / "x", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os if step == "fsync" else Path, step, fail)
        with pytest.raises(StorageError, match=r"writing x: No space left.*\n.*free some disk"):
            write_atomic(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"old"
    assert inside(tmp_path) == ["x"]


def test_both_file_and_folder_are_flushed(tmp_path, monkeypatch):
    flushed = []
    fsync = os.fsync

    def note(descriptor):
        flushed.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    write_atomic(tmp_path / "x", b"1")
    assert len(flushed) == 2
    assert flushed[0].endswith(".tmp")  # before the rename
    assert flushed[1] == str(tmp_path)  # after it


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.ENOSPC, "disk space"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "read-only"),
        (errno.EACCES, "permissions"),
        (errno.EIO, "check the disk"),
    ],
)
def test_storage_errors_name_the_way_out(number, hint):
    with pytest.raises(StorageError, match="doing it") as caught, storage_errors("doing it"):
        raise OSError(number, os.strerror(number))
    assert hint in caught.value.hint
    assert os.strerror(number) in caught.value.message
    assert caught.value.exit_code == 1


def test_storage_errors_leave_other_errors_alone():
    with pytest.raises(ZeroDivisionError), storage_errors("doing it"):
        raise ZeroDivisionError


def test_a_missing_folder_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError):
        write_atomic(tmp_path / "no" / "x", b"")
    with pytest.raises(StorageError), lock(tmp_path / "no" / "lock"):
        pass


# -- folders --------------------------------------------------------------------------------


def test_a_folder_is_whole_or_absent(tmp_path):
    with staged_folder(tmp_path / "out") as folder:
        (folder / "a").write_bytes(b"1")
        assert not (tmp_path / "out").exists()
    assert inside(tmp_path) == ["out"]
    assert inside(tmp_path / "out") == ["a"]

    def fail():
        with staged_folder(tmp_path / "other") as folder:
            (folder / "a").write_bytes(b"1")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert inside(tmp_path) == ["out"]


def test_a_full_folder_is_replaced_only_when_told(tmp_path):
    (tmp_path / "out").mkdir()
    with staged_folder(tmp_path / "out") as folder:  # an empty one is in nobody's way
        (folder / "old").write_bytes(b"1")
    with pytest.raises(StorageError), staged_folder(tmp_path / "out") as folder:
        (folder / "new").write_bytes(b"2")
    assert inside(tmp_path / "out") == ["old"]
    with staged_folder(tmp_path / "out", replace=True) as folder:
        (folder / "new").write_bytes(b"2")
    assert inside(tmp_path / "out") == ["new"]
    assert inside(tmp_path) == ["out"]


def test_flushing(tmp_path):
    sync_folder(tmp_path)
    (tmp_path / "x").write_bytes(b"1")
    sync_file(tmp_path / "x")
    with pytest.raises(FileNotFoundError):
        sync_file(tmp_path / "y")


# -- locks ----------------------------------------------------------------------------------


def test_one_exclusive_holder_at_a_time(tmp_path):
    path = tmp_path / "lock"
    with lock(path):
        with pytest.raises(Locked) as caught, lock(path, timeout=0.05, what="the thing"):
            pass
        assert caught.value.message == "another process is using the thing"
        assert caught.value.exit_code == 11
        with pytest.raises(Locked), lock(path, shared=True, timeout=0):
            pass
    with lock(path, timeout=0):
        pass


def test_shared_holders_exclude_only_exclusive_ones(tmp_path):
    path = tmp_path / "lock"
    shared = functools.partial(lock, path, shared=True, timeout=0)
    with shared(), shared(), pytest.raises(Locked), lock(path, timeout=0.05):
        pass
    with lock(path, timeout=0):
        pass


def test_a_lock_ends_with_an_error_in_its_block(tmp_path):
    with pytest.raises(ValueError, match="inside"), lock(tmp_path / "lock"):
        raise ValueError("inside")
    with lock(tmp_path / "lock", timeout=0):
        pass


def test_waiting_ends_when_the_holder_does(tmp_path):
    order = []

    def wait():
        with lock(tmp_path / "lock", timeout=30):
            order.append("second")

    with lock(tmp_path / "lock"):
        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_a_killed_holder_leaves_no_lock(tmp_path):
    program = (
        "import sys, time, pathlib; from poolreg.files import lock\n"
        "with lock(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"held\n"
        with pytest.raises(Locked), lock(tmp_path / "lock", timeout=0):
            pass
        child.kill()
        child.wait()
        with lock(tmp_path / "lock", timeout=0):
            pass


def test_a_child_that_was_started_meanwhile_does_not_hold_the_lock(tmp_path):
    with lock(tmp_path / "lock"):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        with lock(tmp_path / "lock", timeout=0):
            pass
    finally:
        child.communicate(b"\n")


@pytest.mark.parametrize("timeout", [None, 0.1])
def test_a_file_system_without_locks(tmp_path, monkeypatch, timeout):
    def fail(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("poolreg.files.fcntl.flock", fail)
    with pytest.raises(StorageError, match="No locks"), lock(tmp_path / "x", timeout=timeout):
        pass


# -- capped reading -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 10])
def test_small_files_are_read(tmp_path, size):
    (tmp_path / "x").write_bytes(b"a" * size)
    assert read_capped(tmp_path / "x", 10, error=Refused, what="it") == b"a" * size


def test_what_is_too_large_or_no_file_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"a" * 11)
    os.mkfifo(tmp_path / "pipe")  # reading it would never end
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(Refused, match="larger than 10 bytes"):
        read_capped(tmp_path / "x", 10, error=Refused, what="it")
    for name in ("pipe", "link", "nothing", ".", "a\0b", "y" * 300):
        with pytest.raises(NoPool):
            read_capped(tmp_path / name, 10, error=NoPool, what="it")
