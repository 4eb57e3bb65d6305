"""How a LoRA changes one parameter: the arithmetic of each kind, without names and files' conventions.

A delta reads its factors when it is asked, so that nothing stays in memory. ``of(weight)`` is what is added to the
weight at strength 1: float32 (float64 for a float64 weight), on its device, in its shape. Legend: r rank, o outputs, i
inputs times the size of a convolution's kernel.
Sources: LoRA arXiv:2106.09685; LoHa and LoKr arXiv:2309.14859 and LyCORIS ``functional/``; DoRA arXiv:2402.09353.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Read = Callable[[str], Tensor]


class Delta(Protocol):
    def of(self, weight: Tensor) -> Tensor: ...


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 where that was there."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _like(tensor: Tensor, weight: Tensor) -> Tensor:
    return tensor.to(weight.device, wide(weight.dtype))


@dataclass(frozen=True)
class LowRank:
    """``scale * up @ down``; down [r, i], up [o, r]. Those of a convolution are flattened."""

    read: Read
    down: str
    up: str
    scale: float

    def factors(self) -> tuple[Tensor, Tensor]:
        """down [r, i] and up [o, r] as they are stored, unscaled."""
        return self.read(self.down).flatten(1), self.read(self.up).flatten(1)

    def of(self, weight: Tensor) -> Tensor:
        down, up = (_like(factor, weight) for factor in self.factors())
        return (up @ down).view(weight.shape) * self.scale


@dataclass(frozen=True)
class Full:
    """A difference that is written out."""

    read: Read
    name: str
    scale: float = 1.0

    def of(self, weight: Tensor) -> Tensor:
        return _like(self.read(self.name), weight).view(weight.shape) * self.scale


@dataclass(frozen=True)
class Product:
    """A matrix that is stored whole, ``(name,)``; as ``a @ b``, ``(a, b)``; or with a Tucker core, ``(a, b, core)``:
    then a is [r, o], b [r, i] and the core [r, r, kernel...]."""

    read: Read
    names: tuple[str, ...]

    def of(self, weight: Tensor) -> Tensor:
        a, *rest = (_like(self.read(name), weight) for name in self.names)
        if not rest:
            return a
        if len(rest) == 1:
            return a @ rest[0].flatten(1)
        return torch.einsum("xy...,xo,yi->oi...", rest[1], a, rest[0])


@dataclass(frozen=True)
class Hadamard:
    """LoHa: the elementwise product of two."""

    first: Product
    second: Product
    scale: float

    def of(self, weight: Tensor) -> Tensor:
        return (self.first.of(weight) * self.second.of(weight)).view(weight.shape) * self.scale


@dataclass(frozen=True)
class Kronecker:
    """LoKr: the Kronecker product of two; the second has the axes of a convolution's kernel, if there are any."""

    first: Product
    second: Product
    scale: float

    def of(self, weight: Tensor) -> Tensor:
        first, second = self.first.of(weight), self.second.of(weight)
        first = first.view(*first.shape, *[1] * (second.ndim - first.ndim))
        return torch.kron(first, second.contiguous()).view(weight.shape) * self.scale


@dataclass(frozen=True)
class Decomposed:
    """DoRA: ``magnitude * (W + dW) / |W + dW|``, less W. The norm is one for each output, or one for each input.

    The change depends on the weight that it meets, so it is taken from the plain weight, also among other LoRAs."""

    inner: Delta
    read: Read
    magnitude: str
    for_outputs: bool

    def of(self, weight: Tensor) -> Tensor:
        plain = weight.to(wide(weight.dtype))
        merged = plain + self.inner.of(weight)
        kept = 0 if self.for_outputs else 1
        shape = [-1 if axis == kept else 1 for axis in range(weight.ndim)]
        norm = torch.linalg.vector_norm(merged, dim=[a for a in range(weight.ndim) if a != kept], keepdim=True)
        magnitude = _like(self.read(self.magnitude), weight).reshape(shape)
        return merged * (magnitude / norm.clamp(min=torch.finfo(norm.dtype).eps)) - plain
