"""poolreg merge: an exact average as a Hugging Face folder, from the pool or from folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from poolreg.errors import UsageError

from .names import complete
from .options import SCHEMES, byte_size, examples, pool_option, seed_option
from .output import many, message, size
from .progress import bar
from .publishing import push_options

if TYPE_CHECKING:
    from poolreg.models.folders import Merged
    from poolreg.pool import Pool


@click.command(
    epilog=examples(
        'poolreg merge "code+prose" -o merged',
        'poolreg merge "2*code+prose" -o merged --scheme macro --dtype bfloat16',
        "poolreg merge ./checkpoint-a ./checkpoint-b -o merged --weights 2,1",
        'poolreg merge "code+prose" --push you/code-and-prose',
        'poolreg merge "code+prose" --keep blend',
    )
)
@click.argument("sources", nargs=-1, required=True, metavar="EXPR|DIR...",
                shell_complete=complete("partition", "model"))  # fmt: skip
@click.option("-o", "--out", type=click.Path(path_type=Path), metavar="DIR",
              help="Where to; with --push it may be left out.")  # fmt: skip
@push_options
@click.option("--keep", metavar="NAME", help="Keep it in the pool instead, as model NAME.")
@click.option("--weights", metavar="W,W,...", help="Weights of folders: 2,1 (default: equal).")
@click.option("--dtype", help="Store as float32, bfloat16, float16 or float64 (default: as it is).")
@click.option(
    "--max-shard-size",
    "max_shard_bytes",
    type=byte_size,
    default="5GB",
    show_default=True,
    metavar="SIZE",
    help="Start a new file beyond this.",
)
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Default: all cores.")
@click.option(
    "--force", is_flag=True, help="Replace a model folder, or move a name, that is there."
)
@click.option(
    "--scheme",
    type=SCHEMES,
    default="micro",
    show_default=True,
    help="Weigh every base unit of EXPR equally (micro), or every partition (macro).",
)
@seed_option("--from", "--seed", help="Average the models of this seed, if there are several.")
@click.option("--trust-code", is_flag=True, help="Accept folders that run Python of their own.")
@pool_option
def merge(
    sources: tuple[str, ...], out: Path | None, push: str | None, private: bool, keep: str | None,
    weights: str | None, scheme: str, seed: str | None, trust_code: bool, folder: str | None,
    **options: Any,
) -> None:  # fmt: skip
    """Write an exact average to a folder or the Hub, or keep it.

    Averages the models of a mixture EXPR of the pool, or model folders DIR; any tool loads the
    result.
    Two or more arguments are model folders and need no pool. One argument is an expression;
    a single folder is written with a slash, as ./folder. The average is exact: computed in
    float64 and rounded once.
    """
    if [out is not None or push is not None, keep is not None].count(True) != 1:
        raise UsageError(
            "say where the average is to go", hint="give -o DIR or --push REPO, or --keep NAME"
        )
    if keep:
        _keep(folder, sources, keep, scheme=scheme, seed=seed, **options)
        return
    if push:
        options |= {"repo": push, "private": private}
    with bar() as progress:
        options["progress"] = progress
        if _are_folders(sources, folder is not None):
            shares = weights.split(",") if weights else None
            done = _folders(sources, out, weights=shares, trust_code=trust_code, **options)
        else:
            if weights:
                raise UsageError(
                    "--weights are for folders", hint="weigh names in the expression: 2*a+b"
                )
            from poolreg.pool import Pool

            with Pool.open(folder) as pool:
                done = _mixture(pool, sources[0], out, scheme=scheme, seed=seed, **options)
    merged, url = done
    place = f"wrote {out}" if out else f"pushed {push}"
    message(
        f"{place}: the average of {many(len(merged.parents), 'model')}, "
        f"{size(merged.bytes)} in {many(merged.files, 'file')} ({merged.digest[:12]})"
    )
    if url:
        message(f"published as {url}")


def _keep(
    folder: str | None, sources: tuple[str, ...], name: str, *, force: bool, **options: Any
) -> None:
    from poolreg.pool import Pool

    if len(sources) > 1:
        raise UsageError("--keep is for a mixture of the pool", hint='write one: "a+b"')
    with bar() as progress, Pool.open(folder) as pool:
        kept = pool.keep_merge(sources[0], name, replace=force, progress=progress, **options)
    message(f"kept as {kept.label}: {size(kept.bytes)} ({kept.digest[:12]})")


def _folders(
    folders: Sequence[str], out: Path | None, *, repo: str | None = None, **options: Any
) -> tuple[Merged, str]:
    if repo is not None:
        from poolreg.sharing.single import push_folders

        return push_folders(folders, repo, out=out, **options)
    from poolreg.models.folders import merge_folders

    return merge_folders(folders, out or "", **options), ""


def _mixture(
    pool: Pool, text: str, out: Path | None, *, scheme: str, seed: str | None,
    repo: str | None = None, **options: Any,
) -> tuple[Merged, str]:  # fmt: skip
    if repo is not None:
        from poolreg.sharing.single import push_merge

        subject = pool.resolve(text, scheme=scheme, seed=seed)
        return push_merge(pool.registry, subject, repo, out=out, **options)
    return pool.merge(text, out or "", scheme=scheme, seed=seed, **options), ""


def _are_folders(sources: tuple[str, ...], pool_given: bool) -> bool:
    """Tell whether the arguments are model folders; raises `UsageError` if one cannot tell."""
    strange = [source for source in sources if not Path(source).is_dir()]
    if len(sources) > 1 and strange:
        raise UsageError(
            f"{strange[0]!r} is not a folder",
            hint='several arguments are model folders; write a mixture as one: "a+b"',
        )
    if len(sources) > 1 and pool_given:
        raise UsageError("folders are merged without a pool", hint="leave --pool out")
    if len(sources) > 1:
        return True
    is_model = (Path(sources[0]) / "config.json").is_file()
    if is_model and not pool_given and not sources[0].startswith((".", "/", "~")):
        raise UsageError(
            f"{sources[0]!r} is a model folder here, and may be a name in the pool",
            hint=f"write ./{sources[0]} for the folder, or add --pool DIR for the pool",
        )
    return is_model and not pool_given
