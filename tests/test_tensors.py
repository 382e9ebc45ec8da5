"""The strict reader, file by file, and the canonical writer; test_fuzz.py has the library beside it."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from poolreg.errors import Refused
from poolreg.tensors import (
    DTYPE_BYTES,
    MAX_HEADER_BYTES,
    NUMPY_DTYPES,
    plan_file,
    plan_shards,
    read_array,
    read_header,
    write_file,
)

FUZZ = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def raw_file(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: str = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def sample_arrays() -> dict[str, tuple[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return {
        "weight": ("F32", rng.standard_normal((3, 5)).astype(np.float32)),
        "half": ("F16", rng.standard_normal(7).astype(np.float16)),
        "brain": ("BF16", rng.integers(0, 1 << 16, (2, 3), dtype=np.uint16)),
        "double": ("F64", rng.standard_normal(2)),
        "scalar": ("F32", np.array(1.5, np.float32)),
        "empty": ("I64", np.zeros((0, 4), np.int64)),
        "mask": ("BOOL", np.array([True, False, True])),
        "bytes": ("U8", np.arange(3, dtype=np.uint8)),
        "größe": ("I32", np.array([[-1]], np.int32)),
    }


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    arrays = {name: array for name, (dtype, array) in sample_arrays().items() if dtype != "BF16"}
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(arrays, path, metadata={"format": "pt", "ключ": "значение"})
    header = read_header(path)
    assert header.tensors.keys() == arrays.keys()
    assert header.metadata == {"format": "pt", "ключ": "значение"}
    assert header.size == path.stat().st_size
    starts = [info.start for info in header.tensors.values()]
    assert starts == sorted(starts)
    for name, info in header.tensors.items():
        array = read_array(path, info)
        assert array.shape == info.shape == arrays[name].shape
        assert array.dtype == arrays[name].dtype
        assert np.array_equal(array, arrays[name])
        assert info.elements == arrays[name].size
        assert not array.flags.writeable


def test_reads_an_empty_file_of_the_library(tmp_path: Path) -> None:
    safetensors.numpy.save_file({}, tmp_path / "none.safetensors")
    assert read_header(tmp_path / "none.safetensors").tensors == {}


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    arrays = sample_arrays()
    path = tmp_path / "model.safetensors"
    write_file(path, arrays, {"format": "pt"})
    loaded = dict(safetensors.deserialize(path.read_bytes()))
    assert loaded.keys() == arrays.keys()
    for name, (dtype, array) in arrays.items():
        assert loaded[name]["dtype"] == dtype
        assert loaded[name]["shape"] == list(array.shape)
        assert bytes(loaded[name]["data"]) == array.tobytes()
    for name, info in read_header(path).tensors.items():
        assert np.array_equal(read_array(path, info), arrays[name][1])
        assert info.start % DTYPE_BYTES[info.dtype] == 0


def test_the_canonical_file_does_not_depend_on_the_order_given(tmp_path: Path) -> None:
    arrays = sample_arrays()
    write_file(tmp_path / "a", arrays, {"b": "2", "a": "1"})
    write_file(tmp_path / "b", dict(reversed(arrays.items())), {"a": "1", "b": "2"})
    content = (tmp_path / "a").read_bytes()
    assert content == (tmp_path / "b").read_bytes()
    assert int.from_bytes(content[:8], "little") % 64 == 56  # the data begins at a multiple of 64


def test_writing_strided_and_wrongly_typed_arrays(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    write_file(tmp_path / "t", {"t": ("F32", array.T)})
    info = read_header(tmp_path / "t").tensors["t"]
    assert np.array_equal(read_array(tmp_path / "t", info), array.T)
    with pytest.raises(Refused, match="'t' is called BF16"):
        write_file(tmp_path / "u", {"t": ("BF16", array)})
    assert not (tmp_path / "u").exists()


@pytest.mark.parametrize("name", ["", "a\nb", "\x1b[2J", "a" * 1025, "__metadata__", "\ud800"])
def test_the_writer_refuses_names_that_the_reader_refuses(name: str) -> None:
    with pytest.raises(Refused):
        plan_file({name: ("F32", (1,))}, {})


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(), "b": entry(offsets=[5, 9])}, bytes(9), "'b' leaves a hole"),
        ({"a": entry(), "b": entry(offsets=[2, 6])}, bytes(6), "'b' overlaps"),
        ({"a": entry(), "b": entry()}, bytes(4), "'b' overlaps"),
        ({"a": entry(offsets=[4, 8])}, bytes(8), "'a' leaves a hole"),
        ({"a": entry()}, bytes(3), "truncated"),
        ({"a": entry()}, bytes(5), "too long"),
        ({"a": entry(shape=[2])}, bytes(4), "'a' has 4 bytes, which is not F32"),
        ({"a": entry(offsets=[4, 0])}, bytes(4), "'a' has no proper data_offsets"),
        ({"a": entry(offsets=[0])}, bytes(4), "'a' has no proper data_offsets"),
        ({"a": entry(offsets=[0, "4"])}, bytes(4), "'a' has no proper data_offsets"),
        ({"a": entry(shape=[True])}, bytes(4), "'a' has no proper shape"),
        ({"a": entry(shape="1")}, bytes(4), "'a' has no proper shape"),
        ({"a": entry(shape=[1] * 33)}, bytes(4), "'a' has no proper shape"),
        ({"a": entry(shape=[-1])}, bytes(4), "the number -1"),
        ({"a": entry(shape=[1.0])}, bytes(4), r"the number 1\.0"),
        ({"a": entry(shape=[10**30])}, bytes(4), "the number 1000"),
        (b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', b"", "the number -0"),
        (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,0]}}', b"", "the number NaN"),
        ({"a": entry(shape=[0, 2**40, 2**40], offsets=[0, 0])}, b"", "impossibly large"),
        ({"a": entry(dtype="F31")}, bytes(4), "'a' has the dtype 'F31'"),
        ({"a": entry(dtype=["F32"])}, bytes(4), "'a' has the dtype"),  # type: ignore[arg-type]
        ({"a": {**entry(), "extra": 1}}, bytes(4), "needs exactly"),
        ({"a": {"dtype": "F32"}}, b"", "needs exactly"),
        ({"a": 1}, b"", "needs exactly"),
        ({"": entry()}, bytes(4), "a name of 0 characters"),
        ({"a" * 1025: entry()}, bytes(4), "a name of 1025 characters"),
        ({"\x1b[31mred": entry()}, bytes(4), r"'\\x1b\[31mred' has control characters"),
        ({"\u202ea": entry()}, bytes(4), "has control characters"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__ holds something other than text"),
        ({"__metadata__": {"a": "\ud800"}}, b"", "__metadata__ holds something other than text"),
        ({"__metadata__": None}, b"", "__metadata__ is not"),
        (b'{"a":1,"a":2}', b"", "the key 'a' twice"),
        (b'{"__metadata__":{"x":"1","x":"1"}}', b"", "the key 'x' twice"),
        (b'{"a":' + b"[" * 100_000, b"", "not valid JSON"),
        (b'{"a":' + b'{"a":' * 100_000, b"", "not valid JSON"),
        (b'{"a":1', b"", "not valid JSON"),
        (b'{"\xff":1}', b"", "not valid JSON"),
        (b"[]", b"", "not a JSON object"),
        (b" {}", b"", "not a JSON object"),
        (b"", b"", "not a JSON object"),
    ],
)
def test_refuses_malformed_headers(
    tmp_path: Path, header: object, data: bytes, message: str
) -> None:
    path = raw_file(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(Refused, match=message) as caught:
        read_header(path)
    assert "bad.safetensors" in caught.value.message
    assert caught.value.message.isprintable()
    assert caught.value.hint


def test_refuses_too_many_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("poolreg.tensors.MAX_TENSORS", 2)
    header = {name: entry(shape=[0], offsets=[0, 0]) for name in "abc"}
    with pytest.raises(Refused, match="lists 3 tensors"):
        read_header(raw_file(tmp_path / "f", header))


def test_refuses_lengths_that_lie(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    for content, message in [
        (b"", "too short"),
        (b"1234567", "too short"),
        ((100).to_bytes(8, "little") + b"{}", "truncated"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "announces a header"),
        (b"\xff" * 16, "announces a header"),
    ]:
        path.write_bytes(content)
        with pytest.raises(Refused, match=message):
            read_header(path)


def test_refuses_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name, message in [
        ("pipe", "not a regular file"),
        ("", "not a regular file"),
        ("dangling", "No such file"),
        ("absent", "No such file"),
    ]:
        with pytest.raises(Refused, match=message):
            read_header(tmp_path / name)
    write_file(tmp_path / "real", sample_arrays())
    (tmp_path / "link").symlink_to("real")
    assert read_header(tmp_path / "link").tensors.keys() == sample_arrays().keys()


names = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=6)
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
layouts = st.dictionaries(
    names.filter(str.isprintable), st.tuples(st.sampled_from(list(DTYPE_BYTES)), shapes), max_size=5
)


@FUZZ
@given(layouts, st.dictionaries(names, names, max_size=2), st.randoms())
def test_any_plan_is_read_back_the_same(tmp_path: Path, plan, metadata, random) -> None:
    arrays = {
        name: (
            dtype,
            np.frombuffer(
                random.randbytes(math.prod(shape) * DTYPE_BYTES[dtype])
                if dtype != "BOOL"
                else bytes(math.prod(shape)),
                NUMPY_DTYPES[dtype],
            ).reshape(shape),
        )
        for name, (dtype, shape) in plan.items()
    }
    path = tmp_path / "f"
    write_file(path, arrays, metadata)
    header = read_header(path)
    assert header.metadata == metadata
    assert {name: (info.dtype, info.shape) for name, info in header.tensors.items()} == plan
    for name, info in header.tensors.items():
        assert read_array(path, info).tobytes() == arrays[name][1].tobytes()
    assert header.tensors == dict(plan_file(plan, metadata)[1])


@given(layouts, st.integers(1, 100))
def test_shards_hold_every_name_once_within_the_limit(plan, limit: int) -> None:
    def size(name: str) -> int:
        dtype, shape = plan[name]
        return math.prod(shape) * DTYPE_BYTES[dtype]

    shards = plan_shards(plan, limit)
    order = [name for shard in shards for name in shard]
    assert order == list(plan_file(plan, {})[1])
    for shard in shards:
        assert shard
        assert sum(map(size, shard)) <= limit or sum(size(name) > 0 for name in shard) == 1
