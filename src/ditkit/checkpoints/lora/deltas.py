"""How a LoRA changes one parameter: the arithmetic of each kind, and which factors make which kind.

A delta reads its factors when it is asked, so that nothing stays in memory. ``of(weight)`` is what is added to the
weight at strength 1: float32 (float64 for a float64 weight), on its device, in its shape. Legend: r rank, o outputs, i
inputs times the size of a convolution's kernel. Leaves out: how files name the factors (names.py).
Sources: LoRA arXiv:2106.09685; LoHa and LoKr arXiv:2309.14859 and LyCORIS ``functional/``; DoRA arXiv:2402.09353."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

Read = Callable[[str], Tensor]
Shape = tuple[int, ...]
Names = tuple[str, ...]


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 where that was there."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _like(tensor: Tensor, weight: Tensor) -> Tensor:
    return tensor.to(weight.device, wide(weight.dtype))


@dataclass(frozen=True)
class Change:
    """``scale`` times one matrix (kinds ``full``: a difference that is written out, and ``lora``), the elementwise
    product of two (``loha``) or their Kronecker product (``lokr``).

    ``matrices``: each is stored whole, ``(name,)``; as ``a @ b``, ``(a, b)``; or with a Tucker core, ``(a, b, core)``:
    then a is [r, o], b [r, i] and the core [r, r, kernel...]. The a of a LoRA is its up [o, r], the b its down [r, i];
    those of a convolution are flattened."""

    kind: str
    read: Read
    matrices: tuple[Names, ...]
    scale: float

    def factors(self) -> tuple[Tensor, Tensor]:
        """down [r, i] and up [o, r] of a LoRA as they are stored, unscaled."""
        up, down = (self.read(name).flatten(1) for name in self.matrices[0])
        return down, up

    def of(self, weight: Tensor) -> Tensor:
        made, *others = (self._matrix(names, weight) for names in self.matrices)
        if self.kind == "loha":
            made = made * others[0]
        elif self.kind == "lokr":  # the second has the axes of a convolution's kernel, if there are any
            made = torch.kron(made.view(*made.shape, *[1] * (others[0].ndim - made.ndim)), others[0].contiguous())
        return made.view(weight.shape) * self.scale

    def _matrix(self, names: Names, weight: Tensor) -> Tensor:
        a, *rest = (_like(self.read(name), weight) for name in names)
        if not rest:
            return a
        if len(rest) == 1:
            return a.flatten(1) @ rest[0].flatten(1)
        return torch.einsum("xy...,xo,yi->oi...", rest[1], a, rest[0])


@dataclass(frozen=True)
class Decomposed:
    """DoRA: ``magnitude * (W + dW) / |W + dW|``, less W. The norm is one for each output, or one for each input.

    The change depends on the weight that it meets, so it is taken from the plain weight, also among other LoRAs."""

    inner: Change
    magnitude: str
    for_outputs: bool

    def of(self, weight: Tensor) -> Tensor:
        plain = weight.to(wide(weight.dtype))
        merged = plain + self.inner.of(weight)
        kept = 0 if self.for_outputs else 1
        shape = [-1 if axis == kept else 1 for axis in range(weight.ndim)]
        norm = torch.linalg.vector_norm(merged, dim=[a for a in range(weight.ndim) if a != kept], keepdim=True)
        magnitude = _like(self.inner.read(self.magnitude), weight).reshape(shape)
        return merged * (magnitude / norm.clamp(min=torch.finfo(norm.dtype).eps)) - plain


Delta = Change | Decomposed


class Form(NamedTuple):
    """Factors that fit each other: what they make has ``size`` (outputs, inputs times kernel). ``rank``: None when
    nothing is factored. ``matrices``: those of a ``Change``, by their roles."""

    kind: str
    size: Shape
    rank: int | None
    matrices: tuple[Names, ...]


def _two(prefix: str) -> tuple[tuple[str, str, str, str], ...]:
    return tuple((f"{prefix}_w{n}", f"{prefix}_w{n}_a", f"{prefix}_w{n}_b", f"{prefix}_t{n}") for n in (1, 2))


KINDS = {"lora": (("", "up", "down", ""),), "loha": _two("hada"), "lokr": _two("lokr")}
"""Kind -> its matrices, each by the roles of: the whole, two factors, a Tucker core."""


def form_of(shapes: Mapping[str, Shape]) -> Form | None:
    """What factors of these roles and shapes make; None where they are incomplete, hold nothing, or do not fit each
    other."""
    if not all(len(shape) > 1 and min(shape) > 0 for shape in shapes.values()):
        return None
    fitting = (kind for kind, parts in KINDS.items() if shapes.keys() <= {role for part in parts for role in part})
    kind = next(fitting, "")
    found = [form for part in KINDS.get(kind, ()) if (form := _matrix(kind, shapes, *part))]
    if not found or len(found) < len(KINDS[kind]):
        return None
    first, second = found[0], found[-1]
    matrices = tuple(form.matrices[0] for form in found)
    if kind == "lokr":
        size = (first.size[0] * second.size[0], first.size[1] * second.size[1])
        return Form(kind, size, second.rank or first.rank, matrices)
    return Form(kind, first.size, first.rank, matrices) if first.size == second.size else None


def _matrix(kind: str, shapes: Mapping[str, Shape], whole: str, a: str, b: str, core: str) -> Form | None:
    """One that is stored whole, or as two factors, with a core between them where there is one."""
    if whole in shapes:
        size = (shapes[whole][0], prod(shapes[whole][1:]))
        return None if {a, b, core} & shapes.keys() else Form(kind, size, None, ((whole,),))
    if a not in shapes or b not in shapes or min(len(shapes[a]), len(shapes[b])) < 2:
        return None
    rank, kernel = shapes[b][0], shapes.get(core)
    if kernel is None:
        size = (shapes[a][0], prod(shapes[b][1:]))
        return Form(kind, size, rank, ((a, b),)) if prod(shapes[a][1:]) == rank else None
    if len(kernel) < 2 or kernel[:2] != (shapes[a][0], rank):
        return None
    return Form(kind, (shapes[a][1], shapes[b][1] * prod(kernel[2:])), rank, ((a, b, core),))
