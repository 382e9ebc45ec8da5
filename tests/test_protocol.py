from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from poolreg.errors import ConfigError, PoolregError, Refused, UnknownFormat
from poolreg.evaluation.protocol import (
    DTYPES,
    Protocol,
    default_max_length,
    evaluation_id,
    rolling_windows,
)

TOKENIZER = "ab" * 32

protocols = st.builds(
    Protocol,
    max_length=st.integers(1, 1 << 20),
    tokenizer=st.text("0123456789abcdef", min_size=64, max_size=64),
    dtype=st.sampled_from(DTYPES),
)


def test_the_digest_is_pinned_because_old_results_hang_on_it():
    protocol = Protocol(512, TOKENIZER)
    assert protocol.as_record() == {
        "max_length": 512, "tokenizer": TOKENIZER, "dtype": "float32",
        "prefix": "bos-or-eos", "window": "rolling", "version": 1,
    }  # fmt: skip
    assert protocol.digest == "af7a095ab5467e63be9974e926c09612a839b838afd1224033f01a007c647dc6"
    assert (
        evaluation_id("aa", "bb", protocol.digest)
        == "09d3b8a70178a71e9895e40659ef64ace297c8132bebd807fb7a864072add702"
    )


@given(protocols)
def test_records_come_back_from_json(protocol: Protocol):
    record = json.loads(json.dumps(protocol.as_record()))
    assert Protocol.from_record(record) == protocol
    assert Protocol.from_record(record).digest == protocol.digest


@given(protocols, protocols)
def test_digests_differ_exactly_when_protocols_do(one: Protocol, other: Protocol):
    assert (one.digest == other.digest) == (one == other)


@pytest.mark.parametrize(
    "change", [{"max_length": 511}, {"tokenizer": "cd" * 32}, {"dtype": "bfloat16"}]
)
def test_every_free_field_is_in_the_digest(change):
    protocol = Protocol(512, TOKENIZER)
    assert dataclasses.replace(protocol, **change).digest != protocol.digest


def test_evaluation_ids_depend_on_each_part_and_its_place():
    ids = {evaluation_id(*parts) for parts in ["abc", "bbc", "acc", "abb", "bac", "acb"]}
    assert len(ids) == 6


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "512", None])
def test_windows_that_hold_no_token_are_refused(value):
    with pytest.raises(ConfigError, match="at least one token"):
        Protocol(value, TOKENIZER)
    with pytest.raises(ConfigError, match="at least one token"):
        list(rolling_windows(3, value))


@pytest.mark.parametrize("dtype", ["float64", "int8", "", ["float32"]])
def test_unknown_dtypes_are_refused(dtype):
    with pytest.raises(ConfigError, match="dtype"):
        Protocol(512, TOKENIZER, dtype=dtype)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"version": 2}, UnknownFormat),
        ({"version": 2, "stride": 7}, UnknownFormat),
        ({"prefix": "none"}, UnknownFormat),
        ({"window": "strided"}, UnknownFormat),
        ({"stride": 7}, Refused),
        ({"tokenizer": 5}, Refused),
        ({"dtype": 5}, ConfigError),
    ],
)
def test_records_that_are_no_protocol_of_ours_are_refused(change, error):
    with pytest.raises(error):
        Protocol.from_record({**Protocol(512, TOKENIZER).as_record(), **change})


def test_a_record_with_a_field_missing_names_it():
    record = Protocol(512, TOKENIZER).as_record()
    del record["max_length"]
    with pytest.raises(PoolregError, match="max_length"):
        Protocol.from_record(record)


def test_default_max_length_is_the_context_up_to_2048():
    assert [default_max_length(n) for n in (None, 64, 2048, 131072)] == [2048, 64, 2048, 2048]


@pytest.mark.parametrize(
    ("length", "max_length", "windows"),
    [
        (0, 4, []),
        (1, 4, [(0, 1, 1)]),
        (4, 4, [(0, 4, 4)]),
        (5, 4, [(0, 4, 4), (1, 5, 1)]),
        (8, 4, [(0, 4, 4), (4, 8, 4)]),
        (10, 4, [(0, 4, 4), (4, 8, 4), (6, 10, 2)]),
        (3, 1, [(0, 1, 1), (1, 2, 1), (2, 3, 1)]),
    ],
)
def test_rolling_windows_by_hand(length, max_length, windows):
    assert list(rolling_windows(length, max_length)) == windows


@given(length=st.integers(0, 300), max_length=st.integers(1, 80))
def test_rolling_windows_score_each_token_once_with_all_the_context_they_may_have(
    length: int, max_length: int
):
    windows = list(rolling_windows(length, max_length))
    predicted = [t for w in windows for t in range(w.stop - w.scored, w.stop)]
    assert predicted == list(range(length))
    for window in windows:
        inputs = window.stop - window.start
        assert 1 <= window.scored <= inputs
        assert inputs == min(max_length, window.stop)  # as far left as the window reaches
    assert all(w.scored == max_length for w in windows[:-1])


def test_importing_the_protocol_is_cheap():
    heavy = {"torch", "transformers", "tokenizers", "numpy", "pyarrow", "duckdb"}
    code = "import sys, poolreg.evaluation.protocol; print('\\n'.join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert heavy.isdisjoint(result.stdout.split())
