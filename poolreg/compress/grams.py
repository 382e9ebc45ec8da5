"""Gram matrices Σ aᵀa, added up batch by batch at half the work of a plain product.

A Gram matrix is symmetric, so only blocks on and above the diagonal are multiplied. Products are
taken in the precision of the activations, float32 at least, over at most `TOKENS` rows; sums of
products are float64.
"""

from __future__ import annotations

from torch import Tensor

BLOCK = 256  # columns: a block and its products stay in the cache
TOKENS = 2048  # rows of one product: the more, the more its sums are rounded


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add rowsᵀ·rows of activations [..., t, n] to `total` [..., n, n] float64, in place.

    What is below the blocks of the diagonal is not touched: see `mirror`.
    """
    for part in rows.split(TOKENS, -2):
        for start in range(0, part.shape[-1], BLOCK):
            left = part[..., start : start + BLOCK]
            total[..., start : start + BLOCK, start:] += left.mT @ part[..., start:]


def mirror(total: Tensor) -> Tensor:
    """Copy the upper triangle of [..., n, n] to the lower one, in place, and return it."""
    for start in range(0, total.shape[-1], BLOCK):
        stop = start + BLOCK
        block = total[..., start:stop, start:stop]
        block.copy_(block.triu() + block.triu(1).mT)
        total[..., stop:, start:stop] = total[..., start:stop, stop:].mT
    return total
