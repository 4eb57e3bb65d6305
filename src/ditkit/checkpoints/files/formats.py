"""Which file of which format is meant: a format is told by the first bytes, never by a name; of a folder, the set of
weights with a variant's name, or with none. What systems and unfinished downloads leave in a folder is passed over.

Leaves out: what a file of each format holds."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from ditkit.checkpoints.files.text import read_json, readable, some
from ditkit.errors import LoadError
from ditkit.reading import UNFINISHED, WHOLE, folder_at, is_litter, open_ordinary, stranger

OTHERS = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".gguf")  # looked at in a folder that has no safetensors
INDEX = re.compile(r"(.+)(\.safetensors|\.bin)\.index(?:\.(.+))?\.json")
SHARD = re.compile(r"-\d{5}-of-\d{5}")
VARIANT = re.compile(r"(?:diffusion_pytorch_model|pytorch_model|model)\.(.+)")  # as diffusers and transformers name it
FORMATS: Mapping[str, tuple[re.Pattern[bytes], str]] = MappingProxyType({
    "gguf": (re.compile(b"GGUF"), "a GGUF file"), "torch": (re.compile(b"PK\x03\x04"), "a checkpoint of torch"),
    "old torch": (re.compile(b"\x80[\x02-\x05]"), "a pickle"), "index": (re.compile(rb"\s*\{"), "a JSON file"),
})  # fmt: skip
"""Formats besides safetensors -> how their files begin, and what to call one."""


def kind_of(file: Path) -> str:
    """The format, by the first bytes: ``safetensors``, ``index`` (of its shards), ``torch``, ``old torch`` (a bare
    pickle), ``gguf`` or ``unknown``. Raises LoadError when the file cannot be read, for what is no file of weights at
    the first glance (a web page, a pointer of git-lfs), and for a download that is not finished."""
    asked = f"opening {file}"
    with readable(asked), open_ordinary(file) as stream:
        start = stream.read(1024)
    if part := next((end for end in UNFINISHED if file.name.lower().endswith(end)), None):
        raise LoadError(asked, f"a name that ends with {part} is that of a download which is not finished", WHOLE)
    if os.path.lexists(beside := file.with_name(f"{file.name}.aria2")):
        raise LoadError(asked, f"its download is not finished ({beside.name} stands beside it)", WHOLE)
    if start[5:9] == b"\0\0\0{":  # first, because the length before it may begin with the mark of another format
        return "safetensors"
    kind = next((kind for kind, (mark, _) in FORMATS.items() if mark.match(start)), "unknown")
    if kind in ("index", "unknown") and (found := stranger(start)) is not None:
        raise LoadError(asked, *found)
    return kind


def split_entry(path: Path) -> tuple[Path, str | None]:
    """``FILE#ENTRY`` names one of the state dicts of a training checkpoint; a file of that whole name comes first."""
    file, mark, entry = path.name.rpartition("#")
    if mark and file and entry and not os.path.lexists(path) and os.path.isfile(path.with_name(file)):
        return path.with_name(file), entry
    return path, None


def chosen(path: str | Path, variant: str | None) -> Path:
    """The file that is meant: ``path`` itself, or the one that ``_in_folder`` finds in it."""
    path = Path(path)
    if folder_at(path, f"opening {path}"):
        return _in_folder(path, variant)
    if path.suffix not in (".safetensors", ".json", *OTHERS) and not os.path.exists(path):
        raise LoadError(
            f"loading weights from {path}", "there is no such folder", "Check the path, or download the model"
        )
    if variant is not None:
        raise LoadError(f"opening {path}", f"variant {variant!r} was given with a file", "Give its folder instead")
    return path


def _in_folder(folder: Path, variant: str | None) -> Path:
    """The index or the single file that ``variant`` means in ``folder``.

    A set is an index with its shards, or a file that no index names. ``None`` means the set without a variant in its
    name, as in diffusers; there must be exactly one. Where there are safetensors, files of other formats are not
    looked at: in the folders of diffusers and transformers they hold the same weights once more."""
    asked = f"loading weights from {folder}" + (f" (variant {variant!r})" if variant else "")
    indices, loose = weight_files(folder)
    indices, loose = safe_first(indices, loose)
    if parts := [file.name for file in loose if SHARD.search(file.name)]:
        raise LoadError(asked, f"{len(parts)} shards are named by no index ({some(parts)})", add_index(parts[0]))
    sets = {file: match[3] for file in indices if (match := INDEX.fullmatch(file.name))}
    sets |= {file: match[1] if (match := VARIANT.fullmatch(file.stem)) else None for file in loose}
    if not sets:
        found = "it holds no .safetensors file, and no " + ", ".join(OTHERS) + unfinished_in(folder)
        raise LoadError(asked, found, "Check the path, or download the model again")
    fitting = [file for file, name in sets.items() if name == variant]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        found = f"{len(fitting)} sets of weights could be meant ({some(file.name for file in fitting)})"
        raise LoadError(asked, found, "Give the path of one of them")
    known = some({name or "none" for name in sets.values()})
    raise LoadError(asked, f"the weights there have other variants ({known})", "Ask for one of these variants")


def safe_first(indices: list[Path], loose: list[Path]) -> tuple[list[Path], list[Path]]:
    """Only those of safetensors, where there are some."""
    safe = [file for file in loose if file.suffix == ".safetensors"]
    safe_indices = [file for file in indices if ".safetensors.index" in file.name]
    return (safe_indices, safe) if safe or safe_indices else (indices, loose)


def add_index(shard: str) -> str:
    """What to do about a shard that no index names."""
    return f"Add the {'.bin' if shard.endswith('.bin') else '.safetensors'}.index.json file that belongs to them"


def unfinished_in(folder: Path) -> str:
    """Words about downloads in ``folder`` that are not done; nothing where there are none."""
    names = [file.name for file in folder.iterdir() if file.name.lower().endswith((*UNFINISHED, ".icloud"))]
    return f" (downloads that are not finished: {some(names)})" if names else ""


def listed(folder: Path) -> list[Path]:
    """What stands in ``folder`` but for what systems leave there, in order."""
    return sorted(file for file in folder.iterdir() if not is_litter(file.name))


def weight_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The indices in ``folder``, and the files of weights that none of them names."""
    files = [file for file in listed(folder) if not os.path.isdir(file)]
    indices = [file for file in files if INDEX.fullmatch(file.name)]
    claimed = {shard for index in indices for shard in read_shards(index).values()}
    return indices, [file for file in files if file.suffix in (".safetensors", *OTHERS) and file.name not in claimed]


def read_shards(index: Path) -> dict[str, str]:
    """tensor name -> shard file name, from ``*.safetensors.index.json`` or ``*.bin.index.json``."""
    asked, told = f"reading {index}", read_json(index)
    names = told.get("weight_map")
    if names is None and not INDEX.fullmatch(index.name):
        what = told.get("_class_name", told.get("model_type"))
        found = f"it is a config{f' of {what}' if isinstance(what, str) else ''}, not weights"
        raise LoadError(asked, found, "Give its folder, or a file of weights")
    if not isinstance(names, dict) or not names or not all(isinstance(shard, str) for shard in names.values()):
        raise LoadError(asked, "it has no weight_map of tensor names to files", "Download the file again")
    end = match[2] if (match := INDEX.fullmatch(index.name)) else ".safetensors"
    if outside := {name for name in names.values() if Path(name).name != name or not name.endswith(end)}:
        raise LoadError(asked, f"it names {some(outside)}", f"Use an index whose shards are {end} files beside it")
    return names
