"""How the command line starts and ends: help, finding the pool, exit codes, what it imports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete

from poolreg import Pool, PoolregError, errors

SCRIPT = """
import sys, json
from importlib.metadata import entry_points
(entry,) = entry_points(group="console_scripts", name="poolreg")
try:
    entry.load()(sys.argv[2:], prog_name="poolreg")
except SystemExit as end:
    code = end.code
open(sys.argv[1], "w").write(json.dumps([code, sorted(sys.modules)]))
"""
HEAVY = {"torch", "transformers", "pyarrow", "tokenizers", "safetensors", "rich.progress"}


def every_command(command, words=()):
    """Yield the words of all commands below a group."""
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield (*words, name)
            yield from every_command(command.get_command(context, name), (*words, name))


def test_every_help_is_short_and_ends_with_examples(cli_app, cli_run):
    for words in [(), *every_command(cli_app)]:
        said = cli_run(*words, "--help").stdout
        assert "\n  Examples:\n    " in said, words
        assert max(map(len, said.splitlines())) <= 100, words
        summary = said.split("\n\n")[1]
        assert summary.endswith((".", "?")), words
    for words in every_command(cli_app):
        *group, name = words
        (line,) = [
            line for line in cli_run(*group, "--help").stdout.splitlines()
            if line.startswith(f"  {name} ")
        ]  # fmt: skip
        assert "..." not in line, line


def test_the_main_help_shows_the_way_in(cli_run):
    said = cli_run("--help").stdout
    for section in ("Getting started:", "Exit codes:", "Text:", "Models:", "Answers:"):
        assert section in said
    assert cli_run(code=2).stderr.startswith("Usage: poolreg")
    assert cli_run("--version").stdout == f"poolreg {version('poolreg')}\n"


# -- what is imported ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["ask", "--help"],
        ["ls"],
        ["show", "alpha+beta"],
        ["model", "ls", "--json"],
        ["sql", "from scores"],
        ["query", "leaderboard"],
        ["ask", "alpha+beta"],
        ["eval", "alpha+beta", "--json"],
        ["scores", "ls"],
    ],
    ids=" ".join,
)
def test_looking_things_up_imports_nothing_heavy(cli_pool, tmp_path, words):
    out = tmp_path / "modules.json"
    subprocess.run(
        [sys.executable, "-c", SCRIPT, out, "--pool", cli_pool, *words], check=True,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    code, modules = json.loads(out.read_text())
    assert code == 0
    assert not HEAVY & set(modules)
    if "--help" in words or "--version" in words:
        assert not {"duckdb", "numpy", "rich"} & set(modules)


# -- finding the pool ------------------------------------------------------------------------


def test_the_pool_is_found_like_a_git_folder(cli_run, tmp_path, monkeypatch):
    inside = tmp_path / "work" / "deep"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    cli_run("ls", code=10)
    cli_run("init", tmp_path / "work" / "pool")
    assert str(tmp_path / "work" / "pool") in cli_run("ls").stderr
    cli_run("init", tmp_path / "other")
    other = str(tmp_path / "other")
    assert other in cli_run("ls", env={"POOLREG_POOL": other}).stderr
    assert other in cli_run("ls", "--pool", other).stderr
    assert other in cli_run("--pool", other, "ls").stderr
    assert other in cli_run("--pool", "nowhere", "ls", "--pool", other).stderr
    assert "poolreg init" in cli_run("ls", "--pool", inside, code=10).stderr
    cli_run("--pool", inside / "third", "init")
    assert (inside / "third" / "FORMAT").exists()


# -- how it ends -----------------------------------------------------------------------------


def test_every_exit_code_is_in_the_help(cli_app, cli_run):
    codes = sys.modules[type(cli_app).__module__].EXIT_CODES
    assert {error.exit_code for error in all_errors()} | {0, 2, 130} == codes.keys()
    said = cli_run("--help").stdout
    assert all(f"{code} " in said and what in said for code, what in codes.items())


def all_errors(error=PoolregError):
    yield error
    for below in error.__subclasses__():
        if below.__module__ == errors.__name__:
            yield from all_errors(below)


@pytest.mark.parametrize("error", list(all_errors()), ids=lambda error: error.__name__)
def test_each_error_has_its_exit_code_message_and_hint(cli_run, monkeypatch, error):
    def fail(*_):
        raise error("the cat is gone", hint="call it")

    monkeypatch.setattr(Pool, "open", fail)
    said = cli_run("ls", code=error.exit_code)
    assert (said.stdout, said.stderr) == ("", "error: the cat is gone\ncall it\n")


def test_other_ends_are_one_line(cli_run, monkeypatch):
    def ending(error):
        def fail(*_):
            raise error

        monkeypatch.setattr(Pool, "open", fail)

    ending(KeyboardInterrupt())
    said = cli_run("ls", code=130)
    assert said.stderr.split("\n")[-2].startswith("interrupted: the pool is whole")
    ending(PermissionError(13, "Permission denied", "x\x1b[2Jy"))
    assert cli_run("ls", code=1).stderr == "error: [Errno 13] Permission denied: 'x\\x1b[2Jy'\n"
    ending(ZeroDivisionError("oh\nno"))
    said = cli_run("ls", code=1, env={"POOLREG_DEBUG": None})
    assert "a bug in poolreg: ZeroDivisionError" in said.stderr
    assert "POOLREG_DEBUG=1" in said.stderr
    assert "Traceback" not in said.stderr
    assert isinstance(cli_run("ls", code=1).exception, ZeroDivisionError)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["ask", '{"json"}'], 2, "is not a mixture"),
        (["ask", ""], 2, "it is empty"),
        (["ask", "0*alpha"], 2, "the mixture is empty"),
        (["ask", "alpha+-1*beta"], 2, "not negative"),
        (["ask", "-1*alpha"], 2, "no negative weights"),
        (["ask", "alhpa"], 1, "did you mean alpha"),
        (["ask", "alpha+bta"], 1, "did you mean beta"),
        (["ask", "alpha/9"], 1, "alpha/9 does not exist"),
        (["ask", "alpha", "--on", "gama"], 1, "did you mean gamma"),
        (["ask"], 2, "Missing argument"),
        (["ask", "alpha", "--shceme", "micro"], 2, "--scheme"),
        (["ask", "alpha", "--format", "xml"], 2, "see: poolreg ask --help"),
        (["aks", "alpha"], 2, "No such command"),
        (["show", "a\x1b[2Jb"], 2, "\\x1b[2J"),
        (["partition", "add", "[red]x", "f.txt"], 2, "cannot be a name"),
        (["partition", "rm", "\x1b[2J"], 1, "\\x1b[2J"),
    ],
)
def test_what_cannot_be_done_is_said(cli_run, cli_pool, words, code, says):
    said = cli_run("--pool", cli_pool, *words, code=code)
    assert said.stdout == ""
    assert says in said.stderr
    assert said.stderr.startswith("error: ")
    assert all(line.isprintable() for line in said.stderr.split("\n"))


def test_an_interrupted_command_ends_with_130(cli_pool):
    with subprocess.Popen(
        ["poolreg", "--pool", cli_pool, "sql", "select sum(a.range) from range(10000000000000) a"],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        time.sleep(2)
        process.send_signal(signal.SIGINT)
        out, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert told.strip().startswith("interrupted")


def test_a_reader_that_stops_early_is_no_error(cli_pool):
    with subprocess.Popen(
        ["poolreg", "--pool", cli_pool, "sql", "from range(300000)", "--format", "csv"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"range\n"
        process.stdout.close()
        assert process.stderr.read() == b""


def test_a_latin_terminal_is_no_reason_to_fail(cli_pool):
    said = subprocess.run(
        ["poolreg", "--pool", cli_pool, "sql", "select '✓ é' as a", "--format", "csv"],
        env={**os.environ, "PYTHONIOENCODING": "latin-1"}, capture_output=True, check=True,
    )  # fmt: skip
    assert said.stdout == b"a\n\\u2713 \xe9\n"


# -- completion ------------------------------------------------------------------------------


def offered(app, words, incomplete):
    items = ShellComplete(app, {}, "poolreg", "_POOLREG_COMPLETE").get_completions(
        [str(word) for word in words], incomplete
    )
    return [item.value for item in items]


def test_names_are_completed(cli_app, cli_pool, tmp_path, monkeypatch):
    at = ["--pool", cli_pool]
    assert offered(cli_app, [], "sw") == ["sweep"]
    assert offered(cli_app, [*at, "ask"], "al") == ["alpha"]
    assert offered(cli_app, [*at, "ask"], "2*alpha+b") == ["2*alpha+base", "2*alpha+beta"]
    assert offered(cli_app, ["ask", *at, "alpha", "--on"], "g") == ["gamma"]
    assert offered(cli_app, [*at, "partition", "rm"], "") == ["alpha", "beta", "gamma"]
    assert "leaderboard" in offered(cli_app, ["query"], "lead")
    monkeypatch.chdir(tmp_path)
    assert offered(cli_app, ["ask"], "al") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_names_the_command(cli_run, shell):
    assert "_POOLREG_COMPLETE" in cli_run("completion", shell).stdout


def test_the_library_does_not_import_the_command_line():
    for path in Path(errors.__file__).parent.rglob("*.py"):
        assert "poolreg.cli" not in path.read_text().replace("`poolreg.cli.main`", ""), path
