"""Weight files of any known format, opened: headers are read, data is not. Leaves out: what the names mean (kinds),
quantisation and prefixes (views)."""

from pathlib import Path

from ditkit.checkpoints.files.formats import INDEX, chosen, kind_of, split_entry
from ditkit.checkpoints.files.gguf import GGUFFile
from ditkit.checkpoints.files.pickles import PickleFile, PickleShards
from ditkit.checkpoints.files.safetensors import TensorFiles
from ditkit.checkpoints.files.stored import StoredTensors
from ditkit.checkpoints.views.prefixes import Section
from ditkit.checkpoints.views.source import TensorSource
from ditkit.errors import LoadError


def open_source(path: str | Path, variant: str | None = None, entry: str | None = None) -> TensorSource:
    """The tensors of a file of any known format, or of the one file or set of shards that ``path``, a folder, holds.

    ``variant`` selects among the sets of a folder, ``entry`` among the state dicts of a training checkpoint of torch,
    or the networks of another file, by the prefix of their names (``FILE#ENTRY`` says the same).
    What is given holds what the file stores: quantised weights are quantised still (``Dequantized``), names have their
    prefixes (``Unprefixed``). Raises LoadError; MissingDependency for a GGUF file without the gguf library."""
    if entry is None:
        path, entry = split_entry(Path(path))
    path = chosen(path, variant)
    try:
        path.name.encode()  # it goes into the manifest
    except UnicodeEncodeError:
        raise LoadError(f"opening {path!a}", "its name holds bytes that are no UTF-8", "Rename it") from None
    kind = kind_of(path)
    if kind in ("torch", "old torch"):
        return PickleFile(path, entry)
    source: StoredTensors
    if kind == "gguf":
        source = GGUFFile(path)
    elif (index := INDEX.fullmatch(path.name)) and index[2] == ".bin":
        source = PickleShards(path)
    else:
        source = TensorFiles(path)
    return source if entry is None else Section(source, f"{entry}.")
