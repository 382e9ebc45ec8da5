"""poolreg sweep: many mixtures at once, planned, resumable, memoised."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .names import complete
from .options import examples, formatted, in_pool, measuring, share, size_range
from .output import Column, duration, fixed, many, message, records, show, size
from .progress import bar

if TYPE_CHECKING:
    from poolreg.evaluation.race import Race
    from poolreg.evaluation.sweep import SweepPlan
    from poolreg.mixture import Mixture
    from poolreg.pool import Pool


@click.command(
    epilog=examples(
        "poolreg sweep --subsets",
        "poolreg sweep --subsets --sizes 1-3 --on wiki --dry-run",
        "poolreg sweep --dirichlet 200 --seed 1 --among code+prose+web",
        "poolreg sweep --file mixtures.txt --json > scores.json",
        "poolreg sweep --subsets --shard $SLURM_ARRAY_TASK_ID/16",
        "poolreg sweep --subsets --race",
    )
)
@click.option("--subsets", is_flag=True, help="The union of every subset of the partitions.")
@click.option("--sizes", type=size_range, metavar="SIZES", help="… of 2, or 1-3, partitions only.")
@click.option("--file", type=click.Path(dir_okay=False), help="Mixtures of a file, one a line.")
@click.option("--dirichlet", type=click.IntRange(min=1), metavar="N", help="N random mixtures.")
@click.option(
    "--concentration",
    type=float,
    default=1.0,
    show_default=True,
    help="Of random mixtures: below 1 they are lopsided, above 1 even.",
)
@click.option(
    "--seed",
    "draw",
    type=int,
    default=0,
    show_default=True,
    metavar="S",
    help="Start of random choices: the same S draws the same mixtures.",
)
@click.option(
    "--among",
    default="all",
    show_default=True,
    metavar="EXPR",
    shell_complete=complete("partition"),
    help="The partitions to choose from.",
)
@click.option(
    "--limit-mixtures",
    type=click.IntRange(min=1),
    metavar="N",
    help="At most N of the subsets, drawn at random.",
)
@click.option("--shard", type=share, metavar="I/N",
              help="Only part I of N, for jobs that share a sweep: 1/8 to 8/8.")  # fmt: skip
@click.option("--race", is_flag=True, help="Stop mixtures that are surely worse than the leader.")
@click.option(
    "--confidence",
    type=float,
    default=0.95,
    show_default=True,
    help="That a race does not stop the best mixture.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@measuring("--from")
@in_pool
@formatted
def sweep(pool: Pool, form: str, dry_run: bool, on: list[str], scheme: str, seed: str | None,
          settings: Any, shard: tuple[int, int] | None, race: bool, confidence: float,
          **choice: Any) -> None:  # fmt: skip
    """Measure many mixtures: unions, a file of them, or random ones.

    The plan is printed first. Mixtures are stored as they are done, so an interrupted sweep
    goes on where it was. The table has a mixture a line, best first, in bits per byte.

    A race scores all mixtures on a part of the documents, then on more and more, and stops those
    that are worse than the leader, with the confidence given for all of them together. What they
    scored so far stands in the view raced, never among the scores.
    """
    if race and shard:
        raise click.UsageError("a race compares all mixtures, so it cannot be cut into shards")
    chosen = [str(mixture) for mixture in _choose(pool, **choice)]
    planned = pool.plan_sweep(chosen, on, scheme=scheme, seed=seed, settings=settings, shard=shard)
    _say_plan(planned)
    if dry_run:
        return
    if race:
        with bar() as progress:
            _show_race(pool.race(planned, confidence=confidence, progress=progress), form)
        return
    with bar() as progress:
        scores = pool.sweep(planned, progress=progress)
    rows = records(scores.columns, scores.rows)
    if form == "table":
        _show_by_mixture(rows)
    else:
        show(rows, form, names="mixture")


def _choose(
    pool: Pool, subsets: bool, sizes: tuple[int, int] | None, file: str | None,
    dirichlet: int | None, concentration: float, draw: int, among: str, limit_mixtures: int | None,
) -> list[Mixture]:  # fmt: skip
    from poolreg.evaluation.sweep import choose_dirichlet, choose_subsets, read_mixtures

    if [subsets or sizes is not None, file is not None, dirichlet is not None].count(True) != 1:
        raise click.UsageError("choose mixtures with one of --subsets, --file and --dirichlet")
    if limit_mixtures and (file or dirichlet):
        raise click.UsageError("--limit-mixtures goes with --subsets")
    if file:
        return read_mixtures(pool.registry, Path(file))
    if dirichlet:
        return choose_dirichlet(
            pool.registry, dirichlet, seed=draw, among=among, concentration=concentration
        )
    return choose_subsets(
        pool.registry, sizes=sizes, limit=limit_mixtures, among=among, sample_seed=draw
    )


def _say_plan(planned: SweepPlan) -> None:
    work, time = planned.work, duration(planned.seconds)
    message(f"plan: {many(planned.mixtures, 'mixture')} on {', '.join(planned.evalsets.values())}")
    message(f"  memoised  {many(planned.memoised, 'evaluation')}")
    todo = f"{many(work.evaluations, 'evaluation')}, {size(work.bytes)} of text"
    message(f"  to do     {todo}{f', about {time}' if work.evaluations and time else ''}")


def _show_by_mixture(rows: list[dict[str, Any]]) -> None:
    """Print one line a mixture with its bits per byte on each evalset and their mean."""
    evalsets = list(dict.fromkeys(row["evalset"] for row in rows))
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        line = lines.setdefault((row["mixture"], row["scheme"]), {**row})
        line[f"on {row['evalset']}"] = row["bits_per_byte"]
    for line in lines.values():
        line["mean"] = sum(line[f"on {name}"] for name in evalsets) / len(evalsets)
    macro = any(row["scheme"] == "macro" for row in rows)
    columns = [Column("mixture"), *([Column("scheme")] if macro else []), Column("size")]
    columns += [Column(f"on {name}", name, fixed(4)) for name in evalsets]
    if len(evalsets) > 1:
        columns.append(Column("mean", write=fixed(4)))
    best = sorted(lines.values(), key=lambda line: line["mean"])
    show(best, "table", columns, notes=["bits/byte, less is better"])


def _show_race(race: Race, form: str) -> None:
    """Print one line a mixture, those that stopped marked and last."""
    rows = [
        {
            "mixture": runner.subject.label,
            "complete": runner.complete,
            "share": runner.share,
            "mean": runner.mean,
            "behind": runner.behind,
            "at_least": runner.at_least,
        }
        for runner in race.runners
    ]
    columns = [
        Column("mixture"),
        Column("share", "scored", lambda share: "all" if share == 1 else f"{share:.0%}, stopped"),
        Column("mean", write=fixed(4)),
        Column("behind", write=fixed(4)),
        Column("at_least", "at least", fixed(4)),
    ]
    show(rows, form, columns, names="mixture",
         notes=["bits/byte, less is better; behind: behind the best"])  # fmt: skip
    stopped = sum(not row["complete"] for row in rows)
    saved = 1 - race.tokens / race.whole if race.whole else 0.0
    message(
        f"{many(stopped, 'mixture')} stopped with {race.confidence:.0%} confidence; scored "
        f"{race.tokens:,} of {race.whole:,} tokens, {saved:.0%} saved"
    )
    if not stopped and saved == 0:
        message("none was surely worse before the end; a race needs evalsets of many documents")
