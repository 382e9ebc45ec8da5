"""What a race saves: the same mixtures swept and raced in copies of one pool.

    python tests/benchmarks/racing.py POOL [--dirichlet 100] [--piece 600]

POOL is one that `poolreg demo` made. Its evalsets are cut into documents of about so many
characters, since a race needs documents to draw from. For each evalset alone and for all of them
together the table says how many mixtures stopped, which share of the tokens was not scored, the
seconds of both, whether the winner is the same, and how many of the true best five stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

from poolreg import Pool
from poolreg.evaluation.evaluate import Settings
from poolreg.evaluation.sweep import choose_dirichlet, choose_subsets
from poolreg.text.partitions import evalset_documents


def pieces(text: str, size: int) -> list[str]:
    """Cut a document at line ends into parts of about so many characters."""
    parts, current = [], ""
    for line in text.splitlines(keepends=True):
        current += line
        if len(current) >= size:
            parts.append(current)
            current = ""
    return [*parts, current] if current else parts


def prepare(source: Path, folder: Path, size: int) -> list[str]:
    """Copy the pool with its evalsets in pieces and return their names."""
    shutil.copytree(source, folder)
    names = []
    with Pool.open(folder) as pool:
        for name, digest in sorted(pool.registry.names("evalset").items()):
            texts = [p for d in evalset_documents(pool.registry, digest) for p in pieces(d, size)]
            file = folder.parent / f"{name}.jsonl"
            file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            pool.add_evalset(f"{name}-pieces", [file])
            names.append(f"{name}-pieces")
            print(f"{name}-pieces: {len(texts)} documents")
    return names


def chosen(pool: Pool, count: int) -> list[str]:
    """Return all unions and so many random mixtures."""
    drawn = choose_dirichlet(pool.registry, count, seed=1) if count else []
    return [str(mixture) for mixture in [*choose_subsets(pool.registry), *drawn]]


def main() -> None:
    """Sweep and race, and print both side by side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pool", type=Path)
    parser.add_argument("--dirichlet", type=int, default=100, help="random mixtures beside unions")
    parser.add_argument("--piece", type=int, default=600, help="characters of a document")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    settings = Settings(threads=given.threads)
    with tempfile.TemporaryDirectory() as place:
        base = Path(place) / "pool"
        names = prepare(given.pool, base, given.piece)
        print(f"{'evalsets':24}{'mixtures':>9}{'stopped':>8}{'saved':>7}{'sweep s':>9}{'race s':>8}"
              f"{'winner':>8}{'best 5 lost':>12}")  # fmt: skip
        for on in [*([name] for name in names), names]:
            full = Path(shutil.copytree(base, Path(place) / "full"))
            raced = Path(shutil.copytree(base, Path(place) / "raced"))
            with Pool.open(full) as pool:
                mixtures = chosen(pool, given.dirichlet)
                started = time.perf_counter()
                planned = pool.plan_sweep(mixtures, on, settings=settings)
                pool.sweep(planned)
                sweep_seconds = time.perf_counter() - started
                truth = pool.race(pool.plan_sweep(mixtures, on, settings=settings))
            with Pool.open(raced) as pool:
                started = time.perf_counter()
                race = pool.race(pool.plan_sweep(mixtures, on, settings=settings))
                race_seconds = time.perf_counter() - started
            stopped = {runner.subject.digest for runner in race.runners if not runner.complete}
            best = [runner.subject.digest for runner in truth.runners]
            same = race.runners[0].subject.digest == best[0]
            label = on[0] if len(on) == 1 else f"all {len(on)}"
            print(f"{label:24}{len(race.runners):9}{len(stopped):8}{1 - race.tokens / race.whole:7.0%}"
                  f"{sweep_seconds:9.1f}{race_seconds:8.1f}{'same' if same else 'OTHER':>8}"
                  f"{len(stopped.intersection(best[:5])):12}", flush=True)  # fmt: skip
            shutil.rmtree(full)
            shutil.rmtree(raced)


if __name__ == "__main__":
    main()
