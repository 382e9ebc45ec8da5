"""Stream the average of several models into one safetensors file.

Every chunk of every parent is read once and written once in place, by all cores, with a few
chunks of memory for each thread. Neighbouring tensors that lie in the same order everywhere
are one flat array, so small tensors cost nothing extra. What is written is hashed while it is
hot, and on its way to the disk before the last chunk is done.
"""

from __future__ import annotations

import hashlib
import os
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import NoReturn

import numpy as np

from poolreg.errors import Conflict, Incompatible, Refused, StorageError
from poolreg.files import storage_errors
from poolreg.numerics.average import CHUNK, FLOATS, Array, Scratch, average_into, widen
from poolreg.tensors import DTYPE_BYTES, NUMPY_DTYPES, Layout, TensorInfo, plan_file
from poolreg.weights.disk import MAX_THREADS, allocate, prefetch, write_all
from poolreg.weights.hashing import HashedFile, TensorHashes

WINDOW = 8 * CHUNK  # elements of each parent that are asked for at a time

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Parent:
    """One model to average: its integer weight, where its tensors lie, its name in messages."""

    weight: int
    tensors: Mapping[str, tuple[Path, TensorInfo]]
    label: str


def write_average(
    path: Path,
    parents: Sequence[Parent],
    layouts: Mapping[str, Layout],
    *,
    whole: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> HashedFile:
    """Write the tensors of `layouts`, averaged over `parents`, to the new file `path`, flushed.

    The parents agree in names, shapes and dtypes. A floating tensor is averaged and stored in
    the dtype of its layout; any other, and every tensor of a single parent, is copied. Returns
    the hashes of the tensors, and of the file as a whole if `whole` (else that is empty).
    `progress` gets the bytes just written, from one worker thread at a time.

    Raises `Incompatible` for tensors to copy that differ, `Refused` for an average that is not
    finite, `Conflict` if `path` exists, `StorageError` when the disk is full.
    """
    start, infos = plan_file(layouts, {"format": "pt"})
    runs = list(_runs(parents, infos))
    size = max(info.stop for info in infos.values())
    tensors, file = TensorHashes(infos.values(), len(start)), hashlib.sha256(start)
    with storage_errors(f"writing {path}"), ExitStack() as stack:
        files = {source: None for run in runs for source, _ in run.sources}
        work = _Work(
            chunks=[chunk for run in runs for chunk in _chunks(run)],
            parents=parents,
            files={source: _opened(source, stack) for source in files},
            output=_created(path, stack),
            hashes=[tensors.update, *([file.update] if whole else [])],
            progress=progress,
            threads=min(threads or os.cpu_count() or 1, MAX_THREADS),
        )
        allocate(work.output, size)
        write_all(work.output, memoryview(start), 0)
        work.run()
        os.fsync(work.output)
    return HashedFile(file.hexdigest() if whole else "", size, tensors.digests)


@dataclass(frozen=True)
class _Run:
    """Neighbouring tensors that form one flat array in every parent and in the output."""

    names: tuple[str, ...]
    firsts: tuple[int, ...]  # the element at which each tensor begins
    elements: int
    dtype: str
    out_dtype: str
    start: int  # offset in the output file
    sources: tuple[tuple[Path, int], ...]  # file and offset in each parent

    def tensor_at(self, element: int) -> str:
        return self.names[bisect_right(self.firsts, element) - 1]


@dataclass(frozen=True)
class _Chunk:
    run: _Run
    first: int
    elements: int


def _runs(parents: Sequence[Parent], infos: Mapping[str, TensorInfo]) -> Iterator[_Run]:
    """Join the tensors of one output file, in file order, into the longest possible runs."""
    groups: list[list[str]] = []
    for name in infos:
        if groups and _continues(parents, groups[-1][-1], name):
            groups[-1].append(name)
        else:
            groups.append([name])
    for names in groups:
        first = infos[names[0]]
        firsts = [(infos[name].start - first.start) // DTYPE_BYTES[first.dtype] for name in names]
        sources = [parent.tensors[names[0]] for parent in parents]
        yield _Run(
            names=tuple(names),
            firsts=tuple(firsts),
            elements=sum(infos[name].elements for name in names),
            dtype=sources[0][1].dtype,
            out_dtype=first.dtype,
            start=first.start,
            sources=tuple((path, info.start) for path, info in sources),
        )


def _continues(parents: Sequence[Parent], last: str, following: str) -> bool:
    pairs = [(parent.tensors[last], parent.tensors[following]) for parent in parents]
    return all(
        path == next_path and info.dtype == next_info.dtype and info.stop == next_info.start
        for (path, info), (next_path, next_info) in pairs
    )


def _chunks(run: _Run) -> Iterator[_Chunk]:
    for first in range(0, run.elements, CHUNK):
        yield _Chunk(run, first, min(CHUNK, run.elements - first))


def _opened(path: Path, stack: ExitStack) -> int:
    with storage_errors(f"reading {path}"):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, descriptor)
    return descriptor


def _created(path: Path, stack: ExitStack) -> int:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        raise Conflict(f"{path} exists already", hint="merge into an empty folder") from None
    stack.callback(os.close, descriptor)
    return descriptor


_Done = tuple[Array, Array]  # a buffer, and what was written of it


class _InOrder:
    """Uses what comes numbered from 0 in that order, one at a time; nobody waits for a turn.

    Whoever brings the next one uses it, and then what others have brought meanwhile.
    """

    def __init__(self, use: Callable[[_Done], None]) -> None:
        self._use = use
        self._waiting: dict[int, _Done] = {}
        self._next = 0
        self._busy = False
        self._lock = threading.Lock()

    def give(self, number: int, data: _Done) -> None:
        """Use `data` here and now, or leave it to the one who is at it."""
        with self._lock:
            self._waiting[number] = data
            if self._busy:
                return
            self._busy = True
        while (ready := self._ready()) is not None:
            self._use(ready)

    def _ready(self) -> _Done | None:
        with self._lock:
            data = self._waiting.pop(self._next, None)
            self._busy = data is not None
            self._next += self._busy
            return data


class _Buffers:
    """What one thread needs, made once: the kernel's scratch and an input chunk."""

    def __init__(self) -> None:
        self.scratch = Scratch()
        self._input = np.empty(8 * CHUNK, np.uint8)

    def input(self, dtype: str, elements: int) -> Array:
        return _seen(self._input, dtype, elements)


def _seen(buffer: Array, dtype: str, elements: int) -> Array:
    return buffer[: elements * DTYPE_BYTES[dtype]].view(NUMPY_DTYPES[dtype])


@dataclass
class _Work:
    """The chunks of one output file, and the threads that take them one after the other."""

    chunks: Sequence[_Chunk]
    parents: Sequence[Parent]
    files: Mapping[Path, int]
    output: int
    hashes: Sequence[Callable[[memoryview], object]]
    progress: Progress | None
    threads: int
    taken: Iterator[int] = field(init=False)
    free: SimpleQueue[Array | None] = field(default_factory=SimpleQueue)  # to write into
    lock: threading.Lock = field(default_factory=threading.Lock)
    stopped: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.taken = iter(range(len(self.chunks)))
        self.written = _InOrder(self._hash)

    def run(self) -> None:
        """Write every chunk; the first error stops all threads and is raised."""
        for _ in range(2 * self.threads):
            self.free.put(np.empty(8 * CHUNK, np.uint8))
        with ThreadPoolExecutor(self.threads, thread_name_prefix="merge") as pool:
            try:
                for future in [pool.submit(self._take) for _ in range(self.threads)]:
                    future.result()
            finally:
                self._stop()  # also after Ctrl-C, which only the main thread sees

    def _take(self) -> None:
        buffers = _Buffers()
        try:
            # The buffer first: one who waited for it with a chunk in hand would hold up the rest.
            while (buffer := self.free.get()) is not None and not self.stopped.is_set():
                with self.lock:
                    number = next(self.taken, None)
                if number is None:
                    self.free.put(buffer)
                    return
                self._prefetch(number + self.threads)
                out = self._write(self.chunks[number], buffers, buffer)
                if self.progress:
                    with self.lock:
                        self.progress(out.nbytes)
                self.written.give(number, (buffer, out))
        except BaseException:
            self._stop()
            raise

    def _hash(self, done: _Done) -> None:
        buffer, out = done
        for update in self.hashes:
            update(out.data.cast("B"))
        self.free.put(buffer)

    def _stop(self) -> None:
        self.stopped.set()
        for _ in range(self.threads):
            self.free.put(None)

    def _prefetch(self, number: int) -> None:
        # Several parents read in turn defeat the kernel's own readahead.
        if number < len(self.chunks) and self.chunks[number].first % WINDOW == 0:
            run, first = self.chunks[number].run, self.chunks[number].first
            width, elements = DTYPE_BYTES[run.dtype], min(WINDOW, run.elements - first)
            for path, start in run.sources:
                prefetch(self.files[path], start + first * width, elements * width)

    def _write(self, chunk: _Chunk, buffers: _Buffers, buffer: Array) -> Array:
        run = chunk.run
        out = _seen(buffer, run.out_dtype, chunk.elements)
        if run.dtype in FLOATS and (len(self.parents) > 1 or run.dtype != run.out_dtype):
            self._average(chunk, out, buffers)
        else:
            self._copy(chunk, out, buffers)
        write_all(self.output, out.data, run.start + chunk.first * out.itemsize)
        return out

    def _average(self, chunk: _Chunk, out: Array, buffers: _Buffers) -> None:
        try:
            average_into(
                out,
                (self._read(chunk, number, buffers) for number in range(len(self.parents))),
                [parent.weight for parent in self.parents],
                dtype=chunk.run.dtype,
                out_dtype=chunk.run.out_dtype,
                scratch=buffers.scratch,
            )
        except Refused as error:
            self._explain(error, chunk, buffers)

    def _explain(self, error: Refused, chunk: _Chunk, buffers: _Buffers) -> NoReturn:
        """Raise `error` again with the tensor's name and the parents that are not finite."""
        at = int(error.data["index"])
        name = chunk.run.tensor_at(chunk.first + at)
        culprits = []
        for number, parent in enumerate(self.parents):
            value = self._read(chunk, number, buffers)[at : at + 1]
            if not np.isfinite(widen(value, chunk.run.dtype)).all():
                culprits.append(parent.label)
        where = f", because of {', '.join(culprits)}" if culprits else ""
        raise Refused(
            f"tensor {name!r}: {error.message}{where}",
            hint=error.hint,
            tensor=name,
            models=tuple(culprits),
        ) from error

    def _copy(self, chunk: _Chunk, out: Array, buffers: _Buffers) -> None:
        for number, parent in enumerate(self.parents):
            raw = self._read(chunk, number, buffers)
            if number == 0:
                out[:] = raw
            elif different := np.flatnonzero(out.view(np.uint8) != raw.view(np.uint8)).tolist():
                name = chunk.run.tensor_at(chunk.first + different[0] // out.itemsize)
                raise Incompatible(
                    f"tensor {name!r} is {chunk.run.dtype} and differs between "
                    f"{self.parents[0].label} and {parent.label}",
                    hint="tensors that are not floating point must be equal in all models",
                    tensor=name,
                    models=(self.parents[0].label, parent.label),
                )

    def _read(self, chunk: _Chunk, number: int, buffers: _Buffers) -> Array:
        path, start = chunk.run.sources[number]
        raw = buffers.input(chunk.run.dtype, chunk.elements)
        view = raw.data.cast("B")
        offset = start + chunk.first * raw.itemsize
        while view:
            count = os.preadv(self.files[path], [view], offset)
            if count == 0:
                raise StorageError(
                    f"{path} ends inside tensor {chunk.run.tensor_at(chunk.first)!r} "
                    f"of {self.parents[number].label}",
                    hint="the file was cut after it had been checked; restore it and merge again",
                    path=str(path),
                )
            view, offset = view[count:], offset + count
        return raw
