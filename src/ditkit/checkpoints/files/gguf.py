"""GGUF files (``city96`` style for Wan, ``t5``/``t5encoder`` for UMT5): what they hold, and their blocks as numbers.

Tensors of a quantised type are given as the bytes that are stored; ``numbers_of`` turns them into numbers with the
``gguf`` library (``pip install "ditkit[gguf]"``), and the view ``Dequantized`` does so while streaming. The header is
read here, because the library's reader maps the file and takes seconds and hundreds of MB for a vocabulary of 256 000
words. Whose names they are is told by the tensors, not by ``general.architecture``, which converters spell in their own
ways. Shapes are those of torch: GGUF writes them in reverse. Leaves out: writing, big-endian files, version 1, the
i-quants and the 4-bit float types, the vocabulary in ``tokenizer.ggml.*``.
Sources: the library; the specification (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md); ComfyUI-GGUF
``loader.py`` and ``tools/convert.py`` (names, ``comfy.gguf.orig_shape``); llama.cpp ``tensor_mapping.py`` (t5)."""

import functools
import math
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

import torch
from torch import Tensor

from ditkit import limits
from ditkit.checkpoints.files.stored import StoredTensors, TensorInfo
from ditkit.checkpoints.files.text import AGAIN, readable
from ditkit.errors import LoadError, needed
from ditkit.reading import open_ordinary

PLAIN = ("F32", "F16", "BF16")
BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
"""Types whose data is given as it is, and types that come in blocks."""
ORIGINAL = "comfy.gguf.orig_shape."
CHUNK = 2**18  # numbers that are dequantised at once
SHORT = 64  # longer lists, such as vocabularies, are left out of the metadata
TEXT, LIST = 8, 9
NUMBERS = MappingProxyType({0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"})
"""Types of fields, as the specification numbers them -> as struct spells them."""

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

T5_BEGIN = ("enc.", "token_embd.")  # no other network that is used here has such names


def _library() -> Any:
    return needed("gguf", "reading a GGUF file", "gguf")


class GGUFFile(StoredTensors):
    """The tensors of one GGUF file, under the names of the model's own layout (t5: transformers' names).

    ``tensors`` says ``F32``, ``F16``, ``BF16`` or the type of the blocks (``Q4_K``), and the shape of the numbers.
    Reading a tensor of blocks gives its bytes, uint8 [n]. ``metadata``: the fields, long lists left out.
    Raises LoadError for damaged files, and for types that are not supported."""

    def __init__(self, path: str | Path):
        path = Path(path)
        asked = f"opening {path}"
        _library()
        with readable(asked), open_ordinary(path) as stream:
            try:
                header = _Header(stream)
            except ValueError as error:
                raise LoadError(asked, f"it cannot be read as GGUF ({error})", AGAIN) from None
        names = T5_NAMES if any(name.startswith(T5_BEGIN) for name, *_ in header.tensors) else {}
        tensors: dict[str, TensorInfo] = {}
        for tensor in header.tensors:
            name = _translate(tensor[0], names)
            if name in tensors:
                raise LoadError(asked, f"two tensors would be {name}", "Use another file")
            tensors[name] = _info(path, header, *tensor)
        end, last = 0, ""
        for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].size)):
            if info.size and info.start < end:  # few bytes would stand for any number of tensors
                raise LoadError(asked, f"{name} and {last} lie on one another", AGAIN)
            end, last = max(end, info.start + info.size), name
        super().__init__(path, tensors, header.fields)


class _Header:
    """Read value after value. Raises ValueError where the file is not what the specification says.

    ``fields``: long lists are left out. ``tensors``: name, shape in torch's order, number of the type, offset in the
    data. ``data``: where that begins. ``size``: of the file."""

    def __init__(self, stream: IO[bytes]):
        self.stream = stream
        self.size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        if self._take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        if (version := self._number("I")) not in (2, 3):
            raise ValueError(f"its version is {version}, or it is big-endian")
        tensors, fields = self._number("Q"), self._number("Q")
        pairs = [self._field() for _ in self._few(fields, "fields")]
        self.tensors = [self._tensor() for _ in self._few(tensors, "tensors")]
        self.fields = {name: value for name, value in pairs if value is not None}
        for kind, rows in ("field", pairs), ("tensor", self.tensors):
            if len({name for name, *_ in rows}) < len(rows):
                raise ValueError(f"a {kind} stands there twice")
        align = self.fields.get("general.alignment", 32)
        if type(align) is not int or align < 1 or align & (align - 1):
            raise ValueError(f"its alignment is {align}")
        self.data = -(-stream.tell() // align) * align

    def _left(self, count: int) -> int:
        """``count``, where so many bytes are left, and not too many."""
        here = self.stream.tell()
        if count > self.size - here:
            raise ValueError("it ends too early")
        if here + count > limits.VOCABULARY:
            raise ValueError(f"what stands before the data has more than {limits.VOCABULARY:,} bytes")
        return count

    def _few(self, count: int, what: str) -> range:
        if count > limits.ENTRIES:
            raise ValueError(f"it says that it has {count:,} {what}")
        return range(self._left(count))  # each takes a byte at least

    def _take(self, count: int) -> bytes:
        return self.stream.read(self._left(count))

    def _skip(self, count: int) -> None:
        self.stream.seek(self._left(count), os.SEEK_CUR)

    def _number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def _text(self) -> str:
        return self._take(self._number("Q")).decode("utf-8")

    def _code(self, kind: int) -> str:
        if kind not in NUMBERS:
            raise ValueError(f"a field is of the unknown type {kind}")
        return NUMBERS[kind]

    def _value(self, kind: int) -> Any:
        return self._text() if kind == TEXT else self._number(self._code(kind))

    def _field(self) -> tuple[str, Any]:
        name, kind = self._text(), self._number("I")
        return name, self._list() if kind == LIST else self._value(kind)

    def _list(self) -> list[Any] | None:
        """A short list; a long one is passed over, and None."""
        kind, count = self._number("I"), self._number("Q")
        if count <= SHORT:
            return [self._value(kind) for _ in range(count)]
        if kind == TEXT:
            for _ in range(self._left(count)):
                self._skip(self._number("Q"))
        else:
            self._skip(count * struct.calcsize(f"<{self._code(kind)}"))
        return None

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, axes = self._text(), self._number("I")
        if axes > 8:
            raise ValueError(f"{name} has {axes} axes")
        shape = tuple(self._number("Q") for _ in range(axes))
        if max(shape, default=0) >= limits.NUMBER:
            raise ValueError(f"{name} has an axis of {max(shape)}")
        return name, shape[::-1], self._number("I"), self._number("Q")


def _translate(name: str, names: Mapping[str, str]) -> str:
    fits = ((re.fullmatch(pattern, name), new) for pattern, new in names.items())
    return next((match.expand(new) for match, new in fits if match), name)


def _info(path: Path, header: _Header, name: str, shape: tuple[int, ...], code: int, offset: int) -> TensorInfo:
    """Where a tensor lies, in the shape that it has in torch."""
    asked = f"opening {path}"
    kind = _kinds().get(code, f"type {code}")
    if kind not in (*PLAIN, *BLOCKS):
        known = ", ".join((*PLAIN, *BLOCKS))
        raise LoadError(asked, f"{name} is stored as {kind}", f"Use a file with types among {known}")
    per_block, width = block_bytes(kind)
    count = math.prod(shape)
    start, size = header.data + offset, count // per_block * width
    if (shape[-1:] or (1,))[0] % per_block:
        raise LoadError(asked, f"the rows of {name} {list(shape)} are no whole {kind} blocks", AGAIN)
    if start + size > header.size:
        raise LoadError(asked, f"it has {header.size} bytes and {name} ends at {start + size}", AGAIN)
    original = header.fields.get(ORIGINAL + name, shape)
    whole = isinstance(original, list | tuple) and all(type(n) is int and n >= 0 for n in original)
    if not whole or math.prod(original) != count:
        found = f"{name} has the shape {list(shape)} and the original shape {original!r:.100}"
        raise LoadError(asked, found, "Use another file")
    return TensorInfo(kind, tuple(original), path, start, size)


@functools.cache
def _kinds() -> Mapping[int, str]:
    """The numbers of all types, as the library knows them -> their names."""
    return {int(kind): kind.name for kind in _library().GGML_QUANT_SIZES}


@functools.cache
def keep_heap() -> None:
    """Lets malloc keep what it got for the library's temporary arrays. As it starts, it gives them back to the system
    after each piece, and new pages take longer than the arithmetic. Freeing something large is how glibc learns better
    (``M_MMAP_THRESHOLD`` in mallopt(3)); elsewhere it does nothing. Once: again and again it would make holes."""
    torch.empty(2**24, dtype=torch.uint8)


@functools.cache
def block_bytes(kind: str) -> tuple[int, int]:
    """(numbers, bytes) of a block of the type ``kind``."""
    library = _library()
    per_block, width = library.GGML_QUANT_SIZES[library.GGMLQuantizationType[kind]]
    return int(per_block), int(width)


def numbers_of(blocks: Tensor, kind: str) -> Tensor:
    """The numbers in whole ``blocks``, uint8 [n] of the type ``kind`` (``Q4_K``), as the library has them: float32.

    The library gets them as one row: of many rows it takes 16 at a time, and five to ten times as long."""
    keep_heap()
    library = _library()
    return torch.from_numpy(library.quants.dequantize(blocks.numpy(), library.GGMLQuantizationType[kind]))
