"""Predictions of mixtures beside what trained models gave."""

from __future__ import annotations

import math

import numpy as np
import pools
import pytest

from poolreg import Pool
from poolreg.decisions.ensemble import ensemble_loss, token_losses
from poolreg.decisions.measures import measures_named, only_seed, protocol_of
from poolreg.decisions.proxies import AVERAGE, KINDS, Blender, compare, gather, reference_models
from poolreg.errors import NotFound
from poolreg.evaluation.evaluate import Settings


@pytest.fixture
def shared(referenced, tmp_path):
    with Pool.open(referenced.copy(tmp_path / "pool")) as pool:
        yield pool


def comparisons(pool, on=(), **options):
    return compare(
        pool.registry, on, seed=only_seed(pool.registry), settings=Settings(),
        run_missing=options.pop("run_missing", False),
    )  # fmt: skip


def scores(pool):
    rows = pool.sql("SELECT mixture, evalset, bits_per_byte FROM scores WHERE kind = 'mixture'")
    return {(row[0], row[1]): row[2] for row in rows.rows}


class TestEnsemble:
    @pytest.mark.parametrize("tokens", [1, 3, 70_000])
    @pytest.mark.parametrize("weights", [[1.0], [0.5, 0.5], [0.2, 0.0, 0.8], [0.0, 1.0, 0.0]])
    def test_against_the_plain_formula(self, tokens, weights):
        losses = np.random.default_rng(0).exponential(3.0, (tokens, len(weights)))
        plain = -np.log((np.exp(-losses) * weights).sum(axis=1)).sum()
        assert ensemble_loss(losses.astype(np.float32), weights) == pytest.approx(plain, rel=1e-6)

    def test_nothing_underflows(self):
        losses = np.array([[800.0, 900.0]])
        assert ensemble_loss(losses, [0.5, 0.5]) == pytest.approx(800 + math.log(2))

    def test_one_model_is_itself(self, shared):
        registry = shared.registry
        (measure,) = measures_named(registry, ["code"])
        protocol = protocol_of(registry, only_seed(registry), Settings()).digest
        model = shared.resolve("code").digest
        losses = token_losses(registry, measure.digest, protocol, [model])
        (answer,) = shared.ask("code", "code")
        assert len(losses) == answer.tokens
        assert ensemble_loss(losses, [1.0]) == pytest.approx(answer.nll, rel=1e-6)

    def test_a_model_without_scores_gives_none(self, shared):
        registry = shared.registry
        (measure,) = measures_named(registry, ["code"])
        assert token_losses(registry, measure.digest, "0" * 64, [only_seed(registry)]) is None

    def test_it_is_never_worse_than_the_mean_of_losses(self, shared):
        for found in comparisons(shared):  # Jensen: −log is convex
            assert (found.predicted["ensemble"] <= found.predicted["mean-loss"] + 1e-12).all()


class TestCompare:
    def test_every_kind_is_what_it_says(self, shared):
        known = scores(shared)
        for found in comparisons(shared):
            name = found.measure.name
            assert [blend.mixture for blend in found.blends] == sorted(pools.REFERENCES)
            for i, blend in enumerate(found.blends):
                parts = blend.mixture.split("+")
                alone = [known[part, name] for part in parts]
                expected = {
                    "micro": known[blend.mixture, name],
                    "macro": known[blend.mixture, name],
                    "mean-loss": np.mean(alone),
                    "own-domain": -(name in parts) / len(parts),
                    "natural": sum(abs((p in parts) / len(parts) - s) for p, s in natural(shared)) / 2,
                }  # fmt: skip
                for kind, value in expected.items():
                    assert found.predicted[kind][i] == pytest.approx(value), kind
            assert np.ptp(found.predicted["seed"]) == 0

    def test_actual_values_are_those_of_the_references(self, shared):
        rows = shared.sql(
            "SELECT mixture, evalset, reference_bits_per_byte FROM proxy_pairs WHERE budget = 'same'"
        ).rows
        known = {(mixture, evalset): value for mixture, evalset, value in rows}
        for found in comparisons(shared):
            for blend, value in zip(found.blends, found.actual, strict=True):
                assert value == known[blend.mixture, found.measure.name]

    def test_budgets_are_kept_apart(self, shared, referenced):
        shared.add_model(
            referenced.units["code", 1], role="reference", mixture="code+prose", budget="sum",
            seed="base",
        )  # fmt: skip
        found = comparisons(shared, ["code"], run_missing=True)
        assert [(c.budget, len(c.blends)) for c in found] == [("same", 11), ("sum", 1)]

    def test_proposals_never_validate(self, shared, referenced):
        from poolreg.evaluation.evaluate import note_subjects

        blender = Blender(shared.registry, only_seed(shared.registry))
        before = len(reference_models(shared.registry, blender))
        mixture = blender.resolvers["micro"].expression("3*code+prose")
        subject = blender.resolvers["micro"].mixture(mixture, origin="adaptive")
        note_subjects(shared.registry, [subject])
        shared.add_model(
            referenced.units["prose", 1], role="reference", mixture="3*code+prose", budget="same",
            seed="base",
        )  # fmt: skip
        assert len(reference_models(shared.registry, blender)) == before

    def test_references_of_a_partition_that_changed_are_left_out(self, shared, tmp_path):
        (tmp_path / "new.jsonl").write_text('{"text": "something else"}\n')
        shared.add_partition("code", [tmp_path / "new.jsonl"], replace=True)
        found = comparisons(shared, ["prose"])
        assert all("code" not in blend.shares for blend in found[0].blends)
        assert len(found[0].blends) == 4

    def test_nothing_is_measured_unless_asked(self, tiny, tmp_path):
        with Pool.open(tiny.copy(tmp_path / "pool")) as pool:
            pool.add_model(
                tiny.units["beta", 2], role="reference", mixture="alpha+beta", seed="base"
            )
            before = pools.contents(pool.root)
            (found, *_) = comparisons(pool, ["alpha"])
            assert len(found.blends) == 0
            assert pools.contents(pool.root) == before
            (found, *_) = comparisons(pool, ["alpha"], run_missing=True)
            assert found.blends[0].mixture == "alpha+beta"
            assert set(found.predicted) == {*KINDS, AVERAGE}
            micro, macro = found.predicted["micro"], found.predicted["macro"]
            assert micro != macro  # beta has two units


def natural(pool):
    sizes = {row["name"]: row["bytes"] for row in pool.partitions()}
    return [(name, size / sum(sizes.values())) for name, size in sizes.items()]


@pytest.mark.parametrize(
    ("evalset", "own"),
    [("code", "code"), ("code-held", "code"), ("codebook", None), ("news", None)],
)
def test_the_domain_of_an_evalset_is_in_its_name(shared, tmp_path, evalset, own):
    if evalset != "code":
        (tmp_path / "e.jsonl").write_text('{"text": "more of it"}\n')
        shared.add_evalset(evalset, [tmp_path / "e.jsonl"])
    (measure,) = measures_named(shared.registry, [evalset])
    assert Blender(shared.registry, only_seed(shared.registry)).own_partition(measure) == own


def test_unknown_names(shared):
    with pytest.raises(NotFound, match="nonsense"):
        measures_named(shared.registry, ["nonsense"])


def test_weighted_blends_follow_their_scheme(tiny, tmp_path):
    with Pool.open(tiny.copy(tmp_path / "pool")) as pool:
        blender = Blender(pool.registry, only_seed(pool.registry))
        micro, macro = (blender.blend("alpha+gamma", scheme) for scheme in ("micro", "macro"))
        assert micro.shares == pytest.approx({"alpha": 1 / 4, "gamma": 3 / 4})
        assert macro.shares == pytest.approx({"alpha": 1 / 2, "gamma": 1 / 2})
        assert len(micro.models) == 4
        proxies = gather(
            pool.registry, [micro], [], measures_named(pool.registry, ["alpha"]), blender=blender,
            settings=Settings(), run_missing=True,
        )  # fmt: skip
        (measure,) = measures_named(pool.registry, ["alpha"])
        weights = [micro.models[model] for model in proxies.units]
        alone = [proxies.values[model, measure.digest] for model in proxies.units]
        assert proxies.predict("mean-loss", micro, measure) == pytest.approx(np.dot(weights, alone))
