"""Cards of published pools and models: what they say is true, and strangers' text stays text."""

from __future__ import annotations

from fractions import Fraction

import pytest
from huggingface_hub import DatasetCard, ModelCard
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from poolreg import Pool
from poolreg.errors import MissingPackage
from poolreg.models.folders import Merged
from poolreg.report import draw
from poolreg.sharing import cards, markup, single_facts
from poolreg.sharing.cards import pool_card
from poolreg.sharing.markup import markdown, plain
from poolreg.sharing.single_card import ModelFacts, Origin, model_card
from poolreg.store import records

HOSTILE = (
    "x|y<script>alert(1)</script>`z` [a](http://b) **c** \x1b[31m\u202e\n---\nlicense: mit\n# h"
)


@pytest.fixture(scope="module")
def measured(referenced):
    with Pool.open(referenced.root) as pool:
        yield pool


@pytest.fixture(scope="module")
def published(measured):
    return pool_card(measured.registry, url="you/pool", files=["models/base/config.json"])


def rendered(text):
    """Return the tokens of a card's body, as a reader of Markdown with tables sees them."""
    body = text.split("\n---\n", 1)[1]
    parser = MarkdownIt("commonmark").enable("table")
    return [t for block in parser.parse(body) for t in (block, *(block.children or ()))]


def tables(text):
    """Return the tables of a card as lists of rows of plain text."""
    found, row = [], []
    for token in rendered(text):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            row = []
            found[-1].append(row)
        elif token.type == "inline" and token.level >= 4:
            row.append("".join(t.content for t in token.children))
    return [[cells for cells in table if cells] for table in found]


def test_results_of_a_pool_are_those_of_the_catalog(measured, published):
    card = ModelCard(published[0])
    assert card.data.library_name == "poolreg"
    assert {"poolreg", "data-mixture", "model-merging"} <= set(card.data.tags)
    assert card.data.base_model is None
    known = {
        (row["label"], row["evalset_digest"]): row
        for row in measured.sql(
            "SELECT DISTINCT ON (subject, evalset_digest) * FROM scores"
        ).dicts()
    }
    seen = set()
    for result in card.data.eval_results:
        metric, label = result.metric_name.split(" of ")
        row = known[label, result.dataset_revision]
        assert result.metric_value == row[metric.replace(" ", "_")]
        assert result.dataset_name == row["evalset"]
        seen.add(label)
    singles = {"python", "web", "prose", "code"}
    assert {"base", *singles, "code+prose+python+web", "python+web"} <= seen
    assert len(card.data.eval_results) == len(seen) * 4 * 2


def test_the_table_has_the_seed_each_partition_all_and_the_best(measured, published):
    head, *rows = tables(published[0])[0]
    assert head == ["trained on", "code", "prose", "python", "web", "mean"]
    labels = [row[0] for row in rows]
    everything = "code+prose+python+web"
    assert labels[:6] == ["seed model base", "code", "prose", "python", "web", f"all: {everything}"]
    board = {
        (row["label"], row["evalset"]): row["bits_per_byte"]
        for row in measured.sql("SELECT label, evalset, bits_per_byte FROM scores").dicts()
    }
    for row in rows:
        label = row[0].removeprefix("seed model ").removeprefix("all: ")
        values = [board[label, evalset] for evalset in head[1:-1]]
        assert row[1:] == [f"{value:.4f}" for value in [*values, sum(values) / len(values)]]
    means = [float(row[-1]) for row in rows[6:]]
    assert means == sorted(means)
    for column, evalset in enumerate(head[1:-1], start=1):
        lowest = min(row[column] for row in rows)
        assert f"**{lowest}**" in published[0], evalset
    assert published[0].count("**") == 2 * (len(head) - 2)


def test_the_same_pool_gives_the_same_card_and_picture(measured, published):
    text, pictures = published
    assert pictures["heatmap.png"].startswith(b"\x89PNG")
    assert "](heatmap.png)" in text
    assert pool_card(measured.registry, url="you/pool", files=["models/base/config.json"]) == (
        text, pictures,
    )  # fmt: skip


def test_a_card_says_how_to_use_what_is_there(measured, published):
    text = published[0]
    assert "poolreg pull you/pool pool\n" in text
    assert "poolreg ask code+prose --pool pool\n" in text
    assert 'from_pretrained("you/pool", subfolder="models/base")' in text
    assert "- 4 partitions" in text
    assert "- 16 models (1 seed, 4 unit, 11 reference)" in text
    assert "training text" in text.split("## What is not here")[1]
    without, _ = pool_card(measured.registry, url="s3://bucket/my pool")
    assert "from_pretrained" not in without
    assert "poolreg pull 's3://bucket/my pool' pool\n" in without


def test_results_are_bounded(measured, monkeypatch):
    monkeypatch.setattr(cards, "MOST_BEST", 2)
    monkeypatch.setattr(cards, "MOST_ALONE", 1)
    monkeypatch.setattr(cards, "MOST_EVALSETS", 3)
    monkeypatch.setattr(markup, "MOST_LISTED", 2)
    text, _ = pool_card(measured.registry, url="you/pool")
    results, partitions = tables(text)
    assert len(results) == 1 + 1 + 1 + 1 + 2  # head, seed, alone, all, best
    assert len(results[0]) == 1 + 3 + 1
    assert "mean is over 1 more evalset" in text
    assert len(partitions) == 1 + 2
    assert "2 more are not shown." in text


def test_a_data_set_has_its_tables_in_the_viewer(measured):
    files = ["tables/scores.parquet", "tables/mixtures.parquet", "tables/odd.parquet"]
    text, _ = pool_card(measured.registry, url="you/pool", repo_type="dataset", files=files)
    card = DatasetCard(text)
    assert card.data.configs == [
        {"config_name": "scores", "data_files": "tables/scores.parquet", "default": True},
        {"config_name": "mixtures", "data_files": "tables/mixtures.parquet"},
    ]
    assert "model-index" not in text
    assert "--repo-type dataset" in text
    assert "Weights: these are results only" in text


def test_without_matplotlib_there_is_no_picture(measured, published, monkeypatch):
    def missing(package):
        raise MissingPackage("no")

    monkeypatch.setattr(draw, "need", missing)
    text, pictures = pool_card(measured.registry, url="you/pool")
    assert pictures == {}
    assert "heatmap.png" not in text
    assert tables(text) == tables(published[0])


def test_an_empty_pool_has_a_card(tmp_path):
    with Pool.create(tmp_path / "pool") as pool:
        text, pictures = pool_card(pool.registry, url="you/pool")
    assert pictures == {}
    assert ModelCard(text).data.eval_results is None
    assert "No mixture was measured yet." in text


# -- strangers --------------------------------------------------------------------------------


@given(
    st.text(alphabet=st.one_of(st.characters(), st.sampled_from("\\`*_[]<>#|!&~$@:.w-+=(){}\n")))
)
@example("www.evil.example")
@example("__init__")
@example("a_b &amp; &#60;b&#62;")
@example("\\")
def test_text_in_a_cell_is_one_piece_of_text(text):
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    blocks = parser.parse(f"| h |\n| --- |\n| x{markdown(text)}x |\n")
    inline = [block for block in blocks if block.type == "inline"]
    assert len(inline) == 2
    assert all(token.type in ("text", "text_special") for token in inline[1].children)
    assert "".join(token.content for token in inline[1].children) == f"x{plain(text)}x"
    assert "www." not in markdown(text).lower()


def hostile_pool(root):
    """Give names and labels to what is in a pool that no honest client writes."""
    with Pool.open(root) as pool:
        evalset = pool.registry.names("evalset")["code"]
        partition = pool.registry.names("partition")["code"]
        model = pool.registry.names("model")["base"]
        # The first name of an evalset or partition in the alphabet counts.
        for space, target in (("evalset", evalset), ("partition", partition), ("model", model)):
            old = {n: t for n, t in pool.registry.names(space).items() if t == target}
            pool.registry.record(
                *(records.name(space, name, "0" * 64) for name in old),
                records.name(space, HOSTILE, target),
            )
    return root


@pytest.mark.parametrize("repo_type", ["model", "dataset"])
def test_names_of_strangers_stay_text(referenced, published, tmp_path, repo_type):
    root = hostile_pool(referenced.copy(tmp_path / "pool"))
    with Pool.open(root) as pool:
        text, _ = pool_card(pool.registry, url=HOSTILE, repo_type=repo_type)
    card = (ModelCard if repo_type == "model" else DatasetCard)(text)
    assert card.data.license is None
    honest = ModelCard(published[0]).data.to_dict() | {"pretty_name": 1, "configs": 1}
    assert card.data.to_dict().keys() <= honest.keys()
    kinds = {token.type for token in rendered(text)}
    assert not kinds & {"html_block", "html_inline", "link_open", "code_block"}
    assert [len({len(row) for row in table}) for table in tables(text)] == [1, 1]
    cells = {cell for table in tables(text) for row in table for cell in row}
    assert plain(HOSTILE) in cells
    assert f"seed model {plain(HOSTILE)}" in cells
    assert text.isprintable() or set(text) - {"\n"} == {c for c in text if c.isprintable()}
    heads = [t.content for t in rendered(text) if t.type == "inline" and t.level == 1]
    assert sum(head == markdown(HOSTILE) for head in heads) == 1


# -- models -----------------------------------------------------------------------------------

SCORE = {
    "evalset": "wiki", "evalset_digest": "ab" * 32, "bits_per_byte": 1.25, "perplexity": 9.5,
    "parent_bits_per_byte": None, "max_length": 64, "dtype": "float32",
}  # fmt: skip


def facts(**changes):
    given = {
        "repo": "you/m", "title": "a+b", "kind": "merge", "digest": "cd" * 32, "how": "An average.",
        "parents": (("a/1", "1/3", "01" * 32), ("b/1", "2/3", "02" * 32)), "scores": (SCORE,),
        "lineage": (Origin("a/1", "trained from", "base", ("a",)),), "recipe": "ef" * 32,
    }  # fmt: skip
    return ModelFacts(**{**given, **changes})


def test_the_card_of_a_merge():
    text = model_card(facts(base_models=("org/one", "org/two")))
    data = ModelCard(text).data
    assert data.base_model == ["org/one", "org/two"]
    assert data["base_model_relation"] == "merge"
    assert data.library_name == "transformers"
    assert data.tags == ["poolreg", "merge"]
    assert [(r.metric_type, r.metric_value) for r in data.eval_results] == [
        ("bits_per_byte", 1.25), ("perplexity", 9.5),
    ]  # fmt: skip
    parents, scores, lineage = tables(text)
    assert parents[1:] == [["a/1", "1/3", "01" * 32], ["b/1", "2/3", "02" * 32]]
    assert scores[1:] == [["wiki", "1.2500", "9.5000", "64", "float32"]]
    assert lineage[1:] == [["a/1", "trained from", "base", "a"]]
    assert "ef" * 32 in text
    assert 'from_pretrained("you/m")' in text


def test_rounded_weights_do_not_claim_the_scores_of_exact_ones():
    text = model_card(facts(rounded="bfloat16"))
    assert ModelCard(text).data.eval_results is None
    assert "before the weights were rounded to bfloat16" in text


def test_a_variant_claims_no_relation_that_the_hub_does_not_know():
    compared = {**SCORE, "parent_bits_per_byte": 1.2}
    text = model_card(
        facts(kind="variant", custom_code=True, scores=(compared,), parents=(("a", "", "0" * 64),))
    )
    data = ModelCard(text).data
    assert "base_model_relation" not in data
    assert data.tags == ["poolreg", "compressed", "custom_code"]
    assert "trust_remote_code=True" in text
    assert "import poolreg" in text
    assert tables(text)[1][1] == ["wiki", "1.2500", "1.2000", "9.5000", "64", "float32"]


def test_a_model_card_of_hostile_facts():
    text = model_card(
        facts(
            repo="you/m", title=HOSTILE, base_models=(HOSTILE,),
            parents=((HOSTILE, "1", "`<b>`"),), lineage=(Origin(HOSTILE, "x", HOSTILE, (HOSTILE,)),),
            scores=({**SCORE, "evalset": HOSTILE},),
        )
    )  # fmt: skip
    data = ModelCard(text).data
    assert data.license is None
    assert data.base_model == [plain(HOSTILE)]
    assert data.eval_results[0].dataset_name == plain(HOSTILE)
    assert not {t.type for t in rendered(text)} & {"html_block", "html_inline", "link_open"}
    assert [len({len(row) for row in table}) for table in tables(text)] == [1, 1, 1]


def test_only_a_download_tells_what_a_folder_is_on_the_hub(tmp_path):
    cache = tmp_path / "hub" / "models--org--some-model.v2" / "snapshots" / ("a" * 40)
    parents = tuple((digit * 64, Fraction(1, 2)) for digit in "12")
    merged = Merged(tmp_path, "3" * 64, "4" * 64, parents, 1, 10)
    made = single_facts.folder_facts(
        [cache, tmp_path / "org" / "other"], ["one", "other"], merged, repo="you/m", dtype=None
    )
    assert made.base_models == ("org/some-model.v2",)
    assert made.parents[1] == ("other", "1/2", "2" * 64)


def test_facts_of_a_merge_come_from_the_pool(measured):
    subject = measured.resolve("2*python+web")
    merged = Merged(measured.root, "3" * 64, subject.digest, subject.components, 1, 10)
    made = single_facts.merge_facts(
        measured.registry, subject, merged, repo="you/m", dtype="float32"
    )
    assert made.rounded is None
    assert {(label, weight) for label, weight, _ in made.parents} == {
        ("python/1", "2/3"), ("web/1", "1/3"),
    }  # fmt: skip
    assert {(s.model, s.source, s.partitions) for s in made.lineage} == {
        ("python/1", "base", ("python",)), ("web/1", "base", ("web",)),
    }  # fmt: skip
    answers = measured.evaluate(["2*python+web"])
    assert {row["evalset_digest"]: row["bits_per_byte"] for row in made.scores} == {
        measured.registry.names("evalset")[a.evalset]: a.bits_per_byte for a in answers
    }
    rounded = single_facts.merge_facts(
        measured.registry, subject, merged, repo="you/m", dtype="bfloat16"
    )
    assert rounded.rounded == "bfloat16"
