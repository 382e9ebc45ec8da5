"""One pass over weights files: hash every file, hash every tensor, look for NaN and infinity.

Each byte is read once, by plain reads (a file that shrinks meanwhile is an error, not a crash),
and used while it is hot. The hash of a file is one sequential chain, which sets the pace: a
second thread computes it while the first hashes and checks the tensors.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import numpy as np

from poolreg.errors import Refused
from poolreg.files import storage_errors
from poolreg.tensors import TensorInfo

CHUNK = 2 << 20  # bytes: a multiple of every item size, small enough to stay in a core's cache
_HANDED_OVER = 64 << 10  # bytes below which another thread costs more than it saves

# The item size in bytes, and the bits of the smallest value, without its sign, that is not
# finite: all larger ones are not finite either, because the exponent stands above the mantissa.
_NOT_FINITE = {
    "F64": (8, 0x7FF0_0000_0000_0000), "F32": (4, 0x7F80_0000), "F16": (2, 0x7C00),
    "BF16": (2, 0x7F80), "F8_E5M2": (1, 0x7C), "F8_E4M3": (1, 0x7F),
}  # fmt: skip


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
    progress: Callable[[int], None] | None = None,
) -> list[HashedFile]:
    """Hash each file and the tensors that its header lists; results in the order of `work`.

    `progress` is told how many bytes were read since its last call, never twice at once.
    Raises `Refused` for the first tensor found with values that are not finite, or a file that
    changed while it was read, and `StorageError` for one that cannot be read.
    """
    stop, turn = threading.Event(), threading.Lock()

    def tell(count: int) -> bool:
        with turn:
            if progress:
                progress(count)
        return not stop.is_set()

    with ThreadPoolExecutor(max(1, threads // 2)) as pool:
        futures = [pool.submit(_hash_file, *item, threads > 1, tell) for item in work]
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


class _Chain:
    """The hash of a file, one chunk behind in a second thread where there is one."""

    def __init__(self, second: ThreadPoolExecutor | None) -> None:
        self._hash = hashlib.sha256()
        self._second = second
        self._pending: Future[None] | None = None

    def update(self, chunk: memoryview) -> None:
        """Add a chunk; the one before it is free to be overwritten when this returns."""
        self._finish()
        if self._second and len(chunk) > _HANDED_OVER:
            self._pending = self._second.submit(self._hash.update, chunk)
        else:
            self._hash.update(chunk)

    def hexdigest(self) -> str:
        self._finish()
        return self._hash.hexdigest()

    def _finish(self) -> None:
        if self._pending:
            self._pending.result()
        self._pending = None


def _hash_file(
    path: Path, tensors: Sequence[TensorInfo], two_threads: bool, tell: Callable[[int], bool]
) -> HashedFile:
    buffers = itertools.cycle([memoryview(bytearray(CHUNK)) for _ in range(2)])
    digests = {}
    with (
        storage_errors(f"reading {path.name}"),
        open(path, "rb", buffering=0) as file,
        ThreadPoolExecutor(1) as second,
    ):
        before = os.fstat(file.fileno())
        chain = _Chain(second if two_threads else None)
        for tensor, length in _parts(tensors):
            payload, bad = hashlib.sha256(), 0
            for chunk in _chunks(file, length, buffers):
                chain.update(chunk)
                if tensor:
                    payload.update(chunk)
                    bad += count_not_finite(chunk, tensor.dtype)
                if not tell(len(chunk)):
                    raise _Stopped
            if tensor and bad:
                raise _not_finite(path, tensor, bad)
            if tensor:
                digests[tensor.name] = payload.hexdigest()
        after = os.fstat(file.fileno())
        if file.read(1) or (before.st_size, before.st_mtime_ns) != (
            after.st_size,
            after.st_mtime_ns,
        ):
            raise _changed(file)
        return HashedFile(chain.hexdigest(), before.st_size, digests)


def _parts(tensors: Sequence[TensorInfo]) -> Iterator[tuple[TensorInfo | None, int]]:
    """Cut a file into its tensors and what stands before them, as (tensor, bytes), in order."""
    at = 0
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.stop)):
        if tensor.start > at:
            yield None, tensor.start - at
        yield tensor, tensor.stop - tensor.start
        at = tensor.stop


def _chunks(file: FileIO, length: int, buffers: Iterator[memoryview]) -> Iterator[memoryview]:
    """Read the next `length` bytes in chunks; no chunk ends inside an element."""
    while length:
        chunk = next(buffers)[: min(length, CHUNK)]
        filled = 0
        while filled < len(chunk):
            count = file.readinto(chunk[filled:])
            if not count:
                raise _changed(file)
            filled += count
        yield chunk
        length -= len(chunk)


def count_not_finite(payload: memoryview, dtype: str) -> int:
    """Count the NaN and infinite values in whole little-endian elements of `dtype`."""
    if dtype not in _NOT_FINITE or not payload:
        return 0
    size, limit = _NOT_FINITE[dtype]
    bits = np.frombuffer(payload, f"<u{size}")
    sign = 1 << (8 * size - 1)
    # Two maxima need no temporary arrays: as unsigned numbers the negative values are the
    # largest, as signed numbers the positive ones are.
    if int(bits.max()) < sign + limit and int(bits.view(f"<i{size}").max()) < limit:
        return 0
    return int(np.count_nonzero((bits & bits.dtype.type(sign - 1)) >= limit))


def _not_finite(path: Path, tensor: TensorInfo, count: int) -> Refused:
    return Refused(
        f"tensor {tensor.name} of {path.name} holds {count} values that are NaN or infinite, "
        f"of {tensor.elements}",
        hint="the training diverged or the file is damaged; use an earlier checkpoint",
        tensor=tensor.name,
        path=str(path),
    )


def _changed(file: FileIO) -> Refused:
    return Refused(
        f"{file.name} changed while it was read",
        hint="wait until whatever writes it has finished, then run the command again",
        path=str(file.name),
    )
