"""The tables of the page: rows as they are shown, sorted, filtered and downloaded.

A table carries the SQL or the command that made it, so that a reader can go on from there. Very
long ones are cut, and say so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from poolreg.report.facts import Lens, Row, shown_sql

if TYPE_CHECKING:
    from poolreg.decisions.attribution import Contribution
    from poolreg.decisions.strata import TrustRow

MOST_ROWS = 1_000  # embedded in the page
SHOWN_ROWS = 50  # written out; the others appear on request
_LONG = 20  # letters
_DIGITS = 9  # of embedded numbers; more would only make the page larger
# Of the many columns of the proxy report those that fit on a page.
_TRUST = (
    "evalset", "budget", "kind", "stratum", "references", "pearson", "spearman", "spearman_low",
    "spearman_high", "decision_accuracy", "regret_1", "coverage", "withheld",
)  # fmt: skip


@dataclass(frozen=True)
class Column:
    """A column: its key, its title, decimals of its numbers (None: text), and its looks.

    `look` is "number", "long" for text that may be broken into lines, "hidden" for what only
    downloads have, or empty.
    """

    key: str
    title: str
    digits: int | None
    look: str


@dataclass(frozen=True)
class PageTable:
    """A table of the page. `total` counts all rows, of which `rows` are at most 1,000.

    Either `sql` or `command` made it; `command` gives all rows of a table that was cut.
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]
    total: int
    sql: str = ""
    command: str = ""
    lacking: str = ""

    @property
    def shown(self) -> list[list[tuple[str, str]]]:
        """The first rows as text, each cell with its looks."""
        return [
            [
                (written(value, column.digits), column.look)
                for value, column in zip(row, self.columns, strict=True)
                if column.look != "hidden"
            ]
            for row in self.rows[:SHOWN_ROWS]
        ]


def of_query(
    lens: Lens, name: str, title: str, rows: Sequence[Row], *, lacking: str, statement: str = ""
) -> PageTable:
    """Return the table of a statement of schema/report.sql."""
    visible = [{k: v for k, v in row.items() if k != "subject"} for row in rows]
    return _table(name, title, visible, lacking=lacking, sql=shown_sql(lens, statement or name))


def of_trust(rows: Sequence[TrustRow], on: Sequence[str], *, lacking: str) -> PageTable:
    """Return the table of the proxy report, of strata only those that say something."""
    found = [asdict(row) for row in rows if row.withheld is None or row.stratum == "all"]
    for row in found:
        row["evalset"] = row["evalset"] or f"mean of {row['evalsets']}"
        del row["evalsets"]
    made = _table("trust", "Trust in proxies", found, lacking=lacking,
                  command=_command("poolreg proxy report --memoised", on))  # fmt: skip
    columns = (
        column if column.key in _TRUST else replace(column, look="hidden")
        for column in made.columns
    )
    return replace(made, columns=tuple(columns))


def of_contributions(
    rows: Sequence[Contribution], on: Sequence[str], *, lacking: str
) -> PageTable:  # fmt: skip
    """Return the table of contributions."""
    return _table("contributions", "Contributions of partitions", [asdict(row) for row in rows],
                  lacking=lacking, command=_command("poolreg attribution", on))  # fmt: skip


def _command(base: str, on: Sequence[str]) -> str:
    chosen = f" --on {','.join(on)}" if on else ""
    return f"{base}{chosen} --format csv"


def _table(
    name: str, title: str, rows: Sequence[Row], *, lacking: str, sql: str = "", command: str = ""
) -> PageTable:  # fmt: skip
    cut = rows[:MOST_ROWS]
    columns = tuple(_column(key, cut) for key in (cut[0] if cut else ()))
    values = tuple(tuple(_plain(row[column.key]) for column in columns) for row in cut)
    return PageTable(name, title, columns, values, len(rows), sql, command, "" if cut else lacking)


def _column(key: str, rows: Sequence[Row]) -> Column:
    found = [row[key] for row in rows if row[key] is not None]
    digits = None
    if found and all(type(value) is int for value in found):
        digits = 0
    elif found and all(type(value) in (int, float) for value in found):
        digits = 2 if "perplexity" in key else 4
    look = "number" if digits is not None else ""
    if not look and any(len(str(value)) > _LONG for value in found):
        look = "long"
    return Column(key, key.replace("_", " "), digits, look)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)


def written(value: Any, digits: int | None) -> str:
    """Return a value as it stands in the table."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value) if digits is None else f"{value:z,.{digits}f}".replace("-", "−")


def embedded(tables: Sequence[PageTable]) -> str:
    """Return all rows as JSON that can stand in a script element, whatever the names are."""
    value = {
        table.name: {
            "columns": [asdict(column) for column in table.columns], "rows": table.rows,
            "total": table.total,
        }
        for table in tables if table.rows
    }  # fmt: skip
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text
