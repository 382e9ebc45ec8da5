import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
import tracemalloc
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from poolreg.canonical import sha256
from poolreg.errors import Drift, NotFound, PoolregError, Refused, StorageError, UsageError
from poolreg.text import reading
from poolreg.text.corpus import (
    FileDrift,
    FileFacts,
    check_files,
    decode_documents,
    document_digests,
    encode_documents,
    scan,
    shared_documents,
)
from poolreg.text.reading import expand_files, read_documents, read_files
from poolreg.text.units import UnitFacts, unit_documents, unit_facts

TEXTS = ["first\nsecond\r\nthird", "é 漢 🙂 \u2028 \x85 \x0b end\n", '{"not": "parsed"}', " \n "]

any_text = st.text(st.characters(exclude_categories=["Cs"]))
filled_texts = st.lists(any_text.filter(bool), min_size=1, max_size=20)


def write(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def json_lines(texts, field="text", **options) -> bytes:
    rows = (json.dumps({"id": i, field: text}, **options) for i, text in enumerate(texts))
    return "".join(row + "\n" for row in rows).encode()


def write_parquet(path: Path, texts, field="text", kind=None, **options) -> Path:
    column = pa.array(texts, type=kind)
    table = pa.table({"id": pa.array(range(len(column))), field: column})
    parquet.write_table(table, path, **options)
    return path


# --- files -------------------------------------------------------------------------------


def test_folder_stands_for_its_files_in_order_of_their_paths(tmp_path):
    for name in ("b/z.txt", "b/a.txt", "a.txt", "b.txt", ".hidden/x.txt", "b/.x", "c/d/e.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name, "x")
    (tmp_path / "c" / "loop").symlink_to(tmp_path)
    names = [file.relative_to(tmp_path).as_posix() for file in expand_files([tmp_path])]
    assert names == ["a.txt", "b.txt", "b/a.txt", "b/z.txt", "c/d/e.txt"]


def test_given_order_is_kept_and_each_file_comes_once(tmp_path, monkeypatch):
    write(tmp_path / "a.txt", "x")
    write(tmp_path / "b.txt", "x")
    (tmp_path / "link.txt").symlink_to("b.txt")
    monkeypatch.chdir(tmp_path)
    given_paths = [Path("b.txt"), Path("a.txt"), Path("link.txt"), Path("./b.txt"), tmp_path]
    assert expand_files(given_paths) == (tmp_path / "b.txt", tmp_path / "a.txt")


def test_links_keep_their_own_name(tmp_path):
    # A hub cache links `data.jsonl` to a blob without a suffix.
    write(tmp_path / "blob", json_lines(["x"]))
    (tmp_path / "data.jsonl").symlink_to("blob")
    (file,) = expand_files([tmp_path / "data.jsonl"])
    assert list(read_documents(file)) == ["x"]


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(NotFound, match=r"gone\.txt"):
        expand_files([tmp_path / "gone.txt"])
    (tmp_path / "broken").symlink_to("nowhere")
    with pytest.raises(NotFound, match="broken"):
        expand_files([tmp_path / "broken"])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Refused, match="not a regular file"):
        expand_files([tmp_path / "pipe"])
    with pytest.raises(UsageError, match="no file"):
        expand_files([])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="empty"):
        expand_files([tmp_path / "empty"])
    with pytest.raises(NotFound):
        expand_files([Path("nul\0byte")])


def test_folder_that_cannot_be_opened_is_not_passed_over(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    write(tmp_path / "a.txt", "x")
    scandir = os.scandir

    def guarded(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(StorageError, match="Permission denied"):
        expand_files([tmp_path])


def test_file_name_that_is_not_utf8_is_refused(tmp_path):
    name = os.fsdecode(b"caf\xe9.txt")
    try:
        write(tmp_path / name, "x")
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    with pytest.raises(Refused, match="not UTF-8"):
        expand_files([tmp_path])


# --- reading -----------------------------------------------------------------------------


@pytest.mark.parametrize("ascii_only", [True, False])
def test_the_same_documents_from_every_format(tmp_path, ascii_only):
    lines = json_lines(TEXTS, ensure_ascii=ascii_only)
    files = [
        write(tmp_path / "a.jsonl", lines),
        write(tmp_path / "b.JSONL.gz", gzip.compress(lines)),
        write(tmp_path / "c.jsonl.gz", gzip.compress(lines[:9]) + gzip.compress(lines[9:])),
        write(tmp_path / "d.jsonl", b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n\r\n")[:-4]),
        write_parquet(tmp_path / "e.parquet", TEXTS, row_group_size=2),
        write_parquet(tmp_path / "f.parquet", TEXTS, kind=pa.large_string()),
    ]
    dictionary = pa.table({"text": pa.array(TEXTS).dictionary_encode()})
    parquet.write_table(dictionary, tmp_path / "g.parquet")
    for file in [*files, tmp_path / "g.parquet"]:
        assert list(read_documents(file)) == TEXTS, file.name


def test_other_files_are_one_document_each_and_exact(tmp_path):
    files = [write(tmp_path / f"{i}.py", text) for i, text in enumerate(TEXTS)]
    assert list(read_files(files)) == TEXTS
    marked = write(tmp_path / "bom.txt", "\ufeffwith \ufeff mark\r\n")
    assert list(read_documents(marked)) == ["with \ufeff mark\r\n"]


def test_empty_documents_are_passed_over(tmp_path):
    assert list(read_documents(write(tmp_path / "empty.txt", ""))) == []
    assert list(read_documents(write(tmp_path / "bom.txt", b"\xef\xbb\xbf"))) == []
    assert list(read_documents(write(tmp_path / "a.jsonl", json_lines(["", "x", ""])))) == ["x"]
    assert list(read_documents(write_parquet(tmp_path / "a.parquet", ["", "x"]))) == ["x"]
    assert list(read_documents(write(tmp_path / "blank.jsonl", "\n \n"))) == []


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_field(tmp_path, suffix):
    file = tmp_path / f"a{suffix}"
    if suffix == ".jsonl":
        write(file, json_lines(["x"], field="a.b"))
    else:
        write_parquet(file, ["x"], field="a.b")
    assert list(read_documents(file, field="a.b")) == ["x"]
    with pytest.raises(Refused, match="'text'") as raised:
        list(read_documents(file))
    assert "'a.b'" in raised.value.hint


LINES = {
    "truncated JSON": ('{"text": "x"', "not JSON"),
    "no JSON": ("hello", "not JSON"),
    "raw newline in a string": ('{"text": "x\ny"}', "not JSON"),
    "array": ('["x"]', "not a JSON object"),
    "string": ('"x"', "not a JSON object"),
    "missing field": ('{"txt": "x"}', "no field 'text'"),
    "null": ('{"text": null}', "not a string but null"),
    "number": ('{"text": 1}', "not a string but int"),
    "list": ('{"text": ["x"]}', "not a string but list"),
    "lone surrogate": (r'{"text": "a\ud83d"}', r"surrogate \(U\+D83D\)"),
    "nested too deep": ('{"text": ' + "[" * 100_000, "cannot be read"),
    "giant integer": ('{"text": ' + "1" * 5_000 + "}", "cannot be read"),
    "mark in the middle": ('\ufeff{"text": "x"}', "not JSON"),
    "NUL": ('{"text": "\0"}', "NUL"),
    "invalid UTF-8": (b'{"text": "\xff"}', "not UTF-8"),
    "encoded surrogate": (b'{"text": "\xed\xa0\x80"}', "not UTF-8"),
}


@pytest.mark.parametrize("name", LINES)
def test_bad_line_is_named(tmp_path, name):
    line, message = LINES[name]
    data = line.encode() if isinstance(line, str) else line
    file = write(tmp_path / "a.jsonl", b'{"text": "good"}\n\n' + data + b"\n")
    documents = read_documents(file)
    assert next(documents) == "good"
    with pytest.raises(Refused, match=message) as raised:
        next(documents)
    assert f"{file}, line 3" in raised.value.message
    assert raised.value.hint


def test_escaped_nul_is_text(tmp_path):
    # A raw NUL is the mark of a binary file; an escaped one was written on purpose.
    assert list(read_documents(write(tmp_path / "a.jsonl", r'{"text": "\u0000"}'))) == ["\0"]


@pytest.mark.parametrize(
    "data",
    ["text".encode("utf-16"), b"\xff\xfe", b"caf\xe9", gzip.compress(b"text", mtime=0), b"a\0b"],
)
def test_files_that_are_not_text(tmp_path, data):
    file = write(tmp_path / "a.txt", data)
    with pytest.raises(Refused, match=r"a\.txt") as raised:
        list(read_documents(file))
    assert ".jsonl" in raised.value.hint


def test_damaged_gzip(tmp_path):
    whole = gzip.compress(json_lines([random.Random(0).randbytes(3000).hex()] * 20))
    flipped = bytearray(whole)
    flipped[-6] ^= 1  # the checksum
    for data in (whole[:-20], whole[:500], whole[:3], bytes(flipped), b"plain text", whole + b"x"):
        with pytest.raises(Refused, match="not a whole gzip file"):
            list(read_documents(write(tmp_path / "a.jsonl.gz", data)))


def test_line_and_file_caps(tmp_path, monkeypatch):
    line = json_lines(["x" * 200])
    monkeypatch.setattr(reading, "LONGEST_LINE", len(line))
    monkeypatch.setattr(reading, "LARGEST_TEXT", 200)
    assert list(read_documents(write(tmp_path / "a.jsonl", line * 2))) == ["x" * 200] * 2
    for name, data in (("b.jsonl", line + b" " + line), ("b.jsonl.gz", None)):
        data = data or gzip.compress(line + b" " + line)
        with pytest.raises(Refused, match="line 2: a line is longer than"):
            list(read_documents(write(tmp_path / name, data)))
    assert list(read_documents(write(tmp_path / "a.txt", "x" * 200))) == ["x" * 200]
    with pytest.raises(Refused, match="larger than 200"):
        list(read_documents(write(tmp_path / "a.txt", "x" * 201)))


def test_gzip_bomb_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "LONGEST_LINE", 1 << 20)
    file = write(tmp_path / "a.jsonl.gz", gzip.compress(b"x" * (100 << 20), 1))
    tracemalloc.start()
    try:
        with pytest.raises(Refused, match="longer than"):
            list(read_documents(file))
        assert tracemalloc.get_traced_memory()[1] < 10 << 20  # of 100 MiB
    finally:
        tracemalloc.stop()


def test_parquet_that_cannot_be_read(tmp_path):
    data = write_parquet(tmp_path / "a.parquet", ["x" * 100] * 50).read_bytes()
    for broken in (data[:-10], data[: len(data) // 2], b"", b"PAR1", b"hello world, hello"):
        with pytest.raises(Refused, match="not a whole parquet file"):
            list(read_documents(write(tmp_path / "b.parquet", broken)))
    with pytest.raises(Refused, match="row 2, field 'text': not a string but null"):
        list(read_documents(write_parquet(tmp_path / "c.parquet", ["x", None])))
    with pytest.raises(Refused, match="holds int64, not strings"):
        list(read_documents(tmp_path / "c.parquet", field="id"))
    with pytest.raises(Refused, match="holds binary, not strings"):
        list(read_documents(write_parquet(tmp_path / "d.parquet", [b"x"])))
    offsets = pa.array([0, 1, 2], pa.int32()).buffers()[1]
    bad = pa.StringArray.from_buffers(2, offsets, pa.py_buffer(b"a\xff"))
    parquet.write_table(pa.table({"text": bad}), tmp_path / "e.parquet")
    with pytest.raises(Refused, match="row 2: not UTF-8"):
        list(read_documents(tmp_path / "e.parquet"))
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    parquet.write_table(twice, tmp_path / "f.parquet")
    with pytest.raises(Refused, match="several columns 'text'"):
        list(read_documents(tmp_path / "f.parquet"))


def test_no_damage_escapes_as_another_error(tmp_path):
    rng = random.Random(0)
    texts = [f"document {i} é\n" * (i % 5) for i in range(60)]
    whole = {
        "a.jsonl": json_lines(texts),
        "a.jsonl.gz": gzip.compress(json_lines(texts)),
        "a.parquet": write_parquet(tmp_path / "x.parquet", texts).read_bytes(),
    }
    refused = 0
    for name, data in whole.items():
        for _ in range(60):
            broken = bytearray(data)
            for _ in range(rng.choice([1, 5])):
                broken[rng.randrange(len(broken))] = rng.randrange(256)
            try:
                list(read_documents(write(tmp_path / name, bytes(broken))))
            except Refused:
                refused += 1
    assert refused > 60


def test_missing_and_unreadable(tmp_path, monkeypatch):
    with pytest.raises(NotFound, match="gone"):
        list(read_documents(tmp_path / "gone.jsonl"))
    with pytest.raises(StorageError, match="cannot read"):
        list(read_documents(tmp_path))


def test_reading_streams(tmp_path):
    documents = read_documents(write(tmp_path / "a.jsonl", json_lines(["one"]) + b"rubbish"))
    assert next(documents) == "one"
    with pytest.raises(Refused, match="line 2"):
        next(documents)


# --- fingerprints ------------------------------------------------------------------------


def test_scan(tmp_path):
    a = write(tmp_path / "a.jsonl", json_lines(["é", "x", "", "é", "é"]))
    b = write(tmp_path / "b.txt", "x")
    c = write(tmp_path / "c.txt", "")
    found = scan([a, b, c])
    assert found.files == (
        FileFacts(str(a), a.stat().st_size, sha256(a.read_bytes()), 4),
        FileFacts(str(b), 1, sha256(b"x"), 1),
        FileFacts(str(c), 0, sha256(b""), 0),
    )
    assert (found.documents, found.bytes, found.duplicates) == (5, 8, 3)
    texts = ["é", "x", "é", "é", "x"]
    plain = b"".join(hashlib.sha256(text.encode()).digest() for text in texts)
    assert found.digests == plain == document_digests(texts)
    assert found.content_digest == hashlib.sha256(plain).hexdigest()


def test_content_digest_is_the_documents_in_order_and_nothing_else(tmp_path):
    texts = ["one", "two\n", "three"]
    together = write(tmp_path / "all.jsonl", json_lines(texts))
    apart = [write(tmp_path / f"part{i}.txt", text) for i, text in enumerate(texts)]
    table = write_parquet(tmp_path / "renamed.parquet", texts)
    other_field = write(tmp_path / "field.jsonl", json_lines(texts, field="body"))
    digests = {
        scan([together]).content_digest,
        scan(apart).content_digest,
        scan([table]).content_digest,
        scan([other_field], field="body").content_digest,
    }
    assert len(digests) == 1
    assert scan(apart[::-1]).content_digest not in digests
    assert scan([write(tmp_path / "joined.txt", "".join(texts))]).content_digest not in digests


def test_scan_reports_progress_in_bytes_of_text(tmp_path):
    texts = ["é" * 400_000] * 5 + ["x"]
    calls = []
    found = scan([write(tmp_path / "a.jsonl", json_lines(texts))], progress=calls.append)
    assert sum(calls) == found.bytes == 4_000_001
    assert 2 <= len(calls) <= 5


def test_scan_refuses_no_text_and_files_that_change(tmp_path):
    with pytest.raises(Refused, match="no text"):
        scan([write(tmp_path / "a.jsonl", json_lines([""]))])
    file = write(tmp_path / "b.jsonl", json_lines(["x" * (2 << 20)]))

    def append(_: int) -> None:
        with file.open("ab") as more:
            more.write(json_lines(["y"]))

    with pytest.raises(Refused, match="changed while it was read"):
        scan([file], progress=append)


def test_shared_documents():
    evalset = document_digests(["a", "b", "c", "b"])
    assert shared_documents(evalset, document_digests(["x", "b", "c"])) == (1, 2, 3)
    assert shared_documents(evalset, document_digests(["A", "a "])) == ()
    assert shared_documents(b"", evalset) == shared_documents(evalset, b"") == ()
    # A digest that only appears across a border of two is no document.
    shifted = evalset[16:] + evalset[:16]
    assert shared_documents(evalset, shifted) == ()


def test_check_files(tmp_path):
    files = [write(tmp_path / f"{i}.txt", f"text {i}") for i in range(5)]
    facts = scan(files).files
    hashed = []
    assert check_files(facts, progress=hashed.append) == ()
    assert sum(hashed) == 30
    files[0].touch()  # a new date is no drift
    files[1].unlink()
    write(files[2], "TEXT 2")
    write(files[3], "text 3 and more")
    files[4].unlink()
    files[4].mkdir()
    drifts = check_files(facts)
    assert drifts[:3] == (
        FileDrift(str(files[1]), "missing"),
        FileDrift(str(files[2]), "changed"),
        FileDrift(str(files[3]), "changed"),
    )
    assert [drift.path for drift in drifts[3:]] == [str(files[4])]
    same_size = FileFacts(str(files[4]), files[4].stat().st_size, "0" * 64, 1)
    assert check_files([same_size]) == (FileDrift(str(files[4]), "unreadable"),)
    below_a_file = FileFacts(str(files[0] / "x"), 1, "0" * 64, 1)
    assert check_files([below_a_file]) == (FileDrift(str(files[0] / "x"), "missing"),)


# --- base units --------------------------------------------------------------------------


def plain_cuts(documents: list[bytes], of: int) -> list[int]:
    """The rule of `unit_documents` on the whole text at once."""
    total, start, cuts = sum(map(len, documents)), 0, [0]
    for data in documents:
        end = start + len(data)
        for i in range(1, of):
            target = total * i // of
            if start < target <= end:
                line_end = data.find(b"\n", target - start - 1) + 1
                whole = len(data) * 100 * of <= total or not line_end
                cuts.append(end if whole else start + line_end)
        start = end
    return [*cuts, total]


line = st.text(st.sampled_from("ab é🙂\n\r"), min_size=0, max_size=12)
documents_of_lines = st.lists(st.lists(line, max_size=8).map("\n".join).filter(bool), min_size=1)
many_short_documents = st.lists(st.sampled_from(["a", "b\n", "cé\nd"]), min_size=150, max_size=500)


@given(st.one_of(documents_of_lines, many_short_documents), st.integers(1, 9))
def test_units_follow_the_rule(documents, of):
    encoded = [document.encode() for document in documents]
    text, total = b"".join(encoded), sum(map(len, encoded))
    cuts = plain_cuts(encoded, of) if of <= total else [0, 0]
    if any(a >= b for a, b in pairwise(cuts)):
        with pytest.raises(UsageError):
            unit_facts(documents, of=of, total_bytes=total)
        return
    units = [
        list(unit_documents(iter(documents), i, of=of, total_bytes=total)) for i in range(1, of + 1)
    ]
    joined = ["".join(unit).encode() for unit in units]
    assert joined == [text[a:b] for a, b in pairwise(cuts)]
    assert all(piece for unit in units for piece in unit)
    assert unit_facts(documents, of=of, total_bytes=total) == tuple(
        UnitFacts(sha256(document_digests(unit)), len(unit), len(data))
        for unit, data in zip(units, joined, strict=True)
    )
    longest = max(len(part) + 1 for data in encoded for part in data.split(b"\n"))
    slack = max(longest, total / of / 100) + 1
    assert all(abs(len(data) - total / of) < slack for data in joined)


@given(documents_of_lines, st.integers(1, 5))
def test_units_never_cut_a_line_and_keep_documents_apart(documents, of):
    total = sum(len(document.encode()) for document in documents)
    try:
        units = [
            list(unit_documents(documents, i, of=of, total_bytes=total)) for i in range(1, of + 1)
        ]
    except UsageError:
        return
    pieces = [piece for unit in units for piece in unit]
    rest = iter(pieces)
    for document in documents:
        made = next(rest)
        while len(made) < len(document):
            assert made.endswith("\n")
            made += next(rest)
        assert made == document
    assert next(rest, None) is None


def test_one_unit_is_the_whole_partition(tmp_path):
    found = scan([write(tmp_path / "a.jsonl", json_lines(TEXTS))])
    assert list(unit_documents(TEXTS, 1, of=1, total_bytes=found.bytes)) == TEXTS
    assert unit_facts(TEXTS, of=1, total_bytes=found.bytes) == (
        UnitFacts(found.content_digest, len(TEXTS), found.bytes),
    )


def test_short_documents_stay_whole_and_long_ones_are_cut_at_line_ends():
    short = [f"{i:03}\nabc" for i in range(301)]  # 7 bytes of 2107
    halves = [list(unit_documents(short, i, of=2, total_bytes=2107)) for i in (1, 2)]
    assert halves == [short[:151], short[151:]]
    long = ["".join(f"{i:03}\n" for i in range(100))]
    thirds = [list(unit_documents(long, i, of=3, total_bytes=400)) for i in (1, 2, 3)]
    assert [len(third[0]) for third in thirds] == [136, 132, 132]
    assert [third[0][:4] for third in thirds] == ["000\n", "034\n", "067\n"]


@pytest.mark.parametrize(("last", "first_unit"), [("end.\n", 1005), ("end\n", 1000)])
def test_short_means_one_percent_of_a_unit(last, first_unit):
    # The document around the middle has 10 bytes: exactly 1% of 1000, and just over 1% of 999.5.
    documents = ["abcd\n", *["1234\n6789\n"] * 199, last]
    facts = unit_facts(documents, of=2, total_bytes=1995 + len(last))
    assert facts[0].bytes == first_unit


def test_line_that_is_longer_than_a_unit():
    giant = ["a\n", "x" * 100, "b\n"]
    assert [unit.bytes for unit in unit_facts(giant, of=2, total_bytes=104)] == [102, 2]
    with pytest.raises(UsageError, match="unit 2 of 4 would be empty") as raised:
        unit_facts(giant, of=4, total_bytes=104)
    assert "fewer units" in raised.value.hint
    with pytest.raises(UsageError, match="would be empty"):
        list(unit_documents(giant, 4, of=4, total_bytes=104))


@pytest.mark.parametrize("of", [0, -1, 11])
def test_impossible_numbers_of_units(of):
    with pytest.raises(UsageError):
        unit_facts(["0123456789"], of=of, total_bytes=10)


@pytest.mark.parametrize("index", [0, 3, -1])
def test_unit_outside_the_partition(index):
    with pytest.raises(UsageError, match=f"no unit {index} of 2"):
        unit_documents(["a\nb\n"], index, of=2, total_bytes=4)


def test_text_of_another_length_is_drift():
    for total in (7, 9):
        with pytest.raises(Drift, match=f"8 bytes where {total}"):
            list(unit_documents(["ab\n\n", "cd\n\n"], 2, of=2, total_bytes=total))


def test_units_stream():
    def endless():
        while True:
            yield "line\n"

    unit = unit_documents(endless(), 1, of=2, total_bytes=20)
    assert list(unit) == ["line\n", "line\n"]


# --- evalsets as objects -----------------------------------------------------------------


@given(st.lists(any_text))
def test_evalset_round_trip(documents):
    data = encode_documents(documents)
    assert decode_documents(data) == documents
    assert data.count(b"\n") == len(documents)


@given(filled_texts)
def test_files_and_evalsets_hold_the_same_text(tmp_path_factory, documents):
    file = tmp_path_factory.mktemp("round") / "a.jsonl"
    read = list(read_documents(write(file, json_lines(documents))))
    assert decode_documents(encode_documents(read)) == documents


@pytest.mark.parametrize(
    "data",
    [
        b'"a"',
        b'"a"\n\n',
        b' "a"\n',
        b'"\\u0061"\n',
        b"1\n",
        b'{"a":1}\n',
        b'"\xff"\n',
        b'"\\ud800"\n',
        b"[" * 99999 + b"\n",
    ],
    ids=lambda data: repr(data[:12]),
)
def test_other_bytes_are_no_evalset(data):
    with pytest.raises(Refused, match="stored evalset"):
        decode_documents(data)


@given(st.binary())
def test_decoding_never_guesses(data):
    try:
        documents = decode_documents(data)
    except PoolregError:
        return
    assert encode_documents(documents) == data


def test_lone_surrogates_are_refused():
    with pytest.raises(Refused):
        encode_documents(["\ud800"])


def test_pyarrow_is_imported_for_parquet_only(tmp_path):
    file = write(tmp_path / "a.jsonl", json_lines(["x"]))
    code = (
        "import sys; from pathlib import Path; from poolreg.text.corpus import scan\n"
        "scan([Path(sys.argv[1])])\n"
        "print([m for m in ('pyarrow', 'numpy', 'torch') if m in sys.modules])"
    )
    run = [sys.executable, "-c", code, str(file)]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == "[]\n"
