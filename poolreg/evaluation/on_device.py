"""Averages of models in the memory of a GPU, straight into the tensors of a live model.

The same sums in the same order as `poolreg.numerics.average`, in plain torch operations: float64
products and sums, one division, one rounding to the dtype on disk. The bytes are those of a merge
on disk, on any device that computes as IEEE 754 says. The models stay on the device where they
fit; else they are streamed to it, part by part, for each average.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from poolreg.evaluation.averages import TORCH_DTYPES, Array, Slot, Weights, as_tensor, placed
from poolreg.numerics.average import OVERFLOW, finish
from poolreg.tensors import NUMPY_DTYPES

# Elements at a time: enough for a GPU, and its float64 sums take little of the device's memory.
PART = 1 << 24
# Of the device's free memory, what models may take; the rest is for the forward pass.
SHARE = 0.6

# How many low bits of a float64 are rounded to odd on its way through float32 to a narrow dtype:
# what stays is two bits or more than the dtype has, and passes through float32 exactly.
_LOW_BITS = {"BF16": 42, "F16": 29}


class DeviceAverages:
    """Writes averages into live tensors on one device.

    `raws` are the tensors of each model by digest and name, flat, as raw values in host memory.
    """

    def __init__(
        self, slots: Sequence[Slot], raws: Mapping[str, Mapping[str, Array]], *,
        resident: bool | None = None,
    ) -> None:  # fmt: skip
        self._slots, self._raws = slots, raws
        self._device = slots[0].live.device
        size = sum(raws[m][slot.name].nbytes for m in raws for slot in slots)
        resident = size <= _free(self._device) * SHARE if resident is None else resident
        self._there: dict[tuple[str, str], torch.Tensor] = {}
        if resident:
            for model in raws:
                for slot in slots:
                    whole = self._sent(model, slot, 0, slot.live.numel())
                    self._there[model, slot.name] = whole

    def load(self, weights: Weights, following: Weights = ()) -> None:  # noqa: ARG002
        """Take on the average of `weights`; raises `Refused` as `HostAverages` does."""
        total = sum(weight for _, weight in weights)
        for slot in self._slots:
            size = slot.live.numel()
            for start in range(0, size, PART):
                stop = min(start + PART, size)
                parts = (self._part(model, slot, start, stop) for model, _ in weights)
                if len(weights) == 1:  # a copy, as on disk: a sum would lose the sign of zeros
                    average = next(parts)
                else:
                    sums = weighted_sum(parts, [weight for _, weight in weights])
                    with placed(slot, start):
                        average = rounded(sums.div_(float(total)), slot.dtype)
                slot.live[start:stop].copy_(average)

    def _part(self, model: str, slot: Slot, start: int, stop: int) -> torch.Tensor:
        if (model, slot.name) in self._there:
            return self._there[model, slot.name][start:stop]
        return self._sent(model, slot, start, stop)

    def _sent(self, model: str, slot: Slot, start: int, stop: int) -> torch.Tensor:
        raw = np.array(self._raws[model][slot.name][start:stop])  # mapped memory is read-only
        return as_tensor(raw, slot.dtype).to(self._device)


def weighted_sum(parts: Iterable[torch.Tensor], weights: Sequence[int]) -> torch.Tensor:
    """Return the float64 sum of `weights` times `parts`, flat tensors, in their order."""
    sums: torch.Tensor | None = None
    for part, weight in zip(parts, weights, strict=True):
        if sums is None:
            sums = torch.zeros(part.shape, dtype=torch.float64, device=part.device)
        # Two operations: one that fuses them would round once less.
        sums.add_(part if weight == 1 else part.to(torch.float64) * float(weight))
    assert sums is not None
    return sums


def rounded(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """Round float64 values once to `dtype`, to nearest, ties to even.

    Raises `Refused`, with the element's `index`, if one is not finite in `dtype`.
    """
    if not bool((values.abs() < OVERFLOW[dtype]).all()):
        out = np.empty(values.numel(), NUMPY_DTYPES[dtype])
        finish(values.cpu().numpy(), 1, dtype, out=out)  # which says what is wrong
    if dtype in _LOW_BITS:
        low = (1 << _LOW_BITS[dtype]) - 1
        bits = values.view(torch.int64)
        odd = (bits & low).add_(low).bitwise_or_(bits).bitwise_and_(~low)
        values = odd.view(torch.float64).to(torch.float32)
    return values.to(TORCH_DTYPES[dtype])


def _free(device: torch.device) -> int:
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 0
