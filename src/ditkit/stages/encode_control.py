"""Control video, mask and reference pictures to the control input of VACE.

It always runs: without a control video everything is to be made, from grey, and only the references (if any) count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ditkit.conditioning.clips import per_clip
from ditkit.conditioning.control import control_context
from ditkit.conditioning.images import mask_pixels, pad_on_white, video_pixels
from ditkit.errors import RequestError
from ditkit.execution.stage_list import BaseStage, Context


@dataclass(frozen=True)
class EncodeControl(BaseStage):
    """[B, v, N + F, h, w]: the N reference pictures are latent frames in front of the F of the video.

    ``strides`` are the VAE's, as (frames, height, width). ``image_processing`` is also whose order the references have:
    diffusers puts each before those that came earlier."""

    strides: tuple[int, int, int] = (4, 8, 8)

    name = "encode_control"
    reads = ("prompt", "request")  # of the prompts only the number
    optional = ("control_video", "control_mask", "reference_images")
    writes = ("control",)
    components = ("vae",)

    @torch.no_grad()
    def run(self, inputs: Mapping[str, Any], ctx: Context) -> Mapping[str, Any]:
        vae, settings = ctx.components["vae"], ctx.settings
        size, processing = (settings.height, settings.width), settings.image_processing
        video, mask, references = (inputs.get(name) for name in self.optional)
        _check(video, mask, settings.frames)

        def encode(pixels: Tensor) -> Tensor:
            return vae.encode(pixels.to(vae.device, vae.dtype)).float().cpu()

        def control(_: Tensor, video: Tensor | None, mask: Tensor | None, references: Tensor | None) -> Tensor:
            grey = torch.zeros(3, settings.frames, *size)
            pixels = grey if video is None else video_pixels(video[0], *size, processing)
            new = torch.ones(1, settings.frames, *size) if mask is None else mask_pixels(mask[0], *size, processing)
            pictures = None if references is None else pad_on_white(references[0], *size, processing)
            if pictures is not None and processing == "diffusers":
                pictures = pictures.flip(0)
            return control_context(encode, pixels, new, pictures, self.strides)[None]

        clips = torch.zeros(len(inputs["prompt"]), 0)
        return {"control": per_clip(control, clips, video, mask, references)}


def _check(video: Tensor | None, mask: Tensor | None, frames: int) -> None:
    if video is None and mask is not None:
        raise RequestError(
            "a control mask without a control video", "there is nothing to be kept", "Give control_video as well"
        )
    for name, value in (("control_video", video), ("control_mask", mask)):
        if value is not None and value.shape[1] != frames:
            raise RequestError(
                f"{name} of {value.shape[1]} frames", f"the run makes {frames}", f"Cut it, or ask for {frames} of them"
            )
