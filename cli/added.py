"""What is said after text was added to a pool."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .output import many, message, size

if TYPE_CHECKING:
    from poolreg.text.partitions import Added


def say_added(kind: str, added: Added) -> None:
    """Say what was added and what of it is worth knowing."""
    verb = "added" if added.new else "already in the pool:"
    units = f", {many(added.units, 'unit')}" if added.units else ""
    message(
        f"{verb} {kind} {added.name}: {many(added.documents, 'document')}, "
        f"{size(added.bytes)}{units} ({added.digest[:12]})"
    )
    if added.duplicates:
        message(f"note: {many(added.duplicates, 'document')} repeat an earlier one of it")
    for overlap in added.overlaps:
        message(
            f"note: evalset {overlap.evalset} shares {many(overlap.documents, 'document')} with "
            f"partition {overlap.partition}; answers on it are marked"
        )
