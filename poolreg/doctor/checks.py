"""One line of a check-up: what was looked at, how it stands, what was found, and the way out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "failed", "unknown"]


@dataclass(frozen=True)
class Check:
    """One line. `unknown` is what was not looked at, or what this system does not tell."""

    check: str
    status: Status
    found: str
    way_out: str = ""
