"""Hashing all objects again: a part of them, for a while, and on from where an earlier run ended.

Objects are taken in the order of their digests. How far a run came is kept in the pool's `tmp/`
every few seconds, so a run that was killed loses little; what was bad until then is kept with it
and looked at again. A cursor that makes no sense, or was made for another part, is ignored.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from poolreg.canonical import canonical_json, is_digest
from poolreg.errors import UsageError
from poolreg.files import read_capped, write_atomic
from poolreg.progress import Progress
from poolreg.store.registry import Registry
from poolreg.verification.lines import gathered
from poolreg.verification.shelves import read_shelf
from poolreg.workers import at_once

_BATCH = 64 << 20  # bytes hashed between two looks at the cursor and the clock
_CHUNK = 4 << 20
_SAVE_EVERY = 2.0  # seconds
_MAX_CURSOR = 64 << 20
_THREADS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class Part:
    """The N-th of T parts of all digests, of equal size but for chance."""

    number: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Part:
        """Read N/T; raises `UsageError`."""
        number, slash, of = text.partition("/")
        digits = slash and all(part.isdecimal() and len(part) < 7 for part in (number, of))
        if not digits or not 1 <= int(number) <= int(of):
            raise UsageError(
                f"{text!r} is no part of a whole", hint="write N/T: 1/10, then 2/10 and so on"
            )
        return cls(int(number), int(of))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def holds(self, digest: bytes) -> bool:
        """Tell whether a digest is in this part."""
        return int.from_bytes(digest[:4]) * self.of >> 32 == self.number - 1


@dataclass
class Cursor:
    """How far a pass through one part has come: `after` is the last digest that was done."""

    part: Part
    after: bytes = b""
    bad: set[str] = field(default_factory=set)

    @staticmethod
    def file(registry: Registry) -> Path:
        """Return where the cursor of a pool is kept."""
        return registry.root / "tmp" / "verify.json"

    @classmethod
    def load(cls, registry: Registry, part: Part) -> Cursor:
        """Return the cursor of an earlier run through this part, or one at the beginning."""
        file = cls.file(registry)
        try:
            said = json.loads(read_capped(file, _MAX_CURSOR, error=UsageError, what=file.name))
            after, bad = said["after"], said["bad"]
            sensible = said["part"] == str(part) and all(map(is_digest, [after, *bad]))
        except (ValueError, LookupError, TypeError, RecursionError, UsageError):
            return cls(part)
        return cls(part, bytes.fromhex(after), set(bad)) if sensible else cls(part)

    def save(self, registry: Registry) -> None:
        """Keep the cursor where something was done and the pool can be written to."""
        if self.after and os.access(self.file(registry).parent, os.W_OK):
            said = {"part": str(self.part), "after": self.after.hex(), "bad": sorted(self.bad)}
            write_atomic(self.file(registry), canonical_json(said))

    def forget(self, registry: Registry) -> None:
        """Remove the cursor: the pass is complete."""
        if self.file(registry).is_file() and os.access(self.file(registry).parent, os.W_OK):
            self.file(registry).unlink(missing_ok=True)


@dataclass
class Hashed:
    """What was hashed: `problems` by digest; `left` objects of `left_bytes` were not reached."""

    objects: int = 0
    bytes: int = 0
    left: int = 0
    left_bytes: int = 0
    problems: dict[str, str] = field(default_factory=dict)


def hash_objects(
    registry: Registry, part: Part, *, deadline: float | None, resume: bool, progress: Progress
) -> Hashed:  # fmt: skip
    """Hash every object of a part again, until `deadline` (of `time.monotonic`).

    An object whose size is wrong is hashed, too: what is wrong is said of its bytes.
    """
    cursor = Cursor.load(registry, part) if resume else Cursor(part)
    done = Hashed()
    again = {digest for digest in cursor.bad if registry.objects.has(digest)}
    total = sum(size for _, size in _todo(registry, part, cursor.after))
    progress.start("hashing", total, "bytes")
    tell = gathered(progress.advance)
    done.problems |= problems_of(registry, again)
    cursor.bad = set(done.problems)
    saved = time.monotonic()
    try:
        for batch in _batches(_todo(registry, part, cursor.after)):
            if deadline is not None and done.objects and time.monotonic() >= deadline:
                done.left, done.left_bytes = _rest(registry, part, cursor.after)
                return done
            problems = problems_of(registry, [digest.hex() for digest, _ in batch], progress=tell)
            done.problems |= problems
            done.objects += len(batch)
            done.bytes += sum(size for _, size in batch)
            cursor.after, cursor.bad = batch[-1][0], cursor.bad | problems.keys()
            if time.monotonic() - saved > _SAVE_EVERY:
                cursor.save(registry)
                saved = time.monotonic()
        cursor.after = b""
        cursor.forget(registry)
    finally:
        cursor.save(registry)
    return done


def _todo(registry: Registry, part: Part, after: bytes) -> Iterator[tuple[bytes, int]]:
    """Yield the digests of a part that come after one, in order, with the sizes of their files."""
    for number in range(after[0] if after else 0, 256):
        if not (part.of == 1 or _meets(part, number)):
            continue
        sizes = read_shelf(registry.objects.folder, number).sizes
        for digest in sorted(sizes):
            if digest > after and part.holds(digest):
                yield digest, sizes[digest]


def _meets(part: Part, number: int) -> bool:
    low = (number << 24) * part.of >> 32
    high = (((number + 1) << 24) - 1) * part.of >> 32
    return low <= part.number - 1 <= high


def _rest(registry: Registry, part: Part, after: bytes) -> tuple[int, int]:
    sizes = [size for _, size in _todo(registry, part, after)]
    return len(sizes), sum(sizes)


def _batches(items: Iterator[tuple[bytes, int]]) -> Iterator[list[tuple[bytes, int]]]:
    batch: list[tuple[bytes, int]] = []
    size = 0
    for item in items:
        if batch and size + item[1] > _BATCH:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += item[1]
    if batch:
        yield batch


def problems_of(
    registry: Registry, digests: Collection[str], *,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, str]:  # fmt: skip
    """Hash objects and return what is wrong with those that are not what their names say."""
    problems: dict[str, str] = {}

    def look(digest: str, tell: Callable[[int], None]) -> None:
        problem = _problem(registry.objects.path(digest), digest, tell)
        if problem:
            problems[digest] = problem

    at_once(look, digests, threads=_THREADS, progress=progress)
    return problems


def _problem(path: Path, digest: str, tell: Callable[[int], None]) -> str:
    hasher = hashlib.sha256()
    try:
        with open(path, "rb", buffering=0) as file:
            while chunk := file.read(_CHUNK):
                hasher.update(chunk)
                tell(len(chunk))
    except FileNotFoundError:
        return ""  # what is missing is found by its name
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if hasher.hexdigest() == digest:
        return ""
    return "its bytes are not what they were when it was stored"
