"""Bundles: a published pool as one tar file, for where there is no network.

    poolreg.json, journal/<sha256>.jsonl …, objects/ab/cdef… …

The same pool gives the same bytes: members are sorted and carry no times and no owners. Any tar
reads and makes such a file. What comes from outside is read by the few lines below instead: they
take plain files only, hold one block of 512 bytes at a time, never read what a member says is
metadata of the next, and use no name from a tar as a path on disk.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from poolreg.errors import Conflict, NotFound, Refused, UsageError
from poolreg.files import staged, storage_errors
from poolreg.sharing.places import MARKER, Entry, Outgoing, Snapshot, alias_of
from poolreg.sharing.streams import CHUNK, checked, receive

BLOCK = tarfile.BLOCKSIZE  # 512 bytes: headers, and what files are filled up to
MAX_MEMBERS = 2_000_000

_COMPRESSED = {
    b"\x1f\x8b": "gunzip",
    b"\xfd7zXZ\x00": "unxz",
    b"BZh": "bunzip2",
    b"\x28\xb5\x2f\xfd": "unzstd",
}
_FILE = (b"0", b"\0")
_FOLDER = b"5"
_KINDS = {
    b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device",
    b"6": "a pipe", b"S": "a sparse file", b"x": "an extended header", b"g": "an extended header",
    b"L": "an extended header", b"K": "an extended header",
}  # fmt: skip
_BY_HAND = f"tar --format=gnu -cf FILE {MARKER} journal objects"


@dataclass(frozen=True)
class _Header:
    """What a tar says of one member."""

    path: str
    kind: bytes
    size: int


def write_bundle(
    file: Path, members: Sequence[Outgoing], *, progress: Callable[[int], None],
    force: bool = False,
) -> None:  # fmt: skip
    """Write `members` as one tar file, whole or not at all; `progress` is told bytes of members.

    The mark comes first, then the journal, then objects. Raises `Conflict` if the file is there,
    unless `force`; `Damage` if a member's bytes are not what its sha256 says.
    """
    if file.is_dir() or (file.exists() and not force):
        raise Conflict(f"{file} is there already", hint="choose another name, or pass --force")
    if not file.parent.is_dir():
        raise NotFound(f"there is no folder {file.parent}", hint="make it first")
    paths = [item.path for item in members]
    if MARKER not in paths or len(set(paths)) != len(paths):
        raise UsageError(f"a bundle needs one {MARKER}, and every other member once")
    with staged(file) as out:
        for item in sorted(members, key=_order):
            out.write(_header(item))
            for chunk in checked(item):
                out.write(chunk)
                progress(len(chunk))
            out.write(bytes(-item.size % BLOCK))
        out.write(bytes(2 * BLOCK))


class BundlePlace:
    """A bundle, as a place that pools are pulled from."""

    repo_type = ""
    revision: str | None = None

    def __init__(self, file: Path) -> None:
        self.url = str(file)
        self.alias = alias_of(file.name.partition(".")[0])
        self._file = file
        self._members: dict[str, tuple[int, int]] = {}

    def create(self) -> None:
        """Raise `UsageError`: a bundle is written once."""
        raise _written_once()

    def look(self) -> Snapshot:
        """Return the bundle's files; raises `NotFound`, or `Refused` for a tar that is no bundle.

        Refused are compressed, cut and changed tars, and members that are anything but plain
        files and folders, stand there twice, or have a name that could lead out of a folder.
        """
        if not self._file.is_file():
            raise NotFound(f"there is no file {self._file}")
        with storage_errors(f"reading {self._file}"), open(self._file, "rb") as file:
            self._members = _members(file, self._file.name)
        return Snapshot({path: Entry(size) for path, (_, size) in self._members.items()})

    def fetch(self, path: str, target: Path, *, progress: Callable[[int], None]) -> None:
        """Write one file of the bundle to the new file `target`; `progress` is told bytes."""
        start, size = self._member(path)
        receive(self._chunks(start, size), target, limit=size, progress=progress)

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the sizes of the files below a folder, by path; refuses what `look` does."""
        files = self.look().files
        return {path: files[path].size for path in files if path.startswith(f"{folder}/")}

    def read(self, path: str, start: int, end: int) -> bytes:
        """Return bytes [start, end) of one file of the bundle."""
        first, size = self._member(path)
        return b"".join(self._chunks(first + start, max(0, min(end, size) - start)))

    def publish(
        self, snapshot: Snapshot, objects: Sequence[Outgoing],  # noqa: ARG002
        rest: Sequence[Outgoing], deleted: Sequence[str], *,  # noqa: ARG002
        message: str, progress: Callable[[int], None],  # noqa: ARG002
    ) -> str:  # fmt: skip
        """Raise `UsageError`: a bundle is written once."""
        raise _written_once()

    def _member(self, path: str) -> tuple[int, int]:
        if path not in self._members:
            raise NotFound(f"{self._file} holds no file {path!r}")
        return self._members[path]

    def _chunks(self, start: int, size: int) -> Iterator[bytes]:
        with storage_errors(f"reading {self._file}"), open(self._file, "rb") as file:
            file.seek(start)
            while size and (chunk := file.read(min(CHUNK, size))):
                size -= len(chunk)
                yield chunk


def _written_once() -> UsageError:
    return UsageError(
        "nothing can be added to a bundle", hint="write a new one: poolreg bundle create FILE"
    )


def _order(item: Outgoing) -> tuple[int, str]:
    first = 0 if item.path == MARKER else 1 if item.path.startswith("journal/") else 2
    return first, item.path


def _header(item: Outgoing) -> bytes:
    """Return the header of one member; the GNU format has no limit of 8 GiB on a file."""
    _check_path(item.path, item.path)
    info = tarfile.TarInfo(item.path)
    info.size, info.mode = item.size, 0o644
    header = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict")
    if len(header) != BLOCK:
        raise UsageError(f"{item.path!r} is too long a name for a bundle")
    return header


def _members(file: IO[bytes], bundle: str) -> dict[str, tuple[int, int]]:
    """Return where each file begins and its size, by path; raises `Refused`."""
    length = os.fstat(file.fileno()).st_size
    found: dict[str, tuple[int, int]] = {}
    number = start = 0
    while (block := _block(file, start, bundle)) != bytes(BLOCK):
        header = _parse(block, bundle)
        number += 1
        _check_member(header, number, bundle)
        start += BLOCK
        if start + header.size > length:
            raise _cut(bundle)
        if header.kind != _FOLDER:
            if header.path in found:
                raise Refused(f"{bundle} holds {header.path!r} twice", hint=_asking())
            if not found and header.path != MARKER:
                raise Refused(
                    f"{bundle} is no bundle: its first file is {header.path!r}, not {MARKER}",
                    hint=f"write one with poolreg bundle create, or by hand: {_BY_HAND}",
                )
            found[header.path] = (start, header.size)
        start += header.size + -header.size % BLOCK
    if _block(file, start + BLOCK, bundle) != bytes(BLOCK):
        raise Refused(f"{bundle} is damaged: something follows its end", hint=_asking())
    if not found:
        raise Refused(f"{bundle} is empty", hint=_asking())
    return found


def _block(file: IO[bytes], start: int, bundle: str) -> bytes:
    file.seek(start)
    block = file.read(BLOCK)
    if len(block) == BLOCK:
        return block
    if start:
        raise _cut(bundle)
    raise _no_tar(block, bundle)


def _parse(block: bytes, bundle: str) -> _Header:
    # The checksum counts itself as eight spaces.
    total = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    stated = _number(block[148:156])
    size = _number(block[124:136])
    if stated != total or size is None:
        raise _no_tar(block, bundle)
    name = _text(block[:100])
    if block[257:265] == b"ustar\x0000" and block[345] != 0:
        name = _text(block[345:500]) + b"/" + name
    shown = ascii(name.decode("utf-8", "backslashreplace"))[:300]
    try:
        path = name.decode("utf-8")
    except UnicodeDecodeError:
        raise _unsafe(f"{bundle} holds {shown}") from None
    return _Header(path, block[156:157], size)


def _check_member(header: _Header, number: int, bundle: str) -> None:
    shown = f"{bundle} holds {ascii(header.path)[:300]}"
    if number > MAX_MEMBERS:
        raise Refused(f"{bundle} holds more than {MAX_MEMBERS:,} members", hint=_asking())
    if header.kind not in (*_FILE, _FOLDER):
        kind = _KINDS.get(header.kind, f"of the unknown type {ascii(header.kind)[1:]}")
        raise Refused(
            f"{shown}, which is {kind}", hint=f"only plain files may be there: {_BY_HAND}"
        )
    path = header.path
    if header.kind == _FOLDER:
        if header.size:
            raise Refused(f"{shown}, a folder of {header.size:,} bytes", hint=_asking())
        path = path.removesuffix("/")
    _check_path(path, shown)


def _check_path(path: str, shown: str) -> None:
    """Raise `Refused` for a path that could lead out of a folder, or a terminal astray."""
    strange = "\\" in path or re.match("[A-Za-z]:", path) or not path.isprintable()
    if strange or any(part in ("", ".", "..") for part in path.split("/")):
        raise _unsafe(shown)


def _number(field: bytes) -> int | None:
    """Return a number that is octal digits, or binary after a first byte of 0x80."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    return int(digits, 8) if re.fullmatch(b"[0-7]+", digits) else None


def _text(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def _no_tar(block: bytes, bundle: str) -> Refused:
    for magic, tool in _COMPRESSED.items():
        if block.startswith(magic):
            return Refused(f"{bundle} is compressed", hint=f"unpack it first: {tool} {bundle}")
    return Refused(f"{bundle} is not a tar file, or a damaged one", hint=_asking())


def _cut(bundle: str) -> Refused:
    return Refused(f"{bundle} is cut short", hint="copy it again from where it came from")


def _unsafe(shown: str) -> Refused:
    return Refused(f"{shown}, a name that is not safe", hint=_asking())


def _asking() -> str:
    return "nothing was taken from it; ask whoever made it for a sound bundle"
