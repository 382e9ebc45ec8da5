"""poolreg push: publish what a repository or a URL lacks of the pool."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .options import REPO_TYPES, examples, formatted, in_pool
from .progress import bar
from .sharing import say_pushed, sent_options

if TYPE_CHECKING:
    from poolreg.pool import Pool


@click.command(
    epilog=examples(
        "poolreg push you/pool",
        "poolreg push you/pool --private --tag v1",
        "poolreg push you/results --repo-type dataset",
        "poolreg push you/pool --only code+prose --dry-run",
        "poolreg push s3://bucket/pool",
    )
)
@click.argument("place", required=False, metavar="[REPO|URL]")
@click.option(
    "--repo-type", type=REPO_TYPES,
    help="A dataset repository takes the results without weights.",
)  # fmt: skip
@click.option("--revision", metavar="BRANCH", help="Push to this branch; it is made if need be.")
@click.option("--tag", metavar="T", help="Give the commit a tag.")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@sent_options
@click.option("--dry-run", is_flag=True, help="Say what would be sent, and send nothing.")
@click.option(
    "--as", "origin", metavar="NAME",
    help="Said before names that mean something else there (default: pool-ID).",
)  # fmt: skip
@in_pool
@formatted
def push(pool: Pool, place: str | None, form: str, **options: Any) -> None:
    """Publish the pool on the Hugging Face Hub or at a URL.

    Sends only what is not there yet, as one commit that readers see whole. A new repository is
    public unless --private, and the text of evalsets is published. REPO is OWNER/NAME; a URL is
    file:///folder, s3://bucket/folder or whatever fsspec knows. Without either, the pool goes
    where it was last pushed to. Where somebody else gave a name to something else, yours is
    published beside it, as NAME/name. Paths of this machine and calibrations stay here, and what
    was removed here stays there where it is there already.
    """
    with bar() as progress:
        done = pool.push(place, progress=progress, **options)
    say_pushed(done, form, "would send" if options["dry_run"] else "sent")
