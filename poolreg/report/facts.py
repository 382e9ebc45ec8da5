"""What a report shows, read from the catalog: rows that are comparable with each other.

Scores compare only within one seed model and one protocol. A `Lens` is that choice, made once for
the whole report: the pair under which most mixtures were measured, unless the user says otherwise.
The statements stand in schema/report.sql.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from poolreg.errors import NotFound
from poolreg.schema import statements
from poolreg.store.registry import Registry

Row = dict[str, Any]


@dataclass(frozen=True)
class Lens:
    """What is compared: one seed model, one protocol, and evalsets (digest → name).

    `evaluations` counts the mixtures' scores under it, `others` those under any other pair.
    """

    seed: str
    seed_label: str
    protocol: str
    max_length: int
    dtype: str
    evalsets: dict[str, str]
    evaluations: int
    others: int


@dataclass(frozen=True)
class Overview:
    """The pool's id, its number of evaluations, and when its last record was written (UTC)."""

    pool: str
    evaluations: int
    newest: str | None


def overview(registry: Registry) -> Overview:
    """Return what tells one state of a pool from another."""
    (row,) = _run(registry, "newest")
    identity = json.loads((registry.root / "FORMAT").read_text(encoding="utf-8"))["id"]
    newest = row["newest"]
    return Overview(identity, row["evaluations"], newest and f"{newest:%Y-%m-%d %H:%M} UTC")


def find_lens(registry: Registry, on: Sequence[str] = ()) -> Lens | None:
    """Return the seed and protocol with the most scores, or None where no mixture has any.

    `on` names evalsets (default: all that were measured); raises `NotFound` for an unknown one.
    """
    named = {registry.resolve("evalset", name): name for name in on}
    found = _run(registry, "lenses")
    if not found:
        return None
    first = found[0]
    rows = _run(registry, "measured", first["protocol"], first["seed"])
    measured = {row["digest"]: row["name"] for row in rows}
    if absent := [name for digest, name in named.items() if digest not in measured]:
        raise NotFound(
            f"no mixture was measured on {', '.join(absent)} yet",
            hint=f"measure them: poolreg sweep --subsets --on {','.join(absent)}",
        )
    return Lens(
        first["seed"], first["seed_label"], first["protocol"], first["max_length"], first["dtype"],
        {d: name for d, name in measured.items() if not named or d in named},
        first["evaluations"], sum(row["evaluations"] for row in found[1:]),
    )  # fmt: skip


def rows(registry: Registry, lens: Lens, name: str) -> list[Row]:
    """Return the rows of a statement of schema/report.sql under a lens."""
    return _run(registry, name, *_parameters(lens))


def weights(registry: Registry, subjects: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return subject → partition → weight."""
    found: dict[str, dict[str, float]] = {}
    if subjects:
        for row in _run(registry, "weights", list(subjects)):
            found.setdefault(row["subject"], {})[row["partition"]] = row["weight"]
    return found


def shown_sql(lens: Lens, name: str) -> str:
    """Return a statement with its parameters filled in, to be run with `poolreg sql`."""
    values = _parameters(lens)
    sql = statements("report.sql")[name].sql

    return re.sub(r"\$([0-9])", lambda match: _literal(values[int(match[1]) - 1]), sql)


def _literal(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    return "'" + str(value).replace("'", "''") + "'"


def _parameters(lens: Lens) -> tuple[Any, ...]:
    return lens.protocol, list(lens.evalsets), lens.seed


def _run(registry: Registry, name: str, *parameters: Any) -> list[Row]:
    sql = statements("report.sql")[name].sql
    used = max((int(number) for number in re.findall(r"\$([0-9])", sql)), default=0)
    registry.catalog.refresh()
    return registry.catalog.sandbox(sql, parameters=parameters[:used]).dicts()
