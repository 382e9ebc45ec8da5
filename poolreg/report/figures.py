"""The figures of the report by name, each drawn from rows that `facts` and `decisions` give.

`poolreg plot NAME` writes one of them; the page shows them all. A figure without data says in one
sentence what is missing and which command brings it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from poolreg.errors import NotFound, PoolregError
from poolreg.report import facts
from poolreg.report.blends import chosen, complete, mixtures_chart
from poolreg.report.draw import LETTER, Axes, Chart, Colour, Panel, shortened
from poolreg.report.facts import Lens, Row
from poolreg.report.palette import STEPS
from poolreg.report.scatter import MARGINS, proxy_chart
from poolreg.report.waterfall import contributions_chart, signed
from poolreg.store.registry import Registry, unknown_name

if TYPE_CHECKING:
    from poolreg.decisions.attribution import Contribution

MOST_CELLS = 40  # rows or columns of the heat map
MOST_PANELS = 24

_NOTHING = (
    "No mixture was measured yet. Measure every union of partitions with: poolreg sweep --subsets"
)


def settings_of(lens: Lens) -> dict[str, object]:
    """Return the options that make `decisions` look through the same lens."""
    from poolreg.evaluation.evaluate import Settings

    return {
        "seed": lens.seed, "settings": Settings(max_length=lens.max_length, dtype=lens.dtype)
    }  # fmt: skip


def contributions(registry: Registry, lens: Lens) -> tuple[Sequence[Contribution], str]:
    """Return each partition's contributions, or none and what is lacking."""
    from poolreg.decisions.attribution import attribute

    try:
        found = attribute(registry, list(lens.evalsets.values()), **settings_of(lens))  # type: ignore[arg-type]
    except PoolregError as error:
        return (), f"The contributions of partitions are not known: {error.message}. {error.hint}"
    return found.contributions, ""


# -- one function a figure ------------------------------------------------------------------


def heatmap(registry: Registry, lens: Lens) -> Chart:
    """Draw the change against the seed for each partition and evalset."""
    return heatmap_chart(facts.rows(registry, lens, "changes"))


def proxy(registry: Registry, lens: Lens) -> Chart:
    """Draw proxies against references."""
    return proxy_chart(facts.rows(registry, lens, "pairs"))


def contribution(registry: Registry, lens: Lens) -> Chart:
    """Draw what each partition contributes, on average and for each evalset."""
    rows, lacking = contributions(registry, lens)
    start = {row["evalset"]: row["bits_per_byte"] for row in facts.rows(registry, lens, "seed")}
    return contributions_chart(rows, start, lacking)


def mixtures(registry: Registry, lens: Lens) -> Chart:
    """Draw the mixtures by their weights and scores."""
    board = complete(facts.rows(registry, lens, "leaderboard"), len(lens.evalsets))
    found = facts.weights(registry, [row["subject"] for row in chosen(board)])
    return mixtures_chart(board, found)


def pareto(registry: Registry, lens: Lens) -> Chart:
    """Draw the compressed variants by size and quality."""
    return pareto_chart(facts.rows(registry, lens, "pareto"))


def ledger(registry: Registry, lens: Lens) -> Chart:
    """Draw the tokens trained, avoided and scored."""
    return ledger_chart(facts.rows(registry, lens, "ledger")[0])


FIGURES: dict[str, tuple[str, Callable[[Registry, Lens], Chart]]] = {
    "heatmap": ("change against the seed, partition by evalset", heatmap),
    "proxy": ("proxies against references, a panel for each evalset", proxy),
    "contributions": ("what each partition contributes (Shapley shares)", contribution),
    "mixtures": ("mixtures by their weights, coloured by score", mixtures),
    "pareto": ("size against quality of compressed variants", pareto),
    "ledger": ("tokens trained, avoided and scored", ledger),
}


def chart(registry: Registry, name: str, on: Sequence[str] = ()) -> Chart:
    """Return a figure that has something to show; raises `NotFound` with what is missing."""
    if name not in FIGURES:
        raise unknown_name("figure", name, FIGURES)
    lens = facts.find_lens(registry, on)
    made = FIGURES[name][1](registry, lens) if lens else Chart(name, name, "", lacking=_NOTHING)
    if not made.panels:
        what, _, hint = made.lacking.partition(". ")
        raise NotFound(f"nothing to draw: {what}", hint=hint)
    return made


# -- heat map -------------------------------------------------------------------------------


def heatmap_chart(changes: Sequence[Row]) -> Chart:
    """Return the chart of the rows of `changes`."""
    partitions = list(dict.fromkeys(row["partition"] for row in changes))
    evalsets = list(dict.fromkeys(sorted(row["evalset"] for row in changes)))
    if not changes:
        return Chart(
            "heatmap", "What each partition alone changes", "",
            lacking="No partition was measured alone. Measure the single partitions with: "
            "poolreg sweep --subsets --sizes 1",
        )  # fmt: skip
    left = max(len(partitions), len(evalsets)) > MOST_CELLS
    best = min(changes, key=lambda row: row["change"])
    helped = sum(row["change"] < 0 for row in changes)
    finding = (
        f"Training on one partition lowers bits per byte in {helped} of {len(changes)} cells; most "
        f"of all {best['partition']} on {best['evalset']}, by {-best['change']:.3f}."
    )
    cells = {(row["partition"], row["evalset"]): row["change"] for row in changes}
    panel = _heat_panel(partitions[:MOST_CELLS], evalsets[:MOST_CELLS], cells, finding)
    return Chart(
        "heatmap", "What each partition alone changes",
        "Bits per byte against the seed model after training on one partition (column), on each "
        "evalset (row). Blue and negative: better than the seed; orange and positive: worse.",
        (panel,),
        note=f"Only the first {MOST_CELLS} of each are drawn; the table below has all." if left
        else "",
    )  # fmt: skip


def step_of(change: float, largest: float) -> int:
    """Return the class of a change on the diverging scale, 0 to 10, 5 for (nearly) none."""
    if largest <= 0 or not math.isfinite(change):
        return STEPS
    return STEPS + max(-STEPS, min(STEPS, round(STEPS * change / largest)))


def _heat_panel(
    partitions: Sequence[str], evalsets: Sequence[str], cells: dict[tuple[str, str], float],
    finding: str,
) -> Panel:  # fmt: skip
    rows, columns = ([shortened(name, 14) for name in names] for names in (evalsets, partitions))
    turned = max(map(len, columns)) > 7
    above = 0.12 + (LETTER * 0.7 * max(map(len, columns)) if turned else 0.16)
    margins = (0.12 + LETTER * max(map(len, rows)), 0.5 if turned else 0.05, 0.05, above)
    size = (sum(margins[:2]) + 0.53 * len(columns), sum(margins[2:]) + 0.3 * len(rows))

    def draw(axes: Axes, colour: Colour) -> None:
        from matplotlib.patches import Rectangle

        largest = max((abs(value) for value in cells.values()), default=0.0)
        for across, partition in enumerate(partitions):
            for down, evalset in enumerate(evalsets):
                value = cells.get((partition, evalset))
                if value is None:
                    axes.text(across, down, "–", ha="center", va="center", color=colour("muted"))
                    continue
                step = step_of(value, largest)
                axes.add_patch(
                    Rectangle((across - 0.48, down - 0.46), 0.96, 0.92, linewidth=0, clip_on=False,
                              facecolor=colour(f"step{step}"))
                )  # fmt: skip
                axes.text(across, down, signed(value), ha="center",
                          va="center", fontsize=8.5, color=colour(f"on{step}"))  # fmt: skip
        axes.set(xlim=(-0.5, len(partitions) - 0.5), ylim=(len(evalsets) - 0.5, -0.5))
        axes.set_xticks(
            range(len(columns)), columns, rotation=35 if turned else 0,
            ha="left" if turned else "center",
        )  # fmt: skip
        axes.set_yticks(range(len(rows)), rows)
        axes.tick_params(length=0, labelcolor=colour("ink"), top=False, labeltop=True,
                         labelbottom=False)  # fmt: skip
        axes.spines[:].set_visible(False)

    return Panel("Change against the seed", finding, size, margins, draw)


# -- variants and ledger ----------------------------------------------------------------------


def pareto_chart(rows: Sequence[Row]) -> Chart:
    """Return the chart of the rows of `pareto`, a panel for each parent and evalset."""
    title = "Compressed variants: size against quality"
    if not rows:
        return Chart(
            "pareto", title, "",
            lacking="There is no measured compressed variant. Make one with: poolreg compress EXPR "
            "--ratio 0.3, then measure it with: poolreg eval VARIANT",
        )  # fmt: skip
    places = list(dict.fromkeys((row["parent"], row["evalset"]) for row in rows))
    panels = [
        _pareto_panel(place, [row for row in rows if (row["parent"], row["evalset"]) == place])
        for place in places[:MOST_PANELS]
    ]
    left = len(places) - MOST_PANELS
    return Chart(
        "pareto", title,
        "Each point is a model: across, the size of its weights; up, bits per byte. Points on the "
        "line are the front: nothing as small is as good. The square is the model that was "
        "compressed; a cross is measured on the text that it was calibrated on, which flatters.",
        tuple(panels), note=f"{left} more are not drawn; see the table." if left > 0 else "",
    )  # fmt: skip


def _pareto_panel(place: tuple[str, str], rows: Sequence[Row]) -> Panel:
    front = sorted((r["bytes"] / 1e6, r["bits_per_byte"]) for r in rows if r["on_front"])

    def draw(axes: Axes, colour: Colour) -> None:
        axes.plot(*zip(*front, strict=True), color=colour("line"), linewidth=1.2, zorder=0)
        for row in rows:
            dense = row["method"] == "dense"
            mark = "s" if dense else "x" if row["calibrated_on_it"] else "o"
            tint = colour("second" if dense else "accent" if row["on_front"] else "muted")
            axes.plot(row["bytes"] / 1e6, row["bits_per_byte"], mark, color=tint, markersize=5)
        axes.set(xlabel="weights, MB", ylabel="bits per byte")
        axes.locator_params(nbins=5)
        axes.margins(0.1)

    finding = (
        f"{len(rows)} models made from {place[0]}, {len(front)} on the front, from "
        f"{front[0][0]:.3g} to {front[-1][0]:.3g} MB."
    )
    return Panel(f"{place[0]} on {place[1]}", finding, (3.0, 2.5), MARGINS, draw)


def ledger_chart(row: Row) -> Chart:
    """Return the chart of the ledger."""
    bars = [
        ("trained", row["tokens_trained"], "accent"),
        ("training avoided", row["tokens_avoided"], "second"),
        ("scored", row["tokens_scored"], "muted"),
    ]
    if not any(value for _, value, _ in bars):
        return Chart("ledger", "Compute", "", lacking="Nothing was trained or measured yet. Start "
                     "with: poolreg train seed")  # fmt: skip

    def draw(axes: Axes, colour: Colour) -> None:
        longest = max(value for _, value, _ in bars)
        for down, (label, value, part) in enumerate(bars):
            axes.barh(down, value, height=0.55, color=colour(part))
            axes.text(value + 0.02 * longest, down, tokens(value), va="center")
            axes.text(-0.03 * longest, down, label, va="center", ha="right")
        axes.set(xlim=(0, 1.3 * longest), ylim=(len(bars) - 0.5, -0.5), xticks=[], yticks=[])
        axes.spines[["bottom"]].set_visible(False)

    said = (
        f"{tokens(row['tokens_trained'])} tokens trained, {tokens(row['tokens_avoided'])} tokens "
        f"of training avoided, {tokens(row['tokens_scored'])} tokens scored."
    )
    return Chart(
        "ledger", "Compute spent and avoided",
        "Tokens: trained here, those that training each measured mixture would have taken, and "
        "scored. A token scored costs about a third of a token trained.",
        (Panel("Compute in tokens", said, (3.6, 1.2), (1.25, 0.05, 0.05, 0.05), draw),),
    )  # fmt: skip


def tokens(count: float) -> str:
    """Return a number of tokens as people say it."""
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:.0f}"
