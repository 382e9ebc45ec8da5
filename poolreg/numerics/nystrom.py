"""Removing input channels of a linear map and making up for them: the Nyström form for MLPs.

A map y = a·W with activations a [T, n] and weights W [n, d] keeps the channels S. All that has
to be known of the activations is their Gram matrix C = Σ aᵀa [n, n]; everything is float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from poolreg.errors import Refused


def ridge_of(gram: Tensor, relative: float) -> float:
    """Return the ridge λ = relative · tr(C)/n, which does not depend on the scale of C."""
    return relative * float(gram.diagonal(dim1=-2, dim2=-1).mean())


def cholesky(gram: Tensor, relative: float = 1e-10) -> Tensor:
    """Return L with L Lᵀ = C + λI, the ridge being raised tenfold until C + λI is definite.

    `gram` is [..., n, n], each with the ridge of its own scale. Raises `Refused` for a matrix
    with NaN, infinite or clearly negative eigenvalues.
    """
    scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    while True:
        shifted = gram.clone()
        ridge = (relative * scale).clamp(min=torch.finfo(gram.dtype).tiny)
        shifted.diagonal(dim1=-2, dim2=-1).add_(ridge)
        root, info = torch.linalg.cholesky_ex(shifted)
        # Not every device reports NaN in `info`.
        if not info.any() and root.isfinite().all():
            factor: Tensor = root
            return factor
        if relative > 1 or not gram.isfinite().all():
            raise Refused(
                "a Gram matrix is not finite, or not that of any activations",
                hint="calibrate again; if it stays, check the model with: poolreg eval",
            )
        relative = max(10 * relative, torch.finfo(gram.dtype).eps)


def condition(gram: Tensor, steps: int = 30) -> float:
    """Return the condition number λ_max / λ_min of a Gram matrix, by power iteration.

    An estimate from below, at the cost of one Cholesky factor; infinite for a singular matrix.
    """
    root, info = torch.linalg.cholesky_ex(gram)
    if info.any():
        return float("inf")
    # A start without symmetry: one like (1, …, 1) may be orthogonal to what is sought.
    start = torch.randn(len(gram), 1, generator=torch.Generator().manual_seed(0))
    large = small = start.to(gram)
    for _ in range(steps):
        large = gram @ (large / large.norm())
        # Two triangular solves read the factor in place, which `cholesky_solve` copies each time.
        half = torch.linalg.solve_triangular(root, small / small.norm(), upper=False)
        small = torch.linalg.solve_triangular(root.mT, half, upper=True)
    return float(large.norm() * small.norm())


def leverage_scores(gram: Tensor, ridge: float) -> Tensor:
    """Return the ridge leverage scores s_i = [C (C + λI)⁻¹]_ii, [n].

    Computed as 1 − λ [(C + λI)⁻¹]_ii, which does not cancel (arXiv 2408.09632, algorithm 1).
    Raises `Refused` as `cholesky` does.
    """
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    inverse = torch.cholesky_inverse(cholesky(gram + ridge * eye, 0.0))
    return 1 - ridge * inverse.diagonal()


def compensate(gram: Tensor, weight: Tensor, kept: Tensor, ridge: float = 0.0) -> Tensor:
    """Return weights for the kept channels that best give what all channels gave, [k, d].

    Ŵ = (SᵀCS + λI)⁻¹ (SᵀC W + λ SᵀW): with λ = 0 the least-squares optimum of
    Σ ‖aW − a S Ŵ‖² (arXiv 2408.09632, theorem 3.2), for large λ the kept rows as they were.
    `gram` [n, n], `weight` [n, d], `kept` [k] indices. Raises `Refused` as `cholesky` does.
    """
    # Solved for what the kept rows gain: where C is singular they stay as they were.
    rows = gram[kept]
    lost = weight.clone()
    lost[kept] = 0
    eye = torch.eye(len(kept), dtype=gram.dtype, device=gram.device)
    root = cholesky(rows[:, kept] + ridge * eye)
    return weight[kept] + torch.cholesky_solve(rows @ lost, root)


def projected(gram: Tensor, weight: Tensor, basis: Tensor, ridge: float = 0.0) -> Tensor:
    """Return the weights of aP that best give what aW gave: (PᵀCP + λI)⁻¹ PᵀC W, [k, d].

    `basis` P is [n, k]; with columns of the identity this is `compensate` without its prior.
    """
    block = basis.mT @ gram @ basis
    eye = torch.eye(block.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.cholesky_solve(basis.mT @ (gram @ weight), cholesky(block + ridge * eye))


def squared_error(gram: Tensor, difference: Tensor) -> float:
    """Return Σ ‖a·D‖² = tr(Dᵀ C D) for a difference of weights D [n, d]."""
    return float((difference * (gram @ difference)).sum())
