"""poolreg model: checkpoints that are in the pool, or come into it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from . import tables
from .names import complete
from .options import BUDGETS, SCHEMES, examples, formatted, in_pool, seed_option
from .output import count, message, show_facts, size
from .output import show as show_rows
from .progress import bar

if TYPE_CHECKING:
    from poolreg.pool import Pool

_NAME = click.argument("name", shell_complete=complete("model"))


@click.group(
    epilog=examples(
        "poolreg model add checkpoints/base --name base --seed",
        "poolreg model add checkpoints/code --partition code --from base",
        "poolreg model ls",
    )
)
def model() -> None:
    """Add, list, inspect and export models."""


@model.command(
    "add",
    epilog=examples(
        "poolreg model add out/base --name base --seed",
        "poolreg model add out/code-2 --partition code --unit 2 --from base --tokens 2000000",
        'poolreg model add out/both --reference "code+prose" --budget same --from base',
        "poolreg model add gpt2 --name gpt2 --other",
    ),
)
@click.argument("directory", metavar="DIR", type=click.Path(file_okay=False))
@click.option("--name", help="What to call it (default: by what it was trained on).")
@click.option("--seed", "is_seed", is_flag=True, help="It is a seed: others start from it.")
@click.option(
    "--partition",
    metavar="NAME",
    shell_complete=complete("partition"),
    help="It is a unit model, trained on this partition.",
)
@click.option("--unit", type=click.IntRange(min=1), metavar="I", help="… on this base unit of it.")
@click.option(
    "--reference",
    metavar="EXPR",
    shell_complete=complete("partition"),
    help="It is a reference, really trained on this mixture.",
)
@click.option("--other", is_flag=True, help="It is none of these.")
@seed_option("--from", help="The seed model that its training started from.")
@click.option("--budget", type=BUDGETS, help="Tokens of a reference: as its units' sum, or as one.")
@click.option("--scheme", type=SCHEMES, default="micro", show_default=True, help="Of a reference.")
@click.option("--tokens", type=click.IntRange(min=0), metavar="N", help="Tokens it was trained on.")
@click.option(
    "--tokenizer",
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="Its tokenizer, if not in DIR.",
)
@click.option("--trust-code", is_flag=True, help="Accept a model that runs Python of its own.")
@click.option("--replace", is_flag=True, help="Move the name from another model to this one.")
@in_pool
def add(
    pool: Pool, directory: str, is_seed: bool, other: bool, reference: str | None, **facts: Any
) -> None:
    """Check the Hugging Face folder DIR strictly and store the model.

    Say what the model is: --seed, --partition, --reference or --other. Models can be averaged
    if they were trained from one seed and share its architecture and tokenizer.
    """
    given = {"seed": is_seed, "unit": facts["partition"], "reference": reference, "other": other}
    roles = [role for role, value in given.items() if value]
    if len(roles) != 1:
        raise click.UsageError(
            "say what the model is with one of --seed, --partition, --reference and --other"
        )
    with bar() as progress:
        added = pool.add_model(
            directory, role=roles[0], mixture=reference, progress=progress, **facts
        )
    verb = "added" if added.new else "already in the pool:"
    message(
        f"{verb} {added.role} model {added.label}: {count(added.parameters)} parameters, "
        f"{size(added.bytes)} ({added.digest[:12]})"
    )
    for note in added.notes:
        message(f"note: {note}")


@model.command("ls", epilog=examples("poolreg model ls", "poolreg model ls --format csv"))
@in_pool
@formatted
def ls(pool: Pool, form: str) -> None:
    """List the models."""
    show_rows(pool.models(), form, tables.MODELS)


@model.command("show", epilog=examples("poolreg model show base", "poolreg model show code/1"))
@_NAME
@in_pool
@formatted
def show(pool: Pool, name: str, form: str) -> None:
    """Show how the model NAME came to be, and its files."""
    show_facts(pool.model(name), form, {"runs": tables.RUNS, "files": tables.MODEL_FILES})


@model.command(
    "lineage", epilog=examples("poolreg model lineage base", 'poolreg model lineage "code+prose"')
)
@_NAME
@in_pool
@formatted
def lineage(pool: Pool, name: str, form: str) -> None:
    """Show what NAME was made from, and what was made from it."""
    show_rows(pool.lineage(name), form, tables.LINEAGE, names="child")


@model.command(
    "export",
    epilog=examples(
        "poolreg model export code/1 -o code-model",
        "poolreg model export code/1 --gguf -o code.gguf",
    ),
)
@_NAME
@click.option("-o", "--out", required=True, type=click.Path(), metavar="PATH", help="Where to.")
@click.option("--gguf", is_flag=True, help="Write one GGUF file for llama.cpp.")
@click.option("--force", is_flag=True, help="Replace a model folder or file that is there.")
@in_pool
def export(pool: Pool, name: str, out: str, gguf: bool, force: bool) -> None:
    """Copy the model NAME to a folder, or write it as GGUF.

    Files are copied byte for byte. A compressed variant also gets the code that loads it where
    poolreg is not installed.
    """
    write = pool.export_gguf if gguf else pool.export_model
    message(f"wrote {write(name, out, force=force)}")


@model.command("rm", epilog=examples("poolreg model rm gpt2"))
@_NAME
@in_pool
def rm(pool: Pool, name: str) -> None:
    """Take the model NAME out of the pool.

    What was measured stays, and adding it again restores it.
    """
    digest = pool.remove("model", name)
    message(f"removed model {name} ({digest[:12]})")
