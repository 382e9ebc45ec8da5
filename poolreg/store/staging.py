"""Folders for passing work under a pool's tmp/, and how to tell that one is in use.

Who works in such a folder holds a shared flock on the folder itself, or an exclusive one on the
file `lock` in it, so that it is spared from collection however long the work takes and whatever
its files' times say. A killed process holds no lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from poolreg.files import storage_errors


@contextlib.contextmanager
def working_folder(place: Path, *, prefix: str = "tmp.") -> Iterator[Path]:
    """Yield a fresh folder in `place`; it is gone after the block."""
    with storage_errors("making a folder to work in"):
        made = tempfile.TemporaryDirectory(dir=place, prefix=prefix, ignore_cleanup_errors=True)
    with made as name, in_use(Path(name)):
        yield Path(name)


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Say for the block that a folder is in use."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # Where folders cannot be locked, what protects them is that their files are new.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def unused(path: Path) -> Iterator[bool]:
    """Tell whether nobody works in a folder of tmp/; nobody begins to during the block."""
    with contextlib.ExitStack() as stack:
        free = True
        for place in (path, path / "lock") if path.is_dir() else ():
            try:
                descriptor = os.open(place, os.O_RDONLY | os.O_CLOEXEC)
                stack.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except FileNotFoundError:
                continue
            except OSError:  # held, or it cannot be told
                free = False
        yield free
