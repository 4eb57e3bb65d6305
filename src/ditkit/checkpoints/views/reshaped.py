"""A source of which some tensors have another shape with the same numbers in the same order, such as a patch embedding
that is stored as the matrix of a linear layer. Leaves out: which tensors those are (the rows of the kinds)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from ditkit.checkpoints.views.source import Facts, Inspect, Stored, TensorSource, View

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Reshaped(View):
    """``source`` with the tensors in ``shapes`` in the shapes given there, of as many numbers."""

    def __init__(self, source: TensorSource, shapes: Mapping[str, tuple[int, ...]]):
        told = (f"{name} {list(source.tensors[name].shape)} was taken as {list(to)}" for name, to in shapes.items())
        super().__init__(source, tuple(told))
        self._shapes = dict(shapes)
        facts = {name: Facts(source.tensors[name].dtype, shape) for name, shape in shapes.items()}
        self.tensors = MappingProxyType({**source.tensors, **facts})

    def same(self, name: str) -> str | None:
        return None if name in self._shapes else name

    def made(self, name: str, dtype: torch.dtype | None, look: Inspect) -> Tensor:
        return self.source.cast(name, dtype, look).reshape(self._shapes[name])

    def stored(self, name: str) -> Stored:
        found = self.source.stored(name)
        if name not in self._shapes:
            return found
        shape, blocks = self._shapes[name], found.format.startswith("gguf")
        scales = found.scales
        if scales is not None and scales.ndim:
            scales = scales.reshape(-1, *[1] * (len(shape) - 1))
        return Stored(found.format, shape, found.codes if blocks else found.codes.reshape(shape), scales)
