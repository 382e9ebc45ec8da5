"""Evaluation with a memo: what was measured once is never computed again.

An evaluation is identified by what was measured, the evalset and the protocol, all by content.
`plan` finds what the memo holds and what is missing without loading a model library; `run` has
the missing part measured and records the results as they arrive, so that a kill loses little.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from poolreg.errors import Refused
from poolreg.evaluation.protocol import Protocol, default_max_length, evaluation_id
from poolreg.models.resolve import Subject
from poolreg.progress import SILENT, Progress
from poolreg.store.registry import Registry

if TYPE_CHECKING:
    from poolreg.evaluation.materials import Published
    from poolreg.evaluation.measure import Measured


@dataclass(frozen=True)
class Settings:
    """How to evaluate. `max_length` and `dtype` are part of the protocol, the rest is not.

    `workers` processes share the subjects, with `threads` torch threads each (default: one with
    several workers, else torch's own choice). `engine` is "local", or "ray" for a Ray cluster;
    there the default is as many workers as fit, and machines that do not see the pool's folder
    fetch its objects from where it is `published`.
    """

    max_length: int | None = None
    dtype: str = "float32"
    device: str = "auto"
    batch_tokens: int | None = None
    threads: int | None = None
    workers: int | None = None
    engine: str = "local"
    published: Published | None = None


@dataclass(frozen=True)
class Evaluation:
    """Measured sums of one subject on one evalset: nats, tokens, UTF-8 bytes, documents."""

    subject: str
    evalset: str
    protocol: str
    max_length: int
    nll: float
    tokens: int
    bytes: int
    documents: int
    memoised: bool

    @property
    def perplexity(self) -> float:
        """exp(nll / tokens); NaN without tokens, infinite beyond float64."""
        if not self.tokens:
            return math.nan
        return math.exp(loss) if (loss := self.nll / self.tokens) < 709.0 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """nll / (ln 2 · bytes); NaN without bytes."""
        return self.nll / (math.log(2) * self.bytes) if self.bytes else math.nan


Key = tuple[str, str]  # subject digest, evalset digest


@dataclass(frozen=True)
class Plan:
    """What is known and what has to be measured. `missing` is in the order of measuring.

    With a `lap`, what is missing is that lap of a race, and `evalset_bytes` are those of its part.
    """

    known: Mapping[Key, Evaluation]
    missing: tuple[tuple[Subject, tuple[str, ...]], ...]
    protocols: Mapping[str, Protocol]  # by subject digest
    evalset_bytes: Mapping[str, int]
    lap: int | None = None

    @property
    def evaluations(self) -> int:
        """Number of evaluations to do."""
        return sum(len(evalsets) for _, evalsets in self.missing)

    @property
    def bytes(self) -> int:
        """UTF-8 bytes to score."""
        return sum(self.evalset_bytes[e] for _, evalsets in self.missing for e in evalsets)


def plan(
    registry: Registry, subjects: Sequence[Subject], evalsets: Sequence[str], settings: Settings
) -> Plan:
    """Look up which evaluations of `subjects` on `evalsets` (digests) the memo holds.

    Raises `Refused` for a model without a tokenizer.
    """
    unique = list({subject.digest: subject for subject in subjects}.values())
    protocols = _protocols(registry, unique, settings)
    keys = {
        evaluation_id(subject.digest, evalset, protocols[subject.digest].digest): (subject, evalset)
        for subject in unique
        for evalset in evalsets
    }
    known = {}
    for row in registry.select("evaluations", digests=list(keys)):
        subject, evalset = keys[row["digest"]]
        length = protocols[subject.digest].max_length
        known[subject.digest, evalset] = Evaluation(
            row["subject"], row["evalset"], row["protocol"], length,
            row["nll"], row["tokens"], row["bytes"], row["documents"], memoised=True,
        )  # fmt: skip
    wanted = [
        (subject, tuple(e for e in evalsets if (subject.digest, e) not in known))
        for subject in sorted(unique, key=measuring_order)
    ]
    sizes = {e: registry.one("evalset", digest=e)["bytes"] for e in evalsets}
    missing = tuple((subject, sets) for subject, sets in wanted if sets)
    return Plan(known, missing, protocols, sizes)


def family_of(subject: Subject) -> str:
    """Return what is the same for subjects that one live model can take on."""
    # Models with one seed were checked to be of one family when they were added.
    return subject.seed or subject.digest


def measuring_order(subject: Subject) -> tuple[str, tuple[tuple[str, int], ...]]:
    """Return a sorting key that makes neighbours share the beginning of their component lists.

    It depends on content alone, so it is the same in every process.
    """
    return family_of(subject), subject.integer_weights


def _protocols(
    registry: Registry, subjects: Sequence[Subject], settings: Settings
) -> dict[str, Protocol]:
    of_family: dict[str, Protocol] = {}
    found = {}
    for subject in subjects:
        family = family_of(subject)
        if family not in of_family:
            row = registry.one("model", digest=subject.components[0][0])
            if not row["tokenizer"]:
                raise Refused(
                    f"{subject.label} was added without a tokenizer, so text cannot be scored",
                    hint="add it again with --tokenizer DIR",
                )
            length = settings.max_length or default_max_length(row["context_length"])
            of_family[family] = Protocol(length, row["tokenizer"], settings.dtype)
        found[subject.digest] = of_family[family]
    return found


def note_subjects(registry: Registry, subjects: Sequence[Subject]) -> None:
    """Record mixtures that are not in the pool yet, so that labels are there for their rows."""
    wanted = {s.mixture_digest: s for s in subjects if s.mixture_digest}
    known = {row["digest"] for row in registry.select("mixtures_known", digests=list(wanted))}
    new = [record for digest, s in wanted.items() if digest not in known for record in s.records]
    if new:
        with registry.writing():
            registry.record(*new)


def run(
    registry: Registry, work: Plan, settings: Settings, *, progress: Progress = SILENT
) -> dict[Key, Evaluation]:
    """Measure what a plan lacks and return all of its evaluations.

    Each subject is recorded, by this process, as soon as it is measured, wherever that was done.
    Raises `Incompatible`, `Refused` or `Damage` for models that cannot be averaged or loaded.
    """
    results = dict(work.known)
    for row in measure(registry, work, settings, progress=progress):
        protocol = work.protocols[row.subject]
        results[row.subject, row.evalset] = Evaluation(
            row.subject, row.evalset, protocol.digest, protocol.max_length,
            row.nll, row.tokens, row.utf8_bytes, row.documents, memoised=False,
        )  # fmt: skip
    return results


def measure(
    registry: Registry, work: Plan, settings: Settings, *, progress: Progress = SILENT
) -> Iterator[Measured]:
    """Measure what a plan lacks, record it as it arrives, and yield it.

    All of it is recorded once the iterator is at its end. Raises what `run` does.
    """
    if not work.missing:
        return
    from poolreg.evaluation.engines import measured
    from poolreg.evaluation.recording import Recorder

    note_subjects(registry, [subject for subject, _ in work.missing])
    what = "evaluating" if work.lap is None else f"lap {work.lap + 1}"
    progress.start(what, work.bytes, "bytes")
    with (
        Recorder(registry, work.protocols) as recorder,
        contextlib.closing(measured(registry, work, settings, progress)) as stream,
    ):
        for rows in stream:
            recorder.add(rows)
            yield from rows
