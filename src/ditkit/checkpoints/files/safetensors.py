"""Safetensors: the header of a file, or of an index and its shards, checked byte for byte.

Source of the format: https://github.com/huggingface/safetensors#format"""

import json
import math
import os
from pathlib import Path
from typing import Any

from ditkit import limits
from ditkit.checkpoints.files.formats import FORMATS, chosen, kind_of
from ditkit.checkpoints.files.shards import sharded
from ditkit.checkpoints.files.stored import DTYPES, SIZES, StoredTensors, TensorInfo
from ditkit.checkpoints.files.text import AGAIN, readable
from ditkit.errors import LoadError, shortened
from ditkit.reading import check_value, open_ordinary


class TensorFiles(StoredTensors):
    """The tensors of one safetensors file, or of an index and its shards; ``path`` is either, or their folder.

    ``tensors`` maps each name to its TensorInfo, in the order of files and bytes. Opening checks all headers and
    reads no data. ``variant`` selects ``diffusion_pytorch_model.VARIANT.safetensors``. ``metadata`` is the header's
    ``__metadata__``; where shards differ in a value, a tuple of theirs. Raises LoadError for missing, damaged,
    contradictory and ambiguous files."""

    def __init__(self, path: str | Path, variant: str | None = None):
        path = chosen(path, variant)
        super().__init__(path, *(sharded(path, _header) if path.suffix == ".json" else _header(path)))


def _header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of one file, in the order of their bytes, and its ``__metadata__``. Raises LoadError when it is
    missing, is no safetensors file, or does not have the length its header says."""
    asked = f"opening {file}"
    if (kind := kind_of(file)) in FORMATS:
        raise LoadError(asked, f"it is {FORMATS[kind][1]}, not safetensors", "Convert it to safetensors")
    with readable(asked), open_ordinary(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8:
            raise LoadError(asked, f"it has only {size} bytes", AGAIN)
        if limits.HEADER < length <= size - 8:
            raise LoadError(asked, f"its header has {length:,} bytes, more than {limits.HEADER:,}", AGAIN)
        if length > size - 8:
            found = f"it is no safetensors file, or damaged (it has {size} bytes, too few for a header of {length})"
            raise LoadError(asked, found, AGAIN)
        raw = stream.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates, parse_int=_whole_number)
        metadata = dict(header.pop("__metadata__", None) or {})
        if not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("its __metadata__ holds something other than texts")
        check_value(header)
        check_value(metadata)
        if len(header) > limits.ENTRIES:
            raise ValueError(f"it names more than {limits.ENTRIES:,} tensors")
        places = sorted((*info["data_offsets"], name, info["dtype"], info["shape"]) for name, info in header.items())
        tensors, end = {}, 0
        for start, stop, name, dtype, shape in places:
            if dtype not in DTYPES:
                do = f"Use a file with types among {', '.join(DTYPES)}"
                raise LoadError(asked, f"{name} is stored as {shortened(str(dtype), limits.NAME)}", do)
            if len(shape) > limits.AXES:
                raise ValueError(f"{name} has {len(shape)} axes")
            if not all(type(number) is int for number in (start, stop, *shape)):
                raise ValueError(f"the shape or the place of {name} is not made of whole numbers")
            if start != end or stop - start != math.prod(shape) * SIZES[dtype] or min(shape, default=0) < 0:
                raise ValueError(f"the bytes of {name} do not fit its shape {shape} or their neighbours")
            tensors[name] = TensorInfo(dtype, tuple(shape), file, 8 + length + start, stop - start)
            end = stop
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise LoadError(asked, f"its header cannot be understood ({shortened(str(error))})", AGAIN) from None
    if 8 + length + end != size:
        raise LoadError(asked, f"it has {size} bytes where its header asks for {8 + length + end}", AGAIN)
    return tensors, metadata


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def _whole_number(text: str) -> int:
    if len(text) > 20 or abs(number := int(text)) >= limits.NUMBER:
        raise ValueError(f"there is a number of {len(text)} digits")
    return number
