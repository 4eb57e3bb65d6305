"""Which file of which format is meant: a format is told by the first bytes, never by a name; of a folder, the set of
weights with a variant's name, or with none.

Leaves out: what a file of each format holds."""

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from ditkit.checkpoints.files.text import read_json, readable, some
from ditkit.errors import LoadError

HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors library
OTHERS = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".gguf")  # looked at in a folder that has no safetensors
INDEX = re.compile(r"(.+)\.safetensors\.index(?:\.(.+))?\.json")
SHARD = re.compile(r"-\d{5}-of-\d{5}")
VARIANT = re.compile(r"(?:diffusion_pytorch_model|pytorch_model|model)\.(.+)")  # as diffusers and transformers name it
FORMATS: Mapping[str, tuple[re.Pattern[bytes], str]] = MappingProxyType({
    "gguf": (re.compile(b"GGUF"), "a GGUF file"), "torch": (re.compile(b"PK\x03\x04"), "a checkpoint of torch"),
    "old torch": (re.compile(b"\x80[\x02-\x05]"), "a pickle"), "index": (re.compile(rb"\s*\{"), "a JSON file"),
})  # fmt: skip
"""Formats besides safetensors -> how their files begin, and what to call one."""


def kind_of(file: Path) -> str:
    """The format, by the first bytes: ``safetensors``, ``index`` (of its shards), ``torch``, ``old torch`` (a bare
    pickle), ``gguf`` or ``unknown``. Raises LoadError when the file cannot be read."""
    asked = f"opening {file}"
    with readable(asked):
        if not stat.S_ISREG(file.stat().st_mode):  # a pipe would be waited for, a device never ends
            raise LoadError(asked, "it is no ordinary file", "Give a file of weights, or its folder")
        with file.open("rb") as stream:
            start = stream.read(9)
    if start[5:] == b"\0\0\0{":  # first, because the length before it may begin with the mark of another format
        return "safetensors"
    return next((kind for kind, (mark, _) in FORMATS.items() if mark.match(start)), "unknown")


def split_entry(path: Path) -> tuple[Path, str | None]:
    """``FILE#ENTRY`` names one of the state dicts of a training checkpoint; a file of that whole name comes first."""
    file, mark, entry = path.name.rpartition("#")
    if mark and file and entry and not os.path.exists(path) and path.with_name(file).is_file():
        return path.with_name(file), entry
    return path, None


def chosen(path: str | Path, variant: str | None) -> Path:
    """The file that is meant: ``path`` itself, or the one that ``_in_folder`` finds in it."""
    path = Path(path)
    if path.is_dir() or (path.suffix not in (".safetensors", ".json", *OTHERS) and not path.exists()):
        return _in_folder(path, variant)
    if variant is not None:
        raise LoadError(f"opening {path}", f"variant {variant!r} was given with a file", "Give its folder instead")
    return path


def _in_folder(folder: Path, variant: str | None) -> Path:
    """The index or the single file that ``variant`` means in ``folder``.

    A set is an index with its shards, or a file that no index names. ``None`` means the set without a variant in its
    name, as in diffusers; there must be exactly one. Where there are safetensors, files of other formats are not
    looked at: in the folders of diffusers and transformers they hold the same weights once more."""
    asked = f"loading weights from {folder}" + (f" (variant {variant!r})" if variant else "")
    if not folder.is_dir():
        raise LoadError(asked, "there is no such folder", "Check the path, or download the model")
    indices, loose = weight_files(folder)
    safe = [file for file in loose if file.suffix == ".safetensors"]
    loose = safe if indices or safe else loose
    if parts := [file.name for file in loose if SHARD.search(file.name)]:
        found = f"{len(parts)} shards are named by no index ({some(parts)})"
        raise LoadError(asked, found, "Add the .safetensors.index.json file")
    sets = {file: match[2] for file in indices if (match := INDEX.fullmatch(file.name))}
    sets |= {file: match[1] if (match := VARIANT.fullmatch(file.stem)) else None for file in loose}
    if not sets:
        found = "it holds no .safetensors file, and no " + ", ".join(OTHERS)
        raise LoadError(asked, found, "Check the path, or download the model again")
    fitting = [file for file, name in sets.items() if name == variant]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        found = f"{len(fitting)} sets of weights could be meant ({some(file.name for file in fitting)})"
        raise LoadError(asked, found, "Give the path of one of them")
    known = some({name or "none" for name in sets.values()})
    raise LoadError(asked, f"the weights there have other variants ({known})", "Ask for one of these variants")


def weight_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The indices in ``folder``, and the files of weights that none of them names."""
    files = sorted(file for file in folder.iterdir() if not file.is_dir())
    indices = [file for file in files if INDEX.fullmatch(file.name) and file.is_file()]
    claimed = {shard for index in indices for shard in read_shards(index).values()}
    return indices, [file for file in files if file.suffix in (".safetensors", *OTHERS) and file.name not in claimed]


def read_shards(index: Path) -> dict[str, str]:
    """tensor name -> shard file name, from ``*.safetensors.index.json``."""
    asked, names = f"reading {index}", read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(shard, str) for shard in names.values()):
        raise LoadError(asked, "it has no weight_map of tensor names to files", "Download the file again")
    if outside := {name for name in names.values() if Path(name).name != name or not name.endswith(".safetensors")}:
        raise LoadError(asked, f"it names {some(outside)}", "Use an index whose shards are safetensors files beside it")
    return names
