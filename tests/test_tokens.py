"""From text to batches: tokenizer files, token streams and the order of the data."""

from __future__ import annotations

import dataclasses
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from poolreg.errors import ConfigError, StorageError, UsageError
from poolreg.files import staged_folder
from poolreg.training.recipe import Hyperparameters
from poolreg.training.tokens import (
    END_OF_TEXT,
    Source,
    encode_stream,
    plan_batches,
    seed_of,
    train_tokenizer,
)

TEXT = ["the cat sat on the mat\n", "def f(x):\n    return x + 1\n", "naïve café — 東京\n"] * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    assert train_tokenizer(TEXT, 300, folder) == 300
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


# ------------------------------------------------------------------------------- tokenizer


def test_the_same_text_gives_the_same_files(folder, tmp_path):
    train_tokenizer(iter(TEXT), 300, tmp_path / "again")
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert "tokenizer.json" in names
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@given(text=st.text())
def test_any_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_one_special_token_and_no_added_prefix(tokenizer):
    assert tokenizer.bos_token == tokenizer.eos_token == END_OF_TEXT
    assert tokenizer.pad_token_id is None
    assert tokenizer.all_special_ids == [0]
    assert tokenizer("the")["input_ids"] == tokenizer("the", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("the")["input_ids"])[0].startswith("t")


def test_a_small_text_gives_a_small_vocabulary(tmp_path):
    assert train_tokenizer(["ab"], 1000, tmp_path / "tiny") == 258  # bytes, end of text, "ab"
    assert train_tokenizer([], 1000, tmp_path / "none") == 257


def test_a_taken_folder_is_left_alone(tmp_path):
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(StorageError, match="not empty"):
        train_tokenizer(["ab"], 300, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
    assert not list(tmp_path.parent.glob(f".{tmp_path.name}*"))


def test_a_staged_folder_is_whole_or_absent(tmp_path):
    with pytest.raises(ZeroDivisionError), staged_folder(tmp_path / "out") as staging:  # noqa: PT012
        (staging / "a").write_text("half")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------- stream


def test_documents_stand_between_ends_of_text(tokenizer):
    stream = encode_stream(["the cat", "", "mat"], tokenizer)
    one, two = (tokenizer(text)["input_ids"] for text in ("the cat", "mat"))
    assert stream.tolist() == [0, *one, 0, 0, *two, 0]
    assert stream.dtype == np.uint16
    assert encode_stream([], tokenizer).tolist() == [0]


def test_a_separate_beginning_of_text_stands_before_each_document(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder, bos_token="<s>")
    end, begin = tokenizer.eos_token_id, tokenizer.bos_token_id
    assert end != begin
    cat = tokenizer("cat")["input_ids"]
    expected = [begin, *cat, end, begin, *cat, end, begin]
    assert encode_stream(["cat", "cat"], tokenizer).tolist() == expected


def test_long_corpora_go_through_in_pieces(tokenizer, monkeypatch):
    whole = encode_stream(TEXT, tokenizer)
    monkeypatch.setattr("poolreg.training.tokens.CHARACTERS_AT_ONCE", 30)
    assert encode_stream(iter(TEXT), tokenizer).tolist() == whole.tolist()


def test_large_vocabularies_take_four_bytes():
    class Wide:
        eos_token_id, bos_token_id = 70_000, None

        def __len__(self):
            return 70_001

        def __call__(self, group, **_):
            return {"input_ids": [[69_999] for _ in group]}

    stream = encode_stream(["x"], Wide())
    assert stream.dtype == np.uint32
    assert stream.tolist() == [70_000, 69_999, 70_000]


def test_a_tokenizer_without_an_end_is_refused(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no end-of-text") as caught:
        encode_stream(["x"], tokenizer)
    assert "eos_token" in caught.value.hint


# ------------------------------------------------------------------------ order of the data


def hyper(**changes):
    return Hyperparameters(**{"context": 4, "batch": 3, "steps": 7, **changes})


def source(key, blocks, weight=1, context=4):
    return Source(key, np.arange(blocks * context + 1 + context // 2), weight)


sizes = st.dictionaries(
    st.text(max_size=5),
    st.tuples(st.integers(1, 12), st.fractions(0, 9, max_denominator=7)),
    min_size=1,
    max_size=5,
).filter(lambda drawn: any(weight for _, weight in drawn.values()))


@settings(deadline=None)
@given(drawn=sizes, steps=st.integers(1, 30), batch=st.integers(1, 5), seed=st.integers(0, 9))
def test_plans_are_even_exact_and_independent_of_the_listing(drawn, steps, batch, seed):
    sources = [source(key, blocks, weight) for key, (blocks, weight) in drawn.items()]
    how = hyper(steps=steps, batch=batch, seed=seed)
    plan = plan_batches(sources, how)
    again = plan_batches(sources[::-1], how)
    assert plan.shares == again.shares
    assert (plan.order == again.order).all()
    assert plan.order.shape == (steps, batch, 2)

    total, weights = steps * batch, {key: weight for key, (_, weight) in drawn.items()}
    assert sum(share.blocks for share in plan.shares) == total
    for index, share in enumerate(plan.shares):
        exact = total * weights[share.key] / sum(weights.values())
        assert abs(share.blocks - exact) < 1
        assert share.tokens == share.blocks * how.context
        taken = plan.order[plan.order[:, :, 0] == index][:, 1]
        assert len(taken) == share.blocks
        available = drawn[share.key][0]
        assert share.epochs == pytest.approx(share.blocks / available)
        # Every epoch takes every block once.
        for start in range(0, len(taken), available):
            epoch = taken[start : start + available].tolist()
            assert len(set(epoch)) == len(epoch)
            assert set(epoch) <= set(range(available))


def test_largest_remainders_win_and_ties_go_by_key():
    plan = plan_batches([source("b", 9), source("c", 9), source("a", 9)], hyper(batch=1, steps=8))
    assert [(share.key, share.blocks) for share in plan.shares] == [("a", 3), ("b", 3), ("c", 2)]
    weighted = [source("a", 9, 1), source("b", 9, Fraction(1, 3)), source("c", 9, 0)]
    plan = plan_batches(weighted, hyper(batch=1, steps=10))
    assert [share.blocks for share in plan.shares] == [8, 2, 0]  # of 7.5, 2.5 and 0


def test_unions_are_shuffled_and_epochs_differ():
    plan = plan_batches([source("a", 50), source("b", 50)], hyper(batch=10, steps=40))
    first_quarter = Counter(plan.order[:10, :, 0].ravel().tolist())
    assert min(first_quarter.values()) > 25  # of 50: no source waits for its turn
    blocks = plan.order[plan.order[:, :, 0] == 0][:, 1]
    assert blocks[:50].tolist() != blocks[50:100].tolist()
    assert blocks[:50].tolist() != sorted(blocks[:50].tolist())


def test_seed_and_key_change_the_order_but_not_the_shares():
    base = plan_batches([source("a", 20)], hyper(steps=20))
    other = plan_batches([source("a", 20)], hyper(steps=20, seed=1))
    renamed = plan_batches([source("b", 20)], hyper(steps=20))
    assert base.shares == other.shares
    assert (base.order != other.order).any()
    assert (base.order != renamed.order).any()


def test_a_longer_training_begins_each_source_alike():
    # A matched and a summed budget differ in how far they go, not in what they see first.
    short, long = (plan_batches([source("a", 20)], hyper(steps=s)) for s in (5, 11))
    taken = [plan.order[plan.order[:, :, 0] == 0][:, 1].tolist() for plan in (short, long)]
    assert taken[0] == taken[1][: len(taken[0])]


def test_the_order_is_pinned():
    # Changing it changes every trained model, so it must be meant.
    plan = plan_batches([source("a", 5), source("b", 3)], hyper(batch=4, steps=2))
    assert plan.order.reshape(-1, 2).tolist() == [
        [0, 0],
        [0, 2],
        [1, 0],
        [0, 4],
        [1, 1],
        [1, 2],
        [1, 2],
        [0, 3],
    ]


def test_sources_that_cannot_be_used():
    with pytest.raises(UsageError, match="source abc: 4 tokens of text are too few") as caught:
        plan_batches([Source("abc", np.arange(4))], hyper())
    assert "context" in caught.value.hint
    assert plan_batches([Source("abc", np.arange(5))], hyper()).shares[0].epochs == 21
    with pytest.raises(UsageError, match="different sources"):
        plan_batches([source("a", 2), source("a", 2)], hyper())
    with pytest.raises(UsageError, match="different sources"):
        plan_batches([], hyper())
    with pytest.raises(UsageError, match="weights"):
        plan_batches([source("a", 2, 0)], hyper())
    with pytest.raises(UsageError, match="weights"):
        plan_batches([source("a", 2, 2), source("b", 2, -1)], hyper())


def test_seeds_depend_on_every_word():
    words = [("a",), ("a", 0), ("a", 0, 0), (0, "a"), ("a", "0")]
    assert len({seed_of(*each) for each in words}) == len(words)


def test_settings_that_do_not_touch_the_data_do_not_touch_the_order():
    plans = [plan_batches([source("a", 9)], h) for h in (hyper(), hyper(lr=1.0, schedule="linear"))]
    assert (plans[0].order == plans[1].order).all()
    assert dataclasses.asdict(plans[0].shares[0])["key"] == "a"


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_tokenizer_for_a_model_type_reads_alike_beside_such_a_model(tmp_path, kind):
    # transformers gives qwen2 a pattern of its own when its config.json stands beside.
    train_tokenizer(TEXT, 300, tmp_path / "bpe", model_type=kind)
    alone = AutoTokenizer.from_pretrained(tmp_path / "bpe")
    (tmp_path / "bpe" / "config.json").write_text(f'{{"model_type": "{kind}"}}')
    beside = AutoTokenizer.from_pretrained(tmp_path / "bpe")
    text = "Don't say 12345 naïve\r\n\tx = [3.14]  # 東京\n\n" + "".join(TEXT)
    assert beside(text)["input_ids"] == alone(text)["input_ids"]
    assert beside.decode(beside(text)["input_ids"]) == text
