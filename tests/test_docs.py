"""The pages that repeat what the code knows are what the code says."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from poolreg import Pool

GENERATE = Path(__file__).parent.parent / "docs" / "generate.py"


@pytest.fixture(scope="module")
def generate():
    """The script that writes the pages."""
    spec = importlib.util.spec_from_file_location("generate", GENERATE)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_up_to_date(generate):
    for path, text in generate.pages():
        assert path.read_text() == text, f"run python docs/generate.py: {path.name} is out of date"


def test_check_finds_a_page_that_is_out_of_date(generate, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generate, "DOCS", tmp_path)
    monkeypatch.setattr("sys.argv", ["generate.py"])
    assert generate.main() == 0
    monkeypatch.setattr("sys.argv", ["generate.py", "--check"])
    assert generate.main() == 0
    (tmp_path / "errors.md").write_text("nothing fails")
    assert generate.main() == 1
    assert "docs/errors.md is out of date" in capsys.readouterr().out


def test_the_script_runs(tmp_path):
    said = subprocess.run(
        [sys.executable, GENERATE, "--check"], cwd=tmp_path, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (said.returncode, said.stdout, said.stderr) == (0, "", "")


def test_every_table_column_and_view_says_what_it_is(generate, tmp_path):
    with Pool.create(tmp_path / "pool") as pool:
        for item in pool.sql(generate.OBJECTS).dicts():
            assert item["comment"], item["name"]
        tables = {item["name"] for item in pool.sql(generate.OBJECTS).dicts()
                  if item["kind"] == "Table"}  # fmt: skip
        for column in pool.sql(generate.COLUMNS).dicts():
            assert column["comment"] or column["table_name"] not in tables, column
        for query in pool.queries():
            assert query.description, query.name
