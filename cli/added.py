"""What is said after text was added to a pool."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .output import count, message, size

if TYPE_CHECKING:
    from poolreg.data import Added


def say_added(kind: str, added: Added) -> None:
    """Say what was added and what of it is worth knowing."""
    verb = "added" if added.new else "already in the pool:"
    units = f", {count(added.units)} units" if added.units > 1 else ""
    message(
        f"{verb} {kind} {added.name}: {count(added.documents)} documents, "
        f"{size(added.bytes)}{units} ({added.digest[:12]})"
    )
    if added.duplicates:
        message(f"note: {count(added.duplicates)} documents stand in it more than once")
    for overlap in added.overlaps:
        message(
            f"note: {count(overlap.documents)} documents of evalset {overlap.evalset} also stand "
            f"in partition {overlap.partition}; answers on it are marked"
        )
