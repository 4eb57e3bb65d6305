"""Which config belongs to which weights, and the configs that come with native files.

A config is known by its class name or its model type. Native ones spell our fields almost as we do; what they leave
out, such as the branches, is told by the tensors. Leaves out: diffusers' and transformers' configs
(diffusers_folder.py).
Sources of names and defaults: Wan2.1 and Wan2.2 ``wan/modules/{model,vace_model,vae,vae2_2,t5,clip}.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

from ditkit.checkpoints.kinds import diffusers_folder as theirs
from ditkit.checkpoints.kinds import sizes
from ditkit.checkpoints.kinds.configs import REQUIRED, ConfigKeys
from ditkit.checkpoints.kinds.sizes import Sizes, Tensors, settle
from ditkit.errors import LoadError

TASKS = ("t2v", "i2v", "flf2v", "vace", "ti2v")  # what a native transformer's ``model_type`` may be


def task_of(fields: Mapping[str, Any]) -> str | None:
    """What a transformer of these sizes makes a video from: one of ``TASKS``, or None for a condition of another kind.

    An image is told by its condition channels (4 of mask and as many as the latents have) or by the 48 latent channels
    of the 5B model; the control branch and the learned positions of two frames have tensors of their own."""
    channels, out = fields["in_dim"], fields["out_dim"]
    if channels == out:
        if fields.get("image_dim") is not None:
            return None
        return "vace" if fields.get("vace_layers") else ("ti2v" if out == 48 else "t2v")
    if channels == 2 * out + 4 and not fields.get("vace_layers"):
        return "flf2v" if fields.get("image_tokens") is not None else "i2v"
    return None


def _transformer(
    config: Mapping[str, Any], tensors: Tensors, allow: Collection[str], notes: list[str]
) -> dict[str, Any]:
    keys = ConfigKeys(config, "reading the transformer's config", allow, notes)
    keys.only("patch_size", (1, 2, 2))
    keys.only("qk_norm", True)
    keys.only("cross_attn_norm", True)
    keys.only("window_size", (-1, -1))
    fields: dict[str, Any] = {
        key: keys.integer(key, default)
        for key, default in (
            ("dim", 2048), ("ffn_dim", 8192), ("num_heads", 16), ("num_layers", 32), ("in_dim", 16), ("out_dim", 16),
            ("text_dim", 4096), ("freq_dim", 256), ("text_len", 512),
        )
    }  # fmt: skip
    fields |= {"eps": keys.epsilon("eps", 1e-6), "patch_size": (1, 2, 2), "vace_layers": ()}
    task = keys.any("model_type", "t2v")
    if task not in TASKS:
        raise keys.error(f"its model_type is {task!r}, and only {', '.join(TASKS)} are supported")
    if config.get("_class_name") == "VaceWanModel":
        layers = keys.any("vace_layers", None)
        if layers is None:  # the class itself takes every second block
            layers = list(range(0, fields["num_layers"], 2))
        if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
            raise keys.error(f"vace_layers is {layers!r}, not a list of whole numbers", "Correct the config")
        fields |= {"vace_layers": tuple(layers), "vace_in_dim": keys.integer("vace_in_dim", 96)}
    else:
        keys.only("vace_layers", None, ())
    keys.done()
    whole = settle(keys.asked, sizes.transformer_sizes(tensors), fields)
    theirs.require_transformer(keys, whole)
    if task != task_of(whole):
        raise keys.error(
            f"its model_type is {task} and the tensors are those of {task_of(whole) or 'no known task'}",
            "Use the config of these weights",
        )
    return whole


def _vae(
    config: Mapping[str, Any], tensors: Tensors, allow: Collection[str], notes: list[str], kind: str = "wan_vae"
) -> dict[str, Any]:
    keys = ConfigKeys(config, "reading the VAE's config", allow, notes)
    keys.only("attn_scales", ())
    keys.ignore(["dropout"])
    fields: dict[str, Any] = {key: keys.integer(key, REQUIRED) for key in ("dim", "z_dim", "num_res_blocks")}
    fields["dim_mult"] = keys.list_of("dim_mult", REQUIRED, lambda x: type(x) is int, "whole numbers")
    fields["temporal_downsample"] = keys.list_of(
        "temperal_downsample", REQUIRED, lambda x: type(x) is bool, "true and false"
    )
    if kind == "wan_vae22":
        fields["dec_dim"] = keys.integer("dec_dim", REQUIRED)
    keys.done()
    return settle(keys.asked, sizes.vae_sizes(tensors, "native", kind), fields)


def _vae22(config: Mapping[str, Any], tensors: Tensors, allow: Collection[str], notes: list[str]) -> dict[str, Any]:
    return _vae(config, tensors, allow, notes, "wan_vae22")


_UMT5 = MappingProxyType({
    "vocab_size": "vocab_size", "dim": "d_model", "dim_ffn": "d_ff", "num_heads": "num_heads",
    "num_layers": "num_layers", "num_buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance",
})  # fmt: skip


def _umt5(config: Mapping[str, Any], tensors: Tensors, allow: Collection[str], notes: list[str]) -> dict[str, Any]:
    keys = ConfigKeys(config, "reading the text encoder's config", allow, notes)
    keys.only("shared_pos", False)
    keys.ignore(["text_len", "dropout"])
    fields: dict[str, Any] = {ours: keys.integer(name, REQUIRED) for name, ours in _UMT5.items()}
    fields["d_kv"] = keys.integer("dim_attn", REQUIRED) // fields["num_heads"]
    fields["layer_norm_epsilon"] = keys.epsilon("eps", 1e-6)
    keys.done()
    said = {ours: name for name, ours in _UMT5.items()} | {"d_kv": "dim_attn / num_heads"}
    whole = settle(keys.asked, sizes.umt5_sizes(tensors, "native"), fields, said)
    theirs.require_umt5(keys, whole)
    return whole


_CLIP = MappingProxyType({
    "vision_dim": "hidden_size", "vision_layers": "num_hidden_layers", "vision_heads": "num_attention_heads",
    "image_size": "image_size", "patch_size": "patch_size",
})  # fmt: skip
_CLIP_BESIDE = ("embed_dim", "vocab_size", "max_text_len", "text_dim", "text_heads", "text_layers")


def _clip(config: Mapping[str, Any], tensors: Tensors, allow: Collection[str], notes: list[str]) -> dict[str, Any]:
    keys = ConfigKeys(config, "reading the image encoder's config", allow, notes)
    keys.only("vision_pool", "token")
    keys.ignore(_CLIP_BESIDE)
    fields: dict[str, Any] = {ours: keys.integer(name, REQUIRED) for name, ours in _CLIP.items()}
    fields["intermediate_size"] = fields["hidden_size"] * keys.integer("vision_mlp_ratio", 4)
    keys.only("activation", "gelu", "quick_gelu")
    fields["hidden_act"] = config.get("activation", "gelu")
    fields["layer_norm_eps"] = keys.epsilon("norm_eps", 1e-5)
    keys.done()
    said = {ours: name for name, ours in _CLIP.items()} | {"intermediate_size": "vision_dim x vision_mlp_ratio"}
    whole = settle(keys.asked, sizes.clip_sizes(tensors, "native"), fields, said)
    theirs.require_clip(keys, whole)
    return whole


Reader = Callable[[Mapping[str, Any], Tensors, Collection[str], list[str]], dict[str, Any]]
READERS: Mapping[tuple[str, str], Reader] = MappingProxyType({
    ("wan", "native"): _transformer,
    ("wan", "diffusers"): theirs.transformer_config,
    ("wan_vae", "native"): _vae,
    ("wan_vae", "diffusers"): theirs.vae_config,
    ("wan_vae22", "native"): _vae22,
    ("wan_vae22", "diffusers"): theirs.vae22_config,
    ("umt5", "native"): _umt5,
    ("umt5", "transformers"): theirs.text_encoder_config,
    ("clip", "native"): _clip,
    ("clip", "transformers"): theirs.clip_config,
})  # fmt: skip
SIZES: Mapping[tuple[str, str], Callable[[Tensors], Sizes]] = MappingProxyType({
    ("wan", "native"): sizes.transformer_sizes,
    ("wan", "diffusers"): lambda tensors: sizes.transformer_sizes(tensors, "diffusers"),
    ("wan_vae", "native"): sizes.vae_sizes,
    ("wan_vae", "diffusers"): lambda tensors: sizes.vae_sizes(tensors, "diffusers"),
    ("wan_vae22", "native"): lambda tensors: sizes.vae_sizes(tensors, "native", "wan_vae22"),
    ("wan_vae22", "diffusers"): lambda tensors: sizes.vae_sizes(tensors, "diffusers", "wan_vae22"),
    ("umt5", "native"): lambda tensors: sizes.umt5_sizes(tensors, "native"),
    ("umt5", "transformers"): sizes.umt5_sizes,
    ("clip", "native"): lambda tensors: sizes.clip_sizes(tensors, "native"),
    ("clip", "transformers"): sizes.clip_sizes,
    ("taehv", "native"): sizes.taehv_sizes,
})  # fmt: skip
CLASSES: Mapping[str, tuple[str, str]] = MappingProxyType({
    "WanModel": ("wan", "native"),
    "VaceWanModel": ("wan", "native"),
    "WanTransformer3DModel": ("wan", "diffusers"),
    "WanVACETransformer3DModel": ("wan", "diffusers"),
    "WanVAE": ("wan_vae", "native"),
    "Wan2_2_VAE": ("wan_vae22", "native"),
    "umt5_encoder": ("umt5", "native"),
    "XLMRobertaCLIP": ("clip", "native"),
})  # fmt: skip
MODEL_TYPES: Mapping[str, tuple[str, str]] = MappingProxyType({
    "umt5": ("umt5", "transformers"),
    "clip": ("clip", "transformers"),
    "clip_vision_model": ("clip", "transformers"),
})  # fmt: skip


def kind_of_config(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """(kind, layout) of the weights that a config belongs to; None when it is none of ours."""
    name = config.get("_class_name")
    if name == theirs.VAE_CLASS:
        return ("wan_vae22" if theirs.is_residual(config) else "wan_vae"), "diffusers"
    found = CLASSES.get(name) if isinstance(name, str) else None
    return found or MODEL_TYPES.get(str(config.get("model_type")))


def config_of(
    kind: str,
    layout: str,
    config: Mapping[str, Any] | None,
    tensors: Tensors,
    allow: Collection[str] = (),
    notes: list[str] | None = None,
) -> dict[str, Any]:
    """The keywords of the kind's config class: from ``config`` if there is one, held against the tensors; else from
    their shapes. ``tensors`` are facts under the layout's names. ``notes`` grows by the unknown keys. Raises
    LoadError."""
    if config is None:
        found = SIZES[kind, layout](tensors)
        return settle(f"telling the sizes of {kind} from its tensors", found, None)
    belongs = kind_of_config(config)
    if belongs != (kind, layout):
        said = config.get("_class_name", config.get("model_type"))
        raise LoadError(
            f"reading the config of {kind} weights in the {layout} layout",
            f"it is of {said!r}" if said else "it says no class",
            "Use the config.json of these weights",
        )
    return READERS[kind, layout](config, tensors, allow, [] if notes is None else notes)
