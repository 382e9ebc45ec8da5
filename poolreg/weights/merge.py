"""Merge models: the exact average of their tensors as new safetensors files.

`poolreg.numerics.average` defines the average and `poolreg.weights.stream` runs it over one
file. The bytes written depend on the parents' tensors and weights alone: not on how the parents
are sharded, on the order of their files, or on the number of threads.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from poolreg.errors import ConfigError, Incompatible, UsageError
from poolreg.files import storage_errors, sync_folder, write_atomic
from poolreg.numerics.average import FLOATS
from poolreg.tensors import DTYPE_BYTES, Layout, plan_shards
from poolreg.weights.hashing import HashedFile
from poolreg.weights.stream import Parent, Progress, write_average

__all__ = ["Parent", "check_mergeable", "merge_weights"]

INDEX_NAME = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
MAX_WEIGHT = 1 << 53  # float64 holds integers exactly up to here


def check_mergeable(parents: Sequence[Parent], *, dtype: str | None = None) -> None:
    """Check that `parents` can be averaged and stored as `dtype`, without reading their data.

    Raises `Incompatible`, naming the first tensor that differs and both models, unless names,
    dtypes and shapes agree; `UsageError` for weights that are not whole positive numbers;
    `ConfigError` for a `dtype` that is no floating storage type.
    """
    if not parents or not parents[0].tensors:
        raise UsageError("there is nothing to merge", hint="name at least one model with tensors")
    if any(parent.weight < 1 for parent in parents) or _total(parents) > MAX_WEIGHT:
        raise UsageError(
            "the weights of a merge are whole numbers from 1 up, with a sum of at most 2**53",
            hint="use weights with smaller denominators, and leave out models of weight zero",
        )
    if dtype is not None and dtype not in FLOATS:
        raise ConfigError(f"{dtype!r} is no storage dtype", hint=f"use one of {', '.join(FLOATS)}")
    for parent in parents[1:]:
        _check_equal(parents[0], parent)
    if len(parents) > 1 or dtype is not None:
        _check_averageable(parents[0])


def _total(parents: Sequence[Parent]) -> int:
    return sum(parent.weight for parent in parents)


def _check_equal(one: Parent, other: Parent) -> None:
    names = sorted(one.tensors.keys() | other.tensors.keys())
    differing = [name for name in names if _described(one, name) != _described(other, name)]
    if not differing:
        return
    name, more = differing[0], len(differing) - 1
    rest = f"; {more} more tensors differ" if more > 1 else "; 1 more tensor differs" * more
    hint = "only models trained from one seed model, in one dtype, can be averaged"
    if one.tensors.keys() != other.tensors.keys():
        hint += "; models with tied and with untied embeddings cannot be mixed"
    raise Incompatible(
        f"tensor {name!r} is {_described(one, name)} in {one.label} "
        f"but {_described(other, name)} in {other.label}{rest}",
        hint=hint,
        tensor=name,
        models=(one.label, other.label),
        differing=len(differing),
    )


def _described(parent: Parent, name: str) -> str:
    if name not in parent.tensors:
        return "absent"
    _, info = parent.tensors[name]
    return f"{info.dtype} {list(info.shape)}"


def _check_averageable(parent: Parent) -> None:
    for name, (_, info) in parent.tensors.items():
        if info.dtype.startswith("F") and info.dtype not in FLOATS:
            raise Incompatible(
                f"tensor {name!r} of {parent.label} is {info.dtype}, which cannot be averaged",
                hint="8-bit floats go with scales; convert the models to BF16 first",
                tensor=name,
            )


def merge_weights(
    parents: Sequence[Parent],
    folder: Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    whole: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[Path, HashedFile]:
    """Write the weighted average of `parents` as safetensors files, flushed, into the folder.

    `parents` come in the order of their digests. Floating tensors are averaged and stored in
    `dtype` (default: their own) with one rounding; all others must be equal in all parents. One
    parent and no `dtype` is a copy. `progress` gets the bytes just written, from one worker
    thread at a time. Returns the weights files with the hashes of their tensors, and their own
    if `whole`; several have an index beside them. The folder is the caller's: after an error it
    holds a part.

    Raises what `check_mergeable` raises, `Incompatible` for other tensors that differ, `Refused`
    for an average that is not finite or a file that ends early, `Conflict` for a file that is
    already there, `StorageError` when the disk is full.
    """
    check_mergeable(parents, dtype=dtype)
    divisor = math.gcd(*(parent.weight for parent in parents))
    parents = [replace(parent, weight=parent.weight // divisor) for parent in parents]
    layouts = {
        name: (dtype if dtype and info.dtype in FLOATS else info.dtype, info.shape)
        for name, (_, info) in parents[0].tensors.items()
    }
    shards = plan_shards(layouts, max_shard_bytes)
    paths = [folder / _shard_name(number, len(shards)) for number in range(1, len(shards) + 1)]
    made = {}
    with storage_errors(f"merging into {folder}"):
        for path, names in zip(paths, shards, strict=True):
            shard = {name: layouts[name] for name in names}
            made[path] = write_average(
                path, parents, shard, whole=whole, threads=threads, progress=progress
            )
        if len(paths) > 1:
            _write_index(folder, shards, layouts)
        sync_folder(folder)
    return made


def _shard_name(number: int, total: int) -> str:
    return "model.safetensors" if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"


def _write_index(
    folder: Path, shards: Sequence[Sequence[str]], layouts: Mapping[str, Layout]
) -> None:
    size = sum(math.prod(shape) * DTYPE_BYTES[dtype] for dtype, shape in layouts.values())
    files = {
        name: _shard_name(number, len(shards))
        for number, names in enumerate(shards, 1)
        for name in names
    }
    index = {"metadata": {"total_size": size}, "weight_map": files}
    text = json.dumps(index, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    write_atomic(folder / INDEX_NAME, text.encode("utf-8"))
