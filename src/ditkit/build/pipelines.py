"""Which stages make a video with a model: one list for each task of the family."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ditkit.pipeline import SOURCES, Pipeline, Stage

if TYPE_CHECKING:
    from ditkit.build.model import Model
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


def pipeline_of(model: Model, setup: Setup) -> Pipeline:
    """The stages of ``model``'s task."""
    from ditkit.stages.decode_latents import DecodeLatents
    from ditkit.stages.denoise import Denoise
    from ditkit.stages.encode_condition import EncodeCondition
    from ditkit.stages.encode_control import EncodeControl
    from ditkit.stages.encode_first_frame import EncodeFirstFrame
    from ditkit.stages.encode_image import EncodeImage
    from ditkit.stages.encode_text import EncodeText
    from ditkit.stages.expand_prompt import ExpandPrompt

    encoders: list[Stage] = []
    if model.task in ("i2v", "flf2v"):
        encoders = [*([EncodeImage()] if model.has_image_branch else []), EncodeCondition(model.strides)]
    elif model.task == "ti2v":
        encoders = [EncodeFirstFrame()]
    elif model.task == "vace":
        encoders = [EncodeControl()]
    return Pipeline(
        [
            *([] if setup.expander is None else [ExpandPrompt()]),
            EncodeText(),
            *encoders,
            Denoise(model.strides, setup.attention, setup.remember_text, model.experts),
            DecodeLatents(setup.vae_frames_per_chunk),
        ],
        (*SOURCES, *INPUTS[model.task]),
    )
