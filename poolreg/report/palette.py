"""The colours of the report, each by its part, for light and dark paper.

Figures are drawn in stand-in colours, one for each part; on the page these become CSS variables,
so that a figure follows the reader's light or dark setting, and in a file the light colours.
Differences run from blue to orange, which colour-blind readers tell apart, and text on a coloured
ground is black or white, whichever is easier to read.
"""

from __future__ import annotations

from poolreg.errors import UsageError

STEPS = 5  # classes on each side of the diverging scale
RANKS = 7  # classes of the scale from best to worst

Colours = dict[str, tuple[str, str]]


def _mixed(one: str, other: str, share: float) -> str:
    """Return the colour `share` of the way from one to another."""
    pairs = zip(_channels(one), _channels(other), strict=True)
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in pairs)


def _channels(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours by WCAG 2, from 1 to 21."""
    lights = sorted(_luminance(colour) + 0.05 for colour in (one, other))
    return lights[1] / lights[0]


def _luminance(colour: str) -> float:
    linear = [
        c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4
        for c in (value / 255 for value in _channels(colour))
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _readable(ground: str) -> str:
    return max(("#ffffff", "#0c0e11"), key=lambda ink: contrast(ink, ground))


def _scales() -> Colours:
    middle, better, worse = ("#eef1f4", "#262d35"), ("#0a4f94", "#79bcfb"), ("#a84300", "#f7a659")
    colours: Colours = {}
    for step in range(-STEPS, STEPS + 1):
        end = better if step < 0 else worse
        ground = [_mixed(middle[i], end[i], abs(step) / STEPS) for i in (0, 1)]
        colours[f"step{step + STEPS}"] = ground[0], ground[1]
        colours[f"on{step + STEPS}"] = _readable(ground[0]), _readable(ground[1])
    for rank in range(RANKS):
        share = rank / (RANKS - 1)
        colours[f"rank{rank}"] = (
            _mixed("#08427f", "#cfd8e0", share),
            _mixed("#b5dafe", "#3c4854", share),
        )
    return colours


COLOURS: Colours = {
    "ink": ("#1b1f24", "#e7eaed"),
    "muted": ("#56616c", "#a3adb8"),
    "line": ("#d4dae0", "#3a434c"),
    "ground": ("#ffffff", "#14171b"),
    "raised": ("#f5f7f9", "#1d2227"),
    "accent": ("#0b5cad", "#7ab8f5"),
    "second": ("#a84300", "#f7a659"),
    **_scales(),
}

# What a figure is drawn with where colours become variables afterwards.
STAND_INS = {name: f"#a0{number:04x}" for number, name in enumerate(COLOURS)}


def light(name: str) -> str:
    """Return a part's colour on white paper."""
    return COLOURS[name][0]


def stand_in(name: str) -> str:
    """Return a part's stand-in colour."""
    return STAND_INS[name]


def variables(svg: str) -> str:
    """Return a drawing with its stand-in colours replaced by CSS variables."""
    for name, colour in STAND_INS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def declarations(theme: str) -> str:
    """Return the CSS variables of the theme light or dark; raises `UsageError` for another."""
    if theme not in ("light", "dark"):
        raise UsageError(f"no theme is named {theme}", hint="use light or dark")
    return "".join(f"--{name}:{both[theme == 'dark']};" for name, both in COLOURS.items())
