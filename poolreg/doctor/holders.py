"""Who holds the locks of a pool now, and who waits for them, as Linux tells in /proc/locks."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from poolreg.doctor.filesystem import mounted

LOCKS = Path("/proc/locks")
_SHOWN = 100  # characters of a command line


@dataclass(frozen=True)
class Holder:
    """A process at a lock: it holds it, alone or with others that share it, or waits for it.

    `command` is empty where the process is not to be seen from here.
    """

    lock: str
    process: int
    exclusive: bool
    waiting: bool
    command: str


@dataclass(frozen=True)
class Line:
    """One line of /proc/locks."""

    process: int
    exclusive: bool
    waiting: bool
    device: tuple[int, int]
    inode: int


def lines(text: str) -> list[Line]:
    """Return the flocks of /proc/locks: `1: -> FLOCK  ADVISORY  WRITE 7592 fe:00:2146711 0 EOF`."""
    found = []
    for line in text.splitlines():
        fields = line.split()[1:]
        waiting = fields[:1] == ["->"]
        kind, _, mode, process, place, *_ = [*fields[waiting:], *[""] * 5]
        major, minor, inode = [*place.split(":"), "", ""][:3]
        if kind == "FLOCK" and inode:
            device = (int(major, 16), int(minor, 16))
            found.append(Line(int(process), mode == "WRITE", waiting, device, int(inode)))
    return found


def holders(root: Path) -> list[Holder] | None:
    """Return who is at the locks of the pool in `root`, or None if this system does not tell.

    The locks are the files of locks/ and, named as they are, the folders of tmp/ that work is done
    in: each is locked itself, or by a file `lock` in it.
    """
    try:
        present = lines(LOCKS.read_text())
    except OSError:
        return None
    mount = mounted(root)
    inodes = {}
    for path, name in _locks(root):
        with contextlib.suppress(FileNotFoundError):
            inodes[path.stat().st_ino] = name
    found = [
        Holder(inodes[at.inode], at.process, at.exclusive, at.waiting, _command(at.process))
        for at in present
        if at.inode in inodes and (mount is None or at.device == mount.device)
    ]
    return sorted(found, key=lambda holder: (holder.lock, holder.waiting, holder.process))


def _locks(root: Path) -> list[tuple[Path, str]]:
    found = [(path, path.name) for path in (root / "locks").glob("*")]
    found += [(path, f"tmp/{path.name}") for path in (root / "tmp").glob("*") if path.is_dir()]
    return found + [(path, f"tmp/{path.parent.name}") for path in (root / "tmp").glob("*/lock")]


def _command(process: int) -> str:
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return ""
    text = words.rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
