"""Tensors in files, of any format: where each lies, and its bytes, read when they are asked for.

Data is read with ordinary file reads into memory of its own: nothing is mapped, so a file that changes later cannot
change (or crash) a running model, and no second copy stands around. Leaves out: what the headers of each format say
(safetensors.py, pickles.py, gguf.py), quantisation and prefixes (``views/``).
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any

from ditkit.checkpoints.views.source import Inspect, no_inspection
from ditkit.errors import LoadError
from ditkit.store.hashes import HASHES

if TYPE_CHECKING:
    import torch

DTYPES = MappingProxyType({
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "C64": "complex64", "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
})  # fmt: skip
"""Types as safetensors spells them -> as torch spells them."""

SIZES = MappingProxyType({"F64": 8, "C64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2,
                          "I16": 2, "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1, "I8": 1, "U8": 1})  # fmt: skip
PAGED = 2**20  # bytes; smaller tensors come from the ordinary heap
PIECE = 2**19  # bytes that are read at once, few enough to stay in a processor's cache


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: ``dtype`` as safetensors names it (``BF16``), ``start`` and ``size`` in bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


class StoredTensors:
    """Tensors in files, of any format: ``tensors`` says where each lies, and data is read when it is asked for."""

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, Any]):
        if not tensors:
            raise LoadError(f"opening {path}", "it holds no tensors", "Download the file again")
        self.path = path
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(dict(tensors))
        self.metadata: Mapping[str, Any] = MappingProxyType(dict(metadata))
        self.files = tuple(dict.fromkeys(info.file for info in self.tensors.values()))
        self.notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}: {len(self.tensors)} tensors in {len(self.files)} files)"

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) one by one, each read once, in memory of its own."""
        for file in self.files:
            with file.open("rb", buffering=0) as stream:
                for name, info in self.tensors.items():
                    if info.file == file:
                        yield name, self._read(stream, name, info)

    def __getitem__(self, name: str) -> torch.Tensor:
        info = self.tensors[name]
        with info.file.open("rb", buffering=0) as stream:
            return self._read(stream, name, info)

    def _read(self, stream: IO[bytes], name: str, info: TensorInfo, look: Inspect = no_inspection) -> torch.Tensor:
        return read(stream, name, info, look)

    def cast(self, name: str, dtype: torch.dtype | None = None, look: Inspect = no_inspection) -> torch.Tensor:
        """The tensor as ``dtype``; where that is not the stored one, it is never whole in memory as it is stored."""
        import torch

        info = self.tensors[name]
        stored = getattr(torch, DTYPES.get(info.dtype, "uint8"))
        if dtype is None or dtype == stored:
            with info.file.open("rb", buffering=0) as stream:
                return self._read(stream, name, info, look)
        parts = self.pieces(name, stored.itemsize, PIECE)
        return converted(parts, info.shape, dtype, lambda part, begin: part.view(stored), look)

    def pieces(self, name: str, unit: int, size: int) -> Iterator[torch.Tensor]:
        info = self.tensors[name]
        with info.file.open("rb", buffering=0) as stream:
            yield from read_pieces(stream, name, info, max(1, size // unit) * unit)

    @property
    def sha256(self) -> dict[str, str]:
        """File name -> hex digest of its content, counted when asked for and remembered while the file stays as is."""
        return {file.name: file_hash(file) for file in self.files}

    @cached_property
    def fingerprint(self) -> str:
        """One hash over the contents of all files; their names do not matter."""
        return hashlib.sha256("".join(sorted(self.sha256.values())).encode()).hexdigest()

    @cached_property
    def sketch(self) -> str:
        """A hash that tells sets of weights apart in milliseconds: all headers, all sizes, and samples of the data.

        A change that lies between the samples is not seen; ``fingerprint`` sees all of them. Places do not matter."""
        names = [(name, info.dtype, info.shape, info.start, info.size) for name, info in self.tensors.items()]
        about = [names, [file_sample(file) for file in self.files]]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def read(stream: IO[bytes], name: str, info: TensorInfo, look: Inspect = no_inspection) -> torch.Tensor:
    """The bytes of one tensor, contiguous, in memory of its own. Raises LoadError when the file ends before."""
    import torch

    tensor = new(info.shape, getattr(torch, DTYPES[info.dtype]))
    flat = tensor.reshape(-1)
    raw, items = bytes_of(flat), PIECE // flat.itemsize
    stream.seek(info.start)
    for begin in range(0, flat.numel(), items):
        part = flat[begin : begin + items]
        start = begin * flat.itemsize
        _fill(stream, raw[start : start + part.nbytes], name, info)
        look(part)
    return tensor


def read_pieces(stream: IO[bytes], name: str, info: TensorInfo, size: int) -> Iterator[torch.Tensor]:
    """The bytes of one tensor in turn, uint8 [size] and the rest; the memory is used again for each."""
    import torch

    buffer = torch.empty(min(size, info.size), dtype=torch.uint8)
    raw = bytes_of(buffer)
    stream.seek(info.start)
    for begin in range(0, info.size, size):
        count = min(size, info.size - begin)
        _fill(stream, raw[:count], name, info)
        yield buffer[:count]


def converted(
    parts: Iterable[torch.Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    numbers: Callable[[torch.Tensor, int], torch.Tensor],
    look: Inspect = no_inspection,
) -> torch.Tensor:
    """A new tensor made of stored bytes, piece by piece. ``numbers``: (bytes, how many numbers came before) -> the
    numbers in them, of any type; they are rounded to ``dtype`` here, once."""
    tensor = new(shape, dtype)
    flat, begin = tensor.reshape(-1), 0
    for part in parts:
        made = numbers(part, begin)
        piece = flat[begin : begin + made.numel()]
        piece.copy_(made.reshape(-1))
        look(piece)
        begin += made.numel()
    return tensor


def new(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor without data. A large one has pages of its own: freed, they go back at once. malloc keeps holes of up to
    32 MB, and with them a load with a cast peaked at two copies.

    The pages are private, because shared ones take a third more time, and a forked process would write into the weights
    of its parent. They are made at once, which takes a quarter less time than one after the other, when each is first
    written to; all of them will be."""
    import torch

    size = math.prod(shape) * dtype.itemsize
    if size <= PAGED:
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, size, **OWN), dtype=dtype).reshape(tuple(shape))


FLAGS = ("MAP_PRIVATE", "MAP_ANONYMOUS", "MAP_POPULATE")  # Windows has none of them, macOS not the last
OWN: Mapping[str, int] = MappingProxyType(
    {"flags": sum(getattr(mmap, flag, 0) for flag in FLAGS)} if hasattr(mmap, "MAP_PRIVATE") else {}
)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    import torch

    data: Any = tensor.reshape(-1).view(torch.uint8).numpy()  # as bytes, because numpy has no bfloat16
    return memoryview(data)


def _fill(stream: IO[bytes], view: memoryview, name: str, info: TensorInfo) -> None:
    filled = 0
    while filled < len(view):
        count = stream.readinto(view[filled:])  # type: ignore[attr-defined]
        if not count:
            raise LoadError(f"reading {name} from {info.file}", "the file became shorter", "Download the file again")
        filled += count


def file_sample(file: Path, count: int = 17, length: int = 2**14) -> str:
    """sha256 of a file's size and of ``count`` even samples of ``length`` bytes, the first and the last among them."""
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            digest = hashlib.sha256(str(size).encode())
            for n in range(count):
                stream.seek(max(0, size - length) * n // (count - 1))
                digest.update(stream.read(length))
    except OSError as e:
        raise LoadError(f"reading {file}", f"it cannot be read ({e.strerror})", "Check the path") from None
    return digest.hexdigest()


def file_hash(file: Path) -> str:
    """sha256 of a file, remembered while the file stays as it is (``store/hashes.py``)."""
    return HASHES.of(file)
