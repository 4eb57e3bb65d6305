"""Weights with LoRAs added, as a source: the sum is made while tensors stream, one at a time. Leaves out: side weights,
which leave the base alone (``nn/lora.py``)."""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor

from ditkit.checkpoints.files.text import some
from ditkit.checkpoints.lora.deltas import wide
from ditkit.checkpoints.lora.read import Adapter
from ditkit.checkpoints.views.source import Facts, Inspect, Stored, TensorSource, View
from ditkit.errors import LoadError


class Merged(View):
    """``source``, under the transformer's native names, with ``adapters`` added at their strengths.

    Tensors that change are float32 (float64 if they were): the one rounding is that to the dtype that they are
    loaded as. An adapter of strength 0 is none. All DoRAs measure the plain weight, so the order does not matter.
    Raises LoadError for an adapter that changes a tensor which is not there."""

    def __init__(self, source: TensorSource, adapters: Sequence[tuple[Adapter, float]]):
        super().__init__(source)
        self.adapters = tuple((adapter, strength) for adapter, strength in adapters if strength)
        changed = {name for adapter, _ in self.adapters for name in adapter.deltas}
        if lost := changed - source.tensors.keys():
            asked = f"merging {len(self.adapters)} LoRAs into {source.path}"
            found = f"{len(lost)} tensors that they change are not there ({some(lost)})"
            raise LoadError(asked, found, "Use LoRAs and weights of one model")
        tensors = dict(source.tensors)
        for name in changed:
            tensors[name] = Facts("F64" if tensors[name].dtype == "F64" else "F32", tensors[name].shape)
        self.tensors = MappingProxyType(tensors)

    def same(self, name: str) -> str | None:
        return None if self._changes(name) else name

    def made(self, name: str, dtype: torch.dtype | None, look: Inspect) -> Tensor:
        tensor = self.source[name]
        plain = tensor.to(wide(tensor.dtype))
        total = plain.clone()
        for adapter, strength in self._changes(name):
            total.add_(adapter.added(name, plain), alpha=strength)
        total = total.to(dtype)
        look(total.reshape(-1))
        return total

    def stored(self, name: str) -> Stored:
        if self._changes(name):
            raise self.not_stored(name, "a LoRA is merged into it (lora_mode=side puts it beside the weights)")
        return super().stored(name)

    def _changes(self, name: str) -> list[tuple[Adapter, float]]:
        return [(adapter, strength) for adapter, strength in self.adapters if name in adapter.deltas]

    @property
    def sha256(self) -> dict[str, str]:
        """Of the weights and of the LoRAs."""
        found = dict(self.source.sha256)
        for adapter, _ in self.adapters:
            found |= adapter.source.sha256
        return found

    @cached_property
    def fingerprint(self) -> str:
        return self._identity(self.source.fingerprint, [(a.fingerprint, s) for a, s in self.adapters])

    @cached_property
    def sketch(self) -> str:
        return self._identity(self.source.sketch, [(a.sketch, s) for a, s in self.adapters])

    def _identity(self, base: str, added: list[tuple[str, float]]) -> str:
        """The base's own when nothing is added."""
        return hashlib.sha256(json.dumps([base, "merged", added]).encode()).hexdigest() if added else base
