"""From what a user writes to what is measured: expressions to exact recipes over stored models.

A `Resolver` is a snapshot of the pool's names, base units and unit models; resolving thousands
of mixtures then needs no further look-up. The result names models by digest only, so an answer
stays right when names change.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from poolreg.canonical import digest_of
from poolreg.errors import NotFound, UsageError
from poolreg.mixture import METHOD, Atom, Mixture, common_denominator, parse, unit_weights
from poolreg.store import records
from poolreg.store.journal import Record
from poolreg.store.registry import Registry
from poolreg.text import partitions as data

Weights = tuple[tuple[str, Fraction], ...]

_DIGITS = re.compile(r"[0-9a-f]{6,64}")  # a digest or the beginning of one


@dataclass(frozen=True)
class Subject:
    """What is measured: a stored model, or an exact average of stored models.

    `digest` is the model's or the recipe's; `components` are the models with their exact
    weights, sorted by digest. A mixture also has its canonical expression, scheme and blend (the
    digest of the weights over base units, whatever models stand for them). `partitions` are the
    digests of those that it was trained on, or stands for.
    """

    digest: str
    label: str
    kind: str  # mixture or model
    components: Weights
    seed: str | None = None
    mixture: str | None = None
    scheme: str | None = None
    blend: str | None = None
    mixture_digest: str | None = None
    partitions: tuple[str, ...] = ()
    records: tuple[Record, ...] = ()

    @property
    def integer_weights(self) -> tuple[tuple[str, int], ...]:
        """The weights as whole numbers without a common factor, sorted by digest."""
        scale = common_denominator(weight for _, weight in self.components)
        return tuple((model, int(weight * scale)) for model, weight in self.components)


def recipe_id(components: Sequence[Sequence[Any]]) -> str:
    """Return the digest of an average: of sorted [model, numerator, denominator]."""
    return digest_of({"recipe": METHOD, "components": components})


def mixture_id(weights: Sequence[Sequence[Any]], scheme: str, subject: str) -> str:
    """Return the digest of a mixture: sorted [partition, unit, numerator, denominator] and more."""
    return digest_of({"mixture": 1, "weights": weights, "scheme": scheme, "subject": subject})


def seed_named(registry: Registry, name: str) -> str:
    """Return the digest of a seed model; raises `UsageError` for a model that is none."""
    digest = registry.resolve("model", name)
    if digest not in [row["digest"] for row in registry.select("seeds")]:
        raise UsageError(
            f"{name!r} is not a seed model",
            hint="if others were trained from it, add it as one: poolreg model add DIR --seed",
        )
    return digest


class Resolver:
    """A snapshot of one pool in which expressions are resolved."""

    def __init__(
        self, registry: Registry, *, scheme: str = "micro", seed: str | None = None
    ) -> None:
        self.registry = registry
        self.scheme = scheme
        self.partitions = registry.names("partition")
        self.models = registry.names("model")
        self.everything = data.everything(registry)
        self.groups = data.groups(registry)
        self.counts: dict[str, int] = {}
        self.units: dict[tuple[str, int], str] = {}
        for row in registry.select("units", partitions=list(self.partitions.values())):
            self.units[row["partition"], row["unit"]] = row["digest"]
            self.counts[row["partition"]] = max(self.counts.get(row["partition"], 0), row["unit"])
        self._seed = seed_named(registry, seed) if seed else None
        self._unit_models: dict[str, dict[tuple[str, int], dict[str, Any]]] = {}

    def subject(self, text: str) -> Subject:
        """Return the model named `text`, or the mixture that it expresses.

        Raises `MixtureError`, `NotFound` for an unknown name or a base unit without a model.
        """
        text = unicodedata.normalize("NFC", text.strip())
        if text in self.models:
            return self.model(self.models[text])
        if text not in self.partitions and text not in self.groups and _DIGITS.fullmatch(text):
            return self._by_digest(text)  # digits may spell what is no name, such as a number
        mixture = self.expression(text)
        unknown = [name for name in mixture.partitions if name not in self.partitions]
        if unknown == [text]:
            raise self._unknown(text)
        return self.mixture(mixture)

    def expression(self, text: str) -> Mixture:
        """Return the mixture that `text` expresses; names are not checked yet."""
        return parse(text, everything=self.everything, groups=self.groups)

    def _by_digest(self, text: str) -> Subject:
        try:
            return self.model(self.registry.resolve("model", text))
        except NotFound:
            raise self._unknown(text) from None

    def _unknown(self, text: str) -> NotFound:
        known = {**self.partitions, **self.models, **self.groups}
        return self.registry.unknown("partition or model", text, known)

    def stored(self, text: str) -> str:
        """Return the digest of the one stored model that `text` means; raises `NotFound`."""
        subject = self.subject(text)
        if len(subject.components) > 1:
            raise NotFound(
                f"{text!r} is a mixture, not one stored model",
                hint="write it to a folder with: poolreg merge EXPR -o DIR",
            )
        return subject.digest

    def model(self, digest: str) -> Subject:
        """Return a stored model as a subject."""
        row = self.registry.one("model_label", model=digest)
        seed = digest if row["role"] == "seed" else row["seed"]
        trained_on = self.registry.select("trained_on", model=digest)
        return Subject(
            digest, row["label"], "model", ((digest, Fraction(1)),), seed=seed,
            partitions=tuple(row["partition"] for row in trained_on),
        )  # fmt: skip

    def weights(self, mixture: Mixture) -> tuple[tuple[tuple[str, int], Fraction], ...]:
        """Return the exact weights of a mixture over ((partition digest, unit), weight)."""
        counts = {}
        for name in mixture.partitions:
            if name not in self.partitions:
                known = {**self.partitions, **self.groups}
                raise self.registry.unknown("partition", name, known)
            counts[name] = self.counts[self.partitions[name]]
        for atom, _ in mixture.weights:
            if atom.unit > counts[atom.partition]:
                raise NotFound(
                    f"{atom} does not exist: {atom.partition} has {counts[atom.partition]} units"
                )
        totals: dict[tuple[str, int], Fraction] = {}
        for atom, weight in unit_weights(mixture, counts, self.scheme):
            place = self.partitions[atom.partition], atom.unit
            totals[place] = totals.get(place, Fraction(0)) + weight  # it may have two names
        return tuple(totals.items())

    def blend(self, mixture: Mixture) -> str:
        """Return the digest of a mixture's weights over base units."""
        return self._blend(self.weights(mixture))

    def _blend(self, weights: Sequence[tuple[tuple[str, int], Fraction]]) -> str:
        rows = [[self.units[unit], w.numerator, w.denominator] for unit, w in weights]
        return digest_of(["blend", 1, sorted(rows)])

    def mixture(
        self, mixture: Mixture, *, seed: str | None = None, origin: str = "design"
    ) -> Subject:
        """Return the exact average that stands for a mixture, with the records that describe it.

        `seed` is the digest of the seed whose models are averaged (default: `seed_for`).
        """
        weights = self.weights(mixture)
        seed = self.seed_for([unit for unit, _ in weights], only=seed)
        models = self.unit_models(seed)
        totals: dict[str, Fraction] = {}
        for unit, weight in weights:
            model = models[unit]["model"]
            totals[model] = totals.get(model, Fraction(0)) + weight
        components = tuple(sorted(totals.items()))
        rows = [[model, w.numerator, w.denominator] for model, w in components]
        recipe = recipe_id(rows)
        subject = components[0][0] if len(components) == 1 else recipe
        scheme = "micro" if self._coincide(mixture) else self.scheme
        blend = self._blend(weights)
        named = [
            [self.partitions[atom.partition], atom.unit, w.numerator, w.denominator]
            for atom, w in mixture.weights
        ]
        digest = mixture_id(sorted(named), scheme, subject)
        tokens = [models[unit]["tokens"] for unit, _ in weights]
        body = {
            "mixture": str(mixture),
            "scheme": scheme,
            "seed": seed,
            "subject": subject,
            "blend": blend,
            "size": len(mixture.partitions),
            "unit_tokens": None if None in tokens else sum(tokens),
            "origin": origin,
            "weights": sorted(named),
        }
        made = [records.keyed("mixture", digest, body)]
        if len(components) > 1:  # first: where the mixture is known, its recipe is
            made.insert(0, records.keyed("recipe", recipe, {"components": rows}))
        return Subject(
            digest=subject, label=str(mixture), kind="mixture", components=components, seed=seed,
            mixture=str(mixture), scheme=scheme, blend=blend, mixture_digest=digest,
            partitions=tuple(self.partitions[name] for name in mixture.partitions),
            records=tuple(made),
        )  # fmt: skip

    def _coincide(self, mixture: Mixture) -> bool:
        """Tell whether micro and macro give the same weights, so that one label serves both."""
        counts = {
            a.partition: self.counts[self.partitions[a.partition]] for a, _ in mixture.weights
        }
        of_atoms = {1 if atom.unit else counts[atom.partition] for atom, _ in mixture.weights}
        if len(of_atoms) == 1:
            return True
        micro = unit_weights(mixture, counts, "micro")
        return micro == unit_weights(mixture, counts, "macro")

    def unit_models(self, seed: str) -> dict[tuple[str, int], dict[str, Any]]:
        """Return the latest model of each (partition, unit) that was trained from a seed."""
        if seed not in self._unit_models:
            rows = self.registry.select("unit_models", seed=seed)
            self._unit_models[seed] = {(row["partition"], row["unit"]): row for row in rows}
        return self._unit_models[seed]

    def seed_for(self, units: list[tuple[str, int]], *, only: str | None = None) -> str:
        """Return the seed whose unit models cover `units`; raises if none or several do."""
        seeds = [only] if only else self._seeds
        if not seeds:
            raise NotFound(
                "the pool has no seed model yet",
                hint="train one: poolreg train seed; or add one: poolreg model add DIR --seed",
            )
        covering = [s for s in seeds if all(unit in self.unit_models(s) for unit in units)]
        if len(covering) == 1:
            return covering[0]
        if covering:
            labels = ", ".join(self.model(seed).label for seed in covering)
            raise UsageError(
                f"several seed models have all the unit models needed: {labels}",
                hint="say which with --from NAME",
            )
        best = max(seeds, key=lambda s: sum(unit in self.unit_models(s) for unit in units))
        missing = next(unit for unit in units if unit not in self.unit_models(best))
        atom = Atom(next(n for n, d in self.partitions.items() if d == missing[0]), missing[1])
        label = self.model(best).label
        of_unit = f"{atom.partition}/{atom.unit}"
        if of_unit in [row["label"] for row in self.registry.select("removed")]:
            raise NotFound(
                f"the model {of_unit} was removed",
                hint=f"bring it back with: poolreg restore {of_unit}",
            )
        raise NotFound(
            f"no model of {atom} was trained from seed {label!r}",
            hint=f"train it: poolreg train unit {atom}; or add it: poolreg model add DIR "
            f"--partition {atom.partition} --unit {atom.unit} --from {label}",
        )

    @functools.cached_property
    def _seeds(self) -> list[str]:
        if self._seed:
            return [self._seed]
        return [row["digest"] for row in self.registry.select("seeds")]
