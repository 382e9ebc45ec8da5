"""The tokenizer digest on real tokenizers: what keeps it, what changes it, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from poolreg.canonical import is_digest
from poolreg.errors import NotFound, Refused
from poolreg.weights.tokenizer_files import read_tokenizer, require_tokenizer

TEXT = ["hello world, this is some text and more of it " * 3, "def f(x): return x + 1"]
END = "<|endoftext|>"


def trained(vocabulary: int = 300, **more: Any) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, **({"bos_token": END, "eos_token": END} | more)
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    trained().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def digest(folder: Path) -> str:
    found = read_tokenizer(folder)
    assert found
    assert is_digest(found.digest)
    return found.digest


def edit(folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> Path:
    path = folder / name
    content = json.loads(path.read_text()) if path.exists() else {}
    change(content)
    path.write_text(json.dumps(content))
    return folder


# ------------------------------------------------------------------------ what keeps the digest


def test_saving_again_keeps_the_digest(saved: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(saved)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(TEXT, truncation=True, max_length=3, padding=True)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.model_max_length = 77
    tokenizer.save_pretrained(tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert b'"BatchLongest"' in files["tokenizer.json"]
    assert b'"max_length": 3' in files["tokenizer.json"]
    assert "chat_template.jinja" in files
    assert digest(tmp_path) == digest(saved)


def test_older_spellings_keep_the_digest(saved: Path, copy: Path) -> None:
    def older(content: dict[str, Any]) -> None:
        model = content["model"]
        model["merges"] = [" ".join(pair) for pair in model["merges"]]
        model["vocab"] = dict(sorted(model["vocab"].items()))
        for key in ("ignore_merges", "byte_fallback"):
            del model[key]
        del content["pre_tokenizer"]["use_regex"]
        content["post_processor"] = {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": False,
        }

    def as_dicts(content: dict[str, Any]) -> None:
        for key in ("bos_token", "eos_token"):
            content[key] = {"content": content[key], "lstrip": False, "normalized": True}
        content |= {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": {}}

    edit(edit(copy, "tokenizer.json", older), "tokenizer_config.json", as_dicts)
    assert digest(copy) == digest(saved)


@pytest.mark.parametrize("processor", [None, {"type": "ByteLevel", "trim_offsets": False}])
@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "GPT2Tokenizer"])
def test_another_version_of_transformers_keeps_the_digest(
    copy: Path, tmp_path: Path, kind: str, processor: Any
) -> None:
    """A folder as version 4 left it, loaded and saved by the present one."""
    from transformers import AutoTokenizer

    def older(content: dict[str, Any]) -> None:
        content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
        content["post_processor"] = processor and processor | {"add_prefix_space": True}

    config: dict[str, Any] = {"bos_token": END, "eos_token": END, "tokenizer_class": kind}
    if kind == "GPT2Tokenizer":
        config |= {"unk_token": END, "add_prefix_space": False}  # as its hub folders state
    edit(copy, "tokenizer.json", older)
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    AutoTokenizer.from_pretrained(copy).save_pretrained(tmp_path / "new")
    assert (tmp_path / "new" / "tokenizer.json").read_text() != (
        copy / "tokenizer.json"
    ).read_text()
    assert digest(tmp_path / "new") == digest(copy)


def test_special_tokens_may_stand_in_their_own_file(saved: Path, copy: Path) -> None:
    edit(
        copy,
        "tokenizer_config.json",
        lambda content: [content.pop(f"{t}_token") for t in ("bos", "eos")],
    )
    assert digest(copy) != digest(saved)
    tokens = {"bos_token": {"content": END}, "eos_token": END}
    edit(copy, "special_tokens_map.json", lambda content: content.update(tokens))
    assert digest(copy) == digest(saved)


# ---------------------------------------------------------------------- what changes the digest


@pytest.mark.parametrize(
    "other",
    [
        lambda: trained(290),
        lambda: trained(bos_token=None),
        lambda: trained(eos_token="hello"),
        lambda: trained(unk_token=END),
        lambda: trained(additional_special_tokens=["<|x|>"]),
    ],
)
def test_another_tokenizer_has_another_digest(
    saved: Path, tmp_path: Path, other: Callable[[], Any]
) -> None:
    other().save_pretrained(tmp_path)
    assert digest(tmp_path) != digest(saved)


def swap_merges(content: dict[str, Any]) -> None:
    merges = content["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]


def swap_ids(content: dict[str, Any]) -> None:
    vocab = content["model"]["vocab"]
    vocab["!"], vocab['"'] = vocab['"'], vocab["!"]


def template(content: dict[str, Any]) -> None:
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": END, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [],
        "special_tokens": {END: {"id": END, "ids": [0], "tokens": [END]}},
    }


@pytest.mark.parametrize(
    "change",
    [
        swap_merges,
        swap_ids,
        template,
        lambda content: content.update(normalizer={"type": "NFC"}),
        lambda content: content["pre_tokenizer"].update(add_prefix_space=True),
        lambda content: content["pre_tokenizer"].update(use_regex=False),
        lambda content: content["added_tokens"].pop(),
        lambda content: content["model"].update(ignore_merges=True),
    ],
)
def test_what_decides_the_tokens_changes_the_digest(
    saved: Path, copy: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    edit(copy, "tokenizer.json", change)
    assert digest(copy) != digest(saved)


@pytest.mark.parametrize("key", ["add_bos_token", "add_eos_token", "add_prefix_space"])
def test_switches_change_the_digest(saved: Path, copy: Path, key: str) -> None:
    assert digest(edit(copy, "tokenizer_config.json", lambda c: c.update({key: None}))) == digest(
        saved
    )
    assert digest(edit(copy, "tokenizer_config.json", lambda c: c.update({key: True}))) != digest(
        saved
    )


def test_a_class_that_rebuilds_the_tokenizer_changes_the_digest(saved: Path, copy: Path) -> None:
    from transformers import AutoTokenizer

    edit(copy, "tokenizer_config.json", lambda c: c.update(tokenizer_class="Qwen2Tokenizer"))
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (saved, copy)]
    assert len({tuple(tokenizer("cafe\u0301")["input_ids"]) for tokenizer in tokenizers}) == 2
    assert digest(copy) != digest(saved)


# --------------------------------------------------------------------- without a tokenizer.json


def test_vocabulary_files_alone(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("")
    seen = [digest(tmp_path)]
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2TokenizerFast"}')
    seen.append(digest(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "GPT2Tokenizer", "chat_template": "x", "model_max_length": 3}'
    )
    assert digest(tmp_path) == seen[-1]
    (tmp_path / "merges.txt").write_text("a b")
    seen.append(digest(tmp_path))
    (tmp_path / "added_tokens.json").write_text('{"<x>": 1}')
    seen.append(digest(tmp_path))
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "a"}')
    seen.append(digest(tmp_path))
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize(
    "name",
    [
        "vocab.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model",
        "qwen.tiktoken", "tekken.json",
    ],
)  # fmt: skip
def test_each_kind_of_vocabulary_is_found(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x00binary")
    (tmp_path / "chat_template.jinja").write_text("x")
    (tmp_path / "model.safetensors").write_text("x")
    found = read_tokenizer(tmp_path)
    assert found
    assert set(found.files) == {name, "chat_template.jinja"}


def test_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert read_tokenizer(tmp_path) is None
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(NotFound, match="no tokenizer in"):
            require_tokenizer(folder)


# -------------------------------------------------------------------------------- what is refused


def test_code_runs_only_when_trusted(saved: Path, copy: Path) -> None:
    code = {"auto_map": {"AutoTokenizer": ["x.X", None]}}
    edit(copy, "tokenizer_config.json", lambda content: content.update(code))
    with pytest.raises(Refused, match="asks to run code") as caught:
        read_tokenizer(copy)
    assert "--trust-code" in caught.value.hint
    found = read_tokenizer(copy, trust_code=True)
    assert found
    assert found.digest == digest(saved)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["[]", "{", '{"a": NaN}', '{"a": "\\ud800"}' * 2])
def test_files_that_are_not_what_they_should_be(copy: Path, name: str, text: str) -> None:
    (copy / name).write_text(text)
    with pytest.raises(Refused, match=name):
        read_tokenizer(copy)


@pytest.mark.parametrize(
    "change",
    [
        {"model": None}, {"model": 3}, {"post_processor": []}, {"post_processor": {"type": 1}},
        {"post_processor": {"type": "TemplateProcessing", "single": [3]}}, {"pre_tokenizer": "x"},
        {"model": {"merges": [1, None, {}]}}, {"model": {"merges": None}}, {"added_tokens": None},
    ],
)  # fmt: skip
def test_odd_contents_still_have_a_digest(saved: Path, copy: Path, change: dict[str, Any]) -> None:
    edit(copy, "tokenizer.json", lambda content: content.update(change))
    assert digest(copy) != digest(saved)
