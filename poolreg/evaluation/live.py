"""One live model that takes on the weights of any average of its family, in memory.

The averages come from the same kernel in the same order as merges on disk, so the weights are
the bytes of the materialised merge. Partial sums are kept: when mixtures are visited in the
order of their component lists (as words in a dictionary), each shared beginning is summed once
and most averages cost one tensor-wise addition. Nothing is ever subtracted, so no rounding
could be left behind.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from poolreg.errors import Incompatible
from poolreg.models.loading import load_model
from poolreg.models.stored import stored_folder, stored_tensors
from poolreg.numerics.average import FLOATS, Scratch, accumulate, finish
from poolreg.store.registry import Registry
from poolreg.tensors import NUMPY_DTYPES, read_array
from poolreg.weights.merge import check_mergeable, merge_weights
from poolreg.weights.stream import Parent

# Partial sums beyond this many bytes are made again instead of kept.
SUMS_AT_ONCE = 2 << 30

Sums = list[npt.NDArray[np.float64]]


@dataclass(frozen=True)
class _Slot:
    """A floating tensor on disk and the live tensor that it becomes."""

    name: str
    dtype: str
    live: torch.Tensor


class LiveModel:
    """A model in memory whose weights `load` sets to exact averages of `members`.

    `members` are digests of stored models of one family. `dtype` is the compute dtype: averages
    are rounded to the storage dtype first, as on disk, then converted.
    """

    def __init__(
        self, registry: Registry, members: Sequence[str], *, dtype: str, device: str | torch.device,
        trust_code: bool = False,
    ) -> None:  # fmt: skip
        self._registry = registry
        self._dtype, self._device, self._trust_code = dtype, device, trust_code
        self._tensors = {digest: stored_tensors(registry, digest) for digest in members}
        self._labels = {digest: f"model {digest[:12]}" for digest in members}
        check_mergeable([self._parent(digest, 1) for digest in members])
        with stored_folder(registry, members[0]) as folder:
            self.model = load_model(folder, dtype=dtype, device=device, trust_code=trust_code)
        self._first = members[0]
        self._slots = self._match()
        elements = sum(slot.live.numel() for slot in self._slots or [])
        self._depth = SUMS_AT_ONCE // max(8 * elements, 1)
        self._stack: list[tuple[tuple[str, int], Sums]] = []
        self._scratch = Scratch()

    def load(self, weights: Sequence[tuple[str, int]]) -> PreTrainedModel:
        """Return the model with the average of `weights`: (digest, whole number), by digest."""
        if self._slots is None:
            return self._load_from_disk(weights)
        kept = 0
        while kept < min(len(weights), len(self._stack)) and self._stack[kept][0] == weights[kept]:
            kept += 1
        del self._stack[kept:]
        while len(self._stack) < min(self._depth, len(weights)):
            self._stack.append((weights[len(self._stack)], self._next_sums(weights)))
        rest = weights[len(self._stack) :]
        total = sum(weight for _, weight in weights)
        for index, slot in enumerate(self._slots):
            if len(weights) == 1:  # a copy, as on disk: a sum would lose the sign of zeros
                raw = self._raw(weights[0][0], slot.name)
            else:
                raw = self._rounded(slot, self._sums(index, slot, rest), total)
            with torch.no_grad():
                slot.live.copy_(_as_tensor(raw, slot.dtype).view(slot.live.shape))
        return self.model

    def _parent(self, digest: str, weight: int) -> Parent:
        return Parent(weight, self._tensors[digest], self._labels[digest])

    def _raw(self, digest: str, name: str) -> npt.NDArray[Any]:
        return read_array(*self._tensors[digest][name]).reshape(-1)

    def _next_sums(self, weights: Sequence[tuple[str, int]]) -> Sums:
        depth = len(self._stack)
        added = [weights[depth]]
        assert self._slots is not None
        return [self._sums(index, slot, added, copy=True) for index, slot in enumerate(self._slots)]

    def _sums(
        self, index: int, slot: _Slot, rest: Sequence[tuple[str, int]], *, copy: bool = False
    ) -> npt.NDArray[np.float64]:
        """Return the kept partial sum of one tensor with the `rest` added."""
        if not self._stack:
            sums = np.zeros(slot.live.numel(), np.float64)
        else:
            sums = self._stack[-1][1][index]
            sums = sums.copy() if copy or rest else sums
        for digest, weight in rest:
            raw = self._raw(digest, slot.name)
            accumulate(sums, raw, slot.dtype, weight=weight, scratch=self._scratch)
        return sums

    def _rounded(self, slot: _Slot, sums: npt.NDArray[np.float64], total: int) -> npt.NDArray[Any]:
        """Return the average, rounded once to the storage dtype."""
        raw: npt.NDArray[Any] = np.empty(sums.size, NUMPY_DTYPES[slot.dtype])
        finish(sums, total, slot.dtype, out=raw, scratch=self._scratch)
        return raw

    def _match(self) -> list[_Slot] | None:
        """Pair tensors on disk with live ones, or return None if some have no equal by name.

        Some architectures rename or join tensors while loading; their averages go through a
        folder on disk instead. The pairing is proven by value on the model just loaded.
        """
        state = self.model.state_dict()
        slots = []
        for name, (_, info) in self._tensors[self._first].items():
            live = state.get(name)
            if live is None or tuple(live.shape) != info.shape:
                return None
            raw = _as_tensor(self._raw(self._first, name), info.dtype).view(info.shape)
            if not torch.equal(raw.to(live.dtype), live.cpu()):
                return None
            if info.dtype in FLOATS:
                slots.append(_Slot(name, info.dtype, live))
            else:
                self._check_equal(name)
        return slots

    def _check_equal(self, name: str) -> None:
        first = self._raw(self._first, name)
        for digest in self._tensors:
            if not np.array_equal(first, self._raw(digest, name)):
                raise Incompatible(
                    f"integer tensor {name!r} differs between {self._labels[self._first]} "
                    f"and {self._labels[digest]}",
                    hint="only models trained from one seed model can be averaged",
                )

    def _load_from_disk(self, weights: Sequence[tuple[str, int]]) -> PreTrainedModel:
        parents = [self._parent(digest, weight) for digest, weight in weights]
        with (
            stored_folder(self._registry, self._first) as folder,
            tempfile.TemporaryDirectory(dir=self._registry.root / "tmp") as staging,
        ):
            for path in folder.iterdir():
                if not path.name.endswith((".safetensors", ".safetensors.index.json")):
                    shutil.copyfile(path, Path(staging) / path.name)
            merge_weights(parents, Path(staging))
            self.model = load_model(
                Path(staging), dtype=self._dtype, device=self._device, trust_code=self._trust_code
            )
        return self.model


def _as_tensor(raw: npt.NDArray[Any], dtype: str) -> torch.Tensor:
    """Return a torch tensor with the values of a raw array (bfloat16 as bits in uint16)."""
    writable = np.array(raw)  # torch warns about read-only memory
    if dtype == "BF16":
        return torch.from_numpy(writable.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(writable)
