"""Contribution waterfall: from the seed model by each partition's Shapley share to all together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from poolreg.report.draw import LETTER, Axes, Chart, Colour, Panel, shortened

if TYPE_CHECKING:
    from poolreg.decisions.attribution import Contribution

MOST_PANELS = 24  # evalsets
MOST_STEPS = 24  # partitions in a panel; the small ones are summed up
AVERAGE = "average of all evalsets"


@dataclass(frozen=True)
class Step:
    """One bar: whose share, its change of bits per byte, and its standard error (0: exact)."""

    partition: str
    change: float
    error: float


def contributions_chart(
    rows: Sequence[Contribution], start: Mapping[str, float], lacking: str = ""
) -> Chart:
    """Return the chart of the average over evalsets and of each; `start` has the seed's scores."""
    title = "What each partition contributes"
    evalsets = [name for name in dict.fromkeys(row.evalset for row in rows) if name in start]
    if not evalsets:
        return Chart("contributions", title, "", lacking=lacking or (
            "The seed model was not measured, so nothing can be attributed. Measure what is "
            "missing with: poolreg attribution --measure"))  # fmt: skip
    per_evalset = {
        name: [
            Step(row.partition, row.shapley, row.standard_error or 0.0)
            for row in rows if row.evalset == name
        ]
        for name in evalsets
    }  # fmt: skip
    panels = [_panel(AVERAGE, averaged(list(per_evalset.values())),
                     float(np.mean([start[name] for name in evalsets])))]  # fmt: skip
    if len(evalsets) > 1:
        chosen = evalsets[:MOST_PANELS]
        panels += [_panel(name, per_evalset[name], start[name]) for name in chosen]
    else:
        panels = [_panel(evalsets[0], per_evalset[evalsets[0]], start[evalsets[0]])]
    left = len(evalsets) - MOST_PANELS
    return Chart(
        "contributions", title,
        "From the seed model to the average of all unit models, in bits per byte: each bar is a "
        "partition's Shapley share, its mean effect over all orders in which the partitions could "
        "join. Blue bars to the left are better; the shares add up to the whole change.",
        tuple(panels),
        note=f"{left} more evalsets are not drawn; the table below has all." if left > 0 else "",
    )  # fmt: skip


def averaged(groups: Sequence[Sequence[Step]]) -> list[Step]:
    """Return the mean of each partition's steps over evalsets, errors taken as independent."""
    collected: dict[str, list[Step]] = {}
    for group in groups:
        for step in group:
            collected.setdefault(step.partition, []).append(step)
    return [
        Step(
            name,
            float(np.mean([step.change for step in steps])),
            float(np.sqrt(sum(step.error**2 for step in steps)) / len(steps)),
        )
        for name, steps in collected.items()
    ]


def _panel(title: str, steps: Sequence[Step], start: float) -> Panel:
    ordered = sorted(steps, key=lambda step: (step.change, step.partition))
    total = sum(step.change for step in steps)
    best = ordered[0]
    finding = (
        f"From {start:.3f} to {start + total:.3f} bits per byte; the largest share is "
        f"that of {best.partition}, {signed(best.change)}."
    )
    shown = _gathered(ordered)
    longest = max(len(shortened(step.partition, 14)) for step in shown)
    margins = (0.14 + LETTER * max(4, longest), 0.1, 0.44, 0.05)
    return Panel(
        title, finding, (3.6, sum(margins[2:]) + 0.27 * (len(shown) + 2)), margins,
        lambda axes, colour: _draw(axes, colour, shown, start),
    )  # fmt: skip


def signed(value: float) -> str:
    """Return a change with its sign and three decimals."""
    return f"{value:+.3f}".replace("-", "−")


def _gathered(ordered: Sequence[Step]) -> list[Step]:
    if len(ordered) <= MOST_STEPS:
        return list(ordered)
    large = sorted(ordered, key=lambda step: -abs(step.change))[: MOST_STEPS - 1]
    kept = [step for step in ordered if step in large]
    small = [step for step in ordered if step not in large]
    error = float(np.sqrt(sum(step.error**2 for step in small)))
    return [*kept, Step(f"{len(small)} others", sum(step.change for step in small), error)]


def _draw(axes: Axes, colour: Colour, steps: Sequence[Step], start: float) -> None:
    ends = start + np.cumsum([0.0, *(step.change for step in steps)])
    low, high = float(ends.min()), float(ends.max())
    room = (high - low) or 0.1
    axes.set(xlim=(low - 0.3 * room, high + 0.3 * room), ylim=(len(steps) + 1.6, -0.6))
    for down, value in ((0, start), (len(steps) + 1, float(ends[-1]))):
        axes.plot([value, value], [down - 0.4, down + 0.4], color=colour("ink"), linewidth=2)
        axes.text(value + 0.025 * room, down, f"{value:.3f}", va="center", weight="bold")
    for down, step in enumerate(steps, start=1):
        before, after = float(ends[down - 1]), float(ends[down])
        axes.plot([before, before], [down - 1 + 0.4, down - 0.3], color=colour("line"),
                  linewidth=0.8)  # fmt: skip
        tint = colour("accent" if step.change <= 0 else "second")
        axes.barh(down, step.change, left=before, height=0.6, color=tint)
        if step.error:
            axes.plot([after - step.error, after + step.error], [down, down],
                      color=colour("ink"), linewidth=0.9)  # fmt: skip
        edge = max(before, after, after + step.error) + 0.025 * room
        axes.text(edge, down, signed(step.change), va="center", fontsize=8.5)
    names = ["seed", *(shortened(step.partition, 14) for step in steps), "all"]
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0, labelcolor=colour("ink"))
    axes.set_xlabel("bits per byte")
    axes.locator_params(axis="x", nbins=5)
    axes.spines[["left"]].set_visible(False)
