"""State: everything that flows between stages. Named tensors and plain values, immutable, one file.

The same State is the wire format, the checkpoint of a half-finished run, the entry of a cache and what two
experiments are compared on. It saves to one safetensors file and loads from it bit for bit; plain values and
fingerprints travel in the file's metadata as JSON. Nothing is ever pickled.
Torch is imported only inside functions. Leaves out: what stages do with it (``execution``)."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditkit.errors import OutputError, StateError
from ditkit.reading import open_ordinary, value_of
from ditkit.request import renamed
from ditkit.writing import write_whole

try:
    from zlib_ng.zlib_ng import crc32  # the same number ten times sooner
except ModuleNotFoundError:
    from zlib import crc32

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = 1
ABOUT, SUM = "ditkit.state", "ditkit.crc32"
"""What the metadata of a file hold: all that is no tensor, and the checksum of everything."""


@dataclass(frozen=True)
class Field:
    """One row of the field table. ``kind`` is ``tensor``, ``tensors`` (a group by name) or ``plain`` (JSON).

    ``shape`` is a legend for people and for the checks of debug runs: letters are sizes that must agree. ``clips``
    tells how a State of several clips is divided: ``first`` along the first axis (what a legend that begins with B
    means too), ``rows:FIELD`` by the numbers of rows in that field, ``members`` for each tensor of a group along its
    first axis, ``names`` by the names in a group; empty: the value belongs to all clips."""

    name: str
    kind: str
    dtype: str
    shape: str
    unit: str
    written_by: str
    text: str
    clips: str = ""

    @property
    def divided(self) -> str:
        """``clips``, also where the legend says it."""
        return self.clips or ("first" if self.shape.split()[:1] == ["B"] else "")


FIELDS: dict[str, Field] = {
    f.name: f
    for f in (
        Field("prompt", "plain", "list[str]", "B", "", "the caller", "one prompt for each sample"),
        Field("negative_prompt", "plain", "list[str]", "B", "", "the caller", "what to steer away from"),
        Field("seed", "plain", "list[int]", "B", "", "the caller", "seed of each sample's noise"),
        Field("image", "tensor", "uint8", "B I J 3", "0..255", "the caller", "the picture that a video begins with"),
        Field("last_image", "tensor", "uint8", "B K L 3", "0..255", "the caller", "the picture that it ends with"),
        Field("control_video", "tensor", "uint8", "B T Y X 3", "0..255", "the caller", "frames that steer (VACE)"),
        Field("control_mask", "tensor", "float32", "B T y x", "0..1", "the caller", "1 where the model makes pixels"),
        Field("reference_images", "tensor", "uint8", "B N U V 3", "0..255", "the caller", "what shall appear (VACE)"),
        Field("remarks", "plain", "dict", "", "", "the caller", "which pictures are not as their files, and how"),
        Field("request", "plain", "dict", "", "", "the caller", "the resolved Request, all defaults filled in"),
        Field("model", "plain", "dict", "", "", "the caller", "name and identity of the model that it was begun with"),
        Field("weights", "plain", "dict", "", "", "the pipeline", "fingerprint of each component that worked on it"),
        Field("stages", "plain", "list[str]", "", "", "the pipeline", "names of the stages that have run, in order"),
        Field("records", "plain", "dict", "", "", "the pipeline", "for each stage that ran, what its result came from"),
        Field("expanded_prompt", "plain", "list[str]", "B", "", "expand_prompt", "what is encoded instead of prompt"),
        Field("expansion", "plain", "list[dict]", "B", "", "expand_prompt", "how each prompt was expanded"),
        Field("prompt_embeds", "tensor", "float", "R D", "", "encode_text", "text rows, prompt after prompt",
              "rows:prompt_lengths"),
        Field("prompt_lengths", "plain", "list[int]", "B", "rows", "encode_text", "rows of each prompt"),
        Field("negative_prompt_embeds", "tensor", "float", "Q D", "", "encode_text", "of the negative prompts",
              "rows:negative_prompt_lengths"),
        Field("negative_prompt_lengths", "plain", "list[int]", "B", "rows", "encode_text", "the same"),
        Field("image_embeds", "tensor", "float", "B r d", "", "encode_image", "CLIP features of the pictures"),
        Field("condition", "tensor", "float32", "B c F h w", "", "encode_condition", "mask and picture latents"),
        Field("clean_latents", "tensor", "float32", "B C k h w", "normalised", "encode_first_frame", "known frames"),
        Field("control", "tensor", "float32", "B v F h w", "", "encode_control", "the control input of VACE"),
        Field("sigmas", "plain", "list[float]", "S", "0..1", "denoise", "the resolved noise levels, last one 0"),
        Field("latents", "tensor", "float32", "B C F h w", "normalised", "denoise", "the sample after ``step`` steps"),
        Field("step", "plain", "int", "", "steps done", "denoise", "how many steps have been taken"),
        Field("history", "tensors", "float", "", "", "denoise", "what the scheduler remembers", "members"),
        Field("memory", "tensors", "any", "", "", "denoise", "what plugs remember, by plug and branch", "names"),
        Field("video", "tensor", "uint8", "B T H W 3", "0..255", "decode_latents", "finished frames, RGB"),
    )
}  # fmt: skip


def _is_tensor(value: Any) -> bool:
    return type(value).__module__.startswith("torch") and hasattr(value, "untyped_storage")


def _is_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(_is_tensor(v) for v in value.values())


def kind_of(value: Any) -> str:
    """``tensor``, ``tensors`` or ``plain``, as in the field table. A group without members is ``plain``."""
    return "tensor" if _is_tensor(value) else "tensors" if _is_tensors(value) else "plain"


def _plain(name: str, value: Any) -> Any:
    """A deep copy through JSON: proves that the value is plain, and keeps the State immutable."""
    try:
        text = json.dumps(value, allow_nan=False, ensure_ascii=False)
        text.encode()  # no halves of characters, which no file could hold as text
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as e:
        asked, found = f"field {name!r} was set to a {type(value).__name__}", "a State holds tensors and plain JSON"
        do = "Convert it to a tensor, a number, a string, a list or a dict"
        raise StateError(asked, f"{found} ({e})", do) from None


def _field(name: str, value: Any) -> Any:
    """What a State holds for ``value``. In its file a tensor of a group is called FIELD/MEMBER, hence the rule."""
    group = _is_tensors(value)
    if not all(isinstance(n, str) and n for n in [name, *(value if group else ())]) or "/" in name:
        raise StateError(f"a field with the name {name!r}", "a file could not keep it apart from others",
                         "Give it, and each tensor of a group, a name; a field's name has no slash")  # fmt: skip
    return value if _is_tensor(value) else dict(value) if group else _plain(name, value)


class State(Mapping[str, Any]):
    """An immutable mapping from field names to tensors, groups of tensors or plain values.

    ``fingerprints`` names, for some fields, the computation that made them (``execution/records.py``). Tensors are
    shared, not copied, and must not be written to."""

    def __init__(self, fields: Mapping[str, Any] | None = None, fingerprints: Mapping[str, str] | None = None):
        self._fields = {name: _field(name, value) for name, value in (fields or {}).items()}
        self._fingerprints = {k: v for k, v in (fingerprints or {}).items() if k in self._fields}

    @property
    def fingerprints(self) -> dict[str, str]:
        return dict(self._fingerprints)

    def fingerprint_of(self, name: str) -> str:
        """The fingerprint of a field; of a field that the caller brought, the hash of its content."""
        return self._fingerprints.get(name) or digest(name, self[name])

    def __getitem__(self, name: str) -> Any:
        value = self._fields[name]
        return value if _is_tensor(value) else dict(value) if _is_tensors(value) else _plain(name, value)

    def __iter__(self) -> Iterator[str]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __repr__(self) -> str:
        def show(value: Any) -> str:
            if _is_tensor(value):
                return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
            if _is_tensors(value):
                return f"{{{', '.join(f'{k}: {show(v)}' for k, v in value.items())}}}"
            return repr(value)

        return f"State({', '.join(f'{name}={show(value)}' for name, value in self._fields.items())})"

    def with_fields(self, fields: Mapping[str, Any], fingerprints: Mapping[str, str] | None = None) -> State:
        """A new State in which ``fields`` are replaced or added; fingerprints of replaced fields are dropped."""
        kept = {k: v for k, v in self._fingerprints.items() if k not in fields}
        return State({**self._fields, **fields}, {**kept, **(fingerprints or {})})

    def without(self, *names: str) -> State:
        return State({k: v for k, v in self._fields.items() if k not in names}, self._fingerprints)

    def _tensors(self) -> dict[str, Tensor]:
        out: dict[str, Any] = {}
        for name, value in self._fields.items():
            if _is_tensor(value):
                out[name] = value
            elif _is_tensors(value):
                out |= {f"{name}/{key}": tensor for key, tensor in value.items()}
        return out

    def to_bytes(self, summed: bool = True) -> bytes:
        """The safetensors file as bytes, as ``save`` writes it; ``summed``: with its checksum."""
        return b"".join(self.buffers(summed))

    def buffers(self, summed: bool = False) -> list[bytes | memoryview]:
        """The same file as its header and the memory of the tensors themselves, where that is on the CPU and dense.
        ``summed``: with a CRC-32 of all that it says, so that whoever reads it finds a bit that flipped. That is no
        signature. What else is checked, such as a message on its way, needs none."""
        plain = {k: v for k, v in self._fields.items() if not _is_tensor(v) and not _is_tensors(v)}
        about = {"schema": SCHEMA, "plain": plain, "fingerprints": self._fingerprints}
        tensors = sorted(self._tensors().items(), key=lambda item: (-item[1].element_size(), item[0]))  # so all align
        metadata = {ABOUT: json.dumps(about, sort_keys=True)}
        header: dict[str, Any] = {"__metadata__": metadata}
        at, views = 0, []
        for key, tensor in tensors:
            view = _bits(tensor).reshape(-1).numpy().data if tensor.numel() else memoryview(b"")
            header[key] = {
                "dtype": _code(tensor.dtype), "shape": list(tensor.shape), "data_offsets": [at, at + len(view)],
            }  # fmt: skip
            at += len(view)
            views.append(view)
        if summed:
            metadata[SUM] = _sum(metadata[ABOUT], header, views)
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return [struct.pack("<Q", len(text)) + text, *views]

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview, source: str = "the given bytes") -> State:
        return cls.from_buffer(bytearray(data), source)

    @classmethod
    def from_buffer(cls, data: bytearray | memoryview, source: str = "the given bytes") -> State:
        """A State whose tensors lie in ``data`` itself, which must not be written to any more. Raises StateError."""
        asked, again = f"loading a State from {source}", "Save the State again"
        try:
            tensors, metadata, found_sum = _read(data)
            text = metadata.get(ABOUT)
        except MemoryError:
            raise StateError(asked, "there is no room for what it claims to hold", again) from None
        except (struct.error, ValueError, TypeError, KeyError, AttributeError, RuntimeError, OverflowError) as e:
            raise StateError(asked, f"it is not a complete safetensors file ({e!s:.200})", again) from None
        if text is None:
            found = "it is a safetensors file without a ditkit State in it"
            raise StateError(asked, found, "Pass a file that `ditkit run --save-state` wrote")
        if not {*metadata} <= {ABOUT, SUM} or metadata.get(SUM, found_sum) != found_sum:
            raise StateError(asked, "it is damaged: what it holds is not what was written (checksum)", again)
        try:
            header = value_of(text)
            schema, plain, fingerprints = header["schema"], header.get("plain"), header.get("fingerprints")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
            raise StateError(asked, f"its description is damaged ({e!r})", again) from None
        if schema != SCHEMA:
            raise StateError(asked, f"it has State version {schema}; this ditkit reads version {SCHEMA}",
                             "Load it with the ditkit version that wrote it, or make it again")  # fmt: skip
        single = {key: tensor for key, tensor in tensors.items() if "/" not in key}
        groups: dict[str, dict[str, Tensor]] = {}
        for key in (key for key in tensors if key not in single):
            name, _, member = key.partition("/")
            groups.setdefault(name, {})[member] = tensors[key]
        sound = isinstance(plain, dict) and isinstance(fingerprints, dict)
        sound = sound and all(isinstance(f, str) for f in fingerprints.values())
        if not sound or len({*plain, *single, *groups}) < len(plain) + len(single) + len(groups):  # a name twice
            raise StateError(asked, "its description is damaged", again)
        try:
            return cls({**_today(plain), **single, **groups}, fingerprints)
        except ValueError as e:  # a setting by two names
            raise StateError(asked, str(e), again) from None

    def save(self, path: str | os.PathLike[str], durable: bool = True) -> Path:
        """Write one file with a checksum (``write_whole``): whole or not at all, and ``durable`` unless that is asked
        not to be. Raises OutputError."""
        path = Path(path)
        if os.path.isdir(path):
            do = "Give a file name, such as state.safetensors"
            raise OutputError(f"saving the State to {path}", "that is a folder", do)
        write_whole(path, self.buffers(summed=True), f"saving the State to {path}", durable)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> State:
        """Raises StateError, also for what is no ordinary file: a pipe would be waited for, a device never ends."""
        try:
            data = _contents(Path(path))
        except (OSError, MemoryError) as e:  # a file may claim any size
            found = getattr(e, "strerror", None) or str(e) or "it is larger than the memory"
            raise StateError(f"loading a State from {path}", found, "Check the path") from None
        return cls.from_buffer(data, str(path))

    def equal(self, other: State) -> bool:
        """Same fields, bit-equal tensors, same dtypes, equal plain values (fingerprints aside)."""
        import torch

        mine, theirs = self._tensors(), other._tensors()
        if set(self) != set(other) or set(mine) != set(theirs):
            return False
        same = all(mine[k].dtype == theirs[k].dtype and torch.equal(_bits(mine[k]), _bits(theirs[k])) for k in mine)
        return same and all(self[k] == other[k] for k in self if k not in mine and not _is_tensors(self._fields[k]))


def _today(plain: dict[str, Any]) -> dict[str, Any]:
    """Plain fields with the settings of their request and records under today's names."""
    if isinstance(plain.get("request"), dict):
        plain = {**plain, "request": renamed(plain["request"])}
    records = plain.get("records")
    if not isinstance(records, dict):
        return plain
    sound = {n: r for n, r in records.items() if isinstance(r, dict) and isinstance(r.get("settings"), dict)}
    return {**plain, "records": records | {n: {**r, "settings": renamed(r["settings"])} for n, r in sound.items()}}


CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "complex64": "C64", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
"""torch's name of a dtype -> that of the safetensors format."""

_DTYPES = {code: name for name, code in CODES.items()}


def _code(dtype: Any) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in CODES:
        raise StateError(f"saving a tensor of dtype {name}", "its file knows no such dtype", "Convert it")
    return CODES[name]


def _contents(path: Path) -> bytearray:
    with open_ordinary(path) as file:
        data = bytearray(os.fstat(file.fileno()).st_size)
        size = file.readinto(data)
        del data[size:]
        return data


def _sum(about: str, header: Mapping[str, Any], tensors: Iterable[bytes | memoryview]) -> str:
    """CRC-32 of what a file says: the plain values, names, dtypes and shapes of the tensors, and their bytes, all in
    the order in which they lie. Where they lie and how the header spells it is not in it."""
    facts = [[name, each["dtype"], each["shape"]] for name, each in header.items() if name != "__metadata__"]
    found = crc32(json.dumps([about, facts]).encode())
    for piece in tensors:
        found = crc32(piece, found)
    return f"{found:08x}"


def _read(data: bytearray | memoryview) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """Tensors in the memory of ``data``, the metadata and the checksum of a safetensors file: each byte belongs to one
    tensor, or it is no such file. The checksum is empty where the file has none. Raises ValueError and whatever a
    damaged header leads to."""
    import torch

    (size,) = struct.unpack("<Q", data[:8])
    if size > len(data) - 8:
        raise ValueError("it ends within its header")
    header = value_of(bytes(data[8 : 8 + size]).decode())
    metadata, end, tensors = header.pop("__metadata__", {}), 0, {}
    header = dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"]))
    for name, about in header.items():
        dtype, shape, (start, stop) = getattr(torch, _DTYPES[about["dtype"]]), about["shape"], about["data_offsets"]
        if any(type(n) is not int or n < 0 for n in shape):  # a list times a number is a long list
            raise ValueError(f"{name!r} has no such shape")
        count = math.prod(shape)
        if start != end or stop - start != count * dtype.itemsize:
            raise ValueError(f"{name!r} is not where its header says")
        end, at = stop, 8 + size + start
        if end > len(data) - 8 - size:
            raise ValueError("it ends within its tensors")
        if count == 0:
            tensors[name] = torch.empty(shape, dtype=dtype)
        elif at % dtype.itemsize:
            tensors[name] = torch.frombuffer(bytearray(data[at : at + stop - start]), dtype=dtype).reshape(shape)
        else:
            tensors[name] = torch.frombuffer(data, dtype=dtype, count=count, offset=at).reshape(shape)
    if end != len(data) - 8 - size:
        raise ValueError("it has bytes that belong to no tensor")
    summed = SUM in metadata
    return tensors, metadata, _sum(metadata.get(ABOUT, ""), header, [memoryview(data)[8 + size :]]) if summed else ""


def _bits(t: Tensor) -> Tensor:
    import torch

    t = t.detach().cpu().contiguous()
    return t.view(torch.uint8) if t.dim() else t.reshape(1).view(torch.uint8)


def digest(*parts: Any) -> str:
    """A hash over plain values (canonical JSON) and tensors (dtype, shape and bits)."""
    h = hashlib.sha256()
    for part in parts:
        if _is_tensor(part):
            h.update(f"{part.dtype}{tuple(part.shape)}".encode())
            h.update(_bits(part).numpy().tobytes())
        elif _is_tensors(part):
            h.update(digest(*(x for key in sorted(part) for x in (key, part[key]))).encode())
        else:
            h.update(json.dumps(part, sort_keys=True).encode())
        h.update(b"\0")
    return h.hexdigest()
