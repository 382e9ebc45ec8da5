"""From a chart to a picture: SVG for the page, SVG or PNG for a file.

A chart is a list of panels, and a panel knows how to draw itself on axes. On the page every panel
is an SVG of its own, without fixed colours, fonts or size, with its finding in words for those who
cannot see it; in a file all panels stand in one picture. The same panels always give the same
bytes.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from poolreg.errors import Conflict, MissingPackage, UsageError
from poolreg.files import write_atomic
from poolreg.report.palette import light, stand_in, variables

Colour = Callable[[str], str]
Axes = Any  # matplotlib has no types to speak of
FORMATS = ("svg", "png")
LETTER = 0.078  # inches that a letter of a label takes, on average
_NARROW = 4.4  # inches; at 400 pixels such a figure is shrunk by a seventh, wider ones scroll
_TITLE = 0.34  # inches above a panel of a file


@dataclass(frozen=True)
class Panel:
    """One small picture: its title, what it shows in words, and how it is drawn.

    `size` is its width and height, `margins` the room for text around its axes (left, right,
    bottom, top), all in inches.
    """

    title: str
    finding: str
    size: tuple[float, float]
    margins: tuple[float, float, float, float]
    draw: Callable[[Axes, Colour], None]

    @property
    def wide(self) -> bool:
        """Whether it is to be scrolled, not shrunk, where there is little room."""
        return self.size[0] > _NARROW


@dataclass(frozen=True)
class Chart:
    """A figure of the report: how to read it, and its panels or why there are none."""

    name: str
    title: str
    reading: str
    panels: tuple[Panel, ...] = ()
    lacking: str = ""
    note: str = ""


def need(package: str) -> None:
    """Raise `MissingPackage` if a package of the extra `report` is not installed."""
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise MissingPackage(
            f"the report needs {package}, which is not installed",
            hint="pip install 'poolreg[report]'",
        )


def shortened(name: str, room: int = 16) -> str:
    """Return a name of at most `room` letters, the middle left out of a longer one."""
    if len(name) <= room:
        return name
    tail = (room - 1) // 3
    return f"{name[: room - 1 - tail]}…{name[len(name) - tail :]}"


def inline_svg(panel: Panel, key: str) -> str:
    """Return a panel as an SVG element for the page; `key` is what its ids begin with."""
    raw = _rendered([panel], "svg", stand_in, titled=False).decode()
    return variables(_slim(raw, panel, key))


def write_chart(
    chart: Chart, out: Path, *, columns: int = 3, dpi: int = 150, force: bool = False
) -> None:
    """Write all panels of a chart to one .svg or .png file.

    Raises `UsageError` for another ending, `Conflict` if the file is there and not `force`.
    """
    form = out.suffix.lower().lstrip(".")
    if form not in FORMATS:
        raise UsageError(
            f"{out.name} ends in neither .svg nor .png", hint="write for example -o figure.svg"
        )
    refuse_existing(out, force=force)
    write_atomic(out, _rendered(chart.panels, form, light, columns=columns, dpi=dpi))


def classes(svg: str, known: dict[str, str]) -> str:
    """Return an SVG with classes in place of styles; new styles are added to `known`."""

    def classed(match: re.Match[str]) -> str:
        return re.sub(
            r' style="([^"]*)"',
            lambda style: f' class="{known.setdefault(style[1].strip(), f"f{len(known)}")}"',
            match[0],
        )

    return re.sub(r"<[^>]*>", classed, svg)


def refuse_existing(out: Path, *, force: bool) -> None:
    """Raise `Conflict` if `out` would be overwritten, unless `force`."""
    if out.exists() and not force:
        raise Conflict(f"{out} is there already", hint="choose another name, or pass --force")


def _rendered(
    panels: Sequence[Panel], form: str, colour: Colour, *, titled: bool = True, columns: int = 3,
    dpi: int = 150,
) -> bytes:  # fmt: skip
    need("matplotlib")
    with _styled(colour):
        from matplotlib.figure import Figure

        across = min(columns, len(panels))
        down = math.ceil(len(panels) / across)
        above = _TITLE if titled else 0.0
        width = max(panel.size[0] for panel in panels)
        height = max(panel.size[1] for panel in panels) + above
        figure = Figure(figsize=(width * across, height * down))
        for place, panel in enumerate(panels):
            corner = place % across * width, (down - place // across) * height - above
            _draw_at(figure, panel, corner, colour)
            if titled:
                spot = (corner[0] + 0.08) / (width * across), (corner[1] + 0.1) / (height * down)
                figure.text(*spot, shortened(panel.title, 40), fontsize=10, weight="bold")
        file = io.BytesIO()
        # Without a date, or the same pool would not give the same bytes.
        metadata = {"Date": None} if form == "svg" else {"Software": None}
        figure.savefig(file, format=form, dpi=dpi, metadata=metadata, transparent=not titled)
    return file.getvalue()


def _draw_at(figure: Any, panel: Panel, corner: tuple[float, float], colour: Colour) -> None:
    """Draw a panel whose upper left corner is `corner`, in inches from the lower left one."""
    left, right, bottom, top = panel.margins
    width, height = panel.size
    across, down = figure.get_size_inches()
    place = (
        (corner[0] + left) / across, (corner[1] - height + bottom) / down,
        (width - left - right) / across, (height - bottom - top) / down,
    )  # fmt: skip
    panel.draw(figure.add_axes(place), colour)


@contextlib.contextmanager
def _styled(colour: Colour) -> Iterator[None]:
    import matplotlib as mpl

    ink, muted = colour("ink"), colour("muted")
    style = {
        "svg.fonttype": "none", "svg.hashsalt": "poolreg", "text.parse_math": False,
        "font.size": 9, "text.color": ink, "axes.labelcolor": muted, "axes.labelsize": 8.5,
        "axes.edgecolor": colour("line"), "axes.facecolor": "none", "axes.linewidth": 0.8,
        "axes.spines.top": False, "axes.spines.right": False, "axes.unicode_minus": True,
        "axes.titlecolor": ink, "figure.facecolor": colour("ground"), "xtick.color": muted,
        "ytick.color": muted, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
        "xtick.major.width": 0.8, "ytick.major.width": 0.8, "xtick.major.size": 3,
        "ytick.major.size": 3, "legend.frameon": False, "legend.fontsize": 8.5,
        "legend.labelcolor": ink,
    }  # fmt: skip
    with (
        mpl.rc_context({**mpl.rcParamsDefault, "backend": "agg", **style}),
        warnings.catch_warnings(),
    ):
        # Names may use letters that the measuring font lacks; the reader's font has them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


_DROPPED = re.compile(
    r"<\?xml.*?\?>|<!DOCTYPE.*?>|<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>"
    r"|<g id=\"patch_1\">.*?</g>",
    re.DOTALL,
)


def _slim(svg: str, panel: Panel, key: str) -> str:
    """Return matplotlib's SVG without what a page does not need, and with words for its content.

    Only tags are changed: what stands between them may be a user's.
    """
    svg = _DROPPED.sub("", svg)
    named = dict.fromkeys(re.findall(r"(?:url\(|href=\")#([^)\"]+)", svg))
    used = {name: f"{key}-{number}" for number, name in enumerate(named)}
    kept: list[bool] = []  # of the groups that are open: whether their tags stay

    def slim_tag(match: re.Match[str]) -> str:
        tag = _slim_attributes(match[0], used)
        if tag == "<g/>":
            return ""
        if tag == "</g>":
            return tag if kept.pop() else ""
        if tag.startswith("<g"):
            kept.append(tag != "<g>")
            return tag if kept[-1] else ""
        return tag

    body = re.sub(r"\s*\n\s*", "\n", re.sub(r"<[^>]*>", slim_tag, svg).strip())
    return _head(panel, key) + body[body.index(">") + 1 :]


def _slim_attributes(tag: str, used: dict[str, str]) -> str:
    tag = re.sub(r"\s+", " ", tag.replace("xlink:href", "href"))
    tag = re.sub(r' id="([^"]*)"', lambda m: f' id="{used[m[1]]}"' if m[1] in used else "", tag)
    tag = re.sub(r"(url\(|href=\")#([^)\"]+)", lambda m: f"{m[1]}#{used[m[2]]}", tag)
    tag = re.sub(r' transform="rotate\(-0 [^"]*"', "", tag)
    tag = re.sub(r" font-family: [^;\"]*;", "", tag)
    return re.sub(r' (?!style=)[a-z-]+="[^"]*"', lambda m: _rounded(m[0]), tag)


def _rounded(places: str) -> str:
    """Round coordinates to a tenth of a point, which no eye can tell."""
    return re.sub(r"-?\d+\.\d{2,}", lambda m: f"{float(m[0]):.1f}".removesuffix(".0"), places)


def _head(panel: Panel, key: str) -> str:
    width, height = (72 * side for side in panel.size)
    kind = ' class="wide"' if panel.wide else ""
    return (
        f'<svg{kind} width="{width / 0.75:.0f}" height="{height / 0.75:.0f}" '
        f'viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-labelledby="{key}-title {key}-desc">'
        f'<title id="{key}-title">{escape(panel.title)}</title>'
        f'<desc id="{key}-desc">{escape(panel.finding)}</desc>'
    )
