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

CANDIDATES = 64  # at least, for a block of removals: the first ones change the others' prices


@dataclass(frozen=True, eq=False)
class Elimination:
    """The channels in the order of their removal, and what each removal added to the error."""

    removed: Tensor  # [n - least] indices
    costs: Tensor  # [n - least], in units of Σ ‖y‖²
    channels: int

    def kept(self, size: int) -> Tensor:
        """Return the indices of the `size` channels that stay, ascending."""
        stays = torch.ones(self.channels, dtype=torch.bool)
        stays[self.removed[: self.channels - size].cpu()] = False
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
    as two inversions of C. Costs are those of C + λI. Raises `Refused` as `cholesky` does.
    """
    gram, weight = (x if x.dim() == 3 else x[None] for x in (gram, weight))
    left = channels = gram.shape[1]
    block = block or max(1, channels // 64)
    inverse = torch.cholesky_inverse(cholesky(gram, relative_ridge))
    weight = weight.clone()
    rows = torch.arange(channels, device=gram.device)  # the channel of each row of C⁻¹ and W
    alive = torch.ones_like(rows, dtype=torch.bool)
    removed, costs = [], []
    while left > least:
        places, prices = _cheapest(inverse, weight, alive, min(block, left - least))
        removed.append(rows[places].cpu())
        costs.append(prices)
        left -= len(places)
        if left == least:
            break
        _remove(inverse, weight, places)
        alive[places] = False
        if left <= 0.75 * len(rows):  # copies of the whole are dear: make few
            inverse, weight = inverse[:, alive][:, :, alive], weight[:, alive]
            rows, alive = rows[alive], alive[alive]
    none = torch.empty(0, dtype=torch.float64)
    return Elimination(torch.cat([none.long(), *removed]), torch.cat([none, *costs]), channels)


def _cheapest(inverse: Tensor, weight: Tensor, alive: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return places and prices of the `count` next removals, in order."""
    diagonal = inverse.diagonal(dim1=1, dim2=2)
    places = alive.nonzero().flatten()
    scores = (torch.linalg.vector_norm(weight, dim=2).square() / diagonal).sum(0)[places]
    pool = min(len(places), max(4 * count, CANDIDATES))
    places = places[torch.topk(scores, pool, largest=False).indices]
    inner = inverse[:, places][:, :, places].cpu()
    chosen = weight[:, places]
    products = (chosen @ chosen.mT).cpu()  # of the candidates' rows of W
    numerators, denominators = (x.diagonal(dim1=1, dim2=2) for x in (products, inner))  # views
    barred = torch.zeros(pool, dtype=inner.dtype)
    gone, prices = [], []
    for _ in range(count):
        scores = (numerators / denominators).sum(0) + barred
        place = int(scores.argmin())
        prices.append(scores[place])
        gone.append(place)
        barred[place] = torch.inf
        _forget(inner, products, place)
    return places[torch.tensor(gone, device=places.device)], torch.stack(prices)


def _forget(inner: Tensor, products: Tensor, place: int) -> None:
    """Update [C⁻¹] and W Wᵀ of the candidates for the removal of one of them, in place."""
    column = inner[:, :, place, None].clone()  # [G, c, 1]
    share = column / column[:, place, None]
    row = products[:, :, place, None] - products[:, place, place, None, None] / 2 * share
    products.baddbmm_(share, row.mT, alpha=-1).baddbmm_(row, share.mT, alpha=-1)
    inner.baddbmm_(share, column.mT, alpha=-1)
    inner[:, place, place] = 1.0  # its score is barred; keep the division defined


def _remove(inverse: Tensor, weight: Tensor, places: Tensor) -> None:
    """Take channels out of C⁻¹ and re-fit W, in place (a Schur complement); their rows vanish."""
    mixed = inverse[:, places]
    root = torch.linalg.cholesky(mixed[:, :, places])
    half = torch.linalg.solve_triangular(root, mixed, upper=False)  # L⁻¹ H_P, L Lᵀ = H_PP
    fitted = torch.linalg.solve_triangular(root, weight[:, places], upper=False)
    inverse.baddbmm_(half.mT, half, alpha=-1)
    weight.baddbmm_(half.mT, fitted, alpha=-1)
