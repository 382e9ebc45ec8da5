"""The laps of a race: which documents of an evalset are scored in which, by content alone.

The first lap covers a sixteenth of the documents, and each further one as many again as all
before it. The order is drawn from the evalset's digest, so whatever was scored in a lap serves
every later race over that evalset.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from poolreg.canonical import digest_of, sha256
from poolreg.errors import UsageError

LAPS = 5
LEAST = 16  # documents that the first lap covers at least, if there are so many

VERSION = 1  # of the order and the parts; a change of it scores again


def covered(lap: int, documents: int) -> int:
    """Return how many documents, in the order of the race, are scored once a lap is over."""
    if not 0 <= lap < LAPS:
        raise UsageError(f"there is no lap {lap}", hint=f"laps are 0 to {LAPS - 1}")
    return min(documents, max(LEAST, -(-documents // (1 << (LAPS - 1 - lap)))))


@functools.lru_cache(maxsize=64)
def race_order(evalset: str, documents: int) -> NDArray[np.int64]:
    """Return the numbers of an evalset's documents in the order in which a race takes them."""
    keys = [sha256(f"race {VERSION} {evalset} {number}".encode()) for number in range(documents)]
    return np.array(sorted(range(documents), key=keys.__getitem__), np.int64)


def lap_documents(evalset: str, documents: int, lap: int) -> NDArray[np.int64]:
    """Return the documents that are scored in one lap, in the order of the race."""
    start = covered(lap - 1, documents) if lap else 0
    return race_order(evalset, documents)[start : covered(lap, documents)]


def lap_id(subject: str, evalset: str, protocol: str, lap: int) -> str:
    """Return the identity of what was scored in one lap."""
    return digest_of({"lap": VERSION, "subject": subject, "evalset": evalset,
                      "protocol": protocol, "number": lap})  # fmt: skip
