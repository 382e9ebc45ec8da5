"""Merging on disk: bit equality with a plain reference, whatever the files look like."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import threading
import tracemalloc
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from poolreg.errors import (
    ConfigError,
    Conflict,
    Incompatible,
    Refused,
    StorageError,
    UsageError,
)
from poolreg.numerics.average import CHUNK
from poolreg.tensors import NUMPY_DTYPES, plan_file, read_array, read_header, write_file
from poolreg.weights import stream
from poolreg.weights.hashing import TensorHashes
from poolreg.weights.merge import INDEX_NAME, Parent, check_mergeable, merge_weights

Arrays = Mapping[str, tuple[str, np.ndarray]]

BF16_VALUES = (np.arange(0x7F80, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)


def to_float64(raw: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return raw.astype(np.float64)


def from_float64(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round once; bfloat16 by looking for the nearest of all its values."""
    if dtype != "BF16":
        return values.astype(NUMPY_DTYPES[dtype])
    low = np.searchsorted(BF16_VALUES, np.abs(values), side="right") - 1
    below, above = np.abs(values) - BF16_VALUES[low], BF16_VALUES[low + 1] - np.abs(values)
    pattern = np.where(below == above, low + low % 2, np.where(below < above, low, low + 1))
    return (pattern + 0x8000 * np.signbit(values)).astype(np.uint16)


def reference(models: Sequence[Arrays], weights: Sequence[int], name: str) -> np.ndarray:
    dtype, first = models[0][name]
    total = np.zeros(first.shape)
    for model, weight in zip(models, weights, strict=True):
        total += weight * to_float64(model[name][1], dtype)
    return from_float64(total / sum(weights), dtype)


SHAPES: dict[str, tuple[int, ...]] = {
    "embed": (64, 48),
    "layers.0.norm": (48,),
    "layers.0.up": (129, 1031),  # more than one chunk
    "layers.1.exact": (CHUNK,),
    "layers.1.more": (CHUNK + 1,),
    "layers.1.less": (CHUNK - 1,),
    "scalar": (),
    "empty": (0, 3),
}


def model(dtype: str, seed: int) -> dict[str, tuple[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    arrays = {
        name: (dtype, from_float64(rng.standard_normal(shape), dtype))
        for name, shape in SHAPES.items()
    }
    arrays["inv_freq"] = ("F32", rng.standard_normal(5).astype(np.float32))
    arrays["positions"] = ("I64", np.arange(7))
    arrays["mask"] = ("BOOL", np.array([True, False]))
    return arrays


def saved(folder: Path, arrays: Arrays, *, weight: int = 1, files: int = 1) -> Parent:
    """Write a model canonically, or in several files that cut it in its own way."""
    folder.mkdir()
    names = list(arrays) if files == 1 else sorted(arrays, key=lambda name: name[::-1])
    for number in range(files):
        write_file(
            folder / f"{number}.safetensors", {name: arrays[name] for name in names[number::files]}
        )
    return opened(folder, weight=weight)


def opened(folder: Path, *, weight: int = 1) -> Parent:
    tensors = {
        name: (path, info)
        for path in sorted(folder.glob("*.safetensors"))
        for name, info in read_header(path).tensors.items()
    }
    return Parent(weight, tensors, folder.name)


def merged(parents: Sequence[Parent], folder: Path, **options: object) -> dict[str, np.ndarray]:
    folder.mkdir()
    merge_weights(parents, folder, **options)  # type: ignore[arg-type]
    return {name: read_array(path, info) for name, (path, info) in opened(folder).tensors.items()}


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize(
    "weights", [(1, 1), (3, 1), (1, 1, 1), (2, 5, 3), (1,) * 5, (9, 1, 2, 1, 7)]
)
def test_bit_equal_to_the_reference(tmp_path: Path, dtype: str, weights: tuple[int, ...]) -> None:
    models = [model(dtype, seed) for seed in range(len(weights))]
    parents = [
        saved(tmp_path / str(number), arrays, weight=weight, files=1 + number % 3)
        for number, (arrays, weight) in enumerate(zip(models, weights, strict=True))
    ]
    result = merged(parents, tmp_path / "out")
    assert result.keys() == models[0].keys()
    for name, (kind, array) in models[0].items():
        exact = kind in ("I64", "BOOL")
        expected = array if exact else reference(models, weights, name)
        assert result[name].dtype == expected.dtype
        assert result[name].shape == expected.shape
        assert result[name].tobytes() == expected.tobytes(), name


def test_files_and_threads_leave_no_trace(tmp_path: Path) -> None:
    models = [model("BF16", seed) for seed in range(3)]
    contents = set()
    for number, (files, threads) in enumerate([(1, 1), (1, 2), (2, 5), (4, 1), (5, None)]):
        home = tmp_path / str(number)
        home.mkdir()
        parents = [
            saved(home / str(index), arrays, files=files) for index, arrays in enumerate(models)
        ]
        (home / "out").mkdir()
        (path,) = merge_weights(parents, home / "out", threads=threads)
        contents.add(path.read_bytes())
    assert len(contents) == 1
    start, _ = plan_file({n: (d, a.shape) for n, (d, a) in models[0].items()}, {"format": "pt"})
    assert contents.pop().startswith(start)  # the canonical file of its content


def test_parents_written_by_the_library(tmp_path: Path) -> None:
    models = [model("F32", seed) for seed in range(2)]
    parents = []
    for number, arrays in enumerate(models):
        folder = tmp_path / str(number)
        folder.mkdir()
        plain = {name: array for name, (_, array) in arrays.items()}
        safetensors.numpy.save_file(plain, folder / "model.safetensors")
        parents.append(opened(folder))
    result = merged(parents, tmp_path / "out")
    loaded = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    for name in SHAPES:
        assert result[name].tobytes() == reference(models, (1, 1), name).tobytes()
        assert loaded[name].tobytes() == result[name].tobytes()
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_one_parent_is_copied_bit_for_bit(tmp_path: Path) -> None:
    raw = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)  # with -0, infinities, all NaNs
    parent = saved(tmp_path / "a", {"x": ("BF16", raw), "f": ("F8_E4M3", np.zeros(3, np.uint8))})
    for weight in (1, 3):
        heavy = Parent(weight, parent.tensors, "a")
        result = merged([heavy], tmp_path / f"out{weight}")
        assert np.array_equal(result["x"], raw)
    content = (tmp_path / "out1" / "model.safetensors").read_bytes()
    assert content == (tmp_path / "out3" / "model.safetensors").read_bytes()


def test_common_factors_of_the_weights_do_not_matter(tmp_path: Path) -> None:
    models = [model("F64", seed) for seed in range(2)]  # sums of doubles do round
    parents = [saved(tmp_path / str(i), arrays) for i, arrays in enumerate(models)]
    for factor, name in ((1, "once"), (3**20, "often")):
        weighted = [Parent(factor * (i + 1), p.tensors, p.label) for i, p in enumerate(parents)]
        (tmp_path / name).mkdir()
        merge_weights(weighted, tmp_path / name)
    once, often = (tmp_path / name / "model.safetensors" for name in ("once", "often"))
    assert once.read_bytes() == often.read_bytes()


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("target", ["F64", "F32", "F16", "BF16"])
def test_casts_with_one_rounding(tmp_path: Path, dtype: str, target: str) -> None:
    rng = np.random.default_rng(1)
    arrays = [from_float64(rng.standard_normal(500), dtype) for _ in range(3)]
    parents = [
        saved(tmp_path / str(i), {"x": (dtype, a), "n": ("I32", np.arange(3, dtype=np.int32))})
        for i, a in enumerate(arrays)
    ]
    result = merged(parents, tmp_path / "out", dtype=target)
    expected = from_float64(sum(to_float64(a, dtype) for a in arrays) / 3, target)
    assert result["x"].tobytes() == expected.tobytes()
    assert result["n"].tolist() == [0, 1, 2]
    alone = merged(parents[:1], tmp_path / "alone", dtype=target)
    assert alone["x"].tobytes() == from_float64(to_float64(arrays[0], dtype), target).tobytes()


def test_shards_and_their_index(tmp_path: Path) -> None:
    models = [model("BF16", seed) for seed in range(2)]
    parents = [saved(tmp_path / str(i), arrays) for i, arrays in enumerate(models)]
    whole = merged(parents, tmp_path / "whole")
    (tmp_path / "out").mkdir()
    counts: list[int] = []
    made = merge_weights(parents, tmp_path / "out", max_shard_bytes=300_000, progress=counts.append)
    paths = [*made, tmp_path / "out" / INDEX_NAME]
    assert [path.name for path in paths] == [
        *(f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)),
        INDEX_NAME,
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in paths
    )
    index = json.loads(paths[-1].read_text())
    size = sum(array.nbytes for array in whole.values())
    assert index["metadata"]["total_size"] == size == sum(counts)
    assert index["weight_map"].keys() == whole.keys()
    for name, file in index["weight_map"].items():
        path = tmp_path / "out" / file
        assert name in made[path].tensors
        assert read_array(path, read_header(path).tensors[name]).tobytes() == whole[name].tobytes()


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("whole", [True, False])
def test_what_is_written_is_hashed_on_the_way(tmp_path: Path, threads: int, whole: bool) -> None:
    parents = [saved(tmp_path / str(i), model("BF16", i), files=1 + i) for i in range(3)]
    (tmp_path / "out").mkdir()
    made = merge_weights(
        parents, tmp_path / "out", max_shard_bytes=400_000, whole=whole, threads=threads
    )
    assert len(made) > 2
    for path, hashed in made.items():
        data = path.read_bytes()
        assert hashed.bytes == len(data)
        assert hashed.sha256 == (hashlib.sha256(data).hexdigest() if whole else "")
        assert hashed.tensors == {
            name: hashlib.sha256(data[info.start : info.stop]).hexdigest()
            for name, info in read_header(path).tensors.items()
        }


def changed(parent: Parent, name: str, **changes: object) -> Parent:
    path, info = parent.tensors[name]
    tensors = {**parent.tensors, name: (path, replace(info, **changes))}  # type: ignore[arg-type]
    return Parent(parent.weight, tensors, "changed")


def test_incompatible_models_are_named(tmp_path: Path) -> None:
    parent = saved(tmp_path / "first", model("BF16", 0))
    less = {name: item for name, item in parent.tensors.items() if name != "embed"}
    for other, message in [
        (
            changed(parent, "embed", shape=(48, 64)),
            r"(?m)'embed' is BF16 \[64, 48\] in first but "
            r"BF16 \[48, 64\] in changed$",
        ),
        (
            changed(parent, "embed", dtype="F16"),
            r"'embed' is BF16 .* but F16 \[64, 48\] in changed",
        ),
        (Parent(1, less, "less"), r"'embed' is BF16 \[64, 48\] in first but absent in less"),
        (Parent(1, {}, "none"), r"'embed' is .* absent in none; 10 more tensors differ"),
    ]:
        with pytest.raises(Incompatible, match=message) as caught:
            check_mergeable([parent, parent, other])
        assert caught.value.hint
    with pytest.raises(Incompatible, match="'embed' is absent in less but BF16"):
        check_mergeable([Parent(1, less, "less"), parent])
    two = changed(changed(parent, "embed", shape=(1,)), "scalar", shape=(1,))
    with pytest.raises(Incompatible, match=r"(?m); 1 more tensor differs$"):
        merge_weights([parent, two], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


def test_eight_bit_floats_are_refused(tmp_path: Path) -> None:
    parent = saved(tmp_path / "a", {"scaled": ("F8_E4M3", np.zeros(3, np.uint8))})
    for parents, dtype in [([parent, parent], None), ([parent], "BF16")]:
        with pytest.raises(
            Incompatible, match="'scaled' of a is F8_E4M3, which cannot be averaged"
        ):
            check_mergeable(parents, dtype=dtype)


def test_requests_that_cannot_be_right(tmp_path: Path) -> None:
    parent = saved(tmp_path / "a", model("F32", 0))
    for parents in ([], [Parent(1, {}, "empty")]):
        with pytest.raises(UsageError, match="nothing to merge"):
            check_mergeable(parents)
    for weight in (0, -1, (1 << 53) + 1):
        with pytest.raises(UsageError, match="whole numbers"):
            check_mergeable([Parent(weight, parent.tensors, "a")])
    for dtype in ("bfloat16", "I64", "F8_E4M3"):
        with pytest.raises(ConfigError, match=dtype):
            check_mergeable([parent], dtype=dtype)


@pytest.mark.parametrize("name", ["positions", "mask"])
def test_other_tensors_must_be_equal(tmp_path: Path, name: str) -> None:
    one, other = model("F32", 0), model("F32", 1)
    dtype, array = other[name]
    other[name] = (dtype, array[::-1].copy())
    parents = [saved(tmp_path / "one", one), saved(tmp_path / "other", other)]
    (tmp_path / "out").mkdir()
    with pytest.raises(
        Incompatible, match=f"'{name}' is {dtype} and differs between one and other"
    ):
        merge_weights(parents, tmp_path / "out")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("threads", [1, 3])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, bad: float, threads: int) -> None:
    models = [model("F32", seed) for seed in range(3)]
    models[1]["layers.1.more"][1][CHUNK] = bad
    parents = [saved(tmp_path / f"m{i}", arrays) for i, arrays in enumerate(models)]
    (tmp_path / "out").mkdir()
    with pytest.raises(
        Refused, match=r"'layers.1.more': the average is \w+, because of m1"
    ) as caught:
        merge_weights(parents, tmp_path / "out", threads=threads)
    assert caught.value.data["tensor"] == "layers.1.more"


def test_values_too_large_for_the_new_dtype_are_refused(tmp_path: Path) -> None:
    parents = [
        saved(tmp_path / name, {"ok": ("F32", np.ones(3, np.float32)), "x": ("F32", array)})
        for name, array in [("a", np.array([1, 70000], "f4")), ("b", np.array([1, 70002], "f4"))]
    ]
    (tmp_path / "out").mkdir()
    with pytest.raises(Refused, match=r"(?m)'x': the average is 70001, too large for F16$"):
        merge_weights(parents, tmp_path / "out", dtype="F16")


def test_a_file_cut_after_its_check_is_noticed(tmp_path: Path) -> None:
    parents = [saved(tmp_path / name, model("F32", 0)) for name in "ab"]
    path = tmp_path / "b" / "0.safetensors"
    os.truncate(path, path.stat().st_size - 100_000)
    (tmp_path / "out").mkdir()
    with pytest.raises(StorageError, match=r"0.safetensors ends inside tensor .* of b"):
        merge_weights(parents, tmp_path / "out")
    path.unlink()
    (tmp_path / "again").mkdir()
    with pytest.raises(StorageError, match=r"reading .*0\.safetensors: No such file"):
        merge_weights(parents, tmp_path / "again")


def test_the_output_is_never_written_over(tmp_path: Path) -> None:
    parent = saved(tmp_path / "a", model("F32", 0))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(Conflict, match="exists already"):
        merge_weights([parent], tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"precious"


def test_a_full_disk_is_noticed_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    parent = saved(tmp_path / "a", model("F32", 0))
    (tmp_path / "out").mkdir()
    written: list[int] = []
    with pytest.raises(StorageError, match="No space left") as caught:
        merge_weights([parent], tmp_path / "out", progress=written.append)
    assert "free some disk space" in caught.value.hint
    assert not written


def test_file_systems_without_allocation_do_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    parents = [saved(tmp_path / str(i), model("F32", i)) for i in range(2)]
    one = merged(parents, tmp_path / "one")
    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    two = merged(parents, tmp_path / "two")
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_memory_does_not_grow_with_the_models(tmp_path: Path) -> None:
    plan = {f"w{i}": ("BF16", (4 << 20,)) for i in range(4)}  # 32 MB, all holes
    start, infos = plan_file(plan, {})
    for name in "abc":
        (tmp_path / name).mkdir()
        with open(tmp_path / name / "0.safetensors", "wb") as file:
            file.write(start)
            file.truncate(max(info.stop for info in infos.values()))
    parents = [opened(tmp_path / name) for name in "abc"]
    (tmp_path / "out").mkdir()
    tracemalloc.start()
    merge_weights(parents, tmp_path / "out", threads=2)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * 60 * CHUNK


@pytest.mark.parametrize("seed", range(5))
def test_what_threads_bring_in_any_order_is_used_in_one(seed: int) -> None:
    numbers = np.random.default_rng(seed).permutation(200).tolist()
    used: list[tuple[int, int]] = []
    together = threading.Lock()

    def use(item: tuple[int, int]) -> None:
        assert together.acquire(blocking=False)  # never two at once
        used.append(item)
        together.release()

    order = stream._InOrder(use)  # type: ignore[arg-type]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: order.give(n, (n, -n)), numbers))  # type: ignore[arg-type]
    assert used == [(number, -number) for number in range(200)]


def test_an_error_in_the_callback_ends_the_merge(tmp_path: Path) -> None:
    def stop(count: int) -> None:
        raise ZeroDivisionError("enough")

    parents = [saved(tmp_path / str(i), model("F32", i)) for i in range(2)]
    (tmp_path / "out").mkdir()
    with pytest.raises(ZeroDivisionError, match="enough"):
        merge_weights(parents, tmp_path / "out", threads=3, progress=stop)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("failing", ["reading", "writing", "hashing"])
def test_an_error_in_one_thread_ends_the_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, threads: int
) -> None:
    """Also of those that wait for a buffer, or for their turn to be hashed."""
    real = {"reading": os.preadv, "writing": os.pwrite, "hashing": TensorHashes.update}[failing]
    calls = itertools.count()

    def fails(*args: object) -> object:
        if next(calls) == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)  # type: ignore[operator]

    arrays = {f"w{i}": ("F32", np.ones(CHUNK, np.float32)) for i in range(40)}
    parents = [saved(tmp_path / str(i), arrays) for i in range(2)]
    (tmp_path / "out").mkdir()
    before = set(threading.enumerate())
    place = (TensorHashes, "update") if failing == "hashing" else (os, real.__name__)
    monkeypatch.setattr(*place, fails)
    with pytest.raises(StorageError, match="No space left"):
        merge_weights(parents, tmp_path / "out", threads=threads)
    assert next(calls) < 5 + 4 * threads
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_hundreds_of_parents(tmp_path: Path, dtype: str) -> None:
    """More than the 256 whose sums are exact in any order: their order is that of the parents."""
    draw = np.random.default_rng(0)
    scales = 10.0 ** draw.integers(-9, 9, 300)
    models = [{"w": (dtype, from_float64(draw.normal(size=50) * s, dtype))} for s in scales]
    weights = draw.integers(1, 9, 300).tolist()
    parents = [
        saved(tmp_path / str(number), arrays, weight=weight)
        for number, (arrays, weight) in enumerate(zip(models, weights, strict=True))
    ]
    found = merged(parents, tmp_path / "out", threads=3)
    assert found["w"].tobytes() == reference(models, weights, "w").tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard", [None, 20_000])
def test_merged_models_load(tmp_path: Path, tied: bool, shard: int | None) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    states = []
    for seed in range(3):
        torch.manual_seed(seed)
        llama = LlamaForCausalLM(config).to(torch.bfloat16)
        llama.save_pretrained(tmp_path / str(seed), max_shard_size=f"{10 + 10 * seed}KB")
        states.append(llama.state_dict())
    parents = [opened(tmp_path / str(seed)) for seed in range(3)]
    assert ("lm_head.weight" in parents[0].tensors) is not tied
    out = tmp_path / "out"
    out.mkdir()
    merge_weights(parents, out, max_shard_bytes=shard or 1 << 30)
    (out / "config.json").write_text((tmp_path / "0" / "config.json").read_text())
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    for name, tensor in loaded.state_dict().items():
        mean = sum(state[name].to(torch.float64) for state in states) / 3
        expected = from_float64(mean.numpy(), "BF16")
        assert tensor.dtype == torch.bfloat16
        assert np.array_equal(tensor.contiguous().view(torch.uint16).numpy(), expected)
