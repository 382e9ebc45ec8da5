"""Suggested weights as files: one mixture for a trainer, or all measured rows for other fitters.

`mix.yaml` and `mix.json` hold the best mixture that keeps the constraints, with what is known of
it. A folder gets `ratios.csv` and `metrics.csv`, joined by `run_id`, as allenai/olmix reads them:
one column a source with shares that sum to 1, one column a metric. Files appear whole or not at
all, and replace others only when told to.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from poolreg.decisions.measures import measured
from poolreg.errors import Conflict, NotFound, UsageError
from poolreg.files import storage_errors, write_atomic
from poolreg.suggest import shares as points
from poolreg.suggest.answer import Suggestion, Suggestions
from poolreg.suggest.request import SuggestPlan

ENDINGS = (".yaml", ".yml", ".json")
TABLES = ("ratios.csv", "metrics.csv")
_RESERVED = ("run_id", "run", "name")


def check_output(out: Path, *, force: bool = False) -> None:
    """Raise `Conflict` if writing to `out` would replace something, `UsageError` for its ending.

    Asked before a search, so that no work is lost.
    """
    if out.suffix and out.suffix.lower() not in ENDINGS and not out.is_dir():
        raise UsageError(
            f"{out.name} is neither a weights file nor a folder",
            hint="write mix.yaml or mix.json; a folder gets ratios.csv and metrics.csv",
        )
    targets = [out] if _is_file(out) else [out / name for name in TABLES]
    if not _is_file(out) and out.is_file():
        raise Conflict(f"{out} is a file", hint="choose a name that ends in .yaml or .json")
    for target in targets:
        if target.exists() and not force:
            raise Conflict(f"{target} is there already", hint="pass --force to replace it")


def write_output(
    out: Path, planned: SuggestPlan, found: Suggestions, *, force: bool = False
) -> None:
    """Write a weights file, or the pair of tables where `out` is a folder or has no ending."""
    check_output(out, force=force)
    with storage_errors(f"writing {out}"):
        out.parent.mkdir(parents=True, exist_ok=True)
    if not _is_file(out):
        _write_tables(out, planned)
        return
    facts = weights(found)
    text = (
        _yaml(facts)
        if out.suffix.lower() != ".json"
        else json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
    )
    write_atomic(out, text.encode("utf-8"))


def _is_file(out: Path) -> bool:
    return out.suffix.lower() in ENDINGS and not out.is_dir()


def weights(found: Suggestions) -> dict[str, Any]:
    """Return what a weights file holds; raises `NotFound` where no mixture was found."""

    best = found.best
    if best is None:
        raise NotFound("no mixture that keeps the constraints was found")
    baselines = {name: _brief(found.rows[rank - 1]) for name, rank in found.baselines.items()}
    return {
        "mixture": best.mixture,
        "scheme": "macro",
        "weights": dict(best.shares),
        "objective": found.objective,
        "constraints": list(found.constraints),
        **{key: value for key, value in _brief(best).items() if key != "mixture"},
        "interval_level": None if best.low is None else found.level,
        "source": best.source,
        "per_measure": dict(best.per_measure),
        "baselines": baselines,
        "evaluated": found.effort.evaluated,
        "pool": found.pool,
        "seed": found.seed,
        "made_by": "poolreg suggest",
    }


def _brief(row: Suggestion) -> dict[str, Any]:
    kept = ("mixture", "measured", "predicted", "low", "high")
    return {key: value for key, value in asdict(row).items() if key in kept}


def _yaml(facts: Mapping[str, Any], indent: str = "") -> str:
    """Write nested mappings as YAML; keys and values are JSON, which YAML contains."""
    lines = []
    for key, value in facts.items():
        name = json.dumps(key, ensure_ascii=False) if indent else key
        if isinstance(value, Mapping) and value:
            lines.append(f"{indent}{name}:\n{_yaml(value, indent + '  ')}")
        else:
            lines.append(f"{indent}{name}: {_scalar(value)}\n")
    return "".join(lines)


def _scalar(value: Any) -> str:
    """Return a value as JSON; exponents get the point that YAML 1.1 asks of a number."""
    text = json.dumps(value, ensure_ascii=False)
    if isinstance(value, float) and "e" in text and "." not in text:
        text = text.replace("e", ".0e")
    return text


def _write_tables(out: Path, planned: SuggestPlan) -> None:
    """Write every row that is measured on all measures of the objective, none at worst."""
    given, measures = planned.field, planned.measures
    known = points.known_averages(given)
    values = measured(
        given.registry, [row.subject for row in known], measures, planned.settings,
        run_missing=False,
    )  # fmt: skip
    ratios = [["run_id", "name", *(_column(name) for name in given.names)]]
    metrics = [["run_id", "name", *(_column(measure.name) for measure in measures)]]
    for row in known:
        keys = [(row.subject.digest, measure.digest) for measure in measures]
        if all(key in values for key in keys):
            start = [row.subject.digest[:12], row.subject.label]
            ratios.append([*start, *(repr(float(share)) for share in row.shares)])
            metrics.append([*start, *(repr(values[key]) for key in keys)])
    with storage_errors(f"writing {out}"):
        out.mkdir(exist_ok=True)
    for name, rows in zip(TABLES, (ratios, metrics), strict=True):
        write_atomic(out / name, _csv(rows).encode("utf-8"))


def _column(name: str) -> str:
    """Return a column's name; those that say which run it is are taken."""
    return f"{name}_" if name in _RESERVED else name


def _csv(rows: list[list[str]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()
