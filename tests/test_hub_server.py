"""The test hub speaks as the real client of the Hugging Face Hub expects, faults included."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace
from urllib.error import HTTPError
from urllib.request import Request as Ask
from urllib.request import urlopen

import httpx2
import numpy as np
import pytest
from hub import TOKEN, Blob, Fault, Hub
from huggingface_hub import CommitOperationAdd as Add
from huggingface_hub import CommitOperationDelete as Delete
from huggingface_hub import HfApi, HfFileSystem, ModelCard, hf_hub_download
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import close_session, disable_progress_bars

REPO = "someone/pool"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with Hub(tmp_path / "hub") as hub, disable_progress_bars():
        hub.adopt(monkeypatch)
        yield hub
    close_session()


@pytest.fixture
def api(hub):
    api = HfApi(endpoint=hub.endpoint, token=TOKEN)
    api.create_repo(REPO)
    hub.clear()
    return api


@pytest.fixture
def naps(monkeypatch):
    """The client's pauses before it tries again, noted rather than slept."""
    naps = []
    for module in ("utils._http", "file_download"):
        monkeypatch.setattr(f"huggingface_hub.{module}.time", SimpleNamespace(sleep=naps.append))
    return naps


def push(api, files, **options):
    operations = [Add(path, data) for path, data in files.items()]
    return api.create_commit(REPO, operations, commit_message="a push", **options).oid


def noise(size, seed=0):
    return np.random.default_rng(seed).bytes(size)


def log(hub, text):
    """The requests whose "METHOD path" holds the text."""
    return [one for one in hub.requests if text in f"{one.method} {one.path}"]


def child(hub, code, *words):
    """What a fresh process that knows the hub by its environment alone prints."""
    environment = {**os.environ, **hub.environment(), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


# Repositories


def test_a_repository_is_made_once(hub):
    api = HfApi(endpoint=hub.endpoint, token=TOKEN)
    assert api.whoami()["name"] == "tester"
    made = api.create_repo(REPO, private=True)
    assert (made.repo_id, made.repo_type, str(made)) == (REPO, "model", f"{hub.endpoint}/{REPO}")
    assert api.create_repo(REPO, exist_ok=True) == made
    with pytest.raises(HfHubHTTPError) as no:
        api.create_repo(REPO)
    assert no.value.response.status_code == 409
    assert api.repo_info(REPO).private
    assert api.create_repo("mine").repo_id == "tester/mine"
    dataset = api.create_repo(REPO, repo_type="dataset")
    assert (dataset.repo_type, str(dataset)) == ("dataset", f"{hub.endpoint}/datasets/{REPO}")


def test_a_commit_holds_small_and_large_files(hub, api):
    before, weights = hub.head(REPO), noise(300_000)
    id = push(api, {"a/note.json": b"{}", "a/w.safetensors": weights}, parent_commit=before)
    assert id == hub.head(REPO) != before
    tree = hub.tree(REPO)
    assert set(tree) == {".gitattributes", "a/note.json", "a/w.safetensors"}
    assert tree["a/note.json"].sha256 is None
    assert tree["a/w.safetensors"].sha256 == hashlib.sha256(weights).hexdigest()
    assert hub.content(REPO, "a/w.safetensors") == weights
    assert hub.content(REPO, "a/note.json") == b"{}"
    assert [one.received for one in log(hub, "PUT")] == [300_000]
    assert (hub.folder / "lfs" / tree["a/w.safetensors"].sha256).read_bytes() == weights


def test_a_file_on_disk_arrives_as_it_is(hub, api, tmp_path):
    path = tmp_path / "w.bin"
    path.write_bytes(noise(2_500_000))
    push(api, {"w.bin": str(path)})
    assert hub.content(REPO, "w.bin") == path.read_bytes()


def test_what_lies_there_is_not_sent_again(hub, api):
    weights = noise(300_000)
    first = push(api, {"w.bin": weights, "note.txt": b"a note"})
    hub.clear()
    assert push(api, {"w.bin": weights, "note.txt": b"a note"}) == first
    assert not log(hub, "PUT")
    assert not log(hub, "/commit/")
    assert push(api, {"again.bin": weights}) != first
    assert not log(hub, "PUT")
    assert hub.content(REPO, "again.bin") == weights


def test_empty_text_and_binary_files_go_their_ways(hub, api):
    push(
        api,
        {"empty.safetensors": b"", "text": "Jürgen".encode(), "a b": b"\0\1", "latin": b"\xe9t"},
    )
    large = {path for path, entry in hub.tree(REPO).items() if entry.sha256}
    assert large == {"a b", "latin"}
    attributes = hub.content(REPO, ".gitattributes").decode()
    assert "*.safetensors filter=lfs" in attributes
    assert "a?b filter=lfs" in attributes


def test_a_repository_says_which_files_are_large(hub, api):
    push(api, {".gitattributes": b"objects/* filter=lfs -text\nobjects/*.txt -filter\n"})
    push(api, {"objects/a": b"text", "objects/b.txt": b"text", "other": b"text"})
    assert {p for p, entry in hub.tree(REPO).items() if entry.sha256} == {"objects/a"}


def test_files_and_folders_are_deleted(hub, api):
    push(api, {"a/one": b"1", "a/two": b"2", "b/one": b"3"})
    gone = [Delete("a/"), Delete("b/one")]
    api.create_commit(REPO, gone, commit_message="less")
    assert set(hub.tree(REPO)) == {".gitattributes"}
    with pytest.raises(EntryNotFoundError, match="A file with this name doesn't exist"):
        api.create_commit(REPO, [Delete("b/one")], commit_message="less")


def test_only_the_bytes_announced_are_taken(hub, api):
    oid = hashlib.sha256(b"true").hexdigest()
    with pytest.raises(HTTPError) as no:
        urlopen(Ask(f"{hub.endpoint}/{REPO}/lfs/{oid}", b"false", method="PUT"))
    assert no.value.code == 422
    no.value.close()
    assert oid not in hub.repo(REPO).uploads
    operation = Add("w.bin", b"true\0")
    operation._upload_mode, operation._is_uploaded = "lfs", True
    with pytest.raises(BadRequestError, match=r"w\.bin names a file that was not uploaded"):
        api.create_commit(REPO, [operation], commit_message="an empty promise")


# Commits beside one another


def test_a_stale_parent_is_refused(hub, api):
    stale = hub.head(REPO)
    newer = hub.commit_files(REPO, {"other.txt": b"from elsewhere"})
    operations = [Add("w.bin", noise(1000)), Add("note.txt", b"a note")]
    api.preupload_lfs_files(REPO, operations)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as no:
        api.create_commit(REPO, operations, commit_message="late", parent_commit=stale)
    assert no.value.response.status_code == 412
    hub.clear()
    api.create_commit(REPO, operations, commit_message="now", parent_commit=newer)
    assert not log(hub, "PUT")
    assert {"other.txt", "w.bin", "note.txt"} < set(hub.tree(REPO))


def test_a_commit_may_slip_in_just_before(hub, api):
    hub.before_commit = lambda hub: hub.commit_files(REPO, {"theirs": b"1"})
    with pytest.raises(HfHubHTTPError) as no:
        push(api, {"ours": b"2"}, parent_commit=hub.head(REPO))
    assert no.value.response.status_code == 412
    push(api, {"ours": b"2"}, parent_commit=hub.head(REPO))
    assert {"theirs", "ours"} < set(hub.tree(REPO))


def test_branches_and_tags_name_commits(hub, api):
    first = push(api, {"a": b"1"})
    api.create_tag(REPO, tag="v/1", revision=first)
    api.create_branch(REPO, branch="next", revision=first)
    second = push(api, {"a": b"2"}, revision="next")
    refs = api.list_repo_refs(REPO)
    assert {one.name: one.target_commit for one in refs.branches} == {"main": first, "next": second}
    assert [(one.ref, one.target_commit) for one in refs.tags] == [("refs/tags/v/1", first)]
    for revision, sha in {"v/1": first, "next": second, first[:8]: first, "main": first}.items():
        assert api.repo_info(REPO, revision=revision).sha == sha
    assert [hub.content(REPO, "a", revision) for revision in ("v/1", "next")] == [b"1", b"2"]
    api.create_tag(REPO, tag="v/1", exist_ok=True)
    api.create_branch(REPO, branch="next", exist_ok=True)
    with pytest.raises(HfHubHTTPError) as no:
        api.create_tag(REPO, tag="v/1")
    assert no.value.response.status_code == 409
    api.delete_branch(REPO, branch="next")
    with pytest.raises(RevisionNotFoundError):
        push(api, {"a": b"3"}, revision="next")


# Reading


def test_long_trees_come_in_pages_of_one_commit(hub, api):
    files = {f"objects/{at // 100:02}/{at:04}": b"%d" % at for at in range(2345)}
    id = hub.commit_files(REPO, files)
    listed = iter(api.list_repo_tree(REPO, recursive=True, revision=id))
    found = [next(listed)]
    hub.commit_files(REPO, {"objects/23/new": b"1", "objects/23/2344": None})
    found += listed
    assert {one.path for one in found if hasattr(one, "blob_id")} == {*files, ".gitattributes"}
    folders = {one.path for one in found if hasattr(one, "tree_id")}
    assert folders == {"objects", *(f"objects/{at:02}" for at in range(24))}
    assert len(log(hub, "/tree/")) == 3
    assert all(one.sent > 0 for one in log(hub, "/tree/"))


def test_a_tree_may_be_listed_a_folder_at_a_time(hub, api):
    hub.commit_files(REPO, {"a/b/c.bin": b"\0" * 10, "a/d": b"1", "e": b"2"})
    assert [one.path for one in api.list_repo_tree(REPO, "a")] == ["a/b", "a/d"]
    deep = list(api.list_repo_tree(REPO, "a/b"))
    assert [(one.path, one.lfs.size) for one in deep] == [("a/b/c.bin", 10)]
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(REPO, "nowhere"))


def test_paths_are_looked_up(hub, api):
    hub.commit_files(REPO, {"a/w.bin": b"\0" * 10, "note": b"1"})
    weights, note, folder = api.get_paths_info(REPO, ["a/w.bin", "note", "a", "missing"])
    assert weights.lfs.sha256 == hashlib.sha256(b"\0" * 10).hexdigest()
    assert (note.lfs, note.size, folder.path) == (None, 1, "a")
    with pytest.raises(HfHubHTTPError, match="too many parameters"):
        api.get_paths_info(REPO, [f"{at}" for at in range(1001)])


def test_a_repository_tells_of_its_files(hub, api):
    id = hub.commit_files(REPO, {"a/w.bin": b"\0" * 10})
    info = api.repo_info(REPO, files_metadata=True)
    assert (info.sha, info.id, info.gated) == (id, REPO, False)
    sizes = {one.rfilename: (one.size, one.lfs and one.lfs.size) for one in info.siblings}
    assert sizes["a/w.bin"] == (10, 10)
    assert api.repo_info(REPO).siblings[0].size is None


def test_errors_have_the_clients_types(hub, api):
    hub.commit_files(REPO, {"w.bin": b"\0"})
    anonymous = HfApi(endpoint=hub.endpoint, token=False)
    assert anonymous.repo_info(REPO).sha == hub.head(REPO)
    with pytest.raises(RepositoryNotFoundError):
        api.repo_info("someone/else")
    with pytest.raises(RevisionNotFoundError):
        api.repo_info(REPO, revision="nowhere")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "missing")
    with pytest.raises(RepositoryNotFoundError) as no:
        anonymous.create_commit(REPO, [Add("a", b"1")], commit_message="unknown")
    assert no.value.response.status_code == 401
    hub.repo(REPO).private = True
    with pytest.raises(RepositoryNotFoundError):
        anonymous.repo_info(REPO)
    hub.repo(REPO).gated = True
    with pytest.raises(GatedRepoError):
        hf_hub_download(REPO, "w.bin")
    hub.fail(Fault("whoami", status=401))
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami()


def test_a_download_goes_on_where_it_was_cut(hub, api, naps, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)
    weights = noise(300_000)
    hub.commit_files(REPO, {"w.bin": weights})
    hub.fail(Fault("GET .*/resolve/", "cut", after=105_000))
    path = hf_hub_download(REPO, "w.bin")
    with open(path, "rb") as file:
        assert file.read() == weights
    assert [one.sent for one in log(hub, "GET")] == [105_000, 200_000]
    assert naps == [1]


def test_ranges_are_served(hub, api):
    hub.commit_files(REPO, {"w.bin": bytes(range(100))})
    url = f"{hub.endpoint}/{REPO}/resolve/main/w.bin"
    for asked, first, end in [
        ("5-9", 5, 10),
        ("95-", 95, 100),
        ("-3", 97, 100),
        ("90-500", 90, 100),
    ]:
        answer = httpx2.get(url, headers={"Range": f"bytes={asked}"})
        assert (answer.status_code, answer.content) == (206, bytes(range(first, end)))
        assert answer.headers["Content-Range"] == f"bytes {first}-{end - 1}/100"
    assert httpx2.get(url, headers={"Range": "bytes=100-"}).status_code == 416


def test_a_few_columns_of_a_table_are_read_from_afar(hub, api):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table(
        {name: np.frombuffer(noise(400_000, seed), "i4") for seed, name in enumerate("abc")}
    )
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=25_000)
    hub.commit_files(REPO, {"t.parquet": file.getvalue()}, repo_type="dataset")
    system = HfFileSystem(endpoint=hub.endpoint, token=TOKEN, skip_instance_cache=True)
    with system.open(f"datasets/{REPO}/t.parquet", block_size=1024, cache_type="none") as remote:
        found = pq.ParquetFile(remote).read_row_group(2, columns=["b"])
    assert found["b"].equals(table["b"].slice(50_000, 25_000))
    ranges = log(hub, "GET /datasets/")
    assert {one.status for one in ranges} == {206}
    assert sum(one.sent for one in ranges) < len(file.getvalue()) / 5


# Faults


@pytest.mark.parametrize("kind", ["cut", "drop", "status"])
def test_a_broken_upload_is_sent_again(hub, api, naps, kind):
    hub.fail(Fault("PUT /", kind, after=100_000))
    push(api, {"w.bin": noise(3_000_000)})
    assert hub.content(REPO, "w.bin") == noise(3_000_000)
    bytes_taken = {"cut": 100_000, "drop": 0, "status": 3_000_000}[kind]
    assert [one.received for one in log(hub, "PUT")] == [bytes_taken, 3_000_000]
    assert naps == [1]
    assert len(list((hub.folder / "lfs").iterdir())) == 1


def test_the_client_gives_up_after_six_attempts(hub, api, naps):
    hub.fail(Fault("PUT /", times=None))
    with pytest.raises(RuntimeError, match=r"Error while uploading 'w\.bin'") as no:
        push(api, {"w.bin": noise(1000)})
    assert isinstance(no.value.__cause__, HfHubHTTPError)
    assert naps == [1, 2, 4, 8, 8]
    hub.faults.clear()
    push(api, {"w.bin": noise(1000)})


@pytest.mark.parametrize("kind", ["cut", "drop", "lost"])
def test_a_commit_without_an_answer_is_not_asked_again(hub, api, naps, kind):
    before = hub.head(REPO)
    hub.fail(Fault("POST .*/commit/", kind, after=10))
    with pytest.raises(httpx2.TransportError):
        push(api, {"note": b"x" * 100_000})
    assert (hub.head(REPO) != before) == (kind == "lost")
    assert naps == []


def test_some_requests_pass_before_a_fault(hub, api, naps):
    hub.commit_files(REPO, {f"{at:04}": b"%d" % at for at in range(2500)})
    hub.fail(Fault("GET .*/tree/", skip=1, times=2))
    assert len(list(api.list_repo_tree(REPO))) == 2501
    assert [one.status for one in log(hub, "/tree/")] == [200, 503, 503, 200, 200]
    assert naps == [1, 2]


def test_a_hub_that_is_gone_does_not_answer(tmp_path):
    with Hub(tmp_path) as hub:
        api = HfApi(endpoint=hub.endpoint, token=TOKEN)
        api.create_repo(REPO)
    with pytest.raises(httpx2.TransportError):
        api.repo_info(REPO)
    close_session()


def test_what_no_honest_hub_serves(hub, api, tmp_path):
    files = {
        "../up": b"1",
        "/root": b"2",
        "C:\\x": b"3",
        "lie.bin": Blob(b"other", lfs_sha256="f" * 64),
    }
    hub.commit_files(REPO, {**files, "short.bin": Blob(b"five!", size=50)})
    paths = {one.path for one in api.list_repo_tree(REPO, recursive=True) if hasattr(one, "size")}
    assert set(files) < paths
    lie, short = api.get_paths_info(REPO, ["lie.bin", "short.bin"])
    assert (lie.lfs.sha256, short.size) == ("f" * 64, 50)
    # The client itself checks the names and the size, but not the bytes
    for name in ("../up", "/root", "C:\\x"):
        with pytest.raises(ValueError, match="Invalid filename"):
            hf_hub_download(REPO, name, local_dir=tmp_path / "out")
    with pytest.raises(OSError, match="should be of size 50 but has size 5"):
        hf_hub_download(REPO, "short.bin", local_dir=tmp_path / "out")
    with open(hf_hub_download(REPO, "lie.bin", local_dir=tmp_path / "out"), "rb") as file:
        assert file.read() == b"other"


# Cards


def test_cards_are_judged_and_pushed(hub, api):
    ModelCard("---\nlicense: mit\ntags: [pool]\n---\n# A pool\n").push_to_hub(REPO, token=TOKEN)
    assert b"# A pool" in hub.content(REPO, "README.md")
    with pytest.raises(ValueError, match="license"):
        ModelCard("---\nlicense: [1]\n---\n").validate()
    with pytest.raises(ValueError, match="Invalid metadata in README"):
        push(api, {"README.md": b"---\nmodel-index: [{name: a}]\n---\n"})
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        push(api, {"README.md": b"# No metadata\n"})


# Xet


@pytest.fixture
def xet_hub(tmp_path, monkeypatch):
    pytest.importorskip("hf_xet")
    with Hub(tmp_path / "hub", xet=True) as hub, disable_progress_bars():
        hub.adopt(monkeypatch)
        yield hub
    close_session()


def test_large_files_go_by_xet(xet_hub, tmp_path):
    api, weights = HfApi(endpoint=xet_hub.endpoint, token=TOKEN), noise(300_000)
    api.create_repo(REPO)
    (tmp_path / "two.bin").write_bytes(weights[:200_000])
    push(api, {"one.bin": weights, "two.bin": str(tmp_path / "two.bin"), "note": b"a note"})
    assert xet_hub.content(REPO, "one.bin") == weights
    assert xet_hub.tree(REPO)["two.bin"].sha256 == hashlib.sha256(weights[:200_000]).hexdigest()
    info = api.get_paths_info(REPO, ["one.bin"])[0]
    assert (info.size, len(info.xet_hash)) == (300_000, 64)
    with open(hf_hub_download(REPO, "one.bin"), "rb") as file:
        assert file.read() == weights
    assert not log(xet_hub, "PUT")
    assert not log(xet_hub, "GET /someone/")
    assert [one.path.split("/")[5] for one in log(xet_hub, "xet-")] == [
        "xet-write-token",
        "xet-read-token",
    ]


def test_each_hub_has_its_own_xet_store(xet_hub):
    api = HfApi(endpoint=xet_hub.endpoint, token=TOKEN)
    api.create_repo(REPO)
    push(api, {"one.bin": noise(300_000)})
    assert xet_hub.content(REPO, "one.bin") == noise(300_000)


def test_xet_needs_a_hub_that_has_it(hub, api, monkeypatch):
    pytest.importorskip("hf_xet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    with pytest.raises(ConnectionError, match=r"404 Not Found.*/xet-write-token/main"):
        push(api, {"w.bin": noise(1000)})
    hub.commit_files(REPO, {"w.bin": noise(1000)})
    with open(hf_hub_download(REPO, "w.bin"), "rb") as file:
        assert file.read() == noise(1000)


# Other processes


@pytest.mark.parametrize("server", ["hub", "xet_hub"])
def test_the_environment_leads_a_process_here(server, request, tmp_path):
    hub = request.getfixturevalue(server)
    hub.commit_files(REPO, {"note.txt": b"a note"})
    code = """
import sys
from huggingface_hub import HfApi, HfFileSystem, hf_hub_download
print(HfApi().whoami()["name"])
HfApi().upload_file(path_or_fileobj=sys.argv[3], path_in_repo="a/w.bin", repo_id=sys.argv[1])
print(hf_hub_download(sys.argv[1], "a/w.bin", local_dir=sys.argv[2]))
print(HfFileSystem().read_text(f"hf://{sys.argv[1]}/note.txt"))
print(HfApi().repo_info(sys.argv[1]).sha)
"""
    (tmp_path / "w.bin").write_bytes(noise(1000))
    words = REPO, tmp_path / "out", tmp_path / "w.bin"
    user, path, note, head = child(hub, code, *words).splitlines()
    assert (user, note, head) == ("tester", "a note", hub.head(REPO))
    with open(path, "rb") as file:
        assert file.read() == hub.content(REPO, "a/w.bin") == noise(1000)
    assert bool(log(hub, "PUT")) == (server == "hub")


@pytest.mark.campaign
@pytest.mark.slow
def test_a_model_loads_from_a_subfolder(hub, api, tmp_path):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))
    model.save_pretrained(tmp_path / "model")
    api.upload_folder(repo_id=REPO, folder_path=tmp_path / "model", path_in_repo="models/x")
    code = """
import json, sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], subfolder="models/x")
print(json.dumps(model.lm_head.weight.tolist()))
"""
    assert json.loads(child(hub, code, REPO)) == model.lm_head.weight.tolist()
