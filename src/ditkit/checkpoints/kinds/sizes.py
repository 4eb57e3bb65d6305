"""The sizes of a network, told by the names and shapes of its tensors alone.

Each reader gives the fields of one config class, as a plain dict, and of each field the tensor that tells it. What
shapes cannot tell is apart: ``assumed`` holds the official value, for weights that come without a config, ``undecided``
names what has none. ``settle`` joins all this with a config that came along; where the two disagree it is an error.
Leaves out: what kind of network it is (detect.py), and the spelling of configs (diffusers_folder.py, layouts.py).
Sources of the layouts: Wan2.1 and Wan2.2 ``wan/modules``, diffusers ``transformer_wan.py`` and
``autoencoder_kl_wan.py``, transformers ``modeling_umt5.py`` and ``modeling_clip.py``, taehv ``taehv.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ditkit.checkpoints.views.source import Facts
from ditkit.errors import LoadError

Tensors = Mapping[str, Facts]
NOTHING: Mapping[str, Any] = MappingProxyType({})

LARGEST = 2**24  # of an axis; the largest one in use is a vocabulary of 256384. A file of no data can claim any
HEAD_WIDTH = 128  # of every official transformer (Wan2.1 and Wan2.2 wan/configs)
WIDTH_OF_LATENTS = {"wan_vae": 16, "wan_vae22": 48}  # whose statistics are known without a config
CLIP_HEAD_WIDTHS = MappingProxyType({1280: 80})  # ViT-H (Wan2.1 wan/modules/clip.py)
CLIP_HEAD_WIDTH = 64  # ViT-L and ViT-B
SIZE_NAMES = MappingProxyType({(1536, 8960, 30): "1.3B", (3072, 14336, 30): "5B", (5120, 13824, 40): "14B"})
"""(dim, ffn_dim, num_layers) of a transformer -> what the model is called (Wan2.1 and Wan2.2 README.md)."""


@dataclass(frozen=True)
class Sizes:
    """``fields``: what shapes tell. ``where``: field -> the tensor, or the words for several. ``lengths``: fields of
    which only the number of values is told. ``assumed`` and ``undecided``: see the top of the file."""

    fields: Mapping[str, Any]
    where: Mapping[str, str]
    assumed: Mapping[str, Any] = field(default_factory=dict)
    lengths: Mapping[str, int] = field(default_factory=dict)
    undecided: tuple[str, ...] = ()


@dataclass
class _Reader:
    tensors: Tensors
    layout: str
    fields: dict[str, Any] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)

    def error(self, found: str, do: str = "Use whole, unmodified weights") -> LoadError:
        return LoadError(f"reading sizes from weights in the {self.layout} layout", found, do)

    def shape(self, name: str, axes: int) -> tuple[int, ...]:
        if name not in self.tensors:
            raise self.error(f"the weights have no {name}")
        shape = tuple(self.tensors[name].shape)
        if len(shape) != axes:
            raise self.error(f"{name} has the shape {list(shape)}, not {axes} axes")
        if not 0 < min(shape) <= max(shape) <= LARGEST:
            raise self.error(f"{name} has the shape {list(shape)}, which no network has")
        return shape

    def tell(self, key: str, value: Any, where: str) -> Any:
        self.fields[key], self.where[key] = value, where
        return value

    def axis(self, key: str, name: str, axis: int, axes: int, divisor: int = 1) -> int:
        size = self.shape(name, axes)[axis]
        if size % divisor:
            raise self.error(f"axis {axis} of {name} is {size}, no multiple of {divisor}")
        return int(self.tell(key, size // divisor, name))

    def count(self, key: str, pattern: str, what: str) -> int:
        return int(self.tell(key, count(self.tensors, pattern), what))

    def sizes(self, **more: Any) -> Sizes:
        return Sizes(self.fields, self.where, **more)


def count(tensors: Mapping[str, Any], pattern: str) -> int:
    """How many numbers ``pattern`` captures in the names. They must run from 0 without a gap, or it raises LoadError:
    by the largest of them one name could ask for a billion blocks."""
    found = {match[1] for name in tensors if (match := re.match(pattern, name))}
    if gaps := {str(n) for n in range(len(found))} - found:
        blocks = pattern.replace(r"(\d+)", min(gaps, key=int)).replace("\\", "")
        told = f"their names count {len(found)} of them, and none begins with {blocks!r}"
        raise LoadError("counting the blocks of the weights", told, "Use whole, unmodified weights")
    return len(found)


_TRANSFORMER = {
    "native": {
        "text": "text_embedding.0.weight",
        "time": "time_embedding.0.weight",
        "ffn": "blocks.0.ffn.0.weight",
        "head": "head.head.weight",
        "image": "img_emb.proj.0.weight",
        "positions": "img_emb.emb_pos",
        "image_keys": ".cross_attn.k_img.weight",
    },
    "diffusers": {
        "text": "condition_embedder.text_embedder.linear_1.weight",
        "time": "condition_embedder.time_embedder.linear_1.weight",
        "ffn": "blocks.0.ffn.net.0.proj.weight",
        "head": "proj_out.weight",
        "image": "condition_embedder.image_embedder.norm1.weight",
        "positions": "condition_embedder.image_embedder.pos_embed",
        "image_keys": ".attn2.add_k_proj.weight",
    },
}


def transformer_sizes(tensors: Tensors, layout: str = "native") -> Sizes:
    """Fields of ``WanConfig``. Optional branches are there when their tensors are. ``layout``: native or diffusers."""
    names, read = _TRANSFORMER[layout], _Reader(tensors, layout)
    first = "patch_embedding.weight"
    patch = read.tell("patch_size", tuple(read.shape(first, 5)[2:]), first)
    dim = read.axis("dim", first, 0, 5)
    read.axis("in_dim", first, 1, 5)
    read.axis("text_dim", names["text"], 1, 2)
    read.axis("freq_dim", names["time"], 1, 2)
    read.axis("ffn_dim", names["ffn"], 0, 2)
    read.axis("out_dim", names["head"], 0, 2, math.prod(patch))
    layers = read.count("num_layers", r"blocks\.(\d+)\.", "the names of the blocks")
    if any(name == names["image"] or name.endswith(names["image_keys"]) for name in tensors):
        read.axis("image_dim", names["image"], 0, 1)
    else:
        read.tell("image_dim", None, f"the weights, which have no {names['image']}")
    if names["positions"] in tensors:
        read.axis("image_tokens", names["positions"], 1, 3)
    else:
        read.tell("image_tokens", None, f"the weights, which have no {names['positions']}")
    assumed: dict[str, Any] = {} if dim % HEAD_WIDTH else {"num_heads": dim // HEAD_WIDTH}
    hints = count(tensors, r"vace_blocks\.(\d+)\.")
    if hints:
        read.axis("vace_in_dim", "vace_patch_embedding.weight", 1, 5)
        layers_with_hints = tuple(range(0, layers, max(1, layers // hints)))
        if len(layers_with_hints) == hints:
            assumed["vace_layers"] = layers_with_hints
    undecided = tuple(key for key in ("num_heads", "vace_layers")[: 1 + bool(hints)] if key not in assumed)
    return read.sizes(assumed=assumed, lengths={"vace_layers": hints}, undecided=undecided)


@dataclass(frozen=True)
class _Encoder:
    """How one layout spells a VAE's encoder: ``residual`` captures the number of a residual block (and of its level
    before it, where levels have names); the others are made of the number of a doubling. Numbers have three digits at
    most, because lists are made up to them."""

    first: str
    last: str
    residual: str
    time: str


_ENCODERS = {
    ("wan_vae", "native"): _Encoder(
        "encoder.conv1.weight", "conv2.weight",
        r"encoder\.downsamples\.(\d{1,3})\.residual\.2\.weight", "encoder.downsamples.{}.time_conv.weight",
    ),
    ("wan_vae", "diffusers"): _Encoder(
        "encoder.conv_in.weight", "post_quant_conv.weight",
        r"encoder\.down_blocks\.(\d{1,3})\.conv1\.weight", "encoder.down_blocks.{}.time_conv.weight",
    ),
    ("wan_vae22", "native"): _Encoder(
        "encoder.conv1.weight", "conv2.weight",
        r"encoder\.downsamples\.(\d{1,3})\.downsamples\.(\d{1,3})\.residual\.2\.weight",
        "encoder.downsamples.{}.downsamples.{}.time_conv.weight",
    ),
    ("wan_vae22", "diffusers"): _Encoder(
        "encoder.conv_in.weight", "post_quant_conv.weight",
        r"encoder\.down_blocks\.(\d{1,3})\.resnets\.(\d{1,3})\.conv1\.weight",
        "encoder.down_blocks.{}.downsampler.time_conv.weight",
    ),
}  # fmt: skip


def vae_sizes(tensors: Tensors, layout: str = "native", kind: str = "wan_vae") -> Sizes:
    """Fields of ``WanVAEConfig`` (2.1) or, with kind ``wan_vae22``, of ``WanVAE22Config``."""
    names, read = _ENCODERS[kind, layout], _Reader(tensors, layout)
    dim = read.axis("dim", names.first, 0, 5)
    z = read.axis("z_dim", names.last, 0, 5)
    levels, time_names = (_flat_levels if kind == "wan_vae" else _named_levels)(read, names)
    blocks = "the names of the encoder's blocks"
    if not levels or len({len(level) for level in levels}) > 1:
        raise read.error(f"the levels of the encoder have {[len(level) for level in levels]} residual blocks")
    read.tell("num_res_blocks", len(levels[0]), blocks)
    widths = [read.shape(level[-1], 5)[0] for level in levels]
    if any(width % dim for width in widths):
        raise read.error(f"the levels of the encoder are {widths} wide, no multiples of {dim}")
    mult = read.tell("dim_mult", tuple(width // dim for width in widths), "the shapes of the encoder's blocks")
    read.tell("temporal_downsample", tuple(name in tensors for name in time_names), f"{blocks} (time_conv)")
    if kind == "wan_vae22":
        start = "decoder.conv1.weight" if layout == "native" else "decoder.conv_in.weight"
        read.axis("dec_dim", start, 0, 5, mult[-1])
        pixels = read.shape(names.first, 5)[1]
        side = math.isqrt(pixels // 3)
        if pixels != 3 * side**2:
            raise read.error(f"{names.first} has {pixels} input channels, not 3 times a square")
        read.tell("patch_size", side, names.first)
    known = z == WIDTH_OF_LATENTS[kind]
    return read.sizes(undecided=() if known else ("latents_mean", "latents_std"))


def _flat_levels(read: _Reader, names: _Encoder) -> tuple[list[list[str]], list[str]]:
    """(the residual blocks of each level, the name that a temporal halving after each level but the last would have).

    The blocks of 2.1 are numbered through; a number without a residual block is a halving."""
    residual = {int(match[1]): name for name in read.tensors if (match := re.fullmatch(names.residual, name))}
    levels: list[list[str]] = [[]]
    times = []
    for number in range(1 + max(residual, default=-1)):
        if number in residual:
            levels[-1].append(residual[number])
        else:
            levels.append([])
            times.append(names.time.format(number))
    return levels, times


def _named_levels(read: _Reader, names: _Encoder) -> tuple[list[list[str]], list[str]]:
    found = sorted(
        (int(match[1]), int(match[2]), name) for name in read.tensors if (match := re.fullmatch(names.residual, name))
    )
    numbers = sorted({level for level, _, _ in found})
    levels = [[name for level, _, name in found if level == number] for number in numbers]
    times = [names.time.format(number, len(levels[number])) for number in numbers[:-1]]
    return levels, times


def umt5_sizes(tensors: Tensors, layout: str = "transformers") -> Sizes:
    """Fields of ``UMT5Config``. The greatest distance is not told; 128 is the only one in use."""
    read = _Reader(tensors, layout)
    if layout == "native":
        embedding, block, blocks = "token_embedding.weight", "blocks.0.", r"blocks\.(\d+)\."
        table, query, feed = "pos_embedding.embedding.weight", "attn.q.weight", "ffn.gate.0.weight"
    else:
        embedding = "shared.weight" if "shared.weight" in tensors else "encoder.embed_tokens.weight"
        block, blocks = "encoder.block.0.layer.", r"encoder\.block\.(\d+)\."
        table, query = "0.SelfAttention.relative_attention_bias.weight", "0.SelfAttention.q.weight"
        feed = "1.DenseReluDense.wi_0.weight"
    read.axis("vocab_size", embedding, 0, 2)
    read.axis("d_model", embedding, 1, 2)
    read.axis("relative_attention_num_buckets", block + table, 0, 2)
    heads = read.axis("num_heads", block + table, 1, 2)
    read.axis("d_kv", block + query, 0, 2, heads)
    read.axis("d_ff", block + feed, 0, 2)
    read.count("num_layers", blocks, "the names of the blocks")
    return read.sizes()


def clip_sizes(tensors: Tensors, layout: str = "transformers") -> Sizes:
    """Fields of ``CLIPConfig``: native names begin with ``visual.``, those of transformers with ``embeddings.``,
    ``encoder.`` (no ``vision_model.`` before them)."""
    read = _Reader(tensors, layout)
    if layout == "native":
        patch, positions, row_axis, axes = "visual.patch_embedding.weight", "visual.pos_embedding", 1, 3
        feed, blocks = "visual.transformer.0.mlp.0.weight", r"visual\.transformer\.(\d+)\."
    else:
        patch, positions = "embeddings.patch_embedding.weight", "embeddings.position_embedding.weight"
        row_axis, axes = 0, 2
        feed, blocks = "encoder.layers.0.mlp.fc1.weight", r"encoder\.layers\.(\d+)\."
    width = read.axis("hidden_size", patch, 0, 4)
    side = read.axis("patch_size", patch, 2, 4)
    rows = read.shape(positions, axes)[row_axis] - 1  # one is the class token's
    if math.isqrt(rows) ** 2 != rows:
        raise read.error(f"{positions} has {rows + 1} rows, not one more than a square")
    read.tell("image_size", math.isqrt(rows) * side, positions)
    read.axis("intermediate_size", feed, 0, 2)
    read.count("num_hidden_layers", blocks, "the names of the blocks")
    assumed: dict[str, Any] = {}
    head = CLIP_HEAD_WIDTHS.get(width, CLIP_HEAD_WIDTH)
    if width % head == 0:
        assumed["num_attention_heads"] = width // head
    if layout == "native" or width in CLIP_HEAD_WIDTHS:  # the others are about with two activations
        assumed["hidden_act"] = "gelu"
    undecided = tuple(key for key in ("num_attention_heads", "hidden_act") if key not in assumed)
    return read.sizes(assumed=assumed, undecided=undecided)


def taehv_sizes(tensors: Tensors) -> Sizes:
    """Fields of ``TAEHVConfig``. Which levels of the decoder double the frames is not told: a file may have more rows
    there than are used, so the official choice stands."""
    read = _Reader(tensors, "native")
    big = "decoder.0.weight" in tensors
    read.tell("variant", "super" if big else "base", "decoder.0" if big else "decoder.1")
    read.axis("encoder_width", "encoder.0.weight", 0, 4)
    pixels = read.shape("encoder.0.weight", 4)[1]
    side = math.isqrt(pixels // 3)
    if pixels != 3 * side**2:
        raise read.error(f"encoder.0.weight has {pixels} input channels, not 3 times a square")
    read.tell("patch_size", side, "encoder.0.weight")
    read.axis("z_dim", "encoder.17.weight", 0, 4)
    joins = [read.shape(f"encoder.{n}.conv.weight", 4) for n in (2, 7, 12)]
    read.tell("temporal_downsample", tuple(frames > dim for dim, frames, *_ in joins), "encoder.2, 7 and 12")
    levels = ((0, 1), (4, 4), (11, 4), (18, 4)) if big else ((1, 1), (8, 1), (14, 1), (20, 1))
    widths = tuple(read.shape(f"decoder.{n}.weight", 4)[0] // shuffle for n, shuffle in levels)
    read.tell("decoder_widths", widths, "the decoder's convolutions")
    return read.sizes()


def settle(
    asked: str,
    sizes: Sizes,
    config: Mapping[str, Any] | None,
    said: Mapping[str, str] = NOTHING,
    explain: Callable[[str], str | None] = lambda key: None,
) -> dict[str, Any]:
    """The whole config: the json's where there is one, checked against the shapes; theirs where there is none.

    ``config``: our fields as the json gave them. ``said``: field -> the json's own words for it, for messages.
    ``explain``: field -> what to do about a contradiction of it. Raises LoadError with the key and both values."""
    if config is None:
        if sizes.undecided:
            raise LoadError(
                asked,
                f"shapes do not tell {' and '.join(sizes.undecided)}, and there is no config",
                "Put the model's config.json beside the weights",
            )
        return {**sizes.fields, **sizes.assumed}
    for key, has in sizes.fields.items():
        if key in config and config[key] != has:
            raise _contradiction(asked, said.get(key, key), config[key], has, sizes.where[key], explain(key))
    for key, has in sizes.lengths.items():
        if key in config and len(config[key]) != has:
            what = f"the length of {said.get(key, key)}"
            raise _contradiction(asked, what, len(config[key]), has, "the names of the blocks", explain(key))
    return {**sizes.fields, **config}


def _contradiction(asked: str, said: str, value: Any, has: Any, where: str, do: str | None) -> LoadError:
    found = f"{said} is {_shown(value)} in the config and {_shown(has)} in {where}"
    return LoadError(asked, found, do or "Use the config of these weights")


def _shown(value: Any) -> Any:
    if value is None:
        return "absent"
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
