"""All benchmarks of docs/performance.md, one after the other.

    python tests/benchmarks/run.py [--quick] [--mergekit PATH] [--demo POOL] [--dir DIR]
        [--only NAME,...]

prints each command and what it prints. The machine should have nothing else to do. `--quick`
takes sizes that show in minutes whether everything runs, and whose figures mean little. Without
`--mergekit` merging is compared with the rest only; mergekit wants an environment of its own.
With `--demo`, a pool that `poolreg demo` made, races are measured, too.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
MILLIONS = "--hidden 768 --width 2048 --layers 8 --tokens 8192"
BILLION = "--hidden 2048 --width 4096 --layers 24 --stored bfloat16 --tokens 5120"

# Each benchmark with its arguments, and with those that make it quick.
RUNS = [
    ("merging", "--millions 317", "--millions 16 --rounds 1"),
    ("intake", "--millions 317", "--millions 16 --rounds 1"),
    ("sweeping", "--parameters 1", "--parameters 1 --subsets 7 --evalset-tokens 1024"),
    ("sweeping", "--parameters 10 --subsets 15", ""),
    ("sweeping", "--parameters 100 --subsets 3 --evalset-tokens 2048", ""),
    ("catalog", "--evaluations 1000000", "--evaluations 10000 --pairs 1"),
    ("startup", "--pairs 15", "--pairs 3"),
    (
        "compression_speed",
        f"{MILLIONS} --pairs 2 --ratios 0.2,0.3,0.4",
        "--hidden 128 --layers 2 --width 256 --pairs 1",
    ),
    ("compression_speed", f"{BILLION} --pairs 0 --method modegpt --only 2", ""),
]


def machine() -> str:
    """Return what the figures were measured on, in a line."""
    cores = len(os.sched_getaffinity(0))
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{cores} cores, {names[0] if names else platform.machine()}, {memory:.0f} GiB, "
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}"
    )


def main() -> None:
    """Run those that were chosen; ends with an error if one of them does."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--mergekit", help="the executable mergekit-yaml")
    parser.add_argument("--demo", help="a pool made by poolreg demo")
    parser.add_argument("--dir", help="where the files are made (default: the temporary folder)")
    parser.add_argument("--only", help="names, with commas")
    given = parser.parse_args()
    print(machine())
    runs = [*RUNS, *([("racing", f"{given.demo} --dirichlet 20", "")] if given.demo else [])]
    failed = []
    for name, full, quick in runs:
        words = shlex.split(quick if given.quick else full)
        if (given.only and name not in given.only.split(",")) or not words:
            continue
        if name == "merging" and given.mergekit:
            words += ["--mergekit", given.mergekit]
        if not run(name, words, given.dir):
            failed.append(name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def run(name: str, words: list[str], place: str | None) -> bool:
    """Run a benchmark as a process of its own; returns whether it went well."""
    print(f"\n## python tests/benchmarks/{name}.py {shlex.join(words)}\n", flush=True)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=place) as folder:
        command, environment = [sys.executable, HERE / f"{name}.py", *words], {"TMPDIR": folder}
        done = subprocess.run(command, env=os.environ | environment)
    print(f"\n{time.perf_counter() - began:.0f} s", flush=True)
    return done.returncode == 0


if __name__ == "__main__":
    main()
