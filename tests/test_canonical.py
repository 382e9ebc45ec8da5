import json
import random
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poolreg.canonical import canonical_json, digest_of, is_digest, sha256
from poolreg.errors import Refused

any_text = st.text(st.characters(exclude_categories=["Cs"]))
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
) | any_text
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(any_text, inner, max_size=4),
)


def shuffled(value, seed):
    """The same value with the keys of every object inserted in another order."""
    if isinstance(value, dict):
        items = [(key, shuffled(item, seed)) for key, item in value.items()]
        random.Random(seed).shuffle(items)
        return dict(items)
    return [shuffled(item, seed) for item in value] if isinstance(value, list) else value


def exact(value):
    """A form in which 1, 1.0, True and -0.0 differ, as they do in JSON."""
    if isinstance(value, dict):
        return {key: exact(item) for key, item in value.items()}
    if isinstance(value, list):
        return [exact(item) for item in value]
    return type(value), repr(value)


@given(json_values)
def test_round_trip(value):
    data = canonical_json(value)
    assert exact(json.loads(data)) == exact(value)
    assert canonical_json(json.loads(data)) == data


@given(json_values, st.integers())
def test_key_order_does_not_matter(value, seed):
    assert canonical_json(shuffled(value, seed)) == canonical_json(value)
    assert digest_of(shuffled(value, seed)) == digest_of(value)


@given(json_values, json_values)
def test_different_values_have_different_forms(one, other):
    same = exact(one) == exact(other)
    assert (canonical_json(one) == canonical_json(other)) == same


@pytest.mark.parametrize(
    ("value", "data"),
    [
        ({"b": [1, 2.0, None], "a": {"z": True, "y": "é\n\"\\/\u2028"}},
         '{"a":{"y":"é\\n\\"\\\\/\u2028","z":true},"b":[1,2.0,null]}'),
        ((1, (2,)), "[1,[2]]"),
        ({}, "{}"),
        ([0.1, 1e300, 1e-7, -0.0, 100000000000000000000, 1e16, 123456789.125],
         "[0.1,1e+300,1e-07,-0.0,100000000000000000000,1e+16,123456789.125]"),
        ({"ﬀ": 1, "😀": 2, "z": 3, "Z": 4, "": 5}, '{"":5,"Z":4,"z":3,"ﬀ":1,"😀":2}'),
        ("\x00\x1f\x7f", '"\\u0000\\u001f\x7f"'),
    ],
)  # fmt: skip
def test_the_form_to_the_byte(value, data):
    assert canonical_json(value) == data.encode()


@pytest.mark.parametrize(
    ("value", "digest"),
    [
        # A contract: if one of these changes, every digest in every pool does.
        (None, "74234e98afe7498fb5daf1f36ac2d78acc339464f950703b8c019892f982b90b"),
        ({}, "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"),
        ({"b": [1, 0.5, "é"], "a": None},
         "f0272939140c5740d58cdf952a5f710ec35c2875c9af822cf3472f6616ba78af"),
        ({"recipe": "average-1", "components": [["0" * 64, 1, 3], ["f" * 64, 2, 3]]},
         "49062e6f88522db8f4650131c8ccd95c46b28032e2df9e013380047a693a0255"),
    ],
)  # fmt: skip
def test_pinned_digests(value, digest):
    assert digest_of(value) == digest


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [
        float("nan"), float("inf"), [float("-inf")], {1: "a"}, {None: 1}, {True: 1},
        {"a": {2.0: 1}}, [({3: 4},)], "\ud800", {"\udfff": 1}, ["a\udc80"], b"bytes", {1, 2},
        object(), 1j, {"a": [object]}, 10**5000, nested(100_000),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_has_no_form_is_refused(value):
    with pytest.raises(Refused, match="canonical JSON"):
        canonical_json(value)


def test_what_holds_itself_is_refused():
    value: list[object] = []
    value.append(value)
    with pytest.raises(Refused):
        canonical_json({"a": value})


def test_sha256_of_bytes_and_views():
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(b"abc") == sha256(memoryview(bytearray(b"xabc"))[1:]) == known
    assert digest_of("abc") == sha256(b'"abc"')


@given(st.binary())
def test_a_digest_is_a_digest(data):
    assert is_digest(sha256(data))


@pytest.mark.parametrize(
    "text",
    ["", "a" * 63, "a" * 65, "A" * 64, "g" * 64, "a" * 64 + "\n", " " + "a" * 63, "٣" * 64],
)
def test_what_is_no_digest(text):
    assert not is_digest(text)


@given(st.text(string.hexdigits + "\n", min_size=62, max_size=66))
def test_only_lower_case_digits_make_a_digest(text):
    assert is_digest(text) == (len(text) == 64 and set(text) <= set("0123456789abcdef"))
