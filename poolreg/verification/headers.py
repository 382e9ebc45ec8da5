"""Strict intake once more: do the files of every model still make the model that its record says?

Only headers of weights are read, and configurations whole. What is not here, or not in its size,
is found elsewhere and passed over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from poolreg.errors import PoolregError
from poolreg.progress import Progress
from poolreg.store.journal import Record
from poolreg.store.registry import Registry
from poolreg.tensors import read_header
from poolreg.upkeep.census import Census
from poolreg.verification.findings import Finding
from poolreg.verification.lines import sound_records
from poolreg.weights.checkpoint import MAX_INDEX
from poolreg.weights.hf_json import read_object

_WAY_OUT = "poolreg verify --full --repair; where its bytes are as recorded, remove the model"


def check_headers(
    registry: Registry, census: Census, progress: Progress
) -> tuple[int, list[Finding]]:
    """Check the files of all living models; returns how many files, and what is wrong."""
    models = sum(kind == "model" for kind, _ in census.known)
    progress.start("reading headers", models, "models")
    seen: set[str] = set()
    files, findings = 0, []
    for record in sound_records(registry, "model"):
        if record.id in seen:
            continue
        seen.add(record.id)
        progress.advance(1)
        if ("model", record.id) not in census.tombstones:
            files += len(record.body["files"])
            findings += [
                Finding(f"model {record.id}", problem, _WAY_OUT, "model", record.id)
                for problem in _problems(registry, record)
            ]
    return files, findings


def _problems(registry: Registry, record: Record) -> Iterator[str]:
    body = record.body
    present = [file for file in body["files"] if registry.objects.holds(*_said(file))]
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    broken = False
    for file in present:
        path = registry.objects.path(file["object"])
        try:
            if file["role"] == "weights":
                tensors = read_header(path).tensors.values()
                found |= {info.name: (info.dtype, info.shape) for info in tensors}
            elif file["name"].endswith(".json"):
                read_object(path, MAX_INDEX)
        except PoolregError as error:
            broken = True
            # It talks of the object by the end of its digest, which nobody knows.
            yield f"{file['name']} (object {file['object']}): {_after(error.message, path)}"
    if len(present) == len(body["files"]) and not broken:
        yield from _different(found, body)


def _said(file: Mapping[str, Any]) -> tuple[str, int]:
    return file["object"], file["bytes"]


def _after(message: str, path: Path) -> str:
    return message.removeprefix(f"{path.name} ")


def _different(
    found: Mapping[str, tuple[str, tuple[int, ...]]], body: Mapping[str, Any]
) -> Iterator[str]:
    said = {name: (dtype, tuple(shape)) for name, dtype, shape, _ in body["tensors"]}
    wrong = sorted(name for name in said.keys() | found.keys() if said.get(name) != found.get(name))
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        yield f"tensor {wrong[0]} is not as its record says{more}"
