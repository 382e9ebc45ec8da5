"""Gram matrices added up by blocks, against a plain product in float64."""

from __future__ import annotations

import pytest
import torch

from poolreg.compress.grams import BLOCK, TOKENS, add_gram, mirror

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("tokens", [0, 1, 100, TOKENS + 7])
@pytest.mark.parametrize("shape", [(1,), (BLOCK,), (2 * BLOCK + 3,), (3, 8)], ids=str)
def test_batches_add_up_to_the_plain_product(tokens, shape):
    random = torch.Generator().manual_seed(tokens)
    *heads, channels = shape
    # Channels of very different sizes and with a mean, as activations have them.
    scale = torch.logspace(-3, 3, channels)
    total = torch.zeros(*heads, channels, channels, dtype=torch.float64)
    exact = total.clone()
    for _ in range(2):
        rows = (torch.randn(*heads, tokens, channels, generator=random) + 1) * scale
        add_gram(total, rows)
        exact += rows.double().mT @ rows.double()
    made = mirror(total)
    assert made is total
    assert torch.equal(made, made.mT)
    # Rounding errors of float32 sums: each at most half a unit of 2⁻²³ of what is summed, and as
    # they are as often up as down they grow with the root of the number of terms.
    energies = exact.diagonal(dim1=-2, dim2=-1)
    scale_of = (energies[..., :, None] * energies[..., None, :]).sqrt()
    assert ((made - exact).abs() <= TOKENS**0.5 * 2**-24 * scale_of).all()


def test_products_in_float64_stay_exact():
    rows = torch.randn(50, BLOCK + 5, dtype=torch.float64)
    total = torch.zeros(BLOCK + 5, BLOCK + 5, dtype=torch.float64)
    add_gram(total, rows)
    torch.testing.assert_close(mirror(total), rows.mT @ rows, atol=1e-12, rtol=1e-12)
