"""Which stages make a video with a model: one list for each task of the family."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from ditkit.errors import SetupError, nearest
from ditkit.execution.stage_list import SOURCES, Stage, StageList

if TYPE_CHECKING:
    from ditkit.assembly.model import Model
    from ditkit.setup import Setup

INPUTS = {
    "t2v": (),
    "i2v": ("image", "last_image"),
    "flf2v": ("image", "last_image"),
    "ti2v": ("image",),
    "vace": ("control_video", "control_mask", "reference_images"),
}
"""Task -> the fields with pictures that a caller may bring."""

NEEDED = {"t2v": (), "i2v": ("image",), "flf2v": ("image", "last_image"), "ti2v": (), "vace": ()}
"""Task -> those of them that it cannot do without."""


CALLS: Mapping[str, tuple[str, ...]] = MappingProxyType({
    "expand_prompt": ("prompt_expander",),
    "encode_text": ("tokenizer", "text_encoder"),
    "encode_image": ("image_encoder",),
    "encode_condition": ("vae",),
    "encode_first_frame": ("vae",),
    "encode_control": ("vae",),
    "denoise": ("transformer", "transformer_2"),
    "decode_latents": ("vae",),
})  # fmt: skip
"""Stage -> the components that it may call, known before a model is."""


def stage_of(name: str, model: Model, setup: Setup) -> Stage:
    """One stage by its name, whatever else of ``model`` is on this machine."""
    from ditkit.stages.decode_latents import DecodeLatents
    from ditkit.stages.denoise import Denoise
    from ditkit.stages.encode_condition import EncodeCondition
    from ditkit.stages.encode_control import EncodeControl
    from ditkit.stages.encode_first_frame import EncodeFirstFrame
    from ditkit.stages.encode_image import EncodeImage
    from ditkit.stages.encode_text import EncodeText
    from ditkit.stages.expand_prompt import ExpandPrompt

    match name:
        case "expand_prompt":
            return ExpandPrompt()
        case "encode_text":
            return EncodeText()
        case "encode_image":
            return EncodeImage()
        case "encode_condition":
            return EncodeCondition(model.strides)
        case "encode_first_frame":
            return EncodeFirstFrame()
        case "encode_control":
            return EncodeControl()
        case "denoise":
            from ditkit.models.wan import TIMESTEP_SCALE

            return Denoise(model.strides, setup.attention, setup.cache_text_kv, model.experts, TIMESTEP_SCALE)
        case "decode_latents":
            return DecodeLatents(setup.vae_frames_per_chunk)
    raise SetupError(f"the stage {name!r}", f"there is none of that name{nearest(name, CALLS)}",
                     f"The stages are {', '.join(CALLS)}")  # fmt: skip


def pipeline_of(model: Model, setup: Setup) -> StageList:
    """The stages of ``model``'s task."""
    encoders: list[str] = []
    if model.task in ("i2v", "flf2v"):
        encoders = [*(["encode_image"] if model.has_image_branch else []), "encode_condition"]
    elif model.task == "ti2v":
        encoders = ["encode_first_frame"]
    elif model.task == "vace":
        encoders = ["encode_control"]
    expands = [] if setup.expander is None else ["expand_prompt"]
    names = [*expands, "encode_text", *encoders, "denoise", "decode_latents"]
    return StageList([stage_of(name, model, setup) for name in names], (*SOURCES, *INPUTS[model.task]))
