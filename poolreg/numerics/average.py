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

CHUNK = 1 << 17  # elements at a time: a chunk of float64 sums fits a core's 1 MB cache

_LOW = np.uint64((1 << 42) - 1)  # of a float64, what lies under 11 significant bits
_HIGH = np.uint64(~((1 << 42) - 1) & ((1 << 64) - 1))


class Scratch:
    """The buffers of one thread, made once: a chunk's sum and what the kernel needs beside it."""

    def __init__(self, elements: int = CHUNK) -> None:
        self.sum = np.empty(elements, np.float64)
        self.wide = np.empty(elements, np.float64)
        self.bits = np.empty(elements, np.uint64)
        self.single = np.empty(elements, np.float32)


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
    acc: Doubles, raw: Array, dtype: str, *, weight: int = 1, scratch: Scratch | None = None
) -> None:
    """Add `weight` times `raw` to the float64 sums `acc`, in place.

    Sums start from zeros. A negative weight takes a parent away again.
    """
    scratch = scratch or Scratch()
    factor = float(weight)
    with np.errstate(all="ignore"):
        for part in _chunks(acc.size):
            values = _as_float(raw[part], dtype, scratch.single)
            if weight != 1:
                wide = scratch.wide[: values.size]
                values = np.multiply(values, factor, out=wide, dtype=np.float64)
            np.add(acc[part], values, out=acc[part])  # in float64, as `acc` is


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
            if not max(values.max(), -values.min()) < OVERFLOW[dtype]:
                _refuse(values, dtype, part.start)
            _narrow(values, dtype, out[part], scratch=scratch)


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
    acc.fill(0.0)
    for raw, weight in zip(raws, weights, strict=True):
        accumulate(acc, raw, dtype, weight=weight, scratch=scratch)
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


def _narrow(values: Doubles, dtype: str, out: Array, *, scratch: Scratch) -> None:
    if dtype == "BF16":
        _narrow_bf16(values, out, scratch)
    else:
        np.copyto(out, values, casting="same_kind")


def _narrow_bf16(values: Doubles, out: Array, scratch: Scratch) -> None:
    """Round to 11 bits to odd, then to 8 bits to nearest: together one correct rounding.

    Rounding to odd (truncate, and set the last bit if anything was lost) keeps on which side of
    a tie a value lies (Boldo and Melquiond, "Emulation of a FMA and correctly rounded sums",
    2008). Eleven bits pass through float32 exactly down to 2⁻¹³⁹; below 2⁻¹³⁴ all is zero.
    """
    source, bits = values.view(np.uint64), scratch.bits[: values.size]
    np.bitwise_and(source, _LOW, out=bits)
    np.add(bits, _LOW, out=bits)  # bit 42 is now set if a lower bit was
    np.bitwise_or(bits, source, out=bits)
    np.bitwise_and(bits, _HIGH, out=bits)
    single = scratch.single[: values.size]
    np.copyto(single, bits.view(np.float64), casting="same_kind")
    words, last = single.view(np.uint32), bits.view(np.uint32)[: values.size]
    np.right_shift(words, 16, out=last)
    np.bitwise_and(last, 1, out=last)
    np.add(words, last, out=words)
    np.add(words, 0x7FFF, out=words)
    np.right_shift(words, 16, out=words)
    np.copyto(out, words, casting="same_kind")
