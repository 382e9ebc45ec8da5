"""Evaluation with a memo: what was measured once is never computed again.

An evaluation is identified by what was measured, the evalset and the protocol, all by content.
`plan` finds what the memo holds and what is missing without loading a model library; `run`
measures the missing part, recording each subject as soon as it is done, so that a kill loses
at most the subject in flight.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from poolreg.errors import Refused
from poolreg.evaluation.protocol import Protocol, default_max_length, evaluation_id
from poolreg.models.resolve import Subject
from poolreg.progress import SILENT, Progress
from poolreg.store import records
from poolreg.store.journal import Record
from poolreg.store.registry import Registry
from poolreg.text.partitions import evalset_documents
from poolreg.workers import run_jobs

if TYPE_CHECKING:
    from poolreg.evaluation.live import LiveModel
    from poolreg.evaluation.scoring import Scores, TokenisedSet


@dataclass(frozen=True)
class Settings:
    """How to evaluate. `max_length` and `dtype` are part of the protocol, the rest is not.

    `workers` processes share the subjects, with `threads` torch threads each (default: one with
    several workers, else torch's own choice).
    """

    max_length: int | None = None
    dtype: str = "float32"
    device: str = "auto"
    batch_tokens: int | None = None
    threads: int | None = None
    workers: int = 1


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
    """What is known and what has to be measured. `missing` is in the order of measuring."""

    known: Mapping[Key, Evaluation]
    missing: tuple[tuple[Subject, tuple[str, ...]], ...]
    protocols: Mapping[str, Protocol]  # by subject digest
    evalset_bytes: Mapping[str, int]

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
        known[subject.digest, evalset] = _evaluation(row, length, memoised=True)
    wanted = [
        (subject, tuple(e for e in evalsets if (subject.digest, e) not in known))
        for subject in unique
    ]
    # Neighbours share the beginning of their component lists: see `live`.
    wanted.sort(key=lambda item: (_family(item[0]), item[0].integer_weights))
    sizes = {e: registry.one("evalset", digest=e)["bytes"] for e in evalsets}
    missing = tuple((subject, sets) for subject, sets in wanted if sets)
    return Plan(known, missing, protocols, sizes)


def _family(subject: Subject) -> str:
    # Models with one seed were checked to be of one family when they were added.
    return subject.seed or subject.digest


def _protocols(
    registry: Registry, subjects: Sequence[Subject], settings: Settings
) -> dict[str, Protocol]:
    of_family: dict[str, Protocol] = {}
    found = {}
    for subject in subjects:
        family = _family(subject)
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


def _evaluation(row: Mapping[str, Any], max_length: int, *, memoised: bool) -> Evaluation:
    return Evaluation(
        row["subject"], row["evalset"], row["protocol"], max_length,
        row["nll"], row["tokens"], row["bytes"], row["documents"], memoised,
    )  # fmt: skip


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

    Raises `Incompatible`, `Refused` or `Damage` for models that cannot be averaged or loaded.
    """
    results = dict(work.known)
    if not work.missing:
        return results
    note_subjects(registry, [subject for subject, _ in work.missing])
    progress.start("evaluating", work.bytes, "bytes")
    if settings.workers <= 1:
        made = _measure(registry, work, settings, progress)
        return results | {(row.subject, row.evalset): row for row in made}
    parts = _split(work, settings.workers)
    alone = replace(settings, threads=settings.threads or 1)
    jobs = [(registry.root, part, alone) for part in parts]
    for made in run_jobs(_measure_in_worker, jobs, workers=settings.workers, progress=progress):
        results |= {(row.subject, row.evalset): row for row in made}
    return results


def _split(work: Plan, parts: int) -> list[Plan]:
    """Cut what is missing into runs of neighbours, so that each keeps its partial sums."""
    size = max(-(-len(work.missing) // parts), 1)
    starts = range(0, len(work.missing), size)
    return [replace(work, known={}, missing=work.missing[i : i + size]) for i in starts]


def _measure_in_worker(
    root: Path, work: Plan, settings: Settings, *, progress: Progress
) -> list[Evaluation]:
    registry = Registry.open(root)
    made = _measure(registry, work, settings, progress)
    registry.close()
    return made


def _measure(
    registry: Registry, work: Plan, settings: Settings, progress: Progress
) -> list[Evaluation]:
    worker = _Worker(registry, work, settings)
    made: list[Evaluation] = []
    with torch_threads(settings.threads):
        for subject, evalsets in work.missing:
            progress.note(subject.label)
            made += worker.measure(subject, evalsets, progress)
    return made


@contextlib.contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Let torch use so many threads in the block (None: as many as it does)."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass
class _Worker:
    """Measures subjects one after the other with one live model a family."""

    registry: Registry
    work: Plan
    settings: Settings
    live: dict[str, LiveModel] = field(default_factory=dict)
    texts: dict[tuple[str, str], TokenisedSet] = field(default_factory=dict)
    noted: set[str] = field(default_factory=set)  # protocols that are recorded

    def measure(
        self, subject: Subject, evalsets: Sequence[str], progress: Progress
    ) -> Iterator[Evaluation]:
        """Score one subject on several evalsets and record the results together."""
        protocol = self.work.protocols[subject.digest]
        live = self._live(subject)
        model = live.load(subject.integer_weights)
        device = str(model.device)
        measured = []
        for evalset in evalsets:
            tokens = self._tokens(subject, evalset, protocol)
            started = time.perf_counter()
            scores = self._score(model, tokens, evalset, progress)
            measured.append((evalset, scores, time.perf_counter() - started))
        with self.registry.writing():
            made = [
                self._record(subject, evalset, protocol, scores, seconds, device)
                for evalset, scores, seconds in measured
            ]
            if protocol.digest not in self.noted:
                made.insert(0, records.keyed("protocol", protocol.digest, protocol.as_record()))
                self.noted.add(protocol.digest)
            self.registry.record(*made)
        for record in made[-len(evalsets) :]:
            yield _evaluation(record.body, protocol.max_length, memoised=False)

    def _score(self, model: Any, tokens: TokenisedSet, evalset: str, progress: Progress) -> Scores:
        from poolreg.evaluation.scoring import score

        # The bar counts bytes, which are known before anything is tokenised.
        size, total = self.work.evalset_bytes[evalset], max(tokens.total_tokens, 1)
        done = shown = 0

        def advance(count: int) -> None:
            nonlocal done, shown
            done += count
            progress.advance(size * done // total - shown)
            shown = size * done // total

        return score(model, tokens, batch_tokens=self.settings.batch_tokens, progress=advance)

    def _live(self, subject: Subject) -> LiveModel:
        from poolreg.evaluation.live import LiveModel
        from poolreg.models.loading import pick_device

        family = _family(subject)
        if family not in self.live:
            self.live.clear()  # one family in memory at a time; the plan is sorted by family
            subjects = [s for s, _ in self.work.missing if _family(s) == family]
            members = sorted({model for s in subjects for model, _ in s.components})
            trusted = [self.registry.one("model", digest=m)["trusted_code"] for m in members]
            self.live[family] = LiveModel(
                self.registry, members, dtype=self.settings.dtype,
                device=pick_device(self.settings.device), trust_code=all(trusted),
            )  # fmt: skip
        return self.live[family]

    def _tokens(self, subject: Subject, evalset: str, protocol: Protocol) -> TokenisedSet:
        from poolreg.evaluation.scoring import tokenise
        from poolreg.models.stored import stored_folder

        key = (evalset, protocol.digest)
        if key not in self.texts:
            documents = evalset_documents(self.registry, evalset)
            first = subject.components[0][0]
            trusted = self.registry.one("model", digest=first)["trusted_code"]
            with stored_folder(self.registry, first) as folder:
                self.texts[key] = tokenise(documents, folder, protocol, trust_code=trusted)
        return self.texts[key]

    def _record(
        self, subject: Subject, evalset: str, protocol: Protocol, scores: Scores, seconds: float,
        device: str,
    ) -> Record:  # fmt: skip
        objects: dict[str, int] = {}
        sums = {"nll": ("F64", scores.nll), "tokens": ("I64", scores.tokens)}
        documents = self._put(sums | {"bytes": ("I64", scores.bytes)}, objects)
        single = len(subject.components) == 1
        tokens = self._put({"nll": ("F32", scores.token_nll)}, objects) if single else None
        body = {
            "subject": subject.digest,
            "evalset": evalset,
            "protocol": protocol.digest,
            "nll": scores.total_nll,
            "tokens": scores.total_tokens,
            "bytes": scores.total_bytes,
            "documents": len(scores.tokens),
            "seconds": seconds,
            "device": device,
            "document_scores": documents,
            "token_scores": tokens,
        }
        key = evaluation_id(subject.digest, evalset, protocol.digest)
        return records.keyed("evaluation", key, body, objects)

    def _put(self, arrays: Mapping[str, tuple[str, Any]], objects: dict[str, int]) -> str:
        from poolreg.tensors import encode

        return self.registry.put(encode(arrays), objects)
