"""The records of the journal: one function a kind that builds it, and the table rows it becomes.

Each record's `id` says when two records are the same fact: content for partitions, evalsets,
models, recipes, runs and scores of tasks; the memo key for evaluations; the whole statement for
names, places and removals, of which the latest counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from poolreg.canonical import canonical_json, digest_of
from poolreg.errors import Damage
from poolreg.store.journal import Record, following, now

Row = dict[str, Any]


def statement(kind: str, body: Mapping[str, Any], *, after: str = "") -> Record:
    """Return a record that is identified by all that it says, including when it was said.

    It is said later than `after`, the time of what it takes back, even where the clock was ahead
    then and has been set right since.
    """
    at = max(now(), following(after))
    return Record(kind, digest_of({"kind": kind, "body": body, "at": at}), dict(body), {}, at)


def name(
    space: str, label: str, target: str, *, parent: str | None = None, after: str = ""
) -> Record:
    """Name a partition, model or evalset; the latest naming counts."""
    body = {"space": space, "name": label, "target": target, "parent": parent}
    return statement("name", body, after=after)


def removal(kind: str, target: str, *, removed: bool, after: str = "") -> Record:
    """Tombstone (or restore) a partition, model or evalset; the latest removal counts."""
    body = {"kind": kind, "target": target, "removed": removed}
    return statement("removal", body, after=after)


def location(
    partition: str, files: Sequence[Mapping[str, Any]], field: str, *, after: str = ""
) -> Record:
    """Say where a partition's text lies on this machine; the latest location counts."""
    body = {"partition": partition, "files": [dict(file) for file in files], "field": field}
    return statement("location", body, after=after)


def contamination(evalset: str, partition: str, documents: int) -> Record:
    """Say how many documents of an evalset also stand in a partition."""
    body = {"evalset": evalset, "partition": partition, "documents": documents}
    return Record("contamination", digest_of(body), body, {})


def fact(kind: str, body: Mapping[str, Any], objects: Mapping[str, int] | None = None) -> Record:
    """Return a record that is identified by its content; saying it twice changes nothing."""
    return Record(kind, digest_of({"kind": kind, "body": body}), dict(body), dict(objects or {}))


def keyed(
    kind: str, key: str, body: Mapping[str, Any], objects: Mapping[str, int] | None = None
) -> Record:
    """Return a record that is identified by `key`; the first one in a pool counts."""
    return Record(kind, key, dict(body), dict(objects or {}))


def trust(model: str) -> Record:
    """Say that a model's own Python code may run, for this machine only."""
    return statement("trust", {"model": model})


def transfer(direction: str, place: str, **facts: Any) -> Record:
    """Say that the pool was pushed to or pulled from a place, for this machine only."""
    return statement("transfer", {"direction": direction, "place": place, **facts})


@dataclass(frozen=True)
class Kind:
    """Where the records of one kind stand in the catalog: the main table, the column that holds
    the record's id, and the tables of its parts with the column that points back."""

    table: str
    key: str
    parts: tuple[tuple[str, str], ...] = ()


KINDS = {
    "name": Kind("names", "record"),
    "removal": Kind("removals", "record"),
    "partition": Kind("partitions", "digest", (("units", "partition"),)),
    "location": Kind("partition_files", "record"),
    "evalset": Kind("evalsets", "digest"),
    "contamination": Kind("contamination", "record"),
    "model": Kind("models", "digest", (("model_files", "model"), ("model_tensors", "model"))),
    "run": Kind("runs", "digest", (("model_units", "run"),)),
    "recipe": Kind("recipes", "digest", (("recipe_components", "recipe"),)),
    "mixture": Kind("mixtures", "digest", (("mixture_weights", "mixture"),)),
    "protocol": Kind("protocols", "digest"),
    "evaluation": Kind("evaluations", "digest"),
    "calibration": Kind("calibrations", "digest"),
    "variant": Kind("variants", "digest", (("variant_modules", "variant"),)),
    "task_score": Kind("task_scores", "digest"),
    "build": Kind("builds", "digest"),
    "transfer": Kind("transfers", "record", (("transfer_left", "record"),)),
    "trust": Kind("trusts", "record"),
}


def rows(record: Record) -> Iterator[tuple[str, Row]]:
    """Yield the (table, row) pairs of one record of a known kind.

    Raises `Damage` if fields are missing or mistyped.
    """
    try:
        yield from _ROWS[record.kind](record.id, record.body, record.at.rstrip("Z"))
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise Damage(
            f"a {record.kind} record lacks or mistypes a field: {error}",
            hint="something else than poolreg wrote it; see in which segment: poolreg verify",
            record=record.id,
        ) from error


def _pick(body: Mapping[str, Any], *keys: str) -> Row:
    return {key: body[key] for key in keys}


def _name(key: str, body: Row, at: str) -> Iterator[tuple[str, Row]]:
    yield "names", {"record": key, "added": at} | _pick(body, "space", "name", "target", "parent")


def _removal(key: str, body: Row, at: str) -> Iterator[tuple[str, Row]]:
    yield "removals", {"record": key, "added": at} | _pick(body, "kind", "target", "removed")


def _partition(key: str, body: Row, at: str) -> Iterator[tuple[str, Row]]:
    facts = _pick(body, "content", "documents", "bytes", "duplicates")
    units = body["units"]
    yield "partitions", facts | {"digest": key, "units": len(units), "added": at, "removed": False}
    for number, unit in enumerate(units, start=1):
        sizes = _pick(unit, "digest", "documents", "bytes")
        yield "units", sizes | {"partition": key, "unit": number}


def _location(key: str, body: Row, at: str) -> Iterator[tuple[str, Row]]:
    for position, file in enumerate(body["files"]):
        facts = _pick(file, "path", "bytes", "sha256", "documents")
        place = {"record": key, "position": position, "added": at}
        yield "partition_files", facts | place | _pick(body, "partition", "field")


def _evalset(key: str, body: Row, at: str) -> Iterator[tuple[str, Row]]:
    facts = _pick(body, "object", "content", "documents", "bytes")
    yield "evalsets", facts | {"digest": key, "added": at, "removed": False}


def _contamination(key: str, body: Row, at: str) -> Iterator[tuple[str, Row]]:
    yield (
        "contamination",
        {"record": key, "added": at} | _pick(body, "evalset", "partition", "documents"),
    )


def _model(key: str, body: Row, at: str) -> Iterator[tuple[str, Row]]:
    facts = _pick(
        body, "model_type", "parameters", "bytes", "dtype", "tokenizer", "context_length",
        "vocab_size", "trusted_code",
    )  # fmt: skip
    yield "models", facts | {"digest": key, "added": at, "removed": False}
    for file in body["files"]:
        yield "model_files", {"model": key} | _pick(file, "role", "name", "object", "bytes")
    for label, dtype, shape, sha256 in body["tensors"]:
        row = {"model": key, "name": label, "dtype": dtype, "shape": shape, "sha256": sha256}
        yield "model_tensors", row


def _run(key: str, body: Row, at: str) -> Iterator[tuple[str, Row]]:
    facts = _pick(
        body, "model", "role", "seed", "blend", "mixture", "scheme", "budget", "how", "tokens",
        "steps", "seconds", "final_loss",
    )  # fmt: skip
    recipe = None if body["recipe"] is None else canonical_json(body["recipe"]).decode()
    yield "runs", facts | {"digest": key, "recipe": recipe, "added": at}
    for unit in body["units"]:
        row = _pick(unit, "unit", "tokens", "epochs")
        yield "model_units", row | {"run": key, "model": body["model"]}


def _ratio(numerator: int, denominator: int) -> Row:
    weight = numerator / denominator
    return {"numerator": numerator, "denominator": denominator, "weight": weight}


def _recipe(key: str, body: Row, at: str) -> Iterator[tuple[str, Row]]:
    components = body["components"]
    yield "recipes", {"digest": key, "components": len(components), "added": at}
    for model, numerator, denominator in components:
        yield "recipe_components", {"recipe": key, "model": model} | _ratio(numerator, denominator)


def _mixture(key: str, body: Row, at: str) -> Iterator[tuple[str, Row]]:
    facts = _pick(
        body, "mixture", "scheme", "seed", "subject", "blend", "size", "unit_tokens", "origin"
    )
    yield "mixtures", facts | {"digest": key, "added": at}
    for partition, unit, numerator, denominator in body["weights"]:
        place = {"mixture": key, "partition": partition, "unit": unit}
        yield "mixture_weights", place | _ratio(numerator, denominator)


def _protocol(key: str, body: Row, at: str) -> Iterator[tuple[str, Row]]:
    facts = _pick(body, "max_length", "dtype", "prefix", "tokenizer", "version")
    yield "protocols", facts | {"digest": key, "window_rule": body["window"], "added": at}


def _evaluation(key: str, body: Row, at: str) -> Iterator[tuple[str, Row]]:
    facts = _pick(
        body, "subject", "evalset", "protocol", "nll", "tokens", "bytes", "documents", "seconds",
        "device", "document_scores", "token_scores",
    )  # fmt: skip
    yield "evaluations", facts | {"digest": key, "added": at}


def _calibration(key: str, body: Row, at: str) -> Iterator[tuple[str, Row]]:
    facts = _pick(
        body, "subject", "text", "text_kind", "protocol", "token_limit", "tokens",
        "held_out_tokens", "largest", "condition", "windows", "layers", "seconds",
    )  # fmt: skip
    yield "calibrations", facts | {"digest": key, "added": at}


def variant_id(body: Mapping[str, Any]) -> str:
    """Return the digest of a variant's request, of which the rest of its record is the result."""
    return digest_of(_pick(
        body, "variant", "parent", "ratio", "calibration", "method", "target", "without",
        "epsilon", "step", "sequential",
    ))  # fmt: skip


def _variant(key: str, body: Row, at: str) -> Iterator[tuple[str, Row]]:
    facts = _pick(
        body, "model", "parent", "parent_label", "method", "target", "ratio", "achieved", "without",
        "epsilon", "step", "sequential", "calibration", "block_parameters",
        "parent_block_parameters", "parent_parameters", "parent_bytes", "shared_bytes",
        "logit_difference", "seconds",
    )  # fmt: skip
    yield "variants", facts | {"digest": key, "added": at}
    columns = ("layer", "part", "size", "kept", "parameters", "kept_parameters",
               "predicted_error", "error")  # fmt: skip
    for module in body["modules"]:
        yield "variant_modules", {"variant": key, **dict(zip(columns, module, strict=True))}


def _task_score(key: str, body: Row, at: str) -> Iterator[tuple[str, Row]]:
    # What makes two values comparable; versions of the harness are meant to agree.
    compared = _pick(
        body, "harness", "task", "metric", "filter", "n_shot", "task_hash", "task_version",
        "sample_limit",
    )  # fmt: skip
    facts = compared | _pick(
        body, "subject", "value", "stderr", "higher_is_better", "samples", "harness_version",
        "measured", "request",
    )  # fmt: skip
    yield "task_scores", facts | {"digest": key, "measure": digest_of(compared), "added": at}


def _build(key: str, body: Row, at: str) -> Iterator[tuple[str, Row]]:
    facts = _pick(body, "model", "subject", "dtype", "max_shard_bytes")
    yield "builds", facts | {"digest": key, "added": at}


def _transfer(key: str, body: Row, at: str) -> Iterator[tuple[str, Row]]:
    facts = _pick(
        body, "direction", "place", "repo_type", "revision", "version", "records", "objects",
        "bytes",
    )  # fmt: skip
    yield "transfers", facts | {"record": key, "added": at}
    for digest in body["left"]:
        yield "transfer_left", {"record": key, "object": digest}


def _trust(key: str, body: Row, at: str) -> Iterator[tuple[str, Row]]:
    yield "trusts", {"record": key, "model": body["model"], "added": at}


_ROWS = {
    "name": _name,
    "removal": _removal,
    "partition": _partition,
    "location": _location,
    "evalset": _evalset,
    "contamination": _contamination,
    "model": _model,
    "run": _run,
    "recipe": _recipe,
    "mixture": _mixture,
    "protocol": _protocol,
    "evaluation": _evaluation,
    "calibration": _calibration,
    "variant": _variant,
    "task_score": _task_score,
    "build": _build,
    "transfer": _transfer,
    "trust": _trust,
}
