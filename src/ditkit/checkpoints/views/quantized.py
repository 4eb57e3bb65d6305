"""Weights that are stored in 8 bits or fewer, seen as the numbers that they stand for: W = q * scale.

The flavour is told by names, types and metadata. A scale belongs to exactly one weight and a weight that needs a scale
has exactly one: whatever does not fit is an error, because a scale that is lost gives garbage and no error later.
Flavours that are not computed here are refused by name. Leaves out: arithmetic in 8 bits, quantising, LoRA.
Sources: ComfyUI ``comfy/ops.py``, ``comfy/quant_ops.py``, ``QUANTIZATION.md``; LightX2V ``lightx2v/common/ops``.
"""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ditkit.checkpoints.files.gguf import BLOCKS
from ditkit.checkpoints.files.stored import DTYPES, converted
from ditkit.checkpoints.files.text import some
from ditkit.checkpoints.views.prefixes import shared_prefix, unwrapped
from ditkit.checkpoints.views.source import Facts, Inspect, Stored, TensorFacts, TensorSource, View, pieces
from ditkit.errors import LoadError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

EIGHT_BITS = ("F8_E4M3", "F8_E5M2", "I8")
FORMATS: Mapping[str, str] = MappingProxyType(
    {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int8_tensorwise": "I8"}
)
"""ComfyUI's names of formats that are computed here -> how their weights are stored."""
WITHOUT_EFFECT = frozenset({"format", "full_precision_matrix_mult"})  # options that do not change what a weight is
SCALES = (".scale_weight", ".weight_scale")
ACTIVATIONS = (".scale_input", ".input_scale")
SETTINGS = ".comfy_quant"
METADATA = "_quantization_metadata"
IGNORED: Mapping[str, str] = MappingProxyType(
    {"spiece_model": "the tokenizer is opened from its own file", "scaled_fp8": "a marker; the scales say the same"}
)
"""Tensors that are no weights, and why nothing is lost without them."""
REFUSED: Mapping[str, str] = MappingProxyType({
    ".weight_scale_2": "NVFP4", ".pre_quant_scale": "smoothed (AWQ) weights with pre_quant_scale",
    ".weight_s_rel": "ConvRot W4A8", ".weight_codebook": "ConvRot W4A8",
    ".qweight": "SVDQuant (nunchaku), GPTQ or AWQ", ".wscales": "SVDQuant (nunchaku)",
    ".smooth_factor": "SVDQuant (nunchaku)", ".qzeros": "GPTQ or AWQ", ".weight._data": "quanto",
    ".weight._scale": "quanto", ".weight.absmax": "bitsandbytes", ".weight.quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes",
})  # fmt: skip
"""Ends of names -> flavours that are not computed here."""
DO = "Use a file in 16 bits, scaled or plain float8, int8 or GGUF"
CODES = 2**17  # 8-bit codes that are turned into numbers at once, few enough to stay in a processor's cache
PAIRS = 2**16  # two 8-bit codes at once, where there are more codes than pairs


def _beside(name: str) -> bool:
    """Whether a tensor is there for others, or for the file, and is no weight itself."""
    return name in IGNORED or name.endswith((*SCALES, *ACTIVATIONS, SETTINGS))


class Dequantized(View):
    """``source``, whose names are bare (``Unprefixed``), with all quantised weights as numbers of the type ``dtype``
    (spelt ``F32``, ``BF16``, ``F16``).

    Other tensors stay as they are stored; scales, markers and the like are gone. Each number is computed in float32
    and rounded once. ``quantization`` names the flavour (``fp8``, ``fp8_scaled``, ``int8``, ``gguf Q4_K``), None when
    nothing is quantised. ``notes`` lists what was left out. Opening reads the small settings tensors of ComfyUI only.
    Raises LoadError for scales without their weights, weights without their scales, contradictions, and flavours that
    are not supported."""

    def __init__(self, source: TensorSource, dtype: str = "F32"):
        if dtype not in ("F32", "BF16", "F16"):
            raise ValueError(f"weights are dequantised to F32, BF16 or F16, not {dtype}")
        self._asked = f"opening the quantised weights in {source.path}"
        _refuse(source, self._asked)
        self._settings = dict(_settings(source, self._asked))
        self._weights = self._find(source)
        self.quantization = _name(source, self._weights)
        left = [name for name in source.tensors if _beside(name)]
        super().__init__(source, tuple(_notes(left)))
        self.dtype = dtype
        self.tensors: Mapping[str, Facts] = MappingProxyType({
            name: TensorFacts(dtype, facts.shape) if name in self._weights else facts
            for name, facts in source.tensors.items()
            if not _beside(name)
        })  # fmt: skip

    def __repr__(self) -> str:
        return f"Dequantized({self.source!r}: {self.quantization})"

    def same(self, name: str) -> str | None:
        if name not in self.tensors:
            raise KeyError(name)
        return None if name in self._weights else name

    def made(self, name: str, dtype: torch.dtype | None, look: Inspect) -> Tensor:
        """As ``dtype``, rounded once on the way from float32; neither codes nor float32 are ever whole in memory."""
        import torch

        own = getattr(torch, DTYPES[self.dtype])
        if dtype not in (None, own) and own != torch.float32:  # rounded to one type and then to the other
            tensor = self[name].to(dtype)
            look(tensor.reshape(-1))
            return tensor
        facts = self.source.tensors[name]
        if facts.dtype in BLOCKS:
            return self._from_blocks(name, facts, dtype or own, look)
        scale = self._weights[name]
        factors = torch.ones(()) if scale is None else self._scale(scale)
        return self._from_codes(name, facts, factors, dtype or own, look)

    def stored(self, name: str) -> Stored:
        if self.same(name) is not None:
            return super().stored(name)
        facts, scale = self.source.tensors[name], self._weights[name]
        codes, shape = self.source[name], tuple(facts.shape)
        if facts.dtype in BLOCKS:
            from ditkit.checkpoints.files import gguf

            return Stored(f"gguf {facts.dtype}", shape, codes.view(-1, gguf.block_bytes(facts.dtype)[1]))
        if scale is None:
            return Stored("fp8", shape, codes)
        factors = self._scale(scale)
        factors = factors.reshape(() if factors.numel() == 1 else (-1, *[1] * (len(shape) - 1)))
        return Stored("int8" if facts.dtype == "I8" else "fp8_scaled", shape, codes, factors)

    def _from_blocks(self, name: str, facts: Facts, dtype: torch.dtype, look: Inspect) -> Tensor:
        from ditkit.checkpoints.files import gguf

        gguf.keep_heap()
        count, width = gguf.block_bytes(facts.dtype)
        parts = pieces(self.source, name, width, gguf.CHUNK // count * width)
        return converted(parts, facts.shape, dtype, lambda part, begin: gguf.numbers_of(part, facts.dtype), look)

    def _from_codes(self, name: str, facts: Facts, factors: Tensor, dtype: torch.dtype, look: Inspect) -> Tensor:
        decode = Codes(facts, factors, dtype)
        return converted(pieces(self.source, name, decode.unit, CODES), facts.shape, dtype, decode, look)

    def _scale(self, name: str) -> Tensor:
        import torch

        scale = self.source[name].float()
        if not bool(torch.isfinite(scale).all()):
            raise LoadError(self._asked, f"{name} is not finite", "Download the file again")
        return scale

    def _find(self, source: TensorSource) -> dict[str, str | None]:
        """All quantised tensors, each with the name of its scale, None when it has none."""
        tensors = source.tensors
        scales: dict[str, str] = {}
        for end in SCALES:
            for name in tensors:
                if name.endswith(end):
                    weight = name.removesuffix(end) + ".weight"
                    if weight in scales:
                        raise self._error(f"{weight} has two scales ({scales[weight]}, {name})")
                    scales[weight] = name
        eight = {name for name, facts in tensors.items() if facts.dtype in EIGHT_BITS and not _beside(name)}
        if lost := [scales[weight] for weight in scales.keys() - eight]:
            raise self._error(f"{len(lost)} scales have no 8-bit weight ({some(lost)})")
        int8 = {name for name in eight if tensors[name].dtype == "I8"}
        needs = eight if scales or self._settings or "scaled_fp8" in tensors else int8
        if bare := needs - scales.keys():
            raise self._error(f"{len(bare)} 8-bit weights have no scale ({some(bare)})")
        self._agree(source)
        for weight, scale in scales.items():
            _check_scale(weight, tensors[weight], scale, tensors[scale], self._asked)
        blocks = {name for name, facts in tensors.items() if facts.dtype in BLOCKS}
        return {name: scales.get(name) for name in eight | blocks}

    def _agree(self, source: TensorSource) -> None:
        """What the settings of each layer say, against what is stored."""
        for layer, setting in self._settings.items():
            weight, kind = f"{layer}.weight", str(setting.get("format"))
            if kind not in FORMATS:
                raise LoadError(self._asked, f"{weight} is stored as {kind}, which is not supported", DO)
            if options := [key for key, value in setting.items() if key not in WITHOUT_EFFECT and value]:
                raise LoadError(self._asked, f"{weight} is stored as {kind} with {some(options)}", DO)
            stored = source.tensors[weight].dtype if weight in source.tensors else "absent"
            if stored != FORMATS[kind]:
                raise self._error(f"{weight} should be {kind} and is {stored}")

    def _error(self, found: str) -> LoadError:
        return LoadError(self._asked, found, "Download the file again, or use another one; nothing was assumed")


def _refuse(source: TensorSource, asked: str) -> None:
    for name, facts in source.tensors.items():
        for end, flavour in REFUSED.items():
            if name.endswith(end):
                raise LoadError(asked, f"{name} shows that they are {flavour}, which is not supported", DO)
        if ".weight.quant_state." in name:
            raise LoadError(asked, f"{name} shows that they are bitsandbytes, which is not supported", DO)
        if facts.dtype == "U8" and name.endswith(".weight"):
            raise LoadError(asked, f"{name} holds packed 4-bit numbers (U8), which are not supported", DO)


def _settings(source: TensorSource, asked: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Layer -> its settings, from the metadata and from the tensors beside the weights, which must agree."""
    found = dict(_declared(source, asked))
    for name in source.tensors:
        if name.endswith(SETTINGS):
            layer = name.removesuffix(SETTINGS)
            if source.tensors[name].dtype != "U8":
                raise LoadError(asked, f"{name} is {source.tensors[name].dtype}, not bytes of JSON", "Use another file")
            setting = _json(bytes(source[name].tolist()), name, asked)
            if found.setdefault(layer, setting) != setting:
                raise LoadError(asked, f"{name} differs from what the file's metadata say", "Use another file")
    yield from found.items()


def _declared(source: TensorSource, asked: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """From the header. The names there have the file's prefix, which the source may have lost."""
    values = source.metadata.get(METADATA, ())
    for text in (values,) if isinstance(values, str) else values:
        layers = _json(text.encode(), METADATA, asked).get("layers")
        if not isinstance(layers, dict) or not all(isinstance(setting, dict) for setting in layers.values()):
            raise LoadError(asked, f"{METADATA} names no layers", "Download the file again")
        prefix = shared_prefix(map(unwrapped, layers))
        for layer, setting in layers.items():
            bare = unwrapped(layer).removeprefix(prefix)
            yield (layer if f"{layer}.weight" in source.tensors else bare), setting


def _json(raw: bytes, name: str, asked: str) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise LoadError(asked, f"{name} is no JSON object", "Download the file again")
    return value


def _check_scale(weight: str, facts: Facts, scale: str, scale_facts: Facts, asked: str) -> None:
    """One number, or one for each row: [], [1], [1, 1], [out], [out, 1]."""
    rows = facts.shape[:1]
    shape = scale_facts.shape
    if scale_facts.dtype not in ("F32", "F16", "BF16"):
        raise LoadError(asked, f"{scale} is {scale_facts.dtype}, the scales of MXFP8 or NVFP4", DO)
    if shape not in ((), (1,), (1, 1), rows, (*rows, 1)):
        found = f"{scale} has the shape {list(shape)} for {weight} of {list(facts.shape)}: scales of blocks"
        raise LoadError(asked, found, DO)


def _name(source: TensorSource, weights: Mapping[str, str | None]) -> str | None:
    """The flavour: of the type that most of the quantised tensors have, with ``_scaled`` when there are scales."""
    kinds = Counter(source.tensors[name].dtype for name in weights)
    if not kinds:
        return None
    kind = kinds.most_common(1)[0][0]
    if kind in BLOCKS:
        return f"gguf {kind}"
    if kind == "I8":
        return "int8"
    return "fp8_scaled" if any(weights.values()) else "fp8"


def _notes(left: list[str]) -> Iterator[str]:
    for name, why in IGNORED.items():
        if name in left:
            yield f"{name} was left out: {why}"
    if count := sum(name.endswith(ACTIVATIONS) for name in left):
        yield f"{count} scales of activations were left out: activations are not quantised"


class Codes:
    """8-bit codes -> (code in float32 * its factor), rounded to ``dtype`` where one factor is for all of them.

    ``factors``: one, or one for each row, float32; ``unit``: how many codes must be given together. With one factor
    there are 256 results, so they are looked up, two codes at once: seven times as fast as torch's own cast of float8
    on a CPU (2.1 against 0.3 billion codes a second, one thread), and bit-equal to it."""

    def __init__(self, facts: Facts, factors: Tensor, dtype: torch.dtype):
        import numpy as np
        import torch

        self.stored, self.factors = getattr(torch, DTYPES[facts.dtype]), factors.reshape(-1)
        self.width = math.prod(facts.shape[1:])
        self.by_row = factors.numel() > 1
        self.unit = max(1, self.width) if self.by_row else 1
        result = dtype if not self.by_row and dtype.itemsize <= 4 else torch.float32
        factor = 1.0 if self.by_row else float(self.factors[0])
        self.table, self.pairs = _table(self.stored, factor, result), None
        if math.prod(facts.shape) > PAIRS:
            self.pairs = _pairs(self.stored, factor, result)
            self.room = np.empty(0, self.pairs.dtype)

    def __call__(self, codes: Tensor, begin: int) -> Tensor:
        """Of ``codes``, uint8 [n], before which ``begin`` came; good until the next call."""
        numbers = self._numbers(codes)
        if not self.by_row:
            return numbers
        first, count = begin // self.width, len(codes) // self.width
        return numbers.reshape(count, self.width) * self.factors[first : first + count, None]

    def _numbers(self, codes: Tensor) -> Tensor:
        import numpy as np
        import torch

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
    import torch

    codes = torch.arange(256, dtype=torch.uint8).view(stored)
    return (codes.float() * torch.tensor(factor, dtype=torch.float32)).to(dtype)


@functools.lru_cache(2)
def _pairs(stored: torch.dtype, factor: float, dtype: torch.dtype) -> Any:
    """What each two codes are, as one unsigned number of both; the first code is the low byte of an index."""
    import torch

    table = _table(stored, factor, dtype)
    both = torch.stack([table.expand(256, 256), table[:, None].expand(256, 256)], -1).contiguous()
    return both.view(torch.uint8).numpy().view(f"u{2 * dtype.itemsize}").reshape(-1)
