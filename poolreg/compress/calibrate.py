"""Calibration: what has to be known of a model's activations, gathered in one pass over text.

For each layer the Gram matrices Σ aᵀa of what enters its projections, added up in float64, and the
rows of a few windows that stay out of the Grams, to judge fits by text that they have not seen.
Every scored token counts once; padding never counts. All text goes through one layer before the
next, so that no more than one layer's matrices are in memory. Nothing here changes the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from poolreg.compress.architectures import Heads, heads, layers, projection, split_fused
from poolreg.compress.grams import add_gram, mirror
from poolreg.errors import Refused
from poolreg.evaluation.scoring import TokenisedSet, batches
from poolreg.models.modeling_poolreg import Family

HELD_OUT_SHARE = 8  # one window in so many stays out of the Gram matrices
HELD_OUT_TOKENS = 4096  # and no more tokens than this
BATCH_TOKENS = {"cpu": 2048}
SINGLE = ("mlp",)  # Gram matrices of products in float32; see docs/decisions/0011
PROJECTIONS = ("q_proj", "k_proj", "v_proj")  # where they are not fused

Progress = Callable[[int], None] | None


@dataclass(frozen=True, eq=False)
class LayerStatistics:
    """What one layer saw. n tokens are in the Grams, the W windows of T tokens are held out.

    `mlp` and `out`: Gram matrices of the inputs of the down projection [m, m] and of the output
    projection [h·D, h·D]. For each head `values` [h_kv, D, D], and as rotated `queries` [h, D, D]
    and `keys` [h_kv, D, D] (absent where q and k are normalised). `…_sum`: Σ a of each.
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

    In memory are the hidden states of all tokens and the statistics of one layer. `progress` is
    told layers. Raises `Refused` if an activation is not finite.
    """
    found = layers(model, names)
    wanted = list(range(len(found)) if only is None else only)
    going = list(_embedded(model, names, tokens, sample))
    for index, layer in enumerate(found[: max(wanted, default=-1) + 1]):
        if index not in wanted:
            for batch in going:
                batch.enter(layer, index)
            continue
        watcher = _Watcher(layer, names, heads(model.config))
        try:
            for batch in going:
                watcher.watch(batch, index)
        finally:
            watcher.detach()
        if progress is not None:
            progress(1)
        yield index, watcher.statistics(index)


# -- text on its way through the layers ------------------------------------------------------


@dataclass(eq=False)
class _Batch:
    """Windows between two layers: the hidden `states` [B, T, d], and what else layers are given."""

    held: bool
    counts: Tensor  # [B, T], which tokens count
    all_count: bool
    states: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]  # of each layer

    @torch.inference_mode()
    def enter(self, layer: nn.Module, index: int) -> None:
        """Go through a layer."""
        args, kwargs = self.calls[index]
        output = layer(self.states, *args, **kwargs)
        self.states = output[0] if isinstance(output, tuple) else output


class _Note(nn.Module):
    """Stands for a layer to note what it is called with, and gives on what it is given."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.attention_type = getattr(layer, "attention_type", None)  # some models ask for it

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Note the call."""
        self.states, self.call = hidden_states, (args, kwargs)
        return hidden_states


def _embedded(model: Any, names: Family, tokens: TokenisedSet, sample: Sample) -> Iterator[_Batch]:
    """Yield the windows as they enter the first layer, those held out first."""
    live: Any = model.get_submodule(names.layers)
    stock = list(live)
    notes = [_Note(layer) for layer in stock]
    stream = torch.from_numpy(tokens.stream).to(model.device, torch.int64)
    batch_tokens = BATCH_TOKENS.get(model.device.type, 16384)
    try:
        for index, note in enumerate(notes):
            live[index] = note
        for windows, held in ((sample.held_out, True), (sample.windows, False)):
            for rows in batches(windows, batch_tokens):
                counts = _read(model, stream, windows[rows])
                yield _Batch(
                    held, counts, bool(counts.all()), notes[0].states, [n.call for n in notes]
                )
    finally:
        for index, layer in enumerate(stock):
            live[index] = layer


@torch.inference_mode()
def _read(model: Any, stream: Tensor, windows: Any) -> Tensor:
    """Send windows into the model; returns which tokens count, [B, T]."""
    starts, stops, scored = windows.T
    places = starts[:, None] + np.arange(int((stops - starts).max()))
    real = places < stops[:, None]
    inputs = stream[torch.from_numpy(np.where(real, places, 0)).to(stream.device)]
    mask = None if real.all() else torch.from_numpy(real).to(stream.device, torch.int64)
    model.base_model(input_ids=inputs, attention_mask=mask, use_cache=False)
    return torch.from_numpy(real & (places >= (stops - scored)[:, None])).to(stream.device)


# -- what a layer does -----------------------------------------------------------------------


@dataclass(eq=False)
class _Watcher:
    """Hooks on one layer that add up what passes."""

    layer: nn.Module
    names: Family
    sizes: Heads
    grams: dict[str, Tensor] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, list[Tensor]] = field(default_factory=dict)
    tokens: int = 0
    cosine: float = 0.0
    energy: float = 0.0

    def __post_init__(self) -> None:
        names, attention = self.names, self.layer.get_submodule(self.names.attention)
        self._batch: Any = None
        self._positions: Any = None
        self._projected: dict[str, Tensor] = {}
        self._hooks = [
            projection(self.layer, names, "output").register_forward_pre_hook(self._on_output),
            projection(self.layer, names, "down").register_forward_pre_hook(self._on_down),
        ]
        for name in (names.inputs,) if names.fused else PROJECTIONS:
            hook = self._on_projection(name)
            self._hooks.append(attention.get_submodule(name).register_forward_hook(hook))

    def detach(self) -> None:
        """Take the hooks off again."""
        for hook in self._hooks:
            hook.remove()

    def watch(self, batch: _Batch, index: int) -> None:
        """Let a batch go through the layer and add up what it does there."""
        self._batch, before = batch, batch.states
        self._positions = batch.calls[index][1].get("position_embeddings")
        batch.enter(self.layer, index)
        if not batch.held:
            x, y = (self._counted(states) for states in (before, batch.states))
            xx, xy, yy = (torch.linalg.vecdot(*pair).double() for pair in ((x, x), (x, y), (y, y)))
            self.cosine += float((xy / (xx * yy).sqrt().clamp(min=1e-300)).sum())
            self.energy += float(yy.sum())
            self.tokens += len(x)

    def _on_projection(self, name: str) -> Callable[..., None]:
        def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self._projected[name] = output
            if self._batch.held and name == self.names.inputs:
                self._keep("held_x", args[0])
                self._keep("held_mask", self._batch.counts)

        return keep

    def _on_output(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._see("out", args[0])
        q, k, v = self._queries_keys_values()
        if not self._batch.held:
            self._add("values", v)
        if self.names.qk_norm:
            return
        if self.names.rope and self._positions is not None:
            cos, sin = (part.expand(len(q), -1, -1) for part in self._positions)
            if self._batch.held:
                self._keep("cos", cos[:1])
                self._keep("sin", sin[:1])
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if not self._batch.held:
            self._add("queries", q)
            self._add("keys", k)

    def _on_down(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._see("mlp", args[0])

    def _queries_keys_values(self) -> list[Tensor]:
        """Return q [B, T, h, D], k and v [B, T, h_kv, D] as the projections gave them."""
        shape = (*self._batch.counts.shape, -1)
        parts = {name: part.reshape(shape) for name, part in self._projected.items()}
        self._projected.clear()
        if self.names.fused:
            return split_fused(parts[self.names.inputs], self.names, self.sizes)
        return [parts[name].unflatten(-1, (-1, self.sizes.size)) for name in PROJECTIONS]

    def _see(self, name: str, activations: Tensor) -> None:
        """Add [B, T, n] or [B·T, n] to the Gram matrix of `name`, or keep them."""
        activations = activations.reshape(*self._batch.counts.shape, -1)
        if self._batch.held:
            self._keep(f"held_{name}", activations)
        else:
            self._add(name, activations)

    def _keep(self, name: str, part: Tensor) -> None:
        self.kept.setdefault(name, []).append(part.float().cpu())

    def _add(self, name: str, activations: Tensor) -> None:
        """Add [B, T, n] to a Gram matrix, or [B, T, h, n] to one for each head."""
        rows = self._counted(activations)
        if name not in self.grams:
            none = rows.new_zeros(rows.shape[1:], dtype=torch.float64)
            self.sums[name], self.grams[name] = none, none[..., None] * none[..., None, :]
        self.sums[name] += rows.sum(0)
        rows = rows if name in SINGLE else rows.double()
        add_gram(self.grams[name], rows.movedim(1, 0) if rows.dim() == 3 else rows)

    def _counted(self, part: Tensor) -> Tensor:
        """Return the rows of [B, T, …] that count, [n, …], in float32."""
        rows = part.flatten(0, 1)
        batch = self._batch
        return (rows if batch.all_count else rows[batch.counts.flatten()]).float()

    @torch.inference_mode()
    def statistics(self, layer: int) -> LayerStatistics:
        """Return what was added up; raises `Refused` if anything is not finite."""
        tensors = {}
        for name, value in self.grams.items():
            if not torch.isfinite(value.diagonal(dim1=-2, dim2=-1)).all():
                raise Refused(
                    f"the {name} activations of layer {layer} are not finite",
                    hint="the model gives NaN or infinity on the calibration text; try "
                    "--dtype float32, and check it with: poolreg eval",
                    layer=layer,
                )
            tensors[name] = mirror(value).cpu()
            tensors[f"{name}_sum"] = self.sums[name].cpu()
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
