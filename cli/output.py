"""How results look: a table for people; JSON, CSV and bare names for programs.

Data goes to stdout, everything else to stderr. Text comes from files and users, so nothing that
is printed to a terminal carries control characters or markup. JSON holds no NaN: a value that is
not finite is null.
"""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

import click

FORMATS = ("table", "json", "csv", "quiet")
_WIDE = 100_000  # without a terminal nothing is folded

_NUMBERS = (int, float, Decimal, type(None))

Row = Mapping[str, Any]


# -- one value as text -----------------------------------------------------------------------


def text(value: Any) -> str:
    """Return any value in its plainest form."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%d %H:%M")
    if isinstance(value, (list, tuple, dict)):
        return json.dumps(plain(value), ensure_ascii=False)
    return str(value)


def count(value: int | None) -> str:
    """Return a whole number with thousands separated."""
    return "" if value is None else f"{value:,}"


def many(number: int, noun: str) -> str:
    """Return a number with its noun: 1 model, 2 models."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def size(value: float | None) -> str:
    """Return bytes in decimal units."""
    if value is None:
        return ""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.1f} TB"


def duration(value: float | None) -> str:
    """Return seconds as a person would say them."""
    if value is None:
        return ""
    if value < 60:
        return f"{value:.1f} s"
    if value < 3600:
        return f"{value / 60:.0f} min"
    return f"{value / 3600:.1f} h"


def fixed(digits: int, *, sign: bool = False) -> Callable[[float | None], str]:
    """Return a writer of numbers with so many decimals, and a sign for differences."""
    shape = f"{'+' if sign else ''},.{digits}f"
    return lambda value: "" if value is None else format(value, shape)


def short(value: str | None) -> str:
    """Return the beginning of a digest."""
    return (value or "")[:12]


def clean(value: str) -> str:
    """Return text with every character that a terminal would obey written as an escape."""
    if value.isprintable():
        return value
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value)


# -- to the terminal -------------------------------------------------------------------------


def message(what: str) -> None:
    """Tell the user something that is not the result, on stderr."""
    click.echo("\n".join(map(clean, what.split("\n"))), err=True)


def _emit(lines: str) -> None:
    """Write a result to stdout: exactly as it is, but harmless where a terminal shows it."""
    if sys.stdout.isatty():
        lines = "\n".join(map(clean, lines.split("\n")))
    click.echo(lines, color=True)  # click would take away what looks like a colour


@dataclass(frozen=True)
class Column:
    """One column of a table: the key in the rows, the title, how a value is written, and whether
    it is never folded, as numbers are not."""

    key: str
    title: str = ""
    write: Callable[[Any], str] = text
    whole: bool = False


def show(
    rows: Sequence[Row], form: str, columns: Sequence[Column] = (), *, names: str = "name",
    notes: Iterable[str] = (),
) -> None:  # fmt: skip
    """Print rows: `columns` (default: every key) as a table, or all keys as JSON or CSV.

    `names` is the key whose distinct values `quiet` prints; `notes` stand below a table.
    """
    if form == "json":
        _emit(to_json([plain(row) for row in rows]))
    elif form == "csv":
        _emit(_csv(rows, [column.key for column in columns]))
    elif form == "quiet":
        for value in dict.fromkeys(text(row[names]) for row in rows):
            _emit(value)
    elif rows:
        _table(rows, columns or [Column(key) for key in rows[0]])
        for note in notes:
            _emit(clean(note))
    else:
        message("nothing to show")


def show_facts(facts: Row, form: str, parts: Mapping[str, Sequence[Column]]) -> None:
    """Print one thing: its plain facts, then each of its lists named in `parts` as a table."""
    if form != "table":
        show([facts], form, names="digest")
        return
    single = {key: value for key, value in facts.items() if key not in parts}
    width = max(map(len, single), default=0)
    for key, value in single.items():
        if value is not None:
            shown = count(value) if type(value) is int else text(value)
            _emit(f"{key:<{width}}  {clean(shown)}")
    for key, columns in parts.items():
        if facts.get(key):
            _emit(f"\n{key}")
            _table(facts[key], columns)


def _table(rows: Sequence[Row], columns: Sequence[Column]) -> None:
    # Imported here: JSON, CSV and help do without it.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        number = all(type(row[column.key]) in _NUMBERS for row in rows)
        title = Text(clean(column.title or column.key.replace("_", " ")))
        table.add_column(
            title,
            justify="right" if number else "left",
            no_wrap=number or column.whole,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(Text(clean(column.write(row[column.key]))) for column in columns))
    console = Console(width=None if sys.stdout.isatty() else _WIDE, markup=False, highlight=False)
    with console.capture() as captured:
        console.print(table)
    click.echo("\n".join(line.rstrip() for line in captured.get().rstrip("\n").split("\n")))


# -- for programs ----------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Return a value as JSON knows it; numbers that are not finite become None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Decimal):
        return plain(float(value))
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    return value.hex() if isinstance(value, bytes) else str(value)


def to_json(value: Any) -> str:
    """Return readable JSON in which every unprintable character is escaped."""
    lines = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=2).split("\n")
    return "\n".join(
        line if line.isprintable()
        else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line)
        for line in lines
    )  # fmt: skip


def _csv(rows: Sequence[Row], keys: Sequence[str]) -> str:
    names = list(dict.fromkeys(key for row in rows for key in row)) or list(keys)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        values = (plain(row.get(name)) for name in names)
        writer.writerow(json.dumps(v) if type(v) in (bool, list, dict) else v for v in values)
    return file.getvalue().removesuffix("\n")


def records(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[dict[str, Any]]:
    """Return the rows of a query as dictionaries; a repeated column name gets a number."""
    names: list[str] = []
    for name in columns:
        numbered = (f"{name}_{n}" for n in range(2, len(columns) + 2))
        names.append(name if name not in names else next(n for n in numbered if n not in names))
    return [dict(zip(names, row, strict=True)) for row in rows]
