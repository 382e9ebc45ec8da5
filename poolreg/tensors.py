"""Strict safetensors: read headers that strangers wrote, write files that are canonical.

The reader accepts a subset of what the safetensors library accepts and never differs from it
in a value. The writer gives one file for one content: names in canonical order, a compact
header, aligned data, flushed to the disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2,
    "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


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
    raise NotImplementedError
