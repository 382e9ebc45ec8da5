"""Proxy against reference: one small panel for each evalset.

For each training budget an affine fit is drawn, and where there are enough references a band that
a further reference would fall into nine times out of ten, from the residuals that each reference
has when it is left out of the fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from poolreg.report.draw import Axes, Chart, Colour, Panel
from poolreg.report.facts import Row

MOST = 24  # panels; more are left to `poolreg plot proxy --on`
FEWEST_FIT = 5  # references; below, a statistic says nothing
FEWEST_BAND = 8
LEVEL = 0.9
BUDGETS = {"same": "matched budget", "sum": "summed budget"}
_MARKS = {"same": ("accent", "o"), "sum": ("second", "s"), "unknown": ("muted", "^")}
_LACKING = (
    "There is no reference yet, so nothing shows how far a proxy can be trusted. Train some with: "
    "poolreg train references"
)

MARGINS = (0.62, 0.08, 0.44, 0.26)

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """The references of one budget: bits per byte, fit and half width of the band.

    `agreeing` of `compared` pairs of references are ranked as their proxies are; ties count ½.
    """

    budget: str
    proxy: Vector
    reference: Vector
    slope: float | None
    intercept: float | None
    half_width: float | None
    agreeing: float
    compared: int


def fitted(budget: str, proxy: Vector, reference: Vector) -> Series:
    """Fit reference = intercept + slope · proxy by least squares.

    The residual of a point that is left out is e / (1 − h) with its leverage h, so no fit is
    repeated. Of n such residuals the ⌈0.9 (n + 1)⌉-th smallest is the half width of the band.
    """
    count, spread = len(proxy), float(np.ptp(proxy)) if len(proxy) else 0.0
    slope = intercept = half = None
    if count >= FEWEST_FIT and spread > 0:
        centred = proxy - proxy.mean()
        squares = float(centred @ centred)
        slope = float(centred @ reference) / squares
        intercept = float(reference.mean() - slope * proxy.mean())
        leverage = 1 / count + centred**2 / squares
        if count >= FEWEST_BAND and float(leverage.max()) < 1 - 1e-9:
            left_out = np.abs((reference - intercept - slope * proxy) / (1 - leverage))
            place = min(math.ceil(LEVEL * (count + 1)), count)
            half = float(np.sort(left_out)[place - 1])
    upper = np.triu_indices(count, 1)
    signs = [np.sign(values[upper[0]] - values[upper[1]]) for values in (proxy, reference)]
    product = signs[0] * signs[1]
    agreeing = float((product > 0).sum() + 0.5 * (product == 0).sum())
    return Series(budget, proxy, reference, slope, intercept, half, agreeing, len(product))


def series_of(pairs: Sequence[Row]) -> list[Series]:
    """Return the series of one evalset's rows of `pairs`, one for each budget."""
    found = []
    for budget in sorted({row["budget"] for row in pairs}):
        chosen = [row for row in pairs if row["budget"] == budget]
        proxy, reference = (
            np.array([row[key] for row in chosen], dtype=float) for key in ("proxy", "reference")
        )
        whole = np.isfinite(proxy) & np.isfinite(reference)
        found.append(fitted(budget, proxy[whole], reference[whole]))
    return [series for series in found if len(series.proxy)]


def proxy_chart(pairs: Sequence[Row]) -> Chart:
    """Return the chart of the rows of `pairs`, one panel for each evalset."""
    evalsets = list(dict.fromkeys(row["evalset"] for row in pairs))
    panels = []
    for evalset in evalsets[:MOST]:
        series = series_of([row for row in pairs if row["evalset"] == evalset])
        if series:
            panels.append(_panel(evalset, series))
    left = len(evalsets) - MOST
    return Chart(
        "proxy",
        "Proxy against reference",
        "Each point is a mixture: across, the average of its unit models; up, a model really "
        "trained on it, both in bits per byte, on scales of their own. On the dashed line they "
        "are equal. "
        "Ranking needs points in order, not on the line; the solid line is the fit to them, and "
        "the band holds a further reference nine times out of ten. A matched budget is that of "
        "one unit, a summed one that of all units of the mixture.",
        tuple(panels),
        "" if panels else _LACKING,
        f"{left} more evalsets are not drawn; see poolreg plot proxy --on NAME."
        if left > 0
        else "",
    )


def _panel(evalset: str, series: Sequence[Series]) -> Panel:
    def draw(axes: Axes, colour: Colour) -> None:
        across = _limits([one.proxy for one in series])
        up = _limits([one.reference for one in series])
        ends = [min(across[0], up[0]), max(across[1], up[1])]
        axes.plot(ends, ends, color=colour("muted"), linewidth=0.9, dashes=(3, 3))
        for one in series:
            _draw_series(axes, colour, one)
        axes.set(xlim=across, ylim=up, xlabel="proxy", ylabel="reference")
        axes.locator_params(nbins=5)
        # Above the plot, where no point is.
        axes.legend(
            loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=len(series), handletextpad=0.2,
            columnspacing=1.0, borderaxespad=0.2,
        )  # fmt: skip

    return Panel(evalset, finding(series), (3.0, 2.7), MARGINS, draw)


def _limits(values: Sequence[Vector]) -> tuple[float, float]:
    """Return the ends of an axis that shows all values."""
    every = np.concatenate(values)
    margin = 0.06 * float(np.ptp(every)) or 0.1
    return float(every.min()) - margin, float(every.max()) + margin


def _draw_series(axes: Axes, colour: Colour, series: Series) -> None:
    part, marker = _MARKS.get(series.budget, _MARKS["unknown"])
    tint = colour(part)
    if series.slope is not None and series.intercept is not None:
        ends = np.array([series.proxy.min(), series.proxy.max()])
        line = series.intercept + series.slope * ends
        axes.plot(ends, line, color=tint, linewidth=1.1)
        if series.half_width is not None:
            half = series.half_width
            axes.fill_between(ends, line - half, line + half, color=tint, alpha=0.15, linewidth=0)
    axes.plot(
        series.proxy, series.reference, marker, color=tint, markersize=4, markeredgewidth=0.8,
        markerfacecolor=tint if part == "accent" else "none",
        label=BUDGETS.get(series.budget, "unknown budget").removesuffix(" budget"),
    )  # fmt: skip


def finding(series: Sequence[Series]) -> str:
    """Return what a panel shows in words."""
    parts = []
    for one in series:
        budget = BUDGETS.get(one.budget, "unknown budget")
        if len(one.proxy) < FEWEST_FIT:
            parts.append(
                f"only {len(one.proxy)} references of {budget}: too few to judge, {FEWEST_FIT} "
                "are needed"
            )
            continue
        off = float(np.mean(one.proxy - one.reference))
        parts.append(
            f"{len(one.proxy)} references of {budget}: proxies put {one.agreeing:g} of "
            f"{one.compared} pairs in the order of their references and lie {abs(off):.3f} bits "
            f"per byte {'below' if off < 0 else 'above'} them on average"
        )
    said = "; ".join(parts)
    return f"{said[0].upper()}{said[1:]}."
