"""Trees: pools published in folders, on this machine, in memory and in S3 (moto on loopback)."""

import io
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from typing import ClassVar

import fsspec
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bundles import outgoing, published, silent

from poolreg import Pool
from poolreg.canonical import sha256
from poolreg.errors import (
    Conflict,
    Damage,
    MissingPackage,
    NotFound,
    Refused,
    StorageError,
    UsageError,
)
from poolreg.sharing import trees
from poolreg.sharing.places import (
    MARK,
    MARKER,
    Outgoing,
    Snapshot,
    alias_of,
    object_path,
    segment_path,
)
from poolreg.sharing.streams import CHUNK, receive
from poolreg.sharing.trees import TreePlace

WEIGHTS = bytes(range(256)) * (CHUNK // 256) + b"tail"
SEGMENT = b'{"kind":"name"}\n'
REST = {
    "tables/models.parquet": b"PAR1",
    "README.md": b"# A pool\n",
    "models/a b/config.json": b"{}",
}
CONTENTS = {**published([b"", b"weights", WEIGHTS], [SEGMENT]), **REST}


@pytest.fixture(scope="session")
def s3_server():
    """A server that speaks S3; the test is skipped where it or its client is not installed."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def s3(s3_server, monkeypatch) -> str:
    """The URL of a place in a bucket of its own."""
    settings = {
        "AWS_ENDPOINT_URL": s3_server, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "no",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1", "AWS_CONFIG_FILE": "/none", "AWS_SHARED_CREDENTIALS_FILE": "/none",
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    import s3fs

    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    s3fs.S3FileSystem(skip_instance_cache=True).mkdir(bucket)
    return f"s3://{bucket}/shared/pool"


@pytest.fixture(params=["file", "memory", "s3"])
def url(request, tmp_path) -> str:
    if request.param == "s3":
        return request.getfixturevalue("s3")
    return {"file": f"file://{tmp_path}/p/q", "memory": f"memory://{uuid.uuid4().hex}/p"}[
        request.param
    ]


def publish(place: TreePlace, items: list[Outgoing], deleted=(), *, progress=silent) -> None:
    objects = [item for item in items if item.path.startswith("objects/")]
    rest = [item for item in items if not item.path.startswith("objects/")]
    place.create()
    version = place.publish(place.look(), objects, rest, deleted, message="Add", progress=progress)
    assert version == ""


def everything(place: TreePlace, folder: Path) -> dict[str, bytes]:
    folder.mkdir(exist_ok=True)
    found = {}
    for number, (path, entry) in enumerate(place.look().files.items()):
        counts: list[int] = []
        target = folder / f"{uuid.uuid4().hex}-{number}"
        place.fetch(path, target, progress=counts.append)
        found[path] = target.read_bytes()
        assert sum(counts) == entry.size == len(found[path])
        assert max(counts, default=0) <= CHUNK
    return found


# -- on every file system -----------------------------------------------------------------------


def test_round_trip(url, tmp_path):
    counts: list[int] = []
    with pytest.raises(NotFound, match="no published pool"):
        TreePlace(url).look()
    publish(TreePlace(url), outgoing(tmp_path / "in", CONTENTS), progress=counts.append)
    assert sum(counts) == sum(len(data) for data in CONTENTS.values())
    snapshot = TreePlace(url).look()
    assert snapshot.version == ""
    assert set(snapshot.objects()) == {sha256(data) for data in (b"", b"weights", WEIGHTS)}
    assert set(snapshot.segments()) == {sha256(SEGMENT)}
    assert everything(TreePlace(url), tmp_path / "out") == CONTENTS


def test_second_publish(url, tmp_path, monkeypatch):
    """Only what is new is sent; what is replaced and deleted is gone; the count is whole."""
    publish(TreePlace(url), outgoing(tmp_path / "in", CONTENTS))
    new = {**CONTENTS, **published([b"more"], [b"[]\n"]), "README.md": b"# Longer card\n"}
    sent: list[str] = []
    opened = trees.checked
    monkeypatch.setattr(trees, "checked", lambda item: sent.append(item.path) or opened(item))
    counts: list[int] = []
    gone = ["models/a b/config.json", "models/never/there"]
    items = [item for item in outgoing(tmp_path / "in2", new) if item.path not in gone]
    publish(TreePlace(url), items, gone, progress=counts.append)
    del new["models/a b/config.json"]
    assert everything(TreePlace(url), tmp_path / "out") == new
    assert sum(counts) == sum(len(data) for data in new.values())
    assert sent[0] == object_path(sha256(b"more"))
    assert sent[1] == segment_path(sha256(b"[]\n"))
    assert sorted(sent[2:-1]) == ["README.md", "tables/models.parquet"]
    assert sent[-1] == MARKER


def test_writers_at_once_make_a_union(url, tmp_path):
    """Two that looked at the same state publish one after the other."""
    publish(TreePlace(url), outgoing(tmp_path / "in", {MARKER: MARK}))
    both = [published([name], [name + b"\n"]) for name in (b"one", b"two")]
    places = [TreePlace(url) for _ in both]
    seen = [place.look() for place in places]
    for place, snapshot, contents in zip(places, seen, both, strict=True):
        items = outgoing(tmp_path / "in", contents)
        place.publish(snapshot, items, [], [], message="", progress=silent)
    assert everything(TreePlace(url), tmp_path / "out") == both[0] | both[1]


def test_resume_of_a_first_publish(url, tmp_path, monkeypatch):
    """What an interrupted push left is found although there is no mark yet."""
    items = outgoing(tmp_path / "in", CONTENTS)
    objects = [item for item in items if item.path.startswith("objects/")]
    publish(TreePlace(url), objects[:2])
    with pytest.raises(NotFound):
        TreePlace(url).look()
    sent: list[str] = []
    opened = trees.checked
    monkeypatch.setattr(trees, "checked", lambda item: sent.append(item.path) or opened(item))
    place = TreePlace(url)
    place.create()
    place.publish(Snapshot({}), objects, [], [], message="", progress=silent)
    assert sent == [objects[2].path]


def test_changed_source_is_not_sent(url, tmp_path):
    for changed in (b"Weights", b"weight", b"weights and more"):
        (item,) = outgoing(tmp_path / "in", {object_path(sha256(b"weights")): b"weights"})
        item.source.write_bytes(changed)
        place = TreePlace(url)
        with pytest.raises(Damage, match="does not hold the bytes"):
            publish(place, [item])
        assert not place.look().files


def test_error_ends_a_publish_before_the_mark(url, tmp_path):
    items = outgoing(tmp_path / "in", CONTENTS)
    items[1].source.unlink()
    place = TreePlace(url)
    with pytest.raises(StorageError, match="reading"):
        publish(place, items)
    assert not {MARKER, segment_path(sha256(SEGMENT)), *REST} & set(place.look().files)


def test_fetch_of_what_was_not_listed(url, tmp_path):
    publish(TreePlace(url), outgoing(tmp_path / "in", {MARKER: MARK}))
    place = TreePlace(url)
    place.look()
    for path in ("../x", "/etc/passwd", "README.md"):
        with pytest.raises(NotFound):
            place.fetch(path, tmp_path / "x", progress=silent)


def test_parts_of_files_in_a_folder(url, tmp_path):
    """A folder is looked at alone; of what was found there, parts are read."""
    place = TreePlace(url)
    assert place.sizes("tables") == {}
    publish(place, outgoing(tmp_path / "in", {**CONTENTS, "tables/b/c": b"0123456789"}))
    place = TreePlace(url)
    assert place.sizes("tables") == {"tables/models.parquet": 4, "tables/b/c": 10}
    assert place.sizes("table") == place.sizes("README.md/x") == {}
    with pytest.raises(NotFound, match="holds no file"):
        place.read("tables/b/c", 0, 1)
    place.look()
    for start, end in ((0, 10), (3, 7), (9, 10), (8, 99)):
        assert place.read("tables/b/c", start, end) == b"0123456789"[start:end]


def test_fetch_of_a_file_that_grew(url, tmp_path):
    path = object_path(sha256(b"weights"))
    place = TreePlace(url)
    publish(place, outgoing(tmp_path / "in", {path: b"weights"}))
    place.look()
    (longer,) = outgoing(tmp_path / "in", {path: b"weights and more"})
    publish(TreePlace(url), [longer])
    # S3 itself refuses to send another file than the one that was listed.
    with pytest.raises((Refused, StorageError), match=r"longer than the 7|remote file"):
        place.fetch(path, tmp_path / "x", progress=silent)
    assert not (tmp_path / "x").exists()


def test_receive_keeps_other_files(tmp_path):
    (tmp_path / "x").write_bytes(b"mine")
    with pytest.raises(StorageError):
        receive([b"data"], tmp_path / "x", limit=9, progress=silent)
    assert (tmp_path / "x").read_bytes() == b"mine"


# -- this machine's file system -----------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(
    objects=st.lists(st.binary(max_size=300), max_size=5),
    segments=st.lists(st.binary(max_size=300), max_size=3),
)
def test_round_trip_in_a_folder(objects, segments):
    contents = published(objects, segments)
    with tempfile.TemporaryDirectory() as name:
        publish(TreePlace(f"file://{name}/pool"), outgoing(Path(name, "in"), contents))
        assert everything(TreePlace(f"file://{name}/pool"), Path(name, "out")) == contents
        on_disk = {path for path in Path(name, "pool").rglob("*") if path.is_file()}
        assert on_disk == {Path(name, "pool", path) for path in contents}


# argv: URL, folder of sources, after how many reported chunks to die. The files are large enough
# that a chunk is reported in the middle of each.
CHILD = """
import os, signal, sys
from pathlib import Path
from poolreg.sharing.places import MARKER, Outgoing
from poolreg.sharing.trees import TreePlace

url, folder, left = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
def progress(_):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
items = [Outgoing.of(f.relative_to(folder).as_posix(), f) for f in sorted(folder.rglob("*")) if f.is_file()]
objects = [item for item in items if item.path.startswith("objects/")]
place = TreePlace(url)
place.create()
place.publish(place.look(), objects, [i for i in items if i not in objects], [], message="", progress=progress)
"""


@pytest.mark.campaign
@pytest.mark.slow
def test_killed_at_any_chunk(tmp_path):
    """What has a final name is whole; the mark comes last; going on sends the rest."""
    big = [bytes([number]) * (CHUNK + 1) for number in range(6)]
    contents = {**published(big, [b"s" * (CHUNK + 1)]), "tables/t.parquet": b"t" * (CHUNK + 1)}
    for path, data in contents.items():
        (tmp_path / "in" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / path).write_bytes(data)
    chunks = 2 * 8 + 1
    for last in (1, 2, 5, 8, 11, 13, 14, 15, 16, chunks):
        pool = tmp_path / f"pool{last}"
        words = [sys.executable, "-c", CHILD, f"file://{pool}", tmp_path / "in", last]
        done = subprocess.run([str(word) for word in words], check=False)
        assert done.returncode == -signal.SIGKILL
        place = TreePlace(f"file://{pool}")
        place.create()
        there = everything(place, tmp_path / "out")
        assert there.items() <= contents.items()
        assert segment_path(sha256(b"s" * (CHUNK + 1))) not in there or last > 13
        assert MARKER not in there
        words[-1] = 0
        subprocess.run([str(word) for word in words], check=True)
        assert everything(place, tmp_path / "out") == contents
        for path in (tmp_path / "out").iterdir():
            path.unlink()


def test_links_that_lead_outside(tmp_path):
    root, secret = tmp_path / "pool", tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_bytes(b"secret")
    publish(TreePlace(f"file://{root}"), outgoing(tmp_path / "in", {MARKER: MARK, "a": b"a"}))
    (root / "inside").symlink_to("a")
    (root / "outside").symlink_to(secret / "key")
    (root / "relative").symlink_to("../secret/key")
    (root / "folder").symlink_to(secret)
    (root / "loop").symlink_to("loop")
    (root / "dangling").symlink_to("nothing")
    os.mkfifo(root / "pipe")
    place = TreePlace(f"file://{root}")
    assert set(place.look().files) == {MARKER, "a", "inside"}
    (root / "a").unlink()
    (root / "a").symlink_to(secret / "key")
    for path in ("a", "inside"):  # changed since they were listed
        with pytest.raises(Refused, match="leads out"):
            place.fetch(path, tmp_path / "x", progress=silent)
    assert not (tmp_path / "x").exists()


def test_nothing_is_read_outside(tmp_path):
    root, secret = tmp_path / "pool", tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_bytes(b"secret")
    publish(TreePlace(f"file://{root}"), outgoing(tmp_path / "in", {"tables/a": b"a"}))
    (root / "tables" / "outside").symlink_to(secret / "key")
    (root / "other").symlink_to(secret)
    place = TreePlace(f"file://{root}")
    assert place.sizes("other") == place.sizes("../secret") == {}
    assert place.sizes("tables") == {"tables/a": 1}
    (root / "tables" / "a").unlink()
    (root / "tables" / "a").symlink_to(secret / "key")  # since it was listed
    with pytest.raises(Refused, match="leads out"):
        place.read("tables/a", 0, 3)


def test_nothing_is_written_or_deleted_outside(tmp_path):
    root, other = tmp_path / "pool", tmp_path / "other"
    other.mkdir()
    (other / "mine").write_bytes(b"mine")
    root.mkdir()
    (root / "objects").symlink_to(other)
    place = TreePlace(f"file://{root}")
    for path in (object_path(sha256(b"x")), "../other/mine", str(other / "mine")):
        (item,) = outgoing(tmp_path / "in", {path: b"x"})
        with pytest.raises(Refused, match="leads out"):
            publish(place, [item])
    for path in ("objects/mine", "../other/mine", str(other / "mine")):
        with pytest.raises(Refused, match="leads out"):
            publish(place, [], [path])
    assert [path.read_bytes() for path in other.iterdir()] == [b"mine"]


def test_a_link_in_place_of_a_file_is_replaced(tmp_path):
    root = tmp_path / "pool"
    root.mkdir()
    (tmp_path / "mine").write_bytes(b"mine")
    (root / "README.md").symlink_to(tmp_path / "mine")
    publish(TreePlace(f"file://{root}"), outgoing(tmp_path / "in", {"README.md": b"card"}))
    assert (tmp_path / "mine").read_bytes() == b"mine"
    assert (root / "README.md").read_bytes() == b"card"


def test_root_may_be_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    publish(TreePlace(f"file://{tmp_path}/link"), outgoing(tmp_path / "in", CONTENTS))
    assert everything(TreePlace(f"file://{tmp_path}/real"), tmp_path / "out") == CONTENTS


def test_a_file_is_no_place(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    place = TreePlace(f"file://{tmp_path}/file")
    with pytest.raises(NotFound):
        place.look()
    with pytest.raises(Conflict, match="is a file"):
        place.create()
    with pytest.raises(StorageError):
        TreePlace(f"file://{tmp_path}/file/below").create()


# -- addresses and errors -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "alias"),
    [
        ("s3://bucket/some/pool", "pool"), ("s3://bucket", "bucket"), ("file:///a/my pool/", "my-pool"),
        ("memory://.hidden_1.2", "hidden_1.2"), ("file:///a/ü", "pool"), ("file:///2024", "pool-2024"),
        ("s3://b/all", "pool-all"), ("", "pool"), ("/x/" + "n" * 500, "n" * 60),
    ],
)  # fmt: skip
def test_alias(address, alias):
    assert alias_of(address) == alias


@pytest.mark.parametrize(
    "address", ["nothing", "file://", "s3:///", "zzz://a/b", "simplecache::file:///tmp/x"]
)
def test_addresses_that_cannot_be(address):
    with pytest.raises(UsageError):
        TreePlace(address)


@pytest.mark.parametrize(
    ("protocol", "module", "hint"),
    [("s3", "s3fs", "pip install 'poolreg[s3]'"), ("gs", "gcsfs", "gcsfs")],
)
def test_missing_package(monkeypatch, protocol, module, hint):
    from fsspec.registry import _registry

    monkeypatch.delitem(_registry, protocol, raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackage) as caught:
        TreePlace(f"{protocol}://bucket/pool")
    assert hint in caught.value.hint


def test_passwords_stay_out_of_messages():
    with pytest.raises(UsageError) as caught:
        TreePlace("zzz://me:secret@host/pool")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("memory://me:secret@host/pool", "memory://host/pool"),
        ("memory://me:sec@ret@host/pool", "memory://host/pool"),
        ("memory://secret@host/pool", "memory://host/pool"),
        ("file:///b@c/pool", "file:///b@c/pool"), ("memory://b/c@d", "memory://b/c@d"),
    ],
)  # fmt: skip
def test_an_address_is_shown_without_a_password(address, shown):
    place = TreePlace(address)
    assert place.url == shown
    assert "ret@" not in place.alias


class Guarded(MemoryFileSystem):
    """What is at guarded://USER:PASSWORD@HOST, as drivers show it: also in their messages."""

    protocol = "guarded"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    broken = False

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("guarded://").rpartition("@")[2].strip("/")

    @staticmethod
    def _get_kwargs_from_urls(path):
        assert ":secret@" in path
        return {}

    def find(self, *words, **options):
        if self.broken:
            raise OSError("cannot reach guarded://me:secret@host/pool for me")
        return super().find(*words, **options)


def test_a_password_goes_nowhere(pool, tmp_path, monkeypatch, cli_run):
    """Not into what is published, the card's examples among it, nor into records and messages."""
    fsspec.register_implementation("guarded", Guarded, clobber=True)
    url = "guarded://me:secret@host/pool"
    done = pool.push(url)
    assert done.place == "guarded://host/pool"
    assert "guarded://host/pool" in Guarded.store["/host/pool/README.md"].getvalue().decode()
    for path, file in Guarded.store.items():
        data = file.getvalue()
        assert b"secret" not in data, path
        if path.endswith(".parquet"):
            assert "secret" not in str(pq.read_table(io.BytesIO(data)).to_pylist())
    with Pool.create(tmp_path / "other") as other:
        assert other.pull(url).place == "guarded://host/pool"
        for one in (pool, other):
            assert [row[0] for row in one.sql("SELECT place FROM transfers").rows] == [done.place]
            assert not any(
                b"secret" in path.read_bytes() for path in (one.root / "journal").iterdir()
            )
    pool.close()
    words = ("--pool", pool.root, "push")
    assert "secret" not in cli_run(*words, url).stderr
    assert "secret" not in cli_run(*words, url, "--repo-type", "dataset", code=2).stderr
    monkeypatch.setattr(Guarded, "broken", True)
    said = cli_run(*words, url, code=1).stderr
    assert "cannot reach guarded://host/pool for me" in said
    assert "secret" not in said
    Guarded.store.clear()


def test_file_systems_that_only_read(tmp_path, monkeypatch):
    place = TreePlace("memory://some/pool")
    (item,) = outgoing(tmp_path / "in", {"a": b"a"})

    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(place._tree._system, "put_file", refuse)
    with pytest.raises(UsageError, match="NotImplementedError"):
        publish(place, [item])


def test_no_bucket(s3, tmp_path):
    place = TreePlace("s3://no-such-bucket-here/pool")
    with pytest.raises(NotFound, match="bucket does not exist"):
        place.look()
    with pytest.raises(NotFound, match="bucket does not exist"):
        publish(place, outgoing(tmp_path / "in", {MARKER: MARK}))
    with pytest.raises(UsageError, match="Invalid bucket name"):
        TreePlace("s3://No Bucket!/pool").look()


def test_neighbours_in_a_bucket(s3, tmp_path):
    """A prefix ends with a slash: pool2 is not in pool."""
    for name in ("", "2", "/deeper"):
        publish(TreePlace(s3 + name), outgoing(tmp_path / "in", {MARKER: MARK, "a": name.encode()}))
    found = everything(TreePlace(s3), tmp_path / "out")
    assert found == {MARKER: MARK, "a": b"", "deeper/poolreg.json": MARK, "deeper/a": b"/deeper"}


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9", "Could not connect"),
        ("AWS_ENDPOINT_URL", "nonsense", "Invalid endpoint"),
        ("AWS_ACCESS_KEY_ID", None, "credentials"),
        ("AWS_PROFILE", "none", "profile"),
    ],
)
def test_s3_that_is_not_set_up(s3, monkeypatch, variable, value, said):
    if value is None:
        monkeypatch.delenv(variable)
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    else:
        monkeypatch.setenv(variable, value)
    with pytest.raises((StorageError, UsageError), match=said) as caught:
        TreePlace(s3).look()
    assert caught.value.hint


def test_denied(s3, monkeypatch):
    from s3fs.errors import translate_boto_error

    botocore = pytest.importorskip("botocore.exceptions")
    answer = {"Error": {"Code": "AccessDenied", "Message": "Access \x1b[31mDenied"}}
    place = TreePlace(s3)

    def deny(*_: object, **__: object) -> None:
        raise translate_boto_error(botocore.ClientError(answer, "ListObjectsV2"))

    monkeypatch.setattr(place._tree._system, "find", deny)
    with pytest.raises(StorageError, match="Denied") as caught:
        place.look()
    assert "credentials" in caught.value.hint
    assert "\x1b" not in str(caught.value)
