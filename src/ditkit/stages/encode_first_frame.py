"""A picture to the first latent frame of a model that is told which frames are clean (Wan2.2 TI2V-5B)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ditkit.conditioning.clips import per_clip
from ditkit.conditioning.images import check_processing, resize_and_crop, resize_exact
from ditkit.errors import RequestError
from ditkit.execution.stage_list import BaseStage, Context


@dataclass(frozen=True)
class EncodeFirstFrame(BaseStage):
    """The picture is encoded as one frame: [B, C, 1, h, w]. ``wan`` covers and crops, ``diffusers`` squeezes."""

    name = "encode_first_frame"
    reads = ("image", "request")
    optional = ("last_image",)
    writes = ("clean_latents",)
    components = ("vae",)
    triggers = ("image",)

    @torch.no_grad()
    def run(self, inputs: Mapping[str, Any], ctx: Context) -> Mapping[str, Any]:
        if "last_image" in inputs:
            raise RequestError(
                "a video that ends with a given picture (last_image)",
                "this model takes a first picture only",
                "Leave last_image out, or use a model with a condition, such as FLF2V-14B or Wan2.2 I2V-A14B",
            )
        vae, settings = ctx.components["vae"], ctx.settings
        height, width, processing = settings.height, settings.width, settings.image_processing
        check_processing(processing)

        def clean(image: Tensor) -> Tensor:
            official = processing == "wan"
            pixels = (
                resize_and_crop(image, height, width) if official else resize_exact(image, height, width, processing)
            )
            return vae.encode(pixels[:, :, None].to(vae.device, vae.dtype)).float()

        return {"clean_latents": per_clip(clean, inputs["image"])}
