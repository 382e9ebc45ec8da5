"""The model on the bench: laid out as a folder, loaded, calibrated, every layer analysed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poolreg.compress import stock
from poolreg.compress.architectures import Heads, family, heads, layers, read_layer
from poolreg.compress.attention import QueryKeyRanking, rank_queries_keys
from poolreg.compress.calibrations import Calibration, calibrate, find_text
from poolreg.compress.plan import LayerAnalysis, analyse
from poolreg.compress.probe import priced
from poolreg.compress.sizes import METHODS, TARGETS, check_ingredients, default_step
from poolreg.errors import Refused, UsageError
from poolreg.evaluation.protocol import Protocol, default_max_length
from poolreg.models.folders import merge_subject
from poolreg.models.loading import load_model, pick_device
from poolreg.models.modeling_poolreg import Family
from poolreg.models.resolve import Subject
from poolreg.models.stored import stored_config, stored_folder, stored_tensors
from poolreg.progress import Progress
from poolreg.store.registry import Registry
from poolreg.store.staging import working_folder


@dataclass(frozen=True)
class Compression:
    """How to compress; `calibrate` names the evalset or partition to calibrate on.

    `without` names ingredients of the method poolreg to leave out. `target` full: every module has
    sizes of its own; portable: MLP widths alone, one a layer; stock: one size for all layers,
    which plain transformers loads. `step` is what MLP widths are multiples of (default: by the
    width). `epsilon` is the temperature of modegpt's allocation. `sequential` measures each layer
    behind the layers compressed before it.
    """

    calibrate: str
    method: str = "poolreg"
    target: str = "full"
    without: tuple[str, ...] = ()
    epsilon: float = 0.1
    step: int | None = None
    sequential: bool = False
    tokens: int | None = None
    max_length: int | None = None
    dtype: str = "float32"
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"unknown method {self.method!r}", hint=f"use {' or '.join(METHODS)}")
        if self.target not in TARGETS:
            raise UsageError(f"unknown target {self.target!r}", hint=f"use {', '.join(TARGETS)}")
        if self.method == "modegpt" and self.without:
            raise UsageError(
                "--without leaves out what the method poolreg adds", hint="drop it for modegpt"
            )
        if not self.epsilon > 0:
            raise UsageError(f"epsilon is {self.epsilon}", hint="choose a temperature above 0")
        for name in ("tokens", "step", "max_length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"{name} is {value}", hint="choose a number of at least 1")
        check_ingredients(self.without)

    @property
    def ingredients(self) -> frozenset[str]:
        """What the method adds to the paper's, see `sizes.INGREDIENTS`."""
        return check_ingredients(self.without) if self.method == "poolreg" else frozenset()


@dataclass(frozen=True, eq=False)
class Workshop:
    """A model to compress: its folder, its family's names and sizes, calibration and analysis."""

    registry: Registry
    subject: Subject
    how: Compression
    folder: Path
    names: Family
    heads: Heads
    calibration: Calibration
    analyses: tuple[LayerAnalysis, ...]
    dtypes: Mapping[str, str]

    def load(self) -> Any:
        """Return the model, freshly loaded."""
        return _load(self.registry, self.subject, self.how, self.folder)

    @property
    def parent(self) -> dict[str, Any]:
        """The catalog's row of the model, or of the first one of the average."""
        return self.registry.one("model", digest=self.subject.components[0][0])


@contextlib.contextmanager
def opened(
    registry: Registry, subject: Subject, how: Compression, progress: Progress
) -> Iterator[Workshop]:
    """Lay out, load, calibrate and analyse what `subject` stands for.

    Raises `Incompatible` for a family that is not known and a variant, `Refused` for too little
    text, a model without tokenizer and activations that are not finite.
    """
    first = subject.components[0][0]
    config = stored_config(registry, first)
    names = family(config["model_type"])
    row = registry.one("model", digest=first)
    if not row["tokenizer"]:
        raise Refused(
            f"{subject.label} was added without a tokenizer, so it cannot be calibrated",
            hint="add it again with --tokenizer DIR",
        )
    length = how.max_length or default_max_length(row["context_length"])
    text = find_text(registry, how.calibrate)
    protocol = Protocol(length, row["tokenizer"], how.dtype)
    with _folder(registry, subject, progress) as folder:
        model = _load(registry, subject, how, folder)
        calibration = calibrate(
            registry, model, names, subject=subject.digest, folder=folder, text=text,
            protocol=protocol, tokens=how.tokens, progress=progress,
            trust_code=row["trusted_code"],
        )  # fmt: skip
        analyses = _analyse(registry, model, names, calibration, how=how, progress=progress)
        dtypes = {n: info.dtype for n, (_, info) in stored_tensors(registry, first).items()}
        sizes = heads(model.config)
        del model  # whoever compresses loads a fresh one: let there be one at a time
        yield Workshop(
            registry, subject, how, folder, names, sizes, calibration, tuple(analyses), dtypes
        )


@contextlib.contextmanager
def _folder(registry: Registry, subject: Subject, progress: Progress) -> Iterator[Path]:
    if len(subject.components) == 1:
        with stored_folder(registry, subject.digest) as folder:
            yield folder
        return
    with working_folder(registry.root / "tmp") as made:
        merge_subject(registry, subject, made / "merged", progress=progress)
        yield made / "merged"


def _load(registry: Registry, subject: Subject, how: Compression, folder: Path) -> Any:
    trusted = registry.one("model", digest=subject.components[0][0])["trusted_code"]
    return load_model(folder, dtype=how.dtype, device=pick_device(how.device), trust_code=trusted)


def _analyse(
    registry: Registry, model: Any, names: Family, calibration: Calibration, *, how: Compression,
    progress: Progress,
) -> list[LayerAnalysis]:  # fmt: skip
    sizes, watched = heads(model.config), layers(model, names)
    heads_too = how.target == "stock" and stock.heads_may_shrink(model.config)
    attention = how.target == "full" or heads_too
    rankings: list[QueryKeyRanking | None] = [None] * len(watched)
    if attention and not names.qk_norm:
        progress.start("ranking", len(watched), "layers")
        for index in range(len(watched)):
            statistics = calibration.layer(registry, index, device=model.device)
            rankings[index] = rank_queries_keys(statistics, sizes, how.ingredients)
            progress.advance(1)
        if how.target == "stock":
            rankings = list(stock.shared_pairs([r for r in rankings if r is not None]))
    progress.start("analysing", len(watched), "layers")
    found = []
    for index, (layer, ranking) in enumerate(zip(watched, rankings, strict=True)):
        weights = read_layer(layer, names, sizes)
        statistics = calibration.layer(registry, index, device=model.device)
        found.append(
            analyse(
                weights, statistics, sizes, scaling=scaling(layer, names),
                step=how.step or default_step(weights.down.shape[0]),
                ingredients=how.ingredients, scores=ranking, attention=attention,
            )
        )  # fmt: skip
        progress.advance(1)
    if not found[0].curves or "probe" not in how.ingredients:
        return found
    progress.start("probing", len(watched), "layers")
    return priced(
        model, names, sizes, found, ids=calibration.ids(registry).to(model.device),
        statistics=lambda index: calibration.layer(registry, index, device=model.device),
        ingredients=how.ingredients, progress=progress.advance,
    )  # fmt: skip


def scaling(layer: Any, names: Family) -> float:
    """Return what a stock layer multiplies its attention scores by."""
    return float(layer.get_submodule(names.attention).scaling)
