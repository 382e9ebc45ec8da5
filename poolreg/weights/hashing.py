"""One pass over weights files: hash them, hash every tensor, look for NaN and infinity, copy them.

Each byte is read once, by plain reads (a file that shrinks meanwhile is an error, not a crash),
and used while it is hot. The hash of a file is one sequential chain, which sets the pace: the
hashes of its tensors and its copy keep up with it in threads of their own.
"""

from __future__ import annotations

import functools
import hashlib
import os
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TypeVar

import numpy as np

from poolreg.errors import Refused
from poolreg.files import storage_errors
from poolreg.numerics.average import INFINITY, all_below
from poolreg.tensors import DTYPE_BYTES, TensorInfo
from poolreg.weights.disk import MAX_THREADS, clone, write_all

CHUNK = 2 << 20  # bytes: small enough to stay in a core's cache, larger than any item
_HANDED_OVER = 1 << 20  # bytes of a file below which more threads cost more than they save
_BATCH = 32 << 20  # bytes of tensors that one thread takes at a time

_NOT_FINITE = {**INFINITY, "F8_E5M2": 0x7C, "F8_E4M3": 0x7F}

Result = TypeVar("Result")
Tell = Callable[[int], None]
Use = Callable[[memoryview], object]


@dataclass(frozen=True)
class HashedFile:
    """The sha256 and size of a file, and the sha256 of each tensor's payload by name."""

    sha256: str
    bytes: int
    tensors: Mapping[str, str]


def hash_files(
    work: Sequence[tuple[Path, Sequence[TensorInfo]]],
    *,
    threads: int,
    copies: Mapping[Path, Path] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[HashedFile]:
    """Hash each file and the tensors that its header lists; results in the order of `work`.

    A file in `copies` is copied to that new file in the same pass, flushed: what is hashed is
    what the copy holds. `progress` is told how many bytes were read since its last call, never
    twice at once. Raises `Refused` for the first tensor found with values that are not finite,
    or a file that changed while it was read, and `StorageError` for one that cannot be read or
    copied.
    """
    copies = copies or {}
    jobs = [
        functools.partial(_hash_file, path, tensors, copies.get(path), threads > 1)
        for path, tensors in work
    ]
    return _all(jobs, max(1, threads // 2), progress)


def hash_tensors(
    work: Sequence[tuple[Path, Sequence[TensorInfo]]],
    *,
    threads: int,
    progress: Callable[[int], None] | None = None,
) -> list[Mapping[str, str]]:
    """Hash the tensors alone, which all threads do at once; otherwise as `hash_files`."""
    unchanged = watch(path for path, _ in work)
    for path, tensors in work:
        if _status(path)[0] != max(info.stop for info in tensors):
            raise _changed(path)
    jobs = [
        functools.partial(_hash_batch, path, batch)
        for path, tensors in work
        for batch in _batches(tensors)
    ]
    found: dict[Path, dict[str, str]] = {path: {} for path, _ in work}
    for path, digests in _all(jobs, threads, progress):
        found[path] |= digests
    unchanged()
    return [found[path] for path, _ in work]


def watch(paths: Iterable[Path]) -> Callable[[], None]:
    """Return what raises `Refused` when one of the files is not, in size and time, as it is now."""
    before = {path: _status(path) for path in paths}

    def unchanged() -> None:
        for path, status in before.items():
            if _status(path) != status:
                raise _changed(path)

    return unchanged


def _status(path: Path) -> tuple[int, int]:
    with storage_errors(f"reading {path.name}"):
        found = path.stat()
    return found.st_size, found.st_mtime_ns


class TensorHashes:
    """The sha256 of each of a file's tensors, from the bytes of the file in order.

    With `check`, NaN and infinite values are counted: then no piece ends inside an element.
    """

    def __init__(self, tensors: Iterable[TensorInfo], at: int, *, check: bool = False) -> None:
        self.digests: dict[str, str] = {}
        self.not_finite: tuple[TensorInfo, int] | None = None  # the first with such values
        self._at = at
        self._check = check
        self._rest = deque(_in_order(tensors))
        self._hash = hashlib.sha256()
        self._bad = 0
        self._end()

    def update(self, data: memoryview) -> None:
        """Take the next bytes; those before the first tensor count for none."""
        while data and self._rest:
            tensor = self._rest[0]
            inside = self._at >= tensor.start
            piece = data[: (tensor.stop if inside else tensor.start) - self._at]
            if inside:
                self._hash.update(piece)
                self._bad += count_not_finite(piece, tensor.dtype) if self._check else 0
            self._at += len(piece)
            data = data[len(piece) :]
            self._end()

    def _end(self) -> None:
        """Finish the tensors that end here; empty ones begin and end at once."""
        while self._rest and self._at == self._rest[0].stop:
            tensor = self._rest.popleft()
            self.digests[tensor.name] = self._hash.hexdigest()
            if self._bad and not self.not_finite:
                self.not_finite = tensor, self._bad
            self._hash, self._bad = hashlib.sha256(), 0


def _in_order(tensors: Iterable[TensorInfo]) -> list[TensorInfo]:
    return sorted(tensors, key=lambda tensor: (tensor.start, tensor.stop))


def _batches(tensors: Sequence[TensorInfo]) -> Iterator[list[TensorInfo]]:
    """Cut the tensors of a file, in its order, into groups that are worth a thread's while."""
    batch: list[TensorInfo] = []
    for tensor in _in_order(tensors):
        if batch and tensor.stop - batch[0].start > _BATCH:
            yield batch
            batch = []
        batch.append(tensor)
    yield batch


def _all(
    jobs: Sequence[Callable[[Tell], Result]],
    threads: int,
    progress: Callable[[int], None] | None,
) -> list[Result]:
    """Do all jobs; the first error, or an interrupt, stops the others."""
    stop, turn = threading.Event(), threading.Lock()

    def tell(count: int) -> None:
        with turn:
            if progress:
                progress(count)
        if stop.is_set():
            raise _Stopped

    with ThreadPoolExecutor(min(threads, MAX_THREADS)) as pool:
        futures = [pool.submit(job, tell) for job in jobs]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:  # an interrupt too must not wait for gigabytes
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]


class _Stopped(Exception):
    """Another file failed, or the user interrupted: nobody waits for this one."""


class _Crew:
    """Several users of the same chunks, each in a thread of its own if `threads`."""

    def __init__(self, users: Sequence[Use], stack: ExitStack, *, threads: bool) -> None:
        self._users = users
        self._pools = [stack.enter_context(ThreadPoolExecutor(1)) for _ in users if threads]
        buffers = 3 if threads else 1
        self._ring = deque((memoryview(bytearray(CHUNK)), _nothing()) for _ in range(buffers))

    def buffer(self) -> memoryview:
        """Return a buffer whose last contents all have used."""
        _wait(self._ring[0][1])
        return self._ring[0][0]

    def give(self, chunk: memoryview) -> None:
        """Give what was read into the buffer to all users."""
        buffer, pending = self._ring.popleft()
        for number, use in enumerate(self._users):
            if self._pools:
                pending.append(self._pools[number].submit(use, chunk))
            else:
                use(chunk)
        self._ring.append((buffer, pending))

    def finish(self) -> None:
        """Wait until all is used."""
        for _, pending in self._ring:
            _wait(pending)


def _nothing() -> list[Future[object]]:
    return []


def _wait(pending: list[Future[object]]) -> None:
    for future in pending:
        future.result()
    pending.clear()


def _hash_file(
    path: Path, tensors: Sequence[TensorInfo], copy: Path | None, threads: bool, tell: Tell
) -> HashedFile:
    whole, each = hashlib.sha256(), TensorHashes(tensors, 0, check=True)
    what = "storing" if copy else "reading"
    with storage_errors(f"{what} {path.name}"), ExitStack() as stack:
        file = source = stack.enter_context(open(path, "rb", buffering=0))
        users: list[Use] = [whole.update, each.update]
        if copy:
            target = stack.enter_context(open(copy, "x+b", buffering=0))
            if clone(source.fileno(), target.fileno()):
                file = target  # nobody else changes it
            else:
                users.append(_Copy(target).write)
        before = os.fstat(source.fileno())
        many = threads and before.st_size > _HANDED_OVER
        crew = _Crew(users, stack, threads=many)
        end = max((tensor.stop for tensor in tensors), default=0)
        _read(file, (0, end), tensors, crew, tell)
        if each.not_finite:
            raise _not_finite(path, *each.not_finite)
        after = os.fstat(source.fileno())
        if (end, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise _changed(path)
        if copy:
            os.fsync(target.fileno())
        return HashedFile(whole.hexdigest(), end, each.digests)


class _Copy:
    """A file that is written chunk by chunk."""

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self._at = 0

    def write(self, chunk: memoryview) -> None:
        write_all(self._file.fileno(), chunk, self._at)
        self._at += len(chunk)


def _hash_batch(
    path: Path, tensors: Sequence[TensorInfo], tell: Tell
) -> tuple[Path, Mapping[str, str]]:
    start, stop = tensors[0].start, tensors[-1].stop
    each = TensorHashes(tensors, start, check=True)
    with storage_errors(f"reading {path.name}"), ExitStack() as stack:
        file = stack.enter_context(open(path, "rb", buffering=0))
        file.seek(start)
        _read(file, (start, stop), tensors, _Crew([each.update], stack, threads=False), tell)
    if each.not_finite:
        raise _not_finite(path, *each.not_finite)
    return path, each.digests


def _read(
    file: FileIO, part: tuple[int, int], tensors: Sequence[TensorInfo], crew: _Crew, tell: Tell
) -> None:
    """Give the crew a part of the file, chunk by chunk."""
    at = part[0]
    for border in _borders(part, tensors):
        chunk = crew.buffer()[: border - at]
        filled = 0
        while filled < len(chunk):
            count = file.readinto(chunk[filled:])
            if not count:
                raise _changed(file.name)
            filled += count
        crew.give(chunk)
        tell(len(chunk))
        at = border
    crew.finish()


def _borders(part: tuple[int, int], tensors: Sequence[TensorInfo]) -> Iterator[int]:
    """Cut a part of a file into chunks, as large as they may be, that end inside no element."""
    ordered = [tensor for tensor in _in_order(tensors) if tensor.stop > tensor.start]
    starts = [tensor.start for tensor in ordered]
    at, end = part
    while at < end:
        at = min(at + CHUNK, end)
        if number := bisect_right(starts, at):
            tensor = ordered[number - 1]
            if at < tensor.stop:
                at -= (at - tensor.start) % DTYPE_BYTES[tensor.dtype]
        yield at


def count_not_finite(payload: memoryview, dtype: str) -> int:
    """Count the NaN and infinite values in whole little-endian elements of `dtype`."""
    if dtype not in _NOT_FINITE or not payload:
        return 0
    size, limit = DTYPE_BYTES[dtype], _NOT_FINITE[dtype]
    bits = np.frombuffer(payload, f"<u{size}")
    if all_below(bits, limit):
        return 0
    return int(np.count_nonzero((bits & bits.dtype.type((1 << (8 * size - 1)) - 1)) >= limit))


def _not_finite(path: Path, tensor: TensorInfo, count: int) -> Refused:
    return Refused(
        f"tensor {tensor.name} of {path.name} holds {count} values that are NaN or infinite, "
        f"of {tensor.elements}",
        hint="the training diverged or the file is damaged; use an earlier checkpoint",
        tensor=tensor.name,
        path=str(path),
    )


def _changed(path: object) -> Refused:
    return Refused(
        f"{path} changed while it was read",
        hint="wait until whatever writes it has finished, then run the command again",
        path=str(path),
    )
