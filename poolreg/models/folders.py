"""Averages as Hugging Face folders: weights, configuration, tokenizer, card and recipe.

A folder written here loads with any tool. `poolreg.json` in it names the parents by digest with
their exact weights, so that anyone who has them can rebuild the weights bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from poolreg.canonical import digest_of
from poolreg.errors import Conflict, MixtureError, UsageError
from poolreg.files import staged_folder, write_atomic
from poolreg.mixture import METHOD, common_denominator
from poolreg.numerics.average import FLOATS
from poolreg.progress import SILENT, Progress
from poolreg.tensors import DTYPE_BYTES, TensorInfo
from poolreg.weights.checkpoint import (
    Checkpoint,
    check_same_family,
    digest_of_tensors,
    digest_of_weights,
    read_checkpoint,
)
from poolreg.weights.hashing import HashedFile, watch
from poolreg.weights.merge import MAX_SHARD_BYTES, check_mergeable, merge_weights
from poolreg.weights.stream import Parent

if TYPE_CHECKING:
    from poolreg.models.resolve import Subject
    from poolreg.store.registry import Registry

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}


@dataclass(frozen=True)
class Component:
    """One parent of an average: digest, exact weight, what to call it, and its tensors."""

    digest: str
    weight: Fraction
    label: str
    tensors: Mapping[str, tuple[Path, TensorInfo]]


@dataclass(frozen=True)
class Merged:
    """A folder that was written: model digest, recipe digest, weights files, bytes of tensors.

    `hashed` has the hashes of each weights file by name; its own only where that was asked for.
    """

    folder: Path
    digest: str
    recipe: str
    parents: tuple[tuple[str, Fraction], ...]
    files: int
    bytes: int
    hashed: Mapping[str, HashedFile] = field(default_factory=dict, repr=False)


def merge_subject(
    registry: Registry, subject: Subject, out: Path, *, dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES, threads: int | None = None, force: bool = False,
    whole: bool = False, progress: Progress = SILENT,
) -> Merged:  # fmt: skip
    """Write the exact average that stands for a mixture, or a stored model, to a new folder.

    `dtype` (float32, bfloat16, float16, float64) casts floating tensors with one rounding.
    With `whole` each file is hashed as a whole too. Raises `Conflict`, `Incompatible`,
    `NotFound`, `StorageError`.
    """
    # Imported here: they bring the catalog, which folders without a pool do not need.
    from poolreg.models.stored import stored_folder, stored_tensors

    labels = {row["digest"]: row["name"] for row in registry.select("model_list")}
    parents = [
        Component(digest, weight, labels.get(digest, digest[:12]), stored_tensors(registry, digest))
        for digest, weight in subject.components
    ]
    with stored_folder(registry, parents[0].digest) as template:
        return write_merge(
            parents, template, out, title=subject.label, dtype=dtype, threads=threads,
            max_shard_bytes=max_shard_bytes, force=force, whole=whole, progress=progress,
        )  # fmt: skip


def merge_folders(
    folders: Sequence[str | Path], out: str | Path, *,
    weights: Sequence[Fraction | int | float | str] | None = None, dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES, threads: int | None = None, force: bool = False,
    trust_code: bool = False, progress: Progress = SILENT,
) -> Merged:  # fmt: skip
    """Average Hugging Face model folders exactly, without a pool, and write the result to `out`.

    `weights` (default: equal) are non-negative and are normalised; floats count as they print,
    so 0.1 is 1/10. Parents are read strictly and compared before anything is written. Raises
    `Refused`, `Incompatible`, `MixtureError`, `UsageError`, `Conflict`.
    """
    shares = _shares(folders, weights)
    inputs = [Path(folder).resolve() for folder in folders]
    if any(Path(out).resolve() in (folder, *folder.parents) for folder in inputs):
        raise Conflict(f"{out} is or holds a model to merge", hint="choose another folder")
    checkpoints = [read_checkpoint(Path(f), trust_code=trust_code) for f in folders]
    for other in checkpoints[1:]:
        names = (str(checkpoints[0].folder), str(other.folder))
        check_same_family(checkpoints[0].family, other.family, names=names)
    unchanged = watch(path for checkpoint in checkpoints for path in checkpoint.weight_files)
    parents: dict[str, Component] = {}
    progress.start("hashing", sum(map(_size, checkpoints)), "bytes")
    for checkpoint, share in zip(checkpoints, shares, strict=True):
        digest = digest_of_weights(checkpoint, threads=threads, progress=progress.advance)
        share += parents[digest].weight if digest in parents else 0
        parents[digest] = Component(digest, share, str(checkpoint.folder), checkpoint.tensors)
    chosen = sorted((p for p in parents.values() if p.weight), key=lambda parent: parent.digest)
    title = " + ".join(Path(f).name for f, share in zip(folders, shares, strict=True) if share)
    return write_merge(
        chosen, Path(chosen[0].label), Path(out), title=title, dtype=dtype, threads=threads,
        max_shard_bytes=max_shard_bytes, force=force, unchanged=unchanged, progress=progress,
    )  # fmt: skip


def _shares(
    folders: Sequence[str | Path], weights: Sequence[Fraction | int | float | str] | None
) -> list[Fraction]:
    if not folders:
        raise UsageError("there is nothing to merge", hint="name at least one model folder")
    given = [1] * len(folders) if weights is None else list(weights)
    if len(given) != len(folders):
        raise UsageError(f"{len(given)} weights for {len(folders)} folders", hint="give one each")
    try:
        exact = [_fraction(str(weight)) for weight in given]
    except (ValueError, ZeroDivisionError) as error:
        raise MixtureError(f"not a weight: {error}", hint="write 2, 0.3 or 1/3") from error
    if min(exact) < 0 or not sum(exact):
        raise MixtureError("weights are zero or more, and not all zero")
    return [weight / sum(exact) for weight in exact]


def _fraction(text: str) -> Fraction:
    if re.search(r"e[+-]?[0-9]{4}", text, re.IGNORECASE):  # would be written out, digit by digit
        raise ValueError(f"{text[:40]} is beyond any weight")
    return Fraction(text)


def write_merge(
    parents: Sequence[Component], template: Path, out: Path, *, title: str,
    dtype: str | None = None, max_shard_bytes: int = MAX_SHARD_BYTES, threads: int | None = None,
    force: bool = False, whole: bool = False, unchanged: Callable[[], None] = lambda: None,
    progress: Progress = SILENT,
) -> Merged:  # fmt: skip
    """Write the average of `parents`, sorted by digest, with what goes with the one in `template`.

    `unchanged` raises if the parents are, after that, not those of the digests any more.
    Otherwise as `merge_subject`.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}", hint=f"use one of {', '.join(DTYPES)}")
    storage = DTYPES[dtype] if dtype else None
    scale = common_denominator(parent.weight for parent in parents)
    streams = [Parent(int(p.weight * scale), p.tensors, p.label) for p in parents]
    check_mergeable(streams, dtype=storage)
    rows = [[p.digest, p.weight.numerator, p.weight.denominator] for p in parents]
    recipe = {"recipe": METHOD, "components": rows}
    size = _payload(parents[0], storage)
    with new_folder(out, force=force) as staging:
        copy_rest(template, staging, dtype)
        progress.start("merging", size, "bytes")
        hashed = merge_weights(
            streams, staging, dtype=storage, max_shard_bytes=max_shard_bytes, whole=whole,
            threads=threads, progress=progress.advance,
        )  # fmt: skip
        unchanged()
        hashes = {name: h for file in hashed.values() for name, h in file.tensors.items()}
        digest = digest_of_tensors(read_checkpoint(staging, trust_code=True), hashes)
        labels = [p.label for p in parents]
        about = {**recipe, "digest": digest, "dtype": dtype, "labels": labels}
        write_atomic(staging / "poolreg.json", (json.dumps(about, indent=2) + "\n").encode())
        write_atomic(staging / "README.md", _card(title, parents, digest, dtype).encode())
    return Merged(
        out, digest, digest_of(recipe), tuple((p.digest, p.weight) for p in parents),
        len(hashed), size, {path.name: file for path, file in hashed.items()},
    )  # fmt: skip


@contextlib.contextmanager
def new_folder(out: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a staging folder that becomes `out` when the block ends without an error.

    Raises `Conflict` if `out` holds anything, unless `force`, which replaces a model's folder.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if not force:
            raise Conflict(
                f"{out} exists and is not empty", hint="choose another folder, or pass --force"
            )
        if not ((out / "config.json").is_file() and any(out.glob("*.safetensors"))):
            raise Conflict(
                f"{out} is not a model folder, so --force does not replace it",
                hint="choose another folder",
            )
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with staged_folder(out.absolute(), replace=force) as staging:
        yield staging


def _payload(parent: Component, storage: str | None) -> int:
    """Return the bytes of the tensors that an average with this parent has, stored so."""
    return sum(
        info.elements * DTYPE_BYTES[storage if storage and info.dtype in FLOATS else info.dtype]
        for _, info in parent.tensors.values()
    )


def _size(checkpoint: Checkpoint) -> int:
    return sum(info.stop - info.start for _, info in checkpoint.tensors.values())


def copy_rest(template: Path, staging: Path, dtype: str | None) -> None:
    """Copy configuration and tokenizer from a parent."""
    checkpoint = read_checkpoint(template, trust_code=True)
    config = dict(checkpoint.config)
    if dtype:
        config = {key: value for key, value in config.items() if key != "torch_dtype"}
        config["dtype"] = dtype
    write_atomic(staging / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    _copy_companions(checkpoint, staging)


def copy_companions(template: Path, staging: Path) -> None:
    """Copy what goes with weights and config.json, whose kinds of files intake knows."""
    _copy_companions(read_checkpoint(template, trust_code=True), staging)


def _copy_companions(checkpoint: Checkpoint, staging: Path) -> None:
    others = [checkpoint.folder / "generation_config.json"]
    others += checkpoint.folder.glob("*.py") if "auto_map" in checkpoint.config else []
    others += checkpoint.tokenizer.files.values() if checkpoint.tokenizer else []
    for path in others:
        if path.is_file():
            shutil.copyfile(path, staging / path.name)


def _card(title: str, parents: Sequence[Component], digest: str, dtype: str | None) -> str:
    rows = "\n".join(f"| {p.label} | {p.weight} | `{p.digest[:16]}` |" for p in parents)
    rounding = f" to {dtype}" if dtype else ""
    return f"""---
library_name: transformers
tags: [poolreg, merge]
---
# {title}

The exact parameter average of these models, made by poolreg:

| parent | weight | digest |
|---|---|---|
{rows}

Values are multiplied by whole weights and added in float64 in the order of the digests, divided
once and rounded once{rounding}. Model digest: `{digest}`. The recipe is in `poolreg.json`.
"""
