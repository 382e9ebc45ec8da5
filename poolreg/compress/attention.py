"""Smaller heads: value/output by SVD, query/key by pairs (rotary) or by a two-sided SVD.

All work is done in the D-dimensional space of each head, where the Gram matrices of what the
model really computed are small.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from poolreg.compress.architectures import Heads, LayerWeights
from poolreg.compress.calibrate import LayerStatistics, rotate
from poolreg.compress.mlp import moments
from poolreg.numerics.cr import channel_scores, pair_products, pair_scores, rescale
from poolreg.numerics.nystrom import projected, ridge_of
from poolreg.numerics.obs import Elimination, eliminate, unpriced
from poolreg.numerics.svd import low_rank, two_sided

OUTPUT_RIDGE = 1e-8


# -- value and output ----------------------------------------------------------------------


def value_bases(
    weights: LayerWeights, statistics: LayerStatistics, heads: Heads, ingredients: frozenset[str]
) -> tuple[Tensor, Tensor]:
    """Return bases P [h_kv, D, D] and duals R [h_kv, D, D], most important columns first.

    With k of them a value z becomes zP_k and the output projection R_k W_O.
    """
    grams = _value_grams(weights, statistics, heads, ingredients)
    outputs = weights.o.unflatten(0, (heads.keys, heads.group, heads.size))
    eye = torch.eye(heads.size, dtype=weights.o.dtype, device=weights.o.device)
    bases, duals = [], []
    for gram, output in zip(grams, outputs, strict=True):
        joint = heads.group == 1 or "joint-svd" in ingredients
        target = output.transpose(0, 1).flatten(1) if joint else eye
        left = low_rank(gram, target, heads.size).left  # L⁻ᵀU: its dual is UᵀLᵀ, the inverse
        bases.append(left)
        duals.append(torch.linalg.inv(left))
    return torch.stack(bases), torch.stack(duals)


def _value_grams(
    weights: LayerWeights, statistics: LayerStatistics, heads: Heads, ingredients: frozenset[str]
) -> Tensor:
    """Return the moments of values [h_kv, D, D]: as attention mixes them, or as projected."""
    if "mixed-values" in ingredients:
        gram, _ = moments(statistics, "out", centred=_centred(weights, ingredients))
        blocks = gram.unflatten(1, (heads.queries, -1)).unflatten(0, (heads.queries, -1))
        own = torch.stack([blocks[h, :, h] for h in range(heads.queries)])
        mixed: Tensor = own.unflatten(0, (heads.keys, heads.group)).mean(1)
        return mixed
    grams, _ = moments(statistics, "values", centred=False)
    if weights.v_bias is None:
        return grams
    # Without their bias v − b: what attention makes of it is a constant.
    mean = statistics["values_sum"] / statistics.tokens
    bias = weights.v_bias.unflatten(0, (heads.keys, heads.size))
    cross = (mean - bias / 2)[:, :, None] * bias[:, None]
    without: Tensor = grams - cross - cross.mT
    return without


def _centred(weights: LayerWeights, ingredients: frozenset[str]) -> bool:
    return weights.o_bias is not None and "intercept" in ingredients


def shrink_values(
    weights: LayerWeights, statistics: LayerStatistics, heads: Heads,
    ingredients: frozenset[str], *, rank: int, bases: tuple[Tensor, Tensor],
) -> float:  # fmt: skip
    """Cut the values of each head to `rank`, in place; returns the error per held-out token."""
    basis, dual = bases[0][:, :, :rank], bases[1][:, :rank]
    old, bias = weights.o, weights.o_bias
    wide = torch.block_diag(*basis.repeat_interleave(heads.group, 0))  # [h·D, h·k]
    if bias is not None and weights.v_bias is not None and "mixed-values" not in ingredients:
        # Attention weights sum to 1, so a constant in the values is a constant in the output.
        per_head = weights.v_bias.unflatten(0, (heads.keys, heads.size))
        constant = per_head.repeat_interleave(heads.group, 0).flatten()
        weights.v_bias = bias.new_zeros(heads.keys * rank)
        weights.o_bias = bias + constant @ old
    elif weights.v_bias is not None:
        bias_rows = weights.v_bias.unflatten(0, (heads.keys, 1, heads.size))
        weights.v_bias = (bias_rows @ basis).flatten()
    values = weights.v.unflatten(1, (heads.keys, heads.size)).transpose(0, 1)
    weights.v = (values @ basis).transpose(0, 1).flatten(1)
    if "mixed-values" in ingredients:
        gram, mean = moments(statistics, "out", centred=_centred(weights, ingredients))
        weights.o = projected(gram, old, wide, ridge_of(gram, OUTPUT_RIDGE))
        if bias is not None:
            weights.o_bias = bias + mean @ old - (mean @ wide) @ weights.o
    else:
        outputs = old.unflatten(0, (heads.keys, heads.group, heads.size))
        weights.o = (dual[:, None] @ outputs).flatten(0, 2)
    held = statistics["held_out"][statistics["held_mask"]].double()
    lost = held @ old - (held @ wide) @ weights.o
    if weights.o_bias is not None and bias is not None:
        lost = lost + bias - weights.o_bias
    return float(lost.square().sum(1).mean())


# -- query and key -------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class QueryKeyRanking:
    """For each key/value head: the order of its RoPE pairs and bases of its other channels.

    `products` [h_kv, G, P, P] is the Gram of the pairs' scores; `left` [h, u, u] and `right`
    [h_kv, u, u] map unrotated channels of queries and keys to others, best first.
    """

    pairs: tuple[Elimination, ...]
    products: Tensor
    left: Tensor
    right: Tensor


def rank_queries_keys(
    statistics: LayerStatistics, heads: Heads, ingredients: frozenset[str]
) -> QueryKeyRanking:
    """Rank the pairs and the unrotated channels of queries and keys."""
    queries, _ = moments(statistics, "queries", centred=False)
    keys, _ = moments(statistics, "keys", centred="rescale" in ingredients)
    turned = heads.rotated
    q, k = queries.unflatten(0, (heads.keys, heads.group)), keys[:, None]
    products = pair_products(q[..., :turned, :turned], k[..., :turned, :turned])
    pairs = []
    for head in range(heads.keys if turned else 0):
        if "rescale" in ingredients:
            ones = products.new_ones(heads.group, turned // 2, 1)
            pairs.append(eliminate(products[head], ones, 0, block=1))
        else:
            energy = pair_scores(q[head][:, :turned, :turned], k[head][:, :turned, :turned])
            pairs.append(unpriced(energy.sum(0).argsort(), turned // 2))
    centred, _ = moments(statistics, "keys", centred="two-sided" in ingredients)
    left, right = _other_channels(
        q[..., turned:, turned:], centred[:, turned:, turned:], two="two-sided" in ingredients
    )
    return QueryKeyRanking(tuple(pairs), products, left, right)


def _other_channels(queries: Tensor, keys: Tensor, *, two: bool) -> tuple[Tensor, Tensor]:
    """Return maps [h, u, u] and [h_kv, u, u] of unrotated channels, best first."""
    size = queries.shape[-1]
    lefts, rights = [], []
    for q, k in zip(queries, keys, strict=True):
        if two and size:
            factors = two_sided(q, k, size)
            left, right = factors.left.unflatten(0, (len(q), size)), factors.right.mT
        else:
            order = channel_scores(q, k).sum(0).argsort(descending=True)
            right = torch.eye(size, dtype=q.dtype, device=q.device)[:, order]
            left = right.expand(len(q), -1, -1)
        lefts.append(left)
        rights.append(right)
    return torch.cat(lefts), torch.stack(rights)


def kept_pairs(ranking: QueryKeyRanking, count: int) -> Tensor:
    """Return the pairs that each key/value head keeps, [h_kv, count], ascending."""
    if not ranking.pairs:
        return torch.empty(len(ranking.right), 0, dtype=torch.int64)
    return torch.stack([pairs.kept(count) for pairs in ranking.pairs])


def query_key_maps(
    ranking: QueryKeyRanking, heads: Heads, ingredients: frozenset[str], *,
    pairs: int, passing: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return linear maps [h, D, 2r + u] and [h_kv, D, 2r + u] of queries and keys.

    The columns are the first halves of the r `pairs` that stay, their second halves, then the u
    `passing` channels that are not rotated. They commute with the rotation.
    """
    half, count, chosen_pairs = heads.rotated // 2, pairs, kept_pairs(ranking, pairs)
    wide = 2 * count + passing
    left = ranking.left.new_zeros(heads.queries, heads.size, wide)
    right = ranking.right.new_zeros(heads.keys, heads.size, wide)
    columns = torch.arange(count)
    for key in range(heads.keys):
        chosen = chosen_pairs[key]
        for member in range(heads.group):
            factors = ranking.products.new_ones(count)
            if "rescale" in ingredients and 0 < count < half:
                factors = rescale(ranking.products[key, member], chosen)
            head = key * heads.group + member
            left[head, chosen, columns] = factors
            left[head, chosen + half, columns + count] = factors
        right[key, chosen, columns] = 1.0
        right[key, chosen + half, columns + count] = 1.0
    left[:, heads.rotated :, 2 * count :] = ranking.left[:, :, :passing]
    right[:, heads.rotated :, 2 * count :] = ranking.right[:, :, :passing]
    return left, right


def shrink_queries_keys(weights: LayerWeights, heads: Heads, maps: tuple[Tensor, Tensor]) -> None:
    """Apply maps of `query_key_maps` to the projections, in place."""
    left, right = maps
    queries = weights.q.unflatten(1, (heads.queries, heads.size)).transpose(0, 1)
    keys = weights.k.unflatten(1, (heads.keys, heads.size)).transpose(0, 1)
    weights.q = (queries @ left).transpose(0, 1).flatten(1)
    weights.k = (keys @ right).transpose(0, 1).flatten(1)
    if weights.q_bias is not None:
        weights.q_bias = (weights.q_bias.unflatten(0, (heads.queries, 1, -1)) @ left).flatten()
    if weights.k_bias is not None:
        weights.k_bias = (weights.k_bias.unflatten(0, (heads.keys, 1, -1)) @ right).flatten()


class LocalAttention:
    """One layer's attention on its held-out windows, to see what other queries and keys do."""

    def __init__(
        self, weights: LayerWeights, statistics: LayerStatistics, heads: Heads, scaling: float
    ) -> None:
        self.heads, self.scaling = heads, scaling
        x = statistics["held_x"]
        self.mask = statistics["held_mask"]
        self.out = weights.o.float()
        self.q = _project(x, weights.q, weights.q_bias).unflatten(-1, (heads.queries, heads.size))
        self.k = _project(x, weights.k, weights.k_bias).unflatten(-1, (heads.keys, heads.size))
        values = _project(x, weights.v, weights.v_bias).unflatten(-1, (heads.keys, heads.size))
        self.values = values.transpose(1, 2)
        if "cos" in statistics:
            cos, sin = (statistics[n][None, : x.shape[1]] for n in ("cos", "sin"))
            self.q, self.k = rotate(self.q, cos, sin), rotate(self.k, cos, sin)
        self.mixed = self._attend(self.q, self.k)

    def error(self, maps: tuple[Tensor, Tensor]) -> float:
        """Return the mean squared change of the attention's output per held-out token."""
        left, right = (part.float() for part in maps)
        q = torch.einsum("bthd,hdk->bthk", self.q, left)
        k = torch.einsum("bthd,hdk->bthk", self.k, right)
        lost = (self._attend(q, k) - self.mixed) @ self.out
        return float(lost.square().sum(1).mean())

    def _attend(self, q: Tensor, k: Tensor) -> Tensor:
        """Return the mixed values of the counted tokens, [n, h·D]."""
        mixed = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), self.values, is_causal=True, scale=self.scaling,
            enable_gqa=True,
        )  # fmt: skip
        return mixed.transpose(1, 2).flatten(2)[self.mask]


def _project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = x @ weight.float()
    return y if bias is None else y + bias.float()
