import binascii
import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from poolreg.canonical import canonical_json
from poolreg.errors import Damage, PoolregError, Refused, StorageError, UnknownFormat
from poolreg.store import journal as module
from poolreg.store.journal import SEGMENT, Journal, Record, now

any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | any_text,
    lambda some: st.lists(some, max_size=3) | st.dictionaries(any_text, some, max_size=3),
    max_leaves=8,
)
records = st.builds(
    Record,
    any_text,
    any_text,
    st.dictionaries(any_text, json_values, max_size=4),
    st.dictionaries(any_text, st.integers(0, 2**62), max_size=3),
    any_text.filter(bool),
)
quick = settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path)


def fresh(factory) -> Journal:
    return Journal(factory.mktemp("journal"))


def everything(journal: Journal) -> list[Record]:
    """The records of all segments, in the order of the segments' names."""
    found = []
    for segment, size in Journal(journal.folder).segments().items():
        found += [record for record, _ in journal.read(segment, 0, size)]
    return found


def only_segment(journal: Journal) -> Path:
    (name,) = journal.segments()
    return journal.folder / name


def numbered(*numbers: int) -> list[Record]:
    return [Record("kind", f"id{n}", {"n": n}, {}, "2024-01-01T00:00:00.000000Z") for n in numbers]


def line(**fields) -> bytes:
    data = canonical_json(fields)
    return b"%08x %s\n" % (binascii.crc32(data), data)


# -- round trip -----------------------------------------------------------------------------


@quick
@given(st.lists(st.lists(records, max_size=3), max_size=4))
def test_round_trip(tmp_path_factory, batches):
    journal = fresh(tmp_path_factory)
    for batch in batches:
        journal.append(batch)
    assert everything(journal) == [record for batch in batches for record in batch]
    assert len(journal.segments()) == (1 if any(batches) else 0)


@quick
@given(st.lists(records, min_size=1, max_size=5), st.data())
def test_reading_goes_on_where_it_stopped(tmp_path_factory, written, draw):
    journal = fresh(tmp_path_factory)
    journal.append(written)
    ((segment, size),) = journal.segments().items()
    found = list(journal.read(segment, 0, size))
    assert found[-1][1] == size
    stop = draw.draw(st.integers(0, len(found)))
    start = found[stop - 1][1] if stop else 0
    assert list(journal.read(segment, start, size)) == found[stop:]


def test_a_line_to_the_byte(journal):
    journal.append([Record("evalset", "x1", {"é": [1, 0.5]}, {"ab": 3}, "at")])
    data = '{"at":"at","body":{"é":[1,0.5]},"id":"x1","kind":"evalset","objects":{"ab":3},"v":1}'
    crc = f"{binascii.crc32(data.encode()):08x}"
    assert only_segment(journal).read_text() == f"{crc} {data}\n"


def test_records_are_stamped_when_written(journal):
    before = now()
    journal.append([Record("kind", "a", {}, {}), Record("kind", "b", {}, {}, "then")])
    one, other = everything(journal)
    assert before <= one.at <= now()
    assert other.at == "then"


def test_appending_nothing_makes_nothing(journal):
    journal.append([])
    assert journal.segments() == {}


def test_each_writer_has_a_segment_of_its_own(tmp_path):
    writers = [Journal(tmp_path) for _ in range(3)]
    for round_ in range(3):
        for number, writer in enumerate(writers):
            writer.append(numbered(10 * number + round_))
    assert len(writers[0].segments()) == 3
    assert all(SEGMENT.fullmatch(name) for name in writers[0].segments())
    expected = {f"id{10 * i + j}" for i in range(3) for j in range(3)}
    assert {record.id for record in everything(writers[0])} == expected


def test_strange_files_are_no_segments(journal):
    journal.append(numbered(1))
    for name in ("notes.txt", ".x.jsonl.tmp", "a b.jsonl", "é.jsonl", "x" * 150 + ".jsonl"):
        (journal.folder / name).write_bytes(b"junk\n")
    (journal.folder / "folder.jsonl").mkdir()
    assert len(journal.segments()) == 1


def test_acknowledged_means_flushed(journal, monkeypatch):
    flushed = []
    fsync = os.fsync

    def note(descriptor):
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        flushed.append((path, path.stat().st_size if path.is_file() else None))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    journal.append(numbered(1, 2))
    segment = only_segment(journal)
    assert flushed == [(segment, segment.stat().st_size), (journal.folder, None)]
    journal.append(numbered(3))
    assert flushed[2:] == [(segment, segment.stat().st_size)]


# -- damage ---------------------------------------------------------------------------------


def test_a_torn_end_is_ignored_wherever_it_is_torn(journal):
    journal.append(numbered(1, 2))
    whole = only_segment(journal).read_bytes()
    journal.append([Record("kind", "é", {"x": ["y", 1]}, {"o": 2}, "z")])
    segment = only_segment(journal)
    data = segment.read_bytes()
    for cut in range(len(whole), len(data)):
        segment.write_bytes(data[:cut])
        found = list(journal.read(segment.name, 0, cut))
        assert [record.id for record, _ in found] == ["id1", "id2"]
        assert found[-1][1] == len(whole)


def test_bytes_that_are_written_meanwhile_belong_to_the_next_reading(journal):
    journal.append(numbered(1))
    ((segment, size),) = journal.segments().items()
    journal.append(numbered(2, 3))
    # The size was taken before: what is read is whole records in any case.
    assert [r.id for r, _ in journal.read(segment, 0, size)] == ["id1"]
    assert [r.id for r, _ in journal.read(segment, 0, size + 5)] == ["id1", "id2"]


@quick
@given(st.data())
def test_every_flipped_bit_is_found(tmp_path_factory, draw):
    journal = fresh(tmp_path_factory)
    journal.append(numbered(1, 2, 3))
    segment = only_segment(journal)
    data = bytearray(segment.read_bytes())
    bit = draw.draw(st.integers(0, 8 * len(data) - 1))
    data[bit // 8] ^= 1 << bit % 8
    segment.write_bytes(data)
    lost = bit // 8 == len(data) - 1  # the last line end: then it is a torn line
    if lost:
        assert [r.id for r in everything(journal)] == ["id1", "id2"]
    else:
        with pytest.raises(Damage, match=f"journal/{segment.name}, byte ") as caught:
            everything(journal)
        assert caught.value.data["segment"] == segment.name
        assert caught.value.exit_code == 3


def test_damage_names_the_place_and_what_is_before_it_is_read(journal):
    journal.append(numbered(1, 2, 3))
    segment = only_segment(journal)
    lines = segment.read_bytes().splitlines(keepends=True)
    segment.write_bytes(lines[0] + lines[1][:-3] + b"\n" + lines[2])
    found = []
    with pytest.raises(Damage) as caught:
        found.extend(record.id for record, _ in journal.read(segment.name, 0, 10**6))
    assert caught.value.data["offset"] == len(lines[0])
    iterator = journal.read(segment.name, 0, 10**6)
    assert next(iterator)[0].id == "id1"


GOOD = {"v": 1, "kind": "k", "id": "i", "at": "t", "body": {}, "objects": {}}


@pytest.mark.parametrize(
    "fields",
    [
        {**GOOD, "body": []}, {**GOOD, "objects": [1]}, {**GOOD, "kind": 1}, {**GOOD, "id": None},
        {**GOOD, "at": 5}, {**GOOD, "body": "text"}, {"v": 1}, {},
        *({k: v for k, v in GOOD.items() if k != missing} for missing in GOOD),
    ],
)  # fmt: skip
def test_what_is_no_record_is_damage(journal, fields):
    (journal.folder / "x.jsonl").write_bytes(line(**fields))
    with pytest.raises(Damage):
        everything(journal)


@pytest.mark.parametrize("data", [b"[]", b'"v"', b"1", b"\xff", b"{", b"", b"[" * 100_000, b"NaN"])
def test_what_is_not_even_an_object_is_damage(journal, data):
    (journal.folder / "x.jsonl").write_bytes(b"%08x %s\n" % (binascii.crc32(data), data))
    with pytest.raises(Damage):
        everything(journal)


@pytest.mark.parametrize(
    "fields", [{**GOOD, "v": 2}, {"v": 2, "new": "form"}, {**GOOD, "v": "1"}, {**GOOD, "v": None}]
)
def test_records_of_a_newer_version(journal, fields):
    journal.append(numbered(1))
    (journal.folder / "x.jsonl").write_bytes(line(**fields))
    with pytest.raises(UnknownFormat, match=r"journal/x\.jsonl") as caught:
        everything(journal)
    assert "newer poolreg" in caught.value.hint


@quick
@given(st.lists(st.binary(max_size=60) | st.just(b"\n"), max_size=6))
def test_any_bytes_are_records_or_damage(tmp_path_factory, parts):
    journal = fresh(tmp_path_factory)
    (journal.folder / "x.jsonl").write_bytes(b"".join(parts))
    torn = b"\n" not in b"".join(parts)
    if torn:
        assert everything(journal) == []
    else:
        with pytest.raises(Damage):
            everything(journal)


def test_a_giant_line_is_damage(journal, monkeypatch):
    monkeypatch.setattr(module, "MAX_LINE", 1000)
    (journal.folder / "x.jsonl").write_bytes(b"x" * 1001)
    with pytest.raises(Damage, match="longer"):
        everything(journal)


def test_a_record_that_nobody_could_read_is_not_written(journal, monkeypatch):
    giant = Record("location", "x", {"files": ["y" * 100] * 10}, {}, "at")
    monkeypatch.setattr(module, "MAX_LINE", len(giant.line()))
    journal.append([giant])
    assert everything(journal) == [giant]
    monkeypatch.setattr(module, "MAX_LINE", len(giant.line()) - 1)
    with pytest.raises(Refused, match="the location record is larger"):
        journal.append([*numbered(1), giant])
    monkeypatch.setattr(module, "MAX_LINE", 1 << 20)
    assert everything(journal) == [giant]


def test_what_has_no_canonical_form_is_not_written(journal):
    with pytest.raises(Refused):
        journal.append([*numbered(1), Record("k", "i", {"x": float("nan")}, {})])
    assert everything(journal) == []


# -- the fast reader and the strict one -------------------------------------------------------


def outcome(read, data: bytes) -> str:
    try:
        return repr(read(data))
    except PoolregError as error:
        return error.message


def both(data: bytes) -> tuple[str, str]:
    """What a line comes to, and what it comes to for Python's own JSON."""
    line = b"%08x %s\n" % (binascii.crc32(data), data)
    return (
        outcome(lambda _: module.parse(line, "x.jsonl", 7), data),
        outcome(lambda data: module._parse_slowly(data, "x.jsonl", 7), data),
    )


edits = st.lists(
    st.tuples(
        st.integers(0, 10**6),
        st.integers(0, 3),
        st.binary(max_size=3) | st.sampled_from(
            [b"NaN", b"-0", b"1e400", b"1.", b"01", b'"v":1', b'"at":1,', b"\\ud800", b"null", b"{}"]
        ),
    ),
    max_size=3,
)  # fmt: skip


@settings(max_examples=300)
@given(records, edits)
def test_a_line_is_read_as_json_reads_it(record, edits):
    data = record.line()[9:-1]
    for place, length, new in edits:
        start = place % (len(data) + 1)
        data = data[:start] + new.replace(b"\n", b"") + data[start + length :]
    fast, strict = both(data)
    assert fast == strict
    if not edits:
        assert module.parse(record.line(), "x.jsonl", 0) == record


@pytest.mark.parametrize(
    "number",
    ["18446744073709551616", "-9223372036854775809", "1" * 60, "-0", "-0.0", "1e400", "4.9e-324",
     "0.1e-400", "9007199254740993", "9007199254740993.0", "1.7976931348623159e308", "1E5", "NaN",
     "Infinity", "-Infinity", "1" * 4301, "1.", "+1", "0x1"],
)  # fmt: skip
def test_numbers_are_exact_or_refused(number):
    record = Record("k", "i", {"n": "X"}, {}, "t")
    text = record.line()[9:-1].decode().replace('"X"', number)
    fast, strict = both(text.encode())
    assert fast == strict


@pytest.mark.parametrize(
    "text",
    [
        '{"at":"t","body":{},"id":"i","kind":"k","objects":{},"v":1}',
        '{"at":"t","at":"u","body":{},"body":{"b":1},"id":"i","kind":"k","objects":{},"v":2,"v":1}',
        '{"at":"t","body":{},"id":"i","kind":"k","objects":{"a":1.0},"v":1}',
        '{"at":"t","body":{},"id":"i","kind":"k","objects":{"a":true,"b":null,"c":"d"},"v":1}',
        '{"at":"t","body":{},"id":"i","kind":"k","objects":{},"v":2,"v":1}',
        '{"at":"t","body":{"a":{"v":2},"v":1},"id":"i","kind":"k","objects":{},"x":{},"v":1}',
        '{"at":"t","body":{"v":1}}',
        '{"at":"t","body":' + '{"a":' * 2000 + "1" + "}" * 2000 + ',"v":1}',
        ' {"at": "t", "body": {}, "id": "i", "kind": "k", "objects": {}, "v": 1} ',
    ],
)
def test_odd_spellings_are_read_as_json_reads_them(text):
    fast, strict = both(text.encode())
    assert fast == strict


@pytest.mark.parametrize("name", [b"extra", b"v", b"body", b"at", b"\xff"])
@pytest.mark.parametrize(
    "value",
    [b"1", b'"x"', b"{}", b"1.0", b"true", b"01", b"NaN", b"1e400", b"9" * 4301, b'"\xff"', b'"\x01"',
     b'"\\ud800"', b'"\xed\xa0\x80"', b'"\\x"', b'{"\xff":1}', b'[{"a":"\xc0\x80"}]', b"[1,]"],
    ids=repr,
)  # fmt: skip
def test_what_is_said_besides_or_twice_is_read_as_json_reads_it(name, value):
    rest = b'"body":{},"id":"i","kind":"k","objects":{}'
    for data in (
        b'{"at":"t",%s,"%s":%s,"v":1}' % (rest, name, value),
        b'{"%s":%s,"at":"t",%s,"v":1}' % (name, value, rest),
        b'{"at":"t",%s,"v":1,"%s":%s}' % (rest, name, value),
    ):
        fast, strict = both(data)
        assert fast == strict


# -- processes ------------------------------------------------------------------------------


def test_a_forked_child_has_a_segment_of_its_own(journal):
    journal.append(numbered(1))
    child = os.fork()
    if child == 0:
        try:
            journal.append(numbered(2))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    journal.append(numbered(3))
    assert len(journal.segments()) == 2
    assert {record.id for record in everything(journal)} == {"id1", "id2", "id3"}


def test_threads_with_journals_of_their_own(tmp_path):
    def write(start):
        journal = Journal(tmp_path)
        for number in range(start, start + 20):
            journal.append(numbered(number))

    threads = [threading.Thread(target=write, args=(100 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [record.id for record in everything(Journal(tmp_path))]
    assert sorted(found) == sorted(f"id{100 * i + n}" for i in range(4) for n in range(20))


# -- failing writes -------------------------------------------------------------------------


class FullDisk:
    """Takes the place of os.write: writes so many bytes, then there is no space."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.write = os.write

    def __call__(self, descriptor, data):
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = self.write(descriptor, data[: self.room])
        self.room -= count
        return count


@pytest.mark.parametrize("first", [False, True])
def test_a_full_disk_takes_back_what_was_begun(tmp_path, monkeypatch, first):
    journal = Journal(tmp_path)
    if not first:
        journal.append(numbered(1))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    size = len(numbered(2)[0].line()) * 2
    for room in range(size):
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", FullDisk(room))
            with pytest.raises(StorageError, match="writing the journal: No space left"):
                journal.append(numbered(2, 3))
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.stat().st_size} == before
    journal.append(numbered(2, 3))
    expected = ["id2", "id3"] if first else ["id1", "id2", "id3"]
    assert sorted(record.id for record in everything(journal)) == expected


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_what_was_not_flushed_is_taken_back(journal, monkeypatch, error):
    journal.append(numbered(1))
    before = only_segment(journal).read_bytes()

    def fail(_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises((StorageError, KeyboardInterrupt)):
            journal.append(numbered(2))
    assert only_segment(journal).read_bytes() == before
    journal.append(numbered(3))
    assert [record.id for record in everything(journal)] == ["id1", "id3"]


def test_nothing_follows_what_could_not_be_taken_back(journal, monkeypatch):
    journal.append(numbered(1))

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", FullDisk(10))
        patch.setattr(os, "ftruncate", fail)
        with pytest.raises(StorageError):
            journal.append(numbered(2))
    journal.append(numbered(3))
    assert [record.id for record in everything(journal)] == ["id1", "id3"]
    assert len(journal.segments()) == 2


LIMITED = """
import resource, signal, sys
from pathlib import Path
from poolreg.errors import StorageError
from poolreg.store.journal import Journal, Record
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
journal = Journal(Path(sys.argv[1]))
journal.append([Record("kind", "id1", {"x": "y" * 50}, {})])
resource.setrlimit(resource.RLIMIT_FSIZE, (400, resource.RLIM_INFINITY))
try:
    journal.append([Record("kind", "id2", {"x": "y" * 1000}, {})])
except StorageError as error:
    print(error.message)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
journal.append([Record("kind", "id3", {"x": "y" * 1000}, {})])
"""


def test_a_real_short_write(journal):
    command = [sys.executable, "-c", LIMITED, str(journal.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "writing the journal: File too large\n"
    assert [record.id for record in everything(journal)] == ["id1", "id3"]


def test_a_missing_folder(tmp_path):
    with pytest.raises(PoolregError):
        Journal(tmp_path / "nothing").append(numbered(1))
