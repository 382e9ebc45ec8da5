"""Records from elsewhere: read strictly, and believed only as far as they prove themselves.

Every line must have its checksum, every field its type, every name the rule for names; where an
id follows from what the record says, it must be that. What a record claims to have measured
cannot be proved: pulling from somebody means to trust their figures, never their files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any

from poolreg.canonical import digest_of, is_digest, sha256
from poolreg.errors import PoolregError, Refused, StorageError, UnknownFormat
from poolreg.evaluation.protocol import Protocol, evaluation_id
from poolreg.mixture import check_stored_name, common_denominator
from poolreg.models.merges import build_id
from poolreg.models.resolve import mixture_id, recipe_id
from poolreg.models.stored import check_file_name
from poolreg.sharing.contents import STAYING
from poolreg.sharing.shapes import SHAPES, misfit, moment, writable
from poolreg.store.journal import Journal, Record
from poolreg.store.objects import ObjectStore
from poolreg.store.records import variant_id
from poolreg.text.corpus import decode_documents, document_digests
from poolreg.text.partitions import evalset_id, partition_id, unit_id

MAX_SIZE = 1 << 50  # bytes of one object
MAX_FILE_NAME = 200  # bytes; file systems take 255
SPACES = ("partition", "model", "evalset")

_AHEAD = timedelta(days=1)


def read_segment(file: Path, digest: str) -> Iterator[Record]:
    """Yield the checked records of one published segment that would go into a pool.

    Raises `Refused` with the segment's digest for whatever does not hold.
    """
    end = file.stat().st_size
    offset = 0
    latest = (datetime.now(UTC) + _AHEAD).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    try:
        for record, after in Journal(file.parent).read(file.name, 0, end):
            offset = after
            if record.kind not in STAYING:
                _check(record, latest)
                yield record
    except StorageError:
        raise
    except UnknownFormat as error:
        raise UnknownFormat(_short(error.message), hint=error.hint, segment=digest) from error
    except PoolregError as error:
        raise _refused(digest, error.message) from error
    if offset != end:
        raise _refused(digest, "it ends in the middle of a line")


def _refused(digest: str, why: str) -> Refused:
    return Refused(
        f"the published journal cannot be trusted: {_short(why)} (segment {digest[:12]})",
        hint="nothing was taken from it; ask whoever published it to push a sound pool",
        segment=digest,
    )


def _short(text: str) -> str:
    # What is wrong may be quoted, and be anything: a line of 60 MB, or one that moves the cursor.
    return "".join(ch if ch.isprintable() else "?" for ch in text[:300])


def _check(record: Record, latest: str) -> None:
    kind = record.kind[:40]
    if kind not in SHAPES:
        raise UnknownFormat(
            f"it holds records of the kind {kind!r}, which this poolreg does not know",
            hint="install a newer poolreg",
        )
    if not is_digest(record.id):
        raise Refused(f"a record of kind {kind} has no digest as its id")
    if not (moment(record.at[:-1]) and record.at.endswith("Z")) or record.at > latest:
        raise Refused(f"a record of kind {kind} has no time, or one in the future")
    for digest, size in record.objects.items():
        if not is_digest(digest) or type(size) is not int or not 0 <= size <= MAX_SIZE:
            raise Refused(f"a record of kind {kind} names an object that cannot be")
    if not writable(record.body):
        raise Refused(f"a record of kind {kind} holds what cannot be written again as JSON")
    if (field := misfit(record.body, SHAPES[kind])) is not None:
        raise Refused(f"a record of kind {kind} lacks or mistypes {field or 'its body'}")
    try:
        expected = _IDENTITY.get(kind, _of_content)(record)
    except ValueError as error:
        raise Refused(f"a record of kind {kind} cannot be: {error}") from error
    if expected not in (None, record.id):
        raise Refused(f"a record of kind {kind} does not say what its id says")


def check_evalset(objects: ObjectStore, digest: str, body: Mapping[str, Any]) -> None:
    """Check that the stored text of an evalset is the one that its digest names."""
    texts = decode_documents(objects.read(body["object"]))
    if sha256(document_digests(texts)) != body["content"]:
        raise Refused(
            f"the text of evalset {digest[:12]} is not the one that its digest names",
            hint="whoever made this pool did not add it with poolreg; do not use it",
        )


# -- one function a kind: the id that follows from what is said, or None ------------------------


def _of_content(record: Record) -> str:
    return digest_of({"kind": record.kind, "body": record.body})


def _of_run(record: Record) -> str:
    """A run is said with its time where it is said again, so that its model stands again."""
    again = digest_of({"kind": record.kind, "body": record.body, "at": record.at})
    return record.id if record.id == again else _of_content(record)


def _of_statement(record: Record) -> str:
    body = record.body
    if body["kind" if record.kind == "removal" else "space"] not in SPACES:
        raise ValueError("it is about nothing that a pool holds")
    for name in (body["name"], body["parent"]) if record.kind == "name" else ():
        if name is not None and check_stored_name(name) != name:
            raise ValueError("a name is not in its normal form")
    return digest_of({"kind": record.kind, "body": body, "at": record.at})


def _of_partition(record: Record) -> str:
    body = record.body
    if not body["units"]:
        raise ValueError("it has no base units")
    for number, unit in enumerate(body["units"], start=1):
        if unit["digest"] != unit_id(record.id, number):
            raise ValueError("its base units are not its own")
    return partition_id(body["content"], len(body["units"]))


def _of_evalset(record: Record) -> str:
    if not record.objects.keys() >= {record.body["object"], record.body["content"]}:
        raise ValueError("its text is not among its objects")
    return evalset_id(record.body["content"])


def _of_model(record: Record) -> None:
    """Check what later code relies on; the digest is checked with the files themselves."""
    names = [check_file_name(file["name"]) for file in record.body["files"]]
    if len(set(names)) != len(names) or any(len(name.encode()) > MAX_FILE_NAME for name in names):
        raise ValueError("two of its files have one name, or one has a name that is too long")
    for file in record.body["files"]:
        if record.objects.get(file["object"]) != file["bytes"]:
            raise ValueError("its files are not its objects")


def _of_recipe(record: Record) -> str:
    components = record.body["components"]
    models = [model for model, _, _ in components]
    if models != sorted(set(models)):
        raise ValueError("its models are not in order")
    _check_weights(components)
    return recipe_id(components)


def _of_mixture(record: Record) -> str:
    body = record.body
    _check_weights(body["weights"])
    return mixture_id(body["weights"], body["scheme"], body["subject"])


def _check_weights(rows: Sequence[Sequence[Any]]) -> None:
    weights = [Fraction(numerator, denominator) for *_, numerator, denominator in rows]
    common_denominator(weights)  # before they are added, so that adding them takes no time
    if sum(weights) != 1:
        raise ValueError("its weights do not sum to 1")


def _of_evaluation(record: Record) -> str:
    return evaluation_id(*(record.body[key] for key in ("subject", "evalset", "protocol")))


def _of_protocol(record: Record) -> str:
    return Protocol.from_record(record.body).digest


def _body_digest(record: Record) -> str:
    return digest_of(record.body)


_IDENTITY: Mapping[str, Callable[[Record], Any]] = {
    "name": _of_statement,
    "removal": _of_statement,
    "run": _of_run,
    "partition": _of_partition,
    "evalset": _of_evalset,
    "contamination": _body_digest,
    "model": _of_model,
    "recipe": _of_recipe,
    "mixture": _of_mixture,
    "protocol": _of_protocol,
    "evaluation": _of_evaluation,
    "variant": lambda record: variant_id(record.body),
    "calibration": lambda _: None,  # its version is known to those who gather it
    "build": lambda record: build_id(record.body),
}
