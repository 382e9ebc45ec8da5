"""Merges that are kept in the pool as models, and rebuilt from their recipe when need be.

An average needs no weights of its own: its recipe and its parents give them bit for bit. One that
is kept all the same, under a name, is a model like any other with a record of how it was built,
so its weights need not travel and a lost file can be made again.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from poolreg.canonical import digest_of, sha256
from poolreg.errors import Damage, UsageError
from poolreg.mixture import common_denominator
from poolreg.models.folders import DTYPES, copy_rest, merge_subject
from poolreg.models.resolve import Subject
from poolreg.models.stored import AddedModel, Run, add_model, stored_folder, stored_tensors
from poolreg.progress import SILENT, Progress
from poolreg.store import records
from poolreg.store.journal import Record
from poolreg.store.registry import Registry
from poolreg.store.staging import working_folder
from poolreg.weights.merge import MAX_SHARD_BYTES, merge_weights
from poolreg.weights.stream import Parent


@dataclass(frozen=True)
class Build:
    """How a kept merge was built: the parents' exact weights by digest, and how it is stored."""

    model: str
    components: tuple[tuple[str, Fraction], ...]
    dtype: str | None
    max_shard_bytes: int


def build_id(body: dict[str, Any]) -> str:
    """Return the digest of how a merge was built."""
    return digest_of({"build": 1, **body})


def keep_merge(
    registry: Registry, subject: Subject, name: str, *, dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES, threads: int | None = None, replace: bool = False,
    progress: Progress = SILENT,
) -> AddedModel:  # fmt: skip
    """Merge a mixture and keep it in the pool as model `name`.

    Raises `UsageError` for a subject that is a stored model already, `Conflict` for a taken name.
    """
    registry.check_free("model", name, None, replace=True)
    if len(subject.components) == 1:
        raise UsageError(
            f"{subject.label} is a model of the pool already", hint="use it by its present name"
        )
    with working_folder(registry.root / "tmp") as folder:
        out = folder / "merge"
        merged = merge_subject(
            registry, subject, out, dtype=dtype, max_shard_bytes=max_shard_bytes, threads=threads,
            whole=True, progress=progress,
        )  # fmt: skip
        how = {"subject": subject.digest, "dtype": dtype, "max_shard_bytes": max_shard_bytes}

        def built(model: str) -> list[Record]:
            body = {"model": model, **how}
            return [*subject.records, records.keyed("build", build_id(body), body)]

        run = Run("other", how="merged")
        return add_model(
            registry, out, run, name=name, replace=replace, lineage=built, passing=True,
            hashed=merged.hashed,
        )  # fmt: skip


def builds_of(registry: Registry, model: str) -> list[Build]:
    """Return the known ways to build a model from others."""
    return [
        Build(model, _components(registry, row["subject"]), row["dtype"], row["max_shard_bytes"])
        for row in registry.select("builds_of", model=model)
    ]


def _components(registry: Registry, recipe: str) -> tuple[tuple[str, Fraction], ...]:
    rows = registry.select("recipe_components", recipe=recipe)
    return tuple((row["model"], Fraction(row["numerator"], row["denominator"])) for row in rows)


def can_rebuild(registry: Registry, build: Build) -> bool:
    """Tell whether all weights of the parents are in the store."""
    return bool(build.components) and all(
        registry.objects.has(row["object"])
        for model, _ in build.components
        for row in registry.select("model_files", model=model) or [{"object": "0" * 64}]
    )


def rebuild(registry: Registry, build: Build, *, progress: Progress = SILENT) -> None:
    """Make the files of a kept merge again and store what is missing.

    Raises `Damage` if the parents do not give the files that were recorded.
    """
    scale = common_denominator(weight for _, weight in build.components)
    parents = [
        Parent(int(weight * scale), stored_tensors(registry, model), model[:12])
        for model, weight in build.components
    ]
    files = registry.select("model_files", model=build.model)
    with working_folder(registry.objects.staging) as folder:
        hashed = merge_weights(
            parents, folder, dtype=DTYPES[build.dtype] if build.dtype else None,
            max_shard_bytes=build.max_shard_bytes, whole=True, progress=progress.advance,
        )  # fmt: skip
        made = {file.sha256 for file in hashed.values()}
        for path, file in hashed.items():
            registry.objects.take(path, file.sha256)
        _put_rest(registry, build, folder, wanted={row["object"] for row in files} - made)
    lacking = [
        row["name"] for row in files if row["role"] == "weights" and row["object"] not in made
    ]
    if lacking:
        raise Damage(
            f"{lacking[0]} of the merge {build.model[:12]} cannot be rebuilt from its recipe",
            hint="fetch its weights from a copy of the pool",
            model=build.model,
        )


def _put_rest(registry: Registry, build: Build, folder: Path, *, wanted: set[str]) -> None:
    """Store the index, configuration and tokenizer of a merge, where they are not here."""
    if all(map(registry.objects.has, wanted)):
        return
    with stored_folder(registry, build.components[0][0]) as template:
        copy_rest(template, folder, build.dtype)
    for path in folder.iterdir():
        if path.suffix != ".safetensors" and sha256(data := path.read_bytes()) in wanted:
            registry.objects.put(data)
