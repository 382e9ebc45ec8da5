"""Merges that are kept in the pool as models, and rebuilt from their recipe when need be.

An average needs no weights of its own: its recipe and its parents give them bit for bit. One that
is kept all the same, under a name, is a model like any other with a record of how it was built,
so its weights need not travel and a lost file can be made again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from poolreg.canonical import digest_of
from poolreg.errors import Damage, UsageError
from poolreg.mixture import common_denominator
from poolreg.models.folders import DTYPES, merge_subject
from poolreg.models.resolve import Subject
from poolreg.models.stored import AddedModel, Run, add_model, stored_tensors
from poolreg.progress import SILENT, Progress
from poolreg.store import records
from poolreg.store.registry import Registry
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
    with tempfile.TemporaryDirectory(dir=registry.root / "tmp") as folder:
        out = Path(folder) / "merge"
        merge_subject(
            registry, subject, out, dtype=dtype, max_shard_bytes=max_shard_bytes, threads=threads,
            progress=progress,
        )  # fmt: skip
        added = add_model(registry, out, Run("other", how="merged"), name=name, replace=replace)
    body = {
        "model": added.digest, "subject": subject.digest, "dtype": dtype,
        "max_shard_bytes": max_shard_bytes,
    }  # fmt: skip
    with registry.writing():
        registry.record(*subject.records, records.keyed("build", build_id(body), body))
    return added


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
    """Make the weights of a kept merge again and store what is missing.

    Raises `Damage` if the parents do not give the files that were recorded.
    """
    scale = common_denominator(weight for _, weight in build.components)
    parents = [
        Parent(int(weight * scale), stored_tensors(registry, model), model[:12])
        for model, weight in build.components
    ]
    with tempfile.TemporaryDirectory(dir=registry.objects.staging) as folder:
        merge_weights(
            parents, Path(folder), dtype=DTYPES[build.dtype] if build.dtype else None,
            max_shard_bytes=build.max_shard_bytes, threads=None, progress=progress.advance,
        )  # fmt: skip
        made = {registry.objects.put_file(path) for path in _weights(Path(folder))}
    lacking = [
        row["name"]
        for row in registry.select("model_files", model=build.model)
        if row["role"] == "weights" and row["object"] not in made
    ]
    if lacking:
        raise Damage(
            f"{lacking[0]} of the merge {build.model[:12]} cannot be rebuilt from its recipe",
            hint="fetch its weights from a copy of the pool",
            model=build.model,
        )


def _weights(folder: Path) -> Sequence[Path]:
    return sorted(folder.glob("*.safetensors"))
