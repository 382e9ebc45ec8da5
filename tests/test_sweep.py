"""Sweeps: which mixtures, what is planned, and that kills and company change nothing."""

from __future__ import annotations

import itertools
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import pools
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from poolreg import Pool
from poolreg.errors import ConfigError, MixtureError, NotFound, UsageError
from poolreg.evaluation import averages, live, sweep
from poolreg.evaluation.averages import shared
from poolreg.evaluation.evaluate import Settings, measuring_order
from poolreg.evaluation.sweep import (
    choose_dirichlet,
    choose_subsets,
    in_shard,
    plan_sweep,
    read_mixtures,
    run_sweep,
)
from poolreg.mixture import Mixture, thousandths
from poolreg.models.resolve import Resolver

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]


@pytest.fixture(scope="module")
def six(tmp_path_factory) -> pools.Tiny:
    """A pool of six partitions; never change it."""
    return pools.tiny_pool(tmp_path_factory.mktemp("six"), dict.fromkeys(NAMES, 1) | {"beta": 2})


@pytest.fixture
def shown(six):
    with Pool.open(six.root) as pool:
        yield pool


def texts(mixtures: Sequence[Mixture]) -> list[str]:
    return [str(mixture) for mixture in mixtures]


# -- which mixtures -------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [None, (1, 1), (2, 3), (6, 6), (4, 9)])
def test_subsets(sizes, shown):
    low, high = sizes or (1, 6)
    expected = [
        "+".join(chosen)
        for size in range(low, min(high, 6) + 1)
        for chosen in itertools.combinations(sorted(NAMES), size)
    ]
    assert texts(choose_subsets(shown.registry, sizes=sizes)) == expected


def test_subsets_of_some(shown):
    chosen = choose_subsets(shown.registry, among="all - zeta - delta", sizes=(2, 2))
    assert len(chosen) == 6
    assert {name for mixture in chosen for name in mixture.partitions} == {*NAMES[:3], "epsilon"}


def test_a_limit_draws_the_same_each_time(shown):
    everything = texts(choose_subsets(shown.registry))
    some = [texts(choose_subsets(shown.registry, limit=9, sample_seed=s)) for s in (0, 0, 1)]
    assert some[0] == some[1] != some[2]
    for chosen in some:
        assert len(set(chosen)) == 9
        assert chosen == [text for text in everything if text in chosen]
    assert texts(choose_subsets(shown.registry, limit=63)) == everything
    assert texts(choose_subsets(shown.registry, limit=10**9)) == everything


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sizes": (0, 2)}, "sizes 0-2 are not a range"),
        ({"sizes": (3, 2)}, "sizes 3-2 are not a range"),
        ({"sizes": (7, 9)}, "no union of 7"),
        ({"among": "alpha+beta/1"}, "names single base units"),
        ({"limit": 0}, "cannot limit a sweep to 0"),
        ({"limit": -1}, "cannot limit a sweep to -1"),
    ],
)
def test_subsets_that_are_none(options, words, shown):
    with pytest.raises(UsageError, match=words):
        choose_subsets(shown.registry, **options)


def test_too_many_subsets(shown, monkeypatch):
    monkeypatch.setattr(sweep, "MOST_MIXTURES", 62)
    with pytest.raises(UsageError, match=r"6 partitions have 63 such subsets\n.*--dirichlet"):
        choose_subsets(shown.registry)
    assert len(choose_subsets(shown.registry, sizes=(1, 5))) == 62


@pytest.mark.parametrize("concentration", [0.01, 1.0, 50.0])
def test_dirichlet(concentration, shown):
    drawn = choose_dirichlet(shown.registry, 40, seed=3, concentration=concentration)
    assert drawn == choose_dirichlet(shown.registry, 40, seed=3, concentration=concentration)
    assert drawn != choose_dirichlet(shown.registry, 40, seed=4, concentration=concentration)
    assert len(drawn) == 40
    for mixture in drawn:
        weights = [weight for _, weight in mixture.weights]
        assert sum(weights) == 1
        assert all(1000 % weight.denominator == 0 for weight in weights)
        assert set(mixture.partitions) <= set(NAMES)
    spread = max(weight for mixture in drawn for _, weight in mixture.weights)
    assert (spread > Fraction(9, 10)) == (concentration == 0.01)


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (0, {}), (-3, {}), (10**9, {}), (5, {"concentration": 0.0}), (5, {"concentration": -1.0}),
        (5, {"concentration": math.nan}), (5, {"concentration": math.inf}), (5, {"seed": -1}),
    ],
)  # fmt: skip
def test_dirichlet_refuses(count, options, shown):
    with pytest.raises(UsageError, match="cannot draw"):
        choose_dirichlet(shown.registry, count, **options)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12).filter(lambda row: sum(row) > 0))
def test_whole_thousandths(row):
    shares = [share / sum(row) for share in row]
    counts = list(thousandths(shares))
    assert sum(counts) == 1000
    assert all(abs(n - 1000 * s) < 1 + 1e-9 for n, s in zip(counts, shares, strict=True))
    assert min(counts) >= 0


def test_a_file_of_mixtures(shown, tmp_path):
    path = tmp_path / "mixtures.txt"
    path.write_text(
        "\ufeffalpha+beta\n\n# all of it:\nall   # everything\n 2*gamma + zeta\nbeta/2\n"
    )
    assert texts(read_mixtures(shown.registry, path)) == [
        "alpha+beta", "alpha+beta+delta+epsilon+gamma+zeta", "2*gamma+zeta", "beta/2",
    ]  # fmt: skip
    path.write_text("alpha\nbeta +\n")
    with pytest.raises(MixtureError, match=r"line 2|'beta \+'"):
        read_mixtures(shown.registry, path)
    path.write_text("# nothing\n\n")
    with pytest.raises(ConfigError, match="no mixtures"):
        read_mixtures(shown.registry, path)
    path.write_bytes(b"alph\xff\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_mixtures(shown.registry, path)
    with pytest.raises(ConfigError, match="not a regular file"):
        read_mixtures(shown.registry, tmp_path)


# -- the plan -------------------------------------------------------------------------------


def test_a_plan_measures_nothing_and_counts(six, tmp_path):
    with Pool.open(six.copy(tmp_path / "pool")) as pool:
        before = pools.contents(pool.root)
        planned = pool.plan_sweep(on=["alpha", "zeta"])
        assert (planned.mixtures, planned.memoised, planned.work.evaluations) == (63, 0, 126)
        assert planned.seconds is None
        assert pools.contents(pool.root) == before
        pool.evaluate(["alpha", "alpha+zeta", "base"], ["alpha"])
        planned = pool.plan_sweep(on=["alpha", "zeta"])
        assert (planned.memoised, planned.work.evaluations) == (2, 124)
        sizes = {row["name"]: row["bytes"] for row in pool.evalsets()}
        assert planned.work.bytes == 61 * sizes["alpha"] + 63 * sizes["zeta"]
        assert planned.seconds is not None
        assert planned.seconds > 0


def test_mixtures_that_are_named(pool):
    assert pool.plan_sweep(["alpha+beta", "beta+alpha", "2*alpha+2*beta", "gamma"]).mixtures == 2
    assert pool.plan_sweep("alpha+beta").mixtures == 1
    with pytest.raises(NotFound, match="no partition is named nobody"):
        pool.plan_sweep(["alpha", "nobody"])
    assert pool.plan_sweep([]).work.evaluations == 0
    assert pool.sweep(pool.plan_sweep([])).rows == []


def test_neighbours_share_their_sums(pool, monkeypatch):
    """The order of measuring lets beginnings that neighbours share be summed once."""
    added = []
    real = averages.accumulate

    def accumulate(acc, raw, dtype, **options):
        added.append(raw.size)
        real(acc, raw, dtype, **options)

    monkeypatch.setattr(averages, "accumulate", accumulate)
    monkeypatch.setattr(averages, "FEWEST_KEPT", 2)
    planned = pool.plan_sweep(on=["alpha"])
    pool.sweep(planned)
    elements = sum(raw.size for _, raw in pools.arrays_of(pool_seed(pool)).values())
    lists = sorted(subject.integer_weights for subject in planned.subjects)
    one_by_one = sum(len(weights) for weights in lists if len(weights) > 1)
    known = [shared(a, b) for a, b in itertools.pairwise(lists)]
    spared = sum(n for n, weights in zip(known, lists[1:], strict=True) if 1 < n < len(weights))
    assert sum(added) == elements * (one_by_one - spared)
    assert spared > 0


def pool_seed(pool: Pool) -> Path:
    return pool.export_model("base", pool.root.parent / "exported")


# -- shards ---------------------------------------------------------------------------------


@given(limit=st.integers(1, 63), of=st.integers(1, 70), random=st.randoms(use_true_random=False))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_shards_are_the_whole_and_disjoint(limit, of, random, shown):
    resolver = Resolver(shown.registry)
    mixtures = choose_subsets(shown.registry, limit=limit)
    subjects = [resolver.mixture(mixture) for mixture in mixtures]
    shuffled = random.sample(subjects, len(subjects))
    parts = [in_shard(subjects, number, of) for number in range(1, of + 1)]
    assert sorted(s.digest for part in parts for s in part) == sorted(s.digest for s in subjects)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    for number, part in enumerate(parts, start=1):
        assert list(part) == [subject for subject in subjects if subject in part]
        other = in_shard(shuffled, number, of)
        assert sorted(other, key=measuring_order) == sorted(part, key=measuring_order)
    ordered = [s.digest for part in parts for s in sorted(part, key=measuring_order)]
    assert ordered == [s.digest for s in sorted(subjects, key=measuring_order)]


def test_one_average_under_two_names_is_in_one_shard(pool):
    named = ["alpha", "alpha/1", "beta", "gamma", "beta/1", "alpha+beta"]
    for of in range(2, 7):
        parts = [pool.plan_sweep(named, shard=(number, of)).subjects for number in range(1, of + 1)]
        found = [{subject.digest for subject in part} for part in parts]
        assert sum(len(part) for part in parts) == 6
        assert sum(len(digests) for digests in found) == len(set().union(*found)) == 5


@pytest.mark.parametrize("shard", [(0, 4), (5, 4), (-1, 4), (1, 0)])
def test_a_shard_that_is_none(shard, shown):
    with pytest.raises(UsageError, match="there is no shard"):
        shown.plan_sweep(shard=shard)


def test_what_is_known_does_not_move_shards(pool):
    before = [pool.plan_sweep(on=["alpha"], shard=(n, 3)).subjects for n in (1, 2, 3)]
    pool.sweep(pool.plan_sweep(on=["alpha"], shard=(2, 3)))
    assert [pool.plan_sweep(on=["alpha"], shard=(n, 3)).subjects for n in (1, 2, 3)] == before
    again = pool.plan_sweep(on=["alpha"], shard=(2, 3))
    assert (again.memoised, again.work.evaluations) == (len(before[1]), 0)
    assert pool.plan_sweep(on=["alpha"], shard=(1, 3)).memoised == 0


@pytest.mark.parametrize("bad", ["0/4", "5/4", "1", "1/", "a/b", "1/0", "1/4/4"])
def test_a_shard_on_the_command_line(bad, cli_pool, cli_run):
    done = cli_run("sweep", "--subsets", "--pool", cli_pool, "--shard", bad, code=2)
    assert "write 1/16 to 16/16" in done.stderr


@pytest.mark.slow
def test_shards_that_run_at_once(six, uninterrupted, tmp_path):
    """As the jobs of an array do: each by a process of its own, with a segment of its own."""
    root = six.copy(tmp_path / "pool")
    before = len(list((root / "journal").iterdir()))
    command = [sys.executable, "-c", SHARD, str(root)]
    jobs = [
        subprocess.Popen([*command, f"{n}/3", *ON], stderr=subprocess.PIPE, text=True)
        for n in (1, 2, 3)
    ]
    for job in jobs:
        _, errors = job.communicate(timeout=300)
        assert (job.returncode, errors) == (0, "")
    assert len(list((root / "journal").iterdir())) == before + 3
    assert measured(root) == ALL  # each once
    with Pool.open(root) as pool:
        planned = pool.plan_sweep(on=ON, settings=Settings(threads=1))
        assert planned.work.evaluations == 0
        assert pool.sweep(planned).rows == uninterrupted
    again = subprocess.run([*command, "2/3", *ON], check=True, capture_output=True)
    assert again.stderr == b""
    assert measured(root) == ALL


# -- the table ------------------------------------------------------------------------------


def test_the_table_is_the_evaluations_best_first(pool):
    planned = pool.plan_sweep(sizes=(1, 2), on=["beta", "gamma"])
    table = pool.sweep(planned)
    names = {digest: name for name, digest in pool.registry.names("evalset").items()}
    found = {(s.digest, e): s for s in planned.subjects for e in planned.evalsets}
    rows = run_sweep(pool.registry, pool.plan_sweep(sizes=(1, 2), on=["beta", "gamma"]))
    assert all(row.memoised for row in rows.values())
    expected = [(names[e], found[s, e].mixture, row.bits_per_byte) for (s, e), row in rows.items()]
    shown = [(row["evalset"], row["mixture"], row["bits_per_byte"]) for row in table.dicts()]
    assert [row[:2] for row in shown] == [
        row[:2] for row in sorted(expected, key=lambda row: (row[0], row[2]))
    ]
    assert len(shown) == 12


def test_the_table_holds_the_sweep_alone(pool):
    """Not what else is known of the same averages, by other expressions or protocols."""
    pool.ask(["alpha/1", "2*alpha+beta", "beta"], ["alpha"], scheme="macro")
    pool.evaluate(["alpha"], ["alpha"], settings=Settings(max_length=8))
    pool.evaluate(["alpha+beta", "gamma"], ["alpha"])
    table = pool.sweep(pool.plan_sweep(["alpha", "alpha+beta"], on=["alpha"], scheme="macro"))
    shown = [(row["mixture"], row["scheme"]) for row in table.dicts()]
    assert sorted(shown) == [("alpha", "micro"), ("alpha+beta", "macro")]


def test_a_macro_sweep(pool):
    micro = pool.sweep(pool.plan_sweep(on=["alpha"]))
    planned = pool.plan_sweep(on=["alpha"], scheme="macro")
    # Single partitions are averaged alike; unions of unequal ones are not.
    assert (planned.mixtures, planned.memoised, planned.work.evaluations) == (7, 3, 4)
    macro = pool.sweep(planned)
    both = [{row["mixture"]: row["loss"] for row in table.dicts()} for table in (micro, macro)]
    assert both[0].keys() == both[1].keys()
    equal = {mixture for mixture in both[0] if both[0][mixture] == both[1][mixture]}
    assert equal == {"alpha", "beta", "gamma"}


def test_mixtures_are_labelled_before_they_are_measured(pool, monkeypatch):
    real = live.LiveModel.load
    calls = []

    def load(self, weights, following):
        calls.append(weights)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, weights, following)

    monkeypatch.setattr(live.LiveModel, "load", load)
    planned = pool.plan_sweep(on=["alpha"])
    with pytest.raises(KeyboardInterrupt):
        pool.sweep(planned)
    again = plan_sweep(pool.registry, choose_subsets(pool.registry), ["alpha"])
    assert (again.memoised, again.work.evaluations) == (3, 4)
    assert len(pool.scores(planned).rows) == 3
    assert len(pool.sweep(again).rows) == 7
    assert len(calls) == 4 + 4


# -- kills and company ----------------------------------------------------------------------

SWEEP = """
import sys
import torch
from poolreg import Pool
from poolreg.evaluation import recording
from poolreg.evaluation.evaluate import Settings

recording.PATIENCE = 0.0  # models this small are done with all of it before a result is recorded
torch.set_num_threads(1)
with Pool.open(sys.argv[1]) as pool:
    pool.sweep(pool.plan_sweep(on=sys.argv[2:], settings=Settings(threads=1)))
"""


SHARD = """
import sys
import torch
from poolreg import Pool
from poolreg.evaluation.evaluate import Settings

torch.set_num_threads(1)
number, of = map(int, sys.argv[2].split("/"))
with Pool.open(sys.argv[1]) as pool:
    pool.sweep(pool.plan_sweep(on=sys.argv[3:], settings=Settings(threads=1), shard=(number, of)))
"""

ON = ["alpha", "delta", "zeta"]
ALL = 63 * len(ON)


def start(root: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SWEEP, str(root), *ON], stderr=subprocess.PIPE, text=True
    )


def measured(root: Path) -> int:
    """Count the evaluations in the journal, without opening the pool."""
    lines = b"".join(path.read_bytes() for path in (root / "journal").glob("*.jsonl"))
    return lines.count(b'"kind":"evaluation"')


def until(
    condition: Callable[[], bool], child: subprocess.Popen[str], seconds: float = 120
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert child.poll() is None, child.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture(scope="module")
def uninterrupted(six, tmp_path_factory) -> list[tuple[object, ...]]:
    """The table of one whole sweep, on a copy of the pool."""
    with Pool.open(six.copy(tmp_path_factory.mktemp("whole") / "pool")) as pool:
        rows = pool.sweep(pool.plan_sweep(on=ON, settings=Settings(threads=1))).rows
    assert len(rows) == ALL
    return rows


@pytest.mark.campaign
@pytest.mark.slow
def test_killed_three_times(six, uninterrupted, tmp_path):
    root = six.copy(tmp_path / "pool")
    delays = random.Random(time.time_ns())
    counts = []
    for _ in range(3):
        had = measured(root)
        child = start(root)
        goal = had + delays.randint(1, 30)
        until(lambda goal=goal: measured(root) >= goal, child)
        time.sleep(delays.uniform(0, 0.03))
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
        assert child.returncode == -signal.SIGKILL
        counts.append(measured(root))
        assert goal <= counts[-1] < ALL
    with Pool.open(root) as pool:
        planned = pool.plan_sweep(on=ON, settings=Settings(threads=1))
        # Each kill lost at most the mixture in flight, whose rows stand or fall together.
        assert planned.memoised == counts[-1]
        assert counts[-1] % len(ON) == 0
        assert planned.work.evaluations == ALL - counts[-1]
        assert pool.sweep(planned).rows == uninterrupted
        assert pool.plan_sweep(on=ON).memoised == ALL
    assert measured(root) == ALL  # nothing was measured twice


@pytest.mark.campaign
@pytest.mark.slow
def test_two_sweeps_and_questions_at_once(six, uninterrupted, tmp_path):
    root = six.copy(tmp_path / "pool")
    expected = {(row[0], row[1]): row for row in uninterrupted}
    children = [start(root), start(root)]
    asked = answered = 0
    while any(child.poll() is None for child in children):
        with Pool.open(root) as pool:
            for text in ("alpha+beta", "gamma", "all"):
                for answer in pool.ask(text, ["delta", "zeta"], settings=Settings(threads=1)):
                    row = expected[answer.evalset, answer.mixture]
                    assert (answer.perplexity, answer.bits_per_byte) == pytest.approx(row[4:6])
                    assert answer.vs_seed is not None
                    asked += 1
                    answered += answer.memoised
            partial = pool.sql("SELECT count(*), count(DISTINCT label) FROM scores").rows
            assert partial[0][0] <= ALL + len(ON)
    for child in children:
        _, errors = child.communicate()
        assert (child.returncode, errors) == (0, "")
    assert asked >= 6
    assert answered > 0
    with Pool.open(root) as pool:
        planned = pool.plan_sweep(on=ON, settings=Settings(threads=1))
        assert planned.work.evaluations == 0
        assert pool.sweep(planned).rows == uninterrupted
        # The catalog holds each evaluation once, though both may have measured it.
        assert pool.sql(
            "SELECT count(*), count(DISTINCT (subject, evalset, protocol)) FROM evaluations"
            " WHERE subject IN (SELECT subject FROM mixtures)"
        ).rows == [(ALL, ALL)]
        tables = ("evaluations", "mixtures", "recipes", "models", "names", "model_units")
        before = [pool.sql(f"SELECT * FROM {table} ORDER BY ALL").rows for table in tables]
        pool.registry.close()
        pool.registry.catalog.path.unlink()
        after = [pool.sql(f"SELECT * FROM {table} ORDER BY ALL").rows for table in tables]
        assert before == after
    assert list((root / "tmp").iterdir()) == []
