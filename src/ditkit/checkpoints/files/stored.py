"""Tensors in files, of any format: where each lies, and its bytes, read when they are asked for.

Data is read with ordinary file reads into memory of its own: nothing is mapped, so a file that changes later cannot
change (or crash) a running model, and no second copy stands around. Leaves out: what the headers of each format say
(safetensors.py, pickles.py, gguf.py), quantisation and prefixes (``views/``)."""

import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BufferedReader
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ditkit.checkpoints.files.text import readable
from ditkit.checkpoints.views.source import Facts, Inspect, TensorSource, no_inspection
from ditkit.errors import LoadError
from ditkit.reading import open_ordinary
from ditkit.state import CODES
from ditkit.store.hashes import HASHES

DTYPES: Mapping[str, torch.dtype] = MappingProxyType({code: getattr(torch, name) for name, code in CODES.items()})
"""Types as safetensors spells them -> those of torch."""
SIZES = MappingProxyType({code: dtype.itemsize for code, dtype in DTYPES.items()})
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # without scales, other codes stand for no numbers
PAGED = 2**20  # bytes; smaller tensors come from the ordinary heap
PIECE = 2**19  # bytes that are read at once, few enough to stay in a processor's cache


@dataclass(frozen=True)
class TensorInfo(Facts):
    """Where a tensor lies; ``start`` and ``size`` in bytes. ``stride``, in elements, is that of one which is not
    contiguous; then ``start`` and ``size`` span all its elements."""

    file: Path
    start: int
    size: int
    stride: tuple[int, ...] | None = None


class StoredTensors(TensorSource):
    """Tensors in files, of any format: ``tensors`` says where each lies, and data is read when it is asked for."""

    tensors: Mapping[str, TensorInfo]
    part = ""  # of the files, where they hold other weights too

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, Any]):
        if not tensors:
            raise LoadError(f"opening {path}", "it holds no tensors", "Download the file again")
        by_place = sorted(tensors.items(), key=lambda item: (item[1].file, item[1].start))
        self.tensors, self.metadata = MappingProxyType(dict(by_place)), MappingProxyType(dict(metadata))
        self.path = path
        self.files = tuple(dict.fromkeys(info.file for info in self.tensors.values()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}: {len(self.tensors)} tensors in {len(self.files)} files)"

    def cast(self, name: str, dtype: torch.dtype | None = None, look: Inspect = no_inspection) -> Tensor:
        """Where ``dtype`` is not the stored one, the tensor is never whole in memory as it is stored."""
        info = self.tensors[name]
        stored = DTYPES.get(info.dtype, torch.uint8)
        if dtype in (None, stored):
            return read(name, info, look)
        parts = self.pieces(name, stored.itemsize, PIECE)
        return converted(parts, info.shape, dtype, lambda part, begin: part.view(stored), look)

    def pieces(self, name: str, unit: int, size: int) -> Iterator[Tensor]:
        info, size = self.tensors[name], max(1, size // unit) * unit
        if info.stride is not None:
            yield from super().pieces(name, unit, size)
            return
        buffer = torch.empty(min(size, info.size), dtype=torch.uint8)
        raw = bytes_of(buffer)
        with readable(f"reading {name} from {info.file}"), open_ordinary(info.file) as stream:
            stream.seek(info.start)
            for begin in range(0, info.size, size):
                count = min(size, info.size - begin)
                _fill(stream, raw[:count], name, info)
                yield buffer[:count]

    @property
    def sha256(self) -> dict[str, str]:
        """Counted when asked for and remembered while the files stay as they are."""
        return {file.name: hash_of(file) for file in self.files}

    @cached_property
    def fingerprint(self) -> str:
        """One hash over the contents of all files; their names do not matter."""
        return hashlib.sha256("".join([*sorted(self.sha256.values()), self.part]).encode()).hexdigest()

    @cached_property
    def sketch(self) -> str:
        """A hash that tells sets of weights apart in milliseconds: all headers, all sizes, and samples of the data.

        A change that lies between the samples is not seen; ``fingerprint`` sees all of them. Places do not matter."""
        names = [(name, info.dtype, info.shape, info.start, info.size) for name, info in self.tensors.items()]
        samples = [file_sample(file) for file in self.files]
        return hashlib.sha256(json.dumps([names, samples]).encode()).hexdigest()


def read(name: str, info: TensorInfo, look: Inspect = no_inspection) -> Tensor:
    """One tensor, contiguous, in memory of its own; of a type that torch does not have its bytes, uint8 [n]. Raises
    LoadError when the file ends before."""
    if info.stride is not None:
        flat = read(name, TensorInfo(info.dtype, (info.size // SIZES[info.dtype],), info.file, info.start, info.size))
        tensor = flat.as_strided(info.shape, info.stride).clone(memory_format=torch.contiguous_format)
        look(tensor.reshape(-1))
        return tensor
    known = DTYPES.get(info.dtype)
    tensor = new(info.shape, known) if known else new((info.size,), torch.uint8)
    flat = tensor.reshape(-1)
    raw, items = bytes_of(flat), PIECE // flat.itemsize
    with readable(f"reading {name} from {info.file}"), open_ordinary(info.file) as stream:
        stream.seek(info.start)
        for begin in range(0, flat.numel(), items):
            part = flat[begin : begin + items]
            start = begin * flat.itemsize
            _fill(stream, raw[start : start + part.nbytes], name, info)
            look(part)
    return tensor


def converted(
    parts: Iterable[Tensor], shape: Sequence[int], dtype: torch.dtype, numbers: Callable[..., Tensor], look: Inspect
) -> Tensor:
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


def new(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor without data. A large one has pages of its own: freed, they go back at once. malloc keeps holes of up to
    32 MB, and with them a load with a cast peaked at two copies.

    The pages are private, because shared ones take a third more time, and a forked process would write into the weights
    of its parent. They are made at once, which takes a quarter less time than one after the other, when each is first
    written to; all of them will be."""
    size = math.prod(shape) * dtype.itemsize
    if size <= PAGED:
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, size, **OWN), dtype=dtype).reshape(tuple(shape))


FLAGS = ("MAP_PRIVATE", "MAP_ANONYMOUS", "MAP_POPULATE")  # Windows has none of them, macOS not the last
OWN: Mapping[str, int] = MappingProxyType(
    {"flags": sum(getattr(mmap, flag, 0) for flag in FLAGS)} if hasattr(mmap, "MAP_PRIVATE") else {}
)


def bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data  # as bytes, because numpy has no bfloat16


def _fill(stream: BufferedReader, view: memoryview, name: str, info: TensorInfo) -> None:
    if stream.readinto(view) < len(view):
        raise LoadError(f"reading {name} from {info.file}", "the file became shorter", "Download the file again")


def hash_of(file: Path) -> str:
    """sha256 of a file, remembered while it stays as it is. Raises LoadError."""
    with readable(f"hashing {file}"):
        return HASHES.of(file)


def file_sample(file: Path, count: int = 17, length: int = 2**14) -> str:
    """sha256 of a file's size and of ``count`` even samples of ``length`` bytes, the first and the last among them."""
    with readable(f"reading {file}"), open_ordinary(file) as stream:
        size = stream.seek(0, os.SEEK_END)
        digest = hashlib.sha256(str(size).encode())
        for n in range(count):
            stream.seek(max(0, size - length) * n // (count - 1))
            digest.update(stream.read(length))
    return digest.hexdigest()
