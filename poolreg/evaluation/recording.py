"""Recording what was measured: objects first, then the records that name them.

A flush to the disk takes milliseconds, as long as a small model needs for a small text, so results
that come fast are recorded together, and those that took long at once. What is lost when the
process is killed is what it was at, and results that took a few seconds to measure.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from poolreg.evaluation.laps import lap_id
from poolreg.evaluation.protocol import Protocol, evaluation_id
from poolreg.store import records
from poolreg.store.journal import Record
from poolreg.store.registry import Registry
from poolreg.workers import at_once

if TYPE_CHECKING:
    from poolreg.evaluation.measure import Measured

PATIENCE = 1.0  # seconds after which the next result does not wait for others
COSTLY = 5.0  # seconds of measuring, in all, that may wait: the next result may be long in coming

_WRITERS = 8  # objects flushed at once: the file system makes one of such flushes


class Recorder:
    """Takes the results of one subject after the other; `protocols` are those of the subjects.

    Used as a context manager, it records what it has taken also when the block ends in an error.
    """

    def __init__(self, registry: Registry, protocols: Mapping[str, Protocol]) -> None:
        self._registry, self._protocols = registry, protocols
        self._waiting: list[Measured] = []
        self._noted: set[str] = set()  # protocols that are recorded
        self._flushed = time.monotonic()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.flush()

    def add(self, results: Sequence[Measured]) -> None:
        """Take the results of a subject; if there is reason not to wait, all are recorded now."""
        self._waiting += results
        costly = sum(row.seconds for row in self._waiting) >= COSTLY
        if costly or time.monotonic() - self._flushed >= PATIENCE:
            self.flush()

    def flush(self) -> None:
        """Record what was taken; returns when it is on the disk."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            used = {p.digest: p for p in (self._protocols[row.subject] for row in waiting)}
            new = [p for digest, p in used.items() if digest not in self._noted]
            with self._registry.writing():
                stored = self._store(waiting)
                self._registry.record(
                    *(records.keyed("protocol", p.digest, p.as_record()) for p in new),
                    *(self._record(row, stored) for row in waiting),
                )
            self._noted |= used.keys()
        self._flushed = time.monotonic()

    def _store(self, rows: Sequence[Measured]) -> dict[bytes, str]:
        """Store all objects and return their digests."""
        blobs = {row.document_scores for row in rows}
        blobs |= {row.token_scores for row in rows if row.token_scores is not None}
        stored: dict[bytes, str] = {}

        def store(blob: bytes, _: object) -> None:
            stored[blob] = self._registry.objects.put(blob)

        at_once(store, blobs, threads=_WRITERS, progress=lambda _: None)
        return stored

    def _record(self, measured: Measured, stored: Mapping[bytes, str]) -> Record:
        documents, tokens = measured.document_scores, measured.token_scores
        blobs = [documents] if tokens is None else [documents, tokens]
        objects = {stored[blob]: len(blob) for blob in blobs}
        protocol = self._protocols[measured.subject].digest
        body = {
            "subject": measured.subject,
            "evalset": measured.evalset,
            "protocol": protocol,
            "nll": measured.nll,
            "tokens": measured.tokens,
            "bytes": measured.utf8_bytes,
            "documents": measured.documents,
            "seconds": measured.seconds,
            "device": measured.device,
            "document_scores": stored[documents],
            "token_scores": None if tokens is None else stored[tokens],
        }
        what = (measured.subject, measured.evalset, protocol)
        if measured.lap is None:
            return records.keyed("evaluation", evaluation_id(*what), body, objects)
        body["lap"] = measured.lap
        return records.keyed("lap", lap_id(*what, measured.lap), body, objects)
