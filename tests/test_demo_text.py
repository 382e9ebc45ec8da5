import importlib.util
import itertools
import json
import subprocess
import sys

import pytest

from poolreg.errors import NotFound
from poolreg.text import demo_text
from poolreg.text.corpus import read_documents, scan, shared_documents
from poolreg.text.demo_text import write_demo_text


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return write_demo_text(tmp_path_factory.mktemp("demo"))


@pytest.fixture
def texts(demo):
    return {name: list(read_documents(path)) for name, path in demo.partitions.items()}


@pytest.fixture
def held_out(demo):
    return {name: list(read_documents(path)) for name, path in demo.evalsets.items()}


def passages(name, text):
    parts = text.split("\n" if name in ("names", "tables") else "\n\n")
    return {" ".join(part.split()) for part in parts} - {""}


def bytes_of(documents):
    return sum(len(document.encode()) for document in documents)


def test_partitions_are_several_and_of_equal_size(demo, texts):
    assert 4 <= len(demo.partitions) <= 5
    sizes = {name: bytes_of(documents) for name, documents in texts.items()}
    assert min(sizes.values()) > 300_000
    assert max(sizes.values()) - min(sizes.values()) < 500  # a line
    assert max(sizes.values()) <= 400_000


def test_every_partition_has_an_evalset_and_more_are_out_of_domain(demo, held_out):
    assert list(demo.evalsets)[: len(demo.partitions)] == list(demo.partitions)
    assert 1 <= len(demo.evalsets) - len(demo.partitions) <= 2
    for name, documents in held_out.items():
        assert 15_000 < bytes_of(documents) <= 40_000, name
        assert len(documents) >= 5


def test_documents_are_many_short_and_different(demo, texts):
    for name, documents in texts.items():
        assert len(documents) > 50
        assert max(len(document.encode()) for document in documents) < 5_000, name
        assert all(document.endswith("\n") for document in documents), name
        assert scan([demo.partitions[name]]).duplicates == 0


def test_no_passage_stands_twice(texts, held_out):
    # Documents are cut at line ends, so a cut passage shows as two parts; whole ones never repeat.
    for name, documents in texts.items():
        train = set().union(*(passages(name, document) for document in documents))
        held = set().union(*(passages(name, document) for document in held_out[name]))
        long = {passage for passage in train & held if len(passage) > 80}
        assert len(long) <= len(held) // 100, name


def test_no_document_of_an_evalset_stands_in_a_partition(demo):
    partitions = [scan([path]).digests for path in demo.partitions.values()]
    for path, partition in itertools.product(demo.evalsets.values(), partitions):
        assert shared_documents(scan([path]).digests, partition) == ()


def test_held_out_files_are_not_shared(demo):
    def sources(path):
        return {json.loads(line)["source"] for line in path.read_text("utf-8").splitlines()}

    for name, path in demo.partitions.items():
        assert sources(path).isdisjoint(sources(demo.evalsets[name]))


def test_kinds_differ_clearly(texts, held_out):
    # Each evalset shares more six-character strings with its own partition than with any other.
    def grams(documents):
        return {text[i : i + 6] for text in documents for i in range(len(text) - 6)}

    known = {name: grams(documents) for name, documents in texts.items()}
    for name in texts:
        found = grams(held_out[name])
        shares = {other: len(found & grams) / len(found) for other, grams in known.items()}
        own = shares.pop(name)
        assert own > 1.3 * max(shares.values()), (name, own, shares)


def test_notes_say_what_is_there(demo):
    for name in demo.evalsets:
        assert any(note.startswith(f"{name}: ") for note in demo.notes)


def test_the_same_installation_gives_the_same_bytes(tmp_path):
    first = write_demo_text(tmp_path / "a", partition_bytes=20_000, evalset_bytes=5_000)
    again = write_demo_text(tmp_path / "b", partition_bytes=20_000, evalset_bytes=5_000)
    for old, new in ((first.partitions, again.partitions), (first.evalsets, again.evalsets)):
        assert list(old) == list(new)
        assert all(old[name].read_bytes() == new[name].read_bytes() for name in old)
    assert first.notes == again.notes
    assert bytes_of(read_documents(first.partitions["prose"])) <= 20_000


def test_writing_again_replaces(tmp_path):
    small = {"partition_bytes": 10_000, "evalset_bytes": 2_000}
    first = write_demo_text(tmp_path, **small)
    before = {name: path.read_bytes() for name, path in first.partitions.items()}
    first.partitions["prose"].write_text("something else")
    assert write_demo_text(tmp_path, **small) == first
    assert {name: path.read_bytes() for name, path in first.partitions.items()} == before


def made_of(word, count=40):
    files = [(f"{word}{i}", f"{word} {i}\n" + f"{word} {i} " * 60) for i in range(count)]
    return demo_text._Kind(word, f"made of {word}", lambda: files)


def test_a_missing_kind_is_replaced_and_noted(tmp_path, monkeypatch):
    made = [made_of(word) for word in "abcdef"]
    made[1] = made_of("b", count=0)
    monkeypatch.setattr(demo_text, "_IN_DOMAIN", tuple(made))
    monkeypatch.setattr(demo_text, "_OUT_OF_DOMAIN", (made[1],))
    demo = write_demo_text(tmp_path, partition_bytes=5_000, evalset_bytes=1_000)
    assert list(demo.partitions) == ["a", "c", "d", "e", "f"]
    assert list(demo.evalsets) == ["a", "c", "d", "e", "f"]
    assert [note for note in demo.notes if note.startswith("b: left out")]


def test_fewer_than_three_kinds_are_refused(tmp_path, monkeypatch):
    made = [made_of(word) for word in "ab"]
    monkeypatch.setattr(demo_text, "_IN_DOMAIN", tuple(made))
    with pytest.raises(NotFound, match="only 2 of the texts"):
        write_demo_text(tmp_path / "demo", partition_bytes=5_000, evalset_bytes=1_000)
    assert not (tmp_path / "demo").exists()


def test_a_minimal_python_still_has_enough(tmp_path, monkeypatch):
    # No torch, no numpy, no IDLE, no distribution metadata.
    for name in ("_headers", "_licences", "_stubs", "_news", "_readmes"):
        empty = demo_text._Kind(name, "nothing", lambda: iter(()))
        for kinds in ("_IN_DOMAIN", "_OUT_OF_DOMAIN"):
            old = getattr(demo_text, kinds)
            new = [empty if kind.files.__name__ == name else kind for kind in old]
            monkeypatch.setattr(demo_text, kinds, tuple(new))
    demo = write_demo_text(tmp_path)
    assert list(demo.partitions) == ["prose", "code", "names", "tables"]
    assert list(demo.evalsets) == ["prose", "code", "names", "tables"]


def test_pieces_are_cut_at_line_ends_and_lose_nothing():
    text = "".join(f"line {i} é\n" for i in range(2_000)) + "x" * 9_000 + "\nend" + "." * 300
    pieces = list(demo_text._pieces(text, 1_000))
    assert "".join(pieces) == text
    assert all(piece.endswith("\n") for piece in pieces[:-1])
    assert all(len(p.encode()) <= 1_000 for p in pieces if "xx" not in p)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_torch_is_looked_at_but_not_imported(tmp_path):
    code = (
        "import sys; from pathlib import Path; from poolreg.text.demo_text import write_demo_text\n"
        "demo = write_demo_text(Path(sys.argv[1]), partition_bytes=5000, evalset_bytes=1000)\n"
        "print('cpp' in demo.partitions, 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    run = [sys.executable, "-c", code, str(tmp_path)]
    out = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert out == "True False False\n"
