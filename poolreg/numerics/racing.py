"""How far mixtures lie behind the leader of a race, judged by a random part of the documents.

Evalset e has D documents of b₁ … b_D bytes. The same n of them, drawn without replacement, are
scored under every mixture. With dᵢ the nats by which a mixture loses to the leader on document i,
the difference per byte of the whole evalset is estimated by the ratio

    r = Σ dᵢ / Σ bᵢ,   variance = (1 - n/D) · Σ (dᵢ - r·bᵢ)² / ((n - 1) · n · b̄²)

over the scored documents, b̄ being the mean of all D sizes (Cochran, "Sampling Techniques", 1977,
chapter 6). Pairing takes away what makes documents hard for all mixtures alike, the ratio what
their lengths do. Several evalsets are strata: means and variances of the mean of their ratios.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Standing:
    """Where K mixtures stand after a round, in bits per byte, the mean over the evalsets.

    `behind` is each one's distance to the `leader`; `surely` the lower end of its one-sided
    interval: who has `surely` above zero is worse with the confidence asked for.
    """

    leader: int
    behind: Doubles  # [K]
    surely: Doubles  # [K]


def standing(
    nll: Sequence[Doubles], sizes: Sequence[Doubles], *, confidence: float, comparisons: int
) -> Standing:
    """Compare K mixtures with the best of them.

    `nll[e]` is [K, n]: nats of the scored documents of evalset e; `sizes[e]` is [D]: UTF-8 bytes
    of all its documents, the scored ones first, with a positive sum. The error 1 - `confidence`
    is shared among `comparisons` (Bonferroni), since any of them may go wrong. Where everything
    is scored the differences are exact; where only one document of several is, nothing is sure.
    """
    from scipy.stats import t

    means = sum(x.sum(1) / b[: x.shape[1]].sum() for x, b in zip(nll, sizes, strict=True))
    leader = int(np.argmin(means))
    ratios, variances, freedom = [], [], math.inf
    for losses, bytes_ in zip(nll, sizes, strict=True):
        ratio, variance = _ratio(losses - losses[leader], bytes_)
        ratios.append(ratio)
        variances.append(variance)
        if losses.shape[1] < len(bytes_):
            freedom = min(freedom, losses.shape[1] - 1)
    behind = np.mean(ratios, axis=0)
    error = np.sqrt(np.sum(variances, axis=0)) / len(nll)
    quantile = 0.0
    if freedom < math.inf:
        quantile = t.ppf(1 - (1 - confidence) / max(comparisons, 1), freedom) if freedom else np.inf
    with np.errstate(invalid="ignore"):
        surely = behind - np.where(error > 0, quantile * error, 0.0)
    if freedom == 0:
        surely = np.full(len(behind), -np.inf)
    return Standing(leader, behind / math.log(2), surely / math.log(2))


def _ratio(differences: Doubles, sizes: Doubles) -> tuple[Doubles, Doubles]:
    """Return the estimated nats per byte, [K], of differences [K, n], and their variances."""
    scored = differences.shape[1]
    ratio = differences.sum(1) / sizes[:scored].sum()
    if scored == len(sizes) or scored < 2:
        return ratio, np.zeros(len(ratio))
    residuals = differences - ratio[:, None] * sizes[:scored]
    spread = (residuals**2).sum(1) / ((scored - 1) * scored * sizes.mean() ** 2)
    return ratio, (1 - scored / len(sizes)) * spread
