"""A set of shards and their index, of any format: every tensor lies where the index says, and no other is there.

Source of the index: huggingface_hub."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ditkit import limits
from ditkit.checkpoints.files.formats import read_shards
from ditkit.checkpoints.files.stored import TensorInfo
from ditkit.checkpoints.files.text import some
from ditkit.errors import LoadError
from ditkit.reading import file_at

Opened = tuple[Mapping[str, TensorInfo], Mapping[str, Any]]
"""The tensors and the notes of one file."""


def sharded(index: Path, opened: Callable[[Path], Opened]) -> tuple[dict[str, TensorInfo], dict[str, Any]]:
    """The tensors of all shards that ``index`` names, and their notes: one value where they agree, else a tuple of
    theirs. ``opened``: of one shard. Raises LoadError."""
    names = read_shards(index)
    shards = sorted(set(names.values()))
    asked = f"opening the {len(shards)} shards of {index}"
    again = "Download the folder again"
    if len(shards) > limits.SHARDS:
        raise LoadError(f"reading {index}", f"it names {len(shards):,} files", again)
    if absent := [shard for shard in shards if not file_at(index.parent / shard, asked)]:
        raise LoadError(asked, f"{len(absent)} of them are not there ({some(absent)})", again)
    headers = {shard: opened(index.parent / shard) for shard in shards}
    found = {(name, shard): info for shard, (tensors, _) in headers.items() for name, info in tensors.items()}
    listed = set(names.items())
    if lost := [f"{name} in {shard}" for name, shard in listed - found.keys()]:
        raise LoadError(asked, f"{len(lost)} tensors of the index are not in their shard ({some(lost)})", again)
    if stray := [f"{name} in {shard}" for name, shard in found.keys() - listed]:
        text = f"the shards hold {len(stray)} tensors that the index does not name ({some(stray)})"
        raise LoadError(asked, text, again)
    return {name: info for (name, _), info in found.items()}, _merged([notes for _, notes in headers.values()])


def _merged(notes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    keys = dict.fromkeys(key for note in notes for key in note)
    values = {key: tuple(dict.fromkeys(note[key] for note in notes if key in note)) for key in keys}
    return {key: found[0] if len(found) == 1 else found for key, found in values.items()}
