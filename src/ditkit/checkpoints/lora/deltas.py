"""How a LoRA changes one parameter: the arithmetic of each kind, and which factors make which kind.

A delta reads its factors when it is asked, so that nothing stays in memory. ``of(weight)`` is what is added to the
weight at strength 1: float32 (float64 for a float64 weight), on its device, in its shape. Legend: r rank, o outputs, i
inputs times the size of a convolution's kernel. Leaves out: how files name the factors (names.py).
Sources: LoRA arXiv:2106.09685; LoHa and LoKr arXiv:2309.14859 and LyCORIS ``functional/``; DoRA arXiv:2402.09353.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Read = Callable[[str], Tensor]
Shape = tuple[int, ...]


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


class Form(NamedTuple):
    """Factors that fit each other: what they make has ``size`` (outputs, inputs times kernel). ``rank``: None when
    nothing is factored. ``delta``: (read, role -> key, scale) -> the delta."""

    kind: str
    size: Shape
    rank: int | None
    delta: Callable[[Read, Mapping[str, str], float], Delta]


def _two(prefix: str) -> tuple[tuple[str, str, str, str], ...]:
    return tuple((f"{prefix}_w{n}", f"{prefix}_w{n}_a", f"{prefix}_w{n}_b", f"{prefix}_t{n}") for n in (1, 2))


KINDS = {"lora": (("", "up", "down", ""),), "loha": _two("hada"), "lokr": _two("lokr")}
"""Kind -> its matrices, each by the roles of: the whole, two factors, a Tucker core."""


def form_of(shapes: Mapping[str, Shape]) -> Form | None:
    """What factors of these roles and shapes make; None where they are incomplete or do not fit each other."""
    for kind, parts in KINDS.items():
        if shapes.keys() <= {role for part in parts for role in part}:
            found = [matrix for part in parts if (matrix := _matrix(shapes, *part))]
            return _form(kind, found) if len(found) == len(parts) else None
    return None


Matrix = tuple[tuple[str, ...], Shape, int | None]
"""The roles that are there, outputs and inputs, rank."""


def _form(kind: str, matrices: list[Matrix]) -> Form | None:
    (_, size, rank), (_, other, other_rank) = matrices[0], matrices[-1]
    if kind == "lokr":
        size, rank = (size[0] * other[0], size[1] * other[1]), other_rank or rank
    elif size != other:
        return None

    def delta(read: Read, keys: Mapping[str, str], scale: float) -> Delta:
        if kind == "lora":
            return LowRank(read, keys["down"], keys["up"], scale)
        first, second = (Product(read, tuple(keys[role] for role in roles)) for roles, _, _ in matrices)
        return (Hadamard if kind == "loha" else Kronecker)(first, second, scale)

    return Form(kind, size, rank, delta)


def _matrix(shapes: Mapping[str, Shape], whole: str, a: str, b: str, core: str) -> Matrix | None:
    """One that is stored whole, or as two factors, with a core between them where there is one."""
    if whole in shapes:
        shape = shapes[whole]
        return ((whole,), (shape[0], prod(shape[1:])), None) if not {a, b, core} & shapes.keys() else None
    if a not in shapes or b not in shapes or min(len(shapes[a]), len(shapes[b])) < 2:
        return None
    rank = shapes[b][0]
    if core not in shapes:
        return ((a, b), (shapes[a][0], prod(shapes[b][1:])), rank) if prod(shapes[a][1:]) == rank else None
    kernel = shapes[core]
    if len(kernel) < 2 or kernel[:2] != (shapes[a][0], rank):
        return None
    return (a, b, core), (shapes[a][1], shapes[b][1] * prod(kernel[2:])), rank
