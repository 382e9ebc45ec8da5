"""Bundles: what goes in comes out, the same pool gives the same bytes, hostile tars are refused."""

import errno
import gzip
import hashlib
import io
import lzma
import tarfile
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poolreg.canonical import sha256
from poolreg.errors import (
    Conflict,
    Damage,
    NotFound,
    PoolregError,
    Refused,
    StorageError,
    UsageError,
)
from poolreg.sharing import bundles
from poolreg.sharing.bundles import BLOCK, BundlePlace, write_bundle
from poolreg.sharing.places import MARK, MARKER, Outgoing, object_path, segment_path
from poolreg.sharing.streams import CHUNK


def silent(_: int) -> None: ...


def outgoing(folder: Path, contents: dict[str, bytes]) -> list[Outgoing]:
    """Files of `contents`, by path, that lie in `folder` under other names."""
    folder.mkdir(exist_ok=True)
    items = []
    for number, (path, data) in enumerate(contents.items()):
        source = folder / str(number)
        source.write_bytes(data)
        items.append(Outgoing(path, source, sha256(data), len(data)))
    return items


def published(objects: list[bytes], segments: list[bytes]) -> dict[str, bytes]:
    """What a pool with these objects and segments publishes."""
    return {
        **{object_path(sha256(data)): data for data in objects},
        **{segment_path(sha256(data)): data for data in segments},
        MARKER: MARK,
    }


def everything(place: BundlePlace, folder: Path) -> dict[str, bytes]:
    """All files of a bundle, fetched."""
    found = {}
    for number, (path, entry) in enumerate(place.look().files.items()):
        counts: list[int] = []
        place.fetch(path, folder / f"got{number}", progress=counts.append)
        found[path] = (folder / f"got{number}").read_bytes()
        assert sum(counts) == entry.size == len(found[path])
    return found


SMALL = published([b"", b"weights", bytes(BLOCK), bytes(BLOCK + 1)], [b"{}\n"])


@pytest.fixture
def bundle(tmp_path) -> Path:
    file = tmp_path / "pool.tar"
    write_bundle(file, outgoing(tmp_path / "in", SMALL), progress=silent)
    return file


@settings(max_examples=40, deadline=None)
@given(
    objects=st.lists(st.binary(max_size=1600), max_size=6),
    segments=st.lists(st.binary(max_size=600), max_size=3),
)
def test_round_trip(objects, segments):
    contents = published(objects, segments)
    with tempfile.TemporaryDirectory() as name:
        folder, counts = Path(name), []
        write_bundle(folder / "b.tar", outgoing(folder / "in", contents), progress=counts.append)
        assert everything(BundlePlace(folder / "b.tar"), folder) == contents
    assert sum(counts) == sum(len(data) for data in contents.values())


def test_members_of_several_chunks(tmp_path):
    big = bytes(range(256)) * (CHUNK // 256) + b"tail"
    contents, counts = published([big], []), []
    write_bundle(tmp_path / "b.tar", outgoing(tmp_path / "in", contents), progress=counts.append)
    assert everything(BundlePlace(tmp_path / "b.tar"), tmp_path) == contents
    assert len(counts) == 3
    assert sum(counts) == len(big) + len(MARK)


def test_same_bytes_in_any_order(tmp_path, bundle):
    turned = dict(reversed(SMALL.items()))
    write_bundle(tmp_path / "again.tar", outgoing(tmp_path / "in2", turned), progress=silent)
    assert (tmp_path / "again.tar").read_bytes() == bundle.read_bytes()


def test_every_tar_reads_it(bundle):
    with tarfile.open(bundle, "r:") as tar:
        members = tar.getmembers()
        read = {member.name: tar.extractfile(member).read() for member in members}
    kinds = [member.name.partition("/")[0] for member in members]
    assert read == SMALL
    assert kinds == [MARKER, "journal", "objects", "objects", "objects", "objects"]
    assert {(m.mtime, m.uid, m.gid, m.mode, m.uname) for m in members} == {(0, 0, 0, 0o644, "")}


def test_sizes_beyond_8_gib():
    item = Outgoing(object_path("0" * 64), Path("x"), "0" * 64, (1 << 33) + 5)
    block = bundles._header(item)
    assert bundles._parse(block, "b").size == item.size
    assert tarfile.TarInfo.frombuf(block, "utf-8", "strict").size == item.size


def test_made_by_hand(tmp_path):
    """What the hint says gives a bundle: folders are members then, and count for nothing."""
    for path, data in SMALL.items():
        (tmp_path / "tree" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / path).write_bytes(data)
    with tarfile.open(tmp_path / "b.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name in (MARKER, "journal", "objects"):
            tar.add(tmp_path / "tree" / name, name)
    assert everything(BundlePlace(tmp_path / "b.tar"), tmp_path) == SMALL


# -- writing ------------------------------------------------------------------------------------


def test_changed_source_leaves_no_file(tmp_path):
    for changed in (b"Weights", b"weight", b"weights and more"):
        items = outgoing(tmp_path / "in", published([b"weights"], []))
        items[0].source.write_bytes(changed)
        with pytest.raises(Damage, match="does not hold the bytes"):
            write_bundle(tmp_path / "b.tar", items, progress=silent)
        assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_existing_file(tmp_path, bundle):
    before = bundle.read_bytes()
    items = outgoing(tmp_path / "other", published([b"new"], []))
    with pytest.raises(Conflict, match="there already"):
        write_bundle(bundle, items, progress=silent)
    assert bundle.read_bytes() == before
    write_bundle(bundle, items, progress=silent, force=True)
    assert object_path(sha256(b"new")) in BundlePlace(bundle).look().files
    with pytest.raises(Conflict):
        write_bundle(tmp_path, items, progress=silent, force=True)
    with pytest.raises(NotFound, match="no folder"):
        write_bundle(tmp_path / "none" / "b.tar", items, progress=silent)


def test_full_disk(tmp_path):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    items = outgoing(tmp_path / "in", SMALL)
    with pytest.raises(StorageError, match="No space left") as caught:
        write_bundle(tmp_path / "b.tar", items, progress=full)
    assert "free some disk space" in caught.value.hint
    assert not list(tmp_path.glob("*b.tar*"))


@pytest.mark.parametrize("paths", [[], ["objects/ab/cd"], [MARKER, MARKER], [MARKER, "o" * 101]])
def test_members_that_make_no_bundle(tmp_path, paths):
    source = tmp_path / "source"
    source.write_bytes(MARK)
    items = [Outgoing(path, source, sha256(MARK), len(MARK)) for path in paths]
    with pytest.raises(UsageError):
        write_bundle(tmp_path / "b.tar", items, progress=silent)
    assert not (tmp_path / "b.tar").exists()


def test_nothing_can_be_added(bundle):
    place = BundlePlace(bundle)
    with pytest.raises(UsageError, match="nothing can be added"):
        place.create()
    with pytest.raises(UsageError, match="nothing can be added"):
        place.publish(place.look(), [], [], [], message="", progress=silent)


def test_alias(tmp_path):
    names = {"run 7.tar": "run-7", "a.b.tar": "a", ".tar": "pool", "2024.tar": "pool-2024"}
    assert {name: BundlePlace(tmp_path / name).alias for name in names} == names


# -- hostile tars -------------------------------------------------------------------------------


def tar_of(tmp_path: Path, *members: tarfile.TarInfo, format: int = tarfile.GNU_FORMAT) -> Path:
    """A bundle with the mark and then `members`, each filled with zeros to its size."""
    file = tmp_path / "hostile.tar"
    mark = tarfile.TarInfo(MARKER)
    mark.size = len(MARK)
    with tarfile.open(file, "w", format=format) as tar:
        tar.addfile(mark, io.BytesIO(MARK))
        for member in members:
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    return file


def member(name: str, kind: bytes = tarfile.REGTYPE, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def refused(file: Path) -> PoolregError:
    place = BundlePlace(file)
    with pytest.raises(Refused) as caught:
        place.look()
    assert caught.value.message.isprintable()
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.BLKTYPE, "a device"),
        (tarfile.FIFOTYPE, "a pipe"),
        (tarfile.CONTTYPE, "of the unknown type '7'"),
        (tarfile.GNUTYPE_SPARSE, "a sparse file"),
        (b"\xff", "of the unknown type"),
    ],
)
def test_kinds_that_are_no_files(tmp_path, kind, said):
    error = refused(tar_of(tmp_path, member("objects/ab/x", kind, linkname="/etc/passwd")))
    assert "'objects/ab/x', which is " + said in error.message


@pytest.mark.parametrize(
    "name",
    ["../x", "objects/../../x", "objects/..", "/etc/passwd", "//host/share", "\\\\host\\share\\x",
     "objects\\x", "C:/x", "c:x", "./x", "a//b", "a/", "", "\x1b[31mred", "a\nb", "a\u202eb"],
)  # fmt: skip
def test_names_that_are_not_safe(tmp_path, name):
    error = refused(tar_of(tmp_path, member(name)))
    assert "not safe" in error.message
    assert ascii(name) in error.message


def test_names_of_folders_and_prefixes(tmp_path):
    assert "not safe" in refused(tar_of(tmp_path, member("../x", tarfile.DIRTYPE))).message
    long = "../" + "d" * 60 + "/" + "f" * 60
    file = tar_of(tmp_path, member(long), format=tarfile.USTAR_FORMAT)
    assert ascii(long) in refused(file).message


def test_names_that_are_no_text(tmp_path):
    file = tar_of(tmp_path, member("a\udcff"))
    assert r"a\\xff" in refused(file).message


def test_duplicates(tmp_path):
    assert "'a' twice" in refused(tar_of(tmp_path, member("a"), member("b"), member("a"))).message
    assert "'poolreg.json' twice" in refused(tar_of(tmp_path, member(MARKER))).message


@pytest.mark.parametrize(
    ("name", "fields", "format"),
    [
        ("n" * 300, {}, tarfile.GNU_FORMAT),
        ("n" * 300, {}, tarfile.PAX_FORMAT),
        ("a", {"linkname": "l" * 300, "type": tarfile.SYMTYPE}, tarfile.GNU_FORMAT),
        ("a", {"pax_headers": {"GNU.sparse.major": "1"}}, tarfile.PAX_FORMAT),
    ],
)
def test_extended_headers(tmp_path, name, fields, format):
    assert (
        "extended header"
        in refused(tar_of(tmp_path, member(name, **fields), format=format)).message
    )


def test_more_members_than_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(bundles, "MAX_MEMBERS", 5)
    members = [member(str(number)) for number in range(4)]
    assert len(BundlePlace(tar_of(tmp_path, *members)).look().files) == 5
    folder = member("folder", tarfile.DIRTYPE)
    assert "more than 5 members" in refused(tar_of(tmp_path, *members, folder)).message


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
def test_compressed(bundle, pack):
    bundle.write_bytes(pack(bundle.read_bytes()))
    error = refused(bundle)
    assert "compressed" in error.message
    assert "unpack it first" in error.hint


def test_cut_anywhere(bundle):
    whole = bundle.read_bytes()
    for length in [*range(0, len(whole), 256), len(whole) - 1, len(whole) - BLOCK]:
        bundle.write_bytes(whole[:length])
        refused(bundle)


def test_any_changed_byte_is_seen(bundle, tmp_path):
    """A changed header is refused, or what is listed or fetched differs."""
    whole = bundle.read_bytes()
    for place in range(0, len(whole) - 2 * BLOCK, 37):
        bundle.write_bytes(whole[:place] + bytes([whole[place] ^ 0x15]) + whole[place + 1 :])
        try:
            files = BundlePlace(bundle).look().files
        except Refused:
            continue
        assert set(files) == set(SMALL)  # the byte is in a file's bytes or in padding


def test_something_else(tmp_path):
    file = tmp_path / "b.tar"
    with pytest.raises(NotFound):
        BundlePlace(file).look()
    with pytest.raises(NotFound):
        BundlePlace(tmp_path).look()
    for data, said in [
        (b"", "not a tar"),
        (b"x" * 2000, "not a tar"),
        (bytes(2 * BLOCK), "empty"),
    ]:
        file.write_bytes(data)
        assert said in refused(file).message
    with tarfile.open(file, "w") as tar:
        tar.addfile(member("README.md"))
    error = refused(file)
    assert "its first file is 'README.md'" in error.message
    assert "tar --format=gnu" in error.hint


def test_something_after_the_end(bundle):
    whole = bundle.read_bytes()
    bundle.write_bytes(whole[:-BLOCK] + whole)
    assert "something follows" in refused(bundle).message


def header(name: str, kind: bytes, size: int) -> bytes:
    return member(name, kind, size=size).tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
@pytest.mark.parametrize("size", [1 << 30, 1 << 36, (1 << 88) - 1])
def test_memory_of_huge_headers(tmp_path, kind, size):
    """A header of gigabytes that is really there (a hole in the file) costs no memory."""
    file = tmp_path / "huge.tar"
    block = header("a", kind, min(size, 1 << 80))
    with open(file, "wb") as out:
        out.write(block)
        out.truncate(min(size, 1 << 36) + 4 * BLOCK)
    tracemalloc.start()
    try:
        refused(file)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_sizes_that_overflow(tmp_path):
    file = tmp_path / "b.tar"
    file.write_bytes(header(MARKER, b"0", 1 << 80) + bytes(4 * BLOCK))
    assert "cut short" in refused(file).message
    negative = bytearray(header(MARKER, b"0", 0))
    negative[124:136] = b"\xff" * 12
    negative[148:156] = b"%06o\0 " % (sum(negative[:148]) + sum(negative[156:]) + 256)
    file.write_bytes(bytes(negative) + bytes(4 * BLOCK))
    assert "not a tar" in refused(file).message


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=2048))
def test_any_bytes_are_refused_or_read(data):
    with tempfile.TemporaryDirectory() as name:
        file = Path(name, "b.tar")
        file.write_bytes(data)
        refused(file)


def test_fetch_only_what_was_listed(bundle, tmp_path):
    place = BundlePlace(bundle)
    place.look()
    with pytest.raises(NotFound):
        place.fetch("../../etc/passwd", tmp_path / "x", progress=silent)
    assert not (tmp_path / "x").exists()
    (tmp_path / "taken").write_bytes(b"mine")
    with pytest.raises(StorageError):
        place.fetch(MARKER, tmp_path / "taken", progress=silent)
    assert (tmp_path / "taken").read_bytes() == b"mine"


def test_file_changed_after_look(bundle, tmp_path):
    """The caller sees by the digest that it got something else; nothing crashes."""
    place = BundlePlace(bundle)
    place.look()
    bundle.write_bytes(bundle.read_bytes()[: 2 * BLOCK])
    path = object_path(sha256(b"weights"))
    place.fetch(path, tmp_path / "x", progress=silent)
    assert hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest() != sha256(b"weights")


def test_parts_of_files_in_a_folder(tmp_path):
    contents = {**SMALL, "objects/aa/b": b"0123456789"}
    write_bundle(tmp_path / "b.tar", outgoing(tmp_path / "in", contents), progress=silent)
    place = BundlePlace(tmp_path / "b.tar")
    with pytest.raises(NotFound):
        place.read("objects/aa/b", 0, 1)
    objects = {path: len(data) for path, data in contents.items() if path.startswith("objects/")}
    assert place.sizes("objects") == objects
    assert place.sizes("object") == place.sizes("tables") == {}
    for start, end in ((0, 10), (3, 7), (9, 10), (8, 99), (5, 5), (11, 20)):
        assert place.read("objects/aa/b", start, end) == b"0123456789"[start:end]
