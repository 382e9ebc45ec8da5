"""Every way to predict what a mixture gives, beside what a really trained model gave.

The kinds of proxy:

    micro, macro   evaluation of the average of the unit models, under that scheme
    ensemble       mixture of the unit models' token probabilities, −log Σ λ_i p_i
    mean-loss      Σ λ_i L_i, the mean of the unit models' losses
    own-domain     minus the share of the data that is of the evalset's own domain
    natural        distance of the shares to those of the whole corpus: ½ Σ |s_k − natural_k|
    seed           the seed model's loss, the same for every mixture

The last four are nulls: they need no average, so an average has to beat them to be of use.
Values are those of `measures`: less is better, bits per byte for evalsets. The predictions of
`own-domain` and `natural` are no losses; they only rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from poolreg.decisions.ensemble import Floats, ensemble_loss, token_losses
from poolreg.decisions.measures import Measure, Values, measured, measures_named, protocol_of
from poolreg.errors import NotFound
from poolreg.evaluation.evaluate import Settings
from poolreg.mixture import Mixture
from poolreg.models.resolve import Resolver, Subject
from poolreg.progress import SILENT, Progress
from poolreg.store.registry import Registry

AVERAGES = ("micro", "macro", "ensemble")
NULLS = ("mean-loss", "own-domain", "natural", "seed")
KINDS = AVERAGES + NULLS
AVERAGE = "average"  # micro or macro, by the scheme of the blend itself
FEATURES = (AVERAGE, "ensemble", "mean-loss")  # what forecasts are fitted on, the average first


@dataclass(frozen=True)
class Blend:
    """A mixture with all that its proxies need: both averages, and its data as shares.

    `scheme` is that by which the data is meant to be mixed; `models` are the shares of the unit
    models by digest under it, `shares` those of the partitions by name.
    """

    mixture: str
    scheme: str
    averages: Mapping[str, Subject]  # scheme → average
    models: Mapping[str, float]
    shares: Mapping[str, float]
    digest: str

    @property
    def size(self) -> int:
        """Number of partitions."""
        return len(self.shares)


class Blender:
    """Turns mixtures into blends over the unit models of one seed."""

    def __init__(self, registry: Registry, seed: str) -> None:
        self.registry = registry
        self.seed = seed
        self.resolvers = {
            scheme: Resolver(registry, scheme=scheme) for scheme in ("micro", "macro")
        }
        names = self.resolvers["micro"].partitions
        self.names = {digest: name for name, digest in sorted(names.items(), reverse=True)}
        everything = self.resolvers["micro"].everything
        bytes_of = {
            name: registry.one("partition", digest=names[name])["bytes"] for name in everything
        }
        total = sum(bytes_of.values())
        self.natural = {name: size / total for name, size in bytes_of.items()}

    def blend(self, mixture: Mixture | str, scheme: str = "micro") -> Blend:
        """Return a mixture as a blend; raises `NotFound` for units without a model."""
        resolver = self.resolvers[scheme]
        mixed = resolver.expression(mixture) if isinstance(mixture, str) else mixture
        models: dict[str, float] = {}
        shares: dict[str, float] = {}
        trained = resolver.unit_models(self.seed)
        averages = {
            name: one.mixture(mixed, seed=self.seed) for name, one in self.resolvers.items()
        }
        for (partition, unit), weight in resolver.weights(mixed):
            model, name = trained[partition, unit]["model"], self.names[partition]
            models[model] = models.get(model, 0.0) + float(weight)
            shares[name] = shares.get(name, 0.0) + float(weight)
        return Blend(str(mixed), scheme, averages, models, shares, resolver.blend(mixed))

    def known(self, text: str, scheme: str = "micro") -> Blend | None:
        """Return a mixture as a blend; None if a partition, unit or unit model of it is gone."""
        try:
            return self.blend(text, scheme)
        except NotFound:
            return None

    def own_partition(self, measure: Measure) -> str | None:
        """Return the partition of an evalset's domain: of its name, or the start of its name."""
        parts = [
            name
            for name in self.natural
            if measure.name == name
            or (measure.name.startswith(name) and measure.name[len(name)] in "-_.")
        ]
        return max(parts, key=len, default=None)


@dataclass
class Proxies:
    """The predictions of blends on measures, from values that were measured."""

    registry: Registry
    blender: Blender
    protocol: str
    values: Values
    units: tuple[str, ...]  # unit models, in the order of the columns of `_losses`
    _losses: dict[str, Floats | None] = field(default_factory=dict)
    _bytes: dict[str, int] = field(default_factory=dict)

    def predict(self, kind: str, blend: Blend, measure: Measure) -> float:
        """Return what a kind of proxy predicts; NaN where it was not measured."""
        if kind == AVERAGE:
            kind = blend.scheme
        if kind in blend.averages:
            return self._value(blend.averages[kind].digest, measure)
        if kind == "ensemble":
            return self._ensemble(blend, measure)
        if kind == "mean-loss":
            losses = [w * self._value(model, measure) for model, w in blend.models.items()]
            return math.fsum(losses)
        if kind == "own-domain":
            own = self.blender.own_partition(measure)
            return math.nan if own is None else -blend.shares.get(own, 0.0)
        if kind == "natural":
            natural = self.blender.natural
            names = set(natural) | set(blend.shares)
            gaps = [abs(blend.shares.get(n, 0.0) - natural.get(n, 0.0)) for n in names]
            return math.fsum(gaps) / 2
        return self._value(self.blender.seed, measure)

    def _value(self, subject: str, measure: Measure) -> float:
        return self.values.get((subject, measure.digest), math.nan)

    def _ensemble(self, blend: Blend, measure: Measure) -> float:
        if measure.source != "evalset":
            return math.nan
        key = measure.digest
        if key not in self._losses:
            self._losses[key] = token_losses(self.registry, key, self.protocol, self.units)
            self._bytes[key] = self.registry.one("evalset", digest=key)["bytes"]
        losses = self._losses[key]
        if losses is None:
            return math.nan
        weights = np.array([blend.models.get(model, 0.0) for model in self.units])
        return ensemble_loss(losses, weights) / (math.log(2) * self._bytes[key])


@dataclass(frozen=True)
class ReferenceModel:
    """A model really trained on a blend."""

    blend: Blend
    model: Subject
    budget: str | None


def reference_models(registry: Registry, blender: Blender) -> list[ReferenceModel]:
    """Return the references of a seed that may validate proxies.

    Left out are those of mixtures that were proposed after looking at scores, those whose
    partitions or units have changed since, and those for which a unit model is missing: they
    have no proxy.
    """
    found = []
    for row in registry.select("reference_list", seed=blender.seed):
        blend = None if row["adaptive"] else blender.known(row["mixture"], row["scheme"] or "micro")
        if blend is not None and blend.digest == row["blend"]:
            model = stored(row["model"], blender.seed)
            found.append(ReferenceModel(blend, model, row["budget"]))
    return found


def stored(digest: str, seed: str) -> Subject:
    """Return a model of a seed as a subject, without looking up what is known of it."""
    return Subject(digest, digest[:12], "model", ((digest, Fraction(1)),), seed=seed)


def gather(
    registry: Registry, blends: Sequence[Blend], references: Sequence[ReferenceModel],
    measures: Sequence[Measure], *, blender: Blender, settings: Settings, run_missing: bool,
    progress: Progress = SILENT,
) -> Proxies:  # fmt: skip
    """Collect (and with `run_missing` measure) what the proxies of blends and references need."""
    every = [*blends, *(reference.blend for reference in references)]
    units = sorted({model for blend in every for model in blend.models})
    subjects = [stored(model, blender.seed) for model in (blender.seed, *units)]
    subjects += [subject for blend in every for subject in blend.averages.values()]
    subjects += [reference.model for reference in references]
    values = measured(
        registry, subjects, measures, settings, run_missing=run_missing, progress=progress
    )
    protocol = protocol_of(registry, blender.seed, settings).digest
    return Proxies(registry, blender, protocol, values, tuple(units))


@dataclass(frozen=True)
class Comparison:
    """Predictions beside the references of one measure and budget; arrays are over references."""

    measure: Measure
    budget: str | None
    own: str | None  # partition of the measure's own domain
    blends: tuple[Blend, ...]
    actual: Floats
    predicted: Mapping[str, Floats]  # by kind, only kinds known for all of the references

    @property
    def one_scheme(self) -> bool:
        """Whether micro and macro are the same averages for all of the references."""
        return all(len({s.digest for s in blend.averages.values()}) == 1 for blend in self.blends)

    def features(self) -> Floats:
        """Return what a forecast is fitted on, (references, up to 3), the average first."""
        return np.stack([self.predicted[k] for k in FEATURES if k in self.predicted], axis=1)


def compare(
    registry: Registry, on: Sequence[str] = (), *, seed: str, settings: Settings,
    run_missing: bool, progress: Progress = SILENT,
) -> list[Comparison]:  # fmt: skip
    """Return the predictions of each kind beside the references, for each measure and budget."""
    blender = Blender(registry, seed)
    references = reference_models(registry, blender)
    measures = measures_named(registry, on)
    proxies = gather(
        registry, [], references, measures, blender=blender, settings=settings,
        run_missing=run_missing, progress=progress,
    )  # fmt: skip
    budgets = sorted({reference.budget for reference in references}, key=str)
    return [
        _comparison(proxies, measure, budget, [r for r in references if r.budget == budget])
        for budget in budgets
        for measure in measures
    ]


def _comparison(
    proxies: Proxies, measure: Measure, budget: str | None, references: Sequence[ReferenceModel]
) -> Comparison:
    known = [r for r in references if (r.model.digest, measure.digest) in proxies.values]
    actual = [proxies.values[r.model.digest, measure.digest] for r in known]
    rows = {
        kind: np.array([proxies.predict(kind, r.blend, measure) for r in known])
        for kind in (*KINDS, AVERAGE)
    }
    return Comparison(
        measure, budget, proxies.blender.own_partition(measure), tuple(r.blend for r in known),
        np.array(actual), {k: v for k, v in rows.items() if len(v) and np.isfinite(v).all()},
    )  # fmt: skip
