"""From text to training batches: a tokenizer, a stream of tokens, and the order of the data.

Promises: the same text gives the same tokenizer, byte for byte; the order of the data is a pure
function of the seed, the sizes and the keys of the sources, on every machine and with every
version of numpy; text of several sources is shuffled as one. No torch here.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from poolreg.canonical import canonical_json, digest_of
from poolreg.errors import ConfigError, UsageError
from poolreg.files import staged_folder
from poolreg.training.recipe import Hyperparameters

END_OF_TEXT = "<|endoftext|>"

# Lists of ids take ten times the memory of the text, so a corpus goes through in pieces.
CHARACTERS_AT_ONCE = 1 << 22


def train_tokenizer(
    documents: Iterable[str], vocab_size: int, folder: Path, *, model_type: str | None = None
) -> int:
    """Train a byte-level BPE on the documents and save it as a tokenizer folder; return its size.

    `END_OF_TEXT` is its only special token, beginning and end of a document alike. The same
    text gives the same files. A small text gives fewer than `vocab_size` tokens. Text is cut as
    transformers cuts it beside a model of `model_type`, which for some families is its own way.
    """
    from tokenizers import trainers

    bpe = _untrained()
    if model_type:
        theirs = _beside(model_type, bpe)
        bpe.normalizer, bpe.pre_tokenizer = theirs.normalizer, theirs.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=_alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(documents, trainer)
    return _save_tokenizer(bpe, folder)


def _alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _untrained() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return bpe


def _beside(model_type: str, bpe: Any) -> Any:
    """Return the backend that transformers makes of a BPE that stands beside such a model."""
    from tokenizers import Tokenizer, models

    from poolreg.models.loading import load_tokenizer

    whole = Tokenizer(models.BPE({END_OF_TEXT: 0} | _numbered(_alphabet(), 1), []))
    whole.pre_tokenizer, whole.decoder = bpe.pre_tokenizer, bpe.decoder
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "beside"
        _save_tokenizer(whole, folder)
        (folder / "config.json").write_bytes(canonical_json({"model_type": model_type}))
        return load_tokenizer(folder).backend_tokenizer


def _numbered(words: Iterable[str], first: int) -> dict[str, int]:
    return {word: number for number, word in enumerate(words, start=first)}


def _save_tokenizer(bpe: Any, folder: Path) -> int:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT
    )
    with staged_folder(folder) as staging:
        tokenizer.save_pretrained(staging)
    return len(tokenizer)


def encode_stream(documents: Iterable[str], tokenizer: Any) -> NDArray[Any]:
    """Return the documents as one array of token ids, [tokens], separated by end of text.

    Each document stands between the tokens that scoring puts around it: before it the
    beginning-of-text token, or the end-of-text token where there is no other; after it the end.
    uint16 where the vocabulary allows it, else uint32. Raises `ConfigError` for a tokenizer
    without an end-of-text token.
    """
    end, begin = tokenizer.eos_token_id, tokenizer.bos_token_id
    if end is None:
        words = f"the tokenizer {tokenizer.name_or_path} has no end-of-text token"
        raise ConfigError(words, hint="set eos_token in its tokenizer_config.json")
    separator = [end] if begin in (None, end) else [end, begin]
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    parts = [np.array(separator[-1:], dtype)]
    for group in _groups(documents):
        ids = tokenizer(group, add_special_tokens=False, verbose=False)["input_ids"]
        parts.extend(np.array(document + separator, dtype) for document in ids)
    return np.concatenate(parts)


def _groups(documents: Iterable[str]) -> Iterator[list[str]]:
    group, size = [], 0
    for document in documents:
        group.append(document)
        size += len(document)
        if size >= CHARACTERS_AT_ONCE:
            yield group
            group, size = [], 0
    if group:
        yield group


# ------------------------------------------------------------------------ order of the data


@dataclass(frozen=True)
class Source:
    """Tokens to train on; `key` (a content digest) and not the position decides their order."""

    key: str
    tokens: NDArray[Any]  # [tokens]
    weight: int | Fraction = 1  # share of the training, relative to the other sources


@dataclass(frozen=True)
class SourceShare:
    """What a training takes from one source: tokens predicted, and passes over its text."""

    key: str
    blocks: int
    tokens: int
    epochs: float


@dataclass(frozen=True)
class BatchPlan:
    """Which blocks make up each step; `shares` (sorted by key) is what `order` points into."""

    shares: tuple[SourceShare, ...]
    order: NDArray[np.int32]  # [steps, batch, 2]: index of the share, index of the block


def plan_batches(sources: Sequence[Source], settings: Hyperparameters) -> BatchPlan:
    """Draw `steps * batch` blocks from the sources in proportion to their weights, shuffled.

    A block predicts `context` tokens; the blocks of a source are disjoint in them and each is
    seen once per epoch, in an order that is new each epoch. The result does not depend on how
    the sources are listed. Raises `UsageError` for a source shorter than one block.
    """
    sources = sorted(sources, key=lambda source: source.key)
    keys = [source.key for source in sources]
    if not keys or len(set(keys)) < len(keys):
        raise UsageError("training needs one or more different sources of text", keys=keys)
    available = [_blocks_in(source, settings.context) for source in sources]
    total = settings.steps * settings.batch
    counts = _apportion(total, [Fraction(source.weight) for source in sources])

    which = np.repeat(np.arange(len(keys), dtype=np.int32), counts)
    which = which[_shuffled(total, settings.seed, "interleave", keys)]
    order = np.empty((total, 2), np.int32)
    order[:, 0] = which
    for index, (key, count, blocks) in enumerate(zip(keys, counts, available, strict=True)):
        epochs = range(-(-count // blocks))
        drawn = [_shuffled(blocks, settings.seed, "epoch", epoch, key) for epoch in epochs]
        order[which == index, 1] = np.concatenate([*drawn, np.empty(0, np.intp)])[:count]
    shares = tuple(
        SourceShare(key, count, count * settings.context, count / blocks)
        for key, count, blocks in zip(keys, counts, available, strict=True)
    )
    return BatchPlan(shares, order.reshape(settings.steps, settings.batch, 2))


def _blocks_in(source: Source, context: int) -> int:
    blocks = (len(source.tokens) - 1) // context
    if blocks < 1:
        words = f"{len(source.tokens)} tokens of text are too few for one block of {context}"
        hint = "add text to the partition, use fewer units, or lower context in the recipe"
        raise UsageError(f"source {source.key}: {words}", hint=hint, key=source.key)
    return blocks


def _apportion(total: int, weights: Sequence[Fraction]) -> list[int]:
    """Split `total` in proportion to the weights by the largest remainder."""
    if min(weights) < 0 or sum(weights) == 0:
        raise UsageError("weights of sources must be 0 or more and not all 0")
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [math.floor(part) for part in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def _shuffled(count: int, *words: Any) -> NDArray[np.intp]:
    """Return a permutation of range(count) that `words` decide."""
    # Raw bits and a stable sort: numpy keeps these for ever, but not `Generator.permutation`.
    bits = np.random.PCG64(np.random.SeedSequence(seed_of(*words))).random_raw(count)
    return np.argsort(bits, kind="stable")


def seed_of(*words: Any) -> int:
    """Return the seed, of 256 bits, that these JSON values decide."""
    return int(digest_of(words), 16)
