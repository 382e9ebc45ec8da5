"""Single models published on a Hub, by the real client, to a server on the loopback interface."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pools
import pytest
from hub import Fault, Hub
from huggingface_hub import ModelCard

from poolreg import Pool
from poolreg.errors import Conflict, PoolregError, Refused, UsageError
from poolreg.models.folders import merge_folders
from poolreg.models.merges import keep_merge
from poolreg.models.stored import export_model
from poolreg.sharing import single
from poolreg.sharing.single import (
    model_repository,
    push_folders,
    push_merge,
    push_model,
    push_variant,
    variant_repositories,
)

LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

repo, folder, trust = sys.argv[1], sys.argv[2], sys.argv[3] == "trust"
there, here = (
    AutoModelForCausalLM.from_pretrained(place, trust_remote_code=trust).state_dict()
    for place in (repo, folder)
)
assert "poolreg" not in sys.modules
assert there.keys() == here.keys() and len(here) > 10
assert all(torch.equal(there[name], here[name]) for name in here)
assert AutoTokenizer.from_pretrained(repo)("the cat").input_ids
print("equal")
"""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with Hub(tmp_path / "hub") as running:
        running.adopt(monkeypatch)
        yield running


@pytest.fixture
def registry(pool):
    return pool.registry


def left_over(registry):
    return list((registry.root / "tmp").iterdir())


def uploads(hub):
    return [request for request in hub.requests if request.method == "PUT"]


def loads_as(hub, repo, folder, trust=""):
    """Load a repository and a folder in a process without poolreg, and compare their weights."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD, repo, str(folder), trust], text=True, capture_output=True,
        cwd=folder.parent, env={**os.environ, **hub.environment(), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stdout.endswith("equal\n"), done.stderr[-3000:]


@pytest.mark.slow
def test_a_pushed_merge_loads_and_is_the_local_merge(hub, pool, tmp_path):
    pool.evaluate(["alpha+beta"], on=["alpha", "gamma"])
    subject = pool.resolve("alpha+beta")
    merged, url = push_merge(pool.registry, subject, "tester/mix")
    assert url == f"{hub.endpoint}/tester/mix/commit/{hub.head('tester/mix')}"
    assert left_over(pool.registry) == []
    local = pool.merge("alpha+beta", tmp_path / "local")
    assert merged.digest == local.digest
    for file in local.folder.iterdir():
        if file.name != "README.md":
            assert hub.content("tester/mix", file.name) == file.read_bytes(), file.name
    data = ModelCard(hub.content("tester/mix", "README.md").decode()).data
    assert data["base_model_relation"] == "merge"
    known = pool.sql(
        "SELECT evalset, bits_per_byte, perplexity FROM scores WHERE subject = ?", [subject.digest]
    ).dicts()
    assert {row["evalset"] for row in known} == {"alpha", "gamma"}
    assert {(r.dataset_name, r.metric_type, r.metric_value) for r in data.eval_results} == {
        (row["evalset"], metric, row[metric])
        for row in known
        for metric in ("bits_per_byte", "perplexity")
    }
    loads_as(hub, "tester/mix", local.folder)


def test_the_same_push_again_sends_nothing(hub, pool):
    subject = pool.resolve("alpha+beta")
    _, first = push_merge(pool.registry, subject, "tester/mix")
    count = len(hub.repo("tester/mix").commits)
    hub.clear()
    _, second = push_merge(pool.registry, subject, "tester/mix")
    assert first == second
    assert len(hub.repo("tester/mix").commits) == count
    assert uploads(hub) == []
    assert not any("/commit/" in request.path for request in hub.requests)


def test_one_commit_replaces_a_model_and_deletes_its_old_shards(hub, pool):
    subject = pool.resolve("alpha+beta")
    push_merge(pool.registry, subject, "tester/mix", max_shard_bytes=20_000)
    before = hub.tree("tester/mix")
    assert sum(path.endswith(".safetensors") for path in before) > 1
    hub.commit_files("tester/mix", {"LICENSE": b"mine", "figures/model.safetensors": b"mine too"})
    head = hub.head("tester/mix")
    push_merge(pool.registry, subject, "tester/mix")
    after = hub.tree("tester/mix")
    assert sorted(path for path in after if path.endswith(".safetensors")) == [
        "figures/model.safetensors", "model.safetensors",
    ]  # fmt: skip
    assert "model.safetensors.index.json" in before.keys() - after.keys()
    assert {"LICENSE", "config.json", "tokenizer.json", "README.md"} <= after.keys()
    assert hub.repo("tester/mix").at("main").parent == head


def test_a_commit_in_between_loses_nothing(hub, pool):
    subject = pool.resolve("alpha+beta")
    push_merge(pool.registry, subject, "tester/mix")
    hub.before_commit = lambda hub: hub.commit_files("tester/mix", {"LICENSE": b"theirs"})
    hub.clear()
    push_merge(pool.registry, pool.resolve("alpha+gamma"), "tester/mix")
    assert hub.content("tester/mix", "LICENSE") == b"theirs"
    recipe = json.loads(hub.content("tester/mix", "poolreg.json"))
    assert recipe["labels"] == [label for label in recipe["labels"] if "beta" not in label]
    assert len(uploads(hub)) == 1  # the weights were not sent again


def test_a_repository_that_never_rests_is_left_alone(hub, pool):
    numbers = iter(range(100))

    def commit(hub):
        hub.before_commit = commit
        hub.commit_files("tester/mix", {"n": str(next(numbers)).encode()})

    push_merge(pool.registry, pool.resolve("alpha"), "tester/mix")
    hub.before_commit = commit
    with pytest.raises(Conflict, match="changed 5 times"):
        push_merge(pool.registry, pool.resolve("alpha+gamma"), "tester/mix")
    assert next(numbers) == single.ATTEMPTS
    assert left_over(pool.registry) == []


def test_a_pool_is_not_overwritten_by_a_model(hub, pool, monkeypatch):
    hub.commit_files(
        "tester/pool", {"poolreg.json": b'{"format":1}', f"journal/{'a' * 64}.jsonl": b"x"}
    )
    head = hub.head("tester/pool")
    monkeypatch.setattr(single, "merge_subject", None)  # nothing is merged
    with pytest.raises(Conflict, match="holds a published pool"):
        push_merge(pool.registry, pool.resolve("alpha+beta"), "tester/pool")
    assert hub.head("tester/pool") == head


def test_private_means_private(hub, pool, monkeypatch):
    subject = pool.resolve("alpha")
    push_merge(pool.registry, subject, "tester/secret", private=True)
    assert hub.repo("tester/secret").private
    push_merge(pool.registry, subject, "tester/secret", private=True)
    push_merge(pool.registry, subject, "tester/open")
    monkeypatch.setattr(single, "merge_subject", None)
    with pytest.raises(Conflict, match="is public"):
        push_merge(pool.registry, subject, "tester/open", private=True)


def test_a_name_alone_is_the_users_repository(hub, pool):
    _, url = push_merge(pool.registry, pool.resolve("alpha"), "mine")
    assert "/tester/mine/commit/" in url
    assert "config.json" in hub.tree("tester/mine")


def test_a_branch_of_its_own(hub, pool):
    push_merge(pool.registry, pool.resolve("alpha"), "tester/mix")
    head = hub.head("tester/mix")
    push_merge(pool.registry, pool.resolve("alpha+beta"), "tester/mix", revision="mixed")
    assert hub.head("tester/mix") == head
    recipe = json.loads(hub.content("tester/mix", "poolreg.json", "mixed"))
    assert len(recipe["components"]) == 3


def test_without_leave_nothing_is_merged(hub, pool, monkeypatch):
    monkeypatch.setattr(single, "merge_subject", None)
    hub.fail(Fault("POST /api/repos/create", status=403))
    with pytest.raises(Refused, match="tester/mix") as caught:
        push_merge(pool.registry, pool.resolve("alpha+beta"), "tester/mix")
    assert "log in" in caught.value.hint
    with pytest.raises(UsageError):
        push_merge(pool.registry, pool.resolve("alpha+beta"), "no such/name here")
    monkeypatch.delenv("HF_TOKEN")
    for repo in ("tester/mix", "mix"):
        with pytest.raises(PoolregError) as caught:
            push_merge(pool.registry, pool.resolve("alpha+beta"), repo)
        assert "hf auth login" in caught.value.hint
    assert not hub.repos


def test_where_folders_lie_stays_at_home(hub, tiny, tmp_path):
    folders = [tiny.units["alpha", 1], tiny.units["beta", 2]]
    merged, _ = push_folders(folders, "tester/mix", out=tmp_path / "out", weights=[2, 1])
    recipe = json.loads(hub.content("tester/mix", "poolreg.json"))
    assert {label: row[1:] for label, row in zip(recipe["labels"], recipe["components"], strict=True)} == {
        "alpha-1": [2, 3], "beta-2": [1, 3],
    }  # fmt: skip
    for path in hub.tree("tester/mix"):
        assert str(tiny.seed.parent).encode() not in hub.content("tester/mix", path), path
    plain = merge_folders(folders, tmp_path / "plain", weights=[2, 1])
    assert plain.digest == merged.digest
    sent = hub.content("tester/mix", "model.safetensors")
    assert sent == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert sent == (tmp_path / "plain" / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "README.md").read_bytes() == hub.content("tester/mix", "README.md")


def test_rounded_weights_are_published_without_scores(hub, pool):
    pool.evaluate(["alpha+beta"], on=["alpha"])
    push_merge(pool.registry, pool.resolve("alpha+beta"), "tester/mix", dtype="bfloat16")
    text = hub.content("tester/mix", "README.md").decode()
    assert ModelCard(text).data.eval_results is None
    assert "before the weights were rounded to bfloat16" in text


def test_a_stored_model_goes_byte_for_byte(hub, registry, tmp_path):
    digest = registry.resolve("model", "base")
    push_variant(registry, digest, "tester/base")
    export_model(registry, digest, tmp_path / "base")
    for file in (tmp_path / "base").iterdir():
        assert hub.content("tester/base", file.name) == file.read_bytes(), file.name
    text = hub.content("tester/base", "README.md").decode()
    assert "seed model of a pool" in text
    assert "base_model_relation" not in ModelCard(text).data


def test_a_kept_merge_tells_its_parents(hub, pool):
    added = keep_merge(pool.registry, pool.resolve("2*alpha+beta"), "kept", dtype="bfloat16")
    push_variant(pool.registry, added.digest, "tester/kept")
    text = hub.content("tester/kept", "README.md").decode()
    assert ModelCard(text).data["base_model_relation"] == "merge"
    assert "| alpha/1 | 1/2 |" in text
    assert "| beta/2 | 1/4 |" in text
    assert "rounded once to bfloat16" in text
    assert "| kept | keeps | 2&#42;alpha+beta |" in text


def test_a_folder_goes_with_a_given_card(hub, tiny, tmp_path):
    folder = pools.shard(tiny.seed, tmp_path / "sharded")
    target = model_repository("tester/any")
    url = push_model(target, folder, card="---\ntags: [x]\n---\n# Any\n", message="any")
    assert url.endswith(hub.head("tester/any"))
    assert hub.content("tester/any", "README.md") == b"---\ntags: [x]\n---\n# Any\n"
    assert hub.tree("tester/any").keys() >= {file.name for file in folder.iterdir()}


def test_repositories_of_several_ratios():
    assert variant_repositories("me/small", [0.3]) == ["me/small"]
    assert variant_repositories("me/small", [0.1, 0.125]) == ["me/small-10", "me/small-12.5"]
    with pytest.raises(UsageError, match="twice"):
        variant_repositories("me/small", [0.1, 0.1])
    with pytest.raises(UsageError, match="between 0 and 1"):
        variant_repositories("me/small", [1.5])


# -- the command line ---------------------------------------------------------------------------


def test_merge_and_push_by_command(hub, cli_run, tiny, tmp_path):
    root = tiny.copy(tmp_path / "pool")
    done = cli_run("merge", "alpha+beta", "--push", "tester/mix", "--private", "--pool", root)
    assert f"{hub.endpoint}/tester/mix/commit/{hub.head('tester/mix')}" in done.stderr
    assert hub.repo("tester/mix").private
    out = tmp_path / "out"
    done = cli_run(
        "merge", tiny.units["alpha", 1], tiny.units["beta", 1], "-o", out, "--push", "tester/two"
    )
    assert f"wrote {out}" in done.stderr
    assert "tester/two/commit/" in done.stderr
    assert hub.content("tester/two", "config.json") == (out / "config.json").read_bytes()


def test_merge_needs_somewhere_to_go(cli_run, tiny):
    done = cli_run("merge", "alpha+beta", "--pool", tiny.root, code=2)
    assert "give -o DIR or --push REPO" in done.stderr
    done = cli_run("merge", "alpha", "-o", "x", "--private", "--pool", tiny.root, code=2)
    assert "--private" in done.stderr


def test_compress_refuses_what_is_ambiguous(hub, cli_run, tiny):
    words = ("--ratio", "0.1,0.3", "--calibrate", "gamma", "--push", "tester/small")
    done = cli_run("compress", "base", "alpha", *words, "--pool", tiny.root, code=2)
    assert "--push is for the variants of one model or mixture" in done.stderr
    assert not hub.repos


@pytest.mark.slow
def test_compress_and_push_by_command(hub, cli_run, tiny, tmp_path):
    root = tiny.copy(tmp_path / "pool")
    words = ("compress", "alpha+beta", "--calibrate", "gamma", "--pool", root, "--ratio")
    cli_run(*words, "0.1,0.3", "--push", "tester/small", "--dry-run")
    assert not hub.repos
    done = cli_run(*words, "0.1,0.3", "--push", "tester/small", "--on", "alpha")
    assert hub.repos.keys() == {("model", "tester/small-10"), ("model", "tester/small-30")}
    for repo in ("tester/small-10", "tester/small-30"):
        assert f"published as {hub.endpoint}/{repo}/commit/{hub.head(repo)}" in done.stderr
    text = hub.content("tester/small-30", "README.md").decode()
    data = ModelCard(text).data
    assert {result.dataset_name for result in data.eval_results} == {"alpha"}
    assert "custom_code" in data.tags
    assert "| alpha+beta |" in text
    assert "averages" in text
    with Pool.open(root) as pool:
        variant = next(
            r for r in pool.sql("SELECT * FROM variant_list").dicts() if r["ratio"] == 0.3
        )
        pool.export_model(variant["model"], tmp_path / "variant")
    loads_as(hub, "tester/small-30", tmp_path / "variant", "trust")
