"""A whole pool from nothing in minutes: real text, a seed, unit models, references, a sweep.

Everything that the demo does is a call that a user can repeat; what it prints was measured in
that run. It may be interrupted and run again: finished parts are taken from the pool.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from poolreg.errors import NoPool
from poolreg.evaluation.ask import Answer
from poolreg.evaluation.evaluate import Settings
from poolreg.pool import Pool
from poolreg.progress import SILENT, Progress
from poolreg.store.sandbox import Table
from poolreg.text.demo_text import DemoText, write_demo_text
from poolreg.training.recipe import TrainingRecipe, default_recipe

SEED_NAME = "base"


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured. `seconds` is wall time by stage."""

    pool: Path
    texts: tuple[str, ...]
    answers: tuple[Answer, ...]
    best: Table
    correlation: Table
    ledger: Table
    partitions: tuple[str, ...]
    references: int
    seconds: dict[str, float]


def run_demo(
    folder: Path, *, recipe: TrainingRecipe | None = None, workers: int | None = None,
    partition_bytes: int = 400_000, progress: Progress = SILENT,
) -> DemoResult:  # fmt: skip
    """Build the demo's pool in `folder`/pool from text written to `folder`/text.

    `workers` processes train and sweep (default: one a core). Raises `NotFound` if this
    installation has too little text.
    """
    workers = workers or os.cpu_count() or 1
    recipe = recipe or default_recipe()
    seconds: dict[str, float] = {}
    with _pool(folder / "pool") as pool:
        clock = _Clock(seconds)
        text = write_demo_text(folder / "text", partition_bytes=partition_bytes)
        names = _add_text(pool, text, progress)
        clock.lap("text")
        pool.train_seed(recipe, name=SEED_NAME, progress=progress)
        clock.lap("seed")
        pool.train_units(recipe, workers=workers, progress=progress)
        clock.lap("units")
        references = choose_references(names)
        pool.train_references(references, recipe, workers=workers, progress=progress)
        clock.lap("references")
        settings = Settings(workers=workers)
        pool.sweep(pool.plan_sweep(settings=settings), progress=progress)
        clock.lap("sweep")
        everything = "+".join(names)
        # The pool's own question, once for all references so that they are measured too.
        pool.ask(references, settings=settings, progress=progress)
        answers = pool.ask([names[0], "+".join(names[:2]), everything])
        clock.lap("answers")
        return DemoResult(
            pool=pool.root, texts=text.notes, answers=tuple(answers), best=pool.query("best"),
            correlation=pool.query("correlation"), ledger=pool.query("ledger"),
            partitions=tuple(names), references=len(references), seconds=seconds,
        )  # fmt: skip


def choose_references(names: Sequence[str], *, most: int = 12) -> list[str]:
    """Return unions of every size from two up, spread evenly over the partitions.

    Of each size the rotations of one choice are taken, so each partition is in equally many.
    """
    count = len(names)
    chosen: list[str] = []
    for step, size, start in itertools.product(range(1, count), range(2, count + 1), range(count)):
        picked = {names[(start + step * k) % count] for k in range(size)}
        union = "+".join(sorted(picked))
        if len(picked) == size and union not in chosen:
            chosen.append(union)
    return chosen[:most]


class _Clock:
    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self.began = time.monotonic()

    def lap(self, stage: str) -> None:
        now = time.monotonic()
        self.seconds[stage] = now - self.began
        self.began = now


def _pool(root: Path) -> Pool:
    try:
        return Pool.open(root)
    except NoPool:
        root.parent.mkdir(parents=True, exist_ok=True)
        return Pool.create(root)


def _add_text(pool: Pool, text: DemoText, progress: Progress) -> list[str]:
    for name, path in text.partitions.items():
        pool.add_partition(name, [path], replace=True, progress=progress)
    for name, path in text.evalsets.items():
        pool.add_evalset(name, [path], replace=True, progress=progress)
    return sorted(text.partitions)
