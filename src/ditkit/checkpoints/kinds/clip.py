"""The image half of CLIP, in Wan's own layout and in that of transformers.

Sources: Wan2.1 ``wan/modules/clip.py``; transformers ``modeling_clip.py``, ``CLIPVisionConfig``.
"""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import Any

from ditkit.checkpoints.kinds.configs import EPSILON, ConfigFormat, ConfigKeys, Key, same
from ditkit.checkpoints.kinds.kind import Fields, Kind, Layout, Port
from ditkit.checkpoints.kinds.sizes import SizeReader, Sizes, Tensors
from ditkit.checkpoints.views.key_table import WB, KeyTable, Rule, leaves

FILE_PREFIX = "vision_model."  # of nearly all files; the class itself has lost it with transformers 5
PROJECTION = ("visual.head", "visual_projection.weight")
BESIDE_NATIVE: tuple[str, ...] = ("textual.", "log_scale")
BESIDE_OTHER: tuple[str, ...] = (
    "text_model.", "text_projection.weight", "logit_scale",
    "embeddings.position_ids", f"{FILE_PREFIX}embeddings.position_ids",
)  # fmt: skip
LAYER = (
    ("norm1", "layer_norm1"), ("norm2", "layer_norm2"), ("attn.proj", "self_attn.out_proj"), ("mlp.0", "mlp.fc1"),
    ("mlp.2", "mlp.fc2"),
)  # fmt: skip


def clip_keys(num_layers: int, *, projection: bool = False, prefixed: bool = False) -> KeyTable:
    """The image half of CLIP: native <-> transformers ``CLIPVisionModel``.

    The text half, which Wan does not use, and the buffer of position numbers are ignored by name; so is the projection
    behind the last layer, unless ``projection`` asks for it (``CLIPVisionModelWithProjection``). Names of transformers
    may begin with ``vision_model.``; ``prefixed`` makes that the first name, and the one without it the second."""
    pairs = [*leaves("visual.pre_norm", "pre_layrnorm"), *leaves("visual.post_norm", "post_layernorm")]
    pairs.append(("visual.patch_embedding.weight", "embeddings.patch_embedding.weight"))
    rules = [
        Rule(("visual.cls_embedding",), ("embeddings.class_embedding",), ones=2),
        Rule(("visual.pos_embedding",), ("embeddings.position_embedding.weight",), ones=1),
    ]
    for n in range(num_layers):
        native, other = f"visual.transformer.{n}", f"encoder.layers.{n}"
        pairs += [pair for ours, theirs in LAYER for pair in leaves(f"{native}.{ours}", f"{other}.{theirs}")]
        for leaf in WB:
            thirds = tuple(f"{other}.self_attn.{x}_proj.{leaf}" for x in "qkv")
            rules.append(Rule((f"{native}.attn.to_qkv.{leaf}",), thirds))
    rules = [Rule((native,), (other,)) for native, other in pairs] + rules
    aliases = {FILE_PREFIX + name: name for rule in rules for name in rule.other}
    if prefixed:
        first = {second: first for first, second in aliases.items()}
        rules = [Rule(r.native, tuple(first[name] for name in r.other), r.ones, r.transpose) for r in rules]
        aliases = first
    beside_native, beside_other = BESIDE_NATIVE, BESIDE_OTHER
    if projection:
        rules.append(Rule((PROJECTION[0],), (PROJECTION[1],), transpose=True))
    else:
        beside_native, beside_other = (*beside_native, PROJECTION[0]), (*beside_other, PROJECTION[1])
    return KeyTable(tuple(rules), MappingProxyType(aliases), beside_native, beside_other)


HEAD_WIDTHS = MappingProxyType({1280: 80})  # ViT-H
HEAD_WIDTH = 64  # ViT-L and ViT-B


def clip_sizes(tensors: Tensors, layout: str = "transformers") -> Sizes:
    """Fields of ``CLIPConfig``. Names of transformers may have ``vision_model.`` before them."""
    if any(name.startswith(FILE_PREFIX) for name in tensors):
        tensors = {n.removeprefix(FILE_PREFIX): facts for n, facts in tensors.items() if n.startswith(FILE_PREFIX)}
    read = SizeReader(tensors, layout)
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
    head = HEAD_WIDTHS.get(width, HEAD_WIDTH)
    if width % head == 0:
        assumed["num_attention_heads"] = width // head
    if layout == "native" or width in HEAD_WIDTHS:  # the others are about with two activations
        assumed["hidden_act"] = "gelu"
    undecided = tuple(key for key in ("num_attention_heads", "hidden_act") if key not in assumed)
    return read.sizes(assumed=assumed, undecided=undecided)


def _read_native(keys: ConfigKeys, fields: dict[str, Any]) -> None:
    fields["intermediate_size"] = fields["hidden_size"] * keys.take("vision_mlp_ratio", 4)
    keys.said["intermediate_size"] = "vision_dim x vision_mlp_ratio"
    fields["hidden_act"] = keys.only("activation", "gelu", "quick_gelu")


def _read_transformers(keys: ConfigKeys, fields: dict[str, Any]) -> None:
    fields["hidden_act"] = keys.only("hidden_act", "quick_gelu", "gelu")  # the first is transformers' default


def _check(keys: ConfigKeys, fields: Fields) -> None:
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    keys.require(width % heads == 0, f"{heads} heads for a width of {width}, which they do not divide")
    side, patch = fields["image_size"], fields["patch_size"]
    keys.require(side % patch == 0, f"patches of {patch} pixels for pictures of {side}, which they do not divide")


MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def _processor(fields: Fields, task: str) -> dict[str, tuple[str, str, str, Fields]]:
    size = fields["image_size"]
    config = {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": size},
        "resample": 3, "do_center_crop": True, "crop_size": {"height": size, "width": size}, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": list(MEAN), "image_std": list(STD),
        "do_convert_rgb": True,
    }  # fmt: skip
    return {"image_processor": ("transformers", "CLIPImageProcessor", "preprocessor_config.json", config)}


WITHOUT_EFFECT = """
    dropout dtype initializer_factor initializer_range projection_dim torch_dtype transformers_version
    add_cross_attention bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id id2label is_decoder is_encoder_decoder label2id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states
    output_scores pad_token_id prefix problem_type pruned_heads remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss
    tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torchscript typical_p use_bfloat16
"""  # most of it transformers 4 wrote into every nested config, for text that a vision tower does not generate
NATIVE = ConfigFormat(
    {
        "vision_dim": Key("hidden_size"), "vision_layers": Key("num_hidden_layers"),
        "vision_heads": Key("num_attention_heads"), "image_size": Key("image_size"), "patch_size": Key("patch_size"),
        "norm_eps": Key("layer_norm_eps", 1e-5, EPSILON),
    },
    {"vision_pool": ("token",)}, _read_native,
    ignored=("embed_dim", "vocab_size", "max_text_len", "text_dim", "text_heads", "text_layers"),
)  # fmt: skip
TRANSFORMERS = ConfigFormat(
    same(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224,
         patch_size=32) | same(EPSILON, layer_norm_eps=1e-5),
    {"model_type": ("clip_vision_model",), "num_channels": (3,)}, _read_transformers,
    lambda fields: {"hidden_act": fields["hidden_act"]},
    {"architectures": ["CLIPVisionModel"], "attention_dropout": 0.0},
    ignored=WITHOUT_EFFECT.split(),
    nested={"clip": "vision_config"},
)  # fmt: skip
CLIP = Kind(
    "clip", "CLIP", "a CLIP image encoder", ("image_encoder",),
    {
        "native": Layout(
            (("visual.patch_embedding.weight", "visual.transformer.0.attn.to_qkv.weight"),),
            NATIVE, ("XLMRobertaCLIP",),
            file="models_clip_open-clip-xlm-roberta-large-vit-huge-14", pickle=True,
            remark="the image encoder has no text half; the official code loads one, though it never uses it",
        ),
        "transformers": Layout(
            tuple((f"{prefix}embeddings.patch_embedding.weight", f"{prefix}encoder.layers.0.self_attn.q_proj.weight")
                  for prefix in ("", FILE_PREFIX)),
            TRANSFORMERS, model_types=("clip_vision_model", "clip"), file="model", library="transformers",
        ),
    },
    clip_sizes, lambda fields: clip_keys(fields["num_hidden_layers"]), own="other",
    file_keys=lambda fields, layout: clip_keys(fields["num_hidden_layers"], prefixed=layout != "native"),
    config_class="ditkit.models.encoders:CLIPConfig", module="ditkit.models.encoders:build_clip",
    load="ditkit.assembly.loaders:load_clip",
    get="Take models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth of a native Wan 2.1 image-to-video repository or "
    "image_encoder/ of a -Diffusers one",
    check=_check, unsaid=MappingProxyType({"layer_norm_eps": 1e-5}), beside=_processor,
    ports=lambda config: {"width of the image features": Port(config.hidden_size, "hidden_size")},
)  # fmt: skip
