"""From expressions to exact recipes: weights against plain fractions, identities, errors."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from fractions import Fraction
from math import lcm

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pools import (
    add_data,
    arrays_of,
    contents,
    model_folder,
    set_tensors,
    unit_folder,
    write_texts,
)

from poolreg import Pool
from poolreg.canonical import digest_of
from poolreg.errors import MixtureError, NotFound, UsageError
from poolreg.models.resolve import Resolver
from poolreg.weights.checkpoint import fingerprint, read_checkpoint

COUNTS = {"alpha": 1, "beta": 2, "gamma": 3}


@pytest.fixture(scope="module")
def shown(tiny) -> Iterator[Pool]:
    """The tiny pool itself, which these tests only read."""
    with Pool.open(tiny.root) as pool:
        yield pool


@pytest.fixture(scope="module")
def model_of(tiny) -> dict[tuple[str, int], str]:
    """The digest of each unit's model, from its folder."""
    return {
        place: fingerprint(read_checkpoint(folder)).digest for place, folder in tiny.units.items()
    }


def by_model(pool: Pool, text: str, scheme: str = "micro") -> dict[str, Fraction]:
    return dict(pool.resolve(text, scheme=scheme).components)


# -- weights --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "scheme", "expected"),
    [
        ("alpha", "micro", {("alpha", 1): "1"}),
        ("beta/2", "macro", {("beta", 2): "1"}),
        ("beta", "micro", {("beta", 1): "1/2", ("beta", 2): "1/2"}),
        ("alpha+beta", "micro", {("alpha", 1): "1/3", ("beta", 1): "1/3", ("beta", 2): "1/3"}),
        ("alpha+beta", "macro", {("alpha", 1): "1/2", ("beta", 1): "1/4", ("beta", 2): "1/4"}),
        ("2*alpha+beta", "micro", {("alpha", 1): "1/2", ("beta", 1): "1/4", ("beta", 2): "1/4"}),
        ("2*alpha+beta", "macro", {("alpha", 1): "2/3", ("beta", 1): "1/6", ("beta", 2): "1/6"}),
        ("beta+beta/1", "micro", {("beta", 1): "2/3", ("beta", 2): "1/3"}),
        ("beta+beta/1", "macro", {("beta", 1): "3/4", ("beta", 2): "1/4"}),
        ("all-gamma", "micro", {("alpha", 1): "1/3", ("beta", 1): "1/3", ("beta", 2): "1/3"}),
        ("0.25*alpha+0.75*gamma/3", "micro", {("alpha", 1): "1/4", ("gamma", 3): "3/4"}),
    ],
)
def test_weights(text, scheme, expected, shown, model_of):
    found = by_model(shown, text, scheme)
    assert found == {model_of[place]: Fraction(weight) for place, weight in expected.items()}


@settings(deadline=None, max_examples=60)
@given(
    weights=st.dictionaries(st.sampled_from(sorted(COUNTS)), st.integers(0, 40), min_size=1),
    scheme=st.sampled_from(["micro", "macro"]),
)
def test_weights_against_plain_fractions(weights, scheme, shown, model_of):
    """micro: w_k / Σ w_j b_j for each unit of k; macro: w_k / (Σ w_j · b_k)."""
    text = "+".join(f"{weight}*{name}" for name, weight in weights.items())
    if not any(weights.values()):
        with pytest.raises(MixtureError, match="empty"):
            shown.resolve(text, scheme=scheme)
        return
    expected = {}
    for name, weight in weights.items():
        for unit in range(1, COUNTS[name] + 1):
            if scheme == "micro":
                share = Fraction(weight, sum(w * COUNTS[n] for n, w in weights.items()))
            else:
                share = Fraction(weight, sum(weights.values()) * COUNTS[name])
            if share:
                expected[model_of[name, unit]] = share
    subject = shown.resolve(text, scheme=scheme)
    assert dict(subject.components) == expected
    assert list(subject.components) == sorted(expected.items())
    scale = lcm(*(share.denominator for share in expected.values()))
    assert subject.integer_weights == tuple(
        (m, int(w * scale)) for m, w in sorted(expected.items())
    )


# -- identity -------------------------------------------------------------------------------


def test_a_recipe_is_its_models_and_weights(shown, model_of):
    subject = shown.resolve("2*alpha + beta/1")
    rows = sorted([[model_of["alpha", 1], 2, 3], [model_of["beta", 1], 1, 3]])
    assert subject.digest == digest_of({"recipe": "average-1", "components": rows})
    assert shown.resolve("beta/1+2*alpha") == subject
    assert shown.resolve("4*alpha+2*beta/1") == subject
    assert shown.resolve("alpha+beta/1").digest != subject.digest


def test_one_component_is_the_model_itself(shown, model_of):
    for text in ("beta/2", "7*beta/2"):
        subject = shown.resolve(text)
        assert subject.digest == model_of["beta", 2]
        assert (subject.kind, subject.mixture) == ("mixture", "beta/2")
        assert [record.kind for record in subject.records] == ["mixture"]
    assert shown.resolve("alpha").digest == shown.resolve("alpha/1").digest


def test_schemes_that_coincide_share_one_record(shown):
    one, other = (shown.resolve("alpha+beta/1", scheme=s) for s in ("micro", "macro"))
    assert one == other
    assert one.scheme == "micro"
    micro, macro = (shown.resolve("alpha+beta", scheme=s) for s in ("micro", "macro"))
    assert (micro.scheme, macro.scheme) == ("micro", "macro")
    assert micro.digest != macro.digest
    assert micro.mixture_digest != macro.mixture_digest
    # Another expression with the very same weights is the same average.
    assert macro.digest == shown.resolve("2*alpha+beta").digest


def test_digests_do_not_depend_on_names_or_the_order_of_adding(tiny, tmp_path):
    """The same data and models under other names, added backwards, in another pool."""
    names = {"alpha": "uno", "beta": "dos", "gamma": "tres"}
    with Pool.create(tmp_path / "pool") as pool:
        pool.add_model(tiny.seed, name="start", role="seed")
        for name, count in reversed(COUNTS.items()):
            pool.add_partition(names[name], [tiny.texts / f"{name}.train.jsonl"], units=count)
        for (name, unit), folder in reversed(tiny.units.items()):
            pool.add_model(folder, role="unit", partition=names[name], unit=unit, seed="start")
        there = [pool.resolve(text, scheme="macro") for text in ("dos+2*uno", "all", "tres/2")]
    with Pool.open(tiny.root) as pool:
        here = [pool.resolve(text, scheme="macro") for text in ("2*alpha+beta", "all", "gamma/2")]
    for one, other in zip(here, there, strict=True):
        assert one.components == other.components
        assert (one.digest, one.blend, one.mixture_digest) == (
            other.digest, other.blend, other.mixture_digest,
        )  # fmt: skip
        assert one.mixture != other.mixture


def test_the_blend_is_of_units_not_of_models(tiny, pool, tmp_path):
    before = pool.resolve("alpha+beta")
    folder = unit_folder(tmp_path / "u", tiny.seed, 50)
    pool.add_model(folder, role="unit", partition="alpha", seed="base")
    after = pool.resolve("alpha+beta")
    assert after.blend == before.blend
    assert after.digest != before.digest
    assert after.mixture_digest != before.mixture_digest


def test_a_blend_is_its_units_and_weights(shown):
    alpha, beta = (shown.partition(name)["units"] for name in ("alpha", "beta"))
    rows = [[alpha[0]["digest"], 4, 7], [beta[0]["digest"], 2, 7], [beta[1]["digest"], 1, 7]]
    subject = shown.resolve("4*alpha+2*beta/1+beta/2")
    assert subject.blend == digest_of(["blend", 1, sorted(rows)])


def test_two_names_of_one_partition_are_one_text(tiny, pool):
    plain = pool.resolve("alpha")
    pool.add_partition("again", [tiny.texts / "alpha.train.jsonl"])
    subject = pool.resolve("alpha+again")
    assert (subject.digest, subject.blend) == (plain.digest, plain.blend)
    assert subject.records[0].body["unit_tokens"] == 100


def test_the_records_describe_the_mixture(shown, model_of):
    subject = shown.resolve("2*beta+gamma/3", scheme="macro")
    recipe, mixture = (record.body for record in subject.records)
    assert mixture["mixture"] == "2*beta+gamma/3"
    assert (mixture["scheme"], mixture["size"]) == ("macro", 2)
    assert mixture["unit_tokens"] == 100 + 200 + 300
    digests = shown.registry.names("partition")
    assert mixture["weights"] == sorted([[digests["beta"], 0, 2, 3], [digests["gamma"], 3, 1, 3]])
    assert recipe["components"] == [[m, 1, 3] for m, _ in subject.components]
    assert subject.partitions == (digests["beta"], digests["gamma"])


# -- what a text may name -------------------------------------------------------------------


def test_models_by_name_and_digest(shown, model_of):
    base = shown.resolve("base")
    assert (base.label, base.kind, base.mixture, base.seed) == ("base", "model", None, base.digest)
    digest = model_of["gamma", 2]
    for text in (digest, digest[:12], digest[:6]):
        subject = shown.resolve(text)
        assert (subject.digest, subject.label, subject.kind) == (digest, "gamma/2", "model")
        assert subject.seed == base.digest
    with pytest.raises(NotFound, match="no partition or model is named"):
        shown.resolve(digest[:5])


def test_a_digest_may_look_like_a_number(tiny, pool, tmp_path):
    folder = unit_folder(tmp_path / "u", tiny.seed, 50)
    name = "model.norm.weight"
    raw = np.array(arrays_of(folder)[name][1])
    for _ in range(400):
        raw[0] += np.float32(0.01)
        set_tensors(folder, **{name: ("F32", raw)})
        digest = fingerprint(read_checkpoint(folder)).digest
        if digest[:6].isdigit():
            break
    assert pool.add_model(folder).digest == digest
    assert pool.resolve(digest[:6]).digest == digest


def test_names_in_any_unicode_form(tiny, pool, tmp_path):
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    assert composed != apart
    folder = unit_folder(tmp_path / "u", tiny.seed, 50)
    added = pool.add_model(folder, name=apart)
    assert pool.resolve(apart).digest == pool.resolve(composed).digest
    assert pool.model(apart)["digest"] == pool.model(composed)["digest"]
    assert pool.remove("model", apart) == added.digest
    with pytest.raises(NotFound, match=f"{composed} was removed"):
        pool.resolve(apart)


def test_groups(tiny, tmp_path):
    names = ["alpha", "beta", "gamma", "delta"]
    texts = write_texts(tmp_path / "texts", names)
    with Pool.create(tmp_path / "pool") as pool:
        for name, parent in zip(names, ["text", "code", "text", None], strict=True):
            pool.add_partition(name, [texts / f"{name}.train.jsonl"], parent=parent)
        pool.add_model(tiny.seed, name="base", role="seed")
        for number, name in enumerate(names):
            folder = unit_folder(tmp_path / name, tiny.seed, 60 + number)
            pool.add_model(folder, role="unit", partition=name, seed="base")
        assert pool.resolve("text").mixture == "alpha+gamma"
        assert pool.resolve("2*text+code").mixture == "2*alpha+beta+2*gamma"
        assert pool.resolve("all-text").mixture == "beta+delta"
        assert pool.resolve("all").mixture == "alpha+beta+delta+gamma"


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ("", MixtureError, "empty"),
        ('{"json"}', MixtureError, "not a mixture"),
        ("alpha+", MixtureError, "name is missing"),
        ("-1*alpha", MixtureError, "not negative"),
        ("0*alpha", MixtureError, "empty"),
        ("alpah", NotFound, "no partition or model is named alpah\ndid you mean alpha"),
        ("alpha+btea", NotFound, "no partition is named btea\ndid you mean beta"),
        ("alpha+base", NotFound, "no partition is named base"),
        ("beta/3", NotFound, "beta/3 does not exist: beta has 2 units"),
        ("alpha; DROP TABLE models", MixtureError, "not a mixture"),
        ("../x", MixtureError, "not a mixture"),
        ("x" * 300, MixtureError, "not a name"),
        ("deadbeef", NotFound, "no partition or model is named deadbeef"),
    ],
)
def test_what_names_nothing(text, kind, words, shown):
    with pytest.raises(kind, match=words.replace("+", r"\+")):
        shown.resolve(text)


def test_an_unknown_scheme_or_seed(shown):
    with pytest.raises(MixtureError, match="unknown scheme 'mean'"):
        shown.resolve("alpha", scheme="mean")
    with pytest.raises(NotFound, match="no model is named nobody"):
        shown.resolve("alpha", seed="nobody")


def test_an_ambiguous_digest(shown, monkeypatch):
    found = [{"digest": "abcdef" + "0" * 58}, {"digest": "abcdef" + "1" * 58}]
    real = shown.registry.select

    def select(lookup, **parameters):
        return found if lookup == "model_digests" else real(lookup, **parameters)

    monkeypatch.setattr(shown.registry, "select", select)
    with pytest.raises(UsageError, match="abcdef begins 2 model digests"):
        shown.resolve("abcdef")


# -- missing models, several seeds ----------------------------------------------------------


def test_a_unit_without_a_model_is_named_with_the_way_out(pool, tiny):
    pool.add_partition("delta", [tiny.texts / "alpha.train.jsonl"], units=2)
    before = contents(pool.root)
    with pytest.raises(NotFound) as caught:
        pool.resolve("alpha+delta")
    assert caught.value.message == "no model of delta/1 was trained from seed 'base'"
    assert "poolreg train unit delta/1" in caught.value.hint
    assert "--partition delta --unit 1 --from base" in caught.value.hint
    assert pool.resolve("alpha+beta/1").mixture == "alpha+beta/1"
    assert contents(pool.root) == before


def test_a_pool_without_a_seed(tmp_path):
    texts = write_texts(tmp_path / "texts", ["alpha"])
    with Pool.create(tmp_path / "pool") as pool:
        with pytest.raises(NotFound, match="no partition or model is named alpha"):
            pool.resolve("alpha")
        with pytest.raises(MixtureError):
            pool.resolve("all")
        add_data(pool, texts, {"alpha": 1})
        with pytest.raises(NotFound, match=r"no seed model yet\n.*poolreg train seed"):
            pool.resolve("alpha")


@pytest.fixture
def two_seeds(tiny, pool, tmp_path) -> Pool:
    """The tiny pool with another seed, from which alpha and beta/1 were trained."""
    second = model_folder(tmp_path / "second", seed=1)
    pool.add_model(second, name="second", role="seed")
    for number, (name, unit) in enumerate([("alpha", 1), ("beta", 1)]):
        folder = unit_folder(tmp_path / f"second-{name}", second, number)
        pool.add_model(folder, role="unit", partition=name, unit=unit, seed="second")
    return pool


def test_the_seed_that_has_the_models(two_seeds):
    base, second = two_seeds.resolve("base").digest, two_seeds.resolve("second").digest
    assert two_seeds.resolve("alpha+beta").seed == base
    with pytest.raises(UsageError, match=r"several seed models .*: base, second\n.*NAME"):
        two_seeds.resolve("alpha+beta/1")
    one = two_seeds.resolve("alpha+beta/1", seed="base")
    other = two_seeds.resolve("alpha+beta/1", seed="second")
    assert (one.seed, other.seed) == (base, second)
    assert not {m for m, _ in one.components} & {m for m, _ in other.components}
    assert one.blend == other.blend
    with pytest.raises(NotFound, match="no model of beta/2 was trained from seed 'second'"):
        two_seeds.resolve("beta", seed="second")
    with pytest.raises(NotFound, match="no model of gamma/1 was trained from seed 'second'"):
        two_seeds.resolve("gamma", seed="second")


def test_a_seed_must_be_one(pool, tiny):
    pool.add_model(tiny.units["beta", 1], name="mine")
    with pytest.raises(UsageError, match="'mine' is not a seed model"):
        pool.resolve("alpha", seed="mine")


def test_a_resolver_is_a_snapshot(pool):
    resolver = Resolver(pool.registry)
    before = resolver.subject("alpha+beta")
    pool.remove("model", "alpha/1")
    assert resolver.subject("alpha+beta") == before
    with pytest.raises(NotFound):
        pool.resolve("alpha+beta")
