"""Cards: the README.md of a published pool.

A card is a view for people and for the Hub; nothing is read back from it. The same pool gives the
same card. `single_card` has those of single models.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from poolreg.errors import MissingPackage
from poolreg.models.resolve import Resolver
from poolreg.report import facts, figures
from poolreg.report.draw import Chart, write_chart
from poolreg.report.facts import Lens, Row
from poolreg.sharing.markup import (
    card_text,
    eval_results,
    listed,
    many,
    markdown,
    metrics,
    plain,
    python,
    run,
    shell,
    size,
    table,
)
from poolreg.store.registry import Registry

if TYPE_CHECKING:
    from huggingface_hub import CardData

MOST_ALONE = 100  # single partitions and units in the results
MOST_BEST = 20  # mixtures of several
MOST_EVALSETS = 12  # columns of the results
PICTURE = "heatmap.png"
TAGS = ("poolreg", "data-mixture", "data-ablation", "model-merging")
TABLES = ("scores", "mixtures", "partitions", "evalsets", "models", "proxy_pairs", "variant_list")


@dataclass(frozen=True)
class _Board:
    """The results that a card shows: rows are (kind, label, subject), cells by subject, evalset."""

    lens: Lens
    rows: tuple[tuple[str, str, str], ...]
    cells: Mapping[tuple[str, str], Row]


def pool_card(
    registry: Registry, *, url: str, repo_type: str = "model", files: Collection[str] = ()
) -> tuple[str, dict[str, bytes]]:
    """Return the README.md of a pool published at `url`, and the pictures beside it.

    `files` are the paths that are published with it: the card shows how to load a model that lies
    in models/, and a data set's card names the tables in tables/. Without matplotlib there is no
    picture.
    """
    lens = facts.find_lens(registry)
    board = _board(registry, lens) if lens else None
    chart = figures.heatmap(registry, lens) if lens else None
    picture = _drawn(chart) if chart and chart.panels else None
    parts = [
        f"# {markdown(url)}",
        _summary(registry, repo_type),
        _usage(registry, url, repo_type, files),
        _scores(board),
        f"![{markdown(chart.panels[0].finding)}]({PICTURE})" if chart and picture else "",
        chart.reading if chart and picture else "",
        _partitions(registry),
        _variants(registry),
        _absent(repo_type),
    ]
    data = _metadata(board, url, repo_type, files)
    return card_text(data, parts), {PICTURE: picture} if picture else {}


def _drawn(chart: Chart) -> bytes | None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / PICTURE
        try:
            write_chart(chart, path)
        except MissingPackage:
            return None
        return path.read_bytes()


def _board(registry: Registry, lens: Lens) -> _Board:
    ranked = facts.rows(registry, lens, "leaderboard")
    resolver = Resolver(registry)
    everything = str(resolver.expression("all")) if resolver.everything else ""
    alone = sorted(
        (row for row in ranked if row["size"] == 1), key=lambda row: str(row["mixture"])
    )[:MOST_ALONE]
    whole = [row for row in ranked if row["mixture"] == everything and row["size"] > 1][:1]
    best = [row for row in ranked if row["size"] > 1 and row not in whole][:MOST_BEST]
    rows = [("seed", lens.seed_label, lens.seed)]
    for kind, found in (("alone", alone), ("all", whole), ("mixture", best)):
        rows += [(kind, _label(row), row["subject"]) for row in found]
    cells = run(
        registry, "cells", lens.protocol, list(lens.evalsets), [subject for *_, subject in rows]
    )  # fmt: skip
    return _Board(
        lens, tuple(rows), {(cell["subject"], cell["evalset_digest"]): cell for cell in cells}
    )


def _label(row: Row) -> str:
    return f"{row['mixture']} (macro)" if row["scheme"] == "macro" else str(row["mixture"])


def _metadata(board: _Board | None, url: str, repo_type: str, files: Collection[str]) -> CardData:
    from huggingface_hub import DatasetCardData, ModelCardData

    if repo_type == "dataset":
        there = [name for name in TABLES if f"tables/{name}.parquet" in files] or ["scores"]
        configs = [
            {"config_name": name, "data_files": f"tables/{name}.parquet"}
            | ({"default": True} if name == there[0] else {})
            for name in there
        ]
        return DatasetCardData(pretty_name=plain(url), tags=list(TAGS), configs=configs)
    results = [
        result
        for _, label, subject in (board.rows if board else ())
        for digest, evalset in (board.lens.evalsets.items() if board else ())
        if board and (subject, digest) in board.cells
        for result in eval_results(
            evalset, digest, values=metrics(board.cells[subject, digest]), of=f" of {label}"
        )
    ]
    return ModelCardData(
        library_name="poolreg", tags=list(TAGS), pipeline_tag="text-generation",
        model_name=plain(url) if results else None, eval_results=results or None,
    )  # fmt: skip


def _summary(registry: Registry, repo_type: str) -> str:
    (totals,) = run(registry, "totals")
    models = registry.select("model_list")
    by_role: dict[str, int] = {}
    for row in models:
        by_role[row["role"]] = by_role.get(row["role"], 0) + 1
    roles = ", ".join(f"{count} {markdown(role)}" for role, count in by_role.items())
    what = "The results of a" if repo_type == "dataset" else "A"
    return (
        f"{what} pool of models made with poolreg. One model was trained on each part of a "
        "training corpus, all from the same seed model, and averages of them stand for models "
        "trained on mixtures of the parts: so it answers what training on a mixture would give, "
        f"without training.\n\n- {many(len(registry.select('partition_list')), 'partition')} of "
        f"the training corpus\n- {many(len(models), 'model')}{f' ({roles})' if roles else ''}\n"
        f"- {many(totals['mixtures_measured'], 'mixture')} measured, "
        f"{many(totals['evaluations_memoised'], 'evaluation')} memoised\n"
        f"- {figures.tokens(totals['tokens_trained'])} tokens trained in "
        f"{many(totals['models_trained'], 'run')}; averages stand for "
        f"{many(totals['trainings_avoided'], 'more run')} of "
        f"{figures.tokens(totals['tokens_avoided'])} tokens"
    )


def _usage(registry: Registry, url: str, repo_type: str, files: Collection[str]) -> str:
    kind = ["--repo-type", "dataset"] if repo_type == "dataset" else []
    names = [row["name"] for row in registry.select("partition_list") if "/" not in row["name"]]
    query = "SELECT label, evalset, bits_per_byte FROM scores ORDER BY evalset, bits_per_byte"
    lines = [shell("pip", "install", "poolreg"), shell("poolreg", "pull", url, "pool", *kind)]
    if names:
        lines.append(shell("poolreg", "ask", "+".join(names[:2]), "--pool", "pool"))
    lines.append(shell("poolreg", "sql", "--remote", url, *kind, query))
    return "\n\n".join(
        ["## How to use it", "```sh\n" + "\n".join(lines) + "\n```", *_loading(url, files)]
    )


def _loading(url: str, files: Collection[str]) -> Iterator[str]:
    """Yield how to load a model that is published as a folder, if there is one."""
    names = sorted(
        path.removeprefix("models/").removesuffix("/config.json")
        for path in files
        if path.startswith("models/") and path.endswith("/config.json")
    )
    if not names:
        return
    place = python(url.removeprefix("hf://"))
    folder = python(f"models/{names[0]}")
    if "://" in url and not url.startswith("hf://"):
        yield f"Any tool that reads Hugging Face folders loads those in `models/`: {len(names)}."
        return
    yield "Its models are in `models/`, as folders that transformers loads without poolreg:"
    yield (
        "```python\nfrom transformers import AutoModelForCausalLM\n\nmodel = "
        f"AutoModelForCausalLM.from_pretrained({place}, subfolder={folder})\n```"
    )


def _scores(board: _Board | None) -> str:
    if board is None:
        return "## Results\n\nNo mixture was measured yet."
    evalsets = list(board.lens.evalsets)[:MOST_EVALSETS]
    best = {digest: _lowest(board, digest) for digest in evalsets}
    rows = []
    for kind, label, subject in board.rows:
        values = [board.cells.get((subject, digest)) for digest in evalsets]
        cells = [
            _value(cell, best=cell is not None and subject == best[digest])
            for digest, cell in zip(evalsets, values, strict=True)
        ]
        every = [board.cells.get((subject, digest)) for digest in board.lens.evalsets]
        known = [cell["bits_per_byte"] for cell in every if cell]
        mean = f"{sum(known) / len(known):.4f}" if len(known) == len(every) else "–"
        rows.append([_who(kind, label), *cells, mean])
    names = [markdown(board.lens.evalsets[digest]) for digest in evalsets]
    return "\n\n".join(
        ["## Results", _said(board), table(["trained on", *names, "mean"], rows)]
    )  # fmt: skip


def _lowest(board: _Board, evalset: str) -> str:
    found = [
        (board.cells[subject, evalset]["bits_per_byte"], position, subject)
        for position, (_, _, subject) in enumerate(board.rows)
        if (subject, evalset) in board.cells
    ]
    return min(found)[2] if found else ""


def _who(kind: str, label: str) -> str:
    shown = markdown(label)
    return {"seed": f"seed model {shown}", "all": f"all: {shown}"}.get(kind, shown)


def _value(cell: Row | None, *, best: bool) -> str:
    if cell is None:
        return "–"
    return f"**{cell['bits_per_byte']:.4f}**" if best else f"{cell['bits_per_byte']:.4f}"


def _said(board: _Board) -> str:
    lens = board.lens
    left = len(lens.evalsets) - MOST_EVALSETS
    return (
        "Bits per byte, less is better; the best of a column is bold. Single partitions are "
        "trained models or the averages of their units; mixtures are exact averages, which "
        "estimate what training on the mixture would give. Windows of "
        f"{lens.max_length} tokens, computed in {markdown(lens.dtype)}. At most {MOST_BEST} "
        "mixtures of several partitions are shown, the best by the mean."
        + (f" The mean is over {left} more evalsets, which are not shown." if left > 0 else "")
        + (
            f" {many(lens.others, 'evaluation')} with other settings or another seed model cannot "
            "be compared with these and stand in the tables only."
            if lens.others
            else ""
        )
    )


def _partitions(registry: Registry) -> str:
    rows = [
        [markdown(row["name"]), f"{row['documents']:,}", size(row["bytes"]),
         f"{row['units']:,}", f"{row['trained']:,}"]
        for row in registry.select("partition_list")
    ]  # fmt: skip
    if not rows:
        return ""
    head = ["partition", "documents", "text", "base units", "with a model"]
    return f"## Partitions of the training corpus\n\n{listed(head, rows)}"


def _variants(registry: Registry) -> str:
    rows = [
        [markdown(row["variant"]), markdown(row["parent"]), markdown(row["method"]),
         f"{row['achieved']:.1%}", f"{row['parameters']:,}", markdown(row["calibrated_on"])]
        for row in sorted(
            registry.select("variant_list"),
            key=lambda row: (row["parent"], row["achieved"], row["digest"]),
        )
    ]  # fmt: skip
    if not rows:
        return ""
    head = ["variant", "made from", "method", "removed of the blocks", "parameters",
            "calibrated on"]  # fmt: skip
    return f"## Compressed variants\n\n{listed(head, rows)}"


def _absent(repo_type: str) -> str:
    lines = [
        "- The training text: a partition is known by the digests of its documents. The text of "
        "the evalsets is here, so that more mixtures can be measured on it.",
        "- Averages: they are recipes, exact weights over models. `poolreg merge` rebuilds any of "
        "them bit for bit.",
    ]
    if repo_type == "dataset":
        lines.append("- Weights: these are results only.")
    return "## What is not here\n\n" + "\n".join(lines)
