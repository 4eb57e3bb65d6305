"""What can be loaded from: facts about all tensors at once, and their data one by one.

Files of every format are sources; so is a source seen under other names, without its prefix, or dequantised. Such views
stand on one another and read nothing until they are iterated. A tensor can be had as numbers, or in the form in which
it is stored. Leaves out: the formats (``files/``) and what names mean (key_table.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ditkit.errors import LoadError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Inspect = Callable[["Tensor"], None]
"""Called with each part of a new tensor, flat, just after it was made: it is in the processor's cache then."""


def no_inspection(part: Tensor) -> None:
    """The look of somebody who does not want to see anything."""


class Facts(Protocol):
    """Of one tensor: ``dtype`` as safetensors spells it (``BF16``), or a GGUF type such as ``Q4_K``; its shape."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class TensorFacts:
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """One tensor in the form that its file holds, for whoever keeps it so. ``shape`` is that of the numbers W.

    | ``format`` | ``codes`` | ``scales`` | W |
    |---|---|---|---|
    | ``plain`` | the numbers, in any wide type | None | codes |
    | ``fp8`` | float8_e4m3fn or float8_e5m2, ``shape`` | None | codes |
    | ``fp8_scaled`` | the same | float32, [] or [rows, 1, ...] | float32(codes) * scales |
    | ``int8`` | int8, ``shape`` | the same | float32(codes) * scales |
    | ``gguf Q8_0``, ``gguf Q4_K``, ... | uint8 [blocks, bytes of one], row after row | None, they are in the blocks | |

    Products are float32; what ``read`` gives is their one rounding to another type."""

    format: str
    shape: tuple[int, ...]
    codes: Tensor
    scales: Tensor | None = None

    def to(self, device: torch.device | str) -> Stored:
        scales = None if self.scales is None else self.scales.to(device)
        return Stored(self.format, self.shape, self.codes.to(device), scales)


PLAIN = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16")
"""Types whose tensors are numbers as they stand; fewer bits may need a scale."""


class TensorSource(Protocol):
    """``tensors`` is complete when the source is opened. Iterating gives each tensor once, in memory of its own that
    the caller may keep; a tensor that is not wanted any more can be dropped before the next one is read."""

    @property
    def path(self) -> Path: ...
    @property
    def files(self) -> tuple[Path, ...]: ...
    @property
    def tensors(self) -> Mapping[str, Facts]: ...
    @property
    def metadata(self) -> Mapping[str, Any]:
        """The file's own notes (safetensors ``__metadata__``, GGUF fields); empty where there are none."""
        ...

    def __iter__(self) -> Iterator[tuple[str, Tensor]]: ...
    def __getitem__(self, name: str) -> Tensor: ...

    @property
    def sha256(self) -> dict[str, str]:
        """File name -> hex digest of its content."""
        ...

    @property
    def fingerprint(self) -> str:
        """One hash over the contents of all files (slow, exact)."""
        ...

    @property
    def sketch(self) -> str:
        """One hash over headers, sizes and samples (milliseconds)."""
        ...


@runtime_checkable
class Casting(Protocol):
    """A source that makes a tensor in the type that is wanted, with no copy of it in another one."""

    def cast(self, name: str, dtype: torch.dtype | None = None, look: Inspect = no_inspection) -> Tensor: ...


@runtime_checkable
class InPieces(Protocol):
    """A source that gives a tensor's stored bytes in turn: uint8 [k x unit], about ``size`` bytes at a time. One buffer
    serves them all, so a piece is used before the next one is asked for."""

    def pieces(self, name: str, unit: int, size: int) -> Iterator[Tensor]: ...


@runtime_checkable
class Storing(Protocol):
    """A source that knows what it makes numbers of."""

    def stored(self, name: str) -> Stored: ...


def cast(source: TensorSource, name: str, dtype: torch.dtype | None = None, look: Inspect = no_inspection) -> Tensor:
    """``source[name]`` as ``dtype`` (None: as it is stored), bit-equal to ``source[name].to(dtype)``."""
    if isinstance(source, Casting):
        return source.cast(name, dtype, look)
    tensor = source[name].to(dtype)
    look(tensor.reshape(-1))
    return tensor


def pieces(source: TensorSource, name: str, unit: int, size: int) -> Iterator[Tensor]:
    """The stored bytes of a tensor as ``InPieces`` has them, or in one piece where the source can do no better."""
    import torch

    if isinstance(source, InPieces):
        yield from source.pieces(name, unit, size)
    else:
        yield source[name].contiguous().reshape(-1).view(torch.uint8)


def stored(source: TensorSource, name: str) -> Stored:
    """A tensor in the form that its file holds, on the CPU. Raises LoadError where it has none."""
    if isinstance(source, Storing):
        return source.stored(name)
    facts = source.tensors[name]
    if facts.dtype not in PLAIN:
        raise not_stored(source, name, f"it is {facts.dtype}, and nobody has told what that stands for")
    return Stored("plain", tuple(facts.shape), source[name])


def not_stored(source: TensorSource, name: str, why: str) -> LoadError:
    return LoadError(
        f"keeping {name} of {source.path} as it is stored", why, "Leave it out of the swap, or take its numbers (read)"
    )


class View:
    """A source seen in another way: same place, same files, same hashes. A subclass gives ``tensors``, tells with
    ``same`` which of them are only called differently, and makes the others.

    ``notes`` says in plain words what was left out or chosen on the way, innermost first."""

    tensors: Mapping[str, Facts]

    def __init__(self, source: TensorSource, notes: tuple[str, ...] = ()):
        self.source = source
        self.notes: tuple[str, ...] = (*notes_of(source), *notes)

    def same(self, name: str) -> str | None:
        """What ``source`` calls the very same tensor; None for one that is made here."""
        raise NotImplementedError

    def made(self, name: str, dtype: torch.dtype | None, look: Inspect) -> Tensor:
        raise NotImplementedError

    def __getitem__(self, name: str) -> Tensor:
        return self.cast(name)

    def cast(self, name: str, dtype: torch.dtype | None = None, look: Inspect = no_inspection) -> Tensor:
        same = self.same(name)
        return self.made(name, dtype, look) if same is None else cast(self.source, same, dtype, look)

    def pieces(self, name: str, unit: int, size: int) -> Iterator[Tensor]:
        import torch

        if (same := self.same(name)) is None:
            yield self[name].contiguous().reshape(-1).view(torch.uint8)
        else:
            yield from pieces(self.source, same, unit, size)

    def stored(self, name: str) -> Stored:
        if (same := self.same(name)) is None:
            raise not_stored(self, name, f"{type(self).__name__} made it of other tensors")
        return stored(self.source, same)

    @property
    def path(self) -> Path:
        return self.source.path

    @property
    def files(self) -> tuple[Path, ...]:
        return self.source.files

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self.source.metadata

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.tensors:
            yield name, self[name]

    @property
    def sha256(self) -> dict[str, str]:
        return self.source.sha256

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    @property
    def sketch(self) -> str:
        return self.source.sketch


@runtime_checkable
class Noted(Protocol):
    notes: tuple[str, ...]


def notes_of(source: TensorSource) -> tuple[str, ...]:
    """What ``source`` has to say about itself; nothing when it keeps no notes."""
    return source.notes if isinstance(source, Noted) else ()
