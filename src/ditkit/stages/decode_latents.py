"""Latents to frames: decoded a few latent frames at a time, announced as they come, 8 bits at the end."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ditkit.errors import StateError
from ditkit.execution.stage import BaseStage, Context
from ditkit.media import to_uint8


@dataclass(frozen=True)
class DecodeLatents(BaseStage):
    frames_per_chunk: int = 1

    name = "decode_latents"
    reads = ("latents", "request")
    optional = ("reference_images",)
    writes = ("video",)
    components = ("vae",)

    def __post_init__(self) -> None:
        if not 0 < self.frames_per_chunk < 1 << 31:
            raise ValueError("it decodes one latent frame at once, or more")

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, Any], ctx: Context) -> Mapping[str, Any]:
        vae = ctx.components["vae"]
        clips: list[torch.Tensor] = []
        references = inputs["reference_images"].shape[1] if "reference_images" in inputs else 0
        video = inputs["latents"][:, :, references:]  # they were denoised as frames before the video
        for latents in video.split(1):  # one clip at a time: equal to its single run, and less memory
            frames = []
            for chunk in self.decoded(vae, latents.to(vae.device, vae.dtype)):
                pixels = torch.from_numpy(to_uint8(chunk[0].float().cpu(), ctx.settings.rounding))
                ctx.events.emit("frames", frames=pixels, clip=len(clips))
                ctx.cancel.check()
                frames.append(pixels)
            clips.append(torch.cat(frames))
        return {"video": torch.stack(clips)}

    def decoded(self, vae: Any, latents: torch.Tensor) -> Iterator[torch.Tensor]:
        """Raises StateError for latents of another VAE."""
        try:
            yield from vae.decode(latents, self.frames_per_chunk)
        except ValueError as e:
            raise StateError("decoding latents", str(e), "Use the model that they were made with") from None
