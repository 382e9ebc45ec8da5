"""Pools of very many evaluations, written in minutes: the records are sound, the numbers made up.

`add_evaluations` adds evaluations of subjects that nobody knows to a pool; `write_sweep` makes a
pool as a sweep over the unions of many partitions leaves it.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from poolreg.store.journal import Record, now
from poolreg.store.records import fact, keyed, name
from poolreg.store.registry import Registry

EVALSETS = [f"eval-{n}" for n in range(8)]
REFERENCES = 40

# The body of a model record that names no files.
MODEL = {
    "model_type": "m", "parameters": 1, "bytes": 1, "dtype": "F32", "tokenizer": None,
    "context_length": 1, "vocab_size": 1, "trusted_code": False, "files": [], "tensors": [],
}  # fmt: skip


def add_evaluations(
    root: Path, count: int, segments: int, *, evalset: str, protocol: str, objects: bool = True
) -> None:
    """Write evaluation records with their objects, without the flushes that a pool makes.

    Without `objects` they are missing, which indexing and look-ups do not notice.
    """
    for first in range(256 if objects else 0):
        (root / "objects" / f"{first:02x}").mkdir(exist_ok=True)

    def made(number: int) -> Record:
        record = evaluation(
            number, subject=digest(f"s{number // 7}"), evalset=evalset, protocol=protocol,
            nll=12345.678 + number,
        )  # fmt: skip
        for named in record.objects if objects else ():
            (root / "objects" / named[:2] / named[2:]).write_bytes(scores(number))
        return record

    _write(root, map(made, range(count)), math.ceil(count / segments))


def write_sweep(root: Path, count: int, segments: int) -> None:
    """Make a pool of all unions of some partitions with so many evaluations of them, and some
    models that were really trained on such unions."""
    Registry.create(root).close()
    partitions = math.ceil(math.log2(count / len(EVALSETS) + 1))
    unions = range(1, math.ceil(count / len(EVALSETS)) + 1)
    records = itertools.chain(
        _parts(partitions),
        itertools.chain.from_iterable(map(_mixture, unions)),
        _references(random.Random(0).sample(unions, min(REFERENCES, len(unions)))),
        itertools.islice(_scores(unions), count),
    )
    _write(root, records, math.ceil((count + 2 * len(unions)) / segments))


def _write(root: Path, records: Iterable[Record], size: int) -> None:
    """Write records to segments of so many."""
    lines = ((record if record.at else replace(record, at=now())).line() for record in records)
    for segment in itertools.count():
        here = list(itertools.islice(lines, size))
        if not here:
            return
        (root / "journal" / f"1-made-{segment:06}.jsonl").write_bytes(b"".join(here))


def digest(label: str) -> str:
    return hashlib.sha256(label.encode()).hexdigest()


def scores(number: int) -> bytes:
    """Return what stands for the scores of the documents."""
    return b"%020d" % number + bytes(80)


def evaluation(number: int, *, subject: str, evalset: str, protocol: str, nll: float) -> Record:
    data = scores(number)
    named = hashlib.sha256(data).hexdigest()
    body = {
        "subject": subject, "evalset": evalset, "protocol": protocol, "nll": nll, "tokens": 4000,
        "bytes": 15000, "documents": 12, "seconds": 0.4, "device": "cpu",
        "document_scores": named, "token_scores": None,
    }  # fmt: skip
    at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(1.75e9 + number % 10**8)) + ".000000Z"
    return Record("evaluation", digest(str(number)), body, {named: len(data)}, at)


# -- a sweep: a union is the number whose bits say which partitions are in it ----------------


def _members(union: int) -> list[int]:
    return [n for n in range(union.bit_length()) if union >> n & 1]


def _parts(partitions: int) -> Iterator[Record]:
    """Yield the seed, the evalsets, and the partitions with a unit and its model each."""
    yield from _model("base", "seed")
    protocol = {"max_length": 1024, "dtype": "float32", "prefix": "bos", "tokenizer": digest("t"),
                "version": 1, "window": "rolling"}  # fmt: skip
    yield keyed("protocol", digest("protocol"), protocol)
    for label in EVALSETS:
        body = {"object": digest(label), "content": digest(label), "documents": 12, "bytes": 15000}
        yield keyed("evalset", digest(label), body)
        yield name("evalset", label, digest(label))
    for number in range(partitions):
        unit = {"digest": digest(f"unit {number}"), "documents": 100, "bytes": 10**6}
        body = {"content": digest(f"part {number}"), "documents": 100, "bytes": 10**6,
                "duplicates": 0, "units": [unit]}  # fmt: skip
        yield keyed("partition", digest(f"part {number}"), body)
        yield name("partition", f"part-{number}", digest(f"part {number}"))
        trained = [{"unit": digest(f"unit {number}"), "tokens": 10**6, "epochs": 1.0}]
        yield from _model(f"model {number}", "unit", seed=digest("base"), units=trained)


def _model(label: str, role: str, **facts: Any) -> Iterator[Record]:
    body = {
        "model_type": "llama", "parameters": 10**6, "bytes": 4 * 10**6, "dtype": "F32",
        "tokenizer": digest("t"), "context_length": 1024, "vocab_size": 4096, "trusted_code": False,
        "files": [], "tensors": [],
    }  # fmt: skip
    yield keyed("model", digest(label), body)
    run = {
        "model": digest(label), "role": role, "seed": None, "blend": None, "mixture": None,
        "scheme": None, "budget": None, "how": "trained", "tokens": 10**6, "steps": 100,
        "seconds": 60.0, "final_loss": 3.0, "recipe": None, "units": [],
    }  # fmt: skip
    yield fact("run", run | facts)


def _subject(union: int) -> str:
    members = _members(union)
    return digest(f"model {members[0]}" if len(members) == 1 else f"union {union}")


def _label(union: int) -> str:
    return "+".join(f"part-{member}" for member in _members(union))


def _mixture(union: int) -> Iterator[Record]:
    """Yield the mixture of a union and its recipe."""
    members = _members(union)
    size = len(members)
    body = {
        "mixture": _label(union), "scheme": "micro", "seed": digest("base"),
        "subject": _subject(union), "blend": digest(f"blend {union}"), "size": size,
        "unit_tokens": size * 10**6, "origin": "design",
        "weights": [[digest(f"part {member}"), 0, 1, size] for member in members],
    }  # fmt: skip
    yield keyed("mixture", digest(f"mixture {union}"), body)
    if size > 1:
        components = [[digest(f"model {member}"), 1, size] for member in members]
        yield keyed("recipe", _subject(union), {"components": components})


def _references(unions: Iterable[int]) -> Iterator[Record]:
    """Yield models that were trained on unions, with their evaluations."""
    for union in unions:
        label = f"reference {union}"
        yield from _model(
            label, "reference", seed=digest("base"), blend=digest(f"blend {union}"),
            mixture=_label(union), scheme="micro", budget="sum",
        )  # fmt: skip
        for place, evalset in enumerate(EVALSETS):
            yield evaluation(
                -len(EVALSETS) * union - place, subject=digest(label), evalset=digest(evalset),
                protocol=digest("protocol"), nll=_nll(union, place),
            )  # fmt: skip


def _scores(unions: Iterable[int]) -> Iterator[Record]:
    for union in unions:
        for place, evalset in enumerate(EVALSETS):
            yield evaluation(
                len(EVALSETS) * union + place, subject=_subject(union), evalset=digest(evalset),
                protocol=digest("protocol"), nll=_nll(union, place),
            )  # fmt: skip


def _nll(union: int, evalset: int) -> float:
    """Return a sum that falls with each partition, most with the evalset's own."""
    own = union >> evalset & 1
    return 12000.0 - 100.0 * len(_members(union)) - 1000.0 * own + (union * 7919 % 1000) / 10
