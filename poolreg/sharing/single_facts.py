"""What the card of a published model tells: read from the pool that the model comes from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from poolreg.models.folders import DTYPES, Merged
from poolreg.models.merges import Build, builds_of
from poolreg.models.resolve import Subject
from poolreg.numerics.average import FLOATS
from poolreg.sharing.markup import MOST_LISTED, markdown, size
from poolreg.sharing.single_card import ModelFacts, Origin, model_scores
from poolreg.store.registry import Registry

_ROLES = {
    "seed": "The seed model of a pool: the others were trained from it.",
    "unit": "A unit model of a pool: its seed model, trained on one base unit of a partition of "
    "the training corpus.",
    "reference": "A reference model of a pool: really trained on a mixture, to see whether "
    "averages of models predict what training gives.",
    "variant": "A compressed variant of a model: modules of its layers were replaced by smaller "
    "ones, without training.",
}

# Where huggingface_hub keeps what it downloaded: the one folder that says what a model is called.
_DOWNLOADED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")


def merge_facts(
    registry: Registry, subject: Subject, merged: Merged, *, repo: str, dtype: str | None
) -> ModelFacts:
    """Return the facts of a mixture's average, or of a single model that was written anew."""
    labels = {row["digest"]: row["name"] for row in registry.select("model_list")}
    parents = [(labels.get(d, d[:12]), str(weight), d) for d, weight in merged.parents]
    rounded = dtype if dtype and _rounds(registry, subject, dtype) else None
    return ModelFacts(
        repo, subject.label, "merge", merged.digest, _average(len(parents), rounded),
        parents=tuple(parents), lineage=_lineage(registry, (d for d, _ in merged.parents)),
        scores=model_scores(registry, subject.digest), recipe=merged.recipe, rounded=rounded,
    )  # fmt: skip


def folder_facts(
    folders: Sequence[str | Path], labels: Sequence[str], merged: Merged, *, repo: str,
    dtype: str | None,
) -> ModelFacts:  # fmt: skip
    """Return the facts of an average of model folders; `labels` are those of its parents."""
    parents = [
        (label, str(weight), digest)
        for label, (digest, weight) in zip(labels, merged.parents, strict=True)
    ]
    return ModelFacts(
        repo, " + ".join(labels), "merge", merged.digest, _average(len(parents), dtype),
        parents=tuple(parents), base_models=_base_models(folders), recipe=merged.recipe,
    )  # fmt: skip


def stored_facts(registry: Registry, digest: str, *, repo: str) -> ModelFacts:
    """Return the facts of a stored model, which may be a compressed variant or a kept merge."""
    label = registry.one("model_label", model=digest)
    if builds := builds_of(registry, digest):
        return _kept(registry, builds[0], repo=repo, title=label["label"])
    row = next((r for r in registry.select("variant_list") if r["model"] == digest), None)
    return ModelFacts(
        repo, label["label"], "variant" if row or label["role"] == "variant" else "model", digest,
        _compressed(row) if row else _ROLES.get(label["role"], "A model of a pool."),
        parents=((row["parent"], "", row["parent_digest"]),) if row else (),
        lineage=_lineage(registry, [digest]),
        scores=model_scores(registry, digest, row["parent_digest"] if row else None),
    )  # fmt: skip


def _kept(registry: Registry, build: Build, *, repo: str, title: str) -> ModelFacts:
    labels = {row["digest"]: row["name"] for row in registry.select("model_list")}
    return ModelFacts(
        repo, title, "merge", build.model, _average(len(build.components), build.dtype),
        parents=tuple((labels.get(d, d[:12]), str(weight), d) for d, weight in build.components),
        lineage=_lineage(registry, [build.model]), scores=model_scores(registry, build.model),
    )  # fmt: skip


def _average(parents: int, dtype: str | None) -> str:
    if parents == 1:
        return "A model written anew with poolreg." + (f" Rounded to {dtype}." if dtype else "")
    return (
        f"The exact parameter average of {parents} models, made with poolreg. Values are "
        "multiplied by whole weights and added in float64 in the order of the digests, divided "
        f"once and rounded once{f' to {dtype}' if dtype else ''}: whoever has the models can "
        "rebuild it bit for bit."
    )


def _compressed(row: dict[str, Any]) -> str:
    text = markdown(row["calibrated_on"])
    return (
        f"A compressed variant of {markdown(row['parent'])}: {row['achieved']:.1%} of the "
        "parameters of its blocks (attention and MLPs) were removed, without training, by the "
        f"method {markdown(row['method'])} for the target {markdown(row['target'])}. What matters "
        f"was measured on {row['calibration_tokens']:,} tokens of {text}, so scores on {text} "
        f"flatter it. {row['parameters']:,} parameters, {size(row['bytes'])} of weights."
    )


def _rounds(registry: Registry, subject: Subject, dtype: str) -> bool:
    """Tell whether some floating tensor is stored in another dtype than it has in the pool."""
    rows = registry.select("model_tensors", model=subject.components[0][0])
    return any(row["dtype"] in FLOATS and row["dtype"] != DTYPES[dtype] for row in rows)


def _lineage(registry: Registry, digests: Iterable[str]) -> tuple[Origin, ...]:
    """Return how models came to be, from these backwards, each step once."""
    names = {digest: name for name, digest in registry.names("partition").items()}
    steps: dict[Origin, None] = {}
    waiting = list(dict.fromkeys(digests))
    for digest in waiting:  # grows while it is read
        if len(steps) >= MOST_LISTED:
            break
        trained_on = tuple(
            names.get(row["partition"], row["partition"][:12])
            for row in registry.select("trained_on", model=digest)
        )
        for row in registry.select("lineage", digest=digest):
            if row["child"] == digest:
                source = row["parent_label"] or row["parent"][:12]
                on = trained_on if row["relation"] == "trained from" else ()
                steps[Origin(row["child_label"], row["relation"], source, on)] = None
                waiting += [row["parent"]] if row["parent"] not in waiting else []
    return tuple(steps)


def _base_models(folders: Sequence[str | Path]) -> tuple[str, ...]:
    """Return which models on the Hub the folders are, as far as their paths tell it for sure."""
    places = [Path(folder).absolute().parts[-3:] for folder in folders]
    shapes = [_DOWNLOADED.fullmatch(p[0]) for p in places if p[1:2] == ("snapshots",)]
    return tuple(dict.fromkeys(f"{shape[1]}/{shape[2]}" for shape in shapes if shape))
