"""Compression beside its peers: perplexity at the same share of block parameters removed.

    python tests/benchmarks/compression.py DIR [FAMILY…] [--ablation] [--ratios 0.1,0.3]

DIR holds the pool that text_models.py made. For each family and ratio the table shows magnitude
pruning (of single weights, as zeros, and of whole MLP channels and heads' channels), layer
dropping by Block Influence (ShortGPT), modegpt and poolreg, on the held-out text and on another
kind of text; all are calibrated on the same text, which is neither of the two. `--ablation` shows
poolreg with each ingredient left out. Everything is measured in the run that prints it.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from poolreg import Pool
from poolreg.compress.architectures import Heads, family, heads, layers, projection
from poolreg.compress.calibrate import choose_windows, gather
from poolreg.compress.sizes import INGREDIENTS
from poolreg.evaluation.protocol import Protocol
from poolreg.evaluation.scoring import score, tokenise
from poolreg.models.loading import load_model
from poolreg.text.partitions import evalset_documents

EVALSETS = ("python", "prose")


class Peers:
    """A dense model and what other methods make of it, scored on the same windows."""

    def __init__(self, pool: Pool, name: str, folder: Path) -> None:
        pool.export_model(name, folder)
        self.model = load_model(folder)
        self.names = family(self.model.config.model_type)
        length = self.model.config.max_position_embeddings
        protocol = Protocol(length, "0" * 64)
        known = pool.registry.names("evalset")
        documents = {n: evalset_documents(pool.registry, d) for n, d in known.items()}
        self.texts = {n: tokenise(d, folder, protocol) for n, d in documents.items()}
        sample = choose_windows(self.texts["calibration"], 30_000)
        seen = gather(self.model, self.names, self.texts["calibration"], sample=sample)
        self.influence = [statistics.influence for _, statistics in seen]

    def perplexities(self, model: Any) -> list[float]:
        """Return the perplexity on each evalset."""
        scored = [score(model, self.texts[name]) for name in EVALSETS]
        return [math.exp(s.total_nll / s.total_tokens) for s in scored]

    def blocks(self, model: Any) -> list[torch.nn.Parameter]:
        """Return the matrices of the blocks."""
        return [
            p for layer in layers(model, self.names) for p in layer.parameters() if p.dim() == 2
        ]

    def sparse(self, ratio: float) -> Any:
        """Return a copy with the smallest weights of each matrix set to zero."""
        model = copy.deepcopy(self.model)
        for weight in self.blocks(model):
            edge = weight.abs().flatten().kthvalue(max(1, int(ratio * weight.numel()))).values
            weight.data[weight.abs() <= edge] = 0.0
        return model

    def structured(self, ratio: float) -> Any:
        """Return a copy without the MLP channels, values and q/k channels of smallest norm."""
        model = copy.deepcopy(self.model)
        sizes = heads(model.config)
        for layer in layers(model, self.names):
            mlp = layer.get_submodule(self.names.mlp)
            down: Any = projection(layer, self.names, "down").weight
            up = [mlp.get_submodule(name).weight for name in self.names.up]
            norms = down.square().sum(0) * sum(u.square().sum(1) for u in up)
            down.data[:, _smallest(norms, ratio)] = 0.0
            self._attention(layer.get_submodule(self.names.attention), sizes, ratio)
        return model

    def _attention(self, attention: Any, sizes: Heads, ratio: float) -> None:
        q, k, v = (getattr(attention, f"{n}_proj").weight for n in "qkv")
        out = getattr(attention, self.names.output).weight
        keys = k.data.unflatten(0, (sizes.keys, sizes.size))
        queries = q.data.unflatten(0, (sizes.keys, sizes.group, sizes.size))
        norms = keys.square().sum(2) * queries.square().sum((1, 3))  # [h_kv, D]
        if self.names.rope:
            norms = norms.unflatten(1, (2, -1)).sum(1).repeat(1, 2)
        for head, row in enumerate(norms):
            keys[head, _smallest(row, ratio)] = 0.0
        values = v.data.unflatten(0, (sizes.keys, sizes.size))
        outs = out.data.unflatten(1, (sizes.keys, sizes.group, sizes.size))
        norms = values.square().sum(2) * outs.square().sum((0, 2))
        for head, row in enumerate(norms):
            values[head, _smallest(row, ratio)] = 0.0

    def dropped(self, ratio: float) -> tuple[Any, float]:
        """Return a copy without whole layers, of least Block Influence, and the share removed."""
        model = copy.deepcopy(self.model)
        count = max(1, round(ratio * len(self.influence)))
        order = sorted(range(len(self.influence)), key=lambda i: self.influence[i])
        gone = set(order[:count])
        stay = [layer for i, layer in enumerate(layers(model, self.names)) if i not in gone]
        holder, _, last = self.names.layers.rpartition(".")
        setattr(model.get_submodule(holder), last, torch.nn.ModuleList(stay))
        model.config.num_hidden_layers = len(stay)
        return model, count / len(self.influence)


def _smallest(norms: torch.Tensor, ratio: float) -> torch.Tensor:
    return norms.argsort()[: round(ratio * len(norms))]


def variant(pool: Pool, name: str, ratio: float, **how: Any) -> tuple[float, list[float]]:
    """Make a variant in the pool and return the share removed and its perplexities."""
    (made,) = pool.compress(name, [ratio], calibrate="calibration", **how)
    answers = pool.evaluate([made.digest], on=list(EVALSETS))
    by_name = {answer.evalset: answer.perplexity for answer in answers}
    return made.plan.achieved, [by_name[evalset] for evalset in EVALSETS]


def rows(
    pool: Pool, name: str, peers: Peers, ratio: float
) -> Iterator[tuple[str, float, list[float]]]:
    """Yield (method, share removed, perplexities)."""
    yield "magnitude, single weights", ratio, peers.perplexities(peers.sparse(ratio))
    yield "magnitude, channels", ratio, peers.perplexities(peers.structured(ratio))
    model, share = peers.dropped(ratio)
    yield "ShortGPT", share, peers.perplexities(model)
    yield "modegpt", *variant(pool, name, ratio, method="modegpt")
    yield "poolreg", *variant(pool, name, ratio)


def ablation(pool: Pool, name: str, ratio: float) -> Iterator[tuple[str, float, list[float]]]:
    """Yield poolreg whole, then with each ingredient left out, then modegpt."""
    yield "poolreg", *variant(pool, name, ratio)
    for ingredient in INGREDIENTS:
        yield f"without {ingredient}", *variant(pool, name, ratio, without=(ingredient,))
    yield "sequential", *variant(pool, name, ratio, sequential=True)
    yield "modegpt", *variant(pool, name, ratio, method="modegpt")


def report(name: str, dense: list[float], found: Callable[[], Iterator[Any]]) -> None:
    """Print one table."""
    print(f"\n### {name}, dense perplexity {dense[0]:.3f} (python), {dense[1]:.3f} (prose)\n")
    print("| method | removed | python | increase | prose | increase |\n|---|---|---|---|---|---|")
    for method, share, (one, other) in found():
        print(
            f"| {method} | {share:.1%} | {one:.3f} | {one - dense[0]:+.3f} "
            f"| {other:.3f} | {other - dense[1]:+.3f} |",
            flush=True,
        )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--ablation", action="store_true")
    parser.add_argument("--ratios", default="0.1,0.2,0.3,0.4,0.5")
    given = parser.parse_args()
    ratios = [float(ratio) for ratio in given.ratios.split(",")]
    with Pool.open(given.folder / "pool") as pool, tempfile.TemporaryDirectory() as scratch:
        for name in given.families or ["llama", "opt", "qwen2"]:
            peers = Peers(pool, name, Path(scratch) / name)
            dense = peers.perplexities(peers.model)
            for ratio in ratios:
                if given.ablation:
                    found = lambda n=name, r=ratio: ablation(pool, n, r)  # noqa: E731
                else:
                    found = lambda n=name, r=ratio, p=peers: rows(pool, n, p, r)  # noqa: E731
                report(f"{name} at {ratio:.0%}", dense, found)


if __name__ == "__main__":
    main()
