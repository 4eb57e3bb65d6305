"""The folder layout of diffusers: ``model_index.json`` and one folder a component, read and written.

Reading turns a component's ``config.json`` into the fields of our own config classes, as a plain dict, because this
room knows no model; ``configs.py`` has the rule for keys. Absent keys have diffusers' own defaults.
Leaves out: tensors' names (keys.py), what shapes tell (sizes.py), schedulers' settings.
Sources of names and defaults: diffusers ``transformer_wan.py``, ``transformer_wan_vace.py``,
``autoencoder_kl_wan.py``; transformers ``UMT5Config``, ``CLIPVisionConfig``.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ditkit.checkpoints.files.text import read_json
from ditkit.checkpoints.kinds.configs import ConfigKeys, is_number
from ditkit.checkpoints.kinds.sizes import Tensors, clip_sizes, settle, transformer_sizes, umt5_sizes, vae_sizes
from ditkit.errors import LoadError, OutputError

if TYPE_CHECKING:
    from torch import Tensor

DIFFUSERS_VERSION = "0.42.1"  # the release whose layout is written
TRANSFORMER_CLASS, VACE_CLASS, VAE_CLASS = "WanTransformer3DModel", "WanVACETransformer3DModel", "AutoencoderKLWan"
TEXT_ENCODER_CLASS, IMAGE_ENCODER_CLASS = "UMT5EncoderModel", "CLIPVisionModel"


@dataclass(frozen=True)
class ModelIndex:
    """``model_index.json``: the pipeline's class, each component's (library, class), and the pipeline's own values
    (``boundary_ratio``, ``expand_timesteps``). Components that are null there are left out."""

    folder: Path
    pipeline: str
    components: Mapping[str, tuple[str, str]]
    values: Mapping[str, Any]


def read_index(folder: str | Path, require_folders: bool = True) -> ModelIndex:
    """Raises LoadError for a missing or malformed index, and for a component whose folder is not there (unless
    ``require_folders`` is false)."""
    folder = Path(folder)
    asked = f"opening the model in {folder}"
    if not folder.is_dir():
        raise LoadError(asked, "there is no such folder", "Check the path, or download the model")
    if not (folder / "model_index.json").is_file():
        raise LoadError(asked, "it has no model_index.json", "Give a folder in the diffusers layout")
    raw = read_json(folder / "model_index.json")
    components, values = {}, {}
    for key, value in raw.items():
        if key.startswith("_"):
            continue
        if isinstance(value, list):
            if len(value) != 2 or not (value == [None, None] or all(isinstance(x, str) for x in value)):
                raise LoadError(
                    asked, f"model_index.json gives {key} as {value}", "Write a library and a class, or two nulls"
                )
            if value != [None, None]:
                components[key] = (value[0], value[1])
        else:
            values[key] = value
    absent = sorted(name for name in components if not (folder / name).is_dir())
    if absent and require_folders:
        raise LoadError(asked, f"these components have no folder: {', '.join(absent)}", "Download the model again")
    return ModelIndex(folder, str(raw.get("_class_name", "")), components, values)


def read_config(folder: str | Path, name: str = "config.json") -> dict[str, Any]:
    """A component's config as it stands. Raises LoadError when there is none."""
    return read_json(Path(folder) / name)


def require_transformer(keys: ConfigKeys, fields: Mapping[str, Any]) -> None:
    """What no shape tells, and a network of ours needs: heads that can be rotated in three parts, hints in order."""
    dim, heads, layers = fields["dim"], fields["num_heads"], fields["vace_layers"]
    width = dim // heads
    found = f"{heads} heads for a width of {dim}, where each needs an even width of at least 6"
    keys.require(dim % heads == 0 and width % 2 == 0 and width >= 6, found)
    rising = not layers or (layers[0] == 0 and sorted(set(layers)) == [*layers] and layers[-1] < fields["num_layers"])
    found = f"vace_layers is {layers!r:.200}, which does not rise from 0 within {fields['num_layers']} blocks"
    keys.require(rising, found)
    keys.require(
        fields["text_len"] <= LONGEST_TEXT, f"text_len is {fields['text_len']!r:.20}, and the official one is 512"
    )


def require_umt5(keys: ConfigKeys, fields: Mapping[str, Any]) -> None:
    """Buckets beyond a quarter of them grow with the logarithm of the distance (transformers ``modeling_umt5.py``)."""
    buckets, distance = fields["relative_attention_num_buckets"], fields["relative_attention_max_distance"]
    found = f"a greatest distance of {distance!r:.20} for {buckets} buckets of positions"
    keys.require(distance > buckets // 4 > 0, found)


def require_clip(keys: ConfigKeys, fields: Mapping[str, Any]) -> None:
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    keys.require(width % heads == 0, f"{heads} heads for a width of {width}, which they do not divide")
    side, patch = fields["image_size"], fields["patch_size"]
    keys.require(side % patch == 0, f"patches of {patch} pixels for pictures of {side}, which they do not divide")


LONGEST_TEXT = 2**16  # rows of memory for each prompt
IMAGE_CLAIM = "image_claim"
"""Rule: a config that claims an image branch is used for weights that have none (a 5B config with one is about)."""

_SAID_BY_TRANSFORMERS = MappingProxyType({
    "in_dim": "in_channels", "out_dim": "out_channels", "image_tokens": "pos_embed_seq_len",
    "vace_in_dim": "vace_in_channels",
})  # fmt: skip
VACE_LAYERS = (0, 5, 10, 15, 20, 25, 30, 35)  # diffusers' default


def transformer_config(
    config: Mapping[str, Any],
    tensors: Tensors | None = None,
    allow: Collection[str] = (),
    notes: list[str] | None = None,
) -> dict[str, Any]:
    """The config of a ``WanTransformer3DModel`` or a ``WanVACETransformer3DModel`` -> the fields of ``WanConfig``.

    With ``tensors`` (facts under diffusers names) every field that shapes tell is compared. ``allow``: names of rules,
    here ``image_claim``. ``notes`` grows by the unknown keys. Raises LoadError for unsupported and contradicting
    values."""
    keys = ConfigKeys(config, "reading the transformer's config", allow, notes)
    kind = config.get("_class_name", TRANSFORMER_CLASS)
    if kind not in (TRANSFORMER_CLASS, VACE_CLASS):
        raise keys.error(f"its class is {kind}, and only {TRANSFORMER_CLASS} and {VACE_CLASS} are supported")
    keys.only("patch_size", (1, 2, 2))
    keys.only("qk_norm", "rms_norm_across_heads")
    keys.only("cross_attn_norm", True)
    heads = keys.integer("num_attention_heads", 40)
    width = keys.integer("attention_head_dim", 128)
    in_dim = keys.integer("in_channels", 16)
    out = keys.any("out_channels", 16)
    fields: dict[str, Any] = {
        "dim": heads * width,
        "ffn_dim": keys.integer("ffn_dim", 13824),
        "num_heads": heads,
        "num_layers": keys.integer("num_layers", 40),
        "in_dim": in_dim,
        "out_dim": in_dim if out is None else out,
        "text_dim": keys.integer("text_dim", 4096),
        "freq_dim": keys.integer("freq_dim", 256),
        "eps": keys.epsilon("eps", 1e-6),
        "patch_size": (1, 2, 2),
        "text_len": 512,
        **_image_fields(keys, heads * width),
    }
    if type(fields["out_dim"]) is not int:
        raise keys.error(f"out_channels is {out!r}, not a whole number", "Correct the config")
    if kind == VACE_CLASS:
        fields["vace_layers"] = keys.list_of("vace_layers", VACE_LAYERS, lambda x: type(x) is int, "whole numbers")
        fields["vace_in_dim"] = keys.integer("vace_in_channels", 96)
    else:
        keys.only("vace_layers", None, ())
        fields["vace_layers"] = ()
    keys.ignore(["rope_max_seq_len"])  # the length of a table, not its values
    keys.done()
    if tensors is None:
        return fields
    sizes = transformer_sizes(tensors, "diffusers")
    if IMAGE_CLAIM in allow and sizes.fields["image_dim"] is None:
        fields |= {"image_dim": None, "image_tokens": None}
    said = {**_SAID_BY_TRANSFORMERS, "dim": f"num_attention_heads {heads} x attention_head_dim {width}"}
    whole = settle(keys.asked, sizes, fields, said, _about_image_claims)
    require_transformer(keys, whole)
    return whole


def _image_fields(keys: ConfigKeys, dim: int) -> dict[str, Any]:
    image, tokens = (keys.integer_or_none(key) for key in ("image_dim", "pos_embed_seq_len"))
    added = keys.integer_or_none("added_kv_proj_dim")
    if added is not None and added != dim:
        raise keys.error(f"added_kv_proj_dim is {added}, and only the width {dim} is supported")
    if (image is None) != (added is None):
        raise keys.error(f"image_dim is {image} and added_kv_proj_dim is {added}", "Give both, or null for both")
    if image is None and tokens is not None:
        raise keys.error(f"pos_embed_seq_len is {tokens} and image_dim is null", "Correct the config")
    return {"image_dim": image, "image_tokens": tokens}


def _about_image_claims(key: str) -> str | None:
    if key != "image_dim":
        return None
    return (
        "Use the config of these weights; if they are whole, set image_dim and added_kv_proj_dim to null in it, or "
        f"allow {IMAGE_CLAIM}"
    )


_SAID_BY_VAES = MappingProxyType({
    "dim": "base_dim", "temporal_downsample": "temperal_downsample", "dec_dim": "decoder_base_dim",
})  # fmt: skip


def vae_config(
    config: Mapping[str, Any],
    tensors: Tensors | None = None,
    allow: Collection[str] = (),
    notes: list[str] | None = None,
) -> dict[str, Any]:
    """The config of an ``AutoencoderKLWan`` of Wan 2.1 -> the fields of ``WanVAEConfig``; ``tensors`` as above."""
    keys = _vae_keys(config, allow, notes)
    keys.only("is_residual", False)
    keys.only("patch_size", None, 1)
    keys.only("in_channels", 3)
    keys.only("out_channels", 3)
    fields = _vae_fields(keys, 16)
    keys.only("decoder_base_dim", None, fields["dim"])
    keys.only("scale_factor_spatial", 2 ** (len(fields["dim_mult"]) - 1))
    keys.done()
    if tensors is None:
        return fields
    return settle(keys.asked, vae_sizes(tensors, "diffusers"), fields, _SAID_BY_VAES)


def vae22_config(
    config: Mapping[str, Any],
    tensors: Tensors | None = None,
    allow: Collection[str] = (),
    notes: list[str] | None = None,
) -> dict[str, Any]:
    """The config of an ``AutoencoderKLWan`` of Wan 2.2 -> the fields of ``WanVAE22Config``; ``tensors`` as above."""
    keys = _vae_keys(config, allow, notes)
    keys.only("is_residual", True)
    patch = keys.integer("patch_size", 2)
    for key in ("in_channels", "out_channels"):
        keys.only(key, 3 * patch**2)
    fields = _vae_fields(keys, 48)
    fields |= {"dec_dim": keys.integer("decoder_base_dim", fields["dim"]), "patch_size": patch}
    keys.only("scale_factor_spatial", patch * 2 ** (len(fields["dim_mult"]) - 1))
    keys.done()
    if tensors is None:
        return fields
    return settle(keys.asked, vae_sizes(tensors, "diffusers", "wan_vae22"), fields, _SAID_BY_VAES)


def is_residual(config: Mapping[str, Any]) -> bool:
    """Whether this is the config of a VAE of Wan 2.2."""
    return config.get("is_residual", False) is True


def _vae_keys(config: Mapping[str, Any], allow: Collection[str], notes: list[str] | None) -> ConfigKeys:
    keys = ConfigKeys(config, "reading the VAE's config", allow, notes)
    if config.get("_class_name", VAE_CLASS) != VAE_CLASS:
        raise keys.error(f"its class is {config['_class_name']}, and only {VAE_CLASS} is supported")
    keys.only("attn_scales", ())
    keys.ignore(["dropout"])  # inactive outside training
    return keys


def _vae_fields(keys: ConfigKeys, usual: int) -> dict[str, Any]:
    """What both VAEs have. ``usual``: the latent channels whose statistics need not be in the config."""
    z_dim = keys.integer("z_dim", 16)
    mult = keys.list_of("dim_mult", (1, 2, 4, 4), lambda x: type(x) is int and x > 0, "whole numbers")
    temporal = keys.list_of("temperal_downsample", (False, True, True), lambda x: type(x) is bool, "true and false")
    fields = {
        "dim": keys.integer("base_dim", 96), "z_dim": z_dim, "dim_mult": mult,
        "num_res_blocks": keys.integer("num_res_blocks", 2), "temporal_downsample": temporal,
    }  # fmt: skip
    if not mult or len(temporal) != len(mult) - 1:
        raise keys.error(
            f"temperal_downsample has {len(temporal)} values where dim_mult has {len(mult)}", "There must be one less"
        )
    for key in ("latents_mean", "latents_std"):
        if key not in keys.rest:
            if z_dim != usual:
                raise keys.error(f"it has no {key}, and the usual one is for {usual} channels", "Add it to the config")
            continue  # our defaults are the official ones
        values = keys.list_of(key, (), is_number, "finite numbers")
        if len(values) != z_dim:
            raise keys.error(f"{key} has {len(values)} values where z_dim is {z_dim}", "Correct the config")
        if key == "latents_std" and min(values) <= 0:
            raise keys.error(f"latents_std has the value {min(values)}", "Correct the config, all must be above 0")
        fields[key] = tuple(map(float, values))
    keys.only("scale_factor_temporal", 2 ** sum(temporal))
    return fields


UMT5_WITHOUT_EFFECT = (
    "architectures", "classifier_dropout", "decoder_start_token_id", "dropout_rate", "dtype", "eos_token_id",
    "initializer_factor", "is_decoder", "is_encoder_decoder", "num_decoder_layers", "output_past", "pad_token_id",
    "scalable_attention", "scale_decoder_outputs", "tie_word_embeddings", "tokenizer_class", "torch_dtype",
    "transformers_version", "use_cache",
)  # fmt: skip
UMT5_SIZES = {
    "vocab_size": 250112, "d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_heads": 6,
    "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
}  # fmt: skip


def text_encoder_config(
    config: Mapping[str, Any],
    tensors: Tensors | None = None,
    allow: Collection[str] = (),
    notes: list[str] | None = None,
) -> dict[str, Any]:
    """The config of a transformers UMT5 model -> the fields of our UMT5 config; ``tensors`` as above."""
    keys = ConfigKeys(config, "reading the text encoder's config", allow, notes)
    keys.only("model_type", "umt5")
    keys.only("feed_forward_proj", "gated-gelu")
    keys.only("dense_act_fn", "gelu_new")
    keys.only("is_gated_act", True)
    fields: dict[str, Any] = {key: keys.integer(key, default) for key, default in UMT5_SIZES.items()}
    fields["layer_norm_epsilon"] = keys.epsilon("layer_norm_epsilon", 1e-6)
    keys.ignore(UMT5_WITHOUT_EFFECT)
    keys.done()
    if tensors is None:
        return fields
    whole = settle(keys.asked, umt5_sizes(tensors), fields)
    require_umt5(keys, whole)
    return whole


CLIP_WITHOUT_EFFECT = (
    "architectures", "attention_dropout", "dropout", "dtype", "initializer_factor", "initializer_range",
    "projection_dim", "torch_dtype", "transformers_version",
    # what transformers 4 wrote into every nested config, for text that a vision tower does not generate
    "add_cross_attention", "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward",
    "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty", "finetuning_task",
    "forced_bos_token_id", "forced_eos_token_id", "id2label", "is_decoder", "is_encoder_decoder", "label2id",
    "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
    "num_return_sequences", "output_attentions", "output_hidden_states", "output_scores", "pad_token_id", "prefix",
    "problem_type", "pruned_heads", "remove_invalid_values", "repetition_penalty", "return_dict",
    "return_dict_in_generate", "sep_token_id", "suppress_tokens", "task_specific_params", "temperature",
    "tf_legacy_loss", "tie_encoder_decoder", "tie_word_embeddings", "tokenizer_class", "top_k", "top_p",
    "torchscript", "typical_p", "use_bfloat16",
)  # fmt: skip
CLIP_SIZES = MappingProxyType({
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 224, "patch_size": 32,
})  # fmt: skip
CLIP_ACTIVATIONS = ("quick_gelu", "gelu")  # the first is transformers' default


def clip_config(
    config: Mapping[str, Any],
    tensors: Tensors | None = None,
    allow: Collection[str] = (),
    notes: list[str] | None = None,
) -> dict[str, Any]:
    """The config of a transformers CLIP vision model, or of a whole CLIP model (its ``vision_config``) -> the fields
    of ``CLIPConfig``; ``tensors`` as above, under names without ``vision_model.``."""
    asked = "reading the image encoder's config"
    if config.get("model_type") == "clip":
        nested = config.get("vision_config")
        if not isinstance(nested, Mapping):
            raise LoadError(asked, "it is of a whole CLIP model and has no vision_config", "Correct the config")
        config = nested
    keys = ConfigKeys(config, asked, allow, notes)
    keys.only("model_type", "clip_vision_model")
    keys.only("num_channels", 3)
    fields: dict[str, Any] = {key: keys.integer(key, default) for key, default in CLIP_SIZES.items()}
    fields["hidden_act"] = keys.any("hidden_act", CLIP_ACTIVATIONS[0])
    if fields["hidden_act"] not in CLIP_ACTIVATIONS:
        listed = " or ".join(CLIP_ACTIVATIONS)
        raise keys.error(f"hidden_act is {fields['hidden_act']!r}, and only {listed} is supported")
    fields["layer_norm_eps"] = keys.epsilon("layer_norm_eps", 1e-5)
    keys.ignore(CLIP_WITHOUT_EFFECT)
    keys.done()
    if tensors is None:
        return fields
    whole = settle(keys.asked, clip_sizes(tensors), fields)
    require_clip(keys, whole)
    return whole


def transformer_config_out(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``transformer_config``, with diffusers' class name and version."""
    image, layers = fields.get("image_dim"), fields.get("vace_layers", ())
    control = {"vace_layers": list(layers), "vace_in_channels": fields.get("vace_in_dim", 96)} if layers else {}
    return {
        "_class_name": VACE_CLASS if layers else TRANSFORMER_CLASS,
        "_diffusers_version": DIFFUSERS_VERSION,
        "added_kv_proj_dim": None if image is None else fields["dim"],
        "attention_head_dim": fields["dim"] // fields["num_heads"],
        "cross_attn_norm": True,
        "eps": fields["eps"],
        "ffn_dim": fields["ffn_dim"],
        "freq_dim": fields["freq_dim"],
        "image_dim": image,
        "in_channels": fields["in_dim"],
        "num_attention_heads": fields["num_heads"],
        "num_layers": fields["num_layers"],
        "out_channels": fields["out_dim"],
        "patch_size": list(fields["patch_size"]),
        "pos_embed_seq_len": fields.get("image_tokens"),
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": fields["text_dim"],
        **control,
    }


def vae_config_out(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``vae_config``, and of ``vae22_config`` for fields with a ``dec_dim``."""
    residual = "dec_dim" in fields
    patch = fields["patch_size"] if residual else 1
    return {
        "_class_name": VAE_CLASS,
        "_diffusers_version": DIFFUSERS_VERSION,
        "attn_scales": [],
        "base_dim": fields["dim"],
        "decoder_base_dim": fields["dec_dim"] if residual else None,
        "dim_mult": list(fields["dim_mult"]),
        "dropout": 0.0,
        "in_channels": 3 * patch**2,
        "is_residual": residual,
        "latents_mean": list(fields["latents_mean"]),
        "latents_std": list(fields["latents_std"]),
        "num_res_blocks": fields["num_res_blocks"],
        "out_channels": 3 * patch**2,
        "patch_size": patch if residual else None,
        "scale_factor_spatial": patch * 2 ** (len(fields["dim_mult"]) - 1),
        "scale_factor_temporal": 2 ** sum(fields["temporal_downsample"]),
        "temperal_downsample": list(fields["temporal_downsample"]),
        "z_dim": fields["z_dim"],
    }


def text_encoder_config_out(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``text_encoder_config``."""
    return {
        "architectures": [TEXT_ENCODER_CLASS],
        "model_type": "umt5",
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu_new",
        "is_gated_act": True,
        "dropout_rate": 0.0,
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        **fields,
    }


def clip_config_out(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``clip_config``, for a vision model on its own."""
    return {
        "architectures": [IMAGE_ENCODER_CLASS],
        "model_type": "clip_vision_model",
        "attention_dropout": 0.0,
        "num_channels": 3,
        **fields,
    }


def write_component(
    folder: str | Path,
    config: Mapping[str, Any] | None,
    tensors: Mapping[str, Tensor] | None = None,
    config_name: str = "config.json",
    weights_name: str = "diffusion_pytorch_model.safetensors",
    files: Sequence[str | Path] = (),
) -> None:
    """Write one component: its config, its ``tensors`` (already under the names of the layout) and copies of ``files``.

    For a text encoder ``weights_name`` is ``model.safetensors``. The folder appears complete or not at all; one that is
    there already is never touched. Raises OutputError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with _new_folder(Path(folder)) as temporary:
        for file in files:
            shutil.copy(file, temporary)
        if tensors is not None:
            plain = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
            try:
                save_file(plain, temporary / weights_name, {"format": "pt"})
            except SafetensorError as error:  # a full disk, told in the library's own way
                raise OutputError(f"writing {folder}", str(error), "Check the disk and its free space") from None
        if config is not None:
            _write_json(temporary / config_name, config)


def write_index(
    folder: str | Path,
    components: Mapping[str, tuple[str, str]],
    pipeline: str = "WanPipeline",
    values: Mapping[str, Any] | None = None,
) -> None:
    """Write ``model_index.json`` for components that are there: name -> (library, class). Write it last.

    Raises OutputError when a component's folder is not there."""
    folder = Path(folder)
    if absent := sorted(name for name in components if not (folder / name).is_dir()):
        raise OutputError(f"writing {folder}/model_index.json", f"there is no {', '.join(absent)}", "Write these first")
    index = {"_class_name": pipeline, "_diffusers_version": DIFFUSERS_VERSION, **(values or {})}
    temporary = folder / "model_index.json.tmp"
    _write_json(temporary, index | {name: list(kind) for name, kind in components.items()})
    os.replace(temporary, folder / "model_index.json")


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its name when the block ends well, and vanishes otherwise."""
    asked = f"writing {folder}"
    if folder.exists():
        raise OutputError(asked, "it exists already", "Choose another folder, or remove it first")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise OutputError(asked, f"it cannot be made ({error.strerror})", "Choose a folder you can write to") from None
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp makes it private
        os.replace(temporary, folder)
    except OSError as error:
        raise OutputError(asked, f"it could not be written ({error})", "Check the disk and its free space") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
