"""What the same tensor is called in the native files of Wan and in those of diffusers and transformers.

A table lists every full name that a network of the given size can have, so a lookup is exact: nothing is replaced
inside a name and nothing unknown passes. No tensor is reshaped, split or transposed between these layouts.
Leaves out: prefixes, LoRA, quantized flavours, image and VACE branches.
Sources: Wan2.1 ``wan/modules/{model,vae,t5}.py``; diffusers ``transformer_wan.py``, ``autoencoder_kl_wan.py``;
transformers ``modeling_umt5.py``. Tests compare each table with the names of the real classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

from ditkit.checkpoints.files import some
from ditkit.errors import LoadError

WB = ("weight", "bias")
T = TypeVar("T")


@dataclass(frozen=True)
class KeyTable:
    """Names in two layouts: ``to_other`` native -> other, ``to_native`` the inverse. Both are read-only."""

    to_other: Mapping[str, str]
    to_native: Mapping[str, str]

    @classmethod
    def of(cls, pairs: Iterable[tuple[str, str]]) -> KeyTable:
        pairs = list(pairs)
        to_other, to_native = dict(pairs), {other: native for native, other in pairs}
        if not len(pairs) == len(to_other) == len(to_native):
            raise ValueError("a name stands twice in a key table")
        return cls(MappingProxyType(to_other), MappingProxyType(to_native))


def rename(tensors: Mapping[str, T], names: Mapping[str, str]) -> dict[str, T]:
    """``tensors`` under their new names. Raises LoadError for names that the table does not have."""
    if unknown := tensors.keys() - names.keys():
        raise LoadError(
            f"renaming {len(tensors)} tensors",
            f"{len(unknown)} names are unknown ({some(unknown)})",
            "Use weights of a supported model",
        )
    return {names[name]: tensor for name, tensor in tensors.items()}


def _leaves(native: str, other: str, leaves: Iterable[str] = WB) -> Iterable[tuple[str, str]]:
    return [(f"{native}.{leaf}", f"{other}.{leaf}") for leaf in leaves]


def transformer_keys(num_layers: int) -> KeyTable:
    """The text-to-video transformer: native <-> diffusers ``WanTransformer3DModel``."""
    pairs: list[tuple[str, str]] = []
    for native, other in (
        ("patch_embedding", "patch_embedding"),
        ("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
        ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
        ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
        ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
        ("time_projection.1", "condition_embedder.time_proj"),
        ("head.head", "proj_out"),
    ):
        pairs += _leaves(native, other)
    pairs.append(("head.modulation", "scale_shift_table"))
    for n in range(num_layers):
        block = f"blocks.{n}"
        pairs.append((f"{block}.modulation", f"{block}.scale_shift_table"))
        pairs += _leaves(f"{block}.norm3", f"{block}.norm2")
        pairs += _leaves(f"{block}.ffn.0", f"{block}.ffn.net.0.proj")
        pairs += _leaves(f"{block}.ffn.2", f"{block}.ffn.net.2")
        for native, other in ((f"{block}.self_attn", f"{block}.attn1"), (f"{block}.cross_attn", f"{block}.attn2")):
            for letter in "qkv":
                pairs += _leaves(f"{native}.{letter}", f"{other}.to_{letter}")
            pairs += _leaves(f"{native}.o", f"{other}.to_out.0")
            pairs += [(f"{native}.norm_{letter}.weight", f"{other}.norm_{letter}.weight") for letter in "qk"]
    return KeyTable.of(pairs)


def _residual(native: str, other: str) -> list[tuple[str, str]]:
    return [
        (f"{native}.residual.0.gamma", f"{other}.norm1.gamma"),
        (f"{native}.residual.3.gamma", f"{other}.norm2.gamma"),
        *_leaves(f"{native}.residual.2", f"{other}.conv1"),
        *_leaves(f"{native}.residual.6", f"{other}.conv2"),
        *_leaves(f"{native}.shortcut", f"{other}.conv_shortcut"),
    ]


def _resample(native: str, other: str) -> list[tuple[str, str]]:
    names = ("resample.1", "time_conv")
    return [pair for name in names for pair in _leaves(f"{native}.{name}", f"{other}.{name}")]


def vae_keys(levels: int, num_res_blocks: int) -> KeyTable:
    """The Wan 2.1 VAE: native <-> diffusers ``AutoencoderKLWan``. ``levels`` is the length of ``dim_mult``.

    The native encoder and decoder number all layers of all levels through; diffusers does so in the encoder only,
    and groups the decoder's in levels of ``num_res_blocks + 1`` residual blocks and a doubling."""
    pairs = [*_leaves("conv1", "quant_conv"), *_leaves("conv2", "post_quant_conv")]
    for part in ("encoder", "decoder"):
        pairs += _leaves(f"{part}.conv1", f"{part}.conv_in")
        pairs.append((f"{part}.head.0.gamma", f"{part}.norm_out.gamma"))
        pairs += _leaves(f"{part}.head.2", f"{part}.conv_out")
        pairs += _residual(f"{part}.middle.0", f"{part}.mid_block.resnets.0")
        pairs += _residual(f"{part}.middle.2", f"{part}.mid_block.resnets.1")
        native, other = f"{part}.middle.1", f"{part}.mid_block.attentions.0"
        pairs += [
            (f"{native}.norm.gamma", f"{other}.norm.gamma"),
            *_leaves(f"{native}.to_qkv", f"{other}.to_qkv"),
            *_leaves(f"{native}.proj", f"{other}.proj"),
        ]
    for level in range(levels):
        start = level * (num_res_blocks + 1)
        for i in range(start, start + num_res_blocks):
            pairs += _residual(f"encoder.downsamples.{i}", f"encoder.down_blocks.{i}")
        start = level * (num_res_blocks + 2)
        for i in range(num_res_blocks + 1):
            pairs += _residual(f"decoder.upsamples.{start + i}", f"decoder.up_blocks.{level}.resnets.{i}")
        if level < levels - 1:
            i = level * (num_res_blocks + 1) + num_res_blocks
            pairs += _resample(f"encoder.downsamples.{i}", f"encoder.down_blocks.{i}")
            i = start + num_res_blocks + 1
            pairs += _resample(f"decoder.upsamples.{i}", f"decoder.up_blocks.{level}.upsamplers.0")
    return KeyTable.of(pairs)


def umt5_keys(num_layers: int) -> KeyTable:
    """The UMT5 encoder: native <-> transformers ``UMT5EncoderModel``."""
    pairs = [("token_embedding.weight", "shared.weight"), ("norm.weight", "encoder.final_layer_norm.weight")]
    for n in range(num_layers):
        native, attention, feed = f"blocks.{n}", f"encoder.block.{n}.layer.0", f"encoder.block.{n}.layer.1"
        pairs += [
            (f"{native}.norm1.weight", f"{attention}.layer_norm.weight"),
            *((f"{native}.attn.{x}.weight", f"{attention}.SelfAttention.{x}.weight") for x in "qkvo"),
            (
                f"{native}.pos_embedding.embedding.weight",
                f"{attention}.SelfAttention.relative_attention_bias.weight",
            ),
            (f"{native}.norm2.weight", f"{feed}.layer_norm.weight"),
            (f"{native}.ffn.gate.0.weight", f"{feed}.DenseReluDense.wi_0.weight"),
            (f"{native}.ffn.fc1.weight", f"{feed}.DenseReluDense.wi_1.weight"),
            (f"{native}.ffn.fc2.weight", f"{feed}.DenseReluDense.wo.weight"),
        ]
    return KeyTable.of(pairs)


UMT5_ALIASES: Mapping[str, str] = MappingProxyType({"encoder.embed_tokens.weight": "shared.weight"})
"""transformers' second name for the token embedding; a file may have either name or both."""
