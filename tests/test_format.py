"""docs/format.md is enough to read a pool, and is true.

`format_rules` and `format_reader` were written from it and from nothing else. They read pools
that poolreg wrote, agree with it on every rule under hypothesis, and the document names what the
code knows: kinds, fields, folders, files, lists of keys.
"""

import io
import json
import math
import re
import shutil
import struct
import tarfile
from datetime import timedelta
from pathlib import Path

import format_rules as rules
import pools
import pytest
from format_reader import PoolReader, pool_id, record_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_canonical import json_values

from poolreg import Pool
from poolreg.canonical import canonical_json, sha256
from poolreg.errors import NameRefused, UsageError
from poolreg.mixture import check_stored_name
from poolreg.sharing.contents import STAYING
from poolreg.sharing.shapes import SHAPES
from poolreg.store import journal, marker
from poolreg.store.indexing import SCHEMA_VERSION
from poolreg.store.records import KINDS, name, transfer, trust
from poolreg.text.units import unit_documents
from poolreg.upkeep import compact
from poolreg.verification import hashing, mend, quarantine
from poolreg.weights import family, tokenizer_files

DOCUMENT = (Path(__file__).parents[1] / "docs" / "format.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##)", DOCUMENT, re.MULTILINE | re.DOTALL))


# -- pools ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def used(tiny, tmp_path_factory) -> Path:
    """A pool with records of every kind; never change it."""
    folder = tmp_path_factory.mktemp("used")
    (folder / "results.json").write_text(json.dumps({"results": {"arc": {"acc,none": 0.5}}}))
    prose = pools.write_prose(folder / "prose.jsonl", 40)
    with Pool.open(tiny.copy(folder / "pool")) as pool:
        pool.add_evalset("prose", [prose])
        pool.add_partition("shared", [prose], units=2)
        pool.keep_merge("3*alpha+beta", "kept")
        pool.ask(["2*alpha+beta/1", "kept"], on=["alpha", "prose"], scheme="macro")
        pool.race(pool.plan_sweep(["alpha+gamma"], ["prose"]))
        pool.compress("alpha", [0.3], calibrate="prose", tokens=300)
        pool.import_scores(folder / "results.json", "kept")
        pool.remove("evalset", "beta")
        pool.registry.record(
            name("evalset", "hub/wiki", pool.registry.names("evalset")["gamma"]),
            trust(pool.registry.names("model")["base"]),
            transfer("push", "me/pool", version="", records=0, objects=0, bytes=0, left=[],
                     repo_type="model", revision=None),
        )  # fmt: skip
    return folder / "pool"


def test_a_used_pool_is_read_from_the_document_alone(used):
    reader = PoolReader(used)
    done = reader.check()
    assert done.keys() == KINDS.keys()
    assert done["evaluation"] == 4 + 2 + 1  # asked for, the seed beside them, and raced
    with Pool.open(used) as pool:
        for space in ("partition", "model", "evalset"):
            assert reader.names(space) == pool.registry.names(space)
        assert reader.id == pool.registry.id
        (row,) = pool.registry.select(
            "evaluations", digests=[next(iter(reader.records["evaluation"]))]
        )
    assert reader.records["evaluation"][row["digest"]].body["nll"] == row["nll"]


@pytest.mark.slow
def test_a_pool_with_references_is_read(referenced):
    done = PoolReader(referenced.root).check()
    assert done["model"] == 16
    assert done["mixture"] >= 15


def test_what_is_changed_is_found(used, tmp_path):
    root = Path(shutil.copytree(used, tmp_path / "pool"))
    evaluation = next(iter(PoolReader(root).records["evaluation"].values()))
    path = (
        root
        / "objects"
        / evaluation.body["document_scores"][:2]
        / evaluation.body["document_scores"][2:]
    )
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(rules.Wrong, match="object"):
        PoolReader(root).check()
    segment = max((root / "journal").iterdir(), key=lambda file: file.stat().st_size)
    segment.write_bytes(segment.read_bytes().replace(b'"kind"', b'"kinD"', 1))
    with pytest.raises(rules.Wrong, match="checksum"):
        PoolReader(root)
    (root / "FORMAT").write_bytes((root / "FORMAT").read_bytes().replace(b'"id":"', b'"id":"0', 1))
    with pytest.raises(rules.Wrong, match="FORMAT"):
        pool_id(root)


def test_sums_that_do_not_agree_are_found(used, tmp_path):
    root = Path(shutil.copytree(used, tmp_path / "pool"))
    reader = PoolReader(root)
    record = next(iter(reader.records["evaluation"].values()))
    body = {**record.body, "nll": math.nextafter(record.body["nll"], 0)}
    earlier = journal.Record(
        "evaluation", record.id, body, record.objects, "2020-01-01T00:00:00.000000Z"
    )
    (root / "journal" / "other.jsonl").write_bytes(earlier.line())
    with pytest.raises(rules.Wrong, match="sums of evaluation"):
        PoolReader(root).check()


def test_a_torn_end_says_nothing(used, tmp_path):
    root = Path(shutil.copytree(used, tmp_path / "pool"))
    for segment in (root / "journal").iterdir():
        with open(segment, "ab") as file:
            file.write(b'12345678 {"at":"20')
    assert PoolReader(root).check() == PoolReader(used).check()


def test_a_compacted_and_collected_pool_is_read(used, tmp_path):
    root = Path(shutil.copytree(used, tmp_path / "pool"))
    with Pool.open(root) as pool:
        pool.compact()
        before = PoolReader(root).check()
        pool.remove("model", "beta/2")
        pool.gc(grace=timedelta(0))
    reader = PoolReader(root)
    after = reader.check()
    assert {kind for kind, _ in reader.removed()} == {"model", "evalset"}
    assert reader.absent  # and yet nothing else is missed
    assert after["model"] == before["model"] - 1
    assert after["evalset"] == before["evalset"] - 1
    assert after["removal"] == before["removal"] + 1


def test_a_bundle_is_a_pool_without_a_marker(used, tmp_path):
    with Pool.open(used) as pool:
        pool.create_bundle(tmp_path / "pool.tar", merges=True)
    data = (tmp_path / "pool.tar").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = tar.getmembers()
        files = {member.name: tar.extractfile(member).read() for member in members}  # type: ignore[union-attr]
    assert [m.name for m in members] == sorted(
        files,
        key=lambda path: (["poolreg.json", "journal", "objects"].index(path.split("/")[0]), path),
    )
    assert all((m.mode, m.mtime, m.uid, m.gname) == (0o644, 0, 0, "") for m in members)
    end = sum(512 + -(-m.size // 512) * 512 for m in members)
    assert data[end:] == bytes(1024)
    assert files.pop("poolreg.json") == b'{"format":1}'
    root = tmp_path / "pool"
    for path, text in files.items():
        folder, _, rest = path.partition("/")
        named = rest.removesuffix(".jsonl") if folder == "journal" else rest.replace("/", "")
        assert named == sha256(text)
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(text)
    (root / "FORMAT").write_bytes(b'{"format":1,"id":"made before there was a checksum"}')
    reader = PoolReader(root)
    done = reader.check()
    assert done.keys() == KINDS.keys() - STAYING
    (calibration,) = reader.records["calibration"].values()
    assert not calibration.objects


# -- rules ---------------------------------------------------------------------------------

bits = st.integers(0, 2**64 - 1).map(lambda n: struct.unpack("<d", struct.pack("<Q", n))[0])
floats = st.one_of(
    bits.filter(math.isfinite),
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(-1074, 1023).map(lambda exponent: 2.0**exponent),  # gaps of two sizes around it
    st.integers(2**52, 2**53).map(lambda n: n * 2.0**-50),  # ends in 5: ties of 17 digits
    st.integers(-400, 400).map(lambda n: float(f"1e{n % 300 - 20}")),
)


@given(floats)
@example(2.0**-44)
@example(3.21633148193359375)
@example(5e-324)
@example(-0.0)
@example(9.5e-05)
def test_floats(value):
    assert rules.canonical(value) == canonical_json(value)


@given(json_values)
def test_canonical_json(value):
    assert rules.canonical(value) == canonical_json(value)
    assert rules.digest(value) == sha256(canonical_json(value))


texts = st.text(st.sampled_from("ab\né"), min_size=1, max_size=40)


@given(st.lists(texts, min_size=1, max_size=8), st.integers(1, 6))
def test_base_units(documents, units):
    total = sum(len(text.encode()) for text in documents)
    mine = (
        rules.base_units([text.encode() for text in documents], units) if units <= total else None
    )
    try:
        theirs = [
            [text.encode() for text in unit_documents(documents, unit, of=units, total_bytes=total)]
            for unit in range(1, units + 1)
        ]
    except UsageError:
        theirs = None
    assert mine == theirs


@given(st.lists(st.integers(1, 40), min_size=100, max_size=150), st.integers(1, 3))
@settings(max_examples=30)
def test_short_documents_are_not_cut(lengths, units):
    documents = [("x" * (n - 1) + "\n") if n % 3 else "y" * n for n in lengths]
    mine = rules.base_units([text.encode() for text in documents], units)
    total = sum(lengths)
    assert mine == [
        [text.encode() for text in unit_documents(documents, unit, of=units, total_bytes=total)]
        for unit in range(1, units + 1)
    ]


@given(st.text(max_size=6) | st.text(st.sampled_from("al-l.e1/_²Ⅷ一\u0301é٣ "), max_size=8))
@example("all-c")
@example("1e5")
@example("a" * 101)
@example("e\u0301")
def test_names(text):
    try:
        accepted = check_stored_name(text) == text
    except NameRefused:
        accepted = False
    assert rules.is_name(text) == accepted


keys = st.sampled_from([*family._VOLATILE, "_attn_implementation", "hidden_size", "rope"])
configs = st.recursive(
    st.booleans(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(keys, configs, max_size=3))
def test_configurations(config):
    assert rules.configuration(config) == family.canonical_config(config)


PARTS = [
    None,
    {"type": "ByteLevel", "add_prefix_space": False},
    {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A"}}]},
    {"type": "TemplateProcessing", "single": [{"SpecialToken": {}}, {"Sequence": {}}]},
    {
        "type": "Sequence",
        "processors": [{"type": "ByteLevel", "use_regex": False}, {"type": "ByteLevel"}],
    },
]
MODELS = [
    {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b", "b c"], "dropout": None, "unk_token": ""},
    {"vocab": {"a": 0}, "merges": [["a", "b"]], "byte_fallback": False, "prefix": "x"},
    {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "", "fuse": False},
    {"type": "Unigram", "vocab": [["a", -1.5]], "unk_id": None},
]
fragments = st.fixed_dictionaries(
    {"model": st.sampled_from(MODELS)},
    optional={
        "added_tokens": st.just([{"id": 0, "content": "<s>"}]),
        "normalizer": st.sampled_from(PARTS),
        "pre_tokenizer": st.sampled_from(PARTS),
        "post_processor": st.sampled_from(PARTS),
        "version": st.just("1.0"),
        "padding": st.none(),
    },
)
tokens = st.sampled_from([None, "<s>", {"content": "</s>", "lstrip": False}])
habits = st.fixed_dictionaries({}, optional={
    "tokenizer_class": st.sampled_from(
        ["GPT2TokenizerFast", "LlamaTokenizer", "TokenizersBackend", "PreTrainedTokenizerFast", None]
    ),
    "bos_token": tokens, "eos_token": tokens, "unk_token": tokens, "pad_token": tokens,
    "add_bos_token": st.booleans(), "add_prefix_space": st.booleans(), "legacy": st.booleans(),
    "do_lower_case": st.booleans(), "model_max_length": st.just(10**30),
})  # fmt: skip
VOCABULARY = st.sampled_from([*tokenizer_files._VOCABULARIES, "x.tiktoken", "added_tokens.json"])


@given(
    st.none() | fragments, st.none() | habits, st.none() | habits, st.sets(VOCABULARY, max_size=3)
)
def test_tokenizers(tmp_path_factory, whole, config, special, others):
    said = {
        "tokenizer.json": whole,
        "tokenizer_config.json": config,
        "special_tokens_map.json": special,
    }
    files = {name: json.dumps(value).encode() for name, value in said.items() if value is not None}
    files |= {name: name.encode() for name in others}
    folder = tmp_path_factory.mktemp("tokenizer")
    for file, data in files.items():
        (folder / file).write_bytes(data)
    theirs = tokenizer_files.read_tokenizer(folder)
    assert rules.tokenizer(files) == (theirs and theirs.digest)
    shutil.rmtree(folder)


# -- the document --------------------------------------------------------------------------


def _fields(shape):
    """Yield the names of all fields of a shape."""
    if isinstance(shape, dict):
        for key, inner in shape.items():
            yield key
            yield from _fields(inner)
    elif isinstance(shape, list):
        for inner in shape:
            yield from _fields(inner)


def test_every_kind_is_described():
    assert SECTIONS.keys() == KINDS.keys()


@pytest.mark.parametrize("kind", SHAPES)
def test_every_field_that_is_pulled_is_described(kind):
    missing = {field for field in _fields(SHAPES[kind]) if f"`{field}`" not in SECTIONS[kind]}
    assert not missing


def test_every_field_that_was_written_is_described(used):
    for kind, found in PoolReader(used).records.items():
        for record in found.values():
            parts = [
                item for value in record.body.values() if isinstance(value, list) for item in value
            ]
            for body in [record.body, *(part for part in parts if isinstance(part, dict))]:
                assert {field for field in body if f"`{field}`" not in SECTIONS[kind]} == set()


def test_what_stays_is_said_to_stay():
    assert {kind for kind, text in SECTIONS.items() if "Stays." in text} == STAYING
    assert all(("Travels" in text) != ("Stays." in text) for text in SECTIONS.values())


def test_every_folder_and_file_is_named(used):
    for path in [*used.iterdir(), *(used / "locks").iterdir()]:
        assert re.search(rf"(?<!\w){path.name}\b", DOCUMENT), path.name
    staged = (compact._STAGED, mend._STAGED, mend._LOST, "verify.json", "catalog.tmp")
    for text in (*staged, f"{quarantine.NAME}/"):
        assert f"`{text}`" in DOCUMENT or text in DOCUMENT.split("## Canonical JSON")[0], text
    with Pool.open(used) as pool:
        assert hashing.Cursor.file(pool.registry).name == "verify.json"


def test_lists_of_keys_are_whole():
    assert rules.VOLATILE == family._VOLATILE
    assert rules.VOCABULARIES == tokenizer_files._VOCABULARIES
    for key in (*family._VOLATILE, *tokenizer_files._VOCABULARIES, *tokenizer_files._BESIDE):
        assert f"`{key}`" in DOCUMENT, key


def test_versions_are_those_of_the_code():
    row = re.search(r"\| the catalog \| `catalog_info` \| (\d+) \|", DOCUMENT)
    assert row
    assert int(row[1]) == SCHEMA_VERSION
    assert (journal.VERSION, marker.VERSION) == (1, 1)


def test_the_examples_are_real(tmp_path):
    lines = re.findall(r"^    ([0-9a-f]{8} \{.*\})$", DOCUMENT, re.MULTILINE)
    partition, naming = (record_of(line.encode()) for line in lines)
    documents = [b"one\ntwo\nthree\n", b"vier"]
    units = rules.base_units(documents, 2)
    assert [{"documents": len(u), "bytes": len(b"".join(u))} for u in units or ()] == [
        {key: unit[key] for key in ("documents", "bytes")} for unit in partition.body["units"]
    ]
    (tmp_path / "pool" / "journal").mkdir(parents=True)
    (tmp_path / "pool" / "journal" / "doc.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (example_marker,) = re.findall(r"^    (\{\"crc32\".*\})$", DOCUMENT, re.MULTILINE)
    (tmp_path / "pool" / "FORMAT").write_text(example_marker)
    digests = b"".join(bytes.fromhex(sha256(text)) for text in documents)
    place = tmp_path / "pool" / "objects" / sha256(digests)[:2] / sha256(digests)[2:]
    place.parent.mkdir(parents=True)
    place.write_bytes(digests)
    reader = PoolReader(tmp_path / "pool")
    assert reader.check() == {"partition": 1, "name": 1}
    assert reader.names("partition") == {"zahlen": partition.id}
    assert naming.body["target"] == partition.id


def test_the_forms_in_the_table_are_canonical():
    (table,) = re.findall(
        r"\| value \| form \| value \| form \|\n\|---.*?\n(.*?)\n\n", DOCUMENT, re.DOTALL
    )
    forms = re.findall(r"`(.*?)`", table)
    values = [1e15, 10**20, 1e16, 2.0**-44, 0.0001, 5e-324, 0.00001, {"é": 0, "z": 0, "😀": 0}]
    assert [
        canonical_json(value).decode()
        for value in values
        if f"`{canonical_json(value).decode()}`" in table
    ]
    assert set(forms) >= {canonical_json(value).decode() for value in values}
