"""Low rank where two maps stand one behind the other: value/output, and query/key without RoPE.

By the theorem of Eckart, Young and Mirsky the best rank-k factors of a product are those of its
truncated SVD in the metric of its inputs. All in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from poolreg.numerics.nystrom import cholesky


@dataclass(frozen=True, eq=False)
class Factors:
    """`left` [n, k] and `right` [k, m], and the spectrum [min(n, m)] that was cut."""

    left: Tensor
    right: Tensor
    spectrum: Tensor

    def error(self, rank: int) -> float:
        """Return the squared error at a rank: the tail Σ_{i>k} σ_i²."""
        return float(self.spectrum[rank:].square().sum())


def low_rank(gram: Tensor, weight: Tensor, rank: int) -> Factors:
    """Return P and R of rank k that minimise Σ ‖z W − z P R‖² for inputs z with Gram C.

    SVD of Lᵀ W = U Σ Vᵀ with L Lᵀ = C; P = L⁻ᵀ U_k, R = U_kᵀ Lᵀ W (arXiv 2408.09632, theorem 3.4,
    in the space of the values). `gram` [n, n], `weight` [n, m].
    """
    root = cholesky(gram)
    u, s, _ = torch.linalg.svd(root.mT @ weight, full_matrices=False)
    u = u[:, :rank]
    left = torch.linalg.solve_triangular(root.mT, u, upper=True)
    return Factors(left, u.mT @ (root.mT @ weight), s)


def two_sided(gram_q: Tensor, gram_k: Tensor, rank: int) -> Factors:
    """Return P_q (`left`, [G·n, k]) and P_kᵀ (`right`, [k, n]) with q_g P_qg P_kᵀ kᵀ ≈ q_g kᵀ.

    Minimises Σ_g Σ_ij (q_gi k_jᵀ − q_gi P_qg P_kᵀ k_jᵀ)² over all queries i and keys j:
    the SVD of [L_qgᵀ L_k]_g. `gram_q` [G, n, n] for the G query heads of one key head,
    `gram_k` [n, n]. The singular values are shared evenly by both sides.
    """
    roots = cholesky(gram_q)
    root = cholesky(gram_k)
    u, s, vt = torch.linalg.svd((roots.mT @ root).flatten(0, 1), full_matrices=False)
    half = s[:rank].sqrt()
    heads = u[:, :rank].unflatten(0, (len(gram_q), -1)) * half
    left = torch.linalg.solve_triangular(roots.mT, heads, upper=True).flatten(0, 1)
    right = torch.linalg.solve_triangular(root.mT, vt[:rank].mT * half, upper=True).mT
    return Factors(left, right, s)
