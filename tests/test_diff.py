"""Differences between models: norms against plain float64, and tensors that have no partner."""

from __future__ import annotations

import math

import numpy as np
import pytest
from pools import Arrays, arrays_of, model_folder, set_tensors, shard, unit_folder, values

from poolreg import Pool
from poolreg.errors import NotFound
from poolreg.models import diff


def plain(a: Arrays, b: Arrays, name: str) -> tuple[float, float, float]:
    """‖a−b‖₂, ‖a−b‖₂/‖a‖₂ and max |a−b| in a few lines."""
    one, other = (values(side[name][1], side[name][0]).ravel() for side in (a, b))
    gap = math.sqrt(sum((one - other) ** 2))
    return gap, gap / math.sqrt(sum(one**2)), max(abs(one - other))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("chunk", [7, 1 << 17])
def test_norms(dtype, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(diff, "CHUNK", chunk)
    one = model_folder(tmp_path / "one", dtype=dtype)
    other = unit_folder(tmp_path / "other", one, 3)
    a, b = arrays_of(one), arrays_of(other)
    with Pool.create(tmp_path / "pool") as pool:
        pool.add_model(one, name="one")
        pool.add_model(shard(other, tmp_path / "shards"), name="other")
        found = pool.diff("one", "other")
    assert [row.tensor for row in found] == sorted(a)
    for row in found:
        assert (row.dtype_a, row.shape_a) == (row.dtype_b, row.shape_b)
        assert (row.dtype_a, row.shape_a) == (a[row.tensor][0], a[row.tensor][1].shape)
        measured = (row.difference, row.relative, row.largest)
        assert measured == pytest.approx(plain(a, b, row.tensor), rel=1e-12)


def test_equal_models_have_no_differences(tiny, pool, tmp_path):
    assert pool.diff("base", "base") == []
    added = pool.add_model(shard(tiny.seed, tmp_path / "shards"))
    assert pool.diff("base", added.digest) == []


def test_only_what_differs_is_listed_and_read(tiny, pool, tmp_path, monkeypatch):
    folder = model_folder(tmp_path / "copy")
    raw = np.array(arrays_of(folder)["model.norm.weight"][1])
    raw[5] += 0.5
    set_tensors(folder, model__norm__weight=("F32", raw))
    added = pool.add_model(folder)
    real, read = diff.read_array, []

    def read_array(path, info):
        read.append(info.name)
        return real(path, info)

    monkeypatch.setattr(diff, "read_array", read_array)
    (row,) = pool.diff("base", added.digest)
    assert (row.tensor, row.difference, row.largest) == ("model.norm.weight", 0.5, 0.5)
    assert set(read) == {"model.norm.weight"}


def test_tensors_without_a_partner(tmp_path):
    one = model_folder(tmp_path / "one")
    two = unit_folder(tmp_path / "two", one, 0)
    norm = arrays_of(one)["model.norm.weight"][1]
    set_tensors(
        one,
        only__a=("F32", np.ones((2, 3), np.float32)),
        shape=("F32", np.ones((2, 3), np.float32)),
        steps=("I64", np.arange(3)),
        same=("I64", np.arange(4)),
        zero=("F32", np.zeros(3, np.float32)),
        sign=("F32", np.zeros(2, np.float32)),
        none=("F32", np.zeros((0, 4), np.float32)),
    )
    set_tensors(
        two,
        only__b=("I64", np.ones(1, np.int64)),
        shape=("F32", np.ones((3, 2), np.float32)),
        steps=("I64", np.arange(3) + 1),
        same=("I64", np.arange(4)),
        zero=("F32", np.array([3, 0, -4], np.float32)),
        sign=("F32", np.array([0.0, -0.0], np.float32)),
        none=("F32", np.zeros((4, 0), np.float32)),
        model__norm__weight=("F16", norm.astype(np.float16)),
    )
    with Pool.create(tmp_path / "pool") as pool:
        pool.add_model(one, name="one")
        pool.add_model(two, name="two")
        found = {row.tensor: row for row in pool.diff("one", "two")}
        backwards = {row.tensor: row for row in pool.diff("two", "one")}
    assert found.keys() == backwards.keys()

    def norms(name: str) -> tuple[float | None, ...]:
        row = found[name]
        return row.difference, row.relative, row.largest

    a, b = found["only.a"], found["only.b"]
    assert (a.dtype_a, a.shape_a, a.dtype_b, a.shape_b) == ("F32", (2, 3), None, None)
    assert (b.dtype_a, b.shape_a, b.dtype_b, b.shape_b) == (None, None, "I64", (1,))
    for name in ("only.a", "only.b", "shape", "steps", "none"):
        assert norms(name) == (None, None, None)
    assert (found["shape"].shape_a, found["shape"].shape_b) == ((2, 3), (3, 2))
    assert "same" not in found
    assert norms("zero") == (5.0, None, 4.0)
    assert (backwards["zero"].difference, backwards["zero"].relative) == (5.0, 1.0)
    assert norms("sign") == (0.0, None, 0.0)
    mixed = found["model.norm.weight"]
    assert (mixed.dtype_a, mixed.dtype_b) == ("F32", "F16")
    rounding = norm.astype(np.float64) - norm.astype(np.float16).astype(np.float64)
    assert mixed.difference == pytest.approx(np.linalg.norm(rounding), rel=1e-12)


def test_progress_counts_tensors(tiny, pool):
    class Seen:
        total = done = 0

        def start(self, what: str, total: int, unit: str) -> None:
            assert (what, unit) == ("comparing", "tensors")
            self.total = total

        def advance(self, amount: int) -> None:
            self.done += amount

        def note(self, text: str) -> None: ...

    seen = Seen()
    pool.diff("base", "alpha/1", progress=seen)
    assert seen.done == len(arrays_of(tiny.seed))


def test_a_mixture_is_not_one_model(pool):
    with pytest.raises(NotFound, match=r"'alpha\+beta' is a mixture, not one stored model"):
        pool.diff("base", "alpha+beta")
    with pytest.raises(NotFound, match="nobody"):
        pool.diff("base", "nobody")
