"""Measuring: subjects one after the other on one live model, wherever that may be.

Nothing here writes: a `Bench` yields what it measured, and whoever asked records it. It is made
from plain values (`Materials`, `Family`, `Target`), so the same call runs in this process, in
others and on other machines.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from poolreg.evaluation import scoring
from poolreg.evaluation.laps import lap_documents
from poolreg.evaluation.live import LiveModel
from poolreg.evaluation.materials import Materials
from poolreg.evaluation.protocol import Protocol
from poolreg.evaluation.scoring import Scores, TokenisedSet
from poolreg.models.loading import pick_device
from poolreg.progress import SILENT, Progress
from poolreg.tensors import encode

if TYPE_CHECKING:
    from poolreg.evaluation.evaluate import Settings


@dataclass(frozen=True)
class Target:
    """One subject and the evalsets to score it on, by digest; its weights as whole numbers.

    With a `lap` only the documents of that lap of a race are scored.
    """

    subject: str
    label: str
    family: str
    weights: tuple[tuple[str, int], ...]
    evalsets: tuple[str, ...]
    lap: int | None = None


@dataclass(frozen=True)
class Family:
    """Models that are averaged with each other, and how text is scored with them."""

    members: tuple[str, ...]
    protocol: Protocol


@dataclass(frozen=True, eq=False)
class Measured:
    """The sums of one subject on one evalset, and the objects that hold them in detail.

    `document_scores` are nll [D], tokens [D], bytes [D]; `token_scores`, of a single model alone,
    nll [N]; both as safetensors. With a `lap` the documents are those of that lap, in its order.
    """

    subject: str
    evalset: str
    nll: float
    tokens: int
    utf8_bytes: int
    documents: int
    seconds: float
    device: str
    document_scores: bytes
    token_scores: bytes | None
    lap: int | None = None


class Bench:
    """Measures targets with one live model at a time; called with neighbours it is fastest.

    Raises `Refused` on a machine that cannot read the materials.
    """

    def __init__(
        self, materials: Materials, families: Mapping[str, Family], settings: Settings
    ) -> None:
        self.materials, self.families, self.settings = materials.here(), families, settings
        self._live: dict[str, LiveModel] = {}  # of one family
        self._texts: dict[tuple[str, str, int | None], TokenisedSet] = {}

    def __call__(
        self, targets: Sequence[Target], *, progress: Progress = SILENT
    ) -> Iterator[tuple[Measured, ...]]:
        """Yield what each target scores on its evalsets."""
        with torch_threads(self.settings.threads):
            for target, following in zip(targets, [*targets[1:], None], strict=True):
                progress.note(target.label)
                model = self.load(target, following)
                yield tuple(
                    self.measure(model, target, evalset, progress) for evalset in target.evalsets
                )

    def load(self, target: Target, following: Target | None = None) -> PreTrainedModel:
        """Return the live model with a target's weights; `following` is what comes next."""
        if target.family not in self._live:
            self._live.clear()  # one family in memory at a time; targets are sorted by it
            members = self.families[target.family].members
            self._live[target.family] = LiveModel(
                self.materials, members, dtype=self.settings.dtype,
                device=pick_device(self.settings.device), threads=self.settings.threads,
                trust_code=self.materials.trusted.issuperset(members),
            )  # fmt: skip
        after = following.weights if following else ()
        return self._live[target.family].load(target.weights, after)

    def text(self, target: Target, evalset: str) -> TokenisedSet:
        """Return an evalset, or its part in a lap, as a target's family reads it; made once."""
        protocol = self.families[target.family].protocol
        key = (evalset, protocol.digest, target.lap)
        if key not in self._texts:
            if target.lap is None:
                self._texts[key] = self._tokenised(target, evalset, protocol)
            else:
                whole = self.text(replace(target, lap=None), evalset)
                part = lap_documents(evalset, len(whole.tokens), target.lap)
                self._texts[key] = whole.only(part)
        return self._texts[key]

    def _tokenised(self, target: Target, evalset: str, protocol: Protocol) -> TokenisedSet:
        first = target.weights[0][0]
        with self.materials.folder(first) as folder:
            return scoring.tokenise(
                self.materials.documents(evalset), folder, protocol,
                trust_code=first in self.materials.trusted,
            )  # fmt: skip

    def score(
        self, model: PreTrainedModel, text: TokenisedSet,
        progress: Callable[[int], None] | None = None,
    ) -> Scores:  # fmt: skip
        """Score a text, or some of its documents (`TokenisedSet.only`), on a loaded model."""
        batch = self.settings.batch_tokens
        return scoring.score(model, text, batch_tokens=batch, progress=progress)

    def measure(
        self, model: PreTrainedModel, target: Target, evalset: str, progress: Progress = SILENT
    ) -> Measured:
        """Score a target, which is loaded, on an evalset or its part in a lap."""
        text = self.text(target, evalset)
        # The bar counts bytes, which are known before anything is tokenised.
        told = _Scaled(int(text.bytes.sum()), text.total_tokens, progress)
        started = time.perf_counter()
        scores = self.score(model, text, told.advance)
        seconds = time.perf_counter() - started
        single = len(target.weights) == 1 and target.lap is None
        return Measured(
            target.subject, evalset, scores.total_nll, scores.total_tokens, scores.total_bytes,
            len(scores.tokens), seconds, str(model.device), scoring.document_scores(scores),
            encode({"nll": ("F32", scores.token_nll)}) if single else None, target.lap,
        )  # fmt: skip


class _Scaled:
    """Tells of `size` units in all as `total` others are done."""

    def __init__(self, size: int, total: int, progress: Progress) -> None:
        self._size, self._total, self._progress = size, max(total, 1), progress
        self._done = self._shown = 0

    def advance(self, count: int) -> None:
        self._done += count
        now = self._size * self._done // self._total
        self._progress.advance(now - self._shown)
        self._shown = now


@contextlib.contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Let torch use so many threads in the block (None: as many as it does)."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
