"""State dicts that torch.save wrote (``.pth``, ``.pt``, ``.bin``, ``.ckpt``), opened without running anything in them.

torch's own ``weights_only`` reader builds the names and shapes on the meta device and says where each storage lies in
the archive; the data is then read from the file like that of safetensors, into memory of its own. So nothing is mapped,
and a strided view of a large storage costs its own bytes. A checkpoint of a training run holds several state dicts:
these are its entries, and one of them is meant. Leaves out: bare pickles of torch before 1.6, TorchScript.
Sources: ``torch/serialization.py`` (``_checkpoint_offset``); PKWARE APPNOTE 4.3.7 (local headers of a zip)."""

import io
import math
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, BinaryIO

import torch
from torch import Tensor

from ditkit import limits
from ditkit.checkpoints.files.formats import kind_of
from ditkit.checkpoints.files.shards import sharded
from ditkit.checkpoints.files.stored import DTYPES, StoredTensors, TensorInfo
from ditkit.checkpoints.files.text import AGAIN, some
from ditkit.errors import LoadError, nearest, shortened
from ditkit.reading import open_ordinary

NAMES = MappingProxyType({dtype: name for name, dtype in DTYPES.items()})
_BYTEARRAY = re.compile(rb"c(__builtin__|builtins)\nbytearray\n")
SPREAD = 1 << 24  # bytes of a tensor of which several numbers may be one (``Tensor.expand``)
CONVERT = "Convert it to safetensors where you trust it"
EMA = "generator_ema"
"""The entry that is taken when none is named, and beside it are a generator and perhaps its critic. Source:
Self-Forcing ``inference.py``, whose ``--use_ema`` its authors recommend."""


class PickleFile(StoredTensors):
    """One state dict of a torch checkpoint. ``entries`` are the paths of all that the file holds (``""`` is the file
    itself), ``entry`` the one that is meant. ``notes`` says so when a rule chose it.

    Raises LoadError for TorchScript, for pickles that need code, for damaged archives, and for an entry that is not
    there or that must be named."""

    def __init__(self, path: str | Path, entry: str | None = None):
        path = Path(path)
        asked = f"opening {path}"
        records = _records(path, asked)
        try:
            found = dict(_state_dicts(_skeleton(path, asked)))
        except ValueError as error:
            if isinstance(error, LoadError):
                raise
            raise LoadError(asked, str(error), "Give a file of weights") from None
        self.entries = tuple(found)
        self.entry, self.notes = _select(self.entries, entry, asked)
        self.part = self.entry if len(self.entries) > 1 else ""
        tensors = {name: _info(path, name, tensor, records, asked) for name, tensor in found[self.entry].items()}
        super().__init__(path, tensors, {})


class PickleShards(StoredTensors):
    """The state dicts of an index and its shards (``pytorch_model.bin.index.json``) as one. Raises LoadError."""

    def __init__(self, index: Path):
        super().__init__(index, *sharded(index, lambda file: (PickleFile(file).tensors, {})))


def _select(known: tuple[str, ...], entry: str | None, asked: str) -> tuple[str, tuple[str, ...]]:
    if not known:
        raise LoadError(asked, "it holds no dictionary that has names and tensors only", "Give a file of weights")
    if entry is not None:
        if entry not in known:
            found = f"it has no entry {entry!r}{nearest(entry, known)}, only {some(map(repr, known))}"
            raise LoadError(asked, found, "Name one of these entries")
        return entry, ()
    if len(known) == 1:
        return known[0], ()
    if {EMA, "generator"} <= {*known} <= {EMA, "generator", "critic"}:
        return EMA, (f"the entry {EMA} of {some(known)} was taken, as the official inference code does",)
    raise LoadError(asked, f"it holds {len(known)} state dicts ({some(known)})", "Name one of them: FILE#ENTRY")


def _state_dicts(whole: Any) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    """Every dictionary of names and tensors, by its path in the dictionaries around it.

    One that several others hold has a path in each of them; what is around it is looked through once, or few bytes
    could spell more paths than there is time for. Raises ValueError for more of them than a checkpoint has."""
    seen, weights, count = set[int](), dict[int, bool](), 0
    level: list[tuple[str, Any]] = [("", whole)]
    for _ in range(limits.DEPTH):
        below: list[tuple[str, Any]] = []
        for path, value in level:
            if not isinstance(value, dict) or not value:
                continue
            if (count := count + 1) > limits.ENTRIES:
                raise ValueError(f"it holds more than {limits.ENTRIES:,} dictionaries")
            if id(value) not in weights:
                weights[id(value)] = all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
            if weights[id(value)]:
                yield path, value
            elif id(value) not in seen:
                seen.add(id(value))
                start = f"{path}." if path else ""
                below += [(start + key, item) for key, item in value.items() if isinstance(key, str)]
        if not below:
            return
        level = below
    raise ValueError(f"it holds more than {limits.DEPTH} dictionaries within each other")


def _records(path: Path, asked: str) -> dict[int, int]:
    """Where each record of the archive begins in the file -> its size. Raises LoadError if it is no checkpoint."""
    if (kind := kind_of(path)) == "old torch":
        found = "it is a bare pickle, the format of torch before 1.6"
        raise LoadError(asked, found, "Save it again with a newer torch, or convert it to safetensors")
    if kind != "torch":
        raise LoadError(asked, "it is no checkpoint of torch", "Give a file that torch.save wrote")
    try:
        with open_ordinary(path) as stream, zipfile.ZipFile(_Careful(stream)) as archive:
            members, size = archive.infolist(), os.fstat(stream.fileno()).st_size
            inside = {member.filename.partition("/")[2]: member for member in members}
            if len(inside) < len(members) or len({member.filename.partition("/")[0] for member in members}) > 1:
                raise LoadError(asked, "its records are not those of one archive of torch", AGAIN)
            if "constants.pkl" in inside or any(name.startswith("code/") for name in inside):
                raise LoadError(asked, "it is a TorchScript archive, which is a program", CONVERT)
            if "data.pkl" not in inside:
                raise LoadError(asked, "it is a zip archive without a state dict", "Give a file that torch.save wrote")
            if any(member.flag_bits & 0x1 for member in members):
                raise LoadError(asked, "its records are encrypted", "Use the file as torch.save wrote it")
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise LoadError(asked, "its records are compressed", "Use the file as torch.save wrote it")
            if inside["data.pkl"].file_size > limits.PICKLE:
                raise LoadError(asked, f"its names take {inside['data.pkl'].file_size:,} bytes", CONVERT)
            if _BYTEARRAY.search(archive.read(inside["data.pkl"])):  # of as many bytes as the pickle says
                raise LoadError(asked, "it is a pickle that needs to run bytearray when it is opened", CONVERT)
            order = inside.get("byteorder")
            if order is not None and (order.file_size > 16 or archive.read(order) != b"little"):
                raise LoadError(asked, "its numbers are big-endian", "Save it again on a little-endian machine")
            records = {_begin(stream, member): member.file_size for member in members}
            if any(begin + length > size for begin, length in records.items()):
                raise LoadError(asked, "its records end behind the end of the file", AGAIN)
            return records
    except (zipfile.BadZipFile, OSError, EOFError, struct.error, ValueError, RuntimeError) as error:
        if isinstance(error, LoadError):
            raise
        raise LoadError(asked, f"the archive cannot be read ({error})", AGAIN) from None


class _Careful(io.RawIOBase):
    """A file of which no more is read at once than a checkpoint needs: the list of a zip's records is read whole."""

    def __init__(self, stream: BinaryIO):
        self._stream = stream

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def read(self, count: int = -1) -> bytes:
        if count > limits.HEADER:
            raise zipfile.BadZipFile(f"its list of records has {count:,} bytes")
        return self._stream.read(count)


def _begin(stream: IO[bytes], member: zipfile.ZipInfo) -> int:
    """Of a record's data: a local header has 30 bytes, a name and an extra field."""
    stream.seek(member.header_offset + 26)
    name, extra = struct.unpack("<HH", stream.read(4))
    return member.header_offset + 30 + name + extra


def _skeleton(path: Path, asked: str) -> Any:
    """What was saved, with tensors that have no data; their storages know their place in the file."""
    try:
        if torch.__version__ < "2.11":  # there the meta device reads all data, and does not tell where it lay
            return _mapped(path)
        with open_ordinary(path) as stream:
            return torch.load(stream, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL (\S+)", str(error))
        needs = f"to run {match[1]}" if match else "more than tensors and names"
        raise LoadError(asked, f"it is a pickle that needs {needs} when it is opened", CONVERT) from None
    except Exception as error:  # the reader of a damaged or malicious pickle can fail in any way
        told = shortened(str(error).partition("\n")[0], limits.NAME)
        found = f"its contents cannot be understood ({type(error).__name__}: {told})"
        raise LoadError(asked, found, AGAIN) from None


def _mapped(path: Path) -> Any:
    """The same for an older torch, which tells no places: its tensors lie in a mapping of the file, so their addresses
    do."""
    from torch import _weights_only_unpickler, serialization

    whole = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
    with open_ordinary(path) as stream, serialization._open_zipfile_reader(stream) as archive:
        loaded = serialization._load(archive, "cpu", _weights_only_unpickler, overall_storage=whole)
    for _, found in _state_dicts(loaded):
        for tensor in found.values():
            storage = tensor.untyped_storage()
            storage._checkpoint_offset = storage.data_ptr() - whole.data_ptr()
    return loaded


def _info(path: Path, name: str, tensor: Tensor, records: Mapping[int, int], asked: str) -> TensorInfo:
    """Where ``tensor`` lies. Its storage must be a record, and must have room for it."""
    if tensor.layout != torch.strided or tensor.dtype not in NAMES or tensor.is_conj() or tensor.is_neg():
        kind = f"{tensor.dtype}, {tensor.layout}".replace("torch.", "")
        raise LoadError(asked, f"{name} is no plain tensor ({kind})", "Save plain tensors of a known type")
    begin: int = getattr(tensor.untyped_storage(), "_checkpoint_offset", -1)
    width, shape, stride = tensor.dtype.itemsize, tuple(tensor.shape), tuple(tensor.stride())
    span = 1 + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if tensor.numel() else 0
    first = int(tensor.storage_offset())
    if begin not in records or min((first, *stride)) < 0 or (first + span) * width > records[begin]:
        raise LoadError(asked, f"the archive does not hold the data of {name}", AGAIN)
    if tensor.numel() > span and tensor.numel() * width > SPREAD:
        raise LoadError(asked, f"{name} {list(shape)} stands for more numbers than the archive holds of it", CONVERT)
    plain = span == math.prod(shape) and tensor.is_contiguous()
    start, size = begin + first * width, span * width
    return TensorInfo(NAMES[tensor.dtype], shape, path, start, size, None if plain else stride)
