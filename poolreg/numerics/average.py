"""The exact average of models, on flat arrays: one kernel for merges on disk and in memory.

With parents x₁ … x_k in the order of their digests, integer weights w_i and d = Σ w_i

    average = round( (((0 + w₁·x₁) + w₂·x₂) + … + w_k·x_k) / d )

where products, sums and the quotient are float64 and `round` goes once to the storage dtype,
to nearest, ties to even. A float64 holds such sums of 16- and 32-bit floats exactly unless
their exponents lie very far apart, so every order, chunking, number of threads or walk of
additions and subtractions gives the same bytes. A sum that is zero is +0.

Arrays are contiguous, and flat unless said otherwise. Raw values are arrays in the numpy dtype
of `poolreg.tensors.NUMPY_DTYPES`: bfloat16 is its bit pattern in uint16.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from poolreg.errors import Refused
from poolreg.tensors import NUMPY_DTYPES

Array = npt.NDArray[Any]
Doubles = npt.NDArray[np.float64]

# Values of at least this magnitude round to infinity: halfway between the largest finite value
# of the dtype and the power of two above it.
OVERFLOW = {
    "F64": float("inf"),
    "F32": 2.0**128 - 2.0**103,
    "BF16": 2.0**128 - 2.0**119,
    "F16": 65520.0,
}
FLOATS = tuple(OVERFLOW)  # the dtypes that can be averaged

# The bits of the smallest value, without its sign, that is not finite.
INFINITY = {"F64": 0x7FF0 << 48, "F32": 0x7F80 << 16, "F16": 0x7C00, "BF16": 0x7F80}
_BF16_OVERFLOW = 0x7F7F_8000  # OVERFLOW["BF16"] as a float32

CHUNK = 1 << 17  # elements at a time: a chunk of float64 sums fits a core's 1 MB cache


class Scratch:
    """The buffers of one thread, made once: a chunk's sum and what the kernel needs beside it."""

    def __init__(self, elements: int = CHUNK) -> None:
        self.sum = np.empty(elements, np.float64)
        self.wide = np.empty(elements, np.float64)
        self.single = np.empty(elements, np.float32)
        self.words = np.empty(elements, np.uint32)
        self.flags = np.empty((2, elements), np.bool_)


def widen(raw: Array, dtype: str, out: Doubles | None = None) -> Doubles:
    """Return the values of `raw`, of any shape, as float64, exactly."""
    wide = np.empty(raw.shape, np.float64) if out is None else out
    with np.errstate(all="ignore"):  # signalling NaNs warn
        flat = _as_float(raw.reshape(-1), dtype, np.empty(raw.size, np.float32))
        np.copyto(wide, flat.reshape(raw.shape))
    return wide


def narrow(values: Doubles, dtype: str, out: Array | None = None) -> Array:
    """Round float64 values once to `dtype`: to nearest, ties to even, overflow to infinity."""
    raw = np.empty(values.shape, NUMPY_DTYPES[dtype]) if out is None else out
    flat = np.ascontiguousarray(values).reshape(-1)
    with np.errstate(all="ignore"):
        _narrow(flat, dtype, raw.reshape(-1), scratch=Scratch(flat.size))
    if dtype == "BF16":  # rounding the payload of a NaN could carry it away
        raw[np.isnan(values)] = 0x7FC0
    return raw


def accumulate(
    acc: Doubles, raw: Array, dtype: str, *, weight: int = 1, first: bool = False,
    scratch: Scratch | None = None,
) -> None:  # fmt: skip
    """Add `weight` times `raw` to the float64 sums `acc`, in place.

    Sums start from zeros; `first` takes zeros in place of what `acc` holds. A negative weight
    takes a parent away again.
    """
    scratch = scratch or Scratch()
    factor = float(weight)
    with np.errstate(all="ignore"):
        for part in _chunks(acc.size):
            values = _as_float(raw[part], dtype, scratch.single)
            if weight != 1:
                wide = scratch.wide[: values.size]
                values = np.multiply(values, factor, out=wide, dtype=np.float64)
            np.add(0.0 if first else acc[part], values, out=acc[part], dtype=np.float64)


def finish(
    acc: Doubles, denominator: int, dtype: str, *, out: Array, scratch: Scratch | None = None
) -> None:
    """Write `acc / denominator`, rounded once to `dtype`, into `out`; `acc` stays as it is.

    Raises `Refused`, with the element's `index`, if an average is not finite in `dtype`.
    """
    scratch = scratch or Scratch()
    divisor = float(denominator)
    with np.errstate(all="ignore"):
        for part in _chunks(acc.size):
            values = acc[part]
            if denominator != 1:
                values = np.divide(values, divisor, out=scratch.wide[: values.size])
            if not _narrow(values, dtype, out[part], scratch=scratch):
                _refuse(values, dtype, part.start)


def average_into(
    out: Array,
    raws: Iterable[Array],
    weights: Sequence[int],
    *,
    dtype: str,
    out_dtype: str,
    scratch: Scratch,
) -> None:
    """Write the weighted average of at most `CHUNK` values of each parent into `out`.

    `raws` may yield one buffer again and again: each is used up before the next is asked for.
    Raises `Refused`, with the element's `index`, if an average is not finite in `out_dtype`.
    """
    acc = scratch.sum[: out.size]
    for number, (raw, weight) in enumerate(zip(raws, weights, strict=True)):
        accumulate(acc, raw, dtype, weight=weight, first=number == 0, scratch=scratch)
    finish(acc, sum(weights), out_dtype, out=out, scratch=scratch)


def _chunks(size: int) -> Iterator[slice]:
    for start in range(0, size, CHUNK):
        yield slice(start, min(start + CHUNK, size))


def _refuse(values: Doubles, dtype: str, offset: int) -> None:
    index = int(np.flatnonzero(~(np.abs(values) < OVERFLOW[dtype]))[0])
    value = float(values[index])
    if np.isfinite(value):
        reason, hint = f"{value:g}, too large for {dtype}", "choose a storage dtype of wider range"
    else:
        reason, hint = f"{value:g}", "a parent holds values that are not finite; leave it out"
    raise Refused(f"the average is {reason}", hint=hint, index=offset + index, value=str(value))


def _as_float(raw: Array, dtype: str, single: npt.NDArray[np.float32]) -> Array:
    """Return `raw` as an array of a numpy float type; bfloat16 values are placed in `single`."""
    if dtype != "BF16":
        return raw
    words = single[: raw.size].view(np.uint32)
    np.copyto(words, raw)
    np.left_shift(words, 16, out=words)  # a bfloat16 is the upper half of a float32
    return single[: raw.size]


def all_below(bits: Array, limit: int) -> bool:
    """Tell whether floats, given as unsigned integers, are all smaller than the one of `limit`.

    Signs do not count. Two maxima need no temporary arrays: as unsigned numbers the negative
    values are the largest, as signed numbers the positive ones are.
    """
    if not bits.size:
        return True
    width = bits.dtype.itemsize
    sign = 1 << (8 * width - 1)
    return int(bits.max()) < sign + limit and int(bits.view(f"<i{width}").max()) < limit


def _narrow(values: Doubles, dtype: str, out: Array, *, scratch: Scratch) -> bool:
    """Round `values` into `out` and tell whether all are finite there."""
    if dtype == "BF16":
        return _narrow_bf16(values, out, scratch)
    np.copyto(out, values, casting="same_kind")
    return all_below(out.view(f"<u{out.dtype.itemsize}"), INFINITY[dtype])


def _narrow_bf16(values: Doubles, out: Array, scratch: Scratch) -> bool:
    """Round to float32, then to bfloat16, which is one correct rounding but for false ties.

    A float32 halfway between two bfloat16 that is not the value itself, but next to it, would
    be rounded to even whatever side the value lies on: it is moved one step to that side first.
    """
    single, other = scratch.single[: values.size], scratch.words[: values.size]
    words = single.view(np.uint32)
    tie, inexact = scratch.flags[:, : values.size]
    np.copyto(single, values, casting="same_kind")
    np.bitwise_and(words, 0xFFFF, out=other)
    np.equal(other, 0x8000, out=tie)
    np.not_equal(values, single, out=inexact)
    np.logical_and(tie, inexact, out=tie)
    if (false := np.flatnonzero(tie)).size:
        outward = np.abs(values[false]) > np.abs(single[false])
        words[false] += np.where(outward, 1, -1).astype(np.uint32)
    finite = all_below(words, _BF16_OVERFLOW)
    np.right_shift(words, 16, out=other)
    np.bitwise_and(other, 1, out=other)
    np.add(words, other, out=words)
    np.add(words, 0x7FFF, out=words)
    np.right_shift(words, 16, out=words)
    np.copyto(out, words, casting="same_kind")
    return finite
