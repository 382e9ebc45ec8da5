"""The code that README.md and the guides show runs as it stands."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GENERATED = {"cli.md", "errors.md", "schema.md"}
RUNNABLE = (
    "ask", "sweep", "query", "sql", "merge", "partition show", "model show", "proxy",
    "attribution", "suggest", "report", "plot",
)  # fmt: skip


@pytest.fixture
def place(referenced, tmp_path, monkeypatch) -> Path:
    """A working folder with a copy of the guides' pool, and two model folders."""
    referenced.copy(tmp_path / "pool")
    for folder, model in (("model-a", ("python", 1)), ("model-b", ("web", 1))):
        shutil.copytree(referenced.units[model], tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blocks(kind: str) -> list[str]:
    return [
        found
        for guide in GUIDES
        for language, found in re.findall(r"^```(\w*)\n(.*?)^```$", guide.read_text(), re.M | re.S)
        if language == kind
    ]


@pytest.mark.parametrize("code", [code for code in blocks("python") if "you/" not in code])
def test_python(place, code):
    exec(compile(code, "guide", "exec"), {"__name__": "guide"})


def commands() -> list[str]:
    lines = [line.split("#")[0].rstrip() for block in blocks("") for line in block.splitlines()]
    lines = list(dict.fromkeys(lines))
    runnable = tuple(f"poolreg {command}" for command in RUNNABLE)
    return [line for line in lines if line.startswith(runnable) and "you/" not in line]


def test_sharing(hub, place, cli_run):
    guide = next(guide for guide in GUIDES if guide.name == "sharing.md").read_text()
    first = re.findall(r"^```\n(.*?)^```$", guide, re.M | re.S)[0]
    lines = [line for line in first.splitlines() if "s3://" not in line]
    assert len(lines) >= 7
    for line in lines:
        cli_run(*shlex.split(line, comments=True)[1:])
    assert {repo for _, repo in hub.repos} == {"you/pool", "you/code-and-prose"}


@pytest.mark.parametrize("line", commands())
def test_command(place, cli_run, line):
    line = re.sub(r"--budget [0-9]+", "--budget 1", line)  # enough to see that it works
    words = shlex.split(line, comments=True)[1:]
    cli_run(*words)


def test_there_is_something_to_run():
    assert len(blocks("python")) >= 2
    assert len(commands()) >= 5


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_links_lead_somewhere(guide):
    for target in re.findall(r"\]\(([^)#]+)\)", guide.read_text()):
        if not target.startswith("http"):
            assert (guide.parent / target).exists(), target


def test_every_module_named_in_the_map_of_the_papers_exists():
    text = (ROOT / "docs" / "papers.md").read_text()
    for path in re.findall(r"`(tests/\w+\.py)`", text):
        assert (ROOT / path).is_file(), path
