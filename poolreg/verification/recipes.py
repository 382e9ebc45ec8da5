"""Kept merges, made again from their recipes: do they still give the weights that are recorded?"""

from __future__ import annotations

import copy
import os
import random
import tempfile
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from poolreg.errors import PoolregError, StorageError
from poolreg.models.merges import Build, builds_of, can_rebuild, rebuild
from poolreg.progress import Progress
from poolreg.sharing.scratch import Overlay
from poolreg.store.registry import Registry
from poolreg.store.staging import working_folder
from poolreg.upkeep.census import Census
from poolreg.verification.findings import Finding
from poolreg.verification.hashing import Part

_WAY_OUT = (
    "its weights, where they are whole, stay as they are; keep them when you share the pool: "
    "poolreg push --merges"
)


@dataclass
class Rebuilt:
    """How many merges were made again, those that came out otherwise, and those not tried."""

    merges: int = 0
    findings: list[Finding] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)


def check_merges(
    registry: Registry, census: Census, part: Part, *, most: int, bad: Collection[str],
    deadline: float | None, progress: Progress,
) -> Rebuilt:  # fmt: skip
    """Rebuild at most so many kept merges of a part, drawn by chance, and store nothing.

    Those with a parent that is `bad` or not here are passed over.
    """
    models = [
        model for model in census.builds
        if ("model", model) in census.known and ("model", model) not in census.tombstones
        and part.holds(bytes.fromhex(model))
    ]  # fmt: skip
    done = Rebuilt()
    if not models or not most:
        return done
    try:
        chosen = [
            build for model in random.sample(models, len(models))
            for build in builds_of(registry, model)[:1] if _possible(registry, build, bad)
        ][:most]  # fmt: skip
        for number, build in enumerate(chosen):
            if deadline is not None and time.monotonic() >= deadline:
                left = len(chosen) - number
                done.unchecked.append(f"{left} of {len(chosen)} merges were not made again")
                break
            _check(registry, build, done, progress)
    except StorageError as error:
        done.unchecked.append(f"merges were not made again: {error.message}")
    return done


def _possible(registry: Registry, build: Build, bad: Collection[str]) -> bool:
    parents = (
        row["object"]
        for model, _ in build.components
        for row in registry.select("model_files", model=model)
        if row["role"] == "weights"
    )
    return can_rebuild(registry, build) and not any(digest in bad for digest in parents)


def _check(registry: Registry, build: Build, done: Rebuilt, progress: Progress) -> None:
    size = registry.one("model", digest=build.model)["bytes"]
    progress.start("making merges again", size, "bytes")
    staging = registry.objects.staging
    place = staging if os.access(staging, os.W_OK) else Path(tempfile.gettempdir())
    with working_folder(place) as folder:
        aside = copy.copy(registry)
        aside.objects = Overlay(registry.objects, folder / "objects", folder)
        aside.objects.folder.mkdir()
        try:
            rebuild(aside, build, progress=progress)
        except StorageError:
            raise
        except PoolregError as error:
            label = registry.one("model_label", model=build.model)["label"]
            found = Finding(f"merge {label}", error.message, _WAY_OUT, "merge", build.model)
            done.findings.append(found)
    done.merges += 1
