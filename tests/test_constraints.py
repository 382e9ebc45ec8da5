"""From limits in words to regions, and which limits clash."""

from __future__ import annotations

import numpy as np
import pytest
from pools import refusal

from poolreg import Pool
from poolreg.errors import NotFound, UsageError
from poolreg.suggest import shares as points
from poolreg.suggest.constraints import Limits, constrained

RATIOS = {"alpha": (400, 100), "other": (200, 100)}


@pytest.fixture(scope="module")
def field(tiny):
    with Pool.open(tiny.root) as pool:
        yield points.field(pool.registry)


def test_without_limits_everything_is_allowed(field):
    found = constrained(field, Limits(), {})
    assert found.words == ()
    assert found.region.contains(np.array([1.0, 0.0, 0.0]))


def test_shares_are_bounded(field):
    limits = Limits(minimum={"alpha": 0.2}, maximum={"gamma": 0.3})
    region = constrained(field, limits, {}).region
    assert region.contains(np.array([0.2, 0.5, 0.3]))
    assert not region.contains(np.array([0.19, 0.51, 0.3]))
    assert not region.contains(np.array([0.2, 0.49, 0.31]))


def test_epochs_bound_shares_by_tokens(field):
    limits = Limits(max_epochs=2, train_tokens=1000, tokens={"gamma": 400, "beta": 1e9})
    region = constrained(field, limits, RATIOS).region
    alpha = field.bytes[0] / 4.0  # tokens, by the evalset of that name
    assert region.upper == pytest.approx([min(1.0, 2 * alpha / 1000), 1.0, 0.8])


def test_tokens_are_estimated_from_all_evalsets_without_one_of_the_name(field):
    limits = Limits(max_epochs=1, train_tokens=1e6, tokens={"alpha": 1e9})
    region = constrained(field, limits, RATIOS).region
    assert region.upper[1] == pytest.approx(field.bytes[1] / 3.0 / 1e6)  # 600 bytes in 200 tokens


def test_nearness_is_a_divergence(field):
    region = constrained(field, Limits(near="uniform", kl=0.1), {}).region
    assert region.contains(np.full(3, 1 / 3))
    assert not region.contains(np.array([0.9, 0.05, 0.05]))
    near = constrained(field, Limits(near="2*alpha+beta", kl=0.1), {}).region.near
    assert near == pytest.approx([2 / 3, 1 / 3, 0])


CLASHES = {
    "lower above upper": ({"minimum": {"alpha": 0.6}, "maximum": {"alpha": 0.4}}, "--min alpha=0.6"),
    "lower sum": ({"minimum": {"alpha": 0.6, "beta": 0.6}}, "sum to 1.2"),
    "upper sum": ({"maximum": {"alpha": 0.3, "beta": 0.3, "gamma": 0.3}}, "sum to 0.9"),
    "epochs": ({"max_epochs": 1, "train_tokens": 1e9}, "--max-epochs"),
    "epochs and lower": (
        {"minimum": {"alpha": 0.5}, "max_epochs": 1, "train_tokens": 1000,
             "tokens": {"alpha": 100, "beta": 1e6, "gamma": 1e6}},
        "--min alpha=0.5 and --max-epochs",
    ),
    "ball": ({"near": "uniform", "kl": 0.01, "minimum": {"alpha": 0.9}}, "--kl 0.01 from uniform"),
    "ball without a partition": ({"near": "alpha+beta", "kl": 9, "minimum": {"gamma": 0.1}}, "finite"),
    "size and lower": ({"size": 1, "minimum": {"alpha": 0.1, "beta": 0.1}}, "--size 1"),
    "size and upper": ({"size": 1, "maximum": dict.fromkeys(["alpha", "beta", "gamma"], 0.5)},
                       "sum to 0.5"),
    "size and ball": ({"size": 1, "near": "uniform", "kl": 0.1}, "--size 1 and --kl 0.1"),
}  # fmt: skip


@pytest.mark.parametrize("case", CLASHES)
def test_limits_that_clash_are_named(field, case):
    limits, words = CLASHES[case]
    with pytest.raises(UsageError) as caught:
        constrained(field, Limits(**limits), RATIOS)
    assert words in refusal(caught.value)
    assert "no mixture keeps these constraints" in refusal(caught.value)


WRONG = {
    "share": ({"maximum": {"alpha": 1.5}}, "is no share"),
    "epochs alone": ({"max_epochs": 2}, "needs --train-tokens"),
    "near alone": ({"near": "natural"}, "needs --kl"),
    "negative": ({"near": "natural", "kl": -1}, "above zero"),
    "tokens unknown": ({"max_epochs": 1, "train_tokens": 10}, "--tokens alpha="),
}


@pytest.mark.parametrize("case", WRONG)
def test_limits_that_say_nothing(field, case):
    limits, words = WRONG[case]
    with pytest.raises(UsageError) as caught:
        constrained(field, Limits(**limits), {})
    assert words in refusal(caught.value)


def test_unknown_partitions_have_neighbours(field):
    with pytest.raises(NotFound, match="alpha"):
        constrained(field, Limits(maximum={"alpah": 0.5}), {})


def test_points(field):
    total = sum(field.bytes)
    assert [float(s) for s in points.point(field, "natural")] == [b / total for b in field.bytes]
    assert points.point(field, "stratified") == points.point(field, "uniform")


def test_stratified_divides_groups(pool, tiny):
    for name in ("alpha", "beta"):
        pool.add_partition(name, [tiny.texts / f"{name}.train.jsonl"], parent="text",
                           units={"alpha": 1, "beta": 2}[name], replace=True)  # fmt: skip
    field = points.field(pool.registry)
    shares = dict(zip(field.names, points.point(field, "stratified"), strict=True))
    assert shares["gamma"] == shares["alpha"] + shares["beta"]
    sizes = dict(zip(field.names, field.bytes, strict=True))
    assert shares["alpha"] / shares["beta"] == pytest.approx(sizes["alpha"] / sizes["beta"])
