"""Averages in memory: the kernel's bytes by every route, and no more additions than needed."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from poolreg.errors import Refused
from poolreg.evaluation import averages, on_device
from poolreg.evaluation.averages import TORCH_DTYPES, HostAverages, Slot, shared
from poolreg.evaluation.on_device import DeviceAverages, rounded
from poolreg.numerics.average import FLOATS, Scratch, average_into, narrow
from poolreg.tensors import NUMPY_DTYPES

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = {"a": 3, "b": 700, "c": 1, "d": 0, "e": 2049}
MODELS = [f"{number:x}" * 64 for number in range(8)]

Raws = dict[str, dict[str, np.ndarray]]


def raws_of(dtype: str, models: Sequence[str] = MODELS) -> Raws:
    """Random models, with values of very different size and zeros of both signs."""
    source = np.random.default_rng(len(models))
    made: Raws = {}
    for model in models:
        made[model] = {}
        for name, size in SHAPES.items():
            values = source.standard_normal(size) * 10.0 ** source.integers(-4, 4, size)
            values[source.random(size) < 0.1] = -0.0
            made[model][name] = narrow(values, dtype)
    return made


def slots_of(dtype: str, compute: torch.dtype) -> list[Slot]:
    return [Slot(name, dtype, torch.full((n,), 7, dtype=compute)) for name, n in SHAPES.items()]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if len(tensor) else b""


def expected(raws: Raws, slot: Slot, weights: averages.Weights) -> bytes:
    """The kernel's average, converted to the compute dtype by torch."""
    parts = [raws[model][slot.name] for model, _ in weights]
    out = np.empty(len(parts[0]), NUMPY_DTYPES[slot.dtype])
    if len(parts) == 1:
        out[:] = parts[0]
    elif len(out):
        average_into(
            out, parts, [weight for _, weight in weights], dtype=slot.dtype, out_dtype=slot.dtype,
            scratch=Scratch(),
        )  # fmt: skip
    return bits(averages.as_tensor(out, slot.dtype).to(slot.live.dtype))


def walk() -> Iterator[tuple[tuple[str, int], ...]]:
    """All 255 subsets of the models, in the order of their component lists."""
    subsets = [c for n in range(1, 9) for c in itertools.combinations(MODELS, n)]
    return iter(sorted(tuple((model, 1) for model in chosen) for chosen in subsets))


@pytest.fixture
def added(monkeypatch) -> list[int]:
    """The sizes of what the kernel added."""
    sizes: list[int] = []
    real = averages.accumulate

    def accumulate(acc, raw, dtype, **options):
        sizes.append(raw.size)
        real(acc, raw, dtype, **options)

    monkeypatch.setattr(averages, "accumulate", accumulate)
    return sizes


@pytest.mark.parametrize(("room", "adds"), [(99, 275), (3, 359), (1, 461), (0, 1016)])
@pytest.mark.parametrize("threads", [1, 2])
def test_all_subsets_cost_one_addition_each(room, adds, threads, added, monkeypatch):
    """But the 28 pairs, whose first is not kept, and what memory has no room for."""
    elements = sum(SHAPES.values())
    monkeypatch.setattr(averages, "FEWEST_KEPT", 2)
    monkeypatch.setattr(averages, "CHUNK", 512)
    monkeypatch.setattr(averages, "SUMS_AT_ONCE", room * 8 * elements)
    raws, slots = raws_of("F32"), slots_of("F32", torch.float32)
    live = HostAverages(slots, raws, threads=threads)
    steps = list(walk())
    for weights, following in zip(steps, [*steps[1:], ()], strict=True):
        live.load(weights, following)
        for slot in slots:
            assert bits(slot.live) == expected(raws, slot, weights), (weights, slot.name)
    assert sum(added) == adds * elements
    assert min(275, adds) == 28 * 2 + (255 - 28 - 8)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", ["host", "device", "streamed"])
def test_every_dtype_and_place(dtype, compute, where, monkeypatch):
    """Weighted averages in any order, on the CPU and by what runs on a GPU."""
    if dtype == "F64":
        compute = torch.float64
    monkeypatch.setattr(on_device, "PART", 512)
    raws, slots = raws_of(dtype), slots_of(dtype, compute)
    if where == "host":
        live = HostAverages(slots, raws, threads=2)
    else:
        live = DeviceAverages(slots, raws, resident=where == "device")
    choose = random.Random(dtype)
    for _ in range(12):
        chosen = sorted(choose.sample(MODELS, choose.randint(1, 8)))
        weights = tuple((model, choose.choice([1, 1, 2, 7, 997])) for model in chosen)
        live.load(weights)
        for slot in slots:
            assert bits(slot.live) == expected(raws, slot, weights), (weights, slot.name)


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_what_is_not_finite_is_refused(dtype, where, monkeypatch):
    """By the name of its tensor, and the place there, in whatever part it is summed."""
    monkeypatch.setattr(averages, "CHUNK", 512)
    monkeypatch.setattr(on_device, "PART", 512)
    raws, slots = raws_of(dtype), slots_of(dtype, torch.float32)
    kind = HostAverages if where == "host" else DeviceAverages
    live = kind(slots, raws, **({"threads": 1} if where == "host" else {}))
    raws[MODELS[1]]["b"][605] = narrow(np.array([np.nan]), dtype)[0]
    if where == "device":
        live = DeviceAverages(slots, raws)
    with pytest.raises(Refused, match="tensor 'b': the average is nan") as caught:
        live.load([(MODELS[0], 1), (MODELS[1], 1)])
    assert caught.value.data == {"tensor": "b", "index": 605}
    assert caught.value.hint
    live.load([(MODELS[0], 1), (MODELS[2], 3)])  # and it goes on
    assert bits(slots[1].live) == expected(raws, slots[1], [(MODELS[0], 1), (MODELS[2], 3)])


# Where rounding is hard: ties and their neighbours, denormals, the ends of the range.
@st.composite
def awkward(draw: st.DrawFn) -> float:
    dtype = draw(st.sampled_from(["BF16", "F16", "F32"]))
    digits, low, high = {"BF16": (8, -133, 126), "F16": (11, -24, 14), "F32": (24, -149, 126)}[
        dtype
    ]
    whole = draw(st.integers(0, 2 ** (digits + 1)))  # with one bit more: odd ones are ties
    value = whole * 2.0 ** draw(st.integers(low - 2, high - digits))
    for _ in range(draw(st.integers(0, 2))):
        value = float(np.nextafter(value, draw(st.sampled_from([0.0, np.inf]))))
    return draw(st.sampled_from([1, -1])) * value


@given(st.lists(st.one_of(awkward(), st.floats(-60000, 60000)), min_size=1, max_size=40))
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_rounding_on_the_device_is_the_kernels(dtype, numbers):
    values = np.array([n for n in numbers if abs(n) < 60000 or dtype != "F16"] or [0.0])
    exact = narrow(values, dtype)
    found = rounded(torch.from_numpy(values.copy()), dtype)
    assert found.dtype == TORCH_DTYPES[dtype]
    assert bits(found) == exact.tobytes()


def test_what_two_averages_share():
    one = [("a", 1), ("b", 2), ("c", 1)]
    assert [shared(one, other) for other in (one, one[:2], [*one, ("d", 1)], [])] == [3, 2, 3, 0]
    assert shared(one, [("a", 1), ("b", 1), ("c", 1)]) == 1


def test_an_error_waits_for_the_other_threads(monkeypatch):
    """Else one could write into the next average."""
    real, threads = averages.finish, set()

    def finish(sums, total, dtype, **options):
        threads.add(threading.get_ident())
        if len(sums) == 700:
            raise Refused("the average is nan", index=0)
        time.sleep(0.05)
        real(sums, total, dtype, **options)

    monkeypatch.setattr(averages, "finish", finish)
    slots = slots_of("F32", torch.float32)
    live = HostAverages(slots, raws_of("F32"), threads=2)
    with pytest.raises(Refused):
        live.load([(MODELS[0], 1), (MODELS[1], 1)])
    assert len(threads) == 2
    after = [bits(slot.live) for slot in slots]
    time.sleep(0.2)
    assert [bits(slot.live) for slot in slots] == after
    assert (slots[0].live != 7).all()  # the other thread did its share
