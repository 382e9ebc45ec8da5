"""The report: one page that leans on nothing, says what it knows, and trusts no name in it."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
import threading
import urllib.error
import urllib.request
from html.parser import HTMLParser

import pytest
import synthetic

from poolreg import Pool
from poolreg.errors import Conflict, MissingPackage, NotFound, UsageError
from poolreg.report import facts, page, serve, tables
from poolreg.store import records

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "wbr"}
SECTIONS = ["answer", "heatmap", "proxy", "contributions", "mixtures", "ledger", "missing", "tables"]  # fmt: skip
TABLES = ["leaderboard", "best", "changes", "proxies", "trust", "contributions", "variants", "missing"]  # fmt: skip
HOSTILE = ["</script><script>window.hit=1</script>", "<img src=x onerror=window.hit=1>",
           "\u2028&amp;'\"", "{{ 7 * 7 }}"]  # fmt: skip


class Tree(HTMLParser):
    """Checks that elements are closed in the order in which they were opened."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.errors, self.words = [], [], [], []
        self.feed(text)
        self.close()
        self.errors += [f"{tag} is never closed" for tag in self.open]

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if len(attributes) != len(dict(attributes)):
            self.errors.append(f"{tag} has an attribute twice")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.errors.append(f"{tag} is closed out of order at {self.getpos()}")

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self):
        return " ".join("".join(self.words).split())


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """Four partitions, three evalsets, nine references."""
    root = tmp_path_factory.mktemp("report") / "pool"
    made = synthetic.synthetic_pool(
        root, ["code", "names", "prose", "web"], ["x", "y", "z"], references=9
    )
    yield made
    made.close()


@pytest.fixture(scope="module")
def html(registry):
    return page.report(registry)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A pool whose names try to get out of their place."""
    root = tmp_path_factory.mktemp("hostile") / "pool"
    made = synthetic.synthetic_pool(root, HOSTILE, HOSTILE, references=6, seed=HOSTILE[0])
    yield page.report(made)
    made.close()


def embedded(text):
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


# -- the page as text -----------------------------------------------------------------------


@pytest.mark.parametrize("which", ["html", "hostile"])
def test_the_page_is_well_formed(request, which):
    tree = Tree(request.getfixturevalue(which))
    assert tree.errors == []
    ids = [a["id"] for _, a in tree.elements if "id" in a]
    assert sorted(ids) == sorted(set(ids))
    for _, attributes in tree.elements:
        for key in ("aria-labelledby", "href"):
            for name in (attributes.get(key) or "").split():
                if key == "aria-labelledby" or name.startswith("#"):
                    assert name.lstrip("#") in ids


@pytest.mark.parametrize("which", ["html", "hostile"])
def test_nothing_is_fetched(request, which):
    text = request.getfixturevalue(which)
    tree = Tree(text)
    for tag, attributes in tree.elements:
        assert "src" not in attributes, tag
        assert "style" not in attributes, tag
        assert not [key for key in attributes if key.startswith("on")], tag
        address = attributes.get("href") or "#"
        assert address.startswith("#") or (tag, address) == ("link", "data:,")
    styles = "".join(re.findall(r"<style>(.*?)</style>", text, re.DOTALL))
    assert not re.search(r"@import|url\((?!#)", styles)
    assert "http" not in styles


def test_the_policy_allows_this_script_and_style_alone(html):
    (policy,) = [a["content"] for a in Tree(html).all("meta") if "http-equiv" in a]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    for tag, kind in (("script", "script-src"), ("style", "style-src")):
        (body,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy


def test_every_section_stands_in_its_order(html):
    tree = Tree(html)
    sections = [a["id"] for a in tree.all("section")]
    assert sections == SECTIONS + [f"table-{name}" for name in TABLES]
    assert tree.all("html")[0]["lang"] == "en"
    assert len(tree.all("h1")) == 1
    assert all(a.get("scope") in ("col", "row") for a in tree.all("th"))
    assert len(tree.all("caption")) == len(tree.all("table"))


def test_every_figure_has_words(html):
    tree = Tree(html)
    drawings = tree.all("svg")
    assert len(drawings) == 1 + 3 + 4 + 1 + 1
    assert all(a["role"] == "img" and a["aria-labelledby"] for a in drawings)
    assert len(tree.all("figure")) == len(drawings)
    assert html.count("<desc ") == len(drawings)


def test_the_answer_is_right(html, registry):
    rows = registry.catalog.sandbox(
        "SELECT label, avg(bits_per_byte) FROM scores WHERE kind = 'mixture' GROUP BY 1 ORDER BY 2"
    ).rows
    seed = registry.catalog.sandbox(
        "SELECT avg(bits_per_byte) FROM scores WHERE kind = 'seed'"
    ).rows[0][0]
    text = Tree(html).text
    assert f"{rows[0][0]} is the best of 15 measured mixtures, on average over 3 evalsets" in text
    assert f"{rows[0][1]:.3f} bits per byte, {seed - rows[0][1]:.3f} below the seed" in text
    assert f"{rows[1][0]}, has {rows[1][1] - rows[0][1]:.4f} more" in text
    assert "Against 9 references" in text
    assert "2 trainings avoided" in text  # 11 unions of two or more, 9 of them trained


def test_the_sql_of_a_table_gives_its_rows(registry):
    made = page.gather(registry)
    with_sql = [table for table in made.tables if table.sql]
    assert len(with_sql) == 6
    for table in with_sql:
        found = registry.catalog.sandbox(table.sql)
        assert len(found.rows) == table.total
        keys = [column.key for column in table.columns]
        for row, given in zip(table.rows, found.dicts(), strict=False):
            assert list(row) == [
                pytest.approx(given[key], rel=1e-8) if isinstance(given[key], float) else given[key]
                for key in keys
            ]


def test_the_commands_of_tables_exist(registry, cli_run):
    commands = {t.name: t.command for t in page.gather(registry).tables if t.command}
    assert set(commands) == {"trust", "contributions"}
    for command in commands.values():
        found = cli_run("--pool", registry.root, *command.split()[1:]).stdout
        assert "evalset" in found.splitlines()[0]


def test_the_same_pool_gives_the_same_bytes(registry, html):
    assert page.report(registry) == html


def test_chosen_evalsets(registry):
    tree = Tree(page.report(registry, ["x"]))
    assert "measured mixtures, on x" in tree.text
    assert len(tree.all("svg")) == 1 + 1 + 1 + 1 + 1
    with pytest.raises(NotFound, match="no evalset is named nothing"):
        page.report(registry, ["nothing"])


# -- odd pools ------------------------------------------------------------------------------


def test_hostile_names_are_text(hostile):
    tree = Tree(hostile)
    assert len(tree.all("script")) == 2
    assert not tree.all("img")
    assert "{{ 7 * 7 }}" in tree.text
    found = {row[0] for row in embedded(hostile)["changes"]["rows"]}
    assert found == set(HOSTILE)
    assert "\u2028" not in re.search(r'id="data">(.*?)</script>', hostile, re.DOTALL)[1]


def test_an_empty_pool_says_how_to_begin(tmp_path):
    with Pool.create(tmp_path / "pool") as pool:
        tree = Tree(pool.report_page())
    assert tree.errors == []
    assert "Nothing is measured in this pool yet" in tree.text
    assert "poolreg sweep --subsets" in tree.text


def test_sections_without_data_name_the_command(tmp_path):
    made = synthetic.synthetic_pool(tmp_path / "pool", ["a", "b", "c"], ["x"], sizes=[2])
    tree = Tree(page.report(made))
    made.close()
    assert tree.errors == []
    for words in (
        "Measure the single partitions with: poolreg sweep --subsets --sizes 1",
        "Train some with: poolreg train references",
        "poolreg attribution --measure",
    ):
        assert words in tree.text


def test_mixtures_that_lack_an_evalset_are_not_the_best(tmp_path):
    made = synthetic.synthetic_pool(tmp_path / "pool", ["a", "b"], ["x", "y"])
    lens = facts.find_lens(made)
    before = facts.rows(made, lens, "leaderboard")
    body = {"object": "o", "content": "c", "documents": 1, "bytes": 1000}
    made.record(
        records.keyed("evalset", synthetic.digest("set n"), body),
        records.name("evalset", "n", synthetic.digest("set n")),
    )
    values = synthetic._Values(["a", "b"], ["n"])
    made.record(*values.rows(before[-1]["subject"], []))
    text = Tree(page.report(made)).text
    assert f"{before[-1]['mixture']} is the best of 1 measured mixture, on average over 3" in text
    assert "2 scores of known mixtures on the evalsets shown here are not measured" in text
    made.close()


def test_other_protocols_are_left_out_and_told(tmp_path):
    made = synthetic.synthetic_pool(tmp_path / "pool", ["a", "b"], ["x"])
    subject = facts.rows(made, facts.find_lens(made), "leaderboard")[0]["subject"]
    body = {
        "subject": subject, "evalset": synthetic.digest("set x"), "protocol": "q", "nll": 1.0,
        "tokens": 1, "bytes": 1000, "documents": 1, "seconds": 1.0, "device": "cpu",
        "document_scores": None, "token_scores": None,
    }  # fmt: skip
    protocol = {"max_length": 8, "dtype": "float32", "prefix": "bos", "tokenizer": "t",
                "window": "rolling", "version": 1}  # fmt: skip
    made.record(records.keyed("protocol", "q", protocol), records.keyed("evaluation", "e", body))
    text = Tree(page.report(made)).text
    made.close()
    assert "windows of 16 tokens" in text
    assert "1 scores from other seeds or settings" in text


def test_long_tables_are_cut_and_say_so(registry):
    lens = facts.find_lens(registry)
    rows = [{"mixture": f"m{n}", "bits": n / 3} for n in range(2500)]
    table = tables.of_query(lens, "leaderboard", "Leaderboard", rows, lacking="")
    assert (len(table.rows), table.total, len(table.shown)) == (1000, 2500, 50)
    made = page.gather(registry)
    cut = page.Page(made.overview, made.lens, made.answer, (), (table,), 0)
    text = Tree(page.render(cut)).text
    assert "This page holds the first 1,000 of 2,500 rows" in text
    assert "50 of 2,500 rows" in text


def test_values_as_they_stand():
    assert tables.written(-0.00001, 4) == "0.0000"
    assert tables.written(-1234.5, 2) == "−1,234.50"
    assert tables.written(None, 2) == ""
    assert tables.written(True, None) == "yes"
    assert tables.written("a<b", None) == "a<b"


# -- files and the command line -------------------------------------------------------------


def test_files_are_not_overwritten_unasked(registry, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "report", lambda *_, **__: "<!DOCTYPE html>")
    out = tmp_path / "report.html"
    assert page.write_report(registry, out) == out
    with pytest.raises(Conflict, match="is there already"):
        page.write_report(registry, out)
    page.write_report(registry, out, force=True)


def test_commands(cli_run, registry, tmp_path):
    out, picture = tmp_path / "r.html", tmp_path / "p.svg"
    said = cli_run("report", "--pool", registry.root, "-o", out, "--on", "x,y")
    assert said.stdout.strip() == str(out)
    assert "on average over 2 evalsets" in Tree(out.read_text()).text
    cli_run("report", "--pool", registry.root, "-o", out, code=1)
    cli_run("report", "--pool", registry.root, "-o", out, "--force")
    listed = cli_run("plot", "--pool", registry.root).stdout
    assert [line.split()[0] for line in listed.splitlines()[1:]] == [
        "heatmap", "proxy", "contributions", "mixtures", "pareto", "ledger"
    ]  # fmt: skip
    cli_run("plot", "heatmap", "--pool", registry.root, "-o", picture, "--on", "x")
    assert picture.read_text().startswith("<?xml")
    cli_run("plot", "heat", "--pool", registry.root, "-o", picture, code=1)


def test_missing_packages_are_told(registry, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(MissingPackage, match="jinja2") as caught:
        page.report(registry)
    assert caught.value.hint == "pip install 'poolreg[report]'"


# -- serving --------------------------------------------------------------------------------


def test_the_server_shows_the_page_to_this_machine(html):
    with serve.server(html.encode(), 0) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        address = f"http://127.0.0.1:{running.server_port}"
        try:
            assert urllib.request.urlopen(f"{address}/", timeout=10).read().decode() == html
            for path, host in (("/etc/passwd", None), ("/", "evil.example:80")):
                asked = urllib.request.Request(address + path)
                if host:
                    asked.add_header("Host", host)
                with pytest.raises(urllib.error.HTTPError, match="404"):
                    urllib.request.urlopen(asked, timeout=10)
            with pytest.raises(UsageError, match="cannot be used"):
                serve.server(b"", running.server_port)
        finally:
            running.shutdown()
            thread.join()


# -- in a browser ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    from pathlib import Path

    found = [p for p in ("/usr/bin/chromium", "/usr/bin/chromium-browser") if Path(p).exists()]
    with api.sync_playwright() as playwright:
        try:
            options = {"executable_path": found[0]} if found else {}
            started = playwright.chromium.launch(args=["--no-sandbox"], **options)
        except api.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield started
        started.close()


@pytest.fixture
def opened(browser, tmp_path, request):
    """Return a function that opens a page; whatever it says or asks for ends up in `.trouble`."""

    def open_page(text, width=1280, **options):
        path = tmp_path / "report.html"
        path.write_text(text)
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        request.addfinalizer(context.close)
        shown = context.new_page()
        shown.trouble = []
        shown.on("console", lambda said: shown.trouble.append(said.text))
        shown.on("pageerror", lambda error: shown.trouble.append(str(error)))
        shown.on("request", lambda asked: shown.trouble.append(asked.url))
        shown.goto(path.as_uri())
        assert shown.trouble.pop(0) == path.as_uri()
        return shown

    return open_page


@pytest.mark.slow
@pytest.mark.parametrize("which", ["html", "hostile"])
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_it_fits_and_asks_for_nothing(request, opened, which, theme, width):
    shown = opened(request.getfixturevalue(which), width, color_scheme=theme)
    assert shown.trouble == []
    assert shown.evaluate("document.documentElement.scrollWidth") == width
    beyond = """[...document.querySelectorAll('main *, header *, footer *')].filter(
        e => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.scroll')
    ).map(e => e.outerHTML.slice(0, 80))"""
    assert shown.evaluate(beyond) == []
    for name in SECTIONS + [f"table-{name}" for name in TABLES]:
        assert shown.locator(f"#{name}").is_visible(), name
    assert shown.locator("svg:visible").count() >= 7
    assert shown.evaluate("typeof hit") == "undefined"
    # Colours follow the theme inside the figures, too.
    ink = shown.evaluate("getComputedStyle(document.querySelector('#ledger svg text')).fill")
    assert (min(map(int, re.findall(r"\d+", ink))) > 150) == (theme == "dark")


@pytest.mark.slow
def test_tables_sort_filter_and_show_from_the_keyboard(opened, html):
    shown = opened(html)
    table = shown.locator("#table-changes")
    rows = embedded(html)["changes"]["rows"]
    change = table.locator("th", has_text=re.compile("^change"))
    change.locator("button").focus()
    for key, order, direction in (
        ("Enter", 1, "ascending"), ("Space", -1, "descending"), ("Enter", 1, "ascending"),
    ):  # fmt: skip
        shown.keyboard.press(key)
        assert change.get_attribute("aria-sort") == direction
        expected = sorted((row[4] for row in rows), reverse=order < 0)
        written = [tables.written(value, 4) for value in expected]
        assert table.locator("tbody td:last-child").all_inner_texts() == written
    assert change.locator("button").evaluate("e => e === document.activeElement")
    table.get_by_label("Filter").fill("prose")
    found = table.locator("tbody tr")
    assert found.count() == sum("prose" in (row[0], row[1]) for row in rows)
    assert "3 of 3 matching of 12 rows" in table.locator("caption").inner_text()
    proxies = shown.locator("#table-proxies")
    total = len(embedded(html)["proxies"]["rows"])
    assert proxies.locator("tbody tr").count() == min(total, 50)
    assert total <= 50 or proxies.get_by_role("button", name="Show all").is_visible()
    assert shown.trouble == []


def told(cell, value):
    """Return what a cell of a CSV file says, read as the kind of value that it should hold."""
    if value is None or isinstance(value, bool):
        return {"": None, "true": True, "false": False}[cell]
    return type(value)(cell)


# A new page for each form: Chromium drops what comes after ten downloads in one burst.
@pytest.mark.slow
@pytest.mark.parametrize("which", ["html", "hostile"])
@pytest.mark.parametrize("form", ["CSV", "JSON"])
def test_downloads_hold_the_rows(request, opened, which, form):
    text = request.getfixturevalue(which)
    shown = opened(text, accept_downloads=True)
    for name, table in embedded(text).items():
        with shown.expect_download() as waiting:
            shown.get_by_label(f"Download {name} as {form}", exact=True).click()
        assert waiting.value.suggested_filename == f"{name}.{form.lower()}"
        saved = waiting.value.path().read_text(encoding="utf-8")
        keys = [column["key"] for column in table["columns"]]
        if form == "JSON":
            assert json.loads(saved) == [dict(zip(keys, row, strict=True)) for row in table["rows"]]
            continue
        head, *lines = csv.reader(io.StringIO(saved, newline=""))
        assert head == keys
        assert len(lines) == len(table["rows"])
        for line, row in zip(lines, table["rows"], strict=True):
            assert [told(cell, value) for cell, value in zip(line, row, strict=True)] == row
    assert shown.trouble == []


@pytest.mark.slow
def test_paper_shows_everything(opened, html):
    shown = opened(html)
    assert shown.locator("#contributions svg:visible").count() == 1
    shown.emulate_media(media="print", color_scheme="dark")
    assert shown.locator("#contributions svg:visible").count() == 4
    assert not shown.locator("nav").is_visible()
    ground = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == "rgb(255, 255, 255)"  # paper is white, whatever the screen is


@pytest.mark.slow
def test_it_reads_without_a_script(browser, tmp_path, html):
    path = tmp_path / "report.html"
    path.write_text(html)
    context = browser.new_context(java_script_enabled=False)
    shown = context.new_page()
    shown.goto(path.as_uri())
    assert shown.locator("#table-leaderboard tbody tr").count() == 15
    assert shown.get_by_role("button").count() == 0
    context.close()


@pytest.mark.slow
def test_the_first_tab_skips_to_the_answer(opened, html):
    shown = opened(html)
    shown.keyboard.press("Tab")
    assert shown.evaluate("document.activeElement.textContent") == "Skip to the answer"
    shown.keyboard.press("Enter")
    assert shown.url.endswith("#answer")
