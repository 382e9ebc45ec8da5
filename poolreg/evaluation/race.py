"""A sweep as a race: mixtures that are surely worse than the leader stop before the end.

The documents of each evalset are gone through in laps (`laps`). After each the mixtures are
compared with the leader, document by document (`poolreg.numerics.racing`), by the mean of their
bits per byte over the evalsets. Who is worse with the confidence asked for stops; who goes all the
way has an evaluation like any other. Laps are recorded on their own, so a killed race goes on
where it was, and nothing ever takes them for evaluations. Single models do not stop: ensembles
need their scores whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from poolreg.errors import UsageError
from poolreg.evaluation.evaluate import Key, measure, measuring_order, note_subjects, run
from poolreg.evaluation.laps import LAPS, covered, lap_documents, lap_id, race_order
from poolreg.evaluation.protocol import evaluation_id
from poolreg.evaluation.sweep import SweepPlan
from poolreg.models.resolve import Subject
from poolreg.numerics.racing import standing
from poolreg.progress import SILENT, Progress
from poolreg.store.records import Row
from poolreg.store.registry import Registry
from poolreg.tensors import read_array, read_header
from poolreg.text.partitions import evalset_documents

if TYPE_CHECKING:
    from poolreg.evaluation.measure import Measured

Arrays = dict[str, NDArray[Any]]  # nll, tokens and bytes of documents


@dataclass(frozen=True)
class Runner:
    """How one mixture fared, in bits per byte, the mean over the evalsets.

    `share` is the part of the documents that it was scored on: 1 for those that went all the way,
    whose `mean` and distance are exact. `behind` is how far it lies, or lay when it stopped, behind
    the leader; with the confidence of the race it is `at_least` so far.
    """

    subject: Subject
    share: float
    mean: float | None
    behind: float
    at_least: float

    @property
    def complete(self) -> bool:
        """Whether it was measured on everything."""
        return self.share == 1


@dataclass(frozen=True)
class Race:
    """How a race ended, the best first. `tokens` were scored, now or before; measuring every
    mixture on everything takes `whole`."""

    runners: tuple[Runner, ...]
    confidence: float
    tokens: int
    whole: int


def run_race(
    registry: Registry, planned: SweepPlan, *, confidence: float = 0.95,
    progress: Progress = SILENT,
) -> Race:  # fmt: skip
    """Measure what a plan lacks, but stop mixtures that are surely worse than the leader.

    The best of all is among the stopped with a chance of at most 1 - `confidence`, as far as
    Student's t holds for the documents. Raises `UsageError` for mixtures of several families,
    which do not read the same tokens.
    """
    if not 0 < confidence < 1:
        raise UsageError(
            f"the confidence {confidence:g} is not between 0 and 1", hint="write 0.95 for 95%"
        )
    if len({protocol.digest for protocol in planned.work.protocols.values()}) > 1:
        raise UsageError(
            "these mixtures are read by different tokenizers or windows, so they cannot race",
            hint="race those of one seed model: --from SEED",
        )
    note_subjects(registry, planned.subjects)
    singles = tuple(item for item in planned.work.missing if len(item[0].components) == 1)
    run(registry, replace(planned.work, missing=singles), planned.settings, progress=progress)
    return _Race(registry, planned, confidence, progress).run()


class _Race:
    """The state of a race: what each mixture scored so far, in the order of the race."""

    def __init__(
        self, registry: Registry, planned: SweepPlan, confidence: float, progress: Progress
    ) -> None:
        self.registry, self.planned, self.progress = registry, planned, progress
        self.confidence = confidence
        (self.protocol,) = {protocol.digest for protocol in planned.work.protocols.values()}
        self.sizes = {evalset: self._sizes(evalset) for evalset in planned.evalsets}
        self.scores: dict[Key, Arrays] = {}
        self.seconds: dict[Key, float] = {}
        self.device = ""
        self.whole: set[Key] = set()  # with an evaluation

    def run(self) -> Race:
        subjects = list({subject.digest: subject for subject in self.planned.subjects}.values())
        self._recall(subjects)
        running, stopped = subjects, []
        for lap in range(LAPS):
            self._score(running, lap)
            runners = self._runners(running, lap, rivals=len(subjects) - 1)
            if lap < LAPS - 1:
                slow = [runner for runner in runners if runner.at_least > 0 and runner.share < 1]
                stopped += slow
                gone = {runner.subject.digest for runner in slow}
                running = [subject for subject in running if subject.digest not in gone]
        self._complete(running)
        ended = sorted(runners, key=_behind) + sorted(stopped, key=_behind)
        tokens = sum(int(scored["tokens"].sum()) for scored in self.scores.values())
        alone = sum(int(self.scores[running[0].digest, e]["tokens"].sum()) for e in self.sizes)
        return Race(tuple(ended), self.confidence, tokens, alone * len(subjects))

    def _sizes(self, evalset: str) -> NDArray[np.float64]:
        """Return the UTF-8 bytes of an evalset's documents, in the order of the race."""
        documents = evalset_documents(self.registry, evalset)
        sizes = np.array([len(document.encode()) for document in documents], np.float64)
        return sizes[race_order(evalset, len(sizes))]

    def _recall(self, subjects: Sequence[Subject]) -> None:
        """Take what earlier evaluations say of whole evalsets."""
        keys = {
            evaluation_id(subject.digest, evalset, self.protocol): (subject.digest, evalset)
            for subject in subjects for evalset in self.sizes
        }  # fmt: skip
        for row in self.registry.select("evaluations", digests=list(keys)):
            if self.registry.objects.has(row["document_scores"]):
                key = keys[row["digest"]]
                order = race_order(key[1], len(self.sizes[key[1]]))
                scores = self._read(row["document_scores"])
                self.scores[key] = {name: values[order] for name, values in scores.items()}
                self.whole.add(key)

    def _score(self, running: Sequence[Subject], lap: int) -> None:
        """Have the documents of a lap scored by everyone in the race, but for what is known."""
        parts = {
            evalset: len(lap_documents(evalset, len(b), lap)) for evalset, b in self.sizes.items()
        }
        ids = {
            lap_id(subject.digest, evalset, self.protocol, lap): (subject.digest, evalset)
            for subject in running for evalset, count in parts.items()
            if count and (subject.digest, evalset) not in self.whole
        }  # fmt: skip
        wanted = set(ids.values()) - {ids[row["digest"]] for row in self._laps(ids)}
        missing = (
            (subject, tuple(evalset for evalset in parts if (subject.digest, evalset) in wanted))
            for subject in sorted(running, key=measuring_order)
        )
        stops = {evalset: covered(lap, len(sizes)) for evalset, sizes in self.sizes.items()}
        work = replace(
            self.planned.work, missing=tuple(item for item in missing if item[1]), lap=lap,
            evalset_bytes={
                evalset: int(self.sizes[evalset][stop - parts[evalset] : stop].sum())
                for evalset, stop in stops.items()
            },
        )  # fmt: skip
        for _ in measure(self.registry, work, self.planned.settings, progress=self.progress):
            pass  # it is recorded; what was scored before this race is read in the same way
        for row in self._laps(ids):
            key, fresh = ids[row["digest"]], self._read(row["document_scores"])
            if before := self.scores.get(key):
                fresh = {name: np.concatenate([before[name], fresh[name]]) for name in fresh}
            self.scores[key] = fresh
            self.seconds[key] = self.seconds.get(key, 0.0) + row["seconds"]
            self.device = row["device"]

    def _laps(self, ids: Mapping[str, Key]) -> list[Row]:
        """Return the recorded laps with these ids whose scores are here."""
        rows = self.registry.select("laps", digests=list(ids))
        return [row for row in rows if self.registry.objects.has(row["document_scores"])]

    def _read(self, digest: str) -> Arrays:
        path = self.registry.objects.existing(digest)
        return {n: np.array(read_array(path, i)) for n, i in read_header(path).tensors.items()}

    def _runners(self, running: Sequence[Subject], lap: int, *, rivals: int) -> list[Runner]:
        """Compare everyone in the race after a lap."""
        parts = []
        for evalset, sizes in self.sizes.items():
            count = covered(lap, len(sizes))
            scores = [self.scores[subject.digest, evalset]["nll"][:count] for subject in running]
            parts.append(np.stack(scores))
        now = standing(
            parts, list(self.sizes.values()),
            confidence=self.confidence, comparisons=rivals * (LAPS - 1),
        )  # fmt: skip
        return [
            Runner(subject, *self._mean(subject), behind=float(behind), at_least=float(at_least))
            for subject, behind, at_least in zip(running, now.behind, now.surely, strict=True)
        ]

    def _mean(self, subject: Subject) -> tuple[float, float | None]:
        """Return the share of the documents that were scored, and, of all, the mean score."""
        scores = [self.scores[subject.digest, evalset] for evalset in self.sizes]
        scored = sum(len(part["nll"]) for part in scores)
        if scored < (whole := sum(map(len, self.sizes.values()))):
            return scored / whole, None
        ratios = [math.fsum(part["nll"]) / float(part["bytes"].sum()) for part in scores]
        return 1.0, math.fsum(ratios) / math.log(2) / len(ratios)

    def _complete(self, ended: Sequence[Subject]) -> None:
        """Record the evaluations of those who went all the way."""
        lacking = [
            (subject.digest, evalset) for subject in ended for evalset in self.sizes
            if (subject.digest, evalset) not in self.whole
        ]  # fmt: skip
        if lacking:
            from poolreg.evaluation.recording import Recorder

            with Recorder(self.registry, self.planned.work.protocols) as recorder:
                for key in lacking:
                    recorder.add([self._evaluation(key)])

    def _evaluation(self, key: Key) -> Measured:
        """Return the laps of a mixture on an evalset, joined in the order of its documents."""
        from poolreg.evaluation.measure import Measured
        from poolreg.evaluation.scoring import Scores, document_scores

        subject, evalset = key
        order = np.argsort(race_order(evalset, len(self.sizes[evalset])))
        parts = {name: values[order] for name, values in self.scores[key].items()}
        scores = Scores(parts["nll"], parts["tokens"], parts["bytes"], np.empty(0, np.float32))
        return Measured(
            subject, evalset, scores.total_nll, scores.total_tokens, scores.total_bytes,
            len(order), self.seconds[key], self.device, document_scores(scores), None,
        )  # fmt: skip


def _behind(runner: Runner) -> float:
    return runner.behind
