"""What a really trained model would score, predicted from proxies, with a 90% interval.

A proxy is off by more than noise: averages forget less than trained models, for one. So for each
evalset and budget a fit on the references, from [average, ensemble, mean of losses] to what the
reference scored, corrects it; the interval is the jackknife+ of `numerics.conformal`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from poolreg.decisions.ensemble import Floats
from poolreg.decisions.measures import Measure, measured, measures_named, only_seed
from poolreg.decisions.proxies import (
    AVERAGE,
    FEATURES,
    Blend,
    Blender,
    Proxies,
    ReferenceModel,
    gather,
    reference_models,
    stored,
)
from poolreg.errors import NotFound
from poolreg.evaluation.ask import Answer, Prediction
from poolreg.evaluation.evaluate import Settings
from poolreg.numerics.conformal import LEAST_REFERENCES, forecast, leverage
from poolreg.progress import SILENT, Progress
from poolreg.store.registry import Registry

_PENALTY = 1e-2  # of the leverage: directions in which references hardly differ count little


def predicted(
    registry: Registry, answers: Sequence[Answer], on: Sequence[str], *, scheme: str, seed: str,
    settings: Settings,
) -> list[Answer]:  # fmt: skip
    """Add to answers of a seed's mixtures what a trained model would score.

    The prediction rests on references that are measured already; nothing more is measured.
    """
    asked = {answer.mixture for answer in answers if answer.mixture}
    predictor = _Predictor.of(registry, seed, on, asked, scheme, settings)
    return [predictor.complete(answer) if answer.mixture else answer for answer in answers]


@dataclass
class _Predictor:
    """Fits for the evalsets of one question."""

    proxies: Proxies
    references: Sequence[ReferenceModel]
    blends: dict[str, Blend]
    measures: dict[str, Measure]

    @classmethod
    def of(
        cls, registry: Registry, seed: str, on: Sequence[str], asked: set[str], scheme: str,
        settings: Settings,
    ) -> _Predictor:  # fmt: skip
        blender = Blender(registry, seed)
        references = reference_models(registry, blender)
        blends = {text: blender.blend(text, scheme) for text in asked} if references else {}
        measures = measures_named(registry, on)
        proxies = gather(
            registry, list(blends.values()), references, measures, blender=blender,
            settings=settings, run_missing=False,
        )  # fmt: skip
        return cls(proxies, references, blends, {measure.name: measure for measure in measures})

    def complete(self, answer: Answer) -> Answer:
        """Add predictions, one a budget, or say what is missing for them."""
        if not self.references:
            return answer
        blend, measure = self.blends[str(answer.mixture)], self.measures[answer.evalset]
        if len(blend.models) == 1:  # the model of its one unit is what training on it gave
            return answer
        found: list[Prediction] = []
        most = 0
        for budget in sorted({r.budget for r in self.references}, key=str):
            # The mixture's own reference stands beside the prediction and is not part of it.
            others = [
                r for r in self.references
                if r.budget == budget and r.blend.digest != blend.digest
            ]  # fmt: skip
            used = [r for r in others if (r.model.digest, measure.digest) in self.proxies.values]
            most = max(most, len(used))
            if len(used) >= LEAST_REFERENCES:
                found += self._predict(blend, measure, used, budget)
        missing = None if found else _missing(most, len(self.references))
        return replace(answer, predictions=tuple(found), unpredicted=missing)

    def _predict(
        self, blend: Blend, measure: Measure, used: Sequence[ReferenceModel], budget: str | None
    ) -> Iterator[Prediction]:
        features, new = known_features(self.proxies, [r.blend for r in used], [blend], measure)
        if features.shape[1]:
            actual = [self.proxies.values[r.model.digest, measure.digest] for r in used]
            made = forecast(features, np.array(actual), new[0])
            yield Prediction(
                budget, made.value, made.low, made.high, made.level, made.references, made.fit
            )


def _missing(used: int, known: int) -> str:
    if known >= LEAST_REFERENCES > used:
        return (
            f"only {used} other references are measured here and {LEAST_REFERENCES} are needed: "
            "poolreg proxy report measures them"
        )
    return (
        f"{used} other references are measured here and {LEAST_REFERENCES} are needed: "
        "poolreg proxy next names the most useful one to train"
    )


def known_features(
    proxies: Proxies, references: Sequence[Blend], others: Sequence[Blend], measure: Measure
) -> tuple[Floats, Floats]:
    """Return the features of references and of other blends, those known for all of them.

    (references, p) and (others, p); the average comes first, p = 0 where it is not known.
    """
    every = [*references, *others]
    table = {k: np.array([proxies.predict(k, blend, measure) for blend in every]) for k in FEATURES}
    kept = [values for values in table.values() if np.isfinite(values).all()]
    if not np.isfinite(table[FEATURES[0]]).all():
        kept = []
    stacked = np.stack(kept, axis=1) if kept else np.empty((len(every), 0))
    return stacked[: len(references)], stacked[len(references) :]


# -- which reference would help most -----------------------------------------------------------


@dataclass(frozen=True)
class NextReference:
    """A mixture without a reference, and what one would tell.

    `leverage` is the mean over evalsets of h(x), how far the mixture lies from what the
    references show (None below 3 references); `disagreement` the mean over evalsets of the
    distance between the proxies' predictions, in standard deviations over the candidates.
    """

    mixture: str
    size: int
    leverage: float | None
    disagreement: float | None


def next_references(
    registry: Registry, on: Sequence[str] = (), *, seed: str | None = None,
    settings: Settings | None = None, budget: str | None = None, progress: Progress = SILENT,
) -> list[NextReference]:  # fmt: skip
    """Rank measured mixtures that have no reference by how much one would help, best first.

    By leverage on the forecast's features where 3 references or more are measured, else by how
    much the proxies disagree. Only the unit models are measured where they were not. Raises
    `NotFound` if no candidate is measured.
    """
    blender = Blender(registry, only_seed(registry, seed))
    trained = [r for r in reference_models(registry, blender) if budget in (None, r.budget)]
    taken = {reference.blend.digest for reference in trained}
    blends = [
        blend
        for row in registry.select("mixtures_of_seed", seed=blender.seed)
        if (blend := blender.known(row["mixture"])) and blend.digest not in taken
    ]
    # One unit's model is what training on it gives, there is nothing to predict.
    unique = list({blend.digest: blend for blend in blends if len(blend.models) > 1}.values())
    measures = measures_named(registry, on)
    settings = settings or Settings()
    units = sorted({model for blend in unique for model in blend.models})
    alone = [stored(model, blender.seed) for model in units]
    measured(registry, alone, measures, settings, run_missing=True, progress=progress)
    proxies = gather(
        registry, unique, trained, measures, blender=blender, settings=settings,
        run_missing=False,
    )  # fmt: skip
    candidates = [
        blend for blend in unique
        if all(np.isfinite(proxies.predict(AVERAGE, blend, measure)) for measure in measures)
    ]  # fmt: skip
    if not candidates:
        raise NotFound(
            "no mixture without a reference is measured on these evalsets",
            hint="measure candidates: poolreg sweep --subsets",
        )
    pulls, gaps = _usefulness(proxies, trained, candidates, measures)
    rows = [
        NextReference(blend.mixture, blend.size, _number(pull), _number(gap))
        for blend, pull, gap in zip(candidates, pulls, gaps, strict=True)
    ]
    return sorted(rows, key=lambda row: (-(row.leverage or 0.0), -(row.disagreement or 0.0)))


def _usefulness(
    proxies: Proxies, trained: Sequence[ReferenceModel], candidates: Sequence[Blend],
    measures: Sequence[Measure],
) -> tuple[Floats, Floats]:  # fmt: skip
    """Return leverage and disagreement of each candidate, means over the measures."""
    pulls, gaps = [], []
    for measure in measures:
        known = {
            r.blend.digest: r.blend for r in trained
            if np.isfinite(proxies.predict(AVERAGE, r.blend, measure))
        }  # fmt: skip
        features, new = known_features(proxies, list(known.values()), candidates, measure)
        if len(known) >= 3:
            pulls.append(leverage(features, new, _PENALTY))
        if new.shape[1] > 1:
            spread = new.std(axis=0)
            scaled = (new - new.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
            gaps.append(np.ptp(scaled, axis=1))
    nothing = np.full(len(candidates), np.nan)
    return (
        np.mean(pulls, axis=0) if pulls else nothing,
        np.mean(gaps, axis=0) if gaps else nothing,
    )


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
