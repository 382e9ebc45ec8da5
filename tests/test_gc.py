"""Collection: what goes is garbage, what stays is everything else, whatever happens meanwhile."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from collecting import (
    GRACE,
    add_calibration,
    add_evalset,
    add_evaluation,
    add_model,
    garbage,
    live_objects,
    stored,
)
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from poolreg import Pool
from poolreg.canonical import sha256
from poolreg.errors import Conflict, Damage, Locked, NotFound, StorageError, UnknownFormat
from poolreg.store import records
from poolreg.store.journal import Record
from poolreg.store.registry import Registry
from poolreg.store.staging import in_use, working_folder
from poolreg.upkeep import collection
from poolreg.upkeep.collection import Plan, collect
from poolreg.upkeep.removal import remove, restore

NOW = timedelta(0)


@pytest.fixture(scope="module")
def empty(tmp_path_factory) -> Path:
    made = Registry.create(tmp_path_factory.mktemp("empty") / "pool")
    made.catalog.refresh()
    made.close()
    return made.root


@pytest.fixture
def registry(empty, tmp_path) -> Iterator[Registry]:
    with contextlib.closing(
        Registry.open(Path(shutil.copytree(empty, tmp_path / "pool")))
    ) as opened:
        yield opened


@pytest.fixture(scope="module")
def furnished(empty, tmp_path_factory) -> Path:
    """A pool with, of each kind, something that lives and something that does not."""
    root = Path(shutil.copytree(empty, tmp_path_factory.mktemp("furnished") / "pool"))
    with contextlib.closing(Registry.open(root)) as registry:
        wiki, news = add_evalset(registry, "wiki", "one"), add_evalset(registry, "news", "two")
        base = add_model(registry, "base", b"weights of base", b"shared tokenizer")
        gone = add_model(registry, "gone", b"weights of gone", b"shared tokenizer")
        for number, (model, text) in enumerate([(base, wiki), (base, news), (gone, wiki)]):
            add_evaluation(registry, model, text, b"scores %d" % number)
            layers = [b"layer %d" % number, b"common layer"]
            add_calibration(registry, model, text, "evalset", layers)
        registry.objects.put(b"what a killed writer left")
        remove(registry, ["news", "gone"])
    return root


@pytest.fixture
def filled(furnished, tmp_path) -> Iterator[Registry]:
    """A copy of that pool, to be changed at will."""
    with contextlib.closing(
        Registry.open(Path(shutil.copytree(furnished, tmp_path / "pool")))
    ) as opened:
        yield opened


def digests(plan: Plan) -> set[str]:
    return {
        item.path.removeprefix("objects/").replace("/", "")
        for item in plan.garbage
        if item.path.startswith("objects/")
    }


def later(monkeypatch, by: timedelta) -> None:
    """Let time pass for collections."""
    monkeypatch.setattr(collection, "_now", lambda _: time.time() + by.total_seconds())


def dry(registry: Registry, grace: timedelta = NOW) -> Plan:
    return collect(registry, grace=grace, dry_run=True)


def write_record(registry: Registry, line: bytes, name: str = "zz.jsonl") -> Path:
    path = registry.root / "journal" / name
    path.write_bytes(line)
    return path


# -- the plan ----------------------------------------------------------------------------------


def test_garbage_is_what_only_removed_things_and_nothing_name(filled):
    plan = dry(filled)
    assert digests(plan) == garbage(filled.root, grace=NOW)
    # weights of gone, news and its digests, two layers of calibrations with them, and the trace
    assert len(digests(plan)) == 6
    kept = stored(filled.root).keys() - digests(plan)
    assert sha256(b"shared tokenizer") in kept
    assert sha256(b"common layer") in kept
    assert {sha256(b"scores %d" % number) for number in range(3)} <= kept
    assert kept == live_objects(filled.root)
    assert plan.kept == len(kept)
    assert [(amount.reason, amount.files) for amount in plan.amounts] == [
        ("removed", 5),
        ("of no record", 1),
    ]


def test_a_dry_run_deletes_nothing_and_says_what_a_run_does(filled):
    before = stored(filled.root)
    plan = dry(filled)
    assert stored(filled.root) == before
    assert collect(filled, grace=NOW) == plan
    assert stored(filled.root).keys() == before.keys() - digests(plan)
    assert dry(filled).garbage == ()


def test_freed_bytes_are_those_on_the_disk(filled):
    plan = dry(filled)
    sizes = {digest: path.stat().st_blocks * 512 for digest, path in stored(filled.root).items()}
    assert plan.bytes == sum(sizes[digest] for digest in digests(plan)) > 0
    # A second name, as in a copy made of links, keeps the bytes where they are.
    twin = stored(filled.root)[sha256(b"weights of gone")]
    os.link(twin, filled.root.parent / "twin")
    assert dry(filled).bytes == plan.bytes - sizes[sha256(b"weights of gone")]
    assert [item.bytes for item in plan.biggest(2)] == sorted(sizes.values())[-2:]


@pytest.mark.parametrize(("days", "expected"), [(0, False), (13.9, False), (14.1, True)])
def test_garbage_waits_for_the_grace(filled, monkeypatch, days, expected):
    later(monkeypatch, timedelta(days=days))
    plan = dry(filled, GRACE)
    assert bool(plan.garbage) is expected
    assert sum(amount.files for amount in plan.waiting) == (0 if expected else 6)
    now = datetime.now(UTC) + timedelta(days=days)
    assert digests(plan) == garbage(filled.root, grace=GRACE, now=now)


def test_a_removal_starts_the_grace_anew(filled, monkeypatch):
    restore(filled, ["gone"])
    at = datetime.now(UTC) + timedelta(days=13)
    monkeypatch.setattr("poolreg.store.records.now", lambda: at.strftime("%Y-%m-%dT%H:%M:%S.%fZ"))
    remove(filled, ["gone"])
    later(monkeypatch, timedelta(days=15))
    weights = sha256(b"weights of gone")
    assert weights not in digests(dry(filled, GRACE))
    assert garbage(filled.root, grace=GRACE, now=datetime.now(UTC) + timedelta(days=15)) == digests(
        dry(filled, GRACE)
    )
    later(monkeypatch, timedelta(days=28))
    assert weights in digests(dry(filled, GRACE))


def test_a_copy_that_keeps_times_waits_all_the_same(filled):
    for path in stored(filled.root).values():
        os.utime(path, (1, 1))  # as rsync -t and cp -p do
    assert dry(filled, timedelta(hours=1)).garbage == ()


def test_times_in_the_future_are_no_age(filled):
    for path in stored(filled.root).values():
        os.utime(path, (2e9 + 1e9,) * 2)
    assert {amount.reason for amount in dry(filled, timedelta(seconds=1)).waiting} == {
        "removed",
        "of no record",
    }


def test_a_record_of_an_unknown_kind_keeps_its_objects(filled):
    kept = filled.objects.put(b"of a kind to come")
    filled.journal.append([Record("kind-to-come", "x", {}, {kept: 17})])
    assert kept not in digests(dry(filled))


def test_an_object_that_lives_in_one_record_lives(filled):
    shared = b"weights of gone"
    add_model(filled, "other", shared)
    assert sha256(shared) not in digests(dry(filled))
    remove(filled, ["other"])
    assert sha256(shared) in digests(dry(filled))


def test_strange_files_and_links_stay(filled):
    strange = filled.root / "objects" / "ab" / "notes.txt"
    strange.parent.mkdir(exist_ok=True)
    strange.write_text("mine")
    link = filled.root / "objects" / "ab" / ("0" * 62)
    link.symlink_to(strange)
    (filled.root / "quarantine").mkdir()
    (filled.root / "quarantine" / ("1" * 64)).write_text("bad")
    collect(filled, grace=NOW)
    assert strange.read_text() == "mine"
    assert link.is_symlink()
    assert (filled.root / "quarantine" / ("1" * 64)).exists()


# -- it fails closed -----------------------------------------------------------------------------


def spoilt(registry: Registry) -> None:
    segment = next(iter((registry.root / "journal").glob("*.jsonl")))
    content = bytearray(segment.read_bytes())
    content[len(content) // 3] ^= 1
    segment.write_bytes(content)


def newer(registry: Registry) -> None:
    line = Record("name", "x", {}, {}, "2026-01-01T00:00:00.000000Z").line()[9:-1]
    fields = json.loads(line) | {"v": 2}
    import binascii

    payload = json.dumps(fields).encode()
    write_record(registry, b"%08x %s\n" % (binascii.crc32(payload), payload))


def shortened(registry: Registry) -> None:
    segment = next(iter((registry.root / "journal").glob("*.jsonl")))
    os.truncate(segment, segment.stat().st_size // 2)


def gone(registry: Registry) -> None:
    next(iter((registry.root / "journal").glob("*.jsonl"))).unlink()


@pytest.mark.parametrize(
    ("harm", "error"),
    [(spoilt, Damage), (newer, UnknownFormat), (shortened, Damage), (gone, Damage)],
)
def test_a_journal_that_cannot_be_relied_on_stops_it(filled, harm, error):
    filled.catalog.refresh()
    harm(filled)
    before = stored(filled.root)
    with pytest.raises(error):
        collect(filled, grace=NOW)
    assert stored(filled.root) == before


def test_an_unreadable_folder_stops_it(filled, monkeypatch):
    before, scandir = stored(filled.root), os.scandir
    bad = sorted(before.values())[-1].parent

    def refusing(path):
        if str(path) == str(bad):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(collection.os, "scandir", refusing)
        with pytest.raises(StorageError, match="through objects"):
            collect(filled, grace=NOW)
    assert stored(filled.root) == before


def test_digests_in_a_torn_end_are_kept(filled):
    on_its_way = filled.objects.put(b"on its way into a record")
    line = Record("evaluation", "x", {}, {on_its_way: 24}, "2026-01-01T00:00:00.000000Z").line()
    write_record(filled, line[: line.index(on_its_way.encode()) + 70])
    assert on_its_way not in digests(dry(filled))
    assert sha256(b"what a killed writer left") in digests(dry(filled))


def test_a_long_torn_end_is_read_to_its_beginning(filled):
    first = filled.objects.put(b"first of many")
    others = {sha256(b"%d" % number): 1 for number in range(3000)}
    line = Record("evaluation", "x", {"first": first}, others).line()
    assert len(line) > 3 * collection._TORN_STEP
    write_record(filled, line[:-5])
    assert first not in digests(dry(filled))


def test_a_clock_that_is_behind_the_journal_stops_it(filled, monkeypatch):
    later(monkeypatch, timedelta(days=-3))
    with pytest.raises(Conflict, match=r"3 days after what the clock"):
        dry(filled)
    later(monkeypatch, timedelta(hours=-3))
    assert dry(filled, GRACE).garbage == ()


def test_a_writer_keeps_it_away(filled, monkeypatch, cli_run):
    monkeypatch.setattr(Registry, "alone", functools.partialmethod(Registry.alone, timeout=0.1))
    with filled.writing():
        with pytest.raises(Locked, match="another process is using the pool"):
            collect(filled, grace=NOW)
        said = cli_run("gc", "--pool", filled.root, code=11)
        assert "wait for it to finish" in said.stderr
    assert cli_run("gc", "--pool", filled.root).stderr == "deleted 0 files, 0 B\n"


# -- leftovers -----------------------------------------------------------------------------------


def leftovers(registry: Registry) -> list[str]:
    return sorted(path.name for path in (registry.root / "tmp").iterdir())


def test_leftovers_go_after_a_day_at_least(registry, monkeypatch):
    tmp = registry.root / "tmp"
    (tmp / "object.1.ab.tmp").write_bytes(b"x" * 5000)
    (tmp / "train-ab").mkdir()
    (tmp / "train-ab" / "lock").touch()
    (tmp / "train-ab" / "state").write_bytes(b"x" * 5000)
    assert not dry(registry).garbage
    later(monkeypatch, timedelta(hours=23))
    assert not dry(registry).garbage
    later(monkeypatch, timedelta(hours=25))
    assert not dry(registry, timedelta(days=2)).garbage
    plan = collect(registry, grace=NOW)
    assert [(i.reason, i.path) for i in plan.garbage] == [
        ("temporary", "tmp/object.1.ab.tmp"),
        ("temporary", "tmp/train-ab"),
    ]
    assert plan.bytes >= 10_000
    assert leftovers(registry) == []


def test_the_newest_file_of_a_folder_counts(registry, monkeypatch):
    folder = registry.root / "tmp" / "train-ab" / "deep"
    folder.mkdir(parents=True)
    fresh = folder / "state"
    fresh.touch()
    ahead = time.time() + 86_400
    os.utime(fresh, (ahead, ahead))
    later(monkeypatch, timedelta(hours=30))
    assert not dry(registry).garbage
    later(monkeypatch, timedelta(hours=50))
    assert len(dry(registry).garbage) == 1


def test_folders_that_somebody_works_in_stay(registry, monkeypatch):
    later(monkeypatch, timedelta(days=100))
    train = registry.root / "tmp" / "train-ab"
    train.mkdir()
    with (
        open(train / "lock", "w") as lock,
        working_folder(registry.root / "tmp", prefix="working.") as working,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        with in_use(working):
            assert not collect(registry, grace=NOW).garbage
        assert not collect(registry, grace=NOW).garbage
        assert leftovers(registry) == sorted([train.name, working.name])
    assert leftovers(registry) == [train.name]
    assert len(collect(registry, grace=NOW).garbage) == 1


def test_a_killed_worker_does_not_keep_its_folder(registry, monkeypatch):
    code = (
        "import sys, time; from pathlib import Path\n"
        "from poolreg.store.staging import working_folder\n"
        "with working_folder(Path(sys.argv[1])) as made: print(made, flush=True); time.sleep(60)"
    )
    words = [sys.executable, "-c", code, str(registry.root / "tmp")]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        later(monkeypatch, timedelta(days=2))
        assert not collect(registry, grace=NOW).garbage
        process.kill()
    assert len(collect(registry, grace=NOW).garbage) == 1


# -- kills ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["gc.delete@1", "gc.delete@4", "gc.delete@6", "gc.flush@1"])
def test_killed_anywhere_only_garbage_is_gone(filled, step):
    filled.catalog.refresh()
    before, expected = stored(filled.root), digests(dry(filled))
    code = "import sys; from poolreg.cli.main import main; main()"
    words = [sys.executable, "-c", code, "gc", "--grace", "0", "--pool", str(filled.root)]
    done = subprocess.run(words, env=os.environ | {"POOLREG_FAULT": f"{step}=kill"}, check=False)
    assert done.returncode == -9
    gone = before.keys() - stored(filled.root).keys()
    count = int(step.split("@")[1]) - 1
    assert len(gone) == (count if "delete" in step else len(expected))
    assert gone <= expected
    collect(filled, grace=NOW)
    assert before.keys() - stored(filled.root).keys() == expected


def test_a_failing_disk_is_told(filled):
    code = "import sys; from poolreg.cli.main import main; main()"
    words = [sys.executable, "-c", code, "gc", "--grace", "0", "--pool", str(filled.root)]
    environment = os.environ | {"POOLREG_FAULT": "gc.delete@2=EIO"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "error: deleting: Input/output error" in done.stderr
    assert live_objects(filled.root) <= stored(filled.root).keys()


# -- what survives -------------------------------------------------------------------------------


def test_evaluations_outlive_their_model(filled):
    before = filled.select("evaluations", digests=list(_evaluations(filled)))
    collect(filled, grace=NOW)
    rows = filled.select("evaluations", digests=list(_evaluations(filled)))
    assert rows == before
    assert len(rows) == 3
    assert all(filled.objects.has(row["document_scores"]) for row in rows)


def _evaluations(registry: Registry) -> Iterator[str]:
    return (record.id for record in registry.journal.all() if record.kind == "evaluation")


def test_memoised_answers_need_no_weights(tiny, tmp_path):
    root = tiny.copy(tmp_path / "pool")
    with Pool.open(root) as pool:
        (first, *_) = pool.ask("alpha", on=["alpha"])
        model = pool.resolve("alpha").digest
        pool.rm("alpha/1")
        pool.gc(grace=NOW)
        with pytest.raises(NotFound, match="alpha/1 was removed"):
            pool.ask("alpha", on=["alpha"])
        with pytest.raises(NotFound, match="collected"):
            pool.restore("alpha/1")
        rows = pool.sql("select nll from evaluations where subject = ?", [model]).rows
        assert [first.nll] in [list(row) for row in rows]
        # added again, the answer is remembered
        added = pool.add_model(
            tiny.units["alpha", 1], role="unit", partition="alpha", seed="base", tokens=100
        )
        assert (added.digest, added.new) == (model, False)
        (again, *_) = pool.ask("alpha", on=["alpha"])
        assert again.memoised
        assert again.nll == first.nll
        assert live_objects(root) <= stored(root).keys()


def test_adding_again_after_collection_gives_the_same_objects(filled):
    texts = {"one": "wiki", "two": "news"}
    before = stored(filled.root).keys() - {sha256(b"what a killed writer left")}
    layers = {sha256(b"layer 1"), sha256(b"layer 2")}  # gathered again when they are needed
    collect(filled, grace=NOW)
    for text, name in texts.items():
        add_evalset(filled, name, text)
    add_model(filled, "gone", b"weights of gone", b"shared tokenizer")
    assert stored(filled.root).keys() == before - layers
    assert set(filled.names("evalset")) == {"wiki", "news"}
    assert set(filled.names("model")) == {"base", "gone"}
    assert not dry(filled).garbage


# -- the command -----------------------------------------------------------------------------------


def test_the_command_says_what_goes(filled, cli_run):
    said = cli_run("gc", "--dry-run", "--grace", "0", "--pool", filled.root)
    assert said.stderr.startswith("would delete 6 files")
    lines = said.stdout.splitlines()
    assert lines[1].split()[:2] == ["removed", "5"]
    assert lines[2].split()[:4] == ["of", "no", "record", "1"]
    (facts,) = json.loads(cli_run("gc", "--grace", "0", "--json", "--pool", filled.root).stdout)
    assert facts["files"] == 6
    assert facts["bytes"] == sum(reason["bytes"] for reason in facts["reasons"])
    assert not facts["dry_run"]
    assert "deleted 0 files" in cli_run("gc", "--pool", filled.root).stderr


@pytest.mark.parametrize("grace", ["soon", "14", "-1d", "", "1y"])
def test_a_grace_that_is_no_time_is_refused(filled, cli_run, grace):
    assert "length of time" in cli_run("gc", "--grace", grace, "--pool", filled.root, code=2).stderr


@pytest.mark.parametrize(("grace", "seconds"), [("0", 0), ("90s", 90), ("30m", 1800),
                                                ("30min", 1800), ("12h", 43200), ("14d", 1209600)])  # fmt: skip
def test_graces(filled, cli_run, grace, seconds):
    said = cli_run("gc", "-n", "--grace", grace, "--json", "--pool", filled.root).stdout
    assert json.loads(said)[0]["grace_seconds"] == seconds


# -- any order -------------------------------------------------------------------------------------

TEXTS = st.sampled_from(["a", "b", "c"])
MODELS = st.sampled_from([(b"x", b"y"), (b"y", b"z"), (b"x", b"w")])


class AnyOrder(RuleBasedStateMachine):
    """Add, remove, restore and collect in any order: what lives is here, what is dead goes."""

    @initialize()
    def begin(self) -> None:
        import tempfile

        self.place = tempfile.TemporaryDirectory()
        self.registry = Registry.create(Path(self.place.name) / "pool")

    @rule(text=TEXTS)
    def evalset(self, text: str) -> None:
        add_evalset(self.registry, f"text-{text}", text)

    @rule(parts=MODELS)
    def model(self, parts: tuple[bytes, ...]) -> None:
        add_model(self.registry, "model-" + b"".join(parts).decode(), *parts)

    @rule(parts=MODELS, text=TEXTS)
    def evaluation(self, parts: tuple[bytes, ...], text: str) -> None:
        model = self.registry.names("model").get("model-" + b"".join(parts).decode())
        evalset = self.registry.names("evalset").get(f"text-{text}")
        if model and evalset:
            add_evaluation(self.registry, model, evalset, b"%s %s" % (parts[0], text.encode()))

    @rule(data=st.data())
    def rm(self, data) -> None:
        names = sorted({**self.registry.names("model"), **self.registry.names("evalset")})
        if names:
            remove(self.registry, [data.draw(st.sampled_from(names))])

    @rule(data=st.data())
    def restore(self, data) -> None:
        gone = self.registry.select("removed")
        if not gone:
            return
        row = data.draw(st.sampled_from(gone))
        needed = {item["object"] for item in
                  self.registry.select("objects_of", digests=[row["digest"]])}  # fmt: skip
        whole = needed <= stored(self.registry.root).keys()
        try:
            restore(self.registry, [row["digest"]])
        except NotFound:
            assert not whole
        else:
            assert whole

    @rule(content=st.binary(max_size=2))
    def killed_writer(self, content: bytes) -> None:
        self.registry.objects.put(content)

    @rule()
    def gc(self) -> None:
        before, expected = stored(self.registry.root), garbage(self.registry.root, grace=NOW)
        plan = collect(self.registry, grace=NOW)
        assert digests(plan) == expected
        assert stored(self.registry.root).keys() == before.keys() - expected

    @invariant()
    def what_lives_is_here(self) -> None:
        assert live_objects(self.registry.root) <= stored(self.registry.root).keys()

    def teardown(self) -> None:
        self.registry.close()
        self.place.cleanup()


AnyOrder.TestCase.settings = settings(
    max_examples=5, stateful_step_count=12, deadline=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
TestAnyOrder = pytest.mark.slow(AnyOrder.TestCase)


def test_a_removal_after_the_clock_was_ahead_counts(registry, monkeypatch):
    add_evalset(registry, "wiki", "one")
    ahead = datetime.now(UTC) + timedelta(hours=5)
    with monkeypatch.context() as patch:
        patch.setattr(records, "now", lambda: ahead.strftime("%Y-%m-%dT%H:%M:%S.%fZ"))
        remove(registry, ["wiki"])
    restore(registry, ["wiki"])
    assert "wiki" in registry.names("evalset")
    remove(registry, ["wiki"])
    assert "wiki" not in registry.names("evalset")
