"""Pictures to CLIP features: the original pictures, which the encoder itself resizes for its own network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ditkit.conditioning.clips import per_clip
from ditkit.execution.stage_list import BaseStage, Context


@dataclass(frozen=True)
class EncodeImage(BaseStage):
    """One picture gives [B, n, d], a first and a last one [B, 2n, d], the first one's rows first."""

    name = "encode_image"
    reads = ("image", "request")
    optional = ("last_image",)
    writes = ("image_embeds",)
    components = ("image_encoder",)
    triggers = ("image",)

    @torch.no_grad()
    def run(self, inputs: Mapping[str, Any], ctx: Context) -> Mapping[str, Any]:
        encoder, processing = ctx.components["image_encoder"], ctx.settings.image_processing

        def features(image: Tensor) -> Tensor:
            return encoder.encode(image, processing)

        pictures = [inputs[name] for name in ("image", "last_image") if name in inputs]
        return {"image_embeds": torch.cat([per_clip(features, picture) for picture in pictures], dim=1)}
