"""Averages of models in memory, on the CPU, straight into the tensors of a live model.

The kernel of `poolreg.numerics.average` runs over chunks that stay in the cache. The sum of a
beginning that two neighbours share is kept, so that the second of them only adds what it has
more. Nothing is ever subtracted, so no rounding could be left behind.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from poolreg.errors import Refused
from poolreg.numerics.average import CHUNK, Scratch, accumulate, finish
from poolreg.tensors import NUMPY_DTYPES

# Kept sums take at most so many bytes; what does not fit is summed again.
SUMS_AT_ONCE = 2 << 30
# Reading the kept sum of fewer models than this takes as long as summing them again. At least 2.
FEWEST_KEPT = 3

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
}  # fmt: skip

_SERIAL = 1 << 14  # elements of a copy, so few that torch does it in the calling thread

Array = npt.NDArray[Any]
Doubles = npt.NDArray[np.float64]
Weights = Sequence[tuple[str, int]]  # (model digest, whole number), by digest


@dataclass(frozen=True)
class Slot:
    """A floating tensor on disk, its dtype there, and the live tensor that it becomes, flat."""

    name: str
    dtype: str
    live: torch.Tensor


class HostAverages:
    """Writes averages into live tensors on the CPU, with so many threads of its own.

    `raws` are the tensors of each model by digest and name, flat, as raw values.
    """

    def __init__(
        self, slots: Sequence[Slot], raws: Mapping[str, Mapping[str, Array]], *, threads: int
    ) -> None:
        self._raws = raws
        self._kept = _KeptSums(sum(slot.live.numel() for slot in slots))
        pieces = list(_pieces(slots))
        self._shares = [pieces[first::threads] for first in range(threads)]
        self._buffers = [_Buffers() for _ in range(threads)]
        self._crew = ThreadPoolExecutor(threads, thread_name_prefix="average")

    def load(self, weights: Weights, following: Weights = ()) -> None:
        """Take on the average of `weights`; `following` is what will be asked for next.

        Raises `Refused`, with the `tensor` and `index`, for an average that is not finite.
        """
        base, keep = self._kept.plan(weights, following)

        def work(share: Sequence[_Piece], buffers: _Buffers) -> None:
            for piece in share:
                self._take_on(piece, weights, buffers, base=base, keep=keep)

        pairs = zip(self._shares, self._buffers, strict=True)
        done = [self._crew.submit(work, share, buffers) for share, buffers in pairs]
        wait(done)  # also after an error: nobody may write behind the next average's back
        for share in done:
            share.result()
        self._kept.made(keep)

    def _take_on(
        self, piece: _Piece, weights: Weights, buffers: _Buffers, *, base: _Sums | None,
        keep: _Sums | None,
    ) -> None:  # fmt: skip
        dtype = piece.slot.dtype
        out = buffers.raw(piece) if piece.memory is None else piece.memory
        if len(weights) == 1:  # a copy, as on disk: a sum would lose the sign of zeros
            np.copyto(out, self._raw(weights[0][0], piece))
        else:
            sums = self._sum(piece, weights, buffers.scratch, base=base, keep=keep)
            total = sum(weight for _, weight in weights)
            with placed(piece.slot, piece.start):
                finish(sums, total, dtype, out=out, scratch=buffers.scratch)
        if piece.memory is None:
            _convert(out, dtype, piece.slot.live[piece.start : piece.stop])

    def _sum(
        self, piece: _Piece, weights: Weights, scratch: Scratch, *, base: _Sums | None,
        keep: _Sums | None,
    ) -> Doubles:  # fmt: skip
        size = piece.stop - piece.start
        sums, place = scratch.sum[:size], slice(piece.place, piece.place + size)
        if base:
            np.copyto(sums, base.values[place])
        for number in range(base.length if base else 0, len(weights)):
            model, weight = weights[number]
            accumulate(
                sums, self._raw(model, piece), piece.slot.dtype, weight=weight, first=number == 0,
                scratch=scratch,
            )  # fmt: skip
            if keep and number + 1 == keep.length:
                np.copyto(keep.values[place], sums)
        return sums

    def _raw(self, model: str, piece: _Piece) -> Array:
        return self._raws[model][piece.slot.name][piece.start : piece.stop]


class _Sums(NamedTuple):
    """The float64 sums, over all slots, of the first `length` components of an average."""

    length: int
    values: Doubles


class _KeptSums:
    """The sums of beginnings of the last average, shortest first, within a limit of memory."""

    def __init__(self, elements: int) -> None:
        self._elements = elements
        self._most = SUMS_AT_ONCE // max(8 * elements, 1)
        self._last: tuple[tuple[str, int], ...] = ()
        self._stack: list[_Sums] = []
        self._free: list[Doubles] = []

    def plan(self, weights: Weights, following: Weights) -> tuple[_Sums | None, _Sums | None]:
        """Return the sums that the next average begins with, and where to keep some of its own."""
        common = shared(weights, self._last)
        while self._stack and self._stack[-1].length > common:
            self._free.append(self._stack.pop().values)
        self._last = tuple(weights)
        base = self._stack[-1] if self._stack else None
        length = shared(weights, following)
        if length < FEWEST_KEPT or (base and base.length >= length) or not self._most:
            return base, None
        return base, _Sums(length, self._room())

    def _room(self) -> Doubles:
        if self._free:
            return self._free.pop()
        if len(self._stack) < self._most:
            return np.empty(self._elements)
        # The shortest is needed last. It may be the base of this average, which is read, piece
        # by piece, before it is overwritten.
        return self._stack.pop(0).values

    def made(self, keep: _Sums | None) -> None:
        """Say that an average is done, with the sums that it kept."""
        if keep:
            self._stack.append(keep)


class _Piece(NamedTuple):
    """A part of one slot: elements [start, stop), which stand at `place` in the kept sums.

    `memory` is the live tensor's, as raw values, where it has the dtype on disk.
    """

    slot: Slot
    start: int
    stop: int
    place: int
    memory: Array | None


class _Buffers:
    """What one thread needs, made once."""

    def __init__(self) -> None:
        self.scratch = Scratch()
        self._raw = np.empty(8 * CHUNK, np.uint8)

    def raw(self, piece: _Piece) -> Array:
        """Return room for a piece's average in its dtype on disk."""
        dtype = np.dtype(NUMPY_DTYPES[piece.slot.dtype])
        return self._raw[: (piece.stop - piece.start) * dtype.itemsize].view(dtype)


@contextlib.contextmanager
def placed(slot: Slot, start: int) -> Iterator[None]:
    """Say of an average that is refused in the block, which begins at `start`, where it stands."""
    try:
        yield
    except Refused as error:
        raise Refused(
            f"tensor {slot.name!r}: {error.message}", hint=error.hint, tensor=slot.name,
            index=start + int(error.data["index"]),
        ) from error  # fmt: skip


def shared(one: Weights, other: Weights) -> int:
    """Return how many components at their beginning two averages share."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _pieces(slots: Sequence[Slot]) -> Iterator[_Piece]:
    place = 0
    for slot in slots:
        size = slot.live.numel()
        for start in range(0, size, CHUNK):
            stop = min(start + CHUNK, size)
            yield _Piece(slot, start, stop, place, _memory(slot, start, stop))
            place += stop - start


def _memory(slot: Slot, start: int, stop: int) -> Array | None:
    if slot.live.dtype != TORCH_DTYPES[slot.dtype] or slot.live.device.type != "cpu":
        return None
    live = slot.live[start:stop]
    numbers = live.view(torch.int16) if slot.dtype == "BF16" else live
    return np.asarray(numbers.numpy().view(NUMPY_DTYPES[slot.dtype]))


def _convert(raw: Array, dtype: str, live: torch.Tensor) -> None:
    """Convert raw values to the dtype that is computed in, as loading does."""
    values = as_tensor(raw, dtype)
    step = _SERIAL if live.device.type == "cpu" else len(raw)
    for start in range(0, len(raw), step):
        live[start : start + step].copy_(values[start : start + step])


def as_tensor(raw: Array, dtype: str) -> torch.Tensor:
    """Return a torch tensor over writable raw values (bfloat16 as bits in uint16)."""
    if dtype == "BF16":
        return torch.from_numpy(raw.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(raw)
