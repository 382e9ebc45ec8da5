"""Scoring: the negative log-likelihood of every token of some documents under a causal model.

`tokenise` turns an evalset into windows once; `score` runs a model over them, as often as there
are models. What a token scores depends on its window alone: batches are built for speed, padding
never enters a sum, logits are read in float32 and sums are taken in float64 in document order.
Whatever cannot be measured truly is refused: missing or left-over tensors, a tokenizer or window
that does not fit the model, a likelihood that is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from poolreg.errors import Incompatible, Refused
from poolreg.evaluation.protocol import Protocol, rolling_windows
from poolreg.models.loading import load_tokenizer
from poolreg.tensors import encode

Ints = NDArray[np.int64]

DOCUMENTS_AT_ONCE = 64  # tokenised in one call: bounds the offsets that tokenizers keeps
LOGITS_AT_ONCE = 1 << 28  # elements of one forward pass's logits: 1 GiB in float32
SOFTMAX_AT_ONCE = 1 << 20  # elements of one log-softmax: 4 MiB, so that it stays in the cache
SOFTMAX_ON_DEVICE = 1 << 26  # the same on a GPU: 256 MiB, so that starting kernels takes no time
SHORTEST_IN_BATCH = 0.75  # of the longest window: bounds what padding costs


@dataclass(frozen=True, eq=False)
class TokenisedSet:
    """Documents as windows of token ids, ready to be scored by any model of one tokenizer.

    `stream` is each document's tokens behind the prefix token, one document after the other.
    A window is a row (start, stop, scored): the inputs are stream[start:stop] and the last
    `scored` of them predict stream[stop - scored + 1 : stop + 1]. Windows stand in document
    order, so their predictions, joined, are all tokens in document order.
    """

    stream: NDArray[np.int32]  # [N + D]
    windows: Ints  # [W, 3]
    tokens: Ints  # [D] tokens scored per document
    bytes: Ints  # [D] UTF-8 bytes per document

    @property
    def prefixes(self) -> Ints:
        """Places of the prefix tokens in the stream, [D]."""
        lengths = self.tokens + 1
        return np.cumsum(lengths) - lengths

    @property
    def total_tokens(self) -> int:
        """Number of tokens that are scored, N."""
        return int(self.tokens.sum())

    def only(self, documents: Ints) -> TokenisedSet:
        """Return some of the documents, by their numbers [D'], in the order given."""
        first, lengths = self.prefixes[documents], self.tokens[documents] + 1
        moved = np.cumsum(lengths) - lengths - first  # how far each document moves in the stream
        places = np.arange(lengths.sum()) - np.repeat(moved, lengths)
        owners = np.searchsorted(self.prefixes, self.windows[:, 0], side="right") - 1
        ends = np.searchsorted(owners, np.arange(len(self.tokens) + 1))
        counts = np.diff(ends)[documents]
        rows = np.arange(counts.sum()) + np.repeat(
            ends[documents] - np.cumsum(counts) + counts, counts
        )
        shift = np.repeat(moved, counts)[:, None] * np.array([1, 1, 0])
        return TokenisedSet(
            stream=self.stream[places],
            windows=self.windows[rows] + shift,
            tokens=self.tokens[documents],
            bytes=self.bytes[documents],
        )


@dataclass(frozen=True, eq=False)
class Scores:
    """What a model scored on a `TokenisedSet`: nats per document and per token."""

    nll: NDArray[np.float64]  # [D] nats, sums of token_nll
    tokens: Ints  # [D]
    bytes: Ints  # [D]
    token_nll: NDArray[np.float32]  # [N] nats, in document order

    @property
    def total_nll(self) -> float:
        """Nats of all documents together."""
        return math.fsum(self.nll)

    @property
    def total_tokens(self) -> int:
        """Tokens of all documents together."""
        return int(self.tokens.sum())

    @property
    def total_bytes(self) -> int:
        """UTF-8 bytes of all documents together."""
        return int(self.bytes.sum())


def document_scores(scores: Scores) -> bytes:
    """Return what is known of each document as safetensors: nll, tokens and bytes, [D]."""
    counts = {"tokens": ("I64", scores.tokens), "bytes": ("I64", scores.bytes)}
    return encode({"nll": ("F64", scores.nll), **counts})


def tokenise(
    documents: Sequence[str], folder: Path, protocol: Protocol, *, trust_code: bool = False
) -> TokenisedSet:
    """Return `documents` as windows under `protocol`, with the tokenizer of `folder`.

    Documents are encoded without special tokens: the prefix token (BOS, else EOS) stands before
    each of them as context that is not scored. This is what lm-evaluation-harness measures with
    `add_bos_token=False`. Raises `Refused` for a tokenizer with neither token and for text that
    is not Unicode.
    """
    tokenizer = load_tokenizer(folder, trust_code=trust_code)
    prefix = tokenizer.bos_token_id
    prefix = tokenizer.eos_token_id if prefix is None else prefix
    if prefix is None:
        raise Refused(
            f"the tokenizer in {folder} has neither a BOS nor an EOS token",
            hint="name one in its tokenizer_config.json: a document's first token needs context",
        )
    sizes = np.array([_utf8_bytes(index, text) for index, text in enumerate(documents)], np.int64)
    pieces, windows, counts = [], [], []
    start = 0  # of the document in the stream
    for ids in _encode(tokenizer, documents):
        pieces.append(np.array([prefix, *ids], np.int32))
        counts.append(len(ids))
        rows = np.array(list(rolling_windows(len(ids), protocol.max_length)), np.int64)
        windows.append(rows.reshape(-1, 3) + np.array([start, start, 0]))
        start += len(ids) + 1
    return TokenisedSet(
        stream=np.concatenate([np.empty(0, np.int32), *pieces]),
        windows=np.concatenate([np.empty((0, 3), np.int64), *windows]),
        tokens=np.array(counts, np.int64),
        bytes=sizes,
    )


def score(
    model: PreTrainedModel, tokens: TokenisedSet, *, batch_tokens: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Scores:  # fmt: skip
    """Score all documents under `model`, on the device and in the dtype that it is in.

    The NLL of token t is -log softmax(logits)[t] with logits in float32; `model` is put into
    evaluation mode. `batch_tokens` bounds the tokens of one forward pass (at least one window;
    default: 1024 on the CPU, 16384 elsewhere) and changes speed and memory only.
    `progress` is told the number of tokens scored since the last call.

    Raises `Incompatible` when token ids or windows do not fit the model, and `Refused` when a
    likelihood is not finite.
    """
    vocabulary = _check_fit(model, tokens)
    device = next(model.parameters()).device
    batch_tokens = batch_tokens or (1024 if device.type == "cpu" else 16384)
    batch_tokens = min(batch_tokens, LOGITS_AT_ONCE // vocabulary)
    stream = torch.from_numpy(tokens.stream).to(device, torch.int64)
    nll = np.empty(len(tokens.stream), np.float32)  # beside each token; nothing at the prefixes
    model.eval()
    for rows in batches(tokens.windows, batch_tokens):
        places, values = _score_batch(model, stream, tokens.windows[rows])
        nll[places] = values
        if not np.isfinite(values).all():
            _refuse_not_finite(tokens, int(places[~np.isfinite(values)].min()))
        if progress is not None:
            progress(len(places))
    token_nll = np.delete(nll, tokens.prefixes)
    documents = np.repeat(np.arange(len(tokens.tokens)), tokens.tokens)  # [N]
    sums = np.bincount(documents, weights=token_nll, minlength=len(tokens.tokens))
    return Scores(sums.astype(np.float64), tokens.tokens, bytes=tokens.bytes, token_nll=token_nll)


@torch.inference_mode()
def _score_batch(
    model: PreTrainedModel, stream: torch.Tensor, windows: Ints
) -> tuple[Ints, NDArray[np.float32]]:
    """Return the places in the stream of the tokens that the windows predict, and their NLL."""
    starts, stops, scored = windows.T
    longest = int((stops - starts).max())
    places = starts[:, None] + np.arange(longest)  # [B, T] into the stream
    real = places < stops[:, None]
    inputs = stream[torch.from_numpy(np.where(real, places, 0)).to(stream.device)]
    # Without padding there is no mask, which leaves the faster attention kernels free.
    mask = None if real.all() else torch.from_numpy(real).to(stream.device, torch.int64)
    logits = model(input_ids=inputs, attention_mask=mask, use_cache=False).logits  # [B, T, V]
    logits = logits.flatten(0, 1)
    predicting = real & (places >= (stops - scored)[:, None])
    predicted = places[predicting] + 1
    wanted = torch.from_numpy(np.flatnonzero(predicting)).to(stream.device)
    if 2 * len(wanted) < len(logits):
        values = _token_nll(logits[wanted], stream[torch.from_numpy(predicted).to(stream.device)])
    else:  # to read the others as well takes less time than to gather these
        following = torch.from_numpy(np.where(predicting, places + 1, 0)).to(stream.device)
        values = _token_nll(logits, stream[following.flatten()])[wanted]
    return predicted, values.cpu().numpy()


def _token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return -log softmax(logits)[target] in float32, for logits [N, V] and targets [N]."""
    count, vocabulary = logits.shape
    at_once = SOFTMAX_AT_ONCE if logits.device.type == "cpu" else SOFTMAX_ON_DEVICE
    step = max(1, at_once // vocabulary)
    nll = torch.empty(count, device=logits.device)
    logs = torch.empty(min(step, count), vocabulary, device=logits.device)
    for at in range(0, count, step):
        part = logits[at : at + step].float()
        torch.log_softmax(part, 1, out=logs[: len(part)])
        chosen = logs[: len(part)].gather(1, targets[at : at + step, None])
        torch.neg(chosen.squeeze(1), out=nll[at : at + step])
    return nll


def batches(windows: Ints, batch_tokens: int) -> Iterator[Ints]:
    """Yield the indices of windows that go through the model together, longest first.

    Windows of one batch are of nearly equal length; together they have at most `batch_tokens`
    tokens with padding, or are one window.
    """
    lengths = windows[:, 1] - windows[:, 0]
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        longest = lengths[order[start]]
        rows = order[start : start + max(1, batch_tokens // int(longest))]
        rows = rows[lengths[rows] >= SHORTEST_IN_BATCH * longest]
        yield rows
        start += len(rows)


def _check_fit(model: PreTrainedModel, tokens: TokenisedSet) -> int:
    """Return the vocabulary size of a model that takes these tokens and windows."""
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    vocabulary = min(len(table.weight) for table in tables if table is not None)
    largest = int(tokens.stream.max(initial=0))
    if largest >= vocabulary:
        raise Incompatible(
            f"the tokenizer gives token id {largest}, but the model has only {vocabulary} tokens",
            hint="the tokenizer is not the one that the model was trained with",
        )
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = int((tokens.windows[:, 1] - tokens.windows[:, 0]).max(initial=0))
    if isinstance(context, int) and 0 < context < longest:
        raise Incompatible(
            f"windows of {longest} tokens are longer than the model's context of {context}",
            hint=f"set max_length to {context} or less",
        )
    return vocabulary


def _refuse_not_finite(tokens: TokenisedSet, place: int) -> None:
    document = int(np.searchsorted(tokens.prefixes, place)) - 1
    raise Refused(
        f"the log-likelihood of document {document} is not finite",
        hint="likely causes: NaN or infinite weights, training that diverged, or a dtype too "
        "narrow for this model (try float32)",
        document=document,
    )


def _encode(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str]) -> Iterator[list[int]]:
    for start in range(0, len(documents), DOCUMENTS_AT_ONCE):
        batch = list(documents[start : start + DOCUMENTS_AT_ONCE])
        # verbose=False: a document longer than the model's context is what windows are for.
        yield from tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]


def _utf8_bytes(index: int, text: str) -> int:
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise Refused(
            f"document {index} is not Unicode text: it has a lone surrogate at {error.start}",
            hint="repair the document's encoding",
            document=index,
        ) from error
