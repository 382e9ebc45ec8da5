"""What a name, digest or expression stands for, as plain facts that can be printed.

Facts are dictionaries: `kind`, `name`, `digest`, what the catalog knows, and lists of parts.
"""

from __future__ import annotations

import json
from typing import Any

from poolreg.errors import NotFound, UsageError
from poolreg.models.resolve import Resolver, Subject
from poolreg.store.registry import Registry

Facts = dict[str, Any]


def describe(registry: Registry, text: str, *, scheme: str = "micro") -> list[Facts]:
    """Return all that `text` stands for: a partition and an evalset may share their name.

    A partition is described as such and not as the mixture of itself, and an average of one
    model, such as `python/2`, as that model. Raises `NotFound`,
    `MixtureError` or `UsageError` where it stands for nothing.
    """
    found = []
    for space, facts in (("partition", partition_facts), ("evalset", evalset_facts)):
        try:
            found.append(facts(registry, registry.resolve(space, text)))
        except NotFound:
            continue
    if any(facts["kind"] == "partition" for facts in found):
        return found
    try:
        resolver = Resolver(registry, scheme=scheme)
        subject = resolver.subject(text)
    except (NotFound, UsageError) as error:
        if found:
            return found
        if isinstance(error, NotFound) and error.data.get("name") == text:
            spaces = ("partition", "evalset", "model")
            known = {name: "" for space in spaces for name in registry.names(space)}
            raise registry.unknown("partition, evalset or model", text, known) from None
        raise
    if len(subject.components) > 1:
        return [*found, mixture_facts(registry, subject)]
    return [*found, model_facts(registry, resolver.model(subject.digest))]


def partition_facts(registry: Registry, digest: str) -> Facts:
    """Return one partition: counts, base units, files, evalsets that share documents with it."""
    row = registry.one("partition", digest=digest)
    return {
        **_named(registry, "partition", digest, row),
        "units": registry.select("partition_units", partition=digest),
        "files": registry.select("partition_files", partition=digest),
        "shared": _shared(registry, "partition", digest, other="evalset"),
    }


def evalset_facts(registry: Registry, digest: str) -> Facts:
    """Return one evalset: counts, and the partitions that hold some of its documents."""
    row = registry.one("evalset", digest=digest)
    return {
        **_named(registry, "evalset", digest, row),
        "shared": _shared(registry, "evalset", digest, other="partition"),
    }


def model_facts(registry: Registry, subject: Subject) -> Facts:
    """Return one stored model: role, seed, sizes, how it came to be, files."""
    row = registry.one("model", digest=subject.digest)
    label = registry.one("model_label", model=subject.digest)
    runs = registry.select("model_runs", model=subject.digest)
    for run in runs:
        run["recipe"] = json.loads(run["recipe"]) if run["recipe"] else None
    seed = _label(registry, label["seed"])
    return {
        **{"kind": "model", "name": subject.label, "role": label["role"], "seed": seed},
        **row,
        "runs": runs,
        "files": registry.select("model_files", model=subject.digest),
    }


def mixture_facts(registry: Registry, subject: Subject) -> Facts:
    """Return the exact average that stands for a mixture: models with their weights."""
    components = [
        {
            "model": _label(registry, digest),
            "weight": str(weight),
            "share": float(weight),
            "digest": digest,
        }
        for digest, weight in subject.components
    ]
    return {
        "kind": "mixture",
        "name": subject.label,
        "scheme": subject.scheme,
        "seed": _label(registry, subject.seed),
        "digest": subject.digest,
        "blend": subject.blend,
        "components": components,
    }


def _named(registry: Registry, space: str, digest: str, row: Facts) -> Facts:
    names = [name for name, target in registry.names(space).items() if target == digest]
    return {"kind": space, "name": ", ".join(names) or digest[:12], **row}


def _label(registry: Registry, digest: str | None) -> str | None:
    if digest is None:
        return None
    label: str = registry.one("model_label", model=digest)["label"]
    return label


def _shared(registry: Registry, space: str, digest: str, *, other: str) -> list[Facts]:
    names = {target: name for name, target in registry.names(other).items()}
    return [
        {"name": names[row[other]], "documents": row["documents"]}
        for row in registry.select("contamination")
        if row[space] == digest and row[other] in names
    ]
