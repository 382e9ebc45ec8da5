"""Fewer channels for queries and keys: column selection for a product (CR), and pairs under RoPE.

Scores are s = q·kᵀ. Under rotary embeddings the channels (i, i + D/2) turn together, so they are
kept or dropped as a pair, and the score is the sum over pairs p of s_p = q_p·k_pᵀ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from poolreg.numerics.nystrom import cholesky


def channel_scores(gram_q: Tensor, gram_k: Tensor) -> Tensor:
    """Return ‖C_Q^½ e_i‖ · ‖C_K^½ e_i‖ = sqrt(C_Q,ii · C_K,ii), [..., n].

    Gram matrices [..., n, n] of queries and keys (arXiv 2408.09632, algorithm 2); no matrix root
    is needed.
    """
    products: Tensor = gram_q.diagonal(dim1=-2, dim2=-1) * gram_k.diagonal(dim1=-2, dim2=-1)
    return products.sqrt()


def pair_scores(gram_q: Tensor, gram_k: Tensor) -> Tensor:
    """Return Σ|q_p|² · Σ|k_p|² for each pair of channels (p, p + n/2), [..., n/2].

    |q_p|² does not change under rotation, so it does not matter where the Gram was taken.
    """
    energies: list[Tensor] = [
        gram.diagonal(dim1=-2, dim2=-1).unflatten(-1, (2, -1)).sum(-2) for gram in (gram_q, gram_k)
    ]
    return energies[0] * energies[1]


def pair_products(gram_q: Tensor, gram_k: Tensor) -> Tensor:
    """Return B_pp' = Σ_ij s_p(i,j) · s_p'(i,j), the Gram matrix of the pairs' parts of the scores.

    From Gram matrices [..., n, n] after rotation: the elementwise products of their 2 × 2 blocks,
    summed; [..., n/2, n/2]. It takes every query with every key, as if they were independent.
    """
    blocks = gram_q * gram_k
    half = blocks.shape[-1] // 2
    columns: Tensor = blocks.unflatten(-1, (2, half)).sum(-2)
    products: Tensor = columns.unflatten(-2, (2, half)).sum(-3)
    return products


def rescale(products: Tensor, kept: Tensor) -> Tensor:
    """Return the factors α of the kept pairs that best give the full score, [..., k].

    α = B[S,S]⁻¹ B[S,:] 1, the least-squares optimum of Σ (s − Σ_{p∈S} α_p s_p)²; 1 where B says
    nothing. `products` [..., P, P], `kept` [k]. Raises `Refused` as `cholesky` does.
    """
    rows = products[..., kept, :]
    block = rows[..., kept]
    lost = rows.sum(-1, keepdim=True) - block.sum(-1, keepdim=True)
    gained: Tensor = torch.cholesky_solve(lost, cholesky(block))
    return 1 + gained.squeeze(-1)
