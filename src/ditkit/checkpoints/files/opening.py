"""Tensors on disk: which file of which format is meant, what a safetensors file or a sharded set holds, their bytes.

Only headers are read when a set is opened. Data is read with ordinary file reads into memory of its own: nothing is
mapped, so a file that changes later cannot change (or crash) a running model, and no second copy stands around.
The format is told by a file's first bytes, never by its name. Leaves out: what the names mean (keys.py), the formats
of torch (pickles.py) and GGUF (gguf.py), quantisation (quantized.py), prefixes (prefixes.py).
Source of the format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any

from ditkit.checkpoints.views.source import Inspect, no_inspection
from ditkit.errors import LoadError
from ditkit.store.hashes import HASHES

if TYPE_CHECKING:
    import torch

DTYPES = MappingProxyType({
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "C64": "complex64", "BOOL": "bool",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
})  # fmt: skip
"""Types as safetensors spells them -> as torch spells them."""

SIZES = MappingProxyType({"F64": 8, "C64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2,
                          "I16": 2, "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1, "I8": 1, "U8": 1})  # fmt: skip
PAGED = 2**20  # bytes; smaller tensors come from the ordinary heap
PIECE = 2**19  # bytes that are read at once, few enough to stay in a processor's cache
HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors library
OTHERS = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".gguf")  # looked at in a folder that has no safetensors
INDEX = re.compile(r"(.+)\.safetensors\.index(?:\.(.+))?\.json")
SHARD = re.compile(r"-\d{5}-of-\d{5}")
VARIANT = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)\.(.+)"
)  # the base names of diffusers and transformers


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: ``dtype`` as safetensors names it (``BF16``), ``start`` and ``size`` in bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def some(names: object, limit: int = 4) -> str:
    """The first few of many names, and how many more there are."""
    listed = sorted(names)  # type: ignore[call-overload]
    rest = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + rest


def printable(value: object) -> None:
    """Raises ValueError for halves of characters, which JSON can spell and no terminal can show."""
    json.dumps(value, ensure_ascii=False).encode()


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from ``file``. Raises LoadError when it is missing, unreadable or not an object."""
    asked = f"reading {file}"
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        printable(value)
    except FileNotFoundError:
        raise LoadError(asked, "there is no such file", "Check the path, or download the model again") from None
    except OSError as error:
        raise LoadError(asked, f"it cannot be read ({error.strerror})", "Check the file and its permissions") from None
    except ValueError as error:
        raise LoadError(asked, f"it is not valid JSON ({error})", "Download the file again") from None
    except RecursionError:
        raise LoadError(asked, "it is nested too deeply", "Download the file again") from None
    if not isinstance(value, dict):
        raise LoadError(asked, f"it holds a {type(value).__name__}, not an object", "Download the file again")
    return value


@contextmanager
def readable(asked: str) -> Iterator[None]:
    """What the disk refuses while looking around, such as a folder that may not be entered, raises LoadError."""
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        found = f"it cannot be read ({str(where)[:200]}{error.strerror})"
        raise LoadError(asked, found, "Check the path and its permissions") from None


def kind_of(file: Path) -> str:
    """The format, by the first bytes: ``safetensors``, ``index`` (of its shards), ``torch``, ``old torch`` (a bare
    pickle), ``gguf`` or ``unknown``. Raises LoadError when the file cannot be read."""
    asked = f"opening {file}"
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # a pipe would be waited for, a device never ends
            raise LoadError(asked, "it is no ordinary file", "Give a file of weights, or its folder")
        with file.open("rb") as stream:
            start = stream.read(9)
    except FileNotFoundError:
        raise LoadError(asked, "there is no such file", "Check the path, or download the model again") from None
    except OSError as error:
        raise LoadError(asked, f"it cannot be read ({error.strerror})", "Check the file and its permissions") from None
    if start[5:] == b"\0\0\0{":  # first, because the length before it may begin with the mark of another format
        return "safetensors"
    return next((kind for kind, mark in MARKS.items() if mark.match(start)), "unknown")


MARKS: Mapping[str, re.Pattern[bytes]] = MappingProxyType({
    "gguf": re.compile(b"GGUF"), "torch": re.compile(b"PK\x03\x04"), "old torch": re.compile(b"\x80[\x02-\x05]"),
    "index": re.compile(rb"\s*\{"),
})  # fmt: skip
KINDS: Mapping[str, str] = MappingProxyType({
    "torch": "a checkpoint of torch", "old torch": "a pickle", "gguf": "a GGUF file", "index": "a JSON file",
})  # fmt: skip


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Names and places of the tensors in one safetensors file, in the order of their bytes.

    Raises LoadError when the file is missing, is no safetensors file, or does not have the length its header says."""
    return _header(file)[0]


def _header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of ``read_header``, and the file's ``__metadata__``."""
    asked = f"opening {file}"
    again = "Download the file again, it is damaged or incomplete"
    if (kind := kind_of(file)) in KINDS:
        raise LoadError(asked, f"it is {KINDS[kind]}, not safetensors", "Convert it to safetensors")
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8:
                raise LoadError(asked, f"it has only {size} bytes", again)
            if length > min(size - 8, HEADER_LIMIT):
                found = f"it has {size} bytes, too few for a header of {length}"
                raise LoadError(asked, f"it is no safetensors file, or it is damaged ({found})", again)
            raw = stream.read(length)
    except OSError as error:
        raise LoadError(asked, f"it cannot be read ({error.strerror})", "Check the file and its permissions") from None
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
        metadata = dict(header.pop("__metadata__", None) or {})
        if not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("its __metadata__ holds something other than texts")
        printable(header)
        places = sorted(
            ((*entry["data_offsets"], name, entry["dtype"], entry["shape"]) for name, entry in header.items())
        )
        tensors, end = {}, 0
        for start, stop, name, dtype, shape in places:
            if dtype not in DTYPES:
                raise LoadError(
                    asked, f"{name} is stored as {dtype}", f"Use a file with types among {', '.join(DTYPES)}"
                )
            if not all(type(number) is int for number in (start, stop, *shape)):
                raise ValueError(f"the shape or the place of {name} is not made of whole numbers")
            if start != end or stop - start != math.prod(shape) * SIZES[dtype] or min(shape, default=0) < 0:
                raise ValueError(f"the bytes of {name} do not fit its shape {shape} or their neighbours")
            tensors[name] = TensorInfo(file, dtype, tuple(shape), 8 + length + start, stop - start)
            end = stop
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise LoadError(asked, f"its header cannot be understood ({error})", again) from None
    if 8 + length + end != size:
        raise LoadError(asked, f"it has {size} bytes where its header asks for {8 + length + end}", again)
    return tensors, metadata


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def read_shards(index: Path) -> dict[str, str]:
    """tensor name -> shard file name, from ``*.safetensors.index.json``."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(shard, str) for shard in names.values()):
        raise LoadError(f"reading {index}", "it has no weight_map of tensor names to files", "Download the file again")
    outside = {shard for shard in names.values() if Path(shard).name != shard or not shard.endswith(".safetensors")}
    if outside:
        raise LoadError(
            f"reading {index}", f"it names {some(outside)}", "Use an index whose shards are safetensors files beside it"
        )
    return names


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
        raise LoadError(
            asked, f"the shards hold {len(stray)} tensors that the index does not name ({some(stray)})", again
        )
    return {name: info for (name, _), info in found.items()}, _merged([notes for _, notes in headers.values()])


def _merged(notes: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """The notes of all shards: one value where they agree, a tuple of the different ones where they do not."""
    values: dict[str, dict[str, None]] = {}
    for note in notes:
        for key, value in note.items():
            values.setdefault(key, {})[value] = None
    return {key: next(iter(found)) if len(found) == 1 else tuple(found) for key, found in values.items()}


def _choose(folder: Path, variant: str | None) -> Path:
    """The index or the single file that ``variant`` means in ``folder``.

    A set is an index with its shards, or a file that no index names. ``None`` means the set without a variant in its
    name, as in diffusers; there must be exactly one. Where there are safetensors, files of other formats are not
    looked at: in the folders of diffusers and transformers they hold the same weights once more."""
    asked = f"loading weights from {folder}" + (f" (variant {variant!r})" if variant else "")
    if not folder.is_dir():
        raise LoadError(asked, "there is no such folder", "Check the path, or download the model")
    indices = {file: match for file in sorted(folder.iterdir()) if (match := INDEX.fullmatch(file.name))}
    claimed = {shard for index in indices for shard in read_shards(index).values()}
    loose = [file for file in sorted(folder.glob("*.safetensors")) if file.name not in claimed]
    if not indices and not loose:
        loose = [file for file in sorted(folder.iterdir()) if file.suffix in OTHERS]
    if parts := [file.name for file in loose if SHARD.search(file.name)]:
        raise LoadError(
            asked, f"{len(parts)} shards are named by no index ({some(parts)})", "Add the .safetensors.index.json file"
        )
    sets: dict[Path, str | None] = {index: match[2] for index, match in indices.items()}
    for file in loose:
        match = VARIANT.fullmatch(file.stem)
        sets[file] = match[1] if match else None
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


def _resolve(path: str | Path, variant: str | None) -> Path:
    """The file that is meant: ``path`` itself, or the one that ``_choose`` finds in it."""
    path = Path(path)
    if path.is_dir() or (path.suffix not in (".safetensors", ".json", *OTHERS) and not path.exists()):
        return _choose(path, variant)
    if variant is not None:
        raise LoadError(f"opening {path}", f"variant {variant!r} was given with a file", "Give its folder instead")
    return path


def split_entry(path: Path) -> tuple[Path, str | None]:
    """``FILE#ENTRY`` names one of the state dicts of a training checkpoint; a file of that whole name comes first."""
    file, mark, entry = path.name.rpartition("#")
    if mark and file and entry and not os.path.exists(path) and path.with_name(file).is_file():
        return path.with_name(file), entry
    return path, None


def open_source(path: str | Path, variant: str | None = None, entry: str | None = None) -> StoredTensors:
    """The tensors of a file of any known format, or of the one file or set of shards that ``path``, a folder, holds.

    ``variant`` selects among the sets of a folder, ``entry`` among the state dicts of a training checkpoint of torch
    (``FILE#ENTRY`` says the same).
    What is given holds what the file stores: quantised weights are quantised still (``Dequantized``), names have their
    prefixes (``Unprefixed``). Raises LoadError; MissingDependency for a GGUF file without the gguf library."""
    if entry is None:
        path, entry = split_entry(Path(path))
    path = _resolve(path, variant)
    kind = kind_of(path)
    if kind in ("torch", "old torch"):
        from ditkit.checkpoints.files.pickles import PickleFile

        return PickleFile(path, entry)
    if entry is not None:
        raise LoadError(f"opening {path}", f"entry {entry!r} was given with a file that has no entries", "Leave it out")
    if kind == "gguf":
        from ditkit.checkpoints.files.gguf import GGUFFile

        return GGUFFile(path)
    return TensorFiles(path)


class StoredTensors:
    """Tensors in files, of any format: ``tensors`` says where each lies, and data is read when it is asked for."""

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo], metadata: Mapping[str, Any]):
        if not tensors:
            raise LoadError(f"opening {path}", "it holds no tensors", "Download the file again")
        self.path = path
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(dict(tensors))
        self.metadata: Mapping[str, Any] = MappingProxyType(dict(metadata))
        self.files = tuple(dict.fromkeys(info.file for info in self.tensors.values()))
        self.notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}: {len(self.tensors)} tensors in {len(self.files)} files)"

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) one by one, each read once, in memory of its own."""
        for file in self.files:
            with file.open("rb", buffering=0) as stream:
                for name, info in self.tensors.items():
                    if info.file == file:
                        yield name, self._read(stream, name, info)

    def __getitem__(self, name: str) -> torch.Tensor:
        info = self.tensors[name]
        with info.file.open("rb", buffering=0) as stream:
            return self._read(stream, name, info)

    def _read(self, stream: IO[bytes], name: str, info: TensorInfo, look: Inspect = no_inspection) -> torch.Tensor:
        return read(stream, name, info, look)

    def cast(self, name: str, dtype: torch.dtype | None = None, look: Inspect = no_inspection) -> torch.Tensor:
        """The tensor as ``dtype``; where that is not the stored one, it is never whole in memory as it is stored."""
        import torch

        info = self.tensors[name]
        stored = getattr(torch, DTYPES.get(info.dtype, "uint8"))
        if dtype is None or dtype == stored:
            with info.file.open("rb", buffering=0) as stream:
                return self._read(stream, name, info, look)
        parts = self.pieces(name, stored.itemsize, PIECE)
        return converted(parts, info.shape, dtype, lambda part, begin: part.view(stored), look)

    def pieces(self, name: str, unit: int, size: int) -> Iterator[torch.Tensor]:
        info = self.tensors[name]
        with info.file.open("rb", buffering=0) as stream:
            yield from read_pieces(stream, name, info, max(1, size // unit) * unit)

    @property
    def sha256(self) -> dict[str, str]:
        """File name -> hex digest of its content, counted when asked for and remembered while the file stays as is."""
        return {file.name: file_hash(file) for file in self.files}

    @cached_property
    def fingerprint(self) -> str:
        """One hash over the contents of all files; their names do not matter."""
        return hashlib.sha256("".join(sorted(self.sha256.values())).encode()).hexdigest()

    @cached_property
    def sketch(self) -> str:
        """A hash that tells sets of weights apart in milliseconds: all headers, all sizes, and samples of the data.

        A change that lies between the samples is not seen; ``fingerprint`` sees all of them. Places do not matter."""
        names = [(name, info.dtype, info.shape, info.start, info.size) for name, info in self.tensors.items()]
        about = [names, [file_sample(file) for file in self.files]]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()


class TensorFiles(StoredTensors):
    """The tensors of one safetensors file, or of an index and its shards; ``path`` is either, or their folder.

    ``tensors`` maps each name to its TensorInfo, in the order of files and bytes. Opening checks all headers and
    reads no data. ``variant`` selects ``diffusion_pytorch_model.VARIANT.safetensors``. ``metadata`` is the header's
    ``__metadata__``; where shards differ in a value, a tuple of theirs. Raises LoadError for missing, damaged,
    contradictory and ambiguous files."""

    def __init__(self, path: str | Path, variant: str | None = None):
        path = _resolve(path, variant)
        super().__init__(path, *(_sharded(path) if path.suffix == ".json" else _header(path)))


def read(stream: IO[bytes], name: str, info: TensorInfo, look: Inspect = no_inspection) -> torch.Tensor:
    """The bytes of one tensor, contiguous, in memory of its own. Raises LoadError when the file ends before."""
    import torch

    tensor = new(info.shape, getattr(torch, DTYPES[info.dtype]))
    flat = tensor.reshape(-1)
    raw, items = _raw(flat), PIECE // flat.itemsize
    stream.seek(info.start)
    for begin in range(0, flat.numel(), items):
        part = flat[begin : begin + items]
        start = begin * flat.itemsize
        _fill(stream, raw[start : start + part.nbytes], name, info)
        look(part)
    return tensor


def read_pieces(stream: IO[bytes], name: str, info: TensorInfo, size: int) -> Iterator[torch.Tensor]:
    """The bytes of one tensor in turn, uint8 [size] and the rest; the memory is used again for each."""
    import torch

    buffer = torch.empty(min(size, info.size), dtype=torch.uint8)
    raw = _raw(buffer)
    stream.seek(info.start)
    for begin in range(0, info.size, size):
        count = min(size, info.size - begin)
        _fill(stream, raw[:count], name, info)
        yield buffer[:count]


def converted(
    parts: Iterable[torch.Tensor],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    numbers: Callable[[torch.Tensor, int], torch.Tensor],
    look: Inspect = no_inspection,
) -> torch.Tensor:
    """A new tensor made of stored bytes, piece by piece. ``numbers``: (bytes, how many numbers came before) -> the
    numbers in them, of any type; they are rounded to ``dtype`` here, once."""
    tensor = new(shape, dtype)
    flat, begin = tensor.reshape(-1), 0
    for part in parts:
        made = numbers(part, begin)
        piece = flat[begin : begin + made.numel()]
        piece.copy_(made.reshape(-1))
        look(piece)
        begin += made.numel()
    return tensor


def new(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor without data. A large one has pages of its own: freed, they go back at once. malloc keeps holes of up to
    32 MB, and with them a load with a cast peaked at two copies.

    The pages are private, because shared ones take a third more time, and a forked process would write into the weights
    of its parent. They are made at once, which takes a quarter less time than one after the other, when each is first
    written to; all of them will be."""
    import torch

    size = math.prod(shape) * dtype.itemsize
    if size <= PAGED:
        return torch.empty(tuple(shape), dtype=dtype)
    return torch.frombuffer(mmap.mmap(-1, size, **OWN), dtype=dtype).reshape(tuple(shape))


FLAGS = ("MAP_PRIVATE", "MAP_ANONYMOUS", "MAP_POPULATE")  # Windows has none of them, macOS not the last
OWN: Mapping[str, int] = MappingProxyType(
    {"flags": sum(getattr(mmap, flag, 0) for flag in FLAGS)} if hasattr(mmap, "MAP_PRIVATE") else {}
)


def _raw(tensor: torch.Tensor) -> memoryview:
    import torch

    data: Any = tensor.reshape(-1).view(torch.uint8).numpy()  # as bytes, because numpy has no bfloat16
    return memoryview(data)


def _fill(stream: IO[bytes], view: memoryview, name: str, info: TensorInfo) -> None:
    filled = 0
    while filled < len(view):
        count = stream.readinto(view[filled:])  # type: ignore[attr-defined]
        if not count:
            raise LoadError(f"reading {name} from {info.file}", "the file became shorter", "Download the file again")
        filled += count


def file_sample(file: Path, count: int = 17, length: int = 2**14) -> str:
    """sha256 of a file's size and of ``count`` even samples of ``length`` bytes, the first and the last among them."""
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            digest = hashlib.sha256(str(size).encode())
            for n in range(count):
                stream.seek(max(0, size - length) * n // (count - 1))
                digest.update(stream.read(length))
    except OSError as e:
        raise LoadError(f"reading {file}", f"it cannot be read ({e.strerror})", "Check the path") from None
    return digest.hexdigest()


def file_hash(file: Path) -> str:
    """sha256 of a file, remembered while the file stays as it is (``store/hashes.py``)."""
    return HASHES.of(file)
