"""The question poolreg exists for: what would training on this mixture give?

Each answer is the evaluation of an exact average, beside the seed model, the average of
everything, and models really trained on the mixture where the pool holds them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from poolreg.errors import NotFound, UsageError
from poolreg.evaluation.evaluate import Evaluation, Key, Settings, note_subjects, plan, run
from poolreg.models.resolve import Resolver, Subject
from poolreg.progress import SILENT, Progress
from poolreg.store.registry import Registry
from poolreg.text.corpus import shared_documents


@dataclass(frozen=True)
class Reference:
    """A model really trained on the mixture: its budget (sum or same) and its scores."""

    label: str
    budget: str | None
    perplexity: float
    bits_per_byte: float


@dataclass(frozen=True)
class Prediction:
    """What a model trained on the mixture with a budget would score, in bits per byte.

    `low` to `high` is an interval of the given `level`; see `poolreg.decisions.predict`.
    """

    budget: str | None
    value: float
    low: float
    high: float
    level: float
    references: int
    fit: str  # affine or ridge


@dataclass(frozen=True)
class Answer:
    """One subject on one evalset.

    `nll` is in nats; `vs_seed` and `vs_all` are differences in bits per byte (negative is
    better); `shared_documents` counts documents of the evalset that were trained on. `seed` is
    the seed model's digest. `unpredicted` says what is missing for a prediction where the pool
    has references, but too few.
    """

    label: str
    subject: str
    mixture: str | None
    scheme: str | None
    evalset: str
    protocol: str
    max_length: int
    nll: float
    tokens: int
    bytes: int
    documents: int
    perplexity: float
    bits_per_byte: float
    memoised: bool
    shared_documents: int = 0
    vs_seed: float | None = None
    vs_all: float | None = None
    references: tuple[Reference, ...] = ()
    seed: str | None = None
    predictions: tuple[Prediction, ...] = ()
    unpredicted: str | None = None


def evalsets_named(registry: Registry, on: Sequence[str]) -> dict[str, str]:
    """Return digest → name of the evalsets named, or of all; raises `NotFound`."""
    if on:
        return {registry.resolve("evalset", name): name for name in on}
    names = registry.names("evalset")
    if not names:
        raise NotFound("the pool has no evalsets yet", hint="poolreg evalset add NAME FILE…")
    # Of several names for one text the first in the alphabet is shown, as in the views.
    first = {digest: name for name, digest in sorted(names.items(), reverse=True)}
    return dict(sorted(first.items(), key=lambda item: item[1]))


def evaluate(
    registry: Registry, texts: Sequence[str], on: Sequence[str] = (), *, scheme: str = "micro",
    seed: str | None = None, settings: Settings | None = None, progress: Progress = SILENT,
) -> list[Answer]:  # fmt: skip
    """Measure models and mixtures on evalsets (all when none is named), memoised."""
    settings = settings or Settings()
    resolver = Resolver(registry, scheme=scheme, seed=seed)
    subjects = [resolver.subject(text) for text in texts]
    evalsets = evalsets_named(registry, on)
    work = plan(registry, subjects, list(evalsets), settings)
    found = run(registry, work, settings, progress=progress)
    note_subjects(registry, subjects)
    shared = _Shared.of(registry)
    return [
        _answer(subject, evalsets[digest], found[subject.digest, digest], shared, scheme)
        for subject in subjects
        for digest in evalsets
    ]


def ask(
    registry: Registry, texts: Sequence[str], on: Sequence[str] = (), *, scheme: str = "micro",
    seed: str | None = None, settings: Settings | None = None, progress: Progress = SILENT,
) -> list[Answer]:  # fmt: skip
    """Answer for each mixture and evalset, with the seed, `all` and references beside it."""
    settings = settings or Settings()
    resolver = Resolver(registry, scheme=scheme, seed=seed)
    subjects = [resolver.subject(text) for text in texts]
    evalsets = evalsets_named(registry, on)
    beside = [_Beside.of(registry, resolver, subject) for subject in subjects]
    wanted = [*subjects, *(other for group in beside for other in group.subjects)]
    work = plan(registry, wanted, list(evalsets), settings)
    found = run(registry, work, settings, progress=progress)
    note_subjects(registry, wanted)
    shared = _Shared.of(registry)
    return [
        group.complete(
            _answer(subject, name, found[subject.digest, digest], shared, scheme), digest, found
        )
        for subject, group in zip(subjects, beside, strict=True)
        for digest, name in evalsets.items()
    ]


def _answer(
    subject: Subject, evalset: str, row: Evaluation, shared: _Shared, scheme: str
) -> Answer:
    return Answer(
        label=subject.label, subject=subject.digest, mixture=subject.mixture,
        scheme=scheme if subject.mixture else None, evalset=evalset, protocol=row.protocol,
        max_length=row.max_length, nll=row.nll, tokens=row.tokens, bytes=row.bytes,
        documents=row.documents, perplexity=row.perplexity, bits_per_byte=row.bits_per_byte,
        memoised=row.memoised, seed=subject.seed,
        shared_documents=shared.count(row.evalset, subject.partitions),
    )  # fmt: skip


@dataclass(frozen=True)
class _Shared:
    """How many documents of an evalset also stand in partitions; from `counts` of each pair."""

    registry: Registry
    counts: Mapping[tuple[str, str], int]

    @classmethod
    def of(cls, registry: Registry) -> _Shared:
        rows = registry.select("contamination")
        return cls(registry, {(row["evalset"], row["partition"]): row["documents"] for row in rows})

    def count(self, evalset: str, partitions: Sequence[str]) -> int:
        """Return how many documents of an evalset stand in one or more of the partitions."""
        found = [partition for partition in partitions if self.counts.get((evalset, partition))]
        if len(found) < 2:
            return sum(self.counts[evalset, partition] for partition in found)
        # One document may stand in several of them; of those that were collected since only
        # counts are known, so there are at least so many.
        ours = self._content("evalset", evalset)
        theirs = [self._content("partition", partition) for partition in found]
        places = [shared_documents(ours, text) for text in theirs if ours and text]
        return max(
            len(set().union(*places)), *(self.counts[evalset, partition] for partition in found)
        )

    def _content(self, kind: str, digest: str) -> bytes | None:
        content = self.registry.one(kind, digest=digest)["content"]
        return self.registry.objects.read(content) if self.registry.objects.has(content) else None


@dataclass(frozen=True)
class _Beside:
    """What stands beside the answers of one subject."""

    seed: Subject | None
    everything: Subject | None
    references: tuple[tuple[Subject, str | None], ...]

    @classmethod
    def of(cls, registry: Registry, resolver: Resolver, subject: Subject) -> _Beside:
        if subject.seed is None:
            return cls(None, None, ())
        seed = resolver.model(subject.seed)
        try:
            everything = resolver.mixture(resolver.expression("all"), seed=subject.seed)
        except (NotFound, UsageError):
            everything = None  # some unit has no model yet: then there is no such average
        rows = []
        if subject.blend:
            rows = registry.select("references_of", blend=subject.blend, seed=subject.seed)
        references = tuple((resolver.model(row["model"]), row["budget"]) for row in rows)
        return cls(seed, everything, references)

    @property
    def subjects(self) -> Iterator[Subject]:
        yield from (s for s in (self.seed, self.everything) if s)
        yield from (model for model, _ in self.references)

    def complete(self, answer: Answer, evalset: str, found: Mapping[Key, Evaluation]) -> Answer:
        def gap(other: Subject | None) -> float | None:
            if other is None:
                return None
            return answer.bits_per_byte - found[other.digest, evalset].bits_per_byte

        rows = [(model, budget, found[model.digest, evalset]) for model, budget in self.references]
        references = tuple(
            Reference(model.label, budget, row.perplexity, row.bits_per_byte)
            for model, budget, row in rows
        )
        return replace(
            answer, vs_seed=gap(self.seed), vs_all=gap(self.everything), references=references
        )
