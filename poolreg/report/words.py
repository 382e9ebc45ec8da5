"""The answer in words, as it stands on top of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from poolreg.report.facts import Lens, Row
from poolreg.report.figures import tokens

MOST_BEST = 12  # evalsets named on top; the table has all


@dataclass(frozen=True)
class Answer:
    """What the pool says: the best mixture, by how much, how far to trust it, what it cost.

    `headline` names the mixture and `gain` what it brings; `best` has a row for each evalset.
    """

    headline: str
    mixture: str
    gain: str
    best: tuple[Row, ...]
    more: int
    verdict: tuple[str, ...]
    cost: tuple[str, ...]


def answer(
    lens: Lens, board: Sequence[Row], best: Sequence[Row], *, seed: Mapping[str, float],
    ledger: Row, verdict: Sequence[str],
) -> Answer:  # fmt: skip
    """Put the answer in words; `board` has the mixtures measured on all evalsets, best first."""
    where = _where(lens)
    mixture = board[0]["mixture"] if board else ""
    if board:
        headline = f"is the best of {_many(len(board), 'measured mixture')}, {where}"
        gain = _gain(lens, board, seed)
    else:
        headline = (
            f"No mixture was measured on all {len(lens.evalsets)} evalsets, so none is best on "
            "average."
        )
        gain = "Measure what is missing with: poolreg sweep --subsets"
    return Answer(
        headline, mixture, gain, tuple(best[:MOST_BEST]), max(0, len(best) - MOST_BEST),
        tuple(verdict), tuple(_cost(ledger)),
    )  # fmt: skip


def _where(lens: Lens) -> str:
    names = list(lens.evalsets.values())
    return f"on {names[0]}" if len(names) == 1 else f"on average over {len(names)} evalsets"


def _gain(lens: Lens, board: Sequence[Row], seed: Mapping[str, float]) -> str:
    top = board[0]["mean_bits_per_byte"]
    said = f"{top:.3f} bits per byte"
    if all(name in seed for name in lens.evalsets.values()):
        start = sum(seed[name] for name in lens.evalsets.values()) / len(lens.evalsets)
        said += f", {_below(start - top)} the seed model ({start:.3f})"
    if len(board) > 1:
        second = board[1]
        said += (
            f"; the next, {second['mixture']}, has {second['mean_bits_per_byte'] - top:.4f} more"
        )
    return f"{said}."


def _below(gap: float) -> str:
    return f"{abs(gap):.3f} {'below' if gap >= 0 else 'above'}"


def _cost(row: Row) -> list[str]:
    spent = (
        f"{_many(row['models_trained'], 'model')} trained on {tokens(row['tokens_trained'])} "
        f"tokens ({duration(row['training_seconds'])}); "
        f"{_many(row['evaluations_memoised'], 'evaluation')} of {tokens(row['tokens_scored'])} "
        f"tokens ({duration(row['scoring_seconds'])})."
    )
    avoided = (
        f"{_many(row['trainings_avoided'], 'training')} avoided, which would have taken "
        f"{tokens(row['tokens_avoided'])} tokens."
    )
    return [spent, avoided]


def _many(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Return seconds as a person would say them."""
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.3g} s"
