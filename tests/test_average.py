"""The averaging kernel against exact rational arithmetic."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poolreg.errors import Refused
from poolreg.numerics.average import (
    CHUNK,
    FLOATS,
    OVERFLOW,
    Scratch,
    accumulate,
    average_into,
    finish,
    narrow,
    widen,
)
from poolreg.tensors import NUMPY_DTYPES

WORDS = {"F64": np.uint64, "F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}
INFINITY = {"F64": 0x7FF0 << 48, "F32": 0x7F80 << 16, "F16": 0x7C00, "BF16": 0x7F80}
SMALL = ("F16", "BF16")


def bits(raw: np.ndarray, dtype: str) -> np.ndarray:
    return raw.view(WORDS[dtype])


def finite(dtype: str) -> np.ndarray:
    """All finite values of a 16-bit dtype from 0 up, as float64, by another route than widen."""
    patterns = np.arange(INFINITY[dtype], dtype=np.uint32)
    if dtype == "BF16":
        return (patterns << 16).view(np.float32).astype(np.float64)
    exponent, fraction = patterns >> 10, patterns & 0x3FF
    normal = np.ldexp(1024.0 + fraction, exponent.astype(int) - 25)
    return np.where(exponent == 0, np.ldexp(fraction.astype(float), -24), normal)


def nearest(value: Fraction, dtype: str) -> int:
    """The bit pattern of the dtype's value nearest to an exact value; ties to even patterns."""
    sign = 1 << (8 * np.dtype(WORDS[dtype]).itemsize - 1) if value < 0 else 0
    low, high = 0, INFINITY[dtype]  # patterns of floats are in the order of their magnitudes
    while high - low > 1:
        middle = (low + high) // 2
        if exact(middle, dtype) <= abs(value):
            low = middle
        else:
            high = middle
    below, above = abs(value) - exact(low, dtype), exact(high, dtype) - abs(value)
    if below == above:
        return sign | (low if low % 2 == 0 else high)
    return sign | (low if below < above else high)


def exact(pattern: int, dtype: str) -> Fraction:
    """The exact value of a pattern; infinity's is the power of two that it stands in for."""
    mantissa = {"F64": 52, "F32": 23, "F16": 10, "BF16": 7}[dtype]
    bias = {"F64": 1023, "F32": 127, "F16": 15, "BF16": 127}[dtype]
    exponent, fraction = pattern >> mantissa, pattern & ((1 << mantissa) - 1)
    if exponent:
        fraction += 1 << mantissa
    return Fraction(fraction) * Fraction(2) ** (max(exponent, 1) - bias - mantissa)


@pytest.mark.parametrize("dtype", SMALL)
def test_widens_every_pattern(dtype: str) -> None:
    patterns = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    wide = widen(patterns.view(NUMPY_DTYPES[dtype]), dtype)
    count = INFINITY[dtype]
    assert np.array_equal(wide[:count], finite(dtype))
    assert wide[count] == np.inf
    assert np.isnan(wide[count + 1 : 1 << 15]).all()
    assert np.array_equal(wide[1 << 15 :], -wide[: 1 << 15], equal_nan=True)
    assert np.signbit(wide[1 << 15])


@pytest.mark.parametrize("dtype", SMALL)
def test_rounds_once_beside_every_value_and_every_tie(dtype: str) -> None:
    values = np.append(finite(dtype), 2 * 2.0 ** np.floor(np.log2(finite(dtype)[-1])))
    low = np.arange(INFINITY[dtype])
    ties = (values[1:] + values[:-1]) / 2
    even = low + (low & 1)
    gap = np.diff(values)
    for sign, flag in ((1.0, 0), (-1.0, 1 << 15)):

        def rounded(where: np.ndarray, sign: float = sign) -> np.ndarray:
            return bits(narrow(sign * where, dtype), dtype)

        assert np.array_equal(rounded(values[:-1]), low | flag)
        assert np.array_equal(rounded(ties), even | flag)
        assert np.array_equal(rounded(np.nextafter(ties, 0)), low | flag)
        assert np.array_equal(rounded(np.nextafter(ties, np.inf)), (low + 1) | flag)
        for tiny in (2.0**-14, 2.0**-18, 2.0**-30, 2.0**-40):  # lost by a stop at float32
            assert np.array_equal(rounded(ties - tiny * gap), low | flag)
            assert np.array_equal(rounded(ties + tiny * gap), (low + 1) | flag)


@pytest.mark.parametrize("dtype", FLOATS)
@given(
    st.lists(
        st.floats(allow_nan=False, allow_infinity=False)
        | st.floats(-1e-37, 1e-37)
        | st.floats(-7e4, 7e4, width=32),
        min_size=1,
        max_size=20,
    )
)
@settings(max_examples=50, deadline=None)
def test_rounds_any_float64_as_exact_arithmetic_does(dtype: str, values: list[float]) -> None:
    got = bits(narrow(np.array(values), dtype), dtype).tolist()
    top = 1 << (8 * np.dtype(WORDS[dtype]).itemsize - 1)
    assert got == [
        nearest(abs(Fraction(value)), dtype) | (top if np.signbit(value) else 0) for value in values
    ]


@pytest.mark.parametrize("dtype", FLOATS)
def test_keeps_what_is_not_finite(dtype: str) -> None:
    payload = np.array([0x7FFF_FFFF_FFFF_FFFF, 0xFFFF_FFFF_FFFF_FFFF], np.uint64).view(np.float64)
    values = np.concatenate([[np.inf, -np.inf, np.nan, 1e308, OVERFLOW[dtype]], payload])
    back = widen(narrow(values, dtype), dtype)
    assert back[0] == np.inf
    assert back[1] == -np.inf
    assert np.isnan(back[[2, 5, 6]]).all()
    assert back[4] == np.inf
    assert back[3] == (1e308 if dtype == "F64" else np.inf)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_the_overflow_bound_is_sharp(dtype: str) -> None:
    below = np.nextafter(OVERFLOW[dtype], 0)
    assert int(bits(narrow(np.array([below]), dtype), dtype)[0]) == INFINITY[dtype] - 1


@pytest.mark.parametrize("dtype", FLOATS)
def test_round_trip_of_random_patterns(dtype: str) -> None:
    rng = np.random.default_rng(0)
    width = np.dtype(WORDS[dtype]).itemsize
    words = np.frombuffer(rng.bytes(width * 50_000), WORDS[dtype])
    magnitude = words & WORDS[dtype]((1 << (8 * width - 1)) - 1)
    words = words[magnitude < INFINITY[dtype]]
    assert np.array_equal(
        bits(narrow(widen(words.view(NUMPY_DTYPES[dtype]), dtype), dtype), dtype), words
    )


@pytest.mark.parametrize("dtype", FLOATS)
def test_any_shape_and_given_arrays(dtype: str) -> None:
    values = np.linspace(-1, 1, 12).reshape(3, 4)
    raw = narrow(values.T, dtype)
    assert raw.shape == (4, 3)
    assert np.array_equal(raw, narrow(values.reshape(-1), dtype).reshape(3, 4).T)
    out = np.empty((4, 3), raw.dtype)
    assert narrow(values.T, dtype, out) is out
    assert np.array_equal(out, raw)
    wide = np.empty((4, 3))
    assert widen(raw, dtype, wide) is wide
    assert np.array_equal(wide, widen(raw.reshape(-1), dtype).reshape(4, 3))


def random_raws(dtype: str, count: int, size: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [
        narrow(rng.standard_normal(size) * 2.0 ** rng.integers(-9, 3, size), dtype)
        for _ in range(count)
    ]


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize(
    "weights", [(1, 1), (1, 1, 1), (1, 1, 1, 1, 1), (2, 1), (3, 5, 7), (999, 1)]
)
def test_the_average_is_the_exact_one_rounded_once(dtype: str, weights: tuple[int, ...]) -> None:
    raws = random_raws(dtype, len(weights), 300)
    out = np.empty_like(raws[0])
    average_into(out, iter(raws), weights, dtype=dtype, out_dtype=dtype, scratch=Scratch())
    columns = zip(*(widen(raw, dtype).tolist() for raw in raws), strict=True)
    for got, column in zip(bits(out, dtype).tolist(), columns, strict=True):
        mean = sum(w * Fraction(x) for w, x in zip(weights, column, strict=True)) / sum(weights)
        assert got == nearest(mean, dtype)


def average_of(raws: list[np.ndarray], weights: tuple[int, ...], dtype: str) -> bytes:
    acc = np.zeros(raws[0].size)
    for raw, weight in zip(raws, weights, strict=True):
        accumulate(acc, raw, dtype, weight=weight)
    out = np.empty_like(raws[0])
    finish(acc, sum(weights), dtype, out=out)
    return out.tobytes()


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 7])
def test_chunks_leave_no_trace(dtype: str, size: int) -> None:
    raws = random_raws(dtype, 3, size)
    whole = narrow(sum((widen(raw, dtype) for raw in raws), np.zeros(size)) / 3, dtype)
    assert average_of(raws, (1, 1, 1), dtype) == whole.tobytes()


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_every_order_and_a_walk_over_all_subsets_give_the_same_bytes(dtype: str) -> None:
    raws = random_raws(dtype, 5, 1000)
    for raw in raws:
        raw[:10] = narrow(np.full(10, -0.0), dtype)
    raws[0][5:10] = narrow(np.full(5, 3.0), dtype)
    raws[1][5:10] = narrow(np.full(5, -3.0), dtype)
    once = average_of(raws, (1, 2, 3, 4, 5), dtype)
    for order in itertools.islice(itertools.permutations(range(5)), 0, 120, 7):
        assert average_of([raws[i] for i in order], tuple(i + 1 for i in order), dtype) == once

    acc, inside, scratch = np.zeros(1000), set(), Scratch()
    for step in range(1, 32):  # Gray code: one parent comes or goes with each step
        parent = (step & -step).bit_length() - 1
        accumulate(acc, raws[parent], dtype, weight=-1 if parent in inside else 1, scratch=scratch)
        inside ^= {parent}
        out = np.empty_like(raws[0])
        finish(acc, len(inside), dtype, out=out, scratch=scratch)
        chosen = [raws[i] for i in sorted(inside)]
        assert out.tobytes() == average_of(chosen, (1,) * len(chosen), dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("weight", [1, 3])
def test_a_sum_that_is_zero_is_positive(dtype: str, weight: int) -> None:
    raw, scratch = narrow(np.full(3, -0.0), dtype), Scratch()
    out = np.empty_like(raw)
    average_into(out, [raw] * 2, [weight] * 2, dtype=dtype, out_dtype=dtype, scratch=scratch)
    assert bits(out, dtype).tolist() == [0, 0, 0]


def test_finish_leaves_the_sums_alone() -> None:
    acc = np.arange(10.0)
    finish(acc, 3, "BF16", out=np.empty(10, np.uint16))
    assert np.array_equal(acc, np.arange(10.0))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("index", [0, CHUNK + 3])
def test_averages_that_are_not_finite_are_refused(dtype: str, bad: float, index: int) -> None:
    acc = np.zeros(CHUNK + 5)
    acc[index] = bad
    with pytest.raises(Refused, match="the average is") as caught:
        finish(acc, 2, dtype, out=np.empty(acc.size, NUMPY_DTYPES[dtype]))
    assert caught.value.data["index"] == index


def test_infinities_that_cancel_are_refused() -> None:
    raws = [np.array([1.0, sign * np.inf], np.float32) for sign in (1, -1)]
    with pytest.raises(Refused, match="the average is nan") as caught:
        average_of(raws, (1, 1), "F32")
    assert caught.value.data["index"] == 1


def test_averages_too_large_for_the_storage_are_refused() -> None:
    out = np.empty(1, np.float16)
    finish(np.array([65519.0]), 1, "F16", out=out)
    assert out[0] == 65504
    with pytest.raises(Refused, match="65520, too large for F16"):
        finish(np.array([-65520.0]), 1, "F16", out=out)
