"""Hashes of files that were hashed before, so that what did not change is not hashed again.

A file counts as unchanged while its device, inode, size, time of modification and time of status
change are the same, as in git's index, and the system was not started anew. That is believed only
where every change of a file's bytes shows in its times, whoever makes it: on some file systems of
Linux, and there of files that have been at rest and are on the disk before they are hashed.

The folder is $POOLREG_CACHE, else poolreg in $XDG_CACHE_HOME, else ~/.cache/poolreg, and nobody
else may write to it. It may be removed at any time; with POOLREG_CACHE set to nothing, nothing is
remembered.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from poolreg.canonical import canonical_json, digest_of, is_digest, sha256

MAX_ENTRIES = 1000  # of some 30 kB each
REST = 60.0  # seconds; clocks of files tick every second, and by then most are on the disk

# Others give inodes anew, keep old times in memory, or tell nothing of changes in mapped memory.
_EXACT = ("btrfs", "ext4", "xfs")
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Seen:
    """A file as it was at one moment; take it before the file is read."""

    key: str | None  # of these bytes; none where other bytes might come to bear the same

    @classmethod
    def of(cls, path: Path) -> Seen:
        """Look at a file."""
        with open(path, "rb", buffering=0) as file:
            found = os.fstat(file.fileno())
            rest = time.time() - max(found.st_mtime, found.st_ctime)
            boot = _read(_BOOT)
            if rest < REST or not boot or _file_system(file.fileno()) not in _EXACT:
                return cls(None)
            # Memory that is mapped to write changes a file's times only if it is on the disk.
            os.fsync(file.fileno())
        status = (
            found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
        )  # fmt: skip
        return cls(digest_of(["hashes", 1, boot, status]))

    def recall(self, names: Iterable[str]) -> dict[str, str] | None:
        """Return the sha256 of these tensors of the file, if all of them are known."""
        folder = _folder()
        if self.key is None or folder is None or not _is_ours(folder):
            return None
        check, _, text = _read(folder / self.key).partition("\n")
        if check != sha256(text.encode()):  # absent or torn
            return None
        known, wanted = json.loads(text), list(names)
        return {name: known[name] for name in wanted} if known.keys() >= set(wanted) else None

    def remember(self, path: Path, hashes: Mapping[str, str]) -> None:
        """Keep the hashes of all tensors of a file, unless it has changed since."""
        folder = _folder()
        if self.key is None or folder is None:
            return
        # A cache that cannot be written to costs time and nothing else.
        with contextlib.suppress(OSError):
            if Seen.of(path) != self:
                return
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _is_ours(folder):
                return
            text = canonical_json(dict(hashes))
            staged = folder / f"{self.key}.{secrets.token_hex(4)}.tmp"
            staged.write_bytes(sha256(text).encode() + b"\n" + text)
            staged.replace(folder / self.key)
            _prune(folder)


def _file_system(descriptor: int) -> str:
    """Return the kind of the file system that an open file lies on, where the system tells."""
    _, _, about = _read(Path(f"/proc/self/fdinfo/{descriptor}")).partition("mnt_id:")
    for line in _read(Path("/proc/self/mountinfo")).splitlines() if about else ():
        fields = line.split()
        if fields[0] == about.split()[0]:
            return fields[fields.index("-") + 1]
    return ""


def _read(path: Path) -> str:
    """Return what a file holds, or nothing."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _folder() -> Path | None:
    folder = os.environ.get("POOLREG_CACHE")
    if folder is None:
        try:
            home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
        except RuntimeError:  # this user has none
            return None
        folder = str(home / "poolreg") if home.is_absolute() else ""
    return Path(folder, "hashes") if folder else None


def _is_ours(folder: Path) -> bool:
    """Tell whether nobody but this user can have put anything there."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not others


def _prune(folder: Path) -> None:
    """Leave the newest entries."""
    entries = [entry for entry in folder.iterdir() if is_digest(entry.name.partition(".")[0])]
    entries.sort(key=lambda entry: entry.stat().st_mtime_ns)
    for entry in entries[:-MAX_ENTRIES]:
        entry.unlink(missing_ok=True)
