"""Figures: what they say, that they are drawn alike every time, and what they do with odd data."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
import synthetic

from poolreg import Pool
from poolreg.decisions.attribution import Contribution
from poolreg.errors import Conflict, MissingPackage, NotFound, UsageError
from poolreg.report import blends, draw, figures, palette, scatter, waterfall
from poolreg.report.draw import Panel


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pool of four partitions and three evalsets, with references of two budgets."""
    root = tmp_path_factory.mktemp("figures") / "pool"
    registry = synthetic.synthetic_pool(
        root, ["a", "b", "c", "d"], ["x", "y", "z"], references=9, budgets=("same", "sum")
    )
    yield registry
    registry.close()


# -- colours --------------------------------------------------------------------------------


@pytest.mark.parametrize("theme", [0, 1])
def test_text_can_be_read_on_its_ground(theme):
    colour = {name: both[theme] for name, both in palette.COLOURS.items()}
    for step in range(2 * palette.STEPS + 1):
        assert palette.contrast(colour[f"on{step}"], colour[f"step{step}"]) >= 4.5
    for name in ("ink", "muted", "accent", "second"):
        assert palette.contrast(colour[name], colour["ground"]) >= 4.5
    assert palette.contrast(colour["muted"], colour["raised"]) >= 4.5


def test_contrast_is_that_of_wcag():
    assert palette.contrast("#000000", "#ffffff") == pytest.approx(21)
    assert palette.contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


def test_stand_ins_are_not_confused():
    assert len(set(palette.STAND_INS.values())) == len(palette.COLOURS)
    for name, colour in palette.STAND_INS.items():
        assert palette.variables(f"fill: {colour}") == f"fill: var(--{name})"
        assert re.fullmatch(r"[a-z]+[0-9]*", name)  # a CSS variable may hold no sign
    with pytest.raises(UsageError, match="no theme is named sepia"):
        palette.declarations("sepia")


# -- proxy against reference ----------------------------------------------------------------


def test_band_is_that_of_fits_with_each_point_left_out():
    random = np.random.default_rng(0)
    proxy = random.uniform(2, 3, 12)
    reference = 0.3 + 0.9 * proxy + 0.05 * random.standard_normal(12)
    found = scatter.fitted("same", proxy, reference)
    slope, intercept = np.polyfit(proxy, reference, 1)
    assert (found.slope, found.intercept) == pytest.approx((slope, intercept))
    left_out = []
    for i in range(12):
        others = np.arange(12) != i
        fit = np.polyfit(proxy[others], reference[others], 1)
        left_out.append(abs(reference[i] - np.polyval(fit, proxy[i])))
    assert found.half_width == pytest.approx(sorted(left_out)[math.ceil(0.9 * 13) - 1])


def test_pairs_in_order_are_counted_with_ties_as_halves():
    found = scatter.fitted("same", np.array([1.0, 2.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0, 2.5]))
    assert (found.agreeing, found.compared) == (4.5, 6)


def test_few_references_are_drawn_but_not_judged():
    found = scatter.fitted("same", np.arange(4.0), np.arange(4.0))
    assert found.slope is None
    assert "only 4 references of matched budget: too few" in scatter.finding([found]).lower()
    assert scatter.fitted("same", np.arange(7.0), np.arange(7.0)).half_width is None
    assert scatter.fitted("same", np.ones(9), np.arange(9.0)).slope is None


def test_budgets_stand_apart(made):
    chart = figures.chart(made, "proxy")
    assert [panel.title for panel in chart.panels] == ["x", "y", "z"]
    assert "9 references of matched budget" in chart.panels[0].finding
    assert "9 references of summed budget" in chart.panels[0].finding


def test_values_that_are_not_finite_are_left_out():
    row = {"evalset": "x", "budget": "same", "proxy": math.nan, "reference": 1.0}
    assert scatter.series_of([row]) == []
    assert scatter.proxy_chart([row]).lacking


# -- contributions --------------------------------------------------------------------------


def contribution(evalset, partition, shapley, error=None):
    return Contribution(evalset, partition, shapley, error, 0.0, 0.0, 0.0)


def test_waterfall_ends_where_the_shares_lead(made):
    chart = figures.chart(made, "contributions")
    board = {row[0]: row[1] for row in made.catalog.sandbox(
        "SELECT evalset, bits_per_byte FROM scores WHERE label = 'a+b+c+d'").rows}  # fmt: skip
    seed = {row[0]: row[1] for row in made.catalog.sandbox(
        "SELECT evalset, bits_per_byte FROM scores WHERE kind = 'seed'").rows}  # fmt: skip
    assert [panel.title for panel in chart.panels] == [waterfall.AVERAGE, "x", "y", "z"]
    for panel in chart.panels[1:]:
        start, end = seed[panel.title], board[panel.title]
        assert f"From {start:.3f} to {end:.3f} bits per byte" in panel.finding
    mean = [sum(values.values()) / 3 for values in (seed, board)]
    assert f"From {mean[0]:.3f} to {mean[1]:.3f}" in chart.panels[0].finding


def test_averages_over_evalsets():
    one = [waterfall.Step("a", -1.0, 0.3), waterfall.Step("b", 0.5, 0.0)]
    other = [waterfall.Step("a", -2.0, 0.4), waterfall.Step("b", 0.0, 0.0)]
    assert waterfall.averaged([one, other]) == [
        waterfall.Step("a", -1.5, pytest.approx(0.25)), waterfall.Step("b", 0.25, 0.0)
    ]  # fmt: skip


def test_many_partitions_are_summed_up():
    rows = [contribution("x", f"p{n:02d}", -0.01 * n, 0.01) for n in range(40)]
    chart = waterfall.contributions_chart(rows, {"x": 3.0})
    svg = draw.inline_svg(chart.panels[0], "k")
    assert f">{40 - waterfall.MOST_STEPS + 1} others<" in svg
    assert ">p39<" in svg
    assert ">p01<" not in svg


def test_what_lacks_is_told():
    assert "attribution --measure" in waterfall.contributions_chart([], {}).lacking
    rows = [contribution("x", "a", -0.1)]
    assert waterfall.contributions_chart(rows, {}).lacking  # the seed was not measured on x


# -- mixtures -------------------------------------------------------------------------------


def board(count):
    return [
        {"mixture": f"m{n}", "subject": f"s{n}", "evalsets": 2, "mean_bits_per_byte": 2 + n / 1000}
        for n in range(count)
    ]


def test_of_many_mixtures_the_best_and_a_sample():
    rows = blends.chosen(board(5000))
    assert len(rows) == blends.MOST
    assert [row["mixture"] for row in rows[:100]] == [f"m{n}" for n in range(100)]
    assert rows[-1]["mixture"] == "m4999"
    assert len({row["mixture"] for row in rows}) == blends.MOST
    assert blends.chosen(board(7)) == board(7)


@pytest.mark.parametrize(("count", "title"), [(2, "Weights"), (3, "simplex"), (4, "Weights")])
def test_three_partitions_make_a_simplex(count, title):
    names = "abcd"[:count]
    weights = {f"s{n}": dict.fromkeys(names, 1 / count) for n in range(400)}
    chart = blends.mixtures_chart(board(400), weights)
    assert title in chart.panels[0].title
    assert "best is m0" in chart.panels[0].finding
    assert chart.note.startswith("Drawn are 300 of 400 mixtures")
    draw.inline_svg(chart.panels[0], "k")


def test_classes_run_from_best_to_worst():
    assert blends.ranks(range(7)) == list(range(7))
    assert blends.ranks([1.0]) == [0]
    assert blends.ranks(range(300))[-1] == palette.RANKS - 1


# -- heat map, variants, ledger -------------------------------------------------------------


def test_steps_of_the_heat_map():
    found = [figures.step_of(v, 1.0) for v in (-1, -0.45, -0.05, 0, 0.5, 1, 9)]
    assert found == [0, 3, 5, 5, 7, 10, 10]
    assert figures.step_of(math.nan, 1.0) == figures.step_of(1.0, 0.0) == palette.STEPS


def test_heat_map_says_where_it_helps_most():
    rows = [
        {"partition": p, "evalset": e, "change": c}
        for p, e, c in (("a", "x", -0.5), ("a", "y", 0.1), ("b", "x", 0.0))
    ]
    chart = figures.heatmap_chart(rows)
    assert "1 of 3 cells; most of all a on x, by 0.500" in chart.panels[0].finding
    svg = draw.inline_svg(chart.panels[0], "k")
    assert ">−0.500<" in svg
    assert "var(--step0)" in svg
    assert ">–<" in svg  # b on y was not measured


def test_pareto_has_a_panel_for_each_parent_and_evalset():
    def row(evalset, method, size, bits, front):
        return {"parent": "base", "evalset": evalset, "variant": method, "method": method,
                "bytes": size, "bits_per_byte": bits, "on_front": front,
                "calibrated_on_it": evalset == "y"}  # fmt: skip

    rows = [row(e, m, s, b, f) for e in "xy" for m, s, b, f in
            (("dense", 4e6, 2.0, True), ("poolreg", 3e6, 2.1, True), ("modegpt", 3e6, 2.5, False))]  # fmt: skip
    chart = figures.pareto_chart(rows)
    assert [panel.title for panel in chart.panels] == ["base on x", "base on y"]
    assert "3 models made from base, 2 on the front, from 3 to 4 MB" in chart.panels[0].finding
    for panel in chart.panels:
        draw.inline_svg(panel, "k")
    assert "poolreg compress" in figures.pareto_chart([]).lacking


def test_tokens_as_people_say_them():
    assert [figures.tokens(n) for n in (7, 1234, 2.5e6, 3e9, 4e12)] == [
        "7", "1.23 k", "2.5 M", "3 G", "4 T"
    ]  # fmt: skip


# -- pictures -------------------------------------------------------------------------------


def panel(title="t", finding="f", width=3.0):
    def plot(axes, colour):
        axes.plot([1, 2], [3, 4], color=colour("accent"), label=title)
        axes.set_xticks([1], [title])
        axes.legend()

    return Panel(title, finding, (width, 2.0), (0.5, 0.1, 0.4, 0.1), plot)


HOSTILE = ["</svg><script>alert(1)</script>", "$\\frac{a", "a&b \"c\" 'd'", "東京 naïve",
           ' style="x" id="y" -1.23456', "<!-- <metadata>"]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_text(name):
    svg = draw.inline_svg(panel(name, name), "k")
    root = ElementTree.fromstring(svg)
    assert [part.tag for part in root if part.tag in ("title", "desc")] == ["title", "desc"]
    assert root.find("title").text == name
    shown = ["".join(text.itertext()) for text in root.iter("text")]
    assert shown.count(name) == 2
    assert not list(root.iter("script"))


def test_page_svg_leans_on_nothing():
    svg = draw.inline_svg(panel(), "key-1")
    root = ElementTree.fromstring(svg)
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-labelledby"] == "key-1-title key-1-desc"
    assert not re.search(r"http|font-family|#[0-9a-f]{6}\b", svg)
    ids = [part.attrib["id"] for part in root.iter() if "id" in part.attrib]
    assert len(ids) == len(set(ids))
    assert all(name.startswith("key-1-") for name in ids)
    used = set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", svg))
    assert used <= set(ids)
    known = {}
    classed = draw.classes(svg, known)
    assert "style=" not in classed
    assert set(re.findall(r'class="(f\d+)"', classed)) == set(known.values())


def test_only_wide_ones_scroll():
    assert 'class="wide"' not in draw.inline_svg(panel(width=3.0), "k")
    assert 'class="wide"' in draw.inline_svg(panel(width=5.0), "k")


@pytest.mark.parametrize("name", ["heatmap", "proxy", "contributions", "mixtures", "ledger"])
def test_files_are_the_same_every_time(made, tmp_path, name):
    chart = figures.chart(made, name)
    for form in ("svg", "png"):
        first, second = tmp_path / f"a.{form}", tmp_path / f"b.{form}"
        draw.write_chart(chart, first)
        draw.write_chart(figures.chart(made, name), second)
        assert first.read_bytes() == second.read_bytes()
    text = (tmp_path / "a.svg").read_text()
    ElementTree.fromstring(text)
    assert "var(--" not in text
    assert "#a000" not in text
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_resolution(made, tmp_path):
    def width(dpi):
        draw.write_chart(figures.chart(made, "ledger"), tmp_path / "x.png", dpi=dpi, force=True)
        return int.from_bytes((tmp_path / "x.png").read_bytes()[16:20], "big")

    assert width(200) == 2 * width(100)


def test_refusals(made, tmp_path):
    chart = figures.chart(made, "ledger")
    with pytest.raises(UsageError, match=r"neither \.svg nor \.png"):
        draw.write_chart(chart, tmp_path / "x.pdf")
    draw.write_chart(chart, tmp_path / "x.svg")
    with pytest.raises(Conflict, match="is there already"):
        draw.write_chart(chart, tmp_path / "x.svg")
    with pytest.raises(NotFound, match="no figure is named heat"):
        figures.chart(made, "heat")
    with pytest.raises(NotFound, match="nothing to draw") as caught:
        figures.chart(made, "pareto")
    assert "poolreg compress" in caught.value.hint


def test_a_missing_package_is_told_once(monkeypatch, made, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingPackage) as caught:
        draw.write_chart(figures.chart(made, "ledger"), tmp_path / "x.svg")
    assert caught.value.hint == "pip install 'poolreg[report]'"


def test_an_empty_pool_says_how_to_begin(tmp_path):
    with Pool.create(tmp_path / "pool") as pool:
        with pytest.raises(NotFound, match="No mixture was measured") as caught:
            pool.plot("heatmap", tmp_path / "x.svg")
        assert "poolreg sweep --subsets" in caught.value.hint


def test_shortened_names():
    assert draw.shortened("short") == "short"
    long = draw.shortened("a-very-long-name-of-a-partition", 16)
    assert len(long) == 16
    assert long.startswith("a-very")
    assert long.endswith("ition")
