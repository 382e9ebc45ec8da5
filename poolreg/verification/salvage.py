"""Records in damaged lines of a journal: cut out where lines ran together, set right where one
bit was flipped.

A checksum tells which single bit of a line must be flipped back for it to hold: CRC-32 is linear,
and each bit of a line shorter than 512 MB changes it in another way. What comes out is believed
only if it is the canonical JSON that it was written as.
"""

from __future__ import annotations

import binascii
import itertools
import json
import re
from collections.abc import Iterator

from poolreg.canonical import canonical_json
from poolreg.errors import PoolregError
from poolreg.verification.lines import sound

_START = re.compile(rb'[0-9a-f]{8} \{"at":')
_POLYNOMIAL = 0xEDB88320


def salvage(damaged: bytes) -> list[bytes]:
    """Return the whole lines that can be had from bytes of a journal that are not sound lines."""
    cuts = sorted({0, *(match.start() for match in _START.finditer(damaged)), len(damaged)})
    found = []
    for start, stop in itertools.pairwise(cuts):
        piece = damaged[start:stop]
        line = next(filter(_is_record, _candidates(piece)), None)
        if line is not None:
            found.append(line + b"\n")
    return found


def _candidates(piece: bytes) -> Iterator[bytes]:
    """Yield what a line may have been, without its line feed."""
    yield piece  # its line feed is gone
    line = piece[:-1]
    yield line  # its line feed was changed
    for position in range(min(9, len(line))):  # its checksum, or the space after it
        for bit in range(8):
            yield _flipped(line, position, bit)
    data = line[9:]
    try:
        wrong = binascii.crc32(data) ^ int(line[:8], 16)
    except ValueError:
        return
    spot = flipped_bit(len(data), wrong)
    if spot:
        yield _flipped(line, 9 + spot[0], spot[1])


def _flipped(line: bytes, position: int, bit: int) -> bytes:
    changed = bytearray(line)
    changed[position] ^= 1 << bit
    return bytes(changed)


def _is_record(line: bytes) -> bool:
    if not sound(line):
        return False
    data = line[9:]
    try:
        return canonical_json(json.loads(data)) == data
    except (ValueError, RecursionError, PoolregError):
        return False


def _table() -> list[int]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return table


_TABLE = _table()
_BEFORE = {value >> 24: index for index, value in enumerate(_TABLE)}
_LAST_BYTE = {_TABLE[1 << bit]: bit for bit in range(8)}


def flipped_bit(length: int, wrong: int) -> tuple[int, int] | None:
    """Return the byte and the bit that change the CRC-32 of so many bytes by `wrong`, if any.

    The change of one bit is carried on by each byte that follows; here it is followed back.
    """
    for position in range(length - 1, -1, -1):
        if wrong in _LAST_BYTE:
            return position, _LAST_BYTE[wrong]
        index = _BEFORE[wrong >> 24]
        wrong = ((wrong ^ _TABLE[index]) << 8 & 0xFFFFFFFF) | index
    return None
