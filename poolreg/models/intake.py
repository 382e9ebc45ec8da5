"""What a user says of a model that was trained elsewhere, turned into a checked run."""

from __future__ import annotations

from fractions import Fraction

from poolreg.errors import UsageError
from poolreg.mixture import Atom, Mixture, mix
from poolreg.models.resolve import Resolver, seed_named
from poolreg.models.stored import Run
from poolreg.store.registry import Registry

ROLES = ("seed", "unit", "reference", "other")


def added_run(
    registry: Registry, role: str, *, partition: str | None = None, unit: int | None = None,
    mixture: str | None = None, scheme: str = "micro", budget: str | None = None,
    seed: str | None = None, tokens: int | None = None,
) -> Run:  # fmt: skip
    """Return the run of a model added with `role` seed, unit, reference or other.

    Raises `UsageError` for facts that are missing or do not go with the role, `NotFound` for
    unknown names.
    """
    if role not in ROLES:
        raise UsageError(f"unknown role {role!r}", hint=f"use one of {', '.join(ROLES)}")
    if (partition is not None) != (role == "unit") or (mixture is not None) != (
        role == "reference"
    ):
        raise UsageError(
            f"a {role} model cannot be described like this",
            hint="a unit model needs its partition, a reference its mixture, others neither",
        )
    if unit is not None and partition is None:
        raise UsageError("a unit number needs its partition", hint="add --partition NAME")
    if unit is not None and unit < 1:
        raise UsageError(f"there is no base unit {unit}", hint="base units are counted from 1")
    if role != "reference" and budget is not None:
        raise UsageError("only references have a budget", hint="leave --budget out")
    if budget not in (None, "sum", "same"):
        raise UsageError(f"unknown budget {budget!r}", hint="use sum or same")
    if role == "seed" and seed is not None:
        raise UsageError("a seed model is not trained from another seed", hint="leave --from out")
    if role in ("unit", "reference") and seed is None:
        raise UsageError(
            f"a {role} model needs the seed model that it was trained from",
            hint="add --from NAME; models from different seeds cannot be averaged",
        )
    resolver = Resolver(registry, scheme=scheme)
    start = seed_named(registry, seed) if seed else None
    if partition is not None:
        return _unit_run(resolver, partition, unit, start, tokens)
    if mixture is not None:
        return _reference_run(
            resolver,
            resolver.expression(mixture),
            scheme,
            budget=budget,
            start=start,
            tokens=tokens,
        )
    return Run(role=role, seed=start, tokens=tokens)


def _unit_run(
    resolver: Resolver, partition: str, unit: int | None, start: str | None, tokens: int | None
) -> Run:
    digest = resolver.registry.resolve("partition", partition)
    count = resolver.counts[digest]
    if unit is None and count > 1:
        raise UsageError(
            f"{partition} has {count} base units", hint=f"say which one: --unit 1 … --unit {count}"
        )
    name = next((n for n, d in resolver.partitions.items() if d == digest), partition)
    mixture = mix([(Atom(name, unit or 1), Fraction(1))])
    ((place, _),) = resolver.weights(mixture)
    return Run(
        role="unit", seed=start, units=((resolver.units[place], tokens, None),), tokens=tokens,
        blend=resolver.blend(mixture), mixture=str(mixture),
    )  # fmt: skip


def _reference_run(
    resolver: Resolver, mixture: Mixture, scheme: str, *, budget: str | None, start: str | None,
    tokens: int | None,
) -> Run:  # fmt: skip
    units = tuple((resolver.units[place], None, None) for place, _ in resolver.weights(mixture))
    return Run(
        role="reference", seed=start, units=units, tokens=tokens, blend=resolver.blend(mixture),
        mixture=str(mixture), scheme=scheme, budget=budget,
    )  # fmt: skip
