"""How compressed variants and their plans are printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .output import Column, count, duration, fixed, message, short, size

if TYPE_CHECKING:
    from poolreg.compress.variants import Variant, VariantPlan
    from poolreg.pool import Pool
    from poolreg.progress import Progress

Row = dict[str, Any]

_PARTS = {"mlp": "MLP", "pairs": "q/k pairs", "passing": "q/k channels", "values": "values"}


def say_plan(label: str, plan: VariantPlan) -> None:
    """Tell what is kept of each layer: sizes, parameters, and the error that it will make."""
    before, after = plan.block_parameters
    message(
        f"plan for {label} at {plan.ratio:g}: {before - after:,} of {before:,} block parameters go "
        f"({plan.achieved:.1%}); whole model {size(plan.bytes[0])} -> {size(plan.bytes[1])}"
    )
    layers: dict[int, list[Any]] = {}
    for module in plan.modules:
        layers.setdefault(module.layer, []).append(module)
    for index, modules in layers.items():
        kept = "  ".join(f"{_PARTS[m.part]} {m.kept}/{m.size}" for m in modules)
        parameters = sum(m.kept_parameters for m in modules)
        errors = [m.error for m in modules]
        error = "" if None in errors else f"  error {sum(errors):.2g}"
        message(f"  layer {index:<3} {kept}  {parameters:,} parameters{error}")
    if plan.error is not None:
        message(f"  predicted error {plan.error:.3g} {plan.error_unit}")
    message(f"  {plan.calibration}")
    for note in plan.notes:
        message(f"note: {note}")


def plan_row(label: str, plan: VariantPlan) -> Row:
    """Return one plan as a row."""
    return {
        "subject": label, "variant": label, "ratio": plan.ratio, "achieved": plan.achieved,
        "block_parameters": plan.block_parameters[1], "parameters": plan.parameters[1],
        "bytes": plan.bytes[1], "digest": None,
        "calibrated_on": plan.calibrated_on, "predicted_error": plan.error,
        "modules": [asdict(module) for module in plan.modules],
    }  # fmt: skip


def variant_rows(
    pool: Pool, label: str, made: Sequence[Variant], *, on: Sequence[str], progress: Progress
) -> list[Row]:
    """Return the parent and its variants as rows, measured on evalsets."""
    first = made[0].plan
    parent: Row = {
        "subject": label, "variant": label, "ratio": 0.0, "achieved": 0.0,
        "block_parameters": first.block_parameters[0], "parameters": first.parameters[0],
        "bytes": first.bytes[0], "digest": made[0].parent, "new": False,
    }  # fmt: skip
    rows = [parent]
    for variant in made:
        rows.append(
            plan_row(label, variant.plan)
            | {"variant": variant.label, "digest": variant.digest, "bytes": variant.bytes,
               "shared_bytes": variant.shared_bytes, "seconds": variant.seconds,
               "logit_difference": variant.logit_difference, "new": variant.new}
        )  # fmt: skip
    if on:
        subjects = [label, *(variant.digest for variant in made)]
        answers = pool.evaluate(subjects, on=on, progress=progress)
        by_key = {(answer.subject, answer.evalset): answer for answer in answers}
        for row in rows:
            for name in on:
                row[f"perplexity on {name}"] = by_key[row["digest"], name].perplexity
                row[f"bits/byte on {name}"] = by_key[row["digest"], name].bits_per_byte
    keys = dict.fromkeys(key for row in rows for key in row)
    return [{key: row.get(key) for key in keys} for row in rows]


def columns(rows: Sequence[Row]) -> list[Column]:
    """Return the columns that rows of plans or variants have."""
    keys = rows[0].keys() if rows else ()
    shown = [
        Column("variant"), Column("digest", write=short),
        Column("achieved", "removed", lambda v: f"{v:.1%}"),
        Column("block_parameters", write=count), Column("parameters", write=count),
        Column("bytes", "size", size), Column("shared_bytes", "shared", size),
        Column("predicted_error", "predicted", _small), Column("seconds", "time", duration),
    ]  # fmt: skip
    shown += [Column(key, key, fixed(3)) for key in keys if key.startswith("perplexity on ")]
    return [column for column in shown if column.key in keys]


def _small(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def notes(rows: Sequence[Row], calibrated_on: str, evalsets: Sequence[str]) -> list[str]:
    """Return what has to be said below a table of variants."""
    said = []
    if rows and "shared_bytes" in rows[0]:
        said.append("shared: bytes of its files that the pool held already")
    if calibrated_on in evalsets:
        said.append(f"{calibrated_on} is the text calibrated on: its figures flatter the variants")
    return said
