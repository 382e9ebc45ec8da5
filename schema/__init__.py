"""The catalog's schema as SQL files, and the named statements in them.

    tables.sql    tables, each column with a comment
    views.sql     what users query: scores, proxy_pairs, lineage, ledger
    macros.sql    perplexity, bits per byte and the like
    lookups.sql   named statements that the library itself uses
    queries.sql   named analysis queries for `poolreg query`
    report.sql    named statements behind the figures and tables of `poolreg report`

A named statement begins with a line `-- name: NAME`, followed by comment lines that describe
it, up to the next such line.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib.resources import files


@dataclass(frozen=True)
class Statement:
    """One named SQL statement and its description (the comment lines above it)."""

    name: str
    description: str
    sql: str


def script(file: str) -> str:
    """Return the text of one of the schema's .sql files."""
    return files(__package__).joinpath(file).read_text(encoding="utf-8")


@functools.cache
def statements(file: str) -> dict[str, Statement]:
    """Return the named statements of one .sql file, in file order."""
    found = {}
    for part in script(file).split("-- name: ")[1:]:
        name, _, rest = part.partition("\n")
        lines = rest.strip().splitlines()
        comments = [line for line in lines if line.startswith("--")]
        body = [line for line in lines if not line.startswith("--")]
        text = " ".join(line.lstrip("- ") for line in comments)
        found[name.strip()] = Statement(name.strip(), text, "\n".join(body).strip())
    return found
