"""Published pools in a folder of any file system: this machine's, or one that fsspec reaches.

A file there is whole or absent. On this machine it is written beside its place, flushed and
renamed; an object store shows a put only when it is complete. (Other remote file systems are as
good as their own put.) Objects go first, then the journal, then everything else, the mark last,
and only then deletions, so whoever reads in between misses something new, but nothing named.

There is no lock. Objects and segments of the journal are named by their content, so pushes at
the same time do not disturb each other: afterwards the pool is the union. The files that are made
anew by each push (tables/, README.md, models/) are not: the later push wins, its tables may lack
what the other one brought, and it may delete model folders that the other one made, until the
next push makes them again.
"""

from __future__ import annotations

import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from poolreg.errors import (
    Conflict,
    MissingPackage,
    NotFound,
    PoolregError,
    Refused,
    StorageError,
    UsageError,
)
from poolreg.files import staged, storage_errors, sync_folder
from poolreg.sharing.places import MARKER, Entry, Outgoing, Snapshot, alias_of
from poolreg.sharing.streams import CHUNK, checked, receive
from poolreg.workers import at_once

_THREADS = 4  # files on their way at once; s3fs holds about 110 MB of a large one

_TEMPORARY = re.compile(r"\..*\.tmp")  # what `staged` calls a file that is being written
_EXTRAS = {"s3": "poolreg[s3]", "s3a": "poolreg[s3]"}

# Errors that drivers raise as they come from below and that are no OSError.
_DRIVER_ERRORS = (
    ("botocore.exceptions", ("BotoCoreError", "ClientError")),
    ("botocore.parsers", ("ResponseParserError",)),
    ("aiohttp", ("ClientError",)),
)

Told = Callable[[int], None]


class TreePlace:
    """A published pool below a URL that fsspec knows: file://, s3://, memory:// and others.

    Endpoints and credentials come from where the file system's driver looks for them (S3: the
    AWS_… variables and ~/.aws). Raises `UsageError` for a URL that cannot be one and
    `MissingPackage` where its driver is not installed. A user's name and password in the address
    are for the driver alone: `url` has neither.
    """

    repo_type = ""
    revision: str | None = None

    def __init__(self, url: str) -> None:
        self.url = _without_password(url)
        self.alias = alias_of(self.url)
        self._tree = _open(url, self.url)
        self._seen: dict[str, Entry] = {}
        self._made = False

    def create(self) -> None:
        """Make the folder unless it is there; from now on the place may lack the mark."""
        self._tree.make()
        self._made = True

    def look(self) -> Snapshot:
        """Return what is there now; raises `NotFound` where no pool is and none was created."""
        sizes = self._tree.sizes()
        if MARKER not in sizes and not self._made:
            raise NotFound(
                f"{self.url} holds no published pool",
                hint=f"check the address; poolreg push {self.url} publishes one there",
            )
        self._seen = {path: Entry(size) for path, size in sizes.items()}
        return Snapshot(self._seen)

    def fetch(self, path: str, target: Path, *, progress: Told) -> None:
        """Write one file of the last snapshot to the new file `target`; see `receive`."""
        limit = self._listed(path).size
        receive(self._tree.chunks(path), target, limit=limit, progress=progress)

    def sizes(self, folder: str) -> dict[str, int]:
        """Return the sizes of the files below a folder, by path; none if it is not there."""
        sizes = self._tree.sizes(folder)
        self._seen = {path: Entry(size) for path, size in sizes.items()}
        return sizes

    def read(self, path: str, start: int, end: int) -> bytes:
        """Return bytes [start, end) of one file of the last look; fewer if it is shorter now."""
        self._listed(path)
        return self._tree.read(path, start, end)

    def publish(
        self, snapshot: Snapshot,  # noqa: ARG002
        objects: Sequence[Outgoing], rest: Sequence[Outgoing], deleted: Sequence[str], *,
        message: str, progress: Told,  # noqa: ARG002
    ) -> str:  # fmt: skip
        """Send what is not there, in the order that the module promises, then delete.

        `progress` is told bytes, from several threads but one at a time; in the end their sum is
        the size of all files given, be they sent or found there. Never raises `Moved`. `message`
        and `snapshot` are not needed: there is no history, and what is there is looked up again.
        """
        there = self._tree.sizes()

        def send(item: Outgoing, told: Told) -> None:
            if _named_by_content(item.path) and there.get(item.path) == item.size:
                told(item.size)
            else:
                self._tree.send(item, told)

        for stage in (objects, *_stages(rest)):
            at_once(send, stage, threads=_THREADS, progress=progress)
        for path in deleted:
            self._tree.remove(path)
        return ""

    def _listed(self, path: str) -> Entry:
        if path not in self._seen:
            raise NotFound(f"{self.url} holds no file {path!r}")
        return self._seen[path]


class _Folder:
    """A folder of this machine. Nothing outside of it is read or written, whatever links say."""

    def __init__(self, root: Path, shown: str) -> None:
        self.root = _real(root)
        self._shown = shown

    def make(self) -> None:
        if self.root.exists() and not self.root.is_dir():
            raise Conflict(f"{self._shown} is a file", hint="choose another place for the pool")
        with storage_errors(f"making {self._shown}"):
            _make_folder(self.root)

    def sizes(self, below: str = "") -> dict[str, int]:
        """Return the regular files by path; links that lead outside, or to folders, are not."""
        start = self.root / below

        def fail(error: OSError) -> None:
            raise error

        found = {}
        if start.is_dir() and _real(start) == start:
            with storage_errors(f"reading {self._shown}"):
                for folder, _, names in os.walk(start, onerror=fail):
                    for place in (Path(folder, name) for name in names):
                        with suppress(FileNotFoundError):  # another push may have deleted it
                            if self._counts(place):
                                found[place.relative_to(self.root).as_posix()] = (
                                    place.stat().st_size
                                )
        return found

    def _counts(self, place: Path) -> bool:
        inside = not place.is_symlink() or _real(place).is_relative_to(self.root)
        return inside and place.is_file() and not _TEMPORARY.fullmatch(place.name)

    def chunks(self, path: str) -> Iterator[bytes]:
        place = self.root / path
        self._check_inside(_real(place), path)
        with storage_errors(f"reading {path} of {self._shown}"), open(place, "rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk

    def read(self, path: str, start: int, end: int) -> bytes:
        place = self.root / path
        self._check_inside(_real(place), path)
        with storage_errors(f"reading {path} of {self._shown}"), open(place, "rb") as file:
            file.seek(start)
            return file.read(end - start)

    def send(self, item: Outgoing, told: Told) -> None:
        place = self.root / item.path
        self._check_inside(_real(place.parent), item.path)
        with storage_errors(f"writing {item.path}"):
            _make_folder(place.parent)
        with staged(place) as file:
            for chunk in checked(item):
                file.write(chunk)
                told(len(chunk))

    def remove(self, path: str) -> None:
        place = self.root / path
        self._check_inside(_real(place.parent), path)
        with storage_errors(f"deleting {path} of {self._shown}"):
            place.unlink(missing_ok=True)

    def _check_inside(self, place: Path, path: str) -> None:
        if not place.is_relative_to(self.root):
            raise Refused(
                f"{path!r} leads out of {self._shown}",
                hint="remove the symbolic link, or publish in a folder of its own",
            )


class _Store:
    """A folder or prefix that a driver of fsspec reaches."""

    def __init__(self, system: Any, root: str, shown: str) -> None:
        self._system = system
        self._root = root.rstrip("/")
        self._shown = shown

    def make(self) -> None:
        """Do nothing: object stores have no folders, and other drivers make them as they put."""

    def sizes(self, below: str = "") -> dict[str, int]:
        with plain_errors(self._shown):
            self._system.invalidate_cache()
            found = self._system.find(f"{self._root}/{below}".rstrip("/"), detail=True)
        start = f"{self._root}/"
        return {
            path.removeprefix(start): entry["size"]
            for path, entry in found.items()
            # A name that ends with a slash is how some tools mark a folder in an object store.
            if path.startswith(start) and not path.endswith("/") and entry.get("size") is not None
        }

    def chunks(self, path: str) -> Iterator[bytes]:
        place = f"{self._root}/{path}"
        with (
            plain_errors(f"{path} of {self._shown}"),
            self._system.open(place, "rb", block_size=CHUNK, cache_type="none") as file,
        ):
            while chunk := file.read(CHUNK):
                yield chunk

    def read(self, path: str, start: int, end: int) -> bytes:
        with plain_errors(f"{path} of {self._shown}"):
            return bytes(self._system.cat_file(f"{self._root}/{path}", start=start, end=end))

    def send(self, item: Outgoing, told: Told) -> None:
        from fsspec.callbacks import Callback

        # Stores believe what they get, and what has arrived under its name is never sent again.
        deque(checked(item), maxlen=0)
        done = 0

        def advance(_: int | None, value: int, **__: Any) -> None:
            nonlocal done
            value = min(value, item.size)  # a driver that tries again may count twice
            told(value - done)
            done = value

        with plain_errors(f"{item.path} of {self._shown}"):
            self._system.put_file(
                str(item.source), f"{self._root}/{item.path}",
                callback=Callback(hooks={"bytes": advance}),
            )  # fmt: skip
        told(item.size - done)

    def remove(self, path: str) -> None:
        with plain_errors(self._shown), suppress(FileNotFoundError):
            self._system.rm_file(f"{self._root}/{path}")


def _without_password(text: str) -> str:
    """Return an address, or what a driver says of one, without a user's name and password."""
    return re.sub(r"(://)[^/]*@", r"\1", text)


def _open(url: str, shown: str) -> _Folder | _Store:
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    protocol, separator, rest = url.partition("://")
    if not separator or not rest.strip("/") or "::" in url:
        raise UsageError(
            f"{shown!r} is not the address of a folder",
            hint="write it like file:///data/pool or s3://bucket/pool",
        )
    # Driver by driver, s3fs would send ten parts of each file at once, 50 MB each.
    options = {"max_concurrency": 1} if protocol in _EXTRAS else {}
    try:
        with plain_errors(shown):
            # An instance of its own, so that it sees the environment as it is now.
            system, root = url_to_fs(url, skip_instance_cache=True, **options)
    except ImportError as error:
        hint = f"pip install '{_EXTRAS[protocol]}'" if protocol in _EXTRAS else str(error)
        raise MissingPackage(f"{protocol}:// needs a package", hint=hint) from error
    if isinstance(system, LocalFileSystem):
        return _Folder(Path(root), shown)
    return _Store(system, root, shown)


@contextmanager
def plain_errors(what: str) -> Iterator[None]:
    """Turn what fsspec's drivers raise into poolreg's errors about `what`."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        hint = "check the address; a bucket must exist before anything is published in it"
        raise _said(NotFound, what, error, hint) from error
    except PermissionError as error:
        hint = "check your credentials and what they allow (S3: the AWS_… variables or ~/.aws)"
        raise _said(StorageError, what, error, hint) from error
    except (ValueError, NotImplementedError) as error:
        hint = "check the address, or use a file system that can list, read and write"
        raise _said(UsageError, what, error, hint) from error
    except _other_errors() as error:
        hint = "check the address, the network and your credentials, then run the command again"
        invalid = type(error).__name__ == "ParamValidationError"  # no bucket can have this name
        raise _said(UsageError if invalid else StorageError, what, error, hint) from error


def _said(kind: type[PoolregError], what: str, error: Exception, hint: str) -> PoolregError:
    told = _without_password(" ".join(str(error).split()))[:200] or type(error).__name__
    shown = "".join(ch if ch.isprintable() else "?" for ch in told)
    return kind(f"{what}: {shown}", hint=hint)


def _other_errors() -> tuple[type[Exception], ...]:
    # A driver that is not loaded cannot have raised anything.
    loaded = [(sys.modules[name], kinds) for name, kinds in _DRIVER_ERRORS if name in sys.modules]
    return (OSError, *(getattr(module, kind) for module, kinds in loaded for kind in kinds))


def _real(path: Path) -> Path:
    # Path.resolve raises on a loop of links in Python 3.11 and 3.12.
    return Path(os.path.realpath(path))


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it so that they outlive a power cut."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def _named_by_content(path: str) -> bool:
    return path.startswith(("objects/", "journal/"))


def _stages(rest: Sequence[Outgoing]) -> list[list[Outgoing]]:
    """Return `rest` as what goes first, second and last: journal, everything else, the mark."""

    def stage(item: Outgoing) -> int:
        return 0 if item.path.startswith("journal/") else 2 if item.path == MARKER else 1

    return [[item for item in rest if stage(item) == number] for number in range(3)]
