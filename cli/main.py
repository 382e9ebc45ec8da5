"""The command `poolreg`: finds the command asked for and ends every error in one place.

Command modules are imported when they are needed, and import no tensor library themselves, so
that help and look-ups start at once. A `PoolregError` becomes its message, its hint and its exit
code; whatever else goes wrong becomes one line.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

import click

from poolreg import PoolregError, __version__

from .output import message

# Section of the help → command → where it stands.
COMMANDS = {
    "Start": {
        "init": "init:init",
        "demo": "demo:demo",
        "completion": "completion:completion",
    },
    "Text": {"partition": "partition:partition", "evalset": "evalset:evalset"},
    "Models": {
        "train": "train:train",
        "model": "model:model",
        "diff": "diff:diff",
        "merge": "merge:merge",
        "compress": "compress:compress",
    },
    "Answers": {
        "ask": "ask:ask",
        "eval": "eval:evaluate",
        "sweep": "sweep:sweep",
        "scores": "scores:scores",
        "proxy": "proxy:proxy",
        "attribution": "attribution:attribution",
        "suggest": "suggest:suggest",
    },
    "Looking": {
        "ls": "ls:ls",
        "show": "show:show",
        "report": "report:report",
        "plot": "plot:plot",
        "query": "query:query",
        "sql": "sql:sql",
    },
    "Sharing": {"push": "push:push", "pull": "pull:pull", "bundle": "bundle:bundle"},
    "Upkeep": {
        "rm": "rm:rm",
        "restore": "restore:restore",
        "gc": "gc:gc",
        "verify": "verify:verify",
        "journal": "journal:journal",
        "log": "history:log",
        "stats": "stats:stats",
        "doctor": "doctor:doctor",
    },
}
_PLACES = {name: place for section in COMMANDS.values() for name, place in section.items()}

EXIT_CODES = {
    0: "done",
    1: "an error, told in one line",
    2: "the command line or an expression cannot be right",
    3: "a check was asked for and did not pass (drift, damage)",
    10: "no pool here",
    11: "another process holds the lock",
    130: "interrupted; the pool is whole",
}
INTERRUPTED = 130

_EPILOG = """\b
Getting started:
  poolreg init                                  make a pool in ./pool
  poolreg partition add code src/               name each part of your text, and
  poolreg evalset add wiki wiki.jsonl           the text to measure on
  poolreg train seed && poolreg train units     train a small model on each part

\b
Examples:
  poolreg demo                                  all of it on real text, in minutes
  poolreg ask "code+prose"                      what would training on both give?
  poolreg --pool /data/pool ls --json

\b
Exit codes:
""" + "\n".join(f"  {code:<4} {what}" for code, what in EXIT_CODES.items())


class Commands(click.Group):
    """The group of all commands, imported lazily, with errors turned into exit codes."""

    def list_commands(self, _: click.Context) -> list[str]:
        """Return the names in the order of the help."""
        return list(_PLACES)

    def get_command(self, _: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command."""
        if cmd_name not in _PLACES:
            return None
        module, attribute = _PLACES[cmd_name].split(":")
        command: click.Command = getattr(
            importlib.import_module(f".{module}", __package__), attribute
        )
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands by section."""
        room = formatter.width - 6 - max(map(len, _PLACES))
        for section, places in COMMANDS.items():
            rows = []
            for name in places:
                command = self.get_command(ctx, name)
                rows.append((name, command.get_short_help_str(room) if command else ""))
            with formatter.section(section):
                formatter.write_dl(rows)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line and leave with its exit code."""
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a tick on an ASCII terminal is no reason to fail
                stream.reconfigure(errors="backslashreplace")
        kwargs["standalone_mode"] = False
        sys.exit(_ended(lambda: super(Commands, self).main(*args, **kwargs)))


@click.group(cls=Commands, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--pool", "folder", metavar="DIR", help="The pool that the command works on.")
@click.version_option(__version__, message="poolreg %(version)s")
def main(folder: str | None) -> None:
    """What would training on A+B+C give?

    poolreg trains (or takes) one model for each part of a corpus, averages models exactly, and
    measures the average in place of a model trained on that mixture of parts.
    """


def _ended(call: Callable[[], Any]) -> int:
    """Run a command and return the exit code, having said what went wrong."""
    try:
        code = call()
    except PoolregError as error:
        _say(error.message, error.hint)
        return error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f"see: {context.command_path} --help" if context else ""
        if isinstance(error, click.NoSuchOption) and error.option_name[1:2].isdigit():
            hint = "a mixture has no negative weights; write for example 2*a+b"
        _say(error.format_message(), hint)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        message("interrupted: the pool is whole; run the same command again to go on")
        return INTERRUPTED
    except OSError as error:
        _say(str(error))
        return 1
    except Exception as error:  # the one place where a bug may end
        if os.environ.get("POOLREG_DEBUG"):
            raise
        _say(
            f"a bug in poolreg: {type(error).__name__}: {error}",
            "run it again with POOLREG_DEBUG=1 and report the traceback, please",
        )
        return 1
    return code if isinstance(code, int) else 0


def _say(what: str, hint: str = "") -> None:
    message(f"error: {what}")
    if hint:
        message(hint)
