"""What can be loaded from: facts about all tensors at once, and their data one by one.

Files of every format are sources; so is a source seen under other names, without its prefix, or dequantised. Such views
stand on one another and read nothing until they are iterated. Leaves out: the formats (files.py, pickles.py, gguf.py)
and what names mean (keys.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor


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


class View:
    """A source seen in another way: same place, same files, same hashes. Subclasses give ``tensors`` and the data.

    ``notes`` says in plain words what was left out or chosen on the way, innermost first."""

    tensors: Mapping[str, Facts]

    def __init__(self, source: TensorSource, notes: tuple[str, ...] = ()):
        self.source = source
        self.notes: tuple[str, ...] = (*notes_of(source), *notes)

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

    def __getitem__(self, name: str) -> Tensor:
        raise NotImplementedError

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
