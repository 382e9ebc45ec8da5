"""quarantine/: where a repair puts what was damaged, so that nothing is ever deleted by it.

quarantine/<name>-<time>     a damaged object by its digest, a segment, a catalog, a FORMAT
"""

from __future__ import annotations

import os
import shutil
from datetime import UTC, datetime
from pathlib import Path

from poolreg import faults
from poolreg.files import staged, storage_errors, sync_folder
from poolreg.store.registry import Registry

NAME = "quarantine"


def move(registry: Registry, path: Path, name: str) -> str:
    """Move a file out of the way; returns where it lies now, below the pool."""
    target = _target(registry, name)
    with storage_errors(f"moving {path.name} to {NAME}"):
        faults.step("repair.move")
        path.rename(target)
        faults.step("repair.moved")
        sync_folder(target.parent)
        sync_folder(path.parent)
    return str(target.relative_to(registry.root))


def keep(registry: Registry, path: Path) -> str:
    """Copy a file that something new is about to replace; returns where the copy lies."""
    target = _target(registry, path.name)
    with storage_errors(f"copying {path.name} to {NAME}"):
        faults.step("repair.copy")
        with open(path, "rb") as reader, staged(target, folder=registry.root / "tmp") as writer:
            shutil.copyfileobj(reader, writer, 1 << 20)
    return str(target.relative_to(registry.root))


def _target(registry: Registry, name: str) -> Path:
    folder = registry.root / NAME
    with storage_errors(f"making {NAME}"):
        folder.mkdir(exist_ok=True)
        sync_folder(registry.root)
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    target = folder / f"{name}-{stamp}"
    number = 1
    while os.path.lexists(target):  # the clock may stand still
        number += 1
        target = folder / f"{name}-{stamp}-{number}"
    return target
