"""What can be loaded from: facts about all tensors at once, and their data one by one.

Files of every format are sources; so is a source seen under other names, without its prefix, or dequantised. Such views
stand on one another and read nothing until they are iterated. A tensor can be had as numbers, or in the form in which
it is stored. Leaves out: the formats (``files/``) and what names mean (key_table.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ditkit.errors import LoadError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Inspect = Callable[["Tensor"], None]
"""Called with each part of a new tensor, flat, just after it was made: it is in the processor's cache then."""

PLAIN = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16")
"""Types whose tensors are numbers as they stand; fewer bits may need a scale."""


def no_inspection(part: Tensor) -> None:
    """The look of somebody who does not want to see anything."""


@dataclass(frozen=True)
class Facts:
    """Of one tensor: ``dtype`` as safetensors spells it (``BF16``), or a GGUF type such as ``Q4_K``; its shape."""

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


class TensorSource:
    """``tensors`` is complete when the source is opened. Iterating gives each tensor once, in memory of its own that
    the caller may keep; a tensor that is not wanted any more can be dropped before the next one is read.

    A subclass gives ``tensors``, and ``__getitem__`` or ``cast``. ``metadata``: the file's own notes (safetensors
    ``__metadata__``, GGUF fields). ``notes``: in plain words what was left out or chosen on the way."""

    path: Path
    files: tuple[Path, ...] = ()
    tensors: Mapping[str, Facts]
    metadata: Mapping[str, Any] = MappingProxyType({})
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name in self.tensors:
            yield name, self[name]

    def __getitem__(self, name: str) -> Tensor:
        return self.cast(name)

    def cast(self, name: str, dtype: torch.dtype | None = None, look: Inspect = no_inspection) -> Tensor:
        """The tensor as ``dtype`` (None: as it is stored), bit-equal to ``self[name].to(dtype)``. Where a source can,
        there is no copy of it in another type."""
        tensor = self[name].to(dtype)
        look(tensor.reshape(-1))
        return tensor

    def pieces(self, name: str, unit: int, size: int) -> Iterator[Tensor]:
        """The stored bytes of a tensor in turn: uint8 [k x unit], about ``size`` bytes at a time, or all at once where
        the source can do no better. One buffer may serve them all, so use a piece before asking for the next."""
        import torch

        yield self[name].contiguous().reshape(-1).view(torch.uint8)

    def stored(self, name: str) -> Stored:
        """A tensor in the form that its file holds, on the CPU. Raises LoadError where it has none."""
        facts = self.tensors[name]
        if facts.dtype not in PLAIN:
            raise self.not_stored(name, f"it is {facts.dtype}, and nobody has told what that stands for")
        return Stored("plain", facts.shape, self[name])

    def not_stored(self, name: str, why: str) -> LoadError:
        do = "Leave it out of the swap, or take its numbers (read)"
        return LoadError(f"keeping {name} of {self.path} as it is stored", why, do)

    @property
    def sha256(self) -> dict[str, str]:
        """File name -> hex digest of its content."""
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        """One hash over the contents of all files (slow, exact)."""
        raise NotImplementedError

    @property
    def sketch(self) -> str:
        """One hash over headers, sizes and samples (milliseconds)."""
        raise NotImplementedError


class View(TensorSource):
    """A source seen in another way: same place, same files, same hashes. A subclass gives ``tensors``, tells with
    ``same`` which of them are only called differently, and makes the others. ``notes`` begin with the innermost."""

    def __init__(self, source: TensorSource, notes: tuple[str, ...] = ()):
        self.source, self.notes = source, (*source.notes, *notes)
        self.path, self.files, self.metadata = source.path, source.files, source.metadata

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.source!r})"

    def same(self, name: str) -> str | None:
        """What ``source`` calls the very same tensor; None for one that is made here."""
        raise NotImplementedError

    def made(self, name: str, dtype: torch.dtype | None, look: Inspect) -> Tensor:
        raise NotImplementedError

    def cast(self, name: str, dtype: torch.dtype | None = None, look: Inspect = no_inspection) -> Tensor:
        same = self.same(name)
        return self.made(name, dtype, look) if same is None else self.source.cast(same, dtype, look)

    def pieces(self, name: str, unit: int, size: int) -> Iterator[Tensor]:
        same = self.same(name)
        return super().pieces(name, unit, size) if same is None else self.source.pieces(same, unit, size)

    def stored(self, name: str) -> Stored:
        if (same := self.same(name)) is None:
            raise self.not_stored(name, f"{type(self).__name__} made it of other tensors")
        return self.source.stored(same)

    @property
    def sha256(self) -> dict[str, str]:
        return self.source.sha256

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    @property
    def sketch(self) -> str:
        return self.source.sketch
