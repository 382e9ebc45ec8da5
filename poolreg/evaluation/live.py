"""One live model that takes on the weights of any average of its family, in memory.

The averages come from the same sums in the same order as merges on disk, so the weights are the
bytes of the materialised merge. When mixtures are visited in the order of their component lists
(as words in a dictionary), beginnings that neighbours share are summed once.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from poolreg.errors import Incompatible
from poolreg.evaluation.averages import Array, HostAverages, Slot, Weights, as_tensor
from poolreg.evaluation.materials import Materials
from poolreg.evaluation.on_device import DeviceAverages
from poolreg.models.loading import load_model
from poolreg.numerics.average import FLOATS
from poolreg.tensors import NUMPY_DTYPES, TensorInfo
from poolreg.weights.merge import check_mergeable, merge_weights
from poolreg.weights.stream import Parent


class LiveModel:
    """A model in memory whose weights `load` sets to exact averages of `members`.

    `members` are digests of stored models of one family. `dtype` is the compute dtype: averages
    are rounded to the storage dtype first, as on disk, then converted. On the CPU `threads` take
    on an average (default: as many as torch uses).
    """

    def __init__(
        self, materials: Materials, members: Sequence[str], *, dtype: str,
        device: str | torch.device, trust_code: bool = False, threads: int | None = None,
    ) -> None:  # fmt: skip
        self._materials, self._first = materials, members[0]
        self._dtype, self._device, self._trust_code = dtype, device, trust_code
        self._tensors = {digest: materials.tensors(digest) for digest in members}
        check_mergeable([self._parent(digest, 1) for digest in members])
        with materials.folder(self._first) as folder:
            self.model = load_model(folder, dtype=dtype, device=device, trust_code=trust_code)
        raws = {digest: _mapped(tensors) for digest, tensors in self._tensors.items()}
        slots = self._match(raws)
        self._averages: HostAverages | DeviceAverages | None = None
        if slots and slots[0].live.device.type == "cuda":
            self._averages = DeviceAverages(slots, raws)
        elif slots:
            threads = threads or torch.get_num_threads()
            self._averages = HostAverages(slots, raws, threads=threads)

    def load(self, weights: Weights, following: Weights = ()) -> PreTrainedModel:
        """Return the model with the average of `weights`: (digest, whole number), by digest.

        `following` is what will be asked for next: sums that it shares are kept for it.
        """
        if self._averages is None:
            return self._load_from_disk(weights)
        self._averages.load(weights, following)
        return self.model

    def _parent(self, digest: str, weight: int) -> Parent:
        return Parent(weight, self._tensors[digest], f"model {digest[:12]}")

    def _match(self, raws: Mapping[str, Mapping[str, Array]]) -> list[Slot] | None:
        """Pair tensors on disk with live ones, or return None if some have no equal by name.

        Some architectures rename or join tensors while loading; their averages go through a
        folder on disk instead. The pairing is proven by value on the model just loaded.
        """
        state = self.model.state_dict()
        slots = []
        for name, (_, info) in self._tensors[self._first].items():
            live = state.get(name)
            if live is None or tuple(live.shape) != info.shape or not live.is_contiguous():
                return None
            raw = as_tensor(np.array(raws[self._first][name]), info.dtype).view(info.shape)
            if not torch.equal(raw.to(live.dtype), live.cpu()):
                return None
            if info.dtype in FLOATS:
                slots.append(Slot(name, info.dtype, live.view(-1)))
            else:
                self._check_equal(name, raws)
        return slots

    def _check_equal(self, name: str, raws: Mapping[str, Mapping[str, Array]]) -> None:
        for digest in raws:
            if not np.array_equal(raws[self._first][name], raws[digest][name]):
                raise Incompatible(
                    f"integer tensor {name!r} differs between model {self._first[:12]} "
                    f"and model {digest[:12]}",
                    hint="only models trained from one seed model can be averaged",
                )

    def _load_from_disk(self, weights: Weights) -> PreTrainedModel:
        parents = [self._parent(digest, weight) for digest, weight in weights]
        with self._materials.folder(self._first) as folder, self._materials.scratch() as staging:
            for path in folder.iterdir():
                if not path.name.endswith((".safetensors", ".safetensors.index.json")):
                    shutil.copyfile(path, staging / path.name)
            merge_weights(parents, staging)
            self.model = load_model(
                staging, dtype=self._dtype, device=self._device, trust_code=self._trust_code
            )
        return self.model


def _mapped(tensors: Mapping[str, tuple[Path, TensorInfo]]) -> dict[str, Array]:
    """Return the tensors of a model as flat raw arrays over its mapped files."""
    paths = {path for path, _ in tensors.values()}
    files = {path: np.asarray(np.memmap(path, np.uint8, mode="r")) for path in paths}
    return {
        name: files[path][info.start : info.stop].view(NUMPY_DTYPES[info.dtype])
        for name, (path, info) in tensors.items()
    }
