"""Adding a checkpoint to a pool beside sha256sum, cp and the physical floor, from one run.

    python tests/benchmarks/intake.py [--millions 317] [--dtypes bf16,fp32] [--rounds 3] [--cold]
        [--keep DIR] [--json FILE]

makes a random checkpoint shaped like Llama in a temporary folder (or in DIR, where it stays) and
adds it to a fresh pool on the same file system, in the process and with `poolreg model add`. The
peers are `sha256sum` and `openssl` (which uses the processor's instructions for it where the other
does not), `cp`, and `sync`; "all three" are openssl, cp and sync one after the other. poolreg
hashes every byte twice, once for its file and once for its tensor. The floor is the longest of
four times that this machine needs: to read S bytes from the page cache, to hash them once on one
core, twice on all, and to write them to the disk. `read` and `written` say how often each byte
was, by the kernel's count of the process. `--cold` takes the file out of the page cache before
each run. The methods take turns; figures are medians of the rounds, or with `--best` minima.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import merging

from poolreg import Pool
from poolreg.weights.disk import clone


def forget(path: Path) -> None:
    """Take a file that is on the disk out of the page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def traffic() -> tuple[int, int]:
    """Return the bytes that this process has read and written so far, wherever they were."""
    lines = Path("/proc/self/io").read_text().splitlines()
    counts = dict(line.split(": ") for line in lines)
    return int(counts["rchar"]), int(counts["wchar"])


def shares_blocks(place: Path) -> bool:
    """Tell whether the file system clones files."""
    with tempfile.TemporaryFile(dir=place) as one, tempfile.TemporaryFile(dir=place) as other:
        one.write(bytes(8192))
        one.flush()
        return clone(one.fileno(), other.fileno())


def kind(place: Path) -> str:
    """Return the name of the file system."""
    command = ["df", "--output=fstype", str(place)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[1]


def measure(folder: Path, place: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return medians of seconds by method, and what follows from them."""
    weights, copy, pool = folder / "model.safetensors", place / "copy", place / "pool"
    size, threads = weights.stat().st_size, os.cpu_count() or 1
    counted: list[tuple[float, float]] = []
    script = Path(sys.executable).with_name("poolreg")

    def fresh() -> Pool:
        merging.remove(pool)
        made = Pool.create(pool)
        if options.cold:
            forget(weights)
        return made

    def inside() -> merging.Taken:
        with fresh() as made:
            before = traffic()
            taken = merging.timed(lambda: made.add_model(folder, name="model"), copy)()
            after = traffic()
        counted.append(((after[0] - before[0]) / size, (after[1] - before[1]) / size))
        return taken

    def outside() -> merging.Taken:
        fresh().close()
        return merging.run(
            [str(script), "--pool", str(pool), "model", "add", str(folder), "--other"]
        )

    def tool(*commands: list[str]) -> merging.Taken:
        merging.remove(copy)
        if options.cold:
            forget(weights)
        taken = [merging.run(command) for command in commands]
        return merging.Taken(sum(t.seconds for t in taken), sum(t.cpu for t in taken))

    hashed, copied = ["sha256sum", str(weights)], ["cp", str(weights), str(copy)]
    faster, flushed = ["openssl", "dgst", "-sha256", str(weights)], ["sync", str(copy)]
    methods: dict[str, Callable[[], Any]] = {
        "sha256sum": functools.partial(tool, hashed),
        "openssl": functools.partial(tool, faster),
        "cp": functools.partial(tool, copied),
        "cp, sync": functools.partial(tool, copied, flushed),
        "all three": functools.partial(tool, faster, copied, flushed),
        "in process": inside,
        "poolreg model add": outside,
        "machine": lambda: (*merging.copying([weights], copy, threads), merging.hashing(threads)),
    }
    found = merging.turns(methods, options.rounds)
    read, _, disk, rate = map(statistics.median, zip(*found.pop("machine"), strict=True))
    row = merging.figures(found, options.best)
    row["/ all three"] = merging.ratio(found["in process"], found["all three"])
    row["floor"] = max(size / read, 2 * size / rate, size * threads / rate, size / disk)
    row["read"], row["written"] = map(statistics.median, zip(*counted, strict=True))
    for path in (copy, pool):
        merging.remove(path)
    return row


def main() -> None:
    """Make the checkpoints and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--millions", type=float, default=317, help="parameters of the model")
    parser.add_argument("--dtypes", default="bf16,fp32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--best", action="store_true", help="print minima, not medians")
    parser.add_argument("--cold", action="store_true", help="begin without the file in memory")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work in DIR and keep the model")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    options = parser.parse_args()
    rows = []
    with merging.workplace(options.keep) as place:
        sharing = "shares" if shares_blocks(place) else "does not share"
        print(f"file system: {kind(place)}, which {sharing} blocks between copies")
        for dtype in options.dtypes.split(","):
            folder = place / f"{dtype}-0"
            merging.write_checkpoint(folder, options.millions, dtype, seed=0)
            size = (folder / "model.safetensors").stat().st_size
            row = {"dtype": dtype, "S MB": round(size / 1e6)}
            rows.append(row | measure(folder, place, options))
    cache = "cold" if options.cold else "warm"
    merging.show(f"Adding a model, {cache} page cache (seconds; read, written: times S)", rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
