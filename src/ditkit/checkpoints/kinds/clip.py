"""The image half of CLIP, in Wan's own layout and in that of transformers.

Sources: Wan2.1 ``wan/modules/clip.py``; transformers ``modeling_clip.py``, ``CLIPVisionConfig``."""

import math
from typing import Any

from ditkit.checkpoints.kinds.configs import EPSILON, Check, ConfigFormat, ConfigKeys, Key, same
from ditkit.checkpoints.kinds.kind import Kind, Layout, Port
from ditkit.checkpoints.kinds.sizes import Fields, SizeReader, Sizes, Tensors
from ditkit.checkpoints.views.key_table import WB, KeyTable, Rule, leaves

FILE_PREFIX = "vision_model."  # of nearly all files; the class itself has lost it with transformers 5
BESIDE_NATIVE = ("textual.", "log_scale", "visual.head")
BESIDE_OTHER = ("text_model.", "text_projection.weight", "visual_projection.weight", "logit_scale",
                "embeddings.position_ids", f"{FILE_PREFIX}embeddings.position_ids")  # fmt: skip
LAYER = {"norm1": "layer_norm1", "norm2": "layer_norm2", "attn.proj": "self_attn.out_proj", "mlp.0": "mlp.fc1",
         "mlp.2": "mlp.fc2"}  # fmt: skip


def clip_keys(num_layers: int, *, prefixed: bool = False) -> KeyTable:
    """The image half of CLIP: native <-> transformers ``CLIPVisionModel``.

    The text half and the projection behind the last layer, which Wan does not use, and the buffer of position numbers
    are ignored by name. Names of transformers may begin with ``vision_model.``; ``prefixed`` makes that the first name,
    and the one without it the second."""
    pairs = [*leaves("visual.pre_norm", "pre_layrnorm"), *leaves("visual.post_norm", "post_layernorm")]
    pairs.append(("visual.patch_embedding.weight", "embeddings.patch_embedding.weight"))
    rules = [
        Rule(("visual.cls_embedding",), ("embeddings.class_embedding",), ones=2),
        Rule(("visual.pos_embedding",), ("embeddings.position_embedding.weight",), ones=1),
    ]
    for n in range(num_layers):
        native, other = f"visual.transformer.{n}", f"encoder.layers.{n}"
        pairs += [pair for ours, theirs in LAYER.items() for pair in leaves(f"{native}.{ours}", f"{other}.{theirs}")]
        for leaf in WB:
            thirds = tuple(f"{other}.self_attn.{x}_proj.{leaf}" for x in "qkv")
            rules.append(Rule((f"{native}.attn.to_qkv.{leaf}",), thirds))
    rules = [Rule((native,), (other,)) for native, other in pairs] + rules
    first, second = (FILE_PREFIX, "") if prefixed else ("", FILE_PREFIX)
    rules = [Rule(r.native, tuple(first + name for name in r.other), r.ones) for r in rules]
    aliases = {second + name.removeprefix(first): name for rule in rules for name in rule.other}
    return KeyTable(tuple(rules), aliases, BESIDE_NATIVE, BESIDE_OTHER)


VIT_H = 1280  # its width; ViT-L and ViT-B are narrower


def clip_sizes(tensors: Tensors, layout: str = "transformers") -> Sizes:
    """Fields of ``CLIPConfig``. Names of transformers may have ``vision_model.`` before them."""
    if any(name.startswith(FILE_PREFIX) for name in tensors):
        tensors = {n.removeprefix(FILE_PREFIX): facts for n, facts in tensors.items() if n.startswith(FILE_PREFIX)}
    read, native = SizeReader(tensors, layout, clip_keys(1)), layout == "native"
    patch, positions = "visual.patch_embedding.weight", "visual.pos_embedding"
    width = read.axis("hidden_size", patch, 0, 4)
    side = read.axis("patch_size", patch, 2, 4)
    rows = read.shape(positions, 3 if native else 2)[-2] - 1  # one is the class token's
    if math.isqrt(rows) ** 2 != rows:
        raise read.error(f"{read.name(positions)} has {rows + 1} rows, not one more than a square")
    read.tell("image_size", math.isqrt(rows) * side, positions)
    read.axis("intermediate_size", "visual.transformer.0.mlp.0.weight", 0, 2)
    blocks = r"visual\.transformer\.(\d+)\." if native else r"encoder\.layers\.(\d+)\."
    read.count("num_hidden_layers", blocks, "the names of the blocks")
    head = 80 if width == VIT_H else 64
    return read.sizes(
        num_attention_heads=None if width % head else width // head,
        hidden_act="gelu" if native or width == VIT_H else None,  # the others are about with two activations
    )


def _read_native(keys: ConfigKeys, fields: dict[str, Any]) -> None:
    fields["intermediate_size"] = fields["hidden_size"] * keys.take("vision_mlp_ratio", 4)
    keys.names["intermediate_size"] = "vision_dim x vision_mlp_ratio"


def _check(keys: ConfigKeys, fields: Fields) -> None:
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    keys.require(width % heads == 0, f"{heads} heads for a width of {width}, which they do not divide")
    side, patch = fields["image_size"], fields["patch_size"]
    keys.require(side % patch == 0, f"patches of {patch} pixels for pictures of {side}, which they do not divide")


MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def _processor(fields: Fields, task: str) -> dict[str, tuple[str, str, str, Fields]]:
    size = fields["image_size"]
    config = {
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": size},
        "resample": 3, "do_center_crop": True, "crop_size": {"height": size, "width": size}, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": MEAN, "image_std": STD,
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
GELU = Check(lambda value: value in ("quick_gelu", "gelu"), "and only 'quick_gelu' or 'gelu' is supported")
NATIVE = ConfigFormat(
    {
        "vision_dim": Key("hidden_size"), "vision_layers": Key("num_hidden_layers"),
        "vision_heads": Key("num_attention_heads"), "image_size": Key("image_size"), "patch_size": Key("patch_size"),
        "norm_eps": Key("layer_norm_eps", 1e-5, EPSILON), "activation": Key("hidden_act", "gelu", GELU),
    },
    {"vision_pool": ("token",)}, _read_native,
    ignored=("embed_dim", "vocab_size", "max_text_len", "text_dim", "text_heads", "text_layers"),
)  # fmt: skip
TRANSFORMERS = ConfigFormat(
    same(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224,
         patch_size=32) | same(EPSILON, layer_norm_eps=1e-5) | same(GELU, hidden_act="quick_gelu"),
    {"model_type": ("clip_vision_model",), "num_channels": (3,)},
    written={"architectures": ["CLIPVisionModel"], "attention_dropout": 0.0},
    ignored=WITHOUT_EFFECT.split(), nested={"clip": "vision_config"},
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
    config_class="ditkit.models.clip:CLIPConfig", module="ditkit.models.clip:build_clip",
    load="ditkit.assembly.loaders:load_clip",
    get="Take models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth of a native Wan 2.1 image-to-video repository or "
    "image_encoder/ of a -Diffusers one",
    check=_check, unsaid={"layer_norm_eps": 1e-5}, beside=_processor,
    ports=lambda config: {"width of the image features": Port(config.hidden_size, "hidden_size")},
)  # fmt: skip
