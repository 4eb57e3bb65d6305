"""What tensors are called in the official files and in those of diffusers and transformers, as substitutions.

It is written from the classes' own names, for tests only, and shares nothing with ``ditkit.checkpoints.kinds``: a
folder that is written with these names and read with those tables checks the tables.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, cat

TRANSFORMER = (
    (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"^img_emb\.proj\.0\.", "condition_embedder.image_embedder.norm1."),
    (r"^img_emb\.proj\.1\.", "condition_embedder.image_embedder.ff.net.0.proj."),
    (r"^img_emb\.proj\.3\.", "condition_embedder.image_embedder.ff.net.2."),
    (r"^img_emb\.proj\.4\.", "condition_embedder.image_embedder.norm2."),
    (r"^img_emb\.emb_pos$", "condition_embedder.image_embedder.pos_embed"),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"^head\.head\.", "proj_out."),
    (r"\.modulation$", ".scale_shift_table"),
    (r"\.norm3\.", ".norm2."),
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"\.([qkv])\.", r".to_\1."),
    (r"\.o\.", ".to_out.0."),
    (r"\.([kv])_img\.", r".add_\1_proj."),
    (r"\.norm_k_img\.", ".norm_added_k."),
    (r"\.ffn\.0\.", ".ffn.net.0.proj."),
    (r"\.ffn\.2\.", ".ffn.net.2."),
    (r"\.before_proj\.", ".proj_in."),
    (r"\.after_proj\.", ".proj_out."),
)  # official -> diffusers

VAE22 = (
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"\.conv_in\.", ".conv1."),
    (r"\.norm_out\.", ".head.0."),
    (r"\.conv_out\.", ".head.2."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"\.down_blocks\.(\d+)\.resnets\.", r".downsamples.\1.downsamples."),
    (r"\.down_blocks\.(\d+)\.downsampler\.", r".downsamples.\1.downsamples.2."),
    (r"\.up_blocks\.(\d+)\.resnets\.", r".upsamples.\1.upsamples."),
    (r"\.up_blocks\.(\d+)\.upsampler\.", r".upsamples.\1.upsamples.3."),
    (r"(\.middle\.[02]|samples\.\d+\.(?:down|up)samples\.\d+)\.norm1\.", r"\1.residual.0."),
    (r"(\.middle\.[02]|samples\.\d+\.(?:down|up)samples\.\d+)\.conv1\.", r"\1.residual.2."),
    (r"(\.middle\.[02]|samples\.\d+\.(?:down|up)samples\.\d+)\.norm2\.", r"\1.residual.3."),
    (r"(\.middle\.[02]|samples\.\d+\.(?:down|up)samples\.\d+)\.conv2\.", r"\1.residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."),
)  # diffusers -> official; two residual blocks a level

CLIP = (
    (r"^pre_layrnorm\.", "pre_norm."),
    (r"^post_layernorm\.", "post_norm."),
    (r"^embeddings\.patch_embedding\.", "patch_embedding."),
    (r"^encoder\.layers\.(\d+)\.layer_norm([12])\.", r"transformer.\1.norm\2."),
    (r"^encoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"transformer.\1.attn.proj."),
    (r"^encoder\.layers\.(\d+)\.mlp\.fc1\.", r"transformer.\1.mlp.0."),
    (r"^encoder\.layers\.(\d+)\.mlp\.fc2\.", r"transformer.\1.mlp.2."),
)  # transformers -> official, the tensors that keep their shape

UMT5 = (
    (r"^shared\.", "token_embedding."),
    (r"^encoder\.final_layer_norm\.", "norm."),
    (r"^encoder\.block\.(\d+)\.layer\.0\.layer_norm\.", r"blocks.\1.norm1."),
    (r"^encoder\.block\.(\d+)\.layer\.1\.layer_norm\.", r"blocks.\1.norm2."),
    (r"^encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.([qkvo])\.", r"blocks.\1.attn.\2."),
    (
        r"^encoder\.block\.(\d+)\.layer\.0\.SelfAttention\.relative_attention_bias\.",
        r"blocks.\1.pos_embedding.embedding.",
    ),
    (r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_0\.", r"blocks.\1.ffn.gate.0."),
    (r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wi_1\.", r"blocks.\1.ffn.fc1."),
    (r"^encoder\.block\.(\d+)\.layer\.1\.DenseReluDense\.wo\.", r"blocks.\1.ffn.fc2."),
)  # transformers -> official


def renamed(tensors: Mapping[str, Tensor], rules: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    result = {}
    for name, tensor in tensors.items():
        for pattern, other in rules:
            name = re.sub(pattern, other, name)
        result[name] = tensor
    assert len(result) == len(tensors)
    return result


def official_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' CLIPVisionModel -> ``visual.*`` of the official file: one fused matrix for q, k and v."""
    named = dict(tensors)
    result = {
        "cls_embedding": named.pop("embeddings.class_embedding").view(1, 1, -1),
        "pos_embedding": named.pop("embeddings.position_embedding.weight").unsqueeze(0),
    }
    for query in [name for name in named if ".self_attn.q_proj." in name]:
        parts = [named.pop(query.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        block, leaf = query.split(".")[2], query.split(".")[-1]
        result[f"transformer.{block}.attn.to_qkv.{leaf}"] = cat(parts)
    result |= renamed(named, CLIP)
    return {f"visual.{name}": tensor for name, tensor in result.items()}
