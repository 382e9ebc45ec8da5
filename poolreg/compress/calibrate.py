"""Calibration: what has to be known of a model's activations, gathered in one pass over text.

For each layer the Gram matrices Σ aᵀa of what enters its projections, in float64, and the rows of
a few windows that stay out of the Grams, to judge fits by text that they have not seen. Every
scored token counts once; padding never counts. Nothing here changes the model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from poolreg.compress.architectures import Heads, heads, layers, projection, split_fused
from poolreg.errors import Refused
from poolreg.evaluation.scoring import TokenisedSet, batches
from poolreg.models.modeling_poolreg import Family

HELD_OUT_SHARE = 8  # one window in so many stays out of the Gram matrices
HELD_OUT_TOKENS = 4096  # and no more tokens than this
BATCH_TOKENS = {"cpu": 2048}
MEMORY_SHARE = 0.5  # of the memory that is free may be taken by Gram matrices

Progress = Callable[[int], None] | None


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """What one layer saw. n tokens are in the Grams, the W windows of T tokens are held out.

    `mlp`, `attention`, `out`: Gram matrices of the inputs of the down projection [m, m], of q, k
    and v [d, d], and of the output projection [h·D, h·D], with `…_sum` Σ a. `queries` [h, D, D]
    and `keys` [h_kv, D, D] after rotation, with their sums (absent where q and k are normalised).
    `held_x` [W, T, d], `held_mlp` [W, T, m], `held_out` [W, T, h·D] in float32, `held_mask`
    [W, T]; `cos` and `sin` [T, rotated] of the positions. `influence` is 1 − mean cosine of the
    layer's input and output, `energy` the mean squared norm of its output.
    """

    tensors: dict[str, Tensor]
    tokens: int
    influence: float
    energy: float

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors


@dataclass(frozen=True)
class Sample:
    """Which windows are calibrated on and which are held out, as rows of a `TokenisedSet`."""

    windows: Any  # [N, 3]
    held_out: Any  # [W, 3]

    @property
    def tokens(self) -> int:
        """Tokens that enter the Gram matrices."""
        return int(self.windows[:, 2].sum())

    @property
    def held_out_tokens(self) -> int:
        """Tokens held out."""
        return int(self.held_out[:, 2].sum())


def choose_windows(tokens: TokenisedSet, limit: int) -> Sample:
    """Choose windows of about `limit` tokens in all, the same ones each time."""
    order = np.random.default_rng(0).permutation(len(tokens.windows))
    chosen = tokens.windows[order]
    chosen = chosen[: int(np.searchsorted(np.cumsum(chosen[:, 2]), limit)) + 1]
    held = chosen[::HELD_OUT_SHARE]
    held = held[: int(np.searchsorted(np.cumsum(held[:, 2]), HELD_OUT_TOKENS)) + 1]
    out = {tuple(row) for row in held.tolist()}
    rest = np.array([row for row in chosen.tolist() if tuple(row) not in out], np.int64)
    return Sample(rest.reshape(-1, 3), held)


def held_ids(tokens: TokenisedSet, sample: Sample) -> Any:
    """Return the token ids of the longest held-out windows, int32 [W, T]."""
    lengths = sample.held_out[:, 1] - sample.held_out[:, 0]
    longest = sample.held_out[lengths == lengths.max()]
    return np.stack([tokens.stream[start:stop] for start, stop, _ in longest])


def gather(
    model: Any, names: Family, tokens: TokenisedSet, *, sample: Sample,
    only: Sequence[int] | None = None, progress: Progress = None,
) -> Iterator[tuple[int, LayerStatistics]]:  # fmt: skip
    """Yield (layer, statistics) of all layers, or of `only` those, in order.

    As many layers are watched in one pass as their Gram matrices fit in memory. `progress` is
    told tokens. Raises `Refused` if an activation is not finite.
    """
    watched = layers(model, names)
    wanted = list(range(len(watched)) if only is None else only)
    at_once = _layers_at_once(model, watched[0], names)
    stream = torch.from_numpy(tokens.stream).to(model.device, torch.int64)
    batch_tokens = BATCH_TOKENS.get(model.device.type, 16384)
    for start in range(0, len(wanted), at_once):
        group = wanted[start : start + at_once]
        watchers = [_Watcher(watched[i], names, heads(model.config)) for i in group]
        try:
            for windows, held in ((sample.held_out, True), (sample.windows, False)):
                for rows in batches(windows, len(windows) and batch_tokens):
                    done = _run(model, stream, windows[rows], watchers=watchers, held=held)
                    if progress is not None:
                        progress(done)
        finally:
            for watcher in watchers:
                watcher.detach()
        for layer, watcher in zip(group, watchers, strict=True):
            yield layer, watcher.statistics(layer)


def passes(model: Any, names: Family) -> int:
    """Return how often the text has to go through the model for all Gram matrices to fit."""
    watched = layers(model, names)
    return -(-len(watched) // _layers_at_once(model, watched[0], names))


def _layers_at_once(model: Any, layer: nn.Module, names: Family) -> int:
    sizes, hidden = heads(model.config), model.config.hidden_size
    down: Any = projection(layer, names, "down").weight
    width, inner = down.numel() // hidden, sizes.queries * sizes.size
    need = 8 * (width**2 + hidden**2 + inner**2) * 2  # and one product of each
    return max(1, int(MEMORY_SHARE * _free_memory(model.device) / need))


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


@torch.inference_mode()
def _run(
    model: Any, stream: Tensor, windows: Any, *, watchers: Sequence[_Watcher], held: bool
) -> int:
    """Send one batch of windows through the model, with the watchers told what counts."""
    starts, stops, scored = windows.T
    places = starts[:, None] + np.arange(int((stops - starts).max()))
    real = places < stops[:, None]
    counts = torch.from_numpy(real & (places >= (stops - scored)[:, None])).to(stream.device)
    inputs = stream[torch.from_numpy(np.where(real, places, 0)).to(stream.device)]
    mask = None if real.all() else torch.from_numpy(real).to(stream.device, torch.int64)
    for watcher in watchers:
        watcher.counts, watcher.held = counts, held
    model.base_model(input_ids=inputs, attention_mask=mask, use_cache=False)
    return int(scored.sum())


@dataclass(eq=False)
class _Watcher:
    """Hooks on one layer that add up what passes."""

    layer: nn.Module
    names: Family
    sizes: Heads
    counts: Tensor = field(default_factory=lambda: torch.empty(0))
    held: bool = False
    sums: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, list[Tensor]] = field(default_factory=dict)
    tokens: int = 0
    cosine: float = 0.0
    energy: float = 0.0

    def __post_init__(self) -> None:
        names, attention = self.names, self.layer.get_submodule(self.names.attention)
        self._passing: dict[str, Any] = {}
        self._hooks = [
            attention.register_forward_pre_hook(self._on_attention, with_kwargs=True),
            projection(self.layer, names, "output").register_forward_pre_hook(self._on_out),
            projection(self.layer, names, "down").register_forward_pre_hook(self._on_down),
            self.layer.register_forward_hook(self._on_layer, with_kwargs=True),
        ]
        if not names.qk_norm:
            for name in (names.inputs,) if names.fused else ("q_proj", "k_proj"):
                hook = self._on_projection(name)
                self._hooks.append(attention.get_submodule(name).register_forward_hook(hook))

    def detach(self) -> None:
        """Take the hooks off again."""
        for hook in self._hooks:
            hook.remove()

    def _on_attention(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        self._passing["positions"] = kwargs.get("position_embeddings")
        self._add("attention", "x", x)

    def _on_projection(self, name: str) -> Callable[..., None]:
        def keep(_: nn.Module, __: Any, output: Tensor) -> None:
            self._passing[name] = output

        return keep

    def _on_out(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._add("out", "out", args[0])
        if not self.names.qk_norm:
            self._add_scores()

    def _on_down(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._add("mlp", "mlp", args[0])

    def _on_layer(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        if not self.held:
            x, y = (part[self.counts].double() for part in (before, after))
            self.cosine += float(torch.nn.functional.cosine_similarity(x, y).sum())
            self.energy += float(y.square().sum())
            self.tokens += len(x)

    def _add(self, name: str, held_name: str, activations: Tensor) -> None:
        """Add [B, T, n] or [B·T, n] to the Gram matrix of `name`, or keep its rows."""
        if self.held:
            rows = activations.reshape(*self.counts.shape, -1).float().cpu()
            self.kept.setdefault(f"held_{held_name}", []).append(rows)
            if name == "attention":
                self.kept.setdefault("held_mask", []).append(self.counts.cpu())
            return
        rows = activations.reshape(-1, activations.shape[-1])[self.counts.flatten()].double()
        self._sum(name, rows.mT @ rows)
        self._sum(f"{name}_sum", rows.sum(0))

    def _add_scores(self) -> None:
        """Add rotated queries and keys, head by head."""
        q, k = self._queries_and_keys()
        positions = self._passing["positions"] if self.names.rope else None
        if positions is not None:
            cos, sin = (part.expand(q.shape[0], -1, -1) for part in positions)
            if self.held:
                self.kept.setdefault("cos", []).append(cos[:1].float().cpu())
                self.kept.setdefault("sin", []).append(sin[:1].float().cpu())
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if not self.held:
            for name, part in (("queries", q), ("keys", k)):
                rows = part[self.counts].double().movedim(1, 0)  # [heads, n, D]
                self._sum(name, rows.mT @ rows)
                self._sum(f"{name}_sum", rows.sum(1))

    def _queries_and_keys(self) -> tuple[Tensor, Tensor]:
        """Return q [B, T, h, D] and k [B, T, h_kv, D] as the projections gave them."""
        shape, size = self.counts.shape, self.sizes.size
        if self.names.fused:
            fused = self._passing.pop(self.names.inputs).reshape(*shape, -1)
            q, k, _ = split_fused(fused, self.names, self.sizes)
            return q, k
        q, k = (self._passing.pop(n).reshape(*shape, -1, size) for n in ("q_proj", "k_proj"))
        return q, k

    def _sum(self, name: str, value: Tensor) -> None:
        if name in self.sums:
            self.sums[name] += value
        else:
            self.sums[name] = value

    def statistics(self, layer: int) -> LayerStatistics:
        """Return what was added up; raises `Refused` if anything is not finite."""
        for name, value in self.sums.items():
            if not torch.isfinite(value).all():
                raise Refused(
                    f"the {name} activations of layer {layer} are not finite",
                    hint="the model gives NaN or infinity on the calibration text; try "
                    "--dtype float32, and check it with: poolreg eval",
                    layer=layer,
                )
        tensors = {name: value.cpu() for name, value in self.sums.items()}
        for name, parts in self.kept.items():
            if name in ("cos", "sin"):
                tensors[name] = max(parts, key=lambda part: part.shape[1])[0]
            else:
                tensors[name] = _stack(parts)
        count = max(self.tokens, 1)
        return LayerStatistics(tensors, self.tokens, 1 - self.cosine / count, self.energy / count)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [B, T, h, D] with its first channels rotated by cos, sin [B, T, rotated]."""
    turned = cos.shape[-1]
    first, rest = x[..., :turned], x[..., turned:]
    half = first.unflatten(-1, (2, -1))
    swapped = torch.cat([-half[..., 1, :], half[..., 0, :]], -1)
    first = first * cos[:, :, None] + swapped * sin[:, :, None]
    return torch.cat([first, rest], -1)


def _stack(parts: Sequence[Tensor]) -> Tensor:
    """Join batches of windows [B, T, …] of different lengths, padded with zeros at the end."""
    longest = max(part.shape[1] for part in parts)
    padded = [
        torch.nn.functional.pad(
            part.float(), (0, 0) * (part.dim() - 2) + (0, longest - part.shape[1])
        )
        for part in parts
    ]
    joined = torch.cat(padded)
    return joined.bool() if joined.dim() == 2 else joined
