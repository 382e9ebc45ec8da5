"""How much damage does `poolreg verify --full` find, and how much of it can be repaired?

Makes a small pool with models, kept merges and answers, pushed to a folder. Then, in copies of it,
flips single bits, cuts files off and deletes them, at places drawn by chance: in objects, segments
of the journal, the catalog and FORMAT. Each time the pool is verified in full, and repaired.

    detected    verify found something
    harmless    verify found nothing, and the same records, objects and catalog rows are there
    silent      verify found nothing, and something is different: must be 0
    repaired    of the detected: after --repair verify finds nothing, and nothing is lost
    alone       ... and that without the other copy that was pushed
    notes lost  of the detected: as repaired, but for what never leaves a machine (where texts lie,
                what was pushed and pulled, whose code is trusted); the loss is told
    loss told   of the detected: after --repair what could not be brought back is told

    python tests/reliability/flips.py --tries 200
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import pools

from poolreg import Pool
from poolreg.sharing.contents import STAYING
from poolreg.store.sandbox import peek
from poolreg.verification.repair import repair
from poolreg.verification.verify import Depth, open_damaged, verify

PLACES = ("objects", "journal", "catalog", "FORMAT")
HOW = ("flip", "cut", "delete")
COLUMNS = (
    "tried",
    "detected",
    "harmless",
    "silent",
    "repaired",
    "alone",
    "notes lost",
    "loss told",
)
DEPTH = Depth(full=True, merges=0)  # merges come from objects, which are all hashed


def make_pool(base: Path) -> Path:
    """Make a small pool in many segments, pushed to a folder beside it."""
    made = pools.tiny_pool(base, {"alpha": 1, "beta": 2})
    with Pool.open(made.root) as pool:
        pool.ask(["alpha+beta", "all"])
    with Pool.open(made.root) as pool:
        pool.keep_merge("alpha+beta", "kept")
        pool.push(f"file://{base / 'published'}")
    return made.root


# -- what a pool holds -----------------------------------------------------------------------


def records_of(root: Path) -> set[tuple[str, str]]:
    """Return the records of the good lines of a journal."""
    registry = open_damaged(root)
    return {(record.kind, record.id) for record in registry.journal.all()}


def objects_of(root: Path) -> dict[str, bytes]:
    """Return the objects that records name."""
    registry = open_damaged(root)
    named = {digest for record in registry.journal.all() for digest in record.objects}
    return {digest: registry.objects.path(digest).read_bytes() for digest in named}


def rows_of(root: Path) -> dict[str, list[Any]]:
    """Return all rows of the catalog, as its file is."""
    path = root / "catalog.duckdb"
    tables = peek(path, "SELECT table_name FROM duckdb_tables() WHERE database_name = 'pool'").rows
    return {name: sorted(map(repr, peek(path, f'FROM "{name}"').rows)) for (name,) in tables}


def content(root: Path) -> tuple[Any, ...]:
    """Return all that a pool says and holds."""
    return records_of(root), objects_of(root), rows_of(root)


# -- damage ----------------------------------------------------------------------------------


def files_at(root: Path, place: str) -> list[Path]:
    """Return the files of one place, in order."""
    if place == "objects":
        return sorted(path for path in (root / place).rglob("*") if path.is_file())
    if place == "journal":
        return sorted((root / place).iterdir())
    return [root / {"catalog": "catalog.duckdb"}.get(place, place)]


def damage(path: Path, how: str, draw: random.Random) -> str:
    """Damage a file; returns what was done."""
    data = bytearray(path.read_bytes())
    path.chmod(0o644)
    if how == "delete":
        path.unlink()
        return f"delete {path.name}"
    position = draw.randrange(len(data))
    if how == "flip":
        bit = draw.randrange(8)
        data[position] ^= 1 << bit
        path.write_bytes(bytes(data))
        return f"flip {path.name} byte {position} bit {bit}"
    path.write_bytes(bytes(data[:position]))
    return f"cut {path.name} to {position} of {len(data)}"


def clone(root: Path, to: Path) -> Path:
    """Copy a pool; its objects are links, so what is damaged is made a file of its own first."""
    shutil.rmtree(to, ignore_errors=True)

    def link_or_copy(source: str, target: str) -> None:
        (os.link if "/objects/" in source else shutil.copy2)(source, target)

    return Path(shutil.copytree(root, to, copy_function=link_or_copy))


def trial(root: Path, scratch: Path, place: str, how: str, *, draw: random.Random,
          whole: tuple[Any, ...]) -> tuple[Counter[str], str]:  # fmt: skip
    """Damage one file of a copy, verify it, repair it; return what came of it."""
    copy = clone(root, scratch / "pool")
    path = draw.choice(files_at(copy, place))
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)  # no link any more
    done = damage(path, how, draw)
    found = Counter({"tried": 1})
    registry = open_damaged(copy)
    verdict = verify(registry, DEPTH)
    registry.close()
    if not verdict.findings:
        gone = how == "delete" and place == "catalog"  # it is derived
        same = content(copy)[:2] == whole[:2] if gone else content(copy) == whole
        found["harmless" if same else "silent"] += 1
        return found, done
    found["detected"] += 1
    after, lost = outcome(copy, whole)
    if not after.findings and not lost:
        found["repaired"] += 1
        found["alone"] += not any(" from file://" in mended.done for mended in after.mended)
    elif not after.findings and lost <= STAYING:
        found["notes lost"] += 1
    elif after.findings or any("lost" in mended.done for mended in after.mended):
        found["loss told"] += 1
    return found, done


def outcome(root: Path, whole: tuple[Any, ...]) -> tuple[Any, set[str]]:
    """Repair; returns the verdict, and the kinds of records and objects that are not there."""
    registry = open_damaged(root)
    after = repair(registry, DEPTH)
    registry.close()
    lost = {kind for kind, _ in whole[0] - records_of(root)}
    if not after.findings:
        named = objects_of(root)
        gone = [d for d, data in whole[1].items() if named.get(d, data) != data]
        lost |= {"object"} if gone else set()
    return after, lost


# -- the command -----------------------------------------------------------------------------


def campaign(
    places: Sequence[str], tries: int, seed: int, tell: Callable[[str], None]
) -> dict[str, Counter[str]]:
    """Try every place so many times; a fifth of them each are cuts and deletions."""
    draw = random.Random(seed)
    table: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = make_pool(Path(folder) / "made")
        whole = content(root)
        for place in places:
            table[place] = Counter()
            begun = time.monotonic()
            for number in range(tries):
                how = HOW[{0: 1, 1: 2}.get(number % 5, 0)]
                found, done = trial(root, Path(folder), place, how, draw=draw, whole=whole)
                table[place] += found
                if found["silent"] or not (found["repaired"] or found["harmless"]):
                    tell(f"{place}: {done}: {', '.join(found)}")
            tell(f"{place}: {time.monotonic() - begun:.0f} s")
    return table


def main() -> int:
    """Run the campaign and print its table; 1 if any damage stayed silent."""
    parser = argparse.ArgumentParser(description="Flip bits, cut and delete files of a pool.")
    parser.add_argument("--tries", type=int, default=200, help="for each place")
    parser.add_argument("--place", choices=PLACES, action="append", help="this one only")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    table = campaign(
        options.place or PLACES,
        options.tries,
        options.seed,
        lambda text: print(text, file=sys.stderr),
    )
    print(f"| place | {' | '.join(COLUMNS)} |")
    print("|---|" + "---:|" * len(COLUMNS))
    for place, counts in table.items():
        print(f"| {place} | {' | '.join(str(counts[column]) for column in COLUMNS)} |")
    return int(any(counts["silent"] for counts in table.values()))


if __name__ == "__main__":
    sys.exit(main())
