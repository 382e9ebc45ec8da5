"""Calibrations in the pool: gathered once for a model and a text, kept as objects.

One object holds the statistics of one layer, so that planning needs the memory of one layer.
A calibration is identified by what was calibrated, the text and how it was cut, never by names.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from poolreg.canonical import digest_of
from poolreg.compress.architectures import heads, layers
from poolreg.compress.calibrate import (
    LayerStatistics,
    choose_windows,
    gather,
    held_ids,
)
from poolreg.errors import NotFound, Refused
from poolreg.evaluation.protocol import Protocol
from poolreg.evaluation.scoring import TokenisedSet, tokenise
from poolreg.models.modeling_poolreg import Family, stock_sizes
from poolreg.numerics.nystrom import condition
from poolreg.progress import Progress
from poolreg.store import records
from poolreg.store.registry import Registry
from poolreg.tensors import encode, read_array, read_header
from poolreg.text.partitions import evalset_documents, unit_text

VERSION = 2  # of what is gathered; a change of it calibrates again
DEFAULT_TOKENS = 32_768
TOKENS_A_CHANNEL = 20  # by default, for the largest Gram matrix
ENOUGH = 10  # tokens for each channel of a Gram matrix: fewer leave it ill-conditioned
BYTES_A_TOKEN = 16  # more than any tokenizer takes for a token on average
_SCALARS = "scalars"


@dataclass(frozen=True)
class CalibrationText:
    """Text to calibrate on: an evalset or a partition of the pool, by digest."""

    digest: str
    kind: str
    label: str


@dataclass(frozen=True)
class Calibration:
    """Stored statistics of one model on one text; `objects` has one digest a layer."""

    digest: str
    text: CalibrationText
    tokens: int
    held_out_tokens: int
    largest: int
    condition: float | None  # None: singular
    seconds: float
    memoised: bool
    limit: int
    protocol: str
    windows: str
    objects: tuple[str, ...]

    def ids(self, registry: Registry) -> torch.Tensor:
        """Return the token ids of held-out windows of one length, [W, T]."""
        path = registry.objects.existing(self.windows)
        return torch.from_numpy(np.array(read_array(path, read_header(path).tensors["ids"]))).long()

    def layer(
        self, registry: Registry, layer: int, device: torch.device | str = "cpu"
    ) -> LayerStatistics:
        """Read the statistics of one layer to a device."""
        path = registry.objects.existing(self.objects[layer])
        tensors = {
            name: torch.from_numpy(np.array(read_array(path, info))).to(device)
            for name, info in read_header(path).tensors.items()
        }
        tokens, influence, energy = tensors.pop(_SCALARS).tolist()
        tensors["held_mask"] = tensors["held_mask"].bool()
        return LayerStatistics(tensors, int(tokens), influence, energy)

    @property
    def summary(self) -> str:
        """What the Gram matrices rest on, in one line."""
        condition = "singular" if self.condition is None else f"{self.condition:.1e}"
        return (
            f"calibrated on {self.text.label}: {self.tokens:,} tokens, {self.held_out_tokens:,} "
            f"held out; largest condition number of a Gram matrix: {condition}"
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """Warnings about what this calibration can support."""
        if self.tokens >= ENOUGH * self.largest:
            return ()
        return (
            f"{self.tokens:,} calibration tokens are fewer than {ENOUGH} for each of the "
            f"{self.largest:,} channels of the largest Gram matrix; more text would be safer",
        )


def find_text(registry: Registry, name: str) -> CalibrationText:
    """Return the evalset, or else the partition, of that name; raises `NotFound`."""
    for kind in ("evalset", "partition"):
        try:
            return CalibrationText(registry.resolve(kind, name), kind, name)
        except NotFound:
            continue
    known = {**registry.names("evalset"), **registry.names("partition")}
    raise registry.unknown("evalset or partition", name, known)


def calibrate(
    registry: Registry, model: Any, names: Family, *, subject: str, folder: Path,
    text: CalibrationText, protocol: Protocol, tokens: int | None, progress: Progress,
    trust_code: bool = False,
) -> Calibration:  # fmt: skip
    """Return the calibration of a model (`subject` is its digest), from the pool or made now.

    `tokens` bounds the text (default: 20 for each channel of the largest Gram matrix).
    Raises `Refused` for too little text and for activations that are not finite.
    """
    sizes = heads(model.config)
    largest = max(stock_sizes(model.config)["intermediate_size"], model.config.hidden_size,
                  sizes.queries * sizes.size)  # fmt: skip
    limit = tokens or max(DEFAULT_TOKENS, TOKENS_A_CHANNEL * largest)
    key = digest_of(
        {"calibration": VERSION, "subject": subject, "text": text.digest, "tokens": limit,
         "protocol": protocol.digest}
    )  # fmt: skip
    for row in registry.select("calibration", digest=key):
        # One that came from another pool came without its statistics.
        if all(map(registry.objects.has, [row["windows"], *row["layers"]])):
            return _calibration(row, text, memoised=True)
    documents = _documents(registry, text, limit)
    tokenised = tokenise(documents, folder, protocol, trust_code=trust_code)
    objects: dict[str, int] = {}
    with registry.writing():  # its objects must not be collected before they are recorded
        body = _gathered(
            registry, model, names, tokenised, limit=limit, largest=largest, objects=objects,
            progress=progress,
        )  # fmt: skip
        body |= {"subject": subject, "text": text.digest, "text_kind": text.kind,
                 "protocol": protocol.digest, "token_limit": limit}  # fmt: skip
        registry.record(
            records.keyed("protocol", protocol.digest, protocol.as_record()),
            records.keyed("calibration", key, body, objects),
        )
    return _calibration({"digest": key, **body}, text, memoised=False)


def tokens_of(
    registry: Registry, calibration: Calibration, folder: Path, *, trust_code: bool = False
) -> TokenisedSet:
    """Return the tokens of a calibration's text again."""
    row = registry.one("protocol", digest=calibration.protocol)
    protocol = Protocol(row["max_length"], row["tokenizer"], row["dtype"])
    documents = _documents(registry, calibration.text, calibration.limit)
    return tokenise(documents, folder, protocol, trust_code=trust_code)


def _documents(registry: Registry, text: CalibrationText, limit: int) -> list[str]:
    """Return the text's documents; of a partition as many as certainly hold `limit` tokens."""
    if text.kind == "evalset":
        return evalset_documents(registry, text.digest)
    units = registry.select("partition_units", partition=text.digest)
    documents, size = [], 0
    for document in itertools.chain.from_iterable(
        unit_text(registry, text.digest, unit["unit"]) for unit in units
    ):
        documents.append(document)
        size += len(document)
        if size > BYTES_A_TOKEN * limit:
            break
    return documents


def _gathered(
    registry: Registry, model: Any, names: Family, tokens: TokenisedSet, *, limit: int,
    largest: int, objects: dict[str, int], progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """Run the calibration, storing each layer's statistics, and return what there is to say."""
    sample = choose_windows(tokens, limit)
    if sample.tokens < largest:
        raise Refused(
            f"the calibration text is too short: {sample.tokens:,} tokens for Gram matrices of "
            f"{largest:,} channels",
            hint=f"calibrate on a text with at least {ENOUGH * largest:,} tokens",
            tokens=sample.tokens,
        )
    started = time.perf_counter()
    progress.start("calibrating", len(layers(model, names)), "layers")
    digests, conditions = [], []
    for _, statistics in gather(model, names, tokens, sample=sample, progress=progress.advance):
        digests.append(registry.put(_encoded(statistics), objects))
        conditions += [condition(statistics[name]) for name in ("mlp", "out")]
    return {
        "tokens": sample.tokens,
        "held_out_tokens": sample.held_out_tokens,
        "largest": largest,
        "condition": worst if math.isfinite(worst := max(conditions)) else None,
        "windows": registry.put(encode({"ids": ("I32", held_ids(tokens, sample))}), objects),
        "layers": digests,
        "seconds": time.perf_counter() - started,
    }


def _encoded(statistics: LayerStatistics) -> bytes:
    scalars = (statistics.tokens, statistics.influence, statistics.energy)
    arrays: dict[str, tuple[str, Any]] = {_SCALARS: ("F64", np.array(scalars, np.float64))}
    kinds = {torch.float64: "F64", torch.float32: "F32", torch.uint8: "U8"}
    for name, tensor in statistics.tensors.items():
        tensor = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor
        arrays[name] = (kinds[tensor.dtype], tensor.contiguous().numpy())
    return encode(arrays)


def _calibration(row: Mapping[str, Any], text: CalibrationText, *, memoised: bool) -> Calibration:
    return Calibration(
        row["digest"], text, row["tokens"], row["held_out_tokens"], row["largest"],
        row["condition"], row["seconds"], memoised, row["token_limit"], row["protocol"],
        row["windows"], tuple(row["layers"]),
    )  # fmt: skip
