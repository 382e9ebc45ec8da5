"""What one pool takes from another: records, names, removals; the same whatever the order."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poolreg.canonical import digest_of
from poolreg.errors import NameRefused
from poolreg.sharing.contents import Contents, incoming
from poolreg.store.journal import Record
from poolreg.store.records import fact, keyed

TARGETS = [hashlib.sha256(bytes([n])).hexdigest() for n in range(4)]
NAMES = ["code", "prose", "hub/code"]


def naming(name: str, target: str, second: int, space: str = "partition") -> Record:
    at = f"2026-01-01T00:00:{second:02d}.000000Z"
    body = {"space": space, "name": name, "target": target, "parent": None}
    return Record("name", digest_of({"kind": "name", "body": body, "at": at}), body, {}, at)


def removal(target: str, second: int, removed: bool = True, kind: str = "partition") -> Record:
    at = f"2026-01-01T00:00:{second:02d}.500000Z"
    body = {"kind": kind, "target": target, "removed": removed}
    return Record("removal", digest_of({"kind": "removal", "body": body, "at": at}), body, {}, at)


def partition(target: str) -> Record:
    return keyed("partition", target, {"it": target})


def take(theirs: list[Record], ours: list[Record], origin: str) -> list[Record]:
    """Return what is new to `ours`, as a pull appends it."""
    taken = incoming(Contents.of(theirs), Contents.of(ours), origin=origin)
    made = [record for record in taken.made if not taken.ours.has(record.kind, record.id)]
    return [record for record in theirs if taken.wants(record)] + made


def meanings(records: list[Record]) -> dict[str, str | None]:
    contents = Contents.of(records)
    return {name: contents.meaning("partition", name) for _, name in contents.namings}


def whole(records: list[Record]) -> list[Record]:
    """Return the records with those of the partitions that they are about before them."""
    targets = {record.body["target"] for record in records}
    return [partition(target) for target in sorted(targets)] + records


pools = st.lists(
    st.one_of(
        st.builds(naming, st.sampled_from(NAMES[:2]), st.sampled_from(TARGETS), st.integers(0, 9)),
        st.builds(removal, st.sampled_from(TARGETS), st.integers(0, 9), st.booleans()),
    ),
    max_size=8,
).map(whole)


@given(pools, pools)
def test_what_names_mean_here_never_changes_but_for_those_the_other_side_followed(theirs, ours):
    before, after = meanings(ours), meanings(ours + take(theirs, ours, "hub"))
    known = Contents.of(theirs)
    for name, meaning in before.items():
        present = Contents.of(ours).namings["partition", name]
        if meaning and not known.has("name", present.id):
            assert after[name] == meaning


@given(pools, pools)
def test_taking_twice_takes_nothing_more(theirs, ours):
    once = ours + take(theirs, ours, "hub")
    assert take(theirs, once, "hub") == []


@given(pools, pools)
def test_records_are_a_union_in_either_order(theirs, ours):
    def facts(records):
        return {(r.kind, r.id) for r in records if r.kind not in ("name", "removal")}

    one = facts(ours + take(theirs, ours, "hub"))
    other = facts(theirs + take(ours, theirs, "pool"))
    assert one == other == facts(ours) | facts(theirs)


@given(pools, pools)
def test_whatever_has_a_name_there_has_one_here(theirs, ours):
    after = ours + take(theirs, ours, "hub")
    contents = Contents.of(after)
    named = set(meanings(after).values())
    for name, target in meanings(theirs).items():
        followed = Contents.of(ours).has("name", Contents.of(theirs).namings["partition", name].id)
        gone = target is None or contents.removed("partition", target)
        assert gone or target in named or followed


@given(pools, pools)
def test_going_to_and_fro_comes_to_an_end(theirs, ours):
    for _ in range(4):
        theirs = theirs + (sent := take(ours, theirs, "pool"))
        ours = ours + (got := take(theirs, ours, "hub"))
    assert sent == got == []


def test_a_name_that_means_something_else_is_kept_beside_the_present_one():
    ours = [naming("code", TARGETS[0], 1)]
    theirs = [naming("code", TARGETS[1], 2), naming("prose", TARGETS[2], 2)]
    taken = incoming(Contents.of(theirs), Contents.of(ours), origin="hub")
    assert [(c.name, c.kept_as) for c in taken.clashes] == [("code", "hub/code")]
    assert meanings(ours + take(theirs, ours, "hub")) == {
        "code": TARGETS[0], "hub/code": TARGETS[1], "prose": TARGETS[2]
    }  # fmt: skip


def test_a_name_that_they_moved_after_seeing_ours_moves_here_too():
    first, moved = naming("code", TARGETS[0], 1), naming("code", TARGETS[1], 5)
    assert take([first, moved], [first], "hub") == [moved]
    assert take([first], [first, moved], "hub") == []  # and ours stays where they lag behind


def test_a_partition_is_not_given_the_name_of_a_model():
    ours = [naming("base", TARGETS[0], 1, "model")]
    theirs = [naming("base", TARGETS[1], 2, "partition")]
    (made,) = take(theirs, ours, "hub")
    assert made.body["name"] == "hub/base"


def test_a_name_whose_target_we_removed_is_free_again():
    ours = [naming("code", TARGETS[0], 1), removal(TARGETS[0], 1)]
    theirs = [naming("code", TARGETS[1], 3)]
    assert meanings(ours + take(theirs, ours, "hub"))["code"] == TARGETS[1]


def test_what_we_have_is_ours_to_remove():
    model = keyed("model", TARGETS[0], {})
    tombstone = removal(TARGETS[0], 3, kind="model")
    assert take([model, tombstone], [model], "hub") == []
    assert take([model, tombstone], [], "hub") == [model, tombstone]


def test_what_is_true_on_one_machine_only_stays_there():
    staying = [fact(kind, {"x": 1}) for kind in ("location", "transfer")]
    assert take(staying, [], "hub") == []


@given(pools, pools, pools)
def test_three_pools_by_one_name_keep_what_each_means(first, second, third):
    ours = first
    for theirs in (second, third):  # both come from places that are called hub
        before = meanings(ours)
        ours = ours + take(theirs, ours, "hub")
        for name, meaning in before.items():
            if meaning and name.startswith("hub/"):
                assert meanings(ours)[name] == meaning


def test_an_origin_must_be_a_name():
    for origin in ("my laptop", "2024", "all", "a/b"):
        with pytest.raises(NameRefused):
            incoming(Contents(), Contents(), origin=origin)


def test_how_our_models_came_to_be_is_ours_to_say():
    model = keyed("model", TARGETS[0], {})
    build = fact("build", {"model": TARGETS[0]})
    assert take([model, build], [model], "hub") == []
    assert take([model, build], [], "hub") == [model, build]


def run(model: str, second: int, seed: str = TARGETS[3], unit: str = TARGETS[2]) -> Record:
    at = f"2026-01-01T00:00:{second:02d}.000000Z"
    body = {"role": "unit", "seed": seed, "model": model, "units": [{"unit": unit}]}
    return replace(fact("run", body), at=at)


def test_which_model_stands_for_a_unit_does_not_change_behind_our_back():
    ours, theirs = [run(TARGETS[0], 1)], [run(TARGETS[1], 5)]
    taken = incoming(Contents.of(theirs), Contents.of(ours), origin="hub")
    assert not taken.wants(theirs[0])
    assert [clash.space for clash in taken.clashes] == ["unit model"]
    assert take([*ours, *theirs], ours, "hub") == theirs  # they had seen ours
    assert take(theirs, [], "hub") == theirs


def test_what_was_removed_and_added_again_comes_back():
    model = keyed("model", TARGETS[0], {})
    gone = removal(TARGETS[0], 3, kind="model")
    back = removal(TARGETS[0], 5, removed=False, kind="model")
    there = take([model, gone], [], "pool")
    assert take([model, gone, back], there, "pool") == [back]


def test_what_lost_its_name_to_another_thing_does_not_come_back_with_it():
    model = keyed("model", TARGETS[0], {})
    gone = removal(TARGETS[0], 3, kind="model")
    back = removal(TARGETS[0], 5, removed=False, kind="model")
    theirs = [model, naming("code", TARGETS[0], 1, "model"), gone]
    ours = [*take(theirs, [], "pool"), naming("code", TARGETS[1], 4)]
    assert take([*theirs, back], ours, "pool") == []
    ours.append(removal(TARGETS[1], 6))  # and once the name is free, it does
    assert take([*theirs, back], ours, "pool") == [back]


def test_tombstones_of_nothing_are_not_taken():
    assert take([removal(TARGETS[0], 3, kind="model")], [], "hub") == []


def test_two_places_of_one_name_do_not_share_names():
    ours = [naming("code", TARGETS[0], 1)]
    ours += take([naming("code", TARGETS[1], 2)], ours, "hub")
    ours += take([naming("code", TARGETS[2], 3)], ours, "hub")
    found = meanings(ours)
    assert (found["code"], found["hub/code"]) == (TARGETS[0], TARGETS[1])
    assert found[f"hub-{TARGETS[2][:6]}/code"] == TARGETS[2]
