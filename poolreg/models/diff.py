"""How two models differ, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from poolreg.models.stored import stored_tensors
from poolreg.numerics.average import CHUNK, FLOATS, widen
from poolreg.store.registry import Registry
from poolreg.tensors import TensorInfo, read_array


@dataclass(frozen=True)
class TensorDiff:
    """One tensor that is not the same in both models.

    Without a norm (`None`) the tensor is in one model only, of another shape, or not floating.
    `difference` is ‖a−b‖₂, `relative` is ‖a−b‖₂/‖a‖₂, `largest` is max |a−b|.
    """

    tensor: str
    dtype_a: str | None
    dtype_b: str | None
    shape_a: tuple[int, ...] | None
    shape_b: tuple[int, ...] | None
    difference: float | None = None
    relative: float | None = None
    largest: float | None = None


def diff_models(
    registry: Registry, a: str, b: str, *, progress: Callable[[int], None] | None = None
) -> list[TensorDiff]:
    """Return the tensors that differ between two stored models (digests), by name.

    Payloads are compared by hash first, so equal tensors are not read. `progress` is told
    tensors compared.
    """
    rows_a = {row["name"]: row for row in registry.select("model_tensors", model=a)}
    rows_b = {row["name"]: row for row in registry.select("model_tensors", model=b)}
    places_a, places_b = stored_tensors(registry, a), stored_tensors(registry, b)
    found = []
    for name in sorted(rows_a.keys() | rows_b.keys()):
        one, two = rows_a.get(name), rows_b.get(name)
        if progress:
            progress(1)
        if one and two and all(one[key] == two[key] for key in ("sha256", "dtype", "shape")):
            continue
        diff = TensorDiff(
            name,
            one["dtype"] if one else None,
            two["dtype"] if two else None,
            tuple(one["shape"]) if one else None,
            tuple(two["shape"]) if two else None,
        )
        floating = diff.dtype_a in FLOATS and diff.dtype_b in FLOATS
        if floating and diff.shape_a == diff.shape_b:
            gap, relative, largest = _norms(places_a[name], places_b[name])
            diff = replace(diff, difference=gap, relative=relative, largest=largest)
        found.append(diff)
    return found


def _norms(
    a: tuple[Path, TensorInfo], b: tuple[Path, TensorInfo]
) -> tuple[float, float | None, float]:
    """Return ‖a−b‖₂, ‖a−b‖₂/‖a‖₂ (None for a zero tensor) and max |a−b|, in float64."""
    raw_a, raw_b = read_array(*a).reshape(-1), read_array(*b).reshape(-1)
    gap = size = largest = 0.0
    for start in range(0, raw_a.size, CHUNK):
        values = widen(raw_a[start : start + CHUNK], a[1].dtype)
        delta = values - widen(raw_b[start : start + CHUNK], b[1].dtype)
        gap += float(np.dot(delta, delta))
        size += float(np.dot(values, values))
        largest = max(largest, float(np.abs(delta).max()))
    return math.sqrt(gap), math.sqrt(gap / size) if size else None, largest
