"""What an error costs: one part of one layer is shrunk at a time and the predictions compared.

The same relative error in the residual stream may be harmless in one place and ruinous in another
(the first layer of a model with learned positions adds little to a large stream, and all depends
on it). The divergence of the predictions grows with the squared error as long as it is small, so
one measurement a part gives the factor for its whole curve, which is in nats per token then.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from poolreg.compress.apply import install, shrink
from poolreg.compress.architectures import Heads, read_layer
from poolreg.compress.calibrate import LayerStatistics
from poolreg.compress.plan import LayerAnalysis
from poolreg.models.modeling_poolreg import Family
from poolreg.numerics.allocate import Curve

PROBE_SHARE = 0.5  # of a part's size is left when it is probed
TELLING = 1e-2  # of the error of the smallest size: less would measure rounding
PROBE_TOKENS = 1024
LOGITS_AT_ONCE = 1 << 25  # elements of the predictions of one pass: 128 MiB


@torch.inference_mode()
def priced(
    model: Any, names: Family, heads: Heads, analyses: Sequence[LayerAnalysis], *,
    statistics: Callable[[int], LayerStatistics], ids: Tensor, ingredients: frozenset[str],
    progress: Callable[[int], None],
) -> list[LayerAnalysis]:  # fmt: skip
    """Return the analyses with curves in nats per token: KL of predictions on token ids [B, T].

    `statistics` gives those of a layer; `progress` is told layers. The model is left as it was.
    """
    tokens = min(PROBE_TOKENS, LOGITS_AT_ONCE // model.config.vocab_size)
    ids = ids[: max(1, tokens // ids.shape[1])]
    live: Any = model.get_submodule(names.layers)
    states, usual = _states(model, live, ids)
    stock, found = list(live), []
    for index, analysis in enumerate(analyses):
        whole, curves, seen = stock[index], {}, statistics(index)
        for part, curve in analysis.curves.items():
            at = _probed(curve)
            live[index] = _shrunk(
                whole, names, heads, analysis, config=model.config, part=part,
                size=int(curve.sizes[at]), seen=seen, ingredients=ingredients,
            )  # fmt: skip
            divergence = _divergence(usual, _predictions(model, ids))
            factor = max(divergence, 0.0) / max(float(curve.errors[at]), 1e-300)
            curves[part] = Curve(curve.sizes, curve.costs, curve.errors * factor)
        # The next layers are probed without running this one again.
        live[index] = _Recalled(states[index], whole)
        found.append(replace(analysis, curves=curves))
        progress(1)
    for index, layer in enumerate(stock):
        live[index] = layer
    return found


def _probed(curve: Curve) -> int:
    """Return the place of the size to probe: smaller than half where half loses nothing."""
    half = int((curve.sizes >= PROBE_SHARE * curve.sizes[-1]).argmax())
    telling = int((curve.errors >= TELLING * curve.errors[0]).sum()) - 1  # errors descend
    return min(half, telling)


def _shrunk(
    layer: Any, names: Family, heads: Heads, analysis: LayerAnalysis, *, config: Any, part: str,
    size: int, seen: LayerStatistics, ingredients: frozenset[str],
) -> Any:  # fmt: skip
    """Return a copy of a layer with one part shrunk."""
    made = copy.deepcopy(layer)
    sizes = replace(analysis.full, **{part: size})
    shrunk = shrink(
        read_layer(layer, names, heads), seen, heads, analysis=analysis, sizes=sizes,
        scaling=float(layer.get_submodule(names.attention).scaling), ingredients=ingredients,
    )  # fmt: skip
    install(made, shrunk, names, config, sizes.entry(analysis.full))
    return made


class _Recalled(torch.nn.Module):
    """Stands for a layer, and for all before it, by giving what the layer gave."""

    def __init__(self, state: Any, layer: Any) -> None:
        super().__init__()
        self.state = state
        self.attention_type = getattr(layer, "attention_type", None)  # some models ask for it

    def forward(self, *_: Any, **__: Any) -> Any:
        """Return the remembered output."""
        return self.state


def _states(model: Any, live: Any, ids: Tensor) -> tuple[list[Any], Tensor]:
    """Return what each layer gives on token ids, and the predictions."""
    states: list[Any] = []
    hooks = [
        layer.register_forward_hook(lambda _, __, output: states.append(output)) for layer in live
    ]
    usual = _predictions(model, ids)
    for hook in hooks:
        hook.remove()
    return states, usual


def _predictions(model: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float().log_softmax(-1)


def _divergence(usual: Tensor, other: Tensor) -> float:
    """Return the mean KL divergence per token, nats."""
    return float((usual.exp() * (usual - other)).sum(-1).mean())
