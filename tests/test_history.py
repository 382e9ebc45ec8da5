"""The history of a pool: what is told, in which order, and of what."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone

import pytest

from poolreg import Pool
from poolreg.errors import NotFound, UsageError
from poolreg.store import records

pytestmark = pytest.mark.usefixtures("one_thread")


def told(rows) -> list[tuple]:
    return [(row["event"], row["kind"], row["name"], row["detail"]) for row in rows]


def other_text(pool, name: str):
    path = pool.root.parent / f"{name}.jsonl"
    path.write_text(json.dumps({"text": f"another {name}"}) + "\n")
    return path


def test_how_a_pool_came_to_be(pool):
    rows = pool.log()
    assert [row["added"] for row in rows] == sorted((row["added"] for row in rows), reverse=True)
    assert sorted(told(rows), key=str) == sorted([
        *((event, kind, name, detail)
          for name, units in (("alpha", "1 unit"), ("beta", "2 units"), ("gamma", "3 units"))
          for event, kind, detail in (
              ("added", "partition", f"12 documents, {units}"), ("named", "partition", None),
              ("added", "evalset", "3 documents"), ("named", "evalset", None))),
        ("added", "model", "base", "seed"), ("named", "model", "base", None),
        *(("added", "model", f"{name}/{unit}", "unit from base")
          for name, units in (("alpha", 1), ("beta", 2), ("gamma", 3))
          for unit in range(1, units + 1)),
    ], key=str)  # fmt: skip


def test_a_name_that_moved_leads_to_all_that_it_meant(pool):
    first = pool.registry.resolve("evalset", "alpha")
    second = pool.add_evalset("alpha", [other_text(pool, "alpha")], replace=True).digest
    pool.add_evalset("other", [other_text(pool, "other")])
    pool.registry.record(records.name("evalset", "old", first))
    rows = [row for row in pool.log("alpha") if row["kind"] == "evalset"]
    (moved,) = [row for row in rows if row["event"] == "moved"]
    assert (moved["digest"], moved["from_digest"]) == (second, first)
    assert moved["detail"] == f"from {first[:12]}"
    assert {row["digest"] for row in rows} == {first, second}
    # The evalset that lost the name is told under its other one, too, and so is the loss.
    assert ("named", "old") in {(row["event"], row["name"]) for row in rows}
    assert {row["event"] for row in pool.log("old")} == {"added", "named", "moved"}
    assert {row["event"] for row in pool.log(first[:12])} == {"added", "named", "moved"}
    assert {row["event"] for row in pool.log(second)} == {"added", "moved"}
    # "alpha" is a partition as well.
    assert {row["kind"] for row in pool.log("alpha")} == {"partition", "evalset"}


def test_removed_and_restored_each_once(pool):
    digest = pool.registry.resolve("evalset", "alpha")
    for removed in (False, True, True, False, False, True):
        pool.registry.record(records.removal("evalset", digest, removed=removed))
    assert [row["event"] for row in pool.log(digest)] == [
        "removed", "restored", "removed", "added", "named",
    ]  # fmt: skip
    assert {row["name"] for row in pool.log(digest)} == {"alpha"}


def test_saying_a_name_again_is_no_event_but_another_parent_is(pool):
    digest = pool.registry.resolve("partition", "alpha")
    before = pool.log("alpha")
    pool.registry.record(records.name("partition", "alpha", digest))
    assert pool.log("alpha") == before
    for parent in ("text", "text", None):
        pool.registry.record(records.name("partition", "alpha", digest, parent=parent))
    new = pool.log("alpha")[:2]
    assert [(row["event"], row["detail"], row["from_digest"]) for row in new] == [
        ("named", "under nothing", None), ("named", "under text", None),
    ]  # fmt: skip
    assert pool.log("alpha")[2:] == before


def test_merges_transfers_trust_and_evaluations(pool):
    pool.ask("alpha+beta")
    kept = pool.keep_merge("alpha+beta", "both")
    pool.registry.record(
        records.transfer("push", "me/pool", version="c" * 40, records=1, objects=2, bytes=3,
                         left=[], repo_type="model", revision=None),
        records.transfer("pull", "file.tar", version="", records=12, objects=1, bytes=3, left=[],
                         repo_type="", revision=None),
        records.trust(kept.digest),
    )  # fmt: skip
    rows = pool.log()
    recent = {row["event"]: row for row in reversed(rows)}
    assert recent["pushed"]["detail"] == f"to me/pool@{'c' * 12}: 1 record, 2 objects"
    assert recent["pulled"]["detail"] == "from file.tar: 12 records, 1 object"
    assert recent["trusted"]["digest"] == kept.digest
    recipe = pool.resolve("alpha+beta").digest
    assert recent["merged"] | {"added": None} == {
        "added": None, "event": "merged", "kind": "model", "name": "both", "digest": kept.digest,
        "from_digest": recipe, "detail": "average of alpha+beta",
    }  # fmt: skip
    # Once, although there is a run, too.
    assert sorted(row["event"] for row in pool.log("both")) == ["merged", "named", "trusted"]
    measured = [row for row in rows if row["event"] == "measured"]
    counts = pool.sql("SELECT count(*), count(DISTINCT subject) FROM evaluations").rows[0]
    assert sum(int(row["detail"].split()[0]) for row in measured) == counts[0] > 3
    assert f"of {counts[1]} subjects" in measured[0]["detail"] or len(measured) > 1


def test_a_merge_that_was_killed_before_its_build_was_said_is_told_too(pool):
    body = pool.sql("SELECT * FROM runs WHERE role = 'seed'").dicts()[0]
    run = {key: body[key] for key in body if key not in ("digest", "added", "recipe")}
    other = {**run, "how": "merged", "role": "other", "recipe": None, "units": []}
    pool.registry.record(records.fact("run", other))
    assert ("merged", "model", "base", "other") in told(pool.log("base"))


def test_trained_models_say_from_where_and_on_what(pool):
    seed, alpha = (pool.resolve(name).digest for name in ("base", "alpha"))
    run = {
        "model": alpha, "role": "reference", "seed": seed, "blend": None, "mixture": "alpha+beta",
        "scheme": "micro", "budget": "same", "how": "trained", "tokens": 1, "steps": 1,
        "seconds": 1.0, "final_loss": 1.0, "recipe": None, "units": [],
    }  # fmt: skip
    pool.registry.record(records.fact("run", run), records.name("model", "ref", alpha))
    (row,) = [row for row in pool.log("ref") if row["event"] == "trained"]
    assert (row["detail"], row["from_digest"]) == ("reference on alpha+beta from base", seed)


def test_limit_since_and_what_is_not_there(pool):
    rows = pool.log()
    assert pool.log(limit=3) == rows[:3]
    middle = rows[5]["added"]
    newer = [row for row in rows if row["added"] >= middle]
    assert 5 < len(newer) < len(rows)
    assert pool.log(since=middle) == newer
    # A time zone is heeded.
    east = middle.replace(tzinfo=UTC).astimezone(timezone(timedelta(hours=5)))
    assert pool.log(since=east) == newer
    assert pool.log(since=datetime.now(UTC) + timedelta(days=1)) == []
    with pytest.raises(NotFound) as caught:
        pool.log("alpah")
    assert "alpha" in caught.value.hint
    for text in ("", "abc12", "f" * 64):
        with pytest.raises(NotFound):
            pool.log(text)


def test_a_beginning_that_several_share(tmp_path):
    with Pool.create(tmp_path / "pool") as pool:
        for end in "ab":
            pool.registry.record(records.name("evalset", end, "1234567" + end * 57))
        with pytest.raises(UsageError, match="begins 2"):
            pool.log("123456")
        assert [row["name"] for row in pool.log("1234567a")] == ["a"]
        # A name comes before a digest.
        pool.registry.record(records.name("evalset", "123456", "c" * 64))
        assert [row["name"] for row in pool.log("123456")] == ["123456"]


def test_the_command(cli_run, cli_pool):
    rows = json.loads(cli_run("log", "--pool", cli_pool, "--json").stdout)
    assert list(rows[0]) == ["added", "event", "kind", "name", "digest", "from_digest", "detail"]
    assert {"measured", "added", "named"} == {row["event"] for row in rows}
    said = cli_run("log", "base", "-n", 1, "--pool", cli_pool).stdout
    assert said.splitlines()[0].split() == [
        "time",
        "(UTC)",
        "what",
        "kind",
        "name",
        "digest",
        "detail",
    ]
    assert len(said.splitlines()) == 2
    quiet = cli_run("log", "--pool", cli_pool, "--format", "quiet").stdout.splitlines()
    assert quiet == list(dict.fromkeys(row["digest"] for row in rows if row["digest"]))
    csv = cli_run("log", "--pool", cli_pool, "--format", "csv").stdout.splitlines()
    assert len(csv) == len(rows) + 1
    for since in ("7d", "2000-01-01", "2000-01-01T10:00+02:00", "1.5h", "90 min"):
        found = cli_run("log", "--since", since, "--pool", cli_pool, "--json").stdout
        assert json.loads(found) == rows, since
    assert "nothing to show" in cli_run("log", "--since", "2999-01-01", "--pool", cli_pool).stderr
    for since in ("yesterday", "7", "99999999d", "-1d"):
        assert (
            "is not a time" in cli_run("log", "--since", since, "--pool", cli_pool, code=2).stderr
        )
    cli_run("log", "nothing-like-it", "--pool", cli_pool, code=1)


def test_hostile_names_reach_no_terminal(tmp_path, cli_run):
    with Pool.create(tmp_path / "pool") as pool:
        pool.registry.record(records.name("evalset", "evil\x1b[31m", "a" * 64))
    said = cli_run("log", "--pool", tmp_path / "pool").stdout
    assert "\x1b" not in said
    assert "evil\\x1b[31m" in said


def test_the_view_is_there_for_sql(cli_run, cli_pool):
    said = cli_run("sql", "SELECT event, count(*) AS n FROM history GROUP BY event", "--json",
                   "--pool", cli_pool).stdout  # fmt: skip
    assert {row["event"] for row in json.loads(said)} == {"measured", "added", "named"}


def test_what_a_pull_brought_stands_at_its_own_time(tiny, tmp_path):
    with Pool.open(tiny.copy(tmp_path / "from")) as source:
        made = [row for row in source.log() if row["event"] != "measured"]
        source.create_bundle(tmp_path / "pool.tar")
    with Pool.create(tmp_path / "to") as target:
        target.apply_bundle(tmp_path / "pool.tar")
        rows = target.log()
    assert rows[0]["event"] == "pulled"
    assert rows[1:] == made
