"""The question, with what a really trained model would score where the pool can tell.

Without references it cannot, which is the usual case, and numpy is not imported.
"""

from __future__ import annotations

from collections.abc import Sequence

from poolreg.evaluation import ask as asking
from poolreg.evaluation.ask import Answer
from poolreg.evaluation.evaluate import Settings
from poolreg.progress import SILENT, Progress
from poolreg.store.registry import Registry


def ask(
    registry: Registry, texts: Sequence[str], on: Sequence[str] = (), *, scheme: str = "micro",
    seed: str | None = None, settings: Settings | None = None, progress: Progress = SILENT,
) -> list[Answer]:  # fmt: skip
    """Answer as `evaluation.ask` does, and predict what a trained model would score."""
    answers = asking.ask(
        registry, texts, on, scheme=scheme, seed=seed, settings=settings, progress=progress
    )
    seeds = {answer.seed for answer in answers if answer.mixture and answer.seed}
    if len(seeds) != 1:
        return answers
    (start,) = seeds
    if not registry.select("reference_list", seed=start):
        return answers
    from poolreg.decisions.predict import predicted

    return predicted(
        registry, answers, on, scheme=scheme, seed=start, settings=settings or Settings()
    )
