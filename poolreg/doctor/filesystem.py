"""The file system under a pool: does it do what a pool rests on?

A pool rests on renames that replace a file, on flushing files and folders, on locks that exclude,
and on tmp/ being on the same file system as the rest. Each is tried, in a folder of its own that
is gone afterwards; where nothing can be written, that is said and the rest is left open.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from poolreg.doctor.checks import Check

Probe = Callable[[Path], bool]

MOUNTS = Path("/proc/self/mountinfo")
_FOLDERS = ("objects", "journal", "tmp", "locks")
_GIB = 1 << 30
_LOCKS_LOCAL = re.compile(
    r"nfs4?|cifs|smb3?|smbfs|9p|virtiofs|lustre|gpfs|ceph|beegfs|glusterfs|afs|ncpfs|vboxsf|"
    r"prl_fs|drvfs|fuse\..*"
)
_IN_MEMORY = {"tmpfs", "ramfs"}


@dataclass(frozen=True)
class Mount:
    """A mounted file system: its kind, where it is mounted, and its device as major:minor."""

    kind: str
    place: str
    device: tuple[int, int]


def mount_of(path: Path, mountinfo: str) -> Mount | None:
    """Return what `path` (absolute, without links) lies on; later mounts hide earlier ones."""
    found = None
    for line in mountinfo.splitlines():
        front, _, back = line.partition(" - ")
        fields = front.split()
        if len(fields) < 5 or not back:
            continue
        place = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4])
        if path.is_relative_to(place) and (found is None or len(place) >= len(found.place)):
            major, _, minor = fields[2].partition(":")
            found = Mount(back.split()[0], place, (int(major), int(minor)))
    return found


def mounted(path: Path) -> Mount | None:
    """Return what a path lies on, if this system tells."""
    try:
        return mount_of(path.resolve(), os.fsdecode(MOUNTS.read_bytes()))
    except OSError:
        return None


def file_system(root: Path, *, largest_model: int = 0) -> list[Check]:
    """Check the file system of the pool in `root`; `largest_model` is in bytes."""
    return [
        _kind(mounted(root)),
        _space(root, largest_model),
        _one_file_system(root),
        *probes(root),
    ]


def _kind(mount: Mount | None) -> Check:
    name = "file system"
    if mount is None:
        return Check(name, "unknown", "this system does not tell")
    text = f"{mount.kind}, mounted at {mount.place}"
    if _LOCKS_LOCAL.fullmatch(mount.kind):
        return Check(
            name, "warning", f"{text}: locks may not reach other machines",
            "write to the pool from one machine at a time, or keep it on a local disk",
        )  # fmt: skip
    if mount.kind in _IN_MEMORY:
        return Check(name, "warning", f"{text}: it is gone when the machine stops",
                     "copy the pool to a disk")  # fmt: skip
    return Check(name, "ok", text)


def _space(root: Path, largest_model: int) -> Check:
    disk = shutil.disk_usage(root)
    needed = max(_GIB, 2 * largest_model)
    text = f"{_size(disk.free)} of {_size(disk.total)} free"
    if disk.free >= needed:
        return Check("disk space", "ok", text)
    why = "twice the largest model" if needed > _GIB else "a little room"
    return Check("disk space", "warning", f"{text}, less than {_size(needed)} ({why})",
                 "free some: see poolreg stats and poolreg gc --dry-run")  # fmt: skip


def _one_file_system(root: Path) -> Check:
    name = "one file system"
    missing = [folder for folder in _FOLDERS if not (root / folder).is_dir()]
    if missing:
        return Check(name, "failed", f"{missing[0]}/ is missing",
                     "restore the folder from a copy of the pool")  # fmt: skip
    # A bind mount has the device of the rest, and yet nothing can be renamed into it.
    here = (root.stat().st_dev, mounted(root))
    apart = [
        folder
        for folder in _FOLDERS
        if ((root / folder).stat().st_dev, mounted(root / folder)) != here
    ]
    if apart:
        return Check(
            name, "failed", f"{', '.join(f'{a}/' for a in apart)} on another than the pool",
            "keep the whole pool on one: files are moved into their places",
        )  # fmt: skip
    return Check(name, "ok", "all of the pool is on one")


def probes(root: Path) -> Iterator[Check]:
    """Try in tmp/ what a pool needs of its file system."""
    try:
        with tempfile.TemporaryDirectory(prefix="doctor-", dir=root / "tmp") as folder:
            yield Check("writable", "ok", "yes")
            yield from _tried(Path(folder))
    except OSError as error:
        read_only = error.errno in (errno.EROFS, errno.EACCES, errno.EPERM)
        yield (
            Check("writable", "warning", "no: the pool is read-only; what it holds can be used, "
                  "nothing can be added, and what is read must be indexed already",
                  "work on a copy, or mount it writable and check the owner of the folder")
            if read_only
            else Check("writable", "failed", f"writing to tmp/ failed: {error.strerror}",
                       "free some disk space, or check the disk")
        )  # fmt: skip


def _tried(folder: Path) -> Iterator[Check]:
    yield _tells("rename", _rename, folder, "a rename does not replace the file in its place")
    yield _tells("fsync", _fsync, folder, "files cannot be flushed to the disk")
    yield _tells("flock", excludes, folder, "two at once could hold a lock that excludes")
    links = _try(_link, folder)
    yield Check("hard links", "ok", "yes" if links is True else "no (none are needed)")
    cased = _try(_cased, folder)
    yield Check("letter case", "ok", "told apart" if cased is True else "not told apart (harmless)")


def _tells(name: str, probe: Probe, folder: Path, problem: str) -> Check:
    result = _try(probe, folder)
    if result is True:
        return Check(name, "ok", "works")
    why = f": {result}" if isinstance(result, str) else ""
    return Check(name, "failed", problem + why, "keep the pool on another file system")


def _try(probe: Probe, folder: Path) -> bool | str:
    try:
        return probe(folder)
    except OSError as error:
        return error.strerror or str(error)


def _rename(folder: Path) -> bool:
    old, new = folder / "old", folder / "new"
    old.write_bytes(b"old")
    new.write_bytes(b"new")
    new.replace(old)
    return old.read_bytes() == b"new" and not new.exists()


def _fsync(folder: Path) -> bool:
    for path in (folder / "old", folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return True


def excludes(folder: Path) -> bool:
    """Tell whether a second holder of a lock in `folder` is turned away."""
    path = folder / "lock"
    path.touch()
    with open(path, "rb+") as first, open(path, "rb+") as second:
        fcntl.flock(first, fcntl.LOCK_EX)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def _link(folder: Path) -> bool:
    (folder / "link").hardlink_to(folder / "old")
    return (folder / "link").samefile(folder / "old")


def _cased(folder: Path) -> bool:
    (folder / "Case").touch()
    return not (folder / "cASE").exists()


def _size(value: float) -> str:
    return f"{value / 1e9:,.1f} GB"
