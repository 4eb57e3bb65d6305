"""Weights that are stored in 8 bits or fewer, seen as the numbers that they stand for: W = q * scale.

The flavour is told by names, types and metadata. A scale belongs to exactly one weight and a weight that needs a scale
has exactly one: whatever does not fit is an error, because a scale that is lost gives garbage and no error later.
Flavours that are not computed here are refused by name. Leaves out: arithmetic in 8 bits, quantising, LoRA.
Sources: ComfyUI ``comfy/ops.py``, ``comfy/quant_ops.py``, ``QUANTIZATION.md``; LightX2V ``lightx2v/common/ops``."""

import functools
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ditkit.checkpoints.files import gguf
from ditkit.checkpoints.files.gguf import BLOCKS
from ditkit.checkpoints.files.stored import DTYPES, converted
from ditkit.checkpoints.files.text import json_object, some
from ditkit.checkpoints.views.prefixes import MARKERS, Section, shared_prefix, unwrapped
from ditkit.checkpoints.views.source import Facts, Inspect, Stored, TensorSource, View
from ditkit.errors import LoadError

EIGHT_BITS = ("F8_E4M3", "F8_E5M2", "I8")
FORMATS = MappingProxyType({"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int8_tensorwise": "I8"})
"""ComfyUI's names of formats that are computed here -> how their weights are stored."""
WITHOUT_EFFECT = frozenset({"format", "full_precision_matrix_mult"})  # options that do not change what a weight is
SCALES = (".scale_weight", ".weight_scale")
ACTIVATIONS = (".scale_input", ".input_scale")
SETTINGS = ".comfy_quant"
METADATA = "_quantization_metadata"
REFUSED: Mapping[str, str] = MappingProxyType({
    ".weight_scale_2": "NVFP4", ".pre_quant_scale": "smoothed (AWQ) weights with pre_quant_scale",
    ".weight_s_rel": "ConvRot W4A8", ".weight_codebook": "ConvRot W4A8",
    ".qweight": "SVDQuant (nunchaku), GPTQ or AWQ", ".wscales": "SVDQuant (nunchaku)",
    ".smooth_factor": "SVDQuant (nunchaku)", ".qzeros": "GPTQ or AWQ", ".weight._data": "quanto",
    ".weight._scale": "quanto", ".weight.absmax": "bitsandbytes", ".weight.quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes",
})  # fmt: skip
"""Ends of names -> flavours that are not computed here."""
CODES = 2**17  # 8-bit codes that are turned into numbers at once, few enough to stay in a processor's cache
PAIRS = 2**16  # two 8-bit codes at once, where there are more codes than pairs


def _beside(name: str) -> bool:
    """Whether a tensor is there for others, or for the file, and is no weight itself."""
    return name in MARKERS or name.endswith((*SCALES, *ACTIVATIONS, SETTINGS))


class Dequantized(View):
    """``source``, whose names are bare (``Unprefixed``), with all quantised weights as numbers in float32.

    Other tensors stay as they are stored; scales, markers and the like are gone. ``quantization`` names the flavour
    (``fp8``, ``fp8_scaled``, ``int8``, ``gguf Q4_K``), None when nothing is quantised. ``notes`` lists what was left
    out. Opening reads the small settings tensors of ComfyUI only. Raises LoadError for scales without their weights,
    weights without their scales, contradictions, and flavours that are not supported."""

    def __init__(self, source: TensorSource):
        super().__init__(source)
        self._asked = f"opening the quantised weights in {source.path}"
        self._refuse()
        self._weights = self._find(self._settings())
        self.notes += tuple(_notes(source.tensors))
        self.tensors = MappingProxyType({
            name: Facts("F32", facts.shape) if name in self._weights else facts
            for name, facts in source.tensors.items() if not _beside(name)
        })  # fmt: skip

    @property
    def quantization(self) -> str | None:
        """The flavour: of the type that most of the quantised tensors have, with ``_scaled`` when there are scales."""
        kinds = Counter(self.source.tensors[name].dtype for name in self._weights)
        if not kinds:
            return None
        kind = kinds.most_common(1)[0][0]
        if kind in BLOCKS:
            return f"gguf {kind}"
        return "int8" if kind == "I8" else "fp8_scaled" if any(self._weights.values()) else "fp8"

    def same(self, name: str) -> str | None:
        if name not in self.tensors:
            raise KeyError(name)
        return None if name in self._weights else name

    def made(self, name: str, dtype: torch.dtype | None, look: Inspect) -> Tensor:
        """As ``dtype``, rounded once on the way from float32; neither codes nor float32 are ever whole in memory."""
        facts, dtype = self.source.tensors[name], dtype or torch.float32
        if facts.dtype in BLOCKS:
            count, width = gguf.block_bytes(facts.dtype)
            parts = self.source.pieces(name, width, gguf.CHUNK // count * width)
            return converted(parts, facts.shape, dtype, lambda part, begin: gguf.numbers_of(part, facts.dtype), look)
        scale = self._weights[name]
        decode = Codes(facts, torch.ones(()) if scale is None else self._scale(scale), dtype)
        return converted(self.source.pieces(name, decode.unit, CODES), facts.shape, dtype, decode, look)

    def stored(self, name: str) -> Stored:
        if self.same(name) is not None:
            return super().stored(name)
        facts, scale, codes = self.source.tensors[name], self._weights[name], self.source[name]
        if facts.dtype in BLOCKS:
            return Stored(f"gguf {facts.dtype}", facts.shape, codes.view(-1, gguf.block_bytes(facts.dtype)[1]))
        if scale is None:
            return Stored("fp8", facts.shape, codes)
        factors = self._scale(scale)
        factors = factors.reshape(() if factors.numel() == 1 else (-1, *[1] * (len(facts.shape) - 1)))
        return Stored("int8" if facts.dtype == "I8" else "fp8_scaled", facts.shape, codes, factors)

    def _scale(self, name: str) -> Tensor:
        scale = self.source[name].float()
        if not scale.isfinite().all():
            raise LoadError(self._asked, f"{name} is not finite", "Download the file again")
        return scale

    def _find(self, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, str | None]:
        """All quantised tensors, each with the name of its scale, None when it has none. ``settings``: layer -> what
        the file says of it."""
        tensors, scales = self.source.tensors, dict[str, str]()
        for name in (name for end in SCALES for name in tensors if name.endswith(end)):
            weight = f"{name.rpartition('.')[0]}.weight"
            if weight in scales:
                raise self._error(f"{weight} has two scales ({scales[weight]}, {name})")
            scales[weight] = name
        eight = {name for name, facts in tensors.items() if facts.dtype in EIGHT_BITS and not _beside(name)}
        if lost := [scales[weight] for weight in scales.keys() - eight]:
            raise self._error(f"{len(lost)} scales have no 8-bit weight ({some(lost)})")
        int8 = {name for name in eight if tensors[name].dtype == "I8"}
        needs = eight if scales or settings or "scaled_fp8" in tensors else int8
        if bare := needs - scales.keys():
            raise self._error(f"{len(bare)} 8-bit weights have no scale ({some(bare)})")
        for layer, setting in settings.items():
            self._agree(f"{layer}.weight", setting)
        for weight, scale in scales.items():
            self._check_scale(weight, tensors[weight].shape, scale, tensors[scale])
        blocks = {name for name, facts in tensors.items() if facts.dtype in BLOCKS}
        return {name: scales.get(name) for name in eight | blocks}

    def _agree(self, weight: str, setting: Mapping[str, Any]) -> None:
        """What the settings of a layer say, against what is stored."""
        kind = str(setting.get("format"))
        if kind not in FORMATS:
            raise self._unsupported(f"{weight} is stored as {kind}, which is not supported")
        if options := [key for key, value in setting.items() if key not in WITHOUT_EFFECT and value]:
            raise self._unsupported(f"{weight} is stored as {kind} with {some(options)}")
        stored = self.source.tensors[weight].dtype if weight in self.source.tensors else "absent"
        if stored != FORMATS[kind]:
            raise self._error(f"{weight} should be {kind} and is {stored}")

    def _check_scale(self, weight: str, shape: tuple[int, ...], scale: str, facts: Facts) -> None:
        """One number, or one for each row: [], [1], [1, 1], [out], [out, 1]."""
        rows = shape[:1]
        if facts.dtype not in ("F32", "F16", "BF16"):
            raise self._unsupported(f"{scale} is {facts.dtype}, the scales of MXFP8 or NVFP4")
        if facts.shape not in ((), (1,), (1, 1), rows, (*rows, 1)):
            found = f"{scale} has the shape {list(facts.shape)} for {weight} of {list(shape)}: scales of blocks"
            raise self._unsupported(found)

    def _refuse(self) -> None:
        for name, facts in self.source.tensors.items():
            flavour = next((flavour for end, flavour in REFUSED.items() if name.endswith(end)), None)
            if flavour or ".weight.quant_state." in name:
                flavour = flavour or "bitsandbytes"
                raise self._unsupported(f"{name} shows that they are {flavour}, which is not supported")
            if facts.dtype == "U8" and name.endswith(".weight"):
                raise self._unsupported(f"{name} holds packed 4-bit numbers (U8), which are not supported")

    def _settings(self) -> dict[str, Mapping[str, Any]]:
        """Layer -> its settings, from the metadata and from the tensors beside the weights, which must agree."""
        tensors, found = self.source.tensors, dict(self._declared())
        for name in (name for name in tensors if name.endswith(SETTINGS)):
            if tensors[name].dtype != "U8":
                found_type = f"{name} is {tensors[name].dtype}, not bytes of JSON"
                raise LoadError(self._asked, found_type, "Use another file")
            setting = json_object(bytes(self.source[name].tolist()), f"reading {name} of {self.path}")
            if found.setdefault(name.removesuffix(SETTINGS), setting) != setting:
                raise LoadError(self._asked, f"{name} differs from what the file's metadata say", "Use another file")
        return found

    def _declared(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """From the header. The names there have the file's prefix, which the source may have lost."""
        values = self.metadata.get(METADATA, ())
        for text in (values,) if isinstance(values, str) else values:
            layers = json_object(text.encode(), f"reading {METADATA} of {self.path}").get("layers")
            if not isinstance(layers, dict) or not all(isinstance(setting, dict) for setting in layers.values()):
                raise LoadError(self._asked, f"{METADATA} names no layers", "Download the file again")
            section = self.source if isinstance(self.source, Section) else None
            prefix = section.prefix if section else shared_prefix(map(unwrapped, layers))
            for layer, setting in layers.items():
                if section and not section.whole and not unwrapped(layer).startswith(prefix):
                    continue  # of another network in the file
                bare = unwrapped(layer).removeprefix(prefix)
                yield (layer if f"{layer}.weight" in self.source.tensors else bare), setting

    def _unsupported(self, found: str) -> LoadError:
        return LoadError(self._asked, found, "Use a file in 16 bits, scaled or plain float8, int8 or GGUF")

    def _error(self, found: str) -> LoadError:
        return LoadError(self._asked, found, "Download the file again, or use another one; nothing was assumed")


def _notes(names: Collection[str]) -> Iterator[str]:
    yield from (f"{name} was left out: {why}" for name, why in MARKERS.items() if name in names)
    if count := sum(name.endswith(ACTIVATIONS) for name in names):
        yield f"{count} scales of activations were left out: activations are not quantised"


class Codes:
    """8-bit codes -> (code in float32 * its factor), rounded to ``dtype`` where one factor is for all of them.

    ``factors``: one, or one for each row, float32; ``unit``: how many codes must be given together. With one factor
    there are 256 results, so they are looked up, two codes at once: seven times as fast as torch's own cast of float8
    on a CPU (2.1 against 0.3 billion codes a second, one thread), and bit-equal to it."""

    def __init__(self, facts: Facts, factors: Tensor, dtype: torch.dtype):
        stored, self.factors = DTYPES[facts.dtype], factors.reshape(-1)
        self.width = math.prod(facts.shape[1:])
        self.by_row = factors.numel() > 1
        self.unit = max(1, self.width) if self.by_row else 1
        result = dtype if not self.by_row and dtype.itemsize <= 4 else torch.float32
        factor = 1.0 if self.by_row else float(self.factors[0])
        self.table, self.pairs = _table(stored, factor, result), None
        if math.prod(facts.shape) > PAIRS:
            self.pairs = _pairs(stored, factor, result)
            self.room = np.empty(0, self.pairs.dtype)

    def __call__(self, codes: Tensor, begin: int) -> Tensor:
        """Of ``codes``, uint8 [n], before which ``begin`` came; good until the next call."""
        numbers = self._numbers(codes)
        if not self.by_row:
            return numbers
        first, count = begin // self.width, len(codes) // self.width
        return numbers.reshape(count, self.width) * self.factors[first : first + count, None]

    def _numbers(self, codes: Tensor) -> Tensor:
        if self.pairs is None or len(codes) % 2:
            return self.table[codes.int()]
        if len(self.room) < len(codes) // 2:
            self.room = np.empty(len(codes) // 2, self.pairs.dtype)
        found = self.room[: len(codes) // 2]
        np.take(self.pairs, codes.numpy().view(np.uint16), out=found, mode="clip")  # no index is outside: no clipping
        return torch.from_numpy(found.view(np.uint8)).view(self.table.dtype)


@functools.lru_cache(2)
def _table(stored: torch.dtype, factor: float, dtype: torch.dtype) -> Tensor:
    """What each of the 256 codes is."""
    codes = torch.arange(256, dtype=torch.uint8).view(stored)
    return (codes.float() * torch.tensor(factor, dtype=torch.float32)).to(dtype)


@functools.lru_cache(2)
def _pairs(stored: torch.dtype, factor: float, dtype: torch.dtype) -> Any:
    """What each two codes are, as one unsigned number of both; the first code is the low byte of an index."""
    table = _table(stored, factor, dtype)
    both = torch.stack([table.expand(256, 256), table[:, None].expand(256, 256)], -1).contiguous()
    return both.view(torch.uint8).numpy().view(f"u{2 * dtype.itemsize}").reshape(-1)
