"""Compressed variants of a pool's models and mixtures: plan them, make them, record them.

A `Workshop` (see `workshop.opened`) is planned for any number of ratios; `make` carries a plan out.
A variant is a model of the pool like any other, with a record of what it was made from and how.
What was made once is not made again: the request is the key.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from poolreg.canonical import digest_of
from poolreg.compress import stock
from poolreg.compress.apply import Shrunk, install, shrink
from poolreg.compress.architectures import layers, read_layer
from poolreg.compress.calibrate import LayerStatistics, choose_windows, gather
from poolreg.compress.calibrations import tokens_of
from poolreg.compress.export import check_logits, round_to_storage, write_folder
from poolreg.compress.plan import choose_sizes
from poolreg.compress.sizes import PARTS, LayerSizes
from poolreg.compress.workshop import Workshop, scaling
from poolreg.errors import UsageError
from poolreg.evaluation.evaluate import note_subjects
from poolreg.models.modeling_poolreg import PREFIX, config_entries
from poolreg.models.stored import AddedModel, Run, add_model, stored_config
from poolreg.progress import SILENT, Progress
from poolreg.store import records
from poolreg.store.journal import Record
from poolreg.store.staging import working_folder
from poolreg.tensors import DTYPE_BYTES

VERSION = 1  # of the method; a change of it makes variants anew
CHECKED_WINDOWS = 2  # windows on which a folder's logits are compared


@dataclass(frozen=True)
class ModulePlan:
    """One part of one layer (see `sizes.PARTS`): its size, what is kept, and the error of that.

    `error` is predicted from the calibration, in the plan's `error_unit` (None where the method
    does not look).
    """

    layer: int
    part: str
    size: int
    kept: int
    parameters: int
    kept_parameters: int
    error: float | None


@dataclass(frozen=True)
class VariantPlan:
    """What one ratio comes to; pairs are (before, after), of the blocks and of the whole model.

    Errors are in nats per token (the divergence of the predictions) where parts were probed, else
    mean squared changes of the residual stream relative to the stream's own.
    """

    ratio: float
    sizes: tuple[LayerSizes, ...]
    modules: tuple[ModulePlan, ...]
    block_parameters: tuple[int, int]
    parameters: tuple[int, int]
    bytes: tuple[int, int]
    error_unit: str
    calibrated_on: str
    calibration: str
    notes: tuple[str, ...]

    @property
    def achieved(self) -> float:
        """The share of the block parameters that goes."""
        before, after = self.block_parameters
        return (before - after) / before

    @property
    def error(self) -> float | None:
        """The sum of the modules' errors, None if any is not known."""
        errors = [module.error for module in self.modules]
        return None if None in errors else sum(e for e in errors if e is not None)


@dataclass(frozen=True)
class Variant:
    """A compressed model in the pool.

    `shared_bytes` of its files stood in the store before. `logit_difference` is the largest one
    between the stored model and the one in memory, relative to the largest logit.
    """

    label: str
    digest: str
    parent: str
    parent_label: str
    plan: VariantPlan
    logit_difference: float
    bytes: int
    shared_bytes: int
    seconds: float
    new: bool


def check_ratios(ratios: Sequence[float], name: str | None = None) -> list[str | None]:
    """Return a name for each ratio's variant; raises `UsageError` for ratios outside (0, 1)."""
    for ratio in ratios:
        if not 0 < ratio < 1:
            raise UsageError(
                f"the ratio {ratio:g} is not between 0 and 1",
                hint="it is the share of the block parameters to remove, such as 0.3",
            )
    if name is None or len(ratios) == 1:
        return [name] * len(ratios)
    return [f"{name}-{100 * ratio:g}" for ratio in ratios]


def plan(workshop: Workshop, ratio: float) -> VariantPlan:
    """Choose sizes that remove `ratio` of the block parameters.

    Raises `UsageError` for a ratio beyond what the target allows.
    """
    analyses, how = workshop.analyses, workshop.how
    if how.target == "stock":
        sizes = stock.uniform_sizes(analyses, ratio)
    else:
        sizes = choose_sizes(analyses, ratio, epsilon=how.epsilon, ingredients=how.ingredients)
    modules = tuple(_modules(workshop, sizes))
    before = sum(layer.parameters for layer in analyses)
    after = before - sum(layer.removed(s) for layer, s in zip(analyses, sizes, strict=True))
    row = workshop.parent
    gone = DTYPE_BYTES[row["dtype"]] * (before - after)
    return VariantPlan(
        ratio, tuple(sizes), modules, (before, after),
        (row["parameters"], row["parameters"] - before + after),
        (row["bytes"], row["bytes"] - gone),
        "nats per token" if "probe" in how.ingredients else "of the residual stream",
        workshop.calibration.text.label, workshop.calibration.summary, workshop.calibration.notes,
    )  # fmt: skip


def _modules(workshop: Workshop, sizes: Sequence[LayerSizes]) -> Iterator[ModulePlan]:
    for index, (layer, size) in enumerate(zip(workshop.analyses, sizes, strict=True)):
        for part in PARTS:
            full, kept = getattr(layer.full, part), getattr(size, part)
            if not full:
                continue
            curve = layer.curves.get(part)
            error = None if curve is None else float(curve.errors[(curve.sizes >= kept).argmax()])
            cost = layer.costs[part]
            yield ModulePlan(
                index, part, full, kept, full * cost, kept * cost, 0.0 if kept == full else error
            )


def make(
    workshop: Workshop, planned: VariantPlan, *, name: str | None = None, replace: bool = False,
    progress: Progress = SILENT,
) -> Variant:  # fmt: skip
    """Make the variant of a plan, prove it by its logits, and add it to the pool.

    Raises `Conflict` for a name that is taken, `Damage` if the stored model does not give the
    logits of the one in memory.
    """
    registry, subject = workshop.registry, workshop.subject
    if name:
        registry.check_free("model", name, None, replace=True)
    started = time.perf_counter()
    request = _request(workshop, planned)
    known = registry.select("variant_of_request", request=digest_of(request))
    if known:
        return _known(workshop, planned, known[0], name, replace=replace)
    if name:
        registry.check_free("model", name, "", replace=replace)
    model, errors = _compressed(workshop, planned, progress)
    with working_folder(registry.root / "tmp") as folder:
        _write(workshop, planned, model, folder)
        ids = workshop.calibration.ids(registry)[:CHECKED_WINDOWS]
        difference = check_logits(
            model, folder, ids.to(model.device), dtype=workshop.how.dtype,
            trust_code=workshop.parent["trusted_code"],
        )  # fmt: skip
        run = Run(role="variant", how="compressed", mixture=subject.mixture, scheme=subject.scheme)
        objects_before = {row["digest"] for row in registry.select("objects")}
        added = add_model(
            registry, folder, run, name=name, replace=replace,
            trust_code=workshop.parent["trusted_code"],
        )  # fmt: skip
    seconds = time.perf_counter() - started
    shared = sum(
        row["bytes"] for row in registry.select("model_files", model=added.digest)
        if row["role"] == "weights" and row["object"] in objects_before
    )  # fmt: skip
    body = _body(workshop, planned, added, request) | {
        "modules": [_row(module, errors) for module in planned.modules],
        "logit_difference": difference,
        "shared_bytes": shared,
        "seconds": seconds,
    }
    _record(workshop, body)
    label = registry.one("model_label", model=added.digest)["label"]
    return Variant(
        label,
        added.digest,
        subject.digest,
        subject.label,
        planned,
        difference,
        added.bytes,
        shared,
        seconds,
        True,
    )


def _compressed(
    workshop: Workshop, planned: VariantPlan, progress: Progress
) -> tuple[Any, list[dict[str, float]]]:
    """Return the compressed model, as it will be stored, and each layer's held-out errors."""
    model, names = workshop.load(), workshop.names
    errors = []
    progress.start("compressing", len(planned.sizes), "layers")
    for index, (layer, sizes) in enumerate(zip(layers(model, names), planned.sizes, strict=True)):
        statistics = _statistics(workshop, model, index)
        shrunk: Shrunk = shrink(
            read_layer(layer, names, workshop.heads), statistics, workshop.heads,
            analysis=workshop.analyses[index], sizes=sizes, scaling=scaling(layer, names),
            ingredients=workshop.how.ingredients,
        )  # fmt: skip
        install(layer, shrunk, names, model.config, sizes.entry(workshop.analyses[index].full))
        errors.append(shrunk.errors)
        progress.advance(1)
    round_to_storage(model, workshop.dtypes, workshop.parent["dtype"])
    return model, errors


def _entries(workshop: Workshop, planned: VariantPlan) -> list[dict[str, int]]:
    return [
        sizes.entry(layer.full)
        for sizes, layer in zip(planned.sizes, workshop.analyses, strict=True)
    ]


def _statistics(workshop: Workshop, model: Any, index: int) -> LayerStatistics:
    """Return a layer's statistics: stored ones, or of the model as it now is (`sequential`)."""
    stored = workshop.calibration.layer(workshop.registry, index, device=model.device)
    if not workshop.how.sequential or index == 0:
        return stored
    tokens = tokens_of(
        workshop.registry, workshop.calibration, workshop.folder,
        trust_code=workshop.parent["trusted_code"],
    )  # fmt: skip
    sample = choose_windows(tokens, workshop.calibration.limit)
    ((_, now),) = gather(model, workshop.names, tokens, sample=sample, only=[index])
    return now


def _write(workshop: Workshop, planned: VariantPlan, model: Any, folder: Path) -> None:
    """Write the model's folder, in the class that the target asks for."""
    config = stored_config(workshop.registry, workshop.subject.components[0][0])
    if workshop.how.target == "stock":
        size, full = planned.sizes[0], workshop.analyses[0].full
        frequencies = None
        if size.pairs != full.pairs:
            scores = workshop.analyses[0].scores
            assert scores is not None  # pairs shrink only where they were ranked
            frequencies = model.base_model.rotary_emb.inv_freq[scores.pairs[0].kept(size.pairs)]
        made = stock.stock_config(config, workshop.names, size, frequencies)
        state = stock.stock_tensors(model, full.values)
    else:
        made = config | {
            "model_type": PREFIX + config["model_type"],
            "architectures": config_entries(config["model_type"])["architectures"],
            "layer_sizes": _entries(workshop, planned),
        }
        state = model.state_dict()
    tied = set(model.all_tied_weights_keys)
    write_folder(
        {name: value for name, value in state.items() if name not in tied}, made, folder,
        template=workshop.folder, names=workshop.names, dtypes=workshop.dtypes,
        default=workshop.parent["dtype"],
    )  # fmt: skip


# -- records -------------------------------------------------------------------------------


def _request(workshop: Workshop, planned: VariantPlan) -> dict[str, Any]:
    """Return all that the variant depends on."""
    how = workshop.how
    return {
        "variant": VERSION, "parent": workshop.subject.digest, "ratio": planned.ratio,
        "calibration": workshop.calibration.digest, "method": how.method, "target": how.target,
        "without": sorted(set(how.without)), "epsilon": how.epsilon, "step": how.step,
        "sequential": how.sequential,
    }  # fmt: skip


def _body(
    workshop: Workshop, planned: VariantPlan, added: AddedModel, request: dict[str, Any]
) -> dict[str, Any]:
    return {
        **request, "model": added.digest, "achieved": planned.achieved,
        "block_parameters": planned.block_parameters[1],
        "parent_block_parameters": planned.block_parameters[0],
        "parent_parameters": planned.parameters[0], "parent_bytes": planned.bytes[0],
        "parent_label": workshop.subject.label,
    }  # fmt: skip


def _row(module: ModulePlan, errors: Sequence[dict[str, float]]) -> list[Any]:
    measured = errors[module.layer].get(module.part, 0.0)
    return [module.layer, module.part, module.size, module.kept, module.parameters,
            module.kept_parameters, module.error, measured]  # fmt: skip


def _record(workshop: Workshop, body: dict[str, Any]) -> None:
    note_subjects(workshop.registry, [workshop.subject])
    record: Record = records.keyed("variant", records.variant_id(body), body)
    with workshop.registry.writing():
        workshop.registry.record(record)


def _known(
    workshop: Workshop, planned: VariantPlan, row: dict[str, Any], name: str | None, *,
    replace: bool,
) -> Variant:  # fmt: skip
    """Return a variant that the pool has, under one more name if one is given."""
    registry = workshop.registry
    if name:
        name = registry.check_free("model", name, row["model"], replace=replace)
        with registry.writing():
            registry.record(registry.naming("model", name, row["model"]))
    label = registry.one("model_label", model=row["model"])["label"]
    return Variant(
        label, row["model"], workshop.subject.digest, workshop.subject.label, planned,
        row["logit_difference"], row["bytes"], row["shared_bytes"], row["seconds"], False,
    )  # fmt: skip
