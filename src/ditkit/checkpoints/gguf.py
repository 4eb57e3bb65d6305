"""GGUF files (``city96`` style for Wan, ``t5``/``t5encoder`` for UMT5): what they hold, and their blocks as numbers.

The header is read by the ``gguf`` library (``pip install "ditkit[gguf]"``), the data with ordinary file reads. Tensors
of a quantised type are given as the bytes that are stored; ``dequantise`` turns them into numbers, and the view
``Dequantized`` does so while streaming. Shapes are those of torch: GGUF writes them in reverse. Leaves out: writing,
the i-quants and the 4-bit float types, the vocabulary in ``tokenizer.ggml.*``.
Sources: the library; ComfyUI-GGUF ``loader.py`` and ``tools/convert.py`` (names, ``comfy.gguf.orig_shape``); llama.cpp
``tensor_mapping.py`` (names of t5).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any

import torch

from ditkit.checkpoints.files import DTYPES, StoredTensors, TensorInfo, read
from ditkit.errors import LoadError, MissingDependency, nearest

if TYPE_CHECKING:
    from torch import Tensor

PLAIN = ("F32", "F16", "BF16")
BLOCKS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
"""Types whose data is given as it is, and types that come in blocks."""
ORIGINAL = "comfy.gguf.orig_shape."
CHUNK = 2**22  # numbers that are dequantised at once
SHORT = 64  # longer lists, such as vocabularies, are left out of the metadata

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
        reader = _open(path, asked)
        metadata = dict(_fields(reader))
        architecture = str(metadata.get("general.architecture"))
        if architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            found = f"its architecture is {architecture!r}{nearest(architecture, ARCHITECTURES)}"
            raise LoadError(asked, found, f"Use a GGUF file of one of: {known}")
        tensors: dict[str, TensorInfo] = {}
        for tensor in reader.tensors:
            name = _translate(tensor.name, ARCHITECTURES[architecture])
            if name in tensors:
                raise LoadError(asked, f"two tensors would be {name}", "Use another file")
            tensors[name] = _info(path, tensor, metadata.get(ORIGINAL + tensor.name), asked)
        super().__init__(path, dict(sorted(tensors.items(), key=lambda item: item[1].start)), metadata)

    def _read(self, stream: IO[bytes], name: str, info: TensorInfo) -> Tensor:
        if info.dtype in DTYPES:
            return read(stream, name, info)
        return read(stream, name, TensorInfo(info.file, "U8", (info.size,), info.start, info.size))


def _open(path: Path, asked: str) -> Any:
    library = _library()
    try:
        reader = library.GGUFReader(path)
        if reader.byte_order != "I":
            raise LoadError(asked, "its numbers are big-endian", "Use a file for little-endian machines")
        return reader
    except LoadError:
        raise
    except Exception as error:  # the library's reader has no errors of its own, and fails in any way
        found = f"it cannot be read as GGUF ({type(error).__name__}: {error})"
        raise LoadError(asked, found, "Download the file again, it is damaged or incomplete") from None


def _fields(reader: Any) -> Iterator[tuple[str, Any]]:
    """Fields that are one value or a short list."""
    for name, field in reader.fields.items():
        if len(field.data) <= SHORT:
            yield name, field.contents()


def _translate(name: str, names: Mapping[str, str]) -> str:
    fits = ((re.fullmatch(pattern, name), new) for pattern, new in names.items())
    return next((match.expand(new) for match, new in fits if match), name)


def _info(path: Path, tensor: Any, original: Any, asked: str) -> TensorInfo:
    kind = tensor.tensor_type.name
    if kind not in (*PLAIN, *BLOCKS):
        known = ", ".join((*PLAIN, *BLOCKS))
        raise LoadError(asked, f"{tensor.name} is stored as {kind}", f"Use a file with types among {known}")
    shape = tuple(int(n) for n in reversed(tensor.shape.tolist()))
    if original is not None:
        wanted = tuple(int(n) for n in (original if isinstance(original, list) else [original]))
        if math.prod(wanted) != math.prod(shape):
            found = f"{tensor.name} has the shape {list(shape)} and the original shape {list(wanted)}"
            raise LoadError(asked, found, "Use another file")
        shape = wanted
    return TensorInfo(path, kind, shape, int(tensor.data_offset), int(tensor.n_bytes))


def dequantise(blocks: Tensor, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The numbers in ``blocks``, uint8 [n] of the type ``kind`` (``Q4_K``), as ``dtype`` and in ``shape``.

    The library computes in float32; each result is rounded once. Only a few blocks at a time are held in float32."""
    library = _library()
    code = library.GGMLQuantizationType[kind]
    per_block, width = library.GGML_QUANT_SIZES[code]
    rows = blocks.numpy().reshape(-1, width)
    numbers = torch.empty(len(rows) * per_block, dtype=dtype)
    step = CHUNK // per_block
    for begin in range(0, len(rows), step):
        part = library.quants.dequantize(rows[begin : begin + step], code).reshape(-1)
        numbers[begin * per_block : begin * per_block + part.size] = torch.from_numpy(part)
    return numbers.reshape(shape)
