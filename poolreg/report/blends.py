"""Mixtures by their weights: on the simplex for three partitions, else parallel coordinates.

Colour says how good a mixture is: bits per byte averaged over the evalsets, in classes of equal
size. Of many mixtures the best are drawn and an even sample of the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from poolreg.report.draw import LETTER, Axes, Chart, Colour, Panel, shortened
from poolreg.report.facts import Row
from poolreg.report.palette import RANKS

MOST = 300  # mixtures that are drawn
_BEST = 100  # of them the best ones, the others are a sample
_LACKING = (
    "No mixture was measured on all evalsets. Measure every union of partitions with: "
    "poolreg sweep --subsets"
)


def complete(board: Sequence[Row], evalsets: int) -> list[Row]:
    """Return the rows of the leaderboard that were measured on all evalsets, best first."""
    return [row for row in board if row["evalsets"] == evalsets]


def chosen(complete: Sequence[Row]) -> list[Row]:
    """Return the mixtures to draw, at most 300."""
    if len(complete) <= MOST:
        return list(complete)
    rest = complete[_BEST:]
    places = np.linspace(0, len(rest) - 1, MOST - _BEST).round().astype(int)
    return [*complete[:_BEST], *(rest[place] for place in places)]


def mixtures_chart(board: Sequence[Row], weights: Mapping[str, Mapping[str, float]]) -> Chart:
    """Return the chart of mixtures, best first, from the weights of those that are chosen."""
    drawn = [row for row in chosen(board) if weights.get(row["subject"])]
    partitions = sorted({name for row in drawn for name in weights[row["subject"]]})
    if not drawn or len(partitions) < 2:
        return Chart("mixtures", "Mixtures", "", lacking=_LACKING)
    points = np.array([[weights[r["subject"]].get(p, 0.0) for p in partitions] for r in drawn])
    scores = [row["mean_bits_per_byte"] for row in drawn]
    simplex = len(partitions) == 3
    panel = (_simplex if simplex else _parallel)(points, scores, partitions, drawn[0]["mixture"])
    how = (
        "Each point is a mixture; the nearer to a corner, the more of that partition."
        if simplex
        else "Each line is a mixture and shows its weight for each partition."
    )
    note = ""
    if len(board) > len(drawn):
        note = (
            f"Drawn are {len(drawn)} of {len(board):,} mixtures: the {_BEST} best and an even "
            "sample of the rest."
        )
    return Chart(
        "mixtures", "Mixtures",
        f"{how} The darkest (on dark paper: the lightest) is best by bits per byte averaged over "
        "the evalsets.", (panel,), note=note,
    )  # fmt: skip


def _finding(scores: Sequence[float], best: str) -> str:
    return (
        f"{len(scores)} mixtures from {min(scores):.3f} to {max(scores):.3f} bits per byte; the "
        f"best is {best}."
    )


def ranks(scores: Sequence[float]) -> list[int]:
    """Return the class of each of some scores, best first: 0 for the best."""
    return [place * RANKS // len(scores) for place in range(len(scores))]


def _simplex(
    points: np.ndarray, scores: Sequence[float], partitions: Sequence[str], best: str
) -> Panel:
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(3) / 2]])

    def draw(axes: Axes, colour: Colour) -> None:
        axes.set_axis_off()
        axes.set_aspect("equal")
        for edge in ([0, 1], [1, 2], [2, 0]):
            axes.plot(*corners[edge].T, color=colour("line"), linewidth=0.9)
        shifts = ((0, -0.05, "top"), (0, -0.05, "top"), (0, 0.04, "bottom"))
        for name, corner, (across, up, side) in zip(partitions, corners, shifts, strict=True):
            axes.text(corner[0] + across, corner[1] + up, shortened(name), ha="center", va=side)
        places = points @ corners
        classes = ranks(scores)
        for place, rank in reversed(list(zip(places, classes, strict=True))):
            axes.plot(*place, "o", color=colour(f"rank{rank}"), markersize=6,
                      markeredgecolor=colour("ground"), markeredgewidth=0.6)  # fmt: skip
        axes.plot(*places[0], "o", markersize=10, markerfacecolor="none",
                  markeredgecolor=colour("second"), markeredgewidth=1.6)  # fmt: skip
        axes.margins(0.12)
        _legend(axes, colour, scores)

    margins = (0.1, 0.1, 0.4, 0.1)
    return Panel("Mixtures on the simplex", _finding(scores, best), (3.6, 3.5), margins, draw)


def _parallel(
    points: np.ndarray, scores: Sequence[float], partitions: Sequence[str], best: str
) -> Panel:
    names = [shortened(name, 14) for name in partitions]
    turned = max(map(len, names)) > 7
    below = 0.6 + (LETTER * 0.7 * max(map(len, names)) if turned else 0.0)

    def draw(axes: Axes, colour: Colour) -> None:
        across = np.arange(len(partitions))
        for place in across:
            axes.axvline(place, color=colour("line"), linewidth=0.8, zorder=0)
        classes = ranks(scores)
        for row, rank in reversed(list(zip(points, classes, strict=True))):
            axes.plot(across, row, color=colour(f"rank{rank}"), linewidth=1.0)
        axes.plot(across, points[0], color=colour("second"), linewidth=2.2, marker="o",
                  markersize=4)  # fmt: skip
        axes.set(xlim=(-0.25, len(partitions) - 0.75), ylim=(-0.03, 1.03), ylabel="weight")
        axes.set_xticks(
            across, names, rotation=35 if turned else 0, ha="right" if turned else "center",
        )  # fmt: skip
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.tick_params(axis="x", length=0)
        _legend(axes, colour, scores)

    size = (max(3.6, 0.55 * len(partitions) + 0.9), 2.9 + below)
    margins = (0.5, 0.3, below, 0.1)
    return Panel("Weights of the mixtures", _finding(scores, best), size, margins, draw)


def _legend(axes: Axes, colour: Colour, scores: Sequence[float]) -> None:
    from matplotlib.lines import Line2D

    marks = [
        (colour("second"), f"best: {scores[0]:.3f}"),
        (colour("rank0"), f"best {100 // RANKS}%"),
        (colour(f"rank{RANKS - 1}"), f"worst, up to {scores[-1]:.3f}"),
    ]
    axes.figure.legend(
        handles=[Line2D([], [], color=tint, linewidth=2.5, label=label) for tint, label in marks],
        loc="lower left", ncols=3, columnspacing=1.0, handlelength=1.0,
        handletextpad=0.4, fontsize=8,
    )  # fmt: skip
