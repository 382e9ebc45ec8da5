"""poolreg suggest: the best mixture for a target, under constraints."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from .names import complete
from .options import examples, formatted, in_pool, measuring
from .output import Column, duration, fixed, many, message, show
from .progress import bar

if TYPE_CHECKING:
    from poolreg.pool import Pool
    from poolreg.suggest.answer import Suggestion, Suggestions
    from poolreg.suggest.request import SuggestPlan

_POWERS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_Assigned = dict[str, float]


def count_of(value: str) -> float:
    """Return the number in 300M, 10B or 1e9."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?(?:e[0-9]{1,2})?)([kmbt]?)", value.strip().lower())
    if match is None:
        raise click.BadParameter(f"{value!r} is no number; write 300M or 10B")
    return float(match[1]) * _POWERS[match[2]]


def _count(_: click.Context, __: click.Parameter, value: str | None) -> float | None:
    return None if value is None else count_of(value)


def _assigned(_: click.Context, __: click.Parameter, values: Sequence[str]) -> _Assigned:
    """Read NAME=NUMBER, again for each or with commas."""
    found: _Assigned = {}
    for part in (part for value in values for part in value.split(",") if part.strip()):
        name, equals, number = part.rpartition("=")
        name = name.strip()
        if not equals or not name:
            raise click.BadParameter(f"{part!r} is not NAME=NUMBER; write for example web=0.5")
        if name in found:
            raise click.BadParameter(f"{name!r} is given twice")
        found[name] = count_of(number)
    return found


@click.command(
    epilog=examples(
        "poolreg suggest --target wiki=0.7,code=0.3",
        "poolreg suggest --target wiki=0.7,code=0.3 --max web=0.5 --budget 20 --output mix.yaml",
        "poolreg suggest --worst-group --near natural --kl 0.1 --budget 10",
        "poolreg suggest --max-epochs 4 --train-tokens 10B --size 3 --dry-run",
        "poolreg suggest --budget 30 --output swarm",
    )
)
@click.option(
    "--target", multiple=True, callback=_assigned, metavar="E=W[,E=W...]",
    shell_complete=complete("evalset"),
    help="Evalsets (or tasks) with weights (default: all evalsets alike).",
)  # fmt: skip
@click.option(
    "--worst-group", is_flag=True,
    help="Improve on the seed model everywhere: minimise the largest change.",
)  # fmt: skip
@click.option(
    "--min", "minimum", multiple=True, callback=_assigned, metavar="P=X",
    shell_complete=complete("partition"), help="At least this share of P.",
)  # fmt: skip
@click.option(
    "--max", "maximum", multiple=True, callback=_assigned, metavar="P=X",
    shell_complete=complete("partition"), help="At most this share of P.",
)  # fmt: skip
@click.option(
    "--max-epochs", type=float, metavar="E",
    help="No partition is passed over more often in --train-tokens.",
)  # fmt: skip
@click.option(
    "--train-tokens", callback=_count, metavar="N",
    help="Tokens of the training that the mixture is for: 300M, 10B.",
)  # fmt: skip
@click.option(
    "--tokens", multiple=True, callback=_assigned, metavar="P=N",
    help="Tokens of P (default: its bytes over the measured bytes of a token).",
)  # fmt: skip
@click.option("--near", metavar="natural|uniform|EXPR", help="Stay near this mixture, with --kl.")
@click.option("--kl", type=float, metavar="X", help="KL divergence from --near, at most, in nats.")
@click.option("--size", type=click.IntRange(min=1), metavar="K", help="At most K partitions.")
@click.option(
    "--among", default="all", show_default=True, metavar="EXPR",
    shell_complete=complete("partition"), help="The partitions to choose from.",
)  # fmt: skip
@click.option(
    "--budget", type=click.IntRange(min=0), default=0, show_default=True, metavar="N",
    help="Mixtures to measure at most; 0 measures nothing.",
)  # fmt: skip
@click.option(
    "-o", "--output", type=click.Path(), metavar="FILE|DIR",
    help="Write mix.yaml or mix.json; or, in a folder, ratios.csv and metrics.csv.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace what --output names.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@measuring("--from", "--seed", scheme=False)
@in_pool
@formatted
def suggest(
    pool: Pool, form: str, output: str | None, force: bool, dry_run: bool, **asked: Any
) -> None:  # fmt: skip
    """Suggest the best mixture for a target.

    The search is over shares of training data, under constraints. Without a budget nothing is
    measured: the answer rests on the unit models' token losses and on what is in the pool. With
    one, mixtures are proposed, averaged, measured and the fit renewed. Baselines stand beside.
    """
    planned = pool.plan_suggest(**asked)
    _say_plan(planned)
    if dry_run:
        return
    with bar() as progress:
        found = pool.suggest(planned, output=output, force=force, progress=progress)
    if form == "json":
        show([asdict(found)], form)
    else:
        rows = [_row(row) for row in found.rows]
        show(rows, form, _columns(rows), names="mixture", notes=_notes(found))
    if output:
        message(f"written: {output}")


def _say_plan(planned: SuggestPlan) -> None:
    message(f"plan: minimise {planned.objective}")
    message(f"  over        shares of {', '.join(planned.partitions)}")
    for words in planned.constraints:
        message(f"  constraint  {words}")
    units = "measured" if planned.ensemble else "not measured on every evalset: no ensemble"
    message(f"  known       {many(planned.rows, 'mixture')}; unit models {units}")
    if planned.rows < planned.least_rows:
        message(f"  needed      {planned.least_rows} mixtures for a surrogate")
    for baseline in planned.baselines:
        outside = "" if baseline.allowed else ", outside the constraints"
        there = "measured" if baseline.measured else "not measured"
        message(f"  baseline    {baseline.name}: {baseline.mixture} ({there}{outside})")
    message(f"  budget      {many(planned.budget, 'mixture')} to measure")


def _row(row: Suggestion) -> dict[str, Any]:
    interval = "" if row.low is None else f"{row.low:.4f} to {row.high:.4f}"
    return {**asdict(row), "interval": interval, "shown": _percent(row.shares)}


def _percent(shares: dict[str, float] | Any) -> str:
    ordered = sorted(shares.items(), key=lambda item: -item[1])
    return " ".join(f"{name} {share:.1%}" for name, share in ordered)


def _columns(rows: list[dict[str, Any]]) -> list[Column]:
    columns = [
        Column("rank"),
        Column("shown", "shares"),
        Column("source"),
        Column("measured", write=fixed(4)),
        Column("predicted", write=fixed(4)),
        Column("interval"),
    ]
    return columns if all(row["allowed"] for row in rows) else [*columns, Column("allowed")]


def _notes(found: Suggestions) -> list[str]:
    effort = found.effort
    notes = [f"less is better: {found.objective}; predicted by {found.predictor}"]
    if found.error is not None and found.level is not None:
        notes.append(
            f"left-out mixtures are missed by {found.error:.4f} (root mean square); intervals are "
            f"CV+ at {found.level:.0%}; measured mixtures are predicted without themselves"
        )
        kinds = ", ".join(
            f"{f.measure} {f.kind} ({f.error:.4f} of {f.spread:.4f})" for f in found.facts
        )
        notes.append(f"fit and its left-out error, of the spread: {kinds}")
    if effort.search is not None:
        close = (
            "" if effort.gap is None else f"; none is better there by more than {effort.gap:.2g}"
        )
        notes.append(f"ensemble: {effort.search}, {duration(effort.seconds)}{close}")
    notes.append(
        f"{many(effort.known, 'mixture')} known, {effort.evaluated} measured for the search in "
        f"{many(effort.rounds, 'round')} ({effort.stopped}), {effort.beside} beside as baselines"
    )
    return notes
