"""Races: who stops, what is recorded of them, and that whoever ends has the scores of a sweep."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pools
import pytest
from hypothesis import given
from hypothesis import strategies as st

from poolreg import Pool
from poolreg.errors import UsageError
from poolreg.evaluation import engines
from poolreg.evaluation.laps import LAPS, LEAST, covered, lap_documents, race_order
from poolreg.evaluation.protocol import rolling_windows
from poolreg.evaluation.scoring import TokenisedSet

pytestmark = pytest.mark.usefixtures("one_thread")
MIXTURES = ["alpha", "alpha+beta", "alpha+gamma", "beta+gamma", "3*alpha+gamma", "alpha+beta+gamma"]


@pytest.fixture(scope="module")
def long(tiny, tmp_path_factory) -> Path:
    """A pool with an evalset of many documents; never change it."""
    folder = tmp_path_factory.mktemp("long")
    copy = tiny.copy(folder / "pool")
    with Pool.open(copy) as pool:
        pool.add_evalset("prose", [pools.write_prose(folder / "prose.jsonl", 150)])
    return copy


@pytest.fixture
def pool(long, tmp_path):
    with Pool.open(shutil.copytree(long, tmp_path / "pool")) as opened:
        yield opened


def raced(pool, confidence=0.95, on=("prose",)):
    return pool.race(pool.plan_sweep(MIXTURES, on), confidence=confidence)


def scores(pool) -> dict[str, float]:
    rows = pool.sql("SELECT label, bits_per_byte FROM scores WHERE evalset = 'prose'").rows
    return dict(rows)


# -- laps ------------------------------------------------------------------------------------


@given(st.integers(1, 400))
def test_laps_take_every_document_once(documents):
    parts = [lap_documents("e" * 64, documents, lap) for lap in range(LAPS)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(documents))
    assert np.array_equal(np.concatenate(parts), race_order("e" * 64, documents))
    for lap, _part in enumerate(parts):
        assert covered(lap, documents) == sum(map(len, parts[: lap + 1]))
    assert len(parts[0]) == min(documents, max(LEAST, -(-documents // 2 ** (LAPS - 1))))


def made(lengths, size) -> TokenisedSet:
    draw = np.random.default_rng(sum(lengths))
    stream, windows, start = [], [], 0
    for length in lengths:
        stream.append(draw.integers(1, 100, length + 1))
        rows = np.array(list(rolling_windows(length, size)), np.int64).reshape(-1, 3)
        windows.append(rows + np.array([start, start, 0]))
        start += length + 1
    return TokenisedSet(
        np.concatenate(stream).astype(np.int32), np.concatenate(windows),
        np.array(lengths), np.arange(len(lengths)),
    )  # fmt: skip


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.data())
def test_some_documents_have_the_windows_that_they_have_in_the_whole(lengths, data):
    whole = made(lengths, 8)
    numbers = data.draw(st.lists(st.integers(0, len(lengths) - 1), unique=True))
    part = whole.only(np.array(numbers, np.int64))
    assert part.tokens.tolist() == [lengths[n] for n in numbers]
    assert part.bytes.tolist() == numbers

    def read(text, document):
        first = text.prefixes[document]
        last = first + text.tokens[document]
        return [
            (text.stream[start : stop + 1].tolist(), scored)
            for start, stop, scored in text.windows.tolist()
            if first <= start and stop <= last and scored
        ]

    for place, number in enumerate(numbers):
        assert read(part, place) == read(whole, number)
    assert len(part.windows) == sum(len(read(whole, n)) for n in numbers)


# -- races -----------------------------------------------------------------------------------


def test_whoever_ends_has_the_scores_of_a_sweep(long, pool, tmp_path):
    race = raced(pool, confidence=0.5)
    ended = {r.subject.label: r.mean for r in race.runners if r.complete}
    stopped = {r.subject.label for r in race.runners if not r.complete}
    assert ended.keys() | stopped == set(MIXTURES)
    mine = scores(pool)
    assert mine.keys() >= ended.keys()
    assert not mine.keys() & stopped - {"alpha"}
    whole = shutil.copytree(long, tmp_path / "whole")
    with Pool.open(whole) as other:
        other.sweep(other.plan_sweep(MIXTURES, ["prose"]))
        theirs = scores(other)
    assert ended == pytest.approx({label: theirs[label] for label in ended}, rel=1e-6)
    assert race.runners[0].mean == min(ended.values())
    assert race.runners[0].behind == 0
    for runner in race.runners:
        if runner.complete:
            assert runner.behind == pytest.approx(runner.mean - race.runners[0].mean, abs=1e-9)
        else:
            assert 0 < runner.at_least < runner.behind
            assert 0 < runner.share < 1
    shares = {r.subject.label: r.share for r in race.runners}
    assert race.tokens < race.whole or not stopped
    view = pool.sql("SELECT label, documents FROM raced WHERE evalset = 'prose'").rows
    assert dict(view) == {label: round(150 * shares[label]) for label in stopped}


def test_a_second_race_measures_nothing(pool, monkeypatch):
    first = raced(pool, confidence=0.5)
    monkeypatch.setattr(engines, "measured", None)
    second = raced(pool, confidence=0.5)
    assert [r.subject.digest for r in second.runners] == [r.subject.digest for r in first.runners]
    assert [r.share for r in second.runners] == [r.share for r in first.runners]
    assert second.tokens == first.tokens


def test_a_race_that_was_interrupted_goes_on(pool, monkeypatch):
    real, calls = engines.measured, []

    def failing(registry, work, settings, progress):
        calls.append(work.lap)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(registry, work, settings, progress)

    monkeypatch.setattr(engines, "measured", failing)
    with pytest.raises(KeyboardInterrupt):
        raced(pool)
    before = pool.sql("SELECT count(*) AS n FROM laps").rows[0][0]
    assert before > 0
    raced(pool)
    assert calls[3] == calls[2]  # what was done before is not done again


def test_what_was_measured_before_is_taken_whole(pool):
    pool.evaluate(["alpha+gamma"], ["prose"])
    race = raced(pool, confidence=0.5)
    (known,) = [r for r in race.runners if r.subject.label == "alpha+gamma"]
    assert known.complete
    rows = pool.sql("SELECT count(*) AS n FROM laps WHERE subject = '" + known.subject.digest + "'")
    assert rows.rows == [(0,)]


def test_one_mixture_ends_alone(pool):
    (runner,) = pool.race(pool.plan_sweep(["alpha+beta"], ["prose", "alpha"])).runners
    assert runner.complete
    assert runner.behind == runner.at_least == 0


@pytest.mark.parametrize("confidence", [0.0, 1.0, -1.0, float("nan")])
def test_a_confidence_that_is_none(pool, confidence):
    with pytest.raises(UsageError, match="not between 0 and 1"):
        raced(pool, confidence=confidence)


def test_the_command(pool, cli_run):
    words = ("--subsets", "--on", "prose", "--race", "--pool", pool.root)
    rows = json.loads(cli_run("sweep", *words, "--json").stdout)
    assert {row["mixture"] for row in rows} >= {"alpha+beta", "alpha+beta+gamma"}
    assert all((row["mean"] is None) != row["complete"] for row in rows)
    table = cli_run("sweep", *words)
    assert "tokens," in table.stderr
    assert "behind" in table.stdout
    refused = cli_run("sweep", *words, "--shard", "1/2", code=2)
    assert "cannot be cut into shards" in refused.stderr
    wrong = cli_run("sweep", *words, "--confidence", "2", code=None)
    assert "write 0.95 for 95%" in wrong.stderr


def test_few_documents_stop_nobody_and_say_so(pool, cli_run):
    told = cli_run("sweep", "--subsets", "--on", "alpha", "--race", "--pool", pool.root)
    assert "0 mixtures stopped" in told.stderr
    assert "a race needs evalsets of many documents" in told.stderr
