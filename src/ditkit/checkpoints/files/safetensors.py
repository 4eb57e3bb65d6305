"""Safetensors: the header of a file, or of an index and its shards, checked byte for byte.

Source of the format: https://github.com/huggingface/safetensors#format"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ditkit.checkpoints.files.formats import FORMATS, HEADER_LIMIT, chosen, kind_of, read_shards
from ditkit.checkpoints.files.stored import DTYPES, SIZES, StoredTensors, TensorInfo
from ditkit.checkpoints.files.text import AGAIN, printable, readable, some
from ditkit.errors import LoadError


class TensorFiles(StoredTensors):
    """The tensors of one safetensors file, or of an index and its shards; ``path`` is either, or their folder.

    ``tensors`` maps each name to its TensorInfo, in the order of files and bytes. Opening checks all headers and
    reads no data. ``variant`` selects ``diffusion_pytorch_model.VARIANT.safetensors``. ``metadata`` is the header's
    ``__metadata__``; where shards differ in a value, a tuple of theirs. Raises LoadError for missing, damaged,
    contradictory and ambiguous files."""

    def __init__(self, path: str | Path, variant: str | None = None):
        path = chosen(path, variant)
        super().__init__(path, *(_sharded(path) if path.suffix == ".json" else _header(path)))


def _header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of one file, in the order of their bytes, and its ``__metadata__``. Raises LoadError when it is
    missing, is no safetensors file, or does not have the length its header says."""
    asked = f"opening {file}"
    if (kind := kind_of(file)) in FORMATS:
        raise LoadError(asked, f"it is {FORMATS[kind][1]}, not safetensors", "Convert it to safetensors")
    with readable(asked), file.open("rb") as stream:
        size = file.stat().st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8:
            raise LoadError(asked, f"it has only {size} bytes", AGAIN)
        if length > min(size - 8, HEADER_LIMIT):
            found = f"it is no safetensors file, or damaged (it has {size} bytes, too few for a header of {length})"
            raise LoadError(asked, found, AGAIN)
        raw = stream.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
        metadata = dict(header.pop("__metadata__", None) or {})
        if not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("its __metadata__ holds something other than texts")
        printable(header)
        places = sorted((*info["data_offsets"], name, info["dtype"], info["shape"]) for name, info in header.items())
        tensors, end = {}, 0
        for start, stop, name, dtype, shape in places:
            if dtype not in DTYPES:
                do = f"Use a file with types among {', '.join(DTYPES)}"
                raise LoadError(asked, f"{name} is stored as {dtype}", do)
            if not all(type(number) is int for number in (start, stop, *shape)):
                raise ValueError(f"the shape or the place of {name} is not made of whole numbers")
            if start != end or stop - start != math.prod(shape) * SIZES[dtype] or min(shape, default=0) < 0:
                raise ValueError(f"the bytes of {name} do not fit its shape {shape} or their neighbours")
            tensors[name] = TensorInfo(dtype, tuple(shape), file, 8 + length + start, stop - start)
            end = stop
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise LoadError(asked, f"its header cannot be understood ({error})", AGAIN) from None
    if 8 + length + end != size:
        raise LoadError(asked, f"it has {size} bytes where its header asks for {8 + length + end}", AGAIN)
    return tensors, metadata


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def _sharded(index: Path) -> tuple[dict[str, TensorInfo], dict[str, Any]]:
    names = read_shards(index)
    shards = sorted(set(names.values()))
    asked = f"opening the {len(shards)} shards of {index}"
    again = "Download the folder again"
    if absent := [shard for shard in shards if not (index.parent / shard).is_file()]:
        raise LoadError(asked, f"{len(absent)} of them are not there ({some(absent)})", again)
    headers = {shard: _header(index.parent / shard) for shard in shards}
    found = {(name, shard): info for shard, (tensors, _) in headers.items() for name, info in tensors.items()}
    listed = set(names.items())
    if lost := [f"{name} in {shard}" for name, shard in listed - found.keys()]:
        raise LoadError(asked, f"{len(lost)} tensors of the index are not in their shard ({some(lost)})", again)
    if stray := [f"{name} in {shard}" for name, shard in found.keys() - listed]:
        text = f"the shards hold {len(stray)} tensors that the index does not name ({some(stray)})"
        raise LoadError(asked, text, again)
    return {name: info for (name, _), info in found.items()}, _merged([notes for _, notes in headers.values()])


def _merged(notes: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """The notes of all shards: one value where they agree, a tuple of the different ones where they do not."""
    keys = dict.fromkeys(key for note in notes for key in note)
    values = {key: tuple(dict.fromkeys(note[key] for note in notes if key in note)) for key in keys}
    return {key: found[0] if len(found) == 1 else found for key, found in values.items()}
