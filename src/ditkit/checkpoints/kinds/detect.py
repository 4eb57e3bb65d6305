"""What a set of tensors is: kind, layout, task and size, by names, shapes, types and metadata, never by file names.

One signature must fit, and one only; no signature and several are errors that list the candidates. What is recognised
but cannot be run (relatives of Wan with branches of their own) is named, with the reason in ``problems``.
Leaves out: the config and the other parts of a model (parts.py), and the families of LoRAs (lora.py).
Sources of the telling names: the official repositories; ComfyUI ``comfy/model_detection.py`` for the relatives.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ditkit.checkpoints.kinds.sizes import SIZE_NAMES, Tensors
from ditkit.checkpoints.kinds.table import SIZES, task_of
from ditkit.checkpoints.views.source import TensorSource
from ditkit.errors import LoadError


@dataclass(frozen=True)
class Signature:
    """``kind`` in ``layout`` has all of ``has`` and none of ``lacks``; both are whole names."""

    kind: str
    layout: str
    has: tuple[str, ...]
    lacks: tuple[str, ...] = ()


_VAE_DIFFUSERS = "decoder.mid_block.resnets.0.norm1.gamma"
_UMT5_BIAS = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"

SIGNATURES = (
    Signature("wan", "native", ("patch_embedding.weight", "head.modulation", "blocks.0.self_attn.q.weight")),
    Signature(
        "wan", "diffusers", (
            "patch_embedding.weight", "condition_embedder.text_embedder.linear_1.weight", "blocks.0.attn1.to_q.weight"
        ),
    ),
    Signature("vace_module", "native", ("vace_blocks.0.after_proj.weight",), ("patch_embedding.weight",)),
    Signature("vace_module", "diffusers", ("vace_blocks.0.proj_out.weight",), ("patch_embedding.weight",)),
    Signature("wan_vae", "native", ("decoder.middle.0.residual.0.gamma", "encoder.downsamples.0.residual.0.gamma")),
    Signature(
        "wan_vae22", "native",
        ("decoder.middle.0.residual.0.gamma", "encoder.downsamples.0.downsamples.0.residual.0.gamma"),
    ),
    Signature("wan_vae", "diffusers", (_VAE_DIFFUSERS, "encoder.down_blocks.0.norm1.gamma")),
    Signature("wan_vae22", "diffusers", (_VAE_DIFFUSERS, "encoder.down_blocks.0.resnets.0.norm1.gamma")),
    Signature("umt5", "native", ("token_embedding.weight", "blocks.0.pos_embedding.embedding.weight")),
    Signature(
        "umt5", "transformers", ("encoder.final_layer_norm.weight", _UMT5_BIAS.format(0)),
    ),
    Signature("clip", "native", ("visual.patch_embedding.weight", "visual.transformer.0.attn.to_qkv.weight")),
    Signature(
        "clip", "transformers", ("embeddings.patch_embedding.weight", "encoder.layers.0.self_attn.q_proj.weight")
    ),
    Signature(
        "clip", "transformers", (
            "vision_model.embeddings.patch_embedding.weight", "vision_model.encoder.layers.0.self_attn.q_proj.weight"
        ),
    ),
    Signature("taehv", "native", ("encoder.17.weight", "decoder.1.weight", "decoder.3.conv.0.weight")),
    Signature("taehv", "native", ("encoder.17.weight", "decoder.0.weight", "decoder.1.conv.3.weight")),
)  # fmt: skip

LORA = re.compile(
    r".+\.(lora_(A|B|up|down)(\.\w+)?(\.weight|\.bias)?|lora_\w+\.(up|down)\.weight|lokr_\w+|hada_\w+|oft_\w+|diff(_b|_m)?)"
)
"""A tensor of an adapter; one is enough, because nothing else has such names."""

RELATIVES: tuple[tuple[str, str], ...] = (
    (r"face_adapter\.", "Animate"),
    (r"motion_encoder\.", "Animate"),
    (r"casual_audio_encoder\.", "S2V"),
    (r"audio_proj\.", "HuMo"),
    (r"control_adapter\.", "Fun-Camera"),
    (r"ref_conv\.", "Fun-Reference"),
    (r"dwpose_embedding\.", "UniAnimate"),
    (r"\w*(vae_)?pose_patch_embedding\.", "Animate"),
)
"""Beginnings of names -> the relative of Wan that has such tensors. None of them runs here."""

CHANNEL_RELATIVES = MappingProxyType({(48, 16): "Fun-Control", (32, 16): "control by extra channels"})
"""(in_dim, out_dim) of transformers whose condition is not the official one."""


@dataclass(frozen=True)
class Detected:
    """``kind``: wan, wan_vae, wan_vae22, umt5, clip, taehv, lora, vace_module or state. ``layout``: native, diffusers,
    transformers, or the empty string. ``prefix`` was in front of all names. ``variant`` is the task of a transformer.
    ``possible``: the models that these could be; when there are several, ``decides`` says what tells them apart.
    ``config``: what shapes tell of the sizes. ``problems``: why it cannot be run, as sentences."""

    kind: str
    layout: str
    prefix: str = ""
    quantization: str | None = None
    family: str = ""
    variant: str | None = None
    size_name: str | None = None
    possible: tuple[str, ...] = ()
    decides: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlainView:
    """A source without prefix and scales: what signatures and key tables are about."""

    source: TensorSource
    prefix: str
    quantization: str | None


def plain(source: TensorSource) -> PlainView:
    """``source`` seen without the prefix that all of its names share, and dequantised if it is quantised."""
    from ditkit.checkpoints.views.prefixes import Unprefixed
    from ditkit.checkpoints.views.quantized import Dequantized

    unprefixed = Unprefixed(source)
    dequantized = Dequantized(unprefixed)
    return PlainView(dequantized, unprefixed.prefix, dequantized.quantization)


def detect(source: TensorSource) -> Detected:
    """What ``source`` is. Raises LoadError when nothing fits, or several kinds do."""
    return recognise(source)[0]


def recognise(source: TensorSource) -> tuple[Detected, TensorSource]:
    """What ``source`` is, and ``source`` as it was looked at: for parts of a model, plain."""
    if "ditkit.state" in source.metadata:
        problem = "it is a saved State of ditkit, not a model"
        return Detected("state", "", family="ditkit", problems=(problem,)), source
    if any(LORA.fullmatch(name) for name in source.tensors):
        return Detected("lora", "", family="Wan"), source
    view = plain(source)
    return _recognise(view, f"recognising {source.path}"), view.source


def _recognise(view: PlainView, asked: str) -> Detected:
    tensors = view.source.tensors
    fitting = dict.fromkeys(
        (one.kind, one.layout)
        for one in SIGNATURES
        if all(name in tensors for name in one.has) and not any(name in tensors for name in one.lacks)
    )
    if len(fitting) > 1:
        listed = " and ".join(f"{kind} ({layout})" for kind, layout in fitting)
        raise LoadError(asked, f"its tensors fit {listed}", "Give one component at a time")
    if not fitting:
        raise LoadError(asked, _unknown(tensors), "Give weights of a supported model")
    ((kind, layout),) = fitting
    about: dict[str, Any] = {"prefix": view.prefix, "quantization": view.quantization}
    if kind == "vace_module":
        problem = "it holds only VACE's control branch, without the transformer that it belongs to"
        return Detected(kind, layout, **about, family="Wan 2.1", variant="vace", problems=(problem,))
    if kind == "wan":
        return _transformer(layout, tensors, about)
    sizes = SIZES[kind, layout](bare(kind, tensors))
    config = {**sizes.fields, **sizes.assumed}
    family = {"wan_vae": "Wan 2.1", "wan_vae22": "Wan 2.2", "taehv": "TAEHV", "umt5": "UMT5", "clip": "CLIP"}[kind]
    problems: tuple[str, ...] = ()
    if kind == "umt5" and layout == "transformers" and config["num_layers"] > 1 and _UMT5_BIAS.format(1) not in tensors:
        problems = ("it is a T5 with positions in its first block only, and Wan's is a UMT5 with its own in each",)
    return Detected(kind, layout, **about, family=family, config=config, problems=problems)


CLIP_FILE_PREFIX = "vision_model."


def bare(kind: str, tensors: Tensors) -> Tensors:
    """Facts under the names that sizes are read from: those of CLIP's image half without ``vision_model.``."""
    if kind != "clip" or not any(name.startswith(CLIP_FILE_PREFIX) for name in tensors):
        return tensors
    start = len(CLIP_FILE_PREFIX)
    return {name[start:]: facts for name, facts in tensors.items() if name.startswith(CLIP_FILE_PREFIX)}


def _transformer(layout: str, tensors: Tensors, about: Mapping[str, Any]) -> Detected:
    sizes = SIZES["wan", layout](tensors)
    config = {**sizes.fields, **sizes.assumed}
    config["vace_layers"] = config.get("vace_layers", ("?",) * sizes.lengths["vace_layers"])
    variant, size = task_of(config), SIZE_NAMES.get((config["dim"], config["ffn_dim"], config["num_layers"]))
    relatives = _relatives(tensors, config) if variant is None or _extra(tensors) else ()
    problems = tuple(f"it is {name}, a relative of Wan that ditkit does not run" for name in relatives)
    if variant is None and not problems:
        channels = f"{config['in_dim']} input and {config['out_dim']} output channels"
        problems = (f"its {channels} are those of no task that ditkit runs",)
    possible, decides = _possible(variant, size, config["image_dim"] is not None)
    return Detected(
        "wan", layout, **about, family=_family(possible), variant=relatives[0] if relatives else variant,
        size_name=size, possible=() if problems else possible, decides=None if problems else decides, config=config,
        problems=problems,
    )  # fmt: skip


def _extra(tensors: Iterable[str]) -> bool:
    return any(re.match(pattern, name) for name in tensors for pattern, _ in RELATIVES)


def _relatives(tensors: Iterable[str], config: Mapping[str, Any]) -> tuple[str, ...]:
    names = dict.fromkeys(relative for name in tensors for pattern, relative in RELATIVES if re.match(pattern, name))
    by_channels = CHANNEL_RELATIVES.get((config["in_dim"], config["out_dim"]))
    return tuple(names) or ((by_channels,) if by_channels else ())


EXPERTS = (
    "the role that its folder or a manifest gives it (high_noise_model is `transformer`, low_noise_model "
    "`transformer_2`)"
)


def _possible(variant: str | None, size: str | None, image: bool) -> tuple[tuple[str, ...], str | None]:
    """The published models that these tensors could be, and what tells them apart."""
    name = size or "of another size"
    two = [f"Wan 2.2 {str(variant).upper()}-A14B, {noise}-noise expert" for noise in ("high", "low")]
    if variant == "t2v":
        if size == "14B":
            return ("Wan 2.1 T2V-14B", *two), EXPERTS
        return (f"Wan 2.1 T2V {name}",) if size else (f"Wan T2V {name}",), None
    if variant == "i2v" and not image:
        if size == "14B":
            return tuple(two), EXPERTS
        return (f"Wan 2.2 I2V {name}, one of two experts or alone",), EXPERTS
    if variant == "i2v":
        if size == "14B":
            return ("Wan 2.1 I2V-14B-480P", "Wan 2.1 I2V-14B-720P"), "only the size of video that it was trained for"
        return (f"Wan 2.1 I2V {name}",), None
    if variant == "ti2v":
        return (f"Wan 2.2 TI2V {name}",), None
    if variant is None:
        return (), None
    return (f"Wan 2.1 {variant.upper()} {name}",), None


def _family(possible: Iterable[str]) -> str:
    versions = {version for name in possible for version in re.findall(r"Wan 2\.\d", name)}
    return " or ".join(sorted(versions)) or "Wan"


def _unknown(tensors: Tensors) -> str:
    """The signature that comes nearest, and which of its names is not there; else what the names begin with."""
    best = max(SIGNATURES, key=lambda one: sum(name in tensors for name in one.has) / len(one.has))
    absent = [name for name in best.has if name not in tensors]
    if len(absent) < len(best.has):
        return f"nothing fits; the nearest is {best.kind} ({best.layout}), which has {absent[0] if absent else '?'}"
    begin = sorted({name.split(".")[0] for name in tensors})
    return f"nothing fits its {len(tensors)} tensors, whose names begin with {', '.join(begin[:6])}"
