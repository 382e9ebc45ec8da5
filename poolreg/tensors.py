"""Strict safetensors: read headers that strangers wrote, write files that are canonical.

The reader accepts a subset of what the safetensors library accepts and never differs from it
in a value. The writer gives one file for one content: names in canonical order, a compact
header, aligned data, flushed to the disk.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from poolreg.canonical import canonical_json
from poolreg.errors import Refused
from poolreg.files import staged

Array = npt.NDArray[Any]
Layout = tuple[str, tuple[int, ...]]  # the dtype and shape of a tensor still to be placed

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2,
    "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip

# bfloat16 and the 8-bit floats travel as their bit patterns: numpy has no such types.
NUMPY_DTYPES = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "F8_E4M3": "u1", "F8_E5M2": "u1", "I16": "<i2",
    "U16": "<u2", "F16": "<f2", "BF16": "<u2", "I32": "<i4", "U32": "<u4", "F32": "<f4",
    "I64": "<i8", "U64": "<u8", "F64": "<f8",
}  # fmt: skip

ALIGNMENT = 64
MAX_HEADER_BYTES = 32 << 20
MAX_TENSORS = 100_000
_MAX_VALUES = 15 * MAX_TENSORS  # in a header; a tensor of four dimensions has 10
MAX_NAME = 1024
MAX_DIMENSIONS = 32  # what numpy 1 can hold
MAX_ELEMENTS = 1 << 56

_AGAIN = "download or export the checkpoint again; poolreg reads only whole, well-formed files"


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of one file: its dtype (safetensors spelling), shape and byte range."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int  # absolute offset in the file of the first payload byte
    stop: int  # absolute offset after the last payload byte

    @property
    def elements(self) -> int:
        """Number of elements (1 for a scalar)."""
        return (self.stop - self.start) // DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Header:
    """A checked safetensors header: tensors in file order and the free-form metadata."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    size: int  # of the whole file, bytes


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file without touching its data.

    Raises `Refused`, naming the file and the tensor, for anything but a regular file whose
    header is well-formed and whose tensors cover the data section without holes or overlaps.
    """
    text, size = _header_bytes(path)
    try:
        fields = _parse(text)
        metadata = _metadata(fields.pop("__metadata__", {}))
        if len(fields) > MAX_TENSORS:
            raise _Fault(f"the header lists {len(fields)} tensors, more than {MAX_TENSORS}")
        first = 8 + len(text)
        infos = [_tensor(name, entry, first) for name, entry in fields.items()]
        infos.sort(key=lambda info: (info.start, info.stop, info.name))
        _check_cover(infos, first, size)
    except _Fault as fault:
        raise Refused(
            f"{path.name} is not a safetensors file that can be trusted: {fault}",
            hint=_AGAIN,
            path=str(path),
            tensor=fault.tensor,
        ) from fault
    return Header({info.name: info for info in infos}, metadata, size)


class _Fault(ValueError):
    """What is wrong with a header; `read_header` adds the file."""

    def __init__(self, text: str, tensor: str | None = None) -> None:
        super().__init__(text if tensor is None else f"tensor {_shown(tensor)} {text}")
        self.tensor = tensor


def _shown(name: str) -> str:
    # repr() keeps a hostile name's control characters away from the terminal.
    return repr(name if len(name) <= 100 else name[:100] + "…")


def _header_bytes(path: Path) -> tuple[bytes, int]:
    """Return the header's JSON text and the size of the file."""

    def refuse(reason: str) -> NoReturn:
        raise Refused(f"{path.name} {reason}", hint=_AGAIN, path=str(path))

    try:
        # O_NONBLOCK: opening a named pipe must not wait for its other end.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        refuse(f"cannot be read: {getattr(error, 'strerror', error)}")
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        refuse("is not a regular file")
    with open(descriptor, "rb", buffering=0) as file:
        size = status.st_size
        if size < 8:
            refuse(f"is too short for a safetensors file: {size} bytes")
        try:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER_BYTES:
                refuse(f"announces a header of {length} bytes, more than {MAX_HEADER_BYTES}")
            if length > size - 8:
                refuse(f"is truncated: a header of {length} bytes in a file of {size}")
            text = file.read(length)
        except OSError as error:
            refuse(f"cannot be read: {error.strerror}")
    if len(text) != length:
        refuse("changed while it was read")
    return text, size


def _parse(text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        raise _Fault("the header is not a JSON object")
    # Before they are read: a value of two bytes takes a hundred in memory.
    if sum(map(text.count, (b",", b"[", b"{"))) > _MAX_VALUES:
        raise _Fault(f"the header holds more than {_MAX_VALUES} values")
    try:
        fields: dict[str, Any] = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_natural,
            parse_float=_no_number,
            parse_constant=_no_number,
        )
    except _Fault:
        raise
    except (ValueError, RecursionError) as error:
        raise _Fault(f"the header is not valid JSON ({error})") from error
    return fields


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise _Fault(f"the header has the key {_shown(counts.most_common(1)[0][0])} twice")
    return result


def _natural(digits: str) -> int:
    if digits.startswith("-") or len(digits) > 19:
        raise _Fault(f"the header holds the number {digits[:40]}, which is no size")
    return int(digits)


def _no_number(text: str) -> NoReturn:
    raise _Fault(f"the header holds the number {text[:40]}, which is no size")


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise _Fault("__metadata__ is not a JSON object")
    for key, item in value.items():
        if not isinstance(item, str) or _has_surrogate(key) or _has_surrogate(item):
            raise _Fault(f"__metadata__ holds something other than text under {_shown(key)}")
    return value


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def check_tensor_name(name: str) -> None:
    """Raise `Refused` unless `name` may name a tensor: 1 to 1024 printable characters."""
    try:
        _check_name(name)
    except _Fault as fault:
        raise Refused(str(fault), hint="rename the tensor", tensor=name) from fault


def _check_name(name: str) -> None:
    if not name or len(name) > MAX_NAME:
        raise _Fault(f"has a name of {len(name)} characters; 1 to {MAX_NAME} are allowed", name)
    if not name.isprintable():
        raise _Fault("has control characters in its name", name)


def _tensor(name: str, entry: Any, first: int) -> TensorInfo:
    _check_name(name)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _Fault("needs exactly dtype, shape and data_offsets", name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _Fault(f"has the dtype {_shown(str(dtype))}, which poolreg does not know", name)
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise _Fault(f"has no proper shape: {_shown(str(shape))}", name)
    # A zero must not hide sizes whose product is beyond what a machine word can hold.
    if math.prod(size or 1 for size in shape) > MAX_ELEMENTS:
        raise _Fault(f"is impossibly large: {_shown(str(shape))}", name)
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _Fault(f"has no proper data_offsets: {_shown(str(offsets))}", name)
    start, stop = offsets
    if stop - start != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise _Fault(f"has {stop - start} bytes, which is not {dtype} {shape}", name)
    return TensorInfo(name, dtype, tuple(shape), first + start, first + stop)


def _are_sizes(value: Any) -> bool:
    # bool is an int to Python, but not to JSON.
    return isinstance(value, list) and all(type(item) is int for item in value)


def _check_cover(infos: list[TensorInfo], first: int, size: int) -> None:
    at = first
    for info in infos:
        if info.start != at:
            kind = "leaves a hole before its data" if info.start > at else "overlaps another"
            raise _Fault(kind, info.name)
        at = info.stop
    if at != size:
        kind = "truncated" if size < at else "too long"
        raise _Fault(f"the file is {kind}: {size} bytes where the header describes {at}")


def canonical_order(tensors: Mapping[str, Layout]) -> list[str]:
    """Return the names in the order of a canonical file: larger items first, then by name.

    Every tensor then starts at a multiple of its item size.
    """
    return sorted(tensors, key=lambda name: (-DTYPE_BYTES[tensors[name][0]], name))


def plan_file(
    tensors: Mapping[str, Layout], metadata: Mapping[str, str]
) -> tuple[bytes, Mapping[str, TensorInfo]]:
    """Lay out a canonical file: the bytes it begins with, and where each tensor goes.

    The first item holds everything before the data (length, compact sorted header, padding to
    a multiple of 64 bytes). Raises `Refused` for names and dtypes that `read_header` refuses.
    """
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    places: list[tuple[str, int, int]] = []
    at = 0
    for name in canonical_order(_checked(tensors)):
        dtype, shape = tensors[name]
        stop = at + math.prod(shape) * DTYPE_BYTES[dtype]
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, stop]}
        places.append((name, at, stop))
        at = stop
    text = canonical_json(fields)
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    first = 8 + len(text)
    infos = {
        name: TensorInfo(name, *tensors[name], first + start, first + stop)
        for name, start, stop in places
    }
    return len(text).to_bytes(8, "little") + text, infos


def _checked(tensors: Mapping[str, Layout]) -> Mapping[str, Layout]:
    for name, (dtype, _) in tensors.items():
        check_tensor_name(name)
        if name == "__metadata__" or dtype not in DTYPE_BYTES:
            raise Refused(
                f"tensor {_shown(name)} of dtype {dtype} cannot stand in a safetensors file",
                hint=f"rename it, or store it as one of {', '.join(DTYPE_BYTES)}",
                tensor=name,
            )
    return tensors


def plan_shards(tensors: Mapping[str, Layout], max_bytes: int) -> list[list[str]]:
    """Cut the names, in canonical order, into files of at most `max_bytes` of data each.

    Greedy; a tensor that is larger than `max_bytes` has a file of its own.
    """
    shards: list[list[str]] = []
    filled = 0
    for name in canonical_order(_checked(tensors)):
        dtype, shape = tensors[name]
        size = math.prod(shape) * DTYPE_BYTES[dtype]
        if not shards or filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_file(
    path: Path, arrays: Mapping[str, tuple[str, Array]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write arrays as a canonical safetensors file, whole or not at all; as `encode` otherwise."""
    pieces = _pieces(arrays, metadata or {})
    with staged(path) as file:
        for piece in pieces:
            file.write(piece)


def encode(
    arrays: Mapping[str, tuple[str, Array]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return the bytes of a canonical safetensors file.

    `arrays` maps each name to its safetensors dtype and its array in the numpy dtype of
    `NUMPY_DTYPES` (bfloat16 as uint16 bit patterns). Raises `Refused` when the two disagree.
    """
    return b"".join(_pieces(arrays, metadata or {}))


def _pieces(
    arrays: Mapping[str, tuple[str, Array]], metadata: Mapping[str, str]
) -> list[bytes | memoryview]:
    layouts = {name: (dtype, array.shape) for name, (dtype, array) in arrays.items()}
    start, infos = plan_file(layouts, metadata)
    for name, (dtype, array) in arrays.items():
        if array.dtype != np.dtype(NUMPY_DTYPES[dtype]):
            raise Refused(
                f"tensor {_shown(name)} is called {dtype} but its array is {array.dtype}",
                hint=f"pass it as {np.dtype(NUMPY_DTYPES[dtype])}",
                tensor=name,
            )
    data = (np.ascontiguousarray(arrays[name][1]).reshape(-1).view(np.uint8) for name in infos)
    return [start, *(piece.data for piece in data)]


def read_array(path: Path, info: TensorInfo) -> Array:
    """Return a tensor as a read-only array over the mapped file, in its `NUMPY_DTYPES` dtype."""
    dtype = np.dtype(NUMPY_DTYPES[info.dtype])
    if info.elements == 0:  # nothing can be mapped
        array: Array = np.empty(info.shape, dtype)
        array.flags.writeable = False
        return array
    mapped = np.memmap(path, dtype, mode="r", offset=info.start, shape=(info.elements,))
    return mapped.view(np.ndarray).reshape(info.shape)
