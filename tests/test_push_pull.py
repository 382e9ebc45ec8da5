"""Pools that travel: pushed to a Hub and pulled again, whole, in part, and from both sides."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pools
import pytest

from poolreg import Pool
from poolreg.errors import Conflict, NotFound, UsageError
from poolreg.sharing.contents import Contents

REPO = "me/pool"


def ids(pool: Pool) -> set[tuple[str, str]]:
    """Return what a pool says, but for what stays on its machine."""
    contents = Contents.of(pool.registry.journal.all())
    staying = ("location", "transfer")
    return {(kind, key) for kind, keys in contents.ids.items() for key in keys
            if kind not in staying}  # fmt: skip


def digests(pool: Pool) -> dict[str, str]:
    return {row["name"]: row["digest"] for row in pool.models()}


def sent(hub, method: str, words: str = "") -> list:
    return [r for r in hub.requests if r.method == method and words in r.path]


@pytest.fixture
def answered(published, tmp_path) -> Iterator[Pool]:
    """A pool with a few answers."""
    with Pool.open(shutil.copytree(published.asked, tmp_path / "pool")) as pool:
        yield pool


@pytest.fixture
def pushed(hub, published, tmp_path) -> Iterator[Pool]:
    """That pool, published."""
    hub.repos["model", REPO] = published.repo.copy()
    with Pool.open(shutil.copytree(published.pushed, tmp_path / "pool")) as pool:
        yield pool


def pulled(folder: Path, **options) -> Pool:
    pool = Pool.create(folder)
    pool.pull(REPO, **options)
    return pool


# -- there and back --------------------------------------------------------------------------


def test_a_pool_comes_back_whole(pushed, tmp_path, monkeypatch):
    with pulled(tmp_path / "b") as other:
        assert ids(other) == ids(pushed)
        assert digests(other) == digests(pushed)
        verdict = other.verify(full=True)
        assert (verdict.findings, verdict.elsewhere) == ((), 0)
        assert verdict.hashed == verdict.objects + verdict.unnamed > 20
        monkeypatch.setattr("poolreg.evaluation.engines.measured", None)  # nothing is measured
        asked = [pool.ask(["alpha+beta", "all"]) for pool in (pushed, other)]
        assert all(answer.memoised for answer in asked[1])
        assert [a.bits_per_byte for a in asked[0]] == [a.bits_per_byte for a in asked[1]]


def test_what_is_there_is_not_sent_again(hub, pushed, tmp_path):
    done = pushed.push(REPO)
    assert not done.changed
    assert [r.method for r in hub.requests] == ["GET"] * 3  # head, tree, and what it is
    with pulled(tmp_path / "b") as other:
        hub.clear()
        assert other.pull(REPO).records == 0
        assert len(hub.requests) == 3


def test_one_more_model_sends_only_its_objects_and_one_commit(hub, pushed, tiny, tmp_path):
    folder = pools.unit_folder(tmp_path / "more", tiny.seed, 77)
    new = pushed.add_model(folder, name="more")
    done = pushed.push()  # to where it was last
    assert (done.objects, done.bytes) == (1, (folder / "model.safetensors").stat().st_size)
    puts = sent(hub, "PUT")
    weights = next(f["object"] for f in pushed.model("more")["files"] if f["role"] == "weights")
    assert len([r for r in puts if weights in r.path]) == 1
    # Everything else that goes is the tables and the card, which show it.
    tables = [e for p, e in hub.tree(REPO).items() if p.startswith("tables/") or p.endswith("png")]
    assert sum(r.received for r in puts) <= done.bytes + sum(entry.size for entry in tables)
    assert len(sent(hub, "POST", "/commit/")) == 1
    assert hub.tree(REPO)["models/more/model.safetensors"].sha256 == weights
    assert new.digest in [row["digest"] for row in pushed.models()]


def test_readers_see_all_of_a_push_or_nothing(hub, answered):
    answered.push(REPO)
    for commit in hub.repo(REPO).commits.values():
        journal = [path for path in commit.tree if path.startswith("journal/")]
        shown = [path for path in commit.tree if path.startswith(("models/", "tables/"))]
        objects = [path for path in commit.tree if path.startswith("objects/")]
        assert bool(journal) == bool(shown) == bool(objects)


def test_paths_of_this_machine_do_not_travel(hub, answered, tmp_path):
    answered.push(REPO)
    for path, entry in hub.tree(REPO).items():
        data = bytes(entry.content[:])
        assert str(tmp_path).encode() not in data, path
        assert os.uname().nodename.encode() not in data or len(os.uname().nodename) < 4, path
    segments = [path for path in hub.tree(REPO) if path.startswith("journal/")]
    assert len(segments) == 1
    assert b'"location"' not in hub.content(REPO, segments[0])


def test_a_dry_run_sends_nothing(hub, answered):
    planned = answered.push(REPO, dry_run=True)
    assert planned.changed
    assert hub.repos == {}
    done = answered.push(REPO)
    assert (planned.records, planned.objects, planned.bytes) == (
        done.records, done.objects, done.bytes
    )  # fmt: skip


def test_branches_and_tags(hub, answered, tmp_path):
    done = answered.push(REPO, revision="trial", tag="v1")
    assert hub.repo(REPO).tags["v1"] == done.version == hub.head(REPO, revision="trial")
    with pytest.raises(NotFound, match="holds no pool"):
        pulled(tmp_path / "main")
    with pulled(tmp_path / "b", revision="v1") as other:
        assert ids(other) == ids(answered)


def test_places_that_hold_something_else_are_left_alone(hub, answered):
    hub.commit_files("me/model", {"model.safetensors": b"x", "README.md": b"hello"})
    with pytest.raises(Conflict, match=r"something else than a pool: 'model.safetensors'"):
        answered.push("me/model")
    hub.commit_files("me/fresh", {"README.md": b"hello"})
    assert answered.push("me/fresh").changed


def test_private_repositories_stay_private(hub, answered):
    answered.push(REPO, private=True)
    assert hub.repo(REPO).private
    answered.push("me/open")
    hub.commit_files("me/shown", {"README.md": b"x"})
    with pytest.raises(Conflict, match="public"):
        answered.push("me/shown", private=True)


def test_where_there_is_nothing(hub, answered, tmp_path):
    with Pool.create(tmp_path / "b") as other:
        with pytest.raises(NotFound, match="no repository me/none that you may read"):
            other.pull("me/none")
        with pytest.raises(NotFound, match="not pushed or pulled yet"):
            other.pull()
        with pytest.raises(UsageError, match="is not the name of a repository"):
            other.pull("a/b/c")


# -- in part ---------------------------------------------------------------------------------


def test_results_come_without_weights_and_weights_when_they_are_wanted(hub, pushed, tmp_path):
    with pulled(tmp_path / "b", results_only=True) as other:
        assert ids(other) == ids(pushed)
        assert other.ask(["alpha+beta"])[0].memoised
        assert not [r for r in sent(hub, "GET", "/objects/") if r.sent > 40_000]
        found = other.verify(full=True)
        assert (found.findings, found.elsewhere) == ((), 7)
        with pytest.raises(NotFound, match="poolreg pull --only"):
            other.merge("alpha+beta", tmp_path / "merged")
        done = other.pull(only=["alpha+beta"])
        assert (done.records, done.objects, done.left) == (0, 4, 3)  # three units and their seed
        merged = other.merge("alpha+beta", tmp_path / "merged")
        assert merged.digest == pushed.merge("alpha+beta", tmp_path / "again").digest
        assert other.pull().objects == 3
        assert other.verify().elsewhere == 0


def test_only_some_weights_go(hub, answered, tmp_path):
    done = answered.push(REPO, only=["alpha"])
    weights = {e.sha256 for p, e in hub.tree(REPO).items() if p.endswith(".safetensors")}
    files = answered.model("alpha/1")["files"] + answered.model("base")["files"]
    assert weights == {f["object"] for f in files if f["role"] == "weights"}
    with pulled(tmp_path / "b") as other:
        assert ids(other) == ids(answered)
        with pytest.raises(NotFound, match="does not hold the weights of gamma"):
            other.pull(only=["gamma"])
    assert done.objects > 5
    assert answered.push(REPO).objects == 5


def test_a_dataset_holds_the_results(hub, answered, tmp_path):
    answered.push(REPO, repo_type="dataset")
    tree = hub.tree(REPO, repo_type="dataset")
    assert not [path for path in tree if "safetensors" in path or path.startswith("models/")]
    assert "tables/scores.parquet" in tree
    with Pool.create(tmp_path / "b") as other:
        other.pull(REPO, repo_type="dataset")
        assert other.ask(["alpha+beta"])[0].memoised


def test_what_was_removed_is_not_sent(hub, answered, tmp_path):
    weights = {f["object"] for f in answered.model("gamma/3")["files"] if f["role"] == "weights"}
    answered.remove("model", "gamma/3")
    answered.push(REPO)
    assert not weights & {entry.sha256 for entry in hub.tree(REPO).values()}
    with pulled(tmp_path / "b") as other:
        assert "gamma/3" not in digests(other)
        assert other.verify().findings == ()


def test_kept_merges_travel_as_recipes(hub, answered, tmp_path):
    kept = answered.keep_merge("alpha+gamma", "blend", dtype="bfloat16")
    plain = answered.keep_merge("alpha+beta", "plain")
    done = answered.push(REPO)
    objects = {p for p in hub.tree(REPO) if p.startswith("objects/")}
    for name in ("blend", "plain"):
        for file in answered.model(name)["files"]:
            here = f"objects/{file['object'][:2]}/{file['object'][2:]}" in objects
            assert here == (file["role"] != "weights")
    assert done.absent == 0
    with pulled(tmp_path / "b") as other:
        assert digests(other)["blend"] == kept.digest
        assert digests(other)["plain"] == plain.digest
        assert other.verify(full=True).findings == ()
        rows = {(r["relation"], r["parent_label"]) for r in other.lineage("blend")}
        assert ("keeps", "alpha+gamma") in rows
    assert answered.push("me/all", merges=True).objects == done.objects + 2


# -- two pools -------------------------------------------------------------------------------


def diverged(tiny, tmp_path) -> tuple[Pool, Pool]:
    """Two pools with a past in common; both then called something `more` and something else."""
    made = []
    for number, name in enumerate(("one", "two")):
        pool = Pool.open(tiny.copy(tmp_path / name))
        folder = pools.unit_folder(tmp_path / f"more-{name}", tiny.seed, 80 + number)
        pool.add_model(folder, name="more")
        pool.add_model(
            pools.unit_folder(tmp_path / f"own-{name}", tiny.seed, 90 + number), name=name
        )
        made.append(pool)
    return made[0], made[1]


@pytest.mark.parametrize("order", [(0, 1), pytest.param((1, 0), marks=pytest.mark.campaign)])
def test_pools_that_diverged_become_one_in_either_order(hub, tiny, tmp_path, order):
    pair = diverged(tiny, tmp_path)
    first, second = pair[order[0]], pair[order[1]]
    with first, second:
        mine = {digests(pool)["more"] for pool in pair}
        first.push(REPO)
        done = second.push(REPO, origin="other")
        assert [(c.name, c.kept_as) for c in done.clashes] == [("more", "other/more")]
        assert first.pull(REPO).records > 0
        (conflict,) = second.pull(REPO).clashes
        assert conflict.kept_as == "pool/more"
        for pool, beside in ((first, "other/more"), (second, "pool/more")):
            assert {digests(pool)["more"], digests(pool)[beside]} == mine
            assert {"one", "two"} <= digests(pool).keys()
        assert set(digests(first).values()) == set(digests(second).values())
        facts = [{i for i in ids(pool) if i[0] != "name"} for pool in pair]
        assert facts[0] == facts[1]
        for pool in (first, second):  # and there it ends
            assert not pool.push(REPO, origin="other").changed
            assert pool.pull(REPO).records == 0
        answer = second.ask(["pool/more"])[0]
        assert answer.label == "pool/more"


def test_a_push_that_comes_second_loses_nothing(hub, tiny, tmp_path):
    one, two = diverged(tiny, tmp_path)
    with one, two:
        hub.before_commit = lambda _: two.push(REPO, origin="two")
        one.push(REPO, origin="one")
        assert [r.status for r in sent(hub, "POST", "/commit/main")].count(412) >= 1
        with pulled(tmp_path / "both") as both:
            wanted = set(digests(one).values()) | set(digests(two).values())
            assert set(digests(both).values()) == wanted
            assert both.verify(full=True).findings == ()


def test_a_commit_that_went_unanswered_is_found(hub, answered):
    from hub import Fault

    hub.fail(Fault("POST .*/commit/", kind="lost", skip=1))  # the first is .gitattributes
    done = answered.push(REPO)
    assert done.changed
    assert done.version == hub.head(REPO)
    assert len(sent(hub, "POST", "/commit/")) == 2


def test_more_files_than_a_commit_takes(hub, answered, tmp_path, monkeypatch):
    monkeypatch.setattr("poolreg.sharing.hub.MOST_FILES", 60)
    answered.push(REPO)
    commits = [commit.tree for commit in hub.repo(REPO).commits.values()]
    early = [tree for tree in commits if "poolreg.json" not in tree]
    assert any(path.startswith("objects/") for path in early[-1])
    assert not any(path.startswith(("journal/", "models/", "tables/")) for path in early[-1])
    sizes = [len(after.keys() - before.keys()) for before, after in itertools.pairwise(commits)]
    assert max(sizes) <= 60 < sum(sizes)
    with pulled(tmp_path / "b") as other:
        assert ids(other) == ids(answered)


@pytest.mark.slow
def test_a_server_without_xet_is_told_from_a_network_that_is_down(hub, answered):
    environment = {**os.environ, **hub.environment(), "HF_HUB_DISABLE_XET": "0"}
    command = [sys.executable, "-c", "from poolreg.cli.main import main; main()"]
    told = subprocess.run(
        [*command, "--pool", str(answered.root), "push", REPO], env=environment, text=True,
        capture_output=True, check=False, timeout=120,
    )  # fmt: skip
    assert told.returncode == 1
    assert "HF_HUB_DISABLE_XET=1" in told.stderr
    assert "Traceback" not in told.stderr


# -- what others make of it ------------------------------------------------------------------

LOADS = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
for name in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], subfolder=f"models/{name}")
    AutoTokenizer.from_pretrained(sys.argv[1], subfolder=f"models/{name}")
    print(float(sum(p.double().sum() for p in model.parameters())))
"""


@pytest.mark.slow
def test_members_load_from_their_subfolder(hub, pushed, tiny):
    import torch
    from transformers import AutoModelForCausalLM

    environment = {**os.environ, **hub.environment()}
    found = subprocess.run(
        [sys.executable, "-c", LOADS, REPO, "base", "beta/2"], env=environment, text=True,
        capture_output=True, check=False, timeout=300,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-2000:]
    wanted = []
    for folder in (tiny.seed, tiny.units["beta", 2]):
        model = AutoModelForCausalLM.from_pretrained(folder)
        wanted.append(float(sum(p.double().sum() for p in model.parameters())))
    assert [float(line) for line in found.stdout.split()] == wanted
    assert torch.isfinite(torch.tensor(wanted)).all()


# -- without a Hub ---------------------------------------------------------------------------


def test_a_folder_is_a_place_too(answered, tmp_path):
    place = f"file://{tmp_path}/shared"
    answered.push(place)
    with Pool.create(tmp_path / "b") as other:
        other.pull(place)
        assert ids(other) == ids(answered)
        assert other.verify(full=True).findings == ()
        assert not other.push(place).changed
        assert not answered.push().changed  # to where it was pushed last


def test_a_bundle_is_a_pool_in_one_file(answered, tmp_path):
    answered.create_bundle(tmp_path / "one.tar")
    answered.create_bundle(tmp_path / "two.tar")
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()
    with Pool.create(tmp_path / "b") as other:
        other.apply_bundle(tmp_path / "one.tar")
        assert ids(other) == ids(answered)
        assert other.verify(full=True).findings == ()
        assert other.apply_bundle(tmp_path / "one.tar").records == 0
    with pytest.raises(Conflict):
        answered.create_bundle(tmp_path / "one.tar")
    small = answered.create_bundle(tmp_path / "one.tar", results_only=True, force=True)
    assert small.bytes < 100_000


# -- the command line ------------------------------------------------------------------------


def test_the_commands(hub, cli_run, answered, tmp_path):
    root = answered.root
    said = cli_run("--pool", root, "push", REPO, "--dry-run").stderr
    assert said.startswith("would send 4")
    assert "sent 4" in cli_run("--pool", root, "push", REPO).stderr
    assert "has all of it" in cli_run("--pool", root, "push").stderr
    new = tmp_path / "new"
    assert "took 4" in cli_run("pull", REPO, new).stderr
    assert "has all of" in cli_run("--pool", new, "pull").stderr
    assert "objects hashed" in cli_run("--pool", new, "verify", "--full").stderr
    assert json.loads(cli_run("--pool", new, "verify", "--json").stdout)["findings"] == []
    assert "wrote" in cli_run("--pool", new, "bundle", "create", tmp_path / "p.tar").stderr
    assert "took 4" in cli_run("bundle", "apply", tmp_path / "p.tar", tmp_path / "third").stderr
    cli_run("pull", "me/none", tmp_path / "never", code=1)
    assert not (tmp_path / "never").exists()
