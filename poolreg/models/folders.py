"""Averages as Hugging Face folders: weights, configuration, tokenizer, card and recipe.

A folder written here loads with any tool. `poolreg.json` in it names the parents by digest with
their exact weights, so that anyone who has them can rebuild the weights bit for bit.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from poolreg.canonical import digest_of
from poolreg.errors import Conflict, MixtureError, UsageError
from poolreg.files import write_atomic
from poolreg.mixture import common_denominator
from poolreg.models.resolve import METHOD, Subject
from poolreg.models.stored import new_folder, stored_folder, stored_tensors
from poolreg.numerics.average import FLOATS
from poolreg.progress import SILENT, Progress
from poolreg.store.registry import Registry
from poolreg.tensors import DTYPE_BYTES, TensorInfo
from poolreg.weights.checkpoint import Checkpoint, check_same_family, fingerprint, read_checkpoint
from poolreg.weights.merge import MAX_SHARD_BYTES, check_mergeable, merge_weights
from poolreg.weights.stream import Parent

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
    """A folder that was written: model digest, recipe digest, files, bytes of tensors."""

    folder: Path
    digest: str
    recipe: str
    parents: tuple[tuple[str, Fraction], ...]
    files: int
    bytes: int


def merge_subject(
    registry: Registry, subject: Subject, out: Path, *, dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES, threads: int | None = None, force: bool = False,
    progress: Progress = SILENT,
) -> Merged:  # fmt: skip
    """Write the exact average that stands for a mixture, or a stored model, to a new folder.

    `dtype` (float32, bfloat16, float16, float64) casts floating tensors with one rounding.
    Raises `Conflict`, `Incompatible`, `NotFound`, `StorageError`.
    """
    labels = {row["digest"]: row["name"] for row in registry.select("model_list")}
    parents = [
        Component(digest, weight, labels.get(digest, digest[:12]), stored_tensors(registry, digest))
        for digest, weight in subject.components
    ]
    with stored_folder(registry, parents[0].digest) as template:
        return _write(
            parents, template, out, title=subject.label, dtype=dtype, threads=threads,
            max_shard_bytes=max_shard_bytes, force=force, progress=progress,
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
    if Path(out).resolve() in [Path(folder).resolve() for folder in folders]:
        raise Conflict(f"{out} is one of the models to merge", hint="choose another folder")
    parents: dict[str, Component] = {}
    first: tuple[Checkpoint, str] | None = None
    sizes = [sum(f.stat().st_size for f in Path(x).glob("*.safetensors")) for x in folders]
    progress.start("hashing", sum(sizes), "bytes")
    for folder, share in zip(map(Path, folders), shares, strict=True):
        checkpoint = read_checkpoint(folder, trust_code=trust_code)
        if first:
            check_same_family(first[0].family, checkpoint.family, names=(first[1], str(folder)))
        first = first or (checkpoint, str(folder))
        digest = fingerprint(checkpoint, threads=threads, progress=progress.advance).digest
        share += parents[digest].weight if digest in parents else 0
        parents[digest] = Component(digest, share, str(folder), checkpoint.tensors)
    chosen = sorted((p for p in parents.values() if p.weight), key=lambda parent: parent.digest)
    title = " + ".join(Path(f).name for f, share in zip(folders, shares, strict=True) if share)
    return _write(
        chosen, Path(chosen[0].label), Path(out), title=title, dtype=dtype, threads=threads,
        max_shard_bytes=max_shard_bytes, force=force, progress=progress,
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


def _write(
    parents: Sequence[Component], template: Path, out: Path, *, title: str, dtype: str | None,
    max_shard_bytes: int, threads: int | None, force: bool, progress: Progress,
) -> Merged:  # fmt: skip
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"unknown dtype {dtype!r}", hint=f"use one of {', '.join(DTYPES)}")
    storage = DTYPES[dtype] if dtype else None
    scale = common_denominator(parent.weight for parent in parents)
    streams = [Parent(int(p.weight * scale), p.tensors, p.label) for p in parents]
    check_mergeable(streams, dtype=storage)
    rows = [[p.digest, p.weight.numerator, p.weight.denominator] for p in parents]
    recipe = {"recipe": METHOD, "components": rows}
    with new_folder(out, force=force) as staging:
        copy_rest(template, staging, dtype)
        progress.start("merging", _payload(parents[0], storage), "bytes")
        merge_weights(
            streams, staging, dtype=storage, max_shard_bytes=max_shard_bytes, threads=threads,
            progress=progress.advance,
        )  # fmt: skip
        checkpoint = read_checkpoint(staging, trust_code=True)
        progress.start("checking", _payload(parents[0], storage), "bytes")
        made = fingerprint(checkpoint, threads=threads, progress=progress.advance)
        about = {
            **recipe,
            "digest": made.digest,
            "dtype": dtype,
            "labels": [p.label for p in parents],
        }
        write_atomic(staging / "poolreg.json", (json.dumps(about, indent=2) + "\n").encode())
        write_atomic(staging / "README.md", _card(title, parents, made.digest, dtype).encode())
    return Merged(
        out, made.digest, digest_of(recipe), tuple((p.digest, p.weight) for p in parents),
        len(checkpoint.weight_files), made.bytes,
    )  # fmt: skip


def _payload(parent: Component, storage: str | None) -> int:
    """Return the bytes of the tensors that an average with this parent has, stored so."""
    return sum(
        info.elements * DTYPE_BYTES[storage if storage and info.dtype in FLOATS else info.dtype]
        for _, info in parent.tensors.values()
    )


def copy_rest(template: Path, staging: Path, dtype: str | None) -> None:
    """Copy configuration and tokenizer from a parent."""
    config = dict(read_checkpoint(template, trust_code=True).config)
    if dtype:
        config = {key: value for key, value in config.items() if key != "torch_dtype"}
        config["dtype"] = dtype
    write_atomic(staging / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    copy_companions(template, staging)


def copy_companions(template: Path, staging: Path) -> None:
    """Copy what goes with weights and config.json, whose kinds of files intake knows."""
    checkpoint = read_checkpoint(template, trust_code=True)
    others = [template / "generation_config.json"]
    others += template.glob("*.py") if "auto_map" in checkpoint.config else []
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
