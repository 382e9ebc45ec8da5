"""Pools of records alone: no model was trained and no text read, every number is made up.

They serve to look at many mixtures, at references, and at names that a pool pulled from elsewhere
may hold although poolreg itself would refuse to give them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from poolreg.canonical import sha256
from poolreg.evaluation.evaluate import note_subjects
from poolreg.evaluation.protocol import Protocol, evaluation_id
from poolreg.mixture import uniform
from poolreg.models.resolve import Resolver, Subject
from poolreg.store import records
from poolreg.store.journal import Record
from poolreg.store.registry import Registry

PROTOCOL = Protocol(max_length=16, tokenizer="t")
BYTES, TOKENS = 1000, 400


def digest(label: str) -> str:
    """Return a digest that stands for what is labelled so."""
    return sha256(label.encode())


def synthetic_pool(
    root: Path, partitions: Sequence[str], evalsets: Sequence[str], *, references: int = 0,
    budgets: Sequence[str] = ("same",), seed: str = "base", sizes: Sequence[int] | None = None,
) -> Registry:  # fmt: skip
    """Make a pool whose every union (or those of some sizes) is measured on every evalset.

    `references` unions, the largest first, have a model trained with each of the budgets.
    """
    registry = Registry.create(root)
    registry.record(*_data(partitions, evalsets), *_models(partitions, seed))
    subjects = _unions(registry, partitions, sizes)
    note_subjects(registry, subjects)
    values = _Values(partitions, evalsets)
    made = [records.keyed("protocol", PROTOCOL.digest, PROTOCOL.as_record())]
    made += values.rows(digest("seed"), [])
    for subject in subjects:
        made += values.rows(subject.digest, subject.partitions)
    for subject in [s for s in reversed(subjects) if len(s.components) > 1][:references]:
        for budget in budgets:
            made += _reference(subject, budget, values)
    registry.record(*made)
    registry.catalog.refresh()
    return registry


def _data(partitions: Sequence[str], evalsets: Sequence[str]) -> Iterator[Record]:
    for name in partitions:
        unit = {"digest": digest(f"unit {name}"), "documents": 1, "bytes": 10}
        body = {"content": digest(name), "documents": 1, "bytes": 10, "duplicates": 0}
        yield records.keyed("partition", digest(f"part {name}"), {**body, "units": [unit]})
        yield records.name("partition", name, digest(f"part {name}"))
    for name in evalsets:
        facts = {"object": digest(name), "content": digest(name), "documents": 2, "bytes": BYTES}
        yield records.keyed("evalset", digest(f"set {name}"), facts)
        yield records.name("evalset", name, digest(f"set {name}"))


def _models(partitions: Sequence[str], seed: str) -> Iterator[Record]:
    yield from _model("seed", "seed", tokens=1000)
    yield records.name("model", seed, digest("seed"))
    for name in partitions:
        units = [{"unit": digest(f"unit {name}"), "tokens": 100, "epochs": 1.0}]
        yield from _model(f"model {name}", "unit", seed=digest("seed"), units=units)


def _model(label: str, role: str, **facts: object) -> Iterator[Record]:
    body = {
        "model_type": "llama", "parameters": 1, "bytes": 4, "dtype": "F32", "tokenizer": "t",
        "context_length": 16, "vocab_size": 1, "trusted_code": False, "files": [], "tensors": [],
    }  # fmt: skip
    yield records.keyed("model", digest(label), body)
    run = {
        "model": digest(label), "role": role, "seed": None, "blend": None, "mixture": None,
        "scheme": None, "budget": None, "how": "trained", "tokens": 100, "steps": 10,
        "seconds": 2.0, "final_loss": 1.0, "recipe": None, "units": [],
    }  # fmt: skip
    yield records.fact("run", run | facts)


def _unions(
    registry: Registry, partitions: Sequence[str], sizes: Sequence[int] | None
) -> list[Subject]:
    resolver = Resolver(registry)
    return [
        resolver.mixture(uniform(names), seed=digest("seed"))
        for size in sizes or range(1, len(partitions) + 1)
        for names in combinations(sorted(partitions), size)
    ]


def _reference(subject: Subject, budget: str, values: _Values) -> Iterator[Record]:
    label = f"reference {subject.digest} {budget}"
    yield from _model(
        label, "reference", seed=digest("seed"), blend=subject.blend, mixture=subject.mixture,
        scheme="micro", budget=budget,
    )  # fmt: skip
    yield from values.rows(digest(label), subject.partitions, noise=0.02)


class _Values:
    """Bits per byte: each partition helps each evalset by an amount of its own, less in company."""

    def __init__(self, partitions: Sequence[str], evalsets: Sequence[str]) -> None:
        self.random = np.random.default_rng(7)
        self.place = {digest(f"part {name}"): n for n, name in enumerate(partitions)}
        self.evalsets = [digest(f"set {name}") for name in evalsets]
        self.gains = self.random.normal(0.1, 0.2, (len(partitions), len(evalsets)))
        self.start = self.random.uniform(2.0, 4.0, len(evalsets))

    def rows(
        self, subject: str, partitions: Sequence[str], *, noise: float = 0.0
    ) -> Iterator[Record]:
        """Yield the evaluations of a subject on all evalsets."""
        chosen = [self.place[name] for name in partitions]
        bits = self.start.copy()
        if chosen:
            bits -= self.gains[chosen].sum(axis=0) / len(chosen) ** 0.7
        bits += noise * self.random.standard_normal(len(bits))
        for evalset, value in zip(self.evalsets, bits.tolist(), strict=True):
            body = {
                "subject": subject, "evalset": evalset, "protocol": PROTOCOL.digest,
                "nll": value * BYTES * math.log(2), "tokens": TOKENS, "bytes": BYTES,
                "documents": 2, "seconds": 0.5, "device": "cpu", "document_scores": None,
                "token_scores": None,
            }  # fmt: skip
            yield records.keyed(
                "evaluation", evaluation_id(subject, evalset, PROTOCOL.digest), body
            )
