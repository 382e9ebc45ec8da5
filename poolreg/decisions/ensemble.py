"""The ensemble of unit models: the mixture of their token probabilities, with no inference.

Where an average has one model with mean parameters, an ensemble predicts each token with
Σ_i λ_i p_i(token). Its loss follows from the losses of the unit models at each token, which the
memo keeps for single models:  −log Σ_i λ_i exp(−nll_i).  It is convex in λ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from poolreg.store.registry import Registry

_CHUNK = 1 << 16  # tokens at once: the temporaries stay in cache

Floats = npt.NDArray[Any]


def token_losses(
    registry: Registry, evalset: str, protocol: str, models: Sequence[str]
) -> Floats | None:
    """Return the losses of each token under each model, (tokens, models) float32, in nats.

    None if the memo lacks a model's evaluation on this evalset under this protocol.
    """
    rows = registry.select("token_scores", evalset=evalset, protocol=protocol, models=list(models))
    objects = {row["subject"]: row["token_scores"] for row in rows}
    if any(model not in objects for model in models):
        return None
    return np.stack([_array(registry, objects[model]) for model in models], axis=1)


def _array(registry: Registry, digest: str) -> Floats:
    from poolreg.tensors import read_array, read_header

    path = registry.objects.existing(digest)
    return read_array(path, read_header(path).tensors["nll"])


def ensemble_loss(losses: Floats, weights: npt.ArrayLike) -> float:
    """Return the ensemble's total loss in nats: losses (tokens, models), weights (models,).

    −Σ_t log Σ_i λ_i exp(−nll_ti), with the smallest loss of each token taken out first so that
    nothing underflows; sums in float64.
    """
    share = np.asarray(weights, dtype=np.float64)
    used = np.flatnonzero(share)
    total = 0.0
    for start in range(0, len(losses), _CHUNK):
        part = losses[start : start + _CHUNK, used].astype(np.float64)
        least = part.min(axis=1)
        total += float(np.sum(least - np.log(np.exp(least[:, None] - part) @ share[used])))
    return total
