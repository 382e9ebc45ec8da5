"""Published pools that lie: refused or neutralised, nothing outside touched, the pool unchanged.

One honest pool is published on the loopback Hub. Each test publishes it again with something
changed by a stranger who knows the format, and pulls that into a folder that is no pool yet and
into a pool that exists.
"""

from __future__ import annotations

import binascii
import contextlib
import hashlib
import json
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pools
import pytest
from hub import Blob, Hub, Repo
from hypothesis import given, settings
from hypothesis import strategies as st

from poolreg import Pool
from poolreg.canonical import canonical_json, digest_of, sha256
from poolreg.errors import PoolregError, Refused
from poolreg.sharing import inbound
from poolreg.sharing.places import object_path, segment_path
from poolreg.store import records
from poolreg.store.journal import Record
from poolreg.tensors import write_file

AT = "2026-01-02T03:04:05.000006Z"
ESCAPES = "\x1b[2J\x1b]0;owned\x07\u202e<script>alert(1)</script>"
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]")
NOWHERE = "ab" * 32  # a digest of nothing

Changes = Mapping[str, Any]  # what a repository holds at a path; None: nothing


# -- forging ---------------------------------------------------------------------------------


def forged(record: Record, *, at: str | None = None, objects: Any = None, **body: Any) -> Record:
    """Change a record, and give it the id that follows, as a stranger who knows the rules would."""
    made = replace(record, at=at or record.at, objects={**record.objects, **(objects or {})})
    made = replace(made, body={**made.body, **body}) if body else made
    identity = inbound._IDENTITY.get(record.kind, inbound._of_content)
    try:
        return replace(made, id=identity(made) or record.id)
    except (PoolregError, LookupError, TypeError, AttributeError, ValueError, ArithmeticError):
        return made


def naming(space: str, name: Any, target: str, parent: Any = None, at: str = AT) -> Record:
    body = {"space": space, "name": name, "target": target, "parent": parent}
    return Record("name", digest_of({"kind": "name", "body": body, "at": at}), body, {}, at)


def removal(kind: Any, target: str, at: str = AT, **more: Any) -> Record:
    body = {"kind": kind, "target": target, "removed": True, **more}
    return Record("removal", digest_of({"kind": "removal", "body": body, "at": at}), body, {}, at)


def line(data: bytes) -> bytes:
    """Return a journal line of any bytes, with the checksum that is right for them."""
    return b"%08x %s\n" % (binascii.crc32(data), data)


def spelled(record: Record, old: str, new: str) -> bytes:
    """Return a record's line with its JSON spelled another way."""
    data = record.line().split(b" ", 1)[1][:-1].decode()
    assert old in data
    return line(data.replace(old, new).encode(errors="surrogatepass"))


def segment(*lines: Record | bytes) -> dict[str, bytes]:
    data = b"".join(part if isinstance(part, bytes) else part.line() for part in lines)
    return {segment_path(sha256(data)): data}


def stored(data: bytes) -> dict[str, bytes]:
    return {object_path(sha256(data)): data}


# -- what was published, and what a stranger makes of it -------------------------------------


class Published:
    """An honest pool on a Hub; `repo` publishes it again with changes."""

    def __init__(self, hub: Hub, root: Path) -> None:
        self.hub = hub
        self.root = root
        with Pool.open(root) as pool:
            pool.push("me/honest")
            self.records = list(pool.registry.journal.all())
            self.names = {
                space: pool.registry.names(space) for space in ("model", "partition", "evalset")
            }
            self.weights = pool.model("base")["files"]
        self.tree = hub.tree("me/honest")
        self.segments = {path: None for path in self.tree if path.startswith("journal/")}
        self.count = 0

    def repo(self, changes: Changes) -> str:
        self.count += 1
        name = f"stranger/pool-{self.count}"
        made = self.hub.repos["model", name] = Repo("model", name)
        made.uploads = self.hub.repo("me/honest").uploads
        made.commit("main", self.tree, "honest")
        self.hub.commit_files(name, changes)
        return name

    def kind(self, kind: str) -> list[Record]:
        return [record for record in self.records if record.kind == kind]

    def model(self, name: str = "base") -> Record:
        return next(r for r in self.kind("model") if r.id == self.names["model"][name])

    def file(self, name: str) -> dict[str, Any]:
        return next(file for file in self.weights if file["name"] == name)

    def rewritten(self, change: Callable[[Record], Record | None]) -> dict[str, Any]:
        """Return a journal of all honest records, each changed (None: left out)."""
        staying = ("location", "transfer")
        changed = [change(r) for r in self.records if r.kind not in staying]
        return {**self.segments, **segment(*filter(None, changed))}


@pytest.fixture(scope="module")
def published(tiny, tmp_path_factory) -> Iterator[Published]:
    base = tmp_path_factory.mktemp("published")
    root = tiny.copy(base / "pool")
    with pytest.MonkeyPatch.context() as patch, Hub(base / "hub") as hub, Pool.open(root) as pool:
        hub.adopt(patch)
        pool.ask(["alpha+beta", "all"])
        pool.keep_merge("alpha+beta", "kept")
        results = {"results": {"task": {"acc,none": 0.5, "alias": "task"}}, "config": {}}
        (base / "results_1.json").write_text(json.dumps(results))
        pool.import_scores(base / "results_1.json", "base")
        pool.registry.record(records.removal("evalset", NOWHERE, removed=False))
        yield Published(hub, root)


@pytest.fixture(scope="module")
def present(tmp_path_factory) -> Path:
    """A pool with names and results of its own; never change it."""
    base = tmp_path_factory.mktemp("present")
    texts = pools.write_texts(base / "texts", ["delta", "gamma"])
    with Pool.create(base / "pool") as pool:
        pools.add_data(pool, texts, {"delta": 1})
        pool.add_evalset("alpha", [texts / "gamma.held.jsonl"])  # something else is alpha there
        pool.add_model(
            pools.model_folder(base / "other", "qwen2", seed=5), name="base", role="seed"
        )
    return base / "pool"


# -- what must not change --------------------------------------------------------------------


def everything(folder: Path) -> dict[str, str]:
    """Return what lies below a folder: bytes of files, targets of links; no catalogs, no locks."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = str(path.readlink())
        elif path.is_file() and path.name != "catalog.duckdb" and path.parent.name != "locks":
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.is_dir():
            found[str(path)] = "folder"
    return found


def check_said(text: str, words: str) -> None:
    """Check an error as the command line tells it."""
    assert not CONTROL.search(text), text
    assert len(text) < 2000
    assert "Traceback" not in text
    assert "a bug in poolreg" not in text
    what, _, hint = text.partition("\n")
    assert what.startswith("error: "), text
    assert len(hint.strip()) > 10  # the way out
    assert words in what


@pytest.fixture
def attack(published, present, cli_run, tmp_path):
    """Publish changes and check that an empty folder or a pool refuses them, unchanged."""
    base = tmp_path / "below"
    base.mkdir(exist_ok=True)
    shutil.copytree(present, base / "mine")
    (base / "canary").mkdir(exist_ok=True)
    (base / "canary" / "x").write_text("untouched")
    with Pool.open(base / "mine") as pool:
        pool.models()  # so that the catalog is there

    def refused(
        changes: Changes, words: str, *args: str, code: int = 1, kept: bool = False
    ) -> None:
        repo = published.repo(changes)
        before, home = everything(tmp_path), sorted(Path.home().iterdir())
        # Into an empty folder, or into a pool: each case takes one of the two.
        for folder in [base / ("new" if len(words) % 2 else "mine")]:
            said = cli_run("pull", repo, folder, *args, code=code)
            check_said(said.stderr, words)
            if kept:  # what has arrived is there for the next try
                for staging in (folder / "tmp").glob("incoming-*"):
                    shutil.rmtree(staging)
            if kept and folder.name == "new":
                shutil.rmtree(folder)
            assert everything(tmp_path) == before
        assert sorted(Path.home().iterdir()) == home

    return refused


@pytest.fixture
def taken(published, present, cli_run, tmp_path):
    """Publish changes, pull them into a new pool or a copy of one, and see that it works."""
    base = tmp_path / "below"
    (base / "canary").mkdir(parents=True, exist_ok=True)
    (base / "canary" / "x").write_text("untouched")

    def pulled(changes: Changes, *args: str, into: Path | None = None, check: bool = True) -> Path:
        root = base / f"pool-{published.count}"
        if into is not None:
            shutil.copytree(into, root)
        repo = published.repo(changes)
        before = {path: it for path, it in everything(tmp_path).items() if str(root) not in path}
        cli_run("pull", repo, root, *args)
        after = {path: it for path, it in everything(tmp_path).items() if str(root) not in path}
        assert after == before
        assert not list((root / "tmp").iterdir())
        if check:
            usable(root, cli_run, asks=into is None or into == published.root)
        return root

    return pulled


def usable(root: Path, cli_run: Any, *, asks: bool = True, thorough: bool = False) -> None:
    """Check that whatever a pool took, everything that reads a pool still reads this one."""
    for words in (["ls"], ["scores", "ls"], ["verify"]):
        said = cli_run("--pool", root, *words, code=None)
        assert said.exit_code in (0, 3), said.output
        assert not CONTROL.search(said.stdout + said.stderr)
    with Pool.open(root) as pool:
        if asks:
            assert all(answer.memoised for answer in pool.ask(["alpha+beta", "all"]))
        if not thorough:
            return
        page = pool.report_page()
        assert not (found := CONTROL.search(page)), page[found.start() - 100 : found.end() + 50]
        assert "<script>alert" not in page
        for view in ("subjects", "scores", "measures", "lineage", "variant_list", "task_results"):
            pool.sql(f"FROM {view}")
        # What was taken can be given on.
        again = (root.parent / f"{root.name}-again").as_uri()
        pool.push(again)
    with Pool.create(root.parent / f"{root.name}-third") as other:
        other.pull(again, results_only=True)


# -- bytes -----------------------------------------------------------------------------------


def flipped(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


def bytes_of(published: Published, name: str) -> tuple[str, str, bytes]:
    digest = published.file(name)["object"]
    path = object_path(digest)
    return digest, path, published.hub.content("me/honest", path)


BYTES = {
    "other bytes of the right size": (
        lambda _, data: Blob(flipped(data)), "is not what its name says"),
    "other bytes under the right sha256": (
        lambda digest, data: Blob(flipped(data), lfs_sha256=digest), "does not hold the bytes"),
    "cut": (lambda _, data: data[:-1], "is not what its name says"),
    "cut under the right sha256": (
        lambda digest, data: Blob(data[:-1], lfs_sha256=digest), "is not what its name says"),
    "cut under the right sha256 and size": (
        lambda digest, data: Blob(data[:-1], digest, len(data)), "does not hold the bytes"),
    "10 MB in place of a few": (
        lambda digest, data: Blob(bytes(10_000_000), digest, len(data)), "does not hold the bytes"),
    "10 MB that are said": (
        lambda digest, __: Blob(bytes(10_000_000), digest), "is not what its name says"),
    "a link, as git stores it": (
        lambda _, __: b"../../../../../../etc/passwd", "is not what its name says"),
    "nothing": (lambda _, __: b"", "is not what its name says"),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", ["model.safetensors", pytest.param("config.json", marks=pytest.mark.campaign)]
)
@pytest.mark.parametrize("case", BYTES)
def test_objects_are_what_their_digests_say(published, attack, case, name):
    change, words = BYTES[case]
    digest, path, data = bytes_of(published, name)
    attack({path: change(digest, data)}, words)


@pytest.mark.parametrize("case", ["other", "longer line"])
def test_segments_are_what_their_digests_say(published, attack, case):
    (path,) = published.segments
    data = published.hub.content("me/honest", path)
    made = {
        "other": Blob(flipped(data), lfs_sha256=Path(path).stem),
        "longer line": data.replace(b"\n", b" \n"),
    }
    attack({path: made[case]}, "does not hold the bytes that its name promises")


@pytest.mark.parametrize("mark", [
    b'{"format":2}', b'{"format": 1}', b"", b"null", b"[" * 4000, b"\xff\xfe", b"../poolreg.json",
    Blob(b'{"format":1}', size=1 << 30), b'{"format":1}' + b" " * 5000,
])  # fmt: skip
def test_a_mark_of_another_form(attack, mark):
    attack({"poolreg.json": mark}, "is published in a form that this poolreg does not know")


def test_no_mark(attack):
    attack({"poolreg.json": None}, "holds no pool")


def test_a_size_that_no_disk_holds(published, attack):
    digest, path, data = bytes_of(published, "model.safetensors")
    huge = 1 << 45

    def change(record: Record) -> Record:
        files = [
            {**file, "bytes": huge} if file["object"] == digest else file
            for file in record.body.get("files", [])
        ]
        if record.kind != "model" or digest not in record.objects:
            return record
        return forged(record, files=files, objects={digest: huge})

    changes = {path: Blob(data, digest, huge), **published.rewritten(change)}
    attack(changes, "bytes are to be written, and", kept=True)


def test_records_that_disagree_on_a_size(published, attack):
    mine = published.kind("evaluation")[0]
    digest = published.file("config.json")["object"]
    attack(segment(forged(mine, objects={digest: 10})), "disagree on the size of")


def test_a_journal_larger_than_any(attack):
    attack({segment_path(NOWHERE): Blob(b"x", NOWHERE, 1 << 40)}, "is larger than 4 GiB")


# -- paths -----------------------------------------------------------------------------------

PATHS = [
    "../../x", "/etc/x", "/tmp/x", "C:\\x", "C:/x", "\\\\host\\x", "//host/x", "objects/ab/../../../x",
    "objects/../x", "objects/..", "objects/AB/" + "C" * 62, "objects/ab/" + "C" * 62,
    "objects/ab/" + "c" * 61, "objects/ab/" + "c" * 63, "objects/ab/" + "c" * 62 + "/x",
    "objects/ab/" + "c" * 62 + "\n", "journal/../x.jsonl", "journal/" + "a" * 63 + ".jsonl",
    "journal/" + "A" * 64 + ".jsonl", "journal/" + "a" * 64 + ".jsonl/x", "journal/x.jsonl",
    "journal/\x1b[2J.jsonl", "nul", "CON", "~/x", "$HOME/x", "a\0b", "x" * 3000,
    "./poolreg.json", "tables/../../x", "models/base/../../../x", "\u202ex",
]  # fmt: skip
EXTRAS = {
    "catalog.duckdb": b"not a catalog", "FORMAT": b'{"format":1,"id":"theirs"}', "tmp/x": b"x",
    "locks/catalog": b"x", "locks/writers": b"x", "config.json": b'{"auto_map": {}}',
    "journal.jsonl": b"x", "pytorch_model.bin": pickle.dumps(print), "poolreg.py": b"1/0",
    "tmp/incoming/objects/ab/" + "c" * 62: b"x", "sitecustomize.py": b"1/0",
    ".huggingface/x": b"x", ".cache/huggingface/x": b"x",
}  # fmt: skip


def test_files_that_no_pool_has_are_never_opened(published, taken):
    published.hub.clear()
    root = taken({**dict.fromkeys(PATHS, b"evil"), **EXTRAS}, "--results-only")
    asked = [r.path for r in published.hub.requests if "/resolve/" in r.path]
    wanted = re.compile(r".*/(poolreg\.json|objects/../[0-9a-f]{62}|journal/[0-9a-f]{64}\.jsonl)")
    assert asked
    assert all(wanted.fullmatch(path) for path in asked)
    names = {path.name for path in root.iterdir()}
    assert names == {"FORMAT", "catalog.duckdb", "journal", "locks", "objects", "tmp"}
    assert b"theirs" not in (root / "FORMAT").read_bytes()
    assert (root / "catalog.duckdb").stat().st_size > 10_000


def test_links_in_a_folder_lead_nowhere(published, tmp_path):
    """A published folder whose objects, journal and mark are links to files outside of it."""
    (tmp_path / "secret").write_bytes(secret := b"only for me")
    folder = tmp_path / "shared"
    with Pool.open(published.root) as pool:
        pool.push(folder.as_uri())
    place = folder / object_path(published.file("model.safetensors")["object"])
    place.unlink()
    place.symlink_to(tmp_path / "secret")
    (folder / segment_path(sha256(secret))).symlink_to(tmp_path / "secret")
    (folder / "objects/ff/loop").parent.mkdir(exist_ok=True)
    (folder / "objects/ff/loop").symlink_to(folder)
    with Pool.create(tmp_path / "new") as pool:
        assert pool.pull(folder.as_uri()).absent == 1
    assert secret not in b"".join(
        path.read_bytes() for path in (tmp_path / "new").rglob("*") if path.is_file()
    )
    (folder / "poolreg.json").unlink()
    (folder / "poolreg.json").symlink_to(tmp_path / "secret")
    with Pool.create(tmp_path / "other") as pool, pytest.raises(PoolregError) as caught:
        pool.pull(folder.as_uri())
    assert "only for me" not in str(caught.value)


# -- lines of the journal --------------------------------------------------------------------


def evaluation(published: Published) -> Record:
    return published.kind("evaluation")[0]


def with_float(record: Record, field: str, text: str) -> bytes:
    return spelled(forged(record, **{field: 123456}), f'"{field}":123456', f'"{field}":{text}')


LINES: dict[str, tuple[Callable[[Record], bytes], str]] = {
    "a bad checksum": (lambda r: flipped(r.line()), "does not match its checksum"),
    "no checksum": (lambda r: r.line()[9:], "does not match its checksum"),
    "a torn end": (lambda r: r.line()[:-1], "ends in the middle of a line"),
    "torn in the middle": (lambda r: r.line() + r.line()[:40], "ends in the middle of a line"),
    "an empty line": (lambda r: b"\n" + r.line(), "does not match its checksum"),
    "not JSON": (lambda _: line(b"not JSON"), "is not a record"),
    "not UTF-8": (lambda _: line(b'"\xff"'), "is not a record"),
    "a pickle": (lambda _: line(pickle.dumps([print])), ""),
    "a number": (lambda _: line(b"7"), "is not a record"),
    "a list": (lambda _: line(b"[]"), "is not a record"),
    "nothing in it": (lambda _: line(b"{}"), "is not a record"),
    "deep nesting": (lambda _: line(b"[" * 1_000_000), "is not a record"),
    "deep nesting in a field": (
        lambda r: forged(r, more=json.loads("[" * 400 + "]" * 400)).line(), "cannot be written again"),
    "wrong fields": (
        lambda r: spelled(r, '"at":"', '"at":7,"x":"'), "fields have the wrong types"),
    "objects in a list": (
        lambda r: line(canonical_json(json.loads(r.line()[9:]) | {"objects": []})),
        "fields have the wrong types"),
    "an unknown kind": (lambda r: replace(r, kind="weights\x1b[2J").line(), "does not know"),
    "a giant kind": (lambda r: replace(r, kind="k" * 10_000_000).line(), "does not know"),
    "an unknown version": (lambda r: spelled(r, '"v":1', '"v":2'), "of format 2"),
    "a giant version": (
        lambda r: spelled(r, '"v":1', '"v":"' + "\\u001b" * 100_000 + '"'), "of format"),
    "an id of another": (lambda r: replace(r, id=NOWHERE).line(), "does not say what its id says"),
    "an id that is none": (lambda r: replace(r, id="../../x").line(), "no digest as its id"),
    "a far future": (
        lambda r: replace(r, at="9999-01-01T00:00:00.000000Z").line(), "in the future"),
    "no time": (lambda r: replace(r, at="").line(), "no time"),
    "a time in other words": (lambda r: replace(r, at="yesterday").line(), "no time"),
    "a month that is none": (
        lambda r: replace(r, at="2025-13-45T99:99:99.000000Z").line(), "no time"),
    "a time in other digits": (
        lambda r: replace(r, at="٢٠٢٥-01-01T00:00:00.000000Z").line(), "no time"),
    "an object that is none": (lambda r: replace(r, objects={"../x": 1}).line(), "cannot be"),
    "an object of negative size": (
        lambda r: replace(r, objects={NOWHERE: -1}).line(), "cannot be"),
    "an object of 2**70 bytes": (
        lambda r: replace(r, objects={NOWHERE: 2**70}).line(), "cannot be"),
    "an object of half a byte": (lambda r: replace(r, objects={NOWHERE: 0.5}).line(), "cannot be"),
    "NaN": (lambda r: with_float(r, "nll", "NaN"), "is not a record"),
    "infinity": (lambda r: with_float(r, "nll", "-Infinity"), "is not a record"),
    "a number beyond floats": (lambda r: with_float(r, "nll", "1e999"), "cannot be written again"),
    "a fraction for a count": (lambda r: with_float(r, "tokens", "1.5"), "mistypes tokens"),
    "a float for a count": (lambda r: with_float(r, "tokens", "12.0"), "mistypes tokens"),
    "2**70": (lambda r: with_float(r, "tokens", str(2**70)), "mistypes tokens"),
    "5,000 digits": (lambda r: with_float(r, "tokens", "1" * 5000), "is not a record"),
    "a negative size": (lambda r: with_float(r, "bytes", "-1"), "mistypes bytes"),
    "a truth for a count": (lambda r: with_float(r, "tokens", "true"), "mistypes tokens"),
    "a lone surrogate": (
        lambda r: spelled(forged(r, device="DEVICE"), "DEVICE", "\\ud800"), "cannot be written again"),
    "a raw surrogate": (
        lambda r: spelled(forged(r, device="DEVICE"), "DEVICE", "\ud800"), "cannot be written again"),
    "NaN where nobody looks": (
        lambda r: spelled(forged(r, more=123456), "123456", "NaN"), "is not a record"),
}  # fmt: skip


@pytest.mark.parametrize("case", LINES)
def test_a_line_that_does_not_hold(published, tmp_path, case):
    make, words = LINES[case]
    record = forged(evaluation(published), subject=NOWHERE)  # one that is new to any pool
    refused_alone(make(record), tmp_path, words)


@pytest.mark.parametrize("case", [
    "a bad checksum", "a torn end", "not UTF-8", "deep nesting", "wrong fields", "an unknown kind",
    "a giant version", "an id of another", "2**70", "NaN", "a lone surrogate",
])  # fmt: skip
def test_a_line_that_does_not_hold_through_a_whole_pull(published, attack, case):
    make, words = LINES[case]
    record = forged(evaluation(published), subject=NOWHERE)
    attack(segment(published.records[0], make(record)), words)


def test_a_line_longer_than_any(published, attack, monkeypatch):
    monkeypatch.setattr("poolreg.store.journal.MAX_LINE", 1 << 17)
    record = forged(evaluation(published), subject=NOWHERE, more="x" * (1 << 17))
    attack(segment(record), "a line is longer than 64 MiB")


def test_a_line_that_grows_when_it_is_written_again(published, attack, monkeypatch):
    """Short spellings of numbers become long ones; the journal must hold lines below its limit."""
    monkeypatch.setattr("poolreg.store.journal.MAX_LINE", 1 << 17)
    record = forged(evaluation(published), subject=NOWHERE, more=123456)
    many = "[" + ",".join(["1e15"] * (1 << 14)) + "]"
    attack(segment(spelled(record, "123456", many)), "longer than 64 MiB")


# -- names -----------------------------------------------------------------------------------

NAMES = [
    "\x1b[31mred", "two\nlines", "..", ".", "../x", "a/../b", "x/y/z", "/x", "x/", "", " ", "all",
    "all-x", "hub/all", "7", "0.5", "1e5", "x" * 300, "hub/" + "x" * 101, "a+b", "2*a", "a\0b",
    "e\u0301", "\u202ex", "-rf", 7, None, ["x"], {"x": 1}, True, "C:\\x", "$(id)", "<script>",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=repr)
@pytest.mark.parametrize("space", ["model", "partition", "evalset"])
def test_names_outside_the_rule(published, space, name, tmp_path):
    target = next(iter(published.names[space].values()))
    refused_alone(naming(space, name, target), tmp_path)
    if name is not None:
        refused_alone(naming(space, "fine", target, parent=name), tmp_path)


@pytest.mark.parametrize("record", [
    naming("weights", "x", NOWHERE), naming(["model"], "x", NOWHERE), naming("model", "x", "../x"),
    naming("model", "x", 7), naming("model", "x", NOWHERE.upper()), removal("name", NOWHERE),
    removal(["model"], NOWHERE, space="model"), removal({"a": 1}, NOWHERE), removal("model", None),
    removal("model", NOWHERE, removed="yes"), removal("model", NOWHERE, removed=None),
], ids=repr)  # fmt: skip
def test_statements_about_nothing(record, tmp_path):
    refused_alone(record, tmp_path)


def refused_alone(record: Record | bytes, folder: Path, words: str = "") -> None:
    """Check that a segment of one record is refused; what pulls of it do is shown elsewhere."""
    with pytest.raises(PoolregError) as caught:
        read_alone(record, folder)
    check_said(f"error: {caught.value}", words)


def read_alone(record: Record | bytes, folder: Path) -> list[Record]:
    ((path, data),) = segment(record).items()
    file = folder / Path(path).name
    file.write_bytes(data)
    return list(inbound.read_segment(file, file.stem))


def test_a_refused_name_through_a_whole_pull(published, attack):
    target = published.names["model"]["base"]
    attack(segment(naming("model", ESCAPES, target)), "cannot be a name")


def test_parents_in_a_circle(published, attack):
    target = published.names["partition"]
    attack(
        segment(naming("partition", "one", target["alpha"], "two"),
                naming("partition", "two", target["beta"], "one")),
        "form a circle",
    )  # fmt: skip


# -- models ----------------------------------------------------------------------------------


def with_file(published: Published, name: str, data: bytes, **body: Any) -> dict[str, Any]:
    """Return the changes by which a file of the model `base` holds other bytes everywhere."""
    model, old = published.model(), published.file(name)["object"]
    digest = sha256(data)

    def change(record: Record) -> Record:
        if record.id != model.id or record.kind != "model":
            return record
        files = [
            {**file, "object": digest, "bytes": len(data)} if file["object"] == old else file
            for file in record.body["files"]
        ]
        return forged(record, files=files, objects={digest: len(data)}, **body)

    return {**published.rewritten(change), **stored(data)}


def safetensors(header: Any, payload: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + payload


def tensor(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


WEIGHTS = {
    "a header of 1 GB": ((1 << 30).to_bytes(8, "little") + b"{" * 1000, "announces a header of"),
    "a header of 2**63": ((1 << 63).to_bytes(8, "little") + b"{}", "announces a header of"),
    "overlapping tensors": (
        safetensors({"a": tensor("F32", [2], 0, 8), "b": tensor("F32", [2], 4, 12)}, bytes(12)),
        "can be trusted: tensor"),
    "a hole": (safetensors({"a": tensor("F32", [1], 4, 8)}, bytes(8)), "can be trusted: tensor"),
    "a shape of 2**60": (
        safetensors({"a": tensor("F32", [1 << 60], 0, 8)}, bytes(8)), "can be trusted: tensor"),
    "a pickle": (pickle.dumps({"a": print}, protocol=4), "announces a header of"),
    "a zip, as torch writes it": (b"PK\x03\x04" + bytes(100), "model.safetensors"),
    "nothing": (b"", "too short"),
    "tensors that are none of its own": (
        safetensors({"a": tensor("F32", [1], 0, 4)}, bytes(4)), "are not the model"),
    "not finite values": (
        safetensors({"a": tensor("F32", [1], 0, 4)}, b"\x00\x00\xc0\x7f"), "NaN or infinite"),
    "a name that moves the cursor": (
        safetensors({"\x1b[2J": tensor("F32", [2], 0, 4)}, bytes(4)), "can be trusted: tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_that_are_none(published, attack, case):
    data, words = WEIGHTS[case]
    attack(with_file(published, "model.safetensors", data), words)


def test_weights_with_one_value_that_is_not_finite(published, attack, tiny, tmp_path):
    arrays = pools.arrays_of(tiny.seed)
    name, (dtype, raw) = next(iter(arrays.items()))
    raw = raw.copy()
    raw.flat[-1] = float("inf")
    write_file(tmp_path / "x.safetensors", arrays | {name: (dtype, raw)}, {"format": "pt"})
    attack(
        with_file(published, "model.safetensors", (tmp_path / "x.safetensors").read_bytes()),
        "NaN or infinite",
    )


def config(published: Published, **more: Any) -> bytes:
    _, _, data = bytes_of(published, "config.json")
    return json.dumps({**json.loads(data), **more}).encode()


def test_a_configuration_that_runs_code(published, attack, taken, cli_run):
    """Whatever the record says, nobody's code runs because a stranger allowed it to himself."""
    hostile = config(published, auto_map={"AutoModelForCausalLM": "evil.Model"})
    changes = with_file(published, "config.json", hostile, trusted_code=True)
    attack(changes, "code")
    root = taken(changes, "--results-only")
    with Pool.open(root) as pool:
        assert not any(row["trusted_code"] for row in pool.sql("FROM models").dicts())
    # The weights brought later are checked then.
    said = cli_run("--pool", root, "pull", "--only", "base", code=1)
    check_said(said.stderr, "code")
    with Pool.open(root) as pool:
        assert not pool.registry.objects.has(published.file("model.safetensors")["object"])


def more_files(published: Published, *files: tuple[str, str, bytes], **body: Any) -> dict[str, Any]:
    """Return the changes by which the model `base` has more files."""
    model = published.model()
    entries = [
        {"role": role, "name": name, "object": sha256(data), "bytes": len(data)}
        for role, name, data in files
    ]
    sizes = {sha256(data): len(data) for _, _, data in files}
    changes: dict[str, Any] = {}
    for _, _, data in files:
        changes |= stored(data)

    def change(record: Record) -> Record:
        if record.id != model.id or record.kind != "model":
            return record
        return forged(record, files=[*record.body["files"], *entries], objects=sizes, **body)

    return published.rewritten(change) | changes


@pytest.mark.parametrize(("role", "name", "words"), [
    ("code", "modeling_evil.py", "brings Python code of its author"),
    ("config", "modeling_evil.py", "are not the model that its record describes"),
    ("weights", "pytorch_model.bin", "are not the model that its record describes"),
    ("weights", "model-2.safetensors", ""), ("tokenizer", "evil.json", "are not the model"),
    ("config", "adapter_config.json", "adapter"), ("index", "model.safetensors.index.json", ""),
])  # fmt: skip
def test_models_with_more_files_than_they_have(published, attack, role, name, words):
    attack(more_files(published, (role, name, b"import os"), trusted_code=True), words)


@pytest.mark.parametrize("name", [
    "../config.json", "/etc/passwd", "a/b", "..", ".", "", "C:\\x", "\\\\host\\x", "c:x", "a\0b",
    "\x1b[2J", "config.json\n", "config.json", "x" * 3000,
])  # fmt: skip
def test_files_of_models_with_names_that_lead_elsewhere(published, name, tmp_path):
    model = published.model()
    file = {"role": "config", "name": name, "object": sha256(b"{}"), "bytes": 2}
    files = [*model.body["files"], file]
    refused_alone(forged(model, files=files, objects={sha256(b"{}"): 2}), tmp_path)


def test_a_file_of_a_model_that_leads_out_of_it(published, attack):
    attack(more_files(published, ("config", "../config.json", b"{}")), "is not a file name")


FACTS = {
    "parameters": 1, "bytes": 1, "dtype": "F16", "tokenizer": NOWHERE, "context_length": 7,
    "vocab_size": 7, "model_type": "gpt2", "tensors": [],
}  # fmt: skip


@pytest.mark.parametrize("field", FACTS)
def test_facts_of_models_that_their_files_do_not_bear_out(published, attack, field):
    model = published.model()
    attack(
        published.rewritten(lambda r: forged(r, **{field: FACTS[field]}) if r == model else r),
        "are not the model that its record describes",
    )


def test_a_model_under_the_digest_of_another(published, attack):
    one, other = published.model("base"), published.model("kept")

    def change(record: Record) -> Record:
        return replace(one, id=other.id, at=AT) if record == other else record

    attack(published.rewritten(change), "are not the model that its record describes")


def test_another_tokenizer(published, attack, tmp_path):
    folder = pools.tokenizer_folder(tmp_path / "tokenizer", pools.MERGES[:3])
    data = (folder / "tokenizer.json").read_bytes()
    attack(with_file(published, "tokenizer.json", data), "model")
    shutil.rmtree(folder)


@pytest.mark.parametrize("first", [True, False])
def test_two_records_of_one_model(published, attack, first):
    """The record that is checked is the one that counts in the pool, whichever is read first."""
    model = published.model()
    evil = b"import os"
    file = {"role": "config", "name": "evil.py", "object": sha256(evil), "bytes": len(evil)}
    earlier = forged(
        model, at="2020-01-01T00:00:00.000000Z", files=[*model.body["files"], file],
        objects={sha256(evil): len(evil)},
    )  # fmt: skip
    rest = [r for r in published.records if r.kind not in ("location", "transfer") and r != model]
    both = [earlier, model] if first else [model, earlier]
    changes = {**published.segments, **segment(*rest, *both), **stored(evil)}
    attack(changes, "are not the model that its record describes")


# -- evalsets and builds ---------------------------------------------------------------------


def test_an_evalset_with_another_text(published, attack):
    other = b'"another text"\n'

    def change(record: Record) -> Record:
        if record.kind != "evalset":
            return record
        return forged(record, object=sha256(other), objects={sha256(other): len(other)})

    attack(published.rewritten(change) | stored(other), "is not the one that its digest names")


@pytest.mark.parametrize("first", [True, False])
def test_two_records_of_one_evalset(published, attack, first):
    other = b'"another text"\n'
    honest = published.kind("evalset")[0]
    earlier = forged(
        honest, at="2020-01-01T00:00:00.000000Z", object=sha256(other),
        objects={sha256(other): len(other)},
    )  # fmt: skip
    rest = [r for r in published.records if r.kind not in ("location", "transfer") and r != honest]
    both = [earlier, honest] if first else [honest, earlier]
    changes = {**published.segments, **segment(*rest, *both), **stored(other)}
    attack(changes, "is not the one that its digest names")


def test_a_text_that_comes_after_its_record(published, taken, cli_run):
    """What a place did not hold at first is checked when it comes."""
    other = b'"another text"\n'

    def change(record: Record) -> Record:
        if record.kind != "evalset":
            return record
        return forged(record, object=sha256(other), objects={sha256(other): len(other)})

    root = taken(published.rewritten(change), "--results-only")
    published.hub.commit_files(f"stranger/pool-{published.count}", stored(other))
    said = cli_run("--pool", root, "pull", "--results-only", code=1)
    check_said(said.stderr, "is not the one that its digest names")


def builds(published: Published, recipe: list[Any] | None = None, **body: Any) -> list[Record]:
    made = forged(published.kind("build")[0], **body)
    if recipe is None:
        return [made]
    named = forged(Record("recipe", "", {"components": recipe}, {}, AT))
    return [named, forged(made, subject=named.id)]


def test_builds_that_give_other_bytes(published, attack):
    named = {published.names["model"][name] for name in ("base", "kept")}
    units = sorted({r.id for r in published.kind("model")} - named)[:2]
    honest = published.kind("build")[0]
    wrong = builds(published, [[units[0], 1, 3], [units[1], 2, 3]])
    rest = [r for r in published.records if r.kind not in ("location", "transfer") and r != honest]
    attack({**published.segments, **segment(*rest, *wrong)}, "cannot be rebuilt from its recipe")


def test_builds_of_models_that_do_not_fit(published, attack, tmp_path, tiny):
    with Pool.create(tmp_path / "other") as pool:
        texts = tiny.texts
        pool.add_evalset("alpha", [texts / "alpha.held.jsonl"])
        pool.add_model(pools.model_folder(tmp_path / "gpt2", "gpt2"), name="g", role="seed")
        model = pool.model("g")["digest"]
        new = [r for r in pool.registry.journal.all() if r.kind == "model"]
        files = [pool.registry.objects.read(d) for d in new[0].objects]
    recipe = sorted([[model, 1, 2], [published.names["model"]["base"], 1, 2]])
    honest = published.kind("build")[0]
    rest = [r for r in published.records if r.kind not in ("location", "transfer") and r != honest]
    changes = {**published.segments, **segment(*rest, *new, *builds(published, recipe))}
    for data in files:
        changes |= stored(data)
    shutil.rmtree(tmp_path / "other")
    shutil.rmtree(tmp_path / "gpt2")
    attack(changes, "")


@pytest.mark.parametrize("body", [
    {"dtype": "int4"}, {"dtype": ["float32"]}, {"dtype": 7}, {"max_shard_bytes": 0},
    {"max_shard_bytes": -1}, {"max_shard_bytes": 1.5}, {"max_shard_bytes": 2**70},
])  # fmt: skip
def test_builds_that_cannot_be(published, body, tmp_path):
    refused_alone(builds(published, **body)[0], tmp_path)


WEIGHTINGS = [
    [], [[1, 1]], [[1, 2]], [[0, 1], [1, 1]], [[-1, 2], [3, 2]], [[1, 0]], [[1, -1]], [[2**70, 1]],
    [[1, 2**62], [2**62 - 1, 2**62]], [[0.5, 1], [0.5, 1]], [["1", 2], ["1", 2]], [[True, 1]],
    [[1, 3], [1, 3]], [[1, 2, 3]], [[None, 1]], "all", {"a": 1}, None,
]  # fmt: skip


@pytest.mark.parametrize("weights", WEIGHTINGS, ids=repr)
def test_recipes_that_weigh_wrongly(published, weights, tmp_path):
    def rows(*before: Any) -> Any:
        listed = isinstance(weights, list)
        return [[f"{n}" * 64, *before, *w] for n, w in enumerate(weights)] if listed else weights

    right = repr(weights) == "[[1, 1]]"
    for record in (
        forged(published.kind("recipe")[0], components=rows()),
        forged(published.kind("mixture")[0], weights=rows(1)),
    ):
        if right:
            assert read_alone(record, tmp_path) == [record]
        else:
            refused_alone(record, tmp_path)


def test_recipes_in_another_order_or_with_one_model_twice(published, tmp_path):
    a, b = "a" * 64, "b" * 64
    for rows in ([[b, 1, 2], [a, 1, 2]], [[a, 1, 2], [a, 1, 2]]):
        refused_alone(forged(published.kind("recipe")[0], components=rows), tmp_path)


# -- what is mine ----------------------------------------------------------------------------


def meanings(root: Path) -> dict[str, dict[str, str]]:
    with Pool.open(root) as pool:
        return {space: pool.registry.names(space) for space in ("model", "partition", "evalset")}


def test_what_i_measured_and_named_stays(published, taken):
    mine, before = published.root, meanings(published.root)
    base = before["model"]["base"]
    late = "2026-01-01T00:00:00.000000Z"
    lies = [
        *(
            forged(r, at="2020-01-01T00:00:00.000000Z", nll=0.0)
            for r in published.kind("evaluation")
        ),
        *(removal(space, target, at=late) for space in before for target in before[space].values()),
        *(naming("model", name, NOWHERE, at=late) for name in before["model"]),
        naming("partition", "base", before["partition"]["alpha"], at=late),
        naming("model", "alpha", base, at=late),
        forged(published.kind("task_score")[0], value=1.0),
        *(replace(r, body={"x": ESCAPES}) for r in published.kind("location")),
        Record("transfer", NOWHERE, {"place": "file:///", "direction": "push"}, {}, AT),
        Record("location", NOWHERE, {"files": 7}, {}, "not a time"),
    ]
    with Pool.open(mine) as pool:
        scores = pool.sql("FROM scores").rows
    root = taken(segment(*lies), into=mine)
    after = meanings(root)
    assert {s: {n: d for n, d in after[s].items() if "/" not in n} for s in after} == before
    assert all(name.startswith("pool-") for s in after for name in after[s] if "/" in name)
    with Pool.open(root) as pool:
        assert pool.sql("FROM scores").rows == scores
        assert pool.verify(full=True).findings == ()
        assert all(pool.model(name) for name in after["model"])


def test_what_is_removed_there_can_be_added_here(published, taken, tiny):
    """A tombstone of what nobody has must not hide what is added later."""
    model = published.model().id
    root = taken(
        {**published.segments, **segment(removal("model", model))}, "--results-only", check=False
    )
    with Pool.open(root) as pool:
        pool.add_model(tiny.seed, name="new", role="seed")
        assert pool.model("new")["digest"] == model


@pytest.mark.parametrize("space", ["partition", "model", "evalset"])
def test_names_of_nothing(attack, space):
    attack(segment(naming(space, "ghost", NOWHERE)), "'ghost' stands for nothing")


def test_a_name_too_long_to_be_kept_beside_mine(published, present, taken, tmp_path):
    """What is kept as ORIGIN/name is a name that the next push may publish."""
    long, base = "hub/" + "x" * 100, meanings(present)["model"]["base"]
    root = shutil.copytree(present, tmp_path / "named")
    with Pool.open(root) as pool:
        pool.registry.record(naming("model", long, base))
    theirs = naming("model", long, published.model().id, at="2026-01-03T00:00:00.000000Z")
    made = taken(segment(theirs), "--results-only", into=root, check=False)
    for name in meanings(made)["model"]:
        assert inbound.check_stored_name(name) == name


@pytest.mark.parametrize("name", ["all", "2024", "all-of-it", "_x", "x" * 96])
def test_a_repository_with_a_name_that_is_none(published, present, cli_run, tmp_path, name):
    root = shutil.copytree(present, tmp_path / "mine")
    repos = published.hub.repos
    repos["model", f"stranger/{name}"] = repos["model", "me/honest"]
    with Pool.open(root) as pool:
        assert pool.pull(f"stranger/{name}", results_only=True).clashes
    for space in meanings(root).values():
        for word in space:
            assert inbound.check_stored_name(word) == word


def test_sizes_that_disagree_with_what_is_here(published, taken, cli_run):
    """A record of a stranger must not make the pool look damaged."""
    mine = published.file("model.safetensors")["object"]
    lie = forged(evaluation(published), subject=NOWHERE, objects={mine: 10})
    repo = published.repo({**published.segments, **segment(lie)})
    root = shutil.copytree(published.root, published.root.parent / "sizes")
    said = cli_run("pull", repo, root, code=1)
    check_said(said.stderr, "is not what its name says")
    with Pool.open(root) as pool:
        assert pool.verify().findings == ()
    shutil.rmtree(root)


def test_text_that_is_not_there_does_not_stop_others(published, taken, tmp_path):
    """A partition whose list of documents the place does not hold."""
    record = published.kind("partition")[0]
    content = record.body["content"]
    root = taken({object_path(content): None}, "--results-only", check=False)
    file = tmp_path / "new.jsonl"
    file.write_text('{"text": "some new text"}\n')
    with Pool.open(root) as pool:
        pool.add_evalset("new", [file])


# -- one field of a record changed to something else ------------------------------------------

VALUES = [
    None, True, False, 0, -1, 1, 2**31, 2**53, 2**63, 2**70, -(2**70), 0.5, -0.0, 1e308, "", "x",
    ESCAPES, "x\0y", "a" * 64, "A" * 64, "../../x", "9" * 5000, [], {}, [[]], [None], ["x"], {"x": 1},
    [1, 2, 3], "2026-01-01", "a+b", "all", "ﬀ", "٣",
]  # fmt: skip


def places(value: Any) -> Iterator[list[Any]]:
    """Yield the way to each part of a JSON value, lists only as far as their first item."""
    yield []
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value[:1])
    for key, item in items:
        yield from ([key, *way] for way in places(item))


def put(value: Any, way: list[Any], new: Any) -> Any:
    if not way:
        return new
    made = dict(value) if isinstance(value, dict) else list(value)
    made[way[0]] = put(value[way[0]], way[1:], new)
    return made


def of_each_kind(published: Published) -> dict[str, Record]:
    """Return an honest record of each kind that a pull takes."""
    found = {record.kind: record for record in published.records}
    number, digest = 3, "d" * 64
    found["variant"] = forged(Record("variant", "", {
        "variant": 1, "parent": published.model().id, "ratio": 0.3, "calibration": digest,
        "method": "poolreg", "target": "full", "without": ["probe"], "epsilon": 0.1, "step": 8,
        "sequential": True, "model": published.model("kept").id, "achieved": 0.3,
        "block_parameters": number, "parent_block_parameters": number, "parent_parameters": number,
        "parent_bytes": number, "parent_label": "base", "logit_difference": 1e-6,
        "shared_bytes": number, "seconds": 1.0, "modules": [[0, "mlp", 3, 2, 9, 6, 0.1, 0.2]],
    }, {}, AT))  # fmt: skip
    found["calibration"] = Record("calibration", digest, {
        "subject": digest, "text": digest, "text_kind": "evalset", "protocol": digest,
        "token_limit": 1, "tokens": 1, "held_out_tokens": 1, "largest": 1, "condition": 1.0,
        "windows": digest, "layers": [digest], "seconds": 1.0,
    }, {}, AT)  # fmt: skip
    found["contamination"] = forged(
        Record(
            "contamination", "", {"evalset": digest, "partition": digest, "documents": 1}, {}, AT
        )
    )
    return {kind: r for kind, r in found.items() if kind not in ("location", "transfer")}


@pytest.mark.slow
def test_each_field_of_each_kind_with_each_value(published, taken, tmp_path, cli_run):
    """Refused where it is read, or taken by a pool that everything still reads."""
    kinds = of_each_kind(published)
    assert kinds.keys() == inbound.SHAPES.keys()
    harmless: dict[str, Record] = {}
    tried = 0
    for record in kinds.values():
        for way in places(record.body):
            for value in VALUES:
                made = forged(replace(record, body=put(record.body, way, value)))
                tried += 1
                try:
                    read_alone(made, tmp_path)
                except PoolregError as error:
                    check_said(f"error: {error}", "")
                else:
                    harmless[made.id] = made
    for file in tmp_path.glob("*.jsonl"):
        file.unlink()
    assert tried > 5000
    assert {r.kind for r in harmless.values()} >= {"model", "run", "evaluation", "task_score"}
    # All of them at once, over what was published honestly, under names of models and all.
    root = taken(segment(*harmless.values()), "--results-only", check=False)
    usable(root, cli_run, thorough=True)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_whatever_stands_in_a_record_is_taken_or_refused(published, tmp_path_factory, data):
    kinds = of_each_kind(published)
    record = kinds[data.draw(st.sampled_from(sorted(kinds)))]
    way = data.draw(st.sampled_from(list(places(record.body))))
    made = replace(record, body=put(record.body, way, data.draw(json_values)))
    with contextlib.suppress(Refused):  # as our own writer would
        made = forged(made)
        made.line()
    fields = {
        "v": 1,
        "kind": made.kind,
        "id": made.id,
        "at": made.at,
        "body": made.body,
        "objects": made.objects,
    }
    raw = line(json.dumps(fields).encode())
    with contextlib.suppress(PoolregError):
        read_alone(raw, tmp_path_factory.getbasetemp())


# -- what a terminal shows -------------------------------------------------------------------


@pytest.mark.slow
def test_free_text_moves_no_cursor(published, taken, cli_run):
    kinds = of_each_kind(published)
    mixture = kinds["mixture"]
    root = taken(
        segment(
            forged(kinds["variant"], parent_label=ESCAPES, method=ESCAPES, target=ESCAPES),
            forged(kinds["task_score"], task=ESCAPES, metric=ESCAPES, filter=ESCAPES),
            forged(kinds["run"], model=published.model("kept").id, budget=ESCAPES,
                   role="reference", recipe={ESCAPES: ESCAPES}, scheme=ESCAPES, how=ESCAPES),
            forged(mixture, scheme=ESCAPES, origin=ESCAPES),
            forged(kinds["evaluation"], subject=published.model("kept").id, device=ESCAPES),
        ),
        "--results-only", check=False,
    )  # fmt: skip
    usable(root, cli_run, thorough=True)
    for words in (["show", "kept"], ["show", "base"], ["scores", "ls"], ["query"]):
        said = cli_run("--pool", root, *words, code=None)
        assert not CONTROL.search(said.output)
    refused_alone(forged(mixture, mixture=ESCAPES), root / "tmp")


# -- very many records -----------------------------------------------------------------------

PULL = r"""
import re, sys, time
from pathlib import Path
from poolreg import Pool
with Pool.create(sys.argv[1]) as pool:
    start = time.perf_counter()
    done = pool.pull(sys.argv[2], results_only=True)
    seconds = time.perf_counter() - start
    rows = pool.sql("SELECT count(*) FROM evaluations").rows[0][0]
    peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) // 1024
    print(done.records, rows, peak, f"{seconds:.1f}")
"""


def write_many(published: Published, folder: Path, count: int, *, same: bool) -> None:
    """Publish a journal of very many evaluations in a folder."""
    (folder / "journal").mkdir(parents=True)
    (folder / "poolreg.json").write_bytes(b'{"format":1}')
    record = evaluation(published)
    with open(folder / "journal" / "x", "wb") as file:
        for number in range(count):
            subject = sha256(b"%d" % (0 if same else number))
            scores = {sha256(subject.encode()): 100}
            body = {
                **record.body,
                "subject": subject,
                "document_scores": next(iter(scores)),
                "token_scores": None,
            }
            key = inbound.evaluation_id(subject, body["evalset"], body["protocol"])
            file.write(Record("evaluation", key, body, scores, record.at).line())
    with open(folder / "journal" / "x", "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    (folder / "journal" / "x").rename(folder / "journal" / f"{digest}.jsonl")


@pytest.mark.campaign
@pytest.mark.parametrize("same", [False, True])
def test_very_many_records(published, tmp_path, same):
    """Memory grows by less than 2 GB a million."""
    count = 20_000
    write_many(published, tmp_path / "there", count, same=same)
    place = (tmp_path / "there").as_uri()
    told = subprocess.run(
        [sys.executable, "-c", PULL, tmp_path / "here", place],
        check=True, capture_output=True, text=True, timeout=1200,
    ).stdout  # fmt: skip
    _, rows, peak, _ = told.splitlines()[-1].split()
    assert int(rows) == (1 if same else count)
    assert int(peak) < 500 + 2000 * count / 1_000_000  # MB


# -- pushing to a place where a stranger has been ---------------------------------------------


@pytest.mark.parametrize("record", [
    Record("location", NOWHERE, {"files": 7}, {}, "not a time"),
    Record("transfer", NOWHERE, {"place": ESCAPES}, {}, AT),
], ids=["location", "transfer"])  # fmt: skip
def test_a_push_to_a_place_with_records_that_stay(published, present, tmp_path, record):
    """What a pull ignores does not stop a push either, and is in nobody's tables."""
    repo = published.repo(segment(record))
    with Pool.open(shutil.copytree(present, tmp_path / "mine")) as pool:
        assert pool.push(repo).changed
        assert not any(ESCAPES.encode() in published.hub.content(repo, path)
                       for path in published.hub.tree(repo) if path.startswith("tables/"))  # fmt: skip


def test_a_push_to_a_place_that_lies(published, present, tmp_path):
    """A push that cannot read what is there sends nothing."""
    repo = published.repo(segment(b"x\n"))
    head = published.hub.head(repo)
    with Pool.open(shutil.copytree(present, tmp_path / "mine")) as pool:
        before = pools.contents(pool.root)
        with pytest.raises(Refused) as caught:
            pool.push(repo)
        check_said(f"error: {caught.value}", "does not match its checksum")
        assert pools.contents(pool.root) == before
        assert not list((pool.root / "tmp").iterdir())
    assert published.hub.head(repo) == head
