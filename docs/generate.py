"""Write the pages that repeat what the code knows: cli.md, schema.md and errors.md.

python docs/generate.py            write them
python docs/generate.py --check    fail if one of them is not what the code says
"""

from __future__ import annotations

import inspect
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import click

import poolreg.errors
from poolreg import Pool
from poolreg.errors import PoolregError

DOCS = Path(__file__).parent
WIDTH = 80
NOTE = "<!-- Written by docs/generate.py; do not edit. -->\n"


def main() -> int:
    """Write or check the pages and return the exit code."""
    stale = [path.name for path, text in pages() if not path.is_file() or path.read_text() != text]
    if "--check" in sys.argv[1:]:
        for name in stale:
            print(f"docs/{name} is out of date: run python docs/generate.py")
        return bool(stale)
    for path, text in pages():
        path.write_text(text)
    print("wrote", ", ".join(stale) or "nothing new")
    return 0


def pages() -> Iterator[tuple[Path, str]]:
    """Yield each page's path and what it has to say."""
    yield DOCS / "cli.md", f"# Command line\n\n{NOTE}{cli_page()}"
    yield DOCS / "schema.md", f"# Tables and views\n\n{NOTE}{schema_page()}"
    yield DOCS / "errors.md", f"# Errors and exit codes\n\n{NOTE}{errors_page()}"


# -- the command line ------------------------------------------------------------------------


def cli_page() -> str:
    """Return the help of every command."""
    (entry,) = entry_points(group="console_scripts", name="poolreg")
    return "".join(
        f"\n{'#' * min(len(words) + 1, 3)} {' '.join(words)}\n\n```text\n{text}\n```\n"
        for words, text in helps(entry.load(), ["poolreg"])
    )


def helps(
    command: click.Command, words: list[str], parent: click.Context | None = None
) -> Iterator[tuple[list[str], str]]:
    """Yield the words of a command and of all below it with their help texts."""
    context = click.Context(
        command, info_name=words[-1], parent=parent, terminal_width=WIDTH, max_content_width=WIDTH,
        **({} if parent else command.context_settings),
    )  # fmt: skip
    yield words, "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            if below is not None:
                yield from helps(below, [*words, name], context)


# -- the catalog -----------------------------------------------------------------------------

OBJECTS = """
SELECT table_name AS name, 'Table' AS kind, comment FROM duckdb_tables()
WHERE database_name = 'pool'
UNION ALL
SELECT view_name, 'View', comment FROM duckdb_views()
WHERE database_name = 'pool' AND NOT internal
ORDER BY kind DESC, name
"""
COLUMNS = """
SELECT table_name, column_name, data_type, comment FROM duckdb_columns()
WHERE database_name = 'pool' AND NOT internal ORDER BY table_name, column_index
"""
MACROS = """
SELECT function_name, parameters, comment FROM duckdb_functions()
WHERE database_name = 'pool' AND NOT internal AND NOT starts_with(function_name, '_')
ORDER BY function_name
"""


def schema_page() -> str:
    """Return the tables, views, macros and named queries of a freshly built catalog."""
    with tempfile.TemporaryDirectory() as folder, Pool.create(Path(folder) / "pool") as pool:
        objects, columns = pool.sql(OBJECTS).dicts(), pool.sql(COLUMNS).dicts()
        macros = pool.sql(MACROS).dicts()
        queries = pool.queries()
    lines = [
        "\nWhat `poolreg sql` and `pool.sql()` see. The catalog is derived from the journal;",
        "views are made for reading and change less than tables.\n",
    ]
    for item in objects:
        lines += [f"\n## {item['name']}\n", f"{item['kind']}. {item['comment'] or ''}\n"]
        own = [column for column in columns if column["table_name"] == item["name"]]
        with_comments = any(column["comment"] for column in own)
        heads = ["column", "type", *([""] if with_comments else [])]
        lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for column in own:
            cells = [f"`{column['column_name']}`", column["data_type"]]
            cells += [column["comment"] or ""] if with_comments else []
            lines.append(f"| {' | '.join(map(_cell, cells))} |")
    lines += ["\n## Macros\n", "| macro | meaning |", "|---|---|"]
    for macro in macros:
        call = f"{macro['function_name']}({', '.join(macro['parameters'])})"
        lines.append(f"| `{call}` | {_cell(macro['comment'] or '')} |")
    lines += ["\n## Named queries\n", "Run with `poolreg query NAME`.\n"]
    for query in queries:
        lines += [f"### {query.name}\n", f"{query.description}\n", f"```sql\n{query.sql}\n```\n"]
    return "\n".join(lines).rstrip() + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


# -- the errors ------------------------------------------------------------------------------


def errors_page() -> str:
    """Return the tree of errors with their exit codes, and the other ways to end."""
    (entry,) = entry_points(group="console_scripts", name="poolreg")
    codes: dict[int, str] = sys.modules[entry.load().__module__].EXIT_CODES
    lines = [
        "\nAn error says what is wrong, then the way out. In Python each is a class of",
        "`poolreg.errors` with `message`, `hint` and `data`; the command line prints message and",
        "hint on stderr and ends with the exit code.\n",
        "| exit code | meaning |",
        "|---|---|",
        *(f"| {code} | {what} |" for code, what in codes.items()),
        "\nWith `POOLREG_DEBUG=1` an error that poolreg does not expect shows its traceback.\n",
        "| error | exit code | |",
        "|---|---|---|",
    ]
    for depth, error in tree(PoolregError):
        name = f"{'&emsp;' * depth}`{error.__name__}`"
        about = (inspect.getdoc(error) or "").splitlines()[0]
        lines.append(f"| {name} | {error.exit_code} | {_cell(about)} |")
    return "\n".join(lines) + "\n"


def tree(error: type[PoolregError], depth: int = 0) -> Iterator[tuple[int, Any]]:
    """Yield a class and its subclasses with their depth, in the order of the source."""
    yield depth, error
    here = [kind for kind in error.__subclasses__() if kind.__module__ == poolreg.errors.__name__]
    for kind in here:
        yield from tree(kind, depth + 1)


if __name__ == "__main__":
    sys.exit(main())
