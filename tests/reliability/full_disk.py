"""What a full disk does: every write of a merge, an addition and an indexing runs out of space.

    python tests/reliability/full_disk.py [--step 4096] [--case NAME]

mounts a small file system in memory (which needs root), puts a pool on it, and runs each command
with 0, 4096, 8192… bytes free until it succeeds; then once more with an error at each named step
(`poolreg.faults`) in place of a full disk. After each failure the journal and every object are
compared with what they were, byte by byte, and the exit code and the message are looked at.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pools
from click.testing import CliRunner
from poolreg.cli.main import main as cli

from poolreg import faults
from poolreg.canonical import digest_of
from poolreg.store import records
from poolreg.store.registry import Registry

NAMES = 2000  # namings that are to be indexed
SIZE = "48m"


@dataclass
class Case:
    """A command, what prepares the pool for it, and what came of it."""

    name: str
    words: list[str]
    prepare: Callable[[Path], None] = lambda _: None
    tried: int = 0
    failed: int = 0
    wrong: list[str] = field(default_factory=list)
    behind: int = 0  # failures after which all was recorded, and only the catalog lagged behind
    garbage: int = 0  # most bytes that one failure left in objects/ and tmp/
    needed: int = 0
    writes: list[str] = field(default_factory=list)  # kinds of records, when it succeeds


@contextlib.contextmanager
def small_disk() -> Iterator[Path]:
    """Mount a small file system for the block."""
    with tempfile.TemporaryDirectory() as place:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", place], check=True)
        try:
            yield Path(place)
        finally:
            subprocess.run(["umount", "-l", place], check=True)


def leave(disk: Path, free: int) -> None:
    """Fill the disk but for so many bytes."""
    with open(disk / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        room = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        os.posix_fallocate(file.fileno(), 0, max(room - free, 1))


def facts(root: Path) -> dict[str, bytes]:
    """Return what must not change: the journal (an empty segment is none), FORMAT."""
    files = [root / "FORMAT", *(root / "journal").iterdir()]
    return {str(path.relative_to(root)): data for path in files if (data := path.read_bytes())}


def kinds(root: Path, before: dict[str, bytes]) -> list[str]:
    """Return the kinds of the records that were written since."""
    lines = [line for name, data in facts(root).items() if name != "FORMAT"
             for line in data.removeprefix(before.get(name, b"")).splitlines()]  # fmt: skip
    return sorted(json.loads(line[9:])["kind"] for line in lines)


def extra(root: Path, before: set[Path]) -> set[Path]:
    """Return what stands in objects/ and tmp/ that did not before."""
    files = {path for part in ("objects", "tmp") for path in (root / part).rglob("*")}
    return {path for path in files - before if path.is_file()}


def run(case: Case, root: Path, why: str) -> bool:
    """Run the command once; True if it succeeded. Whatever is wrong after a failure is noted."""
    before = facts(root)
    objects = {path: path.read_bytes() for path in (root / "objects").rglob("*") if path.is_file()}
    there = set(objects) | set((root / "tmp").rglob("*"))
    case.tried += 1
    result = CliRunner().invoke(cli, [*case.words, "--pool", str(root)], prog_name="poolreg")
    faults._fault = None
    (root.parent / "filler").unlink(missing_ok=True)
    if result.exit_code == 0:
        return True
    case.failed += 1
    said = result.stderr.strip()
    done = said.startswith("error: indexing the catalog") and kinds(root, before) == case.writes
    case.behind += done and facts(root) != before
    checks = {
        f"exit code {result.exit_code}": result.exit_code == 1,
        f"message {said!r}": "space" in said and len(said.splitlines()) <= 4,
        "the journal changed": facts(root) == before or done,
        "an object changed": all(p.read_bytes() == data for p, data in objects.items()),
        "the output is there": not (root.parent / "out").exists(),
    }
    case.wrong += [f"{why}: {what}" for what, right in checks.items() if not right]
    left = extra(root, there)
    case.garbage = max(case.garbage, sum(path.stat().st_size for path in left))
    for path in left:  # what a failure leaves is garbage: the pool is whole without it
        path.unlink()
    return False


def unindexed(root: Path) -> None:
    """Write names that the catalog does not know yet."""
    with contextlib.closing(Registry.open(root)) as registry:
        target = next(iter(registry.names("evalset").values()))
        labels = [f"n{digest_of(number)[:12]}" for number in range(NAMES)]
        registry.record(*(records.name("evalset", label, target) for label in labels))


def cases(made: pools.Tiny, disk: Path) -> list[Case]:
    """Return the commands that are tried."""
    other = pools.unit_folder(made.root.parent / "other", made.seed, 77)
    return [
        Case("merge to a folder", ["merge", "alpha+beta", "-o", str(disk / "out")]),
        Case("merge kept in the pool", ["merge", "alpha+beta", "--keep", "kept"]),
        Case("model add", ["model", "add", str(other), "--other", "--name", "more"]),
        Case("evalset add", ["evalset", "add", "more", str(made.texts / "beta.train.jsonl")]),
        Case("partition add", ["partition", "add", "more", str(made.texts / "alpha.held.jsonl")]),
        Case("index", ["ls"], unindexed),
    ]


def tried(case: Case, made: pools.Tiny, disk: Path, step: int) -> None:
    """Run a case with more and more free bytes, then with an error at each step."""
    root = Path(shutil.copytree(made.root, disk / "pool"))
    case.prepare(root)
    aside = Path(shutil.copytree(root, made.root.parent / "aside"))
    before = facts(root)
    if not run(case, root, "enough space"):
        raise SystemExit(f"{case.name} fails with enough space: {case.wrong}")
    case.writes = kinds(root, before)
    done, free = False, -step
    while not done:
        for place in (root, disk / "out"):
            shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(aside, root)
        free += step
        leave(disk, free)
        done = run(case, root, f"{free} bytes free")
    case.needed = free
    done, number = False, 0
    while not done:
        number += 1
        for place in (root, disk / "out"):
            shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(aside, root)
        faults._fault = faults._Fault.parse(f"*@{number}=ENOSPC")
        done = run(case, root, f"step {number}")
    for place in (root, aside, disk / "out"):
        shutil.rmtree(place, ignore_errors=True)


def main() -> None:
    """Try everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step", type=int, default=4096, help="bytes between two tries")
    parser.add_argument("--case", help="only the command so called in the table")
    chosen = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as base, small_disk() as disk:
        with contextlib.redirect_stderr(io.StringIO()):
            made = pools.tiny_pool(Path(base))
        rows = [row for row in cases(made, disk) if chosen.case in (None, row.name)]
        print(f"{'command':26}{'tries':>7}{'refused':>9}{'behind':>8}{'needs':>12}{'left':>9}"
              f"{'wrong':>7}")  # fmt: skip
        for case in rows:
            tried(case, made, disk, chosen.step)
            print(f"{case.name:26}{case.tried:7}{case.failed:9}{case.behind:8}{case.needed:12,}"
                  f"{case.garbage:9,}{len(case.wrong):7}", flush=True)  # fmt: skip
    for case in rows:
        for what in case.wrong[:10]:
            print(f"{case.name}: {what}")
    sys.exit(any(case.wrong for case in rows))


if __name__ == "__main__":
    main()
