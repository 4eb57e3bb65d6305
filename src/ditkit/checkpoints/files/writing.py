"""Weights written tensor by tensor: a safetensors file, a set of shards with an index, or a state dict for torch.load.

Headers are made from facts, so memory holds one tensor, or the members of one that is joined. Leaves out: names and
layouts (convert.py), and appearing whole or not at all, which is for whoever writes a folder.
Source of the formats: https://github.com/huggingface/safetensors#format; the index is huggingface_hub's.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ditkit.checkpoints.files.safetensors import read_header
from ditkit.checkpoints.files.stored import DTYPES, SIZES, bytes_of
from ditkit.checkpoints.views.source import TensorSource
from ditkit.errors import LoadError

if TYPE_CHECKING:
    from torch import Tensor

WANTED: Mapping[str, str] = MappingProxyType({"float32": "F32", "float16": "F16", "bfloat16": "BF16"})
"""Types that weights can be converted to -> as safetensors spells them."""
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
SHARD_BYTES = 5 * 10**9  # huggingface_hub's own
Wrote = Callable[[str, int], None]
"""Called after each tensor with its name and the bytes written for it."""


def write_set(
    folder: Path,
    base: str,
    source: TensorSource,
    dtype: str | None = None,
    limit: int = SHARD_BYTES,
    wrote: Wrote = lambda name, size: None,
) -> list[Path]:
    """``base.safetensors`` in ``folder``, or shards of at most ``limit`` bytes of tensors and their index.

    ``dtype``: one of ``WANTED`` for every tensor, None for the stored ones. A tensor above ``limit`` has a shard of its
    own. Raises LoadError for what has no such type, and OSError."""
    spelled = {name: _spelled(source, name, dtype) for name in source.tensors}
    shards = list(_shards(source, spelled, limit))
    if len(shards) == 1:
        file = folder / f"{base}.safetensors"
        write_file(file, source, shards[0], dtype, wrote)
        return [file]
    files = [folder / f"{base}-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    for file, names in zip(files, shards, strict=True):
        write_file(file, source, names, dtype, wrote)
    places = {name: file.name for file, names in zip(files, shards, strict=True) for name in names}
    total = sum(_bytes(source, name, spelled[name]) for name in spelled)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    listed = folder / f"{base}.safetensors.index.json"
    listed.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*files, listed]


def write_file(
    file: Path,
    source: TensorSource,
    names: Sequence[str] | None = None,
    dtype: str | None = None,
    wrote: Wrote = lambda name, size: None,
) -> None:
    """One safetensors file with the tensors ``names`` of ``source``, all when None; the widest types lie first, so that
    each tensor begins at a multiple of its own width."""
    spelled = {name: _spelled(source, name, dtype) for name in (source.tensors if names is None else names)}
    spelled = dict(sorted(spelled.items(), key=lambda item: -SIZES[item[1]]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, kind in spelled.items():
        start, end = end, end + _bytes(source, name, kind)
        header[name] = {"dtype": kind, "shape": list(source.tensors[name].shape), "data_offsets": [start, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with file.open("xb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        for name, kind in spelled.items():
            stream.write(bytes_of(_cast(source, name, kind)))
            wrote(name, _bytes(source, name, kind))


def write_pickle(
    file: Path, source: TensorSource, dtype: str | None = None, wrote: Wrote = lambda name, size: None
) -> None:
    """A state dict as ``torch.save`` writes it, for the official code, which reads nothing else.

    ``torch.save`` wants all tensors at once, so they go through a file beside this one that is mapped into memory and
    removed afterwards: the disk needs room for both, the heap for one tensor."""
    import torch

    beside = file.with_name(f"{file.name}.tensors")
    try:
        write_file(beside, source, None, dtype, wrote)
        torch.save(_mapped(beside), file)
    finally:
        beside.unlink(missing_ok=True)


def _mapped(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file as they lie on the disk; changes of them would stay in memory."""
    import torch

    header = read_header(file)
    with file.open("rb") as stream:
        memory = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
    tensors = {}
    for name, info in header.items():
        dtype, count = getattr(torch, DTYPES[info.dtype]), math.prod(info.shape)
        flat = (
            torch.frombuffer(memory, dtype=dtype, count=count, offset=info.start)
            if count
            else torch.empty(0, dtype=dtype)
        )
        tensors[name] = flat.reshape(info.shape)
    return tensors


def _shards(source: TensorSource, spelled: Mapping[str, str], limit: int) -> Iterator[list[str]]:
    names: list[str] = []
    held = 0
    for name, kind in spelled.items():
        size = _bytes(source, name, kind)
        if names and held + size > limit:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    yield names


def _spelled(source: TensorSource, name: str, dtype: str | None) -> str:
    kind = source.tensors[name].dtype
    if kind not in SIZES:
        raise LoadError(f"writing {name} of {source.path}", f"its type is {kind}", "Give the weights dequantised")
    if dtype is None:
        return kind
    if kind not in FLOATS:
        raise LoadError(f"writing {name} of {source.path} as {dtype}", f"its type is {kind}", "Use weights of numbers")
    return WANTED[dtype]


def _bytes(source: TensorSource, name: str, kind: str) -> int:
    return math.prod(source.tensors[name].shape) * SIZES[kind]


def _cast(source: TensorSource, name: str, kind: str) -> Tensor:
    import torch

    tensor, dtype = source[name], getattr(torch, DTYPES[kind])
    if tensor.dtype == dtype:
        return tensor.contiguous()
    cast = tensor.to(dtype).contiguous()
    if not cast.isfinite().all() and tensor.float().isfinite().all():
        raise LoadError(
            f"writing {name} of {source.path} as {DTYPES[kind]}",
            f"its largest number is {float(tensor.abs().max()):.3g}, which is beyond that type",
            "Choose bfloat16 or float32",
        )
    return cast
