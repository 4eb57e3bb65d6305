"""Weights written tensor by tensor: a safetensors file, a set of shards with an index, or a state dict for torch.load.

Headers are made from facts, so memory holds one tensor, or the members of one that is joined. Leaves out: names and
layouts (convert.py), and appearing whole or not at all, which is for whoever writes a folder.
Source of the formats: https://github.com/huggingface/safetensors#format; the index is huggingface_hub's."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ditkit.checkpoints.files.stored import DTYPES, FLOATS, SIZES, bytes_of
from ditkit.checkpoints.views.source import TensorSource
from ditkit.errors import LoadError

WANTED = MappingProxyType({"float32": "F32", "float16": "F16", "bfloat16": "BF16"})
"""Types that weights can be converted to -> as safetensors spells them."""
SHARD_BYTES = 5 * 10**9  # huggingface_hub's own
Wrote = Callable[[str, int], None]
"""Called after each tensor with its name and the bytes written for it."""


def write_set(
    folder: Path, base: str, source: TensorSource, dtype: str | None = None, limit: int = SHARD_BYTES,
    wrote: Wrote = lambda name, size: None,
) -> None:  # fmt: skip
    """``base.safetensors`` in ``folder``, or shards of at most ``limit`` bytes of tensors and their index.

    ``dtype``: one of ``WANTED`` for every tensor, None for the stored ones. A tensor above ``limit`` has a shard of its
    own. Raises LoadError for what has no such type, and OSError."""
    shards = list(_shards(source, dtype, limit))
    numbers = [f"-{n:05d}-of-{len(shards):05d}" for n in range(1, len(shards) + 1)] if len(shards) > 1 else [""]
    files = {folder / f"{base}{number}.safetensors": names for number, names in zip(numbers, shards, strict=True)}
    for file, names in files.items():
        write_file(file, source, names, dtype, wrote)
    if len(shards) > 1:
        places = {name: file.name for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": total_bytes(source, dtype)}, "weight_map": dict(sorted(places.items()))}
        text = json.dumps(index, indent=2) + "\n"
        (folder / f"{base}.safetensors.index.json").write_text(text, encoding="utf-8")


def write_file(
    file: Path, source: TensorSource, names: Sequence[str] | None = None, dtype: str | None = None,
    wrote: Wrote = lambda name, size: None,
) -> None:  # fmt: skip
    """One safetensors file with the tensors ``names`` of ``source``, all when None; the widest types lie first, so that
    each tensor begins at a multiple of its own width."""
    spelled = {name: _spelled(source, name, dtype) for name in (source.tensors if names is None else names)}
    spelled = dict(sorted(spelled.items(), key=lambda item: -SIZES[item[1]]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, kind in spelled.items():
        start, end = end, end + _bytes(source, name, dtype)
        header[name] = {"dtype": kind, "shape": list(source.tensors[name].shape), "data_offsets": [start, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with file.open("xb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        for name, kind in spelled.items():
            stream.write(bytes_of(_cast(source, name, DTYPES[kind])))
            wrote(name, _bytes(source, name, dtype))


def write_pickle(
    file: Path, source: TensorSource, dtype: str | None = None, wrote: Wrote = lambda name, size: None
) -> None:
    """A state dict as ``torch.save`` writes it, for the official code, which reads nothing else.

    ``torch.save`` wants all tensors at once, so they go through a file beside this one that is mapped into memory and
    removed afterwards: the disk needs room for both, the heap for one tensor. Raises OSError."""
    from safetensors.torch import load_file

    beside = file.with_name(f"{file.name}.tensors")
    try:
        write_file(beside, source, None, dtype, wrote)
        torch.save(load_file(beside), file)
    except RuntimeError as e:  # what torch makes of a disk that takes no more
        raise OSError(0, f"torch cannot write {file.name} ({str(e).splitlines()[0][:200]})") from None
    finally:
        beside.unlink(missing_ok=True)


def total_bytes(source: TensorSource, dtype: str | None) -> int:
    """Of all tensors as they are written."""
    return sum(_bytes(source, name, dtype) for name in source.tensors)


def _shards(source: TensorSource, dtype: str | None, limit: int) -> Iterator[list[str]]:
    names: list[str] = []
    held = 0
    for name in source.tensors:
        size = _bytes(source, name, dtype)
        if names and held + size > limit:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    yield names


def _spelled(source: TensorSource, name: str, dtype: str | None) -> str:
    asked, kind = f"writing {name} of {source.path}", source.tensors[name].dtype
    if kind not in SIZES:
        raise LoadError(asked, f"its type is {kind}", "Give the weights dequantised")
    if dtype is not None and kind not in FLOATS:
        raise LoadError(f"{asked} as {dtype}", f"its type is {kind}", "Use weights of numbers")
    return kind if dtype is None else WANTED[dtype]


def _bytes(source: TensorSource, name: str, dtype: str | None) -> int:
    return math.prod(source.tensors[name].shape) * SIZES[_spelled(source, name, dtype)]


def _cast(source: TensorSource, name: str, dtype: torch.dtype) -> Tensor:
    tensor = source[name]
    cast = tensor.to(dtype).contiguous()
    if tensor.dtype != dtype and not cast.isfinite().all() and tensor.float().isfinite().all():
        found = f"its largest number is {float(tensor.abs().max()):.3g}, which is beyond that type"
        asked = f"writing {name} of {source.path} as {str(dtype).removeprefix('torch.')}"
        raise LoadError(asked, found, "Choose bfloat16 or float32")
    return cast
