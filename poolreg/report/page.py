"""The report: one static page that needs nothing but itself.

Style, script, figures and data stand in the file; its content security policy forbids every
request. Names and labels are users' text and are escaped wherever they stand. The same pool gives
the same bytes: no clock is read, and the page tells its state by the pool's id, the number of
evaluations and the newest record.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from poolreg.errors import PoolregError
from poolreg.files import write_atomic
from poolreg.progress import SILENT, Progress
from poolreg.report import facts, figures, tables
from poolreg.report.blends import chosen, complete, mixtures_chart
from poolreg.report.draw import Chart, classes, inline_svg, need, refuse_existing
from poolreg.report.facts import Lens, Overview, Row
from poolreg.report.palette import declarations
from poolreg.report.scatter import proxy_chart
from poolreg.report.tables import PageTable
from poolreg.report.waterfall import contributions_chart, signed
from poolreg.report.words import Answer, answer
from poolreg.store.registry import Registry

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")

_STATEMENTS = (
    "leaderboard", "seed", "best", "changes", "pairs", "pareto", "ledger", "missing",
)  # fmt: skip
_SWEEP = "Measure mixtures with: poolreg sweep --subsets"
_REFERENCES = "There is no reference. Train some with: poolreg train references"


@dataclass(frozen=True)
class Page:
    """All that the template shows. Without a `lens` nothing is measured and the rest is empty."""

    overview: Overview
    lens: Lens | None
    answer: Answer | None
    charts: tuple[Chart, ...]
    tables: tuple[PageTable, ...]
    missing: int


def write_report(
    registry: Registry, out: Path, on: Sequence[str] = (), *, force: bool = False,
    progress: Progress = SILENT,
) -> Path:  # fmt: skip
    """Write the report to a file; raises `Conflict` if it is there already and not `force`."""
    refuse_existing(out, force=force)
    write_atomic(out, report(registry, on, progress=progress).encode())
    return out


def report(registry: Registry, on: Sequence[str] = (), *, progress: Progress = SILENT) -> str:
    """Return the report as HTML, of the evalsets named or of all; nothing is measured for it."""
    need("jinja2")
    need("matplotlib")
    return render(gather(registry, on), progress=progress)


def gather(registry: Registry, on: Sequence[str] = ()) -> Page:
    """Collect what the page shows."""
    lens = facts.find_lens(registry, on)
    about = facts.overview(registry)
    if lens is None:
        return Page(about, None, None, (), (), 0)
    found = {
        name: facts.rows(registry, lens, name)
        for name in _STATEMENTS
    }  # fmt: skip
    verdict, trust = _trust(registry, lens, bool(found["pairs"]))
    contributions, lacking = figures.contributions(registry, lens)
    board = complete(found["leaderboard"], len(lens.evalsets))
    seed = {row["evalset"]: row["bits_per_byte"] for row in found["seed"]}
    charts = (
        figures.heatmap_chart(found["changes"]),
        proxy_chart(found["pairs"]),
        contributions_chart(contributions, seed, lacking),
        mixtures_chart(board, facts.weights(registry, [row["subject"] for row in chosen(board)])),
        *([figures.pareto_chart(found["pareto"])] if found["pareto"] else []),
        figures.ledger_chart(found["ledger"][0]),
    )
    words = answer(lens, board, found["best"], seed=seed, ledger=found["ledger"][0],
                   verdict=verdict)  # fmt: skip
    made = _tables(lens, found, on, trust=trust, contributions=contributions)
    return Page(about, lens, words, charts, made, len(found["missing"]))


def _trust(registry: Registry, lens: Lens, known: bool) -> tuple[tuple[str, ...], Any]:
    if not known:
        return (_REFERENCES,), ()
    from poolreg.decisions.trust import proxy_report

    try:
        found = proxy_report(
            registry, list(lens.evalsets.values()), run_missing=False,
            **figures.settings_of(lens),  # type: ignore[arg-type]
        )  # fmt: skip
    except PoolregError as error:
        return (f"Nothing can be said about trust: {error.message}. {error.hint}",), ()
    return found.verdict, found.rows


def _tables(
    lens: Lens, found: dict[str, list[Row]], on: Sequence[str], *, trust: Any, contributions: Any
) -> tuple[PageTable, ...]:  # fmt: skip
    def query(name: str, title: str, lacking: str, statement: str = "") -> PageTable:
        rows = found[statement or name]
        return tables.of_query(lens, name, title, rows, lacking=lacking, statement=statement)

    return (
        query("leaderboard", "Leaderboard", _SWEEP),
        query("best", "Best for each evalset", _SWEEP),
        query("changes", "Each partition alone against the seed", _SWEEP),
        query("proxies", "Proxies beside references", _REFERENCES, "pairs"),
        tables.of_trust(trust, on, lacking=_REFERENCES),
        tables.of_contributions(
            contributions, on, lacking="Measure what is missing with: poolreg attribution --measure"
        ),
        query("variants", "Compressed variants", "There is none. Make one with: poolreg compress "
              "EXPR --ratio 0.3", "pareto"),
        query("missing", "Missing cells", "Nothing is missing: every known mixture was measured on "
              "every evalset shown here."),
    )  # fmt: skip


def render(page: Page, *, progress: Progress = SILENT) -> str:
    """Return the page as HTML; draws its figures, whose number is the progress."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    progress.start("drawing", sum(len(chart.panels) for chart in page.charts), "figures")
    drawn = {chart.name: [] for chart in page.charts}  # type: dict[str, list[Markup]]
    known: dict[str, str] = {}  # style → class of the figures
    for chart in page.charts:
        for number, panel in enumerate(chart.panels):
            svg = inline_svg(panel, f"{chart.name}-{number}")
            drawn[chart.name].append(Markup(classes(svg, known)))
            progress.advance(1)
    script, style = _part("page.js"), _style(known)
    made = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(_part("template.html.j2"))
    text = made.render(
        page=page, charts={chart.name: chart for chart in page.charts}, drawn=drawn,
        style=Markup(style), script=Markup(script), data=Markup(tables.embedded(page.tables)),
        policy=policy(script, style), many=lambda number: f"{number:,}",
        signed=signed,
        breakable=lambda text: Markup("+<wbr>").join(text.split("+")),
    )  # fmt: skip
    # Labels come from strangers; a browser ignores most of these, a terminal does not.
    return _CONTROLS.sub("\ufffd", text)


def _style(classes: dict[str, str]) -> str:
    return _part("page.css") + (
        f":root{{{declarations('light')}}}"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{declarations('dark')}}}}}"
        + "".join(f"svg .{name}{{{style}}}" for style, name in classes.items())
    )


def policy(script: str, style: str) -> str:
    """Return a content security policy: this script, this style sheet, and no request at all."""
    script, style = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for text in (script, style)
    )
    return (
        f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
