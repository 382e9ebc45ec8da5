"""Base units: a partition's text cut into slices of near-equal bytes, one model trained on each."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from poolreg.errors import Drift, UsageError

SLICING = 1
"""Version of the rule by which `unit_documents` cuts; a new rule is a new number."""


@dataclass(frozen=True)
class UnitFacts:
    """One base unit: its content digest (as `Scan.content_digest`), documents and UTF-8 bytes."""

    digest: str
    documents: int
    bytes: int


def unit_documents(
    documents: Iterable[str], index: int, *, of: int, total_bytes: int
) -> Iterator[str]:
    """Yield the documents of base unit `index` (from 1) of `of`, in order, streaming.

    The rule (`SLICING` = 1). T is `total_bytes`, the UTF-8 bytes of all documents. The text is
    one stream of bytes that is cut after unit i (i < N) for the target t_i = floor(i·T/N):

    1. if a document ends at t_i, there;
    2. else, if the document around t_i has at most 1% of a unit's bytes (T/100N), at its end;
    3. else at the first line end (after a LF, or the end of the document) at or after t_i.

    So the rule looks at nothing but the text, N and T; each byte is in one unit; a unit's size
    differs from T/N by less than the longest line or 1% of a unit, whichever is more, and a
    byte of rounding; no line is ever cut. A part of a cut document is a document of its unit.

    Raises `UsageError` if a unit would be empty, `Drift` if the text is not `total_bytes` long
    (found only by reading to the end, that is, for the last unit).
    """
    if not 1 <= index <= of:
        raise UsageError(f"there is no unit {index} of {of}", hint=f"choose one of 1 to {of}")
    pieces = _cut(documents, of, total_bytes)
    ours = itertools.takewhile(lambda item: item[0] <= index, pieces)
    return (piece.decode() for unit, piece in ours if unit == index)


def unit_facts(documents: Iterable[str], *, of: int, total_bytes: int) -> tuple[UnitFacts, ...]:
    """Return what each of `of` base units holds; the rule and errors of `unit_documents`."""
    facts = []
    cut = _cut(documents, of, total_bytes)
    for _, pieces in itertools.groupby(cut, key=lambda item: item[0]):
        state, count, size = hashlib.sha256(), 0, 0
        for _, piece in pieces:
            state.update(hashlib.sha256(piece).digest())
            count += 1
            size += len(piece)
        facts.append(UnitFacts(state.hexdigest(), count, size))
    return tuple(facts)


def _cut(documents: Iterable[str], of: int, total: int) -> Iterator[tuple[int, bytes]]:
    if not 1 <= of <= total:
        raise UsageError(f"{total} bytes of text cannot be cut into {of} units")
    unit, target, position = 1, total // of, 0
    for document in documents:
        data = document.encode()
        short = len(data) * 100 * of <= total
        start = 0
        while start < len(data):
            last = start + target - position  # where the target stands in this document
            if unit == of or short or len(data) < last:
                stop = len(data)
            else:
                stop = data.find(b"\n", last - 1) + 1 or len(data)
            yield unit, data[start:stop]
            position += stop - start
            start = stop
            if unit < of and position >= target:
                unit, target = unit + 1, total * (unit + 1) // of
                _check_room(unit, of, target - position)
    if position != total:
        raise Drift(
            f"the text has {position} bytes where {total} were recorded",
            hint="the files changed since they were added; run `poolreg partition check`",
        )


def _check_room(unit: int, of: int, room: int) -> None:
    if room <= 0:
        raise UsageError(
            f"unit {unit} of {of} would be empty: the line before it is longer than a unit",
            hint="ask for fewer units; a line is never cut",
        )
