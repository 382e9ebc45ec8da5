"""Constraints on shares, from what a user writes to a region of the simplex.

A constraint that cannot be kept, alone or with others, is refused with the names of those that
clash, before anything is measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from poolreg.errors import UsageError
from poolreg.numerics.mixing import MOST_SUPPORTS
from poolreg.numerics.regions import Floats, Region, centre, scaled, supports
from poolreg.suggest import shares as points
from poolreg.suggest.shares import Field


@dataclass(frozen=True)
class Limits:
    """What a user asks of the shares.

    `minimum` and `maximum` bound single shares. With `max_epochs` E and `train_tokens` N no
    partition of n_k tokens is passed over more than E times: s_k ≤ E·n_k / N; `tokens` states
    n_k where it is not to be estimated. KL(s ‖ `near`) ≤ `kl` nats. At most `size` partitions.
    """

    minimum: Mapping[str, float] = field(default_factory=dict)
    maximum: Mapping[str, float] = field(default_factory=dict)
    max_epochs: float | None = None
    train_tokens: float | None = None
    tokens: Mapping[str, float] = field(default_factory=dict)
    near: str | None = None
    kl: float | None = None
    size: int | None = None


@dataclass(frozen=True, eq=False)
class Constrained:
    """The region, the constraints in words, and what is true of the pieces of a sized region."""

    region: Region
    words: tuple[str, ...]


def constrained(given: Field, limits: Limits, ratios: Mapping[str, tuple[int, int]]) -> Constrained:
    """Return the region of shares that limits allow; raises `UsageError` where none is left.

    `ratios` are bytes and tokens of the evalsets that were measured, by name: from them the
    tokens of a partition are estimated.
    """
    _check_alone(given, limits)
    count = len(given.names)
    lower, upper = np.zeros(count), np.ones(count)
    reasons = ["" for _ in given.names]
    for name, share in limits.minimum.items():
        lower[given.index(name)] = share
    for name, share in limits.maximum.items():
        upper[given.index(name)], reasons[given.index(name)] = share, f"--max {name}={share:g}"
    words = [f"{name} at least {share:g}" for name, share in limits.minimum.items()]
    words += [f"{name} at most {share:g}" for name, share in limits.maximum.items()]
    if limits.max_epochs is not None and limits.train_tokens is not None:
        available = _tokens(given, limits, ratios)
        for k, most in enumerate(limits.max_epochs * available / limits.train_tokens):
            if most < upper[k]:
                upper[k], reasons[k] = most, f"--max-epochs {limits.max_epochs:g}"
                words.append(f"{given.names[k]} at most {most:.3f}: {available[k]:,.0f} tokens")
        words.append(f"at most {limits.max_epochs:g} epochs in {limits.train_tokens:,.0f} tokens")
    near, radius = None, math.inf
    if limits.near is not None and limits.kl is not None:
        near, radius = points.as_floats(points.point(given, limits.near)), limits.kl
        words.append(f"within KL {radius:g} nats of {limits.near}")
    if limits.size is not None:
        words.append(f"at most {limits.size} partitions")
    region = Region(lower, upper, near, radius, limits.size)
    _check_together(given, limits, region, reasons)
    return Constrained(region, tuple(words))


def _check_alone(given: Field, limits: Limits) -> None:
    for flag, shares in (("--min", limits.minimum), ("--max", limits.maximum)):
        for name, share in shares.items():
            given.index(name)
            if not 0 <= share <= 1:
                raise UsageError(
                    f"{flag} {name}={share:g} is no share",
                    hint="shares go from 0 to 1: --max web=0.5",
                )
    pairs = (("--max-epochs", limits.max_epochs, "--train-tokens", limits.train_tokens),
             ("--near", limits.near, "--kl", limits.kl))  # fmt: skip
    for first, one, second, other in pairs:
        if (one is None) != (other is None):
            there, missing = (first, second) if other is None else (second, first)
            raise UsageError(f"{there} needs {missing}", hint=f"give {first} and {second} together")
    numbers = {"--max-epochs": limits.max_epochs, "--train-tokens": limits.train_tokens,
               "--kl": limits.kl, "--size": limits.size}  # fmt: skip
    numbers |= {f"--tokens {name}": value for name, value in limits.tokens.items()}
    for flag, value in numbers.items():
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"{flag} {value:g} must be above zero")
    for name in limits.tokens:
        given.index(name)


def _tokens(given: Field, limits: Limits, ratios: Mapping[str, tuple[int, int]]) -> Floats:
    """Return the tokens of each partition: stated, or its bytes over the bytes of a token."""
    whole = (sum(b for b, _ in ratios.values()), sum(t for _, t in ratios.values()))
    found = []
    for name, size in zip(given.names, given.bytes, strict=True):
        text, tokens = ratios.get(name, whole)
        if name in limits.tokens:
            found.append(limits.tokens[name])
        elif tokens:
            found.append(size * tokens / text)
        else:
            raise UsageError(
                f"how many tokens {name} has is not known: no evalset was measured yet",
                hint=f"say it: --tokens {name}=300M",
            )
    return np.array(found, dtype=np.float64)


def _check_together(given: Field, limits: Limits, region: Region, reasons: list[str]) -> None:
    lower, upper = region.lower, region.upper
    for k in np.flatnonzero(lower > upper + 1e-12).tolist():
        name = given.names[k]
        raise _clash(f"--min {name}={lower[k]:g} and {reasons[k]} (at most {upper[k]:.4g})")
    if lower.sum() > 1 + 1e-9:
        parts = ", ".join(f"{name}={share:g}" for name, share in limits.minimum.items())
        raise _clash(f"--min {parts} sum to {lower.sum():.4g}, more than 1")
    if upper.sum() < 1 - 1e-9:
        flags = sorted({"--max" if r.startswith("--max ") else r for r in reasons if r})
        raise _clash(f"the largest shares allowed ({', '.join(flags)}) sum to {upper.sum():.4g}")
    _check_ball(limits, region)
    _check_size(given, limits, region)


def _check_ball(limits: Limits, region: Region) -> None:
    if region.near is None:
        return
    nearest = scaled(region.near, region.lower, region.upper)
    least = math.inf if nearest is None else region.divergence(nearest)
    if least > region.radius + 1e-9:
        how = "none has a finite one" if math.isinf(least) else f"the least is {least:.4g}"
        raise _clash(
            f"--kl {region.radius:g} from {limits.near} and the bounds on shares: of the mixtures "
            f"within the bounds {how}"
        )


def _check_size(given: Field, limits: Limits, region: Region) -> None:
    if limits.size is None:
        return
    if limits.size != int(limits.size):
        raise UsageError(f"--size {limits.size:g} is no number of partitions")
    needed = [name for name, low in zip(given.names, region.lower, strict=True) if low > 0]
    if len(needed) > limits.size:
        raise _clash(f"--size {limits.size} and --min for {', '.join(needed)}")
    widest = np.argsort(-np.where(region.lower > 0, 2.0, region.upper), kind="stable")
    most = float(region.upper[widest[: limits.size]].sum())
    if most < 1 - 1e-9:
        raise _clash(
            f"--size {limits.size} and the largest shares allowed, which sum to {most:.4g}"
        )
    pieces = supports(region, MOST_SUPPORTS)
    if pieces == [] or (pieces is None and centre(region.within(_nearest(region))) is None):
        raise _clash(f"--size {limits.size} and --kl {region.radius:g} from {limits.near}")


def _nearest(region: Region) -> tuple[int, ...]:
    """Return the support of allowed size that a ball or bounds suit best, found greedily."""
    wanted = region.upper if region.near is None else region.near
    order = np.argsort(-np.where(region.lower > 0, 2.0, wanted), kind="stable")
    return tuple(sorted(order[: region.size].tolist()))


def _clash(what: str) -> UsageError:
    return UsageError(f"no mixture keeps these constraints: {what}", hint="loosen one of them")
