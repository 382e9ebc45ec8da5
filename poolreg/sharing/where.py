"""What a user says of where a pool lies, and the place that it means."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from poolreg.errors import UsageError

if TYPE_CHECKING:
    from poolreg.sharing.places import Place

_OWNED = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)


def place_at(
    where: str, *, repo_type: str = "model", revision: str | None = None, private: bool = False
) -> Place:
    """Return the place that a repository name OWNER/NAME or a URL stands for.

    Raises `UsageError` for what can be neither, and for files and folders of this machine, which
    nobody should find published under their names.
    """
    if "://" in where:
        from poolreg.sharing.trees import TreePlace

        place = TreePlace(where)
        if revision or private or repo_type != "model":
            raise UsageError(
                f"{place.url} is no repository of the Hub",
                hint="revisions, tags, private and dataset repositories are the Hub's only",
            )
        return place
    _check_not_local(where)
    from poolreg.sharing.hub import HubPlace

    return HubPlace(where, repo_type=repo_type, revision=revision, private=private)


def _check_not_local(where: str) -> None:
    if where.endswith(".tar") or os.path.isfile(where):  # noqa: PTH113  never raises
        raise UsageError(
            f"{where!r} is a file, not a place",
            hint=f"bundles have commands of their own: poolreg bundle apply {where}, or create",
        )
    is_folder = os.path.isdir(where)  # noqa: PTH112
    # A folder may happen to be called like a repository; a published pool in it tells them apart.
    if is_folder and (not _OWNED.fullmatch(where) or Path(where, "poolreg.json").is_file()):
        raise UsageError(
            f"{where!r} is a folder of this machine",
            hint=f"write file://{Path(where).resolve()}, or OWNER/NAME for a repository",
        )
