"""Rules of sharing that keep pools and places sound when pushes and pulls are partial or clash."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pools
import pytest
from hub import Repo

from poolreg import Pool
from poolreg.errors import Conflict, NameRefused, NotFound, Refused, StorageError, UsageError
from poolreg.store import records

REPO = "me/pool"


@pytest.fixture
def answered(published, tmp_path) -> Iterator[Pool]:
    with Pool.open(shutil.copytree(published.asked, tmp_path / "pool")) as pool:
        yield pool


@pytest.fixture
def pushed(hub, published, tmp_path) -> Iterator[Pool]:
    hub.repos["model", REPO] = published.repo.copy()
    with Pool.open(shutil.copytree(published.pushed, tmp_path / "pool")) as pool:
        yield pool


def weights(pool: Pool, name: str) -> str:
    return next(f["object"] for f in pool.model(name)["files"] if f["role"] == "weights")


def holds(repo: Repo, digest: str) -> bool:
    tree = repo.commits[repo.branches["main"]].tree
    return f"objects/{digest[:2]}/{digest[2:]}" in tree


# -- what goes out ---------------------------------------------------------------------------


def test_nothing_goes_out_that_nobody_would_take(hub, answered):
    with pytest.raises(NameRefused):
        answered.push(REPO, origin="my laptop")
    digest = answered.registry.resolve("model", "base")
    answered.registry.record(records.name("model", "my laptop/base", digest))
    with pytest.raises(Refused, match="cannot be trusted"):
        answered.push(REPO)
    assert "poolreg.json" not in hub.tree(REPO)


@pytest.mark.parametrize("name", ["you/2024", pytest.param("you/all", marks=pytest.mark.campaign)])
def test_repositories_whose_name_is_no_name(hub, answered, tiny, tmp_path, name):
    answered.push(name)
    with Pool.open(tiny.copy(tmp_path / "b")) as other:
        other.add_model(pools.unit_folder(tmp_path / "m", tiny.seed, 5), name="more")
        answered.add_model(pools.unit_folder(tmp_path / "n", tiny.seed, 6), name="more")
        answered.push(name)
        (clash,) = other.pull(name).clashes
        assert clash.kept_as in {row["name"] for row in other.models()}
        other.push(name)  # and it can go on
        assert other.pull(name).records == 0


def test_a_merge_goes_with_what_gives_it(hub, answered, tmp_path):
    answered.keep_merge("alpha+gamma/1", "blend")
    answered.push(REPO, only=["blend"])
    for name in ("alpha/1", "gamma/1"):
        assert holds(hub.repo(REPO), weights(answered, name))
    assert not holds(hub.repo(REPO), weights(answered, "beta/1"))
    with Pool.create(tmp_path / "b") as other:
        assert other.pull(REPO, only=["blend"]).rebuilt == 1


def test_a_merge_whose_parents_are_elsewhere_goes_itself(hub, answered, tmp_path):
    answered.keep_merge("alpha+gamma/1", "blend")
    answered.registry.objects.path(weights(answered, "alpha/1")).unlink()
    answered.push(REPO)
    assert holds(hub.repo(REPO), weights(answered, "blend"))


def test_a_pool_without_weights_shows_those_that_are_there(hub, pushed, tmp_path):
    with Pool.create(tmp_path / "lean") as lean:
        lean.pull(REPO, results_only=True)
        digest = lean.registry.resolve("model", "base")
        lean.registry.record(records.name("model", "start", digest))
        lean.registry.record(
            records.name("partition", "aleph", lean.registry.resolve("partition", "alpha"))
        )
        lean.push(REPO)
    tree = hub.tree(REPO)
    found = {path: entry.sha256 for path, entry in tree.items() if path.endswith(".safetensors")}
    assert set(found.values()) == {weights(pushed, row["name"]) for row in pushed.models()}


def test_tags_are_looked_at_before_anything_is_sent(hub, answered, tmp_path):
    answered.push(REPO, tag="v1")
    head = hub.head(REPO)
    answered.ask(["gamma"])
    with pytest.raises(Conflict, match="has the tag 'v1' already"):
        answered.push(REPO, tag="v1")
    assert hub.head(REPO) == head
    with pytest.raises(UsageError, match="only the Hub has tags"):
        answered.push(f"file://{tmp_path}/shared", tag="v1")
    assert not (tmp_path / "shared").exists()


def test_a_pool_that_was_only_pulled_is_not_pushed_by_accident(hub, pushed, tmp_path):
    with Pool.create(tmp_path / "b") as other:
        other.pull(REPO)
        with pytest.raises(NotFound, match="not pushed yet"):
            other.push()


# -- places without commits ------------------------------------------------------------------


def test_a_first_push_to_a_folder_that_was_cut_goes_on(answered, tmp_path):
    place = tmp_path / "shared"
    answered.push(f"file://{place}")
    (place / "poolreg.json").unlink()
    shutil.rmtree(place / "tables")
    done = answered.push(f"file://{place}")
    assert (place / "poolreg.json").is_file()
    assert done.changed
    with Pool.create(tmp_path / "b") as other:
        other.pull(f"file://{place}")
        assert other.verify(full=True).findings == ()


def test_tables_of_another_state_are_made_anew(answered, tmp_path):
    place = tmp_path / "shared"
    answered.push(f"file://{place}")
    wanted = {path.name: path.read_bytes() for path in (place / "tables").iterdir()}
    stamp = next((place / "tables").glob("of-*.txt"))
    stamp.rename(stamp.with_name("of-0123456789abcdef.txt"))  # as a push that raced left it
    (place / "tables" / "scores.parquet").write_bytes(b"old")
    done = answered.push(f"file://{place}")
    assert (done.records, done.objects, done.stale) == (0, 0, True)
    assert {path.name: path.read_bytes() for path in (place / "tables").iterdir()} == wanted
    assert not answered.push(f"file://{place}").changed


# -- what comes in ---------------------------------------------------------------------------


def test_what_a_mixture_means_does_not_change(hub, tiny, tmp_path):
    folder = pools.unit_folder(tmp_path / "new", tiny.seed, 55)
    with Pool.create(tmp_path / "b") as theirs:
        pools.add_data(theirs, tiny.texts, {"alpha": 1})
        theirs.add_model(tiny.seed, name="base", role="seed")
        theirs.add_model(folder, role="unit", partition="alpha", unit=1, seed="base")
        theirs.push(REPO)
    with Pool.open(tiny.copy(tmp_path / "a")) as ours:
        before = ours.resolve("alpha+beta").digest
        done = ours.pull(REPO)
        assert [clash.space for clash in done.clashes] == ["unit model"]
        assert ours.resolve("alpha+beta").digest == before
        assert ours.resolve(done.clashes[0].kept_as).kind == "model"
        ours.push(REPO)
        assert ours.pull(REPO).records == 0


def test_what_others_changed_knowing_ours_is_followed_and_told(hub, tiny, tmp_path):
    with Pool.open(tiny.copy(tmp_path / "b")) as theirs:
        folder = pools.unit_folder(tmp_path / "new", tiny.seed, 55)
        theirs.add_model(folder, role="unit", partition="alpha", unit=1, seed="base")
        theirs.add_evalset("beta", [tiny.texts / "alpha.held.jsonl"], replace=True)
        theirs.push(REPO)
        after = theirs.resolve("alpha").digest
    with Pool.open(tiny.copy(tmp_path / "a")) as ours:
        done = ours.pull(REPO)
        assert done.clashes == ()
        assert [what.split()[0] for what in done.moved] == ["evalset", "unit"]
        assert ours.resolve("alpha").digest == after


def test_a_model_that_was_taken_out_and_added_again_comes_back(hub, pushed, tiny, tmp_path):
    with Pool.create(tmp_path / "b") as other:
        pushed.add_model(tmp_path_model(tmp_path, tiny), name="more")
        pushed.remove("model", "more")
        pushed.push(REPO)
        other.pull(REPO)
        assert "more" not in {row["name"] for row in other.models()}
        pushed.add_model(tmp_path / "more", name="more")
        pushed.push(REPO)
        other.pull(REPO)
        assert "more" in {row["name"] for row in other.models()}
        assert other.verify(full=True).findings == ()


def tmp_path_model(tmp_path: Path, tiny) -> Path:
    return pools.unit_folder(tmp_path / "more", tiny.seed, 66)


def test_what_was_cut_off_here_is_mended(hub, pushed):
    path = pushed.registry.objects.path(weights(pushed, "base"))
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:100])
    (finding,) = pushed.verify().findings
    assert "instead of" in finding.problem
    assert pushed.pull(REPO).objects == 1
    assert pushed.verify(full=True).findings == ()


def test_what_a_power_cut_left_in_the_staging_folder_is_not_believed(hub, pushed, tmp_path):
    with Pool.create(tmp_path / "b") as other:
        other.pull(REPO, results_only=True)
    with Pool.create(tmp_path / "c") as other:
        from poolreg.canonical import digest_of

        staging = other.root / "tmp" / f"incoming-{digest_of([REPO, 'model'])[:12]}"
        digest = weights(pushed, "base")
        (staging / "objects" / digest[:2]).mkdir(parents=True)
        (staging / "objects" / digest[:2] / digest[2:]).touch()
        (staging / "journal").mkdir()
        segment = next(p for p in hub.tree(REPO) if p.startswith("journal/"))
        (staging / segment).touch()
        other.pull(REPO)
        assert other.verify(full=True).findings == ()
        assert len(other.models()) == len(pushed.models())


def test_a_name_given_while_a_pull_runs_stays(hub, pushed, tmp_path, monkeypatch):
    from poolreg.sharing import pull as pulling

    with Pool.create(tmp_path / "b") as other:
        there = pushed.registry.resolve("evalset", "alpha")
        checked = pulling.check_goods

        def busy(*args, **kwargs):
            if not other.registry.names("evalset"):
                texts = pools.write_texts(tmp_path / "texts", ["zeta"])
                other.add_evalset("alpha", [texts / "zeta.held.jsonl"])
            return checked(*args, **kwargs)

        monkeypatch.setattr(pulling, "check_goods", busy)
        done = other.pull(REPO)
        assert [clash.kept_as for clash in done.clashes] == ["pool/alpha"]
        assert other.registry.resolve("evalset", "pool/alpha") == there
        assert other.registry.resolve("evalset", "alpha") != there


def test_code_of_others_is_allowed_on_this_machine_only(hub, tiny, tmp_path):
    folder = shutil.copytree(tiny.seed, tmp_path / "coded")
    pools.change_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})
    (folder / "evil.py").write_text("raise SystemExit('run')\n")
    with Pool.open(tiny.copy(tmp_path / "a")) as ours:
        ours.add_model(folder, name="coded", trust_code=True)
        ours.push(REPO)
    with Pool.create(tmp_path / "b") as other:
        with pytest.raises(Refused, match="--trust-code"):
            other.pull(REPO)
        other.pull(REPO, results_only=True, trust_code=True)
        assert not other.model("coded")["trusted_code"]
        other.pull(REPO, trust_code=True)
        assert other.model("coded")["trusted_code"]
        other.push("me/again")
        with Pool.create(tmp_path / "c") as third, pytest.raises(Refused, match="--trust-code"):
            third.pull("me/again")


def test_two_places_do_not_share_what_is_on_its_way(hub, pushed, tiny, tmp_path):
    from hub import Fault

    with Pool.open(tiny.copy(tmp_path / "small")) as small:
        small.push("you/other", results_only=True)
    with Pool.create(tmp_path / "b") as other:
        hub.fail(Fault("GET .*/objects/", kind="status", status=404, skip=10, times=None))
        with pytest.raises(StorageError):
            other.pull(REPO)
        hub.faults.clear()
        other.pull("you/other", results_only=True)
        named = {row["digest"] for row in other.registry.select("object_list")}
        present = {p.parent.name + p.name for p in (other.root / "objects").glob("??/*")}
        segments = {p[8:-6] for p in hub.tree("you/other") if p.startswith("journal/")}
        assert present <= named | segments
