"""Optimal Brain Surgeon: which channels of linear maps to remove, one by one, at least cost.

With all remaining channels re-fitted after each removal, removing channel j of y = a·W raises
Σ ‖error‖² by exactly ‖W_j‖² / [C⁻¹]_jj (Hassibi & Stork 1993). The cheapest one goes, W and C⁻¹
are updated, and so on; so one run ranks the channels for every size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from poolreg.numerics.nystrom import cholesky


@dataclass(frozen=True, eq=False)
class Elimination:
    """The channels in the order of their removal, and what each removal added to the error."""

    removed: Tensor  # [n - least] indices
    costs: Tensor  # [n - least], in units of Σ ‖y‖²
    channels: int

    def kept(self, size: int) -> Tensor:
        """Return the indices of the `size` channels that stay, ascending."""
        stays = torch.ones(self.channels, dtype=torch.bool)
        stays[self.removed[: self.channels - size]] = False
        return stays.nonzero().flatten()

    def error(self, size: int) -> float:
        """Return the squared error with `size` channels, all of them re-fitted."""
        return float(self.costs[: self.channels - size].sum())


def unpriced(order: Tensor, channels: int) -> Elimination:
    """Return an elimination in a given order whose costs are not known (NaN)."""
    return Elimination(order, torch.full((len(order),), torch.nan, dtype=torch.float64), channels)


def eliminate(
    gram: Tensor, weight: Tensor, least: int, *, relative_ridge: float = 1e-8, block: int = 0
) -> Elimination:
    """Remove channels until `least` are left.

    `gram` C is [n, n] and `weight` W [n, d]; or [G, n, n] and [G, n, d] for G maps that share
    their selection, whose errors are added. Blocks of removals are applied to C⁻¹ and W
    together; inside a block the choice is exact among the cheapest candidates at its start.
    `block` 1 is the plain greedy rule; 0 chooses a size at which the whole costs about as much
    as two inversions of C.
    """
    gram, weight = (x if x.dim() == 3 else x[None] for x in (gram, weight))
    channels = gram.shape[1]
    block = block or max(1, channels // 64)
    inverse = torch.cholesky_inverse(cholesky(gram, relative_ridge))
    alive = torch.arange(channels, device=gram.device)
    removed, costs = [], []
    while len(alive) > least:
        count = min(block, len(alive) - least)
        places, prices = _cheapest(inverse, weight, count, exact=block == 1)
        removed.append(alive[places].cpu())
        costs.append(prices)
        stays = torch.ones(len(alive), dtype=torch.bool, device=gram.device)
        stays[places] = False
        inverse, weight = _remove(inverse, weight, places, stays.nonzero().flatten())
        alive = alive[stays]
    none = torch.empty(0, dtype=torch.float64)
    return Elimination(torch.cat([none.long(), *removed]), torch.cat([none, *costs]), channels)


def _cheapest(inverse: Tensor, weight: Tensor, count: int, *, exact: bool) -> tuple[Tensor, Tensor]:
    """Return places and prices of the `count` next removals, in order."""
    diagonal = inverse.diagonal(dim1=1, dim2=2)
    scores = (weight.square().sum(2) / diagonal).sum(0)
    pool = len(scores) if exact else min(len(scores), 4 * count)
    places = torch.topk(scores, pool, largest=False).indices
    inner = inverse[:, places][:, :, places].cpu()
    chosen = weight[:, places]
    products = (chosen @ chosen.mT).cpu()  # of the candidates' rows of W
    gone: list[int] = []
    prices = []
    for _ in range(count):
        scores = (products.diagonal(dim1=1, dim2=2) / inner.diagonal(dim1=1, dim2=2)).sum(0)
        scores[gone] = torch.inf
        place = int(scores.argmin())
        prices.append(scores[place])
        gone.append(place)
        if len(gone) < count:
            _forget(inner, products, place)
    return places[torch.tensor(gone, device=places.device)], torch.stack(prices)


def _forget(inner: Tensor, products: Tensor, place: int) -> None:
    """Update [C⁻¹] and W Wᵀ of the candidates for the removal of one of them, in place."""
    pivot = inner[:, place, place, None]
    share = inner[:, :, place] / pivot  # [G, c]
    row = products[:, place]
    own = products[:, place, place, None, None]
    outer = share[:, :, None] * row[:, None, :]
    products -= outer + outer.mT - own * share[:, :, None] * share[:, None, :]
    inner -= share[:, :, None] * inner[:, place, None, :]
    inner[:, place, place] = 1.0  # its score is masked; keep the division defined


def _remove(
    inverse: Tensor, weight: Tensor, places: Tensor, stays: Tensor
) -> tuple[Tensor, Tensor]:
    """Return C⁻¹ and the re-fitted W of the channels that stay (a Schur complement)."""
    mixed = inverse[:, stays][:, :, places]
    root = torch.linalg.cholesky(inverse[:, places][:, :, places])
    share = torch.cholesky_solve(mixed.mT, root).mT  # H_RP H_PP⁻¹
    rest = inverse[:, stays][:, :, stays] - share @ mixed.mT
    return rest, weight[:, stays] - share @ weight[:, places]
