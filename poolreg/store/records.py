"""The records of the journal: functions that build them, and the table rows that they become.

Each record's `id` says when two records are the same fact: content for partitions, evalsets,
models, recipes, runs and scores of tasks; the memo key for evaluations; the whole statement for
names, places and removals, of which the latest counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from poolreg.canonical import canonical_json, digest_of
from poolreg.errors import Damage
from poolreg.store.journal import Record, following, now

Row = dict[str, Any]
Values = tuple[Any, ...]  # of a row, in the order of some columns


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


# -- their rows -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """A table of the catalog: some of its columns, the record's id first, and a record's rows."""

    name: str
    columns: tuple[str, ...]
    rows: Callable[[Record], tuple[Values, ...]]


def rows(record: Record) -> tuple[tuple[Values, ...], ...]:
    """Return the rows of a record of a known kind in each table of its kind.

    Raises `Damage` if fields are missing or mistyped.
    """
    try:
        return tuple([table.rows(record) for table in KINDS[record.kind]])
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise Damage(
            f"a {record.kind} record lacks or mistypes a field: {error}",
            hint="something else than poolreg wrote it; see in which segment: poolreg verify",
            record=record.id,
        ) from error


def _main(name: str, key: str, fields: str, **more: Callable[[Row], Any]) -> Table:
    """Return a table with one row a record: its id, its time, these fields of its body, and more
    columns that are worked out of the body."""
    names = fields.split()
    getters: list[Callable[[Row], Any]] = [*map(itemgetter, names), *more.values()]

    def one_by_one(body: Row) -> list[Any]:
        return [get(body) for get in getters]

    values: Callable[[Row], Sequence[Any]] = one_by_one
    if len(names) > 1 and not more:
        values = itemgetter(*names)  # the same, faster
    return Table(
        name,
        (key, "added", *names, *more),
        lambda record: ((record.id, record.at.rstrip("Z"), *values(record.body)),),
    )


def _parts(name: str, columns: str, field: str, values: Callable[[Any], Iterable[Any]]) -> Table:
    """Return a table with a row for each entry of a list in the body: the id, and its values."""
    return Table(
        name,
        tuple(columns.split()),
        lambda record: tuple([(record.id, *values(entry)) for entry in record.body[field]]),
    )


def _units(record: Record) -> tuple[Values, ...]:
    facts = itemgetter("digest", "documents", "bytes")
    units = enumerate(record.body["units"], start=1)
    return tuple([(record.id, number, *facts(unit)) for number, unit in units])


def _files(record: Record) -> tuple[Values, ...]:
    place = record.body["partition"], record.body["field"], record.at.rstrip("Z")
    facts = itemgetter("path", "bytes", "sha256", "documents")
    files = enumerate(record.body["files"])
    return tuple([(record.id, *place, position, *facts(file)) for position, file in files])


def _tensor(entry: Sequence[Any]) -> Values:
    name, dtype, shape, sha256 = entry
    return name, dtype, shape, sha256


def _recipe_text(body: Row) -> str | None:
    return None if body["recipe"] is None else canonical_json(body["recipe"]).decode()


def _model_units(record: Record) -> tuple[Values, ...]:
    model, facts = record.body["model"], itemgetter("unit", "tokens", "epochs")
    return tuple([(record.id, model, *facts(unit)) for unit in record.body["units"]])


def _component(entry: Sequence[Any]) -> Values:
    model, numerator, denominator = entry
    return model, numerator, denominator, numerator / denominator


def _weight(entry: Sequence[Any]) -> Values:
    partition, unit, numerator, denominator = entry
    return partition, unit, numerator, denominator, numerator / denominator


def _module(entry: Sequence[Any]) -> Values:
    layer, part, size, kept, parameters, kept_parameters, predicted, error = entry
    return layer, part, size, kept, parameters, kept_parameters, predicted, error


def _pick(body: Mapping[str, Any], *keys: str) -> Row:
    return {key: body[key] for key in keys}


def variant_id(body: Mapping[str, Any]) -> str:
    """Return the digest of a variant's request, of which the rest of its record is the result."""
    return digest_of(_pick(
        body, "variant", "parent", "ratio", "calibration", "method", "target", "without",
        "epsilon", "step", "sequential",
    ))  # fmt: skip


def _measure(body: Row) -> str:
    # What makes two values comparable; versions of the harness are meant to agree.
    return digest_of(_pick(
        body, "harness", "task", "metric", "filter", "n_shot", "task_hash", "task_version",
        "sample_limit",
    ))  # fmt: skip


def _never(_: Row) -> bool:
    return False


KINDS = {
    "name": (_main("names", "record", "space name target parent"),),
    "removal": (_main("removals", "record", "kind target removed"),),
    "partition": (
        _main("partitions", "digest", "content documents bytes duplicates",
              units=lambda body: len(body["units"]), removed=_never),
        Table("units", ("partition", "unit", "digest", "documents", "bytes"), _units),
    ),
    "location": (
        Table("partition_files", ("record", "partition", "field", "added", "position", "path",
                                  "bytes", "sha256", "documents"), _files),
    ),
    "evalset": (_main("evalsets", "digest", "object content documents bytes", removed=_never),),
    "contamination": (_main("contamination", "record", "evalset partition documents"),),
    "model": (
        _main("models", "digest", "model_type parameters bytes dtype tokenizer context_length "
              "vocab_size trusted_code", removed=_never),
        _parts("model_files", "model role name object bytes", "files",
               itemgetter("role", "name", "object", "bytes")),
        _parts("model_tensors", "model name dtype shape sha256", "tensors", _tensor),
    ),
    "run": (
        _main("runs", "digest", "model role seed blend mixture scheme budget how tokens steps "
              "seconds final_loss", recipe=_recipe_text),
        Table("model_units", ("run", "model", "unit", "tokens", "epochs"), _model_units),
    ),
    "recipe": (
        _main("recipes", "digest", "", components=lambda body: len(body["components"])),
        _parts("recipe_components", "recipe model numerator denominator weight", "components",
               _component),
    ),
    "mixture": (
        _main("mixtures", "digest", "mixture scheme seed subject blend size unit_tokens origin"),
        _parts("mixture_weights", "mixture partition unit numerator denominator weight",
               "weights", _weight),
    ),
    "protocol": (
        _main("protocols", "digest", "max_length dtype prefix tokenizer version",
              window_rule=itemgetter("window")),
    ),
    "evaluation": (
        _main("evaluations", "digest", "subject evalset protocol nll tokens bytes documents "
              "seconds device document_scores token_scores"),
    ),
    "lap": (
        _main("laps", "digest", "subject evalset protocol lap nll tokens bytes documents seconds "
              "device document_scores"),
    ),
    "calibration": (
        _main("calibrations", "digest", "subject text text_kind protocol token_limit tokens "
              "held_out_tokens largest condition windows layers seconds"),
    ),
    "variant": (
        _main("variants", "digest", "model parent parent_label method target ratio achieved "
              "without epsilon step sequential calibration block_parameters "
              "parent_block_parameters parent_parameters parent_bytes shared_bytes "
              "logit_difference seconds"),
        _parts("variant_modules", "variant layer part size kept parameters kept_parameters "
               "predicted_error error", "modules", _module),
    ),
    "task_score": (
        _main("task_scores", "digest", "harness task metric filter n_shot task_hash task_version "
              "sample_limit subject value stderr higher_is_better samples harness_version "
              "measured request", measure=_measure),
    ),
    "build": (_main("builds", "digest", "model subject dtype max_shard_bytes"),),
    "transfer": (
        _main("transfers", "record", "direction place repo_type revision version records "
              "objects bytes"),
        _parts("transfer_left", "record object", "left", lambda digest: (digest,)),
    ),
    "trust": (_main("trusts", "record", "model"),),
}  # fmt: skip
