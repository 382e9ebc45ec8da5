"""Cards of single models: the README.md of a published merge, variant or stored model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from poolreg.report.facts import Row
from poolreg.sharing.markup import (
    card_text,
    code,
    eval_results,
    listed,
    markdown,
    metrics,
    plain,
    python,
    run,
    table,
)
from poolreg.store.registry import Registry

if TYPE_CHECKING:
    from huggingface_hub import CardData


@dataclass(frozen=True)
class Origin:
    """One step of a lineage: `model` is `relation` ("trained from", …) `source`, on partitions."""

    model: str
    relation: str
    source: str
    partitions: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelFacts:
    """What the card of one model says.

    `kind` is merge, variant or model. `parents` are (label, weight, digest), the weight empty
    where there is none; `base_models` are repositories on the Hub. `how` are sentences of ours.
    `scores` are rows of the statement `scores`, of a model whose values are those published unless
    `rounded` names the dtype that they were rounded to. `recipe` is the digest of a merge.
    """

    repo: str
    title: str
    kind: str
    digest: str
    how: str
    parents: tuple[tuple[str, str, str], ...] = ()
    base_models: tuple[str, ...] = ()
    lineage: tuple[Origin, ...] = ()
    scores: tuple[Row, ...] = ()
    recipe: str | None = None
    rounded: str | None = None
    custom_code: bool = False


def model_scores(registry: Registry, subject: str, parent: str | None = None) -> tuple[Row, ...]:
    """Return the memoised scores of a model or average, beside those of its parent."""
    return tuple(run(registry, "scores", subject, parent))


def model_card(facts: ModelFacts) -> str:
    """Return the README.md of one published model."""
    parts = [
        f"# {markdown(facts.title)}",
        facts.how,
        _loads(facts),
        _parents(facts),
        _measured(facts),
        _lineage(facts),
        _identity(facts),
    ]
    return card_text(_model_metadata(facts), parts)


def _model_metadata(facts: ModelFacts) -> CardData:
    from huggingface_hub import ModelCardData

    results = [
        result
        for row in (() if facts.rounded else facts.scores)
        for result in eval_results(
            row["evalset"], row["evalset_digest"], values=metrics(row),
            of=f", windows of {row['max_length']} tokens, {row['dtype']}",
        )
    ]  # fmt: skip
    tags = ["poolreg", *{"merge": ["merge"], "variant": ["compressed"]}.get(facts.kind, [])]
    # Of adapter, finetune, merge and quantized, the relations that the Hub knows, none is what a
    # compressed variant is to its parent.
    relation = {"base_model_relation": "merge"} if facts.kind == "merge" else {}
    return ModelCardData(
        base_model=[plain(name) for name in facts.base_models] or None,
        **relation,  # type: ignore[arg-type]
        library_name="transformers", pipeline_tag="text-generation",
        tags=[*tags, *(["custom_code"] if facts.custom_code else [])],
        model_name=plain(facts.repo) if results else None, eval_results=results or None,
    )  # fmt: skip


def _loads(facts: ModelFacts) -> str:
    place = python(facts.repo)
    trust = ", trust_remote_code=True" if facts.custom_code else ""
    shown = (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({place}{trust})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({place})\n```"
    )
    if not facts.custom_code:
        return shown
    if facts.kind != "variant":
        return f"{shown}\n\nThe repository holds code of its own, which runs when it is loaded."
    return (
        f"{shown}\n\nIts layers have sizes of their own, so the class that loads it is in this "
        "repository. Where poolreg is installed, `import poolreg` first makes transformers know "
        "the class, and `trust_remote_code` is not needed."
    )


def _parents(facts: ModelFacts) -> str:
    rows = [
        [markdown(label), weight or "–", code(digest)] for label, weight, digest in facts.parents
    ]
    return f"## Made from\n\n{listed(['model', 'weight', 'digest'], rows)}" if rows else ""


def _measured(facts: ModelFacts) -> str:
    if not facts.scores:
        return ""
    compared = any(row["parent_bits_per_byte"] is not None for row in facts.scores)
    head = ["evalset", "bits per byte", "perplexity", "window", "computed in"]
    rows = []
    for row in facts.scores:
        cells = [f"{row['bits_per_byte']:.4f}", f"{row['perplexity']:.4f}", str(row["max_length"])]
        if compared:
            before = row["parent_bits_per_byte"]
            cells.insert(1, "–" if before is None else f"{before:.4f}")
        rows.append([markdown(row["evalset"]), *cells, markdown(row["dtype"])])
    if compared:
        head.insert(2, "before")
    note = (
        f"Measured before the weights were rounded to {facts.rounded}.\n\n" if facts.rounded else ""
    )
    return f"## Scores\n\n{note}{table(head, rows)}"


def _lineage(facts: ModelFacts) -> str:
    rows = [
        [markdown(step.model), step.relation, markdown(step.source),
         markdown(", ".join(step.partitions)) or "–"]
        for step in facts.lineage
    ]  # fmt: skip
    if not rows:
        return ""
    return f"## Lineage\n\n{listed(['model', 'relation', 'from', 'on partitions'], rows)}"


def _identity(facts: ModelFacts) -> str:
    lines = [f"- Model digest: {code(facts.digest)}"]
    if facts.recipe:
        lines.append(f"- Recipe digest: {code(facts.recipe)}; the recipe is in `poolreg.json`")
    return "## Identity\n\n" + "\n".join(lines)
