"""A first picture, and a last one where there is one, to the condition of image-to-video: mask and latents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ditkit.conditioning.clips import per_clip
from ditkit.conditioning.condition import image_condition
from ditkit.conditioning.images import resize_exact, resize_to_fit
from ditkit.execution.stage_list import BaseStage, Context


@dataclass(frozen=True)
class EncodeCondition(BaseStage):
    """[B, c, F, h, w]: t mask channels, then the latents'. ``strides`` are the VAE's, as (frames t, height, width)."""

    strides: tuple[int, int, int] = (4, 8, 8)

    name = "encode_condition"
    reads = ("image", "request")
    optional = ("last_image",)
    writes = ("condition",)
    components = ("vae",)
    triggers = ("image",)

    @torch.no_grad()
    def run(self, inputs: Mapping[str, Any], ctx: Context) -> Mapping[str, Any]:
        vae, settings = ctx.components["vae"], ctx.settings
        height, width, processing = settings.height, settings.width, settings.image_processing

        def encode(video: Tensor) -> Tensor:
            return vae.encode(video.to(vae.device, vae.dtype)).float().cpu()

        def condition(image: Tensor, last_image: Tensor | None) -> Tensor:
            if last_image is not None and processing == "wan":  # diffusers squeezes it, whatever its shape
                last_image = resize_to_fit(last_image, *image.shape[1:3])
            first = resize_exact(image, height, width, processing)
            last = None if last_image is None else resize_exact(last_image, height, width, processing)
            return image_condition(encode, first, last, settings.frames, self.strides[0])

        return {"condition": per_clip(condition, inputs["image"], inputs.get("last_image"))}
