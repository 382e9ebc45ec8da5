"""Text of strangers in Markdown and YAML, and the parts that all cards are made of.

Whatever comes from a pool may come from strangers: every character that could be markup is written
as an entity, what cannot be printed is replaced, and metadata is written by a YAML library.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from poolreg.report import figures
from poolreg.report.facts import Row
from poolreg.schema import statements
from poolreg.store.registry import Registry

if TYPE_CHECKING:
    from huggingface_hub import CardData, EvalResult

MOST_LISTED = 200  # rows of a table

_LONGEST = 200  # letters of a name or an expression in a card
_MARKUP = re.compile(r"[\\`*{}\[\]<>#|!&~$@:]|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])|(?<=[wW]{3})\.")


def printable(text: str) -> str:
    """Return text on one line, with what cannot be printed replaced."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def plain(text: str) -> str:
    """Return printable text of bounded length."""
    shown = printable(text)
    return shown if len(shown) <= _LONGEST else shown[: _LONGEST - 1] + "…"


def markdown(text: str) -> str:
    """Return text for a paragraph, heading or table cell: nothing in it is markup or a link."""
    return _MARKUP.sub(lambda match: f"&#{ord(match[0])};", plain(text))


def code(digest: str) -> str:
    """Return a digest as a code span."""
    return f"`{re.sub('[^0-9A-Za-z]', '', digest)}`"


def shell(*words: str) -> str:
    """Return a command line for a fenced block."""
    return " ".join(shlex.quote(printable(word)) for word in words)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; cells are Markdown already, and all columns but the first are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def listed(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of bounded length."""
    shown = table(head, rows[:MOST_LISTED])
    left = len(rows) - MOST_LISTED
    return f"{shown}\n\n{left} more are not shown." if left > 0 else shown


def python(text: str) -> str:
    """Return text as a string of Python."""
    return json.dumps(printable(text), ensure_ascii=False)


def many(count: int, noun: str) -> str:
    """Return a count with its noun: 1 model, 2,000 models."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def size(count: int) -> str:
    """Return a number of bytes as people say it."""
    return figures.tokens(count) + ("B" if count >= 1000 else " B")


def card_text(data: CardData, parts: Iterable[str]) -> str:
    """Return a README.md of metadata and paragraphs."""
    body = "\n\n".join(part for part in parts if part)
    return f"---\n{data.to_yaml()}\n---\n\n{body}\n"


def run(registry: Registry, name: str, *parameters: Any) -> list[Row]:
    """Return the rows of a statement of schema/cards.sql."""
    registry.catalog.refresh()
    sql = statements("cards.sql")[name].sql
    return registry.catalog.sandbox(sql, parameters=parameters).dicts()


def eval_results(
    evalset: str, digest: str, *, values: Mapping[str, float], of: str
) -> list[EvalResult]:
    """Return entries of a model-index: `values` by metric, each metric's name followed by `of`.

    Evalsets are told apart by their digest.
    """
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-generation", task_name="Language modelling",
            dataset_type="poolreg-evalset", dataset_name=plain(evalset), dataset_revision=digest,
            metric_type=metric, metric_value=value,
            metric_name=plain(f"{metric.replace('_', ' ')}{of}"),
        )
        for metric, value in values.items()
    ]  # fmt: skip


def metrics(row: Row) -> dict[str, float]:
    """Return the values of a row of scores that a model-index holds."""
    return {name: row[name] for name in ("bits_per_byte", "perplexity")}
