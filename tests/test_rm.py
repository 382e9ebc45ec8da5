"""Taking things out of a pool and back: what it means, what it says, what stands in the way."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from datetime import timedelta

import pytest
from click.shell_completion import ShellComplete
from collecting import add_evalset, add_evaluation, add_model, live_objects, stored
from pools import change_json, refusal, shard, unit_folder

from poolreg import Pool
from poolreg.errors import Conflict, NotFound, Refused, UsageError
from poolreg.models.merges import keep_merge
from poolreg.store import records
from poolreg.store.registry import Registry
from poolreg.text import partitions as data
from poolreg.upkeep.collection import collect
from poolreg.upkeep.removal import GRACE, remove, removed_things, restore

NOW = timedelta(0)


@pytest.fixture
def registry(tmp_path) -> Iterator[Registry]:
    with contextlib.closing(Registry.create(tmp_path / "pool")) as opened:
        yield opened


def add_partition(registry: Registry, name: str, text: str, **options) -> str:
    path = registry.root.parent / f"{name}.part.txt"
    path.write_text(text)
    return data.add_partition(registry, name, [path], **options).digest


def names(registry: Registry) -> set[tuple[str, str]]:
    return {(s, n) for s in ("partition", "evalset", "model") for n in registry.names(s)}


# -- out -----------------------------------------------------------------------------------------


def test_several_things_go_at_once(registry):
    part = add_partition(registry, "code", "some code")
    text = add_evalset(registry, "wiki", "some text")
    model = add_model(registry, "base", b"weights")
    add_model(registry, "other", b"other weights")
    done = remove(registry, ["code", "wiki", model[:10], "base"])
    assert [(item.kind, item.name, item.digest) for item in done] == [
        ("partition", "code", part),
        ("evalset", "wiki", text),
        ("model", model[:10], model),
        ("model", "base", model),
    ]
    assert names(registry) == {("model", "other")}
    assert [record.kind for record in registry.journal.all()].count("removal") == 1 + 1 + 4


def test_one_unknown_name_and_nothing_goes(registry):
    add_evalset(registry, "wiki", "some text")
    before = names(registry)
    with pytest.raises(NotFound, match="no partition, evalset or model is named wikki") as caught:
        remove(registry, ["wiki", "wikki"])
    assert "did you mean wiki?" in caught.value.hint
    assert names(registry) == before


def test_a_name_of_two_kinds_needs_its_kind(registry):
    add_partition(registry, "code", "some code")
    add_evalset(registry, "code", "other code")
    with pytest.raises(UsageError, match="'code' is a partition and an evalset") as caught:
        remove(registry, ["code"])
    assert "--kind" in caught.value.hint
    remove(registry, ["code"], kind="evalset")
    assert names(registry) == {("partition", "code")}
    assert remove(registry, ["code"])[0].kind == "partition"
    with pytest.raises(UsageError, match="names several removed things"):
        restore(registry, ["code"])
    restore(registry, ["code"], kind="evalset")
    restore(registry, ["code"])
    assert names(registry) == {("partition", "code"), ("evalset", "code")}


def test_a_name_goes_before_a_digest_spelled_alike(registry):
    model = add_model(registry, "base", b"weights")
    text = add_evalset(registry, model[:8], "some text")
    assert remove(registry, [model[:8]])[0].digest == text
    assert remove(registry, [model[:8]])[0].digest == model


def test_what_was_removed_already_is_said(registry):
    add_evalset(registry, "wiki", "some text")
    remove(registry, ["wiki"])
    with pytest.raises(NotFound, match="'wiki' is removed already"):
        remove(registry, ["wiki"])
    with pytest.raises(NotFound, match="no partition, evalset or model is named nothing"):
        remove(registry, ["nothing"])


def test_dependents_are_told(pool):
    with pytest.raises(NotFound):
        pool.rm(["nope"])
    pool.ask(["alpha+beta", "alpha"], on=["alpha"])
    (beta,) = pool.rm("beta", kind="partition")
    told = {(d.noun, d.relation): (d.count, d.first) for d in beta.dependents}
    assert told == {
        ("mixture", "with it"): (2, ("alpha+beta", "alpha+beta+gamma")),
        ("model", "trained on it"): (2, ("beta/1", "beta/2")),
    }
    (unit,) = pool.rm("alpha/1")
    told = {(d.noun, d.relation): (d.count, d.first) for d in unit.dependents}
    assert told[("mixture", "with it")][0] == 3
    assert told[("evaluation", "of it")] == (1, ("alpha",))
    (seed,) = pool.rm("base")
    told = {(d.noun, d.relation): d.count for d in seed.dependents}
    assert told[("model", "trained from it")] == 5
    (text,) = pool.rm("alpha", kind="evalset")
    told = {(d.noun, d.relation): d.count for d in text.dependents}
    assert told == {("evaluation", "on it"): 4}


def test_names_of_removed_things_lead_to_restore(pool):
    pool.rm("beta/2")
    with pytest.raises(NotFound) as caught:
        pool.resolve("alpha+beta")
    assert refusal(caught.value) == (
        "the model beta/2 was removed | bring it back with: poolreg restore beta/2"
    )
    pool.rm("gamma", kind="partition")
    for ask, text in (
        (pool.resolve, "gamma"),
        (pool.partition, "gamma"),
        (pool.ask, "alpha+gamma"),
    ):
        with pytest.raises(NotFound, match="the partition gamma was removed"):
            ask(text)
    pool.rm("gamma", kind="evalset")
    with pytest.raises(NotFound, match="gamma was removed"):
        pool.describe("gamma")
    with pytest.raises(NotFound, match="the evalset gamma was removed"):
        pool.ask("alpha", on=["gamma"])


# -- back ----------------------------------------------------------------------------------------


def test_what_is_removed_is_listed(registry):
    part = add_partition(registry, "code", "some code")
    model = add_model(registry, "base", b"weights", b"config")
    assert removed_things(registry) == []
    remove(registry, ["code"])
    remove(registry, ["base"])
    first, second = removed_things(registry)
    assert (first.kind, first.name, first.digest) == ("model", "base", model)
    assert (first.objects, first.bytes, first.missing, first.left) == (2, 13, 0, 0)
    assert first.until - first.removed == GRACE
    assert (second.name, second.digest, second.bytes) == ("code", part, 32)
    collect(registry, grace=NOW)
    assert [(thing.objects, thing.missing) for thing in removed_things(registry)] == [
        (0, 2),
        (0, 1),
    ]


@pytest.mark.parametrize("prefix", [False, True])
def test_all_comes_back_as_it_was(registry, prefix):
    add_partition(registry, "code", "some code")
    text = add_evalset(registry, "wiki", "some text")
    model = add_model(registry, "base", b"weights")
    add_evaluation(registry, model, text, b"scores")
    before = names(registry)
    done = remove(registry, ["code", "wiki", "base"])
    assert not names(registry)
    collect(registry, grace=GRACE)
    back = restore(registry, [item.digest[:9] if prefix else item.name for item in done])
    assert [(item.kind, item.name) for item in back] == [(d.kind, d.name) for d in done]
    assert names(registry) == before
    assert not removed_things(registry)
    assert live_objects(registry.root) <= stored(registry.root).keys()
    collect(registry, grace=NOW)
    assert live_objects(registry.root) <= stored(registry.root).keys()


def test_what_was_collected_does_not_come_back(registry):
    add_evalset(registry, "wiki", "some text")
    add_evalset(registry, "news", "other text")
    remove(registry, ["wiki", "news"])
    restore(registry, ["news"])
    collect(registry, grace=NOW)
    remove(registry, ["news"])
    with pytest.raises(NotFound) as caught:
        restore(registry, ["news", "wiki"])
    assert refusal(caught.value) == (
        "the data of evalset wiki was collected: 2 of its 2 objects are gone | add its text again: "
        "poolreg evalset add NAME FILE…"
    )
    assert not names(registry)  # news neither
    add_evalset(registry, "wiki", "some text")
    assert names(registry) == {("evalset", "wiki")}


def test_only_what_is_removed_can_be_restored(registry):
    add_evalset(registry, "wiki", "some text")
    with pytest.raises(NotFound, match="'wiki' is in the pool; it is not removed"):
        restore(registry, ["wiki"])
    remove(registry, ["wiki"])
    with pytest.raises(NotFound, match="no removed partition, evalset or model is named wikki"):
        restore(registry, ["wikki"])
    with pytest.raises(NotFound, match="no removed model is named wiki"):
        restore(registry, ["wiki"], kind="model")


def test_a_name_that_means_something_else_by_now(registry):
    old = add_evalset(registry, "wiki", "old text")
    remove(registry, ["wiki"])
    new = add_evalset(registry, "wiki", "new text")
    with pytest.raises(Conflict, match="'wiki', means something else now") as caught:
        restore(registry, ["wiki"])
    assert "--as NAME" in caught.value.hint
    (back,) = restore(registry, ["wiki"], name="wiki-old")
    assert (back.name, back.digest) == ("wiki-old", old)
    assert registry.names("evalset") == {"wiki": new, "wiki-old": old}
    with pytest.raises(UsageError, match="one name is for one thing"):
        restore(registry, ["wiki", "wiki-old"], name="x")


def test_two_that_had_one_name_are_told_apart_by_digest(registry):
    digests = []
    for text in ("one", "two", "three"):
        digests.append(add_evalset(registry, "wiki", text))
        remove(registry, ["wiki"])
    (back,) = restore(registry, ["wiki"])  # the one that has the name
    assert back.digest == digests[2]
    with pytest.raises(UsageError, match="names several removed things"):
        restore(registry, ["wiki"])
    restore(registry, [digests[0][:8]], name="first")
    assert registry.names("evalset") == {"wiki": digests[2], "first": digests[0]}


def test_partitions_and_models_share_their_names(registry):
    add_model(registry, "code", b"weights")
    remove(registry, ["code"])
    add_partition(registry, "code", "some code")
    with pytest.raises(Conflict, match="'code' names a partition already"):
        restore(registry, ["code"])
    remove(registry, ["code"])
    both = [thing.digest for thing in removed_things(registry)]
    with pytest.raises(Conflict, match="they share their names"):
        restore(registry, both)
    restore(registry, ["code"], kind="model")
    assert names(registry) == {("model", "code")}


def test_models_come_back_without_a_name(registry):
    model = add_model(registry, "base", b"weights")
    remove(registry, ["base"])
    add_model(registry, "base", b"new weights")
    (back,) = restore(registry, [model[:12]])
    assert (back.digest, back.name) == (model, "base")
    assert len(registry.select("model_list")) == 2


def test_what_a_pull_left_may_stay_away(registry):
    model = add_model(registry, "base", b"weights", b"config")
    (weights,) = [r["object"] for r in registry.select("model_files", model=model)
                  if r["bytes"] == 7]  # fmt: skip
    left = records.transfer(
        "pull", "hub://x", version="1", records=1, objects=1, bytes=1, left=[weights],
        repo_type="model", revision=None,
    )  # fmt: skip
    registry.record(left)
    path = registry.objects.path(weights)
    path.unlink()
    remove(registry, ["base"])
    (thing,) = removed_things(registry)
    assert (thing.objects, thing.left, thing.missing) == (1, 1, 0)
    (back,) = restore(registry, ["base"])
    assert back.left == 1


def test_a_kept_merge_is_made_again(pool):
    subject = pool.resolve("alpha+beta")
    kept = keep_merge(pool.registry, subject, "both")
    files = {row["object"] for row in pool.registry.select("model_files", model=kept.digest)}
    pool.rm("both")
    pool.gc(grace=NOW)
    assert not files <= stored(pool.root).keys()
    (back,) = pool.restore("both")
    assert back.rebuilt
    assert files <= stored(pool.root).keys()
    for digest in files:
        pool.registry.objects.check(digest)
    # without its parents it is gone
    pool.rm(["both", "alpha/1"])
    pool.gc(grace=NOW)
    with pytest.raises(NotFound, match="the data of model both was collected"):
        pool.restore("both")


# -- adding again ----------------------------------------------------------------------------------


def test_the_same_model_in_other_files_is_refused(tiny, pool, tmp_path):
    resharded = shard(tiny.units["alpha", 1], tmp_path / "shards")
    again = {"role": "unit", "partition": "alpha", "seed": "base"}
    assert not pool.add_model(resharded, **again).new  # both are here: nothing lacks
    pool.rm("alpha/1")
    pool.gc(grace=NOW)
    before = list(pool.registry.journal.all())
    with pytest.raises(Refused, match=r"of them model\.safetensors is not here any more") as caught:
        pool.add_model(resharded, **again)
    assert "add the folder that it was first added from" in caught.value.hint
    assert list(pool.registry.journal.all()) == before
    pool.add_model(tiny.units["alpha", 1], **again)
    assert pool.ask("alpha", on=["alpha"])


def test_another_spelling_of_the_config_is_refused_too(tiny, pool, tmp_path):
    folder = unit_folder(tmp_path / "own", tiny.seed, 77)
    change_json(folder / "config.json", transformers_version="8.8")
    digest = pool.add_model(folder, name="own").digest
    pool.rm("own")
    pool.gc(grace=NOW)
    change_json(folder / "config.json", transformers_version="9.9")
    with pytest.raises(Refused, match=r"config\.json, model\.safetensors|config\.json is not here"):
        pool.add_model(folder, name="own")
    change_json(folder / "config.json", transformers_version="8.8")
    assert pool.add_model(folder, name="own").digest == digest


def test_what_shares_text_with_removed_text_is_known_when_it_comes_back(registry):
    text = add_evalset(registry, "wiki", "the same text")
    remove(registry, ["wiki"])
    path = registry.root.parent / "code.txt"
    path.write_text("the same text")
    added = data.add_partition(registry, "code", [path])
    assert added.overlaps == ()
    restore(registry, ["wiki"])
    rows = registry.select("contamination")
    assert rows == [{"evalset": text, "partition": added.digest, "documents": 1}]
    assert data.add_partition(registry, "code", [path]).overlaps[0].evalset == "wiki"


def test_contamination_is_counted_without_collected_texts(tiny, tmp_path):
    with Pool.open(tiny.copy(tmp_path / "pool")) as pool:
        lines = (tiny.texts / "alpha.train.jsonl").read_text().splitlines()
        train, test = tmp_path / "p.jsonl", tmp_path / "e.jsonl"
        train.write_text("\n".join(lines[:4]) + "\n")
        test.write_text("\n".join(lines[2:6]) + "\n")
        pool.add_evalset("leak", [test])
        pool.add_partition("copy", [train])
        pool.add_model(tiny.units["gamma", 1], name="both", role="reference",
                       mixture="alpha", seed="base")  # fmt: skip
        asked = pool.ask("alpha", on=["leak"])[0].shared_documents
        assert asked == 4
        model = pool.registry.names("model")["both"]
        units = [u["digest"] for name in ("alpha", "copy") for u in pool.partition(name)["units"]]
        run = {
            "model": model, "role": "other", "seed": None, "blend": None, "mixture": None,
            "scheme": None, "budget": None, "how": "added", "tokens": None, "steps": None,
            "seconds": None, "final_loss": None, "recipe": None,
            "units": [{"unit": unit, "tokens": None, "epochs": None} for unit in units],
        }  # fmt: skip
        pool.registry.record(records.fact("run", run))
        assert pool.ask("both", on=["leak"])[0].shared_documents == 4
        pool.rm(["alpha", "copy"], kind="partition")
        pool.gc(grace=NOW)
        assert pool.ask("both", on=["leak"])[0].shared_documents == 4
        pool.add_evalset("more", [test])  # finds its overlaps with what is here


# -- the commands ------------------------------------------------------------------------------------


def test_the_commands_say_what_they_did(registry, cli_run):
    add_model(registry, "base", b"weights")
    text = add_evalset(registry, "wiki", "some text")
    add_evaluation(registry, registry.names("model")["base"], text, b"scores")
    at = ("--pool", registry.root)
    assert cli_run("restore", *at).stderr == "nothing is removed\n"
    said = cli_run("rm", "wiki", *at).stderr.splitlines()
    assert said == [
        f"removed evalset wiki ({text[:12]})",
        "note: 1 evaluation on it stays: base",
        "the data stays until poolreg gc; bring it back with: poolreg restore",
    ]
    header, row = cli_run("restore", *at).stdout.splitlines()
    assert header.split()[:2] == ["name", "kind"]
    assert row.startswith("wiki  evalset")
    assert "kept until" in row
    (listed,) = json.loads(cli_run("restore", "--json", *at).stdout)
    assert listed["digest"] == text
    assert {"removed", "until", "objects", "bytes", "missing", "left"} <= listed.keys()
    assert cli_run("restore", "--format", "quiet", *at).stdout == "wiki\n"
    assert cli_run("restore", "wiki", *at).stderr == f"restored evalset wiki ({text[:12]})\n"
    cli_run("rm", "wiki", *at)
    cli_run("gc", "--grace", "0", *at)
    assert "collected" in cli_run("restore", *at).stdout
    assert "was collected" in cli_run("restore", "wiki", *at, code=1).stderr
    assert "--as needs" in cli_run("restore", "--as", "x", *at, code=2).stderr


def test_removed_names_are_completed(registry, cli_app):
    add_evalset(registry, "wiki", "some text")
    add_evalset(registry, "news", "other text")
    remove(registry, ["wiki"])

    def offered(*words: str) -> list[str]:
        done = ShellComplete(cli_app, {}, "poolreg", "_POOLREG_COMPLETE").get_completions(
            ["--pool", str(registry.root), *words], ""
        )
        return [item.value for item in done]

    assert offered("restore") == ["wiki"]
    assert offered("rm") == ["news"]
