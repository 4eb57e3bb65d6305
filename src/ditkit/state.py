"""State: everything that flows between stages. Named tensors and plain values, immutable, one file.

The same State is the wire format, the checkpoint of a half-finished run, the entry of a cache and what two
experiments are compared on. It saves to one safetensors file and loads from it bit for bit; plain values and
fingerprints travel in the file's metadata as JSON. Nothing is ever pickled.
Torch is imported only inside functions. Leaves out: what stages do with it (``pipeline.py``).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditkit.errors import OutputError, StateError

if TYPE_CHECKING:
    from torch import Tensor

SCHEMA = 1


@dataclass(frozen=True)
class Field:
    """One row of the field table. ``kind`` is ``tensor``, ``tensors`` (a group by name) or ``plain`` (JSON).

    ``shape`` is a legend for people and for the checks of debug runs: letters are sizes that must agree."""

    name: str
    kind: str
    dtype: str
    shape: str
    unit: str
    written_by: str
    text: str


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
        Field("request", "plain", "dict", "", "", "the caller", "the resolved Request, all defaults filled in"),
        Field("model", "plain", "dict", "", "", "the caller", "name and identity of the model that it was begun with"),
        Field("weights", "plain", "dict", "", "", "the pipeline", "fingerprint of each component that worked on it"),
        Field("stages", "plain", "list[str]", "", "", "the pipeline", "names of the stages that have run, in order"),
        Field("records", "plain", "dict", "", "", "the pipeline", "for each stage that ran, what its result came from"),
        Field("expanded_prompt", "plain", "list[str]", "B", "", "expand_prompt", "what is encoded instead of prompt"),
        Field("expansion", "plain", "list[dict]", "B", "", "expand_prompt", "how each prompt was expanded"),
        Field("prompt_embeds", "tensor", "float", "R D", "", "encode_text", "text rows, prompt after prompt"),
        Field("prompt_lengths", "plain", "list[int]", "B", "rows", "encode_text", "rows of each prompt"),
        Field("negative_prompt_embeds", "tensor", "float", "Q D", "", "encode_text", "of the negative prompts"),
        Field("negative_prompt_lengths", "plain", "list[int]", "B", "rows", "encode_text", "the same"),
        Field("image_embeds", "tensor", "float", "B r d", "", "encode_image", "CLIP features of the pictures"),
        Field("condition", "tensor", "float32", "B c F h w", "", "encode_condition", "mask and picture latents"),
        Field("clean_latents", "tensor", "float32", "B C k h w", "normalised", "encode_first_frame", "known frames"),
        Field("control", "tensor", "float32", "B v F h w", "", "encode_control", "the control input of VACE"),
        Field("sigmas", "plain", "list[float]", "S", "0..1", "denoise", "the resolved noise levels, last one 0"),
        Field("latents", "tensor", "float32", "B C F h w", "normalised", "denoise", "the sample after ``step`` steps"),
        Field("step", "plain", "int", "", "steps done", "denoise", "how many steps have been taken"),
        Field("history", "tensors", "float", "", "", "denoise", "what the solver remembers"),
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
        copied = json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as e:
        raise StateError(
            f"field {name!r} was set to a {type(value).__name__}",
            f"a State holds tensors and plain JSON values ({e})",
            "Convert it to a tensor, a number, a string, a list or a dict",
        ) from None
    return copied


def _field(name: str, value: Any) -> Any:
    """What a State holds for ``value``. In its file a tensor of a group is called FIELD/MEMBER, hence the rule."""
    group = _is_tensors(value)
    if not all(isinstance(n, str) and n for n in [name, *(value if group else ())]) or "/" in name:
        raise StateError(f"a field with the name {name!r}", "a file could not keep it apart from others",
                         "Give it, and each tensor of a group, a name; a field's name has no slash")  # fmt: skip
    return value if _is_tensor(value) else dict(value) if group else _plain(name, value)


class State(Mapping[str, Any]):
    """An immutable mapping from field names to tensors, groups of tensors or plain values.

    ``fingerprints`` names, for some fields, the computation that made them (see ``pipeline.py``). Tensors are shared,
    not copied, and must not be written to."""

    def __init__(self, fields: Mapping[str, Any] | None = None, fingerprints: Mapping[str, str] | None = None):
        self._fields = {name: _field(name, value) for name, value in (fields or {}).items()}
        self._fingerprints = {k: v for k, v in (fingerprints or {}).items() if k in self._fields}

    @property
    def fingerprints(self) -> dict[str, str]:
        return dict(self._fingerprints)

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
            return (
                "{" + ", ".join(f"{k}: {show(v)}" for k, v in value.items()) + "}"
                if _is_tensors(value)
                else repr(value)
            )

        return "State(" + ", ".join(f"{name}={show(value)}" for name, value in self._fields.items()) + ")"

    def with_fields(self, fields: Mapping[str, Any], fingerprints: Mapping[str, str] | None = None) -> State:
        """A new State in which ``fields`` are replaced or added; fingerprints of replaced fields are dropped."""
        kept = {k: v for k, v in self._fingerprints.items() if k not in fields}
        return State({**self._fields, **fields}, {**kept, **(fingerprints or {})})

    def without(self, *names: str) -> State:
        return State({k: v for k, v in self._fields.items() if k not in names}, self._fingerprints)

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self._tensors().values())

    def _tensors(self) -> dict[str, Tensor]:
        out: dict[str, Any] = {}
        for name, value in self._fields.items():
            if _is_tensor(value):
                out[name] = value
            elif _is_tensors(value):
                out |= {f"{name}/{key}": tensor for key, tensor in value.items()}
        return out

    def to_bytes(self) -> bytes:
        """The safetensors file as bytes."""
        from safetensors.torch import save

        tensors: dict[str, Tensor] = {}
        memory: set[int] = set()
        for key, tensor in self._tensors().items():
            tensor = tensor.detach().cpu().contiguous()
            place = tensor.untyped_storage().data_ptr()
            tensors[key] = tensor.clone() if place in memory else tensor  # safetensors wants each in memory of its own
            memory.add(place)
        plain = {k: v for k, v in self._fields.items() if not _is_tensor(v) and not _is_tensors(v)}
        header = {"schema": SCHEMA, "plain": plain, "fingerprints": self._fingerprints}
        return save(tensors, {"ditkit.state": json.dumps(header, sort_keys=True)})

    @classmethod
    def from_bytes(cls, data: bytes, source: str = "the given bytes") -> State:
        from safetensors import SafetensorError
        from safetensors.torch import load

        asked = f"loading a State from {source}"
        try:
            tensors = load(data)
            (size,) = struct.unpack("<Q", data[:8])
            text = json.loads(data[8 : 8 + size]).get("__metadata__", {}).get("ditkit.state")
        except (SafetensorError, struct.error, UnicodeDecodeError, json.JSONDecodeError) as e:
            raise StateError(asked, f"it is not a complete safetensors file ({e})", "Save the State again") from None
        if text is None:
            raise StateError(asked, "it is a safetensors file without a ditkit State in it",
                             "Pass a file that `ditkit run --save-state` wrote")  # fmt: skip
        try:
            header = json.loads(text)
            schema, plain, fingerprints = header["schema"], header.get("plain"), header.get("fingerprints")
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            raise StateError(asked, f"its description is damaged ({e!r})", "Save the State again") from None
        if schema != SCHEMA:
            raise StateError(asked, f"it has State version {schema}; this ditkit reads version {SCHEMA}",
                             "Load it with the ditkit version that wrote it, or make it again")  # fmt: skip
        single = {key: tensor for key, tensor in tensors.items() if "/" not in key}
        groups: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, slash, member = key.partition("/")
            if slash:
                groups.setdefault(name, {})[member] = tensor
        sound = isinstance(plain, dict) and isinstance(fingerprints, dict)
        sound = sound and all(isinstance(f, str) for f in fingerprints.values())
        if not sound or len({*plain, *single, *groups}) < len(plain) + len(single) + len(groups):  # a name twice
            raise StateError(asked, "its description is damaged", "Save the State again")
        return cls({**plain, **single, **groups}, fingerprints)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one file, complete or not at all. Raises OutputError where the disk or the path does not allow it."""
        path = Path(path)
        if path.is_dir():
            raise OutputError(
                f"saving the State to {path}", "that is a folder", "Give a file name, such as state.safetensors"
            )
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(self.to_bytes())
            os.replace(temporary, path)
        except OSError as e:
            raise OutputError(
                f"saving the State to {path}", e.strerror or str(e), "Free some space or choose another place"
            ) from None
        finally:
            with contextlib.suppress(OSError):  # renamed, or never made
                temporary.unlink()
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> State:
        try:
            data = Path(path).read_bytes()
        except OSError as e:
            raise StateError(f"loading a State from {path}", e.strerror or str(e), "Check the path") from None
        return cls.from_bytes(data, str(path))

    def equal(self, other: State) -> bool:
        """Same fields, bit-equal tensors, same dtypes, equal plain values (fingerprints aside)."""
        import torch

        mine, theirs = self._tensors(), other._tensors()
        if set(self) != set(other) or set(mine) != set(theirs):
            return False
        same = all(mine[k].dtype == theirs[k].dtype and torch.equal(_bits(mine[k]), _bits(theirs[k])) for k in mine)
        return same and all(self[k] == other[k] for k in self if k not in mine and not _is_tensors(self._fields[k]))


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
