"""What is printed: values as text, hostile text, JSON without NaN, progress bars."""

from __future__ import annotations

import csv
import importlib
import io
import json
import math
import os
import pty
import shutil
import subprocess
from datetime import datetime
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

HOSTILE = "[red]x[/red] \x1b[31m\x07\u202e :smile: a\nb"


@pytest.fixture(scope="session")
def output(cli_app):
    """The module that prints."""
    return importlib.import_module(f"{cli_app.__module__.rpartition('.')[0]}.output")


@pytest.fixture(scope="session")
def progress(cli_app):
    """The module that draws bars."""
    return importlib.import_module(f"{cli_app.__module__.rpartition('.')[0]}.progress")


@pytest.mark.parametrize(
    ("writer", "value", "text"),
    [
        ("text", None, ""),
        ("text", True, "yes"),
        ("text", 0.1 + 0.2, "0.3"),
        ("text", 1234567, "1234567"),
        ("text", [1, "a", None], '[1, "a", null]'),
        ("text", datetime(2026, 1, 2, 3, 4, 5), "2026-01-02 03:04"),
        ("count", 1234567, "1,234,567"),
        ("count", None, ""),
        ("size", 0, "0 B"),
        ("size", 999, "999 B"),
        ("size", 1000, "1 kB"),
        ("size", 123456, "123 kB"),
        ("size", 999_600, "1 MB"),
        ("size", 5.25e9, "5.25 GB"),
        ("size", 4.2e15, "4,200.0 TB"),
        ("size", None, ""),
        ("duration", 0.44, "0.4 s"),
        ("duration", 90, "2 min"),
        ("duration", 7200, "2.0 h"),
        ("short", "0123456789abcdef", "0123456789ab"),
        ("short", None, ""),
    ],
)
def test_values_as_text(output, writer, value, text):
    assert getattr(output, writer)(value) == text


def test_numbers_with_digits_and_signs(output):
    assert output.fixed(2)(1234.567) == "1,234.57"
    assert output.fixed(4, sign=True)(0.5) == "+0.5000"
    assert output.fixed(4, sign=True)(-0.5) == "-0.5000"
    assert output.fixed(4)(None) == ""
    assert output.fixed(2)(math.nan) == "nan"
    assert output.many(1, "model") == "1 model"
    assert output.many(2000, "model") == "2,000 models"


@given(st.text())
def test_clean_text_obeys_no_terminal_and_keeps_the_rest(output, text):
    cleaned = output.clean(text)
    assert cleaned.isprintable()
    assert output.clean(cleaned) == cleaned
    if text.isprintable():
        assert cleaned == text


@given(st.recursive(st.text() | st.integers() | st.floats() | st.booleans() | st.none(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))  # fmt: skip
def test_json_is_valid_printable_and_without_nan(output, value):
    plain = output.plain(value)
    said = output.to_json(plain)
    assert json.loads(said, parse_constant=lambda name: pytest.fail(name)) == plain
    assert said.replace("\n", "").isprintable()


def test_values_that_json_does_not_know(output):
    row = {"a": Decimal("1.5"), "b": Fraction(1, 3), "c": (1, 2), "d": b"\x01", "e": math.inf}
    assert output.plain(row) == {"a": 1.5, "b": "1/3", "c": [1, 2], "d": "01", "e": None}


def test_rows_keep_columns_of_one_name_apart(output):
    assert output.records(["a", "a", "a_2"], [(1, 2, 3)]) == [{"a": 1, "a_2": 2, "a_2_2": 3}]


def test_numbers_stand_to_the_right(output, capsys):
    rows = [{"n": 5, "t": "x", "b": True}, {"n": None, "t": "longer", "b": False}]
    output.show(rows, "table")
    assert capsys.readouterr().out == "n  t       b\n5  x       yes\n   longer  no\n"
    output.show([{"n": 5}, {"n": 1234}], "table")
    assert capsys.readouterr().out == "   n\n   5\n1234\n"


def test_hostile_text_is_shown_and_not_obeyed(cli_run, cli_pool, output, capsys):
    sql = ["sql", f"select '{HOSTILE}' as \"{HOSTILE}\"", "--pool", cli_pool]
    for form in ("table", "json"):
        said = cli_run(*sql, "--format", form).stdout
        assert all(line.isprintable() for line in said.split("\n")), form
        assert "[red]x[/red]" in said
        assert ":smile:" in said
    assert json.loads(cli_run(*sql, "--json").stdout) == [{HOSTILE: HOSTILE}]
    rows = list(csv.reader(io.StringIO(cli_run(*sql, "--format", "csv").stdout)))
    assert rows == [[HOSTILE], [HOSTILE]]
    output.message(f"a {HOSTILE}")
    assert "\x1b" not in capsys.readouterr().err


def test_a_hostile_file_name_is_shown_and_not_obeyed(cli_run, tmp_path):
    file = tmp_path / "[bold]\x1b[2J.txt"
    file.write_text("text")
    cli_run("init", tmp_path / "pool")
    cli_run("partition", "add", "a", file, "--pool", tmp_path / "pool")
    said = cli_run("show", "a", "--pool", tmp_path / "pool").stdout
    assert "[bold]\\x1b[2J.txt" in said
    file.unlink()
    assert "\\x1b[2J.txt is missing" in cli_run(
        "partition", "check", "--pool", tmp_path / "pool", code=3
    ).stderr  # fmt: skip


def test_numbers_that_are_not_finite_are_null(cli_run, cli_pool):
    sql = "select 'nan'::double as a, 'inf'::double as b, 1.5::decimal(4, 2) as c"
    said = cli_run("sql", sql, "--pool", cli_pool, "--json").stdout
    assert json.loads(said) == [{"a": None, "b": None, "c": 1.5}]
    assert cli_run("sql", sql, "--pool", cli_pool, "--format", "csv").stdout == "a,b,c\n,,1.5\n"


# -- on a terminal ---------------------------------------------------------------------------


def on_terminal(*words: object, **environment: str) -> str:
    """Run poolreg with both outputs on a terminal of its own and return what it shows."""
    program = shutil.which("poolreg")
    assert program
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [program, *map(str, words)], stdin=theirs, stdout=theirs, stderr=theirs,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", **environment},
    ) as process:  # fmt: skip
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            shown += part
    os.close(ours)
    assert process.returncode == 0, shown
    return shown.decode()


def test_a_terminal_gets_a_bar_and_a_pipe_none(cli_run, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("some text")
    cli_run("init", tmp_path / "pool")
    shown = on_terminal("partition", "add", "a", text, "--pool", tmp_path / "pool")
    assert "reading" in shown
    assert "added partition a" in shown
    said = cli_run("partition", "add", "b", text, "--pool", tmp_path / "pool")
    assert "reading" not in said.stderr


def test_a_terminal_gets_no_control_characters_of_others(cli_pool):
    sql = "select chr(27) || '[31m' as a"
    for form in ("table", "json", "csv", "quiet"):
        shown = on_terminal("--pool", cli_pool, "sql", sql, "--format", form)
        assert "\x1b[31m" not in shown, form
    assert "\x1b[3" not in on_terminal("--pool", cli_pool, "ls", NO_COLOR="1")


def test_speed_and_amount_are_in_the_unit_of_the_stage(progress):
    assert progress.rate(3.2e6, "bytes") == "3.2 MB/s"
    assert progress.rate(1234.0, "steps") == "1,234 steps/s"
    assert progress.rate(None, "steps") == ""
    assert progress.amount(50, "tensors") == "50 tensors"


def test_a_bar_takes_stages_in_turn(progress, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    screen.isatty = lambda: True  # type: ignore[method-assign]
    with progress.bar() as drawn:
        drawn.advance(1)
        drawn.note("before any stage")
        drawn.start("reading", 0, "bytes")
        drawn.advance(5)
        drawn.start("merging [red]", 10, "tensors")
        drawn.note(HOSTILE)
        drawn.advance(10)
    assert "merging [red]" in screen.getvalue()
    assert "\x07" not in screen.getvalue()


def test_the_message_of_a_path_that_is_no_text(cli_run, tmp_path):
    name = os.fsdecode(b"\xff\xfe.txt")
    (tmp_path / "pool").mkdir()
    said = cli_run("ls", "--pool", Path(tmp_path / name), code=10)
    assert "\\udcff" in said.stderr
