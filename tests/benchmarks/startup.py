"""What starting the command line costs above a bare Python that has imported DuckDB.

    python tests/benchmarks/startup.py [--pairs 15] [--pool DIR --mixture EXPR]

makes a small pool, and one with 11 references for predictions (or takes the pool that is given),
and runs each command as a process of its own, always after the bare one. Figures are medians of
seconds on the clock, the differences medians of the pairs; beside them the seconds of the
processor, which say more on a busy machine.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pools

from poolreg import Pool

BARE = [sys.executable, "-c", "import duckdb"]
WITHOUT_TORCH = """
import sys
from importlib.metadata import entry_points
(entry,) = entry_points(group="console_scripts", name="poolreg")
try:
    entry.load()(prog_name="poolreg")
finally:
    assert not {"torch", "transformers"} & sys.modules.keys()
"""


def run(command: list[str]) -> tuple[float, float]:
    """Run a process; return its seconds on the clock and of the processor."""
    environment = {
        key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"
    }
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                   env=environment)  # fmt: skip
    seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def compare(what: str, command: list[str], pairs: int) -> None:
    """Print how a command compares with the bare Python."""
    run(command)  # compiles what was not, and reads it from the disk
    rounds = [(run(BARE), run(command)) for _ in range(pairs)]
    bare, ours = (statistics.median(pair[side][0] for pair in rounds) for side in (0, 1))
    clock, processor = (
        statistics.median(ours[unit] - bare[unit] for bare, ours in rounds) for unit in (0, 1)
    )
    print(
        f"| {what} | {ours:.3f} s | {bare:.3f} s | {clock:+.3f} s | {processor:+.3f} s |",
        flush=True,
    )


def main() -> None:
    """Make the pools and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--pool", type=Path, help="a pool that holds an answer")
    parser.add_argument("--mixture", default="all", help="the mixture that was asked for")
    given = parser.parse_args()
    program = [sys.executable, "-c", WITHOUT_TORCH]
    with tempfile.TemporaryDirectory() as folder:
        places = {"": given.pool} if given.pool else {
            "": pools.tiny_pool(Path(folder, "tiny")).root,
            " with 11 references": pools.referenced_pool(Path(folder, "referenced")).root,
        }  # fmt: skip
        print("| command | ours | Python and DuckDB | above it | processor |")
        print("|---|---:|---:|---:|---:|")
        compare("--help", [*program, "--help"], given.pairs)
        for what, place in places.items():
            with Pool.open(place) as pool:
                pool.ask([given.mixture])
            at = ["--pool", str(place)]
            compare(f"ls{what}", [*program, "ls", *at], given.pairs)
            compare(f"ask, memoised{what}", [*program, "ask", given.mixture, *at], given.pairs)


if __name__ == "__main__":
    main()
