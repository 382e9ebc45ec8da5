"""Shares of partitions: named points, mixtures made of them, and the averages that stand for them.

Shares are weights under the scheme macro: the part of the training data that comes from each
partition. Every average of a pool that weighs the units of each partition alike has shares, so
what was measured for any reason serves the search.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from poolreg.errors import UsageError
from poolreg.mixture import Atom, Mixture, mix
from poolreg.models.resolve import Resolver, Subject
from poolreg.numerics.regions import Floats
from poolreg.store.registry import Registry, unknown_name

Shares = tuple[Fraction, ...]
POINTS = ("natural", "uniform", "stratified")


@dataclass(frozen=True)
class Field:
    """The partitions of a search, with the models of one seed that stand for their units."""

    resolver: Resolver
    seed: str
    names: tuple[str, ...]
    bytes: tuple[int, ...]  # of text, in each partition
    models: tuple[tuple[str, ...], ...]  # of the units of each partition

    @property
    def registry(self) -> Registry:
        """The pool."""
        return self.resolver.registry

    def mixture(self, shares: Iterable[Fraction | int]) -> Mixture:
        """Return the mixture with these shares, up to a common factor."""
        pairs = zip(self.names, shares, strict=True)
        return mix((Atom(name), Fraction(share)) for name, share in pairs)

    def shares(self, mixture: Mixture) -> Shares:
        """Return the shares that a mixture gives to the partitions; raises `UsageError`."""
        found = dict.fromkeys(self.names, Fraction(0))
        for atom, weight in mixture.weights:
            if atom.partition not in found:
                self._refuse(atom.partition)
            found[atom.partition] += weight
        return tuple(found.values())

    def _refuse(self, name: str) -> None:
        if name not in self.resolver.partitions:
            raise unknown_name("partition", name, self.resolver.partitions)
        raise UsageError(
            f"{name!r} is not among the partitions to choose from: {', '.join(self.names)}",
            hint="say which may be chosen with --among EXPR",
        )

    def index(self, name: str) -> int:
        """Return the place of a partition; raises `NotFound` or `UsageError`."""
        if name not in self.names:
            self._refuse(name)
        return self.names.index(name)

    def subject(self, mixture: Mixture, origin: str = "design") -> Subject:
        """Return the average that stands for a mixture."""
        return self.resolver.mixture(mixture, seed=self.seed, origin=origin)


def field(registry: Registry, among: str = "all", seed: str | None = None) -> Field:
    """Return the partitions that an expression names, which need a model of each unit."""
    resolver = Resolver(registry, scheme="macro", seed=seed)
    mixture = resolver.expression(among)
    if any(atom.unit for atom, _ in mixture.weights):
        raise UsageError(f"{among} names single base units", hint="name whole partitions")
    names = mixture.partitions
    resolver.weights(mixture)  # raises for unknown names
    digests = [resolver.partitions[name] for name in names]
    units = [[(digest, u + 1) for u in range(resolver.counts[digest])] for digest in digests]
    found = resolver.seed_for([unit for own in units for unit in own])
    models = resolver.unit_models(found)
    return Field(
        resolver, found, names,
        tuple(registry.one("partition", digest=digest)["bytes"] for digest in digests),
        tuple(tuple(models[unit]["model"] for unit in own) for own in units),
    )  # fmt: skip


def point(given: Field, text: str) -> Shares:
    """Return the shares of natural (by bytes of text), uniform, stratified, or an expression.

    Stratified gives every group the same share and divides it by bytes of text; a partition
    without a parent is a group of its own.
    """
    if text == "natural":
        return tuple(Fraction(size, sum(given.bytes)) for size in given.bytes)
    if text == "uniform":
        return tuple(Fraction(1, len(given.names)) for _ in given.names)
    if text == "stratified":
        return _stratified(given)
    return given.shares(given.resolver.expression(text))


def _stratified(given: Field) -> Shares:
    groups = [_group(given, name) for name in given.names]
    sizes: dict[str, int] = {}
    for group, size in zip(groups, given.bytes, strict=True):
        sizes[group] = sizes.get(group, 0) + size
    return tuple(
        Fraction(size, sizes[group] * len(sizes))
        for group, size in zip(groups, given.bytes, strict=True)
    )


def _group(given: Field, name: str) -> str:
    """Return the widest group that holds a partition, else the partition itself."""
    holding = [group for group, members in given.resolver.groups.items() if name in members]
    return max(holding, key=lambda group: len(given.resolver.groups[group]), default=name)


def as_floats(shares: Sequence[Fraction]) -> Floats:
    """Return shares as float64."""
    return np.array([float(share) for share in shares])


# -- averages that the pool knows ---------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """An average that was asked for before, and its shares."""

    subject: Subject
    shares: Shares


def known_averages(given: Field) -> list[Known]:
    """Return the known averages of whole partitions of the field, each once."""
    parts: dict[str, dict[str, Fraction]] = {}
    for row in given.registry.select("averages_of", seed=given.seed):
        weight = Fraction(row["numerator"], row["denominator"])
        parts.setdefault(row["subject"], {})[row["model"]] = weight
    for own in given.models:
        if len(own) == 1:  # measured as a model, it is the average of its partition all the same
            parts.setdefault(own[0], {own[0]: Fraction(1)})
    found = []
    for digest, weights in parts.items():
        shares = _shares_of(given, weights)
        if shares is not None:
            subject = given.subject(given.mixture(shares))
            if subject.digest == digest:
                found.append(Known(subject, shares))
    return found


def _shares_of(given: Field, weights: Mapping[str, Fraction]) -> Shares | None:
    """Return the shares behind weights of models, if they belong to the field."""
    shares = tuple(
        sum((weights.get(m, Fraction(0)) for m in own), Fraction(0)) for own in given.models
    )
    return shares if sum(shares) == 1 else None
