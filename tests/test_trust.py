"""The statistics of proxies against references, row by row, and the sentences about them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import scipy.stats

from poolreg import Pool
from poolreg.decisions.measures import Measure
from poolreg.decisions.proxies import Blend, Comparison
from poolreg.decisions.strata import (
    FEWEST,
    FORECAST,
    macro_statistic,
    of_macro,
    strata,
    together,
    trust_rows,
)
from poolreg.decisions.trust import _verdict, proxy_report

NAMES = ["a", "b", "c", "d"]
UNIONS = [[n for bit, n in enumerate(NAMES) if mask >> bit & 1] for mask in range(1, 16)]
UNIONS = [union for union in UNIONS if len(union) > 1] + [["a", "b", "e"]]


def blend(names):
    shares = {name: 1 / len(names) for name in names}
    text = "+".join(names)
    return Blend(text, "micro", {}, shares, shares, text)


def comparison(evalset, actual, *, own=None, budget="same", blends=UNIONS, **predicted):
    predicted.setdefault("average", predicted["micro"])
    return Comparison(
        Measure(evalset, "evalset", evalset), budget, own, tuple(map(blend, blends)),
        np.asarray(actual), {k.replace("_", "-"): np.asarray(v) for k, v in predicted.items()},
    )  # fmt: skip


@pytest.fixture
def noisy():
    """Two evalsets: one of the domain a, one out of domain, with a good proxy and a null."""
    random = np.random.default_rng(3)
    found = []
    for name, own in (("a", "a"), ("news", None)):
        actual = random.normal(3, 0.2, len(UNIONS))
        found.append(
            comparison(
                name, actual, own=own, micro=actual - 0.1 + random.normal(0, 0.05, len(UNIONS)),
                ensemble=actual + random.normal(0, 0.02, len(UNIONS)),
                mean_loss=random.normal(3, 0.2, len(UNIONS)), natural=random.random(len(UNIONS)),
                seed=np.full(len(UNIONS), 3.5), **({"own_domain": -random.random(len(UNIONS))} if own else {}),
            )
        )  # fmt: skip
    return found


def row(rows, **wanted):
    (found,) = [r for r in rows if all(getattr(r, key) == v for key, v in wanted.items())]
    return found


class TestRows:
    def test_against_scipy(self, noisy):
        rows = trust_rows(noisy)
        for found in noisy:
            for kind in ("micro", "ensemble", "mean-loss"):
                ours = row(rows, evalset=found.measure.name, kind=kind, stratum="all")
                predicted = found.predicted[kind]
                assert ours.pearson == pytest.approx(
                    scipy.stats.pearsonr(predicted, found.actual)[0]
                )
                assert ours.spearman == pytest.approx(
                    scipy.stats.spearmanr(predicted, found.actual)[0]
                )
                fit = scipy.stats.linregress(predicted, found.actual)
                assert (ours.slope, ours.intercept) == pytest.approx((fit.slope, fit.intercept))
                assert ours.pearson_low < ours.pearson < ours.pearson_high
                picked = found.actual[predicted.argmin()] - found.actual.min()
                assert ours.regret_1 == pytest.approx(picked)
                assert ours.regret_1_share == pytest.approx(picked / np.ptp(found.actual))

    def test_macro_is_the_mean_by_fishers_z_never_pooled(self, noisy):
        rows = trust_rows(noisy)
        single = [row(rows, evalset=e, kind="micro", stratum="all").pearson for e in ("a", "news")]
        macro = of_macro(rows, "same", "micro")
        assert macro.pearson == pytest.approx(math.tanh(np.mean(np.arctanh(single))))
        assert macro.evalsets == 2
        assert macro.pearson_low < macro.pearson < macro.pearson_high

    def test_moving_one_evalset_changes_nothing(self, noisy):
        """A pooled correlation would rise when evalsets are far apart."""
        moved = comparison(
            "news",
            noisy[1].actual + 50,
            **{k.replace("-", "_"): v + 50 for k, v in noisy[1].predicted.items()},
        )
        before, after = (
            of_macro(trust_rows(c), "same", "micro") for c in (noisy, [noisy[0], moved])
        )
        assert after.pearson == pytest.approx(before.pearson)
        assert after.spearman == pytest.approx(before.spearman)

    def test_in_and_out_of_domain(self, noisy):
        rows = trust_rows(noisy)
        for stratum, evalset in (("in domain", "a"), ("out of domain", "news")):
            macro = row(rows, evalset=None, kind="micro", stratum=stratum)
            assert macro.pearson == row(rows, evalset=evalset, kind="micro", stratum="all").pearson

    def test_strata_hold_what_they_say(self, noisy):
        found = dict(strata(noisy[0]))
        assert all("a" in UNIONS[i] for i in found["own partition"])
        assert all(len(UNIONS[i]) == 2 for i in found["size 2"])
        assert all("b" not in UNIONS[i] for i in found["without b"])
        assert len(found["all"]) == len(UNIONS)
        assert "own partition" not in dict(strata(noisy[1]))

    def test_fewer_than_five_are_withheld(self, noisy):
        rows = trust_rows(noisy)
        few = row(rows, evalset="a", kind="micro", stratum="size 4")
        assert few.withheld == f"1 of the {FEWEST} references that are needed"
        assert few.spearman is few.decision_accuracy is few.regret_1 is None
        assert row(rows, evalset=None, kind="micro", stratum="size 4").withheld

    @pytest.mark.parametrize("count", range(1, 5))
    def test_nothing_is_said_of_very_few(self, count):
        actual = np.arange(count, dtype=float)
        rows = trust_rows([comparison("a", actual, blends=UNIONS[:count], micro=actual)])
        assert all(r.withheld for r in rows)

    def test_the_seed_ranks_nothing(self, noisy):
        found = row(trust_rows(noisy), evalset="a", kind="seed", stratum="all")
        assert found.pearson is found.spearman is found.slope is None
        assert found.decision_accuracy == 0.5
        assert found.mean_absolute_error > 0

    def test_what_only_ranks_is_not_calibrated(self, noisy):
        found = row(trust_rows(noisy), evalset="a", kind="own-domain", stratum="all")
        assert found.spearman is not None
        assert found.slope is found.mean_absolute_error is found.coverage is None

    def test_forecasts(self, noisy):
        found = row(trust_rows(noisy), evalset="news", kind=FORECAST, stratum="all")
        assert 0.6 <= found.coverage <= 1
        assert found.width > 0
        assert found.mean_absolute_error < np.ptp(noisy[1].actual)

    def test_a_kind_that_was_not_measured_says_so(self, noisy):
        bare = comparison("a", noisy[0].actual, micro=noisy[0].predicted["micro"])
        assert (
            row(trust_rows([bare]), evalset="a", kind="ensemble", stratum="all").withheld
            == "not measured"
        )


def test_drawing_mixtures_together(noisy):
    predicted, actual = together(noisy, "micro")
    statistic = macro_statistic("spearman", predicted, actual)
    every = np.arange(len(UNIONS))
    single = [scipy.stats.spearmanr(p, a)[0] for p, a in zip(predicted, actual, strict=True)]
    assert statistic(every) == pytest.approx(math.tanh(np.mean(np.arctanh(single))))
    assert statistic(np.stack([every, every[::-1]])).shape == (2,)
    fewer = comparison("x", noisy[0].actual[:8], blends=UNIONS[:8], micro=noisy[0].actual[:8])
    assert together([*noisy, fewer], "micro") is None


class TestVerdict:
    def say(self, found):
        return " ".join(_verdict(found, trust_rows(found)))

    def test_a_good_proxy(self, noisy):
        said = self.say(noisy)
        assert "the proxies rank mixtures without a mistake: mean rank correlation over 2 e" in said
        assert "ensemble is better than mean-loss" in said
        assert "90% interval" in said

    def test_a_null_that_does_as_well_is_named(self, noisy):
        same = [
            comparison(c.measure.name, c.actual, own=c.own,
                       **{**{k.replace("-", "_"): v for k, v in c.predicted.items()}, "mean_loss": c.predicted["ensemble"]})
            for c in noisy
        ]  # fmt: skip
        assert "mean-loss, which averages nothing, does as well as ensemble, as far as" in self.say(
            same
        )

    def test_a_null_that_does_better_is_named(self, noisy):
        worse = [
            comparison(
                c.measure.name,
                c.actual,
                micro=-c.actual + 0.01 * c.predicted["natural"],
                mean_loss=c.actual,
            )
            for c in noisy
        ]
        assert "mean-loss, which averages nothing, does BETTER than micro" in self.say(worse)

    def test_each_budget_has_its_own(self, noisy):
        other = [
            comparison(c.measure.name, c.actual, budget="sum", micro=c.predicted["micro"])
            for c in noisy
        ]
        said = self.say([*noisy, *other])
        assert "the budget of one unit" in said
        assert "the summed budget of their units" in said

    def test_words_follow_the_lower_end_of_the_interval(self, noisy):
        only = [comparison(c.measure.name, c.actual, micro=c.predicted["micro"]) for c in noisy]
        low = of_macro(trust_rows(only), "same", "micro").spearman_low
        word = "well" if low >= 0.8 else "fairly" if low >= 0.5 else "NOT reliably"
        assert f"rank mixtures {word}:" in self.say(only)
        null = [comparison(c.measure.name, c.actual, micro=c.predicted["natural"]) for c in noisy]
        assert "rank mixtures NOT reliably:" in self.say(null)

    def test_evalsets_with_different_references_are_told(self, noisy):
        fewer = comparison(
            "x", noisy[0].actual[:8], blends=UNIONS[:8],
            **{kind: noisy[0].predicted[kind][:8] for kind in ("micro", "ensemble")},
        )  # fmt: skip
        said = self.say([*noisy, fewer])
        assert "different references" in said
        assert "well: " not in said
        assert "averages nothing" not in said

    def test_units_are_not_mixed(self, noisy):
        task = dataclasses.replace(noisy[1], measure=Measure("quiz", "task", "quiz"))
        said = self.say([noisy[0], task])
        assert "different units" in said
        assert "bits/byte" not in said

    def test_too_few(self):
        said = self.say([comparison("a", [1.0, 2.0], blends=UNIONS[:2], micro=[1.0, 2.0])])
        assert "2 references" in said
        assert "poolreg proxy next" in said


def test_on_a_real_pool(referenced, tmp_path):
    with Pool.open(referenced.copy(tmp_path / "pool")) as pool:
        report = proxy_report(pool.registry, run_missing=False)
        macro = of_macro(report.rows, "same", "micro")
        assert macro.references == 11
        assert macro.evalsets == 4
        # The references are the averages with a little noise, so the averages must win.
        assert macro.spearman > of_macro(report.rows, "same", "mean-loss").spearman
        assert report == proxy_report(pool.registry, run_missing=False)
