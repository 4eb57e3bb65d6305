"""GGUF files (``city96`` style for Wan, ``t5``/``t5encoder`` for UMT5): what they hold, and their blocks as numbers.

Tensors of a quantised type are given as the bytes that are stored; ``numbers_of`` turns them into numbers with the
``gguf`` library (``pip install "ditkit[gguf]"``), and the view ``Dequantized`` does so while streaming. The header is
read here, because the library's reader maps the file and takes seconds and hundreds of MB for a vocabulary of 256 000
words. Shapes are those of torch: GGUF writes them in reverse. Leaves out: writing, big-endian files, version 1, the
i-quants and the 4-bit float types, the vocabulary in ``tokenizer.ggml.*``.
Sources: the library; the specification (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md); ComfyUI-GGUF
``loader.py`` and ``tools/convert.py`` (names, ``comfy.gguf.orig_shape``); llama.cpp ``tensor_mapping.py`` (t5).
"""

from __future__ import annotations

import functools
import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any

import torch

from ditkit.checkpoints.files.stored import DTYPES, StoredTensors, TensorInfo, read
from ditkit.checkpoints.files.text import readable
from ditkit.checkpoints.views.source import Inspect, no_inspection
from ditkit.errors import LoadError, MissingDependency, nearest

if TYPE_CHECKING:
    from torch import Tensor

PLAIN = ("F32", "F16", "BF16")
BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
"""Types whose data is given as it is, and types that come in blocks."""
ORIGINAL = "comfy.gguf.orig_shape."
CHUNK = 2**18  # numbers that are dequantised at once
SHORT = 64  # longer lists, such as vocabularies, are left out of the metadata
MOST_AXES = 8
VERSIONS = (2, 3)
TEXT, LIST = 8, 9
NUMBERS: Mapping[int, str] = MappingProxyType(
    {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
)
"""Types of fields, as the specification numbers them -> as struct spells them."""
AGAIN = "Download the file again, it is damaged or incomplete"

T5_NAMES: Mapping[str, str] = MappingProxyType({
    r"token_embd\.weight": r"shared.weight",
    r"enc\.output_norm\.weight": r"encoder.final_layer_norm.weight",
    r"enc\.blk\.(\d+)\.attn_([qkvo])\.weight": r"encoder.block.\1.layer.0.SelfAttention.\2.weight",
    r"enc\.blk\.(\d+)\.attn_rel_b\.weight":
        r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.weight",
    r"enc\.blk\.(\d+)\.attn_norm\.weight": r"encoder.block.\1.layer.0.layer_norm.weight",
    r"enc\.blk\.(\d+)\.ffn_norm\.weight": r"encoder.block.\1.layer.1.layer_norm.weight",
    r"enc\.blk\.(\d+)\.ffn_gate\.weight": r"encoder.block.\1.layer.1.DenseReluDense.wi_0.weight",
    r"enc\.blk\.(\d+)\.ffn_up\.weight": r"encoder.block.\1.layer.1.DenseReluDense.wi_1.weight",
    r"enc\.blk\.(\d+)\.ffn_down\.weight": r"encoder.block.\1.layer.1.DenseReluDense.wo.weight",
})  # fmt: skip
"""Whole names of a t5 file -> transformers' names. A name that fits none is kept, so a strict load refuses it."""

ARCHITECTURES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {"wan": MappingProxyType({}), "t5": T5_NAMES, "t5encoder": T5_NAMES}
)
"""``general.architecture`` -> the names that its files use instead of the usual ones."""


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        found = "the package gguf is not installed"
        raise MissingDependency("reading a GGUF file", found, 'Run: pip install "ditkit[gguf]"') from None
    return gguf


class GGUFFile(StoredTensors):
    """The tensors of one GGUF file, under the names of the model's own layout (t5: transformers' names).

    ``tensors`` says ``F32``, ``F16``, ``BF16`` or the type of the blocks (``Q4_K``), and the shape of the numbers.
    Reading a tensor of blocks gives its bytes, uint8 [n]. ``metadata``: the fields, long lists left out.
    Raises LoadError for damaged files, and for architectures and types that are not supported."""

    def __init__(self, path: str | Path):
        path = Path(path)
        asked = f"opening {path}"
        header = _header(path, asked)
        architecture = str(header.fields.get("general.architecture"))
        if architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            found = f"its architecture is {architecture!r}{nearest(architecture, ARCHITECTURES)}"
            raise LoadError(asked, found, f"Use a GGUF file of one of: {known}")
        tensors: dict[str, TensorInfo] = {}
        for tensor in header.tensors:
            name = _translate(tensor.name, ARCHITECTURES[architecture])
            if name in tensors:
                raise LoadError(asked, f"two tensors would be {name}", "Use another file")
            tensors[name] = _info(path, header, tensor, asked)
        super().__init__(path, dict(sorted(tensors.items(), key=lambda item: item[1].start)), header.fields)

    def _read(self, stream: IO[bytes], name: str, info: TensorInfo, look: Inspect = no_inspection) -> Tensor:
        if info.dtype in DTYPES:
            return read(stream, name, info, look)
        return read(stream, name, TensorInfo(info.file, "U8", (info.size,), info.start, info.size), look)


@dataclass(frozen=True)
class _Tensor:
    """As the header has it: ``shape`` reversed into torch's order, ``offset`` from the beginning of all data."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class _Header:
    fields: Mapping[str, Any]
    tensors: tuple[_Tensor, ...]
    data: int  # where the data begins in the file
    size: int  # of the file


def _header(path: Path, asked: str) -> _Header:
    try:
        with readable(asked), path.open("rb") as stream:
            return _Reader(stream).header()
    except ValueError as error:
        raise LoadError(asked, f"it cannot be read as GGUF ({error})", AGAIN) from None


class _Reader:
    """The header, value after value. Raises ValueError where the file is not what the specification says."""

    def __init__(self, stream: IO[bytes]):
        self.stream = stream
        self.size = stream.seek(0, os.SEEK_END)
        stream.seek(0)

    def header(self) -> _Header:
        if self.take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        if (version := self.number("I")) not in VERSIONS:
            raise ValueError(f"its version is {version}, or it is big-endian")
        tensors, fields = self.number("Q"), self.number("Q")
        pairs = [self.field() for _ in self.counted(fields)]
        infos = tuple(self.tensor() for _ in self.counted(tensors))
        found = {name: value for name, value in pairs if value is not None}
        for kind, names in (("field", [name for name, _ in pairs]), ("tensor", [info.name for info in infos])):
            if len(set(names)) < len(names):
                raise ValueError(f"a {kind} stands there twice")
        align = found.get("general.alignment", 32)
        if type(align) is not int or align < 1 or align & (align - 1):
            raise ValueError(f"its alignment is {align}")
        return _Header(MappingProxyType(found), infos, -(-self.stream.tell() // align) * align, self.size)

    def take(self, count: int) -> bytes:
        if count > self.size - self.stream.tell():
            raise ValueError("it ends too early")
        return self.stream.read(count)

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def counted(self, count: int) -> range:
        if count > self.size:  # each of them takes a byte at least
            raise ValueError("it ends too early")
        return range(count)

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8")

    def field(self) -> tuple[str, Any]:
        name, kind = self.text(), self.number("I")
        return name, self.list() if kind == LIST else self.value(kind)

    def value(self, kind: int) -> Any:
        if kind == TEXT:
            return self.text()
        if kind not in NUMBERS:
            raise ValueError(f"a field is of the unknown type {kind}")
        return self.number(NUMBERS[kind])

    def list(self) -> list[Any] | None:
        """A short list; a long one is passed over, and None."""
        kind, count = self.number("I"), self.number("Q")
        if count <= SHORT:
            return [self.value(kind) for _ in range(count)]
        if kind == TEXT:
            for _ in self.counted(count):
                self.skip(self.number("Q"))
        elif kind in NUMBERS:
            self.skip(count * struct.calcsize("<" + NUMBERS[kind]))
        else:
            raise ValueError(f"a list is of the unknown type {kind}")
        return None

    def skip(self, count: int) -> None:
        if count > self.size - self.stream.tell():
            raise ValueError("it ends too early")
        self.stream.seek(count, os.SEEK_CUR)

    def tensor(self) -> _Tensor:
        name, axes = self.text(), self.number("I")
        if axes > MOST_AXES:
            raise ValueError(f"{name} has {axes} axes")
        shape = tuple(self.number("Q") for _ in range(axes))
        return _Tensor(name, shape[::-1], self.number("I"), self.number("Q"))


def _translate(name: str, names: Mapping[str, str]) -> str:
    fits = ((re.fullmatch(pattern, name), new) for pattern, new in names.items())
    return next((match.expand(new) for match, new in fits if match), name)


def _info(path: Path, header: _Header, tensor: _Tensor, asked: str) -> TensorInfo:
    """Where a tensor lies, in the shape that it has in torch."""
    library = _library()
    kinds = {int(code): code.name for code in library.GGML_QUANT_SIZES}
    kind = kinds.get(tensor.kind, f"type {tensor.kind}")
    if kind not in (*PLAIN, *BLOCKS):
        known = ", ".join((*PLAIN, *BLOCKS))
        raise LoadError(asked, f"{tensor.name} is stored as {kind}", f"Use a file with types among {known}")
    per_block, width = library.GGML_QUANT_SIZES[library.GGMLQuantizationType[kind]]
    count = math.prod(tensor.shape)
    start, size = header.data + tensor.offset, count // per_block * width
    if (tensor.shape[-1:] or (1,))[0] % per_block:
        raise LoadError(asked, f"the rows of {tensor.name} {list(tensor.shape)} are no whole {kind} blocks", AGAIN)
    if start + size > header.size:
        raise LoadError(asked, f"it has {header.size} bytes and {tensor.name} ends at {start + size}", AGAIN)
    wanted = header.fields.get(ORIGINAL + tensor.name, tensor.shape)
    whole = isinstance(wanted, list | tuple) and all(type(n) is int and n >= 0 for n in wanted)
    if not whole or math.prod(wanted) != count:
        found = f"{tensor.name} has the shape {list(tensor.shape)} and the original shape {wanted!r:.100}"
        raise LoadError(asked, found, "Use another file")
    return TensorInfo(path, kind, tuple(wanted), start, size)


@functools.cache
def keep_heap() -> None:
    """Lets malloc keep what it got for the library's temporary arrays. As it starts, it gives them back to the system
    after each piece, and new pages take longer than the arithmetic. Freeing something large is how glibc learns better
    (``M_MMAP_THRESHOLD`` in mallopt(3)); elsewhere it does nothing. Once: again and again it would make holes."""
    torch.empty(2**24, dtype=torch.uint8)


def block_bytes(kind: str) -> tuple[int, int]:
    """(numbers, bytes) of a block of the type ``kind``."""
    library = _library()
    per_block, width = library.GGML_QUANT_SIZES[library.GGMLQuantizationType[kind]]
    return int(per_block), int(width)


def numbers_of(blocks: Tensor, kind: str) -> Tensor:
    """The numbers in whole ``blocks``, uint8 [n] of the type ``kind`` (``Q4_K``), as the library has them: float32.

    The library gets them as one row: of many rows it takes 16 at a time, and five to ten times as long."""
    library = _library()
    return torch.from_numpy(library.quants.dequantize(blocks.numpy(), library.GGMLQuantizationType[kind]))
