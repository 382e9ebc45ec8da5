"""The census: what lives and what is dead, against a plain reference, since gc deletes by it."""

from __future__ import annotations

import contextlib
import itertools

import pools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from poolreg.canonical import sha256
from poolreg.errors import Damage
from poolreg.store import records
from poolreg.store.journal import Record
from poolreg.store.registry import Registry
from poolreg.upkeep.census import Counter, census
from poolreg.verification.verify import verify

T = "2026-01-01T00:00:00.00000{}Z"
A, B, C = (sha256(text) for text in (b"a", b"b", b"c"))


def key(digest: str) -> bytes:
    return bytes.fromhex(digest)


def model(name: str, *objects: str, weights: str | None = None, at: int = 0) -> Record:
    files = [{"role": "weights", "object": weights}] if weights else []
    return Record("model", name, {"files": files}, dict.fromkeys(objects, 7), T.format(at))


def removal(kind: str, target: str, removed: bool, at: int, key: str = "") -> Record:
    body = {"kind": kind, "target": target, "removed": removed}
    return Record("removal", key or f"{target} {at}", body, {}, T.format(at))


def other(kind: str, *objects: str, **body: object) -> Record:
    return Record(kind, "x", body, dict.fromkeys(objects, 7), T.format(0))


def transfer(at: int, place: str = "me/pool", left: list[str] | None = None) -> Record:
    body = {"place": place, "repo_type": "model", "revision": None, "left": left or []}
    return Record("transfer", f"{place} {at}", body, {}, T.format(at))


def count(*given_records: Record):
    counter = Counter()
    for record in given_records:
        counter.add(record)
    return counter.census()


def test_all_live_until_removed():
    found = count(model("m", A, weights=A), other("evaluation", B), removal("model", "m", True, 1))
    assert found.records == 3
    assert found.live == {key(B): 7}
    assert found.dead == {key(A): (7, T.format(1))}
    assert found.weights == {key(A)}
    assert found.tombstones == {("model", "m"): T.format(1)}


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_latest_removal_counts_in_whatever_order_records_come(order):
    given_records = [
        model("m", A), removal("model", "m", True, 1), removal("model", "m", False, 2),
    ]  # fmt: skip
    found = count(*(given_records[number] for number in order))
    assert (found.live, found.dead, found.tombstones) == ({key(A): 7}, {}, {})


def test_of_two_removals_at_one_time_the_greater_id_counts():
    said = [removal("model", "m", True, 1, "b"), removal("model", "m", False, 1, "a")]
    assert count(model("m", A), *said).dead
    assert count(model("m", A), *reversed(said)).dead


def test_a_removal_is_of_its_kind():
    assert count(model("m", A), removal("evalset", "m", True, 1)).live == {key(A): 7}


def test_an_object_that_anything_alive_names_lives():
    tombstone = removal("model", "m", True, 1)
    for living in (model("n", A), other("evaluation", A), other("from the future", A)):
        found = count(model("m", A, B), tombstone, living)
        assert (set(found.live), set(found.dead)) == ({key(A)}, {key(B)})


def test_an_object_dies_with_the_last_record_that_names_it():
    found = count(
        model("m", A), model("n", A), removal("model", "m", True, 1), removal("model", "n", True, 5)
    )
    assert found.dead[key(A)].at == T.format(5)


@pytest.mark.parametrize(("kind", "gone"), [("model", "m"), ("partition", "p")])
def test_statistics_die_with_the_model_or_the_text(kind, gone):
    body = {"subject": "m", "text": "p", "text_kind": "partition"}
    gathered = other("calibration", C, **body)
    assert set(count(gathered).live) == {key(C)}
    assert set(count(gathered, removal(kind, gone, True, 1)).dead) == {key(C)}
    assert set(count(gathered, removal("evalset", "p", True, 1)).live) == {key(C)}


def test_what_was_left_and_how_merges_were_made():
    build = {"model": "m", "subject": "r"}
    found = count(transfer(1, left=[A]), other("build", **build), other("build", **build))
    assert found.left == {key(A)}
    assert found.builds == {"m": [build]}


def test_known_places_newest_first():
    found = count(transfer(1, "one"), transfer(3, "two"), transfer(2, "one"), transfer(5, "three"))
    assert [known.place for known in found.places] == ["three", "two", "one"]


def test_dangling_names():
    naming = {"space": "model", "name": "x", "parent": None}
    said = [
        Record("name", str(at), {**naming, "target": target}, {}, T.format(at))
        for at, target in ((1, "m"), (2, "n"))
    ]
    assert count(model("m"), model("n"), *said).dangling() == []
    assert count(model("m"), *said).dangling() == [("model", "x")]
    assert count(model("m"), *reversed(said)).dangling() == [("model", "x")]


@pytest.mark.parametrize(
    "bad",
    [
        Record("removal", "x", {"kind": "model", "target": "m"}, {}, T.format(0)),
        Record("removal", "x", {"kind": "model", "target": "m", "removed": "no"}, {}, T.format(0)),
        Record("removal", "x", {"kind": "model", "target": [], "removed": True}, {}, T.format(0)),
        Record("removal", "x", {"kind": "model", "target": "m", "removed": True}, {}, "tomorrow"),
        Record("evaluation", "x", {}, {"../../etc": 1}, T.format(0)),
        Record("evaluation", "x", {}, {A: "7"}, T.format(0)),
        Record("evaluation", "x", {}, {A: True}, T.format(0)),
        Record("model", "x", {}, {}, T.format(0)),
        Record("model", "x", {"files": [{"role": "weights", "object": 3}]}, {}, T.format(0)),
        Record("calibration", "x", {}, {A: 1}, T.format(0)),
        Record("transfer", "x", {"left": ["x"]}, {}, T.format(0)),
        Record("name", "x", {"space": "model"}, {}, T.format(0)),
    ],
)
def test_what_does_not_say_what_it_must_is_damage(bad):
    with pytest.raises(Damage, match="lacks or mistypes a field"):
        count(bad)


def test_a_bad_line_ends_the_census(tmp_path):
    with contextlib.closing(Registry.create(tmp_path / "pool")) as registry:
        registry.record(records.removal("model", A, removed=True))
        (segment,) = (registry.root / "journal").iterdir()
        data = bytearray(segment.read_bytes())
        data[20] ^= 1
        segment.write_bytes(data)
        with pytest.raises(Damage, match="checksum"):
            census(registry)


THINGS = st.sampled_from([("model", "m"), ("partition", "p"), ("evalset", "e")])
OBJECTS = st.lists(st.sampled_from([A, B, C]), max_size=2, unique=True)
MORTAL = st.builds(
    lambda thing, objects: Record(
        *thing, {"files": []}, dict.fromkeys(objects, 7), T.format(0)
    ), THINGS, OBJECTS,
)  # fmt: skip
LIVING = st.builds(lambda objects: other("evaluation", *objects), OBJECTS)
REMOVALS = st.builds(
    lambda thing, removed, at: removal(*thing, removed, at), THINGS, st.booleans(),
    st.integers(0, 9),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(MORTAL | LIVING | REMOVALS, max_size=12))
def test_against_the_plain_rule(given_records):
    said = [record for record in given_records if record.kind == "removal"]

    def is_dead(record: Record) -> bool:
        about = [r for r in said if (r.body["kind"], r.body["target"]) == (record.kind, record.id)]
        return bool(about) and max(about, key=lambda r: (r.at, r.id)).body["removed"]

    # One statement has one id, so what a time says of a thing is said once.
    said = list({(r.id, r.body["kind"]): r for r in said}.values())
    rest = [record for record in given_records if record.kind != "removal"]
    living = {digest for record in rest if not is_dead(record) for digest in record.objects}
    dying = {digest for record in rest if is_dead(record) for digest in record.objects}
    found = count(*rest, *said)
    assert {digest.hex() for digest in found.live} == living
    assert {digest.hex() for digest in found.dead} == dying - living


def test_of_a_real_pool(pool, tiny, tmp_path):
    registry = pool.registry
    before = census(registry)
    rows = registry.select("object_list")
    assert {key.hex(): size for key, size in before.live.items()} == {
        row["digest"]: row["bytes"] for row in rows
    }
    assert {key.hex() for key in before.weights} == {
        row["digest"] for row in rows if row["is_weights"]
    }
    assert (before.dead, before.dangling()) == ({}, [])
    pool.add_model(pools.unit_folder(tmp_path / "more", tiny.seed, 70), name="more")
    weights = next(f["object"] for f in pool.model("more")["files"] if f["role"] == "weights")
    pool.remove("model", "more")
    after = census(registry)
    assert set(after.dead) == {key(weights)}  # the tokenizer and the configuration are shared
    assert after.live == before.live


def test_statistics_of_a_living_model_may_be_missing(tiny, pool):
    registry = pool.registry
    model = registry.names("model")["base"]
    text = registry.names("evalset")["alpha"]
    with registry.writing():
        objects: dict[str, int] = {}
        digest = registry.put(b"gathered", objects)
        body = {
            "subject": model, "text": text, "text_kind": "evalset", "protocol": "0" * 64,
            "token_limit": 1, "tokens": 1, "held_out_tokens": 1, "largest": 1, "condition": 1.0,
            "windows": digest, "layers": [], "seconds": 1.0,
        }  # fmt: skip
        registry.record(records.keyed("calibration", "c" * 64, body, objects))
    found = census(registry)
    assert found.spare == {bytes.fromhex(digest)} <= found.live.keys()
    registry.objects.path(digest).unlink()
    verdict = verify(registry)
    assert verdict.collected == 1
    assert not [finding for finding in verdict.findings if finding.kind == "object"]
