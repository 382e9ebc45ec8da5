"""Files that are whole or absent: atomic writes, exclusive and shared locks, text caps.

A file is written beside its target, flushed to the disk, renamed, and its folder flushed: after
a crash the target holds the old bytes or the new bytes, never a part.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from poolreg import faults
from poolreg.errors import Locked, PoolregError, StorageError


@contextlib.contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turn an `OSError` inside into a `StorageError` that names `what` and the way out."""
    try:
        yield
    except OSError as error:
        hints = {
            errno.ENOSPC: "free some disk space and run the command again; nothing was lost",
            errno.EDQUOT: "free some of your quota and run the command again; nothing was lost",
            errno.EROFS: "the file system is read-only; use a pool that you can write to",
            errno.EACCES: "check the permissions of the folder",
            errno.EMFILE: "let the process open more files: ulimit -n 65536",
        }
        hint = hints.get(error.errno or 0, "check the disk and run the command again")
        raise StorageError(f"{what}: {error.strerror or error}", hint=hint) from error


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, so that a rename in it outlives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def staged(target: Path, *, folder: Path | None = None, mode: int = 0o644) -> Iterator[IO[bytes]]:
    """Open a temporary file that becomes `target` when the block ends without an error.

    `folder` is where the temporary file lives (default: beside the target); it must be on the
    target's file system. On an error the temporary file is removed and the target untouched.
    """
    folder = folder or target.parent
    name = folder / f".{target.name[:40]}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    with storage_errors(f"writing {target.name}"):
        try:
            with open(name, "xb") as file:
                faults.step("file.open")
                yield file
                faults.step("file.write")
                file.flush()
                os.fsync(file.fileno())
            name.chmod(mode)
            faults.step("file.replace")
            name.replace(target)
            faults.step("file.replaced")
            sync_folder(target.parent)
        finally:
            name.unlink(missing_ok=True)


def write_atomic(target: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Write `data` to `target`, whole or not at all."""
    with staged(target, mode=mode) as file:
        file.write(data)


def sync_file(path: Path) -> None:
    """Flush a file that another library has written to the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def staged_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """Give a temporary folder that becomes `target` when the block ends without an error.

    A folder that holds anything and stands at `target` by then is an error, unless `replace`.
    """
    staging = target.with_name(f".{target.name[:40]}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    with storage_errors(f"writing {target}"):
        try:
            staging.mkdir(parents=True)
            yield staging
            for path in staging.iterdir():
                sync_file(path)
            sync_folder(staging)
            faults.step("folder.replace")
            if replace and target.exists():
                shutil.rmtree(target)
            staging.rename(target)
            sync_folder(target.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def lock(
    path: Path, *, shared: bool = False, timeout: float | None = None, what: str = "the pool"
) -> Iterator[None]:
    """Hold a `flock` on `path` for the block; it ends with the process, so it is never stale.

    Waits without limit, or `timeout` seconds and then raises `Locked`.
    """
    with storage_errors(f"locking {what}"):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        with storage_errors(f"locking {what}"):
            _acquire(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, timeout, what)
        yield
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, kind: int, timeout: float | None, what: str) -> None:
    if timeout is None:
        fcntl.flock(descriptor, kind)
        return
    deadline = time.monotonic() + timeout
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise Locked(
                    f"another process is using {what}",
                    hint="wait for it to finish, then run the command again",
                ) from None
            time.sleep(0.02)
        else:
            return


def read_capped(path: Path, limit: int, *, error: type[PoolregError], what: str) -> bytes:
    """Return the bytes of a regular file of at most `limit` bytes, else raise `error`."""
    try:
        if not path.is_file():
            raise error(f"{what} is not a regular file: {path}")
        if path.stat().st_size > limit:
            raise error(f"{what} is larger than {limit} bytes: {path}")
        return path.read_bytes()
    except OSError as problem:
        raise error(f"{what} cannot be read: {path}: {problem.strerror}") from problem
