"""Options of commands that make a model and may publish it at once."""

from __future__ import annotations

import functools
from typing import Any

import click

from .options import Command


def push_options(command: Command) -> Command:
    """Add `--push REPO` and `--private`."""

    @functools.wraps(command)
    def wrapped(*args: Any, push: str | None, private: bool, **kwargs: Any) -> Any:
        if private and push is None:
            raise click.UsageError("--private says more about --push; give both")
        return command(*args, push=push, private=private, **kwargs)

    wrapped = click.option(
        "--private", is_flag=True, help="Make it private; a repository that is public is refused."
    )(wrapped)  # fmt: skip
    return click.option(
        "--push", metavar="REPO",
        help="Publish on the Hugging Face Hub, as you/name, with a card of lineage and scores.",
    )(wrapped)  # fmt: skip
