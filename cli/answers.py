"""How answers are printed: per evalset, beside the seed, everything, and references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .output import Column, count, fixed, many, short, show

if TYPE_CHECKING:
    from poolreg.evaluation.ask import Answer

_SHARED = "* {label} was trained on {documents} of the {all} of evalset {evalset}"


def show_answers(answers: Sequence[Answer], form: str, *, beside: bool) -> None:
    """Print answers; `beside` adds the differences to the seed and `all`, and references."""
    rows = [asdict(answer) for answer in answers]
    if form != "table":
        show(rows, form, names="label")
        return
    budgets = dict.fromkeys(r["budget"] for row in rows for r in row["references"])
    for row in rows:
        row["evalset"] += "*" if row["shared_documents"] else ""
        for budget in budgets:
            values = [r["bits_per_byte"] for r in row["references"] if r["budget"] == budget]
            row[f"reference {budget}"] = values[0] if values else None
        for made in row["predictions"]:
            interval = f"{made['value']:.4f} [{made['low']:.4f}, {made['high']:.4f}]"
            row[f"predicted {made['budget']}"] = interval
    show(rows, form, _columns(rows, beside, budgets), notes=_notes(answers, beside, budgets))


def _columns(
    rows: Sequence[dict[str, Any]], beside: bool, budgets: dict[str | None, Any]
) -> list[Column]:
    columns = [Column("label", "mixture" if beside else "subject")]
    if any(row["scheme"] == "macro" for row in rows):
        columns.append(Column("scheme"))
    if len({row["protocol"] for row in rows}) > 1:
        columns.append(Column("protocol", write=short))
    columns += [
        Column("evalset"),
        Column("perplexity", write=fixed(2)),
        Column("bits_per_byte", "bits/byte", fixed(4)),
    ]
    if beside:
        columns.append(Column("vs_seed", "vs seed", fixed(4, sign=True)))
        columns.append(Column("vs_all", "vs all", fixed(4, sign=True)))
    for budget in budgets:
        title = f"reference ({budget})" if budget else "reference"
        columns.append(Column(f"reference {budget}", title, fixed(4)))
    for key in dict.fromkeys(key for row in rows for key in row if key.startswith("predicted ")):
        for row in rows:
            row.setdefault(key, None)
        budget = key.removeprefix("predicted ")
        columns.append(Column(key, "predicted" if budget == "None" else f"predicted ({budget})"))
    if not beside:
        columns.append(Column("tokens", write=count))
    return [*columns, Column("memoised")]


def _notes(answers: Sequence[Answer], beside: bool, budgets: dict[str | None, Any]) -> list[str]:
    lengths = sorted({answer.max_length for answer in answers})
    windows = f"windows of {', '.join(map(str, lengths))} tokens"
    notes = [f"less is better; {windows}"]
    if beside:
        notes[0] += "; differences are in bits/byte"
    if budgets:
        notes[0] += "; a reference was really trained on the mixture"
    for level in sorted({made.level for answer in answers for made in answer.predictions}):
        notes.append(f"predicted: what a trained model would score, with a {level:.0%} interval")
    lacking = dict.fromkeys(answer.unpredicted for answer in answers if answer.unpredicted)
    notes += [f"no prediction on {_where(answers, reason)}: {reason}" for reason in lacking]
    for answer in answers:
        if answer.shared_documents:
            notes.append(
                _SHARED.format(
                    evalset=answer.evalset,
                    documents=count(answer.shared_documents),
                    all=many(answer.documents, "document"),
                    label=answer.label,
                )
            )
    return notes


def _where(answers: Sequence[Answer], reason: str) -> str:
    names = dict.fromkeys(answer.evalset for answer in answers if answer.unpredicted == reason)
    return ", ".join(names) if len(names) <= 3 else f"{len(names)} evalsets"
