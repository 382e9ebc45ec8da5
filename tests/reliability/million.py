"""What a pool of a million evaluations costs: time and memory of the commands that look at all of it.

    python tests/reliability/million.py [--evaluations 1000000] [--segments 200] [--keep DIR]

makes a small pool with a few answers, adds evaluation records, each with an object of its own (as
a sweep leaves them), in so many segments, and runs each command as a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pools
from many import add_evaluations

from poolreg import Pool
from poolreg.store.journal import Record

COMMANDS = {
    "index from scratch": ["ls"],
    "index one more": ["ls"],
    "nothing new": ["ls"],
    "ask, memoised": ["ask", "alpha+beta", "--threads", "1"],
    "stats": ["stats"],
    "verify": ["verify"],
    "verify --headers": ["verify", "--headers"],
    "gc --dry-run": ["gc", "--dry-run"],
    "journal compact": ["journal", "compact"],
    "index from scratch, compacted": ["ls"],
    "verify --full": ["verify", "--full"],
}


def measured(root: Path, words: list[str]) -> tuple[float, float, str]:
    """Run a command; return its seconds, its largest memory in MB and its last line."""
    script = (
        "import re, sys\n"
        "from poolreg.cli.main import main\n"
        "try:\n    main(prog_name='poolreg')\n"
        "finally:\n"
        "    status = open('/proc/self/status').read()\n"
        "    print('peak', re.search(r'VmHWM:\\s+(\\d+)', status)[1], file=sys.stderr)\n"
    )
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", script, *words, "--pool", str(root)],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    seconds = time.perf_counter() - began
    *said, peak = done.stderr.strip().splitlines()
    if done.returncode:
        raise SystemExit(f"{words}: {done.stderr}")
    return seconds, int(peak.split()[1]) / 1024, said[-1] if said else ""


def main() -> None:
    """Make the pool, run the commands, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--evaluations", type=int, default=1_000_000)
    parser.add_argument("--segments", type=int, default=200)
    parser.add_argument("--keep", type=Path, help="make the pool here, and keep it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        base = arguments.keep or Path(scratch)
        made = pools.tiny_pool(base)
        with Pool.open(made.root) as pool:
            pool.ask("alpha+beta")
            (row,) = pool.sql("SELECT evalset, protocol FROM evaluations LIMIT 1").dicts()
        began = time.perf_counter()
        add_evaluations(made.root, arguments.evaluations, arguments.segments, **row)
        journal = sum(path.stat().st_size for path in (made.root / "journal").iterdir())
        print(f"{arguments.evaluations:,} evaluations with an object each in "
              f"{arguments.segments} segments ({journal / 1e6:,.0f} MB), "
              f"made in {time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip
        for name, words in COMMANDS.items():
            if name.startswith("index from scratch"):
                (made.root / "catalog.duckdb").unlink(missing_ok=True)
            if name == "index one more":
                line = (made.root / "journal" / "1-made-000000.jsonl").open("rb").readline()
                record = json.loads(line[9:])
                new = Record(
                    "evaluation", "0" * 64, record["body"], record["objects"], record["at"]
                )
                (made.root / "journal" / "2-more.jsonl").write_bytes(new.line())
            seconds, peak, said = measured(made.root, words)
            print(f"{name:32}{seconds:9.2f} s{peak:9,.0f} MB   {said[:60]}", flush=True)


if __name__ == "__main__":
    main()
